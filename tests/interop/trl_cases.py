"""Comparisons with TRL's own code. Importing this module needs trl."""

import math
from collections import defaultdict
from types import SimpleNamespace

import torch
import trl
from parity import GROUP, Batch, Case, compare_losses, own_lines
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import nanstd

from operando.update.advantages import group_advantages, kl_penalised_reward, rloo_advantages
from operando.update.losses import (
    Aggregation,
    cispo_loss,
    clip_loss,
    count_totals,
    gspo_token_loss,
    kl_loss,
    sampler_weights,
    token_weights,
)
from operando.update.reduce import masked_mean, masked_sum

L_MAX = 16
LOW, HIGH = 0.2, 0.28


class LossOnly(GRPOTrainer):
    """A GRPOTrainer whose log-probs are given: no model, no data, only the settings of the loss."""

    def __init__(
        self,
        loss_type: str,
        level: str = "token",
        beta: float = 0.0,
        kl_correction: bool = False,
        delta: float | None = None,
        epsilon_high: float = HIGH,
        use_vllm: bool = False,
    ) -> None:
        self.loss_type, self.importance_sampling_level, self.beta = loss_type, level, beta
        self.epsilon_low, self.epsilon_high, self.max_completion_length = LOW, epsilon_high, L_MAX
        self.args = SimpleNamespace(
            use_bias_correction_kl=kl_correction, delta=delta, steps_per_generation=1
        )
        self.use_vllm = self.vllm_importance_sampling_correction = use_vllm
        self.aux_loss_enabled = self._entropy_bonus_enabled = False
        self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
        self.model = SimpleNamespace(training=True)
        self.current_gradient_accumulation_steps = 1
        self.accelerator = SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, **_settings: x
        )
        self._metrics = {"train": defaultdict(list)}

    def _get_per_token_logps_and_entropies(self, *_args, **_kwargs):
        return self.logp, torch.zeros_like(self.logp), None

    def loss(self, batch: Batch, adv: Tensor, logp: Tensor) -> Tensor:
        self.logp = logp
        rows = len(logp)
        inputs = {
            "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
            "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
            "completion_ids": torch.zeros(logp.shape, dtype=torch.long),
            "completion_mask": batch.mask.long(),
            "advantages": adv,
            "old_per_token_logps": batch.old,
            "ref_per_token_logps": batch.ref,
            "num_items_in_batch": batch.mask.sum(),
            "importance_sampling_ratio": batch.value.exp(),
        }
        return self._compute_loss(None, inputs)


def weigh(batch: Batch, loss_BT: Tensor, aggregation: Aggregation) -> Tensor:
    weight = token_weights(batch.mask, aggregation, count_totals(batch.mask), L_MAX)
    return (weight * loss_BT).sum()


def clip_case(name: str, aggregation: Aggregation) -> Case:
    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        return compare_losses(
            lambda lp: weigh(b, clip_loss(lp, b.old, b.adv, LOW, HIGH, None).loss_BT, aggregation),
            lambda lp: LossOnly(name).loss(b, b.adv, lp),
            b.logp,
        )

    return Case(
        f"clipped policy loss, value and gradient, {aggregation}",
        f"clip_loss, token_weights {aggregation}",
        f"GRPOTrainer._compute_loss loss_type={name}",
        "own function",
        pairs,
    )


def kl_case(correction: bool) -> Case:
    def ours(b: Batch, lp: Tensor) -> Tensor:
        policy_BT = clip_loss(lp, b.old, b.adv, LOW, HIGH, None).loss_BT
        kl_BT = kl_loss(lp, b.old, b.ref, "k3", unbiased=correction)
        return weigh(b, policy_BT + 0.1 * kl_BT, "token_mean")

    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        peer = LossOnly("dapo", beta=0.1, kl_correction=correction)
        return compare_losses(lambda lp: ours(b, lp), lambda lp: peer.loss(b, b.adv, lp), b.logp)

    return Case(
        f"policy loss with KL in the loss, k3, {'unbiased' if correction else 'plain'}",
        f"kl_loss k3 unbiased={correction}",
        f"GRPOTrainer._compute_loss beta=0.1 use_bias_correction_kl={correction}",
        "own function",
        pairs,
    )


