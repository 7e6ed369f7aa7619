"""Rollouts chosen for the page, their per-token channels packed into bytes.

A value v of a channel is stored as one signed byte: q = round(127 sign(v) sqrt(|v| / scale)), with
one scale = max |v| for a channel on the whole page. The square root keeps small values apart beside
a large outlier; the viewer undoes it: v = sign(q) scale (q / 127)^2. The byte -128 means "none".
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict, cast

import numpy as np

from operando.report.collect import step_files
from operando.tables import read_parquet
from operando.text import one_line, shown

MAX_TOKENS = 60_000  # of the whole page; about 12 bytes each
MISSING = -128


@dataclass(frozen=True)
class Channel:
    """A per-token number that the viewer can show."""

    key: str
    label: str
    meaning: str


CHANNELS = (
    Channel("advantage", "advantage", "how much this token's probability is pushed up or down"),
    Channel("reward", "reward", "what is rewarded at this token"),
    Channel(
        "logp_change",
        "log-prob change",
        "log-prob under the policy minus under the reference: its share of the KL",
    ),
    Channel("entropy", "entropy", "nats of choice the policy had at this token"),
    Channel("sampling_logp", "log-prob", "log-prob with which this token was sampled"),
)


class RolloutRow(TypedDict):
    """A row of rollouts/*.parquet; the columns `rewards/<part>` come beside these."""

    step: int
    group: int
    sample: int
    prompt: str
    completion: str
    answer: str
    correct: bool
    reason: str
    is_truncated: bool
    discarded: bool
    reward: float | None
    advantage: float
    tokens: list[str]
    sampling_logp: list[float]
    old_logp: list[float]
    ref_logp: list[float] | None
    advantage_tokens: list[float]
    reward_tokens: list[float]
    entropy: list[float]


class Paid(NamedTuple):
    """The numbers of one rollout by which extremes are chosen."""

    step: int
    group: int
    sample: int
    reward: float | None
    correct: bool
    advantage: float


@dataclass(frozen=True)
class Sample:
    """One rollout of a group, with the channels that were recorded."""

    sample: int
    completion: str
    correct: bool
    reason: str
    is_truncated: bool
    discarded: bool
    reward: float | None  # None: no reward part was applicable
    parts: Mapping[str, float]  # the applicable ones
    advantage: float
    tokens: Sequence[str]
    channels: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Siblings:
    """The rollouts of one problem at one step."""

    step: int
    group: int
    prompt: str
    answer: str
    note: str
    samples: Sequence[Sample]

    def num_tokens(self) -> int:
        return sum(len(s.tokens) for s in self.samples)


@dataclass(frozen=True)
class SampleSet:
    """Groups shown together. Example: SampleSet("step 60, the last recorded", groups, of=32)"""

    label: str
    groups: Sequence[Siblings]
    of: int


def choose_samples(folder: Path, budget: int = MAX_TOKENS) -> list[SampleSet]:
    """Return the last recorded step, the first one, and the extremes of all, within a budget."""
    files = step_files(folder / "rollouts", "step")
    if not files:
        return []
    steps = list(files)
    last = _first_groups(files[steps[-1]], budget // 2)
    sets = [SampleSet(f"step {steps[-1]}, the last recorded", *last)]
    if len(steps) > 1:
        first = _first_groups(files[steps[0]], budget // 4)
        sets.append(SampleSet(f"step {steps[0]}, the first recorded", *first))
    extremes = _fit(_extremes(files), budget // 4)
    if extremes:
        sets.append(SampleSet("extremes of all recorded steps", extremes, len(extremes)))
    return sets


def _first_groups(file: Path, budget: int) -> tuple[list[Siblings], int]:
    groups = _read_groups(file)
    return _fit(groups, budget), len(groups)


def _fit(groups: Sequence[Siblings], budget: int) -> list[Siblings]:
    """Return as many groups from the front as the budget of tokens allows, at least one."""
    kept: list[Siblings] = []
    for group in groups:
        budget -= group.num_tokens()
        if kept and budget < 0:
            break
        kept.append(group)
    return kept


def _extremes(files: Mapping[int, Path]) -> list[Siblings]:
    """Return the groups of the best rewarded wrong and worst rewarded right, and the extremes."""
    table = [row for file in files.values() for row in _scalars(file)]
    paid = [(row.reward, row) for row in table if row.reward is not None]
    wrong = [pair for pair in paid if not pair[1].correct]
    right = [pair for pair in paid if pair[1].correct]
    picks: list[tuple[Paid, str]] = []
    if wrong:
        picks.append((max(wrong, key=lambda pair: pair[0])[1], "highest reward judged wrong"))
    if right:
        picks.append((min(right, key=lambda pair: pair[0])[1], "lowest reward judged right"))
    if table:
        picks.append((max(table, key=lambda row: row.advantage), "highest advantage"))
        picks.append((min(table, key=lambda row: row.advantage), "lowest advantage"))
    notes: dict[tuple[int, int], list[str]] = defaultdict(list)
    for row, why in picks:
        notes[row.step, row.group].append(f"sample {row.sample}: {why}")
    return [
        group
        for (step, number), words in notes.items()
        for group in _read_groups(files[step], only=number, note="; ".join(words))
    ]


def _scalars(file: Path) -> list[Paid]:
    table = read_parquet(file, columns=list(Paid._fields))
    return [Paid(**row) for row in table.to_pylist()]


def _read_groups(file: Path, only: int | None = None, note: str = "") -> list[Siblings]:
    table = read_parquet(file, only=None if only is None else [("group", "=", only)])
    groups: dict[int, list[RolloutRow]] = defaultdict(list)
    for row in cast("list[RolloutRow]", table.to_pylist()):
        groups[row["group"]].append(row)
    return [
        Siblings(
            step=siblings[0]["step"],
            group=number,
            prompt=shown(siblings[0]["prompt"]),
            answer=shown(siblings[0]["answer"]),
            note=note,
            samples=[_sample(row) for row in sorted(siblings, key=lambda r: r["sample"])],
        )
        for number, siblings in sorted(groups.items())
    ]


def _sample(row: RolloutRow) -> Sample:
    channels = {
        "advantage": row["advantage_tokens"],
        "reward": row["reward_tokens"],
        "entropy": row["entropy"],
        "sampling_logp": row["sampling_logp"],
    }
    if row["ref_logp"] is not None:
        pairs = zip(row["old_logp"], row["ref_logp"], strict=True)
        channels["logp_change"] = [old - ref for old, ref in pairs]
    num = len(row["tokens"])
    for key, values in channels.items():
        assert len(values) == num, f"{key}: {len(values)} values for {num} tokens"
    return Sample(
        sample=row["sample"],
        completion=shown(row["completion"]),
        correct=row["correct"],
        reason=one_line(row["reason"]),
        is_truncated=row["is_truncated"],
        discarded=row["discarded"],
        reward=row["reward"],
        parts={
            key.removeprefix("rewards/"): value
            for key, value in row.items()
            if key.startswith("rewards/") and isinstance(value, float)
        },
        advantage=row["advantage"],
        tokens=[shown(token) for token in row["tokens"]],
        channels=channels,
    )


def quantise(values: Sequence[float], scale: float) -> np.ndarray:
    """Return one signed byte a value; NaN becomes MISSING."""
    v = np.asarray(values, dtype=np.float64)
    root = np.sqrt(np.minimum(np.abs(v) / scale, 1.0)) if scale > 0 else np.zeros_like(v)
    q = np.round(127 * np.sign(v) * root)
    return np.where(np.isnan(v), MISSING, np.nan_to_num(q)).astype(np.int8)


def scale_of(values: Sequence[Sequence[float]]) -> float:
    """Return the largest magnitude: one end of a symmetric scale."""
    finite = [abs(v) for row in values for v in row if v == v]
    return float(f"{max(finite):.4g}") if finite and max(finite) > 0 else 0.0


def pack(sets_of_runs: Mapping[str, Sequence[SampleSet]]) -> dict[str, object]:
    """Return what viewer.js reads: text as text, channels as base64, one scale each."""
    samples = [
        sample
        for sets in sets_of_runs.values()
        for one in sets
        for group in one.groups
        for sample in group.samples
    ]
    present = [c for c in CHANNELS if any(c.key in s.channels for s in samples)]
    scales = {
        c.key: scale_of([s.channels[c.key] for s in samples if c.key in s.channels])
        for c in present
    }
    return {
        "channels": [
            {"key": c.key, "label": c.label, "meaning": c.meaning, "scale": scales[c.key]}
            for c in present
        ],
        "runs": [
            {"name": name, "sets": [_pack_set(one, scales) for one in sets]}
            for name, sets in sets_of_runs.items()
        ],
    }


def _pack_set(one: SampleSet, scales: Mapping[str, float]) -> dict[str, object]:
    return {
        "label": one.label,
        "of": one.of,
        "groups": [
            {
                "step": g.step,
                "group": g.group,
                "prompt": g.prompt,
                "answer": g.answer,
                "note": g.note,
                "samples": [_pack_sample(s, scales) for s in g.samples],
            }
            for g in one.groups
        ],
    }


def _pack_sample(s: Sample, scales: Mapping[str, float]) -> dict[str, object]:
    """Channels stand one after the other in the order of `scales`; an absent one is MISSING."""
    num = len(s.tokens)
    absent = [float("nan")] * num
    data = b"".join(quantise(s.channels.get(k, absent), v).tobytes() for k, v in scales.items())
    return {
        "sample": s.sample,
        "correct": s.correct,
        "reason": s.reason,
        "truncated": s.is_truncated,
        "discarded": s.discarded,
        "reward": s.reward,
        "parts": dict(s.parts),
        "advantage": s.advantage,
        "tokens": list(s.tokens),
        "data": base64.b64encode(data).decode("ascii"),
    }
