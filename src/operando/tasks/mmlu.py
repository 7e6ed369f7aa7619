"""MMLU: four-choice questions of 57 subjects (2009.03300), from the hub or from local files.

    Question: What is the embryological origin of the hyoid bone?
    A. The first pharyngeal arch
    B. The first and second pharyngeal arches
    C. The second pharyngeal arch
    D. The second and third pharyngeal arches
    Answer: D

The 285 questions of the dev split serve as worked examples and as training set; the 14,042 of the
test split are held out. Both stand in the order of the sha256 of their ids, so that the first n
problems are a sample over all subjects, the same everywhere. Worked examples are the first of the
dev split in that order, not those of the question's own subject as in the paper's five shots.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from operando.errors import UserError
from operando.recipe.data import MmluTaskConfig
from operando.run import hash_file
from operando.tasks.base import Task, TaskText
from operando.tasks.files import Row, Source, read_rows
from operando.tasks.loops import cut_at_next_question
from operando.types import Example, Verdict

TEXT = TaskText(
    raw="Question: {question}\nAnswer:",
    chat="{question}\nAnswer with the letter of the right choice.",
    answer=" {answer}",
)
LETTERS = "ABCD"
SUFFIXES = (".tar.gz", ".parquet")
SPLITS = ("test", "dev")

# "A's", "A-level", "D2", "C++" and "e.g. A_1" hold no letter that stands alone.
END = r"(?![\w'’+]|-\w)"
REFUSED = r"(?!\)?\s+(?:is\s+(?:not|wrong|incorrect|false)|isn['’]t)\b)"
STANDALONE = re.compile(rf"(?<![\w'’+-])(?<!\bnot )[A-D]{END}{REFUSED}")
# The article: "A dog ..."; but "A is right", "A because ..." name the choice.
ARTICLE = re.compile(r"[Aa]\s+(?!(?:is|because|since|as|or|and)\b)[a-z]")
MARKS = r"[\s*_\"'“”‘’`(\[{$]*+(?:\\(?:boxed|text|textbf|mathrm|mathbf)\s*+\{[\s*(\"'“‘]*+)?+"
IS = r"(?:[\s*]*+(?:is\b\s*+:?|:|=|would\s+be\b|must\s+be\b)|_)"
NAMED = rf"(?:(?:option|choice|letter|answer)\b{MARKS})?(?P<letter>[A-D]){END}"
OTHER = (
    r"(?<!wrong )(?<!incorrect )(?<!other )(?<!false )(?<!common )(?<!possible )(?<!tempting )"
    r"(?<!remaining )(?<!next )(?<!next-)(?<!second )(?<!second-)"
)
STATED = re.compile(
    rf"{OTHER}\banswer(?:\s+(?:option|choice|letter))?{IS}{MARKS}{NAMED}|"
    rf"\\boxed\s*\{{{MARKS}(?P<boxed>[A-D])\)?\}}",
    re.IGNORECASE,
)
CHOSEN = re.compile(
    rf"{OTHER}\b(?:correct|best|right|final)\s+(?:option|choice|one|letter|statement)\s+"
    rf"(?:is|would\s+be|must\s+be)\b(?:\s*:)?{MARKS}{NAMED}",
    re.IGNORECASE,
)
# "Here is my answer:", then "A. ..." and "B. ..." on lines of their own.
LISTED = re.compile(rf"[).:][^\n]*\n(?:[^\n]*\n)*?{MARKS}B[).:]")
LEADING = re.compile(rf"{MARKS}(?P<letter>[A-D]){END}")
LEADING_ALONE = re.compile(
    rf"{MARKS}(?P<letter>[A-Da-d])(?=[\s*\"'”’`\]}}$]*(?:[).:,;\n]|because\b|since\b|$))"
)
CONCLUDED = re.compile(
    rf"(?:\b(?:so|thus|hence|therefore|choose|pick|select|it's|it\s+is)\b,?{MARKS}"
    rf"(?P<letter>[A-D]){END}|(?<![\w'’+-])(?P<right>[A-D])\)?\s+is\s+(?:the\s+)?"
    r"(?i:right|correct|best)\b)"
)
ANOTHER = re.compile(rf"[)\s*\"'”’`\]}}$]*(?:,|/|&|\bor\b|\band\b){MARKS}[A-D]{END}")
DENIED = re.compile(r"\)?\s+(?:is|would|could|can|isn't|isn’t|might|may)\b")


class Quiz(NamedTuple):
    """One row as the file has it."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


