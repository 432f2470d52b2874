"""The course on the learner's own code: passed functions in the place of the package's.

`use("mine")` puts each function that has passed, and is still the same, where its exercise's `replaces`
says, in every module of dsv2 that holds the original. `use("reference")` takes them out again. With the
environment variable DSV2_IMPL=mine, `import dsv2` does the former.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from dsv2.course import board, worker
from dsv2.course.folders import HERE, Folders
from dsv2.course.show import Card, out

# What was put in: its place, the original, and the learner's.
_swapped: list[tuple[str, Any, Any]] = []


def use(implementation: str, folders: Folders = HERE) -> None:
    """Run dsv2 on the learner's passed functions ("mine") or its own ("reference"); prints which are whose.

    An exercise that is not finished, or that has changed since it passed, stays the reference. Modules built
    before go on with what their code finds: they too run on the learner's functions from now on.
    """
    if implementation not in ("mine", "reference"):
        raise ValueError(f'choose "mine" or "reference", not {implementation!r} (the same in DSV2_IMPL)')
    restore()
    if implementation == "reference":
        out(Card("dsv2 runs on its own functions."))
        return
    replaceable = [
        row.exercise for rows in board.rows(folders).values() for row in rows if row.exercise.replaces
    ]
    loaded: dict[Any, dict[str, Any]] = {}
    yours, broken = {}, []
    for exercise, file in board.passed_now(folders):
        if not exercise.replaces:
            continue
        try:
            if file not in loaded:
                loaded[file] = worker.run_file(file)
            yours.update({place: loaded[file][exercise.name] for place in exercise.replaces})
        except Exception as error:  # the file ran when it was checked; what it needs may be gone
            broken.append((exercise.number, f"{file.name} does not run: {type(error).__name__}: {error}"))
    swap(yours)
    failed, lines, rest = dict(broken), [], []
    for exercise in replaceable:
        what = ", ".join(place.removeprefix("dsv2.") for place in exercise.replaces)
        if any(place in yours for place in exercise.replaces):
            lines.append((exercise.number, f"{what}: yours"))
        elif exercise.number in failed:
            lines.append((exercise.number, f"{what}: the reference ({failed[exercise.number]})"))
        else:
            rest.append(exercise.number)
    count = sum(any(place in yours for place in exercise.replaces) for exercise in replaceable)
    if rest:
        lines.append(("", f"the reference (not passed): {', '.join(rest)}"))
    out(Card(f"dsv2 runs on {count} of your functions ({len(replaceable)} can be replaced).", lines=lines))


def swap(functions: Mapping[str, Any]) -> None:
    """Put functions in the place of dsv2's, by name: {"dsv2.attention.mla.absorb_query": ...}.

    Raises LookupError for a name that does not exist, before anything is changed.
    """
    originals = {}
    for place in functions:
        holder, name = _holder(place)
        if not hasattr(holder, name):
            raise LookupError(f"there is no {place} to replace")
        originals[place] = vars(holder)[name] if isinstance(holder, type) else getattr(holder, name)
    for place, function in functions.items():
        _exchange(place, originals[place], function)
        _swapped.append((place, originals[place], function))
        os.environ["DSV2_IMPL"] = "mine"  # on a GPU too: no kernel may do a function's work in its place


def restore() -> None:
    """Take out all that was put in, also where it has been imported since."""
    while _swapped:
        place, original, function = _swapped.pop()
        _exchange(place, function, original)
    os.environ.pop("DSV2_IMPL", None)


def _holder(place: str) -> tuple[Any, str]:
    """The module or class that holds a dotted name, and its last part."""
    *path, name = place.split(".")
    for length in range(len(path), 0, -1):
        try:
            holder = importlib.import_module(".".join(path[:length]))
        except ModuleNotFoundError:
            continue
        for part in path[length:]:
            holder = getattr(holder, part)
        return holder, name
    raise LookupError(f"there is no {place} to replace")


def _exchange(place: str, old: Any, new: Any) -> None:
    holder, name = _holder(place)
    if isinstance(holder, type):
        setattr(holder, name, new)
        return
    for module in _modules():
        for held, value in list(vars(module).items()):
            if value is old:
                setattr(module, held, new)


def _modules() -> Iterator[Any]:
    """The modules of dsv2, without the course's own: the judges' right answers stay what they are."""
    for name, module in list(sys.modules.items()):
        if (name == "dsv2" or name.startswith("dsv2.")) and not name.startswith("dsv2.course"):
            if module is not None:
                yield module
