"""Kernels once each, for NVIDIA's checker: `compute-sanitizer --tool memcheck python tests/sanitizer.py`.

Names (PARTS) choose among them. Each launch is small, as the tools slow kernels down a hundredfold; lengths
are ragged, one of them 0, no block is filled.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

import torch  # noqa: E402
from attention_cases import SELECTED, Case, make_inputs, poisoned  # noqa: E402

from dsv2.kernels import descriptors, experts, hopper, prefill, step  # noqa: E402
from dsv2.kernels.attention import TritonKernel, run_kernel  # noqa: E402

BF16 = torch.bfloat16
WIDE = Case(lengths=(130, 0, 65, 1), heads=70, width=512, rope=64, dtype=BF16, parts=3)


def portable() -> None:
    small = TritonKernel(heads=16, tile=16, warps=4, stages=2)
    for case in (SELECTED[0], SELECTED[3]):
        launch(case, small)


def with_descriptors() -> None:
    for heads in (16, 70):
        for case in (Case(**{**vars(WIDE), "heads": heads, "page": page}) for page in (0, 64)):
            launch(case, descriptors.DescriptorKernel.for_heads(heads))


def in_gluon() -> None:
    for case in (WIDE, Case(**{**vars(WIDE), "page": 64})):
        launch(case, hopper.HopperKernel())


def launch(case: Case, kernel) -> None:
    inputs = make_inputs(case, "cuda")
    arguments = list(vars(inputs).values())
    run_kernel(kernel, *arguments[:5], case.scale, inputs.block_table, poisoned(inputs), case.parts)


def normal(*shape):
    return torch.randn(*shape, device="cuda")


def decode_step() -> None:
    x = normal(5, 130)
    for few in (x, x[:1]):  # with tensor cores, without
        step.launch_linear(few[:, None], normal(1, 50, 130), normal(len(few), 50))
    step.add_norm(x, normal(5, 3, 130), normal(130), 1e-6)
    lengths = torch.tensor([0, 3, 8, 2, 1], dtype=torch.int32, device="cuda")
    cache = normal(5, 9, 24), normal(5, 9, 10)
    active = torch.tensor([1, 1, 1, 0, 1], dtype=torch.int32, device="cuda")
    step.absorb_append(
        normal(5, 3, 22), normal(3, 12, 24), normal(5, 34), normal(24), 1e-6, normal(5, 5), 1.0, *cache,
        lengths, active,
    )  # fmt: skip
    _, ids, weights, _ = experts.norm_route(x, normal(130), 1e-6, normal(12, 130), experts.Choice(3, 4, 2))
    stacks = normal(12, 2 * 40, 130), normal(12, 130, 40), normal(2 * 40, 130), normal(130, 40)
    for count in (1, 5):  # few pairs, many pairs
        experts.launch_experts(x[:count], ids[:count], weights[:count], *stacks)


def passes() -> None:
    prefill.swiglu(normal(3, 84))
    prefill.rms_norm(normal(5, 130), normal(130), 1e-6)
    prefill.rotate_pairs(normal(2, 3, 5, 12), normal(2, 3, 6), normal(2, 3, 6))
    order, count = torch.randperm(15, device="cuda"), torch.tensor([13], dtype=torch.int32, device="cuda")
    prefill.add_up(normal(15, 45), normal(5, 3), order, count, 5, 3)
    prefill.weighted_swiglu_backward(normal(15, 45), normal(15, 90), normal(5, 3), order, count)


PARTS = {
    "portable": portable,
    "descriptors": with_descriptors,
    "gluon": in_gluon,
    "step": decode_step,
    "prefill": passes,
}

if __name__ == "__main__":
    names = sys.argv[1:] or list(PARTS)
    with torch.no_grad():
        for name in names:
            PARTS[name]()
    torch.cuda.synchronize()
    print("launched:", *names)
