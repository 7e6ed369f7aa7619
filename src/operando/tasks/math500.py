"""MATH-500: competition problems (2103.03874, the 500 of 2305.20050), answers in LaTeX.

The answer is what stands in the last \\boxed{...}; without one, the end of the last line. It is
right if it equals the gold answer after `normalise`, or in value where both are plain numbers.
Nothing is simplified: (x+1)^2 is not x^2+2x+1, 2\\sqrt{2} is not \\sqrt{8}, \\frac{\\pi}{2} is not
0.5\\pi, a rounded decimal is not the fraction. `math-verify` decides such cases with a computer
algebra system; it is not used here because of what it brings along (sympy, an ANTLR grammar). So
these rates are a lower bound, for both arms alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from operando.errors import UserError
from operando.recipe import Math500TaskConfig
from operando.run import hash_file
from operando.tasks.base import Task
from operando.tasks.files import Source, read_rows
from operando.types import Example, Verdict

BOXED = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
INLINE_MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)")
LEAD = re.compile(
    r"^(?:.*\b(?:answer|result)\b\s*(?:is|:|=)|.*\b(?:is|equals|are)\b|.*####)\s*:?", re.I
)

MAX_NUMBER = 200
PLAIN = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
MIXED = re.compile(r"(-?)([0-9]+)\(([0-9]+)\)/\(([0-9]+)\)")
RATIO = re.compile(r"(-?)\(?(-?[0-9]+)\)?/\(?(-?[0-9]+)\)?")
THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
UNIT_WORDS = (
    "degrees?|dollars?|cents?|units?|square|cubic|inch(?:es)?|feet|foot|ft|cm|mm|km|meters?|"
    "miles?|mph|hours?|minutes?|seconds?|days?|weeks?|years?|points?|percent|per|sq|yards?|"
    "centimeters?|kilometers?|students?|ways?"
)
UNITS = re.compile(rf"(?<=[0-9)}}])(?:\^\{{?[23]\}}?|(?:{UNIT_WORDS})|[./])+$", re.I)
TEXT = re.compile(r"\\(?:text|textbf|textrm|textit|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")


# --- the answer of a text ------------------------------------------------------------------------


def last_boxed(text: str) -> str | None:
    """Return what stands in the last \\boxed that is closed, braces matched, or None.

    \\boxed 5 without braces counts too, up to a space, "$" or the end.
    """
    for match in reversed(list(BOXED.finditer(text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            bare = re.match(r"[^\s$.,{}]+", rest)
            if bare is not None:
                return bare[0]
            continue
        depth = 0
        for i, char in enumerate(rest):
            escaped = i > 0 and rest[i - 1] == "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(char, 0)
            if depth == 0:
                return rest[1:i]
    return None


def find_answer(completion: str) -> str | None:
    """Return the last box's content; without a box, the end of the last line that says something.

    Of that line: the last formula between $, else what follows "answer is", "is" or "=", else all.
    """
    boxed = last_boxed(completion)
    if boxed is not None:
        return boxed
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    if not lines:
        return None
    formulas = INLINE_MATH.findall(lines[-1])
    if formulas:
        return formulas[-1][0] or formulas[-1][1]
    after = LEAD.sub("", lines[-1]).strip()
    return after.rpartition("=")[2].strip() or None


# --- equality ------------------------------------------------------------------------------------


def normalise(answer: str) -> str:
    """Return an answer in one spelling: the same letters where the same is meant.

    Taken out: spaces, $, \\left and \\right, sizes, degrees, %, units after a number, \\text around
    words, a leading "x =", a full stop, the
    brackets of (A). Rewritten: \\dfrac, \\tfrac, \\frac12 and a/b to (a)/(b);
    1,200 and 1{,}200 to 1200; \\sqrt3 to \\sqrt{3}; x_{2} to x_2.
    """
    text = answer.strip().replace("−", "-")
    text = re.sub(r"(?<!\\)\\[!,;:> ]|\\q?quad(?![A-Za-z])|~", " ", text.replace("{,}", ","))
    text = re.sub(r"\\\$|\$|\\\(|\\\)|\\\[|\\\]", "", text)
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])|\\[bB]ig{1,2}[lr]?(?![a-z])", "", text)
    text = re.sub(r"\\displaystyle(?![A-Za-z])", "", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![A-Za-z])|°", "", text)
    text = re.sub(r"\\?%", "", text)
    text = TEXT.sub(r" \1 ", text)
    text = re.sub(r"\s+", "", text).rstrip(".,;") if text.strip(" .,;") else text.strip()
    text = re.sub(r"^\\?[A-Za-z](?:\([a-z]\))?(?:=|\\in(?![A-Za-z]))", "", text)
    text = _fractions(text)
    text = re.sub(r"\\sqrt([0-9a-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"([_^])\{([0-9A-Za-z])\}", r"\1\2", text)
    text = UNITS.sub("", text)
    text = re.sub(r"^\(([A-Ea-e])\)$", r"\1", text)
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
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


def same_answer(answered: str, gold: str) -> bool:
    """Return whether two answers are equal: as normalised text, in value, or part by part.

    A tuple or interval must have the same brackets and the parts in order; the parts of a list
    without brackets may stand in any order, and "and" or "or" between them is a comma.
    """
    return _same(normalise(_list(answered)), normalise(_list(gold)))


def _list(answer: str) -> str:
    return re.sub(r"\\text\{\s*(?:and|or)\s*\}|\s(?:and|or)\s", ", ", answer)


def _same(answered: str, gold: str) -> bool:
    if answered == gold:
        return True
    left, right = to_number(answered), to_number(gold)
    if left is not None and right is not None:
        return left == right
    if answered[:1] + answered[-1:] == gold[:1] + gold[-1:] and gold[:1] in tuple("(["):
        mine, its = _parts(answered[1:-1]), _parts(gold[1:-1])
        return 1 < len(its) == len(mine) and all(map(_same, mine, its))
    mine, its = _parts(answered), _parts(gold)
    if len(mine) != len(its) or len(its) < 2:
        return False
    left_over = list(its)
    for part in mine:
        found = next((g for g in left_over if _same(part, g)), None)
        if found is None:
            return False
        left_over.remove(found)
    return True


def _parts(text: str) -> Sequence[str]:
    """Return what stands between commas outside all brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def verify_math(example: Example, completion: str, is_truncated: bool) -> Verdict:
    """Return whether the completion's answer equals the gold one."""
    del is_truncated  # by the text alone
    answered = find_answer(completion)
    if answered is None:
        return Verdict(False, "no answer")
    if not same_answer(answered, example.answer):
        return Verdict(False, f"answered {answered}, gold is {example.answer}")
    return Verdict(True, "right")


# --- the task ------------------------------------------------------------------------------------


def load_math500(config: Math500TaskConfig, key: str = "task.test") -> Task:
    """Return the MATH-500 task; without `train` its training split is empty.

    Example: load_math500(Math500TaskConfig(kind="math500", test="math500_test.jsonl"))
    """
    file = Source(config.test, key, "test.jsonl", f"{key}=PATH").find()
    held_out = _examples(file, "test", key)
    source: dict[str, str | int] = {
        "kind": "math500", "held_out": config.test, "held_out_rows": len(held_out),
        "held_out_sha256": hash_file(file),
    }  # fmt: skip
    train: list[Example] = []
    if config.train is not None:
        train_file = Source(config.train, "task.train", "train.jsonl", "task.train=PATH").find()
        train = _examples(train_file, "train", "task.train")
        shared = {e.question for e in train} & {e.question for e in held_out}
        if shared:
            raise UserError(
                f"task.train = {config.train!r} holds {len(shared)} of the {len(held_out)} "
                f"held-out problems, the first: {min(shared)[:60]!r}"
            )
        source |= {
            "train": config.train, "train_rows": len(train), "train_sha256": hash_file(train_file),
        }  # fmt: skip
    return Task("math500", train, held_out, verify_math, source=source)


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
