"""The drift of a run's chains beside their null arms, as numbers ready to be shown and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from operando.drift import measures
from operando.drift.chain import ARMS, Arm, decoders, load_chain, trained_seeds, trained_sites
from operando.drift.collect import Texts, load_acts
from operando.drift.nulls import DriftAgainstNull, drift_against_null, separation
from operando.errors import UserError
from operando.internals.sae import SAE
from operando.run import write_json, write_parquet

MIN_SEEDS = 2


@dataclass(frozen=True)
class DriftRow:
    """One transition of one site: the drift of the decoder rows, real beside null.

    `share` is null over real, `excess` real minus null; both with 95 % limits over seeds.
    `q_t` is Student's one-sided p of the excess after Benjamini-Hochberg over the site's
    transitions; `p` is the exact permutation p over arms, which can't fall below `p_floor`.
    """

    site: str
    from_step: int
    to_step: int
    real: float
    null: float
    share: tuple[float, float, float]
    excess: tuple[float, float, float]
    q_t: float
    p: float
    p_floor: float
    encoder_real: float
    encoder_null: float
    decoupling_real: float
    decoupling_null: float
    quadrants_real: dict[str, float]
    quadrants_null: dict[str, float]


@dataclass(frozen=True)
class StageRow:
    """One stage of one site: how many features are in use, mean over seeds.

    `count` is 2^H by frequency, `energy_count` by squared activation; `born` and `died` since the
    stage before, by two thresholds and a counting test, `seed_born` and `seed_died` by the seed's
    one threshold.
    """

    site: str
    step: int
    arm: str
    count: float
    energy_count: float
    alive: float
    born: float
    died: float
    seed_born: float
    seed_died: float


@dataclass(frozen=True)
class SiteRow:
    """One site at the last stage: do the arms stand apart in the similarity of their chains?"""

    site: str
    statistic: float
    p: float
    p_floor: float
    complete: bool


@dataclass(frozen=True)
class DriftReport:
    """Every drift number of a run with the null beside it."""

    run: str
    seeds: int
    tokens: int
    transitions: tuple[DriftRow, ...]
    stages: tuple[StageRow, ...]
    sites: tuple[SiteRow, ...]
    file: Path


def drift_report(run: Path, texts: Texts) -> DriftReport:
    """Return and write the drift of all chains of a run; refuses to give a number without nulls."""
    seeds, sites = trained_seeds(run), trained_sites(run)
    if not sites:
        raise UserError(f"{run} has no SAE chains; run: operando sae train {run}")
    if len(seeds) < MIN_SEEDS:
        raise UserError(
            f"{run} has chains of one seed: drift needs {MIN_SEEDS} or more, or there is no spread "
            f"to judge it by; run: operando sae train {run} --seeds 3"
        )
    transitions: list[DriftRow] = []
    stages: list[StageRow] = []
    apart: list[SiteRow] = []
    for site in sites:
        chains = {arm: [load_chain(run, site, arm, seed) for seed in seeds] for arm in ARMS}
        transitions += _transitions(site, chains["real"], chains["null"])
        apart.append(_separation(site, chains["real"], chains["null"]))
        for arm in ARMS:
            stages += _stages(run, texts, site, arm, chains[arm])
    file = run / "drift" / "chain.json"
    report = DriftReport(
        run.name,
        len(seeds),
        texts.num_tokens,
        tuple(transitions),
        tuple(stages),
        tuple(apart),
        file,
    )
    write_json(file, _finite(asdict(report) | {"file": str(file)}))
    rows = [asdict(row) for row in transitions]
    write_parquet(file.with_suffix(".parquet"), {key: [r[key] for r in rows] for key in rows[0]})
    return report


def transition_drift(chains: Sequence[dict[int, SAE]]) -> Float[Tensor, "R t"]:
    """Return 1 - mean decoder cosine of each chain's transitions; resampled rows are left out."""
    return torch.stack([_cosines(chain, "W_dec_MD")[1] for chain in chains])


def _cosines(chain: dict[int, SAE], which: str) -> tuple[list[Tensor], Tensor]:
    saes = list(chain.values())
    cosines = []
    for a, b in zip(saes, saes[1:], strict=False):
        gone_M = torch.zeros(b.d_sae, dtype=torch.bool)
        gone_M[list(b.origin.resampled)] = True
        cosines.append(measures.cosine_by_index(getattr(a, which), getattr(b, which), gone_M))
    return cosines, torch.tensor([measures.drift(c) for c in cosines], dtype=torch.float64)


