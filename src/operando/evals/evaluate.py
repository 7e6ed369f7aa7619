"""Models on the same held-out problems, each compared with the first: `operando eval`.

    operando eval RUN
    operando eval RUN --tasks graph_search,gsm8k --also MODEL_FOLDER

A run is two models, its base and a saved step. Every answer is a row of one parquet file, and all
that is shown is made from those rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Group

from operando.errors import UserError, nearest
from operando.evals.ask import (
    Answer,
    Change,
    Checkpoint,
    Question,
    answer_columns,
    ask,
    checkpoints,
    compare,
    day_of,
    is_run,
    open_each,
    pass_curve,
    problem_means,
)
from operando.evals.questions import ASKABLE, FORMATS, GRADERS, EvalConfig, make_questions
from operando.recipe.run import TaskConfig
from operando.run import SeedTree, write_parquet
from operando.run_folder import read_recipe
from operando.stats.bootstrap import bootstrap_mean
from operando.stats.intervals import Interval, wilson
from operando.tables import TextTable, interval, limits, table
from operando.tasks.load import KINDS
from operando.tasks.loops import find_loop


@dataclass(frozen=True)
class Shares:
    """Means over a model's answers. `labels` has, for each label of the task, the share of answers
    with it and how many of those are right (NaN: there are none); `measures` the task's means.
    `pass_at` is pass@k by k; of greedy answers only k = 1."""

    n: int
    right: Interval
    labels: Mapping[str, tuple[float, float]]
    measures: Mapping[str, float]
    pass_at: Mapping[int, float]


@dataclass(frozen=True)
class Row:
    """One model on one task. `change` compares it with the first model on the same problems.

    `n` counts problems, each answered `samples` times; `left_out` those whose prompt is too long
    for one of the models.
    """

    task: str
    format: str
    model: str
    n: int
    samples: int
    left_out: int
    truncated: float
    looped: float
    mean_length: float
    all: Shares
    by_size: Mapping[int, Shares]
    change: Change | None


@dataclass(frozen=True)
class Evaluation:
    """Every model on every task, and the file that holds every answer."""

    rows: tuple[Row, ...]
    file: Path


def eval_config(
    tasks: str | None,
    prompt: str | None,
    data: Sequence[str],
    num: int | None,
    few_shot: int | None,
    greedy: bool,
    temperature: float | None,
    samples: int,
    max_completion_length: int | None,
    grader: str | None,
    sizes: str | None,
) -> EvalConfig:
    """Return the options of `operando eval`, checked."""
    if prompt is not None and prompt not in FORMATS:
        raise UserError(f"--prompt {prompt}: expected raw or chat.{nearest(prompt, FORMATS)}")
    if temperature is not None and greedy:
        raise UserError("--greedy and --temperature exclude each other")
    if temperature is not None and not 0 < temperature < math.inf:
        raise UserError(f"--temperature {temperature}: expected a number above 0")
    if temperature is None and samples != 1:
        raise UserError(
            f"--samples {samples} needs --temperature: greedy answers are all identical"
        )
    pairs = [item.partition("=") for item in data]
    for (key, _, path), item in zip(pairs, data, strict=True):
        if not key or not path:
            raise UserError(f"--data {item}: expected TASK=PATH, e.g. mmlu=mmlu_csv.tar.gz")
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if tasks is not None and not names:
        raise UserError(f"--tasks {tasks!r}: expected names such as {','.join(ASKABLE)}")
    if grader is not None and grader not in GRADERS:
        raise UserError(
            f"--grader {grader}: expected ours or math_verify.{nearest(grader, GRADERS)}"
        )
    if grader is not None and "math500" not in names:
        raise UserError(f"--grader {grader} is for math500, which --tasks does not name")
    parts = [part.strip() for part in sizes.split(",")] if sizes is not None else []
    if not all(part.isdigit() and 2 <= int(part) <= 26 for part in parts):
        raise UserError(f"--sizes {sizes}: expected numbers from 2 to 26, such as 4,5,8")
    return EvalConfig(
        names,
        num,
        FORMATS[prompt] if prompt is not None else None,
        {key: path for key, _, path in pairs},
        temperature,
        samples,
        few_shot,
        max_completion_length,
        grader,
        tuple(map(int, parts)),
    )


def evaluate(
    folder: Path,
    config: EvalConfig | None = None,
    *,
    step: int | None = None,
    also: Sequence[Path] = (),
    given: Sequence[TaskConfig] = (),
    on_stage: Callable[[str, int, int], None] = lambda _stage, _done, _of: None,
) -> Evaluation:
    """Ask a run's base and saved step (None: the last), or a model folder, and those of `also` the
    same problems; write every answer to FOLDER/evals/.

    Of a run in `also` the last step is asked. A task in `given` is asked as it says. `on_stage` is
    told who is asked what, and how many problems are answered, of how many.

    Example: evaluate(Path("runs/demo"), EvalConfig(num=400)).rows[1].change
    """
    models = _models(folder, step, also)
    recipe = read_recipe(folder) if is_run(folder) else None
    questions = make_questions(config or EvalConfig(), recipe, given)
    answers, dtypes = _ask_all(models, questions, folder, on_stage)
    seed = SeedTree(0 if recipe is None else recipe.seed).derive("bootstrap")
    rows = [
        _row(question, model.name, answers, models[0].name, seed)
        for question in questions
        for model in models
    ]
    options = config or EvalConfig()
    stem = _stem(models, questions, _changes(options, given), with_run=recipe is not None)
    file = folder / "evals" / f"{stem}.parquet"
    graded_by = {question.name: question.task.graded_by for question in questions}
    columns = answer_columns(answers)
    columns["graded_by"] = [graded_by[str(task)] for task in columns["task"]]
    columns["dtype"] = [dtypes[str(model)] for model in columns["model"]]
    write_parquet(file, columns)
    return Evaluation(tuple(rows), file)


def _models(folder: Path, step: int | None, also: Sequence[Path]) -> list[Checkpoint]:
    models = checkpoints(folder, step)
    if also and len(models) == 2:
        base, trained = models
        name = f"base {Path(base.config.id).name}"
        models = [base._replace(name=name), trained._replace(name=f"{folder.name} {trained.name}")]
    # Beside a run a model folder is asked in the run's dtype, or the dtypes would be compared too.
    own = models[0].config.dtype
    kept = own if len(models) == 2 and own != "auto" else None
    for other in also:
        last = checkpoints(other, dtype=kept)[-1]
        models.append(last._replace(name=f"{other.name} {last.name}") if last.run else last)
    names = [model.name for model in models]
    if len(set(names)) != len(names):
        raise UserError(f"--also: two models have the same name: {', '.join(names)}")
    return models


def _ask_all(
    models: Sequence[Checkpoint],
    questions: Sequence[Question],
    folder: Path,
    on_stage: Callable[[str, int, int], None],
) -> tuple[dict[tuple[str, str], list[Answer]], dict[str, str]]:
    """Return the answers by task and model, on the problems whose prompts fit every model; and the
    models' dtypes."""
    day = day_of(folder)
    answers: dict[tuple[str, str], list[Answer]] = {}
    dtypes: dict[str, str] = {}
    for opened in open_each(models):
        dtypes[opened.name] = opened.dtype
        for question in questions:
            stage = f"{opened.name} on {question.name}, {opened.dtype}"
            answers[question.name, opened.name] = ask(
                opened, question, day, partial(on_stage, stage)
            )
        del opened  # before the next model is opened
    for question in questions:
        keys = [(question.name, model.name) for model in models]
        fits = set.intersection(*({a.example.id for a in answers[key]} for key in keys))
        if not fits:
            raise UserError(f"{question.name}: no prompt fits the context of every model")
        for key in keys:
            answers[key] = [a for a in answers[key] if a.example.id in fits]
    return answers, dtypes


