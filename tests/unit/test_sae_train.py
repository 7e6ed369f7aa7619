"""SAE training: gradients against autograd, sae_rl's formulas literally, a planted dictionary."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operando.errors import UserError
from operando.run import SeedTree
from operando.sae.train import (
    Aux,
    EpochStats,
    SaeTrainConfig,
    Step,
    Weights,
    _Trainer,
    active,
    clip_,
    cosine_lr,
    fresh_weights,
    resample,
    sparse_step,
    train_sae,
)

N, D, M, K = 48, 16, 64, 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weights(unit: bool = True) -> Weights:
    W_dec_MD = draw(M, D, seed=3)
    if unit:
        W_dec_MD = F.normalize(W_dec_MD, dim=1)
    return Weights(draw(M, D, seed=1), draw(M, seed=2), W_dec_MD, draw(D, seed=4), draw(D, seed=5))


def autograd(
    weights: Weights, x_ND: Tensor, relu: bool, variance: float, aux: Aux | None
) -> tuple[Weights, float, float]:
    """A slow dense second opinion in float64, masks and all."""
    w = Weights(*(t.double().requires_grad_() for t in weights))
    x_ND = x_ND.double()
    z_NM = (x_ND - w.b_pre_D) @ w.W_enc_MD.T + w.b_enc_M
    f_NM = torch.zeros_like(z_NM).scatter(1, z_NM.topk(K).indices, 1.0) * z_NM
    f_NM = f_NM.relu() if relu else f_NM
    e_ND = x_ND - f_NM @ w.W_dec_MD - w.b_dec_D
    loss = e_ND.square().mean() / variance
    aux_loss = torch.zeros((), dtype=torch.float64)
    if aux is not None:
        is_dead_M = torch.zeros(M, dtype=torch.bool)
        is_dead_M[aux.dead_d] = True
        masked_NM = z_NM.masked_fill(~is_dead_M, -math.inf)
        kept_NM = torch.zeros_like(z_NM).scatter(
            1, masked_NM.topk(min(aux.k, len(aux.dead_d))).indices, 1.0
        )
        a_NM = kept_NM * z_NM
        a_NM = a_NM.relu() if relu else a_NM
        if aux.kind == "input":
            aux_loss = (x_ND - a_NM @ w.W_dec_MD - w.b_dec_D).square().mean()
        else:
            target_ND = e_ND.detach()
            aux_loss = (target_ND - a_NM @ w.W_dec_MD).square().mean()
            aux_loss = aux_loss / (target_ND - target_ND.mean(0)).square().mean()
        loss_all = loss + aux.coef * aux_loss
    else:
        loss_all = loss
    loss_all.backward()
    gradients = [t.grad for t in w]
    return Weights(*gradients), loss.item(), aux_loss.item()  # pyright: ignore


def gap(step: Step, expected: Weights) -> float:
    return max(
        float((a.double() - b).norm() / b.norm().clamp(min=1e-12))
        for a, b in zip(step.gradients, expected, strict=True)
    )


DEAD = torch.tensor([1, 7, 8, 20, 33, 50, 51, 63])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "aux",
    [
        None,
        Aux("input", DEAD, 3, 1 / 32),
        Aux("input", DEAD, 80, 1 / 32),
        Aux("residual", DEAD, 3, 1 / 32),
        Aux("residual", DEAD, 8, 2.0),
    ],
)
def test_gradients_equal_autograd(aux: Aux | None, relu: bool) -> None:
    weights, x_ND = random_weights(), draw(N, D, seed=6)
    step = sparse_step(weights, x_ND, K, relu, 1.7, aux)
    expected, loss, aux_loss = autograd(weights, x_ND, relu, 1.7, aux)
    assert gap(step, expected) < 1e-6
    assert math.isclose(float(step.loss), loss, rel_tol=1e-6)
    assert math.isclose(float(step.aux), aux_loss, rel_tol=1e-6)
    along_M = (expected.W_dec_MD * weights.W_dec_MD.double()).sum(dim=1)
    assert float((step.along_M.double() - along_M).norm() / along_M.norm()) < 1e-6


def test_signed_values_below_zero_have_gradients_too() -> None:
    """With k near M some of the kept values are negative; sae_rl keeps them."""
    weights, x_ND = random_weights(), draw(N, D, seed=6)
    codes = active(weights, x_ND - weights.b_pre_D, 60)
    assert bool((codes.value_Nk < 0).any())
    step = sparse_step(weights, x_ND, 60)
    w = [t.double().requires_grad_() for t in weights]
    z_NM = (x_ND.double() - w[3]) @ w[0].T + w[1]
    f_NM = torch.zeros_like(z_NM).scatter(1, z_NM.topk(60).indices, 1.0) * z_NM
    (x_ND.double() - f_NM @ w[2] - w[4]).square().mean().backward()
    assert gap(step, Weights(*[t.grad for t in w])) < 1e-6  # pyright: ignore


def test_firing_counts() -> None:
    weights, x_ND = random_weights(), draw(N, D, seed=6)
    for relu in (False, True):
        step = sparse_step(weights, x_ND, 60, relu)
        z_NM = (x_ND - weights.b_pre_D) @ weights.W_enc_MD.T + weights.b_enc_M
        value, idx = z_NM.topk(60)
        kept = value > 0 if relu else value != 0
        assert torch.equal(step.fired_M, torch.bincount(idx[kept], minlength=M))


def test_bfloat16_preselection_keeps_exact_values() -> None:
    weights = Weights(draw(512, 32, seed=1), draw(512, seed=2), draw(512, 32), draw(32), draw(32))
    xc_ND = draw(200, 32, seed=7)
    exact = active(weights, xc_ND, 8)
    fast = active(weights, xc_ND, 8, weights.W_enc_MD.bfloat16())
    assert torch.equal(exact.idx_Nk.sort().values, fast.idx_Nk.sort().values)
    by_value = (codes.value_Nk.sort().values for codes in (exact, fast))
    assert torch.allclose(*by_value, atol=1e-5)


class SaeRlModel(nn.Module):
    """sae_rl's SAE, written out as section 1.1 of the reference says."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.b_pre = nn.Parameter(weights.b_pre_D.clone())
        self.encoder, self.decoder = nn.Linear(D, M), nn.Linear(M, D)
        with torch.no_grad():
            self.encoder.weight.copy_(weights.W_enc_MD)
            self.encoder.bias.copy_(weights.b_enc_M)
            self.decoder.weight.copy_(weights.W_dec_MD.T)
            self.decoder.bias.copy_(weights.b_dec_D)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_NM = self.encoder(x_ND - self.b_pre)
        value, idx = z_NM.topk(K)
        zs_NM = torch.zeros_like(z_NM).scatter(1, idx, value)
        return self.decoder(zs_NM), z_NM, zs_NM


