"""From discovery to a trained run, its resume and the gaming canary, on the starter model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from operando.discovery.features import Discovery, discover
from operando.errors import UserError
from operando.evals.feature_gaming import best_spans, game_features
from operando.launch import launch
from operando.recipe.run import Recipe
from operando.run_folder import read_manifest
from operando.types import Example, Prompt, Rollout
from tests.integration.runs import metric_rows, tiny, trained

DISCOVER = (
    'discover.site="blocks.3.hook_resid_post"',
    "discover.num_prompts=48",
    "discover.epochs=4",
    "discover.permutations=50",
    "discover.max_q=1.0",
    "discover.top=4",
    "task.num_steps=[2]",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Discovery:
    folder = tmp_path_factory.mktemp("features")
    return discover(tiny(folder, "name=base", *DISCOVER))


def paying(folder: Path, found: Discovery, *overrides: str) -> Recipe:
    table = {"kind": "features", "file": found.feature_set, "ignore_gate": True}
    settings = [f"rewards.features.{k}={json.dumps(v)}" for k, v in table.items()]
    return tiny(folder, "task.num_steps=[2]", "steps=4", *settings, *overrides)


def test_discovery_writes_a_table_with_its_controls(found: Discovery) -> None:
    written = json.loads(Path(found.file).read_text())
    assert {n["name"] for n in written["nulls"]} == {"random features", "shuffled labels"}
    assert {"difference of means", "probe"} < {m["name"] for m in written["measured"]}
    assert written["find"][1] == written["judge"][1] == 24 * 8
    folder = Path(found.feature_set).parent
    names = {"feature_set.json", "random.json", "shuffled.json", "direction.json"}
    assert names < {f.name for f in folder.iterdir()}


def test_a_run_that_pays_features_resumes_bit_equal(tmp_path: Path, found: Discovery) -> None:
    whole = trained(paying(tmp_path / "a", found, "checkpoint.every=2"))
    rows = metric_rows(whole)
    assert all(abs(row["features/gap"]) < 0.5 for row in rows[1:])
    assert rows[1]["features/gap_abs"] < 1e-6 < rows[-1]["features/gap_abs"]  # B is 0 at first
    assert "gate is closed" in str(read_manifest(whole)["warnings"])
    half = trained(paying(tmp_path / "b", found, "checkpoint.every=2", "steps=4"))
    shutil.rmtree(half / "checkpoints" / "step_00004")
    (half / "results.json").unlink()
    again = trained(paying(tmp_path / "b", found, "checkpoint.every=2"), resume=True)
    assert metric_rows(again) == rows


def test_every_mode_and_control_trains(tmp_path: Path, found: Discovery) -> None:
    sets = Path(found.feature_set).parent
    for name, changes in {
        "mechreward": ["rewards.features.mode=mechreward", "rewards.features.read=policy"],
        "potential": ["rewards.features.mode=potential"],
        "trajectory": ["rewards.features.mode=trajectory", "rewards.features.read=min"],
        "random": [f'rewards.features.file="{sets / "random.json"}"'],
        "direction": [f'rewards.features.file="{sets / "direction.json"}"'],
        "ppo": ["advantage.kind=gae"],
    }.items():
        run = trained(paying(tmp_path, found, f"name={name}", "steps=2", *changes))
        assert metric_rows(run)[-1]["grad_norm"] > 0, name


def test_a_closed_gate_stops_before_anything_is_written(tmp_path: Path, found: Discovery) -> None:
    recipe = paying(tmp_path, found, "rewards.features.ignore_gate=false")
    assert not found.gate.passed
    with pytest.raises(UserError, match="the gate of .* is closed"):
        trained(recipe)
    assert not (tmp_path / "tiny").exists()


def test_gaming_wins_only_if_the_features_outweigh_the_outcome(
    tmp_path: Path, found: Discovery
) -> None:
    light = trained(paying(tmp_path, found, "name=light", "rewards.features.weight=0.01"))
    (fair,) = game_features(light)
    assert fair.beaten.value == 0 and fair.n > 0
    assert fair.score_gaming > fair.score_honest
    heavy = trained(paying(tmp_path, found, "name=heavy", "rewards.features.weight=50.0"))
    (unfair,) = game_features(heavy)
    assert unfair.beaten.value > 0.5
    assert unfair.break_even is not None and unfair.break_even < 50
    plain = trained(paying(tmp_path, found, "name=plain", "rewards.features.weight=0.0"))
    assert game_features(plain) == []


def test_the_best_spans_are_those_with_the_highest_mean() -> None:
    prompt = Prompt(Example("e", "q", "7"), "q", (1,))
    ids = (10, 11, 12, 13, 14, 15)
    rollout = Rollout(prompt, 0, 0, "x", ids, (0.0,) * 6, False)
    spans = best_spans([rollout], [[0.0, 0.0, 1.0, 1.0, 1.0, 0.5]])
    assert spans == [(12, 13, 14, 15), (11, 12, 13, 14), (10, 11, 12, 13)]


def test_two_feature_sets_of_the_wrong_kind_are_refused_by_the_command(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "rewards.features.kind=features", 'rewards.features.file="none.json"')
    with pytest.raises(UserError, match="there is no feature set none.json"):
        launch(Console(quiet=True), recipe)
