"""THE LOOP: prompts, sample, score, reward, advantage, loss, gradient, step, checkpoint.

GRPO and PPO are the same loop with another advantage. The five seams are marked. Everything that is
written goes through `run`; the report and the audits read the run folder and are never called here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from operando import parallel
from operando.integrations.tracking import Tracker, open_tracker
from operando.models.directions import DirectionSet
from operando.models.load import Loaded, float32_products
from operando.models.policy import Policy
from operando.models.prefix import Prefix
from operando.models.scoring import Scoring, flat_rows
from operando.recipe.run import Recipe, TrackingConfig
from operando.records import (
    Clock,
    batch_metrics,
    eval_metrics,
    not_finite,
    update_metrics,
    write_certificate,
    write_held_out,
    write_results,
    write_rollouts,
)
from operando.rewards.base import RewardFunction, TrainerState
from operando.rewards.compose import compute_rewards
from operando.rollout.greedy_eval import grade, greedy_eval
from operando.rollout.sampler import Request, Sampling, as_rollouts, uniform_streams
from operando.run import Run, SeedTree
from operando.setup import Setup, StepReport, add_transforms, begin_step, resume, set_up, shifted
from operando.stopping import Stopped, stops_after_step
from operando.tasks.base import Task
from operando.types import Batch, Rewards, Trace, make_batch
from operando.update import checks
from operando.update.card import draft_card
from operando.update.checkpoint import save_checkpoint
from operando.update.losses import Totals, sampler_weights, token_weights
from operando.update.objective import (
    Advantages,
    Objective,
    Targets,
    compute_advantages,
    discarded_rows,
    micro_objective,
    next_kl_coef,
)
from operando.update.optim import (
    GradientTransform,
    UpdateStats,
    UpdateTransform,
    apply_update,
    lr_factor,
)


def train(
    recipe: Recipe,
    run: Run,
    *,
    task: Task | None = None,
    functions: Mapping[str, RewardFunction] | None = None,
    gradient_transforms: Sequence[GradientTransform] = (),
    update_transforms: Sequence[UpdateTransform] = (),
    loaded: Loaded | None = None,
    refresh: Callable[[Policy], DirectionSet] | None = None,
    on_step: Callable[[StepReport], None] = lambda _: None,
) -> None:
    """Train as the recipe says and leave everything in the run folder; resume where it stopped.

    Transforms see the named trainable parameters before the clip, or before and after the
    optimizer step, and may rewrite them; what they return goes into metrics.jsonl. `on_step` is
    called after every step, and once with the base's evaluation. `task` is a Task of your own, for
    a recipe with task.kind = "python".

    Example: train(recipe, Run.create(recipe), functions={"mine": f})
    """
    setup = set_up(recipe, run, functions or {}, loaded, refresh, task)
    recipe = setup.recipe
    tracked = recipe.tracking if parallel.rank() == 0 else TrackingConfig()
    tracker = open_tracker(tracked, recipe.name, recipe.model_dump(mode="json"))
    add_transforms(setup, gradient_transforms, update_transforms)
    with stops_after_step() as asked_to_stop, float32_products(recipe.model, setup.policy.device):
        done = resume(setup)
        if done == 0:
            report_step(setup, tracker, 0, None, evaluate(setup, 0), on_step)
        for step in range(done + 1, recipe.steps + 1):
            begin_step(setup, step)
            metrics, batch = train_step(setup, step)
            if step % recipe.eval.every == 0 or step == recipe.steps:
                metrics |= evaluate(setup, step)
            report_step(setup, tracker, step, batch, metrics, on_step)
            signum = parallel.max_over_ranks(asked_to_stop())
            if recipe.saves(step) or signum:
                write_checkpoint(setup, step)
            if signum and step < recipe.steps:
                raise Stopped(signum, f"stopped; step {step} is saved: continue with --resume")
    if parallel.rank() == 0:
        write_results(run, recipe)
    tracker.finish()


def train_step(setup: Setup, step: int) -> tuple[dict[str, float], Batch]:
    """Sample, score, reward, update: one step of the loop. Returns its metrics and batch."""
    recipe, clock = setup.recipe, Clock()
    batch, mine, prefix = sample_batch(setup, step)
    clock.lap("sample")
    scoring = setup.policy.score(
        batch,
        rows=mine,
        reference=setup.reference,
        taps=setup.taps,
        micro_tokens=recipe.update.micro_tokens,
        keep_graph=recipe.update.num_minibatches == 1,
        prefix=prefix,
    )
    trace = scoring.trace.mapped(parallel.sum_tensor)
    clock.lap("score")
    rewards = reward_batch(setup, step, batch, mine, trace)  # seam 1
    dropped_B = discarded_rows(recipe, batch, rewards)
    advantages = compute_advantages(recipe, batch, rewards, trace, setup.kl_coef)  # seam 2
    setup.kl_coef = next_kl_coef(recipe, batch, trace, setup.kl_coef)
    check_finite(setup, step, batch, rewards, advantages)
    graded = grade(setup.task, batch.rollouts)
    clock.lap("reward")
    if parallel.rank() == 0:
        first = checks.check_rollouts(batch, trace, rewards) if step == 1 else []
        for warning in [*first, *checks.check_range(rewards)]:
            setup.run.warn(warning)
    try:
        updates = update(
            setup, step, batch, mine, scoring._replace(trace=trace), advantages, dropped_B
        )
    except FloatingPointError as error:
        raise not_finite(setup.run, step, batch, rewards, advantages.adv_BT, str(error)) from error
    clock.lap("update")
    metrics = batch_metrics(batch, rewards, trace, graded, dropped_B)
    if recipe.kl is not None and recipe.kl.target is not None:
        metrics["kl_coef"] = setup.kl_coef  # of the next step
    metrics |= updates | clock.metrics(int(batch.mask_BT.sum()))
    if parallel.rank() == 0:
        write_rollouts(
            setup.run,
            step,
            setup.policy.tokenizer,
            batch,
            rewards,
            trace,
            advantages.adv_BT,
            graded,
            dropped_B,
        )
    return metrics, batch


def evaluate(setup: Setup, step: int) -> dict[str, float]:
    """Answer the held-out prompts greedily; the verifier alone decides what is right."""
    recipe = setup.recipe
    length = recipe.eval.max_completion_length or recipe.rollout.max_completion_length
    sampling = Sampling(length, stop=recipe.rollout.stop)
    graded = greedy_eval(setup.sampler, setup.task, setup.held_out_prompts, sampling)
    rollouts = [j.rollout for j in graded]
    blind = [part for part in setup.parts if not part.needs_trace()]
    width_T = max(len(r.completion_ids) for r in rollouts)
    state = TrainerState(step, recipe.steps)
    proxies = (
        compute_rewards(blind, recipe.weights_at(step), rollouts, None, state, width_T)
        if blind
        else None
    )
    if parallel.rank() == 0:
        write_held_out(setup.run, step, graded)
    return eval_metrics(graded, proxies)


def sample_batch(setup: Setup, step: int) -> tuple[Batch, list[int], Prefix | None]:
    """Return this step's rollouts of all ranks, the rows of this one, and what the sampler saw
    below the first trained block."""
    config = setup.recipe.rollout
    each = config.num_prompts // parallel.world_size()
    first = parallel.rank() * each
    indices = prompt_order(setup.run.seeds, step, config.num_prompts, len(setup.train_prompts))
    groups = list(range(first, first + each))
    prompts = [setup.train_prompts[indices[g]] for g in groups]
    uniforms_BT = uniform_streams(
        setup.run.seeds, step, groups, config.num_generations, config.max_completion_length
    )
    sampling = Sampling(config.max_completion_length, config.temperature, config.stop)
    ids = [p.ids for p in prompts]
    prefix = setup.policy.new_prefix(first)
    sampled = setup.sampler.sample(
        Request(ids, config.num_generations, sampling, uniforms_BT), prefix
    )
    mine = as_rollouts(prompts, groups, config.num_generations, sampled)
    batch = make_batch(parallel.gather_list(mine), config.num_generations, setup.pad_id)
    start = first * config.num_generations
    return batch, list(range(start, start + len(mine))), prefix


def prompt_order(seeds: SeedTree, step: int, num_prompts: int, size: int) -> list[int]:
    """Return the prompts of a step: each epoch is one shuffled pass over the training set."""
    first, last = (step - 1) * num_prompts, step * num_prompts - 1
    orders = {
        epoch: torch.randperm(size, generator=seeds.generator("prompts", epoch)).tolist()
        for epoch in range(first // size, last // size + 1)
    }
    return [orders[at // size][at % size] for at in range(first, last + 1)]


def reward_batch(
    setup: Setup, step: int, batch: Batch, mine: Sequence[int], trace: Trace
) -> Rewards:
    """Return the rewards of the whole batch; each rank computes those of its own rows."""
    recipe, width_T = setup.recipe, batch.mask_BT.shape[1]
    rollouts = [batch.rollouts[row] for row in mine]
    own = trace.mapped(lambda x: x[list(mine)])
    state = TrainerState(step, recipe.steps)
    rewards = compute_rewards(setup.parts, recipe.weights_at(step), rollouts, own, state, width_T)
    rewards = shifted(setup, rewards, rollouts, own, step)
    return Rewards(
        parts={name: parallel.gather_rows(part) for name, part in rewards.parts.items()},
        weights=rewards.weights,
        total_BT=parallel.gather_rows(rewards.total_BT),
        dense=rewards.dense,
        metrics=parallel.mean_over_ranks(rewards.metrics),
        columns={name: parallel.gather_list(column) for name, column in rewards.columns.items()},
    )


def update(
    setup: Setup,
    step: int,
    batch: Batch,
    mine: Sequence[int],
    scoring: Scoring,
    advantages: Advantages,
    dropped_B: Tensor,
) -> dict[str, float]:
    """Take the optimizer steps of one batch. Returns their metrics, averaged over steps."""
    recipe, policy, trace = setup.recipe, setup.policy, scoring.trace
    kept = scoring.graph  # of the whole batch; good for one backward, before the first step
    mask_BT = batch.mask_BT & ~dropped_B[:, None]
    here = set(mine)
    stats: list[dict[str, float]] = []
    for epoch in range(recipe.update.epochs):
        for rows in minibatches(setup, step, epoch, len(batch)):
            totals = Totals(int(mask_BT[rows].sum()), int(mask_BT[rows].any(1).sum()))
            if totals.tokens == 0:
                continue
            objectives = []
            own = [row for row in rows if row in here]
            micro = policy.micro_batches(batch, own, recipe.update.micro_tokens)
            for packs, counts in parallel.same_length(micro, filler=[[mine[0]]]):
                targets = make_targets(
                    recipe, policy, batch, trace, advantages, mask_BT, flat_rows(packs), totals
                )
                if not counts:
                    targets = targets._replace(weight_BT=torch.zeros_like(targets.weight_BT))
                new, kept = kept or policy.scored(batch, packs, scoring.prefix), None
                objective = micro_objective(recipe, new, targets)
                objective.loss.backward()
                if counts:
                    objectives.append(objective._replace(loss=objective.loss.detach().cpu()))
            objectives = parallel.gather_list(objectives)
            if not all(math.isfinite(float(o.loss)) for o in objectives):
                raise FloatingPointError(f"the loss is {sum(float(o.loss) for o in objectives)}")
            parallel.sum_gradients([*policy.trainable().values(), *policy.value_parameters()])
            taken = apply_update(  # seam 3: gradient and update transforms; seam 4: what may change
                setup.optimizer,
                policy.trainable(),
                policy.value_parameters(),
                recipe.optim,
                lr_factor(recipe.optim, step, recipe.steps),
                setup.gradient_transforms,
                setup.update_transforms,
            )
            if step == 1 and not stats:
                check_first_update(setup, batch, objectives, taken, advantages)
            stats.append(update_metrics(objectives, taken, totals))
    mean = {key: sum(s[key] for s in stats) / len(stats) for key in (stats[0] if stats else {})}
    return mean | {"updates": float(len(stats))}


def minibatches(setup: Setup, step: int, epoch: int, num_rows: int) -> list[list[int]]:
    """Return the rows of each optimizer step of one pass; one minibatch keeps the batch's order."""
    parts = setup.recipe.update.num_minibatches
    if parts == 1:
        return [list(range(num_rows))]
    generator = setup.run.seeds.generator("minibatch", step, epoch)
    order = torch.randperm(num_rows, generator=generator)
    return [sorted(part) for part in order.view(parts, -1).tolist()]


