"""The one evaluation pass of a study: every run answers the same problems in the same way.

All arms are asked what the control arm's recipe asks (task, prompt, length, stop texts) with the
overrides of the set, and sampled answers come from the same random streams.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from operando.evals.ask import Checkpoint, Question, ask, open_each
from operando.files import read_object
from operando.recipe.data import ModelConfig
from operando.recipe.run import Recipe
from operando.run import SeedTree, hash_file, write_json, write_parquet
from operando.run_folder import read_recipe
from operando.study.arms import Job, Study, start_of_study
from operando.tables import read_parquet
from operando.update.checkpoint import checkpoint_folder, pick_step

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
    engine, rows = recipe.rollout.engine, recipe.rollout.max_batch
    model = recipe.model if run is None else read_recipe(run).model  # with the dtype it began with
    checkpoint = Checkpoint(recipe.name, model, run, step or 0, engine, rows)
    (opened,) = open_each([checkpoint])
    labels = sorted({label for names in study.label_names.values() for label in names})
    heads = ("set", "example_id", "sample", "completion", "correct", "truncated", *labels)
    columns: dict[str, list[object]] = {name: [] for name in heads}
    for name in study.asked:
        for one in ask(opened, _question(study, name), start_of_study(study)):
            columns["set"].append(name)
            columns["example_id"].append(one.example.id)
            columns["sample"].append(one.rollout.sample)
            columns["completion"].append(one.rollout.completion)
            columns["truncated"].append(one.rollout.is_truncated)
            columns["correct"].append(one.verdict.correct)
            for label in labels:
                known = label in study.label_names[name]
                columns[label].append(one.labels[label] if known else None)
    return columns


def _question(study: Study, name: str) -> Question:
    evaluation, asked, task = study.recipe.evaluation, study.asked[name], study.tasks[name]
    tree = SeedTree(SeedTree(evaluation.seed).derive("study", name))
    return Question(
        name,
        task,
        task.held_out[: evaluation.num],
        asked.prompt,
        shots=task.train[: asked.prompt.few_shot],
        max_completion_length=asked.rollout.max_completion_length,
        stop=asked.rollout.stop,
        temperature=evaluation.temperature or 1.0,
        samples=evaluation.samples,
        seeds=None if evaluation.temperature is None else tree,
    )


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
