"""What a report says of a run, read from its folder; an unfinished one is read as far as it got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from operando.doctor.doctor import diagnose_folder, last_step
from operando.doctor.findings import Finding, Row, always_under_clip, held_out_counts, series
from operando.errors import UserError
from operando.files import read_object, read_text
from operando.recipe.run import Recipe
from operando.run_folder import read_manifest, read_recipe, read_rows, step_of
from operando.stats.intervals import Interval, PairedDifference, paired_difference, wilson
from operando.tables import read_parquet
from operando.text import shown

GAP_LIMIT = 0.02  # nats per token; float32 and matching kernels stay under 0.001
ESS_LIMIT = 0.9


@dataclass(frozen=True)
class Answer:
    """A held-out completion with its verdict."""

    example_id: str
    question: str
    completion: str
    answer: str
    correct: bool
    reason: str


@dataclass(frozen=True)
class Score:
    """Held-out accuracy at one step. Example: Score(60, 150, 300, Interval(0.5, 0.44, 0.56))"""

    step: int
    correct: int
    n: int
    accuracy: Interval


@dataclass(frozen=True)
class Change:
    """One problem whose verdict changed."""

    before: Answer
    after: Answer


@dataclass(frozen=True)
class HeldOut:
    """The held-out problems at the first and at the last evaluation.

    `paired` is None if there is one evaluation, or no file of answers for both.
    """

    before: Score | None
    after: Score | None
    paired: PairedDifference | None
    gained: Sequence[Change]
    lost: Sequence[Change]


@dataclass(frozen=True)
class RunTables:
    """Everything the page shows of one run, except its samples."""

    folder: Path
    label: str
    recipe: Recipe
    recipe_text: str
    manifest: Mapping[str, object]
    rows: Sequence[Row]
    finished: bool
    last_step: int
    held_out: HeldOut
    findings: Sequence[Finding]
    cautions: Sequence[str]
    warnings: Sequence[str]


def collect(folder: Path) -> RunTables:
    """Return the tables of one run folder."""
    recipe = read_recipe(folder)
    rows = read_rows(folder)
    manifest = read_manifest(folder)
    results = _read_results(folder)
    warnings = manifest["warnings"]
    assert isinstance(warnings, list)  # read_manifest looked
    at = last_step(rows)
    return RunTables(
        folder=folder,
        label=recipe.name,
        recipe=recipe,
        recipe_text=read_text(folder / "recipe.toml"),
        manifest=manifest,
        rows=rows,
        finished=results is not None,
        last_step=at,
        held_out=read_held_out(folder, rows),
        findings=diagnose_folder(folder, rows, recipe),
        cautions=_cautions(recipe, rows, at, finished=results is not None),
        warnings=[str(w) for w in warnings],
    )


def collect_all(folders: Sequence[Path]) -> list[RunTables]:
    """Return the tables of several runs; runs of one name are told apart by their folders."""
    if not folders:
        raise UserError("no run folder was given: operando report RUN [RUN ...]")
    repeated = {str(f) for f in folders if list(folders).count(f) > 1}
    if repeated:
        raise UserError(f"given twice: {', '.join(sorted(repeated))}")
    runs = [collect(folder) for folder in folders]
    names = [run.label for run in runs]
    return [
        replace(run, label=str(run.folder)) if names.count(run.label) > 1 else run for run in runs
    ]


def _read_results(folder: Path) -> Mapping[str, object] | None:
    file = folder / "results.json"
    if not file.is_file():
        return None
    return read_object(file)


def step_files(folder: Path, pattern: str, ending: str = ".parquet") -> dict[int, Path]:
    """Return the files `<pattern>_00020<ending>` by step, in order."""
    named = [(step_of(file), file) for file in folder.glob(f"{pattern}_*{ending}")]
    files = {step: file for step, file in named if step is not None}
    return dict(sorted(files.items()))


def read_held_out(folder: Path, rows: Sequence[Row], step: int | None = None) -> HeldOut:
    """Return the first evaluation beside that of `step` (None: the last one)."""
    files = step_files(folder / "evals", "held_out_step")
    scores = {s: Score(s, *count, wilson(*count)) for s, count in held_out_counts(rows).items()}
    steps = sorted({s for s in {*files, *scores} if step is None or s <= step})
    if not steps:
        return HeldOut(None, None, None, (), ())
    first, last = steps[0], steps[-1]
    answers = {s: _read_answers(files[s]) for s in {first, last} if s in files}
    before, after = (
        score_marks(s, [a.correct for a in answers[s]]) if s in answers else scores[s]
        for s in (first, last)
    )
    if first == last:
        return HeldOut(before, None, None, (), ())
    if len(answers) < 2:
        return HeldOut(before, after, None, (), ())
    old = {a.example_id: a for a in answers[first]}
    pairs = [Change(old[a.example_id], a) for a in answers[last] if a.example_id in old]
    if not pairs:
        return HeldOut(before, after, None, (), ())
    paired = paired_difference([p.before.correct for p in pairs], [p.after.correct for p in pairs])
    gained = [p for p in pairs if p.after.correct and not p.before.correct]
    lost = [p for p in pairs if p.before.correct and not p.after.correct]
    return HeldOut(before, after, paired, gained, lost)


def score_marks(step: int, marks: Sequence[bool]) -> Score:
    """Return the score of one verdict per problem."""
    return Score(step, sum(marks), len(marks), wilson(sum(marks), len(marks)))


def _read_answers(file: Path) -> list[Answer]:
    columns = ["example_id", "question", "completion", "answer", "correct", "reason"]
    return [
        Answer(
            example_id=row["example_id"],
            question=shown(row["question"]),
            completion=shown(row["completion"]),
            answer=shown(row["answer"]),
            correct=row["correct"],
            reason=shown(row["reason"]),
        )
        for row in read_parquet(file, columns=columns).to_pylist()
    ]


def _cautions(recipe: Recipe, rows: Sequence[Row], last_step: int, *, finished: bool) -> list[str]:
    """Return what a reader must know before believing the numbers."""
    found = []
    if not finished:
        found.append(
            f"Unfinished at step {last_step} of {recipe.steps}: the run was stopped or is still "
            "going on. Every number is as of then."
        )
    found.append(
        f"One seed ({recipe.seed}). The intervals cover the choice of problems, not the luck of "
        "training; repeat with other seeds before you claim a difference."
    )
    limit = recipe.optim.max_grad_norm
    if always_under_clip(rows, limit):
        largest = max(p.value for p in series(rows, "grad_norm"))
        found.append(
            f"The gradient never reached the clip (largest norm {largest:.3g}, clip {limit:g}): "
            "the learning rate alone set the size of the steps."
        )
    gap = [p.value for p in series(rows, "sampler/gap_mean")]
    ess = [p.value for p in series(rows, "sampler/ess")]
    if gap and fmean(gap) > GAP_LIMIT or ess and fmean(ess) < ESS_LIMIT:
        share = f", effective sample size {fmean(ess):.0%}" if ess else ""
        found.append(
            f"Sampler and trainer disagree: {fmean(gap) if gap else 0:.3f} nats per token on "
            f"average (limit {GAP_LIMIT}){share}. The ratios start away from 1; use float32 or "
            'update.sampler_correction = "token".'
        )
    dropped = [p.value for p in series(rows, "discarded")]
    if dropped and fmean(dropped) > 0.5:
        found.append(f"{fmean(dropped):.0%} of the rollouts were discarded: paid for, not used.")
    return found
