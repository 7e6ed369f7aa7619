"""Two models decoded side by side: what one writes where it is given tokens of the other.

Both read every token that is written, so at each place both say what they would write next.

Dims: B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from operando.models.caches import CACHE
from operando.models.load import lora_in_model_dtype, stop_ids
from operando.rollout.greedy_eval import grade
from operando.rollout.kernels import pick
from operando.rollout.sampler import Sampled, Sampling, as_rollouts, finish, uniform_streams
from operando.run import SeedTree
from operando.tasks.base import Task
from operando.types import Prompt

ROWS = 64  # answers decoded at once, by both models
TRIED = 12  # constant tokens tried, and constant prefixes
LONGEST_PREFIX = 4
MOST_FORCED = 8  # tokens of an answer that the search for a constant one looks at

Kind = Literal["none", "other", "next_best", "random", "constant"]


@dataclass(frozen=True)
class Edit:
    """What is written in the place of the decoding model's own tokens.

    other: the other model's token at the first `k` places where it is another.
    next_best: at those places, the model's best token that is neither's first choice.
    random: that token at the given places of each answer.
    constant: these tokens from `place` on, in every answer.

    Example: Edit("constant", place=1, ids=(220,))
    """

    kind: Kind = "none"
    k: int = 0
    places: tuple[frozenset[int], ...] = ()
    place: int = 0
    ids: tuple[int, ...] = ()


@dataclass
class Decoded:
    """The answers of all prompts, and of each the places and tokens that were forced.

    `kl`, `flip` and `rank` are taken where asked: KL(other || own) in nats at every position,
    whether the models' first choices differ, and the rank of the other's in this model's where
    they do (1 is the first).
    """

    answers: list[Sampled] = field(default_factory=list)
    forced: list[list[tuple[int, int]]] = field(default_factory=list)
    kl: list[list[float]] = field(default_factory=list)
    flip: list[list[bool]] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)


class Choice(NamedTuple):
    """The next token of this model, of the other, and the best one that is neither."""

    own_B: Int[Tensor, " B"]
    other_B: Int[Tensor, " B"]
    next_best_B: Int[Tensor, " B"]


@dataclass(frozen=True)
class Pair:
    """Two models on one task, decoded token by token. Both read every token that is written."""

    base: PreTrainedModel
    trained: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    sampling: Sampling
    greedy: bool
    seed: int

    def right(self, prompts: Sequence[Prompt], decoded: Decoded) -> list[bool]:
        """Return which answers the task's verifier takes."""
        rollouts = as_rollouts(prompts, range(len(prompts)), 1, decoded.answers)
        return [one.verdict.correct for one in grade(self.task, rollouts)]

    def search(self, prompts: Sequence[Prompt]) -> tuple[tuple[Edit, int] | None, ...]:
        """Return the constant token and the constant prefix that help the base most on these
        problems, each with the number of those tried: what the trained model forces most often,
        and what its answers begin with most often."""
        forced = self.decode(prompts, "base", Edit("other", MOST_FORCED)).forced
        common = Counter(event for row in forced for event in row).most_common(TRIED)
        tokens = [Edit("constant", place=place, ids=(token,)) for (place, token), _ in common]
        answers = [one.ids for one in self.decode(prompts, "trained", Edit()).answers]
        prefixes = [
            Edit("constant", ids=ids)
            for m in range(1, LONGEST_PREFIX + 1)
            for ids, _ in Counter(a[:m] for a in answers if len(a) > m).most_common(
                TRIED // LONGEST_PREFIX
            )
        ]
        return self._best(prompts, tokens), self._best(prompts, prefixes)

    def _best(self, prompts: Sequence[Prompt], edits: list[Edit]) -> tuple[Edit, int] | None:
        if not edits:
            return None
        score = {e: sum(self.right(prompts, self.decode(prompts, "base", e))) for e in edits}
        return max(edits, key=lambda edit: score[edit]), len(edits)

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Prompt],
        driver: Literal["base", "trained"],
        edit: Edit,
        measured: bool = False,
    ) -> Decoded:
        """Return the answers of one model under an edit; `measured`: with KL, flips and ranks."""
        own, other = self.base, self.trained
        if driver == "trained":
            own, other = other, own
        decoded = Decoded()
        for at in range(0, len(prompts), ROWS):
            rows = range(at, min(at + ROWS, len(prompts)))
            uniforms_BT = None
            if not self.greedy:
                length = self.sampling.max_completion_length
                uniforms_BT = uniform_streams(SeedTree(self.seed), 0, rows, 1, length)
            self._decode_rows(
                [prompts[r].ids for r in rows],
                rows,
                own,
                other,
                edit,
                measured,
                uniforms_BT,
                decoded,
            )
        return decoded

    def _decode_rows(
        self,
        prompts: Sequence[Sequence[int]],
        rows: range,
        own: PreTrainedModel,
        other: PreTrainedModel,
        edit: Edit,
        measured: bool,
        uniforms_BT: Float[Tensor, "B T"] | None,
        decoded: Decoded,
    ) -> None:
        tokenizer, device = self.tokenizer, own.device
        stops = stop_ids(own, tokenizer)
        stop_S = torch.tensor(stops, device=device)
        reader = Reader(own, prompts, stops[0])
        asked = Reader(other, prompts, stops[0]) if needs_other(edit) else None
        num = len(prompts)
        ids: list[list[int]] = [[] for _ in range(num)]
        forced: list[list[tuple[int, int]]] = [[] for _ in range(num)]
        kl: list[list[float]] = [[] for _ in range(num)]
        flip: list[list[bool]] = [[] for _ in range(num)]
        forced_B = torch.zeros(num, dtype=torch.long, device=device)
        alive_B = torch.ones(num, dtype=torch.bool, device=device)
        with ExitStack() as stack:
            for model in (own, other):
                stack.enter_context(lora_in_model_dtype(model))
            token_B = None
            for t in range(self.sampling.max_completion_length):
                own_BV = reader.read(token_B)
                other_BV = own_BV if asked is None else asked.read(token_B)
                u_B = None if uniforms_BT is None else uniforms_BT[:, t].to(device)
                choice = self._choose(own_BV, other_BV, u_B)
                token_B, here_B = written(edit, t, choice, forced_B, rows)
                here_B &= alive_B
                if measured:
                    self._measure(own_BV, other_BV, alive_B, kl, flip, decoded.rank)
                for b in alive_B.nonzero().flatten().tolist():
                    ids[b].append(int(token_B[b]))
                    if here_B[b]:
                        forced[b].append((t, int(token_B[b])))
                forced_B += here_B
                alive_B &= ~torch.isin(token_B, stop_S)
                if not bool(alive_B.any()):
                    break
        zeros = [[0.0] * len(row) for row in ids]
        decoded.answers += [
            finish(tokenizer, row, zero, stops, self.sampling)
            for row, zero in zip(ids, zeros, strict=True)
        ]
        decoded.forced += forced
        decoded.kl += kl
        decoded.flip += flip

    def _choose(
        self,
        own_BV: Float[Tensor, "B V"],
        other_BV: Float[Tensor, "B V"],
        u_B: Float[Tensor, " B"] | None,
    ) -> Choice:
        temperature = self.sampling.temperature
        own_B, _ = pick(own_BV, u_B, temperature)
        other_B, _ = pick(other_BV, u_B, temperature)
        top_B3 = own_BV.topk(3, dim=-1).indices
        taken_B3 = (top_B3 == own_B[:, None]) | (top_B3 == other_B[:, None])
        place_B1 = (~taken_B3).int().argmax(1, keepdim=True)  # the first that is neither
        return Choice(own_B, other_B, top_B3.gather(1, place_B1)[:, 0])

    @staticmethod
    def _measure(
        own_BV: Float[Tensor, "B V"],
        other_BV: Float[Tensor, "B V"],
        alive_B: Bool[Tensor, " B"],
        kl: list[list[float]],
        flip: list[list[bool]],
        rank: list[int],
    ) -> None:
        own_bV, other_bV = own_BV[alive_B].float(), other_BV[alive_B].float()
        log_p_bV, log_q_bV = other_bV.log_softmax(-1), own_bV.log_softmax(-1)
        kl_b = (log_p_bV.exp() * (log_p_bV - log_q_bV)).sum(-1)
        best_b = other_bV.argmax(-1)
        flip_b = best_b != own_bV.argmax(-1)
        rank_b = (own_bV > own_bV.gather(1, best_b[:, None])).sum(-1) + 1
        for i, b in enumerate(alive_B.nonzero().flatten().tolist()):
            kl[b].append(float(kl_b[i]))
            flip[b].append(bool(flip_b[i]))
        rank += rank_b[flip_b].tolist()


