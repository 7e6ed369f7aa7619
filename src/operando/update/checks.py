"""What is checked around the first step: each finding is a warning in words, with a remedy."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from operando.models.policy import Policy
from operando.models.scoring import flat_rows
from operando.types import Batch, Rewards, Trace
from operando.update.reduce import masked_mean, masked_sum

GAP_LIMIT = 0.05  # nats per token, mean; bf16 with unmerged LoRA stays under 0.01
# Nats, mean over a row's tokens: in bfloat16 another batch shape alone makes 0.03 to 0.05.
PADDING_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.15}

OVER_LIMIT = 0.1  # share of completions; 0.01 is what right base answers show


def check_machine() -> list[str]:
    """Return a warning if threads fight over the cores."""
    cores = os.cpu_count() or 1
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    if threads > cores:
        return [f"torch has {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}"]
    if load > 0.75 * cores and threads > 1 and cores <= 8:
        return [
            f"other processes keep {load:.1f} of {cores} cores busy, and torch's {threads} threads "
            "will wait for each other: set OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE"
        ]
    return []


def check_range(rewards: Rewards) -> list[str]:
    """Return a warning for each internal reward whose features leave the range of honest answers.

    By their making 1 % of right base answers are over the limit.
    """
    return [
        f"rewards.{name}: in a step, more than {OVER_LIMIT:.0%} of the completions showed its "
        "features more strongly than 99 % of right base answers do: the policy may be rewarded "
        f"the features and not for what they stood for (see {name}/over_limit; operando canary)"
        for name in rewards.parts
        if rewards.metrics.get(f"{name}/over_limit", 0.0) > OVER_LIMIT
    ]


@torch.no_grad()
def check_rollouts(batch: Batch, trace: Trace, rewards: Rewards) -> list[str]:
    """Return warnings about the first batch: sampler gap, duplicates, truncation, no signal."""
    warnings = []
    gap = float(masked_mean((trace.logp_BT - batch.sampling_logp_BT).abs(), batch.mask_BT))
    if gap > GAP_LIMIT:
        warnings.append(
            f"sampler and trainer disagree by {gap:.3f} nats per token (limit {GAP_LIMIT}): use "
            'float32, or update.sampler_correction = "token"'
        )
    copies = duplicate_fraction(batch)
    if copies > 0.8:
        warnings.append(
            f"{copies:.0%} of the completions are copies of a sibling: sampling is near-greedy. "
            "Raise rollout.temperature, or check the model's entropy"
        )
    cut = sum(r.is_truncated for r in batch.rollouts) / len(batch)
    if cut > 0.3:
        warnings.append(
            f"{cut:.0%} of the completions are cut at the limit: raise "
            "rollout.max_completion_length, or give a rollout.stop text"
        )
    flat = zero_variance_fraction(batch, rewards)
    if flat == 1.0 and batch.group_size > 1:
        warnings.append(
            "no group has siblings with different rewards, so the first step teaches nothing: "
            "easier problems, more siblings (rollout.num_generations), or a denser reward"
        )
    return warnings


@torch.no_grad()
def check_padding(policy: Policy, batch: Batch) -> list[str]:
    """Return a warning if a row's log-probs change when its siblings and its padding go away."""
    lengths = (batch.prompt_len_B + batch.mask_BT.sum(1)).tolist()
    short = min(range(len(batch)), key=lambda row: lengths[row])
    group = short // batch.group_size
    siblings = range(group * batch.group_size, (group + 1) * batch.group_size)
    packs = policy.micro_batches(batch, siblings, micro_tokens=10**9)[0]
    long = max(range(len(batch)), key=lambda row: lengths[row])
    alone = policy.scored(batch, [[short]]).logp_BT[0]
    beside = policy.scored(batch, [*packs, [long]])
    padded = beside.logp_BT[flat_rows(packs).index(short)]
    gap = float((alone - padded).abs()[batch.mask_BT[short]].mean())
    if gap > PADDING_LIMIT[policy.base.dtype]:
        return [
            f"padding or siblings change log-probs by {gap:.3f} nats per token: this architecture "
            "is not causal under right padding, and its scores can't be trusted"
        ]
    return []


def check_ratio(ratio_gap: float) -> list[str]:
    """Return a warning if the first ratio is not 1."""
    if ratio_gap > 1e-3:
        return [
            f"the first ratio is off 1 by {ratio_gap:.4f}: old log-probs and the update's forward "
            "disagree before any update"
        ]
    return []


def check_gradients(without_gradient: Sequence[str], batch_has_signal: bool) -> list[str]:
    """Return a warning if trained tensors got no gradient although rewards differed."""
    # LoRA's A gets none on the very first step, because B is still zero.
    silent = [name for name in without_gradient if "lora_A" not in name]
    if not silent or not batch_has_signal:
        return []
    return [
        f"{len(silent)} trained tensors got no gradient (first: {silent[0]}). On a CPU, "
        "bitsandbytes 4-bit weights do this after generate(): train on a GPU or unquantised"
    ]


def duplicate_fraction(batch: Batch) -> float:
    """Return the share of completions that equal an earlier sibling."""
    unique = {(r.group, r.completion_ids) for r in batch.rollouts}
    return 1 - len(unique) / len(batch)


def zero_variance_fraction(batch: Batch, rewards: Rewards) -> float:
    """Return the share of groups whose returns are all equal."""
    return float(zero_variance_groups(batch, rewards).float().mean())


def zero_variance_groups(batch: Batch, rewards: Rewards) -> Bool[Tensor, " P"]:
    """Return which groups have returns that are all equal; returns that don't apply don't count."""
    return_PG = masked_sum(rewards.total_BT, batch.mask_BT).view(-1, batch.group_size)
    high_P = return_PG.nan_to_num(nan=-torch.inf).amax(1)
    low_P = return_PG.nan_to_num(nan=torch.inf).amin(1)
    return high_P <= low_P
