"""The coefficient of a KL in the reward: fixed, or following a target, and safe over a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from operando.errors import UserError
from operando.recipe.update import KlConfig
from operando.recipe_io import load_recipe
from operando.rewards.base import TrainerState
from operando.types import Trace
from operando.update.objective import next_kl_coef
from tests.integration.runs import metric_rows, tiny, trained
from tests.unit.tiny import random_batch


def coefficient(kl: float, **settings: object) -> float:
    """The next coefficient from 0.1, where every token's KL is `kl`."""
    batch = random_batch(2, 4)
    logp_BT = torch.zeros(batch.mask_BT.shape)
    trace = Trace(logp_BT, logp_BT, logp_BT - kl, None, {}, {})
    config = KlConfig(coef=0.1, estimator="k1", place="reward", **settings)
    recipe = load_recipe("tiny").model_copy(update={"kl": config})
    return next_kl_coef(recipe, batch, trace, 0.1)


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.2, 1.0), (0.22, 1 + 0.1 * 8 / 100), (5.0, 1 + 0.2 * 8 / 100), (0.0, 1 - 0.2 * 8 / 100)],
)
def test_the_coefficient_follows_the_target(kl: float, factor: float) -> None:
    got = coefficient(kl, target=0.2, horizon=100)
    assert got == pytest.approx(0.1 * factor, rel=1e-6)


def test_without_a_target_it_stays() -> None:
    assert coefficient(5.0) == 0.1


def test_a_target_for_a_kl_in_the_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"kl: target adapts a KL in the reward"):
        load_recipe("tiny", ("kl={coef=0.1,target=0.2}",))


def test_a_resumed_run_goes_on_with_its_coefficient(tmp_path: Path) -> None:
    def watch(trainer_state: TrainerState, completions: list[str], **_: object) -> list[float]:
        if trainer_state.global_step == stop_at:
            raise KeyboardInterrupt
        return [0.0 for _ in completions]

    settings = (
        "kl={coef=0.1,estimator='k1',place='reward',target=0.01,horizon=20}",
        "advantage={kind='gae'}",
        "rewards.watch={kind='function',weight=0}",
    )
    stop_at = -1
    whole = metric_rows(trained(tiny(tmp_path / "a", *settings), functions={"watch": watch}))
    assert len({row["kl_coef"] for row in whole[1:]}) == 4, "it should move at every step"
    stop_at = 4
    part = tiny(tmp_path / "b", *settings)
    with pytest.raises(KeyboardInterrupt):
        trained(part, functions={"watch": watch})
    stop_at = -1
    assert metric_rows(trained(part, resume=True, functions={"watch": watch})) == whole
