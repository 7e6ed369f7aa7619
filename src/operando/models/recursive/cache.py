"""SlotCache: keys and values by position, so that rows of a batch may stand at different lengths.

A token's slot is its position. Taking tokens back means to go on from an earlier position: what
lies beyond is written again before anything looks at it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SlotCache:
    """Caches of every layer, [B K S d] each; prelude, core (expanded) and coda in that order.

    Example:
        cache = SlotCache(num_layers=10, length=128)
        model(input_ids=ids_BT, position_ids=position_BT, cache=cache)
    """

    def __init__(self, num_layers: int, length: int) -> None:
        self.length = length
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.position_BT = torch.zeros(1, 1, dtype=torch.long)
        self.end = 0

    def begin(self, position_BT: Int[Tensor, "B T"]) -> None:
        """Say where the next tokens stand."""
        self.position_BT = position_BT
        self.end = int(position_BT.max()) + 1
        assert self.end <= self.length, f"position {self.end - 1} in a cache of {self.length}"

    def update(
        self, key_BKTd: Float[Tensor, "B K T d"], value_BKTd: Float[Tensor, "B K T d"], layer: int
    ) -> tuple[Float[Tensor, "B K S d"], Float[Tensor, "B K S d"]]:
        """Write the new tokens' keys and values; return those of every position so far."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            B, K, _, d = key_BKTd.shape
            keys = key_BKTd.new_zeros(B, K, self.length, d)
            values = value_BKTd.new_zeros(B, K, self.length, d)
            self.keys[layer], self.values[layer] = keys, values
        row_B1 = torch.arange(len(self.position_BT), device=keys.device)[:, None]
        keys[row_B1, :, self.position_BT] = key_BKTd.transpose(1, 2)
        values[row_B1, :, self.position_BT] = value_BKTd.transpose(1, 2)
        return keys[:, :, : self.end], values[:, :, : self.end]

    def select(self, index_b: Int[Tensor, " b"]) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        self.keys = [None if x is None else x[index_b] for x in self.keys]
        self.values = [None if x is None else x[index_b] for x in self.values]
