"""The exercises of every chapter, and the engine that checks them, on a toy chapter of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import functools
import inspect
import io
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import dsv2
from dsv2.course import board, chapters, commands, mine, page, show, stubs, watch, worker
from dsv2.course.folders import HERE, ROOT, Folders
from dsv2.course.judge import alike, attempt, compare, diagnose, in_one_format, judge, right_outcomes
from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.course.verdict import Verdict
from dsv2.kernels.backend import triton
from dsv2.moe.routing import allowed_experts


def loaded() -> dict[Path, tuple[Exercise, ...]]:
    """The exercises of the chapters that can be loaded; the first test below tells of the others."""
    found = {}
    for path in chapters.find().values():
        with contextlib.suppress(Exception):
            found[path] = chapters.load(path)
    return found


def possible_here(exercise: Exercise):
    return pytest.mark.skipif(exercise.needs_triton and triton is None, reason="Triton is not installed")


CHAPTERS = loaded()
EXERCISES = [
    pytest.param(path, exercise, id=exercise.number, marks=possible_here(exercise))
    for path, all_ in CHAPTERS.items()
    for exercise in all_
]
each_exercise = pytest.mark.parametrize("path, exercise", EXERCISES)
each_chapter = pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in CHAPTERS])


def run_text(text: str, path: Path) -> dict:
    """The names that a text defines, as a file of that path."""
    module = types.ModuleType(f"exercise_{path.stem}")
    sys.modules[module.__name__] = module
    exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def generated(path: Path) -> str:
    solution = HERE.solution(path)
    return stubs.stub_text(stubs.read(solution), CHAPTERS[path], solution.name)


@functools.cache
def solved(path: Path) -> dict:
    """What a chapter's solutions define."""
    return run_text(stubs.read(HERE.solution(path)), HERE.solution(path))


# ---------------------------------------------------------------------------- every exercise of every chapter


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in chapters.find().values()])
def test_a_chapter_can_be_loaded(path):
    assert chapters.load(path)


@each_exercise
def test_an_exercise_is_complete(path, exercise):
    assert exercise.chapter == path.stem[1:3] and re.fullmatch(r"\d\d\.[1-9]\d?", exercise.number)
    assert exercise.title and exercise.checked and exercise.name.isidentifier()
    assert exercise.difficulty in (1, 2, 3) and 1 <= exercise.minutes <= 60
    assert len(exercise.hints) == 3 and all(hint.strip() for hint in exercise.hints)
    assert len(set(exercise.hints)) == 3
    assert len(exercise.cases) >= 1 and all(case.says for case in exercise.cases)
    names = [mistake.name for mistake in exercise.mistakes]
    assert len(names) >= 4 and len(set(names)) == len(names)
    says = [mistake.says for mistake in exercise.mistakes]
    assert len(set(says)) == len(says) and all(len(sentence) > 20 for sentence in says)
    assert exercise.given is None or exercise.given in names
    for case in exercise.cases:
        first, second = case.arguments(), case.arguments()
        assert first.keys() == second.keys()
        for name, value in first.items():
            if isinstance(value, (torch.Tensor, int, float, str, list, tuple)):
                assert not compare(value, second[name], (), 0.0), (
                    f"{case.says}: {name} differs from call to call"
                )


@each_exercise
def test_the_solution_passes_and_no_diagnosis_fires_on_it(path, exercise):
    verdict = judge(exercise, solved(path)[exercise.name], str(HERE.solution(path)))
    assert verdict.status == "passed", show.verdict_card(verdict, board.Entry())
    outcomes = [attempt(exercise, solved(path)[exercise.name], case.arguments()) for case in exercise.cases]
    assert diagnose(exercise, outcomes) is None
    for outcome, right in zip(outcomes, right_outcomes(exercise), strict=True):
        assert alike(exercise, outcome, right)  # the package's own function, where it has one


@each_exercise
def test_every_mistake_is_rejected_with_its_own_diagnosis(path, exercise):
    expected = right_outcomes(exercise)
    outcomes = {
        mistake.name: [attempt(exercise, mistake.answer, case.arguments()) for case in exercise.cases]
        for mistake in exercise.mistakes
    }
    for mistake in exercise.mistakes:
        verdict = judge(exercise, mistake.answer, expected=expected)
        assert verdict.status in ("failed", "raised"), f"{mistake.name!r} is taken for right"
        assert verdict.mistake == mistake.name and verdict.diagnosis == mistake.says
        twins = [
            other
            for other, results in outcomes.items()
            if other != mistake.name
            and all(alike(exercise, a, b) for a, b in zip(outcomes[mistake.name], results, strict=True))
        ]
        assert not twins, f"{mistake.name!r} cannot be told from {twins}"


@each_exercise
def test_the_stub_is_not_started_or_holds_the_given_bug(path, exercise):
    stub = run_text(generated(path), HERE.exercise(path))
    verdict = judge(exercise, stub[exercise.name])
    if exercise.given is None:
        assert verdict.status == "not started"
    else:
        assert verdict.status == "failed" and verdict.mistake == exercise.given


@each_exercise
def test_what_an_exercise_replaces_is_there_and_called_alike(path, exercise):
    for place in exercise.replaces:
        holder, name = mine._holder(place)
        theirs = inspect.signature(getattr(holder, name)).parameters.values()
        yours = inspect.signature(solved(path)[exercise.name]).parameters.values()
        assert [(p.name, p.kind) for p in yours] == [(p.name, p.kind) for p in theirs]
        assert [p.default for p in yours] == [p.default for p in theirs]


@each_chapter
def test_a_chapter_s_stub_is_up_to_date(path):
    stub = stubs.read(HERE.exercise(path))
    why = stubs.outdated(stub, generated(path), exactly=os.environ.get("DSV2_PRISTINE") == "1")
    assert not why, f"{HERE.exercise(path).name}: {why}; run: python3 course.py build-exercises"


@each_chapter
def test_a_chapter_s_exercises_are_numbered_in_order(path):
    exercises = CHAPTERS[path]
    assert [exercise.number for exercise in exercises] == [
        f"{path.stem[1:3]}.{count}" for count in range(1, len(exercises) + 1)
    ]
    text = stubs.read(HERE.solution(path))
    assert list(stubs.parts(text)) == [stubs.TOP, *(exercise.number for exercise in exercises)]
    assert sum(len(exercise.mistakes) >= 4 for exercise in exercises) >= 3
    assert any(exercise.given for exercise in exercises), "a chapter has at least one bug hunt"


