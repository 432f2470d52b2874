"""Fixtures of the browser tests: one JupyterLab and one Chromium for all of them, on a copy of the notebooks.

They end with this package's last test: Playwright's event loop must be gone before nbval starts its own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from . import jupyterlab

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def why_not() -> str:
    """Why the browser tests cannot run here, in a sentence; "" if they can."""
    for module in ("playwright", "jupyterlab"):
        if importlib.util.find_spec(module) is None:
            return f"The Python package {module} is not installed."
    if jupyterlab.find_chromium() is None:
        return f"No browser found (looked for {', '.join(jupyterlab.CHROMIUM_NAMES)})."
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="package")
def lab(tmp_path_factory):
    """JupyterLab on a folder laid out like the repository; autosave spares the committed notebooks."""
    folder = tmp_path_factory.mktemp("course")
    for name in ("notebooks", "exercises"):  # what a reader writes into
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".*"))
    for name in ("dsv2", "data", "solutions", "requirements.txt", "course.py"):
        if (ROOT / name).is_dir() and os.name == "nt":
            shutil.copytree(ROOT / name, folder / name)  # links need a privilege there
        elif os.name == "nt":
            shutil.copy(ROOT / name, folder / name)
        elif (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    with jupyterlab.serve_jupyterlab(folder) as server:
        yield server


@pytest.fixture(scope="package")
def browser(tmp_path_factory):
    """A headless Chromium with an empty profile."""
    with jupyterlab.open_chromium(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture
def open_notebook(lab, browser):
    """Opens a notebook of the course: `with open_notebook("notebooks/01_kv_cache.ipynb") as notebook:`."""
    return lambda notebook, **options: jupyterlab.open_notebook(browser, lab, notebook, **options)


def pytest_terminal_summary(terminalreporter) -> None:
    """What the browser tests have measured: a report, not a judgement."""
    if jupyterlab.MEASURED:
        terminalreporter.section("measured in the browser")
        for line in jupyterlab.MEASURED:
            terminalreporter.write_line(line)
