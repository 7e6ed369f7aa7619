"""Each rule fires on its own planted illness, and on no other run."""

import pytest
from scipy.stats import fisher_exact

from operando.audit.doctor import Count, _chance, always_under_clip, diagnose, series

STEPS = 60
N = 200


def run(**changes):
    """Return the rows of a healthy run; a change is a number, or a function of progress 0 to 1."""
    curves = {
        "reward": lambda x: 0.4 + 0.4 * x,
        "reward_std": 0.45,
        "rewards/correct/mean": lambda x: 0.4 + 0.4 * x,
        "frac_reward_zero_std": lambda x: 0.2 + 0.4 * x,
        "kl": lambda x: 0.08 * x,
        "entropy": lambda x: 0.8 - 0.5 * x,
        "completions/mean_length": lambda x: 20 + 5 * x,
        "completions/clipped_ratio": 0.02,
        "grad_norm": 0.6,
        "update_norm": 1e-3,
        "eval/correct": lambda x: 0.4 + 0.35 * x,
        "eval/clipped_ratio": 0.01,
        "eval/rewards/correct": lambda x: 0.4 + 0.35 * x,
    } | changes
    rows = []
    for step in range(STEPS + 1):
        x = step / STEPS
        wiggle = 1 + 0.02 * ((step * 7) % 5 - 2)  # so that no curve is a straight line
        row = {"step": step}
        for key, curve in curves.items():
            on_eval = key.startswith("eval/")
            if curve is not None and (step % 10 == 0 if on_eval else step > 0):
                value = curve(x) if callable(curve) else curve
                row[key] = value if on_eval else min(value * wiggle, max(1.0, value))
        if step % 10 == 0:
            row["eval/n"] = float(N)
        rows.append(row)
    return rows


def peaked(x):
    """Right answers rise to 70 % at half time and fall to 20 %."""
    return 0.4 + 0.6 * x if x <= 0.5 else 0.7 - 1.0 * (x - 0.5)


HACK = {
    "eval/correct": peaked,
    "rewards/contains/mean": lambda x: 0.4 + 0.55 * x,
    "eval/rewards/contains": lambda x: 0.4 + 0.55 * x,
    "rewards/correct/mean": None,
    "eval/rewards/correct": None,
}
FALLING = {
    "eval/correct": peaked,
    "eval/rewards/correct": peaked,
    "rewards/correct/mean": peaked,
    "reward": peaked,
}
ILL = {
    "reward_hack": HACK,
    "collapse": FALLING | {"entropy": lambda x: 0.8 * (1 - x) + 0.01},
    "no_signal": {
        "frac_reward_zero_std": 0.94,
        "reward": 0.03,
        "rewards/correct/mean": 0.03,
        "eval/correct": 0.03,
        "eval/rewards/correct": 0.03,
    },
    "no_learning": {
        "reward": 0.4,
        "rewards/correct/mean": 0.4,
        "eval/correct": 0.4,
        "eval/rewards/correct": 0.4,
        "kl": 0.0004,
        "update_norm": 2e-6,
        "frac_reward_zero_std": 0.2,
        "entropy": 0.8,
    },
    "truncation": {"completions/clipped_ratio": lambda x: 0.5 * x},
}


def names(rows, max_grad_norm=1.0):
    return [finding.name for finding in diagnose(rows, max_grad_norm)]


def test_a_healthy_run_has_no_finding():
    assert names(run()) == []


@pytest.mark.parametrize("illness", ILL)
def test_a_planted_illness_is_found_alone(illness):
    assert names(run(**ILL[illness])) == [illness]


@pytest.mark.parametrize("illness", ILL)
def test_every_finding_has_numbers_and_a_remedy(illness):
    (finding,) = diagnose(run(**ILL[illness]), 1.0)
    assert any(c.isdigit() for c in finding.sentence)
    assert finding.remedy


def test_the_hack_sentence_shows_its_arithmetic():
    (finding,) = diagnose(run(**HACK), 1.0)
    assert "70.0% (140/200) at step 30" in finding.sentence
    assert "20.0% (40/200) at step 60" in finding.sentence
    assert "'contains' on the same problems rose from 0.400 at step 0 to 0.950" in finding.sentence
    assert 'kind = "correct"' in finding.remedy
    assert "[kl] coef = 0.1" in finding.remedy


def test_a_hack_is_found_when_the_proxy_was_measured_in_training_only():
    assert names(run(**HACK | {"eval/rewards/contains": None})) == ["reward_hack"]


def test_a_proxy_that_saturated_before_the_truth_fell_is_a_hack():
    def saturates(x):
        return min(0.97, 0.4 + 2 * x)

    changes = {"eval/rewards/contains": saturates, "frac_reward_zero_std": lambda x: x}
    assert names(run(**HACK | changes)) == ["reward_hack"]


def test_a_proxy_that_falls_with_the_truth_is_no_hack():
    assert names(run(**FALLING)) == []


def test_a_fall_within_the_noise_is_no_hack():
    def dips(x):
        return 0.6 if x < 1 else 0.54  # 120/200 to 108/200: Fisher p = 0.13, times 7

    assert names(run(**HACK | {"eval/correct": dips})) == []


def test_constant_rewards_with_a_fall_are_a_collapse():
    changes = {
        "frac_reward_zero_std": lambda x: 0.2 if x < 0.8 else 1.0,
        "rewards/correct/mean": peaked,
    }
    assert names(run(**FALLING | changes)) == ["collapse"]


def test_low_entropy_at_the_peak_of_accuracy_is_health():
    assert names(run(entropy=lambda x: 0.8 * (1 - x) + 0.01)) == []


def test_a_run_that_gets_going_late_had_a_signal():
    assert names(run(frac_reward_zero_std=lambda x: 0.95 if x < 0.2 else 0.3)) == []


def test_small_steps_that_teach_are_health():
    assert names(run(update_norm=2e-6, kl=0.0004)) == []


def test_no_learning_needs_gradients_under_the_clip_and_no_kl_is_enough():
    assert names(run(**ILL["no_learning"]), max_grad_norm=0.5) == []
    assert names(run(**ILL["no_learning"] | {"kl": None})) == ["no_learning"]


def test_held_out_truncation_counts_too():
    assert names(run(**{"eval/clipped_ratio": 0.2})) == ["truncation"]


def test_null_and_missing_values_are_left_out():
    rows = [{"step": 1, "kl": None}, {"step": 2, "kl": 0.5}, {"step": 3}]
    assert series(rows, "kl") == [(2, 0.5)]
    assert diagnose(rows, 1.0) == []
    assert diagnose([], 1.0) == []


def test_always_under_clip():
    assert always_under_clip(run(), 1.0)
    assert not always_under_clip(run(), 0.6)
    assert not always_under_clip([], 1.0)


@pytest.mark.parametrize(("high", "low"), [((14, 20), (8, 20)), ((3, 3), (0, 4)), ((5, 9), (5, 9))])
def test_the_chance_of_a_fall_is_fishers(high, low):
    table = [[high[0], high[1] - high[0]], [low[0], low[1] - low[0]]]
    theirs = fisher_exact(table, alternative="greater")
    assert _chance(Count(*high), Count(*low)) == pytest.approx(theirs.pvalue)
