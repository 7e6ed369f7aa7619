"""What ails a run, read from its metrics: each finding says its arithmetic and a remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal, NamedTuple, TypeAlias

from scipy.stats import hypergeom, mannwhitneyu

Row: TypeAlias = Mapping[str, float | int | str | None]

LEVEL = 0.01  # of every test below
MIN_STEPS = 10  # fewer training steps say nothing about a trend
FEW_STEPS = 10
HIGH_ZERO_STD = 0.8  # share of groups without a difference between siblings
ALL_ZERO_STD = 0.95
LOW_ENTROPY = 0.1  # of the start
TRUNCATED = 0.1
TINY_KL = 0.02  # nats a token
TINY_UPDATE = 1e-4  # ||dW|| / ||W|| of one step


@dataclass(frozen=True)
class Finding:
    """One illness.

    Example: Finding("truncation", "warning", "31 % of the completions of steps 51-60 were cut ...",
                     "raise rollout.max_completion_length above 48")
    """

    name: str
    severity: Literal["error", "warning"]
    sentence: str
    remedy: str


class Point(NamedTuple):
    """A value and the step it belongs to. Example: Point(20, 0.61)"""

    step: int
    value: float


class Count(NamedTuple):
    """Right answers of n. Example: Count(140, 200)"""

    right: int
    n: int


class Fall(NamedTuple):
    """A significant fall of held-out accuracy from its peak, and the words for it."""

    first: int
    peak: int
    last: int
    words: str


def series(rows: Sequence[Row], key: str) -> list[Point]:
    """Return the values of one key where it was measured, by step."""
    found = []
    for row in rows:
        value, step = row.get(key), row["step"]
        if isinstance(value, float | int) and isinstance(step, float | int):
            found.append(Point(int(step), float(value)))
    return found


def held_out_counts(rows: Sequence[Row]) -> dict[int, Count]:
    """Return the right answers on held-out problems by step."""
    sizes = dict(series(rows, "eval/n"))
    return {
        step: Count(round(share * sizes[step]), round(sizes[step]))
        for step, share in series(rows, "eval/correct")
    }


def diagnose(rows: Sequence[Row], max_grad_norm: float) -> list[Finding]:
    """Return what ails a run, gravest first; a healthy run has no finding."""
    fall = _fall(rows)
    hack = _reward_hack(rows, fall)
    found = [
        hack,
        _collapse(rows, fall, hacked=hack is not None),
        _no_signal(rows),
        _no_learning(rows, max_grad_norm),
        _truncation(rows),
    ]
    return [finding for finding in found if finding is not None]


def _fall(rows: Sequence[Row]) -> Fall | None:
    """Return the fall of eval/correct from its peak to its last value, if chance is no excuse.

    Fisher's exact test of the two counts, one-sided, times the number of evaluations (Bonferroni:
    the peak was chosen among them). The problems are the same ones, so this errs on the safe side.
    """
    counts = held_out_counts(rows)
    if len(counts) < 2:
        return None
    first, last = min(counts), max(counts)
    peak = max(counts, key=lambda step: counts[step].right / counts[step].n)
    chance = min(1.0, _chance(counts[peak], counts[last]) * len(counts))
    if chance >= LEVEL:
        return None
    words = (
        f"held-out accuracy fell from {_share(counts[peak])} at step {peak} to "
        f"{_share(counts[last])} at step {last} (chance of such a fall among {len(counts)} "
        f"evaluations: {_p(chance)})"
    )
    return Fall(first, peak, last, words)


def _reward_hack(rows: Sequence[Row], fall: Fall | None) -> Finding | None:
    """A reward part rose over the run and kept its height while the truth fell."""
    if fall is None:
        return None
    risen = [words for name in _parts(rows) if (words := _risen(rows, name, fall))]
    if not risen:
        return None
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
    if not _greater(late, early) or _greater(around_peak, late):
        return None
    rise = f"from {fmean(early):.3f} over the first {width} steps to {fmean(late):.3f} over the"
    return f"the reward part {name!r} in training rose {rise} last {width}"


def _collapse(rows: Sequence[Row], fall: Fall | None, *, hacked: bool) -> Finding | None:
    """The policy has lost its variety, and accuracy with it."""
    entropy, flat = series(rows, "entropy"), series(rows, "frac_reward_zero_std")
    if fall is None or len(entropy) < MIN_STEPS:
        return None
    start = fmean(p.value for p in entropy[:3])
    end = fmean(p.value for p in entropy[-3:])
    signs = []
    if end < LOW_ENTROPY * start:
        signs.append(
            f"entropy fell from {start:.3f} to {end:.4f} nats a token ({end / start:.1%} of its "
            "start)"
        )
    last = flat[-max(3, len(flat) // 10) :]
    # a hacked reward is constant because it is saturated: that is the hack, told above
    if not hacked and last and fmean(p.value for p in last) >= ALL_ZERO_STD:
        share = fmean(p.value for p in last)
        signs.append(f"in {share:.0%} of the groups of the last {len(last)} steps all siblings "
                     "were paid alike")  # fmt: skip
    if not signs:
        return None
    return Finding(
        "collapse",
        "error",
        f"The policy has collapsed: {' and '.join(signs)}, and {fall.words}.",
        f"go back to the checkpoint at or before step {fall.peak}, halve optim.lr, and add "
        "[kl] coef = 0.05 or update.entropy_coef = 0.01",
    )


def _no_signal(rows: Sequence[Row]) -> Finding | None:
    """From the first steps on, siblings are paid alike: their advantages are zero."""
    flat = [p.value for p in series(rows, "frac_reward_zero_std")]
    first = flat[:FEW_STEPS]
    if len(flat) < 3 or fmean(first) < HIGH_ZERO_STD or fmean(flat) < HIGH_ZERO_STD:
        return None
    paid = [p.value for p in series(rows, "reward")]
    level = f", at a mean reward of {fmean(paid):.2f}" if paid else ""
    return Finding(
        "no_signal",
        "error",
        f"Almost nothing to learn from: in {fmean(first):.0%} of the groups of the first "
        f"{len(first)} steps (and {fmean(flat):.0%} of all) every sibling was paid the "
        f"same{level}, so every advantage was zero.",
        "make the task easier or harder (fewer steps, few-shot examples in the prompt), raise "
        "rollout.num_generations, or pay a part that tells siblings apart",
    )


def _no_learning(rows: Sequence[Row], max_grad_norm: float) -> Finding | None:
    """There is a signal, but the steps are too small to follow it."""
    grads = [p.value for p in series(rows, "grad_norm")]
    spread = [p.value for p in series(rows, "reward_std")]
    if len(grads) < MIN_STEPS or max(grads) >= max_grad_norm or not spread or fmean(spread) <= 0:
        return None
    kl = [p.value for p in series(rows, "kl")]
    moved = [p.value for p in series(rows, "update_norm")]
    late_kl = fmean(kl[-max(3, len(kl) // 4) :]) if kl else 0.0
    if (not kl and not moved) or late_kl > TINY_KL or (moved and median(moved) > TINY_UPDATE):
        return None
    paid = [p.value for p in series(rows, "reward")]
    quarter = max(3, len(paid) // 4)
    if _greater(paid[-quarter:], paid[:quarter]) or _held_out_gain(rows):
        return None
    words = [f"the largest gradient norm of {len(grads)} steps was {max(grads):.3g} (clip: "
             f"{max_grad_norm:g})"]  # fmt: skip
    if kl:
        words.append(f"KL to the reference ended at {late_kl:.2g} nats a token")
    if moved:
        words.append(f"a step moved the weights by {median(moved):.1e} of their norm")
    return Finding(
        "no_learning",
        "warning",
        f"The policy hardly moves: {', '.join(words)}; reward went from "
        f"{fmean(paid[:quarter]):.3f} to {fmean(paid[-quarter:]):.3f} (first and last {quarter} "
        f"steps) though siblings differ (reward std {fmean(spread):.2f}).",
        "raise optim.lr, 3 to 10 times",
    )


def _held_out_gain(rows: Sequence[Row]) -> bool:
    counts = held_out_counts(rows)
    return len(counts) > 1 and _chance(counts[max(counts)], counts[min(counts)]) < LEVEL


def _truncation(rows: Sequence[Row]) -> Finding | None:
    """Many completions are cut: their answers never come, and their reward is about length."""
    cut = series(rows, "completions/clipped_ratio")
    last = cut[-max(3, len(cut) // 5) :]
    held_out = series(rows, "eval/clipped_ratio")[-1:]
    places = []
    if last and fmean(p.value for p in last) > TRUNCATED:
        share = fmean(p.value for p in last)
        places.append(f"{share:.0%} of the completions of steps {last[0].step}-{last[-1].step}")
    if held_out and held_out[0].value > TRUNCATED:
        places.append(f"{held_out[0].value:.0%} of the held-out answers at step {held_out[0].step}")
    if not places:
        return None
    lengths = series(rows, "completions/mean_length")
    length = f"; their mean length is {lengths[-1].value:.0f} tokens" if lengths else ""
    return Finding(
        "truncation",
        "warning",
        f"{' and '.join(places)} were cut at the length limit{length}.",
        "raise rollout.max_completion_length, or leave them out of the update with "
        'rollout.discard = ["truncated"]',
    )


def always_under_clip(rows: Sequence[Row], max_grad_norm: float) -> bool:
    """Return whether no gradient ever reached the clip: the learning rate alone sets the step."""
    grads = series(rows, "grad_norm")
    return len(grads) >= MIN_STEPS and all(p.value < max_grad_norm for p in grads)


def _greater(high: Sequence[float], low: Sequence[float]) -> bool:
    """Return whether `high` stands above `low`: Mann-Whitney, one-sided, at LEVEL."""
    if len(high) < 3 or len(low) < 3 or set(high) == set(low):
        return False
    return bool(mannwhitneyu(high, low, alternative="greater").pvalue < LEVEL)


def _chance(high: Count, low: Count) -> float:
    """Return the one-sided p-value of Fisher's exact test that `high` has the larger share.

    P(X >= k_high) with X the right ones among n_high drawn from both without replacement.
    """
    total, right = high.n + low.n, high.right + low.right
    return float(hypergeom.sf(high.right - 1, total, right, high.n))


def _share(count: Count) -> str:
    return f"{count.right / count.n:.1%} ({count.right}/{count.n})"


def _p(value: float) -> str:
    return "under 1 in 10,000" if value < 1e-4 else f"p = {value:.4f}"
