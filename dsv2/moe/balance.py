"""Keeping experts and devices busy: auxiliary losses, token dropping, and how uneven a load is.

f counts choices and carries no gradient; P averages affinities and does: lowering sum f_i P_i takes
probability away from what is chosen too often. Each loss equals its alpha at perfect balance, but Mixtral's,
which equals K alpha. f counts what was asked for, before anything is dropped: so do Switch's equation
5 and GShard's algorithm 1, and the other papers leave it open. Padding counts for nothing.

Source: DeepSeek-V2, arXiv 2405.04434, sections 2.2.3 and 2.2.4, equations 23-31, where T is the length of one
sequence: the losses are computed for every sequence and averaged over the batch. The routers of other papers
take theirs over the whole batch.
"""

# B batch   T tokens   E routed experts   K experts per token   G devices   M devices per token

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2.config import DSV2Config
from dsv2.moe.routing import Routing


def expert_frequencies(
    expert_ids: Int[Tensor, "B T K"], n_experts: int, mask: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, "B E"]:
    """f_i = E / (K T) * (how many tokens chose expert i): 1 for everyone at perfect balance (equation 24)."""
    batch, tokens, k = expert_ids.shape
    if mask is None:
        chosen, real = torch.ones_like(expert_ids, dtype=torch.float32), tokens
    else:
        chosen = mask[..., None].expand_as(expert_ids).float()
        real = mask.sum(dim=1, keepdim=True).clamp(min=1)
    counts = chosen.new_zeros(batch, n_experts).scatter_add_(1, expert_ids.flatten(1), chosen.flatten(1))
    return counts * n_experts / (k * real)


