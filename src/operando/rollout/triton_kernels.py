"""The inner operations of decoding as Triton kernels, for CUDA; `kernels` says what each returns.

Imported only where Triton is installed and a tensor is on a CUDA device. Every rounding of the
plain versions in the model's dtype is kept; only sums run in another order.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

PARTS = 16  # blocks of the vocabulary that one program sums
SEEN = 128  # cached positions that one program looks at together
QUERIES = 16  # the least rows of a tensor core's product


@triton.jit
def _block_sums(logits, top, total, V, K, temperature, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    x = x / temperature
    highest = tl.max(x, 1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(top + row * K + block, highest, mask=block < K)
    tl.store(total + row * K + block, tl.sum(tl.exp(x - shift[:, None]), 1), mask=block < K)


def block_sums(
    logits_BV: Float[Tensor, "B V"], temperature: float, block: int
) -> tuple[Float[Tensor, "B 1"], Float[Tensor, "B K"]]:
    num_rows, vocab = logits_BV.shape
    num = triton.cdiv(vocab, block)
    top_BK = torch.empty(num_rows, num, device=logits_BV.device)
    sum_BK = torch.empty_like(top_BK)
    _block_sums[(num_rows, triton.cdiv(num, PARTS))](
        logits_BV.contiguous(), top_BK, sum_BK, vocab, num, temperature, BLOCK=block, PARTS=PARTS
    )
    top_B1 = top_BK.amax(-1, keepdim=True)
    return top_B1, sum_BK.double() * (top_BK - top_B1).double().exp()


@triton.jit
def _turn(x, cos, sin, HALF: tl.constexpr):
    i = tl.arange(0, HALF)
    kind = x.dtype.element_ty
    low, high = tl.load(x + i).to(tl.float32), tl.load(x + HALF + i).to(tl.float32)
    cos_low, cos_high = tl.load(cos + i).to(tl.float32), tl.load(cos + HALF + i).to(tl.float32)
    sin_low, sin_high = tl.load(sin + i).to(tl.float32), tl.load(sin + HALF + i).to(tl.float32)
    low_out = (low * cos_low).to(kind).to(tl.float32) - (high * sin_low).to(kind).to(tl.float32)
    high_out = (high * cos_high).to(kind).to(tl.float32) + (low * sin_high).to(kind).to(tl.float32)
    return low_out.to(kind), high_out.to(kind)


@triton.jit
def _rotate_into(
    q, k, v, keys, values, cos, sin, position, H, K, room, HALF: tl.constexpr, D: tl.constexpr
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, HALF)
    at = tl.load(position + row)
    if head < H:
        x = q + (row * H + head) * D
        low, high = _turn(x, cos + at * D, sin + at * D, HALF)
        tl.store(x + i, low)
        tl.store(x + HALF + i, high)
    else:
        x, y = k + (row * K + head - H) * D, v + (row * K + head - H) * D
        low, high = _turn(x, cos + at * D, sin + at * D, HALF)
        to = ((row * K + head - H) * room + at) * D
        tl.store(keys + to + i, low)
        tl.store(keys + to + HALF + i, high)
        tl.store(values + to + i, tl.load(y + i))
        tl.store(values + to + HALF + i, tl.load(y + HALF + i))


def rotate_into(
    q_BHd: Tensor,
    k_BKd: Tensor,
    v_BKd: Tensor,
    keys_BKSd: Tensor,
    values_BKSd: Tensor,
    cos_Td: Tensor,
    sin_Td: Tensor,
    position_B: Int[Tensor, " B"],
) -> Tensor:
    num_rows, heads, d = q_BHd.shape
    kv_heads, room = keys_BKSd.shape[1:3]
    assert all(
        x.is_contiguous() for x in (q_BHd, k_BKd, v_BKd, keys_BKSd, values_BKSd, cos_Td, sin_Td)
    )
    _rotate_into[(num_rows, heads + kv_heads)](
        q_BHd,
        k_BKd,
        v_BKd,
        keys_BKSd,
        values_BKSd,
        cos_Td,
        sin_Td,
        position_B,
        heads,
        kv_heads,
        room,
        HALF=d // 2,
        D=d,
        num_warps=1,
    )
    return q_BHd


@triton.jit
def _attend(
    q,
    keys,
    values,
    out,
    position,
    scale,
    H,
    K,
    R,
    room,
    D: tl.constexpr,
    SEEN: tl.constexpr,
    QUERIES: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num = tl.load(position + row) + 1
    r, d, s = tl.arange(0, QUERIES), tl.arange(0, D), tl.arange(0, SEEN)
    place = (row * H + head * R + r[:, None]) * D + d[None, :]
    mine = tl.load(q + place, mask=r[:, None] < R, other=0.0)
    cache = (row * K + head) * room * D
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mean = tl.zeros((QUERIES, D), tl.float32)
    for start in range(0, num, SEEN):
        at = start + s
        where = cache + at[:, None] * D + d[None, :]
        key = tl.load(keys + where, mask=at[:, None] < num, other=0.0)
        score = tl.dot(mine, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(at[None, :] < num, score, float("-inf"))
        top = tl.maximum(highest, tl.max(score, 1))
        weight, kept = tl.exp(score - top[:, None]), tl.exp(highest - top)
        value = tl.load(values + where, mask=at[:, None] < num, other=0.0)
        mean = mean * kept[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * kept + tl.sum(weight, 1)
        highest = top
    mean = mean / total[:, None]
    tl.store(out + place, mean.to(out.dtype.element_ty), mask=r[:, None] < R)


def attend(
    q_BHd: Tensor, keys_BKSd: Tensor, values_BKSd: Tensor, position_B: Int[Tensor, " B"]
) -> Tensor:
    num_rows, heads, d = q_BHd.shape
    kv_heads, room = keys_BKSd.shape[1:3]
    out_BHd = torch.empty_like(q_BHd)
    queries = max(QUERIES, triton.next_power_of_2(heads // kv_heads))
    seen = SEEN if d <= 128 and q_BHd.dtype != torch.float32 else SEEN // 4
    _attend[(num_rows, kv_heads)](
        q_BHd,
        keys_BKSd,
        values_BKSd,
        out_BHd,
        position_B,
        d**-0.5,
        heads,
        kv_heads,
        heads // kv_heads,
        room,
        D=d,
        SEEN=seen,
        QUERIES=queries,
        num_warps=4,
    )
    return out_BHd