def sae_rl_training(
    model: SaeRlModel, x_TD: Tensor, orders: list[Tensor], batch: int
) -> list[float]:
    """sae_rl's loop, literally: DataLoader order given, no resampling."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps = len(orders) * math.ceil(len(x_TD) / batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-4)
    dead_M = torch.zeros(M, dtype=torch.bool)
    losses = []
    for order in orders:
        fired_M, total = torch.zeros(M), 0.0
        for rows in order.split(batch):
            x_ND = x_TD[rows]
            x_hat_ND, z_NM, zs_NM = model(x_ND)
            loss = (x_ND - x_hat_ND).square().mean()
            total += loss.item() * len(rows)
            if dead_M.any():
                k_aux = min(16 * K, int(dead_M.sum()))
                value, idx = z_NM.masked_fill(~dead_M, -math.inf).topk(k_aux)
                z_aux = torch.zeros_like(z_NM).scatter(1, idx, value)
                loss = loss + (x_ND - model.decoder(z_aux)).square().mean() / 32
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.decoder.weight.div_(model.decoder.weight.norm(dim=0, keepdim=True))
            fired_M += (zs_NM != 0).sum(dim=0)
        dead_M = fired_M / len(x_TD) < 1e-4
        losses.append(total / len(x_TD))
    return losses


def planted(
    tokens: int, seed: int = 0, width: int = D, features: int = 24
) -> tuple[Tensor, Tensor]:
    """Activations that are sums of 3 of a hidden dictionary's unit vectors, plus a mean."""
    generator = torch.Generator().manual_seed(seed)
    dictionary_FD = F.normalize(
        torch.randn(features, width, generator=torch.Generator().manual_seed(99)), dim=1
    )
    idx = torch.stack([torch.randperm(features, generator=generator)[:3] for _ in range(tokens)])
    value = 1 + torch.rand(tokens, 3, generator=generator)
    x_TD = (dictionary_FD[idx] * value[:, :, None]).sum(dim=1)
    return x_TD + 0.5, dictionary_FD


