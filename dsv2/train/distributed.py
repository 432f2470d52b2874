"""Several processes that train one model: who takes part, and how weights are spread and gathered.

Weights, gradients and the optimiser's state are spread over all processes by FSDP2 (`fully_shard`, one group
per block and one for the rest); every process computes its own rows of the global batch. Started by
`torchrun`; one process alone needs none of this.

With expert parallelism of P, P neighbouring processes share out the routed experts of every layer among them
and send each other tokens (`dsv2.moe.parallel`); such groups hold copies of the same experts. The weights of
an expert then never travel, its tokens do; everything else is spread by FSDP2 as before.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable
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
    expert_mesh: Any = None  # the same processes as ("data", "expert") where experts are shared out

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


def lost_process(error: BaseException) -> str:
    """What a collective says when one that takes part in it has died, in a line; "" for other errors."""
    said = str(error)
    failed = (
        isinstance(error, getattr(dist, "DistError", ()))
        or isinstance(error, RuntimeError)
        and any(
            word in said for word in ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
        )
    )
    return (said.splitlines() or [repr(error)])[0][:200] if failed else ""


def start_world(device: str | None = None, expert_parallel: int = 1) -> World:
    """This process's `World`: from the variables that torchrun sets, or one process alone.

    device: "cpu", "cuda", "cuda:1", ...; None: the GPU if there is one. expert_parallel: over how many
    processes the experts of a layer are shared out. Raises ValueError for a device that torch cannot use, or
    a number of processes that this does not divide.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(kind)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={kind!r} cannot be used: {reason}; try --device cpu") from None
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if expert_parallel < 1 or size % expert_parallel:
        raise ValueError(
            f"expert_parallel={expert_parallel} must divide the number of processes, {size} "
            "(torchrun's --nproc-per-node, times its machines)"
        )
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
    experts = None
    if expert_parallel > 1:
        shape = (size // expert_parallel, expert_parallel)
        experts = dist.init_device_mesh(chosen.type, shape, mesh_dim_names=("data", "expert"))
    return World(chosen, dist.get_rank(), size, mesh, experts)


def spread(model: nn.Module, world: World, dtype: torch.dtype) -> None:
    """Spread a model's weights over the processes, in place; blocks are computed in `dtype`."""
    if world.size == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": world.mesh, "mp_policy": policy}
    if world.expert_mesh is not None:
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise ValueError(f"expert parallelism needs torch 2.7 or newer; this is {torch.__version__}")
        options["ignored_params"] = share_out_experts(model, world.expert_mesh)
    for block in model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)


def share_out_experts(model: nn.Module, mesh: Any) -> set[nn.Parameter]:
    """Leave on each process of the mesh's "expert" dimension its own part of every layer's experts.

    Returns the new parameters: DTensors, split along the experts, the same for all of "data".
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from dsv2.moe.layer import DeepSeekMoE
    from dsv2.moe.parallel import ExpertParallel, Placement, ProcessGroup

    processes, place = mesh["expert"].size(), mesh["expert"].get_local_rank()
    made: set[nn.Parameter] = set()
    for layer in (module for module in model.modules() if isinstance(module, DeepSeekMoE)):
        count = len(layer.experts.w_down)
        each = -(-count // processes)  # as DTensor splits: the last processes may have fewer, or none
        placement = Placement([i // each for i in range(count)], processes)
        for name, weight in list(layer.experts.named_parameters()):
            local = weight.detach()[: len(placement.experts_on(place))].clone()
            spread_out = DTensor.from_local(
                local, mesh, (Replicate(), Shard(0)), run_check=False, shape=weight.shape,
                stride=weight.stride(),
            )  # fmt: skip
            setattr(layer.experts, name, nn.Parameter(spread_out))
        layer.parallel = ExpertParallel(placement, ProcessGroup(mesh.get_group("expert")))
        made.update(layer.experts.parameters())
    return made


def expert_parameters(parameters: Iterable[Tensor], world: World) -> list[Tensor]:
    """Those that `share_out_experts` made."""
    if world.expert_mesh is None:
        return []
    return [p for p in parameters if getattr(p, "device_mesh", None) == world.expert_mesh]


@torch.no_grad()
def average_expert_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Over the copies of each expert, as FSDP2 has averaged all others' over the processes.

    An expert's gradient already has the tokens of all processes of its group in it.
    """
    for parameter in expert_parameters(parameters, world):
        local = parameter.grad.to_local()
        dist.all_reduce(local, group=world.expert_mesh.get_group("data"))
        local.div_(world.size)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float, world: World) -> Tensor:
    """Scale all gradients so that their common norm is at most `limit`; returns the norm before."""
    parameters = list(parameters)
    experts = expert_parameters(parameters, world)
    if not experts:
        return whole(torch.nn.utils.clip_grad_norm_(parameters, limit))
    known = {id(p) for p in experts}
    others = [p for p in parameters if id(p) not in known]
    square = sum(p.grad.to_local().float().square().sum() for p in experts)
    dist.all_reduce(square, group=world.expert_mesh.get_group("expert"))
    rest = whole(torch.nn.utils.get_total_norm([p.grad for p in others]))
    norm = (square + rest.square()).sqrt()
    for some in (experts, others):  # one mesh at a time
        torch.nn.utils.clip_grads_with_norm_(some, limit, norm)
    return norm


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
