"""What a model costs to train and to serve: GPU hours, memory, tokens a second, money, from a config.

    python -m dsv2.economics

Decoding is a roofline of a whole model. One step of a batch runs through four phases (`PHASES`), layer after
layer, that cannot overlap, as each works on what the one before it made; within a phase, reading and
computing do overlap. So a step takes the sum over the phases of max(bytes / bandwidth, FLOPs / rate), and
that is a limit: launches, synchronisation, writing, sampling, prefill and all communication between devices
are left out. Several devices count as one with their memories, bandwidths and rates added up, as if weights,
cache and work lay evenly spread over them. The work is counted at a rate measured in bf16: who multiplies in
FP8, up to twice as fast, can pass this limit where a phase computes longer than it reads, and the 55.4K
tokens a second that figure 1 gives for DeepSeek-V2 lie above it from 4,096 cached tokens on.

Source: DeepSeek-V2, arXiv 2405.04434, abstract, figure 1 and section 3.2.3; the rest follows from
`dsv2.accounting`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2.accounting import (
    Memory,
    attention_macs,
    attention_twin,
    bits_per_element,
    decode_bytes,
    decode_flops,
    kv_bytes_per_token,
    memory_needed,
    prefill_flops_per_token,
    training_flops_per_token,
)
from dsv2.config import DSV2Config
from dsv2.published import (
    DATA,
    BarPair,
    Device,
    measured_devices,
    published_devices,
    published_models,
    published_numbers,
)

# Bits of a number. DeepSeek-V2 as it was deployed: weights in FP8, the cache in 6 bits on average (3.2.3).
WEIGHT_FORMATS = {"bf16": 16, "fp8": 8}
CACHE_FORMATS = {"bf16": 16, "fp8": 8, "6 bits": 6}

RESERVE = 0.1  # of the memory, kept for activations, the programs themselves, and gaps between tensors
PHASES = ("attention's matrices", "attention over the cache", "networks and experts", "head")
OLD, NEW = "DeepSeek 67B", "DeepSeek-V2"

# An H800 has an H100's memory, bandwidth and matrix rate; what it lacks is between devices, and left out.
H800 = "H100 80GB"


def storage_bits(form: Any, known: Mapping[str, float] = CACHE_FORMATS) -> float:
    """Bits of a number in a named format ("bf16", "fp8", "6 bits"), or as `bits_per_element` reads it.

    >>> storage_bits("6 bits"), storage_bits("bfloat16"), storage_bits(4.5)
    (6.0, 16.0, 4.5)
    """
    return float(known[form]) if isinstance(form, str) and form in known else bits_per_element(form)


def cache_saving(cfg: DSV2Config, other: DSV2Config, form: Any = "6 bits", other_form: Any = "bf16") -> float:
    """How much smaller the cache of a token is than another model's, from 0 to 1.

    93.3 % is 6-bit latents against keys and values in bf16; the same format on both sides gives 82.2 %.

    >>> models = published_models()
    >>> round(cache_saving(models["DeepSeek-V2"], models["DeepSeek 67B"]), 4)
    0.9334
    """
    ours = kv_bytes_per_token(cfg, storage_bits(form))
    return 1 - ours / kv_bytes_per_token(other, storage_bits(other_form))


# --------------------------------------------------------------------------------------------- training


def published_hours() -> dict[str, float]:
    """H800 hours for a trillion tokens, DeepSeek 67B's and DeepSeek-V2's (`data/published/training.json`).

    >>> published_hours()
    {'DeepSeek 67B': 300600.0, 'DeepSeek-V2': 172800.0}
    """
    numbers = published_numbers()
    return {name: 1e3 * numbers.run(name).h800_hours_k_per_t_tokens for name in (OLD, NEW)}


@dataclass(frozen=True)
class Training:
    """What a trillion tokens take: by counting FLOPs, and in published GPU hours."""

    name: str
    flops_per_token: float
    hours: float  # GPU hours for a trillion tokens
    device: Device

    @property
    def utilisation(self) -> float:
        """The FLOPs that count, as a share of what the device could compute in those hours."""
        return self.flops_per_token * 1e12 / (self.hours * 3600 * self.device.flops)


def published_training(context: int = 4096, device: str = H800) -> dict[str, Training]:
    """DeepSeek 67B and DeepSeek-V2: training FLOPs per token, hours as published, and what was used.

    FLOPs: three times a forward pass over `context` tokens, products under the causal mask only; what was
    computed twice to save memory does not count. The device's rate is its maker's, in bf16.
    """
    models, machine = published_models(), published_devices()[device]
    return {
        name: Training(name, training_flops_per_token(models[name], context).total, hours, machine)
        for name, hours in published_hours().items()
    }


def saving(before: float, after: float) -> float:
    """1 - after / before. Raises ValueError unless `before` is above 0.

    >>> round(100 * saving(300.6, 172.8), 1)
    42.5
    """
    if before <= 0:
        raise ValueError(f"before={before} must be above 0")
    return 1 - after / before


def gpu_hours(flops_per_token: float, tokens: float, device: Device, utilisation: float) -> float:
    """GPU hours of a training run at a given share of the device's rate."""
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation={utilisation} must lie above 0 and up to 1")
    return flops_per_token * tokens / (device.flops * utilisation) / 3600


