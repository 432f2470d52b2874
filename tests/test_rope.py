"""Rotary embedding and YaRN against complex numbers, published values, and the other common layout."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2 import DSV2Config, YarnScaling
from dsv2.rope import (
    RotaryEmbedding,
    rope_frequencies,
    rotate_pairs,
    softmax_scale,
    yarn_correction_range,
    yarn_frequencies,
    yarn_temperature,
)

V2 = YarnScaling(factor=40.0, original_max_position_embeddings=4096)
BATCH, TOKENS, HEADS, DIM = 2, 5, 3, 8


def angles_of(positions: torch.Tensor, dim: int, theta: float = 10000.0) -> torch.Tensor:
    """(..., pairs) float64, one pair at a time."""
    per_pair = [positions.double() / theta ** (2 * i / dim) for i in range(dim // 2)]
    return torch.stack(per_pair, dim=-1)


def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotation as multiplication of x_0 + i x_1 by e^(i angle), in float64; x: (..., heads, channels)."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2)


def planted_half_rotation(x, cos, sin):
    """The layout of Llama: channel i is paired with channel i + dim/2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def planted_opposite_turn(x, cos, sin):
    return rotate_pairs(x, cos, -sin)


@pytest.fixture
def queries() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(BATCH, TOKENS, HEADS, DIM), torch.randint(0, 3000, (BATCH, TOKENS))


# float32 angles up to 3000 are good to 3000 * 2^-24 = 2e-4 radians.
ANGLE_ERROR = 1e-3


def test_rotation_is_complex_multiplication(queries):
    x, positions = queries
    cos, sin = RotaryEmbedding(DIM)(positions)
    expected = turn(x, angles_of(positions, DIM)).float()
    torch.testing.assert_close(rotate_pairs(x, cos, sin), expected, atol=ANGLE_ERROR, rtol=0)
    for wrong in (planted_half_rotation, planted_opposite_turn):
        assert (wrong(x, cos, sin) - expected).abs().max() > 0.1


def test_given_the_angles_the_rotation_is_exact(queries):
    """In float64 angles the only error left is float32's own, 1e-7 of the largest value."""
    x, positions = queries
    angles = angles_of(positions, DIM)
    turned = rotate_pairs(x, angles.cos().float(), angles.sin().float())
    torch.testing.assert_close(turned, turn(x, angles).float(), atol=2e-6, rtol=0)


def test_position_zero_changes_nothing_and_lengths_stay(queries):
    x, positions = queries
    rotary = RotaryEmbedding(DIM)
    torch.testing.assert_close(rotate_pairs(x, *rotary(torch.zeros_like(positions))), x)
    turned = rotate_pairs(x, *rotary(positions))
    torch.testing.assert_close(
        turned.unflatten(-1, (-1, 2)).norm(dim=-1), x.unflatten(-1, (-1, 2)).norm(dim=-1)
    )


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 400))
def test_scores_depend_on_the_distance_alone(p, q, shift):
    generator = torch.Generator().manual_seed(p)
    query, key = torch.randn(2, 1, 1, 1, DIM, generator=generator).unbind(0)
    rotary = RotaryEmbedding(DIM)

    def score(at, other):
        turned = rotate_pairs(query, *rotary(torch.tensor([[at]])))
        return (turned * rotate_pairs(key, *rotary(torch.tensor([[other]])))).sum()

    # Angles up to 800 in float32: 800 * 2^-24 = 5e-5 radians each, times vectors of norm about 3.
    torch.testing.assert_close(score(p, q), score(p + shift, q + shift), atol=2e-3, rtol=0)


def test_a_key_away_from_its_position_is_noticed():
    """The property above is not trivially true: positions do change scores."""
    query, key = torch.ones(1, 1, 1, DIM), torch.ones(1, 1, 1, DIM)
    rotary = RotaryEmbedding(DIM)
    turned = rotate_pairs(query, *rotary(torch.tensor([[3]])))
    scores = [(turned * rotate_pairs(key, *rotary(torch.tensor([[p]])))).sum() for p in (3, 4)]
    assert abs(scores[0] - scores[1]) > 0.1


def test_the_half_rotated_layout_gives_the_same_scores_once_channels_are_reordered(queries):
    """Even channels first, then odd ones: what the released code does before its rotate_half."""
    x, positions = queries
    y = torch.randn_like(x)
    cos, sin = RotaryEmbedding(DIM)(positions)
    order = torch.cat((torch.arange(0, DIM, 2), torch.arange(1, DIM, 2)))
    ours = rotate_pairs(x, cos, sin)
    theirs = planted_half_rotation(x[..., order], cos, sin)
    torch.testing.assert_close(theirs, ours[..., order])
    ours = torch.einsum("bthd,bshd->bhts", ours, rotate_pairs(y, cos, sin))
    theirs = torch.einsum("bthd,bshd->bhts", theirs, planted_half_rotation(y[..., order], cos, sin))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    unordered = torch.einsum(
        "bthd,bshd->bhts", planted_half_rotation(x, cos, sin), planted_half_rotation(y, cos, sin)
    )
    assert (unordered - ours).abs().max() > 0.1


def test_frequencies():
    expected = [10000.0 ** (-2 * i / 6) for i in range(3)]
    assert rope_frequencies(6).tolist() == pytest.approx(expected, rel=1e-6)
    assert rope_frequencies(6).dtype == torch.float32
    assert rope_frequencies(4, theta=100.0).tolist() == pytest.approx([1.0, 0.1], rel=1e-6)


# -------------------------------------------------------------------------------------------------- YaRN


