"""Figures of the decode kernel: an online softmax tile by tile, what the steps read, who reads which."""

# B batch   S cached tokens   H heads   C kv_lora_rank (the latent)   R qk_rope_head_dim

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv2.config import DSV2Config
from dsv2.kernels.schedule import Piece, ceil_div, choose_parts, pieces
from dsv2.viz import style
from dsv2.viz.cache import tokens_text
from dsv2.viz.plots import human_bytes
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, new_axes, new_figure, on
from dsv2.viz.widgets import Explorer, in_columns

# ------------------------------------------------------------------------------------------- online softmax

TOKENS = 12
SCORES = {
    "mixed": (0.6, -0.4, 1.1, 0.2, 2.4, 1.5, -0.8, 0.9, 3.2, 1.9, 0.1, 2.6),
    "rising: the largest last": tuple(0.3 * token for token in range(TOKENS)),
    "falling: the largest first": tuple(3.3 - 0.3 * token for token in range(TOKENS)),
    "one far above the others": (0.2, 0.9, 0.4, 0.0, 0.7, 0.3, 6.0, 0.5, 0.1, 0.8, 0.6, 0.4),
}
VALUES = (3.0, 8.0, 1.0, 6.0, 2.0, 9.0, 5.0, 7.0, 4.0, 1.0, 8.0, 2.0)  # of the tokens, one number each


@dataclass(frozen=True)
class Softmax:
    """A softmax under way: running maximum, sum, accumulator; each token's weight in them, not divided."""

    largest: float
    total: float
    mixture: float
    weights: np.ndarray

    @property
    def output(self) -> float:
        """The accumulator divided by the sum; NaN before the first token."""
        return self.mixture / self.total if self.total else float("nan")


def online_softmax(
    scores: Sequence[float], values: Sequence[float], tile: int, rescale: bool = True
) -> list[Softmax]:
    """The states of an online softmax: before the first tile, and after each of them.

    rescale: False leaves out the factor e^(m - m') by which earlier sums shrink, a common bug.
    """
    if tile < 1 or len(scores) != len(values):
        raise ValueError(
            f"tile={tile} must be at least 1, and there must be as many scores ({len(scores)}) "
            f"as values ({len(values)})"
        )
    states = [Softmax(-np.inf, 0.0, 0.0, np.zeros(len(scores)))]
    for start in range(0, len(scores), tile):
        before, here = states[-1], slice(start, start + tile)
        larger = max(before.largest, *scores[here])
        shrink = np.exp(before.largest - larger) if rescale else 1.0
        weights = before.weights * shrink
        weights[here] = np.exp(np.array(scores[here]) - larger)
        total = before.total * shrink + weights[here].sum()
        mixture = before.mixture * shrink + weights[here] @ np.array(values[here])
        states.append(Softmax(float(larger), float(total), float(mixture), weights))
    return states


def true_weights(scores: Sequence[float], read: int) -> np.ndarray:
    """The softmax over the first `read` scores, 0 for the others."""
    weights = np.zeros(len(scores))
    if read:
        weights[:read] = np.exp(np.array(scores[:read]) - max(scores[:read]))
        weights /= weights.sum()
    return weights


