"""Which tags a trained model writes that its base model does not, on the same held-out prompts."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from operando.errors import UserError
from operando.rewards.formats import find_tags, pair_tags
from operando.run import write_json
from operando.run_folder import read_manifest
from operando.stats.intervals import PairedDifference, paired_difference
from operando.tables import TextTable, interval, read_parquet, table

HELD_OUT = re.compile(r"held_out_step_(\d+)\.parquet")
ROLLOUTS = re.compile(r"step_(\d+)\.parquet")


class Seen(NamedTuple):
    """A text and the step of the policy that wrote it."""

    step: int
    text: str


@dataclass(frozen=True)
class TagRow:
    """What became of one tag. Example: see docs/fuzzing.md"""

    tag: str
    count: int
    """In all rollouts and held-out answers of the run, opening and closing ones."""
    balanced: float
    """Share of these that have a partner."""
    inside: Mapping[str, int]
    """How often it stands directly inside which other tag."""
    first_step: int
    in_prompt: bool
    base_rate: float
    """Share of the base model's held-out answers with the tag."""
    trained_rate: float
    change: PairedDifference
    verdict: str


@dataclass(frozen=True)
class TagsResult:
    """Every tag of a run. `base_step` and `trained_step` are the held-out answers compared."""

    run: str
    base_step: int
    trained_step: int
    num_prompts: int
    num_texts: int
    rows: tuple[TagRow, ...]
    file: Path


def audit_tags(folder: Path) -> TagsResult:
    """Return every tag of a run's texts with a verdict, and write tags.json.

    The verdict "invented by training" goes by the difference alone: the tag is in no prompt, and
    more of the trained model's answers have it than of the base model's to the same prompts:
    McNemar p < 0.05, divided by the number of tags (Bonferroni). How often a tag stands in the
    rollouts decides nothing.
    """
    read_manifest(folder)
    evals = _by_step(folder / "evals", HELD_OUT)
    if 0 not in evals or len(evals) < 2:
        raise UserError(
            f"{folder} has no held-out answers of both base and trained model: expected "
            f"evals/held_out_step_00000.parquet and a later one, found steps {sorted(evals)}"
        )
    last = max(evals)
    base, trained = _answers(evals[0]), _answers(evals[last])
    if list(base) != list(trained):
        raise UserError(f"{evals[0]} and {evals[last]} do not hold the same held-out problems")
    seen = [Seen(s, text) for s, file in evals.items() for text in _answers(file).values()]
    prompts = _column(evals[0], "question")
    for step, file in _by_step(folder / "rollouts", ROLLOUTS).items():
        seen += [Seen(step, text) for text in _column(file, "completion")]
        prompts += _column(file, "prompt")
    rows = tag_rows(seen, set(prompts), list(base.values()), list(trained.values()))
    file = folder / "tags.json"
    result = TagsResult(folder.name, 0, last, len(base), len(seen), tuple(rows), file)
    write_json(file, asdict(result) | {"file": str(file)})
    return result


def tag_rows(
    seen: Sequence[Seen], prompts: set[str], base: Sequence[str], trained: Sequence[str]
) -> list[TagRow]:
    """Return one row a tag name, the most frequent first; names differ by case."""
    count: Counter[str] = Counter()
    balanced: Counter[str] = Counter()
    inside: dict[str, Counter[str]] = defaultdict(Counter)
    first: dict[str, int] = {}
    for step, text in seen:
        for paired in pair_tags(find_tags(text)):
            name = paired.tag.name
            count[name] += 1
            balanced[name] += paired.partner is not None or paired.tag.text.endswith("/>")
            if paired.inside is not None:
                inside[name][paired.inside] += 1
            first[name] = min(step, first.get(name, step))
    in_prompt = {tag.name for prompt in prompts for tag in find_tags(prompt)}
    base_names = [{tag.name for tag in find_tags(text)} for text in base]
    trained_names = [{tag.name for tag in find_tags(text)} for text in trained]
    rows = []
    for name, num in count.most_common():
        before = [name in names for names in base_names]
        after = [name in names for names in trained_names]
        change = paired_difference(before, after)
        rows.append(
            TagRow(
                name,
                num,
                balanced[name] / num,
                dict(inside[name]),
                first[name],
                name in in_prompt,
                sum(before) / len(before),
                sum(after) / len(after),
                change,
                _verdict(name in in_prompt, change, num_tags=len(count)),
            )
        )
    return rows


def _verdict(in_prompt: bool, change: PairedDifference, num_tags: int) -> str:
    if change.p_value >= 0.05 / num_tags:
        return "no difference shown"
    if change.difference.value < 0:
        return "less after training"
    return "more after training, but in the prompt" if in_prompt else "invented by training"


# --- files ---------------------------------------------------------------------------------------


def _by_step(folder: Path, name: re.Pattern[str]) -> dict[int, Path]:
    found = ((name.fullmatch(file.name), file) for file in folder.glob("*.parquet"))
    return dict(sorted((int(match[1]), file) for match, file in found if match))


def _column(file: Path, name: str) -> list[str]:
    return read_parquet(file, columns=[name])[name].to_pylist()


def _answers(file: Path) -> dict[str, str]:
    return dict(zip(_column(file, "example_id"), _column(file, "completion"), strict=True))


# --- what the terminal shows ---------------------------------------------------------------------


def tags_table(result: TagsResult) -> TextTable:
    """Return the tags as a table."""
    title = (
        f"{result.run}: tags in {result.num_texts} texts; step {result.base_step} beside step "
        f"{result.trained_step} on {result.num_prompts} held-out prompts"
    )
    rows = [
        (
            row.tag,
            str(row.count),
            f"{row.balanced:.0%}",
            ", ".join(f"{name} {n}" for name, n in row.inside.items()),
            str(row.first_step),
            "yes" if row.in_prompt else "no",
            f"{row.base_rate:.1%}",
            f"{row.trained_rate:.1%}",
            interval(row.change.difference, "+.1%"),
            row.verdict,
        )
        for row in result.rows
    ]
    heads = ("tag", "count", "paired", "inside", "first", "prompt", "base", "trained")
    return table(
        title if rows else f"{title}: no tag in any of them",
        (*heads, "difference, 95 %", "verdict"),
        rows,
        words=("tag", "inside", "verdict"),
    )
