"""Tiny runs for the integration tests: recipes/tiny.toml with a few settings changed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from operando.launch import launch
from operando.recipe.run import Recipe
from operando.recipe_io import apply_override, check, read_toml
from operando.rewards.base import RewardFunction
from operando.setup import Setup
from operando.tasks.base import Task

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "tiny.toml"


def tiny(runs_dir: Path, *overrides: str, lora: bool = True) -> Recipe:
    """The tiny recipe with overrides, its runs under `runs_dir`."""
    tables = read_toml(TINY)
    if not lora:
        model = tables["model"]
        assert isinstance(model, dict)
        del model["lora"]
    for override in (f"runs_dir={json.dumps(str(runs_dir))}", *overrides):
        tables = apply_override(tables, override)
    return check(Recipe, tables, "tiny with overrides")


def trained(
    recipe: Recipe,
    *,
    resume: bool = False,
    functions: Mapping[str, RewardFunction] | None = None,
    task: Task | None = None,
) -> Path:
    """The folder of a finished run of the recipe."""
    folder = launch(Console(quiet=True), recipe, resume=resume, functions=functions, task=task)
    assert folder is not None
    return folder


def metric_rows(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what a clock wrote."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k[:5] != "time/" and k != "tokens_per_second"}
        for line in lines
    ]


def rollout_rows(folder: Path, step: int) -> list[dict[str, object]]:
    return pq.read_table(folder / "rollouts" / f"step_{step:05d}.parquet").to_pylist()


def adapter(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:05d}" / "adapter_model.safetensors")


def captured_setups(monkeypatch: pytest.MonkeyPatch) -> list[Setup]:
    """A list that receives the Setup of every run begun after this call."""
    module = importlib.import_module("operando.train")
    seen: list[Setup] = []
    real = module.set_up

    def set_up(*args: object) -> Setup:
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(module, "set_up", set_up)
    return seen


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with one thread, and wait."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
