"""What the browser tests would see: errors in cells and on the page, widgets that answer."""

from __future__ import annotations

import nbformat


def write_notebook(lab, name: str, sources: list[str]) -> str:
    """Put a small notebook into the lab's folder and return its path there."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, lab.folder / name)
    return name


def test_an_error_in_a_cell_is_seen(open_notebook, lab):
    name = write_notebook(lab, "error.ipynb", ["print('before')", "1 / 0", "print('after')"])
    with open_notebook(name) as notebook:
        notebook.run_all()
        assert notebook.cell_errors == ["cell 1: ZeroDivisionError: division by zero"]


def test_a_widget_is_drawn_and_answers_the_mouse(open_notebook, lab, tmp_path):
    source = """
import ipywidgets as widgets
slider = widgets.IntSlider(value=3, min=0, max=10, description="rank")
label = widgets.HTML()
widgets.dlink((slider, "value"), (label, "value"), lambda rank: f"<b>rank {rank} squared is {rank**2}</b>")
widgets.VBox([slider, label])"""
    name = write_notebook(lab, "widget.ipynb", [source])
    with open_notebook(name) as notebook:
        notebook.run_all()
        assert notebook.cell_errors == []
        assert notebook.page.get_by_text("rank 3 squared is 9").is_visible()
        notebook.page.locator(".widget-slider .noUi-handle").focus()
        notebook.page.keyboard.press("ArrowRight")
        notebook.page.get_by_text("rank 4 squared is 16").wait_for(timeout=10_000)
        assert notebook.screenshot(tmp_path / "widget.png", whole=True).stat().st_size > 5_000


def test_a_script_error_on_the_page_is_seen(open_notebook, lab):
    source = """
from IPython.display import Javascript
Javascript("setTimeout(() => { throw new Error('planted') }, 0); console.error('planted too')")"""
    name = write_notebook(lab, "script.ipynb", [source])
    with open_notebook(name) as notebook:
        notebook.run_all()
        assert any("planted" in error for error in notebook.page_errors)
        assert any("planted too" in error for error in notebook.console_errors)
