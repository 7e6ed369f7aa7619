"""Comparisons with verl's own functions. Importing this module needs verl."""

from importlib.metadata import version

import numpy as np
import torch
import verl.utils.torch_functional as verl_f
from parity import GROUP, Batch, Case, compare_losses
from torch import Tensor
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig

from operando.update.advantages import (
    gae,
    group_advantages,
    kl_penalised_reward,
    reward_to_go,
    rloo_advantages,
    whiten,
)
from operando.update.losses import (
    Aggregation,
    KlEstimator,
    adapted_kl_coef,
    cispo_loss,
    clip_loss,
    count_totals,
    effective_sample_size,
    gspo_token_loss,
    kl_estimate,
    sampler_weights,
    token_weights,
    value_loss,
)
from operando.update.reduce import masked_mean, masked_sum, zero_outside

L_MAX = 16
LOW, HIGH = 0.2, 0.28
AGGREGATION: dict[Aggregation, str] = {
    "token_mean": "token-mean",
    "seq_mean_token_mean": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
    "seq_mean_token_sum": "seq-mean-token-sum",
}


def weigh(mask: Tensor, loss_BT: Tensor, aggregation: Aggregation) -> Tensor:
    return (token_weights(mask, aggregation, count_totals(mask), L_MAX) * loss_BT).sum()


def index(b: Batch) -> np.ndarray:
    return np.arange(len(b.mask)) // GROUP


def actor(low: float = LOW, high: float = HIGH, dual: float = 3.0) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=low,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual,
    )


def masked(b: Batch) -> Tensor:
    """Rewards that are 0 on padding, as verl's functions take for granted."""
    return zero_outside(b.reward, b.mask)


def gae_case(name: str, gamma: float, lam: float, holes: bool) -> Case:
    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        mask = b.holed_mask if holes else b.mask
        ours = gae(b.reward, b.value, mask, gamma, lam)
        adv, returns = core_algos.compute_gae_advantage_return(
            zero_outside(b.reward, mask), b.value, mask.float(), gamma, lam
        )
        return [
            (whiten(ours.adv_BT, mask), zero_outside(adv, mask)),
            (ours.return_BT, zero_outside(returns, mask)),
        ]

    return Case(
        f"GAE {name}, whitened advantage and return",
        f"gae gamma={gamma} lam={lam}, whiten",
        "core_algos.compute_gae_advantage_return",
        "own function",
        pairs,
    )


def group_case(scale: str, function: str) -> Case:
    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        theirs, _ = getattr(core_algos, function)(
            masked(b), b.mask_f, index(b), norm_adv_by_std_in_grpo=scale == "group"
        )
        return [(group_advantages(b.reward, b.mask, GROUP, scale=scale, eps=1e-6), theirs)]

    return Case(
        f"group advantage, scale {scale}",
        f"group_advantages scale={scale} eps=1e-6",
        f"core_algos.{function} norm_adv_by_std_in_grpo={scale == 'group'}",
        "own function",
        pairs,
    )


def rloo_case(function: str) -> Case:
    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        theirs, _ = getattr(core_algos, function)(masked(b), b.mask_f, index(b))
        return [(rloo_advantages(b.reward, b.mask, GROUP), theirs)]

    return Case(
        "RLOO advantage", "rloo_advantages", f"core_algos.{function}", "own function", pairs
    )


def reinforce_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    mask = b.holed_mask
    adv, returns = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        zero_outside(b.reward, mask), mask.float(), AlgoConfig(gamma=0.9)
    )
    ours = reward_to_go(b.reward, mask, 0.9)
    return [(ours, returns), (whiten(ours, mask), adv)]


def reinforce_baseline_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    adv, _ = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
        masked(b), b.mask_f, index(b)
    )
    return [(whiten(group_advantages(b.reward, b.mask, GROUP, scale="none"), b.mask), adv)]


def whiten_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    theirs = verl_f.masked_whiten(b.adv, b.mask_f)
    return [(whiten(b.adv, b.mask), zero_outside(theirs, b.mask))]


def reduce_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    return [
        (masked_mean(b.adv, b.mask), verl_f.masked_mean(b.adv, b.mask_f)),
        (masked_sum(b.adv, b.mask), verl_f.masked_sum(b.adv, b.mask_f, axis=-1)),
    ]


