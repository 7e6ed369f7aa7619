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
import shutil
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
CONTAINER_GRACE = 20.0  # for a container's
IMAGE = "python:3.11-slim"

log = logging.getLogger(__name__)


class Limits(NamedTuple):
    """What one program may use, all its requests together. Example: Limits(seconds=3)"""

    seconds: float = 3.0
    memory_mb: int = 1024
    output_mb: int = 8
    """Of replies. What the program prints goes nowhere."""
    sandbox: Literal["wall", "none", "docker", "podman"] = "wall"
    """See `containment`."""
    image: str = IMAGE
    """Of docker and podman: one with Python 3.11 or later as python3."""


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
    """Which layers hold a program in. Example: Containment(("kernel", "hook"), "seccomp ...")"""

    layers: tuple[str, ...]
    detail: str

    @property
    def kernel(self) -> bool:
        """Whether seccomp is one of them."""
        return "kernel" in self.layers


WALLS = {
    ("kernel", "hook"): "seccomp allow-list, audit hook, rlimits",
    ("landlock", "uid", "hook"): "Landlock, a user of its own, audit hook, rlimits",
    ("landlock", "hook"): "Landlock, audit hook, rlimits",
    ("bwrap", "hook"): "bubblewrap, audit hook, rlimits",
}
"""What can hold a program in, the narrowest first."""


@cache
def containment(sandbox: str = "wall", image: str = IMAGE) -> Containment:
    """Return what holds programs in on this machine, tried once.

    wall: the first of WALLS that stands here; none of them is a UserError. none: the same, but
    where none stands the audit hook and the limits will do, which is a warning. docker, podman: a
    container of `image` for each program.
    """
    if os.name != "posix":
        raise UserError("running model-written code needs Linux or macOS (resource limits)")
    if sandbox in ("docker", "podman"):
        if shutil.which(sandbox) is None:
            raise UserError(
                f"task.sandbox = {sandbox!r}: there is no command {sandbox} on the PATH. Install "
                'it, or leave task.sandbox out (expected "wall", "docker", "podman" or "none")'
            )
        why = _fails((sandbox, "hook"), image)
        if why:
            raise UserError(
                f"task.sandbox = {sandbox!r}: no container of {image!r} answers: {why}. Try: "
                f"{sandbox} run --rm {image} python3 -c 1"
            )
        return Containment((sandbox, "hook"), f"{sandbox} {image}, audit hook, rlimits")
    refused = []
    for layers, detail in WALLS.items():
        why = _fails(layers, image)
        if not why:
            return Containment(layers, detail)
        refused.append(f"{layers[0]}: {why}")
    told = "; ".join(refused)
    if sandbox != "none":
        raise UserError(
            f"nothing here can isolate model-written code ({told}). Install bubblewrap, use "
            'task.sandbox = "docker" or "podman", or a virtual machine with task.sandbox = "none", '
            "which leaves Python's audit hook and limits only: three lines get around them"
        )
    layers = ("uid", "hook") if os.geteuid() == 0 else ("hook",)
    why = _fails(layers, image)
    if why:
        raise UserError(f"the sandbox does not start here: {why}")
    log.warning(
        "nothing isolates model-written code here (%s): Python's audit hook and resource limits "
        "only, which a determined program can get around",
        told,
    )
    return Containment(layers, f"no wall: {', '.join(layers)}, rlimits only ({told})")


def _fails(layers: tuple[str, ...], image: str) -> str:
    """Return why a program does not run within these layers, or an empty text."""
    if layers[0] == "bwrap":
        if shutil.which("bwrap") is None:
            return "no command bwrap on the PATH"
        closed = [p for p in (sys.base_prefix, sys.prefix, str(CHILD)) if not os.access(p, os.R_OK)]
        if closed:  # of a Python that another user started and that became this one
            return f"bwrap shows the program nothing that this user may not read: {closed[0]}"
    job = Job("import math", (Request("1 + 1"),), Limits(image=image))
    tried = _run(job, layers)
    if tried.state == "ready" and tried.replies == (Reply(True, "2"),):
        return ""
    return f"{tried.state} {tried.detail}".strip()


def run_python(job: Job) -> Outcome:
    """Return what became of a program, run in a process of its own."""
    return _run(job, containment(job.limits.sandbox, job.limits.image).layers)


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
            "parent": 0 if {"docker", "podman", "bwrap"} & set(layers) else os.getpid(),
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
            if state not in ("ready", "raised", "syntax", "unlocked"):
                return
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


def command(layers: Sequence[str], limits: Limits, reply: int, name: str) -> list[str]:
    """Return the command line of a child that replies on a descriptor; a container gets a name."""
    options = ["-s", "-P", "-S", "-B"]
    match layers[0]:
        case "docker" | "podman":
            return [
                layers[0],
                "run",
                "--rm",
                "--interactive",
                f"--name={name}",
                "--network=none",
                "--read-only",
                "--cap-drop=ALL",
                "--security-opt=no-new-privileges",
                "--pids-limit=8",
                f"--memory={limits.memory_mb + 64}m",
                "--user=65534:65534",
                "--env=PYTHONHASHSEED=0",
                f"--volume={CHILD}:/sandbox_child.py:ro",
                "--workdir=/",
                limits.image,
                "python3",
                *options,
                "/sandbox_child.py",
                "1",
            ]
        case "bwrap":
            seen = ["/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix, str(CHILD)]
            binds = [word for path in seen for word in ("--ro-bind-try", path, path)]
            around = ["bwrap", "--unshare-all", "--die-with-parent", "--cap-drop", "ALL", *binds]
            around += ["--uid", "65534", "--gid", "65534", "--chdir", "/"]
        case _:
            around = []
    return [*around, sys.executable, *options, str(CHILD), str(reply)]


def _run(job: Job, layers: Sequence[str]) -> Outcome:
    talk = _Talk(job, layers)
    is_container = layers[0] in ("docker", "podman")
    name = f"operando-{secrets.token_hex(8)}"
    reply_read, reply_write = os.pipe()
    # Nothing of this environment but the fixed hash seed; a container's own command needs its own.
    around = dict(os.environ) if is_container else {}
    if layers[0] == "bwrap":
        around = {"PATH": os.environ.get("PATH", os.defpath)}
    try:
        process = subprocess.Popen(
            command(layers, job.limits, reply_write, name),
            stdin=subprocess.PIPE,
            stdout=reply_write if is_container else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={**around, "PYTHONHASHSEED": "0"},
            pass_fds=(reply_write,),
            start_new_session=True,
        )
    finally:
        os.close(reply_write)
    try:
        _converse(process, reply_read, talk, CONTAINER_GRACE if is_container else GRACE)
    finally:
        os.close(reply_read)
        _end(process)
        if is_container:  # it does not end with the command that started it
            subprocess.run([layers[0], "kill", name], capture_output=True, timeout=60, check=False)
    return talk.outcome()


def _converse(process: subprocess.Popen[bytes], reply_read: int, talk: _Talk, grace: float) -> None:
    """Send what there is to send and hear what is said, until all is said or time is up."""
    assert process.stdin is not None
    stdin = process.stdin.fileno()
    os.set_blocking(stdin, False)
    poll = select.poll()
    poll.register(reply_read, select.POLLIN)
    poll.register(stdin, select.POLLOUT)
    is_sending = True
    deadline = time.monotonic() + talk.job.limits.seconds + grace
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
