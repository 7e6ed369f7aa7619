"""A GGUF file as a float32 model: every key and every tensor is used, or the file is refused.

What a file says and nobody reads is a wrong model without a word: rope scaling that is dropped
turns every position wrongly. So configuration and names are written out here for the served
architectures, and what is left over is an error.

The layout is llama.cpp's (convert_hf_to_gguf.py): Llama's q and k have their rotary pairs side by
side, Gemma's norms hold 1 + w, Llama 3's rotary factors travel as the tensor `rope_freqs.weight`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from operando.errors import UserError, nearest

ROPE_FREQS = "rope_freqs.weight"
UNQUANTISED = {0, 1, 28, 30}  # gguf's numbers of float32, float16, float64, bfloat16
LOCAL_THETA = 10_000.0  # of Gemma 3's sliding layers; llama.cpp has it in its code, not in the file
SAME_MATRIX = 0.1  # Q5_0 against Q8_0 of one matrix is 0.044, two matrices of their own are 1.4
GEMMA3_PERIOD = 6  # every sixth layer of Gemma 3 sees everything; likewise
# Namespaces that say nothing about the numbers, and what the tokenizer's conversion reads.
BOOKKEEPING = ("general.", "GGUF.", "quantize.", "tokenizer.chat_template", "tokenizer.hugging")
TOKENIZER = {
    f"tokenizer.ggml.{key}"
    for key in (
        "model",
        "pre",
        "tokens",
        "token_type",
        "merges",
        "scores",
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
    )
}
TOKEN_ID = re.compile(r"tokenizer\.ggml\.\w+_token_id")
# Keys that llama.cpp's converter writes although they say nothing where they have these values.
INERT: dict[str, tuple[object, ...]] = {
    "tokenizer.ggml.add_sep_token": (False,),
    "tokenizer.ggml.remove_extra_whitespaces": (False,),
    "qwen2.use_parallel_residual": (True, False),  # of another architecture's converter
}

# rope.scaling.*: values that leave yarn as transformers computes it.
PLAIN_SCALING = {
    "attn_factor": (1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_ext_factor": (1.0, -1.0),
    "yarn_log_multiplier": (0.0,),
}

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3_LAYER = LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class Architecture(NamedTuple):
    """How an architecture's file differs from Llama's."""

    config: type[PreTrainedConfig]
    layer: dict[str, str] = LAYER
    pairs_side_by_side: bool = False  # q and k
    norm_plus_one: bool = False
    tied: bool = False  # the head is the embedding, always


SERVED = {
    "llama": Architecture(LlamaConfig, pairs_side_by_side=True),
    "qwen2": Architecture(Qwen2Config),
    "qwen3": Architecture(Qwen3Config),
    "gemma": Architecture(GemmaConfig, norm_plus_one=True, tied=True),
    "gemma3": Architecture(Gemma3TextConfig, GEMMA3_LAYER, norm_plus_one=True, tied=True),
}


@dataclass
class GgufFile:
    """Keys and tensors of a file; what has been read is remembered.

    Example: GgufFile.open(Path("x.gguf")).take("llama.block_count")
    """

    path: Path
    keys: dict[str, object]
    tensors: dict[str, Callable[[], Tensor]]
    raw: dict[str, tuple[int, np.ndarray]]  # quantisation type and bytes
    used: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Return a file's keys and tensors; nothing is converted yet."""
        import gguf

        reader = gguf.GGUFReader(str(path))
        keys = {name: entry.contents() for name, entry in reader.fields.items()}

        def tensor(found: gguf.ReaderTensor) -> Callable[[], Tensor]:
            return lambda: torch.from_numpy(
                np.array(gguf.quants.dequantize(found.data, found.tensor_type), np.float32)
            )

        return cls(
            path,
            keys,
            {found.name: tensor(found) for found in reader.tensors},
            {found.name: (int(found.tensor_type), found.data) for found in reader.tensors},
        )

    @property
    def architecture(self) -> str:
        return str(self.keys["general.architecture"])

    @cached_property
    def tied(self) -> str | None:
        """The tensor that is both embedding and head; None where the head is a matrix of its own.

        A tied model has no `output.weight`, or one that is a second copy of the embedding. Two
        copies that were quantised apart differ: they are taken for one matrix if |head - embedding|
        is at most SAME_MATRIX of |head|, and the copy of more bytes, the nearer one, is kept.
        """
        if "output.weight" not in self.tensors:
            return "token_embd.weight"
        (one, embedding), (other, head) = self.raw["token_embd.weight"], self.raw["output.weight"]
        if embedding.shape[0] != head.shape[0]:
            return None
        if one == other and np.array_equal(embedding, head):
            return "token_embd.weight"
        if {one, other} <= UNQUANTISED:
            return None
        apart, whole = 0.0, 0.0
        for e_rD, h_rD in zip(_in_parts(one, embedding), _in_parts(other, head), strict=True):
            apart += float(np.square(h_rD - e_rD, dtype=np.float64).sum())
            whole += float(np.square(h_rD, dtype=np.float64).sum())
        if apart > SAME_MATRIX**2 * whole:
            return None
        return "output.weight" if head.nbytes > embedding.nbytes else "token_embd.weight"

    def take(self, key: str, default: object = None) -> object:
        """Return the value of `<architecture>.<key>`; without a default it must be there."""
        name = f"{self.architecture}.{key}"
        self.used.add(name)
        if name in self.keys:
            return self.keys[name]
        if default is None:
            raise UserError(f"{self.path} has no key {name!r}: the file is not whole")
        return default

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.take(key, default)
        if not isinstance(value, int):
            self.refuse(f"{self.architecture}.{key}", f"is {value!r}, expected one whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.take(key, default)
        if not isinstance(value, int | float):
            self.refuse(f"{self.architecture}.{key}", f"is {value!r}, expected one number")
        return float(value)

    def refuse(self, name: str, why: str) -> NoReturn:
        raise UserError(f"{self.path} can't be imported correctly: {name!r} {why}")

    def check_all_used(self) -> None:
        """Refuse a file with a key or a tensor that nothing has read."""
        for name, value in self.keys.items():
            known = name in self.used | TOKENIZER or name.startswith(BOOKKEEPING)
            known = known or bool(TOKEN_ID.fullmatch(name)) or value in INERT.get(name, ())
            if not known:
                shown = str(value)[:60]
                self.refuse(name, f"= {shown} is a key that operando can't honour")
        for name in self.tensors:
            if name not in self.used:
                self.refuse(name, "is a tensor that this architecture does not have")


def _in_parts(kind: int, data: np.ndarray, rows: int = 8192) -> Iterator[np.ndarray]:
    """Give a matrix in float32, some rows at a time: whole it may take more than the model."""
    import gguf

    for at in range(0, len(data), rows):
        part = gguf.quants.dequantize(data[at : at + rows], gguf.GGMLQuantizationType(kind))
        yield np.asarray(part, np.float32)


def read_model(
    file: GgufFile, on_tensor: Callable[[int, int], None] = lambda _done, _of: None
) -> PreTrainedModel:
    """Return the file's model in float32; whatever of the file can't be honoured is an error.

    `on_tensor` is told how many of the file's tensors are converted.
    """
    name = file.architecture
    spaces = file.keys.get("tokenizer.ggml.add_space_prefix", True)
    if name == "llama" and file.keys.get("tokenizer.ggml.model") == "llama" and not spaces:
        file.refuse("tokenizer.ggml.add_space_prefix", "= False is not what transformers does")
    if name not in SERVED:
        raise UserError(
            f"{file.path}: architecture {name!r} is not supported.{nearest(name, SERVED)} "
            f"Supported as GGUF: {', '.join(SERVED)}; others as safetensors folders"
        )
    if any(key.startswith("split.") for key in file.keys):
        raise UserError(
            f"{file.path} is one part of a split file: merge the parts first, "
            "llama-gguf-split --merge"
        )
    kind = SERVED[name]
    config = _config(file, kind)
    state = _state(file, kind, config, on_tensor)
    file.check_all_used()
    with torch.device("meta"):  # first without memory: a damaged key may ask for any
        planned = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    for key, tensor in planned.items():
        if key in state and state[key].shape != tensor.shape:
            file.refuse(key, f"is of {tuple(state[key].shape)}, its keys say {tuple(tensor.shape)}")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    found = model.load_state_dict(state, strict=False)
    missing = [
        key for key in found.missing_keys if not (config.tie_word_embeddings and "lm_head" in key)
    ]
    if missing:
        raise UserError(
            f"{file.path} lacks {len(missing)} of the model's tensors ({', '.join(missing[:3])} "
            "...), which would be randomly initialized"
        )
    if found.unexpected_keys:
        file.refuse(found.unexpected_keys[0], "is a tensor that this architecture does not have")
    return model.eval()


def _config(file: GgufFile, kind: Architecture) -> PreTrainedConfig:
    """Return the configuration that the file's keys describe."""
    width, heads = file.integer("embedding_length"), file.integer("attention.head_count")
    head_dim = file.integer("attention.key_length", width // heads)
    if file.integer("attention.value_length", head_dim) != head_dim:
        file.refuse("attention.value_length", f"differs from the key length {head_dim}")
    if file.integer("rope.dimension_count", head_dim) != head_dim:
        file.refuse("rope.dimension_count", f"turns a part of the {head_dim} dimensions of a head")
    layers, vocab = file.integer("block_count"), _rows(file, "token_embd.weight")
    if not 1 <= layers <= len(file.tensors):
        file.refuse("block_count", f"is {layers}, and the file has {len(file.tensors)} tensors")
    if file.integer("vocab_size", vocab) != vocab:
        file.refuse("vocab_size", f"is not the {vocab} rows of token_embd.weight")
    biased = {f"blk.0.{part}.bias" in file.tensors for part in ("attn_q", "attn_k", "attn_v")}
    settings: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": file.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": file.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.integer("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": kind.tied or file.tied is not None,
        "bos_token_id": file.keys.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.keys.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.keys.get("tokenizer.ggml.padding_token_id"),
    }
    rope = _rope(file, head_dim)
    match file.architecture:
        case "llama":
            settings |= {"attention_bias": True in biased, "rope_parameters": rope}
            settings["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
        case "qwen3":
            settings |= {"attention_bias": True in biased, "rope_parameters": rope}
        case "gemma3":
            theta = file.number("rope.freq_base_swa", LOCAL_THETA)
            local = {"rope_type": "default", "rope_theta": theta}
            settings |= {
                "rope_parameters": {"full_attention": rope, "sliding_attention": local},
                "sliding_window": file.integer("attention.sliding_window"),
                "layer_types": [
                    "full_attention" if (i + 1) % GEMMA3_PERIOD == 0 else "sliding_attention"
                    for i in range(layers)
                ],
                # The 27B, of 62 layers, scales by width / heads; all others by the head's size.
                "query_pre_attn_scalar": width // heads if layers == 62 else head_dim,
            }
        case _:
            settings["rope_parameters"] = rope
    return kind.config(**settings)


def _rows(file: GgufFile, name: str) -> int:
    if name not in file.tensors:
        raise UserError(f"{file.path} lacks 1 of the model's tensors ({name} ...): it is not whole")
    return file.raw[name][1].shape[0]


def _rope(file: GgufFile, head_dim: int) -> dict[str, object]:
    """Return transformers' rope_parameters for the file's theta, scaling keys and factors."""
    theta = file.number("rope.freq_base", 10_000.0)
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": theta}
    kind = str(file.take("rope.scaling.type", "none"))
    factor = file.number("rope.scaling.factor", file.number("rope.scale_linear", 1.0))
    original = file.integer("rope.scaling.original_context_length", 0)
    for key, plain in PLAIN_SCALING.items():
        if file.number(f"rope.scaling.{key}", plain[0]) not in plain:
            file.refuse(f"rope.scaling.{key}", "is a factor that operando can't honour")
    file.take("rope.scaling.finetuned", False)  # says nothing about the numbers
    if ROPE_FREQS in file.tensors:
        file.used.add(ROPE_FREQS)
        if kind != "none":
            file.refuse(ROPE_FREQS, f"stands beside rope.scaling.type = {kind!r}")
        return rope | _llama3(file, theta, head_dim)
    if kind == "yarn":
        if not original:
            file.refuse(
                "rope.scaling.type", "= 'yarn' without rope.scaling.original_context_length"
            )
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": file.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": file.number("rope.scaling.yarn_beta_slow", 1.0),
        }
    if kind not in ("none", "linear"):
        file.refuse("rope.scaling.type", f"= {kind!r} is not supported: none, linear, yarn are")
    if factor != 1.0 and kind == "none" and "llama.rope.scale_linear" not in file.keys:
        file.refuse("rope.scaling.factor", f"= {factor} without rope.scaling.type")
    return rope if factor == 1.0 else rope | {"rope_type": "linear", "factor": factor}


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, object]:
    """Return Llama 3's scaling whose factors are those of `rope_freqs.weight`.

    f = 1 where the wavelength w < c/4, F where w > c, and between them
    1 / ((1-s)/F + s), s = (c/w - 1) / 3   with F the largest factor and c the original context.
    """
    factor_d = file.tensors[ROPE_FREQS]().double()
    wave_d = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    if factor_d.shape != wave_d.shape:
        file.refuse(ROPE_FREQS, f"has {len(factor_d)} factors for {len(wave_d)} frequencies")
    top = float(factor_d.max())
    between = (factor_d > 1 + 1e-4) & (factor_d < top * (1 - 1e-4))
    context = 8192  # Llama 3's, where no factor lies between
    if bool(between.any()):
        f, w = float(factor_d[between][0]), float(wave_d[between][0])
        s = (1 / f - 1 / top) / (1 - 1 / top)
        context = round(w * (1 + 3 * s))
    s_d = ((context / wave_d - 1) / 3).clamp(0, 1)
    want_d = 1 / ((1 - s_d) / top + s_d)
    if not torch.allclose(want_d, factor_d, rtol=1e-3, atol=0):
        file.refuse(ROPE_FREQS, "holds other factors than those of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": top,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }


def _state(
    file: GgufFile,
    kind: Architecture,
    config: PreTrainedConfig,
    on_tensor: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """Return the tensors under transformers' names, in transformers' order."""
    state: dict[str, Tensor] = {}
    for number, name in enumerate(file.tensors):
        on_tensor(number, len(file.tensors))
        target = _target(name, kind)
        if target is None or name == ROPE_FREQS:
            continue
        file.used.add(name)
        if target == "lm_head.weight" and config.tie_word_embeddings:
            if file.tied is None:
                file.refuse(name, "is a head of its own, in an architecture that ties it")
            continue
        is_both = target == "model.embed_tokens.weight" and config.tie_word_embeddings
        tensor = file.tensors[(file.tied or name) if is_both else name]()
        part = target.rsplit(".", 2)[-2]
        if kind.pairs_side_by_side and part in ("q_proj", "k_proj"):
            q, k = config.num_attention_heads, config.num_key_value_heads
            tensor = _halves(tensor, q if part == "q_proj" else k)
        if kind.norm_plus_one and "norm" in part:
            tensor = tensor - 1
        state[target] = tensor
    return state


def _target(name: str, kind: Architecture) -> str | None:
    """Return the transformers name of a tensor; None if the architecture has no such tensor."""
    first, _, rest = name.partition(".")
    if first != "blk":
        return f"{TOP[first]}.{rest}" if first in TOP and rest == "weight" else None
    number, _, rest = rest.partition(".")
    part, _, leaf = rest.partition(".")
    if not number.isdecimal() or part not in kind.layer or leaf not in ("weight", "bias"):
        return None
    return f"model.layers.{number}.{kind.layer[part]}.{leaf}"


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """Return q or k with the rotary pairs in two halves, as transformers turns them."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)
