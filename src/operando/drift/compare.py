"""Three runs side by side: is a drift structural, or does it go with the reward or with the KL?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from operando.drift.chain import ARMS, Arm, load_chain, trained_seeds, trained_sites
from operando.drift.transitions import MEASURES, Measure, cosines, numbers
from operando.errors import UserError
from operando.recipe.run import Recipe
from operando.run import write_json
from operando.run_folder import read_recipe
from operando.stats.null_arms import Intervals, Verdict, classify
from operando.tables import TextTable, interval, table

Cell = tuple[str, int, int]
Limits = tuple[float, float, float]  # value, low, high
Moved = Mapping[Arm, Mapping[Measure, Tensor]]  # [R, cells]

# Where a run is kept, how long it goes on and what is looked at do not change what training does.
NO_DIFFERENCE = {
    "name",
    "runs_dir",
    "seed",
    "steps",
    "eval",
    "checkpoint",
    "discover",
    "direction",
    "tracking",
    "parallel",
}
REWARD = {"rewards", "stages", "shift"}


@dataclass(frozen=True)
class CompareRow:
    """One measure of one transition in three runs; all but the head is None where the measure is
    undefined in a chain.

    `excess` is real minus null of A, B and C; `reward_effect` is B - A, `kl_effect` C - A, each
    with 95 % limits over seeds. The q's are of each kind of claim apart; see nulls.py:classify.
    """

    site: str
    from_step: int
    to_step: int
    measure: Measure
    verdict: Verdict | None = None
    q_structural: float | None = None
    q_reward: float | None = None
    q_kl: float | None = None
    excess: tuple[Limits, ...] = ()
    reward_effect: Limits | None = None
    kl_effect: Limits | None = None


def compare_drift(console: Console, runs: Sequence[Path]) -> Path:
    """Say of each transition and measure whether its drift is structural, reward-driven or
    KL-driven, if one can.

    The runs are in this order: flexible reward, strict reward, flexible reward with more KL; their
    recipes must say so. Only transitions that all three have, between the same steps, are compared.
    """
    if len(runs) != 3:
        raise UserError(f"drift compare: expected three runs (A, B, KL), given {len(runs)}")
    others = check_conditions(runs)
    sites = set.intersection(*(set(trained_sites(run)) for run in runs))
    if not sites:
        raise UserError(f"{', '.join(map(str, runs))} have no site in common with SAE chains")
    cells, moved = _moved(runs, sorted(sites))
    by_measure = [_classified(cells, moved, measure, runs) for measure in MEASURES]
    rows = [row for of_cell in zip(*by_measure, strict=True) for row in of_cell]
    console.print(_table(rows))
    console.print(
        "excess: real minus null arm, A, B and C. B - A is what the reward changes, C - A what the "
        "KL changes, with 95 % intervals over seeds.",
        highlight=False,
    )
    for line in others:
        console.print(line, highlight=False, markup=False)
    file = runs[0] / "drift" / "compare.json"
    value = {
        "runs": [str(run) for run in runs],
        "also_differ": others,
        "cells": [asdict(r) for r in rows],
    }
    write_json(file, value)
    return file


def check_conditions(runs: Sequence[Path]) -> list[str]:
    """Return what differs besides reward and KL; it is an error if B is no other reward than A, C
    no other KL, or if either differs in both."""
    places = [run.resolve() for run in runs]
    for i in range(3):
        if places[i] in places[:i]:
            raise UserError(
                f"drift compare: {runs[i]} is given twice. A run beside itself says nothing; give "
                f"flexible reward, strict reward, flexible reward with more KL"
            )
    A, B, C = (read_recipe(run) for run in runs)
    problems = []
    reward_B, reward_C = _reward(B) != _reward(A), _reward(C) != _reward(A)
    kl_B, kl_C = A.kl != B.kl, A.kl != C.kl
    if not reward_B:
        problems.append(f"{runs[1]} (B) is rewarded as {runs[0]} (A): rewards must differ")
    if not kl_C:
        problems.append(f"{runs[2]} (C) has the [kl] of {runs[0]} (A): kl must differ")
    if kl_B:
        problems.append(f"{runs[1]} (B) differs from {runs[0]} (A) in kl too: only in the reward")
    if reward_C:
        problems.append(
            f"{runs[2]} (C) is rewarded otherwise than {runs[0]} (A): only kl may differ"
        )
    where = {"device": A.model.device, "gradient_checkpointing": A.model.gradient_checkpointing}
    if any(run.model.model_copy(update=where) != A.model for run in (B, C)):
        problems.append("the three runs must train the same [model] in the same way")
    if problems:
        order = "expected flexible reward, strict reward, flexible reward with more KL"
        raise UserError(f"drift compare: {'; '.join(problems)}. {order}, in this order")
    return [
        f"besides, {runs[i]} differs from {runs[0]} in {', '.join(keys)}: a verdict can't tell "
        "that apart"
        for i, other in ((1, B), (2, C))
        if (keys := _others(A, other))
    ]


def _reward(recipe: Recipe) -> dict[str, object]:
    """Return what decides the pay, the task's own verifier with it."""
    kept = recipe.model_dump(include=REWARD)
    return kept | {"scorer": recipe.model_dump()["task"].get("scorer")}


