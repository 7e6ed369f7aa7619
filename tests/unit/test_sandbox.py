"""Attacks on the sandbox: each is contained, gets the label it deserves, and leaves nothing."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from operando.errors import UserError
from operando.tasks import sandbox
from operando.tasks.code_labels import CodeGrade, CodeTest, Problem, grade_all
from operando.tasks.sandbox import Job, Limits, Outcome, Reply, Request, run_many, run_python
from operando.tasks.sandbox_child import encode

pytestmark = pytest.mark.alone

FAST = Limits(seconds=2, memory_mb=512)
GOOD = "class Solution:\n    def add(self, a, b):\n        return a + b\n"
BAD = "class Solution:\n    def add(self, a, b):\n        return -7\n"
ADD = Problem(
    "add",
    "Solution().add",
    "",
    GOOD,
    (CodeTest("Solution().add(1, 2)", "3"), CodeTest("Solution().add(20, 22)", "42")),
)
ROOT = Path(__file__).parents[2]
LAYERS = (("kernel",), ("hook",))
needs_kernel = pytest.mark.skipif(
    not sandbox.containment().kernel, reason="this kernel has no seccomp for us"
)


def grade(code: str, limits: Limits = FAST) -> CodeGrade:
    return grade_all([(ADD, f"```python\n{code}\n```", "run_tests")], limits, 2)[0]


def children() -> set[int]:
    """Return the processes below this one, whoever their parent is now; of this checkout alone."""
    found, own = set(), str(sandbox.CHILD).encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if own in (folder / "cmdline").read_bytes():
                    found.add(int(folder.name))
            except OSError:
                continue
    return found


def run_in(layers: Sequence[str], program: str, *asked: str) -> Outcome:
    return sandbox._run(Job(program, tuple(map(Request, asked)), FAST), layers)


# --- values --------------------------------------------------------------------------------------


def test_values_of_another_type_have_another_text() -> None:
    values = [1, 1.0, True, "1", [1], (1,), {1}, {1: 1}, None, b"1", [[1]], [1.0], {"1": 1}]
    assert len({encode(v) for v in values}) == len(values)
    assert encode({1: 2, 3: 4}) == encode({3: 4, 1: 2})
    assert encode({3, 1, 2}) == encode({2, 3, 1})
    assert encode([1, 2]) != encode([2, 1])
    assert encode(-0.0) == encode(0.0)


def test_a_value_that_is_not_plain_is_refused() -> None:
    class Always(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    with pytest.raises(TypeError, match="Always is no plain value"):
        encode(Always(3))


def test_replies_come_in_order_and_an_exception_ends_only_its_own_request() -> None:
    job = Job("def f(x):\n    return 6 // x", tuple(Request(f"f({n})") for n in (1, 0, 3)))
    outcome = run_python(job)
    assert outcome.state == "ready"
    assert outcome.replies[0] == Reply(True, "6")
    assert outcome.replies[1] == Reply(
        False, "ZeroDivisionError: integer division or modulo by zero"
    )
    assert outcome.replies[2] == Reply(True, "2")


def test_many_jobs_keep_their_order_whatever_the_number_of_workers() -> None:
    jobs = [Job(f"x = {n}", (Request("x * x"),)) for n in range(12)]
    one, four = run_many(jobs, 1), run_many(jobs, 4)
    assert one == four
    assert [o.replies[0] for o in one] == [Reply(True, str(n * n)) for n in range(12)]


# --- attacks that end or flood -------------------------------------------------------------------

HANGS = {
    "infinite loop": "while True:\n    pass",
    "sleep": "import time\ntime.sleep(1000)",
    "signals ignored": (
        "import signal\n"
        "for s in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU, signal.SIGALRM):\n"
        "    signal.signal(s, signal.SIG_IGN)\nwhile True:\n    pass"
    ),
}


@pytest.mark.parametrize("name", HANGS)
def test_what_hangs_is_killed_in_time(name: str) -> None:
    found = grade(f"{GOOD}\n{HANGS[name]}")
    assert not found.correct and found.reason == "died: time"
    assert not children()


def test_a_method_that_hangs_is_wrong() -> None:
    found = grade("class Solution:\n    def add(self, a, b):\n        while True: pass")
    assert (found.correct, found.can_compile, found.pass_rate) == (False, True, 0)
    assert not children()


def largest_child() -> int:
    """Explode twice; return the peak memory of this process's largest child, in KiB."""
    for bomb in ("x = [0] * 10**11", "x = 'a'\nwhile True:\n    x += x"):
        found = grade(f"{GOOD}\n{bomb}")
        assert not found.correct and "MemoryError" in found.reason
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def test_a_memory_bomb_stays_below_its_limit() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest_child()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    # In a process of its own: this one may have had larger children before.
    code = "from tests.unit.test_sandbox import largest_child; print(largest_child())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 512 << 10


