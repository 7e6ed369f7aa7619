"""The training loop of plain and supervised training: AdamW, cosine rate, states to go on from.

The order of the batches is fixed before the first step, so that the position in the data is the
step. A state holds weights, optimizer, random numbers, step and the hash of the data; a resumed
run is bit-equal to one that was not stopped.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from operando.errors import UserError
from operando.models.recursive import RecursiveCausalLM
from operando.recipe.deep import DeepPretrainRecipe
from operando.recipe.mixture import MixtureRecipe, SftRecipe
from operando.recipe.pretrain import PretrainRecipe
from operando.run import atomic_path, differences
from operando.sae.files import read_torch
from operando.stopping import Stopped, stops_after_step

STATE = "training_state.pt"
IGNORED = -100  # a label that has no loss
Trained = PretrainRecipe | MixtureRecipe | SftRecipe
FINAL = 50  # steps that the final loss is the mean of


class PretrainProgress(NamedTuple):
    """Where pre-training stands. Example: PretrainProgress(250, 1200, 1.31, 11_500.0)"""

    step: int
    steps: int
    loss: float
    tokens_per_second: float


class Batch(NamedTuple):
    """Right-padded rows, and what is to be predicted at each place or IGNORED."""

    ids_BS: Int[Tensor, "B S"]
    labels_BS: Int[Tensor, "B S"]

    @property
    def num_labels(self) -> int:
        return int((self.labels_BS != IGNORED).sum())


class Pair(NamedTuple):
    """Ids of a prompt and of its answer, end token included. Example: Pair((5, 6), (9, 1))"""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def collate(pairs: Sequence[Pair], pad: int) -> Batch:
    """Return pairs as right-padded rows with a loss on answers only."""
    width = max(len(pair.prompt) + len(pair.answer) for pair in pairs)
    ids_BS = torch.full((len(pairs), width), pad)
    labels_BS = torch.full((len(pairs), width), IGNORED)
    for b, pair in enumerate(pairs):
        start, end = len(pair.prompt), len(pair.prompt) + len(pair.answer)
        ids_BS[b, :end] = torch.tensor(pair.prompt + pair.answer)
        labels_BS[b, start:end] = ids_BS[b, start:end]
    return Batch(ids_BS, labels_BS)


class Fitted(NamedTuple):
    """What training came to. `tokens` are those with a loss; Example: Fitted(58_000, 1.31, 40)"""

    tokens: int
    final_loss: float
    steps: int


def rate_at(recipe: Trained | DeepPretrainRecipe, steps: int, step: int) -> float:
    """Return the learning rate at `step` (from 0): linear warm-up, then cosine to min_lr_frac."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return recipe.lr * (recipe.min_lr_frac + (1 - recipe.min_lr_frac) * cosine)


def draw_loops(min_loops: int | None, model: torch.nn.Module, rng: random.Random) -> dict[str, int]:
    """Return how many loops a step takes, as the model's argument; None: nothing, so all."""
    if min_loops is None:
        return {}
    if not isinstance(model, RecursiveCausalLM):
        raise UserError(
            f"min_loops = {min_loops} is for a recursive model; this is a {type(model).__name__}"
        )
    most = model.config.num_loops
    if min_loops > most:
        raise UserError(f"min_loops = {min_loops}: the model has {most} loops")
    return {"num_loops": rng.randint(min_loops, most)}


def make_optimizer(model: torch.nn.Module, recipe: Trained) -> torch.optim.AdamW:
    """Return AdamW over all parameters, with the recipe's rate and weight decay."""
    return torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )


