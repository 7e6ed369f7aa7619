"""The named, weighted sum of reward parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from operando.errors import UserError, nearest
from operando.recipe.rewards import (
    CodeReward,
    ContainsAnswerReward,
    CorrectReward,
    FeatureReward,
    FormatReward,
    FunctionReward,
    LoopholeReward,
    ProcessReward,
    ScorerReward,
    StepGrpoReward,
    StepPenaltyReward,
    TagFenceReward,
    ThinkFormatReward,
)
from operando.recipe.run import Recipe
from operando.rewards import formats, outcome, process, steps
from operando.rewards.base import (
    RewardFunction,
    RewardLog,
    RewardValue,
    TrainerState,
    as_tokens,
    call_reward,
    wants_trace,
)
from operando.rewards.internal import InternalReward, open_reward
from operando.tasks.base import Task
from operando.tasks.user_code import load_function
from operando.types import Dense, Rewards, Rollout, Trace


@dataclass(frozen=True)
class RewardPart:
    """One named part; exactly one of the three is set.

    Example: RewardPart("correct", outcome=correct(task))
    """

    name: str
    outcome: outcome.OutcomeReward | None = None
    function: RewardFunction | None = None
    internal: InternalReward | None = None
    sites: tuple[str, ...] = ()  # what a function finds in trace.acts

    def values(
        self, rollouts: Sequence[Rollout], trace: Trace | None, state: TrainerState, log: RewardLog
    ) -> Sequence[RewardValue]:
        if self.outcome is not None:
            return self.outcome(rollouts)
        if self.internal is not None:
            return self.internal(rollouts, trace, log)
        assert self.function is not None, self.name
        return call_reward(self.name, self.function, rollouts, trace, state, log)

    def needs_trace(self) -> bool:
        """Return whether it is rewarded on what the scoring pass saw."""
        return self.outcome is None and (self.function is None or wants_trace(self.function))


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
                outcome.check_numbers(name, task, r"-?[0-9][0-9.,]*")
                parts.append(RewardPart(name, outcome=outcome.scored(scorer)))
            case ContainsAnswerReward():
                outcome.check_numbers(name, task, r"-?[0-9]+")
                parts.append(RewardPart(name, outcome=outcome.contains_answer))
            case LoopholeReward(allow_hint=hint):
                paid = outcome.loophole(task, allow_hint=hint)
                parts.append(RewardPart(name, outcome=paid))
            case CodeReward(solved=solved, compiles=compiles, allow_hint=hint):
                paid = outcome.loophole(task, allow_hint=hint, paid=solved, formed=compiles)
                parts.append(RewardPart(name, outcome=paid))
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
            case ProcessReward():
                parts.append(RewardPart(name, outcome=process.process(config, task)))
            case FeatureReward():
                parts.append(RewardPart(name, internal=open_reward(name, config)))
            case FunctionReward(path="", sites=sites):
                if name not in functions:
                    raise UserError(
                        f"rewards.{name} has no path: give one, or pass functions={{{name!r}: f}}"
                    )
                parts.append(RewardPart(name, function=functions[name], sites=sites))
            case FunctionReward(path=path, sites=sites):
                parts.append(RewardPart(name, function=load_function(path), sites=sites))
    return parts


def compute_rewards(
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
        dense=dense_parts(parts),
        metrics={name: sum(values) / len(values) for name, values in log.metrics.items()},
        columns=log.columns,
    )


def dense_parts(parts: Sequence[RewardPart]) -> dict[str, Dense]:
    """Return the parts whose advantages are computed apart, and which tokens they credit."""
    found = {part.name: part.internal.dense() for part in parts if part.internal is not None}
    return {name: dense for name, dense in found.items() if dense is not None}


def weighted_sum(
    channels: Mapping[str, Float[Tensor, "B T"]], weights: Mapping[str, float]
) -> Float[Tensor, "B T"]:
    """Return sum_c weight_c * channel_c; NaN only where every channel is NaN."""
    stacked_CBT = torch.stack([channels[name] * weights[name] for name in channels])
    nowhere_BT = stacked_CBT.isnan().all(dim=0)
    return stacked_CBT.nan_to_num(nan=0.0).sum(dim=0).masked_fill(nowhere_BT, torch.nan)
