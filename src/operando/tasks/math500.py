"""MATH-500: competition problems (2103.03874, the 500 of 2305.20050), answers in LaTeX.

The answer is what stands in the last \\boxed{...}; without one, the end of the last line. Who says
that it is right is `task.grader`, which stands in the task's source and so in every manifest:

    ours         `same_answer` (tasks/math_answers.py). It compares spellings, numbers, units and
                 lists and simplifies nothing, so its rates are a lower bound, for both arms alike.
    math_verify  Math-Verify as shipped, on the whole completion: it finds the answer itself and
                 decides with a computer algebra system. Needs the extra `operando[math]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from operando.errors import UserError
from operando.recipe.data import Math500TaskConfig
from operando.run import hash_file
from operando.tasks.base import Task, TaskText
from operando.tasks.files import Source, read_rows
from operando.tasks.math_answers import same_answer
from operando.types import Example, Verdict

BOX = "Put the final answer in \\boxed{}."
TEXT = TaskText(f"Q: {{question}}\n{BOX}\nA:", f"{{question}}\n{BOX}", " {solution}")
PERCENT = re.compile(r"percent|\\%", re.IGNORECASE)
BOXED = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
BRACE = re.compile(r"(?<!\\)[{}]")
DELIMITERS = re.compile(
    r"(?:\\[\[\]()]|\$++|`{3,}+\w*+|~{3,}+\w*+|\\(?:begin|end)\{[a-z]++\*?\}|[-*_]{3,}+|\s)++"
)
INLINE_MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
BETWEEN = re.compile(r"\s*(?:,|,?\s*(?:or|and))\s*")
BARE = re.compile(r"-?[^\s${}]+")
LEAD = re.compile(
    r"^(?:.*\b(?:answer|result)\b\s*(?:is|:|=)|.*\b(?:is|equals|are)\b|.*####)\s*:?", re.I
)
BOLD = re.compile(r"\*\*([^*]+)\*\*")


# --- the answer of a text ------------------------------------------------------------------------


def last_boxed(text: str) -> str | None:
    """Return what stands in the last \\boxed that is closed, braces matched, or None.

    \\boxed 5 without braces counts too, up to a space, "$" or the end.
    """
    closed: dict[int, int] = {}
    opened: list[int] = []
    for brace in BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closed[opened.pop()] = brace.start()
    for match in reversed(list(BOXED.finditer(text))):
        at = match.end()
        if not text.startswith("{", at):
            bare = BARE.match(text, at)
            if bare is not None:
                return bare[0].rstrip(".,;:")
        elif at in closed:
            return text[at + 1 : closed[at]]
    return None


def find_answer(completion: str) -> str | None:
    """Return the last box's content; without a box, the end of the last line that says something.

    A line of nothing but delimiters (\\], $$, ```) says nothing. Of that line: the last formula
    between $, with those that "or", "and" or a comma join to it; else what follows "answer is",
    "is" or "=", else all. Bold marks (**) don't count.
    """
    boxed = last_boxed(completion)
    if boxed is not None:
        return boxed
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    lines = [line for line in lines if not DELIMITERS.fullmatch(line)]
    if not lines:
        return None
    line = BOLD.sub(r"\1", lines[-1])
    formulas = list(INLINE_MATH.finditer(line))
    if formulas:
        first = len(formulas) - 1
        while first and BETWEEN.fullmatch(
            line[formulas[first - 1].end() : formulas[first].start()]
        ):
            first -= 1
        return ", ".join(m[1] or m[2] for m in formulas[first:])
    after = LEAD.sub("", line).strip()
    if re.search(r"\s(?:or|and)\s", after):  # "x = 2 or x = 3" is both
        return after
    return after.rpartition("=")[2].strip() or None


# --- the verdict ---------------------------------------------------------------------------------


def verify_math(example: Example, completion: str, is_truncated: bool) -> Verdict:
    """Return whether the completion's answer equals the gold one, by `same_answer`."""
    del is_truncated  # by the text alone
    answered = find_answer(completion)
    if answered is None:
        return Verdict(False, "no answer")
    in_percent = PERCENT.search(example.question) is not None
    if not same_answer(answered, example.answer, in_percent):
        return Verdict(False, f"answered {answered}, gold is {example.answer}")
    return Verdict(True, "right")


def by_math_verify(key: str) -> Callable[[Example, str, bool], Verdict]:
    """Return Math-Verify's verdict as a verifier; `key` is what asks for it, if it is missing."""
    try:
        import math_verify  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f'{key} = "math_verify" needs: pip install "operando[math]"') from error

    def verify(example: Example, completion: str, is_truncated: bool) -> Verdict:
        del is_truncated
        gold = math_verify.parse(f"${example.answer}$")
        found = math_verify.parse(completion)
        if not found:
            return Verdict(False, "no answer")
        if not math_verify.verify(gold, found):
            return Verdict(False, f"answered {found[-1]}, gold is {example.answer}")
        return Verdict(True, "right")

    return verify


def _grader(config: Math500TaskConfig) -> tuple[Callable[[Example, str, bool], Verdict], str]:
    """Return the verifier that a config names, and that name with the version of what it runs."""
    if config.grader == "ours":
        return verify_math, "ours"
    return by_math_verify("task.grader"), f"math_verify {version('math-verify')}"


# --- the task ------------------------------------------------------------------------------------


def load_math500(config: Math500TaskConfig, prefix: str = "task.") -> Task:
    """Return the MATH-500 task; without `train` its training split is empty.

    Example: load_math500(Math500TaskConfig(kind="math500", test="math500_test.jsonl"))
    """
    key, train_key = f"{prefix}test", f"{prefix}train"
    file = Source(config.test, key, "test.jsonl", f"{key}=PATH").find()
    held_out = _examples(file, "test", key)
    verify, grader = _grader(config)
    source: dict[str, str | int] = {
        "kind": "math500",
        "grader": grader,
        "held_out": config.test,
        "held_out_rows": len(held_out),
        "held_out_sha256": hash_file(file),
    }
    train: list[Example] = []
    if config.train is not None:
        train_file = Source(config.train, train_key, "train.jsonl", f"{train_key}=PATH").find()
        train = _examples(train_file, "train", train_key)
        shared = {e.question for e in train} & {e.question for e in held_out}
        if shared:
            raise UserError(
                f"{train_key} = {config.train!r} holds {len(shared)} of the {len(held_out)} "
                f"held-out problems, the first: {min(shared)[:60]!r}"
            )
        source |= {
            "train": config.train,
            "train_rows": len(train),
            "train_sha256": hash_file(train_file),
        }
    return Task("math500", train, held_out, verify, text=TEXT, source=source)


def _examples(file: Path, split: str, key: str) -> list[Example]:
    examples = []
    for i, row in enumerate(read_rows(file)):
        answer, solution = row.text("answer").strip(), row.text("solution").strip()
        examples.append(
            Example(
                id=f"math500/{split}/{i}",
                question=row.text("problem").strip(),
                answer=answer,
                solution=solution,
                columns={"answer": answer, "solution": solution},
            )
        )
    if not examples:
        raise UserError(f"{key}: {file} has no rows")
    return examples
