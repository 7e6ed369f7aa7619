"""What is wrong with a recursive model's loops, beside a random model's: `audit pathology`.

    operando audit pathology RUN
    operando audit pathology FOLDER --task words task.num_steps=[1]

Every number stands beside those of untrained models of the same config and of the trained model on
the same tokens in random order. A test passes only where the model meets it and no untrained model
does: a threshold that a random model meets says nothing about training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from rich.console import Group
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from operando.errors import UserError
from operando.evals.ask import Opened, Question, ask, day_of, fitting_prompts, gold_answers, is_run
from operando.evals.questions import ASKABLE, task_prompt
from operando.models.load import dtype_name, pad_id, stop_ids
from operando.models.recursive import RecursiveCausalLM
from operando.models.tokens import text_ids
from operando.recipe.base import Config
from operando.recipe.run import Recipe, TaskConfig
from operando.recipe_io import apply_override, check
from operando.recursive.data import open_recursive
from operando.recursive.pathology_read import (
    Texts,
    at_depth,
    cache_gap,
    pack_texts,
    random_init,
    read,
    shuffled,
)
from operando.recursive.pathology_tests import (
    Number,
    Read,
    Test,
    only_if_used,
    test_of_cache,
    test_of_depth,
    test_of_gain,
    test_of_shock,
    test_of_starvation,
    without_control,
)
from operando.rollout.recursive import RecursiveEngine
from operando.run import write_json
from operando.run_folder import read_recipe
from operando.tables import table
from operando.tasks.load import KINDS, load_task, recipe_task


@dataclass(frozen=True)
class Pathology:
    """The whole audit. `without_control` is what three numbers say without a control."""

    model: str
    task: str
    n: int
    distinct: int
    """Solutions; problems that share one are drawn together for the intervals."""
    loops: int
    depths: Sequence[int]
    baseline_seeds: Sequence[int]
    halt_threshold: float
    tests: Sequence[Test]
    without_control: str
    file: Path

    @property
    def failed(self) -> bool:
        return any(test.verdict == "FAIL" for test in self.tests)


class TaskTable(Config):
    """The task of a model folder, as a recipe's table."""

    task: TaskConfig


class Subject(NamedTuple):
    """The model that is audited, and the problems that it is read on."""

    name: str
    model: RecursiveCausalLM
    tokenizer: PreTrainedTokenizerBase
    question: Question
    day: datetime
    """That a chat template prints: a run's own."""


