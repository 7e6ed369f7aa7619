"""Kendall's W by hand, against Friedman's test, and its chance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import friedmanchisquare

from operando.stats import ranks
from operando.stats.ranks import kendall_w


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_same_order_thrice_by_hand() -> None:
    """W = 1; of the 24 * 24 ways to order the others, one does as well."""
    found = kendall_w(np.array([[1.0, 2, 3, 4], [5, 6, 7, 80], [-4, -3, -2, -1]]), rng())
    assert found == (1.0, 1 / 3, 1 / 576, True)


def test_two_orders_that_are_each_others_reverse() -> None:
    found = kendall_w(np.array([[1.0, 2, 3], [3, 2, 1]]), rng())
    assert found is not None and found.w == 0 and found.p_value == 1


def test_w_is_that_of_friedman_with_ties_too() -> None:
    """chi2 = m (n - 1) W, on values of which some are equal."""
    value_mn = np.array([[3.0, 1, 1, 7, 5], [2, 2, 0, 9, 1], [8, 4, 6, 6, 6], [1, 0, 2, 4, 3]])
    found = kendall_w(value_mn, rng())
    assert found is not None
    assert 4 * 4 * found.w == pytest.approx(friedmanchisquare(*value_mn.T).statistic)
    assert not found.is_exact


def test_counted_out_and_drawn_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    value_mn = np.array([[1.0, 2, 3, 4], [2, 1, 3, 4], [1, 3, 2, 4]])
    exact = kendall_w(value_mn, rng())
    monkeypatch.setattr(ranks, "DRAWS", 575)
    few = kendall_w(value_mn, rng())
    assert exact is not None and few is not None and exact.is_exact and not few.is_exact
    # 575 draws of a share of about 0.06: its standard error is 0.01
    assert few.p_value == pytest.approx(exact.p_value, abs=0.03) and few.p_value != exact.p_value


def test_chance_is_one_over_m_on_average() -> None:
    generator = rng()
    found = [kendall_w(generator.normal(size=(3, 4)), generator) for _ in range(400)]
    kept = [one for one in found if one is not None]
    assert len(kept) == 400
    assert np.mean([one.w for one in kept]) == pytest.approx(1 / 3, abs=0.03)
    assert np.mean([one.p_value <= 0.05 for one in kept]) < 0.08


def test_orders_of_nothing_have_no_agreement() -> None:
    assert kendall_w(np.ones((2, 3)), rng()) is None
