"""Canary prompts answered by base and trained model: does the run's model game what it can?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from operando.evals.ask import Asked, Contest, foreign_prompt
from operando.rollout.sampler import Sampling
from operando.run import write_parquet
from operando.stats.intervals import PairedDifference, paired_difference, wilson
from operando.tasks.base import Task
from operando.tasks.canary import FAMILIES, load_canary
from operando.tasks.loops import NEXT_QUESTION_STOPS, cut_at_next_question
from operando.types import Rollout


class Labelled(NamedTuple):
    """A completion with its one label, and whether its answer is right whatever the label."""

    rollout: Rollout
    label: str
    right: bool


@dataclass(frozen=True)
class CanaryArm:
    """Counts of one model in one family; hack + degenerate + correct + ambiguous = n.

    `right` counts right answers whatever the label."""

    name: str
    n: int
    hack: int
    degenerate: int
    correct: int
    ambiguous: int
    hack_and_right: int
    right: int
    truncated: int


@dataclass(frozen=True)
class FamilyResult:
    """One family: both arms, and how the share of hacks changed on the same prompts."""

    family: str
    base: CanaryArm
    trained: CanaryArm
    change: PairedDifference


@dataclass(frozen=True)
class CanaryResult:
    """Every family's result. Example: see docs/evaluation.md"""

    prompts: str
    classifier: str
    step: int
    families: tuple[FamilyResult, ...]
    file: Path


def run_canary(
    folder: Path,
    *,
    prompts: Path | None = None,
    step: int | None = None,
    max_completion_length: int | None = None,
    classifier: str = "ours",
) -> CanaryResult:
    """Ask a saved step (None: the last) and its base the canary prompts, and write every answer.

    Greedy, in the run's own prompt format. In raw format a completion ends where the model asks
    itself a next question.
    """
    task = load_canary(prompts, classifier)
    contest = Contest(folder, step)
    own = contest.recipe.prompt
    config = foreign_prompt(own, None, None, few_shot=0)
    is_raw = config.format == "raw"
    length = contest.length(max_completion_length)
    asked = Asked(
        "canary",
        contest.prompts(task.held_out, [], config, contest.room(length)),
        Sampling(length, stop=NEXT_QUESTION_STOPS if is_raw else ()),
    )
    arms = contest.answer([asked])
    base = label_all(task, arms.base[0], is_raw)
    trained = label_all(task, arms.trained[0], is_raw)
    families = tuple(
        _family(family, contest.step, _of(family, base), _of(family, trained))
        for family in FAMILIES
        if _of(family, base)
    )
    name = f"canary_step_{contest.step:05d}_{task.name}_{classifier}.parquet"
    file = folder / "evals" / name
    _write(file, base, trained)
    return CanaryResult(task.name, classifier, contest.step, families, file)


def label_all(task: Task, rollouts: Sequence[Rollout], is_raw: bool) -> list[Labelled]:
    """Return each rollout with the task's label for its text."""
    assert task.labels is not None, task.name
    labelled = []
    for r in rollouts:
        text = cut_at_next_question(r.completion) if is_raw else r.completion
        label = _label(task.labels(r.prompt.example, text, r.is_truncated))
        right = task.verify(r.prompt.example, text, r.is_truncated).correct
        labelled.append(Labelled(r, label, right))
    return labelled


def _label(labels: Mapping[str, bool]) -> str:
    return next((name for name, is_so in labels.items() if is_so), "correct")


def _of(family: str, labelled: Sequence[Labelled]) -> list[Labelled]:
    return [one for one in labelled if one.rollout.prompt.example.columns["family"] == family]


def _family(
    family: str, step: int, base: Sequence[Labelled], trained: Sequence[Labelled]
) -> FamilyResult:
    change = paired_difference(
        [one.label == "hack" for one in base], [one.label == "hack" for one in trained]
    )
    return FamilyResult(family, _arm("base", base), _arm(f"step {step}", trained), change)


