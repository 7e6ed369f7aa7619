"""The command line: reads arguments, calls the library, prints. No logic, no torch import here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from operando.errors import UserError

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


@app.command()
def demo(
    hack: Annotated[bool, typer.Option(help="Show a reward hack, and what holds it.")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    runs_dir: Annotated[str, typer.Option(help="Where run folders go.")] = "runs",
) -> None:
    """Train the starter model on word problems in one or two minutes and write a report."""
    from operando.demo import hack_demo, learning_demo
    from operando.display import make_console

    console = make_console()
    report = (hack_demo if hack else learning_demo)(console, seed, runs_dir)
    print(report)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything and stop before step 1.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on where the run of this name stopped.")] = False,
) -> None:
    """Train as a recipe says. Prints the run folder last."""
    from operando.display import make_console
    from operando.launch import dry_run as check_only
    from operando.launch import launch
    from operando.recipe_io import load_recipe

    checked = load_recipe(recipe, tuple(overrides or ()))
    console = make_console()
    if dry_run:
        check_only(console, checked)
        return
    folder = launch(console, checked, resume=resume)
    if folder is not None:
        print(folder)


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    num: Annotated[int | None, typer.Option(min=1, help="Held-out problems; default: all.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="A saved step; default: last.")] = None,
    max_completion_length: Annotated[int | None, typer.Option(min=1)] = None,
    tasks: Annotated[
        str | None, typer.Option(help="gsm8k,mmlu,math500; default: the run's own task.")
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
    samples: Annotated[int, typer.Option(min=1, help="A problem; with --temperature.")] = 1,
) -> None:
    """Answer held-out problems with the base and the trained model on the same prompts, paired."""
    from operando.audit.evaluate import evaluate_run
    from operando.audit.outside import evaluate_outside, outside_config, outside_table
    from operando.display import make_console, show_evaluation
    from operando.launch import quieten_libraries

    config = outside_config(
        tasks, prompt, data or [], num, few_shot, greedy, temperature, samples,
        max_completion_length,
    )  # fmt: skip
    quieten_libraries()
    console = make_console()
    if config is None:
        result = evaluate_run(run, step=step, num=num, max_completion_length=max_completion_length)
        show_evaluation(console, result)
    else:
        result = evaluate_outside(run, config, step)
        console.print(outside_table(result))
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
        str, typer.Option(help="ours, or seed: mechreward's, to compare with.")
    ] = "ours",
) -> None:
    """Ask base and trained model canary prompts; try to game its feature rewards (exit code 3)."""
    from operando.audit.canary import canary_table, run_canary
    from operando.audit.feature_gaming import game_features, gaming_lines
    from operando.display import make_console
    from operando.launch import quieten_libraries

    quieten_libraries()
    result = run_canary(
        run, prompts=prompts, step=step, max_completion_length=max_completion_length,
        classifier=classifier,
    )  # fmt: skip
    console = make_console()
    console.print(canary_table(result))
    gaming = game_features(run, step)
    for one in gaming:
        for line in gaming_lines(one):
            console.print(line, highlight=False, markup=False)
    print(result.file)
    if any(one.beaten.value > 0 for one in gaming):
        raise typer.Exit(3)


@app.command()
def certify(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    step: Annotated[int | None, typer.Option(min=1, help="A saved step; default: last.")] = None,
) -> None:
    """Check from the files alone that training landed only in its layers; exit code 3 if not."""
    from operando.audit.certify import certify_run
    from operando.display import make_console, show_certificate
    from operando.launch import quieten_libraries

    quieten_libraries()
    certificate, file = certify_run(run, step)
    show_certificate(make_console(), certificate)
    print(file)
    if not certificate.passed:
        raise typer.Exit(3)


@app.command()
def contribution(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    width: Annotated[int, typer.Option(min=1, help="Neighbouring layers trained together.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every arm: 0, 1, ...")] = 3,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="A layer set; instead of --width.")
    ] = None,
) -> None:
    """Train each block of layers alone: which share of all layers' gain does it bring?"""
    from operando.display import make_console
    from operando.launch import run_contribution
    from operando.recipe_io import load_recipe
    from operando.report.contribution import contribution_table

    checked = load_recipe(recipe, tuple(overrides or ()))
    console = make_console()
    result = run_contribution(console, checked, width, seeds, sets or [])
    console.print(contribution_table(result))
    print(result.file)


