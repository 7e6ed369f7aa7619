"""Linear read-outs of pooled activations: difference of means, and a penalised logistic probe."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from torch import Tensor

from operando.stats.contrast import contrast_weights


def mean_difference(
    x_RD: Float[Tensor, "R D"], correct_R: Bool[Tensor, "R"], prompt_R: Int[Tensor, "R"]
) -> Float[Tensor, "D"]:
    """Return the unit vector from wrong to right answers of the same prompt.

    AxBench (2501.17148): the baseline that SAEs have to beat."""
    difference_D = contrast_weights(correct_R, prompt_R) @ x_RD
    return difference_D / difference_D.norm().clamp(min=1e-12)


def logistic_probe(
    x_RD: Float[Tensor, "R D"], correct_R: Bool[Tensor, "R"], penalty: float = 1.0
) -> Float[Tensor, "D"]:
    """Return the direction w of a logistic probe on standardised x, without its constant.

    min_w,b  sum_r log(1 + exp(-y_r (w x_r + b))) + penalty / 2 |w|^2,  y in {-1, 1}"""
    x = x_RD.double().numpy()
    spread = x.std(axis=0)
    spread[spread == 0] = 1
    z = (x - x.mean(axis=0)) / spread
    y = np.where(correct_R.numpy(), 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = parameters[:-1], parameters[-1]
        margin = y * (z @ w + b)
        pull = -y / (1 + np.exp(np.clip(margin, -500, 500)))
        value = np.logaddexp(0, -margin).sum() + penalty / 2 * (w @ w)
        return float(value), np.append(z.T @ pull + penalty * w, pull.sum())

    found = minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B")
    return torch.from_numpy(found.x[:-1] / spread).float()
