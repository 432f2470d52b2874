"""Every notebook, in JupyterLab as a reader opens it: all cells run, and every control moves its picture.

How long a picture takes from the key press to its display is reported at the end, not judged.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from .jupyterlab import MEASURED

ROOT = Path(__file__).resolve().parents[2]
FILES = (path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("**/*.ipynb"))
NOTEBOOKS = sorted(path.as_posix() for path in FILES if ".ipynb_checkpoints" not in path.parts)
PATIENCE = 20_000  # milliseconds until a picture must have followed

# Notes when the reader last did something, and when each picture was last drawn.
WATCH = """() => {
    window.lastInput = 0;
    for (const kind of ["keydown", "change", "mousedown"])
        document.addEventListener(kind, () => { window.lastInput = performance.now(); }, true);
    for (const image of document.querySelectorAll(".jp-OutputArea-output img.widget-image"))
        image.addEventListener("load", () => { image.drawn = performance.now(); });
}"""
DRAWN = (
    """root => [...root.querySelectorAll("img.widget-image")].some(image => image.drawn > window.lastInput)"""
)
MILLISECONDS = """root => Math.max(...[...root.querySelectorAll("img.widget-image")]
    .map(image => (image.drawn || 0) - window.lastInput))"""


def widgets(page) -> list:
    """The outermost box of every widget on the page that shows a picture."""
    boxes = page.locator(".jp-OutputArea-output .widget-vbox:not(.widget-box .widget-vbox)").all()
    return [box for box in boxes if box.locator("img.widget-image").count()]


def controls(box) -> list[tuple[str, object]]:
    """(name, element) of what can be moved in a widget now: sliders, menus and check boxes."""
    found = []
    for kind, selector in (
        ("slider", ".noUi-handle"),
        ("menu", "select"),
        ("box", "input[type=checkbox]"),
        ("number", "input[type=number]"),
    ):
        for element in box.locator(selector).all():
            if element.is_visible() and element.is_enabled():
                row = element.locator("xpath=ancestor::div[contains(@class, 'widget-inline-hbox')][1]")
                label = row.locator(".widget-label").first
                name = label.inner_text() if row.count() and label.count() else ""
                found.append((f"{kind} {name}".strip(), element))
    return found


def move(kind: str, element) -> bool:
    """Change a control by one step; False if it has only one value."""
    if kind.startswith("slider"):
        before = element.get_attribute("aria-valuetext")
        for key in ("ArrowRight", "ArrowLeft"):
            element.press(key)
            if element.get_attribute("aria-valuetext") != before:
                return True
        return False
    if kind.startswith("menu"):
        options = element.locator("option").count()
        chosen = element.evaluate("menu => menu.selectedIndex")
        element.select_option(index=(chosen + 1) % options)
        return options > 1
    if kind.startswith("number"):
        element.press("ArrowUp")
        element.press("Enter")
        return True
    element.click()
    return True


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_every_control_moves_its_picture(open_notebook, name):
    with open_notebook(name) as notebook:
        notebook.run_all()
        assert notebook.cell_errors == [] and notebook.page_errors == []
        code = [cell for cell in notebook.cells() if cell["cell_type"] == "code"]
        unrun = [cell["source"] for cell in code if not cell["execution_count"]]
        assert [source for source in unrun if "".join(source).strip()] == []
        page = notebook.page
        page.evaluate(WATCH)
        times, still = [], []
        for number, box in enumerate(widgets(page)):
            if box.locator("textarea").count():
                continue  # text being generated has a test of its own
            for control, element in controls(box):
                if not element.is_visible():
                    continue  # another control has hidden it
                element.scroll_into_view_if_needed()
                page.wait_for_timeout(150)  # what came before is drawn
                if not move(control, element):
                    continue
                try:
                    page.wait_for_function(DRAWN, arg=box.element_handle(), timeout=PATIENCE)
                    times.append(box.evaluate(MILLISECONDS))
                except Exception as error:
                    if "Timeout" not in type(error).__name__:
                        raise
                    still.append(f"widget {number}: {control}")
            errors = [t for t in box.locator("pre").all_inner_texts() if re.search(r"\w+Error\b", t)]
            assert errors == []
        assert still == [], "controls that no picture followed"
        assert notebook.cell_errors == [] and notebook.page_errors == []
        if times:
            MEASURED.append(
                f"{name}: {len(times)} controls moved, picture after {statistics.median(times):.0f} ms "
                f"(median), {max(times):.0f} ms (longest)"
            )


def test_a_text_is_generated_by_the_button(open_notebook):
    with open_notebook("notebooks/00_start_here.ipynb") as notebook:
        notebook.run_all()
        page = notebook.page
        (box,) = [box for box in widgets(page) if box.locator("textarea").count()]
        box.scroll_into_view_if_needed()
        box.locator("textarea").fill("Return a list of ")
        before = box.locator("img.widget-image").first.get_attribute("src")
        box.get_by_role("button", name="Generate").click()
        page.wait_for_function(
            "root => /done: /.test(root.innerText) && /Return a list of /.test(root.innerText)",
            arg=box.element_handle(),
            timeout=60_000,
        )
        assert box.locator("img.widget-image").first.get_attribute("src") != before
        assert notebook.cell_errors == [] and notebook.page_errors == []