@app.command()
def study(
    recipe: Annotated[str, typer.Argument(metavar="STUDY", help="A study's TOML file.")],
    jobs: Annotated[int, typer.Option(min=1, help="Runs trained at once.")] = 1,
    ray: Annotated[
        bool, typer.Option(help="As Ray tasks: the cluster at RAY_ADDRESS, else a local one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Check it and print the plan.")] = False,
) -> None:
    """Train arms x seeds, ask all the same, judge preregistered claims; 3 if one is falsified."""
    from operando.display import make_console
    from operando.launch import run_study, show_plan
    from operando.report.study import study_tables, visible_sentences
    from operando.study.arms import load_study
    from operando.study.claims import headline

    checked = load_study(recipe)
    console = make_console()
    if dry_run:
        show_plan(console, checked)
        return
    result = run_study(console, checked, jobs, ray)
    for table in study_tables(result):
        console.print(table)
    for line in (*visible_sentences(result), *(j.sentence for j in result.judgements)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(headline(result.recipe, result.judgements), markup=False, soft_wrap=True)
    print(result.file)
    if result.is_falsified:
        raise typer.Exit(3)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One or more run folders.")],
    out: Annotated[Path | None, typer.Option(help="Default: RUN/report.html.")] = None,
) -> None:
    """Write one self-contained HTML page about runs, and refresh their model cards."""
    from operando.report.cards import write_cards
    from operando.report.html import write_report

    page = write_report(runs, out)
    for run in runs:
        write_cards(run)
    print(page)


