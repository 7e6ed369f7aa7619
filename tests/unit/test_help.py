"""What `--help` says reaches the reader: no word in brackets is taken for markup."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from operando import cli

TEXTS = [
    keyword.value.value
    for file in Path(cli.__file__).parent.glob("*.py")
    for call in ast.walk(ast.parse(file.read_text()))
    if isinstance(call, ast.Call)
    for keyword in call.keywords
    if keyword.arg == "help" and isinstance(keyword.value, ast.Constant)
]
TABLES = sorted({word for text in TEXTS for word in re.findall(r"\[[a-z]+\]", text)})


def commands(node: object, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    inner = getattr(node, "commands", None)
    if inner is None:
        yield words
        return
    for name, command in inner.items():
        yield from commands(command, (*words, name))


def test_help_shows_every_table_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert len(TABLES) >= 3
    shown = "".join(
        CliRunner().invoke(cli.app, [*words, "--help"]).output
        for words in commands(typer.main.get_command(cli.app))
    )
    assert [table for table in TABLES if table not in shown] == []
