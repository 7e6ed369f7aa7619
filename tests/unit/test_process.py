"""Equations in exact fractions; process rewards, and the farms that recursive_lm's pays for."""

from __future__ import annotations

import gzip
import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from operando.recipe.data import WordsTaskConfig
from operando.recipe.rewards import ProcessReward
from operando.rewards.equations import equations
from operando.rewards.process import (
    RECURSIVE_LM_EQUATION,
    grounded,
    milestones,
    process,
    reached,
    recursive_lm_process,
)
from operando.tasks.words import load_words
from operando.types import Example, Prompt, Rollout

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_train.jsonl.gz"


def verdicts(text: str) -> list[str]:
    return [equation.verdict for equation in equations(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 3 = 5", ["right"]),
        ("2 + 3 = 6", ["wrong"]),
        ("2 + 8 + 5 + 9 = 24", ["right"]),  # recursive_lm's reads 5 + 9 = 24
        ("50/100 * 20 = 10", ["right"]),
        ("2 + 3 * 4 = 14", ["right"]),
        ("(2 + 3) * 4 = 20", ["right"]),
        ("2 * (3 + 4) = 14 = 7 + 7", ["right", "right"]),
        (".5*2=1", ["right"]),
        ("1/5 = 3/15", ["right"]),
        ("$1,200 + $50 = $1,250", ["right"]),
        ("12 apples + 6 apples = 18 apples", ["right"]),
        ("3 × 4 = 12, 12 ÷ 4 = 3", ["right", "right"]),
        ("3 x 4 = 12", ["right"]),
        ("-3 + 5 = 2", ["right"]),
        ("10 / 3 = 3.33", ["right"]),
        ("10 / 3 = 3.3", ["right"]),
        ("10 / 3 = 3", ["wrong"]),  # an integer must be exact
        ("10 / 3 = 3.4", ["wrong"]),
        ("20% * 50 = 10", ["right"]),
        ("30/100 = 30%", ["right"]),
        ("100% - 30% = 70", ["right"]),
        ("5 + 3x = 26", ["unreadable"]),  # algebra: neutral
        ("3 / 0 = 5", ["unreadable"]),
        ("5 = 5", []),  # no operation
        ("7 - 5 = 2 - so she has 2", ["right"]),
        ("123456789012345678 + 1 = 123456789012345679", []),  # too long to be read
        ("2 ** 3 = 8", ["unreadable"]),
    ],
)
def test_equations(text: str, expected: list[str]) -> None:
    assert verdicts(text) == expected


def test_no_input_is_run_or_overflows() -> None:
    assert equations("__import__('os').system('x') = 1") == []
    assert verdicts("9" * 15 + " * " + "9" * 15 + " = 1") == ["wrong"]
    assert verdicts("(" * 500 + "1" + ")" * 500 + " + 1 = 2") == ["unreadable"]


QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
)
SOLUTION = "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether."
GOLD = {Fraction(24), Fraction(72)}
FARMS = {
    "trivial": "1+1=2\n1+1=2\n1+1=2\n#### 5",
    "distinct trivia": "1+1=2\n2+1=3\n3+1=4\n#### 5",
    "identity": "48*1=48\n48+0=48\n48/1=48\n#### 48",
    "irrelevant chain": "48+48=96\n96+48=144\n144+48=192\n#### 5",
    "self-consistent chain": "48+48=96\n96+48=144\n144+48=192\n#### 192",
    "two wrongs and a farm": "1+1=3\n1+1=2\n2+2=4\n3+3=6\n#### 5",
}


def test_the_published_scheme_pays_every_farm_and_milestones_none() -> None:
    assert milestones(SOLUTION) == GOLD
    for name, farm in FARMS.items():
        assert recursive_lm_process(farm, "72") > 0.5, name
        assert reached(farm, GOLD).credited == 0, name
    assert reached(SOLUTION, GOLD) == (2, 0, 2)
    assert reached("48 + 24 = 72\n24 + 48 = 72\n72 - 48 = 24", GOLD).credited == 2  # both are real


