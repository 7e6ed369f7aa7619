"""The inner operations of decoding: plain torch on a CPU, Triton on a CUDA device.

Dims: B rows being decoded, H query heads, K key-value heads (and blocks of the vocabulary),
S cache length, T positions of the rotary table, d head width, V vocabulary.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CDF_BLOCK = 256  # tokens of one block in the two-level CDF
HAS_TRITON = importlib.util.find_spec("triton") is not None


def fuses(device: torch.device, head_dim: int) -> bool:
    """Return whether the Triton kernels run here: on CUDA, for heads of 16, 32, 64, 128 or 256."""
    return device.type == "cuda" and HAS_TRITON and head_dim in (16, 32, 64, 128, 256)


def rotate_into(
    q_BHd: Float[Tensor, "B H d"],
    k_BKd: Float[Tensor, "B K d"],
    v_BKd: Float[Tensor, "B K d"],
    keys_BKSd: Float[Tensor, "B K S d"],
    values_BKSd: Float[Tensor, "B K S d"],
    cos_Td: Float[Tensor, "T d"],
    sin_Td: Float[Tensor, "T d"],
    position_B: Int[Tensor, " B"],
) -> Float[Tensor, "B H d"]:
    """Return the queries turned by their position; the turned keys and the values join the caches.

    The queries may be overwritten.
    """
    if fuses(q_BHd.device, q_BHd.shape[2]):
        from operando.rollout import triton_kernels

        return triton_kernels.rotate_into(
            q_BHd, k_BKd, v_BKd, keys_BKSd, values_BKSd, cos_Td, sin_Td, position_B
        )
    cos_B1d, sin_B1d = cos_Td[position_B][:, None], sin_Td[position_B][:, None]
    every_B = torch.arange(len(position_B), device=position_B.device)
    keys_BKSd[every_B, :, position_B] = rotate(k_BKd, cos_B1d, sin_B1d)
    values_BKSd[every_B, :, position_B] = v_BKd
    return rotate(q_BHd, cos_B1d, sin_B1d)


def rotate(
    x_BHd: Float[Tensor, "B H d"], cos_B1d: Float[Tensor, "B 1 d"], sin_B1d: Float[Tensor, "B 1 d"]
) -> Float[Tensor, "B H d"]:
    """Return x turned by its position (rotary embedding, 2104.09864, half-split form)."""
    first, second = x_BHd.chunk(2, dim=-1)
    return x_BHd * cos_B1d + torch.cat((-second, first), dim=-1) * sin_B1d


def attend(
    q_BHd: Float[Tensor, "B H d"],
    keys_BKSd: Float[Tensor, "B K S d"],
    values_BKSd: Float[Tensor, "B K S d"],
    position_B: Int[Tensor, " B"],
    length: int,
) -> Float[Tensor, "B H d"]:
    """Return what each row's queries read of its cache, up to and with its own position.

    `length` bounds every position: no more of the caches is looked at than that.
    """
    if fuses(q_BHd.device, q_BHd.shape[2]):
        from operando.rollout import triton_kernels

        return triton_kernels.attend(q_BHd, keys_BKSd, values_BKSd, position_B)
    num_rows, heads, d = q_BHd.shape
    kv_heads = keys_BKSd.shape[1]
    unseen_BS = torch.arange(length, device=q_BHd.device) > position_B[:, None]
    mask_BS = torch.zeros_like(unseen_BS, dtype=q_BHd.dtype).masked_fill(unseen_BS, -torch.inf)
    # The query heads that share a key-value head stand where query positions would.
    attended = F.scaled_dot_product_attention(
        q_BHd.reshape(num_rows, kv_heads, heads // kv_heads, d),
        keys_BKSd[:, :, :length],
        values_BKSd[:, :, :length],
        attn_mask=mask_BS[:, None, None],
    )
    return attended.reshape(num_rows, heads, d)


def pick(
    logits_BV: Float[Tensor, "B V"], u_B: Float[Tensor, " B"] | None, temperature: float = 1.0
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Return one token per row by inverse CDF of its uniform (None: the argmax), and its log-prob.

    The logits may be in any dtype; they are divided by the temperature in float32. The CDF is taken
    in two levels, over blocks of the vocabulary and then inside one block, in float64: in float32
    the tail of a large vocabulary would be rounded away.
    """
    vocab = logits_BV.shape[1]
    top_B1, sum_BK = _block_sums(logits_BV, temperature)
    if u_B is None:
        token_B = logits_BV.argmax(-1)
    else:
        cdf_BK = sum_BK.cumsum(-1)
        target_B1 = u_B.double()[:, None] * cdf_BK[:, -1:]
        block_B1 = torch.searchsorted(cdf_BK, target_B1, right=True).clamp(max=sum_BK.shape[1] - 1)
        below_B1 = cdf_BK.gather(1, block_B1) - sum_BK.gather(1, block_B1)
        at_Bv = block_B1 * CDF_BLOCK + torch.arange(CDF_BLOCK, device=block_B1.device)
        inside_Bv = _scaled(logits_BV.gather(1, at_Bv.clamp(max=vocab - 1)), temperature)
        weight_Bv = (inside_Bv - top_B1).exp_().masked_fill_(at_Bv >= vocab, 0.0)
        cdf_Bv = weight_Bv.cumsum(-1, dtype=torch.float64)
        # Rounding must not push the target past the block's last token that can be drawn.
        target_B1 = torch.minimum(target_B1 - below_B1, cdf_Bv[:, -1:] * (1 - 1e-12))
        place_B1 = torch.searchsorted(cdf_Bv, target_B1, right=True)
        token_B = (block_B1 * CDF_BLOCK + place_B1)[:, 0].clamp(max=vocab - 1)
    chosen_B1 = _scaled(logits_BV.gather(1, token_B[:, None]), temperature)
    logp_B = (chosen_B1 - top_B1)[:, 0] - sum_BK.sum(-1).log().float()
    return token_B, logp_B


def _block_sums(
    logits_BV: Float[Tensor, "B V"], temperature: float
) -> tuple[Float[Tensor, "B 1"], Float[Tensor, "B K"]]:
    """Return each row's highest logit, and the sums of exp(logit - highest) by block in float64."""
    if fuses(logits_BV.device, CDF_BLOCK):
        from operando.rollout import triton_kernels

        return triton_kernels.block_sums(logits_BV, temperature, CDF_BLOCK)
    scaled_BV = _scaled(logits_BV, temperature)
    top_B1 = scaled_BV.amax(-1, keepdim=True)
    weight_BV = (scaled_BV - top_B1).exp_()
    padded_BV = F.pad(weight_BV, (0, -weight_BV.shape[1] % CDF_BLOCK))
    block_BKv = padded_BV.view(len(weight_BV), -1, CDF_BLOCK)
    return top_B1, block_BKv.sum(-1, dtype=torch.float64)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() / temperature if temperature != 1.0 else logits.float()
