"""Shifts of what is rewarded, by what a direction or a monitor says of a rollout (seam 1).

Shape legend: B rollouts, T completion tokens, P groups, G group size, D d_model.

They are baselines beside the Projector: Rebound's advantage modification (2604.01476), and a
monitor that fines or screens out what it flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from operando.errors import UserError
from operando.models.directions import DirectionSet
from operando.models.hooks import ActivationReader
from operando.models.policy import Policy
from operando.models.scoring import Tap
from operando.recipe.projection import PenaltyShift, ReboundShift, ScreeningShift
from operando.tasks.base import Task
from operando.types import Rewards, Rollout, Trace

LEAST_STD = 0.1  # epsilon_min of Rebound, in units of <h, v>
NO_SPREAD = 1e-5  # relative to the scores' own size


@dataclass(frozen=True)
class Shift:
    """A recipe's [shift] with its direction or the task whose labels are the oracle.

    Example: Shift(config, directions, task, group_size=8).apply(rewards, rollouts, trace, step=1)
    """

    config: ReboundShift | PenaltyShift | ScreeningShift
    directions: DirectionSet | None
    task: Task
    group_size: int

    def taps(self, policy: Policy) -> dict[str, Tap]:
        """Return what the scoring pass reads: <h, v> after each layer of the band."""
        if self.directions is None:
            return {}
        v_D1 = self.directions.vector_D.to(policy.device)[:, None]
        sites = {layer: f"blocks.{layer}.hook_resid_post" for layer in self.directions.layers}
        ActivationReader(policy.base, list(sites.values()))
        return {
            f"shift/{layer}": Tap(site, lambda x_ND: x_ND.float() @ v_D1)
            for layer, site in sites.items()
        }

    def apply(self, paid: Rewards, rollouts: Sequence[Rollout], trace: Trace, step: int) -> Rewards:
        """Return the rewards with the total shifted; the parts stay as they were rewarded."""
        length_B = torch.tensor([len(r.completion_ids) for r in rollouts])
        config, total_BT = self.config, paid.total_BT
        match config:
            case ReboundShift():
                score_B = self._scores(trace, length_B, mean=config.position == "response_mean")
                _check_spread(score_B, self.group_size, step)
                z_B = group_z(score_B, self.group_size)
                shifted_BT = rebound(total_BT, z_B, length_B, config)
                found = {"shift/score": score_B.mean(), "shift/z_abs": z_B.abs().mean()}
                touched_B = z_B > 0
            case PenaltyShift(amount=amount):
                touched_B = self._flags(rollouts, trace, length_B)
                shifted_BT = at_last(total_BT, -amount * touched_B.float(), length_B)
                found = {}
            case ScreeningShift():
                touched_B = self._flags(rollouts, trace, length_B)
                shifted_BT = total_BT.masked_fill(touched_B[:, None], torch.nan)
                found = {}
        metrics = {name: float(value) for name, value in found.items()}
        metrics["shift/touched"] = float(touched_B.float().mean())
        columns = {"shift_touched": touched_B.tolist()}
        return replace(
            paid,
            total_BT=shifted_BT,
            metrics={**paid.metrics, **metrics},
            columns={**paid.columns, **columns},
        )

    def _scores(
        self, trace: Trace, length_B: Tensor, *, mean: bool, normalised: bool = False
    ) -> Float[Tensor, "B"]:
        """Return the mean over layers of <h, v> (over the layer's norm), last token or mean."""
        assert self.directions is not None
        found = []
        for layer in self.directions.layers:
            x_BT = trace.acts[f"shift/{layer}"][..., 0]
            norm = float(self.directions.evidence[f"norm_{layer}"]) if normalised else 1.0
            if mean:
                inside_BT = torch.arange(x_BT.shape[1])[None] < length_B[:, None]
                value_B = (x_BT * inside_BT).sum(1) / length_B
            else:
                value_B = x_BT.gather(1, length_B[:, None] - 1)[:, 0]
            found.append(value_B / norm)
        return torch.stack(found).mean(dim=0)

    def _flags(
        self, rollouts: Sequence[Rollout], trace: Trace, length_B: Tensor
    ) -> Bool[Tensor, "B"]:
        """Return which rollouts the monitor flags."""
        if self.directions is None:
            label = self.task.labels
            assert label is not None, self.task.name
            said = [label(r.prompt.example, r.completion, r.is_truncated) for r in rollouts]
            return torch.tensor([one["hack"] for one in said])
        mean = self.directions.position == "mean"
        score_B = self._scores(trace, length_B, mean=mean, normalised=True)
        return score_B > float(self.directions.evidence["clean_q95"])


def make_shift(
    config: ReboundShift | PenaltyShift | ScreeningShift,
    directions: DirectionSet | None,
    task: Task,
    group_size: int,
) -> Shift:
    """Return a recipe's shift; a monitor without what it needs is a UserError."""
    monitored = not isinstance(config, ReboundShift)
    if directions is None and task.labels is None:
        raise UserError(f'shift.monitor = "oracle": task {task.name} has no hack label')
    if directions is not None and monitored:
        needed = ["clean_q95", *(f"norm_{layer}" for layer in directions.layers)]
        missing = [name for name in needed if name not in directions.evidence]
        if missing:
            raise UserError(
                f"shift.directions = {config.directions!r} holds no {missing[0]!r}, by which a "
                "monitor flags; make it again: operando direction extract RECIPE"
            )
    return Shift(config, directions, task, group_size)


def group_z(score_B: Float[Tensor, "B"], group_size: int) -> Float[Tensor, "B"]:
    """Return z_i = (s_i - mean(s)) / max(std(s), 0.1) within each group; std over G - 1."""
    score_PG = rearrange(score_B, "(p g) -> p g", g=group_size)
    std_P1 = score_PG.std(dim=1, keepdim=True).clamp(min=LEAST_STD)
    return rearrange((score_PG - score_PG.mean(dim=1, keepdim=True)) / std_P1, "p g -> (p g)")


def rebound(
    total_BT: Float[Tensor, "B T"], z_B: Float[Tensor, "B"], length_B: Tensor, config: ReboundShift
) -> Float[Tensor, "B T"]:
    """Return Advantage Modification's reward, before GRPO normalises (2604.01476).

    additive: r' = r - alpha max(z, 0). multiplicative: r' = r (1 - alpha sigmoid(z) 1[z > 0])."""
    if config.variant == "additive":
        return at_last(total_BT, -config.alpha * z_B.clamp(min=0), length_B)
    factor_B = 1 - config.alpha * z_B.sigmoid() * (z_B > 0)
    return total_BT * factor_B[:, None]


def at_last(
    total_BT: Float[Tensor, "B T"], value_B: Float[Tensor, "B"], length_B: Tensor
) -> Float[Tensor, "B T"]:
    """Return the total with a value added at each completion's last token."""
    return total_BT.scatter_add(1, length_B[:, None] - 1, value_B[:, None])


def _check_spread(score_B: Float[Tensor, "B"], group_size: int, step: int) -> None:
    """Refuse, in the first batch, scores that do not differ within any group."""
    score_PG = rearrange(score_B, "(p g) -> p g", g=group_size)
    spread = float(score_PG.std(dim=1).max())
    if step == 1 and spread <= NO_SPREAD * float(score_B.abs().mean()):
        raise UserError(
            f"shift: the scores of siblings differ by {spread:.2g}: nothing would be shifted. Read "
            'what differs between completions: position = "response_last"'
        )
