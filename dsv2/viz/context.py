"""Chapter 11 in pictures: wavelengths under RoPE, interpolation, YaRN; needles found by length and depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ipywidgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dsv2.config import YarnScaling
from dsv2.rope import interpolated_frequencies, rope_frequencies, yarn_correction_range, yarn_frequencies
from dsv2.viz import style
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, margins, new_axes, new_figure
from dsv2.viz.widgets import Explorer, in_columns

COLOURS = {"RoPE": style.VERMILLION, "interpolation": style.ORANGE, "YaRN": style.BLUE}
MARKERS = {"RoPE": "o", "interpolation": "s", "YaRN": "D"}
FOUND = LinearSegmentedColormap.from_list("dsv2_found", ["#F1F3F6", style.SKY, style.BLUE, "#00324F"])
PANELS_IN_A_ROW = 3


# --------------------------------------------------------------------------------------------- needle grids


def needle_heatmaps(
    found: Mapping[str, Any],
    lengths: Sequence[int],
    depths: Sequence[float],
    trained: int | None = None,
) -> Figure:
    """The share of needles found, a panel for each name (1 to 6): lengths along, depths down, start on top.

    found: by name, shares from 0 to 1 by [length][depth], lists or an array. trained: a length; what is
    longer is marked.
    """
    if not 1 <= len(found) <= 6:
        raise ValueError(f"found has {len(found)} names; 1 to 6 fit")
    grids = {name: np.asarray(grid, dtype=float) for name, grid in found.items()}
    for name, grid in grids.items():
        if grid.shape != (len(lengths), len(depths)):
            raise ValueError(
                f"found[{name!r}] has the shape {grid.shape}; expected (lengths, depths) = "
                f"{(len(lengths), len(depths))}"
            )
    rows = math.ceil(len(grids) / PANELS_IN_A_ROW)
    columns = min(len(grids), PANELS_IN_A_ROW)
    figure = new_figure(10.4, 0.95 + 3.15 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    margins(figure, left=0.95, right=1.25, bottom=0.8, top=0.5, wspace=0.08, hspace=0.24)
    said, mesh = [], None
    for place, panel in enumerate(panels.flat):
        if place >= len(grids):
            panel.set_visible(False)
            continue
        name, grid = list(grids.items())[place]
        mesh = panel.imshow(grid.T, cmap=FOUND, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        style.style_axes(panel, None)
        panel.set_xticks(range(len(lengths)), [_in_k(length) for length in lengths])
        shown = range(0, len(depths), max(1, math.ceil(len(depths) / 5)))
        panel.set_yticks(shown, [f"{100 * depths[d]:.0f} %" for d in shown])
        if trained is not None:
            edge = sum(length <= trained for length in lengths) - 0.5
            panel.axvline(edge, color=style.VERMILLION, linewidth=2.5, linestyle=(0, (4, 2)))
        mean = f"{100 * grid[-1].mean():.0f} %"
        panel.set_title(f"{name}: {mean}", fontsize=SMALL, color=INK, loc="left", pad=5)
        by_length = ", ".join(f"{share.mean():.0%} at {length:,}" for length, share in zip(lengths, grid))
        said.append(f"{name}: {by_length}")
    for panel in panels[:, 0]:
        label(panel, y="depth of the needle")
    middle = panels[-1, (columns - 1) // 2] if columns % 2 else panels[-1, 0]
    label(middle, "length of the text (tokens)")
    width, height = figure.get_size_inches()
    bar = figure.add_axes((1 - 1.08 / width, 0.8 / height, 0.2 / width, 1 - 1.3 / height))
    colours = figure.colorbar(mesh, cax=bar, ticks=[0, 0.5, 1])
    colours.ax.set_yticklabels(["0 %", "50 %", "100 %"], fontsize=SMALL)
    colours.outline.set_visible(False)
    figure.text(1 - 0.1 / width, 1 - 0.3 / height, "found", ha="right", va="center", fontsize=BASE, color=INK)
    return finish(figure, f"Needles found, the mean over all depths. {'; '.join(said)}.")


def _in_k(length: int) -> str:
    """512, 1K, 2K: whole multiples of 1,024 by K, as the paper has them."""
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def mean_grids(stored: Mapping[str, Any], when: str) -> dict[str, np.ndarray]:
    """By method, the share found by [length][depth], the mean over the seeds. when: "before" or "after"."""
    samples = stored["setting"]["samples"]
    names = stored["runs"][0][when]
    return {name: np.mean([run[when][name] for run in stored["runs"]], axis=0) / samples for name in names}


def tuning_curves(stored: Mapping[str, Any]) -> Figure:
    """Needles found in the longest texts against the steps of tuning, by method: mean and range of the seeds.

    stored: `data/runs/context.json`.
    """
    ax = new_axes(None, 10.0, 4.6, left=1.0, right=1.75, bottom=0.8, top=0.3)
    said, ends = [], {}
    for name in stored["runs"][0]["tuning"]:
        curves = np.array([run["tuning"][name]["found"] for run in stored["runs"]])  # (seeds, looks, 2)
        steps, found = curves[0, :, 0], 100 * curves[:, :, 1]
        colour = COLOURS.get(name, style.GREY)
        ax.fill_between(steps, found.min(axis=0), found.max(axis=0), color=colour, alpha=0.2, linewidth=0)
        ax.plot(
            steps, found.mean(axis=0), MARKERS.get(name, "o") + "-", color=colour, linewidth=LINE, ms=8,
            clip_on=False, zorder=3,
        )  # fmt: skip
        ends[name] = found[:, -1].mean()
        said.append(f"{name} {found[:, 0].mean():.0f} % at first, {ends[name]:.0f} % at the end")
    ax.set_ylim(0, 102)
    ax.set_xlim(-1, max(steps))
    _names_at_the_end(ax, ends)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    longest = stored["setting"]["lengths"][-1]
    label(ax, "steps of fine-tuning", f"found in {longest:,} tokens")
    return finish(ax, f"Needles found in {longest:,} tokens by steps of fine-tuning: {'; '.join(said)}.")


def _names_at_the_end(ax: Axes, ends: Mapping[str, float]) -> None:
    low, high = ax.get_ylim()
    gap, place = 0.08 * (high - low), np.inf
    for name, value in sorted(ends.items(), key=lambda item: -item[1]):
        place = min(value, place - gap)
        ax.annotate(
            name,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=BASE,
            fontweight="bold",
            color=style.ink(COLOURS.get(name, style.GREY)),
            annotation_clip=False,
        )


# ---------------------------------------------------------------------------------------- the frequencies


def stretched_wavelengths(dim: int, theta: float, yarn: YarnScaling, axes: Axes | None = None) -> Figure:
    """Tokens for a whole turn of each pair under RoPE, interpolation and YaRN, and both lengths."""
    ax = new_axes(axes, 10.0, 5.0, left=1.2, right=0.4, bottom=0.8, top=0.3)
    context = yarn.original_max_position_embeddings
    three = {
        "RoPE": rope_frequencies(dim, theta),
        "interpolation": interpolated_frequencies(dim, theta, yarn.factor),
        "YaRN": yarn_frequencies(dim, theta, yarn),
    }
    low, high = yarn_correction_range(dim, theta, yarn)
    pairs, top = dim // 2, 0.0
    for name, values in three.items():
        waves = 2 * math.pi / values.double().numpy()
        ax.plot(
            range(pairs), waves, MARKERS[name] + ("-" if name == "YaRN" else ""), color=COLOURS[name],
            label=name, ms=max(6.5, 11 - pairs / 6) - 2.5 * (name == "YaRN"), linewidth=1.6, zorder=3,
        )  # fmt: skip
        top = max(top, waves[-1])
    ax.set_yscale("log")
    ax.axvspan(low, min(max(high, low), pairs), color=style.PALE, zorder=0, linewidth=0)
    marked = {"trained": context, "new length": context * yarn.factor}
    if yarn.factor == 1:
        del marked["new length"]
    for text, tokens in marked.items():
        above = text != "trained" and yarn.factor < 4  # the lines lie close together
        ax.axhline(tokens, color=INK, linewidth=1.6, linestyle=(0, (5, 3)), zorder=1)
        ax.annotate(
            f"{text}: {tokens:,.0f}", (0.99, tokens), xycoords=("axes fraction", "data"), ha="right",
            xytext=(0, 3 if above else -4), textcoords="offset points", fontsize=SMALL, color=INK,
            va="bottom" if above else "top", zorder=4, path_effects=[withStroke(linewidth=3, foreground="w")],
        )  # fmt: skip
    ax.set_xlim(-0.8, pairs - 0.2)
    ax.set_ylim(3, max(top, context * yarn.factor) * 12)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_locator(LogLocator(10.0))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(_short))
    ax.legend(loc="upper left", fontsize=SMALL, frameon=False, handletextpad=0.5, borderaxespad=0.1)
    label(ax, "pair of channels (grey: YaRN's ramp)", "tokens for a whole turn")
    kept, slowed = turning_pairs(dim, theta, yarn)
    return finish(
        ax,
        f"{pairs} pairs: {kept} turn fully within the trained {context:,} tokens under RoPE; YaRN slows "
        f"{slowed} down in full, by {yarn.factor:g}, and its ramp goes from pair {low} to {high}.",
    )


def _short(tokens: float, _: int = 0) -> str:
    """A number of tokens for an axis: 100, 10K, 1M."""
    for size, letter in ((1e6, "M"), (1e3, "K")):
        if tokens >= size:
            return f"{tokens / size:g}{letter}"
    return f"{tokens:g}"


def turning_pairs(dim: int, theta: float, yarn: YarnScaling) -> tuple[int, int]:
    """How many pairs make a whole turn within the trained length, and how many YaRN slows down in full.

    A factor of 1 slows none down.
    """
    waves = 2 * math.pi / rope_frequencies(dim, theta).double()
    slowed = yarn_frequencies(dim, theta, yarn) * yarn.factor < 1.001 * rope_frequencies(dim, theta)
    return int((waves <= yarn.original_max_position_embeddings).sum()), int(slowed.sum()) * (yarn.factor > 1)


# ---------------------------------------------------------------------------------------------- the widget


def context_explorer(stored: Mapping[str, Any]) -> Explorer:
    """Sliders for s, alpha, beta, channels over wavelengths; length and depth pick a cell of the runs.

    stored: `data/runs/context.json`. The cell is as measured, with the runs' own s, alpha and beta.
    """
    setting = stored["setting"]
    about = {"style": {"description_width": "190px"}, "layout": ipywidgets.Layout(width="480px")}

    def choice(options: Sequence[Any], value: Any, text: str, show=str) -> ipywidgets.SelectionSlider:
        pairs = [(show(option), option) for option in options]
        return ipywidgets.SelectionSlider(options=pairs, value=value, description=text, **about)

    controls = {
        "factor": choice((1, 2, 4, 8, 10, 16, 32, 40), 10, "s: new / trained length"),
        "alpha": choice((0.25, 0.5, 1, 2, 4), 1, "alpha (fully slowed below)"),
        "beta": choice((5, 8, 16, 32, 64), 32, "beta (kept above)"),
        "dim": choice((8, 16, 32, 64), setting["model"]["qk_rope_head_dim"], "rotary channels"),
        "trained": choice((64, 512, 4096), setting["training"]["longest"], "trained length", "{:,}".format),
        "length": choice(setting["lengths"], setting["lengths"][-1], "measured: text (tokens)"),
        "depth": choice(
            range(len(setting["depths"])), len(setting["depths"]) // 3, "measured: depth",
            lambda d: f"{100 * setting['depths'][d]:.0f} %",
        ),
    }  # fmt: skip
    explorer = Explorer(partial(context_figure, stored), caption=partial(context_caption, stored), **controls)
    return in_columns(
        explorer, ["factor", "alpha", "beta", "dim", "trained"], ["length", "depth"], reset_below=1
    )


def context_figure(
    stored: Mapping[str, Any], factor: float, alpha: float, beta: float, dim: int, trained: int,
    length: int, depth: int,
) -> Figure:  # fmt: skip
    """The wavelengths, and what was found in one cell of the stored grids: a bar a method, a dot a seed."""
    figure = new_figure(10.4, 4.9)
    left, right = figure.subplots(1, 2, width_ratios=(1.45, 1))
    margins(figure, left=1.1, right=0.2, bottom=0.8, top=0.55, wspace=0.3)
    yarn = YarnScaling(float(factor), trained, beta_fast=float(beta), beta_slow=float(alpha))
    said = stretched_wavelengths(dim, stored["setting"]["model"]["rope_theta"], yarn, left).alt
    setting = stored["setting"]
    row, samples = list(setting["lengths"]).index(length), setting["samples"]
    style.style_axes(right)
    spoken = []
    for place, name in enumerate(stored["runs"][0]["before"]):
        for shift, when, alpha_ in ((-0.2, "before", 0.35), (0.2, "after", 1.0)):
            seeds = [100 * run[when][name][row][depth] / samples for run in stored["runs"]]
            right.bar(place + shift, np.mean(seeds), width=0.38, color=style.tint(COLOURS[name], alpha_))
            right.plot([place + shift] * len(seeds), seeds, "o", color=INK, ms=5, alpha=0.7, clip_on=False)
            spoken.append(f"{name} {when} tuning {np.mean(seeds):.0f} %")
    names = list(stored["runs"][0]["before"])
    right.set_xticks(
        range(len(names)), [name.replace("interpolation", "interpol.") for name in names], fontsize=SMALL
    )
    right.set_ylim(0, 104)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    label(right, "pale: before tuning; full: after", None)
    right.xaxis.label.set_fontsize(SMALL)
    right.set_title(
        f"found in {length:,} tokens, depth {100 * setting['depths'][depth]:.0f} %",
        fontsize=BASE, color=INK, loc="left", pad=10,
    )  # fmt: skip
    left.set_title(
        f"s = {factor}, alpha = {alpha:g}, beta = {beta:g}", fontsize=BASE, color=INK, loc="left", pad=10
    )
    return finish(figure, f"{said} Measured at {length:,} tokens: {', '.join(spoken)}.")


def context_caption(stored: Mapping[str, Any], factor: float, alpha: float, beta: float, dim: int,
                    trained: int, **cell: Any) -> str:  # fmt: skip
    """What the sliders mean, in numbers."""
    yarn = YarnScaling(float(factor), trained, beta_fast=float(beta), beta_slow=float(alpha))
    theta = stored["setting"]["model"]["rope_theta"]
    kept, slowed = turning_pairs(dim, theta, yarn)
    root = 0.0707 * math.log(factor) + 1
    return (
        f"<div style='max-width:1040px'><b>{kept} of {dim // 2} pairs</b> make a whole turn within "
        f"{trained:,} tokens. YaRN slows {slowed} down in full; sqrt(t) = {root:.3f}, so scores are "
        f"multiplied by t = {root**2:.3f}. The measured runs have s = {stored['setting']['factor']:g}, alpha "
        f"= 1, beta = 32, {stored['setting']['model']['qk_rope_head_dim']} channels, trained on "
        f"{stored['setting']['training']['longest']} tokens.</div>"
    )
