"""Small random recursive models whose loops, halts and modulation all do something."""

from __future__ import annotations

import torch

from operando.models.recursive import RecursiveCausalLM, preset


def random_recursive(seed: int = 0, **changes: object) -> RecursiveCausalLM:
    """A tiny model, wide in its weights, with modulation and halt logits of their own."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 258, "hidden_size": 32, "kv_lora_rank": 8, "mod_dim": 8}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = preset("tiny", **(shape | special | {"initializer_range": 0.12} | changes))
    model = RecursiveCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "halt_head" in name or "speculative" in name:
                parameter.normal_(0.0, 0.2)
        model.model.halt_head.weight.mul_(8)
    return model.eval()
