"""The process that runs an untrusted program. Standard library only; started by sandbox.py.

It reads one line (limits and program) from its standard input, limits itself, imports what the
program may need, locks itself in, executes the program and says "ready". Then it answers one
request a line: an expression to evaluate, or statements to execute, in the program's namespace.

Locked in means a wall of the kernel's and one of the interpreter's. The kernel's is a seccomp
allow-list of system calls (Linux on x86-64), which a process can't take back: opening any file, any
socket, starting or signalling any process, another limit is not on it. Where there is none it is
Landlock (no file, no TCP, no signal), with a user id of its own where this is root, or a container
around this process. The interpreter's is an audit hook that refuses the same events. Since nothing
can be opened, modules are imported before the lock closes.

The hash seed is fixed (by sandbox.py) and so is `random`'s; what a program still sees of chance is
the clock, its process id, addresses (`id`) and os.urandom.
"""

from __future__ import annotations

import ast
import collections
import json
import os
import resource
import sys

MODULES = frozenset({
    "__future__", "abc", "array", "base64", "bisect", "builtins", "calendar", "cmath",
    "collections", "collections.abc", "contextlib", "copy", "dataclasses", "datetime", "decimal",
    "enum", "fractions", "functools", "hashlib", "heapq", "io", "itertools", "json", "math",
    "numbers", "operator", "os", "pprint", "queue", "random", "re", "statistics", "string",
    "struct", "sys", "textwrap", "time", "traceback", "types", "typing", "unittest", "zlib",
    "pickle", "signal", "inspect", "gc",
})  # fmt: skip
"""What a program may import; anything else is not found."""

REPLY_FD = int(sys.argv[1]) if __name__ == "__main__" else -1
# Linux x86-64: the calls that computing needs. No open, socket, fork, exec, kill, prctl, ptrace.
SYSCALLS = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "pause": 34,
    "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "exit": 60,
    "uname": 63, "getcwd": 79, "gettimeofday": 96, "getrusage": 98, "times": 100, "getuid": 102,
    "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "sigaltstack": 131,
    "gettid": 186, "futex": 202, "sched_getaffinity": 204, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "getrandom": 318,
}  # fmt: skip
AUDIT_X86_64 = 0xC000003E
REFUSED_EVENTS = (
    "open", "os.", "socket.", "subprocess.", "ctypes.", "shutil.", "tempfile.", "glob.", "fcntl.",
    "mmap.", "pty.", "signal.pthread_kill", "resource.", "syslog.", "_thread.", "winreg.",
    "gc.get_", "sys._current_", "sys.settrace", "sys.setprofile",
    "sys.addaudithook", "pathlib.", "urllib.", "ftplib.",
    "http.", "smtplib.", "webbrowser.", "sqlite3.", "marshal.", "cpython.run_",
)  # fmt: skip
# What the import system and dataclasses do themselves.
HARMLESS_EVENTS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
HIDDEN = (
    "_imp",
    "_posixshmem",
    "_posixsubprocess",
    "_signal",
    "_socket",
    "_testcapi",
    "_thread",
    "atexit",
    "faulthandler",
    "fcntl",
    "grp",
    "marshal",
    "mmap",
    "nis",
    "posix",
    "pwd",
    "readline",
    "resource",
    "select",
    "spwd",
    "syslog",
    "termios",
    "__main__",
)
"""Modules that are loaded already, or built in, and are not for the program."""


# --- values --------------------------------------------------------------------------------------


def encode(value: object) -> str:
    """Return a value as text; two values have the same text only if they are equal in type too.

    Plain values only: 1, 1.0 and True differ, and so do a list and a tuple. The order of a dict
    or a set does not matter. Linked lists and trees are their class name and their attributes.
    A value that is none of these is a TypeError.
    Example: encode((1, 2.0)) == '{"t":[1,{"f":"2.0"}]}'
    """
    return json.dumps(_plain(value), separators=(",", ":"), sort_keys=True)


