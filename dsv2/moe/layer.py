"""DeepSeekMoE: routing, the chosen experts, and the shared experts that every token passes through."""

from __future__ import annotations

import os
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dsv2.config import DSV2Config
from dsv2.kernels import prefill
from dsv2.kernels.experts import Choice, experts_few, norm_route
from dsv2.kernels.step import FEW_TOKENS
from dsv2.layers import SwiGLU
from dsv2.moe.balance import drop_tokens
from dsv2.moe.experts import RoutedExperts
from dsv2.moe.parallel import ExpertParallel
from dsv2.moe.routing import Router, Routing

EXEMPT_SHARE = 0.1  # of the sequences, which keep all their tokens (section 2.2.4)


class DeepSeekMoE(nn.Module):
    """sum_i FFN^(s)_i(u_t) + sum_i g_{i,t} FFN^(r)_i(u_t): (B, T, D) -> (B, T, D) and the Routing.

    The shared experts are one network N_s times as wide, which computes the same sum. With
    `cfg.capacity_factor`, tokens are dropped in training, never in evaluation: by device here, as DeepSeek-V2
    does, or by expert in the routers of other papers.

    `parallel`: who carries tokens to experts on other devices, and back; None: all experts are here.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.2, equation 20 (without the residual u_t, which the block
    adds).
    """

    def __init__(self, cfg: DSV2Config):
        super().__init__()
        self.cfg = cfg
        self.router = Router(cfg)
        self.device_budget = cfg.capacity_factor if cfg.router == "deepseek" else None
        self.experts = RoutedExperts(cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size)
        self.parallel: ExpertParallel | None = None  # set where the experts live on several devices
        self.shared = None
        if cfg.n_shared_experts:
            self.shared = SwiGLU(cfg.hidden_size, cfg.n_shared_experts * cfg.moe_intermediate_size)

    def forward(
        self, x: Float[Tensor, "B T D"], attention_mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Routing]:
        if self._few_tokens(x):
            return self._run_few(x)
        routing = self.router(x, attention_mask)
        if self.training and self.device_budget is not None:
            exempt = torch.rand(x.shape[0], device=x.device) < EXEMPT_SHARE
            routing.kept = drop_tokens(routing, self.cfg.n_group, self.device_budget, exempt, attention_mask)
        run = self.experts if self.parallel is None else partial(self.parallel, self.experts)
        out = run(
            x.flatten(0, 1),
            routing.expert_ids.flatten(0, 1),
            routing.weights.flatten(0, 1),
            None if routing.kept is None else routing.kept.flatten(0, 1),
        ).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, routing

    def _few_tokens(self, x: Tensor) -> bool:
        """Whether reading the weights is all that takes time, and the kernels of a decode step apply."""
        few = x.shape[0] * x.shape[1] <= FEW_TOKENS and prefill.fits(x) and not self.training
        return few and self.parallel is None and "DSV2_IMPL" not in os.environ

    def _run_few(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T D"], Routing]:
        shared = () if self.shared is None else (self.shared.w_gate_up.weight, self.shared.w_down.weight)
        rows, choice = x.flatten(0, 1), routing_choice(self.cfg)
        _, *chosen = norm_route(rows, None, 0.0, self.router.weight, choice)
        out = experts_few(rows, *chosen[:2], self.experts.w_gate_up, self.experts.w_down, *shared)
        return out.sum(dim=1).to(x.dtype).view_as(x), Routing(
            *(part.view(*x.shape[:2], -1) for part in chosen)
        )


def routing_choice(cfg: DSV2Config) -> Choice:
    """How the kernels of a decode step choose experts; capacity and chance are training's."""
    if cfg.router != "deepseek":
        scaling = {"dense": 1.0, "switch": 1.0, "gshard": None, "glam": None, "mixtral": None}[cfg.router]
        return Choice(cfg.num_experts_per_tok, scaling=scaling)
    groups = (0, 0) if cfg.topk_method == "greedy" else (cfg.n_group, cfg.topk_group)
    return Choice(cfg.num_experts_per_tok, *groups, None if cfg.norm_topk_prob else cfg.routed_scaling_factor)
