"""The first cell of every notebook: here it finds the course, on Colab it fetches it and fills the gaps."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv2.course import bootstrap

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8")
FILES = (path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("**/*.ipynb"))
NOTEBOOKS = sorted(path.as_posix() for path in FILES if ".ipynb_checkpoints" not in path.parts)

# Colab's newest runtime, from its published package list of August 2026.
COLAB = {
    "torch": "2.11.0+cu128",
    "triton": "3.6.0",
    "numpy": "2.1.3",
    "ipywidgets": "7.7.1",
    "matplotlib": "3.10.0",
    "einops": "0.8.2",
    "safetensors": "0.8.0",
    "tqdm": "4.67.1",
}


@pytest.fixture
def installed(monkeypatch):
    """The distributions that importlib.metadata reports, to be changed by the test; pip adds to them."""
    distributions = dict(COLAB)
    calls = []

    def version(name):
        if name not in distributions:
            raise importlib.metadata.PackageNotFoundError(name)
        return distributions[name]

    def run(command, **options):
        calls.append(command)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    monkeypatch.setattr(bootstrap, "environment", lambda: "where this runs")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT])
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    distributions["pip calls"] = calls
    return distributions


def test_colab_lacks_jaxtyping_only(installed):
    assert bootstrap.missing_requirements(REQUIREMENTS) == ["jaxtyping"]


def test_on_colab_only_what_is_missing_is_installed(installed, monkeypatch, capsys):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260819")
    bootstrap.ready()
    [command] = installed["pip calls"]
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert "--no-deps" in command and command[-2:] == ["jaxtyping", "wadler-lindig"]
    assert sys.path[0] == str(ROOT)
    assert capsys.readouterr().out.splitlines()[-1] == "where this runs"


def test_a_second_run_of_the_cell_changes_nothing(installed, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260819")
    installed["jaxtyping"] = "0.3.11"
    bootstrap.ready()
    bootstrap.ready()
    assert installed["pip calls"] == []
    assert sys.path.count(str(ROOT)) == 1


@pytest.mark.parametrize(
    "name, version", [("torch", "2.5.1+cu121"), ("numpy", "1.25.2"), ("ipywidgets", None)]
)
def test_what_the_kernel_has_loaded_is_never_replaced(installed, monkeypatch, name, version):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20240101")
    installed.pop(name)
    if version:
        installed[name] = version
    with pytest.raises(ImportError, match=f"{name}.*newer runtime"):
        bootstrap.ready()
    assert installed["pip calls"] == []


def test_on_a_laptop_nothing_is_installed(installed):
    with pytest.raises(ImportError, match="jaxtyping.*course.py lab"):
        bootstrap.ready()
    assert installed["pip calls"] == []


def test_a_failing_pip_is_reported_in_its_words(installed, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260819")
    failed = SimpleNamespace(
        returncode=1, stdout="", stderr="WARNING: retrying\nERROR: no route to the index\n"
    )
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ImportError, match="no route to the index"):
        bootstrap.ready()


def test_nothing_is_imported_to_find_out_what_is_there():
    code = f"""
import runpy, sys
course = runpy.run_path({str(ROOT / "dsv2/course/bootstrap.py")!r})
course["missing_requirements"]({REQUIREMENTS!r})
print([name for name in ("torch", "numpy", "matplotlib", "jaxtyping", "dsv2") if name in sys.modules])"""
    ended = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]", ended.stderr


@pytest.mark.parametrize(
    "installed_version, least, enough",
    [
        ("2.11.0+cu128", "2.6", True),
        ("2.6", "2.6.0", True),
        ("2.6.0a1", "2.6", True),
        ("2.5.1", "2.6", False),
        ("7.7.1", "7.7", True),
        ("10.0", "9.9", True),
        ("0.8.0rc1", "0.8.1", False),
    ],
)
def test_versions_are_compared_as_numbers(installed_version, least, enough):
    assert (bootstrap.release(installed_version) >= bootstrap.release(least)) == enough


def test_environment_is_one_line_with_python_torch_and_device():
    import torch

    line = bootstrap.environment()
    assert "\n" not in line and torch.__version__ in line
    assert re.fullmatch(r"Python 3\.\d+\.\S+, torch \S+, .+", line)


# -------------------------------------------------------------------------------------------- the cell itself


@pytest.fixture
def run_first_cell(tmp_path):
    """A function that runs the cell as a kernel started in `folder` would, and then looks for dsv2.

    The kernel's torch is a small stand-in, for the sake of time: the cell only asks it where it runs.
    """
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/torch.py").write_text(
        "class cuda: is_available = staticmethod(lambda: False)\n"
        "class backends:\n    class mps: is_available = staticmethod(lambda: False)\n"
        "__version__ = '2.11.0'\nget_num_threads = lambda: 2\n",
        encoding="utf-8",
    )
    return lambda folder, repository: run_cell(folder, repository, tmp_path / "packages")


def run_cell(folder: Path, repository: str, packages: Path) -> subprocess.CompletedProcess:
    code = bootstrap.FIRST_CELL + "\nimport importlib.util; print(importlib.util.find_spec('dsv2').origin)"
    environment = dict(os.environ, DSV2_REPO=repository, PYTHONPATH=str(packages))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with what the cell needs of the repository."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in (
        "dsv2/__init__.py",
        "dsv2/course/__init__.py",
        "dsv2/course/bootstrap.py",
        "requirements.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "notebooks/demos").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("place", ["notebooks", "notebooks/demos", "."])
def test_the_cell_finds_the_course_it_lies_in(run_first_cell, checkout, place):
    ended = run_first_cell(checkout / place, "/there/is/no/such/repository")
    assert ended.returncode == 0, ended.stderr
    environment, origin = ended.stdout.splitlines()
    assert environment.startswith("Python ")
    assert Path(origin) == checkout.resolve() / "dsv2/__init__.py"


def test_alone_the_cell_clones_the_course_once(run_first_cell, checkout, tmp_path):
    git = shutil.which("git")
    if not git:
        pytest.skip("git is not installed.")
    source = tmp_path / "source"
    shutil.copytree(checkout, source)
    identity = ["-c", "user.name=reader", "-c", "user.email=reader@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run([git, *command], cwd=source, check=True)
    content = tmp_path / "content"
    content.mkdir()
    for _ in range(2):
        ended = run_first_cell(content, source.as_uri())
        assert ended.returncode == 0, ended.stderr
        origin = Path(ended.stdout.splitlines()[-1])
        assert origin == content.resolve() / "dsv2-course/dsv2/__init__.py"
        shutil.rmtree(source, ignore_errors=True)  # the second run must not need it


def test_a_clone_that_fails_names_the_repository(run_first_cell, tmp_path):
    ended = run_first_cell(tmp_path, "/there/is/no/such/repository")
    assert ended.returncode != 0
    assert "git" in ended.stderr and "/there/is/no/such/repository" in ended.stderr


def test_the_repository_is_named_once():
    source = (ROOT / "dsv2/course/bootstrap.py").read_text(encoding="utf-8")
    assert source.count(bootstrap.REPOSITORY) == 1
    assert bootstrap.REPOSITORY in bootstrap.FIRST_CELL


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_notebook_begins_with_the_cell(notebook):
    cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
    first = next(cell for cell in cells if cell["cell_type"] == "code")
    assert "".join(first["source"]).strip() == bootstrap.FIRST_CELL


def test_run_by_its_path_the_file_knows_its_own_folder():
    names = runpy.run_path(str(ROOT / "dsv2/course/bootstrap.py"))
    assert names["ROOT"] == ROOT
