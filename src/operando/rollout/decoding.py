"""The completions being decoded: what each row reads next, its cache, and what has been drawn.

Dims: N completions, B rows still being decoded, K key-value heads, S cache length, d head size,
T new tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from operando.models.tokens import completion_text
from operando.rollout.kernels import pick
from operando.rollout.sampler import Request, Sampled, finish, first_stop

FIRST_TOKENS = 16  # room for this many new tokens at first; it doubles when it is full
STOP_EVERY = 8  # decoded steps between looks for stop texts, and on CUDA for ended rows


@dataclass
class Written:
    """What has been drawn, of all N completions: it stays on the device until the end."""

    ids_NT: Int[Tensor, "N T"]
    logp_NT: Float[Tensor, "N T"]
    below_NTD: Float[Tensor, "N T D"] | None  # residual at the input of the first trained block
    uniforms_NT: Float[Tensor, "N T"] | None
    at_1: Int[Tensor, " 1"]  # the place of the next token
    stop_S: Int[Tensor, " S"]  # the ids that end a completion
    drawn_N: Int[Tensor, " N"]  # tokens drawn until the row left, or the loop ended


@dataclass
class Rows:
    """The rows still being decoded; `source` says which completion each row is.

    A step changes the tensors in place, so that a captured step finds them where they were.
    """

    source_B: Int[Tensor, " B"]
    position_B: Int[Tensor, " B"]
    token_B: Int[Tensor, " B"]
    alive_B: Bool[Tensor, " B"]
    keys: list[Float[Tensor, "B K S d"]]
    values: list[Float[Tensor, "B K S d"]]

    def keep(self, index: Int[Tensor, " b"]) -> None:
        self.source_B, self.position_B = self.source_B[index], self.position_B[index]
        self.token_B, self.alive_B = self.token_B[index], self.alive_B[index]
        for caches in (self.keys, self.values):  # layer by layer: never two whole caches
            for layer, cache in enumerate(caches):
                caches[layer] = cache[index]

    def make_room(self, length: int) -> None:
        """Give the caches this many positions."""
        for caches in (self.keys, self.values):
            for layer, cache in enumerate(caches):
                caches[layer] = F.pad(cache, (0, 0, 0, length - cache.shape[2]))


@dataclass
class Decoding:
    """One chunk's completions on their way. `longest` is the longest prompt's length."""

    rows: Rows
    written: Written
    request: Request
    tokenizer: PreTrainedTokenizerBase
    longest: int

    @property
    def room(self) -> int:
        """The positions that the caches have."""
        return self.rows.keys[0].shape[2]

    @property
    def most(self) -> int:
        """The positions that the longest completion can reach."""
        return self.longest + self.request.sampling.max_completion_length

    def draw(self, logits_BV: Float[Tensor, "B V"]) -> None:
        """Draw each row's next token and write it down."""
        rows, written, u_B = self.rows, self.written, None
        if written.uniforms_NT is not None:
            u_B = written.uniforms_NT[rows.source_B, written.at_1]
        token_B, logp_B = pick(logits_BV, u_B, self.request.sampling.temperature)
        written.ids_NT[rows.source_B, written.at_1] = token_B
        written.logp_NT[rows.source_B, written.at_1] = logp_B
        written.at_1 += 1
        rows.token_B.copy_(token_B)
        rows.alive_B &= (token_B[:, None] != written.stop_S).all(1)

    def read(self, below_BD: Float[Tensor, "B D"]) -> None:
        """Go one position on; keep what was below the first trained block at the one just read."""
        if self.written.below_NTD is not None:
            self.written.below_NTD[self.rows.source_B, self.written.at_1 - 1] = below_BD
        self.rows.position_B += 1

    def end_at_stop_texts(self, drawn: int) -> None:
        """End the rows that hold a stop text among their last tokens, every STOP_EVERY tokens."""
        stop = self.request.sampling.stop
        if not stop or drawn % STOP_EVERY:
            return
        tail = STOP_EVERY + max(len(s) for s in stop)
        ids_BT = self.written.ids_NT[self.rows.source_B, max(0, drawn - tail) : drawn]
        texts = (completion_text(self.tokenizer, ids) for ids in ids_BT.tolist())
        clear = [first_stop(text, stop) is None for text in texts]
        self.rows.alive_B &= torch.tensor(clear, device=self.rows.alive_B.device)

    def compact(self, drawn: int, below: float) -> bool:
        """Take ended rows out if fewer than this share are alive; return whether that changed
        the buffers. Where none is alive all leave."""
        rows, num_alive = self.rows, int(self.rows.alive_B.sum())
        if num_alive and num_alive >= below * len(rows.source_B):
            return False
        self.written.drawn_N[rows.source_B[~rows.alive_B]] = drawn
        rows.keep(rows.alive_B.nonzero()[:, 0])
        return True

    def grow(self, drawn: int) -> bool:
        """Give the caches room for the next token, and for as many again as they had; return
        whether that changed the buffers."""
        if self.longest + drawn <= self.room:
            return False
        self.rows.make_room(min(2 * self.room - self.longest, self.most))
        return True

    def completions(self, stop_ids: tuple[int, ...]) -> list[Sampled]:
        """Return what was written, each cut after its end."""
        written = self.written
        columns = (written.ids_NT.tolist(), written.logp_NT.tolist(), written.drawn_N.tolist())
        return [
            finish(self.tokenizer, ids[:drawn], logp[:drawn], stop_ids, self.request.sampling)
            for ids, logp, drawn in zip(*columns, strict=True)
        ]
