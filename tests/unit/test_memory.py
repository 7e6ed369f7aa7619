"""The memory estimate against what models and autograd do hold, and the shipped recipes' cards."""

import io
import re

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from operando import setup
from operando.errors import UserError
from operando.launch import dry_run, launch
from operando.models.layers import decoder_blocks
from operando.models.load import float32_products, lora_in_model_dtype, open_model
from operando.models.lora import with_lora
from operando.models.memory import (
    OVERHEAD,
    activation_bytes,
    check_memory,
    estimate,
    fits,
    memory_lines,
    saved_by_block,
    shapes_of,
    trained_parameters,
)
from operando.models.policy import recomputed_blocks
from operando.recipe.data import ModelConfig
from operando.recipe_io import load_recipe, load_study_recipe, recipe_file, shipped_recipes
from operando.run import SeedTree, read_manifest
from operando.setup import _slow_dtype

CUDA = torch.device("cuda:0")

QWEN_05B = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_attention_heads=14,
    num_key_value_heads=2,
    num_hidden_layers=24,
    vocab_size=151936,
    tie_word_embeddings=True,
)
QWEN_15B = Qwen2Config(
    hidden_size=1536,
    intermediate_size=8960,
    num_attention_heads=12,
    num_key_value_heads=2,
    num_hidden_layers=28,
    vocab_size=151936,
    tie_word_embeddings=True,
)
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN_05B,
    "Qwen/Qwen2.5-0.5B": QWEN_05B,
    "Qwen/Qwen2.5-1.5B-Instruct": QWEN_15B,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 8,
    "vocab_size": 96,
}


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**TINY, tie_word_embeddings=True),
        Qwen3Config(**TINY, tie_word_embeddings=False),
        LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
        QWEN_05B,
    ],
    ids=lambda c: f"{c.model_type}-{c.hidden_size}",
)
def test_parameters_are_the_model_s(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = shapes_of(config)
    assert shapes is not None
    assert shapes.parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("ckpt", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config])
