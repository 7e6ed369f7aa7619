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
    hidden_size: int = Field(default=128, ge=16)
    num_layers: int = Field(default=6, ge=1)
    num_heads: int = Field(default=4, ge=1)
    num_kv_heads: int = Field(default=2, ge=1)
    intermediate_size: int = Field(default=384, ge=16)
    max_length: int = Field(default=512, ge=32)


class PretrainRecipe(Config):
    """Plain language-model training of a small model on generated text."""

    name: FolderName
    out: Folder
    """Folder that gets the model, its tokenizer and pretrain.json."""
    steps: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    batch_size: int = Field(default=64, ge=1)
    model: TinyModelConfig = TinyModelConfig()
    num_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2), min_length=1)
    max_number: int = Field(default=20, ge=2)
    frac_direct: float = Field(default=0.5, ge=0, le=1)
    """Share of texts that answer at once, without the steps."""
    frac_slip: float = Field(default=0.5, ge=0, le=1)
    """Share of the answers given at once that are wrong by 1 to 9."""
    frac_think: float = Field(default=0.2, ge=0, le=1)
    """Share of texts whose prompt asks for <think> and whose answer has it."""
    lr: Rate = 2e-3
    warmup_steps: int = Field(default=100, ge=0)
    min_lr_frac: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
