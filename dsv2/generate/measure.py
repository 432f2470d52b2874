"""How fast a model decodes, and how fast it could: a step must at least read what it needs, once."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from dsv2.accounting import decode_bytes, expert_parameters
from dsv2.config import DSV2Config
from dsv2.generate.graphs import GraphDecoder, why_not
from dsv2.model import DeepSeekV2


@dataclass(frozen=True)
class Decoding:
    """One measurement. seconds: of a step, the median. bytes: that a step must read. bandwidth: bytes/s."""

    batch: int
    cached: int
    steps: int
    seconds: float
    bytes: float
    bandwidth: float
    through_graphs: bool

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds

    @property
    def limit(self) -> float:
        """Tokens a second if nothing took time but the reading of every byte once."""
        return self.batch * self.bandwidth / self.bytes

    @property
    def share(self) -> float:
        """Of the limit."""
        return self.tokens_per_second / self.limit

    def __str__(self) -> str:
        return (
            f"batch {self.batch}, {self.cached:,} cached tokens: {self.tokens_per_second:,.0f} tokens/s, "
            f"{self.seconds * 1e3:.2f} ms a step; {self.share:.0%} of the limit, {self.limit:,.0f} tokens/s "
            f"({self.bytes / 1e9:.2f} GB a step at {self.bandwidth / 1e12:.2f} TB/s)"
        )


def random_model(cfg: DSV2Config, device: str, dtype: torch.dtype, seed: int = 0) -> DeepSeekV2:
    """A model with random weights, made where it will be: for measuring, of any size that fits the device."""
    with torch.device("meta"):
        model = DeepSeekV2(cfg)
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(seed)
    model.reset_parameters()
    return model.eval()


def copy_bandwidth(device: torch.device | str, size: int | None = None) -> float:
    """Bytes a second, read and written both counted, of adding 1 to a large tensor: the median of 20 runs."""
    cuda = torch.device(device).type == "cuda"
    source = torch.ones((size or (2**30 if cuda else 2**26)) // 4, device=device)
    target = torch.empty_like(source)
    marks = [mark(device)]
    for _ in range(25):
        torch.add(source, 1, out=target)
        marks.append(mark(device))
    times = [between(*pair) for pair in zip(marks, marks[1:])][5:]
    return 2 * source.nbytes / statistics.median(times)


def mark(device: torch.device | str) -> torch.cuda.Event | float:
    """This moment: of the work that a GPU was given so far, or of the clock."""
    if torch.device(device).type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: torch.cuda.Event | float, last: torch.cuda.Event | float) -> float:
    """Seconds from one mark to another; waits for the second."""
    if isinstance(first, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1e3


@torch.no_grad()
def measure_decoding(
    model: DeepSeekV2,
    batch: int,
    cached: int,
    steps: int = 32,
    bandwidth: float | None = None,
    exact: bool = False,
) -> Decoding:
    """Greedy steps of `batch` sequences behind `cached` tokens each, as `decode` makes them.

    The cache is filled with random numbers: what it holds does not change the time. The first quarter of the
    steps is not counted. The bytes are those of the weights in use, of the experts that were chosen, and of
    the cache. exact: a cache for this batch and this many tokens and no more, which `decode` would round up.
    Raises ValueError if there is not one step to measure.
    """
    if steps < 4:
        raise ValueError(f"steps={steps} must be at least 4: the first quarter is not counted")
    device = model.embed.weight.device
    graphs = why_not(model, batch) is None
    room = cached + steps
    if graphs:
        captured = GraphDecoder.of(model).prepare(
            batch, room, model.new_cache(batch, room) if exact else None
        )
        cache = captured.cache
    else:
        cache = model.new_cache(batch, room)
    fill(cache, cached)
    active = torch.ones(batch, dtype=torch.bool, device=device)
    tokens = torch.randint(model.cfg.vocab_size, (batch,), device=device)
    marks, chosen = [mark(device)], []
    for _ in tqdm(range(steps), desc=f"batch {batch}, {cached} cached", unit="step", disable=None):
        if graphs:
            logits, routings = captured.run(tokens, active)
        else:
            out = model(tokens[:, None], cache=cache)
            logits, routings = out.logits[:, -1], out.routings
        tokens = logits.argmax(dim=-1)
        marks.append(mark(device))
        chosen.append(routings)
    times = [between(*pair) for pair in zip(marks, marks[1:])][steps // 4 :]
    distinct = [sum(len(r.expert_ids.unique()) for r in routings) for routings in chosen[steps // 4 :]]
    traffic = decode_bytes(
        model.cfg, cached, batch, weight_dtype=model.embed.weight.dtype, cache_dtype=cache.dtype
    )
    experts = statistics.mean(distinct) * expert_parameters(model.cfg) * model.embed.weight.itemsize
    total = dataclasses.replace(traffic, routed_experts=experts).total
    seconds = statistics.median(times)
    return Decoding(batch, cached, len(times), seconds, total, bandwidth or copy_bandwidth(device), graphs)


def fill(cache, tokens: int) -> None:
    """Pretend that every sequence has `tokens` tokens in the cache, of random numbers."""
    for stored in (cache.entries,) if hasattr(cache, "entries") else (cache.keys, cache.values):
        stored.normal_()
    cache.lengths.fill_(tokens)
    cache.longest, cache.equal_lengths = tokens, True
