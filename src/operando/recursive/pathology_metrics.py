"""What the pathology audit measures of a model's loops, as plain functions.

Dims: P prompts, N tokens, D d_model, T loops, K numbers per prompt, b resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

STARVED, FEEBLE, EXPLODED = 1e-3, 1e-2, 1e3

Flow = Literal["detached", "zero", "tiny", "flows"]


class Shock(NamedTuple):
    """How a token's state moves from loop to loop, D_t = h_t - h_{t-1}, t = 1 ... T.

    s_t = ||D_t|| / ||h_{t-1}||, and everything below is of its mean over tokens but `p99`.
    """

    jitter: float  # J = std over loops of s_t
    spike: float  # S = max_t s_t / median_t s_t
    bend: float  # max over t >= 2 of ||D_t - D_{t-1}|| / ||h_t||
    drift: float  # ||h_T|| / ||h_1||
    p99: float  # of s_t over tokens and loops


def step_sizes(states: Sequence[Float[Tensor, "N D"]]) -> Float[Tensor, "N T"]:
    """Return s_t of every token; `states` are h_0 ... h_T."""
    pairs = zip(states[:-1], states[1:], strict=True)
    return torch.stack([(b - a).norm(dim=-1) / a.norm(dim=-1) for a, b in pairs], dim=-1)


def bends(states: Sequence[Float[Tensor, "N D"]]) -> Float[Tensor, "N t"]:
    """Return ||D_t - D_{t-1}|| / ||h_t|| of every token, t = 2 ... T (latent acceleration)."""
    triples = zip(states[:-2], states[1:-1], states[2:], strict=True)
    return torch.stack([(c - 2 * b + a).norm(dim=-1) / c.norm(dim=-1) for a, b, c in triples], -1)


def shock(
    size_NT: Float[Tensor, "N T"], bend_Nt: Float[Tensor, "N t"], drift_N: Float[Tensor, " N"]
) -> Shock:
    """Return the summary of all tokens' steps; a single loop has neither jitter nor bend."""
    mean_T = size_NT.mean(0)
    return Shock(
        jitter=float(mean_T.std(correction=0)),
        spike=float(mean_T.max() / mean_T.median()),
        bend=float(bend_Nt.mean(0).max()) if bend_Nt.shape[1] else 0.0,
        drift=float(drift_N.mean()),
        p99=float(np.quantile(size_NT.numpy(), 0.99)),
    )


class Likeness(NamedTuple):
    """How alike the same tokens' states at two depths are, beside other tokens' states."""

    cosine: float  # mean over tokens
    mismatched: float  # of each token's state with another token's
    centred: float  # after the mean state of each depth is taken away, minus the mismatched one


def likeness(
    a_ND: Float[Tensor, "N D"], b_ND: Float[Tensor, "N D"], other_N: Int[Tensor, " N"]
) -> Likeness:
    """Return the cosines; `other_N` names another token for each."""

    def cosine(x_ND: Tensor, y_ND: Tensor) -> float:
        return float(torch.cosine_similarity(x_ND, y_ND, dim=-1).mean())

    ac_ND, bc_ND = a_ND - a_ND.mean(0), b_ND - b_ND.mean(0)
    return Likeness(
        cosine(a_ND, b_ND),
        cosine(a_ND, b_ND[other_N]),
        cosine(ac_ND, bc_ND) - cosine(ac_ND, bc_ND[other_N]),
    )


def divergence(
    logp_NV: Float[Tensor, "N V"], other_NV: Float[Tensor, "N V"]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return KL(p || other) of each token, and 1 where both have the same first choice."""
    kl_N = (logp_NV.exp() * (logp_NV - other_NV)).sum(-1)
    return kl_N, (logp_NV.argmax(-1) == other_NV.argmax(-1)).float()


def flow(norms: Sequence[float | None]) -> list[Flow]:
    """Return what reaches each loop's update: norms of dL/du_t, None where no graph leads there.

    An exact 0 is a closed gate, a masked exit or underflow, and no decay; tiny is below 1e-3 of
    the largest.
    """
    largest = max((g for g in norms if g is not None), default=0.0)
    found: list[Flow] = []
    for g in norms:
        if g is None:
            found.append("detached")
        elif g == 0.0:
            found.append("zero")
        else:
            found.append("tiny" if g < STARVED * largest else "flows")
    return found


def starvation(norms: Sequence[float | None]) -> tuple[bool | None, str]:
    """Return whether gradients reach the loops (None: hardly), and what there is to say.

    The late half of the loops is judged: the first are farther from the loss, and less reaches them
    in a healthy model too.
    """
    kinds = flow(norms)
    late = range(len(norms) // 2, len(norms))
    for kind, words in (
        ("detached", "no graph leads to"),
        ("zero", "exactly 0 (a closed gate, a masked exit or underflow) at"),
    ):
        hit = [t + 1 for t, one in enumerate(kinds) if one == kind]
        if hit:
            return False, f"{words} loops {hit}"
    given = [g for g in norms if g is not None]
    if not np.isfinite(given).all():
        return False, "not finite"
    largest = max(given)
    least = min(given[t] / largest for t in late)
    if least < STARVED:
        return False, f"{least:.1e} of the largest in the late half"
    if given[0] / given[-1] > EXPLODED:
        return False, f"explodes backwards: {given[0] / given[-1]:.1e} times the last at loop 1"
    words = f"at least {least:.2g} of the largest in the late half"
    return (None if least < FEEBLE else True), words