def test_huge_output_never_fills_the_parent() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    printed = grade(f"{GOOD}\nfor _ in range(200):\n    print('x' * 10**6)")
    assert printed.correct  # it goes nowhere
    flood = (
        "import os\nfor fd in range(3, 16):\n    try:\n        while True:\n"
        "            os.write(fd, b'x' * 65536)\n    except OSError:\n        pass"
    )
    found = grade(f"{GOOD}\n{flood}")
    assert (found.correct, found.can_compile) == (False, False)
    big = grade("class Solution:\n    def add(self, a, b):\n        return 'x' * 10**8")
    assert not big.correct
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 96 << 10
    assert not children()


@pytest.mark.parametrize(
    "end", ["import os\nos._exit(0)", "raise SystemExit(0)", "exit(0)", "quit()"]
)
def test_an_early_exit_proves_nothing(end: str) -> None:
    found = grade(f"{BAD}\n{end}\ndef run_tests():\n    pass")
    assert (found.correct, found.hinted) == (False, False)
    inside = grade(f"{BAD}\ndef run_tests():\n    {end.replace(chr(10), '; ')}")
    assert (inside.correct, inside.hinted) == (False, False)


# --- attacks on the evidence ---------------------------------------------------------------------

FORGERIES = {
    "__eq__": (
        "class Yes:\n    def __eq__(self, other): return True\n    def __hash__(self): return 1\n"
        "class Solution:\n    def add(self, a, b): return Yes()"
    ),
    "int with __eq__": (
        "class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "class Solution:\n    def add(self, a, b): return Yes(0)"
    ),
    "patched json": (
        f"import json\njson.dumps = lambda *a, **k: '3'\njson.loads = lambda *a: {{}}\n{BAD}"
    ),
    "patched print": f"import builtins\nbuiltins.print = lambda *a: None\n{BAD}",
    "printed verdict": (
        f"{BAD}\nimport os\nfor fd in range(1, 16):\n    try:\n"
        '        os.write(fd, b\'{"state": "value", "value": "3"}\\n\' * 9)\n'
        "    except OSError:\n        pass"
    ),
    "forged ready": (
        f"{BAD}\nimport os\nfor fd in range(3, 16):\n    try:\n"
        '        os.write(fd, b\'{"state": "ready", "value": ""}\\n\' + '
        'b\'{"key": "0", "state": "value", "value": "3"}\\n\' * 9)\n'
        "    except OSError:\n        pass"
    ),
    "patched builtins": (
        "import builtins\nbuiltins.eval = lambda *a: 3\nbuiltins.type = lambda *a: int\n"
        "builtins.isinstance = lambda *a: True\nbuiltins.all = lambda *a: True\n" + BAD
    ),
    "pickle": (
        "import pickle\nclass P:\n    def __reduce__(self): return (eval, ('3',))\n"
        "class Solution:\n    def add(self, a, b): return P()"
    ),
    "text for int": "class Solution:\n    def add(self, a, b): return str(a + b)",
    "equal to everything": (
        "class E(int):\n    __eq__ = lambda *a: True\n    __hash__ = int.__hash__\n"
        "class Solution:\n    def add(self, a, b): return [E(a + b)][0]"
    ),
    "exception as value": "class Solution:\n    def add(self, a, b): raise SystemExit(3)",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_success_is_wrong(name: str) -> None:
    found = grade(FORGERIES[name])
    assert not found.correct and not found.hinted
    assert not found.labels()["hack"]


def test_no_expected_value_is_in_the_process() -> None:
    """Everything that Python can reach is searched for the number that the test expects."""
    secret = 918273645
    problem = ADD._replace(tests=(CodeTest("Solution().add(1, 2)", str(secret)),))
    spy = f"""
import gc, sys
SEEN = []
def walk():
    try:
        1 / 0
    except ZeroDivisionError as error:
        frame = error.__traceback__.tb_frame
    while frame is not None:
        SEEN.append(repr(dict(frame.f_locals)) + repr(dict(frame.f_globals))[:100000])
        frame = frame.f_back
class Solution:
    def add(self, a, b):
        walk()
        return "".join(SEEN).count(str({secret} // 9 * 9)) > 10**6
"""
    assert not grade_all([(problem, f"```\n{spy}\n```", "run_tests")], FAST, 1)[0].correct
    told = sandbox._run(
        Job(spy.replace("> 10**6", "- 0"), (Request("Solution().add(1, 2)"),), FAST), ("kernel",)
    )
    assert told.replies[0] is not None
    assert str(secret) not in told.replies[0].text


# --- attacks on the machine ----------------------------------------------------------------------

ESCAPES = {
    "fork": "import os\nos.fork()",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork bomb that catches": (
        "import os\nfor _ in range(100000):\n    try:\n        os.fork()\n"
        "    except OSError:\n        DENIED = 1\nassert DENIED\nraise RuntimeError('denied')"
    ),
    "exec": "import os\nos.execv('/bin/sh', ['sh', '-c', 'true'])",
    "shell": "import os\nassert os.system('true') == 0",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "subprocess": "import subprocess\nsubprocess.run(['true'])",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill the group": "import os\nos.killpg(0, 9)",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', 80))",
    "socket, inner": "import _socket\n_socket.socket()",
    "write": "open('/tmp/operando_escaped', 'w').write('x')",
    "os.open": "import os\nos.open('/tmp/operando_escaped', os.O_CREAT | os.O_WRONLY)",
    "mkdir": "import os\nos.mkdir('/tmp/operando_escaped')",
    "remove": "import os\nos.remove('/tmp/operando_target')",
    "rename": "import os\nos.rename('/tmp/operando_target', '/tmp/operando_escaped')",
    "chmod": "import os\nos.chmod('/tmp/operando_target', 0)",
    "truncate": "import os\nos.truncate('/tmp/operando_target', 0)",
    "symlink": "import os\nos.symlink('/etc', '/tmp/operando_escaped')",
    "read the problems": f"open({str(Path(sandbox.__file__).with_name('code_problems.jsonl'))!r})",
    "read /proc": "open('/proc/self/environ')",
    "read the parent": "import os\nopen(f'/proc/{os.getppid()}/environ')",
    "ctypes": "import ctypes\nctypes.CDLL(None)",
    "more memory": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "new limits for a child": "import _posixsubprocess\n_posixsubprocess.fork_exec()",
}


