"""Tables on the terminal: no number is cut, whatever stands beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from operando.tables import TextTable, interval, limits, table

PACKAGE = Path(__file__).parents[2] / "src" / "operando"

numbers = st.builds(
    lambda x, form: format(x, form),
    st.floats(-1e6, 1e6),
    st.sampled_from([".0f", "+.1f", ".4f", ".2e", "+.1%", ",.0f"]),
)
values = st.one_of(
    st.just(""),
    numbers,
    st.lists(numbers, min_size=3, max_size=3).map(lambda x: f"{x[0]} ({x[1]} to {x[2]})"),
)
Given = tuple[str, list[str], list[tuple[str, ...]], list[str]]
words = st.lists(st.text("abcdefgh[]_/", min_size=1, max_size=14), max_size=8).map(" ".join)


@st.composite
def tables(draw: st.DrawFn) -> Given:
    """Return what `table` takes: 1 to 12 columns of words or numbers in any order."""
    kinds = draw(st.lists(st.booleans(), min_size=1, max_size=12))
    heads = [f"{draw(words) or 'x'} {place}" for place in range(len(kinds))]
    row = st.tuples(*(words if is_words else values for is_words in kinds))
    rows: list[tuple[str, ...]] = draw(st.lists(row, min_size=1, max_size=5))
    if len(kinds) > 1 and draw(st.booleans()):
        rows.insert(0, (draw(words),))
    return draw(words), heads, rows, [h for h, w in zip(heads, kinds, strict=True) if w]


def lines(shown: TextTable, width: int) -> list[str]:
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(shown)
    return capture.get().splitlines()


@given(tables(), st.sampled_from([80, 100, 160]))
def test_every_cell_of_numbers_is_whole_on_one_line(given: Given, width: int) -> None:
    shown = table(*given)
    found = lines(shown, width)
    assert max(map(len, found)) <= width
    for row in shown.rows:
        for head, cell in zip(shown.columns, row, strict=False):
            if head not in shown.words and len(row) > 1:
                at = rf"(?<![^ ]){re.escape(str(cell))}(?![^ ])"
                assert any(re.search(at, line) for line in found), (cell, found)


@given(tables())
def test_no_letter_is_lost_or_read_as_markup(given: Given) -> None:
    """Each column of words stands in each block of columns; the others once."""

    shown = table(*given)

    def letters(texts: list[str]) -> str:
        return "".join(sorted("".join(texts).replace(" ", "")))

    wide = lines(shown, 10_000)
    cells = [str(cell) for row in shown.rows for cell in row]
    assert letters(wide) == letters([shown.title, *shown.columns, *cells])
    if len(narrow := [line for line in lines(shown, 80)]) and "" not in narrow[1:]:
        assert letters(narrow) == letters(wide)


def test_what_does_not_fit_comes_beneath_with_the_words_again() -> None:
    rows = [("base", "0.123456 (0.1 to 0.2)", "1.5"), ("a trained one", "2", "3.25")]
    shown = table("who", ("model", "right", "p"), rows, ("model",))
    assert lines(shown, 80) == [
        "who",
        "model                          right     p",
        "base           0.123456 (0.1 to 0.2)   1.5",
        "a trained one                      2  3.25",
    ]
    assert lines(shown, 33) == [
        "who",
        "model                       right",
        "base        0.123456 (0.1 to 0.2)",
        "a trained                       2",
        "one",
        "",
        "model             p",
        "base            1.5",
        "a trained one  3.25",
    ]


def test_long_names_are_folded_before_a_number_is_moved() -> None:
    names = tuple("n" * size for size in (30, 20, 30))
    shown = table("", ("a", "b", "c", "d"), [(*names, "1.5 (1.25 to 2)")], ("a", "b", "c"))
    found = lines(shown, 80)
    assert [len(line) for line in found] == [80, 80, 52]
    assert found[0].split() == ["a", "b", "c", "d"] and found[1].endswith("n 1.5 (1.25 to 2)")
    assert "".join(found).count("n") == 80


def test_a_row_of_one_cell_is_a_line_and_a_short_row_ends_in_blanks() -> None:
    rows = [("a site with a long name",), ("x", "1.0"), ("y",), ("z", "", "3")]
    assert lines(table("", ("", "a", "b"), rows[:2] + rows[3:]), 80) == [
        "     a  b",
        "a site with a long name",
        "x  1.0",
        "z       3",
    ]


def test_an_estimate_with_its_limits() -> None:
    assert interval((0.1, 0.0, 0.25), "+.0%") == "+10% (+0% to +25%)"
    assert limits((0.1, 0.0, 0.25), ".1%") == "0.0% to 25.0%"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.stem)
def test_no_table_is_made_by_hand(file: Path) -> None:
    assert "rich.table" not in file.read_text(), "tables.table makes it, so that no number is cut"
