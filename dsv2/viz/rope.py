"""Rotary positions in figures: clocks that turn, what each pair tells apart, layouts, what mistakes cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import ipywidgets
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle, Wedge
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from dsv2.rope import rope_frequencies
from dsv2.viz import style
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, new_axes, new_figure
from dsv2.viz.widgets import Explorer

QUERY, KEY = style.VERMILLION, style.CACHED  # a rotated key is cached: the colour of the cache
PAIR_COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE, style.ORANGE, style.SKY)
CLOCKS_IN_A_ROW = 4


# ------------------------------------------------------------------------------------------------- clocks


def rope_clocks(
    query: int, key: int, *, dim: int = 16, theta: float | int = 10000.0, figure: Figure | None = None
) -> Figure:
    """One clock for each pair of channels: a query's hand, a key's, and the angle from the key to the query.

    query, key: positions. Position 0 points to the right, and later ones turn on against the clock. figure:
    one returned before, for the same dim; its hands are moved instead of all being drawn anew.
    """
    if query < 0 or key < 0:
        raise ValueError(f"query={query} and key={key} are positions: 0 or more")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim={dim} must be even and at least 2: two channels make a pair")
    if not theta > 1:
        raise ValueError(f"theta={theta} must be greater than 1")
    frequencies = rope_frequencies(dim, float(theta)).double().tolist()
    parts = getattr(figure, "clocks", None)
    if parts is None or len(parts) != len(frequencies):
        figure = _draw_clocks(len(frequencies))
    said = []
    for pair, (clock, frequency) in enumerate(zip(figure.clocks, frequencies)):
        apart = (query - key) * frequency
        _set_hands(clock, query * frequency, key * frequency, apart)
        clock["wave"].set_text(f"a turn in {_count(2 * math.pi / frequency)} tokens")
        clock["apart"].set_text(f"pair {pair}: {angle_text(apart)}")
        said.append(f"pair {pair} {angle_text(apart)}")
    figure.axes[0].set_title(
        f"query at {query:,}, key at {key:,}: {abs(query - key):,} apart",
        fontsize=style.TITLE,
        color=INK,
        loc="left",
        pad=12,
    )
    return finish(
        figure,
        f"Query at position {query}, key at {key}, base {theta:g}. From the key's hand to the query's: "
        f"{', '.join(said)}.",
    )


def _draw_clocks(pairs: int) -> Figure:
    rows = math.ceil(pairs / CLOCKS_IN_A_ROW)
    figure = new_figure(10.0, 0.95 + 2.45 * rows)
    axes = figure.add_subplot()
    style.margins(figure, left=0.1, right=0.1, bottom=0.4, top=0.55)
    axes.axis("off")
    axes.set_aspect("equal")
    axes.set_xlim(-1.55, 3.1 * (CLOCKS_IN_A_ROW - 1) + 1.55)
    axes.set_ylim(-3.1 * (rows - 1) - 1.85, 1.2)
    figure.clocks = []
    for pair in range(pairs):
        x, y = 3.1 * (pair % CLOCKS_IN_A_ROW), -3.1 * (pair // CLOCKS_IN_A_ROW)
        axes.add_patch(Circle((x, y), 1.0, facecolor="#F6F7F9", edgecolor=style.GREY, linewidth=1.5))
        axes.plot([x + 0.9, x + 1.0], [y, y], color=style.GREY, linewidth=2)  # where position 0 points
        wedge = axes.add_patch(
            Wedge((x, y), 0.55, 0, 0, facecolor=style.tint(style.YELLOW, 0.75), edgecolor="none")
        )
        hand = {"linewidth": 4.5, "solid_capstyle": "round"}
        (key,) = axes.plot([x, x], [y, y], color=KEY, **hand)
        (query,) = axes.plot([x, x], [y, y], color=QUERY, **hand)
        about = {"ha": "center", "va": "center", "color": INK}
        figure.clocks.append(
            {
                "centre": (x, y),
                "wedge": wedge,
                "key": key,
                "query": query,
                "wave": axes.text(x, y - 1.55, "", fontsize=SMALL, **about),
                "apart": axes.text(x, y - 1.23, "", fontsize=BASE, fontweight="bold", **about),
            }
        )
    handles = [
        axes.plot([], [], color=QUERY, linewidth=4.5)[0],
        axes.plot([], [], color=KEY, linewidth=4.5)[0],
        Rectangle((0, 0), 1, 1, color=style.tint(style.YELLOW, 0.75)),
    ]
    figure.legend(
        handles,
        ["query", "key", "from key to query (the angle in bold)"],
        loc="lower center",
        ncols=3,
        fontsize=SMALL,
        frameon=False,
        borderaxespad=0.1,
    )
    return figure


def _set_hands(clock: Mapping, query: float, key: float, apart: float) -> None:
    x, y = clock["centre"]
    # The query's hand is the shorter one, so that both are seen when they point the same way.
    for name, angle, length in (("query", query, 0.68), ("key", key, 0.93)):
        clock[name].set_data([x, x + length * math.cos(angle)], [y, y + length * math.sin(angle)])
    begin, turn = (key, apart) if apart >= 0 else (query, -apart)
    begin, turn = math.degrees(begin) % 360, math.degrees(turn) % 360
    clock["wedge"].set_theta1(begin)
    clock["wedge"].set_theta2(begin + turn)
    clock["wedge"].set_visible(turn > 0)


def angle_text(radians: float | int) -> str:
    """An angle as it is best read: in degrees below a whole turn, in turns beyond."""
    if abs(radians) < 2 * math.pi:
        degrees = math.degrees(radians)
        return f"{degrees:.1f}°" if 0 < abs(degrees) < 9.95 else f"{degrees:.0f}°"
    return f"{radians / (2 * math.pi):.1f} turns"


def _count(tokens: float) -> str:
    return f"{tokens:.1f}" if tokens < 100 else f"{tokens:,.0f}"


def rotation_clocks(dim: int = 16, last: int = 200) -> Explorer:
    """The clocks under sliders: positions of query and key up to `last`, both moved together, and the base.

    The base is shown as a power of ten: 4 is 10,000.
    """
    wide = {
        "style": {"description_width": "170px"},
        "layout": ipywidgets.Layout(width="95%", max_width="640px"),
    }

    def slider(text: str, value: int, top: int) -> ipywidgets.IntSlider:
        return ipywidgets.IntSlider(value, 0, top, description=text, **wide)

    def plot(query: int, key: int, both: int, base: float, figure: Figure | None = None) -> Figure:
        return rope_clocks(query + both, key + both, dim=dim, theta=10.0**base, figure=figure)

    def caption(query: int, key: int, both: int, base: float) -> str:
        frequencies = rope_frequencies(dim, 10.0**base).double()
        similar = float(((query - key) * frequencies).cos().mean())
        slowest = 2 * math.pi / float(frequencies[-1])
        return (
            '<div style="font-size:15px;max-width:900px">'
            f"<b>Distance {query - key}.</b> A query and a key that were the same before they were turned, "
            f"with equally long pairs, have the score <b>{similar:+.3f}</b>: the mean of the cosines. "
            f"Base {10.0**base:,.0f}: the slowest pair needs {slowest:,.0f} tokens for a turn.</div>"
        )

    return Explorer(
        plot,
        caption=caption,
        query=slider("position of the query", 12, last),
        key=slider("position of the key", 9, last),
        both=slider("move both further by", 0, 1000),
        base=ipywidgets.FloatSlider(
            4.0, min=1.0, max=6.0, step=0.25, description="base, power of ten", readout_format=".2f", **wide
        ),
    )


# -------------------------------------------------------------------------------------------- frequencies


def pair_cosines(frequencies: Float[Tensor, " pairs"], pairs: Sequence[int], distances: int = 256) -> Figure:
    """What some pairs make of a distance: the cosine of their angle, a panel each, from 0 to `distances`."""
    if not pairs or not all(0 <= pair < len(frequencies) for pair in pairs):
        raise ValueError(
            f"pairs={tuple(pairs)} must be among the {len(frequencies)} pairs, at least one of them"
        )
    figure = new_figure(10.0, 0.95 + 1.05 * len(pairs))
    panels = figure.subplots(len(pairs), 1, sharex=True, squeeze=False)[:, 0]
    style.margins(figure, left=0.75, right=2.55, bottom=0.8, top=0.2, hspace=0.28)
    steps = max(8 * distances, 400)
    xs = [distances * step / steps for step in range(steps + 1)]
    for row, (pair, panel) in enumerate(zip(pairs, panels)):
        frequency = float(frequencies[pair])
        colour = style.CYCLE[row % len(style.CYCLE)]
        style.style_axes(panel)
        panel.plot(xs, [math.cos(x * frequency) for x in xs], color=colour, linewidth=2.0)
        panel.set_ylim(-1.15, 1.15)
        panel.set_yticks([-1, 0, 1])
        panel.annotate(
            f"pair {pair}: a turn\nin {_count(2 * math.pi / frequency)} tokens",
            (1.0, 0.5),
            xycoords="axes fraction",
            xytext=(12, 0),
            textcoords="offset points",
            va="center",
            fontsize=BASE,
            fontweight="bold",
            color=style.ink(colour),
        )
        panel.set_xlim(0, distances)
    label(panels[-1], "distance between query and key (tokens)")
    figure.text(0.012, 0.56, "cosine", rotation=90, va="center", fontsize=BASE, color=INK)
    said = ", ".join(
        f"pair {p} turns once in {_count(2 * math.pi / float(frequencies[p]))} tokens" for p in pairs
    )
    return finish(figure, f"Cosine of the angle between query and key against their distance: {said}.")


def rope_wavelengths(
    frequencies: Mapping[str, Float[Tensor, " _"]],
    contexts: Mapping[str, int] | None = None,
    ramp: tuple[int, int] | None = None,
) -> Figure:
    """Tokens for a whole turn of each pair, on a log axis, a row of points for each entry of `frequencies`.

    contexts: lengths to mark across, by name. ramp: first pair that YaRN changes and first that it changes
    fully; the pairs between are shaded.
    """
    if not frequencies:
        raise ValueError("frequencies is empty; give at least one name and its frequencies")
    ax = new_axes(None, 10.0, 5.0, left=1.45, right=0.4, bottom=0.8, top=0.3)
    ax.set_yscale("log")
    said = []
    count = max(len(values) for values in frequencies.values())
    # Filled under hollow, so that points on the same place are both seen.
    looks = [
        {"marker": "o", "markersize": 9, "color": style.VERMILLION},
        {"marker": "o", "markersize": 6, "color": style.BLUE},
    ]
    top = 0.0
    for index, (name, values) in enumerate(frequencies.items()):
        waves = [2 * math.pi / float(value) for value in values]
        ax.plot(range(len(waves)), waves, linestyle="none", zorder=3 + index, label=name, **looks[index % 2])
        said.append(f"{name} from {_count(waves[0])} to {_count(waves[-1])} tokens")
        top = max(top, waves[-1])
    if ramp is not None:
        ax.axvspan(ramp[0], ramp[1], color=style.PALE, zorder=0, linewidth=0)
        ax.annotate(
            f"ramp: pairs {ramp[0]} to {ramp[1]}",
            ((ramp[0] + ramp[1]) / 2, 0.02),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=SMALL,
            color=INK,
        )
        said.append(f"YaRN's ramp is from pair {ramp[0]} to {ramp[1]}")
    for name, tokens in (contexts or {}).items():
        ax.axhline(tokens, color=INK, linewidth=1.6, linestyle=(0, (5, 3)), zorder=1)
        ax.annotate(
            name,
            (0.01, tokens),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=SMALL,
            color=INK,
        )
        said.append(f"marked: {name}")
        top = max(top, tokens)
    ax.set_ylim(3, top * 2.5)
    ax.set_xlim(-0.8, count - 0.2)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_locator(LogLocator(10.0))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if len(frequencies) > 1:
        ax.legend(loc="lower right", fontsize=BASE, frameon=False, bbox_to_anchor=(1.0, 0.08))
    label(ax, "pair of channels (0 turns fastest)", "tokens for a whole turn")
    return finish(ax, f"Wavelength of each pair: {'; '.join(said)}.")


# ------------------------------------------------------------------------------- absorbing what is rotated


def absorption_errors(distances: Sequence[int], errors: Mapping[str, Sequence[float]]) -> Figure:
    """Error of the scores relative to their size, by the distance of query and key, on log axes.

    errors: by name, one number per distance; zeros are drawn at the lower edge. Distance 0 stands left of 1.
    """
    if not errors or any(len(values) != len(distances) for values in errors.values()):
        raise ValueError(
            f"errors must hold {len(distances)} numbers for each name, one per entry of distances"
        )
    ax = new_axes(None, 10.0, 4.6, left=1.05, right=0.4, bottom=0.8, top=0.3)
    colours = (style.VERMILLION, style.CACHED, style.GREEN)
    floor = 1e-8
    ax.set_xscale("symlog", linthresh=1, linscale=0.6)
    ax.set_yscale("log")
    said = []
    for index, (name, values) in enumerate(errors.items()):
        colour = colours[index % 3]
        drawn = [max(float(value), floor) for value in values]
        ax.plot(distances, drawn, "o-", color=colour, linewidth=LINE, markersize=7, label=name)
        ax.annotate(
            name,
            (distances[-1], drawn[-1]),
            xytext=(0, 12 if drawn[-1] < 1e-3 else -16),
            textcoords="offset points",
            ha="right",
            va="bottom" if drawn[-1] < 1e-3 else "top",
            fontsize=BASE,
            fontweight="bold",
            color=style.ink(colour),
        )
        said.append(f"{name}: {values[0]:.1g} at {distances[0]}, {values[-1]:.2g} at {distances[-1]}")
    ax.set_ylim(floor, 30)
    ax.set_xlim(-0.15, distances[-1] * 1.3)
    ax.set_xticks(distances, [f"{d:,}" for d in distances])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(100.0, numticks=6))
    ax.yaxis.set_minor_locator(NullLocator())
    label(ax, "distance between query and key (tokens)", "error / size of the scores")
    return finish(ax, f"Relative error of the scores by distance. {'; '.join(said)}.")


# ------------------------------------------------------------------------------------------------ layouts


def channel_layouts(dim: int = 8) -> Figure:
    """The same channels in two orders: members of a pair as neighbours, and half of all channels apart.

    Each box is a channel with its number in a released checkpoint; boxes of one colour are a pair.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"dim={dim} must be even and at least 4")
    figure = new_figure(10.0, 3.7)
    ax = figure.add_subplot()
    style.margins(figure, left=0.2, right=0.2, bottom=0.15, top=0.15)
    ax.axis("off")
    orders = {
        "neighbours": list(range(dim)),
        "halves": [*range(0, dim, 2), *range(1, dim, 2)],
    }
    says = {"neighbours": "DeepSeek-V2's checkpoints", "halves": "“rotate half” code"}
    said = []
    for row, (name, order) in enumerate(orders.items()):
        y = -2.1 * row
        for place, channel in enumerate(order):
            colour = PAIR_COLOURS[channel // 2 % len(PAIR_COLOURS)]
            ax.add_patch(Rectangle((place, y), 0.9, 0.9, facecolor=colour, edgecolor="none"))
            ax.text(
                place + 0.45,
                y + 0.43,
                str(channel),
                ha="center",
                va="center",
                fontsize=TITLE_IN_BOX,
                fontweight="bold",
                color=style.on(colour),
            )
        for pair in range(dim // 2):
            left, right = order.index(2 * pair), order.index(2 * pair + 1)
            height = 0.28 if right - left == 1 else 0.22 + 0.12 * pair
            colour = PAIR_COLOURS[pair % len(PAIR_COLOURS)]
            ax.plot(
                [left + 0.45, left + 0.45, right + 0.45, right + 0.45],
                [y + 0.95, y + 0.95 + height, y + 0.95 + height, y + 0.95],
                color=colour,
                linewidth=2.5,
            )
        ax.text(
            -0.3, y + 0.62, name, ha="right", va="center", fontsize=style.TITLE, color=INK, fontweight="bold"
        )
        ax.text(-0.3, y + 0.2, says[name], ha="right", va="center", fontsize=SMALL, color=INK)
        said.append(f"{name}: {' '.join(map(str, order))}")
    ax.set_xlim(-0.42 * dim - 0.2, dim)
    ax.set_ylim(-2.25, 1.6)
    return finish(figure, f"Order of {dim} rotary channels, members of a pair joined. {'; '.join(said)}.")


TITLE_IN_BOX = BASE + 3.0


# ---------------------------------------------------------------------------------------- what it is worth


def position_losses(losses: Mapping[str, float]) -> Figure:
    """Loss of a model as trained (the first entry) and with its positions changed, a bar each."""
    if not losses:
        raise ValueError("losses is empty; give at least one name and its loss")
    ax = new_axes(None, 10.0, 1.2 + 0.62 * len(losses), "x", left=3.55, right=0.4, bottom=0.8, top=0.2)
    first = next(iter(losses.values()))
    for row, loss in enumerate(losses.values()):
        same = abs(loss - first) < 0.01 * abs(first)
        colour = style.CACHED if same else style.VERMILLION
        ax.barh(row, loss, height=0.66, color=colour)
        ax.annotate(
            f"{loss:.2f}",
            (loss, row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=BASE,
            fontweight="bold",
            color=style.ink(colour),
        )
    ax.set_yticks(range(len(losses)), list(losses), fontsize=BASE)
    ax.invert_yaxis()
    ax.set_xlim(0, max(losses.values()) * 1.15)
    ax.tick_params(axis="y", length=0)
    label(ax, "loss (nats per byte): lower is better")
    return finish(ax, "Loss: " + ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()) + ".")
