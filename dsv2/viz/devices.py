"""Chapter 07 in pictures: messages between devices, how many devices tokens reach, traffic, what M costs."""

# T tokens   E routed experts   K experts per token   G devices   M devices per token

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import ipywidgets
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dsv2.moe.parallel import HIDDEN, Inbox, Placement
from dsv2.moe.routing import device_limited_top_k
from dsv2.viz import style
from dsv2.viz.plots import human_bytes
from dsv2.viz.style import BASE, INK, SMALL, finish, label, margins, new_axes, new_figure
from dsv2.viz.widgets import Explorer, in_columns

DEVICE_COLOURS = (
    *(style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE),
    *(style.ORANGE, style.SKY, style.GREY, INK),
)

# ------------------------------------------------------------------------------------------ the messages


def message_drawing(
    inboxes: Sequence[Inbox], sizes: Sequence[int], placement: Placement, texts: Sequence[str] | None = None
) -> Figure:
    """An all-to-all, message by message: tokens at home, every device's inbox and work, and the way back.

    inboxes: of all devices, as `FakeDevices` has them after a run. sizes: how many tokens each device holds.
    texts: of all tokens, in order; None: their numbers. A line is one hidden state; dotted, it stays on its
    device.
    """
    devices = placement.devices
    if len(inboxes) != devices or len(sizes) != devices:
        raise ValueError(f"there are {devices} devices, {len(inboxes)} inboxes and {len(sizes)} sizes")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    names = [str(t) for t in range(starts[-1])] if texts is None else list(texts)
    letters = [list(inbox.messages()) for inbox in inboxes]
    rows = [max(size, len(got), 1) for size, got in zip(sizes, letters)]
    height = sum(rows) + 1.1 * devices
    figure = new_figure(11.2, 0.75 + 0.34 * height)
    ax = figure.add_subplot()
    margins(figure, left=0.1, right=0.1, bottom=0.1, top=0.55)
    ax.set_axis_off()
    ax.set_xlim(0, 11)
    ax.set_ylim(height, 0)
    left, middle, right = 1.6, 5.5, 9.4
    at: dict[int, float] = {}
    tops, y = [], 0.0
    for device in range(devices):
        tops.append(y)
        colour = DEVICE_COLOURS[device]
        held = _numbers(placement.experts_on(device))
        for x, width, title in (
            (left, 2.5, f"device {device}"),
            (middle, 3.1, f"device {device}: experts {held}"),
            (right, 2.5, f"device {device}"),
        ):
            box = (x - width / 2, y + 0.05)
            ax.add_patch(
                FancyBboxPatch(
                    box,
                    width,
                    rows[device] + 0.7,
                    boxstyle="round,pad=0.02,rounding_size=0.12",
                    facecolor=style.tint(colour, 0.08),
                    edgecolor=colour,
                    linewidth=1.6,
                )
            )
            _say(ax, x, y + 0.42, title, colour=style.ink(colour), weight="bold")
        for place, t in enumerate(range(starts[device], starts[device + 1])):
            at[t] = y + 1.1 + place
        y += rows[device] + 1.1
    for device, size in enumerate(sizes):
        for t in range(starts[device], starts[device] + size):
            for x in (left, right):
                _say(ax, x, at[t], f"token {names[t]}")
    sent = 0
    for device, got in enumerate(letters):
        for place, (source, token, ids, _) in enumerate(got):
            t, line = starts[source] + token, tops[device] + 1.1 + place
            asked = f"expert{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}"
            _say(ax, middle, line, f"{names[t]}: {asked}")
            stays = source == device
            sent += not stays
            drawn = {"color": DEVICE_COLOURS[source], "linewidth": 1.4 if stays else 2.4}
            drawn |= {"linestyle": (0, (1, 2)) if stays else "-", "alpha": 0.9}
            for start, end in (
                ((left + 1.25, at[t]), (middle - 1.55, line)),
                ((middle + 1.55, line), (right - 1.25, at[t])),
            ):
                ax.add_patch(
                    FancyArrowPatch(
                        start, end, arrowstyle="-|>", mutation_scale=13, shrinkA=0, shrinkB=0, **drawn
                    )
                )
    for x, title in (
        (left, "tokens at home"),
        (middle, "inboxes, and the experts' work"),
        (right, "added up at home"),
    ):
        ax.annotate(
            title, (x, 0), xytext=(0, 12), textcoords="offset points", ha="center", fontsize=BASE,
            fontweight="bold", color=INK, annotation_clip=False,
        )  # fmt: skip
    stay = sum(map(len, letters)) - sent
    return finish(
        figure,
        f"{starts[-1]} tokens on {devices} devices: {sent} hidden states are sent to other devices, and as "
        f"many come back; {stay} stay on their own.",
    )


