"""The commands `check`, `hint`, `progress`, `solution`, `reset` and `build-exercises`."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dsv2.course import board, chapters, show, stubs, watch
from dsv2.course.folders import HERE, Folders
from dsv2.course.page import solution_or_why_not
from dsv2.course.spec import Exercise


def main(arguments: Sequence[str], folders: Folders | None = None) -> int:
    """Run one command; 0, 1 (a check did not pass, or something could not be done) or 2 (wrong arguments)."""
    options = _parser().parse_args(arguments)
    if folders is None:
        folders = HERE if options.home is None else Folders(options.home, options.home / "chapters")
    try:
        return options.run(options, folders)
    except (chapters.Unknown, stubs.StubError) as error:
        print(f"course.py: {show.showable(str(error), sys.stderr)}", file=sys.stderr)
        return 2 if isinstance(error, chapters.Unknown) else 1
    except OSError as error:
        print(f"course.py: {error}", file=sys.stderr)
        return 1
    except watch.WorkerBroken as error:
        print(f"course.py: the check itself failed:\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="course.py", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, says: str) -> argparse.ArgumentParser:
        part = commands.add_parser(name, help=says, description=says[:1].upper() + says[1:] + ".")
        part.set_defaults(run=run)
        part.add_argument("--home", type=Path, help=argparse.SUPPRESS)  # a course other than this one
        return part

    part = command("check", check, "check exercises: 02.3, or 02 for a chapter")
    part.add_argument("number", nargs="+")
    part.add_argument(
        "--seconds",
        type=float,
        default=watch.SECONDS,
        help="after which an exercise is stopped (default: %(default)g)",
    )
    part = command("hint", hint, "show the next of an exercise's three hints")
    part.add_argument("number")
    part.add_argument("--level", type=int, choices=(1, 2, 3), help="1 a question, 2 a pointer, 3 pseudocode")
    part = command("progress", progress, "show what is done")
    part.add_argument("number", nargs="*", metavar="chapter")
    part = command("solution", solution, "show the worked solution of an exercise that has passed")
    part.add_argument("number")
    part.add_argument("--insist", action="store_true", help="also of one that has not passed")
    part = command(
        "reset", reset, "put an exercise, or a chapter's file, back as it was; keeps a copy of yours"
    )
    part.add_argument("number")
    command("build-exercises", build, "make exercises/ from solutions/; functions that you changed are kept")
    return parser


def check(options: argparse.Namespace, folders: Folders) -> int:
    """Check exercises and print a card for each."""
    states, number = [], ""
    for verdict in watch.verdicts(options.number, folders, options.seconds):
        if number:
            print()
        number = verdict.number
        try:
            entry = board.note(verdict, folders)
        except OSError as error:
            entry = board.Entry()
            print(f"course.py: progress could not be kept: {error}", file=sys.stderr)
        show.out(show.verdict_card(verdict, entry))
        states.append(verdict.status)
    if len(states) > 1:
        print(f"\n{states.count('passed')} of {len(states)} passed.")
    return 0 if set(states) == {"passed"} else 1


def hint(options: argparse.Namespace, folders: Folders) -> int:
    """Print a hint."""
    exercise = one(options.number, folders)
    show.out(show.hint_card(exercise, board.note_hint(exercise.number, options.level, folders)))
    return 0


def progress(options: argparse.Namespace, folders: Folders) -> int:
    """Print the board."""
    only = {exercise.chapter for exercise in chapters.resolve(options.number, folders.chapters)}
    show.out(show.board_card(board.rows(folders, only)))
    return 0


def solution(options: argparse.Namespace, folders: Folders) -> int:
    """Print a solution, or when it is shown."""
    exercise = one(options.number, folders)
    card = solution_or_why_not(exercise, options.insist, folders, show.TERMINAL)
    show.out(card)
    return 1 if card.tone == "open" else 0


def reset(options: argparse.Namespace, folders: Folders) -> int:
    """Put the stub's code back and say where the learner's is kept."""
    exercises = chapters.resolve([options.number], folders.chapters)
    if not exercises:
        raise chapters.Unknown(f"chapter {options.number} has no exercises")
    path = chapters.find(folders.chapters)[exercises[0].chapter]
    file, whole = folders.exercise(path), "." not in options.number
    generated = stubs.stub_text(
        stubs.read(folders.solution(path)), chapters.load(path), folders.solution(path).name
    )
    if not file.exists():
        stubs.write(file, generated)
        print(f"{file.name} was not there; it is made anew.")
        return 0
    current = stubs.read(file)
    text = generated
    if not whole:
        try:
            number = exercises[0].number
            text = stubs.replace_part(current, number, stubs.parts(generated)[number])
        except stubs.StubError as error:
            again = f"python3 course.py reset {exercises[0].chapter}"
            raise stubs.StubError(f"{file.name}: {error}. To begin the whole file again: {again}") from None
    if text == current:
        print(f"{options.number} is as it was given; nothing to put back.")
        return 0
    copy = backup_of(file, options.number, folders)
    stubs.write(file, text)
    what = f"{file.name} is" if whole else f"{exercises[0].number} in {file.name} is"
    print(f"{what} as it was given. Your version is kept: {_from_home(copy, folders)}")
    return 0


def backup_of(file: Path, number: str, folders: Folders) -> Path:
    """A copy of a learner's file under a new name."""
    folders.backup.mkdir(parents=True, exist_ok=True)
    name = f"{file.stem}_before_reset_{number.replace('.', '_')}_{time.strftime('%Y%m%d-%H%M%S')}"
    copy, count = folders.backup / f"{name}.py", 1
    while copy.exists():
        count += 1
        copy = folders.backup / f"{name}_{count}.py"
    shutil.copy2(file, copy)
    return copy


def build(options: argparse.Namespace, folders: Folders) -> int:
    """Make or update every chapter's stub."""
    found = chapters.find(folders.chapters)
    for path in found.values():
        source, file = folders.solution(path), folders.exercise(path)
        if not source.is_file():
            raise stubs.StubError(
                f"{_from_home(source, folders)} is not there, and {path.name} has exercises"
            )
        changed, kept = stubs.build(source, file, chapters.load(path))
        said = "written" if changed else "up to date"
        if kept:
            said += f"; kept as you have {'it' if len(kept) == 1 else 'them'}: {show.listed(kept)}"
        print(f"{_from_home(file, folders)}: {said}")
    if not found:
        print("There are no exercises yet.")
    return 0


def one(number: str, folders: Folders) -> Exercise:
    """The one exercise that is meant; raises Unknown if a chapter is given, or there is none."""
    exercises = chapters.resolve([number], folders.chapters)
    if "." not in number:
        names = show.listed([exercise.number for exercise in exercises])
        raise chapters.Unknown(f"say which exercise of chapter {number}: {names}")
    return exercises[0]


def _from_home(path: Path, folders: Folders) -> str:
    return path.relative_to(folders.home).as_posix()
