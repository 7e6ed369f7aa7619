"""Policy: the model being trained, the reference beside it, and the value head on top.

With LoRA the reference is the same model with the adapter off; with full parameters it is a frozen
copy. Everything here runs with dropout at 0, and positions are always passed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from operando import parallel
from operando.errors import UserError, nearest
from operando.models.hooks import ActivationReader
from operando.models.layers import decoder_blocks, parse_layer_set
from operando.models.load import Loaded
from operando.models.logprobs import (
    HeadConfig,
    completion_positions,
    micro_batches,
    token_logps,
)
from operando.recipe import ModelConfig
from operando.run import SeedTree
from operando.types import Batch, Trace


class Scored:
    """Log-probs of some rows of a batch, differentiable. logp_BT, entropy_BT, value_BT or None."""

    def __init__(
        self,
        logp_BT: Float[Tensor, "B T"],
        entropy_BT: Float[Tensor, "B T"],
        value_BT: Float[Tensor, "B T"] | None,
    ) -> None:
        self.logp_BT = logp_BT
        self.entropy_BT = entropy_BT
        self.value_BT = value_BT


class Policy:
    """The trained model with its reference and value head.

    Example:
        policy = Policy(load_model(config), config, SeedTree(0), reference=True)
        trace = policy.score(batch)          # old log-probs, reference log-probs, entropy
        scored = policy.scored(batch, rows)  # the same with a gradient
    """

    def __init__(
        self,
        loaded: Loaded,
        config: ModelConfig,
        seeds: SeedTree,
        *,
        reference: bool = False,
        value_head: bool = False,
        temperature: float = 1.0,
    ) -> None:
        self.config = config
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.identity = loaded.identity
        base = loaded.model
        self.blocks_name, self.blocks = decoder_blocks(base)
        self.layers = parse_layer_set(config.layers, len(self.blocks))
        self.head_config = HeadConfig(temperature, _softcap(base))
        _check_head(base, self.head_config._replace(temperature=1.0))
        self._frozen_copy: PreTrainedModel | None = None
        if config.lora is None:
            if reference:
                self._frozen_copy = copy.deepcopy(base).requires_grad_(False)
            _train_only(base, self.blocks_name, self.layers, len(self.blocks))
            self.model: PreTrainedModel | PeftModel = base
        else:
            self.model = _with_lora(base, self.blocks_name, self.layers, config, seeds)
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.train()
        self.base = base
        self.device = next(base.parameters()).device
        self.value_head: nn.Linear | None = None
        if value_head:
            self.value_head = nn.Linear(base.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            self.value_head.to(self.device)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return every parameter that an update may change, by name; not the value head."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def value_parameters(self) -> list[nn.Parameter]:
        return list(self.value_head.parameters()) if self.value_head is not None else []

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """Give the reference model: adapter off, or the frozen copy."""
        if self._frozen_copy is not None:
            yield self._frozen_copy
        elif isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.base
        else:
            raise UserError("a reference was asked for, but the policy was made without one")

    def scored(self, batch: Batch, rows: Sequence[int], entropy: bool = True) -> Scored:
        """Return differentiable log-probs (and values) of some rows, right-padded to the batch."""
        del entropy
        hidden_ND, where = self._completion_hidden(self.base, batch, rows)
        return self._head(hidden_ND, where, batch, rows)

    @torch.no_grad()
    def score(
        self,
        batch: Batch,
        *,
        reference: bool = False,
        sites: Sequence[str] = (),
        micro_tokens: int = 8192,
    ) -> Trace:
        """Return old log-probs, entropy, values, activations and reference log-probs of a batch.

        The old log-probs come from the same forward that the update runs, so that the first ratio
        is exactly 1.
        """
        rows_of = parallel.same_length(micro_batches(row_lengths(batch), micro_tokens))
        logp_BT = torch.zeros(batch.mask_BT.shape)
        entropy_BT, ref_logp_BT = torch.zeros_like(logp_BT), torch.zeros_like(logp_BT)
        value_BT = torch.zeros_like(logp_BT) if self.value_head is not None else None
        acts: dict[str, Tensor] = {}
        for rows, counts in rows_of:
            reader = ActivationReader(self.base, sites)
            with reader.reading() as seen:
                hidden_ND, where = self._completion_hidden(self.base, batch, rows)
            scored = self._head(hidden_ND, where, batch, rows)
            if reference:
                with self.as_reference() as model:
                    ref_ND, where = self._completion_hidden(model, batch, rows)
                    ref_logp_BT[rows] = self._head(ref_ND, where, batch, rows).logp_BT.cpu()
            if not counts:
                continue
            logp_BT[rows] = scored.logp_BT.cpu()
            entropy_BT[rows] = scored.entropy_BT.cpu()
            if value_BT is not None and scored.value_BT is not None:
                value_BT[rows] = scored.value_BT.cpu()
            for site, acts_bSD in seen.items():
                _store_acts(acts, site, acts_bSD, batch, rows)
        return Trace(logp_BT, entropy_BT, ref_logp_BT if reference else None, value_BT, acts)

    def _completion_hidden(
        self, model: PreTrainedModel, batch: Batch, rows: Sequence[int]
    ) -> tuple[Float[Tensor, "N D"], tuple[Tensor, Tensor]]:
        """Return the final hidden state before each completion token, and (row, t) of each."""
        index = torch.tensor(rows)
        lengths = batch.prompt_len_B[index] + batch.mask_BT[index].sum(1)
        ids_bS = batch.ids_BS[index, : int(lengths.max())].to(self.device)
        hidden_bSD = body_hidden(model, ids_bS)
        row_N, t_N, s_N = completion_positions(batch.prompt_len_B[index], batch.mask_BT[index])
        hidden_ND = hidden_bSD[row_N.to(self.device), (s_N - 1).to(self.device)]
        return hidden_ND, (row_N.to(self.device), t_N.to(self.device))

    def _head(
        self,
        hidden_ND: Float[Tensor, "N D"],
        where: tuple[Tensor, Tensor],
        batch: Batch,
        rows: Sequence[int],
    ) -> Scored:
        target_N = batch.completion_BT[torch.tensor(rows)].to(self.device)[where]
        weight_VD = parallel.whole(self.base.get_output_embeddings().weight)
        flat = token_logps(hidden_ND, weight_VD, target_N, self.head_config)
        shape = (len(rows), batch.mask_BT.shape[1])
        value_BT = None
        if self.value_head is not None:
            value_N = self.value_head(hidden_ND.float())[:, 0]
            value_BT = hidden_ND.new_zeros(shape, dtype=torch.float32).index_put(where, value_N)
        zeros_BT = hidden_ND.new_zeros(shape, dtype=torch.float32)
        return Scored(
            zeros_BT.index_put(where, flat.logp_N),
            zeros_BT.index_put(where, flat.entropy_N),
            value_BT,
        )


def body_hidden(model: PreTrainedModel, ids_BS: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
    """Return the decoder's last hidden states. Rows are right-padded, so causality is the mask."""
    position_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
    decoder = model.get_decoder()
    out = decoder(input_ids=ids_BS, position_ids=position_BS, use_cache=False)
    return out.last_hidden_state