def _plain(value: object) -> object:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return {"f": repr(value + 0.0)}  # -0.0 is 0.0  # pyright: ignore[reportOperatorIssue]
    if kind is list:
        return [_plain(v) for v in value]  # pyright: ignore[reportGeneralTypeIssues]
    if kind is tuple:
        return {"t": [_plain(v) for v in value]}  # pyright: ignore[reportGeneralTypeIssues]
    if kind is set or kind is frozenset:
        return {"s": sorted(map(encode, value))}  # pyright: ignore[reportArgumentType]
    if kind in (dict, collections.Counter, collections.defaultdict, collections.OrderedDict):
        pairs = [(encode(k), _plain(v)) for k, v in value.items()]  # pyright: ignore
        return {"d": sorted(pairs, key=lambda pair: pair[0])}
    if kind is bytes or kind is complex:
        return {"r": repr(value)}
    if sorted(getattr(value, "__dict__", {})) == ["next", "val"]:
        return {"n": _chain(value)}
    if sorted(getattr(value, "__dict__", {})) == ["left", "right", "val"]:
        return {"o": [kind.__name__, _plain(vars(value))]}
    raise TypeError(f"{kind.__name__} is no plain value")


def _chain(node: object) -> list[object]:
    values: list[object] = []
    while node is not None:
        values.append(_plain(node.val))  # pyright: ignore[reportAttributeAccessIssue]
        node = node.next  # pyright: ignore[reportAttributeAccessIssue]
        if len(values) > 100_000:
            raise TypeError("a linked list that does not end")
    return values


# --- the lock ------------------------------------------------------------------------------------


def limit(seconds: int, memory_mb: int) -> None:
    """Set the limits of this process; none of them can be raised again once it is locked in."""
    memory = [] if sys.platform == "darwin" else [(resource.RLIMIT_AS, memory_mb << 20)]
    for what, value in (
        *memory,  # macOS has no such limit
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_STACK, 64 << 20),
    ):
        _, hard = resource.getrlimit(what)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def imported(program: str) -> set[str]:
    """Return the modules that a program's import statements name, if they may be imported."""
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names & MODULES


def refuse(
    event: str,
    args: tuple[object, ...],
    refused: tuple[str, ...] = REFUSED_EVENTS,  # defaults: a module's globals could be changed
    harmless: tuple[str, ...] = HARMLESS_EVENTS,
    modules: frozenset[str] = MODULES,
    set_again: tuple[str, ...] = ("__code__", "__defaults__", "__kwdefaults__"),
) -> None:
    """Raise PermissionError for what a program may not do; the interpreter's layer."""
    if event.startswith(refused) and not event.startswith(harmless):
        raise PermissionError(f"not permitted here: {event}")
    if event == "import":
        if args[1] is not None:  # a compiled module, from a file
            raise PermissionError("not permitted here: a compiled module")
        if str(args[0]).partition(".")[0] not in modules:
            raise ModuleNotFoundError(f"No module named {args[0]!r}")
    if event.startswith("object.__") and args[1] in set_again:
        raise PermissionError("not permitted here: another body for a function")


def seccomp() -> None:
    """Leave this process nothing but SYSCALLS; the kernel's layer. OSError where it can't."""
    import ctypes
    import struct

    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise OSError(f"seccomp: no table for {sys.platform} {os.uname().machine}")
    numbers = sorted(SYSCALLS.values())
    allow, deny, kill = 0x7FFF0000, 0x00050001, 0x80000000  # ALLOW, ERRNO(EPERM), KILL_PROCESS
    load, equal, above, give = 0x20, 0x15, 0x35, 0x06
    program = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_X86_64), (give, 0, 0, kill)]
    program += [(load, 0, 0, 0), (above, 0, 1, 0x40000000), (give, 0, 0, kill)]
    left = len(numbers)
    for number in numbers:  # a hit jumps over the other tests and the refusal
        program.append((equal, left, 0, number))
        left -= 1
    program += [(give, 0, 0, deny), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(22, 2, ctypes.create_string_buffer(filters), 0, 0):  # PR_SET_SECCOMP
        raise OSError(ctypes.get_errno(), "seccomp")


def bind(parent: int) -> None:
    """Tie this process to its parent's life and to the rights it has. Nothing where no Linux.

    `parent` is who started it, 0 inside a container: one that is gone by now sends no signal.
    """
    if sys.platform != "linux":
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(1, 9, 0, 0, 0):  # PR_SET_PDEATHSIG: die with whoever started this
        raise OSError(ctypes.get_errno(), "a signal at the parent's death")
    if parent and os.getppid() != parent:
        raise OSError(f"process {parent}, which started this, is gone")
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "no_new_privs")