def audit_pathology(
    folder: Path,
    *,
    task: str | None = None,
    overrides: Sequence[str] = (),
    step: int | None = None,
    num: int = 100,
    baselines: int = 5,
    depths: Sequence[int] = (),
    seed: int = 0,
) -> Pathology:
    """Audit a run's trained model or a model folder; write FOLDER/audits/pathology.json."""
    subject = open_subject(folder, task, overrides, step, num)
    R, most = subject.model.config.num_loops, subject.model.config.max_loops
    chosen = sorted(set(depths or (max(1, R // 2), R * 3 // 2, 2 * R)) - {R})
    if not chosen or chosen[0] < 1 or chosen[-1] > most:
        raise UserError(
            f"--depths {','.join(map(str, chosen))}: expected loops from 1 to {most}, other than "
            f"{R}: the model has embeddings of {most} loops (max_loops) and runs {R}"
        )
    return run_tests(subject, chosen, list(range(seed, seed + baselines)), folder)


def run_tests(
    subject: Subject, depths: Sequence[int], seeds: Sequence[int], folder: Path
) -> Pathology:
    """Read the model and its baselines, and judge what was read."""
    model, seed = subject.model, seeds[0]
    texts = gold_texts(subject)
    own = read(model, texts, depths, seed)
    noise = read(model, shuffled(texts, seed), depths, seed)
    others, sense, gaps = [], [], []
    for one in (random_init(model, s) for s in seeds):
        others.append(read(one, texts, depths, seed))
        sense.append(read(one, shuffled(texts, seed), depths, seed))
        gaps.append(cache_gap(one, texts))
    R, gap = model.config.num_loops, cache_gap(model, texts)
    solutions = [(e.solution, e.answer) for e in subject.question.examples]
    alike = [solutions.index(one) for one in solutions]
    right = {t: greedy(subject, model, t) for t in sorted({1, R, *depths})}
    baseline_right = greedy(subject, random_init(model, seed), R)
    read_all = Read(own, noise, others, sense, right, baseline_right, alike, R, seed)
    gain = test_of_gain(read_all)
    depth_tests = [test_of_depth(read_all, t) for t in depths]
    tests = [
        gain,
        *[only_if_used(test, gain) for test in depth_tests],
        test_of_shock(read_all),
        test_of_starvation(read_all),
        test_of_cache(gap, gaps),
    ]
    result = Pathology(
        subject.name,
        subject.question.task.name,
        len(alike),
        len(set(alike)),
        R,
        tuple(depths),
        tuple(seeds),
        gap.threshold,
        tests,
        without_control(read_all),
        folder / "audits" / "pathology.json",
    )
    document = {"format": 1, **asdict(result), "file": result.file.name, "right": right}
    write_json(result.file, document)
    return result


# --- what is read --------------------------------------------------------------------------------


def open_subject(
    folder: Path, task: str | None, overrides: Sequence[str], step: int | None, num: int
) -> Subject:
    """Return the model of a run's step or of a model folder, in float32, with its problems."""
    recipe = read_recipe(folder) if is_run(folder) else None
    question = _question(recipe, task, overrides, num)
    opened = open_recursive(folder, step)
    model = opened.model.requires_grad_(True)  # gradients are read
    return Subject(opened.name, model, opened.tokenizer, question, day_of(folder))


def _question(
    recipe: Recipe | None, task: str | None, overrides: Sequence[str], num: int
) -> Question:
    if task is None and overrides:
        raise UserError(f"{' '.join(overrides)}: keys of a task need --task")
    if recipe is None and task is None:
        raise UserError(f"a model folder has no task of its own: --task {'|'.join(ASKABLE)}")
    own = recipe is not None and task is None
    kind = recipe.task.kind if own and recipe is not None else str(task)
    if kind not in ASKABLE:
        known = "|".join(ASKABLE)
        raise UserError(f"--task {kind}: its gold answers are no text; expected {known}")
    if own and recipe is not None:
        loaded = recipe_task(recipe)
        prompt = task_prompt(loaded.text, recipe, None, 0, is_own=True)
        prompt = prompt.model_copy(update={"answer_template": loaded.text.answer})
    else:
        tables: dict[str, object] = {"task": {"kind": kind}}
        if "num_train" in KINDS[kind].model_fields and kind != "gsm8k":
            tables = {"task": {"kind": kind, "num_train": 1, "num_held_out": num}}
        for override in overrides:
            tables = apply_override(tables, override)
        loaded = load_task(check(TaskTable, tables, "--task").task, to_train=False)
        prompt = task_prompt(loaded.text, None, None, 0)
    examples, is_cut = loaded.held_out[:num], loaded.text.ends_at_question
    return Question(kind, loaded, examples, prompt, is_cut=is_cut)


def gold_texts(subject: Subject) -> Texts:
    """Return the held-out prompts with their gold answers and end tokens."""
    tokenizer, question = subject.tokenizer, subject.question
    end = tokenizer.eos_token_id
    assert isinstance(end, int), end
    golds = text_ids(tokenizer, gold_answers(question), "a gold answer")
    answers = [[*ids, end] for ids in golds]
    prompts = fitting_prompts(_opened(subject), question, subject.day, max(map(len, answers)))
    pairs = [(p.ids, answer) for p, answer in zip(prompts, answers, strict=True)]
    return pack_texts(pairs, pad_id(tokenizer))


def greedy(subject: Subject, model: RecursiveCausalLM, loops: int) -> list[bool]:
    """Return which held-out problems a model answers right with so many loops, exits off."""
    with at_depth(model, loops):
        answers = ask(_opened(subject, model), subject.question, subject.day)
    return [one.verdict.correct for one in answers]


def _opened(subject: Subject, model: RecursiveCausalLM | None = None) -> Opened:
    model, tokenizer = model or subject.model, subject.tokenizer
    engine = RecursiveEngine(
        model, tokenizer, stop_ids(model, tokenizer), draft_tokens=0, halt_threshold=math.inf
    )
    context = model.config.max_position_embeddings
    return Opened(subject.name, tokenizer, engine, context, dtype_name(model), engine.max_batch)


# --- the terminal --------------------------------------------------------------------------------


def pathology_tables(result: Pathology) -> Group:
    """Return every test with its verdict and its numbers beside the random models'."""
    head = (
        f"{result.model}: {result.loops} loops, {result.n} held-out problems of {result.task} "
        f"({result.distinct} solutions); "
        f"random: {len(result.baseline_seeds)} untrained models of this config (seeds "
        f"{result.baseline_seeds[0]} to {result.baseline_seeds[-1]})"
    )
    rows: list[Sequence[str | Text]] = []
    for test in result.tests:
        line = Text(f"\n{test.verdict}: {test.name}", style="bold")
        rows += [[line.append(f": {test.why}", style="not bold")], *map(_row, test.numbers)]
    shown = table("", ("", "model", "95 %", "random", "shuffled"), rows)
    note = f"\nwithout a control: {result.without_control}"
    return Group(Text(head), shown, Text(note, style="dim"))


def _row(number: Number) -> tuple[str, ...]:
    interval = number.interval
    limits = "" if interval is None else f"{_show(interval.low)} to {_show(interval.high)}"
    given = [x for x in number.baselines if x is not None]
    random = ""
    if given:
        low, high = _show(min(given)), _show(max(given))
        random = low if low == high else f"{low} to {high}"
    noise = "" if number.shuffled is None else _show(number.shuffled)
    value = "none" if number.value is None else _show(number.value)
    return f"  {number.name}", value, limits, random, noise


def _show(x: float) -> str:
    if not math.isfinite(x):
        return str(x)
    return f"{x:.3g}" if x == 0 or abs(x) < 1000 else f"{x:.0f}"
