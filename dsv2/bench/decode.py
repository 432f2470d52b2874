"""Attention of one new token over the latent cache: our kernels, what else computes it, and the limit.

Times are replays of CUDA graphs over rotating buffers, medians; the limit is the longer of reading the cache
once at the speed of a copy and doing its products at the speed of a large one, both measured in the same run.
If a result is off, nothing is reported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dsv2.attention.baselines import grouped_attention
from dsv2.attention.mla import absorbed_attention, expand_keys_values
from dsv2.bench.measure import graph_seconds, product_rate, provenance, seconds
from dsv2.generate.measure import copy_bandwidth
from dsv2.kernels import mla_decode, mla_decode_reference
from dsv2.kernels.attention import TritonKernel, choose_kernel, run_kernel
from dsv2.kernels.descriptors import DescriptorKernel

RESULTS = Path(__file__).resolve().parents[2] / "data" / "benchmarks"
WIDTH, ROPE, NOPE, VALUE = 512, 64, 128, 128  # DeepSeek-V2's
SCALE = (NOPE + ROPE) ** -0.5
LARGEST_ERROR = 5e-3  # bf16 against float32, of the whole result
LARGEST_ERRORS = {"PyTorch, absorbed": 2e-2}  # its scores and weights go through memory in bf16
PAGE = 64

# heads, batch, cached tokens. V2 has 128 heads, V2-Lite 16.
SHAPES = (
    (128, 1, 8192), (128, 4, 32768), (128, 16, 4096), (128, 16, 8192), (128, 64, 4096), (128, 128, 4096),
    (128, 64, 32768), (16, 1, 8192), (16, 16, 8192), (16, 64, 4096), (16, 64, 8192), (16, 128, 32768),
)  # fmt: skip
SWEEP = tuple(
    (heads, 16, tokens) for heads in (128, 16) for tokens in (512, 1024, 2048, 4096, 8192, 16384, 32768)
)
SMALL = ((4, 2, 256), (4, 1, 1024))  # what a CPU does


class Skip(Exception):
    """This contender cannot run this shape; the message says why."""


@dataclass
class Problem:
    """One shape with random inputs: `copies` caches of the same size, so that no cache stays in the L2."""

    heads: int
    lengths: list[int]
    slots: int
    device: str
    dtype: torch.dtype
    paged: bool = False
    q_latent: Tensor = field(init=False)
    q_rope: Tensor = field(init=False)
    caches: list[Tensor] = field(init=False)  # (batch, slots, 576) each
    table: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        batch, make = len(self.lengths), {"device": self.device, "dtype": self.dtype}
        random = torch.Generator(self.device).manual_seed(0)
        self.q_latent = torch.randn(batch, self.heads, WIDTH, generator=random, **make)
        self.q_rope = torch.randn(batch, self.heads, ROPE, generator=random, **make)
        one = batch * self.slots * (WIDTH + ROPE) * self.q_latent.element_size()
        copies = min(max(2 * 2**28 // one, 2), 16) if self.device == "cuda" else 1
        shape = (batch, self.slots, WIDTH + ROPE)
        self.caches = [torch.randn(shape, generator=random, **make) for _ in range(copies)]
        self.on_device = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        self.table = None
        if self.paged:
            pages = torch.randperm(batch * self.slots // PAGE, generator=random, device=self.device)
            self.table = pages.view(batch, -1).int()

    @property
    def equal(self) -> bool:
        return all(length == self.slots for length in self.lengths)

    def parts(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        """The latents and the rotary keys of a cache, as pages if it is paged."""
        if self.paged:
            cache = cache.view(-1, PAGE, WIDTH + ROPE)
        return cache[..., :WIDTH], cache[..., WIDTH:]

    def exact(self) -> Tensor:
        """The result in float32, of the first few sequences."""
        few = min(4, len(self.lengths))
        latent, k_rope = self.parts(self.caches[0])
        table = None if self.table is None else self.table[:few]
        if table is None:
            latent, k_rope = latent[:few], k_rope[:few]
        arguments = (x.float() for x in (self.q_latent[:few], self.q_rope[:few], latent, k_rope))
        return mla_decode_reference(*arguments, self.on_device[:few], SCALE, block_table=table)

    def limit(self, bandwidth: float, rate: float) -> float:
        """Seconds: the longer of reading the cached tokens and of multiplying with them."""
        tokens = sum(self.lengths)
        read = tokens * (WIDTH + ROPE) * self.q_latent.element_size() / bandwidth
        return max(read, 2 * tokens * self.heads * (2 * WIDTH + ROPE) / rate)


Call = Callable[[], Tensor]


def ours(problem: Problem, kernel: object = None) -> list[Call]:
    def call(cache: Tensor) -> Tensor:
        latent, k_rope = problem.parts(cache)
        inputs = (problem.q_latent, problem.q_rope, latent, k_rope, problem.on_device, SCALE)
        if kernel is None:
            return mla_decode(*inputs, block_table=problem.table)
        return run_kernel(kernel, *inputs, problem.table)

    return [lambda cache=cache: call(cache) for cache in problem.caches]


def plain_triton(problem: Problem) -> list[Call]:
    latent, k_rope = problem.parts(problem.caches[0])
    chosen = choose_kernel(problem.q_latent, problem.q_rope, latent, k_rope, problem.table)
    if isinstance(chosen, (TritonKernel, DescriptorKernel)):
        raise Skip("it is the kernel that is chosen")
    return ours(problem, DescriptorKernel.for_heads(problem.heads))


def sixteen_heads(problem: Problem) -> list[Call]:
    if problem.heads <= 16:
        raise Skip("there are no more than 16 heads")
    return ours(problem, TritonKernel(heads=16, tile=64, warps=8, stages=3))


def absorbed(problem: Problem) -> list[Call]:
    if not problem.equal or problem.paged:
        raise Skip("only equal lengths, contiguous")
    return [
        lambda cache=cache: absorbed_attention(
            problem.q_latent[:, None], problem.q_rope[:, None], *problem.parts(cache), SCALE
        )[:, 0]
        for cache in problem.caches
    ]


def expanded(problem: Problem) -> list[Call]:
    """Every head's keys and values kept, as in multi-head attention; mixes values, not latents."""
    if not problem.equal or problem.paged:
        raise Skip("only equal lengths, contiguous")
    numbers = len(problem.lengths) * problem.slots * problem.heads * (NOPE + ROPE + VALUE)
    if problem.device == "cuda" and numbers * problem.q_latent.element_size() > 16e9:
        raise Skip("its keys and values take more than 16 GB")
    w = torch.randn(problem.heads, NOPE, WIDTH, device=problem.device, dtype=problem.dtype) * WIDTH**-0.5
    k, v = expand_keys_values(*problem.parts(problem.caches[0]), w, w)
    q = torch.randn(
        len(problem.lengths), 1, problem.heads, NOPE + ROPE, device=problem.device, dtype=problem.dtype
    )
    return [lambda: grouped_attention(q, k, v, SCALE, None, False)]


