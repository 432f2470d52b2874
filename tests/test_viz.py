"""Figures show the numbers they were given, texts can be read, widgets work without a browser."""

from __future__ import annotations

import ast
import itertools
import json
import re
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ipywidgets
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.text import Text

from dsv2.config import PRESETS, DSV2Config
from dsv2.generate import stream
from dsv2.model import DeepSeekV2
from dsv2.moe.routing import Routing
from dsv2.viz import (
    Explorer,
    benchmark_bars,
    cache_bars,
    cache_bytes_per_token,
    cache_growth,
    chapters_here,
    course_map,
    describe,
    expert_heatmap,
    expert_lights,
    expert_load,
    expert_preferences,
    human_bytes,
    join_routings,
    live_generation,
    model_diagram,
    png,
    routing_browser,
    save,
    training_curves,
    visible,
)
from dsv2.viz.__main__ import main
from dsv2.viz.diagrams import THEMES, example_choice
from dsv2.viz.plots import _glyphs
from dsv2.viz.style import ACTIVE, CYCLE, SMALL, Picture, ink, new_figure

TEXT = "if x:\n\t$y_1$ é!"  # 15 tokens: a transposed grid would show
# 3 devices of 4 experts, 2 of them in reach, 3 experts a token; layers 1 to 5 hold experts.
CFG = DSV2Config.preset(
    "tiny",
    hidden_size=40,
    num_hidden_layers=6,
    intermediate_size=48,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_group=3,
    topk_group=2,
    moe_intermediate_size=16,
    max_position_embeddings=128,
)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model() -> DeepSeekV2:
    torch.manual_seed(5)
    return DeepSeekV2(CFG.replace(initializer_range=0.3)).eval()


@pytest.fixture(scope="module")
def routings(model) -> list[Routing]:
    tokens = torch.tensor([list(TEXT.encode("latin-1")), list(TEXT[::-1].encode("latin-1"))])
    with torch.no_grad():
        return model(tokens).routings


def labels_of(figure) -> list[str]:
    return [text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel()) if text]


def texts_of(figure) -> list[Text]:
    """Everything written on the figure that can be seen."""
    figure.canvas.draw()
    hidden = set()  # matplotlib keeps labels of ticks beyond the axis, and does not draw them
    for axis in (axis for axes in figure.findobj(Axes) for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        slack = 1e-9 * (high - low)
        beyond = [t for t in axis.get_major_ticks() if not low - slack <= t.get_loc() <= high + slack]
        hidden |= {label for tick in beyond for label in (tick.label1, tick.label2)}
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]


def overlaps(figure, texts) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes share more than a pixel."""
    renderer = figure.canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    found = []
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        width = min(box.x1, other.x1) - max(box.x0, other.x0)
        height = min(box.y1, other.y1) - max(box.y0, other.y0)
        if width > 1 and height > 1:
            found.append((a, b))
    return found


def outside(figure) -> list[str]:
    """Texts that stick out of the figure."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    width, height = figure.bbox.width, figure.bbox.height
    return [
        t.get_text()
        for t in texts_of(figure)
        for box in [t.get_window_extent(renderer)]
        if box.x0 < 0 or box.y0 < 0 or box.x1 > width + 0.5 or box.y1 > height + 0.5
    ]


# ---------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (69120, "69.1 KB"), (999_999, "1 MB"), (5.154e9, "5.15 GB")],
)
def test_bytes_read_well(number, text):
    assert human_bytes(number) == text


def test_cache_growth_draws_what_it_is_given():
    each = {"MHA": 1_300_000, "GQA": 210_000, "MLA": 70_000.0}
    figure = cache_growth([0, 100, 700], each, until=1000)
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    for name, per_token in each.items():
        np.testing.assert_allclose(lines[name].get_xdata(), [0, 100, 700])
        np.testing.assert_allclose(lines[name].get_ydata(), np.array([0, 100, 700]) * per_token / 1e9)
        assert lines[name].get_linewidth() >= 2.5
    assert axes.get_ylabel() == "cache of one sequence (GB)" and axes.get_xlabel() == "tokens in the cache"
    assert axes.get_xlim() == (0, 1000)
    words = [t.get_text() for t in axes.texts]
    assert "MLA  49 MB" in words and "MHA  910 MB, 18.6x" in words
    assert not outside(figure) and not overlaps(figure, axes.texts)


