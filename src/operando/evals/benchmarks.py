"""Outside evaluation: base beside trained on GSM8K, MMLU and MATH-500, on the same prompts."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from operando.errors import UserError, nearest
from operando.evals.ask import Asked, Contest, Format, foreign_prompt
from operando.recipe import Math500TaskConfig, MmluTaskConfig, PromptConfig, Recipe
from operando.rollout.greedy_eval import Graded
from operando.rollout.sampler import Sampling
from operando.run import SeedTree, hash_file, write_parquet
from operando.stats.bootstrap import bootstrap_mean
from operando.stats.intervals import Interval, paired_difference, wilson
from operando.tasks.base import Task
from operando.tasks.gsm8k import gsm8k_examples, gsm8k_source, gsm8k_verifier
from operando.tasks.load import load_task
from operando.tasks.loops import NEXT_QUESTION_STOPS, cut_at_next_question, find_loop
from operando.tasks.math500 import load_math500
from operando.tasks.mmlu import load_mmlu
from operando.types import Example, Prompt, Rollout

OUTSIDE = ("gsm8k", "mmlu", "math500")
GENERATED = ("graph_search", "clrs", "words")  # evals/compare.py
GRADERS = ("ours", "math_verify")
DATA_KEYS = ("gsm8k", "gsm8k.train", "mmlu", "math500")

BOX = "Put the final answer in \\boxed{}."
TEMPLATES: Mapping[str, Mapping[Format, str]] = {
    "gsm8k": {"raw": "Q: {question}\nA:", "chat": "{question}"},
    "mmlu": {
        "raw": "Question: {question}\nAnswer:",
        "chat": "{question}\nAnswer with the letter of the right choice.",
    },
    "math500": {"raw": f"Q: {{question}}\n{BOX}\nA:", "chat": f"{{question}}\n{BOX}"},
}
WORKED = {"gsm8k": " {solution} #### {answer}", "mmlu": " {answer}", "math500": " {solution}"}


@dataclass(frozen=True)
class OutsideConfig:
    """What to ask, and how. Example: OutsideConfig(("gsm8k", "mmlu"), num=500)

    `temperature` None: greedy. `data` maps a task to a local file or hub id. `format` and
    `few_shot` None: as the run's own prompts. `grader` is MATH-500's; None: "ours".
    """

    tasks: tuple[str, ...]
    num: int | None = None
    format: Format | None = None
    data: Mapping[str, str] | None = None
    temperature: float | None = None
    samples: int = 1
    few_shot: int | None = None
    max_completion_length: int | None = None
    grader: str | None = None


class Plan(NamedTuple):
    """A task with its prompts. `is_cut`: completions end at a next question of the model's own."""

    task: Task
    asked: Asked
    is_cut: bool
    left_out: int


@dataclass(frozen=True)
class Arm:
    """Rates of one model on one task; `right` is a share of the completions, with its interval."""

    name: str
    right: Interval
    truncated: float
    looped: float
    mean_length: float


@dataclass(frozen=True)
class TaskResult:
    """One task: both arms, and trained minus base on the same prompts.

    Greedy: Newcombe's interval and McNemar's exact p, with the problems gained and lost. Sampled:
    the bootstrap of problems, each with the mean of its samples; no p-value.
    """

    task: str
    format: str
    n: int
    samples: int
    left_out: int
    base: Arm
    trained: Arm
    difference: Interval
    p_value: float | None
    gained: int
    lost: int


@dataclass(frozen=True)
class Outside:
    """Every task's result, and the file that holds every answer."""

    step: int
    results: tuple[TaskResult, ...]
    file: Path


