"""Null arms: tests equal to SciPy and to slow loops, p uniform under the null, planted truths."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control, kstest, ttest_ind, ttest_rel
from torch import Tensor
from torch.testing import assert_close

from operando.drift.measures import cosine_by_index, pairwise_similarity
from operando.errors import UserError
from operando.stats.null_arms import assignments, classify, drift_against_null, separation
from operando.stats.tests import benjamini_hochberg


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_benjamini_hochberg_by_hand_and_as_scipy() -> None:
    p_K = torch.tensor([0.01, 0.04, 0.03, 0.5], dtype=torch.float64)
    hand = torch.tensor([0.04, 0.16 / 3, 0.16 / 3, 0.5], dtype=torch.float64)
    found = torch.from_numpy(benjamini_hochberg(p_K.numpy()))
    assert_close(found, hand)
    p_K = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
    found = torch.from_numpy(benjamini_hochberg(p_K.numpy()))
    assert_close(found, torch.from_numpy(false_discovery_control(p_K.numpy())))
    assert benjamini_hochberg(np.zeros(0)).shape == (0,)


def test_every_assignment_once_the_observed_first() -> None:
    masks = assignments(3, 3, paired=False)
    assert masks.shape == (20, 6) and masks[0].tolist() == [True] * 3 + [False] * 3
    assert len({tuple(m) for m in masks.tolist()}) == 20
    paired = assignments(3, 3, paired=True)
    assert paired.shape == (8, 6) and (paired[:, :3] ^ paired[:, 3:]).all()
    assert paired[0].equal(masks[0])
    with pytest.raises(UserError, match="Give fewer chains"):
        assignments(12, 12, paired=False)


def test_excess_and_p_are_scipys() -> None:
    real, null = normal(4, 2, 3, seed=0) + 1, 2 * normal(5, 2, 3, seed=1)
    ours = drift_against_null(real, null, paired=False)
    welch = ttest_ind(real.numpy(), null.numpy(), equal_var=False, alternative="greater")
    assert_close(ours.p_t, torch.from_numpy(welch.pvalue))
    limits = ttest_ind(real.numpy(), null.numpy(), equal_var=False).confidence_interval(0.95)
    assert_close(ours.excess.low, torch.from_numpy(limits.low))
    assert_close(ours.excess.high, torch.from_numpy(limits.high))
    paired = drift_against_null(real, null[:4], paired=True)
    related = ttest_rel(real.numpy(), null[:4].numpy(), alternative="greater")
    assert_close(paired.p_t, torch.from_numpy(related.pvalue))


def test_permutation_p_by_a_slow_loop() -> None:
    real, null = normal(3, 5, seed=2) + 0.5, normal(4, 5, seed=3)
    ours = drift_against_null(real, null, paired=False)
    pooled = np.concatenate([real.numpy(), null.numpy()])
    for c in range(5):
        observed = pooled[:3, c].mean() - pooled[3:, c].mean()
        rest = [
            pooled[list(chosen), c].mean() - np.delete(pooled[:, c], list(chosen)).mean()
            for chosen in combinations(range(7), 3)
        ]
        slow = np.mean([x >= observed - 1e-9 for x in rest])
        assert float(ours.p_permutation[c]) == pytest.approx(float(slow))
    assert ours.p_floor == pytest.approx(1 / 35)
    far = drift_against_null(real + 9, null, paired=False)
    assert_close(far.p_permutation, torch.full((5,), 1 / 35, dtype=torch.float64))


def test_equal_arms_are_ties_in_every_assignment() -> None:
    real = 2e-4 * normal(3, 50, seed=12).abs()
    found = drift_against_null(real, real.clone(), paired=True)
    assert (found.p_permutation == 1).all() and (found.p_t == 1).all()


def test_ties_count_in_spite_of_rounding() -> None:
    whole = torch.randint(0, 4, (7, 200), generator=torch.Generator().manual_seed(4))
    real, null = whole[:3].double() / 10, whole[3:].double() / 10
    ours = drift_against_null(real, null, paired=False).p_permutation
    sums = torch.stack([whole[list(chosen)].sum(0) for chosen in combinations(range(7), 3)])
    assert_close(ours, (sums >= whole[:3].sum(0)).double().mean(0))


def test_share_by_hand_and_its_interval_covers() -> None:
    real, null = 10 + normal(3, 4000, seed=4), 9 + normal(3, 4000, seed=5)
    ours = drift_against_null(real, null, paired=False)
    assert_close(ours.share.value, null.mean(0) / real.mean(0))
    covered = (ours.share.low <= 0.9) & (ours.share.high >= 0.9)
    assert 0.94 < float(covered.double().mean()) < 0.98
    paired = drift_against_null(real, null + real - 10, paired=True)
    covered = (paired.share.low <= 0.9) & (paired.share.high >= 0.9)
    assert 0.94 < float(covered.double().mean()) < 0.96


def test_a_real_drift_that_may_be_zero_has_no_bounded_share() -> None:
    ours = drift_against_null(
        torch.tensor([0.1, -0.1, 0.2]), torch.tensor([0.1, 0.2, 0.15]), paired=False
    )
    assert float(ours.share.low) == -np.inf and float(ours.share.high) == np.inf


def test_null_against_null_gives_uniform_p() -> None:
    real, null = normal(6, 600, seed=6), normal(6, 600, seed=7)
    ours = drift_against_null(real, null, paired=False)
    assert kstest(ours.p_permutation.numpy(), "uniform").pvalue > 0.05
    assert kstest(ours.p_t.numpy(), "uniform").pvalue > 0.05
    # 3 + 3 chains, the usual number: few distinct values, never too many small ones
    few = drift_against_null(real[:3], null[:3], paired=False)
    assert kstest(few.p_t.numpy(), "uniform").pvalue > 0.05
    for a in (0.05, 0.1, 0.2, 0.5):
        assert float((few.p_permutation <= a + 1e-9).double().mean()) < a + 0.03


def test_an_identity_pair_has_no_excess_and_no_specific_features() -> None:
    real, null = 0.1 + 0.01 * normal(3, 1000, seed=8), 0.1 + 0.01 * normal(3, 1000, seed=9)
    ours = drift_against_null(real, null, paired=False)
    covers = (ours.excess.low <= 0) & (ours.excess.high >= 0)
    assert 0.93 < float(covers.double().mean()) < 0.98
    assert abs(float(ours.excess.value.mean())) < 1e-3
    assert int((ours.q_t <= 0.05).sum()) == 0
    still = drift_against_null(torch.zeros(3, 4), torch.zeros(3, 4), paired=False)
    assert still.excess.value.abs().max() == 0 and still.p_t.min() == 1
    assert still.p_permutation.min() == 1


def chain_drift(
    base_MD: Tensor, turned: slice, angle: float, chains: int, generator: torch.Generator
) -> Tensor:
    """Return the drift of each feature: refitting noise, and some features turned by an angle."""
    towards_MD = torch.randn(base_MD.shape, generator=generator, dtype=torch.float64)
    towards_MD -= (towards_MD * base_MD).sum(1, keepdim=True) * base_MD
    towards_MD /= towards_MD.norm(dim=1, keepdim=True)
    target_MD = base_MD.clone()
    target_MD[turned] = np.cos(angle) * base_MD[turned] + np.sin(angle) * towards_MD[turned]
    rows = []
    for _ in range(chains):
        noise_MD = torch.randn(base_MD.shape, generator=generator, dtype=torch.float64)
        rows.append(1 - cosine_by_index(base_MD, target_MD + 0.08 * noise_MD, None))
    return torch.stack(rows)


def test_planted_rotation_is_found_and_the_fdr_is_held() -> None:
    generator = torch.Generator().manual_seed(10)
    false_share, power = [], []
    for _ in range(40):
        base_MD = torch.randn(200, 24, generator=generator, dtype=torch.float64)
        base_MD /= base_MD.norm(dim=1, keepdim=True)
        real = chain_drift(base_MD, slice(0, 20), 1.0, 4, generator)
        null = chain_drift(base_MD, slice(0, 0), 0.0, 4, generator)
        found_M = drift_against_null(real, null, paired=False).q_t <= 0.1
        false_share.append(float(found_M[20:].sum()) / max(int(found_M.sum()), 1))
        power.append(float(found_M[:20].double().mean()))
    assert np.mean(false_share) <= 0.1 + 0.02, np.mean(false_share)
    assert np.mean(power) > 0.9, np.mean(power)


def test_separation_of_planted_arms_by_hand() -> None:
    same = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1.0]])
    ours = separation(same, num_real=2, paired=False)
    # within 1, across 0; of 6 assignments the observed one and its mirror reach that
    assert ours == pytest.approx((1.0, 2 / 6, 2 / 6, True))
    shift = torch.zeros(6, 1, 8)
    shift[:3] = 0.4
    W_RMD = (
        torch.ones(6, 10, 8) + shift * normal(1, 10, 8, seed=1) + 0.05 * normal(6, 10, 8, seed=2)
    )
    apart = separation(pairwise_similarity(W_RMD.float()), num_real=3, paired=False)
    assert apart.complete and apart.p_value == pytest.approx(0.1) and apart.p_floor == 0.1


def test_separation_of_two_null_arms_gives_uniform_p() -> None:
    p_values = []
    for i in range(250):
        W_RMD = normal(10, 4, 5, seed=i)
        p_values.append(separation(pairwise_similarity(W_RMD), 5, paired=False).p_value)
    assert kstest(p_values, "uniform").pvalue > 0.05


def arms(excess: Tensor, seed: int, chains: int = 3) -> tuple[Tensor, Tensor]:
    real = 0.2 + excess + 0.01 * normal(chains, *excess.shape, seed=seed)
    return real, 0.2 + 0.01 * normal(chains, *excess.shape, seed=seed + 1)


def test_three_chains_are_classified() -> None:
    #                structural, reward, KL, both, nothing
    flexible = arms(torch.tensor([0.3, 0.3, 0.3, 0.3, 0.0]), seed=20)
    strict = arms(torch.tensor([0.3, 0.0, 0.3, 0.0, 0.0]), seed=22)
    kl = arms(torch.tensor([0.3, 0.3, 0.0, 0.0, 0.0]), seed=24)
    assert classify(flexible, strict, kl).verdict == [
        "structural",
        "reward-driven",
        "KL-driven",
        "reward- and KL-driven",
        "undecided",
    ]


def test_a_verdict_needs_all_its_evidence() -> None:
    high, low = torch.tensor([0.3]), torch.tensor([-0.3])
    noise = 0.5 * normal(3, 1, seed=61)
    unsure = (arms(high, 26)[0] + noise, arms(high, 26)[1])
    # chain C could be anything: neither in all chains, nor different
    assert classify(arms(high, 20), arms(high, 22), unsure).verdict == ["undecided"]
    assert classify(arms(high, 20), unsure, arms(high, 24)).verdict == ["undecided"]
    # A and B differ, but neither drifts more than its nulls
    zero = torch.zeros(1)
    assert classify(arms(zero, 20), arms(low, 22), arms(zero, 24)).verdict == ["undecided"]
    assert classify(arms(zero, 20), arms(zero, 22), arms(low, 24)).verdict == ["undecided"]


def test_null_chains_are_undecided_and_so_are_noisy_ones() -> None:
    zero = torch.zeros(300)
    verdict = classify(arms(zero, 30), arms(zero, 32), arms(zero, 34)).verdict
    assert verdict.count("undecided") >= 299
    weak = torch.full((1,), 0.01)  # one standard deviation of a seed
    assert classify(arms(weak, 36), arms(weak, 38), arms(weak, 40)).verdict == ["undecided"]


def test_one_chain_copies_and_nan_are_refused() -> None:
    good = normal(3, 4, seed=50)
    with pytest.raises(UserError, match="null arm has 1 chain"):
        drift_against_null(good, good[:1], paired=False)
    with pytest.raises(UserError, match="Chains 0 and 2 of the real arm hold the same numbers"):
        drift_against_null(good[[0, 1, 0]], good, paired=False)
    with pytest.raises(UserError, match="NaN"):
        drift_against_null(good, good * torch.nan, paired=False)
    with pytest.raises(UserError, match="can not be paired"):
        drift_against_null(good, good[:2], paired=True)
