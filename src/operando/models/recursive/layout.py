"""Whether a folder's weights are those that its config.json describes.

transformers initialises a tensor that a file lacks, and leaves out one that it does not know: a
checkpoint of another layout would load as another model without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from operando.errors import UserError
from operando.files import read_object
from operando.models.recursive.configuration import RecursiveConfig
from operando.models.recursive.modeling import RecursiveCausalLM

Shape = tuple[int, ...]


def check_layout(folder: Path) -> None:
    """Refuse a RecursiveCausalLM folder whose safetensors hold other tensors than its config's."""
    file = folder / "config.json"
    if not file.is_file():
        return  # a hub id
    config = read_object(file)
    if config.get("model_type") != RecursiveConfig.model_type:
        return
    given = _given(folder)
    expected = _expected(RecursiveConfig.from_pretrained(folder))
    for name in sorted(set(given) | set(expected[0])):
        if name not in given and name in expected[1]:
            continue  # tied
        wrong = _difference(given.get(name), expected[0].get(name))
        if wrong:
            raise UserError(f"{folder} is of another layout than its config.json: {name} {wrong}")


def _difference(given: Shape | None, expected: Shape | None) -> str:
    if given is None:
        return f"is missing, expected with shape {expected}"
    if expected is None:
        return f"of shape {given} is in the file, and this model has no such tensor"
    return "" if given == expected else f"has shape {given}, expected {expected}"


def _given(folder: Path) -> dict[str, Shape]:
    """Return the shapes of all tensors in the folder's safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has a config.json and no .safetensors file")
    shapes: dict[str, Shape] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no mapping
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or not a safetensors file: {error}") from error
    return shapes


def _expected(config: RecursiveConfig) -> tuple[Mapping[str, Shape], frozenset[str]]:
    """Return the shapes that a model of this config has, and the names that are tied to others."""
    with torch.device("meta"):
        model = RecursiveCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, frozenset(model.all_tied_weights_keys)
