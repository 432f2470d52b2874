"""Figures that move: sliders over plots, text as it is generated, a browser for routing.

Only core widgets, so that the same code runs in JupyterLab (ipywidgets 8) and on Colab (7.7). A picture is a
PNG in an Image widget: it is replaced in one message, without a flicker. Everything works without a browser
too: set a value in Python, read the figure.
"""

from __future__ import annotations

import asyncio
import contextvars
import html
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from dsv2.config import DSV2Config
from dsv2.moe.routing import Routing
from dsv2.viz import style
from dsv2.viz.plots import (
    cache_bytes_per_token,
    cache_growth,
    expert_heatmap,
    expert_lights,
    join_routings,
    last_token,
    visible,
)

FRAMES_PER_SECOND, TEXTS_PER_SECOND = 5, 12
DRAWING_SHARE = 0.4  # at most, of the time; the rest belongs to the model, on the same cores
WINDOW = 48  # tokens that the routing browser shows at once

_WIDE = {"description_width": "initial"}


class Explorer:
    """Sliders over a plot: each change draws the figure anew and puts it into an image.

        Explorer(lambda rank, log: my_plot(rank, log=log), rank=(1, 64), log=False)

    plot: function of the controls' values that returns a Figure. If it has a parameter `figure`, it is given
    the figure it returned last (None at first) and may move its artists instead of drawing all of them.
    controls: by name, an ipywidgets control, or a short form: (low, high) or (low, high, step) a slider,
    starting low; a bool a checkbox; a str a text box; a list or dict a menu. caption: function of the same
    values that returns HTML to stand below the figure, such as the numbers in words; None: the figure's
    description is there for screen readers' sake. dpi: resolution of the image.

    Last in a notebook's cell it shows itself. Sliders move with the arrow keys. In Python: `set(rank=8)`,
    `values`, `figure`, `reset()`; `last_update_ms` is the time the last update took, `update_ms` all of them.
    An exception in `plot` is shown in red below the controls and kept in `error`.
    """

    def __init__(
        self,
        plot: Callable[..., Figure],
        *,
        title: str = "",
        caption: Callable[..., str] | None = None,
        dpi: float | int = style.DPI,
        **controls: Any,
    ):
        if not controls:
            raise ValueError("an Explorer needs at least one control, such as rank=(1, 64)")
        self.plot, self.dpi = plot, dpi
        self._caption = caption
        self._reuses_figure = "figure" in inspect.signature(plot).parameters
        self.controls = {name: _control(name, given) for name, given in controls.items()}
        self._start = self.values
        self.figure: Figure | None = None
        self.error: Exception | None = None
        self.update_ms: list[float] = []
        self._scheduled: asyncio.TimerHandle | None = None
        self._held = False

        self.image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
        self.below = ipywidgets.HTML()
        self.reset_button = ipywidgets.Button(description="Reset", icon="undo")
        self.reset_button.on_click(lambda _: self.reset())
        rows = [*self.controls.values(), self.reset_button]
        heading = [ipywidgets.HTML(f"<b>{html.escape(title)}</b>")] if title else []
        self.widget = ipywidgets.VBox([*heading, *rows, self.image, self.below])
        for control in self.controls.values():
            control.observe(self._changed, "value")
        self.draw()

    @property
    def values(self) -> dict[str, Any]:
        """The controls' values by name."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def last_update_ms(self) -> float:
        """Milliseconds that the last update took, from values to PNG."""
        return self.update_ms[-1]

    def set(self, **values: Any) -> Figure | None:
        """Set controls from Python and draw once; returns the figure. Raises ValueError for an unknown name.

        Raises whatever the plot raised.
        """
        unknown = sorted(set(values) - set(self.controls))
        if unknown:
            raise ValueError(
                f"there is no control named {', '.join(unknown)}; there are {', '.join(self.controls)}"
            )
        self._held = True
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self._held = False
        self.draw()
        if self.error is not None:
            raise self.error
        return self.figure

    def reset(self) -> None:
        """Put every control back to where it was at first."""
        self.set(**self._start)

    def draw(self) -> None:
        """Draw with the present values, whether they changed or not."""
        self._cancel()
        began = time.perf_counter()
        values = self.values
        try:
            past = {"figure": self.figure} if self._reuses_figure else {}
            figure = self.plot(**values, **past)
            picture = style.png(figure, self.dpi)
            below = self._caption(**values) if self._caption else html.escape(style.describe(figure))
        except Exception as error:  # whatever a plot raises is for the reader to see
            self.error = error
            self.below.value = _red(error)
        else:
            self.error, self.figure = None, figure
            width = figure.get_size_inches()[0] * style.DPI
            self.image.layout.width = f"{width:.0f}px"
            self.image.value = picture
            self.below.value = below
        self.update_ms.append(1000 * (time.perf_counter() - began))

    def _changed(self, _change: Any) -> None:
        """Draw soon: once, however many changes wait in the queue."""
        if self._held or self._scheduled is not None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no kernel: there is no queue to wait for
            self.draw()
            return
        self._scheduled = loop.call_later(0.02, self.draw)

    def _cancel(self) -> None:
        if self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)


def in_columns(explorer: Explorer, *columns: Sequence[str], reset_below: int = 0) -> Explorer:
    """The explorer with its controls side by side, the reset button below column `reset_below`."""
    boxes = [ipywidgets.VBox([explorer.controls[name] for name in names]) for names in columns]
    boxes[reset_below].children += (explorer.reset_button,)
    wrap = ipywidgets.Layout(flex_flow="row wrap")
    explorer.widget.children = (ipywidgets.HBox(boxes, layout=wrap), explorer.image, explorer.below)
    return explorer


def _control(name: str, given: Any) -> ipywidgets.Widget:
    """The control that a short form stands for."""
    about = {"description": name.replace("_", " "), "style": _WIDE}
    wide = ipywidgets.Layout(width="95%", max_width="640px")
    if isinstance(given, ipywidgets.Widget):
        if not given.has_trait("value"):
            raise ValueError(f"control {name}={given!r} has no value to read; give a slider, a menu, a box")
        return given
    if isinstance(given, bool):
        return ipywidgets.Checkbox(given, **about)
    if isinstance(given, str):
        return ipywidgets.Text(given, layout=wide, **about)
    if isinstance(given, tuple) and len(given) in (2, 3) and all(isinstance(v, (int, float)) for v in given):
        low, high, *step = given
        whole = all(isinstance(v, int) for v in given)
        kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        step = step[0] if step else (1 if whole else (high - low) / 100)
        return kind(value=low, min=low, max=high, step=step, layout=wide, **about)
    if isinstance(given, (list, dict)) and given:
        return ipywidgets.Dropdown(options=given, **about)
    raise ValueError(
        f"control {name}={given!r} is not understood; give a widget, (low, high), (low, high, step), a bool, "
        "a str, a list or a dict"
    )


def _red(error: BaseException | str) -> str:
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return f'<pre style="color:#b00020;white-space:pre-wrap;margin:0">{html.escape(text)}</pre>'


# ------------------------------------------------------------------------------------------- generation


class LiveGeneration:
    """What `live_generation` returns: the widget, what it made, and the same from Python.

    run(prompt) generates here and now and returns the text; start() does so in the background, stop() ends
    it, wait() waits for it. text: prompt and what was written; texts, routings: of the tokens that went
    through the model during generation, for `routing_browser`; cache_figure, experts_figure: as last shown;
    frames: when pictures were shown, in seconds since the start; error: what went wrong, or None.
    """

    def __init__(
        self,
        stream_factory: Callable[..., Iterator[Any]],
        cfg: DSV2Config,
        *,
        prompt: str,
        temperature: float | int,
        max_new_tokens: int,
        per_token_bytes: Mapping[str, float | int] | None,
        dpi: float | int,
        time_limit: float | int,
    ):
        self.stream_factory, self.cfg, self.dpi, self.time_limit = stream_factory, cfg, dpi, time_limit
        self.per_token_bytes = per_token_bytes
        self._stopping, self._busy = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._clear("")

        wide = ipywidgets.Layout(width="95%", max_width="880px")
        self.prompt = ipywidgets.Textarea(prompt, description="prompt", rows=2, style=_WIDE, layout=wide)
        self.temperature = ipywidgets.FloatSlider(
            temperature, min=0.0, max=1.5, step=0.05, description="temperature", style=_WIDE
        )
        self.max_new_tokens = ipywidgets.IntSlider(
            max_new_tokens,
            min=1,
            max=max(400, max_new_tokens),
            description="most new tokens",
            style=_WIDE,
        )
        self.generate_button = ipywidgets.Button(
            description="Generate", icon="play", button_style="primary", tooltip="write on from the prompt"
        )
        self.stop_button = ipywidgets.Button(
            description="Stop", icon="stop", disabled=True, tooltip="end the text here"
        )
        self.generate_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.text_view, self.status = ipywidgets.HTML(), ipywidgets.HTML()
        picture = ipywidgets.Layout(max_width="100%", width="900px", display="none")
        self.cache_image = ipywidgets.Image(format="png", layout=picture)
        self.experts_image = ipywidgets.Image(
            format="png", layout=ipywidgets.Layout(max_width="100%", width="900px", display="none")
        )
        self.widget = ipywidgets.VBox(
            [
                self.prompt,
                ipywidgets.HBox(
                    [self.temperature, self.max_new_tokens], layout=ipywidgets.Layout(flex_flow="row wrap")
                ),
                ipywidgets.HBox([self.generate_button, self.stop_button, self.status]),
                self.text_view,
                self.experts_image,
                self.cache_image,
            ]
        )

    # ------------------------------------------------------------------------------------- from outside

    def run(
        self,
        prompt: str | None = None,
        *,
        temperature: float | int | None = None,
        max_new_tokens: int | None = None,
    ) -> str:
        """Generate to the end and return the text, prompt included. None: what the control says.

        Shows an error in the widget and raises it; RuntimeError if a text is being generated already.
        """
        for control, value in (
            (self.prompt, prompt),
            (self.temperature, temperature),
            (self.max_new_tokens, max_new_tokens),
        ):
            if value is not None:
                control.value = value
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("a text is being generated; stop() it, or wait() for its end")
        self._generate(self._settings())
        if self.error is not None:
            raise self.error
        return self.text

    def start(self) -> bool:
        """Generate in the background; False, and nothing else, if a text is being generated already."""
        if not self._busy.acquire(blocking=False):
            return False
        # The thread answers to the click, or the cell, that started it.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._generate, self._settings()), daemon=True, name="live generation"
        )
        self._thread.start()
        return True

    def stop(self) -> None:
        """End the text after the token that is being made."""
        self._stopping.set()

    def wait(self, timeout: float | int | None = None) -> bool:
        """Wait for the background; True once nothing is being generated."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self.running

    @property
    def running(self) -> bool:
        return self._busy.locked()

    @property
    def routings(self) -> list[Routing]:
        """One `Routing` per layer of experts over `texts`."""
        return join_routings(self._routings)

    # --------------------------------------------------------------------------------------- from inside

    def _clear(self, prompt: str) -> None:
        self.text, self._prompt = prompt, prompt
        self.texts: list[str] = []
        self.frames: list[float] = []
        self.error: Exception | None = None
        self.cache_figure: Figure | None = None
        self.experts_figure: Figure | None = None
        self.tokens_made = 0
        self._routings: list[list[Routing]] = []
        self._brightest = 0.0

    def _settings(self) -> dict[str, Any]:
        """What the controls say now; moving them later changes the next text."""
        self._stopping.clear()
        return {
            "prompt": self.prompt.value,
            "temperature": self.temperature.value,
            "max_new_tokens": self.max_new_tokens.value,
        }

    def _generate(self, settings: dict[str, Any]) -> None:
        """The whole of one text. Called with `_busy` held, in either thread."""
        try:
            self._clear(settings["prompt"])
            self.generate_button.disabled, self.stop_button.disabled = True, False
            self.status.value = "reading the prompt …"
            self._show_text()
            self._follow(**settings)
        except Exception as error:  # a thread's error would be seen by nobody
            self.error = error
            self.status.value = _red(error)
        finally:
            self.generate_button.disabled, self.stop_button.disabled = False, True
            self._busy.release()

    def _follow(self, prompt: str, **options: Any) -> None:
        began = time.perf_counter()
        end = "done"
        step, last_text, written, shown, spent = None, prompt[-1:], began, began, 0.0
        steps = self.stream_factory(prompt, **options)
        try:
            for step in steps:
                if step.routings:
                    token = last_token(step.routings)
                    self._routings.append(token)
                    self.texts.append(last_text)
                    self._brightest = max(self._brightest, *(float(r.weights.max()) for r in token))
                self.tokens_made += 1
                self.text += step.text
                if self.tokens_made == 1:
                    until = step.position + options["max_new_tokens"]
                now = time.perf_counter()
                if now - written > 1 / TEXTS_PER_SECOND:
                    self._show_text()
                    self.status.value = self._pace(now - began)
                    written = now
                if self.tokens_made == 1 or now - shown > max(1 / FRAMES_PER_SECOND, spent / DRAWING_SHARE):
                    self._show_pictures(step, last_text, until, now - began)
                    shown, spent = now, time.perf_counter() - now
                last_text = step.text
                if self._stopping.is_set():
                    end = "stopped"
                    break
                if now - began > self.time_limit:
                    end = f"stopped after {self.time_limit:g} seconds"
                    break
        finally:
            if hasattr(steps, "close"):  # a generator then puts the model back as it was
                steps.close()
        took = time.perf_counter() - began
        self._show_text()
        if step is not None:
            before = self.texts[-1] if self.texts else last_text
            self._show_pictures(step, before, until, took)
        self.status.value = f"{end}: {self._pace(took)}"

    def _pace(self, seconds: float) -> str:
        return f"{self.tokens_made} tokens, {self.tokens_made / seconds:.0f} per second"

    def _show_text(self) -> None:
        # A lone surrogate cannot be sent as UTF-8.
        prompt, text = (t.encode("utf-8", "replace").decode() for t in (self._prompt, self.text))
        self.text_view.value = (
            '<pre style="white-space:pre-wrap;overflow-wrap:anywhere;font-size:15px;line-height:1.45;'
            'margin:6px 0;max-width:900px">'
            f'<b style="color:{style.CACHED}">{html.escape(prompt)}</b>'
            f"{html.escape(text[len(prompt) :])}</pre>"
        )

    def _show_pictures(self, step: Any, read: str, until: int, seconds: float) -> None:
        each = self.per_token_bytes or cache_bytes_per_token(self.cfg, step.cache.dtype)
        # Lower than `cache_growth` draws it alone, so that text and pictures fit on one screen.
        low = style.new_axes(None, 9.0, 3.4, left=1.0, right=2.85, bottom=0.8, top=0.2)
        self.cache_figure = cache_growth(step.cache.longest, each, until=until, ax=low)
        self._put(self.cache_image, self.cache_figure)
        if step.routings:
            self.experts_figure = expert_lights(
                self._routings[-1], self.cfg, text=read, brightest=self._brightest
            )
            self._put(self.experts_image, self.experts_figure)
        self.frames.append(seconds)

    def _put(self, image: ipywidgets.Image, figure: Figure) -> None:
        image.value = style.png(figure, self.dpi)
        image.layout.display = None

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)


