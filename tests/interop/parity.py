"""What the parity tests and the parity table share: random batches, one comparison, its measure.

Dims: P prompts, G group size, B = P*G rollouts, T completion tokens.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SEEDS = range(20)
TOLERANCE = 1e-6
GROUP = 4


class Batch(NamedTuple):
    """Random tensors of one comparison; rows have 1..T real tokens, rows_mask may empty some."""

    logp: Tensor
    old: Tensor
    ref: Tensor
    adv: Tensor
    reward: Tensor
    value: Tensor
    old_value: Tensor
    mask: Tensor
    holed_mask: Tensor
    empty_rows_mask: Tensor

    @property
    def mask_f(self) -> Tensor:
        return self.mask.float()

    @property
    def score_B(self) -> Tensor:
        return (self.reward * self.mask_f).sum(1)


def random_batch(seed: int, prompts: int = 3, tokens: int = 7) -> Batch:
    """Batch whose ratios spread enough (std 0.5 in log) to reach every clip on both sides."""
    g = torch.Generator().manual_seed(seed)
    rows = prompts * GROUP
    old = -torch.rand(rows, tokens, generator=g) * 2
    noise = torch.randn(6, rows, tokens, generator=g)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=g)
    holes = torch.rand(rows, tokens, generator=g) < 0.7
    kept = torch.rand(rows, 1, generator=g) < 0.7
    return Batch(
        logp=old + 0.5 * noise[0],
        old=old,
        ref=old + 0.5 * noise[1],
        adv=noise[2],
        reward=0.3 * noise[3],
        value=noise[4],
        old_value=noise[4] + 0.5 * noise[5],
        mask=mask,
        holed_mask=mask & holes,
        empty_rows_mask=mask & kept,
    )


class Case(NamedTuple):
    """One row of docs/parity.md; differences returns every pair of tensors that must be equal."""

    quantity: str
    ours: str
    peer: str
    how: str
    pairs: Callable[[Batch], list[tuple[Tensor, Tensor]]]


def max_difference(case: Case) -> float:
    """Largest absolute difference over all seeds; NaN on either side counts as infinite."""
    worst = 0.0
    for seed in SEEDS:
        for ours, theirs in case.pairs(random_batch(seed)):
            assert ours.shape == theirs.shape, f"{case.quantity}: {ours.shape} and {theirs.shape}"
            difference = (ours.detach() - theirs.detach()).abs().max()
            worst = max(worst, float(torch.nan_to_num(difference, nan=torch.inf)))
    return worst


def value_and_gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """Value of a scalar loss and its gradient."""
    leaf = at.clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def compare_losses(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], at: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (our value, theirs) and (our gradient, theirs)."""
    return list(zip(value_and_gradient(ours, at), value_and_gradient(theirs, at), strict=True))


def own_lines(function: Callable[..., object], first: str, last: str) -> Callable[[dict], dict]:
    """The unchanged statements of a function, from the one that starts with `first` to the one that
    starts with `last`, as something to run in a namespace.

    TRL computes advantages in the middle of methods that also generate; this runs just those lines.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        text = [ast.unparse(statement) for statement in body]
        start = next((i for i, line in enumerate(text) if line.startswith(first)), None)
        stop = next((i for i, line in enumerate(text) if line.startswith(last)), None)
        if start is None or stop is None:
            continue
        code = compile(ast.Module(body[start : stop + 1], []), inspect.getfile(function), "exec")

        def run(namespace: dict, code=code) -> dict:
            exec(code, namespace)
            return namespace

        return run
    raise ValueError(f"{function.__qualname__}: no statements from {first!r} to {last!r}")
