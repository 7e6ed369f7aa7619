"""What this machine can do at most, and what a decoding step and a training step must do at least.

    .venv/bin/python benchmarks/roofline.py

Rates are measured: the best of several large products in each dtype, and of several copies.
FLOPs count a multiply and an add as two; a product of weights costs 2 FLOPs a parameter and token
forward, 2 more for the gradient of its input (frozen weights have none of their own).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig


def seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Return the least seconds that `work` took, after one call that is not counted."""
    best = float("inf")
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if repeat:
            best = min(best, time.perf_counter() - started)
    return best


def rates(device: str, size: int | None = None, repeats: int = 5) -> dict[str, float]:
    """Return FLOP/s of a square product in float32 and bfloat16, and bytes/s read and written."""
    size = size or (8192 if device == "cuda" else 2048)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        took = seconds(lambda a=a, b=b: a @ b, device, repeats)
        found[f"flops_{str(dtype).removeprefix('torch.')}"] = 2 * size**3 / took
    big = torch.empty(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    found["bytes_per_second"] = 2 * big.numel() / seconds(lambda: other.copy_(big), device, repeats)
    return found


def linear_parameters(config: PreTrainedConfig) -> int:
    """Return the parameters of the blocks' linear modules (Llama family)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = 2 * hidden * head * (config.num_attention_heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * hidden * inner)


def decode_bytes(config: PreTrainedConfig, rows: int, context: float, width: int = 2) -> float:
    """Return the bytes that one decoding step of `rows` rows must move.

    Every weight once, and the keys and values of `context` positions of each row.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * context
    weights = linear_parameters(config) + config.vocab_size * config.hidden_size
    return width * (weights + rows * cache)


def decode_flops(config: PreTrainedConfig, rows: int, context: float) -> float:
    """Return the FLOPs of one decoding step of `rows` rows: products, head and attention."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * head * context
    weights = linear_parameters(config) + config.vocab_size * config.hidden_size
    return 2 * rows * (weights + attention)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int)
    args = parser.parse_args()
    found = rates(args.device, args.size)
    print(json.dumps({n: f"{x:.3g}" for n, x in found.items()} | vars(args), indent=1))


if __name__ == "__main__":
    main()
