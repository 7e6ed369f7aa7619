"""The in-process sampler: static KV cache, one prefill a prompt, finished rows compacted away.

Prefill is the model's own forward. Decoding is written out here for the Llama family, on the
model's own weights with LoRA unmerged, so an optimizer step is seen at once and there is nothing to
synchronise. Dims: P prompts, B rows being decoded, H query heads, K key-value heads, R = H/K,
S cache length, D d_model, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
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
from operando.models.tokens import check_stop, completion_text
from operando.rollout.kernels import attend, pick, rotate_into
from operando.rollout.sampler import Sampled, Sampling, finish, first_stop
from operando.rollout.weights import Weights, gather_weights

COMPACT_BELOW = 0.85  # compact when fewer than this share of the rows is alive
COMPACT_GRAPH_BELOW = 0.5  # the same under CUDA graphs, where a new batch size is a new capture
FIRST_TOKENS = 16  # room for this many new tokens at first; it doubles when it is full
GRAPH_FROM = 64  # completions shorter than this are not worth a capture
STOP_EVERY = 8  # decoded steps between looks for stop texts, and on CUDA for ended rows


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


@dataclass
class Written:
    """What has been drawn, of all N completions: it stays on the device until the end."""

    ids_NT: Int[Tensor, "N T"]
    logp_NT: Float[Tensor, "N T"]
    below_NTD: Float[Tensor, "N T D"] | None
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


Step = Callable[[], None]  # decodes one token a row, in place


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
        self.captured: list[Step] = []
        self.pool = None  # of the graphs' memory; made, with their stream, when first needed
        self.stream = None

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
        max_new, first = sampling.max_completion_length, 0 if prefix is None else prefix.first
        hidden_PD, rows, below_PSD = self._prefill(
            prompts, group_size, min(FIRST_TOKENS, max_new), first
        )
        num, device = len(rows.source_B), hidden_PD.device
        written = Written(
            ids_NT=torch.zeros(num, max_new, dtype=torch.long, device=device),
            logp_NT=torch.zeros(num, max_new, device=device),
            below_NTD=None
            if prefix is None
            else below_PSD.new_zeros(num, max_new, below_PSD.shape[2]),
            uniforms_NT=None if uniforms_BT is None else uniforms_BT.to(device),
            at_1=torch.zeros(1, dtype=torch.long, device=device),
            stop_S=torch.tensor(self.stop_ids, device=device),
            drawn_N=torch.full((num,), max_new, device=device),
        )
        longest = int(rows.position_B.max())
        rope = self._rope_table(longest + max_new, hidden_PD)
        graphs = self.use_graphs and max_new >= GRAPH_FROM
        compact_below = COMPACT_GRAPH_BELOW if graphs else COMPACT_BELOW
        look_every = STOP_EVERY if graphs else 1
        captured: list[Step] = []  # all stay until the last of them has run: they share memory
        replay: Step | None = None  # the captured step of these very buffers
        fresh = True  # these buffers have not been decoded with yet
        logits_PV = F.linear(hidden_PD.to(weights.head_VD.dtype), weights.head_VD)
        self._draw(rows, written, logits_PV.repeat_interleave(group_size, 0), sampling.temperature)
        for t in range(1, max_new):  # t tokens are drawn
            if sampling.stop and t % STOP_EVERY == 0:
                rows.alive_B &= self._no_stop_text(rows, written, t, sampling)
            if t % look_every == 0:
                num_alive = int(rows.alive_B.sum())
                if num_alive == 0:
                    written.drawn_N[rows.source_B] = t
                    break
                if num_alive < compact_below * len(rows.source_B):
                    replay, fresh = None, True
                    written.drawn_N[rows.source_B[~rows.alive_B]] = t
                    rows.keep(rows.alive_B.nonzero()[:, 0])
            length, room = longest + t, rows.keys[0].shape[2]
            if length > room:
                replay, fresh = None, True
                rows.make_room(min(longest + 2 * (room - longest), longest + max_new))
                room = rows.keys[0].shape[2]

            def step(length: int = room if graphs else length) -> None:
                below_BD, logits_BV = self._decode(weights, rows, rope, length, first)
                if written.below_NTD is not None:
                    written.below_NTD[rows.source_B, written.at_1 - 1] = below_BD
                rows.position_B += 1
                self._draw(rows, written, logits_BV, sampling.temperature)

            if graphs and replay is None and not fresh:
                replay = self._capture(step)
                captured.append(replay)
            (replay or step)()  # the first step with new buffers warms the libraries up
            fresh = False
        if captured:  # not before: with its last graph the memory that they share is gone
            self.captured = captured
        done = [
            finish(self.tokenizer, ids[:drawn], logps[:drawn], self.stop_ids, sampling)
            for ids, logps, drawn in zip(
                written.ids_NT.tolist(),
                written.logp_NT.tolist(),
                written.drawn_N.tolist(),
                strict=True,
            )
        ]
        if prefix is not None and written.below_NTD is not None:
            for p, prompt in enumerate(prompts):
                prefix.prompts[first_group + p] = below_PSD[p, : len(prompt)]
            for i, one in enumerate(done):
                prefix.rows[first_group * group_size + i] = written.below_NTD[i, : len(one.ids)]
        return done

    def _capture(self, step: Step) -> Step:
        """Return the step as a CUDA graph: one launch for its several hundred kernels.

        Capturing runs nothing. All graphs take their memory from one pool, and no garbage is
        collected for each, as torch.cuda.graph would.
        """
        if self.pool is None or self.stream is None:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # what it might free on CUDA would end the capture
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                graph.capture_begin(pool=self.pool)
                step()
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay

    def _draw(
        self, rows: Rows, written: Written, logits_BV: Float[Tensor, "B V"], temperature: float
    ) -> None:
        """Draw each row's next token and write it down."""
        at_1, u_B = written.at_1, None
        if written.uniforms_NT is not None:
            u_B = written.uniforms_NT[rows.source_B, at_1]
        token_B, logp_B = pick(logits_BV, u_B, temperature)
        written.ids_NT[rows.source_B, at_1] = token_B
        written.logp_NT[rows.source_B, at_1] = logp_B
        written.at_1 += 1
        rows.token_B.copy_(token_B)
        rows.alive_B &= (token_B[:, None] != written.stop_S).all(1)

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
        position_B = lengths_P.repeat_interleave(group_size)
        rows = Rows(
            source_B=torch.arange(len(position_B), device=device),
            position_B=position_B,
            token_B=torch.zeros_like(position_B),
            alive_B=torch.ones_like(position_B, dtype=torch.bool),
            keys=keys,
            values=values,
        )
        return hidden_PD, rows, acts[site]

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

    def _no_stop_text(
        self, rows: Rows, written: Written, drawn: int, sampling: Sampling
    ) -> Bool[Tensor, " B"]:
        """Return which rows hold no stop text among their last tokens."""
        tail = STOP_EVERY + max(len(s) for s in sampling.stop)
        ids_BT = written.ids_NT[rows.source_B, max(0, drawn - tail) : drawn]
        clear = [
            first_stop(completion_text(self.tokenizer, ids), sampling.stop) is None
            for ids in ids_BT.tolist()
        ]
        return torch.tensor(clear, device=rows.alive_B.device)


def _expand(x_PKSd: Tensor, group_size: int, length: int) -> Tensor:
    """Return a cache [P*G K length d] whose first positions are the prompt's."""
    num, heads, width, d = x_PKSd.shape
    cache = x_PKSd.new_zeros(num * group_size, heads, length, d)
    cache[:, :, :width] = x_PKSd.repeat_interleave(group_size, 0)
    return cache
