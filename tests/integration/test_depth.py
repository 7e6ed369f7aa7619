"""`operando depth` on a run: what it writes, what the report repeats, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from operando.errors import UserError
from operando.evals.depth import depth_lines, depth_sentence, depth_table, measure_depth
from operando.evals.evaluate import evaluate
from operando.evals.instructed import prompt_edits
from operando.evals.questions import EvalConfig
from operando.models.load import load_model, stop_ids
from operando.report.html import write_report
from operando.rollout.make import make_sampler
from operando.rollout.sampler import Request, Sampling
from operando.run_folder import read_recipe, start_of
from operando.tasks.load import load_task
from operando.tasks.prompts import make_prompts
from tests.integration.runs import tiny, trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return trained(tiny(folder, "optim.lr=1e-2", "steps=12", "checkpoint.every=12"))


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_both_ends_of_the_table_are_the_two_models(run: Path, temperature: float | None) -> None:
    report = measure_depth(run, num=16, search=8, temperature=temperature)
    arms = {(row.arm, row.k): row.correct.value for row in report.rows}
    assert arms["base, trained's tokens", None] == arms["trained", None]
    if temperature is None:
        before, after = evaluate(run, EvalConfig(num=16)).rows
        assert arms["base", None] == before.all.right.value
        assert arms["trained", None] == after.all.right.value
    written = json.loads(report.file.read_text())
    assert written["said"] == depth_sentence(report) and len(written["rows"]) == len(report.rows)
    assert len(depth_table(report).rows) >= len(report.rows)
    assert depth_lines(report)[0] == written["said"]
    assert written["said"] in write_report([run]).read_text().replace("&#39;", "'")


def test_more_problems_than_there_are_is_an_error(run: Path) -> None:
    with pytest.raises(UserError, match="--num 17: the split has 16 problems"):
        measure_depth(run, num=17)
    with pytest.raises(UserError, match="--search 65: the split has 64 problems"):
        measure_depth(run, num=4, search=65)


def test_the_prompt_edit_is_what_the_base_answers_behind_it(run: Path) -> None:
    """A second opinion: the same edit's prompts, answered by operando's engine."""
    report = measure_depth(run, num=16, search=8)
    assert report.prompt is not None and report.prompt.place is None and report.prompt.tried == 3
    recipe = read_recipe(run)
    task, loaded = load_task(recipe.task), load_model(recipe.model)
    edits = prompt_edits(recipe.prompt, task.text, [], task.train[8:])
    text, config, shots = next(e for e in edits if e.text == report.prompt.text)
    tokenizer, day = loaded.tokenizer, start_of(run)
    prompts = make_prompts(task.held_out, shots, config, tokenizer, 500, day)
    sampler = make_sampler("auto", loaded.model, tokenizer, stop_ids(loaded.model, tokenizer), 16)
    answers = sampler.sample(Request([p.ids for p in prompts], 1, Sampling(32)))
    verdicts = [
        task.verify(example, answer.text, answer.is_truncated)
        for example, answer in zip(task.held_out, answers, strict=True)
    ]
    assert report.prompt.correct.value == sum(v.correct for v in verdicts) / 16
    assert any(text[:20] in row[0] for row in depth_table(report).rows)
