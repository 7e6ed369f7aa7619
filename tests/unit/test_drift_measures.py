"""Measures of two SAEs: values by hand, sae_rl's numbers, planted permutations and births."""

import math

import pytest
import torch
from scipy.stats import binomtest
from torch.testing import assert_close

from operando.drift.measures import (
    QUADRANTS,
    Usage,
    best_match,
    cosine_by_index,
    counting_p,
    decoupling,
    density,
    drift,
    effective_count,
    entropy_bits,
    lifecycle,
    pairwise_similarity,
    published_lifecycle,
    quadrants,
    summarise,
    usage,
)

A_MD = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
B_MD = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
HALF = math.sqrt(0.5)
IDX_NK = torch.tensor([[0, 1], [0, 2], [3, 0], [1, 3]])
VALUE_NK = torch.tensor([[2.0, 1.0], [1.0, 3.0], [0.0, -1.0], [0.0, 0.0]])


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cosine_and_drift_by_hand() -> None:
    cosine_M = cosine_by_index(A_MD, B_MD, None)
    assert_close(cosine_M, f64(1.0, HALF, -1.0))
    assert drift(cosine_M) == pytest.approx(1 - HALF / 3)


def test_a_resampled_feature_leaves_every_measure() -> None:
    cosine_M = cosine_by_index(A_MD, B_MD, torch.tensor([False, False, True]))
    assert cosine_M.isnan().tolist() == [False, False, True]
    assert drift(cosine_M) == pytest.approx(1 - (1 + HALF) / 2)
    assert summarise(cosine_M).min == pytest.approx(HALF)
    assert quadrants(cosine_M, f64(1.0, 0.0, 0.5)).tolist()[2] == -1
    assert decoupling(cosine_M, f64(1.0, 0.0, -99.0)) == pytest.approx(1.0)


def test_summary_by_hand() -> None:
    row = summarise(f64(0.1, 0.4, 0.2, 0.3))
    assert row == pytest.approx((0.25, 0.25, 0.175, 0.325, 0.1))


def test_decoupling_by_hand_and_undefined_for_an_identity_pair() -> None:
    # centred: (-1, 0, 1) and (-1, 1, 0); sum of products 1, norms sqrt 2
    assert decoupling(f64(1, 2, 3), f64(0, 2, 1)) == pytest.approx(0.5)
    W_MD = normal(50, 7)
    cosine_M = cosine_by_index(W_MD, W_MD.clone(), None)
    assert math.isnan(decoupling(cosine_M, cosine_M))
    assert drift(cosine_M) == pytest.approx(0.0, abs=1e-12)


def test_quadrants_by_hand() -> None:
    place_M = quadrants(f64(0.9, 0.8, 0.2, 0.1), f64(0.9, 0.1, 0.8, 0.2))
    named = [QUADRANTS[i] for i in place_M]
    assert named == ["stable", "reweighted", "redirected", "rotated"]
    # of an odd number the median itself is high
    place_M = quadrants(f64(0.1, 0.5, 0.9), f64(0.9, 0.5, 0.1))
    assert [QUADRANTS[i] for i in place_M] == ["redirected", "stable", "reweighted"]


def test_usage_by_hand() -> None:
    used = usage(IDX_NK, VALUE_NK, num_features=4)
    assert used.count_M.tolist() == [2, 1, 1, 0]  # above 0 only: neither -1 nor a filler
    assert used.energy_M.tolist() == [4 + 1 + 1, 1, 9, 0]
    assert_close(density(used), f64(0.5, 0.25, 0.25, 0.0))
    assert used.num_tokens == 4


def test_effective_counts_by_hand() -> None:
    used = usage(IDX_NK, VALUE_NK, num_features=4)
    assert effective_count(used, "frequency") == pytest.approx(2**1.5)  # p = 1/2, 1/4, 1/4
    p = [6 / 16, 1 / 16, 9 / 16]
    H = -sum(x * math.log2(x) for x in p)
    assert effective_count(used, "energy") == pytest.approx(2**H)


def test_effective_count_is_in_the_published_unit() -> None:
    # L23 flexible, K = 256: H 12.5186 -> 12.1049 bits is the reported 5867.7 -> 4404.8
    for bits, count in ((12.5186, 5867.7), (12.1049, 4404.8)):
        assert 2**bits == pytest.approx(count, rel=5e-5)
    even = Usage(torch.full((5868,), 3), torch.ones(5868).double(), num_tokens=10_000)
    assert effective_count(even, "frequency") == pytest.approx(5868)
    assert entropy_bits(even.energy_M) == pytest.approx(math.log2(5868))


