"""Advantages (seam 2), loss, KL, optimizer of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from operando.recipe.base import Config, Rate

# --- advantages (seam 2) -------------------------------------------------------------------------


class GroupAdvantage(Config):
    kind: Literal["group"] = "group"
    """GRPO: return minus the group's mean."""
    scale: Literal["group", "batch", "none"] = "group"
    """Divide by the group's std (GRPO), the batch's, or not at all (Dr. GRPO)."""
    eps: float = 1e-4
    """Added to the std that is divided by."""


class RlooAdvantage(Config):
    kind: Literal["rloo"]
    """Return minus the mean of the siblings."""


class OtherGroupsAdvantage(Config):
    kind: Literal["leave_one_group_out"]
    """Return minus the mean over all other groups of the batch."""


class RewardToGoAdvantage(Config):
    kind: Literal["reward_to_go"]
    """Per token: reward still to come, minus the group's mean at the same position."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""


class GaeAdvantage(Config):
    kind: Literal["gae"]
    """PPO: generalised advantage estimation with a value head."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""
    lam: float = Field(default=1.0, ge=0, le=1)
    """1: returns minus values; 0: one-step differences."""
    whiten: bool = True
    """Scale advantages to mean 0 and std 1 over the batch's tokens."""
    value_lr: Rate = 1e-3
    """Learning rate of the value head."""
    value_coef: float = Field(default=0.1, gt=0)
    """Weight of the value loss, which also reaches the trained layers below the head."""
    value_clip: float | None = Field(default=0.5, gt=0)
    """Largest change of a value in one update; absent: none."""


AdvantageConfig = Annotated[
    GroupAdvantage | RlooAdvantage | OtherGroupsAdvantage | RewardToGoAdvantage | GaeAdvantage,
    Field(discriminator="kind"),
]


# --- the loss ------------------------------------------------------------------------------------


class ClipLoss(Config):
    kind: Literal["clip"] = "clip"
    """PPO's clipped objective, as in GRPO."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """Above clip_low it is DAPO's clip-higher."""
    dual_clip: float | None = Field(default=None, gt=1)
    """verl uses 3.0; absent means none, as in TRL."""


class GspoTokenLoss(Config):
    kind: Literal["gspo_token"]
    """GSPO's token variant (2507.18071): one ratio per sequence."""
    clip_low: float = Field(default=3e-4, gt=0, lt=1)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=4e-4, gt=0)
    """The ratio is clipped above 1 + clip_high."""


class CispoLoss(Config):
    kind: Literal["cispo"]
    """CISPO (2506.13585): the importance weight is clipped, no token loses its gradient."""
    clip_high: float = Field(default=4.0, gt=0)
    """The importance weight is cut at 1 + clip_high; the default is the published bound of 5."""


PolicyLossConfig = Annotated[ClipLoss | GspoTokenLoss | CispoLoss, Field(discriminator="kind")]


class KlConfig(Config):
    coef: float = Field(ge=0)
    """0 is an error: leave the table out instead."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of d = logp - ref_logp: k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d. In the reward only k1 has
    the gradient of a KL."""
    place: Literal["loss", "reward"] = "loss"
    """Where it acts: a term of the loss, or subtracted from every token's reward."""
    target: float | None = Field(default=None, gt=0)
    """In the reward: the coefficient follows this KL (mean over rollouts of their mean token).
    Absent: it is fixed."""
    horizon: int = Field(default=10_000, ge=1)
    """Rollouts over which a KL far from `target` changes the coefficient by 20 %."""
    unbiased: bool = True
    """In the loss: multiply by the differentiable ratio (its gradient is then that of the reverse
    KL). TRL's use_bias_correction_kl."""

    @model_validator(mode="after")
    def _check(self) -> KlConfig:
        if self.coef == 0:
            raise ValueError("coef = 0 would have no effect; leave the [kl] table out instead")
        if self.target is not None and self.place != "reward":
            raise ValueError('target adapts a KL in the reward; set place = "reward"')
        if self.place == "reward" and not self.unbiased:
            raise ValueError("unbiased is about a KL in the loss; in the reward it has no effect")
        if self.estimator == "k1" and self.place == "loss" and not self.unbiased:
            raise ValueError("k1 in the loss has zero expected gradient; use k2, k3 or unbiased")
        return self


class UpdateConfig(Config):
    aggregation: Literal["token_mean", "seq_mean_token_mean", "constant", "seq_mean_token_sum"] = (
        "token_mean"
    )
    """How per-token losses become one number; see docs/methods.md."""
    epochs: int = Field(default=1, ge=1)
    """Passes over a batch of rollouts (mu)."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer steps a pass."""
    micro_tokens: int = Field(default=4096, ge=1)
    """Tokens (padding included) in one forward and backward. Changes memory, never the gradient.
    What a CUDA device can't hold, by estimate, is refused at the start with a value that fits."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus (nats per token)."""
    sampler_correction: Literal["none", "token", "sequence"] = "none"
    """Truncated importance weights for the gap between sampler and trainer."""
    sampler_cap: float = Field(default=2.0, gt=0)
    """Largest importance weight."""
    loop_credit: Literal["last", "uniform", "progressive"] = "last"
    """Of a recursive model: whose log-prob the ratio is of. last: the last loop's, which samples.
    Else a mean over the loops (RLTT), weighted equally or by the loop's number."""


class OptimConfig(Config):
    lr: Rate = 1e-4
    """Base learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes on after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's averaging of gradient and squared gradient."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger L2 norm are scaled down to it."""
