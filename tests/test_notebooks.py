"""How notebooks are kept: run in order, current, free of errors, of the machine that ran them, and of widgets
that have lost their kernel. (That they run is shown by nbval and by the browser tests.)"""

from __future__ import annotations

import base64
import getpass
import json
import re
from pathlib import Path

import nbformat
import pytest

from dsv2.course import refresh
from dsv2.course.bootstrap import FIRST_CELL

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    path for path in (ROOT / "notebooks").glob("**/*.ipynb") if ".ipynb_checkpoints" not in path.parts
)
LARGEST = 2.5e6  # bytes of a notebook with its outputs


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert (ROOT / "notebooks" / "00_start_here.ipynb") in NOTEBOOKS


def test_every_cell_was_run_in_order_without_an_error(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [o for cell in cells for o in cell.outputs if o.output_type == "error"] == []
    assert [o.text for cell in cells for o in cell.outputs if o.get("name") == "stderr"] == []


def test_the_first_cell_is_the_courses(notebook):
    assert code_cells(notebook)[0].source == FIRST_CELL


def test_outputs_tell_nothing_of_the_machine_that_made_them(notebook):
    said = json.dumps([cell.outputs for cell in code_cells(notebook)])
    said = re.sub(r'"image/png": "[^"]*"', "", said)
    for trace in (str(Path.home()), str(ROOT), "/tmp/", f"/{getpass.getuser()}/"):
        assert trace not in said


def test_no_widget_without_its_kernel(notebook):
    assert "widgets" not in notebook.metadata
    kinds = {kind for cell in code_cells(notebook) for o in cell.outputs for kind in o.get("data", {})}
    assert refresh.VIEW not in kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_size(path):
    assert path.stat().st_size < LARGEST


# --------------------------------------------------------------------------------------- the tool itself

PICTURE = """
import ipywidgets as w
from matplotlib.figure import Figure
from dsv2.viz.style import png
figure = Figure(figsize=(1, 1))
shown = w.Image(value=png(figure), format="png", layout=w.Layout(width="90px"))
hidden = w.Image(value=b"not a picture", layout=w.Layout(display="none"))
w.VBox([w.IntSlider(), w.HTML("<b>rank 8</b>"), shown, hidden])
"""


def written(folder: Path, *sources: str) -> Path:
    path = folder / "made.ipynb"
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_a_widget_is_stored_as_its_texts_and_pictures(tmp_path, capsys):
    path = written(tmp_path, f"import sys; sys.path.insert(0, {str(ROOT)!r})", "print(6 * 7)", PICTURE)
    assert refresh.main([str(path)]) == 0
    assert "made.ipynb" in capsys.readouterr().out
    made = nbformat.read(path, as_version=4)
    nbformat.validate(made)
    _, text, widget = (cell.outputs for cell in made.cells)
    assert text[0].text == "42\n"
    page, picture = widget
    assert "rank 8" in page.data["text/html"] and refresh.NOTICE in page.data["text/html"]
    assert base64.b64decode(picture.data["image/png"]).startswith(b"\x89PNG")
    assert picture.metadata["image/png"]["width"] == 90
    assert "widgets" not in made.metadata
    first = path.read_bytes()
    assert refresh.main([str(path)]) == 0
    assert path.read_bytes() == first, "a second run stores the same bytes"


IN_PIECES = """
import sys, time
from IPython.display import display
for part in ("one ", "line\\n", "another\\n"):
    print(part, end="", flush=True)
    time.sleep(0.5)  # longer than a kernel gathers
print("aside", file=sys.stderr, flush=True)
print("third", flush=True)
display(6 * 7)
print("fourth")
"""


def test_text_that_came_in_pieces_is_stored_as_one(tmp_path):
    path = written(tmp_path, IN_PIECES)
    assert refresh.main([str(path)]) == 0
    (cell,) = nbformat.read(path, as_version=4).cells
    assert [(o.get("name"), o.get("text") or o.data["text/plain"]) for o in cell.outputs] == [
        ("stdout", "one line\nanother\n"),
        ("stderr", "aside\n"),
        ("stdout", "third\n"),
        (None, "42"),
        ("stdout", "fourth\n"),
    ]


def test_a_notebook_that_fails_stays_as_it_was(tmp_path, capsys):
    path = written(tmp_path, "1 / 0")
    before = path.read_bytes()
    assert refresh.main([str(path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert path.read_bytes() == before
