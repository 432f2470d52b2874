"""What the benchmarks `decode` and `generate` measured on a GPU, drawn from their JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from dsv2.viz import style
from dsv2.viz.plots import benchmark_bars
from dsv2.viz.style import (
    GREEN,
    GREY,
    INK,
    LINE,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    TITLE,
    VERMILLION,
    finish,
    ink,
    label,
    new_figure,
)

Report = str | Path | Mapping[str, Any]

BROWN, OLIVE = "#7A4B2A", "#9A8B00"  # more lines than the palette has colours that show on white
COLOURS = {
    "dsv2": style.CACHED,
    "dsv2, plain Triton": GREEN,
    "dsv2, 16 heads a program": ORANGE,
    "FlashMLA": VERMILLION,
    "FlashInfer": SKY,
    "FlashAttention 3": BROWN,
    "SGLang, Triton": PURPLE,
    "vLLM, Triton": OLIVE,
    "PyTorch, absorbed": GREY,
}
MARKERS = dict(zip(COLOURS, "os^Dp*vXP"))


def read(report: Report) -> Mapping[str, Any]:
    """A report, or the JSON file of one."""
    if isinstance(report, (str, Path)):
        return json.loads(Path(report).read_text(encoding="utf-8"))
    return report


def source(report: Mapping[str, Any]) -> str:
    """Where it was measured, in a line."""
    versions = report["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)
    return f"{report['device']}, {report['dtype']}, {named}, {report['date']}"


def decode_results_figure(report: Report) -> Figure:
    """Time against cached tokens, one panel below the other for each number of heads; the limit as a line.

    report: what `python -m dsv2.bench decode` wrote on a GPU. Raises ValueError if it holds no sweep.
    """
    report = read(report)
    rows = [row for row in report["results"] if row["kind"] == "sweep" and "us" in row]
    if not rows:
        raise ValueError("the report has no sweep; run `python -m dsv2.bench decode` on a GPU")
    counts = sorted({row["heads"] for row in rows}, reverse=True)
    figure = new_figure(10.4, 0.6 + 4.5 * len(counts))
    panels = figure.subplots(len(counts), 1, squeeze=False)[:, 0]
    style.margins(figure, left=1.0, right=3.05, bottom=1.15, top=0.65, hspace=0.42)
    said = []
    for panel, heads in zip(panels, counts):
        here = [row for row in rows if row["heads"] == heads]
        _times(panel, here)
        batch = here[0]["batch"]
        label(panel, "cached tokens of each text", "time of one attention (µs)")
        panel.set_title(f"{heads} heads, {batch} texts", fontsize=TITLE, color=INK, loc="left", pad=10)
        last = max(row["slots"] for row in here)
        ends = ", ".join(f"{r['contender']} {r['us']:,.0f}" for r in here if r["slots"] == last)
        said.append(f"{heads} heads at {last:,} tokens, µs: {ends}")
    figure.align_ylabels(panels)
    figure.text(0.01, 0.02, source(report), fontsize=SMALL, color=GREY, parse_math=False)
    return finish(figure, f"Time against cached tokens. {'; '.join(said)}.")


def _times(panel, rows: list[Mapping[str, Any]]) -> None:
    style.style_axes(panel, "both")
    panel.set_xscale("log", base=2), panel.set_yscale("log")
    ends = []
    for name, colour in COLOURS.items():
        line = sorted((row["slots"], row["us"]) for row in rows if row["contender"] == name)
        if line:
            panel.plot(
                *zip(*line), color=colour, linewidth=LINE, marker=MARKERS[name], markersize=7, label=name
            )
            ends.append((line[-1][1], name, ink(colour)))
    ours = sorted((row["slots"], row["us"] * row["share"]) for row in rows if row["contender"] == "dsv2")
    panel.plot(*zip(*ours), color=INK, linewidth=2.0, linestyle=(0, (4, 2)))
    ends.append((ours[-1][1], "the limit", INK))
    slots = sorted({row["slots"] for row in rows})
    panel.set_xticks(slots, [f"{n // 1024}K" if n >= 1024 else str(n) for n in slots])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _name_ends(panel, slots[-1], ends)


def _name_ends(panel, x: float, ends: list[tuple[float, str, str]]) -> None:
    """Names beside the lines' ends, moved apart where they would touch, each tied to its end."""
    panel.figure.draw_without_rendering()
    ends, dpi = sorted(ends), panel.figure.dpi
    at = [panel.transData.transform((x, value))[1] for value, _, _ in ends]
    box = panel.get_window_extent()
    for (value, name, colour), end, height in zip(ends, at, apart(at, 0.21 * dpi, box.y0, box.y1)):
        panel.annotate(
            name, (x, value), xytext=(24, (height - end) * 72 / dpi), textcoords="offset points", va="center",
            fontsize=SMALL, fontweight="bold", color=colour, annotation_clip=False, parse_math=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 1.0, "relpos": (0, 0.5), "shrinkB": 5
            },
        )  # fmt: skip


