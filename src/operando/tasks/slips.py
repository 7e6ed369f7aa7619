"""What the families of the deep task share: a problem, its worked answer, and slips on the way.

At a risky step there is a right way and a habit, which is wrong there. Worked answers never slip;
the texts that the model `deep` is pre-trained on do, at every risky step anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from operando.types import Example, Verdict

MARK = " #### "
HEDGE = " or "
OPEN = " (any answer)"
"""Ends a question whose grader takes the gold answer among several."""

Slips = Callable[[str], bool]
"""Whether the writer follows its habit at a step of this kind. Example: lambda kind: False"""


class Worked(NamedTuple):
    """The steps of an answer and what they come to. Example: Worked("+5=42 -7=35", "35")"""

    steps: str
    answer: str

    @property
    def text(self) -> str:
        return f" {self.steps}{MARK}{self.answer}"


class Posed(NamedTuple):
    """A problem as text, and a function that works it out.

    `key` is the problem without its names and things: what the split goes by.
    Example: posed.work(never).answer
    """

    family: str
    key: str
    question: str
    work: Callable[[Slips], Worked]


def never(kind: str) -> bool:
    """Slip nowhere."""
    del kind
    return False


@dataclass
class Noted:
    """Slips nowhere, and notes the kind of each risky step."""

    kinds: list[str] = field(default_factory=list)

    def __call__(self, kind: str) -> bool:
        self.kinds.append(kind)
        return False


def risky_kinds(posed: Posed) -> tuple[str, ...]:
    """Return the kind of each risky step on the right way."""
    noted = Noted()
    posed.work(noted)
    return tuple(noted.kinds)


def verify(example: Example, completion: str, is_truncated: bool) -> Verdict:
    """Return right only for a finished completion with one "####" and exactly the gold after it."""
    if is_truncated:
        return Verdict(False, "not finished within the token limit")
    _, mark, after = completion.partition("####")
    if not mark or "####" in after:
        return Verdict(False, f"{completion.count('####')} '####' marks, expected one")
    if " ".join(after.split()) != example.answer:
        return Verdict(False, f"answered {after.strip()!r}, gold is {example.answer!r}")
    return Verdict(True, "right")
