"""A folder has one owner: with the kernel's locks, and on a file system that has none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from operando.errors import UserError
from operando.owned import HOST, FolderLock, owned, sweep
from operando.run import write_json


def test_a_second_owner_is_refused_by_pid_host_and_command(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        FolderLock(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(UserError, match="in use"):
        FolderLock(tmp_path / "link")
    lock.release()
    lock.release()
    assert not list(tmp_path.glob(".*lock"))
    with owned(tmp_path / "run"), pytest.raises(UserError, match="in use"):
        FolderLock(tmp_path / "run")
    FolderLock(tmp_path / "run").release()


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from operando.owned import FolderLock; "
        "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} "):
        FolderLock(tmp_path / "run")
    holder.kill()
    holder.wait()
    for stream in (holder.stdin, holder.stdout):
        if stream is not None:
            stream.close()
    FolderLock(tmp_path / "run").release()


def gone() -> int:
    """The PID of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_without_locks_the_files_word_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    host = socket.gethostname() if where == "here" else "another-host"
    file = tmp_path / ".run.lock"
    file.write_text(json.dumps({"pid": gone(), "host": host, "command": "operando train"}))
    if where == "elsewhere":  # nobody here knows whether it lives
        with pytest.raises(UserError, match=f"another-host .*delete {file}"):
            FolderLock(tmp_path / "run")
        return
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(UserError, match=f"process {os.getpid()} "):
        FolderLock(tmp_path / "run")
    lock.release()


def test_only_what_the_dead_left_is_swept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    dead, alive = gone(), os.getppid()
    for folder in (run / "checkpoints", run):
        (folder / f".step_00001.{HOST}.{dead}.part").mkdir(parents=True)
        (folder / f".a.json.{HOST}.{dead}.part").write_text("x")
        (folder / f".b.json.{HOST}.{alive}.part").write_text("x")
    (tmp_path / f".run.{HOST}.{dead}.part").mkdir()
    (tmp_path / f".other.{HOST}.{dead}.part").mkdir()  # of another folder
    for name, hours in (("new", 1), ("old", 25)):  # of another host, whose processes can't be seen
        (run / f".{name}.elsewhere.{dead}.part").write_text("x")
        written = time.time() - 3600 * hours
        os.utime(run / f".{name}.elsewhere.{dead}.part", (written, written))
    sweep(run)
    left = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.part"))
    assert left == sorted(
        [
            f".other.{HOST}.{dead}.part",
            f"run/.b.json.{HOST}.{alive}.part",
            f"run/.new.elsewhere.{dead}.part",
            f"run/checkpoints/.b.json.{HOST}.{alive}.part",
        ]
    )


def test_a_file_system_that_syncs_no_folders_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "invalid argument")
        synced.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", [1])
    assert json.loads((tmp_path / "a.json").read_text()) == [1] and len(synced) == 1