def _changes(config: EvalConfig, given: Sequence[TaskConfig]) -> str:
    """Return a short digest of the options that make a task another one; "" without any."""
    tasks = [task.model_dump(mode="json") for task in given]
    data = dict(sorted((config.data or {}).items()))
    changed = [data, config.few_shot, config.grader, list(config.sizes), tasks]
    if changed == [{}, None, None, [], []]:
        return ""
    return hashlib.sha256(json.dumps(changed).encode()).hexdigest()[:6]


def _stem(
    models: Sequence[Checkpoint], questions: Sequence[Question], changes: str, *, with_run: bool
) -> str:
    """Return the file's name: what was asked of which step, and how."""
    first = questions[0]
    how = "greedy" if first.seeds is None else f"t{first.temperature:g}x{first.samples}"
    parts = ["answers", f"step_{models[1].step:05d}" if with_run else ""]
    parts += ["-".join(question.name for question in questions), first.prompt.format, how, changes]
    others = len(models) - (2 if with_run else 1)
    return "_".join([*filter(None, parts), *([f"also_{others}"] if others else [])])


# --- what came of it -----------------------------------------------------------------------------


def _row(
    question: Question,
    model: str,
    answers: Mapping[tuple[str, str], Sequence[Answer]],
    first: str,
    seed: int,
) -> Row:
    mine = answers[question.name, model]
    n = len({one.example.id for one in mine})
    has_sizes = "sizes" in KINDS[question.name].model_fields  # a column "n" may be a user's own
    sizes = sorted({int(str(e.columns["n"])) for e in question.examples}) if has_sizes else []
    by_size = {size: [one for one in mine if one.example.columns["n"] == size] for size in sizes}
    return Row(
        question.name,
        question.prompt.format,
        model,
        n,
        question.samples,
        len(question.examples) - n,
        truncated=sum(one.rollout.is_truncated for one in mine) / len(mine),
        looped=sum(find_loop(one.rollout.completion) is not None for one in mine) / len(mine),
        mean_length=sum(len(one.rollout.completion_ids) for one in mine) / len(mine),
        all=_shares(question, mine, seed),
        by_size={size: _shares(question, some, seed) for size, some in by_size.items() if some},
        change=None if model == first else compare(answers[question.name, first], mine, seed),
    )


