"""The recipes that ship with operando, and its version."""

from __future__ import annotations

from typing import Annotated

import typer

from operando.cli.app import app


@app.command()
def recipes() -> None:
    """List the shipped recipes: what each asks, on what hardware, and how long it takes."""
    from rich.console import Console

    from operando.recipe_io import listed, shipped_recipes
    from operando.tables import table

    heads = ("recipe", "question", "hardware and time")
    rows = [listed(file) for file in shipped_recipes()]
    Console().print(table("", heads, rows, words=heads), highlight=False, markup=False)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        import operando

        print(operando.__version__)
        raise typer.Exit