def test_labels_of_equal_lines_do_not_collide():
    figure = cache_growth(1, {"MHA": 10, "GQA": 10, "MQA": 10, "MLA": 10}, until=50_000)
    assert not overlaps(figure, figure.axes[0].texts)


@pytest.mark.parametrize("tokens", [0, 1, 163_840])
def test_cache_growth_at_the_ends_of_its_range(tokens):
    figure = cache_growth(tokens, cache_bytes_per_token(DSV2Config.preset("full")))
    assert not outside(figure)


def test_cache_numbers_are_table_1s():
    full = cache_bytes_per_token(DSV2Config.preset("full"), "bfloat16")
    assert full == {"MHA": 2 * 2 * 128 * 128 * 60, "MLA": 2 * 34_560}
    assert cache_bytes_per_token(CFG, torch.float32)["MLA"] == 4 * (64 + 16) * 6


def test_cache_bars_have_ratios():
    figure = cache_bars(100, {"MHA": 61_000, "MLA": 19_000})
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [6.1, 1.9]
    assert [t.get_text() for t in axes.texts] == ["6.1 MB, 3.2x", "1.9 MB"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["MHA", "MLA"]
    assert "(MB)" in axes.get_xlabel() and not outside(figure)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cache_growth(5, {}), "per_token_bytes is empty"),
        (lambda: cache_growth([], {"MLA": 1}), "tokens"),
        (lambda: cache_growth(-3, {"MLA": 1}), "tokens"),
        (lambda: cache_bars(5, {"MLA": 1}, reference="MHA"), "reference='MHA'"),
        (lambda: expert_load([]), "routings is empty"),
        (lambda: model_diagram(CFG.replace(attention="mha")), "attention='mha'"),
        (lambda: model_diagram(CFG.replace(first_k_dense_replace=6)), "0 layers of experts"),
        (lambda: course_map([(99, "a", "b", "ready")]), "chapter 99"),
        (lambda: course_map([(1, "a", "b", "done")]), "'done'"),
        (lambda: training_curves([{"step": 1}]), "metrics"),
        (lambda: benchmark_bars([]), "results is empty"),
        (lambda: Explorer(lambda: new_figure(2, 2)), "at least one control"),
        (lambda: Explorer(lambda a: new_figure(2, 2), a=None), "control a=None"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# ---------------------------------------------------------------------------------------------- experts


def drawn_weights(figure, experts: int, gid: str) -> np.ndarray:
    """(tokens, experts) as the figure's mesh has them, 0 where nothing was chosen."""
    (mesh,) = [c for c in figure.axes[0].collections if c.get_gid() == gid]
    grid = np.ma.masked_array(mesh.get_array())
    if grid.shape[0] != len(TEXT):
        grid = grid.T
    full = grid[:, ~grid.mask.all(axis=0)]
    assert full.shape == (len(TEXT), experts)
    return np.where(full.filled(-1) >= 0, full.filled(-1), 0)


def reference_weights(routing: Routing, sequence: int) -> np.ndarray:
    grid = np.zeros((routing.scores.shape[1], routing.n_experts))
    for token, (ids, weights) in enumerate(zip(routing.expert_ids[sequence], routing.weights[sequence])):
        for expert, weight in zip(ids.tolist(), weights.tolist()):
            grid[token, expert] = weight
    return grid


@pytest.mark.parametrize("cfg", [CFG, None])
@pytest.mark.parametrize("sequence", [0, 1])
def test_heatmap_draws_the_weights(routings, cfg, sequence):
    figure = expert_heatmap(routings, list(TEXT), 3, cfg=cfg, sequence=sequence)
    name = 4 if cfg else 3  # the model's layer number, where it is known
    drawn = drawn_weights(figure, 12, f"weights of layer {name}")
    np.testing.assert_allclose(drawn, reference_weights(routings[3], sequence), rtol=1e-6)
    other = reference_weights(routings[2], sequence)
    assert not np.allclose(drawn, other)  # another layer would be noticed
    assert labels_of(figure)[0] == "token" and any("expert" in text for text in labels_of(figure))
    assert not outside(figure)


def test_heatmap_of_every_layer(routings):
    figure = expert_heatmap(routings, list(TEXT), cfg=CFG)
    for i, routing in enumerate(routings):
        drawn = drawn_weights(figure, 12, f"weights of layer {i + 1}")
        np.testing.assert_allclose(drawn, reference_weights(routing, 0), rtol=1e-6)
    assert not outside(figure)


def test_tokens_are_shown_as_they_are(routings):
    figure = expert_heatmap(routings, list(TEXT), 0, cfg=CFG)
    shown = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert {ord(c) for c in "·⏎⇥∅"} <= _glyphs() and shown == [
        "i",
        "f",
        "·",
        "x",
        ":",
        "⏎",
        "⇥",
        "$",
        "y",
        "_",
        "1",
        "$",
        "·",
        "é",
        "!",
    ]
    png(figure)  # no mathematics is looked for between the dollar signs


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "∅"),
        (" \n\t\r", "·⏎⇥\\r"),
        ("\x00", "\\x00"),
        ("中", "\\u4e2d"),
        ("\u200b", "\\u200b"),
        ("Σx", "Σx"),
    ],
)
def test_nothing_invisible_is_left(text, shown):
    assert visible(text) == shown


