"""The KV cache in figures, and its calculator: what decoding repeats, keeps and reads, and what fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dsv2.accounting import (
    attention_macs,
    attention_twin,
    decode_bytes,
    kv_bytes_per_token,
    kv_elements_per_token,
    parameters,
)
from dsv2.config import DSV2Config
from dsv2.published import Device, published_devices, published_models
from dsv2.viz import style
from dsv2.viz.plots import _spread, human_bytes
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, new_axes, new_figure
from dsv2.viz.widgets import Explorer, in_columns

WEIGHTS = "#9AA3B2"  # what lies in memory beside the cache
TITLE_OF_PANEL = BASE + 1.0
OWN = "own"
CONTEXTS = tuple(2**power for power in range(10, 21))  # 1K to 1M tokens
BATCHES = tuple(2**power for power in range(11))
GPUS = (1, 2, 4, 8, 16)
HEADS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)


def tokens_text(tokens: int) -> str:
    """A number of tokens as contexts are named: 131072 -> "128K", 1000 -> "1,000"."""
    if tokens >= 2**20 and tokens % 2**20 == 0:
        return f"{tokens // 2**20}M"
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


# ---------------------------------------------------------------------------------- what decoding repeats


def decode_work(prompt: int, new: int) -> Figure:
    """Which tokens go through the model at each step of writing `new` tokens, without a cache and with one.

    The first step reads the prompt; the last token written is not read any more.
    """
    if prompt < 1 or new < 1:
        raise ValueError(f"prompt={prompt} and new={new} must be at least 1")
    figure = new_figure(10.0, 0.4 * new + 2.2)
    panels = figure.subplots(1, 2, sharey=True)
    style.margins(figure, left=0.9, right=0.3, bottom=1.25, top=0.65, wspace=0.12)
    counts = {"without": sum(prompt + step for step in range(new)), "with": prompt + new - 1}
    for (name, count), panel in zip(counts.items(), panels):
        style.style_axes(panel, None)
        for step in range(new):
            known = prompt + step
            first_new = 0 if step == 0 else known - 1
            for token in range(known):
                if token >= first_new:
                    colour = style.ACTIVE
                else:
                    colour = (
                        style.tint(style.ACTIVE, 0.45) if name == "without" else style.tint(style.CACHED, 0.3)
                    )
                panel.add_patch(Rectangle((token - 0.46, step + 0.54), 0.92, 0.92, color=colour, linewidth=0))
        panel.set_xlim(-0.6, prompt + new - 2 + 0.6)
        panel.set_ylim(new + 0.6, 0.4)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.set_yticks(range(1, new + 1, math.ceil(new / 12)))
        label(panel, "position in the text", title=f"{name} a cache: {count:,} tokens")
    label(panels[0], y="step")
    key = [
        (style.ACTIVE, "goes through the model"),
        (style.tint(style.ACTIVE, 0.45), "goes through it again"),
        (style.tint(style.CACHED, 0.3), "in the cache"),
    ]
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour, _ in key]
    figure.legend(
        handles, [text for _, text in key], loc="lower center", ncols=3, fontsize=SMALL, frameon=False
    )
    return finish(
        figure,
        f"Writing {new} tokens after a prompt of {prompt}: without a cache {counts['without']:,} tokens go "
        f"through the model, a triangle of repeated work; with a cache {counts['with']:,}, each token once.",
    )


def visible_keys(cached: int, tokens: int) -> Figure:
    """Which keys each query sees when `tokens` new tokens follow `cached` ones: a row for each query."""
    if cached < 0 or tokens < 1:
        raise ValueError(f"cached={cached} must not be negative and tokens={tokens} at least 1")
    keys = cached + tokens
    ax = new_axes(
        None, min(2.6 + 0.75 * keys, 10.0), 1.85 + 0.62 * tokens, None, left=1.75, bottom=0.85, top=0.6
    )
    for query in range(tokens):
        for key in range(keys):
            seen = key <= cached + query
            colour = style.tint(style.CACHED, 0.35) if key < cached else style.tint(style.ACTIVE, 0.45)
            cell = Rectangle((key - 0.46, query - 0.46), 0.92, 0.92, linewidth=1.5)
            cell.set(facecolor=colour if seen else style.PAPER, edgecolor=colour if seen else style.PALE)
            cell.set_gid(f"query {query} key {key} {'seen' if seen else 'hidden'}")
            ax.add_patch(cell)
    ax.set_xlim(-0.6, keys - 0.4)
    ax.set_ylim(tokens - 0.4, -0.6)
    ax.set_xticks(range(keys))
    ax.set_yticks(
        range(tokens), [f"query {t} (position {cached + t})" for t in range(tokens)], fontsize=SMALL
    )
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    style.margins(ax.figure, left=2.45, right=0.3, bottom=0.85, top=0.6)
    label(ax, "position of the key: blue is cached, orange new", title="Which key each query sees")
    rows = "; ".join(f"query {t} sees keys 0 to {cached + t}" for t in range(tokens))
    return finish(ax, f"{tokens} new tokens after {cached} cached ones: {rows}.")


# ------------------------------------------------------------------------------------------- shared heads


def head_sharing(heads: int = 8, kv_heads: Sequence[int] = (8, 2, 1)) -> Figure:
    """Which key/value head each query head reads, a panel for each number of key/value heads."""
    wrong = [count for count in kv_heads if count < 1 or heads % count]
    if wrong or not kv_heads:
        raise ValueError(f"kv_heads={tuple(kv_heads)} must hold divisors of heads={heads}")
    figure = new_figure(10.0, 3.5)
    panels = figure.subplots(1, len(kv_heads), squeeze=False)[0]
    style.margins(figure, left=0.25, right=0.25, bottom=0.2, top=0.65, wspace=0.1)
    for panel, count in zip(panels, kv_heads):
        name = "MHA" if count == heads else "MQA" if count == 1 else "GQA"
        colour = style.ATTENTION_COLOURS[name]
        centres = [(group + 0.5) * heads / count for group in range(count)]
        for head in range(heads):
            x, centre = head + 0.5, centres[head * count // heads]
            panel.plot([x, centre], [1.86, 0.95], color=style.tint(colour, 0.6), linewidth=2.2, zorder=1)
            panel.plot(x, 2, "o", color=style.tint(style.ORANGE, 0.75), markersize=19, markeredgewidth=0)
            panel.text(x, 1.98, "Q", ha="center", va="center", fontsize=SMALL, color=INK)
        for centre in centres:
            for lower, letter in ((0.5, "K"), (-0.2, "V")):
                box = FancyBboxPatch(
                    (centre - 0.3, lower),
                    0.6,
                    0.5,
                    boxstyle="round,pad=0.04",
                    facecolor=colour,
                    edgecolor=colour,
                )
                panel.add_patch(box)
                panel.text(
                    centre, lower + 0.24, letter, ha="center", va="center", fontsize=SMALL, color="white"
                )
        panel.set_xlim(-0.2, heads + 0.2)
        panel.set_ylim(-0.95, 2.5)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.axis("off")
        vectors = 2 * count
        panel.set_title(
            f"{name}: {vectors} vectors a token",
            fontsize=TITLE_OF_PANEL,
            color=style.ink(colour),
            loc="center",
        )
        said = (
            "each query has its own K, V"
            if name == "MHA"
            else f"all {heads} queries share one K, V"
            if name == "MQA"
            else f"every {heads // count} queries share one K, V"
        )
        panel.text(heads / 2, -0.75, said, ha="center", fontsize=SMALL, color=INK)
    said = ", ".join(f"{2 * count} vectors a token with {count} key/value heads" for count in kv_heads)
    return finish(
        figure, f"{heads} query heads, circles with a Q, and the keys and values they read: {said}."
    )


# ------------------------------------------------------------------------------------------ what models keep


def attention_name(cfg: DSV2Config) -> str:
    return cfg.attention.upper()


def published_cache(models: Mapping[str, DSV2Config], bits: float | int = 16) -> Figure:
    """Bytes that each model caches for a token, a bar each, and which part of MHA's that is."""
    each = {name: kv_bytes_per_token(cfg, bits) for name, cfg in models.items()}
    if not each:
        raise ValueError("models is empty; give at least one name and its config")
    ax = new_axes(None, 10.0, 1.3 + 0.62 * len(each), "x", left=2.35, right=0.4, bottom=0.8, top=0.2)
    said = []
    for row, (name, cfg) in enumerate(models.items()):
        kind = attention_name(cfg)
        times = kv_bytes_per_token(attention_twin(cfg, "mha"), bits) / each[name]
        colour = style.colour_of(kind)
        ax.barh(row, each[name] / 1e3, height=0.66, color=colour)
        text = f"{human_bytes(each[name])}  {kind}" + (f", 1/{times:.2g} of MHA" if times > 1 else "")
        ax.annotate(
            text,
            (each[name] / 1e3, row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=BASE,
            fontweight="bold",
            color=style.ink(colour),
        )
        said.append(f"{name} {human_bytes(each[name])} ({kind}, 1/{times:.2g} of MHA)")
    ax.set_yticks(range(len(each)), list(each), fontsize=BASE)
    ax.invert_yaxis()
    ax.set_xlim(0, max(each.values()) / 1e3 * 1.55)
    ax.tick_params(axis="y", length=0)
    label(ax, f"cached for each token, {bits:g} bits a number (KB)")
    return finish(ax, f"Cached for each token: {'; '.join(said)}.")


@dataclass(frozen=True)
class Fit:
    """What a model takes of a device: bytes of weights and of one text's cache; `batch` texts fit."""

    weights: float
    sequence: float
    memory: float

    @property
    def batch(self) -> int:
        return max(math.floor((self.memory - self.weights) / self.sequence), 0)


def fit(cfg: DSV2Config, context: int, device: Device, gpus: int = 1, bits: float | int = 16) -> Fit:
    """Weights in 16 bits and a cache of `bits`, spread evenly over the memory of `gpus` devices."""
    return Fit(2.0 * parameters(cfg).total, context * kv_bytes_per_token(cfg, bits), gpus * device.memory)


def memory_bars(
    models: Mapping[str, DSV2Config], context: int, device: Device, gpus: Sequence[int] = (1, 8)
) -> Figure:
    """Weights and the cache of one text, a bar each model, against the memory of so many devices.

    Beside the bars: both in numbers, and how many such texts fit on the last of `gpus`.
    """
    if not models or not gpus:
        raise ValueError("models and gpus must each hold at least one entry")
    fits = {name: fit(cfg, context, device, gpus[-1]) for name, cfg in models.items()}
    ax = new_axes(None, 10.0, 1.6 + 0.66 * len(models), "x", left=1.8, right=3.35, bottom=0.8, top=0.5)
    said = []
    widest = max(max(f.weights + f.sequence for f in fits.values()), max(gpus) * device.memory)
    for count in gpus:
        ax.axvline(count * device.memory / 1e9, color=INK, linewidth=2.0, linestyle=(0, (5, 2)), zorder=2)
        ax.annotate(
            f"{count} x {device.name.split()[0]}",
            (count * device.memory / 1e9, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL,
            color=INK,
        )
    columns = {
        "weights": (80, style.GREY),
        "one text": (154, style.CACHED),
        f"fit on {gpus[-1]}": (222, INK),
    }

    def write(y: float, texts: Sequence[str], bold: str, coordinates: str) -> None:
        for text, (right, colour) in zip(texts, columns.values()):
            ax.annotate(
                text,
                (1.0, y),
                xycoords=("axes fraction", coordinates),
                xytext=(right, 5 if coordinates == "axes fraction" else 0),
                textcoords="offset points",
                ha="right",
                va="baseline" if coordinates == "axes fraction" else "center",
                fontsize=SMALL,
                fontweight=bold,
                color=style.ink(colour),
                annotation_clip=False,
            )

    write(1.0, list(columns), "normal", "axes fraction")
    for row, (name, taken) in enumerate(fits.items()):
        ax.barh(row, taken.weights / 1e9, height=0.6, color=WEIGHTS, zorder=3)
        ax.barh(row, taken.sequence / 1e9, left=taken.weights / 1e9, height=0.6, color=style.CACHED, zorder=3)
        weights, one_text = human_bytes(taken.weights), human_bytes(taken.sequence)
        write(row, [weights, one_text, f"{taken.batch}"], "bold", "data")
        said.append(f"{name}: weights {weights}, one text {one_text}, {taken.batch} fit")
    ax.set_yticks(range(len(fits)), list(fits), fontsize=SMALL)
    ax.invert_yaxis()
    ax.set_xlim(0, widest / 1e9 * 1.04)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.tick_params(axis="y", length=0)
    label(ax, f"memory (GB): weights and one text of {tokens_text(context)} tokens")
    return finish(
        ax,
        f"Memory of one text of {context:,} tokens, and how many fit on {gpus[-1]} {device.name}: "
        f"{'; '.join(said)}.",
    )


# ------------------------------------------------------------------------------------- how long it takes


def step_times(tokens: Sequence[int], milliseconds: Mapping[str, Sequence[float]]) -> Figure:
    """Milliseconds that the next token takes, by the number of tokens before it, a line for each way."""
    if not milliseconds or any(len(times) != len(tokens) for times in milliseconds.values()):
        raise ValueError(f"milliseconds must hold {len(tokens)} times for each name, one per entry of tokens")
    ax = new_axes(None, 10.0, 4.4, left=1.0, right=2.3, bottom=0.8, top=0.3)
    style.measured_lines(ax, tokens, milliseconds, markersize=7, gap=12)
    ax.set_xlim(0, tokens[-1] * 1.02)
    ax.set_ylim(0, max(max(times) for times in milliseconds.values()) * 1.1)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    label(ax, "tokens so far", "the next token takes (ms)")
    said = "; ".join(
        f"{name}: {times[0]:.3g} ms after {tokens[0]:,} tokens, {times[-1]:.3g} ms after {tokens[-1]:,}"
        for name, times in milliseconds.items()
    )
    return finish(ax, f"Time of the next token. {said}.")


def attention_intensity(cfg: DSV2Config, bits: float | int = 16) -> float:
    """FLOPs of attention for each byte of cache that one step of decoding reads.

    For MHA, GQA and MQA this is heads / kv_heads at 16 bits: every key and value that is read meets so many
    queries, with two FLOPs for each of its numbers. MLA: in its absorbed form (chapter 04).
    """
    flops = 2 * cfg.num_hidden_layers * cfg.num_attention_heads * attention_macs(cfg, "absorbed")
    return flops / kv_bytes_per_token(cfg, bits)


def decode_roofline(device: Device, intensities: Mapping[str, float]) -> Figure:
    """The rate a device reaches at most, by FLOPs per byte read, and where kinds of attention stand on it."""
    if not intensities or min(intensities.values()) <= 0:
        raise ValueError("intensities must hold at least one name with FLOPs per byte above 0")
    ax = new_axes(None, 10.0, 5.4, "both", left=1.1, right=0.4, bottom=0.85, top=0.35)
    low, high = 0.5, 4096.0
    x = np.array([low, device.balance, high])
    ax.plot(x, np.minimum(x * device.bandwidth, device.flops) / 1e12, color=INK, linewidth=LINE, label="roof")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(low * device.bandwidth / 1e12, device.flops / 1e12 * 2.2)
    floor = ax.get_ylim()[0]
    ax.plot(
        [device.balance] * 2,
        [floor, device.flops / 1e12],
        color=style.GREY,
        linestyle=(0, (5, 2)),
        linewidth=2,
    )
    ax.annotate(
        f"balance: {device.balance:,.0f}\nFLOPs a byte",
        (device.balance, floor),
        xytext=(10, 12),
        textcoords="offset points",
        fontsize=SMALL,
        color=INK,
    )
    ax.annotate(
        f"{device.name}: {device.flops / 1e12:,.0f} TFLOP/s",
        (high, device.flops / 1e12),
        xytext=(-4, 8),
        textcoords="offset points",
        ha="right",
        fontsize=SMALL,
        color=INK,
    )
    said = []
    for i, (name, intensity) in enumerate(intensities.items()):
        rate = min(intensity * device.bandwidth, device.flops)
        before = (
            device.balance / 16 < intensity < device.balance
        )  # to the right stands the line of the balance
        colour = style.colour_of(name, i)
        ax.plot([intensity], [rate / 1e12], "o", color=colour, markersize=13, zorder=5, label=name)
        ax.annotate(
            f"{name}: {intensity:.3g}, {100 * rate / device.flops:.2g} %",
            (intensity, rate / 1e12),
            xytext=(-14, 4) if before else (14, -10),
            textcoords="offset points",
            ha="right" if before else "left",
            fontsize=SMALL,
            fontweight="bold",
            color=style.ink(colour),
        )
        said.append(f"{name} at {intensity:.3g} FLOPs a byte reaches {100 * rate / device.flops:.2g} %")
    ticks = [2.0**power for power in range(0, 13, 2)]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    label(ax, "FLOPs for each byte read", "at most (TFLOP/s)")
    return finish(
        ax, f"Roofline of {device.name}, balance at {device.balance:,.0f} FLOPs a byte: {'; '.join(said)}."
    )


# ------------------------------------------------------------------------------------------ the calculator


@dataclass(frozen=True)
class Plan:
    """A model on a machine, in numbers. `elements`: cached numbers a token, of the model and of its twins."""

    attention: str
    elements: dict[str, int]
    weights: float
    memory: float
    context: int
    batch: int
    cache_bits: float
    read: float = field(default=0.0)  # bytes that a step reads at least
    bandwidth: float = 1.0

    @property
    def bytes_per_token(self) -> float:
        return self.elements[self.attention] * self.cache_bits / 8

    @property
    def sequence(self) -> float:
        return self.bytes_per_token * self.context

    @property
    def cache(self) -> float:
        return self.sequence * self.batch

    @property
    def fits(self) -> bool:
        return self.weights + self.cache <= self.memory

    def largest_batch(self, name: str | None = None, context: int | None = None) -> int:
        """How many sequences fit beside the weights, for this attention or a twin's."""
        each = self.elements[name or self.attention] * self.cache_bits / 8 * (context or self.context)
        return max(math.floor((self.memory - self.weights) / each), 0)


@cache
def _models() -> dict[str, DSV2Config]:
    return published_models()


@cache
def _devices() -> dict[str, Device]:
    return published_devices()


def plan(
    model: str,
    context: int,
    batch: int,
    cache_bits: float | int = 16,
    weight_bits: float | int = 16,
    device: str = "H100 80GB",
    gpus: int = 1,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    billions: float = 8.0,
) -> Plan:
    """The numbers behind the calculator. The last five describe the model "own", and are not used for others.

    Weights and caches lie evenly spread over the devices, as a good deployment has them nearly; what programs
    and activations need is left out.
    """
    machine = _devices()[device]
    if model == OWN:
        kv_heads = min(kv_heads, heads)
        name = "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA"
        width = 2 * head_dim * layers
        elements = {name: kv_heads * width, "MHA": heads * width, "MQA": width}
        weights = billions * 1e9 * weight_bits / 8
        read = weights + batch * context * elements[name] * cache_bits / 8
    else:
        cfg = _models()[model]
        name = attention_name(cfg)
        elements = {name: kv_elements_per_token(cfg)}
        elements |= {
            twin: kv_elements_per_token(attention_twin(cfg, twin.lower())) for twin in ("MHA", "MQA")
        }
        weights = parameters(cfg).total * weight_bits / 8
        read = decode_bytes(cfg, context, batch, weight_dtype=weight_bits, cache_dtype=cache_bits).total
    return Plan(
        name,
        elements,
        weights,
        gpus * machine.memory,
        context,
        batch,
        cache_bits,
        read,
        gpus * machine.bandwidth,
    )


def _empty_plan() -> Figure:
    """What is the same in every figure of a plan: axes, ticks and labels, most of the work of drawing one."""
    figure = new_figure(9.6, 5.5)
    top, below = figure.subplots(2, 1, height_ratios=[1, 3.1])
    style.margins(figure, left=1.15, right=1.75, bottom=0.8, top=0.6, hspace=0.75)
    style.style_axes(top, None)
    style.style_axes(below, "both")
    top.set_ylim(-0.65, 0.65)
    top.set_yticks([])
    top.spines["left"].set_visible(False)
    top.xaxis.set_major_locator(MaxNLocator(7))
    below.set_xscale("log", base=2)
    below.set_yscale("log")
    below.set_xlim(CONTEXTS[0], CONTEXTS[-1])
    below.set_ylim(0.5, 30_000)
    below.xaxis.set_major_locator(FixedLocator(CONTEXTS[::2]))
    below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_text(round(value))))
    below.yaxis.set_major_locator(FixedLocator([1, 10, 100, 1000, 10_000]))
    below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    below.xaxis.set_minor_locator(NullLocator())
    below.yaxis.set_minor_locator(NullLocator())
    label(below, "tokens of context", "texts that fit")
    return figure


