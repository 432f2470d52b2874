"""The split kernel for many heads on Hopper, in Gluon: Triton's lower level, where programs place their data.

With 128 heads there are 2 * 128 * (576 + 512) operations for the 1152 bytes of a cached token: 242 for each
byte. An H100 does about 230 in the time that a byte takes, so both its tensor cores and its memory should
never stand still. Plain Triton lets all warps of a program do the same in step: products wait for the
softmax, and the softmax for products. Here are three kinds of warps, which do different things at once.

One program holds 64 heads and walks through its share of the tiles of 64 cached tokens (schedule.py). A tile
is a matrix c, its latents, 64 x 512, and as many rotary keys, 64 x 64. Its rows are keys, and values too:

    scores  S = q c^T + q_rope k_rope^T    64 x 64
    weights W = 2^(S - maximum so far)     64 x 64
    mixture O = O * shrink + W c           64 x 512 in float32: half of the registers of two warpgroups

Warpgroup 0 keeps the left 256 columns of O, warpgroup 1 the right ones. Each finds the weights of every other
tile, hands them to the other through shared memory, and multiplies the weights of all tiles with its half of
c. The third kind is a single warp, which tells the tensor memory accelerator (TMA) what to copy next:

    copying        tiles 0, 1                               tile 2            tile 3
    warpgroup 0    S0 ... W0 ...  W0 c left   (wait)        W1 c left   S2 ... W2 ...
    warpgroup 1    S1 ... (wait)  W0 c right  and W1 ...    W1 c right        S3 ...           time ->

Shared memory: 72 KB of queries and two tiles of 72 KB, of 227 KB. No room is left for weights: they replace
the rotary keys of their tile once its scores are done. Results leave through the place of the queries. Who
may touch a buffer is agreed through mbarriers, counters in shared memory that are waited for: `full` and
`free` for each half of a tile, `weighed` for the weights and maxima of a tile. A barrier's phase, 0 or 1,
flips every time that its buffer is used.

That two warpgroups share O is FlashMLA's idea (https://github.com/deepseek-ai/FlashMLA).
"""

# B batch   S cached tokens   H heads   C kv_lora_rank (the latent)   R qk_rope_head_dim

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2.kernels.backend import VERSION
from dsv2.kernels.schedule import LOG2_E, ceil_div, room_for

# Gluon is experimental and changes between versions; it is left alone in those that were not tried.
OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)

try:
    if not OLDEST_TRITON <= VERSION <= NEWEST_TRITON:
        raise ImportError("no Triton, or one whose Gluon may differ")
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Names that changed after Triton 3.6.
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
    MEMORY = gl.shared_memory_descriptor
    reinterpret = MEMORY.reinterpret if hasattr(MEMORY, "reinterpret") else MEMORY._reinterpret
except ImportError:
    gluon = None

WIDTH, ROPE = 512, 64  # of the latent and the rotary key: DeepSeek-V2's and V3's


def fits(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, block_table: Tensor | None
) -> bool:
    """Whether `HopperKernel` takes these: Hopper, 16 bits, V2's widths, many heads, what TMA can address."""
    if gluon is None or q_latent.device.type != "cuda" or q_latent.element_size() != 2:
        return False
    if torch.cuda.get_device_capability(q_latent.device)[0] != 9 or q_latent.shape[1] <= 32:
        return False
    if (q_latent.shape[2], q_rope.shape[2]) != (WIDTH, ROPE) or 0 in latent.shape:
        return False
    pages = block_table is None or latent.shape[1] % HopperKernel.tile == 0
    return pages and all(_addressable(x) for x in (q_latent, q_rope, latent, k_rope))