def test_dropped_choices_are_crossed(routings):
    r = routings[1]
    kept = torch.ones_like(r.expert_ids, dtype=torch.bool)
    kept[0, 5, 2] = kept[0, 8, 0] = False
    figure = expert_heatmap([Routing(r.expert_ids, r.weights, r.scores, kept)], list(TEXT))
    (crosses,) = [line for line in figure.axes[0].lines if line.get_label() == "dropped"]
    assert crosses.get_xdata().tolist() == [5, 8]
    experts = [int(r.expert_ids[0, 5, 2]), int(r.expert_ids[0, 8, 0])]
    np.testing.assert_allclose(crosses.get_ydata(), [e + 0.5 for e in experts])


def test_lights_show_the_last_token(routings):
    figure = expert_lights(routings, CFG, text="\n")
    (mesh,) = [c for c in figure.axes[0].collections if c.get_gid() == "weights"]
    grid = mesh.get_array()
    assert grid.shape == (5, 12 + 2)  # two gaps between three devices
    lit = grid[:, ~grid.mask.all(axis=0)].filled(-1)
    for row, routing in zip(lit, routings):
        np.testing.assert_allclose(np.where(row >= 0, row, 0), reference_weights(routing, 0)[-1], rtol=1e-6)
        assert (row >= 0).sum() == 3
    assert "⏎" in figure.axes[0].get_title("left") and "layer" in labels_of(figure)
    chosen = ", ".join(str(e) for e in sorted(routings[0].expert_ids[0, -1].tolist()))
    assert f"layer 1: {chosen};" in describe(figure)
    assert not outside(figure)


def test_lights_of_the_full_model_fit():
    cfg = DSV2Config.preset("full")
    scores = torch.rand(59, 1, 1, 160, generator=torch.Generator().manual_seed(1)).softmax(-1)
    layers = [Routing(*reversed(s.topk(6)), s) for s in scores]
    assert not outside(expert_lights(layers, cfg))


def test_even_a_weight_of_zero_is_lit():
    ids, scores = torch.tensor([[[2, 0]]]), torch.full((1, 1, 4), 0.25)
    figure = expert_heatmap([Routing(ids, torch.tensor([[[0.5, 0.0]]]), scores)], ["a"])
    (mesh,) = [c for c in figure.axes[0].collections if str(c.get_gid()).startswith("weights")]
    figure.canvas.draw()
    colours = mesh.get_facecolor()
    assert len({tuple(colour) for colour in colours}) == 3  # chosen, chosen with 0, two that were not


def test_load_counts_choices(routings):
    figure = expert_load(routings, cfg=CFG)
    assert len(figure.axes) == 5
    for axes, routing in zip(figure.axes, routings):
        counts = np.zeros(12)
        for expert in routing.expert_ids.flatten().tolist():
            counts[expert] += 100 / routing.expert_ids.numel()
        np.testing.assert_allclose([bar.get_height() for bar in axes.patches], counts, atol=1e-6)
        (fair,) = [line for line in axes.lines if line.get_label() == "fair share"]
        assert set(fair.get_ydata()) == {100 / 12}
        assert axes.get_ylabel() == "choices (%)"
    assert not outside(figure) and not overlaps(figure, texts_of(figure))


