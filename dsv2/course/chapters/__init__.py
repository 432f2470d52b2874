"""The chapters' exercises: one module `cNN_title.py` each, which holds `EXERCISES`, a tuple of `Exercise`."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from dsv2.course.spec import Exercise

HERE = Path(__file__).resolve().parent
NUMBER = re.compile(r"(?:ex)?0*(\d{1,2})(?:\.(\d{1,2}))?")


class Unknown(LookupError):
    """There is no such chapter or exercise; the message says which there are."""


def find(folder: Path = HERE) -> dict[str, Path]:
    """The chapters' modules by number, in order: `{"01": .../c01_kv_cache.py}`."""
    return {path.stem[1:3]: path for path in sorted(folder.glob("c[0-9][0-9]_*.py"))}


def load(path: Path) -> tuple[Exercise, ...]:
    """A chapter's exercises, from its module."""
    if path.parent == HERE:
        return tuple(importlib.import_module(f"{__name__}.{path.stem}").EXERCISES)
    spec = importlib.util.spec_from_file_location(f"chapter_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return tuple(module.EXERCISES)


def resolve(numbers: Iterable[str], folder: Path = HERE) -> list[Exercise]:
    """The exercises meant by "02" (all of a chapter) or "02.3" ("2.3" will do), each once, in that order.

    Loads only the chapters that are named. Raises Unknown, saying what there is.
    """
    chapters, wanted = find(folder), {}
    for asked in numbers:
        match = NUMBER.fullmatch(asked.strip())
        if not match:
            raise Unknown(f"{asked!r} is not a number of an exercise: write 02.3, or 02 for a whole chapter")
        chapter = f"{int(match[1]):02}"
        if chapter not in chapters:
            there = ", ".join(chapters) or "none yet"
            raise Unknown(f"there are no exercises of chapter {chapter}; there are those of {there}")
        exercises = {exercise.number: exercise for exercise in load(chapters[chapter])}
        if match[2] is None:
            wanted.update(exercises)
            continue
        number = f"{chapter}.{int(match[2])}"
        if number not in exercises:
            raise Unknown(f"there is no exercise {number}; chapter {chapter} has {', '.join(exercises)}")
        wanted[number] = exercises[number]
    return list(wanted.values())
