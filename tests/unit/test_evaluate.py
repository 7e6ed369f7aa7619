"""Evaluation: planted answers have the shares they must, limits hold the gold answers."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from operando.cli import app
from operando.errors import UserError
from operando.evals import ask as ask_module
from operando.evals.ask import (
    Answer,
    Checkpoint,
    Question,
    ask,
    compare,
    completion_length,
    gold_answers,
    grade_answers,
    open_each,
)
from operando.evals.evaluate import Row, _ask_all, _row, evaluate
from operando.evals.questions import ASKABLE, EvalConfig, make_questions
from operando.models.load import STARTER, load_model
from operando.recipe.data import ModelConfig
from operando.run import SeedTree
from operando.tasks import clrs, graph_search, gsm8k, math500, mmlu, words
from operando.tasks.base import TaskText
from operando.types import Prompt, Rollout

CONFIG = EvalConfig(num=30)
TEXTS = {
    m.__name__.rpartition(".")[2]: m.TEXT for m in (clrs, gsm8k, graph_search, math500, mmlu, words)
}


def question(name: str) -> Question:
    sizes = (4, 5) if name != "words" else ()
    (asked,) = make_questions(replace(CONFIG, tasks=(name,), sizes=sizes), None)
    return asked


def planted(asked: Question, texts: list[str]) -> list[Answer]:
    rollouts = [
        Rollout(Prompt(example, "", (0,), (), ""), 0, 0, text, (1,), (0.0,), False)
        for example, text in zip(asked.examples, texts, strict=True)
    ]
    return grade_answers(asked.task, rollouts, is_cut=asked.is_cut)


def row(asked: Question, first: list[Answer], second: list[Answer]) -> Row:
    answers = {(asked.name, "first"): first, (asked.name, "second"): second}
    return _row(asked, "second", answers, "first", 0)


@pytest.mark.parametrize("name", ["clrs", "graph_search", "words"])
def test_gold_answers_are_right_on_every_size(name: str) -> None:
    asked = question(name)
    gold = planted(asked, gold_answers(asked))
    found = _row(asked, "first", {(name, "first"): gold}, "first", 0)
    assert found.all.right.value == 1.0 and found.change is None
    assert sum(s.n for s in found.by_size.values()) == (0 if name == "words" else 30)
    if name == "clrs":
        measures = found.all.measures
        assert measures["nodes right"] == measures["trace right"] == 1.0
        assert found.all.labels["identity"][0] < 1.0


def test_a_model_that_copies_has_exactly_the_identity_baseline() -> None:
    asked = question("clrs")
    copies = [
        f"{clrs.state_text(range(n))} | {clrs.state_text(range(n))}"
        for n in (int(e.columns["n"]) for e in asked.examples)
    ]
    found = row(asked, planted(asked, gold_answers(asked)), planted(asked, copies))
    measures = found.all.measures
    assert found.all.labels["identity"][0] == 1.0
    assert measures["nodes right"] == measures["if copied"]
    assert 0 < measures["trace right"] < 1, "the first state of the trace is the identity"
    by_hand = [
        sum(i == p for i, p in enumerate(clrs.read_states(e.answer)[0])) / int(e.columns["n"])
        for e in asked.examples
    ]
    assert measures["if copied"] == pytest.approx(sum(by_hand) / 30)
    assert found.change is not None
    identical = sum(one == 1 for one in by_hand)
    assert found.change.lost == 30 - identical and found.change.gained == 0
    assert found.change.difference.value == pytest.approx(identical / 30 - 1)


def test_only_answers_to_the_same_problems_are_compared() -> None:
    asked = question("words")
    gold = planted(asked, gold_answers(asked))
    with pytest.raises(ValueError, match="not asked the same problems"):
        compare(gold, gold[1:])
    wrong = planted(asked, ["#### 999999"] * 30)
    assert compare(wrong, gold).difference.value == 1.0
    cut = planted(asked, [f"{text}\nQ: one more?\nA: #### 7" for text in gold_answers(asked)])
    assert all(one.verdict.correct and "\nQ:" not in one.text for one in cut)


def test_the_limit_holds_the_gold_answers_or_is_an_error() -> None:
    (opened,) = open_each([Checkpoint("starter", ModelConfig())])
    asked, tokenizer = question("clrs"), opened.tokenizer
    longest = 1 + max(len(tokenizer(text)["input_ids"]) for text in gold_answers(asked))
    roomy = replace(opened, context=10_000)
    assert completion_length(roomy, asked) == longest + longest // 4
    with pytest.raises(UserError, match="128 would cut .* gold answers of clrs; the longest has"):
        completion_length(roomy, replace(asked, max_completion_length=128))


@pytest.mark.parametrize("samples", [1, 3])
def test_asking_in_parts_changes_no_answer_and_tells_how_far_it_is(samples: int) -> None:
    asked = question("words")
    if samples > 1:
        asked = replace(asked, samples=samples, seeds=SeedTree(4))
    told: list[tuple[int, int]] = []
    day = datetime(2026, 1, 1, tzinfo=UTC)
    (opened,) = open_each([Checkpoint("starter", ModelConfig(), max_batch=8)])
    some = ask(opened, asked, day, lambda done, of: told.append((done, of)))
    whole = ask(replace(opened, max_batch=len(asked.examples) * samples), asked, day)
    assert [a.text for a in some] == [a.text for a in whole]
    step = 8 // samples
    assert told == [(at, len(asked.examples)) for at in range(0, len(asked.examples), step)]


@pytest.mark.parametrize("kind", ASKABLE)
def test_every_task_has_a_text_of_its_own_question_and_answer(kind: str) -> None:
    """A new kind is asked by name with no other place to enter it."""
    text = TaskText() if kind not in TEXTS else TEXTS[kind]
    assert "{question}" in text.raw and "{question}" in text.chat and "{" in text.answer


def test_a_problem_too_long_for_one_model_is_left_out_of_all(tmp_path: Path) -> None:
    """The second model has room for the short prompts alone."""
    for name in ("a", "b"):
        shutil.copytree(STARTER, tmp_path / name)
    config = json.loads((STARTER / "config.json").read_text())
    tokenizer = load_model(ModelConfig()).tokenizer
    (asked,) = make_questions(EvalConfig(("words",), num=40), None)
    lengths = [len(tokenizer(asked.prompt.ask(e.question))["input_ids"]) for e in asked.examples]
    room = sorted(lengths)[20]
    config["max_position_embeddings"] = room + 30
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    options = EvalConfig(("words",), num=40, max_completion_length=30)
    result = evaluate(tmp_path / "a", options, also=[tmp_path / "b"])
    kept = sum(n <= room for n in lengths)
    assert 0 < kept < 40
    assert [(r.n, r.left_out) for r in result.rows] == [(kept, 40 - kept)] * 2
    assert result.rows[1].change is not None and result.rows[1].change.difference.value == 0


def test_a_model_is_let_go_before_the_next_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[object]] = []
    seen: list[int] = []
    real = ask_module.load_model

    def load(config: ModelConfig) -> object:
        gc.collect()
        seen.append(sum(one() is not None for one in alive))
        loaded = real(config)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(ask_module, "load_model", load)
    models = [Checkpoint("a", ModelConfig()), Checkpoint("b", ModelConfig(id="deep"))]
    two = replace(question("words"), examples=question("words").examples[:2])
    answers, dtypes = _ask_all(models, [two], STARTER, lambda _stage, _done, _of: None)
    assert dtypes == {"a": "float32", "b": "float32"}
    assert len(answers) == 2 and seen == [0, 0]


def test_a_problem_has_its_own_stream_whatever_is_left_out() -> None:
    """One model leaves the first problem out; the others are drawn from the same numbers."""
    (opened,) = open_each([Checkpoint("starter", ModelConfig())])
    asked = question("words")
    asked = replace(
        asked, examples=asked.examples[:4], seeds=SeedTree(3), samples=2, max_completion_length=40
    )
    long = replace(asked.examples[0], question="well, " * 200 + asked.examples[0].question)
    longer = replace(asked, examples=[long, *asked.examples[1:]])
    day = datetime.now(UTC)
    every = ask(opened, asked, day)
    some = ask(replace(opened, context=200), longer, day)
    assert len(some) == 6
    assert [a.rollout.completion for a in some] == [a.rollout.completion for a in every[2:]]


def test_two_model_folders_are_asked_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(STARTER, tmp_path / name)
    options = ["--tasks", "words,graph_search", "--num", "4", "--sizes", "4"]
    also = ["--also", str(tmp_path / "b")]
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "a"), *options, *also])
    assert result.exit_code == 0, result.output
    table = pq.read_table(result.stdout.splitlines()[-1]).to_pydict()
    assert len(table["model"]) == 16 and set(table["model"]) == {"a", "b"}
    rows = list(zip(table["task"], table["prompt"], table["completion"], strict=True))
    by_model = [[r for r, m in zip(rows, table["model"], strict=True) if m == x] for x in "ab"]
    assert by_model[0] == by_model[1] and len(by_model[0]) == 8, "the same model, greedily"
    assert "+0.0%" in result.stderr and "graph_search" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "clsr"], "--tasks clsr: no such task; .* Did you mean 'clrs'"),
        ([], "a model folder has no task of its own"),
        (["--tasks", "clrs", "--sizes", "1,x"], "--sizes 1,x: expected numbers"),
        (["--tasks", "clrs", "--also", "nowhere"], "nowhere: neither a run folder"),
        (["--tasks", "clrs", "--step", "3"], "it has no steps"),
        (["--tasks", "clrs", "--also", str(STARTER)], "two models have the same name"),
        (["--tasks", "clrs", "--sizes", "16", "--num", "2"], "ask smaller problems .--sizes."),
    ],
)
def test_mistakes_are_one_clear_error(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["eval", str(STARTER), *options])
    assert isinstance(result.exception, UserError), result.output
    with pytest.raises(UserError, match=message):
        raise result.exception