def _numbers(experts: Sequence[int]) -> str:
    """Which experts: "3 to 5" for neighbours."""
    if len(experts) > 2 and experts[-1] - experts[0] == len(experts) - 1:
        return f"{experts[0]} to {experts[-1]}"
    return ", ".join(map(str, experts)) or "none"


def _say(ax: Axes, x: float, y: float, text: str, colour: str = INK, weight: str = "normal") -> None:
    about = {"fontsize": SMALL, "color": colour, "fontweight": weight, "parse_math": False}
    ax.text(x, y, text, ha="center", va="center", **about)


# ----------------------------------------------------------------------------------- how many devices


def chance_reach(n_experts: int, devices: int, k: int) -> float:
    """Devices reached by k different experts, every set of k equally likely: the mean.

    Raises ValueError where experts do not split evenly.
    """
    if n_experts % devices:
        raise ValueError(
            f"experts must split evenly: n_experts={n_experts} is not a multiple of devices={devices}"
        )
    others = n_experts - n_experts // devices
    return devices * (1 - math.comb(others, k) / math.comb(n_experts, k))


def reach_shares(reach: Int[Tensor, " T"], devices: int) -> np.ndarray:
    """(G,): the share of tokens that reach exactly 1, 2, ... devices."""
    return (torch.bincount(reach.flatten(), minlength=devices + 1)[1:] / reach.numel()).numpy()


def reach_bars(reaches: Mapping[str, Int[Tensor, " T"]], devices: int, limit: int) -> Figure:
    """How many devices tokens reach without a limit; up to `limit` they would not notice one.

    reaches: by name, the devices that each token's experts are on.
    """
    if not reaches:
        raise ValueError("reaches is empty")
    ax = new_axes(None, 10.0, 4.4, left=0.95, right=0.3, bottom=0.8, top=0.3)
    width, said = 0.8 / len(reaches), []
    for number, (name, reach) in enumerate(reaches.items()):
        shares = 100 * reach_shares(reach, devices)
        place = np.arange(1, devices + 1) + (number - (len(reaches) - 1) / 2) * width
        within = shares[:limit].sum()
        colour = style.CYCLE[number]
        mean = float(reach.float().mean())
        ax.bar(
            place, shares, width=0.94 * width, color=colour, label=f"{name}: {within:.0f} % within {limit}"
        )
        said.append(f"{name}: mean {mean:.2f}, {within:.1f} % within {limit}")
    ax.axvline(limit + 0.5, color=INK, linewidth=2.5, linestyle=(0, (4, 2)))
    ax.legend(fontsize=SMALL, frameon=False, loc="upper left")
    ax.set_ylim(0, 1.32 * ax.get_ylim()[1])
    ax.set_xticks(range(1, devices + 1))
    label(ax, f"devices that a token's experts are on (dashed: a limit of {limit})", "tokens (%)")
    return finish(ax, f"Devices reached without a limit. {'; '.join(said)}.")