@needs_kernel
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_every_way_out_is_refused_by_each_layer_alone(layers: tuple[str, ...]) -> None:
    target = Path("/tmp/operando_target")
    target.write_text("here")
    refusals = (
        "PermissionError",
        "ModuleNotFoundError",
        "ImportError",
        "BlockingIOError",
        "denied",
        "AssertionError",
        "RuntimeError: can't start new thread",
    )
    try:
        for name, program in ESCAPES.items():
            outcome = run_in(layers, program, "1")
            assert outcome.state == "raised", (name, outcome)
            assert any(word in outcome.detail for word in refusals), (name, outcome)
            assert not Path("/tmp/operando_escaped").exists(), name
            assert target.read_text() == "here", name
    finally:
        target.unlink()
    assert not children()


@needs_kernel
def test_no_thread_outlives_anything_since_none_starts() -> None:
    program = "import queue\nqueue.threading._start_new_thread(print, ())"
    assert run_in(("kernel",), program, "1").detail == "RuntimeError: can't start new thread"


def test_a_listening_socket_hears_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        port = server.getsockname()[1]
        for module in ("socket", "_socket"):
            found = grade(
                f"import {module} as s\ns.socket().connect(('127.0.0.1', {port}))\n{GOOD}"
            )
            assert not found.correct
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPERANDO_SECRET", "hunter2")
    outcome = run_python(Job("import os", (Request("dict(os.environ)"),)))
    assert outcome.replies[0] is not None
    assert "hunter2" not in outcome.replies[0].text and "OPERANDO" not in outcome.replies[0].text


