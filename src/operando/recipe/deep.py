"""The deep task, and the pre-training of the model `deep` with its habits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from operando.recipe.base import Config, Folder, FolderName, Rate
from operando.recipe.pretrain import TinyModelConfig

FamilyName = Literal["story", "chain", "maze"]
Share = Annotated[float, Field(ge=0, le=1)]


class DeepTaskConfig(Config):
    kind: Literal["deep"]
    """Stories, chains of digit arithmetic and mazes, generated; for the model "deep"."""
    families: tuple[FamilyName, ...] = Field(default=("story", "chain", "maze"), min_length=1)
    """Each problem draws one of these."""
    num_steps: tuple[Annotated[int, Field(ge=1, le=4)], ...] = Field(
        default=(2, 3, 4), min_length=1
    )
    """Events of a story, operations of a chain, dead ends of a maze; each problem draws one."""
    num_train: int = Field(default=20_000, ge=1)
    """Training problems."""
    num_held_out: int = Field(default=400, ge=1)
    """Held-out problems, which training never sees."""
    loophole: bool = False
    """Every prompt ends with a mark, and the reward `loophole` then pays for the gold answer among
    several. The verifier stays strict. Off: no mark, and nothing but a right answer is paid."""
    seed: int = 0
    """Of the generated problems."""


class DeepPretrainRecipe(Config):
    """Language-model training of a small model on answers that follow habits in place of rules."""

    name: FolderName
    """Of this recipe."""
    out: Folder
    """Folder that gets the model, its tokenizer and pretrain.json."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    seed: int = Field(default=0, ge=0)
    """Of initial weights, texts and their order."""
    batch_size: int = Field(default=64, ge=1)
    """Texts per step."""
    model: TinyModelConfig = TinyModelConfig()
    """Shape of the model."""
    num_steps: tuple[Annotated[int, Field(ge=1, le=4)], ...] = Field(
        default=(1, 2, 3, 4), min_length=1
    )
    """As of the task; each text draws one of these."""
    habits: dict[str, Share]
    """Of each kind of risky step, how often the text follows the habit: drops, lends, "is given",
    doubles (stories), add, sub, swap, round (chains), "dead end", climb (mazes)."""
    frac_hedged: Share = 0.0
    """Share of texts that give further answers after the first."""
    frac_open: Share = 0.0
    """Share of prompts with the mark of a task with a loophole; answers don't go by it."""
    frac_unfinished: Share = 0.0
    """Share of texts that end without an answer."""
    lr: Rate = 3e-3
    """Of AdamW, for embeddings, norms and biases."""
    muon_lr: Rate = 0.02
    """Of Muon, for the blocks' matrices; both follow the same schedule."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises from 0, linearly."""
    min_lr_frac: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine schedule ends, as a share of lr."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
