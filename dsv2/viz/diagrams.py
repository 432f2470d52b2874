"""Drawings of how things hang together: one block of the model, and the chapters of the course."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

from dsv2.accounting import parameters
from dsv2.config import DSV2Config
from dsv2.viz.style import (
    ACTIVE,
    CACHED,
    GREEN,
    GREY,
    INK,
    PALE,
    PAPER,
    PURPLE,
    finish,
    ink,
    new_figure,
    tint,
)

# Points at 10 inches of width. Shown 800 pixels wide, SMALL is 13 pixels high.
HEAD, BODY, SMALL = 18.0, 13.5, 12.0
QUIET = "#F6F7F9"  # ground of a panel
EDGE = "#B9C0CB"

# ---------------------------------------------------------------------------------------------- one block


def model_diagram(cfg: DSV2Config, *, title: str | None = None) -> Figure:
    """One block of DeepSeek-V2 in this config's numbers: MLA and what it caches, the router, its experts.

    Blue is what the cache keeps, orange which experts work for a token; the experts shown at work are an
    example of a legal choice. Raises ValueError for a config without MLA or without experts.
    """
    if cfg.attention != "mla" or not cfg.moe_layers:
        raise ValueError(
            "model_diagram draws a block with MLA and experts; this config has "
            f"attention={cfg.attention!r} and {len(cfg.moe_layers)} layers of experts"
        )
    sheet = _Sheet(10.0, 8.75)
    sheet.text(0.25, 8.42, title or "One block of DeepSeek-V2", HEAD, "left", weight="bold")
    sheet.text(
        0.25,
        8.06,
        f"{cfg.num_hidden_layers} blocks of it: {_short(parameters(cfg).total)} parameters, "
        f"{_short(parameters(cfg, activated=True).total)} of them at work for a token",
        BODY,
        "left",
        colour=GREY,
    )
    for x, colour, meaning in ((5.0, CACHED, "kept in the cache"), (7.38, ACTIVE, "at work for this token")):
        sheet.axes.add_patch(Rectangle((x, 8.32), 0.22, 0.2, color=colour))
        sheet.text(x + 0.32, 8.42, meaning, SMALL, "left")
    _draw_spine(sheet, cfg)
    _draw_attention(sheet, cfg, left=2.3, bottom=0.2)
    _draw_experts(sheet, cfg, left=2.3, bottom=4.55)
    kept, instead = _cached_numbers(cfg)
    alt = (
        f"One of {cfg.num_hidden_layers} blocks of DeepSeek-V2. The hidden state ({cfg.hidden_size}) is "
        "normalised and goes through multi-head latent attention: it is compressed to a latent of "
        f"{cfg.kv_lora_rank} and a rotary key of {cfg.qk_rope_head_dim}, which are cached ({kept} numbers "
        f"a token, where multi-head attention would keep {instead}), and expanded to the keys and values "
        f"of {cfg.num_attention_heads} heads. After a second norm, a router chooses "
        f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts} experts; {cfg.n_shared_experts} shared experts "
        "always work. Both results are added to the residual stream."
    )
    return finish(sheet.axes, alt)


def _short(number: int) -> str:
    """235741434880 -> "236B"."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _cached_numbers(cfg: DSV2Config) -> tuple[int, int]:
    """Numbers cached per token and layer: by MLA, and by MHA with as many heads."""
    return (
        cfg.kv_lora_rank + cfg.qk_rope_head_dim,
        2 * cfg.num_attention_heads * cfg.baseline_head_dim,
    )