def test_published_lifecycle_by_hand() -> None:
    a, b = f64(0.0, 1e-4, 2e-4, 2e-4), f64(2e-4, 1.1e-4, 1e-4, 3e-4)
    life = published_lifecycle(a, b)
    assert life.alive_a.tolist() == [False, False, True, True]  # at the threshold is not alive
    assert life.born.tolist() == [True, True, False, False]
    assert life.died.tolist() == [False, False, True, False]


def test_counting_p_is_the_exact_binomial_test() -> None:
    a, b = torch.tensor([0, 5, 3, 20]), torch.tensor([10, 5, 9, 2])
    slow = [binomtest(int(y), int(x + y), 0.5).pvalue for x, y in zip(a, b, strict=True)]
    assert_close(counting_p(a, b), torch.tensor(slow, dtype=torch.float64))
    assert float(counting_p(a, b)[0]) == pytest.approx(2 / 1024)


def test_counting_noise_makes_births_for_sae_rl_and_none_here() -> None:
    generator = torch.Generator().manual_seed(1)
    rate_M = torch.full((2, 3000), 4.5)
    rate_M[0, :20], rate_M[1, :20] = 0.0, 60.0  # planted births
    rate_M[0, 20:40], rate_M[1, 20:40] = 60.0, 0.0  # planted deaths
    rate_M[0, 40:50], rate_M[1, 40:50] = 0.0, 60.0  # resampled, so no births
    count_SM = torch.poisson(rate_M, generator=generator).long()
    N = 44_574
    resampled_SM = torch.zeros(2, 3000, dtype=torch.bool)
    resampled_SM[1, 40:50] = True
    seed = published_lifecycle(count_SM[0] / N, count_SM[1] / N)
    assert int(seed.born[50:].sum()) > 500 and bool(seed.born[40:50].all())
    life = lifecycle(count_SM, N, resampled_SM)
    assert bool(life.born[0, :20].all()) and bool(life.died[0, 20:40].all())
    assert not bool(life.born[0, 20:].any()) and not bool(life.died[0, 40:].any())
    assert bool(life.alive[1, 40:50].all()) and bool(life.q[0, 40:50].isnan().all())


def test_hysteresis_waits_for_a_plain_change() -> None:
    N = 100_000  # low = 5 firings, high = 20
    count_MS = torch.tensor(
        [[0, 9, 15, 40, 9], [8, 12, 8, 12, 8], [40, 12, 40, 1, 40], [0, 12, 15, 21, 18]]
    )
    count_SM = count_MS.T
    life = lifecycle(count_SM, N, torch.zeros(5, 4, dtype=torch.bool))
    assert life.alive.T.tolist() == [
        [False, False, False, True, True],  # a slow birth is counted once, and 9 is no death
        [False] * 5,  # around sae_rl's threshold of 10: nothing
        [True, True, True, False, True],
        [False, False, False, True, True],  # 21 is not much beside 15, but it is beside 0
    ]
    assert life.born.sum(0).tolist() == [1, 0, 1, 1] and life.died.sum(0).tolist() == [0, 0, 1, 0]
    lone = lifecycle(count_SM[:1], N, torch.zeros(1, 4, dtype=torch.bool))
    assert lone.born.shape == (0, 4) and lone.alive.shape == (1, 4)


def test_best_match_restores_a_permuted_index() -> None:
    W_MD = normal(40, 12)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    shuffled_MD = torch.empty_like(W_MD)
    shuffled_MD[order] = 3 * W_MD
    match = best_match(W_MD, shuffled_MD, chunk=7)
    assert match.index_M.equal(order)
    assert_close(match.cosine_M, torch.ones(40).double(), atol=1e-6, rtol=0)
    by_index_M = cosine_by_index(W_MD, shuffled_MD, None)
    assert_close(match.gap_M, match.cosine_M - by_index_M, atol=1e-6, rtol=0)
    assert best_match(W_MD, W_MD).gap_M.abs().max() < 1e-6


def test_pairwise_similarity_is_the_mean_cosine_of_two_chains() -> None:
    W_RMD = normal(3, 6, 4)
    matrix = pairwise_similarity(W_RMD)
    for r in range(3):
        for s in range(3):
            slow = float(cosine_by_index(W_RMD[r], W_RMD[s], None).mean())
            assert float(matrix[r, s]) == pytest.approx(slow)