def flash_mla(problem: Problem) -> list[Call]:
    """DeepSeek's kernel (https://github.com/deepseek-ai/FlashMLA), over pages of 64."""
    module = peer("flash_mla")
    if problem.slots % PAGE:
        raise Skip("pages of 64 only")
    batch = len(problem.lengths)
    table = problem.table
    if table is None:
        table = torch.arange(batch * problem.slots // PAGE, device="cuda", dtype=torch.int32).view(batch, -1)
    plan = module.get_mla_metadata(problem.on_device, problem.heads, 1)
    q = torch.cat((problem.q_latent, problem.q_rope), dim=-1)[:, None]

    def call(cache: Tensor) -> Tensor:
        pages = cache.view(-1, PAGE, 1, WIDTH + ROPE)
        out = module.flash_mla_with_kvcache(
            q, pages, table, problem.on_device, WIDTH, *plan, softmax_scale=SCALE, causal=True
        )
        return out[0][:, 0]

    return [lambda cache=cache: call(cache) for cache in problem.caches]


def sglang(problem: Problem) -> list[Call]:
    """SGLang's Triton kernel (https://github.com/sgl-project/sglang), at the best of three splits."""
    module = peer("sglang.srt.layers.attention.triton_ops.decode_attention")
    if problem.paged or not problem.equal:
        raise Skip("only equal lengths, contiguous")
    batch, heads = problem.q_latent.shape[:2]
    q = torch.cat((problem.q_latent, problem.q_rope), dim=-1)
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * problem.slots
    places = torch.arange(batch * problem.slots, device="cuda", dtype=torch.int64)
    out = torch.empty_like(problem.q_latent)

    def with_splits(splits: int) -> list[Call]:
        counts = torch.full((batch,), splits, device="cuda", dtype=torch.int32)
        logits = torch.empty(batch, heads, splits, WIDTH, device="cuda")
        lse = torch.empty(batch, heads, splits, device="cuda")

        def call(cache: Tensor) -> Tensor:
            rows = cache.view(-1, 1, WIDTH + ROPE)
            module.decode_attention_fwd_grouped(
                q, rows, rows[..., :WIDTH], out, starts, places, logits, lse, counts, splits, SCALE, 1.0
            )
            return out

        return [lambda cache=cache: call(cache) for cache in problem.caches]

    return min((with_splits(splits) for splits in (8, 16, 32)), key=lambda calls: graph_seconds(calls, 3))


def peer(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skip(f"not importable: {error}") from None


def peer_versions() -> dict[str, str]:
    """The versions of the peers that can be imported here, as they name them."""
    found = {}
    for name in ("flash_mla", "sglang"):
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
        except ImportError:
            continue
    return found


CONTENDERS: dict[str, Callable[[Problem], list[Call]]] = {
    "dsv2": ours,
    "dsv2, plain Triton": plain_triton,
    "dsv2, 16 heads a program": sixteen_heads,
    "PyTorch, absorbed": absorbed,
    "PyTorch SDPA, expanded": expanded,
    "FlashMLA": flash_mla,
    "SGLang, Triton": sglang,
}
ON_CPU = {"PyTorch, absorbed": absorbed, "PyTorch SDPA, expanded": expanded}


def relative_error(out: Tensor, exact: Tensor) -> float:
    """|out - exact| / |exact| over the sequences that `exact` has; NaN counts as infinite."""
    difference = (out[: len(exact)].float() - exact).norm() / exact.norm()
    return float(difference.nan_to_num(torch.inf))


def ragged_lengths(batch: int, slots: int) -> list[int]:
    """Random lengths, the same ones every time: from a twentieth of the slots up, half of them in total."""
    random = torch.Generator().manual_seed(batch)
    share = torch.rand(batch, generator=random) * 0.9 + 0.05
    return (share * (0.5 / share.mean()) * slots).clamp(1, slots).int().tolist()


def problems(quick: bool) -> Iterator[tuple[str, dict]]:
    """What is measured: a name for the kind, and the arguments of its `Problem`."""
    if not torch.cuda.is_available():
        for heads, batch, tokens in SMALL:
            yield "table", {"heads": heads, "lengths": [tokens] * batch, "slots": tokens}
        return
    shapes = SHAPES[:1] + SHAPES[7:8] if quick else SHAPES
    for heads, batch, tokens in shapes:
        yield "table", {"heads": heads, "lengths": [tokens] * batch, "slots": tokens}
    for heads, batch, tokens in shapes:
        if batch > 1 and batch * tokens <= 2**20:
            lengths = ragged_lengths(batch, tokens)
            mean = sum(lengths) // batch
            yield "ragged", {"heads": heads, "lengths": lengths, "slots": tokens}
            yield "equal", {"heads": heads, "lengths": [mean] * batch, "slots": tokens}
        yield "paged", {"heads": heads, "lengths": [tokens] * batch, "slots": tokens, "paged": True}
    for heads, batch, tokens in () if quick else SWEEP:
        yield "sweep", {"heads": heads, "lengths": [tokens] * batch, "slots": tokens}


SWEPT = ("dsv2", "dsv2, 16 heads a program", "PyTorch, absorbed", "FlashMLA", "SGLang, Triton")


def measure(kind: str, problem: Problem, bandwidth: float, rate: float) -> list[dict]:
    """One row for each contender that can run it. Raises RuntimeError if a result is wrong."""
    cuda = problem.device == "cuda"
    names = CONTENDERS if cuda else ON_CPU
    if kind in ("ragged", "equal", "paged"):
        names = ("dsv2", "FlashMLA")
    elif kind == "sweep":
        names = SWEPT
    exact, rows = problem.exact(), []
    for name in names:
        row = {
            "kind": kind, "contender": name, "heads": problem.heads, "batch": len(problem.lengths),
            "slots": problem.slots, "cached": sum(problem.lengths),
        }  # fmt: skip
        try:
            calls = CONTENDERS[name](problem)
            error = None if name == "PyTorch SDPA, expanded" else relative_error(calls[0](), exact)
        except Exception as reason:  # a peer that this machine cannot run is left out, and the row says why
            if name.startswith("dsv2") and not isinstance(reason, Skip):
                raise
            rows.append(row | {"skipped": (str(reason).splitlines() or [repr(reason)])[0][:200]})
            continue
        if error is not None and not error < LARGEST_ERRORS.get(name, LARGEST_ERROR):
            raise RuntimeError(f"{name} is off by {error:.2g} at {row}: nothing is reported")
        taken = graph_seconds(calls) if cuda else min(seconds(calls[0]) for _ in range(5))
        row |= {"us": round(taken * 1e6, 2), "error": error}
        if cuda:
            row["share"] = round(problem.limit(bandwidth, rate) / taken, 4)
        rows.append(row)
    return rows


@torch.no_grad()
def run(quick: bool) -> dict:
    """The whole report."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    bandwidth, rate = (copy_bandwidth(device), product_rate()) if cuda else (0.0, 0.0)
    rows = []
    for kind, arguments in tqdm(list(problems(quick)), unit="shape", disable=None):
        rows += measure(kind, Problem(**arguments, device=device, dtype=dtype), bandwidth, rate)
        if cuda:
            torch.cuda.empty_cache()
    return {
        "benchmark": "decode",
        **provenance(*(["triton"] if cuda else [])),
        "peers": peer_versions(),
        "dtype": str(dtype).removeprefix("torch."),
        "bandwidth": bandwidth,
        "product_rate": rate,
        "results": rows,
    }


def table(report: dict) -> str:
    """The results as text."""
    lines = [f"{report['device']}, {report['dtype']}, torch {report['versions']['torch']}"]
    if report["bandwidth"]:
        lines.append(
            f"limit: {report['bandwidth'] / 1e12:.2f} TB/s, {report['product_rate'] / 1e12:.0f} TFLOP/s"
        )
    lines.append(
        f"{'':8} {'heads':>5} {'batch':>5} {'slots':>6} {'cached':>8}  {'':26} {'us':>9}  of the limit"
    )
    for row in report["results"]:
        head = f"{row['kind']:8} {row['heads']:>5} {row['batch']:>5} {row['slots']:>6} {row['cached']:>8}"
        if "skipped" in row:
            lines.append(f"{head}  {row['contender']:26} {'-':>9}  {row['skipped'][:60]}")
        else:
            share = f"{row['share']:.0%}" if "share" in row else ""
            lines.append(f"{head}  {row['contender']:26} {row['us']:>9,.1f}  {share}")
    return "\n".join(lines)


def default_file(name: str, report: dict) -> Path:
    """data/benchmarks/NAME_DEVICE.json, the device as in h100."""
    words = report["device"].lower().split()
    known = next((word for word in words if any(c.isdigit() for c in word)), "gpu")
    return RESULTS / f"{name}_{known}.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.bench decode",
        description=__doc__.split("\n\n")[0],
        epilog="On a CPU: the absorbed against the expanded form. FlashMLA and SGLang run if importable.",
    )
    parser.add_argument("--quick", action="store_true", help="two shapes, no sweep: does it run at all")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON to write (default: data/benchmarks/decode_GPU.json; none if quick, or on a CPU)",
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here: two small shapes in plain PyTorch; the kernels need one to be timed")
    try:
        report = run(options.quick)
    except RuntimeError as error:
        print(f"dsv2.bench: {error}", file=sys.stderr)
        return 1
    print(table(report))
    measured = torch.cuda.is_available() and not options.quick
    out = options.out or (default_file("decode", report) if measured else None)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written to {out}")
    return 0
