"""Rows of a batch as the model reads them: siblings share one copy of their prompt.

A pack is one sequence [prompt, completion 1, completion 2, ...]; every completion sees the prompt
and itself, and its positions go on from the prompt's end. The log-probs and gradients are those of
separate rows, at the price of one prompt instead of G.

Dims: b packs, S pack length (right-padded), N real completion tokens of all packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from operando.types import Batch

Pack = list[int]  # rows of one group

SHARED_TOKENS = 512  # completions share a prompt up to this many tokens, or its own length


class Packed(NamedTuple):
    """Packs as tensors, and where each completion token is.

    Token n belongs to the row at place row_N[n] of the flattened packs and is its t_N[n]-th token;
    it stands at position at_N of pack pack_N, and the hidden state at before_N predicts it.
    """

    ids_bS: Int[Tensor, "b S"]
    position_bS: Int[Tensor, "b S"]
    mask_b1SS: Bool[Tensor, "b 1 S S"] | None  # None: one row a pack, so causality is the mask
    pack_N: Int[Tensor, " N"]
    before_N: Int[Tensor, " N"]
    at_N: Int[Tensor, " N"]
    row_N: Int[Tensor, " N"]
    t_N: Int[Tensor, " N"]
    exit_bS: Int[Tensor, "b S"] | None  # loops to replay in a recursive model; None: no exits


def plan_packs(batch: Batch, rows: Sequence[int], share: bool) -> list[Pack]:
    """Return rows in packs of siblings; with `share` False every row is a pack of its own."""
    lengths = batch.mask_BT.sum(1).tolist()
    packs: list[Pack] = []
    used = 0
    for row in sorted(rows):
        limit = max(SHARED_TOKENS, int(batch.prompt_len_B[row]))
        sibling = bool(packs) and packs[-1][-1] // batch.group_size == row // batch.group_size
        if share and sibling and used + lengths[row] <= limit:
            packs[-1].append(row)
            used += lengths[row]
        else:
            packs.append([row])
            used = lengths[row]
    return packs


def plan_micro_batches(
    batch: Batch, rows: Sequence[int], micro_tokens: int, share: bool
) -> list[list[Pack]]:
    """Return packs in micro-batches of similar length, each of at most `micro_tokens` with padding.

    A pack longer than the limit is a micro-batch of its own.
    """
    packs = plan_packs(batch, rows, share)
    order = sorted(packs, key=lambda pack: -pack_length(batch, pack))
    micro: list[list[Pack]] = []
    for pack in order:
        widest = pack_length(batch, micro[-1][0]) if micro else 0
        if micro and (len(micro[-1]) + 1) * widest <= micro_tokens:
            micro[-1].append(pack)
        else:
            micro.append([pack])
    return micro


def pack_length(batch: Batch, pack: Pack) -> int:
    """Return the number of tokens of a pack: one prompt and its completions."""
    return int(batch.prompt_len_B[pack[0]]) + int(batch.mask_BT[pack].sum())


def pack_rows(batch: Batch, packs: Sequence[Pack], device: torch.device) -> Packed:
    """Return packs as right-padded tensors on a device, with positions, mask and token places.

    Positions run on over the padding of a pack of one row: transformers would take a position that
    falls back for a new sequence, and build a mask where plain causality is enough.
    """
    width = max(pack_length(batch, pack) for pack in packs)
    ids_bS = torch.zeros(len(packs), width, dtype=torch.long)
    position_bS = torch.arange(width).repeat(len(packs), 1)
    segment_bS = torch.full_like(ids_bS, -1)  # 0: prompt; i: completion i; -1: padding
    places: list[Tensor] = []  # [5, n] each: pack, before, at, row, t
    place = 0
    for b, pack in enumerate(packs):
        prompt = int(batch.prompt_len_B[pack[0]])
        ids_bS[b, :prompt] = batch.ids_BS[pack[0], :prompt]
        segment_bS[b, :prompt] = 0
        at = prompt
        for number, row in enumerate(pack, start=1):
            length = int(batch.mask_BT[row].sum())
            part = slice(at, at + length)
            t = torch.arange(length)
            ids_bS[b, part] = batch.completion_BT[row, :length]
            position_bS[b, part] = prompt + t
            segment_bS[b, part] = number
            before = torch.where(t == 0, prompt - 1, at + t - 1)
            constant = torch.ones_like(t)
            places.append(torch.stack([constant * b, before, at + t, constant * place, t]))
            at += length
            place += 1
    mask_b1SS = None
    if any(len(pack) > 1 for pack in packs):
        segment_bS = segment_bS.to(device)
        same_bSS = segment_bS[:, :, None] == segment_bS[:, None, :]
        prompt_b1S = segment_bS[:, None, :] == 0
        causal_SS = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        mask_b1SS = ((same_bSS | prompt_b1S) & causal_SS)[:, None]
    replays = bool(batch.rollouts[packs[0][0]].exit_loops)
    pack_N, before_N, at_N, row_N, t_N = torch.cat(places, dim=1).to(device)
    return Packed(
        ids_bS=ids_bS.to(device),
        position_bS=position_bS.to(device),
        mask_b1SS=mask_b1SS,
        pack_N=pack_N,
        before_N=before_N,
        at_N=at_N,
        row_N=row_N,
        t_N=t_N,
        exit_bS=_exits(batch, packs, width).to(device) if replays else None,
    )


def _exits(batch: Batch, packs: Sequence[Pack], width: int) -> Int[Tensor, "b S"]:
    """Return the loops that each token took when it was sampled; a row's last token took none."""
    exit_bS = torch.ones(len(packs), width, dtype=torch.long)
    for b, pack in enumerate(packs):
        at = int(batch.prompt_len_B[pack[0]])
        exit_bS[b, :at] = torch.tensor(batch.rollouts[pack[0]].exit_loops[:at])
        for row in pack:
            rollout = batch.rollouts[row]
            loops = rollout.exit_loops[len(rollout.prompt.ids) :]
            exit_bS[b, at : at + len(loops)] = torch.tensor(loops, dtype=torch.long)
            at += len(rollout.completion_ids)
    return exit_bS
