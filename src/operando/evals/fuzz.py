"""Looks for edits of real answers that a reward rewards although they deserve no reward.

The first question is whether a wrong answer is rewarded like a right one (P0); what a reward says
to it is its `reads`. A finding is an edit (mutations.py) after which a reward does what it must not
do by that edit, with the smallest answer on which it does so. An evasion (an opener in no list) is
shown beside the findings and is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Group
from rich.text import Text

from operando.errors import UserError
from operando.evals.answers import Mutation, Variants
from operando.evals.fuzz_cases import Case, is_right, made_cases, real_cases, with_text
from operando.evals.mutations import FIRST, MUTATIONS
from operando.recipe.data import Gsm8kTaskConfig, WordsTaskConfig
from operando.recipe.run import Recipe
from operando.recipe_io import load_recipe
from operando.rewards.base import RewardFunction, RewardLog, TrainerState, as_tokens
from operando.rewards.compose import RewardPart, make_parts, weighted_sum
from operando.rewards.formats import is_one_block
from operando.run import write_json
from operando.run_folder import read_recipe
from operando.tables import table
from operando.tasks.base import Task
from operando.tasks.load import recipe_task
from operando.tasks.user_code import load_function
from operando.types import Rollout

EPSILON = 1e-6  # pay is float32
CHUNK = 128  # texts graded at once, each with its siblings
MADE_BESIDE_REAL = 4  # problems answered by hand beside a run's own answers
MAX_SHRINKS = 150
TOTAL = "weighted total"
TAGGED = (
    "P1",
    "P2",
    "P6",
)  # properties of tags: without any, an answer may be rewarded as it likes
PLAIN = ("", "I don't know.")  # what deserves nothing
TAG = re.compile(r"<[^<>]*>")

BLIND = 0.8  # share of other numbers; a pattern may want whole ones

Reads = Literal["right", "some", "never", "not asked"]
"""Whether a reward reads the answer: right, it pays every wrong one less; some, it pays some wrong
answers like right ones; never, it pays (nearly) every other number like the right one; not asked,
it pays no right answer more than "I don't know", or applies to none."""


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
    reads: Mapping[str, Reads]
    """By reward; a part that never reads the answer is as it should be, where the total does."""
    file: Path

    @property
    def findings(self) -> list[Row]:
        return [row for row in self.rows if row.breaches and not row.is_evasion]


@dataclass(frozen=True)
class RewardSet:
    """The reward parts, and the weighted totals that a policy is really rewarded, one a stage."""

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
    task = recipe_task(recipe)
    own = functions or {}
    if reward is not None:
        parts = [RewardPart("reward", function=load_function(reward))]
        totals: dict[str, dict[str, float]] = {}
    else:
        parts, totals = make_parts(recipe, task, own), _totals(recipe)
    left_out = [part.name for part in parts if part.needs_trace()]
    parts = [part for part in parts if not part.needs_trace()]
    if not parts:
        raise UserError(f"{target}: every reward needs `trace`, which the fuzzer does not have")
    cases = made_cases(recipe, task, num if folder is None else MADE_BESIDE_REAL)
    if folder is not None:
        cases = real_cases(folder, task, recipe, num) + cases
    if len(parts) == 1 and all(weights == {parts[0].name: 1.0} for weights in totals.values()):
        totals = {}  # the part is the total
    rows = fuzz(RewardSet(parts, totals, recipe.steps), task, cases)
    reads: dict[str, Reads] = {
        name: reads_answer(rows, name) for name in (*(p.name for p in parts), *totals)
    }
    by_design = _by_design(reads, totals, left_out)
    rows = [row for row in rows if row.prop != FIRST[0].prop or row.reward not in by_design]
    name = Path(target).stem if reward is None else reward.rpartition(":")[2]
    file = folder / "fuzz.json" if folder is not None else Path(f"fuzz_{name}.json")
    result = FuzzResult(
        target,
        sum(c.is_right for c in cases),
        sum(not c.is_right for c in cases),
        tuple(rows),
        tuple(left_out),
        reads,
        file,
    )
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


# --- the search ----------------------------------------------------------------------------------


def reads_answer(rows: Sequence[Row], name: str) -> Reads:
    """Return whether a reward tells a right answer from another number or another problem's."""
    first = [r for r in rows if r.reward == name and r.prop == FIRST[0].prop]
    swaps = [r for r in first if r.edit in (FIRST[0].name, FIRST[1].name)]
    if not swaps:
        return "not asked"
    if all(row.breaches >= BLIND * row.tried for row in swaps):
        return "never"
    return "some" if any(row.breaches for row in first) else "right"


