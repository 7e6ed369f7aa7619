"""Commands on a task before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from operando.cli.app import Overrides, app
from operando.errors import UserError

task_app = typer.Typer(no_args_is_help=True, help="Check a task before training on it.")
app.add_typer(task_app, name="task")


@task_app.callback()
def _group() -> None:
    """Keep `check` a name of its own while it is the only one."""


@task_app.command("check")
def check(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    num: Annotated[
        int, typer.Option(min=1, help="Training questions that the base is asked.")
    ] = 32,
    samples: Annotated[int, typer.Option(min=2, help="Of each of them.")] = 8,
    no_samples: Annotated[bool, typer.Option("--no-samples", help="Ask no model.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="A .json file for the same in numbers.", show_default=False)
    ] = None,
) -> None:
    """Say whether a task's prompts, verifier and splits are sound, and whether RL can learn it.

    Exit code 3 if the verifier calls a gold answer wrong.
    """
    from operando.recipe_io import load_recipe

    checked = load_recipe(recipe, tuple(overrides or ()))
    if out is not None and (out.suffix != ".json" or out.is_dir()):
        raise UserError(f"--out {out}: expected a file that ends in .json")

    from dataclasses import asdict

    from operando.display import make_console
    from operando.evals.task_check import check_task, task_check_lines
    from operando.launch import quieten_libraries
    from operando.run import write_json

    quieten_libraries()
    found = check_task(checked, num=num, samples=None if no_samples else samples)
    console = make_console()
    for line in task_check_lines(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        write_json(out, asdict(found))
        print(out)
    if not found.passed:
        raise typer.Exit(3)
