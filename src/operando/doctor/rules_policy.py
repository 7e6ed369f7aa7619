"""Rules about the policy: it loses its variety, is cut short, or moves in one place only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from operando.doctor.findings import (
    LEVEL,
    MIN_STEPS,
    Finding,
    Point,
    Row,
    gained,
    lately,
    rate_for,
    series,
)
from operando.doctor.rules_reward import Fall
from operando.recipe.run import Recipe

ALL_ZERO_STD = 0.95  # share of groups without a difference between siblings
LOW_ENTROPY = 0.1  # of the start
FALLEN_ENTROPY = 0.75  # of the start: a forecast needs a fall to start from
TRUNCATED = 0.1
NEVER_ENDS, UNFINISHED_STEPS = 0.95, 5  # share of completions that are cut, in the first steps
MOVED_KL = 0.02  # nats per token: less is nowhere
ONE_PLACE = 0.7  # share of a quarter; 0.25 is even


class Forecast(NamedTuple):
    """At which step a falling curve meets a level, with a 95 % interval, and how it falls."""

    step: float
    low: float
    high: float
    shape: str


def collapse(
    rows: Sequence[Row], recipe: Recipe, fall: Fall | None, *, hacked: bool
) -> Finding | None:
    """The policy has lost its variety, and accuracy with it."""
    entropy, flat = series(rows, "entropy"), series(rows, "frac_reward_zero_std")
    if fall is None or len(entropy) < MIN_STEPS:
        return None
    start = fmean(p.value for p in entropy[:3])
    end = fmean(p.value for p in entropy[-3:])
    signs = []
    if end < LOW_ENTROPY * start:
        signs.append(
            f"entropy fell from {start:.3f} to {end:.4f} nats per token ({end / start:.1%} of its "
            "start)"
        )
    last = flat[-max(3, len(flat) // 10) :]
    # a hacked reward is constant because it is saturated: that is the hack, told above
    if not hacked and last and fmean(p.value for p in last) >= ALL_ZERO_STD:
        share = fmean(p.value for p in last)
        signs.append(
            f"in {share:.0%} of the groups of the last {len(last)} steps all siblings "
            "were rewarded alike"
        )
    if not signs:
        return None
    back = f"go back to the checkpoint at or before step {fall.peak}"
    begin = "begin again" if fall.peak == 0 else back
    rate = rate_for(rows, recipe) or (
        f"lower optim.lr from {recipe.optim.lr:g} to {recipe.optim.lr / 2:.2g}"
    )
    return Finding(
        "collapse",
        "error",
        f"The policy has collapsed: {' and '.join(signs)}, and {fall.words}.",
        f"{begin}, {rate}, and add [kl] coef = 0.05 or update.entropy_coef = 0.01",
    )


def truncation(rows: Sequence[Row], recipe: Recipe) -> Finding | None:
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
    never = [p.value for p in cut[:UNFINISHED_STEPS]]
    if len(never) >= 3 and min(fmean(never), fmean(p.value for p in last)) >= NEVER_ENDS:
        return _endless(cut, rows, recipe)
    lengths = series(rows, "completions/mean_length")
    length = f"; their mean length is {lengths[-1].value:.0f} tokens" if lengths else ""
    return Finding(
        "truncation",
        "warning",
        f"{' and '.join(places)} were cut at the length limit{length}.",
        "raise rollout.max_completion_length, or leave them out of the update with "
        'rollout.discard = ["truncated"]',
    )


def _endless(cut: Sequence[Point], rows: Sequence[Row], recipe: Recipe) -> Finding:
    lengths = series(rows, "completions/mean_length")
    limit = recipe.rollout.max_completion_length
    length = f", their mean length {lengths[-1].value:.0f} of {limit} tokens" if lengths else ""
    return Finding(
        "truncation",
        "error",
        f"No completion ends: from the first step on {fmean(p.value for p in cut):.0%} of them "
        f"were cut at the length limit{length}. Either the stop token is not the one that "
        "this model ends its answers with, or the limit is far too short.",
        "look at where an answer should have ended (`operando report`): the model's end-of-turn "
        "token belongs into its tokenizer's eos_token or generation_config's eos_token_id, or a "
        'text into rollout.stop (as ["<|im_end|>"]); if the answers are whole and longer, raise '
        f"rollout.max_completion_length above {limit}",
    )


def entropy_eta(rows: Sequence[Row], recipe: Recipe) -> Finding | None:
    """Entropy will be at a tenth of its start before the run ends, and nothing was bought with it.

    In an unfinished run within its steps, in a finished one within twice as many. A run that gains
    becomes sure of what it has learned, and is left alone.
    """
    points = series(rows, "entropy")
    if len(points) < 2 * MIN_STEPS or gained(rows):
        return None
    start = fmean(p.value for p in points[:3])
    now = fmean(p.value for p in points[-3:])
    if not LOW_ENTROPY * start < now < FALLEN_ENTROPY * start:
        return None
    half = points[len(points) // 2 :]
    found = forecast([p.step for p in half], [p.value for p in half], LOW_ENTROPY * start)
    last = points[-1].step
    end = recipe.steps if last < recipe.steps else 2 * recipe.steps
    if found is None or found.step > end:
        return None
    return Finding(
        "entropy_eta",
        "warning",
        f"Entropy runs out around step {found.step:.0f} (95 % interval {found.low:.0f} to "
        f"{found.high:.0f}): it fell from {start:.3f} to {now:.3f} nats per token at step {last}, "
        f"and the {found.shape} trend of steps {half[0].step}-{last} meets {LOW_ENTROPY:.0%} of "
        "the start there, while neither reward nor held-out accuracy has risen.",
        "add update.entropy_coef = 0.01 or [kl] coef = 0.05, or lower optim.lr from "
        f"{recipe.optim.lr:g} to {recipe.optim.lr / 3:.2g}",
    )


def forecast(steps: Sequence[int], values: Sequence[float], level: float) -> Forecast | None:
    """Return when a straight or an exponential trend meets a level; None if it does not fall.

    Least squares of the values, or of their logarithms, whichever leaves less; the slope's
    standard error is widened by sqrt((1 + r) / (1 - r)) for residuals with autocorrelation r, and
    the slope must be below 0 at LEVEL. The interval is that of the slope through the centre.
    """
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if len(x) < MIN_STEPS or y.min() <= 0 or level <= 0:
        return None
    fits = []
    for shape, target, goal in (("linear", y, level), ("exponential", np.log(y), math.log(level))):
        slope, height = np.polyfit(x - x.mean(), target, 1)
        rest = target - (height + slope * (x - x.mean()))
        shown = height + slope * (x - x.mean())
        misfit = float(((y - (shown if shape == "linear" else np.exp(shown))) ** 2).sum())
        fits.append((misfit, shape, float(slope), float(height), goal, rest))
    _, shape, slope, height, goal, rest = min(fits, key=lambda fit: fit[0])
    again = float((rest[1:] * rest[:-1]).sum() / max(float((rest**2).sum()), 1e-30))
    wide = math.sqrt((1 + min(max(again, 0.0), 0.95)) / (1 - min(max(again, 0.0), 0.95)))
    spread = float(((x - x.mean()) ** 2).sum())
    error = wide * math.sqrt(float((rest**2).sum()) / (len(x) - 2) / spread)
    if slope >= 0 or student.sf(-slope / max(error, 1e-30), len(x) - 2) >= LEVEL:
        return None
    reach = float(student.ppf(0.975, len(x) - 2)) * error
    steep, flat = slope - reach, min(slope + reach, -1e-12)
    met = [float(x.mean()) + (goal - height) / s for s in (slope, steep, flat)]
    return Forecast(met[0], met[1], met[2], shape)


def positional_kl(rows: Sequence[Row]) -> Finding | None:
    """The policy has moved in one quarter of its completions only, and gained nothing by it."""
    quarters = [lately(rows, f"kl/q{i}") for i in (1, 2, 3, 4)]
    kl = [q for q in quarters if q is not None]
    if len(kl) < 4 or fmean(kl) < MOVED_KL or gained(rows):
        return None
    place = 0 if kl[0] >= kl[3] else 3
    share = kl[place] / sum(kl)
    if share < ONE_PLACE:
        return None
    where = ("first", "of the opening words") if place == 0 else ("last", "of the ending")
    numbers = ", ".join(f"{q:.3g}" for q in kl)
    remedy = (
        "read how completions begin (the report's samples): if it is a set phrase, put it into "
        "prompt.template, or add [kl] coef = 0.05"
        if place == 0
        else "read how completions end (`operando tags RUN`, the report's samples): text after "
        "the answer wants a rollout.stop; else add [kl] coef = 0.05"
    )
    return Finding(
        "positional_kl",
        "warning",
        f"The policy moves in one place only: {share:.0%} of the KL to the reference lies in the "
        f"{where[0]} quarter of the completions ({numbers} nats per token in quarters 1-4; even "
        f"would be 25 %), a matter {where[1]}, and neither reward nor held-out accuracy has risen.",
        remedy,
    )
