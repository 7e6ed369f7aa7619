"""Several models on the same prompts: what supervised and reinforcement learning cost elsewhere.

    operando eval RUN --tasks graph_search,clrs,words --also PRETRAINED

The models are a run's base and trained one, or a model folder, and those of `--also`. Each reads
the same texts with its own tokenizer and answers greedily, in raw format, up to a limit that holds
the gold answers. The first model is the one that the others are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from rich.console import Group
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from operando.errors import UserError, nearest
from operando.evals.benchmarks import GENERATED, TEMPLATES, WORKED, OutsideConfig, load_outside
from operando.models.load import Loaded, load_model, stop_ids
from operando.models.policy import Policy
from operando.recipe import (
    AskedTask,
    ClrsTaskConfig,
    GraphSearchTaskConfig,
    ModelConfig,
    PromptConfig,
    Recipe,
    WordsTaskConfig,
)
from operando.rollout.greedy_eval import Graded
from operando.rollout.make import make_sampler
from operando.rollout.sampler import Sampling, as_rollouts
from operando.run import SeedTree, write_parquet
from operando.run_folder import check_model_or_run, read_recipe, start_of
from operando.stats.intervals import Interval, PairedDifference, paired_difference, wilson
from operando.tasks import clrs
from operando.tasks.base import Task
from operando.tasks.load import load_task
from operando.tasks.loops import NEXT_QUESTION_STOPS, cut_at_next_question
from operando.tasks.prompts import make_prompts
from operando.types import Example
from operando.update.checkpoint import load_weights, pick_step

KNOWN = (*GENERATED, "gsm8k", "mmlu", "math500")
NUM = 200  # problems of a generated task without --num
MOST_CUT = 0.05  # of the gold answers
RAW = {"clrs": "{question}", "graph_search": "Q: {question}\nA:", "words": "Q: {question}\nA:"}
ANSWERS: Mapping[str, str] = {
    "clrs": "{solution}",
    "graph_search": " {solution}",
    "words": " {solution} #### {answer}",
}


class Model(NamedTuple):
    """One of the models. Example: Model("base", ModelConfig(id="starter"), None, 0)"""

    name: str
    config: ModelConfig
    run: Path | None
    """The run whose saved step is put in; None: as the model is."""
    step: int


class Answers(NamedTuple):
    """A model's graded answers to one task, and the most tokens that they could have."""

    graded: list[Graded]
    limit: int


class Question(NamedTuple):
    """A task with the problems asked, and the prompt settings."""

    task: Task
    examples: Sequence[Example]
    prompt: PromptConfig
    worked: str
    is_cut: bool


@dataclass(frozen=True)
class Shares:
    """Means over problems. For `clrs` only: shares of nodes and of the trace, and copies.

    `labelled` has, for each label of the task, the share of answers with it and how many of those
    are right (NaN: there are none).
    """

    n: int
    right: Interval
    node: float
    trace: float
    identity: float
    copied: float
    labelled: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """One model on one task. `against` compares it with the first model, paired."""

    task: str
    model: str
    limit: int
    truncated: float
    all: Shares
    by_size: Mapping[int, Shares]
    against: PairedDifference | None


@dataclass(frozen=True)
class SideBySide:
    """Every model on every task, and the file that holds every answer."""

    rows: tuple[Row, ...]
    file: Path


def is_side_by_side(
    folder: Path, also: Sequence[Path], asked: OutsideConfig, sizes: str | None
) -> bool:
    """Return whether more is asked than a run beside its base on its own or the outside tasks."""
    own = read_recipe(folder).task.kind if _is_run(folder) else None
    foreign = [name for name in asked.tasks if name in GENERATED and name != own]
    return bool(also or foreign) or sizes is not None or (folder / "config.json").is_file()


def graph_sizes(given: str | None) -> tuple[int, ...]:
    """Return the numbers of nodes that `--sizes` names; none given: the task's own."""
    if given is None:
        return ()
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdigit() and 2 <= int(part) <= 26 for part in parts):
        raise UserError(f"--sizes {given}: expected numbers from 2 to 26, such as 4,5,8")
    return tuple(map(int, parts))