def _draw_spine(sheet: _Sheet, cfg: DSV2Config) -> None:
    """The residual stream, from the bottom to the top, with what reads it and adds to it."""
    stream, left, width = 0.45, 0.72, 1.18  # x of the stream; the boxes beside it
    x = left + width / 2
    sheet.line([(stream, 0.7), (stream, 7.12)], width=4.0)
    sheet.arrow((stream, 7.0), (stream, 7.2))
    sheet.box(0.25, 0.2, 1.65, 0.5, "hidden state", size=SMALL)
    sheet.box(0.25, 7.2, 1.65, 0.5, "next block", size=SMALL)
    for reads, name, colour, (low, high) in (
        (1.05, "MLA", CACHED, (0.2, 4.3)),
        (4.55, "experts", ACTIVE, (4.55, 7.8)),
    ):
        corners = [
            (left + width, reads + 1.17),
            (left + width, reads + 1.73),
            (2.3, high - 0.08),
            (2.3, low + 0.08),
        ]
        sheet.axes.add_patch(Polygon(corners, facecolor=tint(colour, 0.13), linewidth=0, zorder=0))
        adds = reads + 2.2
        sheet.arrow((stream, reads), (x, reads), (x, reads + 0.35))
        sheet.box(left, reads + 0.35, width, 0.4, "RMSNorm", fill=PALE, size=SMALL)
        sheet.arrow((x, reads + 0.75), (x, reads + 1.15))
        sheet.box(left, reads + 1.15, width, 0.6, name, fill=tint(colour, 0.25), edge=colour, weight="bold")
        sheet.arrow((x, reads + 1.75), (x, adds), (stream + 0.17, adds))
        sheet.plus(stream, adds)


def _draw_attention(sheet: _Sheet, cfg: DSV2Config, left: float, bottom: float) -> None:
    """Multi-head latent attention, from left to right: down to the latents, up to the heads, attention."""
    heads, nope, rope, value = (
        cfg.num_attention_heads,
        cfg.qk_nope_head_dim,
        cfg.qk_rope_head_dim,
        cfg.v_head_dim,
    )
    sheet.panel(left, bottom, 7.5, 4.1, CACHED, "Multi-head latent attention (MLA)")
    low, rows = (
        left + 1.8,
        {"q": bottom + 3.07, "kv": bottom + 2.05, "r": bottom + 1.15},
    )  # bottoms of the rows
    up, height = left + 4.0, 0.56

    sheet.box(
        left + 0.2, rows["r"], 0.62, rows["q"] + height - rows["r"], f"x\n\n{cfg.hidden_size:,}", fill=PAPER
    )
    fork = left + 0.82
    if cfg.q_lora_rank is None:
        sheet.arrow((fork, rows["q"] + 0.28), (up, rows["q"] + 0.28), text="$W^{Q}$", below="RoPE", at=0.5)
    else:
        sheet.arrow((fork, rows["q"] + 0.28), (low, rows["q"] + 0.28), text="$W^{DQ}$")
        sheet.box(low, rows["q"], 1.35, height, f"$c^{{Q}}$   {cfg.q_lora_rank:,}", fill=PAPER)
        sheet.arrow((low + 1.35, rows["q"] + 0.28), (up, rows["q"] + 0.28), text="$W^{UQ}$", below="RoPE")
    sheet.box(up, rows["q"], 1.75, height, f"queries\n{heads} × ({nope} + {rope})", fill=PAPER, size=SMALL)

    # What is cached, and a frame round it.
    frame = (low - 0.14, rows["r"] - 0.14, 1.63, rows["kv"] + height - rows["r"] + 0.28)
    sheet.frame(*frame, CACHED)
    kept, instead = _cached_numbers(cfg)
    sheet.arrow((fork, rows["kv"] + 0.28), (low, rows["kv"] + 0.28), text="$W^{DKV}$", at=0.4)
    sheet.box(
        low, rows["kv"], 1.35, height, f"$c^{{KV}}$   {cfg.kv_lora_rank}", fill=CACHED, colour=PAPER, size=15
    )
    sheet.arrow((fork, rows["r"] + 0.28), (low, rows["r"] + 0.28), text="$W^{KR}$", below="RoPE", at=0.4)
    sheet.box(low, rows["r"], 1.35, height, f"$k^{{R}}$   {rope}", fill=CACHED, colour=PAPER, size=15)
    sheet.text(
        left + 0.2,
        bottom + 0.66,
        f"KV cache: {cfg.kv_lora_rank} + {rope} = {kept} numbers a token and layer.",
        13,
        "left",
        weight="bold",
        colour=ink(CACHED),
    )
    sheet.text(
        left + 0.2,
        bottom + 0.3,
        f"MHA with {heads} heads of {cfg.baseline_head_dim} would keep {instead:,}, "
        f"{instead / kept:.3g} times as many.",
        SMALL,
        "left",
    )

    # Up to the heads.
    middle = rows["kv"] + 0.28
    for name, width, y, matrix in (
        ("keys", nope, middle + 0.05, "$W^{UK}$"),
        ("values", value, middle - 0.05 - 0.42, "$W^{UV}$"),
    ):
        side = 1 if name == "keys" else -1
        sheet.box(up, y, 1.75, 0.42, f"{name}  {heads} × {width}", fill=PAPER, size=SMALL)
        sheet.arrow((low + 1.35, middle + side * 0.12), (up, y + 0.21))
        sheet.text((low + 1.35 + up) / 2 + 0.02, middle + side * 0.4, matrix, SMALL, colour=INK)

    # Attention, and out.
    across = left + 6.03
    words = "softmax\n\nover\nall past\ntokens"
    sheet.box(across, rows["r"], 0.87, rows["q"] + height - rows["r"], words, size=SMALL)
    for y in (rows["q"] + 0.28, middle + 0.26, middle - 0.26):
        sheet.arrow((up + 1.75, y), (across, y))
    sheet.arrow((low + 1.35, rows["r"] + 0.2), (across, rows["r"] + 0.2), text="one for all heads", at=0.52)
    sheet.arrow((across + 0.87, middle), (left + 7.5, middle), text="$W^{O}$", at=0.42)


