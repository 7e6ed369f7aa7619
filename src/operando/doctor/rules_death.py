"""Rules about death: numbers that are none, a policy that does not move or gets worse.

One sign is enough for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from operando.doctor.findings import (
    MIN_STEPS,
    Finding,
    Row,
    as_factor,
    ends,
    gained,
    greater,
    held_out_counts,
    lately,
    nulls,
    rate_for,
    series,
    share_words,
)
from operando.doctor.rules_reward import Fall, negative_weights
from operando.recipe.run import Recipe

VITAL = (
    "loss",
    "policy_loss",
    "value_loss",
    "grad_norm",
    "update_norm",
    "kl",
    "entropy",
    "ratio_gap",
    "sampler/gap_mean",
    "sampler/ess",
)
MOST = 0.9  # share of steps that is as good as all
HIGH_KL = 1.0  # nats per token: another model than the one it began as
TIMES_ENTROPY = 5.0  # of the start
GONE_ENTROPY = 0.1  # of the start
AT_THE_TOP = 0.95  # of what can be right: who is sure there is right
GAP, ESS = 0.05, 0.2  # mean nats between sampling and scoring; share of the sample that counts
FELL = 1 / 3  # of the reward's standard deviation


def not_finite(rows: Sequence[Row]) -> Finding | None:
    """A loss, a gradient or a measure of the policy is null: NaN or infinite when it was made."""
    found = {key: steps for key in VITAL if (steps := nulls(rows, key))}
    if not found:
        return None
    first = min(steps[0] for steps in found.values())
    what = ", ".join(f"{key} in {len(steps)} steps" for key, steps in found.items())
    return Finding(
        "not_finite",
        "error",
        f"Numbers that are none: {what} (null in metrics.jsonl: NaN or infinite), first at step "
        f"{first}.",
        f"what was trained after step {first - 1} is worthless: go back to the last checkpoint "
        "before it and read its batch (completions of no token, an advantage or a log-prob "
        'that is infinite); model.dtype = "float32" if it is 16 bits; lower optim.lr if '
        "gradients grew before it",
    )


def broken(step: int, file: str) -> Finding:
    """A run was stopped before a step whose loss or gradient was not finite; its batch is kept."""
    return Finding(
        "not_finite",
        "error",
        f"The run stopped before step {step}: its loss, reward, advantage or gradient was not "
        f"finite. No weight was changed; the batch is in {file}.",
        "read that batch (torch.load: completions, parts, adv_BT), mend what is not finite, and "
        'continue with --resume; model.dtype = "float32" if it is 16 bits',
    )


def no_reward(rows: Sequence[Row]) -> Finding | None:
    """The reward applied to no completion: every part returned None."""
    steps = [row["step"] for row in rows if "reward" in row]
    missing = nulls(rows, "reward")
    if len(missing) < 3 or len(missing) < 0.5 * len(steps):
        return None
    return Finding(
        "no_reward",
        "error",
        f"The reward never applied: in {len(missing)} of {len(steps)} steps (first: step "
        f"{missing[0]}) every part returned None for every completion, so nothing was rewarded and "
        "nothing learned.",
        "read on what condition the reward function returns None, and the completions it was "
        "given (`operando report`); `operando fuzz RUN` says of each part whether it applies",
    )


def no_update(rows: Sequence[Row]) -> Finding | None:
    """Gradients, or steps, are exactly zero although siblings differ: no weight is connected."""
    spread = [p.value for p in series(rows, "reward_std")]
    flat = [p.value for p in series(rows, "frac_reward_zero_std")]
    if not spread or fmean(spread) <= 0 or (flat and fmean(flat) >= 1):
        return None
    grads = [p.value for p in series(rows, "grad_norm")]
    moved = [p.value for p in series(rows, "update_norm")]
    still = [
        name
        for name, values in (("grad_norm", grads), ("update_norm", moved))
        if len(values) >= 3 and sum(v == 0 for v in values) >= MOST * len(values)
    ]
    if not still:
        return None
    if "grad_norm" in still:
        return Finding(
            "no_update",
            "error",
            f"No weight is being trained: {' and '.join(still)} were exactly 0 in nearly all of "
            f"{len(grads)} steps, though siblings were rewarded differently (reward std "
            f"{fmean(spread):.2f}). The loss does not reach the trained weights.",
            "look whether the adapter is attached and in the forward (model.lora.targets name "
            "modules of this model, model.layers holds them), and whether anything detaches the "
            "log-probs; the learning rate is not the cause",
        )
    return Finding(
        "no_update",
        "error",
        f"No weight moves: update_norm was exactly 0 in nearly all of {len(moved)} steps, though "
        f"gradients were not (median norm {median(grads) if grads else float('nan'):.3g}).",
        "the optimizer does not hold the trained weights, its rate is 0 (the lr column), or the "
        'steps are lost in the rounding of 16-bit weights: model.dtype = "float32" or a higher '
        "optim.lr",
    )


def got_worse(rows: Sequence[Row], recipe: Recipe, fall: Fall | None, told: bool) -> Finding | None:
    """Held-out accuracy, or without it the reward, ends below where it began or lost its gain."""
    if told:
        return None
    lost = fall.words if fall is not None and fall.is_grave else None
    words = lost or _reward_loss(rows, recipe)
    if words is None:
        return None
    return Finding("got_worse", "error", f"The run got worse: {words}.", _cause(rows, recipe))


def _reward_loss(rows: Sequence[Row], recipe: Recipe) -> str | None:
    """The reward's ends, where no stage changed the reward and no evaluation says otherwise."""
    paid, spread = ends(rows, "reward"), [p.value for p in series(rows, "reward_std")]
    counts = held_out_counts(rows)
    if recipe.stages or paid is None or not spread or not greater(paid.early, paid.late):
        return None
    early, late = fmean(paid.early), fmean(paid.late)
    if early - late < FELL * fmean(spread):
        return None
    if len(counts) > 1 and counts[max(counts)].share >= counts[min(counts)].share:
        return None
    held_out = ""
    if len(counts) > 1:
        ends_of = (share_words(counts[min(counts)]), share_words(counts[max(counts)]))
        held_out = f", and held-out accuracy from {ends_of[0]} to {ends_of[1]}"
    return (
        f"the mean reward fell from {early:.3f} to {late:.3f} (first and last fifth of the "
        f"steps, {(early - late) / fmean(spread):.1f} of its standard deviations){held_out}"
    )


