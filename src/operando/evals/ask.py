"""Open models, ask them the same questions, grade the answers, compare: what every evaluation does.

base, trained = checkpoints(Path("runs/demo"))
for model in open_each([base, trained]):
    answers = ask(model, question, day)
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from operando.errors import UserError
from operando.models.load import Dtype, choose_dtype, dtype_name, load_model, open_model, stop_ids
from operando.models.policy import Policy
from operando.recipe.data import ModelConfig, PromptConfig
from operando.rollout.greedy_eval import grade
from operando.rollout.make import make_sampler
from operando.rollout.sampler import Request, Sampler, Sampling, as_rollouts, uniform_streams
from operando.run import SeedTree
from operando.run_folder import check_model_or_run, read_recipe, start_of
from operando.stats.bootstrap import bootstrap_mean
from operando.stats.intervals import Interval, paired_difference
from operando.tasks.base import Task
from operando.tasks.loops import NEXT_QUESTION_STOPS, cut_at_next_question
from operando.tasks.prompts import make_prompts
from operando.types import Example, Prompt, Rollout, Verdict
from operando.update.checkpoint import load_weights, pick_step

MOST_CUT = 0.05  # of the gold answers


class Checkpoint(NamedTuple):
    """A model to ask. Example: Checkpoint("step 40", recipe.model, Path("runs/demo"), 40)

    `run` None: the model as it is, before any training.
    """

    name: str
    config: ModelConfig
    run: Path | None = None
    step: int = 0
    engine: str = "auto"
    max_batch: int = 64


@dataclass(frozen=True)
class Opened:
    """A checkpoint in memory, ready to be asked."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    context: int
    """Tokens of prompt and completion together."""
    dtype: str
    """Of the weights, as a recipe names it."""
    max_batch: int
    """Completions sampled together."""


@dataclass(frozen=True)
class Question:
    """A task's problems, and how they are asked and answered.

    `shots` are worked examples before each problem. `max_completion_length` None: a quarter more
    than the longest gold answer, in each model's own tokens. `seeds` None: greedily, once; else
    `samples` times at `temperature`, each from its own random stream, the same for every model.

    Example: Question("words", task, task.held_out[:200], PromptConfig(), is_cut=True)
    """

    name: str
    task: Task
    examples: Sequence[Example]
    prompt: PromptConfig
    shots: Sequence[Example] = ()
    max_completion_length: int | None = None
    holds_gold: bool = False
    """A length that would cut more than 5 % of the gold answers is an error."""
    stop: tuple[str, ...] = ()
    is_cut: bool = False
    """Completions end where the model asks itself a next question."""
    temperature: float = 1.0
    samples: int = 1
    seeds: SeedTree | None = None


class Answer(NamedTuple):
    """One completion with what the task says of it; `text` is what was graded."""

    rollout: Rollout
    text: str
    verdict: Verdict
    labels: Mapping[str, bool]

    @property
    def example(self) -> Example:
        return self.rollout.prompt.example


class Change(NamedTuple):
    """The share of right answers of one model minus another's, on the same problems.

    Greedy: Newcombe's interval and McNemar's exact p, with the problems gained and lost. Sampled:
    the bootstrap of problems, each with the mean of its samples, and no p-value.
    """

    difference: Interval
    p_value: float | None
    gained: int
    lost: int


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's, and not a model's; neither is an error."""
    check_model_or_run(folder)
    return (folder / "manifest.json").is_file()


def day_of(folder: Path) -> datetime:
    """Return the day that a chat template prints: a run's start; of a model folder, now."""
    return start_of(folder) if is_run(folder) else datetime.now(UTC)


def checkpoints(
    folder: Path, step: int | None = None, dtype: Dtype | None = None
) -> list[Checkpoint]:
    """Return a run's base and saved step (None: the last), or the one model of a model folder.

    `dtype` is a model folder's; None: what "auto" is for a model that is only asked.
    """
    if not is_run(folder):
        if step is not None:
            raise UserError(f"--step {step}: {folder} is a model folder; it has no steps")
        config = ModelConfig(id=str(folder))
        dtype = dtype or choose_dtype(config, open_model(config), frozen=True).dtype
        return [Checkpoint(folder.name, config.model_copy(update={"dtype": dtype}))]
    recipe, at = read_recipe(folder), pick_step(folder, step)
    engine, rows = recipe.rollout.engine, recipe.rollout.max_batch
    return [
        Checkpoint("base", recipe.model, None, 0, engine, rows),
        Checkpoint(f"step {at}", recipe.model, folder, at, engine, rows),
    ]


