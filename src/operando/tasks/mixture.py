"""Sources of training text: generators and files, each with its rows and its hash.

A source gives documents: a prompt as reinforcement learning would show it, and the answer. Plain
text is an answer without a prompt. What can't be read is an error; nothing is put in its place, and
no source is left out or repeated without being told to.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from operando.errors import UserError
from operando.files import read_text
from operando.models.tokens import text_ids
from operando.recipe.mixture import (
    ClrsSource,
    GraphSearchSource,
    Gsm8kSource,
    InstructionsSource,
    PairsSource,
    SourceConfig,
    TextSource,
    WordsSource,
)
from operando.run import hash_file
from operando.tasks import clrs, graph_search, gsm8k, words
from operando.tasks.files import SUFFIXES, Row, Source, read_rows
from operando.tasks.gsm8k import gsm8k_source, to_example

TEXT_SUFFIXES = (".txt", ".txt.gz")
CHUNK = 256  # documents tokenized at once
FileSource = Gsm8kSource | TextSource | PairsSource | InstructionsSource


class Document(NamedTuple):
    """A prompt and its answer. Example: Document("Q: Ann has 2 pens ...\\nA:", " 2+1=3 #### 3")"""

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Reader:
    """A source that can be read. `facts` go into the manifest; `limit` says why it may end."""

    name: str
    documents: Iterator[Document]
    facts: Mapping[str, str | int]
    limit: str


@dataclass(frozen=True)
class Taken:
    """The documents of one source as ids, each with its end token; the last may be cut."""

    ids: list[list[int]]
    facts: Mapping[str, str | int]


# --- reading -------------------------------------------------------------------------------------


def open_source(name: str, config: SourceConfig, key: str, seed: int) -> Reader:
    """Return the source; `key` is its table in the recipe, e.g. "mixture.sources.wiki"."""
    if isinstance(config, ClrsSource | GraphSearchSource | WordsSource):
        documents = _generate(config, random.Random(f"{seed}/sources/{name}"))
        return Reader(name, documents, {"kind": config.kind, "path": "generated"}, "")
    file = _find(config, f"{key}.path")
    documents, left_out = _read(config, file)
    if not documents:
        raise UserError(f"{key}.path = {config.path!r}: {file} has no documents")
    facts: dict[str, str | int] = {
        "kind": config.kind,
        "path": config.path,
        "file_sha256": hash_file(file),
        "file_rows": len(documents),
        **left_out,
    }
    limit = (
        f"{file} has {len(documents)} documents, and {key}.max_passes = {config.max_passes}. "
        "Lower its weight or the total, raise max_passes, or name a larger file"
    )
    return Reader(name, _passes(name, documents, config.max_passes, seed), facts, limit)


def _generate(
    config: ClrsSource | GraphSearchSource | WordsSource, rng: random.Random
) -> Iterator[Document]:
    match config:
        case ClrsSource():
            for e in clrs.stream(config.sizes, config.hints, "train", rng):
                yield Document(e.question, clrs.TEXT.worked(e.solution, e.answer))
        case GraphSearchSource():
            for e in graph_search.stream(config.sizes, "train", rng):
                walk, mark, path = e.solution.partition("Answer:")
                answer = f"{walk}{mark}{path}" if config.trace else f"{mark}{path}"
                text = graph_search.TEXT
                yield Document(text.prompt(e.question), text.worked(answer, e.answer))
        case WordsSource():
            while True:
                e = words.make_problem(rng, rng.choice(config.num_steps), config.max_number)
                if not words.is_held_out(e.solution):
                    text = words.TEXT
                    yield Document(text.prompt(e.question), text.worked(e.solution, e.answer))


def _passes(
    name: str, documents: Sequence[Document], num_passes: int, seed: int
) -> Iterator[Document]:
    for number in range(num_passes):
        order = list(range(len(documents)))
        random.Random(f"{seed}/sources/{name}/pass/{number}").shuffle(order)
        for i in order:
            yield documents[i]


def _find(config: FileSource, key: str) -> Path:
    if isinstance(config, Gsm8kSource):
        return gsm8k_source(config.path, "train", key, f"{key}=PATH").find()
    suffixes = (*TEXT_SUFFIXES, *SUFFIXES) if isinstance(config, TextSource) else SUFFIXES
    is_local = Path(config.path).exists() or config.path.endswith(suffixes)
    if not is_local and config.hub_file is None:
        raise UserError(
            f"{key} = {config.path!r}: no such file; if it is a hub id, name the file in it as "
            f"{key.removesuffix('path')}hub_file"
        )
    return Source(config.path, key, config.hub_file or "", f"{key}=PATH", suffixes).find()


def _read(config: FileSource, file: Path) -> tuple[list[Document], Mapping[str, int]]:
    """Return the documents of a file, and how many of its rows are empty or too long."""
    if file.name.endswith(TEXT_SUFFIXES):
        return [Document("", block) for block in _blocks(file)], {}
    found = [document for row in read_rows(file) for document in _of_row(config, row)]
    full = [document for document in found if document.answer.strip()]
    left_out = {"rows_empty": len(found) - len(full)}
    if not isinstance(config, PairsSource | InstructionsSource) or config.max_chars is None:
        return full, left_out
    short = [document for document in full if len(document.text) <= config.max_chars]
    return short, {**left_out, "rows_too_long": len(full) - len(short)}


def _blocks(file: Path) -> list[str]:
    blocks: list[list[str]] = [[]]
    for line in read_text(file).split("\n"):
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return ["\n".join(block) for block in blocks if block]


def _of_row(config: FileSource, row: Row) -> list[Document]:
    match config:
        case Gsm8kSource():
            e = to_example(row, "train", 0)
            text = gsm8k.TEXT
            return [Document(text.prompt(e.question), text.worked(e.solution, e.answer))]
        case TextSource():
            if row.values.get(config.column) == "":
                return [Document("", "")]  # WikiText has such rows between its paragraphs
            return [Document("", row.text(config.column))]
        case PairsSource():
            question, answer = row.text(config.question), row.text(config.answer)
            return [Document(f"Q: {question.strip()}\nA:", f" {answer.strip()}")]
        case InstructionsSource():
            return _instructions(row)


def _instructions(row: Row) -> list[Document]:
    asked = row.text("instruction").strip()
    rows = [row]
    if "instances" in row.values:
        instances = row.values["instances"]
        if not isinstance(instances, list) or not all(isinstance(i, dict) for i in instances):
            raise UserError(f"{row.where}: `instances` must be a list of objects: {instances!r}")
        rows = [Row(instance, row.where) for instance in instances]
    documents = []
    for one in rows:
        key = "response" if "response" in one.values else "output"
        if not isinstance(one.values.get(key), str):
            raise UserError(
                f"{one.where}: an instruction needs a text as `response` or `output`, also in each "
                f"of its `instances`. Keys there: {', '.join(map(str, one.values))}"
            )
        given = one.values.get("input") or ""
        question = f"{asked}\n{given}" if given else asked
        documents.append(Document(f"Q: {question}\nA:", f" {str(one.values[key]).strip()}"))
    return documents


# --- taking --------------------------------------------------------------------------------------


def shares(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Return whole numbers that add up to `total`, each less than 1 off its weight's share.

    Example: shares(10, {"a": 0.5, "b": 0.33, "c": 0.17}) == {"a": 5, "b": 3, "c": 2}
    """
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    parts = {name: int(value) for name, value in exact.items()}
    by_rest = sorted(exact, key=lambda name: parts[name] - exact[name])
    for name in by_rest[: total - sum(parts.values())]:
        parts[name] += 1
    empty = [name for name, part in parts.items() if part == 0]
    if empty:
        raise UserError(f"sources {', '.join(empty)}: their share of {total} is 0; raise the total")
    return parts


