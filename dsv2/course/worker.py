"""The process that runs a learner's file and judges it: `python -m dsv2.course.worker EVENTS REQUEST`.

Whatever that file does ends here. What happens is appended to the file EVENTS, one JSON object a line, which
needs no open stream, so that it survives code that closes or floods them. `dsv2.course.watch` reads it.
"""

from __future__ import annotations

import importlib.machinery
import io
import json
import linecache
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv2.course import chapters, stubs
from dsv2.course.folders import Folders
from dsv2.course.judge import describe_error, judge, line_of, right_outcomes
from dsv2.course.spec import Exercise
from dsv2.course.verdict import Verdict
from dsv2.course.watch import END_OF_OUTPUT


def serve(request: dict[str, Any], tell: Callable[..., None], output: Output) -> None:
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
    expected = [right_outcomes(exercise) for exercise in exercises]  # before a stranger's code has run
    for exercise, outcomes in zip(exercises, expected, strict=True):
        path = folders.exercise(files[exercise.chapter])
        tell("start", number=exercise.number)
        output.begin()
        if path not in loaded:
            loaded[path] = LearnersFile(path)
        verdict = loaded[path].judged(exercise, lambda case: tell("case", index=case), outcomes)
        verdict.file = path.name
        output.end(exercise.number)
        tell("verdict", verdict=verdict.as_json())


class Output:
    """What the process prints, exercise by exercise: each begins with open streams and ends with a mark."""

    def __init__(self) -> None:
        self.descriptor, self.write, self.duplicate = os.dup(1), os.write, os.dup2
        self.nothing = os.open(os.devnull, os.O_RDONLY)

    def begin(self) -> None:
        """Point the streams to where they went at first, whatever has become of them; there is no input."""
        self.duplicate(self.nothing, 0)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
        for number, name in ((1, "stdout"), (2, "stderr")):
            self.duplicate(self.descriptor, number)
            raw = io.FileIO(number, "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(raw, "utf-8", errors="replace", write_through=True))

    def end(self, number: str) -> None:
        """Mark the end of an exercise's output."""
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:  # closed, or no stream at all
                pass
        try:
            self.write(self.descriptor, b"\n" + END_OF_OUTPUT + number.encode() + b"\n")
        except OSError:  # the exercise closed all there is; its output has no end
            pass


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


def leave_no_core_file() -> None:
    """Let a crash of the learner's code leave no image of the memory in the course's folder."""
    try:
        import resource
    except ImportError:  # on Windows, which leaves none
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def main(events: str, request: str) -> None:
    """Serve a request, then end at once, whatever threads and exit hooks the learner's code has left."""
    sys.dont_write_bytecode = True
    leave_no_core_file()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    opened, write, close, encode, leave = os.open, os.write, os.close, json.dumps, os._exit

    def tell(event: str, **values: Any) -> None:
        descriptor = opened(events, flags, 0o600)
        write(descriptor, (encode({"event": event, **values}) + "\n").encode())
        close(descriptor)

    # Cases are small: shared out among threads they are no faster, and on a busy machine the threads wait for
    # each other until a right answer seems to hang.
    torch.set_num_threads(1)
    status = 0
    try:
        serve(json.loads(request), tell, Output())
    except BaseException as error:
        import traceback

        tell("broken", message="".join(traceback.format_exception(error)))
        status = 1
    leave(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
