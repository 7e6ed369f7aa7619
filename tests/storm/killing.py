"""A command that is killed and taken up again until it ends, and what it leaves, compared.

Kills come in three ways: at a random moment; before a random file operation (opening for writing,
renaming, deleting), which reaches inside of checkpoints; and in a process of its own within the
first imports. Commands run in forks of a parent that has imported the library and run nothing.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
CLOCK_KEYS = ("started", "seconds", "tokens_per_second", "command", "written", "history", "git")
HELD = "is in use by|is still being trained"  # by what a kill of the leader alone left over
TRIES = 60


@dataclass(frozen=True)
class Case:
    """A command of the storm.

    `prepare` fills an empty folder with what the command needs; `command` says how to begin or go
    on in a folder, None once nothing is left to do. `code` is the exit code of an end that is well.
    """

    name: str
    prepare: Callable[[], object]
    command: Callable[[], list[str]]
    code: int = 0
    kills: int = 20
    seconds: float = 50  # a share of the storm's time
    leader: bool = False  # some kills are of the first process alone: its children live on


@dataclass
class Tally:
    """What a case came to."""

    kills: dict[str, int] = field(default_factory=dict)
    rounds: int = 0
    compared: int = 0
    faults: list[str] = field(default_factory=list)


class Fork:
    """A command in a fork of this process and in a session of its own; output goes to `log`."""

    def __init__(self, job: Callable[[], int], folder: Path, log: Path, stop_at: int = 0) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            _in_child(job, folder, log, stop_at)

    def wait(self, until: float | None = None) -> int | None:
        """Return the exit code (negative: the signal), or None at the time `until`."""
        while True:
            pid, status = os.waitpid(self.pid, 0 if until is None else os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            assert until is not None
            if time.monotonic() >= until:
                return None
            time.sleep(0.002)

    def kill(self, leader: bool = False) -> None:
        """Kill the command with all its children, or its first process alone."""
        os.kill(self.pid, signal.SIGKILL)
        if not leader:
            with suppress(ProcessLookupError):  # killed before it had a session of its own
                os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _in_child(job: Callable[[], int], folder: Path, log: Path, stop_at: int) -> NoReturn:
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        if stop_at:
            _die_before(stop_at, folder)
        code = job()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_before(number: int, folder: Path) -> None:
    """Kill this process group before its file operation of that number within the folder."""
    left, inside = number, str(folder)

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & WRITING:
                return
        elif event not in OPERATIONS:
            return
        if isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.join(os.getcwd(), os.fsdecode(args[0]))
            if not path.startswith(inside):
                return
        left -= 1
        if left == 0:
            os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)


def operando(args: Sequence[str]) -> Callable[[], int]:
    """Return a job that runs the command line in this process."""

    def job() -> int:
        from operando.cli import main

        sys.argv = ["operando", *args]
        try:
            main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        return 0

    return job


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def storm(case: Case, scratch: Path, kills: int, seconds: float, seed: int) -> Tally:
    """Run a case whole, then again and again with kills, until the kills or the seconds are spent.

    A round ends with a run that ends by itself, whose files are then compared with the whole one's.
    """
    rng, tally, deadline = random.Random(f"{seed}/{case.name}"), Tally(), time.monotonic() + seconds
    start, whole, log = scratch / "start", scratch / "whole" / "at", scratch / "log"
    start.mkdir(parents=True)
    assert Fork(lambda: int(case.prepare() is False), start, log).wait() == 0, log.read_text()
    shutil.copytree(start, whole)
    began = time.monotonic()
    code = Fork(operando(_command(case, whole)), whole, log).wait()
    length = time.monotonic() - began
    assert code == case.code, log.read_text()
    while sum(tally.kills.values()) < kills and time.monotonic() < deadline:
        folder = scratch / f"round{tally.rounds}" / "at"
        shutil.copytree(start, folder)
        tally.rounds += 1
        found = _round(case, folder, log, rng, tally, length, kills)
        if not found:
            found = _compare(whole, folder, log)
            tally.compared += not found
        tally.faults += [f"{case.name}, round {tally.rounds}: {line}" for line in found]
        if found:
            break  # its folder is left to be looked at
        shutil.rmtree(folder.parent)
    return tally


def _round(
    case: Case, folder: Path, log: Path, rng: random.Random, tally: Tally, length: float, kills: int
) -> list[str]:
    """Kill and take up until the command ends by itself; return what went wrong."""
    for attempt in range(TRIES):
        command = _command(case, folder)
        way = rng.choices(("moment", "operation", "import", "leader"), (4, 6, 1, 2 * case.leader))[
            0
        ]
        if sum(tally.kills.values()) >= kills or attempt > 2 * case.kills:
            way = "none"
        if way == "import":
            _kill_while_importing(command, folder, rng.uniform(0.0, 3.0))
            tally.kills[way] = tally.kills.get(way, 0) + 1
            continue
        stop_at = 1 + int(rng.expovariate(1 / 25)) if way == "operation" else 0
        fork = Fork(operando(command), folder, log, stop_at)
        moment = way in ("moment", "leader")
        code = fork.wait(time.monotonic() + rng.uniform(0.0, 0.9 * length) if moment else None)
        if code is None:
            fork.kill(way == "leader")
        if code is None or code == -signal.SIGKILL:
            tally.kills[way] = tally.kills.get(way, 0) + 1
        elif code == case.code:
            return []
        elif re.search(HELD, log.read_text()):
            time.sleep(2)  # a child of a killed leader goes on to its own end
        else:
            said = log.read_text(errors="replace").strip().splitlines()[-12:]
            return [f"exit code {code} of {' '.join(command)}", *said]
    return [f"no end in {TRIES} tries"]


def _command(case: Case, folder: Path) -> list[str]:
    with working_in(folder):
        return case.command()


def _kill_while_importing(command: Sequence[str], folder: Path, after: float) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "operando", *command],
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        time.sleep(after)
        os.killpg(process.pid, signal.SIGKILL)


# --- what is compared ----------------------------------------------------------------------------


def _compare(one: Path, other: Path, log: Path) -> list[str]:
    """Return the files in which two folders differ, apart from what a clock wrote."""

    def job() -> int:
        found = differing(one, other)
        sys.stdout.write("\n".join(found))
        return len(found) > 0

    code = Fork(job, other, log).wait()
    return log.read_text().splitlines() if code else []


def differing(one: Path, other: Path) -> list[str]:
    """Return a line for every file that is in one folder alone, or that holds something else."""
    left, right = _files(one), _files(other)
    lines = [f"only of the whole run: {name}" for name in sorted(left - right)]
    lines += [f"only of the killed run: {name}" for name in sorted(right - left)]
    return lines + [
        f"differs: {name}{_where(one / name, other / name)}"
        for name in sorted(left & right)
        if not _same(one / name, other / name)
    ]


def _files(folder: Path) -> set[str]:
    found = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    return {name for name in found if not re.search(r"\.(lock|log)$|code\.diff$", name)}


def _same(one: Path, other: Path) -> bool:
    import torch
    from safetensors.torch import load_file

    match one.suffix:
        case ".pt":
            return _equal(*(torch.load(f, weights_only=True) for f in (one, other)))
        case ".safetensors":
            return _equal(load_file(one), load_file(other))
        case ".parquet":
            import pyarrow.parquet as pq

            # Through the rows: a NaN is no equal of itself in a table.
            return repr(pq.read_table(one).to_pydict()) == repr(pq.read_table(other).to_pydict())
        case ".json" | ".jsonl":
            return _values(one) == _values(other)
        case _:
            return one.read_bytes() == other.read_bytes()


def _equal(one: object, other: object) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(_equal(value, other[key]) for key, value in one.items())
        )
    if isinstance(one, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(one) == len(other)
            and all(_equal(a, b) for a, b in zip(one, other, strict=True))
        )
    return one == other


def _values(file: Path) -> list[object]:
    text = file.read_text()
    return [
        _without_clock(json.loads(part))
        for part in (text.splitlines() if file.suffix == ".jsonl" else [text])
    ]


def _without_clock(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: _without_clock(inner)
            for key, inner in value.items()
            if key not in CLOCK_KEYS and not str(key).startswith("time/")
        }
    return [_without_clock(inner) for inner in value] if isinstance(value, list) else value


def _where(one: Path, other: Path) -> str:
    if one.suffix not in (".json", ".jsonl"):
        return ""
    from operando.run import differences

    rows = zip(_values(one), _values(other), strict=False)
    found = [line for a, b in rows for line in differences(a, b)]
    return f": {'; '.join(found)[:400]}"
