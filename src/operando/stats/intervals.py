"""Intervals and tests for proportions and means; each names its method and its paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest, norm, t


class Interval(NamedTuple):
    """An estimate with its confidence limits. Example: Interval(0.5, 0.40, 0.60)"""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """How the share of right answers changed on the same problems.

    `gained` problems went from wrong to right, `lost` from right to wrong.

    Example: PairedDifference(Interval(0.2, 0.06, 0.34), p_value=0.013, gained=12, lost=2, n=50)
    """

    difference: Interval
    p_value: float
    gained: int
    lost: int
    n: int


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return the share of successes with its Wilson score interval (Wilson 1927, JASA 22:209).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    assert n > 0 and 0 <= successes <= n, f"{successes} successes of {n}"
    assert 0 < level < 1, f"level = {level}"
    share = np.asarray(successes / n)
    low, high = wilson_limits(share, np.asarray(float(n)), level)
    return Interval(successes / n, float(low), float(high))


def wilson_limits(
    p: Float[np.ndarray, "*cells"], n: Float[np.ndarray, "*cells"], level: float = 0.95
) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
    """Return Wilson's limits of shares p of n each; n may be an effective number, not whole."""
    z = float(norm.ppf((1 + level) / 2))
    middle = p + z * z / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # at 0 and 1 the limit is p itself; rounding would leave it 1e-17 beside
    low = np.where(p > 0, (middle - half) / scale, 0.0)
    return low, np.where(p < 1, (middle + half) / scale, 1.0)


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], level: float = 0.95
) -> PairedDifference:
    """Return share(after) - share(before) on the same problems, in the same order.

    The interval is method 10 of Newcombe (1998, Stat. Med. 17:2635): Wilson limits of both shares,
    joined with their correlation phi. The p-value is McNemar's, exact: lost ~ Binomial(gained +
    lost, 1/2), two-sided.
    """
    n = len(before)
    assert n > 0 and n == len(after), f"{n} problems before, {len(after)} after"
    both = sum(b and a for b, a in zip(before, after, strict=True))
    lost, gained = sum(before) - both, sum(after) - both
    neither = n - both - lost - gained
    p_before = wilson(both + lost, n, level)
    p_after = wilson(both + gained, n, level)
    phi = _phi(both, gained, lost, neither)
    theta = p_after.value - p_before.value
    low = _join(p_after.value - p_after.low, p_before.high - p_before.value, phi)
    high = _join(p_after.high - p_after.value, p_before.value - p_before.low, phi)
    changed = gained + lost
    p_value = float(binomtest(lost, changed, 0.5).pvalue) if changed else 1.0
    return PairedDifference(
        Interval(theta, max(-1.0, theta - low), min(1.0, theta + high)), p_value, gained, lost, n
    )


def _phi(both: int, gained: int, lost: int, neither: int) -> float:
    """Return the correlation of the pairs, its numerator shrunk by n/2 where positive."""
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if product == 0:
        return 0.0
    n = both + gained + lost + neither
    cross = both * neither - gained * lost
    return (max(cross - n / 2, 0.0) if cross > 0 else cross) / math.sqrt(product)


def _join(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean with Student's interval; of a single value, the value three times."""
    assert len(values) > 0, "no values"
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean, mean, mean)
    half = float(t.ppf((1 + level) / 2, len(data) - 1)) * float(data.std(ddof=1))
    half /= math.sqrt(len(data))
    return Interval(mean, mean - half, mean + half)


def exact_share(count: int, n: int) -> Interval:
    """Return a share with its exact 95 % limits (Clopper and Pearson 1934, Biometrika 26:404)."""
    assert n > 0 and 0 <= count <= n, f"{count} of {n}"
    limits = binomtest(count, n).proportion_ci(0.95, method="exact")
    return Interval(count / n, float(limits.low), float(limits.high))
