"""What an exercise is: the cases it is checked on, the right answer, plausible wrong ones, and three hints.

A chapter's exercises stand in `dsv2/course/chapters/cNN_title.py` as `EXERCISES`; their text and worked
solution in `solutions/exNN_title.py`, from which the learner's `exercises/exNN_title.py` is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def call(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """How most exercises are run: the function on the case's arguments."""
    return answer(**arguments)


@dataclass(frozen=True)
class Case:
    """One input. says: it in words, "2 sequences of 5 tokens, 4 heads"; arguments: makes them, always alike.

    Dimensions should all differ, so that a transposed or misread axis cannot pass.
    """

    says: str
    arguments: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Mistake:
    """A plausible wrong answer. says: what went wrong, in words for whoever made it, without the remedy.

    answer: the wrong code, with the exercise's signature. Its result must differ from the right one in some
    case, and from every other mistake's.
    """

    name: str
    says: str
    answer: Callable[..., Any]


@dataclass(frozen=True)
class Exercise:
    """One exercise: number "01.2", and the function or class called `name` in the learner's file.

    title, difficulty (1 to 3), minutes: for the stub and the board. answer: the right one, from the package
    where it has it. run: how an answer is put to work on a case's arguments; the result may be a tensor, a
    number, a string, or a tuple, list or dict of them. axes: names of the result's dimensions, or of each
    tensor's in a tuple or dict; () where it has none. checked: what a pass has shown, in words. tolerance:
    absolute and relative, of float32 sums in another order. replaces: what of the package the learner's
    function stands in for when the course runs on their code, as "dsv2.attention.mla.absorb_query". given: in
    a bug hunt, the name of the mistake that the stub contains. needs_triton: where Triton is not installed,
    the exercise cannot be checked, which the check then says.
    """

    number: str
    name: str
    title: str
    difficulty: int
    minutes: int
    answer: Callable[..., Any]
    cases: tuple[Case, ...]
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, str, str]
    checked: str
    axes: tuple[Any, ...] | dict[str, Any] = ()
    tolerance: float = 1e-5
    run: Callable[[Callable[..., Any], Mapping[str, Any]], Any] = call
    replaces: tuple[str, ...] = ()
    given: str | None = None
    needs_triton: bool = False

    @property
    def chapter(self) -> str:
        return self.number.partition(".")[0]
