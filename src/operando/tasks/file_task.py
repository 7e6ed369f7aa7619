"""A task of one's own: questions and answers from files or the hub, and who says what is right.

[task]
kind = "file"
train = "capitals.csv"
question = "question"
answer = "capital"
verify = "exact"
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from operando.errors import UserError, nearest
from operando.files import brief
from operando.recipe.data import FileTaskConfig
from operando.tasks.base import Task, TaskText
from operando.tasks.files import Row, read_data
from operando.tasks.user_code import code_digest, load_function
from operando.tasks.verifiers import gold_of, make_verifier, own_labels
from operando.types import Example

TEXT = TaskText(answer=" {answer}")
REWARD_KEYWORDS = frozenset(
    {
        "prompts",
        "completions",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "trace",
    }
)
"""What a reward function is given beside the columns."""


class Asked(NamedTuple):
    """What is asked in a row: the question, and its own system message or ""."""

    question: str
    system: str


def load_file_task(config: FileTaskConfig, prefix: str = "task.") -> Task:
    """Return the task of a file. `prefix` stands before the keys in errors.

    Example: load_file_task(FileTaskConfig(kind="file", train="my.csv", question="q", answer="a",
                                           verify="exact"))
    """
    verify = make_verifier(config, prefix)
    labels = own_labels(config.labels, f"{prefix}labels") if config.labels else None
    data = read_data(config.train, f"{prefix}train", "train")
    train = to_examples(data.rows, config, "train", prefix)
    source: dict[str, str | int] = {
        "kind": "file",
        "grader": config.verify,
        "train": config.train,
        "train_sha256": data.sha256,
    }
    if config.test is None:
        train, held_out = split_by_hash(train, config.held_out_share, config.seed)
        source["held_out"] = f"{config.held_out_share:g} of train by seed {config.seed}"
    else:
        other = read_data(config.test, f"{prefix}test", "test")
        held_out = to_examples(other.rows, config, "test", prefix)
        train = without_overlap(train, held_out, config, prefix)
        source |= {"held_out": config.test, "held_out_sha256": other.sha256}
    train = _first(train, config.num_train, f"{prefix}num_train")
    held_out = _first(held_out, config.num_held_out, f"{prefix}num_held_out")
    for key, path in (("verify", config.verify), ("labels", config.labels)):
        if ":" in path:
            source[f"{key}_sha256"] = code_digest(load_function(path, f"{prefix}{key}"))
    source |= {"train_rows": len(train), "held_out_rows": len(held_out)}
    check_columns([*train, *held_out])
    return Task("file", train, held_out, verify, labels=labels, text=TEXT, source=source)


# --- rows ----------------------------------------------------------------------------------------


def to_examples(
    rows: Sequence[Row], config: FileTaskConfig, split: str, prefix: str = "task."
) -> list[Example]:
    """Return the rows as examples; every column goes along under its own name."""
    if not rows:
        raise UserError(f"{prefix}{split} has no rows")
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    _check_names(names, config, f"{prefix}%s = %r: {rows[0].where}")
    examples = []
    for number, row in enumerate(rows):
        asked = _asked(row, config)
        answer = _text(row, config.answer, "answer") if config.answer else ""
        examples.append(
            Example(
                id=f"file/{split}/{number}",
                question=asked.question,
                answer=gold_of(config.verify, answer, row.where).strip(),
                columns={name: row.values.get(name) for name in names},
                system=asked.system,
            )
        )
    return examples


def _check_names(names: Sequence[str], config: FileTaskConfig, told: str) -> None:
    """Refuse columns that are not there, and names that a reward's own keywords have."""
    if config.template:
        try:
            parts = list(string.Formatter().parse(config.template))
        except ValueError as error:
            where = told % ("template", config.template)
            raise UserError(f"{where}: {error}; write '{{{{' for a brace") from error
        asked = [("template", name) for _, name, _, _ in parts if name is not None]
    else:
        asked = [("question", config.question)]
    asked += [(key, name) for key in ("answer", "system") if (name := getattr(config, key))]
    for key, name in asked:
        if name not in names:
            given = told % (key, config.template if key == "template" else name)
            raise UserError(
                f"{given} has no column {name!r}.{nearest(name, names)} Columns there: "
                f"{', '.join(names)}"
            )
    taken = sorted(REWARD_KEYWORDS.intersection(names))
    if taken:
        raise UserError(
            f"{told.partition(': ')[2]}: the column {taken[0]!r} has the name of what every reward "
            "function is given: rename it in the data"
        )