@each_chapter
def test_the_worked_numbers_are_true(path):
    found = doctest.DocTestFinder().find(types.SimpleNamespace(), path.stem, globs={})
    left_out = {exercise.name for exercise in CHAPTERS[path] if exercise.needs_triton and triton is None}
    for name, value in solved(path).items():
        if name not in left_out and getattr(value, "__module__", None) == solved(path)["__name__"]:
            found += doctest.DocTestFinder().find(value, name, module=False, globs=dict(solved(path)))
    runner, said = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE), io.StringIO()
    for test in found:
        runner.run(test, out=said.write)
    assert not runner.failures, said.getvalue()
    with_numbers = {test.name.partition(".")[0] for test in found if test.examples}
    lacking = {exercise.name for exercise in CHAPTERS[path] if not exercise.given} - with_numbers - left_out
    assert not lacking, f"no worked number in {lacking}"


def test_the_model_runs_on_the_solutions():
    swapped = {
        place: solved(path)[exercise.name]
        for path, exercises in CHAPTERS.items()
        for exercise in exercises
        for place in exercise.replaces
    }
    torch.manual_seed(0)
    model = dsv2.DeepSeekV2(dsv2.DSV2Config.preset("tiny")).eval()
    tokens = torch.randint(0, model.cfg.vocab_size, (2, 7))
    with torch.no_grad():
        reference = model(tokens).logits
        try:
            mine.swap(swapped)
            logits = model(tokens).logits
        finally:
            mine.restore()
        assert torch.equal(model(tokens).logits, reference)
    # Float32 sums in another order, through a few layers.
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)


def test_a_check_loads_no_more_than_it_needs():
    code = (
        "import sys; from dsv2.course import chapters, worker\n"
        "for path in chapters.find().values(): chapters.load(path)\n"
        "print([name for name in ('matplotlib', 'transformers', 'IPython') if name in sys.modules])"
    )
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ended.stdout.strip() == "[]", ended.stderr


# ---------------------------------------------------------------------------------------------- a toy chapter

TOY = """
import torch
from dsv2.course.spec import Case, Exercise, Mistake

def double(x):
    return 2 * x

def numbers(rows, columns):
    return {"x": torch.arange(1.0, 1 + rows * columns).reshape(rows, columns)}

def exercise(number, name, **more):
    return Exercise(
        number=number, name=name, title=f"twice as much, {name}", difficulty=1, minutes=5, answer=double,
        cases=(Case("2 rows of 3", lambda: numbers(2, 3)), Case("4 rows of 5", lambda: numbers(4, 5))),
        mistakes=(
            Mistake("squared", "This is the square. Twice is not the square.", lambda x: x * x),
            Mistake("left alone", "This is the input. Nothing has happened to it.", lambda x: x),
            Mistake("transposed", "This is right but transposed. Rows are columns.", lambda x: (2 * x).T),
            Mistake("half", "This is half as much. Twice is more.", lambda x: x / 2),
        ),
        hints=("What is twice?", "Look at the √ sign → no.", "x\\n  + x"), checked="twice of everything",
        axes=("row", "column"), **more,
    )

EXERCISES = tuple(exercise(f"01.{i}", name, **more) for i, (name, more) in enumerate(NAMES, 1))
"""
PLAIN = [("double", {}), ("other", {}), ("hunt", {"given": "squared"})]


def toy_solution(names: list[tuple[str, dict]]) -> str:
    lines = ['"""A toy chapter."""', "", "import torch", "", "FACTOR = 2", ""]
    for count, (name, more) in enumerate(names, 1):
        lines += ["", f"# exercise 01.{count}", f"def {name}(x):", f'    """Twice x: {name}(3) is 6."""']
        lines += ["    # <solution>", "    # Twice is the sum with itself.", "    return FACTOR * x"]
        if "given" in more:
            lines += ["    # <given>", "    #| y = x", "    #| return x * y", "    # </given>"]
        lines += ["    # </solution>", ""]
    return "\n".join(lines)


def make_toy(folder: Path, names: list[tuple[str, dict]]) -> Folders:
    folders = Folders(folder, folder / "chapters")
    for name in ("chapters", "solutions", "exercises"):
        (folder / name).mkdir(parents=True)
    (folder / "chapters/c01_toy.py").write_text(f"NAMES = {names!r}\n{TOY}", encoding="utf-8")
    (folder / "solutions/ex01_toy.py").write_text(toy_solution(names), encoding="utf-8")
    assert commands.main(["build-exercises"], folders) == 0
    return folders


@pytest.fixture
def toy(tmp_path, capsys) -> Folders:
    """A course with one chapter: 01.1 double, 01.2 other, 01.3 hunt (a bug hunt)."""
    folders = make_toy(tmp_path / "a course", PLAIN)
    capsys.readouterr()
    return folders


@pytest.fixture
def file(toy) -> Path:
    return toy.home / "exercises/ex01_toy.py"


UNWRITTEN = (
    '    raise NotImplementedError("exercise 01.{0}: write this, then run: python3 course.py check 01.{0}")'
)


def answer_with(file: Path, number: int, code: str) -> None:
    """Write a learner's code in the place of a stub's raise."""
    text = stubs.read(file)
    assert UNWRITTEN.format(number) in text
    stubs.write(file, text.replace(UNWRITTEN.format(number), code))


def passed(toy: Folders, number: str, name: str) -> None:
    """Note an exercise of the toy as passed with the code it has now."""
    source = stubs.source_digest(stubs.read(toy.home / "exercises/ex01_toy.py"), name)
    board.note(Verdict(number, name, "", "passed", 2, source=source), toy)


# ----------------------------------------------------------------------------------------------- making stubs


