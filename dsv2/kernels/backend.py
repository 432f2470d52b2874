"""Triton where it is installed, and whether its kernels can run on a device.

Kernels are decorated with `jit` from here, so that their modules, and the references beside the kernels, can
be imported without Triton. Without an NVIDIA GPU, Triton's interpreter runs the kernels, tensor by tensor in
NumPy: slow, and right.
"""

from __future__ import annotations

import inspect
import os
import sys
from functools import cache

import torch

COUNTS = {"batch", "heads", "heads_each", "experts_each", "parts", "page", "table_b"}
OLDEST_TRITON = (3, 3)
OLDEST = (8, 0)  # compute capability: on Turing (7.5) Triton no longer reaches the tensor cores

TOO_LATE = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
if not torch.cuda.is_available() and not TOO_LATE:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, and at every kernel

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for macOS and Windows
    triton = tl = None
VERSION = (0, 0) if triton is None else tuple(map(int, triton.__version__.split(".")[:2]))


def jit(function):
    """`triton.jit`, or without Triton the function as it is, which then must not be launched.

    A count (COUNTS) never makes Triton compile a kernel anew: it is a number at run time and nothing else.
    """
    if triton is None:
        return function
    counts = [name for name in inspect.signature(function).parameters if name in COUNTS]
    return triton.jit(function, do_not_specialize=counts)


if hasattr(getattr(getattr(tl, "extra", None), "cuda", None), "gdc_wait"):  # Triton 3.4 on
    HAS_DEPENDENT_LAUNCH = True

    @jit
    def begin(OVERLAP: tl.constexpr):
        """The first line of a kernel that may have been launched before the one it waits for has ended."""
        if OVERLAP:
            tl.extra.cuda.gdc_wait()

else:
    HAS_DEPENDENT_LAUNCH = False

    @jit
    def begin(OVERLAP: tl.constexpr):
        """Nothing to wait for: this Triton launches a kernel when the one before it has ended."""


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options: programmatic dependent launch where the device (Hopper on) and Triton (3.4 on) have it.

    A kernel's programs are then in place when the one before it ends; `begin` waits for that. In a decode
    step of three hundred short kernels it saves 1.5 percent.
    """
    if not HAS_DEPENDENT_LAUNCH or device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


def how_kernels_run() -> str:
    """One sentence for the reader: compiled for a GPU, interpreted, or not at all."""
    if triton is None:
        return "Triton is not installed here (it has no wheels for macOS and Windows): kernels cannot run."
    if TOO_LATE and not torch.cuda.is_available():
        return "Triton was imported before dsv2, too early to interpret kernels: restart, import dsv2 first."
    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"Triton {triton.__version__} interprets the kernels on the CPU: slow, and right."
    return f"Triton {triton.__version__} compiles the kernels for {torch.cuda.get_device_name()}."


@cache
def kernel_problem(device: torch.device) -> str | None:
    """Why Triton's kernels are not used on this device, as a sentence; None: they are."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if triton is None:
        return "Triton is not installed"
    if VERSION < OLDEST_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, and Triton needs 8.0"
    return None
