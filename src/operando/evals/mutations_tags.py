"""Edits of think blocks and other tags: split, merged, mangled, empty, invented."""

from __future__ import annotations

from operando.evals.answers import Answer, Variants, block_of, insert, pairs, split_at_answer
from operando.rewards.formats import CLOSE, OPEN

MANGLED = (
    ("<Think>", "</Think>"),
    ("<THINK>", "</THINK>"),
    ("<think mode=x>", CLOSE),
    ("< think >", "< / think >"),
    ("<think\n>", "</think >"),
    ("<th\u200bink>", "</th\u200bink>"),
    (OPEN, "</Think>"),
    ("<Think>", CLOSE),
)
FLOOD = (0, 1, 5, 6, 50)
INVENTED = [f"aside_{a}{b}" for a in "abcdefgh" for b in "stuvwxyz"]  # no digit: it might be gold
EMPTY = ("", " ", " ... ")  # nothing that could be work
EMPTY_MARKS = (
    "<answer></answer> ",
    "<reasoning> </reasoning> ",
    "```\n``` ",
    "```python\n``` ",
    "\\boxed{} ",
    "[] ",
    "** ** ",
)


def _cut(inner: str, times: int) -> str | None:
    """Return the inside of a block cut into `times` + 1 blocks; the last holds little."""
    pieces = inner.rstrip().rsplit(" ", times)
    return f" {CLOSE} {OPEN} ".join(pieces) + " " if len(pieces) == times + 1 else None


def split(answer: Answer) -> list[Variants]:
    block = block_of(answer)
    if block is None:
        return []
    cuts = [(n, _cut(block.inner, n)) for n in (1, 2, 4)] + [(1, f"{block.inner}{CLOSE}{OPEN}")]
    return pairs(block.text(block.inner), [(n, block.text(c)) for n, c in cuts if c is not None])


def merge(answer: Answer) -> list[Variants]:
    block = block_of(answer)
    if block is None:
        return []
    more, less = _cut(block.inner, 2), _cut(block.inner, 1)
    return pairs(block.text(more), [(1, block.text(less))]) if more and less else []


def outside(answer: Answer) -> list[Variants]:
    block = block_of(answer)
    if block is None or not block.inner.strip():
        return []
    before, opening, inner, after = block
    afters = [
        (1, f"{before}{opening}{CLOSE} {inner}{after}"),
        (1, f"{before}{opening} so {CLOSE} {inner}{after}"),
    ]
    if opening:
        afters += [(1, f"{before}{inner} {OPEN}{CLOSE}{after}")]
        afters += [(1, f"{before}{inner} {OPEN} so {CLOSE}{after}")]
    return pairs(block.text(inner), afters)


def recase(answer: Answer) -> list[Variants]:
    block = block_of(answer)
    if block is None:
        return []
    text = block.text(block.inner)
    return pairs(text, [(1, text.replace(OPEN, o).replace(CLOSE, c)) for o, c in MANGLED])


def nest(answer: Answer) -> list[Variants]:
    block = block_of(answer)
    if block is None:
        return []
    nested = [(n, block.text(OPEN * n + block.inner + CLOSE * n)) for n in (1, 3)]
    return pairs(block.text(block.inner), nested)


def unclose(answer: Answer) -> list[Variants]:
    block = block_of(answer)
    if block is None:
        return []
    left_open = f"{block.before}{block.opening}{block.inner}{block.after}"
    half_open = block.text(f"{block.inner} {CLOSE} {OPEN}").removesuffix(block.after)
    reopened = half_open.removesuffix(CLOSE) + block.after
    return pairs(block.text(block.inner), [(1, left_open), (1, reopened)])


def closing_only(answer: Answer) -> list[Variants]:
    block = block_of(answer)
    if block is None:
        return []
    text = block.text(block.inner)
    more = [(n, block.text(block.inner + CLOSE * n)) for n in (1, 5, 50)]
    return pairs(text, [*more, (1, f"{block.before}{block.inner}{CLOSE}{block.after}")])


def empty_block(answer: Answer) -> list[Variants]:
    """A think block with nothing in it, beside the same text without one; other empty marks too."""
    block = block_of(answer)
    added = insert(answer, [(1, mark) for mark in EMPTY_MARKS])
    if block is None:
        return added
    before, opening, inner, after = block
    bare = f"{before}{inner}{after}"
    return added + pairs(
        bare, [(1, f"{before}{opening}{nothing}{CLOSE} {inner}{after}") for nothing in EMPTY]
    )


def flood(answer: Answer) -> list[Variants]:
    head, tail = split_at_answer(answer.completion)
    head = head.rstrip() + " "
    distinct = tuple(head + "".join(f"<{name}> " for name in INVENTED[:n]) + tail for n in FLOOD)
    same = tuple(f"{head}{'<aside> ' * n}{tail}" for n in FLOOD)
    return [Variants(distinct, FLOOD), Variants(same, FLOOD)]
