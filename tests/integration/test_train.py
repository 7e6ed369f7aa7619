"""recipes/tiny.toml from start to end: train, save, kill, resume, evaluate, report."""

from __future__ import annotations

import importlib
import json
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from operando.models.load import STARTER
from operando.recipe.run import Recipe
from operando.recipe_io import check
from operando.run import Run
from operando.types import Trace
from tests.integration.runs import (
    ROOT,
    TINY,
    adapter,
    captured_setups,
    metric_rows,
    python,
    rollout_rows,
    tiny,
    trained,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of tiny, shared by the tests that only read it."""
    return trained(tiny(tmp_path_factory.mktemp("whole")))


# --- what a run leaves ---------------------------------------------------------------------------


def test_run_folder_holds_every_file(whole: Path) -> None:
    assert [row["step"] for row in metric_rows(whole)] == [0, 1, 2, 3, 4]
    assert [("eval/correct" in row) for row in metric_rows(whole)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    for step in (2, 4):
        files = {f.name for f in (whole / "checkpoints" / f"step_{step:05d}").iterdir()}
        assert files >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "resume"}
    evals = sorted(f.name for f in (whole / "evals").iterdir())
    assert evals == [f"held_out_step_{s:05d}.parquet" for s in (0, 2, 4)]
    assert not list(whole.rglob("*.part"))

    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["seed"] == 0
    assert "sha256 model.safetensors" in manifest["model"] and manifest["data"]["train_rows"] == 64
    results = json.loads((whole / "results.json").read_text())
    last = metric_rows(whole)[-1]
    assert results["held_out"]["trained"] == {
        "step": 4,
        "correct": round(last["eval/correct"] * 16),
        "n": 16,
    }


def test_rollouts_add_up(whole: Path) -> None:
    for step in (1, 2, 3, 4):
        rows = rollout_rows(whole, step)
        assert [(r["group"], r["sample"]) for r in rows] == [
            (g, s) for g in range(4) for s in range(4)
        ]
        for r in rows:
            length = len(r["completion_ids"])
            for channel in ("tokens", "sampling_logp", "old_logp", "ref_logp", "entropy"):
                assert len(r[channel]) == length, channel
            assert r["rewards/correct"] == float(r["correct"])
            assert r["reward"] == pytest.approx(r["rewards/correct"] + 0.1 * r["rewards/format"])
            assert sum(r["reward_tokens"]) == pytest.approx(r["reward"])
        metrics = metric_rows(whole)[step]
        mean = sum(r["reward"] for r in rows) / len(rows)
        assert metrics["reward"] == pytest.approx(mean, rel=1e-6)
        for g in range(4):  # a group's advantages cancel
            assert sum(r["advantage"] for r in rows if r["group"] == g) == pytest.approx(
                0, abs=1e-4
            )


def test_adapter_loads_in_plain_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setups = captured_setups(monkeypatch)
    folder = trained(tiny(tmp_path, "steps=2", "optim.lr=1e-2"))
    base = AutoModelForCausalLM.from_pretrained(STARTER)
    ids = torch.arange(3, 40)[None]
    untrained = base(input_ids=ids).logits
    plain = PeftModel.from_pretrained(base, folder / "checkpoints" / "step_00002").eval()
    with torch.no_grad():
        theirs, ours = plain(input_ids=ids).logits, setups[0].policy.model(input_ids=ids).logits
    assert torch.equal(theirs, ours)
    assert not torch.equal(untrained, ours)  # else the adapter did nothing
    config = json.loads((folder / "checkpoints/step_00002/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(STARTER)
    assert config["layers_to_transform"] == [3, 4, 5]
    assert config["target_modules"] == sorted(config["target_modules"]), "of no process's own order"


# --- determinism and resume ----------------------------------------------------------------------


def test_seed_decides_everything(whole: Path, tmp_path: Path) -> None:
    again = trained(tiny(tmp_path))
    assert metric_rows(again) == metric_rows(whole)
    assert all(torch.equal(t, adapter(whole, 4)[n]) for n, t in adapter(again, 4).items())
    other = trained(tiny(tmp_path, "name=other", "seed=1"))
    assert metric_rows(other)[1:] != metric_rows(whole)[1:]
    assert rollout_rows(other, 1)[0]["prompt"] != rollout_rows(whole, 1)[0]["prompt"]


KILLED = """
import importlib, os, signal, sys, warnings
from pathlib import Path
from rich.console import Console
from operando.launch import launch
from operando.recipe_io import load_recipe

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

where, recipe, runs_dir = sys.argv[1:]
train = importlib.import_module("operando.train")
if where == "after step 3":
    from operando.run import Run
    real = Run.log_metrics
    def log_metrics(self, row):
        real(self, row)
        if row["step"] == 3:
            die()
    Run.log_metrics = log_metrics
elif where == "after checkpoint 2":
    real = train.save_checkpoint
    def save_checkpoint(*args):
        real(*args)
        die()
    train.save_checkpoint = save_checkpoint
else:  # inside checkpoint 4: its folder is half written
    from operando.models.policy import Policy
    real = Policy.save_pretrained
    def save_pretrained(self, folder, weights):
        real(self, folder, weights)
        if "step_00004" in folder.name:
            die()
    Policy.save_pretrained = save_pretrained
launch(Console(quiet=True), load_recipe(recipe, (f"runs_dir={runs_dir}",)))
"""


@pytest.mark.parametrize("where", ["after step 3", "after checkpoint 2", "inside checkpoint 4"])
def test_resume_after_sigkill_is_bit_equal(whole: Path, tmp_path: Path, where: str) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    killed = python(str(script), where, str(TINY), str(tmp_path), cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "tiny"
    assert not (folder / "checkpoints" / "step_00004").exists()
    assert not (folder / "results.json").exists()

    if where == "after step 3":  # in a process of its own, as a user would
        args = ("-m", "operando", "train", str(TINY), f"runs_dir={tmp_path}", "--resume")
        done = python(*args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(folder)
    else:
        trained(tiny(tmp_path), resume=True)

    final = "checkpoints/step_00004/adapter_model.safetensors"
    assert (folder / final).read_bytes() == (whole / final).read_bytes()
    assert metric_rows(folder) == metric_rows(whole)
    for step in (1, 2, 3, 4):
        assert rollout_rows(folder, step) == rollout_rows(whole, step)


def test_resume_of_ppo_restores_the_value_head(tmp_path: Path) -> None:
    ppo = ("advantage.kind=gae", "update.epochs=2", "update.num_minibatches=2", "kl.place=reward")
    straight = trained(tiny(tmp_path, "name=straight", *ppo))
    broken = tiny(tmp_path, "name=broken", *ppo)

    class Stop(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        real = Run.log_metrics

        def log_metrics(self: Run, row: dict[str, float]) -> None:
            real(self, row)
            if row["step"] == 3:
                raise Stop

        patch.setattr(Run, "log_metrics", log_metrics)
        with pytest.raises(Stop):
            trained(broken)
    folder = trained(broken, resume=True)
    assert metric_rows(folder) == metric_rows(straight)


# --- variants ------------------------------------------------------------------------------------

VARIANTS = {
    "ppo": ("advantage.kind=gae", "kl.place=reward", "update.epochs=2", "update.num_minibatches=2"),
    "gspo_token": ("loss.kind=gspo_token",),
    "cispo": ("loss.kind=cispo",),
    "rloo": ("advantage.kind=rloo",),
    "leave_one_group_out": ("advantage.kind=leave_one_group_out",),
    "reward_to_go": ("advantage.kind=reward_to_go",),
    "full": (),
    "checkpointing": ("model.gradient_checkpointing=true",),
    "micro": ("update.micro_tokens=100", "update.sampler_correction=token"),
    "discard": ('rollout.discard=["zero_variance", "truncated"]',),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_changes_only_the_layer_set(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[str, torch.Tensor] = {}
    setups = captured_setups(monkeypatch)
    module = importlib.import_module("operando.train")
    real = module.resume

    def resume(setup: object) -> int:
        before.update({n: t.clone() for n, t in setups[0].policy.model.state_dict().items()})
        return real(setup)

    monkeypatch.setattr(module, "resume", resume)
    recipe = tiny(tmp_path, "steps=2", *VARIANTS[variant], lora=variant != "full")
    rows = metric_rows(trained(recipe))
    policy = setups[0].policy
    trainable = set(policy.trainable())
    assert all(any(f"layers.{i}." in name for i in (3, 4, 5)) for name in trainable)
    after = policy.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= trainable
    assert before.keys() == after.keys()
    assert rows[-1]["grad_norm"] > 0 and rows[1]["kl"] == pytest.approx(0, abs=1e-6)
    if variant == "full":
        assert changed == trainable
        assert policy._frozen_copy is not None and rows[2]["kl"] > 0
        frozen = policy._frozen_copy.state_dict()
        assert all(torch.equal(before[name], frozen[name]) for name in before)
    if variant == "ppo":
        assert rows[1]["updates"] == 4 and rows[1]["value_loss"] > 0
        assert any(p.abs().sum() > 0 for p in policy.value_parameters())


def test_micro_batches_change_memory_not_the_gradient(whole: Path, tmp_path: Path) -> None:
    cut = metric_rows(trained(tiny(tmp_path, "steps=1", "update.micro_tokens=100")))
    assert cut[1]["grad_norm"] == pytest.approx(metric_rows(whole)[1]["grad_norm"], rel=1e-4)
    assert cut[1]["loss"] == pytest.approx(metric_rows(whole)[1]["loss"], rel=1e-4, abs=1e-7)


def test_full_parameter_checkpoint_loads_in_plain_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setups = captured_setups(monkeypatch)
    folder = trained(tiny(tmp_path, "steps=2", lora=False))
    plain = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step_00002")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        ours = setups[0].policy.model(input_ids=ids).logits
        assert torch.equal(plain(input_ids=ids).logits, ours)


# --- rewards -------------------------------------------------------------------------------------


def test_stages_switch_weights_at_their_step(tmp_path: Path) -> None:
    stages = (
        "stages=[{until = 1, weights = {correct = 1.0, format = 0.5}},"
        " {until = 3, weights = {correct = 0.25, format = 2.0}},"
        " {weights = {correct = 0.0, format = 1.0}}]"
    )
    folder = trained(tiny(tmp_path, stages))
    wanted = {1: (1.0, 0.5), 2: (0.25, 2.0), 3: (0.25, 2.0), 4: (0.0, 1.0)}
    for step, (correct, form) in wanted.items():
        rows = rollout_rows(folder, step)
        assert any(r["rewards/correct"] for r in rows) and any(r["rewards/format"] for r in rows)
        for r in rows:
            paid = correct * r["rewards/correct"] + form * r["rewards/format"]
            assert r["reward"] == pytest.approx(paid)


REWARDS = '''
def trl_style(completions, answer, log_extra=None, log_metric=None, **kwargs):
    """The signature of TRL's documentation; None where the answer has two digits."""
    assert set(kwargs) >= {"prompts", "completion_ids", "trainer_state", "solution"}, kwargs.keys()
    values = [None if len(a) > 1 else len(c) / 100 for c, a in zip(completions, answer)]
    log_extra("num_chars", [len(c) for c in completions])
    log_metric("step_seen", kwargs["trainer_state"].global_step)
    return values


async def later(completions, **kwargs):
    return [0.5] * len(completions)


def confident(trace, completion_ids):
    """One value a token: the log-prob that the policy gave it."""
    return [row[: len(ids)] for row, ids in zip(trace.logp_BT.tolist(), completion_ids)]
'''


def test_functions_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "my_rewards.py"
    file.write_text(REWARDS)
    parts = [
        f"rewards.{part}={{kind = 'function', path = '{file}:{name}', weight = {weight}}}"
        for part, name, weight in (
            ("chars", "trl_style", 1),
            ("later", "later", 2),
            ("sure", "confident", 0.1),
        )
    ]
    folder = trained(tiny(tmp_path, "steps=2", *parts))
    none, some = 0, 0
    for step in (1, 2):
        assert metric_rows(folder)[step]["step_seen"] == step
        for r in rollout_rows(folder, step):
            assert r["num_chars"] == len(r["completion"])
            assert r["rewards/sure"] == pytest.approx(sum(r["old_logp"]), abs=1e-5)
            total = r["rewards/correct"] + 0.1 * r["rewards/format"] + 0.1 * r["rewards/sure"] + 1.0
            if len(r["answer"]) > 1:
                none += 1
                assert r["rewards/chars"] is None
            else:
                some += 1
                assert r["rewards/chars"] == pytest.approx(r["num_chars"] / 100)
                total += r["rewards/chars"]
            assert r["reward"] == pytest.approx(total, abs=1e-5)
            # The per-token part stands on every token, the scalars on the last.
            assert r["reward_tokens"][0] == pytest.approx(0.1 * r["old_logp"][0], abs=1e-6)
    assert none and some
    evaluated = metric_rows(folder)[0]
    assert "eval/rewards/chars" in evaluated and "eval/rewards/sure" not in evaluated


def test_rollouts_to_which_no_reward_applies_teach_nothing(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "steps=2")
    recipe = recipe.model_copy(update={"rewards": {}})
    tables = recipe.model_dump(mode="json", exclude_none=True)
    tables["rewards"] = {"f": {"kind": "function"}}

    def odd(completions: Sequence[str], trace: Trace) -> list[float | None]:
        return [None if i % 4 == 3 else float(i % 4) for i in range(len(completions))]

    folder = trained(check(Recipe, tables, "test"), functions={"f": odd})
    for r in rollout_rows(folder, 1):
        assert (r["reward"] is None) == (r["sample"] == 3)
        if r["sample"] == 3:
            assert r["advantage"] == 0.0
    group = [r["advantage"] for r in rollout_rows(folder, 1)[:3]]
    assert group == pytest.approx(
        [-1, 0, 1], abs=1e-3
    )  # baseline and std over the three that count


# --- the command line ----------------------------------------------------------------------------


def test_commands_end_with_the_path_they_made(whole: Path, tmp_path: Path) -> None:
    evaluated = python("-m", "operando", "eval", str(whole), "--num", "8", cwd=ROOT)
    assert evaluated.returncode == 0, evaluated.stderr
    assert Path(evaluated.stdout.splitlines()[-1]).is_file()
    page = tmp_path / "page.html"
    reported = python("-m", "operando", "report", str(whole), "--out", str(page), cwd=ROOT)
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout.splitlines()[-1] == str(page)
    assert "<html" in page.read_text()
    checked = python("-m", "operando", "config", str(TINY), "--check", cwd=ROOT)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    dry = python(
        "-m", "operando", "train", str(TINY), f"runs_dir={tmp_path}", "--dry-run", cwd=ROOT
    )
    assert dry.returncode == 0, dry.stderr
    assert "sampler operando" in dry.stderr and not (tmp_path / "tiny").exists()


# --- planted truth -------------------------------------------------------------------------------


def pays_for_seven(completions: Sequence[str]) -> list[float]:
    return [float("7" in c) for c in completions]


def shuffled(completions: Sequence[str]) -> list[float]:
    """The same payments, each given to a sibling at random: nothing to learn."""
    paid = pays_for_seven(completions)
    rng = random.Random("".join(completions))
    for start in range(0, len(paid), 8):
        group = paid[start : start + 8]
        rng.shuffle(group)
        paid[start : start + 8] = group
    return paid


@pytest.mark.parametrize("honest", [True, False])
def test_planted_reward_is_learned_and_its_shuffle_is_not(tmp_path: Path, honest: bool) -> None:
    recipe = tiny(
        tmp_path,
        "steps=25",
        "optim.lr=1e-2",
        "model.layers=all",
        "rollout.num_prompts=8",
        "rollout.num_generations=8",
        "eval.every=25",
        "eval.num=1",
        "rollout.max_completion_length=16",
        "checkpoint.every=25",
        "model.lora.rank=8",
        "rewards.format.weight=0.0",
        "rewards.correct.weight=0.0",
        "rewards.seven={kind = 'function'}",
    )
    recipe = recipe.model_copy(update={"kl": None})
    folder = trained(recipe, functions={"seven": pays_for_seven if honest else shuffled})
    rates = [
        sum("7" in str(r["completion"]) for r in rollout_rows(folder, step)) / 64
        for step in range(1, 26)
    ]
    assert sum(rates[:2]) / 2 < 0.5
    late = sum(rates[-3:]) / 3
    assert late > 0.9 if honest else late < 0.6, rates
