"""Data of a task: a local file or a hub id, and its rows. What can't be read is one UserError."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from operando.errors import UserError, nearest
from operando.files import brief, parse_json, read_text
from operando.run import hash_file
from operando.tables import read_parquet
from operando.text import lone_surrogate

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
OWN_SUFFIXES = (*SUFFIXES, ".json", ".csv")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_SPLIT = re.compile(rf"({HUB_ID.pattern})(?:/([\w.-]+))?(?::([\w.-]+))?")


class Row(NamedTuple):
    """One line of a data file and where it stands."""

    values: Mapping[str, object]
    where: str

    def text(self, key: str) -> str:
        """Return the text of a column; no such column, or no text in it, is an error."""
        if key not in self.values:
            known = [str(k) for k in self.values]
            raise UserError(
                f"{self.where}: no `{key}`.{nearest(key, known)} Keys there: {', '.join(known)}"
            )
        value = self.values[key]
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{self.where}: `{key}` must be text, got {value!r}")
        return value


class Source(NamedTuple):
    """What a user gave as data, and how messages name it.

    Example: Source("openai/gsm8k", "task.train", "main/train-00000-of-00001.parquet",
                    "task.train=PATH task.test=PATH")
    """

    given: str
    key: str
    hub_file: str
    remedy: str
    suffixes: tuple[str, ...] = SUFFIXES

    def find(self) -> Path:
        """Return the local file that the path or hub id means."""
        file = Path(self.given)
        if file.is_file():
            if not self.given.endswith(self.suffixes):
                raise UserError(
                    f"{self.key} = {self.given!r}: expected a file ending in "
                    f"{', '.join(self.suffixes)}"
                )
            return file
        is_id = HUB_ID.fullmatch(self.given) and not self.given.endswith(self.suffixes)
        if is_id and not file.exists():
            return self._download()
        folder = file if file.is_dir() else file.parent
        there = sorted(f.name for f in folder.glob("*") if f.name.endswith(self.suffixes))
        raise UserError(
            f"{self.key} = {self.given!r}: no such file, and not a hub id such as openai/gsm8k."
            f"{nearest(file.name, there)} Data files in {folder}: {', '.join(there[:8]) or 'none'}"
        )

    def _download(self) -> Path:
        try:
            return Path(
                hf_hub_download(repo_id=self.given, repo_type="dataset", filename=self.hub_file)
            )
        except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
            first = str(error).strip().splitlines()[0]
            *others, last = self.suffixes
            raise UserError(
                f"{self.key} = {self.given!r} can't be downloaded from the Hugging Face hub "
                f"({first}). With local files ({', '.join(others)} or {last}): {self.remedy}"
            ) from error


def read_rows(file: Path) -> Iterator[Row]:
    """Return the rows of a .jsonl, .jsonl.gz, .parquet, .json or .csv file, as they stand there.

    Control characters are data, and stay. A lone surrogate ("\\ud800" in JSON) has no bytes, so
    nothing could be trained on it: it is an error that names the line.
    """
    match file.suffix:
        case ".parquet":
            return _parquet_rows(file)
        case ".csv":
            return _csv_rows(file)
        case ".json":
            return _json_rows(file)
        case _:
            return _jsonl_rows(file)


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        table = read_parquet(file)
        rows = table.to_pylist()
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable parquet file: {error}") from error
    for i, row in enumerate(rows):
        yield Row(row, f"{file}: row {i}")


def _jsonl_rows(file: Path) -> Iterator[Row]:
    # Not splitlines: a JSON string may hold U+2028 and its like, and one question does.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{file}:{number}")
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: expected an object, got {brief(row)}")
        if "\\u" in line:
            _refuse_surrogate(row, f"{file}:{number}")
        yield Row(row, f"{file}:{number}")


def _json_rows(file: Path) -> Iterator[Row]:
    rows = parse_json(read_text(file), str(file))
    if not isinstance(rows, list):
        raise UserError(
            f"{file}: expected a list of objects, got {brief(rows)}. One object a line is .jsonl"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{file}: row {number}: expected an object, got {brief(row)}")
        _refuse_surrogate(row, f"{file}: row {number}")
        yield Row(row, f"{file}: row {number}")


def _refuse_surrogate(row: object, where: str) -> None:
    broken = lone_surrogate(row)
    if broken is not None:
        raise UserError(
            f"{where}: a lone surrogate, which is not a character: {brief(broken)}. Write what it "
            "stands for, or leave the row out"
        )


def _csv_rows(file: Path) -> Iterator[Row]:
    """Return the rows under the header; every value is a text."""
    text = read_text(file).removeprefix("\ufeff")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise UserError(f"{file}:1: a column is named twice: {', '.join(names)}")
        for fields in reader:
            if not fields:
                continue
            where = f"{file}:{reader.line_num}"
            if len(fields) != len(names):
                raise UserError(
                    f"{where}: {len(fields)} fields, but the first line names {len(names)} "
                    f"columns: {', '.join(names)}. A field with a comma stands in quotes"
                )
            yield Row(dict(zip(names, fields, strict=True)), where)
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not readable csv: {error}") from error


# --- files of the user's, folders, the hub -------------------------------------------------------


class Data(NamedTuple):
    """Rows, and the sha256 of the files that they stand in; of the hub's, of the rows."""

    rows: list[Row]
    sha256: str


def read_data(given: str, key: str, split: str) -> Data:
    """Return the rows of a file, of all files of a folder, or of a hub id with its split.

    A hub id is owner/name, owner/name:split or owner/name/config:split; without one, `split`.
    Example: read_data("my.csv", "task.train", "train").rows[0].text("question")
    """
    path = Path(given)
    if path.is_dir():
        shown = (f for f in path.iterdir() if not f.name.startswith("."))
        files = sorted(f for f in shown if f.name.endswith(OWN_SUFFIXES))
        if not files:
            raise UserError(f"{key} = {given!r}: no file in it ends in {', '.join(OWN_SUFFIXES)}")
    elif path.is_file() or not (hub := HUB_SPLIT.fullmatch(given)) or given.endswith(OWN_SUFFIXES):
        files = [Source(given, key, "", "", OWN_SUFFIXES).find()]
    else:
        return _from_hub(hub[1], hub[2], hub[3] or split, f"{key} = {given!r}")
    digest = hashlib.sha256()
    for file in files:
        digest.update(hash_file(file).encode())
    sha256 = hash_file(files[0]) if len(files) == 1 else digest.hexdigest()
    return Data([row for file in files for row in read_rows(file)], sha256)


def _from_hub(name: str, config: str | None, split: str, given: str) -> Data:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{given}: no file or folder here, and a data set of the Hugging Face hub needs: pip "
            f"install datasets. Or name a local file ({', '.join(OWN_SUFFIXES)})"
        ) from error
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # rewritten: the hub's and the library's own kinds are many
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{given} can't be downloaded from the Hugging Face hub: {first}"
        ) from error
    rows = [Row(dict(row), f"{name}:{split} row {i}") for i, row in enumerate(found)]
    text = json.dumps([row.values for row in rows], default=str)
    return Data(rows, hashlib.sha256(text.encode()).hexdigest())
