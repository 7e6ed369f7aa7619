"""Whether a text runs in circles, and where a raw completion begins to ask itself questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_N = 8
MIN_REPEATS = 5
MIN_RUN = 8
MIN_SHARE = 0.5
MIN_TOKENS = 20

TOKEN = re.compile(r"\w+(?:['’]\w+)*|([^\w\s])\1*")
STUCK = re.compile(r"([^\s=\-_*#.~])\1{29}")
NEXT_QUESTION = re.compile(r"\n[ \t]*(?:\*\*|#+ ?)?(?:Q|Question)(?: ?\d+)?(?:\*\*)?:")
NEXT_QUESTION_STOPS = ("\nQ:", "\nQuestion:")


class Loop(NamedTuple):
    """The n-gram a text repeats. Example: Loop(("wait", ","), repeats=12, share=0.8)"""

    ngram: tuple[str, ...]
    repeats: int
    share: float
    """Part of the text's tokens that the repeats cover."""


def loop_tokens(text: str) -> list[str]:
    """Return lower-case words and runs of one punctuation mark: "Wait, wait..." has four."""
    return [match[0].lower() for match in TOKEN.finditer(text)]


def find_loop(text: str) -> Loop | None:
    """Return the loop of a text, or None.

    Tokens are words and runs of one punctuation mark, in lower case. For n = 1 to 8 a text loops if

    - an n-gram stands at least 5 times one right after the other, over at least 8 tokens (a single
      word 8 times, a pair 5 times); or
    - an n-gram, n >= 2, with a word in it, has at least 5 occurrences that do not overlap and these
      cover more than half of a text of at least 20 tokens; or
    - one character other than = - _ * # . ~ stands 30 times in a row.

    The smallest n wins. Limits: a list that really holds the same entry eight times is a loop; a
    long digit string is one word; a paragraph of 16 tokens or more that comes again and again is
    none.
    """
    tokens = loop_tokens(text)
    for n in range(1, MAX_N + 1):
        found = _in_a_row(tokens, n) or (_covering(tokens, n) if n > 1 else None)
        if found is not None:
            return found
    stuck = STUCK.search(text)
    return None if stuck is None else Loop((stuck[1],), 30, 30 / len(text))


def _in_a_row(tokens: Sequence[str], n: int) -> Loop | None:
    """Return an n-gram that follows itself often enough: token i equals token i-n, on and on."""
    run = 0
    for i in range(n, len(tokens) + 1):
        if i < len(tokens) and tokens[i] == tokens[i - n]:
            run += 1
            continue
        repeats = run // n + 1
        if repeats >= MIN_REPEATS and repeats * n >= MIN_RUN:
            start = i - n - run
            return Loop(tuple(tokens[start : start + n]), repeats, repeats * n / len(tokens))
        run = 0
    return None


def _covering(tokens: Sequence[str], n: int) -> Loop | None:
    if len(tokens) < MIN_TOKENS:
        return None
    free_from: dict[tuple[str, ...], int] = {}
    count: dict[tuple[str, ...], int] = {}
    for i in range(len(tokens) - n + 1):
        ngram = tuple(tokens[i : i + n])
        if free_from.get(ngram, 0) <= i:
            free_from[ngram] = i + n
            count[ngram] = count.get(ngram, 0) + 1
    worded = (g for g in count if any(token[0].isalpha() for token in g))
    best = max(worded, key=lambda g: count[g], default=None)
    if best is None or count[best] < MIN_REPEATS:
        return None
    share = count[best] * n / len(tokens)
    return Loop(best, count[best], share) if share > MIN_SHARE else None


def cut_at_next_question(completion: str) -> str:
    """Return a raw completion up to where the model asks itself a next question.

    That is a line that begins with "Q:", "Question:" or "Question 2:" (with "**" or "#" before it
    or not), after some answer text. A completion that opens by asking again is left whole.
    """
    for match in NEXT_QUESTION.finditer(completion):
        if completion[: match.start()].strip():
            return completion[: match.start()]
    return completion
