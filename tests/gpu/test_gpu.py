"""What only a GPU can show: captured decoding steps, the loop on CUDA, the 4-bit base."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from operando.models.load import load_model, pick_device
from operando.models.logprobs import HeadConfig, token_logps
from operando.recipe import ModelConfig
from operando.rollout.engine import Engine
from operando.rollout.sampler import Sampling, uniform_streams
from operando.run import SeedTree
from tests.integration.runs import metric_rows, tiny, trained
from tests.unit.tiny import byte_tokenizer, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [[5, 9, 40, 7], [100, 3], [77, 78, 79, 80, 81, 82, 83], [9]]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_captured_steps_give_the_rollouts_of_plain_ones(family: str) -> None:
    engine = Engine(tiny_model(family).cuda(), byte_tokenizer(), tuple(range(8)))
    uniforms = uniform_streams(SeedTree(0), 2, range(4), 6, 70)
    assert engine.use_graphs
    captured = engine.sample(PROMPTS, 6, Sampling(70), uniforms)
    engine.use_graphs = False
    plain = engine.sample(PROMPTS, 6, Sampling(70), uniforms)
    assert [one.ids for one in captured] == [one.ids for one in plain]


def test_chunked_head_equals_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(300, 32, generator=generator)
    weight_VD = torch.randn(5000, 32, generator=generator)
    target_N = torch.randint(5000, (300,), generator=generator)
    here = token_logps(hidden_ND, weight_VD, target_N, HeadConfig())
    there = token_logps(hidden_ND.cuda(), weight_VD.cuda(), target_N.cuda(), HeadConfig())
    torch.testing.assert_close(there.logp_N.cpu(), here.logp_N, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loop_trains_and_resumes_on_cuda(tmp_path: Path, dtype: str) -> None:
    """Completions of 70 tokens, so that decoding steps are captured, prefix kept."""
    settings = (f"model.dtype={dtype}", "model.device=cuda", "rollout.max_completion_length=70",
                "checkpoint.every=2", "steps=4")  # fmt: skip
    folder = trained(tiny(tmp_path, *settings))
    rows = metric_rows(folder)
    assert any(row.get("update_norm", 0) > 0 for row in rows)
    last = folder / "checkpoints/step_00004/adapter_model.safetensors"
    whole = load_file(last)
    shutil.rmtree(last.parent)
    assert trained(tiny(tmp_path, *settings), resume=True) == folder
    limit = 1e-5 if dtype == "float32" else 1e-2
    for name, tensor in load_file(last).items():
        torch.testing.assert_close(tensor, whole[name], atol=limit, rtol=limit)


@pytest.mark.parametrize(
    "settings",
    [
        ("advantage={kind='gae'}", "kl={coef=0.05,place='reward',estimator='k1'}"),
        ("model.gradient_checkpointing=true",),
    ],
)
def test_ppo_and_recomputed_blocks_train_on_cuda(tmp_path: Path, settings: tuple[str, ...]) -> None:
    rows = metric_rows(trained(tiny(tmp_path, "model.device=cuda", "steps=2", *settings)))
    assert all(row["ratio_gap"] < 1e-3 for row in rows if "ratio_gap" in row)
    assert any(row.get("update_norm", 0) > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device_gives_the_rollouts_of_the_first() -> None:
    uniforms = uniform_streams(SeedTree(0), 2, range(4), 6, 70)
    found = []
    for device in ("cuda:0", "cuda:1"):
        pick_device(device)
        engine = Engine(tiny_model("qwen2").to(device), byte_tokenizer(), tuple(range(8)))
        found.append([one.ids for one in engine.sample(PROMPTS, 6, Sampling(70), uniforms)])
    pick_device("cuda:0")
    assert found[0] == found[1]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_four_bit_base_trains(tmp_path: Path) -> None:
    load_model(ModelConfig(id="starter", quantization="nf4", device="cuda"))
    folder = trained(tiny(tmp_path, "model.quantization=nf4", "model.device=cuda", "steps=2"))
    assert (folder / "checkpoints/step_00002/adapter_model.safetensors").is_file()