def test_a_stub(toy, file):
    text = file.read_text(encoding="utf-8")
    assert text.startswith(
        '"""A toy chapter."""\n\nimport torch\n\nFACTOR = 2\n\n\n# exercise 01.1: twice as'
    )
    assert '# check: python3 course.py check 01.1     in a notebook: check("01.1")' in text
    assert UNWRITTEN.format(1) in text and UNWRITTEN.format(3) not in text
    assert "    y = x\n    return x * y\n" in text
    for never in ("FACTOR * x", "<solution>", "<given>", "#|", "sum with itself"):
        assert never not in text
    assert stubs.untouched(text, "01.1") and not stubs.outdated(text, text, exactly=True)
    assert stubs.recorded(text).keys() == {"", "file", "01.1", "01.2", "01.3"}


def test_a_solution_for_reading(toy):
    text = stubs.read(toy.home / "solutions/ex01_toy.py")
    assert stubs.solved(text, "01.3") == (
        'def hunt(x):\n    """Twice x: hunt(3) is 6."""\n'
        "    # Twice is the sum with itself.\n    return FACTOR * x\n"
    )


@pytest.mark.parametrize(
    "old, new, why",
    [
        ("    # </solution>\n\n\n# exercise 01.2", "# exercise 01.2", "begins inside a region"),
        ("    # </solution>", "    # <solution>", "not in another region"),
        ("    # <solution>\n", "", "</solution> without <solution>"),
        ("# exercise 01.2", "# exercise 01.7", "no exercise 01.7"),
        ("# exercise 01.2", "# exercise 01.1", "is there twice"),
        ("# exercise 01.2\n", "", "01.2 has no <solution>"),
        ("    #| y = x\n", "    y = x\n", "begins with #|"),
        ("    # </given>\n", "", "begins with #|"),
        ("def other", "def another", "does not define other"),
        ("    # <given>\n    #| y = x\n    #| return x * y\n    # </given>\n", "", "go together"),
        ("FACTOR = 2\n", "# <solution>\n", "belongs below a line"),
    ],
)
def test_a_badly_marked_solution(toy, capsys, old, new, why):
    source = toy.home / "solutions/ex01_toy.py"
    before = stubs.read(toy.home / "exercises/ex01_toy.py")
    assert old in source.read_text(encoding="utf-8")
    source.write_text(source.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    assert commands.main(["build-exercises"], toy) == 1
    said = capsys.readouterr().err
    assert why in said and "ex01_toy.py" in said
    assert stubs.read(toy.home / "exercises/ex01_toy.py") == before


def test_a_region_in_each_method_of_a_class():
    text = (
        "# exercise 01.1\nclass Two:\n    def a(self):\n        # <solution>\n        return 1\n"
        "        # </solution>\n\n    def b(self):\n        x = 2\n        # <solution>\n        return x\n"
        "        # </solution>\n"
    )
    exercise = Exercise("01.1", "Two", "two", 1, 5, dict, (), (), ("", "", ""), "")
    stub = stubs.stub_text(text, [exercise], "toy.py")
    assert stub.count('        raise NotImplementedError("exercise 01.1: write') == 2 and "x = 2" in stub


def change_the_course(toy: Folders) -> None:
    """Another import, and another docstring in every exercise."""
    source = toy.home / "solutions/ex01_toy.py"
    text = source.read_text(encoding="utf-8").replace("Twice x", "Two times x")
    source.write_text(text.replace("import torch", "import math\nimport torch"), encoding="utf-8")


def test_building_again_keeps_what_a_learner_changed(toy, file, capsys):
    answer_with(file, 1, "    return x + x  # mine")
    assert commands.main(["build-exercises"], toy) == 0
    assert "up to date; kept as you have it: 01.1" in capsys.readouterr().out
    change_the_course(toy)
    stub = stubs.stub_text(
        stubs.read(toy.home / "solutions/ex01_toy.py"), chapters.load(toy.chapters / "c01_toy.py"), "x"
    )
    assert stubs.outdated(stubs.read(file), stub, exactly=False)
    assert commands.main(["build-exercises"], toy) == 0
    assert "written; kept as you have it: 01.1" in capsys.readouterr().out
    text = stubs.read(file)
    assert "return x + x  # mine" in text and text.count("Two times x") == 2 and text.count("Twice x") == 1
    assert "import math" in text
    assert not stubs.outdated(text, stub, exactly=False) and stubs.outdated(text, stub, exactly=True)
    assert commands.main(["build-exercises"], toy) == 0
    assert stubs.read(file) == text


def test_building_again_keeps_a_learner_s_imports_and_adds_new_ones(toy, file):
    stubs.write(file, stubs.read(file).replace("import torch", "import torch\nimport string"))
    change_the_course(toy)
    assert commands.main(["build-exercises"], toy) == 0
    text = stubs.read(file)
    assert "import string" in text and "import math" in text and text.count("import torch") == 1


def test_building_again_leaves_a_file_that_cannot_be_told_apart(toy, file, capsys):
    lines = [line for line in stubs.read(file).splitlines() if not line.startswith("# exercise 01.2")]
    stubs.write(file, "\n".join(lines) + "\n")
    before = file.read_bytes()
    assert commands.main(["build-exercises"], toy) == 1
    assert "lacks the line '# exercise 01.2: ...'" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_windows_line_ends_stay(toy, file):
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    change_the_course(toy)
    assert commands.main(["build-exercises"], toy) == 0
    content = file.read_bytes()
    assert b"Two times x" in content and content.count(b"\n") == content.count(b"\r\n")


def test_source_digest_follows_what_a_function_uses():
    text = (
        "import math\nTWO = 2\ndef helper(x):\n    return TWO * x\n"
        "def f(x):\n    '''Doc.'''\n    return helper(x)\n"
    )
    first = stubs.source_digest(text, "f")
    assert first and first != stubs.source_digest(text, "helper")
    for same in (
        ("Doc.", "Other."),
        ("import math\n", ""),
        ("    return helper(x)", "    # why\n    return helper( x )"),
    ):
        assert stubs.source_digest(text.replace(*same), "f") == first
    for other in (("TWO = 2", "TWO = 3"), ("TWO * x", "x * TWO"), ("return helper(x)", "return x")):
        assert stubs.source_digest(text.replace(*other), "f") != first
    assert stubs.source_digest("def f(:", "f") == stubs.source_digest(text, "g") == ""


# ---------------------------------------------------------------------------------------------------- judging


@pytest.fixture
def double(toy) -> Exercise:
    return chapters.load(toy.chapters / "c01_toy.py")[0]


def found(verdict: Verdict) -> dict[str, str]:
    return dict(verdict.found)


def test_a_right_answer(double):
    seen = []
    verdict = judge(double, lambda x: x + x, notice=seen.append)
    assert verdict.status == "passed" and verdict.checked == "twice of everything" and seen == [0, 1, 2]


def test_a_wrong_number_is_placed_by_its_axes(double):
    def answer(x):
        y = 2 * x
        y[1, 2] += 0.5
        y[-1, -1] -= 3
        return y

    verdict = judge(double, answer)
    assert verdict.status == "failed" and verdict.case == "2 rows of 3" and not verdict.mistake
    assert verdict.found == [
        ("first differs", "row 1, column 2"),
        ("expected", "12"),
        ("yours", "9.5"),
        ("differing", "1 of 6 numbers"),
        ("largest error", "2.5, at row 1, column 2"),
    ]


def test_a_mistake_is_named_if_it_alone_explains_every_wrong_case(double):
    assert judge(double, lambda x: x * x).diagnosis == "This is the square. Twice is not the square."
    half_mended = judge(double, lambda x: x * x if len(x) == 2 else 2 * x)
    assert half_mended.status == "failed" and half_mended.mistake == "squared"
    two_mistakes = judge(double, lambda x: x * x if len(x) == 2 else x / 2)
    assert two_mistakes.status == "failed" and two_mistakes.mistake == "squared", "that of the case shown"
    neither = judge(double, lambda x: 3 * x if len(x) == 2 else x / 2)
    assert neither.status == "failed" and not neither.mistake
    twins = dataclasses.replace(
        double,
        mistakes=(
            Mistake("a", "The first is wrong. Nothing else is.", lambda x: x * x if len(x) == 2 else x),
            Mistake("b", "The first is wrong. So is the second.", lambda x: x * x if len(x) == 2 else -x),
        ),
    )
    assert not judge(twins, lambda x: x * x if len(x) == 2 else 2 * x).mistake, "either would explain it"
    assert not judge(twins, lambda x: x * x if len(x) == 2 else 3 * x).mistake, "either would explain case 1"


@pytest.mark.parametrize(
    "expected, yours, said",
    [
        (327680.0, 2621440, ["327,680", "2,621,440"]),
        (2.62144, 2621440.0, ["2.62144", "2,621,440"]),
        (768.0, 768.5, ["768", "768.5"]),
        (12, 9.5, ["12", "9.5"]),
        (1024, 1023, ["1,024", "1,023"]),
        (0.1, 0.10000001, ["0.1", "0.10000001"]),
        (3e-7, -2e-8, ["3e-07", "-2e-08"]),
        (float("inf"), 2.5, ["inf", "2.5"]),
        (True, 2.5, ["True", "2.5"]),
    ],
)
def test_numbers_are_shown_in_one_format(expected, yours, said):
    assert in_one_format(expected, yours) == said


def test_where_texts_differ_is_said_only_if_it_helps():
    assert compare("no error", "ValueError") == [("expected", "'ValueError'"), ("yours", "'no error'")]
    assert compare("a b c", "a b d")[-1] == ("first differs", "character 4")


@pytest.mark.parametrize(
    "answer, expected, yours",
    [
        (lambda x: None, "a tensor of shape (2, 3) and float32", "None (is there a return at the end?)"),
        (lambda x: x.tolist(), "a tensor of shape (2, 3) and float32", "a list of 2"),
        (lambda x: x.double, "a tensor of shape (2, 3) and float32", "(was it meant to be called?)"),
        (lambda x: (2 * x).sum(0), "shape (2, 3) (row 2, column 3)", "shape (3,)"),
        (lambda x: (2 * x).double(), "numbers of float32", "numbers of float64"),
        (lambda x: "twelve", "a tensor of shape (2, 3) and float32", "the str 'twelve'"),
    ],
)
def test_a_result_of_another_kind(double, answer, expected, yours):
    verdict = judge(double, answer)
    assert verdict.status == "failed"
    assert found(verdict)["expected"] == expected and yours in found(verdict)["yours"]


def test_swapped_axes_are_said_to_be_swapped(double):
    verdict = judge(double, lambda x: (2 * x).T)
    assert "another order" in found(verdict)["so"] and verdict.mistake == "transposed"


def test_an_exception_is_taken_for_a_known_one_only_if_it_is_the_same(toy):
    def broken(x):
        return torch.ones(9) + x

    exercise = dataclasses.replace(
        chapters.load(toy.chapters / "c01_toy.py")[0],
        mistakes=(Mistake("misshapen", "This adds nine numbers. They do not fit.", broken),),
    )
    assert judge(exercise, lambda x: torch.ones(9) + x).mistake == "misshapen"
    other = judge(exercise, lambda x: x @ x)
    assert other.status == "raised" and not other.mistake


def test_nan(double):
    verdict = judge(double, lambda x: torch.full_like(x, torch.nan))
    assert "6 of your numbers are NaN" in found(verdict)["NaN"] and found(verdict)["yours"] == "nan"
    right = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    assert not compare(right.clone(), right)
    assert compare(torch.tensor([1.0, 0.0, torch.inf, -torch.inf]), right)
    assert compare(torch.tensor([1.0, torch.nan, -torch.inf, -torch.inf]), right)


def test_a_changed_argument_is_told(double):
    def in_place(x):
        x *= 2
        return x

    def result_right_but_input_cleared(x):
        y = 2 * x
        x.zero_()
        return y

    for answer in (in_place, result_right_but_input_cleared):
        verdict = judge(double, answer)
        assert verdict.status == "failed" and "`x` was changed" in found(verdict)["in place"]


def test_an_argument_that_has_to_change():
    def fill(buffer, value):
        buffer[1:] = value
        return value

    exercise = Exercise(
        "09.1", "fill", "fill", 1, 5, fill,
        (Case("3 numbers", lambda: {"buffer": torch.zeros(3), "value": 4.0}),),
        (Mistake("one too many", "All.", lambda buffer, value: buffer.fill_(value) is None or value),),
        ("", "", ""), "",
    )  # fmt: skip
    assert judge(exercise, fill).status == "passed"
    assert judge(exercise, lambda buffer, value: value).status == "failed"
    assert judge(exercise, lambda buffer, value: float(buffer.fill_(value)[0])).mistake == "one too many"


def test_global_settings_of_an_answer_do_not_reach_the_next(double):
    def answer(x):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        return 2 * x

    assert judge(double, answer).status == "passed"
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "actual, expected, same",
    [
        (3, 3, True),
        (3.0, 3, True),
        (3.5, 3, False),
        (True, 1, False),
        (1, True, False),
        (torch.tensor(3), 3, False),
        (2**70, 2**70, True),
        (2**70 + 1, 2**70, False),
        (0.1 + 0.2, 0.3, True),
        (float("nan"), 0.3, False),
        (float("nan"), float("nan"), True),
        ("a", "a", True),
        ("a", 3, False),
        (None, None, True),
        ((1, 2), [1, 2], True),
        ((1, 2), (1, 2, 3), False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"b": 1}, {"a": 1}, False),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), True),
        (torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 2]), False),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.ones(2, device="meta"), torch.ones(2), False),
        (torch.ones(0, 3), torch.ones(0, 3), True),
        (torch.tensor(1.0 + 1e-7), torch.tensor(1.0), True),
        (torch.tensor([1j]), torch.tensor([-1j]), False),
    ],
)
def test_compare(actual, expected, same):
    assert (not compare(actual, expected)) == same