def compare_models(
    folder: Path,
    also: Sequence[Path],
    config: OutsideConfig,
    step: int | None = None,
    sizes: Sequence[int] = (),
    given: Sequence[AskedTask] = (),
) -> SideBySide:
    """Ask all models the same problems; write every answer to FOLDER/evals/side_by_side_*.

    A task that is `given` is asked as it says; another one of its kind as by default.
    """
    models = [model for one in (folder, *also) for model in _models(one, step, one == folder)]
    names = [model.name for model in models]
    if len(set(names)) != len(names):
        raise UserError(f"--also: two models are called alike: {', '.join(names)}")
    recipe = read_recipe(folder) if _is_run(folder) else None
    settings = {task.kind: task for task in given}
    questions = [
        _question(name, config, recipe, sizes, settings.get(name))
        for name in _tasks(config, recipe)
    ]
    day = start_of(folder) if _is_run(folder) else datetime.now(UTC)
    answers = {
        model.name: _answers(model, questions, config.max_completion_length, day)
        for model in models
    }
    rows = [
        _row(question, name, answers[name][i], None if name == names[0] else answers[names[0]][i])
        for i, question in enumerate(questions)
        for name in names
    ]
    tasks = "-".join(question.task.name for question in questions)
    file = folder / "evals" / f"side_by_side_{tasks}_{len(models)}.parquet"
    _write(file, questions, answers)
    return SideBySide(tuple(rows), file)


def _tasks(config: OutsideConfig, recipe: Recipe | None) -> tuple[str, ...]:
    if config.temperature is not None or config.few_shot or config.format == "chat":
        raise UserError(
            "models side by side answer greedily, in raw format, without worked examples: leave "
            "--temperature, --few-shot and --prompt chat out"
        )
    names = config.tasks or ((recipe.task.kind,) if recipe is not None else ())
    if not names:
        raise UserError(f"a model folder has no task of its own: --tasks {','.join(GENERATED)}")
    for name in names:
        if name not in KNOWN:
            raise UserError(
                f"--tasks {name}: no such task; expected {', '.join(KNOWN)}.{nearest(name, KNOWN)}"
            )
    if len(set(names)) != len(names):
        raise UserError(f"--tasks {','.join(names)}: a task is named twice")
    return names


