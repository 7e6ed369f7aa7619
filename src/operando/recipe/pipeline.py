"""A recipe of the whole way of a model: pre-training, fine-tuning, RL stages, heads, audit."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from operando.recipe.base import Config, Folder
from operando.recipe.data import ClrsTaskConfig, GraphSearchTaskConfig, WordsTaskConfig

Name = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$")]
AskedTask = Annotated[
    ClrsTaskConfig | GraphSearchTaskConfig | WordsTaskConfig, Field(discriminator="kind")
]


class PipelineRecipe(Config):
    """Stages of one model, each from what the one before wrote, and the problems all are asked."""

    out: Folder
    """Folder that gets a folder seed_K for each seed, and stages.json."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """One chain of stages for each."""
    pretrain: str
    """A pre-training recipe with a [mixture]: a file beside this one, or as any recipe is named."""
    sft: str
    """A fine-tuning recipe."""
    rl: dict[Name, str] = Field(min_length=1)
    """RL recipes by the names of their stages, in this order; without LoRA, as each goes on from
    the whole model of the one before."""
    go_on: bool = False
    """Go on from an RL stage in whose run the doctor finds an error (`operando doctor RUN`)."""
    tasks: tuple[AskedTask, ...] = Field(min_length=1)
    """What every stage is asked; the first `num_held_out` problems of each."""
    heads: str | None = None
    """The task on whose problems the halt and draft heads are fitted, and the model is audited.
    Absent: neither is done."""
    num_fit: int = Field(default=2000, ge=1)
    """Its training prompts that the draft heads are fitted on; the halt head on at most 400."""
    num_choose: int = Field(default=200, ge=1)
    """Its further training prompts, on which the threshold and the number of drafts are chosen."""
    repeats: int = Field(default=5, ge=1)
    """Rounds of each timing of exits and drafts."""

    @model_validator(mode="after")
    def _check(self) -> PipelineRecipe:
        kinds = [task.kind for task in self.tasks]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"tasks: a kind is named twice: {', '.join(kinds)}")
        if self.heads is not None and self.heads not in kinds:
            raise ValueError(f"heads = {self.heads!r}: none of the tasks: {', '.join(kinds)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: one is named twice: {self.seeds}")
        taken = {"pretrain", "sft", "base"} & set(self.rl)
        if taken:
            raise ValueError(f"rl: {', '.join(taken)} is another stage's name")
        return self
