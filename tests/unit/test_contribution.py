"""The layer-contribution sweep: which arms, which shares, which errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from operando.errors import UserError
from operando.launch import count_layers
from operando.models.layers import parse_layer_set
from operando.recipe.data import ModelConfig
from operando.recipe_io import load_recipe
from operando.report.contribution import agreement_line, contribution_table, draw_contribution
from operando.study.contribution import check_sets, layer_sets, plan, summarise


def write_runs(
    folder: Path, gains: dict[tuple[str, int], int], base: int = 40
) -> dict[tuple[str, int], Path]:
    folders = {}
    for (layers, seed), gain in gains.items():
        run = folder / f"{layers}_{seed}"
        run.mkdir()
        counts = {"base": base, "trained": base + gain}
        held_out = {name: {"step": 0, "correct": c, "n": 200} for name, c in counts.items()}
        (run / "results.json").write_text(json.dumps({"held_out": held_out}))
        folders[layers, seed] = run
    return folders


def test_shares_are_taken_seed_by_seed(tmp_path: Path) -> None:
    gains = {("all", 0): 100, ("all", 1): 50, ("0", 0): 50, ("0", 1): 50, ("1", 0): 0, ("1", 1): 0}
    result = summarise("x", write_runs(tmp_path, gains), tmp_path / "contribution.json")
    rows = {row.layers: row for row in result.rows}
    assert rows["all"].share == (1.0, 1.0, 1.0) and result.base == pytest.approx(0.2)
    assert rows["0"].share.value == pytest.approx(0.75)  # of 0.5 and 1.0
    # Student, 1 degree of freedom: 12.706 * std(0.5, 1) / sqrt(2)
    assert rows["0"].share.high - 0.75 == pytest.approx(12.706 * 0.25, rel=1e-3)
    assert rows["1"].gain == (0.0, 0.0, 0.0)
    written = json.loads((tmp_path / "contribution.json").read_text())
    assert written["gains"]["0"] == {"0": 0.25, "1": 0.25}
    # seed 0 orders 1 < 0, and so does seed 1: of the two orders that the second can have, one
    assert result.agreement == (1.0, 0.5, 0.5, True)
    assert written["agreement"]["p_value"] == 0.5
    line = "the order of the sets over 2 seeds: Kendall's W = 1.00 (chance 0.50 on average, p = 0.5"
    assert str(agreement_line(result)).startswith(line)
    svg = draw_contribution(result, tmp_path / "c.svg").read_text()
    assert svg.count("<svg") == 1 and len(contribution_table(result).rows) == 3


def test_no_gain_of_all_layers_is_an_error_and_no_share(tmp_path: Path) -> None:
    folders = write_runs(tmp_path, {("all", 0): -3, ("0", 0): 5})
    with pytest.raises(UserError, match="no gain to take shares of"):
        summarise("x", folders, tmp_path / "contribution.json")
    assert not (tmp_path / "contribution.json").exists()


def test_blocks_cover_every_layer_once() -> None:
    for num_layers, width in ((6, 1), (6, 4), (28, 3)):
        sets = [parse_layer_set(text, num_layers) for text in layer_sets(num_layers, width)]
        assert [i for one in sets for i in one] == list(range(num_layers))
    assert layer_sets(6, 4) == ["0-3", "4-5"]
    with pytest.raises(UserError, match="--width 6: expected 1 to 5"):
        layer_sets(6, 6)


def test_arms_differ_in_layers_and_seed_alone() -> None:
    recipe = load_recipe("tiny")
    arms = plan(recipe, ["0-1", "last:2"], range(2))
    assert list(arms) == [(s, n) for s in ("all", "0-1", "last:2") for n in (0, 1)]
    assert len({arm.name for arm in arms.values()}) == 6
    for (layers, seed), arm in arms.items():
        assert (arm.model.layers, arm.seed) == (layers, seed)
        same = {"name": recipe.name, "runs_dir": recipe.runs_dir, "seed": recipe.seed}
        assert arm.model_copy(update={**same, "model": recipe.model}) == recipe


def test_a_set_that_means_all_layers_is_refused_before_training() -> None:
    assert count_layers(ModelConfig(id="starter")) == 6
    check_sets(["0-4"], 6)
    with pytest.raises(UserError, match="all layers"):
        check_sets(["0-5"], 6)
    with pytest.raises(UserError, match="out of range"):
        check_sets(["6"], 6)
