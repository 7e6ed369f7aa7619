"""Shifts of the reward: Rebound's formulas by hand, monitors, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from operando.errors import UserError
from operando.models.directions import DirectionSet
from operando.recipe.projection import PenaltyShift, ReboundShift, ScreeningShift
from operando.rewards.shift import Shift, group_z, make_shift, rebound
from operando.tasks.base import Task
from operando.types import Example, Prompt, Rewards, Rollout, Trace, Verdict
from operando.update.advantages import group_advantages


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def rebound_config(**settings: object) -> ReboundShift:
    return ReboundShift.model_validate({"kind": "rebound", "directions": "d"} | settings)


def task(labelled: bool = True) -> Task:
    def verify(_example: Example, _text: str, _truncated: bool) -> Verdict:
        raise AssertionError("a shift never asks the verifier")

    def labels(_example: Example, text: str, _truncated: bool) -> dict[str, bool]:
        return {"hack": text == "hack"}

    return Task("toy", [], [], verify, labels if labelled else None)


def held(**evidence: float) -> DirectionSet:
    return DirectionSet(
        "real",
        "activation",
        torch.tensor([1.0, 0.0]),
        (0, 2),
        "last",
        "m",
        "",
        "float32",
        1.0,
        evidence=evidence,
    )


def rollouts(texts: list[str], lengths: list[int]) -> list[Rollout]:
    prompt = Prompt(Example("e", "q", "7"), "q", (3,))
    return [
        Rollout(prompt, 0, i, text, (5,) * n, (0.0,) * n, False)
        for i, (text, n) in enumerate(zip(texts, lengths, strict=True))
    ]


def trace(score_BT: Tensor) -> Trace:
    """A trace whose two layers hold the scores and three times the scores."""
    zeros_BT = torch.zeros_like(score_BT)
    acts = {"shift/0": score_BT[..., None], "shift/2": 3 * score_BT[..., None]}
    return Trace(zeros_BT, zeros_BT, None, None, acts, {})


def paid(reward_B: list[float], lengths: list[int]) -> Rewards:
    total_BT = torch.zeros(len(lengths), max(lengths))
    for b, (reward, n) in enumerate(zip(reward_B, lengths, strict=True)):
        total_BT[b, n - 1] = reward
    return Rewards({"r": total_BT}, {"r": 1.0}, total_BT)


def test_z_scores_are_of_the_group_with_a_floor_under_the_spread() -> None:
    """Group (0, 2, 4): std 2. Group (1.00, 1.01, 1.02): std 0.01, floored at 0.1."""
    z_B = group_z(torch.tensor([0.0, 2.0, 4.0, 1.00, 1.01, 1.02]), 3)
    assert z_B.tolist() == pytest.approx([-1, 0, 1, -0.1, 0, 0.1], abs=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_rebounds_formulas(alpha: float) -> None:
    total_BT = torch.tensor([[0.0, 3.0], [0.0, 3.0], [3.5, 0.0], [0.0, -1.0]])
    z_B, length_B = torch.tensor([-1.0, 0.0, 0.5, 2.0]), torch.tensor([2, 2, 1, 2])
    added = rebound(total_BT, z_B, length_B, rebound_config(variant="additive", alpha=alpha))
    assert added.sum(1).tolist() == pytest.approx([3, 3, 3.5 - alpha * 0.5, -1 - alpha * 2])
    assert added[2].tolist() == [3.5 - alpha * 0.5, 0.0]  # on the last real token
    config = rebound_config(variant="multiplicative", alpha=alpha)
    times = rebound(total_BT, z_B, length_B, config)
    factors = [1 - alpha * sigmoid(0.5), 1 - alpha * sigmoid(2.0)]
    assert times.sum(1).tolist() == pytest.approx([3, 3, 3.5 * factors[0], -factors[1]])
    assert (factors[0] < 0) is (alpha == 2.0)  # at 2 every z > 0 turns the reward's sign


def test_rebound_reads_the_last_token_over_the_band_before_normalisation() -> None:
    lengths = [2, 1]
    score_BT = torch.tensor([[9.0, 1.0], [2.0, 0.0]])  # last tokens: 1 and 2, means 2x over layers
    shift = make_shift(rebound_config(variant="additive", alpha=1.0), held(), task(), 2)
    out = shift.apply(paid([1.0, 1.0], lengths), rollouts(["a", "b"], lengths), trace(score_BT), 1)
    z = 1 / math.sqrt(2)  # scores 2 and 4: mean 3, std sqrt(2)
    assert out.total_BT.sum(1).tolist() == pytest.approx([1.0, 1 - z])
    assert out.metrics["shift/touched"] == 0.5 and out.metrics["shift/score"] == 3.0
    mask_BT = torch.tensor([[True, True], [True, False]])
    adv_BT = group_advantages(out.total_BT, mask_BT, 2)
    assert float(adv_BT[0, 0]) > 0 > float(adv_BT[1, 0])  # equal pay before, now a credit
    mean = make_shift(rebound_config(position="response_mean"), held(), task(), 2)
    found = mean.apply(paid([1, 1], lengths), rollouts(["a", "b"], lengths), trace(score_BT), 1)
    assert found.metrics["shift/score"] == pytest.approx((2 * 5 + 2 * 2) / 2)


def test_no_spread_within_the_groups_names_the_position() -> None:
    with pytest.raises(ValidationError, match="response_last"):
        rebound_config(position="prompt_last")
    shift = make_shift(rebound_config(), held(), task(), 2)
    same = trace(torch.full((2, 1), 4.0))
    with pytest.raises(UserError, match='position = "response_last"'):
        shift.apply(paid([1.0, 0.0], [1, 1]), rollouts(["a", "b"], [1, 1]), same, 1)
    later = shift.apply(paid([1.0, 0.0], [1, 1]), rollouts(["a", "b"], [1, 1]), same, 2)
    assert later.total_BT.tolist() == [[1.0], [0.0]]  # a policy may converge later on


def test_the_oracle_fines_and_screens_what_is_labelled() -> None:
    texts, lengths = ["hack", "ok", "ok"], [1, 2, 2]
    given = paid([3.5, 3.5, 0.5], lengths)
    fine = make_shift(PenaltyShift(kind="penalty", monitor="oracle"), None, task(), 3)
    out = fine.apply(given, rollouts(texts, lengths), trace(torch.zeros(3, 2)), 1)
    assert out.total_BT.sum(1).tolist() == pytest.approx([0.5, 3.5, 0.5])
    screen = make_shift(ScreeningShift(kind="screening", monitor="oracle"), None, task(), 3)
    out = screen.apply(given, rollouts(texts, lengths), trace(torch.zeros(3, 2)), 1)
    mask_BT = torch.tensor([[True, False], [True, True], [True, True]])
    adv_BT = group_advantages(out.total_BT, mask_BT, 3)
    assert adv_BT[0].tolist() == [0, 0]
    assert adv_BT[1, 0] == -adv_BT[2, 0] != 0  # the mean is that of the other two
    assert out.parts["r"].tolist() == given.parts["r"].tolist()


def test_a_monitor_flags_above_the_clean_quantile_of_normalised_scores() -> None:
    """Layers hold s and 3s, norms 2 and 6: the score is s / 2, the threshold 1."""
    found = held(clean_q95=1.0, norm_0=2.0, norm_2=6.0)
    config = PenaltyShift(kind="penalty", directions="d", amount=1.0)
    shift = make_shift(config, found, task(), 2)
    out = shift.apply(
        paid([1.0, 1.0], [1, 1]),
        rollouts(["a", "b"], [1, 1]),
        trace(torch.tensor([[1.9], [2.1]])),
        1,
    )
    assert out.columns["shift_touched"] == [False, True]
    assert out.total_BT.tolist() == [[1.0], [0.0]]


def test_monitors_without_what_they_need() -> None:
    with pytest.raises(UserError, match="no 'clean_q95'"):
        make_shift(PenaltyShift(kind="penalty", directions="d"), held(), task(), 2)
    with pytest.raises(UserError, match="no hack label"):
        oracle = ScreeningShift(kind="screening", monitor="oracle")
        make_shift(oracle, None, task(labelled=False), 2)
    with pytest.raises(ValidationError, match="needs directions"):
        PenaltyShift(kind="penalty")
    assert isinstance(make_shift(rebound_config(), held(), task(), 2), Shift)
