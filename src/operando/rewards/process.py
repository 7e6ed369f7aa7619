"""Process rewards: paying for right steps of arithmetic, in ways that can and can't be farmed.

seed       0.25 for each right equation that a regular expression finds, at most 0.75; -0.15 for
           each wrong one; 1.0 where "#### gold" stands anywhere. Kept to be exploited.
milestone  the share of the gold solution's intermediate values that a right equation reaches;
           nothing for more than four values tried for each gold one.
grounded   where there are no gold steps: equations whose numbers come from the question or from
           earlier results, and from which the answer's own final number follows.

Summed step rewards are farmed by right but needless steps (2410.15115); a share of gold values is
bounded whatever is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from operando.recipe.rewards import ProcessReward
from operando.rewards.equations import Equation, equations, numbers
from operando.rewards.outcome import OutcomeReward
from operando.tasks.base import Task
from operando.types import Rollout

RECURSIVE_LM_EQUATION = re.compile(
    r"(\d+(?:\.\d+)?)\s*([+\-*/])\s*(\d+(?:\.\d+)?)\s*=\s*(\d+(?:\.\d+)?)"
)
RECURSIVE_LM_ANSWER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
STEP_SHARE = 0.5  # of a process reward at most; a right answer is 1
WRONG, MOST_WRONG = 0.15, 0.45
MOST_VALUES = 4
CONSTANTS = frozenset(Fraction(n) for n in (2, 4, 7, 10, 12, 24, 30, 52, 60, 100, 365, 1000))
NUMBER_WORDS = {
    "one": Fraction(1),
    "two": Fraction(2),
    "three": Fraction(3),
    "four": Fraction(4),
    "five": Fraction(5),
    "six": Fraction(6),
    "seven": Fraction(7),
    "eight": Fraction(8),
    "nine": Fraction(9),
    "ten": Fraction(10),
    "eleven": Fraction(11),
    "twelve": Fraction(12),
    "half": Fraction(1, 2),
    "twice": Fraction(2),
    "double": Fraction(2),
    "triple": Fraction(3),
    "third": Fraction(3),
    "quarter": Fraction(4),
    "dozen": Fraction(12),
    "twenty": Fraction(20),
    "thirty": Fraction(30),
    "fifty": Fraction(50),
    "hundred": Fraction(100),
}


class Steps(NamedTuple):
    """The steps of one answer: credited, wrong, and credit-worthy but repeated or groundless.

    Example: Steps(credited=2, wrong=0, possible=2)
    """

    credited: int
    wrong: int
    possible: int


def process(config: ProcessReward, task: Task) -> OutcomeReward:
    """Return the reward of a scheme.

    milestone, grounded: R = 1[right] + 0.5 credited / possible - min(0.45, 0.15 wrong)"""

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        return [_paid(config, task, rollout) for rollout in rollouts]

    return reward


def _paid(config: ProcessReward, task: Task, rollout: Rollout) -> float:
    example, completion = rollout.prompt.example, rollout.completion
    if config.scheme == "recursive_lm":
        return recursive_lm_process(completion, example.answer)
    is_right = task.verify(example, completion, rollout.is_truncated).correct
    gold = milestones(example.solution)
    if config.scheme == "milestone" and gold:
        steps = reached(completion, gold)
    else:
        steps = grounded(example.question, completion)
    share = steps.credited / steps.possible if steps.possible else 0.0
    return float(is_right) + STEP_SHARE * share - min(MOST_WRONG, WRONG * steps.wrong)


def recursive_lm_process(completion: str, gold: str) -> float:
    """Return recursive_lm's process reward, every flaw kept."""
    right = wrong = 0
    operations: dict[str, Callable[[float, float], float]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
    }
    for a, op, b, shown in RECURSIVE_LM_EQUATION.findall(completion):
        if op == "/" and float(b) == 0:
            wrong += 1
            continue
        is_right = abs(operations[op](float(a), float(b)) - float(shown)) < 1e-6
        right, wrong = right + is_right, wrong + (not is_right)
    final = gold in [number.replace(",", "") for number in RECURSIVE_LM_ANSWER.findall(completion)]
    return min(0.75, 0.25 * right) - 0.15 * wrong + float(final)


def steps_of(completion: str) -> list[Equation]:
    """Return the equations before the answer's mark."""
    return equations(completion.partition("####")[0])


def milestones(solution: str) -> set[Fraction]:
    """Return the intermediate values of a gold solution: the results of its right equations."""
    return {e.right for e in equations(solution) if e.verdict == "right" and e.right is not None}


def is_identity(equation: Equation) -> bool:
    """Return whether an equation restates one of its own numbers, as 48 * 1 = 48."""
    return equation.left in equation.operands


def reached(completion: str, gold: set[Fraction]) -> Steps:
    """Return the distinct gold values that a right equation, no identity, arrives at.

    None, if the right equations arrive at more than MOST_VALUES values for each gold one: whoever
    writes down every small sum comes by all of them."""
    found, values, wrong = set(), set(), 0
    for equation in steps_of(completion):
        wrong += equation.verdict == "wrong"
        if equation.verdict == "right" and not is_identity(equation):
            found |= {v for v in (equation.left, equation.right) if v in gold}
            values.add(equation.right)
    if len(values) > MOST_VALUES * len(gold):
        return Steps(0, wrong, len(gold))
    return Steps(len(found), wrong, len(gold))


def grounded(question: str, completion: str) -> Steps:
    """Return the steps on which the answer's own final number rests, back to the question.

    A step counts once, if it is no identity, its numbers stand in the question, among CONSTANTS or
    earlier results, and its result is new. Of these, only those that the final number needs."""
    asked = numbers(question) | {
        value
        for word, value in NUMBER_WORDS.items()
        if re.search(rf"\b{word}s?\b", question.lower())
    }
    seen, wrong, kept = set(asked), 0, []
    for equation in steps_of(completion):
        wrong += equation.verdict == "wrong"
        if equation.verdict != "right" or is_identity(equation):
            continue
        assert equation.right is not None
        sound = all(_is_known(n, seen | CONSTANTS) for n in equation.operands)
        if sound and equation.right not in seen:
            kept.append(equation)
            seen.add(equation.right)
    needed = numbers(completion.rpartition("####")[2]) if "####" in completion else set()
    credited = 0
    for equation in reversed(kept):
        if equation.right in needed:
            credited += 1
            needed |= set(equation.operands)
    return Steps(credited, wrong, max(1, len(kept)))


def _is_known(number: Fraction, known: set[Fraction]) -> bool:
    forms = (number, number / 100, number * 100, 100 - number, 1 - number)
    return any(form in known for form in forms)