def test_yarn_in_deepseek_v2_numbers():
    """dim 64, theta 10000, L = 4096: pairs 10.47 and 22.51 make 32 turns and one, so 10 and 23 of 32."""
    assert yarn_correction_range(64, 10000.0, V2) == (10, 23)
    for pair, turns in ((10.47, 32), (22.51, 1)):
        frequency = 10000.0 ** (-2 * pair / 64)
        assert 4096 * frequency / (2 * math.pi) == pytest.approx(turns, rel=2e-3)
    assert yarn_temperature(40.0, 0.707) == pytest.approx(1.26080, abs=5e-6)
    assert yarn_temperature(40.0, 0.707) ** 2 == pytest.approx(1.58963, abs=1e-5)
    assert yarn_temperature(40.0, 0.707) == pytest.approx(0.0707 * math.log(40) + 1)
    assert softmax_scale(DSV2Config.preset("full")) == pytest.approx(0.114721, abs=5e-7)
    assert softmax_scale(DSV2Config.preset("lite")) == pytest.approx(0.114721, abs=5e-7)


def test_softmax_scale_without_yarn():
    assert softmax_scale(DSV2Config.preset("full", rope_scaling=None)) == pytest.approx(0.072169, abs=5e-7)
    assert softmax_scale(DSV2Config.preset("tiny")) == pytest.approx((32 + 16) ** -0.5)
    mha = DSV2Config.preset("tiny", attention="mha", head_dim=10, rope_scaling=V2)
    assert softmax_scale(mha) == pytest.approx(1.26080**2 / math.sqrt(10), rel=1e-5)
    off = YarnScaling(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.0)
    assert softmax_scale(DSV2Config.preset("full", rope_scaling=off)) == pytest.approx(192**-0.5)


def test_yarn_frequencies_by_hand():
    plain, stretched = rope_frequencies(64).double(), yarn_frequencies(64, 10000.0, V2).double()
    for i in range(32):
        kept = 1.0 if i <= 10 else 0.0 if i >= 23 else 1 - (i - 10) / 13
        assert stretched[i].item() == pytest.approx(plain[i].item() * (kept + (1 - kept) / 40), rel=1e-5)


@pytest.mark.parametrize("context, expected", [(10, (0, 2)), (10**7, (37, 50)), (10**12, (77, 63))])
def test_yarn_range_is_cut_as_in_the_released_code(context, expected):
    """At 0 below and at dim - 1 (not at the last pair, dim/2 - 1) above."""
    yarn = YarnScaling(factor=8.0, original_max_position_embeddings=context)
    assert yarn_correction_range(64, 10000.0, yarn) == expected


def test_no_stretch_is_plain_rope():
    one = YarnScaling(factor=1.0, original_max_position_embeddings=4096)
    torch.testing.assert_close(yarn_frequencies(64, 10000.0, one), rope_frequencies(64))
    assert yarn_temperature(1.0, 0.707) == 1.0


@given(
    st.integers(1, 64).map(lambda n: 2 * n),
    st.floats(1.5, 1e6),
    st.floats(1, 100),
    st.integers(1, 10**6),
)
def test_yarn_stays_between_kept_and_interpolated(dim, theta, factor, context):
    yarn = YarnScaling(factor=factor, original_max_position_embeddings=context)
    plain, stretched = rope_frequencies(dim, theta), yarn_frequencies(dim, theta, yarn)
    assert stretched.isfinite().all()
    assert (stretched <= plain * (1 + 1e-5)).all() and (stretched >= plain / factor * (1 - 1e-5)).all()


def test_length_of_the_rotary_vectors():
    """mscale / mscale_all_dim stretches cos and sin; DeepSeek-V2's ratio is 1."""
    assert RotaryEmbedding(8, scaling=V2).length == 1.0
    yarn = YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=0.5)
    cos, sin = RotaryEmbedding(8, scaling=yarn)(torch.tensor([[7, 9]]))
    length = (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, length**2))


# ------------------------------------------------------------------------------------------- the module


def test_casting_a_model_keeps_the_frequencies_in_float32():
    rotary = RotaryEmbedding(DIM, scaling=V2)
    exact = rotary.frequencies.clone()
    for cast in (rotary.bfloat16(), rotary.half(), rotary.double(), rotary.to(torch.bfloat16)):
        assert cast.frequencies.dtype == torch.float32
        assert torch.equal(cast.frequencies, exact)
    cos, sin = torch.nn.Sequential(rotary).bfloat16()[0](torch.tensor([[100_000]]))
    assert cos.dtype == sin.dtype == torch.float32


def test_leaving_meta_gives_the_frequencies_values():
    with torch.device("meta"):
        rotary = RotaryEmbedding(DIM, theta=500.0)
    assert rotary.frequencies.is_meta
    rotary = torch.nn.Sequential(rotary).to_empty(device="cpu")[0]
    assert torch.equal(rotary.frequencies, rope_frequencies(DIM, 500.0))
    assert not list(rotary.state_dict()), "frequencies are computed, not stored"


def test_bf16_vectors_are_turned_in_float32(queries):
    x, positions = queries
    cos, sin = RotaryEmbedding(DIM)(positions)
    turned = rotate_pairs(x.bfloat16(), cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate_pairs(x.bfloat16().float(), cos, sin).bfloat16())


def test_gradient_turns_back(queries):
    x, positions = queries
    x = x.double().requires_grad_()
    cos, sin = RotaryEmbedding(DIM)(positions)
    weights = torch.randn(x.shape)
    rotate_pairs(x.float(), cos, sin).mul(weights).sum().backward()
    torch.testing.assert_close(x.grad.float(), rotate_pairs(weights, cos, -sin))
