"""Frozen-prefix reuse: what lies below the first trained block is computed once a rollout batch.

Below that block the policy of every optimizer step and the reference are one and the same network,
so its hidden states serve the old, the reference and all new log-probs of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn

from operando.models.packing import Pack, pack_length
from operando.types import Batch


class Prefix:
    """Hidden states at the input of block `first`, by group and by row, however rows are packed.

    They are kept from the sampler, which computes them anyway, or from the first scoring pass.
    `first_group` is the batch's group that the sampler's first prompt becomes.

    Example:
        prefix = Prefix(first=24)
        prefix.store(batch, packs, hidden_bSD)
        with starting_at(blocks, 24, prefix.packed(batch, packs)):
            model(...)
    """

    def __init__(self, first: int, first_group: int = 0) -> None:
        self.first = first
        self.first_group = first_group
        self.prompts: dict[int, Float[Tensor, "p D"]] = {}
        self.rows: dict[int, Float[Tensor, "n D"]] = {}

    def store(
        self, batch: Batch, packs: Sequence[Pack], hidden_bSD: Float[Tensor, "b S D"]
    ) -> None:
        """Keep the hidden states of packs."""
        for hidden_SD, pack in zip(hidden_bSD.detach(), packs, strict=True):
            at = int(batch.prompt_len_B[pack[0]])
            self.prompts[pack[0] // batch.group_size] = hidden_SD[:at]
            for row in pack:
                length = int(batch.mask_BT[row].sum())
                self.rows[row] = hidden_SD[at : at + length]
                at += length

    def packed(self, batch: Batch, packs: Sequence[Pack]) -> Float[Tensor, "b S D"]:
        """Return the hidden states of packs as the model would have them; zero on padding."""
        width = max(pack_length(batch, pack) for pack in packs)
        some = self.rows[packs[0][0]]
        hidden_bSD = some.new_zeros(len(packs), width, some.shape[1])
        for hidden_SD, pack in zip(hidden_bSD, packs, strict=True):
            parts = [self.prompts[pack[0] // batch.group_size], *(self.rows[row] for row in pack)]
            at = 0
            for part in parts:
                hidden_SD[at : at + len(part)] = part
                at += len(part)
        return hidden_bSD


@contextmanager
def starting_at(
    blocks: Sequence[nn.Module], first: int, hidden_bSD: Float[Tensor, "b S D"]
) -> Iterator[None]:
    """Let a forward begin at block `first` with these hidden states; the blocks below do nothing.

    The last block below returns the hidden states, so that block `first` reads them as its input
    and gradient checkpointing recomputes it from them.
    """
    below = [*blocks[:first]]
    try:
        for block in below[:-1]:
            block.forward = _pass_on
        below[-1].forward = _give(hidden_bSD)
        yield
    finally:
        for block in below:
            block.__dict__.pop("forward", None)


def _pass_on(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states


def _give(hidden_bSD: Tensor) -> Callable[..., Tensor]:
    return lambda *_, **__: hidden_bSD
