"""Recipes of training on a mixture of sources: from nothing, and on answers alone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from operando.recipe.base import Config, Folder, FolderName, Rate
from operando.recipe.pretrain import TinyModelConfig

Weight = Annotated[float, Field(gt=0, le=1)]


class ClrsSource(Config):
    kind: Literal["clrs"]
    """CLRS-Text depth-first search, generated; no held-out graph of the task `clrs`."""
    weight: Weight
    """Share of the tokens (pre-training) or of the pairs (`operando sft`)."""
    sizes: tuple[Annotated[int, Field(ge=2, le=64)], ...] = Field(default=(4, 5), min_length=1)
    """Nodes; each graph draws one of these."""
    hints: bool = True
    """Whether the answer holds the trace before pi."""


class GraphSearchSource(Config):
    kind: Literal["graph_search"]
    """Verbal depth-first walks, generated; no held-out problem of the task `graph_search`."""
    weight: Weight
    """Share of the tokens or of the pairs."""
    sizes: tuple[Annotated[int, Field(ge=2, le=26)], ...] = Field(default=(4, 5, 6), min_length=1)
    """Nodes; each graph draws one of these."""
    trace: bool = True
    """Whether the walk stands before the answer. Off: the path at once."""


class WordsSource(Config):
    kind: Literal["words"]
    """Word problems with their steps, generated; no held-out arithmetic of the task `words`."""
    weight: Weight
    """Share of the tokens or of the pairs."""
    num_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2), min_length=1)
    """Operations in a problem; each problem draws one of these."""
    max_number: int = Field(default=20, ge=2, le=1000)
    """Largest number in a problem."""


class Gsm8kSource(Config):
    kind: Literal["gsm8k"]
    """Rows with `question` and `answer` (steps, "####", a number)."""
    weight: Weight
    """Share of the tokens or of the pairs."""
    path: str = "openai/gsm8k"
    """A .jsonl, .jsonl.gz or .parquet file, or a hub id, of which the training split is taken."""
    max_passes: int = Field(default=1, ge=1)
    """How often every row may be used; a budget that needs more is an error."""


class TextSource(Config):
    kind: Literal["text"]
    """Plain text. Of a .txt file each block of lines between empty lines is a document."""
    weight: Weight
    """Share of the tokens; text has no answers, so `operando sft` refuses it."""
    path: str
    """A .txt, .txt.gz, .jsonl, .jsonl.gz or .parquet file, or a hub id."""
    column: str = "text"
    """Where the text of a row is, if the file has rows."""
    hub_file: str | None = None
    """With a hub id: the file in it, e.g. "wikitext-103-raw-v1/train-00000-of-00002.parquet"."""
    max_passes: int = Field(default=1, ge=1)
    """How often every document may be used; a budget that needs more is an error."""


class PairsSource(Config):
    kind: Literal["pairs"]
    """Rows with a question and an answer in two columns, e.g. Orca-Math."""
    weight: Weight
    """Share of the tokens or of the pairs."""
    path: str
    """A .jsonl, .jsonl.gz or .parquet file, or a hub id."""
    question: str = "question"
    """Column of the question."""
    answer: str = "answer"
    """Column of the answer."""
    hub_file: str | None = None
    """With a hub id: the file in it, e.g. "data/train-00000-of-00001.parquet"."""
    max_chars: int | None = Field(default=None, ge=1)
    """Longer pairs are left out, and counted in the manifest. Absent: all are kept."""
    max_passes: int = Field(default=1, ge=1)
    """How often every row may be used; a budget that needs more is an error."""


class InstructionsSource(Config):
    kind: Literal["instructions"]
    """Rows with `instruction`, an `input` that may be empty, and `response` or `output`; or, in
    their place, `instances`: a list of objects with `input` and `output`."""
    weight: Weight
    """Share of the tokens or of the pairs."""
    path: str
    """A .jsonl, .jsonl.gz or .parquet file, or a hub id."""
    hub_file: str | None = None
    """With a hub id: the file in it."""
    max_chars: int | None = Field(default=None, ge=1)
    """Longer pairs are left out, and counted in the manifest. Absent: all are kept."""
    max_passes: int = Field(default=1, ge=1)
    """How often every row may be used; a budget that needs more is an error."""


SourceConfig = Annotated[
    ClrsSource
    | GraphSearchSource
    | WordsSource
    | Gsm8kSource
    | TextSource
    | PairsSource
    | InstructionsSource,
    Field(discriminator="kind"),
]


def _check_weights(sources: dict[str, SourceConfig]) -> None:
    if not sources:
        raise ValueError("sources: name at least one")
    total = sum(source.weight for source in sources.values())
    if abs(total - 1) > 1e-6:
        shares = " + ".join(f"{s.weight:g} ({name})" for name, s in sources.items())
        raise ValueError(f"the weights of the sources must sum to 1; {shares} = {total:g}")


class MixtureConfig(Config):
    tokens: int = Field(ge=1)
    """Of the whole mixture, end tokens included; each source gets its share to the token."""
    length: int = Field(default=256, ge=8)
    """Tokens in a row of a batch. Documents are packed one after the other, and attention crosses
    them."""
    sources: dict[str, SourceConfig]
    """By a name of your own; their weights sum to 1. A source that can't be read is an error."""

    @model_validator(mode="after")
    def _check(self) -> MixtureConfig:
        _check_weights(self.sources)
        return self


