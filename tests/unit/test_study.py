"""Studies: what a file may say, what is planned and promised, and how claims are judged."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from operando.errors import UserError
from operando.recipe.study import StudyRecipe
from operando.recipe_io import apply_override, check, load_recipe, load_study_recipe, read_toml
from operando.report.study import StudyResult, draw_pareto, frontier, study_page
from operando.study.analysis import (
    Point,
    Values,
    base_of,
    is_dominated,
    pareto_points,
    rows_of,
    visible_differences,
)
from operando.study.arms import RayRunner, Study, load_study, plan, preregister
from operando.study.claims import headline, judge_claims

ROOT = Path(__file__).parents[2]
TINY_STUDY = ROOT / "recipes" / "studies" / "tiny_study.toml"


def write_study(folder: Path, *changes: tuple[str, str]) -> Path:
    """The shipped study in a folder of its own, with some text replaced."""
    text = TINY_STUDY.read_text().replace("../tiny.toml", "tiny")
    text = text.replace("seeds = [0, 1]", f'seeds = [0, 1]\nruns_dir = "{folder}/runs"')
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    file = folder / "study.toml"
    file.write_text(text)
    return file


def loaded(folder: Path, *changes: tuple[str, str]) -> Study:
    return load_study(str(write_study(folder, *changes)))


def refused(folder: Path, *changes: tuple[str, str]) -> str:
    with pytest.raises(UserError) as error:
        loaded(folder, *changes)
    return str(error.value)


def recipe_with(*overrides: str) -> StudyRecipe:
    tables = read_toml(TINY_STUDY)
    tables["claims"] = {}
    for override in overrides:
        tables = apply_override(tables, override)
    return check(StudyRecipe, tables, "here")


# --- what a file may say -------------------------------------------------------------------------


def test_every_wrong_name_is_reported_at_once_with_its_neighbour(tmp_path: Path) -> None:
    said = refused(
        tmp_path,
        ('versus = "still"', 'versus = "stil"'),
        ('y = "cut"', 'y = "cuts"'),
        ('set = "two_steps"\nlabel', 'set = "two_step"\nlabel'),
    )
    assert "claims.H1.versus: no arm 'stil'. Did you mean 'still'?" in said
    assert "pareto.y: no metric 'cuts'. Did you mean 'cut'?" in said
    assert "metrics.cut.set: no set 'two_step'. Did you mean 'two_steps'?" in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('label = "truncated"', 'label = "truncatd"', "has no label 'truncatd'. Did you mean 'tr"),
        ("num = 100", "num = 101", "evaluation.num = 101: the set 'two_steps' has 100 held-out"),
        ('"task.num_held_out=100"', '"optim.lr=1"', "only task, prompt, rollout.max_completion_l"),
        ('"task.num_held_out=100"', '"task.num_heldout=1"', "task.num_heldout: unknown key"),
        ('["optim.lr=1e-12"]', '["seed=3"]', "arms.still.overrides: seed is set by the study"),
        ('["optim.lr=1e-12"]', '["optim.lrr=1"]', "optim.lrr: unknown key. Did you mean 'lr'?"),
        ("seeds = [0, 1]", "seeds = [0]", "seeds: Tuple should have at least 2 items"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds: each once, got [1, 1]"),
        ("num = 100", "num = 100\nsamples = 4", "samples = 4 without a temperature"),
        ("{ above = 0.0 }", "{ above = -0.1 }", "overlap between -0.1 and 0.0"),
        ("{ above = 0.0 }", "{ below = -0.1 }", "must face opposite ways"),
        ("{ above = 0.0 }", "{ above = 0.1, below = 1 }", "expected one of above = x and below"),
        ('arm = "trained"', 'arm = "still"', "claims.H1: 'still' is compared with itself"),
        ('kind = "difference"', 'kind = "diference"', "Did you mean 'difference'?"),
    ],
)
def test_a_mistake_is_refused_before_training(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert said in refused(tmp_path, (old, new))


def test_a_study_is_no_recipe_and_a_recipe_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a study: operando study tiny_study"):
        load_recipe("tiny_study")
    with pytest.raises(UserError, match="arms: missing"):
        load_study("tiny")
    assert plan(load_study("tiny_study")).keys() == plan(loaded(tmp_path)).keys()


def test_runs_differ_in_arm_and_seed_alone(tmp_path: Path) -> None:
    study = loaded(tmp_path)
    jobs = plan(study)
    assert list(jobs) == [("trained", 0), ("trained", 1), ("still", 0), ("still", 1)]
    job = jobs["still", 1]
    assert job.folder == tmp_path / "runs" / "tiny_study" / "tiny_study-still-s1"
    assert job.recipe.seed == 1 and job.recipe.optim.lr == 1e-12
    own = {"name": "x", "optim": job.recipe.optim}
    assert job.recipe.model_copy(update=own) == jobs["trained", 1].recipe.model_copy(update=own)


def test_all_arms_are_asked_what_the_control_is_asked(tmp_path: Path) -> None:
    odd = '["task.max_number=9", "rollout.max_completion_length=5"]'
    (asked,) = loaded(
        tmp_path, ('recipe = "tiny"\n\n', f'recipe = "tiny"\noverrides = {odd}\n\n')
    ).asked.values()
    assert asked.rollout.max_completion_length == 32
    assert asked.task.model_dump()["max_number"] == 20
    assert asked.task.model_dump()["num_held_out"] == 100, "the set's override"


# --- what was promised ---------------------------------------------------------------------------


def test_a_changed_claim_is_refused_and_an_added_seed_is_recorded(tmp_path: Path) -> None:
    file = preregister(loaded(tmp_path))
    first = file.read_text()
    preregister(loaded(tmp_path))
    assert file.read_text() == first, "the same call changes nothing"
    with pytest.raises(UserError, match=r"changed: claims.H2.margin: 0.05 -> 0.5\. Undo"):
        preregister(loaded(tmp_path, ("margin = 0.05", "margin = 0.5")))
    with pytest.raises(UserError, match=r"arms.still.optim.lr: 1e-12 -> 0.1"):
        preregister(loaded(tmp_path, ("lr=1e-12", "lr=0.1")))
    preregister(loaded(tmp_path, ("seeds = [0, 1]", "seeds = [0, 1, 5]")))
    written = json.loads(file.read_text())
    assert written["seeds"] == [0, 1, 5] and written["amendments"][0]["seeds_added"] == [5]
    assert written["sha256"] == json.loads(first)["sha256"]
    with pytest.raises(UserError, match=r"may be added, but \[5\] were removed"):
        preregister(loaded(tmp_path))


def test_runs_without_a_promise_are_refused(tmp_path: Path) -> None:
    study = loaded(tmp_path)
    folder = plan(study)["still", 0].folder
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds runs, but no preregistration\.json"):
        preregister(study)


# --- claims --------------------------------------------------------------------------------------


def planted(
    trained: float, still: float, spread: float = 0.02, problems: int = 400, wobble: float = 0.0
) -> Values:
    """Two arms of two seeds with about these pass rates, on problems both answer alike.

    `wobble` is added to the second seed of the trained arm: else both pairs differ alike.
    """

    def arm(rate: float, more: float = 0.0) -> np.ndarray:
        rank = (np.arange(problems) + 0.5) / problems
        return np.array([rank < rate - spread / 2, rank < rate + spread / 2 + more], dtype=float)

    values = {"trained": arm(trained, wobble), "still": arm(still)}
    for name in ("trained", "still"):
        values[base_of(name)] = (np.arange(problems) < 0.3 * problems)[None].astype(float)
    return {name: {"pass": v, "cut": np.zeros_like(v)} for name, v in values.items()}


def verdict(claim: str, values: Values) -> tuple[str, str]:
    study = recipe_with(f"claims.C={{text='It is so.', {claim}}}")
    (found,) = judge_claims(study, values)
    return found.verdict, found.sentence


DIFFERENCE = (
    "kind='difference', arm='trained', versus='still', metric='pass', "
    "supported_if={above=0.1}, falsified_if={below=0.1}"
)
RATE = (
    "kind='rate', arm='trained', metric='pass', supported_if={below=0.3}, falsified_if={above=0.3}"
)
SAME = "kind='equivalence', arm='trained', versus='still', metric='pass', margin=0.05"


@pytest.mark.parametrize(
    ("claim", "trained", "still", "expected"),
    [
        (DIFFERENCE, 0.7, 0.3, "supported"),
        (DIFFERENCE, 0.3, 0.3, "falsified"),
        (DIFFERENCE, 0.42, 0.3, "undecided"),
        (DIFFERENCE.replace("'still'", "'base'"), 0.7, 0.0, "supported"),
        (RATE, 0.05, 0.5, "supported"),
        (RATE, 0.9, 0.5, "falsified"),
        (RATE, 0.3, 0.5, "undecided"),
        (SAME, 0.3, 0.3, "undecided"),
        (SAME, 0.5, 0.3, "falsified"),
        (SAME, 0.35, 0.3, "undecided"),
    ],
)
def test_planted_truths_are_judged_so(
    claim: str, trained: float, still: float, expected: str
) -> None:
    assert verdict(claim, planted(trained, still))[0] == expected


def test_runs_that_agree_on_few_problems_prove_no_equivalence() -> None:
    assert verdict(SAME, planted(0.5, 0.5, problems=16, wobble=0.07))[0] == "undecided"
    assert verdict(SAME, planted(0.5, 0.5, problems=400, wobble=0.005))[0] == "supported"


def test_runs_that_are_alike_to_the_last_answer_test_nothing() -> None:
    said = verdict(SAME, planted(0.5, 0.5))
    assert said[0] == "undecided" and "all alike, so no test, over 2 seed pairs" in said[1]


def test_a_sentence_names_verdict_claim_and_number() -> None:
    _, sentence = verdict(DIFFERENCE, planted(0.3, 0.3))
    assert sentence == (
        "C falsified: It is so. Pass of trained minus still: +0.0 points (-0.9 to +0.9)."
    )


def test_emergence_counts_runs_and_not_means() -> None:
    some = {"pass": np.array([[1.0, 1.0], [0.0, 0.0], [0.9, 0.7], [0.0, 0.2]])}
    none = {"pass": np.zeros((4, 2))}
    values: Values = {"trained": some, "still": none}
    head = "kind='emergence', arm='trained', metric='pass', threshold=0.3, "
    found, sentence = verdict(head + "supported_if={above=0.05}, falsified_if={below=0.05}", values)
    assert found == "supported" and "2 of 4 runs of trained have pass of 30% or more" in sentence
    more = "kind='emergence_difference', metric='pass', threshold=0.3, "
    said = verdict(more + "arm='trained', versus='still', expect='more'", values)
    assert said[0] == "undecided" and "2 of 4 runs of trained and 0 of 4 of still" in said[1]
    values = {"trained": {"pass": np.ones((4, 2))}, "still": none}
    for arms, expect, wanted in (
        ("arm='trained', versus='still'", "more", "supported"),
        ("arm='trained', versus='still'", "fewer", "falsified"),
        ("arm='still', versus='trained'", "fewer", "supported"),
    ):
        assert verdict(f"{more}{arms}, expect='{expect}'", values)[0] == wanted


def test_the_headline_begins_with_what_was_falsified(tmp_path: Path) -> None:
    study = recipe_with(
        f"claims.A={{text='So.', {DIFFERENCE}}}", f"claims.B={{text='So.', {RATE}}}"
    )
    said = headline(study, judge_claims(study, planted(0.1, 0.1)))
    assert said.startswith("tiny_study: of 2 claims, 1 falsified (A, pass of trained minus still:")
    assert "1 supported (B, pass of trained: 10.0% (" in said
    assert "no claim was written" in headline(recipe_with(), [])


# --- numbers and pages ---------------------------------------------------------------------------


def test_rows_hold_rate_difference_and_holm_over_the_arms() -> None:
    study = recipe_with("arms.third={recipe='../tiny.toml'}")
    values = dict(planted(0.6, 0.3)) | {"third": planted(0.3, 0.3)["still"]}
    rows = {(row.arm, row.metric): row for row in rows_of(study, values)}
    assert [arm for arm, metric in rows if metric == "pass"] == [
        "base",
        "still",
        "trained",
        "third",
    ]
    assert rows["still", "pass"].against_control is None and rows["base", "pass"].by_seed == (0.3,)
    trained = rows["trained", "pass"].against_control
    assert trained is not None and trained.hierarchical.interval.value == pytest.approx(0.3)
    assert trained.holm_p == pytest.approx(2 * trained.hierarchical.p_value), "two arms"
    assert trained.is_significant and trained.seed_paired.df == 1
    assert trained.problem_paired.df == 399
    third = rows["third", "pass"].against_control
    assert third is not None and third.holm_p == 1.0 and not third.is_significant


def test_the_pareto_front_is_taken_seed_by_seed() -> None:
    study = recipe_with()  # pass: higher is better; cut: lower is better

    def run(share_pass: float, share_cut: float) -> tuple[list[float], list[float]]:
        return [share_pass] * 2, [share_cut] * 2

    arms = {"trained": [run(0.9, 0.1), run(0.4, 0.1)], "still": [run(0.8, 0.1), run(0.5, 0.0)]}
    values: Values = {
        arm: {"pass": np.array([p for p, _ in runs]), "cut": np.array([c for _, c in runs])}
        for arm, runs in arms.items()
    }
    points = pareto_points(study, values)
    assert {(p.arm, p.seed): p.is_best for p in points} == {
        ("trained", 0): True,
        ("still", 0): False,
        ("trained", 1): False,
        ("still", 1): True,
    }
    assert frontier(study, points) == [(0.5, 0.0), (0.9, 0.1)]
    assert not is_dominated((1.0, 0.0), [(1.0, 0.0)]), "an equal point beats nothing"


def test_the_page_says_everything(tmp_path: Path) -> None:
    study = recipe_with(f"claims.A={{text='It rises.', {DIFFERENCE}}}")
    values = planted(0.3, 0.3, wobble=0.005)
    result = StudyResult(
        study,
        rows_of(study, values),
        judge_claims(study, values),
        visible_differences(study, values),
        pareto_points(study, values),
        ["seeds [5]"],
        tmp_path / "study.md",
    )
    page = study_page(result)
    assert "- A falsified: It rises." in page and "Amended after preregistration: seeds [5]" in page
    assert "| pass | trained | 2 | 30.2%" in page and "not significant" in page
    assert "has a standard error of" in page and "so 2 seeds per arm show one of" in page
    assert "two seeds find a difference where there is none in about 11 % of studies" in page
    assert "cut: the runs of an arm are all alike" in page


def test_the_picture_has_a_mark_for_every_run_and_is_the_same_twice(tmp_path: Path) -> None:
    runs = [
        Point(arm, seed, 0.1 * place + 0.2 * seed, 0.3, is_best=False)
        for place, arm in enumerate(("trained", "still"))
        for seed in (0, 1)
    ]
    one = draw_pareto(recipe_with(), runs, (0.3, 0.1), tmp_path / "a.svg").read_text()
    assert one == draw_pareto(recipe_with(), runs, (0.3, 0.1), tmp_path / "b.svg").read_text()
    assert one.count('<g id="PathCollection_') == 8, "runs, mean, legend; base"
    assert load_study_recipe(str(TINY_STUDY)).pareto is not None


def test_the_study_of_the_docs_checks() -> None:
    page = (ROOT / "docs" / "study.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    study = check(StudyRecipe, tomllib.loads(example), "docs")
    assert {claim.kind for claim in study.claims.values()} == {
        "difference",
        "rate",
        "equivalence",
        "emergence",
        "emergence_difference",
    }


def test_ray_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        UserError, match=r'--ray needs the extra ray: pip install "operando\[ray\]"'
    ):
        RayRunner(at_once=1)
