"""The sampler for RecursiveCausalLM: exits that save time, and drafts that change nothing.

A row whose token exits leaves the core's batch, so that the loops it skips cost nothing. With
drafting, the speculative heads propose g tokens and one forward verifies them. Each position's
token is drawn from the target with that position's own uniform, as without drafting, and a draft
is accepted if it is that very token. An argmax draft is so accepted with the target's probability
of it, which is the rate of accept-reject sampling (2211.17192), and completions do not depend on
whether there were drafts. Log-probs are the target's.

Dims: P prompts, B rows being decoded, g drafts, T = g + 1 tokens of a block, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from operando.models.load import head_weight, lora_in_model_dtype
from operando.models.logprobs import HeadConfig, head_logits
from operando.models.prefix import Prefix
from operando.models.recursive import RecursiveCausalLM
from operando.models.recursive.cache import SlotCache
from operando.models.tokens import check_stop, completion_text
from operando.rollout.decoding import STOP_EVERY
from operando.rollout.engine import COMPACT_BELOW
from operando.rollout.kernels import pick
from operando.rollout.sampler import Request, Sampled, Sampling, finish, first_stop


@dataclass
class DecodeStats:
    """What the last `sample` call did; the prefill is not counted.

    `tried[i]` counts blocks in which draft i was looked at, because those before it were accepted.
    """

    calls: int = 0  # forwards, whatever their batch
    row_calls: int = 0  # rows of all forwards
    tokens: int = 0  # completion tokens that these forwards yielded
    loops: int = 0  # loops of the tokens that were kept
    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def plus(self, other: DecodeStats) -> DecodeStats:
        """Return the sums of two calls with the same number of drafts."""
        return DecodeStats(
            self.calls + other.calls,
            self.row_calls + other.row_calls,
            self.tokens + other.tokens,
            self.loops + other.loops,
            [a + b for a, b in zip(self.tried, other.tried, strict=True)],
            [a + b for a, b in zip(self.accepted, other.accepted, strict=True)],
        )


class Drawn(NamedTuple):
    """Tokens and log-probs, [B] or [B T]."""

    token: Int[Tensor, "*B"]
    logp: Float[Tensor, "*B"]


@dataclass
class Rows:
    """The rows still being decoded: which completion each is, and what it reads next."""

    source: list[int]
    position_B: Int[Tensor, " B"]
    hidden_BD: Float[Tensor, "B D"]
    next: Drawn
    cache: SlotCache

    def keep(self, index: Int[Tensor, " b"]) -> None:
        self.source = [self.source[i] for i in index.tolist()]
        self.position_B = self.position_B[index]
        self.hidden_BD = self.hidden_BD[index]
        self.next = Drawn(self.next.token[index], self.next.logp[index])
        self.cache.select(index)


class Written:
    """What has been written of each completion."""

    def __init__(self, num: int) -> None:
        self.ids: list[list[int]] = [[] for _ in range(num)]
        self.logps: list[list[float]] = [[] for _ in range(num)]
        self.exits: list[list[int]] = [[] for _ in range(num)]


class RecursiveEngine:
    """Samples from the live weights of a RecursiveCausalLM.

    `draft_tokens` and `halt_threshold` None mean the config's. `stats` is of the last call.

    Example: RecursiveEngine(model, tokenizer, stop_ids=(1,)).sample(request)
    """

    name = "operando"

    def __init__(
        self,
        model: RecursiveCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: tuple[int, ...],
        max_batch: int = 512,
        *,
        draft_tokens: int | None = None,
        halt_threshold: float | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.max_batch = max_batch
        self.draft_tokens = model.config.draft_tokens if draft_tokens is None else draft_tokens
        assert self.draft_tokens <= len(model.speculative_projs), self.draft_tokens
        self.halt_threshold = halt_threshold
        self.stats = DecodeStats()

    @torch.no_grad()
    def sample(self, request: Request, prefix: Prefix | None = None) -> list[Sampled]:
        """Return the completions of each prompt, siblings adjacent."""
        check_stop(self.tokenizer, self.stop_ids, request.sampling.stop)
        del prefix  # nothing below the first trained block is kept for this architecture
        g = self.draft_tokens
        self.stats = DecodeStats(tried=[0] * g, accepted=[0] * g)
        with lora_in_model_dtype(self.model):
            chunks = request.chunks(self.max_batch)
            return [one for _, chunk in chunks for one in self._sample_chunk(chunk)]

    def _sample_chunk(self, request: Request) -> list[Sampled]:
        prompts, group_size, sampling, uniforms_BT = request
        if uniforms_BT is not None:
            uniforms_BT = uniforms_BT.to(self.model.device)
        self.head = HeadConfig(sampling.temperature, None)
        self.weight_VD = head_weight(self.model)
        max_new = sampling.max_completion_length
        rows, prompt_exits = self._prefill(prompts, group_size, max_new, uniforms_BT)
        written = Written(len(rows.source))
        stop = torch.tensor(self.stop_ids, device=rows.position_B.device)
        call = 0
        while True:
            self._write(written, rows.source, rows.next, None)
            call += 1
            look = bool(sampling.stop) and call % STOP_EVERY == 0
            alive_B = torch.tensor(
                [
                    self._goes_on(written.ids[s], max_new, sampling if look else None)
                    for s in rows.source
                ],
                device=stop.device,
            )
            num_alive = int(alive_B.sum())
            if num_alive == 0:
                break
            if num_alive < COMPACT_BELOW * len(rows.source):
                rows.keep(alive_B.nonzero()[:, 0])
            self._advance(rows, written, uniforms_BT, max_new)
        done = []
        for i, ids in enumerate(written.ids):
            one = finish(
                self.tokenizer, ids[:max_new], written.logps[i][:max_new], self.stop_ids, sampling
            )
            exits = prompt_exits[i // group_size] + written.exits[i][: len(one.ids) - 1]
            done.append(one._replace(exit_loops=tuple(exits)))
        return done

    def _prefill(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        max_new: int,
        uniforms_BT: Float[Tensor, "B T"] | None,
    ) -> tuple[Rows, list[list[int]]]:
        """Run each prompt once; return the rows of all samples, and each prompt token's loops."""
        device = self.model.device
        length_P = torch.tensor([len(p) for p in prompts], device=device)
        width = int(length_P.max())
        ids_PS = torch.full((len(prompts), width), self.stop_ids[0], device=device)
        for row, prompt in enumerate(prompts):
            ids_PS[row, : len(prompt)] = torch.tensor(prompt, device=device)
        cache = SlotCache(len(self.model.model.layers), width + max_new + self.draft_tokens + 1)
        position_PS = torch.arange(width, device=device).expand_as(ids_PS)
        out = self._decoder(ids_PS, position_PS, cache)
        exits = [row[: len(p)] for row, p in zip(out.exit_loops.tolist(), prompts, strict=True)]
        hidden_PD = out.last_hidden_state[torch.arange(len(prompts)), length_P - 1]
        source_B = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
        cache.select(source_B)
        hidden_BD = hidden_PD[source_B]
        first_B = None if uniforms_BT is None else uniforms_BT[:, 0]
        drawn = Drawn(*pick(self._logits(hidden_BD), first_B))
        source = list(range(len(source_B)))
        return Rows(source, length_P[source_B], hidden_BD, drawn, cache), exits

    def _advance(
        self, rows: Rows, written: Written, uniforms_BT: Float[Tensor, "B T"] | None, max_new: int
    ) -> None:
        """Read each row's next token and its drafts; write the drafts that hold."""
        g = self.draft_tokens
        device = rows.position_B.device
        drafts = [
            self._logits(self.model.speculative_hidden(rows.hidden_BD, i + 1)).argmax(-1)
            for i in range(g)
        ]
        block_BT = torch.stack([rows.next.token, *drafts], 1)
        # Finished rows that are still in the batch go on to the cache's end and no further.
        start_B = rows.position_B.clamp(max=rows.cache.length - g - 1)
        position_BT = start_B[:, None] + torch.arange(g + 1, device=device)
        out = self._decoder(block_BT, position_BT, rows.cache)
        hidden_BTD = out.last_hidden_state
        u_N = None
        if uniforms_BT is not None:
            num = torch.tensor([len(written.ids[s]) for s in rows.source], device=device)
            at_BT = (num[:, None] + torch.arange(g + 1, device=device)).clamp(max=max_new - 1)
            u_N = uniforms_BT[torch.tensor(rows.source, device=device)].gather(1, at_BT).flatten()
        token_N, logp_N = pick(self._logits(hidden_BTD.flatten(0, 1)), u_N)
        target = Drawn(token_N.view(-1, g + 1), logp_N.view(-1, g + 1))
        holds_Bg = (block_BT[:, 1:] == target.token[:, :-1]).long().cumprod(1)
        kept_B = holds_Bg.sum(1)
        alive = [self._goes_on(written.ids[s], max_new, None) for s in rows.source]
        self._count(holds_Bg, out.exit_loops, alive)
        self._write(written, rows.source, target, kept_B)
        for source, row, kept in zip(
            rows.source, out.exit_loops.tolist(), kept_B.tolist(), strict=True
        ):
            written.exits[source] += row[: kept + 1]
        every_B = torch.arange(len(kept_B), device=device)
        rows.hidden_BD = hidden_BTD[every_B, kept_B]
        rows.next = Drawn(target.token[every_B, kept_B], target.logp[every_B, kept_B])
        rows.position_B = start_B + kept_B + 1

    def _count(
        self, holds_Bg: Int[Tensor, "B g"], exit_BT: Int[Tensor, "B T"], alive: list[bool]
    ) -> None:
        """Add a block to the statistics: of rows that had not ended before it."""
        alive_B = torch.tensor(alive, device=holds_Bg.device)
        held_bg, exit_bT = holds_Bg[alive_B], exit_BT[alive_B]
        self.stats.calls += 1
        self.stats.row_calls += len(held_bg)
        self.stats.tokens += len(held_bg) + int(held_bg.sum())
        read_bT = torch.cat([torch.ones_like(exit_bT[:, :1]), held_bg], 1)
        self.stats.loops += int((exit_bT * read_bT).sum())
        for i in range(self.draft_tokens):
            self.stats.tried[i] += int(read_bT[:, i].sum())
            self.stats.accepted[i] += int(held_bg[:, i].sum())

    def _write(
        self, written: Written, sources: list[int], drawn: Drawn, kept_B: Tensor | None
    ) -> None:
        """Append one drawn token per row, or the first `kept` of a block."""
        tokens, logps = drawn.token.tolist(), drawn.logp.tolist()
        for b, source in enumerate(sources):
            if kept_B is None:
                written.ids[source].append(tokens[b])
                written.logps[source].append(logps[b])
            else:
                kept = int(kept_B[b])
                written.ids[source] += tokens[b][:kept]
                written.logps[source] += logps[b][:kept]

    def _goes_on(self, ids: list[int], max_new: int, look_for: Sampling | None) -> bool:
        """Return whether a completion has neither ended nor reached its length."""
        if len(ids) >= max_new or any(token in self.stop_ids for token in ids):
            return False
        if look_for is None:
            return True
        tail = (self.draft_tokens + 1) * STOP_EVERY + max(len(s) for s in look_for.stop)
        return first_stop(completion_text(self.tokenizer, ids[-tail:]), look_for.stop) is None

    def _decoder(self, ids_BT: Tensor, position_BT: Tensor, cache: SlotCache):
        return self.model.model(
            input_ids=ids_BT,
            position_ids=position_BT,
            cache=cache,
            halt_threshold=self.halt_threshold,
        )

    def _logits(self, hidden_ND: Tensor) -> Float[Tensor, "N V"]:
        return head_logits(hidden_ND, self.weight_VD, self.head)