def test_a_part_of_a_result_is_named():
    right = {"keys": torch.zeros(2, 3), "length": 3}
    wrong = {"keys": torch.zeros(2, 3), "length": 4}
    assert compare(wrong, right)[0] == ("where", "'length' of the result")
    right, wrong = (torch.zeros(2), torch.zeros(2, 3)), (torch.zeros(2), torch.ones(2, 3))
    said = compare(wrong, right, (("a",), ("b", "c")))
    assert said[:2] == [("where", "item 1 of the result"), ("first differs", "b 0, c 0")]


def test_an_object_that_cannot_be_compared_is_no_pass():
    class Awkward:
        def __eq__(self, other):
            raise ValueError("no")

        __hash__ = None

        def __repr__(self):
            raise ValueError("neither")

    assert compare(Awkward(), "text") and compare(Awkward(), 3) and compare(Awkward(), None)
    assert compare(Awkward(), torch.ones(2)) and compare(Awkward(), Case("", dict))


# ----------------------------------------------------------------- learners' files, in a process of their own

HOSTILE = {
    "right": "return x + x",
    "prints": "print('\\n'.join(f'line {i}' for i in range(20000)))\n    return x * x",
    "raises": "y = x\n    return y @ x",
    "exits": "raise SystemExit('bye')",
    "interrupts": "raise KeyboardInterrupt",
    "recurses": "return recurses(x)",
    "closes": "import sys, os\n    sys.stdout.close()\n    os.closerange(0, 3)\n    return 2 * x",
    "asks": "return float(input('factor? ')) * x",
    "threads": "import threading\n    threading.Timer(99, print).start()\n    return 2 * x",
    "registers": "import atexit, time\n    atexit.register(time.sleep, 99)\n    return 2 * x",
    "unprintable": "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})()",
    "other": "import torch\n    torch.add = torch.manual_seed = print = None\n    return 2 * x",
    "quits": "import os\n    print('last words', flush=True)\n    os._exit(0)",
    "crashes": "import os, signal\n    os.kill(os.getpid(), getattr(signal, 'SIGSEGV', 11))",
    "hangs": "print('in the loop')\n    while x.shape[0] == 4:\n        pass\n    return 2 * x",
    "floods": "import itertools\n    for _ in itertools.count():\n        print('x' * 100000)",
    "last": "return 2 * x",
}


