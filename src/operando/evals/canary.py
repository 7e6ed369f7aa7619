"""Canary prompts answered by base and trained model: does the run's model game what it can?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from operando.errors import UserError
from operando.evals.ask import Answer, Question, answer_columns, ask, checkpoints, open_each
from operando.evals.questions import task_prompt
from operando.run import write_parquet
from operando.run_folder import read_recipe, start_of
from operando.stats.intervals import PairedDifference, paired_difference, wilson
from operando.tables import TextTable, limits, table
from operando.tasks.canary import FAMILIES, load_canary


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
    recipe = read_recipe(folder)
    models = checkpoints(folder, step)
    at = models[-1].step
    length = max_completion_length or recipe.eval.max_completion_length
    prompt = task_prompt(task.text, recipe, None, few_shot=0)
    question = Question(
        "canary",
        task,
        task.held_out,
        prompt,
        max_completion_length=length or recipe.rollout.max_completion_length,
        is_cut=prompt.format == "raw",
    )
    day = start_of(folder)
    base, trained = (ask(model, question, day) for model in open_each(models))
    if len(base) < len(task.held_out):
        raise UserError(
            f"{len(task.held_out) - len(base)} canary prompts leave no room for "
            f"{question.max_completion_length} tokens in the model's context: lower "
            "--max-completion-length"
        )
    families = tuple(
        _family(family, at, _of(family, base), _of(family, trained))
        for family in FAMILIES
        if _of(family, base)
    )
    file = folder / "evals" / f"canary_step_{at:05d}_{task.name}_{classifier}.parquet"
    _write(file, {"base": base, models[-1].name: trained})
    return CanaryResult(task.name, classifier, at, families, file)


def label_of(answer: Answer) -> str:
    """Return the one label of an answer."""
    return next((name for name, is_so in answer.labels.items() if is_so), "correct")


def _of(family: str, answers: Sequence[Answer]) -> list[Answer]:
    return [one for one in answers if one.example.columns["family"] == family]


def _family(
    family: str, step: int, base: Sequence[Answer], trained: Sequence[Answer]
) -> FamilyResult:
    change = paired_difference(
        [label_of(one) == "hack" for one in base], [label_of(one) == "hack" for one in trained]
    )
    return FamilyResult(family, _arm("base", base), _arm(f"step {step}", trained), change)


def _arm(name: str, answers: Sequence[Answer]) -> CanaryArm:
    labels = [label_of(one) for one in answers]
    return CanaryArm(
        name,
        len(labels),
        labels.count("hack"),
        labels.count("degenerate"),
        labels.count("correct"),
        labels.count("ambiguous"),
        hack_and_right=sum(label_of(one) == "hack" and one.verdict.correct for one in answers),
        right=sum(one.verdict.correct for one in answers),
        truncated=sum(one.rollout.is_truncated for one in answers),
    )


def _write(file: Path, answers: Mapping[str, Sequence[Answer]]) -> None:
    columns = answer_columns({("canary", model): some for model, some in answers.items()})
    every = [one for some in answers.values() for one in some]
    for name in ("family", "pattern"):
        columns[name] = [one.example.columns[name] for one in every]
    columns["label"] = [label_of(one) for one in every]
    write_parquet(file, columns)


def canary_table(result: CanaryResult) -> TextTable:
    """Return the families as a table: both arms, then the change of the hack rate on the same
    prompts."""
    rows: list[Sequence[str]] = []
    for row in result.families:
        change = row.change.difference
        rows += [[row.family], _cells(row.base), _cells(row.trained)]
        moved = (f"{change.value:+.0%}", limits(change, "+.0%"), f"{row.change.p_value:.2g}")
        rows.append(("  change", *moved))
    heads = ("", "hack", "95 %", "p", "degen.", "right", "ambig.", "cut")
    return table(f"{result.prompts}, classifier {result.classifier}", heads, rows)


def _cells(arm: CanaryArm) -> list[str]:
    return [
        f"  {arm.name}, n {arm.n}",
        str(arm.hack),
        limits(wilson(arm.hack, arm.n), ".0%"),
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
