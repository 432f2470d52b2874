"""Experts for a few tokens: which of them, and their products with every weight read once.

With few tokens the time of a layer of experts is that of reading the weights of those that were chosen. The
first launch normalises a token and routes it; the second computes silu(gate) * up of every (token, expert)
pair, the third goes back to the hidden size. A shared expert of width S I is S more experts that every token
has chosen with weight 1. Nothing is sorted and nothing comes back to the host: each program finds its
expert's tokens among the chosen ids itself.

Each kernel has its plain-PyTorch reference beside it, which runs wherever the kernels do not.
"""

# B batch   D hidden_size   E routed experts   K experts per token   I moe_intermediate_size
# S shared experts

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv2.kernels.backend import begin, jit, overlap, tl, triton
from dsv2.kernels.prefill import normalise
from dsv2.kernels.schedule import ceil_div
from dsv2.kernels.step import uses_kernels
from dsv2.layers import rms_norm, swiglu

# ------------------------------------------------------------------------------------------- routing


@dataclass(frozen=True)
class Choice:
    """How experts are chosen: `k` of them, from the `topk_group` best of `n_group` devices (0: from all).

    scaling: what the weights are multiplied by, or None: they are normalised to 1.
    """

    k: int
    n_group: int = 0
    topk_group: int = 0
    scaling: float | None = 1.0


