"""The exercises of chapter 11: cases, right answers, plausible mistakes, hints."""

# B texts   T tokens

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv2 import rope
from dsv2.config import YarnScaling
from dsv2.course.spec import Case, Exercise, Mistake

# ------------------------------------------------------------------------------------ 11.1 interpolation


def frequencies_to(power: Callable[[Tensor, float, float], Tensor]) -> Callable[..., Tensor]:
    """An answer to 11.1: power(x, theta, s) of the exponents x = 2i / dim."""

    def answer(dim: int, theta: float, factor: float) -> Tensor:
        return power(torch.arange(0, dim, 2, dtype=torch.float32) / dim, theta, factor)

    return answer


def fastest_kept(dim: int, theta: float, factor: float) -> Tensor:
    return torch.cat((torch.ones(1), rope.interpolated_frequencies(dim, theta, factor)[1:]))


INTERPOLATED_FREQUENCIES = Exercise(
    number="11.1",
    name="interpolated_frequencies",
    title="position interpolation",
    difficulty=1,
    minutes=4,
    answer=rope.interpolated_frequencies,
    cases=(
        Case("8 channels, theta 10000, factor 4", lambda: {"dim": 8, "theta": 1e4, "factor": 4.0}),
        Case("6 channels, theta 500, factor 2.5", lambda: {"dim": 6, "theta": 500.0, "factor": 2.5}),
        Case("64 channels, theta 10000, factor 40", lambda: {"dim": 64, "theta": 1e4, "factor": 40.0}),
    ),
    mistakes=(
        Mistake(
            "faster instead of slower",
            "The frequencies were multiplied by the factor. A text s times as long then reaches angles s^2 "
            "times as large as any that were trained; they should be no larger.",
            frequencies_to(lambda x, theta, s: s * theta**-x),
        ),
        Mistake(
            "base times factor",
            "The base was multiplied by the factor. That slows the last pairs down, and leaves the first one "
            "as it was; interpolation changes all pairs alike.",
            frequencies_to(lambda x, theta, s: (s * theta) ** -x),
        ),
        Mistake(
            "base chosen for the slowest pair",
            "The base was raised so that the slowest pair is s times as slow. Between, pairs are slowed down "
            "by less, the first not at all. That is another method; interpolation changes all pairs alike.",
            lambda dim, theta, factor: rope.rope_frequencies(dim, theta * factor ** (dim / (dim - 2))),
        ),
        Mistake(
            "unchanged",
            "These are the frequencies of plain RoPE. The factor has to come in.",
            frequencies_to(lambda x, theta, s: theta**-x),
        ),
        Mistake(
            "exponents divided",
            "The exponents were divided by the factor, not the frequencies. Pair 0 then keeps its speed, and "
            "all others turn faster than before.",
            frequencies_to(lambda x, theta, s: theta ** (-x / s)),
        ),
        Mistake(
            "root of the factor",
            "The frequencies were divided by the root of the factor. Query and key are both turned, but what "
            "counts is the difference of their angles, which has to shrink by the whole factor.",
            frequencies_to(lambda x, theta, s: theta**-x / math.sqrt(s)),
        ),
        Mistake(
            "factor squared",
            "The frequencies were divided by the factor twice. Query and key turn both, and the difference "
            "of their angles shrinks by the factor once.",
            frequencies_to(lambda x, theta, s: theta**-x / s**2),
        ),
        Mistake(
            "fastest pair kept",
            "Pair 0 kept its speed. A method that spares fast pairs is YaRN; interpolation changes all "
            "alike.",
            fastest_kept,
        ),
        Mistake(
            "wavelengths",
            "These are wavelengths: positions for a whole turn. Asked for are radians for one position.",
            frequencies_to(lambda x, theta, s: 2 * math.pi * s * theta**x),
        ),
        Mistake(
            "a frequency for every channel",
            "There are as many frequencies as channels, each of them twice. A pair has one.",
            lambda dim, theta, factor: rope.interpolated_frequencies(dim, theta, factor).repeat_interleave(2),
        ),
        Mistake(
            "turns, not radians",
            "These are turns a position. cos and sin count in radians, and a turn has 2 pi of them.",
            frequencies_to(lambda x, theta, s: theta**-x / (2 * math.pi * s)),
        ),
        Mistake(
            "base 10000 always",
            "This is right for theta = 10000 only. The base is an argument.",
            frequencies_to(lambda x, theta, s: 1e4**-x / s),
        ),
    ),
    hints=(
        "Position 512 of a text that is 8 times as long should look like position 64 did. By how much must "
        "each pair turn less from one position to the next?",
        'The cell under "Three ways to go on" in the notebook prints these numbers. '
        "rope.rope_frequencies(dim, theta) gives the frequencies before.",
        "f = rope.rope_frequencies(dim, theta)\nreturn f divided by factor",
    ),
    checked="three sizes, two bases, three factors",
    axes=("pair",),
    tolerance=1e-6,
    replaces=("dsv2.rope.interpolated_frequencies",),
)


