"""Attention of one new token over the latent cache: our kernels, what else computes it, and the limit.

Times are replays of CUDA graphs over rotating buffers, medians; the limit is the longer of reading the cache
once at the speed of a copy and doing its products at the speed of a large one, both measured in the same run.
If a result is off, nothing is reported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dsv2.attention.baselines import grouped_attention
from dsv2.attention.mla import absorbed_attention, expand_keys_values
from dsv2.bench.measure import dtype_name, graph_seconds, product_rate, provenance, seconds, write_report
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
    table = page_table(problem)
    plan = module.get_mla_metadata(problem.on_device, problem.heads, 1)
    q = torch.cat((problem.q_latent, problem.q_rope), dim=-1)[:, None]

    def call(cache: Tensor) -> Tensor:
        pages = cache.view(-1, PAGE, 1, WIDTH + ROPE)
        out = module.flash_mla_with_kvcache(
            q, pages, table, problem.on_device, WIDTH, *plan, softmax_scale=SCALE, causal=True
        )
        return out[0][:, 0]

    return [lambda cache=cache: call(cache) for cache in problem.caches]


def flash_infer(problem: Problem) -> list[Call]:
    """FlashInfer's kernel for this GPU (https://github.com/flashinfer-ai/flashinfer), over pages of 64.

    Its plan, which shares the work out, is made once and not timed; compiled at first use if not before.
    """
    module = peer("flashinfer.mla")
    table, batch = page_table(problem), len(problem.lengths)
    pages = torch.tensor([-(-length // PAGE) for length in problem.lengths])
    used = torch.arange(table.shape[1]) < pages[:, None]
    ends = torch.cat((torch.zeros(1, dtype=torch.long), pages.cumsum(0)))
    workspace = torch.empty(2**27, dtype=torch.uint8, device=problem.device)
    wrapper = module.BatchMLAPagedAttentionWrapper(workspace, backend="auto")
    wrapper.plan(
        qo_indptr=torch.arange(batch + 1, dtype=torch.int32, device=problem.device),
        kv_indptr=ends.to(problem.device, torch.int32),
        kv_indices=table[used.to(problem.device)],
        kv_len_arr=problem.on_device,
        num_heads=problem.heads,
        head_dim_ckv=WIDTH,
        head_dim_kpe=ROPE,
        page_size=PAGE,
        causal=False,  # the one query is the last token: it sees all of them
        sm_scale=SCALE,
        q_data_type=problem.dtype,
        kv_data_type=problem.dtype,
    )
    out = torch.empty_like(problem.q_latent)

    def call(cache: Tensor) -> Tensor:
        pages = cache.view(-1, PAGE, WIDTH + ROPE)
        latent, k_rope = pages[..., :WIDTH], pages[..., WIDTH:]
        return wrapper.run(
            q_nope=problem.q_latent, q_pe=problem.q_rope, ckv_cache=latent, kpe_cache=k_rope, out=out
        )

    return [lambda cache=cache: call(cache) for cache in problem.caches]


def flash_attention_3(problem: Problem) -> list[Call]:
    """FlashAttention 3 (https://github.com/Dao-AILab/flash-attention), its own package or vLLM's build of it.

    The rotary keys are its keys and the latents its values; `qv` is a second query, which meets the values.
    """
    module = peer("flash_attn_interface", "vllm.vllm_flash_attn")
    batch, table = len(problem.lengths), problem.table
    shape = {
        "batch_size": batch, "max_seqlen_q": 1, "max_seqlen_k": problem.slots, "num_heads_q": problem.heads,
        "num_heads_kv": 1, "headdim": ROPE, "headdim_v": WIDTH, "cache_seqlens": problem.on_device,
        "qkv_dtype": problem.dtype, "page_size": None if table is None else PAGE,
    }  # fmt: skip

    if hasattr(module, "flash_attn_with_kvcache"):
        plan = module.get_scheduler_metadata(**shape)
        q, qv = problem.q_rope[:, None], problem.q_latent[:, None]

        def attend(k: Tensor, v: Tensor) -> Tensor:
            out = module.flash_attn_with_kvcache(
                q, k, v, qv=qv, cache_seqlens=problem.on_device, page_table=table, softmax_scale=SCALE,
                scheduler_metadata=plan,
            )  # fmt: skip
            return out[:, 0]
    else:  # vLLM's takes the queries of all sequences in a row
        starts = torch.arange(batch + 1, dtype=torch.int32, device=problem.device)
        plan = module.get_scheduler_metadata(**shape, cu_seqlens_q=starts)

        def attend(k: Tensor, v: Tensor) -> Tensor:
            return module.flash_attn_varlen_func(
                problem.q_rope, k, v, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=problem.slots,
                seqused_k=problem.on_device, q_v=problem.q_latent, block_table=table, softmax_scale=SCALE,
                scheduler_metadata=plan, fa_version=3,
            )  # fmt: skip

    def call(cache: Tensor) -> Tensor:
        latent, k_rope = problem.parts(cache)
        return attend(k_rope[..., None, :], latent[..., None, :])

    return [lambda cache=cache: call(cache) for cache in problem.caches]


def sglang(problem: Problem) -> list[Call]:
    """SGLang's Triton kernel (https://github.com/sgl-project/sglang), at the best of three splits."""
    module = peer("sglang.srt.layers.attention.triton_ops.decode_attention")
    if problem.paged or not problem.equal:
        raise Skip("only equal lengths, contiguous")
    batch, heads = problem.q_latent.shape[:2]
    q = torch.cat((problem.q_latent, problem.q_rope), dim=-1)
    starts = torch.arange(batch + 1, device=problem.device, dtype=torch.int32) * problem.slots
    places = torch.arange(batch * problem.slots, device=problem.device, dtype=torch.int64)
    out = torch.empty_like(problem.q_latent)

    def with_splits(splits: int) -> list[Call]:
        counts = torch.full((batch,), splits, device=problem.device, dtype=torch.int32)
        logits = torch.empty(batch, heads, splits, WIDTH, device=problem.device)
        lse = torch.empty(batch, heads, splits, device=problem.device)

        def call(cache: Tensor) -> Tensor:
            rows = cache.view(-1, 1, WIDTH + ROPE)
            module.decode_attention_fwd_grouped(
                q, rows, rows[..., :WIDTH], out, starts, places, logits, lse, counts, splits, SCALE, 1.0
            )
            return out

        return [lambda cache=cache: call(cache) for cache in problem.caches]

    return fastest(with_splits, (8, 16, 32))


def vllm(problem: Problem) -> list[Call]:
    """vLLM's Triton kernel (https://github.com/vllm-project/vllm), over pages of 64, best of five splits."""
    module = peer("vllm.v1.attention.ops.triton_decode_attention")
    # Offsets into the cache have the table's type, and 32 bits do not reach the end of the largest cache.
    table = page_table(problem).long()
    q = torch.cat((problem.q_latent, problem.q_rope), dim=-1)
    out = torch.empty_like(problem.q_latent)
    lse = torch.empty(q.shape[:2], device=problem.device)
    one = torch.ones((), device=problem.device)  # left out, they are copied to the GPU at every call

    def with_splits(splits: int) -> list[Call]:
        partial = torch.empty(*q.shape[:2], splits, WIDTH + 1, device=problem.device)

        def call(cache: Tensor) -> Tensor:
            pages = cache.view(-1, PAGE, 1, WIDTH + ROPE)
            module.decode_attention_fwd(
                q, pages, pages[..., :WIDTH], out, lse, table, problem.on_device, partial, splits, SCALE,
                page_size=PAGE, k_scale=one, v_scale=one, is_mla=True,
            )  # fmt: skip
            return out

        return [lambda cache=cache: call(cache) for cache in problem.caches]

    return fastest(with_splits, (4, 8, 16, 32, 64))


def fastest(with_splits: Callable[[int], list[Call]], splits: tuple[int, ...]) -> list[Call]:
    return min((with_splits(count) for count in splits), key=lambda calls: graph_seconds(calls, 3))


def page_table(problem: Problem) -> Tensor:
    """The problem's block table; for a contiguous cache, that of its pages in order."""
    if problem.table is not None:
        return problem.table
    if problem.slots % PAGE:
        raise Skip(f"pages of {PAGE} only")
    batch = len(problem.lengths)
    pages = torch.arange(batch * problem.slots // PAGE, device=problem.device, dtype=torch.int32)
    return pages.view(batch, -1)


def peer(*names: str):
    """The first of these modules that can be imported."""
    errors = []
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            errors.append(str(error))
    raise Skip(f"not importable: {'; '.join(errors)}")


PEERS = ("flash_mla", "flashinfer", "flash_attn_interface", "sglang", "vllm")


def peer_versions() -> dict[str, str]:
    """The versions of the peers that can be imported here, as they name them."""
    found = {}
    for name in PEERS:
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", "unknown"))
        except Exception:  # whatever keeps a peer from its import, its rows say it
            continue
    return found


CONTENDERS: dict[str, Callable[[Problem], list[Call]]] = {
    "dsv2": ours,
    "dsv2, plain Triton": plain_triton,
    "dsv2, 16 heads a program": sixteen_heads,
    "PyTorch, absorbed": absorbed,
    "PyTorch SDPA, expanded": expanded,
    "FlashMLA": flash_mla,
    "FlashInfer": flash_infer,
    "FlashAttention 3": flash_attention_3,
    "SGLang, Triton": sglang,
    "vLLM, Triton": vllm,
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


SWEPT = tuple(name for name in CONTENDERS if name not in ("dsv2, plain Triton", "PyTorch SDPA, expanded"))
WITH_LENGTHS = ("dsv2", "FlashMLA", "FlashInfer", "FlashAttention 3")  # share uneven work out; take pages


def measure(kind: str, problem: Problem, bandwidth: float, rate: float) -> list[dict]:
    """One row for each contender that can run it. Raises RuntimeError if a result is wrong."""
    cuda = problem.device == "cuda"
    names = CONTENDERS if cuda else ON_CPU
    if kind in ("ragged", "equal", "paged"):
        names = WITH_LENGTHS
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
            off = [] if name == "PyTorch SDPA, expanded" else [relative_error(calls[0](), exact)]
            taken = graph_seconds(calls) if cuda else min(seconds(calls[0]) for _ in range(5))
            if off:  # once more, after all the replays: some peers keep a plan from call to call
                off.append(relative_error(calls[0](), exact))
        except Exception as reason:  # a peer that this machine cannot run is left out, and the row says why
            if name.startswith("dsv2") and not isinstance(reason, Skip):
                raise
            rows.append(row | {"skipped": (str(reason).splitlines() or [repr(reason)])[0][:200]})
            continue
        error = max(off, default=None)
        if error is not None and not error < LARGEST_ERRORS.get(name, LARGEST_ERROR):
            raise RuntimeError(f"{name} is off by {error:.2g} at {row}: nothing is reported")
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
        "dtype": dtype_name(dtype),
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
    """data/benchmarks/NAME_DEVICE.json, the device as in h100, or cpu."""
    if report["device"].endswith("threads"):
        return RESULTS / f"{name}_cpu.json"
    words = report["device"].lower().split()
    known = next((word for word in words if any(c.isdigit() for c in word)), "gpu")
    return RESULTS / f"{name}_{known}.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.bench decode",
        description=__doc__.split("\n\n")[0],
        epilog="On a CPU: the absorbed against the expanded form. FlashMLA, FlashInfer, FlashAttention 3, "
        "SGLang and vLLM run if importable.",
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
        write_report(out, report)
        print(f"written to {out}")
    return 0