def plan_figure(numbers: Plan, where: str, figure: Figure | None = None) -> Figure:
    """Above: weights and caches against the memory of `where`. Below: the largest batch by context.

    figure: one that this function made, to be drawn over; None: a new one.
    """
    figure = _empty_plan() if figure is None else figure
    top, below = figure.axes
    for artist in [artist for axes in (top, below) for artist in (*axes.lines, *axes.patches, *axes.texts)]:
        artist.remove()
    unit, name = (1e12, "TB") if max(numbers.memory, numbers.weights + numbers.cache) >= 2e12 else (1e9, "GB")
    total = numbers.weights + numbers.cache
    top.barh(0, numbers.weights / unit, height=0.7, color=WEIGHTS, label="weights")
    colour = style.CACHED if numbers.fits else style.VERMILLION
    top.barh(0, numbers.cache / unit, left=numbers.weights / unit, height=0.7, color=colour, label="cache")
    top.plot([numbers.memory / unit] * 2, [-0.62, 0.62], color=INK, linewidth=3.0, label="memory")
    top.set_xlim(0, max(total, numbers.memory) / unit * 1.03)
    top.annotate(
        "fits" if numbers.fits else f"{total / numbers.memory:.2g}x\ntoo much",
        (1.0, 0.5),
        xycoords="axes fraction",
        xytext=(16, 0),
        textcoords="offset points",
        va="center",
        fontsize=18 if numbers.fits else BASE + 1,
        fontweight="bold",
        color=style.ink(style.GREEN if numbers.fits else style.VERMILLION),
    )
    title = f"{where}: weights {human_bytes(numbers.weights)} (grey), cache {human_bytes(numbers.cache)}"
    label(top, title=title)
    top.set_xlabel(f"{name}; the black line is the memory", fontsize=SMALL, color=INK)

    # The model's own line goes on top of its twins'.
    names = [twin for twin in numbers.elements if twin != numbers.attention] + [numbers.attention]
    ends = []
    for twin in names:
        batches = [numbers.largest_batch(twin, context) for context in CONTEXTS]
        shown = [(context, n) for context, n in zip(CONTEXTS, batches) if n > 0]
        if not shown:
            continue
        mine = twin == numbers.attention
        colour = style.colour_of(twin)
        below.plot(
            *zip(*shown),
            color=colour if mine else style.tint(colour, 0.6),
            linewidth=LINE + 1.5 * mine,
            label=twin,
        )
        ends.append((shown[-1], ("" if mine else "as ") + twin, colour, mine))
    # Two lines may end close to each other: their names keep a line's distance, in decades.
    places = {
        at: _spread([math.log10(y) for (x, y), *_ in ends if x == at], 0.62)
        for at in {x for (x, _), *_ in ends}
    }
    for (x, _), text, colour, mine in ends:
        y = 10 ** places[x].pop(0)
        below.annotate(
            text,
            (x, y),
            xytext=(14, 0) if x == CONTEXTS[-1] else (10, 2),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            fontweight="bold" if mine else "normal",
            color=style.ink(colour),
            annotation_clip=False,
        )
    most = numbers.largest_batch()
    if most > 0:
        colour = style.colour_of(numbers.attention)
        below.plot(
            [numbers.context], [most], "o", color=colour, markersize=12, zorder=6, clip_on=False, label="here"
        )
        below.annotate(
            f"{most:,}",
            (numbers.context, most),
            xytext=(0, 12),
            textcoords="offset points",
            ha="left" if numbers.context == CONTEXTS[0] else "center",
            fontsize=BASE,
            fontweight="bold",
            color=style.ink(colour),
            zorder=7,
        )
    else:
        below.text(
            0.5,
            0.5,
            "not one text fits" if numbers.weights < numbers.memory else "the weights alone do not fit",
            transform=below.transAxes,
            ha="center",
            fontsize=18,
            color=style.ink(style.VERMILLION),
        )
    return finish(
        figure,
        f"{where}: weights {human_bytes(numbers.weights)} and a cache of {human_bytes(numbers.cache)} "
        f"{'fit' if numbers.fits else 'do not fit'} into {human_bytes(numbers.memory)}; "
        f"{most:,} texts of {numbers.context:,} tokens fit.",
    )


