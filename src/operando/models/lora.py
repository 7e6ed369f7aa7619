"""LoRA on the linear modules of chosen decoder blocks, by PEFT."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from operando.errors import UserError, nearest
from operando.models.layers import decoder_blocks, is_multimodal
from operando.recipe.data import ModelConfig
from operando.run import SeedTree


def with_lora(
    base: PreTrainedModel,
    blocks_name: str,
    layers: tuple[int, ...],
    config: ModelConfig,
    seeds: SeedTree,
) -> PeftModel:
    """Return the model with an adapter on the targets of these blocks; A is drawn from the seed."""
    lora = config.lora
    assert lora is not None
    _, blocks = decoder_blocks(base)
    names = {n.rpartition(".")[2] for n, m in blocks.named_modules() if _is_linear(m)}
    for target in lora.targets:
        if target not in names:
            raise UserError(
                f"model.lora.targets: {target!r} is not a linear module of its decoder blocks."
                f"{nearest(target, names)} It has: {', '.join(sorted(names))}"
            )
    # PEFT looks for names and layer numbers everywhere, in a vision tower too: there, whole paths.
    towers = is_multimodal(base.config)
    some = set(layers) != set(range(len(blocks))) and not towers
    with torch.random.fork_rng():
        torch.manual_seed(seeds.derive("model", "lora"))
        model = get_peft_model(
            base,
            PeftLoraConfig(
                task_type="CAUSAL_LM",
                r=lora.rank,
                lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # pyright: ignore[reportArgumentType]
                lora_dropout=0.0,
                target_modules=_paths(blocks_name, layers, lora.targets)
                if towers
                else list(lora.targets),
                layers_to_transform=list(layers) if some else None,
                layers_pattern=blocks_name.rpartition(".")[2] if some else None,
            ),
        )
    assert isinstance(model, PeftModel)
    return model.eval()


def _paths(blocks_name: str, layers: Sequence[int], targets: Sequence[str]) -> str:
    """Return the pattern of the target modules' full names; PEFT matches it from end to end."""
    numbers, names = "|".join(map(str, layers)), "|".join(map(re.escape, targets))
    return rf"{re.escape(blocks_name)}\.({numbers})\.(?:.*\.)?({names})"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Linear4bit", "Linear8bitLt")
