"""A whole GRPO step: operando against TRL, in one run, each in a process of its own.

    .venv-interop/bin/python benchmarks/grpo_step.py --model smollm2 --dtype bfloat16
    .venv-interop/bin/python benchmarks/grpo_step.py --shape qwen2.5-0.5b --device cuda \
        --prompts 8 --group 8 --new 256 --trl-batch 16

Same model, prompts, reward, LoRA (rank 32, all seven projections), layers, epochs, KL term, group
size and token limit; natural stopping. TRL runs as its documentation starts it, but with gradient
checkpointing off, which is faster; `--trl-batch` rows a device pass where all do not fit.
Reported: median seconds a rollout batch after the first, their parts, mean completion length (the
work must be alike), peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from shapes import write_model

KEY = "completions/mean_length"


def reward(completions: list[object], **_: object) -> list[float]:
    """Pays for a length near 100 characters: every group has signal."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [-abs(len(t) - 100) / 100 for t in texts]


def run_operando(args: argparse.Namespace) -> dict[str, object]:
    from rich.console import Console

    from operando.launch import launch
    from operando.recipe.run import Recipe
    from operando.recipe_io import check
    from operando.run_folder import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        tables: dict[str, object] = {
            "name": "bench",
            "steps": args.steps,
            "runs_dir": folder,
            "model": {
                "id": args.model,
                "dtype": args.dtype,
                "layers": args.layers,
                "device": args.device,
                "lora": {"rank": 32, "alpha": 32},
            },
            "task": {"kind": "words", "num_steps": [1], "num_train": 64, "num_held_out": 1},
            "rollout": {
                "num_prompts": args.prompts,
                "num_generations": args.group,
                "max_completion_length": args.new,
            },
            "rewards": {"length": {"kind": "function"}},
            "kl": {"coef": 0.04, "unbiased": False},
            "update": {"epochs": args.epochs},
            "optim": {"lr": 1e-5},
            "eval": {"every": 10_000, "num": 1, "max_completion_length": 1},
            "checkpoint": {"every": 10_000},
        }
        recipe = check(Recipe, tables, "benchmark")
        run = launch(Console(quiet=True), recipe, functions={"length": reward})
        assert run is not None
        rows = read_metrics(run)[2:]
    parts = ("time/step", "time/sample", "time/score", "time/reward", "time/update")
    return {
        "seconds": statistics.median(r["time/step"] for r in rows),
        "parts": {p: round(statistics.median(r[p] for r in rows), 2) for p in parts},
        "mean_length": statistics.mean(r[KEY] for r in rows),
    }


def run_trl(args: argparse.Namespace) -> dict[str, object]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from operando.models.layers import parse_layer_set
    from operando.models.load import resolve
    from operando.recipe.data import WordsTaskConfig
    from operando.tasks.words import load_words

    where = resolve(args.model)
    task = load_words(WordsTaskConfig(kind="words", num_steps=(1,), num_train=64, num_held_out=1))
    data = Dataset.from_list([{"prompt": f"Q: {e.question}\nA:"} for e in task.train])
    seconds: list[float] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds.append(time.perf_counter() - self.started)

    model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, args.dtype))
    rows = args.prompts * args.group
    per_pass = args.trl_batch or rows
    layers = parse_layer_set(args.layers, model.config.num_hidden_layers)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[reward],
            args=GRPOConfig(
                output_dir=folder,
                max_steps=args.steps * args.epochs,
                num_generations=args.group,
                per_device_train_batch_size=per_pass,
                gradient_accumulation_steps=rows // per_pass,
                max_completion_length=args.new,
                beta=0.04,
                learning_rate=1e-5,
                use_bias_correction_kl=False,
                use_cpu=args.device == "cpu",
                bf16=False,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                gradient_checkpointing=False,
                temperature=1.0,
                disable_tqdm=True,
                num_iterations=args.epochs,
            ),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(where),
            peft_config=LoraConfig(
                r=32, lora_alpha=32, target_modules=targets, layers_to_transform=list(layers)
            ),
            callbacks=[Timer()],
        )
        parts: dict[str, float] = {"sample": 0.0, "sample+score": 0.0}
        for name, key in (
            ("_generate_single_turn", "sample"),
            ("_generate_and_score_completions", "sample+score"),
        ):
            _timed(trainer, name, key, parts)
        trainer.train()
    # With several epochs TRL counts each optimizer step; a rollout batch is `epochs` of them.
    whole = [sum(seconds[i : i + args.epochs]) for i in range(0, len(seconds), args.epochs)]
    lengths = [h[KEY] for h in trainer.state.log_history if KEY in h]
    return {
        "seconds": statistics.median(whole[1:]),
        "parts": {k: round(v / args.steps, 2) for k, v in parts.items()},
        "mean_length": statistics.mean(lengths[1:]),
    }


def peak_mb(device: str) -> int:
    """Return the peak of this process in MiB: of the card's memory, or resident."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _timed(trainer: object, name: str, key: str, parts: dict[str, float]) -> None:
    inner = getattr(trainer, name)

    def timed(*args: object, **keywords: object) -> object:
        started = time.perf_counter()
        result = inner(*args, **keywords)
        parts[key] += time.perf_counter() - started
        return result

    setattr(trainer, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shape", help="random weights of this shape instead of a model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--trl-batch", type=int)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--only", choices=("operando", "trl"))
    args = parser.parse_args()
    if args.only:
        result = run_operando(args) if args.only == "operando" else run_trl(args)
        print("RESULT " + json.dumps(result | {"peak_mb": peak_mb(args.device)}))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        model = ["--model", str(write_model(args.shape, Path(folder)))] if args.shape else []
        for peer in ("operando", "trl") if find_spec("trl") else ("operando",):
            done = subprocess.run(
                [
                    sys.executable,
                    str(Path(__file__).resolve()),
                    *sys.argv[1:],
                    *model,
                    "--only",
                    peer,
                ],
                capture_output=True,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                check=False,
            )
            lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
            if not lines:
                sys.exit(f"{peer} failed:\n{done.stderr[-2000:]}\n{results}")
            results[peer] = json.loads(lines[0].removeprefix("RESULT "))
            print(f"# {peer}: {results[peer]}", flush=True)
    if "trl" not in results:
        print("RESULT " + json.dumps(results | {"trl": "not installed"}))
        return
    ratio = results["trl"]["seconds"] / results["operando"]["seconds"]
    memory = results["trl"]["peak_mb"] / results["operando"]["peak_mb"]
    ratios = {"speed_ratio": round(ratio, 2), "memory_ratio": round(memory, 2)}
    print("RESULT " + json.dumps(results | ratios))


if __name__ == "__main__":
    main()
