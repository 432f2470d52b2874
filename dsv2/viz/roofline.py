"""Figures of weight absorption: both forms of MLA, what they cost, and an explorer of the roofline."""

# T new tokens   S cached tokens   H heads
# C kv_lora_rank (the latent)   R qk_rope_head_dim   N qk_nope_head_dim   V v_head_dim

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import ipywidgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from dsv2.accounting import attention_macs
from dsv2.config import DSV2Config
from dsv2.published import Device, measured_devices, published_devices
from dsv2.viz import style
from dsv2.viz.cache import tokens_text
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, new_axes, new_figure
from dsv2.viz.widgets import Explorer, in_columns

ABSORBED, REBUILT, KEPT = "MLA, absorbed", "MLA, rebuilt every step", "MLA, keys and values kept"
KINDS = (ABSORBED, REBUILT, KEPT, "MHA", "GQA, 8 groups", "MQA")
COLOURS = {ABSORBED: style.CACHED, REBUILT: style.VERMILLION, KEPT: style.ORANGE}
HEADS = (8, 16, 32, 64, 128)
BATCHES = tuple(2**power for power in range(9))
CONTEXTS = tuple(2**power for power in range(8, 18))  # 256 to 128K tokens

# --------------------------------------------------------------------------------------------- the two forms


def two_forms(columns: int = 8) -> Figure:
    """Where W^UK and W^UV are applied: to each of `columns` cached tokens, or to the query and the output."""
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1")
    figure = new_figure(10.0, 4.9)
    panels = figure.subplots(1, 2)
    style.margins(figure, left=0.2, right=0.2, bottom=0.2, top=0.6, wspace=0.06)
    step = 8.0 / columns
    centres = [(column + 0.5) * step for column in range(columns)]
    for panel, absorbed in zip(panels, (False, True)):
        panel.set_xlim(-3.4, 8.6)
        panel.set_ylim(-0.5, 7.0)
        panel.set(xticks=[], yticks=[])
        panel.axis("off")
        products = 2 if absorbed else 2 * columns
        label(panel, title=f"{'absorbed' if absorbed else 'expanded'}: {products} products with a matrix")
        _row(panel, centres, 0.0, step, style.CACHED, "latents", "cached")
        _box(panel, 4.0, 4.1, 8.0, 0.8, style.PALE, "attention")
        for x, text in ((-1.9, "query"), (4.0, "output")):
            panel.text(x, 6.65, text, ha="center", va="center", fontsize=BASE, color=INK)
        _arrow(panel, (-1.9, 6.3), (-1.9, 4.1), (-0.1, 4.1))
        _arrow(panel, (4.0, 4.55), (4.0, 6.3))
        if absorbed:
            _arrow(panel, (4.0, 0.42), (4.0, 3.65))
            for x, text in ((-1.9, "(W$^{UK}$)$^T$"), (4.0, "W$^{UV}$")):
                _box(panel, x, 5.4, 2.4, 0.8, style.ORANGE, text, "matrix")
        else:
            _row(panel, centres, 1.0, step, style.ORANGE, "W$^{UK}$", "matrix")
            _row(panel, centres, 1.75, step, style.ORANGE, "W$^{UV}$", "matrix")
            _row(panel, centres, 2.75, step, "#9AA3B2", "keys, values", "rebuilt")
            _arrow(panel, (4.0, 3.15), (4.0, 3.65))
    return finish(
        figure,
        f"The two forms of MLA for one head, one query and {columns} cached latents. Expanded: W^UK and W^UV "
        f"turn every latent into a key and a value, {2 * columns} products with a matrix, then attention. "
        "Absorbed: the transpose of W^UK is applied to the query, attention runs on the latents, W^UV is "
        "applied to what comes out: 2 products.",
    )


def _box(
    ax: Axes, x: float, y: float, width: float, height: float, colour: str, text: str, name: str = ""
) -> None:
    """A box around a point; name: what it is, for whoever counts them."""
    box = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02,rounding_size=0.12"
    )
    box.set(facecolor=colour, edgecolor="none")
    box.set_gid(name)
    ax.add_patch(box)
    ax.text(x, y, text, ha="center", va="center", fontsize=SMALL, color=style.on(colour))


