"""The experts: E feed-forward networks held as two stacked weights, run over the tokens that chose them."""

# n tokens   D hidden_size   E routed experts   K experts per token   I moe_intermediate_size
# P token-expert pairs

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsv2.kernels import prefill
from dsv2.layers import swiglu


def run_sorted(
    x: Float[Tensor, "P D"],
    w_gate_up: Float[Tensor, "E twoI D"],
    w_down: Float[Tensor, "E D I"],
    load: Int[Tensor, " E"],
) -> Float[Tensor, "P D"]:
    """Every expert on its own rows of `x`: the first load[0] rows are expert 0's, and so on."""
    outputs = []
    # unbind, not w[e]: the gradient of E separate selections would be E tensors of the size of all experts.
    for rows, gate_up, down in zip(x.split(load.tolist()), w_gate_up.unbind(), w_down.unbind()):
        if rows.shape[0]:
            outputs.append(F.linear(swiglu(F.linear(rows, gate_up)), down))
    return torch.cat(outputs) if outputs else x


def run_grouped(
    x: Float[Tensor, "P D"],
    w_gate_up: Float[Tensor, "E twoI D"],
    w_down: Float[Tensor, "E D I"],
    load: Int[Tensor, " E"],
) -> Float[Tensor, "P D"]:
    """What `run_sorted` computes, by two grouped matrix products; the load stays on the GPU."""
    ends = load.cumsum(0, dtype=torch.int32)
    hidden = swiglu(_grouped_mm(x, w_gate_up.mT, ends))
    return _grouped_mm(hidden, w_down.mT, ends)


def _grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    public = getattr(F, "grouped_mm", None)  # from torch 2.10 on
    return public(x, weights, offs=ends) if public else torch._grouped_mm(x, weights, offs=ends)


def grouped_mm_available(x: Tensor, width: int) -> bool:
    """Whether torch's grouped product takes these: bf16 on Hopper or newer, rows of 16 bytes."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0) and x.shape[-1] % 8 == 0 and width % 8 == 0


class RoutedExperts(nn.Module):
    """sum_i g_{i,t} FFN_i(u_t) over the experts a token chose (the second sum of equation 20).

    `w_gate_up`: (E, 2 I, D), gate rows first; `w_down`: (E, D, I).
    """

    def __init__(self, n_experts: int, hidden_size: int, width: int):
        super().__init__()
        self.w_gate_up = nn.Parameter(torch.empty(n_experts, 2 * width, hidden_size))
        self.w_down = nn.Parameter(torch.empty(n_experts, hidden_size, width))

    def forward(
        self,
        x: Float[Tensor, "n D"],
        expert_ids: Int[Tensor, "n K"],
        weights: Float[Tensor, "n K"],
        kept: Bool[Tensor, "n K"] | None = None,
    ) -> Float[Tensor, "n D"]:
        """Sort the pairs by expert, run, weigh, and add up per token. Dropped pairs add nothing."""
        n_experts, k = self.w_down.shape[0], expert_ids.shape[1]
        experts = expert_ids.flatten()
        if kept is None:
            order = experts.argsort(stable=True)
        else:
            experts = torch.where(kept.flatten(), experts, n_experts)  # dropped pairs sort behind all experts
            order = experts.argsort(stable=True)[: int(kept.sum())]
        load = torch.bincount(experts, minlength=n_experts)[:n_experts]
        tokens = order // k
        run = run_grouped if grouped_mm_available(x, self.w_down.shape[-1]) else run_sorted
        # index_select, not x[tokens]: its gradient is added up in a tenth of the time on a CPU.
        out = run(x.index_select(0, tokens), self.w_gate_up, self.w_down, load)
        if kept is None and prefill.fits(x):
            return prefill.add_up(out, weights, order)
        out = out * weights.flatten().index_select(0, order)[:, None].to(out.dtype)
        return torch.zeros_like(x).index_add_(0, tokens, out)
