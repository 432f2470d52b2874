"""How the cached tokens of a batch are shared out over a GPU's multiprocessors.

A sequence is cut into tiles of neighbouring tokens, and the tiles of all sequences stand in one list. Every
program takes the same number of tiles from that list, whichever sequences they belong to: lengths may differ
and no program waits for another. A sequence that falls to several programs leaves several partial results,
which are merged afterwards. The kernels compute their share on the device, where the lengths are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsv2.kernels.backend import jit, tl

LOG2_E = math.log2(math.e)  # the kernels take powers of 2, which the hardware has
WORTH_SPLITTING = 0.9  # the share of the multiprocessors that must be busy before sequences are left whole


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `stop` of one sequence, read by one program."""

    program: int
    sequence: int
    start: int
    stop: int


def pieces(lengths: Sequence[int], tile: int, parts: int) -> list[Piece]:
    """What each of `parts` programs reads of sequences of these lengths, in tiles of `tile` tokens.

    Program p takes the tiles p * n to (p + 1) * n - 1 of the joint list, n = ceil(all tiles / parts). A
    sequence of length 0 has no tile. Raises ValueError for a negative length, or no tile or part.

    >>> pieces([100, 0, 40], tile=32, parts=2)[1]
    Piece(program=1, sequence=0, start=96, stop=100)
    """
    if tile < 1 or parts < 1 or any(length < 0 for length in lengths):
        raise ValueError(
            f"tile={tile} and parts={parts} must be at least 1, and lengths 0 or more; got {list(lengths)}"
        )
    per_program = ceil_div(sum(ceil_div(length, tile) for length in lengths), parts)
    found, first = [], 0
    for sequence, length in enumerate(lengths):
        last = first + ceil_div(length, tile)  # one past the sequence's last tile in the joint list
        here = first
        while here < last:
            program = here // per_program
            stop = min((program + 1) * per_program, last)
            found.append(Piece(program, sequence, (here - first) * tile, min((stop - first) * tile, length)))
            here = stop
        first = last
    return found


def choose_parts(batch: int, longest: int, head_blocks: int, multiprocessors: int) -> int:
    """Into how many parts the cached tokens are split, from the shape alone: the lengths are on the device.

    longest: into how many parts it makes sense to cut one sequence that fills the cache. Each part is read by
    `head_blocks` programs, one for each block of heads. All of them run at once, so that none waits for a
    second round. Where whole sequences, or equal shares of a sequence, keep nine tenths of the
    multiprocessors busy, the parts are those: sequences of equal length then leave fewer partial results.

    >>> choose_parts(batch=128, longest=32, head_blocks=2, multiprocessors=132)
    64
    >>> choose_parts(batch=1, longest=32, head_blocks=2, multiprocessors=132)
    32
    """
    places = max(multiprocessors // head_blocks, 1)
    if batch >= places:
        even = ceil_div(batch, ceil_div(batch, places))  # whole sequences, the same number each
        busy = batch / (ceil_div(batch, places) * places)
    else:
        even = batch * (places // batch)  # equal shares of one sequence each
        busy = even / places
    parts = even if busy >= WORTH_SPLITTING else places
    return min(parts, batch * max(longest, 1))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def room_for(batch: int) -> int:
    """Numbers in the kernels' list of lengths: a power of two, one of few, as each is compiled for itself.

    A single sequence needs no list: its kernels wait for no sum over lengths.
    """
    return 1 if batch == 1 else max(64, 1 << (batch - 1).bit_length())


@jit
def tiles_of_sequences(lengths, batch, SEQUENCES: tl.constexpr, TILE: tl.constexpr):
    """The numbers of the sequences, and how many tiles each has."""
    sequences = tl.arange(0, SEQUENCES)
    return sequences, tl.cdiv(tl.load(lengths + sequences, mask=sequences < batch, other=0), TILE)
