"""The small kernels of a decode step against float64 formulas: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import DEVICE

from dsv2.config import YarnScaling
from dsv2.kernels import step
from dsv2.kernels.backend import triton
from dsv2.rope import RotaryEmbedding

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")

# bfloat16 products are wrong in the interpreter, which adds them up in bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]

# Of |out - exact| / |exact|. What enters is exact and sums are float32; the output is rounded once (a
# product) or twice (a norm: normalised, then times the gain), by at most 2^-11 in float16, 2^-8 in bfloat16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    """On a CPU the functions would run their references: nobody decodes in the interpreter."""
    monkeypatch.setattr(step, "uses_kernels", lambda x: True)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """The same numbers on every device, exact in `dtype`."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def close(out: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether every row of `out` is as near to float64 as `dtype` allows."""
    assert out.dtype == dtype and out.shape == exact.shape
    distance = (out.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
    return bool((distance < TOLERANCE[dtype]).all())


# ------------------------------------------------------------------------------------------ products


def check_linear(module, dtype) -> None:
    """Batches on both sides of a block of tokens; widths that fill no block, and one that fills them."""
    for batch, channels, width in ((1, 70, 33), (5, 256, 48), (18, 130, 7), (40, 300, 65)):
        rows = draw(batch, channels + 6, dtype=dtype)  # further apart than they are long
        rows[:, channels:] = torch.nan
        x = rows[:, :channels]
        weight = draw(width, channels, dtype=dtype, seed=1)
        residual = draw(batch, width, dtype=dtype, seed=2)
        exact = x.double() @ weight.double().mT
        assert close(module.linear(x, weight), exact, dtype)
        assert close(module.linear(x, weight, residual), exact + residual.double(), dtype)


def check_heads_linear(module, dtype) -> None:
    """W^UK as it lies in memory, transposed by its strides alone, and W^UV; inputs cut out of larger ones."""
    for batch, heads, nope, latent, v in ((1, 3, 20, 33, 14), (5, 2, 24, 40, 17), (19, 2, 40, 24, 18)):
        q = draw(batch, heads, nope + 10, dtype=dtype)[..., :nope]
        w_uk, w_uv = draw(heads, nope, latent, dtype=dtype), draw(heads, v, latent, dtype=dtype)
        exact = torch.einsum("bhn,hnc->bhc", q.double(), w_uk.double())
        absorbed = module.heads_linear(q, w_uk.mT)
        assert close(absorbed, exact, dtype)
        exact = torch.einsum("bhc,hvc->bhv", absorbed.double(), w_uv.double())
        assert close(module.heads_linear(absorbed, w_uv), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_equal_float64(dtype):
    check_linear(step, dtype)
    check_heads_linear(step, dtype)


def test_many_tokens_go_to_the_library():
    """Above `FEW_TOKENS` the same functions give the same result."""
    batch = step.FEW_TOKENS + 3
    x, weight = draw(batch, 20, dtype=torch.float32), draw(9, 20, dtype=torch.float32)
    residual = draw(batch, 9, dtype=torch.float32, seed=4)
    assert close(
        step.linear(x, weight, residual), (residual.double() + x.double() @ weight.double().mT), x.dtype
    )
    heads = draw(batch, 3, 20, dtype=torch.float32), draw(3, 7, 20, dtype=torch.float32)
    exact = torch.einsum("bhx,hyx->bhy", *(t.double() for t in heads))
    assert close(step.heads_linear(*heads), exact, torch.float32)


# --------------------------------------------------------------------------------------------- norms


def check_add_norm(module, dtype) -> None:
    """No summand, one, several; rows that fill no block."""
    for batch, summand_count, width in ((1, 0, 33), (3, 1, 100), (4, 5, 64)):
        x = draw(batch, width, dtype=dtype, scale=7.0)
        gain = draw(width, dtype=dtype, seed=5)
        summands = draw(batch, summand_count, width, dtype=torch.float32) if summand_count else None
        added, normed = module.add_norm(x, summands, gain, 1e-2)
        exact = x.double() if summands is None else x.double() + summands.double().sum(dim=1)
        assert close(added, exact, dtype)
        after = added.double()  # the norm is of what was stored
        mean = (after**2).mean(dim=-1, keepdim=True)
        assert close(normed, after / (mean + 1e-2).sqrt() * gain.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_equal_float64(dtype):
    check_add_norm(step, dtype)


def test_eps_counts_in_a_small_row():
    x, gain = draw(2, 30, dtype=torch.float32, scale=1e-3), torch.ones(30, device=DEVICE)
    _, normed = step.add_norm(x, None, gain, 1e-6)
    exact = x.double() / ((x.double() ** 2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    assert close(normed, exact, torch.float32)


# --------------------------------------------------------------------------------- the latent's way in

YARN = YarnScaling(factor=40.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=0.5)


def check_append(module, dtype, yarn: YarnScaling | None = None) -> None:
    """Four sequences, one idle, one new; a cache full of NaN must change in three slots and nowhere else."""
    batch, heads, nope, width, rope, slots, eps = 4, 3, 12, 24, 10, 19, 1e-2
    rotary = RotaryEmbedding(rope, 10000.0, yarn).to(DEVICE)
    lengths = torch.tensor([0, 3, slots - 1, 7], dtype=torch.int32, device=DEVICE)
    active = torch.tensor([1, 1, 1, 0], dtype=torch.int32, device=DEVICE)
    compressed = draw(batch, width + rope + 5, dtype=dtype)[:, : width + rope]
    queries = draw(batch, heads, nope + rope, dtype=dtype)
    w_uk = draw(heads, nope, width, dtype=dtype, seed=4)
    gain = draw(width, dtype=dtype, seed=3)
    entries = torch.full((2, batch, slots, width + rope), torch.nan, device=DEVICE, dtype=dtype)
    latent, k_rope = entries[1, ..., :width], entries[1, ..., width:]
    angles = lengths[:, None].float() * rotary.frequencies
    absorbed, rotated = module.absorb_append(
        queries, w_uk, compressed, gain, eps, angles, rotary.length, latent, k_rope, lengths, active
    )

    # As multiplication of complex numbers: a pair of channels times length * e^(i angle).
    turn = torch.polar(torch.full_like(angles, rotary.length).double(), angles.double())

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn.view(batch, *[1] * (x.dim() - 2), -1)).flatten(-2)

    new = compressed[:, :width].double()
    new = new / ((new**2).mean(dim=-1, keepdim=True) + eps).sqrt() * gain.double()
    key = rotate(compressed[:, width:])
    assert close(rotated, rotate(queries[..., nope:]), dtype)
    exact = torch.einsum("bhn,hnc->bhc", queries[..., :nope].double(), w_uk.double())
    assert close(absorbed, exact, dtype)
    for b in range(batch - 1):
        slot = int(lengths[b])
        assert close(latent[b, slot], new[b], dtype), b
        assert close(k_rope[b, slot], key[b], dtype), b
        entries[1, b, slot] = torch.nan
    assert bool(entries.isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_equals_float64(dtype):
    check_append(step, dtype)


def test_append_with_yarn():
    """Rotary vectors of a length other than 1."""
    assert RotaryEmbedding(10, 10000.0, YARN).length != 1
    check_append(step, torch.float32, YARN)


def test_late_positions_keep_their_angle():
    """At position 100,000 the fastest pair has turned 16,000 times: angles must be reduced in full."""
    angles = torch.tensor([[100_000.0, 1234.5]], device=DEVICE)
    x = draw(1, 1, 4, dtype=torch.float32)
    cache = torch.zeros(1, 1, 9, device=DEVICE)
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    compressed, gain = draw(1, 9, dtype=torch.float32), torch.ones(5, device=DEVICE)
    _, rotated = step.absorb_append(
        torch.cat((x[..., :3], x), -1),
        draw(1, 3, 5, dtype=torch.float32),
        compressed,
        gain,
        1e-6,
        angles,
        1.0,
        cache[..., :5],
        cache[..., 5:],
        zero,
        zero + 1,
    )
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    exact = torch.view_as_real(
        pairs * torch.polar(torch.ones_like(angles).double(), angles.double())
    ).flatten(-2)
    assert close(rotated, exact, torch.float32)


# --------------------------------------------------------------------------------- references, mistakes


def test_references_equal_float64(monkeypatch):
    monkeypatch.setattr(step, "uses_kernels", lambda x: False)
    for dtype in DTYPES:
        check_add_norm(step, dtype)
        check_append(step, dtype)
    check_linear(step, torch.float32)
    check_heads_linear(step, torch.float32)


WRONG = {  # what is changed in the text of the kernels: the old words, the new ones
    "the residual is not added": ("total += tl.load(residual", "total += 0.0 * tl.load(residual"),
    "the last channels of a product are lost": (
        "tl.range(0, channels, COLUMNS",
        "tl.range(0, channels - COLUMNS + 1, COLUMNS",
    ),
    "columns beyond the end are read": (
        "mask=is_token & is_column, other=0.0)",
        "mask=is_token, other=0.0)",
    ),
    "every head takes the first one's weights": ("head.to(tl.int64) * weight_h", "0 * weight_h"),
    "the last summand is forgotten": ("tl.static_range(COUNT)", "tl.static_range(COUNT - 1)"),
    "the gain is forgotten": (
        "normalise(total, gain, width, eps)",
        "normalise(total, 0 * gain + 1, width, eps)",
    ),
    "the latent is not normalised": ("tl.store(at, normalise(x, gain, width, eps)", "tl.store(at, x"),
    "eps is forgotten": ("normalise(x, gain, width, eps)", "normalise(x, gain, width, 0.0)"),
    "the token is written one slot early": (
        "slot = tl.load(lengths + b).to(tl.int64)",
        "slot = tl.load(lengths + b).to(tl.int64) - 1",
    ),
    "idle sequences are written": ("kept = tl.load(active + b)", "kept = 1"),
    "pairs are halves apart": ("tl.load(from_ + 2 * pair + 1,", "tl.load(from_ + (2 * pair + 3) % 10,"),
    "turned the wrong way": ("x0 * cos - x1 * sin", "x0 * cos + x1 * sin"),
    "the rotary key is normalised from the latent": ("load_pairs(new + width, pair", "load_pairs(new, pair"),
    "a query of another head is rotated": (
        "query = q + b * q_b + head * q_h",
        "query = q + b * q_b + 0 * head",
    ),
    "W^UK is applied to the rotary channels": ("head * q_h + nope", "head * q_h"),
    "YaRN's length is forgotten": ("tl.cos(angle) * length", "tl.cos(angle)"),
}


def wrong_kernel(tmp_path: Path, old: str, new: str):
    """The module of the kernels with one change in its text."""
    source = Path(step.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {step.__file__}"
    path = tmp_path / "wrong_step.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("wrong_step", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.uses_kernels = lambda x: True
    return module


@pytest.mark.skipif(DEVICE == "cuda", reason="some of them read or write beyond their tensors")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy: overflow, invalid value
@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_kernels_are_rejected(mistake, tmp_path):
    module = wrong_kernel(tmp_path, *WRONG[mistake])
    with pytest.raises(AssertionError):
        check_linear(module, torch.float32)
        check_heads_linear(module, torch.float32)
        check_add_norm(module, torch.float32)
        check_append(module, torch.float32, YARN)
