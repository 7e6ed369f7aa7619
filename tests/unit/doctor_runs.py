"""Runs for the doctor: worked curves, sick ones by name, and a simulator of healthy ones."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np

from operando.recipe.rewards import CorrectReward
from operando.recipe.run import Recipe
from operando.recipe.update import KlConfig, OptimConfig
from operando.recipe_io import load_recipe

STEPS = 60
N = 200


def recipe(max_grad_norm=1.0, **changes) -> Recipe:
    """Return tiny with 60 steps, no KL term unless one is given, and a gradient clip."""
    optim = OptimConfig(lr=1e-5, max_grad_norm=max_grad_norm)
    return load_recipe("tiny").model_copy(
        update={"steps": STEPS, "kl": None, "optim": optim} | changes
    )


def run(**changes):
    """Return the rows of a healthy run; a change is a number, or a function of progress 0 to 1."""
    curves = {
        "reward": lambda x: 0.4 + 0.4 * x,
        "reward_std": 0.45,
        "rewards/correct/mean": lambda x: 0.4 + 0.4 * x,
        "frac_reward_zero_std": lambda x: 0.2 + 0.4 * x,
        "kl": lambda x: 0.08 * x,
        "entropy": lambda x: 0.8 - 0.3 * x,
        "completions/mean_length": lambda x: 20 + 5 * x,
        "completions/clipped_ratio": 0.02,
        "kl/q1": lambda x: 0.05 * x,
        "kl/q2": lambda x: 0.1 * x,
        "kl/q3": lambda x: 0.1 * x,
        "kl/q4": lambda x: 0.07 * x,
        "clip_ratio/low": 0.01,
        "clip_ratio/high": 0.02,
        "features/over_limit": 0.02,
        "features/gap": lambda x: 0.01 * x,
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


# --- sick runs -----------------------------------------------------------------------------------

FLAT = {
    "reward": 0.4,
    "rewards/correct/mean": 0.4,
    "eval/correct": 0.4,
    "eval/rewards/correct": 0.4,
    "frac_reward_zero_std": 0.2,
    "entropy": 0.8,
}


def falling(start, end):
    """The changes of a run whose reward and accuracy go from `start` to `end`."""
    keys = ("reward", "rewards/correct/mean", "eval/correct", "eval/rewards/correct")
    return dict.fromkeys(keys, lambda x: start + (end - start) * x)


def none_of(*keys):
    return dict.fromkeys(keys)


def late_nulls(key):
    """A metric that is NaN from two thirds on."""
    return {key: lambda x: math.nan if x > 2 / 3 else 0.5}


NO_EVAL = none_of("eval/correct", "eval/rewards/correct", "eval/clipped_ratio")
# name: (changes of the metrics, changes of the recipe, what must be found, in its remedy)
SICK = {
    # the review's
    "lr_too_small": (FLAT | {"kl": 4e-4, "update_norm": 2e-6}, {}, "no_learning", "500 times"),
    "total_collapse": (
        falling(0.5, 0.0) | {"entropy": lambda x: 0.8 * (1 - x) + 0.001,
                             "frac_reward_zero_std": lambda x: min(1.0, 2 * x)},
        {}, "collapse", "begin again, lower optim.lr",
    ),
    "entropy_collapse": (falling(0.5, 0.2) | {"entropy": lambda x: 0.8 * math.exp(-5 * x)},
                         {}, "collapse", "entropy_coef"),
    "zero_variance": (FLAT | {"frac_reward_zero_std": 0.97}, {}, "no_signal", "easier or harder"),
    "clip_fraction_1": ({"clip_ratio/low": 0.5, "clip_ratio/high": 0.5}, {}, "ratio_clipped",
                        "lower optim.lr"),
    "grad_always_clipped": (FLAT | {"grad_norm": 6.0}, {}, "clip_bound", "max_grad_norm"),
    "reward_hack": (falling(0.5, 0.1) | {"reward": lambda x: 0.5 + 0.4 * x,
                                         "rewards/contains/mean": lambda x: 0.5 + 0.4 * x},
                    {}, "reward_hack", "strict verifier"),
    "reward_up_eval_flat": ({"eval/correct": 0.41, "eval/rewards/correct": 0.41}, {},
                            "reward_up_eval_flat", "rewarded and wrong"),
    "lr_large_partial": (
        falling(0.5, 0.25) | {"kl": lambda x: 0.8 * x, "entropy": lambda x: 0.8 * (1 + 3 * x)},
        {}, "got_worse", "lower optim.lr from 1e-05 to 1e-06",
    ),
    "sign_flipped": (falling(0.5, 0.1), {}, "got_worse", "look at the sign"),
    "kl_exploding": (FLAT | {"kl": lambda x: 0.01 + 4 * x * x}, {}, "kl_exploding", "[kl] coef"),
    "entropy_explodes": (FLAT | {"entropy": lambda x: 0.2 * (1 + 19 * x)}, {}, "entropy_explodes",
                         "lower optim.lr"),
    "entropy_gone": (FLAT | {"entropy": lambda x: 0.17 * math.exp(-12 * x) + 0.0004}, {},
                     "entropy_gone", "entropy_coef"),
    "sampler_gap": (FLAT | {"sampler/gap_mean": 1.5, "sampler/ess": 0.05}, {}, "sampler_gap",
                    "newest weights"),
    "no_adapter": (FLAT | {"grad_norm": 0.0, "update_norm": 0.0, "kl": 0.0}, {}, "no_update",
                   "adapter is attached"),
    "nan_gradients": (FLAT | {"grad_norm": math.nan, "loss": math.nan, "update_norm": math.nan}, {},
                      "not_finite", "last checkpoint"),
    "wrong_eos": (FLAT | {"completions/clipped_ratio": 1.0, "completions/mean_length": 48.0,
                          "eval/clipped_ratio": 1.0}, {}, "truncation", "stop"),
    "reward_none": (FLAT | {"reward": math.nan, "reward_std": math.nan, "grad_norm": 0.0,
                            "frac_reward_zero_std": 1.0, "update_norm": 0.0},
                    {}, "no_reward", "returns None"),
    "kl_coef_20": (FLAT | {"kl": 0.007}, {"kl": KlConfig(coef=20)}, "kl_strangled",
                   "lower kl.coef from 20"),
    "constant_reward": (
        FLAT | {"reward": 1.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0, "grad_norm": 0.0,
                "update_norm": 0.0, "kl": 0.0},
        {}, "no_signal", "constant reward",
    ),
    "lr_1e-7": (FLAT | {"kl": 0.0, "update_norm": 7.8e-7}, {"optim": OptimConfig(lr=1e-7)},
                "no_learning", "1,000 times, from 1e-07 to 0.0001"),
    "lr_3e-2": (
        falling(0.5, 0.0) | {"kl": lambda x: 8.1 * min(1.0, 5 * x), "update_norm": 0.24,
                             "completions/clipped_ratio": lambda x: min(1.0, 5 * x),
                             "frac_reward_zero_std": lambda x: min(1.0, 5 * x)},
        {"optim": OptimConfig(lr=3e-2)}, "kl_exploding", "lower optim.lr from 0.03 to 1e-03",
    ),
    "lr_0.3": (
        falling(0.5, 0.0) | {"kl": lambda x: 8.5 * min(1.0, 9 * x),
                             "entropy": lambda x: 0.2 + 3 * x,
                             "update_norm": lambda x: 2.4 * (1 - x) + 0.01,
                             "frac_reward_zero_std": lambda x: min(1.0, 9 * x)},
        {"optim": OptimConfig(lr=0.3)}, "collapse", "lower optim.lr from 0.3 to 1e-03",
    ),
    # of our own
    "worse_without_eval": (falling(0.7, 0.3) | NO_EVAL, {}, "got_worse", "look at the sign"),
    "all_gain_lost": (falling(0.4, 0.4) | {"reward": lambda x: 0.4 + 0.3 * math.sin(math.pi * x),
                                           "eval/correct": lambda x: 0.4 + 0.4 * math.sin(3 * x)},
                      {}, "got_worse", "what is rewarded is not what is asked"),
    "no_weight_moves": (FLAT | {"update_norm": 0.0}, {}, "no_update", "16-bit"),
    "late_nan_loss": (late_nulls("loss"), {}, "not_finite", "go back to the last checkpoint"),
    "late_nan_entropy": (FLAT | late_nulls("entropy"), {}, "not_finite", "float32"),
    "kl_at_the_end": (FLAT | {"kl": lambda x: 0.01 if x < 0.85 else 5.0}, {}, "kl_exploding",
                      "[kl] coef"),
    "noise_by_bonus": (FLAT | {"entropy": lambda x: 0.3 + 2.4 * x}, {}, "entropy_explodes",
                       "lower optim.lr"),
    "gap_alone": ({"sampler/gap_mean": 0.4, "sampler/ess": 0.9}, {}, "sampler_gap", "adapter"),
    "ess_alone": ({"sampler/gap_mean": 0.01, "sampler/ess": 0.02}, {}, "sampler_gap", "adapter"),
    "negative_weight": (
        falling(0.5, 0.05) | {"reward": lambda x: -0.5 + 0.45 * x},
        {"rewards": {"correct": CorrectReward(kind="correct", weight=-1.0)}}, "reward_hack",
        "rewards.correct.weight = -1",
    ),
    "never_right": (
        FLAT | falling(0.0, 0.0) | {"reward_std": 0.0, "frac_reward_zero_std": 1.0,
                                    "grad_norm": 0.0, "update_norm": 0.0},
        {}, "no_signal", "no completion was ever right",
    ),
    "cut_in_eval": ({"eval/clipped_ratio": lambda x: 0.4 * x}, {}, "truncation",
                    "max_completion_length"),
}  # fmt: skip


# --- healthy runs --------------------------------------------------------------------------------

SHAPES = {
    "line": lambda x: x,
    "early": lambda x: 1 - np.exp(-5 * x),
    "late": lambda x: 1 / (1 + np.exp(-14 * (x - 0.65))),
    "jump": lambda x: (x > 0.4).astype(float),
    "peak": lambda x: np.minimum(1.0, 2 * x) - 0.15 * np.maximum(0.0, x - 0.5) * 2,
    "flat": lambda x: 0 * x,
}


def healthy(seed):
    """Return the rows and the recipe of a run of a shape, a length and an evaluation size.

    Counts are binomial, groups of 8 share their luck, everything else wanders with autocorrelation.
    """
    rng = np.random.default_rng(seed)
    shape = list(SHAPES)[seed % len(SHAPES)]
    steps = int(rng.choice([20, 40, 60, 120]))
    num = int(rng.choice([50, 200, 1000]))
    prompts = int(rng.choice([4, 12, 32]))
    start, gain = rng.uniform(0.05, 0.6), rng.uniform(0.15, 0.35)
    x = np.linspace(0, 1, steps + 1)
    level = np.clip(start + gain * SHAPES[shape](x), 0, 1)

    def wander(scale):
        noise = rng.normal(0, scale, steps + 1)
        for i in range(1, steps + 1):
            noise[i] += 0.5 * noise[i - 1]
        return noise

    own_PG = rng.beta(
        2 * level[:, None] + 0.01, 2 * (1 - level[:, None]) + 0.01, (steps + 1, prompts)
    )
    right_SP = rng.binomial(8, own_PG)
    paid = right_SP.mean(1) / 8
    moved = gain * SHAPES[shape](x)
    kl = rng.uniform(0.02, 0.3) * (moved + 0.01) * np.exp(wander(0.4))
    norm = 10 ** rng.uniform(-3.5, -1.9)
    curves = {
        "reward": paid,
        "rewards/correct/mean": paid,
        "reward_std": np.sqrt(paid * (1 - paid)) + 1e-3,
        "frac_reward_zero_std": np.isin(right_SP, (0, 8)).mean(1),
        "kl": kl,
        **{f"kl/q{i}": kl * np.exp(wander(0.4)) for i in (1, 2, 3, 4)},
        "entropy": rng.uniform(0.1, 1.2) * (1 - 1.5 * moved) * np.exp(wander(0.15)),
        "completions/mean_length": 24 + wander(2),
        "completions/clipped_ratio": rng.binomial(8 * prompts, 0.02, steps + 1) / (8 * prompts),
        "grad_norm": rng.uniform(0.05, 0.8) * np.exp(wander(0.3)),
        "update_norm": norm * np.exp(wander(0.2)),
        "loss": wander(0.05),
        "clip_ratio/low": np.abs(wander(0.02)),
        "clip_ratio/high": np.abs(wander(0.02)),
        "sampler/gap_mean": 10 ** rng.uniform(-7, -2.2) * np.exp(wander(0.2)),
        "sampler/ess": 1 - np.abs(wander(0.02)),
    }
    rows = []
    for step in range(steps + 1):
        row = {"step": step} | ({k: float(v[step]) for k, v in curves.items()} if step else {})
        if step % 10 == 0:
            share = rng.binomial(num, level[step]) / num
            row |= {
                "eval/n": float(num),
                "eval/correct": share,
                "eval/rewards/correct": share,
                "eval/clipped_ratio": 0.01,
            }
        rows.append(row)
    return rows, recipe(steps=steps, kl=KlConfig(coef=0.02))


def trained_runs():
    """Return rows, recipe changes, by name: runs of recipes/demo.toml that were really trained.

    12 prompts per step (sick_hack2: 24), 30 steps (40), one CPU core; four significant digits.
    """
    file = Path(__file__).with_name("trained_runs.json.gz")
    runs = json.loads(gzip.decompress(file.read_bytes()))
    return {name: (_rows(one["metrics"]), one["recipe"]) for name, one in runs.items()}


def _rows(columns):
    steps = len(columns["step"])
    return [
        {k: v for k, column in columns.items() if (v := column[i]) != "absent"}
        for i in range(steps)
    ]
