"""Equations in text, read by a tokenizer of our own and checked in exact fractions.

    "12 apples + 1.5 x 4 = 18"   ->   right
    "2 + 8 + 5 = 15 = 3 * 5"     ->   two equations, both right

Chains are checked pairwise, with precedence, brackets, unary minus, thousands separators, currency
signs, up to three unit words after a number, and percent as a value or as hundredths. Where letters
touch digits it is algebra, and no equation is read. Nothing is evaluated as code, and numbers have
at most DIGITS digits.

Rounding is accepted where the right side shows decimals: half a unit in its last place. Integers
must be exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal, NamedTuple

DIGITS = 15
SIDE = 60  # tokens; longer sides, and what is nested deeper, are not read
TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?P<percent>\s*%)?"
    r"|(?P<op>[-+*/()×÷–−]|(?<=[\d)\s])[xX](?=[\s\d(.$]))|(?P<currency>[$£€])|(?P<equals>=))"
)
UNITS = re.compile(r"(?:\s*[A-Za-z][\w'’-]*\.?){1,3}\s*(?=[-+*/=×÷])")
WORD = re.compile(r"\s*[A-Za-z][\w'’/-]*")
SAME = {"×": "*", "x": "*", "X": "*", "÷": "/", "–": "-", "−": "-"}
ANY_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+")


class Token(NamedTuple):
    """A number, an operator or bracket, or "=". Example: Token("number", Fraction(3, 2), 1)"""

    kind: Literal["number", "op", "="]
    value: Fraction = Fraction(0)
    decimals: int = 0
    is_percent: bool = False
    op: str = ""

    @property
    def worth(self) -> Fraction:
        return self.value / 100 if self.is_percent else self.value


class Equation(NamedTuple):
    """Two sides of an "=" with at least one operation.

    `operands` are the numbers of the left side as written; `unreadable` sides have no value.

    Example: Equation("right", (Fraction(12), Fraction(6)), Fraction(18), Fraction(18))
    """

    verdict: Literal["right", "wrong", "unreadable"]
    operands: tuple[Fraction, ...]
    left: Fraction | None
    right: Fraction | None


class _Unreadable(Exception):
    """The tokens are no expression."""


def equations(text: str) -> list[Equation]:
    """Return every equation of a text, in order."""
    found: list[Equation] = []
    for line in text.split("\n"):
        for run in _runs(line):
            sides: list[list[Token]] = [[]]
            for token in run:
                if token.kind == "=":
                    sides.append([])
                else:
                    sides[-1].append(token)
            while sides and not sides[-1]:
                sides.pop()
            for left, right in zip(sides, sides[1:], strict=False):
                equation = _equation(left, _without_dangling(right))
                if equation is not None:
                    found.append(equation)
    return found


def numbers(text: str) -> set[Fraction]:
    """Return every number written in a text."""
    found = (match.replace(",", "") for match in ANY_NUMBER.findall(text))
    return {Fraction(number) for number in found if len(number) <= DIGITS}


def _runs(line: str) -> Iterator[list[Token]]:
    """Give the longest runs of tokens; a word ends a run unless it is a unit after a number."""
    at, run = 0, []
    while at < len(line):
        match = TOKEN.match(line, at)
        if match and match.end() > at:
            token = _token(match)
            if token is not None:
                run.append(token)
            elif match["currency"] is None:  # a number too long to be read
                if run:
                    yield run
                run = []
            at = match.end()
            continue
        word = WORD.match(line, at)
        if word and run and run[-1].kind == "number":
            touching = line[at].isalpha()  # "3x": algebra, not a unit
            units = None if touching else UNITS.match(line, at)
            if units:
                at = units.end()
                continue
        if run:
            yield run
        run = []
        at = word.end() if word else at + 1
    if run:
        yield run


def _token(match: re.Match[str]) -> Token | None:
    if match["number"] is not None:
        digits = match["number"].replace(",", "")
        if len(digits) > DIGITS:
            return None
        decimals = len(digits.partition(".")[2])
        return Token("number", Fraction(digits), decimals, match["percent"] is not None)
    if match["op"] is not None:
        return Token("op", op=SAME.get(match["op"], match["op"]))
    return Token("=") if match["equals"] is not None else None


def _without_dangling(side: list[Token]) -> list[Token]:
    """Return the side without operators after its end, as in "= 5 - so"."""
    end = len(side)
    while end and side[end - 1].kind == "op" and side[end - 1].op != ")":
        end -= 1
    return side[:end]


def _equation(left: list[Token], right: list[Token]) -> Equation | None:
    if not left or not right or not (_operations(left) or _operations(right)):
        return None
    operands = tuple(token.value for token in left if token.kind == "number")
    if max(len(left), len(right)) > SIDE:
        return Equation("unreadable", operands, None, None)
    try:
        a, b = _value(left), _value(right)
    except _Unreadable:
        return Equation("unreadable", operands, None, None)
    is_right = a == b or (len(right) == 1 and _shown(left, a, right[0]))
    return Equation("right" if is_right else "wrong", operands, a, b)


def _shown(left: list[Token], value: Fraction, shown: Token) -> bool:
    """Return whether a single number stands for the value: rounded, or as a percentage."""
    if _rounds_to(value, shown.worth if not shown.is_percent else shown.value, shown.decimals):
        return True
    if shown.is_percent:
        return value == shown.value or _rounds_to(value * 100, shown.value, shown.decimals)
    return any(token.is_percent for token in left) and value * 100 == shown.value


def _rounds_to(value: Fraction, shown: Fraction, decimals: int) -> bool:
    if value == shown:
        return True
    return decimals > 0 and abs(value - shown) <= Fraction(1, 2 * 10**decimals)


def _operations(side: list[Token]) -> int:
    """Return the number of operations; a sign before a number is none."""
    count, before = 0, None
    for token in side:
        follows = before is not None and (before.kind == "number" or before.op == ")")
        count += token.kind == "op" and token.op in "+-*/" and follows
        before = token
    return count


def _value(tokens: list[Token]) -> Fraction:
    value, end = _sum(tokens, 0)
    if end != len(tokens):
        raise _Unreadable
    return value


def _sum(tokens: list[Token], at: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at)
    while at < len(tokens) and tokens[at].op in ("+", "-"):
        sign = 1 if tokens[at].op == "+" else -1
        other, at = _product(tokens, at + 1)
        value += sign * other
    return value, at


def _product(tokens: list[Token], at: int) -> tuple[Fraction, int]:
    value, at = _atom(tokens, at)
    while at < len(tokens) and tokens[at].op in ("*", "/", "("):
        op = tokens[at].op
        other, at = _atom(tokens, at if op == "(" else at + 1)
        if op == "/" and other == 0:
            raise _Unreadable
        value = value / other if op == "/" else value * other
    return value, at


def _atom(tokens: list[Token], at: int) -> tuple[Fraction, int]:
    if at >= len(tokens):
        raise _Unreadable
    token = tokens[at]
    if token.kind == "number":
        return token.worth, at + 1
    if token.op in ("-", "+"):
        value, at = _atom(tokens, at + 1)
        return (-value if token.op == "-" else value), at
    if token.op == "(":
        value, at = _sum(tokens, at + 1)
        if at >= len(tokens) or tokens[at].op != ")":
            raise _Unreadable
        return value, at + 1
    raise _Unreadable
