"""Assembling a run: data, model, sampler, rewards, optimizer, all checked before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import ParamSpec

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from operando import parallel
from operando.errors import UserError
from operando.files import read_object
from operando.models.directions import DirectionSet, check_directions, load_directions
from operando.models.freeze import Insulation, joint_digest
from operando.models.hooks import ActivationReader
from operando.models.layers import parse_layer_set
from operando.models.load import (
    DtypeChoice,
    Loaded,
    Opened,
    auto_class,
    bfloat16_slowdown,
    choose_dtype,
    dtype_name,
    load_model,
    open_model,
    opened_of,
    pad_id,
    precision_of,
    stop_ids,
)
from operando.models.memory import Memory, available, check_memory, estimate, small_machine
from operando.models.policy import Policy
from operando.models.scoring import Tap, whole_site
from operando.models.steering import change_for, hook_blocks
from operando.models.tokens import check_stop
from operando.recipe.data import ModelDtype
from operando.recipe.projection import SuppressIntervention
from operando.recipe.run import Recipe
from operando.recipe.update import GaeAdvantage
from operando.rewards.base import RewardFunction, refuse_run_metric
from operando.rewards.compose import RewardPart, make_parts
from operando.rewards.shift import Shift, make_shift
from operando.rollout.make import make_sampler
from operando.rollout.sampler import Sampler
from operando.rollout.steered import SteeredSampler
from operando.run import Run, with_dtype
from operando.run_folder import read_manifest, read_metrics, start_of
from operando.sae.feature_set import model_digest
from operando.tasks.base import Task
from operando.tasks.load import recipe_task
from operando.tasks.prompts import make_prompts, missing_start
from operando.types import Batch, Prompt, Rewards, Rollout, Trace
from operando.update import checks
from operando.update.checkpoint import checkpoint_folder, drop_states, load_checkpoint, saved_steps
from operando.update.optim import GradientTransform, UpdateTransform, make_optimizer
from operando.update.projector import Projector, literal_warning

P = ParamSpec("P")


@dataclass(frozen=True)
class StepReport:
    """What the command line shows of one step. Example: StepReport(12, 150, {...}, batch)"""

    step: int
    steps: int
    metrics: Mapping[str, float]
    batch: Batch | None  # None at step 0, which only evaluates


@dataclass
class Setup:
    """Everything that lives as long as the run does."""

    recipe: Recipe
    run: Run
    task: Task
    train_prompts: list[Prompt]
    held_out_prompts: list[Prompt]
    policy: Policy
    sampler: Sampler
    parts: list[RewardPart]
    optimizer: torch.optim.AdamW
    insulation: Insulation
    pad_id: int
    taps: Mapping[str, Tap]  # what the scoring pass reads inside the model, for rewards
    reference: bool  # whether the scoring pass runs the frozen base too
    memory: Memory | None  # by estimate; None where it can't be told
    projector: Projector | None = None
    shift: Shift | None = None
    kl_coef: float = 0.0  # of a KL in the reward; it moves where the recipe has a target
    gradient_transforms: Sequence[GradientTransform] = ()
    update_transforms: Sequence[UpdateTransform] = ()


def set_up(
    recipe: Recipe,
    run: Run,
    functions: Mapping[str, RewardFunction],
    loaded: Loaded | None = None,
    refresh: Callable[[Policy], DirectionSet] | None = None,
    task: Task | None = None,
) -> Setup:
    """Return the assembled run: data, model, sampler, rewards, optimizer, all checked.

    `task` is one of the caller's own, of a recipe whose task.kind is "python".
    """
    if recipe.model.dtype == "bfloat16" and recipe.model.lora is None:
        raise UserError(
            f"model.dtype = {recipe.model.dtype!r} without model.lora: the trained weights would "
            "be 16 bit, and small steps are rounded away (50 steps at lr 1e-6 leave 98 % as "
            'they were). Set model.dtype = "float32", or add model.lora'
        )
    if recipe.rollout.num_prompts % parallel.world_size():
        raise UserError(
            f"rollout.num_prompts = {recipe.rollout.num_prompts} does not divide over "
            f"{parallel.world_size()} processes"
        )
    task = recipe_task(recipe, task)
    examples_sha256 = check_examples(run, task)
    if not task.train:
        raise UserError(f"task {task.name} is for evaluation: it has no training split")
    parts = make_parts(recipe, task, functions)
    opened = open_model(recipe.model) if loaded is None else opened_of(loaded)
    config, device = opened.config, opened.device
    recipe, chosen = settle_dtype(recipe, run, opened, loaded)
    train_prompts, held_out_prompts = make_prompt_sets(
        recipe, task, opened.tokenizer, config, start_of(run.folder)
    )
    prompts_sha256 = check_prompts(run, [*train_prompts, *held_out_prompts])
    longest = max(len(p.ids) for p in (*train_prompts, *held_out_prompts))
    memory = estimate(config, recipe, longest, device.type, parallel.world_size())
    small = check_room(recipe, config, longest, device) if loaded is None else []
    loaded = loaded or load_model(recipe.model, opened)
    dual = [p for p in parts if p.internal is not None and p.internal.config.dual]
    reference = recipe.kl is not None or bool(dual)
    policy = Policy(
        loaded,
        recipe.model,
        run.seeds,
        reference=reference,
        value_head=isinstance(recipe.advantage, GaeAdvantage),
        temperature=recipe.rollout.temperature,
        loop_credit=recipe.update.loop_credit,
    )
    if recipe.parallel.kind == "fsdp" and parallel.world_size() > 1:
        policy.shard()
    ends = stop_ids(policy.base, loaded.tokenizer)
    check_stop(loaded.tokenizer, ends, recipe.rollout.stop)
    sampler = make_sampler(
        recipe.rollout.engine, policy.base, loaded.tokenizer, ends, recipe.rollout.max_batch
    )
    shift = open_shift(recipe, task, policy)
    optimizer = make_optimizer(recipe, policy.trainable(), policy.value_parameters())
    setup = Setup(
        recipe,
        run,
        task,
        train_prompts,
        held_out_prompts,
        policy,
        steered(recipe, policy, sampler),
        parts,
        optimizer,
        Insulation(policy),
        pad_id(loaded.tokenizer),
        make_taps(recipe, parts, policy, loaded, shift),
        reference,
        memory,
        shift=shift,
        projector=make_projector(
            recipe, run, policy, optimizer, partial(refresh, policy) if refresh else None
        ),
        kl_coef=recipe.kl.coef if recipe.kl is not None else 0.0,
    )
    if parallel.rank() == 0:
        run.settle_dtype(recipe.model.dtype)
        run.note(
            **({} if chosen is None else {"dtype": chosen._asdict()}),
            model=loaded.identity,
            model_class=auto_class(loaded.model.config).__name__,
            model_type=loaded.model.config.model_type,
            data={"task": task.name, **task.source},
            examples_sha256=examples_sha256,
            prompts_sha256=prompts_sha256,
            sampler=sampler.name,
            float32_products=precision_of(recipe.model, policy.device),
        )
        slow = _slow_dtype(recipe, device)
        for warning in [*small, *slow, *checks.check_machine()]:
            run.warn(warning)
        if unstarted := missing_start(recipe.prompt, loaded.tokenizer, start_of(run.folder)):
            run.warn(unstarted)
        for part in parts:
            if part.internal is not None and (why := part.internal.closed_gate()):
                run.warn(
                    f"rewards.{part.name}: trained on a feature set whose gate is closed: {why}"
                )
        if sampler.name == "hf" and recipe.rollout.engine == "auto":
            run.warn("this model is sampled with HF generate: the engine does not support it")
    return setup


def settle_dtype(
    recipe: Recipe, run: Run, opened: Opened, loaded: Loaded | None
) -> tuple[Recipe, DtypeChoice | None]:
    """Return the recipe with a dtype in the place of "auto", and why it is that one.

    A run that has begun keeps what it began with, on whatever machine it goes on: None, as where
    the recipe names a dtype itself.
    """
    if recipe.model.dtype != "auto":
        return recipe, None
    kept: ModelDtype = run.recipe.model.dtype
    chosen: DtypeChoice | None = None
    if kept == "auto":
        chosen = (
            choose_dtype(recipe.model, opened)
            if loaded is None
            else DtypeChoice(dtype_name(loaded.model), "the model was given loaded")
        )
        kept = chosen.dtype
    # Rank 0's: it alone has read the run folder, and a measurement may differ by machine.
    mine: tuple[ModelDtype, DtypeChoice | None] = (kept, chosen)
    kept, chosen = parallel.gather_list([mine])[0]
    return with_dtype(recipe, kept), chosen


def check_room(
    recipe: Recipe, config: PreTrainedConfig, longest: int, device: torch.device
) -> list[str]:
    """Refuse what a CUDA device can't hold, by estimate; return warnings of a CPU's memory."""

    def told(changed: Recipe) -> Memory:
        memory = estimate(config, changed, longest, device.type, parallel.world_size())
        assert memory is not None, config.model_type
        return memory

    room = available(device)
    known = estimate(config, recipe, longest, device.type, parallel.world_size())
    if room is None or known is None:
        return []
    if device.type == "cpu":
        return small_machine(known, room)
    check_memory(recipe, told, room, f"model.device = {str(device)!r}")
    return []


def make_taps(
    recipe: Recipe,
    parts: Sequence[RewardPart],
    policy: Policy,
    loaded: Loaded,
    shift: Shift | None = None,
) -> dict[str, Tap]:
    """Return what rewards and shift read in the model; one made on another model is an error."""
    taps = {site: whole_site(site) for part in parts for site in part.sites}
    ActivationReader(policy.base, list(taps))
    for part in parts:
        if part.internal is not None:
            taps[part.name] = part.internal.tap(policy, loaded.identity, recipe.prompt)
    return taps if shift is None else taps | shift.taps(policy)


def make_projector(
    recipe: Recipe,
    run: Run,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    refresh: Callable[[], DirectionSet] | None = None,
) -> Projector | None:
    """Return the Projector of a recipe that has one; directions of another model are an error."""
    config = recipe.projection
    if config is None:
        return None
    directions = open_directions(config.directions, policy)
    noise = run.seeds.generator("projection", "null")
    folder = run.folder / "directions"
    projector = Projector(config, policy, optimizer, directions, folder, noise, refresh)
    if parallel.rank() == 0:
        note_projector(run, projector)
    return projector


def open_directions(path: str, policy: Policy) -> DirectionSet:
    """Return the directions of a file, which must be of the recipe's model and dtype."""
    directions = load_directions(path)
    check_directions(directions, path, model_digest(policy.identity), dtype_name(policy.base))
    return directions


