"""The learner's files as text: made from the solutions, merged with a learner's work, taken apart again.

A solution marks each exercise with a line `# exercise 01.2`, and what the learner has to write with
`# <solution>` and `# </solution>`. The stub gets a header for the first and `raise NotImplementedError` for
the second, or, in a bug hunt, the broken lines that stand commented out (`#| ...`) between `# <given>` and
`# </given>`. Its last line records what was generated, so that a learner's changes can be told apart from
the course's.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dsv2.course.spec import Exercise

MARK = re.compile(r"# exercise (\d\d\.\d+)$")
HEADER = re.compile(r"# exercise (\d\d\.\d+)\b")
RECORD = re.compile(r"# stub ([0-9a-f]{6,8}):((?: (?:file|\d\d\.\d+) [0-9a-f]{6,8},?)+)$")
GIVEN = re.compile(r"(\s*)#\| ?(.*)$")
TOP = "file"  # what stands before the first exercise


class StubError(ValueError):
    """A solution or a learner's file does not have the form that is needed; the message says where."""


# ------------------------------------------------------------------------------------------- solution -> stub


def stub_text(solution: str, exercises: Iterable[Exercise], file: str) -> str:
    """The stub made from a solution's text; `file` is its name in errors.

    Raises StubError, naming the line, if the marks of the solution are wrong or do not fit the exercises.
    """
    known = {exercise.number: exercise for exercise in exercises}
    lines: list[str] = []
    regions = dict.fromkeys(known, 0)
    given_in: set[str] = set()
    number, indent, given, state = "", "", [], "outside"

    for position, line in enumerate(solution.splitlines(), 1):

        def wrong(why: str, position: int = position) -> StubError:
            return StubError(f"{file}, line {position}: {why}")

        word, mark = line.strip(), MARK.match(line)
        if state == "given" and word != "# </given>":
            broken = GIVEN.match(line)
            if not broken:
                raise wrong("between <given> and </given> every line begins with #|")
            given.append((broken[1] + broken[2]).rstrip())
        elif word == "# <solution>":
            if state != "outside" or not number:
                raise wrong("<solution> belongs below a line '# exercise NN.N', and not in another region")
            state, indent, given = "solution", line[: line.index("#")], []
        elif word == "# </solution>":
            if state != "solution":
                raise wrong("</solution> without <solution>")
            state = "outside"
            regions[number] += 1
            lines += given or [f"{indent}{_unwritten(number)}"]
        elif word == "# <given>":
            if state != "solution":
                raise wrong("<given> belongs inside a <solution> region")
            state = "given"
            given_in.add(number)
        elif word == "# </given>":
            if state != "given":
                raise wrong("</given> without <given>")
            state = "solution"
        elif mark:
            number = mark[1]
            if state != "outside":
                raise wrong(f"exercise {number} begins inside a region")
            if number not in known:
                raise wrong(f"the chapter has no exercise {number}; it has {', '.join(known)}")
            if any(HEADER.match(earlier) and HEADER.match(earlier)[1] == number for earlier in lines):
                raise wrong(f"exercise {number} is there twice")
            lines += header(known[number])
        elif state == "outside":
            lines.append(line.rstrip())

    if state != "outside":
        raise StubError(f"{file}: the last region is not closed")
    for exercise in known.values():
        if not regions[exercise.number]:
            raise StubError(f"{file}: exercise {exercise.number} has no <solution> region")
        if (exercise.given is not None) != (exercise.number in given_in):
            raise StubError(
                f"{file}: exercise {exercise.number}: its `given` and the <given> block go together"
            )
    text = "\n\n\n".join(parts("\n".join(lines)).values()) + "\n"
    for exercise in known.values():
        if exercise.name not in _defined(ast.parse(parts(text)[exercise.number])):
            raise StubError(f"{file}: exercise {exercise.number} does not define {exercise.name}")
    return text + "\n" + record_line(text) + "\n"


def _unwritten(number: str) -> str:
    what = f"exercise {number}: write this, then run: python3 course.py check {number}"
    return f'raise NotImplementedError("{what}")'


def header(exercise: Exercise) -> list[str]:
    """The three lines above an exercise in the stub."""
    kind = "a bug hunt, " if exercise.given is not None else ""
    return [
        f"# exercise {exercise.number}: {exercise.title} ({kind}difficulty {exercise.difficulty} of 3, "
        f"about {exercise.minutes} minutes)",
        f'# check: python3 course.py check {exercise.number}     in a notebook: check("{exercise.number}")',
        f'# hint:  python3 course.py hint {exercise.number}      in a notebook: hint("{exercise.number}")',
    ]


def solved(solution: str, number: str) -> str:
    """One exercise as the solution has it, without the marks and without a bug hunt's broken lines."""
    kept, skipping = [], False
    for line in parts(solution)[number].splitlines()[1:]:
        word = line.strip()
        if word in ("# <given>", "# </given>"):
            skipping = word == "# <given>"
        elif not skipping and word not in ("# <solution>", "# </solution>"):
            kept.append(line)
    return "\n".join(kept).strip() + "\n"


# --------------------------------------------------------------------------------------- parts of such a file


def parts(text: str) -> dict[str, str]:
    """The text by exercise number, and what stands before them under "file"; without the record line."""
    found: dict[str, list[str]] = {TOP: []}
    number = TOP
    for line in text.splitlines():
        match = HEADER.match(line)
        if match:
            number = match[1]
        if not RECORD.match(line.rstrip()):
            found.setdefault(number, []).append(line)
    return {number: "\n".join(lines).rstrip() for number, lines in found.items()}


