"""From a recipe's names to the numbers of one update: rewards, advantages, per-token objective."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from operando.models.scoring import Scored
from operando.recipe.run import Recipe
from operando.recipe.update import (
    CispoLoss,
    ClipLoss,
    GaeAdvantage,
    GroupAdvantage,
    GspoTokenLoss,
    OtherGroupsAdvantage,
    RewardToGoAdvantage,
    RlooAdvantage,
)
from operando.types import Batch, Dense, Rewards, Trace
from operando.update import advantages as adv
from operando.update import losses
from operando.update.checks import zero_variance_groups
from operando.update.reduce import zero_outside


class Advantages(NamedTuple):
    """Advantage of every token, and the return that the critic learns (None without a critic)."""

    adv_BT: Float[Tensor, "B T"]
    return_BT: Float[Tensor, "B T"] | None


class Targets(NamedTuple):
    """Everything that an update needs of some rows, on the model's device."""

    mask_BT: Bool[Tensor, "B T"]
    weight_BT: Float[Tensor, "B T"]
    adv_BT: Float[Tensor, "B T"]
    old_logp_BT: Float[Tensor, "B T"]
    ref_logp_BT: Float[Tensor, "B T"] | None
    old_value_BT: Float[Tensor, "B T"] | None
    return_BT: Float[Tensor, "B T"] | None
    old_credit_BT: Float[Tensor, "B T"] | None = None  # None: the ratio is of the log-probs


class Objective(NamedTuple):
    """The loss of a micro-batch, and token counts that add up over micro-batches."""

    loss: Float[Tensor, ""]
    policy_loss: float
    value_loss: float
    clipped_low: int
    clipped_high: int
    ratio_gap: float  # max |ratio - 1|


def compute_advantages(
    recipe: Recipe, batch: Batch, rewards: Rewards, trace: Trace, kl_coef: float = 0.0
) -> Advantages:
    """Return who gets the credit (seam 2). A KL in the reward is subtracted first."""
    mask_BT, group = batch.mask_BT, batch.group_size
    apart = not isinstance(recipe.advantage, GaeAdvantage)  # a critic takes them as they are
    reward_BT = _paid_by_return(batch, rewards) if apart else rewards.total_BT
    if recipe.kl is not None and recipe.kl.place == "reward":
        assert trace.ref_logp_BT is not None, "a KL in the reward needs the reference"
        reward_BT = adv.kl_penalised_reward(
            reward_BT, trace.logp_BT, trace.ref_logp_BT, mask_BT, kl_coef, recipe.kl.estimator
        )
    match recipe.advantage:
        case GroupAdvantage(scale=scale, eps=eps):
            adv_BT = adv.group_advantages(reward_BT, mask_BT, group, scale, eps)
        case RlooAdvantage():
            adv_BT = adv.rloo_advantages(reward_BT, mask_BT, group)
        case OtherGroupsAdvantage():
            adv_BT = adv.leave_one_group_out_advantages(reward_BT, mask_BT, group)
        case RewardToGoAdvantage(gamma=gamma):
            adv_BT = adv.reward_to_go_advantages(reward_BT, mask_BT, group, gamma)
        case GaeAdvantage(gamma=gamma, lam=lam, whiten=whiten):
            assert trace.value_BT is not None, "GAE needs the value head"
            found = adv.gae(reward_BT, trace.value_BT, mask_BT, gamma, lam)
            adv_BT = adv.whiten(found.adv_BT, mask_BT) if whiten else found.adv_BT
            return Advantages(adv_BT, found.return_BT)
    for name, dense in rewards.dense.items():
        part_BT = rewards.parts[name]
        adv_BT = adv_BT + rewards.weights[name] * _dense_advantages(batch, part_BT, dense)
    return Advantages(adv_BT, None)


def _paid_by_return(batch: Batch, rewards: Rewards) -> Float[Tensor, "B T"]:
    """Return the weighted sum of the parts that are not dense; mechreward's mean is in it."""
    if not rewards.dense:
        return rewards.total_BT
    total_BT = torch.zeros_like(rewards.total_BT)
    applies_BT = torch.zeros_like(batch.mask_BT)
    for name, part_BT in rewards.parts.items():
        dense = rewards.dense.get(name)
        if dense is not None and dense.credit != "mechreward":
            continue
        if dense is not None:
            part_BT = part_BT / batch.mask_BT.sum(1, keepdim=True).clamp(min=1)
        total_BT = total_BT + rewards.weights[name] * part_BT.nan_to_num(nan=0.0)
        applies_BT = applies_BT | ~part_BT.isnan()
    alone = all(name in rewards.dense for name in rewards.parts)
    return total_BT if alone else total_BT.masked_fill(~applies_BT, torch.nan)