def test_mode_sae_rl_is_the_published_loop() -> None:
    """Four epochs with dead features, an incomplete last batch, clipping: the same weights."""
    x_TD, _ = planted(150)
    x_TD = 4 * x_TD
    config = SaeTrainConfig(d_sae=M, k=K, mode="sae_rl", epochs=4, batch_size=32, lr=1e-3, seed=3)
    streams = SeedTree(3)
    weights = fresh_weights(x_TD, config, streams)
    weights.b_enc_M[:20] -= 30  # dead from the start
    model = SaeRlModel(weights)
    orders = [
        torch.randperm(150, generator=streams.generator("sae/order", epoch)) for epoch in range(4)
    ]
    expected = sae_rl_training(model, x_TD, orders, 32)
    trainer = _Trainer(Weights(*(t.clone() for t in weights)), config, x_TD)
    got = [trainer.epoch(x_TD, order) for order in orders]
    assert int(trainer.dead_before_M.sum()) >= 10
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(got, expected, strict=True))
    for ours, theirs in (
        (trainer.weights.W_enc_MD, model.encoder.weight),
        (trainer.weights.b_pre_D, model.b_pre),
        (trainer.weights.W_dec_MD, model.decoder.weight.T),
        (trainer.weights.b_dec_D, model.decoder.bias),
    ):
        assert float((ours - theirs.detach()).abs().max()) < 2e-4


def test_clip_and_schedule_equal_torchs() -> None:
    parameters = [nn.Parameter(torch.zeros_like(t)) for t in random_weights()]
    gradients = Weights(*(t.clone() for t in random_weights()))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    clip_(gradients, 1.0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5)  # pyright: ignore
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=1e-5)
    for step in range(30):
        assert math.isclose(optimizer.param_groups[0]["lr"], cosine_lr(1e-4, step, 30))
        optimizer.step()
        schedule.step()


def test_fresh_weights() -> None:
    x_TD, _ = planted(100)
    published = fresh_weights(x_TD, SaeTrainConfig(M, K, "sae_rl"), SeedTree(0))
    tied = fresh_weights(x_TD, SaeTrainConfig(M, K, "default"), SeedTree(0))
    for weights in (published, tied):
        assert torch.allclose(weights.b_pre_D, x_TD.mean(dim=0), atol=1e-6)
        assert torch.allclose(weights.W_dec_MD.norm(dim=1), torch.ones(M), atol=1e-6)
    assert torch.equal(tied.W_enc_MD, tied.W_dec_MD) and not tied.b_enc_M.any()
    assert float(published.W_enc_MD.abs().max()) <= 1 / math.sqrt(D)  # nn.Linear's bound
    assert math.isclose(float(published.W_enc_MD.std()), 1 / math.sqrt(3 * D), rel_tol=0.1)
    assert float(F.cosine_similarity(published.W_enc_MD, published.W_dec_MD).abs().mean()) < 0.5


def quick(mode: str = "default", **changes: object) -> SaeTrainConfig:
    base = SaeTrainConfig(d_sae=48, k=3, mode=mode, epochs=25, batch_size=64, lr=3e-3)  # pyright: ignore
    return replace(base, **changes)  # pyright: ignore


@pytest.mark.parametrize(("mode", "select"), [("default", "bfloat16"), ("sae_rl", "float32")])
def test_a_planted_dictionary_is_recovered(mode: str, select: str) -> None:
    """24 hidden directions in 16 dimensions; nearly every one has a decoder row on it."""
    x_TD, dictionary_FD = planted(4000)
    trained = train_sae(x_TD, planted(500, seed=1)[0], quick(mode, select=select))
    cosine_FM = dictionary_FD @ trained.sae.W_dec_MD.T
    found = cosine_FM.max(dim=1).values
    assert int((found > 0.95).sum()) >= 20, found
    val = [stats.val_mse for stats in trained.history]
    assert trained.best_epoch == val.index(min(val)) and min(val) < 0.15 * float(x_TD.var())
    assert trained.sae.activation == ("topk" if mode == "sae_rl" else "topk_relu")
    random_FM = dictionary_FD @ F.normalize(draw(48, D, seed=8), dim=1).T
    assert int((random_FM.max(dim=1).values > 0.95).sum()) == 0


def test_the_same_arguments_give_the_same_bits_and_another_seed_others() -> None:
    x_TD, val_TD = planted(600)[0], planted(100, seed=1)[0]
    seen: list[EpochStats] = []
    config = quick(epochs=3)
    one = train_sae(x_TD, val_TD, config, progress=seen.append)
    two = train_sae(x_TD, val_TD, config)
    assert one.sae.sha256() == two.sae.sha256()
    assert one.history == two.history == tuple(seen)
    assert one.sae.sha256() != train_sae(x_TD, val_TD, quick(epochs=3, seed=1)).sae.sha256()
    half = train_sae(x_TD.half(), val_TD.half(), config)
    assert half.history[-1].val_mse == pytest.approx(one.history[-1].val_mse, rel=0.05)