def _asked(row: Row, config: FileTaskConfig) -> Asked:
    if row.values.get("tools"):
        raise UserError(
            f"{row.where}: a column `tools`: operando asks one question and grades one answer, and "
            "has no calls of tools in between"
        )
    system = _text(row, config.system, "system") if config.system else ""
    if config.template:
        parts = string.Formatter().parse(config.template)
        question = "".join(
            literal + (_text(row, name, "template") if name is not None else "")
            for literal, name, _, _ in parts
        )
        return Asked(question.strip(), system)
    held = row.values.get(config.question)
    if not isinstance(held, list):
        return Asked(_text(row, config.question, "question"), system)
    return _of_messages(held, system, f"{row.where}: `{config.question}`")


def _of_messages(messages: Sequence[object], system: str, where: str) -> Asked:
    """Return the one user message, with the system message before it if there is one."""
    turns = [(m.get("role"), m.get("content")) for m in messages if isinstance(m, Mapping)]
    roles = [role for role, _ in turns]
    if len(turns) < len(messages) or roles not in (["user"], ["system", "user"]):
        raise UserError(
            f"{where}: messages of {', '.join(map(str, roles)) or brief(list(messages))}; operando "
            "asks one question and grades one answer: expected one user message, or a system and a "
            "user message. Several turns and calls of tools are not trained on"
        )
    if not all(isinstance(text, str) and text.strip() for _, text in turns):
        raise UserError(f"{where}: a message whose content is no text; images are not read")
    own = str(turns[0][1]) if roles[0] == "system" else ""
    if own and system:
        raise UserError(f"{where} holds a system message, and task.system names a column too")
    return Asked(str(turns[-1][1]).strip(), own or system)


def _text(row: Row, column: str, key: str) -> str:
    """Return a column's value as text; nothing in it, and what is no one value, is an error."""
    value = row.values.get(column)
    is_empty = value is None or value != value or (isinstance(value, str) and not value.strip())
    if is_empty:
        raise UserError(f"{row.where}: task.{key}: the column {column!r} is empty there")
    if not isinstance(value, str | int | float):
        raise UserError(
            f"{row.where}: task.{key}: the column {column!r} must be a text or a number, got "
            f"{brief(value)}"
        )
    return str(value).strip()


def check_columns(examples: Sequence[Example]) -> None:
    """Refuse columns that the rollouts' parquet could not hold, and images."""
    names = dict.fromkeys(name for one in examples for name in one.columns)
    for name in names:
        values = [one.columns.get(name) for one in examples]
        if any(isinstance(v, bytes) or (isinstance(v, Mapping) and "bytes" in v) for v in values):
            raise UserError(
                f"the column {name!r} holds bytes, as images and sounds do: operando trains on "
                "text. Leave it out of the data"
            )
        try:
            pa.array(values)
        except (pa.ArrowException, OverflowError) as error:
            raise UserError(
                f"the column {name!r} must hold values of one kind: {str(error).splitlines()[0]}"
            ) from error


# --- splits --------------------------------------------------------------------------------------


def question_key(example: Example, *, fold: bool = False) -> str:
    """Return what makes two questions the same: system message and question, runs of spaces being
    one; `fold`: case doesn't count either."""
    key = " ".join(f"{example.system}\n{example.question}".split())
    return key.casefold() if fold else key


def split_by_hash(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Return training and held-out examples; a question is on one side however often it stands.

    Questions are ordered by sha256(seed/question), case and spaces apart, and the first `share` of
    them, at least one, are held out, in that order. A row's side does not depend on its place.
    """

    def rank(key: str) -> bytes:
        return hashlib.sha256(f"{seed}/{key}".encode()).digest()

    keys = [question_key(one, fold=True) for one in examples]
    order = sorted(set(keys), key=rank)
    places = {key: place for place, key in enumerate(order[: max(1, round(share * len(order)))])}
    train = [one for one, key in zip(examples, keys, strict=True) if key not in places]
    held = [(places[key], one) for one, key in zip(examples, keys, strict=True) if key in places]
    return train, [one for _, one in sorted(held, key=lambda pair: pair[0])]


def without_overlap(
    train: Sequence[Example], held_out: Sequence[Example], config: FileTaskConfig, prefix: str
) -> list[Example]:
    """Return the training examples, none of whose questions is held out too."""
    keys = {question_key(one) for one in held_out}
    kept = [one for one in train if question_key(one) not in keys]
    if len(kept) < len(train) and config.overlap == "error":
        both = next(one for one in train if question_key(one) in keys)
        raise UserError(
            f"{len(train) - len(kept)} of {len(train)} questions of {prefix}train = "
            f"{config.train!r} are also in {prefix}test = {config.test!r}, so the held-out "
            f"questions would be trained on; the first: {both.question[:80]!r}. overlap = "
            '"drop_train" leaves them out of train'
        )
    return kept


def _first(examples: list[Example], num: int | None, key: str) -> list[Example]:
    if num is not None and num > len(examples):
        raise UserError(f"{key} = {num}, but there are only {len(examples)} questions")
    return examples[:num]
