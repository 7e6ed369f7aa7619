"""The deep bed from end to end: it trains, its controls train, and pass@k reads the run."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from operando.evals.evaluate import evaluate
from operando.evals.questions import EvalConfig
from operando.recipe_io import load_recipe
from operando.run import Run
from operando.run_folder import read_metrics
from operando.train import train


def trained(name: str, folder: Path, *more: str) -> Path:
    small = ("steps=2", "optim.warmup_steps=0", "rollout.num_prompts=8", "eval.num=24")
    few = ("task.num_train=64", "task.num_held_out=64", f"runs_dir={folder}")
    recipe = load_recipe(name, (*small, *few, *more))
    with closing(Run.create(recipe)) as run:
        train(recipe, run)
    return folder / recipe.name


def test_the_base_is_wrong_at_first_and_right_among_sixteen(tmp_path: Path) -> None:
    run = trained("deep", tmp_path, "optim.lr=1e-8")
    found = evaluate(run, EvalConfig(num=60, temperature=1.0, samples=16))
    base, trained_ = (row.all.pass_at for row in found.rows)
    assert 0.03 < base[1] < 0.25 and base[16] > base[1] + 0.25
    assert trained_[16] > 0.4  # the rate moves nothing
    (greedy, _) = evaluate(run, EvalConfig(num=60)).rows
    assert greedy.all.right.value < 0.25


@pytest.mark.parametrize("name", ["deep_format", "deep_random", "deep_majority", "deep_hack"])
def test_a_control_trains_on_what_its_reward_says(name: str, tmp_path: Path) -> None:
    rows = read_metrics(trained(name, tmp_path))
    paid = [row["reward"] for row in rows if "reward" in row]
    right = [row["train/correct"] for row in rows if "reward" in row]
    assert len(paid) == 2
    match name:
        case "deep_format":
            assert min(paid) > 0.75  # nearly all the base's answers have the form
        case "deep_random":
            assert all(0.2 < p < 0.8 for p in paid)
        case "deep_majority":
            assert min(paid) > max(right)
        case _:
            assert all(p >= r for p, r in zip(paid, right, strict=True))
