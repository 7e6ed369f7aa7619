"""The doctor while a run is going on: a stalled rate is said once, health is quiet."""

from __future__ import annotations

import shutil
from io import StringIO
from pathlib import Path

from rich.console import Console

from operando.doctor.doctor import examine
from operando.launch import launch
from operando.recipe.run import Recipe
from tests.integration.runs import tiny

LONGER = ("steps=12", "eval.every=6", "checkpoint.every=6")


def said(recipe: Recipe, *, resume: bool = False) -> str:
    """What the terminal shows of a run."""
    out = StringIO()
    assert launch(Console(file=out, width=400), recipe, resume=resume) is not None
    return out.getvalue()


def test_a_stalled_rate_is_said_live_and_once(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, *LONGER, "optim.lr=1e-7")
    shown = said(recipe)
    assert shown.count("no_learning: The policy hardly moves") == 1
    assert "times, from 1e-07 to " in shown and "the clip is not the cause" in shown
    folder = tmp_path / "tiny"
    assert [f.name for f in examine(folder).findings] == ["no_learning"]

    # killed after the finding was shown, before the last checkpoint was whole
    shutil.rmtree(folder / "checkpoints" / "step_00012")
    (folder / "results.json").unlink()
    again = said(recipe, resume=True)
    assert "step 12/12" in again and "no_learning" not in again
    assert [f.name for f in examine(folder).findings] == ["no_learning"]


def test_a_healthy_run_is_quiet(tmp_path: Path) -> None:
    shown = said(tiny(tmp_path, *LONGER))
    assert "warning: " not in shown and "error: " not in shown and "remedy" not in shown
    result = examine(tmp_path / "tiny")
    assert list(result.findings) == []
    assert set(result.unchecked) == {"over_limit"}, "tiny pays for no features"
