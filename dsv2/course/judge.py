"""What an answer to an exercise is worth: run on every case, compared with the right one, and named if known.

Runs the answer where it is called. A learner's file is judged in a process of its own (`dsv2.course.worker`).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.course.verdict import Lines, Verdict

LONGEST = 600  # characters of an exception's message that are shown


@dataclass
class Outcome:
    """What an answer did on one case: its value or its exception, and its arguments as it left them."""

    value: Any = None
    error: BaseException | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def judge(
    exercise: Exercise,
    answer: Callable[..., Any],
    file: str = "",
    notice: Callable[[int], None] = lambda case: None,
    expected: Sequence[Outcome] | None = None,
) -> Verdict:
    """Run an answer on all cases and say what it is worth.

    file: where the answer's code stands, to name the line that raised. notice: called with each case's index
    before it runs. expected: the right outcomes, if they are known already.
    """
    verdict = Verdict(
        exercise.number,
        exercise.name,
        exercise.title,
        "passed",
        len(exercise.cases),
        given=exercise.given or "",
    )
    if exercise.needs_triton and (why := why_no_kernels()):
        verdict.status, verdict.found = "not here", [("needs", why)]
        return verdict
    if expected is None:
        expected = right_outcomes(exercise)
    outcomes: list[Outcome] = []
    for index, case in enumerate(exercise.cases):
        notice(index)
        outcome = attempt(exercise, answer, case.arguments())
        outcomes.append(outcome)
        if isinstance(outcome.error, NotImplementedError):
            verdict.status = "not started"
            verdict.line, verdict.code = line_of(outcome.error, file)
            return verdict
        if verdict.status == "passed":
            _hold_against(verdict, exercise, case, outcome, expected[index], file)
    notice(len(exercise.cases))
    if verdict.status == "passed":
        verdict.checked = exercise.checked
    else:
        mistake = diagnose(exercise, outcomes, expected)
        if mistake is not None:
            verdict.mistake, verdict.diagnosis = mistake.name, mistake.says
    return verdict


def right_outcomes(exercise: Exercise) -> list[Outcome]:
    """What the exercise's own answer gives on each case. Raises what that answer raises: it must not."""
    outcomes = [attempt(exercise, exercise.answer, case.arguments()) for case in exercise.cases]
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return outcomes


def attempt(exercise: Exercise, answer: Callable[..., Any], arguments: dict[str, Any]) -> Outcome:
    """Run an answer once, whatever it raises, and leave PyTorch's global settings as they were."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    kept = dict(arguments)  # `run` may take things out of its mapping
    try:
        return Outcome(value=exercise.run(answer, arguments), arguments=kept)
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: the answer is a stranger's code
        return Outcome(error=out_of_kernel(error), arguments=kept)
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


def why_no_kernels() -> str:
    """Why Triton kernels cannot run here, in a sentence; "" if they can."""
    from dsv2.course.kernels import why_not  # loads Triton, which few exercises need

    return why_not()


def out_of_kernel(error: BaseException) -> BaseException:
    """The exception that a kernel's line raised, which Triton's interpreter wraps in one of its own."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _hold_against(
    verdict: Verdict, exercise: Exercise, case: Case, outcome: Outcome, right: Outcome, file: str
) -> None:
    """Note in the verdict what an outcome has wrong, if anything."""
    if outcome.error is not None:
        verdict.status, verdict.case = "raised", case.says
        verdict.found = describe_error(outcome.error)
        verdict.line, verdict.code = line_of(outcome.error, file)
        return
    found = compare(outcome.value, right.value, exercise.axes, exercise.tolerance)
    if not found:
        for name, value in right.arguments.items():
            changed = _changed(outcome.arguments.get(name), value, exercise.tolerance)
            if changed:
                found = [
                    ("in place", f"the result is right, but the argument `{name}` was changed on the way"),
                    (
                        "why",
                        "whoever calls the function goes on using what it passed; make a new tensor instead",
                    ),
                    *changed[:1],
                ]
                break
    if found:
        verdict.status, verdict.case, verdict.found = "failed", case.says, found


def _changed(after: Any, right: Any, tolerance: float) -> Lines:
    """How an argument differs from what the right answer leaves behind; other objects are not looked into."""
    return compare(after, right, (), tolerance) if _comparable(right) else []