def _by_design(
    reads: Mapping[str, Reads], totals: Mapping[str, object], left_out: Sequence[str]
) -> set[str]:
    """Return what may be blind to the answer: parts of a total, and stages beside one that is not.

    A total that lacks a part which wants `trace` is not what the policy is rewarded.
    """
    blind = {name for name, read in reads.items() if read == "never"}
    if not totals:
        return blind if left_out else set()
    seeing = any(name in totals and read in ("right", "some") for name, read in reads.items())
    return {name for name in blind if name not in totals or seeing or left_out}


def fuzz(rewards: RewardSet, task: Task, cases: Sequence[Case]) -> list[Row]:
    """Return a row for every reward and every edit that applied to an answer."""
    rows = []
    for edit in MUTATIONS:
        tried, found = _try(rewards, task, edit, cases)
        for name in [*(part.name for part in rewards.parts), *rewards.totals]:
            breaches = found.get(name, [])
            if not tried.get(name):
                continue
            smallest = None
            if breaches:
                case, first = min(breaches, key=lambda b: (len(b[1].after), b[1].times))
                smallest = _shrink(rewards, task, edit, name, case, first)
            gains = [abs(b.paid_after - b.paid_before) for _, b in breaches]
            rows.append(
                Row(
                    name,
                    edit.name,
                    edit.prop,
                    edit.must,
                    edit.is_evasion,
                    len(breaches),
                    tried[name],
                    max(gains, default=0.0),
                    smallest,
                )
            )
    return sorted(rows, key=lambda row: row.reward.startswith(TOTAL))


def _try(
    rewards: RewardSet, task: Task, edit: Mutation, cases: Sequence[Case]
) -> tuple[dict[str, int], dict[str, list[tuple[Case, Breach]]]]:
    """Return for every reward how many edits were tried and those that breach."""
    chains: list[tuple[Case, Variants, tuple[str, ...]]] = []
    for case in cases:
        if edit.on != "any" and case.is_right != (edit.on == "right"):
            continue
        for chain in edit.apply(case.answer):
            if _is_repair(case.answer.prefill, chain) or _is_still_right(task, edit, case, chain):
                continue
            chains.append((case, chain, (*chain.texts, *_beside(edit, case, chain))))
    asked = {(id(case), text): case for case, _, texts in chains for text in texts}
    scores = rewards.score(list(asked.values()), [text for _, text in asked])
    score_of = dict(zip(asked, scores, strict=True))
    tried: dict[str, int] = {}
    found: dict[str, list[tuple[Case, Breach]]] = {}
    for case, chain, texts in chains:
        scored = [score_of[id(case), text] for text in texts]
        for name in scored[0]:
            paid = [score[name] for score in scored[: len(chain.texts)]]
            beside = [p for s in scored[len(chain.texts) :] if (p := s[name]) == p]  # not NaN
            if any(value != value for value in paid):
                continue
            if edit.must == "pay less" and (not beside or paid[0] <= min(beside) + EPSILON):
                continue  # nothing is rewarded being right
            tried[name] = tried.get(name, 0) + 1
            at = breach_at(edit.must, paid)
            if at is not None and edit.prop in TAGGED and paid[at] <= max(beside) + EPSILON:
                at = None  # tags cost, and here are fewer of them
            if at is not None:
                breach = Breach(
                    chain.texts[at - 1],
                    chain.texts[at],
                    paid[at - 1],
                    paid[at],
                    chain.times[at],
                    case.rollout.prompt.text,
                )
                found.setdefault(name, []).append((case, breach))
    return tried, found


def _beside(edit: Mutation, case: Case, chain: Variants) -> tuple[str, ...]:
    """Return what a chain is compared with: answers that deserve nothing, or one without tags."""
    if edit.must == "pay less":
        return (*PLAIN, case.wrong)
    return (TAG.sub("", chain.texts[0]),) if edit.prop in TAGGED else ()


