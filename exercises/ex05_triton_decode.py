"""Chapter 05: attention over the cached latents in one pass, and its kernels in Triton.

Six exercises, in the order of the notebook: one tile more in an online softmax, the streaming loop as a
Triton kernel over a paged cache, what blocks of heads cost, sharing tiles out over programs, a split kernel
that has a bug, and merging what several programs found.

    python3 course.py check 05        all of this chapter
    python3 course.py check 05.1      one exercise
    python3 course.py hint 05.1       a hint; again, for a plainer one

05.1, 05.3, 05.4 and 05.6 are plain Python and PyTorch. 05.2 and 05.5 need Triton, which has no wheels for
macOS and Windows; without a GPU its interpreter runs the kernels on the CPU. The functions of the notebook
are not known here: copy of them what you need.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv2.course.kernels import tl, triton

LOG2_E = math.log2(math.e)  # e^x = 2^(x LOG2_E)


# exercise 05.1: one tile more (difficulty 2 of 3, about 20 minutes)
# check: python3 course.py check 05.1     in a notebook: check("05.1")
# hint:  python3 course.py hint 05.1      in a notebook: hint("05.1")
def online_softmax_step(
    largest: Float[Tensor, " heads"],
    total: Float[Tensor, " heads"],
    mixture: Float[Tensor, "heads latent"],
    scores: Float[Tensor, "heads tile"],
    values: Float[Tensor, "tile latent"],
) -> tuple[Float[Tensor, " heads"], Float[Tensor, " heads"], Float[Tensor, "heads latent"]]:
    """Take one more tile of cached tokens into a softmax that is under way.

        m' = max(m, max_j s_j)
        l' = l e^(m - m') + sum_j e^(s_j - m')
        a' = a e^(m - m') + sum_j e^(s_j - m') v_j         (online softmax, arXiv 1805.02867)

    for every head, j over the tile's tokens. largest: m, the largest score so far; total: l, the sum of
    weights; mixture: a, the sum of weighted values, not divided by l (that is done once, at the end). Before
    the first tile m is -inf, l and a are 0. A score of -inf is a token that is masked; where all are masked
    and nothing was seen before, m' stays -inf, l' and a' stay 0. Returns (m', l', a').

    One head has seen one token of score 0 and value 4. Now comes one of score ln 3 and value 8: m' = ln 3,
    l' = 1/3 + 1, a' = 4/3 + 8, and a' / l' = 7, as the weights 1/4 and 3/4 give.

    >>> state = torch.zeros(1), torch.ones(1), torch.tensor([[4.0]])
    >>> m, l, a = online_softmax_step(*state, torch.tensor([[3.0]]).log(), torch.tensor([[8.0]]))
    >>> m.exp().round(decimals=3), (a / l).round(decimals=3)
    (tensor([3.]), tensor([[7.]]))
    """
    raise NotImplementedError("exercise 05.1: write this, then run: python3 course.py check 05.1")


# exercise 05.2: a kernel that streams pages (difficulty 3 of 3, about 40 minutes)
# check: python3 course.py check 05.2     in a notebook: check("05.2")
# hint:  python3 course.py hint 05.2      in a notebook: hint("05.2")
@triton.jit
def paged_kernel(
    q_latent, q_rope, latent, k_rope, table, out, heads, tokens, scale_log2,
    HEADS: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """One program: all heads of one sequence. Queries are loaded, then pages stream past them."""
    head, slot = tl.arange(0, HEADS), tl.arange(0, PAGE)
    column, rotary = tl.arange(0, WIDTH), tl.arange(0, ROPE)
    is_head = (head < heads)[:, None]
    q_c = tl.load(q_latent + head[:, None] * WIDTH + column, mask=is_head, other=0.0)  # (HEADS, WIDTH)
    q_r = tl.load(q_rope + head[:, None] * ROPE + rotary, mask=is_head, other=0.0)  # (HEADS, ROPE)
    largest = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mixture = tl.zeros((HEADS, WIDTH), tl.float32)
    raise NotImplementedError("exercise 05.2: write this, then run: python3 course.py check 05.2")
    tl.store(out + head[:, None] * WIDTH + column, mixture / total[:, None], mask=is_head)


def paged_attention(
    q_latent: Float[Tensor, "heads latent"],
    q_rope: Float[Tensor, "heads rope"],
    latent: Float[Tensor, "pages page latent"],
    k_rope: Float[Tensor, "pages page rope"],
    table: Int[Tensor, " sequence_pages"],
    tokens: int,
    scale: float,
) -> Float[Tensor, "heads latent"]:
    """Attention of one new token over a paged cache, in Triton: fill in the kernel's loop, and launch it.

        a_j = Softmax_j(scale (q_latent . c_j + q_rope . k_rope_j)),    result = sum_j a_j c_j,    j < tokens

    The cache is a pool of pages that many sequences share. A table says which pages are this sequence's, and
    in which order: its token t is in slot t % page of page table[t // page]. Slots of its last page beyond
    `tokens`, and other pages, hold other texts or NaN. One program does everything: queries stay, pages come
    one after the other, and each page is loaded once.

    Sizes: page, latent and rope are powers of 2 and at least 16, which products in Triton need; up to 16
    heads. All is float32; write tl.dot(a, b, input_precision="ieee"), or a GPU rounds the factors. Powers of
    2 are what the hardware has, so that the kernel is given scale * LOG2_E, and tl.exp2 is used throughout.

    Two cached tokens with latents of 4s and of 8s, and rotary scores of 0 and ln 3, weigh 1/4 and 3/4.

    >>> c = torch.stack([torch.full((16,), 4.0), torch.full((16,), 8.0)] + [torch.zeros(16)] * 14)
    >>> r = torch.zeros(16, 16)
    >>> r[1, 0] = math.log(3)
    >>> queries = torch.zeros(1, 16), torch.eye(16)[:1]
    >>> device = "cuda" if torch.cuda.is_available() else "cpu"
    >>> inputs = *queries, c[None], r[None], torch.tensor([0], dtype=torch.int32)
    >>> out = paged_attention(*(x.to(device) for x in inputs), tokens=2, scale=1.0)
    >>> round(out[0, 5].item(), 3)
    7.0
    """
    out = torch.full_like(q_latent, math.nan)  # what the kernel does not write shows
    heads, width = q_latent.shape
    page, rope = k_rope.shape[1:]
    raise NotImplementedError("exercise 05.2: write this, then run: python3 course.py check 05.2")
    return out


# exercise 05.3: what smaller blocks cost (difficulty 1 of 3, about 15 minutes)
# check: python3 course.py check 05.3     in a notebook: check("05.3")
# hint:  python3 course.py hint 05.3      in a notebook: hint("05.3")
def roofline_time(
    batch: int,
    tokens: int,
    heads: int,
    heads_per_program: int,
    *,
    latent: int,
    rope: int,
    bandwidth: float,
    flops: float,
) -> tuple[int, float]:
    """Bytes of the cache that the programs of a decode kernel ask for, and their time by the roofline.

        bytes = blocks * batch * tokens * (latent + rope) * 2
        time = max(bytes / bandwidth, FLOPs / flops)

    One new token for each of `batch` sequences, which have `tokens` cached tokens each, in numbers of 2
    bytes. A program holds heads_per_program query heads; as many blocks of heads as that makes read the
    cache, each for itself, and each token's latent serves as key and as value. FLOPs: for each head and
    cached token a product of latent + rope numbers for the score and `latent` for the mixture, 2 FLOPs for
    a multiply-add. A block that is not full does the work of a full one. Every byte is taken to come from
    the large memory; what a GPU's cache (the L2) saves of that is not counted. Queries, results and partial
    results are small and left out. bandwidth: bytes/s, flops: FLOP/s. Returns (bytes, seconds).

    2 sequences of 10 tokens, 3 heads, 2 a program: 2 blocks read 2 * 10 * (4 + 1) numbers. They do the work
    of 4 heads: 4 * 20 * 9 multiply-adds.

    >>> roofline_time(2, 10, 3, 2, latent=4, rope=1, bandwidth=100.0, flops=1000.0)
    (400, 4.0)
    """
    raise NotImplementedError("exercise 05.3: write this, then run: python3 course.py check 05.3")


# exercise 05.4: who reads which tokens (difficulty 3 of 3, about 30 minutes)
# check: python3 course.py check 05.4     in a notebook: check("05.4")
# hint:  python3 course.py hint 05.4      in a notebook: hint("05.4")
def share_tiles(lengths: list[int], tile: int, parts: int) -> list[tuple[int, int, int, int]]:
    """Which program reads which tokens: an even share of the tiles for each, whatever the lengths.

    Each sequence is cut into tiles of `tile` neighbouring tokens; its last one may be shorter. The tiles of
    all sequences, in order, make one list of

        T = sum_b ceil(lengths[b] / tile)        tiles, and n = ceil(T / parts) of them make a share.

    Program p reads tiles p n to (p + 1) n - 1 of the list, as far as there are any. Returns one (program,
    sequence, start, stop) for each stretch of a sequence that one program reads, tokens start to stop - 1,
    ordered by sequence and start: neighbouring tiles of one sequence are one stretch. A sequence of length
    0 has no tile.

    Lengths 100 and 40 in tiles of 32 are 4 + 2 tiles; 2 programs take 3 each.

    >>> share_tiles([100, 40], tile=32, parts=2)
    [(0, 0, 0, 96), (1, 0, 96, 100), (1, 1, 0, 40)]
    """
    raise NotImplementedError("exercise 05.4: write this, then run: python3 course.py check 05.4")


# exercise 05.5: a part that counts too much (a bug hunt, difficulty 2 of 3, about 20 minutes)
# check: python3 course.py check 05.5     in a notebook: check("05.5")
# hint:  python3 course.py hint 05.5      in a notebook: hint("05.5")
@triton.jit
def part_kernel(
    q_latent, q_rope, latent, k_rope, out, lse, heads, tokens, scale_log2,
    HEADS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Program p of the grid: its part of the tiles, for all heads of one sequence."""
    part = tl.program_id(0)
    head, row = tl.arange(0, HEADS), tl.arange(0, TILE)
    column, rotary = tl.arange(0, WIDTH), tl.arange(0, ROPE)
    is_head = head < heads
    q_c = tl.load(q_latent + head[:, None] * WIDTH + column, mask=is_head[:, None], other=0.0)
    q_r = tl.load(q_rope + head[:, None] * ROPE + rotary, mask=is_head[:, None], other=0.0)
    largest = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mixture = tl.zeros((HEADS, WIDTH), tl.float32)
    tiles = tl.cdiv(tokens, TILE)
    each = tl.cdiv(tiles, tl.num_programs(0))
    for tile in range(part * each, tl.minimum((part + 1) * each, tiles)):
        token = tile * TILE + row
        filled = token < tokens
        c = tl.load(latent + token[:, None] * WIDTH + column, mask=filled[:, None], other=0.0)
        r = tl.load(k_rope + token[:, None] * ROPE + rotary, mask=filled[:, None], other=0.0)
        scores = tl.dot(q_c, c.T, input_precision="ieee") + tl.dot(q_r, r.T, input_precision="ieee")
        scores = scores * scale_log2
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixture = mixture * shrink[:, None] + tl.dot(weights, c, input_precision="ieee")
        largest = larger
    at = part * heads + head
    divisor = tl.where(total == 0, 1.0, total)  # a part without a tile: zeros, and -inf
    tl.store(out + at[:, None] * WIDTH + column, mixture / divisor[:, None], mask=is_head[:, None])
    tl.store(lse + at, largest + tl.log2(divisor), mask=is_head)


def part_results(
    q_latent: Float[Tensor, "heads latent"],
    q_rope: Float[Tensor, "heads rope"],
    latent: Float[Tensor, "tokens latent"],
    k_rope: Float[Tensor, "tokens rope"],
    scale: float,
    parts: int,
) -> tuple[Float[Tensor, "parts heads latent"], Float[Tensor, "parts heads"]]:
    """What each of `parts` programs finds in its part of one sequence: the input of exercise 05.6.

        out[p] = sum_j a_j c_j,   a_j = Softmax_j(s_j ln 2),   lse[p] = log2(sum_j 2^(s_j)),   j in part p

    with scores in powers of 2, s_j = scale log2(e) (q_latent . c_j + q_rope . k_rope_j). The tokens are cut
    into tiles of 32; a part is ceil(tiles / parts) of them. A part without a tile has out 0 and lse -inf.

    The kernel above runs, and its results have the right shapes. One of its lines is wrong: find it. (This
    function is right.)
    """
    heads, width = q_latent.shape
    out = q_latent.new_full((parts, heads, width), math.nan)
    lse = q_latent.new_full((parts, heads), math.nan)
    part_kernel[(parts,)](
        q_latent, q_rope, latent, k_rope, out, lse, heads, latent.shape[0], scale * LOG2_E,
        HEADS=16, TILE=32, WIDTH=width, ROPE=k_rope.shape[1],
    )  # fmt: skip
    return out, lse


# exercise 05.6: merging what several programs found (difficulty 2 of 3, about 15 minutes)
# check: python3 course.py check 05.6     in a notebook: check("05.6")
# hint:  python3 course.py hint 05.6      in a notebook: hint("05.6")
def merge_parts(
    out: Float[Tensor, "parts heads latent"], lse: Float[Tensor, "parts heads"]
) -> Float[Tensor, "heads latent"]:
    """Attention over a whole sequence from the results of programs that each read a part of its tokens.

        w_i = 2^(lse_i - M),  M = max_i lse_i,        result = sum_i w_i out_i / sum_i w_i

    for every head, i over the parts. out[i] is part i's finished result: its weights add up to 1. lse[i],
    "log-sum-exp", is log2 of the sum of its weights before that, log2(sum_j 2^(s_j)) with scores in powers
    of 2; the M that is taken off is the head's own. A part without a token has lse = -inf, and its `out` may
    hold anything, even NaN: nobody need have written it. A head all of whose parts are empty gets zeros.

    One head, two parts with results 4 and 8. The second one's tokens weigh three times as much.

    >>> lse = torch.tensor([[1.0], [3.0]]).log2()
    >>> merge_parts(torch.tensor([[[4.0]], [[8.0]]]), lse).round(decimals=3)
    tensor([[7.]])
    """
    raise NotImplementedError("exercise 05.6: write this, then run: python3 course.py check 05.6")

# stub 2ef1ba: file bb67e2, 05.1 7789c8, 05.2 d8e8dc, 05.3 09cd72, 05.4 def9c6, 05.5 398cd5, 05.6 150949
