"""operando: reinforcement learning of language models with the internals in the loop.

The names below are the public ones: `from operando import load_recipe, launch`. Each is loaded when
it is first asked for, so that `import operando` takes neither time nor torch.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "EvalConfig",
    "Example",
    "Interval",
    "ModelConfig",
    "Policy",
    "Question",
    "Recipe",
    "Request",
    "Rewards",
    "Rollout",
    "Run",
    "Sampling",
    "Task",
    "Trace",
    "UserError",
    "ask",
    "checkpoints",
    "compare",
    "evaluate",
    "launch",
    "load_chain",
    "load_directions",
    "load_model",
    "load_recipe",
    "load_sae",
    "load_task",
    "make_console",
    "make_sampler",
    "open_each",
    "report",
    "train",
    "verifier",
]

if TYPE_CHECKING:  # the one table: editors and type checkers read it here, `_homes` as text
    from operando.display import make_console
    from operando.drift.published import load_chain
    from operando.errors import UserError
    from operando.evals.ask import Question, ask, checkpoints, compare, open_each
    from operando.evals.evaluate import evaluate
    from operando.evals.questions import EvalConfig
    from operando.launch import launch
    from operando.models.directions import load_directions
    from operando.models.load import load_model
    from operando.models.policy import Policy
    from operando.recipe.data import ModelConfig
    from operando.recipe.run import Recipe
    from operando.recipe_io import load_recipe
    from operando.report.html import write_report as report
    from operando.rollout.make import make_sampler
    from operando.rollout.sampler import Request, Sampling
    from operando.run import Run
    from operando.sae.formats import load_sae
    from operando.stats.intervals import Interval
    from operando.tasks.base import Task
    from operando.tasks.load import load_task
    from operando.tasks.verifiers import verifier
    from operando.train import train
    from operando.types import Batch, Example, Rewards, Rollout, Trace
else:  # hidden from them, so that a name which is not there is an error

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'operando' has no attribute {name!r}")
        module, inside = _HOMES[name]
        found = getattr(import_module(module), inside)
        globals()[name] = found
        return found


def _homes() -> dict[str, tuple[str, str]]:
    """Return the module of each public name and its name there, as the table above has them."""
    (table,) = (n for n in ast.parse(Path(__file__).read_bytes()).body if isinstance(n, ast.If))
    lines = [line for line in table.body if isinstance(line, ast.ImportFrom)]
    return {a.asname or a.name: (str(n.module), a.name) for n in lines for a in n.names}


_HOMES = _homes()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Operando(ModuleType):
    """The package, in which `train`, `launch` and `report` stay the functions.

    Python would put the modules of the same names in their place as soon as one is imported.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Operando
