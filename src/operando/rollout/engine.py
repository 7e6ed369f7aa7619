"""The in-process sampler: static KV cache, one prefill per prompt, finished rows compacted away.

Prefill is the model's own forward. Decoding is written out here for the Llama family, on the
model's own weights with LoRA unmerged, so an optimizer step is seen at once and there is nothing to
synchronise. Dims: P prompts, B rows being decoded, H query heads, K key-value heads, R = H/K,
S cache length, D d_model, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer

from operando.errors import UserError
from operando.models.caches import CACHE
from operando.models.hooks import ActivationReader
from operando.models.load import LLAMA_LIKE, is_llama_like, lora_in_model_dtype
from operando.models.prefix import Prefix
from operando.models.tokens import check_stop
from operando.rollout.decoding import FIRST_TOKENS, STOP_EVERY, Decoding, Rows, Written
from operando.rollout.graphs import StepRunner
from operando.rollout.kernels import attend, rotate_into
from operando.rollout.sampler import Request, Sampled
from operando.rollout.weights import Weights, gather_weights

COMPACT_BELOW = 0.85  # compact when fewer than this share of the rows is alive
COMPACT_GRAPH_BELOW = 0.5  # the same under CUDA graphs, where a new batch size is a new capture
GRAPH_FROM = 64  # completions shorter than this are not worth a capture


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


class Engine:
    """Samples from the live weights of a Llama-family model.

    Example: Engine(model, tokenizer, stop_ids=(1,)).sample(Request(prompt_ids, 8, Sampling(64)))
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
            raise UserError(
                f"the engine does not support {model.config.model_type!r}: {LLAMA_LIKE}"
            )
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
        self.runner = StepRunner()

    @torch.no_grad()
    def sample(self, request: Request, prefix: Prefix | None = None) -> list[Sampled]:
        """Return the completions of each prompt, siblings adjacent."""
        check_stop(self.tokenizer, self.stop_ids, request.sampling.stop)
        weights = gather_weights(self.model, self.norm_offset)
        done: list[Sampled] = []
        for at, chunk in request.chunks(self.max_batch):
            first_group = at if prefix is None else prefix.first_group + at
            done += self._sample_chunk(weights, chunk, prefix, first_group)
        return done

    def _sample_chunk(
        self, weights: Weights, request: Request, prefix: Prefix | None, first_group: int
    ) -> list[Sampled]:
        first = 0 if prefix is None else prefix.first
        hidden_PD, below_PSD, rows = self._prefill(request, first)
        decoding = self._begin(request, rows, None if prefix is None else below_PSD)
        logits_PV = F.linear(hidden_PD.to(weights.head_VD.dtype), weights.head_VD)
        decoding.draw(logits_PV.repeat_interleave(request.group_size, 0))
        self._decode_all(weights, decoding, self._rope_table(decoding.most, hidden_PD), first)
        done = decoding.completions(self.stop_ids)
        if prefix is not None and decoding.written.below_NTD is not None:
            for p, prompt in enumerate(request.prompts):
                prefix.prompts[first_group + p] = below_PSD[p, : len(prompt)]
            for i, one in enumerate(done):
                row = first_group * request.group_size + i
                prefix.rows[row] = decoding.written.below_NTD[i, : len(one.ids)]
        return done

    def _decode_all(self, weights: Weights, decoding: Decoding, rope: Rope, first: int) -> None:
        """Draw all tokens after the first, one a row and step, until every row has ended."""
        max_new = decoding.request.sampling.max_completion_length
        graphs = self.use_graphs and max_new >= GRAPH_FROM
        compact_below = COMPACT_GRAPH_BELOW if graphs else COMPACT_BELOW
        look_every = STOP_EVERY if graphs else 1
        self.runner.start(captures=graphs)
        for drawn in range(1, max_new):
            decoding.end_at_stop_texts(drawn)
            if drawn % look_every == 0 and decoding.compact(drawn, compact_below):
                self.runner.renew()
                if len(decoding.rows.source_B) == 0:
                    break
            if decoding.grow(drawn):
                self.runner.renew()
            length = decoding.room if graphs else decoding.longest + drawn
            self.runner.run(partial(self._step, weights, decoding, rope, length, first))

    def _step(
        self, weights: Weights, decoding: Decoding, rope: Rope, length: int, first: int
    ) -> None:
        below_BD, logits_BV = self._decode(weights, decoding.rows, rope, length, first)
        decoding.read(below_BD)
        decoding.draw(logits_BV)

    def _begin(
        self, request: Request, rows: Rows, below_PSD: Float[Tensor, "P S D"] | None
    ) -> Decoding:
        """Return the chunk with nothing drawn; `below_PSD` says that hidden states are wanted."""
        num, device = len(rows.source_B), rows.source_B.device
        max_new, uniforms_NT = request.sampling.max_completion_length, request.uniforms_BT
        written = Written(
            ids_NT=torch.zeros(num, max_new, dtype=torch.long, device=device),
            logp_NT=torch.zeros(num, max_new, device=device),
            below_NTD=None
            if below_PSD is None
            else below_PSD.new_zeros(num, max_new, below_PSD.shape[2]),
            uniforms_NT=None if uniforms_NT is None else uniforms_NT.to(device),
            at_1=torch.zeros(1, dtype=torch.long, device=device),
            stop_S=torch.tensor(self.stop_ids, device=device),
            drawn_N=torch.full((num,), max_new, device=device),
        )
        return Decoding(rows, written, request, self.tokenizer, int(rows.position_B.max()))

    def _prefill(
        self, request: Request, first: int
    ) -> tuple[Float[Tensor, "P D"], Float[Tensor, "P S D"], Rows]:
        """Run each prompt once.

        Returns its last hidden state, the residual at the input of block `first`, and the rows of
        the group with their caches.
        """
        prompts, group_size, sampling, _ = request
        max_new, device = min(FIRST_TOKENS, sampling.max_completion_length), self.model.device
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
        position_B = lengths_P.repeat_interleave(group_size)
        rows = Rows(
            source_B=torch.arange(len(position_B), device=device),
            position_B=position_B,
            token_B=torch.zeros_like(position_B),
            alive_B=torch.ones_like(position_B, dtype=torch.bool),
            keys=keys,
            values=values,
        )
        return hidden_PD, acts[site], rows

    def _decode(
        self, weights: Weights, rows: Rows, rope: Rope, length: int, first: int
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B V"]]:
        """Return what each row's newest token makes of the model: the residual at the input of
        block `first`, and the logits in the model's dtype.

        `length` bounds every row's position, so attention looks at no more of the cache than that.
        """
        num_rows, d = len(rows.source_B), self.head_dim
        x_BD = F.embedding(rows.token_B, weights.embed_VD)
        if self.embed_scale is not None:
            x_BD = x_BD * torch.tensor(self.embed_scale, dtype=x_BD.dtype)
        below_BD = x_BD
        for layer, block in enumerate(weights.blocks):
            below_BD = x_BD if layer == first else below_BD
            h_BD = self._norm(x_BD, block.norm1)
            q_BHd, k_BKd, v_BKd = (x.view(num_rows, -1, d) for x in block.qkv(h_BD))
            if block.q_norm is not None and block.k_norm is not None:
                q_BHd = self._norm(q_BHd, block.q_norm)
                k_BKd = self._norm(k_BKd, block.k_norm)
            keys, values = rows.keys[layer], rows.values[layer]
            q_BHd = rotate_into(q_BHd, k_BKd, v_BKd, keys, values, *rope, rows.position_B)
            attended_BHd = attend(q_BHd, keys, values, rows.position_B, length)
            x_BD = x_BD + block.o(attended_BHd.reshape(num_rows, -1))
            h_BD = self._norm(x_BD, block.norm2)
            gate_BF, up_BF = block.gate_up(h_BD)
            x_BD = x_BD + block.down(self.activation(gate_BF) * up_BF)
        hidden_BD = self._norm(x_BD, weights.norm_D)
        return below_BD, F.linear(hidden_BD.to(weights.head_VD.dtype), weights.head_VD)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, self.eps).to(x.dtype)

    def _rope_table(self, length: int, like: Tensor) -> Rope:
        positions = torch.arange(length, device=like.device)[None]
        cos, sin = self.decoder.get_submodule("rotary_emb")(like, positions)
        return Rope(cos[0], sin[0])


def _expand(x_PKSd: Tensor, group_size: int, length: int) -> Tensor:
    """Return a cache [P*G K length d] whose first positions are the prompt's."""
    num, heads, width, d = x_PKSd.shape
    cache = x_PKSd.new_zeros(num * group_size, heads, length, d)
    cache[:, :, :width] = x_PKSd.repeat_interleave(group_size, 0)
    return cache
