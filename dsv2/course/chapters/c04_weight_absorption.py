"""The exercises of chapter 04: cases, right answers, plausible mistakes, hints."""

# B batch   T tokens (queries)   S cached tokens (keys)   H heads
# C kv_lora_rank (the latent)    R qk_rope_head_dim       N qk_nope_head_dim   V v_head_dim

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv2.attention.mla import absorb_query, absorbed_attention, expand_output
from dsv2.course.spec import Case, Exercise, Mistake

NEVER = float("-inf")


def random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers in each of the shapes, the same ones each time."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def causal(tokens: int, keys: int, diagonal: int = 0) -> Tensor:
    """(1, tokens, keys), True where a query may look; the queries are the last tokens. diagonal: a shift."""
    return torch.ones(1, tokens, keys, dtype=torch.bool).tril(keys - tokens + diagonal)


def square(weight: Tensor, action: str) -> Tensor:
    """The weight turned per head; only a square one has the same shape afterwards."""
    if weight.shape[1] != weight.shape[2]:
        raise RuntimeError(f"{action}: the sizes {weight.shape[1]} and {weight.shape[2]} do not fit")
    return weight.mT


# ------------------------------------------------------------ 04.1 W^UK to the query


def query_case(seed: int, batch: int, tokens: int, heads: int, nope: int, latent: int) -> dict[str, Tensor]:
    q_nope, w_uk = random(seed, (batch, tokens, heads, nope), (heads, nope, latent))
    return {"q_nope": q_nope, "w_uk": w_uk}


def misread(x: Tensor) -> Tensor:
    """(B, T, H, X) read as (B, H, T, X) without moving anything, then turned to (B, T, H, X)."""
    batch, tokens, heads, width = x.shape
    return x.reshape(batch, heads, tokens, width).transpose(1, 2)


ABSORB_QUERY = Exercise(
    number="04.1",
    name="absorb_query",
    title="the query takes W^UK over",
    difficulty=1,
    minutes=10,
    answer=absorb_query,
    cases=(
        Case(
            "2 texts of 3 tokens, 5 heads; keys of 4 (nope), latents of 6",
            lambda: query_case(1, 2, 3, 5, 4, 6),
        ),
        Case(
            "1 text of 4 tokens, 3 heads; keys of 5 and latents of 5: a wrong axis does not show in the "
            "shape",
            lambda: query_case(2, 1, 4, 3, 5, 5),
        ),
        Case("3 texts, 1 new token, 2 heads; keys of 7, latents of 3", lambda: query_case(3, 3, 1, 2, 7, 3)),
    ),
    mistakes=(
        Mistake(
            "summed over the latent",
            "This is W^UK q, not its transpose times q: it only fits while keys and latents are equally "
            "wide. The query is as wide as a key, so the sum has to run over the key's numbers.",
            lambda q_nope, w_uk: torch.einsum("bthn,hnc->bthc", q_nope, square(w_uk, "W^UK times q")),
        ),
        Mistake(
            "reshaped, not transposed",
            "This is what comes out when W^UK's numbers are read in order as (latent, nope). A reshape "
            "keeps the order in memory and mixes rows with columns; a transpose exchanges them.",
            lambda q_nope, w_uk: torch.einsum(
                "bthn,hcn->bthc", q_nope, w_uk.reshape(w_uk.shape[0], w_uk.shape[2], w_uk.shape[1])
            ),
        ),
        Mistake(
            "inverse",
            "This is the (pseudo-)inverse of W^UK times the query. It looks for the latent whose key is the "
            "query; a score asks how the query's product with a key can be had from the latent.",
            lambda q_nope, w_uk: torch.einsum("bthn,hcn->bthc", q_nope, torch.linalg.pinv(w_uk)),
        ),
        Mistake(
            "first head's matrix",
            "This is what comes out when every head uses head 0's W^UK. The latents are shared by all "
            "heads, the matrices are not: that is what makes their keys different.",
            lambda q_nope, w_uk: torch.einsum("bthn,nc->bthc", q_nope, w_uk[0]),
        ),
        Mistake(
            "heads added up",
            "This is the sum over all heads, the same for each of them. There is one sequence of latents, "
            "but every head asks it a question of its own.",
            lambda q_nope, w_uk: (
                torch.einsum("bthn,hnc->btc", q_nope, w_uk)[:, :, None]
                .expand(-1, -1, w_uk.shape[0], -1)
                .clone()
            ),
        ),
        Mistake(
            "no axis for the heads",
            "The heads were added up, and their axis is gone. There is one sequence of latents, but every "
            "head asks it a question of its own.",
            lambda q_nope, w_uk: torch.einsum("bthn,hnc->btc", q_nope, w_uk),
        ),
        Mistake(
            "tokens met with heads",
            "A product by @ pairs the axes that stand before the last two: here the tokens of the query "
            "with the heads of W^UK. The heads of both have to be paired.",
            lambda q_nope, w_uk: q_nope @ w_uk,
        ),
        Mistake(
            "scaled already",
            "This is the right query divided by the square root of its width. The scale belongs to the "
            "score, where it multiplies the rotary part as well; here it would act twice.",
            lambda q_nope, w_uk: absorb_query(q_nope, w_uk) / q_nope.shape[-1] ** 0.5,
        ),
        Mistake(
            "tokens and heads confused",
            "This is what comes out when the axes of tokens and heads are exchanged by reshaping. The shape "
            "is right, and the matrices meet queries of other heads.",
            lambda q_nope, w_uk: absorb_query(misread(q_nope), w_uk),
        ),
    ),
    hints=(
        "A key is W^UK c. Write the score q . (W^UK c) as a double sum over the key's numbers n and the "
        "latent's numbers c. Which of the two sums can you carry out before you know the latent?",
        'The notebook\'s section "The query takes W^UK over" does it for one head: (W^UK)^T q. Shapes: '
        "(batch, tokens, heads, nope) and (heads, nope, latent) give (batch, tokens, heads, latent).",
        "for every text b, token t, head h and number c of the latent:\n"
        "    result[b, t, h, c] = sum over n of q_nope[b, t, h, n] * w_uk[h, n, c]\n"
        "torch.einsum takes this line nearly as it stands: one letter an axis, the summed one left out at "
        "the end",
    ),
    checked="every head with its own matrix, the axis that the sum runs over (also where both have one "
    "size), several texts and tokens",
    axes=("text", "token", "head", "latent number"),
    replaces=("dsv2.attention.mla.absorb_query",),
)