def open_shift(recipe: Recipe, task: Task, policy: Policy) -> Shift | None:
    """Return the shift of a recipe that has one."""
    config = recipe.shift
    if config is None:
        return None
    path = config.directions
    directions = open_directions(path, policy) if path else None
    return make_shift(config, directions, task, recipe.rollout.num_generations)


def shifted(
    setup: Setup, paid: Rewards, rollouts: Sequence[Rollout], trace: Trace, step: int
) -> Rewards:
    """Return the rewards after the recipe's shift, or as they were rewarded."""
    return paid if setup.shift is None else setup.shift.apply(paid, rollouts, trace, step)


def steered(recipe: Recipe, policy: Policy, sampler: Sampler) -> Sampler:
    """Return the sampler with the recipe's intervention, whose hooks are on the policy's blocks."""
    config = recipe.intervention
    if config is None:
        return sampler
    directions = open_directions(config.directions, policy)
    layers = directions.layers
    if config.layers:
        layers = parse_layer_set(config.layers, len(policy.blocks))
    rows_kD = directions.vector_D[None].to(policy.device)
    switch = hook_blocks(policy.blocks, layers, change_for(config.kind, rows_kD))
    switch.on = not isinstance(config, SuppressIntervention)
    return SteeredSampler(sampler, switch)


