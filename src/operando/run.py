"""The run folder: manifest, metrics, rollouts, seeds, and writes that are whole or not there.

    runs/<name>/recipe.toml manifest.json code.diff metrics.jsonl results.json
                rollouts/step_00100.parquet  checkpoints/step_00100/  evals/*.parquet

The layout is a public, versioned API (docs/run-folder.md); any change of it raises FORMAT.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from operando.errors import UserError
from operando.files import plain
from operando.owned import FolderLock, part_of
from operando.recipe.data import ModelDtype
from operando.recipe.run import Recipe
from operando.recipe_io import to_toml
from operando.run_folder import FORMAT, STARTED, metric_lines, read_manifest, read_recipe, step_of

logger = logging.getLogger(__name__)

PACKAGES = ("operando", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


class SeedTree:
    """Random streams that hang from one seed; a stream depends on its path alone.

    Example: SeedTree(7).generator("rollout", step, prompt, sample) is the same stream whatever was
    drawn before, so rollouts do not depend on batch size and a resumed run needs no saved state.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def derive(self, *path: str | int) -> int:
        """Return the 63-bit seed of one stream."""
        text = "/".join(str(p) for p in (self.seed, *path))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, *path: str | int) -> torch.Generator:
        """Return a CPU generator for one stream."""
        return torch.Generator().manual_seed(self.derive(*path))


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target`; move it over `target` only if the block succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = part_of(target)
    try:
        yield temporary
        sync(temporary)
        if target.is_dir() and temporary.is_dir():
            remove(target)
        os.replace(temporary, target)
        sync_one(target.parent)
    except Exception as error:
        if _is_full_disk(error):
            raise UserError(
                f"no space left while writing {target} ({error}); nothing half-written"
            ) from error
        if _is_refused(error):
            raise UserError(f"can't write {target} ({error}); what was there is intact") from error
        raise
    finally:  # what can't be removed, on a disk that has become read-only, the next owner sweeps
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove a folder at once: a kill leaves no half of it, only what the next owner sweeps."""
    aside = part_of(folder.with_name(f"{folder.name}.old"))
    folder.rename(aside)
    shutil.rmtree(aside)


def sync(path: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk itself."""
    for inside in path.rglob("*") if path.is_dir() else ():
        sync_one(inside)
    sync_one(path)


def sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems sync no folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _is_full_disk(error: Exception) -> bool:
    """Return whether a write failed for want of space; safetensors and torch hide the OSError."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    said = ("No space left", "File too large", "PytorchStreamWriter failed", "unexpected pos")
    return any(part in str(error) for part in said)


def _is_refused(error: Exception) -> bool:
    """Return whether a file could not be opened for writing; safetensors and torch hide it."""
    if isinstance(error, OSError):
        return error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    return any(part in str(error) for part in ("(os error ", "open file failed"))


def write_json(target: Path, value: object) -> None:
    """Write a JSON file atomically; NaN is null, and infinities are texts."""
    with atomic_path(target) as temporary:
        text = json.dumps(plain(value), indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_parquet(target: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Write a parquet file atomically; every column has one value per row."""
    with atomic_path(target) as temporary:
        pq.write_table(pa.table({k: list(v) for k, v in columns.items()}), temporary)


def hash_file(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Run:
    """An open run folder.

    Example: run = Run.create(recipe); run.log_metrics({"step": 1, "reward": 0.4}); run.close()
    """

    def __init__(self, folder: Path, recipe: Recipe, lock: FolderLock | None = None) -> None:
        self.folder = folder
        self.recipe = recipe
        self.seeds = SeedTree(recipe.seed)
        self._lock = lock  # None: another process of the same run holds it
        self._metrics = self._open_metrics()

    @classmethod
    def create(cls, recipe: Recipe, command: str = "") -> Run:
        """Return a new run folder, which this process owns; an existing one is an error."""
        folder = Path(recipe.runs_dir) / recipe.name
        with ExitStack() as undo:
            lock = FolderLock(folder)
            undo.callback(lock.release)
            if folder.exists():
                raise UserError(
                    f"{folder} exists. Continue it with --resume. Or choose another: name=NEW_NAME"
                )
            cls._begin(folder, recipe, command)
            undo.pop_all()
        return cls(folder, recipe, lock)

    @staticmethod
    def _begin(folder: Path, recipe: Recipe, command: str) -> None:
        part = part_of(folder)
        try:
            part.mkdir(parents=True)
            (part / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
            write_json(part / "manifest.json", _manifest(recipe, command))
            (part / "code.diff").write_text(_git("diff", "HEAD") or "", encoding="utf-8")
            part.rename(folder)
        except OSError as error:
            raise UserError(f"can't make the run folder {folder}: {error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    @classmethod
    def resume(cls, recipe: Recipe) -> Run:
        """Return an existing run folder to go on with, which this process owns from now on; the
        recipe must be the one it began with."""
        folder = Path(recipe.runs_dir) / recipe.name
        old = read_recipe(folder)
        if recipe.model.dtype == "auto":  # the run keeps what it is on the machine it began on
            recipe = with_dtype(recipe, old.model.dtype)
        if old != recipe:
            changed = differences(old.model_dump(mode="json"), recipe.model_dump(mode="json"))
            raise UserError(
                f"{folder} was started with another recipe; changed: {'; '.join(changed)}. "
                "Undo the change, or start a new run with name=NEW_NAME"
            )
        return cls(folder, recipe, FolderLock(folder))

    @classmethod
    def follow(cls, recipe: Recipe) -> Run:
        """Return the run that rank 0 made or resumed, for the other ranks; they write nothing."""
        return cls(Path(recipe.runs_dir) / recipe.name, recipe)

    def settle_dtype(self, dtype: ModelDtype) -> None:
        """Put what model.dtype = "auto" was into recipe.toml, so that every reader goes by it."""
        if self.recipe.model.dtype == dtype:
            return
        self.recipe = with_dtype(self.recipe, dtype)
        with atomic_path(self.folder / "recipe.toml") as temporary:
            temporary.write_text(to_toml(self.recipe), encoding="utf-8")

    def warnings(self) -> list[str]:
        """Return the warnings so far."""
        return list(map(str, _list(read_manifest(self.folder)["warnings"])))

    def log_metrics(self, metrics: Mapping[str, float | int | str | None]) -> None:
        """Append one line to metrics.jsonl, now and not later; NaN becomes null."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in metrics.items()
        }
        line = (json.dumps(clean) + "\n").encode()
        try:
            written = self._metrics.write(line)
        except OSError as error:
            written, why = 0, error.strerror
        else:
            why = "no space left"
        if written != len(line):
            raise UserError(
                f"{self.folder / 'metrics.jsonl'}: {why}; what was saved is intact: free some "
                "space, then continue with --resume"
            )

    def sync(self) -> None:
        """Bring metrics.jsonl to the disk itself, before a checkpoint that needs its rows."""
        os.fsync(self._metrics.fileno())

    def _open_metrics(self) -> io.FileIO:
        return io.FileIO(self.folder / "metrics.jsonl", "a")  # unbuffered: close has nothing left

    def rewind_to(self, step: int) -> None:
        """Drop what was written after `step`, so that the resumed run writes it again."""
        self._metrics.close()
        kept = [line for line, row in metric_lines(self.folder) if int(row["step"] or 0) <= step]
        with atomic_path(self.folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        for kind in ("rollouts", "evals"):
            for file in (self.folder / kind).iterdir() if (self.folder / kind).is_dir() else ():
                at = step_of(file)
                if at is not None and at > step:
                    file.unlink()
        self._metrics = self._open_metrics()

    def warn(self, message: str) -> None:
        """Record a warning in the manifest, once, and log it."""
        manifest = read_manifest(self.folder)
        warnings = _list(manifest["warnings"])
        if message not in warnings:
            write_json(self.folder / "manifest.json", manifest | {"warnings": [*warnings, message]})
            logger.warning(message)

    def note(self, **facts: object) -> None:
        """Add facts (hashes of data and model, ...) to the manifest."""
        manifest = read_manifest(self.folder)
        write_json(self.folder / "manifest.json", {**manifest, **facts})

    def close(self) -> None:
        """Give the folder back."""
        self._metrics.close()
        if self._lock is not None:
            self._lock.release()


def with_dtype(recipe: Recipe, dtype: ModelDtype) -> Recipe:
    """Return the recipe with another model.dtype."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def _manifest(recipe: Recipe, command: str) -> dict[str, object]:
    return {
        "format": FORMAT,
        "name": recipe.name,
        "started": time.strftime(STARTED, time.gmtime()),
        "command": command,
        "seed": recipe.seed,
        "seed_tree": "sha256('seed/part/part/...')[:8] >> 1; streams: rollout/step/prompt/sample, "
        "prompts/epoch, minibatch/step/epoch, model",
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))},
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        },
        "warnings": [],
    }


def _git(*args: str) -> str | None:
    """Return git's output for operando's own checkout, or None where there is none."""
    where = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *args], cwd=where, capture_output=True, text=True, timeout=20, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def differences(old: object, new: object, path: str = "") -> list[str]:
    """Return a line for each key in which two trees of JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(set(old) | set(new))
            for line in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def free_name(runs_dir: str, name: str) -> str:
    """Return `name`, or name-2, name-3, ... if the folder is taken."""
    number, candidate = 1, name
    while (Path(runs_dir) / candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate
