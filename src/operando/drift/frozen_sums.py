"""What T checkpoints do with one SAE that is not refitted, on the same tokens.

Nothing is trained, so nothing can drift by itself: a checkpoint equal to the reference gives 0 for
every difference. Feed whole texts, chunk by chunk: `empty_sums`, `add` for each chunk, `finish`.

Dims: T checkpoints, N tokens of a chunk, k active features per token, M features, D width of the
model, G texts. Codes are sparse: idx_TNk, value_TNk; a value of 0 fills an unused place. Statistics
are float64. Drop sink tokens (the same for all checkpoints) before `add`: they own the FVU.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import norm
from torch import Tensor
from torch.nn.functional import embedding_bag

from operando.errors import UserError
from operando.stats.intervals import wilson_limits
from operando.stats.null_arms import Intervals
from operando.stats.tests import benjamini_hochberg

ROWS = 64
"""Tokens whose decoder rows are gathered at once: 64 * k * D floats."""


class FeatureSums(NamedTuple):
    """Sums for each checkpoint and feature.

    Over tokens: `count` (tokens above 0), `act` (activations), `energy` (their squares), `scale`
    (f_j <d_j, y_i> with f of the reference). Over texts: `count2` (count^2), `count_x_length`,
    `delta` (difference of the summed activations to the reference), `delta2` (its square),
    `changed` (texts where it is not 0).

    Example: sums.features.count_TM / sums.num_tokens
    """

    count_TM: Float[Tensor, "T M"]
    act_TM: Float[Tensor, "T M"]
    energy_TM: Float[Tensor, "T M"]
    scale_TM: Float[Tensor, "T M"]
    count2_TM: Float[Tensor, "T M"]
    count_x_length_TM: Float[Tensor, "T M"]
    delta_TM: Float[Tensor, "T M"]
    delta2_TM: Float[Tensor, "T M"]
    changed_TM: Float[Tensor, "T M"]


class CheckpointSums(NamedTuple):
    """Sums for each checkpoint: squared error, activations, squared activations.

    Example: sums.checkpoints.resid_TD / sums.num_tokens
    """

    error_T: Float[Tensor, "T"]
    resid_TD: Float[Tensor, "T D"]
    resid2_T: Float[Tensor, "T"]


class FrozenSums(NamedTuple):
    """All that `finish` needs, over the tokens and texts so far; `length2` is sum of length^2.

    Example: sums = empty_sums(4, 7168, 896, reference=0); sums = add(sums, ...)
    """

    reference: int
    num_tokens: int
    num_texts: int
    length2: float
    features: FeatureSums
    checkpoints: CheckpointSums


class FrozenDiff(NamedTuple):
    """One row per checkpoint, one column per feature; row `reference` has delta 0, p = q = 1.

    `rate` is the share of tokens above 0; `mean_act` the mean over all tokens; `delta_act` its
    difference to the reference; `beta` the latent scaling; `q` Benjamini-Hochberg over all features
    of all other checkpoints. `fvu` and `cosine` (mean activations beside the reference's) are one
    number per checkpoint.

    Example: diff = finish(sums, W_dec_MD); changed_TM = diff.q_TM <= 0.05
    """

    rate_TM: Intervals
    mean_act_TM: Float[Tensor, "T M"]
    delta_act_TM: Float[Tensor, "T M"]
    p_TM: Float[Tensor, "T M"]
    q_TM: Float[Tensor, "T M"]
    beta_TM: Float[Tensor, "T M"]
    fvu_T: Float[Tensor, "T"]
    cosine_T: Float[Tensor, "T"]


def empty_sums(num_checkpoints: int, num_features: int, width: int, reference: int) -> FrozenSums:
    """Return sums over nothing. `reference` is the checkpoint that the others are compared with."""
    assert 0 <= reference < num_checkpoints, f"reference {reference} of {num_checkpoints}"
    shape, f64 = (num_checkpoints, num_features), torch.float64
    return FrozenSums(
        reference,
        num_tokens=0,
        num_texts=0,
        length2=0.0,
        features=FeatureSums(*(torch.zeros(shape, dtype=f64) for _ in FeatureSums._fields)),
        checkpoints=CheckpointSums(
            error_T=torch.zeros(num_checkpoints, dtype=f64),
            resid_TD=torch.zeros(num_checkpoints, width, dtype=f64),
            resid2_T=torch.zeros(num_checkpoints, dtype=f64),
        ),
    )


def add(
    sums: FrozenSums,
    W_dec_MD: Float[Tensor, "M D"],
    b_dec_D: Float[Tensor, "D"],
    resid_TND: Float[Tensor, "T N D"],
    idx_TNk: Int[Tensor, "T N k"],
    value_TNk: Float[Tensor, "T N k"],
    text_N: Int[Tensor, "N"],
) -> FrozenSums:
    """Return the sums with one chunk of tokens added; a text lies wholly in one chunk.

    resid_TND are the activations of each checkpoint on the same token ids, the codes what the one
    SAE makes of them. The target of beta is resid - b_dec.
    """
    T, N, _ = resid_TND.shape
    M, ref = len(W_dec_MD), sums.reference
    assert sums.features.count_TM.shape == (T, M), f"{sums.features.count_TM.shape}, {(T, M)}"
    if not bool(torch.isfinite(resid_TND).all()):
        bad = [t for t in range(T) if not bool(torch.isfinite(resid_TND[t]).all())]
        raise UserError(f"Activations of checkpoint(s) {bad} hold NaN or infinite values.")
    texts, group_N = text_N.cpu().unique(return_inverse=True)
    length_G = torch.bincount(group_N).double()
    new = empty_sums(T, M, resid_TND.shape[2], ref)
    f, c = new.features, new.checkpoints
    cells = [_by_text(idx_TNk[t], value_TNk[t], group_N, M) for t in range(T)]
    for t in range(T):
        feature, text = cells[t].keys % M, cells[t].keys // M
        f.count_TM[t].index_add_(0, feature, cells[t].above)
        f.act_TM[t].index_add_(0, feature, cells[t].act)
        f.energy_TM[t].index_add_(0, feature, cells[t].energy)
        f.count2_TM[t].index_add_(0, feature, cells[t].above.square())
        f.count_x_length_TM[t].index_add_(0, feature, cells[t].above * length_G[text])
        keys, delta = _difference(cells[t], cells[ref])
        f.delta_TM[t].index_add_(0, keys % M, delta)
        f.delta2_TM[t].index_add_(0, keys % M, delta.square())
        f.changed_TM[t].index_add_(0, keys % M, (delta != 0).double())
        recon_ND = reconstruct(W_dec_MD, b_dec_D, idx_TNk[t], value_TNk[t])
        c.error_T[t] = (resid_TND[t].float() - recon_ND).double().square().sum()
    f.scale_TM.copy_(
        scaling_sums(W_dec_MD, idx_TNk[ref], value_TNk[ref], resid_TND.float() - b_dec_D.float())
    )
    c.resid_TD.copy_(resid_TND.double().sum(1))
    c.resid2_T.copy_(resid_TND.double().square().sum((1, 2)))
    return FrozenSums(
        ref,
        num_tokens=sums.num_tokens + N,
        num_texts=sums.num_texts + len(texts),
        length2=sums.length2 + float(length_G.square().sum()),
        features=FeatureSums(*(a + b for a, b in zip(sums.features, f, strict=True))),
        checkpoints=CheckpointSums(*(a + b for a, b in zip(sums.checkpoints, c, strict=True))),
    )


def finish(sums: FrozenSums, W_dec_MD: Float[Tensor, "M D"], level: float = 0.95) -> FrozenDiff:
    """Return the table of all checkpoints and features.

    rate: Wilson's interval with N_eff = N / max(1, var_text / var_binomial), var_text the variance
    of a ratio of sums over texts (Kish 1965): tokens of a text are not independent.
    p: the sign-flip test of the per-text differences s_g, which are symmetric about 0 if nothing
    changed: z = sum s / sqrt(sum s^2), normal, two-sided, and never below 2^(1-n), the smallest p
    that n texts with a difference can give. It is right where many texts of like size differ. Where
    a few equal large differences rule beside many tiny ones it is too small, as the floor counts
    the tiny ones too: with 4, 5 or 8 large and 40 tiny ones p <= 0.05 comes by chance in 13, 6 and
    7 % of cases.
    beta_j(t) = sum_i f_j <d_j, y_i> / (||d_j||^2 sum_i f_j^2), f of the reference (arXiv
    2504.02922); nan for a feature that the reference never uses. fvu = sum ||x - xh||^2 /
    sum ||x - mean(x)||^2, centred per dimension, per checkpoint.
    """
    N, ref, f = sums.num_tokens, sums.reference, sums.features
    assert N > 0, "no tokens were added"
    p_TM = _sign_flip_p(f.delta_TM, f.delta2_TM, f.changed_TM)
    p_TM[ref] = 1.0
    others = torch.arange(len(p_TM)) != ref
    q_TM = torch.ones_like(p_TM)
    q_TM[others] = torch.from_numpy(benjamini_hochberg(p_TM[others].flatten().numpy())).reshape(
        -1, p_TM.shape[1]
    )
    below_M = W_dec_MD.double().cpu().square().sum(1) * f.energy_TM[ref]
    mean_TD = sums.checkpoints.resid_TD / N
    spread_T = sums.checkpoints.resid2_T - N * mean_TD.square().sum(1)
    norm_T = mean_TD.norm(dim=1) * mean_TD[ref].norm()
    return FrozenDiff(
        rate_TM=_rate(sums, level),
        mean_act_TM=f.act_TM / N,
        delta_act_TM=f.delta_TM / N,
        p_TM=p_TM,
        q_TM=q_TM,
        beta_TM=torch.where(below_M > 0, f.scale_TM / below_M, torch.nan),
        fvu_T=sums.checkpoints.error_T / spread_T,
        cosine_T=(mean_TD @ mean_TD[ref]) / norm_T.clamp(min=1e-30),
    )


def reconstruct(
    W_dec_MD: Float[Tensor, "M D"],
    b_dec_D: Float[Tensor, "D"],
    idx_Nk: Int[Tensor, "N k"],
    value_Nk: Float[Tensor, "N k"],
) -> Float[Tensor, "N D"]:
    """Return xh = sum_j f_j d_j + b_dec in float32, O(N k D)."""
    W = W_dec_MD.float()
    bags_ND = embedding_bag(idx_Nk.long(), W, per_sample_weights=value_Nk.float(), mode="sum")
    return bags_ND + b_dec_D.float()


def scaling_sums(
    W_dec_MD: Float[Tensor, "M D"],
    idx_Nk: Int[Tensor, "N k"],
    value_Nk: Float[Tensor, "N k"],
    target_TND: Float[Tensor, "T N D"],
) -> Float[Tensor, "T M"]:
    """Return sum_i f_j(i) <d_j, y_i>, the numerator of beta, for any targets y; O(T N k D).

    Dots are float32, sums float64. Other targets of arXiv 2504.02922 (error, reconstruction) go
    in here.
    """
    W, M, T = W_dec_MD.float(), len(W_dec_MD), len(target_TND)
    sums_TM = torch.zeros(T, M, dtype=torch.float64, device=W.device)
    for i in range(0, len(idx_Nk), ROWS):
        idx, value = idx_Nk[i : i + ROWS].long(), value_Nk[i : i + ROWS].float()
        y = target_TND[:, i : i + ROWS].float()
        dots = torch.einsum("nkd,tnd->tnk", W[idx], y) * value
        sums_TM.index_add_(1, idx.flatten(), dots.flatten(1).double())
    return sums_TM


class _TextCells(NamedTuple):
    """Sums over the tokens of a text; key = text * M + feature, sorted, each once."""

    keys: Int[Tensor, "K"]
    above: Float[Tensor, "K"]
    act: Float[Tensor, "K"]
    energy: Float[Tensor, "K"]


class _Differences(NamedTuple):
    """Differences of activations, key = text * M + feature."""

    keys: Int[Tensor, "K"]
    delta: Float[Tensor, "K"]


def _by_text(
    idx_Nk: Int[Tensor, "N k"],
    value_Nk: Float[Tensor, "N k"],
    group_N: Int[Tensor, "N"],
    num_features: int,
) -> _TextCells:
    value = value_Nk.double().cpu().flatten()
    key = (group_N[:, None] * num_features + idx_Nk.long().cpu()).flatten()[value != 0]
    value = value[value != 0]
    keys, place = key.unique(return_inverse=True)
    zeros = torch.zeros(len(keys), dtype=torch.float64)
    parts = ((value > 0).double(), value, value.square())
    return _TextCells(keys, *(zeros.index_add(0, place, part) for part in parts))


def _difference(a: _TextCells, b: _TextCells) -> _Differences:
    """Return activations of a minus those of b, over the keys of either."""
    keys, place = torch.cat([a.keys, b.keys]).unique(return_inverse=True)
    zeros = torch.zeros(len(keys), dtype=torch.float64)
    return _Differences(keys, zeros.index_add(0, place, torch.cat([a.act, -b.act])))


def _sign_flip_p(
    sum_TM: Float[Tensor, "T M"], square_TM: Float[Tensor, "T M"], changed_TM: Float[Tensor, "T M"]
) -> Float[Tensor, "T M"]:
    z_TM = sum_TM.abs() / square_TM.sqrt().clamp(min=1e-300)
    normal_TM = torch.from_numpy(np.asarray(2 * norm.sf(z_TM.numpy()), dtype=np.float64))
    floor_TM = torch.exp2(1.0 - changed_TM)
    return torch.maximum(normal_TM, floor_TM).clamp(max=1.0)


def _rate(sums: FrozenSums, level: float) -> Intervals:
    N, G, f = sums.num_tokens, sums.num_texts, sums.features
    p = f.count_TM / N
    spread = f.count2_TM - 2 * p * f.count_x_length_TM + p * p * sums.length2
    var_text = spread.clamp(min=0.0) * (G / max(G - 1, 1)) / N**2
    var_binomial = p * (1 - p) / N
    effect = torch.where(var_binomial > 0, var_text / var_binomial, 1.0).clamp(min=1.0)
    low, high = wilson_limits(p.numpy(), (N / effect).numpy(), level)
    return Intervals(p, torch.from_numpy(low), torch.from_numpy(high))