def limit_curves(means: Mapping[str, Mapping[int, float]], per_device: float) -> Figure:
    """Bytes sent for a token against M: by name, the mean number of devices reached for each M.

    per_device: bytes of one hidden state. Dashed: M times that, the bound.
    """
    if not means:
        raise ValueError("means is empty")
    ax = new_axes(None, 10.0, 4.6, left=1.25, right=2.7, bottom=0.8, top=0.3)
    most = max(max(curve) for curve in means.values())
    scale = 1000
    ax.plot(
        [1, most],
        [per_device / scale, most * per_device / scale],
        color=style.GREY,
        linewidth=2,
        linestyle=(0, (4, 2)),
    )
    ax.annotate(
        "M devices", (most, most * per_device / scale), xytext=(10, 0), textcoords="offset points",
        va="center", fontsize=BASE, color=style.GREY, annotation_clip=False,
    )  # fmt: skip
    named = {name: [v * per_device / scale for v in curve.values()] for name, curve in means.items()}
    style.measured_lines(ax, list(next(iter(means.values()))), named, markersize=9, gap=10)
    ax.set_xticks(range(1, most + 1))
    ax.set_ylim(0, None)
    label(ax, "M: devices that a token may be sent to", "KB sent for a token and layer")
    said = "; ".join(
        f"{name}: " + ", ".join(f"M = {m} {v * per_device / scale:.1f}" for m, v in curve.items())
        for name, curve in means.items()
    )
    return finish(ax, f"KB sent for a token. {said}.")


# ------------------------------------------------------------------------------------------- the bytes


def same_bytes(report: Mapping[str, Any]) -> Figure:
    """Bytes of hidden states from device to device: counted on real processes, and on fake devices.

    report: as `dsv2.bench.traffic.measure_traffic` gives it.
    """
    tables = {
        "real processes": sum(np.array(report["real"][kind]) for kind in HIDDEN),
        "fake devices": sum(np.array(report["fake"][kind]) for kind in HIDDEN),
    }
    devices = len(tables["fake devices"])
    figure = new_figure(10.0, 1.6 + 0.72 * devices)
    panels = figure.subplots(1, 2, sharey=True)
    margins(figure, left=1.0, right=0.3, bottom=0.8, top=0.55, wspace=0.08)
    top = max(table.max() for table in tables.values()) or 1
    for panel, (name, table) in zip(panels, tables.items()):
        style.style_axes(panel, None)
        shown = np.where(np.eye(devices, dtype=bool), -1.0, table)
        panel.imshow(shown, cmap=style.GLOW, vmin=0, vmax=1.9 * top, aspect="auto")
        for a in range(devices):
            for b in range(devices):
                text = "stays" if a == b else f"{table[a, b]:,}"
                panel.text(
                    b, a, text, ha="center", va="center", fontsize=BASE, color=style.GREY if a == b else INK
                )
        panel.set_xticks(range(devices))
        panel.set_yticks(range(devices))
        panel.tick_params(length=0)
        panel.spines[["left", "bottom"]].set_visible(False)
        label(
            panel,
            "to device",
            "from device" if panel is panels[0] else None,
            f"{name}: {table.sum():,} bytes",
        )
        panel._left_title.set_fontsize(BASE)
    same = "equal" if np.array_equal(*tables.values()) else "not equal"
    real, fake = (int(table.sum()) for table in tables.values())
    return finish(
        figure,
        f"Bytes of hidden states between {devices} devices: {real:,} on real processes, {fake:,} on fake "
        f"devices, {same} for every pair.",
    )


# ------------------------------------------------------------------------------------------ on real GPUs


def spread_losses(run: Mapping[str, Any]) -> Figure:
    """One run on one GPU and with its experts on several: losses, and how far they are apart.

    run: of `data/benchmarks/parallel_h100.json`. The yardstick is the same run on one GPU with its batch in
    parts, the same sums in another order.
    """
    losses = {name: np.array(values) for name, values in run["training"]["losses"].items()}
    one, parts, spread_out = losses.values()
    steps, many = np.arange(1, len(one) + 1), f"experts on {run['devices']} GPUs"
    figure = new_figure(11.0, 4.3)
    panels = figure.subplots(1, 2)
    margins(figure, left=1.0, right=0.3, bottom=0.8, top=0.55, wspace=0.3)
    panels[0].plot(steps, one, color=style.SKY, linewidth=7, label="one GPU")
    panels[0].plot(steps, spread_out, color=style.VERMILLION, linewidth=2, label=many)
    for values, colour, name in (
        (parts, style.GREY, "one GPU, batch in parts"),
        (spread_out, style.VERMILLION, many),
    ):
        apart = np.maximum(np.abs(values - one), 1e-6)  # to so many nats they are rounded
        panels[1].plot(steps, apart, color=colour, linewidth=2, label=name)
    panels[1].set_yscale("log")
    for panel in panels:
        style.style_axes(panel)
        panel.legend(
            fontsize=SMALL, frameon=False, loc="upper right" if panel is panels[0] else "lower right"
        )
    label(panels[0], "step", "loss (nats per token)")
    label(panels[1], "step", "distance from one GPU's loss (nats)")
    panels[1].yaxis.label.set_fontsize(SMALL)
    apart = " and ".join(
        f"{np.abs(values - one).mean():.4f} ({name})"
        for values, name in ((spread_out, many), (parts, "one GPU, batch in parts"))
    )
    return finish(figure, f"Mean distance from one GPU's loss over {len(one)} steps: {apart}.")


