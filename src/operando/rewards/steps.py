"""Step penalties: paying less for an answer with more cognitive transitions ("Wait", "Hmm, but").

Two forms: an absolute one, gamma^N, and one relative to the group (Step-GRPO).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from operando.recipe.rewards import StepGrpoReward, StepPenaltyReward
from operando.rewards import outcome
from operando.rewards.formats import (
    CLOSE,
    OPEN,
    is_one_block,
    normalise,
    whole_answer,
    without_tags,
)
from operando.tasks.base import Task
from operando.types import Rollout

NOT_BEFORE, NOT_AFTER = r"(?<![^\W\d_])", r"(?![^\W\d_])"  # no letter there


def step_penalty(config: StepPenaltyReward, task: Task) -> outcome.OutcomeReward:
    """Return the reward gamma^N where the task's verifier says right, and 0 elsewhere.

    N counts the transition words of the text (lf_grpo's absolute penalty; the default counts more
    text and matches words where lf_grpo matches substrings). The text of count = "all" is prefill
    and completion, inside and outside of every block; that of "last_block" is lf_grpo's
    text.split("<think>")[-1].split("</think>")[0], to which every earlier block is free.
    """

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        right = outcome.correct(task)(rollouts)
        return [
            is_right * config.gamma ** count_steps(config, whole_answer(rollout))
            for is_right, rollout in zip(right, rollouts, strict=True)
        ]

    return reward


def count_steps(config: StepPenaltyReward, text: str) -> int:
    """Return N of one answer."""
    if config.count == "last_block":
        text = text.split(OPEN)[-1].split(CLOSE)[0]
    if config.match == "substring":
        lowered = text.lower()
        return sum(lowered.count(word) for word in config.words)
    return count_words(text, config.words)


def count_words(text: str, words: Sequence[str]) -> int:
    """Return how often one of the words stands in the text, between non-letters.

    Case, zero-width characters and the kind of white space do not matter, a tag counts as a space,
    and of words that overlap ("let me", "let me check") the longest counts, once.
    """
    longest_first = sorted({normalise(w).casefold() for w in words}, key=len, reverse=True)
    either = "|".join(r"\s+".join(map(re.escape, word.split())) for word in longest_first)
    plain = without_tags(text).casefold()
    return len(re.findall(f"{NOT_BEFORE}(?:{either}){NOT_AFTER}", plain))


def step_grpo(config: StepGrpoReward, task: Task) -> outcome.OutcomeReward:
    """Return Step-GRPO's group-relative reward (arXiv 2604.16890).

    R_i = a acc_i (1 - b tanh((k_i - mu) / mu)) + (1 - a) fmt_i, where k_i is 1 + the number of
    triggers in completion i, and mu the mean k over the correct completions of its group (none: the
    factor is 1). A trigger matches with its case and between non-letters a-z, as in the paper's
    code. fmt_i is 1 for one well-formed think block, or where `pattern` matches the whole
    completion. Not here: the paper's dynamically truncated rollouts.
    """
    either = "|".join(map(re.escape, config.triggers))
    trigger = re.compile(f"(?<![A-Za-z])(?:{either})(?![A-Za-z])")
    matches = outcome.matches(config.pattern) if config.pattern else _one_block

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        acc, fmt = outcome.correct(task)(rollouts), matches(rollouts)
        steps = [1 + len(trigger.findall(r.completion)) for r in rollouts]
        of_correct: dict[int, list[int]] = defaultdict(list)
        for rollout, is_right, k in zip(rollouts, acc, steps, strict=True):
            if is_right:
                of_correct[rollout.group].append(k)
        paid = []
        for i, rollout in enumerate(rollouts):
            efficiency = 1.0
            if of_correct[rollout.group]:
                mu = fmean(of_correct[rollout.group])
                efficiency = 1 - config.b * math.tanh((steps[i] - mu) / mu)
            paid.append(config.a * acc[i] * efficiency + (1 - config.a) * fmt[i])
        return paid

    return reward


def _one_block(rollouts: Sequence[Rollout]) -> list[float]:
    return [float(is_one_block(whole_answer(r))) for r in rollouts]
