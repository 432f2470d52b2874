"""What a decode step does besides attention and experts: small products, norms, rotary embedding, cache.

At a few tokens a step the weights' bytes decide the time, and every launch adds a microsecond or two. So
weights are read once, at memory speed, and what lies between two products is fused: a norm with the sum
before it, the rotary embedding with the norm of the latent and with writing both to the cache.

Each kernel has its plain-PyTorch reference beside it, which runs wherever the kernels do not.
"""

# B batch   H heads   D hidden_size   C kv_lora_rank (the latent)   R qk_rope_head_dim   N qk_nope_head_dim
# X, Y input and output channels of a product   P summands

from __future__ import annotations

import torch
from torch import Tensor

from dsv2.kernels.backend import begin, jit, kernel_problem, overlap, tl, triton
from dsv2.kernels.prefill import normalise
from dsv2.kernels.schedule import ceil_div
from dsv2.layers import rms_norm
from dsv2.rope import rotate_pairs

FEW_TOKENS = 64  # up to here a product takes as long as reading its weights


def uses_kernels(x: Tensor) -> bool:
    """Whether the functions here run their kernels for tensors like x, and not the references."""
    return kernel_problem(x.device) is None


# ------------------------------------------------------------------------------------------ products


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x W^T, plus `residual` (B, Y): x (B, X), weight (Y, X) -> (B, Y)."""
    if x.shape[0] > FEW_TOKENS or not uses_kernels(x):
        return linear_reference(x, weight, residual)
    return launch_linear(x[:, None], weight[None], residual)[:, 0]


def linear_reference(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """What `linear` computes, in plain PyTorch."""
    return x @ weight.mT if residual is None else torch.addmm(residual, x, weight.mT)


def heads_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Every head's own product: x (B, H, X), weight (H, Y, X) -> (B, H, Y), any strides.

    heads_linear(q_nope, w_uk.mT) absorbs W^UK into the query, heads_linear(o_latent, w_uv) applies W^UV; no
    input, weight or output is transposed in memory.
    """
    if x.shape[0] > FEW_TOKENS or not uses_kernels(x):
        return heads_linear_reference(x, weight)
    return launch_linear(x, weight)


def heads_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """What `heads_linear` computes, in plain PyTorch."""
    return torch.bmm(x.transpose(0, 1), weight.mT).transpose(0, 1)


def launch_linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """Run the kernel: x (B, H, X), weight (H, Y, X), residual (B, Y) for one head -> (B, H, Y)."""
    batch, heads, channels = x.shape
    width = weight.shape[1]
    out = x.new_empty(batch, heads, width)
    blocks = choose_product_blocks(batch, heads * width, x.element_size(), by_column=weight.stride(1) == 1)
    grid = (ceil_div(width, blocks["ROWS"]), heads, ceil_div(batch, blocks["TOKENS"]))
    linear_kernel[grid](
        x, weight, x if residual is None else residual, out,
        *x.stride()[:2], *weight.stride(), 0 if residual is None else residual.stride(0), *out.stride()[:2],
        batch, width, channels, RESIDUAL=residual is not None,
        EVEN=width % blocks["ROWS"] == 0 and channels % blocks["COLUMNS"] == 0, **blocks, **overlap(x.device),
    )  # fmt: skip
    return out


