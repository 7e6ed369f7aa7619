"""Tests, the sizes that they can see, and p-values adjusted for their number (K of them)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.stats import chi2, fisher_exact, hypergeom, mannwhitneyu, norm
from scipy.stats import t as student

from operando.stats.intervals import Interval, t_interval

QUANTILES = 4000


class PairedT(NamedTuple):
    """A paired t-test. Example: PairedT(Interval(0.2, 0.1, 0.3), p_value=0.013, df=2)"""

    difference: Interval
    p_value: float | None  # None: all pairs are alike, so nothing was tested
    df: int


class Tost(NamedTuple):
    """Two one-sided tests. Example: Tost(Interval(0.01, -0.02, 0.04), p_value=0.02, n=5)"""

    difference: Interval  # 95 % Student limits
    p_value: float | None  # that the arms differ by the margin or more; None: nothing varies
    n: int


def paired_t(differences: Sequence[float], level: float = 0.95) -> PairedT:
    """Return Student's paired t-test of a mean difference of zero.

    Over problems (each one's mean over seeds and samples) it treats the seeds as fixed: it speaks
    of these runs and not of the method. Over seeds (each run's mean) it speaks of the method.
    """
    n = len(differences)
    assert n > 1, f"{n} pairs"
    interval = t_interval(differences, level)
    sd = float(np.std(np.asarray(differences, dtype=np.float64), ddof=1))
    if sd == 0:
        return PairedT(interval, None, n - 1)
    ratio = abs(interval.value) / (sd / math.sqrt(n))
    return PairedT(interval, float(2 * student.sf(ratio, n - 1)), n - 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for their number (Holm 1979, Scand. J. Stat. 6:65).

    adjusted_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), in rising order of p.
    """
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def benjamini_hochberg(p_K: Float[np.ndarray, "K"]) -> Float[np.ndarray, "K"]:
    """Return adjusted p-values: keeping those <= a holds the false discovery rate at a.

    q_(i) = min_{j >= i} min(1, p_(j) K / j)   (Benjamini & Hochberg 1995, JRSS B 57:289)
    It holds for independent tests and for positively dependent ones.
    """
    order = np.argsort(p_K)
    q_sorted = p_K[order].astype(np.float64) * len(p_K) / np.arange(1, len(p_K) + 1)
    q_K = np.empty(len(p_K))
    q_K[order] = np.minimum.accumulate(q_sorted[::-1])[::-1].clip(max=1.0)
    return q_K


def tost(differences: Sequence[float], margin: float) -> Tost:
    """Return Schuirmann's two one-sided tests (1987, J. Pharmacokin. Biopharm. 15:657), paired.

    p = max(P(T > (mean + margin)/se), P(T < (mean - margin)/se)), T Student with n - 1 df: below
    5 % if the 90 % t-interval lies within -margin to margin.
    """
    n = len(differences)
    assert n > 1 and margin > 0, f"{n} pairs, margin = {margin}"
    interval = t_interval(differences)
    se = float(np.std(np.asarray(differences, dtype=np.float64), ddof=1)) / math.sqrt(n)
    if se == 0:
        return Tost(interval, None, n)
    above = student.sf((interval.value + margin) / se, n - 1)
    below = student.cdf((interval.value - margin) / se, n - 1)
    return Tost(interval, float(max(above, below)), n)


def smallest_difference(se: float, df: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the difference that a two-sided t-test with this standard error sees with `power`.

    Solves P(|T'| > t_{1-alpha/2}) = power for the noncentral T' with `df` degrees of freedom and
    noncentrality d / se. The standard error is that of the test that is reported: of a difference
    paired by seed and problem, say, and not of two arms by themselves.
    """
    assert se >= 0 and df > 0 and alpha < power < 1, f"se = {se}, df = {df}, power = {power}"
    limit = float(student.ppf(1 - alpha / 2, df))

    # Over the quantiles of the variance's chi-square; scipy's noncentral t is NaN at 1 df.
    share = (np.arange(QUANTILES) + 0.5) / QUANTILES
    at = limit * np.sqrt(chi2.ppf(share, df) / df)

    def short(shift: float) -> float:
        return float((norm.sf(at - shift) + norm.cdf(-at - shift)).mean()) - power

    high = 1.0
    while short(high) < 0:
        high *= 2
    shift = brentq(short, 0.0, high)
    assert isinstance(shift, float)
    return shift * se


def fisher(count_a: int, n_a: int, count_b: int, n_b: int) -> float:
    """Return the two-sided p of Fisher's exact test that two shares are equal."""
    table = [[count_a, n_a - count_a], [count_b, n_b - count_b]]
    return float(fisher_exact(table).pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def fisher_greater(count_a: int, n_a: int, count_b: int, n_b: int) -> float:
    """Return the one-sided p of Fisher's exact test that the first share is the larger.

    P(X >= count_a) with X the ones counted among n_a drawn from both without replacement.
    """
    return float(hypergeom.sf(count_a - 1, n_a + n_b, count_a + count_b, n_a))


def mann_whitney_greater(high: Sequence[float], low: Sequence[float]) -> float:
    """Return the one-sided p of the Mann-Whitney test that `high` stands above `low`."""
    return float(mannwhitneyu(high, low, alternative="greater").pvalue)
