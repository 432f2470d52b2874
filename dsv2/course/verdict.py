"""What a check found out, as the checking process sends it and as it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Lines = list[tuple[str, str]]  # what is said, as (label, text): ("expected", "shape (2, 5)")


@dataclass
class Verdict:
    """What a check found. status: "passed", "failed", "not started", "raised", "missing", "hung",
    "died" or "not here" (what it needs is not on this computer).

    case: the first one that did not pass, in words. found: what differs there. diagnosis: what is known about
    an answer with these results, that of the mistake named `mistake`. given: the mistake a bug hunt begins
    with. line, code: where in the learner's file. source: stands for the code that was judged; untouched: it
    is still as the course gave it. printed: the last lines that it printed.
    """

    number: str
    name: str
    title: str
    status: str
    cases: int
    case: str = ""
    found: Lines = field(default_factory=list)
    diagnosis: str = ""
    mistake: str = ""
    given: str = ""
    checked: str = ""
    file: str = ""
    line: int = 0
    code: str = ""
    source: str = ""
    untouched: bool = False
    printed: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Verdict:
        verdict = cls(**values)
        verdict.found = [(label, text) for label, text in verdict.found]
        return verdict
