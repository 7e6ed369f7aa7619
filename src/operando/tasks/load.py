"""The task that a recipe names."""

from __future__ import annotations

from operando.errors import UserError
from operando.recipe import Gsm8kTaskConfig, WordsTaskConfig
from operando.tasks.base import Task
from operando.tasks.gsm8k import load_gsm8k
from operando.tasks.words import load_words


def load_task(config: WordsTaskConfig | Gsm8kTaskConfig) -> Task:
    """Return the task with its training and held-out examples; an empty split is an error."""
    match config:
        case WordsTaskConfig():
            task = load_words(config)
        case Gsm8kTaskConfig():
            task = load_gsm8k(config)
    for split, examples in (("train", task.train), ("held-out", task.held_out)):
        if not examples:
            raise UserError(f"task {task.name}: the {split} split is empty ({dict(task.source)})")
    return task