def test_grounding_follows_the_answer_back_to_the_question() -> None:
    assert grounded(QUESTION, SOLUTION + "\n#### 72") == (2, 0, 2)
    for name in ("trivial", "distinct trivia", "identity", "irrelevant chain"):
        assert grounded(QUESTION, FARMS[name]).credited == 0, name
    # named in the docs: without gold steps a chain that ends in its own answer looks sound
    assert grounded(QUESTION, FARMS["self-consistent chain"]).credited == 3


def paid(scheme: str, completion: str, gold: str = "72") -> float:
    task = load_words(WordsTaskConfig(kind="words", num_train=1, num_held_out=1))
    reward = process(ProcessReward(kind="process", scheme=scheme), task)  # pyright: ignore[reportArgumentType]
    example = Example("e", QUESTION, gold, SOLUTION)
    return reward([Rollout(Prompt(example, "q", (1,)), 0, 0, completion, (1,), (0.0,), False)])[0]


def test_values_worked_by_hand() -> None:
    assert paid("milestone", " 48/2=24; 48+24=72 #### 72") == pytest.approx(1.5)
    assert paid("milestone", " 48/2=24 #### 72") == pytest.approx(1.25)
    assert paid("milestone", " 48/2=24; 1+1=3 #### 70") == pytest.approx(0.25 - 0.15)
    assert paid("milestone", " 1+1=3; 1+1=4; 1+1=5; 1+1=6 #### 70") == pytest.approx(-0.45)
    assert paid("milestone", " 48/2=24; 48+24=72 #### 70 #### 72") == pytest.approx(
        0.5
    )  # two marks
    assert paid("recursive_lm", " #### 70 #### 72") == 1.0  # recursive_lm's check takes any
    assert paid("recursive_lm", " 1+1=2; 2+2=4; 3+3=6; 4+4=8 #### 1") == 0.75


def test_no_farm_beats_an_honest_wrong_answer_by_milestones() -> None:
    honest = paid("milestone", " 48/2=24; 48+24=72 #### 70")
    for farm in FARMS.values():
        assert paid("milestone", farm) < honest


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"needs {GSM8K}")
def test_gold_solutions_are_almost_never_called_wrong() -> None:
    with gzip.open(GSM8K, "rt") as lines:
        answers = [json.loads(line)["answer"] for line in lines]
    right = wrong = published_right = published_wrong = recovered = possible = 0
    for answer in answers:
        plain = re.sub(r"<<.*?>>", "", answer).split("####")[0]
        found = verdicts(plain)
        right, wrong = right + found.count("right"), wrong + found.count("wrong")
        values = re.findall(r"<<.*?=([^=<>]*)>>", answer)
        gold = {Fraction(value.replace(",", "")) for value in values}
        recovered, possible = recovered + reached(plain, gold).credited, possible + len(gold)
        for a, op, b, shown in RECURSIVE_LM_EQUATION.findall(plain):
            given = Fraction(a), Fraction(b), Fraction(shown)
            value = {"+": given[0] + given[1], "-": given[0] - given[1], "*": given[0] * given[1]}
            value["/"] = given[0] / given[1] if given[1] else Fraction(-1)
            published_right += abs(value[op] - given[2]) < Fraction(1, 10**6)
            published_wrong += abs(value[op] - given[2]) >= Fraction(1, 10**6)
    assert wrong / (right + wrong) < 0.01 and right > 22_000
    assert published_wrong / (published_right + published_wrong) > 0.14
    assert recovered / possible > 0.89


def test_trying_every_sum_reaches_no_milestone() -> None:
    gold = {Fraction(27), Fraction(13)}
    few = "; ".join(f"{n}+1={n + 1}" for n in range(20, 28))  # 21 ... 28: eight values
    assert reached(few, gold).credited == 1
    assert reached(few + "; 28+1=29", gold).credited == 0, "nine values for two gold ones"
    assert reached(few + "; 1+20=21", gold).credited == 1, "a value again is no further one"
