"""What a Projector costs: a GRPO step with it against the same step without.

    .venv/bin/python benchmarks/projection.py --model smollm2 --dtype bfloat16

Arms: without; `gate = "measure"`, which writes the same completions; the preset `strict`; mode
`token`. The direction is random, in the last 40 % of the blocks. Rounds alternate; the ratio is the
median over steps of the same step's two update times.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from operando.launch import launch
from operando.models.directions import DirectionSet, save_directions, unit
from operando.models.load import load_model
from operando.recipe.data import ModelConfig
from operando.recipe.run import Recipe
from operando.recipe_io import check
from operando.run_folder import read_metrics
from operando.sae.feature_set import model_digest

ARMS: dict[str, dict[str, object]] = {
    "without": {},
    "measure": {"gate": "measure"},
    "strict": {"preset": "strict"},
    "token": {"mode": "token", "gate": "one_sided", "stage": "gradient"},
}


def write_directions(folder: Path, args: argparse.Namespace) -> Path:
    """Write a random direction with random reference inputs."""
    loaded = load_model(ModelConfig(id=args.model, dtype=args.dtype))
    text = loaded.model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    depth = text.num_hidden_layers
    inputs = {
        name: unit(torch.randn(module.in_features, generator=generator))
        for name, module in loaded.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    made = DirectionSet(
        "random",
        "activation",
        unit(torch.randn(text.hidden_size, generator=generator)),
        tuple(range(depth * 6 // 10, depth)),
        "last",
        args.model,
        model_digest(loaded.identity),
        args.dtype,
        1.0,
        inputs=inputs,
    )
    save_directions(made, folder / "random.safetensors")
    return folder / "random.safetensors"


def seconds(args: argparse.Namespace, folder: Path, name: str, file: Path) -> list[dict]:
    """Return the metrics of an arm's steps after the first."""
    arm = name.rpartition("_")[0]
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
        "rewards": {"correct": {"kind": "correct"}},
        "eval": {"every": 10_000, "num": 1, "max_completion_length": 1},
        "checkpoint": {"every": 10_000},
    }
    if ARMS[arm]:
        tables["projection"] = {"directions": str(file)} | ARMS[arm]
    run = launch(Console(quiet=True), check(Recipe, tables, "benchmark"))
    assert run is not None
    return read_metrics(run)[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--new", type=int, default=32)
    args = parser.parse_args()
    rows: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_directions(folder, args)
        for turn in range(args.rounds):
            for arm in ARMS:
                rows[arm] += seconds(args, folder, f"{arm}_{turn}", file)
    for arm, found in rows.items():
        step = statistics.median(r["time/step"] for r in found)
        update = statistics.median(r["time/update"] for r in found)
        pairs = zip(found, rows["without"], strict=True)
        ratio = statistics.median(a["time/update"] / b["time/update"] for a, b in pairs)
        print(f"{arm:8} step {step:.3f} s, update {update:.3f} s, update ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
