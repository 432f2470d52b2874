"""Chapter 07: experts on several devices, and a limit on how many of them a token may reach.

Six exercises: how many devices a token goes to, how many to expect by chance, which experts the limit leaves,
the choice among them, the messages between devices, and a layer over several devices that has a bug.

    python3 course.py check 07        all of this chapter
    python3 course.py check 07.1      one exercise
    python3 course.py hint 07.1       a hint; again, for a plainer one
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2.moe import Routing


# exercise 07.1: to how many devices a token goes (difficulty 1 of 3, about 10 minutes)
# check: python3 course.py check 07.1     in a notebook: check("07.1")
# hint:  python3 course.py hint 07.1      in a notebook: hint("07.1")
def reach(
    expert_ids: Int[Tensor, "tokens k"], device_of: Int[Tensor, " experts"], devices: int
) -> Int[Tensor, " tokens"]:
    """To how many devices each token goes: those that hold at least one of its experts.

    device_of: the number of each expert's device, from 0 to devices - 1, in any order. A token that has two
    experts on a device goes there once. Its own device counts like any other.

    4 experts, the first two on device 0, the others on device 1. One token chose the experts 0 and 1, another
    1 and 2:

    >>> reach(torch.tensor([[0, 1], [1, 2]]), torch.tensor([0, 0, 1, 1]), devices=2)
    tensor([1, 2])
    """
    raise NotImplementedError("exercise 07.1: write this, then run: python3 course.py check 07.1")


# exercise 07.2: how many devices by chance (difficulty 1 of 3, about 10 minutes)
# check: python3 course.py check 07.2     in a notebook: check("07.2")
# hint:  python3 course.py hint 07.2      in a notebook: hint("07.2")
def expected_reach(n_experts: int, devices: int, k: int) -> float:
    """How many devices k different experts are on, on average, if every set of k is equally likely.

    n_experts lie on `devices` devices, equally many on each. A device is missed by all k with the probability

        C(n_experts - n_experts / devices, k) / C(n_experts, k)

    where C(n, k) is the number of sets of k out of n (math.comb; 0 if k is larger than n). The expectation is
    the sum, over the devices, of the probability that a device is *not* missed.

    4 experts on 2 devices, 2 chosen: a device is missed by 1 of the 6 pairs, so that 2 * (1 - 1/6) = 1.6667.

    >>> round(expected_reach(4, 2, 2), 4)
    1.6667
    """
    raise NotImplementedError("exercise 07.2: write this, then run: python3 course.py check 07.2")


# exercise 07.3: which experts the limit leaves (difficulty 2 of 3, about 20 minutes)
# check: python3 course.py check 07.3     in a notebook: check("07.3")
# hint:  python3 course.py hint 07.3      in a notebook: hint("07.3")
def allowed_experts(
    scores: Float[Tensor, "*batch experts"], n_group: int, topk_group: int
) -> Bool[Tensor, "*batch experts"]:
    """Which experts a token may choose when it may go to topk_group = M devices: those on its M best.

    A device is as good as its best expert is for the token (DeepSeek-V2, section 2.2.2: "the M devices that
    have experts with the highest affinity scores in them"). Experts lie on the n_group devices in blocks of
    neighbours: with 4 on 2 devices, the experts 0 and 1 are on device 0. Every token has its own devices.

    The token below likes expert 3 best, so that device 1 is its best, although expert 2 is liked least:

    >>> allowed_experts(torch.tensor([0.3, 0.25, 0.05, 0.4]), n_group=2, topk_group=1)
    tensor([False, False,  True,  True])
    """
    raise NotImplementedError("exercise 07.3: write this, then run: python3 course.py check 07.3")


# exercise 07.4: the choice on at most M devices (difficulty 2 of 3, about 15 minutes)
# check: python3 course.py check 07.4     in a notebook: check("07.4")
# hint:  python3 course.py hint 07.4      in a notebook: hint("07.4")
def device_limited_top_k(
    scores: Float[Tensor, "batch tokens experts"], k: int, n_group: int, topk_group: int
) -> Routing:
    """The k best experts among those on the M = topk_group best devices of each token (section 2.2.2).

    Returns Routing(expert_ids, weights, scores): expert_ids (batch, tokens, k), best first; weights (batch,
    tokens, k), the affinities of these, as they are; scores as they came in. An affinity may be exactly 0:
    exp(-200) is 0 in float32. Even then no forbidden expert may be chosen.

    The token of exercise 07.3 with k = 2: of the experts 2 and 3, which are on its best device.

    >>> made = device_limited_top_k(torch.tensor([[[0.3, 0.25, 0.05, 0.4]]]), k=2, n_group=2, topk_group=1)
    >>> made.expert_ids, made.weights
    (tensor([[[3, 2]]]), tensor([[[0.4000, 0.0500]]]))
    """
    raise NotImplementedError("exercise 07.4: write this, then run: python3 course.py check 07.4")


# exercise 07.5: what the devices send each other (difficulty 2 of 3, about 20 minutes)
# check: python3 course.py check 07.5     in a notebook: check("07.5")
# hint:  python3 course.py hint 07.5      in a notebook: hint("07.5")
def message_counts(
    expert_ids: Int[Tensor, "tokens k"],
    home: Int[Tensor, " tokens"],
    device_of: Int[Tensor, " experts"],
    devices: int,
) -> Int[Tensor, "devices devices"]:
    """How many hidden states each device sends to each other one, so that the experts can work.

    home: the device that holds each token. device_of: the device of each expert. A token's hidden state is
    sent once to every device that holds one of its experts, however many it has there; not to its own
    device, where it is already. Entry (a, b) counts what device a sends to device b; the diagonal is 0.

    Two tokens, both on device 0; 4 experts, the first two on device 0, the others on device 1. The first
    token chose 0 and 2, the other 2 and 3: device 1 gets both, each once.

    >>> ids, device_of = torch.tensor([[0, 2], [2, 3]]), torch.tensor([0, 0, 1, 1])
    >>> message_counts(ids, torch.tensor([0, 0]), device_of, devices=2)
    tensor([[0, 2],
            [0, 0]])
    """
    raise NotImplementedError("exercise 07.5: write this, then run: python3 course.py check 07.5")


# exercise 07.6: a layer on several devices, with a bug (a bug hunt, difficulty 2 of 3, about 15 minutes)
# check: python3 course.py check 07.6     in a notebook: check("07.6")
# hint:  python3 course.py hint 07.6      in a notebook: hint("07.6")
def run_on_devices(
    x: Float[Tensor, "tokens hidden"],
    expert_ids: Int[Tensor, "tokens k"],
    weights: Float[Tensor, "tokens k"],
    w: Float[Tensor, "experts hidden hidden"],
    device_of: Int[Tensor, " experts"],
    devices: int,
) -> tuple[Float[Tensor, "tokens hidden"], list[int]]:
    """What chosen experts make of each token, device by device, and how many hidden states each device gets.

    Expert i is one matrix here: x_t w[i]. Every device gets the tokens that have an expert on it, each once;
    runs those of its experts that a token asks for, weighs and adds up what they give; and sends back one
    vector for each token it got. The tokens add up what comes back.

    Two experts, x -> x and x -> 2 x, on one device. A token of 1.0 has both, with weights 0.5 and 0.25: the
    device gets it once, and sends back 0.5 * 1 + 0.25 * 2 = 1.

    >>> w, device_of = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([0, 0])
    >>> ids, weights = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]])
    >>> run_on_devices(torch.ones(1, 1), ids, weights, w, device_of, devices=1)
    (tensor([[1.]]), [1])

    This code runs, and with experts that are far apart it is right. One of its lines is wrong: find it.
    """
    out, received = torch.zeros_like(x), []
    for device in range(devices):
        here = device_of[expert_ids] == device
        token = here.nonzero()[:, 0]
        results = torch.einsum("th, tkhg -> tkg", x[token], w[expert_ids[token]])
        back = (results * (weights * here)[token, :, None]).sum(dim=1)
        out = out.index_add(0, token, back)
        received.append(len(token))
    return out, received

# stub d7629a: file 65fced, 07.1 61a183, 07.2 b98569, 07.3 93cdb6, 07.4 c30a87, 07.5 69a306, 07.6 e06077
