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
import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from operando.errors import UserError, nearest
from operando.recipe import Gsm8kTaskConfig
from operando.run import hash_file
from operando.tasks.base import Task
from operando.types import Example, Verdict

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

CALCULATOR = re.compile(r"<<[^>]*>>")
GOLD = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")

VERL_CHARS = 300
VERL_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
VERL_FLEXIBLE = re.compile(r"(\-?[0-9\.\,]+)")

# A minus is a sign unless it stands after a digit, a letter or a bracket: "16-3" ends in 3.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-−])?\s?\$?\s?(?P<inner_sign>(?<=\$)[-−])?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
)


class Row(NamedTuple):
    """One line of a data file and where it stands."""

    question: str
    answer: str
    where: str


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
    """Return whether the last number equals the gold answer in value.

    With '####' in the text it is the first number after the last '####'. A leading "$", thousands
    commas, "%" and a full stop do not matter: "$1,000.00." is 1000.
    """
    _, mark, after = completion.rpartition("####")
    found = list(NUMBER.finditer(after))
    if not found:
        return Verdict(False, "no number after '####'" if mark else "no number")
    number = found[0] if mark else found[-1]
    minus = "-" if number["sign"] or number["inner_sign"] else ""
    answered = minus + number["digits"].replace(",", "")
    if Decimal(answered) != Decimal(gold):
        return Verdict(False, f"answered {answered}, gold is {gold}")
    return Verdict(True, "right")


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


def load_gsm8k(config: Gsm8kTaskConfig) -> Task:
    """Return the GSM8K task.

    Example: load_gsm8k(Gsm8kTaskConfig(kind="gsm8k", train="gsm8k_train.jsonl.gz",
                                        test="gsm8k_test.jsonl"))
    """
    train_file = _find(config.train, "train")
    test_file = _find(config.test, "test")
    train_hash, test_hash = hash_file(train_file), hash_file(test_file)
    if train_hash == test_hash:
        raise UserError(
            f"task.train = {config.train!r} and task.test = {config.test!r} are the same file: the "
            "held-out problems would be trained on"
        )
    train, held_out = _examples(train_file, "train"), _examples(test_file, "test")
    if config.num_held_out is not None:
        if config.num_held_out > len(held_out):
            raise UserError(
                f"task.num_held_out = {config.num_held_out}, but {config.test} has only "
                f"{len(held_out)} problems"
            )
        held_out = held_out[: config.num_held_out]
    return Task(
        name="gsm8k",
        train=train,
        held_out=held_out,
        verify=functools.partial(_verify, SCORERS[config.scorer]),
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


def to_example(row: Row, split: str, number: int) -> Example:
    """Return a row as an example; the gold answer stands after '####'."""
    worked, mark, end = row.answer.rpartition("####")
    gold = end.strip().replace(",", "")
    if not mark:
        raise UserError(f"{row.where}: the answer has no '####' before its result: {row.answer!r}")
    if not GOLD.fullmatch(gold):
        raise UserError(f"{row.where}: expected a number after '####', got {end.strip()!r}")
    solution = CALCULATOR.sub("", worked).strip()
    return Example(
        id=f"gsm8k/{split}/{number}",
        question=row.question.strip(),
        answer=gold,
        solution=solution,
        columns={"answer": gold, "solution": solution},
    )


def _examples(file: Path, split: str) -> list[Example]:
    examples = [to_example(row, split, i) for i, row in enumerate(_rows(file))]
    if not examples:
        raise UserError(f"task.{split}: {file} has no rows")
    return examples


# --- files ---------------------------------------------------------------------------------------


def _find(source: str, split: str) -> Path:
    """Return the file that a path or hub id means."""
    file = Path(source)
    if file.is_file():
        if not source.endswith(SUFFIXES):
            raise UserError(
                f"task.{split} = {source!r}: expected a file ending in {', '.join(SUFFIXES)}"
            )
        return file
    if not source.endswith(SUFFIXES) and not file.exists() and HUB_ID.fullmatch(source):
        return _download(source, split)
    folder = file if file.is_dir() else file.parent
    there = sorted(f.name for f in folder.glob("*") if f.name.endswith(SUFFIXES))
    raise UserError(
        f"task.{split} = {source!r}: no such file, and not a hub id such as openai/gsm8k."
        f"{nearest(file.name, there)} Data files in {folder}: {', '.join(there[:8]) or 'none'}"
    )


def _download(repo: str, split: str) -> Path:
    try:
        return Path(
            hf_hub_download(
                repo_id=repo, repo_type="dataset", filename=f"main/{split}-00000-of-00001.parquet"
            )
        )
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"task.{split} = {repo!r} can't be had from the Hugging Face hub ({first}). With local "
            "files (.jsonl, .jsonl.gz or .parquet): task.train=PATH task.test=PATH"
        ) from error


def _rows(file: Path) -> Iterator[Row]:
    return _parquet_rows(file) if file.name.endswith(".parquet") else _jsonl_rows(file)


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        table = pq.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file: {error}") from error
    for i, row in enumerate(table.to_pylist()):
        yield _row(row, f"{file}: row {i}")


def _jsonl_rows(file: Path) -> Iterator[Row]:
    # Not splitlines: a JSON string may hold U+2028 and its like, and one question does.
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = raw.decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: can't be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: not JSON: {error}") from error
        yield _row(row, f"{file}:{number}")


def _row(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with `question` and `answer`, got {row!r}")
    for key in ("question", "answer"):
        if key not in row:
            known = [str(k) for k in row]
            raise UserError(
                f"{where}: no `{key}`.{nearest(key, known)} Keys there: {', '.join(known)}"
            )
        if not isinstance(row[key], str) or not row[key].strip():
            raise UserError(f"{where}: `{key}` must be text, got {row[key]!r}")
    return Row(row["question"], row["answer"], where)
