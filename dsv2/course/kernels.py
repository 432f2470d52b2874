"""Triton for notebooks and exercises, or where it has no wheels a stand-in: kernels can be read there.

from dsv2.course.kernels import held, tl, triton
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv2.kernels import backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMPILED = DEVICE == "cuda" and backend.triton is not None  # otherwise there is nothing worth timing


class NoTriton(RuntimeError):
    """A kernel was launched, and Triton is not installed; the message says so."""


class StandIn:
    """In the place of Triton: every name in it exists, it decorates anything, a launch raises NoTriton."""

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> StandIn:
        return self

    def __getitem__(self, grid: Any) -> StandIn:
        raise NoTriton(backend.how_kernels_run())


triton: Any = StandIn() if backend.triton is None else backend.triton
tl: Any = StandIn() if backend.tl is None else backend.tl


def held(
    launch: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *inputs: Any,
    tolerance: float = 1e-5,
) -> None:
    """Run a function that launches kernels, and print how far its result is from the reference's.

    tolerance: for the largest difference; float32 sums in another order stay below its default on numbers of
    size 1. Raises AssertionError beyond it. Without Triton it prints that, and what PyTorch gives.
    """
    expected = reference(*inputs)
    if backend.triton is None:
        print(f"{backend.how_kernels_run()}\nPyTorch gives {_described(expected)}")
        return
    actual = launch(*inputs)
    if actual.shape != expected.shape:
        raise AssertionError(f"the kernel gives {tuple(actual.shape)}, PyTorch {tuple(expected.shape)}")
    difference = (actual.double() - expected.double()).abs().max().item()
    if not difference <= tolerance:  # also where it is NaN
        raise AssertionError(f"the kernel and PyTorch differ by {difference:.3g}")
    print(f"kernel and PyTorch give {_described(expected)}\nlargest difference {difference:.0e}")


def _described(result: Tensor) -> str:
    size = result.abs().max().item()
    return f"{' x '.join(f'{n:,}' for n in result.shape)} numbers, up to {size:.2f} large"


def on_device(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """How an answer with kernels is run in a check: on the GPU if there is one; its result comes back."""
    moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    result = answer(**moved)
    if isinstance(result, tuple):
        return tuple(x.cpu() if isinstance(x, Tensor) else x for x in result)
    return result.cpu() if isinstance(result, Tensor) else result


def why_not() -> str:
    """Why kernels cannot run here, in a sentence; "" if they can."""
    return backend.how_kernels_run() if backend.triton is None else ""