# ------------------------------------------------------------ 04.2 attention on the latents


def latent_case(
    seed: int, batch: int, tokens: int, keys: int, heads: int, widths: tuple[int, int], **more: Any
) -> dict[str, Any]:
    latent, rope = widths
    q_latent, q_rope, c, k_rope = random(
        seed,
        (batch, tokens, heads, latent),
        (batch, tokens, heads, rope),
        (batch, keys, latent),
        (batch, keys, rope),
    )
    # A scale that is not 1 / sqrt of any width at hand: DeepSeek-V2's is not either.
    return {
        "q_latent": q_latent,
        "q_rope": q_rope,
        "latent": c,
        "k_rope": k_rope,
        "scale": 0.45,
        "mask": None,
    } | more


def different_lengths(batch: int, tokens: int, keys: int) -> Tensor:
    """(batch, tokens, keys): the texts have different lengths, as with padding."""
    lengths = keys - torch.arange(batch)
    position = lengths[:, None] - tokens + torch.arange(tokens)
    return torch.arange(keys) <= position[..., None]


def attend(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    scale: float,
    mask: Tensor | None = None,
    *,
    rotary: float = 1.0,
    nope: float = 1.0,
    hidden: float = NEVER,
    over: int = -1,
    values: Callable[[Tensor, Tensor], Tensor] = lambda latent, k_rope: latent,
) -> Tensor:
    """The mistakes' attention. rotary, nope: factors of the two parts of a score."""
    scores = nope * torch.einsum("bthc,bsc->bhts", q_latent, latent)
    scores = scale * (scores + rotary * torch.einsum("bthr,bsr->bhts", q_rope, k_rope))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], hidden)
    weights = scores.softmax(dim=over)
    return torch.einsum("bhts,bsc->bthc", weights, values(latent, k_rope))


def confused_output(*arguments: Any, **named: Any) -> Tensor:
    """The right numbers, of (batch, heads, tokens), handed out as (batch, tokens, heads)."""
    out = absorbed_attention(*arguments, **named)
    return out.transpose(1, 2).reshape(out.shape)


def masked_after(q_latent, q_rope, latent, k_rope, scale, mask=None):
    scores = torch.einsum("bthc,bsc->bhts", q_latent, latent) + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)
    weights = (scale * scores).softmax(dim=-1)
    if mask is not None:
        weights = weights * mask[:, None]
    return torch.einsum("bhts,bsc->bthc", weights, latent)


def softmax_of_each_part(q_latent, q_rope, latent, k_rope, scale, mask=None):
    total = 0
    for q, k in ((q_latent, latent), (q_rope, k_rope)):
        scores = scale * torch.einsum("bthx,bsx->bhts", q, k)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], NEVER)
        total = total + scores.softmax(dim=-1) / 2
    return torch.einsum("bhts,bsc->bthc", total, latent)