def _comparable(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_comparable(item) for item in value)
    if isinstance(value, Mapping):
        return all(_comparable(item) for item in value.values())
    return isinstance(value, (Tensor, numbers.Number, str, type(None)))


def diagnose(
    exercise: Exercise, outcomes: Sequence[Outcome], expected: Sequence[Outcome] | None = None
) -> Mistake | None:
    """The mistake whose outcomes are these in every case, or else the only one that explains each wrong case.

    An answer may be half mended, or write a mistake so that some case hides it: where it is right, nothing
    needs an explanation. One with two mistakes gets the only one that explains its first wrong case, which is
    the one that is shown. None if no mistake does, or several do. expected: the right outcomes, if known.
    """
    expected = right_outcomes(exercise) if expected is None else expected
    wrong = [not alike(exercise, *pair) for pair in zip(outcomes, expected, strict=True)]
    explain, begin = [], []
    for mistake in exercise.mistakes:
        same = [
            alike(exercise, outcome, attempt(exercise, mistake.answer, case.arguments()))
            for case, outcome in zip(exercise.cases, outcomes, strict=True)
        ]
        if all(same):
            return mistake
        if any(wrong) and all(s for s, w in zip(same, wrong) if w):
            explain.append(mistake)
        if any(wrong) and same[wrong.index(True)]:
            begin.append(mistake)
    found = explain or begin
    return found[0] if len(found) == 1 else None


def alike(exercise: Exercise, one: Outcome, other: Outcome) -> bool:
    """Whether two outcomes are the same: equal values and arguments, or the same exception."""
    if one.error is not None or other.error is not None:
        return one.error is not None and other.error is not None and raised(one.error) == raised(other.error)
    if compare(one.value, other.value, exercise.axes, exercise.tolerance):
        return False
    return not any(
        _changed(one.arguments.get(name), value, exercise.tolerance)
        for name, value in other.arguments.items()
    )


# -------------------------------------------------------------------------------------------------- comparing


def compare(actual: Any, expected: Any, axes: Any = (), tolerance: float = 1e-5, where: str = "") -> Lines:
    """What an answer's result has other than the right one, as (label, text); empty if they are equal.

    axes: names of the expected tensor's dimensions; where: the part of a larger result that this is.
    """
    try:
        found = _compare(actual, expected, axes, tolerance)
    except Exception as error:  # a result may be any object, with any __eq__
        found = [("your result", f"{kind(actual)}; comparing it raised {type(error).__name__}: {error}")]
    return [("where", where), *found] if found and where and found[0][0] != "where" else found


def _compare(actual: Any, expected: Any, axes: Any, tolerance: float) -> Lines:
    if isinstance(expected, Tensor):
        return _compare_tensors(actual, expected, _names(axes, expected.ndim), tolerance)
    if isinstance(expected, bool) or expected is None:
        wanted = f"{expected}"
        same = type(actual) is type(expected) and actual == expected
        return [] if same else [("expected", wanted), ("yours", _short(actual))]
    if isinstance(expected, numbers.Number):
        return _compare_numbers(actual, expected, tolerance)
    if isinstance(expected, str):
        return _compare_strings(actual, expected)
    if isinstance(expected, (tuple, list)):
        if not isinstance(actual, (tuple, list)):
            return _kinds(actual, expected)
        if len(actual) != len(expected):
            return [("expected", f"{len(expected)} things"), ("yours", f"{len(actual)} of them")]
        per_item = len(axes) == len(expected) and not all(isinstance(axis, str) for axis in axes)
        for index, (mine, right) in enumerate(zip(actual, expected)):
            found = compare(
                mine, right, axes[index] if per_item else axes, tolerance, f"item {index} of the result"
            )
            if found:
                return found
        return []
    if isinstance(expected, Mapping):
        if not isinstance(actual, Mapping):
            return _kinds(actual, expected)
        if set(actual) != set(expected):
            return [("expected", f"the keys {_keys(expected)}"), ("yours", f"the keys {_keys(actual)}")]
        for key, right in expected.items():
            named = axes.get(key, ()) if isinstance(axes, Mapping) else axes
            # A key of several words is the check's own, and says enough.
            where = key if " " in str(key) else f"{key!r} of the result"
            found = compare(actual[key], right, named, tolerance, where)
            if found:
                return found
        return []
    if dataclasses.is_dataclass(expected):
        if type(actual) is not type(expected):
            return _kinds(actual, expected)
        fields = {f.name: getattr(expected, f.name) for f in dataclasses.fields(expected)}
        return compare({name: getattr(actual, name) for name in fields}, fields, axes, tolerance)
    return [] if actual == expected else [("expected", _short(expected)), ("yours", _short(actual))]


