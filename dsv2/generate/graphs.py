"""Decoding as fast as the weights can be read: one step of the whole model as a CUDA graph.

A step at batch 1 is about three hundred short kernels; launched one by one from Python they would leave the
GPU idle nine tenths of the time. Captured once in a graph, they follow each other within a microsecond. A
graph is tied to addresses: the tokens that go in, the cache, its lengths, the logits that come out. So the
cache is static, lengths live on the device, and a sequence that has ended is masked there, not taken out.
"""

# B batch   H heads   D hidden_size   C kv_lora_rank (the latent)   R qk_rope_head_dim   N qk_nope_head_dim

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dsv2.attention import Cache, new_cache
from dsv2.attention.mla import LATENT_NORM_EPS
from dsv2.config import DSV2Config
from dsv2.kernels import mla_decode
from dsv2.kernels.backend import kernel_problem
from dsv2.kernels.experts import experts_few, norm_route
from dsv2.kernels.step import absorb_append, add_norm, heads_linear, linear
from dsv2.layers import swiglu
from dsv2.model import Block, DeepSeekV2
from dsv2.moe import DeepSeekMoE, Routing
from dsv2.moe.layer import routing_choice
from dsv2.rope import rotate_pairs

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # a batch in between is filled up with empty sequences
DENSE_TOKENS = 16  # in a model without experts, from here on its networks are products as any other
ROOM = 1024  # a static cache's size is a multiple of this, so that a slightly longer text needs no new graph


def why_not(model: DeepSeekV2, batch: int, cache: Cache | None = None) -> str | None:
    """Why this model is decoded step by step from Python, as a sentence; None: through graphs."""
    problem = kernel_problem(model.embed.weight.device)
    if problem is not None:
        return problem
    if model.cfg.attention == "mla" and any(block.attention.form != "auto" for block in model.layers):
        return "a layer's form of attention was chosen by hand"
    if "DSV2_IMPL" in os.environ:
        return "functions of the model have been replaced (DSV2_IMPL)"
    if cache is not None and cache.dtype != model.embed.weight.dtype:
        return f"the cache holds {cache.dtype}, the model computes in {model.embed.weight.dtype}"
    if batch > BATCHES[-1]:
        return f"a batch of {batch} is larger than {BATCHES[-1]}"
    return None


# ------------------------------------------------------------------------------------------- one step


class StepLayer:
    """One block's weights as a decode step takes them; products of the same input are one matrix."""

    def __init__(self, block: Block, cfg: DSV2Config):
        self.block, self.attention, self.cfg = block, block.attention, cfg
        self.choice = None
        if isinstance(block.ffn, DeepSeekMoE):
            self.choice = routing_choice(block.ffn.cfg)
        else:  # a dense network is a layer with one expert, which every token chooses
            self.w_gate_up, self.w_down = block.ffn.w_gate_up.weight[None], block.ffn.w_down.weight[None]

    def attend(self, x: Tensor, normed: Tensor, step: Step) -> Tensor:
        """x + attention(normed), and what the token leaves in the cache appended to it."""
        raise NotImplementedError

    def feed_forward(self, x: Tensor, step: Step) -> Tensor:
        """What is still to be added to x: (B, summands, D), float32. Routers leave their choice in `step`."""
        norm, ffn = self.block.ffn_norm, self.block.ffn
        if self.choice is None:
            _, normed = add_norm(x, None, norm.weight, norm.eps)
            if not self.cfg.moe_layers and len(x) > DENSE_TOKENS:
                inner = swiglu(linear(normed, ffn.w_gate_up.weight))
                return linear(inner, ffn.w_down.weight)[:, None]
            return experts_few(normed, step.only_expert, step.full_weight, self.w_gate_up, self.w_down)
        shared = () if ffn.shared is None else (ffn.shared.w_gate_up.weight, ffn.shared.w_down.weight)
        normed, *chosen = norm_route(x, norm.weight, norm.eps, ffn.router.weight, self.choice, step.arrivals)
        step.chosen.append(chosen)
        return experts_few(normed, *chosen[:2], ffn.experts.w_gate_up, ffn.experts.w_down, *shared)


