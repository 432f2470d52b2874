"""Figures from numbers and tensors: each function draws one, on a new figure or on the axes given as `ax`.

Nothing is shown and no global state is touched: the last line of a notebook cell displays the figure that it
returns, `dsv2.viz.save` writes it, `dsv2.viz.describe` puts it into words.
"""

# T tokens   E routed experts   K experts per token   G devices

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv2.accounting import attention_twin, kv_bytes_per_token
from dsv2.config import DSV2Config
from dsv2.moe.routing import Routing
from dsv2.viz import style
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, new_axes, new_figure

UNITS = ("B", "KB", "MB", "GB", "TB", "PB")  # powers of 1,000, as on a GPU's data sheet and in the paper
DEVICE_GAP = 0.5  # between the experts of two devices, in widths of an expert

# ---------------------------------------------------------------------------------------------- the cache


def human_bytes(n: float | int) -> str:
    """A number of bytes with three digits and a unit: 69120 -> "69.1 KB"."""
    power = _unit(n)
    if float(f"{n / 1000**power:.3g}") >= 1000 and power + 1 < len(UNITS):
        power += 1
    return f"{float(f'{n / 1000**power:.3g}'):,g} {UNITS[power]}"


def _unit(n: float | int) -> int:
    """The power of 1,000 that leaves at least one digit before the point."""
    power = 0
    while n >= 1000 ** (power + 1) and power + 1 < len(UNITS):
        power += 1
    return power


def cache_bytes_per_token(cfg: DSV2Config, dtype: Any = "bfloat16") -> dict[str, float]:
    """What this model keeps of a token with MLA, and what it would keep with MHA, all layers (table 1).

    dtype: of the cache, as in `dsv2.accounting.kv_bytes_per_token`. DeepSeek-V2, section 2.1.4.
    """
    return {name.upper(): kv_bytes_per_token(attention_twin(cfg, name), dtype) for name in ("mha", "mla")}