def dual_clip_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    return compare_losses(
        lambda lp: weigh(b, clip_loss(lp, b.old, b.adv, LOW, HIGH, 1.5).loss_BT, "token_mean"),
        lambda lp: LossOnly("dapo", delta=1.5).loss(b, b.adv, lp),
        b.logp,
    )


def cispo_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    return compare_losses(
        lambda lp: weigh(b, cispo_loss(lp, b.old, b.adv, clip_high=0.5).loss_BT, "token_mean"),
        lambda lp: LossOnly("cispo", epsilon_high=1.5).loss(b, b.adv, lp),
        b.logp,
    )


def gspo_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    adv_B = b.adv[:, 0]

    def ours(lp: Tensor) -> Tensor:
        adv_BT = adv_B[:, None].expand_as(lp)
        loss_BT = gspo_token_loss(lp, b.old, adv_BT, b.mask, LOW, HIGH).loss_BT
        return weigh(b, loss_BT, "seq_mean_token_mean")

    peer = LossOnly("grpo", level="sequence")
    return compare_losses(ours, lambda lp: peer.loss(b, adv_B, lp), b.logp)


def clip_fraction_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    peer = LossOnly("dapo")
    peer.loss(b, b.adv, b.logp)
    out = clip_loss(b.logp, b.old, b.adv, LOW, HIGH, None)
    metrics = peer._metrics["train"]
    return [
        (masked_mean(out.clipped_low_BT.float(), b.mask), number(metrics["clip_ratio/low_mean"])),
        (masked_mean(out.clipped_high_BT.float(), b.mask), number(metrics["clip_ratio/high_mean"])),
    ]


def number(metric: list[float]) -> Tensor:
    assert len(metric) == 1, metric
    return torch.tensor(metric[0])


def sampler_loss_pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
    """TRL multiplies its importance ratio into the policy term and not into the KL."""

    def ours(lp: Tensor) -> Tensor:
        policy_BT = clip_loss(lp, b.old, b.adv, LOW, HIGH, None).loss_BT
        kl_BT = kl_loss(lp, b.old, b.ref, "k3", unbiased=False)
        return weigh(b, b.value.exp() * policy_BT + 0.1 * kl_BT, "token_mean")

    peer = LossOnly("dapo", beta=0.1, use_vllm=True)
    return compare_losses(ours, lambda lp: peer.loss(b, b.adv, lp), b.logp)


trl_sampler_weights = own_lines(
    GRPOTrainer._generate_and_score_completions,
    "mask = completion_mask",
    "if self.vllm_importance_sampling_mode",
)
trl_advantages = own_lines(
    GRPOTrainer._generate_and_score_completions,
    "if self.multi_objective_aggregation",
    "advantages = torch.nan_to_num",
)
trl_rloo = own_lines(
    RLOOTrainer._generate_and_score_completions,
    "if self.beta != 0.0",
    "advantages = torch.nan_to_num",
)


def sampler_case(kind: str) -> Case:
    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        settings = SimpleNamespace(
            vllm_importance_sampling_mode=f"{kind}_truncate",
            vllm_importance_sampling_clip_min=None,
            vllm_importance_sampling_clip_max=1.5,
        )
        names = trl_sampler_weights(
            {
                "self": settings,
                "torch": torch,
                "math": math,
                "completion_mask": b.mask.long(),
                "tool_mask": None,
                "old_per_token_logps": b.old,
                "sampling_per_token_logps": b.ref,
            }
        )
        theirs = names["vllm_importance_sampling_ratio"] * b.mask_f
        return [(sampler_weights(b.old, b.ref, b.mask, kind, cap=1.5), theirs)]

    return Case(
        f"truncated importance weights, {kind}",
        f"sampler_weights {kind}",
        f"GRPOTrainer vllm_importance_sampling_mode={kind}_truncate",
        "own lines",
        pairs,
    )


