"""Contrast vectors, their controls, SVD denoising on both sides, and the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from operando.errors import UserError
from operando.models import directions as dr
from operando.models.directions import DirectionSet


def pairs(seed: int, effect: float, N: int = 40, D: int = 24):
    """Two layers, the second with a norm three times the first's; axis 5 tells the sides apart."""
    generator = torch.Generator().manual_seed(seed)
    common_NLD = torch.randn(N, 2, D, generator=generator)
    plus_NLD = common_NLD + 0.3 * torch.randn(N, 2, D, generator=generator)
    minus_NLD = common_NLD + 0.3 * torch.randn(N, 2, D, generator=generator)
    plus_NLD[:, :, 5] += effect
    scale_L1 = torch.tensor([[1.0], [3.0]])
    return plus_NLD * scale_L1, minus_NLD * scale_L1


def test_a_planted_axis_is_the_direction_and_orders_held_out_pairs() -> None:
    v_D = dr.contrast_vector(*pairs(0, 1.0))
    assert float(v_D.norm()) == pytest.approx(1.0, abs=1e-6)
    assert v_D[5] > 0.95
    assert dr.pair_accuracy(v_D, *pairs(1, 1.0)) > 0.95
    assert dr.pair_accuracy(-v_D, *pairs(1, 1.0)) < 0.05


def test_no_layer_decides_by_its_norm() -> None:
    plus_NLD, minus_NLD = pairs(0, 0.0)
    plus_NLD[:, 0, 3] += 1.0  # the small layer says axis 3
    plus_NLD[:, 1, 7] += 3.0  # the large layer axis 7, just as clearly
    v_D = dr.contrast_vector(plus_NLD, minus_NLD)
    assert v_D[3] / v_D[7] == pytest.approx(1.0, abs=0.15)


def test_shuffled_sides_leave_no_direction() -> None:
    plus_NLD, minus_NLD = pairs(0, 1.0)
    swap_N = torch.arange(40) % 2 == 0
    a, b = dr.shuffled_pairs(plus_NLD, minus_NLD, swap_N)
    assert torch.equal(a[0], minus_NLD[0]) and torch.equal(b[1], minus_NLD[1])
    assert abs(float(dr.contrast_vector(a, b)[5])) < 0.5
    assert abs(float(((a - b).mean(0) / 3)[1, 5])) < 0.2 * 1.0


def test_pairs_without_a_difference_are_an_error() -> None:
    plus_NLD, _ = pairs(0, 0.0)
    with pytest.raises(UserError, match="their difference is zero"):
        dr.contrast_vector(plus_NLD, plus_NLD.clone())


@pytest.mark.parametrize("side", ["left", "right"])
def test_denoising_keeps_what_the_module_writes_or_reads(side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    D, other = 32, 80
    basis_DD = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    strong_oD = torch.randn(other, 4, generator=generator) @ basis_DD[:, :4].T * 10
    W_oi = strong_oD + 0.01 * torch.randn(other, D, generator=generator)
    W = W_oi if side == "right" else W_oi.T  # reads D, or writes D
    inside_D = dr.unit(basis_DD[:, 0] + basis_DD[:, 3])
    found = dr.denoise(inside_D, W, 4, side)  # pyright: ignore[reportArgumentType]
    assert found.retained == pytest.approx(1.0, abs=1e-3)
    assert found.cosine == pytest.approx(1.0, abs=1e-3)
    assert found.null == 4 / D
    outside = dr.denoise(basis_DD[:, 9], W, 4, side)  # pyright: ignore[reportArgumentType]
    assert outside.retained < 0.01
    wrong = "left" if side == "right" else "right"
    with pytest.raises(UserError, match=f"not on the {wrong} side"):
        dr.denoise(inside_D, W, 4, wrong)  # pyright: ignore[reportArgumentType]


def test_a_random_vector_keeps_m_over_d() -> None:
    generator = torch.Generator().manual_seed(0)
    W_oi = torch.randn(64, 200, generator=generator)
    kept = [
        dr.denoise(dr.unit(torch.randn(64, generator=generator)), W_oi, 16, "left").retained
        for _ in range(200)
    ]
    assert sum(kept) / 200 == pytest.approx(16 / 64, abs=0.02)


def make_set(**changes: object) -> DirectionSet:
    made = DirectionSet(
        "real",
        "activation",
        dr.unit(torch.arange(1.0, 9.0)),
        (2, 3),
        "last",
        "tiny",
        "ab",
        "float32",
        0.95,
        modules={"model.layers.2.self_attn.o_proj": torch.eye(8)[:2]},
        inputs={"model.layers.2.self_attn.o_proj": dr.unit(torch.ones(4))},
        evidence={"gate": 0.9, "norm_2": 3.5},
    )
    return replace(made, **changes)  # pyright: ignore[reportArgumentType]


def test_a_set_round_trips(tmp_path: Path) -> None:
    made = make_set()
    dr.save_directions(made, tmp_path / "real.safetensors")
    again = dr.load_directions(tmp_path / "real.safetensors")
    for name, value in vars(made).items():
        other = vars(again)[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other)
        elif name in ("modules", "inputs"):
            assert value.keys() == other.keys()
            assert all(torch.equal(value[k], other[k]) for k in value)
        else:
            assert value == other, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_sha256": "cd"}, "was made on model 'tiny'"),
        ({"dtype": "bfloat16"}, "extracted in bfloat16, the recipe trains in float32"),
        ({"accuracy": 0.7}, "ranks 70% of the held-out pairs correctly, below the gate of 90%"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    dr.check_directions(make_set(), "x", "ab", "float32")
    with pytest.raises(UserError, match=message):
        dr.check_directions(make_set(**changes), "x", "ab", "float32")
    if "accuracy" in changes:  # a control is not meant to pass it
        dr.check_directions(make_set(**changes, arm="random"), "x", "ab", "float32")


def test_a_file_that_is_no_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="operando direction extract"):
        dr.load_directions(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_text("x")
    with pytest.raises(UserError, match="not a safetensors file"):
        dr.load_directions(tmp_path / "bad.safetensors")
