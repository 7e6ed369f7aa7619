"""Interventions in the residual stream along directions, as hooks on decoder blocks.

Shape legend: k directions (orthonormal rows), D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Change = Callable[[Tensor], Tensor]


def suppress(h: Float[Tensor, "*b D"], v_kD: Float[Tensor, "k D"]) -> Float[Tensor, "*b D"]:
    """Return h - max(<h, v>, 0) v: what points along v is taken out, what points away stays."""
    along = (h.float() @ v_kD.T).clamp(min=0)
    return (h.float() - along @ v_kD).to(h.dtype)


def ablate(h: Float[Tensor, "*b D"], v_kD: Float[Tensor, "k D"]) -> Float[Tensor, "*b D"]:
    """Return h - V^T V h: nothing is left along v."""
    return (h.float() - (h.float() @ v_kD.T) @ v_kD).to(h.dtype)


def change_for(kind: Literal["suppress", "ablate"], v_kD: Float[Tensor, "k D"]) -> Change:
    """Return the change that a recipe names, with its directions."""
    if kind == "suppress":
        return lambda h: suppress(h, v_kD)
    return lambda h: ablate(h, v_kD)


@dataclass
class Switch:
    """Whether the hooks act. Example: with switch.set(True): model.generate(...)"""

    on: bool = True
    handles: list[RemovableHandle] = field(default_factory=list, repr=False)

    @contextmanager
    def set(self, on: bool) -> Iterator[None]:
        """Switch the hooks on or off for a while."""
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before

    def remove(self) -> None:
        """Take the hooks off the blocks."""
        for handle in self.handles:
            handle.remove()


def hook_blocks(blocks: nn.ModuleList, layers: Sequence[int], change: Change) -> Switch:
    """Change the output of these blocks from now on, wherever the switch is on."""
    switch = Switch()

    def hook(_module: nn.Module, _args: object, output: object) -> object:
        if not switch.on:
            return None
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        assert isinstance(output, Tensor), type(output)
        return change(output)

    switch.handles += [blocks[layer].register_forward_hook(hook) for layer in layers]
    return switch
