"""Chapter 13 in pictures: the published numbers, each from a row of `data/published` with its source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from dsv2.headlines import training_compute
from dsv2.published import AttentionAblation, BarPair, BaseScores, SparseModel, published_numbers
from dsv2.viz import style
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, margins, new_axes, new_figure
from dsv2.viz.widgets import Explorer

V2, LITE = "DeepSeek-V2", "DeepSeek-V2-Lite"
COLOURS = {
    "DeepSeek 67B": style.GREY,
    "Qwen1.5 72B": style.PURPLE,
    "Mixtral 8x22B": style.ORANGE,
    "LLaMA3 70B": style.GREEN,
    V2: style.BLUE,
    LITE: style.SKY,
}
MARKERS = {
    "DeepSeek 67B": "s",
    "Qwen1.5 72B": "^",
    "Mixtral 8x22B": "P",
    "LLaMA3 70B": "D",
    V2: "o",
    LITE: "o",
}
BENCHMARKS = ("MMLU", "BBH", "C-Eval", "CMMLU", "HumanEval", "MBPP", "GSM8K", "MATH")
AGAINST = {
    "activated": "activated parameters (billions)",
    "total": "all parameters (billions)",
    "compute": "training compute (FLOPs; LLaMA3: at least)",
}


# --------------------------------------------------------------------------------------------- the benchmarks


@cache
def _numbers():
    return published_numbers()


def score_points(
    benchmark: str, against: str = "activated", rows: Sequence[BaseScores] | None = None
) -> dict[str, tuple[float, float]]:
    """(x, score in percent) by model. against: a key of `AGAINST`.

    "activated" and "total" as the makers state them; "compute" from config and tokens, for the models that
    have both (`dsv2.headlines.training_compute`). Raises ValueError for a name that is not known.
    """
    rows = _numbers().base_scores if rows is None else rows
    known = list(rows[0].scores_percent)
    if benchmark not in known:
        raise ValueError(f"benchmark={benchmark!r} is not among {', '.join(known)}")
    if against not in AGAINST:
        raise ValueError(f"against={against!r} is not among {', '.join(AGAINST)}")
    if against == "compute":
        place = training_compute()
    else:
        place = {row.model: getattr(row, f"{against}_parameters_b") for row in rows}
    return {
        row.model: (place[row.model], row.scores_percent[benchmark]) for row in rows if row.model in place
    }


def score_map(
    benchmark: str = "MMLU", against: str = "activated", rows: Sequence[BaseScores] | None = None
) -> Figure:
    """One benchmark: a model's score against what a token costs it, its size, or its training."""
    points = score_points(benchmark, against, rows)
    missing = [row.model for row in rows or _numbers().base_scores if row.model not in points]
    ax = new_axes(None, 10.4, 5.2, left=0.95, right=2.6, bottom=0.8, top=0.5)
    _score_axes(ax, points, against)
    for model, (x, y) in points.items():
        ax.plot(x, y, MARKERS.get(model, "o"), color=COLOURS.get(model, style.GREY), ms=13, zorder=3)
    _names_on_the_right(ax, points)
    title = f"{benchmark}, base models"
    if missing:
        title += f" (left out, tokens not stored: {', '.join(missing)})"
    ax.set_title(title, fontsize=SMALL if missing else BASE, color=INK, loc="left", pad=10)
    label(ax, AGAINST[against], "score (%)")
    said = "; ".join(f"{model} {y:g} % at {_amount(x, against)}" for model, (x, y) in points.items())
    gone = f" Left out, their training tokens not being stored: {', '.join(missing)}." if missing else ""
    return finish(ax, f"{benchmark} against {AGAINST[against]}: {said}.{gone}")


