"""The in-process sampler: static KV cache, one prefill a prompt, finished rows compacted away.

Prefill is the model's own forward. Decoding is written out here for the Llama family, on the
model's own weights with LoRA unmerged, so an optimizer step is seen at once and there is nothing to
synchronise. Dims: P prompts, B rows being decoded, H query heads, K key-value heads, R = H/K,
S cache length, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer

from operando.errors import UserError
from operando.models.caches import CACHE
from operando.models.hooks import ActivationReader
from operando.models.load import LLAMA_LIKE, is_llama_like, lora_in_model_dtype
from operando.models.logprobs import HeadConfig, head_logits
from operando.models.prefix import Prefix
from operando.models.tokens import check_stop, completion_text
from operando.rollout.sampler import Sampled, Sampling, finish, first_stop
from operando.rollout.weights import Weights, gather_weights

COMPACT_BELOW = 0.85  # compact when fewer than this share of the rows is alive
COMPACT_GRAPH_BELOW = 0.5  # the same under CUDA graphs, where a new batch size is a new capture
FIRST_TOKENS = 16  # room for this many new tokens at first; it doubles when it is full
GRAPH_FROM = 64  # completions shorter than this are not worth a capture
CDF_BLOCK = 256  # tokens of one block in the two-level CDF
STOP_EVERY = 8  # decoded steps between looks for stop texts


def serves(model: PreTrainedModel) -> bool:
    """Return whether the engine can decode this model."""
    if not is_llama_like(model):
        return False
    up = model.get_decoder().get_submodule("layers.0.mlp.up_proj")
    base = up.get_base_layer() if isinstance(up, LoraLayer) else up
    return type(base) is nn.Linear  # not a quantised one


class Rope(NamedTuple):
    """Cosines and sines of every position that this rollout can reach."""

    cos_SD: Float[Tensor, "S d"]
    sin_SD: Float[Tensor, "S d"]


class Decoded(NamedTuple):
    """Hidden states of one decoded token a row: the head's, and those below the trained blocks."""

    hidden_BD: Float[Tensor, "B D"]
    below_BD: Float[Tensor, "B D"]


Step = Callable[[Tensor], Decoded]


@dataclass
class Rows:
    """The rows still being decoded; `source` says which completion each row is."""

    source: list[int]
    position_B: Int[Tensor, " B"]
    keys: list[Float[Tensor, "B K S d"]]
    values: list[Float[Tensor, "B K S d"]]

    def keep(self, index: Int[Tensor, " b"]) -> None:
        self.source = [self.source[i] for i in index.tolist()]
        self.position_B = self.position_B[index]
        for caches in (self.keys, self.values):  # layer by layer: never two whole caches
            for layer, cache in enumerate(caches):
                caches[layer] = cache[index]

    def make_room(self, length: int) -> None:
        """Give the caches this many positions."""
        for caches in (self.keys, self.values):
            for layer, cache in enumerate(caches):
                caches[layer] = F.pad(cache, (0, 0, 0, length - cache.shape[2]))


