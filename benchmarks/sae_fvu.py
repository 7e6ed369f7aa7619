"""Whole SAE training on the CPU: error and seconds, operando against sae-lens and sparsify.

    OMP_NUM_THREADS=1 .venv-interop/bin/python benchmarks/sae_fvu.py

All sides train on the same batches in the same order for the same number of steps with the same
rate, each with its own loss and initialisation, and are asked for the error on the same held-out
tokens (fraction of variance unexplained, centred per dimension). The activations are synthetic:
benchmarks/sae_step.py says which.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import sae_step
import torch
from torch import Tensor

from operando.run import SeedTree
from operando.sae.sae import SAE
from operando.sae.train import SaeTrainConfig, Weights, _Trainer, fresh_weights


def fvu(reconstruct: Callable[[Tensor], Tensor], x_ND: Tensor) -> float:
    """Return sum |x - x_hat|^2 / sum |x - mean|^2."""
    with torch.no_grad():
        error = (x_ND - reconstruct(x_ND)).square().sum()
    return float(error / (x_ND - x_ND.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-in", type=int, default=896)
    parser.add_argument("--d-sae", type=int, default=7168)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    sae_step.LR = args.lr  # of every side
    tokens = args.batch * args.steps
    x_TD = sae_step.data(tokens + 4096, args.d_in, torch.Generator().manual_seed(0))
    train_TD, val_ND = x_TD[:tokens], x_TD[tokens:]
    runs: dict[str, tuple[Callable[[Tensor], object], Callable[[Tensor], Tensor]]] = {}
    for select in ("float32", "bfloat16"):
        config = SaeTrainConfig(
            d_sae=args.d_sae,
            k=args.k,
            batch_size=args.batch,
            lr=args.lr,
            select=select,
            epochs=10**6,
        )
        own = _Trainer(fresh_weights(train_TD, config, SeedTree(0)), config, train_TD)

        def reconstruct(x_ND: Tensor, weights: Weights = own.weights) -> Tensor:
            return SAE(*weights, activation="topk_relu", k=args.k).reconstruct(x_ND)

        runs[f"operando {select}"] = own.step, reconstruct
    lens, coder, steps = sae_step.peer_models(args)
    runs["sae-lens"] = steps["sae-lens"], lens
    runs["sparsify"] = steps["sparsify"], lambda x_ND: coder(x_ND).sae_out
    found: dict[str, dict[str, float]] = {}
    for name, (step, reconstruct) in runs.items():
        started = time.perf_counter()
        for x_ND in train_TD.split(args.batch):
            step(x_ND)
        seconds = time.perf_counter() - started
        found[name] = {"seconds": round(seconds, 1), "fvu": round(fvu(reconstruct, val_ND), 4)}
    print(
        json.dumps(
            {"args": vars(args), "threads": torch.get_num_threads(), "results": found}, indent=1
        )
    )


if __name__ == "__main__":
    main()
