"""What a step leaves behind: its metrics row (TRL's names), its rollouts, its held-out answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from operando import parallel
from operando.models.freeze import Certificate
from operando.recipe.run import Recipe
from operando.rollout.greedy_eval import Graded
from operando.run import Run, write_json, write_parquet
from operando.run_folder import read_metrics
from operando.text import encodable
from operando.types import Batch, Rewards, Trace
from operando.update.checks import duplicate_fraction, zero_variance_fraction
from operando.update.losses import Totals, effective_sample_size, kl_estimate
from operando.update.objective import Objective
from operando.update.optim import UpdateStats
from operando.update.reduce import masked_mean, masked_sum, quarter_means


class Clock:
    """Where the seconds of a step went. Example: clock.lap("sample"); clock.metrics(num_tokens)"""

    def __init__(self) -> None:
        self.started = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self.last
        self.last = now

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """Return seconds of each lap, of the step, and completion tokens per second of the step.

        A clock that stood still measured no rate.
        """
        total = self.last - self.started
        laps = {f"time/{name}": seconds for name, seconds in self.laps.items()}
        rate = {"tokens_per_second": num_tokens / total} if total > 0 else {}
        return laps | {"time/step": total} | rate


def batch_metrics(
    batch: Batch,
    rewards: Rewards,
    trace: Trace,
    graded: Sequence[Graded],
    dropped_B: Bool[Tensor, " B"],
) -> dict[str, float]:
    """Return the metrics of one batch of rollouts."""
    mask_BT = batch.mask_BT
    total_B = _applicable(masked_sum(rewards.total_BT, mask_BT))
    gap_BT = (trace.logp_BT - batch.sampling_logp_BT).abs()
    metrics = {
        "reward": float(total_B.mean()),
        "reward_std": float(total_B.std()) if len(total_B) > 1 else 0.0,
        "train/correct": sum(j.verdict.correct for j in graded) / len(graded),
        "frac_reward_zero_std": zero_variance_fraction(batch, rewards),
        "entropy": float(masked_mean(trace.entropy_BT, mask_BT)),
        "completions/mean_length": float(mask_BT.sum(1).float().mean()),
        "completions/clipped_ratio": sum(r.is_truncated for r in batch.rollouts) / len(batch),
        "completions/duplicate_ratio": duplicate_fraction(batch),
        "sampler/gap_mean": float(masked_mean(gap_BT, mask_BT)),
        "sampler/gap_max": float((gap_BT * mask_BT).max()),
        "sampler/ess": effective_sample_size(trace.logp_BT, batch.sampling_logp_BT, mask_BT),
        "discarded": float(dropped_B.float().mean()),
    }
    loops = [n for r in batch.rollouts for n in r.exit_loops[len(r.prompt.ids) :]]
    if loops:  # of a recursive model's completion tokens
        metrics["loops/mean"] = sum(loops) / len(loops)
    for name, part_BT in rewards.parts.items():
        part_B = _applicable(masked_sum(part_BT, mask_BT))
        if not len(part_B):  # it applied to no rollout: no number, rather than a nought
            continue
        metrics[f"rewards/{name}/mean"] = float(part_B.mean())
        metrics[f"rewards/{name}/std"] = float(part_B.std()) if len(part_B) > 1 else 0.0
        if name in rewards.dense:  # the sum over tokens grows with length; this does not
            metrics[f"rewards/{name}/token_mean"] = float(masked_mean(part_BT, mask_BT))
    if trace.ref_logp_BT is not None:
        kl_BT = kl_estimate(trace.logp_BT, trace.ref_logp_BT, "k3")
        metrics["kl"] = float(masked_mean(kl_BT, mask_BT))
        metrics["kl_max"] = float((kl_BT * mask_BT).max())
        quarters = quarter_means(kl_BT, mask_BT).tolist()
        metrics |= {f"kl/q{i}": value for i, value in enumerate(quarters, start=1)}
    return metrics | dict(rewards.metrics)


def _applicable(x_B: Float[Tensor, " B"]) -> Float[Tensor, " b"]:
    return x_B[~x_B.isnan()]


def update_metrics(
    objectives: Sequence[Objective], taken: UpdateStats, totals: Totals
) -> dict[str, float]:
    """Return the metrics of one optimizer step."""
    tokens = max(1, totals.tokens)
    return {
        "loss": sum(float(o.loss.detach()) for o in objectives),
        "policy_loss": sum(o.policy_loss for o in objectives),
        "value_loss": sum(o.value_loss for o in objectives),
        "clip_ratio/low": sum(o.clipped_low for o in objectives) / tokens,
        "clip_ratio/high": sum(o.clipped_high for o in objectives) / tokens,
        "ratio_gap": max(o.ratio_gap for o in objectives),
        "grad_norm": taken.grad_norm,
        "update_norm": taken.update_norm,
        "lr": taken.lr,
    } | dict(taken.metrics)


def eval_metrics(graded: Sequence[Graded], proxies: Rewards | None) -> dict[str, float]:
    """Return held-out metrics: the truth, and beside it what each reward part would have paid."""
    num = len(graded)
    metrics = {
        "eval/correct": sum(j.verdict.correct for j in graded) / num,
        "eval/n": float(num),
        "eval/mean_length": sum(len(j.rollout.completion_ids) for j in graded) / num,
        "eval/clipped_ratio": sum(j.rollout.is_truncated for j in graded) / num,
    }
    if proxies is not None:
        for name, part_BT in proxies.parts.items():
            part_B = _applicable(part_BT.sum(1))
            if len(part_B):
                metrics[f"eval/rewards/{name}"] = float(part_B.mean())
    return metrics


def write_rollouts(
    run: Run,
    step: int,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    rewards: Rewards,
    trace: Trace,
    adv_BT: Float[Tensor, "B T"],
    graded: Sequence[Graded],
    dropped_B: Bool[Tensor, " B"],
) -> None:
    """Write every rollout of a step, discarded ones too, with its per-token channels."""
    rollouts, lengths = batch.rollouts, batch.mask_BT.sum(1).tolist()
    vocabulary: dict[int, str] = {}

    def text(token: int) -> str:
        if token not in vocabulary:
            vocabulary[token] = encodable(str(tokenizer.decode([token])))
        return vocabulary[token]

    def per_token(x_BT: Float[Tensor, "B T"] | None) -> list[list[float] | None]:
        if x_BT is None:
            return [None] * len(batch)
        return [row[:n] for row, n in zip(x_BT.tolist(), lengths, strict=True)]

    def per_row(x_BT: Float[Tensor, "B T"]) -> list[float | None]:
        sums = masked_sum(x_BT, batch.mask_BT).tolist()
        return [None if s != s else s for s in sums]  # NaN: not applicable

    columns: dict[str, Sequence[object]] = {
        "step": [step] * len(batch),
        "group": [r.group for r in rollouts],
        "sample": [r.sample for r in rollouts],
        "prompt": [r.prompt.text for r in rollouts],
        "completion": [r.completion for r in rollouts],
        "answer": [r.prompt.example.answer for r in rollouts],
        "correct": [j.verdict.correct for j in graded],
        "reason": [j.verdict.reason for j in graded],
        "is_truncated": [r.is_truncated for r in rollouts],
        "discarded": dropped_B.tolist(),
        "reward": per_row(rewards.total_BT),
        **{f"rewards/{name}": per_row(part_BT) for name, part_BT in rewards.parts.items()},
        **rewards.columns,
        **{
            f"data/{name}": [r.prompt.example.columns.get(name) for r in rollouts]
            for name in rollouts[0].prompt.example.columns
        },
        "advantage": [sum(a) / max(1, len(a)) for a in per_token(adv_BT) if a is not None],
        "prompt_ids": [list(r.prompt.ids) for r in rollouts],
        "completion_ids": [list(r.completion_ids) for r in rollouts],
        "tokens": [[text(t) for t in r.completion_ids] for r in rollouts],
        "sampling_logp": [list(r.sampling_logp) for r in rollouts],
        "old_logp": per_token(trace.logp_BT),
        "ref_logp": per_token(trace.ref_logp_BT),
        "entropy": per_token(trace.entropy_BT),
        "advantage_tokens": per_token(adv_BT),
        "reward_tokens": per_token(rewards.total_BT),
    }
    write_parquet(run.folder / "rollouts" / f"step_{step:05d}.parquet", columns)


def write_held_out(run: Run, step: int, graded: Sequence[Graded]) -> None:
    """Write every held-out answer with its verdict."""
    columns: Mapping[str, Sequence[object]] = {
        "example_id": [j.rollout.prompt.example.id for j in graded],
        "question": [j.rollout.prompt.example.question for j in graded],
        "completion": [j.rollout.completion for j in graded],
        "answer": [j.rollout.prompt.example.answer for j in graded],
        "correct": [j.verdict.correct for j in graded],
        "reason": [j.verdict.reason for j in graded],
        "is_truncated": [j.rollout.is_truncated for j in graded],
        "length": [len(j.rollout.completion_ids) for j in graded],
    }
    write_parquet(run.folder / "evals" / f"held_out_step_{step:05d}.parquet", columns)


def write_certificate(run: Run, certificate: Certificate) -> None:
    """Write the newest certificate to the run folder; a failed check is a warning."""
    write_json(run.folder / "certificate.json", certificate.as_json())
    failed = [f"{check.name}: {check.detail}" for check in certificate.checks if not check.passed]
    if failed:
        run.warn(f"step {certificate.step}: the insulation certificate fails: {'; '.join(failed)}")


def write_results(run: Run, recipe: Recipe) -> None:
    """Write results.json from the rows of metrics.jsonl: counts before and after, and the seconds
    of all steps, by whichever process each was taken."""
    steps = read_metrics(run.folder)
    rows = [row for row in steps if "eval/correct" in row]
    first, last = rows[0], rows[-1]
    write_json(
        run.folder / "results.json",
        {
            "steps": recipe.steps,
            "seconds": round(sum(row.get("time/step", 0.0) for row in steps), 1),
            "held_out": {"base": _count(first), "trained": _count(last)},
            "metrics": last,
        },
    )


def _count(row: Mapping[str, float]) -> dict[str, int]:
    num = int(row["eval/n"])
    return {"step": int(row["step"]), "correct": round(row["eval/correct"] * num), "n": num}


def not_finite(
    run: Run, step: int, batch: Batch, rewards: Rewards, adv_BT: Float[Tensor, "B T"], why: str
) -> FloatingPointError:
    """Return the error that ends a run before its step; the batch is dumped in the run folder."""
    file = run.folder / f"broken_step_{step:05d}.pt"
    if parallel.rank() == 0:
        torch.save(
            {
                "ids_BS": batch.ids_BS,
                "mask_BT": batch.mask_BT,
                "completions": [r.completion for r in batch.rollouts],
                "parts": dict(rewards.parts),
                "adv_BT": adv_BT,
            },
            file,
        )
    return FloatingPointError(f"step {step}: {why}; no weight was changed, the batch is in {file}")
