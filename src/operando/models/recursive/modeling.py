"""RecursiveCausalLM: prelude, a core of shared blocks that runs R times, coda.

    e = prelude(embed(x))                               GQA layers
    K_j, V_j = from c = norm(W_down norm(e)), once      CART (2606.01495): the anchor of all loops
    u_t = core(h_t; K, V, z_t),  h_0 = e                two blocks, queries from h_t, causal
    z_t = H silu(W_c h_t + E[t])                        Ouroboros (2604.02051): per token and loop
    h_{t+1} = sigmoid(a) h_t + sigmoid(-a) u_t          the depth gate
    logits = head(norm(coda(h_R)))                      GQA layers

Deviations: CART drops rotary positions in the core and leaks e[t+1] through an unmasked anchor;
here the queries and keys are rotated and the mask is causal. Ouroboros pools h over the sequence,
which leaks the future and breaks cached decoding; here every token has its own z.

Dims: B rows, T new tokens, S all tokens so far, D d_model, H heads, d head_dim, s width of the
controller, b rows still looping.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from operando.errors import UserError
from operando.models.caches import CACHE
from operando.models.recursive.blocks import AnchorAttention, CoreBlock, Layer, ModulatedLinear
from operando.models.recursive.cache import SlotCache
from operando.models.recursive.configuration import RecursiveConfig
from operando.models.recursive.positions import Past, Rope, positions_and_mask, rope_table

GATE_INIT, GATE_LIMIT = 2.2, 6.0  # sigmoid(2.2) = 0.90; beyond 6.2 sigmoid is 1 in bfloat16
COMPACT_BELOW = 0.85  # rows whose tokens have all exited leave the loop when this share is left


@dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """Final hidden states, and what the loops did. States and updates only if asked for."""

    exit_loops: Tensor | None = None  # [B T], the loops that each token took
    loop_states: tuple[Tensor, ...] | None = None  # h_1 ... h_R, [B T D] each
    updates: tuple[Tensor, ...] | None = None  # u_0 ... u_{R-1}: the core's output before the gate


@dataclass
class CausalOutput(CausalLMOutputWithPast):
    """Logits of the last loop, always: labels change nothing but the loss."""

    exit_loops: Tensor | None = None
    loop_states: tuple[Tensor, ...] | None = None
    updates: tuple[Tensor, ...] | None = None


class RecursivePreTrainedModel(PreTrainedModel):
    config_class = RecursiveConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Layer", "CoreBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ModulatedLinear) and not module.weight.is_meta:
            module.fit_bases()
        elif isinstance(module, CoreBlock):
            _fresh(module.modulation.weight, 0.0)  # the loops begin unmodulated
        elif isinstance(module, RecursiveModel):
            _fresh(module.depth_gate, GATE_INIT)
        elif isinstance(module, RecursiveCausalLM):
            for proj in module.speculative_projs:
                assert isinstance(proj, nn.Linear), type(proj)
                _fresh(proj.weight, 0.0)
                _fresh(proj.bias, 0.0)


class RecursiveModel(RecursivePreTrainedModel):
    """The decoder: everything below the output head.

    `layers` holds prelude, core and coda in that order, so block numbers are 0-3, 4-5 and 6-9; a
    core block's weights serve every loop, and its sites are read in the first.
    """

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__(config)
        c, d = config, config.hidden_size
        self.num_prelude, self.num_core = c.num_prelude_layers, c.num_core_blocks
        self.embed_tokens = nn.Embedding(c.vocab_size, d)
        first_coda = self.num_prelude + self.num_core
        self.layers = nn.ModuleList(
            [Layer(c, i) for i in range(self.num_prelude)]
            + [CoreBlock(c) for _ in range(self.num_core)]
            + [Layer(c, first_coda + i) for i in range(c.num_coda_layers)]
        )
        self.anchor_norm = nn.RMSNorm(d, c.rms_norm_eps)
        self.kv_down = nn.Linear(d, c.kv_lora_rank, bias=False)
        self.latent_norm = nn.RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.depth_gate = nn.Parameter(torch.full((d,), GATE_INIT))
        self.state_proj = nn.Linear(d, c.mod_dim, bias=False)
        self.step_embed = nn.Embedding(c.max_loops, c.mod_dim)
        self.halt_head = nn.Linear(d, 1)
        self.norm = nn.RMSNorm(d, c.rms_norm_eps)
        self.post_init()

    @property
    def prelude(self) -> list[nn.Module]:
        return [*self.layers[: self.num_prelude]]

    @property
    def core(self) -> list[nn.Module]:
        return [*self.layers[self.num_prelude : self.num_prelude + self.num_core]]

    @property
    def coda(self) -> list[nn.Module]:
        return [*self.layers[self.num_prelude + self.num_core :]]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Past = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Past = None,
        num_loops: int | None = None,
        halt_threshold: float | None = None,
        exit_loops: Tensor | None = None,
        output_loop_states: bool = False,
        **kwargs: Any,
    ) -> DecoderOutput:
        """Run the decoder.

        attention_mask: [B S] of 0 and 1, or bool [B 1 T S] that says it all. num_loops: None means
        the config's. halt_threshold: None means the config's, math.inf that no token exits.
        exit_loops [B T]: replay these exits instead of asking the halt head. cache and
        past_key_values are one argument: transformers before 5.24 passes it by the second name.
        """
        del kwargs  # what generate passes for other architectures
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert isinstance(inputs_embeds, Tensor), "neither input_ids nor inputs_embeds"
        past = past_key_values if cache is None else cache
        if isinstance(past, StaticCache):
            raise UserError(
                "a static cache has room for whole sequences, and the core keeps one latent a "
                "token for all its loops: leave cache_implementation out"
            )
        if past is None and use_cache:
            past = DynamicCache()
        position_BT, mask = positions_and_mask(inputs_embeds, attention_mask, position_ids, past)
        rope = self.rope(position_BT)
        x_BTD = inputs_embeds
        for layer in self.prelude:
            x_BTD = layer(x_BTD, rope, mask, past)
        anchors = self._anchors(x_BTD, position_BT, past)
        loops = self.config.num_loops if num_loops is None else num_loops
        threshold = self.config.halt_threshold if halt_threshold is None else halt_threshold
        out = self._loop(
            x_BTD, anchors, rope, mask, loops, threshold, exit_loops, output_loop_states
        )
        assert out.last_hidden_state is not None
        out.last_hidden_state = self.read_out(out.last_hidden_state, position_BT, mask, past)
        if past is not None:
            out[CACHE] = past
        return out

    def read_out(
        self, h_BTD: Tensor, position_BT: Tensor, mask: Tensor, past: Past = None
    ) -> Tensor:
        """Return the final hidden states for a state of the loop: coda and norm."""
        rope = self.rope(position_BT)
        for layer in self.coda:
            h_BTD = layer(h_BTD, rope, mask, past)
        return self.norm(h_BTD)

    def rope(self, position_BT: Tensor) -> Rope:
        """Return the turns of positions, once for all layers and loops."""
        return rope_table(position_BT, self.config.head_dim, self.config.rope_theta)

    def _anchors(
        self, e_BTD: Tensor, position_BT: Tensor, past: Past
    ) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values [B H S d] of every core block.

        A transformers cache holds the latent as keys, and as values the positions: one slot for all
        blocks and loops. A SlotCache holds the keys and values themselves.
        """
        latent = self.latent_norm(self.kv_down(self.anchor_norm(e_BTD)))
        position = position_BT.expand(len(latent), -1)
        if isinstance(past, Cache):
            keys, values = past.update(
                latent[:, None], position[:, None, :, None].float(), self.num_prelude
            )
            latent, position = keys[:, 0], values[:, 0, :, 0]
        rope = self.rope(position.long())
        pairs = []
        for number, block in enumerate(self.core, start=self.num_prelude):
            attention = block.get_submodule("anchor_attn")
            assert isinstance(attention, AnchorAttention)
            k, v = attention.anchor(latent, rope)
            pairs.append(past.update(k, v, number) if isinstance(past, SlotCache) else (k, v))
        return pairs

    def _loop(
        self,
        e_BTD: Tensor,
        anchors: list[tuple[Tensor, Tensor]],
        rope: Rope,
        mask: Tensor,
        loops: int,
        threshold: float | None,
        replay_BT: Tensor | None,
        keep: bool,
    ) -> DecoderOutput:
        """Run the core. A token that exits keeps its state; rows that are done leave the batch."""
        B, T, _ = e_BTD.shape
        halts = replay_BT is not None or (threshold is not None and threshold < math.inf)
        h_BTD, h_bTD = e_BTD, e_BTD
        exit_BT = torch.full((B, T), loops, device=e_BTD.device)
        row_b = torch.arange(B, device=e_BTD.device)
        done_bT = torch.zeros(B, T, dtype=torch.bool, device=e_BTD.device)
        mask_b = mask.expand(B, -1, -1, -1)
        states, updates = [], []
        for t in range(loops):
            u_bTD = self._core_pass(h_bTD, anchors, rope, mask_b, t)
            new_bTD = self._gate(h_bTD, u_bTD)
            if not halts:
                h_bTD = new_bTD
            else:
                h_bTD = torch.where(done_bT[..., None], h_bTD, new_bTD)
                leave_bT = self._leaving(h_bTD, t, threshold, replay_BT, row_b) & ~done_bT
                exit_BT[row_b] = torch.where(leave_bT, t + 1, exit_BT[row_b])
                done_bT = done_bT | leave_bT
            if keep:
                states.append(h_bTD)
                updates.append(u_bTD)
            elif halts:
                alive_b = ~done_bT.all(1)
                left = int(alive_b.sum())
                if left == 0:
                    break
                if left < COMPACT_BELOW * len(row_b):
                    h_BTD = h_BTD.index_copy(0, row_b, h_bTD)
                    row_b, h_bTD, done_bT = row_b[alive_b], h_bTD[alive_b], done_bT[alive_b]
                    rope, mask_b = rope.rows(alive_b, len(alive_b)), mask_b[alive_b]
                    anchors = [(k[alive_b], v[alive_b]) for k, v in anchors]
        h_BTD = h_bTD if len(row_b) == B else h_BTD.index_copy(0, row_b, h_bTD)
        return DecoderOutput(
            last_hidden_state=h_BTD,
            exit_loops=exit_BT,
            loop_states=tuple(states) if keep else None,
            updates=tuple(updates) if keep else None,
        )

    def _core_pass(
        self,
        h_bTD: Tensor,
        anchors: list[tuple[Tensor, Tensor]],
        rope: Rope,
        mask_b: Tensor,
        t: int,
    ) -> Tensor:
        step_s = self.step_embed.weight[min(t, self.config.max_loops - 1)]
        style_bTs = F.silu(self.controller_input(h_bTD) + step_s)
        u_bTD = h_bTD
        for block, (k, v) in zip(self.core, anchors, strict=True):
            u_bTD = block(u_bTD, k, v, rope, mask_b, style_bTs)
        return u_bTD

    def controller_input(self, h_bTD: Tensor) -> Tensor:
        """Return what the modulation sees of the states: each token its own, never a pool."""
        return self.state_proj(h_bTD)

    def _gate(self, h_bTD: Tensor, u_bTD: Tensor) -> Tensor:
        """Return sigmoid(a) h + sigmoid(-a) u in float32; 1 - sigmoid(a) would underflow to 0."""
        a_D = self.depth_gate.float().clamp(-GATE_LIMIT, GATE_LIMIT)
        new = torch.sigmoid(a_D) * h_bTD.float() + torch.sigmoid(-a_D) * u_bTD.float()
        return new.to(h_bTD.dtype)

    def _leaving(
        self,
        h_bTD: Tensor,
        t: int,
        threshold: float | None,
        replay_BT: Tensor | None,
        row_b: Tensor,
    ) -> Bool[Tensor, "b T"]:
        if replay_BT is not None:
            return replay_BT[row_b] <= t + 1
        assert threshold is not None
        if t + 1 < self.config.min_loops:
            return torch.zeros(h_bTD.shape[:2], dtype=torch.bool, device=h_bTD.device)
        return self.halt_head(h_bTD)[..., 0].float().sigmoid() >= threshold