def _dense_advantages(batch: Batch, part_BT: Tensor, dense: Dense) -> Float[Tensor, "B T"]:
    mask_BT, group = batch.mask_BT, batch.group_size
    match dense.credit:
        case "own":
            return adv.token_advantages(part_BT, mask_BT, group)
        case "to_go":
            to_go_BT = adv.reward_to_go_advantages(part_BT, mask_BT, group, dense.gamma)
            return adv.token_advantages(to_go_BT, mask_BT, group)
        case "mechreward":
            return adv.padded_z_scores(part_BT, mask_BT, batch.prompt_len_B, group)


def next_kl_coef(recipe: Recipe, batch: Batch, trace: Trace, coef: float) -> float:
    """Return the coefficient of a KL in the reward for the next step.

    The KL that it follows is the mean over the rollouts of their mean token, as verl's.
    """
    if recipe.kl is None or recipe.kl.target is None:
        return coef
    assert trace.ref_logp_BT is not None, "a KL in the reward needs the reference"
    kl_BT = losses.kl_estimate(trace.logp_BT, trace.ref_logp_BT, recipe.kl.estimator)
    length_B = batch.mask_BT.sum(1)
    kl = float((zero_outside(kl_BT, batch.mask_BT).sum(1) / length_B).mean())
    return losses.adapted_kl_coef(coef, kl, recipe.kl.target, len(batch), recipe.kl.horizon)


def discarded_rows(recipe: Recipe, batch: Batch, rewards: Rewards) -> Bool[Tensor, " B"]:
    """Return which rollouts are not trained on."""
    dropped_B = torch.zeros(len(batch), dtype=torch.bool)
    if "truncated" in recipe.rollout.discard:
        dropped_B |= torch.tensor([r.is_truncated for r in batch.rollouts])
    if "zero_variance" in recipe.rollout.discard:
        dropped_B |= zero_variance_groups(batch, rewards).repeat_interleave(batch.group_size)
    return dropped_B


def micro_objective(recipe: Recipe, new: Scored, targets: Targets) -> Objective:
    """Return the objective of some rows: policy, KL, entropy and value loss, weighted by token.

    loss = sum_t w_t (policy_t + coef_kl kl_t - coef_H H_t + coef_V value_t)
    """
    mask_BT, weight_BT = targets.mask_BT, targets.weight_BT
    logp_BT = zero_outside(new.logp_BT, mask_BT)
    old_BT = zero_outside(targets.old_logp_BT, mask_BT)
    now_BT, then_BT = logp_BT, old_BT  # what the ratio is of
    if new.credit_BT is not None:
        assert targets.old_credit_BT is not None, "credit by loop needs that of the scoring pass"
        now_BT = zero_outside(new.credit_BT, mask_BT)
        then_BT = zero_outside(targets.old_credit_BT, mask_BT)
    policy = _policy_loss(recipe, now_BT, then_BT, targets)
    total_BT = policy.loss_BT
    if recipe.kl is not None and recipe.kl.place == "loss":
        assert targets.ref_logp_BT is not None, "a KL in the loss needs the reference"
        ref_BT = zero_outside(targets.ref_logp_BT, mask_BT)
        kl_BT = losses.kl_loss(logp_BT, old_BT, ref_BT, recipe.kl.estimator, recipe.kl.unbiased)
        total_BT = total_BT + recipe.kl.coef * kl_BT
    if recipe.update.entropy_coef > 0:
        total_BT = total_BT - recipe.update.entropy_coef * new.entropy_BT
    value_loss = 0.0
    if isinstance(recipe.advantage, GaeAdvantage):
        assert new.value_BT is not None and targets.old_value_BT is not None
        assert targets.return_BT is not None
        value_BT = losses.value_loss(
            new.value_BT, targets.old_value_BT, targets.return_BT, recipe.advantage.value_clip
        )
        total_BT = total_BT + recipe.advantage.value_coef * value_BT
        value_loss = float((weight_BT * value_BT).detach().sum())
    ratio_gap_BT = (now_BT.detach() - then_BT).exp() - 1
    return Objective(
        loss=(weight_BT * total_BT).sum(),
        policy_loss=float((weight_BT * policy.loss_BT).detach().sum()),
        value_loss=value_loss,
        clipped_low=int((policy.clipped_low_BT & mask_BT).sum()),
        clipped_high=int((policy.clipped_high_BT & mask_BT).sum()),
        ratio_gap=float((ratio_gap_BT * mask_BT).abs().max()),
    )


def _policy_loss(
    recipe: Recipe, logp_BT: Tensor, old_BT: Tensor, targets: Targets
) -> losses.PolicyLoss:
    match recipe.loss:
        case ClipLoss(clip_low=low, clip_high=high, dual_clip=dual):
            return losses.clip_loss(logp_BT, old_BT, targets.adv_BT, low, high, dual)
        case GspoTokenLoss(clip_low=low, clip_high=high):
            return losses.gspo_token_loss(
                logp_BT, old_BT, targets.adv_BT, targets.mask_BT, low, high
            )
        case CispoLoss(clip_high=high):
            return losses.cispo_loss(logp_BT, old_BT, targets.adv_BT, high)
