"""What decoding keeps of the past: a `LatentCache` for MLA, a `KVCache` for MHA, GQA and MQA.

Both are allocated once, at the size asked for, and hold every layer of a model. A sequence of the batch is
packed from slot 0 without gaps, so that a token's slot is its position; sequences may differ in length.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2.config import DSV2Config


@dataclass
class Span:
    """Where the tokens of one forward pass stand, and which keys each of them may see.

    positions: (batch, tokens) int64, of each token in its sequence; padding has a position too, which nothing
    uses. mask: (batch or 1, tokens, keys) bool, True where a query may look; None: `causal` says it all.
    causal: query t sees keys 0..t (no cache, or an empty one); with neither, every query sees every key.
    keys: how many keys there are once this span is in. start: the slot of the first token when all sequences
    are equally long; None: `rows`, `columns`, `slots` hold, for every real token, its sequence, its column in
    the span and its slot in the cache. counts: (batch,) int32 real tokens of each sequence; None: all.
    """

    positions: Int[Tensor, "batch tokens"]
    keys: int
    mask: Bool[Tensor, "_ tokens keys"] | None = None
    causal: bool = False
    start: int | None = None
    rows: Int[Tensor, " real"] | None = None
    columns: Int[Tensor, " real"] | None = None
    slots: Int[Tensor, " real"] | None = None
    counts: Int[Tensor, " batch"] | None = None
    cache: Cache | None = None
    cos: Float[Tensor, "batch tokens pairs"] | None = None
    sin: Float[Tensor, "batch tokens pairs"] | None = None


def plan_span(
    batch: int,
    tokens: int,
    device: torch.device,
    cache: Cache | None = None,
    attention_mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Span:
    """The span of `tokens` further tokens per sequence, after those in `cache`.

    attention_mask: (batch, tokens), True at real tokens; padding may stand left or right of them. Without
    one, every token is real. Raises ValueError if the cache is too small or for another batch.
    """
    if cache is not None and cache.batch != batch:
        raise ValueError(f"tokens holds {batch} sequences, but the cache was made for {cache.batch}")
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if cache is None:
        return _plan_without_cache(batch, tokens, device, attention_mask)
    if attention_mask is None and cache.equal_lengths:
        return _plan_equal(batch, tokens, device, cache)
    return _plan_ragged(batch, tokens, device, cache, attention_mask)


def _plan_without_cache(batch: int, tokens: int, device: torch.device, attention_mask: Tensor | None) -> Span:
    columns = torch.arange(tokens, device=device)
    if attention_mask is None:
        return Span(positions=columns.expand(batch, tokens), keys=tokens, causal=True)
    # Padding sees itself: a row of the softmax with nothing in it would be NaN.
    itself = columns[:, None] == columns
    visible = (columns[:, None] >= columns) & attention_mask[:, None, :] | itself
    return Span(positions=_real_positions(attention_mask), keys=tokens, mask=visible)


def _plan_equal(batch: int, tokens: int, device: torch.device, cache: Cache) -> Span:
    start, keys = cache.longest, cache.longest + tokens
    cache.require_room(keys)
    positions = torch.arange(start, keys, device=device)
    span = Span(positions=positions.expand(batch, tokens), keys=keys, start=start, cache=cache)
    if start == 0:
        span.causal = True
    elif tokens > 1:
        span.mask = (positions[:, None] >= torch.arange(keys, device=device))[None]
    return span


def _plan_ragged(
    batch: int, tokens: int, device: torch.device, cache: Cache, attention_mask: Tensor | None
) -> Span:
    if attention_mask is None:
        positions = cache.lengths[:, None].long() + torch.arange(tokens, device=device)
        counts, keys = None, cache.longest + tokens
        rows = torch.arange(batch, device=device).repeat_interleave(tokens)
        columns = torch.arange(tokens, device=device).repeat(batch)
    else:
        counts = attention_mask.sum(dim=1, dtype=torch.int32)
        positions = cache.lengths[:, None].long() + _real_positions(attention_mask)
        keys = max(int((cache.lengths + counts).max()), 1)
        rows, columns = attention_mask.nonzero(as_tuple=True)
    cache.require_room(keys)
    return Span(
        positions=positions,
        keys=keys,
        mask=positions[..., None] >= torch.arange(keys, device=device),
        rows=rows,
        columns=columns,
        slots=positions[rows, columns],
        counts=counts,
        cache=cache,
    )


def _real_positions(attention_mask: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """How many real tokens stand before each token of its row."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