TIME_COLOURS = {
    "computing": style.BLUE,
    "both": style.PURPLE,
    "communicating": style.VERMILLION,
    "idle": style.tint(style.GREY, 0.35),
}
TIME_NAMES = {
    "computing": "computing",
    "both": "both at once",
    "communicating": "communicating, or waiting for another GPU",
    "idle": "waiting for Python",
}


def spread_times(run: Mapping[str, Any]) -> Figure:
    """Where the time of a training step goes, and tokens a second: on one GPU, and two ways on several.

    run: of `data/benchmarks/parallel_h100.json`. The bars' lengths are times for as many tokens on each
    GPU.
    """
    speed = run["speed"]
    tokens = speed["batch_size_each"] * speed["seq_len"]
    figure = new_figure(10.4, 1.5 + 0.85 * len(speed["rows"]))
    ax = figure.add_subplot()
    margins(figure, left=2.9, right=2.2, bottom=0.8, top=0.75)
    style.style_axes(ax, None)
    said = []
    names = {"one device": "one GPU", "weights spread": "{} GPUs, weights spread"}
    names["experts spread"] = "{} GPUs, experts spread"
    for place, row in enumerate(speed["rows"]):
        total = 1000 * tokens * row["devices"] / row["tokens_per_s"]
        left = 0.0
        for part, share in row["shares"].items():
            ax.barh(place, share * total, 0.62, left, color=TIME_COLOURS[part])
            left += share * total
        ax.text(
            left,
            place,
            f"  {row['tokens_per_s'] / 1000:,.0f}K tokens/s",
            va="center",
            fontsize=BASE,
            color=INK,
        )
        name = names[row["how"]].format(row["devices"])
        parts = ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items() if share >= 0.005)
        said.append(f"{name}: {row['tokens_per_s']:,} tokens/s, {parts}")
    ax.set_yticks(
        range(len(speed["rows"])), [names[row["how"]].format(row["devices"]) for row in speed["rows"]]
    )
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    label(ax, f"time of a step, {tokens:,} tokens on each GPU (ms)", None)
    handles = [Patch(color=TIME_COLOURS[part], label=text) for part, text in TIME_NAMES.items()]
    figure.legend(
        handles=handles, fontsize=SMALL, frameon=False, loc="upper center", ncols=4, handlelength=1.0,
        columnspacing=1.2, handletextpad=0.4,
    )  # fmt: skip
    return finish(figure, f"{'; '.join(said)}.")


# ----------------------------------------------------------------------------------------- what M costs


