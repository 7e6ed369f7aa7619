"""What every table of a recipe is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")]
"""Of a folder below runs_dir: no way out of it, not hidden, nothing that reads as an option."""
Folder = Annotated[str, Field(min_length=1, max_length=4096)]
Rate = Annotated[float, Field(gt=0, le=100)]
"""A learning rate; more than 100 is a slip of the pen."""


class Config(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )
