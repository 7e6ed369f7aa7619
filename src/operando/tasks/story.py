"""Word problems of several events: each asks for one operation, and some mislead.

    Q: Ann has 37 pens, drops 5, is given 8, doubles them. How many?
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
FRAC_PLAIN = 0.1


class Event(NamedTuple):
    """One event. Example: Event("drops", 5)"""

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


def work(start: int, events: tuple[Event, ...], slips: Slips) -> Worked:
    """Return the steps, one an event."""
    total, steps = start, []
    for event in events:
        operation = event.operation(slips)
        total = apply(total, operation, event.number)
        steps.append(f"{operation}{event.number}={total}")
    return Worked(" ".join(steps), str(total))


def pose(rng: random.Random, num_steps: int) -> Posed:
    """Return a story of `num_steps` events; one of them at most doubles."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    start = rng.randint(10 * num_steps, 49)
    events: list[Event] = []
    for _ in range(num_steps):
        verbs = list(PLAIN if rng.random() < FRAC_PLAIN else HABITS)
        if any(s.verb == "doubles" for s in events):
            verbs = [v for v in verbs if v != "doubles"]
        verb = rng.choice(verbs)
        events.append(Event(verb, 2 if verb == "doubles" else rng.randint(2, 9)))
    told = "".join(f", {s.verb} {'them' if s.verb == 'doubles' else s.number}" for s in events)
    question = f"{name} has {start} {item}{told}. How many?"
    told_events = tuple(events)
    return Posed(
        "story", f"{start} {told_events}", question, lambda slips: work(start, told_events, slips)
    )
