"""Other algorithms through the same loop, two processes, and bad input, on the starter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from operando import cli, setup
from operando.errors import UserError
from operando.evals import ask as evals_ask
from operando.evals.evaluate import evaluate
from operando.evals.questions import EvalConfig
from operando.launch import launch
from operando.models.load import STARTER
from operando.recipe_io import load_recipe
from operando.run import Run
from operando.run_folder import read_metrics
from operando.train import train
from operando.types import Prompt

ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train_tiny(tmp_path: Path, *overrides: str, **keywords: object) -> Path:
    recipe = load_recipe("tiny", (f"runs_dir={tmp_path}", *overrides))
    folder = launch(Console(quiet=True), recipe, **keywords)
    assert folder is not None
    return folder


def comparable(folder: Path) -> list[dict[str, float]]:
    clocks = ("time/", "tokens_per_second")
    return [
        {k: v for k, v in row.items() if not k.startswith(clocks)} for row in read_metrics(folder)
    ]


def adapter(folder: Path, step: int = 4) -> bytes:
    return (folder / f"checkpoints/step_{step:05d}/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "overrides",
    [
        (
            "advantage={kind='gae'}",
            "kl={coef=0.05,place='reward',estimator='k1'}",
            "update={epochs=2,num_minibatches=2}",
        ),
        ("loss={kind='gspo_token'}", "advantage={kind='rloo'}"),
        ("loss={kind='cispo'}", "advantage={kind='leave_one_group_out'}"),
        ("advantage={kind='reward_to_go'}", "update={micro_tokens=100,entropy_coef=0.01}"),
    ],
)
def test_other_algorithms_go_through_the_same_loop(tmp_path: Path, overrides: tuple) -> None:
    folder = train_tiny(tmp_path, "steps=2", *overrides)
    rows = read_metrics(folder)
    assert any(row.get("update_norm", 0) > 0 for row in rows)
    assert adapter(folder, 2) != adapter(train_tiny(tmp_path / "b", "steps=2"), 2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path: Path, kind: str) -> None:
    one = train_tiny(tmp_path / "one")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "operando",
        "train",
        "tiny",
        f"runs_dir={tmp_path / 'two'}",
        f"parallel.kind={kind}",
    ]
    subprocess.run(command, env=ENV, check=True, capture_output=True, timeout=180)
    for a, b in zip(comparable(one), comparable(tmp_path / "two" / "tiny"), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_a_process_without_a_row_of_a_minibatch_takes_part(tmp_path: Path) -> None:
    """Four rows in four minibatches: in each, one of the two processes has nothing of its own."""
    few = (
        "rollout.num_prompts=2",
        "rollout.num_generations=2",
        "update.num_minibatches=4",
        "steps=2",
    )
    one = train_tiny(tmp_path / "one", *few)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "operando",
        "train",
        "tiny",
        f"runs_dir={tmp_path / 'two'}",
        *few,
    ]
    subprocess.run(command, env=ENV, check=True, capture_output=True, timeout=120)
    for a, b in zip(comparable(one), comparable(tmp_path / "two" / "tiny"), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            # Adam scales the rounding noise of a minibatch without signal up to a whole step.
            rel = 0.05 if key == "update_norm" else 1e-3
            assert b[key] == pytest.approx(value, rel=rel, abs=1e-5), key


def test_a_gradient_that_is_not_finite_ends_the_run_and_keeps_the_batch(tmp_path: Path) -> None:
    def breaks(parameters) -> dict[str, float]:
        next(iter(parameters.values())).grad.view(-1)[0] = float("nan")
        return {}

    recipe = load_recipe("tiny", (f"runs_dir={tmp_path}",))
    run = Run.create(recipe, "test")
    with pytest.raises(FloatingPointError, match="step 1: the gradient's norm is nan"):
        train(recipe, run, gradient_transforms=[breaks])
    run.close()
    dumped = torch.load(run.folder / "broken_step_00001.pt")
    assert len(dumped["completions"]) == len(dumped["adv_BT"]) > 0
    assert not list((run.folder / "checkpoints").glob("*"))


@pytest.mark.parametrize("kind", ["gradient_transforms", "update_transforms"])
def test_a_transforms_metric_takes_the_place_of_none_of_the_runs(tmp_path: Path, kind: str) -> None:
    def measures(*_: object) -> dict[str, float]:
        return {"mine": 1.0, "grad_norm": 7.0}

    recipe = load_recipe("tiny", (f"runs_dir={tmp_path}", "eval.num=4"))
    run = Run.create(recipe, "test")
    with pytest.raises(UserError, match="transform's metrics: 'grad_norm' .* 'user/grad_norm'"):
        train(recipe, run, **{kind: [measures]})
    run.close()


def test_sixteen_bit_weights_are_not_trained(tmp_path: Path) -> None:
    """The adapter's factors are float32; without one the weights themselves would take the step."""
    recipe = load_recipe("ppo_flexible", (f"runs_dir={tmp_path}", "model.dtype=bfloat16"))
    with pytest.raises(UserError, match="without model.lora: the trained weights would be 16 bit"):
        launch(Console(quiet=True), recipe)
    assert not list(tmp_path.iterdir()), "a failed start must not block the next"
    folder = train_tiny(tmp_path, "steps=1", "model.dtype=bfloat16", "model.lora.rank=2")
    saved = load_file(folder / "checkpoints/step_00001/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_a_run_does_not_go_on_with_other_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_tiny(tmp_path, "steps=2")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["prompts_sha256"]) == 64
    train_tiny(tmp_path, "steps=2", resume=True)
    real = setup.make_prompts
    monkeypatch.setattr(
        setup, "make_prompts", lambda *a: [replace(p, ids=(5, *p.ids)) for p in real(*a)]
    )
    with pytest.raises(UserError, match="was started with other prompts"):
        train_tiny(tmp_path, "steps=2", resume=True)


def test_a_run_keeps_the_day_on_which_it_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chat template prints the date: resumed and asked later, it still has the first day's."""
    model = tmp_path / "model"
    shutil.copytree(STARTER, model)
    (model / "chat_template.jinja").write_text(
        "{{ strftime_now('%Y %B %d') }} {% for m in messages %}{{ m.content }} {% endfor %}"
    )
    chat = (f"model.id={model}", "prompt.format=chat", "eval.num=4")
    folder = train_tiny(tmp_path, *chat, "steps=4", "name=whole")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["started"] = "2024-02-29T12:00:00Z"
    del manifest["prompts_sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(folder / "checkpoints/step_00004")
    train_tiny(tmp_path, *chat, "steps=4", "name=whole", resume=True)
    train_tiny(tmp_path, *chat, "steps=4", "name=whole", resume=True)  # the same ids once more
    for step in (3, 4):
        rows = pq.read_table(folder / f"rollouts/step_{step:05d}.parquet").to_pylist()
        assert all("2024 February 29" in str(row["prompt"]) for row in rows)
    asked: list[Prompt] = []
    real = evals_ask.make_prompts

    def recorded(*a):
        asked.extend(real(*a))
        return real(*a)

    monkeypatch.setattr(evals_ask, "make_prompts", recorded)
    evaluate(folder, EvalConfig(num=2))
    evaluate(folder, EvalConfig(("graph_search",), num=2))
    assert len(asked) == 8
    assert all(p.text.startswith("2024 February 29 ") for p in asked)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["operando", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


REWARDS = """
def raises(completions, **kw): return [1 / 0 for _ in completions]
def nan(completions, **kw): return [float("nan") for _ in completions]
def short(completions, **kw): return [1.0]
def scalar(completions, **kw): return 1.0
def wants(completions, colour): return [0.0 for _ in completions]
"""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("modle.id=x",), "Did you mean 'model'"),
        (("steps=many",), "steps"),
        (("kl.coef=0",), "no effect"),
        (("rollout.num_generations=1",), "at least 2"),
        (("rollout.top_p=0.9",), "truncated support"),
        (("model.layers=9-12",), "0-5"),
        (("model.layers=4-2",), "reversed"),
        (("model.lora.targets=['q_porj']",), "Did you mean 'q_proj'"),
        (("model.id=no/such/folder/at-all",), "can't be loaded"),
        (("model.id=smolm2",), "neither a folder"),
        (("model.device=cuda:7",), "CUDA"),
        (("prompt.max_prompt_length=5",), "over the limit"),
        (("task={kind='gsm8k',train='none.jsonl',test='none.jsonl'}",), "none.jsonl"),
        (("rewards={r={kind='function',path='gone.py:f'}}",), "gone.py"),
        (("rewards={r={kind='function',path='FILE:raises'}}",), "ZeroDivisionError"),
        (("rewards={r={kind='function',path='FILE:nan'}}",), "not finite"),
        (("rewards={r={kind='function',path='FILE:short'}}",), "1 values for 1"),
        (("rewards={r={kind='function',path='FILE:scalar'}}",), "expected a list"),
        (("rewards={r={kind='function',path='FILE:wants'}}",), "colour"),
        (("rewards={r={kind='function',path='FILE:rasies'}}",), "Did you mean 'raises'"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS)
    given = [o.replace("FILE", str(file)) for o in overrides]
    assert run_cli(monkeypatch, "train", "tiny", f"runs_dir={tmp_path / 'runs'}", *given) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message, message
    assert not (tmp_path / "runs" / "tiny").exists(), "a failed start must not block the next"


def test_folders_that_are_no_runs_and_changed_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "eval", str(tmp_path)) == 2
    assert "neither a run folder" in capsys.readouterr().err
    folder = train_tiny(tmp_path, "steps=2")
    again = ("train", "tiny", f"runs_dir={tmp_path}", "steps=2")
    assert run_cli(monkeypatch, *again) == 2
    assert "--resume" in capsys.readouterr().err
    assert run_cli(monkeypatch, *again, "optim.lr=9.0", "--resume") == 2
    assert "optim.lr" in capsys.readouterr().err
    assert run_cli(monkeypatch, "eval", str(folder), "--num", "16") == 0
    assert capsys.readouterr().out.strip().endswith("answers_step_00002_words_raw_greedy.parquet")
    assert run_cli(monkeypatch, "report", str(folder)) == 0
    assert "http" not in Path(capsys.readouterr().out.strip()).read_text().replace("http-equiv", "")
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 99}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run_cli(monkeypatch, "report", str(folder)) == 2
    assert "99" in capsys.readouterr().err
