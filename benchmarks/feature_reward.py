"""What reading SAE features costs: a GRPO step with a feature reward against the same without.

    .venv/bin/python benchmarks/feature_reward.py --model smollm2 --dtype bfloat16

Both arms have the same model, LoRA, KL term (so the frozen base is run in both), prompts and
sampling streams. The features are read in policy and base and paid with weight 0, so that both
arms write the same completions: this is checked first, step by step. SAEs are random (what they
read does not change what reading costs), top-k with k = 64. Rounds alternate; the ratio is the
median over steps of the same step's two times.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from operando.launch import launch
from operando.models.load import load_model
from operando.recipe.data import ModelConfig, PromptConfig
from operando.recipe.run import Recipe
from operando.recipe_io import check
from operando.run_folder import read_metrics
from operando.sae.feature_set import (
    Feature,
    FeatureSet,
    Gate,
    encoder_of,
    model_digest,
    prompt_digest,
    save_feature_set,
)
from operando.sae.formats import save_sae
from operando.sae.sae import SAE


def write_set(folder: Path, args: argparse.Namespace, d_sae: int) -> Path:
    loaded = load_model(ModelConfig(id=args.model, dtype=args.dtype))
    text = loaded.model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    shape = (d_sae, text.hidden_size)
    rows = [torch.randn(shape, generator=generator) / text.hidden_size**0.5 for _ in range(2)]
    zeros = [torch.zeros(n) for n in (d_sae, text.hidden_size, text.hidden_size)]
    sae = SAE(rows[0], zeros[0], rows[1], zeros[1], zeros[2], "topk_relu", k=64)
    save_sae(sae, folder / "sae")
    features = tuple(Feature(i, 1 if i % 2 else -1, 1.0, 0.0, 1.0) for i in range(20))
    site = f"blocks.{text.num_hidden_layers * 6 // 10}.hook_resid_post"
    feature_set = FeatureSet(
        "random",
        site,
        args.model,
        model_digest(loaded.identity),
        prompt_digest(PromptConfig()),
        1.0,
        Gate(False),
        "sae",
        sae.sha256(),
        encoder_of(sae),
        features,
    )
    save_feature_set(feature_set, folder / "feature_set.json")
    return folder / "feature_set.json"


def steps_of(
    args: argparse.Namespace, folder: Path, name: str, feature_set: Path | None
) -> list[dict]:
    rewards: dict[str, object] = {"correct": {"kind": "correct"}}
    if feature_set is not None:
        rewards["features"] = {"kind": "features", "file": str(feature_set), "weight": 0.0}
    tables: dict[str, object] = {
        "name": name,
        "steps": args.steps,
        "runs_dir": str(folder),
        "model": {"id": args.model, "dtype": args.dtype, "lora": {"rank": 32, "alpha": 32}},
        "task": {"kind": "words", "num_steps": [1], "num_train": 64, "num_held_out": 1},
        "rollout": {
            "num_prompts": args.prompts,
            "num_generations": args.group,
            "max_completion_length": args.new,
        },
        "rewards": rewards,
        "kl": {"coef": 0.05},
        "optim": {"lr": 1e-5},
        "eval": {"every": 10_000, "num": 1, "max_completion_length": 1},
        "checkpoint": {"every": 10_000},
    }
    run = launch(Console(quiet=True), check(Recipe, tables, "benchmark"))
    assert run is not None
    return read_metrics(run)[2:]  # without the base's evaluation and the first step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[7168, 40960])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = {size: write_set(folder / str(size), args, size) for size in args.sizes}
        times: dict[str, list[list[float]]] = {}
        for turn in range(args.rounds):
            plain = steps_of(args, folder, f"outcome{turn}", None)
            for size, feature_set in sets.items():
                rows = steps_of(args, folder, f"d{size}_{turn}", feature_set)
                for a, b in zip(plain, rows, strict=True):
                    same = ("reward", "loss", "completions/mean_length")
                    assert all(a[key] == b[key] for key in same), (size, a, b)
                    keys = ("time/score", "time/step")
                    pair = [b[k] / a[k] for k in keys] + [a["time/step"], b["time/step"]]
                    times.setdefault(str(size), []).append(pair)
    num = len(next(iter(times.values())))
    print(
        f"{args.model} {args.dtype}, {args.prompts} x {args.group} completions of <= {args.new} "
        f"tokens, {torch.get_num_threads()} threads, n = {num} steps"
    )
    print("d_sae   step s without  step s with  ratio of the step  ratio of scoring")
    for size, rows in times.items():
        score, step, without, with_ = (
            statistics.median(column) for column in zip(*rows, strict=True)
        )
        print(f"{size:>6}  {without:14.2f}  {with_:11.2f}  {step:17.3f}  {score:16.3f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
