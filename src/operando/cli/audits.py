"""Commands that judge a run or a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from operando.cli.app import Overrides, app, model_or_run, own_if_run, own_run
from operando.errors import UserError


@app.command("eval")
def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A run or model folder, or a name that `operando import` made."
        ),
    ],
    num: Annotated[int | None, typer.Option(min=1, help="Held-out problems; default: all.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="A saved step; default: last.")] = None,
    max_completion_length: Annotated[int | None, typer.Option(min=1)] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Such as gsm8k,mmlu or words; default: the run's own.")
    ] = None,
    also: Annotated[
        list[Path] | None, typer.Option(help="One more run or model, beside the first.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Nodes of the graphs asked, such as 4,5,8.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="raw or chat; default: as the run's prompts.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="TASK=PATH or hub id; once for each task.")
    ] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="Default: as the run.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="The default.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Sample instead.")] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Answers per problem; with --temperature.")
    ] = 1,
    grader: Annotated[
        str | None, typer.Option(help="Of math500: ours (default) or math_verify.")
    ] = None,
) -> None:
    """Ask the base, the trained model and others the same held-out problems, and compare them."""
    run, others = model_or_run(run), [model_or_run(one) for one in also or []]
    own_if_run(run)
    from operando.display import StageDisplay, make_console
    from operando.evals.evaluate import eval_config, evaluation_tables
    from operando.evals.evaluate import evaluate as evaluate_models
    from operando.launch import quieten_libraries

    config = eval_config(
        tasks,
        prompt,
        data or [],
        num,
        few_shot,
        greedy,
        temperature,
        samples,
        max_completion_length,
        grader,
        sizes,
    )
    quieten_libraries()
    console = make_console()
    with StageDisplay(console) as display:
        result = evaluate_models(run, config, step=step, also=others, on_stage=display.show)
    console.print(evaluation_tables(result), highlight=False, markup=False)
    print(result.file)


@app.command()
def canary(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    prompts: Annotated[
        Path | None, typer.Option(help="A .jsonl file; default: the prompts in the package.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="A saved step; default: last.")] = None,
    max_completion_length: Annotated[int | None, typer.Option(min=1)] = None,
    classifier: Annotated[
        str, typer.Option(help="ours, or mechreward: that project's, to compare with.")
    ] = "ours",
) -> None:
    """Ask base and trained model canary prompts; try to game the feature rewards (exit code 3)."""
    own_run(run)
    from operando.display import make_console
    from operando.evals.canary import canary_lines, canary_table, run_canary
    from operando.evals.feature_gaming import game_features, gaming_lines
    from operando.launch import quieten_libraries

    quieten_libraries()
    result = run_canary(
        run,
        prompts=prompts,
        step=step,
        max_completion_length=max_completion_length,
        classifier=classifier,
    )
    console = make_console()
    console.print(canary_table(result))
    for line in canary_lines(result):
        console.print(line, highlight=False, markup=False)
    gaming = game_features(run, step)
    for one in gaming:
        for line in gaming_lines(one):
            console.print(line, highlight=False, markup=False)
    print(result.file)
    if any(one.beaten.value > 0 for one in gaming):
        raise typer.Exit(3)


@app.command()
def depth(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    step: Annotated[int | None, typer.Option(min=1, help="A saved step; default: last.")] = None,
    num: Annotated[int, typer.Option(min=2, help="Held-out problems.")] = 200,
    search: Annotated[
        int, typer.Option(min=1, help="Training problems on which constant edits are searched.")
    ] = 100,
    temperature: Annotated[
        float | None, typer.Option(min=0.01, help="Sample, both models by the same numbers.")
    ] = None,
) -> None:
    """How many of the trained model's tokens the base needs, beside placebos and constant edits."""
    own_run(run)
    from operando.display import make_console
    from operando.evals.depth import depth_lines, depth_table, measure_depth
    from operando.launch import quieten_libraries

    quieten_libraries()
    console = make_console()
    result = measure_depth(
        run,
        step=step,
        num=num,
        search=search,
        temperature=temperature,
        on_arm=lambda line: console.print(line, highlight=False, markup=False),
    )
    console.print(depth_table(result))
    for line in depth_lines(result):
        console.print(line, highlight=False, markup=False)
    print(result.file)


