"""The kernels compile for every GPU generation they are meant for and fit its shared memory; no GPU here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
from compile_kernels import SHARED_MEMORY  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_kernels_compile_and_fit(capability):
    """One process for each, without the interpreter that this one runs."""
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), str(capability)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 20, found
    for build in found:
        assert 0 <= build["shared"] <= SHARED_MEMORY[capability], build
