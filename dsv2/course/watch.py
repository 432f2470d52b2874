"""Runs checks in a process of their own, and ends it when it hangs; loads neither PyTorch nor their files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsv2.course.chapters import Unknown
from dsv2.course.folders import HERE, ROOT, Folders
from dsv2.course.verdict import Verdict

SECONDS = 20.0  # for one exercise, all cases together
SECONDS_TO_START = 180.0  # for PyTorch on a slow disk
LINES_KEPT, LONGEST_LINE = 8, 200
END_OF_OUTPUT = b"\0 end of what this printed: "  # written by the worker after each exercise


class WorkerBroken(RuntimeError):
    """The checking process failed for a reason that is not the learner's; the message is its traceback."""


def verdicts(numbers: Iterable[str], folders: Folders = HERE, seconds: float = SECONDS) -> Iterator[Verdict]:
    """The verdict on each exercise, as it comes. numbers: "02.3", or "02" for a chapter.

    seconds: after which an exercise is taken to hang. Raises Unknown for a number that does not exist.
    """
    remaining = list(numbers)
    while remaining:
        remaining = yield from _one_process(remaining, folders, seconds)


def _one_process(numbers: list[str], folders: Folders, seconds: float) -> Iterator[Verdict]:
    """Verdicts of one process; returns the exercises that are left when one of them has ended it."""
    exercises: dict[str, dict[str, Any]] = {}
    current, case, done = "", 0, set()
    with Worker(numbers, folders) as worker:
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            ended = worker.ended()  # asked before the events are read: none can come afterwards
            for event in worker.events():
                kind = event["event"]
                if kind == "unknown":
                    raise Unknown(event["message"])
                if kind == "broken":
                    raise WorkerBroken(event["message"])
                if kind == "ready":
                    exercises = {exercise["number"]: exercise for exercise in event["exercises"]}
                elif kind == "start":
                    current, case, deadline = event["number"], -1, time.monotonic() + seconds
                elif kind == "case":
                    case = event["index"]
                elif kind == "verdict":
                    verdict = Verdict.from_json(event["verdict"])
                    verdict.printed = worker.printed(current)
                    done.add(current)
                    current, deadline = "", time.monotonic() + SECONDS_TO_START
                    yield verdict
            left = [number for number in exercises if number not in done]
            if exercises and not left:
                return []
            late = time.monotonic() > deadline
            if not ended and not late:
                worker.wait()
                continue
            if not current:
                why = "did not start in time" if late else f"ended by itself ({worker.how_it_ended()})"
                raise WorkerBroken(f"the checking process {why}\n" + "\n".join(worker.printed()))
            worker.stop()
            exercise = exercises[current]
            verdict = Verdict(
                current,
                exercise["name"],
                exercise["title"],
                "hung" if late else "died",
                len(exercise["cases"]),
            )
            verdict.given, verdict.file = exercise["given"], Path(exercise["file"]).name
            verdict.case = _stage(case, exercise["cases"])
            if late:
                verdict.found = [
                    ("stopped", f"it was still running after {seconds:g} s: a loop without an end?")
                ]
            else:
                ended = worker.how_it_ended()
                verdict.found = [("ended", f"your code ended the process: {ended}")]
                if any(signal in ended for signal in ("SIGSEGV", "SIGBUS", "SIGABRT")):
                    often = "in a kernel, a pointer that is outside of its tensor: look at offsets and masks"
                    verdict.found.append(("often", often))
            verdict.printed = worker.printed()
            yield verdict
            return [number for number in left if number != current]


def _stage(case: int, cases: list[str]) -> str:
    if case < 0:
        return "running the file, before any function of it"
    return cases[case] if case < len(cases) else "after the last case"


class Worker:
    """The process of `dsv2.course.worker`: its events, the last lines it printed, and its end."""

    def __init__(self, numbers: list[str], folders: Folders):
        self.folder = Path(tempfile.mkdtemp(prefix="dsv2-check-"))
        self.file, self.read_to, self.rest = self.folder / "events", 0, b""
        self.lines: deque[bytes] = deque(maxlen=LINES_KEPT)
        self.of: dict[str, list[bytes]] = {}  # the last lines of each exercise that has come to its end
        self.progressed = threading.Condition()
        request = {"home": str(folders.home), "chapters": str(folders.chapters), "numbers": numbers}
        variables = {name: value for name, value in os.environ.items() if name != "DSV2_IMPL"}
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [variables.get("PYTHONPATH")])])
        variables.update(PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8:replace", PYTHONFAULTHANDLER="")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dsv2.course.worker", str(self.file), json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folders.home,
            env=variables,
            start_new_session=os.name != "nt",  # so that its own children end with it
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        """Keep the last lines of what is printed; a line without an end is cut."""
        line, output = b"", self.process.stdout
        while block := os.read(output.fileno(), 1 << 16):
            *whole, line = (line + block).split(b"\n")
            for text in whole:
                if text.startswith(END_OF_OUTPUT):
                    with self.progressed:
                        self.of[text[len(END_OF_OUTPUT) :].decode()] = list(self.lines)
                        self.lines.clear()
                        self.progressed.notify_all()
                else:
                    self.lines.append(text[-LONGEST_LINE:])
            line = line[-LONGEST_LINE:]
        if line:
            self.lines.append(line)

    def events(self) -> list[dict[str, Any]]:
        """What has happened since the last call."""
        try:
            with open(self.file, "rb") as file:
                file.seek(self.read_to)
                block = file.read()
        except FileNotFoundError:
            return []
        self.read_to += len(block)
        *whole, self.rest = (self.rest + block).split(b"\n")
        return [json.loads(line) for line in whole]

    def printed(self, number: str = "") -> list[str]:
        """The last lines that an exercise printed; without a number, of the one that came to no end."""
        if number:  # the end of its output may still be on its way
            with self.progressed:
                self.progressed.wait_for(lambda: number in self.of, timeout=1)
            lines = self.of.get(number, [])
        else:
            self.reader.join(timeout=1)
            lines = list(self.lines)
        kept = [line.decode(errors="replace").rstrip() for line in lines]
        while kept and not kept[-1]:
            kept.pop()
        return kept

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self) -> None:
        """A moment, or until the process ends."""
        try:
            self.process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            pass

    def how_it_ended(self) -> str:
        status = self.process.wait()
        if status < 0:
            return f"signal {signal.Signals(-status).name}"
        return f"exit status {status}"

    def stop(self) -> None:
        """End the process and what it started."""
        try:
            if os.name == "nt":
                self.process.kill()
            else:
                os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self.process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.reader.join(timeout=1)
        if not self.reader.is_alive():
            self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)