def test_preferences_are_shares_against_the_fair_share():
    # 5 tokens, 2 of 4 experts each, on 2 devices. "x" chose 0 and 1 three times, "y" 0 and 3, then 2 and 3.
    ids = torch.tensor([[[0, 1], [1, 0], [0, 3], [0, 1], [2, 3]]])
    routing = Routing(ids, torch.ones(1, 5, 2), torch.full((1, 5, 4), 0.25))
    cfg = CFG.replace(n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=2)
    figure = expert_preferences(routing, ["x", "x", "y", "x", "y"], cfg=cfg)
    (mesh,) = [each for each in figure.axes[0].collections if each.get_gid() == "preferences"]
    shown = mesh.get_array().reshape(2, -1)
    # By hand: of x's 6 choices 3, 3, 0, 0 against 1.5 each; of y's 4 choices 1, 0, 1, 2 against 1 each.
    assert shown[0].compressed().tolist() == [2.0, 2.0, 0.0, 0.0]
    assert shown[1].compressed().tolist() == [1.0, 0.0, 1.0, 2.0]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["2.0", "2.0", "2.0"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["x (3)", "y (2)"]
    assert "x: expert 0, 2.0x" in describe(figure) and not outside(figure)
    with pytest.raises(ValueError, match="groups names 3 tokens"):
        expert_preferences(routing, ["x", "x", "y"])


def test_routings_of_steps_join(routings):
    first = [Routing(r.expert_ids[:, :9], r.weights[:, :9], r.scores[:, :9]) for r in routings]
    rest = [Routing(r.expert_ids[:, 9:], r.weights[:, 9:], r.scores[:, 9:]) for r in routings]
    for joined, routing in zip(join_routings([first, rest]), routings):
        assert torch.equal(joined.expert_ids, routing.expert_ids)
        assert torch.equal(joined.weights, routing.weights) and torch.equal(joined.scores, routing.scores)


# --------------------------------------------------------------------------------------- training, benchmarks


def metrics() -> list[dict]:
    rows = []
    for step in range(1, 101):
        rate = 1e-3 * (1 if step < 60 else 0.316 if step < 90 else 0.1)
        rows.append({"step": step, "loss": 5 / step + 1.25, "lr": rate, "imbalance": 1 + 3 / step})
        if step % 25 == 0:
            rows.append({"step": step, "val_loss": 5 / step + 1.5})
    return rows


def test_training_curves_show_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in metrics()))
    figure = training_curves(path, {"3-gram": 1.75}, smooth=4)
    loss, imbalance = figure.axes
    lines = {line.get_label(): line for line in loss.lines}
    expected = [np.mean([5 / s + 1.25 for s in range(max(1, t - 3), t + 1)]) for t in range(1, 101)]
    np.testing.assert_allclose(lines["training"].get_ydata(), expected, rtol=1e-12)
    np.testing.assert_allclose(lines["validation"].get_xdata(), [25, 50, 75, 100])
    np.testing.assert_allclose(lines["validation"].get_ydata(), [1.7, 1.6, 5 / 75 + 1.5, 1.55])
    assert list(lines["3-gram"].get_ydata()) == [1.75, 1.75]
    falls = [line.get_xdata()[0] for line in loss.lines if line.get_gid() == "learning rate falls"]
    assert falls == [60, 90]
    assert {"lr x0.316", "3-gram 1.750", "validation 1.550"} <= {t.get_text() for t in loss.texts}
    assert loss.get_ylabel() == "loss (nats per byte)" and "max / mean" in imbalance.get_ylabel()
    assert imbalance.get_xlabel() == "training step"
    assert not outside(figure) and not overlaps(figure, loss.texts)


def test_validation_is_per_byte_where_that_was_measured():
    rows = [{"step": 1, "loss": 3, "val_loss": 2.5, "val_nats_per_byte": 2.4}]
    lines = {line.get_label(): line for line in training_curves(rows).axes[0].lines}
    assert lines["validation"].get_ydata().tolist() == [2.4]


def test_training_curves_of_a_run_that_only_began():
    assert not outside(training_curves([{"step": 1, "loss": 5.5}]))


def test_a_broken_line_of_metrics_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    with pytest.raises(ValueError, match="line 2"):
        training_curves(path)


