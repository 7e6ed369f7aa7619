"""What moved from one stage of a chain to the next: decoder, encoder, and the two apart.

Each measure is one number a chain and transition and grows with change, so that all are tested
against the null arm in the same way.

Dims: R chains of an arm, t transitions, M features, D width of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from operando.drift import measures
from operando.sae.sae import SAE
from operando.stats.null_arms import drift_against_null
from operando.stats.tests import benjamini_hochberg

Measure = Literal["decoder", "encoder", "decoupling"]
MEASURES: tuple[Measure, ...] = ("decoder", "encoder", "decoupling")
FDR = 0.05
NAN = float("nan")
NO_DRIFT = "no drift shown"
RENAMED = 0.9  # the part of an excess that must vanish by best match to be called renaming


@dataclass(frozen=True)
class DriftRow:
    """One measure of one transition of one site, the real arm beside the null arm.

    decoder, encoder: 1 - mean cosine of the rows by index, resampled rows left out. decoupling:
    1 - r, r the correlation over features of decoder and encoder cosine; nan where a cosine does
    not vary over the features. `share` is null over real, `excess` real minus null, both with 95 %
    limits over seeds. `p` is the exact permutation p over arms, which can't fall below `p_floor`;
    `q` is Student's one-sided p of the excess after Benjamini-Hochberg over the report's cells of
    this measure, times the number of measures: a report of arms that do not differ names a drift
    in at most one case of twenty. `per_step` is real and null over the number of steps.

    Example: DriftRow("blocks.4.hook_resid_post", 0, 10, "encoder", 0.24, 0.006, ...).q
    """

    site: str
    from_step: int
    to_step: int
    measure: Measure
    real: float
    null: float
    share: tuple[float, float, float]
    excess: tuple[float, float, float]
    q: float
    p: float
    p_floor: float
    per_step: tuple[float, float]


class Cosines(NamedTuple):
    """Cosines of a transition by index, nan where a feature was resampled."""

    decoder_M: Float[Tensor, "M"]
    encoder_M: Float[Tensor, "M"]


class Name(NamedTuple):
    """What a transition showed. Example: Name("encoder drift", "encoder drift (q = 0.003); ...")"""

    name: str
    sentence: str


def resampled(sae: SAE) -> Bool[Tensor, "M"]:
    """Return which features' index was given to a new direction in the SAE's training."""
    gone_M = torch.zeros(sae.d_sae, dtype=torch.bool)
    gone_M[list(sae.origin.resampled)] = True
    return gone_M


def cosines(chain: Mapping[int, SAE]) -> list[Cosines]:
    """Return the cosines by index of every transition of a chain."""
    saes = list(chain.values())
    found = []
    for a, b in zip(saes, saes[1:], strict=False):
        gone_M = resampled(b)
        found.append(
            Cosines(
                measures.cosine_by_index(a.W_dec_MD, b.W_dec_MD, gone_M),
                measures.cosine_by_index(a.W_enc_MD, b.W_enc_MD, gone_M),
            )
        )
    return found


def numbers(of_transition: Iterable[Cosines]) -> dict[Measure, Float[Tensor, "t"]]:
    """Return each measure for every transition of one chain."""
    of_transition = list(of_transition)
    found: dict[Measure, list[float]] = {
        "decoder": [measures.drift(c.decoder_M) for c in of_transition],
        "encoder": [measures.drift(c.encoder_M) for c in of_transition],
        "decoupling": [1.0 - measures.decoupling(*c) for c in of_transition],
    }
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}


def matched(a: SAE, b: SAE) -> Cosines:
    """Return the cosines of a transition when each feature is compared with its best match.

    The partner of a feature is the row of b's decoder with the largest cosine, for the encoder
    too: a renamed feature takes both of its rows along. Chance alone raises the largest of M
    cosines; the null arm beside it has the same advantage.
    """
    partner_M = measures.best_match(a.W_dec_MD, b.W_dec_MD).index_M
    gone_M = resampled(b)
    return Cosines(
        measures.cosine_by_index(a.W_dec_MD, b.W_dec_MD[partner_M], gone_M),
        measures.cosine_by_index(a.W_enc_MD, b.W_enc_MD[partner_M], gone_M),
    )


def rows_of(
    cells: Sequence[tuple[str, int, int]],
    real: Mapping[Measure, Float[Tensor, "R c"]],
    null: Mapping[Measure, Float[Tensor, "R c"]],
) -> list[DriftRow]:
    """Return one row a cell (site, from, to) and measure. All cells of a report belong in one call:
    q runs over them."""
    rows = []
    for measure in real:
        values, beside = real[measure], null[measure]
        tested = values.isfinite().all(0) & beside.isfinite().all(0)
        place = {int(c): i for i, c in enumerate(tested.nonzero().flatten())}
        found = drift_against_null(values[:, tested], beside[:, tested], paired=True)
        q_c = torch.from_numpy(len(MEASURES) * benjamini_hochberg(found.p_t.numpy())).clamp(max=1.0)
        for c, (site, before, after) in enumerate(cells):
            span = max(after - before, 1)
            i = place.get(c)
            if i is None:
                rows.append(
                    DriftRow(
                        site,
                        before,
                        after,
                        measure,
                        NAN,
                        NAN,
                        (NAN, NAN, NAN),
                        (NAN, NAN, NAN),
                        NAN,
                        NAN,
                        found.p_floor,
                        (NAN, NAN),
                    )
                )
                continue
            mean, mean_null = float(found.real[i]), float(found.null[i])
            rows.append(
                DriftRow(
                    site,
                    before,
                    after,
                    measure,
                    mean,
                    mean_null,
                    _three(found.share, i),
                    _three(found.excess, i),
                    float(q_c[i]),
                    float(found.p_permutation[i]),
                    found.p_floor,
                    (mean / span, mean_null / span),
                )
            )
    order = {cell: c for c, cell in enumerate(cells)}
    rows.sort(key=lambda row: order[row.site, row.from_step, row.to_step])
    return rows


def _three(band: tuple[Tensor, Tensor, Tensor], i: int) -> tuple[float, float, float]:
    value, low, high = band
    return float(value[i]), float(low[i]), float(high[i])


def shown(row: DriftRow) -> bool:
    """Return whether the row is more than its null arm: q <= 0.05, never so for nan."""
    return row.q <= FDR


def name(rows: Sequence[DriftRow], by_match: Sequence[DriftRow] = ()) -> Name:
    """Return the name of a transition from the rows of its measures.

    `by_match` holds its decoder and encoder rows by best match; without them nothing can be named
    renaming. An excess of which 90 % or more vanish by best match is renaming and no drift.

    Example: name([decoder, encoder, decoupling]).name == "encoder drift"
    """
    by_index = {row.measure: row for row in rows}
    beside = {row.measure: row for row in by_match}
    drifted, renamed, said = [], [], []
    for row in rows:
        if row.measure == "decoupling" or not shown(row):
            continue
        gone = None
        if row.measure in beside:
            gone = 1 - beside[row.measure].excess[0] / row.excess[0]
        is_renamed = gone is not None and gone >= RENAMED
        (renamed if is_renamed else drifted).append(row.measure)
        part = f"{row.measure} {row.excess[0]:+.4f} over its null arm (q = {row.q:.2g}"
        vanished = "" if gone is None else f"; {round(100 * gone)}% of it gone by best match"
        said.append(f"{part}{vanished})")
    names = [" and ".join(drifted) + " drift"] if drifted else []
    names += ["renaming"] if renamed else []
    coupling = by_index["decoupling"]
    if shown(coupling) and (drifted or not renamed):
        names.append("decoupling")
        said.append(f"decoupling {coupling.excess[0]:+.3f} (q = {coupling.q:.2g})")
    rest = [row.measure for row in rows if not shown(row)]
    if not names:
        return Name(NO_DRIFT, f"not shown: {', '.join(rest)}")
    told = ", ".join(names)
    sentence = f"{told}: {'; '.join(said)}"
    return Name(told, sentence + (f"; not shown: {', '.join(rest)}" if rest else ""))
