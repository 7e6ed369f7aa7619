"""A run folder as it is read, without torch: manifest, recipe, rows of metrics."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from pathlib import Path

from operando.errors import UserError
from operando.files import brief, is_file, parse_json, read_object, read_text
from operando.recipe.renamed import with_new_names
from operando.recipe.run import Recipe
from operando.recipe_io import check, read_toml

FORMAT = 1
STARTED = "%Y-%m-%dT%H:%M:%SZ"  # of the manifest, in UTC


def read_recipe(folder: Path) -> Recipe:
    """Return the recipe of a run folder of this format, renamed values by their names."""
    read_manifest(folder)
    file = folder / "recipe.toml"
    tables, _ = with_new_names(read_toml(file))
    return check(Recipe, tables, str(file))


def read_manifest(folder: Path) -> dict[str, object]:
    """Return the manifest of a run folder; a folder of another format is an error."""
    file = folder / "manifest.json"
    if not is_file(file):
        raise UserError(f"{folder} is not a run folder: it has no manifest.json.{_beside(folder)}")
    manifest = read_object(file)
    if manifest.get("format") != FORMAT:
        versions = manifest.get("versions")
        by = versions.get("operando", "?") if isinstance(versions, dict) else "?"
        raise UserError(
            f"{folder} has run format {brief(manifest.get('format'))}; this operando reads "
            f"{FORMAT}. It was written by operando {by}"
        )
    return read_object(file, name=str, started=str, versions=dict, warnings=list)


def start_of(folder: Path) -> datetime:
    """Return when a run was begun (UTC): the day that its chat template prints, whenever asked."""
    started = str(read_manifest(folder)["started"])
    try:
        return datetime.strptime(started, STARTED).replace(tzinfo=UTC)
    except ValueError as error:
        raise UserError(f"{folder / 'manifest.json'}: started: {error}") from error


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
        for _, row in metric_lines(folder)
    ]


def metric_lines(folder: Path) -> list[tuple[str, dict[str, float | int | str | None]]]:
    """Return each line of metrics.jsonl with its row; a last line cut by a kill is left out."""
    file = folder / "metrics.jsonl"
    if not is_file(file):
        return []
    found = []
    lines = read_text(file).split("\n")
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # nothing after the last newline, or what a kill left
            break
        row = parse_json(line, f"{file}:{number}")
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number} holds {brief(row)}, expected an object")
        step = row.get("step")
        if not isinstance(step, int | float) or not math.isfinite(step):
            raise UserError(f"{file}:{number}: step is {brief(step)}, expected a number")
        wrong = [k for k, v in row.items() if not isinstance(v, int | float | str | None)]
        if wrong:
            raise UserError(
                f"{file}:{number}: {wrong[0]} is {brief(row[wrong[0]])}, expected a number"
            )
        found.append((line, row))
    return found


def step_of(file: Path) -> int | None:
    """Return the step in a file's name (held_out_step_00020.parquet), or None."""
    found = re.search(r"(?:^|_)step_(\d+)", file.name)
    return int(found[1]) if found else None


def check_model_or_run(folder: Path) -> None:
    """Refuse what is neither a run folder nor a model folder."""
    if not is_file(folder / "manifest.json") and not is_file(folder / "config.json"):
        raise UserError(
            f"{folder}: neither a run folder (with manifest.json) nor a model folder (with "
            f"config.json).{_beside(folder)}"
        )


def _beside(folder: Path) -> str:
    names = sorted(file.parent.name for file in folder.parent.glob("*/manifest.json"))
    return f" Runs there: {', '.join(names[:8])}" if names else ""
