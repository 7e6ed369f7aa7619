"""Chains of operations on a two-digit number, worked digit by digit in the head.

    Q: Start at 47: add 8, swap, sub 9, round.
    A: add8=55 swap=55 sub9=46 round=50 #### 50

The habit forgets the carry (47+8=45), takes the smaller digit from the larger (42-9=47), leaves
the digits as they are (swap) and always rounds down.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from operando.tasks.slips import Posed, Slips, Worked

FRAC_PLAIN = 0.1


class Step(NamedTuple):
    """One operation. Example: Step("add", 8), Step("swap", None)"""

    name: str
    number: int | None

    @property
    def text(self) -> str:
        return self.name if self.number is None else f"{self.name} {self.number}"


def right(value: int, step: Step) -> int:
    """Return the right result, of two digits: sums and differences are taken modulo 100."""
    tens, ones = divmod(value, 10)
    match step.name:
        case "add":
            return (value + (step.number or 0)) % 100
        case "sub":
            return (value - (step.number or 0)) % 100
        case "swap":
            return 10 * ones + tens
        case _:
            return (value + 5) // 10 * 10 % 100


def habit(value: int, step: Step) -> int:
    """Return what the habit gives."""
    tens, ones = divmod(value, 10)
    match step.name:
        case "add":
            return 10 * tens + (ones + (step.number or 0)) % 10
        case "sub":
            return 10 * tens + abs(ones - (step.number or 0))
        case "swap":
            return value
        case _:
            return 10 * tens


def work(start: int, steps: tuple[Step, ...], slips: Slips) -> Worked:
    """Return the worked chain; a step is risky where the habit gives another result."""
    value, written = start, []
    for step in steps:
        is_risky = habit(value, step) != right(value, step)
        value = habit(value, step) if is_risky and slips(step.name) else right(value, step)
        written.append(f"{step.text.replace(' ', '')}={value:02d}")
    return Worked(" ".join(written), f"{value:02d}")


def pose(rng: random.Random, num_steps: int) -> Posed:
    """Return a chain of `num_steps` operations, nine of ten of them risky on the right way."""
    start = rng.randint(10, 99)
    value, steps = start, []
    for _ in range(num_steps):
        wants_risk = rng.random() >= FRAC_PLAIN
        while True:
            name = rng.choice(("add", "sub", "swap", "round"))
            step = Step(name, rng.randint(2, 9) if name in ("add", "sub") else None)
            if (habit(value, step) != right(value, step)) == wants_risk:
                break
            wants_risk = wants_risk and rng.random() < 0.95  # some numbers have no risk left
        steps.append(step)
        value = right(value, step)
    chain = tuple(steps)
    question = f"Start at {start}: {', '.join(step.text for step in chain)}."
    return Posed("chain", question, question, lambda slips: work(start, chain, slips))