def test_activations_are_what_autograd_saves(kind, dtype, lora, ckpt):
    if dtype == "bfloat16" and lora is None:
        pytest.skip("refused at the start of a run")
    config = ModelConfig(dtype=dtype, lora=lora, gradient_checkpointing=ckpt)
    shapes = shapes_of(kind(**TINY))
    assert shapes is not None
    model = AutoModelForCausalLM.from_config(
        kind(**TINY), attn_implementation="sdpa", dtype=getattr(torch, dtype)
    ).eval()
    if lora is not None:
        with_lora(model, decoder_blocks(model)[0], tuple(range(8)), config, SeedTree(0))
    if ckpt:
        for block in recomputed_blocks(model):
            block.training = True
    rows, width = 8, 64
    ids = torch.randint(0, 96, (rows, width), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(width, width, dtype=torch.bool).tril()[None, None].repeat(rows, 1, 1, 1)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held |= {mask.untyped_storage().data_ptr(), ids.untyped_storage().data_ptr()}
    seen: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address comes twice

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in held:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with lora_in_model_dtype(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.get_decoder()(
            input_ids=ids,
            position_ids=torch.arange(width).repeat(rows, 1),
            attention_mask=mask,
            use_cache=False,
        )
    measured = sum(s.nbytes() for s in seen.values())
    tokens = rows * width
    passing = tokens * (3 * shapes.F + 2 * shapes.D) * (4 if dtype == "float32" else 2)
    told = activation_bytes(shapes, config, tokens, width) - passing
    if ckpt:  # one block at a time is recomputed, in the backward pass: not seen here
        told -= tokens * saved_by_block(shapes, config, width)
    elif dtype == "bfloat16":
        told += 2 * trained_parameters(shapes, config)
    assert told == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    ("config", "dtype", "lora", "kib"),
    [
        (QWEN_05B, "float32", None, 105),
        (QWEN_05B, "bfloat16", {"rank": 32}, 60),
        (QWEN_15B, "bfloat16", {"rank": 32}, 109),
    ],
)
def test_bytes_a_token_of_published_shapes(config, dtype, lora, kib):
    # Measured through a whole forward at the true widths, without a mask of shared prompts.
    shapes = shapes_of(config)
    assert shapes is not None
    told = saved_by_block(shapes, ModelConfig(dtype=dtype, lora=lora), seen=0)
    assert told / 1024 == pytest.approx(kib, rel=0.1)


def cards():
    found = {}
    for file in shipped_recipes():
        if card := re.search(r"one GPU with (\d+) GB", file.read_text(encoding="utf-8")):
            found[file.stem] = int(card[1]) * 10**9
    return found


def arms_of(name):
    if "study" not in name:
        return [load_recipe(name)]
    beside = recipe_file(name).parent
    arms = load_study_recipe(name).arms.values()
    return [load_recipe(str(beside / arm.recipe), arm.overrides) for arm in arms]


@pytest.mark.parametrize("name", cards())
def test_a_shipped_recipe_fits_the_card_that_its_header_names(name):
    for recipe in arms_of(name):
        prompt = recipe.prompt.max_prompt_length or 1024
        memory = estimate(PUBLISHED[recipe.model.id], recipe, prompt, "cuda")
        assert memory is not None
        assert fits(memory, cards()[name]), memory_lines(memory)


def told_of(config, prompt_tokens=512):
    def told(recipe):
        memory = estimate(config, recipe, prompt_tokens, "cuda")
        assert memory is not None
        return memory

    return told


@pytest.mark.parametrize(
    ("name", "changes", "gb", "said"),
    [
        (
            "ppo_flexible_qwen0.5b",
            ["update.micro_tokens=32768"],
            80,
            ["update.micro_tokens = 16384 (now 32768)", "model.gradient_checkpointing = true"],
        ),
        ("gsm8k_qwen0.5b", ["update.micro_tokens=16384"], 24, ["update.micro_tokens = 8192"]),
        (
            "ppo_flexible_qwen0.5b",
            ["rollout.max_batch=2048"],
            40,
            ["rollout.max_batch = 1024 (now 2048)"],
        ),
        ("ppo_flexible_qwen0.5b", [], 8, ["add model.lora"]),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(name, changes, gb, said):
    recipe = load_recipe(name, tuple(changes))
    with pytest.raises(UserError) as caught:
        check_memory(recipe, told_of(QWEN_05B), gb * 10**9, "cuda:0")
    for part in said:
        assert part in str(caught.value), str(caught.value)


def test_the_value_that_is_named_fits_and_the_next_does_not():
    recipe = load_recipe("ppo_flexible_qwen0.5b", ("update.micro_tokens=32768",))
    at = {
        n: recipe.model_copy(
            update={"update": recipe.update.model_copy(update={"micro_tokens": n})}
        )
        for n in (16384, 32768)
    }
    assert fits(told_of(QWEN_05B)(at[16384]), 80 * 10**9)
    assert not fits(told_of(QWEN_05B)(at[32768]), 80 * 10**9)


def test_blocks_below_the_first_trained_one_save_nothing():
    shapes = shapes_of(QWEN_15B)
    assert shapes is not None
    some = activation_bytes(shapes, ModelConfig(layers="24-27", lora={}), 1000, 512)
    one = saved_by_block(shapes, ModelConfig(lora={}), 512)
    assert 4 * 1000 * one < some < 5 * 1000 * one


def test_no_estimate_for_another_architecture():
    recipe = load_recipe("gsm8k_qwen0.5b")
    assert estimate(GPT2Config(), recipe, 512, "cuda") is None


def test_a_run_on_a_small_card_ends_before_the_weights_are_read(tmp_path, monkeypatch):
    recipe = load_recipe("tiny", (f"runs_dir={tmp_path}", "update.micro_tokens=65536"))
    monkeypatch.setattr(setup, "available", lambda _: OVERHEAD + 2**25)
    monkeypatch.setattr(setup, "open_model", lambda c: open_model(c)._replace(device=CUDA))
    monkeypatch.setattr(setup, "load_model", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(UserError, match=r"update.micro_tokens = 512 .now 65536."):
        launch(Console(quiet=True), recipe)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_shows_the_estimate_and_a_small_machine_warns(tmp_path, monkeypatch):
    console = Console(record=True, width=80, file=io.StringIO())
    dry_run(console, load_recipe("tiny"))
    assert re.search(r"peak of update +\d+\.\d+ [MG]iB", console.export_text())
    recipe = load_recipe("tiny", (f"runs_dir={tmp_path}", "steps=1"))
    monkeypatch.setattr(setup, "available", lambda _: 2**20)
    folder = launch(Console(quiet=True), recipe)
    assert folder is not None
    assert any("memory: by estimate" in w for w in read_manifest(folder)["warnings"])


def test_tf32_is_asked_for_and_ends_with_the_run():
    before = torch.get_float32_matmul_precision()
    for tf32, word in ((True, "high"), (False, "highest")):
        with float32_products(ModelConfig(tf32=tf32), CUDA):
            assert word == torch.get_float32_matmul_precision()
        assert torch.get_float32_matmul_precision() == before
    with float32_products(ModelConfig(tf32=True), torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_slow_bfloat16_is_said_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, half = (load_recipe("demo", (f'model.dtype="{d}"',)) for d in ("float32", "bfloat16"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for times, count in ((9.0, 1), (1.0, 0)):
        monkeypatch.setattr(setup, "bfloat16_slowdown", lambda times=times: times)
        assert [len(_slow_dtype(half, cpu)), len(_slow_dtype(whole, cpu))] == [count, 0]
        assert _slow_dtype(half, cuda) == []
    monkeypatch.undo()
    assert 0.05 < setup.bfloat16_slowdown() < 100