def outside_config(
    tasks: str | None,
    prompt: str | None,
    data: Sequence[str],
    num: int | None,
    few_shot: int | None,
    greedy: bool,
    temperature: float | None,
    samples: int,
    max_completion_length: int | None,
    grader: str | None = None,
) -> OutsideConfig | None:
    """Return the options of `operando eval`, checked; None if nothing but the run's own is asked.

    That is no task, no prompt format and no way of sampling.
    """
    formats: Mapping[str, Format] = {"raw": "raw", "chat": "chat"}
    if prompt is not None and prompt not in formats:
        raise UserError(f"--prompt {prompt}: expected raw or chat.{nearest(prompt, formats)}")
    if temperature is not None and greedy:
        raise UserError("--greedy and --temperature exclude each other")
    if temperature is not None and not 0 < temperature < math.inf:
        raise UserError(f"--temperature {temperature}: expected a number above 0")
    if temperature is None and samples != 1:
        raise UserError(f"--samples {samples} needs --temperature: greedy answers are all alike")
    pairs = [item.partition("=") for item in data]
    for (key, _, path), item in zip(pairs, data, strict=True):
        if not key or not path:
            raise UserError(f"--data {item}: expected TASK=PATH, e.g. mmlu=mmlu_csv.tar.gz")
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if tasks is not None and not names:
        raise UserError(f"--tasks {tasks!r}: expected names such as {','.join(OUTSIDE)}")
    if grader is not None and grader not in GRADERS:
        raise UserError(
            f"--grader {grader}: expected ours or math_verify.{nearest(grader, GRADERS)}"
        )
    if grader is not None and "math500" not in names:
        raise UserError(f"--grader {grader} is for math500, which --tasks does not name")
    if not names and not data and prompt is None and temperature is None and few_shot is None:
        return None
    return OutsideConfig(
        names,
        num,
        None if prompt is None else formats[prompt],
        {key: path for key, _, path in pairs},
        temperature,
        samples,
        few_shot,
        max_completion_length,
        grader,
    )


def evaluate_outside(folder: Path, config: OutsideConfig, step: int | None = None) -> Outside:
    """Evaluate a saved step (None: the last) and its base model on tasks, and write every answer.

    An empty `config.tasks` means the run's own task. A run's own task is graded as in training: its
    data, its scorer, its stop texts. Any other task has the scorer of its module, and in raw format
    completions end where the model asks itself a next question (`cut_at_next_question`; the same
    texts stop the sampling, so that they do not count as truncated).
    """
    contest = Contest(folder, step)
    names = config.tasks or (contest.recipe.task.kind,)
    _check(config, names, contest.recipe)
    plans = [_plan(name, config, contest) for name in names]
    arms = contest.answer([plan.asked for plan in plans])
    base = [_judged(p, r) for p, r in zip(plans, arms.base, strict=True)]
    trained = [_judged(p, r) for p, r in zip(plans, arms.trained, strict=True)]
    seed = SeedTree(contest.recipe.seed).derive("bootstrap")
    results = tuple(
        _result(plan, config, contest.step, before, after, seed)
        for plan, before, after in zip(plans, base, trained, strict=True)
    )
    file = _write(folder, contest.step, config, plans, base, trained)
    return Outside(contest.step, results, file)


def _check(config: OutsideConfig, names: Sequence[str], recipe: Recipe) -> None:
    known = list(dict.fromkeys([*OUTSIDE, recipe.task.kind]))
    listed = list(dict.fromkeys([*known, *GENERATED]))
    for name in names:
        if name not in known:
            raise UserError(
                f"--tasks {name}: no such task; expected {', '.join(listed)}."
                f"{nearest(name, listed)}"
            )
    if len(set(names)) != len(names):
        raise UserError(f"--tasks {','.join(names)}: a task is named twice")
    for key in config.data or {}:
        if key not in DATA_KEYS:
            raise UserError(
                f"--data {key}=...: expected one of {', '.join(DATA_KEYS)}."
                f"{nearest(key, DATA_KEYS)}"
            )
        if key.partition(".")[0] not in names:
            raise UserError(f"--data {key}=...: --tasks does not name {key.partition('.')[0]}")


# --- what is asked -------------------------------------------------------------------------------


def _plan(name: str, config: OutsideConfig, contest: Contest) -> Plan:
    data = config.data or {}
    is_own = name == contest.recipe.task.kind and not any(k.startswith(name) for k in data)
    is_own = is_own and (name != "math500" or config.grader is None)
    prompt = _prompt(name, config, contest.recipe)
    task = load_task(contest.recipe.task) if is_own else load_outside(name, config, prompt)
    length = contest.length(config.max_completion_length)
    is_cut = prompt.format == "raw" and not is_own
    stop = contest.recipe.rollout.stop if is_own else NEXT_QUESTION_STOPS if is_cut else ()
    count = len(task.held_out) if config.num is None else config.num
    if count > len(task.held_out):
        raise UserError(f"--num {count}: {name} has {len(task.held_out)} held-out problems")
    if prompt.few_shot > len(task.train):
        raise UserError(
            f"{name} has {len(task.train)} training problems to take {prompt.few_shot} worked "
            "examples from; --few-shot 0 asks without"
        )
    shots = list(task.train[: prompt.few_shot])
    prompts = _fitting(contest, task.held_out[:count], shots, prompt, length, name)
    asked = Asked(name, prompts, Sampling(length, stop=stop), config.temperature, config.samples)
    return Plan(task, asked, is_cut, count - len(prompts))


