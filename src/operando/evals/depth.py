"""Decision depth: how many tokens of the trained model the base needs to answer as well.

The base decodes, and at the first k places where the two models would write another token it is
given the trained model's. If one token is enough, training has changed one decision; if that token
is the same for every problem, it has thrown a switch. Beside it: the reverse, placebos (the base's
next-best token at the same places, and at random ones), and the best edits that are the same for
every problem, searched on others: a token, a prefix, the form of an answer put into the prompt. The
KL by position is that of 2605.06241.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from operando.errors import UserError
from operando.evals.forced import Decoded, Edit, Pair
from operando.evals.instructed import best_instructed, instructed, prompt_edits
from operando.models.load import load_model
from operando.models.policy import Policy
from operando.rollout.sampler import Sampling
from operando.run import SeedTree, write_json
from operando.run_folder import read_recipe, start_of
from operando.setup import make_prompt_sets, prompt_limit
from operando.stats.bootstrap import cluster_bootstrap
from operando.stats.intervals import Interval, PairedDifference, paired_difference, wilson
from operando.tables import TextTable, interval, limits, table
from operando.tasks.load import recipe_task
from operando.update.checkpoint import load_weights, pick_step

FORCED = (1, 2, 4, 8)
POSITIONS = 32  # of the KL by position
LONGEST = 60  # characters of an edit's text that are printed


@dataclass(frozen=True)
class DepthRow:
    """One way of decoding: its share of right answers, and the share of the gain that it keeps.

    `tokens` is the mean number of tokens forced an answer. The share of the gain is
    (this - base) / (trained - base), with problems drawn together; None where the gain's interval
    holds zero.
    """

    arm: str
    k: int | None  # None: no limit
    correct: Interval
    share: Interval | None
    tokens: float


@dataclass(frozen=True)
class ConstantEdit:
    """The best edit of its kind that is the same for every problem, out of `tried`."""

    place: int | None  # of the answer; None: in the prompt
    text: str
    correct: Interval
    share: Interval | None
    tried: int


@dataclass(frozen=True)
class DepthReport:
    """How deep the difference of two models lies; `rows` begin with the base and the trained."""

    step: int
    temperature: float | None
    n: int
    searched: int
    gain: PairedDifference
    rows: tuple[DepthRow, ...]
    token: ConstantEdit | None  # None: the models never differed on the problems of the search
    prefix: ConstantEdit | None
    prompt: ConstantEdit | None  # None: the form can't be said or shown within the model's context
    flips: float  # share of the positions of the trained model's answers
    rank: float | None  # median over the flips
    kl: tuple[float, ...]  # KL(trained || base) by position, on the trained model's answers
    file: Path


def measure_depth(
    run: Path,
    *,
    step: int | None = None,
    num: int = 200,
    search: int = 100,
    temperature: float | None = None,
    on_arm: Callable[[str], None] = lambda _: None,
) -> DepthReport:
    """Return the decision depth of a saved step (None: the last) on `num` held-out problems.

    Greedy, or at a temperature: both models then draw each token by the same uniform number. The
    constant edits are searched on `search` problems of the training split.

    Example: measure_depth(Path("runs/demo")).rows[2].share
    """
    recipe = read_recipe(run)
    step = pick_step(run, step)
    task = recipe_task(recipe)
    for option, given, most in (("num", num, task.held_out), ("search", search, task.train)):
        if given > len(most):
            raise UserError(f"--{option} {given}: the split has {len(most)} problems")
    wanted = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"num": num})})
    base, trained = (
        Policy(load_model(recipe.model), recipe.model, SeedTree(recipe.seed)) for _ in range(2)
    )
    load_weights(run, step, trained)
    tokenizer = base.tokenizer
    others, prompts = make_prompt_sets(wanted, task, tokenizer, base.base.config, start_of(run))
    length = recipe.eval.max_completion_length or recipe.rollout.max_completion_length
    sampling = Sampling(length, temperature or 1.0, recipe.rollout.stop)
    pair = Pair(
        base.base, trained.base, tokenizer, task, sampling, temperature is None, recipe.seed
    )
    found: list[tuple[str, int | None, list[bool], float]] = []

    def add(arm: str, k: int | None, decoded: Decoded) -> list[bool]:
        right = pair.right(prompts, decoded)
        found.append((arm, k, right, float(np.mean([len(f) for f in decoded.forced]))))
        on_arm(f"{arm}{'' if k is None else f', {k}'}: {sum(right)}/{num}")
        return right

    own = pair.decode(prompts, "base", Edit())
    before = add("base", None, own)
    after = add("trained", None, pair.decode(prompts, "trained", Edit()))
    for k in FORCED:
        add("base, trained's tokens", k, pair.decode(prompts, "base", Edit("other", k)))
    every = pair.decode(prompts, "base", Edit("other", length), measured=True)
    add("base, trained's tokens", None, every)
    for k in FORCED:
        add("trained, base's tokens", k, pair.decode(prompts, "trained", Edit("other", k)))
    for k in FORCED:
        add("base, its next best", k, pair.decode(prompts, "base", Edit("next_best", k)))
    for k in FORCED:
        places = random_places([len(one.ids) for one in own.answers], k, recipe.seed)
        edit = Edit("random", k, places)
        add("base, next best anywhere", k, pair.decode(prompts, "base", edit))
    gain = paired_difference(before, after)
    shares = gain.difference.low > 0 or gain.difference.high < 0

    def share(right: list[bool]) -> Interval | None:
        return share_of_gain(before, after, right, recipe.seed) if shares else None

    def constant(place: int | None, text: str, tried: int, right: list[bool]) -> ConstantEdit:
        on_arm(f"constant edit, {_where(place, text)}: {sum(right)}/{num}")
        return ConstantEdit(place, text, wilson(sum(right), num), share(right), tried)

    def written(best: tuple[Edit, int] | None) -> ConstantEdit | None:
        if best is None:
            return None
        edit, tried = best
        right = pair.right(prompts, pair.decode(prompts, "base", edit))
        return constant(edit.place, str(tokenizer.decode(list(edit.ids))), tried, right)

    token, prefix = (written(best) for best in pair.search(others[:search]))
    few_shot = recipe.prompt.few_shot
    shots, unseen = task.train[:few_shot], task.train[few_shot + search :]
    tried = instructed(
        pair,
        prompt_edits(recipe.prompt, task.text, shots, unseen),
        [prompt.example for prompt in others[:search]],
        [prompt.example for prompt in prompts],
        prompt_limit(recipe, base.base.config),
        start_of(run),
    )
    best = best_instructed(pair, tried)
    in_prompt = None
    if best is not None:
        decoded = pair.decode(best.held_out, "base", Edit())
        in_prompt = constant(None, best.text, len(tried), pair.right(best.held_out, decoded))
    flips = [flip for row in every.flip for flip in row]
    report = DepthReport(
        step=step,
        temperature=temperature,
        n=num,
        searched=search,
        gain=gain,
        rows=tuple(
            DepthRow(arm, k, wilson(sum(right), num), share(right), tokens)
            for arm, k, right, tokens in found
        ),
        token=token,
        prefix=prefix,
        prompt=in_prompt,
        flips=float(np.mean(flips)),
        rank=float(np.median(every.rank)) if every.rank else None,
        kl=by_position(every.kl),
        file=run / "evals" / f"depth_step_{step:05d}.json",
    )
    kept = {key: value for key, value in asdict(report).items() if key != "file"}
    write_json(report.file, {"format": 1, "said": depth_sentence(report), **kept})
    return report


def share_of_gain(
    before: Sequence[bool], after: Sequence[bool], right: Sequence[bool], seed: int
) -> Interval:
    """Return (right - before) / (after - before) with a bootstrap interval over problems."""
    values = [tuple(map(float, row)) for row in zip(before, after, right, strict=True)]

    def ratio(mean_bK: np.ndarray) -> np.ndarray:
        gain = mean_bK[:, 1] - mean_bK[:, 0]
        # a draw without any gain has no share; it counts as none of it
        return np.divide(
            mean_bK[:, 2] - mean_bK[:, 0], gain, out=np.zeros(len(gain)), where=gain != 0
        )

    return cluster_bootstrap(values, ratio, range(len(values)), seed)


def random_places(lengths: Sequence[int], k: int, seed: int) -> tuple[frozenset[int], ...]:
    """Return k places of each answer, all of them where it has no more."""
    draw = random.Random(SeedTree(seed).derive("depth", "places"))
    return tuple(frozenset(draw.sample(range(n), min(k, n))) for n in lengths)


def by_position(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the mean of each position, over the answers that reach it."""
    longest = min(POSITIONS, max(map(len, rows)))
    return tuple(float(np.mean([row[t] for row in rows if t < len(row)])) for t in range(longest))


