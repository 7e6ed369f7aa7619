"""Per-token log-probs and entropy without ever holding the logits of a whole batch.

Dims: N real completion tokens of a micro-batch, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Float32 logits of one chunk. On a CPU a larger buffer leaves the cache and is paged in anew.
LOGITS_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}


class TokenLogps(NamedTuple):
    """Log-prob of each target and entropy (nats) of its distribution, both [N] float32."""

    logp_N: Float[Tensor, " N"]
    entropy_N: Float[Tensor, " N"]


class HeadConfig(NamedTuple):
    """How hidden states become logits: z = cap * tanh(h W^T / cap) / temperature."""

    temperature: float = 1.0
    softcap: float | None = None  # None: no cap


def head_logits(
    hidden_ND: Float[Tensor, "N D"], weight_VD: Float[Tensor, "V D"], config: HeadConfig
) -> Float[Tensor, "N V"]:
    """Return float32 logits after soft cap and temperature; the product is in the model's dtype."""
    logits_NV = F.linear(hidden_ND.to(weight_VD.dtype), weight_VD).float()
    if config.softcap is not None:
        logits_NV = config.softcap * torch.tanh(logits_NV / config.softcap)
    return logits_NV / config.temperature if config.temperature != 1.0 else logits_NV


class _HeadLogps(torch.autograd.Function):
    """Chunked log-softmax of the head; the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, target_N, config, chunk):
        logp_N = hidden_ND.new_empty(len(target_N), dtype=torch.float32)
        entropy_N, lse_N = torch.empty_like(logp_N), torch.empty_like(logp_N)
        for at in range(0, len(target_N), chunk):
            part = slice(at, at + chunk)
            logits_NV = head_logits(hidden_ND[part], weight_VD, config)
            top_N = logits_NV.amax(-1)
            logits_NV.sub_(top_N[:, None])
            weight_NV = logits_NV.exp()
            sum_N = weight_NV.sum(-1)
            logp_N[part] = logits_NV.gather(1, target_N[part, None])[:, 0] - sum_N.log()
            # H = log sum_v e^z - sum_v p z, with z shifted by its maximum; e^-inf z counts 0.
            mean_N = torch.linalg.vecdot(weight_NV, logits_NV.nan_to_num_(neginf=0.0)) / sum_N
            entropy_N[part] = sum_N.log() - mean_N
            lse_N[part] = top_N + sum_N.log()
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, lse_N, entropy_N)
        ctx.config, ctx.chunk = config, chunk
        ctx.set_materialize_grads(False)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx, grad_logp_N, grad_entropy_N):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_ND, weight_VD, target_N, lse_N, entropy_N = ctx.saved_tensors
        config: HeadConfig = ctx.config
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        for at in range(0, len(target_N), ctx.chunk):
            part = slice(at, at + ctx.chunk)
            logits_NV = head_logits(hidden_ND[part], weight_VD, config)
            slope_NV = None  # d z / d (h W^T), where it is not 1
            if config.softcap is not None:
                slope_NV = 1 - (logits_NV * (config.temperature / config.softcap)).square()
            log_p_NV = logits_NV.sub_(lse_N[part, None])
            # d logp(y) / dz = onehot(y) - p        dH / dz = -p (log p + H)
            factor_N1 = torch.zeros_like(lse_N[part, None])
            if grad_logp_N is not None:
                factor_N1 = grad_logp_N[part, None]
            if grad_entropy_N is not None:
                g_N1 = grad_entropy_N[part, None]
                factor_NV = (log_p_NV + entropy_N[part, None]).mul_(g_N1).add_(factor_N1)
                dz_NV = log_p_NV.exp_().mul_(factor_NV).neg_()
            else:
                dz_NV = log_p_NV.exp_().mul_(-factor_N1)
            if grad_logp_N is not None:
                dz_NV.scatter_add_(1, target_N[part, None], grad_logp_N[part, None])
            if slope_NV is not None:
                dz_NV.mul_(slope_NV)
            dz_NV = dz_NV.div_(config.temperature).to(weight_VD.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = (dz_NV @ weight_VD).to(hidden_ND.dtype)
            if grad_weight_VD is not None:
                grad_weight_VD += (dz_NV.T @ hidden_ND[part].to(weight_VD.dtype)).float()
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight, None, None, None


def token_logps(
    hidden_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    target_N: Int[Tensor, " N"],
    config: HeadConfig,
) -> TokenLogps:
    """Return log-prob and entropy of each target token, differentiable in hidden and weight."""
    chunk = max(1, LOGITS_BYTES[weight_VD.device.type] // (4 * weight_VD.shape[0]))
    return TokenLogps(*_HeadLogps.apply(hidden_ND.contiguous(), weight_VD, target_N, config, chunk))
