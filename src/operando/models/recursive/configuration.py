"""The shape of a RecursiveCausalLM, its presets, and its parameters by formula."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from operando.errors import UserError, nearest

MODULATED = 5  # modulated matrices of a core block: q, o, gate, up, down


class RecursiveConfig(PreTrainedConfig):
    """Config of a RecursiveCausalLM.

    A token passes `num_prelude_layers` layers, `num_loops` times the `num_core_blocks` core blocks,
    and `num_coda_layers` layers. `halt_threshold` None means that every token takes every loop;
    `draft_tokens` is how many speculative heads draft in operando's engine (0: none).

    Example: RecursiveConfig(hidden_size=64, num_attention_heads=4, num_loops=8)
    """

    model_type = "recursive_causal_lm"

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        intermediate_size: int = 128,
        core_intermediate_size: int = 128,
        num_prelude_layers: int = 4,
        num_core_blocks: int = 2,
        num_coda_layers: int = 4,
        num_loops: int = 8,
        max_loops: int = 32,
        kv_lora_rank: int = 16,
        mod_rank: int = 4,
        mod_dim: int = 16,
        num_speculative_heads: int = 4,
        halt_threshold: float | None = None,
        min_loops: int = 1,
        draft_tokens: int = 0,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10_000.0,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.core_intermediate_size = core_intermediate_size
        self.num_prelude_layers = num_prelude_layers
        self.num_core_blocks = num_core_blocks
        self.num_coda_layers = num_coda_layers
        self.num_hidden_layers = num_prelude_layers + num_core_blocks + num_coda_layers
        self.num_loops = num_loops
        self.max_loops = max_loops
        self.kv_lora_rank = kv_lora_rank
        self.mod_rank = mod_rank
        self.mod_dim = mod_dim
        self.num_speculative_heads = num_speculative_heads
        self.halt_threshold = halt_threshold
        self.min_loops = min_loops
        self.draft_tokens = draft_tokens
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.initializer_range = initializer_range
        self._check_shape()
        for key in ("num_hidden_layers", "head_dim", "model_type"):
            kwargs.pop(key, None)  # they follow from the others
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)

    def _check_shape(self) -> None:
        """Refuse a shape that the forward could not run, or a setting that could mean nothing."""
        heads, loops = self.num_attention_heads, self.num_loops
        narrow = min(self.hidden_size, self.core_intermediate_size)
        threshold = self.halt_threshold
        rules = {
            f"num_attention_heads = {heads} must divide hidden_size = {self.hidden_size} into "
            "heads of an even size": heads > 0 and self.hidden_size % (2 * heads) == 0,
            f"num_key_value_heads = {self.num_key_value_heads} must divide num_attention_heads = "
            f"{heads}": self.num_key_value_heads > 0 and heads % self.num_key_value_heads == 0,
            f"mod_rank = {self.mod_rank} must be 1 to {narrow}, a core matrix's smaller side": 1
            <= self.mod_rank
            <= narrow,
            f"num_core_blocks = {self.num_core_blocks} must be at least 1": self.num_core_blocks
            > 0,
            f"num_loops = {loops} must be 1 to max_loops = {self.max_loops}": 1
            <= loops
            <= self.max_loops,
            f"min_loops = {self.min_loops} must be 1 to num_loops = {loops}": 1
            <= self.min_loops
            <= loops,
            f"draft_tokens = {self.draft_tokens} must be 0 to num_speculative_heads = "
            f"{self.num_speculative_heads}": 0 <= self.draft_tokens <= self.num_speculative_heads,
            f"halt_threshold = {threshold} is compared with a probability: above 0 and at most 1, "
            "or None": threshold is None or 0 < threshold <= 1,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise UserError(f"RecursiveConfig: {'; '.join(broken)}")


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "200m": {
        "vocab_size": 32_768,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 2816,
        "core_intermediate_size": 1024,
        "kv_lora_rank": 256,
        "mod_rank": 22,
        "mod_dim": 64,
        "tie_word_embeddings": False,
    },
}


def preset(name: str, **changes: Any) -> RecursiveConfig:
    """Return a preset's config, with changes. Example: preset("tiny", vocab_size=258)"""
    if name not in PRESETS:
        raise UserError(
            f"no recursive preset {name!r}.{nearest(name, PRESETS)} Presets: {', '.join(PRESETS)}"
        )
    return RecursiveConfig(**(PRESETS[name] | changes))


class ParameterCount(NamedTuple):
    """Numbers that are stored, with the frozen bases, and that a token meets in all its loops.

    unrolled = stored + (R - 1) * core: the core's blocks and bases once for every loop; the keys
    and values, computed once, count once.
    """

    stored: int
    unrolled: int
    core: int


def count_parameters(config: RecursiveConfig) -> ParameterCount:
    """Return the counts by formula. Example: count_parameters(preset("200m")).stored"""
    c, d, r = config, config.hidden_size, config.mod_rank
    narrow = c.num_key_value_heads * c.head_dim
    layer = 2 * d + 2 * d * d + 2 * d * narrow + 3 * d * c.intermediate_size
    f = c.core_intermediate_size
    bases = 2 * r * (d + d) + 3 * r * (d + f)
    core = c.num_core_blocks * (2 * d + 2 * d * d + 3 * d * f + bases)
    anchor = d + d * c.kv_lora_rank + c.kv_lora_rank + c.num_core_blocks * 2 * c.kv_lora_rank * d
    controller = c.mod_dim * (d + c.max_loops + c.num_core_blocks * MODULATED * r)
    loop = d + (d + 1)  # the depth gate and the halt head
    embedding = c.vocab_size * d * (1 if c.tie_word_embeddings else 2) + d
    speculative = c.num_speculative_heads * (d * d + d)
    layers = (c.num_prelude_layers + c.num_coda_layers) * layer
    stored = layers + core + anchor + controller + loop + embedding + speculative
    return ParameterCount(stored, stored + (c.num_loops - 1) * core, core)


class TokenCost(NamedTuple):
    """Multiply-adds of one token, without attention's growth with length."""

    core: int  # of all R loops
    rest: int  # prelude, anchor, coda and head


def token_cost(config: RecursiveConfig) -> TokenCost:
    """Return what a token costs at full depth."""
    c, d = config, config.hidden_size
    narrow = c.num_key_value_heads * c.head_dim
    layer = 2 * d * d + 2 * d * narrow + 3 * d * c.intermediate_size
    bases = 2 * c.mod_rank * (d + d) + 3 * c.mod_rank * (d + c.core_intermediate_size)
    block = 2 * d * d + 3 * d * c.core_intermediate_size + bases
    modulation = c.mod_dim * (d + c.num_core_blocks * MODULATED * c.mod_rank) + d
    anchor = d * c.kv_lora_rank * (1 + 2 * c.num_core_blocks)
    layers = (c.num_prelude_layers + c.num_coda_layers) * layer
    core = c.num_loops * (c.num_core_blocks * block + modulation)
    return TokenCost(core, layers + anchor + c.vocab_size * d)
