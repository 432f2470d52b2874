"""What a learner has done: kept in exercises/.progress.json, which is theirs and not part of the course."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dsv2.course import chapters, stubs
from dsv2.course.folders import HERE, Folders
from dsv2.course.spec import Exercise
from dsv2.course.verdict import Verdict

DONE, CHANGED, TRIED, UNTRIED = "done", "changed since", "tried", "not started"


@dataclass
class Entry:
    """What is remembered of one exercise. passed: stands for the code that passed; "" if none has.

    hints: the highest level seen; tries: checks that did not pass, up to the first that did.
    """

    passed: str = ""
    tries: int = 0
    hints: int = 0
    solution_seen: bool = False


def load(path: Path) -> dict[str, Entry]:
    """The entries by exercise number; what is damaged counts as not there."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["exercises"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    types = {field.name: type(field.default) for field in fields(Entry)}
    entries = {}
    for number, values in kept:
        if isinstance(values, dict):
            entries[number] = Entry(
                **{name: values[name] for name, wanted in types.items() if type(values.get(name)) is wanted}
            )
    return entries


def save(path: Path, entries: dict[str, Entry]) -> None:
    """Write the entries in one step. A file that cannot be read is put aside first, not overwritten."""
    if path.is_file() and not load(path) and _unreadable(path):
        path.replace(path.with_name(path.name + ".damaged"))
    content = json.dumps({"exercises": {n: asdict(entry) for n, entry in sorted(entries.items())}}, indent=1)
    for attempt in range(5):
        try:
            return stubs.replace(path, content.encode())
        except PermissionError:  # on Windows, while another process reads it
            if attempt == 4:
                raise
            time.sleep(0.05)


def _unreadable(path: Path) -> bool:
    try:
        return not isinstance(json.loads(path.read_text(encoding="utf-8"))["exercises"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True


def note(verdict: Verdict, folders: Folders = HERE) -> Entry:
    """Remember a verdict; the entry as it is now. An exercise that is not begun leaves no trace."""
    entries = load(folders.progress)
    entry = entries.setdefault(verdict.number, Entry())
    if verdict.status in ("not started", "missing", "not here") or verdict.untouched:
        return entry
    if verdict.status == "passed":
        entry.passed = verdict.source
    elif not entry.passed:
        entry.tries += 1
    save(folders.progress, entries)
    return entry


def note_hint(number: str, level: int | None, folders: Folders = HERE) -> int:
    """Remember that a hint is shown; its level: the one asked for, or the next not seen (at most 3)."""
    entries = load(folders.progress)
    entry = entries.setdefault(number, Entry())
    level = level or min(3, entry.hints + 1)
    if level > entry.hints:
        entry.hints = level
        save(folders.progress, entries)
    return level


def note_solution(number: str, folders: Folders = HERE) -> None:
    """Remember that the solution was shown before the exercise was passed."""
    entries = load(folders.progress)
    entry = entries.setdefault(number, Entry())
    if not entry.passed and not entry.solution_seen:
        entry.solution_seen = True
        save(folders.progress, entries)


def state(exercise: Exercise, entry: Entry, file: Path) -> str:
    """Where an exercise stands, given what is remembered and the learner's file as it is now."""
    if entry.passed:
        same = file.is_file() and stubs.source_digest(stubs.read(file), exercise.name) == entry.passed
        return DONE if same else CHANGED
    return TRIED if entry.tries else UNTRIED


@dataclass(frozen=True)
class Row:
    """One line of the board."""

    exercise: Exercise
    state: str
    entry: Entry


def rows(folders: Folders = HERE, only: Iterable[str] = ()) -> dict[str, list[Row]]:
    """The board by chapter's title, "01 kv cache"; of the chapters in `only`, or of all."""
    entries, wanted, board = load(folders.progress), set(only), {}
    for chapter, path in chapters.find(folders.chapters).items():
        if wanted and chapter not in wanted:
            continue
        board[f"{chapter} {path.stem[4:].replace('_', ' ')}"] = [
            Row(exercise, state(exercise, entry, folders.exercise(path)), entry)
            for exercise in chapters.load(path)
            for entry in [entries.get(exercise.number, Entry())]
        ]
    return board


def passed_now(folders: Folders = HERE) -> list[tuple[Exercise, Path]]:
    """The exercises whose code is the one that passed, with the file it stands in."""
    entries, found = load(folders.progress), []
    for path in chapters.find(folders.chapters).values():
        file = folders.exercise(path)
        for exercise in chapters.load(path):
            if state(exercise, entries.get(exercise.number, Entry()), file) == DONE:
                found.append((exercise, file))
    return found
