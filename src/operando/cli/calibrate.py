"""Commands that fit the halt head and the drafting heads of a recursive model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from operando.cli.app import Overrides, app, own

calibrate_app = typer.Typer(
    no_args_is_help=True, help="Halting and drafting of a recursive model, its policy frozen."
)
app.add_typer(calibrate_app, name="calibrate")

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run or model folder of a recursive model.")
]
TaskOption = Annotated[
    str | None, typer.Option(help="words, graph_search, ...; default: the run's own.")
]
Out = Annotated[Path | None, typer.Option(help="The model folder to write.", show_default=False)]
Step = Annotated[int | None, typer.Option(min=1, help="A saved step; default: last.")]
NumFit = Annotated[int, typer.Option(min=1, help="Training prompts to fit on.")]
NumChoose = Annotated[int, typer.Option(min=1, help="Further training prompts, to choose on.")]
Num = Annotated[int, typer.Option(min=1, help="Held-out prompts to measure on.")]
Length = Annotated[int | None, typer.Option(min=1, help="Default: as the run, or as the answers.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="Of the completions to fit on; 0: greedy.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds of each timing.")]
Seed = Annotated[int, typer.Option(min=0)]


@calibrate_app.command("halting")
def calibrate_halting(
    run: Run,
    overrides: Overrides = None,
    task: TaskOption = None,
    out: Out = None,
    step: Step = None,
    max_loss: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of accuracy.")] = 0.01,
    min_agreement: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of tokens, with full depth.")
    ] = 0.98,
    min_loops: Annotated[int, typer.Option(min=1, help="No token exits before.")] = 1,
    num_fit: NumFit = 400,
    num_choose: NumChoose = 200,
    num: Num = 200,
    max_completion_length: Length = None,
    temperature: Temperature = 0.0,
    repeats: Repeats = 5,
    seed: Seed = 0,
) -> None:
    """Fit the halt head and choose its threshold; exit code 3 if none keeps the rule."""
    from operando.run_folder import check_model_or_run

    check_model_or_run(run)
    own(out or run)
    from operando.display import StageDisplay, make_console
    from operando.launch import quieten_libraries
    from operando.recursive.data import SourceConfig
    from operando.recursive.halt_head import Rule
    from operando.recursive.halting import HaltingConfig, halting_tables
    from operando.recursive.halting import calibrate_halting as calibrate

    quieten_libraries()
    console = make_console()
    source = SourceConfig(
        task, tuple(overrides or ()), step, num_fit, num_choose, num, max_completion_length, seed
    )
    config = HaltingConfig(source, Rule(max_loss, min_agreement), min_loops, temperature, repeats)
    with StageDisplay(console) as display:
        result = calibrate(run, out or run / "halting", config, display.show)
    console.print(halting_tables(result))
    print(result.file)
    if result.chosen is None:
        raise typer.Exit(3)


@calibrate_app.command("drafting")
def calibrate_drafting(
    run: Run,
    overrides: Overrides = None,
    task: TaskOption = None,
    out: Out = None,
    step: Step = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows that the number of drafts is chosen for.")
    ] = 1,
    num_fit: NumFit = 2000,
    num_choose: NumChoose = 200,
    num: Num = 200,
    max_completion_length: Length = None,
    temperature: Temperature = 0.0,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    lr: Annotated[float, typer.Option(min=0.0)] = 3e-3,
    repeats: Repeats = 5,
    seed: Seed = 0,
) -> None:
    """Fit the drafting heads and choose how many draft; exit code 3 if a token changes."""
    from operando.run_folder import check_model_or_run

    check_model_or_run(run)
    own(out or run)
    from operando.display import StageDisplay, make_console
    from operando.launch import quieten_libraries
    from operando.recursive.data import SourceConfig
    from operando.recursive.drafting import DraftingConfig, drafting_tables
    from operando.recursive.drafting import calibrate_drafting as calibrate

    quieten_libraries()
    console = make_console()
    source = SourceConfig(
        task, tuple(overrides or ()), step, num_fit, num_choose, num, max_completion_length, seed
    )
    config = DraftingConfig(source, epochs, lr, temperature, batch_size, repeats)
    with StageDisplay(console) as display:
        result = calibrate(run, out or run / "drafting", config, display.show)
    console.print(drafting_tables(result))
    print(result.file)
    if not result.is_exact():
        raise typer.Exit(3)
