"""Bytes that a run takes, from the model's config and the recipe alone: estimated before taken.

For dense models of the Llama family. What autograd saves is counted from the shapes; the test
compares the count with what it does save. Dims: D d_model, F width of the MLP, H query heads,
K key-value heads, d head width, V vocabulary, L blocks, r rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from operando.errors import UserError
from operando.models.layers import parse_layer_set
from operando.models.logprobs import LOGITS_BYTES
from operando.models.packing import SHARED_TOKENS
from operando.recipe.data import ModelConfig
from operando.recipe.run import Recipe

GIB = 2**30
OVERHEAD = 3 * GIB // 2  # CUDA's context, its libraries and what the allocator can't use
NF4_BYTES = 0.5 + 4 / 64  # four bits a weight, and a float32 scale for 64 of them
FAMILY = ("llama", "qwen2", "qwen3", "gemma")
BYTES = {"auto": 4, "float32": 4, "bfloat16": 2}  # "auto", not yet settled: the larger


class Shapes(NamedTuple):
    """The shapes of a dense Llama-family model. Example: shapes_of(config).kv_bytes(2)"""

    D: int
    F: int
    H: int
    K: int
    d: int
    V: int
    L: int
    bias: int  # numbers in the biases of one block
    qk_norm: bool
    tied: bool

    def linear(self) -> dict[str, tuple[int, int]]:
        """Return the inputs and outputs of each linear module of a block."""
        q, kv = self.H * self.d, self.K * self.d
        return {
            "q_proj": (self.D, q),
            "k_proj": (self.D, kv),
            "v_proj": (self.D, kv),
            "o_proj": (q, self.D),
            "gate_proj": (self.D, self.F),
            "up_proj": (self.D, self.F),
            "down_proj": (self.F, self.D),
        }

    def block(self) -> int:
        """Return the number of parameters of a block."""
        norms = 2 * self.D + (2 * self.d if self.qk_norm else 0)
        return sum(i * o for i, o in self.linear().values()) + norms + self.bias

    def parameters(self) -> int:
        """Return the number of parameters; a tied embedding counts once."""
        return self.L * self.block() + self.V * self.D * (1 if self.tied else 2) + self.D


class Memory(NamedTuple):
    """Bytes of a run by part, and the sums that are alive together.

    Example: estimate(config, recipe, prompt_tokens=512, device="cuda").update / GIB
    """

    weights: int
    reference: int
    gradients: int
    moments: int
    copies: int  # of the trained weights before the step, and the difference
    activations: int
    logits: int
    cache: int
    sampling_logits: int

    @property
    def resident(self) -> int:
        """Weights, reference and moments: what stays from the first update on."""
        return self.weights + self.reference + self.moments

    @property
    def sampling(self) -> int:
        """The peak while completions are sampled."""
        return self.resident + self.cache + self.sampling_logits

    @property
    def update(self) -> int:
        """The peak of an update: in the backward pass, or in the optimizer's step."""
        backward = self.activations + self.logits
        return self.resident + self.gradients + max(backward, self.copies)


def shapes_of(config: PreTrainedConfig) -> Shapes | None:
    """Return the shapes of a dense Llama-family model; None of another architecture."""
    if config.model_type not in FAMILY:
        return None
    told = config.to_dict()
    H, D = told["num_attention_heads"], told["hidden_size"]
    K, d = told.get("num_key_value_heads") or H, told.get("head_dim") or D // H
    bias = (H + 2 * K) * d if config.model_type == "qwen2" else 0
    if config.model_type != "qwen2" and told.get("attention_bias"):
        bias = (H + 2 * K) * d + D
    if told.get("mlp_bias"):
        bias += 2 * told["intermediate_size"] + D
    return Shapes(
        D,
        told["intermediate_size"],
        H,
        K,
        d,
        told["vocab_size"],
        told["num_hidden_layers"],
        bias,
        config.model_type == "qwen3",
        bool(config.tie_word_embeddings),
    )


