"""Chapter 10 in pictures: schedules by tokens seen, a run as it goes, stored runs, experts by kind of "
"text."""

# D domains   E routed experts   L layers of experts   T tokens

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ipywidgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from dsv2.evaluate import Specialisation, count_choices
from dsv2.train import TrainConfig, Trainer
from dsv2.viz import style
from dsv2.viz.plots import _device_edges, _read_lines, _series, visible
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, margins, new_axes, new_figure
from dsv2.viz.widgets import Explorer, in_columns

PAPER = {"peak": 2.4e-4, "warmup": 2000, "start": 2304, "end": 9216, "ramp": 225, "total": 8100}
SEQ_LEN = 4096
KIND_COLOURS = {
    "paper's steps": style.CACHED,
    "constant": style.GREY,
    "cosine": style.GREEN,
    "batch ramp": style.ORANGE,
    "no balance losses": style.VERMILLION,
}
# Less than the expert's share of all choices: blue; as much: white; more: red-brown, as elsewhere.
LEANING = LinearSegmentedColormap.from_list(
    "dsv2_leaning", ["#00487A", "#7FB5DA", "#FFFFFF", "#F4A06B", "#9C3A00"]
)
LIVE_SECONDS, FRAME_SECONDS = 20.0, 1.0


# ------------------------------------------------------------------------------------------------ schedules


def paper_training(
    peak: float = PAPER["peak"],
    warmup: int = PAPER["warmup"],
    schedule: str = "deepseek-v2",
    start: int = PAPER["start"],
    end: int = PAPER["end"],
    ramp: int = PAPER["ramp"],
    total: int = PAPER["total"],
) -> TrainConfig:
    """A run of `total` billion tokens in sequences of 4,096, whose batch grows over the first `ramp` billion.

    The steps are as many as it takes to read them all: the last batch may read some more.
    """
    fields: dict[str, Any] = {"batch_size": start, "seq_len": SEQ_LEN, "lr": peak, "schedule": schedule}
    fields |= {"warmup_steps": warmup, "validate_every": 0, "save_every": 0}
    if end > start and ramp > 0:
        fields |= {"batch_ramp_to": end, "batch_ramp_tokens": ramp * 10**9, "batch_ramp_multiple": 1}
    long = TrainConfig(steps=10**7, **fields)
    low, high = 1, 10**7
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if long.tokens_before(middle) >= total * 10**9 else (middle + 1, high)
    return TrainConfig(steps=low, **fields)


def schedule_curves(config: TrainConfig, points: int = 600) -> dict[str, np.ndarray]:
    """tokens (in billions), lr and batch (sequences) of up to `points` steps, the first ones closer "
    "together."""
    steps = np.unique(
        np.concatenate(
            [
                np.linspace(0, config.steps - 1, points),
                np.linspace(0, min(config.steps - 1, 2 * config.warmup_steps), points // 4),
            ]
        ).astype(int)
    )
    return {
        "tokens": np.array([config.tokens_before(int(s)) for s in steps]) / 1e9,
        "lr": np.array([config.learning_rate(int(s)) for s in steps]),
        "batch": np.array([config.batch_size_of(int(s)) for s in steps]),
    }


def training_schedule_figure(config: TrainConfig, figure: Figure | None = None) -> Figure:
    """Learning rate and batch size over the tokens of a run.

    figure: one made by this function, whose artists are moved; None: a new one.
    """
    curves = schedule_curves(config)
    if figure is None:
        figure = new_figure(10.0, 5.4)
        panels = figure.subplots(2, 1, sharex=True)
        margins(figure, left=1.25, right=0.45, bottom=0.8, top=0.3, hspace=0.22)
        for panel in panels:
            style.style_axes(panel)
        parts = {
            "lr": panels[0].plot([], [], color=style.CACHED, linewidth=LINE, drawstyle="steps-post")[0],
            "batch": panels[1].plot([], [], color=style.ORANGE, linewidth=LINE)[0],
        }
        label(panels[0], y="learning rate")
        label(panels[1], "tokens seen (billions)", "batch (sequences)")
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.1e}" if v else "0"))
        panels[1].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        panels[1].xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        figure.parts, figure.panels = parts, panels
    for name, panel in zip(("lr", "batch"), figure.panels):
        figure.parts[name].set_data(curves["tokens"], curves[name])
        panel.set_ylim(0, 1.12 * float(curves[name].max()))
        panel.yaxis.set_major_locator(MaxNLocator(4))
    figure.panels[1].set_xlim(0, float(curves["tokens"][-1]))
    last = config.learning_rate(config.steps - 1)
    warmed, whole = (config.tokens_before(n) / 1e9 for n in (config.warmup_steps, config.steps))
    return finish(
        figure,
        f"{config.steps:,} steps for {whole:,.0f} billion tokens. The learning rate climbs to "
        f"{config.lr:.2e} in {config.warmup_steps:,} steps, {warmed:.1f} billion "
        f"tokens, and ends at {last:.2e}, {last / config.lr:.2f} of it. The batch goes "
        f"from {config.batch_size:,} to "
        f"{config.largest_batch:,} sequences.",
    )