def test_whatever_a_learner_s_code_does(tmp_path, capsys):
    names = list(HOSTILE)
    folders = make_toy(tmp_path, [(name, {}) for name in names])
    file = folders.home / "exercises/ex01_toy.py"
    for count, code in enumerate(HOSTILE.values(), 1):
        answer_with(file, count, f"    {code}")
    before, files = file.read_bytes(), sorted(file.parent.iterdir())
    verdicts = {verdict.name: verdict for verdict in watch.verdicts(["01"], folders, seconds=2.0)}
    assert list(verdicts) == names
    assert file.read_bytes() == before and sorted(file.parent.iterdir()) == files

    for name in ("right", "closes", "threads", "registers", "other", "last"):
        assert verdicts[name].status == "passed", verdicts[name]
    assert verdicts["prints"].mistake == "squared" and verdicts["prints"].printed[-1] == "line 19999"
    assert len(verdicts["prints"].printed) <= watch.LINES_KEPT

    lines = before.decode().splitlines()
    raised = verdicts["raises"]
    assert raised.status == "raised" and raised.case == "2 rows of 3" and "RuntimeError" in raised.found[0][1]
    assert lines[raised.line - 1].strip() == raised.code == "return y @ x"
    assert found(verdicts["exits"])["raised"] == "SystemExit: bye" and verdicts["exits"].status == "raised"
    assert found(verdicts["interrupts"])["raised"] == "KeyboardInterrupt"
    assert found(verdicts["recurses"])["that is"] == "the function calls itself without an end"
    assert "no keyboard" in found(verdicts["asks"])["that is"]
    assert "cannot be shown" in found(verdicts["unprintable"])["raised"]

    assert verdicts["quits"].status == "died" and "exit status 0" in found(verdicts["quits"])["ended"]
    assert verdicts["quits"].printed[-1] == "last words"
    assert verdicts["crashes"].status == "died" and verdicts["crashes"].case == "2 rows of 3"
    assert verdicts["hangs"].status == "hung" and verdicts["hangs"].case == "4 rows of 5"
    assert "after 2 s" in found(verdicts["hangs"])["stopped"]
    assert verdicts["hangs"].printed[-1] == "in the loop"
    assert verdicts["floods"].status == "hung" and len("".join(verdicts["floods"].printed)) < 10_000
    for verdict in verdicts.values():
        card = show.verdict_card(verdict, board.note(verdict, folders))
        assert verdict.title in show.text(card, colour=False) and verdict.title in show.as_html(card)