def _cause(rows: Sequence[Row], recipe: Recipe) -> str:
    """Return the remedy that the other metrics speak for."""
    if negative := negative_weights(recipe):
        return f"{negative}: it rewards being wrong; make it positive"
    slower = rate_for(rows, recipe)
    kl, paid = lately(rows, "kl"), ends(rows, "reward")
    if slower is not None or (kl is not None and kl > HIGH_KL / 4):
        rate = slower or f"lower optim.lr from {recipe.optim.lr:g} to {recipe.optim.lr / 10:.2g}"
        return f"{rate}, and begin again from the checkpoint before the fall"
    if paid is not None and greater(paid.early, paid.late):
        return (
            "reward and accuracy fall together, so the policy is pushed away from the "
            "reward: look at the sign (advantages, reward weights, a loss of your own); if it is "
            f"right, lower optim.lr from {recipe.optim.lr:g} to {recipe.optim.lr / 10:.2g}"
        )
    return (
        "what is rewarded is not what is asked: compare paid and wrong completions (`operando fuzz "
        "RUN`), stop at the best evaluation, or hold the policy near its start with [kl] coef = 0.1"
    )


def kl_exploding(rows: Sequence[Row], recipe: Recipe) -> Finding | None:
    """The policy is another model than the one it began as, and nothing was gained by it."""
    kl = series(rows, "kl")
    last = [p.value for p in kl[-3:]]
    if len(last) < 3 or min(last) <= HIGH_KL or gained(rows):
        return None
    term = (
        "add [kl] coef = 0.05"
        if recipe.kl is None
        else f"raise kl.coef from {recipe.kl.coef:g} to {10 * recipe.kl.coef:.2g}"
    )
    rate = rate_for(rows, recipe)
    lower = f"lower optim.lr from {recipe.optim.lr:g} to {recipe.optim.lr / 10:.2g}"
    return Finding(
        "kl_exploding",
        "error",
        f"The policy has left its reference: KL went from {kl[0].value:.2g} to {fmean(last):.2g} "
        f"nats per token (over {HIGH_KL:g} is another model), and neither reward nor held-out "
        "accuracy has risen.",
        f"{rate or lower}; {term}",
    )


