"""model.dtype = "auto": what it is by size, device and speed, and that a run keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, Qwen2Config

from operando import setup
from operando.errors import UserError
from operando.evals.ask import checkpoints
from operando.evals.evaluate import EvalConfig, evaluate
from operando.launch import dry_run, launch
from operando.models import load
from operando.models.load import (
    EMBEDDED,
    SMALL,
    Opened,
    choose_dtype,
    count_parameters,
    load_model,
    open_model,
)
from operando.recipe.data import LoraConfig, ModelConfig
from operando.recipe_io import load_recipe, read_toml, shipped_recipes
from operando.run_folder import read_manifest, read_recipe
from operando.tables import read_parquet

LORA = ModelConfig(lora=LoraConfig())
STEPS = (
    "steps=2",
    "rollout.num_prompts=2",
    "rollout.num_generations=2",
    "eval.num=4",
    "eval.every=1",
    "checkpoint.every=1",
    "rollout.max_completion_length=8",
    "task.num_held_out=8",
)


def qwen(layers: int = 24) -> Qwen2Config:
    """Qwen2.5-0.5B's shape, or a part of it."""
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def opened(config: Qwen2Config, device: str = "cpu") -> Opened:
    tokenizer = open_model(ModelConfig()).tokenizer
    return Opened("", torch.device(device), tokenizer, config)


def processor(monkeypatch: pytest.MonkeyPatch, slowdown: float) -> None:
    """Make this processor multiply bfloat16 `slowdown` times slower than float32."""
    for module in (load, setup):
        monkeypatch.setattr(module, "bfloat16_slowdown", lambda: slowdown)


def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> float:
        raise AssertionError("nothing is to be measured here")

    monkeypatch.setattr(load, "bfloat16_slowdown", never)


@pytest.mark.parametrize(
    ("slowdown", "dtype", "said"),
    [
        (1 / 11, "bfloat16", "11 times as fast"),
        (0.5, "bfloat16", "2 times as fast"),
        (1.0, "float32", "1 times as fast"),
        (9.0, "float32", "0.11 times as fast"),
    ],
)
def test_a_large_model_on_a_cpu_goes_by_the_measured_product(
    slowdown: float, dtype: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(monkeypatch, slowdown)
    chosen = choose_dtype(LORA, opened(qwen()))
    assert chosen.dtype == dtype
    assert said in chosen.why
    assert "494,032,768 parameters" in chosen.why


def test_elsewhere_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    unmeasured(monkeypatch)
    large = opened(qwen())
    assert choose_dtype(LORA, opened(qwen(), "cuda")).dtype == "bfloat16"
    assert choose_dtype(ModelConfig(), large).dtype == "float32"  # its own weights are trained
    assert choose_dtype(LORA.model_copy(update={"dtype": "bfloat16"}), large).dtype == "bfloat16"
    assert choose_dtype(LORA.model_copy(update={"dtype": "float32"}), large).dtype == "float32"
    small = Qwen2Config(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2)
    for device in ("cpu", "cuda"):
        assert choose_dtype(LORA, opened(small, device)).dtype == "float32"


def test_what_is_only_asked_may_be_16_bits_without_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, 0.1)
    assert choose_dtype(ModelConfig(), opened(qwen()), frozen=True).dtype == "bfloat16"


def test_parameters_are_counted_without_memory() -> None:
    """494,032,768 is what Qwen2.5-0.5B has, its tied head counted once."""
    assert count_parameters(qwen()) == 494_032_768
    assert count_parameters(qwen(1)) < 494_032_768


def test_counting_parameters_draws_no_random_number() -> None:
    before = torch.random.get_rng_state()
    count_parameters(qwen(1))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_models_in_the_package_are_float32_on_every_machine(name: str) -> None:
    assert count_parameters(AutoConfig.from_pretrained(EMBEDDED[name])) <= SMALL


def test_shipped_recipes_that_leave_the_dtype_out_are_of_small_models() -> None:
    """Their numbers stand in the docs and must not go by the machine."""
    checked = 0
    for file in shipped_recipes():
        table = read_toml(file)
        if "rewards" not in table and "base" not in table:
            continue  # pre-training, SFT, a study, a pipeline
        model = load_recipe(str(file)).model
        checked += model.dtype == "auto"
        assert model.dtype != "auto" or model.id in EMBEDDED or "recursive" in model.id, file
    assert checked > 10


@pytest.mark.parametrize("name", EMBEDDED)
def test_auto_loads_what_float32_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unmeasured(monkeypatch)
    config = ModelConfig(id=name, lora=LoraConfig())
    assert load_model(config).model.dtype == torch.float32


# --- runs ----------------------------------------------------------------------------------------


def trained(tmp_path: Path, *more: str, lora: bool = True, resume: bool = False) -> Path:
    recipe = load_recipe("tiny", (*STEPS, f"runs_dir={str(tmp_path)!r}", *more))
    if not lora:
        model = recipe.model.model_copy(update={"lora": None})
        recipe = recipe.model_copy(update={"model": model})
    folder = launch(Console(quiet=True), recipe, resume=resume)
    assert folder is not None
    return folder


def test_a_run_writes_what_was_chosen_and_keeps_it_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "SMALL", 0)
    processor(monkeypatch, 0.1)
    folder = trained(tmp_path, "steps=1")
    assert read_recipe(folder).model.dtype == "bfloat16"
    told = read_manifest(folder)["dtype"]
    assert isinstance(told, dict)
    assert told["dtype"] == "bfloat16"
    assert "10 times as fast" in told["why"]

    processor(monkeypatch, 9.0)
    whole = (tmp_path / "tiny/recipe.toml").read_text()
    (folder / "recipe.toml").write_text(whole.replace("steps = 1\n", "steps = 2\n", 1))
    trained(tmp_path, resume=True)
    assert read_recipe(folder).model.dtype == "bfloat16"
    assert read_manifest(folder)["dtype"] == told
    assert "9.0 times as long" in " ".join(map(str, read_manifest(folder)["warnings"]))


def test_a_run_without_lora_is_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SMALL", 0)
    unmeasured(monkeypatch)
    folder = trained(tmp_path, "steps=1", lora=False)
    assert read_recipe(folder).model.dtype == "float32"
    told = read_manifest(folder)["dtype"]
    assert told == {"dtype": "float32", "why": "the weights themselves are trained"}


def test_bfloat16_without_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="add model.lora"):
        trained(tmp_path, 'model.dtype="bfloat16"', lora=False)


def test_a_dry_run_says_what_auto_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load, "SMALL", 0)
    processor(monkeypatch, 0.1)
    dry_run(Console(width=400), load_recipe("tiny", STEPS))
    said = capsys.readouterr().out
    assert 'dtype = "bfloat16"' in said
    assert 'model.dtype = "auto" is bfloat16 here: ' in said


def test_a_folder_beside_a_run_is_asked_in_the_runs_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = trained(tmp_path, "steps=1")
    monkeypatch.setattr(load, "SMALL", 0)
    processor(monkeypatch, 0.1)
    assert checkpoints(EMBEDDED["starter"])[0].config.dtype == "bfloat16"
    file = evaluate(folder, EvalConfig(num=2), also=[EMBEDDED["starter"]]).file
    assert {row["dtype"] for row in read_parquet(file).to_pylist()} == {"float32"}
