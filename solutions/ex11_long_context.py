"""Chapter 11: longer contexts by slower rotations, and looking for needles in them.

Six exercises: position interpolation, the pairs between which YaRN's ramp runs, YaRN's frequencies, the
scale of the scores, a needle at a depth, and an evaluation with a bug in it.

    python3 course.py check 11        all of this chapter
    python3 course.py check 11.1      one exercise
    python3 course.py hint 11.1       a hint; again, for a plainer one

`rope` below is the package's own module: an exercise may call rope.rope_frequencies and, for the frequencies,
rope.yarn_correction_range, so that no exercise waits for another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv2 import rope
from dsv2.config import YarnScaling


# exercise 11.1
def interpolated_frequencies(dim: int, theta: float, factor: float) -> Float[Tensor, " pairs"]:
    """Frequencies with which position p of a long text has the angles that p / factor had before.

        p * g_i = (p / s) * f_i,    f_i = theta^(-2i / dim)        (position interpolation, arXiv 2306.15595)

    factor is s, how many times longer the text may become. All pairs are changed alike. float32, fastest
    first.

    Two pairs, 1 and 0.1 radians a position, for texts 4 times as long:

    >>> interpolated_frequencies(4, theta=100.0, factor=4.0)
    tensor([0.2500, 0.0250])
    """
    # <solution>
    # Positions are divided by s, or the frequencies are: the angle is their product.
    return rope.rope_frequencies(dim, theta) / factor
    # </solution>


# exercise 11.2
def yarn_correction_range(dim: int, theta: float, yarn: YarnScaling) -> tuple[int, int]:
    """The pairs between which YaRN goes over from "as it was" to "fully interpolated".

    Pair i makes L theta^(-2i / dim) / (2 pi) turns within the trained length L. Solved for i, the pair with n
    turns is

        i(n) = dim * ln(L / (2 pi n)) / (2 ln theta)        (for YaRN, arXiv 2309.00071, section 3.2)

    Returned are i(yarn.beta_fast) rounded down, but at least 0, and i(yarn.beta_slow) rounded up, but at most
    dim - 1, as whole numbers. L is yarn.original_max_position_embeddings.

    DeepSeek-V2: i(32) = 10.47 and i(1) = 22.51 of 32 pairs.

    >>> yarn_correction_range(64, 10000.0, YarnScaling(40.0, 4096))
    (10, 23)
    """

    # <solution>
    def pair_that_turns(times: float) -> float:
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    # Many turns: an early, fast pair. Outwards on both sides, so that both limits lie within the ramp.
    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    return low, high
    # </solution>


# exercise 11.3
def yarn_frequencies(dim: int, theta: float, yarn: YarnScaling) -> Float[Tensor, " pairs"]:
    """YaRN's frequencies: fast pairs as they were, slow ones divided by s, a ramp in between.

        g_i = (1 - r_i) f_i + r_i f_i / s,    r_i = (i - low) / (high - low), held within 0 and 1

    low and high from rope.yarn_correction_range(dim, theta, yarn); s is yarn.factor. Where both are the same
    pair, take 0.001 for their difference. float32, fastest first. (YaRN, section 3.2; DeepSeek-V2, 3.1.4.)

    Six pairs with low = 0 and high = 2: r is 0, 1/2, 1, 1, 1, 1. The frequencies before are 1, 0.2154,
    0.04642, 0.01, 0.002154 and 0.0004642.

    >>> yarn_frequencies(12, 10000.0, YarnScaling(10.0, 64))
    tensor([1.0000e+00, 1.1849e-01, 4.6416e-03, 1.0000e-03, 2.1544e-04, 4.6416e-05])
    """
    # <solution>
    frequencies = rope.rope_frequencies(dim, theta)
    low, high = rope.yarn_correction_range(dim, theta, yarn)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    ramp = ramp.clamp(0, 1)  # 0 at pairs that keep their speed, 1 at those that are slowed down in full
    return (1 - ramp) * frequencies + ramp * frequencies / yarn.factor
    # </solution>


# exercise 11.4
def yarn_softmax_scale(nope: int, rotary: int, factor: float, mscale: float) -> float:
    """What DeepSeek-V2's scores are multiplied by before the softmax, once YaRN has stretched the context.

        sqrt(t) = 0.1 m ln s + 1        (DeepSeek-V2, section 3.1.4, where 0.1 m = 0.0707)

    Queries and keys count sqrt(t) each, both parts of them, so the whole score counts t, besides the
    1/sqrt(width) of chapter 03. nope, rotary: channels of a head without and with position, d_h and d_h^R;
    factor is s, mscale m.

    DeepSeek-V2: sqrt(t) = 1.2608, t = 1.5896, and 1.5896 / sqrt(192):

    >>> round(yarn_softmax_scale(nope=128, rotary=64, factor=40.0, mscale=0.707), 6)
    0.114721
    """
    # <solution>
    root_t = 0.1 * mscale * math.log(factor) + 1  # the natural logarithm
    return root_t**2 / math.sqrt(nope + rotary)  # one root from the query, one from the key
    # </solution>


# exercise 11.5
def plant_needles(
    haystacks: Int[Tensor, "texts tokens"], needles: Int[Tensor, "texts 2"], depth: float
) -> Int[Tensor, "texts tokens"]:
    """Texts with a needle each, a key and its word, in the place of two tokens of the haystack.

    depth: 0 puts the needle at the very start of the text, 1 at its very end; in between the key's position
    is depth times the last one that is possible, rounded to the nearest whole number. Texts stay as long as
    they are, and the haystacks that were given stay as they are.

    In 6 tokens the key can stand at 0 to 4; at depth 0.5 it stands at 2.

    >>> plant_needles(torch.zeros(1, 6, dtype=torch.long), torch.tensor([[7, 9]]), depth=0.5)
    tensor([[0, 0, 7, 9, 0, 0]])
    """
    # <solution>
    start = round(depth * (haystacks.shape[1] - 2))  # the last place from which two tokens fit
    texts = haystacks.clone()
    texts[:, start : start + 2] = needles
    return texts
    # </solution>


# exercise 11.6
def found_by_depth(
    ask: Callable[[Tensor], Tensor],
    haystacks: Int[Tensor, "texts tokens"],
    needles: Int[Tensor, "texts 2"],
    depths: Sequence[float],
) -> Float[Tensor, " depths"]:
    """The share of needles that a model finds, by depth.

    ask: the model; prompts (texts, tokens) -> logits (texts, tokens, vocabulary). A needle is a key and its
    word. A prompt is a haystack with the needle in it, and then the key once more; the needle is found if
    the word is the model's most likely next token after that. depths as in exercise 11.5, in any order.

    This code runs, and what it returns looks like shares. One of its lines is wrong: find it.
    """
    # <solution>
    shares = []
    for depth in depths:
        texts = haystacks.clone()  # or the needles of earlier depths would still be in it
        start = round(depth * (texts.shape[1] - 2))
        texts[:, start : start + 2] = needles
        prompts = torch.cat((texts, needles[:, :1]), dim=1)
        answers = ask(prompts)[:, -1].argmax(dim=-1)
        shares.append((answers == needles[:, 1]).float().mean())
    return torch.stack(shares)
    # <given>
    #| shares = []
    #| texts = haystacks.clone()
    #| for depth in depths:
    #|     start = round(depth * (texts.shape[1] - 2))
    #|     texts[:, start : start + 2] = needles
    #|     prompts = torch.cat((texts, needles[:, :1]), dim=1)
    #|     answers = ask(prompts)[:, -1].argmax(dim=-1)
    #|     shares.append((answers == needles[:, 1]).float().mean())
    #| return torch.stack(shares)
    # </given>
    # </solution>
