"""Each rule fires on its own planted illness, and on no other run."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import fisher_exact
from typer.testing import CliRunner

from operando.cli import app
from operando.doctor.doctor import RULES, diagnose, examine
from operando.doctor.findings import Count, always_under_clip, nulls, rise_chance, series
from operando.doctor.rules_policy import forecast
from operando.doctor.rules_reward import smallest_rise
from operando.errors import UserError
from operando.recipe.update import CispoLoss, GroupAdvantage, KlConfig, RewardToGoAdvantage
from operando.run import Run
from operando.update.reduce import quarter_means
from tests.unit.doctor_runs import recipe, run


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
FLAT = {
    "reward": 0.4,
    "rewards/correct/mean": 0.4,
    "eval/correct": 0.4,
    "eval/rewards/correct": 0.4,
    "frac_reward_zero_std": 0.2,
    "entropy": 0.8,
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
    "kl_strangled": FLAT,
    "clip_bound": FLAT | {"grad_norm": 4.0},
    "ratio_clipped": {"clip_ratio/high": 0.2, "clip_ratio/low": 0.15},
    "reward_up_eval_flat": {"eval/correct": 0.41, "eval/rewards/correct": 0.41},
    "over_limit": {
        "features/over_limit": lambda x: 0.02 + 0.4 * x,
        "features/gap": lambda x: 0.3 * x,
    },
    "entropy_eta": FLAT | {"entropy": lambda x: 0.8 * math.exp(-1.6 * x)},
    "positional_kl": FLAT | {"kl/q1": lambda x: 0.9 * x},
}
SETTINGS = {"kl_strangled": {"kl": KlConfig(coef=0.8)}}


def names(rows, max_grad_norm=1.0, **changes):
    return [finding.name for finding in diagnose(rows, recipe(max_grad_norm, **changes))]


def test_a_healthy_run_has_no_finding():
    assert names(run()) == []


@pytest.mark.parametrize("illness", ILL)
def test_a_planted_illness_is_found_alone(illness):
    assert names(run(**ILL[illness]), **SETTINGS.get(illness, {})) == [illness]


@pytest.mark.parametrize("illness", ILL)
def test_every_finding_has_numbers_and_a_remedy(illness):
    (finding,) = diagnose(run(**ILL[illness]), recipe(**SETTINGS.get(illness, {})))
    assert any(c.isdigit() for c in finding.sentence)
    assert finding.remedy


def test_the_hack_sentence_shows_its_arithmetic():
    (finding,) = diagnose(run(**HACK), recipe())
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
    (finding,) = diagnose(run(**FALLING), recipe())
    assert finding.name == "got_worse" and "140/200) at step 30 to 20.0%" in finding.sentence


def test_a_fall_within_the_noise_is_no_hack():
    def dips(x):
        return 0.6 if x < 1 else 0.54  # 120/200 to 108/200: Fisher p = 0.13, times 7

    assert "reward_hack" not in names(run(**HACK | {"eval/correct": dips}))


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


def test_missing_values_are_left_out_and_null_is_a_sign_of_its_own():
    rows = [
        {"step": 1, "kl": None},
        {"step": 2, "kl": 0.5},
        {"step": 3},
        {"step": 4, "kl": math.nan},
    ]
    assert series(rows, "kl") == [(2, 0.5)]
    assert nulls(rows, "kl") == [1, 4]
    (finding,) = diagnose(rows, recipe())
    assert finding.name == "not_finite" and "kl in 2 steps" in finding.sentence
    assert diagnose([], recipe()) == [] and diagnose(rows[1:3], recipe()) == []


def test_always_under_clip():
    assert always_under_clip(run(), 1.0)
    assert not always_under_clip(run(), 0.6)
    assert not always_under_clip([], 1.0)


@pytest.mark.parametrize(("high", "low"), [((14, 20), (8, 20)), ((3, 3), (0, 4)), ((5, 9), (5, 9))])
def test_the_chance_of_a_fall_is_fishers(high, low):
    table = [[high[0], high[1] - high[0]], [low[0], low[1] - low[0]]]
    theirs = fisher_exact(table, alternative="greater")
    assert rise_chance(Count(*high), Count(*low)) == pytest.approx(theirs.pvalue)


# --- near misses, and the arithmetic of each rule ------------------------------------------------


def said(illness):
    (finding,) = diagnose(run(**ILL[illness]), recipe(**SETTINGS.get(illness, {})))
    return f"{finding.sentence} | {finding.remedy}"


def test_flat_metrics_of_a_run_that_moves_are_no_illness():
    assert names(run(**FLAT)) == []


def test_the_stalled_rate_names_the_next_rates_and_clears_the_clip():
    words = said("no_learning")
    assert "(clip: 1)" in words  # 1e-3 over 2e-6, wiggling, is 500
    assert "500 times, from 1e-05 to 0.005" in words and "the clip is not the cause" in words
    (unmeasured,) = diagnose(run(**ILL["no_learning"] | {"update_norm": None}), recipe())
    assert "from 1e-05 to 3e-05 or 0.0001; the clip is not" in unmeasured.remedy


def test_kl_strangled_is_the_pull_over_the_push():
    """kl 0.07 over the last quarter, 24.4 tokens, coef 0.8: 0.8 sqrt(2 * 0.07 * 24.4) = 1.48;
    advantages with 20 % of the groups flat: sqrt(0.8) = 0.89."""
    words = said("kl_strangled")
    assert "a pull of 1.5 against advantages of 0.89 (165%" in words
    assert "lower kl.coef from 0.8 to 0.16" in words


def test_a_weak_kl_a_gain_or_no_kl_term_strangle_nothing():
    assert names(run(**FLAT), kl=KlConfig(coef=0.2)) == []  # pull 0.37, 42 %
    assert names(run(), kl=KlConfig(coef=0.8)) == []
    assert names(run(**FLAT | {"eval/correct": lambda x: 0.4 + 0.2 * x}), kl=KlConfig(coef=9)) == []


def test_the_push_is_the_spread_of_rewards_where_they_are_not_normalised():
    weak = KlConfig(coef=0.15)  # a pull of 0.28: 31 % of 0.89, 62 % of the reward std 0.45
    assert names(run(**FLAT), kl=weak, advantage=GroupAdvantage()) == []
    for unscaled in (GroupAdvantage(scale="none"), RewardToGoAdvantage(kind="reward_to_go")):
        assert names(run(**FLAT), kl=weak, advantage=unscaled) == ["kl_strangled"]
    paid = KlConfig(coef=0.15, place="reward")
    assert names(run(**FLAT), kl=paid) == ["kl_strangled"]


def test_a_coefficient_that_moved_is_the_one_that_counts():
    adapted = run(**FLAT | {"kl_coef": 0.001})
    assert names(adapted, kl=KlConfig(coef=0.8, place="reward", target=0.1)) == []


def test_a_clip_that_cuts_little_or_seldom_or_in_a_run_that_gains_is_no_illness():
    def seldom(x):
        return 4.0 if x < 0.85 else 0.5

    assert "60 of 60 steps (median 4, 4.0 times the clip)" in said("clip_bound")
    assert names(run(**FLAT | {"grad_norm": 1.8})) == []
    assert names(run(**FLAT | {"grad_norm": seldom})) == []
    assert names(run(grad_norm=4.0)) == []


def test_few_clipped_ratios_or_a_loss_that_always_clips_are_no_illness():
    assert "35% of the tokens" in said("ratio_clipped")
    assert names(run(**{"clip_ratio/high": 0.15})) == []
    cispo = CispoLoss(kind="cispo")
    assert names(run(**ILL["ratio_clipped"]), loss=cispo) == []


def test_the_smallest_rise_that_n_problems_show():
    """From 82/200: 105/200 has p = 0.0134, 106/200 has 0.0103, 107/200 0.0079 (Fisher)."""
    found = smallest_rise(Count(82, 200), 200)
    assert found == pytest.approx(107 / 200 - 82 / 200)
    table = [[107, 93], [82, 118]]
    assert fisher_exact(table, alternative="greater").pvalue < 0.01
    assert fisher_exact([[106, 94], [82, 118]], alternative="greater").pvalue >= 0.01
    assert smallest_rise(Count(10, 10), 10) is None


def test_reward_up_needs_problems_enough_and_a_rise_they_would_show():
    ill = ILL["reward_up_eval_flat"]
    few = [row | ({"eval/n": 30.0} if "eval/n" in row else {}) for row in run(**ill)]
    assert names(few) == []
    many = [row | ({"eval/n": 400.0} if "eval/n" in row else {}) for row in run(**ill)]
    assert names(many) == ["reward_up_eval_flat"]
    small = {"rewards/correct/mean": lambda x: 0.4 + 0.06 * x, "reward": 0.4}
    big_n = [row | ({"eval/n": 400.0} if "eval/n" in row else {}) for row in run(**ill | small)]
    assert names(big_n) == []


def test_a_reward_out_of_range_that_does_not_grow_or_is_small_is_no_illness():
    high = {"features/over_limit": 0.3, "features/gap": 0.1}
    assert names(run(**high)) == []
    assert names(run(**{"features/over_limit": lambda x: 0.09 * x})) == []
    once = {"features/over_limit": lambda x: 0.02 + 0.4 * x, "features/gap": None}
    assert names(run(**once)) == ["over_limit"]


def test_a_forecast_of_a_planted_trend():
    """100 exp(-x / 20) meets 1 at x = 20 ln 100 = 92.1; 100 - 2 x meets 10 at x = 45."""
    rng = np.random.default_rng(0)
    steps = list(range(30))
    noise = rng.normal(0, 0.01, 30)
    curve = forecast(
        steps, [100 * math.exp(-x / 20 + e) for x, e in zip(steps, noise, strict=True)], 1.0
    )
    assert curve is not None and curve.shape == "exponential"
    assert curve.low < 20 * math.log(100) < curve.high and curve.step == pytest.approx(92.1, abs=2)
    line = forecast(steps, [100 - 2 * x + 30 * e for x, e in zip(steps, noise, strict=True)], 10.0)
    assert line is not None and line.shape == "linear"
    assert line.low < 45 < line.high and line.high - line.low < 2
    assert forecast(steps, [50 + 100 * e for e in noise], 5.0) is None
    assert forecast(steps, [50.0 + x for x in steps], 5.0) is None


def test_entropy_that_runs_out_after_the_end_or_with_a_gain_is_no_illness():
    fast = {
        "entropy": lambda x: 0.8 * math.exp(-1.6 * x)
    }  # a tenth at x = 1.44, step 86, plus wiggle
    assert "around step 88" in said("entropy_eta")
    assert names(run(**FLAT | {"entropy": lambda x: 0.8 * math.exp(-0.9 * x)})) == []  # step 154
    assert names(run(**fast)) == []
    # of a run that has just these 60 steps behind it and 20 before it, step 86 is out of reach
    assert names(run(**FLAT | fast), steps=80) == []
    assert names(run(**FLAT | fast), steps=90) == ["entropy_eta"]


def test_kl_in_one_quarter_is_an_illness_without_a_gain_only():
    assert "77% of the KL to the reference lies in the first quarter" in said("positional_kl")
    assert "begin" in said("positional_kl")
    assert names(run(**{"kl/q1": lambda x: 0.9 * x})) == []
    assert names(run(**FLAT | {"kl/q1": lambda x: 0.5 * x})) == []  # 65 %
    late = diagnose(run(**FLAT | {"kl/q4": lambda x: 0.9 * x}), recipe())
    assert "last quarter" in late[0].sentence and "end" in late[0].remedy
    tiny_kl = {f"kl/q{i}": 0.0001 for i in (2, 3, 4)} | {"kl/q1": 0.01}
    assert names(run(**FLAT | tiny_kl)) == []


def test_quarter_means_by_hand():
    """Five tokens: floor(4 t / 5) = 0 0 1 2 3; two tokens: quarters 0 and 2; none: none."""
    x_BT = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0], [10.0, 20.0, 99.0, 99.0, math.nan], [99.0] * 5])
    mask_BT = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    assert quarter_means(x_BT, mask_BT).tolist() == [
        pytest.approx((1 + 3 + 10) / 3),
        5.0,
        pytest.approx((7 + 20) / 2),
        9.0,
    ]
    wider = quarter_means(
        torch.nn.functional.pad(x_BT, (0, 3)), torch.nn.functional.pad(mask_BT, (0, 3))
    )
    assert torch.equal(wider, quarter_means(x_BT, mask_BT)), "padding does not matter"


# --- the command ---------------------------------------------------------------------------------


def folder_of(rows, tmp_path):
    run_folder = Run.create(recipe(name="sick", runs_dir=str(tmp_path)))
    for row in rows:
        run_folder.log_metrics(row)
    run_folder.close()
    return run_folder.folder


def test_the_command_prints_findings_and_writes_them(tmp_path):
    folder = folder_of(run(**HACK), tmp_path)
    done = CliRunner().invoke(app, ["doctor", str(folder)])
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == str(folder / "audits" / "doctor.json")
    assert "reward_hack" in done.output and "remedy:" in done.output
    written = json.loads((folder / "audits" / "doctor.json").read_text())
    assert [f["name"] for f in written["findings"]] == ["reward_hack"]
    assert written["steps"] == 60


def test_a_healthy_folder_says_what_was_checked_and_what_could_not_be(tmp_path):
    rows = [{k: v for k, v in row.items() if not k.startswith("kl")} for row in run()]
    folder = folder_of(rows, tmp_path)
    done = CliRunner().invoke(app, ["doctor", str(folder)])
    assert done.exit_code == 0 and "nothing found in 60 steps of sick" in done.output
    result = examine(folder)
    assert not result.findings and set(result.unchecked) == {
        "kl_strangled",
        "kl_exploding",
        "positional_kl",
        "sampler_gap",
    }
    assert {*result.checked, *result.unchecked} == {rule.name for rule in RULES}


def test_a_folder_without_metrics_or_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no metrics yet"):
        examine(folder_of([], tmp_path))
    with pytest.raises(UserError, match="not a run folder"):
        examine(tmp_path)
