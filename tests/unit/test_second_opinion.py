"""The statistics beside statsmodels', which nobody here wrote, on data drawn at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_paired

from operando.stats.intervals import exact_share, paired_difference, t_interval, wilson
from operando.stats.null_arms import drift_against_null
from operando.stats.tests import benjamini_hochberg, holm, paired_t, smallest_difference, tost

counts = st.integers(0, 40)
seeds = st.integers(0, 10**6)
close = {"rel": 1e-9, "abs": 1e-12}


def drawn(seed: int, n: int) -> list[float]:
    generator = np.random.default_rng(seed)
    return generator.normal(generator.normal(0, 0.5), generator.uniform(0.1, 2), n).tolist()


@given(counts, st.integers(1, 40), st.sampled_from([0.9, 0.95, 0.99]))
def test_intervals_of_a_share(right: int, wrong: int, level: float) -> None:
    n = right + wrong
    theirs = proportion_confint(right, n, 1 - level, method="wilson")
    assert wilson(right, n, level)[1:] == pytest.approx(theirs, **close)
    theirs = proportion_confint(right, n, 0.05, method="beta")
    assert exact_share(right, n)[1:] == pytest.approx(theirs, **close)


@given(counts, counts, counts, st.integers(1, 40))
def test_mcnemars_exact_test(both: int, lost: int, gained: int, neither: int) -> None:
    before = [True] * (both + lost) + [False] * (gained + neither)
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    theirs = mcnemar([[both, lost], [gained, neither]], exact=True)
    assert paired_difference(before, after).p_value == pytest.approx(float(theirs.pvalue), **close)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_newcombes_interval_where_the_pairs_are_not_correlated(
    a: int, b: int, c: int, d: int
) -> None:
    """Counts a*c, a*d, b*c, b*d have phi = 0: method 10 is then that of independent shares."""
    both, lost, gained, neither = a * c, a * d, b * c, b * d
    before = [True] * (both + lost) + [False] * (gained + neither)
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    n = len(before)
    theirs = confint_proportions_2indep(sum(after), n, sum(before), n, method="newcomb")
    assert paired_difference(before, after).difference[1:] == pytest.approx(theirs, **close)


@settings(max_examples=25)  # a tenth of a second each, in statsmodels
@given(seeds, st.integers(1, 12), st.integers(1, 4))
def test_adjusted_p_values(seed: int, num: int, digits: int) -> None:
    p_values = np.random.default_rng(seed).uniform(0, 1, num).round(digits).tolist()  # with ties
    named = {str(place): p for place, p in enumerate(p_values)}
    theirs = multipletests(p_values, method="holm")[1]
    assert list(holm(named).values()) == pytest.approx(theirs.tolist(), **close)
    theirs = multipletests(p_values, method="fdr_bh")[1]
    assert benjamini_hochberg(np.array(p_values)).tolist() == pytest.approx(
        theirs.tolist(), **close
    )


@given(seeds, st.integers(2, 20), st.floats(0.01, 2))
def test_students_interval_and_tests_of_pairs(seed: int, n: int, margin: float) -> None:
    differences = drawn(seed, n)
    theirs = DescrStatsW(differences)
    assert t_interval(differences)[1:] == pytest.approx(theirs.tconfint_mean(0.05), **close)
    assert paired_t(differences).p_value == pytest.approx(theirs.ttest_mean(0)[1], **close)
    wanted = ttost_paired(np.array(differences), np.zeros(n), -margin, margin)[0]
    assert tost(differences, margin).p_value == pytest.approx(wanted, **close)


@given(seeds, st.integers(2, 8), st.integers(2, 8))
def test_welchs_interval_and_test_of_two_arms(seed: int, num_real: int, num_null: int) -> None:
    real, null = drawn(seed, num_real), drawn(seed + 1, num_null)
    double = torch.float64
    found = drift_against_null(
        torch.tensor(real, dtype=double)[:, None], torch.tensor(null, dtype=double)[:, None], False
    )
    theirs = CompareMeans(DescrStatsW(real), DescrStatsW(null))
    low, high = theirs.tconfint_diff(0.05, usevar="unequal")
    assert float(found.excess.low) == pytest.approx(low, **close)
    assert float(found.excess.high) == pytest.approx(high, **close)
    p_larger = theirs.ttest_ind(alternative="larger", usevar="unequal")[1]
    assert float(found.p_t) == pytest.approx(p_larger, **close)


@given(st.floats(0.01, 5), st.integers(5, 40), st.sampled_from([0.5, 0.8, 0.95]))
def test_the_difference_that_is_seen_has_the_power_asked_for(
    se: float, df: int, power: float
) -> None:
    """Noncentrality is effect * sqrt(n); under 5 df scipy's noncentral t, theirs, may be NaN."""
    seen = smallest_difference(se, df, power) / se
    theirs = TTestPower().power(seen / np.sqrt(df + 1), df + 1, 0.05, df=df)
    assert theirs == pytest.approx(power, abs=1e-3)
