"""Chapter 08: losses that keep experts, devices and links busy, and dropping what does not fit.

Six exercises: count how often an expert is chosen, put a price on popular experts, on busy devices, count
how many tokens a device receives, a communication loss that has a bug, and dropping pairs to a budget.

    python3 course.py check 08        all of this chapter
    python3 course.py check 08.1      one exercise
    python3 course.py hint 08.1       a hint; again, for a plainer one
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2.moe import Routing


# exercise 08.1
def expert_frequencies(
    expert_ids: Int[Tensor, "batch tokens k"],
    n_experts: int,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch experts"]:
    """How often each expert was chosen, measured against the fair share: 1 for all at perfect balance.

        f_i = E / (K T) * sum over the tokens t of 1(t chose expert i)        (DeepSeek-V2, equation 24)

    E is n_experts, K how many experts a token chooses, T the number of tokens of the sequence; each sequence
    of the batch is counted by itself. mask: True at real tokens. Padding counts neither as a choice nor in T.

    4 tokens choose 1 of 2 experts: three the first, one the second. The fair share is 2 tokens each.

    >>> expert_frequencies(torch.tensor([[[0], [0], [1], [0]]]), n_experts=2)
    tensor([[1.5000, 0.5000]])

    The last of them is padding: of 3 real tokens, two chose the first expert, and the fair share is 1.5.

    >>> expert_frequencies(torch.tensor([[[0], [0], [1], [0]]]), 2, torch.tensor([[True, True, True, False]]))
    tensor([[1.3333, 0.6667]])
    """
    # <solution>
    k = expert_ids.shape[2]
    # (batch, tokens, experts): 1 where a token chose an expert. The K choices of a token are K experts.
    chosen = torch.nn.functional.one_hot(expert_ids, n_experts).sum(dim=2).float()
    tokens = expert_ids.shape[1]
    if mask is not None:
        chosen = chosen * mask[..., None]
        tokens = mask.sum(dim=1, keepdim=True).clamp(min=1)  # a sequence of padding alone divides by 1
    return n_experts / (k * tokens) * chosen.sum(dim=1)
    # </solution>


# exercise 08.2
def expert_balance_loss(
    scores: Float[Tensor, "batch tokens experts"],
    expert_ids: Int[Tensor, "batch tokens k"],
    alpha: float,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """The expert-level balance loss: popular experts, times how much affinity goes to them.

        L_ExpBal = alpha * sum over the experts i of f_i P_i,    P_i = mean over the tokens t of s_{i,t}
                                                               (DeepSeek-V2, equations 23 and 25)

    scores: the affinities s after the softmax, those of all experts. f as in exercise 08.1; it is a count and
    carries no gradient. P does. The equations hold for each sequence; the result is the mean over the
    batch. mask: True at real tokens; padding counts in neither f nor P.

    Two tokens with affinities (0.8, 0.2) and (0.6, 0.4) both choose the first of 2 experts: f is (2, 0), P
    is (0.7, 0.3), and with alpha 0.1 the loss is 0.1 * (2 * 0.7 + 0 * 0.3) = 0.14.

    >>> scores = torch.tensor([[[0.8, 0.2], [0.6, 0.4]]])
    >>> expert_balance_loss(scores, torch.tensor([[[0], [0]]]), alpha=0.1)
    tensor(0.1400)
    """
    # <solution>
    f = expert_frequencies(expert_ids, scores.shape[-1], mask)
    if mask is None:
        p = scores.mean(dim=1)
    else:
        p = (scores * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    # Going down in this sum, a router takes affinity from experts with a large f: it flows to those with a
    # small one, since a token's affinities add up to 1.
    return alpha * (f * p).sum(dim=-1).mean()
    # </solution>


# exercise 08.3
def device_balance_loss(
    scores: Float[Tensor, "batch tokens experts"],
    expert_ids: Int[Tensor, "batch tokens k"],
    alpha: float,
    n_group: int,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """The device-level balance loss: the same for whole devices, whose experts may differ among themselves.

        L_DevBal = alpha * sum over the devices i of f'_i P'_i                (DeepSeek-V2, equation 26)
        f'_i = mean of f_j over the device's experts                          (27)
        P'_i = sum of P_j over the device's experts                           (28)

    Experts lie on n_group devices in blocks of neighbours: with 6 experts on 2 devices, 0, 1, 2 on the first
    and 3, 4, 5 on the second. f and P as in exercise 08.2, for each sequence; the result is the mean over the
    batch. Only P carries a gradient.

    Two tokens choose expert 0 and expert 1 of 4 on 2 devices: f is (2, 2, 0, 0), so f' is (2, 0). With the
    affinities below, P is (0.4, 0.4, 0.1, 0.1) and P' is (0.8, 0.2). The loss is 0.1 * 2 * 0.8 = 0.16.

    >>> scores = torch.tensor([[[0.5, 0.3, 0.1, 0.1], [0.3, 0.5, 0.1, 0.1]]])
    >>> device_balance_loss(scores, torch.tensor([[[0], [1]]]), alpha=0.1, n_group=2)
    tensor(0.1600)
    """
    # <solution>
    f = expert_frequencies(expert_ids, scores.shape[-1], mask)
    if mask is None:
        p = scores.mean(dim=1)
    else:
        p = (scores * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    # (batch, experts) -> (batch, devices, experts on each). A mean for f', so that 1 stays the fair share; a
    # sum for P', so that all of them still add up to 1.
    f_device = f.unflatten(-1, (n_group, -1)).mean(dim=-1)
    p_device = p.unflatten(-1, (n_group, -1)).sum(dim=-1)
    return alpha * (f_device * p_device).sum(dim=-1).mean()
    # </solution>


# exercise 08.4
def device_reach(
    expert_ids: Int[Tensor, "batch tokens k"],
    n_experts: int,
    n_group: int,
    topk_group: int,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch devices"]:
    """How many tokens each device receives, measured against the aim of M T / D.

        f''_i = D / (M T) * sum over the tokens t of 1(t is sent to device i)   (DeepSeek-V2, equation 30)

    D is n_group, M is topk_group, the most devices a token may be sent to; T the number of tokens of the
    sequence. A token is sent to a device once, even if several of its experts live there. Experts lie on
    devices in blocks of neighbours, as in exercise 08.3. mask: True at real tokens.

    Two tokens, 4 experts on 2 devices, M = 1. The first chose the experts 0 and 1: device 0, once. The
    second chose 1 and 2: both devices. Device 0 receives 2 tokens, device 1 one; the aim is 1 * 2 / 2 = 1.

    >>> device_reach(torch.tensor([[[0, 1], [1, 2]]]), n_experts=4, n_group=2, topk_group=1)
    tensor([[2., 1.]])
    """
    # <solution>
    batch, tokens, _ = expert_ids.shape
    device_ids = expert_ids // (n_experts // n_group)
    # Writing 1 at one place twice leaves a 1: a token that has two experts on a device counts once.
    sent = torch.zeros(batch, tokens, n_group, device=expert_ids.device).scatter_(2, device_ids, 1.0)
    if mask is not None:
        sent = sent * mask[..., None]
        tokens = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return n_group / (topk_group * tokens) * sent.sum(dim=1)
    # </solution>


# exercise 08.5
def communication_balance_loss(
    scores: Float[Tensor, "batch tokens experts"],
    expert_ids: Int[Tensor, "batch tokens k"],
    alpha: float,
    n_group: int,
    topk_group: int,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """The communication balance loss: devices that receive many tokens, times the affinity to them.

        L_CommBal = alpha * sum over the devices i of f''_i P''_i             (DeepSeek-V2, equation 29)
        f''_i = D / (M T) * sum over the tokens t of 1(t is sent to device i) (30)
        P''_i = sum of P_j over the device's experts                          (31)

    D is n_group, M is topk_group. The equations hold for each sequence; the result is the mean over the
    batch. Only P carries a gradient. Padding, where mask is False, counts for nothing.

    4 experts on 2 devices, M = 1, one token that chose the experts 0 and 1: it is sent to device 0 alone, so
    f'' is (2, 0). P'' is (0.7, 0.3), and the loss is 0.1 * 2 * 0.7 = 0.14.

    >>> scores, ids = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]), torch.tensor([[[0, 1]]])
    >>> communication_balance_loss(scores, ids, alpha=0.1, n_group=2, topk_group=1)
    tensor(0.1400)

    This code runs, and what it returns looks like a loss. One of its lines is wrong: find it.
    """
    # <solution>
    batch, tokens, n_experts = scores.shape
    real = torch.ones(batch, tokens) if mask is None else mask.float()
    length = real.sum(dim=1, keepdim=True).clamp(min=1)
    # Expert i lives on device i // per_device: the same blocks of neighbours that unflatten makes below.
    device_ids = expert_ids // (n_experts // n_group)
    sent = torch.zeros(batch, tokens, n_group).scatter_(2, device_ids, 1.0) * real[..., None]
    f = n_group / (topk_group * length) * sent.sum(dim=1)
    p = (scores * real[..., None]).sum(dim=1) / length
    p = p.unflatten(-1, (n_group, -1)).sum(dim=-1)
    return alpha * (f * p).sum(dim=-1).mean()
    # <given>
    #| batch, tokens, n_experts = scores.shape
    #| real = torch.ones(batch, tokens) if mask is None else mask.float()
    #| length = real.sum(dim=1, keepdim=True).clamp(min=1)
    #| device_ids = expert_ids % n_group
    #| sent = torch.zeros(batch, tokens, n_group).scatter_(2, device_ids, 1.0) * real[..., None]
    #| f = n_group / (topk_group * length) * sent.sum(dim=1)
    #| p = (scores * real[..., None]).sum(dim=1) / length
    #| p = p.unflatten(-1, (n_group, -1)).sum(dim=-1)
    #| return alpha * (f * p).sum(dim=-1).mean()
    # </given>
    # </solution>


# exercise 08.6
def drop_tokens(
    routing: Routing,
    n_group: int,
    capacity_factor: float = 1.0,
    exempt: Bool[Tensor, " batch"] | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "batch tokens k"]:
    """Which pairs of token and expert stay when no device computes more than its budget.

    A device's budget is capacity_factor times the average, (real pairs of the batch) / n_group, rounded down
    (DeepSeek-V2, section 2.2.4). On a device over its budget, the pairs with the lowest affinity are
    dropped. exempt: True for sequences of which nothing is ever dropped; their pairs take their room out of
    the same budget first, and stay even if they alone are more than the budget. mask: True at real tokens;
    padding takes no room and comes out False.

    routing.expert_ids and routing.weights: (batch, tokens, k); routing.scores: the affinities (batch, tokens,
    experts), from which the chosen experts' are to be taken. Experts lie on devices in blocks of neighbours.

    4 tokens choose 1 of 2 experts, each on a device of its own: three the first, with affinities 0.9, 0.6
    and 0.7. The budget is 2, and the pair with 0.6 goes.

    >>> scores = torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]])
    >>> weights, expert_ids = scores.topk(1)
    >>> drop_tokens(Routing(expert_ids, weights, scores), n_group=2).flatten()
    tensor([ True, False,  True,  True])
    """
    # <solution>
    ids = routing.expert_ids
    real = torch.ones(ids.shape[:2], dtype=torch.bool) if mask is None else mask
    real = real[..., None].expand_as(ids)
    budget = int(capacity_factor * int(real.sum()) / n_group)
    affinity = routing.scores.gather(-1, ids)
    if exempt is not None:
        affinity = affinity.masked_fill(exempt[:, None, None], torch.inf)  # first of all
    affinity = affinity.masked_fill(~real, -torch.inf)  # last of all
    device_ids = ids // (routing.n_experts // n_group)

    kept = real.clone()
    for device in range(n_group):
        here = (device_ids == device) & real
        # One line of all sequences' pairs on this device, highest affinity first.
        order = affinity.masked_fill(~here, -torch.inf).flatten().argsort(descending=True)
        over = order[: int(here.sum())][budget:]
        kept.view(-1)[over] = affinity.flatten()[over] == torch.inf  # only exempt ones stay beyond it
    return kept
    # </solution>