def cache_growth(
    tokens: int | Sequence[int] | np.ndarray,
    per_token_bytes: Mapping[str, float | int],
    *,
    until: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Bytes held by each kind of cache as tokens are generated, one line each, labelled at its end.

    tokens: how many are cached now (lines run from 0 to there), or the counts to draw. per_token_bytes: bytes
    per cached token by name, e.g. {"MHA": 81920, "MLA": 800}. until: the token at which the horizontal axis
    ends, so that the axes hold still while a text grows; None: at the last of `tokens`.
    """
    counts = np.asarray(tokens, dtype=float)
    counts = np.array([0.0, float(counts)]) if counts.ndim == 0 else counts
    _require_names(per_token_bytes, "per_token_bytes")
    if counts.size == 0 or counts.min() < 0:
        raise ValueError(f"tokens must be counts of at least 0, at least one of them; got {tokens!r}")
    end = max(float(counts.max() if until is None else until), 1.0)
    top = max(max(per_token_bytes.values()) * end, 1.0)
    power = _unit(top)
    scale = 1000.0**power

    ax = new_axes(ax, 9.0, 4.6, left=1.0, right=2.85, bottom=0.8, top=0.3)
    ax.set_xlim(0, end)
    ax.set_ylim(0, top / scale * 1.06)
    heights = []
    for i, (name, each) in enumerate(per_token_bytes.items()):
        held = counts * each / scale
        colour = style.colour_of(name, i)
        # Drawn past the frame, a line lying on the axis keeps its full width.
        ax.plot(
            counts, held, color=colour, linewidth=LINE + (name.startswith("MLA")), label=name, zorder=3 + i
        )
        ax.plot(counts[-1:], held[-1:], "o", color=colour, markersize=9, clip_on=False, zorder=9)
        heights.append(held[-1])
    places = _spread(heights, 1.06 * top / scale * _line_height(ax))
    for i, name in enumerate(per_token_bytes):
        ax.annotate(
            f"{name}  {_with_ratio(name, per_token_bytes, counts[-1], _reference(None, per_token_bytes))}",
            (counts[-1], places[i]),
            xytext=(12, 0),
            textcoords="offset points",
            va="center",
            fontsize=BASE,
            fontweight="bold",
            color=style.ink(style.colour_of(name, i)),
            annotation_clip=False,
        )
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    label(ax, "tokens in the cache", f"cache of one sequence ({UNITS[power]})")
    held = ", ".join(f"{name} {human_bytes(counts[-1] * each)}" for name, each in per_token_bytes.items())
    return finish(ax, f"Bytes cached as tokens are generated; at {counts[-1]:,.0f} tokens: {held}.")


def cache_bars(
    tokens: int,
    per_token_bytes: Mapping[str, float | int],
    *,
    reference: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Bytes held at `tokens` tokens, a bar each: "MLA  1.9 MB", "MHA  6.1 MB, 3.2x".

    per_token_bytes: as in `cache_growth`. reference: what the ratios are taken against; None: "MLA" if it is
    there, the smallest otherwise.
    """
    _require_names(per_token_bytes, "per_token_bytes")
    reference = _reference(reference, per_token_bytes)
    held = {name: tokens * each for name, each in per_token_bytes.items()}
    largest = max(*held.values(), 1.0)
    power = _unit(largest)

    ax = new_axes(ax, 9.0, 1.4 + 0.62 * len(held), "x", left=1.5, right=0.4, bottom=0.8, top=0.55)
    for row, (name, amount) in enumerate(held.items()):
        colour = style.colour_of(name, row)
        ax.barh(row, amount / 1000**power, height=0.66, color=colour)
        ax.annotate(
            _with_ratio(name, per_token_bytes, tokens, reference),
            (amount / 1000**power, row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=BASE,
            fontweight="bold",
            color=style.ink(colour),
        )
    ax.set_yticks(range(len(held)), list(held), fontsize=BASE)
    ax.invert_yaxis()
    ax.set_xlim(0, largest / 1000**power * 1.42)  # room for the longest bar's label
    label(ax, f"cache of one sequence ({UNITS[power]})", title=f"{tokens:,} cached tokens")
    ax.tick_params(axis="y", length=0)
    said = ", ".join(f"{name} {human_bytes(amount)}" for name, amount in held.items())
    return finish(ax, f"Cache of one sequence of {tokens:,} tokens: {said}.")


def _reference(name: str | None, per_token_bytes: Mapping[str, float | int]) -> str:
    """What ratios are taken against: `name`, or MLA, or the smallest."""
    if name is None:
        name = "MLA" if "MLA" in per_token_bytes else min(per_token_bytes, key=per_token_bytes.get)
    if name not in per_token_bytes:
        raise ValueError(f"reference={name!r} is not one of {', '.join(per_token_bytes)}")
    return name


def _with_ratio(
    name: str, per_token_bytes: Mapping[str, float | int], tokens: float | int, reference: str
) -> str:
    """ "6.1 MB, 3.2x"; the reference itself has no ratio."""
    text = human_bytes(tokens * per_token_bytes[name])
    if name == reference or per_token_bytes[reference] <= 0:
        return text
    return f"{text}, {_ratio(per_token_bytes[name] / per_token_bytes[reference])}"


def _ratio(value: float) -> str:
    return f"{value:.2g}x" if value < 1 else f"{value:.1f}x" if value < 99.95 else f"{value:,.0f}x"


def _line_height(ax: Axes) -> float:
    """Height of a line of BASE text, as a fraction of the axes."""
    inches = ax.get_position().height * ax.figure.get_size_inches()[1]
    return 1.35 * BASE / 72 / inches


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, moved up where two would stand closer than `gap`; their order stays."""
    placed, last = [0.0] * len(heights), -np.inf
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        last = placed[i] = max(heights[i], last + gap)
    return placed


def _require_names(mapping: Mapping[str, Any], argument: str) -> None:
    if not mapping:
        raise ValueError(f"{argument} is empty; give at least one name and its number")


# ---------------------------------------------------------------------------------------------- experts


def visible(text: str) -> str:
    """A token's text with nothing invisible in it: space as ·, newline as ⏎, tab as ⇥, others escaped.

    Characters that the figures' font does not have are escaped too ("\\u4e2d"). An empty text, a token that
    finished no character, becomes ∅.
    """
    known = {" ": "·", "\n": "⏎", "\t": "⇥"}
    drawn = [known.get(c) or (c if c.isprintable() and ord(c) in _glyphs() else ascii(c)[1:-1]) for c in text]
    return "".join(drawn) or "∅"


@functools.cache
def _glyphs() -> frozenset[int]:
    """The characters that the fonts of titles and of token labels both have."""
    paths = (font_manager.findfont(name) for name in ("DejaVu Sans", "DejaVu Sans Mono"))
    sans, mono = (frozenset(font_manager.get_font(path).get_charmap()) for path in paths)
    return sans & mono


def expert_heatmap(
    routings: Sequence[Routing],
    tokens_text: Sequence[str],
    layer: int | None = None,
    *,
    cfg: DSV2Config | None = None,
    sequence: int = 0,
    ax: Axes | None = None,
) -> Figure:
    """Which experts each token chose: tokens from left to right, experts downwards in groups of a device.

    routings: one per layer of experts, all over the same tokens. tokens_text: (T,) text of each token, shown
    with `visible`. layer: which of `routings`; None: all, the first on top. cfg: for the devices and
    the model's layer numbers; without it there is one device and layers count from 0. sequence: which one of
    the batch. Colour: the weight of a chosen expert; pale: not chosen; a cross: dropped.
    """
    names = _layer_names(routings, cfg)
    shown = list(range(len(routings))) if layer is None else [_layer_index(layer, routings)]
    tokens, experts = len(tokens_text), routings[0].n_experts
    if any(routing.expert_ids.shape[1] != tokens for routing in routings):
        raise ValueError(
            f"tokens_text has {tokens} texts, but the routings are over "
            f"{routings[0].expert_ids.shape[1]} tokens"
        )
    devices = cfg.n_group if cfg else 1
    edges, columns = _device_edges(experts, devices)
    span = edges[-1] + (2 * DEVICE_GAP if len(shown) > 1 else 0)  # of one layer, with the space above it

    width = min(max(2.6 + 0.24 * tokens, 6.5), 15.0)
    ax = new_axes(
        ax,
        width,
        1.6 + min(max(3.2, 0.085 * span * len(shown)), 9.0),
        None,
        left=1.3,
        right=1.25,
        bottom=1.0,
        top=0.55,
    )
    cell = ax.get_position().height * ax.figure.get_size_inches()[1] * 72 / (span * len(shown))  # in points
    grids = [_weights(routings[i], sequence, columns, len(edges) - 1) for i in shown]
    top = max(float(grid.max()) for grid in grids)
    norm = Normalize(0, top if top > 0 else 1.0)
    for row, (i, grid) in enumerate(zip(shown, grids)):
        mesh = ax.pcolormesh(
            np.arange(tokens + 1) - 0.5,
            edges + row * span,
            grid.T,
            cmap=style.GLOW,
            norm=norm,
            edgecolors=style.PAPER,
            linewidth=min(1.0, 0.1 * cell),
        )
        mesh.set_gid(f"weights of layer {names[i]}")
        _cross_dropped(ax, routings[i], sequence, edges[columns] + 0.5 + row * span)
    centres = edges[columns] + 0.5
    if len(shown) == 1:
        groups = centres.reshape(devices, -1).mean(axis=1)
        ax.set_yticks(groups, _device_names(devices) if devices > 1 else [""], fontsize=SMALL)
        if devices == 1:
            ax.set_yticks(centres[:: max(1, experts // 8)], range(0, experts, max(1, experts // 8)))
        what = "expert, by device" if devices > 1 else "expert (number)"
        label(ax, "token", what, f"Experts chosen in layer {names[shown[0]]}")
    else:
        middle = [row * span + edges[-1] / 2 for row in range(len(shown))]
        ax.set_yticks(middle, [str(names[i]) for i in shown], fontsize=SMALL)
        what = f"{experts} experts on {devices} devices" if devices > 1 else f"{experts} experts"
        label(ax, "token", f"layer ({what} in each)", "Experts chosen in every layer")
    ax.set_ylim(len(shown) * span - (span - edges[-1]), 0)
    ax.tick_params(axis="both", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    _token_ticks(ax, tokens_text)
    _weight_bar(ax, norm)
    k = routings[0].expert_ids.shape[-1]
    alt = (
        f"Experts chosen by {tokens} tokens in "
        + ("every layer of experts" if layer is None else f"layer {names[shown[0]]}")
        + f": {k} of {experts} each"
        + (f", on {devices} devices." if devices > 1 else ".")
    )
    return finish(ax, alt)


def expert_lights(
    routing_of_one_token: Sequence[Routing],
    cfg: DSV2Config,
    *,
    text: str | None = None,
    brightest: float | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The experts at work for one token: a row for each layer of experts, the first on top, chosen ones lit.

    routing_of_one_token: one `Routing` per layer, of a single token; of longer ones the last token of the
    first sequence is shown. text: the token's text for the title. brightest: the weight of the strongest
    colour, to keep colours comparable from token to token; None: this token's largest weight.
    """
    names = _layer_names(routing_of_one_token, cfg)
    edges, columns = _device_edges(cfg.n_routed_experts, cfg.n_group)
    if routing_of_one_token[0].n_experts != cfg.n_routed_experts:
        raise ValueError(
            f"the routing is over {routing_of_one_token[0].n_experts} experts, but "
            f"cfg.n_routed_experts={cfg.n_routed_experts}"
        )
    rows = [_weights(routing, 0, columns, len(edges) - 1)[-1] for routing in routing_of_one_token]
    grid = np.ma.stack(rows)
    layers = len(names)

    height = 1.55 + min(max(0.48 * layers, 1.6), 6.0)
    ax = new_axes(ax, 9.0, height, None, left=0.95, right=1.25, bottom=0.8, top=0.6)
    top = float(grid.max()) if brightest is None else brightest
    norm = Normalize(0, top if top > 0 else 1.0)
    mesh = ax.pcolormesh(
        edges,
        np.arange(layers + 1) - 0.5,
        grid,
        cmap=style.GLOW,
        norm=norm,
        edgecolors=style.PAPER,
        linewidth=2.5 if grid.size < 1500 else 0.6,
    )
    mesh.set_gid("weights")
    ax.invert_yaxis()
    step = -(-layers // 14)
    ax.set_yticks(range(0, layers, step), [str(name) for name in names[::step]], fontsize=SMALL)
    groups = (edges[columns] + 0.5).reshape(cfg.n_group, -1).mean(axis=1)
    if cfg.n_group > 1:
        ax.set_xticks(groups, _device_names(cfg.n_group), fontsize=SMALL)
    else:
        step = max(1, cfg.n_routed_experts // 8)
        ax.set_xticks((edges[columns] + 0.5)[::step], range(0, cfg.n_routed_experts, step))
    ax.tick_params(axis="both", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    each = f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts} experts at work"
    where = "routed expert, by device" if cfg.n_group > 1 else "routed expert (number)"
    label(ax, where, "layer", each if text is None else f"{each} for  {visible(text)}")
    _weight_bar(ax, norm)
    chosen = "; ".join(
        f"layer {name}: {', '.join(str(e) for e in sorted(routing.expert_ids[0, -1].tolist()))}"
        for name, routing in zip(names, routing_of_one_token)
    )
    return finish(ax, f"Experts at work for one token. {chosen}.")


def expert_load(
    routings: Routing | Sequence[Routing],
    *,
    cfg: DSV2Config | None = None,
    layer: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """How the choices of all tokens spread over the experts, in percent, beside the fair share (a line).

    routings: of one layer, or of several: a panel each, at most 8, or the one chosen by `layer` (an index
    into `routings`). cfg: for the devices and layer numbers, as in `expert_heatmap`. `ax` takes one layer.
    """
    routings = [routings] if isinstance(routings, Routing) else list(routings)
    names = _layer_names(routings, cfg, exact=False)
    shown = list(range(len(routings))) if layer is None else [_layer_index(layer, routings)]
    if len(shown) > (8 if ax is None else 1):
        raise ValueError(
            f"routings has {len(shown)} layers, more than fit {'a figure' if ax is None else 'on one ax'}; "
            "choose one with layer="
        )
    devices, experts = (cfg.n_group if cfg else 1), routings[0].n_experts
    edges, columns = _device_edges(experts, devices)
    centres = edges[columns] + 0.5
    if ax is None:
        figure = new_figure(9.0, 1.5 + (2.6 if len(shown) == 1 else 1.45 * len(shown)))
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        style.margins(figure, left=1.0, right=0.3, bottom=0.8, top=0.6, hspace=0.5)
    else:
        panels = [ax]
    fair, said = 100 / experts, []
    for panel, i in zip(panels, shown):
        style.style_axes(panel)
        counts = routings[i].load().cpu().numpy()
        share = 100 * counts / max(counts.sum(), 1)
        # Both colours and heights tell who carries more than the fair share.
        colours = [style.ACTIVE if s > fair else style.ORANGE for s in share]
        panel.bar(centres, share, width=0.82, color=colours)
        panel.axhline(fair, color=INK, linewidth=2.5, linestyle=(0, (4, 2)), label="fair share")
        panel.set_ylim(0, max(share.max(), fair) * 1.3)
        panel.set_xlim(edges[0] - 0.3, edges[-1] + 0.3)
        busiest = share.max() / fair
        title = f"layer {names[i]}: the busiest expert has {busiest:.1f}x the fair share"
        panel.set_title(title, fontsize=BASE if len(shown) == 1 else SMALL, color=INK, loc="left", pad=4)
        panel.yaxis.set_major_locator(MaxNLocator(3))
        said.append(f"layer {names[i]} {busiest:.1f}x")
    for panel in panels:
        panel.set_ylabel("choices (%)", fontsize=BASE if len(shown) < 3 else SMALL, color=INK)
    last = panels[-1]
    if devices > 1:
        last.set_xticks(centres.reshape(devices, -1).mean(axis=1), _device_names(devices), fontsize=SMALL)
    else:
        last.set_xticks(centres[:: max(1, experts // 8)], range(0, experts, max(1, experts // 8)))
    last.annotate(
        f"dashed: fair share, {fair:.3g} %",
        (1, 0),
        xycoords="axes fraction",
        xytext=(0, -38),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=SMALL,
        color=INK,
    )
    label(last, "routed expert, by device" if devices > 1 else "routed expert (number)")
    last.xaxis.label.set_horizontalalignment("left")
    last.xaxis.label.set_x(0.0)
    return finish(last, f"Load of {experts} experts; busiest against the fair share: {', '.join(said)}.")


def expert_preferences(
    routing: Routing,
    groups: Sequence[str],
    *,
    cfg: DSV2Config | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Which experts are asked about which kind of token: a row for each kind, a column for each expert.

    routing: of one layer, over (1, T). groups: (T,) the kind of each token; rows stand in order of first
    appearance, with their number of tokens. A cell is the share of that kind's choices which fell on the
    expert, over the fair share 1/E: 1 for a router that does not care, E/K for an expert that every token of
    the kind chose. Ratios of at least 2 are written out. cfg: for the devices.
    """
    ids = routing.expert_ids.flatten(0, 1).cpu().numpy()
    if len(groups) != len(ids):
        raise ValueError(f"groups names {len(groups)} tokens, but routing is over {len(ids)}")
    experts, k = routing.n_experts, ids.shape[1]
    names, kinds = list(dict.fromkeys(groups)), np.asarray(groups)
    counts = np.stack([np.bincount(ids[kinds == name].ravel(), minlength=experts) for name in names])
    ratios = counts * experts / counts.sum(axis=1, keepdims=True)
    devices = cfg.n_group if cfg else 1
    edges, columns = _device_edges(experts, devices)
    grid = np.ma.array(np.zeros((len(names), len(edges) - 1)), mask=True)
    grid[:, columns] = ratios

    ax = new_axes(ax, 10.0, 1.6 + 0.46 * len(names), None, left=2.0, right=1.25, bottom=0.85, top=0.5)
    norm = Normalize(1.0, max(4.0, float(ratios.max())))
    mesh = ax.pcolormesh(
        edges,
        np.arange(len(names) + 1) - 0.5,
        grid,
        cmap=style.GLOW,
        norm=norm,
        edgecolors=style.PAPER,
        linewidth=1.5,
    )
    mesh.set_gid("preferences")
    centres = edges[columns] + 0.5
    for row, expert in zip(*np.nonzero(ratios >= 2)):
        colour = style.on(style.GLOW(norm(ratios[row, expert])))
        ax.text(
            centres[expert],
            row,
            f"{ratios[row, expert]:.1f}",
            ha="center",
            va="center",
            fontsize=SMALL,
            color=colour,
        )
    ax.set_yticks(
        range(len(names)), [f"{n} ({(kinds == n).sum():,})" for n in names], fontsize=SMALL, parse_math=False
    )
    if devices > 1:
        ax.set_xticks(centres.reshape(devices, -1).mean(axis=1), _device_names(devices), fontsize=SMALL)
    else:
        ax.set_xticks(centres[:: max(1, experts // 8)], range(0, experts, max(1, experts // 8)))
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="both", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    label(ax, "routed expert, by device" if devices > 1 else "routed expert (number)", None, title)
    _weight_bar(ax, norm, "times the fair share\n(grey: less)")
    favourites = [f"{name}: expert {row.argmax()}, {row.max():.1f}x" for name, row in zip(names, ratios)]
    return finish(
        ax,
        f"Choices of {k} of {experts} experts against the fair share, by kind of token. "
        f"{'; '.join(favourites)}.",
    )


def join_routings(pieces: Sequence[Sequence[Routing]]) -> list[Routing]:
    """One `Routing` per layer over the tokens of all `pieces`, such as the steps of a stream."""
    if not pieces:
        raise ValueError("pieces is empty; give the routings of at least one step")
    joined = []
    for layer in zip(*pieces):
        kept = None if layer[0].kept is None else torch.cat([r.kept for r in layer], dim=1)
        ids, weights, scores = (
            torch.cat([getattr(r, name) for r in layer], dim=1)
            for name in ("expert_ids", "weights", "scores")
        )
        joined.append(Routing(ids, weights, scores, kept))
    return joined


def last_token(routings: Sequence[Routing]) -> list[Routing]:
    """The routings of the last token alone, detached, on the CPU."""
    return [
        Routing(
            *(
                None if t is None else t[:, -1:].detach().cpu()
                for t in (r.expert_ids, r.weights, r.scores, r.kept)
            )
        )
        for r in routings
    ]


def _layer_names(routings: Sequence[Routing], cfg: DSV2Config | None, exact: bool = True) -> list[int]:
    """The model's number of each layer of experts."""
    if len(routings) == 0:
        raise ValueError("routings is empty; give one Routing per layer of experts")
    if cfg is None:
        return list(range(len(routings)))
    if len(routings) != len(cfg.moe_layers):
        if exact:
            raise ValueError(
                f"routings has {len(routings)} layers, but cfg has {len(cfg.moe_layers)} layers of experts"
            )
        return list(range(len(routings)))
    return list(cfg.moe_layers)


def _layer_index(layer: int, routings: Sequence[Routing]) -> int:
    if not 0 <= layer < len(routings):
        raise ValueError(f"layer={layer} must lie in 0..{len(routings) - 1}: it counts the layers of experts")
    return layer


def _device_names(devices: int) -> list[str]:
    return [f"device {i}" if devices <= 8 else str(i) for i in range(devices)]


def _device_edges(experts: int, devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Cell borders with a gap between devices, and the cell of each expert.

    -> edges (E + G,) and columns (E,): expert i lies between edges[columns[i]] and edges[columns[i] + 1]; the
    other cells are the gaps.
    """
    device = np.arange(experts) * devices // experts
    columns = np.arange(experts) + device
    sizes = np.full(experts + devices - 1, DEVICE_GAP)
    sizes[columns] = 1.0
    return np.concatenate([[0.0], sizes.cumsum()]), columns


def _weights(routing: Routing, sequence: int, columns: np.ndarray, cells: int) -> np.ma.MaskedArray:
    """(T, cells): the weight of each chosen expert in its cell, -1 where not chosen, masked in the gaps."""
    ids = routing.expert_ids[sequence].detach().cpu().numpy()
    grid = np.ma.array(np.full((ids.shape[0], cells), -1.0), mask=True)
    grid[:, columns] = -1.0  # below the scale of colours, so that even a chosen weight of 0 is lit
    weights = routing.weights[sequence].detach().float().cpu().numpy()
    grid[np.arange(ids.shape[0])[:, None], columns[ids]] = weights
    return grid


def _cross_dropped(ax: Axes, routing: Routing, sequence: int, centres: np.ndarray) -> None:
    if routing.kept is None:
        return
    token, place = np.nonzero(~routing.kept[sequence].cpu().numpy())
    expert = routing.expert_ids[sequence].cpu().numpy()[token, place]
    ax.plot(
        token,
        centres[expert],
        "x",
        color=INK,
        markersize=6,
        markeredgewidth=2,
        label="dropped",
        path_effects=[withStroke(linewidth=3.4, foreground=style.PAPER)],  # seen on dark cells too
    )


def _token_ticks(ax: Axes, texts: Sequence[str]) -> None:
    """The tokens' texts below the columns: upright when short, turned when long, thinned when too many."""
    inches = ax.get_position().width * ax.figure.get_size_inches()[0]
    room = inches / max(len(texts), 1)
    shown = [visible(text) for text in texts]
    longest = max((len(text) for text in shown), default=1)
    upright = longest * SMALL * 0.62 / 72 <= room
    step = 1 if upright else max(1, int(np.ceil(SMALL * 1.15 / 72 / room)))
    ax.set_xticks(
        range(0, len(texts), step),
        shown[::step],
        fontsize=SMALL,
        family="DejaVu Sans Mono",
        rotation=0 if upright else 90,
        parse_math=False,
    )


def _weight_bar(ax: Axes, norm: Normalize, what: str = "weight") -> None:
    """The scale of colours, beside the axes."""
    beside = ax.inset_axes([1.025, 0.0, 0.022, 1.0])
    bar = ax.figure.colorbar(ScalarMappable(norm, style.GLOW), cax=beside)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, length=3, colors=INK)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
    bar.set_label(what, fontsize=SMALL, color=INK)


# ----------------------------------------------------------------------------------------------- training


def training_curves(
    metrics: str | Path | Sequence[Mapping[str, Any]],
    baselines: Mapping[str, float | int] | None = None,
    *,
    smooth: int | None = None,
) -> Figure:
    """Loss, and the load imbalance of the experts, over the steps of a training run.

    metrics: a file of JSON lines, or their content: each with `step` and any of `loss`, `val_loss` (nats per
    byte; `val_nats_per_byte` goes before it, where special tokens make a difference), `lr` and `imbalance`
    (the busiest expert over the average). baselines: validation losses of other models by name, such as
    {"3-gram": 1.9}, drawn as lines across. smooth: steps over which the training loss is averaged, a running
    mean; None: a fiftieth of the run. Steps where the learning rate falls are marked.
    """
    rows = _read_lines(metrics) if isinstance(metrics, (str, Path)) else list(metrics)
    series = {name: _series(rows, name) for name in ("loss", "val_loss", "lr", "imbalance")}
    per_byte = _series(rows, "val_nats_per_byte")
    series["val_loss"] = per_byte if per_byte[0].size else series["val_loss"]
    if not series["loss"][0].size and not series["val_loss"][0].size:
        raise ValueError("metrics holds no row with `step` and `loss` or `val_loss`")
    has_imbalance = series["imbalance"][0].size > 0
    figure = new_figure(9.5, 6.6 if has_imbalance else 4.8)
    ratios = [2.6, 1] if has_imbalance else [1]
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    style.margins(figure, left=1.0, right=2.1, bottom=0.8, top=0.35, hspace=0.18)
    for panel in panels:
        style.style_axes(panel)
    top = panels[0]
    ends = []  # (height, text, colour) of what is written at the right-hand side
    said = []
    steps, loss = series["loss"]
    if steps.size:
        mean = _running_mean(loss, smooth or max(1, len(loss) // 50))
        top.plot(steps, loss, color=style.tint(style.SKY, 0.35), linewidth=1.0, gid="training, each step")
        top.plot(steps, mean, color=style.SKY, linewidth=LINE, label="training")
        ends.append((mean[-1], f"training {mean[-1]:.3f}", style.SKY))
    if series["val_loss"][0].size:
        at, value = series["val_loss"]
        top.plot(at, value, "o-", color=style.VERMILLION, linewidth=LINE, markersize=6, label="validation")
        ends.append((value[-1], f"validation {value[-1]:.3f}", style.VERMILLION))
        said.append(f"validation ends at {value[-1]:.3f}")
    for name, value in (baselines or {}).items():
        top.axhline(value, color=style.GREY, linewidth=2.5, linestyle=(0, (5, 2)), label=name)
        ends.append((float(value), f"{name} {value:.3f}", style.GREY))
        said.append(f"{name} {value:.3f}")
    heights = [height for height, _, _ in ends]
    # The first steps fall from ln(vocabulary); they would squeeze everything else into the floor.
    settled = [*series["val_loss"][1][1:], *loss[steps > 0.03 * steps.max(initial=0)], *heights]
    low, high = min(settled), float(np.quantile(settled, 0.97))
    high = max(high, *heights)
    top.set_ylim(max(0.0, low - 0.12 * (high - low) - 0.02), high + 0.08 * (high - low) + 0.02)
    floor, ceiling = top.get_ylim()
    last = max(at[-1] for at, _ in series.values() if at.size)
    top.set_xlim(0, max(float(last), 1.0))
    for place, (_, text, colour) in zip(_spread(heights, (ceiling - floor) * _line_height(top)), ends):
        top.annotate(
            text,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            fontweight="bold",
            color=style.ink(colour),
            annotation_clip=False,
        )
    label(top, y="loss (nats per byte)")
    for step, factor in _learning_rate_drops(*series["lr"]):
        for panel in panels:
            panel.axvline(step, color=style.PURPLE, linewidth=1.5, linestyle=":", gid="learning rate falls")
        top.annotate(
            f"lr x{factor:.3g}",
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=SMALL,
            color=style.ink(style.PURPLE),
        )
    if has_imbalance:
        at, value = series["imbalance"]
        panels[1].plot(at, value, color=style.GREEN, linewidth=2.5, label="imbalance")
        panels[1].axhline(1, color=style.GREY, linewidth=2.0, linestyle=(0, (5, 2)))
        panels[1].set_ylim(0, max(float(value.max()), 1.0) * 1.15)
        panels[1].yaxis.set_major_locator(MaxNLocator(3))
        label(panels[1], y="imbalance\n(max / mean)")
        panels[1].annotate(
            "1: all experts\nequally busy",
            (1, 1),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=INK,
            annotation_clip=False,
        )
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    label(panels[-1], "training step")
    return finish(
        figure, f"Training over {last:,.0f} steps; loss in nats per byte: {', '.join(said) or 'training'}."
    )


def _read_lines(path: str | Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
    return [row for row in rows if isinstance(row, dict)]


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have both."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None and "step" in row]
    steps, values = zip(*found) if found else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], values.cumsum()])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    return (sums[end] - sums[begin]) / (end - begin)


def _learning_rate_drops(steps: np.ndarray, rates: np.ndarray) -> list[tuple[float, float]]:
    """(step, factor) wherever the learning rate falls by more than a fifth at once."""
    return [
        (float(steps[i]), float(rates[i] / rates[i - 1]))
        for i in range(1, len(rates))
        if 0 < rates[i] < 0.8 * rates[i - 1]
    ]


# --------------------------------------------------------------------------------------------- benchmarks


def benchmark_bars(
    results: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    ours: str = "dsv2",
    peer: str = "transformers",
) -> Figure:
    """Ours against a peer, a pair of bars for each task on the task's own scale, with the ratio beside it.

    results: rows with `name`, `ours`, `peer`, `unit` (a rate, or "ms") and perhaps `ratio`, how many times
    faster ours is; or a report that has them under "results", with the two names under "ours" and "peer"; or
    the JSON file of one.
    """
    if isinstance(results, (str, Path)):
        results = json.loads(Path(results).read_text(encoding="utf-8"))
    if isinstance(results, Mapping):
        ours, peer = results.get("ours", ours), results.get("peer", peer)
        results = results["results"]
    rows = list(results)
    if not rows:
        raise ValueError("results is empty; give at least one row with name, ours, peer and unit")
    figure = new_figure(9.5, 0.75 + 1.28 * len(rows))
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    style.margins(figure, left=1.75, right=1.35, bottom=0.62, top=0.35, hspace=0.55)
    said = []
    for panel, row in zip(panels, rows):
        style.style_axes(panel, None)
        values = [float(row["ours"]), float(row["peer"])]
        colours = [style.CACHED, "#9AA3B2"]
        panel.barh([0, 1], values, height=0.8, color=colours)
        for y, (value, colour) in enumerate(zip(values, colours)):
            panel.annotate(
                f"{value:,.0f}" if value >= 100 else f"{value:,.3g}",
                (value, y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=SMALL,
                color=style.ink(colour),
            )
        below, above = values if row["unit"] == "ms" else values[::-1]
        ratio = float(row.get("ratio", above / below if below else np.inf))
        panel.annotate(
            f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x",
            (1.0, 0.5),
            xycoords="axes fraction",
            xytext=(14, 0),
            textcoords="offset points",
            va="center",
            fontsize=22,
            fontweight="bold",
            color=style.CACHED if ratio >= 1 else INK,
        )
        panel.set_yticks([0, 1], [ours, peer], fontsize=SMALL)
        panel.set_ylim(1.55, -0.55)
        panel.set_xlim(0, max(*values, 1e-9) * 1.18)
        panel.set_xticks([])
        panel.spines["bottom"].set_visible(False)
        panel.tick_params(axis="y", length=0)
        title = f"{row['name']} ({row['unit']})"
        panel.set_title(title, fontsize=BASE, color=INK, loc="left", pad=3, parse_math=False)
        said.append(f"{row['name']}: {values[0]:,.3g} against {values[1]:,.3g} {row['unit']}, {ratio:.2f}x")
    faster = "shorter" if rows[-1]["unit"] == "ms" else "longer"
    label(panels[-1], f"{faster} is faster; each task has its own scale")
    return finish(figure, f"{ours} against {peer}. {'; '.join(said)}.")