def _others(a: Recipe, b: Recipe) -> list[str]:
    kept_a, kept_b = a.model_dump(), b.model_dump()
    for kept in (kept_a, kept_b):
        kept["task"].pop("scorer", None)
    left = set(kept_a) - NO_DIFFERENCE - REWARD - {"kl", "model"}
    return sorted(key for key in left if kept_a[key] != kept_b[key])


def _moved(runs: Sequence[Path], sites: Sequence[str]) -> tuple[list[Cell], list[Moved]]:
    """Return the cells in common, and for each run its arms' measures."""
    cells: list[Cell] = []
    parts: list[dict[Arm, list[dict[Measure, Tensor]]]] = [{a: [] for a in ARMS} for _ in runs]
    for site in sites:
        spans = [_spans(run, site) for run in runs]
        common = [span for span in spans[0] if all(span in other for other in spans)]
        cells += [(site, *span) for span in common]
        for run, own, kept in zip(runs, spans, parts, strict=True):
            index = [own.index(span) for span in common]
            for arm in ARMS:
                chains = [
                    numbers(cosines(load_chain(run, site, arm, seed)))
                    for seed in trained_seeds(run)
                ]
                kept[arm].append(
                    {m: torch.stack([c[m] for c in chains])[:, index] for m in MEASURES}
                )
    if not cells:
        raise UserError("the three runs have no transition between the same two steps in common")
    return cells, [
        {arm: {m: torch.cat([p[m] for p in kept[arm]], 1) for m in MEASURES} for arm in ARMS}
        for kept in parts
    ]


def _spans(run: Path, site: str) -> list[tuple[int, int]]:
    steps = list(load_chain(run, site, "real", trained_seeds(run)[0]))
    return list(zip(steps, steps[1:], strict=False))


def _classified(
    cells: Sequence[Cell], moved: Sequence[Moved], measure: Measure, runs: Sequence[Path]
) -> list[CompareRow]:
    """Return one row a cell; a cell is judged where the measure is defined in every chain."""
    arms = [(m["real"][measure], m["null"][measure]) for m in moved]
    for i in range(3):
        for j in range(i):
            if torch.equal(arms[i][0], arms[j][0]) and not torch.equal(*arms[i]):
                raise UserError(
                    f"{runs[j]} and {runs[i]} drifted by the same numbers: one is a copy of the "
                    "other. Give runs of different conditions"
                )
    defined_c = torch.stack([part.isfinite().all(0) for arm in arms for part in arm]).all(0)
    A, B, C = ((real[:, defined_c], null[:, defined_c]) for real, null in arms)
    found = classify(A, B, C, families=len(MEASURES))
    place = {int(c): i for i, c in enumerate(defined_c.nonzero().flatten())}
    return [
        CompareRow(
            *cell,
            measure,
            found.verdict[i],
            float(found.q_structural[i]),
            float(found.q_reward[i]),
            float(found.q_kl[i]),
            tuple(_limits(e, i) for e in found.excess),
            _limits(found.reward_effect, i),
            _limits(found.kl_effect, i),
        )
        if (i := place.get(c)) is not None
        else CompareRow(*cell, measure)
        for c, cell in enumerate(cells)
    ]


def _limits(band: Intervals, i: int) -> Limits:
    return float(band.value[i]), float(band.low[i]), float(band.high[i])


def _table(rows: Sequence[CompareRow]) -> TextTable:
    """Return four rows a measure: what it would be if structural, of the reward, of the KL."""
    cells: list[Sequence[str]] = []
    before = None
    for row in rows:
        if before != (before := (row.site, row.from_step, row.to_step)):
            site = row.site.removesuffix(".hook_resid_post")
            cells.append([f"{site}, step {row.from_step} to {row.to_step}"])
        head = (row.measure, row.verdict or "undefined")
        if row.reward_effect is None or row.kl_effect is None:
            cells.append(head)
            continue
        excess = ", ".join(f"{value:+.4f}" for value, _, _ in row.excess)
        reward, kl = interval(row.reward_effect, "+.4f"), interval(row.kl_effect, "+.4f")
        cells += [
            (*head, "excess A, B, C", excess, f"{row.q_structural:.3f}"),
            ("", "", "B - A", reward, f"{row.q_reward:.3f}"),
            ("", "", "C - A", kl, f"{row.q_kl:.3f}"),
        ]
    title = (
        "what changed with what: excess over null arms, at a false discovery rate of 5 % for each "
        "kind of claim"
    )
    words = ("measure", "verdict", "claim")
    return table(title, (*words, "value", "q"), cells, words)