def _row(
    ax: Axes, centres: Sequence[float], y: float, step: float, colour: str, text: str, name: str
) -> None:
    for x in centres:
        _box(ax, x, y, 0.84 * step, 0.6, colour, "", name)
    ax.text(-0.25, y, text, ha="right", va="center", fontsize=SMALL, color=INK)


def _arrow(ax: Axes, *points: tuple[float, float]) -> None:
    """A line through the points, with a head at its end."""
    for start, middle in zip(points[:-2], points[1:-1]):
        ax.plot(*zip(start, middle), color=style.GREY, linewidth=2.0, solid_capstyle="round", zorder=0)
    look = {"color": style.GREY, "linewidth": 2.0, "shrinkA": 0, "shrinkB": 0, "zorder": 0}
    ax.add_patch(FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", mutation_scale=14, **look))


# --------------------------------------------------------------------------------------------- what they cost


def forms_macs(cfg: DSV2Config, tokens: int, keys: int) -> dict[str, int]:
    """Multiply-adds of one head when `tokens` queries meet `keys` cached latents each, in both forms."""
    matrices = (cfg.qk_nope_head_dim + cfg.v_head_dim) * cfg.kv_lora_rank
    return {
        "expanded": keys * matrices + tokens * keys * attention_macs(cfg, "expanded"),
        "absorbed": tokens * matrices + tokens * keys * attention_macs(cfg, "absorbed"),
    }


def forms_crossing(cfg: DSV2Config, keys: int, most: int = 512, ax: Axes | None = None) -> Figure:
    """Multiply-adds of a head in both forms, by the number of new tokens, and where the lines cross."""
    if keys < 1 or most < 2:
        raise ValueError(f"keys={keys} must be at least 1 and most={most} at least 2")
    ax = new_axes(ax, 10.0, 4.6, left=1.1, right=1.5, bottom=0.8, top=0.55)
    counts = np.array([1, most])
    colours = {"expanded": style.VERMILLION, "absorbed": style.CACHED}
    curves = {form: [forms_macs(cfg, int(t), keys)[form] / 1e6 for t in counts] for form in colours}
    for form, colour in colours.items():
        ax.plot(counts, curves[form], color=colour, linewidth=LINE, label=form)
        ax.annotate(
            form,
            (most, curves[form][-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=BASE,
            fontweight="bold",
            color=style.ink(colour),
            annotation_clip=False,
        )
    matrices = (cfg.qk_nope_head_dim + cfg.v_head_dim) * cfg.kv_lora_rank
    slope = matrices + keys * (attention_macs(cfg, "absorbed") - attention_macs(cfg, "expanded"))
    crossing = keys * matrices / slope if slope > 0 else float("inf")
    ax.set_xlim(0, most)
    ax.set_ylim(0, max(map(max, curves.values())) * 1.05)
    said = f"the absorbed form is cheaper for all of 1 to {most} tokens"
    if crossing < most:
        height = (keys * matrices + crossing * keys * attention_macs(cfg, "expanded")) / 1e6
        ax.plot([crossing], [height], "o", color=INK, markersize=11, zorder=5, label="crossing")
        ax.plot([crossing, crossing], [0, height], color=style.GREY, linewidth=2, linestyle=(0, (5, 2)))
        ax.annotate(
            f"{crossing:.1f} tokens",
            (crossing, height),
            xytext=(-10, 10),
            textcoords="offset points",
            ha="right",
            fontsize=BASE,
            fontweight="bold",
            color=INK,
        )
        said = f"they cross at {crossing:.1f} tokens, below which the absorbed form is cheaper"
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    label(ax, "new tokens in one call", "multiply-adds (millions)", f"One head, {keys:,} cached tokens")
    return finish(ax, f"Multiply-adds of one head against {keys:,} cached tokens, by new tokens: {said}.")


def forms_times(cached: Sequence[int], milliseconds: Mapping[str, Sequence[float]]) -> Figure:
    """Measured times of a decoding step by cached tokens, a line for each way, both axes logarithmic.

    The first name's times are set against the second's: the ratio stands above its points.
    """
    if len(milliseconds) < 2 or any(len(times) != len(cached) for times in milliseconds.values()):
        raise ValueError(f"milliseconds must hold {len(cached)} times each for at least two names")
    if min(min(times) for times in milliseconds.values()) <= 0:
        raise ValueError("milliseconds must be above 0")
    figure = new_figure(10.0, 4.9)
    ax = style.style_axes(figure.add_subplot(), "both")
    style.margins(figure, left=1.05, right=2.3, bottom=0.8, top=0.35)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    (slow, slow_times), (fast, fast_times) = list(milliseconds.items())[:2]
    style.measured_lines(ax, cached, milliseconds, markersize=8, gap=14)
    ratios = [a / b for a, b in zip(slow_times, fast_times)]
    for x, y, ratio in zip(cached, slow_times, ratios):
        ax.annotate(
            f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x",
            (x, y),
            xytext=(-4, 11),
            textcoords="offset points",
            ha="center",
            fontsize=BASE,
            fontweight="bold",
            color=INK,
        )
    every = [time for times in milliseconds.values() for time in times]
    ax.set_xlim(cached[0] / 1.25, cached[-1] * 1.1)
    ax.set_ylim(min(every) / 1.6, max(every) * 2.4)
    ax.xaxis.set_major_locator(FixedLocator(list(cached)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_text(round(value))))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    label(ax, "cached tokens", "one step of one layer (ms)")
    said = ", ".join(f"{tokens:,}: {ratio:.1f}" for tokens, ratio in zip(cached, ratios))
    return finish(ax, f"{slow} takes so many times as long as {fast}, by cached tokens: {said}.")


# ----------------------------------------------------------------------------------------------- the roofline


@dataclass(frozen=True)
class AttentionStep:
    """The attention of one layer in one step of decoding: FLOPs, and bytes read and written."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs for each byte."""
        return self.flops / self.bytes

    def reading(self, device: Device) -> float:
        """Seconds that the bytes take at least."""
        return self.bytes / device.bandwidth

    def computing(self, device: Device) -> float:
        """Seconds that the FLOPs take at least."""
        return self.flops / device.flops

    def seconds(self, device: Device) -> float:
        """Both go on at the same time, so that the longer one counts."""
        return max(self.reading(device), self.computing(device))

    def limit(self, device: Device) -> str:
        """Which of the two it is: "reading" or "computing"."""
        return "reading" if self.reading(device) >= self.computing(device) else "computing"


def attention_step(
    kind: str, cfg: DSV2Config, batch: int, context: int, width: float | int = 2
) -> AttentionStep:
    """What lies between the cache and the heads' outputs of a layer, for one new token of `batch` sequences.

    kind: one of `KINDS`; the baselines have cfg's heads and d_h. width: bytes of a number. Rebuilding reads
    the latents, writes every head's keys and values, and reads those. W^UK and W^UV, which every form of MLA
    reads once a step, and their products with the new token are left out, like the layer's other weights.
    """
    heads, latent, rope = cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    pairs = batch * context
    cached, macs = latent + rope, attention_macs(cfg, "absorbed")
    written = heads * (cfg.qk_head_dim + cfg.v_head_dim)
    if kind == ABSORBED:
        numbers, macs = cached, heads * macs
    elif kind == REBUILT:
        rebuild = (cfg.qk_nope_head_dim + cfg.v_head_dim) * latent
        numbers, macs = cached + 2 * written, heads * (rebuild + attention_macs(cfg, "expanded"))
    elif kind == KEPT:
        numbers, macs = written, heads * attention_macs(cfg, "expanded")
    elif kind in KINDS:
        groups = {"MHA": heads, "MQA": 1}.get(kind, min(8, heads))
        numbers, macs = 2 * groups * cfg.qk_nope_head_dim, heads * 2 * cfg.qk_nope_head_dim
    else:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    return AttentionStep(2.0 * pairs * macs, float(pairs * numbers * width))


@cache
def roofline_devices() -> dict[str, Device]:
    """The published devices, and beside each one that was measured, the rates that it reached."""
    return published_devices() | measured_devices()


def number_width(device: Device) -> int:
    """Bytes of a number in the device's type."""
    return 4 if device.dtype == "float32" else 2


def time_text(seconds: float) -> str:
    """Three digits and a unit: 0.0000268 -> "26.8 µs"."""
    unit, size = next(
        ((unit, size) for unit, size in (("s", 1.0), ("ms", 1e-3)) if seconds >= 0.9995 * size), ("µs", 1e-6)
    )
    return f"{float(f'{seconds / size:.3g}'):,g} {unit}"


def roofline_figure(kind: str, steps: Mapping[str, AttentionStep], device: Device) -> Figure:
    """Left: a device's roofline with `kind` on it, the others as rings. Right: the times of its two parts."""
    figure = new_figure(10.4, 4.9)
    left, right = figure.subplots(1, 2, width_ratios=[1.75, 1])
    style.margins(figure, left=1.05, right=0.3, bottom=0.85, top=0.6, wspace=0.16)
    style.style_axes(left, "both")
    low, high = 0.25, 4096.0
    x = np.array([low, device.balance, high])
    left.plot(
        x, np.minimum(x * device.bandwidth, device.flops) / 1e12, color=INK, linewidth=LINE, label="roof"
    )
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlim(low, high)
    left.set_ylim(0.01, 30_000)
    left.plot(
        [device.balance] * 2,
        [0.01, device.flops / 1e12],
        color=style.GREY,
        linestyle=(0, (5, 2)),
        linewidth=2,
        label="balance",
    )
    left.annotate(
        f"balance:\n{device.balance:,.3g}",
        (device.balance, 0.01),
        xytext=(8, 8),
        textcoords="offset points",
        fontsize=SMALL,
        color=INK,
    )
    for name, step in steps.items():
        rate = min(step.intensity * device.bandwidth, device.flops) / 1e12
        chosen = name == kind
        left.plot(
            [step.intensity],
            [rate],
            "o",
            markersize=15 if chosen else 9,
            color=_colour(name),
            markerfacecolor=_colour(name) if chosen else style.PAPER,
            markeredgewidth=2.5,
            zorder=6 if chosen else 5,
            label=name,
        )
    step = steps[kind]
    rate = min(step.intensity * device.bandwidth, device.flops)
    left.text(
        0.03,
        0.96,
        f"{step.intensity:,.3g} FLOPs a byte:\n{_percent(rate / device.flops)} % of the peak",
        transform=left.transAxes,
        va="top",
        fontsize=BASE,
        fontweight="bold",
        color=style.ink(_colour(kind)),
    )
    left.text(
        0.97,
        0.96,
        "rings: the others",
        transform=left.transAxes,
        va="top",
        ha="right",
        fontsize=SMALL,
        color=INK,
    )
    left.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(-2, 13, 2)]))
    left.yaxis.set_major_locator(FixedLocator([10.0**power for power in range(-2, 4)]))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    left.xaxis.set_minor_locator(NullLocator())
    left.yaxis.set_minor_locator(NullLocator())
    label(left, "FLOPs for each byte", "at most (TFLOP/s)", device.name)

    style.style_axes(right, None)
    times = {"reading": step.reading(device), "computing": step.computing(device)}
    longest = max(times.values())
    for row, (name, seconds) in enumerate(times.items()):
        binds = name == step.limit(device)
        colour = _colour(kind) if binds else style.tint(_colour(kind), 0.4)
        right.barh(row, seconds / longest, height=0.42, color=colour, label=name)
        right.text(
            0.0,
            row - 0.27,
            f"{name}: {time_text(seconds)}",
            va="bottom",
            fontsize=BASE,
            fontweight="bold" if binds else "normal",
            color=INK,
        )
        if binds:
            right.text(
                0.03, row, "the limit", va="center", fontsize=BASE, color=style.on(colour), fontweight="bold"
            )
    right.set_xlim(0, 1.02)
    right.set_ylim(1.75, -0.85)
    right.set_xticks([])
    right.set_yticks([])
    right.spines["bottom"].set_visible(False)
    label(right, title="One layer, one step")
    return finish(
        figure,
        f"{kind} on {device.name}: {step.intensity:,.3g} FLOPs a byte, the device's balance is "
        f"{device.balance:,.3g}. Reading takes {time_text(times['reading'])}, computing "
        f"{time_text(times['computing'])}: {step.limit(device)} is the limit.",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g}" if share < 0.995 else "100"


