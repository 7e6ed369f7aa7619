"""What `task check` says: chances by counting, verdicts, leaks and sentences by hand."""

from __future__ import annotations

from itertools import combinations

import pytest

from operando.evals.ask import Answer, pass_at
from operando.evals.task_check import (
    Accepted,
    Leaks,
    Sampled,
    TaskCheck,
    ask_verifier,
    border,
    find_leaks,
    gold_completion,
    learnable,
    mixed_at,
    summarise,
    task_check_lines,
)
from operando.models.load import open_model
from operando.recipe.data import ModelConfig
from operando.recipe.run import Recipe
from operando.recipe_io import check
from operando.stats.intervals import Interval
from operando.tasks.base import Task
from operando.tasks.verifiers import verifier
from operando.types import Example, Prompt, Rollout, Verdict


@pytest.mark.parametrize(("n", "c"), [(1, 0), (4, 0), (4, 1), (5, 3), (6, 6), (8, 2)])
def test_pass_and_mixed_are_the_shares_of_all_groups(n: int, c: int) -> None:
    outcomes = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        groups = list(combinations(outcomes, k))
        assert pass_at(n, c, k) == pytest.approx(sum(map(any, groups)) / len(groups))
        mixed = [any(group) and not all(group) for group in groups]
        assert mixed_at(n, c, k) == pytest.approx(sum(mixed) / len(groups))


def task(*train: tuple[str, str], held_out: tuple[str, ...] = ()) -> Task:
    return Task(
        "mine",
        [Example(f"t{i}", q, a) for i, (q, a) in enumerate(train)],
        [Example(f"h{i}", q, "x") for i, q in enumerate(held_out)],
        verifier(lambda example, completion: completion.strip() == example.answer),
    )


def test_leaks_are_told_from_repeats_and_from_those_with_another_answer() -> None:
    found = find_leaks(
        task(
            ("A?", "x"), ("a?", "x"), (" A?\n", "x"), ("B?", "1"), ("B?", "2"), ("C?", "x"),
            held_out=("A?", "D?"),
        )
    )  # fmt: skip
    assert found == Leaks(exact=2, folded=3, repeated=2, contradictory=1)


def test_the_verifier_is_asked_of_gold_empty_and_echo() -> None:
    mine = task(("A?", "x"), ("B?", "B?"), ("C?", "y"))
    gold = ask_verifier(mine, mine.train, [" x", " no", " y"], right=True)
    assert gold == Accepted(2, 3, ["t1: ' no': wrong"])
    echo = ask_verifier(mine, mine.train, [e.question for e in mine.train], right=False)
    assert echo == Accepted(1, 3, ["t1: 'B?': right"])


def recipe(**more: object) -> Recipe:
    tables = {
        "name": "own",
        "steps": 2,
        "task": {"kind": "words"},
        "rewards": {"correct": {"kind": "correct"}},
    }
    return check(Recipe, tables | more, "own")


def test_a_gold_answer_reads_as_the_recipe_writes_it_else_as_the_task_does() -> None:
    one = Example("a", "A?", "3", solution="1+2=3")
    mine = task(("A?", "x"))
    assert gold_completion(recipe(), mine, one) == " 1+2=3 #### 3"
    said = recipe(prompt={"answer_template": " is {answer}"})
    assert gold_completion(said, mine, one) == " is 3"
    chat = recipe(prompt={"format": "chat", "answer_template": " is {answer}"})
    assert gold_completion(chat, mine, one) == "is 3"


def test_a_border_inside_a_token_is_marked() -> None:
    tokenizer = open_model(ModelConfig()).tokenizer
    ids = tuple(tokenizer("A:")["input_ids"])
    whole = border(tokenizer, "a", "A:", ids, " Tom")
    assert whole.is_cut_alike and "".join(whole.prompt_end) == "A:"
    assert "".join(whole.answer_start) == " Tom"
    ids = tuple(tokenizer("A: ")["input_ids"])
    assert len(tokenizer(" Tom")["input_ids"]) == 1, "or this test shows nothing"
    assert not border(tokenizer, "a", "A: ", ids, "Tom").is_cut_alike


def answers(*right: str, cut: int = 0) -> list[Answer]:
    """One text a problem, "10" for a right sample and a wrong one; the first `cut` truncated."""
    found = []
    for p, marks in enumerate(right):
        prompt = Prompt(Example(f"p{p}", "Q?", "x"), "Q?", (1,))
        for s, mark in enumerate(marks):
            ids = (1,) * (s + 1)
            rollout = Rollout(prompt, p, s, mark, ids, (0.0,) * len(ids), len(found) < cut)
            found.append(Answer(rollout, mark, Verdict(mark == "1", "why"), {}))
    return found


def test_samples_are_summed_by_problem() -> None:
    found = summarise(answers("1000", "0000", "1111", cut=3), 4, 2)
    assert (found.problems, found.samples, found.group) == (3, 4, 2)
    assert found.pass_1.value == pytest.approx(5 / 12)
    assert found.pass_k.value == pytest.approx((0.5 + 0 + 1) / 3)
    assert found.mixed.value == pytest.approx(0.5 / 3)
    assert found.mean_length == 2.5 and found.truncated == 0.25
    assert found.shown == ["p0, right: '1'", "p0, wrong (why): '0'"]
    assert summarise(answers("1000"), 4, 64).group == 4


GOLD = Accepted(4, 4, [])


def checked(sampled: Sampled | None, gold: Accepted = GOLD) -> TaskCheck:
    nothing = Accepted(0, 4, [])
    return TaskCheck("mine", 3, 1, "Q", [], gold, nothing, nothing, Leaks(0, 0, 0, 0), sampled)


@pytest.mark.parametrize(
    ("right", "cut", "begins", "holds"),
    [
        (["0000"] * 4, 0, "nothing to learn: every sample is wrong", "prompt.few_shot"),
        (["0000"] * 4, 8, "nothing to learn: every sample is wrong", "max_completion_length"),
        (["1111"] * 4, 0, "nothing to learn: every sample is right", "harder"),
        (["0000"] * 19 + ["1000"], 0, "little to learn: 5% of groups of 4", "easier"),
        (["1111"] * 19 + ["1110"], 0, "little to learn: 5% of groups of 4", "harder"),
        (["1100"] * 4, 0, "yes: 100% of groups of 4", "learn from"),
        (["1100"] * 4, 8, "yes: 100% of groups of 4", "50% of the samples are cut"),
    ],
)
def test_the_last_sentence(right: list[str], cut: int, begins: str, holds: str) -> None:
    said = learnable(checked(summarise(answers(*right, cut=cut), 4, 4)))
    assert said.startswith(begins) and holds in said
    assert ("cut at the limit" in said) == (cut > 0)


def test_a_wrong_gold_answer_comes_before_all_else() -> None:
    some = Interval(0.5, 0.4, 0.6)
    sampled = Sampled(4, 4, 4, some, some, some, 3.0, 0.0, [])
    found = checked(sampled, Accepted(3, 4, ["t1: ' no': wrong"]))
    assert not found.passed
    lines = task_check_lines(found)
    assert lines[-1].startswith("not yet: the verifier calls 1 of 4 gold answers wrong")
    assert "  t1: ' no': wrong" in lines and "  pass@1 50.0% (40.0% to 60.0%)" in lines
    assert checked(None).passed
    assert learnable(checked(None)).startswith("the verifier agrees")
