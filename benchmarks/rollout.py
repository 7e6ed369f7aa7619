"""Sampling speed: operando's engine against HF generate, in one run, on the same model and prompts.

    .venv/bin/python benchmarks/rollout.py --model starter --dtype float32
    .venv/bin/python benchmarks/rollout.py --model smollm2 --dtype bfloat16 --prompts 4

Both sample at temperature 1 with LoRA unmerged and stop at the end token. In float32 the
greedy tokens of both are compared first; a difference stops the benchmark.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch

from operando.launch import quieten_libraries
from operando.models.load import load_model, stop_ids
from operando.models.policy import Policy
from operando.recipe import LoraConfig, ModelConfig, WordsTaskConfig
from operando.rollout.engine import Engine
from operando.rollout.sampler import Sampling, uniform_streams
from operando.run import SeedTree
from operando.tasks.words import load_words


def hf_generate(policy: Policy, rows: list[list[int]], num: int, greedy: bool) -> list[list[int]]:
    """Return HF generate's completions, cut after the end token."""
    eos, width = policy.tokenizer.eos_token_id, max(len(r) for r in rows)
    ids = torch.full((len(rows), width), eos)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = torch.tensor(row)
        mask[b, width - len(row) :] = 1
    sampling = {} if greedy else {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    out = policy.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=num, do_sample=not greedy,
        pad_token_id=eos, **sampling,
    )  # fmt: skip
    cut = []
    for row in out[:, width:].tolist():
        cut.append(row[: row.index(eos) + 1] if eos in row else row)
    return cut


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="starter")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    quieten_libraries()
    config = ModelConfig(id=args.model, dtype=args.dtype, lora=LoraConfig())
    loaded = load_model(config)
    policy = Policy(loaded, config, SeedTree(0))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    task = load_words(WordsTaskConfig(kind="words", num_train=args.prompts, num_held_out=1))
    prompts = [loaded.tokenizer(f"Q: {e.question}\nA:")["input_ids"] for e in task.train]
    engine = Engine(policy.base, loaded.tokenizer, stop_ids(policy.base, loaded.tokenizer))
    if args.dtype == "float32":
        ours = [list(s.ids) for s in engine.sample(prompts, 1, Sampling(args.new), None)]
        theirs = [hf_generate(policy, [p], args.new, greedy=True)[0] for p in prompts]
        assert ours == theirs, "greedy outputs differ"
    rows = [p for p in prompts for _ in range(args.group)]
    rates: dict[str, list[float]] = {"operando": [], "hf_generate": []}
    lengths: dict[str, list[float]] = {"operando": [], "hf_generate": []}
    for repeat in range(args.repeats + 1):
        uniforms = uniform_streams(SeedTree(repeat), 1, range(len(prompts)), args.group, args.new)
        started = time.perf_counter()
        sampled = engine.sample(prompts, args.group, Sampling(args.new), uniforms)
        middle = time.perf_counter()
        torch.manual_seed(repeat)
        generated = hf_generate(policy, rows, args.new, greedy=False)
        ended = time.perf_counter()
        if repeat == 0:
            continue  # warm-up
        mine, peers = sum(len(s.ids) for s in sampled), sum(map(len, generated))
        rates["operando"].append(mine / (middle - started))
        rates["hf_generate"].append(peers / (ended - middle))
        lengths["operando"].append(mine / len(rows))
        lengths["hf_generate"].append(peers / len(rows))
    medians = {name: round(statistics.median(r), 1) for name, r in rates.items()}
    result = {
        "args": vars(args),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "tokens_per_second_median": medians,
        "tokens_per_second_all": {n: [round(x, 1) for x in r] for n, r in rates.items()},
        "mean_length": {n: round(statistics.mean(x), 2) for n, x in lengths.items()},
        "ratio": round(medians["operando"] / medians["hf_generate"], 2),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
