"""`python -m dsv2.course.refresh`: run notebooks and store their outputs, as the repository keeps them.

A widget lives in a kernel; what is stored of one is its pictures and texts, so that the page can be read
without running it.
"""

from __future__ import annotations

import argparse
import base64
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_output

VIEW, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
NOTICE = "<p><em>Run the cell for its controls. Below is how it ended when this page was made.</em></p>"


def execute(path: Path, seconds_per_cell: int = 300) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh run in its folder; raises nbclient's CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=seconds_per_cell, record_timing=False, resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    widgets = notebook.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = joined(kept for output in cell.outputs for kept in without_widget(output, widgets))
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def joined(outputs: Iterable[Any]) -> list[Any]:
    """The outputs, neighbours of one stream as one: a kernel sends text in pieces, as its clock has it."""
    found: list[Any] = []
    for output in outputs:
        before = found[-1] if found else {}
        if output.output_type == "stream" == before.get("output_type") and output.name == before.name:
            before.text += output.text
        else:
            found.append(output)
    return found


def without_widget(output: Any, widgets: dict[str, Any]) -> Iterator[Any]:
    """The output itself, or for a widget's: what its texts and pictures showed last, readable anywhere."""
    view = output.get("data", {}).get(VIEW)
    if view is None:
        yield output
        return
    texts, pictures = [], []
    for model in _models(view["model_id"], widgets):
        state = model["state"]
        if state.get("_model_name") == "HTMLModel" and state.get("value"):
            texts.append(f"<div>{state['value']}</div>")
        elif state.get("_model_name") == "ImageModel":
            layout = widgets.get(str(state.get("layout")).removeprefix("IPY_MODEL_"), {}).get("state", {})
            data = [b["data"] for b in model.get("buffers", ()) if b["path"] == ["value"]]
            if data and layout.get("display") != "none":
                pictures.append((data[0], layout.get("width") or ""))
    yield new_output("display_data", {"text/html": "\n".join([NOTICE, *texts])})
    for data, width in pictures:
        metadata = {"image/png": {"width": int(width[:-2])}} if width.endswith("px") else {}
        canonical = base64.b64encode(base64.b64decode(data)).decode()
        yield new_output("display_data", {"image/png": canonical}, metadata=metadata)


def _models(model_id: str, widgets: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A widget and all that it contains, from the top down."""
    if model_id in widgets:
        yield widgets[model_id]
        for child in widgets[model_id]["state"].get("children", ()):
            yield from _models(child.removeprefix("IPY_MODEL_"), widgets)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 if a notebook failed (it is left as it was)."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.course.refresh", description=__doc__.split(": ", 1)[1]
    )
    parser.add_argument("notebook", nargs="*", type=Path, help="(default: all of the course)")
    options = parser.parse_args(arguments)
    for path in options.notebook or sorted(NOTEBOOKS.glob("**/[!.]*.ipynb")):
        began = time.perf_counter()
        try:
            notebook = execute(path)
        except CellExecutionError as error:
            print(f"{path}: not stored, a cell failed\n{error}", file=sys.stderr)
            return 1
        nbformat.write(notebook, path)
        size = path.stat().st_size / 1e3
        print(f"{path}: {time.perf_counter() - began:.0f} s, {size:,.0f} KB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
