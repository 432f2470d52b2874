"""Rotary position embedding, and YaRN, which stretches it to longer contexts.

A pair of neighbouring channels (x_0, x_1) at position p turns by the angle p * f, with one frequency f per
pair. The product of a query turned by p and a key turned by q depends on p - q alone.

Sources: RoFormer, arXiv 2104.09864; YaRN, arXiv 2309.00071; DeepSeek-V2, arXiv 2405.04434, section 3.1.4.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv2.config import DSV2Config, LinearScaling, YarnScaling
from dsv2.kernels import prefill


def rope_frequencies(dim: int, theta: float = 10000.0) -> Float[Tensor, " pairs"]:
    """Radians per position of each pair: theta^(-2i/dim) for i = 0 .. dim/2 - 1. float32, fastest first."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def interpolated_frequencies(dim: int, theta: float, factor: float) -> Float[Tensor, " pairs"]:
    """Frequencies after position interpolation: all of them divided by `factor` (arXiv 2306.15595).

    Position p then has the angles that p / factor had: none that is new, but neighbours lie closer together.
    """
    return rope_frequencies(dim, theta) / factor


def yarn_correction_range(dim: int, theta: float, yarn: YarnScaling) -> tuple[int, int]:
    """The first pair that is changed at all and the first that is fully interpolated.

    Pair i makes L * theta^(-2i/dim) / (2 pi) turns within the original context L; solved for i at beta_fast
    and beta_slow turns. With DeepSeek-V2's values (dim 64): 10 and 23 of 32 pairs.
    """

    def pair_that_turns(times: float) -> float:
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    return low, high


def yarn_frequencies(dim: int, theta: float, yarn: YarnScaling) -> Float[Tensor, " pairs"]:
    """Frequencies after YaRN: fast pairs as they were, slow ones divided by `factor`, a ramp in between.

    A pair that turns many times within the trained context already tells near positions apart, and must not
    change; one that never completes a turn would meet angles it has not seen (arXiv 2309.00071, section 3.2).
    """
    frequencies = rope_frequencies(dim, theta)
    low, high = yarn_correction_range(dim, theta, yarn)
    width = max(high - low, 0.001)
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies * (1 - interpolated) + frequencies / yarn.factor * interpolated


def yarn_temperature(factor: float, mscale: float) -> float:
    """sqrt(t) = 0.1 * mscale * ln(s) + 1: DeepSeek-V2's 0.0707 ln s + 1 (section 3.1.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(cfg: DSV2Config) -> float:
    """What the attention scores are multiplied by before the softmax: t / sqrt(d_h + d_h^R).

    YaRN's temperature t multiplies the whole score, the part without positions too. DeepSeek-V2: 0.114721.
    """
    width = cfg.qk_head_dim if cfg.attention == "mla" else cfg.baseline_head_dim
    yarn = cfg.rope_scaling
    temperature = 1.0
    if isinstance(yarn, YarnScaling):
        temperature = yarn_temperature(yarn.factor, yarn.mscale_all_dim) ** 2
    return temperature / math.sqrt(width)


def rotate_pairs(
    x: Float[Tensor, "... tokens heads channels"],
    cos: Float[Tensor, "... tokens pairs"],
    sin: Float[Tensor, "... tokens pairs"],
) -> Float[Tensor, "... tokens heads channels"]:
    """Turn each pair (x_0, x_1) of neighbouring channels: (x_0 cos - x_1 sin, x_0 sin + x_1 cos).

    Computed in float32 and returned in x's type: late positions are large angles, and bf16 keeps three
    digits.
    """
    if x.is_cuda and prefill.fits(x):
        return prefill.rotate_pairs(x, cos, sin)
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1).flatten(-2).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """cos and sin of every position's angles: (batch, tokens) -> two (batch, tokens, pairs), float32.

    `dim` is the number of rotated channels, `scaling` how they are stretched (YaRN, interpolation, None). The
    angles are computed for the positions asked for, so there is no table to outgrow; one
    model holds one of these and all layers share its output.
    """

    def __init__(self, dim: int, theta: float = 10000.0, scaling: YarnScaling | LinearScaling | None = None):
        super().__init__()
        self.dim, self.theta, self.scaling = dim, theta, scaling
        self.length = (
            1.0  # of the rotary vectors; with mscale = mscale_all_dim, as in DeepSeek-V2, it stays 1
        )
        if isinstance(scaling, YarnScaling):
            self.length = yarn_temperature(scaling.factor, scaling.mscale) / yarn_temperature(
                scaling.factor, scaling.mscale_all_dim
            )
        self.register_buffer("frequencies", self._frequencies(), persistent=False)

    def _frequencies(self) -> Float[Tensor, " pairs"]:
        if self.scaling is None:
            return rope_frequencies(self.dim, self.theta)
        if isinstance(self.scaling, LinearScaling):
            return interpolated_frequencies(self.dim, self.theta, self.scaling.factor)
        return yarn_frequencies(self.dim, self.theta, self.scaling)

    def _apply(self, fn, recurse=True):
        """Keep the frequencies float32 in a bf16 model, and give them values when it leaves `meta`."""
        super()._apply(fn, recurse)
        if self.frequencies.device.type != "meta":
            self.frequencies = self._frequencies().to(self.frequencies.device)
        return self

    def forward(
        self, positions: Int[Tensor, "batch tokens"]
    ) -> tuple[Float[Tensor, "batch tokens pairs"], Float[Tensor, "batch tokens pairs"]]:
        angles = positions[..., None].float() * self.frequencies
        return angles.cos() * self.length, angles.sin() * self.length
