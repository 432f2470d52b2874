"""The exercises of chapter 06: cases, right answers, plausible mistakes, hints."""

# B batch   T tokens   n tokens of all sequences   D hidden   E experts   K experts per token   W, I widths

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.course.chapters.routings import with_slope
from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.moe import routing
from dsv2.moe.routing import Routing


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def affinities(seed: int, batch: int, tokens: int, experts: int) -> Tensor:
    return normal(seed, batch, tokens, experts, scale=1.5).softmax(dim=-1)


# ------------------------------------------------------------ 06.1 a dense network cut into experts

Split = Callable[[Tensor, int], Tensor]


def neighbours(rows: Tensor, n_experts: int) -> Tensor:
    """(W, D) -> (E, I, D): expert i gets the i-th block of rows."""
    return rows.unflatten(0, (n_experts, -1))


def dealt_out(rows: Tensor, n_experts: int) -> Tensor:
    """(W, D) -> (E, I, D): expert i gets every E-th row from the i-th on."""
    return rows.unflatten(0, (-1, n_experts)).transpose(0, 1)


def split(w_gate_up: Tensor, w_down: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """The right answer to 06.1."""
    return cut()(w_gate_up, w_down, n_experts)


def cut(
    gate: Split = neighbours,
    up: Split = neighbours,
    down: Split = lambda w, n: neighbours(w.mT, n).mT,
    join: Callable[[Tensor, Tensor], Tensor] = lambda gate, up: torch.cat((gate, up), dim=1),
) -> Callable[..., tuple[Tensor, Tensor]]:
    """An answer to 06.1: how the rows of W_gate and W_up and the columns of W_down become experts."""

    def answer(w_gate_up: Tensor, w_down: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
        w_gate, w_up = w_gate_up.chunk(2)
        return join(gate(w_gate, n_experts), up(w_up, n_experts)), down(w_down, n_experts)

    return answer


def split_case(seed: int, width: int, hidden: int, n_experts: int) -> dict[str, Any]:
    return {
        "w_gate_up": normal(seed, 2 * width, hidden),
        "w_down": normal(seed + 1, hidden, width),
        "n_experts": n_experts,
    }


SPLIT = Exercise(
    number="06.1",
    name="split_into_experts",
    title="a dense network cut into experts",
    difficulty=1,
    minutes=15,
    answer=split,
    cases=(
        Case("12 hidden units on vectors of 5, into 3 experts", lambda: split_case(1, 12, 5, 3)),
        Case("10 hidden units on vectors of 7, into 5 experts", lambda: split_case(3, 10, 7, 5)),
        Case("6 hidden units on vectors of 4, left in one piece", lambda: split_case(5, 6, 4, 1)),
    ),
    mistakes=(
        Mistake(
            "w_gate_up cut as it stands",
            "w_gate_up was cut into blocks without telling its halves apart: the first experts hold gate "
            "rows only, the last ones up rows only.",
            lambda w_gate_up, w_down, n_experts: (
                neighbours(w_gate_up, n_experts),
                cut()(w_gate_up, w_down, n_experts)[1],
            ),
        ),
        Mistake(
            "up before gate",
            "In every expert the rows of W_up stand before those of W_gate, so that silu goes to the wrong "
            "half.",
            cut(join=lambda gate, up: torch.cat((up, gate), dim=1)),
        ),
        Mistake(
            "gate and up rows in turn",
            "The rows of W_gate and W_up take turns. An expert has all its gate rows first, as the whole "
            "network has.",
            cut(join=lambda gate, up: torch.stack((gate, up), dim=2).flatten(1, 2)),
        ),
        Mistake(
            "units dealt out like cards",
            "Hidden units were dealt out: expert 0 got units 0, E, 2 E. The sum is right too, but here an "
            "expert gets neighbours.",
            cut(dealt_out, dealt_out, lambda w, n: dealt_out(w.mT, n).mT),
        ),
        Mistake(
            "up dealt out, gate in blocks",
            "An expert's gate rows belong to other hidden units than its up rows: silu(gate) is multiplied "
            "by another unit's up.",
            cut(up=dealt_out),
        ),
        Mistake(
            "columns of w_down dealt out",
            "An expert's columns of w_down belong to other hidden units than its rows of w_gate_up.",
            cut(down=lambda w, n: dealt_out(w.mT, n).mT),
        ),
        Mistake(
            "w_down reshaped",
            "w_down has the right shape and its numbers in the wrong places: view or reshape read it row by "
            "row, across the experts. Its hidden units are columns.",
            cut(down=lambda w, n: w.reshape(n, len(w), -1)),
        ),
        Mistake(
            "w_down transposed",
            "w_down came out as (experts, small, hidden). Every expert keeps the layout of the whole: hidden "
            "rows, small columns.",
            cut(down=lambda w, n: neighbours(w.mT, n)),
        ),
        Mistake(
            "divided by the number of experts",
            "w_down was divided by the number of experts. The experts' outputs are added up, not averaged: "
            "whole they make the network that was cut.",
            cut(down=lambda w, n: neighbours(w.mT, n).mT / n),
        ),
    ),
    hints=(
        "A hidden unit takes one number from the gate, one from up, and writes one column to the output. If "
        "you keep half of the hidden units, which rows and which columns of the three matrices stay?",
        'The notebook\'s section "A network is a sum" does it for two halves. w_gate_up.chunk(2) tells gate '
        "and up apart, unflatten(0, (n_experts, -1)) makes blocks of rows. For w_down the units are the "
        "columns: unflatten(1, ...), and then the experts' axis has to come first.",
        "gate, up = the two halves of w_gate_up                    (width, hidden) each\n"
        "gate, up = each as blocks of rows                         (experts, small, hidden) each\n"
        "first result = gate and up joined along small             (experts, 2 small, hidden)\n"
        "second = w_down as blocks of columns, experts first       (experts, hidden, small)",
    ),
    checked="rows of W_gate and W_up and columns of W_down of the same neighbouring hidden units, gate first",
    axes=(("expert", "row", "hidden"), ("expert", "hidden", "column")),
)


# ------------------------------------------------------------ 06.2 affinities


def affinity_case(
    seed: int, batch: int, tokens: int, hidden: int, experts: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    return {
        "x": normal(seed, batch, tokens, hidden).to(dtype),
        "centroids": normal(seed + 1, experts, hidden, scale=1.5 * hidden**-0.5).to(dtype),
    }


def products(x: Tensor, centroids: Tensor) -> Tensor:
    return x.float() @ centroids.float().mT


EXPERT_AFFINITY = Exercise(
    number="06.2",
    name="expert_affinity",
    title="affinities",
    difficulty=1,
    minutes=10,
    answer=routing.expert_affinity,
    cases=(
        Case("2 sequences of 5 tokens, vectors of 7, 9 experts", lambda: affinity_case(11, 2, 5, 7, 9)),
        Case("3 sequences of 4 tokens, vectors of 16, 6 experts", lambda: affinity_case(13, 3, 4, 16, 6)),
        Case(
            "1 sequence of 6 tokens in bfloat16, vectors of 33, 10 experts",
            lambda: affinity_case(15, 1, 6, 33, 10, torch.bfloat16),
        ),
    ),
    mistakes=(
        Mistake(
            "no softmax",
            "These are the products themselves. An affinity is a share: each token's add up to 1.",
            products,
        ),
        Mistake(
            "softmax over the tokens",
            "The softmax was taken over the tokens: experts choose tokens here. Each token's affinities to "
            "the experts have to add up to 1.",
            lambda x, centroids: products(x, centroids).softmax(dim=1),
        ),
        Mistake(
            "softmax over the batch",
            "The softmax was taken over the first axis, the sequences of the batch.",
            lambda x, centroids: products(x, centroids).softmax(dim=0),
        ),
        Mistake(
            "sigmoid",
            "A sigmoid was taken of each product by itself. DeepSeek-V3 does so; in V2 the experts compete "
            "in a softmax.",
            lambda x, centroids: products(x, centroids).sigmoid(),
        ),
        Mistake(
            "divided by sqrt(d)",
            "The products were divided by the square root of the vector's length, as in attention. Equation "
            "22 takes them as they are.",
            lambda x, centroids: (products(x, centroids) / x.shape[-1] ** 0.5).softmax(dim=-1),
        ),
        Mistake(
            "cosines",
            "Vectors and centroids were normalised before the product. Equation 22 takes them as they are: a "
            "long centroid is chosen more often.",
            lambda x, centroids: products(
                F.normalize(x.float(), dim=-1), F.normalize(centroids.float(), dim=-1)
            ).softmax(dim=-1),
        ),
        Mistake(
            "log of the softmax",
            "These are logarithms of the affinities. As weights of the experts they would be negative.",
            lambda x, centroids: products(x, centroids).log_softmax(dim=-1),
        ),
        Mistake(
            "in the type of x",
            "Products and softmax were taken in bfloat16. Its eight bits make experts equal that are not, "
            "and which of them works is then a matter of chance.",
            lambda x, centroids: (x @ centroids.mT).softmax(dim=-1).float(),
        ),
        Mistake(
            "softmax in float32, products before",
            "The softmax was taken in float32, but of products that had been rounded to the type of x.",
            lambda x, centroids: (x @ centroids.mT).float().softmax(dim=-1),
        ),
        Mistake(
            "rounded at the end",
            "Computed in float32 and then rounded to the type of x. The affinities have to stay float32: "
            "choosing and the balance losses need the difference.",
            lambda x, centroids: products(x, centroids).softmax(dim=-1).to(x.dtype).float(),
        ),
        Mistake(
            "exponentials without their sum",
            "These are the exponentials, not divided by their sum over the experts.",
            lambda x, centroids: products(x, centroids).exp(),
        ),
    ),
    hints=(
        "Three numbers 0, 0 and log 2 are a token's products with three experts. What are its shares, and "
        "over what do they add up to 1?",
        'The notebook\'s section "A router" prints affinities of one token. One product of matrices gives '
        "(batch, tokens, experts); convert both to float32 before it.",
        "logits = x (in float32) times the transpose of centroids (in float32)   (batch, tokens, experts)\n"
        "result = softmax of logits over the experts",
    ),
    checked="the softmax over the experts, of the plain products, all in float32 also where x is bfloat16",
    tolerance=2e-6,
    axes=("sequence", "token", "expert"),
    replaces=("dsv2.moe.routing.expert_affinity",),
)


# ------------------------------------------------------------ 06.3 the k best


def chosen(
    weigh: Callable[[Tensor, Tensor], Tensor] = lambda weights, scores: weights,
    pick: Callable[[Tensor, int], tuple[Tensor, Tensor]] = lambda scores, k: scores.topk(k, dim=-1),
    keep: Callable[[Tensor, Tensor], Tensor] = lambda scores, ids: scores,
) -> Callable[..., Routing]:
    """An answer to 06.3."""

    def answer(scores: Tensor, k: int) -> Routing:
        weights, ids = pick(scores, k)
        return Routing(ids, weigh(weights, scores), keep(scores, ids))

    return answer


def by_number(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ids = scores.topk(k, dim=-1).indices.sort(dim=-1).values
    return scores.gather(-1, ids), ids


def the_least(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return scores.topk(k, dim=-1, largest=False)


def worst_first(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, ids = scores.topk(k, dim=-1)
    return weights.flip(-1), ids.flip(-1)


def the_same_for_all(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ids = scores.mean(dim=(0, 1)).topk(k).indices.expand(*scores.shape[:2], k)
    return scores.gather(-1, ids), ids


def only_chosen(scores: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter(-1, ids, scores.gather(-1, ids))


def choice_case(seed: int, batch: int, tokens: int, experts: int, k: int) -> dict[str, Any]:
    return {"scores": affinities(seed, batch, tokens, experts), "k": k}


TOP_K = Exercise(
    number="06.3",
    name="top_k",
    title="the k best",
    difficulty=1,
    minutes=10,
    answer=routing.top_k,
    run=partial(with_slope, scores_too=True),
    cases=(
        Case("2 sequences of 5 tokens, 9 experts, 3 a token", lambda: choice_case(21, 2, 5, 9, 3)),
        Case("3 sequences of 4 tokens, 7 experts, 2 a token", lambda: choice_case(22, 3, 4, 7, 2)),
        Case("1 sequence of 6 tokens, 8 experts, 5 a token", lambda: choice_case(23, 1, 6, 8, 5)),
    ),
    mistakes=(
        Mistake(
            "weights of sum 1",
            "The weights were divided by their sum. Mixtral does so; in equation 21 the affinity itself is "
            "the weight, and a token whose affinity lies elsewhere gets less from its experts.",
            chosen(lambda weights, scores: weights / weights.sum(dim=-1, keepdim=True)),
        ),
        Mistake(
            "softmax once more",
            "A softmax was taken over the chosen affinities. They are shares already.",
            chosen(lambda weights, scores: weights.softmax(dim=-1)),
        ),
        Mistake(
            "weights of 1",
            "Every chosen expert counts 1. Then nothing that a token's experts do can tell the router which "
            "of them was of use: it gets no gradient.",
            chosen(lambda weights, scores: torch.ones_like(weights)),
        ),
        Mistake(
            "no gradient",
            "The weights are right and carry no gradient: through them, and only through them, the router "
            "learns from the task.",
            chosen(lambda weights, scores: weights.detach()),
        ),
        Mistake(
            "equal shares",
            "Every chosen expert counts 1/k. Then nothing tells the router which of them was of use.",
            chosen(lambda weights, scores: torch.full_like(weights, 1 / weights.shape[-1])),
        ),
        Mistake(
            "the k least",
            "These are the experts with the lowest affinities.",
            chosen(pick=the_least),
        ),
        Mistake(
            "the worst first",
            "The right experts, the worst of them first. expert_ids is to be best first: GShard's second "
            "choice, and who is dropped, depend on the order.",
            chosen(pick=worst_first),
        ),
        Mistake(
            "ordered by number",
            "The right experts, ordered by their numbers. expert_ids is to be best first.",
            chosen(pick=by_number),
        ),
        Mistake(
            "the same experts for all tokens",
            "All tokens got the experts that are best on average. Every token chooses for itself.",
            chosen(pick=the_same_for_all),
        ),
        Mistake(
            "scores of the chosen only",
            "scores came back with zeros at the experts that were not chosen. The balance losses need all of "
            "them.",
            chosen(keep=only_chosen),
        ),
        Mistake(
            "scores without a gradient",
            "scores came back without their gradient: the balance losses, which are made from them, would "
            "move nothing.",
            chosen(keep=lambda scores, ids: scores.detach()),
        ),
        Mistake(
            "one expert too many",
            "A token got k + 1 experts.",
            chosen(pick=lambda scores, k: scores.topk(k + 1, dim=-1)),
        ),
    ),
    hints=(
        "A token has the affinities 0.2, 0.5 and 0.3, and k is 2. Which experts work for it, in which order, "
        "and how much does each count? Do the weights have to add up to 1?",
        'torch.topk gives values and indices, best first; the notebook\'s section "The k best" draws them.',
        "weights, expert_ids = the k largest of scores over the experts\n"
        "result = Routing(expert_ids, weights, scores)",
    ),
    checked="the choice, its order, the affinities as weights, their gradient, and scores left whole",
    axes={
        "expert_ids": ("sequence", "token", "slot"),
        "weights": ("sequence", "token", "slot"),
        "scores": ("sequence", "token", "expert"),
        "the gradient of weights by scores": ("sequence", "token", "expert"),
    },
    replaces=("dsv2.moe.routing.top_k",),
)


# ------------------------------------------------------------ 06.4 who finds room


def capacity_case(
    seed: int, sizes: tuple[int, int, int, int], factor: float, lengths: tuple[int, ...] = ()
) -> dict[str, Any]:
    """sizes: batch, tokens, experts, k. Some experts are popular. lengths: of real tokens, else all."""
    batch, tokens, experts, k = sizes
    liking = normal(seed, batch, tokens, experts) + normal(seed + 1, experts, scale=2.0)
    asking = torch.ones(batch, tokens, k, dtype=torch.bool)
    if lengths:
        real = torch.arange(tokens) < torch.tensor(lengths)[:, None]
        asking = asking & real[..., None]
        if k > 1:  # a second choice that chance has refused
            asking[..., 1] &= normal(seed + 2, batch, tokens) > -0.5
    return {
        "expert_ids": liking.topk(k, dim=-1).indices,
        "n_experts": experts,
        "capacity_factor": factor,
        "asking": asking,
    }


Pair = tuple[int, int, int]


def in_line(
    order: Callable[[Pair], Any] = lambda pair: (pair[2], pair[0], pair[1]),
    *,
    capacity: Callable[[float], int] = lambda exact: max(1, int(exact + 1e-9)),
    tokens: Callable[[Tensor], int] = lambda asking: int(asking[..., 0].sum()),
    choices: Callable[[int], int] = lambda k: k,
    room: Callable[[int, int], bool] = lambda taken, capacity: taken < capacity,
    takes: Callable[[bool, bool], bool] = lambda asks, kept: kept,
    each: Callable[[Pair], Any] = lambda pair: None,
    answers: Callable[[bool, bool], bool] = lambda asks, fits: asks and fits,
) -> Callable[..., Tensor]:
    """An answer to 06.4: pairs (sequence, token, slot) stand in line by `order`, and take room by `takes`.

    each: what has a count of its own besides the expert.
    """

    def answer(expert_ids: Tensor, n_experts: int, capacity_factor: float, asking: Tensor) -> Tensor:
        batch, length, k = expert_ids.shape
        limit = capacity(capacity_factor * choices(k) * tokens(asking) / n_experts)
        taken: dict[Any, int] = {}
        kept = torch.zeros_like(asking)
        pairs = [(b, t, j) for b in range(batch) for t in range(length) for j in range(k)]
        for pair in sorted(pairs, key=order):
            place, asks = (int(expert_ids[pair]), each(pair)), bool(asking[pair])
            fits = room(taken.get(place, 0), limit)
            kept[pair] = answers(asks, fits)
            if takes(asks, bool(kept[pair])):
                taken[place] = taken.get(place, 0) + 1
        return kept

    return answer


def per_sequence(expert_ids: Tensor, n_experts: int, capacity_factor: float, asking: Tensor) -> Tensor:
    return torch.cat(
        [
            routing.within_capacity(ids[None], n_experts, capacity_factor, asks[None])
            for ids, asks in zip(expert_ids, asking)
        ]
    )


WITHIN_CAPACITY = Exercise(
    number="06.4",
    name="within_capacity",
    title="who finds room",
    difficulty=3,
    minutes=25,
    answer=routing.within_capacity,
    cases=(
        Case(
            "2 sequences of 9 tokens, 5 experts, 2 a token, factor 1",
            lambda: capacity_case(31, (2, 9, 5, 2), 1.0),
        ),
        Case(
            "3 sequences of 8 tokens, of which 8, 3 and 5 ask; 4 experts, 2 a token, factor 0.75",
            lambda: capacity_case(34, (3, 8, 4, 2), 0.75, (8, 3, 5)),
        ),
        Case(
            "2 sequences of 11 tokens, 6 experts, 1 a token, factor 1.1: the capacity is rounded down",
            lambda: capacity_case(37, (2, 11, 6, 1), 1.1),
        ),
        Case(
            "1 sequence of 4 tokens, 12 experts, 1 a token, factor 1: room for a third of a token",
            lambda: capacity_case(40, (1, 4, 12, 1), 1.0),
        ),
        Case(
            "2 sequences of 50 tokens, 10 experts, 1 a token, factor 1.15: 11.5 places",
            lambda: capacity_case(43, (2, 50, 10, 1), 1.15),
        ),
    ),
    mistakes=(
        Mistake(
            "a token's choices together",
            "Each token was served with all its choices before the next token. First choices go first, of "
            "all tokens: what weighs most is to be dropped last.",
            in_line(lambda pair: pair),
        ),
        Mistake(
            "the last come first",
            "The line was served from its end: the last tokens find room, and the first do not.",
            in_line(lambda pair: (pair[2], -pair[0], -pair[1])),
        ),
        Mistake(
            "tokens by position, sequences in turn",
            "The first tokens of all sequences stand before the second ones. One sequence stands behind the "
            "other.",
            in_line(lambda pair: (pair[2], pair[1], pair[0])),
        ),
        Mistake(
            "a capacity for each slot",
            "First and second choices were counted apart: an expert took its capacity of either. All slots "
            "share one capacity.",
            in_line(each=lambda pair: pair[2]),
        ),
        Mistake(
            "a line for each sequence",
            "Each sequence was routed by itself, with a capacity from its own length. Line and capacity are "
            "those of the whole batch.",
            per_sequence,
        ),
        Mistake(
            "a count for each sequence",
            "An expert takes the batch's capacity from every sequence anew. The count goes on from one "
            "sequence to the next.",
            in_line(each=lambda pair: pair[0]),
        ),
        Mistake(
            "k left out of the capacity",
            "The capacity lacks the factor k. A token makes k choices, and the average expert gets k T / E.",
            in_line(choices=lambda k: 1),
        ),
        Mistake(
            "every pair that asks counted as a token",
            "T was counted over all slots: every choice that asks, and then times k once more. T is a number "
            "of tokens.",
            in_line(tokens=lambda asking: int(asking.sum())),
        ),
        Mistake(
            "less room where chance has refused",
            "The capacity was made from the pairs that ask. A second choice that was refused by chance takes "
            "no place, and makes no expert smaller: k T counts all choices of the tokens that ask.",
            in_line(choices=lambda k: 1, tokens=lambda asking: int(asking.sum())),
        ),
        Mistake(
            "rounded up",
            "The capacity was rounded up. Here it is rounded down.",
            in_line(capacity=lambda exact: max(1, -int(-exact // 1))),
        ),
        Mistake(
            "no least capacity",
            "With fewer choices than experts the capacity came out as 0, and everything was dropped. It is "
            "at least 1.",
            in_line(capacity=lambda exact: int(exact + 1e-9)),
        ),
        Mistake(
            "one too many",
            "Experts take one token more than their capacity.",
            in_line(room=lambda taken, capacity: taken <= capacity),
        ),
        Mistake(
            "those who do not ask take room",
            "Pairs that do not ask (padding, or refused by chance) took places that others needed.",
            in_line(takes=lambda asks, kept: True),
        ),
        Mistake(
            "those who do not ask are kept",
            "Pairs that do not ask came out True where there was room. They have no place to keep.",
            in_line(answers=lambda asks, fits: fits, takes=lambda asks, kept: asks and kept),
        ),
        Mistake(
            "padding in T",
            "The capacity was computed from all positions of the batch. Padding does not ask, and is no "
            "token.",
            in_line(tokens=lambda asking: asking[..., 0].numel()),
        ),
        Mistake(
            "nobody is dropped",
            "Everyone who asked was kept: the capacity was not applied.",
            lambda expert_ids, n_experts, capacity_factor, asking: asking.clone(),
        ),
    ),
    hints=(
        "Three tokens, two experts, two choices each, capacity factor 1. How many places has an expert? All "
        "three want expert 0 first: who gets in, and which second choices find expert 1 free?",
        'The notebook\'s section "Room for so many" goes through the line with a loop. Do the same: the '
        "outermost loop is over the slots, then come sequences, then tokens; one counter for each expert.",
        "T = number of True in asking[:, :, 0]\n"
        "capacity = max(1, round down capacity_factor * k * T / n_experts)    (add 1e-9 before rounding)\n"
        "taken = 0 for each expert; kept = all False\n"
        "for slot, then sequence b, then token t:\n"
        "    if asking[b, t, slot] and taken[its expert] < capacity:\n"
        "        kept[b, t, slot] = True, and taken[its expert] goes up by 1",
    ),
    checked="the capacity and its rounding, first choices of all before any second, the order of the line "
    "over the whole batch, and pairs that do not ask",
    axes=("sequence", "token", "slot"),
    replaces=("dsv2.moe.routing.within_capacity",),
)


# ------------------------------------------------------------ 06.5 the second by chance


def with_slope_of_two(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """As `with_slope`, and which pairs are kept."""
    made: list[Any] = []

    def keep(**rest: Any) -> Any:
        made.append(answer(**rest))
        return made[0]

    found = with_slope(keep, arguments, scores_too=True)
    return {**found, "kept": made[0].kept} if isinstance(found, dict) else found


def halves(best: Tensor, scores: Tensor) -> Tensor:
    return best / best.sum(dim=-1, keepdim=True)


def by_chance(
    weigh: Callable[[Tensor, Tensor], Tensor] = halves,
    *,
    probability: Callable[[Tensor, Tensor], Tensor] = lambda g, s: 2 * g[..., 1],
    keep: Callable[[Tensor, Tensor], Tensor] = lambda drawn, p: drawn < p,
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda second, drawn: (
        torch.ones_like(second),
        second,
    ),
    pick: Callable[[Tensor, int], tuple[Tensor, Tensor]] = lambda scores, k: scores.topk(k, dim=-1),
    after: Callable[[Tensor, Tensor], Tensor] = lambda weights, kept: weights,
) -> Callable[..., Routing]:
    """An answer to 06.5. after: what becomes of the weights once it is known who is kept."""

    def answer(scores: Tensor, drawn: Tensor) -> Routing:
        best, ids = pick(scores, 2)
        weights = weigh(best, scores)
        second = keep(drawn, probability(halves(best, scores).detach(), best.detach()))
        kept = torch.stack(both(second, drawn), dim=-1)
        return Routing(ids, after(weights, kept), scores, kept)

    return answer


def one_draw_for_all(scores: Tensor, drawn: Tensor) -> Routing:
    return by_chance()(scores, drawn[:, :1].expand_as(drawn))


def rest_to_the_first(weights: Tensor, kept: Tensor) -> Tensor:
    weights = weights * kept
    return weights / weights.sum(dim=-1, keepdim=True)


def chance_case(seed: int, batch: int, tokens: int, experts: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed + 1)
    return {
        "scores": affinities(seed, batch, tokens, experts),
        "drawn": torch.rand(batch, tokens, generator=random),
    }


TWO_BY_CHANCE = Exercise(
    number="06.5",
    name="two_by_chance",
    title="the second by chance",
    difficulty=2,
    minutes=15,
    answer=by_chance(),
    run=with_slope_of_two,
    cases=(
        Case("3 sequences of 12 tokens, 7 experts", lambda: chance_case(81, 3, 12, 7)),
        Case("2 sequences of 9 tokens, 5 experts", lambda: chance_case(83, 2, 9, 5)),
        Case("1 sequence of 20 tokens, 10 experts", lambda: chance_case(85, 1, 20, 10)),
    ),
    mistakes=(
        Mistake(
            "affinities as weights",
            "The weights are the affinities as they are, as DeepSeek's. GShard's two add up to 1.",
            by_chance(lambda best, scores: best),
        ),
        Mistake(
            "softmax of the affinities",
            "A softmax was taken of the two affinities, which are shares already. That of the two logits "
            "would be the same as dividing by their sum.",
            by_chance(lambda best, scores: best.softmax(dim=-1)),
        ),
        Mistake(
            "a probability of g_2",
            "The second expert was kept with probability g_2, half as often as it should be: at equal "
            "affinities it is certain.",
            by_chance(probability=lambda g, s: g[..., 1]),
        ),
        Mistake(
            "chance by the affinity",
            "The probability was made from the affinity s_2, before it was divided by the sum of the two. "
            "With many experts the second would hardly ever work.",
            by_chance(probability=lambda g, s: 2 * s[..., 1]),
        ),
        Mistake(
            "chance by the first's weight",
            "The probability was made from the first expert's weight, so that the second is surest to work "
            "where it weighs least.",
            by_chance(probability=lambda g, s: 2 * g[..., 0] - 1),
        ),
        Mistake(
            "kept and refused swapped",
            "The second expert was kept where chance refuses it. A probability of p is a number below p.",
            by_chance(keep=lambda drawn, p: drawn >= p),
        ),
        Mistake(
            "no chance",
            "The second expert is always kept, as in GLaM and Mixtral.",
            by_chance(keep=lambda drawn, p: torch.ones_like(drawn, dtype=torch.bool)),
        ),
        Mistake(
            "a threshold instead of chance",
            "The second expert was kept where it weighs a quarter or more: the numbers in `drawn` were not "
            "used. An expert below any threshold would never be tried.",
            by_chance(keep=lambda drawn, p: p >= 0.5),
        ),
        Mistake(
            "the whole token by chance",
            "Where chance refuses the second expert, the first was dropped as well. The first is certain.",
            by_chance(both=lambda second, drawn: (second, second)),
        ),
        Mistake(
            "the first by chance",
            "Chance was applied to the first expert, and the second is certain.",
            by_chance(both=lambda second, drawn: (second, torch.ones_like(second))),
        ),
        Mistake(
            "one number for all tokens",
            "All tokens of a sequence were decided by the first one's number. Each has its own.",
            one_draw_for_all,
        ),
        Mistake(
            "the rest to the first",
            "Where the second is refused, the first got the weight 1. In GShard its weight stays g_1, and "
            "such a token gets less from its experts.",
            by_chance(after=rest_to_the_first),
        ),
        Mistake(
            "weights of 0",
            "Where the second is refused, its weight was set to 0. Who works is said by kept; the weights "
            "stay whole.",
            by_chance(after=lambda weights, kept: weights * kept),
        ),
        Mistake(
            "no gradient",
            "The weights are right and carry no gradient: the router could not learn.",
            by_chance(lambda best, scores: halves(best, scores).detach()),
        ),
        Mistake(
            "the second first",
            "The two experts stand in the order second, first. expert_ids is to be best first.",
            by_chance(
                pick=worst_first,
                probability=lambda g, s: 2 * g[..., 0],
                both=lambda second, drawn: (second, torch.ones_like(second)),
            ),
        ),
    ),
    hints=(
        "A token's two highest affinities are 0.3 and 0.1. What are its weights, how likely is the second "
        "expert to work, and which numbers between 0 and 1 let it?",
        'The notebook\'s section "Two, and the second by chance" prints weights and probabilities of one '
        "token. topk(2) gives both affinities; drawn < 2 * g_2 is a table of True and False for the second "
        "expert. The first one is always True.",
        "best, expert_ids = the 2 largest of scores over the experts\n"
        "weights = best divided by the sum of the two\n"
        "kept = all True, in the shape of expert_ids\n"
        "kept[:, :, 1] = drawn < 2 * weights[:, :, 1]\n"
        "result = Routing(expert_ids, weights, scores, kept)",
    ),
    checked="the two best, weights of sum 1 and their gradient, the first certain, the second by its own "
    "number",
    axes={
        "expert_ids": ("sequence", "token", "slot"),
        "weights": ("sequence", "token", "slot"),
        "scores": ("sequence", "token", "expert"),
        "the gradient of weights by scores": ("sequence", "token", "expert"),
        "kept": ("sequence", "token", "slot"),
    },
)


# ------------------------------------------------------------ 06.6 running what was chosen


def network(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """FFN(x): (n, D) -> (n, D)."""
    gate, up = (x @ w_gate_up.mT).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ w_down.mT


def ran(
    ffn: Callable[[Tensor, Tensor, Tensor], Tensor] = network,
    *,
    scale: Callable[[Tensor], Tensor] = lambda weights: weights,
    before: bool = False,
    drop: Callable[[Tensor], Tensor] = lambda kept: kept,
    finish: Callable[[Tensor, Tensor], Tensor] = lambda out, ids: out,
    overwrite: bool = False,
    slots: Callable[[int], int] = lambda k: k,
) -> Callable[..., Tensor]:
    """An answer to 06.6. before: the weight goes to the expert's input; overwrite: the last result stays."""

    def answer(x, expert_ids, weights, w_gate_up, w_down, kept):
        out, weights, kept = torch.zeros_like(x), scale(weights), drop(kept)
        for slot in range(slots(expert_ids.shape[1])):
            for t in range(len(x)):
                if not kept[t, slot]:
                    continue
                expert, weight = expert_ids[t, slot], weights[t, slot]
                row = weight * x[t] if before else x[t]
                result = ffn(row[None], w_gate_up[expert], w_down[expert])[0]
                result = result if before else weight * result
                out[t] = result if overwrite else out[t] + result
        return finish(out, expert_ids)

    return answer


def swapped(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    up, gate = (x @ w_gate_up.mT).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ w_down.mT


def alternating(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    both = x @ w_gate_up.mT
    return (F.silu(both[:, ::2]) * both[:, 1::2]) @ w_down.mT


def with_another(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def ffn(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
        gate, up = (x @ w_gate_up.mT).chunk(2, dim=-1)
        return (act(gate) * up) @ w_down.mT

    return ffn


def run_case(
    seed: int, tokens: int, hidden: int, experts: int, width: int, k: int, dropped: float = 0.0
) -> dict[str, Any]:
    """Experts that nobody chose are made of nan, which survives being multiplied by 0."""
    made = routing.top_k(affinities(seed, 1, tokens, experts), k)
    kept = torch.rand(tokens, k, generator=torch.Generator().manual_seed(seed)) >= dropped
    w_down = normal(seed + 3, experts, hidden, width, scale=width**-0.5)
    w_down[torch.bincount(made.expert_ids[0].flatten(), minlength=experts) == 0] = torch.nan
    return {
        "x": normal(seed + 1, tokens, hidden),
        "expert_ids": made.expert_ids[0],
        "weights": made.weights[0],
        "w_gate_up": normal(seed + 2, experts, 2 * width, hidden, scale=hidden**-0.5),
        "w_down": w_down,
        "kept": kept,
    }


def all_experts_for_all(x, expert_ids, weights, w_gate_up, w_down, kept):
    out = torch.zeros_like(x)
    for expert in range(len(w_down)):
        weight = (weights * kept * (expert_ids == expert)).sum(dim=-1)
        out = out + weight[:, None] * network(x, w_gate_up[expert], w_down[expert])
    return out


def not_brought_back(x, expert_ids, weights, w_gate_up, w_down, kept):
    k = expert_ids.shape[1]
    order = torch.where(kept, expert_ids, len(w_down)).flatten().argsort(stable=True)[: int(kept.sum())]
    out = torch.zeros_like(x)
    for row, pair in enumerate(order.tolist()):
        token, slot = divmod(pair, k)
        expert = expert_ids[token, slot]
        result = network(x[token, None], w_gate_up[expert], w_down[expert])[0]
        out[row // k] += weights[token, slot] * result
    return out


def weights_in_order(x, expert_ids, weights, w_gate_up, w_down, kept):
    """As `not_brought_back`, but for the results: only the weights stay where they were."""
    k = expert_ids.shape[1]
    order = torch.where(kept, expert_ids, len(w_down)).flatten().argsort(stable=True)[: int(kept.sum())]
    mixed = weights.flatten().clone()
    mixed[order] = weights.flatten()[: len(order)]
    return ran()(x, expert_ids, mixed.view(-1, k), w_gate_up, w_down, kept)


RUN_EXPERTS = Exercise(
    number="06.6",
    name="run_experts",
    title="running what was chosen",
    difficulty=2,
    minutes=25,
    answer=ran(),
    cases=(
        Case(
            "9 tokens, vectors of 7, 5 experts of width 4, 2 a token",
            lambda: run_case(51, 9, 7, 5, 4, 2),
        ),
        Case(
            "6 tokens, vectors of 8, 10 experts of width 6, 3 a token, about a third dropped",
            lambda: run_case(55, 6, 8, 10, 6, 3, 0.3),
        ),
        Case(
            "2 tokens, vectors of 5, 12 experts of width 3, 4 a token: those with nothing to do are nan",
            lambda: run_case(59, 2, 5, 12, 3, 4),
        ),
    ),
    mistakes=(
        Mistake(
            "only the last expert",
            "A token's results overwrite each other: the last expert's alone is left. They are added up.",
            ran(overwrite=True),
        ),
        Mistake(
            "all experts for all tokens",
            "Experts were computed that nobody chose, and multiplied by zero afterwards. That saves nothing; "
            "in one case such experts are nan, which zero does not take away.",
            all_experts_for_all,
        ),
        Mistake(
            "results not brought back",
            "The pairs were sorted by expert, and their results added up in that order. Each belongs to the "
            "token that it was computed for.",
            not_brought_back,
        ),
        Mistake(
            "weights in the order of the tokens",
            "The pairs were sorted by expert, their weights were not: results meet the weights of other "
            "tokens.",
            weights_in_order,
        ),
        Mistake(
            "weights left out",
            "The experts' outputs were added up as they are, without the weights.",
            ran(scale=torch.ones_like),
        ),
        Mistake(
            "weight on the input",
            "The weight was multiplied to the expert's input. Half the input is not half the output: there "
            "is a silu and a product in between.",
            ran(before=True),
        ),
        Mistake(
            "dropped pairs computed",
            "Pairs that were dropped were computed all the same.",
            ran(drop=torch.ones_like),
        ),
        Mistake(
            "dropped and kept swapped",
            "What was to be kept was left out, and what was dropped was computed.",
            ran(drop=torch.logical_not),
        ),
        Mistake(
            "first choice's weight for all",
            "All of a token's experts got the weight of its first choice.",
            ran(scale=lambda weights: weights[:, :1].expand_as(weights)),
        ),
        Mistake(
            "first choice only",
            "Only each token's first expert was run.",
            ran(slots=lambda k: 1),
        ),
        Mistake(
            "mean over the slots",
            "The sum over a token's experts was divided by k. The weights say how much each counts.",
            ran(finish=lambda out, ids: out / ids.shape[1]),
        ),
        Mistake(
            "gate and up swapped",
            "silu was applied to the second half of the rows. W_gate's come first.",
            ran(swapped),
        ),
        Mistake(
            "gate and up in turn",
            "Even rows were taken for the gate and odd ones for up. The first half of the rows is W_gate's.",
            ran(alternating),
        ),
        Mistake(
            "no silu",
            "The gate was multiplied as it is, without silu.",
            ran(with_another(lambda gate: gate)),
        ),
        Mistake(
            "relu",
            "The gate went through relu. These networks have silu: x sigmoid(x).",
            ran(with_another(F.relu)),
        ),
        Mistake(
            "sigmoid",
            "The gate went through a sigmoid. silu is x sigmoid(x).",
            ran(with_another(torch.sigmoid)),
        ),
        Mistake(
            "residual added",
            "x itself was added. The residual connection is the block's.",
            lambda x, **rest: x + ran()(x, **rest),
        ),
    ),
    hints=(
        "8 tokens choose 2 of 4 experts each. For which rows of x must expert 3 be computed, how do you find "
        "them in expert_ids, and to which rows of the result does its output go?",
        'The notebook\'s section "Running them" does it expert by expert. (expert_ids == i) & kept is a '
        "table of (tokens, k); its nonzero(as_tuple=True) gives token and slot of every pair of expert i. "
        "index_add adds rows to rows.",
        "out = zeros like x\n"
        "for each expert i:\n"
        "    token, slot = where expert_ids is i and kept is True\n"
        "    gate, up = halves of x[token] times the transpose of w_gate_up[i]\n"
        "    result = (silu(gate) * up) times the transpose of w_down[i]\n"
        "    add weights[token, slot] * result to out[token]",
    ),
    checked="every token's own experts and weights, added up; dropped pairs; experts that nobody chose",
    axes=("token", "hidden"),
)


# ------------------------------------------------------------ 06.7 a whole layer, with a bug


def layer(
    weigh: Callable[[Tensor, int], tuple[Tensor, Tensor]] = lambda logits, k: logits.softmax(-1).topk(k),
    *,
    add_shared: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda out, shared, weights: out + shared,
    routed_input: Callable[[Tensor, Tensor], Tensor] = lambda x, shared: x,
) -> Callable[..., Tensor]:
    """An answer to 06.7."""

    def answer(x, centroids, w_gate_up, w_down, shared_gate_up, shared_down, k):
        weights, ids = weigh(x @ centroids.mT, k)
        shared = network(x, shared_gate_up, shared_down)
        kept = torch.ones_like(ids, dtype=torch.bool)
        out = ran()(routed_input(x, shared), ids, weights, w_gate_up, w_down, kept)
        return add_shared(out, shared, weights)

    return answer


def softmax_of_the_chosen(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, ids = logits.topk(k)
    return best.softmax(dim=-1), ids


def by_another(score: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    def weigh(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return score(logits).topk(k)

    return weigh


def layer_case(
    seed: int, tokens: int, hidden: int, sizes: tuple[int, int, int], shared: int
) -> dict[str, Any]:
    """sizes: experts, their width, k; shared: how many shared experts."""
    experts, width, k = sizes
    return {
        "x": normal(seed, tokens, hidden),
        "centroids": normal(seed + 1, experts, hidden, scale=hidden**-0.5),
        "w_gate_up": normal(seed + 2, experts, 2 * width, hidden, scale=hidden**-0.5),
        "w_down": normal(seed + 3, experts, hidden, width, scale=width**-0.5),
        "shared_gate_up": normal(seed + 4, 2 * shared * width, hidden, scale=hidden**-0.5),
        "shared_down": normal(seed + 5, hidden, shared * width, scale=width**-0.5),
        "k": k,
    }


MOE_LAYER = Exercise(
    number="06.7",
    name="moe_layer",
    title="a layer that trains, with a bug",
    difficulty=2,
    minutes=15,
    answer=layer(),
    given="softmax of the chosen only",
    cases=(
        Case(
            "7 tokens, vectors of 6, 9 experts of width 4, 3 a token, 2 shared",
            lambda: layer_case(61, 7, 6, (9, 4, 3), 2),
        ),
        Case(
            "5 tokens, vectors of 8, 6 experts of width 3, 2 a token, 1 shared",
            lambda: layer_case(67, 5, 8, (6, 3, 2), 1),
        ),
        Case(
            "4 tokens, vectors of 10, 12 experts of width 2, 5 a token, 3 shared",
            lambda: layer_case(73, 4, 10, (12, 2, 5), 3),
        ),
    ),
    mistakes=(
        Mistake(
            "softmax of the chosen only",
            "The weights of each token add up to 1. That is so in Mixtral; equation 22 takes the softmax "
            "over all experts, chosen or not.",
            layer(softmax_of_the_chosen),
        ),
        Mistake(
            "logits as weights",
            "The weights are products, not affinities: they may be negative.",
            layer(by_another(lambda logits: logits)),
        ),
        Mistake(
            "sigmoid",
            "Each affinity is a sigmoid by itself, as in DeepSeek-V3. In V2 it is a softmax over the "
            "experts.",
            layer(by_another(torch.sigmoid)),
        ),
        Mistake(
            "softmax over the tokens",
            "The softmax was taken over the tokens.",
            layer(by_another(lambda logits: logits.softmax(dim=0))),
        ),
        Mistake(
            "shared experts left out",
            "The shared experts' output is missing.",
            layer(add_shared=lambda out, shared, weights: out),
        ),
        Mistake(
            "shared experts weighted",
            "The shared experts were multiplied by the rest of the affinity, 1 - sum of the weights. They "
            "count fully for every token.",
            layer(
                add_shared=lambda out, shared, weights: out + (1 - weights.sum(dim=-1, keepdim=True)) * shared
            ),
        ),
        Mistake(
            "shared experts once for each slot",
            "The shared experts' output was added k times: once for every routed expert.",
            layer(add_shared=lambda out, shared, weights: out + weights.shape[-1] * shared),
        ),
        Mistake(
            "shared experts first",
            "The routed experts got the shared experts' output as their input. Both work on the same u_t.",
            layer(routed_input=lambda x, shared: shared),
        ),
        Mistake(
            "one routed expert less",
            "A shared expert was counted as one of the k: only k - 1 routed experts worked.",
            layer(lambda logits, k: logits.softmax(dim=-1).topk(k - 1)),
        ),
        Mistake(
            "the routed part averaged",
            "The sum over the routed experts was divided by k.",
            layer(add_shared=lambda out, shared, weights: out / weights.shape[-1] + shared),
        ),
        Mistake(
            "residual added",
            "x itself was added. The residual connection is the block's.",
            lambda x, **rest: x + layer()(x, **rest),
        ),
    ),
    hints=(
        "Take a token whose affinity lies on experts that are not among its k. What is the sum of its "
        "weights by the equations, and what is it in this code?",
        "Compare the first two lines with equations 21 and 22: over which experts does the softmax run "
        "there?",
        "affinities = softmax over all experts of x times the transpose of centroids\n"
        "weights, expert_ids = the k largest affinities\n"
        "the rest as it stands",
    ),
    checked="affinities over all experts, the shared experts as they are, and both added up",
    axes=("token", "hidden"),
)

EXERCISES = (SPLIT, EXPERT_AFFINITY, TOP_K, WITHIN_CAPACITY, TWO_BY_CHANCE, RUN_EXPERTS, MOE_LAYER)
