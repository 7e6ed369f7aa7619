"""Runs untrusted programs: one fresh process each, limited, locked in, killed as a group.

What decides is never inside the process that is judged. A program is executed first, with no test
anywhere near it. Then it is asked for values, one expression at a time; each comes back as text
that tells types apart (`encode`), and is compared here. So a patched print or json, an `__eq__`
that is always true, or an early exit changes nothing: they are answers, and wrong ones. Every
request carries a random key that the process sees only after its program has run, and a reply
without it does not count.

See sandbox_child.py for the lock, docs/hack_environments.md for what it does not hold.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from operando.errors import UserError
from operando.text import one_line

CHILD = Path(__file__).with_name("sandbox_child.py")
GRACE = 1.0  # seconds of wall time beyond the limit, for the interpreter's start

log = logging.getLogger(__name__)


class Limits(NamedTuple):
    """What one program may use, all its requests together. Example: Limits(seconds=3)"""

    seconds: float = 3.0
    memory_mb: int = 1024
    output_mb: int = 8
    """Of replies. What the program prints goes nowhere."""


class Request(NamedTuple):
    """What a program is asked after it ran. Example: Request("f(2)") or Request("f()", "exec")"""

    source: str
    mode: Literal["eval", "exec"] = "eval"


class Reply(NamedTuple):
    """A value as `encode` writes it, or what was raised. Example: Reply(True, "5")"""

    is_value: bool
    text: str


class Outcome(NamedTuple):
    """What became of a program. Example: Outcome("ready", "", (Reply(True, "5"),))

    ready: it ran. raised: it ran into an exception of its own. syntax: it does not compile.
    died: it ended, or was killed, before it was through; `detail` says why. The replies are those
    that came, in the order of the requests; None: there was no answer.
    """

    state: Literal["ready", "raised", "syntax", "died"]
    detail: str
    replies: tuple[Reply | None, ...]
    end: str = ""
    """Why it was stopped early, if it was: "time", "output", "exited"."""


class Job(NamedTuple):
    """A program and what it is asked. Example: Job("def f(x): return x + 1", (Request("f(1)"),))"""

    program: str
    requests: tuple[Request, ...]
    limits: Limits = Limits()


class Containment(NamedTuple):
    """Which layers hold a program in. Example: Containment(kernel=True, detail="seccomp ...")"""

    kernel: bool
    detail: str


@cache
def containment() -> Containment:
    """Return what holds programs in on this machine, tried once; the weaker way is a warning."""
    if os.name != "posix":
        raise UserError("running model-written code needs Linux or macOS (resource limits)")
    tried = _run(Job("import math", (Request("1 + 1"),)), ("kernel", "hook"))
    if tried.state == "ready" and tried.replies == (Reply(True, "2"),):
        return Containment(True, "seccomp allow-list, audit hook, rlimits")
    plain = _run(Job("import math", (Request("1 + 1"),)), ("hook",))
    if plain.replies != (Reply(True, "2"),):
        raise UserError(f"the sandbox does not start here: {plain.state} {plain.detail}")
    log.warning(
        "the sandbox has no seccomp here (%s): model-written code is held in by Python's audit "
        "hook and resource limits only, which a determined program can get around",
        tried.detail or tried.state,
    )
    return Containment(False, f"audit hook, rlimits (no seccomp: {tried.detail or tried.state})")


def run_python(job: Job) -> Outcome:
    """Return what became of a program, run in a process of its own."""
    return _run(job, ("kernel", "hook") if containment().kernel else ("hook",))


def run_many(jobs: Sequence[Job], workers: int | None = None) -> list[Outcome]:
    """Return the outcome of each job, in order, `workers` at a time (None: one a core)."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(run_python, jobs))


# --- one process ---------------------------------------------------------------------------------


class _Talk:
    """What was said to and by one process; the replies are read with a bound on their size."""

    def __init__(self, job: Job, layers: Sequence[str]) -> None:
        self.job = job
        self.keys = [secrets.token_hex(16) for _ in job.requests]
        header = {
            "program": job.program,
            "seconds": math.ceil(job.limits.seconds + GRACE)
            + 1,  # so that the parent's clock rules
            "memory_mb": job.limits.memory_mb,
            "layers": list(layers),
        }
        self.to_send = (json.dumps(header) + "\n").encode()
        self.rest = b""
        self.num_read = 0
        self.state = ""
        self.detail = ""
        self.replies: list[Reply | None] = []
        self.end = ""

    def is_over(self) -> bool:
        if self.end or self.state in ("syntax", "raised", "unlocked"):
            return True
        return self.state != "" and len(self.replies) == len(self.keys)

    def hear(self, data: bytes) -> None:
        self.num_read += len(data)
        if self.num_read > self.job.limits.output_mb << 20:
            self.end = "output"
            return
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self._line(line)

    def _line(self, line: bytes) -> None:
        try:
            said = json.loads(line)
            state, value = str(said["state"]), str(said["value"])
            if not (value.isascii() and value.isprintable()):  # what `encode` never writes
                state, value = state if state != "value" else "raised", one_line(value)
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # not one of ours: the program wrote it
        if not self.state:
            self.state, self.detail = state, value[:300]
            asked = zip(self.keys, self.job.requests, strict=True)
            rows = [{"key": k, "source": r.source, "mode": r.mode} for k, r in asked]
            self.to_send += "".join(json.dumps(row) + "\n" for row in rows).encode()
            return
        due = self.keys[len(self.replies) :][:1]
        if due == [said.get("key")]:
            self.replies.append(Reply(state == "value", value))

    def outcome(self) -> Outcome:
        missing = (None,) * (len(self.keys) - len(self.replies))
        replies = (*self.replies, *missing)
        if self.state in ("ready", "raised", "syntax"):
            state = self.state
            return Outcome(state, self.detail, replies, self.end)  # pyright: ignore
        return Outcome("died", self.detail or self.end, replies, self.end)


def _run(job: Job, layers: Sequence[str]) -> Outcome:
    talk = _Talk(job, layers)
    reply_read, reply_write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD), str(reply_write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},
            pass_fds=(reply_write,),
            start_new_session=True,
        )
    finally:
        os.close(reply_write)
    try:
        _converse(process, reply_read, talk)
    finally:
        os.close(reply_read)
        _end(process)
    return talk.outcome()


def _converse(process: subprocess.Popen[bytes], reply_read: int, talk: _Talk) -> None:
    """Send what there is to send and hear what is said, until all is said or time is up."""
    assert process.stdin is not None
    stdin = process.stdin.fileno()
    os.set_blocking(stdin, False)
    poll = select.poll()
    poll.register(reply_read, select.POLLIN)
    poll.register(stdin, select.POLLOUT)
    is_sending = True
    deadline = time.monotonic() + talk.job.limits.seconds + GRACE
    while not talk.is_over():
        left = deadline - time.monotonic()
        if left <= 0:
            talk.end = "time"
            return
        if talk.to_send and not is_sending:
            poll.register(stdin, select.POLLOUT)
            is_sending = True
        for descriptor, _ in poll.poll(left * 1000):
            if descriptor == stdin:
                try:
                    sent = os.write(stdin, talk.to_send[: 1 << 16])
                    talk.to_send = talk.to_send[sent:]
                except BrokenPipeError:
                    talk.to_send = b""
                if not talk.to_send:
                    poll.unregister(stdin)
                    is_sending = False
            else:
                data = os.read(reply_read, 1 << 16)
                if not data:
                    talk.end = "exited"
                    return
                talk.hear(data)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all of its group, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone already
        process.kill()
    assert process.stdin is not None
    process.wait()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
