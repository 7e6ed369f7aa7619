"""The audit of tags: counts by a stack, and a verdict from base beside trained alone."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from operando.cli import app
from operando.errors import UserError
from operando.evals.tags import Seen, TagRow, audit_tags, tag_rows
from operando.recipe_io import load_recipe
from operando.run import Run

NUM = 20


def rows_of(base: list[str], trained: list[str], prompt: str = "Q: x\nA:") -> dict[str, TagRow]:
    seen = [Seen(0, text) for text in base] + [Seen(9, text) for text in trained]
    return {row.tag: row for row in tag_rows(seen, {prompt}, base, trained)}


def test_counts_pairs_and_places_by_hand() -> None:
    rows = rows_of(["<a>x</a>"], ["<a><b>x</a><b/> 1<c>2"])
    assert [row.count for row in rows.values()] == [4, 2], "1<c>2 is a comparison"
    assert rows["a"].balanced == 1.0 and rows["b"].balanced == 0.5
    assert rows["b"].inside == {"a": 1} and rows["a"].inside == {}
    assert (rows["a"].first_step, rows["b"].first_step) == (0, 9)


def test_a_tag_that_training_brought_is_invented() -> None:
    row = rows_of(["x"] * NUM, ["<step1>x</step1>"] * 10 + ["x"] * 10)["step1"]
    assert (row.base_rate, row.trained_rate) == (0.0, 0.5)
    assert row.change.gained == 10 and row.change.difference.low > 0
    assert row.verdict == "invented by training"


def test_the_difference_decides_and_not_the_count() -> None:
    always = rows_of(["<p>x</p>"] * NUM, ["<p>x</p>" * 9] * NUM)["p"]
    assert always.count == 400 and always.verdict == "no difference shown"
    once = rows_of(["x"] * NUM, ["<p>x</p>"] + ["x"] * 19)["p"]
    assert once.change.difference.value > 0 and once.verdict == "no difference shown"
    fewer = rows_of(["<p>x</p>"] * NUM, ["x"] * NUM)["p"]
    assert fewer.verdict == "less after training"


def test_a_tag_of_the_prompt_is_not_invented() -> None:
    row = rows_of(["x"] * NUM, ["<think>x</think>"] * NUM, prompt="Use <think>.")["think"]
    assert row.in_prompt and row.verdict == "more after training, but in the prompt"


def make_run(folder: Path, base: list[str], trained: list[str]) -> Path:
    file = folder / "r.toml"
    file.write_text(
        f'name = "r"\nsteps = 2\nruns_dir = "{folder}"\n[task]\nkind = "words"\n'
        '[rewards.c]\nkind = "correct"\n'
    )
    run = Run.create(load_recipe(str(file)))
    run.close()
    for kind in ("evals", "rollouts"):
        (run.folder / kind).mkdir()
    for step, completions in ((0, base), (1, base), (2, trained)):
        ids = [f"words/held_out/{i}" for i in range(len(completions))]
        table = {"example_id": ids, "question": ["q"] * len(ids), "completion": completions}
        pq.write_table(pa.table(table), run.folder / "evals" / f"held_out_step_{step:05d}.parquet")
    rollouts = pa.table({"prompt": ["Q: q\nA: <think>"], "completion": ["<Step1>"]})
    pq.write_table(rollouts, run.folder / "rollouts" / "step_00001.parquet")
    return run.folder


def test_the_command_writes_tags_json_and_prints_its_path(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["x"] * NUM, ["<Step1>x</think>"] * NUM)
    result = CliRunner().invoke(app, ["tags", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(folder / "tags.json")
    content = json.loads((folder / "tags.json").read_text())
    assert (content["base_step"], content["trained_step"], content["num_prompts"]) == (0, 2, NUM)
    step, think = content["rows"]
    assert (step["tag"], step["count"], step["first_step"]) == ("Step1", NUM + 1, 1)
    assert step["verdict"] == "invented by training" and step["balanced"] == 0.0
    assert think["in_prompt"] and think["verdict"] == "more after training, but in the prompt"


def test_a_run_without_tags_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["x"] * 3, ["y"] * 3)
    (folder / "rollouts" / "step_00001.parquet").unlink()
    result = CliRunner().invoke(app, ["tags", str(folder)])
    assert result.exit_code == 0 and "no tag in any of them" in " ".join(result.output.split())


def test_answers_to_other_prompts_are_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path, ["x"] * 3, ["y"] * 4)
    with pytest.raises(UserError, match="do not hold the same held-out problems"):
        audit_tags(folder)
    (folder / "evals" / "held_out_step_00000.parquet").unlink()
    with pytest.raises(UserError, match=r"no held-out answers of both.*found steps \[1, 2\]"):
        audit_tags(folder)