def training_cost(hours_per_trillion: float, trillions: float, price: float) -> float:
    """Price of a training run. price: for one GPU hour. 172.8K hours, 8.1T tokens, at 2: 2.8 million.

    >>> round(training_cost(172_800, 8.1, 2.0))
    2799360
    """
    for name, value in (
        ("hours_per_trillion", hours_per_trillion),
        ("trillions", trillions),
        ("price", price),
    ):
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative")
    return hours_per_trillion * trillions * price


# --------------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True)
class Deployment:
    """Where and how a model is served. reserve: the share of the memory that weights and cache leave free.

    weights, cache: formats by name or bits (`storage_bits`). Work is counted at the device's one rate in
    every format, as if FP8 were turned to bf16 on its way to the multipliers.
    """

    device: Device
    devices: int = 1
    weights: Any = "bf16"
    cache: Any = "bf16"
    reserve: float = RESERVE

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"devices={self.devices} must be at least 1")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"reserve={self.reserve} must be at least 0 and below 1")
        storage_bits(self.weights, WEIGHT_FORMATS), storage_bits(self.cache)

    @property
    def room(self) -> float:
        """Bytes for weights and cache, on all devices together."""
        return self.devices * self.device.memory * (1 - self.reserve)

    @property
    def weight_bits(self) -> float:
        return storage_bits(self.weights, WEIGHT_FORMATS)

    @property
    def cache_bits(self) -> float:
        return storage_bits(self.cache)


@dataclass(frozen=True)
class Phase:
    """One part of a decoding step: what it reads and computes, and seconds for each by the device's rates."""

    name: str
    bytes: float
    flops: float
    reading: float
    computing: float

    @property
    def seconds(self) -> float:
        """Reading and computing overlap, so the longer one counts."""
        return max(self.reading, self.computing)

    @property
    def limit(self) -> str:
        """Which of the two it is: "reading" or "computing"."""
        return "reading" if self.reading >= self.computing else "computing"


