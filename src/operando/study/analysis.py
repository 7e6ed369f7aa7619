"""The numbers of a study: every arm beside the control, three tests, and what seeds can see.

Dims: S seeds, P problems; values are those of `measure.read_metrics_of`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from operando.recipe.study import BASE, StudyRecipe
from operando.run import SeedTree
from operando.stats.bootstrap import Hierarchical, hierarchical_bootstrap, rate_interval
from operando.stats.intervals import Interval
from operando.stats.tests import PairedT, holm, paired_t, smallest_difference

Values = Mapping[str, Mapping[str, Float[np.ndarray, "S P"]]]  # by arm, by metric


@dataclass(frozen=True)
class Comparison:
    """An arm minus another on one metric, paired by seed and problem."""

    hierarchical: Hierarchical  # the headline
    seed_paired: PairedT
    problem_paired: PairedT  # treats the seeds as fixed
    holm_p: float  # of hierarchical.p_value, over the arms of the metric

    @property
    def is_significant(self) -> bool:
        return self.holm_p < 0.05


@dataclass(frozen=True)
class Row:
    """One arm on one metric; the control and the base model are not compared."""

    arm: str
    metric: str
    by_seed: tuple[float, ...]  # in the order of the study's seeds; one value for a base model
    rate: Interval
    against_control: Comparison | None


@dataclass(frozen=True)
class Visible:
    """The smallest difference to the control that the headline test shows with 80 % power."""

    metric: str
    se: float  # of an arm minus the control, paired by seed and problem, pooled over arms
    difference: float | None  # None where all runs are alike
    num_seeds: int


@dataclass(frozen=True)
class Point:
    """A run on the Pareto plot; `is_best`: no run of the same seed is better in both."""

    arm: str
    seed: int
    x: float
    y: float
    is_best: bool


def bootstrap_seed(study: StudyRecipe) -> int:
    """Return the seed of every bootstrap of a study; seeds that are added do not change it."""
    return SeedTree(study.evaluation.seed).derive("study", study.name, "bootstrap")


def base_of(arm: str) -> str:
    """Return the name of an arm's untrained model in the values."""
    return f"{BASE} of {arm}"


def values_of(values: Values, arm: str, metric: str, other: str = "") -> np.ndarray:
    """Return an arm's values; "base" is the model that `other` (else the control) starts from."""
    return values[base_of(other) if arm == BASE else arm][metric]


def compare(a_SP: np.ndarray, b_SP: np.ndarray, seed: int) -> Comparison:
    """Return a minus b; a base model, which has one row, is the same beside every seed."""
    difference_SP = a_SP - b_SP
    found = hierarchical_bootstrap(difference_SP, seed)
    return Comparison(
        found,
        paired_t(difference_SP.mean(1).tolist()),
        paired_t(difference_SP.mean(0).tolist()),
        holm_p=found.p_value,
    )


def rows_of(study: StudyRecipe, values: Values) -> list[Row]:
    """Return every arm's metrics, base first; p-values are adjusted over a metric's arms."""
    seed, control = bootstrap_seed(study), study.control
    found = []
    for metric in study.metrics:
        rows = []
        for arm in (BASE, control, *(a for a in study.arms if a != control)):
            own_SP = values_of(values, arm, metric, control)
            against = None
            if arm not in (BASE, control):
                against = compare(own_SP, values[control][metric], seed)
            by_seed = tuple(own_SP.mean(1).tolist())
            rows.append(Row(arm, metric, by_seed, rate_interval(own_SP, seed), against))
        found += _adjusted(rows)
    return found


def _adjusted(rows: Sequence[Row]) -> list[Row]:
    raw = {
        row.arm: row.against_control.hierarchical.p_value
        for row in rows
        if row.against_control is not None
    }
    by_arm = holm(raw)
    return [
        row
        if row.against_control is None
        else replace(row, against_control=replace(row.against_control, holm_p=by_arm[row.arm]))
        for row in rows
    ]


def visible_differences(study: StudyRecipe, values: Values) -> list[Visible]:
    """Return for each metric what this design can see, by the error of its own headline test."""
    found = []
    for metric in study.metrics:
        tests = [
            row.against_control.hierarchical
            for row in rows_of(study, values)
            if row.metric == metric and row.against_control is not None
        ]
        se = float(np.sqrt(np.mean([test.se**2 for test in tests]))) if tests else 0.0
        df = float(np.median([test.df for test in tests if test.se > 0])) if se > 0 else 0.0
        difference = smallest_difference(se, df) if se > 0 else None
        found.append(Visible(metric, se, difference, len(study.seeds)))
    return found


def pareto_points(study: StudyRecipe, values: Values) -> list[Point]:
    """Return a point for each arm and seed; compared within a seed, not on means."""
    if study.pareto is None:
        return []
    axes = (study.pareto.x, study.pareto.y)
    signs = [1 if study.metrics[axis].better == "higher" else -1 for axis in axes]
    points = []
    for place, seed in enumerate(study.seeds):
        at = {
            arm: tuple(float(values[arm][axis][place].mean()) for axis in axes)
            for arm in study.arms
        }
        gains = {arm: tuple(s * v for s, v in zip(signs, p, strict=True)) for arm, p in at.items()}
        for arm, (x, y) in at.items():
            points.append(Point(arm, seed, x, y, not is_dominated(gains[arm], gains.values())))
    return points


def is_dominated(point: tuple[float, ...], others: Iterable[tuple[float, ...]]) -> bool:
    """Return whether another point is at least as good in all and better in one; high is good."""
    return any(
        other != point and all(o >= p for o, p in zip(other, point, strict=True))
        for other in others
    )
