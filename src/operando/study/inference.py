"""Inference over seeds and problems: pairs, the hierarchical bootstrap, Holm, TOST, sizes.

Dims: S seeds (runs of one arm), P problems. A value is a problem's mean over samples, and all lie
in [0, 1]; those of two arms are paired by seed and by problem, so differences lie in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.stats import binomtest, chi2, fisher_exact, norm
from scipy.stats import t as student

from operando.study.stats import RESAMPLES, Interval, t_interval, wilson

QUANTILES = 4000
CHUNK = 1000  # bootstrap resamples computed at once


class PairedT(NamedTuple):
    """A paired t-test. Example: PairedT(Interval(0.2, 0.1, 0.3), p_value=0.013, df=2)"""

    difference: Interval
    p_value: float | None  # None: all pairs are alike, so nothing was tested
    df: int


class Hierarchical(NamedTuple):
    """What the hierarchical bootstrap says of a mean; `interval` is the one to report."""

    interval: Interval
    p_value: float  # two-sided, of a mean of zero; belongs to `interval`
    percentile: Interval  # the plain percentile limits, too narrow for few seeds
    se: float  # standard error of the mean and its degrees of freedom; 0 where nothing varies
    df: float


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


def hierarchical_bootstrap(
    values_SP: Float[np.ndarray, "S P"], seed: int, level: float = 0.95, resamples: int = RESAMPLES
) -> Hierarchical:
    """Return the mean with limits that count seeds and problems as drawn.

    Each resample draws seeds, then problems, with replacement and for both arms alike: the values
    are differences of paired arms, or one arm's. This is the pigeonhole bootstrap (Owen 2007, Ann.
    Appl. Stat. 1:386). Its variance is short by the factors (S-1)/S and (P-1)/P of its two parts,
    and its percentile limits never leave the range of the seeds, so that with three seeds they
    miss far more often than they say. The limits reported here are therefore Student's:

        mean -+ t_df * se,   se^2 = var_boot + v_S / S + v_P / P,
        df = (v_S + v_P)^2 / (v_S^2 / (S - 1) + v_P^2 / (P - 1))   (Satterthwaite)

    with v_S, v_P the squared standard errors of the mean over seeds and over problems. If all
    values are equal, there is nothing to resample: the limits are then those of P problems of
    which none differs, 1 - (alpha/2)^(1/P), and p is that of the sign test.
    """
    num_seeds, num_problems = values_SP.shape
    assert num_seeds > 1 and num_problems > 1, f"{values_SP.shape} values"
    mean, alpha = float(values_SP.mean()), 1 - level
    if np.ptp(values_SP) < 1e-12:
        miss = 1 - (alpha / 2) ** (1 / num_problems)
        around = Interval(mean, max(-1.0, mean - miss), min(1.0, mean + miss))
        p_value = 1.0 if mean == 0 else min(1.0, 2 * 0.5**num_problems)
        return Hierarchical(around, p_value, Interval(mean, mean, mean), 0.0, num_seeds - 1)
    means = _resampled_means(values_SP, seed, resamples)
    var_seeds = float(values_SP.mean(1).var(ddof=1)) / num_seeds
    var_problems = float(values_SP.mean(0).var(ddof=1)) / num_problems
    var = float(means.var(ddof=1)) + var_seeds / num_seeds + var_problems / num_problems
    below = var_seeds**2 / (num_seeds - 1) + var_problems**2 / (num_problems - 1)
    # means over seeds and over problems may all be equal while single values are not
    df = (var_seeds + var_problems) ** 2 / below if below > 0 else float(num_seeds - 1)
    half = float(student.ppf(1 - alpha / 2, df)) * math.sqrt(var)
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return Hierarchical(
        Interval(mean, max(-1.0, mean - half), min(1.0, mean + half)),
        float(2 * student.sf(abs(mean) / math.sqrt(var), df)),
        Interval(mean, float(low), float(high)),
        math.sqrt(var),
        df,
    )


def _resampled_means(values_SP: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Return the mean of each resample of rows and columns, by how often each was drawn."""
    num_seeds, num_problems = values_SP.shape
    generator = np.random.default_rng(seed)
    parts = []
    for at in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - at)
        times_RS = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size)
        times_RP = generator.multinomial(num_problems, [1 / num_problems] * num_problems, size)
        parts.append(((times_RS @ values_SP) * times_RP).sum(1) / (num_seeds * num_problems))
    return np.concatenate(parts)


def rate_interval(values_SP: Float[np.ndarray, "S P"], seed: int) -> Interval:
    """Return a rate with the wider of two 95 % limits: hierarchical bootstrap and Wilson.

    Wilson's count each problem once, however many runs and samples answered it; near 0 and 1 the
    bootstrap alone would have next to no width. One row (a model that is not trained) is Wilson's.
    """
    mean, n = float(values_SP.mean()), values_SP.shape[1]
    score = wilson(round(mean * n), n)
    if len(values_SP) == 1:
        return Interval(mean, min(mean, score.low), max(mean, score.high))
    found = hierarchical_bootstrap(values_SP, seed).interval
    low, high = min(found.low, score.low), max(found.high, score.high)
    return Interval(mean, max(0.0, low), min(1.0, high))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for their number (Holm 1979, Scand. J. Stat. 6:65).

    adjusted_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), in rising order of p.
    """
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


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


def exact_share(count: int, n: int) -> Interval:
    """Return a share with its exact 95 % limits (Clopper and Pearson 1934, Biometrika 26:404)."""
    assert n > 0 and 0 <= count <= n, f"{count} of {n}"
    limits = binomtest(count, n).proportion_ci(0.95, method="exact")
    return Interval(count / n, float(limits.low), float(limits.high))


def fisher(count_a: int, n_a: int, count_b: int, n_b: int) -> float:
    """Return the two-sided p of Fisher's exact test that two shares are equal."""
    table = [[count_a, n_a - count_a], [count_b, n_b - count_b]]
    return float(fisher_exact(table).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