class RecursiveCausalLM(RecursivePreTrainedModel, GenerationMixin):
    """The decoder with its output head and its speculative heads.

    Example:
        model = RecursiveCausalLM(preset("tiny"))
        model(input_ids=ids_BT, num_loops=12).logits
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.model = RecursiveModel(config)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        self.speculative_projs = nn.ModuleList(
            nn.Linear(d, d) for _ in range(config.num_speculative_heads)
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Past = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Past = None,
        logits_to_keep: int = 0,
        num_loops: int | None = None,
        halt_threshold: float | None = None,
        exit_loops: Tensor | None = None,
        output_loop_states: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalOutput:
        """Return the logits of the last loop (`logits_to_keep` 0: all positions); see the decoder
        for num_loops, halt_threshold (generate takes both), exit_loops and output_loop_states.

        num_items_in_batch: of how many tokens the loss is a mean, where a Trainer gathers the
        gradients of several parts of a batch; None means of these.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_loops=num_loops,
            halt_threshold=halt_threshold,
            exit_loops=exit_loops,
            output_loop_states=output_loop_states,
            **kwargs,
        )
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            each, target = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            if num_items_in_batch is None:
                loss = F.cross_entropy(each, target)
            else:
                loss = F.cross_entropy(each, target, reduction="sum") / num_items_in_batch
        result = CausalOutput(
            loss=loss,
            logits=logits,
            exit_loops=out.exit_loops,
            loop_states=out.loop_states,
            updates=out.updates,
        )
        if CACHE in out:
            result[CACHE] = out[CACHE]
        return result

    def speculative_hidden(self, hidden: Float[Tensor, "*B D"], head: int) -> Tensor:
        """Return what the output head reads for speculative head 1, 2, ...: h + silu(P h + b).

        Head i predicts the token i places after the next one. At first it is the next token's.
        """
        return hidden + F.silu(self.speculative_projs[head - 1](hidden))


def _fresh(parameter: Tensor, value: float) -> None:
    """Fill a parameter, but not one that was loaded."""
    initialization.constant_(parameter, value)