def note_projector(run: Run, projector: Projector) -> None:
    """Write to the manifest what is constrained, along which direction, with which sign."""
    held = projector.directions
    run.note(
        projection={
            "arm": held.arm,
            "accuracy": held.accuracy,
            "modules": len(projector.sites),
            "layers": projector.layers(),
            "convention": projector.config.convention,
        }
    )
    for warning in literal_warning(projector.config):
        run.warn(warning)
    missing = sorted(set(held.layers) - set(projector.layers()))
    if missing and not projector.config.layers:
        run.warn(f"projection: layers {missing} of the direction's band have no trained module")


def add_transforms(
    setup: Setup, gradient: Sequence[GradientTransform], update: Sequence[UpdateTransform]
) -> None:
    """Set the transforms of the optimizer step: the watch, the caller's, then the Projector's."""
    setup.gradient_transforms = (setup.insulation.watch, *map(_with_names_of_its_own, gradient))
    setup.update_transforms = tuple(map(_with_names_of_its_own, update))
    if setup.projector is not None:
        setup.gradient_transforms = (*setup.gradient_transforms, setup.projector.on_gradient)
        setup.update_transforms = (*setup.update_transforms, setup.projector.on_update)


def _with_names_of_its_own(
    transform: Callable[P, Mapping[str, float]],
) -> Callable[P, Mapping[str, float]]:
    def checked(*args: P.args, **kwargs: P.kwargs) -> Mapping[str, float]:
        found = transform(*args, **kwargs)
        for name in found:
            refuse_run_metric(name, "a transform's metrics")
        return found

    return checked


def begin_step(setup: Setup, step: int) -> None:
    """Do what is due before a step: directions that follow the policy."""
    if setup.projector is not None:
        setup.projector.begin_step(step, save=parallel.rank() == 0)


def _slow_dtype(recipe: Recipe, device: torch.device) -> list[str]:
    """Return a warning if this processor multiplies the recipe's bfloat16 slower than float32."""
    if recipe.model.dtype != "bfloat16" or device.type != "cpu":
        return []
    times = bfloat16_slowdown()
    if times < 1.5:
        return []
    return [
        f'model.dtype = "bfloat16": a product takes {times:.1f} times as long as in float32 on '
        'this processor, which lacks the instructions; model.dtype = "float32" is faster and needs '
        "twice the memory for the frozen weights"
    ]


