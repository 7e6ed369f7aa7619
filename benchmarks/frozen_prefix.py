"""Frozen-prefix reuse against the plain path: scoring, reference and update of one rollout batch.

    .venv/bin/python benchmarks/frozen_prefix.py --model smollm2 --layers last:4
    .venv/bin/python benchmarks/frozen_prefix.py --model random28 --layers last:4

The same batch and the same LoRA layers both times. "plain" runs every block in the old, the
reference and each new pass; "shared graph" is operando without the reuse (at one epoch the old pass
is the first new pass); "sampled prefix" has the hidden states beforehand, as the loop has them from
its sampler. Here they come from a scoring pass that is not timed: its gradients are equal by
construction, and what keeping them costs the sampler is left out. First the gradients of all paths
are compared; a relative difference above 1e-5 in float32 stops the benchmark. Each path runs in a
process of its own for its memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from operando.launch import quieten_libraries
from operando.models.load import STARTER, Loaded, load_model
from operando.models.policy import Policy
from operando.models.prefix import Prefix
from operando.models.scoring import flat_rows
from operando.recipe.data import LoraConfig, ModelConfig
from operando.run import SeedTree
from operando.types import Batch, Example, Prompt, Rollout, make_batch

PATHS = ("plain", "shared graph", "prefix", "sampled prefix")


def load(args: argparse.Namespace) -> Policy:
    """Return the model; random28 is 28 random layers with a vocabulary of 8192."""
    config = ModelConfig(
        id=args.model, dtype=args.dtype, layers=args.layers, lora=LoraConfig(rank=32, alpha=32)
    )
    if args.model == "random28":
        torch.manual_seed(0)
        shape = Qwen2Config(
            vocab_size=8192,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=28,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        model = Qwen2ForCausalLM(shape).to(getattr(torch, args.dtype)).eval()
        tokenizer = load_model(ModelConfig(id="starter")).tokenizer
        loaded = Loaded(model.requires_grad_(False), tokenizer, {"id": str(STARTER)})
    else:
        loaded = load_model(config)
    policy = Policy(loaded, config, SeedTree(0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    return policy


def random_rollouts(args: argparse.Namespace, vocab: int) -> Batch:
    """Return rollouts of random ids; completions end anywhere from half the limit on."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab, (count,), generator=generator).tolist())

    rollouts = []
    for group in range(args.prompts):
        prompt = Prompt(Example(str(group), "", ""), "", draw(args.prompt_length))
        for sample in range(args.group):
            ids = draw(args.new // 2 + int(draw(1)[0]) % (args.new // 2))
            rollouts.append(Rollout(prompt, group, sample, "", ids, (0.0,) * len(ids), False))
    return make_batch(rollouts, args.group, pad_id=0)


def work(
    policy: Policy, batch: Batch, path: str, epochs: int, micro_tokens: int, given: Prefix | None
) -> None:
    """Score, take the reference and accumulate the gradients of all epochs."""
    first, policy.first_trained = policy.first_trained, 0
    if path in ("prefix", "sampled prefix"):
        policy.first_trained = first
    shares = path != "plain"
    scoring = policy.score(
        batch, reference=True, micro_tokens=micro_tokens, keep_graph=shares, prefix=given
    )
    kept = scoring.graph
    for _ in range(epochs):
        for packs in policy.micro_batches(batch, None, micro_tokens):
            new, kept = kept or policy.scored(batch, packs, scoring.prefix), None
            rows = flat_rows(packs)
            weight_BT = torch.linspace(-1, 1, len(rows))[:, None].to(policy.device)
            mask_BT = batch.mask_BT[rows].to(policy.device)
            loss = (new.logp_BT * weight_BT * mask_BT).sum() / batch.mask_BT.sum()
            loss.backward()
    policy.first_trained = first


def run_path(args: argparse.Namespace) -> dict[str, object]:
    """Time one path and save its gradients."""
    quieten_libraries()
    policy = load(args)
    batch = random_rollouts(args, policy.base.config.vocab_size)
    seconds = []
    given = None
    if args.path == "sampled prefix":
        given = policy.score(batch, micro_tokens=args.micro_tokens).prefix
    for _ in range(args.repeats + 1):
        for parameter in policy.trainable().values():
            parameter.grad = None
        started = time.perf_counter()
        work(policy, batch, args.path, args.epochs, args.micro_tokens, given)
        seconds.append(time.perf_counter() - started)
    torch.save({n: p.grad for n, p in policy.trainable().items()}, args.gradients)
    return {
        "seconds": round(statistics.median(seconds[1:]), 3),
        "all": [round(s, 3) for s in seconds[1:]],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def largest_gap(one: Path, other: Path) -> float:
    """Return the largest relative difference between the gradients of two paths."""
    a, b = torch.load(one), torch.load(other)
    return max(float((b[n] - g).norm() / g.norm().clamp(min=1e-30)) for n, g in a.items())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", default="last:4")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--path", choices=PATHS)
    parser.add_argument("--gradients", type=Path)
    args = parser.parse_args()
    if args.path:
        print(json.dumps(run_path(args)))
        return
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for path in PATHS:
            own = ["--path", path, "--gradients", f"{folder}/{path}.pt"]
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], *own],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            results[path] = json.loads(done.stdout.splitlines()[-1])
        gaps = {
            path: largest_gap(Path(folder, "plain.pt"), Path(folder, f"{path}.pt"))
            for path in PATHS[1:]
        }
    assert args.dtype != "float32" or max(gaps.values()) < 1e-5, gaps
    plain = results["plain"]
    print(
        json.dumps(
            {
                "args": {k: v for k, v in vars(args).items() if k not in ("path", "gradients")},
                "threads": torch.get_num_threads(),
                "results": results,
                "gradient_gap": gaps,
                "speed_against_plain": {
                    p: round(plain["seconds"] / r["seconds"], 2) for p, r in results.items()
                },
                "memory_against_plain": {
                    p: round(r["peak_mb"] / plain["peak_mb"], 2) for p, r in results.items()
                },
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
