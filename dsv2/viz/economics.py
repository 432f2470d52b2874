"""Chapter 13 in pictures: what serving costs, 5.76x in steps, predicted times beside measured ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dsv2.config import DSV2Config
from dsv2.economics import (
    CACHE_FORMATS,
    NEW,
    OLD,
    WEIGHT_FORMATS,
    Check,
    Deployment,
    SpeedupStep,
    Throughput,
    decode_throughput,
    largest_batch,
    published_speeds,
    published_speedup,
    speedup,
)
from dsv2.published import Device, measured_devices, published_devices, published_models
from dsv2.viz import style
from dsv2.viz.cache import CONTEXTS, tokens_text
from dsv2.viz.plots import human_bytes
from dsv2.viz.published import COLOURS, MARKERS
from dsv2.viz.roofline import time_text
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, margins, new_axes, new_figure
from dsv2.viz.widgets import Explorer, in_columns

REFERENCES = ("DeepSeek 67B", "LLaMA3 70B")
LARGEST = 0  # the batch that stands for "the largest that fits"
BATCHES = (LARGEST, *(2**power for power in range(13)))
GPUS = (1, 2, 4, 8, 16, 32)
WEIGHTS = "#9AA3B2"
STEP_COLOURS = {
    "MLA": style.CACHED,
    "V2's layers and experts": style.VERMILLION,
    "FP8 weights": style.GREEN,
    "6-bit cache": style.PURPLE,
}

# --------------------------------------------------------------------------------------------- 5.76 in steps


def speedup_figure(steps: Sequence[SpeedupStep], published: Mapping[str, float] | None = None) -> Figure:
    """Tokens a second after each change from DeepSeek 67B to DeepSeek-V2, and the factor of each.

    steps: from `speedup_steps`. published: speeds of the first and the last, by name; diamonds. None: figure
    1(b)'s.
    """
    if len(steps) < 2:
        raise ValueError(f"steps has {len(steps)} entries; there must be 2 or more")
    published = published_speeds() if published is None else published
    figure = new_figure(10.4, 1.5 + 0.74 * len(steps))
    ax = style.style_axes(figure.add_subplot(), "x")
    margins(figure, left=3.15, right=1.1, bottom=1.2, top=0.2)
    names, top = [], max([step.throughput.tokens_per_second for step in steps] + [*published.values()])
    for row, step in enumerate(steps):
        speed = step.throughput.tokens_per_second
        ax.barh(row, speed, height=0.62, color=STEP_COLOURS.get(step.name, WEIGHTS), label=step.name)
        names.append(step.name if row == 0 else f"+ {step.name}")
        weights = f"weights {human_bytes(step.throughput.memory.weights)}"
        what = f"{weights}, batch {step.throughput.batch:,}"
        _beside(ax, speed, row, what if row == 0 else f"x{step.factor:.2f};  {what}")
    ends = [(0, published.get(OLD)), (len(steps) - 1, published.get(NEW))]
    for row, speed in ends:
        if speed is not None:
            ax.plot(speed, row + 0.41, "D", color=INK, ms=9, clip_on=False, zorder=5)
    if any(speed is not None for _, speed in ends):
        figure.text(
            0.012, 0.035, "diamonds: as published for 8 H800, context and batch not stated",
            fontsize=SMALL, color=style.GREY,
        )  # fmt: skip
    ax.set_yticks(range(len(steps)), names, fontsize=BASE)
    ax.set_ylim(len(steps) - 0.35, -0.5)
    ax.set_xlim(0, 1.78 * top)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
    context, devices = steps[0].throughput.context, steps[0].throughput.devices
    label(ax, f"tokens/s at most on {devices} GPUs, {context:,} cached tokens a text")
    said = ", ".join(
        f"{step.name} {step.throughput.tokens_per_second:,.0f} (x{step.factor:.2f})" for step in steps
    )
    return finish(
        ax, f"Tokens a second at most, {context:,} cached tokens: {said}; together x{speedup(steps):.2f}."
    )


def _beside(ax: Axes, x: float, y: float, text: str, weight: str = "normal") -> None:
    """A text to the right of a bar's end."""
    ax.annotate(
        text, (x, y), xytext=(8, 0), textcoords="offset points", va="center", fontsize=SMALL, color=INK,
        fontweight=weight, annotation_clip=False, parse_math=False,
    )  # fmt: skip


