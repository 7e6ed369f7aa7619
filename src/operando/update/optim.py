"""The optimizer step: schedule, gradient transforms, clip, AdamW, update transforms.

Gradient transforms (seam 3) see the summed gradient before the clip. Update transforms see the
parameters before and after AdamW and may rewrite the difference. Both return metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from operando.parallel import whole
from operando.recipe.run import Recipe
from operando.recipe.update import GaeAdvantage, OptimConfig

Parameters = Mapping[str, nn.Parameter]
GradientTransform = Callable[[Parameters], Mapping[str, float]]
UpdateTransform = Callable[[Parameters, Mapping[str, Tensor]], Mapping[str, float]]


class UpdateStats(NamedTuple):
    """One optimizer step. grad_norm is before the clip; update_norm is ||dW|| / ||W||."""

    grad_norm: float
    update_norm: float
    lr: float
    without_gradient: tuple[str, ...]
    metrics: Mapping[str, float]


def make_optimizer(
    recipe: Recipe, policy: Parameters, critic: Sequence[nn.Parameter]
) -> torch.optim.AdamW:
    """Return AdamW over the policy's trainable tensors and, in a group of its own, the critic's."""
    config = recipe.optim
    groups: list[dict[str, object]] = [
        {"params": list(policy.values()), "lr": config.lr, "base_lr": config.lr}
    ]
    if isinstance(recipe.advantage, GaeAdvantage):
        rate = recipe.advantage.value_lr
        groups.append({"params": list(critic), "lr": rate, "base_lr": rate})
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )


def lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """Return what the base rate is multiplied by at `step` (from 1): warm-up, then the schedule."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / max(1, steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))


def global_norm(tensors: Sequence[Tensor]) -> float:
    """Return the L2 norm over all tensors, in float32."""
    if not tensors:
        return 0.0
    norms = [whole(torch.linalg.vector_norm(t.detach().float())) for t in tensors]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def apply_update(
    optimizer: torch.optim.AdamW,
    policy: Parameters,
    critic: Sequence[nn.Parameter],
    config: OptimConfig,
    factor: float,
    gradient_transforms: Sequence[GradientTransform] = (),
    update_transforms: Sequence[UpdateTransform] = (),
) -> UpdateStats:
    """Take one step with the gradients that are there, then clear them.

    A gradient that is not finite raises FloatingPointError before any weight has moved: a clip
    would let NaN through, and turn inf into NaN.
    """
    without = tuple(name for name, p in policy.items() if p.grad is None or not whole(p.grad).any())
    metrics: dict[str, float] = {}
    for transform in gradient_transforms:
        metrics |= transform(policy)
    grad_norm = clip_gradients(policy, config.max_grad_norm)
    clip_gradients({f"value_head.{i}": p for i, p in enumerate(critic)}, config.max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    before = {name: p.detach().clone() for name, p in policy.items()}
    optimizer.step()
    for transform in update_transforms:
        metrics |= transform(policy, before)
    moved = global_norm([p.detach() - before[name] for name, p in policy.items()])
    update_norm = moved / max(global_norm(list(before.values())), 1e-12)
    optimizer.zero_grad(set_to_none=True)
    return UpdateStats(grad_norm, update_norm, config.lr * factor, without, metrics)


def clip_gradients(parameters: Parameters, max_norm: float) -> float:
    """Scale gradients down to `max_norm`, in place; return the norm before. It must be finite."""
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    norm = global_norm(grads)
    if not math.isfinite(norm):
        bad = [
            name
            for name, p in parameters.items()
            if p.grad is not None and not whole(p.grad).isfinite().all()
        ]
        where = f"{len(bad)} of {len(parameters)} tensors, first {bad[0]}" if bad else "in the sum"
        raise FloatingPointError(f"the gradient's norm is {norm}: not finite in {where}")
    if norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm
