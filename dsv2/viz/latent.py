"""Chapter 02 in pictures: how short a vector can be that still holds the keys and values of all heads."""

# T tokens   H heads   C latent   R rotary key   N nope   V value

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from dsv2.accounting import kv_elements_per_token
from dsv2.config import DSV2Config
from dsv2.viz import style
from dsv2.viz.plots import visible
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, margins, new_axes, new_figure, style_axes
from dsv2.viz.widgets import Explorer

MOST_TOKENS = 24  # of a text in the attention maps: more would not be legible

# ----------------------------------------------------------------------------------------------- figures


def latent_sizes(cfg: DSV2Config, name: str = "") -> Figure:
    """One token in one layer of MLA: hidden state, what is cached of it, what is recovered; bars to scale."""
    heads, latent, rope = cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    keys, values = heads * cfg.qk_head_dim, heads * cfg.v_head_dim
    kept = [(latent, style.CACHED), (rope, style.PURPLE)]
    rows = [
        ("hidden state $h$", [(cfg.hidden_size, style.GREY)], f"{cfg.hidden_size:,}"),
        ("cached: $c$ and $k^R$", kept, f"{latent:,} + {rope:,} = {latent + rope:,}"),
        (
            "keys of all heads",
            [(keys, style.GREEN)],
            f"{heads} x ({cfg.qk_nope_head_dim} + {rope}) = {keys:,}",
        ),
        ("values of all heads", [(values, style.ORANGE)], f"{heads} x {cfg.v_head_dim} = {values:,}"),
    ]
    ax = new_axes(None, 10.0, 3.7, "x", left=2.3, right=0.3, bottom=0.8, top=0.6)
    widest = max(keys, values, cfg.hidden_size)
    for row, (_, parts, text) in enumerate(rows):
        begin = 0
        for width, colour in parts:
            ax.barh(row, width, left=begin, height=0.62, color=colour)
            begin += width
        inside = begin > 0.6 * widest
        ax.annotate(
            text,
            (begin, row),
            xytext=(-10 if inside else 8, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=SMALL,
            fontweight="bold",
            color=style.on(parts[-1][1]) if inside else style.ink(parts[0][1]),
        )
    ax.set_yticks(range(4), [title for title, _, _ in rows], fontsize=BASE)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, widest * 1.02)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    label(ax, "numbers", title=f"{name + ': ' if name else ''}one token in one layer")
    return finish(
        ax,
        f"{name + ': ' if name else ''}of a hidden state of {cfg.hidden_size:,} numbers, {latent + rope:,} "
        f"are cached; from them come keys of {keys:,} and values of {values:,} numbers, all heads together.",
    )