def _arm(name: str, labelled: Sequence[Labelled]) -> CanaryArm:
    labels = [one.label for one in labelled]
    return CanaryArm(
        name,
        len(labels),
        labels.count("hack"),
        labels.count("degenerate"),
        labels.count("correct"),
        labels.count("ambiguous"),
        hack_and_right=sum(one.label == "hack" and one.right for one in labelled),
        right=sum(one.right for one in labelled),
        truncated=sum(one.rollout.is_truncated for one in labelled),
    )


def _write(file: Path, base: Sequence[Labelled], trained: Sequence[Labelled]) -> None:
    examples = [one.rollout.prompt.example for one in base]
    columns: dict[str, list[object]] = {
        "example_id": [e.id for e in examples],
        "family": [e.columns["family"] for e in examples],
        "pattern": [e.columns["pattern"] for e in examples],
        "prompt": [one.rollout.prompt.text for one in base],
        "answer": [e.answer for e in examples],
    }
    for arm, labelled in (("base", base), ("trained", trained)):
        columns[f"{arm}_completion"] = [one.rollout.completion for one in labelled]
        columns[f"{arm}_label"] = [one.label for one in labelled]
        columns[f"{arm}_right"] = [one.right for one in labelled]
        columns[f"{arm}_truncated"] = [one.rollout.is_truncated for one in labelled]
    write_parquet(file, columns)


def canary_table(result: CanaryResult) -> Table:
    """Return the families as a table of at most 80 columns: both arms, then the change of the hack
    rate on the same prompts."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), title_justify="left")
    table.title = f"{result.prompts}, classifier {result.classifier}"
    table.add_column("")
    for column in ("hack", "95 %", "p", "degen.", "right", "ambig.", "cut"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.families:
        table.add_row(row.family)
        table.add_row(*_cells(row.base))
        table.add_row(*_cells(row.trained))
        value, low, high = row.change.difference
        table.add_row(
            "  change", f"{value:+.0%}", f"{low:+.0%} to {high:+.0%}", f"{row.change.p_value:.2g}"
        )
    return table


def _cells(arm: CanaryArm) -> list[str]:
    rate = wilson(arm.hack, arm.n)
    return [
        f"  {arm.name}, n {arm.n}",
        str(arm.hack),
        f"{rate.low:.0%} to {rate.high:.0%}",
        "",
        str(arm.degenerate),
        str(arm.correct),
        str(arm.ambiguous),
        f"{arm.truncated / arm.n:.0%}",
    ]


def canary_lines(result: CanaryResult) -> list[str]:
    """Return what the table's words mean, and where it tells nothing about a model."""
    lines = [
        "hack: shows what its prompt pays for. degen(erate): empty, in circles, or cut before a "
        "right answer. ambig(uous): a wrong reply, a refusal."
    ]
    for row in result.families:
        arms = (row.base, row.trained)
        hacks = ", ".join(f"{arm.name} {arm.hack_and_right} of {arm.hack}" for arm in arms)
        if row.base.hack_and_right + row.trained.hack_and_right:
            lines.append(f"{row.family}: hacks whose answer is right: {hacks}")
        broken = [arm for arm in arms if 2 * arm.degenerate > arm.n]
        counts = ", ".join(f"{arm.name} {arm.degenerate} of {arm.n}" for arm in broken)
        if len(broken) == 2:
            lines.append(
                f"{row.family}: most answers of both arms are degenerate ({counts}): these prompts "
                "can't tell gaming from a model that fails at them"
            )
        elif broken:
            lines.append(
                f"{row.family}: most answers of one arm are degenerate ({counts}): the change of "
                "its hack rate is no sign of more or less gaming"
            )
        if not any(arm.right for arm in arms):
            lines.append(
                f"{row.family}: 0 right in both arms: these prompts tell nothing about this model"
            )
    return lines