@app.command()
def certify(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    step: Annotated[int | None, typer.Option(min=1, help="A saved step; default: last.")] = None,
) -> None:
    """Check from the files alone that training changed only its layers; exit code 3 if not."""
    own_run(run)
    from operando.display import make_console, show_certificate
    from operando.evals.certify import certify_run
    from operando.launch import quieten_libraries

    quieten_libraries()
    certificate, file = certify_run(run, step)
    show_certificate(make_console(), certificate)
    print(file)
    if not certificate.passed:
        raise typer.Exit(3)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One or more run folders.")],
    out: Annotated[Path | None, typer.Option(help="Default: RUN/report.html.")] = None,
) -> None:
    """Write one self-contained HTML page about runs, and refresh their model cards."""
    from operando.run_folder import read_recipe

    for run in runs:
        read_recipe(run)

    from operando.report.cards import write_cards
    from operando.report.html import write_report

    page = write_report(runs, out)
    for run in runs:
        write_cards(run)
    print(page)


@app.command()
def doctor(run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")]) -> None:
    """Diagnose a run: findings with arithmetic and a remedy, or what was checked and is fine."""
    from operando.run_folder import read_recipe

    read_recipe(run)

    from operando.display import make_console
    from operando.doctor.doctor import examine, show_diagnosis

    result = examine(run)
    make_console().print(show_diagnosis(result))
    print(result.file)


@app.command()
def fuzz(
    target: Annotated[str, typer.Argument(help="A run folder, a recipe, or a task (words).")],
    overrides: Overrides = None,
    reward: Annotated[
        str | None, typer.Option(help="file.py:function, in place of the target's rewards.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Answers to edit, of each kind.")] = 16,
) -> None:
    """Search for edits of wrong answers that fool a reward; exit code 3 if there is one."""
    from operando.recipe_io import load_recipe

    if target.endswith(".toml"):
        load_recipe(target, tuple(overrides or ()))  # its mistakes before torch is there

    from operando.display import make_console
    from operando.evals.fuzz import fuzz_target, show_fuzz

    result = fuzz_target(target, reward=reward, num=num, overrides=tuple(overrides or ()))
    make_console().print(show_fuzz(result))
    print(result.file)
    if result.findings:
        raise typer.Exit(3)


@app.command()
def tags(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Show the tags that a run's model writes, base and trained model on the same prompts."""
    own_run(run)
    from operando.display import make_console
    from operando.evals.tags import audit_tags, tags_table

    result = audit_tags(run)
    make_console().print(tags_table(result))
    print(result.file)


audit_app = typer.Typer(
    no_args_is_help=True, help="Audit a model beside a randomly initialized one."
)
app.add_typer(audit_app, name="audit")


@audit_app.callback()
def audit() -> None:
    """Audit a model beside a randomly initialized one."""


@audit_app.command("pathology")
def pathology(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run or model folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="task.key=value, with --task", show_default=False)
    ] = None,
    task: Annotated[str | None, typer.Option(help="Of a model folder; default: the run's.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="A saved step; default: last.")] = None,
    num: Annotated[int, typer.Option(min=2, help="Held-out problems.")] = 100,
    baselines: Annotated[int, typer.Option(min=1, help="Random models of the same config.")] = 5,
    depths: Annotated[
        str | None, typer.Option(help="Numbers of loops, such as 4,12; default: R/2, 1.5R, 2R.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random models, shuffles, intervals.")] = 0,
) -> None:
    """Audit the loops of a recursive model beside random baselines; exit code 3 if a test fails."""
    own_if_run(run)
    from operando.display import make_console
    from operando.launch import quieten_libraries
    from operando.recursive.pathology import audit_pathology, pathology_tables

    given = [part.strip() for part in (depths or "").split(",") if part.strip()]
    if not all(part.isdigit() for part in given):
        raise UserError(f"--depths {depths}: expected numbers of loops, such as 4,12")
    quieten_libraries()
    result = audit_pathology(
        run,
        task=task,
        overrides=tuple(overrides or ()),
        step=step,
        num=num,
        baselines=baselines,
        depths=tuple(map(int, given)),
        seed=seed,
    )
    make_console().print(pathology_tables(result))
    print(result.file)
    if result.failed:
        raise typer.Exit(3)