@pytest.mark.parametrize(
    "text, status, case, label, said",
    [
        (
            "def double(x):\n    return (2 *\n",
            "raised",
            "reading the file",
            "raised",
            "SyntaxError: '(' was never",
        ),
        ("import torch\n1 / 0\n", "raised", "running the file", "raised", "ZeroDivisionError"),
        ("import no_such_thing\n", "raised", "running the file", "raised", "ModuleNotFoundError"),
        ("raise SystemExit\n", "raised", "running the file", "raised", "SystemExit"),
        ("x = 1\n", "missing", "", "missing", "defines no double"),
        ("double = 2\n", "missing", "", "missing", "not a function"),
        ("def double(x): return x\ndef double(): return 2\n", "raised", "2 rows", "raised", "TypeError"),
        ("\0", "raised", "reading the file|running the file", "raised", "null byte"),
        ("double = '\xff'\n".encode("latin-1"), "raised", "reading the file", "raised", "SyntaxError"),
        (None, "missing", "", "missing", "there is no file ex01_toy.py"),
    ],
)
def test_a_file_that_cannot_be_run(toy, file, double, text, status, case, label, said):
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    verdict = worker.LearnersFile(file).judged(double, lambda case: None, right_outcomes(double))
    assert verdict.status == status and re.match(case, verdict.case)
    assert said in found(verdict)[label]
    if isinstance(text, str) and text.startswith("def double(x):\n"):
        assert (verdict.line, verdict.code) == (2, "return (2 *")
    if isinstance(text, str) and "1 / 0" in text:
        assert (verdict.line, verdict.code) == (2, "1 / 0")


def test_a_learner_s_file_is_left_without_company(toy, file):
    worker.LearnersFile(file)
    assert [path.name for path in file.parent.iterdir()] == ["ex01_toy.py"]


COMMAND = """
import runpy, sys
sys.argv = ["course.py", *sys.argv[1:]]
try:
    runpy.run_path({file!r}, run_name="__main__")
except SystemExit as ended:
    print("torch loaded:", "torch" in sys.modules)
    raise
"""


def as_a_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    code = COMMAND.format(file=str(ROOT / "dsv2/course/__main__.py"))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=dict(os.environ, DSV2_IMPL="mine", **environment),
    )


def test_check_as_a_command(toy, file):
    answer_with(file, 1, "    return x + x")
    ended = as_a_command("check", "1", "--home", str(toy.home))
    assert ended.returncode == 1 and not ended.stderr
    assert "01.1 twice as much, double: passed\n  checked  twice of everything (2 cases)" in ended.stdout
    assert "01.2 twice as much, other: not started yet" in ended.stdout
    assert "01.3 twice as much, hunt: a bug hunt, not started yet" in ended.stdout
    assert "1 of 3 passed." in ended.stdout and "torch loaded: False" in ended.stdout
    assert "\033" not in ended.stdout
    entries = board.load(toy.progress)
    assert entries.keys() == {"01.1"} and entries["01.1"].passed


def test_an_unknown_number_as_a_command(toy):
    ended = as_a_command("check", "01.9", "--home", str(toy.home))
    assert ended.returncode == 2 and "chapter 01 has 01.1, 01.2, 01.3" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_console_that_knows_only_ascii(toy, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert commands.main(["hint", "01.2", "--level", "2"], toy) == 0
    assert b"Look at the sqrt sign -> no." in console.buffer.getvalue()


# ----------------------------------------------------------------------------------------- the other commands


@pytest.mark.parametrize(
    "asked, why",
    [
        ("02", "there are those of 01"),
        ("01.4", "has 01.1, 01.2, 01.3"),
        ("one", "write 02.3"),
        ("1.", "write 02.3"),
    ],
)
@pytest.mark.parametrize("word", ["hint", "solution", "reset", "progress"])
def test_unknown_numbers(toy, capsys, word, asked, why):
    assert commands.main([word, asked], toy) == 2
    assert why in capsys.readouterr().err


def test_no_chapters_at_all(tmp_path, capsys):
    (tmp_path / "chapters").mkdir()
    folders = Folders(tmp_path, tmp_path / "chapters")
    assert commands.main(["build-exercises"], folders) == 0 and commands.main(["progress"], folders) == 0
    assert "There are no exercises yet." in capsys.readouterr().out
    assert commands.main(["hint", "01.1"], folders) == 2
    assert "none yet" in capsys.readouterr().err


def test_each_call_shows_the_next_hint(toy, capsys):
    said = []
    for arguments in (["1.1"], ["01.1"], ["01.1"], ["01.1"], ["01.1", "--level", "1"]):
        assert commands.main(["hint", *arguments], toy) == 0
        said.append(capsys.readouterr().out)
    assert "hint 1 of 3, a question\n  What is twice?" in said[0] and "√" in said[1]
    assert "pseudocode\n\n  x\n    + x\n" in said[2] and said[2] == said[3]
    assert said[4] == said[0] and board.load(toy.progress)["01.1"].hints == 3


def test_a_solution_is_shown_after_passing_or_on_insistence(toy, file, capsys):
    assert commands.main(["solution", "01.1"], toy) == 1
    said = capsys.readouterr().out
    assert "FACTOR" not in said and "--insist" in said
    assert commands.main(["solution", "01.1", "--insist"], toy) == 0
    assert "    return FACTOR * x" in capsys.readouterr().out
    assert board.load(toy.progress)["01.1"].solution_seen
    answer_with(file, 2, "    return x + x")
    passed(toy, "01.2", "other")
    assert commands.main(["solution", "01.2"], toy) == 0
    assert not board.load(toy.progress)["01.2"].solution_seen


def test_the_board(toy, file, capsys):
    answer_with(file, 1, "    return x + x")
    passed(toy, "01.1", "double")
    board.note(Verdict("01.2", "other", "", "failed", 2), toy)
    board.note(Verdict("01.3", "hunt", "", "failed", 2, untouched=True), toy)
    board.note_hint("01.2", None, toy)
    assert commands.main(["progress"], toy) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 of 3 exercises done") and "01 toy: 1 of 3 done" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("    01.")]
    assert [row[5:] for row in rows] == [["[x]", "done", "5"], ["[-]", "tried", "1", "5"], ["[", "]", "5"]]
    stubs.write(file, stubs.read(file).replace("return x + x", "return 2 * x"))
    assert commands.main(["progress", "01"], toy) == 0
    assert "[~] changed since" in capsys.readouterr().out


def test_reset_keeps_the_learner_s_version(toy, file, capsys):
    pristine = stubs.read(file)
    answer_with(file, 1, "    return x + x  # first")
    answer_with(file, 2, "    return x + x  # second")
    mine_ = stubs.read(file)
    assert commands.main(["reset", "01.1"], toy) == 0
    said = capsys.readouterr().out
    kept = toy.home / said.split("kept: ")[1].strip()
    assert stubs.read(kept) == mine_
    assert "# second" in stubs.read(file) and UNWRITTEN.format(1) in stubs.read(file)
    assert commands.main(["reset", "01.1"], toy) == 0
    assert "nothing to put back" in capsys.readouterr().out
    assert commands.main(["reset", "01"], toy) == 0
    assert stubs.read(file) == pristine and len(list(toy.backup.iterdir())) == 2


def test_reset_of_a_file_without_its_headers(toy, file, capsys):
    file.write_text("def double(x):\n    return x +\n", encoding="utf-8")
    assert commands.main(["reset", "01.1"], toy) == 1
    assert "python3 course.py reset 01" in capsys.readouterr().err
    assert commands.main(["reset", "01"], toy) == 0
    assert UNWRITTEN.format(1) in stubs.read(file) and len(list(toy.backup.iterdir())) == 1
    file.unlink()
    assert commands.main(["reset", "01.1"], toy) == 0
    assert UNWRITTEN.format(1) in stubs.read(file)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'{"exercises": []}', b'{"exercises": null}', b"\xff\xfe", b"[" * 100_000,
        b'{"exercises": {"01.1": 3, "01.2": {"hints": "many", "tries": true, "passed": null}}}',
    ],
)  # fmt: skip
def test_damaged_progress(toy, content, capsys):
    toy.progress.write_bytes(content)
    assert commands.main(["progress"], toy) == 0
    assert board.note_hint("01.2", None, toy) == 1
    assert board.load(toy.progress)["01.2"] == board.Entry(hints=1)
    aside = toy.progress.with_name(".progress.json.damaged")
    assert aside.exists() == (b"many" not in content) and (
        not aside.exists() or aside.read_bytes() == content
    )


