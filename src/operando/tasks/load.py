"""The task that a recipe names."""

from __future__ import annotations

from operando.errors import UserError
from operando.recipe import (
    CanaryTaskConfig,
    ClrsTaskConfig,
    CodeTaskConfig,
    DeepTaskConfig,
    GraphSearchTaskConfig,
    Gsm8kTaskConfig,
    Math500TaskConfig,
    MmluTaskConfig,
    TaskConfig,
    WordsTaskConfig,
)
from operando.tasks.base import Task
from operando.tasks.canary import load_canary
from operando.tasks.clrs import load_clrs
from operando.tasks.code import load_code
from operando.tasks.deep import load_deep
from operando.tasks.graph_search import load_graph_search
from operando.tasks.gsm8k import load_gsm8k
from operando.tasks.math500 import load_math500
from operando.tasks.mmlu import load_mmlu
from operando.tasks.words import load_words


def load_task(config: TaskConfig) -> Task:
    """Return the task with its training and held-out examples; an empty split is an error.

    Example: load_task(load_recipe("demo").task).held_out[0].question
    """
    match config:
        case WordsTaskConfig():
            task = load_words(config)
        case Gsm8kTaskConfig():
            task = load_gsm8k(config)
        case Math500TaskConfig():
            if config.train is None:
                raise UserError(
                    "task.kind = 'math500' has no training split: name a file of other problems as "
                    "task.train, or evaluate any run on it: operando eval RUN --tasks math500"
                )
            task = load_math500(config)
        case MmluTaskConfig():
            task = load_mmlu(config)
        case ClrsTaskConfig():
            task = load_clrs(config)
        case GraphSearchTaskConfig():
            task = load_graph_search(config)
        case CodeTaskConfig():
            task = load_code(config)
        case DeepTaskConfig():
            task = load_deep(config)
        case CanaryTaskConfig(family=family):
            return load_canary(family=family)
    for split, examples in (("train", task.train), ("held-out", task.held_out)):
        if not examples:
            raise UserError(f"task {task.name}: the {split} split is empty ({dict(task.source)})")
    return task
