"""The reward parts of a recipe (seam 1) and their stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from operando.recipe.base import Config


class CorrectReward(Config):
    kind: Literal["correct"]
    """1 where the task's verifier says right, else 0."""
    weight: float = 1.0


class ContainsAnswerReward(Config):
    kind: Literal["contains_answer"]
    """1 where the gold number stands anywhere in the completion. A lenient verifier: it can be
    gamed by listing numbers, and the hack demo shows that."""
    weight: float = 1.0


class FormatReward(Config):
    kind: Literal["format"]
    """1 where the regular expression `pattern` matches the whole completion, else 0."""
    pattern: str = r"[^#]*#### -?\d+\s*"
    weight: float = 1.0


class FunctionReward(Config):
    kind: Literal["function"]
    """A function with TRL's reward signature: "package.module:name" or "path/file.py:name"."""
    path: str = ""
    """Empty: operando.launch.launch(functions={...}) gets the function, under the part name."""
    weight: float = 1.0

    @model_validator(mode="after")
    def _check(self) -> FunctionReward:
        if self.path and ":" not in self.path:
            raise ValueError(
                f'path must be "module:function" or "file.py:function", got {self.path!r}'
            )
        return self


RewardConfig = Annotated[
    CorrectReward | ContainsAnswerReward | FormatReward | FunctionReward,
    Field(discriminator="kind"),
]


class Stage(Config):
    until: int | None = None
    """Last step (inclusive, counted from 1) of this stage; absent in the last stage."""
    weights: dict[str, float]
    """Weight of each reward part; every part must be named."""