def plan_caption(numbers: Plan) -> str:
    """The plan in a sentence of HTML."""
    rate = numbers.batch * numbers.bandwidth / numbers.read
    speed = (
        f"A step of decoding reads at least {human_bytes(numbers.read)}: at most "
        f"<b>{float(f'{rate:.3g}'):,.10g} tokens a second</b>, all texts together."
        if numbers.fits
        else ""
    )
    return (
        '<div style="font-size:15px;max-width:900px">'
        f"<b>{human_bytes(numbers.bytes_per_token)}</b> for each token, "
        f"<b>{human_bytes(numbers.sequence)}</b> for "
        f"a text of {tokens_text(numbers.context)}. Beside the weights fit "
        f"<b>{numbers.largest_batch():,}</b> of them. {speed}</div>"
    )


def cache_calculator(model: str = "LLaMA3 70B", context: int = 128 * 1024) -> Explorer:
    """Model, text and machine by menus and sliders -> memory, what fits, the largest batch.

    The model "own" opens sliders for layers, heads, key/value heads, head_dim and billions of parameters,
    which begin at the numbers of the model chosen before.
    """
    models, devices = _models(), _devices()
    if model not in models:
        raise ValueError(f"model={model!r} is unknown; choose one of {', '.join(models)}")

    def about(name: str) -> dict:
        # Each has a layout of its own: some are hidden while others are shown.
        layout = ipywidgets.Layout(width="345px")
        return {"description": name, "style": {"description_width": "115px"}, "layout": layout}

    def steps(name: str, options: Sequence[int], value: int, text=str) -> ipywidgets.SelectionSlider:
        pairs = [(text(option), option) for option in options]
        return ipywidgets.SelectionSlider(options=pairs, value=value, **about(name))

    bits = {"16 bits": 16, "8 bits": 8, "6 bits": 6, "4 bits": 4}
    controls = {
        "model": ipywidgets.Dropdown(options=[*models, OWN], value=model, **about("model")),
        "layers": ipywidgets.IntSlider(32, min=1, max=128, **about("layers")),
        "heads": steps("query heads", HEADS, 32),
        "kv_heads": steps("key/value heads", HEADS, 8),
        "head_dim": steps("head_dim", (32, 64, 96, 128, 192, 256), 128),
        "billions": ipywidgets.FloatLogSlider(
            8.0,
            base=10,
            min=-1,
            max=3,
            step=0.05,
            readout_format=".3g",
            **about("10⁹ parameters"),
        ),
        "context": steps("tokens of context", CONTEXTS, context, tokens_text),
        "batch": steps("texts (batch)", BATCHES, 1),
        "cache_bits": ipywidgets.Dropdown(options=bits, value=16, **about("cache")),
        "device": ipywidgets.Dropdown(options=list(devices), **about("device")),
        "gpus": steps("how many", GPUS, 8),
        "weight_bits": ipywidgets.Dropdown(options=bits, value=16, **about("weights")),
    }
    own = [controls[name] for name in ("layers", "heads", "kv_heads", "head_dim", "billions")]

    def follow(_change=None) -> None:
        """Show the sliders of one's own model, or keep them at the numbers of the one chosen."""
        chosen = controls["model"].value
        for control in own:
            control.layout.display = None if chosen == OWN else "none"
        if chosen != OWN:
            cfg = models[chosen]
            controls["layers"].value = cfg.num_hidden_layers
            controls["heads"].value = cfg.num_attention_heads
            controls["kv_heads"].value = cfg.kv_heads
            controls["head_dim"].value = cfg.baseline_head_dim
            controls["billions"].value = parameters(cfg).total / 1e9

    controls["model"].observe(follow, "value")
    follow()

    worked_out = lru_cache(maxsize=1)(plan)  # for the figure and its caption

    def draw(figure: Figure | None, **values) -> Figure:
        count = "" if values["gpus"] == 1 else f"{values['gpus']} x "
        return plan_figure(worked_out(**values), count + values["device"], figure)

    explorer = Explorer(draw, caption=lambda **values: plan_caption(worked_out(**values)), **controls)
    columns = (
        ["model", "layers", "heads", "kv_heads", "head_dim", "billions", "cache_bits", "weight_bits"],
        ["context", "batch", "device", "gpus"],
    )
    return in_columns(explorer, *columns)