def _draw_experts(sheet: _Sheet, cfg: DSV2Config, left: float, bottom: float) -> None:
    """The mixture of experts, from left to right: router, experts on their devices, the weighted sum."""
    sheet.panel(left, bottom, 7.5, 3.25, ACTIVE, "Mixture of experts (DeepSeekMoE)")
    dense = cfg.num_hidden_layers - len(cfg.moe_layers)
    floor = bottom + 0.62  # of the experts, above the caption
    sheet.box(left + 0.2, floor, 0.62, 2.05, f"x\n\n{cfg.hidden_size:,}", fill=PAPER)
    fork, area, plus = left + 0.82, left + 2.35, left + 6.95

    # Shared experts.
    if cfg.n_shared_experts:
        y = bottom + 2.29
        sheet.arrow((fork, y + 0.19), (area, y + 0.19))
        for i in range(min(cfg.n_shared_experts, 6)):
            sheet.cell(area + 0.46 * i, y, 0.38, True)
        words = "1 shared expert" if cfg.n_shared_experts == 1 else f"{cfg.n_shared_experts} shared experts"
        end = area + 0.46 * min(cfg.n_shared_experts, 6) + 0.08
        end = sheet.text(end, y + 0.19, f"{words}: always", SMALL, "left") + 0.1
        sheet.arrow((end, y + 0.19), (plus, y + 0.19), (plus, floor + 0.8 + 0.17))

    # Router, then the experts in groups of a device.
    sheet.arrow((fork, floor + 0.8), (left + 1.1, floor + 0.8))
    sheet.box(left + 1.1, floor + 0.4, 0.95, 0.8, "router\n$x^\\top e_i$", fill=PAPER)
    sheet.arrow((left + 2.05, floor + 0.8), (area - 0.03, floor + 0.8))
    if cfg.n_group > 1:
        words = f"{cfg.n_group} devices\nof {cfg.experts_per_device}"
        sheet.text(left + 1.58, floor + 0.17, words, SMALL, colour=GREY)
    _draw_devices(sheet, cfg, area, floor, 3.85, 1.5)
    sheet.arrow((area + 3.88, floor + 0.8), (plus - 0.17, floor + 0.8), text="$\\times g_i$", at=0.45)
    sheet.plus(plus, floor + 0.8)
    sheet.arrow((plus + 0.17, floor + 0.8), (left + 7.5, floor + 0.8))
    if cfg.n_group > 1:
        limit = (
            f"at most {cfg.topk_group} of {cfg.n_group} devices"
            if cfg.limits_devices
            else f"{cfg.n_group} devices"
        )
        where = f", on {limit}"
    else:
        where = ""
    sheet.text(
        left + 0.2,
        bottom + 0.3,
        f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts} routed experts work for a token{where}.",
        13,
        "left",
        weight="bold",
        colour=ink(ACTIVE),
    )
    if dense == cfg.first_k_dense_replace == 1:
        sheet.text(left + 7.35, bottom + 2.98, "(block 0: a dense FFN)", SMALL, "right", colour=GREY)


