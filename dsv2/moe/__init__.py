"""Mixture of experts: who computes a token, how the work is kept even, and the layer that does it."""

from __future__ import annotations

from dsv2.moe.balance import (
    balance_loss,
    dead_experts,
    drop_tokens,
    dropped_share,
    load_imbalance,
    load_variation,
)
from dsv2.moe.experts import RoutedExperts
from dsv2.moe.layer import DeepSeekMoE
from dsv2.moe.parallel import ExpertParallel, FakeDevices, Placement, ProcessGroup, Traffic
from dsv2.moe.routing import Router, Routing, device_limited_top_k, top_k

__all__ = [
    "DeepSeekMoE",
    "ExpertParallel",
    "FakeDevices",
    "Placement",
    "ProcessGroup",
    "RoutedExperts",
    "Router",
    "Routing",
    "Traffic",
    "balance_loss",
    "dead_experts",
    "device_limited_top_k",
    "drop_tokens",
    "dropped_share",
    "load_imbalance",
    "load_variation",
    "top_k",
]