def apart(heights: Sequence[float], least: float, lowest: float, highest: float) -> list[float]:
    """The nearest heights to these (ascending) that are `least` apart, between `lowest` and `highest`.

    Without the room between neighbours they need only not fall: those that would share their mean.
    """
    groups: list[tuple[float, int]] = []  # mean, how many
    for number, height in enumerate(heights):
        mean, size = height - number * least, 1
        while groups and groups[-1][0] > mean:
            before, many = groups.pop()
            mean, size = (mean * size + before * many) / (size + many), size + many
        groups.append((mean, size))
    highest -= (len(heights) - 1) * least
    moved = [max(min(mean, highest), lowest) for mean, size in groups for _ in range(size)]
    return [mean + number * least for number, mean in enumerate(moved)]


def share_of_limit_figure(report: Report) -> Figure:
    """How close every contender comes to the limit, shape by shape."""
    report = read(report)
    rows = [row for row in report["results"] if row["kind"] == "table" and "share" in row]
    if not rows:
        raise ValueError("the report has no shares of the limit; run `python -m dsv2.bench decode` on a GPU")
    shapes = list(dict.fromkeys((row["heads"], row["batch"], row["slots"]) for row in rows))
    figure = new_figure(10.4, 1.85 + 0.44 * len(shapes))
    axes = style.style_axes(figure.add_subplot(), "x")
    style.margins(figure, left=3.0, right=0.3, bottom=1.15, top=1.2)
    for name, colour in COLOURS.items():
        points = [
            (100 * row["share"], shapes.index((row["heads"], row["batch"], row["slots"])))
            for row in rows
            if row["contender"] == name
        ]
        if points:
            front = 4 if name == "dsv2" else 3
            axes.scatter(*zip(*points), s=110, color=colour, marker=MARKERS[name], zorder=front, label=name)
    names = [f"{heads} heads, {batch} x {slots:,} tokens" for heads, batch, slots in shapes]
    ours = {(r["heads"], r["batch"], r["slots"]): r["share"] for r in rows if r["contender"] == "dsv2"}
    axes.set_yticks(range(len(shapes)), names, fontsize=SMALL)
    axes.set_ylim(len(shapes) - 0.4, -0.6)
    axes.set_xlim(0, max(105.0, *(105 * row["share"] for row in rows if row["contender"] in COLOURS)))
    axes.axvline(100, color=INK, linewidth=2.0, zorder=2.5)
    label(axes, "share of the limit (%)")
    place = {"loc": "lower left", "bbox_to_anchor": (-0.36, 1.0), "ncols": 3}
    axes.legend(**place, frameon=False, fontsize=SMALL, handletextpad=0.2)
    figure.text(0.01, 0.02, source(report), fontsize=SMALL, color=GREY, parse_math=False)
    best = "; ".join(f"{name}: {100 * ours[shape]:.0f} %" for name, shape in zip(names, shapes))
    return finish(figure, f"Share of the limit. dsv2, {best}.")


def generate_results_figure(report: Report) -> Figure:
    """Tokens a second of the V2-Lite-shaped model, beside transformers' where both were measured."""
    report = read(report)
    found: dict[tuple, dict[str, float]] = {}
    for row in report["results"]:
        key = (row["kind"], row["batch"], row["cached"])
        found.setdefault(key, {})[row["contender"]] = row["tokens_per_second"]
    bars = []
    for (kind, batch, cached), speeds in found.items():
        if len(speeds) == 2:
            decoding = f"decoding, batch {batch}, {cached:,} cached"
            name = decoding if kind == "decode" else f"prefill, {cached:,} tokens"
            pair = {"ours": speeds["dsv2"], "peer": speeds["transformers"]}
            bars.append({"name": name, **pair, "unit": "tokens/s"})
    figure = benchmark_bars({"ours": "dsv2", "peer": "transformers", "results": bars})
    return finish(figure, f"{source(report)}. {figure.alt}")
