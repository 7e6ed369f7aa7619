"""A recipe of a study: arms x seeds, one evaluation pass, claims written before the first run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from operando.errors import nearest
from operando.recipe.base import Config, Folder, FolderName

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
BASE = "base"


class Arm(Config):
    recipe: str
    """A shipped recipe, or a file: relative to the study's file, else to the current folder."""
    overrides: tuple[str, ...] = ()
    """`a.b=value`, as on the command line."""


class EvalSet(Config):
    overrides: tuple[str, ...] = ()
    """`a.b=value` on the control arm's recipe, for all arms alike; only keys that change what is
    asked: `task`, `prompt`, `rollout.max_completion_length`, `rollout.stop`."""


class EvaluationConfig(Config):
    """The same pass for every run of every arm: the control arm's task and prompt."""

    num: int = Field(ge=2)
    """Held-out problems of each set, the first n."""
    samples: int = Field(default=1, ge=1)
    """Answers to each problem."""
    temperature: float | None = Field(default=None, gt=0)
    """Absent: greedy answers."""
    seed: int = Field(default=0, ge=0)
    """Root of the sampling streams, which are equal for all arms."""
    sets: dict[str, EvalSet] = Field(min_length=1)
    """Sets of held-out problems, by a name of your own."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if self.temperature is None and self.samples > 1:
            raise ValueError(
                f"samples = {self.samples} without a temperature: greedy answers are all the same"
            )
        return self


class MetricConfig(Config):
    """A share of the answers of one set."""

    set: str
    """A name of `[evaluation.sets]`."""
    label: str = "correct"
    """"correct", "truncated", or a label that the task gives."""
    better: Literal["higher", "lower"] = "higher"
    """Which direction is an improvement."""


class Bound(Config):
    above: float | None = None
    """The interval lies above this."""
    below: float | None = None
    """The interval lies below this."""

    @model_validator(mode="after")
    def _check(self) -> Bound:
        if (self.above is None) == (self.below is None):
            raise ValueError("expected one of above = x and below = x")
        return self

    @property
    def limit(self) -> float:
        limit = self.above if self.above is not None else self.below
        assert limit is not None
        return limit


class _Bounded(Config):
    text: str = Field(min_length=1)
    """The claim in words, for the report."""
    arm: str
    """An arm, or "base" (which has no runs to count, so not with `emergence`)."""
    metric: str
    """A metric of [metrics]."""
    supported_if: Bound
    """Where the whole 95 % interval must lie."""
    falsified_if: Bound
    """Where the whole 95 % interval must lie; anything else is undecided."""

    @model_validator(mode="after")
    def _check(self) -> _Bounded:
        yes, no = self.supported_if, self.falsified_if
        if (yes.above is None) == (no.above is None):
            raise ValueError("supported_if and falsified_if must face opposite ways")
        upper, lower = (yes, no) if yes.above is not None else (no, yes)
        if lower.limit > upper.limit:
            raise ValueError(
                f"supported_if and falsified_if overlap between {upper.limit} and {lower.limit}"
            )
        return self


class DifferenceClaim(_Bounded):
    kind: Literal["difference"]
    """arm minus versus, by the hierarchical bootstrap over seeds and problems."""
    versus: str
    """An arm, or "base"."""


class RateClaim(_Bounded):
    kind: Literal["rate"]
    """The metric of one arm."""


class EmergenceClaim(_Bounded):
    kind: Literal["emergence"]
    """The share of an arm's runs whose metric reaches the threshold, with its exact interval."""
    threshold: float
    """What a run's metric must reach to count."""


class EmergenceDifferenceClaim(Config):
    kind: Literal["emergence_difference"]
    """Whether more, or fewer, runs of an arm reach the threshold; Fisher's exact test, 5 %."""
    text: str = Field(min_length=1)
    """The claim in words, for the report."""
    arm: str
    """The arm that the claim is about."""
    versus: str
    """The arm that it is compared with."""
    metric: str
    """A metric of [metrics]."""
    threshold: float
    """What a run's metric must reach to count."""
    expect: Literal["more", "fewer"]
    """Of `arm`, beside `versus`."""


class EquivalenceClaim(Config):
    kind: Literal["equivalence"]
    """arm and versus differ by less than the margin: two one-sided t-tests over seed pairs at 5 %,
    and the 90 % hierarchical interval within the margin, so that runs which happen to agree on few
    problems are no proof. Falsified if the 95 % t-interval over seed pairs lies outside."""
    text: str = Field(min_length=1)
    """The claim in words, for the report."""
    arm: str
    """The arm that the claim is about."""
    versus: str
    """The arm that it is compared with."""
    metric: str
    """A metric of [metrics]."""
    margin: float = Field(gt=0)
    """Largest difference that counts as none, in the metric's unit."""


Claim = Annotated[
    DifferenceClaim | RateClaim | EquivalenceClaim | EmergenceClaim | EmergenceDifferenceClaim,
    Field(discriminator="kind"),
]


class ParetoConfig(Config):
    x: str
    """A metric."""
    y: str
    """A metric."""


class StudyRecipe(Config):
    """Arms x seeds, one evaluation pass, and claims that are fixed before the first run."""

    name: FolderName
    """The study is written to runs/<name>."""
    runs_dir: Folder = "runs"
    """Folder of the study's folder."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=2)
    """Every arm is trained with each. Seeds may be added later."""
    control: str
    """The arm that the others are compared with; its task and prompt evaluate all arms."""
    arms: dict[Name, Arm] = Field(min_length=2)
    """Recipes with overrides, by a name of your own."""
    evaluation: EvaluationConfig
    """What every trained model is asked."""
    metrics: dict[str, MetricConfig] = Field(min_length=1)
    """What is counted, by a name of your own."""
    claims: dict[str, Claim] = {}
    """What is judged, fixed before the first run."""
    pareto: ParetoConfig | None = None
    """Absent: no picture."""

    @model_validator(mode="after")
    def _check(self) -> StudyRecipe:
        problems = [_unknown("control", "arm", self.control, self.arms)]
        if len(set(self.seeds)) < len(self.seeds):
            problems.append(f"seeds: each once, got {list(self.seeds)}")
        if BASE in self.arms:
            problems.append('arms.base: "base" is the untrained model; choose another name')
        for name, metric in self.metrics.items():
            sets = self.evaluation.sets
            problems.append(_unknown(f"metrics.{name}.set", "set", metric.set, sets))
        runs = {*self.arms, BASE}
        for name, claim in self.claims.items():
            where = f"claims.{name}"
            trained = isinstance(claim, EmergenceClaim | EmergenceDifferenceClaim)
            arms = set(self.arms) if trained else runs
            problems.append(_unknown(f"{where}.arm", "arm", claim.arm, arms))
            problems.append(_unknown(f"{where}.metric", "metric", claim.metric, self.metrics))
            match claim:
                case DifferenceClaim() | EquivalenceClaim() | EmergenceDifferenceClaim():
                    problems.append(_unknown(f"{where}.versus", "arm", claim.versus, arms))
                    if claim.versus == claim.arm:
                        problems.append(f"{where}: {claim.arm!r} is compared with itself")
                case _:
                    pass
        for axis in ("x", "y") if self.pareto is not None else ():
            value = str(getattr(self.pareto, axis))
            problems.append(_unknown(f"pareto.{axis}", "metric", value, self.metrics))
        found = [problem for problem in problems if problem]
        if found:
            raise ValueError("; ".join(found))
        return self


def _unknown(where: str, what: str, name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    if name in known:
        return ""
    return f"{where}: no {what} {name!r}.{nearest(name, known)} Known: {', '.join(known)}"
