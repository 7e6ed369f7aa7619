"""One SAE training step on the CPU: operando against sae_rl's dense autograd step, in one run.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/sae_step.py

sae_rl's step: nn.Linear encoder and decoder, top-k by scatter, loss.backward(), clip_grad_norm_,
torch.optim.Adam as it comes, decoder columns renormalised. Ours: the same step in mode sae_rl, with
float32 selection and with the bfloat16 preselection. First loss and gradients of all are compared
on the same batch, and the weights after three steps; a relative gap above 1e-6 stops the benchmark.
With --peers (in .venv-interop) the training steps of sae-lens and eai-sparsify are timed too, in
float32, with Adam(fused=True) and, for sparsify, its normalisation of the decoder; no dead features
on any side, and no comparison of results: their losses and inits are their own.

Steps are interleaved, so that a busy machine slows all alike; medians are given.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from operando.run import SeedTree
from operando.sae.train import SaeTrainConfig, Weights, _Trainer, fresh_weights, sparse_step

LR = 1e-4


class SaeRl(nn.Module):
    def __init__(self, weights: Weights, k: int) -> None:
        super().__init__()
        d_sae, d_in = weights.W_enc_MD.shape
        self.k = k
        self.b_pre = nn.Parameter(weights.b_pre_D.clone())
        self.encoder, self.decoder = nn.Linear(d_in, d_sae), nn.Linear(d_sae, d_in)
        with torch.no_grad():
            self.encoder.weight.copy_(weights.W_enc_MD)
            self.encoder.bias.copy_(weights.b_enc_M)
            self.decoder.weight.copy_(weights.W_dec_MD.T)
            self.decoder.bias.copy_(weights.b_dec_D)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        z_NM = self.encoder(x_ND - self.b_pre)
        value_Nk, idx_Nk = z_NM.topk(self.k, dim=1)
        sparse_NM = torch.zeros_like(z_NM).scatter(1, idx_Nk, value_Nk)
        return self.decoder(sparse_NM), sparse_NM

    def as_weights(self) -> list[Tensor]:
        return [
            self.encoder.weight.detach(),
            self.encoder.bias.detach(),
            self.decoder.weight.detach().T,
            self.b_pre.detach(),
            self.decoder.bias.detach(),
        ]

    def gradients(self) -> list[Tensor]:
        found = (
            self.encoder.weight,
            self.encoder.bias,
            self.decoder.weight,
            self.b_pre,
            self.decoder.bias,
        )
        grads = [p.grad for p in found if p.grad is not None]
        return [g.T if i == 2 else g for i, g in enumerate(grads)]


def sae_rl_step(model: SaeRl, adam: torch.optim.Adam, x_ND: Tensor, fired_M: Tensor) -> float:
    x_hat_ND, sparse_NM = model(x_ND)
    loss = (x_ND - x_hat_ND).square().mean()
    adam.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    with torch.no_grad():
        weight = model.decoder.weight
        weight.div_(weight.norm(dim=0, keepdim=True).clamp(min=1e-8))
        fired_M += (sparse_NM != 0).sum(dim=0)
    return loss.item()


def data(tokens: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Return correlated activations: 2048 hidden directions, 32 at a time, plus noise."""
    hidden = torch.randn(2048, d_in, generator=generator) / d_in**0.5
    idx = torch.randint(2048, (tokens, 32), generator=generator)
    x_TD = torch.stack([hidden[rows].sum(dim=0) for rows in idx])
    return x_TD + 0.1 * torch.randn(tokens, d_in, generator=generator)


def gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def trainer(
    weights: Weights, args: argparse.Namespace, batch: int, select: str, x_TD: Tensor
) -> _Trainer:
    config = SaeTrainConfig(
        d_sae=args.d_sae,
        k=args.k,
        mode="sae_rl",
        batch_size=batch,
        lr=LR,
        select=select,
        epochs=10**6,
    )
    return _Trainer(Weights(*(t.clone() for t in weights)), config, x_TD)


