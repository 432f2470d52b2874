"""Which experts a token goes to: DeepSeek-V2's choice, and those of the papers before it.

A router is one function from affinities s_{i,t} to a `Routing`; `ROUTES` names them for `cfg.router`:

    deepseek  the K best, weighted by s (DeepSeekMoE, arXiv 2401.06066), or the K best among those on the M
              best devices (DeepSeek-V2, arXiv 2405.04434)
    dense     all E, weighted by s
    switch    the best one, weighted by s; each expert has a capacity (Switch, arXiv 2101.03961)
    gshard    the two best, with weights of sum 1; a capacity; the second by chance (GShard, arXiv 2006.16668)
    glam      the same without chance (GLaM, arXiv 2112.06905)
    mixtral   the same without a capacity (Mixtral, arXiv 2401.04088)

Capacity and chance are for training alone. In evaluation a token must not depend on which others are in its
batch, and decoding token by token with a cache must equal one pass over the whole text.

DeepSeek-V2, sections 2.2.1 and 2.2.2, has equations 20-22.
"""

# B batch   T tokens   D hidden_size   E routed experts   K experts per token
# G devices   M devices per token

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsv2.config import DSV2Config


@dataclass
class Routing:
    """Where one layer sends its tokens; what dispatch, balance losses and pictures are made from.

    expert_ids: (batch, tokens, K) int64, best first. weights: (batch, tokens, K), what each expert's output
    is multiplied by. scores: (batch, tokens, E), the affinities s_{i,t} before any choice. kept: (batch,
    tokens, K) bool, False where a token was dropped, by chance or to keep an expert within its capacity or a
    device within its budget; None: nothing was dropped.
    """

    expert_ids: Int[Tensor, "B T K"]
    weights: Float[Tensor, "B T K"]
    scores: Float[Tensor, "B T E"]
    kept: Bool[Tensor, "B T K"] | None = None

    @property
    def n_experts(self) -> int:
        return self.scores.shape[-1]

    def load(self) -> Int[Tensor, " E"]:
        """How many of the batch's tokens chose each expert, before dropping."""
        return torch.bincount(self.expert_ids.flatten(), minlength=self.n_experts)

    def detach(self) -> Routing:
        """The same without gradients, to keep for later."""
        return Routing(self.expert_ids, self.weights.detach(), self.scores.detach(), self.kept)


def expert_affinity(x: Float[Tensor, "B T D"], centroids: Float[Tensor, "E D"]) -> Float[Tensor, "B T E"]:
    """s_{i,t} = Softmax_i(u_t^T e_i), in float32 always: near ties decide who works (equation 22)."""
    return (x.float() @ centroids.float().mT).softmax(dim=-1)


