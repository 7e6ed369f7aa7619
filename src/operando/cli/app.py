"""The command line's one app, and what its commands share."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from operando.errors import UserError, nearest
from operando.owned import owned

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement learning of language models with the internals in the loop, "
    "and the control beside every claim.",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="a.b=value, TOML values", show_default=False)
]


held = ExitStack()
"""Folders that this command writes; `main` gives them back."""


def own(folder: Path) -> None:
    """Hold a folder till the command's end; one that another process writes is an error."""
    held.enter_context(owned(folder))


def own_run(folder: Path) -> None:
    """Hold a run folder till the command's end; what is none is an error, before torch is there."""
    from operando.run_folder import read_recipe

    read_recipe(folder)
    own(folder)


def model_or_run(given: Path) -> Path:
    """Return the folder given, or an imported model's where it is no folder but such a name."""
    from operando.models.home import cache_folder, imported_models

    if given.exists():
        return given
    names = imported_models()
    if str(given) in names:
        return cache_folder() / "models" / given
    raise UserError(
        f"{given}: neither a run folder (with manifest.json) nor a model folder (with "
        f"config.json), nor an imported model.{nearest(str(given), names)} Imported: "
        f"{', '.join(names) or 'none'}"
    )


def own_if_run(folder: Path) -> None:
    """Hold a run folder till the command's end; of a model folder, nothing is written there."""
    from operando.run_folder import check_model_or_run

    check_model_or_run(folder)
    if (folder / "manifest.json").is_file():
        own_run(folder)
