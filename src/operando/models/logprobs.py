"""Per-token log-probs and entropy without ever holding the logits of a whole batch.

Dims: N real completion tokens of a micro-batch, D d_model, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

LOGITS_BYTES = 64 * 2**20  # a chunk of float32 logits, per buffer


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
            lse_N[part] = logits_NV.logsumexp(-1)
            logp_N[part] = logits_NV.gather(1, target_N[part, None])[:, 0] - lse_N[part]
            p_NV = (logits_NV - lse_N[part, None]).exp_()
            entropy_N[part] = lse_N[part] - torch.einsum("nv,nv->n", p_NV, logits_NV)
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
            log_p_NV = logits_NV - lse_N[part, None]
            p_NV = log_p_NV.exp()
            dz_NV = torch.zeros_like(p_NV)
            if grad_logp_N is not None:
                # d logp(y) / dz = onehot(y) - p
                dz_NV.addcmul_(p_NV, grad_logp_N[part, None], value=-1)
                dz_NV.scatter_add_(1, target_N[part, None], grad_logp_N[part, None])
            if grad_entropy_N is not None:
                # dH / dz = -p (log p + H)
                slope_NV = p_NV * (log_p_NV + entropy_N[part, None])
                dz_NV.addcmul_(slope_NV, grad_entropy_N[part, None], value=-1)
            if config.softcap is not None:
                capped_NV = logits_NV * config.temperature / config.softcap
                dz_NV *= 1 - capped_NV.square()
            dz_NV /= config.temperature
            dz_NV = dz_NV.to(weight_VD.dtype)
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
    chunk = max(1, LOGITS_BYTES // (4 * weight_VD.shape[0]))
    return TokenLogps(*_HeadLogps.apply(hidden_ND.contiguous(), weight_VD, target_N, config, chunk))