def _prompt(name: str, config: OutsideConfig, recipe: Recipe) -> PromptConfig:
    """Return the run's own prompt for its own task in its own format, else the task's."""
    own = recipe.prompt
    if name == recipe.task.kind and config.format in (None, own.format):
        few_shot = own.few_shot if config.few_shot is None else config.few_shot
        return own.model_copy(update={"few_shot": few_shot, "max_prompt_length": None})
    format: Format = config.format or own.format
    template = TEMPLATES[name][format] if name in TEMPLATES else None
    prompt = foreign_prompt(own, format, template, config.few_shot)
    worked = WORKED.get(name, own.answer_template)
    return prompt.model_copy(update={"answer_template": worked})


def _fitting(
    contest: Contest,
    examples: Sequence[Example],
    shots: Sequence[Example],
    prompt: PromptConfig,
    length: int,
    name: str,
) -> list[Prompt]:
    """Return the prompts that leave room for a completion in the model's context."""
    limit = contest.room(length)
    prompts = contest.prompts(examples, shots, prompt, sys.maxsize)
    fitting = [one for one in prompts if len(one.ids) <= limit]
    if not fitting:
        raise UserError(
            f"{name}: no prompt leaves room for {length} tokens in the model's context of "
            f"{contest.context}; the shortest prompt has {min(len(one.ids) for one in prompts)}. "
            "Lower --max-completion-length or --few-shot"
        )
    return fitting


def load_outside(name: str, config: OutsideConfig, prompt: PromptConfig) -> Task:
    """Return a task from `--data` or the hub, whatever the run was trained on."""
    key, data = f"--data {name}", config.data or {}
    match name:
        case "mmlu":
            source = data.get("mmlu")
            given = {} if source is None else {"source": source}
            return load_mmlu(MmluTaskConfig.model_validate({"kind": "mmlu"} | given), key)
        case "math500":
            test = data.get("math500")
            given = {"grader": config.grader or "ours"}
            given |= {} if test is None else {"test": test}
            return load_math500(Math500TaskConfig.model_validate({"kind": "math500"} | given), key)
        case _:
            return _load_gsm8k(data, with_train=prompt.few_shot > 0)


def _load_gsm8k(data: Mapping[str, str], with_train: bool) -> Task:
    def find(key: str, split: str) -> tuple[list[Example], str]:
        given, option = data.get(key, "openai/gsm8k"), f"--data {key}"
        file = gsm8k_source(given, split, option, f"{option}=PATH").find()
        return gsm8k_examples(file, split, option), hash_file(file)

    held_out, digest = find("gsm8k", "test")
    train: list[Example] = []
    if with_train:
        train, train_digest = find("gsm8k.train", "train")
        if train_digest == digest:
            raise UserError("--data gsm8k and --data gsm8k.train are the same file")
    scorer = "last_number"
    return Task("gsm8k", train, held_out, gsm8k_verifier(scorer), source={"scorer": scorer})


# --- what came of it -----------------------------------------------------------------------------


def _judged(plan: Plan, rollouts: Sequence[Rollout]) -> list[Graded]:
    """Return each rollout with the verdict on its text, cut where the plan says so."""
    graded = []
    for r in rollouts:
        text = cut_at_next_question(r.completion) if plan.is_cut else r.completion
        graded.append(Graded(r, plan.task.verify(r.prompt.example, text, r.is_truncated)))
    return graded


def _result(
    plan: Plan,
    config: OutsideConfig,
    step: int,
    before: Sequence[Graded],
    after: Sequence[Graded],
    seed: int,
) -> TaskResult:
    old, new = [j.verdict.correct for j in before], [j.verdict.correct for j in after]
    k, n = config.samples, len(plan.asked.prompts)
    format = "chat" if plan.asked.prompts[0].messages else "raw"
    if config.temperature is None:
        paired = paired_difference(old, new)
        right = wilson(sum(old), n), wilson(sum(new), n)
        difference, p_value, changed = (
            paired.difference,
            paired.p_value,
            (paired.gained, paired.lost),
        )
    else:
        old_P, new_P = problem_means(old, k), problem_means(new, k)
        right = bootstrap_mean(old_P, seed), bootstrap_mean(new_P, seed)
        difference = bootstrap_mean([b - a for a, b in zip(old_P, new_P, strict=True)], seed)
        p_value, changed = None, (0, 0)
    return TaskResult(
        plan.asked.name,
        format,
        n,
        k,
        plan.left_out,
        _arm("base", right[0], before),
        _arm(f"step {step}", right[1], after),
        difference,
        p_value,
        gained=changed[0],
        lost=changed[1],
    )


