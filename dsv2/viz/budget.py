"""Chapter 09 in pictures: where the parameters are, what the published counts count, how far logits part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import ipywidgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv2.accounting import Parameters, layer_parameters, parameters
from dsv2.config import PRESETS, DSV2Config
from dsv2.viz import style
from dsv2.viz.style import BASE, INK, SMALL, finish, label, margins, new_axes, new_figure
from dsv2.viz.widgets import Explorer, in_columns

# The parts from the bottom up, as `Parameters.parts` names them.
PART_COLOURS = {
    "embedding": style.GREY,
    "attention": style.CACHED,
    "dense ffn": style.GREEN,
    "shared experts": style.ORANGE,
    "routed experts": style.ACTIVE,
    "router": style.PURPLE,
    "norms": style.YELLOW,
    "head": style.SKY,
}
# What each convention of `Parameters.conventions` leaves out.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "everything": (),
    "without the embedding": ("embedding",),
    "without embedding and router": ("embedding", "router"),
    "without embedding and head": ("embedding", "head"),
}
MODELS = {"DeepSeek-V2": "full", "DeepSeek-V2-Lite": "lite", "small": "small", "tiny": "tiny"}
GAP = 0.02  # between the embedding's column, the layers and the head's, as a share of the layers


def count_text(count: float) -> str:
    """A number of parameters with four digits: 235741434880 -> "235.7B", 3531136 -> "3.531M"."""
    for power, unit in ((9, "B"), (6, "M"), (3, "K")):
        if count >= 0.99995 * 10**power:
            return f"{count / 10**power:#.4g}".removesuffix(".") + unit
    return f"{count:,.0f}"


def _tick_text(count: float) -> str:
    power, unit = next(((p, u) for p, u in ((9, "B"), (6, "M"), (3, "K")) if count >= 10**p), (0, ""))
    return f"{count / 10**power:g}{unit}"


def columns(cfg: DSV2Config, activated: bool = False) -> list[Parameters]:
    """The embedding, every layer, and the head with the norm before it: their sum is `parameters`."""
    every = parameters(cfg, activated)
    layers = [layer_parameters(cfg, layer, activated) for layer in range(cfg.num_hidden_layers)]
    first, last = Parameters(embedding=every.embedding), Parameters(head=every.head, norms=cfg.hidden_size)
    return [first, *layers, last]


# --------------------------------------------------------------------------------------------- the budget


def budget_figure(cfg: DSV2Config, convention: str = "everything") -> Figure:
    """Every part's parameters as an area: a column for the embedding, each layer and the head.

    Above all parameters, below those that a token passes through; beside them the parts' sums. What the
    convention leaves out is hatched, and missing from the sums.
    """
    left_out = _left_out(convention)
    figure = new_figure(10.6, 6.6)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1))
    margins(figure, left=1.05, right=0.2, bottom=0.75, top=0.55, wspace=0.06, hspace=0.42)
    above, below = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    sums = [parameters(cfg).conventions()[convention], parameters(cfg, True).conventions()[convention]]
    titles = f"in total: {count_text(sums[0])}", f"a token passes through {count_text(sums[1])}"
    for panel, activated, title in zip((above, below), (False, True), titles):
        _draw_columns(panel, columns(cfg, activated), left_out)
        label(panel, None, "parameters of a layer", title)
    below.set_xlabel("layer (embedding on the left, head on the right)", fontsize=BASE, color=INK)
    _write_sums(figure.add_subplot(grid[:, 1]), cfg, convention)
    return finish(figure, budget_text(cfg, convention))


def _left_out(convention: str) -> tuple[str, ...]:
    if convention not in LEFT_OUT:
        raise ValueError(f"convention={convention!r} is unknown; choose one of {', '.join(LEFT_OUT)}")
    return LEFT_OUT[convention]


def _draw_columns(panel: Axes, found: Sequence[Parameters], left_out: Sequence[str]) -> None:
    style.style_axes(panel)
    layers = len(found) - 2
    gap = max(GAP * layers, 0.15)
    # Where columns begin, and where they end: one layer wide each, so that areas can be compared.
    starts = np.array([-1 - gap, *range(layers), layers + gap])
    base = np.zeros(len(found))
    for part, colour in PART_COLOURS.items():
        counts = np.array([column.parts()[part] for column in found], dtype=float)
        if not counts.any():
            continue
        out = part in left_out
        for run in (slice(0, 1), slice(1, -1), slice(-1, None)):  # the layers are one area
            if not counts[run].any():
                continue
            edges = np.append(starts[run], starts[run][-1] + 1)
            low, high = (np.append(a[run], a[run][-1]) for a in (base, base + counts))
            panel.fill_between(
                edges,
                low,
                high,
                step="post",
                facecolor=style.PAPER if out else colour,
                edgecolor=colour if out else "none",
                hatch="////" if out else None,
                linewidth=1.0 if out and run != slice(1, -1) else 0,
                label=f"{part}, left out" if out else part,
            )
        base += counts
    panel.set_xlim(starts[0], starts[-1] + 1)
    panel.set_ylim(0, 1.06 * base.max())
    numbers = MaxNLocator(6, integer=True).tick_values(0, max(layers - 1, 1))
    shown = [int(number) for number in numbers if 0 <= number < layers]
    panel.set_xticks([number + 0.5 for number in shown], shown)
    panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda count, _: _tick_text(count)))


def _write_sums(panel: Axes, cfg: DSV2Config, convention: str) -> None:
    """The legend: each part with its sums, and the sums of all that the convention counts."""
    panel.set_axis_off()
    panel.set_xlim(0, 10)
    panel.set_ylim(11.6, -0.6)
    every, active, left_out = parameters(cfg), parameters(cfg, True), LEFT_OUT[convention]
    text = {"fontsize": BASE, "color": INK, "va": "center"}
    for x, head in ((7.2, "in total"), (9.95, "a token")):
        panel.text(x, 0, head, ha="right", **{**text, "fontsize": SMALL})
    for row, (part, colour) in enumerate(PART_COLOURS.items(), 1):
        out = part in left_out
        panel.add_patch(
            Rectangle(
                (0.05, row - 0.26),
                0.62,
                0.52,
                facecolor=style.PAPER if out else colour,
                edgecolor=colour,
                hatch="////" if out else None,
            )
        )
        shade = {**text, "color": style.GREY if out else INK}
        panel.text(0.95, row, part.replace("ffn", "FFN"), **shade)
        for x, counts in ((7.2, every), (9.95, active)):
            said = f"({count_text(counts.parts()[part])})" if out else count_text(counts.parts()[part])
            panel.text(x, row, said, ha="right", **shade)
    panel.plot([0.05, 9.95], [8.75, 8.75], color=INK, linewidth=1.5)
    bold = {**text, "fontweight": "bold"}
    panel.text(0.05, 9.4, "counted", **bold)
    for x, counts in ((7.2, every), (9.95, active)):
        panel.text(x, 9.4, count_text(counts.conventions()[convention]), ha="right", **bold)
    panel.text(0.05, 10.4, convention, **{**text, "fontsize": SMALL})


def budget_text(cfg: DSV2Config, convention: str = "everything") -> str:
    """The budget in words."""
    _left_out(convention)
    every, active = parameters(cfg), parameters(cfg, activated=True)
    total, passed = (counts.conventions()[convention] for counts in (every, active))
    counted = "everything counted" if convention == "everything" else f"counted {convention}"
    return (
        f"{count_text(total)} parameters in total ({counted}), of which a token passes through "
        f"{count_text(passed)}, {passed / total:.1%}. Routed experts are {every.routed_experts / total:.1%} "
        f"of the total and {active.routed_experts / passed:.1%} of what a token passes through, attention "
        f"{every.attention / total:.1%} and {active.attention / passed:.1%}."
    )


def budget_caption(cfg: DSV2Config, convention: str) -> str:
    """The same for below the figure, the two sums in bold."""
    text = budget_text(cfg, convention)
    for counts in (parameters(cfg), parameters(cfg, activated=True)):
        said = count_text(counts.conventions()[convention])
        text = text.replace(f"{said} ", f"<b>{said}</b> ", 1).replace(f"{said},", f"<b>{said}</b>,", 1)
    return f"<div style='max-width:1060px'>{text}</div>"


RANKS = (0, 96, 192, 384, 768, 1536, 2048)
VOCABULARIES = (264, 8192, 32_000, 65_536, 102_400, 129_280, 200_064)
# Fields that a slider moves: name, words, and the slider's least, most and step; or its values.
SLIDERS: dict[str, tuple[str, tuple]] = {
    "num_hidden_layers": ("layers", (1, 96, 1)),
    "hidden_size": ("hidden size", (64, 8192, 64)),
    "first_k_dense_replace": ("dense layers", (0, 12, 1)),
    "intermediate_size": ("dense FFN's width", (64, 24_576, 32)),
    "vocab_size": ("vocabulary", VOCABULARIES),
    "num_attention_heads": ("heads", (1, 160, 1)),
    "q_lora_rank": ("q_lora_rank", RANKS),
    "kv_lora_rank": ("kv_lora_rank", (32, 1024, 32)),
    "n_routed_experts": ("routed experts", (1, 320, 1)),
    "num_experts_per_tok": ("experts per token", (1, 16, 1)),
    "n_shared_experts": ("shared experts", (0, 8, 1)),
    "moe_intermediate_size": ("expert's width", (32, 4096, 32)),
}


@lru_cache(maxsize=1)
def _config(model: str, **fields) -> DSV2Config:
    """The model with some fields changed; those that hold no parameters are put where they fit any others."""
    uncounted = {
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    cfg = PRESETS[MODELS[model]].replace(**uncounted)
    chosen = min(fields["num_experts_per_tok"], fields["n_routed_experts"])
    rank = fields["q_lora_rank"] or None
    return cfg.replace(**{**fields, "num_experts_per_tok": chosen, "q_lora_rank": rank})


def budget_explorer(model: str = "DeepSeek-V2", convention: str = "everything") -> Explorer:
    """Sliders for a model's fields -> every part's parameters, layer by layer, in total and for a token.

    Choosing a model puts the sliders where its fields are. Heads keep the widths of the chosen model's.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r} is unknown; choose one of {', '.join(MODELS)}")
    _left_out(convention)

    def about(name: str) -> dict:
        layout = ipywidgets.Layout(width="420px")
        return {"description": name, "style": {"description_width": "150px"}, "layout": layout}

    def slider(name: str, steps: tuple, value: int) -> ipywidgets.Widget:
        if steps in (RANKS, VOCABULARIES):
            options = [(f"{step:,}" if step else "none", step) for step in steps]
            return ipywidgets.SelectionSlider(options=options, value=value, **about(name))
        low, high, step = steps
        return ipywidgets.IntSlider(value, min=low, max=high, step=step, readout_format=",d", **about(name))

    start = PRESETS[MODELS[model]]
    controls = {
        "model": ipywidgets.Dropdown(options=list(MODELS), value=model, **about("model")),
        "convention": ipywidgets.Dropdown(options=list(LEFT_OUT), value=convention, **about("counted")),
        **{
            field: slider(name, steps, getattr(start, field) or 0) for field, (name, steps) in SLIDERS.items()
        },
    }

    def draw(convention: str, **fields) -> Figure:
        return budget_figure(_config(**fields), convention)

    explorer = Explorer(
        draw,
        caption=lambda convention, **fields: budget_caption(_config(**fields), convention),
        **controls,
    )

    def follow(change: dict) -> None:
        cfg = PRESETS[MODELS[change["new"]]]
        held, explorer._held = explorer._held, True  # one drawing, after all sliders have moved
        try:
            for field in SLIDERS:
                controls[field].value = getattr(cfg, field) or 0
        finally:
            explorer._held = held
        explorer._changed(None)

    controls["model"].observe(follow, "value")
    names = list(SLIDERS)
    return in_columns(explorer, ["model", *names[:5]], ["convention", *names[5:]])


