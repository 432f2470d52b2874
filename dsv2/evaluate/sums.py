"""Can it add? Sums of two-digit numbers that were kept out of training."""

from __future__ import annotations

from dataclasses import dataclass

from dsv2.data.arithmetic import Problem, arithmetic_problems
from dsv2.generate import generate
from dsv2.model import DeepSeekV2

ANSWER_TOKENS = 8  # room for three digits and a line's end


@dataclass(frozen=True)
class SumsResult:
    """What was asked, what was answered, and how many are right."""

    problems: tuple[Problem, ...]
    answers: tuple[str, ...]

    @property
    def right(self) -> int:
        return sum(answer == problem.answer for answer, problem in zip(self.answers, self.problems))

    @property
    def asked(self) -> int:
        return len(self.problems)

    def to_dict(self) -> dict:
        """Plain JSON types; wrong: question, answer and what would have been right."""
        pairs = list(zip(self.problems, self.answers))
        wrong = [[p.question, a, p.answer] for p, a in pairs if a != p.answer]
        return {"right": self.right, "asked": self.asked, "wrong": wrong}


def held_out_sums(count: int, seed: int = 0) -> list[Problem]:
    """So many different sums of numbers below 100, one of them at least 10, that no training text solves.

    Whether a sum is kept out is decided by its hash, so that this holds on every machine. Raises ValueError
    if there are fewer.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    there = _all_held_out()
    if count > there:
        raise ValueError(f"count={count} is more than the {there} sums that were kept out of training")
    found: dict[str, Problem] = {}
    problems = arithmetic_problems(seed=seed, split="validation", kinds=("addition",), level=1)
    while len(found) < count:
        problem = next(problems)
        found.setdefault(problem.key, problem)
    return list(found.values())


def answer_sums(model: DeepSeekV2, problems: list[Problem]) -> SumsResult:
    """The likeliest answer to every problem, read up to the line's end."""
    questions = [problem.question for problem in problems]
    texts = generate(model, questions, ANSWER_TOKENS, temperature=0, stop="\n")
    return SumsResult(tuple(problems), tuple(text.strip() for text in texts))


def _all_held_out() -> int:
    """How many sums of this kind there are in all, by trying every pair."""
    pairs = ((a, b) for b in range(10, 100) for a in range(b + 1))
    return sum(Problem("", "", f"{a} + {b}", "addition").split == "validation" for a, b in pairs)
