"""The weights of a Llama-family model as decoding reads them, on the model's own tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from operando.models.load import head_weight
from operando.parallel import whole


@dataclass(frozen=True)
class Linear:
    """x W^T + b + scale (x A^T) B^T on plain tensors."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None

    def __call__(self, x: Tensor, low: Tensor | None = None) -> Tensor:
        """Return y; `low` is x A^T where the caller has it already."""
        y = F.linear(x, self.weight, self.bias)
        if self.lora_a is None or self.lora_b is None:
            return y
        return y.addmm_(x @ self.lora_a if low is None else low, self.lora_b)


@dataclass(frozen=True)
class SharedInput:
    """Linear modules that read the same input: their A factors stand side by side, one product."""

    linears: tuple[Linear, ...]
    lora_a: Tensor | None  # None: not all have an adapter

    def __call__(self, x: Tensor) -> list[Tensor]:
        if self.lora_a is None:
            return [linear(x) for linear in self.linears]
        ranks = [linear.lora_a.shape[1] for linear in self.linears if linear.lora_a is not None]
        lows = (x @ self.lora_a).split(ranks, dim=1)
        return [linear(x, low) for linear, low in zip(self.linears, lows, strict=True)]


def shared_input(*linears: Linear) -> SharedInput:
    """Return the modules as one."""
    factors = [linear.lora_a for linear in linears if linear.lora_a is not None]
    return SharedInput(linears, torch.cat(factors, 1) if len(factors) == len(linears) else None)


@dataclass(frozen=True)
class Block:
    """The weights of one decoder block, as references wherever that is possible."""

    norm1: Tensor
    qkv: SharedInput
    o: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    norm2: Tensor
    gate_up: SharedInput
    down: Linear


class Weights(NamedTuple):
    """All that decoding reads of the model, gathered once a rollout."""

    embed_VD: Tensor
    blocks: list[Block]
    norm_D: Tensor
    head_VD: Tensor


def gather_weights(model: PreTrainedModel, norm_offset: float) -> Weights:
    """Return the model's weights; LoRA factors are cast and scaled once for this rollout.

    `norm_offset` is added to every norm's weight (Gemma: 1), in float32 as Gemma does.
    """
    decoder = model.get_decoder()

    def norm(module: nn.Module) -> Tensor:
        weight = whole(module.get_parameter("weight"))
        return weight.float() + norm_offset if norm_offset else weight

    return Weights(
        embed_VD=whole(model.get_input_embeddings().get_parameter("weight")),
        blocks=[_block(block, norm) for block in decoder.get_submodule("layers").children()],
        norm_D=norm(decoder.get_submodule("norm")),
        head_VD=whole(head_weight(model)),
    )


def _block(layer: nn.Module, norm: Callable[[nn.Module], Tensor]) -> Block:
    attention = layer.get_submodule("self_attn")
    qk_norm = any(name == "q_norm" for name, _ in attention.named_children())

    def linear(name: str) -> Linear:
        return _linear(layer.get_submodule(name))

    return Block(
        norm1=norm(layer.get_submodule("input_layernorm")),
        qkv=shared_input(*(linear(f"self_attn.{name}_proj") for name in "qkv")),
        o=linear("self_attn.o_proj"),
        q_norm=norm(attention.get_submodule("q_norm")) if qk_norm else None,
        k_norm=norm(attention.get_submodule("k_norm")) if qk_norm else None,
        norm2=norm(layer.get_submodule("post_attention_layernorm")),
        gate_up=shared_input(linear("mlp.gate_proj"), linear("mlp.up_proj")),
        down=linear("mlp.down_proj"),
    )


def _linear(module: nn.Module) -> Linear:
    """Return a linear module's plain tensors, with its LoRA factors."""
    if not isinstance(module, LoraLayer):
        assert isinstance(module, nn.Linear), f"{type(module).__name__} is not supported"
        bias = None if module.bias is None else whole(module.bias)
        return Linear(whole(module.weight), bias, None, None)
    base = module.get_base_layer()
    assert isinstance(base, nn.Linear), f"{type(base).__name__} is not supported"
    plain = _linear(base)
    active = module.active_adapters
    if module.disable_adapters or not active:
        return plain
    assert len(active) == 1, f"one adapter is served, got {active}"
    name = active[0]
    dtype = plain.weight.dtype
    a_RD = whole(module.lora_A.get_submodule(name).get_parameter("weight"))
    b_DR = whole(module.lora_B.get_submodule(name).get_parameter("weight"))
    lora_a, lora_b = a_RD.T.to(dtype), (b_DR.T * module.scaling[name]).to(dtype)
    return Linear(plain.weight, plain.bias, lora_a, lora_b)