class LatentStepLayer(StepLayer):
    """A block with MLA, in its absorbed form."""

    def __init__(self, block: Block, cfg: DSV2Config):
        super().__init__(block, cfg)
        first = self.attention.w_q if cfg.q_lora_rank is None else self.attention.w_dq
        self.w_in = torch.cat((first.weight, self.attention.w_dkv.weight)).detach()

    def attend(self, x: Tensor, normed: Tensor, step: Step) -> Tensor:
        cfg, attention = self.cfg, self.attention
        projected = linear(normed, self.w_in)
        cached = cfg.kv_lora_rank + cfg.qk_rope_head_dim
        first, compressed = projected[:, :-cached], projected[:, -cached:]
        if cfg.q_lora_rank is not None:
            _, first = add_norm(first, None, attention.q_norm.weight, LATENT_NORM_EPS)
            first = linear(first, attention.w_uq.weight)
        q = first.unflatten(1, (cfg.num_attention_heads, cfg.qk_head_dim))
        latent, k_rope = step.cache.latent[attention.layer], step.cache.k_rope[attention.layer]
        q_latent, q_rope = absorb_append(
            q, attention.w_uk, compressed, attention.kv_norm.weight, LATENT_NORM_EPS,
            step.angles, step.turn_length, latent, k_rope, step.cache.lengths, step.active,
        )  # fmt: skip
        mixed = mla_decode(q_latent, q_rope, latent, k_rope, step.filled, attention.scale)
        return linear(heads_linear(mixed, attention.w_uv).flatten(1), attention.w_o.weight, residual=x)


class GroupedStepLayer(StepLayer):
    """A block with MHA, GQA or MQA, through the kernel that was made for MLA.

    To `mla_decode` a token is a pair: a latent, which is scored and mixed, and a rotary key, which is only
    scored. With a group's values as latents, its keys as rotary keys, and queries that are zero where they
    meet the latents, it computes softmax(scale q k^T) v. Groups stand in the place of sequences.
    """

    def __init__(self, block: Block, cfg: DSV2Config):
        super().__init__(block, cfg)
        attention = self.attention
        self.w_in = torch.cat([w.weight for w in (attention.w_q, attention.w_k, attention.w_v)]).detach()

    def attend(self, x: Tensor, normed: Tensor, step: Step) -> Tensor:
        cfg, attention = self.cfg, self.attention
        heads, groups, width = cfg.num_attention_heads, cfg.kv_heads, cfg.baseline_head_dim
        projected = linear(normed, self.w_in).unflatten(1, (heads + 2 * groups, width))
        turned = rotate_pairs(projected[:, : heads + groups], step.cos, step.sin)
        q, new_keys, new_values = turned[:, :heads], turned[:, heads:], projected[:, -groups:]
        keys, values = (part[attention.layer] for part in (step.cache.keys, step.cache.values))
        for store, new in ((keys, new_keys), (values, new_values)):
            kept = torch.where(step.active.bool()[:, None, None], new, store[step.rows, step.slots])
            store[step.rows, step.slots] = kept
        q = q.reshape(-1, heads // groups, width)  # (B groups, heads of a group, channels)
        keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (keys, values))
        lengths = step.filled[:, None].expand(-1, groups).reshape(-1)
        mixed = mla_decode(torch.zeros_like(q), q, values, keys, lengths, attention.scale)
        return linear(mixed.reshape(len(x), heads * width), attention.w_o.weight, residual=x)


@dataclass
class Step:
    """What all layers of one step share."""

    cache: Cache
    active: Tensor  # (B,) int32, 0 where no token is fed in
    filled: Tensor  # (B,) int32, lengths once this step's tokens are in
    angles: Tensor  # (B, R / 2) float32
    turn_length: float
    only_expert: Tensor  # (B, 1) int64 zeros, (B, 1) float32 ones: how a dense network is chosen
    full_weight: Tensor
    arrivals: Tensor  # (B,) int32 zeros, which the layers' routers share
    chosen: list[list[Tensor]]
    rows: Tensor  # (B,) int64, 0, 1, 2, ...; and the slot of each row's new token
    slots: Tensor

    @cached_property
    def cos(self) -> Tensor:
        """(B, R / 2), YaRN's factor included, as `sin`."""
        return self.angles.cos() * self.turn_length

    @cached_property
    def sin(self) -> Tensor:
        return self.angles.sin() * self.turn_length