def score_panels(against: str = "activated", rows: Sequence[BaseScores] | None = None) -> Figure:
    """All eight benchmarks side by side, a marker a model; legend below."""
    figure = new_figure(10.4, 6.4)
    panels = figure.subplots(2, 4, sharex=True)
    margins(figure, left=0.75, right=0.2, bottom=1.5, top=0.45, wspace=0.3, hspace=0.3)
    best, models = [], {}
    for panel, benchmark in zip(panels.flat, BENCHMARKS):
        style.style_axes(panel)
        points = score_points(benchmark, against, rows)
        models.update(points)
        _score_axes(panel, points, against, few=True)
        for model, (x, y) in points.items():
            panel.plot(x, y, MARKERS.get(model, "o"), color=COLOURS.get(model, style.GREY), ms=10, zorder=3)
        panel.set_title(benchmark, fontsize=BASE, color=INK, loc="left", pad=6)
        first = max(points, key=lambda model: points[model][1])
        v2 = f", {V2} {points[V2][1]:g} %" if first != V2 and V2 in points else ""
        best.append(f"{benchmark}: {first} {points[first][1]:g} %{v2}")
    for panel in panels[:, 0]:
        label(panel, y="score (%)")
    missing = [row.model for row in rows or _numbers().base_scores if row.model not in models]
    below = AGAINST[against] + (f"; without {', '.join(missing)}" if missing else "")
    height = figure.get_size_inches()[1]
    figure.text(0.5, 0.93 / height, below, ha="center", va="center", fontsize=BASE, color=INK)
    handles = [
        Line2D([], [], color=COLOURS.get(m, style.GREY), marker=MARKERS.get(m, "o"), ms=10, ls="", label=m)
        for m in models
    ]
    figure.legend(
        handles=handles, loc="lower center", ncol=3, fontsize=SMALL, frameon=False, handletextpad=0.2,
        bbox_to_anchor=(0.5, 0.06 / height), columnspacing=1.6,
    )  # fmt: skip
    gone = f" Left out, their training tokens not being stored: {', '.join(missing)}." if missing else ""
    return finish(figure, f"Best score of the base models by benchmark. {'; '.join(best)}.{gone}")


def score_explorer() -> Explorer:
    """Menus for the benchmark and for what its scores are drawn against."""
    wide = {"style": {"description_width": "120px"}, "layout": ipywidgets.Layout(width="480px")}
    controls = {
        "benchmark": ipywidgets.Dropdown(options=BENCHMARKS, value="MMLU", description="benchmark", **wide),
        "against": ipywidgets.Dropdown(
            options=[(text, name) for name, text in AGAINST.items()], value="activated",
            description="against", **wide,
        ),
    }  # fmt: skip
    return Explorer(score_map, **controls)


def _score_axes(ax: Axes, points: Mapping[str, tuple[float, float]], against: str, few: bool = False) -> None:
    ax.set_xscale("log")
    xs, ys = zip(*points.values())
    ax.set_xlim(min(xs) / 1.6, max(xs) * 1.6)
    pad = 0.12 * (max(ys) - min(ys) or 1)
    ax.set_ylim(min(ys) - pad, max(ys) + pad)
    if against == "compute":
        ticks = [1e23, 1e24, 1e25]
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{round(math.log10(value))}}}$"))
    else:
        ticks = [2, 10, 50, 200] if few else [2, 5, 10, 20, 50, 100, 200]
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if min(xs) / 1.6 < tick < max(xs) * 1.6]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(MaxNLocator(4 if few else 6, integer=True))