# --- for the terminal ---------------------------------------------------------------------------


def depth_table(report: DepthReport) -> TextTable:
    """Return the arms: right answers, the share of the gain, tokens forced an answer."""
    rows = []
    for row in report.rows:
        limit = "" if row.k is None else str(row.k)
        forced = f"{row.tokens:.1f}" if row.tokens else ""
        rows.append((row.arm, limit, *_rates(row.correct, row.share), forced))
    for name, edit in _constants(report).items():
        if edit is not None:
            label = f"base, constant {name} {_short(edit.text)!r}"
            rows.append((label, "", *_rates(edit.correct, edit.share)))
    how = "greedy" if report.temperature is None else f"temperature {report.temperature:g}"
    title = f"decision depth of step {report.step}, {report.n} held-out problems, {how}"
    first = "who writes, with whose tokens"
    heads = (first, "at most", "right", "95 %", "of the gain", "forced")
    return table(title, heads, rows, words=(first,))


def depth_lines(report: DepthReport) -> list[str]:
    """Return what the table says, and what it can't say."""
    gain = report.gain.difference
    words = f"{100 * gain.value:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
    lines = [depth_sentence(report)]
    if report.rows[0].share is None:
        lines.append(f"the change, {words}, is not told from zero: it has no depth to speak of")
    rank = "" if report.rank is None else f"; the base ranks them {report.rank:g} (median)"
    lines.append(
        f"the models' first choices differ at {report.flips:.1%} of the positions{rank}; KL by "
        f"position: {', '.join(f'{x:.2f}' for x in report.kl[:8])}"
    )
    return lines


