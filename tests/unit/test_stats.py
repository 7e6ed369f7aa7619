import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from operando.stats.bootstrap import bootstrap_mean
from operando.stats.intervals import paired_difference, wilson


def paired(both: int, lost: int, gained: int, neither: int):
    before = [True] * (both + lost) + [False] * (gained + neither)
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return paired_difference(before, after)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 7), (81, 263), (150, 300)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_wilson_is_scipys(successes, n, level):
    ours = wilson(successes, n, level)
    theirs = binomtest(successes, n).proportion_ci(level, method="wilson")
    assert ours.value == successes / n
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


def test_wilson_published_example():
    # Newcombe 1998, Stat. Med. 17:857, table I: 81 of 263, method 3
    ours = wilson(81, 263)
    assert (round(ours.low, 4), round(ours.high, 4)) == (0.2553, 0.3662)


def test_wilson_rejects_impossible_counts():
    with pytest.raises(AssertionError, match="5 successes of 4"):
        wilson(5, 4)


def test_paired_difference_published_example():
    # Newcombe 1998, Stat. Med. 17:2635, 36 both, 12 and 2 changed, 0 neither: method 10
    found = paired(both=36, lost=2, gained=12, neither=0)
    assert found.difference.value == pytest.approx(0.2)
    assert round(found.difference.low, 4) == 0.0569
    assert round(found.difference.high, 4) == 0.3404
    # 2 * (C(14,0) + C(14,1) + C(14,2)) / 2^14 = 2 * 106 / 16384
    assert found.p_value == pytest.approx(212 / 16384)
    assert (found.gained, found.lost, found.n) == (12, 2, 50)


def test_paired_difference_by_a_second_hand():
    # 20 both, 3 lost, 11 gained, 16 neither; written out apart from the library
    z, n = 1.959963984540054, 50

    def limits(k):
        p = k / n
        root = z * math.sqrt(z * z + 4 * k * (1 - p))
        return (2 * k + z * z - root) / (2 * (n + z * z)), (2 * k + z * z + root) / (
            2 * (n + z * z)
        )

    (l2, u2), (l3, u3) = limits(31), limits(23)
    phi = (20 * 16 - 11 * 3 - 25) / math.sqrt(31 * 19 * 23 * 27)
    a, b, c, d = 31 / n - l2, u3 - 23 / n, u2 - 31 / n, 23 / n - l3
    found = paired(both=20, lost=3, gained=11, neither=16).difference
    assert found.low == pytest.approx(0.16 - math.sqrt(a * a - 2 * phi * a * b + b * b))
    assert found.high == pytest.approx(0.16 + math.sqrt(c * c - 2 * phi * c * d + d * d))


def test_paired_difference_without_change():
    found = paired(both=4, lost=0, gained=0, neither=6)
    assert found.p_value == 1.0
    assert found.difference.value == 0
    assert found.difference.low <= 0 <= found.difference.high


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60),
    st.randoms(use_true_random=False),
)
def test_paired_difference_properties(pairs, random):
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    found, swapped = paired_difference(before, after), paired_difference(after, before)
    assert -1 <= found.difference.low <= found.difference.value <= found.difference.high <= 1
    assert swapped.difference.low == pytest.approx(-found.difference.high)
    assert swapped.p_value == pytest.approx(found.p_value)
    random.shuffle(pairs)
    again = paired_difference([b for b, _ in pairs], [a for _, a in pairs])
    assert again == found


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(AssertionError, match="1 problems before, 2 after"):
        paired_difference([True], [True, False])


def test_bootstrap_mean_is_near_the_normal_interval():
    values = [float(i % 10) for i in range(400)]
    ours = bootstrap_mean(values, seed=0)
    half = 1.96 * math.sqrt(8.25 / 400)
    assert ours.value == pytest.approx(4.5)
    assert ours.low == pytest.approx(4.5 - half, abs=0.02)
    assert ours.high == pytest.approx(4.5 + half, abs=0.02)
    assert bootstrap_mean(values, seed=0) == ours
    assert bootstrap_mean(values, seed=1) != ours


def test_bootstrap_mean_of_equal_values_has_no_width():
    assert bootstrap_mean([2.0, 2.0, 2.0], seed=0) == (2.0, 2.0, 2.0)
