"""Runs that a signal, a kill or a damaged file cut short: what is said, and how they go on."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from operando import cli
from operando.launch import launch_arms
from operando.owned import HOST, owned
from operando.recipe_io import to_toml
from operando.records import Clock
from operando.run import Run, remove
from operando.update.checkpoint import drop_states, saved_steps
from tests.integration.runs import ROOT, adapter, metric_rows, tiny, trained
from tests.integration.test_pipeline import RECIPES
from tests.integration.test_study import STUDY

Command = Callable[..., tuple[int, str]]
SMALL = ("eval.num=4", "rollout.num_prompts=2", "rollout.max_completion_length=12")
# Called by the loop at every step; SIGNAL_AT is "signal step".
PAYS = """
import os

def pay(completion_ids, trainer_state, **_):
    number, step = map(int, os.environ.get("SIGNAL_AT", "0 0").split())
    if trainer_state.global_step == step:
        os.kill(os.getpid(), number)
    return [float(sum(ids) % 5) for ids in completion_ids]
"""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command line sets a handler of its own; what follows has the former again."""
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of four steps, saved at 2 and 4, whose reward can send the run a signal."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "pays.py").write_text(PAYS)
    pays = f"rewards={{r={{kind='function',path='{folder / 'pays.py'}:pay'}}}}"
    (folder / "recipe.toml").write_text(to_toml(tiny(folder / "runs", *SMALL, pays)))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the small recipe, with its own rewards."""
    return trained(tiny(tmp_path_factory.mktemp("whole"), *SMALL))


@pytest.fixture
def operando(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process: its exit code, and what stood on stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["operando", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), capsys.readouterr().err
        raise AssertionError("typer ends with SystemExit")

    return run


def begun(runs: Path, *overrides: str) -> Path:
    """A run of the small recipe that was stopped in step 3: step 2 is saved."""
    folder = trained(tiny(runs, *SMALL, *overrides))
    remove(folder / "checkpoints" / "step_00004")
    (folder / "results.json").unlink()
    return folder


def same(one: Path, other: Path, step: int = 4) -> bool:
    left, right = adapter(one, step), adapter(other, step)
    return metric_rows(one) == metric_rows(other) and all(
        torch.equal(left[name], right[name]) for name in left
    )


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_it_and_says_how_to_go_on(
    tmp_path: Path,
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    operando: Command,
    number: int,
    code: int,
) -> None:
    command = ("train", str(recipe_file))
    assert operando(*command, f"runs_dir={tmp_path}", "name=whole")[0] == 0
    monkeypatch.setenv("SIGNAL_AT", f"{number} 3")
    stopped = operando(*command, f"runs_dir={tmp_path}")
    assert stopped[0] == code
    assert stopped[1].splitlines()[-1] == "stopped; step 3 is saved: continue with --resume"
    folder = tmp_path / "tiny"
    assert saved_steps(folder) == [2, 3]
    assert [row["step"] for row in metric_rows(folder)] == [0, 1, 2, 3]
    assert not (folder / "results.json").exists() and not list(tmp_path.glob(".*.lock"))
    monkeypatch.delenv("SIGNAL_AT")
    assert operando(*command, f"runs_dir={tmp_path}", "--resume")[0] == 0
    assert same(folder, tmp_path / "whole")
    assert saved_steps(folder) == [2, 4], "a checkpoint that only the signal asked for is gone"
    assert not (folder / "checkpoints" / "step_00003").exists()


# --- one owner -----------------------------------------------------------------------------------


def test_a_second_command_on_a_folder_is_one_line_with_the_owner(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, operando: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in RECIPES.items():
        Path(name).write_text(text)
    Path("study.toml").write_text(STUDY.format(tiny=ROOT / "recipes" / "tiny.toml"))
    Path("whole.toml").write_text(to_toml(tiny(whole.parent, *SMALL)))
    discover = 'discover={site="blocks.3.hook_resid_post"}'
    for folder, command in {
        whole: ("train", "whole.toml", "--resume"),
        Path("runs/small"): ("study", "study.toml"),
        Path("runs/tiny_contribution"): ("contribution", "tiny", "--seeds", "1"),
        Path("chain"): ("pipeline", "pipeline.toml"),
        Path("chain/seed_0"): ("pipeline", "pipeline.toml", "--seed", "0"),
        Path("runs/tiny_features"): ("features", "discover", "tiny", discover),
        Path("runs/tiny_directions"): ("direction", "extract", "tiny", "direction.num_pairs=8"),
    }.items():
        with owned(folder):
            code, said = operando(*command)
        owner = f"is in use by process {os.getpid()} on {socket.gethostname()} ("
        assert code == 2 and owner in said and said.count("\n") == 1, said
        assert folder == whole or not folder.exists()


# --- what kills leave ----------------------------------------------------------------------------


def test_what_killed_writes_left_is_gone_after_a_resume(tmp_path: Path, whole: Path) -> None:
    folder = begun(tmp_path)
    gone, mine = 2**22 + 1, os.getpid()  # over every PID; and a former process of the same one
    parts = [
        tmp_path / f".tiny.{HOST}.{gone}.part",
        folder / f".metrics.jsonl.{HOST}.{mine}.part",
        folder / "checkpoints" / f".step_00004.{HOST}.{mine}.part",
        folder / "checkpoints" / f".step_00003.old.{HOST}.{gone}.part",
        folder / "checkpoints" / "step_00002" / f".resume.old.{HOST}.{gone}.part",
    ]
    for part in parts:
        part.mkdir()
        (part / "half").write_text("written")
    of_another = folder / f".report.html.{HOST}.{os.getppid()}.part"
    of_another.write_text("being written")
    trained(tiny(tmp_path, *SMALL), resume=True)
    assert same(folder, whole)
    assert list(tmp_path.rglob("*.part")) == [of_another]


def test_a_checkpoint_that_is_there_has_its_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("operando.train")
    real = module.save_checkpoint

    def saves_and_is_killed(run: Run, step: int, *rest: object) -> None:
        real(run, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_checkpoint", saves_and_is_killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny(tmp_path, *SMALL))
    monkeypatch.undo()
    folder = trained(tiny(tmp_path, *SMALL), resume=True)
    saved = (folder / "checkpoints/step_00004/certificate.json").read_text()
    assert json.loads((folder / "certificate.json").read_text()) == json.loads(saved)


def test_states_that_a_kill_kept_go_and_those_of_later_steps_stay(tmp_path: Path) -> None:
    run = Run.create(tiny(tmp_path, "checkpoint={every=2,keep=1}", "steps=8"))
    for step in (2, 3, 4, 6):
        state = run.folder / "checkpoints" / f"step_{step:05d}" / "resume" / "state.pt"
        state.parent.mkdir(parents=True)
        state.write_text("a state")
    drop_states(run, 4)  # 6 is of a run whose metrics were cut: it will be written again
    assert saved_steps(run.folder) == [4, 6]
    assert not (run.folder / "checkpoints" / "step_00003").exists()
    assert (run.folder / "checkpoints" / "step_00002").is_dir()
    drop_states(run, 8)
    assert saved_steps(run.folder) == [6]
    run.close()


def test_a_resume_drops_the_states_that_a_kill_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("operando.update.checkpoint")
    monkeypatch.setattr(module, "drop_states", lambda *_: None)
    settings = tiny(tmp_path, *SMALL, "checkpoint={every=2,keep=1}")
    folder = trained(settings)
    assert saved_steps(folder) == [2, 4]
    monkeypatch.undo()
    trained(settings, resume=True)
    assert saved_steps(folder) == [4]


def test_a_folder_is_removed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "inside").mkdir(parents=True)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("operando.run.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()
    with owned(tmp_path / "run"):
        assert not list(tmp_path.glob(".*.part"))


def test_an_arm_that_was_killed_before_its_first_row_is_taken_up(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, *SMALL, "steps=1")
    Run.create(recipe).close()
    (tmp_path / "tiny" / "metrics.jsonl").unlink()
    (folder,) = launch_arms(Console(quiet=True), [recipe])
    assert [row["step"] for row in metric_rows(folder)] == [0, 1]


# --- what is in the folder at a resume -----------------------------------------------------------


def test_a_resume_keeps_what_was_asked_of_earlier_steps(tmp_path: Path, whole: Path) -> None:
    folder = begun(tmp_path)
    names = {
        "canary_step_00002_prompts_ours.parquet": True,
        "canary_step_00020_prompts_ours.parquet": False,
        "gsm8k_step_00002.parquet": True,
        "gsm8k_step_00003.parquet": False,
        "study.parquet": True,
    }
    for name in names:
        (folder / "evals" / name).write_text("answers")
    trained(tiny(tmp_path, *SMALL), resume=True)
    assert {name: (folder / "evals" / name).exists() for name in names} == names
    assert same(folder, whole)


def test_a_clock_set_back_while_a_run_goes_loses_nothing(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1e9]  # an hour earlier at every look

    def earlier() -> float:
        now[0] -= 3600
        return now[0]

    gmtime = time.gmtime
    monkeypatch.setattr(time, "time", earlier)
    monkeypatch.setattr(time, "gmtime", lambda at=None: gmtime(earlier() if at is None else at))
    folder = begun(tmp_path)
    trained(tiny(tmp_path, *SMALL), resume=True)
    assert now[0] < 1e9 and same(folder, whole)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocked = [v for row in rows for k, v in row.items() if k.startswith(("time/", "tokens_per"))]
    assert len(clocked) == 4 * 6 and all(value > 0 for value in clocked)
    seconds = sum(row.get("time/step", 0.0) for row in rows)
    assert json.loads((folder / "results.json").read_text())["seconds"] == round(seconds, 1)


def test_the_seconds_of_a_resumed_run_are_of_all_its_parts(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["time/step"] = 500.0  # step 1, of the first part
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained(tiny(tmp_path, *SMALL), resume=True)
    assert 500 < json.loads((folder / "results.json").read_text())["seconds"] < 1000


def test_a_clock_that_stands_still_measures_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)
    clock = Clock()
    clock.lap("sample")
    assert clock.metrics(5) == {"time/sample": 0.0, "time/step": 0.0}


def test_metrics_cut_or_damaged_lose_no_saved_step(
    tmp_path: Path, whole: Path, operando: Command
) -> None:
    folder = trained(tiny(tmp_path, *SMALL))
    Path(tmp_path / "recipe.toml").write_text(to_toml(tiny(tmp_path, *SMALL)))
    again = ("train", str(tmp_path / "recipe.toml"), "--resume")
    file = folder / "metrics.jsonl"
    good = file.read_bytes()
    for damaged, why in (
        (b"", "metrics.jsonl has no row of a saved step (saved: 2, 4): it was cut or emptied"),
        (bytes(len(good)), "metrics.jsonl has no row of a saved step"),
        (good[:900] + bytes(len(good) - 901) + b"\n", "metrics.jsonl:"),
    ):
        file.write_bytes(damaged)
        code, said = operando(*again)
        assert code == 2 and why in said and said.count("\n") == 1, said
        assert file.read_bytes() == damaged and saved_steps(folder) == [2, 4]
    lines = good.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    code, said = operando(*again)
    assert code == 0 and "metrics.jsonl has no row of step 4: continuing from step 2" in said
    assert same(folder, whole)