def depth_sentence(report: DepthReport) -> str:
    """Return in one sentence where the gain lies."""
    one = next(row for row in report.rows if row.k == 1 and row.arm == "base, trained's tokens")
    if one.share is None:
        return f"depth: no gain to look into on {report.n} problems"
    said = f"depth: {_share(one.share)} of the gain is there once the base is given one token"
    best = max(
        (edit for edit in _constants(report).values() if edit is not None and edit.share),
        key=lambda edit: edit.correct.value,
        default=None,
    )
    if best is None or best.share is None:
        return f"{said}; no constant edit was found to try"
    return f"{said}; {_share(best.share)} is one constant edit, {_where(best.place, best.text)}"


def _constants(report: DepthReport) -> dict[str, ConstantEdit | None]:
    return {"token": report.token, "prefix": report.prefix, "prompt": report.prompt}


def _where(place: int | None, text: str) -> str:
    return f"{_short(text)!r} " + ("in the prompt" if place is None else f"at token {place + 1}")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _share(share: Interval) -> str:
    return interval(share, ".0%")


def _rates(correct: Interval, share: Interval | None) -> tuple[str, str, str]:
    of_gain = "" if share is None else f"{share.value:.0%}"
    return f"{correct.value:.1%}", limits(correct, ".0%"), of_gain
