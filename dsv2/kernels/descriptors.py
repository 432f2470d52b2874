"""The split kernel for V2's widths on Hopper in plain Triton: tiles arrive through tensor descriptors.

The tensor memory accelerator fetches a whole tile for one instruction, and needs no registers for addresses.
Few heads gain a little time by it. With many heads, programs of 16 would read the cache over and over and
give the tensor cores products that are too small: here a program holds 64. Their mixture of latents, 64 x 512
in float32, takes half of the registers of eight warps; it is kept as two halves of 256 columns, each with a
product of its own.

dsv2/kernels/hopper.py goes further in Gluon, Triton's lower level; with many heads this is what takes its
place where Gluon is missing, and what it is compared with.
"""

# B batch   S cached tokens   H heads   C kv_lora_rank (the latent)   R qk_rope_head_dim

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2.kernels.backend import begin, jit, overlap, tl
from dsv2.kernels.schedule import LOG2_E, ceil_div, room_for, tiles_of_sequences

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton 3.3 and older, or none
    TensorDescriptor = None

WIDTH, ROPE = 512, 64  # of the latent and the rotary key: DeepSeek-V2's and V3's
TILE = 64


def fits(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, block_table: Tensor | None
) -> bool:
    """Whether `DescriptorKernel` takes these: Hopper, 16 bits, V2's widths, rows that start at 16 bytes."""
    if TensorDescriptor is None or q_latent.device.type != "cuda" or q_latent.element_size() != 2:
        return False
    if torch.cuda.get_device_capability(q_latent.device)[0] != 9:
        return False
    pages = block_table is None or latent.shape[1] % TILE == 0
    aligned = all(
        x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 for x in (latent, k_rope)
    )
    return pages and aligned and (q_latent.shape[2], q_rope.shape[2]) == (WIDTH, ROPE)