# ------------------------------------------------------------------------------ 11.2 where the ramp runs


def range_with(
    pair: Callable[[int, float, float, float], float] | None = None,
    *,
    low: Callable[[float], float] = math.floor,
    high: Callable[[float], float] = math.ceil,
    bounds: Callable[[float, float, int], tuple[float, float]] = lambda low, high, dim: (
        max(low, 0),
        min(high, dim - 1),
    ),
    swap: bool = False,
) -> Callable[..., tuple[float, float]]:
    """An answer to 11.2. pair(dim, theta, L, n): which pair makes n turns."""
    pair = pair or pair_that_turns

    def answer(dim: int, theta: float, yarn: YarnScaling) -> tuple[float, float]:
        context = yarn.original_max_position_embeddings
        fast, slow = yarn.beta_fast, yarn.beta_slow
        if swap:
            fast, slow = slow, fast
        return bounds(low(pair(dim, theta, context, fast)), high(pair(dim, theta, context, slow)), dim)

    return answer


def pair_that_turns(dim: int, theta: float, context: float, n: float) -> float:
    return dim * math.log(context / (2 * math.pi * n)) / (2 * math.log(theta))


def of_the_new_length(dim: int, theta: float, yarn: YarnScaling) -> tuple[int, int]:
    length = round(yarn.original_max_position_embeddings * yarn.factor)
    return rope.yarn_correction_range(
        dim, theta, YarnScaling(yarn.factor, length, yarn.beta_fast, yarn.beta_slow)
    )


