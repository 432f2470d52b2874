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

    heads_linear(mixed, w_uv) applies W^UV; no input, weight or output is transposed in memory.
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
    blocks = choose_product_blocks(batch, channels, heads * width, x.element_size())
    grid = (ceil_div(width, blocks["ROWS"]), heads, ceil_div(batch, blocks["TOKENS"]))
    linear_kernel[grid](
        x, weight, x if residual is None else residual, out,
        *x.stride()[:2], *weight.stride(), 0 if residual is None else residual.stride(0), *out.stride()[:2],
        batch, width, channels, RESIDUAL=residual is not None,
        EVEN=width % blocks["ROWS"] == 0 and channels % blocks["COLUMNS"] == 0, **blocks, **overlap(x.device),
    )  # fmt: skip
    return out


def choose_product_blocks(batch: int, channels: int, outputs: int, itemsize: int) -> dict[str, int]:
    """Tokens, and rows and columns of the weights' tile, in a program of the product.

    A program takes all tokens, so that each weight is read once. Few rows, so that there are programs enough
    for every multiprocessor; each row in pieces of 512 bytes or more. A single token needs no tensor cores:
    a program has 16 KB of weights, which it asks for at once, and adds up what its threads find.
    """
    if batch == 1:
        columns = min(triton.next_power_of_2(channels), 4096 // itemsize)
        rows = min(16384 // itemsize // columns, 32) * (1 if outputs <= 8192 else 2)
        return {"TOKENS": 1, "ROWS": rows, "COLUMNS": columns, "STAGES": 1, "num_warps": 4}
    tokens = 16 if batch <= 16 else 32 if batch <= 32 else 64
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
    multiply(
        x, weight, residual, out, tl.program_id(1),
        x_b, x_h, weight_h, weight_y, weight_x, residual_b, out_b, out_h, batch, width, channels,
        TOKENS, ROWS, COLUMNS, EVEN, RESIDUAL, STAGES,
    )  # fmt: skip


@jit
def multiply(
    x, weight, residual, out, head,
    x_b, x_h, weight_h, weight_y, weight_x, residual_b, out_b, out_h, batch, width, channels,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """This program's outputs of `head`, as `linear_kernel` says."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
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
        if TOKENS == 1:
            total += tl.sum(w.to(tl.float32) * a.to(tl.float32), 1)[None, :]
        else:
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


# ---------------------------------------------------------------- the query absorbed, the latent's way in


def absorb_append(
    q: Tensor,
    w_uk: Tensor,
    compressed: Tensor,
    norm_weight: Tensor,
    eps: float,
    angles: Tensor,
    length: float,
    latent: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    active: Tensor,
) -> tuple[Tensor, Tensor]:
    """A token's queries as attention over latents wants them; and the token itself into the cache.

    q: (B, H, N + R), of which the first N channels are multiplied by W^UK (H, N, C), the last R rotated:
    returns (B, H, C) and (B, H, R). compressed: (B, C + R), W^DKV h and W^KR h: the latent is normalised,
    the key rotated. angles: (B, R / 2) float32, position times frequency, and length: what cosine and sine
    are multiplied by (YaRN). latent: (B, S, C) and k_rope: (B, S, R), the cache of one layer, written at slot
    lengths[b]; nothing is written where `active` (B,) int32 is 0.
    """
    arguments = (q, w_uk, compressed, norm_weight, eps, angles, length, latent, k_rope, lengths, active)
    if not uses_kernels(q):
        return absorb_append_reference(*arguments)
    batch, heads, _ = q.shape
    _, nope, width = w_uk.shape
    rope = k_rope.shape[-1]
    q_latent, q_rope = q.new_empty(batch, heads, width), q.new_empty(batch, heads, rope)
    blocks = choose_absorb_blocks(batch, q.element_size())
    rows = ceil_div(width, blocks["ROWS"])
    absorb_append_kernel[(rows, heads + ceil_div(batch, rows), ceil_div(batch, blocks["TOKENS"]))](
        q, w_uk, compressed, norm_weight, angles, latent, k_rope, lengths, active, q_latent, q_rope,
        *q.stride()[:2], *w_uk.stride(), compressed.stride(0), *latent.stride()[:2], *k_rope.stride()[:2],
        batch, heads, nope, width, rope // 2, eps, length,
        HEADS=triton.next_power_of_2(heads), WIDTH=triton.next_power_of_2(width),
        PAIRS=triton.next_power_of_2(rope // 2),
        EVEN=width % blocks["ROWS"] == 0 and nope % blocks["COLUMNS"] == 0, **blocks, **overlap(q.device),
    )  # fmt: skip
    return q_latent, q_rope


def choose_absorb_blocks(batch: int, itemsize: int) -> dict[str, int]:
    """Tokens, and rows and columns of the weights' tile. Neighbours in memory are latent channels, rows here:
    128 bytes of them, for 64 of a head's channels at once."""
    tokens = 16 if batch <= 16 else 32 if batch <= 32 else 64
    return {"TOKENS": tokens, "ROWS": 128 // itemsize, "COLUMNS": 64, "STAGES": 3, "num_warps": 4}


def absorb_append_reference(
    q, w_uk, compressed, norm_weight, eps, angles, length, latent, k_rope, lengths, active
) -> tuple[Tensor, Tensor]:
    """What `absorb_append` computes, in plain PyTorch."""
    cos, sin = angles.cos() * length, angles.sin() * length
    q_nope, q_rope = q.split([w_uk.shape[1], k_rope.shape[-1]], dim=-1)
    new, key = compressed.split([latent.shape[-1], k_rope.shape[-1]], dim=-1)
    rows = torch.arange(len(lengths), device=lengths.device)
    slots = lengths.long().clamp(max=latent.shape[1] - 1)
    kept = active.bool()[:, None]
    new, key = rms_norm(new, norm_weight, eps), rotate_pairs(key[:, None], cos, sin)[:, 0]
    latent[rows, slots] = torch.where(kept, new, latent[rows, slots])
    k_rope[rows, slots] = torch.where(kept, key, k_rope[rows, slots])
    return heads_linear_reference(q_nope, w_uk.mT), rotate_pairs(q_rope, cos, sin)


@jit
def absorb_append_kernel(
    q, w_uk, compressed, norm_weight, angles, latent, k_rope, lengths, active, q_latent, q_rope,
    q_b, q_h, w_uk_h, w_uk_n, w_uk_c, compressed_b, latent_b, latent_s, k_rope_b, k_rope_s,
    batch, heads, nope, width, pairs, eps, length,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """ROWS channels of a head's absorbed queries; behind the last head, a token's rotations and entry."""
    begin(OVERLAP)
    if tl.program_id(1) < heads:
        multiply(
            q, w_uk, q, q_latent, tl.program_id(1),
            q_b, q_h, w_uk_h, w_uk_c, w_uk_n, 0, heads * width, width, batch, width, nope,
            TOKENS, ROWS, COLUMNS, EVEN, False, STAGES,
        )  # fmt: skip
    else:
        b = (tl.program_id(1) - heads) * tl.num_programs(0) + tl.program_id(0)
        if (b < batch) & (tl.program_id(2) == 0):
            # All loads first: each takes as long as everything else here.
            pair, column, head = tl.arange(0, PAIRS), tl.arange(0, WIDTH), tl.arange(0, HEADS)[:, None]
            is_pair, is_column, is_query = pair < pairs, column < width, (head < heads) & (pair < pairs)
            new = compressed + b * compressed_b
            query = q + b * q_b + head * q_h + nope
            angle = tl.load(angles + b * pairs + pair, mask=is_pair, other=0.0)
            key_0, key_1 = load_pairs(new + width, pair, is_pair)
            query_0, query_1 = load_pairs(query, pair, is_query)
            x = tl.load(new + column, mask=is_column, other=0.0)
            gain = tl.load(norm_weight + column, mask=is_column, other=0.0)
            slot = tl.load(lengths + b).to(tl.int64)
            kept = tl.load(active + b)  # 0 or 1
            cos, sin = tl.cos(angle) * length, tl.sin(angle) * length
            turn(query_0, query_1, q_rope + (b * heads + head) * 2 * pairs, pair, is_query, cos, sin)
            key = k_rope + b.to(tl.int64) * k_rope_b + slot * k_rope_s
            turn(key_0, key_1, key, pair, pair < pairs * kept, cos, sin)
            at = latent + b.to(tl.int64) * latent_b + slot * latent_s + column
            tl.store(at, normalise(x, gain, width, eps), mask=column < width * kept)


@jit
def load_pairs(from_, pair, there):
    """Pairs of neighbouring channels, in float32."""
    x0 = tl.load(from_ + 2 * pair, mask=there, other=0.0)
    x1 = tl.load(from_ + 2 * pair + 1, mask=there, other=0.0)
    return x0.to(tl.float32), x1.to(tl.float32)


@jit
def turn(x0, x1, to, pair, there, cos, sin):
    """(x_0 cos - x_1 sin, x_0 sin + x_1 cos) for each pair."""
    tl.store(to + 2 * pair, (x0 * cos - x1 * sin).to(to.dtype.element_ty), mask=there)
    tl.store(to + 2 * pair + 1, (x0 * sin + x1 * cos).to(to.dtype.element_ty), mask=there)
