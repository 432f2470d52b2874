"""Arithmetic problems with answers: as many as wanted, the same for the same seed.

A problem belongs to training or to validation by the hash of what it asks (48 + 37 asks the same as 37 + 48),
so that no validation problem is ever seen in training, in whatever words, nor as a step of another problem.
Sums and products of two digits are always for training: they are the tables from which the rest is computed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsv2.data.documents import Document

VALIDATION_SHARE = 0.05  # of all problems; how many are printed is decided by the bytes asked for


@dataclass(frozen=True)
class Problem:
    """`question + " " + answer` is the line to learn; `key` is what is asked, in whatever words; `kind` names
    it.

    `steps` are the keys of problems that the answer solves on the way.
    """

    question: str
    answer: str
    key: str
    kind: str
    steps: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The problem as it stands in a document."""
        return f"{self.question} {self.answer}"

    @property
    def split(self) -> str:
        """train or validation; neither ("") where a training problem would solve a validation problem on the
        way.
        """
        if _kept_out(self.key):
            return "validation"
        return "" if any(map(_kept_out, self.steps)) else "train"


def _kept_out(key: str) -> bool:
    a, *sign, b = key.split(" ")
    if sign in (["+"], ["*"]) and len(a) == len(b) == 1:
        return False
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") < VALIDATION_SHARE * 2**32


def _number(rng: random.Random, digits: int) -> int:
    return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def _pair(rng: random.Random, digits: int) -> tuple[int, int]:
    return _number(rng, rng.randint(1, digits)), _number(rng, digits)


def _key(a: int, sign: str, b: int) -> str:
    # The result of a - b tells a + b's like, so that subtraction shares the key of the sum that it undoes.
    if sign == "-":
        a, sign, b = a - b, "+", b
    if sign == "/":
        a, sign, b = a // b, "*", b
    return f"{min(a, b)} {sign} {max(a, b)}"


def _sum(rng: random.Random, level: int) -> Problem:
    a, b = rng.sample(_pair(rng, level + 1), 2)
    return Problem(f"{a} + {b} =", str(a + b), _key(a, "+", b), "addition")


def _difference(rng: random.Random, level: int) -> Problem:
    a, b = sorted(_pair(rng, level + 1), reverse=True)
    return Problem(f"{a} - {b} =", str(a - b), _key(a, "-", b), "subtraction")


def _product(rng: random.Random, level: int) -> Problem:
    a, b = rng.randint(2, (12, 20, 99)[level]), rng.randint(2, (12, 50, 99)[level])
    return Problem(f"{a} * {b} =", str(a * b), _key(a, "*", b), "multiplication")


def _quotient(rng: random.Random, level: int) -> Problem:
    a, b = rng.randint(2, (12, 20, 99)[level]), rng.randint(2, 12)
    return Problem(f"{a * b} / {b} =", str(a), _key(a * b, "/", b), "division")


def _remainder(rng: random.Random, level: int) -> Problem:
    b = rng.randint(3, 12)
    a = rng.randint(b, (50, 150, 999)[level])
    answer = f"{a // b} remainder {a % b}"
    return Problem(f"{a} divided by {b} is", answer, f"{a} divmod {b}", "remainder")


def _expression(rng: random.Random, level: int) -> Problem:
    a, b, c = (rng.randint(1, (9, 20, 50)[level]) for _ in range(3))
    if rng.random() < 0.5:
        middle, result, shown = f"{a + b} * {c}", (a + b) * c, f"({a} + {b}) * {c}"
        steps = (_key(a, "+", b), _key(a + b, "*", c))
    else:
        middle, result, shown = f"{a * b} + {c}", a * b + c, f"{a} * {b} + {c}"
        steps = (_key(a, "*", b), _key(a * b, "+", c))
    answer = f"{middle} = {result}" if rng.random() < 0.5 else str(result)
    return Problem(f"{shown} =", answer, shown, "expression", steps)


def _comparison(rng: random.Random, level: int) -> Problem:
    a, b = _number(rng, level + 1), _number(rng, level + 1)
    if rng.random() < 0.5:
        answer = "equal" if a == b else str(max(a, b))
        return Problem(
            f"Which is larger, {a} or {b}?", answer, f"{min(a, b)} compare {max(a, b)}", "comparison"
        )
    sign = "<" if a < b else ">" if a > b else "="
    return Problem(f"{a} ? {b}:", f"{a} {sign} {b}", f"{min(a, b)} compare {max(a, b)}", "comparison")


def _missing(rng: random.Random, level: int) -> Problem:
    a, b = _number(rng, min(level, 1) + 1), _number(rng, min(level, 1) + 1)
    return Problem(f"{a} + ? = {a + b}, so ? =", str(b), _key(a, "+", b), "missing number")


def _sequence(rng: random.Random, level: int) -> Problem:
    start, step = rng.randint(0, (9, 30, 99)[level]), rng.randint(1, (5, 12, 25)[level])
    shown = ", ".join(str(start + step * place) for place in range(4))
    return Problem(f"{shown}, next:", str(start + step * 4), f"sequence {start} {step}", "sequence")


