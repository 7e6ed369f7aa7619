"""MATH-500: boxes, spellings of one answer, and the 500 gold solutions."""

from __future__ import annotations

import json
import os
import random
import sys
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import pytest

from operando.errors import UserError
from operando.recipe.data import Math500TaskConfig
from operando.tasks.load import load_task
from operando.tasks.math500 import (
    by_math_verify,
    find_answer,
    last_boxed,
    load_math500,
    verify_math,
)
from operando.tasks.math_answers import normalise, same_answer, to_number, to_unit
from operando.types import Example

DATA = Path(
    os.environ.get("OPERANDO_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)
FILE = DATA / "math500_test.jsonl"
needs_data = pytest.mark.skipif(
    not FILE.is_file(), reason=f"no MATH-500 file in {DATA}; name its folder in OPERANDO_TEST_DATA"
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
        (r"\boxed 5.25.", "5.25"),
        (r"} } \boxed{\{1\}} {", r"\{1\}"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{a \boxed{b}", "b"),
        (r"\boxed{a} {\boxed{b", "a"),
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
        ("**Answer:** 7", "7"),
        ("The answer is **7**.", "7."),
        ("So $x=2$ or $x=3$", "x=2, x=3"),
        ("As $a=1$ we get $x=3$", "x=3"),
        ("x = 2 or x = 3", "x = 2 or x = 3"),
        ("3 + 4 = 7\n\n", "7"),
        (r"\boxed{3}\nThe answer is 4", "3"),
        ("So\n\\[\nx = 5\n\\]", "5"),
        ("So\n$$\nx = 5\n$$\n", "5"),
        ("```\n5\n```", "5"),
        ("\\begin{align*}\nx &= 5\n\\end{align*}\n\\]", "5"),
        ("The answer is 5.\n---", "5."),
        ("```\n\\]\n$$", None),
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
        (r"50\%", r"\frac12"),
        (r"18.90 dollars", r"\$18.90"),
        (r"5\text{ miles per hour}", r"5\text{ mph}"),
        (r"12\text{ sq in}", r"12\text{ in}^2"),
        (r"10^\circ\text{C}", "10"),
        ("1 234", "1234"),
        ("1 1/2", r"\frac32"),
        (r"\{4,3\}", r"\{3,4\}"),
        ("(1,2),(3,4)", "(3,4),(1,2)"),
        ("100,200", "200,100"),
        (r"\pm 2", "-2, 2"),
        (r"x = 2 \text{ or } x = 3", "3, 2"),
        (r"(9,36) \cup (0,9)", r"(0,9) \cup (9,36)"),
        (
            r"\begin{pmatrix}0.2\\[2pt]-3.6\end{pmatrix}",
            r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}",
        ),
        ("east", r"\text{East}"),
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
        (r"\frac{3\sqrt2}{2}", r"3\sqrt{2}/2"),
        (r"2\pi/3", r"\frac{2\pi}{3}"),
        (r"-2\pi/3", r"\frac{-2\pi}{3}"),
        (r"\sqrt{3}/2", r"\frac{\sqrt{3}}{2}"),
        ("(x,y)=(5,3)", "(5,3)"),
        (r"\left(x, y\right) = (5,3)", "(x,y)=(5, 3)"),
        ("(x_1,x_2,x_3)=(1,2,3)", "(1,2,3)"),
        (r"5\text{ m}", "5"),
        (r"5\text{ g}", "5"),
        ("100,200,300", "300,100,200"),
        ("123,456", "123456"),
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
        ("3^2", "3"),
        ("10^3", "10"),
        (r"\frac{1}{2}^2", r"\frac12"),
        ("(x+1)^2", "(x+1)"),
        (r"5\text{ miles}", r"5\text{ km}"),
        (r"12\text{ cm}^2", r"12\text{ cm}^3"),
        (r"\$5", r"5\text{ cents}"),
        ("5 million", "5"),
        (r"5\text{ million dollars}", "5"),
        (r"5\text{ or more}", "5"),
        ("y=3", "x=3"),
        (r"y \in [-2,7]", r"x \in [-2,7]"),
        ("x=2, y=3", "x=3, y=2"),
        (r"0.5\%", "0.5"),
        (r"50\%", "50"),
        ("2, 345", "2345"),
        ("500,58", "58,500"),
        ("1 1/2", r"\frac{11}{2}"),
        ("2 3", "23"),
        ("12 or 13", "12"),
        ("123,456", "456,123"),
        ("100,101", "101,100"),
        ("456, 123", "123,456"),
        ("123, 456", "123456"),
        ("123,456,789", "456,123,789"),
        ("100,101,100", "101,100,100"),
        ("(y,x)=(5,3)", "(x,y)=(5,3)"),
        ("(x,y)=(3,5)", "(5,3)"),
        (r"2/3\pi", r"\frac{2}{3\pi}"),
        (r"2/3\pi", r"\frac{2\pi}{3}"),
        (r"-2\pi/3", r"\frac{2\pi}{3}"),
        (r"\frac{3\sqrt2}{2}", r"3\sqrt{2/2}"),
        ("5 m", "5"),
        ("5 g", "5"),
    ],
)
def test_other_answers_are_not(answered: str, gold: str) -> None:
    assert not same_answer(answered, gold)


PAIRS = [
    json.loads(line)
    for line in Path(__file__)
    .with_name("math_pairs.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]
# What a person calls right and ours does not: it simplifies nothing.
NOT_SIMPLIFIED = {
    "-5i+6",
    "5+2x",
    "(b+2)(a+5)",
    "x^2+2x+1",
    r"2\sqrt{2}",
    r"\frac{1}{\sqrt3}",
    r"0.5\pi",
    r"2\cdot 3",
    "2^{10}",
    "10^3",
}


def test_pairs_labelled_by_hand() -> None:
    """No wrong pair passes, and the right ones that don't are those that need algebra."""
    assert (len(PAIRS), sum(p["right"] for p in PAIRS)) == (222, 101)
    passes = [p for p in PAIRS if same_answer(p["answered"], p["gold"])]
    assert [p for p in passes if not p["right"]] == []
    failed = {p["answered"] for p in PAIRS if p["right"] and p not in passes}
    assert failed == NOT_SIMPLIFIED


def test_one_other_digit_is_another_answer() -> None:
    rng = random.Random(0)
    golds = {p["gold"] for p in PAIRS if any(c.isdigit() for c in p["gold"])}
    for gold in sorted(golds):
        for at in [i for i, c in enumerate(gold) if c.isdigit()]:
            digit = rng.choice([d for d in "123456789" if d != gold[at]])
            other = gold[:at] + digit + gold[at + 1 :]
            assert not same_answer(other, gold), (other, gold)


def test_math_verify_on_the_same_pairs_and_as_a_grader(tmp_path: Path) -> None:
    math_verify = pytest.importorskip("math_verify")
    if version("math-verify") != "0.9.0":
        pytest.skip("counted with 0.9.0")
    verify = by_math_verify("task.grader")
    right = [
        verify(Example("m", "?", p["gold"]), rf"\boxed{{{p['answered']}}}", False).correct
        for p in PAIRS
    ]
    false = [p["answered"] for p, r in zip(PAIRS, right, strict=True) if r and not p["right"]]
    missed = [p["answered"] for p, r in zip(PAIRS, right, strict=True) if p["right"] and not r]
    assert (len(false), len(missed)) == (24, 7), (false, missed, math_verify)
    file = rows(tmp_path / "test.jsonl", "a?")
    config = Math500TaskConfig(kind="math500", test=str(file), grader="math_verify")
    task = load_math500(config)
    assert task.graded_by == "math_verify 0.9.0"
    assert task.verify(task.held_out[0], r"\boxed{\frac{2}{2}}", False).correct


def test_a_missing_grader_is_an_error_and_the_one_used_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Math500TaskConfig(kind="math500", test=str(rows(tmp_path / "test.jsonl", "a?")))
    assert load_math500(config).graded_by == "ours"
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r'task.grader = "math_verify" needs: pip install "operan'):
        load_math500(config.model_copy(update={"grader": "math_verify"}))


def test_a_percent_sign_answers_what_is_asked_in_percent() -> None:
    asked = Example("m/0", "What percent of 10 is 5?", "50")
    other = Example("m/1", "What is 5 times 10?", "50")
    assert verify_math(asked, r"\boxed{50\%}", False).correct
    assert not verify_math(other, r"\boxed{50\%}", False).correct
    share = Example("m/2", "As a decimal: what part of 10 is 5?", "0.5")
    assert verify_math(share, r"\boxed{50\%}", False).correct
    assert not verify_math(share, r"\boxed{0.5\%}", False).correct


def test_units() -> None:
    assert to_unit(r"\text{ square miles}/\text{hr}") == "mile^2/hour" == to_unit("mi^2 per hour")
    assert to_unit("million") is None and to_unit("sq") is None and to_unit("per") is None


def test_values() -> None:
    assert to_number("(3)/(-4)") == Fraction(-3, 4)
    assert to_number("-2(1)/(2)") == Fraction(-5, 2)
    assert to_number("(1)/(0)") is None and to_number("x") is None


def test_what_a_loop_wrote_is_wrong_and_no_error() -> None:
    example = Example("m/0", "?", r"\frac{1}{2}")
    for text in ("1" * 6000, r"\frac{1}{" * 400, "1/" * 3000, r"\boxed{" * 1000, "{" * 5000):
        assert not verify_math(example, text, True).correct


def test_boxes_in_boxes_are_read_in_one_pass() -> None:
    n = 300_000  # a second pass for every box would go on for hours
    assert last_boxed(r"\boxed{" * n) is None
    assert last_boxed(r"\boxed{" * n + "}" * n) == ""


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
def test_every_gold_solution_is_right_by_math_verify() -> None:
    pytest.importorskip("math_verify")
    config = Math500TaskConfig(kind="math500", test=str(FILE), grader="math_verify")
    task = load_math500(config)
    assert [e.id for e in task.held_out if not task.verify(e, e.solution, False).correct] == []


@needs_data
def test_no_gold_is_its_own_square_or_cube() -> None:
    golds = {
        e.answer for e in load_math500(Math500TaskConfig(kind="math500", test=str(FILE))).held_out
    }
    assert [g for g in golds if same_answer(f"{g}^2", g) or same_answer(f"{g}^3", g)] == []


@needs_data
def test_no_two_golds_that_differ_are_taken_for_the_same() -> None:
    """Of the neighbours in the file each is wrong for the other, save where they do agree."""
    task = load_math500(Math500TaskConfig(kind="math500", test=str(FILE)))
    answers = [e.answer for e in task.held_out]
    same = {(a, b) for a, b in zip(answers, answers[1:], strict=False) if same_answer(a, b)}
    assert all(normalise(a) == normalise(b) for a, b in same), same
