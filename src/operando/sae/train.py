"""Training a top-k SAE on activations held in memory, with the gradients of `sae/step.py`.

Shape legend: N tokens of a batch, T all, D d_in, M d_sae, k active features, d dead ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from operando.errors import UserError
from operando.run import SeedTree
from operando.sae.quality import mean_activation, typical_variance
from operando.sae.sae import SAE, Origin, check_activations, chunks, weighted_rows
from operando.sae.step import Aux, Step, Weights, active, sparse_step

RESAMPLE_EVERY = 10  # epochs; mode sae_rl
RESAMPLE_DRAWS = 8192
DEAD_RATE = 1e-4  # mode sae_rl: dead is a firing frequency below this over the previous epoch


@dataclass(frozen=True)
class SaeTrainConfig:
    """How one SAE is trained.

    sae_rl   as OhhMoo/SAE-RL: raw signed top-k, untied nn.Linear init, aux on the input, one
             resample after epoch 10 of 20, loss = mse + aux_coef * aux
    default  as Gao et al. (2406.04093): relu after top-k, tied init, aux on the detached residual,
             gradient along decoder rows removed, no resampling

    Example: SaeTrainConfig(d_sae=7168, k=64, mode="sae_rl", seed=0)
    """

    d_sae: int
    k: int
    mode: Literal["sae_rl", "default"] = "default"
    epochs: int = 20
    batch_size: int = 512
    lr: float = 1e-4
    aux_coef: float = 1 / 32
    clip: float = 1.0
    seed: int = 0
    select: Literal["float32", "bfloat16"] = "float32"  # bfloat16: preselect, then exact values

    def aux_k(self, d_in: int) -> int:
        """Return how many dead features per token use: 16 k (sae_rl) or d_in / 2 (Gao et al.)."""
        return 16 * self.k if self.mode == "sae_rl" else max(1, d_in // 2)


class EpochStats(NamedTuple):
    """One line of the training history; `dead` is the share of features that count as dead.

    Example: EpochStats(epoch=0, loss=0.31, val_mse=0.28, dead=0.02, lr=9.9e-5, resampled=0)
    """

    epoch: int
    loss: float
    val_mse: float
    dead: float
    lr: float
    resampled: int


@dataclass(frozen=True)
class Trained:
    """The SAE of the best epoch, and how it came about.

    `resampled_M` is True for the features of this SAE whose index was given to a new direction
    in this training; drift must leave them out.

    Example: trained = train_sae(train_TD, val_TD, config, parent=sae); trained.sae
    """

    sae: SAE
    history: tuple[EpochStats, ...]
    best_epoch: int
    resampled_M: Bool[Tensor, "M"]


def train_sae(
    train_TD: Float[Tensor, "T D"],
    val_TD: Float[Tensor, "V D"],
    config: SaeTrainConfig,
    parent: SAE | None = None,
    origin: Origin | None = None,
    progress: Callable[[EpochStats], None] | None = None,
) -> Trained:
    """Return the SAE of the epoch with the lowest validation error.

    The activations may be float16 or bfloat16; a batch is cast to float32. The same arguments give
    the same bits on one CPU. A parent is gone on from, b_pre included; the optimizer is fresh.
    """
    _check(train_TD, val_TD, config, parent)
    streams = SeedTree(config.seed)
    device = train_TD.device
    as_published = config.mode == "sae_rl"
    fresh = fresh_weights(train_TD, config, streams) if parent is None else _from(parent)
    weights = Weights(*(tensor.to(device) for tensor in fresh))
    trainer = _Trainer(weights, config, train_TD)
    history: list[EpochStats] = []
    best: tuple[float, int, Weights, Tensor] | None = None
    resampled_M = torch.zeros(config.d_sae, dtype=torch.bool, device=device)
    for epoch in range(config.epochs):
        order_T = torch.randperm(train_TD.shape[0], generator=streams.generator("sae/order", epoch))
        loss = trainer.epoch(train_TD, order_T.to(device))
        val_mse = mean_squared_error(weights, val_TD, config)
        if not math.isfinite(loss + val_mse):
            raise UserError(f"SAE training diverged in epoch {epoch}: loss {loss}; lower lr")
        if best is None or val_mse < best[0]:
            kept = Weights(*(tensor.clone() for tensor in weights))
            best = (val_mse, epoch, kept, resampled_M.clone())
        dead_M = trainer.dead()
        now = as_published and (epoch + 1) % RESAMPLE_EVERY == 0 and epoch < config.epochs - 1
        if now and bool(dead_M.any()):
            resample(weights, train_TD, dead_M, config, streams.generator("sae/resample", epoch))
            resampled_M |= dead_M
        stats = EpochStats(
            epoch, loss, val_mse, float(dead_M.float().mean()), trainer.lr,
            int(dead_M.sum()) if now else 0,
        )  # fmt: skip
        history.append(stats)
        if progress is not None:
            progress(stats)
    assert best is not None
    _, best_epoch, kept, mask_M = best
    origin = origin or Origin()
    origin = replace(
        origin,
        parent=parent.sha256() if parent is not None else origin.parent,
        resampled=tuple(mask_M.nonzero().flatten().tolist()),
    )
    activation = "topk" if as_published else "topk_relu"
    sae = SAE(*kept, activation=activation, k=config.k, origin=origin)
    return Trained(sae, tuple(history), best_epoch, mask_M)


def _check(train_TD: Tensor, val_TD: Tensor, config: SaeTrainConfig, parent: SAE | None) -> None:
    D = train_TD.shape[1]
    if train_TD.shape[0] < 1 or val_TD.shape[0] < 1:
        raise UserError(
            f"an SAE needs activations: {train_TD.shape[0]} to train on, {val_TD.shape[0]} to "
            "validate on"
        )
    if config.epochs < 1 or config.batch_size < 1 or not 1 <= config.k <= config.d_sae:
        raise UserError(f"expected epochs, batch_size >= 1 and 1 <= k <= d_sae, given {config}")
    if parent is not None:
        if parent.activation not in ("topk", "topk_relu"):
            raise UserError(f"a warm start needs a top-k SAE, the parent is {parent.activation!r}")
        for name, own, asked in (
            ("d_in", parent.d_in, D), ("d_sae", parent.d_sae, config.d_sae),
            ("k", parent.k, config.k),
        ):  # fmt: skip
            if own != asked:
                raise UserError(f"the parent SAE has {name}={own}, the training asks for {asked}")
    check_activations(train_TD, D, "the training split")
    check_activations(val_TD, D, "the validation split")


def fresh_weights(
    train_TD: Float[Tensor, "T D"], config: SaeTrainConfig, streams: SeedTree
) -> Weights:
    """Return new weights: b_pre the mean activation, decoder rows of norm 1.

    sae_rl: nn.Linear's own init for both layers, encoder and decoder independent.
    default: random decoder directions, the encoder equal to them, b_enc 0, b_dec the mean too.
    """
    D, M = train_TD.shape[1], config.d_sae
    mean_D = mean_activation(train_TD).cpu()
    generator = streams.generator("sae/init")
    if config.mode == "default":
        rows_MD = F.normalize(torch.randn(M, D, generator=generator), dim=1)
        return Weights(rows_MD.clone(), torch.zeros(M), rows_MD, mean_D, mean_D.clone())

    def uniform(bound: float, *shape: int) -> Tensor:
        return torch.empty(*shape).uniform_(-bound, bound, generator=generator)

    in_bound, out_bound = 1 / math.sqrt(D), 1 / math.sqrt(M)
    W_enc_MD, b_enc_M = uniform(in_bound, M, D), uniform(in_bound, M)
    W_dec_MD, b_dec_D = uniform(out_bound, M, D), uniform(out_bound, D)
    return Weights(W_enc_MD, b_enc_M, F.normalize(W_dec_MD, dim=1), mean_D, b_dec_D)


def _from(parent: SAE) -> Weights:
    """Return the parent's weights; decoder norms that are not 1 are folded into the encoder."""
    W_enc_MD, b_enc_M, W_dec_MD = parent.W_enc_MD, parent.b_enc_M, parent.W_dec_MD
    norm_M = W_dec_MD.norm(dim=1)
    if float((norm_M - 1).abs().max()) > 1e-4:
        W_enc_MD, b_enc_M = W_enc_MD * norm_M[:, None], b_enc_M * norm_M
        W_dec_MD = W_dec_MD / norm_M[:, None]
    parts = (W_enc_MD, b_enc_M, W_dec_MD, parent.b_pre_D, parent.b_dec_D)
    return Weights(*(tensor.detach().clone() for tensor in parts))


