"""Projection of a step away from a direction: the algebra, on the factors of one linear module.

Shape legend: o out, i in, r rank, k directions (orthonormal rows), q rows of a basis.

A module's weight is s B A (LoRA: B [o r], A [r i]) or W [o i] itself. A step is what an update adds
to its factors: minus the gradient, minus AdamW's momentum, or the difference that AdamW made. A
direction v is hack-ward: a step pushes towards hacking where s v^T (dB A + B dA) x > 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

TOLERANCE = 1e-5  # of a factor's norm: what is smaller along v is rounding, not a component
MOST_BOOST = 2.0


class Factors(NamedTuple):
    """The factors of a weight, or of a step: B and A, or W alone (right None); float32.

    Example: Factors(B_or, A_ri)
    """

    left: Float[Tensor, "o r"]
    right: Float[Tensor, "r i"] | None = None

    def dot(self, other: Factors) -> Float[Tensor, ""]:
        """Return the inner product over both factors."""
        total = (self.left * other.left).sum()
        if self.right is not None and other.right is not None:
            total = total + (self.right * other.right).sum()
        return total

    def plus(self, other: Factors, times: float = 1.0) -> Factors:
        """Return self + times * other."""
        right = None
        if self.right is not None and other.right is not None:
            right = self.right + times * other.right
        return Factors(self.left + times * other.left, right)

    def scaled(self, times: float) -> Factors:
        return Factors(self.left * times, None if self.right is None else self.right * times)


class Outer(NamedTuple):
    """A matrix L R [o i], kept as its two factors. Example: Outer(v_D[:, None], x_i[None])"""

    left_oq: Float[Tensor, "o q"]
    right_qi: Float[Tensor, "q i"]


def row_basis(x_kr: Float[Tensor, "k r"], least: float) -> Float[Tensor, "q r"]:
    """Return orthonormal rows that span the rows of x, without singular values up to `least`."""
    _, size_q, rows_qr = torch.linalg.svd(x_kr, full_matrices=False)
    return rows_qr[size_q > least]


def output_move(
    step: Factors, at: Factors, x_i: Float[Tensor, "i"], scale: float
) -> Float[Tensor, "o"]:
    """Return how a small step moves the module's output at x: s (dB A x + B dA x), or dW x."""
    if step.right is None or at.right is None:
        return step.left @ x_i
    return scale * (step.left @ (at.right @ x_i) + at.left @ (step.right @ x_i))


def without_output(
    step: Factors, at: Factors, v_kD: Float[Tensor, "k o"], times: float = 1.0
) -> Factors:
    """Return the step that moves nothing along v at the output, whatever the input (writer).

    dB <- (I - V^T V) dB, and dA loses its part in the span of B^T v, so that
    v^T (dB A + B dA) = 0. While v^T B = 0, A needs nothing. `times` 2 turns the component round."""
    left = step.left - times * v_kD.T @ (v_kD @ step.left)
    if step.right is None:
        return Factors(left)
    basis_qr = row_basis(v_kD @ at.left, TOLERANCE * float(at.left.norm()))
    return Factors(left, step.right - times * basis_qr.T @ (basis_qr @ step.right))


def without_input(
    step: Factors, at: Factors, v_kD: Float[Tensor, "k i"], times: float = 1.0
) -> Factors:
    """Return the step after which the module reads no more and no less of v (reader).

    dA <- dA (I - V^T V), and dB loses its part along A v, so that (dB A + B dA) v = 0."""
    if step.right is None or at.right is None:
        return Factors(step.left - times * (step.left @ v_kD.T) @ v_kD)
    basis_qr = row_basis(v_kD @ at.right.T, TOLERANCE * float(at.right.norm()))
    left = step.left - times * (step.left @ basis_qr.T) @ basis_qr
    return Factors(left, step.right - times * (step.right @ v_kD.T) @ v_kD)


def functional_gradient(at: Factors, direction: Outer, scale: float) -> Factors:
    """Return the gradient of phi = <D, s B A> (or <D, W>) in the factors; D = L R.

    dphi/dB = s D A^T, dphi/dA = s B^T D. With D = v x^T: phi is v^T of the output at input x."""
    left_oq, right_qi = direction
    if at.right is None:
        return Factors(left_oq @ right_qi)
    return Factors(
        scale * left_oq @ (right_qi @ at.right.T), scale * (at.left.T @ left_oq) @ right_qi
    )


def without_functional(
    steps: Mapping[str, Factors], gradients: Mapping[str, Factors], times: float = 1.0
) -> dict[str, Factors]:
    """Return the steps, together, without their component along the functional's gradient."""
    square = sum(float(g.dot(g)) for g in gradients.values())
    if square == 0:
        return dict(steps)
    along = sum(float(steps[name].dot(g)) for name, g in gradients.items()) / square
    return {name: step.plus(gradients[name], -times * along) for name, step in steps.items()}


def gain_direction(
    W_oi: Float[Tensor, "o i"], v_D: Float[Tensor, "o"], x_i: Float[Tensor, "i"]
) -> Outer:
    """Return v x^T as a change of W's singular values alone: U diag(w) V^T, |w| = 1.

    W = U S V^T, w = normalise((U^T v) * (V^T x)): the nearest gain change to the rank-one push."""
    U_oq, _, V_qi = torch.linalg.svd(W_oi.float(), full_matrices=False)
    w_q = (U_oq.T @ v_D) * (V_qi @ x_i)
    return Outer(U_oq * (w_q / w_q.norm().clamp(min=1e-12)), V_qi)


def token_gradient(
    delta_ND: Float[Tensor, "*n o"], v_kD: Float[Tensor, "k o"], kept: str
) -> Float[Tensor, "*n k"]:
    """Return what is taken from each token's output gradient, along each direction.

    delta = dL/dy; a token pulls its output towards +v where v^T delta < 0. `kept` names the side:
    "hackward" takes min(0, c), "literal_grad" max(0, c), "both" all of c."""
    c_Nk = delta_ND.float() @ v_kD.T
    if kept == "hackward":
        return c_Nk.clamp(max=0)
    return c_Nk.clamp(min=0) if kept == "literal_grad" else c_Nk


def boost(before: float, after: float) -> float:
    """Return the factor that restores a norm, at most 2; 1 where nothing is left to scale."""
    return min(MOST_BOOST, before / after) if after > 0 else 1.0


def norm(steps: Sequence[Factors]) -> float:
    """Return the L2 norm over all factors."""
    return sum(float(step.dot(step)) for step in steps) ** 0.5


def removed_norm(before: Mapping[str, Factors], after: Mapping[str, Factors]) -> float:
    """Return ||before - after||."""
    return norm([step.plus(after[name], -1.0) for name, step in before.items()])