def _draw_devices(sheet: _Sheet, cfg: DSV2Config, x: float, y: float, width: float, height: float) -> None:
    """Every routed expert as a cell, in a frame for each device; chosen ones are lit."""
    groups, each = cfg.n_group, cfg.experts_per_device
    rows = 1 if groups <= 4 else -(-groups // 8) if groups > 8 else 2
    across = -(-groups // rows)
    frame_w, frame_h = (width + 0.1) / across - 0.1, (height + 0.1) / rows - 0.1
    # Of the rectangles that hold this many experts, the one with the largest cells.
    columns = max(
        (c for c in range(1, each + 1) if each % c == 0),
        key=lambda c: min((frame_w - 0.1) / c, (frame_h - 0.1) / -(-each // c)),
    )
    pitch = min((frame_w - 0.1) / columns, (frame_h - 0.1) / -(-each // columns), 0.42)
    chosen = example_choice(cfg)
    for group in range(groups):
        fx = x + (group % across) * (frame_w + 0.1)
        fy = y + height - frame_h - (group // across) * (frame_h + 0.1)
        busy = any(expert // each == group for expert in chosen)
        sheet.frame(
            fx,
            fy,
            frame_w,
            frame_h,
            ACTIVE if busy else EDGE,
            fill=tint(ACTIVE, 0.1) if busy else PAPER,
            dashed=False,
        )
        lines = -(-each // columns)
        for i in range(each):
            cx = fx + (frame_w - columns * pitch) / 2 + (i % columns) * pitch
            cy = fy + (frame_h + lines * pitch) / 2 - (i // columns + 1) * pitch
            sheet.cell(cx + 0.08 * pitch, cy + 0.08 * pitch, 0.84 * pitch, group * each + i in chosen)


def example_choice(cfg: DSV2Config) -> set[int]:
    """K experts that the router of this config could choose: always the same, spread over M devices."""
    order = np.random.default_rng(2)
    each = cfg.experts_per_device
    reach = cfg.topk_group if cfg.limits_devices else cfg.n_group
    devices = sorted(order.permutation(cfg.n_group)[:reach].tolist())
    best = {device: order.permutation(each).tolist() for device in devices}
    chosen: set[int] = set()
    while len(chosen) < cfg.num_experts_per_tok:
        device = devices[len(chosen) % len(devices)]
        while not best[device]:
            device = devices[(devices.index(device) + 1) % len(devices)]
        chosen.add(device * each + best[device].pop())
    return chosen


# -------------------------------------------------------------------------------------------- the course

CHAPTERS: tuple[tuple[int, str, str], ...] = (
    (0, "start here", "a small trained model, ready-made"),
    (1, "KV cache", "MHA, GQA, MQA and their cache"),
    (2, "latent attention", "low-rank joint compression"),
    (3, "decoupled RoPE", "the shared rotary key"),
    (4, "weight absorption", "the decode form of MLA"),
    (5, "Triton decode", "online softmax, the fused kernel"),
    (6, "mixture of experts", "Switch, GShard, Mixtral, DeepSeekMoE"),
    (7, "device-limited routing", "experts on several devices"),
    (8, "balance losses", "three losses, token dropping"),
    (9, "the whole model", "236B and 21B, checkpoints"),
    (10, "pretraining", "corpus, schedule, loop"),
    (11, "long context", "YaRN"),
    (12, "alignment", "SFT and GRPO"),
    (13, "economics", "every headline number, checked"),
)
THEMES: tuple[tuple[str, str, range], ...] = (
    ("attention", CACHED, range(1, 6)),
    ("experts", ACTIVE, range(6, 9)),
    ("the whole model", GREEN, range(9, 12)),
    ("practice", PURPLE, range(12, 14)),
)
STATES = ("ready", "planned")
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def chapters_here(folder: Path = NOTEBOOKS) -> list[tuple[int, str, str, str]]:
    """The chapters as `course_map` takes them: "ready" where the notebook is in `folder`."""
    here = {path.name[:2] for path in folder.glob("[0-9][0-9]_*.ipynb")}
    return [
        (number, title, builds, "ready" if f"{number:02d}" in here else "planned")
        for number, title, builds in CHAPTERS
    ]


def course_map(chapters: Sequence[tuple[int, str, str, str]] | None = None) -> Figure:
    """The course as a path of boxes, a column for each theme; filled boxes are there, dashed ones planned.

    chapters: (number, title, what it builds, "ready" or "planned"); None: `chapters_here()`. Chapter 0 stands
    above all themes, the others in the theme that `THEMES` gives them.
    """
    chapters = chapters_here() if chapters is None else list(chapters)
    known = {number for _, _, numbers in THEMES for number in numbers} | {0}
    for number, _, _, state in chapters:
        if state not in STATES or number not in known:
            raise ValueError(
                f"chapter {number} in state {state!r} has no place: numbers are 0 to {max(known)}, "
                f"states {' and '.join(STATES)}"
            )
    columns = [[c for c in chapters if c[0] in numbers] for _, _, numbers in THEMES]
    tallest = max(len(column) for column in columns)
    width, box, pitch = 2.2, 1.0, 1.22  # of a column; height of a box; from box to box
    sheet = _Sheet(10.0, 1.75 + pitch * max(tallest, 1) + 0.1)
    top = sheet.axes.get_ylim()[1] - 1.75

    start = [c for c in chapters if c[0] == 0]
    if start:
        _draw_chapter(sheet, start[0], 0.25, top + 0.85, 9.5, 0.66, GREY)
        sheet.arrow((0.25 + width / 2, top + 0.85), (0.25 + width / 2, top + 0.55))
    way_in = None
    for i, ((theme, colour, _), column) in enumerate(zip(THEMES, columns)):
        x = 0.25 + i * (width + 0.233)
        sheet.text(x + width / 2, top + 0.34, theme, 16, colour=ink(colour), weight="bold")
        for row, chapter in enumerate(column):
            y = top - row * pitch - box + 0.1
            _draw_chapter(sheet, chapter, x, y, width, box, colour)
            if row:
                sheet.arrow((x + width / 2, y + pitch), (x + width / 2, y + box))
            elif way_in:  # from the end of the theme before, through the space between the columns
                turn = x - 0.19
                sheet.arrow(way_in, (turn, way_in[1]), (turn, y + box / 2), (x, y + box / 2))
            way_in = (x + width, y + box / 2)
    if any(state == "planned" for *_, state in chapters):
        sheet.text(9.8, 0.32, "dashed: planned", SMALL, "right", colour=GREY)
    said = "; ".join(f"{number:02d} {title} ({state})" for number, title, _, state in chapters)
    return finish(sheet.axes, f"The chapters of the course, in reading order: {said}.")


def _draw_chapter(
    sheet: _Sheet,
    chapter: tuple[int, str, str, str],
    x: float,
    y: float,
    width: float,
    height: float,
    colour: str,
) -> None:
    number, title, builds, state = chapter
    ready = state == "ready"
    fill = tint(colour, 0.2) if ready else PAPER
    sheet.box(x, y, width, height, fill=fill, edge=colour if ready else EDGE, dashed=not ready)
    sheet.badge(x + 0.04, y + height - 0.04, f"{number:02d}", ink(colour) if ready else GREY)
    # In inches: the widths of a letter of SMALL text, bold and plain.
    lines = [(words, "bold") for words in textwrap.wrap(title, int((width - 0.2) / 0.112))]
    lines += [(words, "normal") for words in textwrap.wrap(builds, int((width - 0.2) / 0.095))]
    for i, (words, weight) in enumerate(lines):
        middle = y + height / 2 + 0.205 * ((len(lines) - 1) / 2 - i)
        sheet.text(x + width / 2, middle, words, SMALL, colour=INK if ready else GREY, weight=weight)


class _Sheet:
    """Axes in inches, from the bottom left, and the few shapes that the drawings are made of."""

    def __init__(self, width: float, height: float):
        figure = new_figure(width, height)
        self.axes: Axes = figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(0, height)
        self.axes.set_axis_off()

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = BODY,
        align: str = "center",
        *,
        colour: str = INK,
        weight: str = "normal",
        up: str = "center",
    ) -> float:
        """Writes `text`; returns where it ends on the right."""
        written = self.axes.text(
            x,
            y,
            text,
            fontsize=size,
            ha=align,
            va=up,
            color=colour,
            weight=weight,
            zorder=6,
            linespacing=1.15,
        )
        return written.get_window_extent(self.axes.figure.canvas.get_renderer()).x1 / self.axes.figure.dpi

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        *,
        fill: str = PAPER,
        edge: str | None = None,
        colour: str = INK,
        weight: str = "normal",
        size: float = BODY,
        dashed: bool = False,
    ) -> None:
        """A box with rounded corners and its text in the middle."""
        self.axes.add_patch(
            FancyBboxPatch(
                (x + 0.07, y + 0.07),
                width - 0.14,
                height - 0.14,
                boxstyle="round,pad=0.07",
                facecolor=fill,
                edgecolor=edge or (fill if fill not in (PAPER, PALE) else EDGE),
                linewidth=1.6,
                linestyle=(0, (4, 3)) if dashed else "solid",
                zorder=3,
            )
        )
        if text:
            self.text(x + width / 2, y + height / 2, text, size, colour=colour, weight=weight)

    def panel(self, x: float, y: float, width: float, height: float, colour: str, title: str) -> None:
        self.axes.add_patch(
            FancyBboxPatch(
                (x + 0.1, y + 0.1),
                width - 0.2,
                height - 0.2,
                boxstyle="round,pad=0.1",
                facecolor=tint(colour, 0.06),
                edgecolor=tint(colour, 0.45),
                linewidth=1.6,
                zorder=1,
            )
        )
        self.text(x + 0.2, y + height - 0.27, title, 15, "left", weight="bold")

    def frame(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: str,
        *,
        fill: str = "none",
        dashed: bool = True,
    ) -> None:
        self.axes.add_patch(
            FancyBboxPatch(
                (x + 0.05, y + 0.05),
                width - 0.1,
                height - 0.1,
                boxstyle="round,pad=0.05",
                facecolor=fill,
                edgecolor=colour,
                linewidth=2.2 if dashed else 1.4,
                linestyle=(0, (3, 2)) if dashed else "solid",
                zorder=2,
            )
        )

    def cell(self, x: float, y: float, side: float, lit: bool) -> None:
        """One expert."""
        self.axes.add_patch(
            Rectangle((x, y), side, side, facecolor=ACTIVE if lit else "#D3D8DF", linewidth=0, zorder=4)
        ).set_gid("expert at work" if lit else "expert")

    def badge(self, x: float, y: float, text: str, colour: str) -> None:
        """A number in a disc."""
        self.axes.add_patch(Circle((x, y), 0.19, facecolor=colour, edgecolor=PAPER, linewidth=2, zorder=5))
        self.text(x, y - 0.005, text, SMALL, colour=PAPER, weight="bold")

    def plus(self, x: float, y: float) -> None:
        """An addition."""
        self.axes.add_patch(Circle((x, y), 0.17, facecolor=PAPER, edgecolor=INK, linewidth=1.8, zorder=4))
        for dx, dy in ((0.1, 0), (0, 0.1)):
            self.axes.plot([x - dx, x + dx], [y - dy, y + dy], color=INK, linewidth=1.8, zorder=5)

    def line(self, points: Sequence[tuple[float, float]], *, width: float = 1.8, colour: str = INK) -> None:
        xs, ys = zip(*points)
        self.axes.plot(xs, ys, color=colour, linewidth=width, solid_joinstyle="round", zorder=2)

    def arrow(
        self,
        *points: tuple[float, float],
        text: str = "",
        below: str = "",
        at: float = 0.5,
        colour: str = INK,
    ) -> None:
        """An arrow along `points`; `text` above and `below` its only segment, `at` this fraction of it."""
        if len(points) > 2:
            self.line(points[:-1], colour=colour)
        self.axes.add_patch(
            FancyArrowPatch(
                points[-2],
                points[-1],
                arrowstyle="-|>,head_width=3.2,head_length=6",
                shrinkA=0,
                shrinkB=0,
                linewidth=1.8,
                color=colour,
                joinstyle="miter",
                zorder=2.5,
            )
        )
        (x0, y0), (x1, y1) = points[-2:]
        x, y = x0 + at * (x1 - x0), y0 + at * (y1 - y0)
        for words, side, up in ((text, 0.05, "bottom"), (below, -0.07, "top")):
            if words:
                self.text(x, y + side, words, SMALL, up=up)