def _colour(kind: str) -> str:
    return COLOURS.get(kind) or style.colour_of(kind)


def roofline_caption(kind: str, steps: Mapping[str, AttentionStep], device: Device) -> str:
    """All kinds in a table of HTML, the quickest first, `kind` in bold."""
    rows = []
    for name, step in sorted(steps.items(), key=lambda item: item[1].seconds(device)):
        cells = (
            name,
            f"{step.intensity:,.3g}",
            time_text(step.reading(device)),
            time_text(step.computing(device)),
            f"{time_text(step.seconds(device))} ({step.limit(device)})",
        )
        weight = "bold" if name == kind else "normal"
        rows.append(
            f'<tr style="font-weight:{weight}"><td style="color:{style.ink(_colour(name))}">'
            + '</td><td style="text-align:right;padding-left:22px">'.join(map(html.escape, cells))
            + "</td></tr>"
        )
    heads = "</th><th style='text-align:right;padding-left:22px'>".join(
        ("", "FLOPs a byte", "reading", "computing", "at least")
    )
    return f'<table style="font-size:15px"><tr><th>{heads}</th></tr>{"".join(rows)}</table>'


def roofline_explorer(
    cfg: DSV2Config | None = None,
    kind: str = ABSORBED,
    device: str = "H100 80GB",
    heads: int | None = None,
) -> Explorer:
    """Attention, heads, batch, context, device by menus and sliders -> its place on the roofline, its time.

    cfg: the sizes of a head and of the latent; None: DeepSeek-V2's. heads: at first; None: cfg's.
    """
    cfg = DSV2Config.preset("full") if cfg is None else cfg
    devices = roofline_devices()
    if device not in devices or kind not in KINDS:
        raise ValueError(
            f"device={device!r} must be one of {', '.join(devices)}; kind={kind!r} one of {', '.join(KINDS)}"
        )
    options = sorted({*HEADS, cfg.num_attention_heads, *([heads] if heads else [])})
    about = {"style": {"description_width": "110px"}, "layout": ipywidgets.Layout(width="400px")}
    contexts = [(tokens_text(context), context) for context in CONTEXTS]
    controls = {
        "kind": ipywidgets.Dropdown(options=KINDS, value=kind, description="attention", **about),
        "device": ipywidgets.Dropdown(options=list(devices), value=device, description="device", **about),
        "heads": ipywidgets.SelectionSlider(
            options=options, value=heads or cfg.num_attention_heads, description="heads", **about
        ),
        "batch": ipywidgets.SelectionSlider(options=BATCHES, value=16, description="texts (batch)", **about),
        "context": ipywidgets.SelectionSlider(
            options=contexts, value=8192, description="cached tokens", **about
        ),
    }

    def work(
        kind: str, device: str, heads: int, batch: int, context: int
    ) -> tuple[str, dict[str, AttentionStep], Device]:
        chosen = devices[device]
        sized = cfg.replace(num_attention_heads=heads)
        width = number_width(chosen)
        return kind, {name: attention_step(name, sized, batch, context, width) for name in KINDS}, chosen

    def setting(kind: str, device: str, heads: int, batch: int, context: int) -> str:
        bits = 8 * number_width(devices[device])
        return (
            f"<div>{batch} texts with {tokens_text(context)} cached tokens each, {heads} heads, "
            f"numbers of {bits:g} bits. In one layer:</div>"
        )

    explorer = Explorer(
        lambda **values: roofline_figure(*work(**values)),
        caption=lambda **values: setting(**values) + roofline_caption(*work(**values)),
        **controls,
    )
    columns = (["kind", "device"], ["heads", "batch", "context"])
    return in_columns(explorer, *columns)