def speedup_by_context(
    factors: Mapping[int, float], published: float | None = None, axes: Axes | None = None
) -> Figure:
    """How many times faster DeepSeek-V2 decodes than DeepSeek 67B by the model, against the context.

    factors: by cached tokens, such as {n: speedup(speedup_steps(n)) for n in (1024, 4096)}. published: the
    dashed line; None: 5.76.
    """
    if len(factors) < 2:
        raise ValueError(f"factors has {len(factors)} contexts; there must be 2 or more")
    published = published_speedup() if published is None else published
    ax = new_axes(axes, 10.0, 4.3, left=1.0, right=0.4, bottom=0.8, top=0.3)
    ax.axhline(published, color=INK, linewidth=2.0, linestyle=(0, (5, 3)), label="published")
    ax.annotate(
        f"published: {published:g}", (0.01, published), xycoords=("axes fraction", "data"), xytext=(0, 5),
        textcoords="offset points", va="bottom", fontsize=BASE, color=INK,
    )  # fmt: skip
    ax.plot(*zip(*factors.items()), "o-", color=style.CACHED, linewidth=LINE, ms=9, label="the model")
    for context, factor in factors.items():
        ax.annotate(
            f"{factor:.2f}", (context, factor), xytext=(0, -20), textcoords="offset points", ha="center",
            fontsize=BASE, color=style.ink(style.CACHED),
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(factors), [tokens_text(context) for context in factors])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.margins(x=0.06)
    ax.set_ylim(0, 1.2 * max(published, *factors.values()))
    label(ax, "cached tokens of each text", "times DeepSeek 67B's tokens/s")
    said = ", ".join(f"{context:,}: {factor:.2f}" for context, factor in factors.items())
    return finish(ax, f"Times DeepSeek 67B's tokens a second by the model, by cached tokens: {said}.")


