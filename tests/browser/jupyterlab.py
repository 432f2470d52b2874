"""A real JupyterLab and a real browser: start the server, open a notebook, run it, read what came out.

with serve_jupyterlab(folder) as lab, open_chromium(profile) as browser:
    with open_notebook(browser, lab, "notebooks/00_start_here.ipynb") as notebook:
        notebook.run_all()
        notebook.cell_errors, notebook.page_errors, notebook.console_errors
        notebook.page.get_by_role("slider")...   # Playwright's own page, to work the widgets
        notebook.screenshot("start.png")
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox",  # root in a container has no other way
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
VIEWPORT = {"width": 1280, "height": 900}


MEASURED: list[str] = []  # lines that the browser tests have measured, shown when all tests have run


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome on this machine, or None."""
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


def free_port() -> int:
    """A port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, the token that opens it, and the folder it shows."""

    url: str
    token: str
    folder: Path


@contextmanager
def serve_jupyterlab(folder: Path, timeout: float = 120) -> Iterator[Lab]:
    """Run JupyterLab on `folder` with settings of its own: nothing of the user's Jupyter is read or written.

    Raises RuntimeError with the server's log if it does not answer within `timeout` seconds.
    """
    lab = Lab(f"http://127.0.0.1:{free_port()}", secrets.token_hex(16), folder)
    with tempfile.TemporaryDirectory(prefix="jupyter-", ignore_cleanup_errors=True) as home:
        environment = dict(os.environ, JUPYTER_TOKEN=lab.token, JUPYTER_PREFER_ENV_PATH="1")
        for kind in ("runtime", "config", "data"):
            environment[f"JUPYTER_{kind.upper()}_DIR"] = str(Path(home, kind))
        for kind in ("settings", "workspaces"):
            environment[f"JUPYTERLAB_{kind.upper()}_DIR"] = str(Path(home, kind))
        # A cell out of sight is not drawn otherwise, and a picture of the whole notebook would lack it.
        write_setting(home, "notebook-extension/tracker", {"windowingMode": "none"})
        write_setting(
            home, "apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}
        )
        command = [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"),
            *("--ServerApp.ip=127.0.0.1", f"--ServerApp.port={lab.url.rpartition(':')[2]}"),
            *("--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"),
        ]
        with open(Path(home, "log"), "w+", encoding="utf-8") as log:
            server = subprocess.Popen(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            try:
                wait_until_it_answers(lab, server, timeout, Path(home, "log"))
                yield lab
            finally:
                server.terminate()
                try:
                    server.wait(20)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()


def write_setting(home: str, plugin: str, values: dict) -> None:
    """Write one of JupyterLab's user settings, e.g. of the plugin `notebook-extension/tracker`."""
    file = Path(home, "settings", "@jupyterlab", f"{plugin}.jupyterlab-settings")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values), encoding="utf-8")


def wait_until_it_answers(lab: Lab, server: subprocess.Popen, timeout: float, log: Path) -> None:
    """Return when the server answers; raise RuntimeError with its log if it ends or stays silent."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{lab.url}/api/status?token={lab.token}", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not answer on {lab.url}:\n{log.read_text(encoding='utf-8')[-4000:]}")


@contextmanager
def open_chromium(profile: Path) -> Iterator:
    """A headless Chromium with the empty profile folder `profile`: Playwright's browser context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=find_chromium(),
            headless=True,
            args=CHROMIUM_FLAGS,
            viewport=VIEWPORT,
        )
        try:
            yield context
        finally:
            context.close()


