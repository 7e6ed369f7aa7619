"""A run whose completions, rewards and verdicts hold hostile text trains, reports and resumes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from operando.evals.evaluate import evaluate
from operando.evals.questions import EvalConfig
from operando.models.tokens import completion_text
from operando.recipe.data import CodeTaskConfig
from operando.records import write_held_out
from operando.rollout import sampler
from operando.rollout.greedy_eval import grade
from operando.run import Run
from operando.tasks.code import load_code
from operando.text import encodable
from operando.types import Prompt, Rollout
from tests.integration.runs import ROOT, python, rollout_rows, tiny, trained
from tests.integration.test_study import STUDY

HOSTILE = "\ud800\x00\x1b[2J\u202e\x9b</script>\udfff" + "x" * 1_000_000


def test_a_run_of_hostile_text_is_written_evaluated_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = "\ud800\x00\x1b[2J\u202e"

    def hostile_text(*args: object) -> str:  # as a tokenizer in Python may decode
        return encodable(completion_text(*args) + tail)  # pyright: ignore

    monkeypatch.setattr(sampler, "completion_text", hostile_text)

    def logs(completions: Sequence[str], log_extra, **_: object) -> list[float]:  # noqa: ANN001
        log_extra("said", [HOSTILE] * len(completions))
        return [float(len(c)) / 100 for c in completions]

    recipe = tiny(tmp_path, "steps=2", "checkpoint.every=1", "rewards.f={kind = 'function'}")
    folder = trained(recipe, functions={"f": logs})
    rows = rollout_rows(folder, 1)
    last = rollout_rows(folder, 2)
    shutil.rmtree(folder / "checkpoints" / "step_00002")
    trained(recipe, resume=True, functions={"f": logs})
    assert rollout_rows(folder, 2) == last
    asked = evaluate(folder, EvalConfig(num=4))
    texts = pq.read_table(asked.file).column("completion").to_pylist()
    assert len(texts) == 8 and all(text.endswith("\ufffd\x00\x1b[2J\u202e") for text in texts)
    assert all(r["said"] == encodable(HOSTILE) for r in rows)
    assert all(str(r["completion"]).endswith("\ufffd\x00\x1b[2J\u202e") for r in rows)
    page = tmp_path / "page.html"
    reported = python("-m", "operando", "report", str(folder), "--out", str(page), cwd=ROOT)
    assert reported.returncode == 0, reported.stderr
    text = page.read_text(encoding="utf-8")
    assert not set("\x00\x1b\u202e\x9b") & set(text)


def test_answers_that_raise_hostile_text_are_held_out_like_others(tmp_path: Path) -> None:
    task = load_code(CodeTaskConfig(kind="code", num_held_out=2))
    entry = task.held_out[0]
    codes = ["raise ValueError('\\ud800')", "raise ValueError('\\x1b[2J\\x00')"]
    rollouts = [
        Rollout(Prompt(entry, "", ()), i, 0, f"```python\n{code}\n```", (1,), (0.0,), False)
        for i, code in enumerate(codes)
    ]
    graded = grade(task, rollouts)
    assert ["ValueError" in j.verdict.reason for j in graded] == [True, True]
    run = Run.create(tiny(tmp_path))
    write_held_out(run, 0, graded)
    run.close()


# Imported by the study's own process, and by each of its runs as the file of a reward.
HOSTILE_TOKENIZER = r"""
from operando.rollout import sampler
from operando.text import encodable

real = sampler.completion_text
TAIL = "\ud800\x00\x1b[2J\u202e</script>"
sampler.completion_text = lambda *given: encodable(real(*given) + TAIL)

def pay(completions, log_extra, **_):
    log_extra("said", [TAIL] * len(completions))
    return [float(len(c)) / 100 for c in completions]
"""


def test_a_study_of_hostile_text_is_asked_judged_and_written(tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE_TOKENIZER)
    pays = '\'rewards.f={kind="function",path="hostile.py:pay"}\', '
    text = STUDY.format(tiny=ROOT / "recipes" / "tiny.toml")
    text = text.replace('"steps=3", "checkpoint.every=1"', f'{pays}"steps=1", "eval.every=1"')
    text = text.replace("Three tokens", r"Three \u001b[2J\u202e</script> tokens")
    (tmp_path / "study.toml").write_text(text)
    run = "import sys, hostile; from operando.cli import main; main()"
    done = python("-c", run, "study", "study.toml", "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "of 2 claims" in done.stderr and not set("\x1b\u202e\x00") & set(done.stderr)
    folder = tmp_path / "runs" / "small"
    for name in ("study.md", "pareto.svg"):
        assert not set("\x1b\u202e\x00") & set((folder / name).read_text(encoding="utf-8")), name
    asked = list(folder.glob("*/evals/study.parquet"))
    assert len(asked) == 5
    for file in asked:
        texts = pq.read_table(file)["completion"].to_pylist()
        assert texts and all(t.endswith("\ufffd\x00\x1b[2J\u202e</script>") for t in texts)
    rows = rollout_rows(folder / "small-trained-s0", 1)
    assert all(row["said"] == "\ufffd\x00\x1b[2J\u202e</script>" for row in rows)
