"""A layer of experts against transformers' DeepseekV2Moe: the same weights, the same tokens, one run.

Forward, and forward with backward, for a few tokens and for many. transformers is given its fastest
implementation of the experts for each task. On a GPU each time also stands beside the limit: reading once the
weights of the experts that are hit, at the speed of a copy, or doing the products at the speed of a large
one, whichever takes longer. If the two layers do not compute the same, nothing is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dsv2.bench.decode import default_file
from dsv2.bench.measure import Pair, product_rate, provenance, seconds, time_pairs
from dsv2.bench.model import IMPLEMENTATIONS
from dsv2.config import DSV2Config
from dsv2.generate.measure import copy_bandwidth
from dsv2.moe import DeepSeekMoE

# V2-Lite's layer; and one of its proportions, with a quarter of the width, that a laptop holds in float32.
LITE = DSV2Config.preset("lite")
LAPTOP = LITE.replace(hidden_size=512, moe_intermediate_size=352)
TOKENS = {"cpu": (1, 32, 512, 2048), "cuda": (1, 32, 512, 8192)}
LARGEST_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of |ours - peer| / |peer|
GATHERED = 64  # tokens up to which transformers' batched_mm, a copy of the weights for each, is tried


@dataclass
class Task:
    """Both layers on the same tokens; `ours` and `peer` take no argument."""

    name: str
    tokens: int
    backward: bool
    ours: Callable[[], object]
    peer: Callable[[], object]


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
    return ours, peer


def make_task(ours: DeepSeekMoE, peer, tokens: int, backward: bool) -> Task:
    """One sequence of `tokens` random hidden states; with backward, the gradients of it and all weights."""
    weight = ours.router.weight
    x = torch.randn(1, tokens, ours.cfg.hidden_size, device=weight.device, dtype=weight.dtype)
    slope = torch.randn_like(x)

    def step(layer: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        @torch.no_grad()
        def forward() -> None:
            layer(x)

        def forward_and_backward() -> None:
            given = x.detach().requires_grad_()
            (layer(given) * slope).sum().backward()
            for module in (ours, peer):
                module.zero_grad(set_to_none=True)

        return forward_and_backward if backward else forward

    name = f"{'forward and backward' if backward else 'forward'}, {tokens:,} token{'s' * (tokens > 1)}"
    return Task(name, tokens, backward, step(lambda given: ours(given)[0]), step(peer))


def fastest_experts(task: Task, peer) -> str:
    """Set transformers' fastest implementation for a task; returns its name."""
    times, errors = {}, []
    for name in IMPLEMENTATIONS:
        if name == "batched_mm" and task.tokens > GATHERED:
            continue
        peer.config._experts_implementation = name
        try:
            task.peer()
            times[name] = min(seconds(task.peer) for _ in range(3))
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            errors.append(f"{name}: {error}")  # not in this version of transformers, or not on this device
    if not times:
        raise RuntimeError("transformers ran with none of its experts:\n" + "\n".join(errors))
    best = min(times, key=times.get)
    peer.config._experts_implementation = best
    return best


@torch.no_grad()
def largest_difference(ours: DeepSeekMoE, peer, tokens: int = 37) -> float:
    """|ours - peer| / |peer| over some tokens: proof that both compute the same function."""
    weight = ours.router.weight
    x = torch.randn(1, tokens, ours.cfg.hidden_size, device=weight.device, dtype=weight.dtype)
    peer.config._experts_implementation = "eager"
    expected = peer(x)
    return float((ours(x)[0] - expected).norm() / expected.norm())


def limit(ours: DeepSeekMoE, task: Task, bandwidth: float, rate: float) -> float:
    """Seconds of the forward pass at least: reading the experts that are hit, or multiplying with them.

    A backward pass reads the weights once more, writes their gradients, and does twice the products.
    """
    cfg, weight = ours.cfg, ours.router.weight
    one = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    x = torch.randn(1, task.tokens, cfg.hidden_size, device=weight.device, dtype=weight.dtype)
    hit = len(ours.router(x).expert_ids.unique()) + cfg.n_shared_experts
    read = hit * one * weight.itemsize / bandwidth
    multiply = 2 * task.tokens * (cfg.num_experts_per_tok + cfg.n_shared_experts) * one / rate
    return max(read, multiply) * (3 if task.backward else 1)


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
        experts = fastest_experts(task, peer)
        rows.append(result(task, time_pairs(task.ours, task.peer, pairs), experts))
        if rates:
            rows[-1]["share"] = round(limit(ours, task, *rates) * 1e3 / rows[-1]["ours"], 4)
    return {
        "benchmark": "moe",
        "ours": "dsv2",
        "peer": "transformers",
        **provenance("transformers"),
        "dtype": str(dtype).removeprefix("torch."),
        "largest_difference": difference,
        **({"bandwidth": rates[0], "product_rate": rates[1]} if rates else {}),
        "config": cfg.to_dict(),
        "results": rows,
    }


def result(task: Task, pair: Pair, experts: str) -> dict[str, object]:
    """One row of the results, in milliseconds."""
    low, high = pair.spread
    return {
        "name": task.name,
        "tokens": task.tokens,
        "unit": "ms",
        "ours": round(statistics.median(pair.ours) * 1e3, 4),
        "peer": round(statistics.median(pair.peer) * 1e3, 4),
        "ratio": round(pair.ratio, 3),
        "ratio_range": [round(low, 3), round(high, 3)],
        "pairs": len(pair.ours),
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
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError:
        print("dsv2.bench: transformers is not installed; pip install 'transformers>=5.15'", file=sys.stderr)
        return 1
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    report = run(options.quick, 2 if options.quick else options.pairs)
    print(table(report))
    out = options.out or (None if options.quick else default_file("moe", report))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written to {out}")
    return 0
