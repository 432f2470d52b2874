"""A small 5.76x: a dense model with GQA and one of V2-Lite's shape on one GPU, each with its largest batch.

Both decode through CUDA graphs, in bf16, behind as many cached tokens; beside each measured speed stands the
limit of `dsv2.economics`, by bandwidth and matrix rate measured in the same run. The dense model is DeepSeek
67B halved: half its width, heads, network and layers, and its 8 key/value heads. It activates 3.5 times the
parameters that V2-Lite's shape does; DeepSeek 67B, 3.2 times those of DeepSeek-V2. Weights are random, which
changes no speed but for the experts, that random routers choose nearly equally often. Nothing is said about
the quality of either.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from dsv2.accounting import parameters
from dsv2.bench.decode import RESULTS, default_file
from dsv2.bench.measure import (
    dtype_name,
    free_memory,
    product_rate,
    provenance,
    seconds,
    write_report,
)
from dsv2.config import DSV2Config
from dsv2.economics import RESERVE, Deployment, decode_throughput, largest_batch
from dsv2.generate.graphs import BATCHES
from dsv2.generate.measure import copy_bandwidth, measure_decoding, random_model
from dsv2.model import DeepSeekV2
from dsv2.published import Device, published_models

DENSE, SPARSE = "dense, GQA", "V2-Lite's shape"
CONTEXT, STEPS, SMALLER_BATCHES = 4096, 32, (1, 8, 32, 128)
QUICK = {"context": 64, "steps": 8, "most": 6, "memory": 40e6}  # bytes that stand in for a GPU's
TRIES, SHRINK = 4, 0.875  # after running out of memory
STORED = RESULTS / "economics_h100.json"  # there once it has been run on an H100


def load(path: Path = STORED) -> dict[str, Any] | None:
    """The stored report, or None where the benchmark has not been run."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def halved(cfg: DSV2Config) -> DSV2Config:
    """A dense model with half the width, heads, network and layers, and as many key/value heads."""
    return cfg.replace(
        hidden_size=cfg.hidden_size // 2,
        num_hidden_layers=-(-cfg.num_hidden_layers // 2),
        num_attention_heads=cfg.num_attention_heads // 2,
        intermediate_size=cfg.intermediate_size // 2,
        head_dim=cfg.baseline_head_dim,
        initializer_range=0.006,
        max_position_embeddings=163840,
    )


def models(small: bool) -> dict[str, DSV2Config]:
    """The two models, or two of their kinds that run on a CPU in no time."""
    if not small:
        return {DENSE: halved(published_models()["DeepSeek 67B"]), SPARSE: DSV2Config.preset("lite")}
    tiny = DSV2Config.preset("tiny")
    dense = tiny.replace(
        attention="gqa",
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        hidden_size=256,
        num_hidden_layers=6,
        intermediate_size=688,
        n_routed_experts=0,
        n_shared_experts=0,
    )
    return {DENSE: dense, SPARSE: tiny}


def this_device(small: bool) -> Device:
    """What is free on this machine, and what it reads and computes, measured now."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        name, kind = torch.cuda.get_device_name(), "bfloat16"
        memory, rate = QUICK["memory"] if small else float(free), product_rate(2048 if small else 8192)
        bandwidth = copy_bandwidth("cuda")
    else:
        name, kind, memory = "this CPU", "float32", QUICK["memory"]
        a, b = torch.randn(2, 512, 512).unbind()
        bandwidth, rate = copy_bandwidth("cpu"), 2 * 512**3 / min(seconds(lambda: a @ b) for _ in range(5))
    return Device(name, memory, bandwidth, rate, kind, "measured in this run")


def measure_model(
    name: str, cfg: DSV2Config, where: Deployment, context: int, steps: int, most: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Rows for some batches up to the largest that fits, or one that says why there are none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fitting = largest_batch(cfg, context, where)
    largest = min(fitting, most)
    if largest == 0:
        weights = parameters(cfg).total * where.weight_bits / 8
        say(
            f"{name}: left out. Its weights take {weights / 1e9:.1f} GB, there is room for "
            f"{where.room / 1e9:.1f} GB; free the GPU of other programs, or take a larger one"
        )
        return []
    say(
        f"{name}: {parameters(cfg).total / 1e6:,.0f}M parameters; {fitting:,} texts of {context:,} tokens fit"
    )
    model = random_model(cfg, device, dtype)
    rows = []
    for batch in [smaller for smaller in SMALLER_BATCHES if smaller < largest]:
        rows += measured_row(name, model, where, context, steps, batch)
    for _ in range(TRIES):
        found = measured_row(name, model, where, context, steps, largest)
        if found:
            rows += [row | {"largest": True, "fitting": fitting} for row in found]
            break
        largest = int(largest * SHRINK)
        if largest < 1:
            break
        say(f"{name}: trying {largest} texts instead; --reserve leaves more memory free from the start")
    del model
    free_memory()
    return rows


def measured_row(
    name: str, model: DeepSeekV2, where: Deployment, context: int, steps: int, batch: int
) -> list[dict[str, Any]]:
    """One row, or none when the memory runs out. The last of `steps` tokens is the `context`-th."""
    cached = context - steps
    free_memory()
    try:
        found = measure_decoding(model, batch, cached, steps, where.device.bandwidth, exact=True)
    except torch.OutOfMemoryError as error:
        say(f"{name}, batch {batch}: the GPU ran out of memory: {str(error).splitlines()[0][:160]}")
        return []
    finally:
        free_memory()
    limit = decode_throughput(model.cfg, cached, where, batch)
    row = {
        "model": name,
        "batch": batch,
        "cached": cached,
        "ms": round(found.seconds * 1e3, 4),
        "tokens_per_second": round(found.tokens_per_second, 1),
        "predicted": round(limit.tokens_per_second, 1),
        "share": round(found.tokens_per_second / limit.tokens_per_second, 4),
        "bytes": round(found.bytes),
        "cuda_graph": found.through_graphs,
        "largest": False,
    }
    say(row_text(row))
    return [row]


def row_text(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:16} batch {row['batch']:>4}: {row['tokens_per_second']:>10,.1f} tokens/s, "
        f"{row['ms']:>9,.3f} ms a step; predicted at most {row['predicted']:>10,.1f} ({row['share']:.0%})"
    )


def say(text: str) -> None:
    print(text, flush=True)


@torch.no_grad()
def run(
    quick: bool,
    context: int | None = None,
    steps: int | None = None,
    most: int | None = None,
    reserve: float = RESERVE,
) -> dict[str, Any]:
    """The whole report; on a CPU, or quick, with small models. None: what `main` says."""
    cuda = torch.cuda.is_available()
    small, dtype = quick or not cuda, torch.bfloat16 if cuda else torch.float32
    context = context or (QUICK["context"] if small else CONTEXT)
    steps = steps or (QUICK["steps"] if small else STEPS)
    most = most or (QUICK["most"] if small else BATCHES[-1])
    if steps < 4 or context <= steps:
        raise ValueError(f"context={context} must be longer than steps={steps}, and steps at least 4")
    if not 1 <= most <= BATCHES[-1]:
        raise ValueError(f"batch={most} must lie in 1..{BATCHES[-1]}, what CUDA graphs are made for")
    machine = this_device(small)
    where = Deployment(machine, 1, dtype_name(dtype), dtype_name(dtype), reserve)
    say(
        f"{machine.name}: {machine.memory / 1e9:,.3g} GB of memory, {machine.bandwidth / 1e9:,.4g} GB/s, "
        f"{machine.flops / 1e12:,.3g} TFLOP/s"
    )
    chosen, rows = models(small), []
    for name, cfg in chosen.items():
        rows += measure_model(name, cfg, where, context, steps, most, dtype)
    return {
        "benchmark": "economics",
        **provenance(*(["triton"] if cuda else [])),
        "dtype": dtype_name(dtype),
        "small": small,
        "context": context,
        "reserve": reserve,
        "memory": machine.memory,
        "bandwidth": machine.bandwidth,
        "product_rate": machine.flops,
        "models": {
            name: {
                "config": cfg.to_dict(),
                "parameters": parameters(cfg).total,
                "activated": parameters(cfg, activated=True).total,
            }
            for name, cfg in chosen.items()
        },
        "results": rows,
        "ratio": ratio(rows),
    }


def ratio(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """How many times faster V2-Lite's shape is, each with its largest batch: measured and predicted."""
    best = {row["model"]: row for row in rows if row["largest"]}
    if set(best) != {DENSE, SPARSE}:
        return None
    return {
        kind: round(best[SPARSE][field] / best[DENSE][field], 3)
        for kind, field in (("measured", "tokens_per_second"), ("predicted", "predicted"))
    }


def table(report: dict[str, Any]) -> str:
    """The results as text."""
    lines = [f"{report['device']}, {report['dtype']}, {report['context']:,} tokens of context"]
    lines += [row_text(row) + ("  <- largest" if row["largest"] else "") for row in report["results"]]
    if report["ratio"]:
        both = report["ratio"]
        lines.append(
            f"{SPARSE} against {DENSE}, each at its largest batch: x{both['measured']:.2f} measured, "
            f"x{both['predicted']:.2f} by the limits"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.bench economics",
        description=__doc__.split("\n\n")[0],
        epilog="A GPU needs about 40 GB of free memory; on a CPU small models take the two's places.",
    )
    parser.add_argument("--quick", action="store_true", help="small models: does it run at all")
    parser.add_argument("--context", type=int, help=f"tokens of each text (default: {CONTEXT}; quick: 64)")
    parser.add_argument("--steps", type=int, help=f"tokens generated (default: {STEPS}; quick: 8)")
    parser.add_argument("--batch", type=int, help=f"the largest to try (default: {BATCHES[-1]}; quick: 6)")
    parser.add_argument(
        "--reserve", type=float, default=RESERVE, help=f"share of the memory left free (default: {RESERVE})"
    )
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: data/benchmarks/economics_GPU.json, none if quick)"
    )
    options = parser.parse_args(arguments)
    try:
        report = run(options.quick, options.context, options.steps, options.batch, options.reserve)
    except ValueError as error:
        print(f"dsv2.bench: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"dsv2.bench: the GPU has too little memory: {str(error).splitlines()[0]}; free it of other "
            "programs, or raise --reserve",
            file=sys.stderr,
        )
        return 1
    if not report["results"]:
        print("dsv2.bench: nothing could be measured", file=sys.stderr)
        return 1
    print(table(report))
    out = options.out or (None if report["small"] else default_file("economics", report))
    if out:
        write_report(out, report)
        print(f"written to {out}")
    return 0