def make_targets(
    recipe: Recipe,
    policy: Policy,
    batch: Batch,
    trace: Trace,
    advantages: Advantages,
    mask_BT: Tensor,
    rows: Sequence[int],
    totals: Totals,
) -> Targets:
    """Return what the objective needs of some rows, on the model's device."""
    config, index = recipe.update, list(rows)
    weight_BT = token_weights(
        mask_BT[index], config.aggregation, totals, recipe.rollout.max_completion_length
    )
    weight_BT = weight_BT * sampler_weights(
        trace.logp_BT[index],
        batch.sampling_logp_BT[index],
        mask_BT[index],
        config.sampler_correction,
        config.sampler_cap,
    )

    def on_device(x_BT: Tensor | None) -> Tensor | None:
        return None if x_BT is None else x_BT[index].to(policy.device)

    return Targets(
        mask_BT=mask_BT[index].to(policy.device),
        weight_BT=weight_BT.to(policy.device),
        adv_BT=advantages.adv_BT[index].to(policy.device),
        old_logp_BT=trace.logp_BT[index].to(policy.device),
        ref_logp_BT=on_device(trace.ref_logp_BT),
        old_value_BT=on_device(trace.value_BT),
        return_BT=on_device(advantages.return_BT),
        old_credit_BT=on_device(trace.credit_BT),
    )