def saved_by_block(shapes: Shapes, model: ModelConfig, seen: int) -> int:
    """Return the bytes a token that autograd saves in one block; `seen`: tokens of its sequence.

    Siblings that share a prompt need a mask: keys and values are then repeated for every query
    head, and the mask is kept as numbers, one for each token that could be seen.
    """
    e, wide = BYTES[model.dtype], 4
    q, kv = shapes.H * shapes.d, shapes.K * shapes.d
    mlp = 4 * shapes.F * e  # gate, its activation, up, their product
    attention = 4 * q * e + 4 * shapes.H + seen * e  # q, k, v, out; log-sum-exp; mask
    norms = 2 * shapes.D * (wide + e) + 2 * wide  # each: its input in float32, its output, 1/rms
    if shapes.qk_norm:
        norms += (q + kv) * wide + (shapes.H + shapes.K) * wide
    if model.lora is None:  # the norms' weights are trained: their normed inputs too
        norms += 2 * shapes.D * wide + ((q + kv) * wide if shapes.qk_norm else 0)
        return mlp + attention + norms
    inside = [name for name in model.lora.targets if name in shapes.linear()]
    return mlp + attention + norms + len(inside) * model.lora.rank * e


def activation_bytes(shapes: Shapes, model: ModelConfig, tokens: int, seen: int) -> int:
    """Return the bytes alive in the backward pass of one micro-batch of so many tokens.

    Blocks below the first trained one save nothing. Recomputed blocks save their input, and one of
    them at a time everything.
    """
    blocks = shapes.L - parse_layer_set(model.layers, shapes.L)[0]
    e = BYTES[model.dtype]
    block = saved_by_block(shapes, model, seen)
    # The last norm's input, where trained its normed input; gradients on their way through a block.
    apart = shapes.D * 4 * (2 if model.lora is None else 1)
    apart += 3 * shapes.F * e + 2 * shapes.D * e
    if model.gradient_checkpointing:
        return tokens * (blocks * shapes.D * e + block + apart)
    return tokens * (blocks * block + apart)


def trained_parameters(shapes: Shapes, model: ModelConfig) -> int:
    """Return the number of weights that an update may change."""
    layers = len(parse_layer_set(model.layers, shapes.L))
    if model.lora is None:
        return shapes.parameters() if layers == shapes.L else layers * shapes.block()
    pairs = [shapes.linear()[t] for t in model.lora.targets if t in shapes.linear()]
    return layers * model.lora.rank * sum(i + o for i, o in pairs)


def weight_bytes(shapes: Shapes, model: ModelConfig) -> int:
    """Return the bytes of the model as it is loaded, without LoRA."""
    e = BYTES[model.dtype]
    if model.quantization == "none":
        return shapes.parameters() * e
    packed = shapes.L * sum(i * o for i, o in shapes.linear().values())
    return int(packed * NF4_BYTES) + (shapes.parameters() - packed) * e


