"""The run folder: manifest, metrics, rollouts, seeds, and writes that are whole or not there.

    runs/<name>/recipe.toml manifest.json code.diff metrics.jsonl results.json
                rollouts/step_00100.parquet  checkpoints/step_00100/  evals/*.parquet

The layout is a public, versioned API (docs/run-folder.md); any change of it raises FORMAT.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from operando.errors import UserError
from operando.recipe import Recipe
from operando.recipe_io import check, read_toml, to_toml

logger = logging.getLogger(__name__)

FORMAT = 1
STARTED = "%Y-%m-%dT%H:%M:%SZ"  # of the manifest, in UTC
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
    temporary = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        yield temporary
        if target.is_dir() and temporary.is_dir():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except Exception as error:
        if _is_full_disk(error):
            raise UserError(
                f"no space left while writing {target} ({error}); nothing half-written"
            ) from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        elif temporary.exists():
            temporary.unlink()


def _is_full_disk(error: Exception) -> bool:
    """Return whether a write failed for want of space; safetensors and torch hide the OSError."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    said = ("No space left", "File too large", "PytorchStreamWriter failed", "unexpected pos")
    return any(part in str(error) for part in said)


def write_json(target: Path, value: object) -> None:
    """Write a JSON file atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_parquet(target: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Write a parquet file atomically; every column has one value a row."""
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

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self.recipe = recipe
        self.seeds = SeedTree(recipe.seed)
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    @classmethod
    def create(cls, recipe: Recipe, command: str = "") -> Run:
        """Return a new run folder; an existing one is an error."""
        folder = Path(recipe.runs_dir) / recipe.name
        if folder.exists():
            raise UserError(
                f"{folder} exists. Go on with it: --resume. Or choose another: name=NEW_NAME"
            )
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        try:
            part.mkdir(parents=True)
            (part / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
            write_json(part / "manifest.json", _manifest(recipe, command))
            (part / "code.diff").write_text(_git("diff", "HEAD") or "", encoding="utf-8")
            part.rename(folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise UserError(f"can't make the run folder {folder}: {error}") from error
        return cls(folder, recipe)

    @classmethod
    def resume(cls, recipe: Recipe) -> Run:
        """Return an existing run folder to go on with; the recipe must be the one it began with."""
        folder = Path(recipe.runs_dir) / recipe.name
        old = read_recipe(folder)
        if old != recipe:
            changed = differences(old.model_dump(mode="json"), recipe.model_dump(mode="json"))
            raise UserError(
                f"{folder} was begun with another recipe; changed: {'; '.join(changed)}. "
                "Undo the change, or begin a new run with name=NEW_NAME"
            )
        return cls(folder, recipe)

    @classmethod
    def follow(cls, recipe: Recipe) -> Run:
        """Return the run that rank 0 made or resumed, for the other ranks; they write nothing."""
        return cls(Path(recipe.runs_dir) / recipe.name, recipe)

    def warnings(self) -> list[str]:
        """Return the warnings so far."""
        return json.loads((self.folder / "manifest.json").read_text())["warnings"]

    def log_metrics(self, metrics: Mapping[str, float | int | str | None]) -> None:
        """Append one line to metrics.jsonl; NaN becomes null."""
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in metrics.items()
        }
        self._metrics.write(json.dumps(clean) + "\n")

    def rewind_to(self, step: int) -> None:
        """Drop what was written after `step`, so that the resumed run writes it again."""
        self._metrics.close()
        kept = [line for line, row in _metric_lines(self.folder) if int(str(row["step"])) <= step]
        with atomic_path(self.folder / "metrics.jsonl") as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))
        for kind in ("rollouts", "evals"):
            for file in (self.folder / kind).glob("*step_*.parquet"):
                if int(file.stem.rpartition("_")[2]) > step:
                    file.unlink()
        self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def warn(self, message: str) -> None:
        """Record a warning in the manifest, once, and log it."""
        manifest = json.loads((self.folder / "manifest.json").read_text())
        if message not in manifest["warnings"]:
            manifest["warnings"].append(message)
            write_json(self.folder / "manifest.json", manifest)
            logger.warning(message)

    def note(self, **facts: object) -> None:
        """Add facts (hashes of data and model, ...) to the manifest."""
        manifest = json.loads((self.folder / "manifest.json").read_text())
        write_json(self.folder / "manifest.json", {**manifest, **facts})

    def close(self) -> None:
        self._metrics.close()


def read_recipe(folder: Path) -> Recipe:
    """Return the recipe of a run folder of this format."""
    read_manifest(folder)
    file = folder / "recipe.toml"
    return check(Recipe, read_toml(file), str(file))


def read_manifest(folder: Path) -> dict[str, object]:
    """Return the manifest of a run folder; a folder of another format is an error."""
    file = folder / "manifest.json"
    if not file.is_file():
        beside = sorted(m.parent.name for m in folder.parent.glob("*/manifest.json"))
        known = f" Runs there: {', '.join(beside[:8])}" if beside else ""
        raise UserError(f"{folder} is not a run folder: it has no manifest.json.{known}")
    try:
        manifest = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is damaged: {error}") from error
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder} has run format {manifest.get('format')!r}; this operando reads {FORMAT}. "
            f"It was written by operando {manifest.get('versions', {}).get('operando', '?')}"
        )
    return manifest


def start_of(folder: Path) -> datetime:
    """Return when a run was begun (UTC): the day that its chat template prints, whenever asked."""
    started = str(read_manifest(folder)["started"])
    return datetime.strptime(started, STARTED).replace(tzinfo=UTC)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of metrics.jsonl as floats, without what is null, not finite or text."""
    return [
        {key: value for key, value in row.items() if value is not None} for row in read_rows(folder)
    ]


def read_rows(folder: Path) -> list[dict[str, float | None]]:
    """Return the rows of metrics.jsonl without what is text; None is a number that was not finite.

    A folder of another program may hold NaN or Infinity as they are: they are None as well.
    """
    return [
        {
            key: float(value) if value is not None and math.isfinite(value) else None
            for key, value in row.items()
            if not isinstance(value, str)
        }
        for _, row in _metric_lines(folder)
    ]


def _metric_lines(folder: Path) -> list[tuple[str, dict[str, float | int | str | None]]]:
    """Return each line of metrics.jsonl with its row; a last line cut by a kill is left out."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    found = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            found.append((line, json.loads(line)))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{file}:{number} is damaged: {error}") from error
    return found


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