def _names_on_the_right(ax: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Every model's name and score in a column beside the axes, by score, with a line to its point."""
    low, high = ax.get_ylim()
    gap = 0.095 * (high - low)
    order = sorted(points, key=lambda model: points[model][1])
    places = [points[model][1] for model in order]
    for n in range(1, len(places)):
        places[n] = max(places[n], places[n - 1] + gap)
    over = places[-1] - (high - 0.3 * gap)
    if over > 0:  # pushed out at the top: down again, from there
        places[-1] -= over
        for n in range(len(places) - 2, -1, -1):
            places[n] = min(places[n], places[n + 1] - gap)
    edge = ax.get_xlim()[1]
    for model, place in zip(order, places):
        x, y = points[model]
        colour = COLOURS.get(model, style.GREY)
        ax.plot([x, edge], [y, place], color=style.tint(colour, 0.55), linewidth=1.2, zorder=1, clip_on=False)
        ax.annotate(
            f"{model} {y:.1f}", (1, place), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=SMALL, fontweight="bold",
            color=style.ink(colour), annotation_clip=False,
        )  # fmt: skip


def _amount(value: float, against: str) -> str:
    return f"{value:.2g} FLOPs" if against == "compute" else f"{value:g}B"


# ---------------------------------------------------------------------------------------------- the headlines


def headline_bars(rows: Sequence[BarPair] | None = None) -> Figure:
    """Figure 1(b): DeepSeek 67B beside DeepSeek-V2 in the three pairs, and the ratio the paper states."""
    rows = _numbers().figure_1 if rows is None else rows
    units = {
        "training cost": "K GPU hours per T tokens",
        "KV cache": "KB per token",
        "generation throughput": "K tokens per second",
    }
    figure = new_figure(10.4, 4.7)
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    margins(figure, left=0.9, right=0.2, bottom=0.85, top=0.95, wspace=0.48)
    said = []
    for panel, pair in zip(panels, rows):
        style.style_axes(panel)
        values = (pair.dense_67b, pair.v2)
        panel.bar((0, 1), values, width=0.62, color=(style.GREY, style.BLUE))
        for place, value in enumerate(values):
            panel.annotate(
                f"{value:.4g}", (place, value), xytext=(0, 4), textcoords="offset points", ha="center",
                va="bottom", fontsize=BASE, fontweight="bold", color=INK,
            )  # fmt: skip
        panel.set_xticks((0, 1), ("67B", "V2"), fontsize=BASE)
        panel.set_xlim(-0.6, 1.6)
        panel.set_ylim(0, 1.16 * max(values))
        panel.yaxis.set_major_locator(MaxNLocator(4))
        times = "times" in pair.stated_as
        panel.set_title(pair.quantity, fontsize=BASE, color=INK, loc="left", pad=38)
        panel.annotate(
            f"{pair.stated:g} {'times' if times else '% less'}", (0, 1), xycoords="axes fraction",
            xytext=(0, 12), textcoords="offset points", fontsize=style.TITLE, fontweight="bold",
            color=style.ink(style.BLUE),
        )  # fmt: skip
        label(panel, pair.reading.replace(" the lengths of", ""), units.get(pair.quantity, pair.unit))
        panel.xaxis.label.set_fontsize(SMALL)
        said.append(
            f"{pair.quantity} ({pair.unit}): {pair.dense_67b:g} and {pair.v2:g}, {pair.ratio:.2f} "
            f"{pair.stated_as} by these numbers, {pair.stated:g} in the paper ({pair.reading})"
        )
    return finish(figure, f"DeepSeek 67B and DeepSeek-V2. {'; '.join(said)}.")


def ablation_scores(rows: Sequence[AttentionAblation] | None = None) -> Figure:
    """Table 9 (or 8): four benchmarks a scale, a bar an attention; and the cache that each needs.

    rows: `published_numbers().table_9` (None) or `.table_8`, whose cache is not published and not drawn. In
    brackets: the difference from the first attention of the scale.
    """
    rows = _numbers().table_9 if rows is None else rows
    scales = list(dict.fromkeys(row.scale for row in rows))
    kinds = list(dict.fromkeys(row.attention for row in rows))
    cached = all(row.kv_elements_per_token_k is not None for row in rows)
    figure = new_figure(10.4, 6.0)
    panels = figure.subplots(
        1, len(scales) + cached, squeeze=False, width_ratios=[1.1] * len(scales) + [1.0] * cached
    )[0]
    margins(figure, left=1.2, right=0.2, bottom=1.2, top=0.85, wspace=0.24)
    longest = max(score for row in rows for score in row.scores_percent.values())
    said = [_score_bars(panel, [r for r in rows if r.scale == s]) for panel, s in zip(panels, scales)]
    names = list(rows[0].scores_percent)
    for panel in panels[: len(scales)]:
        panel.set_yticks(range(len(names)), names if panel is panels[0] else [""] * len(names), fontsize=BASE)
        panel.tick_params(axis="y", length=0)
        panel.set_xlim(0, (1.75 if len(panels) > 1 else 1.25) * longest)
        panel.xaxis.set_major_locator(FixedLocator(range(0, int(longest) + 1, 20)))
    if cached:
        said.append(_cache_bars(panels[-1], rows, scales))
    width, _ = figure.get_size_inches()
    figure.legend(
        handles=[Patch(color=style.colour_of(kind), label=kind) for kind in kinds], loc="lower left",
        fontsize=SMALL, frameon=False, ncol=len(kinds), bbox_to_anchor=(1.1 / width, 0.01), columnspacing=1.4,
    )  # fmt: skip
    return finish(figure, f"Benchmarks by attention. {'; '.join(said)}.")


def _score_bars(panel: Axes, rows: Sequence[AttentionAblation]) -> str:
    """The scores of one scale, by benchmark; what they say in words."""
    style.style_axes(panel, None)
    names, said = list(rows[0].scores_percent), []
    height = 0.8 / len(rows)
    for place, name in enumerate(names):
        first = rows[0].scores_percent[name]
        for n, row in enumerate(rows):
            score, y = row.scores_percent[name], place + height * (n - (len(rows) - 1) / 2)
            panel.barh(y, score, height=0.9 * height, color=style.colour_of(row.attention))
            panel.annotate(
                f"{score:.1f}" + (f" ({score - first:+.1f})" if n else ""), (score, y), xytext=(5, 0),
                textcoords="offset points", va="center", fontsize=SMALL, color=INK,
            )  # fmt: skip
        said.append(f"{name} " + ", ".join(f"{row.attention} {row.scores_percent[name]:g}" for row in rows))
    panel.set_ylim(len(names) - 0.5, -0.5)
    sizes = sorted({row.total_parameters_b for row in rows})
    title = f"{rows[0].scale}: {sizes[0]:g} to {sizes[-1]:g}B,\n{_tokens(rows[0].tokens_b)} tokens"
    panel.set_title(title, fontsize=BASE, color=INK, loc="left", pad=8)
    label(panel, "score (%)")
    panel.xaxis.label.set(ha="left", x=0)
    return f"{rows[0].scale}: {'; '.join(said)}"


def _cache_bars(panel: Axes, rows: Sequence[AttentionAblation], scales: Sequence[str]) -> str:
    """A bar an attention and scale: thousands of elements that a token leaves in the cache."""
    style.style_axes(panel, None)
    ticks, said, place = [], [], 0.0
    most = max(row.kv_elements_per_token_k for row in rows)
    for scale in scales:
        here, start = [row for row in rows if row.scale == scale], place
        for row in here:
            count = row.kv_elements_per_token_k
            panel.barh(place, count, height=0.9, color=style.colour_of(row.attention))
            share = "" if row is here[0] else f" ({100 * count / here[0].kv_elements_per_token_k:.0f} %)"
            panel.annotate(
                f"{count:g}{share}", (count, place), xytext=(5, 0), textcoords="offset points", va="center",
                fontsize=SMALL, color=INK,
            )  # fmt: skip
            said.append(f"{scale}, {row.attention} {count:g}")
            place += 1
        ticks.append((start + place - 1) / 2)
        place += 0.7
    panel.set_yticks(ticks, scales, fontsize=BASE)
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(place - 1.1, -0.6)
    panel.set_xlim(0, 1.4 * most)
    panel.xaxis.set_major_locator(FixedLocator([0, 400, 800]))
    panel.set_title("cache a token", fontsize=BASE, color=INK, loc="left", pad=8)
    label(panel, "thousand elements")
    panel.xaxis.label.set(ha="left", x=0)
    return f"cache in thousands of elements a token: {', '.join(said)}"


def _tokens(billions: float) -> str:
    return f"{billions / 1000:g}T" if billions >= 1000 else f"{billions:g}B"


# ------------------------------------------------------------------------------------------- the sparsity map


def sparsity_points(
    sparse: Sequence[SparseModel] | None = None, rows: Sequence[BaseScores] | None = None
) -> dict[str, tuple[float, float, bool]]:
    """(all, activated, known) by model, billions; known: False where activated is only a least value."""
    sparse = _numbers().sparse_models if sparse is None else sparse
    rows = _numbers().base_scores if rows is None else rows
    points = {
        row.model: (row.total_parameters_b, row.least_activated_b, row.activated_parameters_b is not None)
        for row in sparse
    }
    points.update({row.model: (row.total_parameters_b, row.activated_parameters_b, True) for row in rows})
    return points


def sparsity_map(
    sparse: Sequence[SparseModel] | None = None, rows: Sequence[BaseScores] | None = None
) -> Figure:
    """Activated against all parameters: dense models on the diagonal, mixtures of experts below it.

    Where a paper does not give the activated parameters, an arrow starts at the least they can be.
    """
    points = sparsity_points(sparse, rows)
    ax = new_axes(None, 10.4, 6.0, grid=None, left=0.95, right=1.2, bottom=0.8, top=0.3)
    ax.set_xscale("log")
    ax.set_yscale("log")
    low, high = 8.0, 3000.0
    ax.set_xlim(low, high)
    ax.set_ylim(0.3, 250)
    for share, name in ((1.0, "dense: all"), (0.1, "10 %"), (0.01, "1 %"), (0.001, "0.1 %")):
        ends = [max(low, 0.3 / share), min(high, 250 / share)]
        look = (
            {"color": "#C3C9D2", "linestyle": (0, (5, 3))} if share < 1 else {"color": style.GREY, "lw": 2.2}
        )
        ax.plot(ends, [share * end for end in ends], zorder=1, **look)
        inside = ends[1] >= high
        ax.annotate(
            name, (ends[1], share * ends[1]), xytext=(6, 0) if inside else (0, 4), textcoords="offset points",
            ha="left" if inside else "center", va="center" if inside else "bottom", fontsize=SMALL,
            color=style.ink(style.GREY), annotation_clip=False,
        )  # fmt: skip
    dense = [model for model, (total, active, known) in points.items() if known and total == active]
    said = []
    for model, (total, active, known) in points.items():
        colour = COLOURS.get(model, style.VERMILLION)
        if known:
            ax.plot(total, active, MARKERS.get(model, "X"), color=colour, ms=13, zorder=3)
            said.append(f"{model} {active:g}B of {total:g}B, {active / total:.1%}")
        else:
            ax.plot(total, active, "_", color=colour, ms=18, markeredgewidth=LINE, zorder=3)
            ax.annotate(
                "", (total, 1.9 * active), (total, active), zorder=3,
                arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.4, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip
            said.append(f"{model} at least {active:.2g}B of {total:g}B, {active / total:.2%}")
        if model not in dense:
            _name_beside(ax, model, (total, active), known)
    if dense:
        total = min(points[model][0] for model in dense)
        text = "\n".join(sorted(dense, key=lambda model: -points[model][0]))
        ax.annotate(
            text, (total, total), xytext=(-14, -2), textcoords="offset points", ha="right", va="bottom",
            fontsize=SMALL, color=INK, linespacing=1.3,
        )  # fmt: skip
    ax.xaxis.set_major_locator(FixedLocator([10, 30, 100, 300, 1000, 3000]))
    ax.yaxis.set_major_locator(FixedLocator([1, 3, 10, 30, 100]))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    label(ax, AGAINST["total"], AGAINST["activated"])
    return finish(
        ax, f"Activated against all parameters: {'; '.join(said)}. Arrows: activated is not published; it is "
        "no less than all parameters times experts a token over experts.",
    )  # fmt: skip


def _name_beside(ax: Axes, model: str, point: tuple[float, float], known: bool) -> None:
    places = {LITE: ((-6, 18), "left"), V2: ((-6, -20), "left")}
    offset, side = places.get(model, ((13, 0), "left") if known else ((-14, 0), "right"))
    ax.annotate(
        model if known else f"{model}: at\nleast {point[1]:.2g}B", point, xytext=offset,
        textcoords="offset points", ha=side, va="center", fontsize=SMALL,
        fontweight="bold" if model in (V2, LITE) else "normal",
        color=style.ink(COLOURS.get(model, style.VERMILLION)), zorder=2,
        bbox={"facecolor": style.PAPER, "edgecolor": "none", "pad": 1.0},
    )  # fmt: skip
