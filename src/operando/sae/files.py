"""What the SAE formats share: tensors and configurations of a file, and keys that nobody reads.

Every key and every tensor of a file is used, known to change nothing, or an error: a key that is
dropped in silence is how an SAE comes to be read wrongly.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from operando.errors import UserError
from operando.files import read_object
from operando.sae.sae import SAE, Activation, Origin


@dataclass(frozen=True)
class Weights:
    """The tensors of one file; a missing or misshapen one is an error that names the file."""

    file: Path
    tensors: Mapping[str, Tensor]

    def get(self, key: str, *shape: int) -> Tensor:
        self.require(key)
        tensor = self.tensors[key]
        if shape and tuple(tensor.shape) != shape:
            raise UserError(
                f"{self.file}: {key!r} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        return tensor.detach().float().contiguous()

    def matrix(self, key: str) -> Tensor:
        tensor = self.get(key)
        if tensor.dim() != 2:
            raise UserError(
                f"{self.file}: {key!r} has shape {tuple(tensor.shape)}, expected 2 dims"
            )
        return tensor

    def require(self, *keys: str) -> None:
        missing = [key for key in keys if key not in self.tensors]
        if missing:
            found = ", ".join(sorted(self.tensors))
            raise UserError(f"{self.file}: missing {', '.join(missing)}; found {found}")

    def only(self, *keys: str) -> None:
        """Raise a UserError if there is a tensor besides these."""
        refuse_unread(self.file, self.tensors, keys, "tensor")


def refuse_unread(
    where: Path, found: Iterable[str], known: Iterable[str], what: str = "key"
) -> None:
    """Raise a UserError that names what a file holds and nobody reads."""
    unread = sorted(set(found) - set(known))
    if unread:
        raise UserError(
            f"{where}: the {what}s {', '.join(unread)} are not read here and may change what the "
            f"SAE computes. Known {what}s: {', '.join(sorted(known))}. Remove those that are "
            "bookkeeping, or give a format that is read"
        )


def refuse_values(where: Path, cfg: Mapping[str, object], inert: Mapping[str, tuple]) -> None:
    """Raise a UserError where a key that is not read has a value that changes something."""
    for key, values in inert.items():
        if key in cfg and cfg[key] not in values:
            allowed = " or ".join(repr(value) for value in values)
            raise UserError(f"{where}: {key}={cfg[key]!r} is not supported, only {allowed}")


def centred_bias(sae: SAE) -> Tensor:
    """Return b with W (x - b_dec) + b = W_enc (x - b_pre) + b_enc."""
    return sae.b_enc_M + sae.W_enc_MD @ (sae.b_dec_D - sae.b_pre_D)


def topk_kind(own: dict[str, object], default: Activation = "topk_relu") -> Activation:
    """Return which top-k it was when operando wrote it; else what the format's own tool does."""
    kind = own.get("activation")
    return kind if kind in ("topk", "topk_relu") else default


def own_origin(own: dict[str, object]) -> Origin | None:
    if not own:
        return None
    model, site = str(own.get("model_name", "")), str(own.get("hook_name", ""))
    return origin_of(model, site, mapping(own.get("provenance")))


def origin_of(model: str, site: str, provenance: dict[str, object]) -> Origin:
    arm, seed, resampled = (provenance.get(key) for key in ("arm", "split_seed", "resampled"))
    texts = {key: str(provenance.get(key) or "") for key in ("checkpoint", "parent", "data")}
    return Origin(
        model,
        site,
        texts["checkpoint"],
        texts["parent"],
        arm if arm in ("real", "null") else "",
        tuple(int(i) for i in resampled) if isinstance(resampled, list) else (),
        texts["data"],
        seed if isinstance(seed, int) else None,
    )


def hf_name(site: str) -> str | None:
    """Return "model.layers.12" for the residual stream after block 12, the one HF names."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", site)
    return f"model.layers.{found[1]}" if found else None


def mapping(value: object) -> dict[str, object]:
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def tensors_of(held: dict[str, object]) -> dict[str, Tensor]:
    return {key: value for key, value in held.items() if isinstance(value, Tensor)}


def whole(value: object, where: str, key: str) -> int:
    if not isinstance(value, int):
        raise UserError(f"{where}: {key} is {value!r}, expected a whole number")
    return value


def read_json(file: Path) -> dict[str, object]:
    return mapping(read_object(file))


def write_json(file: Path, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_safetensors(file: Path) -> Weights:
    try:
        return Weights(file, load_file(file))
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or truncated: {error}") from error


def read_torch(file: Path) -> dict[str, object]:
    """Return what a .pt holds; only tensors and plain values are ever unpickled."""
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        EOFError,
        OSError,
        MemoryError,
        struct.error,
        pickle.UnpicklingError,
    ) as error:  # whatever a damaged pickle makes of itself
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{file} is damaged, truncated or not a weights file: {first}") from error
    if not isinstance(held, Mapping):
        raise UserError(f"{file} holds a {type(held).__name__}, expected a dict of tensors")
    return mapping(held)