def aggregation_case(aggregation: Aggregation) -> Case:
    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        mask = b.empty_rows_mask
        return compare_losses(
            lambda loss: weigh(mask, loss, aggregation),
            lambda loss: core_algos.agg_loss(
                loss, mask.float(), AGGREGATION[aggregation], loss_scale_factor=L_MAX
            ),
            b.adv,
        )

    return Case(
        f"loss aggregation {aggregation}, some rows fully masked, value and gradient",
        f"token_weights {aggregation}",
        f"core_algos.agg_loss {AGGREGATION[aggregation]}",
        "own function",
        pairs,
    )


def clip_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    config = actor(dual=1.5)
    return compare_losses(
        lambda lp: weigh(b.mask, clip_loss(lp, b.old, b.adv, LOW, HIGH, 1.5).loss_BT, "token_mean"),
        lambda lp: core_algos.compute_policy_loss_vanilla(
            b.old, lp, b.adv, b.mask_f, config=config
        )[0],
        b.logp,
    )


def clip_fraction_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    """verl counts the dual clip apart; a dual clip that is never reached leaves one to compare."""
    _, metrics = core_algos.compute_policy_loss_vanilla(
        b.old, b.logp, b.adv, b.mask_f, config=actor(dual=1e6)
    )
    out = clip_loss(b.logp, b.old, b.adv, LOW, HIGH, None)
    clipped = (out.clipped_low_BT | out.clipped_high_BT).float()
    return [(masked_mean(clipped, b.mask), torch.tensor(metrics["actor/pg_clipfrac"]))]


def gspo_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    return compare_losses(
        lambda lp: weigh(
            b.mask,
            gspo_token_loss(lp, b.old, b.adv, b.mask, LOW, HIGH).loss_BT,
            "seq_mean_token_mean",
        ),
        lambda lp: core_algos.compute_policy_loss_gspo(b.old, lp, b.adv, b.mask_f, config=actor())[
            0
        ],
        b.logp,
    )


def cispo_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    """clip_ratio_low=1 puts verl's lower bound at 0, where it never binds."""
    return compare_losses(
        lambda lp: weigh(b.mask, cispo_loss(lp, b.old, b.adv, 0.5).loss_BT, "token_mean"),
        lambda lp: core_algos.compute_policy_loss_cispo(
            b.old, lp, b.adv, b.mask_f, config=actor(low=1.0, high=0.5)
        )[0],
        b.logp,
    )


def kl_case(estimator: KlEstimator) -> Case:
    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        return compare_losses(
            lambda lp: weigh(b.mask, kl_estimate(lp, b.ref, estimator), "token_mean"),
            lambda lp: core_algos.agg_loss(
                core_algos.kl_penalty(lp, b.ref, estimator), b.mask_f, "token-mean"
            ),
            b.logp,
        )

    return Case(
        f"KL estimate {estimator}, value and gradient",
        f"kl_estimate {estimator}",
        f"core_algos.kl_penalty {estimator}",
        "own function",
        pairs,
    )


def straight_through_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    """verl's k3+ has the value of k3 and the gradient of k2."""
    k2 = compare_losses(
        lambda lp: weigh(b.mask, kl_estimate(lp, b.ref, "k2"), "token_mean"),
        lambda lp: core_algos.agg_loss(
            core_algos.kl_penalty(lp, b.ref, "k3+"), b.mask_f, "token-mean"
        ),
        b.logp,
    )
    theirs = core_algos.kl_penalty(b.logp, b.ref, "k3+")
    return [k2[1], (kl_estimate(b.logp, b.ref, "k3"), theirs)]


def kl_reward_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    theirs = core_algos.compute_rewards(b.reward, b.old, b.ref, 0.1)
    ours = kl_penalised_reward(b.reward, b.old, b.ref, b.mask, 0.1, "k1")
    return [(ours, zero_outside(theirs, b.mask))]


def controller_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    """Follow twelve rollouts' KL for as many steps, from far below the target to far above."""
    theirs = core_algos.AdaptiveKLController(init_kl_coef=0.1, target_kl=0.2, horizon=100)
    ours, found = 0.1, []
    for kl in b.value.flatten().abs().tolist():
        theirs.update(kl, n_steps=12)
        ours = adapted_kl_coef(ours, kl, target=0.2, num=12, horizon=100)
        found.append((ours, float(theirs.value)))
    mine, peers = torch.tensor(found).T
    return [(mine, peers)]


def kl_reward_formula_case(estimator: KlEstimator) -> Case:
    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        penalty = core_algos.kl_penalty(b.old, b.ref, estimator) * b.mask_f
        ours = kl_penalised_reward(b.reward, b.old, b.ref, b.mask, 0.1, estimator)
        return [(ours, masked(b) - 0.1 * penalty)]

    return Case(
        f"reward with KL {estimator}",
        f"kl_penalised_reward {estimator}",
        f"core_algos.kl_penalty {estimator}, subtracted as in ray_trainer.apply_kl_penalty",
        "own function, then formula",
        pairs,
    )


