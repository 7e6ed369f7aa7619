"""Vision-language models: text is trained, in the language decoder only, and towers stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
)

from operando.errors import UserError
from operando.evals.certify import certify_run
from operando.models.freeze import Insulation
from operando.models.hooks import ActivationReader
from operando.models.layers import decoder_blocks
from operando.models.load import Loaded, auto_class, load_model
from operando.models.policy import Policy
from operando.recipe.data import LoraConfig, ModelConfig
from operando.run import SeedTree
from operando.run_folder import read_manifest
from tests.integration.runs import adapter, captured_setups, metric_rows, tiny, trained
from tests.unit.multimodal import saved_multimodal, tiny_multimodal
from tests.unit.tiny import byte_tokenizer, tiny_model

FAMILIES = ("gemma3", "qwen3_5", "qwen2_5_vl")
BLOCKS = "model.language_model.layers"
LORA = LoraConfig(rank=4, alpha=8)
IDS = torch.arange(5, 25)[None]


def policy_of(family: str, layers: str, lora: LoraConfig | None = LORA) -> Policy:
    config = ModelConfig(layers=layers, lora=lora)
    return Policy(Loaded(tiny_multimodal(family), byte_tokenizer(), {}), config, SeedTree(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_are_the_language_decoders_though_the_tower_is_deeper(family: str) -> None:
    name, blocks = decoder_blocks(tiny_multimodal(family))
    assert name == BLOCKS and len(blocks) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_under_an_innocent_name_is_not_taken(family: str) -> None:
    model = tiny_multimodal(family)
    inner = model.get_submodule("model")
    inner.eyes = torch.nn.Module()  # pyright: ignore[reportAttributeAccessIssue]
    deep = [block for _ in range(3) for block in tiny_model("llama").get_decoder().layers]
    inner.eyes.layers = torch.nn.ModuleList(deep)
    assert decoder_blocks(model)[0] == BLOCKS


@pytest.mark.parametrize("layers", ["1-2", "all", "0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_lands_in_the_language_decoder_only(family: str, layers: str) -> None:
    policy = policy_of(family, layers)
    names = list(policy.trainable())
    wanted = {f"base_model.model.{BLOCKS}.{i}" for i in policy.layers}
    assert names and all("lora_" in name for name in names)
    assert {name.partition(".self_attn.")[0].partition(".mlp.")[0] for name in names} == wanted
    assert not [n for n, _ in policy.model.named_parameters() if "lora_" in n and n not in names]


@pytest.mark.parametrize("lora", [LORA, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_certificate_passes_and_all_layers_leave_the_tower_alone(
    family: str, lora: LoraConfig | None
) -> None:
    policy = policy_of(family, "all", lora)
    insulation = Insulation(policy)
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
    for _ in range(2):
        policy.base(input_ids=IDS).logits.logsumexp(-1).mean().backward()
        insulation.watch(policy.trainable())
        optimizer.step()
        optimizer.zero_grad()
    certificate = insulation.issue(2, optimizer, policy.save_weights())
    assert [c for c in certificate.checks if not c.passed] == []
    assert not [n for n in policy.trainable() if "vision" in n or "visual" in n or "embed" in n]


def test_a_target_that_only_the_tower_has_is_refused() -> None:
    with pytest.raises(UserError, match="'fc1' is not a linear module of its decoder blocks"):
        policy_of("gemma3", "1-2", LoraConfig(targets=("fc1",)))


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_the_hidden_states_of_a_plain_forward(family: str) -> None:
    model = tiny_multimodal(family)
    sites = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    with ActivationReader(model, sites).reading() as acts, torch.no_grad():
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
    for site, plain in zip(sites, hidden, strict=False):
        assert torch.equal(acts[site], plain), site


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_of_training_and_the_way_back(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved_multimodal(family, tmp_path / "model")
    before = AutoModelForImageTextToText.from_pretrained(source).state_dict()
    setups = captured_setups(monkeypatch)
    folder = trained(
        tiny(
            tmp_path,
            f"model.id={json.dumps(str(source))}",
            "steps=2",
            'model.layers="1-2"',
            'rewards={length={kind="format"}, correct={kind="correct"}}',
            "eval.num=4",
            "rollout.max_completion_length=16",
            "update.entropy_coef=0.1",
        )
    )
    warnings = read_manifest(folder)["warnings"]
    assert "this model is sampled with HF generate: the engine does not support it" in str(warnings)
    assert json.loads((folder / "certificate.json").read_text())["passed"]
    assert certify_run(folder)[0].passed
    assert metric_rows(folder)[-1]["kl"] > 0
    # generate() on the whole model and the scoring pass through its decoder are one network
    assert all(row["sampler/gap_max"] < 1e-3 for row in metric_rows(folder)[1:])

    # nothing of the published model has moved: not the tower, not the frozen language weights
    base = setups[0].policy.base
    after = {n.replace(".base_layer", ""): t for n, t in base.state_dict().items()}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert any(t.any() for n, t in adapter(folder, 2).items() if "lora_B" in n)

    # plain PEFT on the plain model gives the policy's logits
    plain = AutoModelForImageTextToText.from_pretrained(source)
    loaded = PeftModel.from_pretrained(plain, folder / "checkpoints" / "step_00002").eval()
    with torch.no_grad():
        ours, theirs = base(input_ids=IDS).logits, loaded(input_ids=IDS).logits
        with loaded.disable_adapter():
            untrained = loaded(input_ids=IDS).logits
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.equal(theirs, untrained)
    card = (folder / "checkpoints" / "step_00002" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained(" in card


def test_the_config_decides_how_a_model_is_loaded() -> None:
    assert auto_class(LlamaConfig()) is AutoModelForCausalLM
    assert auto_class(tiny_multimodal("qwen3_5").config) is AutoModelForImageTextToText


def test_a_multimodal_model_without_a_language_decoder_is_refused(tmp_path: Path) -> None:
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config=small | {"vocab_size": 258},
        vision_config=small | {"image_size": 28},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_model(ModelConfig(id=str(tmp_path)))
    assert "'clip' is a multimodal model without a language decoder" in str(error.value)
