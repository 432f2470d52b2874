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


# exercise 02.1
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
    # <solution>
    # One tall matrix: the rows of all heads' keys, and below them those of all heads' values.
    stacked = torch.cat([w_k.flatten(0, 1), w_v.flatten(0, 1)])  # (heads * (nope + value), hidden)
    # stacked = u @ diag(s) @ vh, with s from large to small. Of all matrices of this rank, the one that
    # keeps the largest is the nearest (Eckart and Young, 1936).
    u, s, vh = torch.linalg.svd(stacked, full_matrices=False)
    w_dkv = vh[:rank]
    up = u[:, :rank] * s[:rank]  # the sizes go to one side, whichever
    # Apart again, in the order in which they were stacked.
    up_k, up_v = up.split([heads * nope, heads * value])
    return w_dkv, up_k.unflatten(0, (heads, nope)), up_v.unflatten(0, (heads, value))
    # </solution>


# exercise 02.2
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
    # <solution>
    # One product makes both parts. A weight of (outputs, inputs) is applied as x @ w.T, as in nn.Linear.
    both = x @ w_dkv.T
    latent, k_rope = both[..., : len(gain)], both[..., len(gain) :]
    # The mean runs over the numbers of one token's latent. eps keeps it from dividing by 0.
    size = (latent.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return gain * latent / size, k_rope
    # </solution>


# exercise 02.3
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
    # <solution>
    # The letters of the result stand in the order that is asked for: batch, keys, head, number.
    k_nope = torch.einsum("bsc,hnc->bshn", latent, w_uk)
    v = torch.einsum("bsc,hvc->bshv", latent, w_uv)
    # `expand` shows the one k^R to every head without copying it; `cat` then does copy.
    for_all = k_rope[:, :, None].expand(-1, -1, w_uk.shape[0], -1)
    return torch.cat([k_nope, for_all], dim=-1), v
    # </solution>


# exercise 02.4
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
    # <solution>
    in_a_layer = latent_dim + rope_dim  # one of each, whatever the number of heads
    of_a_head = 2 * head_dim  # a key and a value
    return layers * in_a_layer, heads * of_a_head / in_a_layer, in_a_layer / of_a_head
    # </solution>


# exercise 02.5
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
    # <solution>
    # The queries of all heads lie side by side; each has a part without position and a part that is turned.
    q_nope, q_rope = (x @ w_q.T).unflatten(-1, (heads, nope + rope)).split([nope, rope], dim=-1)
    q = torch.cat([q_nope, rotate(q_rope)], dim=-1)
    latent, k_rope = compress(x, w_dkv, gain)
    # The shared key is turned once, as a single head; then every head gets it.
    k_rope = rotate(k_rope[:, :, None])[:, :, 0]
    k, v = expand_keys_values(latent, k_rope, w_uk, w_uv)
    # A score adds up nope + rope products, so that is what the scale counts.
    out = grouped_attention(q, k, v, scale=(nope + rope) ** -0.5, causal=True)
    return out.flatten(-2) @ w_o.T
    # </solution>


# exercise 02.6
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
    # <solution>
    value = kv_b_proj.shape[0] // heads - nope
    both = latent @ kv_b_proj.T  # (batch, keys, all rows)
    # First the heads come apart, then, inside each of them, keys and values.
    k, v = both.unflatten(-1, (heads, nope + value)).split([nope, value], dim=-1)
    return k, v
    # <given>
    #| value = kv_b_proj.shape[0] // heads - nope
    #| both = latent @ kv_b_proj.T  # (batch, keys, all rows)
    #| k, v = both.split([heads * nope, heads * value], dim=-1)
    #| return k.unflatten(-1, (heads, nope)), v.unflatten(-1, (heads, value))
    # </given>
    # </solution>
