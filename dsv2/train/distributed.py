"""Several processes that train one model: who takes part, and how weights are spread and gathered.

Weights, gradients and the optimiser's state are spread over all processes by FSDP2 (`fully_shard`, one group
per block and one for the rest); every process computes its own rows of the global batch. Started by
`torchrun`; one process alone needs none of this.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's place among them."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: Any = None  # a DeviceMesh where there is more than one process

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the reader."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same on each. Works in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum(torch.zeros((), device=self.device))

    def broadcast(self, value: Any) -> Any:
        """The main process's value, a plain Python object, on every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]


def leave(status: int) -> None:
    """End one of several processes at once; call it when everything is written.

    Without Python's own tear-down: FSDP2 keeps references to the group, and gloo's threads, when they outlive
    the interpreter, abort the process now and then.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_world(device: str | None = None) -> World:
    """This process's `World`: from the variables that torchrun sets, or one process alone.

    device: "cpu", "cuda", "cuda:1", ...; None: the GPU if there is one. Raises ValueError for a device that
    torch cannot use.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(kind)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={kind!r} cannot be used: {reason}; try --device cpu") from None
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World(chosen)
    if chosen.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"this machine has {torch.cuda.device_count()} GPUs and this is its process {local + 1}; "
                "start torchrun with --nproc-per-node set to the number of GPUs"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    mesh = dist.init_device_mesh(chosen.type, (size,))
    return World(chosen, dist.get_rank(), size, mesh)


def spread(model: nn.Module, world: World, dtype: torch.dtype) -> None:
    """Spread a model's weights over the processes, in place; blocks are computed in `dtype`."""
    if world.size == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.layers:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)


def whole(tensor: Tensor) -> Tensor:
    """A spread tensor in one piece, on every process; all processes must ask for it. Others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor into one that may be spread; all processes must take part."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(
            value.to(target.device, target.dtype), target.device_mesh, target.placements
        )
    target.copy_(value)