def problem_means(correct: Sequence[bool], samples: int) -> list[float]:
    """Return the share of right samples of each problem; siblings are adjacent."""
    groups = [correct[i : i + samples] for i in range(0, len(correct), samples)]
    return [sum(group) / samples for group in groups]


def _arm(name: str, right: Interval, graded: Sequence[Graded]) -> Arm:
    n = len(graded)
    return Arm(
        name,
        right,
        truncated=sum(j.rollout.is_truncated for j in graded) / n,
        looped=sum(find_loop(j.rollout.completion) is not None for j in graded) / n,
        mean_length=sum(len(j.rollout.completion_ids) for j in graded) / n,
    )


def _write(
    folder: Path,
    step: int,
    config: OutsideConfig,
    plans: Sequence[Plan],
    base: Sequence[Sequence[Graded]],
    trained: Sequence[Sequence[Graded]],
) -> Path:
    names = [plan.asked.name for plan in plans]
    format = "chat" if plans[0].asked.prompts[0].messages else "raw"
    how = "greedy" if config.temperature is None else f"t{config.temperature:g}x{config.samples}"
    file = folder / "evals" / f"tasks_step_{step:05d}_{'-'.join(names)}_{format}_{how}.parquet"
    before = [j for graded in base for j in graded]
    after = [j for graded in trained for j in graded]
    columns: dict[str, list[object]] = {
        "task": [n for n, graded in zip(names, base, strict=True) for _ in graded],
        "graded_by": [
            plan.task.graded_by for plan, graded in zip(plans, base, strict=True) for _ in graded
        ],
        "example_id": [j.rollout.prompt.example.id for j in before],
        "sample": [j.rollout.sample for j in before],
        "prompt": [j.rollout.prompt.text for j in before],
        "answer": [j.rollout.prompt.example.answer for j in before],
    }
    for arm, graded in (("base", before), ("trained", after)):
        columns[f"{arm}_completion"] = [j.rollout.completion for j in graded]
        columns[f"{arm}_correct"] = [j.verdict.correct for j in graded]
        columns[f"{arm}_reason"] = [j.verdict.reason for j in graded]
        columns[f"{arm}_truncated"] = [j.rollout.is_truncated for j in graded]
        columns[f"{arm}_looped"] = [find_loop(j.rollout.completion) is not None for j in graded]
        columns[f"{arm}_length"] = [len(j.rollout.completion_ids) for j in graded]
    write_parquet(file, columns)
    return file


def outside_table(result: Outside) -> Table:
    """Return the results as a table: two rows a task, the difference on the second."""
    table = Table(box=None, pad_edge=False)
    for column in ("task", "", "n", "right", "95 %", "cut", "loop", "tokens"):
        table.add_column(column, justify="left" if column in ("task", "") else "right")
    table.add_column("trained - base, 95 %", justify="right")
    table.add_column("p", justify="right")
    table.add_column("gained, lost", justify="right")
    for row in result.results:
        n = f"{row.n}" if row.samples == 1 else f"{row.n} x {row.samples}"
        name = f"{row.task} ({row.format})"
        table.add_row(name, row.base.name, n, *_cells(row.base))
        value, low, high = row.difference
        p = "" if row.p_value is None else f"{row.p_value:.2g}"
        changed = "" if row.p_value is None else f"{row.gained}, {row.lost}"
        left_out = f"{row.left_out} too long" if row.left_out else ""
        table.add_row(
            left_out,
            row.trained.name,
            n,
            *_cells(row.trained),
            f"{value:+.1%} ({low:+.1%} to {high:+.1%})",
            p,
            changed,
        )
    return table


def _cells(arm: Arm) -> tuple[str, ...]:
    right = arm.right
    return (
        f"{right.value:.1%}",
        f"{right.low:.1%} to {right.high:.1%}",
        f"{arm.truncated:.0%}",
        f"{arm.looped:.0%}",
        f"{arm.mean_length:.1f}",
    )
