"""A layer of experts against transformers' DeepseekV2Moe: the same weights, the same tokens, one run.

Forward, and forward with backward, for a few tokens and for many. transformers is given its fastest
implementation of the experts for each task. On a GPU both run from CUDA graphs, so that the GPU is timed and
not Python, and each time also stands beside the limit: moving once what must be moved of the weights and
their gradients, at the speed of a copy, or doing the products at the speed of a large one, whichever takes
longer. If the two layers do not compute the same, nothing is reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dsv2.bench.decode import default_file
from dsv2.bench.measure import (
    Pair,
    capture,
    dtype_name,
    find_transformers,
    product_rate,
    provenance,
    seconds,
    time_pairs,
    write_report,
)
from dsv2.bench.model import IMPLEMENTATIONS
from dsv2.config import DSV2Config
from dsv2.generate.measure import copy_bandwidth
from dsv2.moe import DeepSeekMoE

# V2-Lite's layer; and one of its proportions, with a quarter of the width, that a laptop holds in float32.
LITE = DSV2Config.preset("lite")
LAPTOP = LITE.replace(hidden_size=512, moe_intermediate_size=352)
TOKENS = {"cpu": (1, 32, 512, 2048), "cuda": (1, 32, 512, 8192)}
LARGEST_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of |ours - peer| / |peer|
CALLS = {1: 32, 32: 8, 512: 8, 8192: 2}  # in one graph, each with tokens, and so experts, of its own
GATHERED = 64  # tokens up to which transformers' batched_mm, a copy of the weights for each, is tried


@dataclass
class Task:
    """One step of either layer, on hidden states (1, tokens, D); inputs: (calls, 1, tokens, D)."""

    name: str
    backward: bool
    inputs: Tensor
    ours: Callable[[Tensor], object]
    peer: Callable[[Tensor], object]

    @property
    def tokens(self) -> int:
        return self.inputs.shape[2]


def make_pair(cfg: DSV2Config, device: str, dtype: torch.dtype, seed: int = 0):
    """Our layer and transformers', with the same random weights."""
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    torch.manual_seed(seed)
    with torch.device(device):
        ours = DeepSeekMoE(cfg).to(dtype)
        peer = DeepseekV2Moe(DeepseekV2Config(**cfg.to_hf())).to(dtype)
    gate, up = ours.shared.w_gate_up.weight.chunk(2)
    pairs = {
        peer.gate.weight: ours.router.weight,
        peer.experts.gate_up_proj: ours.experts.w_gate_up,
        peer.experts.down_proj: ours.experts.w_down,
        peer.shared_experts.gate_proj.weight: gate,
        peer.shared_experts.up_proj.weight: up,
        peer.shared_experts.down_proj.weight: ours.shared.w_down.weight,
    }
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for target, source in pairs.items():
            target.copy_(source)
    return ours.eval(), peer.eval()