def online_softmax_figure(
    scores: Sequence[float], values: Sequence[float], tile: int, read: int, rescale: bool = True
) -> Figure:
    """Left: the scores, those of the first `read` tiles coloured, and the running maximum. Right: weights.

    The right side's bars are what the running sums make of each token; outlines are the true softmax.
    """
    states = online_softmax(scores, values, tile, rescale)
    if not 0 <= read < len(states):
        raise ValueError(f"read={read} must be from 0 to {len(states) - 1}, the number of tiles")
    state, seen = states[read], min(read * tile, len(scores))
    token = np.arange(len(scores))
    figure = new_figure(10.4, 4.6)
    left, right = figure.subplots(1, 2)
    style.margins(figure, left=0.85, right=0.25, bottom=0.8, top=0.6, wspace=0.22)
    for axes in (left, right):
        style.style_axes(axes)
        axes.set_xticks(token, [str(number) for number in token])
        axes.set_xlim(-0.6, len(scores) - 0.4)
        for edge in range(tile, len(scores), tile):
            axes.axvline(
                edge - 0.5, ymax=0.82, color=style.GREY, linewidth=1.2, linestyle=(0, (2, 3)), zorder=0
            )

    colours = [style.PALE] * len(scores)
    for number in range(seen):
        colours[number] = style.ORANGE if number >= (read - 1) * tile else style.CACHED
    left.bar(token, scores, width=0.72, color=colours)
    left.axhline(0, color=style.GREY, linewidth=1.2)
    if read:
        edges = np.array([(min(i * tile, len(scores)) - 0.5) for i in range(read + 1)])
        maxima = [states[i].largest for i in range(1, read + 1)]
        left.stairs(maxima, edges, baseline=None, color=INK, linewidth=LINE, label="running maximum")
    low, high = min(0.0, *scores), max(scores)
    left.set_ylim(low - 0.08 * (high - low), high + 0.22 * (high - low))
    left.text(
        0.02,
        0.98,
        f"maximum m = {state.largest:.2f}" if read else "nothing read yet",
        transform=left.transAxes,
        va="top",
        fontsize=BASE,
        fontweight="bold",
        color=INK,
    )
    label(left, "cached token", "score", f"{read} of {len(states) - 1} tiles read")

    true = true_weights(scores, seen)
    mine = state.weights / state.total if state.total else state.weights
    right.bar(token, mine, width=0.72, color=style.CACHED if rescale else style.VERMILLION)
    right.bar(token, true, width=0.72, facecolor="none", edgecolor=INK, linewidth=2.2, label="true softmax")
    top = max(true.max(), mine.max(), 0.05)
    right.set_ylim(0, 1.35 * top)
    expected = float(true @ np.array(values))
    right.text(
        0.02,
        0.98,
        f"a / l = {state.output:.3f}\ntrue: {expected:.3f}" if read else "no weights yet",
        transform=right.transAxes,
        va="top",
        fontsize=BASE,
        fontweight="bold",
        color=INK if not read or abs(state.output - expected) < 5e-4 else style.ink(style.VERMILLION),
    )
    label(right, "cached token", "weight", "Bars: as summed. Outlines: true")
    said = (
        f"After {read} of {len(states) - 1} tiles of {tile}: running maximum {state.largest:.3g}, sum "
        f"{state.total:.4g}, accumulator {state.mixture:.4g}; their quotient {state.output:.4g}, the true "
        f"softmax over the {seen} tokens read gives {expected:.4g}."
    )
    return finish(figure, said if read else f"No tile of {len(states) - 1} read yet.")


def online_softmax_caption(
    scores: Sequence[float], values: Sequence[float], tile: int, read: int, rescale: bool = True
) -> str:
    """The states up to `read` as a table of HTML, with the factor by which earlier sums shrank."""
    states = online_softmax(scores, values, tile, rescale)
    heads = ("tile", "m", "shrink by", "l", "a", "a / l")
    rows = ""
    for number in range(1, read + 1):
        before, state = states[number - 1], states[number]
        shrink = f"{np.exp(before.largest - state.largest):.4f}" if number > 1 else "-"
        cells = (
            f"{number}",
            f"{state.largest:.2f}",
            shrink if rescale or number == 1 else f"{shrink} (left out)",
            f"{state.total:.4f}",
            f"{state.mixture:.4f}",
            f"{state.output:.4f}",
        )
        rows += "<tr>" + "".join(f"<td style='text-align:right;padding-left:22px'>{c}</td>" for c in cells)
        rows += "</tr>"
    titles = "".join(f"<th style='text-align:right;padding-left:22px'>{head}</th>" for head in heads)
    return f'<table style="font-size:15px"><tr>{titles}</tr>{rows}</table>'


