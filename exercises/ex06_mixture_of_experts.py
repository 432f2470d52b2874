"""Chapter 06: a feed-forward network cut into experts, and a router that chooses among them.

Seven exercises: cut a dense network into experts, compute affinities, choose the best experts, give out
places where experts are full, leave the second of two to chance, run the chosen ones, and a whole layer that
has a bug.

    python3 course.py check 06        all of this chapter
    python3 course.py check 06.1      one exercise
    python3 course.py hint 06.1       a hint; again, for a plainer one
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2.moe import Routing


# exercise 06.1: a dense network cut into experts (difficulty 1 of 3, about 15 minutes)
# check: python3 course.py check 06.1     in a notebook: check("06.1")
# hint:  python3 course.py hint 06.1      in a notebook: hint("06.1")
def split_into_experts(
    w_gate_up: Float[Tensor, "two_width hidden"], w_down: Float[Tensor, "hidden width"], n_experts: int
) -> tuple[Float[Tensor, "experts two_small hidden"], Float[Tensor, "experts hidden small"]]:
    """Cut one feed-forward network into n_experts smaller ones, whose outputs add up to the whole one's.

        FFN(u) = W_down (silu(W_gate u) * W_up u) = sum over the experts i of FFN_i(u)

    w_gate_up holds the rows of W_gate, then those of W_up; hidden unit j has row j of both, and column j of
    w_down. Expert i gets the hidden units i * small to (i + 1) * small - 1, small = width / n_experts: their
    rows of W_gate, then their rows of W_up, and their columns of w_down. width is a multiple of n_experts.

    A network of 2 hidden units on vectors of 1, cut into 2 experts of 1 unit. The units' gates are 1 and 2,
    their ups 3 and 4:

    >>> w_gate_up, w_down = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[5.0, 6.0]])
    >>> gate_up, down = split_into_experts(w_gate_up, w_down, 2)
    >>> gate_up.tolist()
    [[[1.0], [3.0]], [[2.0], [4.0]]]
    >>> down.tolist()
    [[[5.0]], [[6.0]]]
    """
    raise NotImplementedError("exercise 06.1: write this, then run: python3 course.py check 06.1")


# exercise 06.2: affinities (difficulty 1 of 3, about 10 minutes)
# check: python3 course.py check 06.2     in a notebook: check("06.2")
# hint:  python3 course.py hint 06.2      in a notebook: hint("06.2")
def expert_affinity(
    x: Float[Tensor, "batch tokens hidden"], centroids: Float[Tensor, "experts hidden"]
) -> Float[Tensor, "batch tokens experts"]:
    """The affinity of each token to each expert, in float32.

        s_{i,t} = Softmax_i(u_t^T e_i)                                        (DeepSeek-V2, equation 22)

    u_t is a row of x, e_i expert i's centroid, a row of `centroids`. Whatever the type of x, products and
    softmax are taken in float32 and the result stays float32: two experts' affinities may lie so close that
    rounding to bfloat16 would change who works.

    A token whose products with three experts are 0, 0 and log 2:

    >>> x, centroids = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.6931472, 0.0]])
    >>> expert_affinity(x, centroids)
    tensor([[[0.2500, 0.2500, 0.5000]]])
    """
    raise NotImplementedError("exercise 06.2: write this, then run: python3 course.py check 06.2")


# exercise 06.3: the k best (difficulty 1 of 3, about 10 minutes)
# check: python3 course.py check 06.3     in a notebook: check("06.3")
# hint:  python3 course.py hint 06.3      in a notebook: hint("06.3")
def top_k(scores: Float[Tensor, "batch tokens experts"], k: int) -> Routing:
    """Each token's k best experts, weighted by its affinity to them.

        g_{i,t} = s_{i,t} if s_{i,t} is among the k largest of token t, else 0 (DeepSeek-V2, equation 21)

    Returns Routing(expert_ids, weights, scores): expert_ids (batch, tokens, k), best first; weights (batch,
    tokens, k), the g of these experts, through which the router learns; scores as they came in.

    >>> routing = top_k(torch.tensor([[[0.2, 0.5, 0.3]]]), k=2)
    >>> routing.expert_ids, routing.weights
    (tensor([[[1, 2]]]), tensor([[[0.5000, 0.3000]]]))
    """
    raise NotImplementedError("exercise 06.3: write this, then run: python3 course.py check 06.3")


# exercise 06.4: who finds room (difficulty 3 of 3, about 25 minutes)
# check: python3 course.py check 06.4     in a notebook: check("06.4")
# hint:  python3 course.py hint 06.4      in a notebook: hint("06.4")
def within_capacity(
    expert_ids: Int[Tensor, "batch tokens k"],
    n_experts: int,
    capacity_factor: float,
    asking: Bool[Tensor, "batch tokens k"],
) -> Bool[Tensor, "batch tokens k"]:
    """Which pairs of token and expert find room, where each expert takes a limited number of tokens.

        capacity = capacity_factor * k * T / n_experts, rounded down, at least 1

    T is the number of tokens that ask with their first choice, over the whole batch (padding does not ask).
    All first choices (slot 0) are served before any second one, and so on; within a slot the tokens stand in
    line by position, one sequence of the batch after the other. Who finds the expert full is dropped: False.
    asking: True where a pair wants a place; pairs that do not ask take no room and come out False. (Switch,
    arXiv 2101.03961, section 2.2; GShard, arXiv 2006.16668, algorithm 1, for the order of the choices.)

    4 tokens choose 1 of 2 experts, three of them the first. The capacity is 1 * 1 * 4 / 2 = 2:

    >>> within_capacity(torch.tensor([[[0], [0], [1], [0]]]), 2, 1.0, torch.ones(1, 4, 1, dtype=torch.bool))
    tensor([[[ True],
             [ True],
             [ True],
             [False]]])
    """
    raise NotImplementedError("exercise 06.4: write this, then run: python3 course.py check 06.4")


# exercise 06.5: the second by chance (difficulty 2 of 3, about 15 minutes)
# check: python3 course.py check 06.5     in a notebook: check("06.5")
# hint:  python3 course.py hint 06.5      in a notebook: hint("06.5")
def two_by_chance(
    scores: Float[Tensor, "batch tokens experts"], drawn: Float[Tensor, "batch tokens"]
) -> Routing:
    """The two best experts with weights of sum 1, the second kept by chance (GShard, algorithm 1).

        g_1 = s_1 / (s_1 + s_2),   g_2 = s_2 / (s_1 + s_2),    s_1, s_2 the token's two highest affinities
        the second expert is kept with probability min(1, 2 g_2)                       (arXiv 2006.16668)

    drawn: for each token a number that is spread evenly over [0, 1), so that "with probability p" is "where
    the number is below p".

    Returns Routing(expert_ids, weights, scores, kept): expert_ids (batch, tokens, 2), best first; weights
    (batch, tokens, 2), the g of both, also where the second is not kept: the first does not get its share;
    scores as they came in; kept (batch, tokens, 2), False where an expert is not to work.

    The affinities 0.6 and 0.2 make weights of 0.75 and 0.25, and the second is kept where the number is below
    0.5. Two tokens alike with the numbers 0.4 and 0.7:

    >>> scores = torch.tensor([[[0.2, 0.6, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1]]])
    >>> routing = two_by_chance(scores, torch.tensor([[0.4, 0.7]]))
    >>> routing.expert_ids[0, 0], routing.weights[0, 0]
    (tensor([1, 0]), tensor([0.7500, 0.2500]))
    >>> routing.kept[0]
    tensor([[ True,  True],
            [ True, False]])
    """
    raise NotImplementedError("exercise 06.5: write this, then run: python3 course.py check 06.5")


# exercise 06.6: running what was chosen (difficulty 2 of 3, about 25 minutes)
# check: python3 course.py check 06.6     in a notebook: check("06.6")
# hint:  python3 course.py hint 06.6      in a notebook: hint("06.6")
def run_experts(
    x: Float[Tensor, "tokens hidden"],
    expert_ids: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    w_gate_up: Float[Tensor, "experts two_width hidden"],
    w_down: Float[Tensor, "experts hidden width"],
    kept: Bool[Tensor, "tokens k"],
) -> Float[Tensor, "tokens hidden"]:
    """What the chosen experts make of each token: the second sum of equation 20.

        out_t = sum over the slots j with kept[t, j] of weights[t, j] * FFN_i(x_t),    i = expert_ids[t, j]
        FFN_i(u) = W_down,i (silu(W_gate,i u) * W_up,i u)

    w_gate_up[i] holds expert i's rows of W_gate, then those of W_up. The layer must not compute what nobody
    asked for: an expert runs on the tokens that chose it, all of them at once, and on no other. (In the
    check, an expert that nobody chose may be nan.)

    One token of one number, 3.0, on two experts of one unit each, with weights 0.5 and 0.25, the second
    dropped: silu(1 * 3) * (2 * 3) * 1 * 0.5 = 8.5732.

    >>> w_gate_up, w_down = torch.tensor([[[1.0], [2.0]], [[4.0], [5.0]]]), torch.tensor([[[1.0]], [[9.0]]])
    >>> x, ids, weights = torch.tensor([[3.0]]), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]])
    >>> run_experts(x, ids, weights, w_gate_up, w_down, kept=torch.tensor([[True, False]]))
    tensor([[8.5732]])
    """
    raise NotImplementedError("exercise 06.6: write this, then run: python3 course.py check 06.6")


# exercise 06.7: a layer that trains, with a bug (a bug hunt, difficulty 2 of 3, about 15 minutes)
# check: python3 course.py check 06.7     in a notebook: check("06.7")
# hint:  python3 course.py hint 06.7      in a notebook: hint("06.7")
def moe_layer(
    x: Float[Tensor, "tokens hidden"],
    centroids: Float[Tensor, "experts hidden"],
    w_gate_up: Float[Tensor, "experts two_width hidden"],
    w_down: Float[Tensor, "experts hidden width"],
    shared_gate_up: Float[Tensor, "two_shared_width hidden"],
    shared_down: Float[Tensor, "hidden shared_width"],
    k: int,
) -> Float[Tensor, "tokens hidden"]:
    """A layer of DeepSeekMoE: the shared experts, which every token passes, and the k best routed ones.

        h_t = sum over the shared experts of FFN^(s)_i(u_t)
              + sum over the k best routed experts of s_{i,t} FFN^(r)_i(u_t)
        s_{i,t} = Softmax_i(u_t^T e_i)                              (DeepSeek-V2, equations 20 to 22)

    without the residual connection, which the block adds. The shared experts are one network here, as wide
    as all of them together. Its output is added as it is, without a weight.

    One number, 1.0; two routed experts with affinities 0.75 and 0.25, each W_gate = 1, W_up = 2; a shared
    expert alike. silu(1) * 2 = 1.4621; the better one's weight is 0.75, so that the result is 1.75 times it.

    >>> x, centroids = torch.ones(1, 1), torch.tensor([[1.0986123], [0.0]])
    >>> gate_up, down = torch.tensor([[1.0], [2.0]]), torch.ones(1, 1)
    >>> moe_layer(x, centroids, gate_up.expand(2, 2, 1), down.expand(2, 1, 1), gate_up, down, k=1)
    tensor([[2.5587]])

    This code runs, and a model trains with it. One of its lines is wrong: find it.
    """
    logits, expert_ids = (x @ centroids.mT).topk(k, dim=-1)
    weights = logits.softmax(dim=-1)
    gate, up = (x @ shared_gate_up.mT).chunk(2, dim=-1)
    out = (F.silu(gate) * up) @ shared_down.mT
    for slot in range(k):
        chosen = expert_ids[:, slot]
        gate, up = torch.einsum("td, tid -> ti", x, w_gate_up[chosen]).chunk(2, dim=-1)
        result = torch.einsum("ti, tdi -> td", F.silu(gate) * up, w_down[chosen])
        out = out + weights[:, slot, None] * result
    return out

# stub 348862: file bf8638, 06.1 6c1290, 06.2 1ac898, 06.3 7cc309, 06.4 1114e4, 06.5 038528, 06.6 c50e24, 06.7 829cb3
