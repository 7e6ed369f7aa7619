"""Verifiers of a task of one's own: those that a recipe names, and functions of the user's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping

import numpy as np

from operando.errors import UserError
from operando.recipe.data import FileTaskConfig
from operando.tasks.gsm8k import GOLD, last_number
from operando.tasks.math500 import verify_math
from operando.tasks.mmlu import LETTERS, verify_letter
from operando.tasks.user_code import load_function, spelled_frames, user_frames
from operando.types import Example, Verdict

Verifier = Callable[[Example, str, bool], Verdict]
Labels = Callable[[Example, str, bool], Mapping[str, bool]]


def make_verifier(config: FileTaskConfig, prefix: str) -> Verifier:
    """Return the verifier that a config names; all but a user's own go by the text alone."""
    match config.verify:
        case "exact":
            return verify_exact
        case "number":
            return verify_number
        case "choice":
            return verify_letter
        case "math":
            return verify_math
        case "regex":
            return by_pattern(config.pattern, f"{prefix}pattern")
        case path:
            key = f"{prefix}verify"
            return verifier(load_function(path, key), f"{key} = {path!r}")


def gold_of(verify: str, answer: str, where: str) -> str:
    """Return an answer as the verifier compares it; one that could never be right is an error.

    Example: gold_of("number", "$1,250", "my.csv:3") == "1250"
    """
    match verify:
        case "number":
            gold = answer.replace(",", "").replace("$", "").strip()
            if not GOLD.fullmatch(gold):
                hint = (
                    ' For data in GSM8K\'s form there is kind = "gsm8k"' if "####" in gold else ""
                )
                raise UserError(f"{where}: verify = 'number' needs a number, got {answer!r}.{hint}")
            return gold
        case "choice":
            letter = answer.strip().strip("().").upper()
            if len(letter) != 1 or letter not in LETTERS:
                raise UserError(
                    f"{where}: verify = 'choice' needs a letter A to D, got {answer!r}. Put the "
                    "choices into the question with task.template, and their letter into a column"
                )
            return letter
        case _:
            return answer


# --- by name -------------------------------------------------------------------------------------


def verify_exact(example: Example, completion: str, is_truncated: bool) -> Verdict:
    """Return whether the completion is the answer: every character, runs of spaces being one.

    What a </think> ends does not count. Case and full stops do.
    """
    del is_truncated
    _, _, after = completion.rpartition("</think>")
    return _same(after, example.answer)


def verify_number(example: Example, completion: str, is_truncated: bool) -> Verdict:
    """Return whether the completion's last number has the answer's value, as in gsm8k."""
    del is_truncated
    return last_number(completion, example.answer)


def by_pattern(pattern: str, key: str) -> Verifier:
    """Return the verifier that compares the first group of the pattern's last match, as exact."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key} = {pattern!r} is not a regular expression: {error}") from error
    if not compiled.groups:
        raise UserError(
            f"{key} = {pattern!r} has no group: put what is compared with the answer in ( )"
        )

    def verify(example: Example, completion: str, is_truncated: bool) -> Verdict:
        del is_truncated
        found = list(compiled.finditer(completion))
        if not found:
            return Verdict(False, f"nothing matches {pattern}")
        return _same(found[-1][1] or "", example.answer)

    return verify


def _same(answered: str, gold: str) -> Verdict:
    said = " ".join(answered.split())
    if said != " ".join(gold.split()):
        return Verdict(False, f"answered {said}, gold is {gold}")
    return Verdict(True, "right")


# --- of the user's -------------------------------------------------------------------------------


def verifier(function: Callable[[Example, str], object], given: str = "verify") -> Verifier:
    """Return a function verify(example, completion) of your own as a Task's verifier.

    It returns True or False, or either with a reason: (False, "no city"). Anything else, and what
    it raises, is a UserError that names your own line; `given` is how errors name the function.

    Example: Task("echo", train, held_out, verify=verifier(lambda example, said: said == "yes"))
    """
    _check_parameters(function, given, "verify(example, completion)")

    def verify(example: Example, completion: str, is_truncated: bool) -> Verdict:
        del is_truncated
        said = _call(function, given, example, completion)
        match said:
            case bool() | np.bool_():
                return Verdict(bool(said), "right" if said else "wrong")
            case (bool() | np.bool_() as correct, str() as reason):
                return Verdict(bool(correct), reason)
            case _:
                raise UserError(
                    f"{given} returned {said!r:.80} on {example.id}; expected True, False, or "
                    "either with a reason: (False, 'no city'). A number between is a reward: "
                    '[rewards.NAME] with kind = "function"'
                )

    return verify


def own_labels(path: str, key: str) -> Labels:
    """Return a user's labels(example, completion) as a task's labels."""
    function = load_function(path, key)
    _check_parameters(function, f"{key} = {path!r}", "labels(example, completion)")

    def labels(example: Example, completion: str, is_truncated: bool) -> Mapping[str, bool]:
        del is_truncated
        said = _call(function, f"{key} = {path!r}", example, completion)
        names = list(said.items()) if isinstance(said, Mapping) else None
        if names is None or not all(
            isinstance(k, str) and isinstance(v, bool | np.bool_) for k, v in names
        ):
            raise UserError(
                f"{key} = {path!r} returned {said!r:.80} on {example.id}; expected names with True "
                'or False, such as {"refused": True}'
            )
        return {str(name): bool(value) for name, value in names}

    return labels


def _check_parameters(function: Callable[..., object], given: str, expected: str) -> None:
    if not callable(function):
        raise UserError(f"{given} is not a function; expected {expected}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C, and says nothing of what it takes
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise UserError(f"{given} takes {signature}; expected {expected}") from error


def _call(function: Callable[..., object], given: str, example: Example, completion: str) -> object:
    try:
        return function(example, completion)
    except Exception as error:  # rewritten, never swallowed: no broken verifier is a wrong answer
        where = spelled_frames(user_frames(error))
        raise UserError(
            f"{given} raised {type(error).__name__}: {error}{where}\non {example.id} "
            f"({example.question[:80]!r}) and the completion {completion[:300]!r}"
        ) from error
