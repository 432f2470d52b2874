"""The look of every figure: palette, sizes, and figures that carry their own description.

Figures are made without pyplot and without rcParams, so that drawing one changes nothing elsewhere and may
happen in a thread beside a notebook's own plots.
"""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette, which every kind of colour vision tells apart (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
INK, GREY, PALE, PAPER = "#1F2430", "#5F6673", "#E4E7EC", "#FFFFFF"

CACHED = BLUE  # what decoding keeps: the same colour in every figure
ACTIVE = VERMILLION  # an expert at work: likewise
ATTENTION_COLOURS = {"MLA": CACHED, "MHA": GREY, "GQA": GREEN, "MQA": PURPLE}
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)

# Points at about 10 inches of width; nothing is smaller than SMALL, so that the last row can read it.
TITLE, BASE, SMALL = 16.0, 14.0, 13.0
LINE = 3.0
DPI = 100

# Weights of chosen experts: from just visible on white to ACTIVE and beyond.
GLOW = colors.LinearSegmentedColormap.from_list("dsv2_glow", ["#FFE3CC", "#F79A4B", ACTIVE, "#7A2E00"])
# Below the scale: not chosen. Masked: no expert there.
GLOW = GLOW.with_extremes(under=PALE, bad=(0, 0, 0, 0))

_drawing = threading.RLock()


class Picture(Figure):
    """A matplotlib Figure that shows itself in a notebook and says in words what it shows.

    alt: the description, for screen readers and for tests; read it with `describe`.
    """

    alt = ""

    def _ipython_display_(self) -> None:
        from IPython.display import display

        # `alt` is where notebook converters look for the text that stands in for an image.
        data = {"image/png": png(self), "text/plain": self.alt or "a figure"}
        display(data, raw=True, metadata={"image/png": {"alt": self.alt}})


def new_figure(width: float, height: float) -> Picture:
    """An empty white figure of `width` x `height` inches, with its own canvas."""
    figure = Picture(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def margins(
    figure: Figure,
    left: float = 0.9,
    right: float = 0.3,
    bottom: float = 0.75,
    top: float = 0.55,
    wspace: float | None = None,
    hspace: float | None = None,
) -> None:
    """Set the white border in inches: much faster than measuring texts, and still while a figure updates."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=wspace,
        hspace=hspace,
    )


def style_axes(axes: Axes, grid: str | None = "y") -> Axes:
    """Plain axes: two quiet spines, large ticks, a faint grid along `grid` ("x", "y" or None)."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
        axes.spines[side].set_linewidth(1.2)
    axes.tick_params(labelsize=SMALL, colors=INK, width=1.2, length=4, color=GREY)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis=grid, color=PALE, linewidth=1.0)
    return axes


def new_axes(axes: Axes | None, width: float, height: float, grid: str | None = "y", **border: float) -> Axes:
    """`axes`, or those of a new figure of this size in inches, styled."""
    if axes is None:
        figure = new_figure(width, height)
        axes = figure.add_subplot()
        margins(figure, **border)
    return style_axes(axes, grid)


def label(axes: Axes, x: str | None = None, y: str | None = None, title: str | None = None) -> None:
    """Axis labels, with their units, and a title flush left, in which $ and _ mean themselves."""
    if x is not None:
        axes.set_xlabel(x, fontsize=BASE, color=INK)
    if y is not None:
        axes.set_ylabel(y, fontsize=BASE, color=INK)
    if title is not None:
        axes.set_title(title, fontsize=TITLE, color=INK, loc="left", pad=10, parse_math=False)


def measured_lines(
    axes: Axes, x: Sequence[float], series: Mapping[str, Sequence[float]], markersize: int, gap: int
) -> None:
    """Measured points joined by lines, each named at its end, `gap` points to the right of its last point."""
    for (name, values), colour in zip(series.items(), itertools.cycle((VERMILLION, CACHED, GREEN))):
        axes.plot(x, values, "o-", color=colour, linewidth=LINE, markersize=markersize, label=name)
        axes.annotate(
            name,
            (x[-1], values[-1]),
            xytext=(gap, 0),
            textcoords="offset points",
            va="center",
            fontsize=BASE,
            fontweight="bold",
            color=ink(colour),
            annotation_clip=False,
        )


def finish(drawn: Axes | Figure, alt: str) -> Figure:
    """The figure that `drawn` belongs to, with its description."""
    figure = drawn.figure
    while figure.figure is not figure:  # a subfigure: up to the one that can be saved
        figure = figure.figure
    figure.alt = alt
    return figure


def describe(figure: Figure) -> str:
    """What a figure of this package shows, in words and numbers."""
    return getattr(figure, "alt", "")


def ink(colour: str) -> str:
    """`colour`, darkened until text in it has a contrast of 4.5 against white (WCAG AA)."""
    rgb = colors.to_rgb(colour)
    while 1.05 / (_luminance(rgb) + 0.05) < 4.5:
        rgb = tuple(channel * 0.92 for channel in rgb)
    return colors.to_hex(rgb)


def on(colour: str | Sequence[float]) -> str:
    """Black or white: whichever reads better on `colour`."""
    return INK if _luminance(colors.to_rgb(colour)) > 0.3 else PAPER


def tint(colour: str, amount: float = 0.15) -> str:
    """`colour` thinned with white: `amount` 0 is white, 1 is the colour."""
    return colors.to_hex([1 - amount * (1 - channel) for channel in colors.to_rgb(colour)])


def _luminance(rgb: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def colour_of(name: str, index: int = 0) -> str:
    """The fixed colour of an attention ("MLA", "GQA, 8 groups", ...), or the palette's `index`-th."""
    return ATTENTION_COLOURS.get(name[:3].upper(), CYCLE[index % len(CYCLE)])


def png(figure: Figure, dpi: float | None = None) -> bytes:
    """The figure as PNG, quickly: lightly compressed. For a small file use `save`."""
    out = io.BytesIO()
    _pixels(figure, dpi).save(out, format="png", compress_level=1)
    return out.getvalue()


def save(figure: Figure, path: str | Path, dpi: float = 2 * DPI) -> Path:
    """Write a figure as a small PNG (a palette of 256 colours) or, by the name's ending, as SVG.

    The same figure gives the same bytes every time. Raises ValueError for another ending.
    """
    path = Path(path)
    if path.suffix == ".png":
        _pixels(figure, dpi).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    elif path.suffix == ".svg":
        title = {"Date": None, "Description": describe(figure)}
        with matplotlib.rc_context({"svg.hashsalt": "dsv2"}):
            figure.savefig(path, format="svg", metadata=title, facecolor=PAPER)
    else:
        raise ValueError(f"path={str(path)!r} must end in .png or .svg")
    return path


def _pixels(figure: Figure, dpi: float | None = None) -> Image.Image:
    with _drawing:  # matplotlib's font caches are shared by all threads
        before = figure.dpi
        try:
            if dpi is not None:
                figure.set_dpi(dpi)
            canvas = figure.canvas if hasattr(figure.canvas, "buffer_rgba") else FigureCanvasAgg(figure)
            canvas.draw()
            # Every figure here is opaque, so nothing is lost with the alpha channel.
            return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        finally:
            if figure.dpi != before:
                figure.set_dpi(before)