class MixtureRecipe(Config):
    """Language-model training of a new small model on a mixture of sources."""

    name: FolderName
    """Of this recipe."""
    out: Folder
    """Folder that gets the model, its tokenizer and pretrain.json."""
    seed: int = Field(default=0, ge=0)
    """Of initial weights, texts and their order."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per step."""
    model: TinyModelConfig = TinyModelConfig()
    """Shape of the model."""
    mixture: MixtureConfig
    """What the model reads."""
    lr: Rate = 2e-3
    """Peak learning rate."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps over which the learning rate rises from 0, linearly."""
    min_lr_frac: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine schedule ends, as a share of lr."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between states that `--resume` goes on from."""

    @model_validator(mode="after")
    def _check(self) -> MixtureRecipe:
        if self.mixture.length > self.model.max_length:
            raise ValueError(
                f"mixture.length = {self.mixture.length} is over model.max_length = "
                f"{self.model.max_length}"
            )
        return self


class SftRecipe(Config):
    """Supervised fine-tuning of a model on the answers of question-answer pairs."""

    name: FolderName
    """Of this recipe."""
    out: Folder
    """Folder that gets the model, its tokenizer and sft.json."""
    model: str
    """A model folder, e.g. the `out` of a pre-training recipe; "starter", or a hub id."""
    seed: int = Field(default=0, ge=0)
    """Of the order of the pairs."""
    num_pairs: int = Field(ge=1)
    """Of all sources together; each gets its share. Every pair is trained on once."""
    max_length: int = Field(default=256, ge=8)
    """Most tokens of a pair, end token included. A longer one is an error."""
    batch_size: int = Field(default=16, ge=1)
    """Pairs per step."""
    sources: dict[str, SourceConfig]
    """By a name of your own; their weights sum to 1. A source that can't be read is an error."""
    min_loops: int | None = Field(default=None, ge=1)
    """Of a recursive model: a step draws its loops from here to the model's. Absent: all."""
    lr: Rate = 5e-4
    """Peak learning rate."""
    warmup_steps: int = Field(default=10, ge=0)
    """Steps over which the learning rate rises from 0, linearly."""
    min_lr_frac: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine schedule ends, as a share of lr."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between states that `--resume` goes on from."""

    @model_validator(mode="after")
    def _check(self) -> SftRecipe:
        _check_weights(self.sources)
        for name, source in self.sources.items():
            if isinstance(source, TextSource):
                raise ValueError(
                    f"sources.{name}: plain text has no question and answer; use it in "
                    "operando pretrain"
                )
        return self
