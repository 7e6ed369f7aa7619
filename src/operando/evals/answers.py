"""What an edit is, and the parts of an answer that edits take hold of."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from operando.recipe.rewards import STEP_WORDS
from operando.rewards.formats import CLOSE, OPEN
from operando.types import Example

Rule = Literal["pay less", "never raise", "not change", "cost ever more"]


class Answer(NamedTuple):
    """What is edited: a completion, what the prompt holds of it, its problem, and another problem.

    Example: Answer("", "3+2=5 #### 5", example, other)
    """

    prefill: str
    completion: str
    example: Example
    other: Example


class Variants(NamedTuple):
    """Texts from before the edit on, and how often it is applied in each.

    Example: Variants(("a <think>b</think> c", ...), times=(0, 1, 5))
    """

    texts: tuple[str, ...]
    times: tuple[int, ...]


@dataclass(frozen=True)
class Mutation:
    """One edit. Example: Mutation("split blocks", "P1", "never raise", split)"""

    name: str
    prop: str
    must: Rule
    apply: Callable[[Answer], list[Variants]]
    """An empty list where it does not apply."""
    on: Literal["any", "right", "wrong"] = "any"
    is_evasion: bool = False
    """No list of words can know it: reported apart, and not a finding."""


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
OPENERS = re.compile(
    r"(?<![^\W\d_])(?:"
    + "|".join(re.escape(w) for w in sorted(STEP_WORDS, key=len, reverse=True))
    + r")(?![^\W\d_])",
    re.IGNORECASE,
)
PLANTED = "Wait, let me check. Hmm, but maybe not. Actually, yes. "


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


def block_of(answer: Answer) -> Block | None:
    """Return the answer around its think block, which is put in where there is none.

    None where the final answer stands inside of the block: edits of the block would reach it.
    """
    text = with_block(answer.prefill, answer.completion)
    start = 0 if is_opened(answer.prefill) else text.find(OPEN)
    end = text.find(CLOSE, max(start, 0))
    if start < 0 or end < 0:
        return None
    opening = "" if is_opened(answer.prefill) else OPEN
    inner, after = text[start + len(opening) : end], text[end + len(CLOSE) :]
    if "####" in inner or not any(c.isalnum() for c in after):
        return None
    return Block(text[:start], opening, inner, after)


def pairs(before: str, afters: Sequence[tuple[int, str]]) -> list[Variants]:
    """Return a chain of two for every changed text, with how often the edit is applied in it."""
    return [Variants((before, after), (0, n)) for n, after in afters if after != before]


def around_reasoning(completion: str) -> tuple[str, str]:
    """Return the text up to where reasoning ends, and the rest: the closing tag, or the answer."""
    at = completion.find(CLOSE)
    return (completion[:at], completion[at:]) if at >= 0 else split_at_answer(completion)


def insert(answer: Answer, added: Sequence[tuple[int, str]]) -> list[Variants]:
    """Return the answer with each text put at the end of its reasoning."""
    head, tail = around_reasoning(answer.completion)
    return pairs(answer.completion, [(n, f"{head.rstrip()} {text}{tail}") for n, text in added])
