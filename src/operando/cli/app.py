"""The command line's one app, and what its commands share."""

from __future__ import annotations

from typing import Annotated

import typer

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