def prompt_limit(recipe: Recipe, config: PreTrainedConfig) -> int:
    """Return how many tokens a prompt may have, so that a completion has room after it."""
    context = config.get_text_config().max_position_embeddings
    room = context - recipe.rollout.max_completion_length
    return min(recipe.prompt.max_prompt_length or room, room)


def make_prompt_sets(
    recipe: Recipe,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    day: datetime,
) -> tuple[list[Prompt], list[Prompt]]:
    """Return training and held-out prompts; worked examples are taken out of the training set.

    `day` is the date that a chat template prints: that of the run's start.
    """
    limit = prompt_limit(recipe, config)
    shots = list(task.train[: recipe.prompt.few_shot])
    train_examples = task.train[len(shots) :]
    held_out = task.held_out[: recipe.eval.num]
    return (
        make_prompts(train_examples, shots, recipe.prompt, tokenizer, limit, day),
        make_prompts(held_out, shots, recipe.prompt, tokenizer, limit, day),
    )


def check_examples(run: Run, task: Task) -> str:
    """Return the sha256 of the task's examples; a run that began with others, or with another
    verifier of the user's, can't go on."""
    digest = hashlib.sha256(task.name.encode())
    for example in (*task.train, *task.held_out):
        digest.update(json.dumps(vars(example), default=str, sort_keys=True).encode())
    now, manifest = digest.hexdigest(), read_manifest(run.folder)
    data = manifest.get("data")
    former = {"examples": manifest.get("examples_sha256", now)}
    present: dict[str, object] = {"examples": now}
    for key in ("verify", "labels"):
        present[key] = task.source.get(f"{key}_sha256")
        former[key] = data.get(f"{key}_sha256") if isinstance(data, dict) else present[key]
    changed = [name for name, value in former.items() if value != present[name]]
    if changed:
        raise UserError(
            f"{run.folder} was started with another task; changed: {', '.join(changed)} (now of "
            f"{task.name!r}, {len(task.train)} training and {len(task.held_out)} held-out "
            "questions). Undo the change, or start a new run with name=NEW_NAME"
        )
    return now


def check_prompts(run: Run, prompts: Sequence[Prompt]) -> str:
    """Return the sha256 of the prompts' ids; a run that began with others can't go on."""
    now = hashlib.sha256(json.dumps([prompt.ids for prompt in prompts]).encode()).hexdigest()
    former = read_manifest(run.folder).get("prompts_sha256", now)
    if former != now:
        raise UserError(
            f"{run.folder} was started with other prompts: their ids had sha256 "
            f"{str(former)[:12]}, now {now[:12]}. The data, the tokenizer or the chat template has "
            "changed: undo that, or start a new run with name=NEW_NAME"
        )
    return now


def check_base(certificate: Path, insulation: Insulation) -> None:
    """Refuse to go on over another base model than the one that the checkpoint was trained over."""
    if not certificate.is_file():
        raise UserError(
            f"{certificate} is missing: what this checkpoint was trained over is unknown"
        )
    former = str(read_object(certificate, frozen_sha256=str)["frozen_sha256"])
    now = joint_digest(insulation.frozen())
    if former != now:
        raise UserError(
            f"{certificate} was made over another base model: its frozen tensors have sha256 "
            f"{former[:12]}, those of the model loaded now {now[:12]}"
        )


def resume(setup: Setup) -> int:
    """Return the last step that was saved, with weights and optimizer as they were; else 0."""
    rows = {int(row["step"]): row for row in read_metrics(setup.run.folder)}
    saved = saved_steps(setup.run.folder)
    steps = [step for step in saved if step in rows]
    if saved and not steps:
        raise UserError(
            f"{setup.run.folder}/metrics.jsonl has no row of a saved step (saved: "
            f"{', '.join(map(str, saved))}): it was cut or emptied. Put it back, or begin a new "
            "run with name=NEW_NAME"
        )
    done = steps[-1] if steps else 0
    if parallel.rank() == 0 and steps[-1:] != saved[-1:]:
        setup.run.warn(f"metrics.jsonl has no row of step {saved[-1]}: continuing from step {done}")
    if done:
        check_base(checkpoint_folder(setup.run.folder, done) / "certificate.json", setup.insulation)
        load_checkpoint(setup.run.folder, done, setup.policy, setup.optimizer)
        setup.kl_coef = rows[done].get("kl_coef", setup.kl_coef)
    if setup.projector is not None:
        if done:
            setup.projector.resume(done)
        else:
            setup.projector.start()
    if parallel.rank() == 0:
        setup.run.rewind_to(done if done else -1)
        drop_states(setup.run, done)  # a kill may have come between a save and this
    parallel.barrier()
    return done