ABSORBED_ATTENTION = Exercise(
    number="04.2",
    name="absorbed_attention",
    title="attention on the latents",
    difficulty=2,
    minutes=20,
    answer=absorbed_attention,
    cases=(
        Case(
            "2 texts, 1 new token that sees all 6 cached ones (no mask), 3 heads; latents of 5, rotary keys "
            "of 4",
            lambda: latent_case(4, 2, 1, 6, 3, (5, 4)),
        ),
        Case(
            "2 texts, 3 new tokens among 7, one mask for both texts, 4 heads; latents of 6, rotary keys of 2",
            lambda: latent_case(5, 2, 3, 7, 4, (6, 2), mask=causal(3, 7)),
        ),
        Case(
            "3 texts of different lengths (a mask for each), 2 new tokens, 8 slots, 5 heads; latents of 3, "
            "rotary keys of 6",
            lambda: latent_case(6, 3, 2, 8, 5, (3, 6), mask=different_lengths(3, 2, 8)),
        ),
    ),
    mistakes=(
        Mistake(
            "rotary part left out",
            "This is attention by the latents alone. They hold no position; without q_rope . k_rope the "
            "model cannot tell the order of the words before it.",
            lambda *a, **b: attend(*a, **b, rotary=0.0),
        ),
        Mistake(
            "rotary part alone",
            "This is attention by the rotary keys alone. They hold the position and little of the content; "
            "the score is the sum of both products.",
            lambda *a, **b: attend(*a, **b, nope=0.0),
        ),
        Mistake(
            "rotary part not scaled",
            "This is what comes out when only the latents' part of the score is scaled. The two parts are "
            "one product of vectors, cut in two; both belong into the bracket.",
            lambda q_latent, q_rope, latent, k_rope, scale, mask=None: attend(
                q_latent, q_rope, latent, k_rope, scale, mask, rotary=1 / scale
            ),
        ),
        Mistake(
            "latent part not scaled",
            "This is what comes out when only the rotary part of the score is scaled. The two parts are one "
            "product of vectors, cut in two; both belong into the bracket.",
            lambda q_latent, q_rope, latent, k_rope, scale, mask=None: attend(
                q_latent, q_rope, latent, k_rope, scale, mask, nope=1 / scale
            ),
        ),
        Mistake(
            "scaled by the latent's width",
            "This is what comes out when scores are divided by sqrt(latent + rope) and `scale` is not used. "
            "The scale is that of the keys which are never built, sqrt(d_h + d_h^R), and only the caller "
            "knows it.",
            lambda q_latent, q_rope, latent, k_rope, scale, mask=None: attend(
                q_latent, q_rope, latent, k_rope, (latent.shape[-1] + k_rope.shape[-1]) ** -0.5, mask
            ),
        ),
        Mistake(
            "scale forgotten",
            "This is what comes out when scores are not multiplied by `scale`. They are then too large, and "
            "the softmax too sharp.",
            lambda q_latent, q_rope, latent, k_rope, scale, mask=None: attend(
                q_latent, q_rope, latent, k_rope, 1.0, mask
            ),
        ),
        Mistake(
            "scale used twice",
            "This is what comes out when scores are multiplied by `scale` twice. It belongs there once, on "
            "the sum of both parts.",
            lambda q_latent, q_rope, latent, k_rope, scale, mask=None: attend(
                q_latent, q_rope, latent, k_rope, scale * scale, mask
            ),
        ),
        Mistake(
            "mask not used",
            "This is what comes out when every query sees every slot. New tokens would look into their own "
            "future, and into the empty slots of shorter texts.",
            lambda q_latent, q_rope, latent, k_rope, scale, mask=None: attend(
                q_latent, q_rope, latent, k_rope, scale
            ),
        ),
        Mistake(
            "mask turned round",
            "This is what comes out when scores are hidden where the mask is True. Here True means that a "
            "query may look.",
            lambda q_latent, q_rope, latent, k_rope, scale, mask=None: attend(
                q_latent, q_rope, latent, k_rope, scale, None if mask is None else ~mask
            ),
        ),
        Mistake(
            "mask of zeros",
            "This is what comes out when hidden scores are set to 0. The softmax gives a score of 0 the "
            "weight of exp(0), and hidden tokens still count.",
            lambda *a, **b: attend(*a, **b, hidden=0.0),
        ),
        Mistake(
            "masked after the softmax",
            "This is what comes out when hidden weights are set to 0 after the softmax. The weights that "
            "are left then add up to less than 1.",
            masked_after,
        ),
        Mistake(
            "a softmax for each part",
            "This is the mean of two attentions, one by latents and one by rotary keys. A weight comes from "
            "the sum of both scores: a token has to fit by content and by place together.",
            softmax_of_each_part,
        ),
        Mistake(
            "rotary keys among the values",
            "This result is as wide as latent and rotary key together. The rotary key says where a token "
            "stands; what is handed on are values, and they come from the latent alone.",
            lambda *a, **b: attend(
                *a, **b, values=lambda latent, k_rope: torch.cat((latent, k_rope), dim=-1)
            ),
        ),
        Mistake(
            "softmax over the heads",
            "This is what comes out when the softmax runs over the heads. The weights of one query in one "
            "head, over the cached tokens, have to add up to 1.",
            lambda *a, **b: attend(*a, **b, over=1),
        ),
        Mistake(
            "softmax over the queries",
            "This is what comes out when the softmax runs over the new tokens. The weights of one query in "
            "one head, over the cached tokens, have to add up to 1.",
            lambda *a, **b: attend(*a, **b, over=2),
        ),
        Mistake(
            "tokens and heads confused",
            "These are the right numbers in the wrong places: (heads, tokens) were handed out as (tokens, "
            "heads) by reshaping. Axes have to be transposed.",
            confused_output,
        ),
    ),
    hints=(
        "How many scores are there for one text, with 4 heads, 3 new and 7 cached tokens? And which of the "
        "four tensors have an axis for the heads?",
        'The notebook\'s section "Attention on the latents" does this for one new token of a real model. '
        "Scores have the shape (batch, heads, tokens, keys); `mask` (1 or batch, tokens, keys) needs one "
        "axis more.",
        "scores = scale * (q_latent . latent + q_rope . k_rope): einsum bthc, bsc -> bhts, twice, then "
        "the sum\n"
        "if there is a mask: scores where it is False = -infinity (give the mask an axis for the heads)\n"
        "weights = softmax over the keys\n"
        "result = weights * latent: einsum bhts, bsc -> bthc",
    ),
    checked="both parts of the score under one scale, masks for one and for all texts, none at all, and a "
    "mixture of latents for every head",
    axes=("text", "token", "head", "latent number"),
    replaces=("dsv2.attention.mla.absorbed_attention",),
)


# ------------------------------------------------------------ 04.3 W^UV behind the softmax


def output_case(seed: int, batch: int, tokens: int, heads: int, value: int, latent: int) -> dict[str, Tensor]:
    o_latent, w_uv = random(seed, (batch, tokens, heads, latent), (heads, value, latent))
    return {"o_latent": o_latent, "w_uv": w_uv}