def needs_other(edit: Edit) -> bool:
    """Return whether the edit asks the other model."""
    return edit.kind in ("other", "next_best")


def written(
    edit: Edit, t: int, choice: Choice, forced_B: Int[Tensor, " B"], rows: range
) -> tuple[Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """Return what each row writes at place t, and where that is forced; `rows` numbers them."""
    own_B, other_B, next_best_B = choice
    nowhere_B = torch.zeros_like(own_B, dtype=torch.bool)
    match edit.kind:
        case "none":
            return own_B, nowhere_B
        case "other" | "next_best":
            here_B = (own_B != other_B) & (forced_B < edit.k)
            put_B = other_B if edit.kind == "other" else next_best_B
            return torch.where(here_B, put_B, own_B), here_B
        case "random":
            here_B = torch.tensor([t in edit.places[row] for row in rows], device=own_B.device)
            return torch.where(here_B, next_best_B, own_B), here_B
        case "constant":
            if not edit.place <= t < edit.place + len(edit.ids):
                return own_B, nowhere_B
            return torch.full_like(own_B, edit.ids[t - edit.place]), ~nowhere_B


class Reader:
    """A model that reads prompts, and then one token per row at a time."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int) -> None:
        self.model = model
        width = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), width), pad)
        self.mask_BT = torch.zeros(len(prompts), width, dtype=torch.long)
        for b, prompt in enumerate(prompts):  # on the right, so that all end together
            ids_BT[b, width - len(prompt) :] = torch.tensor(prompt)
            self.mask_BT[b, width - len(prompt) :] = 1
        self.ids_BT, self.mask_BT = ids_BT.to(model.device), self.mask_BT.to(model.device)
        self.cache = DynamicCache(config=model.config)

    def read(self, token_B: Int[Tensor, " B"] | None) -> Float[Tensor, "B V"]:
        """Return the logits after the prompts (None), or after one more token of each row."""
        ids_BT = self.ids_BT
        if token_B is not None:
            ids_BT = token_B[:, None]
            self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(ids_BT)], 1)
        position_BT = (self.mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        out = self.model(
            input_ids=ids_BT,
            attention_mask=self.mask_BT,
            position_ids=position_BT,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: self.cache},
        )
        return out.logits[:, -1]