def write_checkpoint(setup: Setup, step: int) -> None:
    """Write weights, model card, insulation certificate and resume state of a step."""
    run, policy = setup.run, setup.policy
    weights = policy.save_weights()
    certificate = setup.insulation.issue(step, setup.optimizer, weights)
    documents = {
        "README.md": draft_card(setup.recipe, step, policy),
        "certificate.json": certificate.as_text(),
    }
    if parallel.rank() == 0:
        write_certificate(run, certificate)  # first: a checkpoint that is there has everything
    save_checkpoint(run, step, policy, setup.optimizer, weights, documents)


def check_finite(
    setup: Setup, step: int, batch: Batch, rewards: Rewards, advantages: Advantages
) -> None:
    """Stop the run at the first advantage that is not finite."""
    if not advantages.adv_BT.isfinite().all():
        why = "an advantage is not finite"
        raise not_finite(setup.run, step, batch, rewards, advantages.adv_BT, why)


def check_first_update(
    setup: Setup,
    batch: Batch,
    objectives: Sequence[Objective],
    taken: UpdateStats,
    advantages: Advantages,
) -> None:
    """Record what the first update shows: ratio, padding, tensors without gradient."""
    findings = [
        *checks.check_ratio(max(o.ratio_gap for o in objectives)),
        *checks.check_padding(setup.policy, batch),
        *checks.check_gradients(taken.without_gradient, bool(advantages.adv_BT.any())),
    ]
    if parallel.rank() == 0:  # the forwards above are collective under FSDP
        for finding in findings:
            setup.run.warn(finding)


def report_step(
    setup: Setup,
    tracker: Tracker,
    step: int,
    batch: Batch | None,
    metrics: dict[str, float],
    on_step: Callable[[StepReport], None],
) -> None:
    """Write one line of metrics.jsonl, tell the tracker and the caller."""
    if parallel.rank() != 0:
        return
    setup.run.log_metrics({"step": step} | metrics)
    tracker.log(step, metrics)
    on_step(StepReport(step, setup.recipe.steps, metrics, batch))