def drop_user() -> None:
    """Become a user that nobody is, with no group and no capability. OSError where not root.

    The limit of processes counts for it, and no other process can be signalled or changed by it.
    """
    user = 50_000 + os.getpid() % 10_000  # inside the 65,536 ids of a container without root
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def landlock(is_alone: bool) -> None:
    """Leave this process no file to open, make or run, no TCP and no signal to any other process.

    OSError where the kernel has no Landlock, or, `is_alone` (no user of its own), one that lets
    signals through (before ABI 6). See docs.kernel.org/userspace-api/landlock.html.
    """
    import ctypes
    import struct

    if sys.platform != "linux":
        raise OSError(f"landlock: none on {sys.platform}")
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(444, None, 0, 1)  # landlock_create_ruleset, LANDLOCK_CREATE_RULESET_VERSION
    if abi < (6 if is_alone else 1):
        raise OSError(f"landlock: the kernel has version {max(abi, 0)}")
    files = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    rules = struct.pack("QQQ", files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 * (1 + (abi >= 4) + (abi >= 6))
    made = libc.syscall(444, ctypes.create_string_buffer(rules), ctypes.c_size_t(size), 0)
    if made < 0 or libc.syscall(446, made, 0):  # landlock_restrict_self
        raise OSError(ctypes.get_errno(), "landlock")
    os.close(made)


def not_found(spec: object, *_: object) -> None:
    raise ModuleNotFoundError(f"No module named {getattr(spec, 'name', spec)!r}")


def lock(layers: list[str], parent: int) -> None:
    """Close the layers. The names that lead out of Python are taken from sys.modules."""
    import ctypes  # another user, below, may not be able to read it  # noqa: F401
    import struct  # noqa: F401

    for name in MODULES & set(sys.builtin_module_names):
        __import__(name)
    if "uid" in layers:
        drop_user()
    bind(parent)  # after the user: a change of it forgets the parent
    if "landlock" in layers:
        landlock("uid" not in layers)
    if "kernel" in layers:
        seccomp()
    for name in [m for m in sys.modules if m.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]
    sys.modules["ctypes"] = sys.modules["_ctypes"] = None  # pyright: ignore
    import _imp

    for name in ("create_builtin", "create_dynamic"):  # no compiled module is made any more
        setattr(_imp, name, not_found)
    for name in HIDDEN:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    if "hook" in layers:
        sys.addaudithook(refuse)


# --- the program ---------------------------------------------------------------------------------


def say(reply: dict[str, object], write=os.write, dumps=json.dumps) -> None:  # noqa: ANN001
    data = (dumps(reply) + "\n").encode()
    while data:
        data = data[write(REPLY_FD, data) :]


def lines(read=os.read):  # noqa: ANN001, ANN201
    """Yield the lines of the standard input."""
    rest = b""
    while True:
        head, newline, tail = rest.partition(b"\n")
        if newline:
            rest = tail
            yield head.decode()
            continue
        more = read(0, 1 << 16)
        if not more:
            return
        rest += more


def failure(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:200]
    except BaseException:  # an exception whose own text raises
        return "an exception without a text"


def answer(request: dict[str, str], namespace: dict[str, object]) -> dict[str, object]:
    """Return the value of a request's expression, or what it raised."""
    try:
        if request["mode"] == "exec":
            exec(compile(request["source"], "<request>", "exec"), namespace)
            return {"state": "value", "value": "null"}
        value = eval(compile(request["source"], "<request>", "eval"), namespace)
        return {"state": "value", "value": encode(value)}
    except BaseException as error:  # SystemExit too: the program must not end the grading
        return {"state": "raised", "value": failure(error)}


def main() -> None:
    """Serve one program."""
    global REPLY_FD
    if REPLY_FD == 1:  # in a container, whose standard output is the way back
        REPLY_FD = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    requests = lines()
    job = json.loads(next(requests))
    limit(job["seconds"], job["memory_mb"])
    sys.setrecursionlimit(20_000)
    sys.set_int_max_str_digits(0)
    for name in sorted(imported(job["program"])):
        __import__(name)
    import encodings.ascii
    import encodings.latin_1  # noqa: F401
    import random

    random.seed(0)
    os.environ.clear()  # of the hash seed

    try:
        lock(job["layers"], job["parent"])
    except OSError as error:
        say({"state": "unlocked", "value": str(error)})
        return
    namespace: dict[str, object] = {"__name__": "solution", "__builtins__": __builtins__}
    try:
        code = compile(job["program"], "<solution>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        say({"state": "syntax", "value": failure(error)})
        return
    try:
        exec(code, namespace)
    except BaseException as error:
        say({"state": "raised", "value": failure(error)})
    else:
        say({"state": "ready", "value": ""})
    for line in requests:
        request = json.loads(line)
        say({"key": request["key"], **answer(request, namespace)})


if __name__ == "__main__":
    main()
    os._exit(0)
