"""The answers that are edited: a run's own, and ones made of worked solutions, right and wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from operando.errors import UserError
from operando.evals.answers import Answer, with_block, with_openers
from operando.evals.mutations_answer import far_from, swap_final
from operando.recipe.data import PromptConfig
from operando.recipe.rewards import (
    FormatReward,
    StepGrpoReward,
    StepPenaltyReward,
    ThinkFormatReward,
)
from operando.recipe.run import Recipe
from operando.tables import read_parquet
from operando.tasks.base import Task
from operando.tasks.prompts import answer_so_far
from operando.types import Example, Prompt, Rollout

MAX_SIBLINGS = 2


@dataclass(frozen=True)
class Case:
    """An answer to edit, with the siblings that a group-relative reward compares it with."""

    rollout: Rollout
    is_right: bool
    siblings: tuple[Rollout, ...]
    other: Example
    """Another problem of the task, with another answer."""

    @property
    def answer(self) -> Answer:
        prompt = self.rollout.prompt
        return Answer(prompt.prefill, self.rollout.completion, prompt.example, self.other)

    @property
    def wrong(self) -> str:
        """Another problem's worked answer."""
        solution, answer = self.other.solution, self.other.answer
        return f"{solution} #### {answer}"


def with_text(rollout: Rollout, completion: str) -> Rollout:
    """Return the rollout with another completion; its ids are the bytes, and an end."""
    ids = (*completion.encode(errors="replace"), 256)
    return replace(
        rollout, completion=completion, completion_ids=ids, sampling_logp=(0.0,) * len(ids)
    )


def uses_block(recipe: Recipe) -> bool:
    """Return whether the prompt or a reward of the recipe speaks of a think block."""
    config = recipe.prompt
    texts = [config.template or "", config.system or "", config.answer_template]
    for part in recipe.rewards.values():
        match part:
            case ThinkFormatReward() | StepPenaltyReward(count="last_block"):
                return True
            case StepGrpoReward(pattern=""):
                return True
            case FormatReward(pattern=pattern) | StepGrpoReward(pattern=pattern):
                texts.append(pattern)
            case _:
                pass
    return any("think>" in text for text in texts)


def _prompt(config: PromptConfig, example: Example, text: str | None = None) -> Prompt:
    """Return the prompt as the model reads it, or, without a tokenizer, its text alone."""
    asked = config.ask(example.question) + config.prefill
    messages = (
        ({"role": "user", "content": config.ask(example.question)},)
        if config.format == "chat"
        else ()
    )
    text = asked if text is None else text
    return Prompt(example, text, (0,), messages, answer_so_far(text, config.prefill))


def made_cases(recipe: Recipe, task: Task, num: int) -> list[Case]:
    """Return worked solutions, right and wrong, without and with openers in their reasoning."""
    cases = []
    for example in task.train[recipe.prompt.few_shot :][:num]:
        prompt = _prompt(recipe.prompt, example)
        bare = Rollout(prompt, 0, 0, "", (), (), is_truncated=False)
        prefill = prompt.prefill

        def form(text: str, prefill: str = prefill) -> str:
            return with_block(prefill, text) if uses_block(recipe) else text

        right = form(recipe.prompt.worked_answer(example.solution, example.answer))
        not_gold = far_from(example.answer)
        work = swap_final(example.solution, example.answer, not_gold) or example.solution
        wrong = form(recipe.prompt.worked_answer(work, not_gold))
        guess = form(recipe.prompt.worked_answer("I guess.", not_gold))
        texts = [right, with_openers(right), wrong, with_openers(wrong), guess]
        rollouts = [with_text(bare, text) for text in texts]
        cases += [_case(task, rollout, rollouts) for rollout in rollouts]
    if not any(case.is_right for case in cases):
        raise UserError(
            f"task {task.name}: its verifier accepts none of {num} worked solutions in the form of "
            f"prompt.answer_template = {recipe.prompt.answer_template!r}"
        )
    return cases


def _case(task: Task, rollout: Rollout, group: Sequence[Rollout]) -> Case:
    siblings = [other for other in group if other is not rollout][:MAX_SIBLINGS]
    other = _other(task, rollout.prompt.example)
    return Case(rollout, is_right(task, rollout), tuple(siblings), other)


def _other(task: Task, example: Example) -> Example:
    """Return a problem with another answer; of a task of one answer, the problem itself."""
    return next((e for e in task.train if e.answer != example.answer), example)


def is_right(task: Task, rollout: Rollout) -> bool:
    return task.verify(rollout.prompt.example, rollout.completion, rollout.is_truncated).correct


def real_cases(folder: Path, task: Task, recipe: Recipe, num: int) -> list[Case]:
    """Return up to `num` right and `num` wrong answers of the run, the last step's first.

    Each comes with its siblings, and a second time with openers in its reasoning.
    """
    files = sorted((folder / "rollouts").glob("step_*.parquet"), reverse=True)
    if not files:
        raise UserError(f"{folder} has no rollouts to fuzz; it has not trained a step")
    by_answer: dict[str, list[Example]] = {}
    for example in task.train:
        by_answer.setdefault(example.answer, []).append(example)
    seen: set[str] = set()
    found: dict[bool, list[Case]] = {True: [], False: []}
    for file in files:
        for group in _groups(file, by_answer, recipe.prompt):
            for rollout in group:
                case = _case(task, rollout, group)
                if rollout.completion not in seen and len(found[case.is_right]) < 2 * num:
                    seen.add(rollout.completion)
                    opened = with_text(rollout, with_openers(rollout.completion))
                    found[case.is_right] += [case, replace(case, rollout=opened)]
        if all(len(cases) >= 2 * num for cases in found.values()):
            break
    return found[True] + found[False]


def _groups(
    file: Path, by_answer: Mapping[str, list[Example]], config: PromptConfig
) -> list[list[Rollout]]:
    names = ["group", "sample", "prompt", "completion", "answer", "is_truncated"]
    groups: dict[int, list[Rollout]] = {}
    for row in read_parquet(file, columns=names).to_pylist():
        asked = [e for e in by_answer.get(row["answer"], ()) if e.question in row["prompt"]]
        if not asked:
            raise UserError(f"{file}: no training problem of the task is in {row['prompt']!r}")
        # Worked examples stand in the prompt as well: the question is the last of them.
        example = max(asked, key=lambda e: row["prompt"].rfind(e.question))
        prompt = _prompt(config, example, row["prompt"])
        bare = Rollout(prompt, row["group"], row["sample"], "", (), (), row["is_truncated"])
        groups.setdefault(row["group"], []).append(with_text(bare, row["completion"]))
    return list(groups.values())