class Cache(ABC):
    """The book-keeping that both caches share: how long each sequence is, and how much room is left.

    lengths: (batch,) int32, on the cache's device. longest: the longest of them, known without asking the
    device.
    """

    def __init__(self, layers: int, batch: int, max_tokens: int, device: torch.device | str | None):
        for name, value in (("layers", layers), ("batch", batch), ("max_tokens", max_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.layers, self.batch, self.max_tokens = layers, batch, max_tokens
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.longest = 0
        self.equal_lengths = True

    def require_room(self, tokens: int) -> None:
        """Raise ValueError unless sequences of `tokens` tokens fit."""
        if tokens > self.max_tokens:
            raise ValueError(
                f"the cache holds max_tokens={self.max_tokens} tokens a sequence and {tokens} are needed; "
                f"make it larger: model.new_cache(batch, max_tokens={tokens})"
            )

    def advance(self, span: Span) -> None:
        """Count a span's tokens in. The model calls this once all layers have written."""
        if span.counts is None:
            self.lengths += span.positions.shape[1]
        else:
            self.lengths += span.counts
            self.equal_lengths = bool((self.lengths == self.lengths[0]).all())
        self.longest = span.keys if span.counts is None else int(self.lengths.max())

    def reset(self) -> None:
        """Forget everything; the memory stays, zeroed, so that a NaN of the past cannot reach the future."""
        self._clear()
        self.lengths.zero_()
        self.longest = 0
        self.equal_lengths = True

    def truncate(self, tokens: int) -> None:
        """Keep at most the first `tokens` tokens of every sequence."""
        if tokens < 0:
            raise ValueError(f"tokens={tokens} must not be negative")
        self.lengths.clamp_(max=tokens)
        self.longest = min(self.longest, tokens)
        self.equal_lengths = self.equal_lengths or bool((self.lengths == self.longest).all())

    def _put(self, store: Tensor, new: Tensor, span: Span) -> Tensor:
        """Write (batch, tokens, ...) into one layer's (batch, max_tokens, ...); returns the filled part.

        What is returned has the type of `new`, whatever type it is kept in.
        """
        if span.start is not None:
            store[:, span.start : span.keys] = new
        else:
            store[span.rows, span.slots] = new[span.rows, span.columns].to(store.dtype)
        return store[:, : span.keys].to(new.dtype)

    @abstractmethod
    def _clear(self) -> None: ...

    @property
    @abstractmethod
    def elements_per_token(self) -> int:
        """Numbers kept for each token, all layers together: the quantity of the paper's table 1."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    def bytes_per_token(self) -> int:
        return self.elements_per_token * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes allocated, filled or not."""
        return self.bytes_per_token * self.batch * self.max_tokens

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch={self.batch}, tokens={self.longest}/{self.max_tokens}, "
            f"{self.bytes_per_token} bytes per token)"
        )


class LatentCache(Cache):
    """c_KV and k^R of every past token: (d_c + d_h^R) numbers a token and layer, shared by all heads.

    latent: (layers, batch, max_tokens, d_c); k_rope: (layers, batch, max_tokens, d_h^R), rotated already.
    Both are views of `entries`, where the two stand side by side (DeepSeek-V2, section 2.1.3).
    """

    def __init__(
        self,
        cfg: DSV2Config,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(cfg.num_hidden_layers, batch, max_tokens, device)
        width = cfg.kv_lora_rank + cfg.qk_rope_head_dim
        self.entries = torch.zeros(self.layers, batch, max_tokens, width, device=device, dtype=dtype)
        self.latent = self.entries[..., : cfg.kv_lora_rank]
        self.k_rope = self.entries[..., cfg.kv_lora_rank :]

    def append(
        self,
        layer: int,
        latent: Float[Tensor, "batch tokens C"],
        k_rope: Float[Tensor, "batch tokens R"],
        span: Span,
    ) -> tuple[Float[Tensor, "batch keys C"], Float[Tensor, "batch keys R"]]:
        """Write a span of one layer; returns everything that layer now holds."""
        return self._put(self.latent[layer], latent, span), self._put(self.k_rope[layer], k_rope, span)

    def first(self, sequences: int) -> LatentCache:
        """The first so many sequences of this cache, as a cache of their own in the same memory."""
        part = copy.copy(self)
        part.batch, part.lengths = sequences, self.lengths[:sequences]
        part.entries, part.latent, part.k_rope = (
            x[:, :sequences] for x in (self.entries, self.latent, self.k_rope)
        )
        return part

    def _clear(self) -> None:
        self.entries.zero_()

    @property
    def elements_per_token(self) -> int:
        return self.layers * self.entries.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.entries.dtype


class KVCache(Cache):
    """Full keys and values of every past token: 2 * kv_heads * head_dim numbers a token and layer.

    keys, values: (layers, batch, max_tokens, kv_heads, head_dim); keys are rotated already. In memory the
    tokens of one head stand together, so that a head of a sequence reads like a sequence of its own.
    """

    def __init__(
        self,
        cfg: DSV2Config,
        batch: int,
        max_tokens: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(cfg.num_hidden_layers, batch, max_tokens, device)
        shape = (2, self.layers, batch, cfg.kv_heads, max_tokens, cfg.baseline_head_dim)
        self.keys, self.values = torch.zeros(shape, device=device, dtype=dtype).transpose(3, 4).unbind(0)

    def append(
        self,
        layer: int,
        keys: Float[Tensor, "batch tokens kv_heads head_dim"],
        values: Float[Tensor, "batch tokens kv_heads head_dim"],
        span: Span,
    ) -> tuple[Float[Tensor, "batch keys kv_heads head_dim"], Float[Tensor, "batch keys kv_heads head_dim"]]:
        """Write a span of one layer; returns everything that layer now holds."""
        return self._put(self.keys[layer], keys, span), self._put(self.values[layer], values, span)

    def first(self, sequences: int) -> KVCache:
        """The first so many sequences of this cache, as a cache of their own in the same memory."""
        part = copy.copy(self)
        part.batch, part.lengths = sequences, self.lengths[:sequences]
        part.keys, part.values = (x[:, :sequences] for x in (self.keys, self.values))
        return part

    def _clear(self) -> None:
        self.keys.zero_()
        self.values.zero_()

    @property
    def elements_per_token(self) -> int:
        return 2 * self.layers * self.keys.shape[-2] * self.keys.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype


def new_cache(
    cfg: DSV2Config,
    batch: int,
    max_tokens: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> LatentCache | KVCache:
    """The cache that `cfg.attention` needs."""
    kind = LatentCache if cfg.attention == "mla" else KVCache
    return kind(cfg, batch, max_tokens, device, dtype)
