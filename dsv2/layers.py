"""The two layers that everything else is made with: RMSNorm and the SwiGLU feed-forward network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsv2.kernels import prefill


def rms_norm(
    x: Float[Tensor, "*batch channels"], weight: Float[Tensor, " channels"], eps: float = 1e-6
) -> Float[Tensor, "*batch channels"]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    The mean is taken in float32 whatever the type of x: in bf16 a sum of squares keeps three digits
    (Zhang and Sennrich, arXiv 1910.07467).
    """
    if x.is_cuda and prefill.fits(x):
        return prefill.rms_norm(x, weight, eps)
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return weight * F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


def swiglu(gate_up: Float[Tensor, "*batch two_width"]) -> Float[Tensor, "*batch width"]:
    """silu(gate) * up, where the last dimension of `gate_up` holds the gate's half, then up's.

    Both halves come from one matrix product (Shazeer, arXiv 2002.05202).
    """
    if gate_up.is_cuda and prefill.fits(gate_up):
        return prefill.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class RMSNorm(nn.Module):
    """RMS normalisation with a learned gain: (..., channels) -> (..., channels)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SwiGLU(nn.Module):
    """The feed-forward network W_down(silu(W_gate x) * W_up x): (..., hidden) -> (..., hidden).

    `w_gate_up` holds W_gate's rows, then W_up's.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.w_gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.w_down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(swiglu(self.w_gate_up(x)))
