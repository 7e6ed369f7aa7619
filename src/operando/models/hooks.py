"""ActivationReader: activations at named sites, on exactly the ids that were run.

Sites are named as in TransformerLens: "blocks.3.hook_resid_pre", "blocks.3.hook_resid_post",
"blocks.3.hook_attn_out", "blocks.3.hook_mlp_out".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from operando.errors import UserError, nearest
from operando.models.layers import decoder_blocks

KINDS = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


class ActivationReader:
    """Reads sites during one forward.

    The hooks live only inside `reading()`, and only the first call of each site counts, so that the
    recomputation of gradient checkpointing adds nothing.

    Example:
        reader = ActivationReader(model, ["blocks.3.hook_resid_post"])
        with reader.reading() as acts:
            model(input_ids=ids)
        acts["blocks.3.hook_resid_post"]  # [B S D]
    """

    def __init__(self, model: nn.Module, sites: Sequence[str]) -> None:
        self.modules = {site: _module_at(model, site) for site in sites}

    @contextmanager
    def reading(self) -> Iterator[dict[str, Float[Tensor, "B S D"]]]:
        acts: dict[str, Float[Tensor, "B S D"]] = {}
        handles = []
        try:
            for site, module in self.modules.items():
                if site.endswith("hook_resid_pre"):
                    hook = module.register_forward_pre_hook(_pre_hook(acts, site), with_kwargs=True)
                else:
                    hook = module.register_forward_hook(_post_hook(acts, site))
                handles.append(hook)
            yield acts
        finally:
            for handle in handles:
                handle.remove()


def _pre_hook(acts: dict[str, Tensor], site: str) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        resid = args[0] if args else kwargs["hidden_states"]
        assert isinstance(resid, Tensor), type(resid)
        acts.setdefault(site, resid)

    return hook


def _post_hook(acts: dict[str, Tensor], site: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: object, output: object) -> None:
        resid = output[0] if isinstance(output, tuple) else output
        assert isinstance(resid, Tensor), type(resid)
        acts.setdefault(site, resid)

    return hook


def _module_at(model: nn.Module, site: str) -> nn.Module:
    found = re.fullmatch(r"blocks\.(\d+)\.(\w+)", site)
    if found is None or found[2] not in KINDS:
        hint = nearest(site.rpartition(".")[2], KINDS)
        raise UserError(f"site {site!r}: expected blocks.N.KIND, KIND in {', '.join(KINDS)}.{hint}")
    _, blocks = decoder_blocks(model)
    index = int(found[1])
    if index >= len(blocks):
        raise UserError(f"site {site!r}: the model has blocks 0-{len(blocks) - 1}")
    block = blocks[index]
    match found[2]:
        case "hook_attn_out":
            return _child(block, r"attn|attention", site)
        case "hook_mlp_out":
            return _child(block, r"mlp|feed_forward|ffn", site)
        case _:
            return block


def _child(block: nn.Module, pattern: str, site: str) -> nn.Module:
    for name, child in block.named_children():
        if re.search(pattern, name) and "norm" not in name:
            return child
    names = [name for name, _ in block.named_children()]
    raise UserError(f"site {site!r}: the block has no such part, only {names}")
