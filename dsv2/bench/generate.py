"""A model of DeepSeek-V2-Lite's shape, random weights: decoding and prefill, transformers, the limit.

The limit of decoding is reading what a step needs once, at the speed of a copy measured in the same run: the
weights in use, the experts that were chosen, the cache. Both models stand on the GPU one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from dsv2.bench.decode import default_file
from dsv2.bench.measure import dtype_name, free_memory, provenance, write_report
from dsv2.config import DSV2Config
from dsv2.generate.measure import between, copy_bandwidth, mark, measure_decoding, random_model
from dsv2.model import DeepSeekV2

DECODING = ((1, 1024), (1, 8192), (32, 4096), (64, 4096))  # batch, cached tokens
PEER_DECODING = ((1, 1024), (1, 8192), (32, 4096))
PREFILL = 8192
PEER_EXPERTS = "grouped_mm"  # the fastest of its implementations with many tokens
PEER_CHUNK = 8192  # tokens at once when transformers' cache is filled


def decoding_row(contender: str, batch: int, cached: int, milliseconds: float) -> dict:
    return {
        "kind": "decode", "contender": contender, "batch": batch, "cached": cached,
        "ms": round(milliseconds, 3), "tokens_per_second": round(batch / milliseconds * 1e3, 1),
    }  # fmt: skip


def prefill_row(contender: str, tokens: int, seconds: float) -> dict:
    return {
        "kind": "prefill", "contender": contender, "batch": 1, "cached": tokens,
        "ms": round(seconds * 1e3, 2), "tokens_per_second": round(tokens / seconds, 1),
    }  # fmt: skip


@torch.no_grad()
def measure_ours(model: DeepSeekV2, shapes, prompt: int, steps: int, bandwidth: float) -> list[dict]:
    """Decoding as `decode` does it, with the share of the limit, and a prompt in one piece."""
    device, rows = model.embed.weight.device, []
    for batch, cached in shapes:
        found = measure_decoding(model, batch, cached, steps, bandwidth)
        row = decoding_row("dsv2", batch, cached, found.seconds * 1e3)
        row |= {"limit": round(found.limit, 1), "share": round(found.share, 4), "bytes": round(found.bytes)}
        rows.append(row | {"cuda_graph": found.through_graphs})
    tokens = torch.randint(model.cfg.vocab_size, (1, prompt), device=device)
    rows.append(prefill_row("dsv2", prompt, median_seconds(
        lambda: model(tokens, cache=model.new_cache(1, prompt), last_only=True), device
    )))  # fmt: skip
    return rows


def median_seconds(work, device, repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = mark(device)
        work()
        times.append(between(start, mark(device)))
    return statistics.median(times)


def random_peer(cfg: DSV2Config, device: str, dtype: torch.dtype):
    """transformers' model of the same shape, random weights, with its grouped experts."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(**cfg.to_dict())
    with torch.device("meta"):
        peer = DeepseekV2ForCausalLM(config).to(dtype)
    buffers = [name for name, _ in peer.named_buffers()]
    peer = peer.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.006) if parameter.dim() > 1 else parameter.fill_(1.0)
        for name in buffers:  # what stands in them does not change the time
            peer.get_buffer(name).fill_(1.0)
    peer.set_experts_implementation(PEER_EXPERTS)
    return peer.eval()


@torch.no_grad()
def measure_peer(peer, shapes, prompt: int, steps: int) -> list[dict]:
    """transformers with its own cache; a step is one call of the model."""
    from transformers import DynamicCache

    device, vocab, rows = peer.device, peer.config.vocab_size, []
    for batch, cached in tqdm(shapes, desc="transformers", unit="shape", disable=None):
        cache = DynamicCache(config=peer.config)
        tokens = torch.randint(vocab, (batch, cached), device=device)
        for start in range(0, cached, max(PEER_CHUNK // batch, 1)):
            piece = tokens[:, start : start + max(PEER_CHUNK // batch, 1)]
            peer(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, marks = tokens[:, :1], [mark(device)]
        for _ in range(steps):
            token = peer(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
            marks.append(mark(device))
        times = [between(*pair) for pair in zip(marks, marks[1:])][steps // 4 :]
        row = decoding_row("transformers", batch, cached, statistics.median(times) * 1e3)
        rows.append(row | {"experts": PEER_EXPERTS})
        del cache
    tokens = torch.randint(vocab, (1, prompt), device=device)
    rows.append(prefill_row("transformers", prompt, median_seconds(
        lambda: peer(tokens, use_cache=True, logits_to_keep=1), device
    )))  # fmt: skip
    return rows


def run(quick: bool) -> dict:
    """The whole report; on a CPU, or quick, with the preset `tiny`."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    small = quick or not cuda
    cfg = DSV2Config.preset("tiny" if small else "lite")
    shapes, peers = ((1, 64), (3, 64)) if small else DECODING, ((1, 64),) if small else PEER_DECODING
    prompt, steps = (128, 8) if small else (PREFILL, 32)
    bandwidth = copy_bandwidth(device)
    model = random_model(cfg, device, dtype)
    rows = measure_ours(model, shapes, prompt, steps, bandwidth)
    parameters = model.num_parameters()
    del model
    free_memory()
    packages, note = ["triton"] if cuda else [], None
    try:
        rows += measure_peer(random_peer(cfg, device, dtype), peers, prompt, 8)
        packages.append("transformers")
    except (ImportError, RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        note = f"transformers was not measured: {str(error).splitlines()[0][:200]}"
    return {
        "benchmark": "generate",
        **provenance(*packages),
        "dtype": dtype_name(dtype),
        "preset": "tiny" if small else "lite",
        "parameters": parameters,
        "bandwidth": bandwidth,
        "note": note,
        "results": rows,
    }


def table(report: dict) -> str:
    """The results as text."""
    lines = [
        f"{report['parameters'] / 1e9:.2f} B parameters, {report['dtype']}, {report['device']}, "
        f"{report['bandwidth'] / 1e12:.3f} TB/s, torch {report['versions']['torch']}"
    ]
    for row in report["results"]:
        what = f"{row['kind']:8} batch {row['batch']:>3}, {row['cached']:>6,} tokens"
        share = f"   {row['share']:.0%} of the limit" if "share" in row else ""
        speed = f"{row['tokens_per_second']:>12,.1f} tokens/s {row['ms']:>10,.2f} ms"
        lines.append(f"{what}  {row['contender']:14} {speed}{share}")
    return "\n".join([*lines, *([report["note"]] if report["note"] else [])])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.bench generate",
        description=__doc__.split("\n\n")[0],
        epilog="On a CPU a small model takes the place of V2-Lite's 15.7 B parameters (31 GB in bf16).",
    )
    parser.add_argument("--quick", action="store_true", help="the small model: does it run at all")
    parser.add_argument(
        "--out", type=Path, help="JSON to write (default: data/benchmarks/generate_GPU.json, none if quick)"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        report = run(options.quick)
    except torch.OutOfMemoryError as error:
        print(f"dsv2.bench: the GPU has too little memory for V2-Lite: {error}", file=sys.stderr)
        return 1
    print(table(report))
    measured = torch.cuda.is_available() and not options.quick
    out = options.out or (default_file("generate", report) if measured else None)
    if out:
        write_report(out, report)
        print(f"written to {out}")
    return 0
