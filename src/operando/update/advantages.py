"""Advantages from per-token rewards.

Dims: P prompts, G group size, B = P*G rollouts, T completion tokens. The rollouts of a prompt are
neighbours in B. Completions are right-padded; masks are bool, True = counts.

A scalar reward sits on the last real token. Results are float32 and 0 outside the mask.
The return of a rollout is R[b] = sum_t m[b,t] reward[b,t]. A rollout whose return is NaN (reward
"not applicable") or that has no real token is left out of every baseline and gets advantage 0.
"""

from typing import Literal, NamedTuple

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from operando.update.losses import KlEstimator, kl_estimate
from operando.update.reduce import masked_mean, masked_sum, zero_outside

AdvantageScale = Literal["group", "batch", "none"]


class Gae(NamedTuple):
    """Generalised advantages and the critic's targets.

    Example: gae(reward_BT, value_BT, mask_BT, gamma=1.0, lam=0.95).return_BT
    """

    adv_BT: Float[Tensor, "B T"]
    return_BT: Float[Tensor, "B T"]


class _Returns(NamedTuple):
    """Returns by group, 0 where not valid."""

    return_PG: Float[Tensor, "P G"]
    valid_PG: Bool[Tensor, "P G"]


def _check_groups(rollouts: int, group_size: int, least: int) -> None:
    if group_size < least:
        raise ValueError(
            f"group_size: given {group_size}, expected at least {least}: the baseline is made of "
            "the other rollouts of the prompt (leave_one_group_out_advantages works with 1)"
        )
    if rollouts % group_size != 0:
        raise ValueError(
            f"group_size: given {group_size} for {rollouts} rollouts, expected a divisor of them"
        )


def _group_returns(
    reward_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], group_size: int
) -> _Returns:
    return_B = masked_sum(reward_BT, mask_BT)
    valid_B = ~return_B.isnan() & mask_BT.any(dim=1)
    return_B = torch.where(valid_B, return_B, 0.0)
    return _Returns(
        rearrange(return_B, "(p g) -> p g", g=group_size),
        rearrange(valid_B, "(p g) -> p g", g=group_size),
    )


def _on_tokens(
    adv_PG: Float[Tensor, "P G"], valid_PG: Bool[Tensor, "P G"], mask_BT: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """One advantage per rollout, written on each of its real tokens."""
    adv_B1 = rearrange(torch.where(valid_PG, adv_PG, 0.0), "p g -> (p g) 1")
    return zero_outside(adv_B1.expand(mask_BT.shape), mask_BT)


def group_advantages(
    reward_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    group_size: int,
    scale: AdvantageScale = "group",
    eps: float = 1e-4,
) -> Float[Tensor, "B T"]:
    """Return minus the group mean, over a standard deviation, on every real token.

    A = (R - mean_group(R)) / (std(R) + eps), std with ddof=1   (GRPO 2402.03300; eps as TRL)
    scale "group": std of the group; "batch": std of the whole batch, mean of the group;
    "none": no division (Dr. GRPO 2503.20783). The std of a single valid return counts as 0."""
    _check_groups(reward_BT.shape[0], group_size, least=2)
    return_PG, valid_PG = _group_returns(reward_BT, mask_BT, group_size)
    count_P1 = valid_PG.sum(dim=1, keepdim=True)
    mean_P1 = return_PG.sum(dim=1, keepdim=True) / count_P1.clamp(min=1)
    centred_PG = torch.where(valid_PG, return_PG - mean_P1, 0.0)
    match scale:
        case "group":
            square_P1 = centred_PG.square().sum(dim=1, keepdim=True)
            std_P1 = (square_P1 / (count_P1 - 1).clamp(min=1)).sqrt()
            adv_PG = centred_PG / (std_P1 + eps)
        case "batch":
            std = return_PG[valid_PG].std() if valid_PG.sum() > 1 else torch.zeros(())
            adv_PG = centred_PG / (std + eps)
        case "none":
            adv_PG = centred_PG
    return _on_tokens(adv_PG, valid_PG, mask_BT)


def rloo_advantages(
    reward_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], group_size: int
) -> Float[Tensor, "B T"]:
    """Return minus the mean return of the other rollouts of the same prompt.
    A_i = R_i - mean_{j != i} R_j   (RLOO 2402.14740). 0 if no other rollout is valid."""
    _check_groups(reward_BT.shape[0], group_size, least=2)
    return_PG, valid_PG = _group_returns(reward_BT, mask_BT, group_size)
    others_P1 = valid_PG.sum(dim=1, keepdim=True) - 1
    baseline_PG = (return_PG.sum(dim=1, keepdim=True) - return_PG) / others_P1.clamp(min=1)
    return _on_tokens(return_PG - baseline_PG, valid_PG & (others_P1 > 0), mask_BT)