# --- the verifier --------------------------------------------------------------------------------


def find_letter(completion: str) -> str | None:
    """Return the letter that a completion answers with, or None.

    Only what follows the last </think> counts, up to a next question of the model's own. The first
    of these that it holds decides:

    1. what it states: "the answer is B", "Answer: (b)", "\\boxed{B}"; the last one of several. No
       "wrong answer", "other answer" or the like, and no "answer:" that lists A, B, ... on lines;
    2. "the correct option is B", and best, right, final; choice, one. The last one. "Option: B",
       "each option: A" and "the other option is B" state nothing;
    3. a letter that it begins with and that stands apart: "B", "(b) because", "'B'.";
    4. what it concludes: "so B", "B is right"; the last one;
    5. a letter that it begins with, unless "is", "could" ... follow;
    6. the one capital letter that stands alone anywhere, "not A" and "A is wrong" apart: of two
       different ones neither counts.

    A choice of several ("B or C", "A, B") is no answer, since a policy would name them all. A
    letter stands alone with no letter, digit, "_", apostrophe or "+" beside it and no hyphen that
    joins it to a word; an "A" before a lower-case word is the article, unless that word is is,
    because, since, as, or, and. Limit: where nothing else is named, "vitamin C" names C.
    """
    text = unicodedata.normalize("NFKC", completion)
    _, closed, after = text.rpartition("</think>")
    text = after if closed else text.partition("<think>")[0]
    text = cut_at_next_question(text)
    leading = LEADING.match(text)
    rules = (
        [m for m in STATED.finditer(text) if not _is_list(text, m)][-1:],
        list(CHOSEN.finditer(text))[-1:],
        [m for m in [LEADING_ALONE.match(text)] if m],
        list(CONCLUDED.finditer(text))[-1:],
        [leading] if leading and not DENIED.match(text, leading.end()) else [],
    )
    for found in rules:
        for match in found:
            at = match.end(match.lastgroup or 0)
            if ARTICLE.match(text, at - 1):
                continue
            if ANOTHER.match(text, at):
                return None
            return text[at - 1].upper()
    letters = {m[0] for m in STANDALONE.finditer(text) if not ARTICLE.match(text, m.start())}
    return letters.pop() if len(letters) == 1 else None


def _is_list(text: str, stated: re.Match[str]) -> bool:
    """Return whether a stated "A" only begins a list of all choices, each on its own line."""
    at = stated.end(stated.lastgroup or 0)
    return text[at - 1].upper() == "A" and "\n" in stated[0] and LISTED.match(text, at) is not None


def verify_letter(example: Example, completion: str, is_truncated: bool) -> Verdict:
    """Return whether the letter that a completion answers with is the right one."""
    del is_truncated  # by the text alone
    letter = find_letter(completion)
    if letter is None:
        return Verdict(False, "no one letter A to D as the answer")
    if letter != example.answer:
        return Verdict(False, f"answered {letter}, gold is {example.answer}")
    return Verdict(True, "right")


# --- the task ------------------------------------------------------------------------------------


def load_mmlu(config: MmluTaskConfig, prefix: str = "task.") -> Task:
    """Return the MMLU task. `prefix` stands before the keys in errors.

    Example: load_mmlu(MmluTaskConfig(kind="mmlu", source="mmlu_csv.tar.gz"))
    """
    key = f"{prefix}source"
    splits: dict[str, list[Example]] = {}
    source: dict[str, str | int] = {"kind": "mmlu", "source": config.source}
    for split, name in zip(SPLITS, ("held_out", "train"), strict=True):
        quizzes, digest = _read(config.source, split, key)
        examples = _examples(quizzes, split)
        if not examples:
            raise UserError(f"{key} = {config.source!r}: the {split} split has no rows")
        splits[split] = examples
        source |= {f"{name}_rows": len(examples), f"{name}_sha256": digest}
    return Task("mmlu", splits["dev"], splits["test"], verify_letter, text=TEXT, source=source)


