"""Settings for every test: shapes and types checked at run time, few threads, no network."""

from __future__ import annotations

import importlib
import importlib.util
import os
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Notebook kernels and training processes started by the tests inherit these.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small tensors run no faster on more threads, and on a large machine much slower; nor do several processes
# of tests beside each other (pytest -n).
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, os.cpu_count() or 1) // workers)))

# Triton decides at its first import whether it interprets kernels, and PyTorch imports it here and there.
if importlib.util.find_spec("torch") and not importlib.import_module("torch").cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Triton reads a kernel's source text and its bare parameters, so a wrapped kernel does not compile; a wrong
# type in a configuration is to meet the package's own message; a wrong answer to an exercise is to be judged.
UNCHECKED = {"config", "course", "kernels"}


def check_types_in_dsv2() -> None:
    """Let jaxtyping and beartype check every annotated call in dsv2; must run before dsv2 is imported."""
    if not (importlib.util.find_spec("jaxtyping") and importlib.util.find_spec("beartype")):
        return
    from jaxtyping import install_import_hook

    files = (ROOT / "dsv2").glob("*.py")
    packages = (ROOT / "dsv2").glob("*/__init__.py")
    parts = {file.stem for file in files} | {file.parent.name for file in packages}
    modules = [f"dsv2.{part}" for part in sorted(parts - UNCHECKED - {"__init__"})]
    install_import_hook(modules, "typecheck.typechecked")


check_types_in_dsv2()

if importlib.util.find_spec("hypothesis"):
    import hypothesis

    # Tests assert nothing about time: on a busy machine making an example can take as long as it likes.
    patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("patient", **patient)
    hypothesis.settings.load_profile("patient")


def pytest_terminal_summary(terminalreporter) -> None:
    """After the tests of the exercises: a table of the exercises and of the wrong answers they know."""
    passed = terminalreporter.stats.get("passed", [])
    tested = {
        report.nodeid.rpartition("[")[2].rstrip("]")
        for report in passed
        if "test_every_mistake_is_rejected_with_its_own_diagnosis" in report.nodeid
    }
    if not tested:
        return
    from dsv2.course import chapters

    exercises = chapters.resolve(sorted(tested))
    count = sum(len(exercise.mistakes) for exercise in exercises)
    terminalreporter.section(
        f"{len(exercises)} exercises, {count} wrong answers, each with its own diagnosis"
    )
    for exercise in exercises:
        names = "; ".join(mistake.name for mistake in exercise.mistakes)
        line = f"{exercise.number} {exercise.name} ({len(exercise.mistakes)}): {names}"
        terminalreporter.write_line(textwrap.fill(line, 110, subsequent_indent="      "))
