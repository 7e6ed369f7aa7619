"""Whether a task can be trained on: its prompts, its verifier, its splits, and the base's answers.

Nothing is trained and nothing is written. The verifier is asked of every gold answer, of an empty
one and of the question said back; the base answers a few training questions several times, for a
group-relative method learns from groups of mixed answers and from no others.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from transformers import PreTrainedTokenizerBase

from operando.evals.ask import Answer, Checkpoint, Question, ask, open_each, pass_at
from operando.models.load import open_model
from operando.models.tokens import text_ids
from operando.recipe.run import Recipe
from operando.run import SeedTree
from operando.stats.bootstrap import bootstrap_mean
from operando.stats.intervals import Interval
from operando.tables import interval
from operando.tasks.base import Answered, Task
from operando.tasks.file_task import question_key
from operando.tasks.load import recipe_task
from operando.tasks.prompts import make_prompts
from operando.types import Example

SHOWN = 10  # prompts at their border
BORDER = 6  # tokens on each side of it
FEW = 0.1  # of groups; with fewer mixed ones most of a step is thrown away
MANY_CUT = 0.2  # of samples


@dataclass(frozen=True)
class Border:
    """Where a prompt ends and its gold answer begins, in tokens."""

    example_id: str
    prompt_end: list[str]
    answer_start: list[str]
    is_cut_alike: bool
    """The tokenizer cuts prompt and answer as one text just as it cuts each alone."""


@dataclass(frozen=True)
class Accepted:
    """How many completions of a kind the verifier calls right, and the first that are amiss."""

    right: int
    n: int
    amiss: list[str]


@dataclass(frozen=True)
class Leaks:
    """Training questions that are held out too, and questions that are trained on more than once.

    `exact`: runs of spaces being one. `folded`: case apart as well, those of `exact` included.
    """

    exact: int
    folded: int
    repeated: int
    contradictory: int
    """Of the repeated, those with more than one answer."""


@dataclass(frozen=True)
class Sampled:
    """What the base's own samples say; intervals are the bootstrap of problems."""

    problems: int
    samples: int
    group: int
    """Completions of a group: the recipe's num_generations, or as many as were sampled."""
    pass_1: Interval
    pass_k: Interval
    """That one of `group` samples is right, without bias (2107.03374)."""
    mixed: Interval
    """Share of groups of `group` with right and wrong answers, without bias."""
    mean_length: float
    """Tokens."""
    truncated: float
    shown: list[str]
    """A right and a wrong completion, where there are."""


@dataclass(frozen=True)
class TaskCheck:
    """Everything that was looked at. Example: check_task(load_recipe("demo"), num=32, samples=8)"""

    task: str
    num_train: int
    num_held_out: int
    first_prompt: str
    borders: list[Border]
    gold: Accepted
    """Of all examples that have an answer."""
    empty: Accepted
    echo: Accepted
    """Of the questions said back."""
    leaks: Leaks
    sampled: Sampled | None
    """None: no model was asked."""

    @property
    def passed(self) -> bool:
        """Return whether the verifier calls every gold answer right."""
        return self.gold.right == self.gold.n


def check_task(recipe: Recipe, *, num: int = 32, samples: int | None = 8) -> TaskCheck:
    """Return what there is to say of a recipe's task; `samples` None asks no model.

    `num` training questions are drawn by the recipe's seed.
    """
    task = recipe_task(recipe)
    examples = [*task.train, *task.held_out]
    golds = [gold_completion(recipe, task, example) for example in examples]
    tokenizer = open_model(recipe.model).tokenizer
    day = datetime.now(UTC)
    shots = list(task.train[: recipe.prompt.few_shot])
    asked = list(task.train[len(shots) :])
    prompts = make_prompts(asked[:SHOWN], shots, recipe.prompt, tokenizer, sys.maxsize, day)
    borders = [
        border(tokenizer, p.example.id, p.text, p.ids, gold_completion(recipe, task, p.example))
        for p in prompts
    ]
    with_gold = [(e, g) for e, g in zip(examples, golds, strict=True) if e.answer]
    return TaskCheck(
        task=task.name,
        num_train=len(task.train),
        num_held_out=len(task.held_out),
        first_prompt=prompts[0].text if prompts else "",
        borders=borders,
        gold=ask_verifier(task, [e for e, _ in with_gold], [g for _, g in with_gold], right=True),
        empty=ask_verifier(task, examples, [""] * len(examples), right=False),
        echo=ask_verifier(task, examples, [e.question for e in examples], right=False),
        leaks=find_leaks(task),
        sampled=sample_base(recipe, task, asked, shots, num, samples, day) if samples else None,
    )


