"""Ctrl-C and SIGTERM in the commands that go on by themselves: nothing half-written, nothing lost.

Each command runs whole, then with a signal before one of its file operations, then to its end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from operando.cli import main
from operando.study import arms
from tests.integration.runs import metric_rows
from tests.storm.cases import CASES
from tests.storm.killing import OPERATIONS, WRITING, differing

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAYS = "interrupted; run the same command again to continue (train: with --resume)"
Hook = Callable[[str, tuple[object, ...]], None]
hooks: list[Hook] = []  # of the one audit hook of this process, which can't be taken back


def _hook(event: str, args: tuple[object, ...]) -> None:
    for hook in tuple(hooks):
        hook(event, args)


@pytest.fixture(scope="module", autouse=True)
def audited() -> None:
    sys.addaudithook(_hook)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command line sets handlers of its own; what follows has the former again."""
    former = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    hooks.clear()
    for number, handler in former.items():
        signal.signal(number, handler)


def operando(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The command line in this process: its exit code, and what stood on stderr."""
    capsys.readouterr()
    sys.argv = ["operando", *args]
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), capsys.readouterr().err


def file_operations(folder: Path, then: Callable[[int], None]) -> Hook:
    """A hook that calls `then` with a count before every write, rename or removal in a folder."""
    count = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if not writes and event not in OPERATIONS:
            return
        if isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.join(os.getcwd(), os.fsdecode(args[0]))
            if path.startswith(str(folder)) and not path.endswith(".lock"):
                count += 1
                then(count)

    return hook


def leftovers(folder: Path) -> list[Path]:
    return [f for f in folder.rglob(".*") if f.suffix in (".part", ".lock")]


@pytest.mark.parametrize("name", ["sae train", "drift", "features discover"])
def test_a_signal_before_a_write_leaves_nothing_half_written_and_nothing_is_lost(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (case,) = [case for case in CASES if case.name == name]
    whole, cut, seen = tmp_path / "whole" / "at", tmp_path / "cut" / "at", [0]
    whole.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(whole)
    case.prepare()
    shutil.copytree(whole, cut)
    hooks.append(file_operations(whole, lambda count: seen.__setitem__(0, count)))
    assert operando(case.command(), capsys)[0] == case.code
    hooks.clear()
    assert seen[0] >= 3, "the command writes"
    monkeypatch.chdir(cut)
    for (number, code), at in zip(
        SIGNALS.items(), (1 + seen[0] // 3, 1 + seen[0] // 6), strict=True
    ):

        def send(count: int, at: int = at, number: int = number) -> None:
            if count == at:
                os.kill(os.getpid(), number)

        hooks.append(file_operations(cut, send))
        assert operando(case.command(), capsys) == (code, f"{SAYS}\n")
        hooks.clear()
        assert not leftovers(cut)
    assert operando(case.command(), capsys)[0] == case.code
    assert differing(whole, cut) == []


def test_a_study_that_is_stopped_stops_its_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (case,) = [case for case in CASES if case.name == "study --jobs 2"]
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    case.prepare()
    real, started = arms.time.sleep, []

    def sleep(seconds: float) -> None:
        real(seconds)
        if list(tmp_path.glob("runs/small/*/metrics.jsonl")):
            os.kill(os.getpid(), signal.SIGTERM)

    def start(*given: object) -> object:
        started.append(arms.start_process(*given))
        return started[-1]

    with monkeypatch.context() as patch:
        patch.setattr(arms.time, "sleep", sleep)
        patch.setattr(arms.LocalRunner, "start", lambda r, *given: start(*given, r.threads))
        assert operando(case.command(), capsys) == (143, f"{SAYS}\n")
    assert len(started) == 2 and all(run.returncode is not None for run in started)
    assert not leftovers(tmp_path) and not list(tmp_path.glob("runs/small/study.md"))
    assert operando(case.command(), capsys)[0] == case.code
    rows = [metric_rows(file.parent) for file in tmp_path.glob("runs/small/*/results.json")]
    assert [[row["step"] for row in run] for run in rows] == [[0, 1, 2, 3]] * 4
