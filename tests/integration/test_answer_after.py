"""prompt.answer_after: the verifier sees what follows the thinking, and nothing without it."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from operando.errors import UserError
from operando.evals.fuzz_cases import made_cases
from operando.evals.task_check import check_task
from operando.recipe_io import load_recipe
from operando.tasks.base import Answered
from operando.tasks.load import load_task, recipe_task
from tests.integration.runs import tiny, trained

END = "</think>"
SETTINGS = (
    f'prompt.answer_after="{END}"',
    'prompt.answer_template=" {solution}</think> #### {answer}"',
)


def test_the_verifier_sees_what_follows_the_first_end_of_thinking() -> None:
    recipe = load_recipe("tiny", SETTINGS)
    task, plain = recipe_task(recipe), load_task(recipe.task)
    example = task.held_out[0]
    gold, other = f" #### {example.answer}", f" #### {int(example.answer) + 1}"
    cases = [
        (f"{other}{END}{gold}", True),
        (f"{gold}{END}{other}", False),
        (f"{gold}{END}", False),
        (gold, False),
        (f"a{END} b{END}{gold}", True),
    ]
    for text, is_right in cases:
        assert task.verify(example, text, False).correct is is_right, text
    assert plain.verify(example, gold, False).correct


def test_labels_grades_and_measures_see_the_same_text() -> None:
    recipe = load_recipe("deep_hack", SETTINGS)
    task = recipe_task(recipe)
    example = task.held_out[0]
    hedged = f" #### {example.answer} or 0"
    assert task.labels is not None and task.grades is not None
    behind, before = f" x{END}{hedged}", f"{hedged}{END} #### {example.answer}"
    assert task.labels(example, behind, False) != task.labels(example, before, False)
    grades = task.grades([Answered(example, text, False) for text in (behind, before)])
    assert [grade.correct for grade in grades] == [False, True]
    clrs = recipe_task(load_recipe("tiny", ('task={kind="clrs"}', *SETTINGS)))
    one = clrs.held_out[0]
    assert clrs.measures is not None
    worked = clrs.text.worked(one.solution, one.answer)
    whole = clrs.measures(one, f"nonsense{END}{worked}")
    assert whole["nodes right"] == 1 and clrs.measures(one, worked)["nodes right"] == 0


def test_worked_answers_hold_the_mark() -> None:
    recipe = load_recipe("tiny", SETTINGS)
    assert check_task(recipe, samples=None).passed
    assert any(case.is_right for case in made_cases(recipe, recipe_task(recipe), 4))
    with pytest.raises(UserError, match="answer_after = '</think>' is not in answer_template"):
        load_recipe("tiny", SETTINGS[:1])


def test_training_and_evaluation_judge_by_it(tmp_path: Path) -> None:
    """No answer of a model that never ends its thinking is right; a mark with which every answer
    begins changes nothing."""

    def held_out(name: str, *settings: str) -> list[tuple[str, bool]]:
        run = trained(tiny(tmp_path / name, "steps=1", "eval.num=40", *settings))
        rows = pq.read_table(run / "evals/held_out_step_00000.parquet").to_pylist()
        return [(row["completion"], row["correct"]) for row in rows]

    plain = held_out("plain")
    space = ('prompt.answer_after=" "', 'prompt.answer_template=" {solution} #### {answer}"')
    assert held_out("space", *space) == plain
    assert any(is_right for _, is_right in plain)
    assert held_out("never", *SETTINGS) == [(text, False) for text, _ in plain]
