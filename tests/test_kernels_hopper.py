"""The Gluon kernel for many heads against float64, on a Hopper GPU; wrong kernels fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import DEVICE, TOLERANCE, Case, error, exact, make_inputs, poisoned

from dsv2.kernels import attention, hopper

ON_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_HOPPER or hopper.gluon is None, reason="needs a Hopper GPU and Triton's Gluon"),
]

BF16, FP16 = torch.bfloat16, torch.float16


def case(lengths, heads=128, dtype=BF16, **others) -> Case:
    return Case(lengths=tuple(lengths), heads=heads, width=512, rope=64, dtype=dtype, **others)


CASES = (
    case([64], parts=1, spare=0),
    case([640], parts=3),
    case([1024, 1024], heads=64, parts=4),
    case([1, 63, 64, 65, 0, 200, 127, 129]),
    case([1, 63, 64, 65, 0, 200, 127, 129], heads=96, parts=5),
    case([700, 0, 0, 31, 1500], heads=64, parts=7, page=64),
    case([5000, 17, 300, 4096, 0, 999], page=64),  # odd numbers of tiles: the buffers' phases drift apart
    case([5000, 17, 300, 4096, 0, 999], heads=96, page=128, parts=66),
    case([8191], page=64),
    case([300, 20, 1], heads=48, dtype=FP16, parts=2),
    case([900, 77], sharpness=40.0),
    case([900, 77], dtype=FP16, sharpness=40.0),
    case([0] * 200 + [1000] + [0] * 30 + [64]),
    case([0, 0]),
    case([300, 20, 1], heads=40, layout="tokens first"),
    case([300, 20, 1], layout="separate"),
)


def run(case: Case, module=hopper) -> tuple[float, bool]:
    """The largest relative error, and whether a second run gives the same bits."""
    inputs = make_inputs(case)
    arguments = list(vars(inputs).values())
    assert module.fits(*arguments[:4], inputs.block_table)
    outs = [
        attention.run_kernel(
            module.HopperKernel(),
            *arguments[:5],
            case.scale,
            inputs.block_table,
            poisoned(inputs),
            case.parts,
        )
        for _ in range(2)
    ]
    return error(outs[0], exact(case, inputs)), torch.equal(*outs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_float64(case):
    found, same = run(case)
    assert found < TOLERANCE[case.dtype] and same


def test_result_that_the_tma_cannot_address():
    """A result with rows of 516 numbers, 1032 bytes: no multiple of 16."""
    inputs = make_inputs(case([700, 70, 0]))
    arguments = list(vars(inputs).values())[:5]
    odd = inputs.q_latent.new_full((3, 128, 516), float("nan"))[..., :512]
    for parts in (1, 5):
        expected = attention.run_kernel(hopper.HopperKernel(), *arguments, 0.04, parts=parts)
        out = attention.run_kernel(hopper.HopperKernel(), *arguments, 0.04, out=odd, parts=parts)
        assert torch.equal(out, expected)


WRONG = {  # what is changed in the kernel's text, none of which makes it wait for ever
    "the mask takes one token too many": ("(token < left)[None", "(token <= left)[None"),
    "what lies beyond the length is not cleared": (
        "    if left < TILE:\n        clear",
        "    if left < 0:\n        clear",
    ),
    "the mixture is not rescaled": ("mixture * shrink[:, None]", "mixture * 1.0"),
    "the sum is not rescaled": ("return peak, total * shrink, mixture", "return peak, total, mixture"),
    "a group counts its own sum twice": ("sums[1 - ME].load", "sums[ME].load"),
    "only the rotary part counts": (
        "c_r.index(ME).permute((1, 0)), scores, is_async",
        "c_r.index(ME).permute((1, 0)), scores, use_acc=False, is_async",
    ),
    "the wrong half of the queries": ("q.index(OTHER + zero), far", "q.index(ME + zero), far"),
    "the table is not asked": ("block = gl.load(block_table + ", "block = b + 0 * gl.load(block_table + "),
    "parts are written to each other's place": ("send(partial_out, part + b,", "send(partial_out, part,"),
    "exp2 is given natural logarithms": ("scale * LOG2_E", "scale"),
}


@pytest.mark.parametrize("old, new", WRONG.values(), ids=WRONG)
def test_wrong_kernels_are_found(tmp_path, old, new):
    source = Path(hopper.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {hopper.__file__}"
    path = tmp_path / "wrong_hopper.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("wrong_hopper", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    cases = (case([300, 20, 700], parts=4), case([900, 77], page=64, parts=3, sharpness=20.0))
    assert any(not found < TOLERANCE[BF16] for found, _ in (run(each, module) for each in cases))
