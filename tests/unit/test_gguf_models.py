"""A GGUF file gives its model's logits, whatever it scales, ties or shapes, or it is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from operando.errors import UserError
from operando.models.gguf_read import GEMMA3_LAYER, LAYER, TOP, GgufFile, read_model

gguf = pytest.importorskip("gguf", reason='the extra "operando[gguf]" is not installed')

SHAPE: dict[str, object] = {
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
Keys = Callable[["gguf.GGUFWriter"], None]


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """Give norms and biases noise, which a fresh model does not have."""
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return model.float().eval()


def llama(**settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return shaken(LlamaForCausalLM(LlamaConfig(**SHAPE | settings)))


def qwen2(**settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return shaken(Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"rope_parameters": PLAIN} | settings)))


def qwen3(**settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return shaken(Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"rope_parameters": PLAIN} | settings)))


def gemma3() -> PreTrainedModel:
    torch.manual_seed(0)
    rope = {
        "full_attention": PLAIN | {"rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    config = Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 7, "head_dim": 32, "sliding_window": 16},
        query_pre_attn_scalar=32,
        rope_parameters=rope,
    )
    return shaken(Gemma3ForCausalLM(config))


def side_by_side(weight: torch.Tensor, heads: int) -> torch.Tensor:
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(
    file: Path,
    architecture: str,
    model: PreTrainedModel,
    *extra: Keys,
    tensors: Mapping[str, np.ndarray] | None = None,
    raw: Mapping[str, tuple[torch.Tensor, str]] | None = None,
    copy_head: bool = False,
) -> Path:
    """Write a model as llama.cpp would: its names, its order of q and k, Gemma's norms plus one."""
    c = model.config
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    head_dim = model.model.layers[0].self_attn.head_dim
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = c.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    for add in extra:
        add(writer)
    layer = GEMMA3_LAYER if architecture == "gemma3" else LAYER
    names = {v: k for k, v in layer.items()} | {v: k for k, v in TOP.items()}
    tied = c.tie_word_embeddings
    found = dict(tensors or {})
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            part, leaf = rest.rsplit(".", 1)
            if architecture == "llama" and names[part] in ("attn_q", "attn_k"):
                query = names[part] == "attn_q"
                heads = c.num_attention_heads if query else c.num_key_value_heads
                weight = side_by_side(weight, heads)
            target = f"blk.{number}.{names[part]}.{leaf}"
        else:
            part, leaf = name.rsplit(".", 1)
            target = f"{names[part]}.{leaf}"
        if architecture == "gemma3" and "norm" in name:
            weight = weight + 1
        found[target] = weight.contiguous().numpy()
    if copy_head:
        assert tied
        found["output.weight"] = found["token_embd.weight"]
    for name, weight in found.items():
        if name not in (raw or {}):
            writer.add_tensor(name, weight)
    for name, (given, kind) in (raw or {}).items():
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(given.numpy(), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama3_factors(head_dim: int) -> np.ndarray:
    """The factors as convert_hf_to_gguf.py writes them, one by one."""
    found = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * 500_000.0 ** (i / head_dim)
        if wavelength < 64 / 4:
            found.append(1.0)
        elif wavelength > 64 / 1:
            found.append(8.0)
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(found, np.float32)


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)


def window(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(16)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)


