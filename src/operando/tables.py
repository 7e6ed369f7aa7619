"""Parquet files as they are read, and rows as the terminal shows them, no number cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from operando.errors import UserError

LONGEST_WORD = 24  # a longer one may be folded where there is no room


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


# --- the terminal --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextTable:
    """Rows under a title, for a rich console of any width; see `table`."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    words: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        if self.title:
            yield Text(self.title, style="italic")
        least, most = zip(*map(self._widths, range(len(self.columns))), strict=True)
        for number, places in enumerate(self._blocks(least, options.max_width)):
            if number:
                yield Text("")
            gap = _gap([least[c] for c in places], options.max_width)
            room = options.max_width - gap * (len(places) - 1)
            widths = _shrunk([most[c] for c in places], [least[c] for c in places], room)
            hard = [1 if self.columns[c] in self.words else least[c] for c in places]
            widths = _shrunk(widths, hard, room)
            yield from self._lines(console, places, widths, " " * gap)

    def _widths(self, column: int) -> tuple[int, int]:
        """Return the least width of a column in which no number is cut, and that of one line."""
        cells = [str(row[column]) for row in self.rows if len(row) > max(1, column)]
        head = self.columns[column]
        whole = _longest(line for cell in cells for line in cell.splitlines())
        if head in self.words:
            words = _longest(word for cell in cells for word in cell.split())
            least = max(1, _longest(head.split()), min(words, LONGEST_WORD))
        else:
            least = max(1, _longest(head.split()), whole)
        return least, max(least, whole, cell_len(head))

    def _blocks(self, least: Sequence[int], width: int) -> list[list[int]]:
        """Return the columns that stand beside each other: all, or where they don't fit, as many
        as do, each time after the first columns of words."""
        heads = list(range(len(self.columns)))
        if sum(least) + _gap(least, width) * (len(least) - 1) <= width:
            return [heads]
        first = max(1, next((c for c in heads if self.columns[c] not in self.words), len(heads)))
        blocks = [heads[:first]]
        for column in heads[first:]:
            wider = [*blocks[-1], column]
            if len(wider) > first + 1 and sum(least[c] + 1 for c in wider) - 1 > width:
                blocks.append([*heads[:first], column])
            else:
                blocks[-1] = wider
        return blocks

    def _lines(
        self, console: Console, places: Sequence[int], widths: Sequence[int], gap: str
    ) -> Iterator[Text]:
        for number, row in enumerate([self.columns, *self.rows]):
            if number and len(row) == 1:
                yield _text(row[0])
                continue
            style = "" if number else "bold"
            cells = []
            for place, width in zip(places, widths, strict=True):
                side = "left" if self.columns[place] in self.words else "right"
                cell = _text(row[place] if place < len(row) else "", style)
                cells.append(cell.wrap(console, width, justify=side, overflow="fold"))
            for parts in zip_longest(*cells):
                blank = [Text(" " * width) for width in widths]
                line = Text(gap).join(p or b for p, b in zip(parts, blank, strict=True))
                line.rstrip()
                yield line


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    words: Sequence[str] = ("",),
) -> TextTable:
    """Return rows as a table for the terminal; the columns in `words` hold words, the others
    numbers.

    Words are folded where there is no room, numbers never: what does not fit beside the rest comes
    beneath it, after the first columns of words again. A row of one cell is a line of its own;
    cells that a row lacks are blank. Nothing in a cell is read as markup.

    Example: table("held out", ("", "right"), [("base", "31.0%"), ("trained", "48.5%")])
    """
    return TextTable(title, columns, rows, words)


def interval(x: tuple[float, float, float], form: str) -> str:
    """Return an estimate with its limits. Example: interval((0.1, 0, 0.2), "+.0%") is
    "+10% (+0% to +20%)"."""
    value, low, high = x
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def limits(x: tuple[float, float, float], form: str) -> str:
    """Return the limits of an estimate alone. Example: limits((0.1, 0, 0.2), ".0%") is
    "0% to 20%"."""
    return f"{x[1]:{form}} to {x[2]:{form}}"


def _text(cell: str | Text, style: str = "") -> Text:
    return cell.copy() if isinstance(cell, Text) else Text(cell, style)


def _longest(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _gap(widths: Sequence[int], width: int) -> int:
    """Return how many spaces stand between columns: two where they fit, else one."""
    return 2 if sum(widths) + 2 * (len(widths) - 1) <= width else 1


def _shrunk(most: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Return widths that fill at most the room, taken from the columns with most to give."""
    widths = list(most)
    while sum(widths) > room and any(w > low for w, low in zip(widths, least, strict=True)):
        column = max(range(len(widths)), key=lambda c: widths[c] - least[c])
        widths[column] -= 1
    return widths


def progress_bar(
    console: Console, text: str = "{task.description} {task.completed}/{task.total}"
) -> Progress:
    """Return a bar with the time gone and left; off a terminal it shows nothing."""
    return Progress(
        TextColumn(text),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
    )
