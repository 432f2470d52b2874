"""The experts: E feed-forward networks held as two stacked weights, run over the tokens that chose them."""

# n tokens   D hidden_size   E routed experts   K experts per token   I moe_intermediate_size
# P token-expert pairs

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv2.kernels import prefill
from dsv2.kernels.backend import kernel_problem
from dsv2.layers import swiglu

FEW_ROWS = 8  # of an expert, at most, for which `_product` turns its product round
LARGE = 2**16  # values: smaller weights stay in a cache, where there is nothing to gain


def run_sorted(
    x: Float[Tensor, "P D"],
    w_gate_up: Float[Tensor, "E twoI D"],
    w_down: Float[Tensor, "E D I"],
    load: Int[Tensor, " E"],
) -> Float[Tensor, "P D"]:
    """Every expert on its own rows of `x`: the first load[0] rows are expert 0's, and so on."""
    if torch.is_grad_enabled():
        return SortedExperts.apply(x, w_gate_up, w_down, load.tolist())
    return _one_by_one(x, w_gate_up, w_down, load.tolist())


class SortedExperts(torch.autograd.Function):
    """`run_sorted`, with a backward pass by hand that writes each expert's gradient to its place at once.

    Written as E differentiable products, the gradient of the stacked weights would be put together from E
    tensors: a copy of all experts, which for few tokens takes longer than everything else.
    """

    @staticmethod
    def forward(ctx, x, w_gate_up, w_down, load):
        gate_up = x.new_empty(x.shape[0], w_gate_up.shape[1])
        ctx.save_for_backward(x, w_gate_up, w_down, gate_up)
        ctx.load = load
        return _one_by_one(x, w_gate_up, w_down, load, gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        x, w_gate_up, w_down, gate_up = ctx.saved_tensors
        x_slope = torch.empty_like(x)
        gate_up_slope, down_slope = _zeros_like(w_gate_up), _zeros_like(w_down)
        for e, rows in _rows_of(ctx.load):
            gate, up = gate_up[rows].chunk(2, dim=-1)
            silu = F.silu(gate)
            torch.mm(slope[rows].mT, silu * up, out=down_slope[e])
            inner = slope[rows] @ w_down[e]
            inner = torch.cat((torch.ops.aten.silu_backward(inner * up, gate), inner * silu), dim=-1)
            torch.mm(inner.mT, x[rows], out=gate_up_slope[e])
            torch.mm(inner, w_gate_up[e], out=x_slope[rows])
        return x_slope, gate_up_slope, down_slope, None


def _one_by_one(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, load: list[int], gate_up: Tensor | None = None
) -> Tensor:
    """One expert after the other; `gate_up`, if given, receives what the first products give."""
    out = torch.empty_like(x)
    for e, rows in _rows_of(load):
        inner = _product(x[rows], w_gate_up[e], None if gate_up is None else gate_up[rows])
        _product(swiglu(inner), w_down[e], out[rows])
    return out


def _product(x: Float[Tensor, "r c"], w: Float[Tensor, "o c"], out: Tensor | None = None) -> Tensor:
    """x W^T, for few rows on a CPU taken as (W x^T)^T: of the two calls this one reads W three times as fast.

    The library behind both is the same, and so is the result but for rounding. One row is taken twice, as a
    product with a vector is slow again.
    """
    rows = x.shape[0]
    if rows > FEW_ROWS or x.device.type != "cpu" or x.dtype != torch.float32 or w.numel() < LARGE:
        return torch.mm(x, w.mT, out=out)
    x = torch.cat((x, x)) if rows == 1 else x.contiguous()
    product = torch.mm(w, x.mT).mT[:rows]
    return product if out is None else out.copy_(product)


def _zeros_like(weights: Tensor) -> Tensor:
    """Zeros for a gradient; on a CPU large ones come from NumPy, which asks the system for huge pages.

    Fresh memory costs its time page by page when first written: for the gradients of 64 experts and few
    tokens more than the products take. Huge pages are few, and unwritten where experts have no tokens.
    """
    if weights.device.type != "cpu" or weights.nbytes < 2**22:
        return torch.zeros_like(weights)
    spare = np.zeros(weights.nbytes + 64, dtype=np.uint8)
    first = -spare.ctypes.data % 64  # aligned as PyTorch aligns its own
    flat = torch.from_numpy(spare[first : first + weights.nbytes])
    return flat.view(weights.dtype).view(weights.shape)


def _rows_of(load: list[int]) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, each with its rows."""
    first = 0
    for e, count in enumerate(load):
        if count:
            yield e, slice(first, first + count)
        first += count


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


def grouped_forward(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, order: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows gathered, two grouped products, and the weighted sum for each token: (n, D), and (P, 2 I) between.

    order: (P,), the pairs, token * K + slot, sorted by expert; ends: (E,) int32, where each expert's end in
    it. Pairs behind the last end are dropped. Nothing is added up by chance or read by the host.
    """
    gate_up = _grouped_mm(x.index_select(0, order // weights.shape[1]), w_gate_up.mT, ends)
    out = _grouped_mm(prefill.swiglu(gate_up), w_down.mT, ends)
    return prefill.add_up(out, weights, order, ends[-1:], *weights.shape), gate_up


def grouped_backward(
    slope: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, order: Tensor,
    ends: Tensor, gate_up: Tensor, frozen: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of x, weights and, unless frozen, w_gate_up and w_down, by hand.

    The loss's slope is gathered once for both products; autograd would take more passes between them.
    """
    tokens, count = order // weights.shape[1], ends[-1:]
    # g FFN(u) = W_down (g h): the weight goes with h, and its own slope is that of g h, times h.
    slope = slope.index_select(0, tokens)
    hidden, gate_up_slope, weights_slope = prefill.weighted_swiglu_backward(
        _grouped_mm(slope, w_down, ends), gate_up, weights, order, count
    )
    x_slope = _grouped_mm(gate_up_slope, w_gate_up, ends)
    x_slope = prefill.add_up(x_slope, None, order, count, *weights.shape)
    if frozen:
        return x_slope, weights_slope
    w_gate_up_slope = _grouped_mm(gate_up_slope.mT, x.index_select(0, tokens), ends)
    return x_slope, weights_slope, w_gate_up_slope, _grouped_mm(slope.mT, hidden, ends)


class GroupedExperts(torch.autograd.Function):
    """`grouped_forward` with the gradient of `grouped_backward`."""

    @staticmethod
    def forward(ctx, *given):
        out, gate_up = grouped_forward(*given)
        ctx.save_for_backward(*given, gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        frozen = not any(ctx.needs_input_grad[1:3])
        x, weights, *stacks = grouped_backward(slope, *ctx.saved_tensors, frozen)
        return x, *(stacks or (None, None)), weights, None, None


# The same for torch.compile, which takes these two as they are and fuses what lies around them.
_SIX = "Tensor x, Tensor w_gate_up, Tensor w_down, Tensor weights, Tensor order, Tensor ends"
grouped_op = torch.library.custom_op(
    "dsv2::grouped_experts", grouped_forward, mutates_args=(), schema=f"({_SIX}) -> (Tensor, Tensor)"
)
grouped_backward_op = torch.library.custom_op(
    "dsv2::grouped_experts_backward", grouped_backward, mutates_args=(),
    schema=f"(Tensor slope, {_SIX}, Tensor gate_up) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@grouped_op.register_fake
def _(x, w_gate_up, w_down, weights, order, ends):
    return torch.empty_like(x), x.new_empty(order.shape[0], w_gate_up.shape[1])


@grouped_backward_op.register_fake
def _(slope, x, w_gate_up, w_down, weights, order, ends, gate_up):
    return tuple(map(torch.empty_like, (x, weights, w_gate_up, w_down)))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _slopes(ctx, slope, _):
    x, weights, w_gate_up, w_down = grouped_backward_op(slope.contiguous(), *ctx.saved_tensors)
    return x, w_gate_up, w_down, weights, None, None


grouped_op.register_autograd(_slopes, setup_context=_keep)


def grouped_mm_available(x: Tensor, width: int) -> bool:
    """Whether torch's grouped product takes these: bf16 on Hopper or newer, rows of 16 bytes."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0) and x.shape[-1] % 8 == 0 and width % 8 == 0


def run_experts(
    x: Float[Tensor, "n D"],
    expert_ids: Int[Tensor, "n K"],
    weights: Float[Tensor, "n K"],
    w_gate_up: Float[Tensor, "E twoI D"],
    w_down: Float[Tensor, "E D I"],
    kept: Bool[Tensor, "n K"] | None = None,
    count: int | None = None,
) -> Float[Tensor, "n D"]:
    """sum_k g_{t,k} FFN_{i(t,k)}(u_t): sort the pairs by expert, run, weigh, and add up per token.

    kept: which pairs count; None: all. The others add nothing, whatever their expert's number. count: how
    many are kept, where that is known: a GPU then need not be asked.
    """
    n_experts, k = w_down.shape[0], expert_ids.shape[1]
    experts = expert_ids.flatten().int()
    if kept is not None:
        experts = torch.where(kept.flatten(), experts, n_experts)  # dropped pairs sort behind all experts
    experts, order = experts.sort(stable=True)
    every = torch.arange(n_experts, dtype=torch.int32, device=x.device)
    ends = torch.searchsorted(experts, every, right=True).int()
    order = order[:count]
    grouped = len(x) > 0 and grouped_mm_available(x, w_down.shape[-1])
    if grouped and kernel_problem(x.device) is None:
        if torch.compiler.is_compiling():
            return grouped_op(x, w_gate_up, w_down, weights, order, ends)[0]
        return GroupedExperts.apply(x, w_gate_up, w_down, weights, order, ends)
    if kept is not None and count is None:
        order = order[: int(ends[-1])]
    # index_select, not x[tokens]: its gradient is added up in a tenth of the time on a CPU.
    rows = x.index_select(0, order // k)
    load = ends.diff(prepend=ends.new_zeros(1))
    out = (run_grouped if grouped else run_sorted)(rows, w_gate_up, w_down, load)
    out = out * weights.flatten().index_select(0, order)[:, None].to(out.dtype)
    return torch.zeros_like(x).index_add_(0, order // k, out)


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
        return run_experts(x, expert_ids, weights, self.w_gate_up, self.w_down, kept)
