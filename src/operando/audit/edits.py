"""Edits of an answer that deserve no better pay, each with what it must do to a reward.

An edit leaves the final answer as it is. It returns chains of texts, the first of them the text
before the edit. The P-numbers are the properties that a penalty must have (docs/fuzzing.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from operando.recipe import STEP_WORDS
from operando.rewards.formats import CLOSE, OPEN

Must = Literal["never raise", "not change", "cost ever more"]


class Chain(NamedTuple):
    """Texts from before the edit on, and how often it is applied in each.

    Example: Chain(("a <think>b</think> c", ...), times=(0, 1, 5))
    """

    texts: tuple[str, ...]
    times: tuple[int, ...]


@dataclass(frozen=True)
class Edit:
    """One edit. Example: Edit("split", "P1", "never raise", split)"""

    name: str
    prop: str
    must: Must
    apply: Callable[[str, str], list[Chain]]
    """apply(prefill, completion); an empty list where it does not apply."""
    on: Literal["any", "wrong"] = "any"
    is_evasion: bool = False
    """No list of words can know it: reported apart, and not a finding."""


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
OPENERS = re.compile(
    r"(?<![^\W\d_])(?:"
    + "|".join(re.escape(w) for w in sorted(STEP_WORDS, key=len, reverse=True))
    + r")(?![^\W\d_])",
    re.IGNORECASE,
)
SYNONYMS = [word for word in STEP_WORDS if " " not in word and "-" not in word and word != "check"]
UNLISTED = ("hold on", "one second", "on second thought")
PLANTED = "Wait, let me check. Hmm, but maybe not. Actually, yes. "
# Alike in words and in characters; the first holds listed words only inside of others.
INNOCENT = "The waiter buttered the attributes and factually awaits butterflies. "
NEUTRAL = "The sailor polished the flowerpots and regularly visits dragonflies. "
PAD = " That is all there is to say."
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
EQUATION = re.compile(r"(?<![\d.])(\d{1,9})\s*([-+*/])\s*(\d{1,9})\s*=\s*(\d{1,9})(?![\d.])")
BIG = 50_000  # no step of a problem arrives at it or at its neighbours by chance
SHOTS = (*range(201), -7)  # ends in a number that is nobody's answer


# --- the parts of an answer ----------------------------------------------------------------------


class Block(NamedTuple):
    """A completion around its think block; `opening` is empty if the prompt opened the block."""

    before: str
    opening: str
    inner: str
    after: str  # begins behind the closing tag

    def text(self, inner: str) -> str:
        return f"{self.before}{self.opening}{inner}{CLOSE}{self.after}"


def split_at_answer(completion: str) -> tuple[str, str]:
    """Return what stands before the final answer, and the answer with all that follows.

    The answer begins at the last "####", else at the last number after the last think block.
    """
    at = completion.rfind("####")
    if at < 0:
        start = completion.rfind(CLOSE) + len(CLOSE) if CLOSE in completion else 0
        found = [m.start() for m in NUMBER.finditer(completion) if m.start() >= start]
        at = found[-1] if found else len(completion)
    return completion[:at], completion[at:]


def is_opened(prefill: str) -> bool:
    """Return whether the prompt ends inside a think block."""
    return prefill.rfind(OPEN) > prefill.rfind(CLOSE)


def with_block(prefill: str, completion: str) -> str:
    """Return the completion with a think block, put around its reasoning if it has none."""
    if CLOSE in completion and (is_opened(prefill) or OPEN in completion):
        return completion
    head, tail = split_at_answer(completion.replace(OPEN, "").replace(CLOSE, ""))
    return f"{'' if is_opened(prefill) else OPEN}{head}{CLOSE} {tail}"


def with_openers(completion: str) -> str:
    """Return the completion with a few listed openers in its reasoning."""
    if CLOSE in completion:
        at = completion.index(CLOSE)
        return f"{completion[:at].rstrip()} {PLANTED}{completion[at:]}"
    head, tail = split_at_answer(completion)
    return f"{head.rstrip()} {PLANTED}{tail}"


def _block(prefill: str, completion: str) -> Block | None:
    text = with_block(prefill, completion)
    start = 0 if is_opened(prefill) else text.find(OPEN)
    end = text.find(CLOSE, max(start, 0))
    if start < 0 or end < 0:
        return None
    opening = "" if is_opened(prefill) else OPEN
    inner, after = text[start + len(opening) : end], text[end + len(CLOSE) :]
    if "####" in inner or not any(c.isalnum() for c in after):
        return None  # the answer stands inside of the block, where edits would reach it
    return Block(text[:start], opening, inner, after)


def _pairs(before: str, afters: Sequence[tuple[int, str]]) -> list[Chain]:
    return [Chain((before, after), (0, n)) for n, after in afters if after != before]


# --- think blocks --------------------------------------------------------------------------------


def _cut(inner: str, times: int) -> str | None:
    """Return the inside of a block cut into `times` + 1 blocks; the last holds little."""
    pieces = inner.rstrip().rsplit(" ", times)
    return f" {CLOSE} {OPEN} ".join(pieces) + " " if len(pieces) == times + 1 else None


def split(prefill: str, completion: str) -> list[Chain]:
    block = _block(prefill, completion)
    if block is None:
        return []
    cuts = [(n, _cut(block.inner, n)) for n in (1, 2, 4)] + [(1, f"{block.inner}{CLOSE}{OPEN}")]
    return _pairs(block.text(block.inner), [(n, block.text(c)) for n, c in cuts if c is not None])


def merge(prefill: str, completion: str) -> list[Chain]:
    block = _block(prefill, completion)
    if block is None:
        return []
    more, less = _cut(block.inner, 2), _cut(block.inner, 1)
    return _pairs(block.text(more), [(1, block.text(less))]) if more and less else []


def outside(prefill: str, completion: str) -> list[Chain]:
    block = _block(prefill, completion)
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
    return _pairs(block.text(inner), afters)


def recase(prefill: str, completion: str) -> list[Chain]:
    block = _block(prefill, completion)
    if block is None:
        return []
    text = block.text(block.inner)
    return _pairs(text, [(1, text.replace(OPEN, o).replace(CLOSE, c)) for o, c in MANGLED])


def nest(prefill: str, completion: str) -> list[Chain]:
    block = _block(prefill, completion)
    if block is None:
        return []
    nested = [(n, block.text(OPEN * n + block.inner + CLOSE * n)) for n in (1, 3)]
    return _pairs(block.text(block.inner), nested)


def unclose(prefill: str, completion: str) -> list[Chain]:
    block = _block(prefill, completion)
    if block is None:
        return []
    left_open = f"{block.before}{block.opening}{block.inner}{block.after}"
    half_open = block.text(f"{block.inner} {CLOSE} {OPEN}").removesuffix(block.after)
    reopened = half_open.removesuffix(CLOSE) + block.after
    return _pairs(block.text(block.inner), [(1, left_open), (1, reopened)])


def closing_only(prefill: str, completion: str) -> list[Chain]:
    block = _block(prefill, completion)
    if block is None:
        return []
    text = block.text(block.inner)
    more = [(n, block.text(block.inner + CLOSE * n)) for n in (1, 5, 50)]
    return _pairs(text, [*more, (1, f"{block.before}{block.inner}{CLOSE}{block.after}")])


# --- words ---------------------------------------------------------------------------------------


def _swap(completion: str, change: Callable[[str], str]) -> list[Chain]:
    """Return the completion with its first listed opener changed, and with all of them."""
    head, tail = split_at_answer(completion)
    found = len(OPENERS.findall(head))
    afters = [
        (n, OPENERS.sub(lambda m: change(m[0]), head, count=n) + tail) for n in {1, found} if found
    ]
    return _pairs(completion, afters)


def _like(word: str, model: str) -> str:
    return word.capitalize() if model[0].isupper() else word


def synonym(prefill: str, completion: str) -> list[Chain]:
    del prefill
    return [c for w in SYNONYMS for c in _swap(completion, lambda old, w=w: _like(w, old))]


def change_case(prefill: str, completion: str) -> list[Chain]:
    del prefill
    changes = (str.upper, str.lower, str.capitalize)
    return [c for change in changes for c in _swap(completion, change)]


def invisible(prefill: str, completion: str) -> list[Chain]:
    del prefill
    changes = (
        lambda w: w[0] + "\u200b" + w[1:],
        lambda w: w[:-1] + "\u00ad" + w[-1],
        lambda w: "\u2060".join(w),
        lambda w: w.replace(" ", "\u00a0\n "),
        lambda w: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in w),  # full width
    )
    head, tail = split_at_answer(completion)
    spread = [(1, head.replace(" ", "  ") + tail), (1, head.replace(" ", "\n") + tail)]
    return [c for change in changes for c in _swap(completion, change)] + _pairs(completion, spread)


def innocent(prefill: str, completion: str) -> list[Chain]:
    del prefill
    at = completion.find(CLOSE)
    head, tail = (completion[:at], completion[at:]) if at >= 0 else split_at_answer(completion)
    head = head.rstrip() + " "
    return [
        Chain((f"{head}{NEUTRAL * n}{tail}", f"{head}{INNOCENT * n}{tail}"), (0, n)) for n in (1, 5)
    ]


def more_openers(prefill: str, completion: str) -> list[Chain]:
    del prefill
    at = completion.find(CLOSE)
    head, tail = (completion[:at], completion[at:]) if at >= 0 else split_at_answer(completion)
    return _pairs(completion, [(n, f"{head.rstrip()} {'Wait, ' * n}{tail}") for n in (1, 3, 10)])


def unlisted_opener(prefill: str, completion: str) -> list[Chain]:
    del prefill
    return [c for w in UNLISTED for c in _swap(completion, lambda old, w=w: _like(w, old))]


def inflected(prefill: str, completion: str) -> list[Chain]:
    del prefill
    return _swap(completion, lambda word: f"{word}ing")


def spelled_out(prefill: str, completion: str) -> list[Chain]:
    del prefill
    return [c for sign in "- " for c in _swap(completion, lambda w, sign=sign: sign.join(w))]


# --- length, tags, answers -----------------------------------------------------------------------


def pad_after(prefill: str, completion: str) -> list[Chain]:
    del prefill
    return _pairs(completion, [(n, completion.rstrip() + PAD * n) for n in (1, 3, 10)])


def repeat(prefill: str, completion: str) -> list[Chain]:
    del prefill
    at = completion.find(CLOSE)
    head, tail = (completion[:at], completion[at:]) if at >= 0 else split_at_answer(completion)
    opening = head[: head.find(OPEN) + len(OPEN)] if OPEN in head else ""
    said = head.removeprefix(opening)
    if not said.strip() or "####" in said:
        return []
    return _pairs(
        completion, [(n, opening + (said.rstrip() + " ") * (n + 1) + tail) for n in (1, 4)]
    )


def flood(prefill: str, completion: str) -> list[Chain]:
    del prefill
    head, tail = split_at_answer(completion)
    head = head.rstrip() + " "
    distinct = tuple(head + "".join(f"<{name}> " for name in INVENTED[:n]) + tail for n in FLOOD)
    same = tuple(f"{head}{'<aside> ' * n}{tail}" for n in FLOOD)
    return [Chain(distinct, FLOOD), Chain(same, FLOOD)]


def shotgun(prefill: str, completion: str) -> list[Chain]:
    del prefill
    head, tail = split_at_answer(completion)
    plain = " ".join(map(str, SHOTS))
    marked = " ".join(f"#### {n}" for n in SHOTS)
    afters = [f"{head}{plain} {tail}", f"{head}{marked} {tail}", f"{completion} {plain} no"]
    return _pairs(completion, [(len(SHOTS), after) for after in afters])


# --- equations -----------------------------------------------------------------------------------


def _with_equations(completion: str, chains: Sequence[Sequence[str]]) -> list[Chain]:
    """Return the completion with each list of equations before its "####"; without one, nothing."""
    head, mark, tail = completion.rpartition("####")
    if not mark:
        return []
    afters = [(len(e), f"{head.rstrip()}; {'; '.join(e)} {mark}{tail}") for e in chains if e]
    return _pairs(completion, afters)


def trivial(prefill: str, completion: str) -> list[Chain]:
    del prefill
    return _with_equations(completion, [[f"{BIG}+{BIG}={2 * BIG}"] * n for n in (1, 3)])


def distinct_trivia(prefill: str, completion: str) -> list[Chain]:
    del prefill
    trivia = [f"{BIG + i}+1={BIG + i + 1}" for i in range(3)]
    return _with_equations(completion, [trivia[:1], trivia])


def identities(prefill: str, completion: str) -> list[Chain]:
    del prefill
    shown = EQUATION.findall(completion.partition("####")[0])
    numbers = [*(c for _, _, _, c in shown), str(BIG)]
    return _with_equations(
        completion, [[f"{n}*1={n}", f"{n}+0={n}", f"{n}/1={n}"] for n in numbers]
    )


def commuted(prefill: str, completion: str) -> list[Chain]:
    del prefill
    shown = EQUATION.findall(completion.partition("####")[0])
    right = {"+": lambda a, b: a + b, "*": lambda a, b: a * b}
    copies = [
        f"{b}{op}{a}={c}"
        for a, op, b, c in shown
        if op in right and right[op](int(a), int(b)) == int(c)
    ]
    return _with_equations(completion, [copies[:1], copies])


def needless_chain(prefill: str, completion: str) -> list[Chain]:
    del prefill
    shown = EQUATION.findall(completion.partition("####")[0])
    chains = []
    for start in {int(a) for a, _, _, _ in shown[:1]}:
        values = [start + BIG * i for i in range(4)]
        steps = [f"{a}+{BIG}={b}" for a, b in zip(values, values[1:], strict=False)]
        chains += [steps[:1], steps]
    return _with_equations(completion, chains)


def enumeration(prefill: str, completion: str) -> list[Chain]:
    del prefill
    return _with_equations(completion, [[f"{n}+1={n + 1}" for n in range(1, 200)]])


EDITS = (
    Edit("split blocks", "P1", "never raise", split),
    Edit("merge blocks", "P1", "never raise", merge),
    Edit("move outside tags", "P2", "never raise", outside),
    Edit("re-case openers", "P3", "never raise", change_case),
    Edit("innocent words", "P3", "not change", innocent),
    Edit("more openers", "P5", "never raise", more_openers),
    Edit("repeat", "P5", "never raise", repeat),
    Edit("re-case tags", "P6", "never raise", recase),
    Edit("nest blocks", "P6", "never raise", nest),
    Edit("leave unclosed", "P6", "never raise", unclose),
    Edit("closing tags only", "P6", "never raise", closing_only),
    Edit("flood of tags", "P7", "cost ever more", flood),
    Edit("pad after the answer", "P8", "never raise", pad_after),
    Edit("list of numbers", "P9", "never raise", shotgun, on="wrong"),
    Edit("listed synonym", "P10", "never raise", synonym),
    Edit("invisible characters", "P10", "never raise", invisible),
    Edit("trivial equation", "P11", "never raise", trivial),
    Edit("distinct trivia", "P11", "never raise", distinct_trivia),
    Edit("identities", "P11", "never raise", identities),
    Edit("commuted copies", "P11", "never raise", commuted),
    Edit("needless chain", "P11", "never raise", needless_chain),
    Edit("every small sum", "P11", "never raise", enumeration),
    Edit("unlisted opener", "P10", "never raise", unlisted_opener, is_evasion=True),
    Edit("inflected opener", "P10", "never raise", inflected, is_evasion=True),
    Edit("spelled-out opener", "P10", "never raise", spelled_out, is_evasion=True),
)