def training_schedule_explorer() -> Explorer:
    """Sliders for the paper's run: learning rate and batch size over its tokens, and the steps it takes."""
    about = {"style": {"description_width": "190px"}, "layout": ipywidgets.Layout(width="480px")}
    thousand = [2304 * n for n in range(1, 9)]
    controls = {
        "schedule": ipywidgets.Dropdown(
            options=["deepseek-v2", "deepseek-v2-lite", "wsd", "cosine", "constant"],
            description="schedule",
            **about,
        ),
        "peak": ipywidgets.FloatSlider(
            PAPER["peak"],
            min=0.5e-4,
            max=6e-4,
            step=0.1e-4,
            readout_format=".1e",
            description="peak",
            **about,
        ),
        "warmup": ipywidgets.IntSlider(
            PAPER["warmup"], min=0, max=40_000, step=500, description="warm-up (steps)", **about
        ),
        "start": ipywidgets.SelectionSlider(
            options=thousand, value=PAPER["start"], description="first batch (sequences)", **about
        ),
        "end": ipywidgets.SelectionSlider(
            options=thousand, value=PAPER["end"], description="last batch (sequences)", **about
        ),
        "ramp": ipywidgets.IntSlider(
            PAPER["ramp"], min=0, max=4000, step=25, description="ramp (billion tokens)", **about
        ),
    }

    def plot(figure: Figure | None = None, **values: Any) -> Figure:
        return training_schedule_figure(_explored(values), figure)

    def caption(**values: Any) -> str:
        config = _explored(values)
        text = style.describe(training_schedule_figure(config))
        count = f"{config.steps:,} steps"
        return f"<div style='max-width:1000px'>{html.escape(text).replace(count, f'<b>{count}</b>', 1)}</div>"

    explorer = Explorer(plot, caption=caption, **controls)
    return in_columns(explorer, ["schedule", "peak", "warmup"], ["start", "end", "ramp"], reset_below=1)


def _explored(values: Mapping[str, Any]) -> TrainConfig:
    """The settings of the sliders; a last batch below the first counts as no ramp."""
    values = dict(values)
    return paper_training(
        **(values | {"peak": float(values["peak"]), "end": max(values["start"], values["end"])})
    )


# ------------------------------------------------------------------------------------------------ live


def steps_for(trainer: Trainer, seconds: float, timed: int = 4) -> int:
    """How many of this trainer's steps fit into so many seconds, by taking a few; the trainer is used up."""
    times = []
    for _ in range(timed + 1):
        before = trainer.seconds
        trainer.train_step()
        times.append(trainer.seconds - before)
    return max(10, int(seconds / median(times[1:])))


def live_training(
    trainer: Trainer, *, seconds: float | None = None, show: bool = True
) -> tuple[list[dict[str, Any]], Figure]:
    """Train to the last step and draw the loss about once a second; returns the metrics and the last figure.

    seconds: stop after so many, done or not. show: in a notebook, the picture below the cell, renewed in its
    place; elsewhere nothing is shown.
    """
    rows: list[dict[str, Any]] = []
    handle, shown, began = None, time.perf_counter(), time.perf_counter()
    for metrics in trainer:
        rows.append(metrics)
        now = time.perf_counter()
        if show and (handle is None or now - shown > FRAME_SECONDS):
            handle, shown = (
                _renew(live_figure(rows, trainer.config, trainer.model_config.vocab_size), handle),
                time.perf_counter(),
            )
        if seconds is not None and now - began > seconds:
            break
    figure = live_figure(rows, trainer.config, trainer.model_config.vocab_size)
    if show:
        _renew(figure, handle)
    return rows, figure