def live_generation(
    stream_factory: Callable[..., Iterator[Any]],
    cfg: DSV2Config,
    *,
    prompt: str = "",
    temperature: float | int = 0.8,
    max_new_tokens: int = 120,
    per_token_bytes: Mapping[str, float | int] | None = None,
    dpi: float | int = style.DPI,
    time_limit: float | int = 120,
) -> LiveGeneration:
    """A prompt box that writes: text as it streams, the cache as it grows, the experts of each token.

    stream_factory(prompt, temperature=, max_new_tokens=) -> iterator of steps with .text, .position,
    .routings and .cache, such as functools.partial(dsv2.generate.stream, model). per_token_bytes: the caches
    to compare, as in `cache_growth`; None: MLA with MHA, in the cache's own type. time_limit: seconds after
    which a text is ended. Pictures are renewed at most five times a second and take at most 40 % of it.

        live = live_generation(partial(stream, model), model.cfg, prompt="def ")
        live                # in a notebook: the widget
        live.run("def ")    # anywhere: the text; then live.cache_figure, live.experts_figure
    """
    return LiveGeneration(
        stream_factory,
        cfg,
        prompt=prompt,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        per_token_bytes=per_token_bytes,
        dpi=dpi,
        time_limit=time_limit,
    )


# ---------------------------------------------------------------------------------------------- routing


