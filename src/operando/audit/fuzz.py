"""Looks for edits of real answers that a reward pays for although they deserve no pay.

A finding is an edit (audit/edits.py) after which a reward does what the edit says it must not do,
with the smallest answer on which it does so. An evasion (an opener that is in no list) is shown
beside the findings and is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Group
from rich.table import Table
from rich.text import Text

from operando.audit.edits import EDITS, Chain, Edit, with_block, with_openers
from operando.errors import UserError
from operando.recipe import (
    FormatReward,
    Gsm8kTaskConfig,
    PromptConfig,
    Recipe,
    StepGrpoReward,
    StepPenaltyReward,
    ThinkFormatReward,
    WordsTaskConfig,
)
from operando.recipe_io import load_recipe
from operando.rewards.base import RewardFunction, RewardLog, TrainerState, as_tokens, load_function
from operando.rewards.compose import RewardPart, make_parts, weighted_sum
from operando.rewards.formats import is_one_block
from operando.run import read_recipe, write_json
from operando.tasks.base import Task
from operando.tasks.load import load_task
from operando.tasks.prompts import answer_so_far
from operando.types import Example, Prompt, Rollout

EPSILON = 1e-6  # pay is float32
CHUNK = 128  # texts judged at once, each with its siblings
MAX_SIBLINGS = 2
MADE_BESIDE_REAL = 4  # problems answered by hand beside a run's own answers
MAX_SHRINKS = 150
TOTAL = "weighted total"


@dataclass(frozen=True)
class Case:
    """An answer to edit, with the siblings that a group-relative reward compares it with."""

    rollout: Rollout
    is_right: bool
    siblings: tuple[Rollout, ...]


@dataclass(frozen=True)
class Breach:
    """One edit of one answer that a reward should not have answered like this."""

    before: str
    after: str
    paid_before: float
    paid_after: float
    times: int
    prompt: str


@dataclass(frozen=True)
class Row:
    """What one edit does to one reward."""

    reward: str
    edit: str
    prop: str
    must: str
    is_evasion: bool
    breaches: int
    tried: int
    largest_gain: float
    smallest: Breach | None


@dataclass(frozen=True)
class FuzzResult:
    """Everything found. `left_out` are reward parts that need a model's trace."""

    target: str
    num_right: int
    num_wrong: int
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    file: Path

    @property
    def findings(self) -> list[Row]:
        return [row for row in self.rows if row.breaches and not row.is_evasion]


@dataclass(frozen=True)
class Pay:
    """The reward parts, and the weighted totals that a policy is really paid, one a stage."""

    parts: Sequence[RewardPart]
    totals: Mapping[str, Mapping[str, float]]
    steps: int

    def score(self, cases: Sequence[Case], texts: Sequence[str]) -> list[dict[str, float]]:
        """Return what every part and total pays for each text; NaN is "not applicable"."""
        scores: list[dict[str, float]] = []
        for start in range(0, len(texts), CHUNK):
            pairs = list(zip(cases[start:], texts[start : start + CHUNK], strict=False))
            rollouts, at = [], []
            for group, (case, text) in enumerate(pairs):
                at.append(len(rollouts))
                edited = with_text(case.rollout, text)
                rollouts += [replace(r, group=group) for r in (edited, *case.siblings)]
            scores += self._score(rollouts, at)
        return scores

    def _score(self, rollouts: list[Rollout], at: list[int]) -> list[dict[str, float]]:
        width = max(len(r.completion_ids) for r in rollouts)
        state, log = TrainerState(self.steps, self.steps), RewardLog()
        paid = {}
        for part in self.parts:
            values = part.values(rollouts, None, state, log)
            paid[part.name] = as_tokens(part.name, values, rollouts, width).sum(1, keepdim=True)[at]
        for name, weights in self.totals.items():
            paid[name] = weighted_sum({p.name: paid[p.name] for p in self.parts}, weights)
        columns = {name: channel[:, 0].tolist() for name, channel in paid.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(at))]