class _Trainer:
    """Weights, Adam and the firing counts of one SAE."""

    def __init__(self, weights: Weights, config: SaeTrainConfig, train_TD: Tensor) -> None:
        T, D = train_TD.shape
        self.weights, self.config, self.tokens = weights, config, T
        self.lr = config.lr
        self.steps = config.epochs * math.ceil(T / config.batch_size)
        self.step_number = 0
        self.adam = torch.optim.Adam(list(weights), lr=config.lr, fused=True)
        self.aux_k = config.aux_k(D)
        self.variance = 1.0
        if config.mode == "default":
            self.variance = typical_variance(
                train_TD, mean_activation(train_TD).to(train_TD.device)
            )
        M = config.d_sae
        self.fired_M = torch.zeros(M, dtype=torch.int64, device=train_TD.device)
        self.silent_M = torch.zeros(M, dtype=torch.int64, device=train_TD.device)
        self.dead_before_M = torch.zeros(M, dtype=torch.bool, device=train_TD.device)
        self.W_enc_bf16 = weights.W_enc_MD.bfloat16() if config.select == "bfloat16" else None

    def epoch(self, train_TD: Tensor, order_T: Tensor) -> float:
        """Train on every token once, in this order, and return the mean loss without aux."""
        if self.config.mode == "sae_rl" and self.step_number:
            self.dead_before_M = self.dead()
        self.fired_M.zero_()
        total = torch.zeros((), dtype=torch.float64, device=train_TD.device)
        for rows_N in order_T.split(self.config.batch_size):
            step = self.step(train_TD.index_select(0, rows_N).float())
            total += step.loss.double() * len(rows_N)
        return float(total) / len(order_T)

    def dead(self) -> Bool[Tensor, "M"]:
        """Return the dead features: by the epoch's frequency (sae_rl), or silent for one pass."""
        if self.config.mode == "sae_rl":
            return self.fired_M < DEAD_RATE * self.tokens
        return self.silent_M >= self.tokens

    def step(self, x_ND: Float[Tensor, "N D"]) -> Step:
        """Take one optimizer step: gradients, clip, Adam, decoder rows back to norm 1."""
        config, weights = self.config, self.weights
        as_published = config.mode == "sae_rl"
        dead_d = (self.dead_before_M if as_published else self.dead()).nonzero().flatten()
        kind = "input" if as_published else "residual"
        aux = Aux(kind, dead_d, self.aux_k, config.aux_coef) if len(dead_d) else None
        if self.W_enc_bf16 is not None:
            self.W_enc_bf16.copy_(weights.W_enc_MD)
        step = sparse_step(
            weights, x_ND, config.k, not as_published, self.variance, aux, self.W_enc_bf16
        )  # fmt: skip
        if not as_published:  # rows have norm 1, so the part along them is <dW, W> W
            step.gradients.W_dec_MD.addcmul_(weights.W_dec_MD, step.along_M[:, None], value=-1)
        clip_(step.gradients, config.clip)
        self.lr = cosine_lr(config.lr, self.step_number, self.steps)
        self.adam.param_groups[0]["lr"] = self.lr
        for tensor, gradient in zip(weights, step.gradients, strict=True):
            tensor.grad = gradient
        self.adam.step()
        weights.W_dec_MD.div_(weights.W_dec_MD.norm(dim=1, keepdim=True).clamp_(min=1e-8))
        self.step_number += 1
        self.fired_M += step.fired_M
        self.silent_M += len(x_ND)
        self.silent_M.masked_fill_(step.fired_M > 0, 0)
        return step


