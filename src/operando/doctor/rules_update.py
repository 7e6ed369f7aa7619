"""Rules about the update: no signal, steps too small, and what holds the policy back."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from operando.doctor.findings import (
    MIN_STEPS,
    Finding,
    Row,
    as_factor,
    gained,
    lately,
    nulls,
    rounded,
    series,
)
from operando.recipe.run import Recipe
from operando.recipe.update import ClipLoss, GaeAdvantage, GroupAdvantage

FEW_STEPS = 10
HIGH_ZERO_STD = 0.8  # share of groups without a difference between siblings
TINY_KL = 0.02  # nats per token
TINY_UPDATE = 1e-4  # ||dW|| / ||W|| of one step
GOOD_UPDATE = 1e-3
STRANGLED = 0.5  # pull of the KL over push of the advantages; 1 is where they balance
CLIPPED_STEPS = 0.9  # share of steps whose gradient is scaled down
CLIPPED_TIMES = 2.0  # median gradient norm over the clip
CLIPPED_TOKENS = 0.2  # share of tokens whose ratio is clipped


def no_signal(rows: Sequence[Row]) -> Finding | None:
    """From the first steps on, siblings are rewarded alike: their advantages are zero."""
    flat = [p.value for p in series(rows, "frac_reward_zero_std")]
    first = flat[:FEW_STEPS]
    if len(flat) < 3 or fmean(first) < HIGH_ZERO_STD or fmean(flat) < HIGH_ZERO_STD:
        return None
    paid = [p.value for p in series(rows, "reward")]
    level = f", at a mean reward of {fmean(paid):.2f}" if paid else ""
    spread = [p.value for p in series(rows, "reward_std")]
    remedy = (
        "make the task easier or harder (fewer steps, few-shot examples in the prompt), raise "
        "rollout.num_generations, or pay a part that tells siblings apart"
    )
    if spread and paid and max(spread) == 0:
        level = f", and so were all completions of every step ({fmean(paid):.3g} on average)"
        nothing = "" if any(paid) else ": no completion was ever right, or the reward gives nothing"
        remedy = (
            f"a constant reward teaches nothing{nothing}: read what it looks for and some "
            "completions beside it (`operando fuzz RUN`, `operando report`); if it is right, make "
            "the task easier or harder (fewer steps, few-shot examples in the prompt)"
        )
    return Finding(
        "no_signal",
        "error",
        f"Almost nothing to learn from: in {fmean(first):.0%} of the groups of the first "
        f"{len(first)} steps (and {fmean(flat):.0%} of all) every sibling was rewarded the "
        f"same{level}, so every advantage was zero.",
        remedy,
    )


def no_learning(rows: Sequence[Row], recipe: Recipe) -> Finding | None:
    """There is a signal, but the steps are too small to follow it: mechreward's 232 steps.

    Its learning rate was the cause, and clipping was blamed: the norm was always under the clip.
    """
    max_grad_norm = recipe.optim.max_grad_norm
    grads = [p.value for p in series(rows, "grad_norm")]
    spread = [p.value for p in series(rows, "reward_std")]
    if len(grads) < MIN_STEPS or max(grads) >= max_grad_norm or not spread or fmean(spread) <= 0:
        return None
    kl = [p.value for p in series(rows, "kl")]
    moved = [p.value for p in series(rows, "update_norm")]
    late_kl = fmean(kl[-max(3, len(kl) // 4) :]) if kl else 0.0
    if (not kl and not moved) or late_kl > TINY_KL or (moved and median(moved) > TINY_UPDATE):
        return None
    if nulls(rows, "grad_norm") or nulls(rows, "update_norm") or max(grads) == 0:
        return None  # these are no small steps
    paid = [p.value for p in series(rows, "reward")]
    quarter = max(5, len(paid) // 4)
    if gained(rows):
        return None
    words = [
        f"the largest gradient norm of {len(grads)} steps was {max(grads):.3g} (clip: "
        f"{max_grad_norm:g})"
    ]
    if kl:
        words.append(f"KL to the reference ended at {late_kl:.2g} nats per token")
    if moved:
        words.append(f"a step moved the weights by {median(moved):.1e} of their norm")
    return Finding(
        "no_learning",
        "warning",
        f"The policy hardly moves: {', '.join(words)}; reward went from "
        f"{fmean(paid[:quarter]):.3f} to {fmean(paid[-quarter:]):.3f} (first and last {quarter} "
        f"steps) though siblings differ (reward std {fmean(spread):.2f}).",
        _higher_rate(recipe.optim.lr, median(moved) if moved else 0.0),
    )


def _higher_rate(lr: float, moved: float) -> str:
    """Return the remedy: the rate at which a step would move the weights by GOOD_UPDATE."""
    if moved <= 0:
        rates = f"from {lr:g} to {3 * lr:.2g} or {10 * lr:.2g}"
        return f"raise optim.lr {rates}; the clip is not the cause"
    factor = rounded(GOOD_UPDATE / moved)
    return (
        f"raise optim.lr about {as_factor(factor)} times, from {lr:g} to {factor * lr:.2g}: a step "
        f"should move the weights by about {GOOD_UPDATE:g} of their norm; the clip is not the cause"
    )


def kl_strangled(rows: Sequence[Row], recipe: Recipe) -> Finding | None:
    """The KL term pulls back as hard as the advantages push, and nothing has been gained.

    push = rms A of a completion; pull = coef * D, with D = sqrt(2 kl T) the policy's log-ratio to
    the reference over a completion of T tokens (KL = D^2 / 2 for small D). The optimum of
    E[A] - coef KL is pi ~ ref exp(A / coef), that is D = A / coef: pull / push = 1 is as far as
    this KL will ever let the policy go.
    """
    kl, length, push = lately(rows, "kl"), lately(rows, "completions/mean_length"), None
    if recipe.kl is not None:
        push = _push(rows, recipe)
    if recipe.kl is None or kl is None or length is None or push is None or gained(rows):
        return None
    coef = lately(rows, "kl_coef") or recipe.kl.coef
    pull = coef * (2 * max(kl, 0.0) * length) ** 0.5
    if push <= 0 or pull / push < STRANGLED:
        return None
    return Finding(
        "kl_strangled",
        "warning",
        f"The KL term holds the policy where it began: coefficient {coef:g} times the log-ratio of "
        f"a completion, sqrt(2 x {kl:.3g} nats x {length:.0f} tokens), is a pull of {pull:.2g} "
        f"against advantages of {push:.2g} ({pull / push:.0%}; at 100 % they balance), and neither "
        "reward nor held-out accuracy has risen.",
        f"lower kl.coef from {coef:g} to {coef / 5:.2g}",
    )


def _push(rows: Sequence[Row], recipe: Recipe) -> float | None:
    """Return the rms advantage of a completion, or its reward's spread where the KL is in there."""
    spread, flat = lately(rows, "reward_std"), lately(rows, "frac_reward_zero_std")
    assert recipe.kl is not None
    if recipe.kl.place == "reward":
        return spread
    match recipe.advantage:
        case GroupAdvantage(scale="group" | "batch"):
            return None if flat is None else (1 - flat) ** 0.5
        case GaeAdvantage(whiten=True):
            return 1.0
        case _:
            return spread