# --- entry ---------------------------------------------------------------------------------------


def fuzz_target(
    target: str,
    *,
    reward: str | None = None,
    num: int = 16,
    functions: Mapping[str, RewardFunction] | None = None,
    overrides: tuple[str, ...] = (),
) -> FuzzResult:
    """Fuzz the rewards of a run folder, a recipe or a task ("words"), and write fuzz.json.

    A run folder gives its own answers, `num` right and `num` wrong ones; a recipe or a task gives
    answers made from worked solutions. `reward` ("file.py:name") takes the place of the target's
    own rewards. No model is loaded: a completion's ids are its bytes, and parts that want `trace`
    are left out. `overrides` ("a.b=value") change a recipe.
    """
    folder = Path(target) if Path(target).is_dir() else None
    recipe = _recipe_of(target, folder, overrides)
    task = load_task(recipe.task)
    own = functions or {}
    if reward is not None:
        parts = [RewardPart("reward", function=load_function(reward))]
        totals: dict[str, dict[str, float]] = {}
    else:
        parts, totals = make_parts(recipe, task, own), _totals(recipe)
    left_out = [part.name for part in parts if part.needs_trace()]
    parts = [part for part in parts if not part.needs_trace()]
    if not parts:
        raise UserError(f"{target}: every reward wants `trace`, which the fuzzer does not have")
    cases = _made_cases(recipe, task, num if folder is None else MADE_BESIDE_REAL)
    if folder is not None:
        cases = _real_cases(folder, task, recipe, num) + cases
    if len(parts) == 1 and all(weights == {parts[0].name: 1.0} for weights in totals.values()):
        totals = {}  # the part is the total
    rows = fuzz(Pay(parts, totals, recipe.steps), task, cases)
    name = Path(target).stem if reward is None else reward.rpartition(":")[2]
    file = folder / "fuzz.json" if folder is not None else Path(f"fuzz_{name}.json")
    result = FuzzResult(
        target, sum(c.is_right for c in cases), sum(not c.is_right for c in cases), tuple(rows),
        tuple(left_out), file,
    )  # fmt: skip
    content = asdict(result) | {"file": str(file), "num_findings": len(result.findings)}
    write_json(file, content)
    return result


def _recipe_of(target: str, folder: Path | None, overrides: tuple[str, ...]) -> Recipe:
    if overrides and (folder is not None or target in ("words", "gsm8k")):
        raise UserError(f"overrides are for a recipe; {target} is none: {', '.join(overrides)}")
    if folder is not None:
        return read_recipe(folder)
    verifier = {"verifier": {"kind": "correct"}}
    match target:
        case "words":
            task = WordsTaskConfig(kind="words", num_train=200, num_held_out=1)
        case "gsm8k":
            task = Gsm8kTaskConfig(kind="gsm8k")
        case _:
            return load_recipe(target, overrides)
    tables = {"name": target, "steps": 1, "task": task.model_dump(), "rewards": verifier}
    return Recipe.model_validate(tables, strict=False)


def _totals(recipe: Recipe) -> dict[str, dict[str, float]]:
    if not recipe.stages:
        return {TOTAL: recipe.weights_at(1)}
    return {f"{TOTAL}, stage {i}": dict(s.weights) for i, s in enumerate(recipe.stages, start=1)}


# --- answers -------------------------------------------------------------------------------------


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