def online_softmax_explorer() -> Explorer:
    """Tiles read one after the other, the tile's size, scores to choose from, with and without rescaling."""
    wide = {"description_width": "110px"}
    layout = ipywidgets.Layout(width="400px")
    controls = {
        "read": ipywidgets.IntSlider(2, 0, 4, description="tiles read", style=wide, layout=layout),
        "tile": ipywidgets.SelectionSlider(
            options=[1, 2, 3, 4, 6, 12], value=3, description="tokens a tile", style=wide, layout=layout
        ),
        "scores": ipywidgets.Dropdown(
            options=list(SCORES), value="mixed", description="scores", style=wide, layout=layout
        ),
        "rescale": ipywidgets.Checkbox(True, description="shrink earlier sums by e^(m - m')", indent=False),
    }

    def chosen(read: int, tile: int, scores: str, rescale: bool) -> tuple:
        tiles = ceil_div(TOKENS, tile)
        return SCORES[scores], VALUES, tile, min(read, tiles), rescale

    def reach(change: dict) -> None:  # the slider ends with the last tile
        controls["read"].max = ceil_div(TOKENS, change["new"])

    controls["tile"].observe(reach, "value")
    explorer = Explorer(
        lambda **values: online_softmax_figure(*chosen(**values)),
        caption=lambda **values: online_softmax_caption(*chosen(**values)),
        **controls,
    )
    return in_columns(explorer, ["read", "tile"], ["scores", "rescale"])


# --------------------------------------------------------------------------------------- what each step reads


@dataclass(frozen=True)
class Traffic:
    """Bytes that one layer's attention asks for or writes in a decoding step, by what they are."""

    name: str
    cache: int
    scores: int
    partial: int

    @property
    def total(self) -> int:
        return self.cache + self.scores + self.partial


def decode_traffic(
    cfg: DSV2Config,
    batch: int,
    cached: int,
    blocks: Sequence[int] = (16, 64, 128),
    multiprocessors: int = 132,
) -> list[Traffic]:
    """PyTorch's four calls, then fused kernels with so many query heads a program; numbers of 2 bytes.

    The four calls: scores of the latents (written), scores of the rotary keys added to them (read, written),
    softmax (read, written), mixture (read): the latents are read twice, scores pass through memory six times.
    A fused kernel reads latent and rotary key once for each block of heads; where a sequence is split,
    results in float32 are written and read again to be merged. Queries and outputs are left out.
    """
    heads, latent, rope = cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
    pairs, tile = batch * cached, 64
    found = [Traffic("PyTorch, four calls", pairs * (2 * latent + rope) * 2, 6 * heads * pairs * 2, 0)]
    for block in sorted({min(block, heads) for block in blocks}):
        count = ceil_div(heads, block)
        parts = parts_for(batch, cached, count, multiprocessors, tile)
        split = [p for p in pieces([cached] * batch, tile, parts) if p.stop - p.start < cached]
        partial = len(split) * heads * (latent + 1) * 4 * 2
        found.append(
            Traffic(f"fused, {block} heads a program", count * pairs * (latent + rope) * 2, 0, partial)
        )
    return found


