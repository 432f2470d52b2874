"""The exercises of chapter 05: cases, right answers, plausible mistakes, hints.

The mistakes of the Triton exercises are written in PyTorch: what such a kernel computes, not how.
"""

# B batch   S cached tokens   H heads   C kv_lora_rank (the latent)   R qk_rope_head_dim

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.kernels.schedule import LOG2_E, ceil_div, pieces

NEVER = float("-inf")


def random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers in each of the shapes, the same ones each time."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# ------------------------------------------------------------ 05.1 one tile more


def finite(x: Tensor) -> Tensor:
    """-inf replaced by 0: what is subtracted where nothing has been seen."""
    return x.masked_fill(x == NEVER, 0.0)


def online_softmax_step(
    largest: Tensor,
    total: Tensor,
    mixture: Tensor,
    scores: Tensor,
    values: Tensor,
    *,
    shrink_total: bool = True,
    shrink_mixture: bool = True,
    sign: int = 1,
    guard: Callable[[Tensor], Tensor] = finite,
    among: Callable[[Tensor, Tensor], Tensor] = lambda m, s: torch.maximum(m, s.amax(dim=1)),
    divide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Right, but for what is shrunk, the shrinking's sign, the guard, and what the maximum is taken among."""
    larger = among(largest, scores)
    safe = guard(larger)
    shrink = torch.exp(sign * (largest - safe))
    weights = torch.exp(scores - safe[:, None])
    total = total * (shrink if shrink_total else 1) + weights.sum(dim=1)
    mixture = mixture * (shrink if shrink_mixture else torch.ones_like(shrink))[:, None] + weights @ values
    return larger, total, mixture / total[:, None] if divide else mixture


def with_zero_for_no_maximum(largest, total, mixture, scores, values):
    """Right, but that the 0 which replaces -inf is given back as the maximum."""
    larger, *sums = online_softmax_step(largest, total, mixture, scores, values)
    return finite(larger), *sums


def with_the_tiles_softmax(largest, total, mixture, scores, values):
    """The tile's weights add up to 1, whatever came before."""
    larger = torch.maximum(largest, scores.amax(dim=1))
    shrink = torch.exp(largest - finite(larger))
    weights = scores.softmax(dim=1)
    return larger, total * shrink + weights.sum(dim=1), mixture * shrink[:, None] + weights @ values


def with_the_old_maximum(largest, total, mixture, scores, values):
    """Right, but that the maximum that went in comes out."""
    return largest, *online_softmax_step(largest, total, mixture, scores, values)[1:]


def in_powers_of_two(largest, total, mixture, scores, values):
    """Powers of 2 of scores that were meant for powers of e."""
    larger, total, mixture = online_softmax_step(largest / LOG2_E, total, mixture, scores / LOG2_E, values)
    return larger * LOG2_E, total, mixture


def with_a_sentinel(largest, total, mixture, scores, values):
    """-1e30 in the place of -inf."""
    return online_softmax_step(largest.clamp(min=-1e30), total, mixture, scores.clamp(min=-1e30), values)


def weighed_by_the_old_maximum(largest, total, mixture, scores, values):
    """The tile's weights relative to the maximum before it; the rest is right."""
    larger = torch.maximum(largest, scores.amax(dim=1))
    shrink = torch.exp(largest - finite(larger))
    weights = torch.exp(scores - finite(largest)[:, None])
    total = total * shrink + weights.sum(dim=1)
    return larger, total, mixture * shrink[:, None] + weights @ values


def under_way(seed: int, heads: int, tile: int, latent: int, hidden: tuple[tuple[int, int], ...] = ()):
    """A softmax that has seen some tokens, and a tile; hidden: the (head, token) that are masked in it."""
    largest, total, mixture, scores, values = random(
        seed, (heads,), (heads,), (heads, latent), (heads, tile), (tile, latent)
    )
    scores = 2 * scores
    for head, token in hidden:
        scores[head, token] = NEVER
    return {
        "largest": largest,
        "total": 1 + total.abs(),
        "mixture": mixture,
        "scores": scores,
        "values": values,
    }


def at_first(seed: int, heads: int, tile: int, latent: int, masked_head: int | None = None):
    """Nothing seen yet, and a tile; masked_head: one for which every token of it is masked."""
    case = under_way(seed, heads, tile, latent)
    case["largest"] = torch.full((heads,), NEVER)
    case["total"], case["mixture"] = torch.zeros(heads), torch.zeros(heads, latent)
    if masked_head is not None:
        case["scores"][masked_head] = NEVER
    return case


ONLINE_SOFTMAX = Exercise(
    number="05.1",
    name="online_softmax_step",
    title="one tile more",
    difficulty=2,
    minutes=20,
    answer=online_softmax_step,
    cases=(
        Case("5 heads under way, a tile of 4 tokens, latents of 3", lambda: under_way(1, 5, 4, 3)),
        Case(
            "3 heads under way, a tile of 6 tokens, some of them masked, latents of 4",
            lambda: under_way(2, 3, 6, 4, ((0, 5), (1, 5), (2, 5), (2, 4))),
        ),
        Case("the first tile: 4 heads, 5 tokens, latents of 2", lambda: at_first(3, 4, 5, 2)),
        Case(
            "2 heads under way; the tile of 3 tokens is masked for the second one; latents of 4",
            lambda: under_way(4, 2, 3, 4, ((1, 0), (1, 1), (1, 2))),
        ),
        Case(
            "the first tile of 7 tokens, all masked for head 2 of 3, latents of 5",
            lambda: at_first(5, 3, 7, 5, masked_head=2),
        ),
    ),
    mistakes=(
        Mistake(
            "mixture not rescaled",
            "The sum of weights is brought to the new maximum, the sum of weighted values is not. Values "
            "seen before a larger score then count too much.",
            lambda *a, **b: online_softmax_step(*a, **b, shrink_mixture=False),
        ),
        Mistake(
            "sum not rescaled",
            "The weighted values are brought to the new maximum, the sum of weights is not. What is divided "
            "in the end no longer fits together.",
            lambda *a, **b: online_softmax_step(*a, **b, shrink_total=False),
        ),
        Mistake(
            "nothing rescaled",
            "Earlier weights were taken relative to a smaller maximum and are kept as they are. Each of them "
            "is too large by the factor e^(m' - m).",
            lambda *a, **b: online_softmax_step(*a, **b, shrink_total=False, shrink_mixture=False),
        ),
        Mistake(
            "rescaled by the wrong sign",
            "Earlier sums are multiplied by e^(m' - m), which is 1 or more: they grow where they should "
            "shrink. At the first tile this is e^inf times 0.",
            lambda *a, **b: online_softmax_step(*a, **b, sign=-1),
        ),
        Mistake(
            "NaN while nothing was seen",
            "Right, until a head has seen nothing and sees nothing in this tile either: its maximum is -inf, "
            "and -inf - (-inf) is NaN.",
            lambda *a, **b: online_softmax_step(*a, **b, guard=lambda m: m),
        ),
        Mistake(
            "a sentinel for -inf",
            "-1e30 stands for -inf here. A masked score minus a maximum that is -1e30 itself is 0, and e^0 "
            "is 1: masked tokens get weights where nothing was seen before.",
            with_a_sentinel,
        ),
        Mistake(
            "maximum of the tile alone",
            "The new maximum is that of this tile, even where an earlier one was larger. Earlier sums can "
            "then grow beyond all numbers.",
            lambda *a, **b: online_softmax_step(*a, **b, among=lambda m, s: s.amax(dim=1)),
        ),
        Mistake(
            "one maximum for all heads",
            "All heads share one maximum. Ratios stay right, but a head whose scores are far below another's "
            "has weights that round to 0.",
            lambda *a, **b: online_softmax_step(
                *a, **b, among=lambda m, s: torch.maximum(m.max(), s.max()).expand_as(m).clone()
            ),
        ),
        Mistake(
            "weights by the old maximum",
            "The new tile's weights are taken relative to the maximum before it, and earlier sums to the one "
            "after it. Both belong to the new one.",
            weighed_by_the_old_maximum,
        ),
        Mistake(
            "relative to nothing",
            "Nothing was subtracted from the scores. The sums are relative to the new maximum: without it, "
            "e^s of a large score is infinite.",
            lambda *a, **b: online_softmax_step(*a, **b, guard=torch.zeros_like),
        ),
        Mistake(
            "the tile's own softmax",
            "The weights of the tile were made to add up to 1 before they were added. How much a tile counts "
            "beside the others is then lost.",
            with_the_tiles_softmax,
        ),
        Mistake(
            "0 for no maximum",
            "Where nothing has been seen, 0 comes back as the largest score. It may stand in for -inf in the "
            "subtraction, but the next tile may have scores below 0 only.",
            with_zero_for_no_maximum,
        ),
        Mistake(
            "the old maximum returned",
            "The maximum that comes back is the one that went in. The sums are relative to the new one.",
            with_the_old_maximum,
        ),
        Mistake(
            "powers of 2",
            "The weights are powers of 2 where they should be powers of e. (Kernels may take powers of 2 of "
            "scores that were multiplied by log2(e) first.)",
            in_powers_of_two,
        ),
        Mistake(
            "divided already",
            "The mixture is divided by the sum in every step. Then the next tile cannot be added to it: it "
            "counts as if its weights added up to 1.",
            lambda *a, **b: online_softmax_step(*a, **b, divide=True),
        ),
    ),
    hints=(
        "Earlier weights were e^(s - m), and later ones will be e^(s - m'). By which factor, the same for "
        "all earlier tokens of a head, do they differ? And what is that factor when m is -inf?",
        'The notebook\'s section "Online softmax" does it for one head. New here: several heads at once, and '
        "heads for which m' is still -inf. What could you subtract in their place, so that e^(...) is 0?",
        "larger = the larger of `largest` and the tile's maximum, for each head\n"
        "safe = larger, but 0 where it is -inf\n"
        "shrink = e^(largest - safe); weights = e^(scores - safe), one row a head\n"
        "total = total * shrink + sum of a row's weights\n"
        "mixture = mixture * shrink + weights @ values, shrink with an axis for the latent",
    ),
    checked="several heads, a first tile, masked tokens, a tile that is all masked, before and after others",
    axes=(("head",), ("head",), ("head", "latent number")),
)


# ------------------------------------------------------------ 05.2, 05.5 the streaming loop


def stream(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    tokens: range,
    scale: float,
    *,
    tile: int,
    hidden: Tensor | None = None,
    padding: bool = False,
    shrink_mixture: bool = True,
    shrink_total: bool = True,
    sign: int = 1,
    rotary: float = 1.0,
    factor: float = LOG2_E,
    exponential: Callable[[Tensor], Tensor] = torch.exp2,
    maximum_unscaled: bool = False,
    keep_maximum: bool = False,
    divide_each: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, sum, mixture) over the tokens, tile by tile, as such kernels compute it; right by default.

    hidden: tokens with a score of -inf. padding: slots beyond the end count as latents of zeros. factor,
    exponential: of the scores. keep_maximum: it never grows. divide_each: the mixture, after every tile.
    """
    largest = torch.full(q_latent.shape[:1], NEVER)
    total, mixture = torch.zeros_like(largest), torch.zeros_like(q_latent)
    for start in range(tokens.start, tokens.stop, tile):
        stop = min(start + tile, tokens.stop)
        c, r = latent[start:stop], k_rope[start:stop]
        if padding:
            lacking = start + tile - stop
            c, r = (torch.nn.functional.pad(x, (0, 0, 0, lacking)) for x in (c, r))
        scores = (q_latent @ c.T + rotary * (q_rope @ r.T)) * (1.0 if maximum_unscaled else scale * factor)
        if hidden is not None:
            scores = scores.masked_fill(hidden[start:stop], NEVER)
        larger = torch.maximum(largest, scores.amax(dim=1))
        if maximum_unscaled:
            scores = scores * (scale * factor)
        shrink = exponential(sign * (largest - larger))
        weights = exponential(scores - larger[:, None])
        total = total * (shrink if shrink_total else 1) + weights.sum(dim=1)
        mixture = mixture * (shrink if shrink_mixture else torch.ones_like(shrink))[:, None] + weights @ c
        if divide_each:
            mixture = mixture / total[:, None]
        largest = largest if keep_maximum else larger
    return largest, total, mixture


def on_device(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """How these two exercises are run: on the GPU if there is one."""
    from dsv2.course import kernels  # loads Triton

    return kernels.on_device(answer, arguments)


def paged_attention(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    table: Tensor,
    tokens: int,
    scale: float,
    *,
    in_order: bool = False,
    first_row: Callable[[Tensor, int], Tensor] = lambda number, page: number * page,
    by_row: bool = False,
    half_scaled: bool = False,
    counted: Callable[[int, int], int] = lambda tokens, page: tokens,
    twice: bool = False,
    unmasked_loads: bool = False,
    infinite_loads: bool = False,
    divide: bool = True,
    **changes: Any,
) -> Tensor:
    """Right, but for the changes. counted: how many tokens are seen; in_order: pages without their table.

    first_row: of a page in the pool; by_row: the mask compares rows of the pool with the number of tokens;
    half_scaled: the rotary scores are not.
    """
    device, page = q_latent.device, latent.shape[1]
    table = torch.arange(len(table)) if in_order else table.long().cpu()
    rows = (first_row(table, page)[:, None] + torch.arange(page)).flatten()
    latent, k_rope = (x.cpu().flatten(0, 1)[rows] for x in (latent, k_rope))
    if by_row:
        counted, changes = (lambda tokens, page: len(rows)), {**changes, "hidden": rows >= tokens}
    seen = counted(tokens, page)
    result = stream(
        q_latent.cpu(),
        q_rope.cpu() / (scale * LOG2_E) if half_scaled else q_rope.cpu(),
        latent,
        k_rope,
        range(seen),
        scale**2 if twice else scale,
        tile=page,
        **changes,
    )
    out = result[2] / result[1][:, None] if divide else result[2]
    if unmasked_loads and latent[: ceil_div(tokens, page) * page].isnan().any():
        out = torch.full_like(out, math.nan)
    if infinite_loads and tokens % page:
        out = torch.full_like(out, math.nan)
    return out.to(device)


def paged_case(
    seed: int,
    heads: int,
    tokens: int,
    sizes: tuple[int, int, int],
    pages: int,
    scale: float,
    old: float = 1.0,
) -> dict[str, Any]:
    """A pool full of other texts (times `old`), and a sequence in some of its pages, in no order."""
    page, width, rope = sizes
    q_latent, q_rope, latent, k_rope = random(
        seed, (heads, width), (heads, rope), (pages, page, width), (pages, page, rope)
    )
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(pages, generator=generator)[: ceil_div(tokens, page)].int()
    in_last = tokens - (len(table) - 1) * page
    for pool in (latent, k_rope):
        pool[table[-1].item(), in_last:] *= old
    return {
        "q_latent": q_latent,
        "q_rope": q_rope,
        "latent": latent,
        "k_rope": k_rope,
        "table": table,
        "tokens": tokens,
        "scale": scale,
    }


PAGED = Exercise(
    number="05.2",
    name="paged_attention",
    title="a kernel that streams pages",
    difficulty=3,
    minutes=40,
    answer=paged_attention,
    cases=(
        Case(
            "5 heads, 75 tokens in pages of 32, latents of 64, rotary keys of 16; the last page is not full",
            lambda: paged_case(21, 5, 75, (32, 64, 16), 6, 0.15),
        ),
        Case(
            "11 heads, 64 tokens in 4 full pages of 16, latents of 32, rotary keys of 64",
            lambda: paged_case(22, 11, 64, (16, 32, 64), 7, 0.1),
        ),
        Case(
            "3 heads, 9 tokens in one page of 16, latents of 64, rotary keys of 32",
            lambda: paged_case(23, 3, 9, (16, 64, 32), 3, 0.12),
        ),
        Case(
            "2 heads, 50 tokens in pages of 16, latents of 32, rotary keys of 16; NaN beyond the text",
            lambda: paged_case(24, 2, 50, (16, 32, 16), 5, 0.2, old=math.nan),
        ),
        Case(
            "4 heads, 40 tokens in pages of 32, latents of 64, rotary keys of 16; products up to hundreds",
            lambda: {
                **(case := paged_case(25, 4, 40, (32, 64, 16), 4, 0.01)),
                "q_latent": 30 * case["q_latent"],
                "q_rope": 30 * case["q_rope"],
            },
        ),
    ),
    mistakes=(
        Mistake(
            "mixture not rescaled",
            "The sum of weights shrinks when a larger score comes, the mixture does not: pages read before "
            "it count too much.",
            lambda *a, **b: paged_attention(*a, **b, shrink_mixture=False),
        ),
        Mistake(
            "sum not rescaled",
            "The mixture shrinks when a larger score comes, the sum of weights does not: the result is too "
            "small.",
            lambda *a, **b: paged_attention(*a, **b, shrink_total=False),
        ),
        Mistake(
            "rescaled by the wrong sign",
            "All is NaN. Either no kernel was launched, so that nothing was written; or what was summed "
            "grows by 2^(m' - m) where it should shrink, which at the first page is 2^inf times 0.",
            lambda *a, **b: paged_attention(*a, **b, sign=-1),
        ),
        Mistake(
            "maximum not carried on",
            "Only the last page counts: the maximum so far is still -inf when the next page comes, and "
            "2^(-inf - m') takes all that was summed away.",
            lambda *a, **b: paged_attention(*a, **b, keep_maximum=True),
        ),
        Mistake(
            "divided on every page",
            "The mixture is divided by the sum on every page, and then once more at the end. What is carried "
            "on is the sum of weighted latents.",
            lambda *a, **b: paged_attention(*a, **b, divide_each=True),
        ),
        Mistake(
            "one token too many",
            "One slot beyond the text is seen as well: the mask is off by one. That slot holds another text.",
            lambda *a, **b: paged_attention(
                *a, **b, counted=lambda tokens, page: min(tokens + 1, ceil_div(tokens, page) * page)
            ),
        ),
        Mistake(
            "the newest token missed",
            "The last token is not seen: the mask is off by one. A new token attends to itself too.",
            lambda *a, **b: paged_attention(*a, **b, counted=lambda tokens, page: tokens - 1),
        ),
        Mistake(
            "the whole last page",
            "The last page is read to its end. What stands behind the text there is another one's, or NaN.",
            lambda *a, **b: paged_attention(
                *a, **b, counted=lambda tokens, page: ceil_div(tokens, page) * page
            ),
        ),
        Mistake(
            "last page left out",
            "Only full pages are read. The tokens on the last one are missing, and a text of less than a "
            "page has none at all.",
            lambda *a, **b: paged_attention(*a, **b, counted=lambda tokens, page: tokens // page * page),
        ),
        Mistake(
            "zeros with a score",
            "Slots beyond the text were loaded as zeros and left in the softmax. Their score is 0, not -inf, "
            "and a score of 0 has a weight.",
            lambda *a, **b: paged_attention(*a, **b, padding=True),
        ),
        Mistake(
            "NaN times a weight of 0",
            "The scores are masked, the loaded latents are not. Weights beyond the text are 0, and 0 times "
            "NaN is NaN.",
            lambda *a, **b: paged_attention(*a, **b, unmasked_loads=True),
        ),
        Mistake(
            "slots loaded as -inf",
            "A last page that is not full gives NaN. Slots beyond the text were loaded as -inf, and a weight "
            "of 0 times -inf is NaN. The scores are -inf there, the latents must be finite.",
            lambda *a, **b: paged_attention(*a, **b, infinite_loads=True),
        ),
        Mistake(
            "mask of the pool's rows",
            "The mask compares rows of the pool with the number of tokens. A token's place in its text "
            "decides whether it is there; its row depends on where the page happens to lie.",
            lambda *a, **b: paged_attention(*a, **b, by_row=True),
        ),
        Mistake(
            "page number taken for a row",
            "A page's number is used as its first row. Page p begins at row p * page of the pool.",
            lambda *a, **b: paged_attention(*a, **b, first_row=lambda number, page: number),
        ),
        Mistake(
            "pages in the pool's order",
            "The pages are read as they lie in the pool, from the first. The table says which ones are this "
            "sequence's, and in which order.",
            lambda *a, **b: paged_attention(*a, **b, in_order=True),
        ),
        Mistake(
            "e and 2 mixed up",
            "The scores were multiplied by log2(e) for powers of 2, and then powers of e were taken.",
            lambda *a, **b: paged_attention(*a, **b, exponential=torch.exp),
        ),
        Mistake(
            "powers of 2 of plain scores",
            "Powers of 2 are taken of scores that were meant for powers of e: the factor log2(e) is missing, "
            "and the attention is too even.",
            lambda *a, **b: paged_attention(*a, **b, factor=1.0),
        ),
        Mistake(
            "scale used twice",
            "The scale is applied twice. It belongs there once, on the sum of both products.",
            lambda *a, **b: paged_attention(*a, **b, twice=True),
        ),
        Mistake(
            "scale left out",
            "The scores are not scaled: the attention is too sharp.",
            lambda *a, **b: paged_attention(*a, **(b | {"scale": 1 / LOG2_E})),
        ),
        Mistake(
            "half of the score scaled",
            "The scale was multiplied into the latents' part before the rotary part was added. It belongs on "
            "the sum of both.",
            lambda *a, **b: paged_attention(*a, **b, half_scaled=True),
        ),
        Mistake(
            "scaled after the maximum",
            "The maximum was taken of scores that are not scaled yet, and subtracted from scaled ones. "
            "Ratios stay right while numbers are small; large scores leave weights that are all 0.",
            lambda *a, **b: paged_attention(*a, **b, maximum_unscaled=True),
        ),
        Mistake(
            "rotary part left out",
            "The rotary keys are not in the scores: without them the order of the tokens is lost.",
            lambda *a, **b: paged_attention(*a, **b, rotary=0.0),
        ),
        Mistake(
            "not divided",
            "This is the mixture before it is divided by the sum of the weights.",
            lambda *a, **b: paged_attention(*a, **b, divide=False),
        ),
    ),
    hints=(
        "It is 05.1 in Triton, with tiles that you fetch yourself. Which row of the pool, seen as (pages * "
        "page) rows, holds slot i of the page number table[j]? Which of the page's slots are tokens?",
        'The notebook\'s kernel in "The streaming loop" has a cache in one piece; only the row numbers are '
        "other ones here. Mask twice: the loads (other=0.0), and the scores (-inf).",
        "for start in range(0, tokens, PAGE):\n"
        "    filled = start + slot < tokens\n"
        "    row = tl.load(table + start // PAGE) * PAGE + slot\n"
        "    c = load latent + row[:, None] * WIDTH + column, masked by filled; r likewise from k_rope\n"
        "    scores = (q_c c^T + q_r r^T) * scale_log2, -inf where not filled\n"
        "    larger, shrink, weights, total, mixture as in 05.1, with tl.maximum, tl.max(x, 1), tl.exp2\n"
        "    largest = larger\n"
        "launch: paged_kernel[(1,)](..., heads, tokens, scale * LOG2_E, HEADS=16, PAGE=page, ...)",
    ),
    checked="pages in any order, a last page that is not full and holds other texts or NaN, large scores",
    axes=("head", "latent number"),
    tolerance=2e-5,  # and exp2 to 2 units in the last place
    run=on_device,
    needs_triton=True,
)

PART_TILE = 32


def part_results(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    scale: float,
    parts: int,
    *,
    share_of: Callable[[int, int], int] = ceil_div,
    to_the_end: bool = False,
    logarithm: Callable[[Tensor, Tensor], Tensor] = lambda m, total: m + total.log2(),
    divide: bool = True,
    nothing: float = 1.0,
    infinite_loads: bool = False,
    **changes: Any,
) -> tuple[Tensor, Tensor]:
    """Right, but for the changes. share_of: tiles of a part; to_the_end: a part reads all that follows."""
    device, tokens = q_latent.device, latent.shape[0]
    share = share_of(ceil_div(tokens, PART_TILE), parts) * PART_TILE
    outs, lses = [], []
    for part in range(parts):
        stop = tokens if to_the_end else min((part + 1) * share, tokens)
        span = range(min(part * share, stop), stop)
        queries = (x.cpu() for x in (q_latent, q_rope, latent, k_rope))
        largest, total, mixture = stream(*queries, span, scale, tile=PART_TILE, **changes)
        lses.append(torch.where(total == 0, NEVER, logarithm(largest, total)))
        if infinite_loads and len(span) % PART_TILE:
            mixture, lses[-1] = mixture * math.nan, lses[-1] * math.nan
        outs.append(mixture / total.masked_fill(total == 0, nothing)[:, None] if divide else mixture)
    return torch.stack(outs).to(device), torch.stack(lses).to(device)


def part_case(seed: int, heads: int, tokens: int, sizes: tuple[int, int], parts: int) -> dict[str, Any]:
    width, rope = sizes
    q_latent, q_rope, latent, k_rope = random(
        seed, (heads, width), (heads, rope), (tokens, width), (tokens, rope)
    )
    return {
        "q_latent": q_latent,
        "q_rope": q_rope,
        "latent": latent,
        "k_rope": k_rope,
        "scale": 0.14,
        "parts": parts,
    }


PARTS = Exercise(
    number="05.5",
    name="part_results",
    title="a part that counts too much",
    difficulty=2,
    minutes=20,
    answer=part_results,
    cases=(
        Case(
            "5 heads, 150 tokens (5 tiles, the last one not full), 2 parts, latents of 64, rotary keys of 16",
            lambda: part_case(31, 5, 150, (64, 16), 2),
        ),
        Case(
            "3 heads, 128 tokens (4 full tiles), 2 parts, latents of 16, rotary keys of 32",
            lambda: part_case(32, 3, 128, (16, 32), 2),
        ),
        Case(
            "7 heads, 40 tokens (2 tiles), 3 parts: the last one is empty; latents of 32, rotary keys of 16",
            lambda: part_case(33, 7, 40, (32, 16), 3),
        ),
    ),
    mistakes=(
        Mistake(
            "zeros with a score",
            "Slots beyond the text are loaded as zeros and left in the softmax. Their score is 0, not -inf, "
            "and a score of 0 has a weight.",
            lambda *a, **b: part_results(*a, **b, padding=True),
        ),
        Mistake(
            "slots loaded as -inf",
            "A part whose last tile is not full gives NaN. Slots beyond the text were loaded as -inf; their "
            "products with a query are infinite or NaN, of either sign. It is the scores that must be -inf.",
            lambda *a, **b: part_results(*a, **b, infinite_loads=True),
        ),
        Mistake(
            "remainder of the tiles lost",
            "A part's tiles are rounded down, and the last tiles are read by nobody.",
            lambda *a, **b: part_results(*a, **b, share_of=lambda tiles, parts: tiles // parts),
        ),
        Mistake(
            "every part reads on to the end",
            "A part does not stop where the next one begins. Tokens are then counted several times.",
            lambda *a, **b: part_results(*a, **b, to_the_end=True),
        ),
        Mistake(
            "mixture not rescaled",
            "The mixture does not shrink when a larger score comes: tiles read before it count too much.",
            lambda *a, **b: part_results(*a, **b, shrink_mixture=False),
        ),
        Mistake(
            "logarithm without the maximum",
            "This is log2 of the sum of weights relative to the part's own maximum. Parts have different "
            "maxima, so that it cannot be compared between them.",
            lambda *a, **b: part_results(*a, **b, logarithm=lambda m, total: total.log2()),
        ),
        Mistake(
            "logarithm to base e",
            "The maximum is one of scores in powers of 2, and the natural logarithm of the sum is added to "
            "it.",
            lambda *a, **b: part_results(*a, **b, logarithm=lambda m, total: m + total.log()),
        ),
        Mistake(
            "not divided",
            "The parts' mixtures are not divided by their sums of weights. The logarithm already carries "
            "that sum; it would count twice.",
            lambda *a, **b: part_results(*a, **b, divide=False),
        ),
        Mistake(
            "NaN for an empty part",
            "A part without a tile is divided by its sum of weights, which is 0.",
            lambda *a, **b: part_results(*a, **b, nothing=0.0),
        ),
        Mistake(
            "rotary part left out",
            "The rotary keys are not in the scores: without them the order of the tokens is lost.",
            lambda *a, **b: part_results(*a, **b, rotary=0.0),
        ),
    ),
    hints=(
        "Of the three cases the check tries, which are right as the kernel was given? What do the wrong ones "
        "have that the right one has not?",
        "What does a masked load put in the place of a token, and what score comes out for it? Follow one "
        "such slot through the loop.",
        "a score of 0 is not `no score`: e^0 = 1\n"
        "after the scores are scaled, put -inf wherever `filled` is False (tl.where)",
    ),
    checked="full and partly filled tiles, parts of several tiles, a part without any",
    axes=(("part", "head", "latent number"), ("part", "head")),
    tolerance=2e-5,  # and exp2, log2 to 2 units in the last place
    run=on_device,
    needs_triton=True,
    given="zeros with a score",
)


# ------------------------------------------------------------ 05.3 bytes and time


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
    readers: Callable[[int, int], float] = ceil_div,
    computed: Callable[[int, int], int] = lambda heads, each: ceil_div(heads, each) * each,
    row: Callable[[int, int], int] = lambda latent, rope: latent + rope,
    width: int = 2,
    macs: Callable[[int, int], int] = lambda latent, rope: 2 * latent + rope,
    per_mac: int = 2,
    together: Callable[[float, float], float] = max,
) -> tuple[int, float]:
    """Right, but for the changes. readers, computed: blocks that read, heads that are computed for."""
    pairs = batch * tokens
    nbytes = readers(heads, heads_per_program) * pairs * row(latent, rope) * width
    work = per_mac * computed(heads, heads_per_program) * pairs * macs(latent, rope)
    return nbytes, together(nbytes / bandwidth, work / flops)


H100 = {"latent": 512, "rope": 64, "bandwidth": 3.0e12, "flops": 6.8e14}
UNEVEN = {"latent": 24, "rope": 10, "bandwidth": 2.0e5, "flops": 3.1e7}

ROOFLINE = Exercise(
    number="05.3",
    name="roofline_time",
    title="what smaller blocks cost",
    difficulty=1,
    minutes=15,
    answer=roofline_time,
    cases=(
        Case(
            "DeepSeek-V2's 128 heads, 16 a program, 64 texts of 4,096 tokens, an H100's measured rates",
            lambda: {"batch": 64, "tokens": 4096, "heads": 128, "heads_per_program": 16, **H100},
        ),
        Case(
            "the same with 128 heads a program: computing is the limit",
            lambda: {"batch": 64, "tokens": 4096, "heads": 128, "heads_per_program": 128, **H100},
        ),
        Case(
            "V2-Lite's 16 heads, 16 a program, 3 texts of 1,000 tokens",
            lambda: {"batch": 3, "tokens": 1000, "heads": 16, "heads_per_program": 16, **H100},
        ),
        Case(
            "37 heads, 8 a program: the last block is not full; latents of 24, rotary keys of 10",
            lambda: {"batch": 2, "tokens": 50, "heads": 37, "heads_per_program": 8, **UNEVEN},
        ),
        Case(
            "5 heads, 16 a program: one block, not full, and computing is the limit",
            lambda: (
                {"batch": 3, "tokens": 7, "heads": 5, "heads_per_program": 16, **UNEVEN} | {"flops": 1.0e6}
            ),
        ),
        Case(
            "19 heads, 8 a program: three blocks, the last one not full, and computing is the limit",
            lambda: (
                {"batch": 2, "tokens": 11, "heads": 19, "heads_per_program": 8, **UNEVEN} | {"flops": 1.0e6}
            ),
        ),
    ),
    mistakes=(
        Mistake(
            "read once for each head",
            "Here every head reads the cache for itself. The heads of a program share what it has loaded: "
            "that is the point of putting several into one.",
            lambda *a, **b: roofline_time(*a, **b, readers=lambda heads, each: heads),
        ),
        Mistake(
            "read once in all",
            "Here the cache is read once, however few heads a program holds. Programs cannot look into each "
            "other's tiles: each block of heads reads for itself.",
            lambda *a, **b: roofline_time(*a, **b, readers=lambda *_: 1),
        ),
        Mistake(
            "blocks rounded down",
            "The number of blocks is rounded down. The heads that are left need a program too.",
            lambda *a, **b: roofline_time(
                *a,
                **b,
                readers=lambda heads, each: heads // each,
                computed=lambda heads, each: heads // each * each,
            ),
        ),
        Mistake(
            "blocks not rounded",
            "heads / heads_per_program is a fraction where a block is not full. Such a block is a program "
            "too, and it reads the whole cache.",
            lambda *a, **b: roofline_time(
                *a, **b, readers=lambda heads, each: heads / each, computed=lambda heads, each: heads
            ),
        ),
        Mistake(
            "heads of a block for blocks",
            "The number of heads in a block was taken for the number of blocks.",
            lambda *a, **b: roofline_time(
                *a, **b, readers=lambda heads, each: each, computed=lambda heads, each: each * each
            ),
        ),
        Mistake(
            "work of one block",
            "The FLOPs are those of a single block. All blocks compute, each for its own heads.",
            lambda *a, **b: roofline_time(*a, **b, computed=lambda heads, each: each),
        ),
        Mistake(
            "work of all heads in every block",
            "Each block is counted with the work of all heads. It computes for its own only.",
            lambda *a, **b: roofline_time(
                *a, **b, computed=lambda heads, each: ceil_div(heads, each) * heads
            ),
        ),
        Mistake(
            "latent read twice",
            "The latent is counted once as key and once as value. It is loaded once and used twice; saving "
            "that reading is what the fused kernel is for.",
            lambda *a, **b: roofline_time(*a, **b, row=lambda latent, rope: 2 * latent + rope),
        ),
        Mistake(
            "rotary key not read",
            "The rotary keys are not counted among the bytes. They are cached and read like the latents.",
            lambda *a, **b: roofline_time(*a, **b, row=lambda latent, rope: latent),
        ),
        Mistake(
            "numbers, not bytes",
            "This counts numbers. Each takes 2 bytes.",
            lambda *a, **b: roofline_time(*a, **b, width=1),
        ),
        Mistake(
            "multiply-adds for FLOPs",
            "A multiply-add is counted as one FLOP. It is two: a product and a sum.",
            lambda *a, **b: roofline_time(*a, **b, per_mac=1),
        ),
        Mistake(
            "scores without the mixture",
            "Only the scores' products are counted. The mixture of latents takes nearly as many again.",
            lambda *a, **b: roofline_time(*a, **b, macs=lambda latent, rope: latent + rope),
        ),
        Mistake(
            "rotary key in the mixture",
            "The mixture is counted with latent + rope numbers. The rotary key is no value: it takes part in "
            "the score only.",
            lambda *a, **b: roofline_time(*a, **b, macs=lambda latent, rope: 2 * (latent + rope)),
        ),
        Mistake(
            "reading alone",
            "This is the time of reading, whichever of the two takes longer.",
            lambda *a, **b: roofline_time(*a, **b, together=lambda reading, computing: reading),
        ),
        Mistake(
            "computing alone",
            "This is the time of computing, whichever of the two takes longer.",
            lambda *a, **b: roofline_time(*a, **b, together=lambda reading, computing: computing),
        ),
        Mistake(
            "one after the other",
            "The two times are added. While one tile is computed the next one is on its way, so that only "
            "the longer of the two counts.",
            lambda *a, **b: roofline_time(*a, **b, together=lambda x, y: x + y),
        ),
        Mistake(
            "the shorter of the two",
            "This is the smaller of the two times. Neither can be undercut, so that the larger one counts.",
            lambda *a, **b: roofline_time(*a, **b, together=min),
        ),
        Mistake(
            "only the heads there are",
            "A block that is not full is counted by its heads. Its products have the size of a full block: "
            "the rows without a head are computed as well, in vain.",
            lambda *a, **b: roofline_time(*a, **b, computed=lambda heads, each: heads),
        ),
    ),
    hints=(
        "How many programs read one and the same token of the cache? What does each of them read of it, and "
        "what does it compute with it?",
        'Chapter 04, "More arithmetic, and faster", has bytes and FLOPs of a cached token for all heads at '
        "once. Now the heads come in blocks, and each block reads for itself.",
        "blocks = ceil(heads / heads_per_program)\n"
        "bytes = blocks * batch * tokens * (latent + rope) * 2\n"
        "FLOPs = 2 * (blocks * heads_per_program) * batch * tokens * (latent + rope + latent)\n"
        "the larger of bytes / bandwidth and FLOPs / flops",
    ),
    checked="one block and several, blocks that are not full, limits by reading and by computing of each",
    # An H100's microseconds are numbers near 1e-4; they are compared in microseconds.
    run=lambda answer, arguments: in_microseconds(answer(**arguments)),
)


def in_microseconds(result: Any) -> Any:
    """(bytes, seconds) with the time in microseconds, so that small differences count; or what else came."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], (int, float)):
        return {"bytes": result[0], "time (µs)": result[1] * 1e6}
    return result


# ------------------------------------------------------------ 05.4 sharing tiles out


def share_tiles(lengths: list[int], tile: int, parts: int) -> list[tuple[int, int, int, int]]:
    """The package's own schedule."""
    return [(p.program, p.sequence, p.start, p.stop) for p in pieces(lengths, tile, parts)]


def walk(
    lengths: list[int],
    tile: int,
    parts: int,
    *,
    tiles_of: Callable[[int, int], int] = ceil_div,
    share_of: Callable[[int, int], int] = ceil_div,
    clipped: bool = True,
    empty: bool = False,
    lost: bool = False,
    joint: bool = False,
) -> list[tuple[int, int, int, int]]:
    """Right, but for rounding. clipped: to the length; lost: what falls to programs that do not exist."""
    share = share_of(sum(tiles_of(length, tile) for length in lengths), parts)
    found, first = [], 0
    for sequence, length in enumerate(lengths):
        last = first + tiles_of(length, tile)
        here = first
        if empty and here == last:
            found.append((here // max(share, 1), sequence, 0, 0))
        while here < last:
            program = here // share
            stop = min((program + 1) * share, last)
            shift = 0 if joint else first
            end = (stop - shift) * tile
            if not (lost and program >= parts):
                begin = (here - shift) * tile
                found.append((program, sequence, begin, min(end, length) if clipped and not joint else end))
            here = stop
        first = last
    return found


def each_sequence_by_itself(lengths, tile, parts):
    """Every sequence cut into `parts` of its own."""
    found = []
    for sequence, length in enumerate(lengths):
        found += [(p, sequence, start, stop) for p, _, start, stop in share_tiles([length], tile, parts)]
    return found


def whole_sequences(lengths, tile, parts):
    return [(b % parts, b, 0, length) for b, length in enumerate(lengths) if length]


def tokens_not_tiles(lengths, tile, parts):
    """Even shares of the tokens: they may begin in the middle of a tile."""
    return share_tiles(lengths, 1, parts)


def tiles_in_turn(lengths, tile, parts):
    """Tile i to program i % parts."""
    found, count = [], 0
    for sequence, length in enumerate(lengths):
        for start in range(0, length, tile):
            found.append((count % parts, sequence, start, min(start + tile, length)))
            count += 1
    return found


def one_more(total: int, parts: int) -> int:
    """Rounded down, and one more: too much where nothing is left over."""
    return total // parts + 1


def a_stretch_for_each_tile(lengths, tile, parts):
    """The right programs, but neighbouring tiles are not put together."""
    return [
        (program, sequence, begin, min(begin + tile, stop))
        for program, sequence, start, stop in share_tiles(lengths, tile, parts)
        for begin in range(start, stop, tile)
    ]


def shares_end_with_texts(lengths, tile, parts):
    """A program for every sequence at least: what is left of a share is not used for the next one."""
    share = ceil_div(sum(ceil_div(length, tile) for length in lengths), parts) * tile
    stretches = [
        (b, start, min(start + share, length))
        for b, length in enumerate(lengths)
        for start in range(0, length, share)
    ]
    return [(program, *stretch) for program, stretch in enumerate(stretches)]


def as_even_as_possible(lengths, tile, parts):
    """Tile i of all T to program i * parts // T: shares that differ by one tile at most."""
    total, count = sum(ceil_div(length, tile) for length in lengths), 0
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for sequence, length in enumerate(lengths):
        for start in range(0, length, tile):
            key = (count * parts // total, sequence)
            found[key] = (found.get(key, (start, 0))[0], min(start + tile, length))
            count += 1
    return [(*key, *span) for key, span in found.items()]


class Stretches:
    """A result that is shown as it stands: all of its stretches, in one line."""

    def __init__(self, found: list) -> None:
        self.found = [tuple(stretch) for stretch in found]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stretches) and self.found == other.found

    __hash__ = None

    def __repr__(self) -> str:
        return ", ".join(map(str, self.found)) or "no stretch"


def shown_whole(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """How an answer is run: its list as one thing, so that a learner sees it beside the right one."""
    result = answer(**arguments)
    if isinstance(result, (list, tuple)) and all(isinstance(item, (list, tuple)) for item in result):
        return Stretches(list(result))
    return result


SHARE = Exercise(
    number="05.4",
    name="share_tiles",
    title="who reads which tokens",
    difficulty=3,
    minutes=30,
    answer=share_tiles,
    cases=(
        Case(
            "lengths 100 and 40, tiles of 32, 2 programs",
            lambda: {"lengths": [100, 40], "tile": 32, "parts": 2},
        ),
        Case(
            "lengths 70, 0, 16 and 129, tiles of 16, 4 programs",
            lambda: {"lengths": [70, 0, 16, 129], "tile": 16, "parts": 4},
        ),
        Case(
            "one text of 1,000 tokens, tiles of 64, 5 programs",
            lambda: {"lengths": [1000], "tile": 64, "parts": 5},
        ),
        Case(
            "lengths 10, 300 and 25, tiles of 8, 3 programs",
            lambda: {"lengths": [10, 300, 25], "tile": 8, "parts": 3},
        ),
        Case(
            "5 short texts, 9 programs: some have nothing to do",
            lambda: {"lengths": [5, 12, 1, 0, 20], "tile": 8, "parts": 9},
        ),
        Case("no token at all", lambda: {"lengths": [0, 0], "tile": 16, "parts": 3}),
    ),
    mistakes=(
        Mistake(
            "remainder lost",
            "A share is rounded down, so that the programs' shares together are less than the list: its last "
            "tiles are read by nobody.",
            lambda *a, **b: walk(*a, **b, share_of=lambda total, parts: total // parts, lost=True),
        ),
        Mistake(
            "more programs than there are",
            "A share is rounded down, and the tiles that are left go to programs with numbers of `parts` and "
            "more, which do not exist.",
            lambda *a, **b: walk(*a, **b, share_of=lambda total, parts: total // parts),
        ),
        Mistake(
            "short tiles lost",
            "A length is divided by the tile and rounded down. The tokens behind the last full tile are read "
            "by nobody.",
            lambda *a, **b: walk(*a, **b, tiles_of=lambda length, tile: length // tile),
        ),
        Mistake(
            "beyond the end",
            "The last tile of a sequence ends where a full one would. Slots beyond the length are not this "
            "text's.",
            lambda *a, **b: walk(*a, **b, clipped=False),
        ),
        Mistake(
            "counted in the whole list",
            "Start and stop are counted from the beginning of the joint list of tiles. They are tokens of "
            "their own sequence, which begins at 0.",
            lambda *a, **b: walk(*a, **b, joint=True),
        ),
        Mistake(
            "every sequence by itself",
            "Every sequence is split over all programs, the short ones too. Each stretch costs a start and a "
            "result to merge, and a text of one tile keeps one program busy.",
            each_sequence_by_itself,
        ),
        Mistake(
            "whole sequences",
            "Every sequence goes to one program as a whole. The longest one then decides when the work is "
            "done, and with few texts most programs have none.",
            whole_sequences,
        ),
        Mistake(
            "tokens, not tiles",
            "The tokens are shared out evenly, so that a share can begin in the middle of a tile. Products "
            "come in whole tiles: part of the work is then done in vain.",
            tokens_not_tiles,
        ),
        Mistake(
            "tiles in turn",
            "Tile after tile is dealt out like cards. The shares are even, but nearly every sequence falls "
            "to nearly every program, and each of them has a result to merge.",
            tiles_in_turn,
        ),
        Mistake(
            "one tile too many in a share",
            "A share is one tile larger than needed where the tiles can be shared out without a remainder: "
            "a division rounded down plus 1 is not a division rounded up.",
            lambda *a, **b: walk(*a, **b, share_of=one_more),
        ),
        Mistake(
            "a stretch for each tile",
            "Every tile is a stretch of its own here. Neighbouring tiles that one program reads are one.",
            a_stretch_for_each_tile,
        ),
        Mistake(
            "shares end with their text",
            "A program stops where a text ends, and the next text begins with the next program. More than "
            "`parts` programs are needed then; a share goes on into the next text.",
            shares_end_with_texts,
        ),
        Mistake(
            "as even as possible",
            "These shares differ by a tile at most. The rule here is simpler: n = ceil(T / parts) tiles for "
            "each program until there are none left, so that the last ones may have fewer, or none.",
            as_even_as_possible,
        ),
        Mistake(
            "stop included",
            "`stop` is the last token here. It is the first one that is not read, as in range(start, stop).",
            lambda *a, **b: [(p, s, start, stop - 1) for p, s, start, stop in share_tiles(*a, **b)],
        ),
        Mistake(
            "tiles for tokens",
            "Start and stop are counted in tiles. They are tokens.",
            lambda lengths, tile, parts: [
                (p, s, start // tile, ceil_div(stop, tile))
                for p, s, start, stop in share_tiles(lengths, tile, parts)
            ],
        ),
        Mistake(
            "a stretch of nothing",
            "A sequence of length 0 gets a stretch without tokens. It has no tile, and nobody reads it.",
            lambda *a, **b: walk(*a, **b, empty=True),
        ),
    ),
    hints=(
        "Number all tiles through, sequence after sequence. Tile number i belongs to which program? And "
        "which tiles belong to sequence b, if you know how many there are before it?",
        'In the notebook\'s section "The split", the figure shows three such shares. Walk through the '
        "sequences with two counters: the number of a sequence's first tile, and the tile you are at.",
        "share = ceil(all tiles / parts); first = 0\n"
        "for each sequence: last = first + ceil(length / tile); here = first\n"
        "    while here < last:\n"
        "        program = here // share\n"
        "        stop = the smaller of the program's last tile + 1 and `last`\n"
        "        note (program, sequence, (here - first) * tile, (stop - first) * tile, at most the length)\n"
        "        here = stop\n"
        "    first = last",
    ),
    checked="even and ragged lengths, empty sequences, a remainder, programs with nothing to do, no token",
    run=shown_whole,
)


# ------------------------------------------------------------ 05.6 merging parts


def merge_parts(
    out: Tensor,
    lse: Tensor,
    *,
    power: Callable[[Tensor], Tensor] = torch.exp2,
    largest: Callable[[Tensor], Tensor] = lambda lse: lse.amax(dim=0),
    clean: bool = True,
    divide: bool = True,
    nothing: float = 1.0,
) -> Tensor:
    """Right, but for the power, the maximum, whether empty parts are cleared, and the division."""
    weights = power(lse - finite(largest(lse)))
    found = out.masked_fill((lse == NEVER)[..., None], 0.0) if clean else out
    mixture = (weights[..., None] * found).sum(dim=0)
    total = weights.sum(dim=0)
    return mixture / total.masked_fill(total == 0, nothing)[:, None] if divide else mixture


def mean_of_parts(out: Tensor, lse: Tensor) -> Tensor:
    there = (lse > NEVER)[..., None]
    return out.masked_fill(~there, 0.0).sum(dim=0) / there.sum(dim=0).clamp(min=1)


def weighed_by_logarithm(out: Tensor, lse: Tensor) -> Tensor:
    there = lse > NEVER
    weights = lse.masked_fill(~there, 0.0)
    mixture = (weights[..., None] * out.masked_fill(~there[..., None], 0.0)).sum(dim=0)
    return mixture / weights.sum(dim=0).masked_fill(~there.any(dim=0), 1.0)[:, None]


def largest_part(out: Tensor, lse: Tensor) -> Tensor:
    chosen = lse.argmax(dim=0)
    picked = out[chosen, torch.arange(out.shape[1])]
    return picked.masked_fill((lse.amax(dim=0) == NEVER)[:, None], 0.0)


def maximum_over_heads(out: Tensor, lse: Tensor) -> Tensor:
    """Right, but that the maximum is each part's, not each head's."""
    return merge_parts(out, lse - finite(lse.amax(dim=1))[:, None], largest=lambda lse: 0 * lse[0])


def across_heads(out: Tensor, lse: Tensor) -> Tensor:
    """A softmax over the heads of each part, where it should run over the parts of each head."""
    weights = torch.exp2(lse - finite(lse.amax(dim=1))[:, None])
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-30)
    return (weights[..., None] * out.masked_fill((lse == NEVER)[..., None], 0.0)).sum(dim=0)


def parts_case(seed: int, parts: int, heads: int, latent: int, far: float | Tensor = 0.0, empty=()) -> dict:
    """far: added to the logarithms, one for all or one a head. empty: (part, head) without a token, NaN."""
    out, lse = random(seed, (parts, heads, latent), (parts, heads))
    lse = 1.5 * lse + far
    for part, head in empty:
        lse[part, head], out[part, head] = NEVER, math.nan
    return {"out": out, "lse": lse}


MERGE = Exercise(
    number="05.6",
    name="merge_parts",
    title="merging what several programs found",
    difficulty=2,
    minutes=15,
    answer=merge_parts,
    cases=(
        Case("3 parts, 4 heads, latents of 5", lambda: parts_case(11, 3, 4, 5)),
        Case("4 parts, 2 heads, latents of 3; logarithms near 300", lambda: parts_case(12, 4, 2, 3, 300.0)),
        Case("2 parts, 3 heads, latents of 4; logarithms near -300", lambda: parts_case(13, 2, 3, 4, -300.0)),
        Case(
            "3 parts, 2 heads, latents of 4; logarithms near 200 for the first head, near -200 for the other",
            lambda: parts_case(16, 3, 2, 4, torch.tensor([200.0, -200.0])),
        ),
        Case(
            "5 parts, 2 heads, latents of 6; the last part is empty for both heads",
            lambda: parts_case(14, 5, 2, 6, empty=((4, 0), (4, 1))),
        ),
        Case(
            "2 parts, 3 heads, latents of 5; both parts are empty for the second head",
            lambda: parts_case(15, 2, 3, 5, empty=((0, 1), (1, 1))),
        ),
    ),
    mistakes=(
        Mistake(
            "powers of e",
            "The weights are e^(lse - M), but the logarithms are to base 2: differences between parts are "
            "exaggerated.",
            lambda *a, **b: merge_parts(*a, **b, power=torch.exp),
        ),
        Mistake(
            "no maximum",
            "The weights are 2^lse itself. float32 ends at 2^128: large logarithms give infinity divided by "
            "infinity, small ones 0 divided by 0.",
            lambda *a, **b: merge_parts(*a, **b, largest=lambda lse: torch.zeros_like(lse[0])),
        ),
        Mistake(
            "one maximum for all heads",
            "All heads share one maximum. A head whose logarithms are far below another's is left with "
            "weights that are all 0.",
            lambda *a, **b: merge_parts(*a, **b, largest=lambda lse: lse.amax().expand_as(lse[0])),
        ),
        Mistake(
            "maximum over the heads",
            "The maximum was taken over the heads of each part. Parts of one head are then relative to "
            "different numbers, and cannot be compared.",
            maximum_over_heads,
        ),
        Mistake(
            "plain mean",
            "All parts count alike. A part whose tokens hardly matter then counts as much as the one that "
            "holds the answer.",
            mean_of_parts,
        ),
        Mistake(
            "weighed by the logarithm",
            "The parts are weighed by lse, not by 2^lse. The logarithm of a weight is not a weight: it can "
            "even be negative.",
            weighed_by_logarithm,
        ),
        Mistake(
            "only the largest part",
            "Only the part with the largest sum counts, as if the others had none.",
            largest_part,
        ),
        Mistake(
            "not divided",
            "The weighted results are added up and not divided by the sum of the weights, which is 1 or "
            "more.",
            lambda *a, **b: merge_parts(*a, **b, divide=False),
        ),
        Mistake(
            "softmax over the heads",
            "The weights of a part's heads add up to 1. Heads have nothing to do with each other; the parts "
            "of one head are what is merged.",
            across_heads,
        ),
        Mistake(
            "NaN of an empty part",
            "An empty part has weight 0, but what stands in its result is multiplied by it all the same: 0 "
            "times NaN is NaN.",
            lambda *a, **b: merge_parts(*a, **b, clean=False),
        ),
        Mistake(
            "0 divided by 0",
            "Right, but a head all of whose parts are empty gets 0 / 0 in place of zeros.",
            lambda *a, **b: merge_parts(*a, **b, nothing=0.0),
        ),
    ),
    hints=(
        "A part's result was divided by its own sum of weights, and 2^lse is that sum. What would you "
        "multiply each result by to undo the division, and divide by in the end?",
        "2^lse overflows; only ratios matter, so that one number, which, may be taken off all logarithms of "
        "a head. Then look at the two special cases: an empty part, and a head with nothing but empty parts.",
        "largest = the maximum over the parts, 0 where that is -inf\n"
        "weights = 2^(lse - largest)                          (parts, heads)\n"
        "put 0 into `out` wherever the weight is 0 (masked_fill makes a new tensor)\n"
        "mixture = sum over the parts of weights * out; total = sum over the parts of weights\n"
        "mixture / total, with 1 for a total of 0",
    ),
    checked="logarithms beyond the range of 2^x, empty parts that hold NaN, a head without any token",
    axes=("head", "latent number"),
)


EXERCISES: tuple[Exercise, ...] = (ONLINE_SOFTMAX, PAGED, ROOFLINE, SHARE, PARTS, MERGE)