def norm_route(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    router: Tensor,
    choice: Choice,
    arrivals: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm and router of B tokens: x (B, D), router (E, D). norm_weight None: x is normalised already.

    Returns the normalised x (B, D); expert_ids (B, K) int64, best first, the lower id where two are equal;
    weights (B, K) and scores (B, E), float32: as `dsv2.moe.Router` gives them. arrivals: at least B int32
    zeros, which are zeros again afterwards; layers that follow each other may share them.
    """
    if not uses_kernels(x):
        return norm_route_reference(x, norm_weight, eps, router, choice)
    batch, width = x.shape
    experts = router.shape[0]
    normed = x if norm_weight is None else torch.empty_like(x)
    ids = torch.empty(batch, choice.k, dtype=torch.int64, device=x.device)
    weights = torch.empty(batch, choice.k, dtype=torch.float32, device=x.device)
    scores = torch.empty(batch, experts, dtype=torch.float32, device=x.device)
    if arrivals is None:
        arrivals = torch.zeros(batch, dtype=torch.int32, device=x.device)
    blocks = choose_route_blocks(batch, experts, width)
    norm_route_kernel[(batch, ceil_div(experts, blocks["experts_each"]))](
        x, x if norm_weight is None else norm_weight, router, normed, ids, weights, scores, arrivals,
        x.stride(0), width, experts, eps, 1.0 if choice.scaling is None else choice.scaling, choice.k,
        choice.n_group, choice.topk_group,
        NORM=norm_weight is not None, NORMALISE=choice.scaling is None, GROUPED=choice.n_group > 0,
        EXPERTS=triton.next_power_of_2(experts), GROUPS=max(triton.next_power_of_2(choice.n_group), 1),
        **blocks, **overlap(x.device),
    )  # fmt: skip
    return normed, ids, weights, scores


def choose_route_blocks(batch: int, experts: int, width: int) -> dict[str, int]:
    """How a token's experts are shared out: `experts_each` program, ROWS of them at a time.

    A token's products with 64 experts are little work, but a single program would wait for them one after
    the other; there are about 128 programs for all tokens together. A program holds 8,192 numbers at once.

    >>> choose_route_blocks(batch=1, experts=64, width=2048)
    {'experts_each': 4, 'ROWS': 4, 'WIDTH': 2048, 'num_warps': 4}
    """
    columns = triton.next_power_of_2(width)
    rows = max(8192 // columns, 1)
    programs = max(128 // batch, 1)
    each = ceil_div(ceil_div(experts, programs), rows) * rows
    return {"experts_each": each, "ROWS": rows, "WIDTH": columns, "num_warps": 4 if experts <= 64 else 8}


def norm_route_reference(x, norm_weight, eps, router, choice):
    """What `norm_route` computes, in plain PyTorch."""
    normed = x if norm_weight is None else rms_norm(x, norm_weight, eps)
    scores = (normed.float() @ router.float().mT).softmax(dim=-1)
    open_ = scores
    if choice.n_group:
        device_scores = scores.unflatten(-1, (choice.n_group, -1)).amax(dim=-1)
        chosen = device_scores.topk(choice.topk_group, dim=-1).indices
        allowed = torch.zeros_like(device_scores, dtype=torch.bool).scatter(-1, chosen, True)
        allowed = allowed.repeat_interleave(scores.shape[-1] // choice.n_group, dim=-1)
        open_ = scores.masked_fill(~allowed, -torch.inf)
    ids = open_.topk(choice.k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if choice.scaling is None:
        return normed, ids, weights / weights.sum(dim=-1, keepdim=True), scores
    return normed, ids, weights * choice.scaling, scores


@jit
def norm_route_kernel(
    x, norm_weight, router, normed, ids, weights, scores, arrivals, x_b, width, experts, eps, scaling,
    k, n_group, topk_group, experts_each,
    NORM: tl.constexpr, NORMALISE: tl.constexpr, GROUPED: tl.constexpr, EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The affinities of one token to some experts; the program that finishes last chooses among all."""
    begin(OVERLAP)
    b = tl.program_id(0)
    column, one = tl.arange(0, WIDTH), tl.arange(0, ROWS)
    is_column = column < width
    first = tl.program_id(1) * experts_each
    last = tl.minimum(first + experts_each, experts)
    row = tl.load(x + b * x_b + column, mask=is_column, other=0.0)
    router_at = router + one[:, None] * width + column
    # Loaded before it is needed: while the norm waits for its sum, the first rows arrive.
    e = tl.load(router_at + first * width, mask=(first + one[:, None] < last) & is_column, other=0.0)
    normalised = row
    if NORM:
        gain = tl.load(norm_weight + column, mask=is_column, other=0.0)
        normalised = normalise(row, gain, width, eps)
        if tl.program_id(1) == 0:
            tl.store(normed + b * width + column, normalised, mask=is_column)
    for start in range(first, last, ROWS):
        products = tl.sum(e.to(tl.float32) * normalised.to(tl.float32), 1)
        tl.store(scores + b * experts + start + one, products, mask=start + one < last)
        following = start + ROWS
        is_row = following + one[:, None] < last
        e = tl.load(router_at + following * width, mask=is_row & is_column, other=0.0)
    tl.debug_barrier()  # all threads have written before one of them says so
    arrived = tl.atomic_add(arrivals + b, 1, sem="acq_rel")
    if arrived == tl.num_programs(1) - 1:
        tl.store(arrivals + b, 0)
        choose(
            ids, weights, scores, b, experts, scaling, k, n_group, topk_group,
            NORMALISE, GROUPED, EXPERTS, GROUPS,
        )  # fmt: skip


@jit
def choose(
    ids, weights, scores, b, experts, scaling, k, n_group, topk_group,
    NORMALISE: tl.constexpr, GROUPED: tl.constexpr, EXPERTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Softmax over a token's products, which stand in `scores`, and the k best experts.

    An expert's rank is how many are better, or as good and before it: all ranks are found at once.
    """
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < experts
    at = scores + b * experts + expert
    logits = tl.load(at, mask=is_expert, other=-float("inf"), cache_modifier=".cg")  # others wrote them
    powers = tl.exp(logits - tl.max(logits, 0))
    score = powers / tl.sum(powers, 0)
    # NaN is unlike itself and larger than nothing: left in, experts would share a rank, or have none.
    open_ = tl.where(is_expert, tl.where(score == score, score, 0.0), -1.0)
    if GROUPED:  # a device is as good as its best expert
        group = tl.arange(0, GROUPS)
        mine = expert // (experts // n_group)
        best = tl.max(tl.where(mine[:, None] == group, open_[:, None], -1.0), 0)
        best = tl.where(group < n_group, best, -2.0)
        better = ranks(best, group, GROUPS)
        place = tl.sum(tl.where(mine[:, None] == group, better, 0), 1)
        open_ = tl.where(place < topk_group, open_, tl.minimum(open_, -0.5))
    place = ranks(open_, expert, EXPERTS)
    chosen = place < k
    weight = score * scaling
    if NORMALISE:
        weight = score / tl.sum(tl.where(chosen, score, 0.0), 0)
    tl.debug_barrier()  # every thread has read the products
    tl.store(at, score, mask=is_expert)
    tl.store(ids + b * k + place, expert.to(tl.int64), mask=chosen)
    tl.store(weights + b * k + place, weight, mask=chosen)


@jit
def ranks(value, index, COUNT: tl.constexpr):
    """How many values are larger than each, or equal and before it."""
    other = tl.reshape(value, (COUNT, 1))
    before = tl.reshape(index, (COUNT, 1)) < index[None, :]
    ahead = (other > value[None, :]) | ((other == value[None, :]) & before)
    return tl.sum(ahead.to(tl.int32), 0)


# ------------------------------------------------------------------------------------------- experts


def experts_few(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """g_k FFN_k(x) of every chosen expert, then FFN of every shared one: (B, K + S, D) float32, not added up.

    x: (B, D), normalised; expert_ids, each from 0 to E - 1, and weights: (B, K). w_gate_up: (E, 2 I, D), gate
    rows first; w_down: (E, D, I). shared_gate_up: (2 S I, D), all gate rows first; shared_down: (D, S I).
    `add_norm` adds the summands, always in this order, so that no result depends on chance.
    """
    if not uses_kernels(x):
        return experts_reference(x, expert_ids, weights, w_gate_up, w_down, shared_gate_up, shared_down)
    return launch_experts(x, expert_ids, weights, w_gate_up, w_down, shared_gate_up, shared_down)


def experts_reference(x, expert_ids, weights, w_gate_up, w_down, shared_gate_up=None, shared_down=None):
    """What `experts_few` computes, in plain PyTorch: one pair at a time."""
    batch, k = expert_ids.shape
    width = w_down.shape[-1]
    shared = 0 if shared_down is None else shared_down.shape[-1] // width
    out = x.new_zeros(batch, k + shared, x.shape[-1], dtype=torch.float32)
    for b in range(batch):
        for i, e in enumerate(expert_ids[b].tolist()):
            out[b, i] = weights[b, i] * (swiglu(x[b] @ w_gate_up[e].mT) @ w_down[e].mT)
    for s in range(shared):
        piece = slice(s * width, (s + 1) * width)
        gate, up = (half[piece] for half in shared_gate_up.chunk(2))
        out[:, k + s] = swiglu(x @ torch.cat((gate, up)).mT) @ shared_down[:, piece].mT
    return out


def launch_experts(x, expert_ids, weights, w_gate_up, w_down, shared_gate_up=None, shared_down=None):
    """Run the two kernels."""
    batch, k = expert_ids.shape
    experts, hidden, width = w_down.shape
    shared = 0 if shared_down is None else shared_down.shape[-1] // width
    # One place for each expert, or for each pair where those are fewer: its first pair stands for an expert.
    by_pair = batch * k < experts
    places = (batch * k if by_pair else experts) + shared
    order, starts = (expert_ids, expert_ids) if by_pair else sort_pairs(expert_ids, experts)
    inner = x.new_empty(batch, k + shared, width)
    out = x.new_empty(batch, k + shared, hidden, dtype=torch.float32)
    up, down = choose_expert_blocks(batch, places, x.element_size())
    common = dict(
        BY_PAIR=by_pair, PAIRS=max(triton.next_power_of_2(batch * k), 16) if by_pair else 16,
        SUMMANDS=k + shared, K=k,
        **overlap(x.device),
    )  # fmt: skip
    gate_up_kernel[(ceil_div(width, up["ROWS"]), places)](
        x, order, starts, w_gate_up, shared_gate_up if shared else w_gate_up, inner,
        x.stride(0), *w_gate_up.stride()[:2], shared_gate_up.stride(0) if shared else 0,
        batch, experts, hidden, width, shared * width, places - shared,
        EVEN=width % up["ROWS"] == 0 and hidden % up["COLUMNS"] == 0, **up, **common,
    )  # fmt: skip
    down_kernel[(ceil_div(hidden, down["ROWS"]), places)](
        inner, order, starts, weights, w_down, shared_down if shared else w_down, out,
        *w_down.stride()[:2], shared_down.stride(0) if shared else 0,
        batch, experts, hidden, width, places - shared,
        EVEN=hidden % down["ROWS"] == 0 and width % down["COLUMNS"] == 0, **down, **common,
    )  # fmt: skip
    return out


def choose_expert_blocks(batch: int, places: int, itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tokens, and rows and columns of the weights' tile, in a program of each kernel.

    Of 64 tokens rarely more than 16 choose the same expert; where they do, its weights are read once more,
    from the cache. The first kernel holds two tiles, the gate's and up's. A single expert, which a dense
    network is, takes few rows a program, so that there are programs enough.
    """
    tokens = 16 if batch <= 64 else 32 if batch <= 128 else 64
    common = {"TOKENS": tokens, "COLUMNS": 256 // itemsize, "STAGES": 4, "num_warps": 4}
    down_rows = 16 if places == 1 else 64 if tokens == 16 else 32
    return {"ROWS": 32, **common}, {"ROWS": down_rows, **common}


@jit
def gate_up_kernel(
    x, order, starts, w_gate_up, shared_gate_up, inner, x_b, w_e, w_row, shared_row,
    batch, experts, hidden, width, shared_width, routed,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    BY_PAIR: tl.constexpr, PAIRS: tl.constexpr, SUMMANDS: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up in ROWS of an expert's inner channels, for all tokens that chose it."""
    begin(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1)
    expert, before, count = tokens_of(place, order, starts, batch, routed, BY_PAIR, PAIRS, K)
    is_row = row < width
    column = tl.arange(0, COLUMNS)
    if place < routed:
        gate_at = w_gate_up + expert.to(tl.int64) * w_e + row[:, None] * w_row + column
        up_at = gate_at + width * w_row
    else:
        gate_at = shared_gate_up + ((place - routed) * width + row[:, None]) * shared_row + column
        up_at = gate_at + shared_width * shared_row
    for first in range(0, count, TOKENS):
        token, summand, there = pairs_at(
            place, first, before, count, order, routed, TOKENS, BY_PAIR, PAIRS, K
        )
        x_at = x + token[:, None] * x_b + column
        gate = tl.zeros((TOKENS, ROWS), tl.float32)
        up = tl.zeros((TOKENS, ROWS), tl.float32)
        for start in tl.range(0, hidden, COLUMNS, num_stages=STAGES):
            if EVEN:
                a = tl.load(x_at + start, mask=there[:, None], other=0.0)
                g = tl.load(gate_at + start)
                u = tl.load(up_at + start)
            else:
                is_column = start + column < hidden
                a = tl.load(x_at + start, mask=there[:, None] & is_column, other=0.0)
                g = tl.load(gate_at + start, mask=is_row[:, None] & is_column, other=0.0)
                u = tl.load(up_at + start, mask=is_row[:, None] & is_column, other=0.0)
            gate = tl.dot(a, g.T, gate, input_precision="ieee")
            up = tl.dot(a, u.T, up, input_precision="ieee")
        product = gate / (1.0 + tl.exp(-gate)) * up
        at = inner + (token * SUMMANDS + summand)[:, None] * width + row
        tl.store(at, product.to(inner.dtype.element_ty), mask=there[:, None] & is_row)


@jit
def down_kernel(
    inner, order, starts, weights, w_down, shared_down, out, w_e, w_row, shared_row,
    batch, experts, hidden, width, routed,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    BY_PAIR: tl.constexpr, PAIRS: tl.constexpr, SUMMANDS: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """ROWS of an expert's outputs, for all tokens that chose it, times their weights."""
    begin(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1)
    expert, before, count = tokens_of(place, order, starts, batch, routed, BY_PAIR, PAIRS, K)
    is_row = row < hidden
    column = tl.arange(0, COLUMNS)
    if place < routed:
        down_at = w_down + expert.to(tl.int64) * w_e + row[:, None] * w_row + column
    else:
        down_at = shared_down + row[:, None] * shared_row + (place - routed) * width + column
    for first in range(0, count, TOKENS):
        token, summand, there = pairs_at(
            place, first, before, count, order, routed, TOKENS, BY_PAIR, PAIRS, K
        )
        inner_at = inner + (token * SUMMANDS + summand)[:, None] * width + column
        total = tl.zeros((TOKENS, ROWS), tl.float32)
        for start in tl.range(0, width, COLUMNS, num_stages=STAGES):
            if EVEN:
                a = tl.load(inner_at + start, mask=there[:, None], other=0.0)
                w = tl.load(down_at + start)
            else:
                is_column = start + column < width
                a = tl.load(inner_at + start, mask=there[:, None] & is_column, other=0.0)
                w = tl.load(down_at + start, mask=is_row[:, None] & is_column, other=0.0)
            total = tl.dot(a, w.T, total, input_precision="ieee")
        if place < routed:
            total *= tl.load(weights + token * K + summand, mask=there, other=0.0)[:, None]
        at = out + (token * SUMMANDS + summand)[:, None] * hidden + row
        tl.store(at, total, mask=there[:, None] & is_row)


@jit
def tokens_of(
    place, order, starts, batch, routed, BY_PAIR: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr
):
    """The expert of a place; where its pairs begin in `order`, or their ranks (-1: none); their number."""
    if BY_PAIR:  # `order` is the ids as they are; an expert's first pair does the work of all
        pair = tl.arange(0, PAIRS)
        ids = tl.load(order + pair, mask=pair < batch * K, other=-1).to(tl.int32)
        expert = tl.sum(tl.where(pair == place, ids, 0), 0)
        chose = (ids == expert) & (expert >= 0)
        earlier = tl.sum((chose & (pair < place)).to(tl.int32), 0)
        count = tl.where(earlier > 0, 0, tl.sum(chose.to(tl.int32), 0))
        before = tl.where(chose, tl.cumsum(chose.to(tl.int32), 0) - 1, -1)
    else:
        expert = place
        before, count = 0, 0
        if place < routed:
            before = tl.load(starts + place)
            count = tl.load(starts + place + 1) - before
    count = tl.where(place < routed, count, batch)  # a shared expert takes every token
    return expert, before, count


@jit
def pairs_at(
    place, first, before, count, order, routed,
    TOKENS: tl.constexpr, BY_PAIR: tl.constexpr, PAIRS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The tokens at ranks first, first + 1, ...; which of their summands this is; whether there are such."""
    wanted = first + tl.arange(0, TOKENS)
    there = wanted < count
    if BY_PAIR:
        found = tl.sum(tl.where(before[None, :] == wanted[:, None], tl.arange(0, PAIRS)[None, :], 0), 1)
    else:
        found = tl.load(order + before + wanted, mask=wanted < tl.where(place < routed, count, 0), other=0)
    token = tl.where(place < routed, found // K, wanted)
    summand = tl.where(place < routed, found % K, K + place - routed)
    return token, summand, there


def sort_pairs(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The pairs ordered by expert, and where each expert's begin: (B K,) and (E + 1,), int32.

    Expert e's are order[starts[e] : starts[e + 1]], tokens in their own order.
    """
    pairs = expert_ids.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=expert_ids.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=expert_ids.device)
    sort_kernel[(ceil_div(pairs + experts + 1, 16),)](
        expert_ids, order, starts, pairs, experts, QUERIES=16, CHUNK=128, **overlap(expert_ids.device)
    )
    return order, starts


@jit
def sort_kernel(
    expert_ids,
    order,
    starts,
    pairs,
    experts,
    QUERIES: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A pair's place is how many come before it: those of lower experts, and earlier ones of its own."""
    begin(OVERLAP)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    is_pair = query < pairs
    expert = tl.where(is_pair, tl.load(expert_ids + query, mask=is_pair, other=0).to(tl.int32), query - pairs)
    earlier_than = tl.where(is_pair, query, 0)  # an expert begins before all of its pairs
    place = tl.zeros((QUERIES,), tl.int32)
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        ids = tl.load(expert_ids + pair, mask=pair < pairs, other=2**30).to(tl.int32)
        lower = ids[None, :] < expert[:, None]
        earlier = (ids[None, :] == expert[:, None]) & (pair[None, :] < earlier_than[:, None])
        place += tl.sum((lower | earlier).to(tl.int32), 1)
    tl.store(order + place, query, mask=is_pair)
    tl.store(starts + (query - pairs), place, mask=(query >= pairs) & (query - pairs <= experts))