def limit_outcomes(stored: Mapping[str, Any]) -> Figure:
    """Loss at the end against M, and against the same seed's loss without a limit; a dot a seed.

    stored: `data/runs/device_limit.json`.
    """
    runs: dict[int, dict[int, float]] = {}
    for run in stored["runs"]:
        m = stored["models"][run["name"]]["topk_group"]
        runs.setdefault(m, {})[run["seed"]] = run["val_nats_per_byte"]
    for m, seed in ((m, seed) for m in runs for seed in set().union(*runs.values())):
        if seed not in runs[m]:
            raise ValueError(f"M = {m} has no run of seed {seed}: losses are compared within a seed")
    free = max(runs)
    figure = new_figure(10.4, 4.3)
    panels = figure.subplots(1, 2)
    margins(figure, left=1.15, right=0.3, bottom=0.8, top=0.55, wspace=0.34)
    places = {m: place for place, m in enumerate(sorted(runs))}
    said = []
    for panel, minus in zip(panels, (False, True)):
        style.style_axes(panel)
        for seed in sorted(runs[free]):
            values = [runs[m][seed] - (runs[free][seed] if minus else 0) for m in places]
            colour = style.CYCLE[seed % len(style.CYCLE)]
            panel.plot(
                list(places.values()), values, "o-", color=colour, ms=9, linewidth=1.6, label=f"seed {seed}"
            )
        means = {m: np.mean([runs[m][s] - (runs[free][s] if minus else 0) for s in runs[m]]) for m in places}
        for m, mean in means.items():
            panel.plot([places[m] - 0.25, places[m] + 0.25], [mean, mean], color=INK, linewidth=3)
        if minus:
            panel.axhline(0, color=style.GREY, linewidth=2)
            said = [f"M = {m} {mean:+.4f}" for m, mean in means.items()]
        panel.set_xticks(list(places.values()), [str(m) for m in places])
        panel.yaxis.set_major_locator(MaxNLocator(5))
        what = f"loss less that of M = {free}" if minus else "loss on unseen text"
        label(panel, f"M: devices a token may be sent to ({free}: no limit)", f"{what} (nats per byte)")
        panel.xaxis.label.set_fontsize(SMALL)
        panel.yaxis.label.set_fontsize(SMALL)
    about = {"handlelength": 1.2, "handletextpad": 0.4, "columnspacing": 1.2, "bbox_to_anchor": (0.5, 1.0)}
    panels[0].legend(fontsize=SMALL, frameon=False, loc="lower center", ncols=3, **about)
    return finish(figure, f"Mean over the seeds of the loss less that without a limit: {', '.join(said)}.")


# --------------------------------------------------------------------------------------------- the widget

EXPLORED_TOKENS = 4096  # on all devices together
HIDDEN_BYTES = 5120 * 2  # a hidden state of DeepSeek-V2, bf16
EXPLORED_EXPERTS = 96


PLACEMENTS = ("popular experts spread out", "popular experts together")


