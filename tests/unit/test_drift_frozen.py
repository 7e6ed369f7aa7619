"""One SAE, several checkpoints, the same tokens: slow second opinions and planted changes."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from operando.drift.frozen_sums import (
    FrozenDiff,
    FrozenSums,
    _sign_flip_p,
    add,
    empty_sums,
    finish,
    reconstruct,
    scaling_sums,
)
from operando.errors import UserError
from operando.stats.intervals import wilson

M, D, K = 24, 12, 5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(seed: int, num_tokens: int, num_checkpoints: int) -> tuple[Tensor, ...]:
    """Return decoder, bias, activations, codes (top K of relu of a projection) and texts of 3."""
    g = generator(seed)
    W_MD = torch.randn(M, D, generator=g)
    b_D = torch.randn(D, generator=g)
    x_TND = torch.randn(num_checkpoints, num_tokens, D, generator=g)
    value, idx = ((x_TND - b_D) @ W_MD.T).relu().topk(K, dim=2)
    return W_MD, b_D, x_TND, idx, value / D, torch.arange(num_tokens) // 3


def run(parts: tuple[Tensor, ...], chunk: int, reference: int = 0) -> tuple[FrozenSums, FrozenDiff]:
    W_MD, b_D, x, idx, value, text = parts
    sums = empty_sums(len(x), len(W_MD), x.shape[2], reference)
    for i in range(0, x.shape[1], chunk):
        part = slice(i, i + chunk)
        sums = add(sums, W_MD, b_D, x[:, part], idx[:, part], value[:, part], text[part])
    return sums, finish(sums, W_MD)


def dense(idx_Nk: Tensor, value_Nk: Tensor) -> Tensor:
    return torch.zeros(len(idx_Nk), M).scatter_(1, idx_Nk, value_Nk).double()


def test_the_table_equals_a_slow_dense_one() -> None:
    W_MD, b_D, x, idx, value, text = parts = planted(0, 60, 3)
    _, diff = run(parts, chunk=60, reference=1)
    f_ref = dense(idx[1], value[1])
    for t in range(3):
        f_NM, x_ND = dense(idx[t], value[t]), x[t].double()
        assert_close(diff.rate_TM.value[t], (f_NM > 0).double().mean(0))
        assert_close(diff.mean_act_TM[t], f_NM.mean(0))
        assert_close(diff.delta_act_TM[t], (f_NM - f_ref).mean(0))
        error_ND = x_ND - (f_NM @ W_MD.double() + b_D)
        fvu = error_ND.square().sum() / (x_ND - x_ND.mean(0)).square().sum()
        assert float(diff.fvu_T[t]) == pytest.approx(float(fvu), rel=1e-5)
        cosine = torch.cosine_similarity(x_ND.mean(0), x[1].double().mean(0), dim=0)
        assert float(diff.cosine_T[t]) == pytest.approx(float(cosine))
        s_GM = torch.stack([(f_NM - f_ref)[text == g].sum(0) for g in range(20)])
        z_M = (s_GM.sum(0).abs() / s_GM.square().sum(0).sqrt()).nan_to_num()  # never fired: p = 1
        normal_M = torch.erfc(z_M / math.sqrt(2))
        floor_M = 2.0 ** (1.0 - (s_GM != 0).sum(0))
        slow_M = torch.ones(M).double() if t == 1 else torch.maximum(normal_M, floor_M).clamp(max=1)
        assert_close(diff.p_TM[t], slow_M)


def test_chunks_of_whole_texts_do_not_matter() -> None:
    parts = planted(1, 60, 2)
    whole, pieces = run(parts, chunk=60), run(parts, chunk=9)
    for a, b in zip(whole[1][1:], pieces[1][1:], strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)
    for a, b in zip(whole[0].features, pieces[0].features, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert whole[0][:4] == pieces[0][:4] == (0, 60, 20, 180.0)


def test_beta_is_the_least_squares_solution() -> None:
    W_MD, b_D, x, idx, value, _ = parts = planted(2, 90, 2)
    _, diff = run(parts, chunk=30)
    f_NM = dense(idx[0], value[0])
    for t, j in product(range(2), range(M)):
        if not bool(f_NM[:, j].any()):
            assert math.isnan(float(diff.beta_TM[t, j]))
            continue
        regressor = (f_NM[:, j, None] * W_MD[j].double()).reshape(-1, 1)
        target = (x[t] - b_D).double().reshape(-1, 1)
        solved = torch.linalg.lstsq(regressor, target).solution
        assert float(diff.beta_TM[t, j]) == pytest.approx(float(solved), rel=1e-4, abs=1e-6)


def test_beta_of_a_scaled_copy_and_of_the_error_target() -> None:
    W_MD = torch.linalg.qr(torch.randn(D, D, generator=generator(3))).Q
    f_ND = torch.rand(50, D, generator=generator(4))
    idx = torch.arange(D).expand(50, D)
    target_TND = torch.stack([f_ND @ W_MD, 0.5 * f_ND @ W_MD, 0 * f_ND])
    beta = scaling_sums(W_MD, idx, f_ND, target_TND) / f_ND.double().square().sum(0)
    expected = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)[:, None].expand(3, D)
    assert_close(beta, expected, rtol=1e-5, atol=1e-6)
    assert_close(reconstruct(W_MD, torch.ones(D), idx, f_ND), f_ND @ W_MD + 1)


def test_an_identity_pair_changes_nothing() -> None:
    W_MD, b_D, x, idx, value, text = planted(5, 300, 1)
    both = tuple(part.expand(2, -1, -1).clone() for part in (x, idx, value))
    _, diff = run((W_MD, b_D, *both, text), chunk=60)
    assert diff.delta_act_TM.abs().max() == 0 and diff.q_TM.min() == 1
    assert_close(diff.beta_TM[1], diff.beta_TM[0], equal_nan=True)
    assert float(diff.fvu_T[0]) == float(diff.fvu_T[1])
    assert_close(diff.cosine_T, torch.ones(2).double())


def test_planted_changes_are_found_and_the_fdr_is_held() -> None:
    g, false_share, power = generator(6), [], []
    shape, M_, k = (600, 40), 100, 40
    W_MD, b_D, text = torch.randn(M_, 4, generator=g), torch.zeros(4), torch.arange(600) // 4
    x = torch.randn(2, 600, 4, generator=g)
    for _ in range(40):
        idx = torch.rand(600, M_, generator=g).topk(k, dim=1).indices
        common = torch.rand(*shape, generator=g)
        before, after = (common * torch.rand(*shape, generator=g) for _ in range(2))
        after = torch.where(idx < 10, 1.6 * after, after)
        parts = (W_MD, b_D, x, idx.expand(2, -1, -1), torch.stack([before, after]), text)
        found_M = run(parts, chunk=200)[1].q_TM[1] <= 0.1
        false_share.append(float(found_M[10:].sum()) / max(int(found_M.sum()), 1))
        power.append(float(found_M[:10].double().mean()))
    assert np.mean(false_share) <= 0.12, np.mean(false_share)
    assert np.mean(power) > 0.95, np.mean(power)


def deltas(seed: int, num_texts: int, num_features: int) -> Tensor:
    """Return the p of features whose per-text change is symmetric about 0, with heavy tails."""
    g = generator(seed)
    idx = torch.arange(num_features).expand(2, num_texts, -1)
    noise = torch.randn(2, num_texts, num_features, generator=g)
    value = noise.abs() * torch.exp(torch.randn(2, num_texts, num_features, generator=g))
    x = torch.randn(2, num_texts, 2, generator=g)
    W = torch.ones(num_features, 2)
    return run((W, torch.zeros(2), x, idx, value, torch.arange(num_texts)), num_texts)[1].p_TM[1]


@pytest.mark.parametrize("num_texts", [3, 5, 10, 80])
def test_small_p_are_not_too_common_when_nothing_changed(num_texts: int) -> None:
    p_M = deltas(7, num_texts, 6000)
    for a in (0.001, 0.01, 0.05):
        # three binomial standard deviations above a
        assert float((p_M <= a).double().mean()) <= a + 3 * math.sqrt(a * (1 - a) / 6000)


def test_p_is_near_the_exact_sign_flip_test() -> None:
    g = generator(8)
    signs = np.array(list(product([-1, 1], repeat=12)))
    for i in range(10):
        s_G = (torch.randn(12, generator=g) + 0.08 * i).double()
        value = torch.stack([torch.full((12, 1), 9.0), 9.0 + s_G[:, None].float()])
        idx, x = torch.zeros(2, 12, 1, dtype=torch.long), torch.randn(2, 12, 2, generator=g)
        parts = (torch.ones(1, 2), torch.zeros(2), x, idx, value, torch.arange(12))
        exact = np.mean(np.abs(signs @ s_G.numpy()) >= abs(float(s_G.sum())) - 1e-9)
        ours = float(run(parts, chunk=12)[1].p_TM[1, 0])
        assert ours == pytest.approx(float(exact), abs=0.03)


def test_a_few_large_differences_make_p_too_small_as_documented() -> None:
    g = generator(5)
    for large, rate in ((4, 2 / 16), (5, 2 / 32), (8, 18 / 256)):
        size_G = torch.cat([torch.ones(large), 1e-4 * torch.rand(40, generator=g)]).double()
        sign_GM = torch.randint(2, (large + 40, 40_000), generator=g) * 2 - 1
        delta_GM = size_G[:, None] * sign_GM
        p_M = _sign_flip_p(
            delta_GM.sum(0)[None],
            delta_GM.square().sum(0)[None],
            torch.full((1, 40_000), large + 40.0, dtype=torch.float64),
        )
        assert float((p_M <= 0.05).double().mean()) == pytest.approx(rate, abs=0.006)


def test_rate_interval_is_wilsons_for_texts_of_one_token_and_wider_for_bursts() -> None:
    N = 4000
    g = generator(9)
    fires = (torch.rand(N, generator=g) < 0.1).float()
    bursts = (torch.rand(N // 20, generator=g) < 0.1).float().repeat_interleave(20)
    value = torch.stack([fires, bursts], dim=1)[None]
    idx = torch.tensor([0, 1]).expand(1, N, 2)
    x = torch.randn(1, N, 3, generator=g)
    W_MD, b_D = torch.ones(2, 3), torch.zeros(3)
    single = run((W_MD, b_D, x, idx, value, torch.arange(N)), chunk=N)[1].rate_TM
    slow = wilson(int(fires.sum()), N)
    assert float(single.low[0, 0]) == pytest.approx(slow.low, abs=1e-4)
    assert float(single.high[0, 0]) == pytest.approx(slow.high, abs=1e-4)
    grouped = run((W_MD, b_D, x, idx, value, torch.arange(N) // 20), chunk=N)[1].rate_TM
    width = (grouped.high - grouped.low)[0] / (single.high - single.low)[0]
    assert float(width[0]) == pytest.approx(1.0, abs=0.15)
    assert float(width[1]) == pytest.approx(math.sqrt(20), rel=0.05)


def test_a_feature_that_never_fires_has_an_upper_limit() -> None:
    idx, value = torch.zeros(1, 50, 1, dtype=torch.long), torch.zeros(1, 50, 1)
    x = torch.randn(1, 50, 2, generator=generator(10))
    rate = run((torch.ones(2, 2), torch.zeros(2), x, idx, value, torch.arange(50)), 50)[1].rate_TM
    assert rate.value.max() == 0 and rate.low.max() == 0
    assert float(rate.high[0, 1]) == pytest.approx(wilson(0, 50).high)


def test_nan_activations_are_refused_by_name() -> None:
    W_MD, b_D, x, idx, value, text = planted(11, 6, 3)
    x[1, 2, 3] = torch.nan
    with pytest.raises(UserError, match=r"checkpoint\(s\) \[1\] hold NaN"):
        run((W_MD, b_D, x, idx, value, text), chunk=6)
