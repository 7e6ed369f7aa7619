"""Reductions over the real tokens of a right-padded batch.

Dims: B rollouts, T completion tokens. Masks are bool, True = counts.
All results are float32; whatever lies under a False mask, NaN and inf included, is never read.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def zero_outside(x_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """x in float32 on real tokens, 0 elsewhere; the gradient is exactly 0 outside the mask.

    Example: apply it to log-probs before any loss. A NaN that enters a loss under the mask would
    come back through the gradient as 0 * NaN = NaN, even if the loss is weighted with 0 there.
    """
    return torch.where(mask_BT, x_BT.float(), 0.0)


def masked_sum(x_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """Sum over the real tokens of each rollout; 0 for a rollout without real tokens.
    y[b] = sum_t m[b,t] x[b,t]"""
    return zero_outside(x_BT, mask_BT).sum(dim=1)


def masked_mean(x_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean over all real tokens of the batch; 0 if there are none.
    y = sum_bt m[b,t] x[b,t] / max(1, sum_bt m[b,t])"""
    return zero_outside(x_BT, mask_BT).sum() / mask_BT.sum().clamp(min=1)


def quarter_means(x_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "4"]:
    """Mean over the real tokens in each quarter of their own completion; 0 for an empty quarter.
    Token t (from 0) of a completion of n tokens is in quarter floor(4 t / n)."""
    length_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
    quarter_BT = 4 * torch.arange(mask_BT.shape[1], device=mask_BT.device) // length_B1
    return torch.stack([masked_mean(x_BT, mask_BT & (quarter_BT == q)) for q in range(4)])
