"""`operando pipeline`: one model from nothing to calibrated heads, and what each stage cost.

    OUT/seed_K/base/ sft/         model folders
    OUT/seed_K/NAME/              the run of each RL stage, in order
    OUT/seed_K/halting/ fast/     the last model with its halt head, then with draft heads too
    OUT/seed_K/answers.parquet    every stage's answers to the same problems
    OUT/stages.json               the table over seeds

What is there is not made again, and what was interrupted goes on, so the same command takes up a
pipeline where it stopped; a stage that is there but was made by another recipe is an error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from operando.display import PretrainDisplay, StageDisplay, StudyDisplay
from operando.doctor.doctor import examine
from operando.errors import GateFailed, UserError, nearest
from operando.evals.evaluate import evaluate, evaluation_tables
from operando.evals.questions import EvalConfig
from operando.files import parse_json, read_object, read_text
from operando.launch import launch_arms
from operando.pretrain import mixture, sft
from operando.pretrain.fit import STATE, forget_state
from operando.recipe.mixture import MixtureRecipe, SftRecipe
from operando.recipe.pipeline import AskedTask, PipelineRecipe
from operando.recipe.run import Recipe
from operando.recipe_io import (
    load_pipeline_recipe,
    load_pretrain_recipe,
    load_recipe,
    load_sft_recipe,
    recipe_file,
)
from operando.recursive.data import SourceConfig
from operando.recursive.drafting import DraftingConfig, calibrate_drafting, drafting_tables
from operando.recursive.halting import HaltingConfig, calibrate_halting, halting_tables
from operando.recursive.pathology import audit_pathology, pathology_tables
from operando.run import atomic_path, differences, write_json
from operando.stats.bootstrap import hierarchical_bootstrap, rate_interval
from operando.stats.intervals import Interval, paired_difference
from operando.study.arms import POLL_SECONDS, LocalRunner
from operando.tables import TextTable, interval, limits, read_parquet, table
from operando.update.checkpoint import checkpoint_folder

FIXED = ("pretrain", "sft")
MOST_FIT = 400  # training prompts that the halt head is fitted on
OWN_KEYS = ("out", "model", "seed", "name", "runs_dir", "model.id")  # set by the pipeline


@dataclass(frozen=True)
class Chain:
    """The recipes of one seed, every path filled in."""

    seed: int
    folder: Path
    pretrain: MixtureRecipe
    sft: SftRecipe
    rl: Mapping[str, Recipe]

    @property
    def models(self) -> dict[str, Path]:
        """Return what is asked, by stage: two model folders, then the runs."""
        runs = {name: self.folder / name for name in self.rl}
        return {"base": self.folder / "base", "sft": self.folder / "sft", **runs}


@dataclass(frozen=True)
class Cell:
    """A stage on a task: share right, and the change since the stage before and since the base."""

    stage: str
    task: str
    n: int
    right: Interval
    since_last: Interval | None
    since_base: Interval | None


# --- the plan ------------------------------------------------------------------------------------


def load_pipeline(name: str, overrides: Sequence[str]) -> tuple[PipelineRecipe, list[Chain]]:
    """Return the checked pipeline with the recipes of every seed; nothing is read or trained.

    An override `STAGE.a.b=value` is of that stage's recipe, any other of the pipeline's.
    """
    plain = load_pipeline_recipe(name)
    stages = (*FIXED, *plain.rl)
    own, by_stage = [], {stage: [] for stage in stages}
    for override in overrides:
        first, dot, rest = override.partition(".")
        if dot and first in by_stage and "=" not in first:
            key = rest.partition("=")[0].strip()
            if key in OWN_KEYS:
                raise UserError(f"{override}: {key} of a stage is set by the pipeline")
            by_stage[first].append(rest)
        elif dot and "=" not in first and first not in PipelineRecipe.model_fields:
            raise UserError(
                f"{override}: no stage {first!r}.{nearest(first, stages)} "
                f"Stages: {', '.join(stages)}"
            )
        else:
            own.append(override)
    recipe = load_pipeline_recipe(name, tuple(own))
    beside = recipe_file(name).parent
    return recipe, [_chain(recipe, seed, beside, by_stage) for seed in recipe.seeds]


def _chain(
    recipe: PipelineRecipe, seed: int, beside: Path, overrides: Mapping[str, Sequence[str]]
) -> Chain:
    folder = Path(recipe.out) / f"seed_{seed}"
    own = (f"seed={seed}",)
    first = load_pretrain_recipe(
        _beside(beside, recipe.pretrain),
        (*overrides["pretrain"], *own, f"out={json.dumps(str(folder / 'base'))}"),
    )
    if not isinstance(first, MixtureRecipe):
        raise UserError(f"pretrain = {recipe.pretrain!r} has no [mixture]")
    second = load_sft_recipe(
        _beside(beside, recipe.sft),
        (
            *overrides["sft"],
            *own,
            f"out={json.dumps(str(folder / 'sft'))}",
            f"model={json.dumps(str(folder / 'base'))}",
        ),
    )
    model, rl = folder / "sft", {}
    for name, file in recipe.rl.items():
        rl[name] = load_recipe(
            _beside(beside, file),
            (
                *overrides[name],
                *own,
                f"name={json.dumps(name)}",
                f"runs_dir={json.dumps(str(folder))}",
                f"model.id={json.dumps(str(model))}",
            ),
        )
        if rl[name].model.lora is not None:
            raise UserError(
                f"rl.{name}: {file} trains an adapter, and the next stage needs a whole model: "
                "leave [model.lora] out"
            )
        model = checkpoint_folder(folder / name, rl[name].steps)
    return Chain(seed, folder, first, second, rl)


def _beside(folder: Path, name: str) -> str:
    return str(folder / name) if (folder / name).is_file() else name


# --- the stages ----------------------------------------------------------------------------------


def run_chain(console: Console, recipe: PipelineRecipe, chain: Chain) -> None:
    """Make every stage of one seed that is not there, and ask all of them the same problems."""
    say = f"seed {chain.seed}, "
    if not (chain.folder / "sft" / "sft.json").is_file():
        sft.take_documents(chain.sft)  # what can't be read is an error before minutes of training
    if _is_missing(chain.folder / "base" / "pretrain.json", chain.pretrain):
        console.print(f"{say}pre-training", highlight=False)
        resume = (chain.folder / "base" / STATE).is_file()
        with PretrainDisplay(console, mixture.num_steps(chain.pretrain)) as display:
            mixture.pretrain_mixture(chain.pretrain, resume, display.show)
    if _is_missing(chain.folder / "sft" / "sft.json", chain.sft):
        console.print(f"{say}fine-tuning", highlight=False)
        resume = (chain.folder / "sft" / STATE).is_file()
        with PretrainDisplay(console, sft.num_steps(chain.sft), "fine-tuning") as display:
            sft.finetune(chain.sft, resume, display.show)
    for made in ("base", "sft"):
        forget_state(chain.folder / made)  # a kill may have come between the model and this
    launch_arms(console, list(chain.rl.values()), None if recipe.go_on else check_stage)
    if recipe.heads is not None:
        _fit_heads(console, recipe, chain)
        _audit(console, recipe, chain)
    _ask(console, recipe, chain)


def check_stage(folder: Path) -> None:
    """Raise GateFailed where the doctor finds an error in the run of a stage: what follows would
    be made of a model that has learned nothing, or the wrong thing."""
    errors = [found for found in examine(folder).findings if found.severity == "error"]
    if errors:
        said = "\n".join(f"{e.name}: {e.sentence}\n  remedy: {e.remedy}" for e in errors)
        raise GateFailed(
            f"stage {folder.name} ({folder}) is no model to go on from. {said}\n"
            "What is made stays. Change the stage's recipe and remove its folder, or go on all the "
            "same: go_on=true"
        )


def run_seeds(
    console: Console, name: str, overrides: Sequence[str], chains: Sequence[Chain], at_once: int
) -> None:
    """Run every seed in a process of its own, `at_once` at a time, each with its share of cores."""
    runner = LocalRunner(max(1, (os.cpu_count() or 1) // at_once))
    waiting, running = list(chains), {}
    try:
        with StudyDisplay(console, "seeds", len(chains), len(chains)) as display:
            while waiting or running:
                while waiting and len(running) < at_once:
                    chain = waiting.pop(0)
                    command = [sys.executable, "-m", "operando", "pipeline", name, *overrides]
                    log = chain.folder.parent / f"seed_{chain.seed}.log"
                    running[log] = runner.start([*command, "--seed", str(chain.seed)], log)
                time.sleep(POLL_SECONDS)
                for log, handle in list(running.items()):
                    code = runner.poll(handle)
                    if code is None:
                        continue
                    del running[log]
                    if code != 0:
                        stopped = GateFailed if code == 3 else UserError
                        end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
                        raise stopped(
                            f"{log.stem} stopped with exit code {code}; what is finished stays, "
                            f"and the same command goes on. The end of {log}:\n" + "\n".join(end)
                        )
                    display.show(log.stem)
    finally:
        for handle in running.values():
            runner.stop(handle)


def _is_missing(file: Path, recipe: MixtureRecipe | SftRecipe) -> bool:
    """Return whether a stage is still to be made; one made by another recipe is an error."""
    if not file.is_file():
        return True
    then = read_object(file, recipe=dict)["recipe"]
    changed = differences(then, recipe.model_dump(mode="json", exclude={"out"}))
    if changed:
        raise UserError(
            f"{file.parent} was made by another recipe; changed: {'; '.join(changed)}. Undo the "
            "change, or choose another out=FOLDER"
        )
    return False


def _fit_heads(console: Console, recipe: PipelineRecipe, chain: Chain) -> None:
    """Calibrate exits, then drafts on top of them (or without, where no threshold keeps the rule);
    exits that lose too much are a result, and the pipeline goes on."""
    last, task = chain.models[list(chain.rl)[-1]], _heads_task(recipe)
    source = SourceConfig(
        task.kind,
        _overrides(task),
        num_fit=min(MOST_FIT, recipe.num_fit),
        num_choose=recipe.num_choose,
        num_held_out=task.num_held_out,
        seed=chain.seed,
    )
    halting, fast = chain.folder / "halting", chain.folder / "fast"
    if not (halting / "halting.json").is_file():
        console.print(f"seed {chain.seed}, exits", highlight=False)
        with StageDisplay(console) as display:
            exits = calibrate_halting(
                last, halting, HaltingConfig(source, repeats=recipe.repeats), display.show
            )
        console.print(halting_tables(exits))
    if not (fast / "drafting.json").is_file():
        console.print(f"seed {chain.seed}, drafts", highlight=False)
        model = halting if (halting / "config.json").is_file() else last
        config = DraftingConfig(replace(source, num_fit=recipe.num_fit), repeats=recipe.repeats)
        with StageDisplay(console) as display:
            drafts = calibrate_drafting(model, fast, config, display.show)
        console.print(drafting_tables(drafts))


def _audit(console: Console, recipe: PipelineRecipe, chain: Chain) -> None:
    last = chain.models[list(chain.rl)[-1]]
    if (last / "audits" / "pathology.json").is_file():
        return
    console.print(f"seed {chain.seed}, pathology audit", highlight=False)
    task = _heads_task(recipe)
    found = audit_pathology(
        last, task=task.kind, overrides=_overrides(task), num=task.num_held_out, seed=chain.seed
    )
    console.print(pathology_tables(found))


def _heads_task(recipe: PipelineRecipe) -> AskedTask:
    """Return the task that heads and audit use, with as many training problems as they need."""
    task = next(task for task in recipe.tasks if task.kind == recipe.heads)
    return task.model_copy(update={"num_train": recipe.num_fit + recipe.num_choose})


def _overrides(task: AskedTask) -> tuple[str, ...]:
    given = task.model_dump(mode="json", exclude={"kind"})
    return tuple(f"task.{key}={json.dumps(value)}" for key, value in given.items())


def _ask(console: Console, recipe: PipelineRecipe, chain: Chain) -> None:
    settings = [task.model_dump(mode="json") for task in recipe.tasks]
    file, record = chain.folder / "answers.parquet", chain.folder / "answers.json"
    if record.is_file() and parse_json(read_text(record), str(record)) == settings:
        return
    console.print(f"seed {chain.seed}, asking every stage", highlight=False)
    first, *others = chain.models.values()
    config = EvalConfig(tuple(task.kind for task in recipe.tasks))
    answers = evaluate(first, config, also=others, given=recipe.tasks)
    console.print(evaluation_tables(answers), highlight=False, markup=False)
    with atomic_path(file) as temporary:
        shutil.copyfile(answers.file, temporary)
    write_json(record, settings)


# --- what each stage came to ---------------------------------------------------------------------


def stage_cells(recipe: PipelineRecipe, chains: Sequence[Chain]) -> list[Cell]:
    """Return every stage on every task over the seeds, and write OUT/stages.json.

    Intervals count seeds and problems as drawn; of one seed they are of its problems alone.
    """
    cells = []
    for task in (task.kind for task in recipe.tasks):
        marks_SP = {stage: _marks(chains, stage, task) for stage in chains[0].models}
        stages = list(marks_SP)
        for at, stage in enumerate(stages):
            now = marks_SP[stage]
            cells.append(
                Cell(
                    stage,
                    task,
                    now.shape[1],
                    rate_interval(now, seed=0),
                    _change(marks_SP[stages[at - 1]], now) if at > 0 else None,
                    _change(marks_SP["base"], now) if at > 1 else None,
                )
            )
    rows = [
        {
            "stage": c.stage,
            "task": c.task,
            "seeds": len(chains),
            "n": c.n,
            "right": c.right,
            "since_last": c.since_last,
            "since_base": c.since_base,
        }
        for c in cells
    ]
    write_json(Path(recipe.out) / "stages.json", rows)
    return cells


def _marks(chains: Sequence[Chain], stage: str, task: str) -> np.ndarray:
    """Return who was right [S P]; the problems are the same for all seeds."""
    rows = []
    for chain in chains:
        table = read_parquet(chain.folder / "answers.parquet").to_pylist()
        name = f"{stage} step {chain.rl[stage].steps}" if stage in chain.rl else stage
        mine = [r for r in table if r["model"] == name and r["task"] == task]
        rows.append([float(r["correct"]) for r in mine])
    return np.asarray(rows)


def _change(before_SP: np.ndarray, after_SP: np.ndarray) -> Interval:
    if len(before_SP) > 1:
        return hierarchical_bootstrap(after_SP - before_SP, seed=0).interval
    before, after = before_SP[0].astype(bool).tolist(), after_SP[0].astype(bool).tolist()
    return paired_difference(before, after).difference


def stages_table(cells: Sequence[Cell], num_seeds: int) -> TextTable:
    """Return the stages by task, with 95 % intervals."""
    rows = [
        (
            c.task,
            c.stage,
            f"{num_seeds} x {c.n}",
            f"{c.right.value:.1%}",
            limits(c.right, ".1%"),
            *("" if x is None else interval(x, "+.1%") for x in (c.since_last, c.since_base)),
        )
        for c in cells
    ]
    heads = ("task", "stage", "seeds x n", "right", "95 %")
    heads = (*heads, "since the last, 95 %", "since the base, 95 %")
    return table("", heads, rows, words=("task", "stage"))