def _kinds(actual: Any, expected: Any) -> Lines:
    return [("expected", kind(expected)), ("yours", kind(actual) + _remark(actual, expected))]


def _remark(actual: Any, expected: Any) -> str:
    if actual is None:
        return " (is there a return at the end?)"
    if isinstance(expected, numbers.Number) and isinstance(actual, Tensor) and actual.numel() == 1:
        return " (.item() makes a number of it)"
    if callable(actual) and not isinstance(actual, Tensor):
        return " (was it meant to be called?)"
    return ""


def _keys(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(sorted(map(str, mapping))) or "none"


def kind(value: Any) -> str:
    """What a value is, in words: "a tensor of shape (2, 5) and float32", "a tuple of 2"."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {_dtype(value)}"
    if value is None:
        return "None"
    if isinstance(value, (tuple, list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, (bool, int, float, complex, str)):
        return f"the {type(value).__name__} {_short(value)}"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _short(value: Any) -> str:
    if isinstance(value, (Tensor, tuple, list, dict)):
        return kind(value)
    try:
        text = repr(value)
    except Exception:
        text = f"an object of {type(value).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."


def _names(axes: Any, dimensions: int) -> list[str]:
    """The names of a tensor's dimensions; "axis 0", ... where none are given for that many."""
    named = (
        isinstance(axes, (tuple, list)) and len(axes) == dimensions and all(isinstance(a, str) for a in axes)
    )
    return list(axes) if named else [f"axis {index}" for index in range(dimensions)]


def _shape(tensor: Tensor, names: Sequence[str]) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in zip(names, tensor.shape))
    return f"shape {tuple(tensor.shape)}" + (f" ({sizes})" if sizes and not sizes.startswith("axis") else "")


def _compare_tensors(actual: Any, expected: Tensor, names: Sequence[str], tolerance: float) -> Lines:
    if not isinstance(actual, Tensor):
        return _kinds(actual, expected)
    if actual.shape != expected.shape:
        found = [("expected", _shape(expected, names)), ("yours", f"shape {tuple(actual.shape)}")]
        if sorted(actual.shape) == sorted(expected.shape):
            found.append(
                ("so", "the sizes are right and stand in another order: an axis is in the wrong place")
            )
        elif actual.numel() == expected.numel():
            found.append(("so", "there are as many numbers as expected, in another shape"))
        return found
    if actual.dtype != expected.dtype:
        return [("expected", f"numbers of {_dtype(expected)}"), ("yours", f"numbers of {_dtype(actual)}")]
    mine, right = actual.detach().cpu(), expected.detach().cpu()
    if expected.is_floating_point() or expected.is_complex():
        wide = torch.complex128 if expected.is_complex() else torch.float64
        mine, right = mine.to(wide), right.to(wide)
        error = (mine - right).abs()
        bad = ~torch.isclose(mine, right, rtol=tolerance, atol=tolerance, equal_nan=True)
    else:
        bad = mine != right
        error = (mine.double() - right.double()).abs()
    if not bad.any():
        return []
    index = bad.nonzero()[0].tolist()
    place = _place(index, names)
    wanted, given = in_one_format(right[tuple(index)].item(), mine[tuple(index)].item())
    found = [
        ("first differs", place or "the one number there is"),
        ("expected", wanted),
        ("yours", given),
        ("differing", f"{int(bad.sum()):,} of {bad.numel():,} numbers"),
    ]
    nans = int(mine.isnan().sum()) - int(right.isnan().sum())
    if nans > 0:
        found.append(("NaN", f"{int(mine.isnan().sum()):,} of your numbers are NaN (0/0, or inf - inf)"))
    finite = error[bad & error.isfinite()]
    if len(finite):
        at = _place((error == finite.max()).nonzero()[0].tolist(), names)
        largest = in_one_format(float(f"{finite.max().item():.3g}"))[0]
        found.append(("largest error", largest + (f", at {at}" if at else "")))
    return found


