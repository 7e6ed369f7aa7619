"""The pathology audit as the terminal shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from operando.recursive.pathology import Pathology
from operando.recursive.pathology_tests import Number
from operando.tables import table


def pathology_tables(result: Pathology) -> Group:
    """Return every test with its verdict and its numbers beside the random models'."""
    head = (
        f"{result.model}: {result.loops} loops, {result.n} held-out problems of {result.task} "
        f"({result.distinct} solutions); "
        f"random: {len(result.baseline_seeds)} untrained models of this config (seeds "
        f"{result.baseline_seeds[0]} to {result.baseline_seeds[-1]})"
    )
    rows: list[Sequence[str | Text]] = []
    for test in result.tests:
        line = Text(f"\n{test.verdict}: {test.name}", style="bold")
        rows += [[line.append(f": {test.why}", style="not bold")], *map(_row, test.numbers)]
    shown = table("", ("", "model", "95 %", "random", "shuffled"), rows)
    note = f"\nwithout a control: {result.without_control}"
    return Group(Text(head), shown, Text(note, style="dim"))


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
