"""Chapter 06 in pictures: how papers cut and choose experts, a playground of routers, what the runs gave."""

# T tokens   E routed experts   K experts per token   D hidden_size

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dsv2.moe import routing
from dsv2.moe.balance import dropped_share, load_variation
from dsv2.moe.routing import Routing
from dsv2.viz import style
from dsv2.viz.plots import _cross_dropped, _token_ticks, _weights
from dsv2.viz.style import BASE, INK, LINE, SMALL, finish, label, margins, new_axes, new_figure
from dsv2.viz.widgets import Explorer, in_columns

# Kinds of runs (dsv2.bench.routers), large experts before small ones, and a colour for each kind.
FAMILIES = {
    "one of 8": ("Switch",),
    "two of 16": ("GShard", "GLaM", "Mixtral"),
    "small experts": ("top-4 of 32", "3 of 31 + 1 shared", "6 of 62 + 2 shared"),
    "eight times the products": ("all experts",),
}
KIND_COLOURS = {
    "Switch": style.ORANGE,
    "GShard": style.GREEN,
    "GLaM": style.PURPLE,
    "Mixtral": style.VERMILLION,
    "top-4 of 32": style.BLUE,
    "3 of 31 + 1 shared": style.SKY,
    "6 of 62 + 2 shared": INK,
    "all experts": style.GREY,
}
DASHES = {"GShard": (0, (5, 1.5)), "Mixtral": (0, (1.5, 1)), "3 of 31 + 1 shared": (0, (5, 1.5))}
REFERENCE = "one FFN"

# -------------------------------------------------------------------------------------- how they are cut


@dataclass(frozen=True)
class Layout:
    """A layer's experts: how many are routed, their width, how many a token gets, how many are shared."""

    routed: int
    width: float
    chosen: int
    shared: int = 0

    @property
    def total(self) -> float:
        """Width of all experts together: what the parameters are proportional to."""
        return (self.routed + self.shared) * self.width

    @property
    def active(self) -> float:
        """Width of those that work for a token: what the products are proportional to."""
        return (self.chosen + self.shared) * self.width


def expert_layouts(layouts: Mapping[str, Layout]) -> Figure:
    """A bar for each way to cut a layer into experts: blocks are experts, lit are those of one token.

    Every bar's length is what the layer holds, and the lit length what one token is multiplied with. Which of
    the routed experts are lit is an example.
    """
    if not layouts:
        raise ValueError("layouts is empty")
    widest = max(layout.total for layout in layouts.values())
    ax = new_axes(None, 10.4, 0.9 + 0.72 * len(layouts), None, left=2.45, right=0.25, bottom=0.75, top=0.15)
    generator, said = np.random.default_rng(3), []
    for row, (name, layout) in enumerate(layouts.items()):
        lit = set(generator.choice(layout.routed, layout.chosen, replace=False).tolist())
        x = 0.0
        for number in range(layout.shared + layout.routed):
            shared = number < layout.shared
            colour = style.CACHED if shared else style.PALE
            if number - layout.shared in lit:
                colour = style.ACTIVE
            block = Rectangle((x, row - 0.36), layout.width, 0.72, facecolor=colour, edgecolor=style.PAPER)
            ax.add_patch(block)
            x += layout.width
        said.append(f"{name}: {layout.active:g} of {layout.total:g} units work")
    ax.set_xlim(0, widest)
    ax.set_ylim(len(layouts) - 0.5, -0.5)
    ax.set_yticks(range(len(layouts)), list(layouts), fontsize=BASE)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    label(ax, "width of the experts, in units   (red: chosen for a token; blue: shared, always at work)")
    ax.xaxis.label.set_fontsize(SMALL)
    return finish(ax, f"Layers cut into experts. {'; '.join(said)}.")


# ---------------------------------------------------------------------------------------- side by side