@dataclass
class OpenNotebook:
    """A notebook open in the browser: Playwright's page, and what went wrong on it so far."""

    page: object
    console_errors: list[str] = field(default_factory=list)  # written to the browser's console
    page_errors: list[str] = field(default_factory=list)  # exceptions that no script caught
    timeout: float = 300

    def run_all(self) -> OpenNotebook:
        """Run every cell and return when the last one is done and its outputs and widgets are drawn.

        Raises TimeoutError, naming the cell that was running, after `timeout` seconds.
        """
        self.page.evaluate(
            """() => {
                window.courseRun = "running";
                window.jupyterapp.commands.execute("notebook:run-all-cells").then(
                    () => { window.courseRun = "done"; }, error => { window.courseRun = String(error); });
            }"""
        )
        deadline = time.monotonic() + self.timeout
        # A cell that fails ends the run at once: the others stay unrun, and cell_errors has the reason.
        while self.page.evaluate("window.courseRun") == "running" or self.busy_cells():
            if time.monotonic() > deadline:
                raise TimeoutError(f"still running after {self.timeout} s: {'; '.join(self.busy_cells())}")
            self.page.wait_for_timeout(200)
        self.page.wait_for_timeout(500)  # what the kernel sent last is drawn after it is idle
        return self

    def cells(self) -> list[dict]:
        """The notebook's cells as in its file, with the outputs that are on the screen now."""
        return self.page.evaluate("window.coursePanel.content.model.toJSON().cells")

    def busy_cells(self) -> list[str]:
        """The beginnings of the cells that are running or waiting to run."""
        return (
            self.page.locator(".jp-InputPrompt")
            .filter(has_text="[*]")
            .evaluate_all("prompts => prompts.map(p => p.closest('.jp-Cell').innerText.slice(0, 80))")
        )

    @property
    def cell_errors(self) -> list[str]:
        """`cell 3: NameError: ...` for every error output, and the text of every widget not drawn."""
        errors = [
            f"cell {number}: {output['ename']}: {output['evalue']}"
            for number, cell in enumerate(self.cells())
            for output in cell.get("outputs", [])
            if output["output_type"] == "error" and "raises-exception" not in cell["metadata"].get("tags", [])
        ]
        outputs = self.page.locator(".jp-OutputArea-output").all_inner_texts()
        broken = re.compile(
            "Error displaying widget|Error creating widget|Loading widget|model not found", re.I
        )
        return errors + [f"widget: {text[:200]}" for text in outputs if broken.search(text)]

    def show_cell(self, number: int) -> None:
        """Scroll cell `number` (from 0) into view."""
        self.page.locator(".jp-Notebook .jp-Cell").nth(number).scroll_into_view_if_needed()

    def screenshot(self, file: str | Path, whole: bool = False) -> Path:
        """Write a PNG of the window, or of the whole notebook from top to bottom."""
        window = self.page.viewport_size
        if whole:
            height = self.page.locator(".jp-WindowedPanel-outer").first.evaluate(
                "panel => panel.scrollHeight"
            )
            self.page.set_viewport_size({**window, "height": min(height + 150, 15000)})
            self.page.locator(".jp-WindowedPanel-outer").first.evaluate("panel => { panel.scrollTop = 0; }")
            self.page.wait_for_timeout(500)
        self.page.screenshot(path=str(file))
        self.page.set_viewport_size(window)
        return Path(file)


# Also keeps the notebook's panel at hand for the calls above, whatever has the focus later.
KERNEL_IS_IDLE = """path => {
    const panels = window.jupyterapp ? [...window.jupyterapp.shell.widgets("main")] : [];
    window.coursePanel = panels.find(panel => panel.context && panel.context.path === path);
    const session = window.coursePanel && window.coursePanel.sessionContext.session;
    return Boolean(session && session.kernel && session.kernel.status === "idle");
}"""


@contextmanager
def open_notebook(browser, lab: Lab, notebook: str, timeout: float = 300) -> Iterator[OpenNotebook]:
    """Open a notebook, by its path in the lab's folder, in a new page; ready when its kernel is idle."""
    page = browser.new_page()
    opened = OpenNotebook(page, timeout=timeout)
    page.on("console", lambda message: message.type == "error" and opened.console_errors.append(message.text))
    page.on("pageerror", lambda error: opened.page_errors.append(str(error)))
    try:
        page.goto(f"{lab.url}/lab/tree/{notebook}?reset&token={lab.token}", timeout=60_000)
        page.wait_for_function(KERNEL_IS_IDLE, arg=notebook, timeout=120_000)
        yield opened
    finally:
        # The kernel's memory goes back now, not when the server ends.
        page.evaluate(
            "window.jupyterapp && window.jupyterapp.serviceManager.sessions.shutdownAll().catch(() => 0)"
        )
        page.close(run_before_unload=False)