def _transitions(
    site: str, real: Sequence[dict[int, SAE]], null: Sequence[dict[int, SAE]]
) -> list[DriftRow]:
    found: DriftAgainstNull = drift_against_null(
        transition_drift(real), transition_drift(null), paired=True
    )
    steps = list(real[0])
    rows = []
    for i, (before, after) in enumerate(zip(steps, steps[1:], strict=False)):
        shape = [_shape_of_change(chains, i) for chains in (real, null)]
        rows.append(
            DriftRow(
                site, before, after, float(found.real[i]), float(found.null[i]),
                share=_three(found.share, i), excess=_three(found.excess, i),
                q_t=float(found.q_t[i]), p=float(found.p_permutation[i]), p_floor=found.p_floor,
                encoder_real=shape[0][0], encoder_null=shape[1][0],
                decoupling_real=shape[0][1], decoupling_null=shape[1][1],
                quadrants_real=shape[0][2], quadrants_null=shape[1][2],
            )
        )  # fmt: skip
    return rows


def _shape_of_change(
    chains: Sequence[dict[int, SAE]], i: int
) -> tuple[float, float, dict[str, float]]:
    """Return encoder drift, decoupling and quadrant shares of a transition, mean over chains."""
    drifts, correlations = [], []
    shares: dict[str, float] = {name: 0.0 for name in measures.QUADRANTS}
    for chain in chains:
        dec, enc = _cosines(chain, "W_dec_MD")[0][i], _cosines(chain, "W_enc_MD")[0][i]
        drifts.append(measures.drift(enc))
        correlations.append(measures.decoupling(dec, enc))
        place_M = measures.quadrants(dec, enc)
        for number, name in enumerate(measures.QUADRANTS):
            shares[name] += float((place_M == number).double().mean()) / len(chains)
    return sum(drifts) / len(drifts), sum(correlations) / len(correlations), shares


def _separation(
    site: str, real: Sequence[dict[int, SAE]], null: Sequence[dict[int, SAE]]
) -> SiteRow:
    """Compare chains by how they moved from the first SAE of their seed to the last stage."""
    moved = torch.stack([d[-1] - d[0] for d in map(decoders, [*real, *null])])
    found = separation(measures.pairwise_similarity(moved), len(real), paired=True)
    return SiteRow(site, found.statistic, found.p_value, found.p_floor, found.complete)


def _stages(
    run: Path, texts: Texts, site: str, arm: Arm, chains: Sequence[dict[int, SAE]]
) -> list[StageRow]:
    """Count features on the same tokens at every stage: the stage's own activations (real arm) or
    the base's (null arm)."""
    steps = list(chains[0])
    sources = [step if arm == "real" else 0 for step in steps]
    acts = {source: load_acts(run, texts, source, site) for source in sources}
    kept: list[list[measures.Usage]] = [
        [_usage(acts[source], chain[step]) for source, step in zip(sources, steps, strict=True)]
        for chain in chains
    ]
    rows = []
    lives = []
    for chain, used in zip(chains, kept, strict=True):
        gone_SM = torch.zeros(len(steps), len(used[0].count_M), dtype=torch.bool)
        for s, step in enumerate(steps):
            gone_SM[s, list(chain[step].origin.resampled)] = True
        counts_SM = torch.stack([u.count_M for u in used])
        lives.append(measures.lifecycle(counts_SM, used[0].num_tokens, gone_SM))
    for s, step in enumerate(steps):
        seeds = [
            measures.seed_lifecycle(measures.density(u[max(s - 1, 0)]), measures.density(u[s]))
            for u in kept
        ]
        rows.append(
            StageRow(
                site, step, arm,
                count=_mean([measures.effective_count(u[s], "frequency") for u in kept]),
                energy_count=_mean([measures.effective_count(u[s], "energy") for u in kept]),
                alive=_mean([float(x.alive[s].sum()) for x in lives]),
                born=_mean([float(x.born[s - 1].sum()) if s else 0.0 for x in lives]),
                died=_mean([float(x.died[s - 1].sum()) if s else 0.0 for x in lives]),
                seed_born=_mean([float(x.born.sum()) for x in seeds]),
                seed_died=_mean([float(x.died.sum()) for x in seeds]),
            )
        )  # fmt: skip
    return rows


def _usage(acts_ND: Float[Tensor, "N D"], sae: SAE) -> measures.Usage:
    codes = sae.encode(acts_ND)
    return measures.usage(codes.idx_Nk, codes.value_Nk, sae.d_sae)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _three(band: object, i: int) -> tuple[float, float, float]:
    value, low, high = band  # pyright: ignore[reportGeneralTypeIssues]
    return float(value[i]), float(low[i]), float(high[i])


def _finite(value: object) -> object:
    """Return the value with infinities and NaN as text: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value
