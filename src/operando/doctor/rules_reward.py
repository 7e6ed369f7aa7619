"""Rules about rewards: they rise and the truth does not, or the internals leave their range."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from operando.doctor.findings import (
    EXCUSE,
    LEVEL,
    MIN_STEPS,
    Count,
    Finding,
    Row,
    ends,
    greater,
    held_out_counts,
    odds,
    rise_chance,
    series,
    share_words,
)
from operando.recipe.run import Recipe

POWER = 1.5  # rise over the smallest that n problems show: 97 % of such rises have p < 0.05
LOST = 0.5  # share of what was gained
GRAVE = 1e-3  # level of a fall that is a sign by itself
OVER_LIMIT = 0.1  # share of completions; 0.01 is what right base answers show


class Fall(NamedTuple):
    """A significant fall of held-out accuracy from its peak, and the words for it."""

    first: int
    peak: int
    last: int
    words: str
    is_grave: bool
    """It ends below the start, or has lost half of what was gained, and chance is under GRAVE."""


def fall_of(rows: Sequence[Row]) -> Fall | None:
    """Return the fall of eval/correct from its peak to its last value, if chance is no excuse.

    Fisher's exact test of the two counts, one-sided, times the number of evaluations (Bonferroni:
    the peak was chosen among them). The problems are the same ones, so this errs on the safe side.
    """
    counts = held_out_counts(rows)
    if len(counts) < 2:
        return None
    first, last = min(counts), max(counts)
    peak = max(counts, key=lambda step: counts[step].right / counts[step].n)
    chance = min(1.0, rise_chance(counts[peak], counts[last]) * len(counts))
    if chance >= LEVEL:
        return None
    words = (
        f"held-out accuracy fell from {share_words(counts[peak])} at step {peak} to "
        f"{share_words(counts[last])} at step {last} (chance of such a fall among {len(counts)} "
        f"evaluations: {odds(chance)})"
    )
    start, top, end = (counts[step].share for step in (first, peak, last))
    is_grave = chance < GRAVE and end <= start + LOST * (top - start)
    return Fall(first, peak, last, words, is_grave)


def negative_weights(recipe: Recipe) -> str:
    """Return the parts whose weight is negative, as the recipe has them; "" if there are none.

    A negative weight of a part that rewards being right trains the policy to be wrong.
    """
    parts = [(name, part.weight) for name, part in recipe.rewards.items() if part.weight < 0]
    return ", ".join(f"rewards.{name}.weight = {weight:g}" for name, weight in parts)


def reward_hack(rows: Sequence[Row], recipe: Recipe, fall: Fall | None) -> Finding | None:
    """A reward part, or the whole, rose over the run and kept its height while the truth fell."""
    if fall is None:
        return None
    risen = [words for name in _parts(rows) if (words := _risen(rows, name, fall))]
    paid = ends(rows, "reward")
    if not risen and fall.is_grave and paid is not None and greater(paid.late, paid.early):
        early, late = fmean(paid.early), fmean(paid.late)
        risen = [f"the weighted reward in training rose from {early:.3f} to {late:.3f}"]
    if not risen:
        return None
    negative = negative_weights(recipe)
    if negative:
        return Finding(
            "reward_hack",
            "error",
            f"The policy earns more and is right less: {fall.words}, while {' and '.join(risen)}.",
            f"{negative}: what is rewarded is the contrary; make the weight positive",
        )
    return Finding(
        "reward_hack",
        "error",
        f"The policy earns more and is right less: {fall.words}, while {' and '.join(risen)}.",
        'use a strict verifier (kind = "correct") in place of that part, or hold the policy near '
        "its start with [kl] coef = 0.1, or stop at the peak, step "
        f"{fall.peak}",
    )


def _parts(rows: Sequence[Row]) -> list[str]:
    keys = {key for row in rows for key in row}
    paid = {k.split("/")[1] for k in keys if k.startswith("rewards/") and k.endswith("/mean")}
    held_out = {k.removeprefix("eval/rewards/") for k in keys if k.startswith("eval/rewards/")}
    return sorted(paid | held_out)


def _risen(rows: Sequence[Row], name: str, fall: Fall) -> str | None:
    """Return the words for the rise of a reward part, measured on held-out problems if it was."""
    held_out = dict(series(rows, f"eval/rewards/{name}"))
    if {fall.first, fall.peak, fall.last} <= held_out.keys():
        first, peak, last = (held_out[step] for step in (fall.first, fall.peak, fall.last))
        counts = dict(series(rows, "eval/n"))
        # half a standard error at most, for a part in [0, 1]: what counts as "kept its height"
        slack = 0.25 / counts[fall.last] ** 0.5
        if last <= first + slack or last < peak - slack:
            return None
        rise = f"from {first:.3f} at step {fall.first} to {last:.3f} at step {fall.last}"
        return f"the reward part {name!r} on the same problems rose {rise}"
    paid = series(rows, f"rewards/{name}/mean")
    if len(paid) < MIN_STEPS:
        return None
    width = max(3, len(paid) // 5)
    early, late = [p.value for p in paid[:width]], [p.value for p in paid[-width:]]
    around_peak = [p.value for p in paid if abs(p.step - fall.peak) <= width] or early
    if not greater(late, early) or greater(around_peak, late):
        return None
    rise = f"from {fmean(early):.3f} over the first {width} steps to {fmean(late):.3f} over the"
    return f"the reward part {name!r} in training rose {rise} last {width}"


def reward_up_eval_flat(rows: Sequence[Row], fall: Fall | None) -> Finding | None:
    """A reward part rose in training, and held-out accuracy did not where n could have shown it.

    Silent where any evaluation stands above the first (p < 0.05), and where no part rose by POWER
    times the smallest rise that Fisher's test of so many problems could see.
    """
    counts = held_out_counts(rows)
    if fall is not None or len(counts) < 2:
        return None
    first, last = counts[min(counts)], counts[max(counts)]
    seen = smallest_rise(first, last.n)
    later = [count for step, count in counts.items() if step != min(counts)]
    if seen is None or any(rise_chance(c, first) < EXCUSE for c in later):
        return None
    risen = []
    for name in _parts(rows):
        paid = ends(rows, f"rewards/{name}/mean")
        if paid is None or not greater(paid.late, paid.early):
            continue
        early, late = fmean(paid.early), fmean(paid.late)
        if late - early >= POWER * seen:
            risen.append(f"{name!r} from {early:.3f} to {late:.3f}")
    if not risen:
        return None
    return Finding(
        "reward_up_eval_flat",
        "warning",
        f"Reward went up and held-out accuracy did not: in training {' and '.join(risen)} (first "
        f"and last fifth of the steps), on held-out problems {share_words(first)} at step "
        f"{min(counts)} and {share_words(last)} at step {max(counts)}; {last.n} problems would "
        f"have shown a rise of {seen:.1%} (Fisher, one-sided, p < {LEVEL}).",
        "read completions that are rewarded and wrong (`operando fuzz RUN` looks for the edits "
        "that are rewarded); if those are right, the training problems are learned by heart: "
        "take more of them, fewer steps",
    )


def smallest_rise(first: Count, n: int) -> float | None:
    """Return the smallest rise of accuracy that n problems show at LEVEL; None: none would do."""
    start = first.right / first.n
    for right in range(round(start * n) + 1, n + 1):
        if rise_chance(Count(right, n), first) < LEVEL:
            return right / n - start
    return None


def over_limit(rows: Sequence[Row]) -> Finding | None:
    """An internal reward leaves the range of honest answers, and goes on leaving it.

    The share of completions over the set's limit is above OVER_LIMIT at the end, and the gap
    between the policy's and the base's read of the same tokens (or, read once, that share) grows.
    """
    keys = sorted({key for row in rows for key in row if key.endswith("/over_limit")})
    for key in keys:
        name = key.removesuffix("/over_limit")
        share, gap = ends(rows, key), ends(rows, f"{name}/gap")
        grows = gap or share
        if share is None or grows is None or fmean(share.late) <= OVER_LIMIT:
            continue
        if not greater(grows.late, grows.early):
            continue
        words = f"{fmean(share.late):.0%} of the completions of the last {len(share.late)} steps"
        read = "that share went"
        if gap is not None:
            read = "the gap between the policy's and the frozen base's read of the same tokens went"
        return Finding(
            "over_limit",
            "warning",
            f"The reward {name!r} is rewarded outside the range it was calibrated on: {words} show "
            "its features more strongly than 99 % of right base answers do (1 % expected), and "
            f"{read} from {fmean(grows.early):.3f} to {fmean(grows.late):.3f} (first and last "
            "fifth of the steps).",
            f'lower rewards.{name}.weight, read the frozen base too (read = "min", dual = true), '
            "or add [kl] coef = 0.1; `operando canary RUN` shows whether it is gamed",
        )
    return None