def _renew(figure: Figure, handle: Any) -> Any:
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return None
    if get_ipython() is None:
        return None
    data = {"image/png": style.png(figure), "text/plain": style.describe(figure)}
    about = {"image/png": {"alt": style.describe(figure)}}
    if handle is None:
        return display(data, raw=True, metadata=about, display_id=True)
    handle.update(data, raw=True, metadata=about)
    return handle


def live_figure(rows: Sequence[Mapping[str, Any]], config: TrainConfig, vocab_size: int = 264) -> Figure:
    """Loss, learning rate and the gradient's norm over the steps of a run so far; vocab_size: for the loss of
    equal chances.
    """
    if not rows:
        raise ValueError("rows is empty; give the metrics of at least one step")
    steps = np.array([row["step"] for row in rows])
    figure = new_figure(10.0, 5.6)
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1.15))
    margins(figure, left=1.05, right=0.35, bottom=0.75, top=0.45, hspace=0.32, wspace=0.27)
    top, low, right = (
        figure.add_subplot(grid[0, :]),
        figure.add_subplot(grid[1, 0]),
        figure.add_subplot(grid[1, 1]),
    )
    loss = np.array([row["loss"] for row in rows])
    for panel, values, colour in (
        (top, loss, style.CACHED),
        (low, [1e3 * row["lr"] for row in rows], style.GREEN),
        (right, [row["grad_norm"] for row in rows], style.PURPLE),
    ):
        style.style_axes(panel)
        panel.plot(steps, values, color=colour, linewidth=LINE)
        panel.set_xlim(1, max(2, config.steps))
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    top.set_ylim(0, 6)
    top.axhline(np.log(vocab_size), color=style.GREY, linewidth=2, linestyle=(0, (4, 3)))
    top.annotate(
        f"ln {vocab_size}: equal chances for every token",
        (1, np.log(vocab_size)),
        xycoords=("axes fraction", "data"),
        xytext=(0, -5),
        textcoords="offset points",
        fontsize=SMALL,
        color=INK,
        ha="right",
        va="top",
    )
    low.set_ylim(0, 1.15e3 * config.lr)
    low.yaxis.set_major_locator(MaxNLocator(3))
    right.set_yscale("log")
    right.set_ylim(0.1, 30)
    right.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    right.minorticks_off()
    right.axhline(config.clip, color=INK, linewidth=2, linestyle=(0, (4, 3)))
    label(top, y="loss (nats per token)")
    label(low, "step", "rate x 1000")
    label(right, "step", "gradient")
    top.set_title(
        f"step {steps[-1]} of {config.steps}: loss {loss[-1]:.2f}",
        fontsize=BASE,
        color=INK,
        loc="left",
        pad=6,
    )
    return finish(
        figure,
        f"Step {steps[-1]} of {config.steps}: loss {loss[-1]:.3f} nats per token after {loss[0]:.3f} at "
        "first; "
        f"learning rate {rows[-1]['lr']:.2e}; norm of the gradient {rows[-1]['grad_norm']:.2f}, clipped at "
        f"{config.clip:g} (dashed).",
    )


# ------------------------------------------------------------------------------------------- stored runs


def gradient_norms(metrics: str | Path | Sequence[Mapping[str, Any]], limit: float = 1.0) -> Figure:
    """The gradient's norm before clipping over a run, and where it was clipped.

    metrics: as for `training_curves`, with `grad_norm`.
    """
    rows = _read_lines(metrics) if isinstance(metrics, (str, Path)) else list(metrics)
    steps, norms = _series(rows, "grad_norm")
    if not steps.size:
        raise ValueError("metrics holds no row with `step` and `grad_norm`")
    over = norms > limit
    ax = new_axes(None, 10.0, 3.9, left=1.05, right=0.4, bottom=0.8, top=0.3)
    ax.plot(steps, norms, color=style.PURPLE, linewidth=2.2)
    ax.plot(steps[over], norms[over], "o", color=style.VERMILLION, markersize=9)
    ax.axhline(limit, color=INK, linewidth=2.5, linestyle=(0, (4, 2)))
    ax.set_yscale("log")
    low, high = min(norms.min(), limit), max(norms.max(), limit)
    ax.set_ylim(low / 1.4, high * 1.4)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low / 1.4 <= t <= high * 1.4]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set_xlim(-0.01 * steps[-1], 1.01 * steps[-1])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.annotate(
        "dots: longer than the limit, scaled down to it",
        (0.98, 0.93),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=SMALL,
        color=INK,
    )
    label(ax, "training step", "norm of the gradient")
    return finish(
        ax,
        f"{over.sum()} of {len(norms)} recorded steps have a gradient longer than {limit:g}: "
        f"at first {norms[0]:.1f}, median {np.median(norms):.2f}, at the end {norms[-1]:.2f}.",
    )