def take_tokens(reader: Reader, tokenizer: PreTrainedTokenizerBase, budget: int) -> Taken:
    """Return exactly `budget` tokens of a source: documents in order, the last one cut."""
    eos = _eos(tokenizer)
    ids: list[list[int]] = []
    digest, left = hashlib.sha256(), budget
    while left:
        chunk = list(islice(reader.documents, CHUNK))
        if not chunk:
            raise UserError(
                f"source {reader.name}: {budget - left:,} of its share of {budget:,} tokens are "
                f"there: {reader.limit}"
            )
        for document, one in zip(chunk, encode_texts(reader, tokenizer, chunk), strict=True):
            digest.update(document.text.encode())
            ids.append([*one, eos][:left])
            left -= len(ids[-1])
            if not left:
                break
    facts = {"rows": len(ids), "tokens": budget, "sha256": digest.hexdigest()}
    return Taken(ids, {**reader.facts, **facts})


def take_pairs(reader: Reader, num: int) -> tuple[list[Document], Mapping[str, str | int]]:
    """Return `num` documents of a source and what the manifest says of them."""
    found = list(islice(reader.documents, num))
    if len(found) < num:
        raise UserError(
            f"source {reader.name}: {len(found)} of its share of {num} pairs are there: "
            f"{reader.limit}"
        )
    digest = hashlib.sha256("".join(document.text for document in found).encode())
    return found, {**reader.facts, "rows": num, "sha256": digest.hexdigest()}


def encode_texts(
    reader: Reader, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> list[list[int]]:
    """Return the ids of texts; one that holds a special token, or is not held, is an error."""
    check_plain(reader.name, tokenizer, documents)
    texts = [document.text for document in documents]
    return text_ids(tokenizer, texts, f"source {reader.name}: a document")


def check_plain(
    name: str, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]
) -> None:
    """Raise if a document spells a special token: it would end, or pad, in its middle."""
    for document in documents:
        for special in tokenizer.all_special_tokens:
            if special in document.text:
                raise UserError(
                    f"source {name}: a document holds the model's special token {special!r}: "
                    f"{document.text[:80]!r}. Take it out of the file"
                )


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise UserError("the tokenizer has no end token, which documents end with")
    return eos