def batch_curves(runs: Mapping[str, Sequence[Throughput]], price: float) -> Figure:
    """What a larger batch brings and costs: tokens a second of all texts, and the price against one reader's.

    runs: by model, decoding steps of growing batches; those that do not fit are left out. price: of an hour
    of one device, in dollars. Raises ValueError where nothing fits.
    """
    fitting = {name: [run for run in found if run.fits] for name, found in runs.items()}
    fitting = {name: found for name, found in fitting.items() if found}
    if not fitting:
        raise ValueError("runs has no batch that fits; there must be one or more")
    figure = new_figure(10.8, 4.9)
    speeds, prices = figure.subplots(1, 2)
    margins(figure, left=1.2, right=0.35, bottom=0.8, top=0.6, wspace=0.32)
    for panel in (speeds, prices):
        style.style_axes(panel)
        panel.set_xscale("log")
        panel.set_yscale("log")
    said = []
    for name, found in fitting.items():
        look = {"color": COLOURS.get(name, style.PURPLE), "marker": MARKERS.get(name, "o"), "label": name}
        look |= {"linewidth": LINE, "ms": 7}
        speeds.plot([run.batch for run in found], [run.tokens_per_second for run in found], **look)
        readers = [1 / run.seconds for run in found]
        costs = [run.cost_per_million(price) for run in found]
        prices.plot(readers, costs, **look)
        ends = (
            f"batch {run.batch:,}: {run.tokens_per_second:,.0f} tokens/s, {_money(cost)} dollars"
            for run, cost in ((found[0], costs[0]), (found[-1], costs[-1]))
        )
        said.append(f"{name}, {'; '.join(ends)}")
    for panel in (speeds, prices):
        for axis in (panel.xaxis, panel.yaxis):
            wide = axis is speeds.xaxis  # four decades
            axis.set_major_locator(LogLocator(10.0, subs=(1,) if wide else (1, 3)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        panel.margins(x=0.06, y=0.08)
    context, devices = (getattr(next(iter(fitting.values()))[0], what) for what in ("context", "devices"))
    label(speeds, "texts at once (batch)", "tokens/s at most, all texts")
    label(prices, "tokens/s at most of one reader", "dollars a million tokens")
    figure.legend(
        handles=speeds.lines, loc="upper left", ncol=len(fitting), fontsize=BASE, frameon=False,
        bbox_to_anchor=(0.08, 1.0), columnspacing=1.8,
    )  # fmt: skip
    return finish(
        figure, f"{devices} GPUs at {price:g} dollars an hour each, {context:,} cached tokens a text. "
        f"{'; '.join(said)}.",
    )  # fmt: skip


# ------------------------------------------------------------------------------------ predicted and measured


def predicted_measured(checks: Sequence[Check]) -> Figure:
    """Predicted time (a bar's end) and measured time (a dot) of each check, and the share of the limit."""
    if not checks:
        raise ValueError("checks is empty")
    ax = new_axes(None, 10.4, 1.35 + 0.4 * len(checks), grid="x", left=4.75, right=1.1, bottom=0.8, top=0.5)
    for row, check in enumerate(checks):
        predicted, measured = 1e3 * check.predicted, 1e3 * check.measured
        ax.plot([predicted, measured], [row, row], color=style.GREY, linewidth=2.0, zorder=2)
        ax.plot(predicted, row, "|", color=style.BLUE, ms=17, mew=4, zorder=3)
        ax.plot(measured, row, "o", color=style.VERMILLION, ms=9, zorder=4)
        ax.annotate(
            f"{check.share:.0%}", (1, row), xycoords=("axes fraction", "data"), xytext=(52, 0), ha="right",
            textcoords="offset points", va="center", fontsize=BASE, fontweight="bold", color=INK,
            annotation_clip=False,
        )  # fmt: skip
    ax.set_xscale("log")
    times = [1e3 * time for check in checks for time in (check.predicted, check.measured)]
    ax.set_xlim(min(times) / 1.6, max(times) * 1.6)
    narrow = max(times) < 100 * min(times)
    ax.xaxis.set_major_locator(LogLocator(10.0, subs=(1, 2, 5) if narrow else (1,)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_yticks(range(len(checks)), [_short(check.what) for check in checks], fontsize=SMALL)
    ax.set_ylim(len(checks) - 0.5, -0.6)
    above = 1 + 0.24 / (0.4 * len(checks) + 0.05)  # a quarter of an inch
    for place, mark, colour, text in (
        (0.02, "|", style.BLUE, "predicted"),
        (0.36, "o", style.VERMILLION, "measured"),
    ):
        look = {"color": colour, "ms": 15 if mark == "|" else 9, "mew": 4 if mark == "|" else 1}
        ax.plot(place, above, mark, transform=ax.transAxes, clip_on=False, **look)
        ax.annotate(
            text, (place, above), xycoords="axes fraction", xytext=(12, 0), textcoords="offset points",
            va="center", fontsize=BASE, color=style.ink(colour), annotation_clip=False,
        )  # fmt: skip
    label(ax, "time (ms); to the right: predicted / measured")
    shares = [check.share for check in checks]
    return finish(
        ax,
        f"{len(checks)} measured times beside the model's: predicted over measured from {min(shares):.0%} to "
        f"{max(shares):.0%}. " + "; ".join(f"{check.what} {check.share:.0%}" for check in checks) + ".",
    )


def _short(what: str) -> str:
    return (
        what.replace(" cached tokens", " tokens").replace("a step of ", "").replace("attention, ", "attn., ")
    )


def miniature_figure(report: Mapping[str, Any]) -> Figure:
    """Tokens a second by batch of the two models of `python -m dsv2.bench economics`: measured, predicted.

    report: what it wrote (`dsv2.bench.economics.load`). Raises ValueError if it holds no rows.
    """
    rows = report["results"]
    if not rows:
        raise ValueError("the report has no results; run `python -m dsv2.bench economics` on a GPU")
    ax = new_axes(None, 10.4, 5.0, grid="both", left=1.2, right=2.5, bottom=0.8, top=0.6)
    names, said = list(dict.fromkeys(row["model"] for row in rows)), []
    widest = max(row["batch"] for row in rows)  # a shorter curve's name stands below the other curve
    for name, colour in zip(names, (style.GREY, style.VERMILLION)):
        here = sorted(
            (row["batch"], row["tokens_per_second"], row["predicted"]) for row in rows if row["model"] == name
        )
        batches, measured, predicted = zip(*here)
        ax.plot(
            batches, predicted, color=colour, linewidth=2.0, linestyle=(0, (4, 2)), label=f"limit, {name}"
        )
        ax.plot(batches, measured, "o-", color=colour, linewidth=LINE, ms=9, label=name)
        ax.annotate(
            f"{name}:\n{measured[-1]:,.0f} at {batches[-1]:,}", (batches[-1], measured[-1]),
            xytext=(14, 0), textcoords="offset points", va="center" if batches[-1] == widest else "top",
            fontsize=BASE, fontweight="bold", color=style.ink(colour), annotation_clip=False,
        )  # fmt: skip
        said.append(
            f"{name} {measured[-1]:,.0f} measured and {predicted[-1]:,.0f} predicted at batch {batches[-1]}"
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    every = [row[kind] for row in rows for kind in ("tokens_per_second", "predicted")]
    ax.set_ylim(min(every) / 1.5, max(every) * 1.5)
    ax.set_xticks(sorted({2 ** round(math.log2(row["batch"])) for row in rows}))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
    label(ax, f"texts (batch), {report['context']:,} tokens each; dashed: the limit", "tokens/s")
    both = report["ratio"]
    if both:
        ratio = f"largest batches: x{both['measured']:.2f} measured, x{both['predicted']:.2f} by the limits"
        ax.set_title(ratio, fontsize=BASE, color=INK, loc="left", pad=10)
        said.append(ratio)
    return finish(ax, f"{report['device']}. {'; '.join(said)}.")


# ----------------------------------------------------------------------------------------- the calculator


@cache
def _models() -> dict[str, DSV2Config]:
    return published_models()


@cache
def calculator_devices() -> dict[str, Device]:
    """The devices by their makers' rates, then those that were measured."""
    return published_devices() | measured_devices()


@lru_cache(maxsize=64)
def serving(
    model: str, context: int, batch: int, weights: str, cache: str, device: str, gpus: int
) -> Throughput:
    """One bar of the calculator; batch 0: the largest that fits, or 1 where none does."""
    deployment = Deployment(calculator_devices()[device], gpus, weights, cache)
    cfg = _models()[model]
    return decode_throughput(
        cfg, context, deployment, batch or max(largest_batch(cfg, context, deployment), 1)
    )


def _bars(model: str, **setting) -> dict[str, Throughput]:
    """The chosen model, then those it is compared with."""
    return {name: serving(name, **setting) for name in dict.fromkeys((model, *REFERENCES))}


def cost_figure(
    model: str, context: int, batch: int, weights: str, cache: str, device: str, gpus: int, price: float
) -> Figure:
    """Memory, speed and price of a model beside DeepSeek 67B and LLaMA3 70B, served the same way."""
    setting = dict(context=context, batch=batch, weights=weights, cache=cache, device=device, gpus=gpus)
    bars = _bars(model, **setting)
    figure = new_figure(10.8, 1.95 + 0.8 * len(bars))
    panels = figure.subplots(1, 3, sharey=True)
    margins(figure, left=1.75, right=0.3, bottom=0.8, top=0.95, wspace=0.12)
    deployment = Deployment(calculator_devices()[device], gpus, weights, cache)
    unit, name = (1e12, "TB") if deployment.room >= 2e12 else (1e9, "GB")
    spoken, ends = [], [[], [], []]
    for row, (which, found) in enumerate(bars.items()):
        colour = style.VERMILLION if row == 0 else style.GREY
        parts = found.memory
        panels[0].barh(row, parts.weights / unit, height=0.62, color=WEIGHTS, label=f"weights, {which}")
        panels[0].barh(
            row,
            parts.cache / unit,
            left=parts.weights / unit,
            height=0.62,
            color=style.CACHED,
            label=f"cache, {which}",
        )
        ends[0].append(parts.total / unit)
        if not found.fits:
            _beside(panels[1], 0, row, "does not fit")
            spoken.append(f"{which}: {_texts(found.batch)} with {human_bytes(parts.total)} do not fit")
            continue
        speed, cost = found.tokens_per_second, found.cost_per_million(price)
        for panel, value, text in ((1, speed, f"{speed:,.0f}"), (2, cost, _money(cost))):
            panels[panel].barh(row, value, height=0.62, color=colour, label=which)
            ends[panel].append(value)
            _beside(panels[panel], value, row, text, "bold" if row == 0 else "normal")
        spoken.append(
            f"{which}: batch {found.batch:,}, {human_bytes(parts.total)}, {speed:,.0f} tokens/s, "
            f"{_money(cost)} dollars a million"
        )
    panels[0].axvline(deployment.room / unit, color=INK, linewidth=3.0, label="room")
    ends[0].append(deployment.room / unit)
    panels[0].set_yticks(range(len(bars)), list(bars), fontsize=BASE)
    panels[0].set_ylim(len(bars) - 0.5, -0.5)
    titles = (f"memory ({name})", "tokens/s at most", "dollars a million tokens")
    for panel, values, title, space in zip(panels, ends, titles, (1.06, 1.6, 1.55)):
        style.style_axes(panel, "x")
        panel.set_xlim(0, space * max(values, default=1.0))
        panel.xaxis.set_major_locator(MaxNLocator(3))
        label(panel, title)
        if not values:
            panel.set_xticks([])
    panels[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(value)))
    for panel in panels[1:]:
        panel.tick_params(left=False)
    count = "" if gpus == 1 else f"{gpus} x "
    where = f"{count}{device}, {tokens_text(context)} cached tokens a text"
    heading = (
        (0.3, BASE, f"{where}, weights: {weights}, cache: {cache}"),
        (0.68, SMALL, "memory: grey the weights, blue the cache, the line all there is for both"),
    )
    for below, size, text in heading:
        height = 1 - below / figure.get_size_inches()[1]
        figure.text(0.012, height, text, fontsize=size, color=INK, va="center")
    return finish(figure, f"{'; '.join(spoken)}.")


def _texts(count: int) -> str:
    return "weights and 1 text" if count == 1 else f"weights and {count:,} texts"


def _thousands(value: float) -> str:
    return f"{value / 1e3:g}K" if value >= 1000 else f"{value:g}"


def _money(value: float) -> str:
    """Two digits at least: 0.0889 -> "0.089"; 12.34 -> "12.3"."""
    return f"{value:.2g}" if value < 1 else f"{value:,.2f}" if value < 10 else f"{value:,.1f}"


def cost_caption(
    model: str, context: int, batch: int, weights: str, cache: str, device: str, gpus: int, price: float
) -> str:
    """The chosen model's step in words: batch, time, and which phase takes how long, by what."""
    found = serving(model, context, batch, weights, cache, device, gpus)
    if not found.fits:
        deployment = Deployment(calculator_devices()[device], gpus, weights, cache)
        most = largest_batch(_models()[model], context, deployment)
        hint = (
            f"Of these texts, {most:,} would fit."
            if most
            else "Not even one text fits: more GPUs, or fewer bits."
        )
        return f"<div style='max-width:1040px;font-size:15px'><b>{model}</b> does not fit so. {hint}</div>"
    rows = "".join(
        f"<tr><td>{phase.name}</td>"
        + "".join(
            f"<td style='text-align:right;padding-left:22px'>{text}</td>"
            for text in (time_text(phase.reading), time_text(phase.computing), phase.limit)
        )
        + "</tr>"
        for phase in found.phases
    )
    heads = "".join(
        f"<th style='text-align:right;padding-left:22px'>{text}</th>"
        for text in ("reading", "computing", "limit")
    )
    return (
        f"<div style='max-width:1040px;font-size:15px'><b>{model}: {found.batch:,} texts at once, "
        f"{time_text(found.seconds)} a step</b> at least, {found.tokens_per_second:,.0f} tokens/s and "
        f"{_money(found.cost_per_million(price))} dollars a million tokens at {price:.2f} a GPU hour. "
        "A tenth of the memory is left free; communication, prompts and idle time cost extra."
        f"<table><tr><th style='text-align:left'>phase of a step</th>{heads}</tr>{rows}</table></div>"
    )


def cost_calculator(model: str = "DeepSeek-V2", context: int = 4096) -> Explorer:
    """Model, text, formats, devices and price by menus and sliders -> memory, tokens/s, cost per million."""
    if model not in _models():
        raise ValueError(f"model={model!r} is unknown; choose one of {', '.join(_models())}")
    if context not in CONTEXTS:
        raise ValueError(f"context={context} must be one of {', '.join(map(str, CONTEXTS))}")
    devices = list(calculator_devices())
    about = {"style": {"description_width": "125px"}, "layout": ipywidgets.Layout(width="400px")}

    def steps(options: Sequence[int], value: int, text: str, show=str) -> ipywidgets.SelectionSlider:
        pairs = [(show(option), option) for option in options]
        return ipywidgets.SelectionSlider(options=pairs, value=value, description=text, **about)

    def menu(options: Sequence[str], value: str, text: str) -> ipywidgets.Dropdown:
        return ipywidgets.Dropdown(options=options, value=value, description=text, **about)

    controls = {
        "model": menu(list(_models()), model, "model"),
        "context": steps(CONTEXTS, context, "cached tokens", tokens_text),
        "batch": steps(BATCHES, LARGEST, "texts (batch)", lambda n: f"{n:,}" if n else "all that fit"),
        "price": ipywidgets.FloatSlider(
            2.0,
            min=0.25,
            max=10.0,
            step=0.25,
            description="dollars a GPU hour",
            readout_format=".2f",
            **about,
        ),
        "weights": menu(list(WEIGHT_FORMATS), "fp8", "weights"),
        "cache": menu(list(CACHE_FORMATS), "6 bits", "cache"),
        "device": menu(devices, devices[-1], "GPU"),
        "gpus": steps(GPUS, 8, "how many"),
    }
    explorer = Explorer(cost_figure, caption=cost_caption, **controls)
    return in_columns(
        explorer,
        ["model", "context", "batch", "price"],
        ["weights", "cache", "device", "gpus"],
        reset_below=1,
    )
