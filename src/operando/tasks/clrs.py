"""CLRS-Text: depth-first search on an adjacency matrix, byte for byte the official text.

    dfs:
    A: [[0 1], [1 0]], initial_trace: [0 1]
    trace | pi:
    [0 1], [0 0], ... | [0 0]

A state is every node's predecessor (pi); one is written at each root, discovery, tree edge
and finish (CLRS 22.3; roots and neighbours in index order). Answers with hints hold the states
between the first and the last, then pi.

"Right" is an exact pi. `labels` adds whether it is the identity (the initial state: what a model
that copies would write), and what share is right is measured by `node_accuracy` and
`trace_accuracy`.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from operando.recipe.data import ClrsTaskConfig
from operando.tasks.base import Task, TaskText
from operando.types import Example, Verdict

State = tuple[int, ...]
STATE = re.compile(r"\[([\d ]*)\]")


def dfs_states(A: Sequence[Sequence[int]]) -> list[State]:
    """Return every state of a depth-first search of a directed graph; the last one is pi."""
    num = len(A)
    pi = list(range(num))
    seen = [False] * num
    states: list[State] = []
    for root in range(num):
        if seen[root]:
            continue
        states.append(tuple(pi))
        stack = [(root, True)]
        seen[root] = True
        while stack:
            node, is_new = stack.pop()
            if is_new:
                states.append(tuple(pi))
            child = next((v for v in range(num) if A[node][v] and not seen[v]), None)
            if child is None:
                states.append(tuple(pi))
            else:
                pi[child], seen[child] = node, True
                states.append(tuple(pi))
                stack += [(node, False), (child, True)]
    return states


def state_text(state: Sequence[int]) -> str:
    """Return a state as CLRS-Text writes it. Example: state_text((0, 0, 1)) == "[0 0 1]" """
    return "[" + " ".join(map(str, state)) + "]"


def question_text(A: Sequence[Sequence[int]], hints: bool) -> str:
    """Return the prompt of a graph."""
    matrix = "A: [" + ", ".join(state_text(row) for row in A) + "]"
    if not hints:
        return f"dfs:\n{matrix}\npi:\n"
    return f"dfs:\n{matrix}, initial_trace: {state_text(range(len(A)))}\ntrace | pi:\n"


def answer_text(A: Sequence[Sequence[int]], hints: bool) -> str:
    """Return the official answer to a prompt."""
    states = dfs_states(A)
    if not hints:
        return f"{state_text(states[-1])}\n\n"
    return ", ".join(map(state_text, states[1:-1])) + f" | {state_text(states[-1])}\n\n"


def random_graph(rng: random.Random, num: int) -> list[list[int]]:
    """Return a directed graph; every edge, self-loops too, is there with probability 1/2."""
    return [[int(rng.random() < 0.5) for _ in range(num)] for _ in range(num)]


def read_states(text: str) -> list[State]:
    """Return every state written in a text."""
    return [tuple(map(int, found.split())) for found in STATE.findall(text)]


def answered(completion: str, hints: bool) -> State | None:
    """Return the pi that a completion gives, after the bar where hints are asked for."""
    _, bar, after = completion.partition("|")
    if hints and not bar:
        return None
    states = read_states((after if hints else completion).split("\n\n")[0])
    return states[0] if states else None


def verify(example: Example, completion: str, is_truncated: bool) -> Verdict:
    """Return right for exactly the gold pi."""
    del is_truncated  # what is there decides; a cut answer lacks its pi
    found = answered(completion, bool(example.columns["hints"]))
    if found is None:
        return Verdict(False, "no pi")
    if state_text(found) != example.answer:
        return Verdict(False, f"pi is {state_text(found)}, gold is {example.answer}")
    return Verdict(True, "right")


TEXT = TaskText(raw="{question}", answer="{solution}", ends_at_question=False)


def labels(example: Example, completion: str, is_truncated: bool) -> Mapping[str, bool]:
    """Return whether the pi given is the identity, and whether there is none."""
    del is_truncated
    found = answered(completion, bool(example.columns["hints"]))
    return {
        "identity": found == tuple(range(int(str(example.columns["n"])))),
        "no_pi": found is None,
    }


def node_accuracy(example: Example, completion: str) -> float:
    """Return the share of nodes whose predecessor is right; a pi of another length has none."""
    found = answered(completion, bool(example.columns["hints"]))
    gold = read_states(example.answer)[0]
    if found is None or len(found) != len(gold):
        return 0.0
    return sum(a == b for a, b in zip(found, gold, strict=True)) / len(gold)


def trace_accuracy(example: Example, completion: str) -> float:
    """Return the share of the gold states that are right up to the first wrong one."""
    gold = read_states(example.solution.partition("|")[0])
    found = read_states(completion.partition("|")[0])
    same = 0
    for a, b in zip(gold, found, strict=False):
        if a != b:
            break
        same += 1
    return same / len(gold) if gold else 0.0


def measures(example: Example, completion: str) -> Mapping[str, float]:
    """Return the shares of right nodes and of the trace, and the nodes right if copied."""
    return {
        "nodes right": node_accuracy(example, completion),
        "if copied": identity_accuracy(example),
        "trace right": trace_accuracy(example, completion),
    }


def identity_accuracy(example: Example) -> float:
    """Return the node accuracy of writing the initial state: the baseline."""
    gold = read_states(example.answer)[0]
    return sum(i == p for i, p in enumerate(gold)) / len(gold)


def stream(sizes: Sequence[int], hints: bool, split: str, rng: random.Random) -> Iterator[Example]:
    """Give graphs of one split without end; a graph is in one split only, by its hash."""
    number = 0
    while True:
        A = random_graph(rng, rng.choice(sizes))
        is_held_out = hashlib.sha256(question_text(A, False).encode()).digest()[0] % 5 == 0
        if is_held_out == (split == "held_out"):
            yield Example(
                id=f"clrs/{split}/{number}",
                question=question_text(A, hints),
                answer=state_text(dfs_states(A)[-1]),
                solution=answer_text(A, hints),
                columns={"n": len(A), "hints": int(hints)},
            )
            number += 1


def make_split(config: ClrsTaskConfig, split: str, num: int) -> list[Example]:
    """Return `num` graphs of one split, the same for the same seed."""
    rng = random.Random(f"{config.seed}/clrs/{split}")
    return list(islice(stream(config.sizes, config.hints, split, rng), num))


def load_clrs(config: ClrsTaskConfig) -> Task:
    """Return the CLRS-Text depth-first-search task."""
    train = make_split(config, "train", config.num_train)
    held_out = make_split(config, "held_out", config.num_held_out)
    digest = hashlib.sha256("\n".join(e.question for e in train + held_out).encode()).hexdigest()
    return Task(
        name="clrs",
        train=train,
        held_out=held_out,
        verify=verify,
        labels=labels,
        measures=measures,
        text=TEXT,
        source={"kind": "clrs", "rows": len(train) + len(held_out), "sha256": digest},
    )
