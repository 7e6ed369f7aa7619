"""The gradients of one batch of a top-k SAE, exact and sparse.

Shape legend: N tokens of a batch, D d_in, M d_sae, k active features, d dead ones.

A dense step is six products of N x D x M. Here one is left, the encoder's; the rest touches only
the k active features of a token:
    x_hat     embedding_bag over rows of W_dec
    d value   the gradient of embedding_bag by its weights: <g_n, W_dec[idx]>
    d W       embedding_bag over tokens, sorted by feature; the offsets count the firings
    d b_pre   - d b_enc @ W_enc, because z depends on b_pre through W_enc alone
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from operando.sae.sae import Codes, blocked_product, row_products, top_codes

MARGIN = 16  # candidates beyond k that the bfloat16 pass hands to the exact float32 pass


class Weights(NamedTuple):
    """The trained tensors; also the shape of their gradients.

    Example: Weights(W_enc_MD, b_enc_M, W_dec_MD, b_pre_D, b_dec_D)
    """

    W_enc_MD: Float[Tensor, "M D"]
    b_enc_M: Float[Tensor, "M"]
    W_dec_MD: Float[Tensor, "M D"]
    b_pre_D: Float[Tensor, "D"]
    b_dec_D: Float[Tensor, "D"]


class Aux(NamedTuple):
    """The auxiliary term of one step, on the features that are dead.

    Example: Aux(kind="residual", dead_d=tensor([3, 17]), k=448, coef=1 / 32)
    """

    kind: Literal["input", "residual"]
    dead_d: Int64[Tensor, "d"]
    k: int
    coef: float


class Step(NamedTuple):
    """What one batch gives: gradients, the two losses, and how often each feature fired.

    Example: step = sparse_step(weights, x_ND, k=64); step.loss
    """

    gradients: Weights
    loss: Float[Tensor, ""]
    aux: Float[Tensor, ""]
    fired_M: Int64[Tensor, "M"]
    along_M: Float[Tensor, "M"]  # <dW_dec[m], W_dec[m]>


def sparse_step(
    weights: Weights,
    x_ND: Float[Tensor, "N D"],
    k: int,
    relu: bool = False,
    variance: float = 1.0,
    aux: Aux | None = None,
    W_enc_bf16_MD: Tensor | None = None,
) -> Step:
    """Return the gradients of mean((x - x_hat)^2) / variance + aux.coef * aux, equal to autograd's.

    aux "input"     mean((x - a W_dec - b_dec)^2)   (sae_rl's)
    aux "residual"  mean((e - a W_dec)^2) / mean((e - mean_n e)^2), e = x - x_hat detached (Gao et
                    al. 2406.04093, normalised as in their code); a: the dead features' own top k.
    Deviation from Gao et al.: the main loss is divided by one `variance` for the whole data.
    """
    N, D = x_ND.shape
    M = weights.W_dec_MD.shape[0]
    xc_ND = x_ND - weights.b_pre_D
    idx_Nk, z_Nk = active(weights, xc_ND, k, W_enc_bf16_MD)
    value_Nk = z_Nk.relu() if relu else z_Nk
    with torch.enable_grad():  # embedding_bag's own gradient by its weights is the SDDMM
        leaf_Nk = value_Nk.detach().requires_grad_()
        sum_ND = F.embedding_bag(
            idx_Nk, weights.W_dec_MD.detach(), per_sample_weights=leaf_Nk, mode="sum"
        )
    error_ND = sum_ND.detach() + weights.b_dec_D - x_ND
    loss = error_ND.square().mean() / variance
    g_ND = error_ND * (2 / (N * D * variance))
    (dvalue_Nk,) = torch.autograd.grad(sum_ND, leaf_Nk, g_ND)
    along_Nk = dvalue_Nk * value_Nk
    if relu:
        dvalue_Nk = dvalue_Nk * (value_Nk > 0)
    flat, order = idx_Nk.flatten().sort(stable=True)
    picked_M = torch.bincount(flat, minlength=M)
    offsets_M = (picked_M.cumsum(0) - picked_M).int()
    token = (order // k).int()

    def by_feature(rows_ND: Tensor, weight_Nk: Tensor) -> Tensor:
        sorted_weight = weight_Nk.flatten()[order]
        return F.embedding_bag(
            token, rows_ND, offsets_M, mode="sum", per_sample_weights=sorted_weight
        )

    def total(weight_Nk: Tensor) -> Tensor:
        return torch.bincount(idx_Nk.flatten(), weights=weight_Nk.flatten(), minlength=M)

    dW_dec_MD, dW_enc_MD = by_feature(g_ND, value_Nk), by_feature(xc_ND, dvalue_Nk)
    db_enc_M, along_M = total(dvalue_Nk), total(along_Nk)
    db_dec_D = g_ND.sum(dim=0)
    aux_loss = x_ND.new_zeros(())
    if aux is not None:
        part = _aux_step(weights, x_ND, xc_ND, -error_ND, aux, relu)
        aux_loss, dead_d = part.loss, aux.dead_d
        dW_dec_MD.index_add_(0, dead_d, part.dW_dec_dD)
        dW_enc_MD.index_add_(0, dead_d, part.dW_enc_dD)
        db_enc_M.index_add_(0, dead_d, part.db_enc_d)
        along_M.index_add_(0, dead_d, (part.dW_dec_dD * weights.W_dec_MD[dead_d]).sum(dim=1))
        db_dec_D = db_dec_D + part.db_dec_D
    db_pre_D = -blocked_product(db_enc_M, weights.W_enc_MD)
    gradients = Weights(dW_enc_MD, db_enc_M, dW_dec_MD, db_pre_D, db_dec_D)
    fired_M = torch.bincount(idx_Nk[value_Nk > 0], minlength=M) if relu else picked_M
    return Step(gradients, loss, aux_loss, fired_M, along_M)


def active(
    weights: Weights, xc_ND: Float[Tensor, "N D"], k: int, W_enc_bf16_MD: Tensor | None = None
) -> Codes:
    """Return the k largest z = W_enc xc + b_enc of each token, raw.

    With a bfloat16 copy of W_enc: its product proposes k + MARGIN features, whose z is computed
    again in float32 and ranked. The values are exact; a feature is missed only if bfloat16 ranks
    it MARGIN places too low.
    """
    M = weights.W_enc_MD.shape[0]
    if W_enc_bf16_MD is None or k + MARGIN > M:
        return top_codes(torch.addmm(weights.b_enc_M, xc_ND, weights.W_enc_MD.T), k)
    bias_M = weights.b_enc_M.bfloat16()
    z_NM = torch.addmm(bias_M, xc_ND.bfloat16(), W_enc_bf16_MD.T)
    idx_NK = top_codes(z_NM, k + MARGIN).idx_Nk
    z_NK = row_products(idx_NK, weights.W_enc_MD, xc_ND) + weights.b_enc_M[idx_NK]
    value_Nk, at_Nk = z_NK.topk(k, dim=1, sorted=False)
    return Codes(idx_NK.gather(1, at_Nk), value_Nk)


class _AuxGradients(NamedTuple):
    loss: Tensor
    dW_enc_dD: Tensor
    db_enc_d: Tensor
    dW_dec_dD: Tensor
    db_dec_D: Tensor


def _aux_step(
    weights: Weights, x_ND: Tensor, xc_ND: Tensor, e_ND: Tensor, aux: Aux, relu: bool
) -> _AuxGradients:
    """Return the auxiliary loss and aux.coef times its gradients, on rows of dead features."""
    N, D = x_ND.shape
    W_enc_dD, W_dec_dD = weights.W_enc_MD[aux.dead_d], weights.W_dec_MD[aux.dead_d]
    z_Nd = torch.addmm(weights.b_enc_M[aux.dead_d], xc_ND, W_enc_dD.T)
    kept_Nd = torch.ones_like(z_Nd, dtype=torch.bool)
    if aux.k < len(aux.dead_d):
        top_Nk = z_Nd.topk(aux.k, dim=1, sorted=False).indices
        kept_Nd = torch.zeros_like(kept_Nd).scatter_(1, top_Nk, True)
    if relu:
        kept_Nd = kept_Nd & (z_Nd > 0)
    a_Nd = z_Nd * kept_Nd
    if aux.kind == "input":
        gap_ND = a_Nd @ W_dec_dD + weights.b_dec_D - x_ND
        norm = 1.0
    else:
        gap_ND = a_Nd @ W_dec_dD - e_ND
        norm = max(float((e_ND - e_ND.mean(dim=0)).square().mean()), 1e-30)
    g_ND = gap_ND * (2 * aux.coef / (N * D * norm))
    dz_Nd = (g_ND @ W_dec_dD.T) * kept_Nd
    db_dec_D = g_ND.sum(dim=0) if aux.kind == "input" else torch.zeros_like(weights.b_dec_D)
    return _AuxGradients(
        gap_ND.square().mean() / norm, dz_Nd.T @ xc_ND, dz_Nd.sum(dim=0), a_Nd.T @ g_ND, db_dec_D
    )
