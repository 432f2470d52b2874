"""Chapter 08 in pictures: who works and who starves, over a run, under each balance loss; a simulator."""

# E routed experts   G devices   S steps looked at

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import ipywidgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv2.viz import style
from dsv2.viz.balance_simulation import (
    CHOSEN,
    DEVICES,
    EXPERTS,
    STEPS,
    TOKENS,
    BalanceSimulation,
    simulate_balance,
)
from dsv2.viz.plots import _device_edges
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, margins, new_axes, new_figure
from dsv2.viz.widgets import Explorer, in_columns

STARVED = 0.1  # of the fair share: an expert below it hardly works
CONDITION_COLOURS = {
    "none": style.GREY,
    "expert": style.ORANGE,
    "device": style.GREEN,
    "communication": style.PURPLE,
    "all three": style.CACHED,
}
ALPHAS = (0.0, 0.003, 0.01, 0.02, 0.05, 0.1, 0.3)
DEVICE_COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE)


def fair_shares(loads: Any) -> np.ndarray:
    """Loads (..., E) as multiples of the fair share: 1 for all at perfect balance."""
    loads = np.asarray(loads, dtype=float)
    if loads.ndim < 1 or not loads.size or (loads.sum(axis=-1) <= 0).any():
        raise ValueError("loads must be counts by expert, (..., experts), of at least one choice")
    return loads / loads.mean(axis=-1, keepdims=True)


def starved(loads: Any) -> np.ndarray:
    """(...,): how many of the experts in loads (..., E) get less than a tenth of the fair share."""
    return np.asarray((fair_shares(loads) < STARVED).sum(axis=-1))


# ------------------------------------------------------------------------------------------------ who works