def test_progress_is_written_in_one_step(toy, monkeypatch):
    board.note_hint("01.1", 2, toy)
    before = toy.progress.read_bytes()

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(stubs.os, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        board.note_hint("01.1", 3, toy)
    assert toy.progress.read_bytes() == before
    assert [path.name for path in toy.progress.parent.glob(".*")] == [".progress.json"]


def test_passing_again_after_a_change_counts_no_tries(toy):
    board.note(Verdict("01.1", "double", "", "failed", 2), toy)
    board.note(Verdict("01.1", "double", "", "passed", 2, source="abc"), toy)
    board.note(Verdict("01.1", "double", "", "failed", 2), toy)
    assert board.load(toy.progress)["01.1"] == board.Entry(passed="abc", tries=1)
    assert json.loads(toy.progress.read_text(encoding="utf-8"))["exercises"]["01.1"]["tries"] == 1


# -------------------------------------------------------------------------------------------- how it is shown


def test_a_bug_hunt_does_not_give_its_bug_away(double):
    verdict = judge(double, lambda x: x * x)
    verdict.given = "squared"
    said = show.text(show.verdict_card(verdict, board.Entry()), colour=False)
    assert "the bug that was given is still there" in said and verdict.diagnosis not in said
    verdict.untouched = True
    said = show.text(show.verdict_card(verdict, board.Entry()), colour=False)
    assert "not started yet" in said and verdict.diagnosis not in said
    verdict.given, verdict.untouched = "half", False
    assert verdict.diagnosis in show.text(show.verdict_card(verdict, board.Entry()), colour=False).replace(
        "\n", " "
    )


def test_after_all_hints_the_solution_is_offered(double):
    verdict = judge(double, lambda x: x * 3)
    assert "hint 01.1" in show.verdict_card(verdict, board.Entry(hints=2)).closing
    assert "solution 01.1 --insist" in show.verdict_card(verdict, board.Entry(hints=3)).closing
    assert (
        'solution("01.1", insist=True)'
        in show.verdict_card(verdict, board.Entry(hints=3), "notebook").closing
    )


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_colour_only_where_it_is_wanted(monkeypatch):
    monkeypatch.setattr(show.os, "name", "posix")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    card = show.Card("Heading", "good")
    for stream, coloured in ((Terminal(), True), (io.StringIO(), False)):
        show.out(card, stream)
        assert ("\033[" in stream.getvalue()) == coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert not show.coloured(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not show.coloured(Terminal())


def test_html_shows_a_learner_s_text_as_text(double):
    verdict = Verdict("01.1", "double", "a < b", "raised", 2, found=[("raised", "ValueError: <script>")])
    html = show.verdict_card(verdict, board.Entry(), show.NOTEBOOK)._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "a &lt; b" in html


def test_in_a_notebook(toy, file, monkeypatch):
    import IPython
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: True)
    monkeypatch.setattr(IPython.display, "display", shown.append)
    answer_with(file, 1, "    return x * x")
    assert page.check("01", toy) is None
    assert [card.tone for card in shown] == ["bad", "open", "open"]
    assert "This is the square." in repr(shown[0]) and "This is the square." in shown[0]._repr_html_()
    assert 'hint("01.1")' in shown[1].closing.replace("01.2", "01.1")
    shown.clear()
    calls = (
        page.hint("01.1", folders=toy),
        page.hint("01.1", folders=toy),
        page.progress(folders=toy),
        page.solution("01.1", folders=toy),
        page.solution("01.1", insist=True, folders=toy),
        page.check("07.1", toy),
        page.hint("x", folders=toy),
        page.progress("09", folders=toy),
    )
    assert set(calls) == {None} and len(shown) == 8
    said = [repr(card) for card in shown]
    assert "hint 1 of 3" in said[0] and "hint 2 of 3" in said[1] and "0 of 3 exercises done" in said[2]
    assert "insist=True" in said[3] and "FACTOR * x" in said[4]
    assert "There are no exercises of chapter 07" in said[5]
    assert "not a number" in said[6] and "There are no exercises of chapter 09" in said[7]
    with pytest.raises(ValueError, match="level must be"):
        page.hint("01.1", 4, toy)


def test_outside_a_notebook_the_same_is_printed(toy, capsys):
    page.hint("01.1", folders=toy)
    assert "What is twice?" in capsys.readouterr().out


def test_the_names_that_notebooks_import():
    from dsv2 import course

    assert all(inspect.isfunction(getattr(course, name)) for name in course.__all__)


# ------------------------------------------------------------------------------------------ mine or reference


@pytest.fixture
def swapping(tmp_path, capsys):
    """A course whose exercises replace functions of dsv2; afterwards everything is put back."""
    names = [
        ("twice", {"replaces": ("dsv2.attention.mla.absorb_query",)}),
        ("norm", {"replaces": ("dsv2.layers.RMSNorm.forward",)}),
        ("third", {"replaces": ("dsv2.attention.mla.expand_output",)}),
    ]
    folders = make_toy(tmp_path, names)
    file = folders.home / "exercises/ex01_toy.py"
    text = stubs.read(file).replace("def twice(x):", "def twice(q_nope, w_uk):")
    text = text.replace("def norm(x):", "def norm(self, x):")
    stubs.write(file, text)
    answer_with(file, 1, "    CALLS.append(1)\n    return torch.einsum('bthn,hnc->bthc', q_nope, w_uk)")
    answer_with(file, 2, "    raise ArithmeticError('in my norm')")
    stubs.write(file, stubs.read(file).replace("FACTOR = 2", "FACTOR = 2\nCALLS = []"))
    capsys.readouterr()
    yield folders
    mine.restore()


def absorbed_model() -> tuple[dsv2.DeepSeekV2, torch.Tensor]:
    torch.manual_seed(0)
    model = dsv2.DeepSeekV2(dsv2.DSV2Config.preset("tiny")).eval()
    for layer in model.modules():
        if hasattr(layer, "form"):
            layer.form = "absorbed"
    return model, torch.randint(0, model.cfg.vocab_size, (1, 3))


def test_the_course_runs_on_a_learner_s_functions(swapping, capsys):
    from dsv2.attention import mla

    original = mla.absorb_query
    model, tokens = absorbed_model()
    with torch.no_grad():
        reference = model(tokens).logits
    passed(swapping, "01.1", "twice")
    mine.use("mine", swapping)
    said = capsys.readouterr().out
    assert "runs on 1 of your functions (3 can be replaced)" in said
    assert "attention.mla.absorb_query: yours" in said and "the reference (not passed): 01." in said
    yours = mla.absorb_query
    assert yours is not original and yours.__code__.co_filename.endswith("ex01_toy.py")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reference) and yours.__globals__["CALLS"]
    late = types.ModuleType("dsv2.imported_late")
    late.absorb_query = mla.absorb_query
    sys.modules[late.__name__] = late
    try:
        mine.use("reference", swapping)
        assert mla.absorb_query is original and late.absorb_query is original
    finally:
        del sys.modules[late.__name__]


