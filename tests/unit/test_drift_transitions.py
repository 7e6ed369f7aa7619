"""Planted drifts of SAE chains, each named by what was planted; rates of false names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from operando.drift.transitions import (
    MEASURES,
    NO_DRIFT,
    DriftRow,
    Measure,
    cosines,
    matched,
    name,
    numbers,
    rows_of,
)
from operando.sae.sae import SAE
from operando.stats.null_arms import classify

SEEDS, M, D = 3, 96, 48
CELLS = [("blocks.4.hook_resid_post", 0, 10)]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sae(seed: int) -> SAE:
    zero = torch.zeros(D)
    W_enc, W_dec = draw(M, D, seed=seed), draw(M, D, seed=seed + 1000)
    return SAE(W_enc, torch.zeros(M), W_dec, zero, zero, "topk", k=4)


def refitted(start: SAE, seed: int, scale: float = 0.05) -> SAE:
    """What training alone does: both matrices move a little, each chain by an amount of its own."""
    own = scale * (1 + 0.2 * float(draw(1, seed=seed + 7)))
    # some features move more than others, in decoder and encoder alike
    wide_M1 = own * (1 + draw(M, 1, seed=seed + 1).abs())
    return replace(
        start,
        W_enc_MD=start.W_enc_MD + wide_M1 * draw(M, D, seed=seed + 2),
        W_dec_MD=start.W_dec_MD + wide_M1 * draw(M, D, seed=seed + 3),
    )


def encoder_rewired(b: SAE, seed: int) -> SAE:
    return replace(b, W_enc_MD=b.W_enc_MD + 0.8 * draw(M, D, seed=seed))


def decoder_turned(b: SAE, seed: int) -> SAE:
    return replace(b, W_dec_MD=b.W_dec_MD + 0.8 * draw(M, D, seed=seed))


def renamed(b: SAE, seed: int) -> SAE:
    order = torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    return replace(b, W_enc_MD=b.W_enc_MD[order], W_dec_MD=b.W_dec_MD[order])


def renamed_and_rewired(b: SAE, seed: int) -> SAE:
    return renamed(encoder_rewired(b, seed), seed + 5)


def decoupled(b: SAE, seed: int) -> SAE:
    """Decoder and encoder turn as far as before, but no longer the same features."""
    order = draw(M, seed=seed).argsort()
    start = b.W_enc_MD  # the encoder's movements are dealt out again over the features
    first = sae_of[id(b)].W_enc_MD
    return replace(b, W_enc_MD=first + (start - first)[order])


def nothing(b: SAE, seed: int) -> SAE:
    del seed
    return b


sae_of: dict[int, SAE] = {}


def named(plant: Callable[[SAE, int], SAE], seed: int) -> tuple[str, list[DriftRow]]:
    """The name of a transition whose real arm has the plant on top of what refitting does."""
    pairs: dict[str, list[tuple[SAE, SAE]]] = {"real": [], "null": []}
    for chain in range(SEEDS):
        start = sae(100 * seed + chain)
        for number, arm in enumerate(pairs):
            end = refitted(start, 10_000 * (seed + 1) + 100 * chain + 10 * number)
            sae_of[id(end)] = start
            if arm == "real":
                end = plant(end, 77 * (seed + 1) + chain)
            pairs[arm].append((start, end))
    arms: list[Mapping[Measure, Tensor]] = []
    for both in pairs.values():
        found = [numbers(cosines({0: a, 10: b})) for a, b in both]
        arms.append({m: torch.stack([f[m] for f in found]) for m in MEASURES})
    rows = rows_of(CELLS, *arms)
    match: list[Mapping[Measure, Tensor]] = []
    for both in pairs.values():
        by_match = [numbers([matched(a, b)]) for a, b in both]
        kept: tuple[Measure, ...] = ("decoder", "encoder")
        match.append({m: torch.stack([f[m] for f in by_match]) for m in kept})
    return name(rows, rows_of(CELLS, *match)).name, rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (encoder_rewired, {"encoder drift", "encoder drift, decoupling"}),
        (decoder_turned, {"decoder drift", "decoder drift, decoupling"}),
        (renamed, {"renaming"}),
        (renamed_and_rewired, {"encoder drift, renaming", "encoder drift, renaming, decoupling"}),
        (decoupled, {"decoupling"}),
    ],
)
def test_a_planted_drift_has_its_name(
    plant: Callable[[SAE, int], SAE], expected: set[str], seed: int
) -> None:
    assert named(plant, seed)[0] in expected


def test_no_drift_is_named_so() -> None:
    # 40 tables of three measures each at a rate of at most 5 %: 5 or more have a chance of 5 %
    found = [named(nothing, seed)[0] for seed in range(40)]
    assert found.count(NO_DRIFT) >= 36


def test_a_measure_that_is_undefined_is_said_to_be() -> None:
    start = [sae(seed) for seed in range(SEEDS)]
    real = [numbers(cosines({0: s, 10: encoder_rewired(s, 50 + i)})) for i, s in enumerate(start)]
    null = [numbers(cosines({0: s, 10: refitted(s, i)})) for i, s in enumerate(start)]
    arms = [{m: torch.stack([f[m] for f in arm]) for m in MEASURES} for arm in (real, null)]
    rows = {row.measure: row for row in rows_of(CELLS, *arms)}
    assert rows["decoder"].real == 0 and rows["encoder"].q <= 0.05
    assert rows["decoupling"].real != rows["decoupling"].real  # a cosine that does not vary
    found = name(list(rows.values()))
    assert found.name == "encoder drift" and "not shown: decoder, decoupling" in found.sentence
    encoder = rows["encoder"]
    for factor, gone in ((1.001, "; 0% of it"), (0.52, "; 48% of it"), (1.5, "; -50% of it")):
        beside = replace(encoder, excess=(factor * encoder.excess[0], 0.0, 1.0))
        assert gone in name(list(rows.values()), [beside]).sentence
    assert rows["encoder"].per_step[0] == pytest.approx(rows["encoder"].real / 10)


def test_reward_and_kl_are_rarely_named_where_all_runs_share_one_excess() -> None:
    """3 + 3 chains, 8 cells, every run with the same excess over its nulls: structural findings
    abound and must not lower the bar for the two other claims."""
    generator = torch.Generator().manual_seed(11)

    def chain() -> tuple[Tensor, Tensor]:
        noise = 0.0005 * torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
        return 0.006 + noise[0], 0.003 + noise[1]

    tables, false, structural = 300, 0, 0
    for _ in range(tables):
        verdicts = classify(chain(), chain(), chain()).verdict
        false += any("driven" in verdict for verdict in verdicts)
        structural += any(verdict == "structural" for verdict in verdicts)
    assert structural >= 0.98 * tables
    assert false <= tables * 0.05 + 2 * (tables * 0.05 * 0.95) ** 0.5
    # three tables read as one
    generator.manual_seed(12)
    false = 0
    for _ in range(150):
        three = [classify(chain(), chain(), chain(), families=3).verdict for _ in range(3)]
        false += any("driven" in verdict for verdicts in three for verdict in verdicts)
    assert false <= 150 * 0.05 + 2 * (150 * 0.05 * 0.95) ** 0.5


def test_effects_of_reward_and_kl_are_differences_of_excess() -> None:
    arms = [
        (0.01 * draw(3, 2, seed=s).double() + x, 0.01 * draw(3, 2, seed=s + 1).double())
        for s, x in ((1, 0.3), (3, 0.1), (5, 0.3))
    ]
    found = classify(*arms)
    e = [real.mean(0) - null.mean(0) for real, null in arms]
    for value, expected in zip(
        (*found.excess, found.reward_effect, found.kl_effect),
        (*e, e[1] - e[0], e[2] - e[0]),
        strict=True,
    ):
        torch.testing.assert_close(value.value, expected)
        assert (value.low < value.value).all() and (value.value < value.high).all()
    assert (found.reward_effect.high < 0).all()