def _made_cases(recipe: Recipe, task: Task, num: int) -> list[Case]:
    """Return worked solutions, right and wrong, without and with openers in their reasoning."""
    cases = []
    for example in task.train[recipe.prompt.few_shot :][:num]:
        prompt = _prompt(recipe.prompt, example)
        bare = Rollout(prompt, 0, 0, "", (), (), is_truncated=False)
        prefill = prompt.prefill

        def form(text: str, prefill: str = prefill) -> str:
            return with_block(prefill, text) if uses_block(recipe) else text

        right = form(recipe.prompt.worked_answer(example.solution, example.answer))
        wrong = form(recipe.prompt.worked_answer(example.solution, example.answer + "1"))
        guess = form(recipe.prompt.worked_answer("I guess.", example.answer + "1"))
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
    return Case(rollout, _is_right(task, rollout), tuple(siblings))


def _is_right(task: Task, rollout: Rollout) -> bool:
    return task.verify(rollout.prompt.example, rollout.completion, rollout.is_truncated).correct


def _real_cases(folder: Path, task: Task, recipe: Recipe, num: int) -> list[Case]:
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
    for row in pq.read_table(file, columns=names).to_pylist():
        asked = [e for e in by_answer.get(row["answer"], ()) if e.question in row["prompt"]]
        if not asked:
            raise UserError(f"{file}: no training problem of the task is in {row['prompt']!r}")
        # Worked examples stand in the prompt as well: the question is the last of them.
        example = max(asked, key=lambda e: row["prompt"].rfind(e.question))
        prompt = _prompt(config, example, row["prompt"])
        bare = Rollout(prompt, row["group"], row["sample"], "", (), (), row["is_truncated"])
        groups.setdefault(row["group"], []).append(with_text(bare, row["completion"]))
    return list(groups.values())


# --- the search ----------------------------------------------------------------------------------


def fuzz(pay: Pay, task: Task, cases: Sequence[Case]) -> list[Row]:
    """Return a row for every reward and every edit that applied to an answer."""
    rows = []
    for edit in EDITS:
        tried, found = _try(pay, edit, cases)
        for name in [*(part.name for part in pay.parts), *pay.totals]:
            breaches = found.get(name, [])
            if not tried.get(name):
                continue
            smallest = None
            if breaches:
                case, first = min(breaches, key=lambda b: (len(b[1].after), b[1].times))
                smallest = _shrink(pay, task, edit, name, case, first)
            gains = [abs(b.paid_after - b.paid_before) for _, b in breaches]
            rows.append(
                Row(
                    name, edit.name, edit.prop, edit.must, edit.is_evasion, len(breaches),
                    tried[name], max(gains, default=0.0), smallest,
                )
            )  # fmt: skip
    return sorted(rows, key=lambda row: row.reward.startswith(TOTAL))


def _try(
    pay: Pay, edit: Edit, cases: Sequence[Case]
) -> tuple[dict[str, int], dict[str, list[tuple[Case, Breach]]]]:
    """Return for every reward how many edits were tried and those that breach."""
    chains: list[tuple[Case, Chain]] = []
    for case in cases:
        if edit.on == "wrong" and case.is_right:
            continue
        prefill = case.rollout.prompt.prefill
        for chain in edit.apply(prefill, case.rollout.completion):
            if not _is_repair(prefill, chain):
                chains.append((case, chain))
    asked = [(case, text) for case, chain in chains for text in chain.texts]
    scores = iter(pay.score([case for case, _ in asked], [text for _, text in asked]))
    tried: dict[str, int] = {}
    found: dict[str, list[tuple[Case, Breach]]] = {}
    for case, chain in chains:
        scored = [next(scores) for _ in chain.texts]
        for name in scored[0]:
            paid = [score[name] for score in scored]
            if any(value != value for value in paid):
                continue
            tried[name] = tried.get(name, 0) + 1
            at = breach_at(edit.must, paid)
            if at is not None:
                breach = Breach(
                    chain.texts[at - 1], chain.texts[at], paid[at - 1], paid[at], chain.times[at],
                    case.rollout.prompt.text,
                )  # fmt: skip
                found.setdefault(name, []).append((case, breach))
    return tried, found


