"""Attention: MLA, the baselines it is compared with, and their caches."""

from __future__ import annotations

from torch import nn

from dsv2.attention.baselines import GroupedQueryAttention, grouped_attention
from dsv2.attention.cache import Cache, KVCache, LatentCache, Span, new_cache, plan_span
from dsv2.attention.mla import MultiHeadLatentAttention
from dsv2.config import DSV2Config

__all__ = [
    "Cache",
    "GroupedQueryAttention",
    "KVCache",
    "LatentCache",
    "MultiHeadLatentAttention",
    "Span",
    "grouped_attention",
    "make_attention",
    "new_cache",
    "plan_span",
]


def make_attention(cfg: DSV2Config, layer: int) -> nn.Module:
    """The attention of one layer, by `cfg.attention`."""
    return (MultiHeadLatentAttention if cfg.attention == "mla" else GroupedQueryAttention)(cfg, layer)