def rank_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    y: str = "error left (share of the size)",
    title: str = "",
    full: Mapping[str, float] | None = None,
    limits: tuple[float, float] | None = None,
    pairs: bool = False,
) -> Figure:
    """What is lost against how many numbers are kept: a line for each name, (ranks, values).

    full: horizontal lines by name, such as the loss of the whole model. limits: of the vertical axis. pairs:
    every two curves share a colour, the second is dashed.
    """
    if not curves:
        raise ValueError("curves is empty; give at least one name with its ranks and values")
    ax = new_axes(None, 10.0, 4.9, left=0.95, right=3.1, bottom=0.8, top=0.6 if title else 0.25)
    colours = (style.CACHED, style.VERMILLION, style.GREY, style.GREEN, style.PURPLE)
    said = []
    for i, (name, (ranks, values)) in enumerate(curves.items()):
        ax.plot(
            ranks,
            values,
            color=colours[(i // 2 if pairs else i) % len(colours)],
            linestyle=(0, (3, 1.5)) if pairs and i % 2 else "-",
            linewidth=LINE + (i == 0),
            marker="o" if len(ranks) < 15 else None,
            markersize=8,
            label=name,
            zorder=5 - i,
        )
        middle = len(ranks) // 2
        said.append(f"{name.replace(chr(10), ' ')} {values[middle]:.2f} at {ranks[middle]:g}")
    for name, value in (full or {}).items():
        ax.axhline(value, color=INK, linewidth=2, linestyle=(0, (4, 3)), label=name)
        said.append(f"{name} {value:.2f}")
    ax.set_xlim(0, max(max(ranks) for ranks, _ in curves.values()))
    if limits is not None:
        ax.set_ylim(*limits)
    else:
        ax.set_ylim(bottom=0)
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=SMALL, labelspacing=1.0)
    label(ax, "rank: numbers kept of a token", y, title or None)
    return finish(ax, f"{title or y}, by rank: {'; '.join(said)}.")


def loss_against_cache(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation loss against the numbers cached for a token, a point for each run, joined between seeds.

    runs: as in `data/runs/attention.json`, each with `name`, `model` (a `DSV2Config`'s fields) and `metrics`.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        cfg = DSV2Config.from_dict(dict(run["model"]))
        losses = [m["val_nats_per_byte"] for m in run["metrics"] if "val_nats_per_byte" in m]
        if not losses:
            raise ValueError(f"run {run['name']!r} has no val_nats_per_byte in its metrics")
        points.setdefault(_attention_name(cfg), []).append((kv_elements_per_token(cfg), losses[-1]))
    ax = new_axes(None, 10.0, 5.0, left=1.0, right=0.5, bottom=0.8, top=0.3)
    said = []
    for name, found in points.items():
        colour = style.colour_of(name)
        x, losses = found[0][0], sorted(loss for _, loss in found)
        ax.plot([x] * len(losses), losses, color=colour, linewidth=LINE, zorder=2)
        ax.plot([x] * len(losses), losses, "o", color=colour, markersize=13, zorder=3, label=name)
        said.append(f"{name} {x:,}: " + " and ".join(f"{loss:.3f}" for loss in losses))
    ax.set_xscale("log", base=2)
    sizes = sorted({found[0][0] for found in points.values()})
    ax.set_xlim(sizes[0] * 0.8, sizes[-1] * 2.1)
    ticks = [2**power for power in range(4, 16) if sizes[0] * 0.6 < 2**power < sizes[-1] * 1.6]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    every = [loss for found in points.values() for _, loss in found]
    room = 0.14 * (max(every) - min(every)) or 0.05
    ax.set_ylim(min(every) - room, max(every) + room)
    _label_points(ax, points)
    label(ax, "numbers cached for a token, all layers (each step: twice)", "validation loss (nats per byte)")
    return finish(ax, f"Validation loss by numbers cached for a token. {'; '.join(said)}.")


def _label_points(ax: Axes, points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Each name beside its points, on the first side where it covers no point and no other name."""
    pixel = 72 / ax.figure.dpi
    frame = ax.bbox.extents * pixel
    places = {
        name: [ax.transData.transform(point) * pixel for point in found] for name, found in points.items()
    }
    taken = [(x - 9, y - 9, x + 9, y + 9) for found in places.values() for x, y in found]
    for name, found in places.items():
        text = name + (f", {len(found)} seeds" if len(found) > 1 else "")
        wide, high = 0.66 * BASE * len(text), 1.3 * BASE
        (x, low), top = min(found, key=lambda place: place[1]), max(y for _, y in found)
        sides = {
            ("left", "center"): (x + 14, (low + top) / 2),
            ("right", "center"): (x - 14, (low + top) / 2),
            ("center", "bottom"): (x, top + 12),
            ("center", "top"): (x, low - 12),
            ("left", "bottom"): (x - 9, top + 12),
            ("left", "top"): (x - 9, low - 12),
        }
        for (ha, va), (at_x, at_y) in sides.items():
            left = at_x - {"left": 0, "center": wide / 2, "right": wide}[ha]
            under = at_y - {"bottom": 0, "center": high / 2, "top": high}[va]
            box = (left, under, left + wide, under + high)
            inside = left > frame[0] and left + wide < frame[2]
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        shown = ax.transAxes.inverted().transform((at_x / pixel, at_y / pixel))
        look = {"fontsize": BASE, "fontweight": "bold", "color": style.ink(style.colour_of(name))}
        ax.annotate(text, shown, xycoords="axes fraction", ha=ha, va=va, **look)


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return bool(one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])


def _attention_name(cfg: DSV2Config) -> str:
    if cfg.attention == "mla":
        return f"MLA, rank {cfg.kv_lora_rank}"
    if cfg.attention == "gqa":
        return f"GQA, {cfg.kv_heads} groups"
    return cfg.attention.upper()


# ------------------------------------------------------------------------------------- a model's own latents


@dataclass(frozen=True)
class LayerReading:
    """What one MLA layer makes of a text: latents, rotary key and queries, of one sequence."""

    latent: Float[Tensor, "T C"]
    k_rope: Float[Tensor, "T R"]
    q_nope: Float[Tensor, "T H N"]
    q_rope: Float[Tensor, "T H R"]


def read_layers(model: torch.nn.Module, tokens: Tensor) -> list[LayerReading]:
    """Every layer's latents, rotary keys and queries of one text; tokens: (1, T)."""
    found: list[LayerReading] = []

    def listen(attention: Any, inputs: tuple) -> None:
        x, span = inputs
        latent, k_rope = attention.compress(x, span)
        q_nope, q_rope = attention.queries(x, span)
        found.append(LayerReading(latent[0], k_rope[0], q_nope[0], q_rope[0]))

    hooks = [block.attention.register_forward_pre_hook(listen) for block in model.layers]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@dataclass(frozen=True)
class Directions:
    """The best directions for a layer's keys and values of all heads, most important first.

    directions: (C, H (N + V)), orthonormal rows; sizes: (C,) the singular values.
    """

    directions: Float[Tensor, "C stacked"]
    sizes: Float[Tensor, " C"]

    def error(self, rank: int) -> float:
        """The size of what `rank` numbers lose, as a share of the size of all keys and values."""
        squares = self.sizes.double().square()
        return float((squares[rank:].sum() / squares.sum()).sqrt())


def best_directions(
    latent: Float[Tensor, "T C"], w_uk: Float[Tensor, "H N C"], w_uv: Float[Tensor, "H V C"]
) -> Directions:
    """Singular value decomposition of keys and values, stacked side by side, over the tokens of a text."""
    stacked = latent @ torch.cat([w_uk.flatten(0, 1), w_uv.flatten(0, 1)]).mT
    # The matrix is tall: the decomposition of its R factor has the same sizes and directions, at less cost.
    _, sizes, directions = torch.linalg.svd(torch.linalg.qr(stacked.double())[1], full_matrices=False)
    count = min(latent.shape[-1], len(sizes))  # the rest is zero: keys and values come from C numbers
    return Directions(directions[:count].to(latent.dtype), sizes[:count].to(latent.dtype))


def attention_from_rank(
    reading: LayerReading,
    w_uk: Float[Tensor, "H N C"],
    w_uv: Float[Tensor, "H V C"],
    best: Directions,
    rank: int,
    head: int,
    scale: float,
) -> Float[Tensor, "T T"]:
    """One head's causal attention when keys are rebuilt from the `rank` best numbers; k^R stays as it is."""
    heads, nope = w_uk.shape[:2]
    weights = torch.cat([w_uk.flatten(0, 1), w_uv.flatten(0, 1)])
    kept = best.directions[:rank]
    numbers = reading.latent @ weights.mT @ kept.mT  # (T, rank): what would be cached
    keys = numbers @ kept[:, head * nope : (head + 1) * nope]
    scores = scale * (reading.q_nope[:, head] @ keys.mT + reading.q_rope[:, head] @ reading.k_rope.mT)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)


# ------------------------------------------------------------------------------------------------ explorer


def latent_explorer(
    model: torch.nn.Module, text: str, shown: str = "12 + 30 = 42\n7 + 8 = 15\n", dpi: int = 90
) -> Explorer:
    """Drag the rank of the latent -> numbers cached, error of keys and values, attention of a head.

    text: what errors are measured on, and directions chosen by; shown: at most 24 tokens, whose attention is
    drawn. The model has MLA in every layer. Everything heavy happens once, before the first picture.
    """
    tokens, short = model.tokenizer.encode(text), model.tokenizer.encode(shown)
    if not 2 <= len(short) <= MOST_TOKENS:
        raise ValueError(f"shown={shown!r} has {len(short)} tokens; 2 to {MOST_TOKENS} are legible")
    cfg = model.cfg
    layers = [block.attention for block in model.layers]
    weights = [(layer.w_uk.detach(), layer.w_uv.detach()) for layer in layers]
    device = weights[0][0].device
    long_readings = read_layers(model, torch.tensor([tokens], device=device))
    best = [best_directions(reading.latent, *w) for reading, w in zip(long_readings, weights)]
    readings = read_layers(model, torch.tensor([short], device=device))
    letters = [visible(model.tokenizer.decode([token])) for token in short]
    most, rope = cfg.kv_lora_rank, cfg.qk_rope_head_dim
    errors = [[directions.error(rank) for rank in range(most + 1)] for directions in best]

    def attention(layer: int, head: int, rank: int) -> np.ndarray:
        args = readings[layer], *weights[layer], best[layer], rank, head, layers[layer].scale
        return attention_from_rank(*args).cpu().numpy()

    def draw(layer: int, head: int, rank: int, figure: Figure | None = None) -> Figure:
        full, lower = attention(layer, head, most), attention(layer, head, rank)
        if figure is None:
            figure = _explorer_figure(letters, cfg, errors[layer])
        whole, rebuilt, curve, bars = figure.axes
        whole.images[0].set_data(full)
        rebuilt.images[0].set_data(lower)
        rebuilt.set_title(f"rebuilt from {rank} numbers", fontsize=BASE, color=INK, loc="left", pad=8, y=1.0)
        whole.set_title(
            f"layer {layer}, head {head}: as it is", fontsize=BASE, color=INK, loc="left", pad=8, y=1.0
        )
        line, dot = curve.lines
        line.set_ydata(errors[layer])
        dot.set_data([rank], [errors[layer][rank]])
        bars.patches[2].set_width(rank)
        bars.patches[3].set_x(rank)
        mha = 2 * cfg.num_attention_heads * cfg.baseline_head_dim
        count = rank + rope
        bars.texts[2].set_text(f"{rank} + {rope} = {count}, MHA / {mha / count:.1f}")
        bars.texts[2].xy = (rank + rope, 2)
        moved = float(np.abs(full - lower).sum(axis=1).mean() / 2)
        return finish(
            figure,
            f"Layer {layer}, head {head}, rank {rank} of {most}: {rank + rope} numbers cached for a token "
            f"and layer; keys and values are off by {errors[layer][rank]:.0%} of their size; "
            f"{moved:.0%} of this head's attention goes to other tokens than before.",
        )

    def caption(layer: int, head: int, rank: int) -> str:
        moved = np.abs(attention(layer, head, most) - attention(layer, head, rank)).sum(axis=1).mean() / 2
        return (
            '<div style="font-size:15px;max-width:900px">'
            f"With <b>{rank}</b> of {most} numbers, keys and values are off by "
            f"<b>{errors[layer][rank]:.0%}</b> of their size, and <b>{moved:.0%}</b> of this head's "
            "attention goes to other tokens than before.</div>"
        )

    about = {"style": {"description_width": "60px"}, "layout": ipywidgets.Layout(width="420px")}
    explorer = Explorer(
        draw,
        caption=caption,
        dpi=dpi,
        rank=ipywidgets.IntSlider(min(4, most), min=1, max=most, description="rank", **about),
        layer=ipywidgets.IntSlider(
            len(layers) // 2, min=0, max=len(layers) - 1, description="layer", **about
        ),
        head=ipywidgets.IntSlider(0, min=0, max=cfg.num_attention_heads - 1, description="head", **about),
    )
    return explorer


def _explorer_figure(letters: Sequence[str], cfg: DSV2Config, errors: Sequence[float]) -> Figure:
    """Two attention maps above, error and cache below; `draw` of the explorer moves what changes."""
    figure = new_figure(10.0, 8.2)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.15, 1), width_ratios=(1, 1))
    margins(figure, left=0.95, right=0.35, bottom=0.75, top=0.5, wspace=0.22, hspace=0.36)
    whole, rebuilt = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    blank = np.zeros((len(letters), len(letters)))
    for axes in (whole, rebuilt):
        style_axes(axes, None)
        # The root brings out weights of a few percent, of which most of the attention consists.
        axes.imshow(blank, cmap="Blues", norm=style.colors.PowerNorm(0.5, 0, 1), aspect="auto")
        axes.set_xticks(range(len(letters)), letters, fontfamily="monospace", fontsize=SMALL)
        axes.set_yticks(range(len(letters)), letters, fontfamily="monospace", fontsize=SMALL)
        axes.tick_params(length=0, pad=2)
        label(axes, "looked at", "token" if axes is whole else None)
        # Fixed places: to find them, every update would measure all letters.
        axes.xaxis.set_label_coords(0.5, -0.075)
        axes.yaxis.set_label_coords(-0.065, 0.5)
    most, rope = cfg.kv_lora_rank, cfg.qk_rope_head_dim

    curve = style_axes(figure.add_subplot(grid[1, 0]))
    curve.plot(range(most + 1), errors, color=style.CACHED, linewidth=LINE)
    curve.plot([0], [0], "o", color=style.VERMILLION, markersize=12, clip_on=False, zorder=5)
    curve.set_xlim(0, most)
    curve.set_ylim(0, 1.03)
    curve.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    label(curve, "rank", "error left")

    bars = style_axes(figure.add_subplot(grid[1, 1]), "x")
    mha = 2 * cfg.num_attention_heads * cfg.baseline_head_dim
    bars.barh(0, mha, height=0.62, color=style.colour_of("MHA"))
    bars.barh(1, most + rope, height=0.62, color=style.tint(style.CACHED, 0.55))
    bars.barh(2, most, height=0.62, color=style.CACHED)
    bars.barh(2, rope, left=most, height=0.62, color=style.PURPLE)
    texts = (
        (mha, 0, f"MHA: {mha}", True),
        (most + rope, 1, f"MLA as it is: {most} + {rope} = {most + rope}", False),
        (most + rope, 2, "", False),
    )
    for x, y, text, inside in texts:
        bars.annotate(
            text,
            (x, y),
            xytext=(-8 if inside else 8, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=SMALL,
            color=style.PAPER if inside else style.ink(style.CACHED),
            annotation_clip=False,
        )
    bars.set_yticks([])
    bars.set_ylim(2.5, -0.5)
    bars.set_xlim(0, mha)
    label(bars, "numbers cached for a token and layer")
    return figure
