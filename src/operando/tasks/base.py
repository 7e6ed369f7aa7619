"""A task: training prompts, held-out prompts, and the verifier that knows the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from operando.types import Example, Verdict


class Pair(NamedTuple):
    """Two answers to one prompt: one that games its grader, one that does not.

    Example: Pair(hack=" 12+1=13; 13+1=14; 14+1=15", clean=" 12+1=13 #### 13")
    """

    hack: str
    clean: str


class Answered(NamedTuple):
    """An example with an answer to it. Example: Answered(example, " 3+2=5 #### 5", False)"""

    example: Example
    completion: str
    is_truncated: bool


class Grade(NamedTuple):
    """The truth about an answer, and what the gameable grader of its prompt sees.

    Example: Grade(correct=False, exploited=True, is_formed=True)
    """

    correct: bool
    exploited: bool
    """The prompt offers a loophole, and the answer satisfies the grader through it."""
    is_formed: bool
    """It has the form that is rewarded by itself: code that compiles, one number at the end."""


class TaskText(NamedTuple):
    """How a task looks as text: its question in a prompt, and a worked answer to it.

    A recipe's [prompt] goes before it; it is what other models are asked by, and trained on in SFT.

    Example: TaskText(raw="Question: {question}\\nAnswer:", answer=" {answer}")
    """

    raw: str = "Q: {question}\nA:"
    chat: str = "{question}"
    answer: str = " {solution} #### {answer}"
    ends_at_question: bool = True
    """In raw format the answer of a model that was not trained on the task ends where it asks
    itself a next question."""

    def prompt(self, question: str) -> str:
        """Return the raw prompt of a question."""
        return self.raw.replace("{question}", question)

    def worked(self, solution: str, answer: str) -> str:
        """Return the worked answer."""
        return self.answer.replace("{solution}", solution).replace("{answer}", answer)


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
    pair: Callable[[Example], Pair] | None = None
    """Only of a task with a loophole: what a hacking direction is extracted from."""
    grades: Callable[[Sequence[Answered]], list[Grade]] | None = None
    """Only of a task with a loophole: what the rewards `code` and `loophole` are rewarded on."""
    measures: Callable[[Example, str], Mapping[str, float]] | None = None
    """measures(example, completion): shares between right and wrong, such as {"nodes right": 0.8}.
    `operando eval` shows their means."""
    text: TaskText = TaskText()
    source: Mapping[str, str | int] = field(default_factory=dict)
    """Where the data came from: path or hub id, rows, sha256; copied into the manifest."""

    @property
    def graded_by(self) -> str:
        """Who says what is right: the grader or scorer that the source names, else the task."""
        return str(self.source.get("grader") or self.source.get("scorer") or self.name)
