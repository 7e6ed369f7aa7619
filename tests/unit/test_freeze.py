"""The insulation certificate: analytic counts, PEFT's traps, and leaks that must be found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from operando.errors import UserError
from operando.evals.certify import certify_run
from operando.models.freeze import Check, Insulation, check_count, expected_count, leaks
from operando.models.load import Loaded
from operando.models.policy import Policy
from operando.recipe.data import LoraConfig, ModelConfig
from operando.run import SeedTree
from operando.update.checkpoint import checkpoint_folder
from tests.integration.runs import tiny, trained
from tests.unit.tiny import byte_tokenizer, tiny_model

QWEN_1_5B = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def make_policy(layers: str = "1-2", lora: bool = True) -> Policy:
    config = ModelConfig(layers=layers, lora=LoraConfig(rank=4, alpha=8) if lora else None)
    return Policy(Loaded(tiny_model("qwen2"), byte_tokenizer(), {}), config, SeedTree(0))


def step(policy: Policy, insulation: Insulation) -> torch.optim.AdamW:
    """Train for two steps on nothing in particular."""
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-2)
    ids = torch.arange(5, 25)[None]
    for _ in range(2):
        policy.base(ids).logits.logsumexp(-1).mean().backward()
        insulation.watch(policy.trainable())
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def failed(checks: tuple[Check, ...]) -> set[str]:
    return {check.name for check in checks if not check.passed}


def test_expected_count_of_the_published_configuration() -> None:
    """28 layers, "24-27", rank 32, seven projections: 21.1 MB in float32."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(QWEN_1_5B)
        lora = LoraConfig(rank=32, alpha=32)
        want = expected_count(model, "model.layers", (24, 25, 26, 27), lora)
        peft = get_peft_model(
            model,
            PeftLoraConfig(
                r=32, target_modules=list(lora.targets), layers_to_transform=[24, 25, 26, 27]
            ),
        )
    assert want == 5_275_648
    assert sum(p.numel() for p in peft.parameters() if p.requires_grad) == want
    # What lf_grpo's logged runs trained in fact (rank 64): the count gives it away.
    assert (
        expected_count(model, "model.layers", (24, 25, 26, 27), LoraConfig(rank=64)) == 10_551_296
    )


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("layers", ["1-2", "2", "all"])
def test_an_honest_run_passes(layers: str, lora: bool) -> None:
    policy = make_policy(layers, lora)
    insulation = Insulation(policy)
    certificate = insulation.issue(2, step(policy, insulation), policy.save_weights())
    assert failed(certificate.checks) == set()
    assert certificate.trained_parameters > 0


def test_an_untrained_model_fails_the_positive_controls() -> None:
    policy = make_policy()
    optimizer = torch.optim.AdamW(policy.trainable().values())
    certificate = Insulation(policy).issue(0, optimizer, policy.save_weights())
    assert failed(certificate.checks) == {"changed", "gradient"}


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.mlp.up_proj", "layers.0.input_layer"])
def test_a_changed_frozen_tensor_is_found(name: str) -> None:
    policy = make_policy("2")
    insulation = Insulation(policy)
    optimizer = step(policy, insulation)
    spot = next(p for n, p in policy.model.named_parameters() if name in n)
    with torch.no_grad():
        spot.view(-1)[3] += 1e-2
    found = failed(insulation.issue(2, optimizer, policy.save_weights()).checks)
    assert "frozen tensors" in found
    if name != "embed_tokens":  # the probe need not hold the token whose embedding changed
        assert "residual below" in found


def test_an_adapter_outside_the_set_is_found() -> None:
    """What lf_grpo's check of frozen gradients can't see: it passes with adapters everywhere."""
    config = ModelConfig(layers="all", lora=LoraConfig(rank=4))
    policy = Policy(Loaded(tiny_model("qwen2"), byte_tokenizer(), {}), config, SeedTree(0))
    policy.layers = (2,)  # the recipe says 2, PEFT was told all
    insulation = Insulation(policy)
    optimizer = step(policy, insulation)
    frozen = [p for p in policy.model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen), "lf_grpo's check passes"
    found = failed(insulation.issue(2, optimizer, policy.save_weights()).checks)
    assert {"layers", "count", "optimizer", "residual below", "adapter on and off"} <= found


