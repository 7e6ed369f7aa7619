"""MATH-500: boxes, spellings of one answer, and the 500 gold solutions."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest

from operando.errors import UserError
from operando.recipe import Math500TaskConfig
from operando.tasks.load import load_task
from operando.tasks.math500 import (
    find_answer,
    last_boxed,
    load_math500,
    normalise,
    same_answer,
    to_number,
    verify_math,
)
from operando.types import Example

DATA = Path(
    os.environ.get("OPERANDO_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)
FILE = DATA / "math500_test.jsonl"
needs_data = pytest.mark.skipif(
    not FILE.is_file(),
    reason=f"no MATH-500 file in {DATA}; name its folder in OPERANDO_TEST_DATA",
)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{3} and then \boxed{4}", "4"),
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{7} but \boxed{\frac{1", "7"),  # the last one is never closed
        (r"$\boxed 5$", "5"),
        (r"\fbox{6}", "6"),
        ("no box: 5", None),
    ],
)
def test_last_closed_box(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2+3=5\nThe answer is 5.", "5."),
        ("It costs $x$, so we get $x = 7$.", "x = 7"),
        (r"Hence \(12\).", "12"),
        ("#### 12", "12"),
        ("3 + 4 = 7\n\n", "7"),
        (r"\boxed{3}\nThe answer is 4", "3"),
        ("  \n", None),
    ],
)
def test_answer_without_a_box_is_the_end_of_the_last_line(text: str, answer: str | None) -> None:
    assert find_answer(text) == answer


@pytest.mark.parametrize(
    ("answered", "gold"),
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        ("1/2", r"\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        (".5", "0.50"),
        (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        ("−3", "-3"),
        (r"1\frac{4}{5}", r"\frac{9}{5}"),
        ("1,200", "1200"),
        (r"10,\!080", "10080"),
        (r"\$32{,}348.", "32348"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        ("90 degrees", "90"),
        (r"5\text{ cm}^2", "5"),
        (r"50\%", "50"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "C"),
        ("x = 5", "5"),
        (r"x \in [-2, 7]", "[-2,7]"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("(0.5, 2)", r"\left(\frac12, 2\right)"),
        ("3, -1", "-1,3"),
        (r"1 \text{ and } 2", "2, 1"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("4210_{5}", "4210_5"),
        (r"\frac{\sqrt{3}}{2}", r"\dfrac{ \sqrt 3 }{ 2 }".replace(r"\sqrt 3", r"\sqrt{3}")),
    ],
)
def test_spellings_of_one_answer_are_equal(answered: str, gold: str) -> None:
    assert same_answer(answered, gold), (normalise(answered), normalise(gold))
    assert same_answer(gold, answered)


@pytest.mark.parametrize(
    ("answered", "gold"),
    [
        ("4", "40"),
        ("0.33", r"\frac{1}{3}"),
        ("(1, 2)", "(2, 1)"),  # the order of a tuple counts
        ("(1, 2)", "[1, 2]"),  # and the brackets of an interval
        ("1, 2", "1, 2, 3"),
        ("1, 1", "1, 2"),
        ("5m", "5"),  # m may be a variable
        ("-5", "5"),
        ("1/0", "0"),
        (r"2\sqrt{2}", r"\sqrt{8}"),  # nothing is simplified
        ("", "5"),
    ],
)
def test_other_answers_are_not(answered: str, gold: str) -> None:
    assert not same_answer(answered, gold)


def test_values() -> None:
    assert to_number("(3)/(-4)") == Fraction(-3, 4)
    assert to_number("-2(1)/(2)") == Fraction(-5, 2)
    assert to_number("(1)/(0)") is None and to_number("x") is None


def test_what_a_loop_wrote_is_wrong_and_no_error() -> None:
    example = Example("m/0", "?", r"\frac{1}{2}")
    for text in ("1" * 6000, r"\frac{1}{" * 400, "1/" * 3000, r"\boxed{" * 1000, "{" * 5000):
        assert not verify_math(example, text, True).correct


def test_the_gold_in_the_text_is_not_enough() -> None:
    example = Example("m/0", "What is 6 * 7? (It is 42.)", "42")
    assert not verify_math(example, r"42 is wrong, so \boxed{41}", False).correct
    assert not verify_math(example, "", False).correct
    assert verify_math(example, r"\boxed{41}, no: \boxed{42}", True).correct


def rows(path: Path, *problems: str) -> Path:
    path.write_text(
        "".join(
            json.dumps({"problem": p, "solution": r"\boxed{1}", "answer": "1"}) + "\n"
            for p in problems
        )
    )
    return path


def test_training_needs_other_problems(tmp_path: Path) -> None:
    test = rows(tmp_path / "test.jsonl", "a?", "b?")
    config = Math500TaskConfig(kind="math500", test=str(test))
    with pytest.raises(UserError, match="math500' has no training split: .*task.train"):
        load_task(config)
    train = rows(tmp_path / "train.jsonl", "c?", "b?")
    with pytest.raises(UserError, match="holds 1 of the 2 held-out problems, the first: 'b\\?'"):
        load_task(config.model_copy(update={"train": str(train)}))
    fine = rows(tmp_path / "fine.jsonl", "c?")
    task = load_task(config.model_copy(update={"train": str(fine)}))
    assert [e.question for e in task.train] == ["c?"]
    assert task.source["train_rows"] == 1 and task.source["held_out_rows"] == 2


@needs_data
def test_every_gold_solution_is_right() -> None:
    task = load_math500(Math500TaskConfig(kind="math500", test=str(FILE)))
    assert len(task.held_out) == 500
    wrong = [e.id for e in task.held_out if not verify_math(e, e.solution, False).correct]
    assert wrong == []


@needs_data
def test_no_two_golds_that_differ_are_taken_for_the_same() -> None:
    """Of the neighbours in the file each is wrong for the other, save where they do agree."""
    task = load_math500(Math500TaskConfig(kind="math500", test=str(FILE)))
    answers = [e.answer for e in task.held_out]
    same = {(a, b) for a, b in zip(answers, answers[1:], strict=False) if same_answer(a, b)}
    assert all(normalise(a) == normalise(b) for a, b in same), same
