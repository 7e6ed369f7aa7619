"""Reads a recursive model over texts, at every depth asked: what the pathology audit judges.

Exits are off but in `cache_gap`. One forward runs the core to the greatest depth; the state of each
depth is then read out by coda and head, as the model with that many loops would.

Dims: B rows of a part, S row length, P prompts, N tokens, D d_model, V vocabulary, T loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from operando.models.hooks import ActivationReader
from operando.models.load import head_weight
from operando.models.recursive import RecursiveCausalLM, RecursiveConfig
from operando.models.recursive.cache import SlotCache
from operando.models.recursive.positions import positions_and_mask
from operando.recursive.pathology_metrics import (
    Likeness,
    Shock,
    bends,
    divergence,
    likeness,
    shock,
    step_sizes,
)

ROWS = 16  # of one forward


class Texts(NamedTuple):
    """Prompts with their gold answers, right-padded."""

    ids_PS: Int[Tensor, "P S"]
    length_P: Int[Tensor, " P"]
    prompt_P: Int[Tensor, " P"]  # tokens of each prompt

    def real(self) -> Bool[Tensor, "P S"]:
        return torch.arange(self.ids_PS.shape[1]) < self.length_P[:, None]

    def answer(self) -> Bool[Tensor, "P S"]:
        """Return which positions predict a token of the answer."""
        at_S = torch.arange(self.ids_PS.shape[1])
        return (at_S >= self.prompt_P[:, None] - 1) & (at_S < self.length_P[:, None] - 1)


def pack_texts(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int) -> Texts:
    """Return (prompt, answer) pairs as rows."""
    rows = [[*prompt, *answer] for prompt, answer in pairs]
    ids_PS = torch.full((len(rows), max(map(len, rows))), pad)
    for p, row in enumerate(rows):
        ids_PS[p, : len(row)] = torch.tensor(row)
    prompt_P = torch.tensor([len(prompt) for prompt, _ in pairs])
    return Texts(ids_PS, torch.tensor([len(row) for row in rows]), prompt_P)


def shuffled(texts: Texts, seed: int) -> Texts:
    """Return the texts with the tokens of each row in random order: the same words, no sense."""
    generator = torch.Generator().manual_seed(seed)
    ids_PS = texts.ids_PS.clone()
    for p, length in enumerate(texts.length_P.tolist()):
        ids_PS[p, :length] = ids_PS[p, torch.randperm(length, generator=generator)]
    return texts._replace(ids_PS=ids_PS)


class Reading(NamedTuple):
    """What a model shows on some texts. Lists are by prompt; dictionaries by depth.

    `grads` are norms of dL/du_t, of the core's output before the gate; `carry` those of dL/dh_t.
    """

    shock: Shock
    steps: list[list[float]]  # mean s_t of each prompt, T each
    nll: dict[int, list[float]]  # of the answer's tokens, mean nats per token
    kl: dict[int, list[float]]  # KL(p_R || p_T') at the answer's tokens
    agree: dict[int, list[float]]  # share of them with the same first choice
    likeness: dict[int, Likeness]
    grads: list[float | None]
    carry: list[float | None]


@torch.no_grad()
def read(model: RecursiveCausalLM, texts: Texts, depths: Sequence[int], seed: int) -> Reading:
    """Return what a model shows on texts at 1, R and the given depths."""
    R = model.config.num_loops
    asked = sorted({1, R, *depths})
    nll: dict[int, list[float]] = {t: [] for t in asked}
    kl: dict[int, list[float]] = {t: [] for t in asked}
    agree: dict[int, list[float]] = {t: [] for t in asked}
    kept: dict[int, list[Tensor]] = {t: [] for t in asked}
    sizes, bent, drift, steps = [], [], [], []
    for rows in torch.arange(len(texts.ids_PS)).split(ROWS):
        part = Texts(*(x[rows] for x in texts))
        states, logp = _forward(model, part, asked)
        real_BS = part.real()
        flat = [h_BSD[real_BS].float().cpu() for h_BSD in states]
        sizes.append(step_sizes(flat[: R + 1]))
        bent.append(bends(flat[: R + 1]))
        drift.append(flat[R].norm(dim=-1) / flat[1].norm(dim=-1))
        lengths = part.length_P.tolist()
        steps += [one.mean(0).tolist() for one in sizes[-1].split(lengths)]
        numbers = part.answer().sum(1).tolist()
        target_N = part.ids_PS[:, 1:][part.answer()[:, :-1]]
        for t in asked:
            kept[t].append(flat[t])
            nll_N = -logp[t].gather(1, target_N[:, None])[:, 0]
            kl_N, same_N = divergence(logp[R], logp[t])
            for into, x_N in ((nll, nll_N), (kl, kl_N), (agree, same_N)):
                into[t] += [float(one.mean()) for one in x_N.split(numbers)]
    whole = {t: torch.cat(parts) for t, parts in kept.items()}
    other_N = torch.randperm(len(whole[R]), generator=torch.Generator().manual_seed(seed))
    grads, carry = gradients(model, Texts(*(x[:ROWS] for x in texts)))
    return Reading(
        shock(torch.cat(sizes), torch.cat(bent), torch.cat(drift)),
        steps,
        nll,
        kl,
        agree,
        {t: likeness(whole[t], whole[R], other_N) for t in asked if t != R},
        grads,
        carry,
    )


def _forward(
    model: RecursiveCausalLM, part: Texts, depths: Sequence[int]
) -> tuple[list[Float[Tensor, "B S D"]], dict[int, Float[Tensor, "N V"]]]:
    """Return h_0 ... h_T, and log-probs at the positions that predict the answer, by depth."""
    decoder = model.model
    ids_BS = part.ids_PS.to(model.device)
    site = f"blocks.{decoder.num_prelude - 1}.hook_resid_post"
    with ActivationReader(model, [site]).reading() as seen:
        out = decoder(
            input_ids=ids_BS,
            num_loops=max(depths),
            halt_threshold=math.inf,
            output_loop_states=True,
        )
    assert out.loop_states is not None
    states = [seen[site], *out.loop_states]
    position_BS, mask = positions_and_mask(states[0], None, None, None)
    answer_BS = part.answer().to(model.device)
    weight_VD = head_weight(model)
    logp = {}
    for t in depths:
        hidden_ND = decoder.read_out(states[t], position_BS, mask)[answer_BS]
        logp[t] = (hidden_ND @ weight_VD.T).float().log_softmax(-1).cpu()
    return states, logp


@torch.enable_grad()
def gradients(
    model: RecursiveCausalLM, texts: Texts
) -> tuple[list[float | None], list[float | None]]:
    """Return the norms of dL/du_t and dL/dh_t of every loop; None where no graph leads there.

    L is the mean NLL of the answers' tokens. A leaf at the embeddings gives every loop a graph,
    whatever the policy trains.
    """
    ids_BS = texts.ids_PS.to(model.device)
    leaf_BSD = model.model.embed_tokens(ids_BS).detach().requires_grad_()
    out = model(inputs_embeds=leaf_BSD, halt_threshold=math.inf, output_loop_states=True)
    assert out.logits is not None and out.updates is not None and out.loop_states is not None
    answer_BS = texts.answer().to(model.device)
    logp_NV = out.logits[answer_BS].float().log_softmax(-1)
    target_N = ids_BS[:, 1:][answer_BS[:, :-1]]
    loss = -logp_NV.gather(1, target_N[:, None]).mean()
    inner = [*out.updates, *out.loop_states]
    linked = [x for x in inner if x.requires_grad]
    found = iter(torch.autograd.grad(loss, linked, allow_unused=True))
    norms: list[float | None] = []
    for x in inner:
        grad = next(found) if x.requires_grad else None
        norms.append(None if grad is None else float(grad.float().norm()))
    return norms[: len(out.updates)], norms[len(out.updates) :]


class CacheGap(NamedTuple):
    """A decode through the cache beside one forward over the whole text, exits on."""

    largest: float  # difference of a log-prob
    flipped: int  # tokens that took other loops
    loops: float  # mean loops of the whole forward
    threshold: float


@torch.no_grad()
def cache_gap(model: RecursiveCausalLM, texts: Texts) -> CacheGap:
    """Return how far a decode token by token is from a whole forward, on a few texts.

    The halt threshold is the config's; without one, a middle value of the halt head's
    probabilities, so that there are exits to go wrong.
    """
    part = Texts(*(x[:4] for x in texts))
    ids_BS = part.ids_PS.to(model.device)
    threshold = model.config.halt_threshold
    if threshold is None:
        out = model(input_ids=ids_BS, output_loop_states=True)
        assert out.loop_states is not None
        halt = model.model.halt_head(torch.stack(out.loop_states)).float().sigmoid()
        threshold = middle_gap(halt.flatten())
    full = model(input_ids=ids_BS, halt_threshold=threshold)
    B, S = ids_BS.shape
    cache = SlotCache(len(model.model.layers), S)
    logits, exits = [], []
    for at in range(S):
        position_B1 = torch.full((B, 1), at, device=model.device)
        out = model(
            input_ids=ids_BS[:, at : at + 1],
            position_ids=position_B1,
            cache=cache,
            halt_threshold=threshold,
        )
        logits.append(out.logits)
        exits.append(out.exit_loops)
    real_BS = part.real().to(model.device)
    gap = torch.cat(logits, 1).log_softmax(-1) - full.logits.log_softmax(-1)
    flipped = (torch.cat(exits, 1) != full.exit_loops) & real_BS
    return CacheGap(
        float(gap[real_BS].abs().max()),
        int(flipped.sum()),
        float(full.exit_loops[real_BS].float().mean()),
        threshold,
    )


def middle_gap(halt_n: Float[Tensor, " n"]) -> float:
    """Return the middle of the widest gap among the middle fifth: no value is near it.

    A value at the threshold itself would fall on either side with the order of a float sum.
    """
    sorted_n = halt_n.sort().values
    n = len(sorted_n)
    part = sorted_n[int(0.4 * n) : int(0.6 * n) + 2]
    at = int(part.diff().argmax())
    return float((part[at] + part[at + 1]) / 2)


@contextmanager
def at_depth(model: RecursiveCausalLM, loops: int) -> Iterator[None]:
    """Run the model with another number of loops."""
    own = model.config.num_loops
    model.config.num_loops = loops
    try:
        yield
    finally:
        model.config.num_loops = own


def random_init(model: RecursiveCausalLM, seed: int) -> RecursiveCausalLM:
    """Return an untrained model of the same config."""
    assert isinstance(model.config, RecursiveConfig), type(model.config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = RecursiveCausalLM(model.config).float().eval()
    nn.Module.to(fresh, model.device)
    return fresh