def gold_completion(recipe: Recipe, task: Task, example: Example) -> str:
    """Return a worked answer as the recipe writes it, else as the task does."""
    is_said = "answer_template" in recipe.prompt.model_fields_set
    worked = recipe.prompt.worked_answer if is_said else task.text.worked
    text = worked(example.solution, example.answer)
    return text.strip() if recipe.prompt.format == "chat" else text


def border(
    tokenizer: PreTrainedTokenizerBase, name: str, text: str, ids: Sequence[int], gold: str
) -> Border:
    """Return the tokens at the end of a prompt and at the start of its gold answer."""
    (answer,) = text_ids(tokenizer, [gold], "a gold answer")
    (joint,) = text_ids(tokenizer, [text + gold], "a prompt with its answer")
    apart = [*ids, *answer]  # may begin with a token that is no text: the beginning of sequence
    return Border(
        name,
        [str(tokenizer.decode([one])) for one in ids[-BORDER:]],
        [str(tokenizer.decode([one])) for one in answer[:BORDER]],
        apart[-len(joint) :] == joint,
    )


def ask_verifier(
    task: Task, examples: Sequence[Example], completions: Sequence[str], *, right: bool
) -> Accepted:
    """Return how many completions the verifier calls right; `right`: all of them should be."""
    if task.grades is not None:  # all at once: the task may grade them in parallel, and remembers
        task.grades([Answered(e, c, False) for e, c in zip(examples, completions, strict=True)])
    verdicts = [task.verify(e, c, False) for e, c in zip(examples, completions, strict=True)]
    amiss = [
        f"{e.id}: {c[:60]!r}: {v.reason[:100]}"
        for e, c, v in zip(examples, completions, verdicts, strict=True)
        if v.correct is not right
    ]
    return Accepted(sum(v.correct for v in verdicts), len(verdicts), amiss[:5])


def find_leaks(task: Task) -> Leaks:
    """Return how many training questions are held out too, or are asked twice."""
    exact, folded = (
        sum(question_key(e, fold=fold) in keys for e in task.train)
        for fold in (False, True)
        for keys in [{question_key(e, fold=fold) for e in task.held_out}]
    )
    answers: dict[str, set[str]] = {}
    for one in task.train:
        answers.setdefault(question_key(one), set()).add(one.answer)
    asked = Counter(map(question_key, task.train))
    repeated = [key for key, times in asked.items() if times > 1]
    unlike = sum(len(answers[key]) > 1 for key in repeated)
    return Leaks(exact, folded, len(repeated), unlike)


# --- the base's samples --------------------------------------------------------------------------


def mixed_at(n: int, c: int, k: int) -> float:
    """Return the unbiased chance that k samples are neither all right nor all wrong.

    1 - C(n-c, k) / C(n, k) - C(c, k) / C(n, k)
    """
    return pass_at(n, c, k) - math.comb(c, k) / math.comb(n, k)


def sample_base(
    recipe: Recipe,
    task: Task,
    asked: Sequence[Example],
    shots: Sequence[Example],
    num: int,
    samples: int,
    day: datetime,
) -> Sampled:
    """Return what the base answers to training questions, sampled as in training."""
    seeds = SeedTree(SeedTree(recipe.seed).derive("task check"))
    order = torch.randperm(len(asked), generator=seeds.generator("order")).tolist()
    question = Question(
        task.name,
        task,
        [asked[i] for i in order[:num]],
        recipe.prompt,
        shots,
        recipe.rollout.max_completion_length,
        stop=recipe.rollout.stop,
        temperature=recipe.rollout.temperature,
        samples=samples,
        seeds=seeds,
    )
    engine, rows = recipe.rollout.engine, max(samples, recipe.rollout.max_batch)
    (model,) = open_each([Checkpoint("base", recipe.model, None, 0, engine, rows)])
    return summarise(ask(model, question, day), samples, recipe.rollout.num_generations)


def summarise(answers: Sequence[Answer], samples: int, num_generations: int) -> Sampled:
    """Return the figures of answers, `samples` adjacent ones of each problem."""
    correct = [one.verdict.correct for one in answers]
    right_P = [sum(correct[i : i + samples]) for i in range(0, len(correct), samples)]
    group = min(samples, num_generations)
    lengths = [len(one.rollout.completion_ids) for one in answers]
    shown = []
    for kind in (True, False):
        first = next((one for one in answers if one.verdict.correct is kind), None)
        if first is not None:
            word = "right" if kind else f"wrong ({first.verdict.reason[:80]})"
            shown.append(f"{first.example.id}, {word}: {first.text[:200]!r}")
    return Sampled(
        len(right_P),
        samples,
        group,
        bootstrap_mean([c / samples for c in right_P], 0),
        bootstrap_mean([pass_at(samples, c, group) for c in right_P], 0),
        bootstrap_mean([mixed_at(samples, c, group) for c in right_P], 0),
        sum(lengths) / len(lengths),
        sum(one.rollout.is_truncated for one in answers) / len(answers),
        shown,
    )