def choose_product_blocks(
    batch: int, outputs: int, itemsize: int, by_column: bool = False
) -> dict[str, int]:
    """Tokens, and rows and columns of the weights' tile, in a program of the product.

    A program takes all tokens, so that each weight is read once. Few rows, so that there are programs enough
    for every multiprocessor; each row in pieces of 512 bytes. by_column: neighbours in memory are of the same
    column; then a piece is 128 bytes of each column.
    """
    tokens = 16 if batch <= 16 else 32 if batch <= 32 else 64
    if by_column:
        return {"TOKENS": tokens, "ROWS": 128 // itemsize, "COLUMNS": 64, "STAGES": 3, "num_warps": 4}
    rows = 16 if outputs <= 8192 else 32
    columns = (512 if tokens == 16 else 256) // itemsize
    return {"TOKENS": tokens, "ROWS": rows, "COLUMNS": columns, "STAGES": 4, "num_warps": 4}


@jit
def linear_kernel(
    x, weight, residual, out,
    x_b, x_h, weight_h, weight_y, weight_x, residual_b, out_b, out_h, batch, width, channels,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one head for TOKENS tokens."""
    begin(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, COLUMNS)
    is_token, is_row = token[:, None] < batch, row[:, None] < width
    x_at = x + token[:, None] * x_b + head * x_h + column
    weight_at = (
        weight + head.to(tl.int64) * weight_h + row[:, None].to(tl.int64) * weight_y + column * weight_x
    )
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in tl.range(0, channels, COLUMNS, num_stages=STAGES):
        if EVEN:
            a = tl.load(x_at + start, mask=is_token, other=0.0)
            w = tl.load(weight_at + start * weight_x)
        else:
            is_column = start + column < channels
            a = tl.load(x_at + start, mask=is_token & is_column, other=0.0)
            w = tl.load(weight_at + start * weight_x, mask=is_row & is_column, other=0.0)
        total = tl.dot(a, w.T, total, input_precision="ieee")
    kept = is_token & (row < width)
    if RESIDUAL:
        total += tl.load(residual + token[:, None] * residual_b + row, mask=kept, other=0.0).to(tl.float32)
    at = out + token[:, None] * out_b + head * out_h + row
    tl.store(at, total.to(out.dtype.element_ty), mask=kept)


# --------------------------------------------------------------------------------------------- norms


def add_norm(x: Tensor, summands: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + sum_p summands[:, p], and that sum's RMSNorm: x (B, D), summands (B, P, D) -> two (B, D)."""
    if not uses_kernels(x):
        return add_norm_reference(x, summands, weight, eps)
    added, normed = torch.empty_like(x), torch.empty_like(x)
    count = 0 if summands is None else summands.shape[1]
    add_norm_kernel[(x.shape[0],)](
        x, x if summands is None else summands, weight, added, normed,
        x.stride(0), *((0, 0) if summands is None else summands.stride()[:2]), x.shape[1], eps,
        COUNT=count, WIDTH=triton.next_power_of_2(x.shape[1]), num_warps=8, **overlap(x.device),
    )  # fmt: skip
    return added, normed


def add_norm_reference(
    x: Tensor, summands: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What `add_norm` computes, in plain PyTorch."""
    if summands is not None:
        x = (x.float() + summands.float().sum(dim=1)).to(x.dtype)
    return x, rms_norm(x, weight, eps)


@jit
def add_norm_kernel(
    x, summands, weight, added, normed, x_b, summands_b, summands_p, width, eps,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One token."""
    begin(OVERLAP)
    b = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    is_column = column < width
    total = tl.load(x + b * x_b + column, mask=is_column, other=0.0).to(tl.float32)
    for p in tl.static_range(COUNT):
        total += tl.load(summands + b * summands_b + p * summands_p + column, mask=is_column, other=0.0)
    total = total.to(added.dtype.element_ty)
    tl.store(added + b * width + column, total, mask=is_column)
    gain = tl.load(weight + column, mask=is_column, other=0.0)
    tl.store(normed + b * width + column, normalise(total, gain, width, eps), mask=is_column)


# --------------------------------------------------------------------------------- the latent's way in


def append_latent(
    compressed: Tensor,
    q_rope: Tensor,
    norm_weight: Tensor,
    eps: float,
    angles: Tensor,
    length: float,
    latent: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    active: Tensor,
) -> Tensor:
    """Write each active sequence's new token to the cache; returns the rotated queries (B, H, R).

    compressed: (B, C + R), what W^DKV and W^KR give: the latent is normalised, the key rotated. q_rope: (B,
    H, R), not yet rotated. angles: (B, R / 2) float32, position times frequency, and length: what cosine and
    sine are multiplied by (YaRN). latent: (B, S, C) and k_rope: (B, S, R), the cache of one layer, written at
    slot lengths[b]; nothing is written where `active` (B,) int32 is 0.
    """
    if not uses_kernels(compressed):
        return append_latent_reference(
            compressed, q_rope, norm_weight, eps, angles, length, latent, k_rope, lengths, active
        )
    batch, heads, rope = q_rope.shape
    width = latent.shape[-1]
    rotated = q_rope.new_empty(batch, heads, rope)
    append_kernel[(batch, heads + 1)](
        compressed, q_rope, norm_weight, angles, latent, k_rope, lengths, active, rotated,
        compressed.stride(0), *q_rope.stride()[:2], *latent.stride()[:2], *k_rope.stride()[:2],
        heads, width, rope // 2, eps, length,
        WIDTH=triton.next_power_of_2(width), PAIRS=triton.next_power_of_2(rope // 2),
        **overlap(q_rope.device),
    )  # fmt: skip
    return rotated


def append_latent_reference(
    compressed, q_rope, norm_weight, eps, angles, length, latent, k_rope, lengths, active
) -> Tensor:
    """What `append_latent` computes, in plain PyTorch."""
    cos, sin = angles.cos() * length, angles.sin() * length
    new, key = compressed.split([latent.shape[-1], k_rope.shape[-1]], dim=-1)
    rows = torch.arange(len(lengths), device=lengths.device)
    slots = lengths.long().clamp(max=latent.shape[1] - 1)
    kept = active.bool()[:, None]
    new, key = rms_norm(new, norm_weight, eps), rotate_pairs(key[:, None], cos, sin)[:, 0]
    latent[rows, slots] = torch.where(kept, new, latent[rows, slots])
    k_rope[rows, slots] = torch.where(kept, key, k_rope[rows, slots])
    return rotate_pairs(q_rope, cos, sin)


@jit
def append_kernel(
    compressed, q_rope, norm_weight, angles, latent, k_rope, lengths, active, rotated,
    compressed_b, q_b, q_h, latent_b, latent_s, k_rope_b, k_rope_s, heads, width, pairs, eps, length,
    WIDTH: tl.constexpr, PAIRS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head's rotary query; or, as the last program of a sequence, the token's latent and rotary key."""
    begin(OVERLAP)
    b, head = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    is_pair = pair < pairs
    angle = tl.load(angles + b * pairs + pair, mask=is_pair, other=0.0)
    cos, sin = tl.cos(angle) * length, tl.sin(angle) * length
    if head < heads:
        turn(q_rope + b * q_b + head * q_h, rotated + (b * heads + head) * 2 * pairs, pair, is_pair, cos, sin)
    elif tl.load(active + b) != 0:
        slot = tl.load(lengths + b).to(tl.int64)
        from_ = compressed + b * compressed_b
        column = tl.arange(0, WIDTH)
        x = tl.load(from_ + column, mask=column < width, other=0.0)
        gain = tl.load(norm_weight + column, mask=column < width, other=0.0)
        to = latent + b.to(tl.int64) * latent_b + slot * latent_s + column
        tl.store(to, normalise(x, gain, width, eps), mask=column < width)
        turn(from_ + width, k_rope + b.to(tl.int64) * k_rope_b + slot * k_rope_s, pair, is_pair, cos, sin)


@jit
def turn(from_, to, pair, is_pair, cos, sin):
    """(x_0 cos - x_1 sin, x_0 sin + x_1 cos) for each pair of neighbouring channels."""
    x0 = tl.load(from_ + 2 * pair, mask=is_pair, other=0.0).to(tl.float32)
    x1 = tl.load(from_ + 2 * pair + 1, mask=is_pair, other=0.0).to(tl.float32)
    tl.store(to + 2 * pair, (x0 * cos - x1 * sin).to(to.dtype.element_ty), mask=is_pair)
    tl.store(to + 2 * pair + 1, (x0 * sin + x1 * cos).to(to.dtype.element_ty), mask=is_pair)