def routing_browser(routings: Sequence[Routing], texts: Sequence[str], cfg: DSV2Config) -> Explorer:
    """A slider over the layers and one over the tokens: the layer's heatmap, and the token's best experts.

    routings: one per layer of experts, of shape (batch, T, ...), the first sequence is shown; texts: (T,).
    Controls: `layer`, an index into `routings`, and `token`. Of a long text the part around the token shows.
    """
    if not texts:
        raise ValueError("texts is empty; give the text of each token that was routed")

    def part(token: int) -> slice:
        start = min(token // (WINDOW // 2) * (WINDOW // 2), max(len(texts) - WINDOW, 0))
        return slice(start, start + WINDOW)

    def plot(layer: int, token: int) -> Figure:
        window = part(token)
        cut = [
            Routing(
                r.expert_ids[:, window],
                r.weights[:, window],
                r.scores[:, window],
                None if r.kept is None else r.kept[:, window],
            )
            for r in routings
        ]
        figure = expert_heatmap(cut, texts[window], layer, cfg=cfg)
        axes = figure.axes[0]
        at = token - window.start
        axes.axvspan(
            at - 0.5, at + 0.5, fill=False, edgecolor=style.INK, linewidth=2.5, clip_on=False, gid="token"
        )
        return figure

    def table(layer: int, token: int) -> str:
        routing = routings[layer]
        rows = "".join(
            f"<tr><td>{expert}</td><td>{expert * cfg.n_group // routing.n_experts}</td>"
            f"<td>{weight:.3f}</td><td>{100 * float(routing.scores[0, token, expert]):.1f} %</td></tr>"
            for expert, weight in zip(
                routing.expert_ids[0, token].tolist(), routing.weights[0, token].tolist()
            )
        )
        return (
            f"Token {token}, <code>{html.escape(visible(texts[token]))}</code>, "
            f"in layer {cfg.moe_layers[layer]}:"
            '<table style="font-size:15px;border-spacing:14px 2px"><tr><th>expert</th><th>device</th>'
            f"<th>weight</th><th>affinity</th></tr>{rows}</table>"
        )

    about = {"style": _WIDE, "layout": ipywidgets.Layout(width="95%", max_width="640px")}
    options = [(f"layer {number}", i) for i, number in enumerate(cfg.moe_layers)]
    return Explorer(
        plot,
        caption=table,
        layer=ipywidgets.SelectionSlider(options=options, description="layer", **about),
        token=ipywidgets.IntSlider(0, min=0, max=len(texts) - 1, description="token", **about),
    )
