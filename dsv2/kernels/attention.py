"""Decoding with MLA in one pass over the cache: `mla_decode`, its PyTorch reference, its Triton kernels.

One new token per sequence asks; all its heads read the same cached latents, which are key and value at once.
A program holds the queries of a block of heads and streams tiles of the cache past them, keeping a running
maximum, sum and mixture (online softmax), so that scores never reach memory. The cached tokens are shared
out evenly over the programs (schedule.py); a second kernel merges what a sequence's programs found.

Sources: DeepSeek-V2, arXiv 2405.04434, section 2.1; online softmax, arXiv 1805.02867; splitting the keys of
one query, Flash-Decoding (https://pytorch.org/blog/flash-decoding/).
"""

# B batch   S cached tokens   H heads   C kv_lora_rank (the latent)   R qk_rope_head_dim

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dsv2.kernels import descriptors, hopper
from dsv2.kernels.backend import VERSION, begin, jit, kernel_problem, overlap, tl, triton
from dsv2.kernels.schedule import LOG2_E, ceil_div, choose_parts, room_for, tiles_of_sequences

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS = 16  # a block of heads: as few as a product on tensor cores takes
TILES = (64, 32, 16)  # tokens


# ------------------------------------------------------------------------------------------- public


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(scale (q_latent c^T + q_rope k_rope^T)) c over each sequence's first `lengths[b]` tokens.

    q_latent: (B, H, C), the queries with W^UK absorbed; q_rope: (B, H, R). latent: (B, S, C) and k_rope:
    (B, S, R), the cache; or, with block_table (B, pages of a sequence) int32, (pages, page size, C) and
    (pages, page size, R), where token t of sequence b is token t % page size of page block_table[b, t // page
    size]. lengths: (B,) int32, on the same device; 0 gives zeros. Returns (B, H, C) in q_latent's type, in
    `out` if given. What the cache holds beyond a length never matters, not even NaN.

    float32, float16 or bfloat16; any strides whose last is 1. On CUDA from compute capability 8.0 on this is
    a Triton or Gluon kernel that reads nothing back to the host and may be captured in a CUDA graph;
    elsewhere it is `mla_decode_reference`. Raises ValueError for shapes, types or devices that do not fit.
    """
    _check(q_latent, q_rope, latent, k_rope, lengths, block_table, out)
    if out is None:
        out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    arguments = (q_latent, q_rope, latent, k_rope, lengths, scale)
    problem = kernel_problem(q_latent.device)
    if problem is None:
        return run_kernel(choose_kernel(*arguments[:4], block_table), *arguments, block_table, out)
    if q_latent.is_cuda:
        _say_once(f"mla_decode runs in plain PyTorch, in float16: {problem}")
        arguments = (*(x.half() if x.dtype == torch.bfloat16 else x for x in arguments[:4]), lengths, scale)
    return out.copy_(mla_decode_reference(*arguments, block_table=block_table))


def mla_decode_reference(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    block_table: Tensor | None = None,
) -> Tensor:
    """What `mla_decode` computes, in plain PyTorch, on any device and in any floating type."""
    if block_table is not None:
        latent, k_rope = gather_pages(latent, block_table), gather_pages(k_rope, block_table)
    filled = torch.arange(latent.shape[1], device=latent.device) < lengths[:, None]  # (B, S)
    latent, k_rope = (x.masked_fill(~filled[..., None], 0) for x in (latent, k_rope))  # 0 * NaN is NaN
    scores = torch.baddbmm(q_latent @ latent.mT, q_rope, k_rope.mT, beta=scale, alpha=scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    attention = scores.masked_fill(~filled[:, None], -torch.inf).softmax(dim=-1)
    attention = attention.masked_fill(~filled[:, None], 0)  # a sequence of length 0 is all -inf, hence NaN
    return attention.to(latent.dtype) @ latent


def gather_pages(paged: Tensor, block_table: Tensor) -> Tensor:
    """A paged cache in order: (pages, page size, X) and (B, pages of a sequence) -> (B, tokens, X)."""
    return paged[block_table.long().clamp(0, paged.shape[0] - 1)].flatten(1, 2)


# ------------------------------------------------------------------------------------- which kernel


@dataclass(frozen=True)
class TritonKernel:
    """The portable kernel with its blocks: `heads` a program, tiles of `tile` cached tokens.

    stages: num_stages, one more than the tiles in flight. least_tiles: a part of one sequence, at least.
    """

    heads: int
    tile: int
    warps: int
    stages: int
    least_tiles: int = 1

    def stages_of(self, paged: bool) -> int:
        """num_stages for the loop over tiles.

        Through a page table a tile takes two reads in a row; from Triton 3.5 on both count as stages.
        """
        return 2 * self.stages - 1 if paged and VERSION >= (3, 5) else self.stages

    def launch_split(
        self, q_latent, q_rope, latent, k_rope, lengths, scale, block_table, out, *partial, parts
    ):
        batch, heads, width = q_latent.shape
        rope = q_rope.shape[-1]
        paged = block_table is not None
        split_kernel[(ceil_div(heads, self.heads), parts)](
            q_latent, q_rope, latent, k_rope, lengths, block_table if paged else lengths, out, *partial,
            *q_latent.stride()[:2], *q_rope.stride()[:2], *latent.stride()[:2], *k_rope.stride()[:2],
            block_table.stride(0) if paged else 0, *out.stride()[:2],
            batch, heads, width, rope, latent.shape[1], scale * LOG2_E,
            SEQUENCES=room_for(batch), HEADS=self.heads, TILE=self.tile,
            WIDTH=_block(width), ROPE=_block(rope), PAGED=paged,
            STAGES=self.stages_of(paged),
            EVEN=_block(width) == width and _block(rope) == rope,
            num_warps=self.warps, **overlap(q_latent.device),
        )  # fmt: skip


def choose_kernel(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, block_table: Tensor | None
):
    """The fastest kernel for this device and shape; the portable one takes all of them."""
    if hopper.fits(q_latent, q_rope, latent, k_rope, block_table):
        return hopper.HopperKernel()
    if descriptors.fits(q_latent, q_rope, latent, k_rope, block_table):
        return descriptors.DescriptorKernel.for_heads(q_latent.shape[1])
    room = _shared_memory(q_latent.device)
    page = None if block_table is None else latent.shape[1]
    return choose_blocks(q_latent.shape[2], q_rope.shape[-1], q_latent.element_size(), room, page)


def choose_blocks(
    width: int, rope: int, itemsize: int, shared_memory: int, page: int | None = None
) -> TritonKernel:
    """The portable kernel's blocks from the shape and the bytes of shared memory that a program may have.

    16 heads are what a tensor core's product takes at least. Tiles as long as fit beside the queries, in two
    buffers: one is read while the next arrives. 64 tokens of 576 numbers in bf16 are 72 KB, so that an H100
    (227 KB) holds two of them; 32 fit where 99 KB is all. A page of a paged cache must hold whole tiles.
    """
    row = (_block(width) + _block(rope)) * itemsize
    for tile in TILES:
        if page is not None and page % tile:
            continue
        if (2 * tile + HEADS) * row + 4 * HEADS * tile <= shared_memory:  # the last: scores on their way
            return TritonKernel(HEADS, tile, warps=8 if tile == 64 else 4, stages=3)
    return TritonKernel(HEADS, TILES[-1], warps=4, stages=2)


def choose_combine_blocks(
    batch: int, heads: int, width: int, parts: int, multiprocessors: int
) -> dict[str, int]:
    """SLOTS partial results by HEADS by COLUMNS in a tile of the combine kernel, and `heads_each` program.

    All parts that a sequence is likely to have are read at once, in tiles of up to 8,192 numbers, by about
    eight programs for each multiprocessor: small ones, as most of their time is waiting.

    >>> choose_combine_blocks(batch=1, heads=128, width=512, parts=32, multiprocessors=132)
    {'SLOTS': 32, 'HEADS': 1, 'COLUMNS': 256, 'heads_each': 1}
    """
    slots = min(max(triton.next_power_of_2(ceil_div(parts, batch)), 2), 256)
    columns = min(8192 // slots, _block(width))
    together = max(4 // slots, 1)
    each = ceil_div(batch * heads * ceil_div(width, columns), 8 * multiprocessors)
    return {
        "SLOTS": slots,
        "HEADS": together,
        "COLUMNS": columns,
        "heads_each": ceil_div(each, together) * together,
    }


def _block(width: int) -> int:
    """Columns of a block that holds `width`: a power of two, and at least 16 for the tensor cores."""
    return max(triton.next_power_of_2(width), 16)


def run_kernel(
    kernel, q_latent, q_rope, latent, k_rope, lengths, scale, block_table=None, out=None, parts=None
) -> Tensor:
    """Split and combine: `kernel` reads the cache in `parts` parts, then partial results are merged."""
    batch, heads, width = q_latent.shape
    if out is None:
        out = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    if parts is None:
        tokens = latent.shape[1] if block_table is None else latent.shape[1] * block_table.shape[1]
        parts = choose_parts(
            batch, tokens // (kernel.tile * kernel.least_tiles), ceil_div(heads, kernel.heads),
            _multiprocessors(q_latent.device),
        )  # fmt: skip
    partial_out = q_latent.new_empty(parts + batch, heads, width, dtype=torch.float32)
    partial_lse = q_latent.new_empty(parts + batch, heads, dtype=torch.float32)
    kernel.launch_split(
        q_latent, q_rope, latent, k_rope, lengths, scale, block_table, out, partial_out, partial_lse,
        parts=parts,
    )  # fmt: skip
    blocks = choose_combine_blocks(batch, heads, width, parts, _multiprocessors(q_latent.device))
    grid = (batch, ceil_div(heads, blocks["heads_each"]), ceil_div(width, blocks["COLUMNS"]))
    combine_kernel[grid](
        partial_out, partial_lse, lengths, out, *out.stride()[:2], batch, heads, width, parts,
        SEQUENCES=room_for(batch), TILE=kernel.tile, **blocks, **overlap(q_latent.device),
    )  # fmt: skip
    return out


# -------------------------------------------------------------------------------------- the kernels


@jit
def split_kernel(
    q_latent, q_rope, latent, k_rope, lengths, block_table, out, partial_out, partial_lse,
    q_latent_b, q_latent_h, q_rope_b, q_rope_h, latent_b, latent_s, k_rope_b, k_rope_s, table_b, out_b, out_h,
    batch, heads, width, rope, page, scale_log2,
    SEQUENCES: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr,
    PAGED: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: its share of the tiles, for one block of heads (schedule.py says which)."""
    begin(OVERLAP)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    column, rotary, row = tl.arange(0, WIDTH), tl.arange(0, ROPE), tl.arange(0, TILE)
    is_head, is_column, is_rotary = head < heads, column < width, rotary < rope
    part = tl.program_id(1)
    sequences, tiles = tiles_of_sequences(lengths, batch, SEQUENCES, TILE)
    total = tl.sum(tiles, 0)
    per_part = tl.cdiv(total, tl.num_programs(1))
    here, stop = part * per_part, tl.minimum((part + 1) * per_part, total)

    while here < stop:  # one sequence after the other
        b = tl.sum((tl.cumsum(tiles, 0) <= here).to(tl.int32), 0)  # as many sequences end before this tile
        first = tl.sum(tl.where(sequences < b, tiles, 0), 0)
        length = tl.load(lengths + b)
        last = tl.minimum(stop, first + tl.cdiv(length, TILE))
        offsets = b.to(tl.int64) * q_latent_b + head[:, None] * q_latent_h + column
        q_c = tl.load(q_latent + offsets, mask=is_head[:, None] & is_column, other=0.0)
        offsets = b.to(tl.int64) * q_rope_b + head[:, None] * q_rope_h + rotary
        q_r = tl.load(q_rope + offsets, mask=is_head[:, None] & is_rotary, other=0.0)

        largest = tl.full((HEADS,), -float("inf"), tl.float32)
        total_weight = tl.zeros((HEADS,), tl.float32)
        mixture = tl.zeros((HEADS, WIDTH), tl.float32)
        for tile in tl.range(here - first, last - first, num_stages=STAGES):
            token = tile * TILE + row
            filled = token < length
            if PAGED:  # a page holds whole tiles
                block = tl.load(block_table + b.to(tl.int64) * table_b + tile * TILE // page).to(tl.int64)
                slot = (tile * TILE % page + row).to(tl.int64)
            else:
                block, slot = b.to(tl.int64), token.to(tl.int64)
            c_at = latent + (block * latent_b + slot * latent_s)[:, None] + column
            r_at = k_rope + (block * k_rope_b + slot * k_rope_s)[:, None] + rotary
            if EVEN:
                c = tl.load(c_at, mask=filled[:, None], other=0.0)
                r = tl.load(r_at, mask=filled[:, None], other=0.0)
            else:
                c = tl.load(c_at, mask=filled[:, None] & is_column, other=0.0)
                r = tl.load(r_at, mask=filled[:, None] & is_rotary, other=0.0)

            scores = tl.dot(q_c, c.T, input_precision="ieee")
            scores = tl.dot(q_r, r.T, scores, input_precision="ieee") * scale_log2
            scores = tl.where(filled, scores, -float("inf"))
            larger = tl.maximum(largest, tl.max(scores, 1))  # finite: a tile has at least one token
            shrink = tl.exp2(largest - larger)
            weights = tl.exp2(scores - larger[:, None])
            total_weight = total_weight * shrink + tl.sum(weights, 1)
            mixture = tl.dot(weights.to(c.dtype), c, mixture * shrink[:, None], input_precision="ieee")
            largest = larger

        mixture = mixture / total_weight[:, None]
        kept = is_head[:, None] & is_column
        if last - here == tl.cdiv(length, TILE):  # the whole sequence was this program's
            at = out + b.to(tl.int64) * out_b + head[:, None] * out_h + column
            tl.store(at, mixture.to(out.dtype.element_ty), mask=kept)
        else:
            slot = (part + b).to(tl.int64) * heads + head
            tl.store(partial_out + slot[:, None] * width + column, mixture, mask=kept)
            tl.store(partial_lse + slot, largest + tl.log2(total_weight), mask=is_head)
        here = last


@jit
def combine_kernel(
    partial_out, partial_lse, lengths, out, out_b, out_h, batch, heads, width, parts, heads_each,
    SEQUENCES: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr,
    COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """sum_i 2^(lse_i - m) out_i / sum_i 2^(lse_i - m), m = max lse_i, over the parts i of one sequence."""
    begin(OVERLAP)
    b = tl.program_id(0)
    first_head = tl.program_id(1) * heads_each
    last_head = tl.minimum(first_head + heads_each, heads)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    sequences, tiles = tiles_of_sequences(lengths, batch, SEQUENCES, TILE)
    per_part = tl.maximum(tl.cdiv(tl.sum(tiles, 0), parts), 1)
    first = tl.sum(tl.where(sequences < b, tiles, 0), 0)
    count = tl.sum(tl.where(sequences == b, tiles, 0), 0)
    first_part = first // per_part
    parts_here = tl.where(count > 0, (first + count - 1) // per_part - first_part + 1, 0)
    if parts_here != 1:  # otherwise the only program has written the result
        for block in range(first_head, last_head, HEADS):
            head = block + tl.arange(0, HEADS)
            is_head = head < last_head
            largest = tl.full((HEADS,), -float("inf"), tl.float32)
            total_weight = tl.zeros((HEADS,), tl.float32)
            mixture = tl.zeros((HEADS, COLUMNS), tl.float32)
            for start in range(0, parts_here, SLOTS):
                i = start + tl.arange(0, SLOTS)
                slot = (first_part + b + i).to(tl.int64)[:, None] * heads + head
                there = (i < parts_here)[:, None] & is_head
                lse = tl.load(partial_lse + slot, mask=there, other=-float("inf"))
                at = partial_out + slot[:, :, None] * width + column
                found = tl.load(at, mask=there[:, :, None] & (column < width), other=0.0)
                larger = tl.maximum(largest, tl.max(lse, 0))
                base = tl.where(is_head, larger, 0.0)  # finite, also where there is no head
                shrink = tl.exp2(largest - base)
                weights = tl.exp2(lse - base)
                mixture = mixture * shrink[:, None] + tl.sum(weights[:, :, None] * found, 0)
                total_weight = total_weight * shrink + tl.sum(weights, 0)
                largest = larger
            mixture /= tl.where(total_weight > 0, total_weight, 1.0)[:, None]  # zeros for a length of 0
            at = out + b.to(tl.int64) * out_b + head[:, None] * out_h + column
            tl.store(at, mixture.to(out.dtype.element_ty), mask=is_head[:, None] & (column < width))


# ------------------------------------------------------------------------------------------- checks


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    return triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]


@cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)


def _check(q_latent, q_rope, latent, k_rope, lengths, block_table, out) -> None:
    """Raise ValueError, naming the argument, unless everything fits together."""
    if q_latent.dim() != 3 or q_latent.dtype not in DTYPES:
        raise ValueError(
            "q_latent must be float32, float16 or bfloat16 of shape (batch, heads, latent); "
            f"got {q_latent.dtype} of shape {tuple(q_latent.shape)}"
        )
    batch, heads, width = q_latent.shape
    slots, page = latent.shape[:2] if latent.dim() == 3 else (batch, 1)
    rope = q_rope.shape[-1]
    cached = "(batch, tokens, {})" if block_table is None else "(pages, page size, {})"
    rows = batch if block_table is None else slots
    expected = {
        "q_rope": (q_rope, (batch, heads, rope), "(batch, heads, rope)"),
        "latent": (latent, (rows, page, width), cached.format("latent")),
        "k_rope": (k_rope, (rows, page, rope), cached.format("rope")),
    }
    if out is not None:
        expected["out"] = (out, (batch, heads, width), "(batch, heads, latent)")
    for name, (tensor, shape, meaning) in expected.items():
        if tensor.shape != shape or tensor.dtype != q_latent.dtype:
            raise ValueError(
                f"{name} must be {meaning} = {shape} in q_latent's type, {q_latent.dtype}; "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    expected = {"q_latent": q_latent, **{name: tensor for name, (tensor, _, _) in expected.items()}}
    for name, tensor in expected.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name}'s last dimension must be contiguous; its strides are {tensor.stride()} "
                "(call .contiguous() on it)"
            )
    if block_table is not None and page % TILES[-1]:
        raise ValueError(
            f"the page size must be a multiple of {TILES[-1]} tokens; latent has pages of {page}"
        )
    indices = {"lengths": (lengths, 1)} | ({} if block_table is None else {"block_table": (block_table, 2)})
    for name, (tensor, dims) in indices.items():
        if tensor.dtype != torch.int32 or tensor.dim() != dims or tensor.shape[0] != batch:
            raise ValueError(
                f"{name} must be int32 with {dims} dimension{'s' * (dims > 1)}, the first of size "
                f"batch={batch}; got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        expected[name] = tensor
    for name, tensor in expected.items():
        if tensor.device != q_latent.device:
            raise ValueError(
                f"{name} is on {tensor.device}, q_latent on {q_latent.device}; put all on one device"
            )
    if not lengths.is_contiguous() or (block_table is not None and block_table.stride(-1) != 1):
        raise ValueError("lengths, and block_table's rows, must be contiguous (call .contiguous())")