EXPAND_OUTPUT = Exercise(
    number="04.3",
    name="expand_output",
    title="W^UV waits until the end",
    difficulty=1,
    minutes=5,
    answer=expand_output,
    cases=(
        Case(
            "2 texts of 3 tokens, 5 heads; values of 4, latents of 6", lambda: output_case(7, 2, 3, 5, 4, 6)
        ),
        Case(
            "1 text of 4 tokens, 3 heads; values of 5 and latents of 5: a wrong axis does not show in the "
            "shape",
            lambda: output_case(8, 1, 4, 3, 5, 5),
        ),
        Case(
            "3 texts, 1 new token, 2 heads; values of 7, latents of 3", lambda: output_case(9, 3, 1, 2, 7, 3)
        ),
    ),
    mistakes=(
        Mistake(
            "summed over the value",
            "This is the transpose of W^UV times the mixture: it only fits while values and latents are "
            "equally wide. W^UK goes over to the other side of a product and is turned; W^UV stays on its "
            "side.",
            lambda o_latent, w_uv: expand_output(o_latent, square(w_uv, "the transpose of W^UV")),
        ),
        Mistake(
            "reshaped, not transposed",
            "This is what comes out when W^UV's numbers are read in order as (latent, v_dim). A reshape "
            "keeps the order in memory and mixes rows with columns; a transpose exchanges them.",
            lambda o_latent, w_uv: torch.einsum(
                "bthc,hcv->bthv", o_latent, w_uv.reshape(w_uv.shape[0], w_uv.shape[2], w_uv.shape[1])
            ),
        ),
        Mistake(
            "first head's matrix",
            "This is what comes out when every head uses head 0's W^UV. The heads mix the same latents; "
            "what they read out of the mixture is each one's own.",
            lambda o_latent, w_uv: torch.einsum("bthc,vc->bthv", o_latent, w_uv[0]),
        ),
        Mistake(
            "matrices averaged",
            "This is what comes out when every head uses the mean of all heads' W^UV. The heads mix the "
            "same latents; what they read out of the mixture is each one's own.",
            lambda o_latent, w_uv: torch.einsum("bthc,vc->bthv", o_latent, w_uv.mean(dim=0)),
        ),
        Mistake(
            "heads added up",
            "This is the sum over all heads, the same for each of them. W^O adds the heads up, later, and "
            "gives each a part of its own.",
            lambda o_latent, w_uv: (
                torch.einsum("bthc,hvc->btv", o_latent, w_uv)[:, :, None]
                .expand(-1, -1, w_uv.shape[0], -1)
                .clone()
            ),
        ),
        Mistake(
            "tokens and heads confused",
            "This is what comes out when the axes of tokens and heads are exchanged by reshaping. The shape "
            "is right, and the matrices meet mixtures of other heads.",
            lambda o_latent, w_uv: expand_output(misread(o_latent), w_uv),
        ),
    ),
    hints=(
        "W^UV makes a value of 4 numbers out of a latent of 6. Its shape is (4, 6). Which of its axes meets "
        "the mixture of latents?",
        'In the notebook, "W^UV waits" does it for one head. Shapes: (batch, tokens, heads, latent) and '
        "(heads, v_dim, latent) give (batch, tokens, heads, v_dim).",
        "for every text b, token t, head h and number v of the value:\n"
        "    result[b, t, h, v] = sum over c of w_uv[h, v, c] * o_latent[b, t, h, c]\n"
        "as an einsum: bthc, hvc -> bthv",
    ),
    checked="every head with its own matrix, the axis that the sum runs over (also where both have one "
    "size), several texts and tokens",
    axes=("text", "token", "head", "number of the value"),
    replaces=("dsv2.attention.mla.expand_output",),
)


# ------------------------------------------------------------ 04.4 multiply-adds

V2 = {"latent": 512, "rope": 64, "nope": 128, "value": 128}
UNEVEN = {"latent": 20, "rope": 3, "nope": 7, "value": 11}


def multiply_adds(
    tokens: int, keys: int, *, latent: int, rope: int, nope: int, value: int
) -> tuple[int, int]:
    """Right."""
    matrices = (nope + value) * latent
    return (
        keys * matrices + tokens * keys * (nope + rope + value),
        tokens * matrices + tokens * keys * (2 * latent + rope),
    )


def causal_pairs(tokens: int, keys: int) -> int:
    """The pairs of query and key that a causal mask leaves."""
    return tokens * keys - tokens * (tokens - 1) // 2