def mean_affinities(
    scores: Float[Tensor, "B T E"], mask: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, "B E"]:
    """P_i = 1/T * sum_t s_{i,t} (equation 25)."""
    if mask is None:
        return scores.mean(dim=1)
    return (scores * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def device_reach(
    expert_ids: Int[Tensor, "B T K"],
    n_experts: int,
    n_group: int,
    topk_group: int,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B G"]:
    """f''_i = G / (M T) * (tokens sent to device i); a token counts once a device (equation 30)."""
    batch, tokens, _ = expert_ids.shape
    device_ids = expert_ids // (n_experts // n_group)
    sent = torch.zeros(batch, tokens, n_group, device=expert_ids.device).scatter_(2, device_ids, 1.0)
    return mean_affinities(sent, mask) * n_group / topk_group


def expert_balance_loss(
    scores: Float[Tensor, "B T E"],
    expert_ids: Int[Tensor, "B T K"],
    alpha: float,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """L_ExpBal = alpha_1 * sum_i f_i P_i (equation 23), averaged over the batch. mask: True at real."""
    f = expert_frequencies(expert_ids, scores.shape[-1], mask)
    return alpha * (f * mean_affinities(scores, mask)).sum(dim=-1).mean()


def device_balance_loss(
    scores: Float[Tensor, "B T E"],
    expert_ids: Int[Tensor, "B T K"],
    alpha: float,
    n_group: int,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """L_DevBal = alpha_2 * sum_i f'_i P'_i: f' the mean f, P' the summed P of a device's experts (26-28)."""
    f = expert_frequencies(expert_ids, scores.shape[-1], mask).unflatten(-1, (n_group, -1)).mean(dim=-1)
    p = mean_affinities(scores, mask).unflatten(-1, (n_group, -1)).sum(dim=-1)
    return alpha * (f * p).sum(dim=-1).mean()


def communication_balance_loss(
    scores: Float[Tensor, "B T E"],
    expert_ids: Int[Tensor, "B T K"],
    alpha: float,
    n_group: int,
    topk_group: int,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """L_CommBal = alpha_3 * sum_i f''_i P''_i: f'' the share of tokens that device i receives (29-31)."""
    f = device_reach(expert_ids, scores.shape[-1], n_group, topk_group, mask)
    p = mean_affinities(scores, mask).unflatten(-1, (n_group, -1)).sum(dim=-1)
    return alpha * (f * p).sum(dim=-1).mean()


def switch_balance_loss(
    scores: Float[Tensor, "B T E"],
    expert_ids: Int[Tensor, "B T K"],
    alpha: float,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """alpha N sum_i f_i P_i over the batch, f_i the share of tokens whose first choice is expert i.

    Switch, arXiv 2101.03961, equations 4-6. GShard (arXiv 2006.16668, algorithm 1) has the mean over experts
    of c_e / S m_e, this divided by N^2; its published code multiplies by N^2, and so does this function.
    """
    return expert_balance_loss(*_one_sequence(scores, expert_ids[..., :1]), alpha, _one_row(mask))


def mixtral_balance_loss(
    scores: Float[Tensor, "B T E"],
    expert_ids: Int[Tensor, "B T K"],
    alpha: float,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """alpha N sum_i f_i P_i over the batch, f_i the share of tokens that chose expert i as one of their K.

    These shares add up to K, so that the balanced value is K alpha. Mistral has not published its loss; this
    is the one of transformers' Mixtral, but for each layer by itself.
    """
    k = expert_ids.shape[-1]
    return k * expert_balance_loss(*_one_sequence(scores, expert_ids), alpha, _one_row(mask))


def deepseek_balance_loss(
    routing: Routing, cfg: DSV2Config, mask: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, ""]:
    """The three losses that `cfg` switches on, summed. With `seq_aux=False` the batch is one sequence."""
    scores, ids = routing.scores, routing.expert_ids
    if not cfg.seq_aux:
        (scores, ids), mask = _one_sequence(scores, ids), _one_row(mask)
    loss = scores.new_zeros(())
    if cfg.aux_loss_alpha:
        loss = loss + expert_balance_loss(scores, ids, cfg.aux_loss_alpha, mask)
    if cfg.device_loss_alpha:
        loss = loss + device_balance_loss(scores, ids, cfg.device_loss_alpha, cfg.n_group, mask)
    if cfg.communication_loss_alpha:
        alpha = cfg.communication_loss_alpha
        loss = loss + communication_balance_loss(scores, ids, alpha, cfg.n_group, cfg.topk_group, mask)
    return loss


def _one_sequence(*per_token: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.flatten(0, 1)[None] for part in per_token)


def _one_row(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten()[None]


def balance_loss(
    routing: Routing, cfg: DSV2Config, mask: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, ""]:
    """The loss of `cfg.router`'s own paper for one layer; a dense layer has nothing to balance.

    The alpha is cfg.aux_loss_alpha; Switch and GShard's code have 0.01. mask: True at real tokens.
    """
    if cfg.router == "deepseek":
        return deepseek_balance_loss(routing, cfg, mask)
    if cfg.router == "dense" or not cfg.aux_loss_alpha:
        return routing.scores.new_zeros(())
    loss = mixtral_balance_loss if cfg.router == "mixtral" else switch_balance_loss
    return loss(routing.scores, routing.expert_ids, cfg.aux_loss_alpha, mask)


def drop_tokens(
    routing: Routing,
    n_group: int,
    capacity_factor: float = 1.0,
    exempt: Bool[Tensor, " B"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "B T K"]:
    """Which token-expert pairs stay when every device computes at most its budget of them (section 2.2.4).

    A device's budget is capacity_factor times the average, K T B / G pairs; over it, the pairs with the
    lowest affinity go. Pairs of exempt sequences are never dropped (the paper keeps about a tenth), and come
    out of the same budget first. The paper leaves open what is dropped; here it is the pair. mask: padding
    takes no room.
    """
    ids = routing.expert_ids
    batch, tokens, _ = ids.shape
    real = torch.ones(batch, tokens, dtype=torch.bool, device=ids.device) if mask is None else mask
    real = real[..., None].expand_as(ids)
    budget = (real.sum() * capacity_factor / n_group).floor()
    affinity = routing.scores.detach().gather(-1, ids)
    if exempt is not None:
        affinity = torch.where(exempt[:, None, None], torch.inf, affinity)
    affinity = torch.where(real, affinity, -torch.inf).flatten()
    device_ids = (ids // (routing.n_experts // n_group)).flatten()

    order = affinity.argsort(descending=True, stable=True)
    order = order[device_ids[order].argsort(stable=True)]  # by device, and within one by affinity, best first
    per_device = torch.bincount(device_ids, minlength=n_group)
    first = per_device.cumsum(0) - per_device
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[device_ids[order]]
    kept = ((rank < budget) | affinity.isposinf()).view_as(ids)
    return kept & real


# ------------------------------------------------------------------------------------ how uneven a load is


def load_imbalance(load: Float[Tensor, " E"] | Int[Tensor, " E"]) -> float:
    """The busiest expert's load over the average one: 1 at perfect balance, E if one does everything."""
    load = load.float()
    return float(load.max() / load.mean().clamp(min=1e-9))


def load_variation(load: Float[Tensor, " E"] | Int[Tensor, " E"]) -> float:
    """Standard deviation of the load over its mean: 0 at perfect balance, sqrt(E - 1) if one does it all."""
    load = load.float()
    return float(load.std(correction=0) / load.mean().clamp(min=1e-9))


def dead_experts(load: Float[Tensor, " E"] | Int[Tensor, " E"], share: float = 0.1) -> Bool[Tensor, " E"]:
    """True for the experts with less than `share` of their fair load, which is the average."""
    load = load.float()
    return load < share * load.mean()


def dropped_share(routing: Routing, mask: Bool[Tensor, "B T"] | None = None) -> float:
    """How much of what was asked for was dropped, by chance or for want of room: dropped pairs over all.

    mask: True at real tokens; padding is never kept, and is no loss.
    """
    if routing.kept is None:
        return 0.0
    dropped = 1 - routing.kept.float().mean(dim=-1)
    real = torch.ones_like(dropped) if mask is None else mask.float()
    return float((dropped * real).sum() / real.sum().clamp(min=1))