def _shares(question: Question, answers: Sequence[Answer], seed: int) -> Shares:
    right = (
        wilson(sum(one.verdict.correct for one in answers), len(answers))
        if question.seeds is None
        else bootstrap_mean(problem_means(answers), seed)
    )
    labels = {}
    for name in answers[0].labels:
        those = [one.verdict.correct for one in answers if one.labels[name]]
        labels[name] = (len(those) / len(answers), sum(those) / len(those) if those else math.nan)
    measures: dict[str, float] = {}
    if question.task.measures is not None:
        found = [question.task.measures(one.example, one.text) for one in answers]
        measures = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    n = len({one.example.id for one in answers})
    return Shares(n, right, labels, measures, pass_curve(answers))


# --- what the terminal shows ---------------------------------------------------------------------


def evaluation_tables(result: Evaluation) -> Group:
    """Return a table of all models on each task; where problems have sizes, one more by size."""
    cells: list[Sequence[str]] = []
    lines: list[str] = []
    for task in dict.fromkeys(row.task for row in result.rows):
        rows = [row for row in result.rows if row.task == task]
        left_out = f", {rows[0].left_out} too long" if rows[0].left_out else ""
        cells.append([f"{task} ({rows[0].format}{left_out})"])
        for row in rows:
            cells.append(
                (
                    f"  {row.model}",
                    f"{row.n}" if row.samples == 1 else f"{row.n} x {row.samples}",
                    f"{row.all.right.value:.1%}",
                    limits(row.all.right, ".1%"),
                    f"{row.truncated:.0%}",
                    f"{row.looped:.0%}",
                    f"{row.mean_length:.1f}",
                )
            )
            if row.change is not None:
                lines.append(f"{task}, {row.model} minus {rows[0].model}: {_said(row.change)}")
    all_tasks = table("", ("", "n", "right", "95 %", "cut", "loop", "tokens"), cells)
    tables = []
    for task in dict.fromkeys(row.task for row in result.rows):
        rows = [row for row in result.rows if row.task == task]
        if rows[0].samples > 1:
            tables.append(_pass_at(rows))
        if _has_parts(rows):
            tables.append(_by_size(rows))
    return Group(all_tasks, *lines, *tables)


def _said(change: Change) -> str:
    words = interval(change.difference, "+.1%")
    if change.p_value is None:
        return words
    p = "p < 0.0001" if change.p_value < 1e-4 else f"p = {change.p_value:.2g}"
    return f"{words}, {p}; {change.gained} gained, {change.lost} lost"


def _pass_at(rows: Sequence[Row]) -> TextTable:
    """Return one task's pass@k."""
    cells = [[row.model, *(f"{v:.1%}" for v in row.all.pass_at.values())] for row in rows]
    return table(f"\n{rows[0].task}, pass@k", ("", *map(str, rows[0].all.pass_at)), cells)


def _has_parts(rows: Sequence[Row]) -> bool:
    """Return whether a task has sizes, measures, or labels that an answer has."""
    labelled = any(share > 0 for row in rows for share, _ in row.all.labels.values())
    return labelled or bool(rows[0].all.measures) or len(rows[0].by_size) > 1


def _by_size(rows: Sequence[Row]) -> TextTable:
    """Return one task's rates by size; the share of each label, and how many of these are right."""
    cells: list[Sequence[str]] = []
    for row in rows:
        cells.append([row.model])
        parts = {str(size): s for size, s in row.by_size.items()}
        for size, s in ((parts if len(parts) > 1 else {}) | {"all": row.all}).items():
            marked = [
                f"{share:.0%}" + ("" if right != right else f", {right:.0%} right")
                for share, right in s.labels.values()
            ]
            cells.append(
                (
                    f"  {size}",
                    str(s.n),
                    f"{s.right.value:.1%}",
                    limits(s.right, ".0%"),
                    *(f"{value:.1%}" for value in s.measures.values()),
                    *marked,
                )
            )
    heads = ("", "n", "right", "95 %", *rows[0].all.measures, *rows[0].all.labels)
    return table(f"\n{rows[0].task}", heads, cells)
