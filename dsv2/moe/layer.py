"""DeepSeekMoE: routing, the chosen experts, and the shared experts that every token passes through."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dsv2.config import DSV2Config
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
