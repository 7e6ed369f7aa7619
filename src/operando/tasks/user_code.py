"""Code of the user's, by its path: how it is loaded, and how what it raises is told."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from operando.errors import UserError, nearest


def load_function(path: str, what: str = "reward path") -> Callable[..., Any]:
    """Return the function that "package.module:name" or "file.py:name" means.

    A file is loaded as `import` would: under a name of its own in sys.modules (so dataclasses and
    pickles work), with the modules beside it importable, its `if __name__ == "__main__"` not run.
    `what` is how errors name the path.
    """
    where, _, name = path.rpartition(":")
    if not where.removesuffix(".py") or not name:
        raise UserError(f"{what} {path!r}: expected file.py:function or package.module:function")
    try:
        if where.endswith(".py"):
            module = _load_file(Path(where), f"{what} {path!r}")
        else:
            module = _load_module(where)
    except UserError:
        raise
    except Exception as error:  # rewritten, never swallowed: it is the user's own code
        frames = traceback.extract_tb(error.__traceback__)
        at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        raise UserError(f"{what} {path!r}: {type(error).__name__}: {error}{at}") from error
    if name not in vars(module):
        functions = [n for n, v in vars(module).items() if callable(v)]
        raise UserError(f"{what} {path!r}: no function {name!r}.{nearest(name, functions)}")
    return vars(module)[name]


def code_digest(function: Callable[..., Any]) -> str:
    """Return the sha256 of the file that a function was loaded from; "" where it has none."""
    file = inspect.getsourcefile(function)
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


def user_frames(error: Exception) -> list[tuple[FrameType, int]]:
    """Return the frames of what was raised, with their lines, without that of the caller itself."""
    return list(traceback.walk_tb(error.__traceback__))[1:]


def spelled_frames(frames: Sequence[tuple[FrameType, int]]) -> str:
    """Return one line a frame: file, line and function."""
    return "".join(
        f"\n  {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}" for frame, line in frames
    )


def _load_module(where: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(where)


def _load_file(file: Path, given: str) -> ModuleType:
    if not file.is_file():
        raise UserError(f"{given}: there is no file {file.resolve()}")
    file = file.resolve()
    known = hashlib.sha256(str(file).encode(errors="surrogateescape")).hexdigest()[:12]
    name = f"operando_user_{known}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, given
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # last: no helper takes the name of an installed module
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