def traffic_bars(
    cfg: DSV2Config, batch: int, cached: int, blocks: Sequence[int] = (16, 64, 128), ax: Axes | None = None
) -> Figure:
    """`decode_traffic` as bars: cache, scores and partial results of each way, one below the other."""
    ways = decode_traffic(cfg, batch, cached, blocks)
    ax = new_axes(ax, 10.4, 1.5 + 0.72 * len(ways), grid="x", left=3.15, right=1.35, bottom=0.8, top=0.65)
    kinds = {"cache": style.CACHED, "scores": style.VERMILLION, "partial": style.ORANGE}
    names = {"cache": "cache", "scores": "scores and weights", "partial": "partial results"}
    largest = max(way.total for way in ways) / 1e6
    for row, way in enumerate(ways):
        start = 0.0
        for kind, colour in kinds.items():
            size = getattr(way, kind) / 1e6
            ax.barh(row, size, left=start, height=0.62, color=colour, label=names[kind] if row == 0 else None)
            if size > 0.05 * largest:  # wide enough for its number
                where = (start + size / 2, row)
                ax.text(*where, f"{size:,.0f}", ha="center", va="center", fontsize=SMALL, color=on(colour))
            start += size
        ax.annotate(
            f"{start:,.0f} MB",
            (start, row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=BASE,
            fontweight="bold",
            color=INK,
        )
    ax.set_yticks(range(len(ways)), [way.name for way in ways], fontsize=BASE)
    ax.set_ylim(len(ways) - 0.45, -0.55)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    legend = ax.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=SMALL, frameon=False,
        handlelength=1.1, columnspacing=1.4, borderaxespad=0.1,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(INK)
    label(ax, "asked for and written in one layer and step (MB)")
    said = "; ".join(
        f"{way.name}: {human_bytes(way.total)} ("
        + ", ".join(
            f"{human_bytes(getattr(way, kind))} {names[kind]}" for kind in kinds if getattr(way, kind)
        )
        + ")"
        for way in ways
    )
    return finish(
        ax, f"{batch} texts with {cached:,} cached tokens, {cfg.num_attention_heads} heads. {said}."
    )


def measured_table(report: Mapping[str, Any], heads: int, batch: int, tokens: int) -> str:
    """What a stored measurement says of one shape, the fastest first; a sentence if it has no such shape.

    report: as `python -m dsv2.bench decode` writes it on a GPU; tokens: cached ones of each text, all equal.
    """
    shape = f"{heads} heads, {batch} texts of {tokens:,} cached tokens"
    rows = [
        row
        for row in report["results"]
        if (row["kind"], row["heads"], row["batch"], row["slots"]) == ("table", heads, batch, tokens)
        and "us" in row  # otherwise it could not be measured
    ]
    if not rows:
        return f"{shape}: not measured"
    rows.sort(key=lambda row: row["us"])
    width = max(len(row["contender"]) for row in rows)
    lines = [f"{shape}: the limit is {rows[0]['us'] * rows[0]['share']:.1f} µs"]
    lines += [f"  {row['contender']:{width}} {row['us']:9,.1f} µs {row['share']:6.0%}" for row in rows]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- the schedule

# The model of time, in the time that one tile takes. Not measured: large enough to be seen.
PIECE_COST = 1.0  # loading the queries, writing the result
COMBINE_COST = 4.0  # a second kernel, where a sequence was split
LENGTHS = ("equal", "ragged", "one long, the others short")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = tuple(2**power for power in range(10, 16))
GPUS = {"H100: 132": 132, "A100: 108": 108, "L4: 58": 58, "8, to look at": 8}
HEADS = {"128 heads, 64 a program": (128, 64), "128 heads, 16 a program": (128, 16), "16 heads": (16, 16)}
CHOSEN = "chosen"


@dataclass(frozen=True)
class Run:
    """A stretch of a sequence on a multiprocessor, from `start` to `stop` in tile times."""

    multiprocessor: int
    sequence: int
    start: float
    stop: float


@dataclass(frozen=True)
class Timeline:
    """What runs where and when, the end of the split kernel, and the end of all."""

    runs: tuple[Run, ...]
    split_end: float
    end: float
    multiprocessors: int

    @property
    def busy(self) -> float:
        """The share of the multiprocessors' time, up to the end of all, in which a split program runs."""
        work = sum(run.stop - run.start for run in self.runs)
        return work / (self.multiprocessors * self.end) if self.end else 0.0


def timeline(work: Sequence[Piece], tile: int, head_blocks: int, multiprocessors: int) -> Timeline:
    """The programs of a split kernel, in the order of their numbers, each on the first free multiprocessor.

    work: the pieces of one head block; every block has the same. A program walks through its pieces one by
    one. Where a sequence has several, merging them is a second kernel.
    """
    programs: dict[int, list[Piece]] = {}
    for piece in work:
        programs.setdefault(piece.program, []).append(piece)
    free = np.zeros(multiprocessors)
    runs = []
    for number in sorted(programs):
        for _ in range(head_blocks):
            chosen = int(free.argmin())
            for piece in programs[number]:
                took = ceil_div(piece.stop, tile) - piece.start // tile + PIECE_COST
                runs.append(Run(chosen, piece.sequence, float(free[chosen]), float(free[chosen] + took)))
                free[chosen] += took
    owners = [piece.sequence for piece in work]
    merged = len(owners) > len(set(owners))
    split_end = float(free.max())
    return Timeline(tuple(runs), split_end, split_end + COMBINE_COST * merged, multiprocessors)


def parts_for(batch: int, longest: int, head_blocks: int, multiprocessors: int, tile: int = 64) -> int:
    """The package's choice of parts, where one text's part has at least two tiles."""
    return choose_parts(batch, longest // (2 * tile), head_blocks, multiprocessors)


def whole_sequences(lengths: Sequence[int]) -> list[Piece]:
    """One program for each sequence: no split."""
    return [Piece(b, b, 0, length) for b, length in enumerate(lengths) if length]


def batch_lengths(kind: str, batch: int, longest: int) -> list[int]:
    """Lengths of a batch, one of `LENGTHS`; the same ones each time."""
    if kind == "equal":
        return [longest] * batch
    if kind == "ragged":
        shares = np.random.default_rng(5).uniform(0.03, 1.0, batch)
        shares[0] = 1.0
        return [max(int(share * longest), 1) for share in shares]
    if kind == LENGTHS[2]:
        return [longest] + [max(longest // 16, 1)] * (batch - 1)
    raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(LENGTHS)}")


def schedule_figure(
    lengths: Sequence[int], tile: int, parts: int, head_blocks: int, multiprocessors: int
) -> Figure:
    """A Gantt chart. Above: one program for each sequence and block of heads; below: even shares of tiles."""
    plans = {
        "not split": timeline(whole_sequences(lengths), tile, head_blocks, multiprocessors),
        _count(parts, "part"): timeline(pieces(lengths, tile, parts), tile, head_blocks, multiprocessors),
    }
    longest = max(max(plan.end for plan in plans.values()), 1.0)
    figure = new_figure(10.4, 6.2)
    panels = figure.subplots(2, 1)
    style.margins(figure, left=1.0, right=0.3, bottom=0.8, top=0.55, hspace=0.42)
    said = []
    for ax, (name, plan) in zip(panels, plans.items()):
        style.style_axes(ax, "x")
        _draw_runs(ax, plan)
        if plan.end > plan.split_end:
            box = (plan.split_end, 0), (plan.split_end, multiprocessors)
            box += (plan.end, multiprocessors), (plan.end, 0)
            ax.add_collection(PolyCollection([box], facecolors=INK, gid="combine"))
        ax.axvline(plan.end, color=style.GREY, linewidth=2.0, linestyle=(0, (3, 2)))
        ax.set_xlim(0, 1.02 * longest)
        ax.set_ylim(multiprocessors, 0)
        if multiprocessors <= 8:  # rows that can be told apart: each with its number at its middle
            ax.set_yticks([row + 0.5 for row in range(multiprocessors)], map(str, range(multiprocessors)))
        else:
            ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        label(ax, title=f"{name}: done after {plan.end:,.0f} tiles' time, {100 * plan.busy:.0f} % busy")
        said.append(f"{name}: done after {plan.end:,.0f} tiles' time, {100 * plan.busy:.0f} % busy")
    label(panels[1], x="time (in tiles; pale: idle, black: merging, dashed: done)")
    figure.supylabel("multiprocessor", fontsize=BASE, color=INK, x=0.012)
    return finish(
        figure,
        f"{_count(len(lengths), 'text')}, {sum(lengths):,} cached tokens, {_count(head_blocks, 'block')} of "
        f"heads on {multiprocessors} multiprocessors. " + "; ".join(said) + ".",
    )


def _count(number: int, thing: str) -> str:
    """1 tile, 1,200 tiles."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _draw_runs(ax: Axes, plan: Timeline) -> None:
    """The runs as boxes, coloured by sequence; what stays pale is idle."""
    ax.set_facecolor(style.PALE)
    boxes = [
        (
            (run.start, run.multiprocessor),
            (run.start, run.multiprocessor + 1),
            (run.stop, run.multiprocessor + 1),
            (run.stop, run.multiprocessor),
        )
        for run in plan.runs
    ]
    colours = [style.CYCLE[run.sequence % (len(style.CYCLE) - 1)] for run in plan.runs]
    edge = 0.15 if plan.multiprocessors > 20 else 1.5
    ax.add_collection(
        PolyCollection(boxes, facecolors=colours, edgecolors=style.PAPER, linewidths=edge, gid="runs")
    )


def schedule_caption(
    lengths: Sequence[int], tile: int, parts: int, head_blocks: int, multiprocessors: int
) -> str:
    """The schedule in numbers, as HTML."""
    work = pieces(lengths, tile, parts)
    tiles = sum(ceil_div(length, tile) for length in lengths)
    share = ceil_div(tiles, parts)
    partial = sum(piece.stop - piece.start < lengths[piece.sequence] for piece in work) * head_blocks
    programs = len({piece.program for piece in work}) * head_blocks
    sentence = (
        f"{_count(len(lengths), 'text')}, {sum(lengths):,} cached tokens: {_count(tiles, 'tile')} of {tile}. "
        f"{_count(parts, 'part')} of at most {_count(share, 'tile')}, for {_count(head_blocks, 'block')} of "
        f"heads: {_count(programs, 'program')}, {_count(partial, 'partial result')} to merge."
    )
    return f'<div style="font-size:15px">{html.escape(sentence)}</div>'


def schedule_explorer(tile: int = 64) -> Explorer:
    """Batch, lengths, heads, multiprocessors and the number of parts -> a Gantt chart with its idle time."""
    wide = {"description_width": "120px"}
    layout = ipywidgets.Layout(width="410px")
    options = [CHOSEN, *(2**power for power in range(9))]
    controls = {
        "batch": ipywidgets.SelectionSlider(
            options=BATCHES, value=4, description="texts (batch)", style=wide, layout=layout
        ),
        "lengths": ipywidgets.Dropdown(
            options=LENGTHS, value="ragged", description="lengths", style=wide, layout=layout
        ),
        "longest": ipywidgets.SelectionSlider(
            options=[(tokens_text(context), context) for context in CONTEXTS], value=8192,
            description="longest (tokens)", style=wide, layout=layout,
        ),
        "heads": ipywidgets.Dropdown(options=list(HEADS), description="heads", style=wide, layout=layout),
        "gpu": ipywidgets.Dropdown(
            options=list(GPUS), description="multiprocessors", style=wide, layout=layout
        ),
        "parts": ipywidgets.SelectionSlider(
            options=options, value=CHOSEN, description="parts", style=wide, layout=layout
        ),
    }  # fmt: skip

    def chosen(batch: int, lengths: str, longest: int, heads: str, gpu: str, parts: int | str) -> tuple:
        count, block = HEADS[heads]
        blocks, multiprocessors = ceil_div(count, block), GPUS[gpu]
        if parts == CHOSEN:
            parts = parts_for(batch, longest, blocks, multiprocessors, tile)
        return batch_lengths(lengths, batch, longest), tile, parts, blocks, multiprocessors

    explorer = Explorer(
        lambda **values: schedule_figure(*chosen(**values)),
        caption=lambda **values: schedule_caption(*chosen(**values)),
        **controls,
    )
    return in_columns(explorer, ["batch", "lengths", "longest"], ["heads", "gpu", "parts"])
