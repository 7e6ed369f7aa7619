"""What `operando eval` asks: a run's own task as it was trained, any other as by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from operando.errors import UserError, nearest
from operando.evals.ask import Question
from operando.recipe.base import Config
from operando.recipe.data import PromptConfig
from operando.recipe.run import Recipe, TaskConfig
from operando.recipe_io import check
from operando.run import SeedTree
from operando.tasks.base import Task, TaskText
from operando.tasks.load import KINDS, UNASKABLE, load_task, recipe_task

Format = Literal["raw", "chat"]
FORMATS: Mapping[str, Format] = {"raw": "raw", "chat": "chat"}
GRADERS = ("ours", "math_verify")
NUM = 200  # problems of a generated task where no number is given
ASKABLE = tuple(kind for kind in KINDS if kind not in (*UNASKABLE, "code"))


@dataclass(frozen=True)
class EvalConfig:
    """What to ask, and how. Example: EvalConfig(("gsm8k", "mmlu"), num=500)

    No `tasks`: the run's own. `temperature` None: greedy. `data` maps a task, or a key of it
    ("gsm8k.train"), to a local file or hub id. `format` and `few_shot` None: as the run's own
    prompts. `sizes`: nodes of generated graphs. `grader` is MATH-500's; None: "ours".
    """

    tasks: tuple[str, ...] = ()
    num: int | None = None
    format: Format | None = None
    data: Mapping[str, str] | None = None
    temperature: float | None = None
    samples: int = 1
    few_shot: int | None = None
    max_completion_length: int | None = None
    grader: str | None = None
    sizes: tuple[int, ...] = ()


class _Asked(Config):
    task: TaskConfig


def make_questions(
    config: EvalConfig, recipe: Recipe | None, given: Sequence[TaskConfig] = ()
) -> list[Question]:
    """Return the questions; `recipe` is the run's own, None of a model folder.

    A task in `given` is asked as it says. A run's own task is asked as in training: its data,
    scorer, prompts and stop texts. Any other, in the run's format, with its own text; a raw
    completion ends where the model asks itself a next question.
    """
    names = _names(config, recipe)
    _check_data(config, names)
    settings = {task.kind: task for task in given}
    return [_question(name, config, recipe, settings.get(name)) for name in names]


def _names(config: EvalConfig, recipe: Recipe | None) -> tuple[str, ...]:
    known = list(ASKABLE)
    if recipe is not None and recipe.task.kind not in known:
        known.append(recipe.task.kind)
    names = config.tasks or (() if recipe is None else (recipe.task.kind,))
    if not names:
        raise UserError(f"a model folder has no task of its own: --tasks {','.join(ASKABLE)}")
    for name in names:
        if name not in known:
            raise UserError(
                f"--tasks {name}: no such task; expected {', '.join(known)}.{nearest(name, known)}"
            )
    if len(set(names)) != len(names):
        raise UserError(f"--tasks {','.join(names)}: a task is named twice")
    if config.sizes and not any("sizes" in KINDS[name].model_fields for name in names):
        raise UserError(f"--sizes is for tasks on graphs, which --tasks {','.join(names)} is not")
    return names


def data_keys() -> list[str]:
    """Return the keys that `--data` takes: a task, for what it holds out, and task.key."""
    keys = []
    for kind in ASKABLE:
        fields = [name for name in ("test", "source", "train") if name in KINDS[kind].model_fields]
        keys += [kind, *(f"{kind}.{name}" for name in fields)] if fields else []
    return keys


def _check_data(config: EvalConfig, names: Sequence[str]) -> None:
    keys = data_keys()
    for key in config.data or {}:
        if key not in keys:
            short = [name for name in keys if name.partition(".")[2] not in ("test", "source")]
            raise UserError(
                f"--data {key}=...: expected one of {', '.join(short)}.{nearest(key, keys)}"
            )
        if key.partition(".")[0] not in names:
            raise UserError(f"--data {key}=...: --tasks does not name {key.partition('.')[0]}")


def _question(
    name: str, config: EvalConfig, recipe: Recipe | None, given: TaskConfig | None
) -> Question:
    own = recipe if recipe is not None and recipe.task.kind == name and given is None else None
    has_sizes = "sizes" in KINDS[name].model_fields
    if (config.sizes and has_sizes) or any(
        key.partition(".")[0] == name for key in config.data or {}
    ):
        own = None
    if name == "math500" and config.grader is not None:
        own = None
    few_shot = config.few_shot
    if few_shot is None:
        few_shot = 0 if recipe is None else recipe.prompt.few_shot
    task = recipe_task(own) if own is not None else _load(name, config, given, few_shot)
    is_generated = own is None and not _data_field(name)
    count = len(task.held_out) if config.num is None else config.num
    if count > len(task.held_out):
        raise UserError(f"--num {count}: {name} has {len(task.held_out)} held-out problems")
    if few_shot > len(task.train):
        raise UserError(
            f"{name} has {len(task.train)} training problems to take {few_shot} worked examples "
            "from; --few-shot 0 asks without"
        )
    prompt = task_prompt(task.text, recipe, config.format, few_shot, is_own=own is not None)
    length = config.max_completion_length
    if not is_generated and recipe is not None:
        length = length or recipe.eval.max_completion_length
        length = length or recipe.rollout.max_completion_length
    seed = 0 if recipe is None else recipe.seed
    return Question(
        name,
        task,
        task.held_out[:count],
        prompt,
        shots=list(task.train[:few_shot]),
        max_completion_length=length,
        holds_gold=is_generated,
        stop=own.rollout.stop if own is not None else (),
        is_cut=own is None and prompt.format == "raw" and task.text.ends_at_question,
        temperature=config.temperature or 1.0,
        samples=config.samples,
        seeds=None
        if config.temperature is None
        else SeedTree(SeedTree(seed).derive("outside", name)),
    )


def _data_field(name: str) -> str | None:
    """Return the key of a task's held-out data; None: it is generated."""
    fields = KINDS[name].model_fields
    return next((key for key in ("test", "source", "problems") if key in fields), None)