# --- words ---------------------------------------------------------------------------------------


def task_check_lines(check: TaskCheck) -> list[str]:
    """Return what was found, line by line; the last says whether RL has anything to learn."""
    lines = [
        f"task {check.task}: {check.num_train} training and {check.num_held_out} held-out "
        "questions. The first prompt:",
        check.first_prompt,
        "",
        "where the prompt ends and a gold answer begins:",
    ]
    lines += [
        f"  {b.example_id}: {' '.join(map(repr, b.prompt_end))} | "
        f"{' '.join(map(repr, b.answer_start))}{'' if b.is_cut_alike else '  (*)'}"
        for b in check.borders
    ]
    if not all(b.is_cut_alike for b in check.borders):
        lines.append(
            "  (*) as one text, the tokenizer would cut it elsewhere: does the prompt end with a "
            "space, or the answer begin without one?"
        )
    lines += ["", *_verifier_lines(check), *_leak_lines(check.leaks)]
    if check.sampled is not None:
        lines += ["", *_sample_lines(check.sampled)]
    return [*lines, "", learnable(check)]


def _verifier_lines(check: TaskCheck) -> list[str]:
    gold = check.gold
    if gold.n:
        lines = [f"gold answers: the verifier calls {gold.right} of {gold.n} right"]
    else:
        lines = ["gold answers: the data has none; the verifier is taken at its word"]
    lines += [f"  {one}" for one in gold.amiss]
    for name, said in (("an empty answer", check.empty), ("the question said back", check.echo)):
        lines.append(f"{name}: the verifier calls {said.right} of {said.n} right")
        lines += [f"  {one}" for one in said.amiss]
    return lines


def _leak_lines(leaks: Leaks) -> list[str]:
    lines = [
        f"training questions that are held out too: {leaks.exact}; with case apart: {leaks.folded}"
    ]
    if leaks.repeated:
        lines.append(
            f"questions that are trained on more than once: {leaks.repeated}, of them with more "
            f"than one answer: {leaks.contradictory}"
        )
    return lines


def _sample_lines(sampled: Sampled) -> list[str]:
    k = sampled.group
    return [
        f"the base on {sampled.problems} training questions, {sampled.samples} samples each "
        "(95 % intervals, bootstrap of questions):",
        f"  pass@1 {interval(sampled.pass_1, '.1%')}",
        f"  pass@{k} {interval(sampled.pass_k, '.1%')}",
        f"  groups of {k} with right and wrong answers {interval(sampled.mixed, '.1%')}",
        f"  length {sampled.mean_length:.1f} tokens, cut at the limit {sampled.truncated:.1%}",
        *(f"  {one}" for one in sampled.shown),
    ]


def learnable(check: TaskCheck) -> str:
    """Return in one sentence whether RL has anything to learn here, and what to change."""
    if not check.passed:
        return (
            f"not yet: the verifier calls {check.gold.n - check.gold.right} of {check.gold.n} gold "
            "answers wrong, so a right answer would not be paid; mend the data, task.verify or "
            "prompt.answer_template (how a right completion reads)"
        )
    sampled = check.sampled
    if sampled is None:
        return "the verifier agrees with the gold answers; no model was asked, so leave out " + (
            "--no-samples to see whether RL has anything to learn"
        )
    cut = ""
    if sampled.truncated > MANY_CUT:
        cut = (
            f", and {sampled.truncated:.0%} of the samples are cut at the limit: raise "
            "rollout.max_completion_length, or end them with rollout.stop"
        )
    mixed, k = sampled.mixed.value, sampled.group
    if sampled.pass_1.value == 0:
        return (
            "nothing to learn: every sample is wrong, so no group has a better answer in it; "
            "show worked examples (prompt.few_shot), ask easier questions, fine-tune first, or add "
            f"a reward of parts of the way{cut}"
        )
    if sampled.pass_1.value == 1:
        return f"nothing to learn: every sample is right; ask harder questions{cut}"
    if mixed < FEW:
        near = "wrong" if sampled.pass_1.value < 0.5 else "right"
        change = "easier" if near == "wrong" else "harder"
        return (
            f"little to learn: {mixed:.0%} of groups of {k} have right and wrong answers, for most "
            f"are all {near}; ask {change} questions, or raise rollout.num_generations{cut}"
        )
    return f"yes: {mixed:.0%} of groups of {k} have right and wrong answers to learn from{cut}"