def make_task(ours: DeepSeekMoE, peer, tokens: int, backward: bool) -> Task:
    """Sequences of `tokens` random hidden states; with backward, the gradients of them and all weights."""
    weight = ours.router.weight
    calls = CALLS.get(tokens, 1) if weight.is_cuda else 1
    inputs = torch.randn(calls, 1, tokens, ours.cfg.hidden_size, device=weight.device, dtype=weight.dtype)
    slope = torch.randn_like(inputs[0])

    def step(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def forward(x: Tensor) -> None:
            layer(x)

        def forward_and_backward(x: Tensor) -> None:
            given = x.detach().requires_grad_()
            layer(given).backward(slope)
            for module in (ours, peer):
                module.zero_grad(set_to_none=True)

        return forward_and_backward if backward else forward

    name = f"{'forward and backward' if backward else 'forward'}, {tokens:,} token{'s' * (tokens > 1)}"
    return Task(name, backward, inputs, step(lambda given: ours(given)[0]), step(peer))


def all_calls(step: Callable[[Tensor], object], inputs: Tensor) -> tuple[Callable[[], object], bool]:
    """A function that takes the step with every input, and whether it is a CUDA graph."""

    def run() -> None:
        for x in inputs:
            step(x)

    if not inputs.is_cuda:
        return run, False
    try:
        return capture(run).replay, True
    except RuntimeError:  # something in it waits for the GPU
        torch.cuda.synchronize()
        return run, False


def fastest_experts(task: Task, peer) -> tuple[str, Callable[[], object], bool]:
    """Of transformers' implementations the fastest for a task: its name, and what `all_calls` makes of it."""
    found, errors = {}, []
    for name in IMPLEMENTATIONS:
        if name == "batched_mm" and task.tokens > GATHERED:
            continue
        peer.config._experts_implementation = name
        try:
            task.peer(task.inputs[0])
            run, graph = all_calls(task.peer, task.inputs)
            run()
            found[name] = min(seconds(run) for _ in range(3)), run, graph
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            errors.append(f"{name}: {error}")  # not in this version of transformers, or not on this device
    if not found:
        raise RuntimeError("transformers ran with none of its experts:\n" + "\n".join(errors))
    best = min(found, key=lambda name: found[name][0])
    peer.config._experts_implementation = best  # a run without a graph reads it at every call
    return best, *found[best][1:]


@torch.no_grad()
def largest_difference(ours: DeepSeekMoE, peer, tokens: int = 37) -> float:
    """|ours - peer| / |peer| over some tokens: proof that both compute the same function."""
    weight = ours.router.weight
    x = torch.randn(1, tokens, ours.cfg.hidden_size, device=weight.device, dtype=weight.dtype)
    peer.config._experts_implementation = "eager"
    expected = peer(x)
    return float((ours(x)[0] - expected).norm() / expected.norm())


def limit(ours: DeepSeekMoE, task: Task, bandwidth: float, rate: float) -> float:
    """Seconds of one call at least, the mean over the task's inputs.

    Forward, the weights of the experts that are hit are read once. Backward reads them once more and writes a
    gradient for all experts, hit or not, and does twice the products.
    """
    cfg, weight = ours.cfg, ours.router.weight
    one = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    hit = [len(ours.router(x).expert_ids.unique()) for x in task.inputs]
    hit = sum(hit) / len(hit) + cfg.n_shared_experts
    moved = 2 * hit + cfg.n_routed_experts + cfg.n_shared_experts if task.backward else hit
    products = 2 * task.tokens * (cfg.num_experts_per_tok + cfg.n_shared_experts) * one
    return max(moved * one * weight.itemsize / bandwidth, products * (3 if task.backward else 1) / rate)


def run(quick: bool, pairs: int) -> dict:
    """The whole report. Raises RuntimeError if the two layers differ."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    cfg = LITE if cuda else LAPTOP
    if quick:
        cfg = cfg.replace(hidden_size=64, moe_intermediate_size=32)
    ours, peer = make_pair(cfg, device, dtype)
    difference = largest_difference(ours, peer)
    if not difference < LARGEST_DIFFERENCE[dtype]:
        raise RuntimeError(f"the two layers differ by {difference:.2g}: nothing is reported")
    rates = (copy_bandwidth(device), product_rate(dtype=dtype)) if cuda else None
    counts = (1, 8) if quick else TOKENS[device]
    tasks = [make_task(ours, peer, n, backward) for backward in (False, True) for n in counts]
    rows = []
    for task in tqdm(tasks, unit="task", disable=None):
        experts, run_peer, peer_graph = fastest_experts(task, peer)
        run_ours, our_graph = all_calls(task.ours, task.inputs)
        rows.append(result(task, time_pairs(run_ours, run_peer, pairs), experts))
        if rates:
            rows[-1] |= {"ours_in_a_graph": our_graph, "peer_in_a_graph": peer_graph}
            rows[-1]["share"] = round(limit(ours, task, *rates) * 1e3 / rows[-1]["ours"], 4)
    return {
        "benchmark": "moe",
        "ours": "dsv2",
        "peer": "transformers",
        **provenance("transformers"),
        "dtype": dtype_name(dtype),
        "largest_difference": difference,
        **({"bandwidth": rates[0], "product_rate": rates[1]} if rates else {}),
        "config": cfg.to_dict(),
        "results": rows,
    }


def result(task: Task, pair: Pair, experts: str) -> dict[str, object]:
    """One row of the results, in milliseconds a call."""
    low, high = pair.spread
    calls = len(task.inputs)
    return {
        "name": task.name,
        "tokens": task.tokens,
        "unit": "ms",
        "ours": round(statistics.median(pair.ours) * 1e3 / calls, 4),
        "peer": round(statistics.median(pair.peer) * 1e3 / calls, 4),
        "ratio": round(pair.ratio, 3),
        "ratio_range": [round(low, 3), round(high, 3)],
        "pairs": len(pair.ours),
        "calls": calls,
        "peer_experts": experts,
    }


def table(report: dict) -> str:
    """The results as text."""
    cfg, versions = report["config"], report["versions"]
    lines = [
        f"{cfg['n_routed_experts']} experts of {cfg['hidden_size']} x {cfg['moe_intermediate_size']}, "
        f"{cfg['num_experts_per_tok']} a token and {cfg['n_shared_experts']} shared; {report['dtype']}, "
        f"{report['device']}, torch {versions['torch']}, transformers {versions['transformers']}",
        f"{'':38} {'dsv2':>9} {'transformers':>13}   ratio (range)",
    ]
    for row in report["results"]:
        low, high = row["ratio_range"]
        share = f"   {row['share']:.0%} of the limit" if "share" in row else ""
        if not row.get("peer_in_a_graph", True):
            share += ", its calls from Python"
        lines.append(
            f"{row['name']:38} {row['ours']:>9,.3f} {row['peer']:>10,.3f} ms   {row['ratio']:.2f}x "
            f"({low:.2f}-{high:.2f})   its experts: {row['peer_experts']}{share}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.bench moe",
        description=__doc__.split("\n\n")[0],
        epilog="Needs transformers >= 5.15. On a CPU the layer has a quarter of V2-Lite's width.",
    )
    parser.add_argument("--pairs", type=int, default=9, help="pairs of runs per task (default: 9)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for both (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="a tiny layer, two pairs: does it run at all")
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: data/benchmarks/moe_DEVICE.json, none if quick)"
    )
    options = parser.parse_args(arguments)
    if not find_transformers():
        return 1
    torch.set_num_threads(options.threads)
    report = run(options.quick, 2 if options.quick else options.pairs)
    print(table(report))
    out = options.out or (None if options.quick else default_file("moe", report))
    if out:
        write_report(out, report)
        print(f"written to {out}")
    return 0
