"""What the first cell of every notebook runs: the course on `sys.path`, and one line saying where it runs.

On a laptop nothing is installed here; `course.py` has done that. On Colab, and on Kaggle, the cell clones the
repository and this file installs what the runtime lacks, one package at a time and without its dependencies,
so that the runtime's PyTorch, NumPy and widgets stay as they are.

Standard library only, and run by its path (`runpy`), because `import dsv2` may not work yet.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/dsv2-course/dsv2"

# A notebook lies one or two folders below the repository; on Colab it lies alone, and the clone beside it.
FIRST_CELL = f"""\
import os, runpy, subprocess  # finds the course this notebook belongs to; on Colab it is fetched first
home = next((d for d in ("..", "../..", ".") if os.path.isdir(d + "/dsv2/course")), "dsv2-course")
url = os.environ.get("DSV2_REPO", "{REPOSITORY}")
if not os.path.isdir(home): subprocess.run(["git", "clone", "-q", "--depth", "1", url, home], check=True)
runpy.run_path(home + "/dsv2/course/bootstrap.py")["ready"]()"""

ROOT = Path(__file__).resolve().parent.parent.parent

# Changing one of these under a running kernel breaks what is already loaded.
LEFT_ALONE = {"torch", "triton", "numpy", "ipywidgets"}
# The server that shows the notebook, not the kernel that runs it.
NOT_IN_A_KERNEL = {"jupyterlab"}
# Installed with its parent, because nothing is installed with its dependencies.
BROUGHT_ALONG = {"jaxtyping": ["wadler-lindig"]}


def ready() -> None:
    """Make `import dsv2` work in this kernel and print the environment in one line.

    Raises ImportError, saying what to do, if a requirement is missing and cannot be installed here.
    """
    lacking = missing_requirements((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    if lacking and not on_hosted_runtime():
        raise ImportError(
            f"this kernel ({sys.executable}) lacks {', '.join(lacking)}. Start the course with "
            f"`python3 course.py lab` in {ROOT}, or choose the kernel of its .venv."
        )
    untouchable = [requirement for requirement in lacking if distribution(requirement) in LEFT_ALONE]
    if untouchable:
        raise ImportError(
            f"this runtime lacks {', '.join(untouchable)}, which the course does not replace under a running "
            "kernel. Choose a newer runtime (on Colab: Runtime > Change runtime type)."
        )
    if lacking:
        install(lacking)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    importlib.invalidate_caches()
    print(environment())


def missing_requirements(requirements: str) -> list[str]:
    """The lines of a requirements file that this environment does not meet, e.g. `["jaxtyping"]`.

    Asks the installed metadata and imports nothing: importing would load packages that are about to change.
    """
    missing = []
    for line in requirements.splitlines():
        requirement = line.partition("#")[0].strip()
        if not requirement or distribution(requirement) in NOT_IN_A_KERNEL:
            continue
        try:
            installed = importlib.metadata.version(distribution(requirement))
        except importlib.metadata.PackageNotFoundError:
            installed = None
        least = requirement.partition(">=")[2]
        if installed is None or release(installed) < release(least):
            missing.append(requirement)
    return missing


def distribution(requirement: str) -> str:
    """The distribution's name in a requirement: `"torch"` for `"torch>=2.6"`."""
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower()


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version's release: `(2, 11)` for `"2.11.0+cu128"`, `()` for `""`.

    Zeros at the end are dropped, so that 2.6 and 2.6.0 are one release.
    """
    numbers = [int(number) for number in re.match(r"(\d+(?:\.\d+)*)?", version).group().split(".") if number]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def install(requirements: list[str]) -> None:
    """Install requirements into this kernel's environment, without their dependencies.

    Raises ImportError with pip's last words if pip fails.
    """
    wanted = []
    for requirement in requirements:
        wanted += [requirement, *BROUGHT_ALONG.get(distribution(requirement), [])]
    print("installing", ", ".join(wanted))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    finished = subprocess.run([*pip, *wanted], capture_output=True, text=True)
    if finished.returncode:
        said = finished.stderr.strip().splitlines()[-3:]
        raise ImportError("pip could not install " + ", ".join(wanted) + ":\n" + "\n".join(said))


def on_hosted_runtime() -> bool:
    """True on Colab and Kaggle, where the environment is thrown away after the session."""
    return any(name in os.environ for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"))


def environment() -> str:
    """One line on where this runs, e.g. `Python 3.12.13, torch 2.11.0+cu128, Tesla T4 (sm_75, 15 GB)`."""
    import torch

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        device = f"{gpu.name} (sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GB)"
        if torch.cuda.device_count() > 1:
            device = f"{torch.cuda.device_count()} x {device}"
    elif torch.backends.mps.is_available():
        device = "Apple GPU (mps)"
    else:
        device = f"CPU ({torch.get_num_threads()} threads)"
    return f"Python {platform.python_version()}, torch {torch.__version__}, {device}"