@dataclass(frozen=True)
class DescriptorKernel:
    """The kernel with its blocks: `heads` a program, tiles of `tile` cached tokens in `stages` buffers.

    tail: how many tokens at once of a sequence's last tile, which is masked and need not be full.
    """

    heads: int
    stages: int
    tail: int
    tile: int = TILE
    warps: int = 8
    least_tiles: int = 1

    @classmethod
    def for_heads(cls, heads: int) -> DescriptorKernel:
        """16 heads; or 64, whose queries take the shared memory of one stage more, and of a longer tail."""
        return cls(heads=16, stages=3, tail=64) if heads <= 32 else cls(heads=64, stages=2, tail=16)

    def launch_split(
        self, q_latent, q_rope, latent, k_rope, lengths, scale, block_table, out, *partial, parts
    ):
        batch, heads = q_latent.shape[:2]
        paged = block_table is not None
        tiles = [
            TensorDescriptor(x, list(x.shape), list(x.stride()), [1, self.tile, width])
            for x, width in ((latent, WIDTH // 2), (k_rope, ROPE))
        ]
        split_kernel_with_descriptors[(ceil_div(heads, self.heads), parts)](
            q_latent, q_rope, latent, k_rope, *tiles,
            lengths, block_table if paged else lengths, out, *partial,
            *q_latent.stride()[:2], *q_rope.stride()[:2], *latent.stride()[:2], *k_rope.stride()[:2],
            block_table.stride(0) if paged else 0,
            *out.stride()[:2], batch, heads, latent.shape[1], scale * LOG2_E,
            SEQUENCES=room_for(batch), HEADS=self.heads, TILE=self.tile, TAIL=self.tail,
            HALF=WIDTH // 2, ROPE=ROPE, PAGED=paged, STAGES=self.stages, num_warps=self.warps,
            **overlap(q_latent.device),
        )  # fmt: skip


@jit
def split_kernel_with_descriptors(
    q_latent, q_rope, latent, k_rope, latent_tiles, k_rope_tiles, lengths, block_table, out, partial_out,
    partial_lse, q_latent_b, q_latent_h, q_rope_b, q_rope_h, latent_b, latent_s, k_rope_b, k_rope_s, table_b,
    out_b, out_h, batch, heads, page, scale_log2,
    SEQUENCES: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr, HALF: tl.constexpr,
    ROPE: tl.constexpr, PAGED: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As `split_kernel`, for a latent of 2 HALF columns; only the last tile of a sequence is masked."""
    begin(OVERLAP)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    column, rotary, row = tl.arange(0, HALF), tl.arange(0, ROPE), tl.arange(0, TAIL)
    is_head = head < heads
    part = tl.program_id(1)
    sequences, tiles = tiles_of_sequences(lengths, batch, SEQUENCES, TILE)
    total = tl.sum(tiles, 0)
    per_part = tl.cdiv(total, tl.num_programs(1))
    here, stop = part * per_part, tl.minimum((part + 1) * per_part, total)

    while here < stop:
        b = tl.sum((tl.cumsum(tiles, 0) <= here).to(tl.int32), 0)
        first = tl.sum(tl.where(sequences < b, tiles, 0), 0)
        length = tl.load(lengths + b)
        last = tl.minimum(stop, first + tl.cdiv(length, TILE))
        at = q_latent + b.to(tl.int64) * q_latent_b + head[:, None] * q_latent_h + column
        q_left = tl.load(at, mask=is_head[:, None], other=0.0)
        q_right = tl.load(at + HALF, mask=is_head[:, None], other=0.0)
        q_r_at = q_rope + b.to(tl.int64) * q_rope_b + head[:, None] * q_rope_h + rotary
        q_r = tl.load(q_r_at, mask=is_head[:, None], other=0.0)

        largest = tl.full((HEADS,), -float("inf"), tl.float32)
        total_weight = tl.zeros((HEADS,), tl.float32)
        left = tl.zeros((HEADS, HALF), tl.float32)
        right = tl.zeros((HEADS, HALF), tl.float32)
        full = tl.minimum(last - first, length // TILE)
        for tile in tl.range(here - first, full, num_stages=STAGES):
            block, token = _place(block_table, b, table_b, tile * TILE, page, PAGED)
            c_left = latent_tiles.load([block, token, 0]).reshape(TILE, HALF)
            c_right = latent_tiles.load([block, token, HALF]).reshape(TILE, HALF)
            r = k_rope_tiles.load([block, token, 0]).reshape(TILE, ROPE)
            scores = tl.dot(q_left, c_left.T)
            scores = tl.dot(q_right, c_right.T, scores)
            scores = tl.dot(q_r, r.T, scores) * scale_log2
            largest, shrink, weights, total_weight = _soften(scores, largest, total_weight)
            weights = weights.to(c_left.dtype)
            left = tl.dot(weights, c_left, left * shrink[:, None])
            right = tl.dot(weights, c_right, right * shrink[:, None])
        # The last tile of a sequence need not be full; its tokens come TAIL at a time, masked.
        for token in range(full * TILE, tl.minimum((last - first) * TILE, length), TAIL):
            block, slot = _place(block_table, b, table_b, token, page, PAGED)
            filled = token + row < length
            c_at = (
                latent
                + block.to(tl.int64) * latent_b
                + (slot + row).to(tl.int64)[:, None] * latent_s
                + column
            )
            c_left = tl.load(c_at, mask=filled[:, None], other=0.0)
            c_right = tl.load(c_at + HALF, mask=filled[:, None], other=0.0)
            r_at = (
                k_rope
                + block.to(tl.int64) * k_rope_b
                + (slot + row).to(tl.int64)[:, None] * k_rope_s
                + rotary
            )
            r = tl.load(r_at, mask=filled[:, None], other=0.0)
            scores = tl.dot(q_left, c_left.T)
            scores = tl.dot(q_right, c_right.T, scores)
            scores = tl.dot(q_r, r.T, scores) * scale_log2
            scores = tl.where(filled, scores, -float("inf"))
            largest, shrink, weights, total_weight = _soften(scores, largest, total_weight)
            weights = weights.to(c_left.dtype)
            left = tl.dot(weights, c_left, left * shrink[:, None])
            right = tl.dot(weights, c_right, right * shrink[:, None])

        left, right = left / total_weight[:, None], right / total_weight[:, None]
        if last - here == tl.cdiv(length, TILE):
            out_at = out + b.to(tl.int64) * out_b + head[:, None] * out_h + column
            tl.store(out_at, left.to(out.dtype.element_ty), mask=is_head[:, None])
            tl.store(out_at + HALF, right.to(out.dtype.element_ty), mask=is_head[:, None])
        else:
            slot = (part + b).to(tl.int64) * heads + head
            part_at = partial_out + slot[:, None] * (2 * HALF) + column
            tl.store(part_at, left, mask=is_head[:, None])
            tl.store(part_at + HALF, right, mask=is_head[:, None])
            tl.store(partial_lse + slot, largest + tl.log2(total_weight), mask=is_head)
        here = last


@jit
def _place(block_table, b, table_b, token, page, PAGED: tl.constexpr):
    """The first two indices of a tile in the cache: of sequence and token, or of page and slot."""
    if PAGED:
        return tl.load(block_table + b.to(tl.int64) * table_b + token // page), token % page
    else:
        return b, token


@jit
def _soften(scores, largest, total_weight):
    """Online softmax: the new maximum, what earlier sums shrink by, this tile's weights, the new sum."""
    larger = tl.maximum(largest, tl.max(scores, 1))
    shrink = tl.exp2(largest - larger)
    weights = tl.exp2(scores - larger[:, None])
    return larger, shrink, weights, total_weight * shrink + tl.sum(weights, 1)
