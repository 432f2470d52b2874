"""Triton kernels for decoding with MLA, each with its plain-PyTorch reference beside it.

Importing this needs neither Triton nor a GPU.
"""

from __future__ import annotations

from dsv2.kernels.attention import mla_decode, mla_decode_reference
from dsv2.kernels.backend import how_kernels_run

__all__ = ["how_kernels_run", "mla_decode", "mla_decode_reference"]
