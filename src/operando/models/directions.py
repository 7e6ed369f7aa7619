"""Directions: contrastive vectors of the residual stream, their controls, and their files.

Shape legend: N pairs, L layers of the band, D d_model, k directions, m singular vectors.

Every direction is stored hack-ward: a module pushes towards hacking where its output moves along
+v. A gate tests the update, never the gradient of a loss, whose sign is the opposite
(docs/projection.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from operando.errors import UserError
from operando.run import atomic_path

VERSION = "1"
DirectionArm = Literal["real", "random", "shuffled", "off_topic"]
Side = Literal["left", "right"]


@dataclass(frozen=True)
class DirectionSet:
    """A hack-ward unit vector for each layer's writers and readers, and what it was made from.

    `vector_D` is the band's one vector. `modules` holds what applies to a module in its place: rows
    [k D] that are orthonormal, in its output space (writers) or input space (readers).
    `inputs` is each module's mean input over hack tokens, normalised: the reference input at which
    an update's push along v is judged.

    Example: load_directions("runs/projected_directions/real.safetensors").vector_D.shape
    """

    arm: DirectionArm
    kind: Literal["activation", "gradient"]
    vector_D: Float[Tensor, "D"]
    layers: tuple[int, ...]
    position: str
    model_id: str
    model_sha256: str
    dtype: str
    accuracy: float  # share of held-out pairs that it orders rightly
    modules: Mapping[str, Float[Tensor, "_ _"]] = field(default_factory=dict)
    inputs: Mapping[str, Float[Tensor, "_"]] = field(default_factory=dict)
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)


class Denoised(NamedTuple):
    """A vector in the span of m singular vectors, the energy it kept, and what chance keeps.

    Example: denoise(v_D, W, m=16, side="left").retained
    """

    vector_D: Float[Tensor, "D"]
    retained: float  # ||U_m^T v||^2
    null: float  # m / D
    cosine: float  # with the vector as it was


def contrast_vector(
    plus_NLD: Float[Tensor, "N L D"], minus_NLD: Float[Tensor, "N L D"]
) -> Float[Tensor, "D"]:
    """Return the unit vector from clean to hack, the mean over layers of normalised differences.

    v = normalise(mean_l mean_n (h+ - h-)[n, l] / mean_n |h[n, l]|)
    Norms grow with depth: without the division the last layer alone would decide."""
    norm_L = torch.cat([plus_NLD, minus_NLD]).norm(dim=2).mean(dim=0)
    difference_LD = (plus_NLD - minus_NLD).mean(dim=0) / norm_L[:, None]
    return unit(difference_LD.mean(dim=0))


def unit(v_D: Float[Tensor, "D"]) -> Float[Tensor, "D"]:
    """Return v in float32 with norm 1; a vector of zeros is a UserError."""
    v_D = v_D.float()
    norm = float(v_D.norm())
    if not norm > 0:
        raise UserError("the two sides of the pairs are the same: their difference is zero")
    return v_D / norm


def pair_scores(
    v_D: Float[Tensor, "D"], x_NLD: Float[Tensor, "N L D"], norm_L: Float[Tensor, "L"]
) -> Float[Tensor, "N"]:
    """Return each side's mean over layers of <h, v> / the layer's norm."""
    return ((x_NLD @ v_D) / norm_L).mean(dim=1)


def pair_accuracy(
    v_D: Float[Tensor, "D"], plus_NLD: Float[Tensor, "N L D"], minus_NLD: Float[Tensor, "N L D"]
) -> float:
    """Return the share of pairs whose hack side scores higher than its clean side."""
    norm_L = torch.cat([plus_NLD, minus_NLD]).norm(dim=2).mean(dim=0)
    above_N = pair_scores(v_D, plus_NLD, norm_L) > pair_scores(v_D, minus_NLD, norm_L)
    return float(above_N.float().mean())


def shuffled_pairs(
    plus_NLD: Float[Tensor, "N L D"], minus_NLD: Float[Tensor, "N L D"], swap_N: Bool[Tensor, "N"]
) -> tuple[Float[Tensor, "N L D"], Float[Tensor, "N L D"]]:
    """Return the pairs with the two sides exchanged where `swap_N`."""
    swap_N11 = swap_N[:, None, None]
    return (torch.where(swap_N11, minus_NLD, plus_NLD), torch.where(swap_N11, plus_NLD, minus_NLD))


def denoise(v_D: Float[Tensor, "D"], W_oi: Float[Tensor, "o i"], m: int, side: Side) -> Denoised:
    """Return v in the span of W's first m singular vectors, normalised.

    W [out, in] = U S V^T. What a module writes lies in the span of U ("left"); what it reads in
    that of V ("right"). A random v keeps m / D of its energy: the null."""
    U_oR, _, V_Ri = torch.linalg.svd(W_oi.float(), full_matrices=False)
    basis_Dm = U_oR[:, :m] if side == "left" else V_Ri[:m].T
    if basis_Dm.shape[0] != v_D.shape[0]:
        raise UserError(
            f"a vector of {v_D.shape[0]} numbers is not on the {side} side of a matrix "
            f"{tuple(W_oi.shape)}"
        )
    kept_m = basis_Dm.T @ v_D.float()
    retained = float(kept_m.square().sum())
    clean_D = unit(basis_Dm @ kept_m)
    return Denoised(clean_D, retained, basis_Dm.shape[1] / v_D.shape[0], float(clean_D @ v_D))


def save_directions(directions: DirectionSet, file: Path) -> None:
    """Write a set atomically: safetensors, with everything else in its metadata."""
    plain = {
        k: v for k, v in vars(directions).items() if k not in ("vector_D", "modules", "inputs")
    }
    tensors = {"vector": directions.vector_D}
    tensors |= {f"module.{name}": rows for name, rows in directions.modules.items()}
    tensors |= {f"input.{name}": x for name, x in directions.inputs.items()}
    held = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "version": VERSION, "directions": json.dumps(plain)}
    with atomic_path(file) as temporary:
        save_file(held, temporary, metadata)


def load_directions(path: str | Path) -> DirectionSet:
    """Return the set of a file; a file that is no set is a UserError."""
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"there are no directions {file}; make them with: operando direction extract RECIPE"
        )
    try:
        with safe_open(file, "pt") as held:
            metadata = held.metadata() or {}
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file: {error}") from error
    if metadata.get("version") != VERSION or "directions" not in metadata:
        raise UserError(f"{file}: no directions of version {VERSION} are in it")
    plain = json.loads(metadata["directions"])
    plain["layers"] = tuple(plain["layers"])
    return DirectionSet(
        vector_D=tensors["vector"],
        modules={n.removeprefix("module."): t for n, t in tensors.items() if n[:7] == "module."},
        inputs={n.removeprefix("input."): t for n, t in tensors.items() if n[:6] == "input."},
        **plain,
    )


def check_directions(directions: DirectionSet, path: str | Path, digest: str, dtype: str) -> None:
    """Refuse directions of another model or dtype, and those that failed their gate."""
    if directions.model_sha256 != digest:
        raise UserError(
            f"{path} was made on model {directions.model_id!r} ({directions.model_sha256[:12]}); "
            f"the recipe's model is {digest[:12]}"
        )
    if directions.dtype != dtype:
        raise UserError(
            f"{path} was extracted in {directions.dtype}, the recipe trains in {dtype}: "
            "activations differ between dtypes; extract again"
        )
    gate = float(directions.evidence.get("gate", 0.0))
    if directions.arm == "real" and directions.accuracy < gate:
        raise UserError(
            f"{path}: the direction ranks {directions.accuracy:.0%} of the held-out pairs "
            f"correctly, below the gate of {gate:.0%}: it is not what the pairs differ in"
        )
