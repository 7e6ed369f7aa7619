"""A recipe of pre-training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from operando.recipe.base import Config, Folder, FolderName, Rate


class TinyModelConfig(Config):
    recursive: Literal["tiny", "200m"] | None = None
    """A RecursiveCausalLM of this preset; of the keys below only vocab_size and max_length count
    then. Absent: a Qwen2 of the shape below."""
    min_loops: int | None = Field(default=None, ge=1)
    """With `recursive`: a step draws its loops from here to the preset's. Absent: all, always."""
    vocab_size: int = Field(default=512, ge=300)
    """Tokens of the tokenizer that is trained first."""
    hidden_size: int = Field(default=128, ge=16)
    """Width of the residual stream."""
    num_layers: int = Field(default=6, ge=1)
    """Decoder blocks."""
    num_heads: int = Field(default=4, ge=1)
    """Query heads per block."""
    num_kv_heads: int = Field(default=2, ge=1)
    """Key and value heads per block."""
    intermediate_size: int = Field(default=384, ge=16)
    """Width of the MLP."""
    max_length: int = Field(default=512, ge=32)
    """Context in tokens."""


class PretrainRecipe(Config):
    """Plain language-model training of a small model on generated text."""

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
    num_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2), min_length=1)
    """Operations of a problem; each text draws one of these."""
    max_number: int = Field(default=20, ge=2)
    """Largest number in a problem."""
    frac_direct: float = Field(default=0.5, ge=0, le=1)
    """Share of texts that answer at once, without the steps."""
    frac_slip: float = Field(default=0.5, ge=0, le=1)
    """Share of the answers given at once that are wrong by 1 to 9."""
    frac_think: float = Field(default=0.2, ge=0, le=1)
    """Share of texts whose prompt asks for <think> and whose answer has it."""
    lr: Rate = 2e-3
    """Peak learning rate."""
    warmup_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate rises from 0, linearly."""
    min_lr_frac: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine schedule ends, as a share of lr."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