class Engine:
    """Samples from the live weights of a Llama-family model.

    Example: Engine(model, tokenizer, stop_ids=(1,)).sample(prompt_ids, 8, Sampling(64), uniforms)
    """

    name = "operando"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: tuple[int, ...],
        max_batch: int = 512,
    ) -> None:
        if not serves(model):
            raise UserError(f"the engine does not serve {model.config.model_type!r}: {LLAMA_LIKE}")
        self.model = model
        self.decoder: nn.Module = model.get_decoder()
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.max_batch = max_batch
        config = model.config
        self.num_kv_heads: int = config.num_key_value_heads
        self.repeats: int = config.num_attention_heads // self.num_kv_heads
        self.head_dim: int = (
            config.head_dim
            if "head_dim" in config and config.head_dim
            else config.hidden_size // config.num_attention_heads
        )
        self.eps: float = config.rms_norm_eps
        gemma = config.model_type == "gemma"
        self.norm_offset = 1.0 if gemma else 0.0
        self.embed_scale = config.hidden_size**0.5 if gemma else None
        self.activation: nn.Module = ACT2FN[config.hidden_act]
        self.use_graphs: bool = model.device.type == "cuda"

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        uniforms_BT: Float[Tensor, "B T"] | None,
        prefix: Prefix | None = None,
    ) -> list[Sampled]:
        """Return `group_size` completions of each prompt, siblings adjacent."""
        check_stop(self.tokenizer, self.stop_ids, sampling.stop)
        weights = gather_weights(self.model, self.norm_offset)
        step = max(1, self.max_batch // group_size)
        done: list[Sampled] = []
        for at in range(0, len(prompts), step):
            part = prompts[at : at + step]
            rows = slice(at * group_size, (at + len(part)) * group_size)
            uniforms = None if uniforms_BT is None else uniforms_BT[rows]
            first = at if prefix is None else prefix.first_group + at
            done += self._sample_chunk(weights, part, group_size, sampling, uniforms, prefix, first)
        return done

    def _sample_chunk(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        uniforms_BT: Float[Tensor, "B T"] | None,
        prefix: Prefix | None,
        first_group: int,
    ) -> list[Sampled]:
        head, max_new = HeadConfig(sampling.temperature, None), sampling.max_completion_length
        first = 0 if prefix is None else prefix.first
        hidden_PD, rows, below_PSD = self._prefill(
            prompts, group_size, min(FIRST_TOKENS, max_new), first
        )
        below_BTD = None
        if prefix is not None:
            below_BTD = below_PSD.new_zeros(len(rows.source), max_new, below_PSD.shape[2])
        device = hidden_PD.device
        stop_ids = torch.tensor(self.stop_ids, device=device)
        if uniforms_BT is not None:
            uniforms_BT = uniforms_BT.to(device)
        uniforms_now = uniforms_BT
        ids: list[list[int]] = [[] for _ in rows.source]
        logps: list[list[float]] = [[] for _ in rows.source]
        longest = int(rows.position_B.max())
        rope = self._rope_table(longest + max_new, hidden_PD)
        graphs = self.use_graphs and max_new >= GRAPH_FROM
        compact_below = COMPACT_GRAPH_BELOW if graphs else COMPACT_BELOW
        step: Step | None = None  # the captured step of these very buffers
        alive_B = torch.ones(len(rows.source), dtype=torch.bool, device=device)
        logits_BV = head_logits(hidden_PD, weights.head_VD, head).repeat_interleave(group_size, 0)
        for t in range(max_new):
            u_B = None if uniforms_now is None else uniforms_now[:, t]
            token_B, logp_B = pick(logits_BV, u_B)
            for source, token, logp in zip(
                rows.source, token_B.tolist(), logp_B.tolist(), strict=True
            ):
                ids[source].append(token)
                logps[source].append(logp)
            alive_B &= ~torch.isin(token_B, stop_ids)
            if sampling.stop and t % STOP_EVERY == STOP_EVERY - 1:
                alive_B &= self._no_stop_text(rows.source, ids, sampling, device)
            num_alive = int(alive_B.sum())
            if num_alive == 0 or t == max_new - 1:
                break
            if num_alive < compact_below * len(rows.source):
                index, step = alive_B.nonzero()[:, 0], None
                rows.keep(index)
                token_B, alive_B = token_B[index], alive_B[index]
                if uniforms_BT is not None:
                    uniforms_now = uniforms_BT[torch.tensor(rows.source, device=device)]
            length, room = longest + t + 1, rows.keys[0].shape[2]
            if length > room:
                rows.make_room(min(longest + 2 * (room - longest), longest + max_new))
                step = None
            if graphs:
                step = step or capture(self._step(weights, rows, rope, first), token_B)
                hidden_BD, below_BD = step(token_B)
            else:
                hidden_BD, below_BD = self._decode(weights, rows, token_B, rope, length, first)
            if below_BTD is not None:
                below_BTD[torch.tensor(rows.source, device=device), t] = below_BD
            rows.position_B += 1
            logits_BV = head_logits(hidden_BD, weights.head_VD, head)
        done = [
            finish(self.tokenizer, ids[i], logps[i], self.stop_ids, sampling)
            for i in range(len(ids))
        ]
        if prefix is not None and below_BTD is not None:
            for p, prompt in enumerate(prompts):
                prefix.prompts[first_group + p] = below_PSD[p, : len(prompt)]
            for i, one in enumerate(done):
                prefix.rows[first_group * group_size + i] = below_BTD[i, : len(one.ids)]
        return done

    def _step(self, weights: Weights, rows: Rows, rope: Rope, first: int) -> Step:
        """Return the decoding step over the caches' whole length: its shapes never change."""
        room = rows.keys[0].shape[2]
        return lambda token_B: self._decode(weights, rows, token_B, rope, room, first)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], group_size: int, max_new: int, first: int
    ) -> tuple[Float[Tensor, "P D"], Rows, Float[Tensor, "P S D"]]:
        """Run each prompt once.

        Returns its last hidden state, the caches expanded to the group, and the residual at the
        input of block `first`.
        """
        device = self.model.device
        lengths_P = torch.tensor([len(p) for p in prompts], device=device)
        width = int(lengths_P.max())
        ids_PS = torch.full((len(prompts), width), self.stop_ids[0], device=device)
        for row, prompt in enumerate(prompts):
            ids_PS[row, : len(prompt)] = torch.tensor(prompt, device=device)
        cache = DynamicCache(config=self.model.config)
        position_PS = torch.arange(width, device=device).expand_as(ids_PS)
        site = f"blocks.{first}.hook_resid_pre"
        reader = ActivationReader(self.model, [site])
        with lora_in_model_dtype(self.model), reader.reading() as acts:
            out = self.decoder(
                input_ids=ids_PS, position_ids=position_PS, use_cache=True, **{CACHE: cache}
            )
        hidden_PD = out.last_hidden_state[torch.arange(len(prompts)), lengths_P - 1]
        keys, values = [], []
        for layer in cache.layers:
            assert isinstance(layer, DynamicLayer) and layer.keys is not None, type(layer)
            assert layer.values is not None
            keys.append(_expand(layer.keys, group_size, width + max_new))
            values.append(_expand(layer.values, group_size, width + max_new))
        rows = Rows(
            source=list(range(len(prompts) * group_size)),
            position_B=lengths_P.repeat_interleave(group_size),
            keys=keys,
            values=values,
        )
        return hidden_PD, rows, acts[site]

    def _decode(
        self,
        weights: Weights,
        rows: Rows,
        token_B: Int[Tensor, " B"],
        rope: Rope,
        length: int,
        first: int,
    ) -> Decoded:
        """Return hidden states after reading one more token in each row.

        They are those that the head reads, and those at the input of block `first`.
        `length` bounds every row's position, so attention looks at no more of the cache than that.
        The rows' positions stay: to run the same step twice changes nothing.
        """
        num_rows, d = len(rows.source), self.head_dim
        every_B = torch.arange(num_rows, device=token_B.device)
        position_B = rows.position_B
        cos_B1d, sin_B1d = rope.cos_SD[position_B][:, None], rope.sin_SD[position_B][:, None]
        unseen_BS = torch.arange(length, device=token_B.device) > position_B[:, None]
        x_BD = F.embedding(token_B, weights.embed_VD)
        mask_B11S = torch.zeros_like(unseen_BS, dtype=x_BD.dtype).masked_fill(unseen_BS, -torch.inf)
        mask_B11S = mask_B11S[:, None, None]
        if self.embed_scale is not None:
            x_BD = x_BD * torch.tensor(self.embed_scale, dtype=x_BD.dtype)
        below_BD = x_BD
        for layer, block in enumerate(weights.blocks):
            below_BD = x_BD if layer == first else below_BD
            h_BD = self._norm(x_BD, block.norm1)
            q_BHd = block.q(h_BD).view(num_rows, -1, d)
            k_BKd = block.k(h_BD).view(num_rows, -1, d)
            v_BKd = block.v(h_BD).view(num_rows, -1, d)
            if block.q_norm is not None and block.k_norm is not None:
                q_BHd = self._norm(q_BHd, block.q_norm)
                k_BKd = self._norm(k_BKd, block.k_norm)
            q_BHd = rotate(q_BHd, cos_B1d, sin_B1d)
            keys, values = rows.keys[layer], rows.values[layer]
            keys[every_B, :, position_B] = rotate(k_BKd, cos_B1d, sin_B1d)
            values[every_B, :, position_B] = v_BKd
            # The R query heads that share a key-value head stand where query positions would.
            attended = F.scaled_dot_product_attention(
                q_BHd.reshape(num_rows, self.num_kv_heads, self.repeats, d),
                keys[:, :, :length],
                values[:, :, :length],
                attn_mask=mask_B11S,
            )
            x_BD = x_BD + block.o(attended.reshape(num_rows, -1))
            h_BD = self._norm(x_BD, block.norm2)
            x_BD = x_BD + block.down(self.activation(block.gate(h_BD)) * block.up(h_BD))
        return Decoded(self._norm(x_BD, weights.norm_D), below_BD)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, self.eps).to(x.dtype)

    def _rope_table(self, length: int, like: Tensor) -> Rope:
        positions = torch.arange(length, device=like.device)[None]
        cos, sin = self.decoder.get_submodule("rotary_emb")(like, positions)
        return Rope(cos[0], sin[0])

    def _no_stop_text(
        self, sources: list[int], ids: list[list[int]], sampling: Sampling, device: torch.device
    ) -> Tensor:
        """Return which rows hold no stop text among their last tokens."""
        tail = STOP_EVERY + max(len(s) for s in sampling.stop)
        clear = [
            first_stop(completion_text(self.tokenizer, ids[source][-tail:]), sampling.stop) is None
            for source in sources
        ]
        return torch.tensor(clear, device=device)


