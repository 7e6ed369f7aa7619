"""A task: training prompts, held-out prompts, and the verifier that knows the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from operando.types import Example, Verdict


@dataclass(frozen=True)
class Task:
    """A named set of examples with its verifier.

    The verifier is the ground truth. Evaluation calls it directly and never goes through a reward,
    so whatever a policy learns to do to a reward does not move the evaluation.

    Example: Task("words", train=[...], held_out=[...], verify=verify_words,
                  source={"rows": 20000, "sha256": "..."})
    """

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    verify: Callable[[Example, str, bool], Verdict]
    """verify(example, completion, is_truncated)"""
    labels: Callable[[Example, str, bool], Mapping[str, bool]] | None = None
    """labels(example, completion, is_truncated): what an audit names beside right and wrong, such
    as {"hack": True}. No reward ever sees them; of training steps, only a [shift] whose monitor is
    named "oracle"."""
    source: Mapping[str, str | int] = field(default_factory=dict)
    """Where the data came from: path or hub id, rows, sha256; copied into the manifest."""
