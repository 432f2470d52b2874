"""Prefill and the decode loop: step by step from Python, or through CUDA graphs where kernels can run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2.attention import Cache
from dsv2.generate.graphs import Captured, GraphDecoder, why_not
from dsv2.generate.sampling import Sampling
from dsv2.model import DeepSeekV2
from dsv2.moe import Routing

# Tokens of all prompts that go through the model at once, which bounds the memory of long ones. A GPU needs
# thousands to be busy.
PREFILL_CHUNK = {"cpu": 1024, "cuda": 8192}
LEAST_CHUNK = 256  # of each prompt, however many there are


@dataclass
class DecodeStep:
    """One new token for every sequence.

    tokens: (batch,). alive: (batch,), False where the text had ended before.

    routings: of the tokens that were just fed in (the prompt's last piece at first), one per layer of
    experts. Through CUDA graphs `tokens` and `alive` are on the CPU, as they have been fetched already.
    """

    tokens: Int[Tensor, " batch"]
    alive: Bool[Tensor, " batch"]
    routings: list[Routing]
    cache: Cache


def prefill(
    model: DeepSeekV2, prompts: Sequence[Sequence[int]], cache: Cache, chunk: int | None = None
) -> tuple[Float[Tensor, "batch vocab"], list[Routing]]:
    """Put prompts of different lengths into the cache; returns the logits after each one's last token.

    chunk: tokens of each prompt at once; by default as many as PREFILL_CHUNK allows.
    """
    device = model.embed.weight.device
    if chunk is None:
        chunk = max(PREFILL_CHUNK.get(device.type, 1024) // len(prompts), LEAST_CHUNK)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = max(len(p) for p in prompts)
    tokens = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    real = torch.arange(longest, device=device) < lengths[:, None]
    logits = None
    for start in range(0, longest, chunk):
        piece = slice(start, start + chunk)
        mask = None if len({len(p) for p in prompts}) == 1 else real[:, piece]
        out = model(tokens[:, piece], cache=cache, attention_mask=mask, last_only=True)
        ends_here = (lengths > start) & (lengths <= start + chunk)
        last = out.logits[:, 0]
        logits = last if logits is None else torch.where(ends_here[:, None], last, logits)
    return logits, out.routings


def decode(
    model: DeepSeekV2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    eos_id: int | None = None,
    cache: Cache | None = None,
) -> Iterator[DecodeStep]:
    """Prefill, then one `DecodeStep` per new token until every sequence has ended.

    On a GPU that Triton compiles for, each step is one CUDA graph (graphs.py says when) over a static cache,
    which the next call uses again. Elsewhere the model is called step by step, with a cache exactly as large
    as the longest prompt and `max_new_tokens` need. A cache that is given is used instead. A sequence ends
    with `eos_id`, or when the caller sets its place in `step.alive` to False.

    Raises ValueError for an empty prompt, or one that leaves no room in `max_position_embeddings`.
    """
    _check_prompts(model, prompts, max_new_tokens)
    loop = decode_step_by_step if why_not(model, len(prompts), cache) else decode_with_graphs
    was_training = model.training
    model.eval()
    try:
        yield from loop(model, prompts, max_new_tokens, sampling, eos_id, cache)
    finally:
        model.train(was_training)


def decode_step_by_step(
    model: DeepSeekV2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
    cache: Cache | None,
) -> Iterator[DecodeStep]:
    """`decode` by calling the model once a token."""
    device = model.embed.weight.device
    batch, longest = len(prompts), max(len(p) for p in prompts)
    if cache is None:  # the last token is never fed in again, so it needs no place
        cache = model.new_cache(batch, longest + max_new_tokens - 1)
    generators = sampling.generators(batch, device)
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    logits, routings = prefill(model, prompts, cache)
    for made in range(1, max_new_tokens + 1):
        tokens = sampling.draw(logits, generators)
        step = DecodeStep(tokens, alive.clone(), routings, cache)
        yield step
        alive = alive & step.alive
        if eos_id is not None:
            alive = alive & (tokens != eos_id)
        if made == max_new_tokens or not alive.any():
            return
        mask = None if alive.all() else alive[:, None]
        out = model(tokens[:, None], cache=cache, attention_mask=mask)
        logits, routings = out.logits[:, -1], out.routings


def decode_with_graphs(
    model: DeepSeekV2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
    cache: Cache | None,
) -> Iterator[DecodeStep]:
    """`decode` by replaying one captured step, always one token ahead of the caller.

    While the caller has a token in hand, the GPU works on the next: the token never waits for Python. A
    sequence that the caller ends has then been fed one token too many, which is taken back.
    """
    batch, longest = len(prompts), max(len(p) for p in prompts)
    captured = GraphDecoder.of(model).prepare(batch, longest + max_new_tokens - 1, cache)
    if cache is None:
        cache = captured.cache.first(batch)
    captured.busy = True  # a text that begins before this one has ended gets a cache of its own
    try:
        yield from replay(model, captured, cache, prompts, max_new_tokens, sampling, eos_id)
    finally:
        captured.busy = False


def replay(
    model: DeepSeekV2,
    captured: Captured,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None,
) -> Iterator[DecodeStep]:
    """The loop of `decode_with_graphs`; `cache`: the prompts' part of the captured one."""
    device, batch = model.embed.weight.device, len(prompts)
    generators = sampling.generators(batch, device)
    logits, routings = prefill(model, prompts, cache)
    lengths = cache.lengths.cpu().clone()  # as the caller has seen them grow
    alive = torch.ones(batch, dtype=torch.bool)
    going_on = alive.to(device)
    fed = torch.zeros(batch, dtype=torch.bool)  # given the token that the caller holds
    try:
        for made in range(1, max_new_tokens + 1):
            tokens = sampling.draw(logits, generators)
            fetched, arrived = fetch(tokens)
            if made < max_new_tokens:
                cache.require_room(int(lengths[alive].max()) + 1)  # the kernels write without asking
                fed = alive.clone()
                if eos_id is not None:
                    going_on = going_on & (tokens != eos_id)
                logits, next_routings = captured.run(tokens, going_on)
            arrived()
            if eos_id is not None:
                fed &= fetched != eos_id
            step = DecodeStep(fetched, alive.clone(), routings, cache)
            yield step
            alive = alive & step.alive.cpu()
            if eos_id is not None:
                alive &= fetched != eos_id
            if made == max_new_tokens or not alive.any():
                return
            if (fed & ~alive).any():  # ended by the caller, which the device does not know yet
                cache.lengths -= (fed & ~alive).to(device, torch.int32)
                going_on = alive.to(device)
            lengths += alive
            cache.longest = captured.cache.longest = int(lengths.max())
            fed[:] = False
            routings = next_routings
    finally:  # nothing of the token that the caller last held stays in the cache
        if fed.any():
            cache.lengths -= fed.to(device, torch.int32)
        cache.longest = captured.cache.longest = int(lengths.max())
        cache.equal_lengths = bool((lengths == lengths[0]).all())
        captured.cache.equal_lengths = cache.equal_lengths and batch == captured.cache.batch


def fetch(tokens: Int[Tensor, " batch"]):
    """A copy of `tokens` on the CPU that is on its way, and a function that waits for it, and for no more."""
    if tokens.device.type != "cuda":
        return tokens.clone(), lambda: None
    copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    copy.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event.synchronize


def _check_prompts(model: DeepSeekV2, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompts or any(len(p) == 0 for p in prompts):
        raise ValueError(
            "every prompt needs at least one token; start an empty text with the tokenizer's bos_id"
        )
    longest, limit = max(len(p) for p in prompts), model.cfg.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} pass the model's "
            f"max_position_embeddings={limit}; shorten one of them"
        )