def _carries(rng: random.Random, level: int) -> Problem:
    a, b = _number(rng, level + 1), _number(rng, level + 1)
    steps, carry, x, y = [], 0, a, b
    while x or y:
        digit_sum = x % 10 + y % 10 + carry
        carried = f" + {carry}" if carry else ""
        kept = f", write {digit_sum % 10} carry {digit_sum // 10}" if digit_sum > 9 else ""
        steps.append(f"{x % 10} + {y % 10}{carried} = {digit_sum}{kept}")
        carry, x, y = digit_sum // 10, x // 10, y // 10
    if carry:
        steps.append(f"write {carry}")
    steps.append(f"answer {a + b}")
    return Problem(f"{a} + {b}, step by step:", "; ".join(steps), _key(a, "+", b), "carries")


_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jonas", "Lena", "Max")
_THINGS = ("apples", "books", "coins", "pencils", "stamps", "marbles", "cards", "eggs", "shells", "tickets")
_BOXES = ("boxes", "bags", "baskets", "trays", "shelves", "rows")


def _story(rng: random.Random, level: int) -> Problem:
    name, friend = rng.sample(_NAMES, 2)
    thing, box = rng.choice(_THINGS), rng.choice(_BOXES)
    top = (9, 30, 99)[level]
    a, b = rng.randint(2, top), rng.randint(2, top)
    kind = rng.randrange(5)
    if kind == 0:
        text = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?"
        return Problem(text, f"{a} + {b} = {a + b}", _key(a, "+", b), "story")
    if kind == 1:
        a, b = max(a, b), min(a, b)
        text = f"{name} has {a} {thing} and gives {b} to {friend}. How many {thing} are left?"
        return Problem(text, f"{a} - {b} = {a - b}", _key(a, "-", b), "story")
    if kind == 2:
        b = min(b, 12)
        text = f"There are {b} {box} with {a} {thing} in each. How many {thing} are there in all?"
        return Problem(text, f"{b} * {a} = {a * b}", _key(a, "*", b), "story")
    if kind == 3:
        b = min(b, 12)
        text = f"{name} shares {a * b} {thing} equally among {b} friends. How many does each friend get?"
        return Problem(text, f"{a * b} / {b} = {a}", _key(a * b, "/", b), "story")
    text = f"{name} has {a} {thing}. {friend} has {b} more than {name}. How many do they have together?"
    answer = f"{a} + {b} = {a + b}, {a} + {a + b} = {2 * a + b}"
    steps = (_key(a, "+", b), _key(a, "+", a + b))
    return Problem(text, answer, f"{a} twice and {b}", "story", steps)


_KINDS: tuple[tuple[Callable[[random.Random, int], Problem], int], ...] = (
    (_sum, 5),
    (_difference, 4),
    (_product, 4),
    (_quotient, 2),
    (_remainder, 1),
    (_expression, 3),
    (_comparison, 1),
    (_missing, 1),
    (_sequence, 1),
    (_carries, 3),
    (_story, 3),
)
KINDS = (
    "addition",
    "subtraction",
    "multiplication",
    "division",
    "remainder",
    "expression",
    "comparison",
    "missing number",
    "sequence",
    "carries",
    "story",
)


def arithmetic_problems(
    seed: int = 0, split: str = "train", kinds: tuple[str, ...] | None = None, level: int | None = None
) -> Iterator[Problem]:
    """An endless stream of problems of one split, of all or some kinds, of level 0 (easy) to 2 or of all
    levels. Raises ValueError where there is none: the tables of one digit are all for training.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"split must be train or validation, got {split!r}")
    if level not in (None, 0, 1, 2):
        raise ValueError(f"level must be 0, 1, 2 or None for all, got {level!r}")
    unknown = set(kinds or ()) - set(KINDS)
    if unknown or (kinds is not None and not kinds):
        raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {kinds!r}")
    chosen = [entry for entry, name in zip(_KINDS, KINDS) if kinds is None or name in kinds]
    makers, weights = zip(*chosen)
    rng = random.Random(f"{seed} {split}")
    misses = 0
    while True:
        maker = rng.choices(makers, weights)[0]
        problem = maker(rng, rng.choices((0, 1, 2), (4, 4, 2))[0] if level is None else level)
        if problem.split == split:
            misses = 0
            yield problem
        else:
            misses += 1
            if misses > 10_000:  # the tables of one digit are all for training
                raise ValueError(f"there is no {split} problem among kinds={kinds} at level={level}")


def arithmetic_documents(max_bytes: int, seed: int = 0, validation_fraction: float = 0.02) -> list[Document]:
    """Sheets of ten to forty problems, `max_bytes` in all, with the split fixed; each sheet holds one kind or
    a mix.
    """
    documents = []
    for split, size in (
        ("train", max_bytes - int(max_bytes * validation_fraction)),
        ("validation", int(max_bytes * validation_fraction)),
    ):
        rng = random.Random(f"sheets {seed} {split}")
        mixed = arithmetic_problems(seed, split)
        by_kind = {kind: arithmetic_problems(seed, split, (kind,)) for kind in KINDS}
        written = number = 0
        while written < size:
            kind = rng.choice(KINDS) if rng.random() < 0.3 else None
            source = by_kind[kind] if kind else mixed
            lines = [next(source).text for _ in range(rng.randint(10, 40))]
            text = "\n".join(lines) + "\n"
            documents.append(Document("arithmetic", f"{split} sheet {number}", text, split=split))
            written += len(text)
            number += 1
    return documents