def open_each(models: Sequence[Checkpoint]) -> Iterator[Opened]:
    """Open one model after the other; a step that follows its own base is put into it.

    An opened one holds until the next is taken. So that no two models are in memory, the caller
    lets go of it first: `del opened` at the end of the loop.
    """
    before: Checkpoint | None = None
    held: list[tuple[Policy, Opened]] = []
    for one in models:
        if before is None or before.run or before.config != one.config:
            held.clear()
            held.append(_open(one))
        if one.run is not None:
            load_weights(one.run, one.step, held[0][0])
        before = one
        yield replace(held[0][1], name=one.name)


def _open(one: Checkpoint) -> tuple[Policy, Opened]:
    loaded = load_model(one.config)
    policy = Policy(loaded, one.config, SeedTree(0))  # LoRA's B is zero: the base model
    tokenizer = loaded.tokenizer
    stops = stop_ids(policy.base, tokenizer)
    sampler = make_sampler(one.engine, policy.base, tokenizer, stops, one.max_batch)
    context = int(loaded.model.config.get_text_config().max_position_embeddings)
    dtype = dtype_name(loaded.model)
    return policy, Opened(one.name, tokenizer, sampler, context, dtype, one.max_batch)


def ask(
    model: Opened,
    question: Question,
    day: datetime,
    on_answers: Callable[[int, int], None] = lambda _done, _of: None,
) -> list[Answer]:
    """Return graded answers, samples of a problem adjacent.

    Problems whose prompts leave no room for a completion in the model's context are left out; all
    of them is an error. `day` is the date that a chat template prints. `on_answers` is told how
    many problems are answered, of how many.
    """
    length = completion_length(model, question)
    prompts = fitting_prompts(model, question, day, length)
    stop = NEXT_QUESTION_STOPS if question.is_cut else question.stop
    places = {e.id: place for place, e in enumerate(question.examples)}
    order = [places[prompt.example.id] for prompt in prompts]  # a problem's stream is its own
    sampling, uniforms_BT = Sampling(length, stop=stop), None
    if question.seeds is not None:
        sampling = sampling._replace(temperature=question.temperature)
        uniforms_BT = uniform_streams(question.seeds, 0, order, question.samples, length)
    request = Request([p.ids for p in prompts], question.samples, sampling, uniforms_BT)
    sampled = []
    for at, chunk in request.chunks(model.max_batch):  # as the sampler itself would take them
        on_answers(at, len(prompts))
        sampled += model.sampler.sample(chunk)
    rollouts = as_rollouts(prompts, order, question.samples, sampled)
    return grade_answers(question.task, rollouts, is_cut=question.is_cut)


def grade_answers(task: Task, rollouts: Sequence[Rollout], *, is_cut: bool) -> list[Answer]:
    """Return each rollout with the verdict and labels of its text, cut at a next question."""
    graded = []
    texts = [cut_at_next_question(r.completion) if is_cut else r.completion for r in rollouts]
    if is_cut:
        said = [
            task.verify(r.prompt.example, text, r.is_truncated)
            for r, text in zip(rollouts, texts, strict=True)
        ]
    else:
        said = [one.verdict for one in grade(task, rollouts)]
    for r, text, verdict in zip(rollouts, texts, said, strict=True):
        labels = task.labels(r.prompt.example, text, r.is_truncated) if task.labels else {}
        graded.append(Answer(r, text, verdict, labels))
    return graded


def compare(before: Sequence[Answer], after: Sequence[Answer], seed: int = 0) -> Change:
    """Return after minus before; both answered the same problems, as often. `seed`: bootstrap."""
    keys = [[(one.example.id, one.rollout.sample) for one in arm] for arm in (before, after)]
    if keys[0] != keys[1] or not keys[0]:
        raise ValueError("the two models were not asked the same problems")
    old, new = ([one.verdict.correct for one in arm] for arm in (before, after))
    if max(sample for _, sample in keys[0]) == 0:
        paired = paired_difference(old, new)
        return Change(paired.difference, paired.p_value, paired.gained, paired.lost)
    old_P, new_P = problem_means(before), problem_means(after)
    changes = [b - a for a, b in zip(old_P, new_P, strict=True)]
    return Change(bootstrap_mean(changes, seed), None, 0, 0)