def clip_bound(rows: Sequence[Row], recipe: Recipe) -> Finding | None:
    """Nearly every gradient is cut to the same norm, so the clip sets the step, and it is no use.

    With AdamW that is no illness as such: a run that gains is left alone.
    """
    limit = recipe.optim.max_grad_norm
    grads = [p.value for p in series(rows, "grad_norm")]
    over = sum(g > limit for g in grads)
    if len(grads) < MIN_STEPS or over < CLIPPED_STEPS * len(grads) or gained(rows):
        return None
    if median(grads) < CLIPPED_TIMES * limit:
        return None
    return Finding(
        "clip_bound",
        "warning",
        f"The clip sets the size of the steps: the gradient norm was above {limit:g} in {over} of "
        f"{len(grads)} steps (median {median(grads):.3g}, {median(grads) / limit:.1f} times the "
        "clip), so strong and weak signals move the weights alike, and nothing has been gained.",
        f"raise optim.max_grad_norm from {limit:g} to {2 * median(grads):.2g}, and look for "
        "outliers among the advantages",
    )


def ratio_clipped(rows: Sequence[Row], recipe: Recipe) -> Finding | None:
    """Many tokens lie outside the trust region: their gradient is thrown away."""
    low, high = lately(rows, "clip_ratio/low"), lately(rows, "clip_ratio/high")
    if not isinstance(recipe.loss, ClipLoss) or low is None or high is None:
        return None
    if low + high <= CLIPPED_TOKENS:
        return None
    return Finding(
        "ratio_clipped",
        "warning",
        f"The updates of a batch go too far: the ratio of {low + high:.0%} of the tokens was "
        f"clipped in the last quarter of the steps ({low:.0%} at {1 - recipe.loss.clip_low:g}, "
        f"{high:.0%} at {1 + recipe.loss.clip_high:g}; over {CLIPPED_TOKENS:.0%} is much).",
        f"lower optim.lr from {recipe.optim.lr:g} to {recipe.optim.lr / 3:.2g}, or take fewer "
        f"steps on a batch (update.epochs = {recipe.update.epochs}, update.num_minibatches = "
        f"{recipe.update.num_minibatches})",
    )
