"""The loop, the engine, the projection and the SAEs on a GPU.

Where there is no CUDA device, what needs none runs on the CPU (`DEVICE`), so that this file is
tried on every machine.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from operando.models.directions import DirectionSet, save_directions, unit
from operando.models.load import load_model, pick_device
from operando.models.logprobs import HeadConfig, token_logps
from operando.models.prefix import Prefix
from operando.recipe.data import ModelConfig
from operando.rollout.engine import Engine
from operando.rollout.kernels import attend, fuses, pick, rotate_into
from operando.rollout.sampler import Request, Sampled, Sampling, uniform_streams
from operando.run import SeedTree
from operando.sae.feature_set import model_digest
from operando.sae.train import SaeTrainConfig, train_sae
from tests.integration.runs import metric_rows, tiny, trained
from tests.unit.tiny import byte_tokenizer, tiny_model

pytestmark = pytest.mark.gpu
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

PROMPTS = [[5, 9, 40, 7], [100, 3], [77, 78, 79, 80, 81, 82, 83], [9]]
LONG = "rollout.max_completion_length=70"  # long enough for captured steps


def completions(engine: Engine, prefix: Prefix | None = None) -> list[Sampled]:
    uniforms = uniform_streams(SeedTree(0), 2, range(4), 6, 70)
    return engine.sample(Request(PROMPTS, 6, Sampling(70), uniforms), prefix)


def engine_of(family: str, dtype: torch.dtype, device: str = DEVICE) -> Engine:
    """A tiny engine with eight end tokens of 258: rows end at all lengths and are compacted."""
    return Engine(tiny_model(family).to(device, dtype), byte_tokenizer(), tuple(range(8)))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_captured_steps_give_the_rollouts_of_plain_ones(family: str, dtype: torch.dtype) -> None:
    engine, prefix = engine_of(family, dtype), Prefix(2)
    assert engine.use_graphs
    captured = completions(engine, prefix)
    engine.use_graphs, other = False, Prefix(2)
    plain = completions(engine, other)
    assert len({len(one.ids) for one in captured}) > 5
    if dtype == torch.float32:
        assert [one.ids for one in captured] == [one.ids for one in plain]
        for row, hidden in prefix.rows.items():  # nothing reads the last token's
            torch.testing.assert_close(hidden[:-1], other.rows[row][:-1], atol=1e-4, rtol=1e-4)
    else:  # a product of another batch size may round the other way
        same = sum(a.ids == b.ids for a, b in zip(captured, plain, strict=True))
        assert same > len(plain) // 2


@needs_cuda
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_the_gpu_gives_the_rollouts_of_the_cpu(family: str) -> None:
    """The same uniforms and weights in float32; the first tokens at least agree in every row."""
    here = completions(engine_of(family, torch.float32, "cpu"))
    there = completions(engine_of(family, torch.float32, "cuda"))
    same = sum(a.ids == b.ids for a, b in zip(here, there, strict=True))
    assert same >= len(here) - 2, f"{same} of {len(here)} completions agree"


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(14, 2, 64), (12, 2, 128), (8, 8, 16), (4, 1, 256)])
def test_the_kernels_of_decoding_equal_the_plain_ones(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Rows at the first position, at the last, and on both sides of a block of cached positions."""
    (heads, kv_heads, d), room = shape, 300
    position_B = torch.tensor([0, 5, 31, 32, 127, 128, 299])
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    num = len(position_B)
    q_BHd, k_BKd, v_BKd = noise(num, heads, d), noise(num, kv_heads, d), noise(num, kv_heads, d)
    keys, values = noise(num, kv_heads, room, d), noise(num, kv_heads, room, d)
    angle_Sd = torch.randn(room, d, generator=generator)
    tables = (angle_Sd.cos().to(dtype), angle_Sd.sin().to(dtype))
    logits_BV, u_B = 3 * torch.randn(num, 5003), torch.rand(num, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        q, k, v, K, V, cos, sin, at = (
            x.clone().to(device) for x in (q_BHd, k_BKd, v_BKd, keys, values, *tables, position_B)
        )
        assert fuses(q.device, d) == (device == "cuda")
        turned = rotate_into(q, k, v, K, V, cos, sin, at)
        read = attend(turned, K, V, at, room)
        drawn = pick(logits_BV.to(device, dtype), u_B.to(device), 0.7)
        greedy = pick(logits_BV.to(device), None)
        found.append([x.cpu() for x in (turned, K, V, read, *drawn, *greedy)])
    fine = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, atol=fine, rtol=fine)


