"""Every example runs, and the loop on one page gives the numbers of the whole loop."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from operando import Recipe, Run, train
from operando.run_folder import read_metrics
from operando.sae.formats import save_sae
from operando.sae.sae import SAE
from tests.integration.runs import tiny, trained

EXAMPLES = Path(__file__).parents[2] / "examples"
SITE = "blocks.4.hook_resid_post"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(name: str, folder: Path, *arguments: str) -> list[str]:
    """Return the lines that an example prints, run as a user runs it."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_example_is_tried() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    elsewhere = {"trl_reward"}  # tests/unit/test_docs.py
    assert names - elsewhere == {
        "compare_checkpoints",
        "load_chain",
        "loop",
        "own_reward",
        "own_task",
        "read_activations",
    }


def test_the_loop_on_one_page_is_the_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same rewards and held-out answers at every step, and the same weights after the last."""
    loop = load("loop")
    assert len((EXAMPLES / "loop.py").read_text().splitlines()) <= 90
    small = {
        "steps": 4,
        "runs_dir": str(tmp_path),
        "rollout": {"num_prompts": 4, "num_generations": 4, "max_completion_length": 32},
        "update": {"micro_tokens": 300},  # several micro-batches a step
        "optim": {"lr": 3e-3},
        "eval": {"every": 1, "num": 24},
    }
    recipe = Recipe.model_validate(loop.RECIPE.model_dump(exclude_defaults=True) | small)
    policy = loop.grpo(recipe)
    printed = capsys.readouterr().out.splitlines()
    run = Run.create(recipe)
    train(recipe, run)
    run.close()
    rows = read_metrics(run.folder)[1:]
    assert printed == [
        f"step {row['step']:.0f}  reward {row['reward']:.3f}  held-out {row['eval/correct']:.1%}"
        for row in rows
    ]
    saved = load_file(run.folder / "checkpoints/step_00004/adapter_model.safetensors")
    weights = policy.trainable()
    assert {name.replace(".default", "") for name in weights} == set(saved)
    for name, weight in weights.items():
        assert torch.allclose(weight, saved[name.replace(".default", "")], rtol=0, atol=1e-5), name


def test_rewards_of_ones_own_are_paid_by_completion_and_by_token(tmp_path: Path) -> None:
    assert run_example("own_reward", tmp_path)[-1] == "runs/own-reward"
    last = read_metrics(tmp_path / "runs" / "own-reward")[-1]
    assert 0 < last["rewards/short/mean"] <= 1
    mean_entropy_a_completion = last["entropy"] * last["completions/mean_length"]
    assert last["rewards/sure/mean"] == pytest.approx(-mean_entropy_a_completion, rel=1e-3)


def test_a_task_of_ones_own_is_learned(tmp_path: Path) -> None:
    assert run_example("own_task", tmp_path)[-1] == "runs/own-task"
    rows = read_metrics(tmp_path / "runs" / "own-task")
    first, last = rows[0]["eval/correct"], rows[-1]["eval/correct"]
    assert 0.7 < first < 0.95 < last
    assert json.loads((tmp_path / "runs/own-task/manifest.json").read_text())["data"] == {
        "task": "sums"
    }


def test_activations_of_every_block_are_read(tmp_path: Path) -> None:
    lines = run_example("read_activations", tmp_path)
    assert [line.split()[0] for line in lines] == [f"blocks.{n}.hook_resid_post" for n in range(6)]
    cosines = [float(line.split()[-1]) for line in lines]
    assert all(0.9 < cosine < 1 for cosine in cosines) and len(set(cosines)) > 3


def test_a_chain_is_compared_with_its_null_arm(tmp_path: Path) -> None:
    """Planted: by step 10, RL has turned every feature by 60 degrees, the null arm none."""
    torch.manual_seed(0)
    first = torch.nn.functional.normalize(torch.randn(16, 8), dim=1)
    across = torch.randn(16, 8)
    across -= (across * first).sum(1, keepdim=True) * first
    turned = 0.5 * first + 0.75**0.5 * torch.nn.functional.normalize(across, dim=1)
    for arm, step, rows in (("first", 0, first), ("real", 10, turned), ("null", 10, first)):
        save_sae(sae(rows), tmp_path / f"saes/{arm}_seed0/step_{step:05d}/{SITE}")
    (tmp_path / "checkpoints/step_00010").mkdir(parents=True)
    (tmp_path / "checkpoints/step_00010/adapter_model.safetensors").touch()
    lines = run_example("load_chain", tmp_path, str(tmp_path), SITE)
    assert lines == [
        "step 0  with RL 0.0000  without 0.0000",
        "step 10  with RL 0.5000  without 0.0000",
    ]


def sae(W_dec_MD: torch.Tensor) -> SAE:
    M, D = W_dec_MD.shape
    zero_D = torch.zeros(D)
    return SAE(W_dec_MD.clone(), torch.zeros(M), W_dec_MD, zero_D, zero_D, "topk", k=2)


def test_checkpoints_are_compared(tmp_path: Path) -> None:
    run = trained(tiny(tmp_path, "steps=2", "optim.lr=0.05", "optim.warmup_steps=0"))
    lines = run_example("compare_checkpoints", tmp_path, str(run))
    assert " gained, " in lines[0] and all(line.startswith("lost: ") for line in lines[1:])
