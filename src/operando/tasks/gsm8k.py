"""GSM8K: grade-school word problems (2110.14168), from the hub or from local files.

    Q: A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total?
    A: It takes 2/2=1 bolt of white fiber
    So the total amount of fabric is 2+1=3 bolts of fabric #### 3

Three scorers say who is right. `verl_strict` and `verl_flexible` are verl's own, odd cases and all,
for numbers that compare with verl's; `last_number` reads an answer as a person would. All go by the
text alone: a truncated completion that already holds the right answer is right, and truncation is
logged apart.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from operando.errors import UserError
from operando.recipe.data import Gsm8kTaskConfig
from operando.run import hash_file
from operando.tasks.base import Task, TaskText
from operando.tasks.files import Row, Source, read_rows
from operando.tasks.math500 import last_boxed
from operando.types import Example, Verdict

TEXT = TaskText()
CALCULATOR = re.compile(r"<<[^>]*>>")
GOLD = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")

VERL_CHARS = 300
VERL_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
VERL_FLEXIBLE = re.compile(r"(\-?[0-9\.\,]+)")

# A minus is a sign unless it stands after a digit, a letter or a bracket: "16-3" ends in 3.
_NUMBER = (
    r"\\[dt]?frac\{(?P<top>[0-9]+)\}\{(?P<bottom>[0-9]+)\}"
    r"|(?P<sign>(?<![\w)])[-−])?[ \t]?\$?[ \t]?(?P<inner_sign>(?<=\$)[-−])?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
    r"|[0-9]{1,3}SPACED(?![0-9])(?:\.[0-9]+)?"
    r"|(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?)"
    r"(?:/(?P<under>[0-9]+)(?![0-9]|\.[0-9]))?"
    r"(?P<scale>\s(?:hundred|thousand|million|billion)\b)?"
)
NUMBER = re.compile(_NUMBER.replace("SPACED", r"(?:[ \u00a0\u202f][0-9]{3})+"))
# In prose "day 2 100 people" holds two numbers; no number of its own begins with 0 or needs \u00a0.
PROSE_NUMBER = re.compile(
    _NUMBER.replace(
        "SPACED", r"(?:(?: [0-9]{3}){2,}|(?:[\u00a0\u202f][0-9]{3})+| 0[0-9]{2}(?: [0-9]{3})*)"
    )
)
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
# Between two numbers: they are one expression, a time, a range, a list, or a choice.
OPERATOR = r"[-−+*/×÷^–—·x~]|\\(?:times|cdot|div)|\bor\b|[eE][+-]?|\}\{"
JOINED = re.compile(rf"[ \t$()%]*(?:{OPERATOR}|,)?[ \t$(){{}}]*|:")
PROSE_JOINED = re.compile(
    rf"[ \t$()%]*(?:(?:{OPERATOR})[ \t$(){{}}]*|,[$(]*|\([ \t$(]*)|:"
)  # "In 2020, 18" and "day 2 100" are two numbers each
BULLET = re.compile(r"^[ \t]*-[ \t]+(?=[$0-9.])", re.MULTILINE)
POWER = re.compile(
    r"(?<=[0-9])(?P<unit>[ ~]?(?:\\(?:text|mathrm)\{\s*)?(?:mm|cm|dm|m|km|in|inch|inches|ft|feet|"
    r"foot|yd|yards?|mi|miles?|meters?|metres?|units?)\}?)(?:\^\{[23]\}|\^?[23])(?![0-9]|\.[0-9])"
)
BOLD = re.compile(r"(?<!\w)\*\*(?=\S)(.+?)(?<=\S)\*\*(?!\w)")
# An aside ends the line behind a space, says something, and hangs on no operator.
ASIDE = re.compile(
    r"(?<![-−+*/×÷^–—·,~:=(\s])(?<![0-9 ]x)(?<!\\times)(?<!\\cdot)(?<!\\div)(?<!\bor)(?<!\band)"
    r"[ \t]+\((?=[^()]*(?:[A-Za-z]{2}|=))(?![^()]*\bor\b)[^()]*\)[\s.]*\Z"
)


# --- scorers -------------------------------------------------------------------------------------


def verl_strict(completion: str, gold: str) -> Verdict:
    """Return verl's gsm8k.compute_score(method="strict") == 1.

    The last "#### n" (exactly one space) in the last 300 characters, commas removed, equals the
    gold answer as a string: "72." and "72.00" are wrong where the gold is "72".
    """
    found = VERL_STRICT.findall(completion[-VERL_CHARS:])
    if not found:
        return Verdict(False, "no '#### n' in the last 300 characters")
    return _compare(found[-1].replace(",", ""), gold)


def verl_flexible(completion: str, gold: str) -> Verdict:
    """Return verl's gsm8k.compute_score(method="flexible") == 1.

    The last run of digits, dots and commas other than "." in the last 300 characters equals the
    gold answer as a string. Commas stay in ("1,000" is wrong where the gold is "1000"), a comma
    alone counts as a find, and if there is nothing but dots it is the first of them.
    """
    found = VERL_FLEXIBLE.findall(completion[-VERL_CHARS:])
    if not found:
        return Verdict(False, "no number in the last 300 characters")
    return _compare(next((f for f in reversed(found) if f != "."), found[0]), gold)


def last_number(completion: str, gold: str) -> Verdict:
    """Return whether the answer's number equals the gold answer in value.

    With '####' in the text the answer is the line after the last one, from the last "=" on that a
    number follows, and must hold one number: "20 - 5 = 15" is 15 and "18 = the total" is 18, but
    "20 - 5", "(12 - 4) / 2", "12 or 13", "12, 13", "7:30" and "72 of 80" are none, whatever the
    gold. Left out is an aside in brackets that ends the line behind a space, if it has a word or a
    "=", no "or", and no operator before it: "72 (of 80)" is 72, but "2(3+4)", "72 - (8)" and
    "12 (13)" are none.

    Without '####' it is what stands in the last closed \\boxed{}, read in the same way: models that
    were taught mathematics answer so, and go on ("\\boxed{6} dollars for 18 flowers").

    Without either it is the last number, which must not hang on the one before it by an operator,
    a bracket, a comma without a space or an "or": "80-72" is no 72. A space or a comma with a space
    is prose: "On day 2 100 people" is 100 and "In 2020, 18" is 18.

    Where several numbers could be meant the verdict is wrong, since a policy would find the other
    choice. A leading "$", thousands commas or spaces, "%" and a full stop do not matter; without
    '####' a space makes thousands if it is a non-breaking one, if it stands twice, or if 0 follows
    ("1 000"). "1/2", "\\frac{1}{2}", "1e3" and "1.5 million" have their values: "$1,000.00." is
    1000. The power of a unit is no number ("540 m^2", "20 m2"), and a hyphen with a space behind it
    that begins a line is a bullet and no minus.
    """
    text = POWER.sub(r"\g<unit>", BULLET.sub("", completion))
    _, mark, after = text.rpartition("####")
    box = None if mark else last_boxed(text)
    if mark or box is not None:
        where = "after '####'" if mark else "in the last box"
        line = BOLD.sub(r"\1", after.strip().partition("\n")[0]) if box is None else box
        before = ASIDE.sub("", line)
        line = before if NUMBER.search(before) else line
        line = next((part for part in reversed(line.split("=")) if NUMBER.search(part)), line)
        found = list(NUMBER.finditer(line))
        if not found:
            return Verdict(False, f"no number {where}")
        if len({_value(one) for one in found}) > 1 or _is_joined(line, found, JOINED):
            return Verdict(False, f"no one number {where}: {line.strip()[:80]}")
    else:
        found = list(PROSE_NUMBER.finditer(text))
        if not found:
            return Verdict(False, "no number")
        if _is_joined(text, found[-2:], PROSE_JOINED):
            said = text[found[-2].start() : found[-1].end()].strip()
            return Verdict(False, f"the last number is part of more: {said[:80]}")
    answered = found[-1]
    if _value(answered) != Fraction(Decimal(gold)):
        return Verdict(False, f"answered {_spelled(answered)}, gold is {gold}")
    return Verdict(True, "right")


def _is_joined(text: str, found: Sequence[re.Match[str]], joint: re.Pattern[str]) -> bool:
    starts = [one.end("sign") if one["sign"] else one.end() - len(one[0].lstrip()) for one in found]
    between = [text[a.end() : start] for a, start in zip(found, starts[1:], strict=False)]
    return any(joint.fullmatch(gap) for gap in between)


def _spelled(number: re.Match[str]) -> str:
    if number["top"]:
        return f"{number['top']}/{number['bottom']}"
    minus = "-" if number["sign"] or number["inner_sign"] else ""
    under = f"/{number['under']}" if number["under"] else ""
    return minus + re.sub(r"[,\s]", "", number["digits"]) + under + (number["scale"] or "")


def _value(number: re.Match[str]) -> Fraction | None:
    """Return the value of a number; None over zero."""
    plain, _, scale = _spelled(number).partition(" ")
    above, _, under = plain.partition("/")
    if under and not under.strip("0"):
        return None
    value = Fraction(Decimal(above)) * SCALES.get(scale.strip(), 1)
    return value / Fraction(Decimal(under)) if under else value


SCORERS: Mapping[str, Callable[[str, str], Verdict]] = {
    "strict": verl_strict,
    "flexible": verl_flexible,
    "last_number": last_number,
}


def _compare(answered: str, gold: str) -> Verdict:
    if answered != gold:
        return Verdict(False, f"answered {answered}, gold is {gold}")
    return Verdict(True, "right")


def _verify(
    scorer: Callable[[str, str], Verdict], example: Example, completion: str, is_truncated: bool
) -> Verdict:
    del is_truncated  # by the text alone, see the top of the file
    return scorer(completion, example.answer)


# --- the task ------------------------------------------------------------------------------------


def load_gsm8k(config: Gsm8kTaskConfig, prefix: str = "task.", *, with_train: bool = True) -> Task:
    """Return the GSM8K task; without its training split, that is empty. `prefix` is what stands
    before the keys in errors.

    Example: load_gsm8k(Gsm8kTaskConfig(kind="gsm8k", train="gsm8k_train.jsonl.gz",
                                        test="gsm8k_test.jsonl"))
    """
    keys = {split: f"{prefix}{split}" for split in ("train", "test")}
    remedy = " ".join(f"{key}=PATH" for key in keys.values())
    test_file = gsm8k_source(config.test, "test", keys["test"], remedy).find()
    test_hash = hash_file(test_file)
    held_out = gsm8k_examples(test_file, "test", keys["test"])
    held_out = _first(held_out, config.num_held_out, "num_held_out", config.test)
    train: list[Example] = []
    train_hash = ""
    if with_train:
        train_file = gsm8k_source(config.train, "train", keys["train"], remedy).find()
        train_hash = hash_file(train_file)
        if train_hash == test_hash:
            raise UserError(
                f"{keys['train']} = {config.train!r} and {keys['test']} = {config.test!r} are the "
                "same file: the held-out problems would be trained on"
            )
        train = gsm8k_examples(train_file, "train", keys["train"])
        train = _first(train, config.num_train, "num_train", config.train)
    return Task(
        name="gsm8k",
        train=train,
        held_out=held_out,
        verify=gsm8k_verifier(config.scorer),
        text=TEXT,
        source={
            "kind": "gsm8k",
            "scorer": config.scorer,
            "train": config.train,
            "train_rows": len(train),
            "train_sha256": train_hash,
            "held_out": config.test,
            "held_out_rows": len(held_out),
            "held_out_sha256": test_hash,
        },
    )


def gsm8k_source(given: str, split: str, key: str, remedy: str) -> Source:
    """Return where a split is, for a path or a hub id."""
    return Source(given, key, f"main/{split}-00000-of-00001.parquet", remedy)


def gsm8k_verifier(scorer: str) -> Callable[[Example, str, bool], Verdict]:
    """Return the verifier that goes by a scorer."""
    return functools.partial(_verify, SCORERS[scorer])


def to_example(row: Row, split: str, number: int) -> Example:
    """Return a row as an example; the gold answer stands after '####'."""
    question, answer = row.text("question"), row.text("answer")
    worked, mark, end = answer.rpartition("####")
    gold = end.strip().replace(",", "")
    if not mark:
        raise UserError(f"{row.where}: the answer has no '####' before its result: {answer!r}")
    if not GOLD.fullmatch(gold):
        raise UserError(f"{row.where}: expected a number after '####', got {end.strip()!r}")
    solution = CALCULATOR.sub("", worked).strip()
    return Example(
        id=f"gsm8k/{split}/{number}",
        question=question.strip(),
        answer=gold,
        solution=solution,
        columns={"answer": gold, "solution": solution},
    )


def gsm8k_examples(file: Path, split: str, key: str) -> list[Example]:
    """Return the examples of a file; `key` is what the user named it by."""
    examples = [to_example(row, split, i) for i, row in enumerate(read_rows(file))]
    if not examples:
        raise UserError(f"{key}: {file} has no rows")
    return examples


def _first(examples: list[Example], num: int | None, key: str, file: str) -> list[Example]:
    if num is not None and num > len(examples):
        raise UserError(f"task.{key} = {num}, but {file} has only {len(examples)} problems")
    return examples[:num]
