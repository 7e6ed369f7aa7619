"""Word problems of several sentences: each asks for one operation, and some mislead.

    Q: Ann has 37 pens. Ann drops 5. Ann is given 8. Ann doubles them. How many pens?
    A: -5=32 +8=40 *2=80 #### 80

At a misleading verb the habit takes the operation that the other verbs have taught (`HABITS`).
"""

from __future__ import annotations

import random
from typing import NamedTuple

from operando.tasks.slips import Posed, Slips, Worked

NAMES = ("Ann", "Tom", "Mia", "Sam", "Eva", "Max")
ITEMS = ("pens", "coins", "cards", "eggs", "toys", "books")
PLAIN = {"finds": "+", "buys": "+", "eats": "-", "sells": "-"}
HABITS = {"drops": ("-", "+"), "lends": ("-", "+"), "is given": ("+", "-"), "doubles": ("*", "+")}
"""Of each misleading verb the right operation and the habit's."""
FRAC_PLAIN = 0.2


class Sentence(NamedTuple):
    """One event. Example: Sentence("drops", 5)"""

    verb: str
    number: int

    def operation(self, slips: Slips) -> str:
        if self.verb in PLAIN:
            return PLAIN[self.verb]
        right, habit = HABITS[self.verb]
        return habit if slips(self.verb) else right


def apply(total: int, operation: str, number: int) -> int:
    """Return the number after one operation."""
    match operation:
        case "+":
            return total + number
        case "-":
            return total - number
        case _:
            return total * number


def work(start: int, sentences: tuple[Sentence, ...], slips: Slips) -> Worked:
    """Return the steps, one a sentence."""
    total, steps = start, []
    for sentence in sentences:
        operation = sentence.operation(slips)
        total = apply(total, operation, sentence.number)
        steps.append(f"{operation}{sentence.number}={total}")
    return Worked(" ".join(steps), str(total))


def pose(rng: random.Random, num_steps: int) -> Posed:
    """Return a story of `num_steps` sentences; one of them at most doubles."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    start = rng.randint(10 * num_steps, 49)
    sentences: list[Sentence] = []
    for _ in range(num_steps):
        verbs = list(PLAIN if rng.random() < FRAC_PLAIN else HABITS)
        if any(s.verb == "doubles" for s in sentences):
            verbs = [v for v in verbs if v != "doubles"]
        verb = rng.choice(verbs)
        sentences.append(Sentence(verb, 2 if verb == "doubles" else rng.randint(2, 9)))
    told = "".join(
        f" {name} {s.verb} {'them' if s.verb == 'doubles' else s.number}." for s in sentences
    )
    question = f"{name} has {start} {item}.{told} How many {item}?"
    events = tuple(sentences)
    return Posed("story", f"{start} {events}", question, lambda slips: work(start, events, slips))
