"""A folder that is written has one owner: a lock beside it names the process and its host.

The lock is the kernel's (flock; on NFS a lock of the server, which other hosts see), so that
whatever ends the owner frees it. A file system without locks is taken at the word of the file:
its owner is gone if it was of this host and no such process is there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from operando.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
HOST = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:40]
PART = re.compile(r"\..+\.([A-Za-z0-9_-]+)\.(\d+)\.part")  # .NAME.HOST.PID.part
LONG_AGO = 24 * 3600  # seconds after which a write of another host is taken to be dead


class FolderLock:
    """Held from its making to `release`. Example: lock = FolderLock(Path("runs/demo"))

    Raises UserError, with the owner, if another process (or another lock of this one) holds it.
    What killed writes left in the folder is removed.
    """

    def __init__(self, folder: Path) -> None:
        folder = Path(os.path.realpath(folder))
        self.file = folder.parent / f".{folder.name}.lock"
        self._descriptor: int | None = None
        held = _locked(folder, self.file)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)}
        os.truncate(held, 0)
        os.pwrite(held, json.dumps(owner).encode("utf-8", "replace"), 0)
        self._descriptor = held
        sweep(folder)

    def release(self) -> None:
        """Give the folder back; a second time does nothing."""
        if self._descriptor is None:
            return
        with suppress(
            OSError
        ):  # a disk that has become read-only; a file that nobody holds is none
            self.file.unlink(missing_ok=True)  # while held: who waits for it opens a new one
        os.close(self._descriptor)
        self._descriptor = None

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a folder, which need not be there yet, for the length of a block."""
    lock = FolderLock(folder)
    try:
        yield
    finally:
        lock.release()


def part_of(target: Path) -> Path:
    """Return where this process writes a file or folder before it gets its name."""
    return target.parent / f".{target.name}.{HOST}.{os.getpid()}.part"


def sweep(folder: Path) -> None:
    """Remove what killed writes left, at any depth: of processes of this host that are gone, and
    of other hosts a day after the last write, since their processes can't be seen from here.

    This process has begun no write there: its own PID is that of one before it (in a container,
    where every start may have the same).
    """
    for part in [*folder.parent.glob(f".{folder.name}.*.part"), *folder.glob("**/.*.part")]:
        named = PART.fullmatch(part.name)
        if named is None or _is_written(part, named[1], int(named[2])):
            continue
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _is_written(part: Path, host: str, pid: int) -> bool:
    """Return whether a process may still be writing it."""
    if host == HOST:
        return pid != os.getpid() and is_alive(pid)
    try:
        return time.time() - part.stat().st_mtime < LONG_AGO
    except FileNotFoundError:  # it has got its name
        return True


def is_alive(pid: int) -> bool:
    """Return whether this host has such a process."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _locked(folder: Path, file: Path) -> int:
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"can't write beside {folder}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder, descriptor) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            if _has_owner(descriptor):
                raise _in_use(folder, descriptor, f"; if it is gone, delete {file}") from None
        if _is_same(descriptor, file):
            return descriptor
        os.close(descriptor)  # the owner before gave it back in between


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> dict[str, object]:
    try:
        owner = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:  # empty, or cut by a kill
        return {}
    return owner if isinstance(owner, dict) else {}


def _has_owner(descriptor: int) -> bool:
    owner = _owner(descriptor)
    pid = owner.get("pid")
    if not isinstance(pid, int):
        return False
    return owner.get("host") != socket.gethostname() or is_alive(pid)


def _in_use(folder: Path, descriptor: int, remedy: str = "") -> UserError:
    owner = _owner(descriptor)
    os.close(descriptor)
    return UserError(
        f"{folder} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')} "
        f"({owner.get('command', '?')}): wait for its end, or stop it{remedy}"
    )
