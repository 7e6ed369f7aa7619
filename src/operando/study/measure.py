"""The one evaluation pass of a study: every run answers the same problems in the same way.

All arms are asked what the control arm's recipe asks (task, prompt, length, stop texts) with the
overrides of the set, and sampled answers come from the same random streams.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from operando.files import read_object
from operando.models.load import load_model, stop_ids
from operando.models.policy import Policy
from operando.recipe import ModelConfig, Recipe
from operando.rollout.make import make_sampler
from operando.rollout.sampler import Sampling, as_rollouts, uniform_streams
from operando.run import SeedTree, hash_file, write_json, write_parquet
from operando.setup import make_prompt_sets
from operando.study.arms import Job, Study, start_of_study
from operando.tables import read_parquet
from operando.types import Example, Rollout
from operando.update.checkpoint import checkpoint_folder, load_weights, pick_step

BASE_KEYS = ("id", "revision", "dtype", "quantization")


def base_folder(study: Study, model: ModelConfig) -> Path:
    """Return where the answers of an arm's untrained model are kept: one folder a model."""
    text = json.dumps(model.model_dump(mode="json", include=set(BASE_KEYS)), sort_keys=True)
    return study.folder / f"base-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def measure_run(study: Study, job: Job) -> Path:
    """Return the answers of a finished run's last checkpoint; asked again only if needed."""
    step = pick_step(job.folder, None)
    weights = sorted(checkpoint_folder(job.folder, step).glob("*.safetensors"))
    model = {"step": step, "weights": [hash_file(file) for file in weights]}
    return _measure(study, job.recipe, job.folder, model, step)


def measure_base(study: Study, recipe: Recipe) -> Path:
    """Return the answers of the model that an arm starts from; asked again only if needed."""
    model = recipe.model.model_dump(mode="json", include=set(BASE_KEYS))
    return _measure(study, recipe, base_folder(study, recipe.model), model, step=None)


def _measure(
    study: Study, recipe: Recipe, folder: Path, model: dict[str, object], step: int | None
) -> Path:
    file, note = folder / "evals" / "study.parquet", folder / "evals" / "study.json"
    asked = json.loads(json.dumps({"model": model, "asked": _asked(study)}))
    if file.is_file() and note.is_file() and read_object(note) == asked:
        return file
    columns = answer(study, recipe, folder if step is not None else None, step)
    note.unlink(missing_ok=True)
    write_parquet(file, columns)
    write_json(note, asked)
    return file


def _asked(study: Study) -> dict[str, object]:
    """Return everything that decides the answers of a given model."""
    evaluation: dict[str, object] = study.recipe.evaluation.model_dump(mode="json")
    sets: dict[str, object] = {
        name: {
            "task": recipe.task.model_dump(mode="json"),
            "data": dict(study.tasks[name].source),
            "prompt": recipe.prompt.model_dump(mode="json"),
            "length": recipe.rollout.max_completion_length,
            "stop": list(recipe.rollout.stop),
        }
        for name, recipe in study.asked.items()
    }
    return {**evaluation, "sets": sets}


def answer(
    study: Study, recipe: Recipe, run: Path | None, step: int | None
) -> dict[str, list[object]]:
    """Return the table of answers of a run's saved step, or of the untrained model (no run).

    Columns: set, example_id, sample, completion, correct, truncated, and a column for each label
    (null in the sets whose task does not give it).
    """
    loaded = load_model(recipe.model)
    policy = Policy(loaded, recipe.model, SeedTree(recipe.seed))
    if run is not None and step is not None:
        load_weights(run, step, policy)
    sampler = make_sampler(
        recipe.rollout.engine,
        policy.base,
        loaded.tokenizer,
        stop_ids(policy.base, loaded.tokenizer),
        recipe.rollout.max_batch,
    )
    evaluation, samples = study.recipe.evaluation, study.recipe.evaluation.samples
    labels = sorted({label for names in study.label_names.values() for label in names})
    heads = ("set", "example_id", "sample", "completion", "correct", "truncated", *labels)
    columns: dict[str, list[object]] = {name: [] for name in heads}
    for name, asked in study.asked.items():
        wanted = asked.eval.model_copy(update={"num": evaluation.num})
        task = study.tasks[name]
        few = replace(task, train=task.train[: asked.prompt.few_shot])  # no training prompts
        _, prompts = make_prompt_sets(
            asked.model_copy(update={"eval": wanted}),
            few,
            loaded.tokenizer,
            loaded.model.config,
            start_of_study(study),
        )
        sampling = Sampling(
            asked.rollout.max_completion_length,
            temperature=evaluation.temperature or 1.0,
            stop=asked.rollout.stop,
        )
        places, uniforms_BT = list(range(len(prompts))), None
        if evaluation.temperature is not None:
            tree = SeedTree(SeedTree(evaluation.seed).derive("study", name))
            uniforms_BT = uniform_streams(tree, 0, places, samples, sampling.max_completion_length)
        sampled = sampler.sample([p.ids for p in prompts], samples, sampling, uniforms_BT)
        for rollout in as_rollouts(prompts, places, samples, sampled):
            columns["set"].append(name)
            columns["example_id"].append(rollout.prompt.example.id)
            columns["sample"].append(rollout.sample)
            columns["completion"].append(rollout.completion)
            columns["truncated"].append(rollout.is_truncated)
            verdict = task.verify(*_seen(rollout))
            columns["correct"].append(verdict.correct)
            found = task.labels(*_seen(rollout)) if task.labels is not None else {}
            for label in labels:
                columns[label].append(found[label] if label in study.label_names[name] else None)
    return columns


def _seen(rollout: Rollout) -> tuple[Example, str, bool]:
    return rollout.prompt.example, rollout.completion, rollout.is_truncated


def read_metrics_of(study: Study, files: Sequence[Path]) -> Mapping[str, np.ndarray]:
    """Return for each metric the values of some runs, "S P": each problem's mean over samples."""
    tables = [read_parquet(file).to_pylist() for file in files]
    found = {}
    for name, metric in study.recipe.metrics.items():
        rows = []
        for table in tables:
            by_problem: dict[str, list[float]] = {}
            for row in table:
                if row["set"] == metric.set:
                    by_problem.setdefault(row["example_id"], []).append(float(row[metric.label]))
            rows.append({problem: sum(v) / len(v) for problem, v in by_problem.items()})
        assert all(row.keys() == rows[0].keys() for row in rows), "runs answered other problems"
        found[name] = np.array([[row[problem] for problem in rows[0]] for row in rows])
    return found
