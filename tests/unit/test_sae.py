"""SAEs by hand, what they refuse, and quality figures against slow second opinions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from operando.errors import UserError
from operando.sae.quality import (
    TextBatch,
    loss_recovered,
    measure_quality,
    nmse,
    sink_tokens,
    splicing,
)
from operando.sae.sae import SAE, Origin, check_fits, row_products, top_codes
from tests.unit.tiny import tiny_model

SITE = "blocks.1.hook_resid_post"


def random_sae(D: int = 8, M: int = 24, k: int = 3, seed: int = 0, **changes: object) -> SAE:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    fields = {
        "W_enc_MD": draw(M, D),
        "b_enc_M": draw(M),
        "W_dec_MD": F.normalize(draw(M, D), dim=1),
        "b_pre_D": draw(D),
        "b_dec_D": draw(D),
        "activation": "topk",
        "k": k,
        "origin": Origin(model="tiny", site=SITE),
    }
    return SAE(**(fields | changes))  # pyright: ignore[reportArgumentType]


def identity_sae(activation: str, threshold: float = 0.0) -> SAE:
    eye = torch.eye(3)
    return SAE(
        eye,
        torch.zeros(3),
        eye,
        torch.zeros(3),
        torch.zeros(3),
        activation,
        2,
        torch.full((3,), threshold),
    )  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("topk", [[0.0, 3.0, -1.0], [0.5, 0.0, 0.25]]),
        ("topk_relu", [[0.0, 3.0, 0.0], [0.5, 0.0, 0.25]]),
        ("relu", [[0.0, 3.0, 0.0], [0.5, 0.1, 0.25]]),
        ("jumprelu", [[0.0, 3.0, 0.0], [0.5, 0.0, 0.0]]),
        ("batchtopk", [[0.0, 3.0, 0.0], [0.5, 0.0, 0.0]]),
    ],
)
def test_activations_by_hand(activation: str, expected: list[list[float]]) -> None:
    """Identity weights: the codes are the activation of x itself; threshold 0.3, k 2."""
    x_ND = torch.tensor([[-2.0, 3.0, -1.0], [0.5, 0.1, 0.25]])
    sae = identity_sae(activation, 0.3)
    assert sae.encode_dense(x_ND).tolist() == torch.tensor(expected).tolist()
    assert torch.equal(sae.reconstruct(x_ND), torch.tensor(expected))


def test_both_biases_are_where_they_belong() -> None:
    """z = 2 (x - 1) + 0.5, x_hat = z * 3 + 10, at x = 2: z = 2.5, x_hat = 17.5."""
    one = torch.ones(1)
    sae = SAE(2 * one[None], one / 2, 3 * one[None], one, 10 * one, "topk", 1)
    assert sae.encode(2 * one[None]).value_Nk.item() == 2.5
    assert sae.reconstruct(2 * one[None]).item() == 17.5


def test_sparse_codes_decode_as_the_dense_product_does_in_any_chunks(monkeypatch: object) -> None:
    x_ND = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    threshold = torch.full((24,), 0.7)
    for activation in ("topk", "topk_relu", "batchtopk", "relu", "jumprelu"):
        sae = random_sae(activation=activation, threshold_M=threshold)
        dense_ND = sae.encode_dense(x_ND) @ sae.W_dec_MD + sae.b_dec_D
        assert torch.allclose(sae.reconstruct(x_ND), dense_ND, atol=1e-5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("operando.sae.sae.CHUNK_ELEMENTS", 24 * 7)
            assert torch.allclose(sae.reconstruct(x_ND), dense_ND, atol=1e-5)


def test_the_two_stage_top_k_is_exact() -> None:
    z_NM = torch.randn(50, 512, generator=torch.Generator().manual_seed(2))
    for k in (1, 5, 16):
        idx_Nk, value_Nk = top_codes(z_NM, k)
        assert torch.equal(value_Nk.sort(descending=True).values, z_NM.topk(k).values)
        assert torch.equal(z_NM.gather(1, idx_Nk.long()), value_Nk)


def test_row_products() -> None:
    W_MD, x_ND = torch.randn(6, 4), torch.randn(3, 4)
    idx_NK = torch.tensor([[0, 5], [2, 2], [3, 1]], dtype=torch.int32)
    expected = torch.stack([W_MD[idx_NK[n].long()] @ x_ND[n] for n in range(3)])
    assert torch.allclose(row_products(idx_NK, W_MD, x_ND), expected, atol=1e-6)


def test_the_hash_is_of_the_weights_and_not_of_the_origin() -> None:
    sae = random_sae()
    assert sae.sha256() == random_sae(origin=Origin(arm="null")).sha256()
    assert sae.sha256() != random_sae(seed=1).sha256()
    assert sae.sha256() != random_sae(k=4).sha256()
    nudged = sae.b_dec_D.clone()
    nudged[0] += 1e-6
    assert sae.sha256() != replace(sae, b_dec_D=nudged).sha256()


def test_bad_activations_and_misfits_are_one_clear_error() -> None:
    sae = random_sae()
    x_ND = torch.zeros(5, 8)
    x_ND[3, 2] = float("nan")
    with pytest.raises(UserError, match=r"NaN or inf in 1 of 5 tokens, first in row 3"):
        sae.encode(x_ND)
    with pytest.raises(UserError, match="float16 overflows"):
        sae.encode(torch.full((1, 8), 1e5).half())
    with pytest.raises(UserError, match="have width 7; the SAE reads 8"):
        sae.encode(torch.zeros(5, 7))
    with pytest.raises(UserError, match="needs 1 <= k <= 24"):
        random_sae(k=25)
    with pytest.raises(UserError, match="needs a threshold"):
        random_sae(activation="jumprelu")


def test_an_sae_that_does_not_fit_the_model_is_refused() -> None:
    model = tiny_model("llama")  # 3 blocks, width 32
    assert check_fits(random_sae(D=32), model, 32) == SITE
    with pytest.raises(UserError, match="reads d_in=8; LlamaForCausalLM has width 32"):
        check_fits(random_sae(), model, 32)
    with pytest.raises(UserError, match="has blocks 0-2"):
        check_fits(random_sae(D=32, origin=Origin(site="blocks.12.hook_resid_post")), model, 32)
    with pytest.raises(UserError, match="was trained at"):
        check_fits(random_sae(D=32), model, 32, "blocks.2.hook_resid_post")
    with pytest.raises(UserError, match="does not say its site"):
        check_fits(random_sae(D=32, origin=Origin()), model, 32)


# quality


def test_nmse_by_hand() -> None:
    """x = 0 2 4 6: unbiased variance 20/3; every error 1: mse 1; 3/20."""
    x_ND = torch.tensor([[0.0, 2.0], [4.0, 6.0]])
    assert math.isclose(nmse(x_ND, x_ND + 1), 3 / 20)


def test_quality_against_a_slow_loop_with_a_sink() -> None:
    generator = torch.Generator().manual_seed(3)
    x_ND = torch.randn(60, 8, generator=generator) + torch.arange(8.0) / 10
    x_ND[17] *= 200
    first_N = torch.zeros(60, dtype=torch.bool)
    first_N[0] = True
    sae = random_sae()
    got = measure_quality(sae, x_ND, first_N)
    x_hat_ND = sae.reconstruct(x_ND)
    kept = [n for n in range(60) if n not in (0, 17)]

    def fvu(rows: list[int]) -> float:
        mean_D = x_ND[rows].double().mean(dim=0)
        above = sum(float((x_ND[n] - x_hat_ND[n]).double().square().sum()) for n in rows)
        return above / sum(float((x_ND[n].double() - mean_D).square().sum()) for n in rows)

    mean_D = x_ND.double().mean(dim=0)
    ratios = [
        float((x_ND[n] - x_hat_ND[n]).square().sum() / (x_ND[n] - mean_D).square().sum())
        for n in range(60)
    ]
    assert sink_tokens(x_ND).nonzero().flatten().tolist() == [17]
    assert (got.tokens, got.sinks, got.l0) == (60, 2, 3.0)
    assert math.isclose(got.nmse, nmse(x_ND, x_hat_ND), rel_tol=1e-6)
    assert math.isclose(got.fvu, fvu(list(range(60))), rel_tol=1e-6)
    assert math.isclose(got.fvu_no_sinks, fvu(kept), rel_tol=1e-6)
    assert math.isclose(got.fvu_median, sorted(ratios)[29], rel_tol=1e-5)
    dense_NM = sae.encode_dense(x_ND)
    assert got.dead == float((dense_NM == 0).all(dim=0).double().mean())
    assert got.fvu_no_sinks > 2 * got.nmse  # what the sink hides


def perfect_sae(D: int) -> SAE:
    """x_hat = relu(x) - relu(-x): nothing is lost."""
    W_MD = torch.cat([torch.eye(D), -torch.eye(D)])
    zero = torch.zeros(D)
    origin = Origin(site=SITE)
    return SAE(W_MD, torch.zeros(2 * D), W_MD, zero, zero, "relu", origin=origin)


@pytest.mark.parametrize("site", [SITE, "blocks.1.hook_resid_pre", "blocks.1.hook_attn_out"])
def test_loss_recovered_is_one_for_a_perfect_sae_and_zero_for_ablation(site: str) -> None:
    model = tiny_model("llama")
    ids_BS = torch.randint(2, 258, (3, 12), generator=torch.Generator().manual_seed(4))
    mask_BS = torch.arange(12) < torch.tensor([[12], [7], [3]])
    batches = [TextBatch(ids_BS[i:j], mask_BS[i:j], mask_BS[i:j]) for i, j in ((0, 2), (2, 3))]
    sae = replace(perfect_sae(32), origin=Origin(site=site))
    got = loss_recovered(model, sae, batches)
    assert got.tokens == 11 + 6 + 2
    assert abs(got.delta) < 1e-5
    assert math.isclose(got.recovered_mean, 1, abs_tol=1e-3)
    assert math.isclose(got.recovered_zero, 1, abs_tol=1e-3)
    nothing = replace(sae, W_dec_MD=torch.zeros(64, 32))
    got = loss_recovered(model, nothing, batches)
    assert math.isclose(got.spliced, got.zero_ablated, rel_tol=1e-6)
    assert abs(got.recovered_zero) < 1e-5 and got.mean_ablated != got.zero_ablated
    # a slow second opinion on the base loss, one row at a time, without padding
    total = 0.0
    for row, length in zip(ids_BS, (12, 7, 3), strict=True):
        with torch.no_grad():
            logp = model(row[None, :length]).logits[0].log_softmax(-1)
        total -= sum(float(logp[t, row[t + 1]]) for t in range(length - 1))
    assert math.isclose(got.base, total / got.tokens, rel_tol=1e-5)


def test_the_content_of_padding_does_not_matter() -> None:
    model = tiny_model("qwen2")
    ids_BS = torch.randint(2, 258, (2, 9), generator=torch.Generator().manual_seed(5))
    mask_BS = torch.arange(9) < torch.tensor([[9], [4]])
    other_BS = torch.where(mask_BS, ids_BS, 7)
    sae = random_sae(D=32, M=48, k=4)
    one, two = (
        loss_recovered(model, sae, [TextBatch(ids, mask_BS, mask_BS)]) for ids in (ids_BS, other_BS)
    )
    assert one == two and one.delta > 0


def test_a_prompt_is_seen_and_neither_spliced_nor_counted() -> None:
    model = tiny_model("llama")
    ids_BS = torch.randint(2, 258, (1, 10), generator=torch.Generator().manual_seed(6))
    real_BS = torch.ones(1, 10, dtype=torch.bool)
    read_BS = torch.arange(10)[None] >= 6
    got = loss_recovered(model, perfect_sae(32), [TextBatch(ids_BS, real_BS, read_BS)])
    with torch.no_grad():
        logp = model(ids_BS).logits[0].log_softmax(-1)
    want = -sum(float(logp[t - 1, ids_BS[0, t]]) for t in (7, 8, 9)) / 3
    assert math.isclose(got.base, want, rel_tol=1e-5) and got.tokens == 3


def test_splicing_leaves_the_masked_positions_and_later_calls_alone() -> None:
    model = tiny_model("llama")
    ids_BS = torch.arange(5, 13)[None]
    mask_BS = torch.arange(8)[None] >= 5
    with torch.no_grad():
        plain = model(ids_BS).logits
        with splicing(model, SITE, mask_BS, torch.zeros_like):
            changed = model(ids_BS).logits
        again = model(ids_BS).logits
    assert torch.equal(plain[:, :5], changed[:, :5]) and torch.equal(plain, again)
    assert not torch.allclose(plain[:, 5:], changed[:, 5:])