def allowed_experts(
    scores: Float[Tensor, "*batch E"], n_group: int, topk_group: int
) -> Bool[Tensor, "*batch E"]:
    """True for the experts on the `topk_group` devices that hold the best experts (section 2.2.2).

    Expert i lives on device i * G // E; a device is as good as its best expert.
    """
    device_scores = scores.unflatten(-1, (n_group, -1)).amax(dim=-1)
    chosen = device_scores.topk(topk_group, dim=-1).indices
    on_chosen = torch.zeros_like(device_scores, dtype=torch.bool).scatter(-1, chosen, True)
    return on_chosen.repeat_interleave(scores.shape[-1] // n_group, dim=-1)


def top_k(scores: Float[Tensor, "B T E"], k: int) -> Routing:
    """The K experts with the highest affinity, weighted by it (equation 21)."""
    weights, expert_ids = scores.topk(k, dim=-1)
    return Routing(expert_ids, weights, scores)


def device_limited_top_k(scores: Float[Tensor, "B T E"], k: int, n_group: int, topk_group: int) -> Routing:
    """The K best experts among those on the M = `topk_group` best devices (section 2.2.2).

    Forbidden experts are set to -inf, not 0: with 0 one of them could be chosen where an allowed affinity
    underflows to 0.
    """
    allowed = allowed_experts(scores, n_group, topk_group)
    expert_ids = scores.masked_fill(~allowed, -torch.inf).topk(k, dim=-1).indices
    return Routing(expert_ids, scores.gather(-1, expert_ids), scores)


def deepseek(scores: Float[Tensor, "B T E"], cfg: DSV2Config) -> Routing:
    """The choice that `cfg.topk_method` names.

    The weights are multiplied by `routed_scaling_factor`, or, with `norm_topk_prob`, normalised to 1 instead.
    """
    if cfg.topk_method == "greedy":
        routing = top_k(scores, cfg.num_experts_per_tok)
    else:
        routing = device_limited_top_k(scores, cfg.num_experts_per_tok, cfg.n_group, cfg.topk_group)
    if cfg.norm_topk_prob:
        routing.weights = routing.weights / routing.weights.sum(dim=-1, keepdim=True)
    elif cfg.routed_scaling_factor != 1.0:
        routing.weights = routing.weights * cfg.routed_scaling_factor
    return routing


# ----------------------------------------------------------------------------------- routers of other papers


def dense(scores: Float[Tensor, "B T E"]) -> Routing:
    """Every expert works for every token, weighted by its affinity: a mixture without a choice."""
    return top_k(scores, scores.shape[-1])


def switch(
    scores: Float[Tensor, "B T E"],
    capacity_factor: float | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Routing:
    """The best expert alone, weighted by its affinity as it is (Switch, arXiv 2101.03961, section 2.1).

    Divided by its sum the weight would always be 1, and the router would learn nothing from the task. Tokens
    over capacity are left to the residual connection (section 2.2). The paper's noise on the router's input
    is left out.
    """
    routing = top_k(scores, 1)
    if capacity_factor is not None:
        asking = _real_pairs(routing.expert_ids, mask)
        routing.kept = within_capacity(routing.expert_ids, scores.shape[-1], capacity_factor, asking)
    return routing


def gshard(
    scores: Float[Tensor, "B T E"],
    capacity_factor: float | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    by_chance: bool = False,
    generator: torch.Generator | None = None,
) -> Routing:
    """The two best experts, with weights g_1 and g_2 of sum 1 (GShard, arXiv 2006.16668, algorithm 1).

    by_chance: the second is kept with probability min(1, 2 g_2), drawn from `generator`, or from torch's own:
    what weighs little is rarely worth its computation. What chance refuses takes no room; where either of the
    two is dropped, the other's weight stays as it is.
    """
    routing = mixtral(scores)
    if capacity_factor is None and not by_chance:
        return routing
    kept = _real_pairs(routing.expert_ids, mask)
    if by_chance:
        g_2 = routing.weights[..., 1].detach()
        drawn = torch.rand(g_2.shape, generator=generator, device=g_2.device, dtype=g_2.dtype)
        kept = torch.stack((kept[..., 0], kept[..., 1] & (drawn < 2 * g_2)), dim=-1)
    if capacity_factor is not None:
        kept = within_capacity(routing.expert_ids, scores.shape[-1], capacity_factor, kept)
    routing.kept = kept
    return routing


def glam(
    scores: Float[Tensor, "B T E"],
    capacity_factor: float | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Routing:
    """GShard's two experts without chance (GLaM, arXiv 2112.06905, section 4).

    The paper does not say whether its second expert is a matter of chance; here it is not.
    """
    return gshard(scores, capacity_factor, mask)


def mixtral(scores: Float[Tensor, "B T E"]) -> Routing:
    """The two best experts with weights of sum 1, and no capacity (Mixtral, arXiv 2401.04088, section 2.1).

    The paper takes the softmax over the two best logits alone, which is the softmax over all, divided by the
    sum of the two.
    """
    routing = top_k(scores, 2)
    routing.weights = routing.weights / routing.weights.sum(dim=-1, keepdim=True)
    return routing


def expert_capacity(tokens: int, k: int, n_experts: int, capacity_factor: float) -> int:
    """How many tokens an expert takes: capacity_factor times the average K T / E, rounded down, at least 1.

    The papers do not round; their code does, and has a least capacity too (4 in mesh-tensorflow).

    >>> expert_capacity(tokens=100, k=1, n_experts=8, capacity_factor=1.25)
    15
    """
    return max(1, math.floor(capacity_factor * k * tokens / n_experts + 1e-9))  # 1.15 * 100 is 114.99...


def within_capacity(
    expert_ids: Int[Tensor, "B T K"], n_experts: int, capacity_factor: float, asking: Bool[Tensor, "B T K"]
) -> Bool[Tensor, "B T K"]:
    """Which of the `asking` pairs find room: all first choices before any second one, each by position.

    The position is that in the batch, one sequence after the other. T in the capacity is the number of tokens
    routed together: those of this call that are not padding (they ask with their first choice). With
    micro-batches or several processes each counts its own, as GShard's groups do.
    """
    batch, tokens, k = expert_ids.shape
    capacity = expert_capacity(int(asking[..., 0].sum()), k, n_experts, capacity_factor)
    asks = rearrange(asking, "b t k -> (k b t)")
    experts = torch.where(asks, rearrange(expert_ids, "b t k -> (k b t)"), n_experts)
    queue, order = experts.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(queue, queue)
    return rearrange(asks & (place < capacity), "(k b t) -> b t k", b=batch, t=tokens)


def _real_pairs(expert_ids: Int[Tensor, "B T K"], mask: Bool[Tensor, "B T"] | None) -> Bool[Tensor, "B T K"]:
    if mask is None:
        return torch.ones_like(expert_ids, dtype=torch.bool)
    return mask[..., None].expand_as(expert_ids)


# ------------------------------------------------------------------------------------------ picking a router

Route = Callable[[Tensor, DSV2Config, "Tensor | None", bool], Routing]

# What `cfg.router` names: a function of scores, configuration, mask and whether the model is in training.
ROUTES: dict[str, Route] = {
    "deepseek": lambda scores, cfg, mask, training: deepseek(scores, cfg),  # its layer drops by device
    "dense": lambda scores, cfg, mask, training: dense(scores),
    "switch": lambda scores, cfg, mask, training: switch(scores, _factor(cfg, training), mask),
    "gshard": lambda scores, cfg, mask, training: gshard(scores, _factor(cfg, training), mask, training),
    "glam": lambda scores, cfg, mask, training: glam(scores, _factor(cfg, training), mask),
    "mixtral": lambda scores, cfg, mask, training: mixtral(scores),
}


def _factor(cfg: DSV2Config, training: bool) -> float | None:
    return cfg.capacity_factor if training else None


class Router(nn.Module):
    """Affinities from learned centroids e_i, and the choice that `cfg.router` names: (B, T, D) -> Routing.

    mask: True at real tokens; padding takes no room in training.
    """

    def __init__(self, cfg: DSV2Config):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))

    def forward(self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"] | None = None) -> Routing:
        scores = expert_affinity(x, self.weight)
        return ROUTES[self.cfg.router](scores, self.cfg, mask, self.training)
