"""A csv and a verify function become a checked task, a trained run, its evaluation and report."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from operando import UserError, load_recipe
from operando.cli import main
from operando.recipe.run import Recipe
from operando.run import Run, hash_file
from operando.run_folder import read_metrics
from operando.setup import check_examples
from operando.tasks.load import load_task
from operando.train import train
from tests.integration.runs import rollout_rows, tiny, trained

MINE = """
def verify(example, completion):
    words = completion.split()
    if not words:
        return False, "nothing said"
    return words[-1] == example.answer, f"said {words[-1]}"

def labels(example, completion):
    return {"second": example.columns["turn"] == "2"}

def brief(completions, turn, amount, log_metric, **kwargs):
    log_metric("user/second", sum(one == "2" for one in turn) / len(turn))
    return [float(amount[i]) / 100 for i, _ in enumerate(completions)]
"""
RECIPE = """
name = "pens"
steps = 2
model = { id = "starter", lora = { rank = 8 } }
rollout = { num_prompts = 8, num_generations = 4, max_completion_length = 24 }
eval = { every = 2, num = 8 }

[task]
kind = "file"
train = "pens.csv"
question = "question"
answer = "amount"
verify = "my.py:verify"
labels = "my.py:labels"

[rewards.correct]
kind = "correct"

[rewards.brief]
kind = "function"
path = "my.py:brief"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = [
        f"Tom has {a} pens and buys {b} more. How many pens does Tom have?,{a + b},{1 + b % 2}"
        for a in range(3, 13)
        for b in range(2, 8)
    ]
    (tmp_path / "pens.csv").write_text("\n".join(["question,amount,turn", *rows]) + "\n")
    (tmp_path / "my.py").write_text(MINE)
    (tmp_path / "pens.toml").write_text(RECIPE)
    return tmp_path


def operando(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["operando", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_from_a_csv_to_a_report(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ("task", "check", "pens.toml", "--num", "6", "--samples", "4", "--out", "check.json")
    assert operando(monkeypatch, *ask) == 0
    said = capsys.readouterr().err
    assert "the verifier calls 60 of 60 right" in said and "\nyes: " in said
    found = json.loads((here / "check.json").read_text())
    assert found["gold"] == {"right": 60, "n": 60, "amiss": []}
    value, low, high = found["sampled"]["pass_1"]
    assert 0 <= low <= value <= high <= 1 and found["sampled"]["problems"] == 6
    assert not (here / "runs").exists()

    assert operando(monkeypatch, "train", "pens.toml") == 0
    run = here / "runs" / "pens"
    rows = rollout_rows(run, 2)
    amounts = {
        f"Tom has {a} pens and buys {b} more": a + b for a in range(3, 13) for b in range(2, 8)
    }
    for row in rows:
        question = str(row["data/question"])
        assert question in str(row["prompt"])
        assert row["answer"] == row["data/amount"] == str(amounts[question.partition(".")[0]])
        assert row["rewards/brief"] == pytest.approx(int(str(row["answer"])) / 100)
        assert row["correct"] == (str(row["completion"]).split()[-1:] == [row["answer"]])
    second = sum(row["data/turn"] == "2" for row in rows) / len(rows)
    assert read_metrics(run)[-1]["user/second"] == pytest.approx(second)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["data"]["verify_sha256"] == hash_file(here / "my.py")
    assert manifest["data"]["train_sha256"] == hash_file(here / "pens.csv")

    capsys.readouterr()
    assert operando(monkeypatch, "eval", "runs/pens") == 0
    assert "file (raw)" in capsys.readouterr().err
    (file,) = run.glob("evals/answers_*.parquet")
    asked = pq.read_table(file).to_pylist()
    turns = {
        str(e.question): e.columns["turn"]
        for e in load_task(load_recipe("pens.toml").task).held_out
    }
    for row in asked:
        assert json.loads(row["labels"]) == {"second": turns[row["question"]] == "2"}
    assert {row["graded_by"] for row in asked} == {"my.py:verify"}
    assert operando(monkeypatch, "report", "runs/pens") == 0

    (here / "my.py").write_text(MINE + "\n# another verifier\n")
    capsys.readouterr()
    assert operando(monkeypatch, "train", "pens.toml", "--resume") == 2
    assert "started with another task; changed: verify, labels" in capsys.readouterr().err


def test_a_verifier_that_calls_gold_answers_wrong_is_exit_code_3(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "my.py").write_text(MINE.replace("== example.answer", "== example.answer + '.'"))
    assert operando(monkeypatch, "task", "check", "pens.toml", "--no-samples") == 3
    said = capsys.readouterr().err
    assert "the verifier calls 0 of 60 right" in said
    assert said.splitlines()[-1].startswith("not yet: the verifier calls 60 of 60 gold answers")
    assert sorted(f.name for f in here.iterdir() if f.name != "__pycache__") == [
        "my.py",
        "pens.csv",
        "pens.toml",
    ]


def test_a_verifier_that_raises_in_training_names_its_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "my.py").write_text(
        MINE.replace('return False, "nothing said"', "return 1 / 0").replace(
            "if not words", "if words"
        )
    )
    assert operando(monkeypatch, "train", "pens.toml") == 2
    said = capsys.readouterr().err
    assert "raised ZeroDivisionError" in said and f"{here}/my.py:5 in verify" in said
    assert not (here / "runs" / "pens").exists()


def test_a_task_object_is_trained_on_and_no_other_takes_its_place(here: Path) -> None:
    mine = replace(load_task(load_recipe("pens.toml").task), name="mine", labels=None)
    recipe = tiny(here / "runs", "steps=2")
    folder = trained(recipe, task=mine)
    for row in rollout_rows(folder, 1):
        assert row["prompt"] == f"Q: {row['data/question']}\nA:"
    assert load_recipe(str(folder / "recipe.toml")).task.model_dump() == {
        "kind": "python",
        "name": "mine",
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["task"] == "mine" and len(manifest["examples_sha256"]) == 64
    trained(recipe, resume=True, task=mine)
    first, *rest = mine.train
    other = replace(mine, train=[replace(first, answer="0"), *rest])
    with pytest.raises(UserError, match="started with another task; changed: examples"):
        trained(recipe, resume=True, task=other)
    with pytest.raises(UserError, match="started with another recipe; changed: task.name"):
        trained(recipe, resume=True, task=replace(mine, name="yours"))
    with pytest.raises(UserError, match="started with another recipe; changed: task"):
        trained(recipe, resume=True)


def test_train_wants_a_recipe_that_says_so(here: Path) -> None:
    mine = load_task(load_recipe("pens.toml").task)
    run = Run.create(tiny(here / "runs"))
    try:
        with pytest.raises(UserError, match="set kind = 'python'"):
            train(run.recipe, run, task=mine)
    finally:
        run.close()
    recipe = Recipe.model_validate(
        run.recipe.model_dump() | {"name": "own", "steps": 2, "task": {"kind": "python"}}
    )
    run = Run.create(recipe)
    try:
        train(recipe, run, task=mine)
        assert check_examples(run, mine)
    finally:
        run.close()
    assert len(read_metrics(run.folder)) == 3
