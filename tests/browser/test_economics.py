"""The cost calculator in a real JupyterLab: it is drawn, and its controls move it."""

from __future__ import annotations

import nbformat


def test_the_cost_calculator_answers_keys_and_menus(open_notebook, lab, tmp_path):
    source = "from dsv2.viz import cost_calculator\ncalculator = cost_calculator()\ncalculator"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, lab.folder / "economics.ipynb")
    with open_notebook("economics.ipynb") as notebook:
        notebook.run_all()
        assert notebook.cell_errors == []
        page = notebook.page
        page.get_by_text("3,204 texts at once").wait_for(timeout=20_000)
        notebook.screenshot(tmp_path / "first.png")
        page.locator(".widget-slider .noUi-handle").first.focus()  # cached tokens a text
        page.keyboard.press("ArrowRight")
        page.get_by_text("1,602 texts at once").wait_for(timeout=20_000)
        page.locator(".widget-dropdown select").first.select_option("Mixtral 8x22B")
        page.get_by_text("Mixtral 8x22B: ").wait_for(timeout=20_000)
        page.locator(".widget-slider .noUi-handle").last.focus()  # how many GPUs
        for _ in range(3):
            page.keyboard.press("ArrowLeft")
        page.get_by_text("Not even one text fits").wait_for(timeout=20_000)
        notebook.screenshot(tmp_path / "last.png")
        assert notebook.cell_errors == [] and notebook.page_errors == []