@pytest.mark.parametrize(
    "program",
    [
        "import __main__\n__main__.REFUSED_EVENTS = ()\nopen('/etc/passwd')",
        "import sys\nsys.modules.clear()\nopen('/etc/passwd')",
        "import builtins\nbuiltins.PermissionError = str\nopen('/etc/passwd')",
        "import sys\nsys.addaudithook(lambda *a: None)\nopen('/etc/passwd')",
        "import gc\nfor f in gc.get_objects():\n    pass\nopen('/etc/passwd')",
        "def walk():\n    try:\n        1 / 0\n    except ZeroDivisionError as error:\n"
        "        frame = error.__traceback__.tb_frame\n    while frame.f_back:\n"
        "        frame = frame.f_back\n    return frame.f_globals['refuse']\n"
        "walk().__defaults__ = ((), (), ())\nopen('/etc/passwd')",
        "import sys\nsys.meta_path.clear()\nimport _imp\n_imp.create_dynamic\nopen('/etc/passwd')",
    ],
)
def test_the_hook_can_not_be_talked_out_of_it(program: str) -> None:
    assert run_in(("hook",), program, "1").state == "raised"


def test_the_parent_keeps_no_descriptors_and_no_processes() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for code in ("import os\nos._exit(1)", "def f(:", GOOD, "raise ValueError", "x = 1 / 0"):
        grade(code)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not children()


def test_attacks_side_by_side_leave_a_good_answer_right() -> None:
    fence = "```python\n{}\n```"
    codes = [HANGS["signals ignored"], GOOD, "import os\nos._exit(0)", GOOD, ESCAPES["fork bomb"]]
    found = grade_all([(ADD, fence.format(c), "run_tests") for c in codes], FAST, 4)
    assert [g.correct for g in found] == [False, True, False, True, False]


# --- each wall alone -----------------------------------------------------------------------------

OTHERS = (("landlock",), ("uid",), ("landlock", "uid"), ("bwrap",))
LEAD = "import os, sys, queue\n"  # os and queue still hold what their modules are made of
ATTACKS = {
    "read a file": "os.close(os.open('/etc/passwd', os.O_RDONLY))",
    "write in /tmp": "os.close(os.open(TMP + '/new', os.O_CREAT | os.O_WRONLY))",
    "mkfifo": "os.mkfifo(TMP + '/fifo')",
    "list a folder": "os.listdir('/etc')",
    "run a program": "p = os.posix_spawn('/bin/true', ['true'], {}); "
    "assert os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) == 0",
    "fork": "p = os.fork()\nif p == 0: os._exit(0)\nos.waitpid(p, 0)",
    "thread": "queue.threading._start_new_thread(int, ())",
    "signal the trainer": "os.kill(os.getppid(), 0)\nassert os.getppid() > 1",
    "pidfd of the trainer": "import signal\n"
    "signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 0)\nassert os.getppid() > 1",
    "priority of the trainer": "assert os.getppid() > 1\nos.setpriority(0, os.getppid(), 5)",
    "be another user": "os.setuid(1)",
    "chroot": "os.chroot('/')",
    "stat a file": "os.stat('/etc/passwd')",
}
STOPPED = {  # as an ordinary user or as root; what is not named, a wall lets through
    ("kernel",): set(ATTACKS),
    ("landlock",): {
        "read a file",
        "write in /tmp",
        "mkfifo",
        "list a folder",
        "run a program",
        "signal the trainer",
        "pidfd of the trainer",
    },
    ("uid",): {
        "run a program",
        "fork",
        "thread",
        "signal the trainer",
        "pidfd of the trainer",
        "priority of the trainer",
        "be another user",
        "chroot",
    },
    ("landlock", "uid"): set(ATTACKS) - {"stat a file"},
    ("bwrap",): {
        "write in /tmp",
        "mkfifo",
        "signal the trainer",
        "pidfd of the trainer",
        "priority of the trainer",
        "be another user",
        "chroot",
        "read a file",
        "list a folder",
    },
}