def entropy_explodes(rows: Sequence[Row], recipe: Recipe) -> Finding | None:
    """The policy becomes noise."""
    entropy = [p.value for p in series(rows, "entropy")]
    if len(entropy) < MIN_STEPS or gained(rows):
        return None
    start, end = fmean(entropy[:3]), fmean(entropy[-3:])
    first = min(start, entropy[0])
    if end < TIMES_ENTROPY * first:
        return None
    rate = rate_for(rows, recipe)
    bonus = recipe.update.entropy_coef
    other = f"; take update.entropy_coef = {bonus:g} out" if bonus > 0 else ""
    lower = f"lower optim.lr from {recipe.optim.lr:g} to {recipe.optim.lr / 10:.2g}"
    return Finding(
        "entropy_explodes",
        "error",
        f"The policy becomes noise: entropy rose from {first:.3g} to {end:.3g} nats per token "
        f"({as_factor(end / first if first else float('inf'))} times its start), and neither "
        "reward nor held-out accuracy has risen.",
        f"{rate or lower}{other}, or add [kl] coef = 0.05",
    )


def entropy_gone(rows: Sequence[Row], recipe: Recipe) -> Finding | None:
    """The policy says one thing only, and has gained nothing by it."""
    entropy = [p.value for p in series(rows, "entropy")]
    if len(entropy) < MIN_STEPS or gained(rows) or _at_the_top(rows):
        return None
    start, end = fmean(entropy[:3]), fmean(entropy[-3:])
    if start <= 0 or end > GONE_ENTROPY * start:
        return None
    return Finding(
        "entropy_gone",
        "error",
        f"Entropy has run out: {start:.3g} nats per token at first and {end:.2g} now "
        f"({end / start:.1%} of it), so siblings are copies of one another and nothing is left to "
        "choose from, while neither reward nor held-out accuracy has risen.",
        "go back to a checkpoint with entropy in it, and add update.entropy_coef = 0.01 or [kl] "
        f"coef = 0.05, or lower optim.lr from {recipe.optim.lr:g} to {recipe.optim.lr / 3:.2g}",
    )


def _at_the_top(rows: Sequence[Row]) -> bool:
    counts = held_out_counts(rows)
    return bool(counts) and counts[max(counts)].share >= AT_THE_TOP


def sampler_gap(rows: Sequence[Row]) -> Finding | None:
    """Sampling and scoring give the same tokens other probabilities: two models."""
    gap, ess = lately(rows, "sampler/gap_mean"), lately(rows, "sampler/ess")
    signs = []
    if gap is not None and gap > GAP:
        signs.append(
            f"log-probs of sampled tokens differ by {gap:.2g} nats on average (under "
            f"{GAP:g} is rounding)"
        )
    if ess is not None and ess < ESS:
        signs.append(f"the effective sample size is {ess:.0%} of the tokens")
    if not signs:
        return None
    return Finding(
        "sampler_gap",
        "error",
        f"Sampling and training are two models: {' and '.join(signs)}, so the updates are those "
        "of another policy than the one that wrote the completions.",
        "the sampler must have the newest weights, the adapter, the same temperature and the same "
        'dtype: try rollout.engine = "hf" and model.dtype = "float32"',
    )
