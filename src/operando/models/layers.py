"""Layer sets ("24-27", "last:4", "60%:75%") and where the decoder blocks of a model are."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from operando.errors import UserError
from operando.models.recursive import RecursiveCausalLM

FORMS = '"all", "24-27", "3,5", "-1", "last:4", "first:2", "60%:75%"'


def parse_layer_set(text: str, num_layers: int) -> tuple[int, ...]:
    """Return the layer indices that `text` names in a model of `num_layers` blocks, ascending.

    Anything empty, out of range, reversed or unparsable is an error: a mistyped set never means
    "all layers".
    """
    text = text.strip()
    if text == "all":
        return tuple(range(num_layers))
    if found := re.fullmatch(r"(last|first):(\d+)", text):
        count = int(found[2])
        if not 1 <= count <= num_layers:
            raise UserError(f"layer set {text!r}: the model has {num_layers} layers")
        start = num_layers - count if found[1] == "last" else 0
        return tuple(range(start, start + count))
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)%:(\d+(?:\.\d+)?)%", text):
        low, high = float(found[1]) / 100, float(found[2]) / 100
        if not 0 <= low < high <= 1:
            raise UserError(f"layer set {text!r}: expected 0% <= from < to <= 100%")
        chosen = [i for i in range(num_layers) if low <= i / num_layers < high]
        if not chosen:
            raise UserError(f"layer set {text!r}: no layer of {num_layers} falls in it")
        return tuple(chosen)
    indices: list[int] = []
    for part in text.split(","):
        indices += _parse_part(part.strip(), text, num_layers)
    if len(set(indices)) != len(indices):
        raise UserError(f"layer set {text!r}: a layer is named twice")
    return tuple(sorted(indices))


def _parse_part(part: str, text: str, num_layers: int) -> list[int]:
    if found := re.fullmatch(r"(\d+)-(\d+)", part):
        low, high = int(found[1]), int(found[2])
        if low > high:
            raise UserError(f"layer set {text!r}: {part!r} is reversed")
        picked = list(range(low, high + 1))
    elif re.fullmatch(r"-?\d+", part):
        index = int(part)
        picked = [index + num_layers if index < 0 else index]
    else:
        raise UserError(f"layer set {text!r}: can't read {part!r}; forms: {FORMS}")
    for index in picked:
        if not 0 <= index < num_layers:
            raise UserError(
                f"layer set {text!r}: layer {index} is out of range, the model has layers "
                f"0-{num_layers - 1}"
            )
    return picked


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the language model's decoder blocks.

    They are the longest ModuleList whose members are alike and hold attention, outside any vision
    or audio tower; of a multimodal model they lie in its language decoder, however deep its towers.
    """
    found: list[tuple[int, str, nn.ModuleList]] = []
    language = language_decoder(model)
    for name, module in model.named_modules():
        if language is not None and not f"{name}.".startswith(f"{language}."):
            continue
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if re.search(r"vision|visual|image|audio|tower|encoder\.", name):
            continue
        if len({type(block) for block in module}) <= 2 and _has_attention(module[0]):
            found.append((len(module), name, module))
    if not found:
        raise UserError(f"can't find the decoder blocks of {type(model).__name__}")
    _, name, blocks = max(found, key=lambda item: item[0])
    return name, blocks


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Return whether a model reads images with a tower beside its language model."""
    return "text_config" in config and "vision_config" in config


def language_decoder(model: nn.Module) -> str | None:
    """Return the name of the language decoder inside a multimodal model; None of another model."""
    for outer, wrapper in model.named_modules():
        if isinstance(wrapper, PreTrainedModel) and is_multimodal(wrapper.config):
            decoder = wrapper.get_decoder()
            inner = next((name for name, m in wrapper.named_modules() if m is decoder), "")
            if decoder is wrapper or not inner:
                raise UserError(
                    f"{type(wrapper).__name__} is a multimodal model without a language decoder: "
                    "there are no blocks that write text, so nothing to train here"
                )
            return f"{outer}.{inner}".lstrip(".")
    return None


def is_apart(model: nn.Module, name: str) -> bool:
    """Return whether a parameter has no part in what the policy says and is trained for itself.

    They are the halting and drafting heads of a recursive model.
    """
    heads = ("model.halt_head.", "speculative_projs.")
    return isinstance(model, RecursiveCausalLM) and name.startswith(heads)


def _has_attention(block: nn.Module) -> bool:
    return any(re.search(r"attn|attention|mixer", name) for name, _ in block.named_children())
