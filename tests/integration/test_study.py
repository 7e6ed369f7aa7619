"""A study from start to end: killed and taken up, asked alike, judged; a changed claim refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.runs import ROOT, metric_rows, python

STUDY = """
name = "small"
seeds = [0, 1]
control = "still"

[arms.trained]
recipe = "{tiny}"
overrides = ["steps=3", "checkpoint.every=1", "eval.num=2"]

[arms.still]
recipe = "{tiny}"
overrides = ["steps=3", "checkpoint.every=1", "eval.num=2", "optim.lr=1e-12"]

[evaluation]
num = 12
samples = 2
temperature = 1.0

[evaluation.sets.plain]

[evaluation.sets.short]
overrides = ["rollout.max_completion_length=3"]

[metrics.pass]
set = "plain"

[metrics.cut]
set = "short"
label = "truncated"
better = "lower"

[claims.H1]
kind = "rate"
text = "The untrained model answers nearly everything right."
arm = "base"
metric = "pass"
supported_if = {{ above = 0.95 }}
falsified_if = {{ below = 0.95 }}

[claims.H2]
kind = "rate"
text = "Three tokens are too few for an answer."
arm = "still"
metric = "cut"
supported_if = {{ above = 0.5 }}
falsified_if = {{ below = 0.5 }}

[pareto]
x = "pass"
y = "cut"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that was killed in its second run."""
    where = tmp_path_factory.mktemp("study")
    (where / "study.toml").write_text(STUDY.format(tiny=ROOT / "recipes" / "tiny.toml"))
    going = subprocess.Popen(
        [sys.executable, "-m", "operando", "study", "study.toml"],
        cwd=where,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    second = where / "runs/small/small-trained-s1/checkpoints/step_00001/resume/state.pt"
    until = time.monotonic() + 300
    while not second.is_file() and time.monotonic() < until and going.poll() is None:
        time.sleep(0.01)
    os.killpg(going.pid, signal.SIGKILL)
    going.wait()
    assert second.is_file()
    return where


def study(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "operando", "study", "study.toml", *options, cwd=folder)


def test_a_killed_study_goes_on_is_judged_and_is_not_done_twice(folder: Path) -> None:
    plan = study(folder, "--dry-run")
    assert plan.returncode == 0 and plan.stdout == ""
    lines = plan.stderr.splitlines()
    assert lines[0].startswith("done    trained seed 0: 3 steps, runs/small/small-trained-s0")
    assert lines[1].startswith("started trained seed 1")
    assert lines[2].startswith("to do   still seed 0") and lines[3].startswith(
        "to do   still seed 1"
    )

    first = folder / "runs/small/small-trained-s0"
    before = (first / "results.json").stat().st_mtime_ns
    done = study(folder, "--jobs", "2")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == ["runs/small/study.md"]
    assert (first / "results.json").stat().st_mtime_ns == before, "finished runs stay"
    assert "1 of 4 runs are done" in done.stderr and "trained 4 of 4: small-still-s1" in done.stderr
    assert "H1 falsified: The untrained model answers nearly everything right." in done.stderr
    assert "of 2 claims, 1 falsified (H1, " in done.stderr
    assert "H2 supported: Three tokens are too few for an answer." in done.stderr
    resumed = metric_rows(folder / "runs/small/small-trained-s1")
    assert [row["step"] for row in resumed] == [0, 1, 2, 3]

    answers = first / "evals" / "study.parquet"
    before = answers.stat().st_mtime_ns
    again = study(folder)
    assert again.returncode == 3 and answers.stat().st_mtime_ns == before, "nor is it asked twice"
    for result in ("study.json", "study.md", "pareto.svg", "preregistration.json"):
        assert (folder / "runs/small" / result).is_file()


def test_all_runs_answered_the_same_and_from_the_same_streams(folder: Path) -> None:
    runs = folder / "runs" / "small"
    if not (runs / "study.json").is_file():
        study(folder, "--jobs", "2")
    asked = {}
    for file in sorted(runs.glob("*/evals/study.parquet")):
        asked[file.parents[1].name] = pq.read_table(file).to_pylist()
    assert len(asked) == 5, "four runs and one base model"
    keys = {
        name: [(row["set"], row["example_id"], row["sample"]) for row in rows]
        for name, rows in asked.items()
    }
    assert all(found == keys["small-still-s0"] for found in keys.values())
    assert len(keys["small-still-s0"]) == 2 * 12 * 2
    said = {name: [row["completion"] for row in rows] for name, rows in asked.items()}
    (base,) = (name for name in said if name.startswith("base-"))
    assert said["small-still-s0"] == said["small-still-s1"] == said[base], "nothing was learnt"
    assert said["small-trained-s0"] != said["small-still-s0"]
    pairs = zip(said[base][::2], said[base][1::2], strict=True)
    assert any(one != other for one, other in pairs), "samples differ"
    found = json.loads((runs / "study.json").read_text())
    rows = {(row["arm"], row["metric"]): row for row in found["rows"]}
    correct = [row["correct"] for row in asked["small-trained-s0"] if row["set"] == "plain"]
    assert rows["trained", "pass"]["by_seed"][0] == pytest.approx(sum(correct) / 24)
    assert found["headline"].startswith("small: of 2 claims, 1 falsified")


def test_a_changed_claim_is_refused(folder: Path) -> None:
    file = folder / "study.toml"
    text = file.read_text()
    try:
        file.write_text(text.replace("below = 0.95", "below = 0.01"))
        said = study(folder)
    finally:
        file.write_text(text)
    assert said.returncode == 2 and said.stdout == ""
    assert "changed: claims.H1.falsified_if.below: 0.95 -> 0.01" in said.stderr


def test_a_run_that_fails_stops_the_study_and_says_why(tmp_path: Path) -> None:
    text = STUDY.format(tiny=ROOT / "recipes" / "tiny.toml")
    text = text.replace('"eval.num=2"]', '"eval.num=2", "model.id=./nowhere"]')
    (tmp_path / "study.toml").write_text(text)
    done = study(tmp_path)
    assert done.returncode == 2, done.stderr
    assert "small-trained-s0 stopped with exit code 2; what is finished stays" in done.stderr
    assert "model.id = './nowhere' is neither a folder" in done.stderr
    folders = [folder.name for folder in (tmp_path / "runs" / "small").iterdir()]
    assert sorted(folders) == ["logs", "preregistration.json", "recipes"], "no other run began"


def test_a_run_that_is_still_going_is_not_trained_twice(tmp_path: Path) -> None:
    from operando.errors import UserError
    from operando.study.arms import start_process

    log = tmp_path / "logs" / "one.log"
    going = start_process([sys.executable, "-c", "import time; time.sleep(60)"], log, threads=1)
    try:
        with pytest.raises(UserError, match="one is still being trained by another process"):
            start_process([sys.executable, "-c", "pass"], log, threads=1)
    finally:
        going.kill()
        going.wait()
    assert start_process([sys.executable, "-c", "pass"], log, threads=1).wait() == 0
