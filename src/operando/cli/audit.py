"""Commands that look for what ails a model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from operando.cli.app import app
from operando.errors import UserError

audit_app = typer.Typer(no_args_is_help=True, help="What ails a model, beside a random one.")
app.add_typer(audit_app, name="audit")


@audit_app.callback()
def audit() -> None:
    """What ails a model, beside a random one."""


@audit_app.command("pathology")
def pathology(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run or model folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="task.key=value, with --task", show_default=False)
    ] = None,
    task: Annotated[str | None, typer.Option(help="Of a model folder; default: the run's.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="A saved step; default: last.")] = None,
    num: Annotated[int, typer.Option(min=2, help="Held-out problems.")] = 100,
    twins: Annotated[int, typer.Option(min=1, help="Random models of the same config.")] = 5,
    depths: Annotated[
        str | None, typer.Option(help="Numbers of loops, such as 4,12; default: R/2, 1.5R, 2R.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random models, shuffles, intervals.")] = 0,
) -> None:
    """Audit the loops of a recursive model beside random twins; exit code 3 if a test fails."""
    from operando.audit.pathology import audit_pathology
    from operando.audit.pathology_show import pathology_tables
    from operando.display import make_console
    from operando.launch import quieten_libraries

    given = [part.strip() for part in (depths or "").split(",") if part.strip()]
    if not all(part.isdigit() for part in given):
        raise UserError(f"--depths {depths}: expected numbers of loops, such as 4,12")
    quieten_libraries()
    result = audit_pathology(
        run, task=task, overrides=tuple(overrides or ()), step=step, num=num, twins=twins,
        depths=tuple(map(int, given)), seed=seed,
    )  # fmt: skip
    make_console().print(pathology_tables(result))
    print(result.file)
    if result.failed:
        raise typer.Exit(3)
