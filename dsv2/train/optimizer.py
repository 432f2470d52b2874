"""AdamW as the paper uses it, its state by parameter name, and bf16 computation from float32 weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dsv2.train.distributed import put, whole
from dsv2.train.schedule import TrainConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(parameters: dict[str, Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone (section 3.1.2: betas 0.9 and 0.95, decay 0.1).

    A norm's gain has no direction to be pulled to zero along. The state exists from the start, so that a
    checkpoint can be read into it.
    """
    weights = list(parameters.values())
    meshes = {getattr(p, "device_mesh", None): None for p in weights}  # one step moves weights of one mesh
    groups = []
    for mesh in meshes:
        those = [p for p in weights if getattr(p, "device_mesh", None) == mesh]
        groups += [
            {"params": [p for p in those if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in those if p.dim() <= 1], "weight_decay": 0.0},
        ]
    device = weights[0].device
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
    )
    for parameter in weights:
        # The fused kernel wants the step where the weights are, the loop wants it on the CPU.
        step = torch.zeros((), dtype=torch.float32, device=device if fused else "cpu")
        moments = {name: torch.zeros_like(parameter) for name in _MOMENTS}
        optimizer.state[parameter].update(step=step, **moments)
    return optimizer


def optimizer_tensors(parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by name, `layers.0.ffn_norm.weight.exp_avg` and so on; tensors may be spread."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}.{key}"] = value
    return tensors


def gather(tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole copies on the CPU; all processes must take part, those without `keep` get nothing.

    One tensor at a time, so that no device holds a whole model.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.to("cpu", copy=True)
    return gathered


@torch.no_grad()
def initialize(model: nn.Module, std: float, seed: int) -> None:
    """Draw every matrix from N(0, std^2) and set norms to 1, the same for any number of processes.

    Drawn on the CPU, one tensor at a time: torch's own initialisation of spread tensors would depend on how
    many processes there are.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        full = torch.ones(parameter.shape)
        put(parameter, full.normal_(std=std, generator=generator) if parameter.dim() > 1 else full)


class MasterWeights:
    """float32 weights that the optimiser moves, beside a bf16 copy that computes.

    In bf16 a step of a thousandth of a weight is lost in rounding, so that the sum of many is lost too; the
    products need no more than bf16.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.copy = copy.deepcopy(model).to(dtype)
        self._pairs = list(zip(model.parameters(), self.copy.parameters()))

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the copy's gradients to the master weights' in float32, and clear them."""
        for master, computed in self._pairs:
            if computed.grad is None:
                continue
            if master.grad is None:
                master.grad = computed.grad.float()
            else:
                master.grad += computed.grad
            computed.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the master weights into the copy."""
        masters, copies = zip(*self._pairs)
        torch._foreach_copy_(list(copies), list(masters))
