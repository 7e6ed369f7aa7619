"""A study on a local Ray: the same processes, with the same metrics as without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from operando.errors import UserError
from operando.recipe_io import load_recipe
from operando.study.arms import Job, LocalRunner, RayRunner, train_jobs
from tests.integration.runs import metric_rows

ray = pytest.importorskip("ray")

SHORT = ("steps=1", "eval.num=2", "task.num_held_out=2")


def job(folder: Path, name: str, *overrides: str) -> Job:
    own = (f'runs_dir="{folder}"', f"name={name}", *SHORT, *overrides)
    return Job(name, load_recipe("tiny", own))


@pytest.mark.filterwarnings("ignore")
def test_runs_on_ray_are_the_runs_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here, there = job(tmp_path / "here", "one"), job(tmp_path / "there", "one")
    train_jobs([here], LocalRunner(threads=1), 1, lambda _: None)
    runner = RayRunner(at_once=1, num_cpus=1)
    done: list[str] = []
    try:
        train_jobs([there], runner, 1, lambda one: done.append(one.name))
        bad = job(tmp_path / "there", "bad", "model.id=./nowhere")
        with pytest.raises(UserError, match="bad stopped with exit code 2"):
            train_jobs([bad], runner, 1, lambda one: done.append(one.name))
    finally:
        runner.close()
    assert runner.threads == 1 and done == ["one"]
    assert metric_rows(there.folder) == metric_rows(here.folder)