# ------------------------------------------------------------------------------------- what counts count


def convention_dots(models: Mapping[str, tuple[DSV2Config, str]]) -> Figure:
    """Activated parameters under each convention, a panel for each model; shaded: what its number allows.

    models: by name, the config and the number that was published, as it was written: "21B", "2.4B". Filled
    dots round to that number, empty ones do not.
    """
    if not 1 <= len(models) <= 4:
        raise ValueError(f"models has {len(models)} names; 1 to 4 fit")
    figure = new_figure(10.6, 4.4)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    margins(figure, left=3.2, right=0.35, bottom=0.8, top=0.85, wspace=0.16)
    said = []
    for panel, (name, (cfg, published)) in zip(panels, models.items()):
        style.style_axes(panel, None)
        low, high = rounding_range(published)
        counts = parameters(cfg, activated=True).conventions()
        panel.axvspan(low, high, color=style.tint(style.GREEN, 0.28), linewidth=0)
        for row, (convention, count) in enumerate(counts.items()):
            fits = low <= count / 1e9 < high
            panel.plot(
                count / 1e9,
                row,
                "o",
                ms=13,
                mew=2.5,
                mec=style.ACTIVE,
                mfc=style.ACTIVE if fits else style.PAPER,
            )
            panel.annotate(
                f"{count / 1e9:#.4g}",
                (count / 1e9, row),
                xytext=(0, 11),
                textcoords="offset points",
                ha="center",
                fontsize=SMALL,
                color=INK,
            )
            said.append(f"{name}, {convention}: {count_text(count)}{'' if fits else ', does not fit'}")
        values = [*(count / 1e9 for count in counts.values()), low, high]
        room = 0.2 * (max(values) - min(values))
        panel.set_xlim(min(values) - room, max(values) + room)
        panel.set_ylim(len(counts) - 0.6, -0.75)
        panel.xaxis.set_major_locator(MaxNLocator(3))
        panel.tick_params(axis="y", length=0)
        panel.set_title(f"{name}\npublished: {published}", fontsize=BASE, color=INK, loc="left", pad=8)
        panel.set_xlabel("activated (10⁹)", fontsize=SMALL, color=INK)
    panels[0].set_yticks(range(len(LEFT_OUT)), list(LEFT_OUT), fontsize=BASE)
    return finish(figure, f"Activated parameters by convention. {'; '.join(said)}.")