def leave_one_group_out_advantages(
    reward_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], group_size: int
) -> Float[Tensor, "B T"]:
    """Return minus the mean return of all rollouts of the other prompts of the batch.
    A[p,g] = R[p,g] - mean_{p' != p, g'} R[p',g'].   0 if no rollout of another prompt is valid.
    The baseline does not see the prompt, so it is unbiased but does not remove prompt difficulty;
    it is the one that works with group_size 1."""
    _check_groups(reward_BT.shape[0], group_size, least=1)
    prompts = reward_BT.shape[0] // group_size
    if prompts < 2:
        raise ValueError(
            f"leave_one_group_out_advantages: given {prompts} group(s), expected at least 2"
        )
    return_PG, valid_PG = _group_returns(reward_BT, mask_BT, group_size)
    others_P1 = valid_PG.sum() - valid_PG.sum(dim=1, keepdim=True)
    baseline_P1 = (return_PG.sum() - return_PG.sum(dim=1, keepdim=True)) / others_P1.clamp(min=1)
    return _on_tokens(return_PG - baseline_P1, valid_PG & (others_P1 > 0), mask_BT)


def reward_to_go(
    reward_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], gamma: float
) -> Float[Tensor, "B T"]:
    """Discounted sum of the rewards from each real token on.
    G_t = r_t + gamma G_{t'}, t' the next real token:  G_t = sum_{s >= t} gamma^(s-t) r_s
    s-t counts real tokens, so masked tokens inside a completion do not discount (as in gae)."""
    reward_BT = zero_outside(reward_BT, mask_BT)
    to_go_BT = torch.zeros_like(reward_BT)
    next_B = torch.zeros_like(reward_BT[:, 0])
    for t in reversed(range(reward_BT.shape[1])):
        next_B = torch.where(mask_BT[:, t], reward_BT[:, t] + gamma * next_B, next_B)
        to_go_BT[:, t] = next_B
    return zero_outside(to_go_BT, mask_BT)


def reward_to_go_advantages(
    reward_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"], group_size: int, gamma: float
) -> Float[Tensor, "B T"]:
    """Reward-to-go minus its mean over the rollouts of the group that are still running.
    A[b,t] = G[b,t] - mean_{b' in group(b), m[b',t]} G[b',t]
    The mean contains the rollout itself, as in group_advantages: at positions that only one rollout
    of the group reaches, its advantage is 0."""
    _check_groups(reward_BT.shape[0], group_size, least=2)
    valid_PG = _group_returns(reward_BT, mask_BT, group_size).valid_PG
    real_BT = mask_BT & rearrange(valid_PG, "p g -> (p g) 1")
    to_go_BT = reward_to_go(reward_BT, real_BT, gamma)
    sum_PT = reduce(to_go_BT, "(p g) t -> p t", "sum", g=group_size)
    count_PT = reduce(real_BT.long(), "(p g) t -> p t", "sum", g=group_size).clamp(min=1)
    baseline_BT = repeat(sum_PT / count_PT, "p t -> (p g) t", g=group_size)
    return zero_outside(to_go_BT - baseline_BT, real_BT)


def gae(
    reward_BT: Float[Tensor, "B T"],
    value_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    gamma: float,
    lam: float,
) -> Gae:
    """Generalised advantage estimate and the critic's target, before whitening.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  return_t = A_t + V_t
    (GAE 1506.02438), V = 0 after the last real token. Values are not differentiated. Masked tokens
    inside a completion are skipped: t+1 is the next real token (as verl)."""
    reward_BT = zero_outside(reward_BT, mask_BT)
    value_BT = zero_outside(value_BT, mask_BT).detach()
    assert not reward_BT.isnan().any(), f"NaN rewards in rows {_nan_rows(reward_BT)}"
    adv_BT = torch.zeros_like(reward_BT)
    next_value_B = torch.zeros_like(reward_BT[:, 0])
    next_adv_B = torch.zeros_like(next_value_B)
    for t in reversed(range(reward_BT.shape[1])):
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        next_adv_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * next_adv_B, next_adv_B)
        next_value_B = torch.where(mask_BT[:, t], value_BT[:, t], next_value_B)
        adv_BT[:, t] = next_adv_B
    return Gae(
        adv_BT=zero_outside(adv_BT, mask_BT), return_BT=zero_outside(adv_BT + value_BT, mask_BT)
    )


