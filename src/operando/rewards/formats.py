"""Tags in an answer: finding them, pairing them with a stack, paying for one think block.

A tag is looked for in normalised text (NFKC, without zero-width characters and combining marks), so
that "＜think＞" or a think tag with a zero-width space inside does not pass for no tag.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import NamedTuple

from operando.recipe.rewards import TagFenceReward, ThinkFormatReward
from operando.rewards.outcome import OutcomeReward
from operando.types import Rollout

OPEN, CLOSE = "<think>", "</think>"

TAG = re.compile(r"<\s*(?P<slash>/?)\s*(?P<name>\w[\w\-.:]*)(?P<rest>\s[^<>]*|\s*/)?>")
LF_GRPO_TAG = re.compile(r"</?([a-zA-Z0-9_\-.:]+)>")
INVISIBLE = ("Cf", "Mn", "Me")  # zero-width and other format characters, combining marks


class Tag(NamedTuple):
    """One tag where it stands. Example: Tag("Think", closing=False, text="<Think >", at=4)"""

    name: str
    closing: bool
    text: str
    at: int


class Paired(NamedTuple):
    """A tag after pairing: its partner's index or None, and the tag that it stands in."""

    tag: Tag
    partner: int | None
    inside: str | None


# --- text ----------------------------------------------------------------------------------------


def whole_answer(rollout: Rollout) -> str:
    """Return the prefill and the completion as one text."""
    return rollout.prompt.prefill + rollout.completion


def normalise(text: str) -> str:
    """Return NFKC text without zero-width characters and combining marks; the case stays."""
    if text.isascii():
        return text
    plain = unicodedata.normalize("NFKC", text)
    return "".join(c for c in plain if unicodedata.category(c) not in INVISIBLE)


# --- tags ----------------------------------------------------------------------------------------


def find_tags(text: str) -> list[Tag]:
    """Return every tag of the normalised text: any case, attributes, inner spaces; no `a<b>c`."""
    plain = normalise(text)
    return [
        Tag(m["name"], m["slash"] == "/", m[0], m.start())
        for m in TAG.finditer(plain)
        if not _is_comparison(plain, m)
    ]


def without_tags(text: str) -> str:
    """Return the normalised text with a space in the place of every tag."""
    plain = normalise(text)
    return TAG.sub(lambda m: m[0] if _is_comparison(plain, m) else " ", plain)


def _is_comparison(text: str, found: re.Match[str]) -> bool:
    """Return whether "<...>" is two comparisons, as in a<b>c, x < y > z or i<n and j>0.

    An operand touches both ends, and between them stands one character or more than one word.
    """
    inner = found[0][1:-1]
    name = found["name"]
    if found["slash"] or "=" in inner or "/" in inner or name.casefold() == "think":
        return False
    if len(name) > 1 and len(inner.split()) == 1 and not name.isdigit():
        return False
    before, after = text[: found.start()], text[found.end() :]
    if inner[0].isspace():
        before, after = before.rstrip(), after.lstrip()
    return bool(re.match(r"[\w)\]]", before[-1:]) and re.match(r"[\w(\[-]", after))


def pair_tags(tags: Sequence[Tag]) -> list[Paired]:
    """Return every tag with its partner, by a stack.

    A closing tag closes the nearest open tag of its name, and what was opened in between stays
    without a partner.
    """
    partner: list[int | None] = [None] * len(tags)
    inside: list[str | None] = [None] * len(tags)
    stack: list[int] = []
    for i, tag in enumerate(tags):
        if not tag.closing:
            inside[i] = tags[stack[-1]].name if stack else None
            if not tag.text.rstrip(">").endswith("/"):
                stack.append(i)
            continue
        opened = [at for at, j in enumerate(stack) if tags[j].name == tag.name]
        if opened:
            j = stack[opened[-1]]
            partner[i], partner[j] = j, i
            del stack[opened[-1] :]
        inside[i] = tags[stack[-1]].name if stack else None
    return [Paired(*row) for row in zip(tags, partner, inside, strict=True)]


def is_one_block(text: str) -> bool:
    """Return whether the text has exactly one well-formed think block, and an answer after it.

    Well-formed: literally <think> and </think>, something between them, not inside another tag, and
    every tag inside closed. A re-cased, spaced or attributed think tag makes it malformed.
    """
    if text.count(OPEN) != 1 or text.count(CLOSE) != 1:
        return False
    paired = pair_tags(find_tags(text))
    at = [i for i, p in enumerate(paired) if p.tag.name.casefold() == "think"]
    if len(at) != 2:
        return False
    first, last = at
    block = paired[first : last + 1]
    inside, _, after = text.partition(OPEN)[2].partition(CLOSE)
    return (
        paired[first].partner == last
        and paired[first].inside is None
        and all(p.partner is not None or p.tag.text.endswith("/>") for p in block)
        and any(c.isalnum() for c in inside)
        and any(c.isalnum() for c in after)
    )


# --- rewards -------------------------------------------------------------------------------------


def think_format(config: ThinkFormatReward) -> OutcomeReward:
    """Return the reward for the form of the think block, over prefill and completion.

    strict: 1 for exactly one well-formed block with an answer after it in a finished completion,
    else 0 (see is_one_block).
    lf_grpo: with o opening and c closing tags, literal and counted as substrings,
    1 if o = c = 1, in order, text after; .5 if o = c = 1 otherwise; .3 if o > 1 or c > 1;
    .2 if o + c = 1; 0 if none.
    """
    if config.scheme == "lf_grpo":
        return lambda rollouts: [lf_grpo_format(whole_answer(r)) for r in rollouts]
    return lambda rollouts: [
        float(not r.is_truncated and is_one_block(whole_answer(r))) for r in rollouts
    ]


def lf_grpo_format(text: str) -> float:
    """Return lf_grpo's R_format of a text; see think_format."""
    opens, closes = text.count(OPEN), text.count(CLOSE)
    if opens > 1 or closes > 1:
        return 0.3
    if opens + closes < 2:
        return 0.2 * (opens + closes)
    in_order = text.index(OPEN) < text.index(CLOSE)
    return 1.0 if in_order and text.partition(CLOSE)[2].strip() else 0.5


def tag_fence(config: TagFenceReward) -> OutcomeReward:
    """Return the penalty for n tags outside the whitelist, in the completion.

    default: -n / (n + 2): bounded by -1, and every further tag costs (in float32 too, up to
    thousands of tags). Re-cased, spaced and attributed tags count, comparisons such as a<b>c don't.
    lf_grpo: max(-1.5, -0.3 n) for </?([a-zA-Z0-9_\\-.:]+)>; free after five tags.
    """
    if config.scheme == "lf_grpo":
        return lambda rollouts: [_lf_grpo_fence(r.completion, config.whitelist) for r in rollouts]
    return lambda rollouts: [_fence(r.completion, config.whitelist) for r in rollouts]


def _lf_grpo_fence(text: str, whitelist: Collection[str]) -> float:
    foreign = [name for name in LF_GRPO_TAG.findall(text) if name not in whitelist]
    return max(-1.5, -0.3 * len(foreign))


def _fence(text: str, whitelist: Collection[str]) -> float:
    literal = {f"<{name}>" for name in whitelist} | {f"</{name}>" for name in whitelist}
    foreign = sum(tag.text not in literal for tag in find_tags(text))
    return -foreign / (foreign + 2)
