"""Commands about what is inside a model: features, directions, SAEs, drift."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from operando.cli.app import Overrides, app, own, own_run
from operando.errors import UserError

features_app = typer.Typer(no_args_is_help=True, help="SAE features that go with right answers.")
app.add_typer(features_app, name="features")


@features_app.command("discover")
def features_discover(
    recipe: Annotated[str, typer.Argument(help=r"A recipe with a \[discover] table.")],
    overrides: Overrides = None,
) -> None:
    """Find features that tell right from wrong answers; exit code 3 if the gate stays closed."""
    from operando.recipe_io import load_recipe

    checked = load_recipe(recipe, tuple(overrides or ()))

    from operando.discovery.features import discover
    from operando.discovery.show import show_discovery
    from operando.display import counting, make_console
    from operando.launch import quieten_libraries

    quieten_libraries()
    own(Path(checked.runs_dir) / f"{checked.name}_features")
    console = make_console()
    with counting(console, "prompts answered") as progress:
        found = discover(checked, progress)
    show_discovery(console, found)
    print(found.feature_set or found.file)
    if not found.gate.passed:
        raise typer.Exit(3)


direction_app = typer.Typer(no_args_is_help=True, help="Directions from contrastive pairs.")
app.add_typer(direction_app, name="direction")


@direction_app.command("extract")
def direction_extract(
    recipe: Annotated[str, typer.Argument(help=r"A recipe with a \[direction] table.")],
    overrides: Overrides = None,
) -> None:
    """Extract a hack-ward direction and its controls; exit code 3 if it fails its gate."""
    from operando.recipe_io import load_recipe

    checked = load_recipe(recipe, tuple(overrides or ()))

    from operando.discovery.directions import extract
    from operando.discovery.show import show_directions
    from operando.display import make_console
    from operando.launch import quieten_libraries

    quieten_libraries()
    own(Path(checked.runs_dir) / f"{checked.name}_directions")
    found = extract(checked)
    show_directions(make_console(), found)
    print(found.files["real"])
    if checked.direction and found.accuracy["real"].value < checked.direction.min_accuracy:
        raise typer.Exit(3)


@direction_app.command("validate")
def direction_validate(
    recipe: Annotated[str, typer.Argument(help="The recipe that they were extracted with.")],
    overrides: Overrides = None,
) -> None:
    """Judge the written directions on pairs of the task's held-out split."""
    from operando.recipe_io import load_recipe

    checked = load_recipe(recipe, tuple(overrides or ()))

    from operando.discovery.directions import validate
    from operando.discovery.show import accuracy_table
    from operando.display import make_console
    from operando.launch import quieten_libraries

    quieten_libraries()
    make_console().print(accuracy_table(validate(checked), checked.eval.num, {}))


@direction_app.command("steer")
def direction_steer(
    recipe: Annotated[str, typer.Argument(help="The recipe that they were extracted with.")],
    overrides: Overrides = None,
    scale: Annotated[
        list[float] | None, typer.Option(help="In norms of the residual; may be repeated.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 50,
) -> None:
    """Add each direction while the base answers: do the answers turn to hacks?"""
    from operando.recipe_io import load_recipe

    checked = load_recipe(recipe, tuple(overrides or ()))

    from operando.discovery.directions import steer
    from operando.discovery.show import steering_table
    from operando.display import make_console
    from operando.launch import quieten_libraries

    quieten_libraries()
    make_console().print(steering_table(steer(checked, scale or [0.2, 0.5, 1.0], num)))


sae_app = typer.Typer(no_args_is_help=True, help="Sparse autoencoders over a run's stages.")
app.add_typer(sae_app, name="sae")


@sae_app.command("train")
def sae_train(
    run: Annotated[Path, typer.Argument(help="A run folder with checkpoints.")],
    layers: Annotated[str, typer.Option(help='Layers to read after, e.g. "2,4".')],
    expansion: Annotated[int, typer.Option(min=1, help="Features per dimension.")] = 8,
    k: Annotated[int | None, typer.Option(min=1, help="Active features per token; 16.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Chains per arm.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 10.")] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Default: 1e-3.")] = None,
    mode: Annotated[
        str,
        typer.Option(
            help='"default", or "sae_rl": as published (k 64, after the last layer 256; 20 epochs '
            "at 1e-4; 20 % of the rows held out; sinks kept). Options given beside it count."
        ),
    ] = "default",
    select: Annotated[
        str | None, typer.Option(help="float32, or bfloat16: preselect features, then exact.")
    ] = None,
    sinks: Annotated[
        str | None, typer.Option(help="drop, or keep: train on attention sinks too.")
    ] = None,
    texts: Annotated[str, typer.Option(help="Whose completions: base, last, or both.")] = "both",
    tokens: Annotated[int, typer.Option(min=1000, help="Most tokens to read.")] = 20_000,
) -> None:
    """Train a warm-start SAE chain over the stages, with its null arm. Goes on where it stopped."""
    own_run(run)
    from operando.display import make_console
    from operando.drift.commands import train_run_saes
    from operando.launch import quieten_libraries

    quieten_libraries()
    train_run_saes(
        make_console(),
        run,
        layers,
        texts,
        tokens,
        seeds,
        mode,
        expansion,
        k=k,
        epochs=epochs,
        lr=lr,
        select=select,
        sinks=sinks,
    )
    print(run / "saes")


@sae_app.command("eval")
def sae_eval(run: Annotated[Path, typer.Argument(help="A run folder with SAE chains.")]) -> None:
    """Show how good the chains' SAEs are on held-out texts: error, sparsity, loss recovered."""
    own_run(run)
    from operando.display import make_console
    from operando.drift.evaluate import evaluate_saes, quality_table
    from operando.launch import quieten_libraries

    quieten_libraries()
    rows, file = evaluate_saes(run)
    make_console().print(quality_table(run, rows))
    print(file)


@app.command()
def drift(
    runs: Annotated[list[str], typer.Argument(help="A run folder; or: compare RUN_A RUN_B RUN_C.")],
    frozen: Annotated[
        Path | None, typer.Option(help="One SAE of any format for all stages, not refitted.")
    ] = None,
    grid: Annotated[
        bool, typer.Option(help="Base and last model on both texts: which of the two changed?")
    ] = False,
    layers: Annotated[
        str | None, typer.Option(help="Of --grid without an SAE; default: all.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Where the SAE reads, if it does not say so itself.")
    ] = None,
) -> None:
    """Show what changed inside the model between a run's stages, a null arm beside every number."""
    if runs[0] != "compare" and len(runs) != 1:
        raise UserError("drift: give one run folder, or: drift compare RUN_A RUN_B RUN_C")
    for folder in dict.fromkeys(runs[1:] if runs[0] == "compare" else runs):
        own_run(Path(folder))

    from operando.display import make_console
    from operando.drift.commands import show_drift, show_frozen, show_grid
    from operando.drift.compare import compare_drift
    from operando.launch import quieten_libraries

    quieten_libraries()
    console = make_console()
    if layers is not None and not grid:
        raise UserError("drift: --layers belongs to --grid")
    if site is not None and not (grid or frozen):
        raise UserError("drift: --site belongs to --frozen or --grid")
    if runs[0] == "compare":
        if grid or frozen:
            raise UserError("drift compare: takes neither --frozen nor --grid")
        print(compare_drift(console, [Path(r) for r in runs[1:]]))
    elif grid:
        print(show_grid(console, Path(runs[0]), layers, frozen, site))
    elif frozen is not None:
        print(show_frozen(console, Path(runs[0]), frozen, site))
    else:
        print(show_drift(console, Path(runs[0])))
