"""What lies between the products when many tokens go through at once: each a single pass over memory.

The products themselves are PyTorch's. Written in PyTorch, what lies between them takes as long as they do:
it reads and writes everything several times, and adds up the experts' outputs one row at a time.
"""

# n tokens   D hidden_size   I width of a feed-forward network   K experts per token

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.kernels.backend import jit, kernel_problem, tl, triton
from dsv2.kernels.schedule import ceil_div


def fits(x: Tensor) -> bool:
    """Whether these kernels may take the place of PyTorch's: where they run, and no gradient is kept."""
    if not x.is_cuda or torch.is_grad_enabled() or x.dtype == torch.float64:
        return False
    return x.stride(-1) == 1 and kernel_problem(x.device) is None


def warps_for(width: int) -> int:
    """So many that each thread holds eight values of a row, 16 bytes in bf16: the widest load there is."""
    return min(8, max(1, triton.next_power_of_2(width) // 256))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where the last dimension of `gate_up` holds the gate's half, then up's."""
    rows = gate_up.flatten(0, -2)
    width = rows.shape[1] // 2
    out = rows.new_empty(rows.shape[0], width)
    if rows.shape[0]:
        columns = min(1024, triton.next_power_of_2(width))
        grid = (ceil_div(rows.shape[0], 1024 // columns), ceil_div(width, columns))
        swiglu_kernel[grid](
            rows, out, rows.stride(0), *out.shape, ROWS=1024 // columns, COLUMNS=columns, num_warps=4
        )
    return out.view(*gate_up.shape[:-1], width)


@jit
def swiglu_kernel(gate_up, out, gate_up_n, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Some rows, or a piece of a wide one."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows) & (column < width)
    gate = tl.load(gate_up + row * gate_up_n + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_n + width + column, mask=there, other=0.0)
    # Rounded after the gate's part, as PyTorch does between its two operations.
    gate = (gate / (1.0 + tl.exp(-gate))).to(up.dtype).to(tl.float32)
    tl.store(out + row * width + column, (gate * up.to(tl.float32)).to(out.dtype.element_ty), mask=there)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as `dsv2.layers.rms_norm`."""
    rows = x.flatten(0, -2)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if rows.shape[0]:
        width = rows.shape[1]
        rms_norm_kernel[(rows.shape[0],)](
            rows, weight, out, rows.stride(0), width, eps, WIDTH=triton.next_power_of_2(width), num_warps=4
        )
    return out.view(x.shape)


@jit
def rms_norm_kernel(x, weight, out, x_n, width, eps, WIDTH: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    there = column < width
    values = tl.load(x + row * x_n + column, mask=there, other=0.0)
    gain = tl.load(weight + column, mask=there, other=0.0)
    tl.store(out + row * width + column, normalise(values, gain, width, eps), mask=there)


@jit
def normalise(x, gain, width, eps):
    """RMSNorm of one row; the mean in float32, each factor rounded as `dsv2.layers.rms_norm` does."""
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    return ((wide * scale).to(x.dtype).to(tl.float32) * gain.to(tl.float32)).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`dsv2.rope.rotate_pairs`: x (..., tokens, heads, channels), cos and sin (..., tokens, pairs)."""
    rows = x.flatten(0, -3)
    cos, sin = (
        angles.expand(*x.shape[:-2], -1).reshape(rows.shape[0], -1).contiguous() for angles in (cos, sin)
    )
    tokens, heads, channels = rows.shape
    out = rows.new_empty(rows.shape)
    if tokens:
        rotate_kernel[(tokens,)](
            rows, cos, sin, out, *rows.stride()[:2], heads, channels // 2,
            HEADS=triton.next_power_of_2(heads), PAIRS=triton.next_power_of_2(channels // 2),
        )  # fmt: skip
    return out.view(x.shape)


@jit
def rotate_kernel(x, cos, sin, out, x_n, x_h, heads, pairs, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """All heads of one token: (x_0 cos - x_1 sin, x_0 sin + x_1 cos) for each pair of channels."""
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)
    there = (head < heads) & (pair < pairs)
    c = tl.load(cos + token * pairs + pair, mask=pair < pairs, other=0.0)
    s = tl.load(sin + token * pairs + pair, mask=pair < pairs, other=0.0)
    from_ = x + token * x_n + head * x_h + 2 * pair
    to = out + (token * heads + head) * 2 * pairs + 2 * pair
    x0 = tl.load(from_, mask=there, other=0.0).to(tl.float32)
    x1 = tl.load(from_ + 1, mask=there, other=0.0).to(tl.float32)
    tl.store(to, (x0 * c - x1 * s).to(out.dtype.element_ty), mask=there)
    tl.store(to + 1, (x0 * s + x1 * c).to(out.dtype.element_ty), mask=there)


def add_up(out: Tensor, weights: Tensor | None, order: Tensor, count: Tensor, tokens: int, k: int) -> Tensor:
    """sum_k weights[t, k] * (the row of `out` that belongs to pair (t, k)): (P, D) -> (n, D), n = `tokens`.

    weights: (n, K); None: all are 1. order: (P,), which pair t K + k each row of `out` belongs to. count: a
    tensor with how many rows there are; those behind it, of dropped pairs, add nothing, and may be anything.
    Pairs that are not in `order` add nothing either. One program reads a token's K rows and adds them in
    float32, always in the same order.
    """
    place = torch.full((tokens * k,), torch.iinfo(torch.int32).max, dtype=torch.int32, device=out.device)
    place[order] = torch.arange(len(order), device=order.device, dtype=torch.int32)
    total = out.new_empty(tokens, out.shape[1])
    if tokens:
        add_up_kernel[(tokens,)](
            out, out if weights is None else weights, place, count, total, out.shape[1],
            WEIGHTED=weights is not None, K=k, WIDTH=triton.next_power_of_2(out.shape[1]),
            num_warps=warps_for(out.shape[1]),
        )  # fmt: skip
    return total


@jit
def add_up_kernel(
    out, weights, place, count, total, width, WEIGHTED: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    rows = tl.load(count)
    sum_ = tl.zeros((WIDTH,), tl.float32)
    for i in tl.static_range(K):
        row = tl.load(place + token * K + i).to(tl.int64)
        there = column < tl.where(row < rows, width, 0)
        value = tl.load(out + row * width + column, mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * K + i).to(tl.float32)
        sum_ += value
    tl.store(total + token * width + column, sum_.to(total.dtype.element_ty), mask=column < width)


def weighted_swiglu_backward(
    slope: Tensor, gate_up: Tensor, weights: Tensor, order: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of g * silu(gate) * up, where row r belongs to pair order[r], whose weight is g.

    slope: (P, I), that of the product; gate_up: (P, 2 I); weights: (n, K); order and count as `add_up` has
    them. Returns g * silu(gate) * up itself, (P, I), which W_down's gradient needs, and the gradients of
    `gate_up` and `weights`. Rows behind `count` are left as they are, and their weights get 0.
    """
    pairs, width = slope.shape
    hidden, gate_up_slope = torch.empty_like(slope), torch.empty_like(gate_up)
    weights_slope = torch.zeros_like(weights)
    if pairs:
        columns = triton.next_power_of_2(width)
        rows = max(1, 2048 // columns)
        weighted_swiglu_backward_kernel[(ceil_div(pairs, rows),)](
            slope, gate_up, weights, order, count, hidden, gate_up_slope, weights_slope, width,
            ROWS=rows, WIDTH=columns, num_warps=8,
        )  # fmt: skip
    return hidden, gate_up_slope, weights_slope


@jit
def weighted_swiglu_backward_kernel(
    slope, gate_up, weights, order, count, hidden, gate_up_slope, weights_slope, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some rows. With s = silu(gate): s' = sigmoid (1 + gate (1 - sigmoid))."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    counted = row < tl.load(count)
    column = tl.arange(0, WIDTH)
    there = counted[:, None] & (column < width)
    at, gate_at = row[:, None] * width + column, row[:, None] * 2 * width + column
    pair = tl.load(order + row, mask=counted, other=0)
    weight = tl.load(weights + pair, mask=counted, other=0.0).to(tl.float32)[:, None]
    gate = tl.load(gate_up + gate_at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + gate_at + width, mask=there, other=0.0).to(tl.float32)
    given = tl.load(slope + at, mask=there, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    tl.store(weights_slope + pair, tl.sum(given * silu * up, 1), mask=counted)
    tl.store(hidden + at, (weight * silu * up).to(hidden.dtype.element_ty), mask=there)
    given *= weight
    gate_slope = (given * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(slope.dtype.element_ty)
    tl.store(gate_up_slope + gate_at, gate_slope, mask=there)
    tl.store(gate_up_slope + gate_at + width, (given * silu).to(slope.dtype.element_ty), mask=there)
