"""Files as they are read: what can't be read, decoded or parsed is one UserError with its name."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from operando.errors import UserError

NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


def is_file(path: Path) -> bool:
    """Return whether there is a file; a name that the system can't take is none."""
    try:
        return path.is_file()
    except OSError:  # too long a name, a folder that may not be entered
        return False


def read_bytes(file: Path) -> bytes:
    """Return the bytes of a file, unpacked if its name ends in .gz."""
    try:
        raw = file.read_bytes()
        return gzip.decompress(raw) if file.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{file} can't be read: {why}") from error


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, unpacked if its name ends in .gz."""
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not a text file: {error.reason} at byte {error.start}, expected UTF-8"
        ) from error


def parse_json(text: str, where: str) -> object:
    """Return the value of a JSON text; what is damaged, too deep or too large is a UserError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged: {parser_said(error)}; expected JSON") from error


def parser_said(error: Exception) -> str:
    """Return in one line what a parser of JSON or TOML could not take."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).partition(";")[0]  # numbers over 4,300 digits: the rest is a hint for Python


def read_object(file: Path, **needed: type) -> dict[str, Any]:
    """Return the object of a JSON file; a key of `needed` that is not there, or of another type,
    is a UserError. Example: read_object(file, digest=str, rows=list)"""
    value = parse_json(read_text(file), str(file))
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {brief(value)}, expected an object")
    for key, kind in needed.items():
        if key not in value:
            raise UserError(f"{file} has no {key!r}; it has {', '.join(value) or 'nothing'}")
        if not isinstance(value[key], kind):
            raise UserError(
                f"{file}: {key} is {brief(value[key])}, expected {NAMES.get(kind, kind.__name__)}"
            )
    return value


def plain(value: object) -> object:
    """Return a value as JSON holds it: NaN is null, infinities are the texts "inf" and "-inf"."""
    match value:
        case float():
            if value != value:
                return None
            return str(value) if abs(value) == float("inf") else value
        case Mapping():
            return {str(key): plain(inner) for key, inner in value.items()}
        case str() | bytes():
            return value
        case Sequence():
            return [plain(inner) for inner in value]
        case _:
            return value


def brief(value: object) -> str:
    """Return a value for an error message, at most 80 letters of it."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
