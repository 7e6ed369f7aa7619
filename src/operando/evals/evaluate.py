"""Held-out evaluation of a run folder: base beside trained model, on the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from operando.errors import UserError
from operando.models.load import load_model, stop_ids
from operando.models.policy import Policy
from operando.rollout.greedy_eval import Graded, greedy_eval
from operando.rollout.make import make_sampler
from operando.rollout.sampler import Sampling
from operando.run import SeedTree, write_parquet
from operando.run_folder import read_recipe, start_of
from operando.setup import make_prompt_sets
from operando.stats.intervals import PairedDifference, paired_difference
from operando.tasks.load import load_task
from operando.tasks.loops import find_loop
from operando.update.checkpoint import load_weights, pick_step


@dataclass(frozen=True)
class Arm:
    """Counts of one model. Example: Arm("base", 90, 200, truncated=3, looped=1, mean_length=9.2)"""

    name: str
    correct: int
    n: int
    truncated: int
    looped: int
    mean_length: float


@dataclass(frozen=True)
class Evaluation:
    """Base beside trained on the same prompts, with the file that holds every answer."""

    base: Arm
    trained: Arm
    paired: PairedDifference
    file: Path


def evaluate_run(
    folder: Path,
    *,
    step: int | None = None,
    num: int | None = None,
    max_completion_length: int | None = None,
) -> Evaluation:
    """Evaluate a saved step (None: the last) on `num` held-out problems (None: all of them)."""
    recipe = read_recipe(folder)
    step = pick_step(folder, step)
    task = load_task(recipe.task)
    count = len(task.held_out) if num is None else num
    if count > len(task.held_out):
        raise UserError(f"--num {count}: the held-out split has {len(task.held_out)} problems")
    wanted = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"num": count})})
    loaded = load_model(recipe.model)
    _, prompts = make_prompt_sets(
        wanted, task, loaded.tokenizer, loaded.model.config, start_of(folder)
    )
    length = (
        max_completion_length
        or recipe.eval.max_completion_length
        or recipe.rollout.max_completion_length
    )
    sampling = Sampling(length, stop=recipe.rollout.stop)
    policy = Policy(loaded, recipe.model, SeedTree(recipe.seed))
    sampler = make_sampler(
        recipe.rollout.engine,
        policy.base,
        loaded.tokenizer,
        stop_ids(policy.base, loaded.tokenizer),
        recipe.rollout.max_batch,
    )
    before = greedy_eval(sampler, task, prompts, sampling)  # LoRA's B is zero: the base model
    load_weights(folder, step, policy)
    after = greedy_eval(sampler, task, prompts, sampling)
    file = _write(folder, step, before, after)
    paired = paired_difference(
        [j.verdict.correct for j in before], [j.verdict.correct for j in after]
    )
    return Evaluation(_arm("base", before), _arm(f"step {step}", after), paired, file)


def _arm(name: str, graded: list[Graded]) -> Arm:
    return Arm(
        name,
        correct=sum(j.verdict.correct for j in graded),
        n=len(graded),
        truncated=sum(j.rollout.is_truncated for j in graded),
        looped=sum(find_loop(j.rollout.completion) is not None for j in graded),
        mean_length=sum(len(j.rollout.completion_ids) for j in graded) / len(graded),
    )


def _write(folder: Path, step: int, before: list[Graded], after: list[Graded]) -> Path:
    file = folder / "evals" / f"paired_step_{step:05d}.parquet"
    columns: dict[str, list[object]] = {
        "example_id": [j.rollout.prompt.example.id for j in after],
        "question": [j.rollout.prompt.example.question for j in after],
        "answer": [j.rollout.prompt.example.answer for j in after],
    }
    for name, graded in (("base", before), ("trained", after)):
        columns[f"{name}_completion"] = [j.rollout.completion for j in graded]
        columns[f"{name}_correct"] = [j.verdict.correct for j in graded]
        columns[f"{name}_reason"] = [j.verdict.reason for j in graded]
        columns[f"{name}_truncated"] = [j.rollout.is_truncated for j in graded]
    write_parquet(file, columns)
    return file