@pytest.mark.parametrize(
    ("config", "leaked"),
    [
        ({"layers_to_transform": [2]}, None),
        ({"layers_to_transform": []}, "layers.0."),
        ({"layers_to_transform": [2], "bias": "all"}, "layers.0.self_attn.k_proj.bias"),
        ({"layers_to_transform": [2], "modules_to_save": ["input_layernorm"]}, "layers.0."),
        ({"layers_to_transform": [2], "modules_to_save": ["norm"]}, "model.norm"),
        ({"layers_to_transform": [2], "modules_to_save": ["lm_head"]}, "lm_head"),
        ({"layers_to_transform": [2], "trainable_token_indices": [5]}, "embed_tokens"),
        ({"layers_to_transform": [2], "target_modules": ["q_proj", "lm_head"]}, "lm_head.lora"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_each_trap_of_peft_is_a_leak(config: dict[str, object], leaked: str | None) -> None:
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"]} | config
    model = get_peft_model(tiny_model("qwen2"), PeftLoraConfig(**settings))
    found = leaks(model, "model.layers", (2,), whole_model=False)
    if leaked is None:
        assert not found
    else:
        assert any(leaked in name for name in found), found


def test_an_index_that_peft_drops_fails_the_count() -> None:
    """PEFT leaves out a layer that is not there, silently; here it never gets that far."""
    with pytest.raises(UserError, match="out of range"):
        make_policy("2,9")
    policy = make_policy("1-2")
    policy.layers = (0, 1, 2)
    assert not check_count(policy).passed


def test_a_tied_weight_is_a_leak_under_its_other_name() -> None:
    model = tiny_model("qwen2").requires_grad_(False)
    model.lm_head.weight = model.model.layers[2].mlp.up_proj.weight.requires_grad_(True)
    assert leaks(model, "model.layers", (2,), whole_model=False) == ["lm_head.weight"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny(tmp_path_factory.mktemp("runs"), "steps=2"))


def test_certify_from_files_alone(run: Path) -> None:
    certificate, file = certify_run(run)
    assert certificate.passed and json.loads(file.read_text())["passed"]
    assert "merged" in {check.name for check in certificate.checks}


@pytest.mark.parametrize(
    ("key", "message"), [("weights_sha256", "other weights"), ("frozen_sha256", "another base")]
)
def test_a_certificate_for_something_else_is_refused(run: Path, key: str, message: str) -> None:
    file = checkpoint_folder(run, 2) / "certificate.json"
    kept = file.read_text()
    file.write_text(json.dumps(json.loads(kept) | {key: "0" * 64}))
    try:
        with pytest.raises(UserError, match=message):
            certify_run(run)
        file.write_text("[]")
        with pytest.raises(UserError, match="expected an object"):
            certify_run(run)
    finally:
        file.write_text(kept)


def test_an_adapter_with_a_leak_in_its_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = trained(tiny(tmp_path, "steps=2"))
    file = checkpoint_folder(folder, 2) / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "layers.3." in n)
    save_file(tensors | {name.replace("layers.3.", "layers.0."): tensors[name].clone()}, file)
    with pytest.raises(UserError, match="other trained tensors"):
        certify_run(folder)


def test_a_run_is_not_resumed_over_another_base(tmp_path: Path) -> None:
    folder = trained(tiny(tmp_path, "steps=2"))
    file = checkpoint_folder(folder, 2) / "certificate.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"frozen_sha256": "0" * 64}))
    with pytest.raises(UserError, match="was made over another base model"):
        trained(tiny(tmp_path, "steps=2"), resume=True)
    assert (folder / "metrics.jsonl").read_text().count("\n") == 3, "nothing is lost"


def test_a_truncated_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    folder = trained(tiny(tmp_path, "steps=2"))
    file = checkpoint_folder(folder, 2) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="adapter_model.safetensors is truncated"):
        certify_run(folder)