def _addressable(x: Tensor) -> bool:
    """TMA wants addresses and strides that are multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:2])


@dataclass(frozen=True)
class HopperKernel:
    """Blocks of 64 heads, which is what a warpgroup multiplies at once, and tiles of 64 tokens."""

    heads: int = 64
    tile: int = 64
    least_tiles: int = 4

    def launch_split(
        self, q_latent, q_rope, latent, k_rope, lengths, scale, block_table, out, *partial, parts
    ):
        batch, heads = q_latent.shape[:2]
        partial_out, partial_lse = partial
        paged = block_table is not None
        whole = out if _addressable(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
        # The programs that share a part, one for each block of heads, are neighbours: they run at the same
        # time, and the second to ask for a tile finds it in the L2 cache.
        split_kernel_hopper[(parts * ceil_div(heads, self.heads),)](
            _boxes(q_latent, self.heads, WIDTH // 2), _boxes(q_rope, self.heads, ROPE),
            _boxes(latent, self.tile, WIDTH // 2), _boxes(k_rope, self.tile, ROPE),
            lengths, block_table if paged else lengths,
            _boxes(whole, self.heads, WIDTH // 2), _boxes(partial_out, self.heads, WIDTH // 4), partial_lse,
            block_table.stride(0) if paged else 0, batch, heads, parts, latent.shape[1], scale * LOG2_E,
            SEQUENCES=max(room_for(batch), 128), PAGED=paged, num_warps=4,
        )  # fmt: skip
        if whole is not out:
            out.copy_(whole)


def _boxes(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x (X, Y, columns or more) as the TMA sees it, which copies (1, rows, columns) and reads 0 outside."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=3)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, columns], layout)


# ------------------------------------------------------------------------------------------- kernel


def jit(function, **options):
    """`gluon.jit`, or without Gluon the function as it is, which then must not be launched."""
    return function if gluon is None else gluon.jit(function, **options)


COUNTS = ("table_b", "batch", "heads", "parts", "page")  # no new compilation for each


@functools.partial(jit, do_not_specialize=COUNTS)
def split_kernel_hopper(
    q_latent, q_rope, latent, k_rope, lengths, block_table, out, partial_out, partial_lse,
    table_b, batch, heads, parts, page, scale_log2, SEQUENCES: gl.constexpr, PAGED: gl.constexpr,
):  # fmt: skip
    """One program: its share of the tiles, for one block of heads."""
    HEADS: gl.constexpr = q_latent.block_type.shape[1]
    TILE: gl.constexpr = latent.block_type.shape[1]
    HALF: gl.constexpr = latent.block_type.shape[2]
    ROTARY: gl.constexpr = k_rope.block_type.shape[2]
    head_blocks = gl.num_programs(0) // parts
    part = gl.program_id(0) // head_blocks
    first_head = gl.program_id(0) % head_blocks * HEADS
    here, stop, b, first = share(lengths, batch, part, parts, SEQUENCES, TILE)

    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(latent.dtype, [2, HEADS, HALF], swizzled)
    q_r = gl.allocate_shared_memory(latent.dtype, [1, HEADS, ROTARY], swizzled)
    c = gl.allocate_shared_memory(latent.dtype, [4, TILE, HALF], swizzled)  # half h of buffer i: 2 i + h
    c_r = gl.allocate_shared_memory(latent.dtype, [2, TILE, ROTARY], swizzled)  # then the weights
    peak_0 = gl.allocate_shared_memory(gl.float32, [HEADS], plain)
    peak_1 = gl.allocate_shared_memory(gl.float32, [HEADS], plain)
    sum_0 = gl.allocate_shared_memory(gl.float32, [HEADS], plain)
    sum_1 = gl.allocate_shared_memory(gl.float32, [HEADS], plain)
    buffers = (q, q_r, c, c_r, (peak_0, peak_1), (sum_0, sum_1))
    q_full, q_free = barriers_of(1, 1), barriers_of(1, 2)
    full, free = barriers_of(4, 1), barriers_of(4, 1)
    weighed, summed = barriers_of(2, 1), barriers_of(1, 2)
    barriers = (q_full, q_free, full, free, weighed, summed)
    fence_async_shared()

    work = (lengths, here, stop, b, first)
    source = (q_latent, q_rope, latent, k_rope, block_table, table_b, page, first_head)
    target = (out, partial_out, partial_lse, part, first_head, heads)
    gl.warp_specialize(
        [
            (multiply, (buffers, barriers, work, target, scale_log2, 0)),
            (multiply, (buffers, barriers, work, target, scale_log2, 1)),
            (copy, (buffers, barriers, work, source, PAGED)),
        ],
        [4, 1],  # warps of the second and the third
        [240, 24],  # and their registers a thread
    )


@jit
def barriers_of(number: gl.constexpr, arrivals: gl.constexpr):
    """mbarriers: each flips its phase after `arrivals` arrivals, and the bytes it was told to expect."""
    made = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@jit
def share(lengths, batch, part, parts, SEQUENCES: gl.constexpr, TILE: gl.constexpr):
    """The first and one past the last tile of this part, the first one's sequence, and where that begins."""
    each_warp_all: gl.constexpr = gl.BlockedLayout([SEQUENCES // 32], [32], [4], [0])  # nothing to exchange
    sequence = gl.arange(0, SEQUENCES, each_warp_all)
    tiles = gl.cdiv(gl.load(lengths + sequence, mask=sequence < batch, other=0), TILE)
    per_part = gl.cdiv(gl.sum(tiles, 0), parts)
    here = part * per_part
    stop = gl.minimum(here + per_part, gl.sum(tiles, 0))
    before = gl.associative_scan(tiles, 0, add) <= here  # sequences that end before
    return here, stop, gl.sum(before.to(gl.int32), 0), gl.sum(gl.where(before, tiles, 0), 0)


@jit
def add(a, b):
    return a + b


# ------------------------------------------------------------------------------- the copying warp


@jit
def copy(buffers, barriers, work, source, PAGED: gl.constexpr):
    """Queries and tiles, each into its buffer as soon as that is free."""
    q, q_r, c, c_r, _peaks, _sums = buffers
    q_full, q_free, full, free, _weighed, _summed = barriers
    lengths, here, stop, b, first = work
    q_latent, q_rope, latent, k_rope, block_table, table_b, page, first_head = source
    HALF: gl.constexpr = c.shape[2]
    TILE: gl.constexpr = c.shape[1]
    half_bytes: gl.constexpr = 2 * TILE * HALF
    rope_bytes: gl.constexpr = 2 * TILE * c_r.shape[2]
    q_bytes: gl.constexpr = 2 * q.shape[1] * (2 * HALF + c_r.shape[2])
    q_phase = 1  # a fresh barrier counts as having passed the phase before
    phases = 3  # bit i: of buffer i
    while here < stop:
        last = gl.minimum(stop, first + gl.cdiv(gl.load(lengths + b), TILE))
        if last > here:
            for i in range(0, last - here):
                block, token = b, (here - first + i) * TILE
                if PAGED:
                    block = gl.load(block_table + b.to(gl.int64) * table_b + token // page)
                    token = token % page
                owner = i & 1
                phase = (phases >> owner) & 1
                phases ^= 1 << owner
                near = 3 * owner  # the owner's own half: the first to be free again, and the first it reads
                mbarrier.wait(free.index(near), phase)
                mbarrier.expect(full.index(near), half_bytes)
                tma_load(latent, [block, token, HALF * owner], full.index(near), c.index(near))
                far = 1 + owner
                mbarrier.wait(free.index(far), phase)
                mbarrier.expect(full.index(far), half_bytes + rope_bytes)
                tma_load(latent, [block, token, HALF * (1 - owner)], full.index(far), c.index(far))
                tma_load(k_rope, [block, token, 0], full.index(far), c_r.index(owner))
                if i == 0:  # behind the first tile, whose place is free before that of the queries
                    mbarrier.wait(q_free.index(0), q_phase)
                    q_phase ^= 1
                    mbarrier.expect(q_full.index(0), q_bytes)
                    tma_load(q_latent, [b, first_head, 0], q_full.index(0), q.index(0))
                    tma_load(q_latent, [b, first_head, HALF], q_full.index(0), q.index(1))
                    tma_load(q_rope, [b, first_head, 0], q_full.index(0), q_r.index(0))
            here = last
        first = last
        b += 1


# ----------------------------------------------------------------------- the multiplying warpgroups


@jit
def multiply(buffers, barriers, work, target, scale_log2, ME: gl.constexpr):
    """Warpgroup ME: weights of the even (0) or odd (1) tiles, the left or the right half of the mixture."""
    q, c = buffers[0], buffers[2]
    q_full, q_free, summed = barriers[0], barriers[1], barriers[5]
    lengths, here, stop, b, first = work
    HEADS: gl.constexpr = q.shape[1]
    TILE: gl.constexpr = c.shape[1]
    HALF: gl.constexpr = c.shape[2]
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    q_phase = 0
    even = 0  # phases of the two tile buffers
    odd = 0
    while here < stop:  # one sequence after the other
        length = gl.load(lengths + b)
        tiles = gl.cdiv(length, TILE)
        last = gl.minimum(stop, first + tiles)
        if last > here:
            mbarrier.wait(q_full.index(0), q_phase)
            peak = gl.full([HEADS], -float("inf"), gl.float32, gl.SliceLayout(1, wide))
            total = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, wide))
            state = (peak, total, gl.zeros([HEADS, HALF], gl.float32, wide))
            left = length - (here - first) * TILE  # tokens from this tile on
            for _pair in range(0, (last - here) // 2):
                if ME == 0:
                    state = own_tile(buffers, barriers, state, scale_log2, left, even, odd, 0, False)
                    state = other_tile(buffers, barriers, state, left - TILE, odd, 0)
                else:
                    state = own_tile(buffers, barriers, state, scale_log2, left - TILE, odd, even, 1, True)
                left -= 2 * TILE
                even ^= 1
                odd ^= 1
            if (last - here) % 2 == 1:
                if ME == 0:
                    state = own_tile(buffers, barriers, state, scale_log2, left, even, odd, 0, False)
                else:
                    state = other_tile(buffers, barriers, state, left, even, 1)
                even ^= 1
            state = add_sums(buffers, summed, state, q_phase, ME)
            store_result(q.index(ME), target, state, b, last - here == tiles, ME)
            barrier()
            mbarrier.arrive(q_free.index(0))
            q_phase ^= 1
            here = last
        first = last
        b += 1


@jit
def own_tile(
    buffers, barriers, state, scale_log2, left, phase, other_phase,
    ME: gl.constexpr, OTHER_FIRST: gl.constexpr,
):  # fmt: skip
    """Scores, weights and mixture of one of ME's tiles; with OTHER_FIRST, of the other's tile before it too.

    left: cached tokens from this tile on. state: the maxima so far, ME's sums of weights, ME's half of the
    mixture. The product for the other's tile runs during the softmax of this one.
    """
    q, q_r, c, c_r, peaks, _sums = buffers
    _q_full, _q_free, full, free, weighed, _summed = barriers
    OTHER: gl.constexpr = 1 - ME
    NEAR: gl.constexpr = 3 * ME
    FAR: gl.constexpr = 1 + ME
    HEADS: gl.constexpr = q.shape[1]
    TILE: gl.constexpr = c.shape[1]
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    # This is 0, but the compiler cannot know. Otherwise it would work out the addresses of all 36 products
    # before the loop, keep them, and run out of registers.
    zero = left >> 31

    scores = gl.zeros([HEADS, TILE], gl.float32, narrow)
    mbarrier.wait(full.index(NEAR), phase)
    near = c.index(NEAR + zero).permute((1, 0))
    scores = warpgroup_mma(q.index(ME + zero), near, scores, use_acc=False, is_async=True)
    mbarrier.wait(full.index(FAR), phase)
    far = c.index(FAR + zero).permute((1, 0))
    scores = warpgroup_mma(q.index(OTHER + zero), far, scores, is_async=True)
    scores = warpgroup_mma(q_r.index(0), c_r.index(ME).permute((1, 0)), scores, is_async=True)
    if OTHER_FIRST:
        mbarrier.wait(weighed.index(OTHER), other_phase)
        state = start_product(buffers, state, peaks[OTHER].load(state[0].type.layout), OTHER, ME)
        scores = warpgroup_mma_wait(1, deps=[scores])
    else:
        scores = warpgroup_mma_wait(0, deps=[scores])

    token = gl.arange(0, TILE, gl.SliceLayout(0, narrow))
    scores = gl.where((token < left)[None, :], scores * scale_log2, -float("inf"))
    before = gl.convert_layout(state[0], gl.SliceLayout(1, narrow))
    peak = gl.maximum(before, gl.max(scores, 1))  # finite: a tile has at least one token
    weights = gl.exp2(scores - peak[:, None])
    barrier()  # all four warps have read the rotary keys, which the weights replace
    c_r.index(ME).store(weights.to(q.dtype))
    peaks[ME].store(peak)
    if left < TILE:
        clear(c.index(NEAR), left)
    fence_async_shared()
    barrier()
    mbarrier.arrive(weighed.index(ME))

    if OTHER_FIRST:
        state = finish_product(state, free, OTHER, ME)
    layout: gl.constexpr = state[0].type.layout
    state = start_product(buffers, state, gl.convert_layout(peak, layout), ME, ME)
    state = (state[0], state[1] + gl.convert_layout(gl.sum(weights, 1), layout), state[2])
    return finish_product(state, free, ME, ME)


@jit
def other_tile(buffers, barriers, state, left, phase, ME: gl.constexpr):
    """ME's half of the mixture for a tile whose weights the other group has found."""
    c, peaks = buffers[2], buffers[4]
    free, weighed = barriers[3], barriers[4]
    OTHER: gl.constexpr = 1 - ME
    mbarrier.wait(weighed.index(OTHER), phase)
    if left < c.shape[1]:
        clear(c.index(2 * OTHER + ME), left)
        fence_async_shared()
        barrier()
    state = start_product(buffers, state, peaks[OTHER].load(state[0].type.layout), OTHER, ME)
    return finish_product(state, free, OTHER, ME)


@jit
def start_product(buffers, state, peak, OWNER: gl.constexpr, ME: gl.constexpr):
    """mixture = mixture * shrink + weights c, for ME's columns of OWNER's tile: not awaited."""
    c, c_r = buffers[2], buffers[3]
    before, total, mixture = state
    shrink = gl.exp2(before - peak)  # 0 the first time: 2^-inf
    mixture = mixture * shrink[:, None]
    mixture = warpgroup_mma(c_r.index(OWNER), c.index(2 * OWNER + ME), mixture, is_async=True)
    return peak, total * shrink, mixture


@jit
def finish_product(state, free, OWNER: gl.constexpr, ME: gl.constexpr):
    """Wait for the product; then ME's half of OWNER's tile may be overwritten."""
    mixture = warpgroup_mma_wait(0, deps=[state[2]])
    barrier()
    mbarrier.arrive(free.index(2 * OWNER + ME))
    return state[0], state[1], mixture


@jit
def clear(half, left):
    """Zero the rows of half a tile from `left` on: their weight is 0, but 0 * NaN would be NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, half.shape[0], gl.SliceLayout(1, layout))
    WIDTH: gl.constexpr = half.shape[1]
    for start in gl.static_range(0, WIDTH, 64):
        columns = half.slice(start, 64, dim=1)
        columns.store(gl.where((row < left)[:, None], columns.load(layout), 0.0))


@jit
def add_sums(buffers, summed, state, phase, ME: gl.constexpr):
    """Both groups' sums of weights; after it, nobody reads the queries any more."""
    sums = buffers[5]
    peak, total, mixture = state
    sums[ME].store(total)
    barrier()
    mbarrier.arrive(summed.index(0))
    mbarrier.wait(summed.index(0), phase)
    return peak, total + sums[1 - ME].load(total.type.layout), mixture


@jit
def store_result(room, target, state, b, WHOLE, ME: gl.constexpr):
    """ME's columns, sent through `room`: the result if all of the sequence was read here, or a part of it."""
    out, partial_out, partial_lse, part, first_head, heads = target
    peak, total, mixture = state
    HEADS: gl.constexpr = mixture.shape[0]
    HALF: gl.constexpr = mixture.shape[1]
    mixture = mixture * (1.0 / total)[:, None]
    if WHOLE:
        room.store(mixture.to(out.dtype))
        send(out, b, first_head, ME * HALF, room)
    else:  # float32 takes twice the room: one half after the other
        layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
        room_32 = reinterpret(room, gl.float32, [HEADS, HALF // 2], layout)
        halves = gl.split(gl.permute(gl.reshape(mixture, [HEADS, 2, HALF // 2]), [0, 2, 1]))
        for i in gl.static_range(2):
            room_32.store(halves[i])
            send(partial_out, part + b, first_head, ME * HALF + i * (HALF // 2), room_32)
        if ME == 0:
            head = first_head + gl.arange(0, HEADS, peak.type.layout)
            at = partial_lse + (part + b).to(gl.int64) * heads + head
            gl.store(at, peak + gl.log2(total), mask=head < heads)


@jit
def send(to, row, head, column, room):
    """Copy `room` to device memory; heads beyond the last are left out by the TMA."""
    fence_async_shared()
    barrier()
    tma_store(to, [row, head, column], room)
    tma.store_wait(0)  # room has been read
    barrier()