def problem_means(answers: Sequence[Answer]) -> list[float]:
    """Return the share of right samples of each problem; samples are adjacent."""
    samples = 1 + max(one.rollout.sample for one in answers)
    correct = [one.verdict.correct for one in answers]
    groups = [correct[i : i + samples] for i in range(0, len(correct), samples)]
    return [sum(group) / samples for group in groups]


def pass_at(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from `right` right ones of n (2107.03374):
    1 - C(n - right, k) / C(n, k). Example: pass_at(4, 1, 2) == 0.5"""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def pass_curve(answers: Sequence[Answer]) -> dict[int, float]:
    """Return the mean pass@k over problems for k = 1, 2, 4, ... up to the samples drawn."""
    samples = 1 + max(one.rollout.sample for one in answers)
    right = [round(share * samples) for share in problem_means(answers)]
    ks = [2**i for i in range(samples.bit_length())]
    return {k: sum(pass_at(samples, c, k) for c in right) / len(right) for k in ks}


# --- lengths and prompts -------------------------------------------------------------------------


def gold_answers(question: Question) -> list[str]:
    """Return the gold answers as a model would write them."""
    return [question.prompt.worked_answer(e.solution, e.answer) for e in question.examples]


def completion_length(model: Opened, question: Question) -> int:
    """Return the completion length in tokens: as given, else a quarter more than the longest gold
    answer, for a right one may be longer. One that cuts many gold answers is an error."""
    length = question.max_completion_length
    if length is None or question.holds_gold:
        ids = model.tokenizer(gold_answers(question), add_special_tokens=False)["input_ids"]
        lengths = [len(one) + 1 for one in ids]  # with the end token
        length = length or max(lengths) + max(lengths) // 4
        cut = sum(one > length for one in lengths)
        if cut > MOST_CUT * len(lengths):
            raise UserError(
                f"--max-completion-length {length} would cut {cut} of {len(lengths)} gold answers "
                f"of {question.name}; the longest has {max(lengths)} tokens. Raise it or leave it "
                "out"
            )
    if length >= model.context:
        remedy = "Lower --max-completion-length"
        if question.max_completion_length is None:
            remedy = (
                "That is a quarter more than the longest gold answer: ask smaller problems "
                "(--sizes), or give --max-completion-length"
            )
        raise UserError(
            f"{question.name}: completions of {length} tokens leave no room for a prompt: the "
            f"context of {model.name} is {model.context}. {remedy}"
        )
    return length


def fitting_prompts(model: Opened, question: Question, day: datetime, length: int) -> list[Prompt]:
    """Return the prompts that leave room for a completion in the model's context."""
    limit = model.context - length
    prompts = make_prompts(
        question.examples, question.shots, question.prompt, model.tokenizer, sys.maxsize, day
    )
    fitting = [one for one in prompts if len(one.ids) <= limit]
    if not fitting:
        raise UserError(
            f"{question.name}: no prompt leaves room for {length} tokens in the context of "
            f"{model.name}, {model.context}; the shortest prompt has "
            f"{min(len(one.ids) for one in prompts)}. Lower --max-completion-length or --few-shot"
        )
    return fitting


# --- the table of answers ------------------------------------------------------------------------


def answer_columns(answers: Mapping[tuple[str, str], Sequence[Answer]]) -> dict[str, list[object]]:
    """Return one row for each answer of each (task, model): the table that evaluations write."""
    rows = [(task, model, one) for (task, model), many in answers.items() for one in many]
    return {
        "task": [task for task, _, _ in rows],
        "model": [model for _, model, _ in rows],
        "example_id": [one.example.id for _, _, one in rows],
        "sample": [one.rollout.sample for _, _, one in rows],
        "question": [one.example.question for _, _, one in rows],
        "prompt": [one.rollout.prompt.text for _, _, one in rows],
        "answer": [one.example.answer for _, _, one in rows],
        "completion": [one.rollout.completion for _, _, one in rows],
        "correct": [one.verdict.correct for _, _, one in rows],
        "reason": [one.verdict.reason for _, _, one in rows],
        "truncated": [one.rollout.is_truncated for _, _, one in rows],
        "length": [len(one.rollout.completion_ids) for _, _, one in rows],
        "labels": [json.dumps(dict(one.labels)) for _, _, one in rows],
    }
