"""Parquet files as they are read: what can't be read is one UserError with its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from operando.errors import UserError


def read_parquet(
    file: Path,
    columns: Sequence[str] | None = None,
    only: Sequence[tuple[str, str, object]] | None = None,
) -> pa.Table:
    """Return the table of a parquet file, or these columns and the rows that match `only`.

    A damaged file, and one without a column that is asked for, is a UserError.
    """
    try:
        held = pq.read_schema(file).names
        missing = [name for name in columns or () if name not in held]
        if missing:
            raise UserError(f"{file}: no column {missing[0]!r}; it has {', '.join(held)}")
        return pq.read_table(
            file,
            columns=list(columns) if columns is not None else None,
            filters=list(only) if only is not None else None,
        )
    except (pa.ArrowException, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{file}: not a readable parquet file: {first}") from error
