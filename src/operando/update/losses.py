"""Per-token losses of the policy and the critic, and the weights that add them up.

Dims: B rollouts (P prompts * G group size), T completion tokens. Completions are right-padded;
masks are bool, True = counts.

Inputs may be bf16: every function casts to float32 before the first subtraction or exponential.
Functions without a mask argument also compute (meaningless) values on padding; pass log-probs
through reduce.zero_outside first, so that a NaN there cannot reach a gradient.
Log-ratios are clamped to +-20 before exp (as verl does; the papers do not), which keeps float32
finite. Beyond the clamp the gradient is 0.
"""

from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from operando.update.reduce import masked_sum, zero_outside

LOG_RATIO_LIMIT = 20.0

Aggregation = Literal["token_mean", "seq_mean_token_mean", "constant", "seq_mean_token_sum"]
KlEstimator = Literal["k1", "k2", "k3"]
SamplerCorrection = Literal["none", "token", "sequence"]


class Totals(NamedTuple):
    """Counts over the whole mini-batch, all micro-batches and ranks together.

    Example: Totals(tokens=1024, rows=64). rows counts rollouts with at least one real token.
    """

    tokens: int
    rows: int


class PolicyLoss(NamedTuple):
    """Per-token policy loss and where the ratio was cut.

    Example: clip_loss(...).loss_BT; masked_mean(loss.clipped_high_BT.float(), mask_BT).
    """

    loss_BT: Float[Tensor, "B T"]
    clipped_low_BT: Bool[Tensor, "B T"]
    clipped_high_BT: Bool[Tensor, "B T"]


def count_totals(mask_BT: Bool[Tensor, "B T"]) -> Totals:
    """Counts of one mask; with several ranks, add these before calling token_weights."""
    return Totals(tokens=int(mask_BT.sum()), rows=int(mask_BT.any(dim=1).sum()))


def token_weights(
    mask_BT: Bool[Tensor, "B T"],
    aggregation: Aggregation,
    totals: Totals,
    max_completion_length: int,
) -> Float[Tensor, "B T"]:
    """Weights w with loss = sum_bt w[b,t] l[b,t] for any micro-batch split; 0 on padding.

    With N tokens and R rows of the whole mini-batch and |y_b| the real tokens of row b:
    token_mean           w = m / N                 (DAPO 2503.14476)
    seq_mean_token_mean  w = m / (R |y_b|)         (GRPO 2402.03300)
    constant             w = m / (R L_max)         (Dr. GRPO 2503.20783)
    seq_mean_token_sum   w = m / R                 (the policy gradient itself, no length term)
    Deviation: R leaves out fully masked rows; TRL's dr_grpo counts them."""
    mask_f_BT = mask_BT.float()
    rows = max(1, totals.rows)
    match aggregation:
        case "token_mean":
            return mask_f_BT / max(1, totals.tokens)
        case "seq_mean_token_mean":
            length_B1 = mask_f_BT.sum(dim=1, keepdim=True).clamp(min=1)
            return mask_f_BT / (rows * length_B1)
        case "constant":
            return mask_f_BT / (rows * max_completion_length)
        case "seq_mean_token_sum":
            return mask_f_BT / rows


