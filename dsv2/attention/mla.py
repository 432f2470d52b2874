"""Multi-head Latent Attention (MLA): one set of weights, two forms of the same computation.

Expanded: keys and values of every head are recovered from the latents, then attended to as usual. Best where
many queries share the recovery: training and prefill. Absorbed: W^UK moves to the query and W^UV to the
output, so that attention runs over the cached latents as they are. Best for decoding, where one query would
have to pay for recovering the whole past.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C (equations 37-47).
"""

# B batch   T tokens (queries)   S cached tokens (keys)   H heads   D hidden_size
# C kv_lora_rank (the latent)    R qk_rope_head_dim       N qk_nope_head_dim   V v_head_dim

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dsv2.attention.baselines import grouped_attention
from dsv2.attention.cache import LatentCache, Span
from dsv2.config import DSV2Config
from dsv2.layers import RMSNorm
from dsv2.rope import rotate_pairs, softmax_scale

FORMS = ("auto", "expanded", "absorbed")
LATENT_NORM_EPS = 1e-6  # of the norms on the latents; the released code does not take it from the config


def expand_keys_values(
    latent: Float[Tensor, "B S C"],
    k_rope: Float[Tensor, "B S R"],
    w_uk: Float[Tensor, "H N C"],
    w_uv: Float[Tensor, "H V C"],
) -> tuple[Float[Tensor, "B S H N_plus_R"], Float[Tensor, "B S H V"]]:
    """Every head's keys [W^UK c; k^R] and values W^UV c, from the latents (equations 10, 11, 17)."""
    heads = w_uk.shape[0]
    k_nope = (latent @ w_uk.flatten(0, 1).mT).unflatten(-1, (heads, -1))
    v = (latent @ w_uv.flatten(0, 1).mT).unflatten(-1, (heads, -1))
    return torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, heads, -1)), dim=-1), v


def absorb_query(q_nope: Float[Tensor, "B T H N"], w_uk: Float[Tensor, "H N C"]) -> Float[Tensor, "B T H C"]:
    """Move W^UK from the keys to the query, so that scores are taken against the cached latent.

    q^T (W^UK c) = ((W^UK)^T q)^T c: one small product per query replaces one per cached token (section
    2.1.2).
    """
    return torch.einsum("bthn,hnc->bthc", q_nope, w_uk)


def absorbed_attention(
    q_latent: Float[Tensor, "B T H C"],
    q_rope: Float[Tensor, "B T H R"],
    latent: Float[Tensor, "B S C"],
    k_rope: Float[Tensor, "B S R"],
    scale: float,
    mask: Bool[Tensor, "_ T S"] | None = None,
) -> Float[Tensor, "B T H C"]:
    """Attention over the latents themselves: softmax(scale (q_latent c^T + q_rope k_rope^T)) c.

    All heads read one shared sequence of latents, as in multi-query attention; `mask` is True where a query
    may look. The result is a mixture of latents for every head, still to be multiplied by W^UV.
    """
    tokens, heads = q_latent.shape[1:3]
    scores = torch.baddbmm(
        q_latent.flatten(1, 2) @ latent.mT, q_rope.flatten(1, 2), k_rope.mT, beta=scale, alpha=scale
    )
    if mask is not None:
        hidden = ~mask[:, :, None].expand(-1, -1, heads, -1).flatten(1, 2)
        scores = scores.masked_fill(hidden, -torch.inf)
    attention = scores.softmax(dim=-1, dtype=torch.float32).to(latent.dtype)
    return (attention @ latent).unflatten(1, (tokens, heads))


def expand_output(
    o_latent: Float[Tensor, "B T H C"], w_uv: Float[Tensor, "H V C"]
) -> Float[Tensor, "B T H V"]:
    """Apply W^UV after attention instead of before it: sum_j a_j (W^UV c_j) = W^UV (sum_j a_j c_j)."""
    return torch.einsum("bthc,hvc->bthv", o_latent, w_uv)


def absorbed_is_cheaper(cfg: DSV2Config, tokens: int, keys: int) -> bool:
    """Whether `tokens` queries against `keys` cached tokens take fewer multiply-adds in the absorbed form.

    Per head, absorbed: T S (2C + R) + T C (N + V); expanded: T S (N + R + V) + S C (N + V). With V2's sizes
    the absorbed form wins up to about 170 new tokens at once.
    """
    latent, rope = cfg.kv_lora_rank, cfg.qk_rope_head_dim
    recovered = cfg.qk_nope_head_dim + cfg.v_head_dim
    absorbed = tokens * keys * (2 * latent + rope) + tokens * latent * recovered
    expanded = tokens * keys * (recovered + rope) + keys * latent * recovered
    return absorbed < expanded


