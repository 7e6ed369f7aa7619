"""Outside evaluation: base beside trained on GSM8K, MMLU and MATH-500, on the same prompts."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from operando.audit.arms import Asked, Contest, Format, foreign_prompt
from operando.errors import UserError, nearest
from operando.recipe import Math500TaskConfig, MmluTaskConfig, PromptConfig, Recipe
from operando.rollout.held_out import Judged
from operando.rollout.sampler import Sampling
from operando.run import SeedTree, hash_file, write_parquet
from operando.study.stats import Interval, bootstrap_mean, paired_difference, wilson
from operando.tasks.base import Task
from operando.tasks.gsm8k import gsm8k_examples, gsm8k_source, gsm8k_verifier
from operando.tasks.load import load_task
from operando.tasks.loops import NEXT_QUESTION_STOPS, cut_at_next_question, find_loop
from operando.tasks.math500 import load_math500
from operando.tasks.mmlu import load_mmlu
from operando.types import Example, Prompt, Rollout

OUTSIDE = ("gsm8k", "mmlu", "math500")
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
    `few_shot` None: as the run's own prompts.
    """

    tasks: tuple[str, ...]
    num: int | None = None
    format: Format | None = None
    data: Mapping[str, str] | None = None
    temperature: float | None = None
    samples: int = 1
    few_shot: int | None = None
    max_completion_length: int | None = None


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
    tasks: str | None, prompt: str | None, data: Sequence[str], num: int | None,
    few_shot: int | None, greedy: bool, temperature: float | None, samples: int,
    max_completion_length: int | None,
) -> OutsideConfig | None:  # fmt: skip
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
    before = [j for judged in base for j in judged]
    after = [j for judged in trained for j in judged]
    columns: dict[str, list[object]] = {
        "task": [n for n, judged in zip(names, base, strict=True) for _ in judged],
        "example_id": [j.rollout.prompt.example.id for j in before],
        "sample": [j.rollout.sample for j in before],
        "prompt": [j.rollout.prompt.text for j in before],
        "answer": [j.rollout.prompt.example.answer for j in before],
    }
    for arm, judged in (("base", before), ("trained", after)):
        columns[f"{arm}_completion"] = [j.rollout.completion for j in judged]
        columns[f"{arm}_correct"] = [j.verdict.correct for j in judged]
        columns[f"{arm}_reason"] = [j.verdict.reason for j in judged]
        columns[f"{arm}_truncated"] = [j.rollout.is_truncated for j in judged]
        columns[f"{arm}_looped"] = [find_loop(j.rollout.completion) is not None for j in judged]
        columns[f"{arm}_length"] = [len(j.rollout.completion_ids) for j in judged]
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
            left_out, row.trained.name, n, *_cells(row.trained),
            f"{value:+.1%} ({low:+.1%} to {high:+.1%})", p, changed,
        )  # fmt: skip
    return table


def _cells(arm: Arm) -> tuple[str, ...]:
    right = arm.right
    return (
        f"{right.value:.1%}", f"{right.low:.1%} to {right.high:.1%}", f"{arm.truncated:.0%}",
        f"{arm.looped:.0%}", f"{arm.mean_length:.1f}",
    )  # fmt: skip
