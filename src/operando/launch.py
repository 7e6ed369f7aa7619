"""From a checked recipe to a finished run folder, with a display; under torchrun, all ranks."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from operando import parallel
from operando.discovery.directions import refresher
from operando.display import RunDisplay, StudyDisplay
from operando.doctor.doctor import diagnose, show_finding, shown_live
from operando.files import read_object
from operando.models.load import count_layers
from operando.models.memory import memory_lines
from operando.recipe.data import PythonTaskConfig
from operando.recipe.run import Recipe
from operando.recipe_io import to_toml
from operando.report.contribution import draw_contribution
from operando.report.study import StudyResult, write_study
from operando.rewards.base import RewardFunction
from operando.run import Run, remove, with_dtype
from operando.run_folder import read_manifest, read_metrics, read_recipe, read_rows, start_of
from operando.setup import StepReport
from operando.study.analysis import base_of, pareto_points, rows_of, visible_differences
from operando.study.arms import LocalRunner, RayRunner, Study, plan, preregister, train_jobs
from operando.study.claims import judge_claims
from operando.study.contribution import (
    ContributionResult,
    check_sets,
    folder_of,
    layer_sets,
    summarise,
)
from operando.study.contribution import plan as plan_contribution
from operando.study.measure import measure_base, measure_run, read_metrics_of
from operando.tasks.base import Task
from operando.train import train


def quieten_libraries() -> None:
    """Keep other libraries' progress bars and notices out of the display."""
    from transformers.utils import logging as hf_logging

    # The display shows warnings itself.
    logging.getLogger("operando").addHandler(logging.NullHandler())
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    # peft 0.21 asks transformers for a property by its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def launch(
    console: Console,
    recipe: Recipe,
    *,
    resume: bool = False,
    functions: Mapping[str, RewardFunction] | None = None,
    task: Task | None = None,
) -> Path | None:
    """Train with a display and return the run folder; ranks other than 0 return None.

    The folder, runs_dir/name, must not exist, unless `resume` goes on with it. `functions` are the
    rewards of `kind = "function"` without a path, by the name of their part. A `task` of your own
    stands in the place of the recipe's, which becomes kind = "python" with its name.

    Example: launch(make_console(), load_recipe("demo"))
    """
    quieten_libraries()
    if task is not None:
        named = PythonTaskConfig(kind="python", name=task.name)
        recipe = recipe.model_copy(update={"task": named})
    parallel.start()
    try:
        folder = Path(recipe.runs_dir) / recipe.name
        if parallel.rank() == 0:
            command = shlex.join(["operando", *sys.argv[1:]])
            run = Run.resume(recipe) if resume else Run.create(recipe, command)
            parallel.barrier()
        else:
            parallel.barrier()
            run = Run.follow(recipe)
        try:
            _train_shown(console, recipe, run, functions or {}, task)
        finally:
            run.close()
            if parallel.rank() == 0 and len(read_metrics(folder)) <= 1 and not resume:
                remove(folder)  # nothing was trained: the next try may have the name
        return folder if parallel.rank() == 0 else None
    finally:
        parallel.stop()


def launch_arms(
    console: Console, recipes: Sequence[Recipe], check: Callable[[Path], None] | None = None
) -> list[Path]:
    """Train one recipe after the other and return their folders.

    What is finished is not trained again, and what was interrupted goes on, so that the same call
    takes up a study where it stopped. `check` looks at each folder before the next is trained.
    """
    folders = []
    for number, recipe in enumerate(recipes, start=1):
        folder = Path(recipe.runs_dir) / recipe.name
        if (folder / "results.json").is_file():
            Run.resume(recipe).close()  # the very same recipe, or an error that says what differs
        else:
            console.print(f"run {number} of {len(recipes)}: {recipe.name}", highlight=False)
            started = (folder / "manifest.json").is_file()
            trained = launch(console, recipe, resume=started)
            assert trained is not None, "a study runs in one process"
        if check is not None:
            check(folder)
        folders.append(folder)
    return folders


def run_contribution(
    console: Console, recipe: Recipe, width: int, seeds: Sequence[int], sets: Sequence[str]
) -> ContributionResult:
    """Train all layers and each layer set alone, over seeds; write shares, table and picture."""
    num_layers = count_layers(recipe.model)
    sets = list(sets) or layer_sets(num_layers, width)
    check_sets(sets, num_layers)
    arms = plan_contribution(recipe, sets, seeds)
    folders = dict(zip(arms, launch_arms(console, list(arms.values())), strict=True))
    file = folder_of(recipe) / "contribution.json"
    result = summarise(recipe.name, folders, file)
    draw_contribution(result, file.with_suffix(".svg"))
    return result


