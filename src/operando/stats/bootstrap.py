"""Intervals by resampling: of a mean, over clusters, and over seeds and problems at once.

Dims: S seeds (runs of one arm), P problems or prompts, K numbers of one prompt, C clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import t as student

from operando.stats.intervals import Interval, wilson

RESAMPLES = 10_000
CLUSTER_RESAMPLES = 2000
CHUNK = 1000  # resamples computed at once


def bootstrap_mean(values: Sequence[float], seed: int, level: float = 0.95) -> Interval:
    """Return the mean with its percentile bootstrap interval (Efron 1979), 10,000 resamples."""
    assert len(values) > 0, "no values"
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [data[generator.integers(len(data), size=len(data))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(data.mean()), float(low), float(high))


def cluster_bootstrap(
    value_PK: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], np.ndarray],
    alike: Sequence[int],
    seed: int,
) -> Interval:
    """Return a statistic of the mean over prompts, with its 95 % percentile interval.

    Prompts are drawn with replacement (Efron 1979), 2000 times, and those with the same number in
    `alike` together: the same sum about other apples is no new problem. `statistic` maps means
    [b K] to b numbers.
    """
    data_PK = np.asarray(value_PK, dtype=np.float64)
    _, group_P = np.unique(np.asarray(alike), return_inverse=True)
    C = int(group_P.max()) + 1
    sum_CK, size_C = np.zeros((C, data_PK.shape[1])), np.bincount(group_P)
    np.add.at(sum_CK, group_P, data_PK)
    counts_bC = np.random.default_rng(seed).multinomial(C, [1 / C] * C, size=CLUSTER_RESAMPLES)
    drawn_b = statistic(counts_bC @ sum_CK / (counts_bC @ size_C)[:, None])
    low, high = np.quantile(drawn_b, [0.025, 0.975])
    return Interval(float(statistic(data_PK.mean(0, keepdims=True))[0]), float(low), float(high))


class Hierarchical(NamedTuple):
    """What the hierarchical bootstrap says of a mean; `interval` is the one to report."""

    interval: Interval
    p_value: float  # two-sided, of a mean of zero; belongs to `interval`
    percentile: Interval  # the plain percentile limits, too narrow for few seeds
    se: float  # standard error of the mean and its degrees of freedom; 0 where nothing varies
    df: float


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
