"""Multi-head, grouped-query and multi-query attention: what MLA is compared with.

They differ in one number, how many heads of keys and values the query heads share: all their own (MHA,
arXiv 1706.03762), one per group (GQA, arXiv 2305.13245), or a single one (MQA, arXiv 1911.02150).
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dsv2.attention.cache import KVCache, Span
from dsv2.config import DSV2Config
from dsv2.rope import rotate_pairs, softmax_scale


def grouped_attention(
    q: Float[Tensor, "batch tokens heads qk_dim"],
    k: Float[Tensor, "batch keys kv_heads qk_dim"],
    v: Float[Tensor, "batch keys kv_heads v_dim"],
    scale: float,
    mask: Bool[Tensor, "_ tokens keys"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "batch tokens heads v_dim"]:
    """softmax(scale * q k^T) v, where query head h reads key/value head h * kv_heads // heads.

    mask: True where a query may look; causal: query t sees keys 0..t. The values may be narrower than the
    keys.
    """
    narrow = v.shape[-1]
    if q.device.type == "cpu" and narrow < q.shape[-1]:
        # The CPU's fused kernel wants values as wide as keys; without it all tokens x keys scores are stored.
        v = F.pad(v, (0, q.shape[-1] - narrow))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask[:, None],
        is_causal=causal,
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)[..., :narrow]


class GroupedQueryAttention(nn.Module):
    """MHA, GQA or MQA, by `cfg.attention`: (batch, tokens, hidden) -> (batch, tokens, hidden)."""

    def __init__(self, cfg: DSV2Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = cfg.baseline_head_dim
        self.scale = softmax_scale(cfg)
        self.w_q = nn.Linear(cfg.hidden_size, cfg.num_attention_heads * self.head_dim, bias=False)
        self.w_k = nn.Linear(cfg.hidden_size, cfg.kv_heads * self.head_dim, bias=False)
        self.w_v = nn.Linear(cfg.hidden_size, cfg.kv_heads * self.head_dim, bias=False)
        self.w_o = nn.Linear(cfg.num_attention_heads * self.head_dim, cfg.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "batch tokens hidden"], span: Span
    ) -> Float[Tensor, "batch tokens hidden"]:
        q, k, v = (
            rearrange(w(x), "batch tokens (heads dim) -> batch tokens heads dim", dim=self.head_dim)
            for w in (self.w_q, self.w_k, self.w_v)
        )
        q, k = rotate_pairs(q, span.cos, span.sin), rotate_pairs(k, span.cos, span.sin)
        if span.cache is not None:
            assert isinstance(span.cache, KVCache)
            k, v = span.cache.append(self.layer, k, v, span)
        out = grouped_attention(q, k, v, self.scale, span.mask, span.causal)
        return self.w_o(rearrange(out, "batch tokens heads dim -> batch tokens (heads dim)"))