def cosine_lr(lr: float, step: int, steps: int) -> float:
    """Return lr/10 + (lr - lr/10) (1 + cos(pi step / steps)) / 2."""
    low = lr / 10
    return low + (lr - low) * (1 + math.cos(math.pi * step / steps)) / 2


def clip_(gradients: Weights, limit: float) -> None:
    """Scale the gradients to a norm of at most `limit`: min(1, limit / (norm + 1e-6))."""
    norms = torch.stack([gradient.norm() for gradient in gradients])
    scale = limit / (float(norms.norm()) + 1e-6)
    if scale < 1:
        for gradient in gradients:
            gradient.mul_(scale)


def mean_squared_error(
    weights: Weights, x_TD: Float[Tensor, "T D"], config: SaeTrainConfig
) -> float:
    """Return mean((x - x_hat)^2) over all elements, in float32 throughout."""
    total = torch.zeros((), dtype=torch.float64, device=x_TD.device)
    for x_nD in chunks(x_TD, config.d_sae):
        total += _errors(weights, x_nD.float(), config).double().sum()
    return float(total) / x_TD.shape[0]


def _errors(weights: Weights, x_ND: Tensor, config: SaeTrainConfig) -> Tensor:
    """Return the mean squared error of each token."""
    idx_Nk, value_Nk = active(weights, x_ND - weights.b_pre_D, config.k)
    if config.mode == "default":
        value_Nk = value_Nk.relu()
    sum_ND = weighted_rows(idx_Nk, weights.W_dec_MD, value_Nk)
    return (sum_ND + weights.b_dec_D - x_ND).square().mean(dim=1)


def resample(
    weights: Weights,
    train_TD: Float[Tensor, "T D"],
    dead_M: Bool[Tensor, "M"],
    config: SaeTrainConfig,
    generator: torch.Generator,
) -> None:
    """Point dead features, in place, at tokens that are reconstructed badly (sae_rl's rule).

    Of 8192 drawn tokens the worst quarter are candidates, one drawn per dead feature; its direction
    u = x / |x| (not x - b_pre) becomes encoder and decoder row, b_enc 0; Adam's moments stay.
    """
    rows_R = torch.randperm(train_TD.shape[0], generator=generator)[:RESAMPLE_DRAWS]
    x_RD = train_TD.index_select(0, rows_R.to(train_TD.device)).float()
    errors_R = torch.cat([_errors(weights, x_nD, config) for x_nD in chunks(x_RD, config.d_sae)])
    worst = errors_R.topk(max(1, len(rows_R) // 4)).indices
    dead_d = dead_M.nonzero().flatten()
    drawn_d = torch.randint(len(worst), (len(dead_d),), generator=generator).to(worst.device)
    u_dD = F.normalize(x_RD[worst[drawn_d]], dim=1)
    weights.W_enc_MD[dead_d] = u_dD
    weights.W_dec_MD[dead_d] = u_dD
    weights.b_enc_M[dead_d] = 0
