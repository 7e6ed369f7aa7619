"""The prompt's part in decision depth: the base is told, or shown, what an answer looks like.

A gain that a line of text would have given the base is one that training did not have to bring.
What is put into the prompt is the same for every problem, as a constant token is.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from operando.evals.forced import Edit, Pair
from operando.recipe.data import PromptConfig
from operando.tasks.base import TaskText
from operando.tasks.prompts import make_prompts
from operando.types import Example, Prompt

SAID = "Answer in this form: "


class PromptEdit(NamedTuple):
    """What is put into every prompt, the prompt settings with it, and the worked examples."""

    text: str
    config: PromptConfig
    shots: tuple[Example, ...]


class Instructed(NamedTuple):
    """The prompts of one edit: of the problems of the search, and of those held out."""

    text: str
    search: list[Prompt]
    held_out: list[Prompt]


def prompt_edits(
    config: PromptConfig, text: TaskText, shots: Sequence[Example], unseen: Sequence[Example]
) -> list[PromptEdit]:
    """Return the edits of a prompt that give the form of an answer, such as " {solution} ####
    {answer}": said before the question, said after it, and shown by one more worked example, the
    first of `unseen` that has what the form needs.

    The form is the recipe's, where it says one, else the task's. One without "{answer}" is not said
    (the solution is all of it).
    """
    own = "answer_template" in config.model_fields_set
    form = config.answer_template if own else text.answer
    edits = []
    if "{answer}" in form:
        said = form.replace("{solution}", "(steps)").replace("{answer}", "(answer)").strip()
        plain = config.ask("{question}")
        for around in (f"{SAID}{said}\n{{question}}", f"{{question}}\n{SAID}{said}"):
            changed = {"template": plain.replace("{question}", around)}
            edited = config.model_copy(update=changed)
            edits.append(PromptEdit(around.replace("{question}", "..."), edited, tuple(shots)))
    for shown in unseen:
        if shown.solution or "{solution}" not in form:
            edited = config.model_copy(update={"answer_template": form})
            worked = edited.worked_answer(shown.solution, shown.answer)
            edits.append(PromptEdit(edited.ask(shown.question) + worked, edited, (*shots, shown)))
            break
    return edits


def instructed(
    pair: Pair,
    edits: Sequence[PromptEdit],
    search: Sequence[Example],
    held_out: Sequence[Example],
    limit: int,
    day: datetime,
) -> list[Instructed]:
    """Return the prompts of each edit under which all fit into `limit` tokens."""
    found = []
    for text, config, shots in edits:
        both = [*search, *held_out]
        prompts = make_prompts(both, shots, config, pair.tokenizer, 10**9, day)
        if max(len(prompt.ids) for prompt in prompts) <= limit:
            found.append(Instructed(text, prompts[: len(search)], prompts[len(search) :]))
    return found


def best_instructed(pair: Pair, tried: Sequence[Instructed]) -> Instructed | None:
    """Return the edit under which the base is right on most problems of the search; None: none."""

    def score(one: Instructed) -> int:
        return sum(pair.right(one.search, pair.decode(one.search, "base", Edit())))

    return max(tried, key=score, default=None)
