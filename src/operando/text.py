"""Text from outside: of a model, a child process, a file or a user's function.

Such a text is bytes until proved otherwise: it may hold lone surrogates, which no file takes, or
control characters, which move a terminal's cursor and turn the order of what is read around. There
are three doors:

    encodable    what is graded, paid or trained on. Only what UTF-8 can't say is replaced, so that
                 the text a reward reads is the text that was written, controls and all.
    lone_surrogate  data that would be trained on: named and refused, for no row is changed.
    one_line, shown  what people read (reasons, messages, samples in a report): controls are
                 spelled out, as \\x1b.
"""

from __future__ import annotations

import re

SURROGATE = re.compile("[\ud800-\udfff]")
# C0, DEL and C1; the marks, embeddings, overrides and isolates of bidi; line ends that are no \n.
CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
UNSHOWN = re.compile(f"[{CONTROL}\ud800-\udfff]")
UNSHOWN_IN_LINE = re.compile(f"[{CONTROL}\t\n\ud800-\udfff]")
LONGEST_LINE = 2_000


def encodable(text: str) -> str:
    """Return the text with U+FFFD for each lone surrogate; nothing else changes.

    Example: encodable("a\\ud800\\x1b") == "a\\ufffd\\x1b"
    """
    return SURROGATE.sub("\ufffd", text)


def lone_surrogate(value: object) -> str | None:
    """Return the first text in a value, as read from JSON, that UTF-8 can't say; None for none."""
    match value:
        case str():
            return value if SURROGATE.search(value) else None
        case dict():
            parts = [*value.keys(), *value.values()]
        case list():
            parts = value
        case _:
            return None
    return next((found for part in parts if (found := lone_surrogate(part)) is not None), None)


def shown(text: str) -> str:
    """Return the text as a person may read it: controls other than \\n and \\t spelled out.

    Example: shown("a\\x1b[2J\\n\\u202e") == "a\\\\x1b[2J\\n\\\\u202e"
    """
    return text if text.isprintable() else UNSHOWN.sub(_spelled, text)


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """Return the text on one line, every control spelled out, cut after `longest` characters.

    Example: one_line("a\\nb\\x00") == "a\\\\nb\\\\x00"
    """
    cut = text if len(text) <= longest else text[: longest - 3] + "..."
    return cut if cut.isprintable() else UNSHOWN_IN_LINE.sub(_spelled, cut)


def _spelled(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode("ascii")