def test_a_warm_start_goes_on_from_its_parent() -> None:
    x_TD, val_TD = planted(1000)[0], planted(200, seed=1)[0]
    parent = train_sae(x_TD, val_TD, quick(epochs=12)).sae
    still = train_sae(x_TD, val_TD, quick(epochs=1, lr=1e-12), parent=parent).sae
    assert torch.allclose(still.W_dec_MD, parent.W_dec_MD, atol=1e-6)
    assert torch.allclose(still.b_pre_D, parent.b_pre_D, atol=1e-6)
    assert still.origin.parent == parent.sha256()
    warm = train_sae(x_TD + 1, val_TD + 1, quick(epochs=1), parent=parent)
    assert not torch.allclose(warm.sae.b_pre_D, x_TD.mean(dim=0) + 1, atol=0.1)
    before = parent.sha256()
    assert before == warm.sae.origin.parent == parent.sha256()  # the parent is left as it was


def test_sae_rl_resamples_once_and_says_which() -> None:
    """20 epochs: after the 10th; the mask is of the SAE that is returned."""
    x_TD, val_TD = planted(300, features=6)[0], planted(100, seed=1, features=6)[0]
    trained = train_sae(x_TD, val_TD, quick("sae_rl", d_sae=200, epochs=20, lr=1e-3))
    resampled = [stats.resampled for stats in trained.history]
    assert resampled[9] > 0 and sum(resampled) == resampled[9]
    after = trained.best_epoch > 9
    assert int(trained.resampled_M.sum()) == (resampled[9] if after else 0)
    assert trained.sae.origin.resampled == tuple(trained.resampled_M.nonzero().flatten().tolist())
    default = train_sae(x_TD, val_TD, quick(d_sae=200, epochs=20, lr=1e-3))
    assert not default.resampled_M.any() and default.sae.origin.resampled == ()


def test_resampling_points_dead_features_at_the_worst_tokens() -> None:
    weights = random_weights()
    before = Weights(*(t.clone() for t in weights))
    x_TD = draw(400, D, seed=6)
    dead_M = torch.zeros(M, dtype=torch.bool)
    dead_M[[2, 40]] = True
    config = SaeTrainConfig(M, K, "sae_rl")
    resample(weights, x_TD, dead_M, config, torch.Generator().manual_seed(0))
    codes = active(before, x_TD - before.b_pre_D, K)
    x_hat = (
        torch.stack(
            [
                sum(v * before.W_dec_MD[i] for i, v in zip(idx.tolist(), value, strict=True))
                for idx, value in zip(codes.idx_Nk, codes.value_Nk, strict=True)
            ]
        )
        + before.b_dec_D
    )
    worst = (x_hat - x_TD).square().mean(dim=1).topk(100).indices
    for feature in (2, 40):
        row_D = weights.W_dec_MD[feature]
        assert torch.equal(row_D, weights.W_enc_MD[feature]) and weights.b_enc_M[feature] == 0
        similar = F.normalize(x_TD, dim=1) @ row_D
        assert float(similar.max()) > 0.99999 and int(similar.argmax()) in worst.tolist()
    alive = ~dead_M
    assert torch.equal(weights.W_enc_MD[alive], before.W_enc_MD[alive])


def test_the_auxiliary_loss_revives_dead_features() -> None:
    """Rows pushed far below the rest come back with aux, and do not without it."""
    x_TD, val_TD = planted(1000)[0], planted(100, seed=1)[0]
    parent = train_sae(x_TD, val_TD, quick(epochs=1)).sae
    b_enc_M = parent.b_enc_M.clone()
    b_enc_M[:24] = -1.0
    parent = replace(parent, b_enc_M=b_enc_M)
    dead = {
        coef: train_sae(x_TD, val_TD, quick(epochs=12, aux_coef=coef, seed=2), parent=parent)
        .history[-1]
        .dead
        for coef in (0.0, 1.0)
    }
    assert dead[1.0] < dead[0.0], dead


def test_bad_input_is_one_clear_error() -> None:
    x_TD, val_TD = planted(100)[0], planted(20, seed=1)[0]
    config = quick(epochs=1)
    bad_TD = x_TD.clone()
    bad_TD[7, 0] = math.inf
    with pytest.raises(
        UserError, match="the training split: NaN or inf in 1 of 100 tokens, .*row 7"
    ):
        train_sae(bad_TD, val_TD, config)
    with pytest.raises(UserError, match="0 to validate on"):
        train_sae(x_TD, val_TD[:0], config)
    with pytest.raises(UserError, match="1 <= k <= d_sae"):
        train_sae(x_TD, val_TD, replace(config, k=49))
    parent = train_sae(x_TD, val_TD, config).sae
    with pytest.raises(UserError, match="has k=3, the training asks for 4"):
        train_sae(x_TD, val_TD, replace(config, k=4), parent=parent)
    with pytest.raises(UserError, match="needs a top-k SAE"):
        other = replace(parent, activation="relu")
        train_sae(x_TD, val_TD, config, parent=other)
    with pytest.raises(UserError, match="diverged in epoch 0"):
        train_sae(x_TD, val_TD, replace(config, lr=1e30))
