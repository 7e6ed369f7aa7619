"""What a step's numbers say of a reward part that applied to none of its rollouts."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from operando.records import batch_metrics, eval_metrics
from operando.rollout.greedy_eval import Graded
from operando.run import write_json
from operando.stats.intervals import Interval
from operando.types import Rewards, Trace, Verdict
from tests.unit.tiny import random_batch


def test_a_part_that_never_applied_has_no_mean() -> None:
    batch = random_batch(2, 2)
    shape = batch.mask_BT.shape
    paid_BT = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    parts = {"paid": paid_BT, "never": torch.full(shape, torch.nan)}
    rewards = Rewards(parts, {"paid": 1.0, "never": 1.0}, paid_BT)
    judged = [Graded(rollout, Verdict(False, "")) for rollout in batch.rollouts]
    dropped_B = torch.zeros(len(batch), dtype=torch.bool)
    trace = Trace(torch.zeros(shape), torch.zeros(shape), None, None, {}, {})
    in_training = batch_metrics(batch, rewards, trace, judged, dropped_B)
    held_out = eval_metrics(judged, rewards)
    assert not [key for key in (*in_training, *held_out) if "never" in key]
    assert in_training["rewards/paid/mean"] > 0 and held_out["eval/rewards/paid"] > 0


def test_json_has_one_word_for_what_is_no_number(tmp_path: Path) -> None:
    value = {"a": float("nan"), 2: [float("inf"), (-float("inf"), 1.5)], "c": Interval(0, 1, 2)}
    write_json(tmp_path / "x.json", value)
    found = json.loads((tmp_path / "x.json").read_text())
    assert found == {"a": None, "2": ["inf", ["-inf", 1.5]], "c": [0, 1, 2]}