def capture(step: Step, token_B: Tensor) -> Step:
    """Return the step as a CUDA graph: one launch for its several hundred kernels.

    The graph reads and writes fixed memory; what it returns is overwritten by its next call.
    """
    token_in_B = token_B.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries take their workspaces outside the graph
        step(token_in_B)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(token_in_B)

    def replay(token_B: Tensor) -> Decoded:
        token_in_B.copy_(token_B)
        graph.replay()
        return out

    return replay


def pick(
    logits_BV: Float[Tensor, "B V"], u_B: Float[Tensor, " B"] | None
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Return one token a row by inverse CDF of its uniform (None: the argmax), and its log-prob.

    The CDF is taken in two levels, over blocks of the vocabulary and then inside one block, in
    float64: in float32 the tail of a large vocabulary would be rounded away.
    """
    top_B = logits_BV.amax(-1, keepdim=True)
    weight_BV = (logits_BV - top_B).exp_()
    num_rows, vocab = weight_BV.shape
    padded_BV = F.pad(weight_BV, (0, -vocab % CDF_BLOCK))
    block_BKv = padded_BV.view(num_rows, -1, CDF_BLOCK)
    sum_BK = block_BKv.sum(-1, dtype=torch.float64)
    total_B = sum_BK.sum(-1)
    if u_B is None:
        token_B = logits_BV.argmax(-1)
    else:
        cdf_BK = sum_BK.cumsum(-1)
        target_B1 = u_B.double()[:, None] * cdf_BK[:, -1:]
        block_B1 = torch.searchsorted(cdf_BK, target_B1, right=True).clamp(max=sum_BK.shape[1] - 1)
        below_B1 = cdf_BK.gather(1, block_B1) - sum_BK.gather(1, block_B1)
        inside_Bv = block_BKv[torch.arange(num_rows, device=block_B1.device), block_B1[:, 0]]
        cdf_Bv = inside_Bv.cumsum(-1, dtype=torch.float64)
        # Rounding must not push the target past the block's last token that can be drawn.
        target_B1 = torch.minimum(target_B1 - below_B1, cdf_Bv[:, -1:] * (1 - 1e-12))
        place_B1 = torch.searchsorted(cdf_Bv, target_B1, right=True)
        token_B = (block_B1 * CDF_BLOCK + place_B1)[:, 0].clamp(max=vocab - 1)
    logp_B = (logits_BV.gather(1, token_B[:, None]) - top_B)[:, 0] - total_B.log().float()
    return token_B, logp_B


def rotate(
    x_BHd: Float[Tensor, "B H d"], cos_B1d: Float[Tensor, "B 1 d"], sin_B1d: Float[Tensor, "B 1 d"]
) -> Float[Tensor, "B H d"]:
    """Return x turned by its position (rotary embedding, 2104.09864, half-split form)."""
    first, second = x_BHd.chunk(2, dim=-1)
    return x_BHd * cos_B1d + torch.cat((-second, first), dim=-1) * sin_B1d


def _expand(x_PKSd: Tensor, group_size: int, length: int) -> Tensor:
    """Return a cache [P*G K length d] whose first positions are the prompt's."""
    num, heads, width, d = x_PKSd.shape
    cache = x_PKSd.new_zeros(num * group_size, heads, length, d)
    cache[:, :, :width] = x_PKSd.repeat_interleave(group_size, 0)
    return cache