def test_a_function_that_changed_since_it_passed_is_not_used(swapping):
    from dsv2.attention import mla

    original = mla.absorb_query
    passed(swapping, "01.1", "twice")
    file = swapping.home / "exercises/ex01_toy.py"
    stubs.write(file, stubs.read(file).replace("CALLS.append(1)", "CALLS.append(2)"))
    mine.use("mine", swapping)
    assert mla.absorb_query is original


def test_an_error_in_a_learner_s_function_names_their_file(swapping):
    from dsv2.layers import RMSNorm

    original = RMSNorm.forward
    passed(swapping, "01.2", "norm")
    mine.use("mine", swapping)
    model, tokens = absorbed_model()
    with pytest.raises(ArithmeticError, match="in my norm") as raised:
        model(tokens)
    assert raised.traceback[-1].path.name == "ex01_toy.py"
    mine.use("reference", swapping)
    assert RMSNorm.forward is original and vars(RMSNorm)["forward"] is original


def test_a_file_that_no_longer_runs_leaves_the_reference(swapping, capsys):
    file = swapping.home / "exercises/ex01_toy.py"
    passed(swapping, "01.1", "twice")
    stubs.write(file, stubs.read(file) + "\n1 / 0\n")
    mine.use("mine", swapping)
    assert "does not run: ZeroDivisionError" in capsys.readouterr().out


def test_use_takes_two_words(swapping):
    with pytest.raises(ValueError, match='"mine" or "reference"'):
        mine.use("yours", swapping)
    with pytest.raises(LookupError, match="dsv2.attention.no_such"):
        mine.swap({"dsv2.attention.no_such": print})


def test_the_environment_variable():
    environment = dict(os.environ, DSV2_IMPL="mine", PYTHONPATH=str(ROOT))
    ended = subprocess.run(
        [sys.executable, "-c", "import dsv2"], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0 and "of your functions" in ended.stdout, ended.stderr


def test_a_file_that_hangs_while_it_is_run_and_leaves_nothing_behind(toy, file, monkeypatch):
    watch.verdicts(["01.1"], toy).close()  # never begun
    workers = []
    real = watch.Worker
    monkeypatch.setattr(watch, "Worker", lambda *call: workers.append(real(*call)) or workers[-1])
    file.write_text("import time\ntime.sleep(99)\n", encoding="utf-8")
    verdicts = watch.verdicts(["01"], toy, seconds=0.5)
    verdict = next(verdicts)
    assert verdict.status == "hung" and verdict.case.startswith("running the file")
    verdicts.close()  # as Ctrl-C does
    assert len(workers) == 1 and workers[0].ended() and not workers[0].folder.exists()


def test_a_learners_code_runs_on_one_thread(toy, file):
    """On a busy machine the threads of small products wait for each other: an answer seems to hang."""
    answer_with(file, 1, "    print(torch.get_num_threads())\n    return 2 * x")
    assert next(watch.verdicts(["01.1"], toy)).printed[-1] == "1"


def test_the_device_limited_choice_does_not_hang_on_the_order_of_equal_affinities():
    (exercise,) = [exercise for all_ in CHAPTERS.values() for exercise in all_ if exercise.number == "07.4"]
    for case in exercise.cases:
        given = case.arguments()
        open_to = allowed_experts(given["scores"], given["n_group"], given["topk_group"])
        for affinities, may in zip(given["scores"].flatten(0, 1), open_to.flatten(0, 1)):
            assert len(affinities[may].unique()) == may.sum(), case.says
