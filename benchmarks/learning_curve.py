"""Does operando learn as TRL does? Both train the starter; their reward curves are compared.

    OMP_NUM_THREADS=1 .venv-interop/bin/python benchmarks/learning_curve.py

Same model, problems, prompt text, reward function (1 for a right answer, by the task's verifier),
LoRA, optimizer, group size and loss: no KL, token mean (TRL's "dapo"), advantages over the group's
std. Each run is a process of its own. Seeds are not shared streams, so the two sets of seeds are
independent samples: the difference of their means comes with Welch's 95 % t-interval.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RANK = 32
LR = 1e-3
NUM_STEPS = (1, 2, 2, 2)  # operations in a problem, as in recipes/demo.toml
NUM_TRAIN = 2000
MAX_COMPLETION = 48
EOS = 1  # of the starter
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def right(
    completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: object
) -> list[float]:
    """Give 1 for a finished, right answer."""
    from operando.tasks.words import verify
    from operando.types import Example

    return [
        float(verify(Example("", "", gold), text, is_truncated=ids[-1] != EOS).correct)
        for text, ids, gold in zip(completions, completion_ids, answer, strict=True)
    ]


def run_operando(args: argparse.Namespace) -> list[float]:
    """Return the mean reward of each step."""
    from rich.console import Console

    from operando.launch import launch
    from operando.recipe.run import Recipe
    from operando.recipe_io import check
    from operando.run_folder import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        tables: dict[str, object] = {
            "name": "curve",
            "steps": args.steps,
            "seed": args.seed,
            "runs_dir": folder,
            "model": {"id": "starter", "lora": {"rank": RANK, "alpha": RANK, "targets": TARGETS}},
            "task": {
                "kind": "words",
                "num_steps": NUM_STEPS,
                "num_train": NUM_TRAIN,
                "num_held_out": 1,
            },
            "rollout": {
                "num_prompts": args.prompts,
                "num_generations": args.group,
                "max_completion_length": MAX_COMPLETION,
            },
            "rewards": {"right": {"kind": "function"}},
            "advantage": {"kind": "group", "scale": "group"},
            "loss": {"kind": "clip", "clip_low": 0.2, "clip_high": 0.2},
            "update": {"aggregation": "token_mean"},
            "optim": {"lr": LR, "betas": [0.9, 0.999], "weight_decay": 0, "max_grad_norm": 1},
            "eval": {"every": 10_000, "num": 1, "max_completion_length": 1},
            "checkpoint": {"every": 10_000},
        }
        recipe = check(Recipe, tables, "benchmark")
        run = launch(Console(quiet=True), recipe, functions={"right": right})
        assert run is not None
        return [row["reward"] for row in read_metrics(run)[1:]]


def run_trl(args: argparse.Namespace) -> list[float]:
    """Return the mean reward of each step."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    from operando.models.load import STARTER
    from operando.recipe.data import WordsTaskConfig
    from operando.tasks.words import load_words

    config = WordsTaskConfig(kind="words", num_steps=NUM_STEPS, num_train=NUM_TRAIN, num_held_out=1)
    rows = [
        {"prompt": f"Q: {e.question}\nA:", "answer": e.answer} for e in load_words(config).train
    ]
    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    assert tokenizer.eos_token_id == EOS, tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(STARTER, dtype=torch.float32),
            reward_funcs=[right],
            args=GRPOConfig(
                output_dir=folder,
                max_steps=args.steps,
                seed=args.seed,
                num_generations=args.group,
                per_device_train_batch_size=args.prompts * args.group,
                max_completion_length=MAX_COMPLETION,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                beta=0.0,
                loss_type="dapo",
                scale_rewards="group",
                epsilon=0.2,
                num_iterations=1,
                learning_rate=LR,
                lr_scheduler_type="constant",
                warmup_steps=0,
                adam_beta1=0.9,
                adam_beta2=0.999,
                weight_decay=0.0,
                max_grad_norm=1.0,
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                gradient_checkpointing=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS),
        )
        trainer.train()
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


def curve(peer: str, seed: int, args: argparse.Namespace) -> list[float]:
    """Return the curve of one run in a process of its own."""
    settings = ["--steps", args.steps, "--prompts", args.prompts, "--group", args.group]
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).resolve()),
            "--only",
            peer,
            "--seed",
            str(seed),
            *map(str, settings),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{peer}, seed {seed}, failed:\n{done.stderr[-2000:]}")
    rewards = json.loads(lines[0].removeprefix("RESULT "))
    assert len(rewards) == args.steps, f"{peer}: {len(rewards)} steps"
    return rewards


def thirds(rewards: list[float]) -> list[float]:
    """Return the mean reward of the first, middle and last third of the steps."""
    n = len(rewards)
    cuts = (0, n // 3, 2 * n // 3, n)
    return [statistics.mean(rewards[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4, help="runs of each peer, at least 3")
    parser.add_argument("--seed", type=int, default=0, help="of one run, with --only")
    parser.add_argument("--only", choices=("operando", "trl"))
    args = parser.parse_args()
    if args.only:
        rewards = run_operando(args) if args.only == "operando" else run_trl(args)
        print("RESULT " + json.dumps(rewards))
        return
    from scipy.stats import ttest_ind

    found: dict[str, list[list[float]]] = {"operando": [], "trl": []}
    for seed in range(args.seeds):
        for peer, means in found.items():
            means.append(thirds(curve(peer, seed, args)))
            print(f"{peer} seed {seed}: " + " ".join(f"{m:.3f}" for m in means[-1]), flush=True)
    agree = True
    for third, name in enumerate(("first", "middle", "last")):
        ours = [means[third] for means in found["operando"]]
        theirs = [means[third] for means in found["trl"]]
        difference = statistics.mean(ours) - statistics.mean(theirs)
        interval = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
        agree = agree and interval.low <= 0 <= interval.high
        print(
            f"{name} third: operando {statistics.mean(ours):.3f}, TRL {statistics.mean(theirs):.3f}"
            f", difference {difference:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
        )
    said = "agree" if agree else "do NOT agree"
    print(f"the curves {said} within the 95 % intervals of {args.seeds} seeds each")


if __name__ == "__main__":
    main()