FREQS = {"rope_freqs.weight": llama3_factors(16)}
CASES: dict[str, tuple[str, Callable[[], PreTrainedModel], tuple[Keys, ...], dict[str, object]]] = {
    "llama": ("llama", llama, (), {}),
    "llama, tied": ("llama", lambda: llama(tie_word_embeddings=True), (), {}),
    "llama, biases": ("llama", lambda: llama(attention_bias=True, mlp_bias=True), (), {}),
    "llama, its own head size": ("llama", lambda: llama(head_dim=32), (), {}),
    "llama, linear": ("llama", lambda: llama(rope_parameters=LINEAR), (linear,), {}),
    "llama 3": ("llama", lambda: llama(rope_parameters=LLAMA3), (), {"tensors": FREQS}),
    "qwen2": ("qwen2", qwen2, (), {}),
    "qwen2, tied, copied": (
        "qwen2",
        lambda: qwen2(tie_word_embeddings=True),
        (),
        {"copy_head": True},
    ),
    "qwen2, yarn": ("qwen2", lambda: qwen2(rope_parameters=YARN), (yarn,), {}),
    "qwen3, its own head size": ("qwen3", lambda: qwen3(head_dim=24), (), {}),
    "gemma3": ("gemma3", gemma3, (window,), {}),
}
IDS = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model_in_the_file(case: str, tmp_path: Path) -> None:
    architecture, make, extra, more = CASES[case]
    model = make()
    file = write(tmp_path / "x.gguf", architecture, model, *extra, **more)
    read = read_model(GgufFile.open(file))
    want = logits(model)
    assert float((logits(read) - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert read.config.tie_word_embeddings == model.config.tie_word_embeddings
    head, embedding = read.get_output_embeddings(), read.get_input_embeddings()
    assert (head.weight is embedding.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("case", ["llama, linear", "llama 3", "qwen2, yarn", "gemma3"])
def test_the_scaling_matters_here(case: str, tmp_path: Path) -> None:
    """The control: without what the file says of its rope the logits are others."""
    architecture, make, extra, more = CASES[case]
    model = make()
    read = read_model(
        GgufFile.open(write(tmp_path / "x.gguf", architecture, model, *extra, **more))
    )
    rope = read.config.rope_parameters
    config = json.loads(read.config.to_json_string())
    rope = rope.get("full_attention", rope)
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    if architecture == "gemma3":
        plain = {**config["rope_parameters"], "full_attention": plain}
    other = type(read)(type(read.config)(**config | {"rope_parameters": plain}))
    other.load_state_dict(read.state_dict())
    assert float((logits(other.eval()) - logits(model)).abs().max()) > 0.1


def key(name: str, value: float | str) -> Keys:
    def add(writer: gguf.GGUFWriter) -> None:
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_float32(name, value)

    return add


def as_converters_write(writer: gguf.GGUFWriter) -> None:
    """Keys that files of Llama 3, Qwen2, Gemma and their fine-tunes carry beside the numbers."""
    writer.add_string("general.name", "x")
    writer.add_uint32("general.quantization_version", 2)
    writer.add_uint32("general.file_type", 1)
    writer.add_string("quantize.imatrix.file", "x")
    writer.add_uint32("llama.vocab_size", 261)
    writer.add_uint32("llama.rope.dimension_count", 16)
    writer.add_string("tokenizer.ggml.pre", "llama-bpe")
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_bool("tokenizer.ggml.add_eos_token", False)
    writer.add_bool("tokenizer.ggml.add_sep_token", False)
    writer.add_bool("tokenizer.ggml.add_space_prefix", False)
    writer.add_bool("tokenizer.ggml.remove_extra_whitespaces", False)
    for name in (
        "bos",
        "eos",
        "eot",
        "eom",
        "padding",
        "unknown",
        "seperator",
        "cls",
        "mask",
        "prefix",
        "suffix",
        "middle",
        "fim_pre",
        "fim_suf",
        "fim_mid",
    ):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", 3)
    writer.add_string("tokenizer.chat_template", "{{ messages }}")


def test_keys_that_say_nothing_of_the_numbers_are_no_reason_to_refuse(tmp_path: Path) -> None:
    file = write(tmp_path / "x.gguf", "llama", llama(), as_converters_write)
    assert float((logits(read_model(GgufFile.open(file))) - logits(llama())).abs().max()) < 1e-5


def test_yarn_keys_at_their_plain_values_are_honoured(tmp_path: Path) -> None:
    scaling = {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "yarn_ext_factor": 1.0}
    keys = [key(f"qwen2.rope.scaling.{name}", value) for name, value in scaling.items()]
    model = qwen2(rope_parameters=YARN | {"beta_fast": 16.0, "beta_slow": 2.0})
    file = write(tmp_path / "x.gguf", "qwen2", model, yarn, *keys)
    assert float((logits(read_model(GgufFile.open(file))) - logits(model)).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("extra", "more", "said"),
    [
        ((key("llama.attention.scale", 0.5),), {}, "llama.attention.scale"),
        ((key("llama.rope.scaling.type", "longrope"),), {}, "'longrope' is not supported"),
        ((yarn, key("llama.rope.scaling.attn_factor", 0.7)), {}, "attn_factor"),
        ((key("llama.rope.scaling.type", "yarn"),), {}, "original_context_length"),
        ((), {"tensors": {"rope_factors_long.weight": np.ones(8, np.float32)}}, "factors_long"),
        (
            (),
            {"tensors": {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}},
            "other factors than those of Llama 3",
        ),
        ((), {"tensors": {"blk.0.attn_q.scale": np.ones(1, np.float32)}}, "blk.0.attn_q.scale"),
        ((), {"tensors": {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}}, "q_norm"),
        ((key("tokenizer.ggml.precompiled_charsmap", "x"),), {}, "precompiled_charsmap"),
        ((lambda writer: writer.add_bool("tokenizer.ggml.add_sep_token", True),), {}, "add_sep"),
    ],
)
def test_what_can_not_be_honoured_is_named(
    extra: tuple[Keys, ...], more: dict[str, object], said: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "x.gguf", "llama", llama(), *extra, **more)
    with pytest.raises(UserError, match=said):
        read_model(GgufFile.open(file))


def two_copies(file: Path, head: torch.Tensor, kinds: tuple[str, str]) -> PreTrainedModel:
    """Read a Qwen2 whose embedding and `head` are written each in a quantisation of its own."""
    model = qwen2(tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.detach()
    found = {"token_embd.weight": embedding, "output.weight": head}
    write(file, "qwen2", model, raw={n: (found[n], k) for n, k in zip(found, kinds, strict=True)})
    return read_model(GgufFile.open(file))


def as_stored(weight: torch.Tensor, kind: str) -> torch.Tensor:
    number = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), number), number))


