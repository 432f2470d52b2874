"""The exercises of chapter 02: cases, right answers, plausible mistakes, hints."""

# B batch   T tokens   S keys   H heads   D hidden   C latent   R rope   N nope   V value

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv2.attention.baselines import grouped_attention
from dsv2.attention.mla import expand_keys_values
from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.layers import rms_norm
from dsv2.rope import rope_frequencies, rotate_pairs


def random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers in each of the shapes, the same ones each time."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# ------------------------------------------------------------------------------- 02.1 the best short vector


def factors_case(
    seed: int, heads: int, nope: int, value: int, hidden: int, rank: int, keys: float = 1.0
) -> dict[str, Any]:
    w_k, w_v = random(seed, (heads, nope, hidden), (heads, value, hidden))
    return {"w_k": keys * w_k, "w_v": w_v, "rank": rank}


def multiply_out(answer: Callable[..., Any], case: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of the three factors, and what they make of W_K and W_V: the factors themselves are free."""
    factors = answer(**case)
    if not (isinstance(factors, (tuple, list)) and len(factors) == 3):
        raise TypeError(
            f"low_rank_factors is to return three matrices, w_dkv, w_uk, w_uv; it returned {type(factors)}"
        )
    w_dkv, w_uk, w_uv = factors
    result: dict[str, Any] = {
        f"shape of {name}": str(tuple(factor.shape))
        for name, factor in zip(("w_dkv", "w_uk", "w_uv"), factors)
    }
    fit = w_dkv.ndim == 2 and w_uk.ndim == w_uv.ndim == 3 and w_uk.shape[-1] == w_uv.shape[-1] == len(w_dkv)
    result["w_uk @ w_dkv"] = w_uk @ w_dkv if fit else "cannot be multiplied"
    result["w_uv @ w_dkv"] = w_uv @ w_dkv if fit else "cannot be multiplied"
    return result


def factors(
    w_k: Tensor,
    w_v: Tensor,
    rank: int,
    *,
    keep: Callable[[Tensor, int], Tensor] = lambda s, rank: torch.arange(len(s)) < rank,
    up: Callable[[Tensor, Tensor], Tensor] = lambda u, s: u * s,
    down: Callable[[Tensor, Tensor], Tensor] = lambda s, vh: vh,
) -> tuple[Tensor, Tensor, Tensor]:
    """Right by default; the mistakes change which directions are kept and where their sizes go."""
    u, s, vh = torch.linalg.svd(torch.cat([w_k.flatten(0, 1), w_v.flatten(0, 1)]), full_matrices=False)
    kept = keep(s, rank)
    both, down_ = up(u, s)[:, kept], down(s[:, None], vh)[kept]
    up_k, up_v = both.split([w_k[..., 0].numel(), w_v[..., 0].numel()])
    return down_, up_k.unflatten(0, w_k.shape[:2]), up_v.unflatten(0, w_v.shape[:2])


def each_alone(w_k: Tensor, w_v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Half of the numbers for the keys and half for the values."""
    nothing_k, nothing_v = w_k[:0], w_v[:0]
    of_keys, of_values = rank // 2, rank - rank // 2
    down_k, up_k, _ = factors(w_k, nothing_v, of_keys)
    down_v, _, up_v = factors(nothing_k, w_v, of_values)
    return (
        torch.cat([down_k, down_v]),
        torch.cat([up_k, up_k.new_zeros(*up_k.shape[:2], of_values)], dim=-1),
        torch.cat([up_v.new_zeros(*up_v.shape[:2], of_keys), up_v], dim=-1),
    )


def fitted_to(which: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The directions of the keys (or values) alone; the other one is projected on them."""

    def answer(w_k: Tensor, w_v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        chosen = w_k if which == "keys" else w_v
        _, _, vh = torch.linalg.svd(chosen.flatten(0, 1), full_matrices=False)
        down = vh[:rank]
        return down, w_k @ down.T, w_v @ down.T

    return answer


def columns_of_vh(w_k: Tensor, w_v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """vh taken for v: its first columns instead of its first rows."""
    u, s, vh = torch.linalg.svd(torch.cat([w_k.flatten(0, 1), w_v.flatten(0, 1)]), full_matrices=False)
    up_k, up_v = (u * s)[:, :rank].split([w_k[..., 0].numel(), w_v[..., 0].numel()])
    return vh[:, :rank].T, up_k.unflatten(0, w_k.shape[:2]), up_v.unflatten(0, w_v.shape[:2])


def heads_dealt_out(w_k: Tensor, w_v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows given back as if the heads ran fastest."""
    down, up_k, up_v = factors(w_k, w_v, rank)

    def dealt(up: Tensor) -> Tensor:
        return up.flatten(0, 1).unflatten(0, (up.shape[1], up.shape[0])).transpose(0, 1)

    return down, dealt(up_k), dealt(up_v)


def two_decompositions(w_k: Tensor, w_v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The keys' way down, and ways up from the keys' own and the values' own decomposition."""
    down, up_k, _ = factors(w_k, w_v[:0], rank)
    _, _, up_v = factors(w_k[:0], w_v, rank)
    return down, up_k, up_v


def split_in_another_order(w_k: Tensor, w_v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked head by head, split as if all keys stood first."""
    u, s, vh = torch.linalg.svd(torch.cat([w_k, w_v], dim=1).flatten(0, 1), full_matrices=False)
    up_k, up_v = (u * s)[:, :rank].split([w_k[..., 0].numel(), w_v[..., 0].numel()])
    return vh[:rank], up_k.unflatten(0, w_k.shape[:2]), up_v.unflatten(0, w_v.shape[:2])


def heads_left_together(w_k: Tensor, w_v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    down, up_k, up_v = factors(w_k, w_v, rank)
    return down, up_k.flatten(0, 1), up_v.flatten(0, 1)


LOW_RANK_FACTORS = Exercise(
    number="02.1",
    name="low_rank_factors",
    title="the best short vector",
    difficulty=2,
    minutes=10,
    answer=factors,
    run=multiply_out,
    cases=(
        Case(
            "3 heads, keys of 4 and values of 5, a hidden state of 7, rank 4",
            lambda: factors_case(1, 3, 4, 5, 7, 4),
        ),
        Case(
            "2 heads, keys of 3 and values of 2, a hidden state of 11, rank 2; keys three times as large",
            lambda: factors_case(2, 2, 3, 2, 11, 2, keys=3.0),
        ),
        Case(
            "4 heads, keys of 2 and values of 3, a hidden state of 9, rank 6; keys half as large",
            lambda: factors_case(3, 4, 2, 3, 9, 6, keys=0.5),
        ),
    ),
    mistakes=(
        Mistake(
            "keys and values apart",
            "This is what comes out when half of the numbers serve the keys and half the values. Both are "
            "made from the same hidden state, and numbers that serve both do more with the same memory.",
            each_alone,
        ),
        Mistake(
            "fitted to the keys",
            "This is what comes out when the short vector is chosen for the keys alone and the values have "
            "to take what it holds. The task asks for the smallest error of both together.",
            fitted_to("keys"),
        ),
        Mistake(
            "fitted to the values",
            "This is what comes out when the short vector is chosen for the values alone and the keys have "
            "to take what it holds. The task asks for the smallest error of both together.",
            fitted_to("values"),
        ),
        Mistake(
            "smallest kept",
            "This is what comes out when the smallest singular values are kept. They stand at the end; what "
            "matters most stands first.",
            lambda w_k, w_v, rank: factors(
                w_k, w_v, rank, keep=lambda s, r: torch.arange(len(s)) >= len(s) - r
            ),
        ),
        Mistake(
            "singular values forgotten",
            "This is what comes out when the singular values are left out of the product. The columns of u "
            "and the rows of vh all have length 1; the sizes are in s alone.",
            lambda w_k, w_v, rank: factors(w_k, w_v, rank, up=lambda u, s: u),
        ),
        Mistake(
            "singular values twice",
            "This is what comes out when both sides are multiplied by the singular values. In the product "
            "each of them then counts squared.",
            lambda w_k, w_v, rank: factors(w_k, w_v, rank, down=lambda s, vh: s * vh),
        ),
        Mistake(
            "columns of vh",
            "This is what comes out when columns are taken from vh. torch.linalg.svd gives the third factor "
            "transposed already; its directions are rows.",
            columns_of_vh,
        ),
        Mistake(
            "heads dealt in turn",
            "This is what comes out when the rows go back to the heads like cards dealt in turn. They were "
            "stacked head by head, all rows of a head together.",
            heads_dealt_out,
        ),
        Mistake(
            "two decompositions",
            "The keys and the values each had a decomposition of their own, but there is only one way down, "
            "the keys'. The values' way up belongs to other directions than those that it is given.",
            two_decompositions,
        ),
        Mistake(
            "stacked in one order, split in another",
            "The rows were stacked head by head, keys and values of a head together, and split as if the "
            "keys of all heads stood first. The order at the split is that of the stacking.",
            split_in_another_order,
        ),
        Mistake(
            "heads not apart",
            "The two ways up have all heads' rows in one axis. They are to have an axis for the heads, as "
            "w_k and w_v have.",
            heads_left_together,
        ),
        Mistake(
            "nothing left out",
            "These factors restore keys and values exactly, because none of the directions was left out. The "
            "short vector is to have `rank` numbers.",
            lambda w_k, w_v, rank: factors(w_k, w_v, len(w_k[0, 0])),
        ),
    ),
    hints=(
        "Every key and every value of a token is some matrix times the same hidden state. What single matrix "
        "makes all of them at once, and what is the best approximation of a matrix by one of lower rank?",
        'In the notebook, "One matrix for all" stacks them, and the theory says what the SVD leaves out. '
        "Stacked, the shape is (heads * nope + heads * value, hidden).",
        "stacked = rows of w_k (heads * nope of them), then rows of w_v (heads * value)\n"
        "u, s, vh = torch.linalg.svd(stacked, full_matrices=False)\n"
        "w_dkv = the first `rank` rows of vh\n"
        "up = the first `rank` columns of u, each times its s\n"
        "split up into the rows of the keys and those of the values; unflatten(0, (heads, ...)) each",
    ),
    checked="the products with w_dkv, for keys and values of different widths and sizes; the three factors "
    "may be any that give them",
    axes={
        "w_uk @ w_dkv": ("head", "nope", "hidden"),
        "w_uv @ w_dkv": ("head", "value", "hidden"),
    },
    tolerance=1e-4,
)


# ------------------------------------------------------------------------------------------- 02.2 compress


def compress_case(
    seed: int, batch: int, tokens: int, hidden: int, latent: int, rope: int, size: float = 1.0, **more: float
) -> dict[str, Any]:
    x, w_dkv, gain = random(seed, (batch, tokens, hidden), (latent + rope, hidden), (latent,))
    return {"x": size * x, "w_dkv": w_dkv, "gain": 1 + gain / 2, **more}


def compress(x: Tensor, w_dkv: Tensor, gain: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Right."""
    latent, k_rope = (x @ w_dkv.T).split([len(gain), len(w_dkv) - len(gain)], dim=-1)
    return rms_norm(latent, gain, eps), k_rope


def compress_with(
    norm: Callable[[Tensor, Tensor, float], Tensor],
    key: Callable[[Tensor, float], Tensor] = lambda k_rope, eps: k_rope,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A mistake: norm(latent, gain, eps) and what becomes of the key."""

    def answer(x: Tensor, w_dkv: Tensor, gain: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
        latent, k_rope = (x @ w_dkv.T).split([len(gain), len(w_dkv) - len(gain)], dim=-1)
        return norm(latent, gain, eps), key(k_rope, eps)

    return answer


def whole_normalised(x: Tensor, w_dkv: Tensor, gain: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    both = x @ w_dkv.T
    both = rms_norm(both, torch.ones(both.shape[-1]), eps)
    latent, k_rope = both.split([len(gain), len(w_dkv) - len(gain)], dim=-1)
    return gain * latent, k_rope


def key_first(x: Tensor, w_dkv: Tensor, gain: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    k_rope, latent = (x @ w_dkv.T).split([len(w_dkv) - len(gain), len(gain)], dim=-1)
    return rms_norm(latent, gain, eps), k_rope


def input_normalised(x: Tensor, w_dkv: Tensor, gain: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    normed = rms_norm(x, torch.ones(x.shape[-1]), eps)
    latent, k_rope = (normed @ w_dkv.T).split([len(gain), len(w_dkv) - len(gain)], dim=-1)
    return gain * latent, k_rope


def divided(latent: Tensor, gain: Tensor, mean_square: Tensor, eps: float) -> Tensor:
    return gain * latent / (mean_square + eps).sqrt()


COMPRESS = Exercise(
    number="02.2",
    name="compress",
    title="a token's latent and the key beside it",
    difficulty=1,
    minutes=5,
    answer=compress,
    cases=(
        Case(
            "2 texts of 3 tokens, a hidden state of 7, a latent of 5, a rotary key of 4",
            lambda: compress_case(4, 2, 3, 7, 5, 4),
        ),
        Case(
            "3 texts of 2 tokens, a hidden state of 5, a latent of 6, a rotary key of 2; tiny numbers, where "
            "eps counts",
            lambda: compress_case(5, 3, 2, 5, 6, 2, size=3e-4),
        ),
        Case(
            "1 text of 4 tokens, a hidden state of 6, a latent of 3, a rotary key of 5; eps is 0.5",
            lambda: compress_case(13, 1, 4, 6, 3, 5, eps=0.5),
        ),
    ),
    mistakes=(
        Mistake(
            "not normalised",
            "The latent comes straight from the matrix. The paper puts an RMSNorm after it, which keeps its "
            "size steady in training.",
            compress_with(lambda latent, gain, eps: latent),
        ),
        Mistake(
            "gain not applied",
            "The latent is normalised and then left so. Each of its numbers has a learned factor, the gain.",
            compress_with(lambda latent, gain, eps: rms_norm(latent, torch.ones_like(gain), eps)),
        ),
        Mistake(
            "normalised as a whole",
            "The norm runs over the latent and the rotary key together. Only the latent is normalised, by "
            "its own size.",
            whole_normalised,
        ),
        Mistake(
            "key normalised too",
            "The latent is right and the rotary key has been normalised as well. It goes into the cache at "
            "the size that its matrix gives it.",
            compress_with(rms_norm, lambda k_rope, eps: rms_norm(k_rope, torch.ones(k_rope.shape[-1]), eps)),
        ),
        Mistake(
            "key's rows first",
            "The first rows were taken for the rotary key. The matrix begins with the latent's rows, and the "
            "key's stand below them.",
            key_first,
        ),
        Mistake(
            "input normalised",
            "The hidden state was normalised, not the latent. The layer's input has had its own norm before; "
            "this one comes after the compression.",
            input_normalised,
        ),
        Mistake(
            "mean taken off",
            "The mean was taken off the latent before it was divided, as LayerNorm does. RMSNorm only "
            "divides.",
            compress_with(
                lambda latent, gain, eps: rms_norm(latent - latent.mean(-1, keepdim=True), gain, eps)
            ),
        ),
        Mistake(
            "divided by the length",
            "The latent was divided by its length, the root of the sum of squares. The root of their mean is "
            "asked for, so that the numbers have size 1 however many there are.",
            compress_with(lambda c, gain, eps: divided(c, gain, c.square().sum(-1, keepdim=True), eps)),
        ),
        Mistake(
            "over the tokens",
            "The mean of squares runs over the tokens of the text. Each token is normalised by itself, or a "
            "token would change with those behind it.",
            compress_with(lambda c, gain, eps: divided(c, gain, c.square().mean(1, keepdim=True), eps)),
        ),
        Mistake(
            "one mean for all",
            "The mean of squares runs over everything at once. Each token is normalised by its own.",
            compress_with(lambda c, gain, eps: divided(c, gain, c.square().mean(), eps)),
        ),
        Mistake(
            "parts exchanged",
            "Both parts are right, and come in the other order. The latent is returned first.",
            lambda *a, **b: compress(*a, **b)[::-1],
        ),
        Mistake(
            "eps as a fixed number",
            "This is right as long as eps is 1e-6: the argument eps is not used. Other models have "
            "another one.",
            compress_with(lambda c, gain, eps: rms_norm(c, gain, 1e-6)),
        ),
        Mistake(
            "eps forgotten",
            "This is right for numbers of ordinary size and wrong for very small ones: eps was left out. It "
            "also keeps a latent of zeros from becoming NaN.",
            compress_with(lambda c, gain, eps: divided(c, gain, c.square().mean(-1, keepdim=True), 0.0)),
        ),
        Mistake(
            "eps outside the root",
            "This is right for numbers of ordinary size and wrong for very small ones: eps was added to the "
            "root. It is added to the mean square, inside.",
            compress_with(lambda c, gain, eps: gain * c / (c.square().mean(-1, keepdim=True).sqrt() + eps)),
        ),
    ),
    hints=(
        "The matrix has more rows than `gain` has numbers. What are the others for, and does the norm touch "
        "what they make?",
        '"Compress" in the notebook, and the two lines of the docstring. The mean runs over the last axis; '
        "keepdim=True leaves an axis of 1, so that the division fits.",
        "both = x @ w_dkv transposed\n"
        "latent = the first len(gain) numbers of each token, k_rope = the rest\n"
        "mean_square = mean of latent squared over the last axis, keepdim=True\n"
        "return gain * latent / sqrt(mean_square + eps), k_rope",
    ),
    checked="both parts, the norm of each token's latent with its gain, a key that is left alone, and eps",
    axes=(("text", "token", "latent"), ("text", "token", "rope")),
)


# --------------------------------------------------------------------------------------------- 02.3 expand


def expand_case(
    seed: int, batch: int, keys: int, heads: int, dims: tuple[int, int, int, int]
) -> dict[str, Tensor]:
    latent, rope, nope, value = dims
    shapes = (batch, keys, latent), (batch, keys, rope), (heads, nope, latent), (heads, value, latent)
    return dict(zip(("latent", "k_rope", "w_uk", "w_uv"), random(seed, *shapes)))


def expand(
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    up: Callable[[Tensor, Tensor], Tensor] = lambda c, w: torch.einsum("bsc,hnc->bshn", c, w),
    shared: Callable[[Tensor, int], Tensor] = lambda k, heads: k[:, :, None].expand(-1, -1, heads, -1),
    join: Callable[[Tensor, Tensor], Tensor] = lambda nope, rope: torch.cat([nope, rope], dim=-1),
) -> tuple[Tensor, Tensor]:
    """The mistakes' expansion: up(latent, weight), shared(k_rope, heads), join(both parts of the keys)."""
    return join(up(latent, w_uk), shared(k_rope, len(w_uk))), up(latent, w_uv)


def dealt_in_turn(c: Tensor, w: Tensor) -> Tensor:
    return (c @ w.flatten(0, 1).T).unflatten(-1, (w.shape[1], w.shape[0])).transpose(-1, -2)


def first_head_only(k: Tensor, heads: int) -> Tensor:
    return torch.cat([k[:, :, None], k.new_zeros(*k.shape[:2], heads - 1, k.shape[-1])], dim=2)


EXPAND = Exercise(
    number="02.3",
    name="expand_keys_values",
    title="every head's keys and values back",
    difficulty=1,
    minutes=5,
    answer=expand_keys_values,
    cases=(
        Case(
            "2 texts of 5 tokens, 3 heads; a latent of 6, a rotary key of 2, keys of 4, values of 7",
            lambda: expand_case(6, 2, 5, 3, (6, 2, 4, 7)),
        ),
        Case(
            "1 text of 3 tokens, 4 heads; a latent of 5, a rotary key of 6, keys and values of 2",
            lambda: expand_case(7, 1, 3, 4, (5, 6, 2, 2)),
        ),
    ),
    mistakes=(
        Mistake(
            "k^R first",
            "The keys have the rotary part in front. It belongs after the latent's part; the queries are "
            "built in that order too, and would meet the wrong numbers.",
            lambda *a, **b: expand(*a, **b, join=lambda nope, rope: torch.cat([rope, nope], dim=-1)),
        ),
        Mistake(
            "k^R left out",
            "The keys come from the latent alone. Each also needs the rotary part, which is cached beside "
            "the latent and carries the position.",
            lambda *a, **b: expand(*a, **b, join=lambda nope, rope: nope),
        ),
        Mistake(
            "k^R for the first head",
            "Only the first head has got the rotary key; the others have zeros. There is one such key, and "
            "all heads use it.",
            lambda *a, **b: expand(*a, **b, shared=first_head_only),
        ),
        Mistake(
            "k^R shared out",
            "The rotary key was divided by the number of heads. Sharing here means that every head has the "
            "whole of it.",
            lambda *a, **b: expand(
                *a, **b, shared=lambda k, heads: k[:, :, None].expand(-1, -1, heads, -1) / heads
            ),
        ),
        Mistake(
            "k^R of the first token",
            "Every key has the first token's rotary part. It is shared among the heads of a token, not among "
            "the tokens.",
            lambda *a, **b: expand(
                *a, **b, shared=lambda k, heads: k[:, :1, None].expand(-1, k.shape[1], heads, -1)
            ),
        ),
        Mistake(
            "heads dealt in turn",
            "The numbers went to the heads like cards dealt in turn. Flattened, the weight has all rows of "
            "the first head first, then those of the second.",
            lambda *a, **b: expand(*a, **b, up=dealt_in_turn),
        ),
        Mistake(
            "first head for all",
            "Every head uses the first head's matrix, so that all keys and all values are alike. The latent "
            "is shared; the matrices are each head's own.",
            lambda *a, **b: expand(
                *a, **b, up=lambda c, w: torch.einsum("bsc,hnc->bshn", c, w[:1].expand_as(w))
            ),
        ),
        Mistake(
            "normalised again",
            "The latent was normalised before it was expanded. What is cached is normalised already.",
            lambda *a, **b: expand(
                *a,
                **b,
                up=lambda c, w: torch.einsum("bsc,hnc->bshn", rms_norm(c, torch.ones(c.shape[-1])), w),
            ),
        ),
        Mistake(
            "keys and values exchanged",
            "W^UK has made the values and W^UV the keys. They are two different matrices, and may differ in "
            "size.",
            lambda latent, k_rope, w_uk, w_uv: expand(latent, k_rope, w_uv, w_uk),
        ),
    ),
    hints=(
        "What is different for every head: the latent, the matrices, the rotary key? Which axis has the "
        "result that neither latent nor k_rope has?",
        "Einsum by the letters in the docstring's shapes: latent b s c with w_uk h n c. For k_rope, look up "
        "`expand`: k_rope[:, :, None] has an axis of 1 where the heads belong.",
        "k_nope = einsum('bsc,hnc->bshn', latent, w_uk)\n"
        "v = the same with w_uv\n"
        "k_rope with an axis for the heads, expanded to as many as w_uk has\n"
        "k = cat([k_nope, that], along the last axis)\n"
        "return k, v",
    ),
    checked="keys and values of all heads, of different and of equal widths, with the shared rotary key "
    "after each key",
    axes=(("text", "token", "head", "nope+rope"), ("text", "token", "head", "value")),
    replaces=("dsv2.attention.mla.expand_keys_values",),
)


# -------------------------------------------------------------------------- 02.4 what stays in the cache


def latent_cache(
    layers: int, heads: int, head_dim: int, latent_dim: int, rope_dim: int
) -> tuple[int, float, float]:
    """Right."""
    own = latent_dim + rope_dim
    return own * layers, 2 * heads * head_dim / own, own / (2 * head_dim)


Sizes = Callable[[int, int, int, int, int], float]


def counted(
    total: Sizes = lambda layers, heads, d, c, r: (c + r) * layers,
    less: Sizes = lambda layers, heads, d, c, r: 2 * heads * d / (c + r),
    groups: Sizes = lambda layers, heads, d, c, r: (c + r) / (2 * d),
) -> Callable[..., tuple[float, float, float]]:
    """A mistake: one or several of the three counts changed."""

    def answer(layers: int, heads: int, head_dim: int, latent_dim: int, rope_dim: int):
        sizes = (layers, heads, head_dim, latent_dim, rope_dim)
        return total(*sizes), less(*sizes), groups(*sizes)

    return answer


LATENT_CACHE = Exercise(
    number="02.4",
    name="latent_cache",
    title="what stays in the cache",
    difficulty=1,
    minutes=5,
    answer=latent_cache,
    cases=(
        Case(
            "DeepSeek-V2: 60 layers, 128 heads of 128, latent 512, rotary key 64",
            lambda: {"layers": 60, "heads": 128, "head_dim": 128, "latent_dim": 512, "rope_dim": 64},
        ),
        Case(
            "DeepSeek-V2-Lite: 27 layers, 16 heads of 128, latent 512, rotary key 64",
            lambda: {"layers": 27, "heads": 16, "head_dim": 128, "latent_dim": 512, "rope_dim": 64},
        ),
        Case(
            "the course's model: 5 layers, 4 heads of 32, latent 64, rotary key 16",
            lambda: {"layers": 5, "heads": 4, "head_dim": 32, "latent_dim": 64, "rope_dim": 16},
        ),
    ),
    mistakes=(
        Mistake(
            "rotary key forgotten",
            "These are the numbers for the latent alone. The shared rotary key is cached beside it: it comes "
            "from the hidden state and cannot be had from the latent.",
            counted(
                lambda layers, heads, d, c, r: c * layers,
                lambda layers, heads, d, c, r: 2 * heads * d / c,
                lambda layers, heads, d, c, r: c / (2 * d),
            ),
        ),
        Mistake(
            "a rotary key of every head",
            "These are the numbers if every head had a rotary key of its own. All heads share one; that is "
            "why it may be cached.",
            counted(
                lambda layers, heads, d, c, r: (c + heads * r) * layers,
                lambda layers, heads, d, c, r: 2 * heads * d / (c + heads * r),
                lambda layers, heads, d, c, r: (c + heads * r) / (2 * d),
            ),
        ),
        Mistake(
            "two latents",
            "These are the numbers with a latent for the keys and another for the values. Both are made from "
            "one.",
            counted(
                lambda layers, heads, d, c, r: (2 * c + r) * layers,
                lambda layers, heads, d, c, r: 2 * heads * d / (2 * c + r),
                lambda layers, heads, d, c, r: (2 * c + r) / (2 * d),
            ),
        ),
        Mistake(
            "one layer",
            "The first number is that of a single layer. Every layer has latents of its own.",
            counted(total=lambda layers, heads, d, c, r: c + r),
        ),
        Mistake(
            "MHA without values",
            "MHA and GQA were counted with their keys alone. Both cache a key and a value for each of their "
            "heads.",
            counted(
                less=lambda layers, heads, d, c, r: heads * d / (c + r),
                groups=lambda layers, heads, d, c, r: (c + r) / d,
            ),
        ),
        Mistake(
            "the ratio without values",
            "MHA was counted with its keys alone. It caches a key and a value for each head.",
            counted(less=lambda layers, heads, d, c, r: heads * d / (c + r)),
        ),
        Mistake(
            "one layer against all",
            "MHA's numbers of one layer were divided by MLA's of all layers. Both have the same layers, so "
            "they cancel.",
            counted(less=lambda layers, heads, d, c, r: 2 * heads * d / ((c + r) * layers)),
        ),
        Mistake(
            "groups without values",
            "The ratio to MHA is right, and the number of groups twice too large. A key/value head of GQA "
            "takes 2 d_h numbers, a key and a value.",
            counted(groups=lambda layers, heads, d, c, r: (c + r) / d),
        ),
        Mistake(
            "ratio upside down",
            "The second number is MLA's share of MHA's cache. Asked for is how many times less MLA keeps, a "
            "number above 1 here.",
            counted(less=lambda layers, heads, d, c, r: (c + r) / (2 * heads * d)),
        ),
        Mistake(
            "MHA with the rotary key",
            "MHA's heads were counted as wide as MLA's keys, d_h + d_h^R. MHA has no separate rotary part: "
            "it rotates the d_h numbers it has.",
            counted(
                less=lambda layers, heads, d, c, r: heads * (2 * d + r) / (c + r),
            ),
        ),
        Mistake(
            "layers in the groups",
            "The number of groups was taken from the numbers of all layers. GQA has its groups in every "
            "layer, so the layers cancel.",
            counted(groups=lambda layers, heads, d, c, r: (c + r) * layers / (2 * d)),
        ),
        Mistake(
            "groups rounded",
            "The number of groups was made whole. It is a measure of memory, and DeepSeek-V2's is 2.25: no "
            "real GQA has exactly as much.",
            counted(groups=lambda layers, heads, d, c, r: (c + r) // (2 * d)),
        ),
    ),
    hints=(
        "Which two vectors does MLA keep of a token in one layer? Does the number of heads, or the width of "
        "a head, change their size?",
        'Table 1 of the paper, or "What is cached" in the notebook. For DeepSeek-V2 the third number is '
        "2.25.",
        "in a layer MLA keeps latent_dim + rope_dim numbers, MHA 2 * heads * head_dim, GQA 2 * head_dim for "
        "every group\n"
        "return layers * MLA, MHA / MLA, MLA / (2 * head_dim)",
    ),
    checked="DeepSeek-V2, V2-Lite and the course's own model: all layers, against MHA, and in groups of GQA",
    tolerance=1e-6,
)


# ------------------------------------------------------------------------------------ 02.5 the whole of MLA


def turning(tokens: int, rope: int) -> Callable[[Tensor], Tensor]:
    """The rotation of positions 0 .. tokens - 1, as chapter 03 builds it."""
    angles = torch.arange(tokens)[:, None] * rope_frequencies(rope, theta=30.0)

    def rotate(y: Tensor) -> Tensor:
        if y.ndim != 4 or y.shape[1] != tokens or y.shape[-1] != rope:
            raise ValueError(
                f"rotate takes (batch, tokens, heads, rope) = (any, {tokens}, any, {rope}); it was given "
                f"{tuple(y.shape)}"
            )
        return rotate_pairs(y, angles.cos(), angles.sin())

    return rotate


def latent_case(
    seed: int, batch: int, tokens: int, hidden: int, heads: int, dims: tuple[int, int, int, int]
) -> dict[str, Any]:
    latent, rope, nope, value = dims
    shapes = {
        "x": (batch, tokens, hidden),
        "w_q": (heads * (nope + rope), hidden),
        "w_dkv": (latent + rope, hidden),
        "gain": (latent,),
        "w_uk": (heads, nope, latent),
        "w_uv": (heads, value, latent),
        "w_o": (hidden, heads * value),
    }
    made = dict(zip(shapes, random(seed, *shapes.values())))
    return {**made, "w_q": made["w_q"] / 2, "gain": 1 + made["gain"] / 2, "rotate": turning(tokens, rope)}


def latent_attention(
    x: Tensor,
    w_q: Tensor,
    w_dkv: Tensor,
    gain: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    w_o: Tensor,
    rotate: Callable[[Tensor], Tensor],
    *,
    scale: Callable[[int, int, int], float] = lambda nope, rope, latent: (nope + rope) ** -0.5,
    by_value: bool = False,
    causal: bool = True,
    turn: str = "queries and keys",
    apart: Callable[[Tensor, int, int], Tensor] = lambda q, heads, width: q.unflatten(-1, (heads, width)),
    rope_first: bool = False,
    norm: Callable[[Tensor, Tensor], Tensor] = rms_norm,
    key: Callable[[Tensor], Tensor] = lambda k_rope: k_rope,
    together: Callable[[Tensor], Tensor] = lambda out: out.flatten(-2),
) -> Tensor:
    """Right by default; each mistake changes one step."""
    heads, nope, latent_dim = w_uk.shape
    rope = len(w_dkv) - latent_dim
    q = apart(x @ w_q.T, heads, nope + rope)
    if rope_first:
        q_rope, q_nope = q.split([rope, nope], dim=-1)
    else:
        q_nope, q_rope = q.split([nope, rope], dim=-1)
    q_rope = rotate(q_rope) if "queries" in turn else q_rope
    latent, k_rope = (x @ w_dkv.T).split([latent_dim, rope], dim=-1)
    k_rope = key(k_rope)
    k_rope = rotate(k_rope[:, :, None])[:, :, 0] if "keys" in turn else k_rope
    k, v = expand_keys_values(norm(latent, gain), k_rope, w_uk, w_uv)
    q = torch.cat([q_nope, q_rope], dim=-1)
    size = w_uv.shape[1] ** -0.5 if by_value else scale(nope, rope, latent_dim)
    out = grouped_attention(q, k, v, size, causal=causal)
    return together(out) @ w_o.T


def all_nope_first(q: Tensor, heads: int, nope: int) -> Tensor:
    """Queries read as all heads' nope numbers, then all heads' rope numbers."""
    first, last = q.split([heads * nope, q.shape[-1] - heads * nope], dim=-1)
    return torch.cat([first.unflatten(-1, (heads, nope)), last.unflatten(-1, (heads, -1))], dim=-1)


def queries_parts_first(*a: Any, **b: Any) -> Tensor:
    nope = (b["w_uk"] if "w_uk" in b else a[4]).shape[1]
    return latent_attention(*a, **b, apart=lambda q, heads, width: all_nope_first(q, heads, nope))


def with_the_parts_right(answer: Callable[..., Any], case: Mapping[str, Any]) -> Any:
    """The answer on a case; says so first if a function of 02.2 or 02.3 that it calls is wrong itself."""
    called = getattr(getattr(answer, "__code__", None), "co_names", ())
    latent, k_rope = compress(case["x"], case["w_dkv"], case["gain"])
    parts = (
        ("compress", "02.2", (case["x"], case["w_dkv"], case["gain"]), compress),
        ("expand_keys_values", "02.3", (latent, k_rope, case["w_uk"], case["w_uv"]), expand_keys_values),
    )
    for name, number, arguments, right in parts:
        if name in called:
            try:
                pairs = zip(answer.__globals__[name](*arguments), right(*arguments), strict=True)
                good = all(torch.allclose(one, other, atol=1e-4, rtol=1e-4) for one, other in pairs)
            except Exception:  # the learner's code: whatever it raises, its own check tells
                good = False
            if not good:
                raise RuntimeError(
                    f"02.5 uses your {name}, which does not pass {number}: run that check first"
                )
    return answer(**case)


LATENT_ATTENTION = Exercise(
    number="02.5",
    name="latent_attention",
    title="the whole of MLA",
    difficulty=2,
    minutes=15,
    answer=latent_attention,
    run=with_the_parts_right,
    cases=(
        Case(
            "2 texts of 5 tokens, a hidden state of 7, 3 heads; a latent of 6, a rotary key of 2, keys of 4, "
            "values of 5",
            lambda: latent_case(8, 2, 5, 7, 3, (6, 2, 4, 5)),
        ),
        Case(
            "3 texts of 4 tokens, a hidden state of 6, 2 heads; a latent of 3, a rotary key of 4, keys of 5, "
            "values of 2",
            lambda: latent_case(9, 3, 4, 6, 2, (3, 4, 5, 2)),
        ),
    ),
    mistakes=(
        Mistake(
            "scaled by d_h only",
            "This is what comes out when the scores are divided by sqrt(d_h). The rotary part adds d_h^R "
            "more products to each score.",
            lambda *a, **b: latent_attention(*a, **b, scale=lambda nope, rope, latent: nope**-0.5),
        ),
        Mistake(
            "scaled by the latent",
            "This is what comes out when the scores are divided by the root of the latent's width. A score "
            "is a product of a query and a key of a head; the latent is not in it.",
            lambda *a, **b: latent_attention(*a, **b, scale=lambda nope, rope, latent: latent**-0.5),
        ),
        Mistake(
            "scaled by the values",
            "This is what comes out when the scores are divided by the root of the values' width. A score is "
            "a product of a query and a key; values may have another width.",
            lambda *a, **b: latent_attention(*a, **b, by_value=True),
        ),
        Mistake(
            "multiplied by the root",
            "This is what comes out when the scores are multiplied by sqrt(d_h + d_h^R). They are to become "
            "smaller by that, not larger.",
            lambda *a, **b: latent_attention(*a, **b, scale=lambda nope, rope, latent: (nope + rope) ** 0.5),
        ),
        Mistake(
            "no scale",
            "This is what comes out when the scores are not scaled. They are then too large, and the softmax "
            "nearly picks a single key.",
            lambda *a, **b: latent_attention(*a, **b, scale=lambda nope, rope, latent: 1.0),
        ),
        Mistake(
            "sees the future",
            "This is what comes out when every token sees the whole text. A token may look at itself and at "
            "those before it.",
            lambda *a, **b: latent_attention(*a, **b, causal=False),
        ),
        Mistake(
            "keys not rotated",
            "This is what comes out when only the queries are rotated. A score tells the distance of two "
            "tokens only if both have turned.",
            lambda *a, **b: latent_attention(*a, **b, turn="queries"),
        ),
        Mistake(
            "queries not rotated",
            "This is what comes out when only the shared key is rotated. A score tells the distance of two "
            "tokens only if both have turned.",
            lambda *a, **b: latent_attention(*a, **b, turn="keys"),
        ),
        Mistake(
            "nothing rotated",
            "This is what comes out when nothing is rotated. The model then cannot tell in which order the "
            "tokens before it stand.",
            lambda *a, **b: latent_attention(*a, **b, turn=""),
        ),
        Mistake(
            "query's rotary part first",
            "This is what comes out when the first numbers of each head's query are rotated. The part that "
            "meets the latent's keys comes first, the rotary part last.",
            lambda *a, **b: latent_attention(*a, **b, rope_first=True),
        ),
        Mistake(
            "queries dealt in turn",
            "This is what comes out when the queries' numbers go to the heads like cards dealt in turn. All "
            "numbers of the first head stand first.",
            lambda *a, **b: latent_attention(
                *a, **b, apart=lambda q, heads, width: q.unflatten(-1, (width, heads)).transpose(-1, -2)
            ),
        ),
        Mistake(
            "all heads' unrotated parts first",
            "This is what comes out when the queries are read as one part of all heads, then the rotary part "
            "of all heads. Each head's two parts stand together.",
            queries_parts_first,
        ),
        Mistake(
            "normalised twice",
            "This is what comes out when the latent is normalised twice. `compress` has done it already.",
            lambda *a, **b: latent_attention(*a, **b, norm=lambda c, gain: rms_norm(rms_norm(c, gain), gain)),
        ),
        Mistake(
            "latent not normalised",
            "This is what comes out when keys and values are made from the latent as the matrix gives it. "
            "After the compression comes a norm.",
            lambda *a, **b: latent_attention(*a, **b, norm=lambda latent, gain: latent),
        ),
        Mistake(
            "rotary key normalised",
            "This is what comes out when the shared rotary key is normalised like the latent. Only the "
            "latent has a norm.",
            lambda *a, **b: latent_attention(*a, **b, key=lambda k: rms_norm(k, torch.ones(k.shape[-1]))),
        ),
        Mistake(
            "outputs interleaved",
            "This is what comes out when the heads' outputs are interleaved before W^O. They stand side by "
            "side, all of the first head, then all of the second.",
            lambda *a, **b: latent_attention(*a, **b, together=lambda out: out.transpose(-1, -2).flatten(-2)),
        ),
    ),
    hints=(
        "Write down the shape of everything on the way from x to the keys, and from x to the queries. Where "
        "do the heads come in, and which two things are rotated?",
        '"The layer" in the notebook has the steps in their order. rotate needs an axis for heads: k_rope '
        "has none, so give it one of size 1 and take it off again. How many products does a score add up?",
        "q = x @ w_q.T, apart into heads; split each: nope, rope numbers; rotate the second part; cat\n"
        "latent, k_rope = compress(x, w_dkv, gain)\n"
        "k_rope = rotate(k_rope with a head axis of 1), without that axis\n"
        "k, v = expand_keys_values(latent, k_rope, w_uk, w_uv)\n"
        "out = grouped_attention(q, k, v, scale = 1 / sqrt(nope + rope), causal=True)\n"
        "flatten the heads and their values, then @ w_o.T",
    ),
    checked="queries, shared key, norm, scale, mask and output, with all widths different",
    axes=("text", "token", "hidden"),
    tolerance=1e-4,
)


# --------------------------------------------------------------------------------------- 02.6 the bug hunt


def kv_b_case(
    seed: int, batch: int, keys: int, heads: int, nope: int, value: int, latent: int
) -> dict[str, Any]:
    c, weight = random(seed, (batch, keys, latent), (heads * (nope + value), latent))
    return {"latent": c, "kv_b_proj": weight, "heads": heads, "nope": nope}


def kv_b_with(
    read: Callable[[Tensor, int, int, int], tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A way to read it: read(weight, heads, nope, value) gives each head's W^UK and W^UV."""

    def answer(latent: Tensor, kv_b_proj: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
        w_uk, w_uv = read(kv_b_proj, heads, nope, len(kv_b_proj) // heads - nope)
        return torch.einsum("bsc,hnc->bshn", latent, w_uk), torch.einsum("bsc,hvc->bshv", latent, w_uv)

    return answer


def by_head(weight: Tensor, heads: int, nope: int, value: int) -> tuple[Tensor, Tensor]:
    """Right."""
    w_uk, w_uv = weight.unflatten(0, (heads, nope + value)).split([nope, value], dim=1)
    return w_uk, w_uv


def all_keys_first(weight: Tensor, heads: int, nope: int, value: int) -> tuple[Tensor, Tensor]:
    w_uk, w_uv = weight.split([heads * nope, heads * value])
    return w_uk.unflatten(0, (heads, nope)), w_uv.unflatten(0, (heads, value))


def all_values_first(weight: Tensor, heads: int, nope: int, value: int) -> tuple[Tensor, Tensor]:
    w_uv, w_uk = weight.split([heads * value, heads * nope])
    return w_uk.unflatten(0, (heads, nope)), w_uv.unflatten(0, (heads, value))


def values_first(weight: Tensor, heads: int, nope: int, value: int) -> tuple[Tensor, Tensor]:
    w_uv, w_uk = weight.unflatten(0, (heads, nope + value)).split([value, nope], dim=1)
    return w_uk, w_uv


def heads_fastest(weight: Tensor, heads: int, nope: int, value: int) -> tuple[Tensor, Tensor]:
    w_uk, w_uv = weight.unflatten(0, (nope + value, heads)).transpose(0, 1).split([nope, value], dim=1)
    return w_uk, w_uv


def latent_axis_first(weight: Tensor, heads: int, nope: int, value: int) -> tuple[Tensor, Tensor]:
    """The weight's numbers read as (latent, heads, rows), which fits whatever the sizes."""
    read = weight.reshape(weight.shape[1], heads, nope + value).permute(1, 2, 0)
    w_uk, w_uv = read.split([nope, value], dim=1)
    return w_uk, w_uv


def every_other(weight: Tensor, heads: int, nope: int, value: int) -> tuple[Tensor, Tensor]:
    """Right rows of the keys; the values' rows counted from the end of all keys."""
    w_uk, _ = by_head(weight, heads, nope, value)
    _, w_uv = all_keys_first(weight, heads, nope, value)
    return w_uk, w_uv


def apart_twice(latent: Tensor, kv_b_proj: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """The line with the split is mended, and the return still takes the heads apart."""
    value = kv_b_proj.shape[0] // heads - nope
    k, v = (latent @ kv_b_proj.T).unflatten(-1, (heads, nope + value)).split([nope, value], dim=-1)
    return k.unflatten(-1, (heads, nope)), v.unflatten(-1, (heads, value))


READ_KV_B_PROJ = Exercise(
    number="02.6",
    name="read_kv_b_proj",
    title="a checkpoint that loads and is wrong",
    difficulty=2,
    minutes=5,
    answer=kv_b_with(by_head),
    cases=(
        Case(
            "1 head: keys of 3, values of 2, a latent of 4",
            lambda: kv_b_case(10, 2, 3, 1, 3, 2, 4),
        ),
        Case(
            "2 texts of 4 tokens, 3 heads; keys and values of 5, a latent of 6",
            lambda: kv_b_case(11, 2, 4, 3, 5, 5, 6),
        ),
        Case(
            "3 texts of 2 tokens, 2 heads; keys of 4, values of 6; latent of 20: a square weight",
            lambda: kv_b_case(12, 3, 2, 2, 4, 6, 20),
        ),
    ),
    mistakes=(
        Mistake(
            "keys of all heads first",
            "The first rows were read as the keys of all heads and the rest as the values. That is right for "
            "the first head's keys, and with a single head; in the checkpoint each head's keys and values "
            "stand together.",
            kv_b_with(all_keys_first),
        ),
        Mistake(
            "values of all heads first",
            "The first rows were read as the values of all heads and the rest as the keys. In the checkpoint "
            "each head's keys and values stand together, the keys first.",
            kv_b_with(all_values_first),
        ),
        Mistake(
            "values before keys",
            "The heads are apart, but in each of them the first rows were read as values. The keys come "
            "first.",
            kv_b_with(values_first),
        ),
        Mistake(
            "heads dealt in turn",
            "The rows went to the heads like cards dealt in turn. All rows of the first head stand first.",
            kv_b_with(heads_fastest),
        ),
        Mistake(
            "latent axis first",
            "The weight was read as if its first axis were the latent. Its numbers then fill any shape of "
            "the right size, and land in the wrong places; where the matrix is square, nothing else would "
            "show it.",
            kv_b_with(latent_axis_first),
        ),
        Mistake(
            "heads apart twice",
            "The split is mended, and the last line still takes the heads apart a second time. Keys and "
            "values have an axis for the heads by then.",
            apart_twice,
        ),
        Mistake(
            "values still together",
            "The keys are right now, and the values are still taken from the end of the matrix. They come "
            "after the keys of their own head.",
            kv_b_with(every_other),
        ),
    ),
    hints=(
        "Take 2 heads with 1 row for keys and 1 for values: 4 rows. Write down what each row is, by the "
        "docstring. Which rows does the code take for the keys?",
        "The wrong line is the one with `split`. At that point the numbers of all heads lie side by side: "
        "(batch, keys, heads * (nope + value)).",
        "give `both` an axis for the heads first: unflatten(-1, (heads, nope + value))\n"
        "then split the last axis into nope and value\n"
        "k and v have their final shapes already",
    ),
    checked="one head and several, equal and different widths of keys and values, and a square weight",
    axes=(("text", "token", "head", "nope"), ("text", "token", "head", "value")),
    given="keys of all heads first",
)


EXERCISES: tuple[Exercise, ...] = (
    LOW_RANK_FACTORS,
    COMPRESS,
    EXPAND,
    LATENT_CACHE,
    LATENT_ATTENTION,
    READ_KV_B_PROJ,
)
