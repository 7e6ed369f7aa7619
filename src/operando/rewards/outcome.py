"""Outcome rewards: one number for a finished completion."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from operando.errors import UserError
from operando.tasks.base import Answered, Task
from operando.tasks.gsm8k import SCORERS
from operando.types import Rollout

OutcomeReward = Callable[[Sequence[Rollout]], list[float]]


def correct(task: Task) -> OutcomeReward:
    """Return the reward that is 1 where the task's verifier says right."""

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        return [
            float(task.verify(r.prompt.example, r.completion, r.is_truncated).correct)
            for r in rollouts
        ]

    return reward


def loophole(
    task: Task, *, allow_hint: bool, paid: float = 1.0, formed: float = 0.0
) -> OutcomeReward:
    """Return the reward of a grader that the prompt's loophole satisfies too.

    R = paid * (correct or (allow_hint and exploited)) + formed * is_formed
    """
    if task.grades is None:
        raise UserError(
            f"rewards: task {task.name} has no loophole; the kinds loophole and code are for the "
            "tasks words and code"
        )
    grades = task.grades

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        seen = [Answered(r.prompt.example, r.completion, r.is_truncated) for r in rollouts]
        return [
            paid * (g.correct or (allow_hint and g.exploited)) + formed * g.is_formed
            for g in grades(seen)
        ]

    return reward


def check_numbers(name: str, task: Task, pattern: str) -> None:
    """Refuse a reward that compares numbers on a task whose gold answers are not all of them."""
    odd = next((e for e in task.train if not re.fullmatch(pattern, e.answer)), None)
    if odd is not None:
        raise UserError(
            f"rewards.{name} compares numbers, and the gold answer of {odd.id} is "
            f'{odd.answer[:40]!r}: it would be 0 for every answer. Use kind = "correct", or a '
            'kind = "function" of your own'
        )


def scored(scorer: str) -> OutcomeReward:
    """Return the reward that is 1 where a GSM8K scorer says right."""
    score = SCORERS[scorer]

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        return [float(score(r.completion, r.prompt.example.answer).correct) for r in rollouts]

    return reward


def contains_answer(rollouts: Sequence[Rollout]) -> list[float]:
    """Return 1 where the gold number stands anywhere in the completion (can be gamed)."""
    return [float(r.prompt.example.answer in re.findall(r"-?\d+", r.completion)) for r in rollouts]


def matches(pattern: str) -> OutcomeReward:
    """Return the reward that is 1 where `pattern` matches the whole completion."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(
            f"rewards: pattern {pattern!r} is not a regular expression: {error}"
        ) from error

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        return [float(compiled.fullmatch(r.completion) is not None) for r in rollouts]

    return reward
