"""Policy: the model being trained, the reference beside it, and the value head on top.

With LoRA the reference is the same model with the adapter off; with full parameters it is a frozen
copy. Everything here runs with dropout at 0, and positions are always passed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from operando import parallel
from operando.errors import UserError
from operando.models.folders import save_folder
from operando.models.hooks import ActivationReader
from operando.models.layers import decoder_blocks, is_apart, is_multimodal, parse_layer_set
from operando.models.load import Loaded, head_weight, is_llama_like, lora_in_model_dtype, resolve
from operando.models.logprobs import HeadConfig, token_logps
from operando.models.lora import with_lora
from operando.models.packing import Pack, Packed, pack_rows, plan_micro_batches
from operando.models.prefix import Prefix, starting_at
from operando.models.recursive import RecursiveCausalLM
from operando.models.recursive.credit import LoopCredit, composite, hidden_by_loop, loop_weights
from operando.models.scoring import Said, Scored, Scoring, Tap, flat_rows
from operando.recipe.data import ModelConfig
from operando.run import SeedTree
from operando.types import Batch


class Policy:
    """The trained model with its reference and value head.

    Example:
        policy = Policy(load_model(config), config, SeedTree(0), reference=True)
        trace = policy.score(batch).trace    # old log-probs, reference log-probs, entropy
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
        loop_credit: LoopCredit = "last",
    ) -> None:
        self.config = config
        self.loop_credit: LoopCredit = loop_credit
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.identity = loaded.identity
        base = loaded.model
        if loop_credit != "last" and not isinstance(base, RecursiveCausalLM):
            raise UserError(
                f"update.loop_credit = {loop_credit!r} needs a recursive model; "
                f'{type(base).__name__} has no loops. Leave it out, or "last"'
            )
        self.blocks_name, self.blocks = decoder_blocks(base)
        self.layers = parse_layer_set(config.layers, len(self.blocks))
        # First trained block; what lies below it is computed once per batch. 0: nothing does.
        self.first_trained = self.layers[0] if is_llama_like(base) else 0
        self.head_config = HeadConfig(temperature, _softcap(base))
        _check_head(base, self.head_config._replace(temperature=1.0))
        self._frozen_copy: PreTrainedModel | None = None
        if config.lora is None:
            if reference:
                self._frozen_copy = copy.deepcopy(base).requires_grad_(False)
            _train_only(base, self.blocks_name, self.layers, len(self.blocks))
            self.model: PreTrainedModel | PeftModel = base
        else:
            self.model = with_lora(base, self.blocks_name, self.layers, config, seeds)
        self._recomputed = recomputed_blocks(base) if config.gradient_checkpointing else []
        self.base = base
        _check_dropout(base, self._recomputed)
        # Packs need an attention mask of their own; plain causal attention is sure to obey it.
        self.shares_prompts = is_llama_like(base) or isinstance(base, RecursiveCausalLM)
        self.device = base.device
        self.value_head: nn.Linear | None = None
        if value_head:
            self.value_head = nn.Linear(base.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            self.value_head.to(self.device)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return every parameter that an update may change, by name; not the value head."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def trains_everything(self) -> bool:
        """Return whether norms, embeddings and head are trained beside the blocks."""
        everything = self.config.lora is None and len(self.layers) == len(self.blocks)
        return everything and not is_multimodal(self.base.config)

    def value_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the value head; none without one."""
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

    def save_weights(self) -> dict[str, Tensor]:
        """Return what save_pretrained writes: adapter or all weights (collective if sharded)."""
        if isinstance(self.model, PeftModel):
            found = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        else:
            # Tied weights once, as transformers writes them.
            tied = self.base.all_tied_weights_keys
            found = {name: t for name, t in self.base.state_dict().items() if name not in tied}
        return {name: parallel.whole(t.detach()).cpu().contiguous() for name, t in found.items()}

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write a folder that plain PEFT (or transformers) loads."""
        if isinstance(self.model, PeftModel):
            config = self.model.peft_config["default"]
            config.inference_mode = True
            config.base_model_name_or_path = resolve(self.config.id)  # what AutoPeft can open here
            assert isinstance(config, LoraConfig), config
            if isinstance(config.target_modules, set):  # else each process has an order of its own
                config.target_modules = sorted(config.target_modules)
            config.save_pretrained(str(folder))
            config.inference_mode = False
            save_file(dict(weights), folder / "adapter_model.safetensors", {"format": "pt"})
        else:
            save_folder(folder, self.base, self.tokenizer, weights)

    def micro_batches(
        self, batch: Batch, rows: Sequence[int] | None, micro_tokens: int
    ) -> list[list[Pack]]:
        """Return the rows (None: all) as packs in micro-batches; the same rows, the same cut."""
        chosen = range(len(batch)) if rows is None else rows
        return plan_micro_batches(batch, chosen, micro_tokens, self.shares_prompts)

    def shard(self) -> None:
        """Shard the model over the ranks (FSDP2); LoRA needs float32 weights beside its own."""
        if self.config.lora is not None and self.base.dtype != torch.float32:
            raise UserError(
                f'parallel.kind = "fsdp" with LoRA needs model.dtype = "float32", got '
                f"{str(self.base.dtype).removeprefix('torch.')!r}; or use ddp"
            )
        self.first_trained = 0  # a sharded block is gathered whether it computes or not
        parallel.shard_model(self.base.get_decoder(), self.blocks)
        self.base.tie_weights()  # the head of a tied model is the sharded embedding again

    def new_prefix(self, first_group: int = 0) -> Prefix | None:
        """Return an empty prefix for a batch; None where nothing lies below the trained blocks."""
        return Prefix(self.first_trained, first_group) if self.first_trained else None

    def scored(self, batch: Batch, packs: Sequence[Pack], prefix: Prefix | None = None) -> Scored:
        """Return differentiable log-probs (and values) of packs, right-padded to the batch."""
        packed = pack_rows(batch, packs, self.device)
        with self._starting_at(self.blocks, prefix, batch, packs):
            hidden = self._hidden(packed)
        return self._head(self.base, hidden, packed, batch, packs)

    @torch.no_grad()
    def score(
        self,
        batch: Batch,
        *,
        rows: Sequence[int] | None = None,
        reference: bool = False,
        taps: Mapping[str, Tap] | None = None,
        micro_tokens: int = 4096,
        keep_graph: bool = False,
        prefix: Prefix | None = None,
    ) -> Scoring:
        """Return old log-probs, entropy, values, activations and reference log-probs of a batch.

        `rows` are those that this rank scores (None: all); the others stay zero. The old log-probs
        come from the same forward, cut the same way, as the update's: the first ratio is exactly 1.
        With `keep_graph`, a batch of one micro-batch is scored with its autograd graph, so that
        the first update need not run that forward again. A `prefix` that the sampler has filled
        spares the blocks below the first trained one. `taps` are read in a whole forward, in the
        policy and, with a reference, on the same ids in the frozen base too.
        """
        micro = parallel.same_length(self.micro_batches(batch, rows, micro_tokens))
        keep_graph = keep_graph and len(micro) == 1
        taps = taps or {}
        given = prefix if prefix is not None and prefix.rows and not taps else None
        prefix = given or self.new_prefix()
        below = f"blocks.{self.first_trained}.hook_resid_pre"
        sites = sorted({tap.site for tap in taps.values()})
        reader = ActivationReader(self.base, [*sites, below] if prefix and not given else sites)
        said = Said(batch, self.value_head is not None, self.loop_credit != "last", reference)
        graph: Scored | None = None
        for packs, counts in micro:
            packed = pack_rows(batch, packs, self.device)
            with (
                torch.set_grad_enabled(keep_graph),
                self._starting_at(self.blocks, given, batch, packs),
                reader.reading() as seen,
            ):
                scored = self._head(self.base, self._hidden(packed), packed, batch, packs)
            graph = scored if keep_graph else None
            if prefix is not None and given is None:
                prefix.store(batch, packs, seen[below])
            ref_logp_bT, base_seen = None, None
            if reference:
                start = None if taps else prefix
                ref_logp_bT, base_seen = self._score_reference(packed, batch, packs, start, sites)
            if counts:
                said.put(scored, ref_logp_bT, flat_rows(packs))
                said.put_acts(taps, seen, base_seen, packed, flat_rows(packs))
        return Scoring(said.trace(), graph, prefix)

    def _score_reference(
        self,
        packed: Packed,
        batch: Batch,
        packs: Sequence[Pack],
        prefix: Prefix | None,
        sites: Sequence[str],
    ) -> tuple[Float[Tensor, "n T"], Mapping[str, Float[Tensor, "b S D"]]]:
        """Return the frozen base's log-probs of packs, and what was read in it."""
        with (
            self.as_reference() as model,
            self._starting_at(decoder_blocks(model)[1], prefix, batch, packs),
            ActivationReader(model, sites).reading() as seen,
        ):
            hidden = [completion_hidden(model, packed)]
            logp_bT = self._head(model, hidden, packed, batch, packs).logp_BT
        return logp_bT.cpu(), seen

    def _starting_at(
        self, blocks: nn.ModuleList, prefix: Prefix | None, batch: Batch, packs: Sequence[Pack]
    ) -> AbstractContextManager[None]:
        if prefix is None:
            return nullcontext()
        return starting_at([*blocks], prefix.first, prefix.packed(batch, packs))

    def _hidden(self, packed: Packed) -> list[Float[Tensor, "N D"]]:
        """Return the final hidden states of the policy; with credit by loop, of every loop."""
        with _recomputing(self._recomputed):
            if self.loop_credit == "last":
                return [completion_hidden(self.base, packed)]
            assert isinstance(self.base, RecursiveCausalLM), type(self.base)
            with lora_in_model_dtype(self.base):
                return hidden_by_loop(self.base, packed)

    def _head(
        self,
        model: PreTrainedModel,
        hidden: Sequence[Float[Tensor, "N D"]],
        packed: Packed,
        batch: Batch,
        packs: Sequence[Pack],
    ) -> Scored:
        """Return what the head of the model that made the hidden states says of them.

        The states of earlier loops count for credit.
        """
        *earlier, hidden_ND = hidden
        rows = flat_rows(packs)
        where = (packed.row_N, packed.t_N)
        target_N = batch.completion_BT[rows].to(self.device)[where]
        weight_VD = parallel.whole(head_weight(model))
        flat = token_logps(hidden_ND, weight_VD, target_N, self.head_config)
        shape = (len(rows), batch.mask_BT.shape[1])
        value_BT = None
        if self.value_head is not None:
            value_N = self.value_head(hidden_ND.float())[:, 0]
            value_BT = hidden_ND.new_zeros(shape, dtype=torch.float32).index_put(where, value_N)
        zeros_BT = hidden_ND.new_zeros(shape, dtype=torch.float32)
        credit_BT = None
        if earlier:
            logps = [token_logps(h, weight_VD, target_N, self.head_config).logp_N for h in earlier]
            weight_R = loop_weights(self.loop_credit, len(hidden))
            credit_BT = zeros_BT.index_put(where, composite([*logps, flat.logp_N], weight_R))
        return Scored(
            zeros_BT.index_put(where, flat.logp_N),
            zeros_BT.index_put(where, flat.entropy_N),
            value_BT,
            credit_BT,
        )


def recomputed_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Set every block to be recomputed in the backward pass where its own flag says training.

    The modules inside stay in eval mode, so that no dropout acts.
    """
    blocks: list[nn.Module] = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    if not blocks:
        raise UserError(
            f"model.gradient_checkpointing: {type(model).__name__} can't recompute activations"
        )
    for block in blocks:
        recompute = partial(checkpoint, use_reentrant=False)
        vars(block).update(gradient_checkpointing=True, _gradient_checkpointing_func=recompute)
    return blocks


@contextmanager
def _recomputing(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Say training to these modules alone, for one forward; sampling is refused a cache by it."""
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


def completion_hidden(model: PreTrainedModel, packed: Packed) -> Float[Tensor, "N D"]:
    """Return the final hidden state before each completion token.

    A recursive model takes the loops that each token took when it was sampled: a halt decision at
    its threshold could fall otherwise here, and the log-prob would be another's.
    """
    replay = {} if packed.exit_bS is None else {"exit_loops": packed.exit_bS}
    with lora_in_model_dtype(model):
        out = model.get_decoder()(
            input_ids=packed.ids_bS,
            position_ids=packed.position_bS,
            attention_mask=packed.mask_b1SS,
            use_cache=False,
            **replay,
        )
    return out.last_hidden_state[packed.pack_N, packed.before_N]


def _train_only(
    model: PreTrainedModel, blocks_name: str, layers: tuple[int, ...], num_layers: int
) -> None:
    """Freeze every parameter outside the layer set; the set of all layers frees the whole model.

    Of a multimodal model it frees all decoder blocks: towers and embeddings stay as they are. Of a
    recursive model the halting and drafting heads stay, which no reward reaches.
    """
    if len(layers) == num_layers and not is_multimodal(model.config):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not is_apart(model, name))
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
    ids = torch.arange(1, 5, device=model.device)[None]
    theirs = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    ours = F.linear(hidden, head_weight(model)).float()
    if config.softcap is not None:
        ours = config.softcap * torch.tanh(ours / config.softcap)
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
    if gap > 1e-2:
        raise UserError(
            f"{type(model).__name__} turns hidden states into logits in a way operando does not "
            f"know (relative gap {gap:.3f}); its log-probs would be wrong"
        )


def _check_dropout(model: PreTrainedModel, recomputed: Sequence[nn.Module]) -> None:
    """Refuse a model whose training forward draws random numbers: its ratios would not be 1."""
    ids = torch.arange(1, 9, device=model.device)[None]
    seen: list[Tensor] = []
    for seed in (0, 1):
        with torch.random.fork_rng(), _recomputing(recomputed), torch.enable_grad():
            torch.manual_seed(seed)
            out = model.get_decoder()(input_ids=ids, use_cache=False)
            seen.append(out.last_hidden_state.detach().float())
    gap = float((seen[0] - seen[1]).abs().max() / seen[0].abs().max().clamp(min=1e-6))
    if gap > 1e-2:
        raise UserError(
            f"{type(model).__name__} draws random numbers in the training forward, as dropout does "
            f"(two passes differ by {gap:.1%}): old and new log-probs would be of different "
            "networks. Set its dropout to 0 in config.json, or model.gradient_checkpointing = false"
        )
