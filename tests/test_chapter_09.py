"""Chapter 09's page where transformers is missing or too old: it says so, and goes on to its end."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "notebooks" / "09_the_whole_model.ipynb"


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, says",
    [
        ("raise ImportError('planted')", "transformers is not installed, so there is no judge here"),
        (
            "from types import SimpleNamespace as N\n__version__ = '4.57.6'\nDeepseekV2ForCausalLM = None\n"
            "utils = N(logging=N(disable_progress_bar=int, set_verbosity_error=int))",
            "transformers 4.57.6 is too old; 5.15 or later is needed",
        ),
    ],
    ids=["missing", "too old"],
)
def test_the_page_goes_on_without_transformers(tmp_path, monkeypatch, module, says):
    (tmp_path / "transformers.py").write_text(module, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    notebook = nbformat.read(PAGE, as_version=4)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(PAGE.parent)}})
    client.execute()  # raises if a cell fails
    said = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))
    assert says in said and "float32 to float64" not in said
    assert "all keys, then all values" in said, "the mistakes are measured without a judge too"