def digest(text: str) -> str:
    """Six letters that stand for a text."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:6]


def record_line(text: str) -> str:
    """The last line of a stub: what was generated, as a whole and part by part."""
    by_part = ", ".join(f"{number} {digest(part)}" for number, part in parts(text).items())
    return f"# stub {digest(text)}: {by_part}"


def recorded(text: str) -> dict[str, str]:
    """The digests in a file's last record line, the whole one under ""; empty if it has none."""
    for line in reversed(text.splitlines()):
        match = RECORD.match(line.rstrip())
        if match:
            pairs = (pair.split() for pair in match[2].split(","))
            return {"": match[1], **{pair[0]: pair[1] for pair in pairs if pair}}
    return {}


def untouched(text: str, number: str) -> bool:
    """Whether an exercise of a learner's file is still as it was generated."""
    return number in parts(text) and recorded(text).get(number) == digest(parts(text)[number])


def merge(current: str, generated: str) -> tuple[str, list[str]]:
    """A learner's file brought up to date, and the numbers of the exercises kept as the learner has them.

    A part that the learner has not changed is replaced; a changed one is kept. Imports that are new in the
    generated file are added to changed ones. Raises StubError if an exercise's header is gone from the file.
    """
    mine, theirs, record = parts(current), parts(generated), recorded(current)
    merged, kept = [], []
    for number, new in theirs.items():
        if number not in mine:
            if number in record:
                raise StubError(
                    f"it lacks the line '# exercise {number}: ...' above that exercise, so that its parts "
                    "cannot be told apart; put the line back, or begin the file again with "
                    f"`python3 course.py reset {number[:2]}`"
                )
            merged.append(new)
        elif digest(mine[number]) in (record.get(number), digest(new)):
            merged.append(new)
        elif number == TOP:
            merged.append(_with_imports(mine[number], new))
        else:
            merged.append(mine[number])
            kept.append(number)
    for number, old in mine.items():  # no longer in the course; only what was written is worth keeping
        if number not in theirs and digest(old) != record.get(number):
            merged.append(old)
            kept.append(number)
    return "\n\n\n".join(merged) + "\n\n" + recorded_as(generated) + "\n", kept


def recorded_as(generated: str) -> str:
    return next(line for line in reversed(generated.splitlines()) if RECORD.match(line))


def _with_imports(mine: str, new: str) -> str:
    """A learner's first part, with the imports of the new one that it lacks."""
    nodes = [node for node in ast.parse(new).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    lines = [ast.get_source_segment(new, node) for node in nodes]
    lacking = [line for line in lines if line and line not in mine]
    return "\n".join([mine, *lacking])


def replace_part(text: str, number: str, part: str) -> str:
    """The text with one exercise's part replaced; raises StubError if its header is gone."""
    found = parts(text)
    if number not in found:
        raise StubError(f"it lacks the line '# exercise {number}: ...' above that exercise")
    last = next((line for line in reversed(text.splitlines()) if RECORD.match(line.rstrip())), "")
    body = "\n\n\n".join(part if name == number else old for name, old in found.items())
    return body + "\n" + (f"\n{last}\n" if last else "")


def source_digest(text: str, name: str) -> str:
    """Stands for the code of one top-level function or class and of all in the file that it uses.

    Comments, docstrings and layout do not count. "" if the file cannot be parsed or has no such name.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    defined = _defined(tree)
    if name not in defined:
        return ""
    wanted, seen, code = [name], set(), []
    while wanted:
        current = wanted.pop()
        if current in seen:
            continue
        seen.add(current)
        for node in defined.get(current, ()):
            code.append(ast.unparse(_without_docstrings(node)))
            used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            wanted += sorted(used - seen)
    return digest("\n".join(sorted(set(code))))


def _defined(tree: ast.Module) -> dict[str, list[ast.stmt]]:
    """The top-level statements that give each name its value."""
    found: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
        else:
            stored = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            names = [inner.id for inner in stored]
        for name in names:
            found.setdefault(name, []).append(node)
    return found


def _without_docstrings(node: ast.stmt) -> ast.stmt:
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = inner.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and len(inner.body) > 1:
                inner.body = inner.body[1:]
    return node


# ------------------------------------------------------------------------------------------------------ files


def read(path: Path) -> str:
    """A file's text, with plain line ends; bytes that are not UTF-8 are shown as such."""
    return path.read_bytes().decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def write(path: Path, text: str) -> None:
    """Write a text in one step, with the line ends that the file has now."""
    ends = b"\r\n" if path.is_file() and b"\r\n" in path.read_bytes() else b"\n"
    replace(path, text.encode("utf-8").replace(b"\n", ends))


def replace(path: Path, content: bytes) -> None:
    """Put a file in the place of another at once: a reader sees the old or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def build(solution: Path, stub: Path, exercises: Iterable[Exercise]) -> tuple[bool, list[str]]:
    """Make or update a learner's file; whether it changed, and the exercises kept as the learner has them.

    Raises StubError, naming the file, if either file does not have the form that is needed.
    """
    generated = stub_text(read(solution), exercises, solution.name)
    if not stub.exists():
        write(stub, generated)
        return True, []
    current = read(stub)
    try:
        text, kept = merge(current, generated)
    except StubError as error:
        raise StubError(f"{stub.name} is left as it is: {error}") from None
    if text != current:
        write(stub, text)
    return text != current, kept


def outdated(stub: str, generated: str, exactly: bool) -> str:
    """Why a stub does not fit what is generated now; "" if it does. Edits do not count unless `exactly`."""
    if exactly and stub != generated:
        return "it differs from what is generated"
    if recorded(stub).get("") != recorded(generated)[""]:
        return "it was generated from another solution"
    return ""