def _nan_rows(x_BT: Float[Tensor, "B T"]) -> list[int]:
    return x_BT.isnan().any(dim=1).nonzero().flatten().tolist()


def whiten(adv_BT: Float[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Advantages with mean 0 and variance 1 over the real tokens of the batch, 0 elsewhere.
    A' = (A - mean) / sqrt(var + 1e-8), var with ddof=1   (PPO practice; 1e-8 as verl)
    The variance of a single token counts as 0."""
    centred_BT = zero_outside(adv_BT.float() - masked_mean(adv_BT, mask_BT), mask_BT)
    var = centred_BT.square().sum() / (mask_BT.sum() - 1).clamp(min=1)
    return centred_BT * (var + 1e-8).rsqrt()


@torch.no_grad()
def kl_penalised_reward(
    reward_BT: Float[Tensor, "B T"],
    logp_BT: Float[Tensor, "B T"],
    ref_logp_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    coef: float,
    estimator: KlEstimator,
) -> Float[Tensor, "B T"]:
    """Reward minus the KL estimate of each real token; logp is that of the policy that sampled.
    r'_t = r_t - coef k(d_t),  d = logp - ref_logp   (1909.08593; per token as in 2203.02155)
    k1 here gives the policy gradient of -coef KL(pi||ref). k2 and k3 do not: the reward is not
    differentiated, so their own dependence on pi is missing."""
    kl_BT = kl_estimate(logp_BT, ref_logp_BT, estimator)
    return zero_outside(reward_BT.float() - coef * kl_BT, mask_BT)


def token_advantages(
    reward_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    group_size: int,
    eps: float = 1e-4,
) -> Float[Tensor, "B T"]:
    """Each token's own reward, as a z-score over the real tokens of its group.

    A[b,t] = (r[b,t] - mean) / (std + eps), mean and std (ddof=1) over the group's real tokens.
    They sum to 0 over a group, so that a longer completion is not better for its length."""
    _check_groups(reward_BT.shape[0], group_size, least=2)
    valid_PG = _group_returns(reward_BT, mask_BT, group_size).valid_PG
    real_BT = mask_BT & rearrange(valid_PG, "p g -> (p g) 1")
    value_PN = rearrange(zero_outside(reward_BT, real_BT), "(p g) t -> p (g t)", g=group_size)
    real_PN = rearrange(real_BT, "(p g) t -> p (g t)", g=group_size)
    count_P1 = real_PN.sum(1, keepdim=True)
    centred_PN = value_PN - value_PN.sum(1, keepdim=True) / count_P1.clamp(min=1)
    centred_PN = zero_outside(centred_PN, real_PN)
    std_P1 = (centred_PN.square().sum(1, keepdim=True) / (count_P1 - 1).clamp(min=1)).sqrt()
    return rearrange(centred_PN / (std_P1 + eps), "p (g t) -> (p g) t", g=group_size)


def padded_z_scores(
    reward_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    prompt_len_B: Int[Tensor, " B"],
    group_size: int,
    eps: float = 1e-8,
) -> Float[Tensor, "B T"]:
    """Return mechreward's per-token z-score, whose mean and std count prompt and padding as zeros.

    mechreward, stage3_qwen35_4b_rl_v2.ipynb: z = (r - mean) / (std + eps) over the group's [G, S-1]
    tensor. Where r is mostly positive every real token gets a bonus, so length is rewarded."""
    _check_groups(reward_BT.shape[0], group_size, least=2)
    value_PN = rearrange(zero_outside(reward_BT, mask_BT), "(p g) t -> p (g t)", g=group_size)
    longest_P = (prompt_len_B + mask_BT.sum(1)).view(-1, group_size).amax(1)
    count_P1 = (group_size * (longest_P - 1)).clamp(min=2)[:, None].float()
    mean_P1 = value_PN.sum(1, keepdim=True) / count_P1
    square_P1 = value_PN.square().sum(1, keepdim=True) - count_P1 * mean_P1.square()
    std_P1 = (square_P1.clamp(min=0) / (count_P1 - 1)).sqrt()
    z_BT = rearrange((value_PN - mean_P1) / (std_P1 + eps), "p (g t) -> (p g) t", g=group_size)
    return zero_outside(z_BT, mask_BT)