def _is_still_right(task: Task, edit: Mutation, case: Case, chain: Variants) -> bool:
    """Return whether an edit that should make a wrong answer made one that the verifier takes.

    Another number is wrong whatever a verifier says of it.
    """
    if edit.must != "pay less" or edit.name == FIRST[0].name:
        return False
    return is_right(task, with_text(case.rollout, chain.texts[-1]))


def _is_repair(prefill: str, chain: Variants) -> bool:
    """Return whether the edit turns a malformed answer into one well-formed block."""
    return not is_one_block(prefill + chain.texts[0]) and is_one_block(prefill + chain.texts[-1])


def breach_at(must: str, paid: Sequence[float]) -> int | None:
    """Return the first place of a chain where the pay is not as it must be, or None.

    "cost ever more" binds a reward that counts: one that fell at the first tag and fell again at a
    later one. A reward that is indifferent, or gives nothing from the first tag on, need not fall.
    """
    steps = range(1, len(paid))
    if must == "not change":
        return next((i for i in steps if abs(paid[i] - paid[i - 1]) > EPSILON), None)
    if must == "pay less":
        return next((i for i in steps if paid[i] >= paid[0] - EPSILON), None)
    raised = next((i for i in steps if paid[i] > paid[i - 1] + EPSILON), None)
    if raised is not None or must == "never raise":
        return raised
    falls = [paid[i] < paid[i - 1] - EPSILON for i in steps]
    if not falls[0] or not any(falls[1:]):
        return None
    return next((i for i in steps if not falls[i - 1]), None)


def _shrink(
    rewards: RewardSet, task: Task, edit: Mutation, name: str, case: Case, first: Breach
) -> Breach:
    """Return the breach on the shortest answer found by leaving out words, half of them first.

    What is left must be right, or wrong, as the whole answer is.
    """
    best, left = first, MAX_SHRINKS

    def breaches(text: str) -> Breach | None:
        smaller = replace(case, rollout=with_text(case.rollout, text))
        if is_right(task, smaller.rollout) != case.is_right:
            return None
        _, found = _try(rewards, task, edit, [smaller])
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


# --- the terminal --------------------------------------------------------------------------------


def show_fuzz(result: FuzzResult) -> Group:
    """Return every breach as a table, whether each reward reads the answer, then the smallest
    example of each finding."""
    cells = []
    for name, reads in result.reads.items():
        rows = [row for row in result.rows if row.reward == name]
        if not any(row.breaches and not row.is_evasion for row in rows):
            tried = sum(row.tried for row in rows if not row.is_evasion)
            said = "nothing found" if reads == "right" else "nothing else found"
            cells.append((name, said if tried else "nothing tried", "", f"0/{tried}"))
        for row in sorted(rows, key=lambda row: row.is_evasion):
            if row.breaches:
                must = "(evasion)" if row.is_evasion else row.must
                most = f"{row.largest_gain:.3f}" if row.largest_gain > EPSILON else "free"
                tried = f"{row.breaches}/{row.tried}"
                cells.append((name, f"{row.prop} {row.edit}", must, tried, most))
    cells += [(name, "left out: it wants trace") for name in result.left_out]
    title = (
        f"{result.target}: {result.num_right} right and {result.num_wrong} wrong answers; "
        f"{len(result.findings)} findings"
    )
    heads = ("reward", "edit", "must", "breached/tried", "most")
    shown = table(title, heads, cells, words=heads[:3])
    said = [Text(line) for name in result.reads for line in _reads_words(result, name)]
    return Group(shown, *said, *(_example(row) for row in result.findings))


def _reads_words(result: FuzzResult, name: str) -> list[str]:
    """Return what is to say of a reward's answer to the first question; [] if it pays as it must"""
    is_accused = any(row.reward == name and row.prop == "P0" for row in result.findings)
    match result.reads[name]:
        case "never" if is_accused:
            return [f"{name}: it never reads the answer: a wrong one is rewarded like a right one."]
        case "never":
            return [
                f"{name}: this part alone never reads the answer; what is rewarded beside it must."
            ]
        case "not asked":
            return [
                f"{name}: it pays no right answer more than none, so whether it reads the "
                "answer could not be asked."
            ]
        case _:
            return []


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
