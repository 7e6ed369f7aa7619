"""The layers of a RecursiveCausalLM: those of prelude and coda, and the blocks that loop.

Dims: B rows, T new tokens, S all tokens so far, D d_model, H heads, K key-value heads, d head_dim,
r basis rank, s width of the controller, b rows still looping.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_layers import GradientCheckpointingLayer

from operando.models.recursive.configuration import MODULATED, RecursiveConfig
from operando.models.recursive.positions import Past, Rope, rotate, split_heads


class SelfAttention(nn.Module):
    """Grouped-query causal attention of prelude and coda."""

    def __init__(self, config: RecursiveConfig, layer: int) -> None:
        super().__init__()
        d, self.layer, self.head_dim = config.hidden_size, layer, config.head_dim
        narrow = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, narrow, bias=False)
        self.v_proj = nn.Linear(d, narrow, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x_BTD: Tensor, rope: Rope, mask: Tensor, past: Past) -> Tensor:
        q = rotate(split_heads(self.q_proj(x_BTD), self.head_dim), rope)
        k = rotate(split_heads(self.k_proj(x_BTD), self.head_dim), rope)
        v = split_heads(self.v_proj(x_BTD), self.head_dim)
        if past is not None:
            k, v = past.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Layer(GradientCheckpointingLayer):
    """A layer of prelude or coda."""

    def __init__(self, config: RecursiveConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, hidden_states: Tensor, rope: Rope, mask: Tensor, past: Past) -> Tensor:
        x_BTD = hidden_states + self.self_attn(self.attn_norm(hidden_states), rope, mask, past)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class ModulatedLinear(nn.Linear):
    """y = W x + B diag(z) A x, with A and B frozen at the leading singular vectors of the first W.

    A = V_r^T and B = U_r S_r; they are buffers, so that no optimizer and no adapter finds them.
    """

    def __init__(self, size_in: int, size_out: int, rank: int) -> None:
        super().__init__(size_in, size_out, bias=False)
        self.basis_in: Tensor
        self.basis_out: Tensor
        self.register_buffer("basis_in", torch.zeros(rank, size_in))
        self.register_buffer("basis_out", torch.zeros(size_out, rank))

    @torch.no_grad()
    def fit_bases(self) -> None:
        """Set the bases to the leading singular directions of the weight as it is now."""
        rank = len(self.basis_in)
        left, values, right = torch.linalg.svd(self.weight.float(), full_matrices=False)
        initialization.copy_(self.basis_in, right[:rank])  # but not where they were loaded
        initialization.copy_(self.basis_out, left[:, :rank] * values[:rank])

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x) + F.linear(F.linear(x, self.basis_in) * z, self.basis_out)


class AnchorAttention(nn.Module):
    """Queries of the loop's state against keys and values of the prelude, computed once."""

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__()
        d, r = config.hidden_size, config.mod_rank
        self.head_dim = config.head_dim
        self.q_proj = ModulatedLinear(d, d, r)
        self.o_proj = ModulatedLinear(d, d, r)
        self.k_up = nn.Linear(config.kv_lora_rank, d, bias=False)
        self.v_up = nn.Linear(config.kv_lora_rank, d, bias=False)

    def anchor(self, latent_BSR: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        k = rotate(split_heads(self.k_up(latent_BSR), self.head_dim), rope)
        return k, split_heads(self.v_up(latent_BSR), self.head_dim)

    def forward(
        self, x_bTD: Tensor, k: Tensor, v: Tensor, rope: Rope, mask: Tensor, zq: Tensor, zo: Tensor
    ) -> Tensor:
        q = rotate(split_heads(self.q_proj(x_bTD, zq), self.head_dim), rope)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).flatten(2), zo)


class ModulatedMlp(nn.Module):
    """SwiGLU with modulated matrices."""

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__()
        d, f, r = config.hidden_size, config.core_intermediate_size, config.mod_rank
        self.gate_proj = ModulatedLinear(d, f, r)
        self.up_proj = ModulatedLinear(d, f, r)
        self.down_proj = ModulatedLinear(f, d, r)

    def forward(self, x_bTD: Tensor, zg: Tensor, zu: Tensor, zd: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_bTD, zg)) * self.up_proj(x_bTD, zu), zd)


class CoreBlock(GradientCheckpointingLayer):
    """A block of the core: the same weights in every loop, modulated by `style` [b T s]."""

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.anchor_attn = AnchorAttention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ModulatedMlp(config)
        self.modulation = nn.Linear(config.mod_dim, MODULATED * config.mod_rank, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        k: Tensor,
        v: Tensor,
        rope: Rope,
        mask: Tensor,
        style_bTs: Tensor,
    ) -> Tensor:
        zq, zo, zg, zu, zd = self.modulation(style_bTs).chunk(MODULATED, dim=-1)
        x_bTD = hidden_states + self.anchor_attn(
            self.attn_norm(hidden_states), k, v, rope, mask, zq, zo
        )
        return x_bTD + self.mlp(self.mlp_norm(x_bTD), zg, zu, zd)