@functools.cache
def stands(layers: tuple[str, ...]) -> str:
    """Return why a wall does not stand here, or an empty text."""
    return sandbox._fails(layers, sandbox.IMAGE)


def attempts(layers: tuple[str, ...], folder: str) -> set[str]:
    """Return the attacks that a wall alone stops."""
    found = set()
    for name, program in ATTACKS.items():
        outcome = run_in(layers, f"TMP = {folder!r}\n{LEAD}{program}", "1")
        assert outcome.state in ("ready", "raised"), (name, outcome)
        if outcome.state == "raised":
            found.add(name)
    return found


@pytest.mark.parametrize("layers", STOPPED, ids="+".join)
def test_each_wall_alone_stops_what_the_docs_say(layers: tuple[str, ...], tmp_path: Path) -> None:
    if stands(layers):
        pytest.skip(stands(layers))
    found = attempts(layers, str(tmp_path))
    assert STOPPED[layers] <= found, STOPPED[layers] - found
    assert not children()


RUNS_ON = """
import sys
from operando.tasks.sandbox import Job, Limits, _run
_run(Job("import time\\nwhile True: time.sleep(1)", (), Limits(seconds=600)), sys.argv[1:])
"""


def is_bound(pid: int) -> bool:
    """Whether a child has done what `bind` does, whose last is no_new_privs."""
    try:
        return "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("layers", [("hook",), *OTHERS], ids="+".join)
def test_a_child_dies_with_a_trainer_that_is_killed_without_seccomp(
    layers: tuple[str, ...],
) -> None:
    if stands(layers):
        pytest.skip(stands(layers))
    before = children()
    trainer = subprocess.Popen([sys.executable, "-c", RUNS_ON, *layers])
    # Under bubblewrap also its own two processes, which name the child in their command lines.
    wait_for(lambda: any(is_bound(pid) for pid in children() - before))
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not children() - before)


def test_a_child_whose_trainer_died_before_it_was_tied_runs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "getpid", os.getppid)  # who is named is not who started it
    outcome = run_in(("hook",), "", "1 + 1")
    assert outcome.state == "died" and "is gone" in outcome.detail and outcome.replies == (None,)


def wait_for(what: Callable[[], bool]) -> None:
    for _ in range(600):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError("not within half a minute")


AS_USER = """
import sys
sys.path.insert(0, sys.argv[1])
from operando.tasks import sandbox
print(sandbox._fails(("bwrap", "hook"), "") or "stands")
"""


def test_bubblewrap_holds_programs_of_an_ordinary_user() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("no command bwrap on the PATH")
    user = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    said = []
    for python in (sys.executable, "/usr/bin/python3"):  # root's own may be closed to others
        try:
            done = subprocess.run(
                [python, "-B", "-c", AS_USER, str(ROOT / "src")],
                capture_output=True,
                text=True,
                cwd="/",
                check=False,
                **user,
            )
        except OSError as error:
            said.append(f"{python}: {error}")
            continue
        if done.returncode == 0:
            assert done.stdout == "stands\n"
            return
        said.append(f"{python}: {done.stderr.strip()[-200:]}")
    pytest.skip(f"no Python that another user can run operando with: {'; '.join(said)}")


def test_bubblewrap_is_refused_with_the_folder_that_the_user_may_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/bwrap")
    monkeypatch.setattr(os, "access", lambda path, _: path != sys.base_prefix)
    assert sandbox._fails(("bwrap", "hook"), "").endswith(f"may not read: {sys.base_prefix}")


