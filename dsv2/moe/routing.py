"""Which experts a token goes to: affinities, top-k, and DeepSeek-V2's device-limited choice.

Source: DeepSeek-V2, arXiv 2405.04434, sections 2.2.1 and 2.2.2, equations 20-22.
"""

# B batch   T tokens   D hidden_size   E routed experts   K experts per token
# G devices   M devices per token

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsv2.config import DSV2Config


@dataclass
class Routing:
    """Where one layer sends its tokens; what dispatch, balance losses and pictures are made from.

    expert_ids: (batch, tokens, K) int64, best first. weights: (batch, tokens, K), what each expert's output
    is multiplied by. scores: (batch, tokens, E), the affinities s_{i,t} before any choice. kept: (batch,
    tokens, K) bool, False where a token was dropped to keep a device within its budget; None: nothing was
    dropped.
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


class Router(nn.Module):
    """Affinities from learned centroids e_i, and the choice by `cfg.topk_method`: (B, T, D) -> Routing.

    The weights are multiplied by `routed_scaling_factor`, or, with `norm_topk_prob`, normalised to 1 instead.
    """

    def __init__(self, cfg: DSV2Config):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))

    def forward(self, x: Float[Tensor, "B T D"]) -> Routing:
        cfg = self.cfg
        scores = expert_affinity(x, self.weight)
        if cfg.topk_method == "greedy":
            routing = top_k(scores, cfg.num_experts_per_tok)
        else:
            routing = device_limited_top_k(scores, cfg.num_experts_per_tok, cfg.n_group, cfg.topk_group)
        if cfg.norm_topk_prob:
            routing.weights = routing.weights / routing.weights.sum(dim=-1, keepdim=True)
        elif cfg.routed_scaling_factor != 1.0:
            routing.weights = routing.weights * cfg.routed_scaling_factor
        return routing
