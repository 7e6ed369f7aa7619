"""The loop end to end on the starter: files, PEFT, bit-equal resume, two processes, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM

from operando import cli
from operando.launch import launch
from operando.models.load import STARTER
from operando.recipe_io import load_recipe
from operando.run import read_metrics

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


def test_a_run_leaves_its_files_and_a_plain_peft_adapter(tmp_path: Path) -> None:
    folder = train_tiny(tmp_path)
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2, 3, 4]
    for name in (
        "recipe.toml",
        "manifest.json",
        "results.json",
        "rollouts/step_00004.parquet",
        "evals/held_out_step_00000.parquet",
        "checkpoints/step_00002/README.md",
    ):
        assert (folder / name).is_file(), name
    config = json.loads((folder / "checkpoints/step_00004/adapter_config.json").read_text())
    assert config["layers_to_transform"] == [3, 4, 5]
    assert "/" not in config["base_model_name_or_path"], "a path of this machine"
    base = AutoModelForCausalLM.from_pretrained(STARTER).eval()
    ids = torch.arange(5, 25)[None]
    before = base(ids).logits
    peft = PeftModel.from_pretrained(base, str(folder / "checkpoints/step_00004"))
    assert (peft(ids).logits - before).abs().max() > 1e-4, "the adapter should do something"


@pytest.mark.parametrize("kill_after", [1, 3])
def test_resume_after_a_hard_kill_is_bit_equal(tmp_path: Path, kill_after: int) -> None:
    whole = train_tiny(tmp_path / "whole")
    where = f"runs_dir={tmp_path / 'killed'}"
    command = [sys.executable, "-m", "operando", "train", "tiny", where]
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.DEVNULL)
    killed = tmp_path / "killed" / "tiny"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        file = killed / "metrics.jsonl"
        if file.is_file() and len(file.read_text().splitlines()) > kill_after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    subprocess.run([*command, "--resume"], env=ENV, check=True, capture_output=True)
    assert comparable(killed) == comparable(whole)
    assert adapter(killed) == adapter(whole)


def test_the_seed_decides(tmp_path: Path) -> None:
    first, again = train_tiny(tmp_path / "a"), train_tiny(tmp_path / "b")
    assert comparable(first) == comparable(again) and adapter(first) == adapter(again)
    other = train_tiny(tmp_path / "c", "seed=1")
    assert comparable(other) != comparable(first)


@pytest.mark.parametrize(
    "overrides",
    [
        ("advantage={kind='gae'}", "kl={coef=0.05,place='reward',estimator='k1'}",
         "update={epochs=2,num_minibatches=2}"),
        ("loss={kind='gspo_token'}", "advantage={kind='rloo'}"),
        ("loss={kind='cispo'}", "advantage={kind='leave_one_group_out'}"),
        ("advantage={kind='reward_to_go'}", "update={micro_tokens=100,entropy_coef=0.01}"),
    ],
)  # fmt: skip
def test_other_algorithms_go_through_the_same_loop(tmp_path: Path, overrides: tuple) -> None:
    folder = train_tiny(tmp_path, "steps=2", *overrides)
    rows = read_metrics(folder)
    assert any(row.get("update_norm", 0) > 0 for row in rows)
    assert adapter(folder, 2) != adapter(train_tiny(tmp_path / "b", "steps=2"), 2)


def test_full_training_moves_only_the_layer_set(tmp_path: Path) -> None:
    recipe = load_recipe("tiny", (f"runs_dir={tmp_path}", "steps=2"))
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": None})})
    folder = launch(Console(quiet=True), recipe)
    base = AutoModelForCausalLM.from_pretrained(STARTER).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(folder / "checkpoints/step_00002").state_dict()
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert changed and all(name.split(".")[2] in ("3", "4", "5") for name in changed), changed


def test_a_planted_rule_is_learned_and_a_shuffled_reward_is_not(tmp_path: Path) -> None:
    def has_steps(completions: list[str], **_: object) -> list[float]:
        return [float(";" in c or "=" in c) for c in completions]

    def shuffled(completions: list[str], **_: object) -> list[float]:
        return [float(hash((i * 7919, len(completions))) % 2) for i, _ in enumerate(completions)]

    settings = (
        "steps=14", "rewards.correct.weight=0", "rewards.format.weight=0", "eval.every=14",
        "rewards={paid={kind='function'},probe={kind='function',weight=0}}", "optim.lr=3e-3",
        "rollout.num_prompts=8", "model.layers=all", "checkpoint.every=14",
    )  # fmt: skip
    rule = {"paid": has_steps, "probe": has_steps}
    learned = read_metrics(train_tiny(tmp_path / "a", *settings, functions=rule))
    noise = {"paid": shuffled, "probe": has_steps}
    unlearned = read_metrics(train_tiny(tmp_path / "b", *settings, functions=noise))
    assert learned[1]["rewards/probe/mean"] < 0.7 and learned[-1]["rewards/probe/mean"] > 0.9
    assert unlearned[-1]["rewards/probe/mean"] < 0.8


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path: Path, kind: str) -> None:
    one = train_tiny(tmp_path / "one")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "operando", "train", "tiny", f"runs_dir={tmp_path / 'two'}", f"parallel.kind={kind}",
    ]  # fmt: skip
    subprocess.run(command, env=ENV, check=True, capture_output=True, timeout=180)
    for a, b in zip(comparable(one), comparable(tmp_path / "two" / "tiny"), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


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
        (("kl.coef=0",), "inert"),
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
    assert "not a run folder" in capsys.readouterr().err
    folder = train_tiny(tmp_path, "steps=2")
    again = ("train", "tiny", f"runs_dir={tmp_path}", "steps=2")
    assert run_cli(monkeypatch, *again) == 2
    assert "--resume" in capsys.readouterr().err
    assert run_cli(monkeypatch, *again, "optim.lr=9.0", "--resume") == 2
    assert "optim.lr" in capsys.readouterr().err
    assert run_cli(monkeypatch, "eval", str(folder), "--num", "16") == 0
    assert capsys.readouterr().out.strip().endswith("paired_step_00002.parquet")
    assert run_cli(monkeypatch, "report", str(folder)) == 0
    assert "http" not in Path(capsys.readouterr().out.strip()).read_text().replace("http-equiv", "")
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format": 99}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run_cli(monkeypatch, "report", str(folder)) == 2
    assert "99" in capsys.readouterr().err
