"""Cases for the decode attention: shapes, lengths, types, layouts; and the distance from float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The largest relative error of a sequence's output, |out - exact| / |exact| over all its heads. The inputs
# are exact; what is rounded is the weights before their product with the latents, and the output: twice, by
# at most 2^-11 in float16 and 2^-8 in bfloat16, independently from number to number. float32: sums in another
# order, and exp2 to 2 ulp.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}

LAYOUTS = ("packed", "separate", "padded", "tokens first")


@dataclass(frozen=True)
class Case:
    """One call of `mla_decode`. page: 0 for a contiguous cache. sharpness: a factor of the scores."""

    lengths: tuple[int, ...]
    heads: int = 5
    width: int = 24
    rope: int = 10
    dtype: torch.dtype = torch.float32
    spare: int = 3  # slots beyond the longest sequence
    page: int = 0
    layout: str = "packed"
    parts: int | None = None
    sharpness: float = 1.0
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.sharpness / (self.width + self.rope) ** 0.5

    @property
    def tolerance(self) -> float:
        """TOLERANCE, and what one rounding in float32 of the largest partial sum of a score does to a weight.

        A score is scale q c^T, and scale |q| |c| is about sharpness sqrt(width + rope).
        """
        return TOLERANCE[self.dtype] + self.sharpness * (self.width + self.rope) ** 0.5 * 2**-24


@dataclass
class Inputs:
    """The arguments of `mla_decode`, but for the scale."""

    q_latent: Tensor
    q_rope: Tensor
    latent: Tensor
    k_rope: Tensor
    lengths: Tensor
    block_table: Tensor | None


def make_inputs(case: Case, device: str = DEVICE) -> Inputs:
    """Random queries and cache; every slot beyond a sequence's length is NaN."""
    random = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(case.dtype).to(device)

    batch, slots = len(case.lengths), max(max(case.lengths), 1) + case.spare
    q_latent, q_rope = normal(batch, case.heads, case.width), normal(batch, case.heads, case.rope)
    latent, k_rope = normal(batch, slots, case.width), normal(batch, slots, case.rope)
    for b, length in enumerate(case.lengths):
        latent[b, length:], k_rope[b, length:] = float("nan"), float("nan")
    if case.layout == "tokens first":  # a query and a cache whose batch is not the outermost dimension
        q_latent = q_latent.transpose(0, 1).contiguous().transpose(0, 1)
        q_rope = q_rope.transpose(0, 1).contiguous().transpose(0, 1)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    if case.page:
        latent, k_rope, block_table = _into_pages(case, latent, k_rope, random)
    else:
        block_table = None
    return Inputs(q_latent, q_rope, *_lay_out(case.layout, latent, k_rope), lengths, block_table)


def _into_pages(case: Case, latent: Tensor, k_rope: Tensor, random: torch.Generator):
    """The cache cut into pages that lie in any order; the table's unused entries point anywhere."""
    batch, slots, _ = latent.shape
    each = -(-slots // case.page)
    order = torch.randperm(batch * each, generator=random).to(latent.device)
    paged = []
    for cached in (latent, k_rope):
        full = cached.new_full((batch, each * case.page, cached.shape[-1]), float("nan"))
        full[:, :slots] = cached
        pool = torch.empty_like(full).view(batch * each, case.page, -1)
        pool[order] = full.view(batch * each, case.page, -1)
        paged.append(pool)
    return *paged, order.view(batch, each).int()


def _lay_out(layout: str, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers with other strides: side by side in one tensor, apart, padded, or transposed."""
    width = latent.shape[-1]
    if layout == "packed":
        both = torch.cat((latent, k_rope), dim=-1)
        return both[..., :width], both[..., width:]
    if (
        layout == "far"
    ):  # in 32 bits the last slot, or sequence, would lie as far before the first as it lies behind it
        batch, slots = latent.shape[:2]
        stride = 2**30 + 32
        assert (batch, slots)[batch == 1] == 3, "three sequences, or one sequence of three slots"
        room = torch.empty(
            2**32 + 2**16, dtype=latent.dtype, device=latent.device
        )  # almost all of it untouched
        strides = (3 * stride, stride, 1) if batch == 1 else (stride, width + k_rope.shape[-1], 1)
        entries = room[2**31 :].as_strided((batch, slots, width + k_rope.shape[-1]), strides)
        entries.copy_(torch.cat((latent, k_rope), dim=-1))
        return entries[..., :width], entries[..., width:]
    if layout == "padded":
        room = latent.new_full((*latent.shape[:2], width + 7), float("nan"))
        room[..., :width] = latent
        return room[..., :width], k_rope
    if layout == "tokens first":
        return tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (latent, k_rope))
    return latent, k_rope


def exact(case: Case, inputs: Inputs) -> Tensor:
    """softmax(scale (q c^T + q_r k_r^T)) c in float64, one sequence after the other: (B, H, C)."""
    rows = []
    for b, length in enumerate(case.lengths):
        latent, k_rope = inputs.latent, inputs.k_rope
        if inputs.block_table is None:
            c, r = latent[b, :length].double(), k_rope[b, :length].double()
        else:
            pages = inputs.block_table[b].long()
            c, r = (x[pages].flatten(0, 1)[:length].double() for x in (latent, k_rope))
        scores = (inputs.q_latent[b].double() @ c.T + inputs.q_rope[b].double() @ r.T) * case.scale
        rows.append(scores.softmax(dim=-1) @ c)
    return torch.stack(rows)


def error(out: Tensor, expected: Tensor) -> float:
    """The largest relative error of any sequence; infinite if a number is missing. Zeros must be zeros."""
    difference = (out.double() - expected).flatten(1).norm(dim=1)
    size = expected.flatten(1).norm(dim=1)
    relative = torch.where(size > 0, difference / size, torch.where(difference > 0, torch.inf, 0.0))
    return float(relative.nan_to_num(torch.inf).max())


def poisoned(inputs: Inputs) -> Tensor:
    """Somewhere to write to, full of NaN."""
    return torch.full_like(inputs.q_latent, float("nan"), memory_format=torch.contiguous_format)


# What a wrong kernel is most likely to get wrong; small enough for the interpreter.
SELECTED = (
    Case(lengths=(50, 0, 17)),
    Case(lengths=(50, 0, 17), parts=1),
    Case(lengths=(70, 1, 33, 64), parts=5, heads=17, width=32, rope=16),
    Case(lengths=(70, 1, 33, 64), parts=5, heads=17, width=32, rope=16, page=32),
    Case(lengths=(33, 31, 32), parts=3, dtype=torch.float16, page=16, layout="separate"),
    Case(lengths=(1100, 0, 0, 0, 0, 0), parts=66, width=8, rope=2, heads=2),  # all parts are one's
    Case(
        lengths=(100,), parts=7, sharpness=60.0
    ),  # sums of weights far beyond float32 unless a maximum is taken
    Case(lengths=(0, 0), width=40),
    Case(lengths=(5, 90), parts=4, layout="tokens first", seed=3),
    Case(lengths=(3,), spare=0, layout="far", dtype=torch.float16),
    Case(lengths=(2, 3, 1), spare=0, layout="far", dtype=torch.float16),
)
