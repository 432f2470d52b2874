"""DeepSeek-V2: embed -> [norm, attention, norm, FFN or experts] x L -> norm -> head."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv2.attention import Cache, KVCache, LatentCache, Span, make_attention, new_cache, plan_span
from dsv2.config import DSV2Config
from dsv2.layers import RMSNorm, SwiGLU
from dsv2.moe import DeepSeekMoE, Routing, balance_loss
from dsv2.rope import RotaryEmbedding


@dataclass
class ModelOutput:
    """What a forward pass returns.

    logits: (batch, tokens, vocab), or (batch, 1, vocab) with `last_only`. balance_loss: scalar, summed over
    the layers, 0 outside training. routings: one `Routing` per layer of experts, first layer first.
    """

    logits: Float[Tensor, "batch tokens vocab"]
    balance_loss: Float[Tensor, ""]
    routings: list[Routing] = field(default_factory=list)


class Block(nn.Module):
    """x + attention(norm(x)), then + FFN(norm(.)), with experts where `cfg.is_moe_layer` says so."""

    def __init__(self, cfg: DSV2Config, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attention = make_attention(cfg, layer)
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.ffn = (
            DeepSeekMoE(cfg) if cfg.is_moe_layer(layer) else SwiGLU(cfg.hidden_size, cfg.intermediate_size)
        )

    def forward(
        self, x: Float[Tensor, "B T D"], span: Span, attention_mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Routing | None]:
        x = x + self.attention(self.attention_norm(x), span)
        if isinstance(self.ffn, DeepSeekMoE):
            out, routing = self.ffn(self.ffn_norm(x), attention_mask)
            return x + out, routing
        return x + self.ffn(self.ffn_norm(x)), None


class DeepSeekV2(nn.Module):
    """The language model: token ids (batch, tokens) -> `ModelOutput`.

    `tokenizer` is what `load_pretrained` and the trainer found beside the weights; `generate` uses it. With
    `checkpoint_blocks`, training keeps only the blocks' inputs and computes the rest again in the backward
    pass: less memory for about a third more work.
    """

    def __init__(self, cfg: DSV2Config):
        super().__init__()
        self.cfg = cfg
        self.tokenizer = None
        self.checkpoint_blocks = False
        self.embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        rotated = cfg.qk_rope_head_dim if cfg.attention == "mla" else cfg.baseline_head_dim
        self.rotary = RotaryEmbedding(rotated, cfg.rope_theta, cfg.rope_scaling)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        if cfg.tie_word_embeddings:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def _apply(self, fn, recurse=True):
        """Keep a tied head tied: on leaving `meta`, each of the two names is given memory of its own."""
        super()._apply(fn, recurse)
        if self.cfg.tie_word_embeddings:
            self.head.weight = self.embed.weight
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every matrix from N(0, initializer_range^2) (section 3.1.2: 0.006); norms start at 1."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=self.cfg.initializer_range)
            else:
                parameter.fill_(1.0)

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        *,
        cache: LatentCache | KVCache | None = None,
        attention_mask: Bool[Tensor, "batch tokens"] | Int[Tensor, "batch tokens"] | None = None,
        last_only: bool = False,
    ) -> ModelOutput:
        """Logits for the next token after each of `tokens`.

        cache: the tokens follow what it holds, and are added to it; no gradients are kept then.
        attention_mask: (batch, tokens), true at real tokens; padding may stand on either side, takes no
        position and no room in the cache, and its logits mean nothing. last_only: logits after each
        sequence's last real token alone. Raises ValueError for a shape that does not fit, IndexError for an
        id outside the vocabulary.
        """
        self._check(tokens, attention_mask, cache)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            return self._forward(tokens, cache, attention_mask, last_only)

    def _forward(
        self, tokens: Tensor, cache: Cache | None, attention_mask: Tensor | None, last_only: bool
    ) -> ModelOutput:
        mask = None if attention_mask is None else attention_mask.bool()
        span = plan_span(*tokens.shape, tokens.device, cache, mask)
        span.cos, span.sin = self.rotary(span.positions)

        x = self.embed(tokens)
        total, routings = x.new_zeros((), dtype=torch.float32), []
        for block in self.layers:
            if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
                x, routing = checkpoint(block, x, span, mask, use_reentrant=False)
            else:
                x, routing = block(x, span, mask)
            if routing is not None:
                routings.append(routing)
                if self.training:
                    total = total + balance_loss(routing, self.cfg, mask)
        if cache is not None:
            cache.advance(span)
        if last_only:
            x = x[:, -1:] if mask is None else x.take_along_dim(_last_real(mask)[:, None, None], dim=1)
        return ModelOutput(self.head(self.norm(x)), total, routings)

    def new_cache(
        self,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LatentCache | KVCache:
        """An empty cache for `batch` sequences of up to `max_tokens` tokens, on the model's device."""
        weight = self.embed.weight
        return new_cache(self.cfg, batch, max_tokens, device or weight.device, dtype or weight.dtype)

    def num_parameters(self, activated: bool = False) -> int:
        """Parameters, or those a token passes through: of the routed experts only the K that it chooses."""
        total = sum(p.numel() for p in self.parameters())
        if activated:
            for block in self.layers:
                if isinstance(block.ffn, DeepSeekMoE):
                    one = sum(p[0].numel() for p in block.ffn.experts.parameters())
                    total -= (self.cfg.n_routed_experts - self.cfg.num_experts_per_tok) * one
        return total

    def _check(self, tokens: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> None:
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.numel() == 0:
            raise ValueError(
                "tokens must be integers of shape (batch, tokens), at least one of each; "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask must have the shape of tokens, {tuple(tokens.shape)}; "
                f"got {tuple(attention_mask.shape)}"
            )
        expected = LatentCache if self.cfg.attention == "mla" else KVCache
        if cache is not None and not isinstance(cache, expected):
            raise ValueError(
                f"attention={self.cfg.attention!r} needs a {expected.__name__}; got a {type(cache).__name__} "
                "(make one with model.new_cache)"
            )
        if tokens.device.type == "cpu" and (
            int(tokens.min()) < 0 or int(tokens.max()) >= self.cfg.vocab_size
        ):
            raise IndexError(
                f"tokens holds ids from {int(tokens.min())} to {int(tokens.max())}; "
                f"the vocabulary has 0 to {self.cfg.vocab_size - 1}"
            )


def _last_real(mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, " batch"]:
    """The column of each row's last real token (0 for a row of padding)."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, 0).amax(dim=1)
