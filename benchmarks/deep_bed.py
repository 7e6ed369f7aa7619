"""The deep bed over seeds: what RL gains, where the gain lies, and what the controls bring.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/deep_bed.py --seeds 10-19

Trains recipes/deep.toml and its controls once a seed (the seed of the run: prompts, sampling, LoRA
weights; the base and the problems stay), answers held-out problems greedily, and of the arm `deep`
measures decision depth, where the two models' first choices differ, and pass@k. Results are kept in
OUT/results.json; what is there is not done again. `--table` prints it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from rich.console import Console

from operando.evals.depth import measure_depth
from operando.evals.evaluate import evaluate
from operando.evals.forced import Edit, Pair
from operando.evals.questions import EvalConfig
from operando.launch import launch, quieten_libraries
from operando.models.load import load_model
from operando.models.policy import Policy
from operando.recipe_io import load_recipe
from operando.rollout.sampler import Sampling
from operando.run import SeedTree, write_json
from operando.run_folder import read_recipe, start_of
from operando.setup import make_prompt_sets
from operando.tasks.load import load_task
from operando.update.checkpoint import load_weights

ARMS = ("deep", "deep_format", "deep_random", "deep_majority", "deep_hack")
LOGGED = 400  # held-out problems of the greedy answers
DEPTH, SEARCH = 200, 60  # of the depth, and of its search for a constant edit
DRAWN, SAMPLES = 200, 16  # of pass@k


def run_arm(arm: str, seed: int, runs: Path) -> tuple[Path, float]:
    """Train one arm, if its folder isn't there; return folder and seconds."""
    recipe = load_recipe(arm, (f"seed={seed}", f"name={arm}_{seed}", f"runs_dir={runs}"))
    folder = runs / recipe.name
    started = time.monotonic()
    if not (folder / "results.json").is_file():
        launch(Console(quiet=True), recipe, resume=folder.is_dir())
    return folder, round(time.monotonic() - started, 1)


def flips_by_step(folder: Path, num: int) -> dict[str, int]:
    """Return how many answers' first choices differ at step 1, 2, ... and in the final answer."""
    recipe = read_recipe(folder)
    task = load_task(recipe.task)
    base, trained = (
        Policy(load_model(recipe.model), recipe.model, SeedTree(recipe.seed)) for _ in range(2)
    )
    load_weights(folder, recipe.steps, trained)
    wanted = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"num": num})})
    _, prompts = make_prompt_sets(wanted, task, base.tokenizer, base.base.config, start_of(folder))
    length = recipe.rollout.max_completion_length
    pair = Pair(base.base, trained.base, base.tokenizer, task, Sampling(length), True, recipe.seed)
    decoded = pair.decode(prompts, "base", Edit("other", length))
    where: Counter[str] = Counter()
    for prompt, answer, forced in zip(prompts, decoded.answers, decoded.forced, strict=True):
        family = str(prompt.example.columns["family"])
        for place, _ in forced:
            text = str(base.tokenizer.decode(list(answer.ids[:place])))
            # a story decides before the "=", a chain after it
            step = text.count("<" if family == "maze" else "=") + (family != "chain")
            where[f"{family} {'answer' if '####' in text else step}"] += 1
    return dict(sorted(where.items()))


def measure(arm: str, folder: Path) -> dict[str, object]:
    """Return the figures of one trained run."""
    base, trained = evaluate(folder, EvalConfig(num=LOGGED)).rows
    drawn = evaluate(folder, EvalConfig(num=LOGGED, temperature=1.0)).rows
    figures: dict[str, object] = {
        "base": base.all.right.value,
        "trained": trained.all.right.value,
        "n": base.n,
        "labels_at_temperature_1": {
            f"{who} {name}": share
            for who, row in zip(("base", "trained"), drawn, strict=True)
            for name, share in [
                *((label, share) for label, (share, _) in row.all.labels.items()),
                ("right", row.all.right.value),
            ]
        },
    }
    if arm != "deep":
        return figures
    depth = measure_depth(folder, num=DEPTH, search=SEARCH)
    shares = {
        f"{row.arm} {row.k}": None if row.share is None else row.share.value for row in depth.rows
    }
    for name, edit in (("token", depth.token), ("prefix", depth.prefix), ("prompt", depth.prompt)):
        if edit is not None and edit.share is not None:
            shares[f"constant {name}"] = edit.share.value
    many = EvalConfig(num=DRAWN, temperature=1.0, samples=SAMPLES)
    curves = [dict(row.all.pass_at) for row in evaluate(folder, many).rows]
    return figures | {
        "shares": shares,
        "flips": depth.flips,
        "flips_by_step": flips_by_step(folder, DEPTH),
        "pass_at_base": curves[0],
        "pass_at_trained": curves[1],
    }


def table(results: dict[str, dict[str, object]]) -> str:
    """Return one line a run, in Markdown."""
    lines = ["| arm | seed | base | trained | gain | one token | two | constant | seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for key, one in sorted(results.items()):
        arm, _, seed = key.rpartition("_")
        base, trained = float(str(one["base"])), float(str(one["trained"]))
        shares = one.get("shares", {})
        assert isinstance(shares, dict)
        names = ("base, trained's tokens 1", "base, trained's tokens 2")
        told = ["" if shares.get(n) is None else f"{shares[n]:.0%}" for n in names]
        constant = [v for n, v in shares.items() if n.startswith("constant")]
        told.append(f"{max(constant):.0%}" if constant else "")
        rates = " | ".join([f"{base:.1%}", f"{trained:.1%}", f"{100 * (trained - base):+.1f}"])
        lines.append(f"| {arm} | {seed} | {rates} | {' | '.join(told)} | {one['seconds']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="10-19", help="first-last")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--out", type=Path, default=Path("runs/deep_bed"))
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    args = parser.parse_args()
    quieten_libraries()
    file = args.out / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    first, _, last = args.seeds.partition("-")
    for seed in range(int(first), int(last or first) + 1):
        for arm in args.arms.split(","):
            if args.table or f"{arm}_{seed}" in results:
                continue
            folder, seconds = run_arm(arm, seed, args.out)
            results[f"{arm}_{seed}"] = measure(arm, folder) | {"seconds": seconds}
            write_json(file, results)
            print(f"{arm}_{seed}: {json.dumps(results[f'{arm}_{seed}'])}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
