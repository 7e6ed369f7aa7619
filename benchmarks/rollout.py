"""Sampling speed: operando's engine against transformers, in one run, same model and prompts.

    .venv/bin/python benchmarks/rollout.py --model starter --dtype float32
    .venv/bin/python benchmarks/rollout.py --model smollm2 --dtype bfloat16 --prompts 4
    .venv/bin/python benchmarks/rollout.py --shape qwen2.5-0.5b --device cuda --prompts 64 --new 512

The peers are `generate` and, on CUDA, continuous batching (`generate_batch`). All sample at
temperature 1 with LoRA unmerged and stop at the end token. First, in float32, the greedy tokens of
ours and of `generate` are compared on four prompts; a difference stops the benchmark. The limit is
what the weights and the KV cache take to be read once a step at the machine's measured bandwidth.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from roofline import decode_bytes, rates
from shapes import write_model
from transformers import GenerationConfig

from operando.launch import quieten_libraries
from operando.models.load import load_model, stop_ids
from operando.models.policy import Policy
from operando.recipe.data import LoraConfig, ModelConfig, WordsTaskConfig
from operando.rollout.engine import Engine
from operando.rollout.sampler import Request, Sampling, uniform_streams
from operando.run import SeedTree
from operando.tasks.words import load_words


def open_policy(model: str, dtype: str, device: str) -> Policy:
    """Return a policy whose adapters are not zero, so that LoRA has work to do."""
    config = ModelConfig.model_validate(
        {"id": model, "dtype": dtype, "device": device, "lora": LoraConfig()}
    )
    policy = Policy(load_model(config), config, SeedTree(0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    return policy


def cut(rows: list[list[int]], eos: int) -> list[list[int]]:
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def hf_generate(policy: Policy, rows: list[list[int]], num: int, greedy: bool) -> list[list[int]]:
    """Return `generate`'s completions, cut after the end token."""
    eos, width = policy.tokenizer.eos_token_id, max(len(r) for r in rows)
    ids = torch.full((len(rows), width), eos)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = torch.tensor(row)
        mask[b, width - len(row) :] = 1
    sampling = {} if greedy else {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    out = policy.model.generate(
        input_ids=ids.to(policy.device),
        attention_mask=mask.to(policy.device),
        max_new_tokens=num,
        do_sample=not greedy,
        pad_token_id=eos,
        **sampling,
    )
    return cut(out[:, width:].tolist(), eos)


def hf_continuous(policy: Policy, rows: list[list[int]], num: int) -> list[list[int]]:
    """Return the completions of transformers' continuous batching."""
    eos = policy.tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=num,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    # Not by the PEFT wrapper, which does not know it; the adapters are in the base's modules.
    found = policy.base.generate_batch(inputs=rows, generation_config=config)
    if len(found) != len(rows) or any(one.error for one in found.values()):
        raise RuntimeError(f"{len(rows) - len(found)} requests lost, or failed")
    return cut([one.generated_tokens for one in found.values()], eos)


def sampler(policy: Policy) -> Engine:
    return Engine(policy.base, policy.tokenizer, stop_ids(policy.base, policy.tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="starter")
    parser.add_argument("--shape", help="random weights of this shape instead of a model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", default="generate")
    args = parser.parse_args()
    quieten_libraries()
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_model(args.shape, Path(folder))) if args.shape else args.model
        measure(args, model)


def measure(args: argparse.Namespace, model: str) -> None:
    task = load_words(WordsTaskConfig(kind="words", num_train=args.prompts, num_held_out=1))
    policy = open_policy(model, "float32", args.device)
    prompts = [policy.tokenizer(f"Q: {e.question}\nA:")["input_ids"] for e in task.train]
    few, num = prompts[:4], min(args.new, 64)
    ours = [list(s.ids) for s in sampler(policy).sample(Request(few, 1, Sampling(num), None))]
    theirs = [hf_generate(policy, [p], num, greedy=True)[0] for p in few]
    assert ours == theirs, f"greedy tokens differ: {ours} {theirs}"
    if args.dtype != "float32":
        del policy
        policy = open_policy(model, args.dtype, args.device)
    engine = sampler(policy)
    rows = [p for p in prompts for _ in range(args.group)]

    def operando(repeat: int, new: int) -> list[list[int]]:
        uniforms = uniform_streams(SeedTree(repeat), 1, range(len(prompts)), args.group, new)
        return [
            list(s.ids)
            for s in engine.sample(Request(prompts, args.group, Sampling(new), uniforms))
        ]

    samplers: dict[str, Callable[[int, int], list[list[int]]]] = {"operando": operando}
    if "generate" in args.peers:
        samplers["generate"] = lambda _, new: hf_generate(policy, rows, new, greedy=False)
    if "continuous" in args.peers:
        samplers["continuous"] = lambda _, new: hf_continuous(policy, rows, new)
    speed: dict[str, list[float]] = {name: [] for name in samplers}
    lengths: dict[str, list[float]] = {name: [] for name in samplers}
    failed: dict[str, str] = {}
    for repeat in range(args.repeats + 1):
        for name, sample in samplers.items():
            if name in failed:
                continue
            torch.manual_seed(repeat)
            started = time.perf_counter()
            try:
                sampled = sample(repeat, args.new if repeat else min(args.new, 64))
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                failed[name] = f"{type(error).__name__}: {error}"[:500]
                continue
            took = time.perf_counter() - started
            num = sum(map(len, sampled))
            print(f"# {name} {repeat}: {num} tokens in {took:.2f} s", flush=True)
            if repeat:  # the first is a shorter warm-up
                speed[name].append(num / took)
                lengths[name].append(num / len(rows))
    medians = {name: round(statistics.median(r), 1) for name, r in speed.items() if r}
    width = torch.finfo(getattr(torch, args.dtype)).bits // 8
    context = statistics.mean(map(len, prompts)) + args.new / 2
    bandwidth = rates(args.device)["bytes_per_second"]
    step = decode_bytes(policy.base.config, len(rows), context, width) / bandwidth
    result = {
        "args": vars(args),
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine(),
        "tokens_per_second_median": medians,
        "tokens_per_second_all": {n: [round(x, 1) for x in r] for n, r in speed.items()},
        "mean_length": {n: round(statistics.mean(x), 2) for n, x in lengths.items() if x},
        "failed": failed,
        "ratio": {
            n: round(medians["operando"] / m, 2) for n, m in medians.items() if n != "operando"
        },
        "limit_tokens_per_second": round(len(rows) / step, 1),
        "share_of_limit": round(medians["operando"] / (len(rows) / step), 3),
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