def _log_ratio(new_BT: Float[Tensor, "B T"], old_BT: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """log new - log old in float32, clamped to +-20."""
    return (new_BT.float() - old_BT.float()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clip_loss(
    logp_BT: Float[Tensor, "B T"],
    old_logp_BT: Float[Tensor, "B T"],
    adv_BT: Float[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> PolicyLoss:
    """Clipped policy loss per token.

    l = max(-rho A, -clip(rho, 1-clip_low, 1+clip_high) A),  rho = exp(logp - old_logp)
    PPO 1707.06347; clip_high > clip_low is clip-higher (DAPO 2503.14476).
    With dual_clip c > 1 (1912.09729), where A < 0:  l <- min(l, -c A).
    clipped_low: A < 0 and rho < 1-clip_low. clipped_high: A > 0 and rho > 1+clip_high, or the
    dual clip is active (A < 0 and rho > c). At flagged tokens the gradient is 0."""
    ratio_BT = _log_ratio(logp_BT, old_logp_BT).exp()
    return _clip_by_ratio(ratio_BT, adv_BT.float(), clip_low, clip_high, dual_clip)


def _clip_by_ratio(
    ratio_BT: Float[Tensor, "B T"],
    adv_BT: Float[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> PolicyLoss:
    """The clipped loss of clip_loss for a ratio that is already computed."""
    cut_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = torch.maximum(-ratio_BT * adv_BT, -cut_BT * adv_BT)
    clipped_low_BT = (adv_BT < 0) & (ratio_BT < 1 - clip_low)
    clipped_high_BT = (adv_BT > 0) & (ratio_BT > 1 + clip_high)
    if dual_clip is not None:
        assert dual_clip > 1, f"dual_clip {dual_clip}, expected > 1"
        over_BT = (adv_BT < 0) & (ratio_BT > dual_clip)
        loss_BT = torch.where(over_BT, -dual_clip * adv_BT, loss_BT)
        clipped_high_BT = clipped_high_BT | over_BT
    return PolicyLoss(loss_BT, clipped_low_BT, clipped_high_BT)


def gspo_token_loss(
    logp_BT: Float[Tensor, "B T"],
    old_logp_BT: Float[Tensor, "B T"],
    adv_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """Clipped loss with the length-normalised sequence ratio, in its per-token form (GSPO-token).

    s_i = exp(sum_t m (logp - old_logp) / |y_i|),  s_it = sg[s_i] exp(logp - sg[logp])
    l = max(-s_it A, -clip(s_it, 1-clip_low, 1+clip_high) A)   (GSPO 2507.18071)
    Meant for aggregation seq_mean_token_mean. For an advantage that is constant along the rollout
    value and gradient equal those of sequence-level GSPO."""
    logp_BT = zero_outside(logp_BT, mask_BT)
    length_B = mask_BT.sum(dim=1).clamp(min=1)
    log_ratio_B = masked_sum(logp_BT - old_logp_BT.float(), mask_BT) / length_B
    log_ratio_B1 = rearrange(log_ratio_B.detach(), "b -> b 1")
    ratio_BT = (
        (log_ratio_B1 + logp_BT - logp_BT.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    )
    adv_BT = zero_outside(adv_BT, mask_BT)
    return _clip_by_ratio(ratio_BT, adv_BT, clip_low, clip_high, dual_clip=None)


def cispo_loss(
    logp_BT: Float[Tensor, "B T"],
    old_logp_BT: Float[Tensor, "B T"],
    adv_BT: Float[Tensor, "B T"],
    clip_high: float,
) -> PolicyLoss:
    """Policy loss whose importance weight, not whose gradient, is cut.

    l = -sg[min(rho, 1+clip_high)] A logp   (CISPO 2506.13585, without the lower bound, as there)
    TRL's epsilon_high is the bound itself: 1 + clip_high. clipped_high: rho > 1+clip_high, for
    either sign of A; the gradient still flows there."""
    ratio_BT = _log_ratio(logp_BT, old_logp_BT).exp().detach()
    clipped_high_BT = ratio_BT > 1 + clip_high
    loss_BT = -ratio_BT.clamp(max=1 + clip_high) * adv_BT.float() * logp_BT.float()
    return PolicyLoss(loss_BT, torch.zeros_like(clipped_high_BT), clipped_high_BT)


def kl_estimate(
    logp_BT: Float[Tensor, "B T"], ref_logp_BT: Float[Tensor, "B T"], estimator: KlEstimator
) -> Float[Tensor, "B T"]:
    """Estimate of KL(pi||ref) per token, from tokens sampled from pi.

    d = logp - ref_logp, clamped to +-20:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d
    (Schulman 2020, joschu.net/blog/kl-approx.html). k1 and k3 are unbiased, k2 is not.
    Deviation from verl: the value of k3 is not clamped to 10."""
    diff_BT = _log_ratio(logp_BT, ref_logp_BT)
    match estimator:
        case "k1":
            return diff_BT
        case "k2":
            return diff_BT.square() / 2
        case "k3":
            return torch.expm1(-diff_BT) + diff_BT


def adapted_kl_coef(coef: float, kl: float, target: float, num: int, horizon: int) -> float:
    """Return the coefficient after a step over `num` rollouts (1909.08593, section 2.2).

    beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) num / horizon)
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * num / horizon)


def kl_loss(
    logp_BT: Float[Tensor, "B T"],
    old_logp_BT: Float[Tensor, "B T"],
    ref_logp_BT: Float[Tensor, "B T"],
    estimator: KlEstimator,
    unbiased: bool,
) -> Float[Tensor, "B T"]:
    """KL term of the loss per token; what its gradient estimates depends on both choices.

    unbiased=False: l = k.  Expected gradient for tokens sampled from pi itself:
      k1 -> 0 (no penalty at all);  k2 -> grad KL(pi||ref);  k3 -> grad KL(ref||pi), the other KL
    unbiased=True: l = rho k with rho = exp(logp - old_logp), differentiated as well
      (DeepSeek-V3.2 2512.02556; TRL use_bias_correction_kl). For tokens sampled from old:
      k1 and k3 -> grad KL(pi||ref);  k2 -> grad E_pi[d^2] / 2, which is not a KL"""
    kl_BT = kl_estimate(logp_BT, ref_logp_BT, estimator)
    if not unbiased:
        return kl_BT
    return _log_ratio(logp_BT, old_logp_BT).exp() * kl_BT


def value_loss(
    value_BT: Float[Tensor, "B T"],
    old_value_BT: Float[Tensor, "B T"],
    return_BT: Float[Tensor, "B T"],
    clip: float | None,
) -> Float[Tensor, "B T"]:
    """Squared error of the critic per token, pessimistic about steps larger than clip.
    l = 0.5 max((V-R)^2, (V_old + clip(V-V_old, -clip, clip) - R)^2)   (1707.06347 code; 2005.12729)
    """
    value_BT, old_value_BT = value_BT.float(), old_value_BT.float()
    error_BT = (value_BT - return_BT.float()).square()
    if clip is None:
        return 0.5 * error_BT
    near_BT = value_BT.clamp(old_value_BT - clip, old_value_BT + clip)
    return 0.5 * torch.maximum(error_BT, (near_BT - return_BT.float()).square())


@torch.no_grad()
def sampler_weights(
    old_logp_BT: Float[Tensor, "B T"],
    sampling_logp_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
    kind: SamplerCorrection,
    cap: float,
) -> Float[Tensor, "B T"]:
    """Truncated importance weights of trained forward over sampler, detached; 0 on padding.

    none: w = 1.  token: w_t = min(exp(d_t), cap).  sequence: w = min(exp(sum_t d_t), cap)
    d = old_logp - sampling_logp, clamped to +-20 (truncated IS, as named in fengyao.notion.site
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025)."""
    diff_BT = zero_outside(old_logp_BT.float() - sampling_logp_BT.float(), mask_BT)
    match kind:
        case "none":
            log_weight_BT = torch.zeros_like(diff_BT)
        case "token":
            log_weight_BT = diff_BT
        case "sequence":
            log_weight_BT = masked_sum(diff_BT, mask_BT)[:, None].expand_as(diff_BT)
    weight_BT = log_weight_BT.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    if kind != "none":
        weight_BT = weight_BT.clamp(max=cap)
    return zero_outside(weight_BT, mask_BT)


@torch.no_grad()
def effective_sample_size(
    old_logp_BT: Float[Tensor, "B T"],
    sampling_logp_BT: Float[Tensor, "B T"],
    mask_BT: Bool[Tensor, "B T"],
) -> float:
    """Share of the real tokens that the untruncated token weights are worth; 1 if all are equal.
    ESS = (sum_t w_t)^2 / (n sum_t w_t^2),  w = exp(old_logp - sampling_logp), clamped to e^+-20
    0 if there is no real token."""
    if not mask_BT.any():
        return 0.0
    log_weight_n = (old_logp_BT.float() - sampling_logp_BT.float())[mask_BT]
    weight_n = log_weight_n.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).double().exp()
    return float(weight_n.sum().square() / (weight_n.numel() * weight_n.square().sum()))