@lru_cache(maxsize=2)
def explored_scores(placement: str) -> Float[Tensor, "1 T E"]:
    """Affinities of the widget's tokens, experts in the order of the devices; one in eight is popular."""
    random = torch.Generator().manual_seed(5)
    logits = 1.5 * torch.randn(1, EXPLORED_TOKENS, EXPLORED_EXPERTS, generator=random)
    logits[..., : EXPLORED_EXPERTS // 8] += 1.5
    if placement == PLACEMENTS[0]:
        logits = logits.unflatten(-1, (8, -1)).mT.flatten(-2)  # every eighth is a popular one
    return logits.softmax(dim=-1)


def explored_traffic(devices: int, k: int, limit: int, placement: str) -> Int[Tensor, "G G"]:
    """Hidden states from each device to each other one, tokens being spread over the devices evenly."""
    made = device_limited_top_k(explored_scores(placement), k, devices, min(limit, devices))
    homes = made.expert_ids[0] * devices // EXPLORED_EXPERTS
    goes = torch.zeros(EXPLORED_TOKENS, devices, dtype=torch.long).scatter(1, homes, 1)
    own = torch.arange(EXPLORED_TOKENS) * devices // EXPLORED_TOKENS
    counts = torch.zeros(devices, devices, dtype=torch.long).index_add(0, own, goes)
    return counts - counts.diag().diag()


def traffic_explorer(
    devices: int = 8, k: int = 6, limit: int = 3, placement: str = PLACEMENTS[0]
) -> Explorer:
    """Controls for devices, K, M and placement -> devices in a ring, links as thick as their traffic.

    4,096 made-up tokens, 96 experts, hidden states of DeepSeek-V2's size: 5,120 numbers in bf16.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement={placement!r} must be one of {', '.join(PLACEMENTS)}")
    about = {"style": {"description_width": "170px"}, "layout": ipywidgets.Layout(width="470px")}

    def slider(value: int, most: int, text: str) -> ipywidgets.IntSlider:
        return ipywidgets.IntSlider(value=value, min=1, max=most, description=text, **about)

    controls = {
        "devices": ipywidgets.SelectionSlider(
            options=[2, 3, 4, 6, 8], value=devices, description="devices", **about
        ),
        "k": slider(k, 8, "K: experts a token"),
        "limit": slider(limit, 8, "M: devices a token"),
        "placement": ipywidgets.Dropdown(
            options=PLACEMENTS, value=placement, description="placement", **about
        ),
    }
    explorer = Explorer(
        lambda **values: traffic_figure(explored_traffic(**values)),
        caption=lambda **values: (
            f"<div style='max-width:1040px'>{traffic_text(explored_traffic(**values))}</div>"
        ),
        **controls,
    )
    columns = (["devices", "k"], ["limit", "placement"])
    return in_columns(explorer, *columns, reset_below=1)


def traffic_figure(rows: Int[Tensor, "G G"]) -> Figure:
    """Devices in a ring, an arrow from each to each other one, and bars of what each receives.

    rows: hidden states from each device, down, to each, across. Bytes are those of DeepSeek-V2's.
    """
    table = rows.numpy() * HIDDEN_BYTES / 1e6
    devices = len(table)
    figure = new_figure(10.6, 5.6)
    ring, bars = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.25, 1)})
    margins(figure, left=0.15, right=0.3, bottom=0.8, top=0.5, wspace=0.22)
    ring.set_axis_off()
    ring.set(xticks=[], yticks=[])
    ring.set_aspect("equal")
    ring.set_xlim(-1.35, 1.35)
    ring.set_ylim(-1.3, 1.3)
    angles = np.pi / 2 - 2 * np.pi * np.arange(devices) / devices
    places = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    received = table.sum(axis=0)
    busiest = int(received.argmax())
    widest = EXPLORED_TOKENS * HIDDEN_BYTES / 1e6 / devices  # every token of one device to another
    for a in range(devices):
        for b in range(devices):
            if a != b and table[a, b]:
                width = 11 * table[a, b] / widest
                head = f"simple,tail_width={width},head_width={width + 7},head_length={0.5 * width + 6}"
                ring.add_patch(
                    FancyArrowPatch(
                        places[a], places[b], connectionstyle="arc3,rad=0.12", arrowstyle=head,
                        mutation_scale=1, shrinkA=21, shrinkB=21, linewidth=0, alpha=0.55,
                        color=style.ACTIVE if b == busiest else style.CACHED, label=f"{a} to {b}",
                    )
                )  # fmt: skip
    for device, (x, y) in enumerate(places):
        colour = style.ACTIVE if device == busiest else style.CACHED
        ring.add_patch(Circle((x, y), 0.17, facecolor=style.PAPER, edgecolor=colour, linewidth=2.5, zorder=3))
        ring.text(x, y, str(device), ha="center", va="center", fontsize=BASE, color=INK, zorder=4)
    ring.set_title("links: what is sent to the experts", fontsize=BASE, color=INK)
    style.style_axes(bars, "x")
    colours = [style.ACTIVE if device == busiest else style.CACHED for device in range(devices)]
    bars.barh(range(devices), received, height=0.8, color=colours)
    bars.plot([received.mean()] * 2, [-0.5, devices - 0.5], color=INK, linewidth=2.5, linestyle=(0, (4, 2)))
    bars.set_ylim(devices - 0.5, -0.5)
    bars.set_yticks(range(devices))
    bars.set_xlim(0, 44)
    bars.tick_params(axis="y", length=0)
    label(bars, "MB received (dashed: mean)", "device", " ")
    return finish(figure, traffic_text(rows))


def traffic_text(rows: Int[Tensor, "G G"]) -> str:
    """The traffic in words."""
    total, received = int(rows.sum()), rows.sum(dim=0)
    share = float(received.max() / max(total, 1))
    return (
        f"{EXPLORED_TOKENS:,} tokens on {len(rows)} devices: {total:,} hidden states are sent, "
        f"{total / EXPLORED_TOKENS:.2f} a token, {human_bytes(total * HIDDEN_BYTES)}, and as many come back. "
        f"The busiest device, {int(received.argmax())}, receives {share:.0%} of them (even: "
        f"{1 / len(rows):.0%})."
    )