def _place(index: Sequence[int], names: Sequence[str]) -> str:
    return ", ".join(
        f"{name}{':' if name.startswith('axis ') else ''} {at}" for name, at in zip(names, index)
    )


def in_one_format(*values: Any) -> list[str]:
    """Numbers as texts that can be compared: as many decimals for each, and as many as tell them apart."""
    real = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if not real or not any(isinstance(value, float) for value in values):
        return [f"{value:,}" if real else str(value) for value in values]
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    largest, smallest = max(sizes, default=1.0), min(sizes, default=1.0)
    # Six digits of the smaller one, unless it is so small that the larger one would get a tail of noise.
    decimals = min(5 - math.floor(math.log10(smallest)), max(6, 5 - math.floor(math.log10(largest))))
    for more in (0, 3, 6):
        if 1e-4 <= largest < 1e15:
            texts = [_decimal(value, max(decimals + more, 0)) for value in values]
        else:
            texts = [f"{value:.{6 + more}g}" for value in values]
        if len(set(texts)) == len(values):
            return texts
    return [repr(value) for value in values]


def _decimal(value: float, places: int) -> str:
    text = f"{value:,.{places}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _compare_numbers(actual: Any, expected: Any, tolerance: float) -> Lines:
    if isinstance(actual, bool) or not isinstance(actual, numbers.Number):
        wanted = "a whole number" if isinstance(expected, int) else "a number"
        return [
            ("expected", f"{wanted}, {in_one_format(expected)[0]}"),
            ("yours", kind(actual) + _remark(actual, expected)),
        ]
    if isinstance(expected, int) and isinstance(actual, int):
        same = actual == expected
    elif isinstance(expected, int):
        same = actual == expected  # 1024.0 will do for 1024, 1023.9999 will not
    elif isinstance(expected, float) and math.isnan(expected):
        same = actual != actual
    else:
        same = actual == expected or abs(actual - expected) <= tolerance * (1 + abs(expected))
    if same:
        return []
    wanted, given = in_one_format(expected, actual)
    found = [("expected", wanted), ("yours", given)]
    try:
        ratio = actual / expected
        if 1e-4 < ratio < 1e4:
            found.append(("so", f"yours is {ratio:.6g} times what is expected"))
    except (ArithmeticError, TypeError, ValueError):  # zero, complex, or too large
        pass
    return found


def _compare_strings(actual: Any, expected: str) -> Lines:
    if not isinstance(actual, str):
        return _kinds(actual, expected)
    if actual == expected:
        return []
    pairs = enumerate(zip(actual, expected))
    at = next((i for i, (mine, right) in pairs if mine != right), min(len(actual), len(expected)))
    found = [("expected", _short(expected)), ("yours", _short(actual))]
    return [*found, ("first differs", f"character {at}")] if at else found  # else one sees it


# ------------------------------------------------------------------------------------------------- exceptions


def raised(error: BaseException) -> str:
    """An exception's type and message: "ValueError: the cache is full"."""
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be shown)"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def describe_error(error: BaseException) -> Lines:
    """An exception in words: its type and message, and what it means where the type alone does not say."""
    text = raised(error)
    if len(text) > LONGEST:
        text = text[:LONGEST] + " ..."
    meaning = {
        SystemExit: "your code asked Python to end",
        KeyboardInterrupt: "your code interrupted itself",
        RecursionError: "the function calls itself without an end",
        EOFError: "a check has no keyboard: input() gets nothing",
    }.get(type(error))
    return [("raised", text), *([("that is", meaning)] if meaning else [])]


def line_of(error: BaseException, file: str) -> tuple[int, str]:
    """The last line of `file` that an exception passed through, and its text; (0, "") if there is none."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno or 0, (error.text or "").strip()
    try:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    except Exception:
        return 0, ""
    return (frames[-1].lineno or 0, frames[-1].line or "") if frames else (0, "")