def load_bars(loads: Mapping[str, Sequence[float]], devices: int = 1) -> Figure:
    """How busy each expert is, in multiples of the fair share, a panel for each name; 1 to 4 of them.

    loads: by name, the counts of each expert. Experts of one device stand together.
    """
    if not 1 <= len(loads) <= 4:
        raise ValueError(f"loads has {len(loads)} names; 1 to 4 fit")
    shares = {name: fair_shares(counts) for name, counts in loads.items()}
    experts = len(next(iter(shares.values())))
    edges, columns = _device_edges(experts, devices)
    centres = edges[columns] + 0.5
    figure = new_figure(10.0, 1.2 + 1.85 * len(shares))
    panels = figure.subplots(len(shares), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    margins(figure, left=1.0, right=0.3, bottom=0.85, top=0.5, hspace=0.42)
    top = max(share.max() for share in shares.values())
    for panel, (name, share) in zip(panels, shares.items()):
        style.style_axes(panel)
        colours = [style.ACTIVE if s > 1 else style.ORANGE for s in share]
        panel.bar(centres, share, width=0.82, color=colours)
        low = share < STARVED
        panel.plot(
            centres[low], np.full(low.sum(), -0.045 * top), "x", color=INK, ms=8, mew=2.2, clip_on=False
        )
        panel.axhline(1, color=INK, linewidth=2.5, linestyle=(0, (4, 2)))
        panel.set_title(
            f"{name}: {low.sum()} of {experts} experts starve, the busiest has {share.max():.1f}x",
            fontsize=BASE,
            color=INK,
            loc="left",
            pad=5,
        )
        panel.set_ylim(-0.09 * top, 1.08 * top)
        panel.yaxis.set_major_locator(MaxNLocator(3))
        panel.set_xlim(edges[0] - 0.3, edges[-1] + 0.3)
    last = panels[-1]
    if devices > 1:
        middles = centres.reshape(devices, -1).mean(axis=1)
        last.set_xticks(middles, [str(device) for device in range(devices)], fontsize=BASE)
        label(last, "device, with its experts side by side")
    else:
        last.set_xticks(centres[:: max(1, experts // 8)], range(0, experts, max(1, experts // 8)))
        label(last, "routed expert (number)")
    last.annotate(
        "dashed: fair share; x: below a tenth of it",
        (1, 0),
        xycoords="axes fraction",
        xytext=(0, -30),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=SMALL,
        color=INK,
    )
    last.xaxis.label.set_horizontalalignment("left")
    last.xaxis.label.set_x(0.0)
    figure.supylabel("load / fair share", fontsize=BASE, color=INK, x=0.012)
    said = "; ".join(
        f"{name}: {(share < STARVED).sum()} of {experts} below a tenth, busiest {share.max():.1f}x"
        for name, share in shares.items()
    )
    return finish(figure, f"Loads of {experts} experts against the fair share. {said}.")


def load_history(runs: Mapping[str, tuple[Sequence[int], Sequence[Sequence[float]]]]) -> Figure:
    """Every expert's load over the steps of a run, a panel for each of 1 to 3 runs: a row is an expert.

    runs: by name, (steps, loads), loads by step and expert. The rows are in the order of the load at the end.
    Grey: below a tenth of the fair share.
    """
    if not 1 <= len(runs) <= 3:
        raise ValueError(f"runs has {len(runs)} names; 1 to 3 fit")
    figure = new_figure(10.0, 4.6)
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    margins(figure, left=0.95, right=1.45, bottom=0.8, top=0.6, wspace=0.14)
    norm, said = Normalize(STARVED, 3.0), []
    for number, (panel, (name, (steps, loads))) in enumerate(zip(panels, runs.items())):
        share = fair_shares(loads)
        share = share[:, np.argsort(-share[-1], kind="stable")]
        steps = np.asarray(steps, dtype=float)
        edges = np.concatenate([steps[:1], (steps[1:] + steps[:-1]) / 2, steps[-1:]])
        mesh = panel.pcolormesh(
            edges, np.arange(share.shape[1] + 1), share.T, cmap=style.GLOW, norm=norm, rasterized=True
        )
        panel.invert_yaxis()
        style.style_axes(panel, None)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.set_yticks([])
        count = int((share[-1] < STARVED).sum())
        label(panel, "step", "expert, busiest on top" if not number else None, f"{name}: {count} starve")
        said.append(f"{name}: {int((share[0] < STARVED).sum())} at first, {count} at the end")
    width, height = figure.get_size_inches()
    bar = figure.add_axes((1 - 1.2 / width, 0.8 / height, 0.22 / width, 1 - 1.4 / height))
    colours = figure.colorbar(mesh, cax=bar, extend="both", ticks=[STARVED, 1, 2, 3])
    colours.ax.set_yticklabels(["0.1", "1", "2", "3"], fontsize=SMALL)
    colours.outline.set_visible(False)
    colours.set_label("load / fair share", fontsize=BASE, color=INK)
    return finish(figure, f"Experts below a tenth of their fair share over a run. {'; '.join(said)}.")


# ------------------------------------------------------------------------------------- the stored runs


def starved_curves(runs: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> Figure:
    """The share of experts that starve, over the steps, by the losses switched on: mean and range of seeds.

    runs: as in `data/runs/balance.json`, each with name, steps and loads (by step, layer and expert).
    """
    found = _by_name(runs, names)
    ax = new_axes(None, 10.0, 4.8, left=1.0, right=2.1, bottom=0.8, top=0.3)
    said, ends = [], {}
    for name, group in found.items():
        shares = np.array([100 * (fair_shares(run["loads"]) < STARVED).mean(axis=(1, 2)) for run in group])
        steps, colour = group[0]["steps"], _colour(name)
        ax.fill_between(steps, shares.min(axis=0), shares.max(axis=0), color=colour, alpha=0.22, linewidth=0)
        ax.plot(steps, shares.mean(axis=0), color=colour, linewidth=LINE, label=name)
        ends[name] = shares[:, -1].mean()
        low, high = shares[:, -1].min(), shares[:, -1].max()
        said.append(f"{name} {ends[name]:.0f} % ({low:.0f} to {high:.0f})")
    ax.set_ylim(-1.5, None)
    ax.set_xlim(0, max(run["steps"][-1] for run in runs))
    _end_labels(ax, ends)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    label(ax, "step", "experts below a tenth of their share")
    return finish(ax, f"Share of experts below a tenth of the fair share at the end: {'; '.join(said)}.")


def balance_outcomes(stored: Mapping[str, Any]) -> Figure:
    """How runs ended, a dot for each seed: experts that starve, busiest device, what is dropped, the loss.

    stored: `data/runs/balance.json`.
    """
    found, model = _by_name(stored["runs"], None), stored["model"]
    measures = {
        "experts that\nstarve (%)": lambda run: 100 * float((fair_shares(run["loads"][-1]) < STARVED).mean()),
        "busiest device:\ntokens / aim": lambda run: busiest_device(run, model),
        "pairs over the\nbudget (%)": lambda run: 100 * float(np.mean(run["dropped"])),
        "validation loss\n(nats per byte)": lambda run: run["val_nats_per_byte"],
    }
    figure = new_figure(10.0, 4.3)
    panels = figure.subplots(1, len(measures), sharey=True)
    margins(figure, left=1.75, right=0.3, bottom=1.0, top=0.25, wspace=0.16)
    said = []
    for panel, (what, measure) in zip(panels, measures.items()):
        style.style_axes(panel, "x")
        for row, (name, group) in enumerate(found.items()):
            values = [measure(run) for run in group]
            panel.plot(values, [row] * len(values), "o", color=_colour(name), ms=9, alpha=0.75, mec="none")
            panel.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=2.5)
            plain = what.replace("\n", " ")
            said.append(f"{plain}, {name}: {np.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})")
        low, high = panel.get_xlim()
        panel.set_xlim(low if "loss" in what else min(0, low), high + 0.08 * (high - low))
        if "aim" in what:
            panel.axvline(1, color=INK, linewidth=2, linestyle=(0, (4, 3)), zorder=0)
        panel.xaxis.set_major_locator(MaxNLocator(3))
        panel.set_xlabel(what, fontsize=SMALL, color=INK)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(found)), list(found), fontsize=BASE)
    panels[0].set_ylim(len(found) - 0.4, -0.6)
    return finish(figure, "How the runs ended, mean (least to most). " + "; ".join(said) + ".")


def busiest_device(run: Mapping[str, Any], model: Mapping[str, Any]) -> float:
    """The most tokens that a device receives at the end over the aim M T / D, the mean over the layers.

    run: as in `data/runs/balance.json`. model: the fields of its `DSV2Config`.
    """
    received = np.asarray(run["received"], dtype=float)
    tokens = np.sum(run["loads"][-1], axis=-1) / model["num_experts_per_tok"]
    aim = model["topk_group"] * tokens / received.shape[1]
    return float((received.max(axis=1) / aim).mean())


def _by_name(
    runs: Sequence[Mapping[str, Any]], names: Sequence[str] | None
) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["name"], []).append(run)
    if not found:
        raise ValueError("runs is empty")
    unknown = sorted(set(names or ()) - set(found))
    if unknown:
        raise ValueError(f"no run is called {', '.join(unknown)}; there are {', '.join(found)}")
    return {name: found[name] for name in (names or found)}


def _colour(name: str) -> str:
    return CONDITION_COLOURS.get(name, style.SKY)


def _end_labels(ax: Axes, ends: Mapping[str, float]) -> None:
    """Names at the right of the lines' ends, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    gap, place = 0.075 * (high - low), -np.inf
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
            color=style.ink(_colour(name)),
            annotation_clip=False,
        )


# ------------------------------------------------------------------------------------------ the simulator


def balance_explorer(
    expert: float = 0.0, device: float = 0.0, communication: float = 0.0, shared: float = 1.0, seed: int = 0
) -> Explorer:
    """Sliders for the three alphas -> a router learns anew: loads, tokens a device, what each loss says.

    shared: how much all tokens have in common; seed: other tokens, other first weights.
    """
    for name, alpha in (("expert", expert), ("device", device), ("communication", communication)):
        if alpha not in ALPHAS:
            raise ValueError(f"{name}={alpha} must be one of {', '.join(map(str, ALPHAS))}")
    about = {"style": {"description_width": "185px"}, "layout": ipywidgets.Layout(width="480px")}
    options = [(f"{alpha:g}", alpha) for alpha in ALPHAS]
    controls = {
        name: ipywidgets.SelectionSlider(options=options, value=alpha, description=text, **about)
        for name, alpha, text in (
            ("expert", expert, "alpha 1: experts"),
            ("device", device, "alpha 2: devices"),
            ("communication", communication, "alpha 3: communication"),
        )
    }
    controls["shared"] = ipywidgets.FloatSlider(
        value=shared, min=0, max=1.25, step=0.25, description="shared part of tokens", **about
    )
    controls["seed"] = ipywidgets.IntSlider(value=seed, min=0, max=9, description="seed", **about)
    explorer = Explorer(
        lambda figure=None, **values: simulation_figure(_simulated(**values), figure),
        caption=lambda **values: simulation_caption(_simulated(**values)),
        **controls,
    )
    columns = (["expert", "device", "communication"], ["shared", "seed"])
    return in_columns(explorer, *columns, reset_below=1)


@lru_cache(maxsize=64)
def _simulated(
    expert: float, device: float, communication: float, shared: float, seed: int
) -> BalanceSimulation:
    return simulate_balance(expert, device, communication, shared=shared, seed=seed)


def simulation_figure(sim: BalanceSimulation, figure: Figure | None = None) -> Figure:
    """Loads at the end by expert and device, tokens a device receives, both losses and loads over the steps.

    figure: one made by this function, whose artists are moved; None: a new one.
    """
    if figure is None:
        figure = _new_simulation_figure(sim)
    parts = figure.parts
    share, first = sim.loads[-1] / sim.fair_load, sim.loads[0] / sim.fair_load
    for bar, height in zip(parts["loads"], share):
        bar.set_height(height)
    parts["start"].set_ydata(first)
    low = share < STARVED
    parts["starved"].set_data(parts["centres"][low], np.full(low.sum(), -0.28))
    parts["loads_title"].set_text(f"choices of an expert: {low.sum()} of {EXPERTS} starve")
    for bar, height in zip(parts["received"], sim.received[-1]):
        bar.set_height(height)
    parts["received_title"].set_text(f"tokens received: {sim.received[-1].max()} at most")
    for line, path in zip(parts["paths"], (sim.loads / sim.fair_load).T):
        line.set_data(sim.steps, path)
    for line, path in zip(parts["losses"], sim.losses.T):
        line.set_data(sim.steps, path)
    return finish(figure, simulation_text(sim))


def simulation_text(sim: BalanceSimulation) -> str:
    """The end of a simulation in words."""
    share = sim.loads[-1] / sim.fair_load
    expert, device, communication = sim.losses[-1]
    return (
        f"After {sim.steps[-1]} steps {(share < STARVED).sum()} of {EXPERTS} experts get less than a tenth "
        f"of their fair share (before the first: {(sim.loads[0] / sim.fair_load < STARVED).sum()}); the "
        f"busiest gets {share.max():.1f} times it. The devices receive "
        f"{', '.join(map(str, sim.received[-1]))} tokens, the aim is {sim.aim:.0f}. At alpha 1 the losses "
        f"say {expert:.2f} (expert), {device:.2f} (device) and {communication:.2f} (communication). Squared "
        f"error {sim.errors[-1]:.2f}."
    )


def simulation_caption(sim: BalanceSimulation) -> str:
    """The same for below the figure, what matters most in bold."""
    count = f"{(sim.loads[-1] / sim.fair_load < STARVED).sum()} of {EXPERTS}"
    text = simulation_text(sim).replace(count, f"<b>{count}</b>", 1)
    return f"<div style='max-width:1040px'>{text}</div>"


def _new_simulation_figure(sim: BalanceSimulation) -> Figure:
    figure = new_figure(10.4, 6.6)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.75, 1), height_ratios=(1, 1))
    margins(figure, left=0.85, right=0.3, bottom=0.75, top=0.55, wspace=0.25, hspace=0.55)
    loads, received, paths, losses = (figure.add_subplot(grid[i, j]) for i in (0, 1) for j in (0, 1))
    for panel in (loads, received, paths, losses):
        style.style_axes(panel)
    edges, columns = _device_edges(EXPERTS, DEVICES)
    centres = edges[columns] + 0.5
    colours = [DEVICE_COLOURS[number // (EXPERTS // DEVICES)] for number in range(EXPERTS)]
    zero = np.zeros(EXPERTS)
    parts: dict[str, Any] = {"centres": centres}
    dashed = {"color": INK, "linewidth": 2.5, "linestyle": (0, (4, 2))}

    parts["loads"] = loads.bar(centres, zero, width=0.82, color=colours)
    (parts["start"],) = loads.plot(centres, zero, "_", color=style.GREY, ms=17, mew=3)
    (parts["starved"],) = loads.plot([], [], "x", color=INK, ms=9, mew=2.4, clip_on=False)
    loads.axhline(1, **dashed)
    loads.set_ylim(-0.5, EXPERTS / CHOSEN + 0.1)
    loads.set_yticks(range(6))
    middles = centres.reshape(DEVICES, -1).mean(axis=1)
    loads.set_xticks(middles, [f"device {number}" for number in range(DEVICES)], fontsize=SMALL)
    label(loads, "grey: before training; x: less than a tenth of the fair share", "load / fair share", " ")
    loads.xaxis.label.set_fontsize(SMALL)
    parts["loads_title"] = loads._left_title

    parts["received"] = received.bar(range(DEVICES), [0] * DEVICES, width=0.72, color=DEVICE_COLOURS)
    received.axhline(sim.aim, **dashed)
    received.set_ylim(0, TOKENS * 1.04)
    received.set_yticks([0, 48, 96, 144, 192])
    received.set_xticks(range(DEVICES))
    label(received, "device", "tokens", " ")
    parts["received_title"] = received._left_title
    received._left_title.set_x(-0.17)

    parts["paths"] = [paths.plot([], [], color=colour, linewidth=2)[0] for colour in colours]
    paths.axhline(1, **dashed)
    paths.set_xlim(0, STEPS)
    paths.set_ylim(0, EXPERTS / CHOSEN + 0.1)
    paths.set_yticks(range(6))
    label(paths, "step", "load / fair share", "each expert over the steps")

    names = ("expert", "device", "communication")
    shades = [CONDITION_COLOURS[name] for name in names]
    widths = (4.5, 3.5, 2.5)
    parts["losses"] = [
        losses.plot([], [], color=colour, linewidth=width, label=name)[0]
        for name, colour, width in zip(names, shades, widths)
    ]
    losses.axhline(1, **dashed)
    losses.set_xlim(0, STEPS)
    losses.set_ylim(0.5, 5.0)
    losses.legend(
        loc="lower left",
        bbox_to_anchor=(-0.25, 0.98),
        ncols=3,
        frameon=False,
        fontsize=SMALL,
        handlelength=0.8,
        handletextpad=0.35,
        columnspacing=0.8,
    )
    label(losses, "step", "loss at alpha 1")
    figure.parts = parts
    return figure
