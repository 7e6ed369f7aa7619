"""A whole discovery on answers with a planted feature: feature set, controls, gate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from operando.discovery.answers import Answers
from operando.discovery.features import Search, find_features, mean_features
from operando.discovery.judging import Measured, gate_of, measure, null
from operando.recipe.run import DiscoverConfig
from operando.sae.feature_set import FeatureSet, Gate, load_feature_set, sae_of
from operando.sae.sae import SAE
from operando.stats.contrast import shuffle_within
from operando.types import Example, Prompt, Rollout

D = 48
HELPS, HARMS = 5, 9


def identity_sae() -> SAE:
    zeros = [torch.zeros(D) for _ in range(3)]
    return SAE(torch.eye(D), zeros[0], torch.eye(D), zeros[1], zeros[2], "relu")


def planted_answers(seed: int, effect: float, prompts: int = 40, each: int = 8) -> Answers:
    """Answers of 4 to 12 tokens; axis 5 is written in right answers, axis 9 in wrong ones."""
    rng = np.random.default_rng(seed)
    R = prompts * each
    correct_R = torch.from_numpy(rng.random(R) < 0.5)
    length_R = torch.from_numpy(rng.integers(4, 13, R))
    row_N = torch.repeat_interleave(torch.arange(R), length_R)
    acts_ND = torch.from_numpy(rng.normal(size=(len(row_N), D)) - 1).float()
    acts_ND[correct_R[row_N], HELPS] += effect
    acts_ND[~correct_R[row_N], HARMS] += effect
    prompt = Prompt(Example("e", "q", "7"), "q", (3,))
    rollouts = [Rollout(prompt, r // each, r % each, "7", (4,), (0.0,), False) for r in range(R)]
    return Answers(
        rollouts,
        correct_R,
        torch.zeros(R, dtype=torch.bool),
        length_R,
        torch.arange(prompts).repeat_interleave(each),
        acts_ND,
        row_N,
    )


def search_of(find: Answers, judge: Answers) -> Search:
    config = DiscoverConfig(site="blocks.0.hook_resid_post", top=3, permutations=200)
    blank = FeatureSet("real", config.site, "tiny", "ab", "cd", 0.0, Gate(False))
    sae = identity_sae()
    return Search(
        config,
        blank,
        sae,
        find,
        judge,
        mean_features(sae, find),
        find.prompt_R,
        None,
        8,
        np.random.default_rng(1),
    )


def test_a_planted_feature_passes_and_its_controls_do_not(tmp_path: Path) -> None:
    search = search_of(planted_answers(0, 2.0), planted_answers(1, 2.0))
    found = find_features("x", search, tmp_path)
    assert {f.id: f.sign for f in found.features} == {HELPS: 1, HARMS: -1}
    assert found.gate == Gate(True)
    scores = {m.name: m for m in found.measured}
    assert scores["features"].auc > 0.95 and scores["features"].controlled > 0.95
    assert abs(scores["shorter answer"].auc - 0.5) < 0.1
    assert all(abs(n.auc - 0.5) < 0.1 for n in found.nulls)
    feature_set = load_feature_set(found.feature_set)
    assert feature_set.features == found.features
    assert sae_of(feature_set, found.feature_set).sha256() == search.sae.sha256()
    for name in ("random", "shuffled"):
        control = load_feature_set(tmp_path / f"{name}.json")
        assert control.arm == name and len(control.features) == 2
    direction = load_feature_set(tmp_path / "direction.json")
    unit_D = torch.tensor(direction.direction)
    assert int(unit_D.argmax()) == HELPS and int(unit_D.argmin()) == HARMS
    written = json.loads((tmp_path / "discovery.json").read_text())
    assert written["measured"][0]["auc"] == scores["features"].auc


def test_the_scale_is_the_quantile_of_right_answers(tmp_path: Path) -> None:
    search = search_of(planted_answers(0, 2.0), planted_answers(1, 2.0))
    found = find_features("x", search, tmp_path)
    right_N = search.find.correct_R[search.find.row_N]
    for feature in found.features:
        values = search.find.acts_ND[right_N, feature.id].relu().numpy()
        assert feature.scale == pytest.approx(np.quantile(values, 0.99), rel=1e-4)
    limit = load_feature_set(found.feature_set).limit
    assert limit > 0


def test_shuffled_labels_leave_the_gate_closed(tmp_path: Path) -> None:
    opened = 0
    for seed in range(8):
        find, judge = planted_answers(seed, 2.0), planted_answers(seed + 50, 2.0)
        labels_R = shuffle_within(find.correct_R, find.prompt_R, np.random.default_rng(seed))
        search = search_of(replace(find, correct_R=labels_R), judge)
        opened += find_features("x", search, tmp_path / str(seed)).gate.passed
    assert opened <= 1


def test_without_a_feature_no_feature_set_is_written(tmp_path: Path) -> None:
    found = find_features(
        "x", search_of(planted_answers(3, 0.0), planted_answers(4, 0.0)), tmp_path
    )
    assert found.feature_set == "" and not (tmp_path / "feature_set.json").exists()
    assert found.gate == Gate(False, ("no feature has q <= 0.1",))


def test_pooled_features_are_the_means_of_the_dense_encoding() -> None:
    answers = planted_answers(0, 1.0, prompts=5)
    dense_NM = identity_sae().encode_dense(answers.acts_ND)
    pooled_RM = mean_features(identity_sae(), answers)
    for r in (0, 7, 39):
        assert torch.allclose(pooled_RM[r], dense_NM[answers.row_N == r].mean(0), atol=1e-5)


def test_halves_keep_tokens_with_their_answers() -> None:
    answers = planted_answers(0, 1.0, prompts=6)
    half = answers.chosen(answers.prompt_R >= 3)
    assert len(half.rollouts) == 24 and torch.equal(half.prompt_R.unique(), torch.tensor([3, 4, 5]))
    assert torch.equal(half.mean_acts(), answers.mean_acts()[24:])


@pytest.mark.parametrize("kind", ["auc", "rho"])
def test_a_score_that_is_length_alone_does_not_pass(kind: str) -> None:
    """Longer answers are right more often, and the score rises with length: nothing else."""
    config = DiscoverConfig(site="blocks.0.hook_resid_post", measure=kind, minimum=0.3)  # pyright: ignore[reportArgumentType]
    opened = {"length": 0, "more": 0}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        answers = planted_answers(seed, 0.0, prompts=60)
        length_R = torch.from_numpy(rng.integers(20, 220, 480))
        right_R = torch.from_numpy(
            rng.random(480) < 1 / (1 + np.exp((120 - length_R.numpy()) / 20))
        )
        answers = replace(answers, length_R=length_R, correct_R=right_R)
        length_only_R = length_R / 50 + 0.3 * torch.from_numpy(rng.normal(size=480))
        for name, score_R in (("length", length_only_R), ("more", length_only_R + 2 * right_R)):
            found = measure("features", score_R, answers, rng)
            gate = gate_of(config, found, [])
            assert found.low > 0.8 and found.rho > 0.5  # it would have passed
            opened[name] += gate.passed
            assert gate.passed or ["same length" in reason for reason in gate.reasons] == [True]
    assert opened["length"] <= 2 and opened["more"] == 10


def test_a_control_within_prompts_by_hand() -> None:
    """Two prompts of one right and one wrong answer; a score that ranks prompts and one that ranks
    answers. Over all pairs (right 1, 3; wrong 2, 4 or wrong 0, 2) and over those of one prompt."""
    answers = planted_answers(0, 1.0, prompts=2)
    kept = torch.tensor([True, True] + [False] * 6)
    answers = answers.chosen(torch.cat([kept, kept]))
    answers = replace(answers, correct_R=torch.tensor([True, False, True, False]))
    assert answers.prompt_R.tolist() == [0, 0, 1, 1]
    by_prompt_R, by_answer_R = torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 0, 3, 2])
    found = null("x", [by_prompt_R, by_answer_R], answers)
    assert found.auc == pytest.approx((0.25 + 0.75) / 2)
    assert found.within == pytest.approx((0 + 1) / 2)
    assert found.within_q95 == pytest.approx(0.95) and found.n == 2


def test_a_gate_says_on_which_side_of_chance_an_interval_lies() -> None:
    config = DiscoverConfig(site="blocks.0.hook_resid_post")
    shape = {"name": "features", "auc": 0.42, "within": 0.6, "controlled": 0.45, "rho": 0.0}
    limits = {"low": 0.36, "high": 0.48, "controlled_low": 0.39, "controlled_high": 0.52}
    gate = gate_of(config, Measured(**shape, **limits, rho_bound=0.5), [])  # pyright: ignore[reportArgumentType]
    assert gate.reasons[1:] == (
        "the AUC's interval [0.360, 0.480] is below 0.5",
        "the AUC's interval among answers of the same length [0.390, 0.520] holds 0.5: length may "
        "be all",
    )
