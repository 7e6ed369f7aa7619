"""Runs with a Projector, a shift or an intervention: nothing changed, resumed, refused."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from operando.errors import UserError
from operando.models.directions import DirectionSet, save_directions, unit
from operando.models.load import load_model
from operando.models.policy import Policy
from operando.recipe.data import ModelConfig
from operando.recipe_io import to_toml
from operando.run_folder import read_manifest
from operando.sae.feature_set import model_digest
from tests.integration.runs import adapter, metric_rows, python, rollout_rows, tiny, trained


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DirectionSet:
    """A random direction of the starter model's last three layers, with random inputs."""
    loaded = load_model(ModelConfig())
    width = loaded.model.config.get_text_config().hidden_size
    depth = loaded.model.config.get_text_config().num_hidden_layers
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: unit(torch.randn(module.in_features, generator=generator))
        for name, module in loaded.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    layers = tuple(range(depth - 3, depth))
    return DirectionSet(
        "random",
        "activation",
        unit(torch.randn(width, generator=generator)),
        layers,
        "last",
        "starter",
        model_digest(loaded.identity),
        "float32",
        1.0,
        inputs=inputs,
        evidence={"clean_q95": 0.0} | {f"norm_{layer}": 1.0 for layer in layers},
    )


@pytest.fixture(scope="module")
def file(made: DirectionSet, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("directions") / "random.safetensors"
    save_directions(made, path)
    return str(path)


def with_directions(table: str, file: str, *overrides: str) -> tuple[str, ...]:
    return (f"{table}.directions={json.dumps(file)}", *(f"{table}.{o}" for o in overrides))


def same_adapter(one: Path, other: Path, step: int) -> bool:
    left, right = adapter(one, step), adapter(other, step)
    return all(torch.equal(left[name], right[name]) for name in left)


def test_a_measured_run_is_the_plain_run_bit_by_bit(tmp_path: Path, file: str) -> None:
    plain = trained(tiny(tmp_path / "plain"))
    settings = with_directions("projection", file, "gate=measure", "stage=gradient", "mode=token")
    for name, more in {"update": settings[:2], "token": settings}.items():
        run = trained(tiny(tmp_path / name, *more))
        assert same_adapter(plain, run, 4)
        rows = metric_rows(run)
        assert all(abs(r["projection/update_cos"]) < 1 for r in rows[1:])
        kept = [{k: v for k, v in r.items() if k[:11] != "projection/"} for r in rows]
        assert kept == metric_rows(plain)


@pytest.mark.parametrize(
    "settings",
    [
        ("projection.preset=hard",),
        ("projection.preset=projected_grpo",),
        ("projection.gate=one_sided", "projection.stage=momentum"),
    ],
)
def test_a_projected_run_resumes_bit_equal(
    tmp_path: Path, file: str, settings: tuple[str, ...]
) -> None:
    overrides = (*with_directions("projection", file), *settings)
    whole = trained(tiny(tmp_path / "a", *overrides))
    half = trained(tiny(tmp_path / "b", *overrides))
    shutil.rmtree(half / "checkpoints" / "step_00004")
    (half / "results.json").unlink()
    again = trained(tiny(tmp_path / "b", *overrides), resume=True)
    assert metric_rows(again) == metric_rows(whole)
    assert same_adapter(again, whole, 4)
    plain = trained(tiny(tmp_path / "plain"))
    assert not same_adapter(plain, whole, 4)
    manifest = read_manifest(whole)
    assert manifest["projection"]["arm"] == "random"  # pyright: ignore
    assert ("literal_grad" in str(manifest["warnings"])) is ("projected_grpo" in settings[0])


def test_a_run_that_follows_its_policy_resumes_bit_equal(
    tmp_path: Path, file: str, made: DirectionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refreshed direction is any function of the policy: here, of one adapter's B."""

    def following(policy: Policy) -> DirectionSet:
        adapters = policy.trainable().items()
        B_or = next(p for name, p in adapters if "o_proj.lora_B" in name)
        return replace(made, vector_D=unit(made.vector_D + 50 * B_or.detach().sum(1)))

    module = importlib.import_module("operando.launch")
    monkeypatch.setattr(module, "refresher", lambda *_: following)
    settings = (*with_directions("projection", file, "stage=momentum", "refresh=2"), "steps=6")
    whole = trained(tiny(tmp_path / "a", *settings))
    overlaps = [r["projection/overlap"] for r in metric_rows(whole)[1:]]
    assert overlaps[0] == overlaps[1] == 1.0 > overlaps[2] == overlaps[3] != overlaps[4] < 1.0
    saved = sorted(f.name for f in (whole / "directions").iterdir())
    assert saved == ["step_00002.safetensors", "step_00004.safetensors"]
    for last in (4, 2):
        half = trained(tiny(tmp_path / f"b{last}", *settings))
        for step in range(last + 2, 7, 2):
            shutil.rmtree(half / "checkpoints" / f"step_{step:05d}")
        (half / "results.json").unlink()
        again = trained(tiny(tmp_path / f"b{last}", *settings), resume=True)
        assert metric_rows(again) == metric_rows(whole)
        assert same_adapter(again, whole, 6)


def test_the_micro_batch_split_does_not_change_a_projected_gradient(
    tmp_path: Path, file: str
) -> None:
    token = with_directions("projection", file, "mode=token", "gate=one_sided", "stage=gradient")
    rows = {}
    for name, more in {
        "whole": ["update.micro_tokens=100000"],
        "split": ["update.micro_tokens=64"],
        "checkpointing": ["update.micro_tokens=100000", "model.gradient_checkpointing=true"],
    }.items():
        run = trained(tiny(tmp_path / name, *token, "steps=1", *more))
        rows[name] = metric_rows(run)[1]
    for other in ("split", "checkpointing"):
        assert rows[other]["grad_norm"] == pytest.approx(rows["whole"]["grad_norm"], rel=1e-4)
        share = "projection/grad_share"
        assert rows[other][share] == pytest.approx(rows["whole"][share], rel=1e-3)


@pytest.mark.parametrize("kind", ["rebound", "penalty", "screening"])
def test_a_shift_changes_what_is_paid_and_says_for_whom(
    tmp_path: Path, file: str, kind: str
) -> None:
    shift = (f"shift.kind={kind}", *with_directions("shift", file))
    run = trained(tiny(tmp_path, *shift, "steps=2"))
    rows = metric_rows(run)[1:]
    assert all(0 < r["shift/touched"] < 1 for r in rows)
    for row in rollout_rows(run, 1):
        parts = float(str(row["rewards/correct"])) + 0.1 * float(str(row["rewards/format"]))
        if not row["shift_touched"]:
            assert row["reward"] == pytest.approx(parts)
        elif kind == "penalty":
            assert row["reward"] == pytest.approx(parts - 3.0)
        elif kind == "screening":
            assert row["reward"] is None and row["advantage"] == 0
        else:
            assert parts == 0 or row["reward"] < 0 < parts  # alpha 2 turns the sign


def test_directions_of_another_model_or_dtype_are_refused(
    tmp_path: Path, made: DirectionSet
) -> None:
    for change, message in (
        ({"model_sha256": "0" * 64}, "was made on model"),
        ({"dtype": "bfloat16"}, "was extracted in bfloat16"),
    ):
        path = tmp_path / "other.safetensors"
        save_directions(replace(made, **change), path)
        for table, kind in (("projection", "preset=strict"), ("shift", "kind=rebound")):
            settings = (f"{table}.{kind}", *with_directions(table, str(path)))
            with pytest.raises(UserError, match=message):
                trained(tiny(tmp_path / "runs", *settings))


def test_what_a_projection_cannot_be_combined_with(tmp_path: Path, file: str) -> None:
    strict = with_directions("projection", file, "preset=strict")
    for settings, message, lora in (
        (("parallel.kind=fsdp",), "needs whole tensors", True),
        (("projection.mode=token", "projection.stage=gradient"), "LoRA branch", False),
        (("projection.purge=true",), "empties an adapter", False),
    ):
        with pytest.raises(UserError, match=message):
            tiny(tmp_path, *strict, *settings, lora=lora)


def test_interventions_act_in_training_and_not_in_evaluation(tmp_path: Path, file: str) -> None:
    """No block is trained on anything (lr tiny): what differs is the intervention alone."""
    hf = ("rollout.engine=hf", "steps=1", "optim.lr=1e-12")
    plain = trained(tiny(tmp_path / "plain", *hf))
    for kind in ("suppress", "ablate"):
        table = (f"intervention.kind={kind}", *with_directions("intervention", file))
        run = trained(tiny(tmp_path / kind, *hf, *table))
        rows, plain_rows = rollout_rows(run, 1), rollout_rows(plain, 1)
        assert [r["sampling_logp"] for r in rows] != [r["sampling_logp"] for r in plain_rows]
        gap = [
            abs(a - b)
            for r in rows
            for a, b in zip(r["sampling_logp"], r["old_logp"], strict=True)  # pyright: ignore
        ]
        assert (max(gap) < 1e-3) is (kind == "ablate")  # suppressed samples are off-policy
        evals = [metric_rows(folder)[0]["eval/correct"] for folder in (run, plain)]
        lengths = [metric_rows(folder)[0]["eval/mean_length"] for folder in (run, plain)]
        assert evals[0] == evals[1] and lengths[0] == lengths[1]
    with pytest.raises(UserError, match='rollout.engine = "hf"'):
        tiny(tmp_path, *table)


def test_two_processes_project_and_shift_as_one_does(tmp_path: Path, file: str) -> None:
    settings = (
        *with_directions("projection", file, "mode=token", "gate=one_sided", "stage=gradient"),
        "shift.kind=rebound",
        *with_directions("shift", file, "variant=additive"),
        "steps=2",
    )
    one = trained(tiny(tmp_path, "name=one", *settings))
    recipe = tmp_path / "two.toml"
    recipe.write_text(to_toml(tiny(tmp_path, "name=two", *settings)))
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "operando")
    done = python(*run, "train", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for a, b in zip(metric_rows(one), metric_rows(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for key in set(a) & {"reward", "shift/touched", "shift/score", "grad_norm"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-7), (key, a["step"])
        for key in [k for k in a if k[:11] == "projection/" and k[-5:] in ("_cos", "share")]:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-5), (key, a["step"])