def value_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    return compare_losses(
        lambda v: weigh(b.mask, value_loss(v, b.old_value, b.reward, 0.2), "token_mean"),
        lambda v: core_algos.compute_value_loss(v, b.reward, b.old_value, b.mask_f, 0.2)[0],
        b.value,
    )


def sampler_case(kind: str) -> Case:
    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        theirs, _ = compute_rollout_correction_weights(b.old - b.ref, b.mask_f, kind, 1.5)
        return [(sampler_weights(b.old, b.ref, b.mask, kind, cap=1.5), theirs)]

    return Case(
        f"truncated importance weights, {kind}",
        f"sampler_weights {kind}",
        f"rollout_corr_helper.compute_rollout_correction_weights {kind}",
        "own function",
        pairs,
    )


def sample_size_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    """verl measures the truncated weights, ours the untruncated; at a high threshold they agree."""
    _, metrics = compute_rollout_correction_weights(b.old - b.ref, b.mask_f, "token", 1e6)
    ours = effective_sample_size(b.old, b.ref, b.mask)
    return [(torch.tensor(ours), torch.tensor(metrics["rollout_is_eff_sample_size"]))]


def case(quantity: str, ours: str, peer: str, pairs) -> Case:
    return Case(quantity, ours, peer, "own function", pairs)


PEER = f"verl {version('verl')}"
CASES = [
    gae_case("PPO", 1.0, 0.95, holes=False),
    gae_case("discounted, masked tokens inside", 0.9, 0.8, holes=True),
    group_case("group", "compute_grpo_outcome_advantage"),
    group_case("none", "compute_grpo_outcome_advantage"),
    group_case("group", "compute_grpo_vectorized_outcome_advantage"),
    rloo_case("compute_rloo_outcome_advantage"),
    rloo_case("compute_rloo_vectorized_outcome_advantage"),
    case(
        "reward-to-go, plain and whitened, masked tokens inside",
        "reward_to_go gamma=0.9, whiten",
        "core_algos.compute_reinforce_plus_plus_outcome_advantage",
        reinforce_pairs,
    ),
    case(
        "group-centred return, whitened",
        "group_advantages scale=none, whiten",
        "core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage",
        reinforce_baseline_pairs,
    ),
    case(
        "adaptive coefficient of a KL in the reward",
        "adapted_kl_coef",
        "core_algos.AdaptiveKLController",
        controller_pairs,
    ),
    case("whitening", "whiten", "torch_functional.masked_whiten", whiten_pairs),
    case(
        "masked mean and sum",
        "masked_mean, masked_sum",
        "torch_functional.masked_mean, masked_sum",
        reduce_pairs,
    ),
    *map(aggregation_case, AGGREGATION),
    case(
        "clipped policy loss, clip-higher and dual clip at 1.5, value and gradient",
        "clip_loss dual_clip=1.5",
        "core_algos.compute_policy_loss_vanilla",
        clip_pairs,
    ),
    case(
        "share of clipped tokens",
        "clip_loss clipped_low or clipped_high",
        "core_algos.compute_policy_loss_vanilla actor/pg_clipfrac",
        clip_fraction_pairs,
    ),
    case(
        "GSPO-token, per-token advantages, value and gradient",
        "gspo_token_loss, seq_mean_token_mean",
        "core_algos.compute_policy_loss_gspo",
        gspo_pairs,
    ),
    case(
        "CISPO, no lower bound, value and gradient",
        "cispo_loss clip_high=0.5",
        "core_algos.compute_policy_loss_cispo",
        cispo_pairs,
    ),
    kl_case("k1"),
    kl_case("k2"),
    kl_case("k3"),
    case(
        "straight-through KL: value of k3, gradient of k2",
        "kl_estimate k3, k2",
        "core_algos.kl_penalty k3+",
        straight_through_pairs,
    ),
    case(
        "reward with KL k1", "kl_penalised_reward k1", "core_algos.compute_rewards", kl_reward_pairs
    ),
    kl_reward_formula_case("k2"),
    kl_reward_formula_case("k3"),
    case(
        "clipped value loss, value and gradient",
        "value_loss clip=0.2",
        "core_algos.compute_value_loss",
        value_pairs,
    ),
    sampler_case("token"),
    sampler_case("sequence"),
    case(
        "effective sample size",
        "effective_sample_size",
        "rollout_corr_helper rollout_is_eff_sample_size",
        sample_size_pairs,
    ),
]
