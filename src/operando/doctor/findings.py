"""What a finding is, and the counts, series and tests that every rule of the doctor rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple, TypeAlias

from operando.recipe.run import Recipe
from operando.stats.tests import fisher_greater, mann_whitney_greater

Row: TypeAlias = Mapping[str, float | int | str | None]

LEVEL = 0.01  # of every test that accuses
EXCUSE = 0.05  # of every test that excuses: a run that seems to learn is left alone
LARGE_STEP = 0.01  # ||dW|| / ||W|| of one step
MIN_STEPS = 10  # fewer training steps say nothing about a trend


@dataclass(frozen=True)
class Finding:
    """One illness.

    Example: Finding("truncation", "warning", "31 % of the completions of steps 51-60 were cut ...",
                     "raise rollout.max_completion_length above 48")
    """

    name: str
    severity: Literal["error", "warning"]
    sentence: str
    remedy: str


class Point(NamedTuple):
    """A value and the step it belongs to. Example: Point(20, 0.61)"""

    step: int
    value: float


class Count(NamedTuple):
    """Right answers of n. Example: Count(140, 200)"""

    right: int
    n: int

    @property
    def share(self) -> float:
        return self.right / self.n


class Ends(NamedTuple):
    """The first and the last fifth of a metric. Example: Ends([0.1] * 5, [0.3] * 5)"""

    early: list[float]
    late: list[float]


def series(rows: Sequence[Row], key: str) -> list[Point]:
    """Return the values of one key where it was measured and finite, by step."""
    found = []
    for row in rows:
        value, step = row.get(key), row["step"]
        if (
            isinstance(value, float | int)
            and isinstance(step, float | int)
            and math.isfinite(value)
        ):
            found.append(Point(int(step), float(value)))
    return found


def nulls(rows: Sequence[Row], key: str) -> list[int]:
    """Return the steps at which a key was measured and is no number: null, NaN or infinite."""
    found = []
    for row in rows:
        value = row.get(key, 0.0)
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            found.append(int(row["step"] or 0))
    return found


def rounded(value: float) -> float:
    """Return a positive number at one significant digit, rounded down."""
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return math.floor(value / power + 1e-9) * power


def as_factor(value: float) -> str:
    """Return a factor in words. Example: as_factor(1136.0) is "1,100"."""
    return f"{value:,.1f}" if value < 10 else f"{float(f'{value:.2g}'):,.0f}"


def rate_for(rows: Sequence[Row], recipe: Recipe) -> str | None:
    """Return the words for a learning rate at which no step is too long, if one was.

    A step of AdamW is proportional to the rate, so a rate LARGE_STEP / ||dW|| times as high would
    have moved the weights by LARGE_STEP of their norm.
    """
    moved = [p.value for p in series(rows, "update_norm")]
    if not moved or max(moved) < 5 * LARGE_STEP:
        return None
    rate = rounded(recipe.optim.lr * LARGE_STEP / max(moved))
    return (
        f"lower optim.lr from {recipe.optim.lr:g} to {rate:.0e} (one step moved the weights by "
        f"{max(moved):.2g} of their norm; {LARGE_STEP:g} is a long step)"
    )


def held_out_counts(rows: Sequence[Row]) -> dict[int, Count]:
    """Return the right answers on held-out problems by step."""
    sizes = dict(series(rows, "eval/n"))
    return {
        step: Count(round(share * sizes[step]), round(sizes[step]))
        for step, share in series(rows, "eval/correct")
    }


def always_under_clip(rows: Sequence[Row], max_grad_norm: float) -> bool:
    """Return whether no gradient ever reached the clip: the learning rate alone sets the step."""
    grads = series(rows, "grad_norm")
    return len(grads) >= MIN_STEPS and all(p.value < max_grad_norm for p in grads)


def ends(rows: Sequence[Row], key: str) -> Ends | None:
    """Return the first and the last fifth of a metric (at least 5 steps each); None if too few."""
    values = [p.value for p in series(rows, key)]
    width = max(5, len(values) // 5)
    if len(values) < max(MIN_STEPS, 2 * width):
        return None
    return Ends(values[:width], values[-width:])


def lately(rows: Sequence[Row], key: str) -> float | None:
    """Return the mean of a metric over its last quarter; None under MIN_STEPS values."""
    values = [p.value for p in series(rows, key)]
    return fmean(values[-(len(values) // 4) :]) if len(values) >= MIN_STEPS else None


def gained(rows: Sequence[Row]) -> bool:
    """Return whether the run has learned: held-out accuracy or reward is above its start.

    Fisher's test of the last evaluation and the first, and Mann-Whitney's of the reward's ends.
    """
    counts, paid = held_out_counts(rows), ends(rows, "reward")
    if len(counts) > 1 and rise_chance(counts[max(counts)], counts[min(counts)]) < EXCUSE:
        return True
    return paid is not None and greater(paid.late, paid.early, EXCUSE)


def greater(high: Sequence[float], low: Sequence[float], level: float = LEVEL) -> bool:
    """Return whether `high` stands above `low`: Mann-Whitney, one-sided, at `level`."""
    if len(high) < 3 or len(low) < 3 or set(high) == set(low):
        return False
    return mann_whitney_greater(high, low) < level


def rise_chance(high: Count, low: Count) -> float:
    """Return the one-sided p-value of Fisher's exact test that `high` has the larger share."""
    return fisher_greater(high.right, high.n, low.right, low.n)


def share_words(count: Count) -> str:
    return f"{count.right / count.n:.1%} ({count.right}/{count.n})"


def odds(value: float) -> str:
    return "under 1 in 10,000" if value < 1e-4 else f"p = {value:.4f}"