YARN_CORRECTION_RANGE = Exercise(
    number="11.2",
    name="yarn_correction_range",
    title="which pairs the ramp joins",
    difficulty=2,
    minutes=10,
    answer=rope.yarn_correction_range,
    cases=(
        Case(
            "DeepSeek-V2: 64 channels, theta 10000, trained on 4096, beta 32 and 1",
            lambda: {"dim": 64, "theta": 1e4, "yarn": YarnScaling(40.0, 4096)},
        ),
        Case(
            "16 channels, theta 10000, trained on 64, beta 32 and 1: no pair makes 32 turns",
            lambda: {"dim": 16, "theta": 1e4, "yarn": YarnScaling(10.0, 64)},
        ),
        Case(
            "48 channels, theta 500, trained on 1000, beta 20 and 2",
            lambda: {"dim": 48, "theta": 500.0, "yarn": YarnScaling(8.0, 1000, 20.0, 2.0)},
        ),
        Case(
            "12 channels, theta 100, trained on 100000, beta 16 and 0.5: all pairs turn often",
            lambda: {"dim": 12, "theta": 100.0, "yarn": YarnScaling(4.0, 100_000, 16.0, 0.5)},
        ),
    ),
    mistakes=(
        Mistake(
            "betas exchanged",
            "beta_fast and beta_slow have changed places: the ramp begins at the slow pairs. Many turns "
            "belong to fast pairs, and those come first.",
            range_with(swap=True),
        ),
        Mistake(
            "2 pi left out",
            "These pairs turn by n radians within the trained length, not n times. A turn has 2 pi radians.",
            range_with(lambda dim, theta, L, n: dim * math.log(L / n) / (2 * math.log(theta))),
        ),
        Mistake(
            "channels instead of pairs",
            "These numbers count channels: twice too large. The exponent is -2i / dim for pair i.",
            range_with(lambda dim, theta, L, n: 2 * pair_that_turns(dim, theta, L, n)),
        ),
        Mistake(
            "half of the pair",
            "These numbers are half of what they should be: i was solved for twice over. dim is the number "
            "of channels already.",
            range_with(lambda dim, theta, L, n: pair_that_turns(dim, theta, L, n) / 2),
        ),
        Mistake(
            "rounded inwards",
            "The first was rounded up and the second down. The ramp is to include both limits.",
            range_with(low=math.ceil, high=math.floor),
        ),
        Mistake(
            "both rounded down",
            "Both were rounded down. The second is rounded up.",
            range_with(high=math.floor),
        ),
        Mistake(
            "both rounded up",
            "Both were rounded up. The first is rounded down.",
            range_with(low=math.ceil),
        ),
        Mistake(
            "rounded to the nearest",
            "Both were rounded to the nearest. The first is rounded down and the second up.",
            range_with(low=round, high=round),
        ),
        Mistake(
            "below the first pair",
            "Where no pair makes beta_fast turns, the first number is negative. There is no such pair: 0 is "
            "the least.",
            range_with(bounds=lambda low, high, dim: (low, min(high, dim - 1))),
        ),
        Mistake(
            "beyond the last channel",
            "Where all pairs turn often, the second number is beyond dim - 1, the most that is asked for.",
            range_with(bounds=lambda low, high, dim: (max(low, 0), high)),
        ),
        Mistake(
            "held at the last pair",
            "The second number was held at the last pair, dim / 2 - 1. The definition lets it go to dim - 1, "
            "as the released code does, so that the ramp can end beyond the last pair.",
            range_with(bounds=lambda low, high, dim: (max(low, 0), min(high, dim // 2 - 1))),
        ),
        Mistake(
            "held at the number of pairs",
            "The second number was held at the number of pairs, dim / 2. The definition lets it go to "
            "dim - 1.",
            range_with(bounds=lambda low, high, dim: (max(low, 0), min(high, dim // 2))),
        ),
        Mistake(
            "turns within the new length",
            "These pairs turn so often within the new length, s times the trained one. What the model has "
            "seen is the trained length.",
            of_the_new_length,
        ),
        Mistake(
            "logarithm to the base 10, once",
            "One logarithm is to the base 10 and the other natural. Either will do, but the same for both.",
            range_with(lambda dim, theta, L, n: pair_that_turns(dim, theta, L, n) / math.log(10)),
        ),
        Mistake(
            "not rounded",
            "These are right before rounding. Pairs have whole numbers.",
            range_with(low=float, high=float),
        ),
    ),
    hints=(
        "Pair i makes L f_i / (2 pi) turns. Set this equal to n, take logarithms, and solve for i. Does a "
        "larger n give an earlier or a later pair?",
        'The table under "Which pairs have seen a whole turn" in the notebook counts turns. math.floor and '
        "math.ceil round; the formula is in the docstring.",
        "def i(n): dim * ln(L / (2 pi n)) / (2 ln theta)\n"
        "low = floor of i(beta_fast), at least 0\n"
        "high = ceil of i(beta_slow), at most dim - 1\n"
        "return low, high",
    ),
    checked="DeepSeek-V2's values, a trained length too short for beta_fast, one so long that all pairs turn",
    replaces=("dsv2.rope.yarn_correction_range",),
)


# ---------------------------------------------------------------------------------- 11.3 YaRN's frequencies


def with_ramp(
    join: Callable[[Tensor, Tensor, float], Tensor] = lambda f, r, s: (1 - r) * f + r * f / s,
    ramp: Callable[[Tensor, int, int], Tensor] = lambda i, low, high: (
        (i - low) / max(high - low, 0.001)
    ).clamp(0, 1),
    pairs: Callable[[int], Tensor] = lambda dim: torch.arange(dim // 2, dtype=torch.float32),
) -> Callable[..., Tensor]:
    """An answer to 11.3: join(frequencies, ramp, s)."""

    def answer(dim: int, theta: float, yarn: YarnScaling) -> Tensor:
        low, high = rope.yarn_correction_range(dim, theta, yarn)
        return join(rope.rope_frequencies(dim, theta), ramp(pairs(dim), low, high), yarn.factor)

    return answer


def ramp_over_turns(dim: int, theta: float, yarn: YarnScaling) -> Tensor:
    frequencies = rope.rope_frequencies(dim, theta)
    turns = yarn.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - yarn.beta_slow) / (yarn.beta_fast - yarn.beta_slow)).clamp(0, 1)
    return frequencies * kept + frequencies / yarn.factor * (1 - kept)


YARN_FREQUENCIES = Exercise(
    number="11.3",
    name="yarn_frequencies",
    title="YaRN's frequencies",
    difficulty=2,
    minutes=10,
    answer=rope.yarn_frequencies,
    cases=(
        Case(
            "16 channels, theta 10000, trained on 64, factor 10",
            lambda: {"dim": 16, "theta": 1e4, "yarn": YarnScaling(10.0, 64)},
        ),
        Case(
            "40 channels, theta 500, trained on 2000, factor 6, beta 20 and 2",
            lambda: {"dim": 40, "theta": 500.0, "yarn": YarnScaling(6.0, 2000, 20.0, 2.0)},
        ),
        Case(
            "DeepSeek-V2: 64 channels, theta 10000, trained on 4096, factor 40",
            lambda: {"dim": 64, "theta": 1e4, "yarn": YarnScaling(40.0, 4096)},
        ),
        Case(
            "20 channels, theta 10000, trained on 5, factor 3: low and high are both 0",
            lambda: {"dim": 20, "theta": 1e4, "yarn": YarnScaling(3.0, 5)},
        ),
    ),
    mistakes=(
        Mistake(
            "ramp the wrong way round",
            "Fast pairs were slowed down and slow ones kept. Fast pairs have been through all their angles; "
            "it is the slow ones that would meet new ones.",
            with_ramp(lambda f, r, s: r * f + (1 - r) * f / s),
        ),
        Mistake(
            "all interpolated",
            "This is position interpolation: all pairs were slowed down. The ramp decides which, and how "
            "much.",
            with_ramp(lambda f, r, s: f / s),
        ),
        Mistake(
            "nothing changed",
            "These are the frequencies of plain RoPE.",
            with_ramp(lambda f, r, s: f),
        ),
        Mistake(
            "ramp not held",
            "The ramp goes on below 0 and above 1: fast pairs turn faster than before, and the slowest "
            "backwards. It has to be held within 0 and 1.",
            with_ramp(ramp=lambda i, low, high: (i - low) / max(high - low, 0.001)),
        ),
        Mistake(
            "wavelengths joined",
            "In between, the wavelengths were joined and not the frequencies. The ends are the same; on the "
            "ramp pairs turn more slowly than they should.",
            with_ramp(lambda f, r, s: f / ((1 - r) + r * s)),
        ),
        Mistake(
            "powers of the factor",
            "On the ramp the frequencies were divided by s to the power of r. They are to be joined in a "
            "straight line.",
            with_ramp(lambda f, r, s: f / s**r),
        ),
        Mistake(
            "slow pairs stand still",
            "The interpolated part is missing: what the ramp takes away is not replaced, so slow pairs do "
            "not turn at all.",
            with_ramp(lambda f, r, s: (1 - r) * f),
        ),
        Mistake(
            "slow pairs faster",
            "Slow pairs were multiplied by the factor. They are to be divided.",
            with_ramp(lambda f, r, s: (1 - r) * f + r * f * s),
        ),
        Mistake(
            "a step at the first",
            "Pairs beyond `low` are all slowed down in full: a step where there should be a ramp.",
            with_ramp(ramp=lambda i, low, high: (i > low).float()),
        ),
        Mistake(
            "a step at the last",
            "Pairs before `high` all keep their speed: a step where there should be a ramp.",
            with_ramp(ramp=lambda i, low, high: (i >= high).float()),
        ),
        Mistake(
            "channels instead of pairs",
            "The ramp runs over channels, 0, 2, 4, ..., so it is twice as steep. low and high are numbers of "
            "pairs.",
            with_ramp(pairs=lambda dim: torch.arange(0, dim, 2, dtype=torch.float32)),
        ),
        Mistake(
            "ramp over turns",
            "The ramp is a straight line over the number of turns. Here, as in the released code, it is one "
            "over the pairs, from low to high.",
            ramp_over_turns,
        ),
        Mistake(
            "divided by no width",
            "Where low and high are the same pair, this divides by 0. Take 0.001 for their difference there.",
            with_ramp(ramp=lambda i, low, high: ((i - low) / (high - low)).clamp(0, 1)),
        ),
        Mistake(
            "ramp one pair too long",
            "The ramp reaches 1 a pair after `high`.",
            with_ramp(ramp=lambda i, low, high: ((i - low) / (high - low + 1)).clamp(0, 1)),
        ),
        Mistake(
            "ramp from the first pair",
            "The ramp begins at pair 0. It begins at `low`.",
            with_ramp(ramp=lambda i, low, high: (i / high).clamp(0, 1)),
        ),
        Mistake(
            "temperature in the frequencies",
            "The frequencies were multiplied by sqrt(t). The temperature belongs to the scores; angles know "
            "nothing of it.",
            lambda dim, theta, yarn: (
                rope.yarn_frequencies(dim, theta, yarn) * rope.yarn_temperature(yarn.factor, yarn.mscale)
            ),
        ),
    ),
    hints=(
        "What should r be at a pair that keeps its speed, and at one that is slowed down in full? Which of "
        "the two lies at low?",
        'The figure under "Three ways to go on" in the notebook shows what must come out. '
        "rope.yarn_correction_range gives low and high; tensor.clamp(0, 1) holds the ramp.",
        "f = rope.rope_frequencies(dim, theta)\n"
        "low, high = rope.yarn_correction_range(dim, theta, yarn)\n"
        "r = (0, 1, 2, ... pairs - 1) - low, divided by high - low (0.001 if that is 0), held within 0 and "
        "1\nreturn (1 - r) * f + r * f / factor",
    ),
    checked="both ends and the ramp between, with four lengths and factors, two pairs of betas, a ramp of no "
    "width",
    axes=("pair",),
    tolerance=1e-6,
    replaces=("dsv2.rope.yarn_frequencies",),
)


# ------------------------------------------------------------------------------------- 11.4 the temperature


def scale_with(
    root: Callable[[float, float], float] = lambda s, m: 0.1 * m * math.log(s) + 1,
    width: Callable[[int, int], float] = lambda nope, rotary: nope + rotary,
    join: Callable[[float, float], float] = lambda root, width: root**2 / math.sqrt(width),
) -> Callable[..., float]:
    """An answer to 11.4: join(sqrt(t), width)."""

    def answer(nope: int, rotary: int, factor: float, mscale: float) -> float:
        return join(root(factor, mscale), width(nope, rotary))

    return answer


YARN_SOFTMAX_SCALE = Exercise(
    number="11.4",
    name="yarn_softmax_scale",
    title="a sharper softmax",
    difficulty=1,
    minutes=5,
    answer=scale_with(),
    cases=(
        Case(
            "DeepSeek-V2: 128 + 64 channels, factor 40, mscale 0.707",
            lambda: {"nope": 128, "rotary": 64, "factor": 40.0, "mscale": 0.707},
        ),
        Case(
            "16 + 10 channels, factor 10, mscale 1.3",
            lambda: {"nope": 16, "rotary": 10, "factor": 10.0, "mscale": 1.3},
        ),
        Case(
            "12 + 4 channels, factor 1: nothing is stretched",
            lambda: {"nope": 12, "rotary": 4, "factor": 1.0, "mscale": 0.9},
        ),
    ),
    mistakes=(
        Mistake(
            "sqrt(t) once",
            "The score counts sqrt(t) only. Query and key have a root each, so the score has t.",
            scale_with(join=lambda root, width: root / math.sqrt(width)),
        ),
        Mistake(
            "t squared",
            "The score counts t twice over: the root was squared as if it were t.",
            scale_with(join=lambda root, width: root**4 / math.sqrt(width)),
        ),
        Mistake(
            "no temperature",
            "This is the scale without YaRN. Over a longer text more keys compete, and the softmax is to be "
            "sharper.",
            scale_with(join=lambda root, width: 1 / math.sqrt(width)),
        ),
        Mistake(
            "divided by t",
            "The scores were divided by t, which makes the softmax flatter. It is to become sharper.",
            scale_with(join=lambda root, width: root**-2 / math.sqrt(width)),
        ),
        Mistake(
            "logarithm to the base 10",
            "The logarithm is to the base 10. ln is the natural one.",
            scale_with(lambda s, m: 0.1 * m * math.log10(s) + 1),
        ),
        Mistake(
            "logarithm to the base 2",
            "The logarithm is to the base 2. ln is the natural one.",
            scale_with(lambda s, m: 0.1 * m * math.log2(s) + 1),
        ),
        Mistake(
            "mscale left out",
            "This is right for mscale = 1, the constant of YaRN's own paper. DeepSeek-V2's is smaller.",
            scale_with(lambda s, m: 0.1 * math.log(s) + 1),
        ),
        Mistake(
            "0.1 left out",
            "The tenth is missing before the logarithm.",
            scale_with(lambda s, m: m * math.log(s) + 1),
        ),
        Mistake(
            "1 left out",
            "The 1 is missing: with a factor of 1, all scores would be 0.",
            scale_with(lambda s, m: 0.1 * m * math.log(s)),
        ),
        Mistake(
            "1 inside the product",
            "0.1 m multiplies the 1 too. With a factor of 1 the temperature has to be 1.",
            scale_with(lambda s, m: 0.1 * m * (math.log(s) + 1)),
        ),
        Mistake(
            "squared before the 1",
            "Only the logarithm's part was squared, and the 1 added after. t is the square of the whole "
            "root.",
            scale_with(join=lambda root, width: ((root - 1) ** 2 + 1) / math.sqrt(width)),
        ),
        Mistake(
            "width of the content alone",
            "The width is d_h only. The rotary channels are in the score too.",
            scale_with(width=lambda nope, rotary: nope),
        ),
        Mistake(
            "width of the rotary part alone",
            "The width is d_h^R only. The score runs over both parts.",
            scale_with(width=lambda nope, rotary: rotary),
        ),
        Mistake(
            "divided by the width",
            "t was divided by the width and not by its root.",
            scale_with(join=lambda root, width: root**2 / width),
        ),
        Mistake(
            "factor instead of its logarithm",
            "The factor itself was taken, not its logarithm: the temperature would grow as fast as the text.",
            scale_with(lambda s, m: 0.1 * m * s + 1),
        ),
    ),
    hints=(
        "A query is multiplied by sqrt(t) and so is a key. What happens to their product?",
        'The cell under "A sharper softmax" in the notebook computes DeepSeek-V2\'s. math.log is the natural '
        "logarithm.",
        "root = 0.1 * mscale * ln(factor) + 1\nreturn root squared / square root of (nope + rotary)",
    ),
    checked="DeepSeek-V2's 0.114721, another constant, and a factor of 1",
    tolerance=1e-7,
)


# -------------------------------------------------------------------------------- 11.5 a needle at a depth


def planting_case(seed: int, texts: int, tokens: int, depth: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    haystacks = torch.randint(10, 40, (texts, tokens), generator=generator)
    needles = torch.stack((torch.arange(texts), torch.arange(50, 50 + texts)), dim=1)
    return {"haystacks": haystacks, "needles": needles, "depth": depth}


def with_what_was_given(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The texts, and the haystacks after the call, which should be as they were."""
    haystacks = arguments["haystacks"].clone()
    texts = answer(haystacks, arguments["needles"], arguments["depth"])
    return {"the texts": texts, "the haystacks that were given": haystacks}


def planted(
    start: Callable[[int, float], int] = lambda tokens, depth: round(depth * (tokens - 2)),
    write: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> Callable[..., Tensor]:
    """An answer to 11.5: write(texts, needles, start) on a copy."""

    def answer(haystacks: Tensor, needles: Tensor, depth: float) -> Tensor:
        at = start(haystacks.shape[1], depth)
        return (write or overwritten)(haystacks.clone(), needles, min(max(at, 0), haystacks.shape[1] - 2))

    return answer


def overwritten(texts: Tensor, needles: Tensor, start: int) -> Tensor:
    texts[:, start : start + 2] = needles
    return texts


def inserted(texts: Tensor, needles: Tensor, start: int) -> Tensor:
    return torch.cat((texts[:, :start], needles, texts[:, start:]), dim=1)


def key_alone(texts: Tensor, needles: Tensor, start: int) -> Tensor:
    texts[:, start] = needles[:, 0]
    return texts


def in_place(haystacks: Tensor, needles: Tensor, depth: float) -> Tensor:
    return overwritten(haystacks, needles, round(depth * (haystacks.shape[1] - 2)))


def beyond_the_end(haystacks: Tensor, needles: Tensor, depth: float) -> Tensor:
    return overwritten(haystacks.clone(), needles, int(depth * haystacks.shape[1]))


PLANT_NEEDLES = Exercise(
    number="11.5",
    name="plant_needles",
    title="a needle at a depth",
    difficulty=1,
    minutes=8,
    answer=planted(),
    run=with_what_was_given,
    cases=(
        Case("3 texts of 13 tokens, depth 0.3", lambda: planting_case(1, 3, 13, 0.3)),
        Case("2 texts of 20 tokens, depth 0.76", lambda: planting_case(2, 2, 20, 0.76)),
        Case("3 texts of 25 tokens, depth 0.22", lambda: planting_case(5, 3, 25, 0.22)),
        Case("4 texts of 9 tokens, depth 0, the start", lambda: planting_case(3, 4, 9, 0.0)),
        Case("2 texts of 11 tokens, depth 1, the end", lambda: planting_case(4, 2, 11, 1.0)),
    ),
    mistakes=(
        Mistake(
            "depth from the end",
            "The depth was counted from the end of the text. 0 is its start.",
            planted(lambda tokens, depth: round((1 - depth) * (tokens - 2))),
        ),
        Mistake(
            "share of all tokens",
            "The key stands at depth times the number of tokens. The last place possible is two before the "
            "end of the text, and depth is a share of that.",
            planted(lambda tokens, depth: round(depth * tokens)),
        ),
        Mistake(
            "share of all tokens, rounded down",
            "The key stands at depth times the number of tokens, rounded down, and at depth 1 there is no "
            "room for it. The last place possible is two before the end; depth is a share of that, "
            "rounded to the nearest.",
            beyond_the_end,
        ),
        Mistake(
            "share of the last position",
            "The key stands at depth times the last position of the text. The needle has two tokens, so the "
            "last place possible for the key is the one before.",
            planted(lambda tokens, depth: round(depth * (tokens - 1))),
        ),
        Mistake(
            "rounded down",
            "The place was rounded down, not to the nearest.",
            planted(lambda tokens, depth: int(depth * (tokens - 2))),
        ),
        Mistake(
            "rounded up",
            "The place was rounded up, not to the nearest.",
            planted(lambda tokens, depth: math.ceil(depth * (tokens - 2))),
        ),
        Mistake(
            "one token later",
            "The needle stands one token too late.",
            planted(lambda tokens, depth: round(depth * (tokens - 2)) + 1),
        ),
        Mistake(
            "even places only",
            "The needle stands at even positions only, as if the text were cut into twos.",
            planted(lambda tokens, depth: 2 * round(depth * (tokens // 2 - 1))),
        ),
        Mistake(
            "inserted",
            "The needle was inserted, and the texts are two tokens longer. It takes the place of two tokens.",
            planted(write=inserted),
        ),
        Mistake(
            "inserted, the end cut off",
            "The needle was inserted and the text cut to its length: everything behind has moved by two "
            "tokens. The needle takes the place of two tokens, and the others stay.",
            planted(write=lambda texts, needles, start: inserted(texts, needles, start)[:, : texts.shape[1]]),
        ),
        Mistake(
            "word before key",
            "The word stands before its key.",
            planted(write=lambda texts, needles, start: overwritten(texts, needles.flip(1), start)),
        ),
        Mistake(
            "key without its word",
            "The key is there, but not its word.",
            planted(write=key_alone),
        ),
        Mistake(
            "one needle for all",
            "All texts got the first text's needle. Each has its own.",
            planted(write=lambda texts, needles, start: overwritten(texts, needles[:1], start)),
        ),
        Mistake(
            "haystacks changed",
            "The texts are right, but the haystacks that were given have changed with them: the next needle "
            "would be planted beside this one.",
            in_place,
        ),
    ),
    hints=(
        "A text has 6 tokens and the needle 2. At which positions can its key stand, and which of them is "
        "depth 1?",
        'The cell under "A needle in a haystack" in the notebook shows prompts at three depths. '
        "tensor.clone() makes a copy; texts[:, a:b] = needles writes into all texts at once.",
        "start = depth * (tokens - 2), rounded\n"
        "texts = a copy of the haystacks\n"
        "columns start and start + 1 of texts = needles\n"
        "return texts",
    ),
    checked="both ends and between, places rounded to the nearest, the texts' length, haystacks untouched",
    axes={"the texts": ("text", "token"), "the haystacks that were given": ("text", "token")},
)


# ------------------------------------------------------------------------------ 11.6 an evaluation's bug


def short_sighted(reach: int, vocabulary: int) -> Callable[[Tensor], Tensor]:
    """A model that finds the token after the last earlier copy of a token, at most `reach` tokens back.

    Second best is the one it would have found without that limit.
    """

    def ask(prompts: Tensor) -> Tensor:
        texts, tokens = prompts.shape
        logits = torch.zeros(texts, tokens, vocabulary)
        for row, text in enumerate(prompts.tolist()):
            for here, token in enumerate(text):
                before = [p for p in range(here) if text[p] == token]
                best = before and here - before[-1] <= reach
                logits[row, here, text[before[-1] + 1] if best else (token + 7) % vocabulary] += 2
                if before:
                    logits[row, here, text[before[0] + 1]] += 1
        return logits

    return ask


def evaluation_case(
    seed: int, texts: int, tokens: int, reach: int, depths: Sequence[float]
) -> dict[str, Any]:
    case = planting_case(seed, texts, tokens, 0.0)
    # Two words are guesses: what the model says to a key that it does not find, and to the text's last token.
    case["needles"][1, 1] = case["needles"][1, 0] + 7
    case["needles"][2, 1] = case["haystacks"][2, -1] + 7
    return {
        "ask": short_sighted(reach, 64),
        "haystacks": case["haystacks"],
        "needles": case["needles"],
        "depths": depths,
    }


def evaluated(
    *,
    place: Callable[[int, float], int] = lambda tokens, depth: round(depth * (tokens - 2)),
    question: Callable[[Tensor, Tensor], Tensor] = lambda texts, needles: torch.cat(
        (texts, needles[:, :1]), dim=1
    ),
    read: Callable[[Tensor, Tensor], Tensor] = lambda logits, needles: (
        logits[:, -1].argmax(dim=-1) == needles[:, 1]
    ),
    share: Callable[[Tensor], Tensor] = lambda right: right.float().mean(),
    keep: bool = False,
    depth_of: Callable[[Sequence[float], int], float] = lambda depths, number: depths[number],
) -> Callable[..., Tensor]:
    """An answer to 11.6 with one part changed. keep: the needles of earlier depths stay."""

    def answer(ask, haystacks: Tensor, needles: Tensor, depths: Sequence[float]) -> Tensor:
        shares, texts = [], haystacks.clone()
        for number in range(len(depths)):
            if not keep:
                texts = haystacks.clone()
            start = place(texts.shape[1], depth_of(depths, number))
            texts[:, start : start + 2] = needles
            shares.append(share(read(ask(question(texts, needles)), needles)))
        return torch.stack(shares)

    return answer


def asked_over_the_end(texts: Tensor, needles: Tensor) -> Tensor:
    prompts = texts.clone()
    prompts[:, -1] = needles[:, 0]
    return prompts


def one_share(ask, haystacks: Tensor, needles: Tensor, depths: Sequence[float]) -> Tensor:
    return evaluated()(ask, haystacks, needles, depths).mean().expand(len(depths)).clone()


FOUND_BY_DEPTH = Exercise(
    number="11.6",
    name="found_by_depth",
    title="an evaluation",
    difficulty=2,
    minutes=12,
    answer=evaluated(),
    cases=(
        Case(
            "5 texts of 30 tokens, depths 0, 0.3, 0.6 and 1; the model sees 15 tokens back",
            lambda: evaluation_case(1, 5, 30, 15, (0.0, 0.3, 0.6, 1.0)),
        ),
        Case(
            "3 texts of 21 tokens, depths 1, 0.5 and 0.2 in this order; the model sees 12 tokens back",
            lambda: evaluation_case(2, 3, 21, 12, (1.0, 0.5, 0.2)),
        ),
    ),
    mistakes=(
        Mistake(
            "needles of earlier depths stay",
            "In the second case all depths come out like the first one, the easiest. The needle of the depth "
            "before is still in the text: what the model finds is that one.",
            evaluated(keep=True),
        ),
        Mistake(
            "depth from the end",
            "The shares are right in the opposite order of depth: 0 is the start of the text, far from the "
            "question.",
            evaluated(place=lambda tokens, depth: round((1 - depth) * (tokens - 2))),
        ),
        Mistake(
            "one token early",
            "The answer was read one token early, before the model has seen the question.",
            evaluated(read=lambda logits, needles: logits[:, -2].argmax(dim=-1) == needles[:, 1]),
        ),
        Mistake(
            "one of the two best",
            "The word counts as found if it is among the two most likely. Asked for is the most likely one.",
            evaluated(
                read=lambda logits, needles: (logits[:, -1].topk(2).indices == needles[:, 1:]).any(dim=1)
            ),
        ),
        Mistake(
            "answer in the prompt",
            "The prompt ends with the whole needle, and the model is asked what comes after the answer.",
            evaluated(question=lambda texts, needles: torch.cat((texts, needles), dim=1)),
        ),
        Mistake(
            "question over the end of the text",
            "The question took the place of the text's last token. At depth 1 that is the answer.",
            evaluated(question=asked_over_the_end),
        ),
        Mistake(
            "counts",
            "These are counts of texts. Asked for are shares.",
            evaluated(share=lambda right: right.float().sum()),
        ),
        Mistake(
            "one text's question for all",
            "All texts were asked for the first text's key.",
            evaluated(
                question=lambda texts, needles: torch.cat((texts, needles[:1, :1].expand(len(texts), 1)), 1)
            ),
        ),
        Mistake(
            "one depth for all",
            "All shares are those of the first depth.",
            evaluated(depth_of=lambda depths, number: depths[0]),
        ),
        Mistake(
            "mean over the depths",
            "All shares are the same, the mean over the depths. Each depth has its own.",
            one_share,
        ),
    ),
    hints=(
        "Ask at the depths 1, 0.5 and 0 with a model that sees only a few tokens back. What should come out, "
        "and what does? Then look at the text of the third prompt.",
        "Compare with exercise 11.5: what became of the haystack there after a needle was planted?",
        "for each depth:\n"
        "    texts = a fresh copy of the haystacks\n"
        "    the needles into it, the keys behind it\n"
        "    answers = most likely token after the last one\n"
        "    share of answers that are the needles' words",
    ),
    checked="two models that see a few tokens back, depths in both orders, guesses that happen to be right",
    axes=("depth",),
    given="needles of earlier depths stay",
)


EXERCISES = (
    INTERPOLATED_FREQUENCIES,
    YARN_CORRECTION_RANGE,
    YARN_FREQUENCIES,
    YARN_SOFTMAX_SCALE,
    PLANT_NEEDLES,
    FOUND_BY_DEPTH,
)
