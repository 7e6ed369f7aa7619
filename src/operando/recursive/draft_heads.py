"""The speculative heads of a recursive model: fitted with the policy frozen, and how many to use.

Head i at a token that predicts token t predicts token t + i, by what the model itself wrote there:
logits_i = head(h + silu(P_i h + b_i)), cross-entropy in float32 on the model's own completions.
Drafts never change what is written (rollout/recursive.py), so heads can only be slow, not wrong.

Dims: N tokens that predict, D d_model, V vocabulary, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from operando.models.load import head_weight
from operando.models.recursive import RecursiveCausalLM
from operando.recursive.data import Race, Source, Texts, complete, plain_engine, race
from operando.rollout.sampler import Sampled
from operando.run import SeedTree
from operando.types import Prompt

NONE = -100  # a place that a head has no target at: the completion is over
ROWS = 512  # tokens of a step
Progress = Callable[[int, int], None]


class Places(NamedTuple):
    """Final states of the tokens that predict, and what head i should say there or NONE."""

    h_ND: Float[Tensor, "N D"]
    target_NH: Int[Tensor, "N H"]
    token_N: Int[Tensor, " N"]  # the token itself, for the control that sees nothing else


class HeadScore(NamedTuple):
    """One head on other texts. `loss` is the cross-entropy in nats.

    `table` is the accuracy of the control: the commonest token i + 1 places after this one.
    """

    loss: float
    top1: float
    table: float
    n: int


class Drafted(NamedTuple):
    """What drafting did to some prompts: acceptance of each draft that was looked at."""

    accepted: Sequence[int]
    tried: Sequence[int]
    tokens_per_call: float


# --- what the heads learn from -------------------------------------------------------------------


@torch.no_grad()
def collect_places(model: RecursiveCausalLM, texts: Texts) -> Places:
    """Return states and targets, with the exits that the model's config asks for."""
    heads = len(model.speculative_projs)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for part in texts.parts():
        hidden_NSD = model.model(input_ids=part.ids_NS, use_cache=False).last_hidden_state
        at = part.predicts_NS
        targets_NSH = torch.stack([targets_of(part, i + 1) for i in range(heads)], -1)
        found.append((hidden_NSD[at], targets_NSH[at], part.ids_NS[at]))
    return Places(*(torch.cat(x) for x in zip(*found, strict=True)))


def targets_of(texts: Texts, head: int) -> Int[Tensor, "N S"]:
    """Return the token head + 1 places on, or NONE where the text is over by then."""
    shift = head + 1
    target_NS = torch.full_like(texts.ids_NS, NONE)
    # The token at p + shift is real if the one before it was read.
    real_NS = texts.read_NS[:, shift - 1 : -1]
    target_NS[:, :-shift] = torch.where(real_NS, texts.ids_NS[:, shift:], NONE)
    return target_NS


# --- fitting -------------------------------------------------------------------------------------


@torch.no_grad()
def forget_heads(model: RecursiveCausalLM) -> None:
    """Set the heads to zero: each then proposes the next token's own argmax."""
    for proj in model.speculative_projs:
        for parameter in proj.parameters():
            parameter.zero_()


