"""Chapter 02: many heads' keys and values from one short vector.

Six exercises: the best short vector for keys and values together, how MLA compresses a hidden state and gets
every head's keys and values back, what that leaves in the cache, the whole of MLA as one function, and a
checkpoint that is read wrongly.

    python3 course.py check 02        all of this chapter
    python3 course.py check 02.1      one exercise
    python3 course.py hint 02.1       a hint; again, for a plainer one
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dsv2.attention import grouped_attention


# exercise 02.1: the best short vector (difficulty 2 of 3, about 10 minutes)
# check: python3 course.py check 02.1     in a notebook: check("02.1")
# hint:  python3 course.py hint 02.1      in a notebook: hint("02.1")
def low_rank_factors(
    w_k: Float[Tensor, "heads nope hidden"], w_v: Float[Tensor, "heads value hidden"], rank: int
) -> tuple[Float[Tensor, "rank hidden"], Float[Tensor, "heads nope rank"], Float[Tensor, "heads value rank"]]:
    """The best rank-`rank` factors of all heads' key and value matrices: w_dkv, w_uk, w_uv.

        c = W^DKV h,   k = W^UK c,   v = W^UV c        (DeepSeek-V2, equations 9 to 11, without the norm)

    w_k and w_v hold, for each head, the matrix that makes a key or a value from a hidden state (`nope`: the
    width of a key with no position embedding, as opposed to `rope`). The three
    matrices returned replace them: `w_uk @ w_dkv` is as near to w_k, and at the same time `w_uv @ w_dkv` as
    near to w_v, as `rank` numbers allow. "Near" means that the squares of all differences, those of keys and
    of values together, add up to as little as possible. (Which of the many such triples is free. With text
    at hand one would weight the differences by what occurs; here it is the matrices alone.)

    One head with keys of 1 number and values of 1, a hidden state of 2. A single number cannot serve both:
    the key's row (3, 4) is larger and stays, the value's row (0.8, -0.6) is given up.

    >>> w_dkv, w_uk, w_uv = low_rank_factors(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.8, -0.6]]]), 1)
    >>> (w_uk @ w_dkv).round(decimals=3), bool((w_uv @ w_dkv).abs().max() < 1e-6)
    (tensor([[[3., 4.]]]), True)
    """
    heads, nope, value = w_k.shape[0], w_k.shape[1], w_v.shape[1]
    raise NotImplementedError("exercise 02.1: write this, then run: python3 course.py check 02.1")


# exercise 02.2: a token's latent and the key beside it (difficulty 1 of 3, about 5 minutes)
# check: python3 course.py check 02.2     in a notebook: check("02.2")
# hint:  python3 course.py hint 02.2      in a notebook: hint("02.2")
def compress(
    x: Float[Tensor, "batch tokens hidden"],
    w_dkv: Float[Tensor, "latent_plus_rope hidden"],
    gain: Float[Tensor, " latent"],
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "batch tokens latent"], Float[Tensor, "batch tokens rope"]]:
    """The normalised latent c^KV, and the key that all heads share, before it is rotated.

        [c; k^R] = [W^DKV; W^KR] h        (DeepSeek-V2, equations 9 and 15; k^R without RoPE)
        c^KV = gain * c / sqrt(mean(c^2) + eps)        (the RMSNorm of section 3.1.2)

    The rows of w_dkv are those of W^DKV, as many as `gain` is long, and below them those of W^KR. Only the
    latent is normalised, each token's for itself.

    The hidden state (1, 0) becomes (3, 4 | 5). The mean square of 3 and 4 is 12.5, its root 3.5355.

    >>> latent, k_rope = compress(
    ...     torch.tensor([[[1.0, 0.0]]]), torch.tensor([[3.0, 0.0], [4.0, 0.0], [5.0, 0.0]]), torch.ones(2)
    ... )
    >>> latent, k_rope
    (tensor([[[0.8485, 1.1314]]]), tensor([[[5.]]]))
    """
    raise NotImplementedError("exercise 02.2: write this, then run: python3 course.py check 02.2")


# exercise 02.3: every head's keys and values back (difficulty 1 of 3, about 5 minutes)
# check: python3 course.py check 02.3     in a notebook: check("02.3")
# hint:  python3 course.py hint 02.3      in a notebook: hint("02.3")
def expand_keys_values(
    latent: Float[Tensor, "batch keys latent"],
    k_rope: Float[Tensor, "batch keys rope"],
    w_uk: Float[Tensor, "heads nope latent"],
    w_uv: Float[Tensor, "heads value latent"],
) -> tuple[Float[Tensor, "batch keys heads nope_plus_rope"], Float[Tensor, "batch keys heads value"]]:
    """Every head's keys and values, from what is cached.

        k_i = [W^UK_i c; k^R],   v_i = W^UV_i c        for each head i        (DeepSeek-V2, 10, 11 and 17)

    The latent is normalised and k^R rotated already. k^R is the same for all heads, and comes after the part
    from the latent, which has no position embedding (`nope`, beside `rope`).

    Two heads with 1 number each. The first head's key is the latent's first number, the second's the second;
    the values are their sum and their difference.

    >>> k, v = expand_keys_values(
    ...     latent=torch.tensor([[[2.0, 1.0]]]),
    ...     k_rope=torch.tensor([[[7.0]]]),
    ...     w_uk=torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]),
    ...     w_uv=torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]]),
    ... )
    >>> k.tolist(), v.tolist()
    ([[[[2.0, 7.0], [1.0, 7.0]]]], [[[[3.0], [1.0]]]])
    """
    raise NotImplementedError("exercise 02.3: write this, then run: python3 course.py check 02.3")


# exercise 02.4: what stays in the cache (difficulty 1 of 3, about 5 minutes)
# check: python3 course.py check 02.4     in a notebook: check("02.4")
# hint:  python3 course.py hint 02.4      in a notebook: hint("02.4")
def latent_cache(
    layers: int, heads: int, head_dim: int, latent_dim: int, rope_dim: int
) -> tuple[int, float, float]:
    """What MLA caches of a token: how many numbers, how many times less than MHA, how many GQA groups fit.

        MLA (d_c + d_h^R) l     GQA 2 n_g d_h l     MHA 2 n_h d_h l        (DeepSeek-V2, table 1)

    Returns the numbers for one token in all layers; MHA's divided by that; and n_g, how many GQA groups,
    key/value heads of head_dim, fit in the same memory. That need not be a whole number.

    3 layers with 4 heads of 8, a latent of 20 and a rotary key of 4: 24 numbers a layer, where MHA has 64 and
    GQA 16 for every head.

    >>> numbers, times_less, groups = latent_cache(3, heads=4, head_dim=8, latent_dim=20, rope_dim=4)
    >>> numbers, round(times_less, 3), groups
    (72, 2.667, 1.5)
    """
    raise NotImplementedError("exercise 02.4: write this, then run: python3 course.py check 02.4")


# exercise 02.5: the whole of MLA (difficulty 2 of 3, about 15 minutes)
# check: python3 course.py check 02.5     in a notebook: check("02.5")
# hint:  python3 course.py hint 02.5      in a notebook: hint("02.5")
def latent_attention(
    x: Float[Tensor, "batch tokens hidden"],
    w_q: Float[Tensor, "heads_times_qk hidden"],
    w_dkv: Float[Tensor, "latent_plus_rope hidden"],
    gain: Float[Tensor, " latent"],
    w_uk: Float[Tensor, "heads nope latent"],
    w_uv: Float[Tensor, "heads value latent"],
    w_o: Float[Tensor, "hidden heads_times_value"],
    rotate: Callable[[Tensor], Tensor],
) -> Float[Tensor, "batch tokens hidden"]:
    """Multi-head latent attention over a whole text, causal, nothing cached before it.

        q_i = [q^C_i; RoPE(q^R_i)]   k_i = [W^UK_i c; RoPE(k^R)]   v_i = W^UV_i c
        o_i = softmax(q_i . k_i / sqrt(d_h + d_h^R)) v_i   u = W^O [o_1; o_2; ...]
                                                                     (DeepSeek-V2, equations 9 to 19)

    The queries are W^Q x, head by head: `nope` numbers that meet the latent's part of the key, then `rope`
    that are rotated. rotate(y) takes y: (batch, tokens, any number of heads, rope) and gives its rotation;
    chapter 03 builds it. Your `compress` and `expand_keys_values` (write those first) and the
    `grouped_attention` of chapter 01 (imported above; it takes q, k, v, scale and causal=True) do the rest.

    A text of one token attends to itself alone: the result is its value through W^O, here 2 * 1.4142.

    >>> one = torch.ones(1, 1, 1)
    >>> w_dkv, gain = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]), torch.ones(2)
    >>> w_uk, w_uv, w_o = torch.ones(1, 1, 2), torch.tensor([[[2.0, 0.0]]]), torch.ones(2, 1)
    >>> latent_attention(torch.ones(1, 1, 2), torch.ones(2, 2), w_dkv, gain, w_uk, w_uv, w_o, lambda y: y)
    tensor([[[2.8284, 2.8284]]])
    """
    heads, nope = w_uk.shape[:2]
    rope = w_dkv.shape[0] - len(gain)
    raise NotImplementedError("exercise 02.5: write this, then run: python3 course.py check 02.5")


# exercise 02.6: a checkpoint that loads and is wrong (a bug hunt, difficulty 2 of 3, about 5 minutes)
# check: python3 course.py check 02.6     in a notebook: check("02.6")
# hint:  python3 course.py hint 02.6      in a notebook: hint("02.6")
def read_kv_b_proj(
    latent: Float[Tensor, "batch keys latent"],
    kv_b_proj: Float[Tensor, "heads_times_nope_plus_value latent"],
    heads: int,
    nope: int,
) -> tuple[Float[Tensor, "batch keys heads nope"], Float[Tensor, "batch keys heads value"]]:
    """Keys (without k^R) and values of all heads, by the weight `kv_b_proj` of a published checkpoint.

    Hugging Face's DeepSeek-V2 stores W^UK and W^UV as one matrix. Its rows go head by head: the `nope` rows
    of W^UK of the first head, then the rows of W^UV of the first head; the same for the second head; and so
    on.

    With 3 heads, 4 rows for keys and 2 for values, rows 0 to 3 make the first head's keys and rows 4 and 5
    its values; the second head's begin at row 6.

    This code runs, all shapes are right, and so are the keys of the first head. One line is wrong; mending it
    changes another.
    """
    value = kv_b_proj.shape[0] // heads - nope
    both = latent @ kv_b_proj.T  # (batch, keys, all rows)
    k, v = both.split([heads * nope, heads * value], dim=-1)
    return k.unflatten(-1, (heads, nope)), v.unflatten(-1, (heads, value))

# stub 341560: file 6e63bf, 02.1 2d09ef, 02.2 6c043b, 02.3 88ada7, 02.4 7afa65, 02.5 1a824a, 02.6 ef6a0e
