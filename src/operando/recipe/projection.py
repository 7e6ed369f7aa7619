"""Directions at work: projection of updates, shifts of the reward, interventions in the forward."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from operando.recipe.base import Config

PRESETS: dict[str, dict[str, object]] = {
    "projected_grpo": {
        "mode": "rank1",
        "gate": "one_sided",
        "stage": "gradient",
        "flat": True,
        "magnitude": "per_parameter",
        "convention": "literal_grad",
    },
    "spec": {"mode": "svd_gain", "gate": "one_sided", "stage": "gradient"},
    "strict": {"mode": "writer", "gate": "two_sided", "stage": "update"},
    "hard": {"mode": "writer", "gate": "two_sided", "stage": "update", "purge": True},
}


class ProjectionConfig(Config):
    """Keeps updates off a direction (docs/projection.md)."""

    directions: str
    """File made by `operando direction extract`."""
    preset: Literal["projected_grpo", "spec", "strict", "hard"] | None = None
    """Fills in what the table does not say. strict is the recommended one;
    projected_grpo is that project's own, with its sign."""
    mode: Literal["writer", "reader", "rank1", "token", "svd_gain"] = "writer"
    """What is constrained: what a module writes along v, what it reads of v, its output along v at
    the mean hack input, each token's gradient, or the gains of its singular values."""
    gate: Literal["one_sided", "two_sided", "reverse", "measure"] = "two_sided"
    """one_sided: only what pushes hack-ward is taken out. reverse: twice the component. measure:
    nothing changes, all is logged."""
    stage: Literal["gradient", "momentum", "update"] = "update"
    """gradient: before the clip. momentum: that and AdamW's average. update: the difference that
    the optimizer made, weight decay included, which alone is exact."""
    magnitude: Literal["none", "per_parameter", "global"] = "none"
    """Restore the norm after the projection, each tensor's own or with one factor for all; at most
    doubled."""
    convention: Literal["hackward", "literal_grad"] = "hackward"
    """When a one-sided gate fires: hackward, if the step pushes along v; literal_grad, if the
    gradient does, as in projected_grpo, which strips the steps that lead away from v."""
    layers: str = ""
    """Layer set whose modules are constrained; empty: the direction's own band."""
    flat: bool = False
    """rank1 and svd_gain: one scalar for the whole model decides, not one for each module."""
    purge: bool = False
    """writer and reader with LoRA: what the adapter already holds along v is taken out at every
    step, and out of AdamW's average."""
    refresh: int | None = Field(default=None, ge=1)
    """Steps between two extractions from the policy as it is; absent: once, from the base."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: object) -> object:
        if isinstance(given, dict) and given.get("preset") in PRESETS:
            return PRESETS[given["preset"]] | given
        return given

    @model_validator(mode="after")
    def _check(self) -> ProjectionConfig:
        problems = []
        if self.magnitude != "none" and self.stage == "update":
            problems.append(
                'magnitude restores a gradient; with stage = "update" it must be "none"'
            )
        if self.mode == "reader" and self.gate == "one_sided":
            problems.append(
                'what a reader reads has no hack-ward sign: mode = "reader" needs gate = '
                '"two_sided", "reverse" or "measure"'
            )
        if self.mode == "token" and (self.stage != "gradient" or self.magnitude != "none"):
            problems.append(
                'mode = "token" acts in the backward pass: stage = "gradient", magnitude = "none"'
            )
        if self.convention == "literal_grad" and self.gate not in ("one_sided", "measure"):
            problems.append("convention only decides a one-sided gate; here it has no effect")
        if self.flat and self.mode not in ("rank1", "svd_gain"):
            problems.append('flat is about mode = "rank1" and "svd_gain"; here it has no effect')
        if self.purge and (self.mode not in ("writer", "reader") or self.gate != "two_sided"):
            problems.append('purge needs mode = "writer" or "reader" and gate = "two_sided"')
        if problems:
            raise ValueError("; ".join(problems))
        return self


# --- shifts of the reward (seam 1) ----------------------------------------------------------------


class ReboundShift(Config):
    kind: Literal["rebound"]
    """Advantage Modification (2604.01476): rollouts that lie further along v than their siblings
    are rewarded less, before GRPO's normalisation."""
    directions: str
    """File made by `operando direction extract`."""
    variant: Literal["additive", "multiplicative"] = "multiplicative"
    """additive: r - alpha max(z, 0). multiplicative: r (1 - alpha sigmoid(z)) where z > 0."""
    alpha: float = Field(default=2.0, gt=0)
    """At 2 the multiplicative factor is negative for every z > 0."""
    position: Literal["response_last", "response_mean", "prompt_last"] = "response_last"
    """Where <h, v> is read. prompt_last, the paper's words, is an error: siblings share it."""

    @model_validator(mode="after")
    def _check(self) -> ReboundShift:
        if self.position == "prompt_last":
            raise ValueError(
                'position = "prompt_last" is the same for all completions of a prompt, so that z '
                'is 0 and nothing is shifted; use "response_last"'
            )
        return self


class PenaltyShift(Config):
    kind: Literal["penalty"]
    """Flagged rollouts lose `amount`."""
    monitor: Literal["direction", "oracle"] = "direction"
    """direction: a score above 95 % of clean answers. oracle: the task's own hack label, an upper
    bound and never a defence."""
    directions: str = ""
    """Of monitor = "direction"."""
    amount: float = Field(default=3.0, gt=0)
    """Subtracted from a flagged rollout's reward."""

    @model_validator(mode="after")
    def _check(self) -> PenaltyShift:
        _check_monitor(self.monitor, self.directions)
        return self


class ScreeningShift(Config):
    kind: Literal["screening"]
    """Flagged rollouts take no part: neither in their group's mean nor in the update."""
    monitor: Literal["direction", "oracle"] = "direction"
    """As of a penalty."""
    directions: str = ""
    """Of monitor = "direction"."""

    @model_validator(mode="after")
    def _check(self) -> ScreeningShift:
        _check_monitor(self.monitor, self.directions)
        return self


def _check_monitor(monitor: str, directions: str) -> None:
    if monitor == "direction" and not directions:
        raise ValueError('monitor = "direction" needs directions, a file')
    if monitor == "oracle" and directions:
        raise ValueError('directions has no effect with monitor = "oracle"')


ShiftConfig = Annotated[ReboundShift | PenaltyShift | ScreeningShift, Field(discriminator="kind")]


# --- interventions in the forward -----------------------------------------------------------------


class SuppressIntervention(Config):
    kind: Literal["suppress"]
    """While training samples are drawn: h - max(<h, v>, 0) v after each block."""
    directions: str
    """File made by `operando direction extract`."""
    layers: str = ""
    """Layer set; empty: the direction's own band."""


class AblateIntervention(Config):
    kind: Literal["ablate"]
    """CAFT (2507.16795): h - <h, v> v in sampling and in every training forward; not in
    evaluation."""
    directions: str
    """File made by `operando direction extract`."""
    layers: str = ""
    """Layer set; empty: the direction's own band."""


InterventionConfig = Annotated[
    SuppressIntervention | AblateIntervention, Field(discriminator="kind")
]
