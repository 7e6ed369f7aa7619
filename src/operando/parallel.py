"""Several processes as one: every function is the identity where there is a single process.

Each rank samples, scores and rewards its own prompts. What the ranks found is then gathered, so
that advantages and loss weights are those of the whole batch; only gradients are summed. Metrics
equal those of one process up to the order of float sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

T = TypeVar("T")


def start() -> None:
    """Join the process group that torchrun describes; without torchrun do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather_list(mine: Sequence[T]) -> list[T]:
    """Return the items of all ranks, those of rank 0 first."""
    if not dist.is_initialized():
        return list(mine)
    parts: list[list[T] | None] = [None] * world_size()
    dist.all_gather_object(parts, list(mine))
    return [item for part in parts if part is not None for item in part]


def sum_tensor(mine: Tensor) -> Tensor:
    """Return the sum over ranks of a CPU tensor of the same shape on each."""
    if not dist.is_initialized():
        return mine
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = mine.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(mine.device)


def mean_over_ranks(mine: Mapping[str, float]) -> dict[str, float]:
    """Return each number averaged over the ranks, which all give the same names."""
    logged = gather_list([mine])
    return {name: sum(one[name] for one in logged) / len(logged) for name in mine}


def gather_rows(mine_BT: Tensor) -> Tensor:
    """Return the rows of all ranks, those of rank 0 first."""
    if not dist.is_initialized():
        return mine_BT
    return torch.cat(gather_list([mine_BT]))


def max_over_ranks(value: int) -> int:
    return max(gather_list([value]))


def same_length(items: list[T], filler: T | None = None) -> list[tuple[T, bool]]:
    """Return (item, counts), padded to the longest list of any rank with items that don't count.

    Under FSDP every forward is a collective, so all ranks must run the same number of them. A rank
    whose own list may be empty gives a `filler`.
    """
    padding = max_over_ranks(len(items)) - len(items)
    spare = items[0] if items else filler
    assert spare is not None, "nothing to pad with"
    return [(item, True) for item in items] + [(spare, False)] * padding


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over ranks, in place; FSDP has already summed those of its own parameters."""
    if not dist.is_initialized():
        return
    grads = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    if not grads:
        return
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def shard_model(model: nn.Module, blocks: nn.ModuleList) -> None:
    """Shard parameters, gradients and optimizer state over the ranks (FSDP2), block by block.

    `model` is the decoder; an output head of its own stays whole on every rank.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for block in blocks:
        fully_shard(block, reshard_after_forward=True)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A sum, as the loss weights are global; gloo knows no scaled reduction.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one (a collective), any other tensor as it is.

    Its gradient on each rank is a part; the sum over ranks goes back to the shards.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)
