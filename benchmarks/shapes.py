"""Folders of random weights in the shapes of real models, with the starter's tokenizer.

    .venv/bin/python benchmarks/shapes.py qwen2.5-0.5b /tmp/half

Speed and memory depend on shapes, not on values: a machine without a model hub measures them too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from operando.models.load import resolve

# hidden, intermediate, layers, heads, key-value heads, vocabulary
SHAPES = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936),
    "tiny": (64, 128, 3, 4, 2, 2048),
}


def random_model(shape: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a Qwen2 model of this shape with transformers' own random weights (std 0.02)."""
    hidden, inner, layers, heads, kv_heads, vocab = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype)


def write_model(shape: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save such a model and the starter's tokenizer in a folder, and return the folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random_model(shape, device, dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("starter")).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    write_model(sys.argv[1], Path(sys.argv[2]))
