"""What a scoring pass of the policy says, and what it is asked to read inside the model.

Dims: B rows of a batch, n some of them, T completion tokens, b packs, S pack length, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from operando.models.packing import Pack, Packed
from operando.models.prefix import Prefix
from operando.types import Batch, Trace


class Scored(NamedTuple):
    """Log-probs, entropy and values (None without a value head) of some rows, differentiable.

    `credit_BT`, with credit by loop, is what the ratio is of in place of the log-probs.
    """

    logp_BT: Float[Tensor, "B T"]
    entropy_BT: Float[Tensor, "B T"]
    value_BT: Float[Tensor, "B T"] | None
    credit_BT: Float[Tensor, "B T"] | None = None


class Scoring(NamedTuple):
    """A scoring pass: the trace, and what of it the update can use again.

    `graph` is the autograd graph of the whole batch where it was kept, `prefix` the hidden states
    below the first trained block where there is something frozen below.
    """

    trace: Trace
    graph: Scored | None
    prefix: Prefix | None


class Tap(NamedTuple):
    """What is read inside the model at the completion tokens: a site, and what is kept of it.

    `read` turns the activations of N tokens [N D] into what is kept of them [N F].

    Example: Tap("blocks.3.hook_resid_post", lambda x_ND: x_ND[:, :1])
    """

    site: str
    read: Callable[[Tensor], Tensor]


def whole_site(site: str) -> Tap:
    """Return a tap that keeps the activations of a site as they are."""
    return Tap(site, lambda x_ND: x_ND)


def flat_rows(packs: Sequence[Pack]) -> list[int]:
    """Return the rows of all packs in order."""
    return [row for pack in packs for row in pack]


class Said:
    """What a scoring pass says of a batch, on the CPU; rows that are not scored stay zero."""

    def __init__(self, batch: Batch, values: bool, credit: bool, reference: bool) -> None:
        self.batch = batch
        self.logp_BT, self.entropy_BT = (torch.zeros(batch.mask_BT.shape) for _ in range(2))
        self.ref_logp_BT, self.value_BT, self.credit_BT = (
            torch.zeros(batch.mask_BT.shape) if there else None
            for there in (reference, values, credit)
        )
        self.acts: dict[str, Tensor] = {}
        self.base_acts: dict[str, Tensor] = {}

    def put(
        self, scored: Scored, ref_logp_nT: Float[Tensor, "n T"] | None, rows: Sequence[int]
    ) -> None:
        """Take in the log-probs, entropy, values and credit of some rows."""
        for into_BT, part_nT in (
            (self.logp_BT, scored.logp_BT),
            (self.entropy_BT, scored.entropy_BT),
            (self.ref_logp_BT, ref_logp_nT),
            (self.value_BT, scored.value_BT),
            (self.credit_BT, scored.credit_BT),
        ):
            if into_BT is not None and part_nT is not None:
                into_BT[rows] = part_nT.detach().cpu()

    def put_acts(
        self,
        taps: Mapping[str, Tap],
        seen: Mapping[str, Float[Tensor, "b S D"]],
        base_seen: Mapping[str, Float[Tensor, "b S D"]] | None,
        packed: Packed,
        rows: Sequence[int],
    ) -> None:
        """Take in what the taps read of some rows, in the policy and in the frozen base."""
        row_N = torch.tensor(rows)[packed.row_N.cpu()]
        for acts, model_seen in ((self.acts, seen), (self.base_acts, base_seen)):
            if model_seen is None:
                continue
            for name, tap in taps.items():
                x_ND = model_seen[tap.site].detach()[packed.pack_N, packed.at_N]
                with torch.no_grad():
                    kept_NF = tap.read(x_ND).float().cpu()
                if name not in acts:
                    acts[name] = torch.zeros(*self.batch.mask_BT.shape, kept_NF.shape[-1])
                acts[name][row_N, packed.t_N.cpu()] = kept_NF

    def trace(self) -> Trace:
        """Return it all as a trace."""
        return Trace(
            self.logp_BT,
            self.entropy_BT,
            self.ref_logp_BT,
            self.value_BT,
            self.acts,
            self.base_acts,
            self.credit_BT,
        )
