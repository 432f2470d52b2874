"""Chapter 04: attention on the latents themselves, without rebuilding a key or a value.

Six exercises: move W^UK to the query, attend to the latents, move W^UV behind the softmax, count the
multiply-adds of both forms, find where one becomes cheaper than the other, and a step of decoding that has
a bug.

    python3 course.py check 04        all of this chapter
    python3 course.py check 04.1      one exercise
    python3 course.py hint 04.1       a hint; again, for a plainer one
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dsv2.attention import mla


# exercise 04.1
def absorb_query(
    q_nope: Float[Tensor, "batch tokens heads nope"], w_uk: Float[Tensor, "heads nope latent"]
) -> Float[Tensor, "batch tokens heads latent"]:
    """Move W^UK from the keys to the query: the query that meets the latents themselves.

        q . (W^UK c) = ((W^UK)^T q) . c        for every head        (DeepSeek-V2, section 2.1.2)

    w_uk[i] is head i's W^UK: (nope, latent), it makes a key out of a latent. Wanted is (W^UK)^T q for every
    text, token and head, each head with its own matrix. Nothing is scaled here.

    One head; its keys have 1 number, the latents 2. The key of the latent (1, 1) is 3 * 1 + 5 * 1 = 8, and
    its score with the query 2 is 16. The absorbed query gives the same score: 6 * 1 + 10 * 1 = 16.

    >>> absorb_query(torch.tensor([[[[2.0]]]]), torch.tensor([[[3.0, 5.0]]])).flatten()
    tensor([ 6., 10.])
    """
    # <solution>
    # The sum runs over `nope`, the width of the query: that is what the transpose in (W^UK)^T q means. The
    # letter h stands on both sides, so that head i of the query meets matrix i and no other.
    return torch.einsum("bthn,hnc->bthc", q_nope, w_uk)
    # </solution>


# exercise 04.2
def absorbed_attention(
    q_latent: Float[Tensor, "batch tokens heads latent"],
    q_rope: Float[Tensor, "batch tokens heads rope"],
    latent: Float[Tensor, "batch keys latent"],
    k_rope: Float[Tensor, "batch keys rope"],
    scale: float,
    mask: Bool[Tensor, "_ tokens keys"] | None = None,
) -> Float[Tensor, "batch tokens heads latent"]:
    """Attention over the cached latents as they are: they serve as keys and as values.

        a_j = Softmax_j( scale * (q_latent . c_j + q_rope . k_rope_j) ),    result = sum over j of a_j c_j

    This is equation 18 of DeepSeek-V2 with W^UK moved to the query and W^UV left for later. All heads read
    the same latents and the same rotary keys. mask, (batch or 1, tokens, keys):
    True where a query may look; None: everywhere. It has no axis for the heads.

    One query and two cached tokens with the latents 4 and 8. The scores of the rotary part are 0 and ln 3,
    those of the latents 0, so that the weights are 1/4 and 3/4.

    >>> latent, k_rope = torch.tensor([[[4.0], [8.0]]]), torch.tensor([[[1.0], [3.0]]]).log()
    >>> out = absorbed_attention(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), latent, k_rope, scale=1.0)
    >>> out.flatten().round(decimals=3)
    tensor([7.])
    """
    # <solution>
    # A score for every head, query and cached token. `latent` has no axis of heads: all heads read the same.
    scores = torch.einsum("bthc,bsc->bhts", q_latent, latent)
    scores = scale * (scores + torch.einsum("bthr,bsr->bhts", q_rope, k_rope))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))  # the new axis is that of the heads
    weights = scores.softmax(dim=-1)  # over the cached tokens
    # The latents once more, now as values: a mixture of latents comes out, a different one for each head.
    return torch.einsum("bhts,bsc->bthc", weights, latent)
    # </solution>


# exercise 04.3
def expand_output(
    o_latent: Float[Tensor, "batch tokens heads latent"], w_uv: Float[Tensor, "heads v_dim latent"]
) -> Float[Tensor, "batch tokens heads v_dim"]:
    """Apply W^UV behind the softmax, once per query, instead of before it, once per cached token.

        sum over j of a_j (W^UV c_j) = W^UV (sum over j of a_j c_j)        (DeepSeek-V2, section 2.1.2)

    w_uv[i] is head i's W^UV: (v_dim, latent), it makes a value out of a latent. o_latent is the right-hand
    side's bracket, for every head.

    Two heads got the same mixture (1, 2). The first one's W^UV adds its numbers, the second one's takes ten
    times the last.

    >>> mixture = torch.tensor([1.0, 2.0]).expand(1, 1, 2, 2)
    >>> expand_output(mixture, torch.tensor([[[1.0, 1.0]], [[0.0, 10.0]]])).flatten()
    tensor([ 3., 20.])
    """
    # <solution>
    # As a matrix times a vector: the sum runs over the latent, which is the last axis of both.
    return torch.einsum("bthc,hvc->bthv", o_latent, w_uv)
    # </solution>


# exercise 04.4
def multiply_adds(
    tokens: int, keys: int, *, latent: int, rope: int, nope: int, value: int
) -> tuple[int, int]:
    """Multiply-adds of one head's attention, in the expanded and in the absorbed form.

    Each of `tokens` queries meets all `keys` cached tokens, and the cache holds latents. Queries and latents
    are there; counted is everything that happens after. Expanded: the keys and values are rebuilt from the
    latents of all cached tokens, then attended to. Absorbed: W^UK is applied to the queries and W^UV to the
    outputs, and attention runs on the latents. latent: d_c, rope: d_h^R, nope: the part of a key without
    rotation, value: the width of a value.

    A matrix of m x n numbers times a vector takes m n multiply-adds, a product of two vectors of n takes n.
    The softmax is not counted.

    One query and one cached token, latents of 4, rope 1, nope 2, value 3. Expanded: (2 + 3) * 4 to rebuild,
    then 2 + 1 for the score and 3 for the output. Absorbed: 2 * 4 and 3 * 4 for query and output, 4 + 1 for
    the score and 4 for the mixture.

    >>> multiply_adds(1, 1, latent=4, rope=1, nope=2, value=3)
    (26, 29)
    """
    # <solution>
    # W^UK and W^UV of one head have (nope + value) * latent numbers together, and each is used once ...
    matrices = (nope + value) * latent
    # ... for every cached token, then (nope + rope) for a score and `value` for its share of the output;
    expanded = keys * matrices + tokens * keys * (nope + rope + value)
    # ... or for every query, then (latent + rope) for a score and `latent` for its share of the mixture.
    absorbed = tokens * matrices + tokens * keys * (latent + rope + latent)
    return expanded, absorbed
    # </solution>


# exercise 04.5
def most_absorbed_tokens(keys: int, *, latent: int, rope: int, nope: int, value: int) -> int:
    """The largest number of new tokens for which the absorbed form takes fewer multiply-adds.

    The counts are those of exercise 04.4, with `keys` cached tokens, the new ones among them: there cannot
    be more new tokens than `keys`, even if the absorbed form would still be cheaper. 0 if it never is. Where
    both forms take as many multiply-adds, the absorbed one is not cheaper.

    With the sizes of the worked number of 04.4 and 100 keys, T tokens take 2000 + 600 T multiply-adds
    expanded and 20 T + 900 T absorbed. 320 T < 2000 holds up to T = 6.

    >>> most_absorbed_tokens(100, latent=4, rope=1, nope=2, value=3)
    6
    """
    # <solution>
    # absorbed < expanded:  T M + T S (2C + R)  <  S M + T S (N + R + V),  with the matrices' M = (N + V) C.
    matrices = (nope + value) * latent
    # Everything with T to the left: T * more < S M. The rotary part costs both forms the same and drops out.
    more = matrices + keys * (2 * latent - nope - value)
    if more <= 0:  # latents so narrow that attending to them costs less than to keys and values
        return keys
    # The largest whole number that is really smaller than S M / more. Whole-number division keeps it exact.
    return min((keys * matrices - 1) // more, keys)
    # </solution>


# exercise 04.6
def decode_step(
    q_nope: Float[Tensor, "batch tokens heads nope"],
    q_rope: Float[Tensor, "batch tokens heads rope"],
    latent: Float[Tensor, "batch keys latent"],
    k_rope: Float[Tensor, "batch keys rope"],
    w_uk: Float[Tensor, "heads nope latent"],
    w_uv: Float[Tensor, "heads v_dim latent"],
) -> Float[Tensor, "batch tokens heads v_dim"]:
    """Causal attention of the newest tokens in the absorbed form: from query and cache to the heads' outputs.

        o_t = sum over j <= t of  Softmax_j(q_t . k_j / sqrt(d_h + d_h^R)) v_j     (DeepSeek-V2, equation 18)

    d_h is the width `nope` of a key's part without rotation, d_h^R the width `rope`. The queries are those
    of the last `tokens` of the `keys` tokens in the cache. Each cached token is put into one row, so that
    one product gives its whole score.

    One token, which sees only itself: its weight is 1, whatever its score, and the output is its value, 20.

    >>> one = torch.ones(1, 1, 1, 1)
    >>> decode_step(one, one, torch.tensor([[[2.0]]]), torch.ones(1, 1, 1), one[0], 10 * one[0]).item()
    20.0

    This code runs, and its result has the right shape. One of its lines is wrong: find it.
    """
    # <solution>
    query = torch.cat([q_rope, mla.absorb_query(q_nope, w_uk)], dim=-1)
    rows = torch.cat([k_rope, latent], dim=-1)[:, None]  # (batch, 1, keys, rope + latent): for all heads
    # Absorption changes how a score is computed, not what it is: the scale is that of the keys never built.
    scores = query.transpose(1, 2) @ rows.mT / (q_nope.shape[-1] + q_rope.shape[-1]) ** 0.5
    tokens, keys = scores.shape[-2:]
    future = torch.full((tokens, keys), -torch.inf).triu(keys - tokens + 1)
    weights = torch.softmax(scores + future, dim=-1)
    # The rotary key stands first in a row; the latent is what comes after it.
    mixture = weights @ rows[..., k_rope.shape[-1] :]
    return mla.expand_output(mixture.transpose(1, 2), w_uv)
    # <given>
    #| query = torch.cat([q_rope, mla.absorb_query(q_nope, w_uk)], dim=-1)
    #| rows = torch.cat([k_rope, latent], dim=-1)[:, None]  # (batch, 1, keys, rope + latent): for all heads
    #| scores = query.transpose(1, 2) @ rows.mT / (q_nope.shape[-1] + q_rope.shape[-1]) ** 0.5
    #| tokens, keys = scores.shape[-2:]
    #| future = torch.full((tokens, keys), -torch.inf).triu(keys - tokens + 1)
    #| weights = torch.softmax(scores + future, dim=-1)
    #| mixture = weights @ rows[..., : latent.shape[-1]]
    #| return mla.expand_output(mixture.transpose(1, 2), w_uv)
    # </given>
    # </solution>
