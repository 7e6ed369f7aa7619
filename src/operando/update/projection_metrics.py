"""What a step says of a direction, beside random ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from operando.update import projection as pj
from operando.update.projection import Factors
from operando.update.sites import Site, sum_direction


def projection_metrics(
    sites: Sequence[Site], who: str, steps: Mapping[str, Factors], at: Mapping[str, Factors]
) -> dict[str, float]:
    """Return a step's cosine with the hack-ward push and its share along v, with their nulls.

    cos = <d, grad phi> / (||d|| ||grad phi||), phi = sum_modules s v^T B A x.
    share = ||V dB|| / ||dB|| (writers), ||dA V^T|| / ||dA|| (readers).
    Null: the root mean square of the same over random unit vectors."""
    num = 1 + len(sites[0].null_UD)
    along_U, size_U = torch.zeros(num), torch.zeros(num)
    inside_U, outside, signed = torch.zeros(num), 0.0, True
    for site in sites:
        if site.name not in steps:
            continue
        step, here = steps[site.name], at[site.name]
        v_UD = torch.cat([sum_direction(site.v_kD)[None], site.null_UD])
        read = step.left if step.right is None else step.right
        side = step.left if site.writes else read.T
        square_U = (v_UD @ side).square().sum(1) * len(site.v_kD)
        square_U[0] = (site.v_kD @ side).square().sum()
        inside_U += square_U.cpu()
        outside += float(side.square().sum())
        signed = signed and site.writes and site.x_i is not None
        if signed and site.x_i is not None:
            move_o = pj.output_move(step, here, site.x_i, site.scale)
            along_U += (v_UD @ move_o).cpu()
            size_U += _push_square(here, v_UD, site.x_i, site.scale).cpu()
    share_U = (inside_U / max(outside, 1e-30)).sqrt()
    prefix = "projection/" if who == "grad" else "projection/update_"
    metrics = {
        f"projection/{who}_share": float(share_U[0]),
        f"{prefix}null_share": float(share_U[1:].square().mean().sqrt()),
    }
    if signed:
        size = max(pj.norm(list(steps.values())), 1e-30)
        cos_U = along_U / (size_U.sqrt().clamp(min=1e-30) * size)
        metrics[f"projection/{who}_cos"] = float(cos_U[0])
        metrics[f"{prefix}null_cos"] = float(cos_U[1:].square().mean().sqrt())
    return metrics


def _push_square(
    at: Factors, v_UD: Float[Tensor, "U D"], x_i: Float[Tensor, "i"], scale: float
) -> Float[Tensor, "U"]:
    """Return ||grad phi||^2 for each v: s^2 (|v|^2 |A x|^2 + |B^T v|^2 |x|^2), or |v|^2 |x|^2."""
    size_U = v_UD.square().sum(1)
    if at.right is None:
        return size_U * x_i.square().sum()
    inner = (at.right @ x_i).square().sum()
    return scale**2 * (size_U * inner + (v_UD @ at.left).square().sum(1) * x_i.square().sum())
