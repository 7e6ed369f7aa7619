"""Discovery finds planted features and their signs, and nothing where there is nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from operando.discovery.probe import logistic_probe, mean_difference
from operando.errors import UserError
from operando.stats import contrast as ct


def planted(seed: int, *, effect: float, M: int = 400, prompts: int = 40, each: int = 8):
    """Return features, labels and prompts; feature 7 helps and feature 11 harms by `effect`."""
    rng = np.random.default_rng(seed)
    prompt_R = torch.arange(prompts).repeat_interleave(each)
    correct_R = torch.from_numpy(rng.random(prompts * each) < 0.5)
    x_RM = torch.from_numpy(rng.exponential(size=(prompts * each, M))).float()
    x_RM[torch.from_numpy(rng.random(x_RM.shape) < 0.6)] = 0
    x_RM += torch.from_numpy(rng.normal(size=(prompts, 1))).float()[prompt_R].abs() * (x_RM > 0)
    x_RM[correct_R, 7] += effect
    x_RM[~correct_R, 11] += effect
    return x_RM, correct_R, prompt_R


def run(x_RM, correct_R, prompt_R, **options):
    generator = np.random.default_rng(0)
    return ct.contrast(
        x_RM, correct_R, prompt_R, min_support=8, permutations=200, generator=generator, **options
    )


def test_planted_features_are_found_with_their_signs() -> None:
    found = run(*planted(0, effect=2.0))
    assert int(found.d_M.argmax()) == 7
    assert int(found.d_M.argmin()) == 11
    assert set(torch.nonzero(found.q_M <= 0.05)[:, 0].tolist()) == {7, 11}
    assert found.d_M[7] > 2 * found.null_max


def test_shuffled_labels_find_nothing_beyond_the_rate() -> None:
    finds = 0
    for seed in range(20):
        x_RM, correct_R, prompt_R = planted(seed, effect=2.0)
        shuffled_R = ct.shuffle_within(correct_R, prompt_R, np.random.default_rng(seed))
        finds += bool((run(x_RM, shuffled_R, prompt_R).q_M <= 0.1).any())
    assert finds <= 6  # 2 expected at 10 %; 7 or more have probability 0.2 %


def test_d_worked_by_hand() -> None:
    # two prompts of two answers: differences 3 - 1 and 2 - 6, equal weights; s within prompts
    x_RM = torch.tensor([[3.0], [1.0], [2.0], [6.0]])
    correct_R = torch.tensor([True, False, True, False])
    prompt_R = torch.tensor([0, 0, 1, 1])
    found = ct.contrast(
        x_RM, correct_R, prompt_R, min_support=1, permutations=0, generator=np.random.default_rng(0)
    )
    s = math.sqrt((1 + 1 + 4 + 4) / 4)
    assert found.d_M[0] == pytest.approx((2 - 4) / 2 / (s + s))


def test_a_feature_of_easy_prompts_is_no_feature_of_right_answers() -> None:
    rng = np.random.default_rng(3)
    prompt_R = torch.arange(60).repeat_interleave(8)
    easy_P = torch.arange(60) < 30
    correct_R = torch.from_numpy(rng.random(480)) < torch.where(easy_P, 0.8, 0.2)[prompt_R]
    x_RM = torch.from_numpy(rng.random((480, 50))).float()
    x_RM[:, 0] += 3 * easy_P[prompt_R]
    within = run(x_RM, correct_R, prompt_R)
    across = run(x_RM, correct_R, torch.zeros_like(prompt_R))
    assert within.q_M[0] > 0.1
    assert across.q_M[0] < 0.05


def test_a_planted_length_feature_is_caught_by_the_control() -> None:
    rng = np.random.default_rng(1)
    R = 800
    correct_R = torch.from_numpy(rng.random(R) < 0.5)
    length_R = torch.from_numpy(rng.integers(10, 30, R) + 12 * correct_R.numpy())
    score_R = length_R.float() + torch.from_numpy(rng.normal(size=R)).float()
    truncated_R = torch.zeros(R, dtype=torch.bool)
    assert ct.auc(score_R, correct_R).value > 0.85
    strata_R = length_R  # every length its own stratum: no difference is left
    assert ct.auc(score_R, correct_R, strata_R).value == pytest.approx(0.5, abs=0.06)
    coarse_R = ct.confound_strata(length_R, truncated_R)
    assert ct.auc(score_R, correct_R, coarse_R).value < 0.75
    prompt_R = torch.zeros(R, dtype=torch.long)
    x_RM = torch.cat([score_R[:, None], torch.from_numpy(rng.random((R, 30))).float()], dim=1)
    plain = run(x_RM, correct_R, prompt_R)
    adjusted = run(
        x_RM, correct_R, prompt_R, confounds_RC=ct.length_confounds(length_R, truncated_R)
    )
    assert plain.q_M[0] < 0.01
    assert abs(float(adjusted.d_M[0])) < 0.2 * float(plain.d_M[0])


def test_auc_equals_counting_pairs() -> None:
    rng = np.random.default_rng(2)
    score_R = torch.from_numpy(rng.integers(0, 5, 40)).float()  # many ties
    correct_R = torch.from_numpy(rng.random(40) < 0.4)
    prompt_R = torch.arange(8).repeat_interleave(5)
    wins = pairs = 0.0
    for i in range(40):
        for j in range(40):
            if correct_R[i] and not correct_R[j] and prompt_R[i] == prompt_R[j]:
                pairs += 1
                wins += float(score_R[i] > score_R[j]) + 0.5 * float(score_R[i] == score_R[j])
    found = ct.auc(score_R, correct_R, prompt_R)
    assert (found.value, found.pairs) == (pytest.approx(wins / pairs), pairs)


def test_rho_of_a_binary_label_never_passes_its_bound() -> None:
    # 89 right of 100, perfectly separated: mechreward's 0.54 is all that rho can be
    correct_R = torch.arange(100) >= 11
    rho = ct.spearman(torch.arange(100).float(), correct_R)
    assert rho.bound == pytest.approx(0.542, abs=1e-3)
    assert rho.value == pytest.approx(rho.bound, abs=0.001)
    assert ct.auc(torch.arange(100).float(), correct_R).value == 1.0


def test_labels_are_shuffled_within_prompts_only() -> None:
    prompt_R = torch.tensor([2, 0, 2, 0, 1, 1, 2])
    correct_R = torch.tensor([True, True, False, True, False, False, True])
    shuffled_R = ct.shuffle_within(correct_R, prompt_R, np.random.default_rng(0))
    for prompt in range(3):
        here = prompt_R == prompt
        assert int(shuffled_R[here].sum()) == int(correct_R[here].sum())


def test_the_interval_covers_and_resamples_prompts() -> None:
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        correct_R = torch.from_numpy(rng.random(240) < 0.5)
        prompt_R = torch.arange(60).repeat_interleave(4)
        score_R = torch.from_numpy(rng.normal(size=240)).float() + 1.0 * correct_R
        low, high = ct.bootstrap_auc(score_R, correct_R, prompt_R, rng, resamples=200)
        covered += low <= 0.7602 <= high  # Phi(1 / sqrt 2)
    assert covered >= 34


def test_all_right_or_too_rare_is_one_clear_error() -> None:
    x_RM, _, prompt_R = planted(0, effect=0.0)
    with pytest.raises(UserError, match="320 of 320 answers are right"):
        run(x_RM, torch.ones(320, dtype=torch.bool), prompt_R)
    with pytest.raises(UserError, match="no feature fires in 8"):
        run(torch.zeros(320, 3), torch.arange(320) % 2 == 0, prompt_R)


def test_the_probe_and_the_difference_find_a_planted_direction() -> None:
    rng = np.random.default_rng(5)
    correct_R = torch.from_numpy(rng.random(600) < 0.5)
    x_RD = torch.from_numpy(rng.normal(size=(600, 12))).float()
    x_RD[:, 3] += 1.5 * correct_R
    mean_D = mean_difference(x_RD, correct_R, torch.zeros(600, dtype=torch.long))
    assert float(mean_D.norm()) == pytest.approx(1.0, abs=1e-5)
    assert int(mean_D.abs().argmax()) == 3 and mean_D[3] > 0.9
    probe_D = logistic_probe(x_RD, correct_R)
    assert int(probe_D.abs().argmax()) == 3 and probe_D[3] > 0