def kind_curves(
    stored: Mapping[str, Any], what: str = "val_curve", names: Sequence[str] | None = None
) -> Figure:
    """Validation loss or information over the tokens seen, by kind of run: mean and range of the seeds.

    stored: `data/runs/pretraining.json`. what: "val_curve" (nats per token) or "information" (nats that an
    expert tells of the domain, the mean over the layers).
    """
    titles = {
        "val_curve": "validation loss (nats per token)",
        "information": "expert's information\non the domain (nats)",
    }
    if what not in titles:
        raise ValueError(f"what={what!r} must be one of {', '.join(titles)}")
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in stored["runs"]:
        found.setdefault(run["name"], []).append(run)
    unknown = sorted(set(names or ()) - set(found))
    if unknown:
        raise ValueError(f"no run is called {', '.join(unknown)}; there are {', '.join(found)}")
    ax = new_axes(None, 10.0, 4.9, left=1.15, right=2.45, bottom=0.8, top=0.3)
    ends, said, tops = {}, [], []
    for name in names or found:
        group = found[name]
        tokens = np.mean([run["looks"] for run in group], axis=0) / 1e6
        values = np.array([run[what] for run in group], dtype=float)
        values = values.mean(axis=2) if values.ndim == 3 else values
        colour = KIND_COLOURS.get(name, style.SKY)
        ax.fill_between(tokens, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        ax.plot(tokens, values.mean(axis=0), color=colour, linewidth=LINE, label=name)
        ends[name] = float(values[:, -1].mean())
        tops.append(values[:, 2 if what == "val_curve" else 0 :].max())
        said.append(f"{name} {ends[name]:.4g} ({values[:, -1].min():.4g} to {values[:, -1].max():.4g})")
    bottom = 0 if what == "information" else min(ends.values()) - 0.15
    ax.set_ylim(bottom, 1.05 * max(tops) - 0.05 * bottom)
    ax.set_xlim(0, None)
    _names_at_ends(ax, ends)
    label(ax, "tokens seen (millions)", titles[what])
    return finish(ax, f"{titles[what].replace(chr(10), ' ')} at the end: {'; '.join(said)}.")


def _names_at_ends(ax: Axes, ends: Mapping[str, float]) -> None:
    """Names at the right of the lines' ends, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    gap, place = 0.078 * (high - low), -np.inf
    for name, value in sorted(ends.items(), key=lambda item: item[1]):
        place = max(value, place + gap)
        ax.annotate(
            name,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=BASE,
            fontweight="bold",
            color=style.ink(KIND_COLOURS.get(name, style.SKY)),
            annotation_clip=False,
        )


# -------------------------------------------------------------------------------------- experts by domain


def leanings(counts: Tensor) -> np.ndarray:
    """(D, E): each domain's use of an expert over the expert's share of all choices; 1: no preference.

    Domains weigh the same, however many of their tokens were counted. An expert that nobody chose has 1.
    """
    rows = counts.double() / counts.sum(dim=1, keepdim=True)
    mean = rows.mean(dim=0, keepdim=True)
    return torch.where(mean > 0, rows / mean.clamp(min=1e-12), torch.ones_like(rows)).numpy()


def preference_maps(
    tables: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    devices: int = 1,
    expert: int | None = None,
    most: float | None = None,
) -> Figure:
    """Who likes which expert, a panel for each of 1 to 3 tables of counts (D, E), on one scale of colours.

    A cell is the domain's use of the expert over the mean of all domains. expert: one to put a frame around.
    most: where the scale ends; None: at the largest of all panels, 1.5 at least.
    """
    if not 1 <= len(tables) <= 3:
        raise ValueError(f"tables has {len(tables)} names; 1 to 3 fit")
    ratios = {name: leanings(counts) for name, counts in tables.items()}
    for name, ratio in ratios.items():
        if ratio.shape[0] != len(names):
            raise ValueError(f"table {name!r} has {ratio.shape[0]} rows for {len(names)} domains")
    experts = next(iter(ratios.values())).shape[1]
    edges, columns = _device_edges(experts, devices)
    centres = edges[columns] + 0.5
    figure = new_figure(10.0, 0.95 + 2.05 * len(tables))
    panels = figure.subplots(len(tables), 1, sharex=True, squeeze=False)[:, 0]
    margins(figure, left=1.3, right=1.35, bottom=0.85, top=0.45, hspace=0.32)
    most = most or max(1.5, *(float(np.abs(r - 1).max()) + 1 for r in ratios.values()))
    norm, said = Normalize(2 - most, most), []
    for panel, (name, ratio) in zip(panels, ratios.items()):
        style.style_axes(panel, None)
        grid = np.ma.array(np.zeros((len(names), len(edges) - 1)), mask=True)
        grid[:, columns] = ratio
        panel.pcolormesh(
            edges,
            np.arange(len(names) + 1) - 0.5,
            grid,
            cmap=LEANING,
            norm=norm,
            edgecolors=style.PALE,
            linewidth=1.2,
        )
        for row in range(len(names)):
            best = int(ratio[row].argmax())
            colour = style.on(LEANING(norm(ratio[row, best])))
            panel.text(
                centres[best],
                row,
                f"{ratio[row, best]:.2f}",
                ha="center",
                va="center",
                fontsize=SMALL,
                color=colour,
            )
        if expert is not None:
            left = edges[columns[expert]]
            panel.plot(
                [left, left + 1, left + 1, left, left],
                [-0.5, -0.5, len(names) - 0.5, len(names) - 0.5, -0.5],
                color=INK,
                linewidth=3,
                clip_on=False,
            )
        panel.set_yticks(range(len(names)), names, fontsize=BASE)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.tick_params(axis="both", length=0)
        panel.spines[["left", "bottom"]].set_visible(False)
        panel.set_title(name, fontsize=BASE, color=INK, loc="left", pad=5)
        best = [f"{n}: expert {int(r.argmax())} ({r.max():.2f}x)" for n, r in zip(names, ratio)]
        said.append(f"{name}: {', '.join(best)}")
    panels[-1].set_xticks(centres, range(experts), fontsize=SMALL)
    label(panels[-1], "routed expert" + (f", those of {devices} devices apart" if devices > 1 else ""))
    width, height = figure.get_size_inches()
    box = (1 - 1.15 / width, 0.85 / height, 0.2 / width, 1 - 1.3 / height)
    bar = figure.colorbar(ScalarMappable(norm, LEANING), cax=figure.add_axes(box))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, length=3, colors=INK)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
    bar.set_label("times the mean of all", fontsize=SMALL, color=INK)
    return finish(figure, f"Use of {experts} experts against the mean of all domains. {'; '.join(said)}.")


def information_dots(measured: Mapping[str, Sequence[Specialisation]], layers: Sequence[int]) -> Figure:
    """What an expert tells of the domain, by layer, a colour for each model; shuffled windows in grey.

    measured: by name, one `Specialisation` a layer. layers: the layers' numbers in the model.
    """
    figure = new_figure(10.0, 4.5)
    ax = style.style_axes(figure.add_subplot(), "x")
    margins(figure, left=1.15, right=0.4, bottom=0.85, top=0.75)
    palette = (style.VERMILLION, style.CACHED, style.GREEN, style.ORANGE)
    rows, said = np.arange(len(layers)), []
    for place, (name, found) in enumerate(measured.items()):
        if len(found) != len(layers):
            raise ValueError(f"{name!r} has {len(found)} layers, and layers has {len(layers)}")
        shift = (place - (len(measured) - 1) / 2) * 0.28
        low = [max(1e-6, layer.shuffled.min()) for layer in found]
        high = [layer.shuffled.max() for layer in found]
        ax.hlines(rows + shift, low, high, color=style.GREY, linewidth=7, alpha=0.45)
        values = [layer.information for layer in found]
        ax.plot(values, rows + shift, "o", ms=13, color=palette[place % 4], label=name)
        chance = np.mean([layer.shuffled.mean() for layer in found])
        said.append(f"{name} {', '.join(f'{v:.4f}' for v in values)} (shuffled on average {chance:.5f})")
    ax.plot([], [], color=style.GREY, linewidth=7, alpha=0.45, label="with labels shuffled")
    ax.set_xscale("log")
    ax.set_yticks(rows, [f"layer {number}" for number in layers], fontsize=BASE)
    ax.set_ylim(len(layers) - 0.45, -0.55)
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(-0.08, 0.99),
        ncols=4,
        frameon=False,
        fontsize=SMALL,
        handletextpad=0.5,
        columnspacing=0.9,
    )
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    label(ax, "nats that an expert tells of the domain (scale by powers of ten)")
    return finish(ax, f"Information of expert on domain in nats, by layer. {'; '.join(said)}.")


def marked_text(texts: Sequence[str], chosen: Sequence[bool], strength: Sequence[float] | None = None) -> str:
    """A text as HTML, tokens that chose an expert on a coloured ground; strength (0 to 1): how deep the "
    "colour."""
    strength = [1.0] * len(texts) if strength is None else strength
    parts = []
    for text, marked, depth in zip(texts, chosen, strength):
        shown = html.escape(text) if text == "\n" or text.isprintable() else html.escape(visible(text))
        if not marked:
            parts.append(shown)
            continue
        colour = style.tint(style.ACTIVE, 0.3 + 0.6 * min(1.0, depth))
        shown = "↵\n" if text == "\n" else shown
        parts.append(f'<span style="background:{colour};color:{style.on(colour)}">{shown}</span>')
    return (
        '<pre style="white-space:pre-wrap;overflow-wrap:anywhere;font-size:15px;line-height:1.5;'
        f'max-width:960px;margin:6px 0">{"".join(parts)}</pre>'
    )


def domain_browser(
    expert_ids: Sequence[Tensor],
    windows: Any,
    names: Sequence[str],
    texts: Sequence[Sequence[str]],
    *,
    n_experts: int,
    layers: Sequence[int],
    devices: int = 1,
) -> Explorer:
    """Which expert likes which text: a map of one layer beside one of shuffled windows, and a text, marked.

    expert_ids: (W, T, K) by layer. windows: the `Batch` they were read from. texts: of each window, the text
    of every token. layers: the layers' numbers in the model. Controls: `layer` and `expert`, `window`, whose
    tokens that chose the expert are marked below, and `shuffle`, which of many shuffles to compare with.
    """
    if len(texts) != len(windows.domains):
        raise ValueError(f"texts has {len(texts)} windows, and windows has {len(windows.domains)}")
    if len(expert_ids) != len(layers):
        raise ValueError(f"layers has {len(layers)} numbers for {len(expert_ids)} layers of experts")
    about = {"style": {"description_width": "90px"}, "layout": ipywidgets.Layout(width="440px")}
    kinds = [names[int(row[0])] for row in windows.domains]
    controls = {
        "layer": ipywidgets.SelectionSlider(
            options=[(f"layer {number}", place) for place, number in enumerate(layers)],
            description="layer",
            **about,
        ),
        "expert": ipywidgets.IntSlider(0, min=0, max=n_experts - 1, description="expert", **about),
        "window": ipywidgets.Dropdown(
            options=[(f"{number}: {kind}", number) for number, kind in enumerate(kinds)],
            description="text",
            **about,
        ),
        "shuffle": ipywidgets.IntSlider(0, min=0, max=19, description="shuffle", **about),
    }

    def tables(layer: int, shuffle: int) -> dict[str, Tensor]:
        order = torch.randperm(len(windows.domains), generator=torch.Generator().manual_seed(shuffle))
        ids = expert_ids[layer]
        return {
            f"layer {layers[layer]}": count_choices(ids, windows.domains, len(names), n_experts),
            "the same choices, windows shuffled": count_choices(
                ids, windows.domains[order], len(names), n_experts
            ),
        }

    def plot(layer: int, expert: int, window: int, shuffle: int) -> Figure:
        marked = int((expert_ids[layer][window] == expert).any(dim=-1).sum())
        here, mixed = tables(layer, shuffle).items()
        title = f"{here[0]}; of text {window}, {marked} of {len(texts[window])} tokens choose expert {expert}"
        shown = {title: here[1], mixed[0]: mixed[1]}
        return preference_maps(shown, names, devices=devices, expert=expert)

    def caption(layer: int, expert: int, window: int, shuffle: int) -> str:
        chosen = (expert_ids[layer][window] == expert).any(dim=-1)
        counts = tables(layer, shuffle)[f"layer {layers[layer]}"]
        shares = counts[:, expert] / counts.sum(dim=1) * expert_ids[layer].shape[-1]
        said = ", ".join(f"{name} {float(share):.0%}" for name, share in zip(names, shares))
        return (
            f"<div style='max-width:960px'>Tokens that choose expert {expert}: {said}. In text {window} "
            f"({kinds[window]}) <b>{int(chosen.sum())} of {len(chosen)}</b>, marked:</div>"
            f"{marked_text(texts[window], chosen.tolist())}"
        )

    explorer = Explorer(plot, caption=caption, **controls)
    return in_columns(explorer, ["layer", "expert"], ["window", "shuffle"], reset_below=1)
