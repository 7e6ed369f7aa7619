"""A step is taken with finite gradients only, and with float32 weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from operando.recipe.update import OptimConfig
from operando.update.optim import apply_update


def stepped(bad: float | None, in_critic: bool = False) -> tuple[nn.Parameter, nn.Parameter]:
    """Take one step with a gradient of noise in which one number may be bad."""
    noise = torch.Generator().manual_seed(0)
    policy = nn.Parameter(torch.ones(3, 4))
    critic = nn.Parameter(torch.ones(4))
    for parameter in (policy, critic):
        parameter.grad = torch.randn(parameter.shape, generator=noise)
    if bad is not None:
        target = critic if in_critic else policy
        assert target.grad is not None
        target.grad.view(-1)[1] = bad
    groups = [{"params": [p], "lr": 0.1, "base_lr": 0.1} for p in (policy, critic)]
    optimizer = torch.optim.AdamW(groups)
    try:
        apply_update(optimizer, {"w": policy}, [critic], OptimConfig(lr=0.1), 1.0)
    finally:
        moved.append(not torch.equal(policy, torch.ones(3, 4)))
    return policy, critic


moved: list[bool] = []


@pytest.mark.parametrize("in_critic", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_step(bad: float, in_critic: bool) -> None:
    name = "value_head" if in_critic else "w"
    with pytest.raises(FloatingPointError, match=f"not finite in 1 of 1 tensors, first {name}"):
        stepped(bad, in_critic)
    assert moved.pop() is False


def test_a_finite_gradient_steps() -> None:
    policy, critic = stepped(None)
    assert moved.pop() is True
    assert policy.isfinite().all() and critic.isfinite().all()


def test_a_transform_that_breaks_the_gradient_is_seen() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)

    def breaks(parameters) -> dict[str, float]:
        parameters["w"].grad[0] = math.nan
        return {}

    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.1, "base_lr": 0.1}])
    with pytest.raises(FloatingPointError, match="first w"):
        apply_update(optimizer, {"w": weight}, [], OptimConfig(lr=0.1), 1.0, [breaks])
    assert weight.tolist() == [1.0, 1.0]
