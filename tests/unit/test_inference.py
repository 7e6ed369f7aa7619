"""Inference over seeds and problems, against hand, enumeration, simulation and scipy."""

from __future__ import annotations

from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from scipy.stats import ttest_1samp, ttest_rel

from operando.stats.bootstrap import hierarchical_bootstrap, rate_interval
from operando.stats.intervals import exact_share, wilson
from operando.stats.tests import fisher, holm, paired_t, smallest_difference, tost

# --- pairs ---------------------------------------------------------------------------------------


def test_paired_t_is_scipys() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(0.3, 1, 12), generator.normal(0, 1, 12)
    ours, theirs = paired_t((a - b).tolist()), ttest_rel(a, b)
    limits = theirs.confidence_interval(0.95)
    assert ours.p_value == pytest.approx(theirs.pvalue) and ours.df == 11
    assert ours.difference == pytest.approx((np.mean(a - b), limits.low, limits.high))


def test_there_is_no_p_where_nothing_varies() -> None:
    """Runs that are alike to the last answer were not two draws of anything."""
    assert paired_t([0.0, 0.0]).p_value is None and paired_t([0.5, 0.5, 0.5]).p_value is None
    assert tost([0.1, 0.1], 0.05).p_value is None and tost([0.0, 0.0], 0.05).p_value is None


# --- the hierarchical bootstrap ------------------------------------------------------------------


def test_the_bootstrap_is_the_enumeration_of_all_resamples() -> None:
    values_SP = np.array([[0.0, 1.0, 0.0], [1.0, 1.0, 0.5]])
    every = [
        values_SP[np.ix_(seeds, problems)].mean()
        for seeds in product(range(2), repeat=2)
        for problems in product(range(3), repeat=3)
    ]
    found = hierarchical_bootstrap(values_SP, seed=1, resamples=60_000)
    assert found.percentile.low == pytest.approx(np.quantile(every, 0.025), abs=1e-9)
    assert found.percentile.high == pytest.approx(np.quantile(every, 0.975), abs=1e-9)
    # by hand: seed means 1/3 and 5/6, variance 1/8; problem means 1/2, 1, 1/4, variance 7/48
    v_s, v_p = (1 / 8) / 2, (7 / 48) / 3
    df = (v_s + v_p) ** 2 / (v_s**2 / 1 + v_p**2 / 2)
    half = student.ppf(0.975, df) * sqrt(np.var(every) + v_s / 2 + v_p / 3)
    assert found.interval.value == pytest.approx(7 / 12)
    # the limits are cut at -1 and 1, so the check is on the p-value: 2 P(T > mean / se)
    assert half > 1 and found.interval[1:] == (pytest.approx(7 / 12 - half, abs=0.02), 1.0)
    se = half / student.ppf(0.975, df)
    assert found.p_value == pytest.approx(2 * student.sf(7 / 12 / se, df), rel=0.02)


@given(st.lists(st.lists(st.integers(-4, 4), min_size=4, max_size=4), min_size=2, max_size=5))
def test_swapping_the_arms_mirrors_the_interval(quarters: list[list[int]]) -> None:
    values_SP = np.array(quarters) / 4
    one = hierarchical_bootstrap(values_SP, seed=3, resamples=200)
    other = hierarchical_bootstrap(-values_SP, seed=3, resamples=200)
    assert other.interval.low == pytest.approx(-one.interval.high)
    assert other.p_value == pytest.approx(one.p_value)
    assert one.interval.low <= one.interval.value <= one.interval.high


def test_what_all_arms_share_cancels_out() -> None:
    """Hard and easy problems widen both arms' intervals, but not that of their difference."""
    generator = np.random.default_rng(0)
    hardness_P = generator.uniform(0, 0.8, 200)
    noise_SP = generator.normal(0, 0.01, (5, 200))
    arm_SP, control_SP = hardness_P + 0.1 + noise_SP, np.tile(hardness_P, (5, 1))
    alone = hierarchical_bootstrap(arm_SP, seed=0).interval
    paired = hierarchical_bootstrap(arm_SP - control_SP, seed=0).interval
    assert paired.low > 0.095 and paired.high < 0.105
    assert alone.high - alone.low > 10 * (paired.high - paired.low)


def test_three_seeds_are_covered_where_plain_percentiles_fall_short() -> None:
    generator = np.random.default_rng(0)
    inside = plain = 0
    for seed in range(300):
        seeds_S1 = generator.normal(0, 0.1, (3, 1))
        problems_1P = generator.normal(0, 0.1, (1, 50))
        values_SP = seeds_S1 + problems_1P + generator.normal(0, 0.2, (3, 50))
        found = hierarchical_bootstrap(values_SP, seed, resamples=300)
        inside += found.interval.low <= 0 <= found.interval.high
        plain += found.percentile.low <= 0 <= found.percentile.high
    assert inside / 300 > 0.92
    assert plain / 300 < 0.88