def _is_repair(prefill: str, chain: Chain) -> bool:
    """Return whether the edit turns a malformed answer into one well-formed block."""
    return not is_one_block(prefill + chain.texts[0]) and is_one_block(prefill + chain.texts[-1])


def breach_at(must: str, paid: Sequence[float]) -> int | None:
    """Return the first place of a chain where the pay is not as it must be, or None.

    "cost ever more" binds a reward that counts: one that fell at the first tag and fell again at a
    later one. A reward that is indifferent, or pays nothing from the first tag on, need not fall.
    """
    steps = range(1, len(paid))
    if must == "not change":
        return next((i for i in steps if abs(paid[i] - paid[i - 1]) > EPSILON), None)
    raised = next((i for i in steps if paid[i] > paid[i - 1] + EPSILON), None)
    if raised is not None or must == "never raise":
        return raised
    falls = [paid[i] < paid[i - 1] - EPSILON for i in steps]
    if not falls[0] or not any(falls[1:]):
        return None
    return next((i for i in steps if not falls[i - 1]), None)


def _shrink(pay: Pay, task: Task, edit: Edit, name: str, case: Case, first: Breach) -> Breach:
    """Return the breach on the shortest answer found by leaving out words, half of them first.

    What is left must be right, or wrong, as the whole answer is.
    """
    best, left = first, MAX_SHRINKS

    def breaches(text: str) -> Breach | None:
        smaller = replace(case, rollout=with_text(case.rollout, text))
        if _is_right(task, smaller.rollout) != case.is_right:
            return None
        _, found = _try(pay, edit, [smaller])
        some = [breach for _, breach in found.get(name, [])]
        return min(some, key=lambda b: (len(b.after), b.times), default=None)

    pieces = re.findall(r"\s*\S+", case.rollout.completion)
    size = len(pieces) // 2
    while size:
        at = 0
        while at < len(pieces) and left:
            fewer = pieces[:at] + pieces[at + size :]
            found, left = breaches("".join(fewer)) if fewer else None, left - 1
            if found is None:
                at += size
            else:
                pieces, best = fewer, min(found, best, key=lambda b: (len(b.after), b.times))
        size //= 2
    return best


# --- what the terminal shows ---------------------------------------------------------------------


def show_fuzz(result: FuzzResult) -> Group:
    """Return every breach as a table, then the smallest example of each finding."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.title = (
        f"{result.target}: {result.num_right} right and {result.num_wrong} wrong answers; "
        f"{len(result.findings)} findings"
    )
    for column in ("reward", "edit", "must", "breached/tried", "most"):
        table.add_column(
            column, justify="right" if column in ("breached/tried", "most") else "left"
        )
    for name in dict.fromkeys(row.reward for row in result.rows):
        rows = [row for row in result.rows if row.reward == name]
        if not any(row.breaches and not row.is_evasion for row in rows):
            tried = sum(row.tried for row in rows if not row.is_evasion)
            table.add_row(name, "nothing found", "", f"0/{tried}", "")
        for row in sorted(rows, key=lambda row: row.is_evasion):
            if row.breaches:
                table.add_row(
                    name, f"{row.prop} {row.edit}", "(evasion)" if row.is_evasion else row.must,
                    f"{row.breaches}/{row.tried}",
                    f"{row.largest_gain:.3f}" if row.largest_gain > EPSILON else "free",
                )  # fmt: skip
    for name in result.left_out:
        table.add_row(name, "left out: it wants trace", "", "", "")
    return Group(table, *(_example(row) for row in result.findings))


def _example(row: Row) -> Text:
    assert row.smallest is not None, row
    one = row.smallest
    return Text(
        f"\n{row.reward}, {row.edit}:\n"
        f"  {one.paid_before:.3f}  {_short(one.before)!r}\n"
        f"  {one.paid_after:.3f}  {_short(one.after)!r}"
    )


def _short(text: str) -> str:
    return text if len(text) <= 90 else f"{text[:55]} ... {text[-30:]}"