@needs_cuda
def test_chunked_head_equals_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(300, 32, generator=generator)
    weight_VD = torch.randn(5000, 32, generator=generator)
    target_N = torch.randint(5000, (300,), generator=generator)
    here = token_logps(hidden_ND, weight_VD, target_N, HeadConfig())
    there = token_logps(hidden_ND.cuda(), weight_VD.cuda(), target_N.cuda(), HeadConfig())
    torch.testing.assert_close(there.logp_N.cpu(), here.logp_N, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loop_trains_and_resumes(tmp_path: Path, dtype: str) -> None:
    settings = (f"model.dtype={dtype}", f"model.device={DEVICE}", LONG)
    folder = trained(tiny(tmp_path, *settings))
    rows = metric_rows(folder)
    assert any(row.get("update_norm", 0) > 0 for row in rows)
    assert all(row["ratio_gap"] < (1e-3 if dtype == "float32" else 0.3) for row in rows[1:])
    last = folder / "checkpoints/step_00004/adapter_model.safetensors"
    whole = load_file(last)
    shutil.rmtree(last.parent)
    (folder / "results.json").unlink()
    assert trained(tiny(tmp_path, *settings), resume=True) == folder
    assert len(metric_rows(folder)) == len(rows)
    again = load_file(last)
    gap = max(float((again[n] - whole[n]).abs().max()) for n in whole)
    size = max(float(tensor.abs().max()) for tensor in whole.values())
    assert gap <= (0 if DEVICE == "cpu" else 0.05 * size), (gap, size)


@pytest.mark.parametrize(
    "settings",
    [
        ("advantage={kind='gae'}", "kl={coef=0.05,place='reward',estimator='k1'}"),
        ("model.gradient_checkpointing=true",),
        ("model.dtype=bfloat16", "model.layers=last:2"),
        ("advantage={kind='gae'}", "full"),
    ],
    ids=["ppo", "recomputed", "prefix", "full"],
)
def test_every_way_to_train(tmp_path: Path, settings: tuple[str, ...]) -> None:
    lora = "full" not in settings
    some = tuple(s for s in settings if s != "full")
    if not lora:
        some = (*some, "model.layers=all", "optim.lr=1e-4")
    recipe = tiny(tmp_path, f"model.device={DEVICE}", "steps=2", LONG, *some, lora=lora)
    rows = metric_rows(trained(recipe))
    exact = not any("bfloat16" in s for s in some)
    assert all(row["ratio_gap"] < (1e-3 if exact else 0.3) for row in rows if "ratio_gap" in row)
    assert any(row.get("update_norm", 0) > 0 for row in rows)


def test_a_projected_run_leaves_the_direction_alone(tmp_path: Path) -> None:
    loaded = load_model(ModelConfig())
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: unit(torch.randn(module.in_features, generator=generator))
        for name, module in loaded.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    config = loaded.model.config.get_text_config()
    v_D = unit(torch.randn(config.hidden_size, generator=generator))
    last = config.num_hidden_layers - 1
    made = DirectionSet(
        "random",
        "activation",
        v_D,
        (last,),
        "last",
        "starter",
        model_digest(loaded.identity),
        "float32",
        1.0,
        inputs=inputs,
        evidence={"clean_q95": 0.0, f"norm_{last}": 1.0},
    )
    file = tmp_path / "random.safetensors"
    save_directions(made, file)
    folder = trained(
        tiny(
            tmp_path,
            f"model.device={DEVICE}",
            "steps=3",
            "checkpoint.every=3",
            f'projection.directions="{file}"',
            "projection.gate=two_sided",
            "projection.stage=update",
            "optim.lr=1e-2",
        )
    )
    weights = load_file(folder / "checkpoints/step_00003/adapter_model.safetensors")
    writers = [
        name
        for name in weights
        if name.endswith(("o_proj.lora_B.weight", "down_proj.lora_B.weight"))
        and f"layers.{last}." in name
    ]
    assert len(writers) == 2
    for name in writers:
        change_OI = weights[name] @ weights[name.replace("lora_B", "lora_A")]
        assert float(change_OI.norm()) > 1e-3
        assert float((v_D @ change_OI).norm() / change_OI.norm()) < 1e-3, name


@pytest.mark.parametrize("mode", ["sae_rl", "default"])
@pytest.mark.parametrize("select", ["float32", "bfloat16"])
def test_an_sae_trains_as_on_the_cpu(mode: str, select: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(2048, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    config = SaeTrainConfig(
        d_sae=256, k=8, mode=mode, batch_size=256, epochs=3, select=select, lr=5e-3
    )
    here = train_sae(x_TD[:1792], x_TD[1792:], config)
    there = train_sae(x_TD[:1792].to(DEVICE), x_TD[1792:].to(DEVICE), config)
    assert there.sae.W_enc_MD.device.type == DEVICE
    for one, other in zip(here.history, there.history, strict=True):
        assert other.val_mse == pytest.approx(one.val_mse, rel=1e-3)
    assert here.history[-1].val_mse < 0.98 * here.history[0].val_mse


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device_gives_the_rollouts_of_the_first() -> None:
    found = []
    for device in ("cuda:0", "cuda:1"):
        pick_device(device)
        found.append([one.ids for one in completions(engine_of("qwen2", torch.float32, device))])
    pick_device("cuda:0")
    assert found[0] == found[1]


@needs_cuda
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_four_bit_base_trains(tmp_path: Path) -> None:
    load_model(ModelConfig(id="starter", quantization="nf4", device="cuda"))
    folder = trained(tiny(tmp_path, "model.quantization=nf4", "model.device=cuda", "steps=2"))
    assert (folder / "checkpoints/step_00002/adapter_model.safetensors").is_file()
