"""Random tiny vision-language models whose vision tower is deeper than the language decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from tests.unit.tiny import byte_tokenizer

TEXT = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
TOKENS = {"video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
QWEN_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 14,
}


def tiny_multimodal(family: str) -> PreTrainedModel:
    """A random model with 3 decoder blocks and 4 vision blocks."""
    torch.manual_seed(0)
    match family:
        case "gemma3":
            vision = {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            }
            text = TEXT | {"head_dim": 16, "sliding_window": 16}
            model: PreTrainedModel = Gemma3ForConditionalGeneration(
                Gemma3Config(
                    text_config=text,
                    vision_config=vision,
                    mm_tokens_per_image=4,
                    image_token_index=250,
                    boi_token_index=251,
                    eoi_token_index=252,
                )
            )
        case "qwen3_5":
            text = TEXT | {
                "head_dim": 16,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "layer_types": ["linear_attention", "full_attention", "full_attention"],
            }
            model = Qwen3_5ForConditionalGeneration(
                Qwen3_5Config(
                    text_config=text, vision_config=QWEN_VISION, image_token_id=250, **TOKENS
                )
            )
        case "qwen2_5_vl":
            rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
            text = TEXT | {"rope_parameters": rope}
            vision = QWEN_VISION | {"fullatt_block_indexes": [1]}
            model = Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(
                    text_config=text, vision_config=vision, image_token_id=250, **TOKENS
                )
            )
        case _:
            raise AssertionError(family)
    return model.eval()


def saved_multimodal(family: str, folder: Path) -> Path:
    """Write such a model with a byte-level tokenizer, as a checkpoint is published."""
    tiny_multimodal(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
