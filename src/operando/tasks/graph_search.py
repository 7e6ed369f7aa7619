"""Verbal graph search: a depth-first walk with <search> and <backtrack>, and the path it finds.

    Graph: A-[B,C], B-[D], C-[E], D-[], E-[] Find a path from A to E.
    <search> A <search> B <search> D <backtrack> B <backtrack> A <search> C <search> E
    Answer: Path is [A,C,E]

Right is a path along edges from start to goal, without a node twice, after one "Answer:". Whether
the trace before it is a depth-first walk that ends with that path is a label, not the verdict.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from operando.errors import UserError
from operando.recipe.data import GraphSearchTaskConfig
from operando.tasks.base import Task, TaskText
from operando.types import Example, Verdict

TEXT = TaskText(answer=" {solution}")
NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOVE = re.compile(r"<(search|backtrack)>\s*([A-Z])")
PATH = re.compile(r"Path is \[([A-Z](?:,\s*[A-Z])*)\]")
EDGES = re.compile(r"([A-Z])-\[([A-Z,]*)\]")

Graph = Mapping[str, tuple[str, ...]]


class Walk(NamedTuple):
    """A depth-first walk as text, and the path on its stack at the goal."""

    trace: str
    path: tuple[str, ...]


def walk(graph: Graph, start: str, goal: str) -> Walk:
    """Return the walk that takes neighbours in their order; no path is a UserError."""
    moves, stack, seen = [f"<search> {start}"], [start], {start}
    while stack and stack[-1] != goal:
        child = next((node for node in graph[stack[-1]] if node not in seen), None)
        if child is not None:
            stack.append(child)
            seen.add(child)
            moves.append(f"<search> {child}")
        else:
            stack.pop()
            if stack:
                moves.append(f"<backtrack> {stack[-1]}")
    if not stack:
        raise UserError(f"graph {graph_text(graph)}: there is no path from {start} to {goal}")
    return Walk(" ".join(moves), tuple(stack))


def graph_text(graph: Graph) -> str:
    """Return a graph as prompts write it."""
    return ", ".join(f"{node}-[{','.join(near)}]" for node, near in graph.items())


def read_graph(text: str) -> dict[str, tuple[str, ...]]:
    """Return the graph of a prompt."""
    return {node: tuple(filter(None, near.split(","))) for node, near in EDGES.findall(text)}


def random_graph(rng: random.Random, num: int) -> dict[str, tuple[str, ...]]:
    """Return a directed graph of `num` nodes with one to three edges a node."""
    nodes = list(NAMES[:num])
    return {
        node: tuple(rng.sample([n for n in nodes if n != node], rng.randint(1, min(3, num - 1))))
        for node in nodes
    }


def path_of(completion: str) -> tuple[str, ...] | None:
    """Return the path after the only "Answer:"; None where there is not exactly one."""
    before, mark, after = completion.partition("Answer:")
    del before
    found = PATH.search(after)
    if not mark or "Answer:" in after or found is None:
        return None
    return tuple(name.strip() for name in found[1].split(","))


def verify(example: Example, completion: str, is_truncated: bool) -> Verdict:
    """Return right for a path along edges from start to goal that visits no node twice."""
    if is_truncated:
        return Verdict(False, "not finished within the token limit")
    path = path_of(completion)
    if path is None:
        return Verdict(False, "no single 'Answer: Path is [...]'")
    graph = read_graph(example.question)
    ends = str(example.columns["start"]), str(example.columns["goal"])
    if (path[0], path[-1]) != ends:
        return Verdict(
            False, f"the path runs from {path[0]} to {path[-1]}, not {' to '.join(ends)}"
        )
    if len(set(path)) < len(path):
        return Verdict(False, "a node occurs twice")
    for a, b in zip(path, path[1:], strict=False):
        if b not in graph.get(a, ()):
            return Verdict(False, f"there is no edge {a} to {b}")
    return Verdict(True, "right")


def is_depth_first(graph: Graph, start: str, completion: str) -> bool:
    """Return whether the trace is a depth-first walk that ends with the answered path.

    Neighbours may be taken in any order; a step back is due only where all have been seen."""
    moves = MOVE.findall(completion.partition("Answer:")[0])
    if not moves or moves[0] != ("search", start):
        return False
    stack, seen = [start], {start}
    for kind, node in moves[1:]:
        if kind == "search":
            if node in seen or node not in graph.get(stack[-1], ()):
                return False
            stack.append(node)
            seen.add(node)
        else:
            if any(near not in seen for near in graph[stack[-1]]) or len(stack) < 2:
                return False
            stack.pop()
            if stack[-1] != node:
                return False
    return tuple(stack) == path_of(completion)


def labels(example: Example, completion: str, is_truncated: bool) -> Mapping[str, bool]:
    """Return whether there is a walk, whether it is depth-first and ends in the answer, and whether
    the answer is start and goal alone: right where an edge joins them, found without a search."""
    del is_truncated
    graph, start = read_graph(example.question), str(example.columns["start"])
    return {
        "walk": bool(MOVE.search(completion)),
        "depth_first": is_depth_first(graph, start, completion),
        "shortcut": path_of(completion) == (start, str(example.columns["goal"])),
    }


def make_problem(rng: random.Random, num: int, min_edges: int = 1) -> Example:
    """Return a search problem whose shortest path has at least `min_edges` edges."""
    while True:
        graph = random_graph(rng, num)
        start, goal = rng.sample(list(graph), 2)
        if goal in reachable(graph, start) and distance(graph, start, goal) >= min_edges:
            trace, path = walk(graph, start, goal)
            return Example(
                id="",
                question=f"Graph: {graph_text(graph)} Find a path from {start} to {goal}.",
                answer=",".join(path),
                solution=f"{trace}\nAnswer: Path is [{','.join(path)}]",
                columns={"n": num, "start": start, "goal": goal},
            )


def distance(graph: Graph, start: str, goal: str) -> int:
    """Return the edges of a shortest path; there must be one."""
    edges, near = 0, {start}
    while goal not in near:
        edges, near = edges + 1, near | {node for one in near for node in graph[one]}
    return edges


def reachable(graph: Graph, start: str) -> set[str]:
    """Return the nodes that can be reached."""
    found, edge = {start}, [start]
    while edge:
        new = [node for node in graph[edge.pop()] if node not in found]
        found.update(new)
        edge += new
    return found


def stream(
    sizes: Sequence[int], split: str, rng: random.Random, min_edges: int = 1
) -> Iterator[Example]:
    """Give problems of one split without end; a problem is in one split only, by its hash."""
    number = 0
    while True:
        made = make_problem(rng, rng.choice(sizes), min_edges)
        is_held_out = hashlib.sha256(made.question.encode()).digest()[0] % 5 == 0
        if is_held_out == (split == "held_out"):
            name = f"graph_search/{split}/{number}"
            yield Example(name, made.question, made.answer, made.solution, made.columns)
            number += 1


def make_split(config: GraphSearchTaskConfig, split: str, num: int) -> list[Example]:
    """Return `num` problems of one split, the same for the same seed."""
    rng = random.Random(f"{config.seed}/graph_search/{split}")
    return list(islice(stream(config.sizes, split, rng, config.min_edges), num))


def load_graph_search(config: GraphSearchTaskConfig) -> Task:
    """Return the verbal graph-search task."""
    train = make_split(config, "train", config.num_train)
    held_out = make_split(config, "held_out", config.num_held_out)
    digest = hashlib.sha256("\n".join(e.question for e in train + held_out).encode()).hexdigest()
    return Task(
        name="graph_search",
        train=train,
        held_out=held_out,
        verify=verify,
        labels=labels,
        text=TEXT,
        source={"kind": "graph_search", "rows": len(train) + len(held_out), "sha256": digest},
    )
