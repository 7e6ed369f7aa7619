"""Models side by side: planted answers have the shares they must, limits hold the gold answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from operando.cli import app
from operando.errors import UserError
from operando.evals import compare as sbs
from operando.evals.benchmarks import OutsideConfig
from operando.models.load import STARTER, load_model
from operando.recipe import ModelConfig
from operando.rollout.greedy_eval import Graded
from operando.tasks import clrs
from operando.types import Prompt, Rollout

CONFIG = OutsideConfig(("clrs", "graph_search", "words"), num=30)


def question(name: str) -> sbs.Question:
    return sbs._question(name, CONFIG, None, (4, 5) if name != "words" else ())


def planted(asked: sbs.Question, texts: list[str]) -> sbs.Answers:
    judged = []
    for example, text in zip(asked.examples, texts, strict=True):
        rollout = Rollout(Prompt(example, "", (0,), (), ""), 0, 0, text, (1,), (0.0,), False)
        judged.append(Graded(rollout, asked.task.verify(example, text, False)))
    return sbs.Answers(judged, 99)


def gold(asked: sbs.Question) -> list[str]:
    return [
        asked.worked.replace("{solution}", e.solution).replace("{answer}", e.answer)
        for e in asked.examples
    ]


@pytest.mark.parametrize("name", ["clrs", "graph_search", "words"])
def test_gold_answers_are_right_on_every_size(name: str) -> None:
    asked = question(name)
    row = sbs._row(asked, "gold", planted(asked, gold(asked)), None)
    assert row.all.right.value == 1.0 and row.against is None and row.limit == 99
    assert sum(s.n for s in row.by_size.values()) == (0 if name == "words" else 30)
    if name == "clrs":
        assert row.all.node == row.all.trace == 1.0 and row.all.copied < 1.0


def test_a_model_that_copies_has_exactly_the_identity_baseline() -> None:
    asked = question("clrs")
    copies = [
        f"{clrs.state_text(range(n))} | {clrs.state_text(range(n))}"
        for n in (int(e.columns["n"]) for e in asked.examples)
    ]
    first = planted(asked, gold(asked))
    row = sbs._row(asked, "copies", planted(asked, copies), first)
    assert row.all.copied == 1.0 and row.all.node == row.all.identity
    assert 0 < row.all.trace < 1, "the first state of the trace is the identity"
    by_hand = [
        sum(i == p for i, p in enumerate(clrs.read_states(e.answer)[0])) / int(e.columns["n"])
        for e in asked.examples
    ]
    assert row.all.identity == pytest.approx(sum(by_hand) / 30)
    assert row.against is not None
    identical = sum(one == 1 for one in by_hand)
    assert row.against.lost == 30 - identical and row.against.gained == 0
    assert row.against.difference.value == pytest.approx(identical / 30 - 1)


def test_the_limit_holds_the_gold_answers_or_is_an_error() -> None:
    tokenizer = load_model(ModelConfig()).tokenizer
    asked = question("clrs")
    longest = max(sbs.gold_lengths(asked, tokenizer))
    assert longest == 1 + max(len(tokenizer(text)["input_ids"]) for text in gold(asked))
    assert sbs.token_limit(asked, tokenizer, None) == longest + longest // 4
    with pytest.raises(UserError, match="128 would cut .* gold answers of clrs; the longest has"):
        sbs.token_limit(asked, tokenizer, 128)


def test_two_model_folders_are_asked_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(STARTER, tmp_path / name)
    options = ["--tasks", "words,graph_search", "--num", "4", "--sizes", "4"]
    also = ["--also", str(tmp_path / "b")]
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "a"), *options, *also])
    assert result.exit_code == 0, result.output
    table = pq.read_table(result.stdout.splitlines()[-1]).to_pydict()
    assert len(table["model"]) == 16 and set(table["model"]) == {"a", "b"}
    assert table["prompt"][:8] == table["prompt"][8:]
    assert table["completion"][:8] == table["completion"][8:], "the same model, greedily"
    assert "+0.0%" in result.stderr and "graph_search" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "clsr"], "--tasks clsr: no such task; .* Did you mean 'clrs'"),
        ([], "a model folder has no task of its own"),
        (["--tasks", "clrs", "--sizes", "1,x"], "--sizes 1,x: expected numbers"),
        (["--tasks", "clrs", "--also", "nowhere"], "nowhere: neither a run folder"),
        (["--tasks", "clrs", "--temperature", "1"], "answer greedily, in raw format"),
        (["--tasks", "clrs", "--step", "3"], "it has no steps"),
        (["--tasks", "clrs", "--also", str(STARTER)], "two models are called alike"),
        (["--tasks", "clrs", "--sizes", "16", "--num", "2"], "Ask smaller graphs: --sizes"),
    ],
)
def test_mistakes_are_one_clear_error(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["eval", str(STARTER), *options])
    assert isinstance(result.exception, UserError), result.output
    with pytest.raises(UserError, match=message):
        raise result.exception
