"""Data of a task: a local file or a hub id, and its rows. What can't be had is one UserError."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from operando.errors import UserError, nearest
from operando.files import brief, parse_json, read_text
from operando.tables import read_parquet
from operando.text import lone_surrogate

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
                f"{self.key} = {self.given!r} can't be had from the Hugging Face hub ({first}). "
                f"With local files ({', '.join(others)} or {last}): {self.remedy}"
            ) from error


def read_rows(file: Path) -> Iterator[Row]:
    """Return the rows of a .jsonl, .jsonl.gz or .parquet file, as they stand there.

    Control characters are data, and stay. A lone surrogate ("\\ud800" in JSON) has no bytes, so
    nothing could be trained on it: it is an error that names the line.
    """
    return _parquet_rows(file) if file.name.endswith(".parquet") else _jsonl_rows(file)


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
        broken = lone_surrogate(row) if "\\u" in line else None
        if broken is not None:
            raise UserError(
                f"{file}:{number}: a lone surrogate, which is no character: {brief(broken)}. Write "
                "what it stands for, or leave the row out"
            )
        yield Row(row, f"{file}:{number}")