def _load(name: str, config: EvalConfig, given: TaskConfig | None, few_shot: int) -> Task:
    """Return a task that is not the run's own: as given, else as by default but for options."""
    if given is not None:
        return load_task(given.model_copy(update={"num_train": max(1, few_shot)}))
    fields, data = KINDS[name].model_fields, config.data or {}
    table: dict[str, object] = {"kind": name}
    main = _data_field(name)
    if main is None:
        table |= {"num_train": max(1, few_shot), "num_held_out": config.num or NUM}
    elif name in data:
        table[main] = data[name]
    for key, value in data.items():
        kind, _, field = key.partition(".")
        if kind == name and field:
            table[field] = value
    if config.sizes and "sizes" in fields:
        table["sizes"] = list(config.sizes)
    if config.grader is not None and "grader" in fields:
        table["grader"] = config.grader
    asked = check(_Asked, {"task": table}, f"--tasks {name}").task
    to_train = few_shot > 0 and getattr(asked, "train", "") is not None
    return load_task(asked, f"--data {name}.", to_train=to_train)


def task_prompt(
    text: TaskText,
    recipe: Recipe | None,
    format: Format | None,
    few_shot: int,
    *,
    is_own: bool = False,
) -> PromptConfig:
    """Return the prompt settings of a task for a run's model (no recipe: for any model).

    In the run's own format its system message, prefill, separator and chat_template_kwargs stay,
    for the model was trained behind them; in another format they are the defaults. Template and
    worked answers are the task's, but for a run's own task in its own format.
    """
    prompt = PromptConfig() if recipe is None else recipe.prompt
    if format not in (None, prompt.format):
        prompt, is_own = PromptConfig(format=format), False
    kept: dict[str, object] = {"few_shot": few_shot, "max_prompt_length": None}
    if not is_own:
        template = text.raw if prompt.format == "raw" else text.chat
        kept |= {"template": template, "answer_template": text.answer}
    return prompt.model_copy(update=kept)
