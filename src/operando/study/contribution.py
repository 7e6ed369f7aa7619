"""Which layers carry the gain: training each block of layers alone against training all of them.

The share of the all-layers gain that a layer set recovers when it alone is trained ("layer
contribution", 2607.01232), with an interval over seeds, and whether the seeds agree on the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from operando.errors import UserError
from operando.files import read_object
from operando.models.layers import parse_layer_set
from operando.recipe.run import Recipe
from operando.run import SeedTree, write_json
from operando.stats.intervals import Interval, t_interval
from operando.stats.ranks import Agreement, kendall_w

ALL = "all"


@dataclass(frozen=True)
class Contribution:
    """What training one layer set alone brings, over seeds.

    `gain` is held-out accuracy after minus before; `share` is that gain over the gain of all
    layers with the same seed. An interval over fewer than two seeds is the value itself.
    """

    layers: str
    gain: Interval
    share: Interval
    num_seeds: int


@dataclass(frozen=True)
class ContributionResult:
    """All layer sets of a sweep, "all" first, and where it was written.

    `agreement`: whether the seeds order the sets alike, "all" left out; None with one seed or set.
    """

    name: str
    base: float
    rows: tuple[Contribution, ...]
    agreement: Agreement | None
    file: Path


def layer_sets(num_layers: int, width: int) -> list[str]:
    """Return blocks of `width` neighbouring layers, e.g. "0-1", "2-3", "4-5" (the last may be
    narrower)."""
    if not 1 <= width < num_layers:
        raise UserError(f"--width {width}: expected 1 to {num_layers - 1} of {num_layers} layers")
    starts = range(0, num_layers, width)
    return [_name(start, min(start + width, num_layers) - 1) for start in starts]


def _name(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def folder_of(recipe: Recipe) -> Path:
    """Return where the runs and the shares of a recipe's sweep go."""
    return Path(recipe.runs_dir) / f"{recipe.name}_contribution"


def plan(
    recipe: Recipe, sets: Sequence[str], seeds: Sequence[int]
) -> dict[tuple[str, int], Recipe]:
    """Return the recipe of every arm and seed: the same but for model.layers and seed."""
    folder = folder_of(recipe)
    planned = {}
    for layers in (ALL, *sets):
        for seed in seeds:
            model = recipe.model.model_copy(update={"layers": layers})
            name = f"layers_{layers.replace(':', '_').replace(',', '_')}_seed{seed}"
            planned[layers, seed] = recipe.model_copy(
                update={"model": model, "seed": seed, "name": name, "runs_dir": str(folder)}
            )
    return planned


def check_sets(sets: Sequence[str], num_layers: int) -> None:
    """Refuse sets that are wrong or that mean all layers, before anything is trained."""
    for text in sets:
        if len(parse_layer_set(text, num_layers)) == num_layers:
            raise UserError(f"layer set {text!r} is all layers, which are trained anyway")


def summarise(name: str, folders: Mapping[tuple[str, int], Path], file: Path) -> ContributionResult:
    """Return each layer set's share of the gain from the runs' results, and write it."""
    counts = {key: _held_out(folder) for key, folder in folders.items()}
    gains = {key: after - before for key, (before, after) in counts.items()}
    sets = list(dict.fromkeys(layers for layers, _ in folders))
    seeds = list(dict.fromkeys(seed for _, seed in folders))
    for seed in seeds:
        if gains[ALL, seed] <= 0:
            raise UserError(
                f"seed {seed}: training all layers gained {gains[ALL, seed]:+.1%}, so there is no "
                f"gain to take shares of (the runs are in {file.parent})"
            )
    rows = [
        Contribution(
            layers,
            gain=t_interval([gains[layers, seed] for seed in seeds]),
            share=t_interval([gains[layers, seed] / gains[ALL, seed] for seed in seeds]),
            num_seeds=len(seeds),
        )
        for layers in sets
    ]
    base = sum(before for before, _ in counts.values()) / len(counts)
    alone = [layers for layers in sets if layers != ALL]
    agreement = None
    if len(seeds) > 1 and len(alone) > 1:
        gain_mn = np.array([[gains[layers, seed] for layers in alone] for seed in seeds])
        agreement = kendall_w(gain_mn, np.random.default_rng(SeedTree(0).derive("agreement")))
    result = ContributionResult(name, base, tuple(rows), agreement, file)
    kept = asdict(result) | {"file": str(file), "gains": _by_seed(gains)}
    write_json(file, kept | {"agreement": agreement and agreement._asdict()})
    return result


def _by_seed(gains: Mapping[tuple[str, int], float]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for (layers, seed), gain in gains.items():
        found.setdefault(layers, {})[str(seed)] = gain
    return found


def _held_out(folder: Path) -> tuple[float, float]:
    """Return held-out accuracy before and after a run."""
    held_out = read_object(folder / "results.json", held_out=dict)["held_out"]
    base, trained = held_out["base"], held_out["trained"]
    return base["correct"] / base["n"], trained["correct"] / trained["n"]