def rounding_range(published: str) -> tuple[float, float]:
    """The numbers, in billions, that are written so: "2.4B" -> 2.35 to 2.45. Raises ValueError for others."""
    digits = published.removesuffix("B")
    try:
        value = float(digits)
    except ValueError:
        raise ValueError(f'published={published!r} must be like "21B" or "2.4B"') from None
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2])
    return value - half, value + half


# --------------------------------------------------------------------------------------- how logits part


def logit_differences(found: Mapping[str, float], tolerance: float) -> Figure:
    """The largest difference of any logit, by name, on a logarithmic axis, beside what float32 rounds.

    found: by name; 0 is drawn at the left end. tolerance: where rounding ends, a dashed line.
    """
    if not found or min(found.values()) < 0:
        raise ValueError(f"found must hold differences of at least 0, one at least; got {dict(found)!r}")
    least = min([value for value in found.values() if value > 0] + [tolerance])
    floor = 10.0 ** (np.floor(np.log10(least)) - 1)
    ax = new_axes(None, 10.0, 1.35 + 0.46 * len(found), "x", left=4.5, right=0.75, bottom=0.85, top=0.45)
    for row, value in enumerate(found.values()):
        colour = style.CACHED if value <= tolerance else style.ACTIVE
        ax.plot([floor, max(value, floor)], [row, row], color=style.tint(colour, 0.5), linewidth=3)
        ax.plot(max(value, floor), row, "o", color=colour, ms=11, clip_on=False)
        ax.annotate(
            f"{value:.0e}".replace("e-0", "e-") if 0 < value < 0.01 else f"{value:.2g}",
            (max(value, floor), row),
            xytext=(11, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=INK,
            bbox={"facecolor": style.PAPER, "edgecolor": "none", "pad": 1.5},
        )
    ax.axvline(tolerance, color=INK, linewidth=2, linestyle=(0, (4, 3)), zorder=1)
    ax.annotate(
        "rounding in float32",
        (tolerance, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=SMALL,
        color=INK,
    )
    ax.set_xscale("log")
    ax.set_xlim(floor, 3 * max([*found.values(), tolerance]))
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.set_yticks(range(len(found)), list(found), fontsize=BASE)
    ax.tick_params(axis="y", length=0, pad=12)
    label(ax, "largest difference of a logit")
    said = "; ".join(f"{name}: {value:.1e}" for name, value in found.items())
    return finish(ax, f"Largest difference of a logit; rounding ends at {tolerance:.0e}. {said}.")