def fit_heads(
    model: RecursiveCausalLM,
    places: Places,
    epochs: int,
    lr: float,
    seed: int,
    on_progress: Progress = lambda _done, _of: None,
) -> None:
    """Train the heads by AdamW with a linear decay; the order of tokens is the seed's."""
    heads = model.speculative_projs
    heads.requires_grad_(True)
    weight_VD = head_weight(model).detach()
    search = torch.optim.AdamW(heads.parameters(), lr=lr, weight_decay=0.0)
    count = len(places.h_ND)
    steps = epochs * -(-count // ROWS)
    generator = SeedTree(seed).generator("drafting", "order")
    done = 0
    for _ in range(epochs):
        for index in torch.randperm(count, generator=generator).split(ROWS):
            for group in search.param_groups:
                group["lr"] = lr * (1 - done / steps)
            h_ND, target_NH = places.h_ND[index], places.target_NH[index]
            losses = [
                _loss(model, weight_VD, h_ND, target_NH[:, i], i + 1) for i in range(len(heads))
            ]
            loss = torch.stack(losses).sum()
            if not bool(loss.detach().isfinite()):
                raise FloatingPointError(f"draft heads, step {done + 1}: the loss is not finite")
            search.zero_grad(set_to_none=True)
            loss.backward()
            search.step()
            done += 1
            on_progress(done, steps)
    heads.requires_grad_(False)
    heads.zero_grad(set_to_none=True)


def _logits(model: RecursiveCausalLM, weight_VD: Tensor, h_ND: Tensor, head: int) -> Tensor:
    return F.linear(model.speculative_hidden(h_ND, head), weight_VD).float()


def _loss(
    model: RecursiveCausalLM, weight_VD: Tensor, h_ND: Tensor, target_N: Tensor, head: int
) -> Tensor:
    """Return the mean cross-entropy where there is a target; 0 where there is none at all."""
    has_N = target_N != NONE
    logits = _logits(model, weight_VD, h_ND[has_N], head)
    loss = F.cross_entropy(logits, target_N[has_N], reduction="sum")
    return loss / max(1, int(has_N.sum()))


# --- how good the heads are ----------------------------------------------------------------------


@torch.no_grad()
def score_heads(model: RecursiveCausalLM, fit: Places, other: Places) -> list[HeadScore]:
    """Return each head's loss and accuracy on `other`; the table control is made from `fit`."""
    weight_VD = head_weight(model)
    scores = []
    for i in range(len(model.speculative_projs)):
        has_N = other.target_NH[:, i] != NONE
        target_N = other.target_NH[has_N, i]
        logits_NV = _logits(model, weight_VD, other.h_ND[has_N], i + 1)
        table_V = commonest(fit.token_N, fit.target_NH[:, i], len(weight_VD))
        scores.append(
            HeadScore(
                float(F.cross_entropy(logits_NV, target_N)),
                float((logits_NV.argmax(-1) == target_N).float().mean()),
                float((table_V[other.token_N[has_N]] == target_N).float().mean()),
                len(target_N),
            )
        )
    return scores


def commonest(
    token_N: Int[Tensor, " N"], target_N: Int[Tensor, " N"], vocab: int
) -> Int[Tensor, " V"]:
    """Return for each token its commonest target; NONE for a token without one."""
    has_N = target_N != NONE
    pairs, counts = torch.stack([token_N[has_N], target_N[has_N]]).unique(dim=1, return_counts=True)
    order = counts.argsort(stable=True)  # the commonest is written last
    table_V = torch.full((vocab,), NONE, device=token_N.device)
    for token, target in pairs[:, order].T.tolist():
        table_V[token] = target
    return table_V


# --- drafting ------------------------------------------------------------------------------------


def draft(source: Source, prompts: Sequence[Prompt], drafts: int) -> tuple[list[Sampled], Drafted]:
    """Return greedy completions with `drafts` drafts, and what became of the drafts."""
    engine = plain_engine(source, draft_tokens=drafts)
    sampled = complete(source, prompts, engine)
    stats = engine.stats
    return sampled, Drafted(stats.accepted, stats.tried, stats.tokens / max(1, stats.row_calls))


def race_drafts(
    source: Source,
    prompts: Sequence[Prompt],
    drafts: Sequence[int],
    batch: int,
    repeats: int,
    on_progress: Progress = lambda _done, _of: None,
) -> Race:
    """Time greedy sampling by the number of drafts (0: none); the arms are called "0", "1", ..."""
    engines = {str(g): plain_engine(source, draft_tokens=g, max_batch=batch) for g in drafts}
    return race(source, prompts, engines, repeats, on_progress)