@app.command()
def doctor(run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")]) -> None:
    """Say what ails a run, with the arithmetic and a remedy, or what was checked and is well."""
    from operando.audit.doctor import examine, show_diagnosis
    from operando.display import make_console

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
    """Look for edits of answers that a reward pays for; exit code 3 if there is one."""
    from operando.audit.fuzz import fuzz_target, show_fuzz
    from operando.display import make_console

    result = fuzz_target(target, reward=reward, num=num, overrides=tuple(overrides or ()))
    make_console().print(show_fuzz(result))
    print(result.file)
    if result.findings:
        raise typer.Exit(3)


@app.command()
def tags(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Show the tags a run's model writes, base beside trained on the same prompts."""
    from operando.audit.tags import audit_tags, tags_table
    from operando.display import make_console

    result = audit_tags(run)
    make_console().print(tags_table(result))
    print(result.file)


@app.command()
def config(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; absent with --schema.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option(help="Print the JSON schema of recipes.")] = False,
    check: Annotated[bool, typer.Option(help="Only check; print nothing but errors.")] = False,
) -> None:
    """Show a recipe with every default filled in, or the schema of all recipes."""
    import json

    from operando.recipe import Recipe
    from operando.recipe_io import load_recipe, shipped_recipes, to_toml

    if schema:
        print(json.dumps(Recipe.model_json_schema(), indent=1))
    elif recipe is None:
        names = ", ".join(file.stem for file in shipped_recipes())
        raise UserError(f"config: name a recipe, or ask for --schema. Shipped: {names}")
    else:
        resolved = to_toml(load_recipe(recipe, tuple(overrides or ())))
        if not check:
            print(resolved, end="")


features_app = typer.Typer(no_args_is_help=True, help="SAE features that go with right answers.")
app.add_typer(features_app, name="features")


@features_app.command("discover")
def features_discover(
    recipe: Annotated[str, typer.Argument(help="A recipe with a [discover] table.")],
    overrides: Overrides = None,
) -> None:
    """Find features that tell right from wrong answers; exit code 3 if the gate stays closed."""
    from operando.discovery.features import discover
    from operando.discovery.show import show_discovery
    from operando.display import counting, make_console
    from operando.launch import quieten_libraries
    from operando.recipe_io import load_recipe

    quieten_libraries()
    checked = load_recipe(recipe, tuple(overrides or ()))
    console = make_console()
    with counting(console, "prompts answered") as progress:
        found = discover(checked, progress)
    show_discovery(console, found)
    print(found.pack or found.file)
    if not found.gate.passed:
        raise typer.Exit(3)


sae_app = typer.Typer(no_args_is_help=True, help="Sparse autoencoders over a run's stages.")
app.add_typer(sae_app, name="sae")


@sae_app.command("train")
def sae_train(
    run: Annotated[Path, typer.Argument(help="A run folder with checkpoints.")],
    layers: Annotated[str, typer.Option(help='Layers to read after, e.g. "2,4".')],
    expansion: Annotated[int, typer.Option(min=1, help="Features a dimension.")] = 8,
    k: Annotated[int, typer.Option(min=1, help="Active features a token.")] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="Chains an arm.")] = 3,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    lr: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    mode: Annotated[str, typer.Option(help='"default", or "seed" as OhhMoo/SAE-RL.')] = "default",
    select: Annotated[
        str, typer.Option(help="float32, or bfloat16: preselect features, then exact values.")
    ] = "float32",
    texts: Annotated[str, typer.Option(help="Whose completions: base, last, or both.")] = "both",
    tokens: Annotated[int, typer.Option(min=1000, help="Most tokens to read.")] = 20_000,
) -> None:
    """Train a warm-start SAE chain over the stages, with its null arm. Goes on where it stopped."""
    from operando.display import make_console
    from operando.drift.chain import ChainConfig
    from operando.drift.commands import train_run_saes
    from operando.launch import quieten_libraries

    quieten_libraries()
    config = ChainConfig(expansion, k, mode, epochs, lr=lr, select=select)  # pyright: ignore[reportArgumentType]
    train_run_saes(make_console(), run, layers, texts, tokens, config, seeds)
    print(run / "saes")


@sae_app.command("eval")
def sae_eval(run: Annotated[Path, typer.Argument(help="A run folder with SAE chains.")]) -> None:
    """Show how good the chains' SAEs are on held-out texts: error, sparsity, loss recovered."""
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
    """Show what changed inside between a run's stages, the null arm beside every number."""
    from operando.display import make_console
    from operando.drift.commands import compare_drift, show_drift, show_frozen, show_grid
    from operando.launch import quieten_libraries

    quieten_libraries()
    console = make_console()
    if runs[0] != "compare" and len(runs) != 1:
        raise UserError("drift: give one run folder, or: drift compare RUN_A RUN_B RUN_C")
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


@app.command("import")
def import_model(
    source: Annotated[str, typer.Argument(help="smollm2, or the path of a GGUF file.")],
    name: Annotated[str | None, typer.Option(help="Name for model.id; default: from the file.")] = (
        None
    ),
) -> None:
    """Bring a model once into the local cache; then train it by model.id = NAME."""
    from operando.models.gguf import import_gguf, import_smollm2

    folder = import_smollm2() if source == "smollm2" else import_gguf(Path(source), name)
    print(folder)


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A pre-training recipe, e.g. starter.")],
    overrides: Overrides = None,
) -> None:
    """Train a small language model from nothing, as the starter model was made."""
    from operando.display import PretrainDisplay, make_console
    from operando.pretrain.lm import pretrain as run_pretraining
    from operando.recipe_io import load_pretrain_recipe

    checked = load_pretrain_recipe(recipe, tuple(overrides or ()))
    with PretrainDisplay(make_console(), checked.steps) as display:
        folder = run_pretraining(checked, display.show)
    print(folder)


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; go on with the same command (train: and --resume)", file=sys.stderr)
        sys.exit(130)
