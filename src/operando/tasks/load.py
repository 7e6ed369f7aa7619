"""The task that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

from operando.errors import UserError
from operando.recipe.base import Config
from operando.recipe.data import (
    CanaryTaskConfig,
    ClrsTaskConfig,
    CodeTaskConfig,
    FileTaskConfig,
    GraphSearchTaskConfig,
    Gsm8kTaskConfig,
    Math500TaskConfig,
    MmluTaskConfig,
    PythonTaskConfig,
    WordsTaskConfig,
)
from operando.recipe.deep import DeepTaskConfig
from operando.recipe.run import Recipe, TaskConfig
from operando.tasks.base import Task
from operando.tasks.canary import load_canary
from operando.tasks.clrs import load_clrs
from operando.tasks.code import load_code
from operando.tasks.deep import load_deep
from operando.tasks.file_task import check_columns, load_file_task, question_key
from operando.tasks.graph_search import load_graph_search
from operando.tasks.gsm8k import load_gsm8k
from operando.tasks.math500 import load_math500
from operando.tasks.mmlu import load_mmlu
from operando.tasks.words import load_words

KINDS: Mapping[str, type[Config]] = {
    str(get_args(config.model_fields["kind"].annotation)[0]): config
    for config in get_args(get_args(TaskConfig)[0])
}
"""The kinds of tasks that a recipe may name, with their settings."""

UNASKABLE = tuple(
    kind
    for kind, config in KINDS.items()
    if config in (CanaryTaskConfig, FileTaskConfig, PythonTaskConfig)
)
"""Kinds that say nothing by their name alone: nothing can be asked that a run does not have."""


def load_task(config: TaskConfig, prefix: str = "task.", *, to_train: bool = True) -> Task:
    """Return the task with its training and held-out examples; an empty split is an error.

    `prefix` is what stands before the task's keys in errors. Not `to_train`: the training split may
    be empty, and is where it would have to be fetched for nothing.

    Example: load_task(load_recipe("demo").task).held_out[0].question
    """
    match config:
        case WordsTaskConfig():
            task = load_words(config)
        case Gsm8kTaskConfig():
            task = load_gsm8k(config, prefix, with_train=to_train)
        case Math500TaskConfig():
            if config.train is None and to_train:
                raise UserError(
                    "task.kind = 'math500' has no training split: name a file of other problems as "
                    "task.train, or evaluate any run on it: operando eval RUN --tasks math500"
                )
            task = load_math500(config, prefix)
        case MmluTaskConfig():
            task = load_mmlu(config, prefix)
        case ClrsTaskConfig():
            task = load_clrs(config)
        case GraphSearchTaskConfig():
            task = load_graph_search(config)
        case CodeTaskConfig():
            task = load_code(config)
        case DeepTaskConfig():
            task = load_deep(config)
        case FileTaskConfig():
            task = load_file_task(config, prefix)
        case PythonTaskConfig(name=name):
            raise UserError(
                f"task.kind = 'python': the task {name!r} is a Task object of a Python program and "
                "in no file: give it again as launch(..., task=...). Commands can ask a run's "
                "own task where it is read from files: kind = 'file'"
            )
        case CanaryTaskConfig(family=family):
            return load_canary(family=family)
    _check_splits(task, to_train=to_train)
    return task


def recipe_task(recipe: Recipe, task: Task | None = None) -> Task:
    """Return the task of a recipe, or the one given, whose verifier sees the text that
    `prompt.answer_after` leaves to it."""
    task = load_task(recipe.task) if task is None else given_task(recipe.task, task)
    return answering_after(task, recipe.prompt.answer_after)


def answering_after(task: Task, mark: str) -> Task:
    """Return a task that judges what follows `mark` in a completion; empty: all of it."""
    if not mark:
        return task
    verify, labels, grades, measures = task.verify, task.labels, task.grades, task.measures

    def answer(completion: str) -> str:
        return completion.partition(mark)[2]

    return replace(
        task,
        verify=lambda example, text, cut: verify(example, answer(text), cut),
        labels=labels and (lambda example, text, cut: labels(example, answer(text), cut)),
        grades=grades
        and (lambda many: grades([a._replace(completion=answer(a.completion)) for a in many])),
        measures=measures and (lambda example, text: measures(example, answer(text))),
    )


def given_task(config: TaskConfig, task: Task) -> Task:
    """Return a Task of the user's own, checked as far as a task that is loaded is.

    The recipe must say that it is one (kind = "python"), so that no command takes another for it.
    """
    if not isinstance(config, PythonTaskConfig):
        raise UserError(
            f"a Task {task.name!r} was passed, but the recipe's is task.kind = "
            f"{config.kind!r}: set kind = 'python'"
        )
    _check_splits(task, to_train=True)
    examples = [*task.train, *task.held_out]
    names = set(examples[0].columns)
    for one in examples:
        if set(one.columns) != names:
            raise UserError(
                f"task {task.name}: {one.id!r} has columns {sorted(one.columns)}, the first "
                f"example {sorted(names)}: all must have the same (None where there is nothing)"
            )
    check_columns(examples)
    keys = {question_key(one) for one in task.held_out}
    both = [one for one in task.train if question_key(one) in keys]
    if both:
        raise UserError(
            f"task {task.name}: {len(both)} of {len(task.train)} training questions are held out "
            f"too; the first: {both[0].question[:80]!r}"
        )
    return task


def _check_splits(task: Task, *, to_train: bool) -> None:
    for split, examples in (("train", task.train), ("held-out", task.held_out)):
        if not examples and (to_train or split != "train"):
            raise UserError(f"task {task.name}: the {split} split is empty ({dict(task.source)})")