@pytest.mark.parametrize(
    ("kinds", "finer"),
    [(("Q5_0", "Q8_0"), "Q8_0"), (("Q8_0", "Q4_0"), "Q8_0"), (("Q4_0", "F16"), "F16")],
)
def test_two_quantisations_of_one_matrix_are_tied_and_the_finer_stands_for_both(
    kinds: tuple[str, str], finer: str, tmp_path: Path
) -> None:
    embedding = qwen2(tie_word_embeddings=True).get_input_embeddings().weight.detach()
    read = two_copies(tmp_path / "x.gguf", embedding, kinds)
    assert read.config.tie_word_embeddings
    assert read.get_output_embeddings().weight is read.get_input_embeddings().weight
    assert torch.equal(read.get_input_embeddings().weight, as_stored(embedding, finer))


@pytest.mark.parametrize("kinds", [("Q5_0", "Q8_0"), ("Q8_0", "Q8_0"), ("F32", "F32")])
@pytest.mark.parametrize("moved", [0.2, 1.0])
def test_a_head_that_was_trained_away_from_the_embedding_stays_its_own(
    kinds: tuple[str, str], moved: float, tmp_path: Path
) -> None:
    embedding = qwen2(tie_word_embeddings=True).get_input_embeddings().weight.detach()
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(3))
    head = embedding + moved * float(embedding.std()) * noise
    read = two_copies(tmp_path / "x.gguf", head, kinds)
    assert not read.config.tie_word_embeddings
    assert torch.equal(read.get_output_embeddings().weight, as_stored(head, kinds[1]))
    assert torch.equal(read.get_input_embeddings().weight, as_stored(embedding, kinds[0]))


def test_a_head_that_was_not_quantised_is_the_embedding_only_if_every_bit_is(
    tmp_path: Path,
) -> None:
    embedding = qwen2(tie_word_embeddings=True).get_input_embeddings().weight.detach()
    read = two_copies(tmp_path / "x.gguf", embedding * 1.001, ("F32", "F32"))
    assert not read.config.tie_word_embeddings