def _is_run(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def _models(folder: Path, step: int | None, is_first: bool) -> list[Model]:
    """Return a run's base and trained model (of --also: the trained one), or a folder's model."""
    check_model_or_run(folder)
    if _is_run(folder):
        recipe, at = read_recipe(folder), pick_step(folder, step if is_first else None)
        trained = Model(f"{folder.name} step {at}", recipe.model, folder, at)
        base = Model(f"base {Path(recipe.model.id).name}", recipe.model, None, 0)
        return [base, trained] if is_first else [trained]
    if step is not None and is_first:
        raise UserError(f"--step {step}: {folder} is a model folder; it has no steps")
    return [Model(folder.name, ModelConfig(id=str(folder)), None, 0)]


# --- what is asked -------------------------------------------------------------------------------


def _question(
    name: str,
    config: OutsideConfig,
    recipe: Recipe | None,
    sizes: Sequence[int],
    given: AskedTask | None = None,
) -> Question:
    is_own = given is None and recipe is not None and recipe.task.kind == name and not sizes
    if is_own and recipe is not None and recipe.prompt.format == "raw":
        prompt = recipe.prompt.model_copy(update={"few_shot": 0, "max_prompt_length": None})
        task = load_task(recipe.task)
    else:
        prompt = PromptConfig(template=RAW[name] if name in RAW else TEMPLATES[name]["raw"])
        is_own = False
        num = config.num or NUM
        if given is not None:
            task = load_task(given.model_copy(update={"num_train": 1}))
        else:
            task = _generated(name, num, sizes) or load_outside(name, config, prompt)
    count = config.num or len(task.held_out)
    if count > len(task.held_out):
        raise UserError(f"--num {count}: {name} has {len(task.held_out)} held-out problems")
    worked = ANSWERS[name] if name in ANSWERS else WORKED[name]
    is_cut = name != "clrs" and not is_own
    return Question(task, task.held_out[:count], prompt, worked, is_cut)


def _generated(name: str, num: int, sizes: Sequence[int]) -> Task | None:
    given: dict[str, object] = {"kind": name, "num_train": 1, "num_held_out": num}
    if name == "words":
        return load_task(WordsTaskConfig.model_validate(given))
    given |= {"sizes": tuple(sizes)} if sizes else {}
    match name:
        case "clrs":
            return load_task(ClrsTaskConfig.model_validate(given))
        case "graph_search":
            return load_task(GraphSearchTaskConfig.model_validate(given))
        case _:
            return None


def gold_lengths(question: Question, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of each gold answer, end token included."""
    texts = [
        question.worked.replace("{solution}", e.solution).replace("{answer}", e.answer)
        for e in question.examples
    ]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [len(one) + 1 for one in ids]


def token_limit(question: Question, tokenizer: PreTrainedTokenizerBase, given: int | None) -> int:
    """Return the completion limit: as given, if it holds the gold answers; else a quarter more
    than the longest, for a right walk may be longer than the gold one."""
    lengths = gold_lengths(question, tokenizer)
    limit = given or max(lengths) + max(lengths) // 4
    cut = sum(length > limit for length in lengths)
    if cut > MOST_CUT * len(lengths):
        raise UserError(
            f"--max-completion-length {limit} would cut {cut} of {len(lengths)} gold answers of "
            f"{question.task.name}; the longest has {max(lengths)} tokens. Raise it or leave it out"
        )
    return limit


def _answers(
    model: Model, questions: Sequence[Question], given: int | None, day: datetime
) -> list[Answers]:
    loaded = load_model(model.config)
    policy = Policy(loaded, model.config, SeedTree(0))
    if model.run is not None:
        load_weights(model.run, model.step, policy)
    return [_answer(policy, loaded, question, given, day) for question in questions]


def _answer(
    policy: Policy, loaded: Loaded, question: Question, given: int | None, day: datetime
) -> Answers:
    tokenizer = loaded.tokenizer
    limit = token_limit(question, tokenizer, given)
    context = int(loaded.model.config.get_text_config().max_position_embeddings)
    if limit >= context:
        raise UserError(
            f"{question.task.name}: gold answers have up to {limit} tokens, and the model's "
            f"context is {context}. Ask smaller graphs: --sizes"
        )
    prompts = make_prompts(question.examples, (), question.prompt, tokenizer, context - limit, day)
    stops = stop_ids(policy.base, tokenizer)
    sampler = make_sampler("auto", policy.base, tokenizer, stops, 64)
    stop = NEXT_QUESTION_STOPS if question.is_cut else ()
    sampled = sampler.sample([p.ids for p in prompts], 1, Sampling(limit, stop=stop), None)
    graded = []
    for r in as_rollouts(prompts, list(range(len(prompts))), 1, sampled):
        text = _text(r.completion, question)
        graded.append(Graded(r, question.task.verify(r.prompt.example, text, r.is_truncated)))
    return Answers(graded, limit)


# --- what came of it -----------------------------------------------------------------------------


def _row(question: Question, model: str, answers: Answers, first: Answers | None) -> Row:
    graded = answers.graded
    sizes = sorted({int(e.columns["n"]) for e in question.examples if "n" in e.columns})
    by_size = {
        n: _shares([j for j in graded if j.rollout.prompt.example.columns["n"] == n], question)
        for n in sizes
    }
    against = None
    if first is not None:
        against = paired_difference(
            [j.verdict.correct for j in first.graded], [j.verdict.correct for j in graded]
        )
    return Row(
        question.task.name,
        model,
        answers.limit,
        sum(j.rollout.is_truncated for j in graded) / len(graded),
        _shares(graded, question),
        by_size,
        against,
    )


def _shares(graded: Sequence[Graded], question: Question) -> Shares:
    n = len(graded)
    right = wilson(sum(j.verdict.correct for j in graded), n)
    pairs = [(j.rollout.prompt.example, j.rollout.completion) for j in graded]
    if "hints" not in pairs[0][0].columns:
        nan = float("nan")
        return Shares(n, right, nan, nan, nan, nan, _labelled(graded, question))
    return Shares(
        n,
        right,
        node=sum(clrs.node_accuracy(e, c) for e, c in pairs) / n,
        trace=sum(clrs.trace_accuracy(e, c) for e, c in pairs) / n,
        identity=sum(clrs.identity_accuracy(e) for e, _ in pairs) / n,
        copied=sum(clrs.labels(e, c, False)["identity"] for e, c in pairs) / n,
        labelled={},
    )


def _labelled(graded: Sequence[Graded], question: Question) -> dict[str, tuple[float, float]]:
    marks = [_labels(j, question) for j in graded]
    found = {}
    for name in marks[0]:
        those = [j.verdict.correct for j, one in zip(graded, marks, strict=True) if one[name]]
        right = sum(those) / len(those) if those else float("nan")
        found[name] = (len(those) / len(graded), right)
    return found


def _labels(graded: Graded, question: Question) -> Mapping[str, bool]:
    if question.task.labels is None:
        return {}
    r = graded.rollout
    return question.task.labels(r.prompt.example, _text(r.completion, question), r.is_truncated)


def _text(completion: str, question: Question) -> str:
    """Return what is graded of a completion."""
    return cut_at_next_question(completion) if question.is_cut else completion


def _write(
    file: Path, questions: Sequence[Question], answers: Mapping[str, Sequence[Answers]]
) -> None:
    columns: dict[str, list[object]] = {
        key: []
        for key in (
            "model",
            "graded_by",
            "example_id",
            "prompt",
            "gold",
            "completion",
            "correct",
            "reason",
            "truncated",
            "labels",
        )
    }
    for model, tasks in answers.items():
        both = zip(questions, tasks, strict=True)
        for question, one in [(question, j) for question, task in both for j in task.graded]:
            example = one.rollout.prompt.example
            values = (
                model,
                question.task.graded_by,
                example.id,
                one.rollout.prompt.text,
                example.answer,
                one.rollout.completion,
                one.verdict.correct,
                one.verdict.reason,
                one.rollout.is_truncated,
                json.dumps(dict(_labels(one, question))),
            )
            for key, value in zip(columns, values, strict=True):
                columns[key].append(value)
    write_parquet(file, columns)


# --- what the terminal shows ---------------------------------------------------------------------


def side_by_side_tables(result: SideBySide) -> Group:
    """Return the table of all models, and for graphs one more by the number of nodes."""
    table = Table(box=None, pad_edge=False)
    for column in ("task", "model", "n", "limit", "right", "95 %", "cut"):
        table.add_column(column, justify="left" if column in ("task", "model") else "right")
    for column in ("minus the first, 95 %", "p", "gained, lost"):
        table.add_column(column, justify="right")
    for row in result.rows:
        right, against = row.all.right, row.against
        compared = ("", "", "")
        if against is not None:
            value, low, high = against.difference
            compared = (
                f"{value:+.1%} ({low:+.1%} to {high:+.1%})",
                f"{against.p_value:.2g}",
                f"{against.gained}, {against.lost}",
            )
        table.add_row(
            row.task,
            row.model,
            str(row.all.n),
            str(row.limit),
            f"{right.value:.1%}",
            f"{right.low:.1%} to {right.high:.1%}",
            f"{row.truncated:.0%}",
            *compared,
        )
    tables = [table]
    for task in dict.fromkeys(row.task for row in result.rows if row.by_size):
        tables.append(_by_size([row for row in result.rows if row.task == task]))
    return Group(*tables)


def _by_size(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, title=f"\n{rows[0].task}", title_justify="left")
    is_clrs = rows[0].all.node == rows[0].all.node  # NaN where it does not apply
    table.add_column("model")
    more = ("nodes right", "if copied", "copies", "trace right") if is_clrs else ()
    labels = list(rows[0].all.labelled)
    more = (*more, *(column for name in labels for column in (name, "right of these")))
    for column in ("nodes", "n", "right", "95 %", *more):
        table.add_column(column, justify="right")
    for row in rows:
        for size, s in row.by_size.items():
            cells = (f"{s.node:.1%}", f"{s.identity:.1%}", f"{s.copied:.0%}", f"{s.trace:.1%}")
            shares = [share for name in labels for share in s.labelled[name]]
            labelled = [f"{share:.1%}" if share == share else "" for share in shares]
            table.add_row(
                row.model,
                str(size),
                str(s.n),
                f"{s.right.value:.1%}",
                f"{s.right.low:.1%} to {s.right.high:.1%}",
                *(cells if is_clrs else ()),
                *labelled,
            )
    return table
