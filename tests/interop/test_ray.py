"""A study on a local Ray: the same processes, with the same metrics as without it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

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


@pytest.mark.filterwarnings("ignore")
def test_a_run_whose_node_dies_goes_on_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of one core; the second is killed once its run has a checkpoint."""
    from ray.cluster_utils import Cluster

    longer = ("steps=12", "checkpoint.every=2", "rollout.max_completion_length=64")
    names = ("one", "two")
    here = [job(tmp_path / "here", name, *longer) for name in names]
    there = [job(tmp_path / "there", name, *longer) for name in names]
    train_jobs(here, LocalRunner(threads=1), 1, lambda _: None)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    runner = RayRunner(at_once=2)
    starts: list[str] = []
    start = runner.start

    def counted(command: Sequence[str], log: Path) -> object:
        starts.append(log.stem)
        if len(starts) == 2:
            Thread(target=kill_when_begun).start()
        return start(command, log)

    def kill_when_begun() -> None:
        while not all((one.folder / "checkpoints" / "step_00002").is_dir() for one in there):
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    monkeypatch.setattr(runner, "start", counted)
    done: list[str] = []
    try:
        train_jobs(there, runner, 2, lambda one: done.append(one.name))
    finally:
        runner.close()
        cluster.shutdown()
    assert sorted(done) == sorted(names)
    assert len(starts) == 3, "one run was begun again, the other was not"
    for one, other in zip(here, there, strict=True):
        assert metric_rows(other.folder) == metric_rows(one.folder)