def _examples(quizzes: Sequence[Quiz], split: str) -> list[Example]:
    seen: dict[str, int] = {}
    examples = []
    for quiz in quizzes:
        number = seen[quiz.subject] = seen.get(quiz.subject, -1) + 1
        choices = "\n".join(
            f"{letter}. {text}" for letter, text in zip(LETTERS, quiz.choices, strict=True)
        )
        letter = LETTERS[quiz.answer]
        examples.append(
            Example(
                id=f"mmlu/{split}/{quiz.subject}/{number}",
                question=f"{quiz.question}\n{choices}",
                answer=letter,
                columns={"answer": letter, "subject": quiz.subject},
            )
        )
    return sorted(examples, key=lambda e: hashlib.sha256(e.id.encode()).digest())


# --- files ---------------------------------------------------------------------------------------


def _read(given: str, split: str, key: str) -> tuple[list[Quiz], str]:
    """Return the rows of a split and the sha256 of what they came from."""
    if Path(given).is_dir():
        texts = {f.name: f.read_bytes() for f in _csv_files(Path(given), split)}
        return _csv_quizzes(texts, split, given, key), _digest(texts)
    remedy = f"{key}=PATH (the csv files as a folder or .tar.gz)"
    hub_file = f"all/{split}-00000-of-00001.parquet"
    file = Source(given, key, hub_file, remedy, SUFFIXES).find()
    if file.name.endswith(".tar.gz"):
        return _csv_quizzes(_unpack(file, split), split, given, key), hash_file(file)
    if given.endswith(".parquet"):
        raise UserError(
            f"{key} = {given!r}: one parquet file holds one split; give a hub id, or the csv files "
            "of test and dev as a folder or .tar.gz"
        )
    return [_from_parquet(row) for row in read_rows(file)], hash_file(file)


def _csv_files(folder: Path, split: str) -> list[Path]:
    return sorted(folder.rglob(f"*_{split}.csv"))


def _digest(texts: Mapping[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name, text in sorted(texts.items()):
        whole.update(name.encode() + b"\0" + text + b"\0")
    return whole.hexdigest()


def _unpack(file: Path, split: str) -> dict[str, bytes]:
    try:
        with tarfile.open(file) as archive:
            texts: dict[str, bytes] = {}
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None and member.name.endswith(f"_{split}.csv"):
                    texts[Path(member.name).name] = stream.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{file}: not a readable .tar.gz: {error}") from error
    return dict(sorted(texts.items()))


def _csv_quizzes(texts: Mapping[str, bytes], split: str, given: str, key: str) -> list[Quiz]:
    if not texts:
        raise UserError(
            f"{key} = {given!r}: no file like anatomy_{split}.csv in it; expected the csv files of "
            "test and dev"
        )
    return [quiz for name, text in texts.items() for quiz in _from_csv(text, name, split)]


def _from_csv(raw: bytes, name: str, split: str) -> Iterator[Quiz]:
    """Return the rows of question, four choices, answer (A-D or 0-3), with or without a header."""
    subject = name.removesuffix(f"_{split}.csv")
    try:
        rows = list(csv.reader(io.StringIO(raw.decode("utf-8"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name}: not readable csv: {error}") from error
    for number, row in enumerate(rows, start=1):
        if number == 1 and row[:1] == ["question"]:
            continue
        if len(row) != 6:
            raise UserError(
                f"{name}: row {number}: expected question, 4 choices, answer; got {len(row)} fields"
            )
        yield _quiz(subject, row[0], row[1:5], row[5], f"{name}: row {number}")


def _from_parquet(row: Row) -> Quiz:
    choices = row.values.get("choices")
    if not isinstance(choices, list) or len(choices) != 4:
        raise UserError(f"{row.where}: `choices` must be four texts, got {choices!r}")
    answer = str(row.values.get("answer"))
    texts = [str(c) for c in choices]
    return _quiz(row.text("subject"), row.text("question"), texts, answer, row.where)


def _quiz(subject: str, question: str, choices: Sequence[str], answer: str, where: str) -> Quiz:
    at = "0123".find(answer) if answer.isdigit() else LETTERS.find(answer)
    if len(answer) != 1 or at < 0:
        raise UserError(f"{where}: the answer must be A to D or 0 to 3, got {answer!r}")
    return Quiz(subject, question.strip(), tuple(c.strip() for c in choices), at)