def routers_side_by_side(routings: Mapping[str, Routing], texts: Sequence[str], sequence: int = 0) -> Figure:
    """What several routers choose for the same tokens: a panel each, tokens across and experts down.

    routings: by name, over the same tokens and experts. texts: of the T tokens. Colour: weight; a cross:
    dropped.
    """
    if not routings:
        raise ValueError("routings is empty")
    tokens = len(texts)
    for name, made in routings.items():
        if made.expert_ids.shape[1] != tokens:
            raise ValueError(f"texts has {tokens} tokens, {name} is over {made.expert_ids.shape[1]}")
    experts = next(iter(routings.values())).n_experts
    columns = min(2, len(routings))
    rows = -(-len(routings) // columns)
    height = max(0.125 * experts, 1.0)
    figure = new_figure(11.4, 0.75 + rows * (0.62 + height))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    margins(figure, left=0.8, right=1.1, bottom=0.9, top=0.45, wspace=0.06, hspace=0.62 / height)
    said = []
    for panel, (name, made) in zip(panels.flat, routings.items()):
        _choices(panel, made, sequence, Normalize(0, 1))
        text = "nothing is dropped"
        if made.kept is not None:
            dropped = int((~made.kept[sequence]).sum())
            text = f"{dropped} of {made.kept[sequence].numel()} pairs dropped" if dropped else text
        panel.set_title(f"{name}: {text}", fontsize=BASE, color=INK, loc="left", pad=4)
        said.append(f"{name}: {made.expert_ids.shape[2]} experts a token, {text}")
    for panel in panels.flat[len(routings) :]:
        panel.set_visible(False)
    for panel in panels.flat[max(0, len(routings) - columns) : len(routings)]:  # the lowest of each column
        _token_ticks(panel, texts)
        panel.tick_params(labelbottom=True)
        label(panel, "token")
    for panel in panels[:, 0]:
        label(panel, None, "expert")
        panel.set_yticks(range(0, experts, max(2, experts // 4)))
    beside = figure.add_axes((1 - 0.95 / figure.get_size_inches()[0], 0.2, 0.018, 0.6))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), style.GLOW), cax=beside, ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, length=3, colors=INK)
    bar.set_label("weight", fontsize=SMALL, color=INK)
    return finish(figure, f"Routers on {tokens} tokens and {experts} experts. {'; '.join(said)}.")


def _choices(ax: Axes, made: Routing, sequence: int, norm: Normalize) -> None:
    experts, tokens = made.n_experts, made.expert_ids.shape[1]
    style.style_axes(ax, None)
    grid = _weights(made, sequence, np.arange(experts), experts)
    ax.pcolormesh(
        np.arange(tokens + 1) - 0.5,
        np.arange(experts + 1) - 0.5,
        grid.T,
        cmap=style.GLOW,
        norm=norm,
        edgecolors=style.PAPER,
        linewidth=0.8,
    )
    _cross_dropped(ax, made, sequence, np.arange(experts))
    ax.set_ylim(experts - 0.5, -0.5)
    ax.tick_params(axis="both", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)


# ------------------------------------------------------------------------------------------ a playground

Play = Callable[[Tensor, int, float, torch.Generator], Routing]

# By name: a routing of affinities (1, T, E), with K, the capacity factor and a source of chance.
PLAYED: dict[str, Play] = {
    "DeepSeek: the K best": lambda scores, k, factor, chance: routing.top_k(scores, k),
    "Switch: the best": lambda scores, k, factor, chance: routing.switch(scores, factor),
    "GShard: two, the second by chance": lambda scores, k, factor, chance: routing.gshard(
        scores, factor, by_chance=True, generator=chance
    ),
    "GLaM: two": lambda scores, k, factor, chance: routing.glam(scores, factor),
    "Mixtral: two, without capacity": lambda scores, k, factor, chance: routing.mixtral(scores),
    "all experts": lambda scores, k, factor, chance: routing.dense(scores),
}


def play(
    states: Float[Tensor, "T D"],
    router: str,
    experts: int,
    k: int,
    temperature: float,
    capacity_factor: float,
    seed: int = 0,
) -> Routing:
    """Route tokens with random centroids: affinities are the softmax of (u_t^T e_i) / temperature.

    The products are scaled so that they vary by 1.5 over the experts at a temperature of 1, on average.
    """
    if router not in PLAYED:
        raise ValueError(f"router={router!r} is unknown; choose one of {', '.join(PLAYED)}")
    generator = torch.Generator().manual_seed(seed)
    centroids = torch.randn(experts, states.shape[1], generator=generator)
    logits = states.float() @ centroids.mT
    logits = 1.5 * logits / logits.std(dim=1).mean()
    scores = (logits / temperature).softmax(dim=-1)[None]
    return PLAYED[router](scores, min(k, experts), capacity_factor, generator)


def routing_playground(
    states: Float[Tensor, "T D"],
    texts: Sequence[str],
    router: str = "DeepSeek: the K best",
    experts: int = 16,
    k: int = 4,
    shared: int = 1,
) -> Explorer:
    """Controls for router, experts, K, shared experts, temperature -> who works for each token, and loads.

    states: hidden states of T tokens; texts: theirs. The centroids are random; `seed` draws others.
    """
    if states.ndim != 2 or len(states) != len(texts):
        raise ValueError(f"states {tuple(states.shape)} must be (tokens, hidden) for {len(texts)} texts")
    about = {"style": {"description_width": "120px"}, "layout": ipywidgets.Layout(width="400px")}

    def menu(options: Sequence[Any], value: Any, description: str) -> ipywidgets.SelectionSlider:
        return ipywidgets.SelectionSlider(options=options, value=value, description=description, **about)

    controls = {
        "router": ipywidgets.Dropdown(options=list(PLAYED), value=router, description="router", **about),
        "experts": menu([4, 8, 16, 24, 32], experts, "routed experts"),
        "k": ipywidgets.IntSlider(value=k, min=1, max=8, description="K (DeepSeek)", **about),
        "shared": ipywidgets.IntSlider(value=shared, min=0, max=4, description="shared experts", **about),
        "temperature": menu([0.1, 0.25, 0.5, 1.0, 2.0, 4.0], 1.0, "temperature"),
        "capacity_factor": menu([0.5, 1.0, 1.25, 2.0, 4.0], 1.25, "capacity factor"),
        "seed": ipywidgets.IntSlider(value=0, min=0, max=9, description="other centroids", **about),
    }

    def enable(_: Any = None) -> None:
        name = controls["router"].value
        controls["k"].disabled = not name.startswith("DeepSeek")
        controls["capacity_factor"].disabled = not name.startswith(("Switch", "GShard", "GLaM"))

    controls["router"].observe(enable, "value")
    enable()

    def routed(values: Mapping[str, Any]) -> Routing:
        return play(states, **{name: value for name, value in values.items() if name != "shared"})

    explorer = Explorer(
        lambda **values: playground_figure(routed(values), texts, values["shared"]),
        caption=lambda **values: f"<div style='max-width:1040px'>{playground_text(routed(values))}</div>",
        **controls,
    )
    columns = (["router", "experts", "k", "shared"], ["temperature", "capacity_factor", "seed"])
    return in_columns(explorer, *columns, reset_below=1)


def playground_figure(made: Routing, texts: Sequence[str], shared: int = 0) -> Figure:
    """Tokens across and experts down, each expert's load beside; shared experts on top, always at work."""
    experts, tokens = made.n_experts, len(texts)
    figure = new_figure(10.6, 5.6)
    heat, load = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (3.3, 1)})
    margins(figure, left=0.85, right=0.3, bottom=0.85, top=0.45, wspace=0.04)
    _choices(heat, made, 0, Normalize(0, 1))
    for number in range(shared):
        y = -1.4 - number
        heat.add_patch(
            Rectangle((-0.5, y - 0.5), tokens, 0.92, facecolor=style.CACHED, edgecolor=style.PAPER)
        )
        load.barh(y, 10 * tokens, height=0.8, color=style.CACHED)
    kept = torch.ones_like(made.expert_ids, dtype=torch.bool) if made.kept is None else made.kept
    asked = made.load().numpy()
    served = torch.bincount(made.expert_ids[kept], minlength=experts).numpy()
    style.style_axes(load, None)
    load.barh(range(experts), served, height=0.8, color=style.ACTIVE)
    load.barh(range(experts), asked - served, left=served, height=0.8, color=style.GREY, hatch="///", ec="w")
    fair = asked.sum() / experts
    load.plot([fair, fair], [-0.5, experts - 0.5], color=INK, linewidth=2.5, linestyle=(0, (4, 2)))
    load.spines[["left"]].set_visible(False)
    load.tick_params(axis="y", length=0, labelleft=False)
    load.set_xlim(0, max(5, 1.1 * int(asked.max())))
    load.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    label(load, "tokens (hatched: dropped)", None, "load")
    load.xaxis.label.set_fontsize(SMALL)
    load._left_title.set_fontsize(BASE)
    heat.set_ylim(experts - 0.5, -0.5 - (shared + 0.4 if shared else 0))
    ticks = list(range(0, experts, max(1, experts // 8)))
    heat.set_yticks(ticks, [str(t) for t in ticks])
    _token_ticks(heat, texts)
    what = "experts of each token (darker: more weight" + ("; blue: shared)" if shared else ")")
    label(heat, "token", "routed expert", what)
    heat._left_title.set_fontsize(BASE)
    return finish(figure, playground_text(made))


def playground_text(made: Routing) -> str:
    """A routing in words."""
    load = made.load()
    pairs = made.expert_ids.numel()
    kept = made.weights if made.kept is None else made.weights * made.kept
    return (
        f"{made.expert_ids.shape[2]} of {made.n_experts} routed experts for each of "
        f"{made.expert_ids.shape[1]} tokens. An expert is chosen {pairs / made.n_experts:.1f} times on "
        f"average, the busiest {int(load.max())} times (variation {load_variation(load):.2f}); "
        f"{int((load == 0).sum())} are never chosen. {dropped_share(made):.0%} of the pairs are dropped. A "
        f"token's weights add up to {float(kept.sum(dim=-1).mean()):.2f} on average."
    )


# ---------------------------------------------------------------------------------------- the stored runs


def _by_seed(stored: Mapping[str, Any]) -> dict[str, dict[int, Mapping[str, Any]]]:
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in stored["runs"]:
        found.setdefault(run["name"], {})[run["seed"]] = run
    if REFERENCE not in found:
        raise ValueError(f"there is no run called {REFERENCE!r} to compare with")
    return found


def router_curves(stored: Mapping[str, Any]) -> Figure:
    """Validation loss over the steps, less that of "one FFN" of the same seed: mean and range of the seeds.

    stored: as `python -m dsv2.bench routers` writes it. A panel for each family of kinds; the scale is that
    of the last three quarters of the steps, and larger swings at the beginning leave it.
    """
    found = _by_seed(stored)
    panels_of = _families(found)
    figure = new_figure(10.4, 6.9)
    panels = figure.subplots(-(-len(panels_of) // 2), 2, sharex=True, sharey=True, squeeze=False)
    margins(figure, left=1.5, right=0.3, bottom=0.75, top=0.5, wspace=0.16, hspace=0.28)
    said, settled = [], [0.0]
    for panel, (family, names) in zip(panels.flat, panels_of.items()):
        style.style_axes(panel)
        panel.axhline(0, color=INK, linewidth=2, linestyle=(0, (4, 2)))
        for name in names:
            steps, gains = _gains(found, name)
            low, high, mean = gains.min(axis=0), gains.max(axis=0), gains.mean(axis=0)
            colour = KIND_COLOURS.get(name, style.SKY)
            panel.fill_between(steps[1:], low[1:], high[1:], color=colour, alpha=0.2, linewidth=0)
            dash = DASHES.get(name, "-")
            panel.plot(steps[1:], mean[1:], color=colour, linewidth=LINE, linestyle=dash, label=name)
            late = steps >= steps[-1] / 4
            settled += [*low[late], *high[late]]
            said.append(f"{name} {mean[-1]:+.3f} ({low[-1]:+.3f} to {high[-1]:+.3f})")
        label(panel, None, None, family)
        panel._left_title.set_fontsize(BASE)
        panel.legend(loc="upper right", frameon=False, fontsize=SMALL, handlelength=1.6, labelspacing=0.2)
    for panel in panels.flat[len(panels_of) :]:
        panel.set_visible(False)
    space = 0.1 * (max(settled) - min(settled))
    # Room above for a legend of three lines.
    panels[0, 0].set_ylim(min(settled) - space, max(settled) + 4 * space)
    panels[0, 0].set_xlim(0, steps[-1])
    panels[0, 0].yaxis.set_major_locator(MaxNLocator(6))
    for panel in panels[-1]:
        label(panel, "step")
    figure.supylabel(
        "loss less that of one FFN\n(nats per byte; lower is better)",
        fontsize=BASE,
        color=INK,
        x=0.012,
        ha="left",
        ma="center",
    )
    return finish(
        figure,
        "Loss over the steps less that of one FFN, by family of layers. At the end, mean (least to most): "
        f"{'; '.join(said)}.",
    )


def _families(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """The kinds that were run, by family; a kind that is in none is one of its own."""
    known = {name for names in FAMILIES.values() for name in names}
    families = {family: [n for n in names if n in found] for family, names in FAMILIES.items()}
    families |= {name: [name] for name in found if name not in known and name != REFERENCE}
    return {family: names for family, names in families.items() if names}


def _gains(found: Mapping[str, Mapping[int, Mapping[str, Any]]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps,) and (seeds, steps): the losses of a kind less those of "one FFN" of the same seed."""
    curves = {seed: np.array(run["val_curve"]) for seed, run in found[name].items()}
    base = {seed: np.array(found[REFERENCE][seed]["val_curve"]) for seed in curves}
    gains = np.array([curve[:, 1] - base[seed][:, 1] for seed, curve in curves.items()])
    return next(iter(curves.values()))[:, 0], gains


def router_outcomes(studies: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Loss at the end less that of "one FFN" of the same seed, a dot a seed, a panel for each study.

    studies: by title, what `python -m dsv2.bench routers` writes.
    """
    groups = {title: _by_seed(stored) for title, stored in studies.items()}
    names = [name for name in next(iter(groups.values())) if name != REFERENCE]
    figure = new_figure(10.4, 0.95 + 0.46 * len(names))
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    margins(figure, left=2.35, right=0.35, bottom=0.85, top=0.5, wspace=0.1)
    said = []
    for panel, (title, found) in zip(panels, groups.items()):
        style.style_axes(panel, "x")
        panel.axvline(0, color=style.GREY, linewidth=LINE)
        for row, name in enumerate(names):
            values = [
                run["val_nats_per_byte"] - found[REFERENCE][seed]["val_nats_per_byte"]
                for seed, run in found[name].items()
            ]
            colour = KIND_COLOURS.get(name, style.SKY)
            panel.plot(values, [row] * len(values), "o", color=colour, ms=10, alpha=0.8, mec="none")
            panel.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=2.5)
            low, high = min(values), max(values)
            said.append(f"{title}, {name}: {np.mean(values):+.3f} ({low:+.3f} to {high:+.3f})")
        label(panel, "loss less that of one FFN (nats per byte)", None, title)
        panel.xaxis.label.set_fontsize(SMALL)
        panel._left_title.set_fontsize(BASE)
        panel.tick_params(axis="y", length=0)
        panel.margins(x=0.08)
    panels[0].set_yticks(range(len(names)), names, fontsize=BASE)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    return finish(figure, f"Loss at the end less that of one FFN, mean (least to most). {'; '.join(said)}.")
