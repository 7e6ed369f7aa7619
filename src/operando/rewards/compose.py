"""The named, weighted sum of reward parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from operando.errors import UserError, nearest
from operando.recipe import (
    ContainsAnswerReward,
    CorrectReward,
    FormatReward,
    FunctionReward,
    Recipe,
    ScorerReward,
    StepGrpoReward,
    StepPenaltyReward,
    TagFenceReward,
    ThinkFormatReward,
)
from operando.rewards import formats, outcome, steps
from operando.rewards.base import (
    RewardFunction,
    RewardLog,
    RewardValue,
    TrainerState,
    as_tokens,
    call_reward,
    load_function,
    wants_trace,
)
from operando.tasks.base import Task
from operando.types import Rewards, Rollout, Trace


@dataclass(frozen=True)
class RewardPart:
    """One named part; exactly one of the two is set.

    Example: RewardPart("correct", outcome=correct(task))
    """

    name: str
    outcome: outcome.OutcomeReward | None = None
    function: RewardFunction | None = None

    def values(
        self, rollouts: Sequence[Rollout], trace: Trace | None, state: TrainerState, log: RewardLog
    ) -> Sequence[RewardValue]:
        if self.outcome is not None:
            return self.outcome(rollouts)
        assert self.function is not None, self.name
        return call_reward(self.name, self.function, rollouts, trace, state, log)

    def needs_trace(self) -> bool:
        return self.function is not None and wants_trace(self.function)


def make_parts(
    recipe: Recipe, task: Task, functions: Mapping[str, RewardFunction]
) -> list[RewardPart]:
    """Return the recipe's reward parts; `functions` are those handed over in Python."""
    for name in functions:
        if name not in recipe.rewards:
            raise UserError(
                f"functions: {name!r} is no reward of the recipe.{nearest(name, recipe.rewards)} "
                f'Add [rewards.{name}] with kind = "function"'
            )
    parts = []
    for name, config in recipe.rewards.items():
        match config:
            case CorrectReward():
                parts.append(RewardPart(name, outcome=outcome.correct(task)))
            case ScorerReward(scorer=scorer):
                parts.append(RewardPart(name, outcome=outcome.scored(scorer)))
            case ContainsAnswerReward():
                parts.append(RewardPart(name, outcome=outcome.contains_answer))
            case FormatReward(pattern=pattern):
                parts.append(RewardPart(name, outcome=outcome.matches(pattern)))
            case StepPenaltyReward():
                parts.append(RewardPart(name, outcome=steps.step_penalty(config, task)))
            case StepGrpoReward():
                parts.append(RewardPart(name, outcome=steps.step_grpo(config, task)))
            case ThinkFormatReward():
                parts.append(RewardPart(name, outcome=formats.think_format(config)))
            case TagFenceReward():
                parts.append(RewardPart(name, outcome=formats.tag_fence(config)))
            case FunctionReward(path=""):
                if name not in functions:
                    raise UserError(
                        f"rewards.{name} has no path: give one, or pass functions={{{name!r}: f}}"
                    )
                parts.append(RewardPart(name, function=functions[name]))
            case FunctionReward(path=path):
                parts.append(RewardPart(name, function=load_function(path)))
    return parts


def pay(
    parts: Sequence[RewardPart],
    weights: Mapping[str, float],
    rollouts: Sequence[Rollout],
    trace: Trace | None,
    state: TrainerState,
    width_T: int,
) -> Rewards:
    """Return every part as a per-token channel, and their weighted sum.

    A part that is not applicable (None) adds nothing; where none applies the total is NaN and the
    rollout takes no part in its group's baseline.
    """
    log = RewardLog()
    channels = {
        part.name: as_tokens(part.name, part.values(rollouts, trace, state, log), rollouts, width_T)
        for part in parts
    }
    return Rewards(
        parts=channels,
        weights=dict(weights),
        total_BT=weighted_sum(channels, weights),
        metrics={name: sum(values) / len(values) for name, values in log.metrics.items()},
        columns=log.columns,
    )


def weighted_sum(
    channels: Mapping[str, Float[Tensor, "B T"]], weights: Mapping[str, float]
) -> Float[Tensor, "B T"]:
    """Return sum_c weight_c * channel_c; NaN only where every channel is NaN."""
    stacked_CBT = torch.stack([channels[name] * weights[name] for name in channels])
    nowhere_BT = stacked_CBT.isnan().all(dim=0)
    return stacked_CBT.nan_to_num(nan=0.0).sum(dim=0).masked_fill(nowhere_BT, torch.nan)