def estimate(
    config: PreTrainedConfig, recipe: Recipe, prompt_tokens: int, device: str, processes: int = 1
) -> Memory | None:
    """Return the bytes of a recipe's run on one device ("cpu", "cuda"), its longest prompt known.

    None where they can't be told: another architecture, or weights sharded over processes.
    """
    shapes = shapes_of(config)
    if shapes is None or (recipe.parallel.kind == "fsdp" and processes > 1):
        return None
    model, rollout = recipe.model, recipe.rollout
    e, group, new = BYTES[model.dtype], rollout.num_generations, rollout.max_completion_length
    trained = trained_parameters(shapes, model)
    weights = weight_bytes(shapes, model) + (4 * trained if model.lora is not None else 0)
    full = model.lora is None
    width = prompt_tokens + max(new, min(group * new, max(SHARED_TOKENS, prompt_tokens)))
    rows = rollout.num_prompts // processes * group
    tokens = min(max(recipe.update.micro_tokens, width), rows * (prompt_tokens + new))
    at_once = min(max(1, rollout.max_batch // group) * group, rows)
    asked = min(rollout.max_batch, recipe.eval.num)
    spoken = max(at_once * (prompt_tokens + new), asked * (prompt_tokens + _answer(recipe)))
    chunk = min(LOGITS_BYTES[device], 4 * shapes.V * tokens)
    frozen_below = parse_layer_set(model.layers, shapes.L)[0] > 0
    prefix = rows * (prompt_tokens + new) * shapes.D * e if frozen_below else 0
    return Memory(
        weights=weights,
        reference=weight_bytes(shapes, model) if full and recipe.kl is not None else 0,
        gradients=4 * trained,
        moments=8 * trained,
        copies=8 * trained,
        # 16-bit copies of LoRA's factors, or the head's gradient while it is summed
        activations=activation_bytes(shapes, model, tokens, width)
        + (4 * shapes.V * shapes.D if full else (2 * trained if e == 2 else 0))
        + prefix,
        logits=3 * chunk,
        cache=spoken * shapes.L * 2 * shapes.K * shapes.d * e + prefix,
        sampling_logits=max(at_once, asked) * shapes.V * (e + 12),
    )


def _answer(recipe: Recipe) -> int:
    return recipe.eval.max_completion_length or recipe.rollout.max_completion_length


def fits(memory: Memory, room: int) -> bool:
    """Return whether both peaks lie within so many bytes, CUDA's own taken off."""
    return max(memory.sampling, memory.update) + OVERHEAD <= room


def check_memory(recipe: Recipe, told: Callable[[Recipe], Memory], room: int, where: str) -> None:
    """Raise for a recipe whose estimate is over `room` bytes, with the key and value that fit."""
    memory = told(recipe)
    if fits(memory, room):
        return
    problems = []
    if memory.sampling + OVERHEAD > room:
        tries = [2**n for n in range(20) if 2**n < recipe.rollout.max_batch]
        small = [n for n in tries if n >= recipe.rollout.num_generations]
        best = _largest(small, lambda n: told(_with(recipe, "rollout", max_batch=n)).sampling, room)
        problems.append(
            f"sampling takes about {_readable(memory.sampling)}: "
            + (
                f"set rollout.max_batch = {best} (now {recipe.rollout.max_batch})"
                if best
                else "no rollout.max_batch fits; lower rollout.max_completion_length"
            )
        )
    if memory.update + OVERHEAD > room:
        small = [2**n for n in range(8, 20) if 2**n < recipe.update.micro_tokens]
        best = _largest(small, lambda n: told(_with(recipe, "update", micro_tokens=n)).update, room)
        ways = [f"update.micro_tokens = {best} (now {recipe.update.micro_tokens})"] if best else []
        again = _with(recipe, "model", gradient_checkpointing=True)
        if not recipe.model.gradient_checkpointing and told(again).update + OVERHEAD <= room:
            ways.append("model.gradient_checkpointing = true")
        problems.append(
            f"the update takes about {_readable(memory.update)}: "
            + (f"set {' or '.join(ways)}" if ways else _smaller(recipe))
        )
    raise UserError(
        f"{where} has {room / GIB:.1f} GiB, {OVERHEAD / GIB:.1f} of them CUDA's own, and this "
        f"recipe needs more. By estimate, {'; '.join(problems)}"
    )


def _largest(tries: list[int], needed: Callable[[int], int], room: int) -> int | None:
    return max((n for n in tries if needed(n) + OVERHEAD <= room), default=None)


def _with(recipe: Recipe, table: str, **values: object) -> Recipe:
    part = getattr(recipe, table).model_copy(update=values)
    return recipe.model_copy(update={table: part})


def _smaller(recipe: Recipe) -> str:
    if recipe.model.lora is None:
        return 'add model.lora (with model.dtype = "bfloat16"), or choose a smaller model'
    return "choose a smaller model, or fewer model.layers"


def small_machine(memory: Memory, room: int) -> list[str]:
    """Return a warning where a CPU's memory is clearly less than the estimate."""
    peak = max(memory.sampling, memory.update)
    if peak <= 1.5 * room:
        return []
    return [
        f"memory: by estimate this recipe takes {peak / GIB:.1f} GiB, and the machine has "
        f"{room / GIB:.1f} available: lower update.micro_tokens or rollout.max_batch"
    ]


def memory_lines(memory: Memory) -> list[str]:
    """Return a table of the estimate: the parts, then both peaks."""
    named = {
        "weights, LoRA included": memory.weights,
        "reference": memory.reference,
        "gradients": memory.gradients,
        "AdamW's moments": memory.moments,
        "activations of a micro-batch": memory.activations,
        "logits of a chunk": memory.logits,
        "keys and values": memory.cache,
        "logits in sampling": memory.sampling_logits,
        "peak of sampling": memory.sampling,
        "peak of update": memory.update,
    }
    rows = [f"  {name:<30}{_readable(size):>10}" for name, size in named.items() if size]
    return ["memory (estimate)", *rows]


def _readable(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def available(device: torch.device) -> int | None:
    """Return the bytes of a CUDA device, or what the machine can still give; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            told = dict(line.split(":", 1) for line in file)
    except FileNotFoundError:
        return None  # not Linux
    return int(told["MemAvailable"].split()[0]) * 1024
