"""Folders that operando writes say the same to transformers 4 and 5; adapters name their base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from operando.errors import UserError
from operando.models.folders import save_folder, with_rope_of_4
from operando.models.load import Loaded, load_model, resolve
from operando.models.policy import Policy
from operando.recipe.data import LoraConfig, ModelConfig
from operando.run import SeedTree
from tests.unit.tiny import byte_tokenizer, tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def test_a_written_folder_has_the_rope_of_both_versions(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 54_321.0}
    model = type(model)(model.config)
    policy = Policy(Loaded(model, byte_tokenizer(), {}), ModelConfig(), SeedTree(0))
    policy.save_pretrained(tmp_path, policy.save_weights())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 54_321.0
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # 4.x has no TokenizersBackend
    ids = torch.arange(40, 60)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("a\nb ")["input_ids"] == [66, 200, 67, 222]


def test_scaled_local_and_nested_rope() -> None:
    flat = with_rope_of_4({"rope_parameters": YARN | {"rope_theta": 1e6}})
    assert flat["rope_theta"] == 1e6 and flat["rope_scaling"] == YARN
    local = {"rope_type": "default", "rope_theta": 1e4}
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    both = {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    found = with_rope_of_4({"text_config": both})["text_config"]
    assert found["rope_theta"] == 1e6 and found["rope_local_base_freq"] == 1e4
    assert found["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert with_rope_of_4({"n_embd": 8}) == {"n_embd": 8}


def test_both_forms_together_are_read_as_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.rope_parameters = YARN | {"rope_theta": 5e5}
    save_folder(tmp_path, type(model)(model.config), byte_tokenizer())
    read = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {k: read[k] for k in (*YARN, "rope_theta")} == YARN | {"rope_theta": 5e5}


@pytest.mark.parametrize("hub", [False, True])
def test_an_adapter_names_a_base_that_can_be_opened(hub: bool, tmp_path: Path) -> None:
    base = "org/name" if hub else "starter"
    config = ModelConfig(id=base, lora=LoraConfig(rank=2))
    loaded = load_model(ModelConfig(id="starter"))
    Policy(loaded, config, SeedTree(0)).save_pretrained(tmp_path, {"x": torch.zeros(1)})
    named = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "org/name" if hub else (Path(named) / "config.json").is_file()


def test_a_folder_with_an_adapter_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no config.json: it is an adapter alone. Merge it first"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds an adapter beside the model"):
        resolve(str(tmp_path))
