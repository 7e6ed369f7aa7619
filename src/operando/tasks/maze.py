"""Search in a maze that is a tree: a walk with its steps back, and the path that it finds.

    Q: Maze A: B C; B: D; C: E; D:; E:; from A to E.
    A: A B D < B < A C E #### A C E

At a dead end the habit invents an edge to the goal (A B D E #### A B D E). There is no shortcut:
the only path has at least two edges, and an invented edge never lies on it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from operando.tasks.slips import Noted, Posed, Slips, Worked

LETTERS = "ABCDEFGHJKLM"
Tree = Mapping[str, Sequence[str]]


def work(tree: Tree, start: str, goal: str, slips: Slips) -> Worked:
    """Return the depth-first walk in the order of the doors, and the path on its stack.

    Risky are the dead ends ("dead end") and the rooms all of whose doors were tried ("climb")."""
    stack, moves, tried = [start], [start], {start}
    while stack[-1] != goal:
        doors = tree[stack[-1]]
        door = next((d for d in doors if d not in tried), None)
        if door is None and slips("climb" if doors else "dead end"):
            door = goal
        if door is None:
            stack.pop()
            moves += ["<", stack[-1]]
        else:
            stack.append(door)
            tried.add(door)
            moves.append(door)
    return Worked(" ".join(moves), " ".join(stack))


def pose(rng: random.Random, num_steps: int) -> Posed:
    """Return a maze whose walk has `num_steps` risky places."""
    while True:
        names = rng.sample(LETTERS, rng.randint(max(5, num_steps + 3), num_steps + 5))
        tree: dict[str, list[str]] = {name: [] for name in names}
        for i, name in enumerate(names[1:]):
            open_rooms = [n for n in names[max(0, i - 3) : i + 1] if len(tree[n]) < 3]
            tree[rng.choice(open_rooms)].append(name)
        start, goal = names[0], rng.choice(names[1:])
        noted = Noted()
        path = work(tree, start, goal, noted).answer.split()
        if len(path) >= 3 and len(noted.kinds) == num_steps:
            break
    rooms = rng.sample(names, len(names))
    told = " ".join(f"{n}:{''.join(' ' + d for d in tree[n])};" for n in rooms)
    question = f"Maze {told} from {start} to {goal}."
    return Posed("maze", question, question, lambda slips: work(tree, start, goal, slips))