@dataclass(frozen=True)
class Throughput:
    """A decoding step of `batch` texts with `context` cached tokens each, as fast as it could be."""

    batch: int
    context: int
    memory: Memory
    room: float
    devices: int
    phases: tuple[Phase, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room

    @property
    def seconds(self) -> float:
        """Of a step: the phases follow one another."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def tokens_per_second(self) -> float:
        """Of all texts, on all devices together."""
        return self.batch / self.seconds

    def cost_per_million(self, price: float) -> float:
        """Price of a million new tokens. price: for an hour of one device."""
        return cost_per_million_tokens(self.tokens_per_second, price, self.devices)


def cost_per_million_tokens(tokens_per_second: float, price: float, devices: int = 1) -> float:
    """Price of a million tokens at this speed. price: for an hour of one device.

    >>> round(cost_per_million_tokens(50_000, 2.0, devices=8), 4)
    0.0889
    """
    if tokens_per_second <= 0 or price < 0 or devices < 1:
        raise ValueError(
            f"tokens_per_second={tokens_per_second} must be above 0, price={price} not negative and "
            f"devices={devices} at least 1"
        )
    return price * devices / 3600 / tokens_per_second * 1e6


def largest_batch(cfg: DSV2Config, context: int, deployment: Deployment) -> int:
    """How many texts of `context` tokens fit beside the weights; 0 where not even one does."""
    if context < 1:
        raise ValueError(f"context={context} must be at least 1")
    one = memory_needed(cfg, deployment.weight_bits, context, 1, deployment.cache_bits)
    return max(math.floor((deployment.room - one.weights) / one.cache), 0)


def decode_throughput(
    cfg: DSV2Config, context: int, deployment: Deployment, batch: int | None = None
) -> Throughput:
    """The limit of decoding `batch` texts that have `context` cached tokens each; MLA in its absorbed form.

    batch None: the largest that fits. Weights in use are read once a step, of the experts the expected number
    of distinct ones (`expected_distinct_experts`), the cache once. Raises ValueError if batch is None and the
    memory is too small for one text; a given batch may be too large, which `fits` then says.
    """
    if batch is None:
        batch = largest_batch(cfg, context, deployment)
        if batch == 0:
            needed = memory_needed(cfg, deployment.weight_bits, context, 1, deployment.cache_bits).total
            raise ValueError(
                f"weights and one text of context={context} need {needed / 1e9:,.1f} GB; "
                f"{deployment.devices} x {deployment.device.name} have room for {deployment.room / 1e9:,.1f} "
                "GB; use more devices, a larger one, or fewer bits"
            )
    read = decode_bytes(
        cfg, context, batch, weight_dtype=deployment.weight_bits, cache_dtype=deployment.cache_bits
    )
    work = decode_flops(cfg, context) * batch
    networks = read.dense_ffn + read.routed_experts + read.shared_experts + read.router
    amounts = (
        (read.attention + read.norms, work.projections + work.expansion),
        (read.cache, work.scores_and_values),
        (networks, work.dense_ffn + work.routed_experts + work.shared_experts + work.router),
        (read.head + read.embedding, work.head),
    )
    bandwidth = deployment.devices * deployment.device.bandwidth
    rate = deployment.devices * deployment.device.flops
    phases = tuple(
        Phase(name, size, flops, size / bandwidth, flops / rate)
        for name, (size, flops) in zip(PHASES, amounts)
    )
    memory = memory_needed(cfg, deployment.weight_bits, context, batch, deployment.cache_bits)
    return Throughput(batch, context, memory, deployment.room, deployment.devices, phases)


def prefill_speed(cfg: DSV2Config, context: int, deployment: Deployment) -> float:
    """Prompt tokens a second at most, in prompts of `context` tokens: the rate over the FLOPs of a token.

    Thousands of tokens share each weight that is read, so that reading does not count.
    """
    rate = deployment.devices * deployment.device.flops
    return rate / prefill_flops_per_token(cfg, context).total


# ---------------------------------------------------------------------------- figure 1(b), step by step

STEPS = ("MLA", "V2's layers and experts", "FP8 weights", "6-bit cache")


def published_speeds() -> dict[str, float]:
    """Tokens a second on eight H800, measured from the bars of figure 1(b) (`data/published/figure_1.json`).

    >>> published_speeds()
    {'DeepSeek 67B': 9610.0, 'DeepSeek-V2': 55400.0}
    """
    bars = _speed_bars()
    return {OLD: 1e3 * bars.dense_67b, NEW: 1e3 * bars.v2}


def published_speedup() -> float:
    """The ratio of the two that the abstract states: 5.76."""
    return _speed_bars().stated


def _speed_bars() -> BarPair:
    return next(pair for pair in published_numbers().figure_1 if pair.quantity == "generation throughput")


@dataclass(frozen=True)
class SpeedupStep:
    """One change on the way from DeepSeek 67B to DeepSeek-V2. factor: against the step before; first: 1."""

    name: str
    cfg: DSV2Config
    throughput: Throughput
    factor: float


def speedup_steps(
    context: int = 4096,
    order: Sequence[str] = STEPS,
    device: Device | None = None,
    devices: int = 8,
    reserve: float = RESERVE,
) -> list[SpeedupStep]:
    """From DeepSeek 67B in bf16 to DeepSeek-V2 with FP8 weights and a 6-bit cache, one change after another.

    Each is served with the largest batch that fits, on eight H100 (for H800) at their measured rates unless
    said otherwise. order: of the four `STEPS`; a factor depends on what came before it, their product does
    not. Between the ends stand two models that were never built: DeepSeek 67B with V2's MLA (its latents'
    and heads' widths, but 64 heads in 95 layers), or V2 with GQA (8 groups of 128 channels). Raises
    ValueError for another set of steps, or where a model in between does not fit.
    """
    if sorted(order) != sorted(STEPS):
        raise ValueError(f"order={list(order)} must hold each of {', '.join(STEPS)} once")
    machine = measured_devices()[f"{H800}, measured"] if device is None else device
    done: set[str] = set()
    found: list[SpeedupStep] = []
    for name in (OLD, *order):
        done.add(name)
        cfg = _between("MLA" in done, STEPS[1] in done)
        weights = "fp8" if "FP8 weights" in done else "bf16"
        cache = "6 bits" if "6-bit cache" in done else "bf16"
        speed = decode_throughput(cfg, context, Deployment(machine, devices, weights, cache, reserve))
        before = found[-1].throughput.tokens_per_second if found else speed.tokens_per_second
        found.append(SpeedupStep(name, cfg, speed, speed.tokens_per_second / before))
    return found


def _between(latent: bool, experts: bool) -> DSV2Config:
    """DeepSeek 67B or DeepSeek-V2's layers, with MLA or with GQA."""
    old, new = (published_models()[name] for name in (OLD, NEW))
    if experts:
        return new if latent else attention_twin(new, "gqa", kv_heads=8, head_dim=128)
    if not latent:
        return old
    widths = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return attention_twin(old, "mla").replace(**{name: getattr(new, name) for name in widths})


def speedup(steps: Sequence[SpeedupStep]) -> float:
    """The product of all factors: how many times faster the last is than the first."""
    return math.prod(step.factor for step in steps)


def factor_ranges(context: int = 4096, device: Device | None = None) -> dict[str, tuple[float, float]]:
    """The smallest and the largest factor of each step over all 24 orders."""
    factors: dict[str, list[float]] = {name: [] for name in STEPS}
    for order in itertools.permutations(STEPS):
        for step in speedup_steps(context, order, device)[1:]:
            factors[step.name].append(step.factor)
    return {name: (min(found), max(found)) for name, found in factors.items()}


# ------------------------------------------------------------------------- against what was measured


@dataclass(frozen=True)
class Check:
    """A measured time beside the model's. share: predicted over measured, 1 where nothing is lost."""

    what: str
    predicted: float  # seconds
    measured: float

    @property
    def share(self) -> float:
        return self.predicted / self.measured


def check_decoding(
    report: Mapping[str, Any] | str | Path = DATA / "benchmarks/generate_h100.json",
) -> list[Check]:
    """Whole steps of V2-Lite's shape (`python -m dsv2.bench generate`) against `decode_throughput`.

    The bandwidth is the copy's of the same run, the rate the device's measured one.
    """
    report = _read(report)
    cfg = DSV2Config.preset(report["preset"])
    machine = _rates(report)
    deployment = Deployment(machine, weights=report["dtype"], cache=report["dtype"])
    found = []
    for row in report["results"]:
        if row["kind"] == "decode" and row["contender"] == "dsv2":
            batch, cached = row["batch"], row["cached"]
            predicted = decode_throughput(cfg, cached, deployment, batch).seconds
            what = f"a step of V2-Lite, batch {batch}, {cached:,} cached tokens"
            found.append(Check(what, predicted, row["ms"] / 1e3))
    return found


def check_attention(
    report: Mapping[str, Any] | str | Path = DATA / "benchmarks/decode_h100.json",
) -> list[Check]:
    """Attention over the cache of one layer (`python -m dsv2.bench decode`) against that phase.

    Bandwidth and rate are those measured in the same run.
    """
    report = _read(report)
    machine, full = _rates(report), DSV2Config.preset("full")
    width = (full.kv_lora_rank + full.qk_rope_head_dim) * bits_per_element(report["dtype"]) / 8
    found = []
    for row in report["results"]:
        if row["kind"] == "table" and row["contender"] == "dsv2":
            flops = 2 * row["cached"] * row["heads"] * attention_macs(full, "absorbed")
            reading = row["cached"] * width / machine.bandwidth
            what = f"attention, {row['heads']} heads, batch {row['batch']}, {row['slots']:,} cached tokens"
            found.append(Check(what, max(reading, flops / machine.flops), row["us"] / 1e6))
    return found


def check_table(checks: Sequence[Check]) -> str:
    """Predicted, measured and their ratio, one line each."""
    width = max(len(check.what) for check in checks)
    lines = [f"{'':{width}}  predicted   measured  predicted / measured"]
    for check in checks:
        times = f"{check.predicted * 1e3:8.3f} ms {check.measured * 1e3:8.3f} ms"
        lines.append(f"{check.what:{width}} {times}  {check.share:20.2f}")
    return "\n".join(lines)


def _rates(report: Mapping[str, Any]) -> Device:
    """The device of a report, with the rates measured in the same run where there are any."""
    name = next((name for name in measured_devices() if name.split()[0] in report["device"]), None)
    if name is None:
        raise ValueError(f"device={report['device']!r} is not in data/devices.json with measured rates")
    base = measured_devices()[name]
    return Device(
        name=report["device"],
        memory=base.memory,
        bandwidth=report.get("bandwidth", base.bandwidth),
        flops=report.get("product_rate", base.flops),
        dtype=report["dtype"],
        source=report["command"],
    )


def _read(report: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    if isinstance(report, (str, Path)):
        return json.loads(Path(report).read_text(encoding="utf-8"))
    return report


# -------------------------------------------------------------------------------------------- the report


def report() -> str:
    """All of it as text: the abstract's numbers, and the model against measurements."""
    models, training = published_models(), published_training()
    old, new = training[OLD], training[NEW]
    lines = ["The cache (DeepSeek-V2 against DeepSeek 67B)"]
    for forms in (("6 bits", "bf16"), ("fp8", "bf16"), ("bf16", "bf16")):
        percent = 100 * cache_saving(models[NEW], models[OLD], *forms)
        lines.append(f"  {forms[0]:6} against {forms[1]:4}: {percent:.1f} % smaller")
    lines += ["", "Training, a trillion tokens"]
    for each in (old, new):
        lines.append(
            f"  {each.name:12} {each.flops_per_token / 1e9:6.1f} GFLOP a token, {each.hours / 1e3:.1f}K GPU "
            f"hours: {100 * each.utilisation:.1f} % of the rate"
        )
    hours, flops = saving(old.hours, new.hours), saving(old.flops_per_token, new.flops_per_token)
    lines.append(f"  saved: {100 * hours:.1f} % of the hours, {100 * flops:.1f} % of the FLOPs")
    lines += ["", "Decoding on eight H100 for H800, the largest batch that fits"]
    for context in (1024, 4096, 16384):
        steps = speedup_steps(context)
        said = ", ".join(f"{step.name} x{step.factor:.2f}" for step in steps[1:])
        first, last = (step.throughput.tokens_per_second for step in (steps[0], steps[-1]))
        lines.append(
            f"  {context:>6,} tokens: {first:,.0f} -> {last:,.0f} tokens/s, x{speedup(steps):.2f} ({said})"
        )
    speeds = published_speeds()
    lines.append(f"  published: {speeds[OLD]:,.0f} -> {speeds[NEW]:,.0f}, x{published_speedup()}")
    eight = Deployment(measured_devices()[f"{H800}, measured"], 8, "fp8", "6 bits")
    prompt = prefill_speed(models[NEW], 4096, eight)
    lines.append(f"  prompts of 4,096 tokens, {NEW}: {prompt:,.0f} tokens/s at most; published: over 100,000")
    lines += ["", check_table([*check_decoding(), *check_attention()])]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(
        prog="python -m dsv2.economics",
        description="DeepSeek-V2's headline numbers from configs: cache, GPU hours, decoding speed.",
    ).parse_args(arguments)
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
