"""Needles in haystacks: texts of random words, a few of them marked by a key, and a question for one.

The alphabet has keys and words. A haystack is a row of random words with pairs in it, a key and the word
right after it: the needle, and distractors with other keys. The prompt ends with the needle's key; the answer
is the word that stood after it. Any word can be an answer, so only its place says that it is one.

    w7 w0 w3 k2 w9 w4 k5 w1 w8 w8 w2 k2   ->   w9        needle: k2 w9; distractor: k5 w1
"""

# B texts   T tokens   N slots of two tokens, in which a pair fits

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

IGNORED = -100  # a target that cross_entropy takes no notice of


@dataclass(frozen=True)
class NeedleTask:
    """The alphabet: ids 0 to n_keys - 1 are keys, the n_words after them words."""

    n_keys: int = 16
    n_words: int = 32

    @property
    def vocab_size(self) -> int:
        return self.n_keys + self.n_words

    def spell(self, tokens: Int[Tensor, " tokens"]) -> str:
        """Tokens for reading: k2 is a key, w9 a word."""
        return " ".join(f"k{t}" if t < self.n_keys else f"w{t - self.n_keys}" for t in tokens.tolist())


TASK = NeedleTask()


def slots_of(length: int) -> int:
    """How many pairs have room in a prompt of `length` tokens, the last of which is the question."""
    return (length - 1) // 2


def needle_slot(length: int, depth: float) -> int:
    """The slot of a needle at `depth`: 0 is the start of the haystack, 1 right before the question."""
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must lie between 0, the start, and 1, right before the question")
    return round(depth * (slots_of(length) - 1))


def needle_prompts(
    count: int,
    length: int,
    depth: float,
    *,
    task: NeedleTask = TASK,
    distractors: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "count length"], Int[Tensor, " count"]]:
    """Prompts with a needle at one depth, and their answers. The last token of a prompt is the needle's key.

    length: tokens of a prompt, question included. distractors: pairs with other keys, at random places.
    Raises ValueError if they do not fit, in slots or in keys.
    """
    slots = slots_of(length)
    if not 0 <= distractors < min(task.n_keys, slots):
        raise ValueError(
            f"distractors={distractors} must be from 0 to {min(task.n_keys, slots) - 1}: there are "
            f"{task.n_keys} keys, and {max(slots, 0)} slots in a prompt of {length} tokens"
        )
    tokens = _words((count, length), task, generator)
    first = (length - 1) % 2  # the token before the first slot, if any, is a word
    order = torch.rand(count, slots, generator=generator)
    order[:, needle_slot(length, depth)] = 2.0  # first of all
    places = first + 2 * order.topk(distractors + 1).indices
    keys = _different_keys(count, distractors + 1, task, generator)
    tokens.scatter_(1, places, keys)
    tokens[:, -1] = keys[:, 0]
    return tokens, tokens.gather(1, places[:, :1] + 1)[:, 0]


def needle_batch(
    count: int,
    length: int,
    *,
    task: NeedleTask = TASK,
    questions: int = 4,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "count length"], Int[Tensor, "count length"]]:
    """Texts to learn from, and targets: at a key that has stood before, the word that it had; else IGNORED.

    The last `questions` slots (a quarter of them at most) ask for keys that stand once before, anywhere. Of
    the rest, a share between a fifth and all holds keys that come again and again, always with the same
    word.
    """
    slots = length // 2
    asked = min(questions, slots // 4)
    if asked < 1 or asked + 2 > task.n_keys:
        raise ValueError(
            f"length={length} and questions={questions} leave no room: at least 8 tokens, at least one "
            f"question, and two of the {task.n_keys} keys besides those asked for"
        )
    tokens = _words((count, length), task, generator)
    keys = _different_keys(count, task.n_keys, task, generator)
    answers = _words((count, task.n_keys), task, generator)  # the word of every key, by text

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    # Which of `keys` stands in each slot: first ones that come again, then the ones asked for over them.
    most = min(8, task.n_keys - asked)
    again = 2 + (uniform(count, 1) * (most - 1)).long()
    which = asked + (uniform(count, slots) * again).long()
    filled = uniform(count, slots) < 0.2 + 0.8 * uniform(count, 1)
    planted = uniform(count, slots - asked).topk(asked).indices
    asking = torch.arange(slots - asked, slots).expand(count, -1)
    for places in (planted, asking):
        which.scatter_(1, places, torch.arange(asked).expand(count, -1))
        filled.scatter_(1, places, True)
    keys, words = (row.gather(1, which) for row in (keys, answers))

    starts = 2 * torch.arange(slots) + (torch.rand(count, 1, generator=generator) < 0.5) * (length % 2)
    tokens.scatter_(1, starts, torch.where(filled, keys, tokens.gather(1, starts)))
    tokens.scatter_(1, starts + 1, torch.where(filled, words, tokens.gather(1, starts + 1)))
    same = (keys[:, :, None] == keys[:, None, :]) & filled[:, None, :]  # (B, N, N): slot, and an earlier one
    known = filled & same.tril(-1).any(dim=-1)
    targets = torch.full_like(tokens, IGNORED)
    return tokens, targets.scatter_(1, starts, torch.where(known, words, IGNORED))


def _words(shape: tuple[int, int], task: NeedleTask, generator: torch.Generator | None) -> Int[Tensor, "..."]:
    return torch.randint(task.n_keys, task.vocab_size, shape, generator=generator)


def _different_keys(
    count: int, keys: int, task: NeedleTask, generator: torch.Generator | None
) -> Int[Tensor, "count keys"]:
    return torch.rand(count, task.n_keys, generator=generator).topk(keys).indices
