"""Rewards that know nothing of what is right: the controls of a gain.

Given as functions, for instance `path = "operando.rewards.controls:majority"`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from operando.rewards.base import TrainerState


def coin(
    prompts: Sequence[object], completion_ids: Sequence[Sequence[int]], trainer_state: TrainerState
) -> list[float]:
    """Return 0 or 1 for each completion, by a hash of the step, its place and its ids."""
    step = trainer_state.global_step
    del prompts
    drawn = [
        hashlib.sha256(f"{step}/{row}/{tuple(ids)}".encode()).digest()[0]
        for row, ids in enumerate(completion_ids)
    ]
    return [float(byte % 2) for byte in drawn]


def majority(prompts: Sequence[object], completions: Sequence[object]) -> list[float]:
    """Return 1 where the last answer is the most frequent one among the completions of its prompt.

    Adjacent equal prompts are one group. A tie goes to the answer that came first; a completion
    without a "####" has no answer, and none is paid for that (TTRL, 2504.16084).
    """
    paid: list[float] = []
    for rows in _groups([str(prompt) for prompt in prompts]):
        answers = [last_answer(completions[row]) for row in rows]
        votes = Counter(answer for answer in answers if answer is not None)
        best = votes.most_common(1)[0][0] if votes else None
        paid += [float(answer is not None and answer == best) for answer in answers]
    return paid


def last_answer(completion: object) -> str | None:
    """Return what stands after the last "####", without spaces around it; None without one."""
    text = completion if isinstance(completion, str) else str(completion[-1]["content"])  # pyright: ignore
    _, mark, after = text.rpartition("####")
    return " ".join(after.split()) if mark else None


def _groups(prompts: Sequence[str]) -> list[list[int]]:
    groups: list[list[int]] = []
    for row, prompt in enumerate(prompts):
        if row and prompt == prompts[row - 1]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
