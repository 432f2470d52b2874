"""The process that runs a learner's file and judges it: `python -m dsv2.course.worker EVENTS REQUEST`.

Whatever that file does ends here. What happens is appended to the file EVENTS, one JSON object a line, which
needs no open stream, so that it survives code that closes or floods them. `dsv2.course.watch` reads it.
"""

from __future__ import annotations

import importlib.machinery
import json
import linecache
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv2.course import chapters, stubs
from dsv2.course.folders import Folders
from dsv2.course.judge import describe_error, judge, line_of, right_outcomes
from dsv2.course.spec import Exercise
from dsv2.course.verdict import Verdict


def serve(request: dict[str, Any], tell: Callable[..., None]) -> None:
    """Judge the exercises that a request names, telling each step."""
    folders = Folders(Path(request["home"]), Path(request["chapters"]))
    try:
        exercises = chapters.resolve(request["numbers"], folders.chapters)
    except chapters.Unknown as error:
        tell("unknown", message=str(error))
        return
    files = chapters.find(folders.chapters)
    tell(
        "ready",
        exercises=[
            {
                "number": exercise.number,
                "name": exercise.name,
                "title": exercise.title,
                "given": exercise.given or "",
                "file": str(folders.exercise(files[exercise.chapter])),
                "cases": [case.says for case in exercise.cases],
            }
            for exercise in exercises
        ],
    )
    loaded: dict[Path, LearnersFile] = {}
    for exercise in exercises:
        path = folders.exercise(files[exercise.chapter])
        expected = right_outcomes(exercise)  # before a stranger's code has run
        tell("start", number=exercise.number)
        if path not in loaded:
            loaded[path] = LearnersFile(path)
        verdict = loaded[path].judged(exercise, lambda case: tell("case", index=case), expected)
        verdict.file = path.name
        tell("verdict", verdict=verdict.as_json())


class LearnersFile:
    """A learner's file, run once: its names, or the exception that running it raised."""

    def __init__(self, path: Path):
        self.path, self.text = path, ""
        self.namespace: dict[str, Any] = {}
        self.error: BaseException | None = None
        try:
            self.text = stubs.read(path)
            self.namespace = run_file(path)
        except BaseException as error:
            self.error = error

    def judged(self, exercise: Exercise, notice: Callable[[int], None], expected: list[Any]) -> Verdict:
        """The verdict on one exercise of the file."""
        verdict = self._without_answer(exercise)
        if verdict is None:
            verdict = judge(exercise, self.namespace[exercise.name], str(self.path), notice, expected)
        verdict.source = stubs.source_digest(self.text, exercise.name)
        verdict.untouched = stubs.untouched(self.text, exercise.number)
        return verdict

    def _without_answer(self, exercise: Exercise) -> Verdict | None:
        """Why there is nothing to run; None if there is."""
        verdict = Verdict(
            exercise.number,
            exercise.name,
            exercise.title,
            "missing",
            len(exercise.cases),
            given=exercise.given or "",
        )
        if isinstance(self.error, FileNotFoundError) and not self.text:
            verdict.found = [
                ("missing", f"there is no file {self.path.name}: python3 course.py build-exercises")
            ]
        elif self.error is not None:
            verdict.status = "raised"
            verdict.case = "running the file, before any function of it"
            verdict.found = describe_error(self.error)
            if isinstance(self.error, SyntaxError) and self.error.filename == str(self.path):
                verdict.case = "reading the file"
                verdict.found = [("raised", f"{type(self.error).__name__}: {self.error.msg}")]
            verdict.line, verdict.code = line_of(self.error, str(self.path))
        elif exercise.name not in self.namespace:
            verdict.found = [("missing", f"{self.path.name} defines no {exercise.name}")]
        elif not callable(self.namespace[exercise.name]):
            verdict.found = [("missing", f"{exercise.name} in {self.path.name} is not a function or class")]
        else:
            return None
        return verdict


def run_file(path: Path) -> dict[str, Any]:
    """The names that a Python file defines. Leaves nothing beside it and takes no compiled form of it."""
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    module.__spec__ = importlib.machinery.ModuleSpec(path.stem, None, origin=str(path))
    sys.modules[path.stem] = module  # dataclasses and annotations look their module up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that no file of a learner's hides a library
    linecache.checkcache(str(path))
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def main(events: str, request: str) -> None:
    """Serve a request, then end at once, whatever threads and exit hooks the learner's code has left."""
    sys.dont_write_bytecode = True
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    opened, write, close, encode, leave = os.open, os.write, os.close, json.dumps, os._exit

    def tell(event: str, **values: Any) -> None:
        descriptor = opened(events, flags, 0o600)
        write(descriptor, (encode({"event": event, **values}) + "\n").encode())
        close(descriptor)

    status = 0
    try:
        serve(json.loads(request), tell)
    except BaseException as error:
        import traceback

        tell("broken", message="".join(traceback.format_exception(error)))
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            pass
    leave(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
