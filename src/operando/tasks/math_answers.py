r"""When two answers to a competition problem are the same: spellings, numbers, units, lists.

Nothing is simplified: (x+1)^2 is not x^2+2x+1, 2\sqrt{2} is not \sqrt{8}, \frac{\pi}{2} is not
0.5\pi, a rounded decimal is not the fraction. Where a text can be read in two ways the choice errs
towards "not the same", since a policy finds what is let through:

    3^2 for 3           another number; 2 and 3 are exponents of a unit only behind a unit
    5 miles for 5 km    another unit; a unit that one side leaves out is no difference, but outside
                        \text one letter may be a variable: 5\text{ m} is 5, and 5 m is not
    y=3 for x=3         another variable; a name that one side leaves out is no difference
    50\% for 50         the same only where the problem speaks of percent; for \frac12 it always is
    123,456             a number, never 456,123; a list only beside one that is written "123, 456"
                        as the gold answer, or where every part is a round hundred (100,200)
    2, 345              a list, never 2345; 1 000 is 1000, 1 1/2 is \frac32, and 2 3 is not 23
    5 million           not 5: words that are no unit stay part of the answer
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

MAX_NUMBER = 200
PLAIN = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
MIXED = re.compile(r"(-?)([0-9]+)\(([0-9]+)\)/\(([0-9]+)\)")
RATIO = re.compile(r"(-?)\(?(-?[0-9]+)\)?/\(?(-?[0-9]+)\)?")
FACTOR = r"(?:[0-9]++|\\sqrt\{[^{}]*+\}|\\[a-z]++|[A-Za-z])"
SIMPLE_RATIO = re.compile(  # one factor below "/", since 1/2\pi is unclear
    rf"(-?)(?:\((-?)({FACTOR}++)\)|({FACTOR}++))/(?:\(({FACTOR})\)|({FACTOR}))"
)
THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
THREES = re.compile(r"[0-9]{3}(?:,[0-9]{3})+")
HUNDREDS = re.compile(r"[1-9]00(?:,[1-9]00)+")
SPACED = re.compile(r"-?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?")
TEXT = re.compile(r"\\(?:text|textbf|textrm|textit|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
MATRIX = re.compile(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}", re.DOTALL)
NAME = re.compile(
    r"(\\?[A-Za-z]{1,5}(?:_(?:\w|\{\w+\}))?(?:\([a-z]\))?|"
    r"\(\s*[A-Za-z](?:_\w)?(?:\s*,\s*[A-Za-z](?:_\w)?)+\s*\))\s*(?:=|\\in(?![A-Za-z]))\s*"
)

UNIT_WORDS = (
    "mm millimeter|cm centimeter|m meter metre|km kilometer|inch in inches|foot ft feet|yard yd|"
    "mile mi|second s sec|minute min|hour h hr|day|week|month|year|gram g|kg kilogram|pound lb|"
    "ounce oz|ton|liter l litre|ml milliliter|gallon gal|quart|pint|cup|dollar|cent|degree|"
    "radian rad|celsius|fahrenheit|percent|unit|point|student|way|person people|ball|box boxes|"
    "card|coin|apple|marble|book|page|integer|number|solution|term|digit|side|edge|face|vertex "
    "vertices|triangle|square|line|angle|root|factor|divisor|prime|value|set|subset|pair|path|game|"
    "team|player|child children|boy|girl|man men|woman women|piece|seat|color|block|tile|outcome"
)
UNITS = {
    word: words.split()[0]
    for words in UNIT_WORDS.split("|")
    for first in words.split()
    for word in (first, f"{first}s")
}
UNITS |= {"mph": "mile/hour", "kph": "km/hour"}
POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
TAIL = re.compile(
    r"(?:[\s/]*(?:\\text\{[^{}]*\}|(?<![A-Za-z\\{_^])[A-Za-z]{2,}\.?)(?:\^\{?[23]\}?)?)+[\s.]*$"
)
COUNTED = re.compile(r"(?:[0-9)}\]]|\\pi)\s*$")  # what a unit outside \text may stand behind


class Leaf(NamedTuple):
    """An answer without parts. Example: Leaf(body="90", name="x", unit="degree")"""

    body: str
    name: str
    unit: str
    is_percent: bool


def same_answer(answered: str, gold: str, in_percent: bool = False) -> bool:
    r"""Return whether two answers are equal: as normalised text, in value, or part by part.

    A tuple, an interval or a matrix must have the same brackets and the parts in order. The parts
    of a set, a union or a list may stand in any order; "and" or "or" between them is a comma, and
    a \pm b is two of them. `in_percent`: the problem speaks of percent, so that 50\% answers 50.
    """
    return _same(_tidy(answered), _tidy(gold), in_percent, is_whole=True)


# --- spelling ------------------------------------------------------------------------------------


def _tidy(answer: str) -> str:
    """Return an answer without what only looks: sizes, spacing, math delimiters, bold."""
    text = re.sub(r"^\*\*(.*)\*\*$", r"\1", answer.strip()).replace("−", "-").replace("\n", " ")
    text = re.sub(r"\\\\\s*\[[^\]]*\]", r"\\\\", text)
    text = re.sub(r"(?<=[0-9])(?:,\s*\\!\s*|\{,\})(?=[0-9]{3})", "", text)
    text = re.sub(r"(?<!\\)\\!", "", text)
    text = re.sub(r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~", " ", text)
    text = TEXT.sub(r"\\text{\1}", text)
    text = re.sub(r"\\text\{\s*(?:and|or),?\s*\}|,?\s\$?(?:and|or)\$?\s", ", ", text)
    text = re.sub(r"\\\$\s*([0-9][0-9,]*(?:\.[0-9]+)?)", r"\1\\text{ dollars}", text)
    text = re.sub(r"\\\$|\$|(?<!\\)\\[()]|(?<!\\)\\[\[\]]", "", text)
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[bB]ig{1,2}[lr]?(?![a-z])", "", text)
    text = re.sub(r"\\displaystyle(?![A-Za-z])", "", text)
    text = re.sub(
        r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![A-Za-z])|°", r"\\text{ degrees}", text
    )
    text = re.sub(r"\\text\{ degrees\}\s*(?:\\text\{\s*C\s*\}|C$)", r"\\text{ celsius}", text)
    text = re.sub(r"\\text\{ degrees\}\s*(?:\\text\{\s*F\s*\}|F$)", r"\\text{ fahrenheit}", text)
    text = re.sub(r"\\?%|\\text\{\s*percent\s*\}|(?<=[0-9])\s*percent$", "%", text)
    return re.sub(r"\s+", " ", text).strip()


def normalise(answer: str) -> str:
    r"""Return an answer in one spelling, without its unit, percent sign or leading "x =".

    Taken out: spaces, $, \left and \right, sizes, \text around words, a full stop, the brackets of
    (A). Rewritten: \dfrac, \tfrac, \frac12 and a/b to (a)/(b); 1,200, 1{,}200 and 1 200 to 1200;
    \sqrt3 to \sqrt{3}; x_{2} to x_2.
    """
    return _spell(_leaf(_tidy(answer)).body)


def _spell(body: str) -> str:
    text = TEXT.sub(r" \1 ", body).strip()
    text = text.rstrip(" .,;") if text.strip(" .,;") else text
    if THOUSANDS.fullmatch(text) or SPACED.fullmatch(text):
        text = re.sub("[, ]", "", text)
    text = re.sub(r"^(-?[0-9]+) +([0-9]+)/([0-9]+)$", r"\1(\2)/(\3)", text)
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)  # "2 3" is not 23
    text = _fractions(text)
    text = re.sub(r"\\sqrt([0-9a-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"([_^])\{([0-9A-Za-z])\}", r"\1\2", text)
    text = re.sub(r"^\(([A-Ea-e])\)$", r"\1", text.removeprefix("+"))
    simple = SIMPLE_RATIO.fullmatch(text)
    if simple is not None:
        minus = "-" if (simple[1] or "") != (simple[2] or "") else ""
        text = f"{minus}{simple[3] or simple[4]}/{simple[5] or simple[6]}"
    return re.sub(r"^\{(.*)\}$", r"\1", text) if text.count("{") == 1 else text


def _fractions(text: str) -> str:
    """Return the text with each \\frac as (a)/(b), the innermost first."""
    text = re.sub(r"\\[dtc]?frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac([0-9a-z])([0-9a-z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([0-9a-z])\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})([0-9a-z])", r"\1{\2}", text)
    while True:
        # A group may hold one level of braces: \frac{\sqrt{3}}{2}.
        group = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
        changed = re.sub(rf"\\frac{group}{group}", r"(\1)/(\2)", text, count=1)
        if changed == text:
            break
        text = changed
    return re.sub(r"(?<![0-9A-Za-z)])([0-9]+)/([0-9]+)(?![0-9A-Za-z(])", r"(\1)/(\2)", text)


def to_number(text: str) -> Fraction | None:
    """Return the value of a normalised plain or mixed number or ratio of integers, else None."""
    if len(text) > MAX_NUMBER:  # what a loop wrote; Python refuses to read thousands of digits
        return None
    mixed = MIXED.fullmatch(text)
    if mixed is not None and int(mixed[4]):
        size = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return -size if mixed[1] else size
    if PLAIN.fullmatch(text):
        return Fraction(text.rstrip(".") or "0")
    ratio = RATIO.fullmatch(text)
    if ratio is None or int(ratio[3]) == 0:
        return None
    value = Fraction(int(ratio[2]), int(ratio[3]))
    return -value if ratio[1] else value


# --- an answer without parts ---------------------------------------------------------------------


def _name(text: str) -> str:
    """Return the name before an "=" or \\in: "x" of x=5, "(x,y)" of (x, y) = (5,3), or ""."""
    named = NAME.match(text)
    return re.sub(r"[{}\\\s]", "", named[1]) if named is not None else ""


def _leaf(text: str) -> Leaf:
    text = text.rstrip(" .,;") if text.strip(" .,;") else text
    named = NAME.match(text)
    name = _name(text)
    body = text[named.end() :] if named is not None else text
    unit = ""
    tail = TAIL.search(body)
    if tail is not None and body[: tail.start()].strip():
        is_wrapped = tail[0].lstrip(" /").startswith("\\text")
        if is_wrapped or COUNTED.search(body[: tail.start()]):
            unit = to_unit(tail[0]) or ""
            body = body[: tail.start()] if unit else body
    body = body.rstrip(" .,;")
    return Leaf(body.rstrip("% "), name, unit, body.endswith("%"))


def to_unit(phrase: str) -> str | None:
    r"""Return one name for a unit, or None: "square miles per hour" and \text{mi}^2/\text{h} agree.

    Every word must be known: "million", "dozen" and "or" are no units.
    """
    words = re.findall(r"[A-Za-z]+|\^\{?[23]\}?|/|\S", TEXT.sub(r" \1 ", phrase).replace(".", ""))
    found, power = "", ""
    for word in words:
        if word.startswith("^"):
            found += f"^{word.strip('^{}')}"
        elif word in ("/", "per"):
            found += "/"
        elif word in POWERS and word != words[-1]:
            power = POWERS[word]
        elif word.lower() in UNITS:
            found += ("" if not found or found[-1] == "/" else " ") + UNITS[word.lower()] + power
            power = ""
        else:
            return None
    return None if power or found.endswith("/") else found or None


def _same_leaf(answered: str, gold: str, in_percent: bool) -> bool:
    mine, its = _leaf(answered), _leaf(gold)
    if mine.name and its.name and mine.name != its.name:
        return False
    if mine.unit and its.unit and mine.unit != its.unit:
        return False
    left, right = _spell(mine.body), _spell(its.body)
    values = to_number(left), to_number(right)
    if mine.is_percent != its.is_percent and None not in values:
        shares = [
            v / 100 if one.is_percent and v is not None else v
            for v, one in zip(values, (mine, its), strict=True)
        ]
        if shares[0] == shares[1]:
            return True
    if mine.is_percent and not its.is_percent and not in_percent:
        return False
    if None not in values:
        return values[0] == values[1]
    are_words = all(re.fullmatch("[A-Za-z]{3,}", one) for one in (left, right))
    return left.casefold() == right.casefold() if are_words else left == right


# --- an answer with parts ------------------------------------------------------------------------


def _same(answered: str, gold: str, in_percent: bool, is_whole: bool = False) -> bool:
    if answered == gold:
        return bool(gold)
    if is_whole and (_is_thousands(answered) or _is_thousands(gold)):
        return _same_thousands(answered, gold, in_percent)
    mine, its = _elements(answered), _elements(gold)
    if len(mine) != len(its):
        return False
    if len(its) > 1:
        return _same_in_any_order(mine, its, in_percent)
    names = _name(mine[0]), _name(its[0])
    is_other = "" not in names and names[0] != names[1]
    mine, its = _ordered(mine[0]), _ordered(its[0])
    if len(its) > 1:
        return (
            len(mine) == len(its)
            and not is_other
            and all(_same(a, g, in_percent) for a, g in zip(mine, its, strict=True))
        )
    return len(mine) == 1 and _same_leaf(mine[0], its[0], in_percent)


def _is_thousands(text: str) -> bool:
    return THOUSANDS.fullmatch(_leaf(text).body) is not None


def _same_thousands(answered: str, gold: str, in_percent: bool) -> bool:
    """Return whether two answers agree of which one may be a number with thousands commas."""
    mine, its = _elements(answered), _elements(gold)
    as_list = len(mine) == len(its) > 1
    if not _is_thousands(gold):
        if len(its) > 1:
            is_list = THREES.fullmatch(answered) is not None and as_list
            return is_list and _same_in_any_order(mine, its, in_percent)
        return _same_leaf(answered, gold, in_percent)
    if (_is_thousands(answered) or len(mine) == 1) and _same_leaf(answered, gold, in_percent):
        return True
    hundreds = HUNDREDS.fullmatch(gold) and HUNDREDS.fullmatch(answered.replace(", ", ","))
    return bool(hundreds) and as_list and _same_in_any_order(mine, its, in_percent)


def _same_in_any_order(mine: Sequence[str], its: Sequence[str], in_percent: bool) -> bool:
    left_over = list(its)
    for part in mine:
        found = next((g for g in left_over if _same(part, g, in_percent)), None)
        if found is None:
            return False
        left_over.remove(found)
    return not left_over


def _elements(text: str) -> list[str]:
    r"""Return the parts of a set, a union or a list, or the text alone; a \pm b is two parts."""
    text = text.rstrip(" .,;") if text.strip(" .,;") else text
    named = NAME.match(text)
    if named is not None and text[named.end() :].startswith("\\{"):
        text = text[named.end() :]
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    parts = [part.strip() for part in split_outside(text, r"\\cup(?![A-Za-z])|,")]
    return [one for part in parts for one in _both_signs(part)]


def _both_signs(part: str) -> list[str]:
    if part.count("\\pm") != 1 or part.startswith(("(", "[")):
        return [part]
    before, _, after = part.partition("\\pm")
    is_first = not re.search(r"[0-9A-Za-z)}]\s*$", before)
    return [before + ("" if is_first else "+") + after.lstrip(), f"{before}-{after.lstrip()}"]


def _ordered(text: str) -> list[str]:
    """Return brackets and parts of a tuple, interval or matrix, or the text alone."""
    named = NAME.match(text)
    inner = text[named.end() :] if named is not None else text
    matrix = MATRIX.fullmatch(inner.strip())
    if matrix is not None:
        rows = [row for row in re.split(r"\\\\", matrix[1]) if row.strip()]
        return [
            "matrix",
            *(c for row in rows for c in ("row", *(x.strip() for x in row.split("&")))),
        ]
    if inner[:1] not in ("(", "[") or inner[-1:] not in (")", "]"):
        return [text]
    parts = split_outside(inner[1:-1], ",")
    if len(parts) < 2:
        return [text]
    return [inner[0], *(part.strip() for part in parts), inner[-1]]


def split_outside(text: str, separator: str) -> list[str]:
    """Return what stands between separators (a pattern) outside all brackets."""
    parts, depth, at = [""], 0, 0
    while at < len(text):
        found = re.compile(separator).match(text, at) if depth == 0 else None
        if found is not None:
            parts.append("")
            at = found.end()
            continue
        depth += (text[at] in "([{") - (text[at] in ")]}")
        parts[-1] += text[at]
        at += 1
    return parts
