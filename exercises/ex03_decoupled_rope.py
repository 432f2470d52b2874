"""Chapter 03: positions as rotations, and the separate rotary key that keeps MLA cheap.

Six exercises: the rotation, the speeds of its pairs, what it puts between a query and a latent, the scores of
DeepSeek-V2 with their rotary part of its own, a cache of rotary keys with a bug in it, and the order of
channels in which other code expects them.

    python3 course.py check 03        all of this chapter
    python3 course.py check 03.1      one exercise
    python3 course.py hint 03.1       a hint; again, for a plainer one

`rope` below is the package's own module: where an exercise has to rotate, it may call rope.rotate_pairs, so
that no exercise waits for another one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dsv2 import rope


# exercise 03.1: turn every pair of channels (difficulty 2 of 3, about 8 minutes)
# check: python3 course.py check 03.1     in a notebook: check("03.1")
# hint:  python3 course.py hint 03.1      in a notebook: hint("03.1")
def rotate_pairs(
    x: Float[Tensor, "... tokens heads channels"],
    cos: Float[Tensor, "... tokens pairs"],
    sin: Float[Tensor, "... tokens pairs"],
) -> Float[Tensor, "... tokens heads channels"]:
    """Turn each pair of neighbouring channels by the angle of its token and pair; heads turn alike.

        (x_0, x_1)  ->  (x_0 cos - x_1 sin,  x_0 sin + x_1 cos)        (RoFormer, equation 34)

    Channels 0 and 1 are the first pair, 2 and 3 the second, and so on; the result has them in the same order.
    cos, sin: of the angles position * f_i. Computed in float32, whatever x is, and returned in x's type.

    A quarter turn has cos 0 and sin 1: (3, 4) becomes (-4, 3).

    >>> quarter = torch.zeros(1, 1), torch.ones(1, 1)
    >>> rotate_pairs(torch.tensor([[[3.0, 4.0]]]), *quarter)
    tensor([[[-4.,  3.]]])
    """
    raise NotImplementedError("exercise 03.1: write this, then run: python3 course.py check 03.1")


# exercise 03.2: how fast each pair turns (difficulty 1 of 3, about 3 minutes)
# check: python3 course.py check 03.2     in a notebook: check("03.2")
# hint:  python3 course.py hint 03.2      in a notebook: hint("03.2")
def rope_frequencies(dim: int, theta: float = 10000.0) -> Float[Tensor, " pairs"]:
    """How far each pair of channels turns from one position to the next, in radians; the fastest first.

        f_i = theta^(-2i / dim)      for i = 0 .. dim/2 - 1        (RoFormer, section 3.2.2)

    dim: channels that are rotated; two of them make a pair. Returned as float32.

    Two pairs: 100^(-0/4) and 100^(-2/4).

    >>> rope_frequencies(4, theta=100.0)
    tensor([1.0000, 0.1000])
    """
    raise NotImplementedError("exercise 03.2: write this, then run: python3 course.py check 03.2")


# exercise 03.3: what stands between a query and a latent (difficulty 2 of 3, about 10 minutes)
# check: python3 course.py check 03.3     in a notebook: check("03.3")
# hint:  python3 course.py hint 03.3      in a notebook: hint("03.3")
def matrix_between(
    w_uk: Float[Tensor, "channels latent"], frequencies: Float[Tensor, " pairs"], distance: int
) -> Float[Tensor, "channels latent"]:
    """The matrix M with  q^T M c  =  (R_n q) . (R_m W^UK c),  if the whole key of a head were rotated.

        M = R_n^T R_m W^UK = R_(m - n) W^UK        (DeepSeek-V2, section 2.1.3)

    R_p turns each pair of neighbouring channels by p * f_i. The query stands at position n, the key at m, and
    distance = n - m: how far back the query looks. Without rotation M is W^UK itself, the same for all
    tokens, which is what may be multiplied into the query once and for all.

    A frequency of a quarter turn and a distance of 1: (2, 3), the only column, turns back by a quarter.

    >>> matrix_between(torch.tensor([[2.0], [3.0]]), torch.tensor([torch.pi / 2]), 1).round()
    tensor([[ 3.],
            [-2.]])
    """
    raise NotImplementedError("exercise 03.3: write this, then run: python3 course.py check 03.3")


# exercise 03.4: content and position apart (difficulty 1 of 3, about 5 minutes)
# check: python3 course.py check 03.4     in a notebook: check("03.4")
# hint:  python3 course.py hint 03.4      in a notebook: hint("03.4")
def decoupled_scores(
    q_nope: Float[Tensor, "batch tokens heads nope"],
    q_rope: Float[Tensor, "batch tokens heads rope"],
    k_nope: Float[Tensor, "batch keys heads nope"],
    k_rope: Float[Tensor, "batch keys rope"],
) -> Float[Tensor, "batch heads tokens keys"]:
    """DeepSeek-V2's attention scores before the softmax: content and position apart.

        q_(t,i) = [q^C_(t,i); q^R_(t,i)],  k_(j,i) = [k^C_(j,i); k^R_j]           (equations 16, 17)
        score = q_(t,i)^T k_(j,i) / sqrt(d_h + d_h^R)                            (inside equation 18)

    q_rope and k_rope are rotated already. Every head has a q_rope of its own; k_rope is one for all heads.
    There is no mask here: every query meets every key.

    One token, one head, two channels in either part: (1*3 + 2*1 + 1*3 + 0*5) / sqrt(2 + 2).

    >>> q_nope, k_nope = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    >>> q_rope, k_rope = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 5.0])
    >>> heads = [x.reshape(1, 1, 1, 2) for x in (q_nope, q_rope, k_nope)]
    >>> decoupled_scores(*heads, k_rope.reshape(1, 1, 2)).item()
    4.0
    """
    raise NotImplementedError("exercise 03.4: write this, then run: python3 course.py check 03.4")


# exercise 03.5: a rotary cache that loses its place (a bug hunt, difficulty 2 of 3, about 5 minutes)
# check: python3 course.py check 03.5     in a notebook: check("03.5")
# hint:  python3 course.py hint 03.5      in a notebook: hint("03.5")
class RotaryCache:
    """The rotary keys k^R of one layer, stored rotated, and the rotary part of the scores against them.

    keys: (batch, max_tokens, channels), shared by all heads; length: how many tokens are stored.
    """

    def __init__(self, batch: int, max_tokens: int, frequencies: Float[Tensor, " pairs"]):
        self.frequencies = frequencies
        self.keys = torch.zeros(batch, max_tokens, 2 * len(frequencies))
        self.length = 0

    def append(
        self, q: Float[Tensor, "batch tokens heads channels"], k: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch heads tokens length"]:
        """Rotate the next tokens' queries and keys, store the keys; returns q^R . k^R with all keys so far.

        q and k come as they leave their matrices: not rotated yet. (Not scaled, and without a mask.)

        Five tokens and then a sixth: its score with itself has no rotation left in it, and its score with the
        key before has turned by one position.

        This code runs, its first call is right, and one of its lines is wrong. Find it.
        """
        start, end = self.length, self.length + k.shape[1]
        angles = torch.arange(k.shape[1])[:, None] * self.frequencies  # (tokens, pairs)
        cos, sin = angles.cos(), angles.sin()
        q = rope.rotate_pairs(q, cos, sin)
        self.keys[:, start:end] = rope.rotate_pairs(k[:, :, None], cos, sin)[:, :, 0]
        self.length = end
        return torch.einsum("bthr,bsr->bhts", q, self.keys[:, :end])


# exercise 03.6: from neighbours to halves (difficulty 2 of 3, about 8 minutes)
# check: python3 course.py check 03.6     in a notebook: check("03.6")
# hint:  python3 course.py hint 03.6      in a notebook: hint("03.6")
def rotary_rows_to_halves(
    weight: Float[Tensor, "heads*(nope+rope) hidden"], nope: int, rope: int
) -> Float[Tensor, "heads*(nope+rope) hidden"]:
    """A query's or key's weights for code that pairs channel i with i + rope/2, not with its neighbour.

    The weight's rows are its outputs: for every head `nope` rows without position, then `rope` rotary ones
    (two numbers here; the module `rope` is not needed). How many heads there are follows from the rows: in
    all heads * (nope + rope). A matrix with the rows of the latent above those of W^KR is one head, whose
    `nope` is the latent's size.

    The rotary rows of a released checkpoint make neighbouring pairs, (0, 1), (2, 3), ... Much other code
    expects the first members of all pairs before the second ones: 0, 2, 4, ... and then 1, 3, 5, ... Only the
    rotary rows of each head move. The scores stay what they are if queries and keys are both reordered.

    One head with 1 row without position (row 0) and 6 rotary ones (rows 1 to 6):

    >>> rotary_rows_to_halves(torch.arange(7.0)[:, None], nope=1, rope=6).flatten().tolist()
    [0.0, 1.0, 3.0, 5.0, 2.0, 4.0, 6.0]
    """
    raise NotImplementedError("exercise 03.6: write this, then run: python3 course.py check 03.6")

# stub f855da: file 585380, 03.1 103f4e, 03.2 0dc662, 03.3 e4b5b7, 03.4 956672, 03.5 db0890, 03.6 4c08f9
