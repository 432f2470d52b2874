"""Timing in pairs, and what must be written beside every figure: device, versions, date, command."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv2.train.run_directory import replace_file

GRAPH_CALLS = 16  # at least, in a graph that is timed
ENOUGH, LEAST = 0.3, 5  # seconds after which a graph is not replayed again, but so often at least


@dataclass(frozen=True)
class Pair:
    """Seconds of two ways to do the same work, run one after the other, `repeats` times."""

    ours: tuple[float, ...]
    peer: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times faster ours is: the median over pairs, so that a slow moment strikes both sides."""
        return statistics.median(peer / ours for ours, peer in zip(self.ours, self.peer))

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest ratio seen."""
        ratios = [peer / ours for ours, peer in zip(self.ours, self.peer)]
        return min(ratios), max(ratios)


def time_pairs(ours: Callable[[], object], peer: Callable[[], object], repeats: int) -> Pair:
    """Run both once to warm up, then alternately, `repeats` times each; the order swaps from pair to pair."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    ours(), peer()
    times: dict[Callable, list[float]] = {ours: [], peer: []}
    for number in range(repeats):
        for work in (ours, peer) if number % 2 == 0 else (peer, ours):
            times[work].append(seconds(work))
    return Pair(tuple(times[ours]), tuple(times[peer]))


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call, device work included."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def graph_seconds(calls: Sequence[Callable[[], object]], repeats: int = 15) -> float:
    """Seconds of one call: the median of up to `repeats` replays of a CUDA graph that makes all of them.

    A graph leaves no gaps between kernels for Python to fill. The calls should work on different memory, so
    that the L2 cache does not serve one what another has left there.
    """
    calls = list(calls) * -(-GRAPH_CALLS // len(calls))  # the launch of a graph is shared by many calls

    def run() -> None:
        for call in calls:
            call()

    graph, times = capture(run), []
    while len(times) < repeats + 2:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3)
        if sum(times) > ENOUGH and len(times) >= LEAST + 2:
            break
    return statistics.median(times[2:]) / len(calls)


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `run` launches; it runs once before, to compile and allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def product_rate(size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a product of two square matrices on the GPU, random numbers in them."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / graph_seconds([lambda: torch.mm(a, b, out=out)], repeats=5)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give back what nothing refers to any more, so that the next to be measured has the whole GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def find_transformers() -> bool:
    """Whether the peer is there, made quiet and kept off the network; says what to install if it is not."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError:
        print("dsv2.bench: transformers is not installed; pip install 'transformers>=5.15'", file=sys.stderr)
        return False
    transformers.logging.set_verbosity_error()
    return True


def dtype_name(dtype: torch.dtype) -> str:
    """As it is stored: "bfloat16", not "torch.bfloat16"."""
    return str(dtype).removeprefix("torch.")


def write_report(path: Path, report: Mapping[str, Any], compact: bool = False) -> None:
    """Write a report as JSON, whole or not at all; compact: without spaces and lines."""
    form: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 1}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(report, **form) + "\n")


def provenance(*packages: str) -> dict[str, object]:
    """Where a figure comes from: command, date, device, versions of Python, torch and `packages`."""
    return {
        "command": " ".join(["python -m dsv2.bench", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def device_name() -> str:
    """The GPU's name, or the class of the processor and how many threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model} ({capability}), {torch.get_num_threads()} threads"