class StepModel:
    """The model as one function of token ids, a cache and which sequences take part."""

    def __init__(self, model: DeepSeekV2):
        self.cfg, self.rotary = model.cfg, model.rotary
        self.embed, self.norm, self.head = model.embed, model.norm, model.head
        kind = LatentStepLayer if model.cfg.attention == "mla" else GroupedStepLayer
        self.layers = [kind(block, model.cfg) for block in model.layers]
        self.signature = weights_signature(model)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, active: Tensor, cache: Cache) -> tuple[Tensor, list[Tensor]]:
        """Feed tokens (B,) in; logits (B, vocab), and expert ids, weights and scores of all layers, stacked.

        Appends to the cache and adds `active` to its lengths, all on the device.
        """
        batch = len(tokens)
        step = Step(
            cache,
            active,
            cache.lengths + active,
            cache.lengths[:, None].float() * self.rotary.frequencies,
            self.rotary.length,
            torch.zeros(batch, 1, dtype=torch.int64, device=tokens.device),
            torch.ones(batch, 1, device=tokens.device),
            torch.zeros(batch, dtype=torch.int32, device=tokens.device),
            [],
            torch.arange(batch, device=tokens.device),
            cache.lengths.long().clamp(max=cache.max_tokens - 1),
        )
        x, summands = self.embed(tokens), None
        for layer in self.layers:
            norm = layer.block.attention_norm
            x, normed = add_norm(x, summands, norm.weight, norm.eps)
            x = layer.attend(x, normed, step)
            summands = layer.feed_forward(x, step)
        _, normed = add_norm(x, summands, self.norm.weight, self.norm.eps)
        logits = linear(normed, self.head.weight)
        cache.lengths += active
        return logits, [torch.stack(parts) for parts in zip(*step.chosen)]

    def new_cache(self, batch: int, max_tokens: int) -> Cache:
        weight = self.embed.weight
        return new_cache(self.cfg, batch, max_tokens, weight.device, weight.dtype)


def weights_signature(model: DeepSeekV2) -> tuple:
    """Changes when a weight is moved or written to: what was prepared from it is then out of date."""
    return tuple((p.data_ptr(), p._version) for p in model.parameters())


# ------------------------------------------------------------------------------------------- graphs


class Captured:
    """A step at fixed addresses: `run` copies the tokens in and replays the graph."""

    def __init__(self, step: StepModel, cache: Cache):
        device = cache.lengths.device
        self.cache = cache
        self.tokens = torch.zeros(cache.batch, dtype=torch.int64, device=device)
        self.active = torch.zeros(cache.batch, dtype=torch.int32, device=device)
        self.busy = False
        self._step, self._graph = step, None
        if device.type == "cuda":
            self._capture()

    def _capture(self) -> None:
        """Once outside the graph, so that kernels are compiled; no sequence takes part, and none changes."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(self.tokens, self.active, self.cache)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = self._step(self.tokens, self.active, self.cache)

    @torch.no_grad()
    def run(self, tokens: Tensor, active: Tensor) -> tuple[Tensor, list[Routing]]:
        """Feed in tokens (b,), b up to the batch: logits (b, vocab) until the next run, and the routings."""
        count = len(tokens)
        self.tokens[:count] = tokens
        self.active[:count] = active
        self.active[count:] = 0
        if self._graph is None:
            logits, chosen = self._step(self.tokens, self.active, self.cache)
        else:
            self._graph.replay()
            logits, chosen = self._out[0], [part.clone() for part in self._out[1]]
        chosen = [part[:, :count, None] for part in chosen]
        return logits[:count], [Routing(*layer) for layer in zip(*chosen)]


class GraphDecoder:
    """A model's prepared weights, its static cache and the step captured for it; `of` keeps one a model."""

    _known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __init__(self, model: DeepSeekV2):
        self._step = StepModel(model)
        self._captured: Captured | None = None

    @classmethod
    def of(cls, model: DeepSeekV2) -> GraphDecoder:
        """The decoder of this model, made anew when its weights have changed."""
        known = cls._known.get(model)
        if known is None or known._step.signature != weights_signature(model):
            known = cls._known[model] = cls(model)
        return known

    def prepare(self, batch: int, max_tokens: int, cache: Cache | None = None) -> Captured:
        """A captured step for `batch` sequences of up to `max_tokens` tokens, its cache empty unless given.

        Without a cache the static one is used, if it has the room; else a larger one takes its place.
        """
        if cache is not None:
            return Captured(self._step, cache)
        rows = next(size for size in BATCHES if size >= batch)
        if self._captured is not None and self._captured.busy:  # a text that is still being written
            return Captured(self._step, self._step.new_cache(rows, max_tokens))
        if (
            self._captured is None
            or self._captured.cache.batch != rows
            or (self._captured.cache.max_tokens < max_tokens)
        ):
            self._captured = None  # its memory goes before the new one comes
            room = -(-max_tokens // ROOM) * ROOM
            self._captured = Captured(self._step, self._step.new_cache(rows, room))
        self._captured.cache.truncate(0)
        return self._captured
