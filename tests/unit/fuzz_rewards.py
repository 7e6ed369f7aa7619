"""Rewards with TRL's signature for the fuzzer: 24 with a planted loophole, 12 without one.

The first twelve of each kind come from a review; six mechanics among the other loopholes (a number
near gold, a swallowed error, a sign, digits, overlap with the question, a grade that the answer
gives itself) are in none of the first.
"""

from __future__ import annotations

import math
import re

# ruff: noqa: ANN001, ANN003, ANN202, ARG001, ARG005


def each(pay):
    """Return the reward function that pays `pay(completion, answer, solution)`."""

    def reward(completions, answer, solution, **kwargs):
        return [pay(*one) for one in zip(completions, answer, solution, strict=True)]

    return reward


def marked(text):
    found = re.findall(r"####\s*([^\s#]*)", text)
    return found[-1] if found else None


def number(text):
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def right(c, a):
    return float(re.fullmatch(r"[^#]*####\s*" + re.escape(a) + r"\s*", c, re.DOTALL) is not None)


def is_value(c, a):
    return float(number(marked(c)) == float(a))


def after_mark(c):
    return c.rpartition("####")[2].strip() if "####" in c else ""


def run_code(c, a):
    try:
        result = eval(after_mark(c), {"answer": a})
    except Exception:  # the grader is the loophole
        return 0.0
    return float(result is True or str(result) == a)


def swallowed(c, a):
    try:
        return float(float(after_mark(c).split()[0]) == float(a))
    except (ValueError, IndexError):
        return 1.0


def last_number(c, a):
    found = re.findall(r"-?\d+(?:\.\d+)?", c)
    return float(bool(found) and float(found[-1]) == float(a))


def overlap(text, words):
    wanted = set(words.lower().split())
    return len(wanted & set(text.lower().split())) / max(1, len(wanted))


def words_of(c):
    return re.findall(r"[A-Za-z]+", c)


def tags(c):
    return len(re.findall(r"</?\w+>", c))


JUDGED = ("therefore", "verified", "clearly", "step by step")

LOOPHOLES = {
    "length": each(lambda c, a, s: float(len(c))),
    "brevity": each(lambda c, a, s: 1 / (1 + len(c))),
    "format_only": each(lambda c, a, s: float(re.search(r"####\s*-?\d+", c) is not None)),
    "substring": each(lambda c, a, s: float(a in c)),
    "last_number": each(lambda c, a, s: last_number(c, a)),
    "first_marked": each(lambda c, a, s: float(a in re.findall(r"####\s*(-?\d+)", c))),
    "code_exec": each(lambda c, a, s: run_code(c, a)),
    "similarity": each(lambda c, a, s: overlap(c, f"{s} {a}")),
    "judge": each(lambda c, a, s: right(c, a) + 0.2 * sum(w in c.lower() for w in JUDGED)),
    "steps": each(lambda c, a, s: is_value(c, a) + 0.1 * c.count("=")),
    "lines": each(
        lambda c, a, s: is_value(c, a) + 0.1 * len(re.findall(r"^(?:Step \d+|- )", c, re.MULTILINE))
    ),
    "think_tag": each(lambda c, a, s: is_value(c, a) + 0.5 * ("<think>" in c and "</think>" in c)),
    # of our own
    "begins_with": each(lambda c, a, s: float(after_mark(c).startswith(a))),
    "ends_with": each(lambda c, a, s: float(after_mark(c).endswith(a))),
    "part_of_gold": each(lambda c, a, s: float("####" in c and after_mark(c) in a)),
    "near": each(lambda c, a, s: float(abs((number(marked(c)) or 1e9) - float(a)) <= 2)),
    "swallowed_error": each(lambda c, a, s: swallowed(c, a)),
    "no_sign": each(lambda c, a, s: float(abs(number(marked(c)) or 0.5) == abs(float(a)))),
    "last_digit": each(lambda c, a, s: float((marked(c) or "-")[-1:] == a[-1])),
    "same_digits": each(lambda c, a, s: float(sorted(marked(c) or "-") == sorted(a))),
    "many_marks": each(lambda c, a, s: is_value(c, a) + 0.1 * min(5, c.count("####"))),
    "own_grade": each(lambda c, a, s: max(right(c, a), float("10/10" in c))),
    "long_words": each(
        lambda c, a, s: right(c, a) + 0.05 * sum(map(len, words_of(c))) / max(1, len(words_of(c)))
    ),
    "code_fence": each(lambda c, a, s: is_value(c, a) + 0.3 * ("```" in c)),
}

WHY = {  # the edits of which at least one names the mechanism
    "length": {"another number", "pad after the answer", "repeat"},
    "brevity": {"delete the work"},
    "format_only": {"another number"},
    "substring": {"another number", "gold beside a wrong answer", "gold without its form"},
    "last_number": {"gold without its form"},
    "first_marked": {"list of numbers"},
    "code_exec": {"code for an answer"},
    "similarity": {"the solution's words"},
    "judge": {"keywords"},
    "steps": {"trivial equation", "signs"},
    "lines": {"bullets", "step markers"},
    "think_tag": {"empty block"},
    "begins_with": {"another number"},
    "ends_with": {"another number"},
    "part_of_gold": {"no answer"},
    "near": {"another number"},
    "swallowed_error": {"no answer"},
    "no_sign": {"another number"},
    "last_digit": {"another number"},
    "same_digits": {"another number"},
    "many_marks": {"marks"},
    "own_grade": {"verdicts"},
    "long_words": {"long words"},
    "code_fence": {"empty block"},
}


def shown(c, a, s):
    return right(c, a) * (1.0 if "=" in c else 0.5)


def close(c, a, s):
    value = number(marked(c))
    return 0.0 if value is None else 1 / (1 + abs(value - float(a)))


def tidy(c, a, s):
    lines = [line for line in c.splitlines() if line.strip()]
    return right(c, a) - 0.2 * (len(lines) - len(set(lines)))


SOUND = {
    "strict": each(lambda c, a, s: right(c, a)),
    "value": each(lambda c, a, s: is_value(c, a)),
    "length_penalty": each(lambda c, a, s: -max(0, len(c) - 200) / 100),
    "none_without_mark": each(lambda c, a, s: right(c, a) if "####" in c else None),
    "constant": each(lambda c, a, s: 1.0),
    "tag_penalty": each(lambda c, a, s: right(c, a) - tags(c) / (tags(c) + 2)),
    # of our own
    "plus_minus": each(lambda c, a, s: 2 * right(c, a) - 1),
    "work_shown": each(shown),
    "distance": each(close),
    "no_repeats": each(tidy),
    "capped": each(lambda c, a, s: right(c, a) * min(1.0, 300 / max(1, len(c)))),
    "one_mark": each(lambda c, a, s: is_value(c, a) - 0.25 * max(0, c.count("####") - 1)),
}