def run_study(console: Console, study: Study, at_once: int, on_ray: bool) -> StudyResult:
    """Train every arm and seed in a process each, ask all the same, and judge the claims."""
    quieten_libraries()
    registered = read_object(preregister(study), amendments=list)
    jobs = plan(study)
    left = [job for job in jobs.values() if not job.is_done]
    cores = os.cpu_count() or 1
    with StudyDisplay(console, "trained", len(jobs), len(left)) as display:
        if on_ray and left:
            runner = RayRunner(at_once)
            try:
                train_jobs(list(jobs.values()), runner, at_once, lambda job: display.show(job.name))
            finally:
                runner.close()
        else:
            local = LocalRunner(max(1, cores // at_once))
            train_jobs(list(jobs.values()), local, at_once, lambda job: display.show(job.name))
    values = {}
    with StudyDisplay(console, "asked", *[len(jobs) + len(study.arms)] * 2) as display:
        for arm, planned in study.arms.items():
            trained = read_recipe(jobs[arm, study.recipe.seeds[0]].folder)
            recipe = with_dtype(planned, trained.model.dtype)  # the base is asked in its arm's
            values[base_of(arm)] = read_metrics_of(study, [measure_base(study, recipe)])
            display.show(base_of(arm))
            files = []
            for seed in study.recipe.seeds:
                files.append(measure_run(study, jobs[arm, seed]))
                display.show(jobs[arm, seed].name)
            values[arm] = read_metrics_of(study, files)
    recipe = study.recipe
    amendments = [f"{a['written']} seeds {a['seeds_added']}" for a in registered["amendments"]]
    result = StudyResult(
        recipe,
        rows_of(recipe, values),
        judge_claims(recipe, values),
        visible_differences(recipe, values),
        pareto_points(recipe, values),
        amendments,
        study.folder / "study.md",
    )
    write_study(result)
    return result


def show_plan(console: Console, study: Study) -> None:
    """Print every run of a study and how far it is; train and write nothing."""
    for (arm, seed), job in plan(study).items():
        state = "done" if job.is_done else "started" if job.is_started else "to do"
        console.print(
            f"{state:7} {arm} seed {seed}: {job.recipe.steps} steps, {job.folder}",
            highlight=False,
            soft_wrap=True,
        )
    claims = ", ".join(study.recipe.claims) or "none"
    console.print(
        f"{len(plan(study))} runs; the same {study.recipe.evaluation.num} problems of "
        f"{', '.join(study.asked)} for all; claims: {claims}",
        highlight=False,
        soft_wrap=True,
    )


def _train_shown(
    console: Console,
    recipe: Recipe,
    run: Run,
    functions: Mapping[str, RewardFunction],
    task: Task | None,
) -> None:
    with RunDisplay(console, f"{recipe.name}: {run.folder}", recipe.steps) as display:
        shown: set[str] = set()
        found = shown_live(read_rows(run.folder), recipe)  # before an interruption

        def on_step(report: StepReport) -> None:
            display.show(report)
            for warning in run.warnings():
                if warning not in shown:
                    shown.add(warning)
                    text = f"warning: {warning}"
                    console.print(text, style="yellow", soft_wrap=True, markup=False)
            if "eval/correct" in report.metrics:
                for finding in diagnose(read_rows(run.folder), recipe):
                    if finding.name not in found:
                        found.add(finding.name)
                        console.print(*show_finding(finding), sep="\n", soft_wrap=True)

        train(
            recipe,
            run,
            task=task,
            functions=functions,
            refresh=refresher(recipe, start_of(run.folder)),
            on_step=on_step,
        )


def dry_run(console: Console, recipe: Recipe) -> None:
    """Load everything, sample and score nothing, and say what would be trained."""
    import tempfile

    from operando.setup import set_up

    quieten_libraries()
    with tempfile.TemporaryDirectory() as folder:
        trial = recipe.model_copy(update={"runs_dir": folder})
        run = Run.create(trial)
        try:
            setup = set_up(trial, run, {}, refresh=refresher(trial, start_of(run.folder)))
            chosen = read_manifest(run.folder).get("dtype")
            why = chosen["why"] if isinstance(chosen, dict) else None
        finally:
            run.close()
    trainable = setup.policy.trainable()
    count = sum(p.numel() for p in trainable.values())
    dtype = setup.recipe.model.dtype
    text = to_toml(with_dtype(recipe, dtype))
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    if why is not None:
        console.print(f'model.dtype = "auto" is {dtype} here: {why}', highlight=False)
    for line in [] if setup.memory is None else memory_lines(setup.memory):
        console.print(line, highlight=False, markup=False)
    console.print(
        f"ok: {count:,} trained parameters in {len(trainable)} tensors, blocks "
        f"{setup.policy.layers[0]}-{setup.policy.layers[-1]} of {len(setup.policy.blocks)}; "
        f"{len(setup.train_prompts)} training and {len(setup.held_out_prompts)} held-out prompts, "
        f"longest {max(len(p.ids) for p in setup.train_prompts)} tokens; sampler "
        f"{setup.sampler.name}. First prompt:",
        highlight=False,
    )
    console.print(setup.train_prompts[0].text, style="dim", highlight=False, markup=False)