def test_benchmark_bars(tmp_path):
    rows = [
        {"name": "prefill, 7 tokens", "ours": 900.0, "peer": 600.0, "unit": "tokens/s"},
        {"name": "decode behind 9", "ours": 80.0, "peer": 8.0, "unit": "tokens/s", "ratio": 10.25},
    ]
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"ours": "dsv2", "peer": "other", "results": rows}))
    figure = benchmark_bars(path)
    for axes, row in zip(figure.axes, rows):
        assert [bar.get_width() for bar in axes.patches] == [row["ours"], row["peer"]]
        assert axes.get_title("left") == f"{row['name']} (tokens/s)"
        assert [t.get_text() for t in axes.get_yticklabels()] == ["dsv2", "other"]
    assert "1.50x" in [t.get_text() for t in figure.axes[0].texts]
    assert "10.2x" in [t.get_text() for t in figure.axes[1].texts]  # the measured ratio, of medians of pairs
    assert not outside(figure) and not overlaps(figure, texts_of(figure))
    assert figure.axes[-1].get_xlabel().startswith("longer is faster")
    figure = benchmark_bars([{"name": "forward", "ours": 2.0, "peer": 5.0, "unit": "ms"}])
    assert "2.5x" in [t.get_text() for t in figure.axes[0].texts]
    assert figure.axes[-1].get_xlabel().startswith("shorter is faster")


# ---------------------------------------------------------------------------------------------- drawings


@pytest.mark.parametrize("name", PRESETS)
def test_the_diagram_can_be_read(name):
    cfg = DSV2Config.preset(name)
    figure = model_diagram(cfg)
    texts = texts_of(figure)
    assert not overlaps(figure, texts) and not outside(figure)
    # 800 pixels wide, the smallest letters of a text are set in 13 pixels.
    assert min(t.get_fontsize() for t in texts) * (800 / 10) / 72 >= 13
    said = " ".join(t.get_text() for t in texts)
    for number in (f"{cfg.hidden_size:,}", f"{cfg.kv_lora_rank}", f"{cfg.num_attention_heads} ×"):
        assert number in said
    assert f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts} routed experts" in said
    cells = [p.get_gid() for p in figure.axes[0].patches if p.get_gid()]
    assert len(cells) == cfg.n_routed_experts + cfg.n_shared_experts
    assert cells.count("expert at work") == cfg.num_experts_per_tok + cfg.n_shared_experts


