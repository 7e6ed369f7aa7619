"""Commands that make something: runs, studies, models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from operando.cli.app import Overrides, app, own
from operando.errors import UserError


@app.command()
def demo(
    hack: Annotated[
        bool, typer.Option(help="Show a reward hack, and a grader without one.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    runs_dir: Annotated[str, typer.Option(help="Where run folders go.")] = "runs",
) -> None:
    """Train a small model in a minute or two, show what changed, and write a report."""
    from operando.demo import hack_demo, learning_demo
    from operando.display import make_console

    console = make_console()
    report = (hack_demo if hack else learning_demo)(console, seed, runs_dir)
    print(report)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, stop before step 1.")] = False,
    resume: Annotated[bool, typer.Option(help="Continue the run of this name.")] = False,
) -> None:
    """Train from a recipe; the last line printed is the run folder."""
    from operando.recipe_io import load_recipe

    checked = load_recipe(recipe, tuple(overrides or ()))

    from operando.display import make_console
    from operando.launch import dry_run as check_only
    from operando.launch import launch

    console = make_console()
    if dry_run:
        check_only(console, checked)
        return
    folder = launch(console, checked, resume=resume)
    if folder is not None:
        print(folder)


@app.command()
def contribution(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    width: Annotated[int, typer.Option(min=1, help="Neighbouring layers trained together.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every arm.")] = 3,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="A layer set; instead of --width.")
    ] = None,
) -> None:
    """Train each block of layers alone: what share of the full gain does it recover?"""
    from operando.recipe_io import load_recipe

    checked = load_recipe(recipe, tuple(overrides or ()))

    from operando.display import make_console
    from operando.launch import run_contribution
    from operando.report.contribution import agreement_line, contribution_table
    from operando.study.contribution import folder_of

    own(folder_of(checked))
    console = make_console()
    numbers = range(first_seed, first_seed + seeds)
    result = run_contribution(console, checked, width, numbers, sets or [])
    console.print(contribution_table(result))
    if (line := agreement_line(result)) is not None:
        console.print(line, highlight=False, markup=False)
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
    """Train arms x seeds, evaluate all on the same problems, judge preregistered claims.

    Exit code 3 if one is falsified."""
    from operando.recipe_io import load_study_recipe

    load_study_recipe(recipe)  # its mistakes at once; those of its arms need the library

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
    own(checked.folder)
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
def config(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; absent with --schema.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option(help="Print the JSON schema of recipes.")] = False,
    check: Annotated[bool, typer.Option(help="Only check; print nothing but errors.")] = False,
) -> None:
    """Show a recipe with every default filled in, or the schema of all recipes."""
    import json

    from operando.recipe.run import Recipe
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


@app.command("import")
def import_model(
    source: Annotated[str, typer.Argument(help="smollm2, or the path of a GGUF file.")],
    name: Annotated[str | None, typer.Option(help="Name for model.id; default: from the file.")] = (
        None
    ),
) -> None:
    """Import a model file into the local cache; train it with model.id = NAME."""
    from operando.display import StageDisplay, make_console
    from operando.launch import quieten_libraries
    from operando.models.gguf import import_gguf, import_smollm2

    quieten_libraries()
    with StageDisplay(make_console()) as display:
        folder = (
            import_smollm2(display.show)
            if source == "smollm2"
            else import_gguf(Path(source), name, display.show)
        )
    print(folder)


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help="A pre-training recipe, e.g. starter.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option(help=r"Continue from the saved state; recipes with \[mixture] only.")
    ] = (False),
) -> None:
    """Train a small language model from scratch: word problems, habits, or a mixture of sources."""
    from operando.recipe_io import load_pretrain_recipe

    checked = load_pretrain_recipe(recipe, tuple(overrides or ()))

    from operando.display import PretrainDisplay, make_console
    from operando.launch import quieten_libraries
    from operando.pretrain.habits import pretrain_habits
    from operando.pretrain.lm import pretrain as run_pretraining
    from operando.pretrain.mixture import num_steps, pretrain_mixture
    from operando.recipe.deep import DeepPretrainRecipe
    from operando.recipe.mixture import MixtureRecipe

    quieten_libraries()
    own(Path(checked.out))
    if isinstance(checked, MixtureRecipe):
        with PretrainDisplay(make_console(), num_steps(checked)) as display:
            folder = pretrain_mixture(checked, resume, display.show)
    elif resume:
        raise UserError(f"--resume: {recipe} has no [mixture]; such a training saves no state")
    else:
        with PretrainDisplay(make_console(), checked.steps) as display:
            if isinstance(checked, DeepPretrainRecipe):
                folder = pretrain_habits(checked, display.show)
            else:
                folder = run_pretraining(checked, display.show)
    print(folder)


@app.command()
def sft(
    recipe: Annotated[str, typer.Argument(help="A fine-tuning recipe.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the saved state.")] = False,
) -> None:
    """Train a model on the answers of question-answer pairs, and write it as a model folder."""
    from operando.recipe_io import load_sft_recipe

    checked = load_sft_recipe(recipe, tuple(overrides or ()))

    from operando.display import PretrainDisplay, make_console
    from operando.launch import quieten_libraries
    from operando.pretrain.sft import finetune, num_steps

    quieten_libraries()
    own(Path(checked.out))
    with PretrainDisplay(make_console(), num_steps(checked), "fine-tuning") as display:
        folder = finetune(checked, resume, display.show)
    print(folder)


@app.command()
def pipeline(
    recipe: Annotated[str, typer.Argument(metavar="PIPELINE", help="A pipeline's TOML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="STAGE.a.b=value, or a key of its own, as seeds=[0]")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds at once, in a process each.")] = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Only this seed's stages, without the table.")
    ] = None,
) -> None:
    """Pre-train, fine-tune, train by RL, calibrate, audit and ask every stage the same problems;
    exit code 3 if the doctor finds an error in an RL stage."""
    from operando.recipe_io import load_pipeline_recipe

    load_pipeline_recipe(recipe)  # its mistakes at once; those of its stages need the library

    from operando.display import make_console
    from operando.launch import quieten_libraries
    from operando.recursive.pipeline import (
        load_pipeline,
        run_chain,
        run_seeds,
        stage_cells,
        stages_table,
    )

    given = tuple(overrides or ())
    checked, chains = load_pipeline(recipe, given)
    quieten_libraries()
    console = make_console()
    if seed is not None:
        if seed not in checked.seeds:
            raise UserError(f"--seed {seed}: the pipeline has {', '.join(map(str, checked.seeds))}")
        chains = [chain for chain in chains if chain.seed == seed]
    own(Path(checked.out) if seed is None else chains[0].folder)
    if jobs > 1 and len(chains) > 1:
        run_seeds(console, recipe, given, chains, jobs)
    else:
        for chain in chains:
            run_chain(console, checked, chain)
    if seed is None:
        console.print(stages_table(stage_cells(checked, chains), len(chains)))
        print(Path(checked.out) / "stages.json")