MULTIPLY_ADDS = Exercise(
    number="04.4",
    name="multiply_adds",
    title="counting both forms",
    difficulty=1,
    minutes=10,
    answer=multiply_adds,
    cases=(
        Case(
            "decoding: 1 token against 4,096 with DeepSeek-V2's sizes",
            lambda: {"tokens": 1, "keys": 4096, **V2},
        ),
        Case(
            "a prompt: 2,048 tokens against themselves, DeepSeek-V2's sizes",
            lambda: {"tokens": 2048, "keys": 2048, **V2},
        ),
        Case(
            "5 tokens against 13; latents of 20, rotary part 3, nope 7, values 11",
            lambda: {"tokens": 5, "keys": 13, **UNEVEN},
        ),
    ),
    mistakes=(
        Mistake(
            "attention only",
            "These are scores and sums alone, without W^UK and W^UV. The matrices have to be applied "
            "somewhere: to every cached token, or to every query and output.",
            lambda tokens, keys, latent, rope, nope, value: (
                tokens * keys * (nope + rope + value),
                tokens * keys * (2 * latent + rope),
            ),
        ),
        Mistake(
            "absorption for free",
            "The absorbed form lacks W^UK on the queries and W^UV on the outputs. That is little beside a "
            "long cache, and not nothing.",
            lambda tokens, keys, latent, rope, nope, value: (
                multiply_adds(tokens, keys, latent=latent, rope=rope, nope=nope, value=value)[0],
                tokens * keys * (2 * latent + rope),
            ),
        ),
        Mistake(
            "one query only",
            "The absorbed form applies W^UK and W^UV here once, as if there were one query. Each new token "
            "brings a query, and gets an output, of its own.",
            lambda tokens, keys, latent, rope, nope, value: (
                multiply_adds(tokens, keys, latent=latent, rope=rope, nope=nope, value=value)[0],
                (nope + value) * latent + tokens * keys * (2 * latent + rope),
            ),
        ),
        Mistake(
            "one cached token only",
            "The expanded form rebuilds here the key and the value of one token. Each cached token has a "
            "latent, and all of them are needed.",
            lambda tokens, keys, latent, rope, nope, value: (
                (nope + value) * latent + tokens * keys * (nope + rope + value),
                multiply_adds(tokens, keys, latent=latent, rope=rope, nope=nope, value=value)[1],
            ),
        ),
        Mistake(
            "rebuilds the new tokens only",
            "The expanded form rebuilds here the keys and values of the new tokens only. The cache holds "
            "latents, so those of every cached token are missing as well.",
            lambda tokens, keys, latent, rope, nope, value: (
                tokens * (nope + value) * latent + tokens * keys * (nope + rope + value),
                multiply_adds(tokens, keys, latent=latent, rope=rope, nope=nope, value=value)[1],
            ),
        ),
        Mistake(
            "rebuilt for every query",
            "The expanded form rebuilds here all keys and values for each query anew. Once they are there, "
            "all queries of the call share them: that is why this form suits long prompts.",
            lambda tokens, keys, latent, rope, nope, value: (
                tokens * keys * ((nope + value) * latent + nope + rope + value),
                multiply_adds(tokens, keys, latent=latent, rope=rope, nope=nope, value=value)[1],
            ),
        ),
        Mistake(
            "rotary part left out",
            "The scores lack their rotary part, in both forms. It is short, but a product all the same.",
            lambda tokens, keys, latent, rope, nope, value: multiply_adds(
                tokens, keys, latent=latent, rope=0, nope=nope, value=value
            ),
        ),
        Mistake(
            "rotary part rebuilt",
            "The expanded form makes the rotary key out of the latent here. It is cached as it is: W^UK "
            "makes the part without rotation only.",
            lambda tokens, keys, latent, rope, nope, value: (
                keys * (nope + rope + value) * latent + tokens * keys * (nope + rope + value),
                multiply_adds(tokens, keys, latent=latent, rope=rope, nope=nope, value=value)[1],
            ),
        ),
        Mistake(
            "rotary part among the values",
            "The rotary part is counted once more in what is added up. It decides on the weights; the "
            "values, and the mixture of latents, do not contain it.",
            lambda tokens, keys, latent, rope, nope, value: (
                keys * (nope + value) * latent + tokens * keys * (nope + 2 * rope + value),
                tokens * (nope + value) * latent + tokens * keys * (2 * latent + 2 * rope),
            ),
        ),
        Mistake(
            "latents once",
            "The absorbed form counts the latents' width once. They are met twice: as keys for the scores, "
            "as values for the mixture.",
            lambda tokens, keys, latent, rope, nope, value: (
                multiply_adds(tokens, keys, latent=latent, rope=rope, nope=nope, value=value)[0],
                tokens * (nope + value) * latent + tokens * keys * (latent + rope),
            ),
        ),
        Mistake(
            "no rotary part in the expanded scores",
            "The expanded form's scores lack their rotary part. A key is as wide as both of its parts.",
            lambda tokens, keys, latent, rope, nope, value: (
                keys * (nope + value) * latent + tokens * keys * (nope + value),
                tokens * (nope + value) * latent + tokens * keys * (2 * latent + rope),
            ),
        ),
        Mistake(
            "no rotary part in the absorbed scores",
            "The absorbed form's scores lack their rotary part. The latents hold no position, so the rotary "
            "key is met here as well.",
            lambda tokens, keys, latent, rope, nope, value: (
                keys * (nope + value) * latent + tokens * keys * (nope + rope + value),
                tokens * (nope + value) * latent + tokens * keys * 2 * latent,
            ),
        ),
        Mistake(
            "rotary part through a matrix in both forms",
            "Both forms put the rotary part through a matrix here. It is cached as it is and belongs to no "
            "matrix: W^UK makes the part without rotation only.",
            lambda tokens, keys, latent, rope, nope, value: (
                keys * (nope + rope + value) * latent + tokens * keys * (nope + rope + value),
                tokens * (nope + rope + value) * latent + tokens * keys * (2 * latent + rope),
            ),
        ),
        Mistake(
            "W^UK alone",
            "Both forms apply W^UK here and leave out W^UV. Values come from the latents as well.",
            lambda tokens, keys, latent, rope, nope, value: (
                keys * nope * latent + tokens * keys * (nope + rope + value),
                tokens * nope * latent + tokens * keys * (2 * latent + rope),
            ),
        ),
        Mistake(
            "half of the pairs",
            "Only half of the pairs of query and key are counted, as if a mask saved the others. The "
            "exercise says that each query meets all `keys`.",
            lambda tokens, keys, latent, rope, nope, value: (
                keys * (nope + value) * latent + tokens * keys * (nope + rope + value) // 2,
                tokens * (nope + value) * latent + tokens * keys * (2 * latent + rope) // 2,
            ),
        ),
        Mistake(
            "pairs that a causal mask leaves",
            "Only the pairs that a causal mask leaves are counted. The exercise says that each query meets "
            "all `keys`.",
            lambda tokens, keys, latent, rope, nope, value: (
                keys * (nope + value) * latent + causal_pairs(tokens, keys) * (nope + rope + value),
                tokens * (nope + value) * latent + causal_pairs(tokens, keys) * (2 * latent + rope),
            ),
        ),
        Mistake(
            "FLOPs",
            "This is twice the number: it counts FLOPs. A multiply-add is two of them.",
            lambda tokens, keys, latent, rope, nope, value: tuple(
                2 * n for n in multiply_adds(tokens, keys, latent=latent, rope=rope, nope=nope, value=value)
            ),
        ),
        Mistake(
            "forms exchanged",
            "These are the right two numbers in the wrong order. The expanded form comes first.",
            lambda tokens, keys, latent, rope, nope, value: multiply_adds(
                tokens, keys, latent=latent, rope=rope, nope=nope, value=value
            )[::-1],
        ),
    ),
    hints=(
        "One cached token costs a head 320 multiply-adds in the expanded form of DeepSeek-V2 and 1,088 in "
        "the absorbed one, if that were all. What else happens once per cached token in one form, and once "
        "per query in the other?",
        'The table in the notebook\'s section "What each form costs" has the four terms: one with `keys`, '
        "one with `tokens`, two with tokens * keys. W^UK is (nope, latent), W^UV (value, latent).",
        "matrices = numbers in W^UK + numbers in W^UV\n"
        "expanded = keys * matrices   + tokens * keys * (width of a key + width of a value)\n"
        "absorbed = tokens * matrices + tokens * keys * (width of latent and rotary key + width of a "
        "latent)\n"
        "return (expanded, absorbed)",
    ),
    checked="decoding and a prompt with DeepSeek-V2's sizes, and sizes that all differ",
)


