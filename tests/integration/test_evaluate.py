"""`operando eval --tasks` and `operando canary` on a tiny run of the starter model."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from operando import cli
from operando.evals.evaluate import evaluate
from operando.evals.questions import EvalConfig
from operando.models.load import STARTER
from tests.integration.runs import tiny, trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with so high a learning rate that its answers differ from the base model's."""
    overrides = ("steps=2", "optim.lr=0.05", "optim.warmup_steps=0")
    return trained(tiny(tmp_path_factory.mktemp("outside"), *overrides))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few problems of each task; the GSM8K ones are of the kind the starter was made for."""
    folder = tmp_path_factory.mktemp("data")
    sums = [
        {
            "question": f"Tom has {a} pens and buys {b} more. How many pens does Tom have?",
            "answer": f"{a}+{b}\n#### {a + b}",
        }
        for a, b in ((3, 2), (7, 5), (12, 4), (1, 9), (8, 8), (6, 2))
    ]
    (folder / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, sums)))
    math = [
        {"problem": "What is 1+1?", "solution": r"\boxed{2}", "answer": "2"},
        {"problem": "long " * 600, "solution": r"\boxed{2}", "answer": "2"},
    ]
    (folder / "math.jsonl").write_text("\n".join(map(json.dumps, math)))
    for split in ("test", "dev"):
        (folder / "mmlu" / split).mkdir(parents=True)
        file = folder / "mmlu" / split / f"logic_{split}.csv"
        file.write_text("Is it so?,yes,no,maybe,never,A\nIs it not?,yes,no,maybe,never,B\n")
    return folder


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["operando", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def options(data: Path) -> list[str]:
    return [
        "--tasks",
        "gsm8k,mmlu,math500",
        "--data",
        f"gsm8k={data / 'gsm8k.jsonl'}",
        "--data",
        f"mmlu={data / 'mmlu'}",
        "--data",
        f"math500={data / 'math.jsonl'}",
    ]


def test_three_tasks_from_local_files(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert run_cli(monkeypatch, "eval", str(run), *options(data), "--num", "2", "--greedy") == 0
    said = capsys.readouterr()
    out = said.out.strip().splitlines()
    name = Path(out[-1]).name
    assert Path(out[-1]).parent == run / "evals"
    assert re.fullmatch(
        r"answers_step_00002_gsm8k-mmlu-math500_raw_greedy_[0-9a-f]{6}.parquet", name
    )
    assert "1 too long" in said.err
    for stage in ("base on gsm8k, float32", "step 2 on mmlu, float32"):
        assert f" s  {stage}\n" in said.err
    every = pq.read_table(out[-1]).to_pylist()
    rows = [r for r in every if r["model"] == "base"]
    assert len(every) == 10 and {r["model"] for r in every} == {"base", "step 2"}
    assert [r["task"] for r in rows] == ["gsm8k", "gsm8k", "mmlu", "mmlu", "math500"]
    assert [r["graded_by"] for r in rows[1:4]] == ["last_number", "mmlu", "mmlu"]
    assert rows[4]["graded_by"] == "ours"
    first = rows[0]
    assert first["prompt"].endswith("How many pens does Tom have?\nA:")
    assert first["example_id"] == "gsm8k/test/0" and first["answer"] == "5"
    assert rows[2]["prompt"].endswith("\nD. never\nAnswer:")
    assert rows[4]["prompt"] == "Q: What is 1+1?\nPut the final answer in \\boxed{}.\nA:"


def test_an_imported_model_is_asked_by_its_name(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPERANDO_HOME", str(tmp_path / "home"))
    (tmp_path / "home/models").mkdir(parents=True)
    shutil.copytree(STARTER, tmp_path / "home/models/mine")
    monkeypatch.chdir(tmp_path)
    asked = ("--tasks", "gsm8k", "--data", f"gsm8k={data / 'gsm8k.jsonl'}", "--num", "2")
    assert run_cli(monkeypatch, "eval", "mine", *asked) == 0
    file = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert file.parent == tmp_path / "home/models/mine/evals"
    assert run_cli(monkeypatch, "eval", "mime", *asked) == 2
    assert "mine" in capsys.readouterr().err


def test_both_arms_are_asked_the_same_and_answer_apart(run: Path, data: Path) -> None:
    config = EvalConfig(("gsm8k",), data={"gsm8k": str(data / "gsm8k.jsonl")})
    result = evaluate(run, config)
    before, after = result.rows
    table = pq.read_table(result.file).to_pylist()
    base, trained = table[:6], table[6:]
    assert before.n == after.n == len(base) == len(trained) == 6
    right = [sum(r["correct"] for r in arm) for arm in (base, trained)]
    assert before.all.right.value == right[0] / 6 and after.all.right.value == right[1] / 6
    assert before.change is None and after.change is not None
    assert after.change.gained - after.change.lost == right[1] - right[0]
    assert right[0] >= 3  # the starter knows these sums
    assert [r["prompt"] for r in base] == [r["prompt"] for r in trained]
    assert [r["completion"] for r in base] != [r["completion"] for r in trained]


def test_samples_are_seeded_and_clustered_by_problem(run: Path, data: Path) -> None:
    config = EvalConfig(
        ("gsm8k",), data={"gsm8k": str(data / "gsm8k.jsonl")}, temperature=1.0, samples=3, num=4
    )
    first = evaluate(run, config)
    before = pq.read_table(first.file).to_pylist()
    again = evaluate(run, config)
    assert pq.read_table(again.file).to_pylist() == before
    assert [r["sample"] for r in before] == [0, 1, 2] * 8
    base, row = again.rows
    assert row.change is not None
    assert (row.n, row.samples, row.change.p_value) == (4, 3, None)
    mean = sum(r["correct"] for r in before if r["model"] == "step 2") / 12
    assert row.all.right.value == pytest.approx(mean)
    change = row.all.right.value - base.all.right.value
    assert row.change.difference.value == pytest.approx(change)


def test_the_runs_own_task_in_another_format(run: Path) -> None:
    own = evaluate(run, EvalConfig((), num=4, format="chat"))
    assert own.rows[0].task == "words" and own.rows[0].format == "chat"
    assert own.file.name == "answers_step_00002_words_chat_greedy.parquet"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--tasks", "gsm8q"], "--tasks gsm8q: no such task; .*Did you mean 'gsm8k'"),
        (["--tasks", "words,words"], "named twice"),
        (["--tasks", "math500", "--grader", "sympy"], "--grader sympy: expected ours or math_ver"),
        (["--tasks", "gsm8k", "--grader", "ours"], "--grader ours is for math500, which --tasks"),
        (["--tasks", ","], "expected names such as .*gsm8k"),
        (["--tasks", "gsm8k", "--data", "gsm8k"], "expected TASK=PATH"),
        (["--tasks", "gsm8k", "--data", "gsm=x"], "--data gsm=.*Did you mean 'gsm8k'"),
        (["--tasks", "gsm8k", "--data", "mmlu=x"], "--tasks does not name mmlu"),
        (
            ["--tasks", "gsm8k", "--data", "gsm8k=/none.jsonl"],
            r"--data gsm8k\.test = .*no such file",
        ),
        (["--samples", "2"], "--samples 2 needs --temperature"),
        (["--temperature", "1", "--greedy"], "exclude each other"),
        (["--temperature", "0"], "--temperature 0.0: expected a number above 0"),
        (["--prompt", "row"], "--prompt row: expected raw or chat. Did you mean 'raw'"),
        (["--tasks", "words", "--num", "17"], "--num 17: words has 16 held-out problems"),
        (["--num", "17"], "--num 17: words has 16 held-out problems"),
        (["--tasks", "words", "--max-completion-length", "512"], "leave no room for a prompt"),
    ],
)
def test_mistakes_are_one_message(
    given: list[str],
    said: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_cli(monkeypatch, "eval", str(run), *given) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and "Traceback" not in error, error


def test_worked_examples_need_a_training_split(
    run: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--tasks", "math500", "--data", f"math500={data / 'math.jsonl'}", "--few-shot", "1"]
    assert run_cli(monkeypatch, "eval", str(run), *given) == 2
    assert "math500 has 0 training problems" in capsys.readouterr().err
    given = ["--tasks", "mmlu", "--data", f"mmlu={data / 'mmlu'}", "--few-shot", "1"]
    assert run_cli(monkeypatch, "eval", str(run), *given) == 0
    file = Path(capsys.readouterr().out.strip().splitlines()[-1])
    for row in pq.read_table(file).to_pylist():
        assert row["prompt"].count("Answer:") == 2 and "\nAnswer: " in row["prompt"]


def test_canary(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_cli(monkeypatch, "canary", str(run)) == 0
    said = capsys.readouterr()
    out, table = said.out.strip().splitlines(), said.err.splitlines()
    assert out[-1].endswith("canary_step_00002_canary_v1_ours.parquet")
    rows = pq.read_table(out[-1]).to_pylist()
    assert len(rows) == 122
    rows = [r for r in rows if r["model"] == "base"]
    for family, n in (("instruction_conflict", 25), ("gaming", 36)):
        place = [line.strip() for line in table].index(family)
        base = [r["label"] for r in rows if r["family"] == family]
        said_of_base = table[place + 1].split()
        assert said_of_base[:4] == ["base,", "n", str(n), str(base.count("hack"))]
        assert said_of_base[-4] == str(base.count("degenerate"))
    assert run_cli(monkeypatch, "canary", str(run), "--classifier", "mechreward") == 0
    other = capsys.readouterr().out.strip().splitlines()[-1]
    theirs = [r for r in pq.read_table(other).to_pylist() if r["model"] == "base"]
    # The same answers under another classifier.
    assert [r["completion"] for r in theirs] == [r["completion"] for r in rows]
    assert not any(r["label"] == "hack" for r in theirs)
    assert run_cli(monkeypatch, "canary", str(run), "--prompts", "none.jsonl") == 2
    assert "no such file" in capsys.readouterr().err