class MultiHeadLatentAttention(nn.Module):
    """MLA: (batch, tokens, hidden) -> (batch, tokens, hidden).

    `form` is "auto" (the cheaper one: absorbed for decoding, expanded otherwise), "expanded" or "absorbed".

    Weights: queries W^Q, or W^DQ, a norm and [W^UQ; W^QR] with q_lora_rank; `w_dkv` = [W^DKV; W^KR], which
    gives the latent and the shared rotary key; `w_uk`, `w_uv` per head; `w_o`.
    """

    def __init__(self, cfg: DSV2Config, layer: int):
        super().__init__()
        self.cfg, self.layer, self.form = cfg, layer, "auto"
        self.scale = softmax_scale(cfg)
        heads, width = cfg.num_attention_heads, cfg.num_attention_heads * cfg.qk_head_dim
        if cfg.q_lora_rank is None:
            self.w_q = nn.Linear(cfg.hidden_size, width, bias=False)
        else:
            self.w_dq = nn.Linear(cfg.hidden_size, cfg.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(cfg.q_lora_rank, LATENT_NORM_EPS)
            self.w_uq = nn.Linear(cfg.q_lora_rank, width, bias=False)
        self.w_dkv = nn.Linear(cfg.hidden_size, cfg.kv_lora_rank + cfg.qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(cfg.kv_lora_rank, LATENT_NORM_EPS)
        self.w_uk = nn.Parameter(torch.empty(heads, cfg.qk_nope_head_dim, cfg.kv_lora_rank))
        self.w_uv = nn.Parameter(torch.empty(heads, cfg.v_head_dim, cfg.kv_lora_rank))
        self.w_o = nn.Linear(heads * cfg.v_head_dim, cfg.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "B T D"], span: Span) -> Float[Tensor, "B T D"]:
        q_nope, q_rope = self.queries(x, span)
        latent, k_rope = self.compress(x, span)
        if span.cache is not None:
            assert isinstance(span.cache, LatentCache)
            latent, k_rope = span.cache.append(self.layer, latent, k_rope, span)
        if self._absorb(span):
            mask = span.mask
            if span.causal and x.shape[1] > 1:
                mask = torch.ones(1, x.shape[1], span.keys, dtype=torch.bool, device=x.device).tril()
            q_latent = absorb_query(q_nope, self.w_uk)
            out = expand_output(
                absorbed_attention(q_latent, q_rope, latent, k_rope, self.scale, mask), self.w_uv
            )
        else:
            k, v = expand_keys_values(latent, k_rope, self.w_uk, self.w_uv)
            q = torch.cat((q_nope, q_rope), dim=-1)
            out = grouped_attention(q, k, v, self.scale, span.mask, span.causal)
        return self.w_o(rearrange(out, "b t h v -> b t (h v)"))

    def queries(
        self, x: Float[Tensor, "B T D"], span: Span
    ) -> tuple[Float[Tensor, "B T H N"], Float[Tensor, "B T H R"]]:
        """The part without position and the rotated part of every head's query (equations 12-14)."""
        q = self.w_q(x) if self.cfg.q_lora_rank is None else self.w_uq(self.q_norm(self.w_dq(x)))
        q = rearrange(q, "b t (h qk) -> b t h qk", qk=self.cfg.qk_head_dim)
        q_nope, q_rope = q.split([self.cfg.qk_nope_head_dim, self.cfg.qk_rope_head_dim], dim=-1)
        return q_nope, rotate_pairs(q_rope, span.cos, span.sin)

    def compress(
        self, x: Float[Tensor, "B T D"], span: Span
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T R"]]:
        """What is cached: the normalised latent c^KV and the rotated key k^R that all heads share (9, 15).

        k^R is taken from the hidden state, not from the latent, and is not normalised.
        """
        latent, k_rope = self.w_dkv(x).split([self.cfg.kv_lora_rank, self.cfg.qk_rope_head_dim], dim=-1)
        return self.kv_norm(latent), rotate_pairs(k_rope[:, :, None], span.cos, span.sin)[:, :, 0]

    def _absorb(self, span: Span) -> bool:
        if self.form == "auto":
            return span.cache is not None and absorbed_is_cheaper(
                self.cfg, span.positions.shape[1], span.keys
            )
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r} is unknown; choose one of {', '.join(FORMS)}")
        return self.form == "absorbed"
