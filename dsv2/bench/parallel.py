"""Experts spread over several devices: equal to one device, and what the exchange costs.

Started by torchrun, one process a device. Checks first that outputs, gradients and bytes are those of
`FakeDevices`; where they are not, nothing is reported. Then: all-to-all at DeepSeek-V2's sizes against M, the
devices a token may reach; a model trained with its experts spread out, beside the same on one device; and
tokens a second, with the share of the time that goes into communication.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dsv2.bench import text
from dsv2.bench.decode import default_file
from dsv2.bench.measure import dtype_name, free_memory, provenance, seconds, synchronize, write_report
from dsv2.bench.traffic import Layer, differences, run_fake, run_process
from dsv2.config import DSV2Config
from dsv2.data import PackedDataError, PackedDataset
from dsv2.moe import device_limited_top_k
from dsv2.moe.experts import RoutedExperts
from dsv2.moe.parallel import HIDDEN, KINDS, ExpertParallel, ProcessGroup, plan_dispatch
from dsv2.train import TrainConfig, Trainer, start_world
from dsv2.train.distributed import World, leave

START = "torchrun --nproc-per-node 2 -m dsv2.bench parallel"
# As a share of the largest number: sums in another order, and bf16's three digits.
LARGEST_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LOSS_NOISE = 1e-5  # nats: what a loss of float32 is rounded to, a few times over
EXCHANGES = 10  # in one measurement


@dataclass(frozen=True)
class Sizes:
    """What is run. layer: of the exchange, tokens on each device.

    compared_batch: sequences, of all devices together, in the training whose losses are compared; batch_size:
    on each device, where tokens a second are counted.
    """

    checked: tuple[Layer, ...]
    layer: Layer
    dtype: torch.dtype
    model: DSV2Config
    compared_batch: int
    batch_size: int
    seq_len: int
    steps: int
    timed_steps: int
    repeats: int = 15
    large: int = 2**26  # bytes to each device in the exchange that is the limit


def make_sizes(devices: int, kind: str, quick: bool, steps: int | None = None) -> Sizes:
    """V2's layer and `small` on GPUs; on CPUs, and if quick, what two cores do in a minute."""
    odd = Layer(devices, tokens=37, experts=6 * devices, hidden=48, width=24, k=5)
    limited = replace(odd, tokens=19, limit=max(1, devices - 1), k=4, seed=1)
    large = kind == "cuda" and not quick
    compared = -(-(32 if large else 4) // devices) * devices  # as much for every device
    if large:
        lite = Layer(devices, tokens=1000, experts=16 * devices, hidden=2048, width=1408, k=6)
        full = Layer(devices, tokens=4096, experts=160 // devices * devices, hidden=5120, width=1536, k=6)
        small = DSV2Config.preset("small")
        return Sizes((odd, limited, lite), full, torch.bfloat16, small, compared, 64, 1024, steps or 300, 40)
    layer = Layer(devices, tokens=256, experts=16 * devices, hidden=160, width=48, k=4)
    tiny = DSV2Config.preset("tiny").replace(num_hidden_layers=2)
    return Sizes(
        (odd, limited), layer, torch.float32, tiny, compared, 2, 64, steps or 6, 6, repeats=3, large=2**18
    )


# ------------------------------------------------------------------------------------------- is it equal


def check_layer(layer: Layer, dtype: torch.dtype, world: World) -> dict[str, Any]:
    """One layer forward and backward on all processes, beside `FakeDevices`, on each of them.

    Raises RuntimeError, on all processes, where they differ.
    """
    expected, fake = run_fake(layer, world.device, dtype)
    found, real = run_process(layer, world.device, dtype)
    apart, traffic = differences(layer, world.rank, found, expected), real.all_traffic()
    if not torch.equal(traffic.counts, fake.traffic.counts):
        raise RuntimeError(f"other bytes than FakeDevices({layer.devices}) counts, for {layer}")
    if not all(value < LARGEST_DIFFERENCE[dtype] for value in apart.values()):
        raise RuntimeError(f"other numbers than FakeDevices({layer.devices}) gives, for {layer}: {apart}")
    sent = {kind: int(traffic.bytes(kind).sum()) for kind in KINDS}
    return {"layer": asdict(layer), "dtype": dtype_name(dtype), "differences": apart, "bytes": sent}


# ------------------------------------------------------------------------------------- how long it takes


def slowest(work: Callable[[], object], world: World, repeats: int, calls: int = 1) -> float:
    """Seconds of one call, the median over measurements of the slowest process's mean."""

    def all_calls() -> None:
        for _ in range(calls):
            work()

    all_calls()
    times = []
    for _ in range(repeats):
        world.barrier()
        times.append(seconds(all_calls) / calls)
    found = torch.tensor(times, dtype=torch.float64, device=world.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return statistics.median(found.tolist())


def exchange_rate(world: World, sizes: Sizes) -> float:
    """Bytes a second that each device sends to the others in an exchange of equal, large parts: the limit."""
    devices, rows = ProcessGroup(), [1] * world.size
    parts = torch.ones(world.size, sizes.large, dtype=torch.uint8, device=world.device)
    taken = slowest(
        lambda: devices.move("dispatch", [parts], [rows], [rows]), world, sizes.repeats, EXCHANGES
    )
    return (world.size - 1) * sizes.large / taken


def measure_exchange(layer: Layer, limit: int, world: World, sizes: Sizes) -> dict[str, Any]:
    """A layer with random affinities, tokens limited to so many devices: bytes, times, shares of the time."""
    on, dtype = world.device, sizes.dtype
    random = torch.Generator(on).manual_seed(world.rank)
    scores = torch.randn(1, layer.tokens, layer.experts, generator=random, device=on).softmax(dim=-1)
    chosen = device_limited_top_k(scores, layer.k, layer.devices, limit)
    ids, weights = chosen.expert_ids[0], chosen.weights[0].requires_grad_()
    x = torch.randn(layer.tokens, layer.hidden, generator=random, device=on).to(dtype).requires_grad_()
    slope = torch.randn_like(x)
    with torch.device(on):
        local = RoutedExperts(layer.experts // layer.devices, layer.hidden, layer.width).to(dtype)
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=random)
    devices = ProcessGroup()
    run = ExpertParallel(layer.placement, devices)

    def step() -> None:
        out = run(local, x, ids, weights)
        out.backward(slope)
        x.grad = weights.grad = None
        local.zero_grad(set_to_none=True)

    step()
    traffic = devices.all_traffic()
    plan = plan_dispatch(ids, layer.placement)
    to = [plan.counts[:, 0].tolist()]
    by = [traffic.rows("dispatch", own=True)[:, world.rank].tolist()]
    states = x.detach().index_select(0, plan.tokens)
    taken = slowest(lambda: devices.move("dispatch", [states], to, by), world, sizes.repeats, EXCHANGES)
    return {
        "limit": limit,
        "sent": traffic.sent("dispatch").tolist(),
        "received": traffic.received("dispatch").tolist(),
        "all_hidden": int(traffic.bytes(*HIDDEN, *(f"{kind} gradient" for kind in HIDDEN)).sum()),
        "dispatch_seconds": taken,
        "layer_seconds": slowest(step, world, sizes.repeats),
        "shares": device_shares(lambda: [step() for _ in range(sizes.repeats)], world),
    }


# ------------------------------------------------------------------------------- what the GPU does meanwhile

Interval = tuple[float, float]


def covered(intervals: Iterable[Interval]) -> list[Interval]:
    """The same stretch of time as intervals that do not overlap, in order."""
    merged: list[list[float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return [(start, end) for start, end in merged]


def time_shares(computing: Sequence[Interval], communicating: Sequence[Interval]) -> dict[str, float]:
    """Which part of the time, from the first start to the last end, goes into what; they add up to 1.

    "idle" is neither, in which the device waits for the host.
    """
    every = [*computing, *communicating]
    if not every:
        return {}
    total = max(end for _, end in every) - min(start for start, _ in every)
    one, other, either = (
        sum(end - start for start, end in covered(some)) for some in (computing, communicating, every)
    )
    parts = {
        "computing": either - other,
        "both": one + other - either,
        "communicating": either - one,
        "idle": total - either,
    }
    return {name: part / total for name, part in parts.items()}


def device_shares(work: Callable[[], object], world: World) -> dict[str, float]:
    """`time_shares` of this GPU while it works, averaged over the processes; {} on CPUs.

    Communication is NCCL's kernels, in which a device also waits for the others.
    """
    if world.device.type != "cuda":
        work()
        return {}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    work()
    synchronize()
    world.barrier()
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CUDA]) as profiled:
        warnings.simplefilter("ignore")  # of what is kept over several cycles; this is one
        work()
        synchronize()
    kernels: dict[bool, list[Interval]] = {True: [], False: []}
    for event in profiled.events():
        marked = getattr(event, "is_user_annotation", False) or event.name.startswith(("nccl:", "FSDP"))
        if event.device_type == DeviceType.CUDA and not marked:
            at = event.time_range
            kernels[event.name.startswith("nccl")].append((at.start, at.end))
    shares = time_shares(kernels[False], kernels[True])
    values = world.sum(torch.tensor(list(shares.values()), device=world.device)) / world.size
    return {name: round(value, 4) for name, value in zip(shares, values.tolist())}


# ------------------------------------------------------------------------------------------------ training


def train(sizes: Sizes, data: PackedDataset, world: World, **settings: Any) -> Trainer:
    """A trainer of the model that looks at nothing but its own steps."""
    quiet = dict(validate_every=0, sample_every=0, save_every=0)
    config = TrainConfig(seq_len=sizes.seq_len, lr=1e-3, **quiet, **settings)
    return Trainer(sizes.model, config, data, world=world)


def losses_of(trainer: Trainer) -> list[float]:
    """Of every step to the end of the run."""
    return [round(metrics["loss"], 6) for metrics in trainer]


def compare_losses(sizes: Sizes, data: PackedDataset, world: World, dtype: str) -> dict[str, list[float]]:
    """The losses of the same run on one device, with the batch in parts, and with experts on all devices.

    The second is the measure for the third: it computes the same sums in another order on one device.
    """
    alone = World(world.device)
    settings = dict(steps=sizes.steps, batch_size=sizes.compared_batch, dtype=dtype)
    losses: dict[str, list[float]] = {}
    # Two devices do one each at the same time.
    parts = {"one device": 1, "one device, batch in parts": world.size}
    for number, (name, micro) in enumerate(parts.items()):
        if number % world.size == world.rank:
            losses[name] = losses_of(train(sizes, data, alone, **settings, micro_batches=micro))
            free_memory()
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, losses)
    for other in gathered:
        losses |= other
    spread_out = losses_of(train(sizes, data, world, **settings))
    free_memory()
    return {name: losses[name] for name in parts} | {"experts on all devices": spread_out}


def mean_distances(losses: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """How far from one device's losses those with the batch in parts are on average, and many devices'."""
    one, *others = (np.array(values) for values in losses.values())
    parts, spread_out = (float(np.abs(values - one).mean()) for values in others)
    return parts, spread_out


def losses_agree(losses: Mapping[str, Sequence[float]]) -> bool:
    """Whether many devices are no further from one, on average, than twice what rounding alone makes."""
    parts, spread_out = mean_distances(losses)
    return spread_out <= 2 * parts + LOSS_NOISE


def measure_speed(sizes: Sizes, data: PackedDataset, world: World) -> dict[str, Any]:
    """Tokens a second, each device with a batch of its own, and where the time goes: three ways to train."""
    ways = {
        "one device": World(world.device),
        "weights spread": replace(world, expert_mesh=None),
        "experts spread": world,
    }
    dtype, rows = dtype_name(sizes.dtype), []
    for how, its_world in ways.items():
        row = None
        if world.rank < its_world.size:
            batch = sizes.batch_size * its_world.size
            steps = 4 * sizes.timed_steps  # more than are taken
            trainer = train(sizes, data, its_world, steps=steps, batch_size=batch, dtype=dtype)
            rates = [trainer.train_step()["tokens_per_s"] for _ in range(sizes.timed_steps)]
            rate = statistics.median(rates[sizes.timed_steps // 3 :])

            def several(trainer=trainer) -> None:
                for _ in range(3):
                    trainer.train_step()

            shares = device_shares(several, its_world)
            row = {"how": how, "devices": its_world.size, "tokens_per_s": round(rate), "shares": shares}
            del trainer, several
            free_memory()
        rows.append(world.broadcast(row))
    return {"batch_size_each": sizes.batch_size, "seq_len": sizes.seq_len, "dtype": dtype, "rows": rows}


# ------------------------------------------------------------------------------------------ all together


def check(sizes: Sizes, data: PackedDataset, world: World) -> list[dict[str, Any]]:
    types = dict.fromkeys((torch.float32, sizes.dtype))
    return [check_layer(layer, dtype, world) for dtype in types for layer in sizes.checked]


def compare_training(sizes: Sizes, data: PackedDataset, world: World) -> dict[str, Any]:
    losses = compare_losses(sizes, data, world, "float32")
    if not losses_agree(losses):
        raise RuntimeError(f"training on {world.size} devices has other losses than on one: {losses}")
    return {
        "model": sizes.model.to_dict(), "batch_size": sizes.compared_batch, "seq_len": sizes.seq_len,
        "dtype": "float32", "losses": losses,
    }  # fmt: skip


def measure_exchanges(sizes: Sizes, data: PackedDataset, world: World) -> dict[str, Any]:
    limits = sorted({m for m in (1, 2, 3, world.size) if m <= world.size})
    return {
        "layer": asdict(sizes.layer), "dtype": dtype_name(sizes.dtype), "rate": exchange_rate(world, sizes),
        "rows": [measure_exchange(sizes.layer, limit, world, sizes) for limit in limits],
    }  # fmt: skip


# In this order; each raises RuntimeError where many devices do not give what one gives.
SECTIONS: dict[str, Callable[[Sizes, PackedDataset, World], Any]] = {
    "checked": check,
    "training": compare_training,
    "exchange": measure_exchanges,
    "speed": measure_speed,
}


def table(run: Mapping[str, Any]) -> str:
    """The results for one number of devices, as text: of the sections that it has."""
    lines = []
    if "checked" in run:
        lines += [
            f"{run['devices']} devices: bytes equal to FakeDevices', for every pair and kind",
            "largest differences of output and gradients, as a share of the largest number there:",
        ]
        for checked in run["checked"]:
            size, worst = checked["layer"], max(checked["differences"].values())
            lines.append(
                f"  {checked['dtype']:9} {size['tokens']:5} tokens each, {size['experts']} experts of "
                f"{size['hidden']} x {size['width']}: {worst:.1e}"
            )
    if training := run.get("training"):
        one = training["losses"]["one device"]
        parts, spread_out = mean_distances(training["losses"])
        lines += [
            f"training, {len(one)} steps in {training['dtype']}: loss {one[0]:.4f} to {one[-1]:.4f}",
            "mean distance from the losses of one device:",
            f"  experts on all devices          {spread_out:.1e}",
            f"  one device, the batch in parts  {parts:.1e}",
        ]
    if exchange := run.get("exchange"):
        layer = exchange["layer"]
        lines += [
            f"all-to-all, {layer['tokens']:,} tokens each, {layer['k']} of {layer['experts']} experts, "
            f"hidden states of {layer['hidden']} {exchange['dtype']} numbers",
            f"  large equal parts: {exchange['rate'] / 1e9:.0f} GB/s",
            "  M   MB sent   dispatch   of that rate   layer, forward and backward",
        ]
        for row in exchange["rows"]:
            most = max(row["sent"])
            share = most / row["dispatch_seconds"] / exchange["rate"]
            lines.append(
                f"  {row['limit']}{most / 1e6:10.1f}{row['dispatch_seconds'] * 1e6:8.0f} us{share:15.0%}"
                f"{row['layer_seconds'] * 1e3:13.2f} ms{_shown(row['shares'])}"
            )
    if speed := run.get("speed"):
        lines.append(
            f"training in {speed['dtype']}, {speed['batch_size_each']} x {speed['seq_len']:,} tokens on each "
            "device"
        )
        for row in speed["rows"]:
            lines.append(
                f"  {row['how']:15}{row['devices']} x{row['tokens_per_s'] / row['devices']:9,.0f} "
                f"tokens/s{_shown(row['shares'])}"
            )
    return "\n".join(lines)


def _shown(shares: Mapping[str, float]) -> str:
    return "".join(f"  {name} {share:.0%}" for name, share in shares.items() if share >= 0.005)


def add_run(path: Path, report: dict[str, Any], run: Mapping[str, Any]) -> None:
    """Put a run's sections beside what the file has, of this and other numbers of devices, if all are alike.

    Alike: of the same device and versions, and text. Written whole or not at all.
    """
    runs: dict[int, dict[str, Any]] = {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(found[key] == report[key] for key in ("device", "versions", "text")):
            runs = {other["devices"]: other for other in found["runs"]}
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        pass
    earlier = runs.get(run["devices"], {"commands": {}})
    runs[run["devices"]] = {**earlier, **run, "commands": earlier["commands"] | run["commands"]}
    write_report(path, report | {"runs": [runs[number] for number in sorted(runs)]})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=START,
        description=__doc__.split("\n\n")[0],
        epilog="On CPUs, and with --quick, sizes are small. The file keeps runs of other numbers of devices.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if there is one)")
    parser.add_argument("--steps", type=int, help="of the training that is compared (default: 300; CPU: 6)")
    parser.add_argument("--quick", action="store_true", help="small sizes on a GPU too: does it run at all")
    text.add_option(parser)
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
        help=f"of {', '.join(SECTIONS)}; the file keeps the others (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON to write after each section (default: data/benchmarks/parallel_DEVICE.json; none on a CPU "
        "or if quick)",
    )
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1; got {options.steps}")
    size = int(os.environ.get("WORLD_SIZE", 0))
    if size < 2:
        parser.error(f"needs 2 processes or more, one a device: {START}")
    try:
        world = start_world(options.device, expert_parallel=size)
        sizes = make_sizes(size, world.device.type, options.quick, options.steps)
        data = _open_text(options.data, world)
    except (PackedDataError, ValueError) as error:
        print(f"dsv2.bench: {error}", file=sys.stderr, flush=True)
        leave(2)

    report: dict[str, Any] = {
        "benchmark": "parallel", **provenance(), "text": data.manifest["fingerprint"],
        "what": "Of each number of devices: layers checked against FakeDevices; losses of one run on one "
        "device and on all; all-to-all against M (bytes of hidden states to the experts, by device; seconds "
        "of one dispatch, and of the layer forward and backward); tokens a second. Shares: of the time from "
        "the first kernel to the last, mean over devices.",
    }  # fmt: skip
    if world.device.type == "cuda":
        report["versions"] |= {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    plain = world.device.type == "cpu" or options.quick
    out = options.out or (None if plain else default_file("parallel", report))
    command = f"torchrun --nproc-per-node {size} -m dsv2.bench {' '.join(sys.argv[1:])}"
    command += f", {report.pop('date')}"
    del report["command"]
    run: dict[str, Any] = {"devices": size, "commands": {}}
    try:
        for name in (name for name in SECTIONS if name in options.only):
            if world.is_main:
                print(f"{name} ...", file=sys.stderr, flush=True)
            run[name] = SECTIONS[name](sizes, data, world)
            run["commands"][name] = command
            if world.is_main and out:
                add_run(out, report, run)
    except RuntimeError as error:
        print(f"dsv2.bench: process {world.rank}: {error}", file=sys.stderr, flush=True)
        leave(1)
    if world.is_main:
        print(table(run))
        if out:
            print(f"written to {out}")
    world.barrier()
    leave(0)
    return 0


def _open_text(directory: Path | None, world: World) -> PackedDataset:
    if directory is None:
        if world.is_main:  # packs this machine's, the first time
            text.open_text(None)
        world.barrier()
    return text.open_text(directory)
