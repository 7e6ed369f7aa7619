"""CLRS-Text and verbal graph search: the official text, walks, paths, and what is no path."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from operando.errors import UserError
from operando.recipe.data import ClrsTaskConfig, GraphSearchTaskConfig
from operando.tasks import clrs
from operando.tasks import graph_search as gs
from operando.types import Example

OFFICIAL = (
    Path(__file__).parents[3] / "shared" / "data" / "clrs_text_dfs_val_hints_25perstream.jsonl.gz"
)


@pytest.mark.skipif(not OFFICIAL.is_file(), reason=f"needs {OFFICIAL}")
def test_every_official_text_is_written_byte_for_byte() -> None:
    with gzip.open(OFFICIAL, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 2125
    for row in rows:
        matrix = row["prompt"].split("A: [", 1)[1].split("], initial_trace")[0] + "]"
        A = [list(state) for state in clrs.read_states(matrix)]
        assert clrs.question_text(A, hints=True) == row["prompt"]
        assert clrs.answer_text(A, hints=True) == row["references"][0]


def test_a_search_worked_by_hand() -> None:
    A = [[0, 1, 0], [0, 0, 0], [1, 0, 0]]  # 0 -> 1; 2 -> 0
    assert clrs.dfs_states(A) == [
        (0, 1, 2),
        (0, 1, 2),
        (0, 0, 2),
        (0, 0, 2),
        (0, 0, 2),
        (0, 0, 2),
        (0, 0, 2),
        (0, 0, 2),
        (0, 0, 2),
    ]
    assert clrs.answer_text(A, hints=False) == "[0 0 2]\n\n"


def clrs_example(hints: bool = True) -> Example:
    task = clrs.load_clrs(ClrsTaskConfig(kind="clrs", hints=hints, num_train=3, num_held_out=3))
    return task.held_out[0]


def test_clrs_verdicts_and_shares() -> None:
    example = clrs_example()
    gold = example.solution
    assert clrs.verify(example, gold, False).correct
    assert clrs.trace_accuracy(example, gold) == clrs.node_accuracy(example, gold) == 1.0
    states = gold.partition("|")[0]
    assert clrs.verify(example, states, True).reason == "no pi"
    assert clrs.trace_accuracy(example, states) == 1.0
    assert clrs.trace_accuracy(example, "[9 9 9 9], " + states) == 0.0
    n = int(example.columns["n"])
    copied = f"{clrs.state_text(range(n))} | {clrs.state_text(range(n))}"
    assert clrs.labels(example, copied, False) == {"identity": True, "no_pi": False}
    assert clrs.node_accuracy(example, copied) == clrs.identity_accuracy(example)
    assert clrs.node_accuracy(example, "| [0]") == 0.0


def test_splits_share_no_graph_and_do_not_change() -> None:
    config = ClrsTaskConfig(kind="clrs", sizes=(4,), num_train=300, num_held_out=100)
    task = clrs.load_clrs(config)
    train, held_out = ({e.question for e in split} for split in (task.train, task.held_out))
    assert not train & held_out
    assert task.source["sha256"] == clrs.load_clrs(config).source["sha256"]


GRAPH = {"A": ("B", "C"), "B": ("D",), "C": ("E",), "D": (), "E": ()}


def test_a_walk_worked_by_hand() -> None:
    found = gs.walk(GRAPH, "A", "E")
    assert found.trace == (
        "<search> A <search> B <search> D <backtrack> B <backtrack> A <search> C <search> E"
    )
    assert found.path == ("A", "C", "E")
    assert gs.read_graph(gs.graph_text(GRAPH)) == GRAPH
    with pytest.raises(UserError, match="there is no path from B to E"):
        gs.walk(GRAPH, "B", "E")


def problem() -> Example:
    question = f"Graph: {gs.graph_text(GRAPH)} Find a path from A to E."
    return Example("x", question, "A,C,E", "", {"n": 5, "start": "A", "goal": "E"})


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("Answer: Path is [A,C,E]", "right"),
        ("Answer: Path is [A, C, E]", "right"),
        ("Answer: Path is [A,E]", "there is no edge A to E"),
        ("Answer: Path is [A,B,D]", "the path runs from A to D, not A to E"),
        ("Path is [A,C,E]", "no single 'Answer: Path is [...]'"),
        ("Answer: Path is [A,C,E] Answer: Path is [A,C,E]", "no single 'Answer: Path is [...]'"),
        ("Answer: Path is [A,Z,E]", "there is no edge A to Z"),
        ("", "no single 'Answer: Path is [...]'"),
    ],
)
def test_paths(completion: str, reason: str) -> None:
    assert gs.verify(problem(), completion, False).reason == reason


def test_only_a_depth_first_walk_to_its_own_answer_is_one() -> None:
    trace = gs.walk(GRAPH, "A", "E").trace
    good = f"{trace}\nAnswer: Path is [A,C,E]"
    assert gs.labels(problem(), good, False) == {
        "walk": True,
        "depth_first": True,
        "shortcut": False,
    }
    for bad in (
        "<search> A <search> E\nAnswer: Path is [A,E]",  # no such edge
        "<search> A <search> B <backtrack> A <search> C <search> E\nAnswer: Path is [A,C,E]",
        f"{trace}\nAnswer: Path is [A,B,D]",
        "Answer: Path is [A,C,E]",
    ):
        assert not gs.labels(problem(), bad, False)["depth_first"], bad
    assert gs.labels(problem(), "Answer: Path is [A,E]", False)["shortcut"]
    other = "<search> A <search> C <search> E\nAnswer: Path is [A,C,E]"  # any order of neighbours
    assert gs.labels(problem(), other, False) == {
        "walk": True,
        "depth_first": True,
        "shortcut": False,
    }


def test_every_generated_problem_is_solved_by_its_own_solution() -> None:
    config = GraphSearchTaskConfig(
        kind="graph_search", sizes=(3, 5, 8), num_train=200, num_held_out=50
    )
    task = gs.load_graph_search(config)
    for example in [*task.train, *task.held_out]:
        assert gs.verify(example, example.solution, False).correct
        assert gs.labels(example, example.solution, False)["depth_first"]
    assert not {e.question for e in task.train} & {e.question for e in task.held_out}


def test_reachable_nodes() -> None:
    assert gs.reachable(GRAPH, "C") == {"C", "E"}
    graph = gs.random_graph(random.Random(0), 6)
    assert all(node not in near and near for node, near in graph.items())


def test_a_least_number_of_edges_leaves_no_shortcut() -> None:
    assert gs.distance(GRAPH, "A", "E") == 2 and gs.distance(GRAPH, "A", "B") == 1
    config = GraphSearchTaskConfig(
        kind="graph_search", sizes=(3, 4), min_edges=2, num_train=40, num_held_out=20
    )
    task = gs.load_graph_search(config)
    for e in [*task.train, *task.held_out]:
        short = f"Answer: Path is [{e.columns['start']},{e.columns['goal']}]"
        assert not task.verify(e, short, False).correct
        assert task.verify(e, e.solution, False).correct
    with pytest.raises(ValueError, match="a graph of 3 nodes has no path of more than 2 edges"):
        GraphSearchTaskConfig(kind="graph_search", sizes=(3, 4), min_edges=3)