def row_lengths(batch: Batch) -> list[int]:
    """Return the number of real tokens (prompt and completion) of each row."""
    return (batch.prompt_len_B + batch.mask_BT.sum(1)).tolist()


def _store_acts(
    acts: dict[str, Tensor],
    site: str,
    acts_bSD: Float[Tensor, "b S D"],
    batch: Batch,
    rows: Sequence[int],
) -> None:
    index = torch.tensor(rows)
    row_N, t_N, s_N = completion_positions(batch.prompt_len_B[index], batch.mask_BT[index])
    if site not in acts:
        acts[site] = torch.zeros(*batch.mask_BT.shape, acts_bSD.shape[-1])
    acts[site][index[row_N], t_N] = acts_bSD.cpu()[row_N, s_N].float()


def _with_lora(
    base: PreTrainedModel,
    blocks_name: str,
    layers: tuple[int, ...],
    config: ModelConfig,
    seeds: SeedTree,
) -> PeftModel:
    lora = config.lora
    assert lora is not None
    names = {n.rpartition(".")[2] for n, m in base.named_modules() if _is_linear(m)}
    for target in lora.targets:
        if target not in names:
            raise UserError(
                f"model.lora.targets: {target!r} is no linear module of this model."
                f"{nearest(target, names)} It has: {', '.join(sorted(names))}"
            )
    _, blocks = decoder_blocks(base)
    some = set(layers) != set(range(len(blocks)))
    with torch.random.fork_rng():
        torch.manual_seed(seeds.derive("model", "lora"))
        model = get_peft_model(
            base,
            PeftLoraConfig(
                task_type="CAUSAL_LM",
                r=lora.rank,
                lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # pyright: ignore[reportArgumentType]
                lora_dropout=0.0,
                target_modules=list(lora.targets),
                layers_to_transform=list(layers) if some else None,
                layers_pattern=blocks_name.rpartition(".")[2] if some else None,
            ),
        )
    assert isinstance(model, PeftModel)
    return model.eval()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def _train_only(
    model: PreTrainedModel, blocks_name: str, layers: tuple[int, ...], num_layers: int
) -> None:
    """Freeze every parameter outside the layer set; the set of all layers frees the whole model."""
    if len(layers) == num_layers:
        model.requires_grad_(True)
        return
    inside = tuple(f"{blocks_name}.{i}." for i in layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(inside))


def _softcap(model: PreTrainedModel) -> float | None:
    config = model.config.get_text_config()
    return config.final_logit_softcapping if "final_logit_softcapping" in config else None


@torch.no_grad()
def _check_head(model: PreTrainedModel, config: HeadConfig) -> None:
    """Refuse a model whose logits are not head(hidden): its log-probs would be wrong here."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise UserError(f"{type(model).__name__}: needs an output head without bias")
    device = next(model.parameters()).device
    ids = torch.arange(1, 5, device=device)[None]
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    ours = F.linear(body_hidden(model, ids), head.weight).float()
    if config.softcap is not None:
        ours = config.softcap * torch.tanh(ours / config.softcap)
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
    if gap > 1e-2:
        raise UserError(
            f"{type(model).__name__} turns hidden states into logits in a way operando does not "
            f"know (relative gap {gap:.3f}); its log-probs would be wrong"
        )