@pytest.mark.parametrize("name", PRESETS)
def test_texts_stay_in_their_boxes(name):
    """Every text of the drawing that starts in a box ends in it."""
    figure = model_diagram(DSV2Config.preset(name))
    renderer = figure.canvas.get_renderer()
    boxes = [p.get_window_extent(renderer) for p in figure.axes[0].patches if hasattr(p, "get_boxstyle")]
    for text in texts_of(figure):
        extent = text.get_window_extent(renderer)
        centre = (extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2
        for box in boxes:
            if box.contains(*centre):
                assert box.x0 <= extent.x0 and extent.x1 <= box.x1, text.get_text()
                assert box.y0 <= extent.y0 and extent.y1 <= box.y1, text.get_text()


def test_the_overlap_check_sees_an_overlap():
    figure = new_figure(4, 2)
    figure.text(0.3, 0.5, "first words")
    figure.text(0.35, 0.52, "other words")
    assert overlaps(figure, texts_of(figure))


@pytest.mark.parametrize("name", PRESETS)
def test_the_example_is_a_legal_choice(name):
    cfg = DSV2Config.preset(name)
    chosen = example_choice(cfg)
    assert len(chosen) == cfg.num_experts_per_tok and chosen <= set(range(cfg.n_routed_experts))
    reach = cfg.topk_group if cfg.topk_method == "group_limited_greedy" else cfg.n_group
    assert len({expert // cfg.experts_per_device for expert in chosen}) <= reach


@pytest.mark.parametrize("ready", [set(), {0, 1, 7}, set(range(14))])
def test_the_course_map_can_be_read(ready):
    chapters = [
        (n, title, builds, "ready" if n in ready else "planned") for n, title, builds, _ in chapters_here()
    ]
    figure = course_map(chapters)
    texts = texts_of(figure)
    assert not overlaps(figure, texts) and not outside(figure)
    said = {t.get_text() for t in texts}
    assert {f"{n:02d}" for n in range(14)} | {theme for theme, _, _ in THEMES} <= said
    assert ("dashed: planned" in said) == (len(ready) < 14)


def test_chapters_are_ready_when_their_notebook_is_there(tmp_path):
    (tmp_path / "02_latent_attention.ipynb").touch()
    states = {number: state for number, _, _, state in chapters_here(tmp_path)}
    assert states.pop(2) == "ready" and set(states.values()) == {"planned"} and len(states) == 13


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_command_line_writes_small_files_that_never_change(tmp_path, capsys, suffix):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    assert main(["model-diagram", "--preset", "full", "--out", str(first)]) == 0
    assert main(["model-diagram", "--preset", "full", "--out", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < (150_000 if suffix == ".png" else 200_000)
    assert "512" in capsys.readouterr().out


def test_the_command_line_explains_itself(tmp_path, capsys):
    assert main(["course-map", "--out", str(tmp_path / "map.gif")]) == 1
    assert ".png or .svg" in capsys.readouterr().err
    assert main(["benchmark-bars", str(tmp_path / "none.json"), "--out", str(tmp_path / "a.png")]) == 1
    assert "none.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- style


def test_drawing_leaves_no_trace(routings):
    """No figure manager, no changed setting: a notebook's own plots stay as they are."""
    before = dict(matplotlib.rcParams)
    png(expert_lights(routings, CFG))
    png(model_diagram(CFG))
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in __import__("sys").modules:
        assert not __import__("sys").modules["matplotlib.pyplot"].get_fignums()


def test_figures_are_readable_and_described(routings):
    for figure in (
        cache_growth(9, {"MLA": 5, "MHA": 9}),
        cache_bars(9, {"MLA": 5, "MHA": 9}),
        expert_heatmap(routings, list(TEXT), 0),
        expert_lights(routings, CFG),
        expert_load(routings[0]),
        expert_preferences(routings[0], list("ab" * (routings[0].scores[..., 0].numel() // 2))),
        training_curves(metrics()),
        benchmark_bars([{"name": "a", "ours": 2, "peer": 1, "unit": "tokens/s"}]),
    ):
        assert isinstance(figure, Picture) and len(describe(figure)) > 20
        assert labels_of(figure)
        figure.canvas.draw()
        assert min(t.get_fontsize() for t in texts_of(figure)) >= SMALL >= 13


def test_plots_draw_on_given_axes(routings):
    figure = new_figure(9, 6)
    left, right = figure.subplots(1, 2)
    assert cache_growth(9, {"MLA": 5}, ax=left) is figure
    assert expert_lights(routings, CFG, ax=right) is figure
    assert left.lines and right.collections


def test_text_colours_have_contrast():
    from matplotlib.colors import to_rgb

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    for colour in (*CYCLE, ACTIVE):
        assert 1.05 / (luminance(ink(colour)) + 0.05) >= 4.5


# ------------------------------------------------------------------------------------------------ widgets


def test_explorer_follows_its_controls():
    explorer = Explorer(
        lambda tokens, share, kind, log: cache_growth(tokens, {kind: 1 + share}),
        title="<cache>",
        tokens=(1, 9),
        share=(0.0, 2.0, 0.5),
        kind=["MHA", "MLA"],
        log=False,
    )
    assert explorer.values == {"tokens": 1, "share": 0.0, "kind": "MHA", "log": False}
    first = bytes(explorer.image.value)
    assert first.startswith(PNG) and "MHA 1 B" in explorer.below.value
    explorer.controls["tokens"].value = 7  # what a moved slider does
    assert explorer.figure.axes[0].lines[0].get_xdata()[-1] == 7 and explorer.image.value != first
    drawn = len(explorer.update_ms)
    figure = explorer.set(tokens=5, share=1.5, kind="MLA")
    assert len(explorer.update_ms) == drawn + 1 and explorer.last_update_ms > 0  # once for three changes
    assert figure is explorer.figure and "MLA 12.5 B" in explorer.below.value
    explorer.reset_button.click()
    assert explorer.values["tokens"] == 1 and bytes(explorer.image.value) == first
    assert "&lt;cache&gt;" in explorer.widget.children[0].value
    with pytest.raises(ValueError, match="tokns"):
        explorer.set(tokns=3)


def test_explorer_shows_errors_and_recovers():
    def plot(rank):
        if rank == 3:
            raise RuntimeError("rank <3> is no good")
        return cache_growth(rank, {"MLA": 1})

    explorer = Explorer(plot, rank=(1, 5))
    before = bytes(explorer.image.value)
    explorer.controls["rank"].value = 3
    assert "rank &lt;3&gt; is no good" in explorer.below.value and isinstance(explorer.error, RuntimeError)
    assert bytes(explorer.image.value) == before
    with pytest.raises(RuntimeError, match="no good"):
        explorer.set(rank=3)
    explorer.set(rank=4)
    assert explorer.error is None and "no good" not in explorer.below.value


def test_explorer_hands_the_figure_back():
    given = []

    def plot(n, figure=None):
        given.append(figure)
        return figure or cache_growth(n, {"MLA": 1})

    explorer = Explorer(plot, n=(1, 4))
    explorer.set(n=2)
    assert given[0] is None and given[1] is explorer.figure


def test_explorer_draws_once_for_a_burst_of_changes():
    """In a running kernel, changes that queue up behind a drawing end in one drawing of the last values."""
    import asyncio

    async def drag():
        explorer = Explorer(lambda n: cache_growth(n, {"MLA": 1}), n=(1, 99))
        drawn = len(explorer.update_ms)
        for n in range(2, 40):
            explorer.controls["n"].value = n
        await asyncio.sleep(0.2)
        return len(explorer.update_ms) - drawn, explorer.figure.axes[0].lines[0].get_xdata()[-1]

    assert asyncio.run(drag()) == (1, 39)


def test_routing_browser(routings):
    browser = routing_browser(routings, list(TEXT), CFG)
    browser.set(layer=2, token=6)
    axes = browser.figure.axes[0]
    (frame,) = [p for p in axes.patches if p.get_gid() == "token"]
    assert frame.get_x() == 5.5 and frame.get_width() == 1
    assert "layer 3" in axes.get_title("left")
    rows = re.findall(r"<tr><td>(\d+)</td><td>(\d+)</td><td>([\d.]+)</td>", browser.below.value)
    ids, weights = routings[2].expert_ids[0, 6].tolist(), routings[2].weights[0, 6].tolist()
    assert [(int(e), int(d)) for e, d, _ in rows] == [(e, e // 4) for e in ids]
    np.testing.assert_allclose([float(w) for _, _, w in rows], weights, atol=5e-4)
    assert "<code>⇥</code>" in browser.below.value
    drawn = drawn_weights(browser.figure, 12, "weights of layer 3")
    np.testing.assert_allclose(drawn, reference_weights(routings[2], 0), rtol=1e-6)


def test_routing_browser_shows_the_part_of_a_long_text_around_the_token():
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(1, 130, 12, generator=generator).softmax(-1)
    long = [Routing(*reversed(scores.topk(3)), scores) for _ in CFG.moe_layers]
    browser = routing_browser(long, [chr(97 + i % 26) for i in range(130)], CFG)
    for token in (0, 48, 77, 129):
        browser.set(token=token)
        axes = browser.figure.axes[0]
        (frame,) = [p for p in axes.patches if p.get_gid() == "token"]
        column = int(frame.get_x() + 0.5)
        assert axes.get_xticklabels()[column].get_text() == chr(97 + token % 26)


def live(model, **options):
    return live_generation(partial(stream, model, seed=3), model.cfg, **options)


def test_live_generation_runs_without_a_browser(model):
    live_view = live(model, prompt="a < b & c", max_new_tokens=23)
    text = live_view.run()
    expected = "".join(step.text for step in stream(model, "a < b & c", 23, temperature=0.8, seed=3))
    assert text == live_view.text == "a < b & c" + expected
    assert "a &lt; b &amp; c" in live_view.text_view.value and "<b & c" not in live_view.text_view.value
    assert bytes(live_view.cache_image.value).startswith(PNG)
    assert bytes(live_view.experts_image.value).startswith(PNG)
    made = live_view.tokens_made
    cached = len("a < b & c") + 1 + made - 1  # a beginning-of-text token; the last token is never fed in
    line = live_view.cache_figure.axes[0].lines[0]
    assert line.get_xdata()[-1] == cached
    assert f"at {cached} tokens" in describe(live_view.cache_figure)
    assert len(live_view.texts) == made and live_view.texts[0] == "c"
    assert [r.expert_ids.shape for r in live_view.routings] == [(1, made, 3)] * 5
    assert not live_view.running and live_view.status.value.startswith("done")
    assert not live_view.generate_button.disabled and live_view.stop_button.disabled
    routing_browser(live_view.routings, live_view.texts, model.cfg)
    # A second text starts from nothing.
    live_view.run("x", max_new_tokens=2)
    assert live_view.tokens_made == 2 and len(live_view.texts) == 2


def test_live_routings_are_those_of_the_text(model):
    """What is shown while streaming is what one forward pass over the finished text chooses."""
    live_view = live(model, prompt="q", max_new_tokens=12)
    live_view.run(temperature=0)
    ids = [257 - 1, ord("q")]
    ids += [step.token for step in stream(model, "q", 12, temperature=0)][:-1]
    with torch.no_grad():
        whole = model(torch.tensor([ids])).routings
    for shown, routing in zip(live_view.routings, whole):
        assert torch.equal(shown.expert_ids[0].sort(-1).values, routing.expert_ids[0, 1:].sort(-1).values)


@dataclass
class SlowStream:
    """Endless text, a token whenever `more` lets it."""

    model: DeepSeekV2
    more: threading.Semaphore
    closed: bool = False

    def __call__(self, prompt, temperature, max_new_tokens):
        try:
            for step in stream(self.model, prompt, max_new_tokens, temperature=0, loop_window=None):
                assert self.more.acquire(timeout=20)
                yield step
        finally:
            self.closed = True


def test_stop_ends_a_text_and_a_second_start_is_refused(model):
    source = SlowStream(model, threading.Semaphore(0))
    live_view = live_generation(source, model.cfg, prompt="z")
    live_view.generate_button.click()
    assert live_view.running and live_view.start() is False
    with pytest.raises(RuntimeError, match="being generated"):
        live_view.run("other")
    for _ in range(4):
        source.more.release()
    deadline = time.monotonic() + 20
    while live_view.tokens_made < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert live_view.generate_button.disabled and not live_view.stop_button.disabled
    live_view.stop_button.click()
    source.more.release()
    assert live_view.wait(20) and live_view.tokens_made == 5 and source.closed
    assert live_view.status.value.startswith("stopped") and not live_view.generate_button.disabled
    # And it starts again.
    source.more.release(100)
    live_view.max_new_tokens.value = 7
    assert live_view.start() and live_view.wait(30) and live_view.error is None and live_view.tokens_made == 7


def test_live_generation_shows_errors(model):
    live_view = live(model, max_new_tokens=5)
    assert live_view.start() and live_view.wait(20)
    live_view.run("ok")

    def broken(prompt, **options):
        yield from stream(model, prompt, 2)
        raise RuntimeError("out of <memory>")

    live_view = live_generation(broken, model.cfg, prompt="p")
    assert live_view.start() and live_view.wait(20)
    assert "out of &lt;memory&gt;" in live_view.status.value and "color:#b00020" in live_view.status.value
    assert live_view.tokens_made == 2 and not live_view.generate_button.disabled
    with pytest.raises(RuntimeError, match="out of"):
        live_view.run()


def test_live_generation_ends_after_its_time(model):
    live_view = live(model, prompt="p", max_new_tokens=60, time_limit=0)
    live_view.run()
    assert live_view.tokens_made == 1 and "stopped after 0 seconds" in live_view.status.value


def test_pictures_are_throttled(model):
    live_view = live(model, prompt="p", max_new_tokens=60)
    live_view.run(temperature=1)
    gaps = np.diff(live_view.frames)[:-1]  # the last picture is drawn at the end, whenever that is
    assert (gaps >= 0.2 - 1e-6).all()


def test_only_what_both_versions_of_ipywidgets_have():
    """Names that came with ipywidgets 8, or that Colab's manager does not show, are not used."""
    source = Path(__file__).resolve().parent.parent / "dsv2" / "viz" / "widgets.py"
    used = {
        node.attr
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "ipywidgets"
    }
    seven = (
        "Button Checkbox Dropdown FloatSlider HBox HTML Image IntSlider Layout SelectionSlider Text Textarea"
    )
    assert used <= {*seven.split(), "VBox", "Widget"}
    traits = set(ipywidgets.Layout().trait_names())
    layouts = re.findall(r"Layout\(([^()]*)\)", source.read_text(encoding="utf-8"))
    names = {name for text in layouts for name in re.findall(r"(\w+)=", text)}
    assert names <= traits and not {n for n in names if n.startswith("border_")}
    # `tooltip` is a button's alone in ipywidgets 7.
    calls = [n for n in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    for call in calls:
        if any(keyword.arg == "tooltip" for keyword in call.keywords):
            assert ast.unparse(call.func) == "ipywidgets.Button"


def test_save_refuses_other_endings(tmp_path):
    with pytest.raises(ValueError, match="png"):
        save(new_figure(2, 2), tmp_path / "a.jpg")
