"""Loops and next questions, worked by hand."""

from __future__ import annotations

import pytest

from operando.tasks.loops import cut_at_next_question, find_loop, loop_tokens


def test_tokens_are_words_and_runs_of_one_mark() -> None:
    assert loop_tokens("Wait, wait... it's 1,200!") == [
        "wait",
        ",",
        "wait",
        "...",
        "it's",
        "1",
        ",",
        "200",
        "!",
    ]


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("so " * 8, True),
        ("so " * 7, False),  # a single word needs a run of 8 tokens
        ("tick tock " * 5, True),  # 5 repeats, 10 tokens
        ("tick tock " * 4, False),
        ("So SO so sO so So so so", True),  # case does not matter
        ("</" * 12, True),
        ("also so also so also so also so", False),  # four pairs
        ("one two three four five six seven eight " * 5, True),  # n = 8
        ("one two three four five six seven eight nine " * 5, True),  # its first 5 cover 5/9
        ("a b c d e f g h i j k l m n o p " * 9, False),  # 8 of 16 are not more than half
        ("a" * 30, True),
        ("a" * 29, False),
        ("-" * 60, False),  # a rule
        ("3+2=5; 5+4=9 #### 9", False),
        ("The sum of 2 and 3 is 5, and 5 and 4 is 9, so it is 9.", False),
        ("", False),
    ],
)
def test_loops_by_hand(text: str, loops: bool) -> None:
    assert (find_loop(text) is not None) is loops


def test_a_run_is_found_anywhere_with_its_ngram_and_count() -> None:
    found = find_loop("First of all: " + "go on " * 6 + "and the answer is 9")
    assert found is not None
    # tokens: first of all : + 12 + and the answer is 9 = 21
    assert (found.ngram, found.repeats) == (("go", "on"), 6)
    assert found.share == pytest.approx(12 / 21)


def test_an_ngram_that_covers_more_than_half_loops_without_being_in_a_row() -> None:
    # 5 times "let me check" between different words: 15 of 20 tokens.
    text = " ".join(f"let me check {word}" for word in ("a", "b", "c", "d", "e"))
    found = find_loop(text)
    assert found is not None and found.repeats == 5
    # 5 times among 31 tokens, 15 of them: not more than half.
    long = text + " this is where something else is said at some length"
    assert len(loop_tokens(long)) == 30 and find_loop(long) is None


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        (" It is 5.\n\nQ: Tom has 3 pens.", " It is 5.\n"),
        (" It is 5.\nQuestion: next", " It is 5."),
        (" It is 5.\n**Question 2**: next", " It is 5."),
        (" It is 5.\n## Question 3: next", " It is 5."),
        ("\nQ: Tom has 3 pens. How many?\nA: 3\nQ: more", "\nQ: Tom has 3 pens. How many?\nA: 3"),
        (" FAQ: none. The Q: is hard.\nQuestions: two", None),
    ],
)
def test_a_completion_ends_at_the_next_question(completion: str, kept: str | None) -> None:
    assert cut_at_next_question(completion) == (completion if kept is None else kept)
