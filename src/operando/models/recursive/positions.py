"""Where the tokens stand and what each sees. Dims: B rows, T new tokens, S all so far, H heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from operando.models.recursive.cache import SlotCache

Past = Cache | SlotCache | None


class Rope(NamedTuple):
    """By how much each position is turned: cosines and sines [B 1 T d/2], float32."""

    cos: Float[Tensor, "#B 1 T e"]
    sin: Float[Tensor, "#B 1 T e"]

    def rows(self, which: Tensor, count: int) -> Rope:
        """Return the turns of some of `count` rows."""
        return Rope(*(x.expand(count, -1, -1, -1)[which] for x in self))


def rope_table(position_BT: Int[Tensor, "#B T"], head_dim: int, theta: float) -> Rope:
    """Return the turns of rotary positions (2104.09864): angle = position * theta^(-2i/d)."""
    at = torch.arange(0, head_dim, 2, device=position_BT.device).float()
    angle = position_BT[:, None, :, None].float() * theta ** (-at / head_dim)
    return Rope(angle.cos(), angle.sin())


def rotate(x_BHTd: Float[Tensor, "B H T d"], rope: Rope) -> Float[Tensor, "B H T d"]:
    """Return x turned in float32 (rotary embedding, half-split)."""
    first, second = x_BHTd.float().chunk(2, dim=-1)
    cos, sin = rope
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_BHTd.dtype)


def positions_and_mask(
    x_BTD: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: Past
) -> tuple[Tensor, Tensor]:
    """Return positions [B T] and the bool mask [B 1 T S] of what each token sees."""
    B, T, _ = x_BTD.shape
    device = x_BTD.device
    if isinstance(past, SlotCache):
        assert position_ids is not None, "a SlotCache needs position_ids"
        past.begin(position_ids)
        seen = torch.arange(past.end, device=device) <= position_ids[:, :, None]
        return position_ids, seen[:, None]
    before = past.get_seq_length() if past is not None else 0
    S = before + T
    if attention_mask is not None and attention_mask.ndim == 4:
        assert attention_mask.dtype == torch.bool, "a 4D attention_mask must be bool"
        if position_ids is None:
            position_ids = torch.arange(before, S, device=device)[None].expand(B, -1)
        return position_ids, attention_mask
    real_BS = torch.ones(B, S, dtype=torch.bool, device=device)
    if attention_mask is not None:
        real_BS = attention_mask.bool()
    if position_ids is None:
        position_ids = (real_BS.long().cumsum(-1) - 1).clamp(min=0)[:, before:]
    index_S = torch.arange(S, device=device)
    at_T1 = index_S[before:, None]
    # Padding sees itself, or its softmax would be over nothing.
    mask = ((index_S <= at_T1) & real_BS[:, None, None]) | (index_S == at_T1)
    return position_ids, mask


def split_heads(x_BTD: Tensor, head_dim: int) -> Tensor:
    """Return [B T H*d] as [B H T d]."""
    return x_BTD.unflatten(-1, (-1, head_dim)).transpose(1, 2)