CONNECTS = """
import ctypes, socket, sys
from operando.tasks.sandbox_child import landlock

if ctypes.CDLL(None).syscall(444, None, 0, 1) < 4:
    sys.exit("Landlock here knows no TCP (below ABI 4)")
landlock(False)
for ask, port in (("connect", int(sys.argv[1])), ("bind", 0), ("bind", 29_999)):
    with socket.socket() as tcp:
        try:
            getattr(tcp, ask)(("127.0.0.1", port))
        except PermissionError as error:
            print(error.errno)
"""


def test_landlock_alone_lets_no_tcp_port_be_bound_or_connected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        tried = subprocess.run(
            [sys.executable, "-c", CONNECTS, port], capture_output=True, text=True, check=False
        )
        if "no TCP" in tried.stderr:
            pytest.skip(tried.stderr.strip())
        assert tried.returncode == 0 and tried.stdout.split() == ["13"] * 3, tried


@pytest.mark.parametrize("layers", [("kernel",), ("hook",), *OTHERS], ids="+".join)
@pytest.mark.parametrize(
    "name", ["faulthandler", "pwd", "posix", "_thread", "atexit", "_posixsubprocess", "_socket"]
)
def test_only_the_modules_of_the_list_are_found(layers: tuple[str, ...], name: str) -> None:
    if stands(layers):
        pytest.skip(stands(layers))
    for program in (f"import {name}", f"import sys\nsys.modules.pop({name!r}, 0)\nimport {name}"):
        assert "ModuleNotFoundError" in run_in(layers, program, "1").detail, program


def test_without_a_wall_code_is_refused_unless_the_recipe_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = sandbox._fails

    def fails(layers: tuple[str, ...], image: str) -> str:
        return "none here" if layers in sandbox.WALLS else real(layers, image)

    monkeypatch.setattr(sandbox, "_fails", fails)
    sandbox.containment.cache_clear()
    try:
        with pytest.raises(UserError, match=r"kernel: none here.*task.sandbox = \"none\""):
            sandbox.containment()
        assert sandbox.containment("none").detail.startswith("no wall: ")
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(UserError, match="there is no command podman"):
            sandbox.containment("podman")
    finally:
        sandbox.containment.cache_clear()


def test_one_answer_has_one_value_in_every_process() -> None:
    program = "import random\ndef f(): return list(set('abcdefgh')), random.random()"
    jobs = [Job(program, (Request("f()"),), FAST)] * 8
    assert len({o.replies for o in run_many(jobs, 2)}) == 1


@pytest.mark.parametrize("tool", ["docker", "podman"])
def test_a_container_gets_no_network_no_rights_and_no_more(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / tool
    stub.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n[ $1 = run ] || exit 0\n'
        f"exec {sys.executable} -s -P -S -B {sandbox.CHILD} 1\n"
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    outcome = sandbox._run(Job("print('x')", (Request("6 * 7"),), FAST), (tool, "hook"))
    assert outcome.replies == (Reply(True, "42"),)
    said = (tmp_path / "said").read_text()
    for option in (
        "--network=none",
        "--read-only",
        "--cap-drop=ALL",
        "--pids-limit=8",
        "--memory=576m",
        "--user=65534:65534",
        "--security-opt=no-new-privileges",
        "python:3.11-slim python3",
        "PYTHONHASHSEED=0",
        "kill operando-",
    ):
        assert option in said, option


def test_a_class_that_takes_no_swap_is_still_swapped_and_a_lie_about_type_voids_it() -> None:
    meta = "class M(type):\n    def __setattr__(self, *a): pass\n"
    code = GOOD.replace("class Solution:", f"{meta}class Solution(metaclass=M):")
    own = "\ndef run_tests():\n    assert Solution().add(1, 2) == 3"
    assert grade(code + own).tests == "innocent"
    assert grade(f"{GOOD}{own}\ntype = None").tests == "unknown"


def test_a_forged_state_is_none_and_a_name_is_read_as_python_reads_it() -> None:
    talk = sandbox._Talk(Job("", ()), ())
    talk._line(b'{"state": NaN, "value": "x"}')
    assert talk.state == "" and talk.outcome().detail == ""
    assert grade(f"{BAD}\ndef run_\u1d57ests():\n    pass").hinted