def take_step(
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    parts: Sequence[Batch],
    lr: float,
    loops: Mapping[str, int],
) -> float:
    """Train on one batch, given in parts, and return its mean loss per label.

    A parameter group with `lr_scale` takes so many times the rate. The gradient's norm is cut at 1.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
    num = None if len(parts) == 1 else sum(part.num_labels for part in parts)
    model.zero_grad(set_to_none=True)
    value = 0.0
    for part in parts:
        ids_BS, labels_BS = part.ids_BS.to(model.device), part.labels_BS.to(model.device)
        # Right padding under causal attention needs no attention mask.
        loss = model(input_ids=ids_BS, labels=labels_BS, num_items_in_batch=num, **loops).loss
        loss.backward()
        value += float(loss.detach())
    assert math.isfinite(value), f"loss {value}"
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    for optimizer in optimizers:
        optimizer.step()
    return value


def fit_drawn(
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: PretrainRecipe | DeepPretrainRecipe,
    draw: Callable[[], Sequence[Batch]],
    on_step: Callable[[PretrainProgress], None],
) -> Fitted:
    """Train `model` in place on batches that are drawn as it goes, each in parts of like length.

    With `min_loops`, each step draws how many loops a recursive model takes, after its batch.
    """
    loops_rng = random.Random(f"{recipe.seed}/loops")
    started, tokens, losses = time.monotonic(), 0, []
    for step in range(recipe.steps):
        parts = draw()
        loops = draw_loops(recipe.model.min_loops, model, loops_rng)
        lr = rate_at(recipe, recipe.steps, step)
        losses.append(take_step(model, optimizers, parts, lr, loops))
        tokens += sum(part.num_labels for part in parts)
        rate = tokens / max(time.monotonic() - started, 1e-9)
        on_step(PretrainProgress(step + 1, recipe.steps, losses[-1], rate))
    last = losses[-FINAL:]
    return Fitted(tokens, round(sum(last) / len(last), 4), recipe.steps)


def fit(
    model: PreTrainedModel,
    recipe: MixtureRecipe | SftRecipe,
    steps: int,
    batch_at: Callable[[int], Batch],
    data_sha256: str,
    resume: bool,
    on_step: Callable[[PretrainProgress], None],
    min_loops: int | None = None,
) -> Fitted:
    """Train `model` in place on batch_at(0), batch_at(1), ...

    With `min_loops`, each step draws how many loops a recursive model takes: from it to all.
    """
    draw_loops(min_loops, model, random.Random(0))  # raises at once if there are no such loops
    optimizer = make_optimizer(model, recipe)
    file = Path(recipe.out) / STATE
    asked = {"recipe": _as_json(recipe), "data_sha256": data_sha256}
    first, tokens, losses = 0, 0, []
    if resume:
        first, tokens, losses = _load(file, asked, model, optimizer)
    elif file.exists():
        raise UserError(
            f"{file} is the state of a training that did not finish: continue with --resume, "
            "delete it, or choose another out=FOLDER"
        )
    model.train()
    started, before = time.monotonic(), tokens
    with stops_after_step() as asked_to_stop:
        for step in range(first, steps):
            batch = batch_at(step)
            # Of the step alone, so that a resumed training draws the same.
            loops = draw_loops(min_loops, model, random.Random(f"{recipe.seed}/loops/{step}"))
            loss = take_step(model, [optimizer], [batch], rate_at(recipe, steps, step), loops)
            tokens += batch.num_labels
            losses = [*losses, loss][-FINAL:]
            rate = (tokens - before) / max(time.monotonic() - started, 1e-9)
            on_step(PretrainProgress(step + 1, steps, losses[-1], rate))
            signum = asked_to_stop()
            if ((step + 1) % recipe.checkpoint_every == 0 or signum) and step + 1 < steps:
                _save(file, asked, model, optimizer, step + 1, tokens, losses)
                if signum:
                    raise Stopped(
                        signum, f"stopped; step {step + 1} is saved: continue with --resume"
                    )
    model.eval()
    return Fitted(tokens, round(sum(losses) / len(losses), 4), steps)


def forget_state(folder: Path) -> None:
    """Delete the state of a training whose model is written."""
    (folder / STATE).unlink(missing_ok=True)


def _as_json(recipe: MixtureRecipe | SftRecipe) -> str:
    return json.dumps(recipe.model_dump(mode="json", exclude={"out"}), sort_keys=True)


def _save(
    file: Path,
    asked: Mapping[str, str],
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    tokens: int,
    losses: list[float],
) -> None:
    state = {
        **asked,
        "step": step,
        "tokens": tokens,
        "losses": losses,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    with atomic_path(file) as temporary:
        torch.save(state, temporary)


def _load(
    file: Path, asked: Mapping[str, str], model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> tuple[int, int, list[float]]:
    if not file.is_file():
        raise UserError(f"--resume: there is no {file}; train without --resume")
    state: dict[str, Any] = read_torch(file)
    missing = {*asked, "step", "tokens", "losses", "model", "optimizer", "rng"} - set(state)
    if missing:
        raise UserError(f"{file} is not a training state: no {', '.join(sorted(missing))}")
    changed = differences(json.loads(state["recipe"]), json.loads(asked["recipe"]))
    if changed:
        raise UserError(
            f"--resume: the recipe is not the one of {file}: {'; '.join(changed)}. Undo the "
            "change, or delete the file"
        )
    if state["data_sha256"] != asked["data_sha256"]:
        raise UserError(
            f"--resume: the data are not those of {file}: {state['data_sha256'][:12]} then, "
            f"{asked['data_sha256'][:12]} now. A file behind a source has changed"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"].cpu())
    return state["step"], state["tokens"], state["losses"]
