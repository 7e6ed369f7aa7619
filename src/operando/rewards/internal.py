"""What is rewarded a model's internals: SAE features, or a direction, at every completion token.

Shape legend: B rollouts, T completion tokens, N tokens, F features of the set.

    score(t) = mean over helpful features of min(f(t) / scale, 1) - the same over harmful ones

f is the SAE's true activation function, scale the feature's 99 % quantile over right base answers:
more of a feature than an honest answer shows gives no more. Mode "mechreward" is its G3: raw sums
of relu(z), which two strong features decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from operando.errors import UserError
from operando.models.hooks import ActivationReader
from operando.models.policy import Policy
from operando.models.scoring import Tap
from operando.recipe.data import PromptConfig
from operando.recipe.rewards import FeatureReward
from operando.rewards.base import RewardLog, RewardValue
from operando.sae.feature_set import FeatureSet, check_feature_set, load_feature_set, sae_of
from operando.sae.selected_features import SelectedFeatures, relu_columns
from operando.types import Dense, Rollout, Trace


@dataclass(frozen=True)
class InternalReward:
    """A reward of a feature set. Example: open_reward("features", config)"""

    name: str
    config: FeatureReward
    feature_set: FeatureSet

    def dense(self) -> Dense | None:
        """Return which tokens are credited; None: it pays once, at the end."""
        match self.config.mode:
            case "immediate":
                return Dense("own")
            case "to_go" | "potential":
                return Dense("to_go", self.config.gamma)
            case "mechreward":
                return Dense("mechreward")
            case "trajectory":
                return None

    def closed_gate(self) -> str:
        """Return why the evidence does not allow the set to be rewarded; a control needs none."""
        gate = self.feature_set.gate
        return "" if self.feature_set.arm != "real" or gate.passed else "; ".join(gate.reasons)

    def tap(self, policy: Policy, identity: Mapping[str, str], prompt: PromptConfig) -> Tap:
        """Return what the scoring pass reads for it; a feature set that does not fit is refused."""
        feature_set, path = self.feature_set, self.config.file
        check_feature_set(feature_set, path, identity, prompt)
        if self.closed_gate() and not self.config.ignore_gate:
            raise UserError(
                f"rewards.{self.name}: the gate of {path} is closed: {self.closed_gate()}. "
                "To train on it all the same, as an experiment: ignore_gate = true"
            )
        ActivationReader(policy.base, [feature_set.site])
        if feature_set.direction:
            direction_D = torch.tensor(feature_set.direction, device=policy.device)
            return Tap(feature_set.site, lambda x_ND: x_ND.float() @ direction_D[:, None])
        sae = sae_of(feature_set, path).to(policy.device)
        ids = tuple(f.id for f in feature_set.features)
        if self.config.mode == "mechreward":
            return Tap(feature_set.site, lambda x_ND: relu_columns(sae, x_ND, ids))
        return Tap(feature_set.site, SelectedFeatures(sae, ids))

    def __call__(
        self, rollouts: Sequence[Rollout], trace: Trace | None, log: RewardLog
    ) -> Sequence[RewardValue]:
        """Return what each completion is rewarded, and log both reads, their gap and the range."""
        assert trace is not None, f"rewards.{self.name} needs the scoring pass"
        mask_BT = _mask(rollouts, trace.logp_BT.shape[1])
        reads = {"policy": trace.acts[self.name]}
        if self.name in trace.base_acts:
            reads["base"] = trace.base_acts[self.name]
        capped = self.config.saturate and self.config.mode != "mechreward"
        score_BT = {
            who: set_score(
                self.feature_set, acts, saturate=capped, raw=self.config.mode == "mechreward"
            )
            for who, acts in reads.items()
        }
        for who, read_BT in score_BT.items():
            log.log_metric(f"{self.name}/{who}", float(read_BT[mask_BT].mean()))
        if "base" in score_BT:
            gap_BT = score_BT["policy"] - score_BT["base"]
            log.log_metric(f"{self.name}/gap", float(gap_BT[mask_BT].mean()))
            log.log_metric(f"{self.name}/gap_abs", float(gap_BT[mask_BT].abs().mean()))
        over_B = over_limit(self.feature_set, reads["policy"], mask_BT)
        log.log_metric(f"{self.name}/over_limit", float(over_B.float().mean()))
        if self.config.read == "min":
            paid_BT = torch.minimum(score_BT["policy"], score_BT["base"])
        else:
            paid_BT = score_BT[self.config.read]
        lengths = mask_BT.sum(1).tolist()
        tokens = [row[:n] for row, n in zip(paid_BT.tolist(), lengths, strict=True)]
        log.log_extra(f"{self.name}_tokens", list(tokens))
        if self.config.mode == "trajectory":
            return [sum(row) / len(row) for row in tokens]
        if self.config.mode == "potential":
            return [shaped(row, self.config.gamma) for row in tokens]
        return tokens


def open_reward(name: str, config: FeatureReward) -> InternalReward:
    """Return the reward of a recipe's table; its feature set is read now."""
    return InternalReward(name, config, load_feature_set(Path(config.file)))


def set_score(
    feature_set: FeatureSet, acts_BTF: Float[Tensor, "B T F"], *, saturate: bool, raw: bool = False
) -> Float[Tensor, "B T"]:
    """Return the score of every token; `raw` is mechreward's sum without scales."""
    if feature_set.direction:
        value_BT = (acts_BTF[..., 0] - feature_set.center) / feature_set.scale
        return value_BT.clamp(-1, 1) if saturate else value_BT
    sign_F = torch.tensor([float(f.sign) for f in feature_set.features])
    if raw:
        return acts_BTF @ sign_F
    value_BTF = acts_BTF / torch.tensor([f.scale for f in feature_set.features])
    if saturate:
        value_BTF = value_BTF.clamp(-1, 1)
    weight_F = torch.where(
        sign_F > 0, 1 / (sign_F > 0).sum().clamp(min=1), -1 / (sign_F < 0).sum().clamp(min=1)
    )
    return value_BTF @ weight_F


def over_limit(
    feature_set: FeatureSet, acts_BTF: Float[Tensor, "B T F"], mask_BT: Bool[Tensor, "B T"]
) -> Bool[Tensor, "B"]:
    """Return which completions show more than 99 % of right base answers did."""
    score_BT = set_score(feature_set, acts_BTF, saturate=False) * mask_BT
    return score_BT.sum(1) / mask_BT.sum(1).clamp(min=1) > feature_set.limit


def shaped(potential_T: Sequence[float], gamma: float) -> list[float]:
    """Return F_t = gamma phi_t - phi_{t-1}, with phi before the first token and at the end 0.

    Potential-based shaping (Ng et al. 1999): sum_t gamma^t F_t = 0 for every completion, so that
    no completion's return changes; only the credit inside it moves."""
    ends = [*potential_T[:-1], 0.0]
    before = [0.0, *potential_T[:-1]]
    return [gamma * now - last for now, last in zip(ends, before, strict=True)]


def _mask(rollouts: Sequence[Rollout], width_T: int) -> Bool[Tensor, "B T"]:
    lengths = torch.tensor([len(r.completion_ids) for r in rollouts])
    return torch.arange(width_T)[None, :] < lengths[:, None]