def advantage_case(scale: str, unscorable: bool) -> Case:
    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        reward, score_B = drop_a_row(b) if unscorable else (b.reward, b.score_B)
        settings = SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize",
            scale_rewards=scale,
            reward_weights=torch.ones(1),
        )
        names = trl_advantages(
            {
                "self": settings,
                "torch": torch,
                "nanstd": nanstd,
                "device": "cpu",
                "num_generations": GROUP,
                "rewards_per_func": score_B[:, None],
                "unscorable_mask": score_B.isnan(),
            }
        )
        ours = group_advantages(reward, b.mask, GROUP, scale=scale)
        return [(ours, names["advantages"][:, None] * b.mask_f)]

    return Case(
        f"group advantage, scale {scale}{', one return NaN' if unscorable else ''}",
        f"group_advantages scale={scale}",
        f"GRPOTrainer scale_rewards={scale}",
        "own lines",
        pairs,
    )


def drop_a_row(b: Batch) -> tuple[Tensor, Tensor]:
    """Rewards of which the second rollout has none, per token and per rollout."""
    reward = b.reward.clone()
    reward[1, 0] = torch.nan
    score_B = b.score_B.clone()
    score_B[1] = torch.nan
    return reward, score_B


def rloo_case(beta: float) -> Case:
    def pairs(b: Batch) -> list[tuple[Tensor, Tensor]]:
        names = trl_rloo(
            {
                "self": SimpleNamespace(beta=beta, normalize_advantages=False),
                "torch": torch,
                "nanstd": nanstd,
                "gather": lambda x: x,
                "num_generations": GROUP,
                "rewards": b.score_B,
                "old_per_token_logps": b.old,
                "ref_per_token_logps": b.ref,
                "completion_mask": b.mask.long(),
            }
        )
        reward = kl_penalised_reward(b.reward, b.old, b.ref, b.mask, beta, "k1")
        ours = rloo_advantages(reward, b.mask, GROUP)
        return [
            (ours, names["advantages"][:, None] * b.mask_f),
            (masked_sum(reward, b.mask), names["rewards"]),
        ]

    return Case(
        f"RLOO advantage{', KL k1 in the reward' if beta else ''}",
        "rloo_advantages" + (", kl_penalised_reward k1" if beta else ""),
        f"RLOOTrainer beta={beta}",
        "own lines",
        pairs,
    )


PEER = f"trl {trl.__version__}"
CASES = [
    clip_case("grpo", "seq_mean_token_mean"),
    clip_case("bnpo", "token_mean"),
    clip_case("dapo", "token_mean"),
    clip_case("dr_grpo", "constant"),
    clip_case("luspo", "seq_mean_token_sum"),
    Case(
        "dual clip at 1.5, value and gradient",
        "clip_loss dual_clip=1.5",
        "GRPOTrainer._compute_loss delta=1.5",
        "own function",
        dual_clip_pairs,
    ),
    Case(
        "CISPO, bound 1.5, value and gradient",
        "cispo_loss clip_high=0.5",
        "GRPOTrainer._compute_loss loss_type=cispo epsilon_high=1.5",
        "own function",
        cispo_pairs,
    ),
    Case(
        "GSPO, advantage constant per rollout, value and gradient",
        "gspo_token_loss, seq_mean_token_mean",
        "GRPOTrainer._compute_loss importance_sampling_level=sequence",
        "own function",
        gspo_pairs,
    ),
    Case(
        "share of clipped tokens, low and high",
        "clip_loss clipped_low, clipped_high",
        "GRPOTrainer._compute_loss clip_ratio/low_mean, high_mean",
        "own function",
        clip_fraction_pairs,
    ),
    kl_case(correction=False),
    kl_case(correction=True),
    Case(
        "policy loss with given importance weights and KL, value and gradient",
        "weight * clip_loss + coef * kl_loss",
        "GRPOTrainer._compute_loss use_vllm=True",
        "own function",
        sampler_loss_pairs,
    ),
    sampler_case("token"),
    sampler_case("sequence"),
    *(advantage_case(scale, nan) for nan in (False, True) for scale in ("group", "batch", "none")),
    rloo_case(0.0),
    rloo_case(0.1),
]