def test_values_that_are_all_equal_still_leave_doubt() -> None:
    found = hierarchical_bootstrap(np.zeros((3, 100)), seed=0)
    # no problem of 100 differs: the share that do may be 1 - 0.025^(1/100)
    assert found.interval == pytest.approx((0, -0.03622, 0.03622), abs=1e-5)
    assert found.p_value == 1.0
    assert hierarchical_bootstrap(np.ones((2, 5)), seed=0).p_value == pytest.approx(2 / 32)


def test_a_rate_is_never_narrower_than_its_problems_allow() -> None:
    assert rate_interval(np.zeros((3, 50)), 0).high == pytest.approx(
        max(wilson(0, 50).high, 1 - 0.025 ** (1 / 50))
    )
    one_row = np.array([[1.0] * 12 + [0.0] * 28])
    assert rate_interval(one_row, 0) == wilson(12, 40)
    spread_SP = np.repeat(np.array([[0.1], [0.5], [0.9]]), 40, axis=1)
    assert rate_interval(spread_SP, 0)[1:] == (0.0, 1.0), "three such seeds say next to nothing"


# --- many arms, equivalence, sizes, counts -------------------------------------------------------


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=6))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p: dict[str, float]) -> None:
    adjusted = holm(p)
    for a in p:
        assert p[a] <= adjusted[a] <= min(1.0, len(p) * p[a])
        assert all(adjusted[a] <= adjusted[b] for b in p if p[a] < p[b])


def test_tost_is_two_one_sided_t_tests() -> None:
    values = [0.01, -0.02, 0.03, 0.0, 0.015]
    lower = ttest_1samp(values, -0.05, alternative="greater").pvalue
    upper = ttest_1samp(values, 0.05, alternative="less").pvalue
    assert tost(values, 0.05).p_value == pytest.approx(max(lower, upper))
    assert tost(values, 0.05).p_value < 0.05 < tost(values, 0.02).p_value


def test_a_difference_that_is_not_significant_need_not_be_equivalent() -> None:
    values = [0.2, -0.2, 0.1]
    assert paired_t(values).p_value > 0.05 and tost(values, 0.05).p_value > 0.05


@pytest.mark.parametrize(("n", "seen"), [(3, 0.338), (5, 0.223), (8, 0.166), (10, 0.146)])
def test_what_two_arms_of_so_many_runs_can_see(n: int, seen: float) -> None:
    """Cohen's tables for two samples: the error is then sd sqrt(2/n) on 2n - 2 degrees."""
    assert smallest_difference(0.11 * sqrt(2 / n), 2 * n - 2) == pytest.approx(seen, abs=5e-4)


def test_the_smallest_difference_is_seen_four_times_in_five() -> None:
    generator = np.random.default_rng(0)
    shift = smallest_difference(1.0 / sqrt(4), 3)
    seen = ttest_1samp(generator.normal(shift, 1, (4, 4000)), 0.0).pvalue < 0.05
    assert np.mean(seen) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(("seeds", "least", "most"), [(2, 0.08, 0.15), (3, 0.03, 0.08)])
def test_how_often_a_difference_is_found_where_there_is_none(
    seeds: int, least: float, most: float
) -> None:
    """What `TWO_SEEDS` says: 600 studies without an effect, runs that differ by 10 points."""
    generator, found = np.random.default_rng(seeds), 0
    for _ in range(600):
        skill = generator.normal(0.0, 1.0, 100)  # of problems, shared by both arms
        chance = 1 / (1 + np.exp(-(skill + generator.normal(0, 0.6, (2, seeds, 1)))))
        right = (generator.random((2, seeds, 100)) < chance).astype(float)
        found += hierarchical_bootstrap(right[0] - right[1], 0, resamples=200).p_value < 0.05
    assert least < found / 600 < most, found / 600


def test_fisher_is_the_enumeration_of_tables() -> None:
    assert fisher(3, 3, 0, 3) == pytest.approx(0.1), "three seeds can't reach 5 %"
    assert fisher(4, 4, 0, 4) == pytest.approx(2 / 70)
    chances = [comb(6, k) * comb(8, 5 - k) / comb(14, 5) for k in range(6)]
    expected = sum(c for c in chances if c <= chances[4] + 1e-12)
    assert fisher(4, 6, 1, 8) == pytest.approx(expected)


def test_exact_share_of_no_run_of_three() -> None:
    assert exact_share(0, 3) == pytest.approx((0, 0, 1 - 0.025 ** (1 / 3)))
