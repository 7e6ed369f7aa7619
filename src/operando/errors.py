"""The one error a user is meant to read, and the nearest valid name for it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from operando.text import shown


class UserError(Exception):
    """A mistake in what the user gave. The command line prints it and exits with code 2.

    What it quotes may be anybody's: it is printed with its control characters spelled out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


class GateFailed(Exception):
    """What was made failed a check, and what would follow from it is not made.

    The command line prints it and exits with code 3.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
