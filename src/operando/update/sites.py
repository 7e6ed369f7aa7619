"""Which trained modules a projection constrains, with the directions that hold for each.

A writer's output is added to the residual stream; a reader's input is taken from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from operando.errors import UserError
from operando.models.directions import DirectionSet
from operando.models.freeze import layer_of, plain_name
from operando.models.layers import parse_layer_set
from operando.models.policy import Policy
from operando.recipe.projection import ProjectionConfig
from operando.update import projection as pj
from operando.update.projection import Factors, Outer

# Square matrices do not tell by their shape which side is the residual stream.
WRITERS = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "fc2", "wo", "w2")
READERS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "fc1", "wq", "wk")


@dataclass
class Site:
    """One constrained module: its factors' names and its directions."""

    name: str
    left: str
    right: str | None  # None: the whole weight is trained
    scale: float
    writes: bool
    v_kD: Float[Tensor, "k D"]
    null_UD: Float[Tensor, "U D"]
    x_i: Float[Tensor, "i"] | None = None
    module: nn.Module | None = field(default=None, repr=False)  # LoRA's B, for mode "token"
    gain: Outer | None = None

    def factors(self, tensors: Mapping[str, Tensor]) -> Factors:
        right = tensors[self.right].detach().float() if self.right is not None else None
        return Factors(tensors[self.left].detach().float(), right)

    def names(self) -> list[str]:
        return [self.left] if self.right is None else [self.left, self.right]

    def named(self, factors: Factors) -> dict[str, Tensor]:
        """Return the factors by their parameters' names."""
        if self.right is None or factors.right is None:
            return {self.left: factors.left}
        return {self.left: factors.left, self.right: factors.right}


def find_sites(
    config: ProjectionConfig,
    policy: Policy,
    directions: DirectionSet,
    null_UD: Float[Tensor, "U D"],
) -> list[Site]:
    """Return the trained modules that the projection constrains; none at all is a UserError."""
    layers = set(directions.layers)
    if config.layers:
        layers = set(parse_layer_set(config.layers, len(policy.blocks)))
    width = null_UD.shape[1]
    if len(directions.vector_D) != width:
        raise UserError(
            f"projection.directions: a vector of {len(directions.vector_D)} numbers, the model's "
            f"residual stream has {width}"
        )
    trainable, want_reader = policy.trainable(), config.mode == "reader"
    found = []
    for name, module in policy.model.named_modules():
        site = _site_at(name, module, trainable, width, null_UD.to(policy.device))
        if site is None or site.writes is want_reader:
            continue
        if layer_of(site.left, policy.blocks_name) not in layers:
            continue
        found.append(_with_directions(site, config, directions, module, policy.device))
    if not found:
        where = ",".join(map(str, sorted(layers)))
        raise UserError(
            f"projection: no {'reader' if want_reader else 'writer'} is trained in layers {where}: "
            "set model.layers and model.lora.targets so that they meet projection.layers"
        )
    return found


def _site_at(
    name: str, module: nn.Module, trainable: Mapping[str, nn.Parameter], width: int, null_UD: Tensor
) -> Site | None:
    """Return a trained linear module as a site, or None."""
    nothing_kD = null_UD.new_zeros(0, width)
    plain = plain_name(name)
    if isinstance(module, LoraLayer) and f"{name}.lora_B.default.weight" in trainable:
        left, right = f"{name}.lora_B.default.weight", f"{name}.lora_A.default.weight"
        shape = (trainable[left].shape[0], trainable[right].shape[1])
        branch = module.lora_B["default"]
        scale = float(module.scaling["default"])
        writes = _writes(plain, shape, width)
        if writes is None:
            return None
        return Site(plain, left, right, scale, writes, nothing_kD, null_UD, module=branch)
    if isinstance(module, nn.Linear) and f"{name}.weight" in trainable:
        if "lora_" in name or name.rpartition(".")[2] in ("lm_head", "embed_out"):
            return None
        writes = _writes(plain, tuple(module.weight.shape), width)
        return (
            writes
            if writes is None
            else Site(plain, f"{name}.weight", None, 1.0, writes, nothing_kD, null_UD)
        )
    return None


def _writes(name: str, shape: tuple[int, ...], width: int) -> bool | None:
    """Return whether a module writes the residual stream; None where it is on neither side."""
    out, into = shape
    if (out == width) != (into == width):
        return out == width
    if out != width:
        return None
    last = name.rpartition(".")[2]
    if last not in WRITERS + READERS:
        raise UserError(
            f"projection: {name} is square ({width}): whether it reads or writes the residual "
            f"stream is not known. Known: {', '.join(WRITERS + READERS)}"
        )
    return last in WRITERS


def _with_directions(
    site: Site,
    config: ProjectionConfig,
    directions: DirectionSet,
    module: nn.Module,
    device: torch.device,
) -> Site:
    """Give a site its rows, its reference input and its gain direction."""
    rows_kD = directions.modules.get(site.name, directions.vector_D[None]).float()
    rows_kD = rows_kD / rows_kD.norm(dim=1, keepdim=True)
    gap = float((rows_kD @ rows_kD.T - torch.eye(len(rows_kD))).abs().max())
    if gap > 1e-4 or rows_kD.shape[1] != len(directions.vector_D):
        raise UserError(
            f"{config.directions}: the rows of {site.name} {tuple(rows_kD.shape)} are not "
            f"orthonormal rows of {len(directions.vector_D)} numbers (off by {gap:.2g})"
        )
    site.v_kD = rows_kD.to(device)
    if site.name in directions.inputs:
        site.x_i = directions.inputs[site.name].float().to(device)
    needs = config.mode in ("rank1", "svd_gain") or (
        config.gate == "one_sided" and config.mode == "writer"
    )
    if needs and site.x_i is None:
        raise UserError(
            f"projection: {site.name} has no reference input in {config.directions}, and mode = "
            f'"{config.mode}" with gate = "{config.gate}" judges a push at it; extract the '
            "directions again with its layer in the band"
        )
    if config.mode == "svd_gain":
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
            raise UserError(f"projection: svd_gain needs the whole weight of {site.name}")
        assert site.x_i is not None
        W_oi = base.weight.detach().float()
        site.gain = pj.gain_direction(W_oi, sum_direction(site.v_kD), site.x_i)
    return site


def sum_direction(v_kD: Float[Tensor, "k D"]) -> Float[Tensor, "D"]:
    """Return the unit vector along the sum of the rows."""
    total_D = v_kD.sum(dim=0)
    return total_D / total_D.norm()
