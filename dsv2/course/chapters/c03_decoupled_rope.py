"""The exercises of chapter 03: cases, right answers, plausible mistakes, hints."""

# B batch   T tokens (queries)   S keys   H heads   N channels without position   R rotary channels   C latent

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.rope import rope_frequencies, rotate_pairs


def random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers in each of the shapes, the same ones each time."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# --------------------------------------------------------------------------------------- 03.1 the rotation


def rotation_case(
    seed: int, batch: int, tokens: int, heads: int, channels: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    (x,) = random(seed, (batch, tokens, heads, channels))
    positions = 2 + 3 * torch.arange(batch)[:, None] + torch.arange(tokens)
    angles = positions[..., None] * rope_frequencies(channels, theta=50.0)
    return {"x": x.to(dtype), "cos": angles.cos(), "sin": angles.sin()}


def turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    first: Callable[..., Tensor] = lambda x0, x1, cos, sin: x0 * cos - x1 * sin,
    second: Callable[..., Tensor] = lambda x0, x1, cos, sin: x0 * sin + x1 * cos,
    by_token: bool = True,
    joined: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The rotation with one part changed. joined: all first members first; dtype: of the result."""
    x0, x1 = x.float()[..., 0::2], x.float()[..., 1::2]
    if by_token:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = first(x0, x1, cos, sin), second(x0, x1, cos, sin)
    out = torch.cat(turned, dim=-1) if joined else torch.stack(turned, dim=-1).flatten(-2)
    return out.to(dtype or x.dtype)


def turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x0, x1 = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1).to(x.dtype)


def turn_halves_into_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turn_halves(x, cos, sin).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def turn_after_itself(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin, x0, x1 = cos.unsqueeze(-2), sin.unsqueeze(-2), x.float()[..., 0::2], x.float()[..., 1::2]
    x0 = x0 * cos - x1 * sin
    x1 = x0 * sin + x1 * cos
    return torch.stack((x0, x1), dim=-1).flatten(-2).to(x.dtype)


ROTATE_PAIRS = Exercise(
    number="03.1",
    name="rotate_pairs",
    title="turn every pair of channels",
    difficulty=2,
    minutes=8,
    answer=rotate_pairs,
    cases=(
        Case("2 texts of 5 tokens, 3 heads of 8 channels", lambda: rotation_case(1, 2, 5, 3, 8)),
        Case("1 text of 4 tokens, as many heads, 6 channels", lambda: rotation_case(2, 1, 4, 4, 6)),
        Case(
            "3 texts of 4 tokens, 1 head of 10 channels, in bfloat16",
            lambda: rotation_case(3, 3, 4, 1, 10, torch.bfloat16),
        ),
    ),
    mistakes=(
        Mistake(
            "channel i with channel i + half",
            "This pairs each channel with the one half a head further on. Much code does that, but here, as "
            "in DeepSeek-V2's checkpoints, the members of a pair are neighbours.",
            turn_halves,
        ),
        Mistake(
            "halves in, neighbours out",
            "Channel i was turned with channel i + half, and then the two were put side by side. Neighbours "
            "make a pair on the way in as well as on the way out.",
            turn_halves_into_neighbours,
        ),
        Mistake(
            "halves in the result",
            "Neighbours were turned, as they should be, but the result holds all first members and then all "
            "second ones. Its channels should stand where they stood.",
            lambda x, cos, sin: turn(x, cos, sin, joined=True),
        ),
        Mistake(
            "turned backwards",
            "Every pair turns by the negative angle: both sines have the wrong sign. If queries turned one "
            "way and keys the other, the scores would depend on the sum of their positions.",
            lambda x, cos, sin: turn(
                x,
                cos,
                sin,
                first=lambda x0, x1, cos, sin: x0 * cos + x1 * sin,
                second=lambda x0, x1, cos, sin: x1 * cos - x0 * sin,
            ),
        ),
        Mistake(
            "both sines negative",
            "Both members of a pair subtract their sine. That is no rotation: lengths change with the "
            "position.",
            lambda x, cos, sin: turn(x, cos, sin, second=lambda x0, x1, cos, sin: x1 * cos - x0 * sin),
        ),
        Mistake(
            "both sines positive",
            "Both members of a pair add their sine. That is no rotation: lengths change with the position.",
            lambda x, cos, sin: turn(x, cos, sin, first=lambda x0, x1, cos, sin: x0 * cos + x1 * sin),
        ),
        Mistake(
            "cos and sin exchanged",
            "This is a quarter turn off and mirrored: cos and sin have changed places. At position 0, with "
            "cos 1 and sin 0, nothing should move.",
            lambda x, cos, sin: turn(x, sin, cos),
        ),
        Mistake(
            "second from the turned first",
            "The second member of each pair was computed from the first one's new value. Both need the old "
            "pair.",
            turn_after_itself,
        ),
        Mistake(
            "angle of the head",
            "The angles were lined up with the heads, not with the tokens: PyTorch matches axes from the "
            "right. It raises an error unless there are as many heads as tokens; then it is silently wrong.",
            lambda x, cos, sin: turn(x, cos, sin, by_token=False),
        ),
        Mistake(
            "axis of heads in front of the tokens",
            "cos got its axis of heads in front of the tokens' axis, so that its tokens meet x's heads. It "
            "would be the right place for a single text, without an axis of texts.",
            lambda x, cos, sin: turn(x, cos[:, None], sin[:, None], by_token=False),
        ),
        Mistake(
            "every text like the first",
            "All texts are turned by the angles of the first one. Texts of a batch may stand at different "
            "positions.",
            lambda x, cos, sin: turn(x, cos[:1], sin[:1]),
        ),
        Mistake(
            "stays float32",
            "The numbers are right, but of another type than x. A bfloat16 model would go on in float32 from "
            "here, or fail at the next product.",
            lambda x, cos, sin: turn(x, cos, sin, dtype=torch.float32),
        ),
        Mistake(
            "turned in x's own type",
            "The products were taken in x's type. bfloat16 has three digits: the angles of neighbouring "
            "positions run together.",
            lambda x, cos, sin: turn_in_own_type(x, cos, sin),
        ),
    ),
    hints=(
        "x has an axis for the heads and cos has none. Which axes does PyTorch line up when you write x * "
        "cos, and which should it line up?",
        'As under "A pair of channels is a clock hand" in the notebook, but with heads: x becomes '
        "(..., tokens, heads, pairs, 2), cos has to be (..., tokens, 1, pairs). x[..., 0::2] are the first "
        "members of all pairs; torch.stack(..., dim=-1) and .flatten(-2) put two tensors together in turn.",
        "x0, x1 = first and second members of the pairs, in float32\n"
        "cos, sin: a new axis of size 1 for the heads\n"
        "y0 = x0 cos - x1 sin;  y1 = x0 sin + x1 cos\n"
        "stack y0 and y1 along a new last axis, flatten it, and return it in x's type",
    ),
    checked="neighbouring pairs, both signs, angles by token and text, as many heads as tokens, bfloat16",
    axes=("text", "token", "head", "channel"),
    replaces=("dsv2.rope.rotate_pairs",),
)


def turn_in_own_type(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x0, x1 = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1).flatten(-2)


# ------------------------------------------------------------------------------------------ 03.2 frequencies


def frequencies_with(
    exponent: Callable[[Tensor, int], Tensor], base: float | None = None
) -> Callable[..., Tensor]:
    """A mistake: theta^exponent(i, dim), with i = 0, 1, ... of each pair."""

    def answer(dim: int, theta: float = 10000.0) -> Tensor:
        return (theta if base is None else base) ** exponent(torch.arange(dim // 2, dtype=torch.float32), dim)

    return answer


ROPE_FREQUENCIES = Exercise(
    number="03.2",
    name="rope_frequencies",
    title="how fast each pair turns",
    difficulty=1,
    minutes=3,
    answer=rope_frequencies,
    cases=(
        Case("8 channels, theta 10000", lambda: {"dim": 8}),
        Case("6 channels, theta 500", lambda: {"dim": 6, "theta": 500.0}),
        Case("64 channels, theta 10000, as in DeepSeek-V2", lambda: {"dim": 64, "theta": 10000.0}),
    ),
    mistakes=(
        Mistake(
            "grows instead of shrinking",
            "The exponent is positive, so that later pairs turn faster and faster. The first pair should be "
            "the fastest, with 1 radian a position, and the last one slow enough for a long text.",
            frequencies_with(lambda i, dim: 2 * i / dim),
        ),
        Mistake(
            "i instead of 2i",
            "The exponent runs over the pairs but is divided by the number of channels, so it ends half "
            "way. There are two channels in a pair.",
            frequencies_with(lambda i, dim: -i / dim),
        ),
        Mistake(
            "2i over the pairs",
            "The exponent is divided by the number of pairs where it should be that of channels. It then "
            "runs down to almost theta squared.",
            frequencies_with(lambda i, dim: -4 * i / dim),
        ),
        Mistake(
            "begins with i = 1",
            "All pairs are one step too slow. Counting from 0, the first frequency is theta^0 = 1.",
            frequencies_with(lambda i, dim: -2 * (i + 1) / dim),
        ),
        Mistake(
            "reaches theta",
            "The steps are a little too large, so that the last frequency is exactly 1 / theta. The formula "
            "stops one step short of that.",
            frequencies_with(lambda i, dim: -i / (dim / 2 - 1)),
        ),
        Mistake(
            "a frequency for every channel",
            "There are as many frequencies as channels, each of them twice. The two channels of a pair turn "
            "together: one frequency is enough.",
            lambda dim, theta=10000.0: rope_frequencies(dim, theta).repeat_interleave(2),
        ),
        Mistake(
            "i over all channels",
            "The pairs are counted up to the number of channels, so there are twice as many, and the second "
            "half of them is slower than 1 / theta. Two channels make one pair.",
            lambda dim, theta=10000.0: theta ** -(2 * torch.arange(dim, dtype=torch.float32) / dim),
        ),
        Mistake(
            "slowest first",
            "These are the right numbers in the opposite order. Pair 0 is the fastest.",
            lambda dim, theta=10000.0: rope_frequencies(dim, theta).flip(0),
        ),
        Mistake(
            "wavelengths",
            "These are wavelengths: how many positions a whole turn takes. Asked for is how many radians one "
            "position takes.",
            lambda dim, theta=10000.0: 2 * math.pi / rope_frequencies(dim, theta),
        ),
        Mistake(
            "turns, not radians",
            "These are whole turns a position. cos and sin count in radians, and a turn has 2 pi of them.",
            lambda dim, theta=10000.0: rope_frequencies(dim, theta) / (2 * math.pi),
        ),
        Mistake(
            "theta ignored",
            "This is right for theta = 10000 only. The base is an argument: models for long texts choose a "
            "larger one.",
            frequencies_with(lambda i, dim: -2 * i / dim, base=10000.0),
        ),
    ),
    hints=(
        "8 channels are 4 pairs. Write down 2i / dim for each of them: where does it begin, by how much does "
        "it grow, and does it reach 1?",
        'The table under "Fast pairs and slow pairs" in the notebook shows the frequencies of 16 channels. '
        "torch.arange(0, dim, 2) counts in twos; a number ** a tensor is a tensor.",
        "exponents = 0, 2, 4, ... dim - 2, each divided by dim (float32)\n"
        "return theta to the power of minus those",
    ),
    checked="three sizes and two bases, among them the 32 pairs of DeepSeek-V2",
    axes=("pair",),
    tolerance=1e-6,
    replaces=("dsv2.rope.rope_frequencies",),
)


# ------------------------------------------------------------------------- 03.3 between query and latent


def between_case(seed: int, channels: int, latent: int, distance: int) -> dict[str, Any]:
    (w_uk,) = random(seed, (channels, latent))
    return {"w_uk": w_uk, "frequencies": rope_frequencies(channels, theta=30.0), "distance": distance}


def turned_columns(w_uk: Tensor, angles: Tensor) -> Tensor:
    """Every column of w_uk turned by the angles of its pairs."""
    return rotate_pairs(w_uk.T[None], angles.cos()[None], angles.sin()[None])[0].T


def matrix_between(w_uk: Tensor, frequencies: Tensor, distance: int) -> Tensor:
    """Right: R_(-distance) W^UK."""
    return turned_columns(w_uk, -distance * frequencies)


def in_halves(w_uk: Tensor, frequencies: Tensor, distance: int) -> Tensor:
    cos, sin = (-distance * frequencies).cos()[:, None], (-distance * frequencies).sin()[:, None]
    first, second = w_uk.chunk(2)
    return torch.cat((first * cos - second * sin, first * sin + second * cos))


def turned_rows(w_uk: Tensor, frequencies: Tensor, distance: int) -> Tensor:
    """Only the latent's first channels can turn if there are more of them than the key has."""
    turned = w_uk.clone()
    width = min(w_uk.shape[1] // 2 * 2, 2 * len(frequencies))
    angles = -distance * frequencies[: width // 2]
    turned[:, :width] = rotate_pairs(w_uk[None, :, :width], angles.cos()[None], angles.sin()[None])[0]
    return turned


def columns_as_tokens(w_uk: Tensor, frequencies: Tensor, distance: int) -> Tensor:
    angles = -(distance + torch.arange(w_uk.shape[1]))[:, None] * frequencies
    return rotate_pairs(w_uk.T[:, None], angles.cos(), angles.sin())[:, 0].T


MATRIX_BETWEEN = Exercise(
    number="03.3",
    name="matrix_between",
    title="what stands between a query and a latent",
    difficulty=2,
    minutes=10,
    answer=matrix_between,
    cases=(
        Case("6 channels, a latent of 5, distance 3", lambda: between_case(4, 6, 5, 3)),
        Case("4 channels, a latent of 7, distance 11", lambda: between_case(5, 4, 7, 11)),
        Case("8 channels, a latent of 3, distance 0: a token and itself", lambda: between_case(6, 8, 3, 0)),
    ),
    mistakes=(
        Mistake(
            "turned forwards",
            "The columns turn by +distance, as if the key stood ahead of the query. Turning the query by n "
            "and the key by m leaves the key m - n ahead of it, and that is minus the distance.",
            lambda w_uk, frequencies, distance: turned_columns(w_uk, distance * frequencies),
        ),
        Mistake(
            "not turned",
            "This is W^UK itself, which is right for a token and itself only. The rotations of query and key "
            "do not cancel where their positions differ.",
            lambda w_uk, frequencies, distance: w_uk.clone(),
        ),
        Mistake(
            "the latent turned",
            "The rotation stands behind W^UK, at the latent, where it was applied in front of W^UK, to the "
            "key. Matrices may not change places, which is the point of this chapter.",
            turned_rows,
        ),
        Mistake(
            "channel i with channel i + half",
            "The pairs are those of channel i and channel i + half. Here neighbouring channels make a pair.",
            in_halves,
        ),
        Mistake(
            "all pairs at the first speed",
            "Every pair turns by the same angle, that of the first. Each pair has a frequency of its own.",
            lambda w_uk, frequencies, distance: turned_columns(
                w_uk, (-distance * frequencies[0]).expand(len(frequencies))
            ),
        ),
        Mistake(
            "columns taken for tokens",
            "Each column turns one position further than the one before it. The columns belong to the "
            "numbers of one latent, and that is one token, at one distance.",
            columns_as_tokens,
        ),
        Mistake(
            "turned twice",
            "The columns turn by twice the distance. Query and key do turn both, but by different angles, "
            "and what counts is the difference.",
            lambda w_uk, frequencies, distance: turned_columns(w_uk, -2 * distance * frequencies),
        ),
        Mistake(
            "one position only",
            "The columns turn by one position, whatever the distance is. The angle grows with the distance.",
            lambda w_uk, frequencies, distance: turned_columns(w_uk, -frequencies * min(distance, 1)),
        ),
        Mistake(
            "transposed",
            "This is the matrix for the other side, latent by channels: it takes a query to the latent. "
            "Asked for is the M of q^T M c, with the query's channels first.",
            lambda w_uk, frequencies, distance: matrix_between(w_uk, frequencies, distance).T,
        ),
    ),
    hints=(
        "A rotation R_n turns forward by n. What does its transpose do? Then what is left of R_n^T R_m, in "
        "which only the turning of m and n matters?",
        'The cell under "The matrix in between" in the notebook uses the same product. Each column '
        "of W^UK is a key that one number of the latent stands for: turn the columns. rope.rotate_pairs "
        "turns what stands along the last axis and wants (tokens, heads, channels): let one token have "
        "`latent` heads.",
        "angles = -distance * frequencies\n"
        "columns = W^UK transposed, with an axis of one token in front: (1, latent, channels)\n"
        "turn them: rope.rotate_pairs(columns, cos and sin of the angles with an axis in front)\n"
        "take the token's axis off and transpose back",
    ),
    checked="two distances, a token and itself, latents narrower and wider than the key",
    axes=("channel", "latent"),
)


# ---------------------------------------------------------------------------------- 03.4 decoupled scores


def scores_case(seed: int, batch: int, tokens: int, keys: int, heads: int, nope: int, rope: int):
    q_nope, q_rope, k_nope, k_rope = random(
        seed,
        (batch, tokens, heads, nope),
        (batch, tokens, heads, rope),
        (batch, keys, heads, nope),
        (batch, keys, rope),
    )
    return {"q_nope": q_nope, "q_rope": q_rope, "k_nope": k_nope, "k_rope": k_rope}


def two_products(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    return torch.einsum("bthn,bshn->bhts", q_nope, k_nope), torch.einsum("bthr,bsr->bhts", q_rope, k_rope)


def combined(how: Callable[[Tensor, Tensor, int, int], Tensor]) -> Callable[..., Tensor]:
    """An answer: how(content, position, nope, rope) makes the scores of the two products."""

    def answer(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor) -> Tensor:
        products = two_products(q_nope, q_rope, k_nope, k_rope)
        return how(*products, q_nope.shape[-1], q_rope.shape[-1])

    return answer


def first_head_only(content: Tensor, position: Tensor, nope: int, rope: int) -> Tensor:
    only = torch.zeros_like(position)
    only[:, 0] = position[:, 0]
    return (content + only) / math.sqrt(nope + rope)


DECOUPLED_SCORES = Exercise(
    number="03.4",
    name="decoupled_scores",
    title="content and position apart",
    difficulty=1,
    minutes=5,
    answer=combined(lambda content, position, nope, rope: (content + position) / math.sqrt(nope + rope)),
    cases=(
        Case(
            "2 texts, 3 queries, 5 keys, 4 heads; 6 channels without position, 8 rotary",
            lambda: scores_case(7, 2, 3, 5, 4, 6, 8),
        ),
        Case(
            "3 texts, 1 query, 7 keys, 2 heads; 10 channels without position, 4 rotary",
            lambda: scores_case(8, 3, 1, 7, 2, 10, 4),
        ),
    ),
    mistakes=(
        Mistake(
            "rotary key without heads",
            "The rotary key was joined to the others as it came. It has no axis of heads, because there is "
            "one for all of them: it has to get one first, or be met apart.",
            lambda q_nope, q_rope, k_nope, k_rope: torch.cat([k_nope, k_rope], -1),
        ),
        Mistake(
            "scaled by d_h alone",
            "This is what you get when the scores are divided by sqrt(d_h) only. The rotary part has d_h^R "
            "more channels, and the sum runs over them too.",
            combined(lambda content, position, nope, rope: (content + position) / math.sqrt(nope)),
        ),
        Mistake(
            "each part by its own width",
            "Each part was divided by the square root of its own width, so that the narrower one counts for "
            "more. The two parts are one long vector, with one scale.",
            combined(
                lambda content, position, nope, rope: content / math.sqrt(nope) + position / math.sqrt(rope)
            ),
        ),
        Mistake(
            "sum of the roots",
            "The scale is sqrt(d_h) + sqrt(d_h^R). The root belongs over the sum.",
            combined(
                lambda content, position, nope, rope: (
                    (content + position) / (math.sqrt(nope) + math.sqrt(rope))
                )
            ),
        ),
        Mistake(
            "scaled by all heads",
            "The scale counts the channels of all heads. A score belongs to one head, and sums over its "
            "channels alone.",
            combined(
                lambda content, position, nope, rope: (
                    (content + position) / math.sqrt(content.shape[1] * (nope + rope))
                )
            ),
        ),
        Mistake(
            "no root",
            "The scores are divided by the width itself. A sum of d products of unit size is only about "
            "sqrt(d) large.",
            combined(lambda content, position, nope, rope: (content + position) / (nope + rope)),
        ),
        Mistake(
            "not scaled",
            "The scores are not scaled. With more channels they grow, and the softmax nearly picks a single "
            "key.",
            combined(lambda content, position, nope, rope: content + position),
        ),
        Mistake(
            "no position",
            "This is the content part alone. Without the rotary part, the order of the past would make no "
            "difference.",
            combined(lambda content, position, nope, rope: content / math.sqrt(nope + rope)),
        ),
        Mistake(
            "no content",
            "This is the rotary part alone. It tells how far away a key is and little of what it says.",
            combined(lambda content, position, nope, rope: position / math.sqrt(nope + rope)),
        ),
        Mistake(
            "position for the first head only",
            "The rotary key was met by the first head's queries only. It is one key, shared by all heads.",
            combined(first_head_only),
        ),
        Mistake(
            "rotary queries averaged",
            "All heads have the same rotary part, the mean of what each should have. The key is shared, the "
            "queries are not.",
            combined(
                lambda content, position, nope, rope: (
                    (content + position.mean(1, keepdim=True)) / math.sqrt(nope + rope)
                )
            ),
        ),
        Mistake(
            "rotary queries added up",
            "All heads have the same rotary part, the sum of what each should have: the axis of heads was "
            "summed away. The key is shared, the queries are not.",
            combined(
                lambda content, position, nope, rope: (
                    (content + position.sum(1, keepdim=True)) / math.sqrt(nope + rope)
                )
            ),
        ),
        Mistake(
            "the first head's rotary query",
            "The first head's rotary query was taken for all heads. They share the rotary key, but each has "
            "a rotary query of its own.",
            combined(
                lambda content, position, nope, rope: (content + position[:, :1]) / math.sqrt(nope + rope)
            ),
        ),
    ),
    hints=(
        "Take [a; b] and [c; d], two vectors of two parts each. What is their product in terms of the parts? "
        "And how many channels does that sum run over?",
        'Equation 18, and the cell under "The separate rotary key" in the notebook. k_rope has no axis of '
        "heads: give it one of size 1, or leave its letter out of the einsum.",
        "content = q_nope . k_nope: einsum bthn, bshn -> bhts\n"
        "position = q_rope . k_rope: einsum bthr, bsr -> bhts\n"
        "return (content + position) / sqrt(nope + rope)",
    ),
    checked="the scale, every head's own rotary query, one rotary key for all heads, rotary parts wider and "
    "narrower than the other",
    axes=("text", "head", "query", "key"),
)


# ----------------------------------------------------------------------------------------- 03.5 the bug hunt


class RotaryCache:
    """Right. The mistakes below change where queries or keys are said to stand, or what is stored."""

    def __init__(self, batch: int, max_tokens: int, frequencies: Tensor):
        self.frequencies = frequencies
        self.keys = torch.zeros(batch, max_tokens, 2 * len(frequencies))
        self.length, self.calls = 0, 0

    def starts(self, tokens: int) -> tuple[int, int]:
        """The first position of the queries, and of the keys."""
        return self.length, self.length

    def turned(self, x: Tensor, start: int) -> Tensor:
        angles = torch.arange(start, start + x.shape[1])[:, None] * self.frequencies
        return rotate_pairs(x, angles.cos(), angles.sin())

    def append(self, q: Tensor, k: Tensor) -> Tensor:
        queries, keys = self.starts(k.shape[1])
        end = self.length + k.shape[1]
        q = self.turned(q, queries)
        self.keys[:, self.length : end] = self.turned(k[:, :, None], keys)[:, :, 0]
        self.length, self.calls = end, self.calls + 1
        return torch.einsum("bthr,bsr->bhts", q, self.keys[:, :end])


class EveryCallFromZero(RotaryCache):
    def starts(self, tokens):
        return 0, 0


class QueriesFromZero(RotaryCache):
    def starts(self, tokens):
        return 0, self.length


class KeysFromZero(RotaryCache):
    def starts(self, tokens):
        return self.length, 0


class OneStepACall(RotaryCache):
    def starts(self, tokens):
        return self.calls, self.calls


class FromTheEnd(RotaryCache):
    def starts(self, tokens):
        return self.length + tokens, self.length + tokens


class QueriesOneFurther(RotaryCache):
    def starts(self, tokens):
        return self.length + 1, self.length


class TurnedAtEveryCall(RotaryCache):
    def append(self, q, k):
        past = self.keys[:, : self.length, None].clone()
        self.keys[:, : self.length] = self.turned(past, 0)[:, :, 0]
        return super().append(q, k)


class KeysNeverTurned(RotaryCache):
    def append(self, q, k):
        start = self.length
        self.length, end = start + k.shape[1], start + k.shape[1]
        self.keys[:, start:end] = k
        return torch.einsum("bthr,bsr->bhts", self.turned(q, start), self.keys[:, :end])


class OldKeysNotTurned(RotaryCache):
    def append(self, q, k):
        start = self.length
        scores = super().append(q, k)
        self.keys[:, start : self.length] = k
        return scores


def rotary_case(seed: int, batch: int, heads: int, channels: int, calls: tuple[int, ...]) -> dict[str, Any]:
    tokens = sum(calls)
    q, k = random(seed, (batch, tokens, heads, channels), (batch, tokens, channels))
    return {
        "room": {
            "batch": batch,
            "max_tokens": tokens + 1,
            "frequencies": rope_frequencies(channels, theta=40.0),
        },
        "calls": list(zip(q.split(calls, dim=1), k.split(calls, dim=1))),
    }


def score_call_by_call(make: Callable[..., Any], case: Mapping[str, Any]) -> dict[str, Tensor]:
    """What each call of `append` returned."""
    cache = make(**case["room"])
    return {
        f"call {number}": cache.append(q.clone(), k.clone()) for number, (q, k) in enumerate(case["calls"], 1)
    }


ROTARY_CACHE = Exercise(
    number="03.5",
    name="RotaryCache",
    title="a rotary cache that loses its place",
    difficulty=2,
    minutes=5,
    answer=RotaryCache,
    run=score_call_by_call,
    cases=(
        Case(
            "2 texts, 3 heads of 4 channels; 5 tokens, then one by one 2 more",
            lambda: rotary_case(12, 2, 3, 4, (5, 1, 1)),
        ),
        Case(
            "1 text, 2 heads of 6 channels; 2 tokens, then 3, then 1",
            lambda: rotary_case(13, 1, 2, 6, (2, 3, 1)),
        ),
    ),
    mistakes=(
        Mistake(
            "every call from 0",
            "Every call counts its positions from 0. Within one call that is right, which is why a prompt "
            "shows nothing; but a token written later stands behind all that is stored.",
            EveryCallFromZero,
        ),
        Mistake(
            "queries from 0",
            "The keys stand where they should; the queries of every call count from 0. A new query would "
            "then look at its own past as if that lay ahead of it.",
            QueriesFromZero,
        ),
        Mistake(
            "keys from 0",
            "The queries stand where they should; the keys of every call count from 0. A token's query and "
            "key have the same position.",
            KeysFromZero,
        ),
        Mistake(
            "one step a call",
            "The position grows by one a call, however many tokens came. After a prompt of several tokens "
            "the next ones land in the middle of it.",
            OneStepACall,
        ),
        Mistake(
            "counted from the end",
            "The first new token is said to stand behind the last new one: positions begin at the length "
            "after the call. Calls of different sizes are then shifted against each other.",
            FromTheEnd,
        ),
        Mistake(
            "queries one further",
            "Every query stands one position further than its own key. The score of a token with itself "
            "should have no rotation in it.",
            QueriesOneFurther,
        ),
        Mistake(
            "turned at every call",
            "Stored keys are turned again with every call. They were turned when they came in, and where a "
            "token stands does not change.",
            TurnedAtEveryCall,
        ),
        Mistake(
            "keys never turned",
            "The keys are stored as they came and meet turned queries. The scores then depend on where the "
            "query stands, and not on how far away the key is.",
            KeysNeverTurned,
        ),
        Mistake(
            "old keys not turned",
            "New keys are turned for the call they come in, but stored as they were. In later calls they "
            "have no position.",
            OldKeysNotTurned,
        ),
    ),
    hints=(
        "The first call is right and the second is not. What is different about the second call, before "
        "anything is computed?",
        "A key is turned once, by its token's place in the text. Print the positions that the angles are "
        "made of, for 3 tokens and then 1 more: they should be 0, 1, 2 and then 3.",
        "start = how many tokens were stored before this call; end = start + the new ones\n"
        "positions of the new tokens: start, start + 1, ... end - 1",
    ),
    checked="prompts, single tokens and several at once, every score of every call",
    axes=("text", "head", "query", "key"),
    given="every call from 0",
)


# --------------------------------------------------------------------------------------- 03.6 two layouts


def rows_case(seed: int, heads: int, nope: int, rope: int, hidden: int) -> dict[str, Any]:
    (weight,) = random(seed, (heads * (nope + rope), hidden))
    return {"weight": weight, "nope": nope, "rope": rope}


def halves(rope: int) -> Tensor:
    """0 2 4 ... 1 3 5 ..."""
    return torch.cat((torch.arange(0, rope, 2), torch.arange(1, rope, 2)))


def reordered(
    weight: Tensor, nope: int, rope: int, order: Callable[[int], Tensor] = halves, first: int | None = None
) -> Tensor:
    """Rotary rows in another order. first: where they begin in a head (behind the others, if None)."""
    by_head = weight.unflatten(0, (-1, nope + rope)).clone()
    at = nope if first is None else first
    by_head[:, at : at + rope] = by_head[:, at : at + rope][:, order(rope)]
    return by_head.flatten(0, 1)


def rows_by_head_last(weight: Tensor, nope: int, rope: int) -> Tensor:
    """The rows read as (nope + rope, heads)."""
    by_channel = weight.unflatten(0, (nope + rope, -1)).clone()
    by_channel[nope:] = by_channel[nope:][halves(rope)]
    return by_channel.flatten(0, 1)


def heads_indexed_as_rows(weight: Tensor, nope: int, rope: int) -> Tensor:
    """Raises: there are fewer heads than rows in a head."""
    order = torch.cat((torch.arange(nope), nope + halves(rope)))
    return weight.unflatten(0, (nope + rope, -1))[:, order].flatten(0, 1)


def one_head_for_all(weight: Tensor, nope: int, rope: int) -> Tensor:
    return torch.cat((weight[:nope], weight[nope:][0::2], weight[nope:][1::2]))


def rotary_rows_in_front(weight: Tensor, nope: int, rope: int) -> Tensor:
    order = torch.cat((nope + halves(rope), torch.arange(nope)))
    return weight.unflatten(0, (-1, nope + rope))[:, order].flatten(0, 1)


def all_rotary_rows_at_the_end(weight: Tensor, nope: int, rope: int) -> Tensor:
    heads, moved = weight.shape[0] // (nope + rope), weight.clone()
    at = heads * nope
    moved[at:] = weight[at:].unflatten(0, (heads, rope))[:, halves(rope)].flatten(0, 1)
    return moved


ROTARY_ROWS_TO_HALVES = Exercise(
    number="03.6",
    name="rotary_rows_to_halves",
    title="from neighbours to halves",
    difficulty=2,
    minutes=8,
    answer=reordered,
    cases=(
        Case(
            "queries: 3 heads of 5 rows without position and 6 rotary ones, hidden size 4",
            lambda: rows_case(9, 3, 5, 6, 4),
        ),
        Case(
            "latent and rotary key in one matrix: 1 head, 7 rows of latent, 10 rotary ones, hidden size 5",
            lambda: rows_case(10, 1, 7, 10, 5),
        ),
        Case(
            "2 heads of 10 rows without position and 8 rotary ones, hidden size 3",
            lambda: rows_case(11, 2, 10, 8, 3),
        ),
    ),
    mistakes=(
        Mistake(
            "halves to neighbours",
            "This is the way back: it makes neighbours of halves, 0, 3, 1, 4, 2, 5. (For two pairs the two "
            "ways are the same, which hides it.)",
            lambda weight, nope, rope: reordered(weight, nope, rope, lambda r: halves(r).argsort()),
        ),
        Mistake(
            "second members first",
            "The second members of all pairs stand before the first ones. A half rotation would then turn "
            "every pair backwards.",
            lambda weight, nope, rope: reordered(weight, nope, rope, lambda r: halves(r).roll(r // 2)),
        ),
        Mistake(
            "halves exchanged",
            "The first half of the rotary rows has changed places with the second one. Neighbours are still "
            "neighbours.",
            lambda weight, nope, rope: reordered(weight, nope, rope, lambda r: torch.arange(r).roll(r // 2)),
        ),
        Mistake(
            "neighbours exchanged",
            "The two members of each pair have changed places. They should stand half the rotary rows apart.",
            lambda weight, nope, rope: reordered(
                weight, nope, rope, lambda r: torch.arange(r).unflatten(0, (-1, 2)).flip(1).flatten()
            ),
        ),
        Mistake(
            "rotary rows first",
            "The first `rope` rows of each head have moved, as if the rotary part stood in front. It comes "
            "behind the part without position.",
            lambda weight, nope, rope: reordered(weight, nope, rope, first=0),
        ),
        Mistake(
            "the whole head",
            "All rows of a head have moved, those without position too. They have no pairs, and the keys' "
            "rows that they meet have not moved.",
            lambda weight, nope, rope: weight.unflatten(0, (-1, nope + rope))[:, halves(nope + rope)].flatten(
                0, 1
            ),
        ),
        Mistake(
            "first head only",
            "Only the first head's rows have moved. Every head has rotary rows of its own.",
            lambda weight, nope, rope: torch.cat(
                (reordered(weight[: nope + rope], nope, rope), weight[nope + rope :])
            ),
        ),
        Mistake(
            "one head picked",
            "The order of one head's rows was used for the whole matrix: what comes out has the first head's "
            "rows and no others. Split the rows by heads before they are reordered.",
            lambda weight, nope, rope: torch.cat((weight[:nope], weight[nope:][halves(rope)])),
        ),
        Mistake(
            "heads ignored",
            "Everything below the first `nope` rows was taken for rotary, as if there were one head. Each "
            "head has rows without position, and pairs of its own.",
            one_head_for_all,
        ),
        Mistake(
            "rotary rows moved to the front",
            "The rotary rows are in the right order, but stand in front of the others of their head. Whoever "
            "splits queries and keys afterwards expects them behind.",
            rotary_rows_in_front,
        ),
        Mistake(
            "all rotary rows at the end",
            "This is right if the rotary rows of all heads stand together behind everything else. They stand "
            "at the end of each head.",
            all_rotary_rows_at_the_end,
        ),
        Mistake(
            "heads innermost",
            "The rows were read as if the heads changed fastest. The rows of one head stand together.",
            rows_by_head_last,
        ),
        Mistake(
            "rows and heads exchanged",
            "The rows were split into (rows of a head, heads), and then the second axis was indexed as if it "
            "were the rows'. The rows of one head stand together.",
            heads_indexed_as_rows,
        ),
        Mistake(
            "nothing moved",
            "The rows stand where they stood.",
            lambda weight, nope, rope: weight.clone(),
        ),
    ),
    hints=(
        "6 rotary channels: which are the first members of their pairs, and which the second? In which order "
        "do the 6 have to stand so that channel i meets channel i + 3?",
        'The picture under "Neighbours or halves" in the notebook. weight.unflatten(0, (-1, nope + rope)) '
        "has an axis of heads and one of a head's rows; index the second one with the order you want.",
        "order of the rotary rows = 0 2 4 ... 1 3 5 ...\n"
        "order of a head's rows = 0 .. nope - 1 as they are, then nope + the order above\n"
        "split the rows into (heads, nope + rope), pick them in that order, join them again",
    ),
    checked="several heads, the rotary key beside the latent, 3, 4 and 5 pairs, other rows left alone",
    axes=("row", "hidden"),
)


EXERCISES: tuple[Exercise, ...] = (
    ROTATE_PAIRS,
    ROPE_FREQUENCIES,
    MATRIX_BETWEEN,
    DECOUPLED_SCORES,
    ROTARY_CACHE,
    ROTARY_ROWS_TO_HALVES,
)