# ------------------------------------------------------------ 04.5 break-even


def bound(
    keys: int, latent: int, nope: int, value: int, *, more: int = 0, free: bool = False
) -> tuple[int, int]:
    """The absorbed form is cheaper while tokens * second < first.

    more: further multiply-adds of a query and a key; free: absorption is not counted.
    """
    matrices = (nope + value) * latent
    return keys * matrices, (0 if free else matrices) + keys * (2 * latent - nope - value + more)


def most_absorbed_tokens(keys: int, *, latent: int, rope: int, nope: int, value: int, **changes: Any) -> int:
    """Right, but for the changes, see `bound`."""
    first, second = bound(keys, latent, nope, value, **changes)
    return keys if second <= 0 else min((first - 1) // second, keys)


def with_bound(count: Callable[[int, int, int], Any]) -> Callable[..., Any]:
    """A mistake: what it makes of the two sides of the right inequality and the keys."""

    def answer(keys: int, *, latent: int, rope: int, nope: int, value: int) -> Any:
        return count(*bound(keys, latent, nope, value), keys)

    return answer


# 2 * 8 < 10 + 8: such narrow latents cost less to attend to than keys and values.
NARROW = {"latent": 8, "rope": 2, "nope": 10, "value": 8}

MOST_ABSORBED_TOKENS = Exercise(
    number="04.5",
    name="most_absorbed_tokens",
    title="when to expand after all",
    difficulty=2,
    minutes=20,
    answer=most_absorbed_tokens,
    cases=(
        Case("DeepSeek-V2's sizes, 1 million cached tokens", lambda: {"keys": 1_000_000, **V2}),
        Case(
            "DeepSeek-V2's sizes, 512 cached tokens: both forms cost the same somewhere",
            lambda: {"keys": 512, **V2},
        ),
        Case(
            "90 cached tokens; latents of 20, rotary part 3, nope 7, values 11",
            lambda: {"keys": 90, **UNEVEN},
        ),
        Case(
            "50 cached tokens; latents of 8, nope 10, values 8: latents narrower than key and value",
            lambda: {"keys": 50, **NARROW},
        ),
        Case("the same with 200 cached tokens", lambda: {"keys": 200, **NARROW}),
        Case(
            "DeepSeek-V2's sizes, 1 token and nothing before it: the expanded form is cheaper even then",
            lambda: {"keys": 1, **V2},
        ),
    ),
    mistakes=(
        Mistake(
            "the limit of a long cache",
            "This is right for an endless cache only: the matrices' work on queries and outputs is left "
            "out. With few cached tokens that work is a large part of the absorbed form's.",
            lambda keys, **sizes: most_absorbed_tokens(keys, **sizes, free=True),
        ),
        Mistake(
            "a tie counted as a win",
            "This also counts the number of tokens at which both forms take equally many multiply-adds. "
            "There the absorbed form is not cheaper.",
            with_bound(lambda first, second, keys: keys if second <= 0 else min(first // second, keys)),
        ),
        Mistake(
            "rounded up",
            "This is the first number of tokens at which the absorbed form is no longer cheaper. Asked for "
            "is the last one at which it is.",
            with_bound(lambda first, second, keys: keys if second <= 0 else min(-(-first // second), keys)),
        ),
        Mistake(
            "not a whole number",
            "This is the point where the two costs meet, with its fraction. Asked for is a number of "
            "tokens: the last whole one before that point.",
            with_bound(lambda first, second, keys: float(keys) if second <= 0 else min(first / second, keys)),
        ),
        Mistake(
            "rotary part in one form only",
            "This counts the rotary part in the absorbed form's scores and not in the expanded one's. Both "
            "multiply the same rotary queries with the same rotary keys.",
            lambda keys, **sizes: most_absorbed_tokens(keys, **sizes, more=sizes["rope"]),
        ),
        Mistake(
            "latents once",
            "This counts the latents' width once in the absorbed form. They are met twice: as keys for the "
            "scores, as values for the mixture.",
            lambda keys, **sizes: most_absorbed_tokens(keys, **sizes, more=-sizes["latent"]),
        ),
        Mistake(
            "rebuilds the new tokens only",
            "Here the expanded form rebuilds only the new tokens, as if the cache held keys and values. It "
            "holds latents: all cached tokens have to be rebuilt.",
            lambda keys, *, latent, rope, nope, value: keys if 2 * latent < nope + value else 0,
        ),
        Mistake(
            "rebuilt for every query",
            "Here the expanded form rebuilds everything for each query anew, so that it never wins. All "
            "queries of a call share what is rebuilt once.",
            lambda keys, **sizes: keys,
        ),
        Mistake(
            "more tokens than there are",
            "This gives more new tokens than there are keys. The new tokens are among the cached ones, so "
            "that the answer is at most `keys`.",
            with_bound(lambda first, second, keys: keys if second <= 0 else (first - 1) // second),
        ),
        Mistake(
            "at least one",
            "This never gives less than 1. With a single key, both forms apply the matrices once, and the "
            "longer scores decide: then the absorbed form is not cheaper even for one token.",
            with_bound(
                lambda first, second, keys: keys if second <= 0 else max(1, min((first - 1) // second, keys))
            ),
        ),
        Mistake(
            "one cached token rebuilt",
            "Here the expanded form rebuilds the key and the value of one token. Each cached token has a "
            "latent, and all of them are needed.",
            with_bound(
                lambda first, second, keys: keys if second <= 0 else min((first // keys - 1) // second, keys)
            ),
        ),
        Mistake(
            "divided by a negative number",
            "This is right as long as attending to latents costs more than attending to keys and values. "
            "With latents so narrow that it costs less, the inequality has no upper end: absorbed always "
            "wins.",
            with_bound(lambda first, second, keys: max(min((first - 1) // second, keys), 0)),
        ),
    ),
    hints=(
        "Both counts of 04.4 are straight lines in the number of new tokens: one starts high and rises "
        "slowly, the other starts at 0 and rises fast. Where do they cross, and can it happen that they do "
        "not?",
        'The notebook\'s section "Where each form wins" draws the two lines. Write absorbed < expanded and '
        "bring everything with `tokens` to one side; what does the sign of its factor say? A loop over "
        "tokens = 1 .. keys works too.",
        "matrices = (nope + value) * latent\n"
        "factor = matrices + keys * (2 * latent - nope - value)\n"
        "absorbed is cheaper while tokens * factor < keys * matrices\n"
        "if factor is 0 or less: always, so return keys\n"
        "otherwise the largest whole number really below keys * matrices / factor, and at most keys",
    ),
    checked="long and short caches, a tie, a single key, and latents so narrow that the absorbed form always "
    "wins",
)


# ------------------------------------------------------------ 04.6 bug hunt: a decoding step


def step_case(
    seed: int, batch: int, tokens: int, keys: int, heads: int, widths: tuple[int, int, int, int]
) -> dict[str, Tensor]:
    latent, rope, nope, value = widths
    q_nope, q_rope, c, k_rope, w_uk, w_uv = random(
        seed,
        (batch, tokens, heads, nope),
        (batch, tokens, heads, rope),
        (batch, keys, latent),
        (batch, keys, rope),
        (heads, nope, latent),
        (heads, value, latent),
    )
    # As after training: keys and values about as large as the queries.
    return {
        "q_nope": 1.5 * q_nope,
        "q_rope": 1.5 * q_rope,
        "latent": c,
        "k_rope": k_rope,
        "w_uk": w_uk / latent**0.5,
        "w_uv": w_uv / latent**0.5,
    }


def decode_step(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    width: Callable[[int, int, int], int] = lambda nope, rope, latent: nope + rope,
    diagonal: int = 0,
    swapped: bool = False,
    values: Callable[[Tensor, Tensor], Tensor] = lambda latent, k_rope: latent,
) -> Tensor:
    """Right, but for width: of the vectors that the scale is taken from; diagonal: moves the mask.

    swapped: the query's two parts stand in the other order than the row's; values: what is averaged.
    """
    scale = width(q_nope.shape[-1], q_rope.shape[-1], latent.shape[-1]) ** -0.5
    mask = causal(q_nope.shape[1], latent.shape[1], diagonal)
    parts = (absorb_query(q_nope, w_uk), q_rope)
    query, row = torch.cat(parts[::-1] if swapped else parts, dim=-1), torch.cat((latent, k_rope), dim=-1)
    scores = scale * torch.einsum("bthx,bsx->bhts", query, row)
    weights = scores.masked_fill(~mask[:, None], NEVER).softmax(dim=-1)
    return expand_output(torch.einsum("bhts,bsc->bthc", weights, values(latent, k_rope)), w_uv)


def first_of_the_row(latent: Tensor, k_rope: Tensor) -> Tensor:
    """As many numbers as a latent has, from the beginning of a row that begins with the rotary key."""
    return torch.cat((k_rope, latent), dim=-1)[..., : latent.shape[-1]]


def mask_from_the_first_key(q_nope, q_rope, latent, k_rope, w_uk, w_uv):
    diagonal = q_nope.shape[1] - latent.shape[1]
    return decode_step(q_nope, q_rope, latent, k_rope, w_uk, w_uv, diagonal=diagonal)


DECODE_STEP = Exercise(
    number="04.6",
    name="decode_step",
    title="one row for each cached token",
    difficulty=2,
    minutes=15,
    answer=decode_step,
    cases=(
        Case(
            "2 texts, 1 new token among 7, 3 heads; latents of 10, rotary part 2, nope 4, values 5",
            lambda: step_case(10, 2, 1, 7, 3, (10, 2, 4, 5)),
        ),
        Case(
            "1 text, 3 new tokens among 6, 4 heads; latents of 9, rotary part 6, nope 3, values 7",
            lambda: step_case(11, 1, 3, 6, 4, (9, 6, 3, 7)),
        ),
        Case(
            "3 texts, 5 new tokens and nothing before them, 2 heads; latents of 6, rotary part 4, nope 8, "
            "values 3",
            lambda: step_case(12, 3, 5, 5, 2, (6, 4, 8, 3)),
        ),
    ),
    mistakes=(
        Mistake(
            "rotary key among the values",
            "The attention's weights are right; what they mix is not. It begins with the rotary key, and as "
            "many numbers are missing at the latent's end: its place in the row is another one.",
            lambda *a, **b: decode_step(*a, **b, values=first_of_the_row),
        ),
        Mistake(
            "query and row in different orders",
            "The two parts stand in one order in the query and in the other order in the row. The sums of "
            "the widths agree, so nothing complains, but latent and rotary part are multiplied.",
            lambda *a, **b: decode_step(*a, **b, swapped=True),
        ),
        Mistake(
            "scaled by the latent's width",
            "The scores are divided by sqrt(latent + rope), the width of the vectors that are multiplied. "
            "They still are the scores of keys of nope + rope numbers, computed another way; scaled down "
            "this much, the attention is too even.",
            lambda *a, **b: decode_step(*a, **b, width=lambda nope, rope, latent: latent + rope),
        ),
        Mistake(
            "rotary part not in the scale",
            "The scores are divided by sqrt(d_h) only. The rotary part has d_h^R dimensions more, and they "
            "add to the score as well.",
            lambda *a, **b: decode_step(*a, **b, width=lambda nope, rope, latent: nope),
        ),
        Mistake(
            "no scale",
            "The scores are not divided by anything. They are then too large, and the softmax nearly picks "
            "a single token.",
            lambda *a, **b: decode_step(*a, **b, width=lambda nope, rope, latent: 1),
        ),
        Mistake(
            "scaled by the width, not its root",
            "The scores are divided by d_h + d_h^R itself. A sum of n products of unit size is only about "
            "sqrt(n) large.",
            lambda *a, **b: decode_step(*a, **b, width=lambda nope, rope, latent: (nope + rope) ** 2),
        ),
        Mistake(
            "scaled by the latent's width alone",
            "The scores are divided by the root of the latent's width. Neither the keys they stand for nor "
            "the vectors they are computed from have that width.",
            lambda *a, **b: decode_step(*a, **b, width=lambda nope, rope, latent: latent),
        ),
        Mistake(
            "cannot see itself",
            "Each query sees only the keys before its own position. A token attends to itself too; the "
            "first one of a text would otherwise see nothing at all.",
            lambda *a, **b: decode_step(*a, **b, diagonal=-1),
        ),
        Mistake(
            "sees one token ahead",
            "Each query also sees the key behind its own position. While writing, that token does not exist "
            "yet.",
            lambda *a, **b: decode_step(*a, **b, diagonal=1),
        ),
        Mistake(
            "mask from the first key",
            "Query t sees keys 0..t, as if nothing stood before the new tokens. They are the last tokens of "
            "the text.",
            mask_from_the_first_key,
        ),
        Mistake(
            "first head's W^UV",
            "Every head uses head 0's W^UV. The heads mix the same latents; what they read out of the "
            "mixture is each one's own.",
            lambda q_nope, q_rope, latent, k_rope, w_uk, w_uv: decode_step(
                q_nope, q_rope, latent, k_rope, w_uk, w_uv[:1].expand_as(w_uv)
            ),
        ),
    ),
    hints=(
        "Let one query see a single token: its weight is 1, whatever the score. The output is then W^UV "
        "times what? Compare that with the worked number in the docstring.",
        "The given line before last takes the latents out of the rows. A row is (rope + latent) numbers "
        "wide: write down, for rope 2 and latent 3, which numbers stand where.",
        "a row is [rotary key, latent], so the latent is what comes after the first `rope` numbers\n"
        "rope is the last axis of k_rope; from there on, to the end of the row",
    ),
    checked="query and row in one order, the latents alone as values, the scale of the keys that are never "
    "built, one new token and several, with and without others before them",
    axes=("text", "token", "head", "number of the value"),
    given="rotary key among the values",
)


EXERCISES: tuple[Exercise, ...] = (
    ABSORB_QUERY,
    ABSORBED_ATTENTION,
    EXPAND_OUTPUT,
    MULTIPLY_ADDS,
    MOST_ABSORBED_TOKENS,
    DECODE_STEP,
)
