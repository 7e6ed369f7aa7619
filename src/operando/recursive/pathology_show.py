"""The pathology audit as the terminal shows it."""

from __future__ import annotations

import math

from rich.console import Group
from rich.table import Table
from rich.text import Text

from operando.recursive.pathology import Pathology
from operando.recursive.pathology_tests import Number

COLUMNS = (("", 27), ("model", 9), ("95 %", 18), ("random", 18), ("shuffled", 8))


def pathology_tables(result: Pathology) -> Group:
    """Return every test with its verdict and its numbers beside the random models'."""
    head = (
        f"{result.model}: {result.loops} loops, {result.n} held-out problems of {result.task} "
        f"({result.distinct} solutions); "
        f"random: {len(result.baseline_seeds)} untrained models of this config (seeds "
        f"{result.baseline_seeds[0]} to {result.baseline_seeds[-1]})"
    )
    parts: list[Text | Table] = [Text(head)]
    for test in result.tests:
        line = Text(f"\n{test.verdict}: {test.name}", style="bold")
        line.append(f": {test.why}", style="not bold")
        table = Table(box=None, pad_edge=False)
        for column, width in COLUMNS:
            justify = "right" if column else "left"
            table.add_column(column, justify=justify, min_width=width, no_wrap=True)
        for number in test.numbers:
            table.add_row(*_row(number))
        parts += [line, table]
    return Group(*parts, Text(f"\nwithout a control: {result.without_control}", style="dim"))


def _row(number: Number) -> tuple[str, ...]:
    interval = number.interval
    limits = "" if interval is None else f"{_show(interval.low)} to {_show(interval.high)}"
    given = [x for x in number.baselines if x is not None]
    random = ""
    if given:
        low, high = _show(min(given)), _show(max(given))
        random = low if low == high else f"{low} to {high}"
    noise = "" if number.shuffled is None else _show(number.shuffled)
    value = "none" if number.value is None else _show(number.value)
    return f"  {number.name}", value, limits, random, noise


def _show(x: float) -> str:
    if not math.isfinite(x):
        return str(x)
    return f"{x:.3g}" if x == 0 or abs(x) < 1000 else f"{x:.0f}"
