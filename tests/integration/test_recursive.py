"""Reinforcement learning of a recursive model that halts: its exits are replayed in the update."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from operando.evals.certify import certify_run
from operando.evals.depth import measure_depth
from operando.models.recursive import RecursiveCausalLM
from operando.rewards.base import TrainerState
from tests.integration.runs import captured_setups, metric_rows, tiny, trained
from tests.unit.recursive_models import random_recursive
from tests.unit.tiny import byte_tokenizer

HALT, LOOPS = 0.6, 4


def low_ids(completion_ids: Sequence[Sequence[int]]) -> list[float]:
    """Pays for tokens of the lower half: what a random model already writes half of the time."""
    return [sum(i < 129 for i in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def halting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: random, and its tokens take 1 to 4 loops."""
    folder = tmp_path_factory.mktemp("models") / "halting"
    random_recursive(num_loops=LOOPS, halt_threshold=HALT).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def train(
    runs: Path,
    model: Path,
    *overrides: str,
    lora: bool,
    resume: bool = False,
    stop_at: int | None = None,
) -> Path:
    def paid(completion_ids: Sequence[Sequence[int]], **given: object) -> list[float]:
        state = given["trainer_state"]
        assert isinstance(state, TrainerState)
        if state.global_step == stop_at:
            raise KeyboardInterrupt
        return low_ids(completion_ids)

    recipe = tiny(
        runs,
        f"model.id={json.dumps(str(model))}",
        "model.layers=all",
        "rewards={low={kind='function'}}",
        "rollout.max_completion_length=12",
        "rollout.num_prompts=2",
        "eval={every=4,num=4}",
        "checkpoint.every=2",
        "optim={lr=1e-3,weight_decay=0.1}",
        *overrides,
        lora=lora,
    )
    return trained(recipe, resume=resume, functions={"low": paid})


@pytest.mark.parametrize(
    ("lora", "credit"), [(True, "last"), (True, "progressive"), (False, "progressive")]
)
def test_a_halting_model_learns_from_the_loops_that_its_tokens_took(
    tmp_path: Path, halting: Path, monkeypatch: pytest.MonkeyPatch, lora: bool, credit: str
) -> None:
    setups = captured_setups(monkeypatch)
    extra = (f"update.loop_credit={credit}", "steps=3")
    folder = train(tmp_path, halting, *extra, lora=lora)
    rows = metric_rows(folder)[1:]
    assert rows[0]["ratio_gap"] == 0.0 and rows[0]["kl"] == 0.0
    assert max(row["sampler/gap_max"] for row in rows) < 1e-5
    assert min(row["sampler/ess"] for row in rows) > 0.9999
    assert all(row["update_norm"] > 0 for row in rows)
    assert rows[-1]["kl"] > 0
    warnings = json.loads((folder / "manifest.json").read_text())["warnings"]
    assert [w.split("%")[1] for w in warnings] == [  # nothing of ratio, gap, padding or gradients
        " of the completions are cut at the limit: raise rollout.max_completion_length, or give a "
        "rollout.stop text"
    ]
    assert all(1.2 < row["loops/mean"] < LOOPS - 0.2 for row in rows)
    assert certify_run(folder, None)[0].passed

    base = AutoModelForCausalLM.from_pretrained(halting)
    assert isinstance(base, RecursiveCausalLM)
    step = folder / "checkpoints" / "step_00003"
    plain = (
        PeftModel.from_pretrained(base, step)
        if lora
        else (AutoModelForCausalLM.from_pretrained(step))
    )
    ids = torch.tensor([[5, 9, 40, 77, 8]])
    with torch.no_grad():
        want = setups[0].policy.model(input_ids=ids).logits
        assert torch.equal(plain.eval()(input_ids=ids).logits, want)
    if not lora:  # heads that no reward reaches keep every bit, weight decay or not
        before, after = (
            dict(m.named_parameters())
            for m in (AutoModelForCausalLM.from_pretrained(halting), plain)
        )
        apart = [n for n in before if "halt_head" in n or "speculative" in n]
        assert len(apart) == 10
        assert all(torch.equal(before[n], after[n]) for n in apart)
        assert not torch.equal(before["model.depth_gate"], after["model.depth_gate"])


@pytest.mark.parametrize("lora", [True, False])
def test_a_halting_run_resumes_bit_equal(tmp_path: Path, halting: Path, lora: bool) -> None:
    extra = ("update.loop_credit=uniform",)
    extra = (*extra, "steps=4")
    whole = train(tmp_path / "a", halting, *extra, lora=lora)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", halting, *extra, lora=lora, stop_at=3)
    part = train(tmp_path / "b", halting, *extra, lora=lora, resume=True)
    assert metric_rows(part) == metric_rows(whole)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    files = [f / "checkpoints" / "step_00004" / name for f in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_full_training_certifies_and_a_planted_leak_into_the_heads_is_found(
    tmp_path: Path, halting: Path
) -> None:
    folder = train(tmp_path, halting, "steps=2", lora=False)
    certificate = certify_run(folder, None)[0]
    checks = {check.name: check for check in certificate.checks}
    assert checks["planted leak"].detail.startswith("found: a trainable tensor outside the set")
    assert checks["frozen tensors"].detail.startswith("30 unchanged")


def test_the_depth_of_a_recursive_run_is_measured(tmp_path: Path, halting: Path) -> None:
    """Its two ends and the places between them; the two models are those of the run."""
    folder = train(tmp_path, halting, "optim={lr=3e-2}", "steps=4", lora=True)
    report = measure_depth(folder, num=4, search=4)
    assert report.step == 4 and report.flips > 0 and max(report.kl) > 1e-3
    tokens = {(row.arm, row.k): row.tokens for row in report.rows}
    assert tokens["base", None] == tokens["trained", None] == 0
    assert 0 < tokens["base, trained's tokens", 1] <= 1
    assert tokens["base, trained's tokens", 1] < tokens["base, trained's tokens", 8]
