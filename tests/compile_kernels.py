"""Compile kernels for GPUs that need not be here: `python tests/compile_kernels.py 80 90` prints JSON lines.

Runs without Triton's interpreter, hence in a process of its own. Each line says which kernel was compiled,
for which compute capability, and how many bytes of shared memory a program takes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

if __name__ == "__main__":  # before the kernels are decorated
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dsv2.kernels import attention, descriptors, experts, hopper, prefill, step  # noqa: E402

# Bytes of shared memory that one program may have (CUDA programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass
class Build:
    """A kernel, the types of its arguments and its constants; what is not named is an int32."""

    name: str
    kernel: object
    constants: dict[str, object]
    types: dict[str, str]
    warps: int
    odd: frozenset[str] = frozenset()  # integers that need not be multiples of 16
    only: tuple[int, ...] = field(default=tuple(SHARED_MEMORY))
    source: type = ASTSource

    def compile(self, capability: int):
        names = self.kernel.arg_names
        types = {
            name: "constexpr" if name in self.constants else self.types.get(name, "i32") for name in names
        }
        multiples = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types[name] == "i32" and name not in self.odd or types[name].startswith("*")
        }
        source = self.source(fn=self.kernel, signature=types, constexprs=self.constants, attrs=multiples)
        return triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": self.warps}
        )


def builds(capability: int) -> Iterator[Build]:
    """The kernels as V2's and V2-Lite's shapes launch them on a GPU of this compute capability."""
    yield from step_builds()
    yield from attention_builds(capability)


def step_builds() -> Iterator[Build]:
    """What surrounds attention, for V2-Lite in bf16: 64 experts, 2,048 channels, batches of 1, 32 and 128."""
    half = (
        "x",
        "weight",
        "residual",
        "out",
        "compressed",
        "q_rope",
        "norm_weight",
        "q",
        "w_uk",
        "q_latent",
        "latent",
        "k_rope",
    )
    half += (
        "added",
        "normed",
        "router",
        "inner",
        "w_gate_up",
        "shared_gate_up",
        "w_down",
        "shared_down",
        "gate_up",
    )
    types = dict.fromkeys(half, "*bf16") | dict.fromkeys(("eps", "length", "scaling"), "fp32")
    types |= dict.fromkeys(("summands", "weights", "scores", "cos", "sin", "angles"), "*fp32")
    types |= dict.fromkeys(("lengths", "active", "order", "starts", "arrivals", "place", "count"), "*i32")
    types |= dict.fromkeys(("ids", "expert_ids"), "*i64")
    odd = frozenset(
        {"batch", "experts", "routed", "k", "n_group", "topk_group", "heads", "pairs"}
        | {"heads_each", "experts_each"}
    )

    def build(name: str, kernel: object, warps: int = 4, others: dict | None = None, **constants) -> Build:
        if "OVERLAP" in kernel.arg_names:
            constants["OVERLAP"] = 0
        return Build(name, kernel, constants, types | (others or {}), warps, odd)

    for batch in (1, 32, 128):
        if batch <= step.FEW_TOKENS:
            blocks = step.choose_product_blocks(batch, 2048, 3648, 2)
            warps = blocks.pop("num_warps")
            yield build(
                f"linear, batch {batch}", step.linear_kernel, warps, RESIDUAL=True, EVEN=True, **blocks
            )
        blocks = step.choose_absorb_blocks(batch, 2)
        warps = blocks.pop("num_warps")
        yield build(
            f"absorb and append, batch {batch}", step.absorb_append_kernel, warps,
            HEADS=16, WIDTH=512, PAIRS=32, EVEN=True, **blocks,
        )  # fmt: skip
        up, down = experts.choose_expert_blocks(batch, 66, 2)
        pairs = {"BY_PAIR": batch == 1, "PAIRS": 16, "SUMMANDS": 8, "K": 6, "EVEN": True}
        order = {"order": "*i64", "starts": "*i64"} if batch == 1 else {}
        for name, kernel, blocks in (
            ("gate_up", experts.gate_up_kernel, up),
            ("down", experts.down_kernel, down),
        ):
            warps = blocks.pop("num_warps")
            out = order | ({"out": "*fp32"} if name == "down" else {})
            yield build(f"{name}, batch {batch}", kernel, warps, out, **pairs, **blocks)
    yield build("add_norm", step.add_norm_kernel, 8, COUNT=8, WIDTH=2048)
    for count, width, groups in ((64, 2048, 0), (160, 5120, 8)):
        route = experts.choose_route_blocks(1, count, width)
        del route["experts_each"]
        warps = route.pop("num_warps")
        route |= {"GROUPED": groups > 0, "GROUPS": max(groups, 1), "NORMALISE": False, "NORM": True}
        route["EXPERTS"] = triton.next_power_of_2(count)
        yield build(f"norm_route, {count} experts", experts.norm_route_kernel, warps, **route)
    yield build("sort", experts.sort_kernel, QUERIES=16, CHUNK=128)
    for columns in (256, 1024):
        yield build(f"swiglu, {columns}", prefill.swiglu_kernel, ROWS=1024 // columns, COLUMNS=columns)
    yield build("rms_norm", prefill.rms_norm_kernel, WIDTH=2048)
    yield build("rotate", prefill.rotate_kernel, HEADS=16, PAIRS=32)
    yield build("add_up", prefill.add_up_kernel, 8, {"total": "*bf16"}, K=6, WIDTH=2048, WEIGHTED=True)
    slopes = {"order": "*i64", "weights_slope": "*fp32"} | dict.fromkeys(("slope", "gate_up_slope"), "*bf16")
    slopes["hidden"] = "*bf16"
    for width in (256, 2048):
        blocks = {"ROWS": 2048 // width, "WIDTH": width}
        yield build(
            f"swiglu, backward, {width}", prefill.weighted_swiglu_backward_kernel, 8, slopes, **blocks
        )


def attention_builds(capability: int) -> Iterator[Build]:
    """Attention for V2 in bf16, and the portable kernel in float32 too."""
    pointers = {name: "*bf16" for name in ("q_latent", "q_rope", "latent", "k_rope", "out")}
    pointers |= {"partial_out": "*fp32", "partial_lse": "*fp32", "lengths": "*i32", "block_table": "*i32"}
    odd = frozenset({"batch", "heads", "parts", "heads_each"})
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        blocks = attention.choose_blocks(512, 64, itemsize, SHARED_MEMORY[capability])
        types = {name: kind.replace("bf16", dtype) for name, kind in pointers.items()} | {
            "scale_log2": "fp32"
        }
        for paged in (False, True) if dtype == "bf16" else (False,):
            constants = {
                "SEQUENCES": 128,
                "HEADS": blocks.heads,
                "TILE": blocks.tile,
                "WIDTH": 512,
                "ROPE": 64,
                "PAGED": paged,
                "STAGES": blocks.stages_of(paged),
                "EVEN": True,
                "OVERLAP": 0,
            }
            name = f"split, {dtype}, {'paged' if paged else 'contiguous'}, tiles of {blocks.tile}"
            yield Build(name, attention.split_kernel, constants, types, blocks.warps, odd)
    blocks = attention.choose_blocks(128, 128, 2, SHARED_MEMORY[capability])  # GQA, 64 texts of 8 groups
    constants = {"SEQUENCES": 512, "HEADS": blocks.heads, "TILE": blocks.tile, "WIDTH": 128, "ROPE": 128}
    constants |= {"PAGED": False, "STAGES": blocks.stages_of(False), "EVEN": True, "OVERLAP": 0}
    types = pointers | {"scale_log2": "fp32"}
    yield Build("split, GQA", attention.split_kernel, constants, types, blocks.warps, odd)
    for batch, parts in ((1, 32), (128, 64)):
        constants = attention.choose_combine_blocks(batch, 128, 512, parts, 132) | {
            "SEQUENCES": 128,
            "TILE": 64,
        }
        constants["OVERLAP"] = 0
        del constants["heads_each"]
        yield Build(f"combine, batch {batch}", attention.combine_kernel, constants, pointers, 4, odd)
    if descriptors.TensorDescriptor is None or capability != 90:
        return
    for heads in (16, 128):
        kernel = descriptors.DescriptorKernel.for_heads(heads)
        constants = {"SEQUENCES": 128, "HEADS": kernel.heads, "TILE": kernel.tile}
        constants |= {"TAIL": kernel.tail, "HALF": 256}
        constants |= {"ROPE": 64, "PAGED": False, "STAGES": kernel.stages, "OVERLAP": 0}
        tiles = {
            "latent_tiles": f"tensordesc<bf16[1, {kernel.tile}, 256]>",
            "k_rope_tiles": f"tensordesc<bf16[1, {kernel.tile}, 64]>",
        }
        types = pointers | tiles | {"scale_log2": "fp32"}
        name = f"split with descriptors, {heads} heads"
        split = descriptors.split_kernel_with_descriptors
        yield Build(name, split, constants, types, kernel.warps, odd)
    if hopper.gluon is None:
        return
    from triton.experimental.gluon._runtime import GluonASTSource

    def tiles(dtype: str, bits: int, columns: int) -> str:
        layout = hopper.gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=3)
        return f"tensordesc<{dtype}[1, 64, {columns}],{layout!r}>"

    types = {name: tiles("bf16", 16, 256) for name in ("q_latent", "latent", "out")}
    types |= {name: tiles("bf16", 16, 64) for name in ("q_rope", "k_rope")}
    types |= {"partial_out": tiles("fp32", 32, 128), "partial_lse": "*fp32", "lengths": "*i32"}
    types |= {"block_table": "*i32", "scale_log2": "fp32"}
    for paged in (False, True):
        constants = {"SEQUENCES": 128, "PAGED": paged}
        name = f"split in Gluon, {'paged' if paged else 'contiguous'}"
        yield Build(
            name,
            hopper.split_kernel_hopper,
            constants,
            types,
            4,
            odd | set(hopper.COUNTS),
            source=GluonASTSource,
        )


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for build in builds(capability):
            shared = build.compile(capability).metadata.shared
            print(json.dumps({"kernel": build.name, "capability": capability, "shared": shared}), flush=True)


if __name__ == "__main__":
    main()