def peer_models(
    args: argparse.Namespace,
) -> tuple[nn.Module, nn.Module, dict[str, Callable[[Tensor], object]]]:
    """Return an SAE of sae-lens and one of sparsify, and one training step of each as their
    trainers write it."""
    import sae_lens
    import sparsify
    from sae_lens.saes.sae import TrainStepInput

    lens = sae_lens.TopKTrainingSAE(
        sae_lens.TopKTrainingSAEConfig(d_in=args.d_in, d_sae=args.d_sae, k=args.k)
    )
    coder = sparsify.SparseCoder(
        args.d_in, sparsify.SparseCoderConfig(num_latents=args.d_sae, k=args.k)
    )
    adams = [torch.optim.Adam(m.parameters(), lr=LR, fused=True) for m in (lens, coder)]

    def lens_step(x_ND: Tensor) -> None:
        none_M = torch.zeros(args.d_sae, dtype=torch.bool)
        out = lens.training_forward_pass(TrainStepInput(x_ND, {}, none_M, 0, False))
        with torch.no_grad():
            out.feature_acts.bool().float().sum(dim=0)
        out.loss.backward()
        nn.utils.clip_grad_norm_(lens.parameters(), 1.0)
        adams[0].step()
        adams[0].zero_grad()

    def sparsify_step(x_ND: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(x_ND).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adams[1].step()
        adams[1].zero_grad()

    return lens, coder, {"sae-lens": lens_step, "sparsify": sparsify_step}


def compare(args: argparse.Namespace, batch: int, x_TD: Tensor) -> dict[str, object]:
    config = SaeTrainConfig(d_sae=args.d_sae, k=args.k, mode="sae_rl")
    weights = fresh_weights(x_TD, config, SeedTree(0))
    model = SaeRl(weights, args.k)
    x_ND = x_TD[:batch]
    x_hat_ND, _ = model(x_ND)
    loss = (x_ND - x_hat_ND).square().mean()
    loss.backward()
    step = sparse_step(weights, x_ND, args.k)
    fast = sparse_step(weights, x_ND, args.k, W_enc_bf16_MD=weights.W_enc_MD.bfloat16())
    gaps = {
        "loss": abs(float(step.loss) / loss.item() - 1),
        "gradients": gap(list(step.gradients), model.gradients()),
        "gradients_bfloat16": gap(list(fast.gradients), model.gradients()),
    }
    # three whole steps
    adam, fired_M = torch.optim.Adam(model.parameters(), lr=LR), torch.zeros(args.d_sae)
    ours = {s: trainer(weights, args, batch, s, x_TD) for s in ("float32", "bfloat16")}
    for part in x_TD.split(batch)[:3]:
        sae_rl_step(model, adam, part, fired_M)
        for one in ours.values():
            one.step(part)
    for select, one in ours.items():
        gaps[f"weights_after_3_{select}"] = gap(list(one.weights), model.as_weights())
    assert max(gaps["loss"], gaps["gradients"], gaps["weights_after_3_float32"]) < 1e-6, gaps
    paths: dict[str, Callable[[Tensor], object]] = {
        "sae_rl": lambda x: sae_rl_step(model, adam, x, fired_M),
        "operando float32": lambda x: ours["float32"].step(x),
        "operando bfloat16": lambda x: ours["bfloat16"].step(x),
    }
    if args.peers:
        paths |= peer_models(args)[2]
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    parts = x_TD.split(batch)
    for repeat in range(args.repeats + 1):
        for name, run in paths.items():
            started = time.perf_counter()
            run(parts[repeat % len(parts)])
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(all_[1:]) for name, all_ in seconds.items()}
    return {
        "batch": batch,
        "gaps": {k: float(f"{v:.2g}") for k, v in gaps.items()},
        "median_ms": {name: round(1000 * s, 1) for name, s in medians.items()},
        "least_ms": {name: round(1000 * min(s[1:]), 1) for name, s in seconds.items()},
        "theirs_over_ours": {
            f"{name} / {own}": round(s / medians[own], 2)
            for name, s in medians.items()
            for own in ("operando float32", "operando bfloat16")
            if not name.startswith("operando")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--d-in", type=int, default=896)
    parser.add_argument("--d-sae", type=int, default=7168)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    x_TD = data(3 * max(args.batches), args.d_in, torch.Generator().manual_seed(0))
    results = [compare(args, batch, x_TD) for batch in args.batches]
    machine = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps({"args": vars(args), **machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
