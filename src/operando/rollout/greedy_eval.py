"""Greedy answers to held-out problems, graded by the task's verifier and by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from operando import parallel
from operando.rollout.sampler import Request, Sampler, Sampling, as_rollouts
from operando.tasks.base import Answered, Task
from operando.types import Prompt, Rollout, Verdict


class Graded(NamedTuple):
    """A completion with the verifier's verdict."""

    rollout: Rollout
    verdict: Verdict


def grade(task: Task, rollouts: Sequence[Rollout]) -> list[Graded]:
    """Return each rollout with what the verifier says of it."""
    if task.grades is not None:  # all at once: the task may grade them in parallel, and remembers
        task.grades([Answered(r.prompt.example, r.completion, r.is_truncated) for r in rollouts])
    return [
        Graded(r, task.verify(r.prompt.example, r.completion, r.is_truncated)) for r in rollouts
    ]


def greedy_eval(
    sampler: Sampler, task: Task, prompts: Sequence[Prompt], sampling: Sampling
) -> list[Graded]:
    """Return one greedy completion of each prompt, graded; ranks share the prompts out."""
    ranks = parallel.world_size()
    each = -(-len(prompts) // ranks)
    mine = list(prompts[parallel.rank() * each :][:each])
    sampled = sampler.sample(Request([p.ids for p in mine], 1, sampling)) if mine else []
    rollouts = as_rollouts(mine, list(range(len(mine))), 1, sampled)
    return grade(task, parallel.gather_list(rollouts))
