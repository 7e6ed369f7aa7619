"""Checkpoints: a plain PEFT (or transformers) folder, a model card, and the resume state apart.

    checkpoints/step_00100/adapter_config.json adapter_model.safetensors README.md certificate.json
                           resume/state.pt

Random streams hang from (seed, step, ...) alone, so weights, optimizer state and the step number
are all that a bit-equal resume needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from operando import parallel
from operando.errors import UserError
from operando.models.policy import Policy
from operando.run import Run, atomic_path, remove
from operando.sae.files import read_torch


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step:05d}"


def saved_steps(run_folder: Path) -> list[int]:
    """Return the steps that have a resume state, ascending."""
    states = (run_folder / "checkpoints").glob("step_*/resume/state.pt")
    return sorted(int(file.parents[1].name.removeprefix("step_")) for file in states)


def save_checkpoint(
    run: Run,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    documents: Mapping[str, str],
) -> Path:
    """Write the checkpoint of `step` as a whole, then drop what it makes needless.

    `weights` are Policy.save_weights(); `documents` are text files beside them, by name.
    """
    folder = checkpoint_folder(run.folder, step)
    trained = {name: parallel.whole(p.detach()).cpu() for name, p in policy.trainable().items()}
    state = {
        "step": step,
        "parameters": trained,
        "value_head": [p.detach().cpu() for p in policy.value_parameters()],
        "optimizer": _optimizer_state(optimizer),
    }
    if parallel.rank() == 0:
        run.sync()
        with atomic_path(folder) as part:
            part.mkdir(parents=True)
            policy.save_pretrained(part, weights)
            for name, text in documents.items():
                (part / name).write_text(text, encoding="utf-8")
            (part / "resume").mkdir()
            torch.save(state, part / "resume" / "state.pt")
        drop_states(run, step)
    parallel.barrier()
    return folder


def drop_states(run: Run, step: int) -> None:
    """Drop the resume states up to `step` beyond the newest to keep, and the checkpoints that a
    signal had saved between the recipe's."""
    for old in saved_steps(run.folder):
        if old < step and not run.recipe.saves(old):
            remove(checkpoint_folder(run.folder, old))
    past = [old for old in saved_steps(run.folder) if old <= step]
    keep = run.recipe.checkpoint.keep
    for old in past[: -keep if keep is not None else 0]:
        remove(checkpoint_folder(run.folder, old) / "resume")


def load_checkpoint(
    run_folder: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer
) -> None:
    """Put weights and optimizer back to what they were after `step`."""
    file = checkpoint_folder(run_folder, step) / "resume" / "state.pt"
    state: dict[str, Any] = read_torch(file)
    missing = {"parameters", "value_head", "optimizer"} - set(state)
    if missing:
        raise UserError(f"{file} is not a resume state: it has no {', '.join(sorted(missing))}")
    _put(policy.trainable(), state["parameters"], str(file))
    with torch.no_grad():
        for parameter, saved in zip(policy.value_parameters(), state["value_head"], strict=True):
            parameter.copy_(saved)
    _load_optimizer(optimizer, state["optimizer"])


def weight_steps(run_folder: Path) -> list[int]:
    """Return the steps that have weights (an adapter or a model), ascending."""
    files = (run_folder / "checkpoints").glob("step_*/*.safetensors")
    return sorted({int(file.parent.name.removeprefix("step_")) for file in files})


def pick_step(run_folder: Path, step: int | None) -> int:
    """Return a saved step (None: the last); a step that was not saved is an error."""
    steps = weight_steps(run_folder)
    if not steps:
        raise UserError(f"{run_folder} has no checkpoint")
    if step is not None and step not in steps:
        saved = ", ".join(map(str, steps))
        raise UserError(f"--step {step}: {run_folder} has checkpoints at {saved}")
    return steps[-1] if step is None else step


def load_weights(run_folder: Path, step: int, policy: Policy) -> None:
    """Put the weights of a saved step into the policy, from the published files alone.

    A file that holds other tensors than this policy, a leak into other layers say, is an error.
    """
    folder = checkpoint_folder(run_folder, step)
    saved: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no weights (*.safetensors)")
    for file in files:
        try:
            saved |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or not a safetensors file: {error}") from error
    if policy.config.lora is not None:
        wanted = policy.trainable()
        saved = {_with_adapter_name(name): tensor for name, tensor in saved.items()}
    else:  # the files hold the frozen weights too, and those must not be taken on trust
        wanted = dict(policy.base.named_parameters())
        saved = {name: tensor for name, tensor in saved.items() if name in wanted}
    _put(wanted, saved, str(folder))


def _with_adapter_name(name: str) -> str:
    """Return PEFT's in-model name of a saved tensor: files leave out the adapter's name."""
    return re.sub(r"(lora_[AB])\.weight$", r"\1.default.weight", name)


@torch.no_grad()
def _put(wanted: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor], where: str) -> None:
    if set(saved) != set(wanted):
        odd = sorted(set(saved) ^ set(wanted))
        raise UserError(f"{where} holds other trained tensors than this recipe: {odd[:3]} ...")
    for name, parameter in wanted.items():
        if saved[name].shape != parameter.shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(saved[name].shape)}, the model wants "
                f"{tuple(parameter.shape)}"
            )
        parameter.copy_(_like(saved[name], parameter))


def _optimizer_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """Return AdamW's tensors in the order of its parameters."""
    return [
        {key: parallel.whole(value).cpu() for key, value in optimizer.state[parameter].items()}
        for parameter in _parameters(optimizer)
    ]


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: Sequence[dict[str, Tensor]]) -> None:
    for parameter, state in zip(_parameters(optimizer), saved, strict=True):
        optimizer.state[parameter] = {
            key: value if key == "step" else _like(value, parameter) for key, value in state.items()
        }


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _like(saved: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return a saved full tensor on the parameter's device and in its sharding."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(saved, parameter.device_mesh, parameter.placements)
    return saved.to(parameter.device)
