"""One SAE training step on a device: operando against the dense autograd step, in one run.

    .venv/bin/python benchmarks/sae_device.py --device cuda

Both train in mode sae_rl on the same batches; the losses of the first step are compared. The hours
are those of an epoch of the published size: 180 SAEs of 7168 features, 2,000,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from sae_step import LR, SaeRl, data, sae_rl_step

from operando.run import SeedTree
from operando.sae.train import SaeTrainConfig, Weights, _Trainer, fresh_weights

SAES, TOKENS = 180, 2_000_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--d-in", type=int, default=896)
    parser.add_argument("--d-sae", type=int, default=7168)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    x_TD = data(2 * args.batch, args.d_in, torch.Generator().manual_seed(0)).to(args.device)
    config = SaeTrainConfig(d_sae=args.d_sae, k=args.k, mode="sae_rl")
    fresh = fresh_weights(x_TD, config, SeedTree(0))
    model = SaeRl(fresh, args.k).to(args.device)
    adam = torch.optim.Adam(model.parameters(), lr=LR)
    fired_M = torch.zeros(args.d_sae, device=args.device)

    def ours(select: str) -> _Trainer:
        some = SaeTrainConfig(
            d_sae=args.d_sae,
            k=args.k,
            mode="sae_rl",
            batch_size=args.batch,
            lr=LR,
            select=select,
            epochs=10**6,
        )
        return _Trainer(Weights(*(t.clone().to(args.device) for t in fresh)), some, x_TD)

    trainers = {f"operando {select}": ours(select) for select in ("float32", "bfloat16")}
    parts = x_TD.split(args.batch)
    seconds: dict[str, list[float]] = {name: [] for name in ("dense", *trainers)}
    first: dict[str, float] = {}
    for repeat in range(args.repeats + 3):
        for name in seconds:
            x_ND = parts[repeat % 2]
            wait(args.device)
            started = time.perf_counter()
            if name == "dense":
                loss = sae_rl_step(model, adam, x_ND, fired_M)
            else:
                loss = float(trainers[name].step(x_ND).loss)
            wait(args.device)
            if repeat == 0:
                first[name] = loss
            if repeat >= 3:
                seconds[name].append(time.perf_counter() - started)
    gap = max(abs(loss / first["dense"] - 1) for loss in first.values())
    assert gap < 1e-5, first
    medians = {name: statistics.median(all_) for name, all_ in seconds.items()}
    result = {
        "args": vars(args),
        "loss_gap": gap,
        "median_ms": {name: round(1000 * s, 3) for name, s in medians.items()},
        "dense_over_ours": {
            n: round(medians["dense"] / s, 2) for n, s in medians.items() if n != "dense"
        },
        "hours_an_epoch": {
            n: round(SAES * TOKENS / args.batch * s / 3600, 2) for n, s in medians.items()
        },
    }
    print("RESULT " + json.dumps(result))


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
