"""Sick runs are found with a fitting remedy, healthy ones are left alone: simulated and trained."""

import json
import math

import pytest
from typer.testing import CliRunner

from operando.cli import app
from operando.doctor.doctor import diagnose, examine, shown_live
from operando.recipe_io import load_recipe
from operando.run import Run
from tests.unit.doctor_runs import FLAT, SICK, falling, healthy, recipe, run, trained_runs

TRAINED = trained_runs()
# what a trained sick run must be told, and a part of its remedy
TOLD = {
    "sick_lr1e-7": ("no_learning", "1,000 times, from 1e-07 to 0.0001"),
    "sick_lr.3": ("kl_exploding", "lower optim.lr from 0.3 to 1e-03"),
    "sick_lr3e-2": ("kl_exploding", "lower optim.lr from 0.03 to 6e-04"),
    "sick_kl20": ("kl_strangled", "lower kl.coef from 20"),
    "sick_constant": ("no_signal", "constant reward"),
    "sick_none": ("no_reward", "returns None"),
    "sick_flipped": ("reward_hack", "rewards.correct.weight = -1"),
    "sick_brevity": ("reward_hack", "strict verifier"),
    "sick_hack2": ("reward_hack", "strict verifier"),
    "sick_noeos": ("truncation", "end-of-turn token"),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_found_with_the_right_remedy(name):
    changes, settings, illness, remedy = SICK[name]
    found = {f.name: f for f in diagnose(run(**changes), recipe(**settings))}
    assert illness in found, (name, list(found))
    assert remedy in found[illness].remedy, found[illness].remedy
    assert any(c.isdigit() for c in found[illness].sentence)


def test_a_step_of_zero_is_no_small_step_and_nan_is_not_under_a_limit():
    """Each sign alone: no other remedy stands beside it."""
    for name in (
        "no_adapter",
        "nan_gradients",
        "reward_none",
        "constant_reward",
        "never_right",
        "lr_1e-7",
        "kl_coef_20",
    ):
        changes, settings, illness, _ = SICK[name]
        assert [f.name for f in diagnose(run(**changes), recipe(**settings))] == [illness], name


def test_what_follows_a_death_is_not_told_beside_it():
    changes, settings, _, _ = SICK["lr_0.3"]
    cut = {"completions/clipped_ratio": lambda x: 1.0 if x > 0.2 else 0.0}
    names = {f.name for f in diagnose(run(**changes | cut), recipe(**settings))}
    assert names == {"collapse", "kl_exploding", "entropy_explodes"}
    # what was there from the start is told
    cut = {"completions/clipped_ratio": 0.7}
    assert "truncation" in {f.name for f in diagnose(run(**changes | cut), recipe(**settings))}


def test_a_dip_from_a_peak_that_keeps_most_of_its_gain_is_no_death():
    dip = {"eval/correct": lambda x: 0.4 + 1.0 * min(x, 0.5) - 0.26 * max(0.0, x - 0.5)}
    assert diagnose(run(**dip | {"eval/rewards/correct": dip["eval/correct"]}), recipe()) == []


def test_a_reward_that_falls_while_held_out_accuracy_rises_is_no_death():
    harder = {"reward": lambda x: 0.7 - 0.4 * x, "rewards/correct/mean": lambda x: 0.7 - 0.4 * x}
    assert diagnose(run(**harder), recipe()) == []


def test_who_is_always_right_may_be_sure():
    sure = falling(0.97, 0.97) | {"entropy": lambda x: 0.3 * math.exp(-4 * x), "kl": 0.001}
    assert "entropy_gone" not in {f.name for f in diagnose(run(**FLAT | sure), recipe())}


# --- health --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(4))
def test_no_simulated_healthy_run_is_accused(block):
    accused = {}
    for seed in range(50 * block, 50 * (block + 1)):
        rows, settings = healthy(seed)
        if found := diagnose(rows, settings):
            accused[seed] = [(f.name, f.sentence) for f in found]
    assert accused == {}


def test_few_healthy_runs_are_accused_at_any_evaluation_on_the_way():
    alarms = {seed: found for seed in range(200) if (found := shown_live(*healthy(seed)))}
    assert len(alarms) < 0.05 * 200, alarms


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_run_is_told_what_ails_it_and_a_healthy_one_nothing(name):
    rows, changes = TRAINED[name]
    found = {f.name: f for f in diagnose(rows, load_recipe("demo", tuple(changes)))}
    if name.startswith("healthy"):
        assert found == {}
        return
    illness, remedy = TOLD[name]
    assert illness in found and remedy in found[illness].remedy, found
    beside = {"sick_lr.3": {"collapse", "entropy_explodes"}, "sick_lr3e-2": {"collapse"}}
    assert found.keys() - {illness} == beside.get(name, set()), "no remedy that misleads"


# --- folders -------------------------------------------------------------------------------------


def folder_of(rows, tmp_path):
    made = Run.create(recipe(name="sick", runs_dir=str(tmp_path)))
    for row in rows:
        made.log_metrics(row)
    made.close()
    return made.folder


def test_null_in_the_file_is_seen_by_the_command(tmp_path):
    folder = folder_of(run(**SICK["late_nan_loss"][0]), tmp_path)
    assert '"loss": null' in (folder / "metrics.jsonl").read_text()
    done = CliRunner().invoke(app, ["doctor", str(folder)])
    assert "not_finite" in done.output and "first at step 41" in " ".join(done.output.split())


def test_nan_of_another_program_is_seen_too(tmp_path):
    folder = folder_of(run(), tmp_path)
    rows = [row | ({"grad_norm": math.nan} if row["step"] > 50 else {}) for row in run()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "NaN" in (folder / "metrics.jsonl").read_text()
    (finding,) = examine(folder).findings
    assert finding.name == "not_finite" and "grad_norm in 10 steps" in finding.sentence


def test_a_run_that_stopped_before_a_broken_step_says_so(tmp_path):
    folder = folder_of(run()[:41], tmp_path)
    (folder / "broken_step_00041.pt").write_bytes(b"batch")
    (finding,) = examine(folder).findings
    assert finding.name == "not_finite" and finding.severity == "error"
    assert (
        "stopped before step 41" in finding.sentence and "broken_step_00041.pt" in finding.sentence
    )
    (folder / "broken_step_00041.pt").rename(folder / "broken_step_00012.pt")
    assert list(examine(folder).findings) == [], "it went on since"


def test_a_run_that_broke_at_its_first_step_is_diagnosed(tmp_path):
    folder = folder_of([], tmp_path)
    (folder / "broken_step_00001.pt").write_bytes(b"batch")
    (finding,) = examine(folder).findings
    assert "stopped before step 1" in finding.sentence
