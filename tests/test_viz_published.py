"""The figures of the published numbers: every point and bar is a row's number, and can be read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_viz import outside, overlaps, texts_of

from dsv2.accounting import training_flops_per_token
from dsv2.published import published_models, published_numbers
from dsv2.viz import (
    ablation_scores,
    describe,
    headline_bars,
    score_explorer,
    score_map,
    score_panels,
    sparsity_map,
)
from dsv2.viz.published import AGAINST, BENCHMARKS, COLOURS, MARKERS, score_points, sparsity_points
from dsv2.viz.style import SMALL

NUMBERS = published_numbers()
ROWS = NUMBERS.base_scores
V2 = "DeepSeek-V2"


def readable(figure) -> None:
    figure.canvas.draw()
    assert overlaps(figure, texts_of(figure)) == [] and outside(figure) == []
    assert min(text.get_fontsize() for text in texts_of(figure)) >= SMALL


def markers(axes) -> set[tuple[float, float]]:
    """The points drawn by a marker, without lines."""
    points = [line for line in axes.lines if line.get_marker() not in ("None", "", "_")]
    return {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in points}


def widths(axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches]


def said(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# ------------------------------------------------------------------------------------------- benchmarks


@pytest.mark.parametrize("against", AGAINST)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_map_shows_the_rows_and_can_be_read(benchmark, against):
    figure = score_map(benchmark, against)
    readable(figure)
    (axes,) = figure.axes
    if against == "compute":
        tokens = {run.model: run for run in NUMBERS.training if run.phase == "pre-training"}
        configs = published_models()
        place = {
            model: 1e9 * run.tokens_b * training_flops_per_token(configs[model], run.sequence_tokens).total
            for model, run in tokens.items()
        }
        assert set(place) == {"DeepSeek 67B", V2, "DeepSeek-V2-Lite", "LLaMA3 70B"}
    else:
        place = {row.model: getattr(row, f"{against}_parameters_b") for row in ROWS}
    expected = {(place[row.model], row.scores_percent[benchmark]) for row in ROWS if row.model in place}
    found = sorted(markers(axes))
    np.testing.assert_allclose(found, sorted(expected))
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    assert all(low < x < high and bottom < y < top for x, y in found)
    for row in ROWS:
        named = f"{row.model} {row.scores_percent[benchmark]:.1f}" in said(axes)
        assert named == (row.model in place)
        assert row.model in describe(figure)
    assert "(billions)" in axes.get_xlabel() or "(FLOPs" in axes.get_xlabel()
    assert axes.get_ylabel() == "score (%)"


def test_what_is_left_out_is_said_on_the_figure():
    title = score_map("MMLU", "compute").axes[0].get_title("left")
    assert "left out" in title and "Qwen1.5 72B" in title and "Mixtral 8x22B" in title
    below = [text.get_text() for text in score_panels("compute").texts]
    assert any("without Qwen1.5 72B, Mixtral 8x22B" in text for text in below)
    assert "left out" not in score_map("MMLU").axes[0].get_title("left")


def test_ticks_of_the_training_compute_are_where_they_say():
    """A power of ten taken from the digits of a float would be one too low."""
    figure = score_map("MMLU", "compute")
    figure.canvas.draw()
    axes = figure.axes[0]
    ticks = {tick: label.get_text() for tick, label in zip(axes.get_xticks(), axes.get_xticklabels())}
    assert ticks == {1e23: "$10^{23}$", 1e24: "$10^{24}$", 1e25: "$10^{25}$"}


@pytest.mark.parametrize("against", AGAINST)
def test_panels_show_all_eight_benchmarks(against):
    figure = score_panels(against)
    readable(figure)
    assert [axes.get_title("left") for axes in figure.axes] == [*BENCHMARKS] == [*ROWS[0].scores_percent]
    for axes, benchmark in zip(figure.axes, BENCHMARKS):
        np.testing.assert_allclose(sorted(markers(axes)), sorted(score_points(benchmark, against).values()))


def test_an_altered_score_moves_its_point_and_no_other():
    rows = list(ROWS)
    rows[4] = dataclasses.replace(rows[4], scores_percent={**rows[4].scores_percent, "MMLU": 70.5})
    moved = markers(score_map("MMLU", rows=rows).axes[0]) ^ markers(score_map("MMLU").axes[0])
    assert moved == {(21.0, 78.5), (21.0, 70.5)}


def test_models_differ_by_more_than_colour():
    """V2-Lite alone shares a shape, with V2; it is far away on every axis."""
    big = {model: mark for model, mark in MARKERS.items() if model != "DeepSeek-V2-Lite"}
    assert len(set(big.values())) == len(big) and len(set(COLOURS.values())) == len(COLOURS)
    assert {row.model for row in ROWS} == set(COLOURS) == set(MARKERS)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="benchmark='ARC' is not among MMLU, BBH"):
        score_points("ARC")
    with pytest.raises(ValueError, match="against='price' is not among activated, total, compute"):
        score_points("MMLU", "price")


def test_the_explorers_menus_draw_what_they_say():
    explorer = score_explorer()
    for benchmark, against in (("MATH", "activated"), ("C-Eval", "compute"), ("MBPP", "total")):
        explorer.set(benchmark=benchmark, against=against)
        assert explorer.error is None
        points = [*score_points(benchmark, against).values()]
        np.testing.assert_allclose(sorted(markers(explorer.figure.axes[0])), sorted(points))
    assert {option[1] for option in explorer.controls["against"].options} == set(AGAINST)


# -------------------------------------------------------------------------- figure 1, the ablations, chat


def test_headline_bars_are_figure_1s():
    figure = headline_bars()
    readable(figure)
    assert len(figure.axes) == 3
    for axes, pair in zip(figure.axes, NUMBERS.figure_1):
        assert [bar.get_height() for bar in axes.patches] == [pair.dense_67b, pair.v2]
        assert axes.get_ylim()[0] == 0
        assert any(text.startswith(f"{pair.stated:g} ") for text in said(axes))
        assert axes.get_xlabel().split()[0] == pair.reading.split()[0]
    words = describe(figure)
    assert all(text in words for text in ("42.51 % saved", "93.34 % saved", "5.76 times as much"))


def test_an_altered_bar_alters_the_ratio_in_words_and_not_the_papers():
    rows = list(NUMBERS.figure_1)
    rows[0] = dataclasses.replace(rows[0], v2=150.3)
    words = describe(headline_bars(rows))
    assert "50.00 % saved by these numbers, 42.5 in the paper" in words


@pytest.mark.parametrize("table", ["table_8", "table_9"])
def test_ablation_bars_are_the_tables(table):
    rows = getattr(NUMBERS, table)
    figure = ablation_scores(rows)
    readable(figure)
    scales = [*dict.fromkeys(row.scale for row in rows)]
    for axes, scale in zip(figure.axes, scales):
        here = [row for row in rows if row.scale == scale]
        expected = [row.scores_percent[name] for name in here[0].scores_percent for row in here]
        assert widths(axes) == expected
        assert axes.get_xlim() == figure.axes[0].get_xlim()
        for row in here[1:]:
            for name, score in row.scores_percent.items():
                assert f"{score:.1f} ({score - here[0].scores_percent[name]:+.1f})" in said(axes)
    if table == "table_9":
        cache = figure.axes[-1]
        assert widths(cache) == [row.kv_elements_per_token_k for row in rows] == [110.6, 15.6, 860.2, 34.6]
        assert said(cache) == ["110.6", "15.6 (14 %)", "860.2", "34.6 (4 %)"]
    else:
        assert len(figure.axes) == 1
    assert all(row.attention in describe(figure) for row in rows)


# ------------------------------------------------------------------------------------------- the sparsity map


def test_the_map_of_sparsity_shows_every_row_where_it_is():
    figure = sparsity_map()
    readable(figure)
    (axes,) = figure.axes
    known = {(row.total_parameters_b, row.activated_parameters_b) for row in ROWS} | {(1200, 96.6)}
    assert markers(axes) == {(float(x), float(y)) for x, y in known}
    least = {
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axes.lines
        if line.get_marker() == "_"
    }
    assert least == {(395.0, 395 / 64), (1571.0, 1571 / 2048)}
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert all(left < x < right and bottom < y < top for x, y in known | least)
    named = "\n".join(said(axes))
    assert all(row.model in named for row in (*ROWS, *NUMBERS.sparse_models))
    words = describe(figure)
    assert "DeepSeek-V2 21B of 236B, 8.9%" in words and "Switch-C at least 0.77B of 1571B" in words


def test_the_lines_of_the_map_are_shares_of_all_parameters():
    lines = [line for line in sparsity_map().axes[0].lines if len(line.get_xdata()) == 2]
    shares = [np.asarray(line.get_ydata()) / np.asarray(line.get_xdata()) for line in lines]
    np.testing.assert_allclose(shares, [[1, 1], [0.1, 0.1], [0.01, 0.01], [0.001, 0.001]])


def test_a_published_count_replaces_the_bound():
    sparse = [
        dataclasses.replace(row, activated_parameters_b=13.0) if row.model == "Switch-XXL" else row
        for row in NUMBERS.sparse_models
    ]
    assert sparsity_points(sparse)["Switch-XXL"] == (395, 13.0, True)
    assert (395.0, 13.0) in markers(sparsity_map(sparse).axes[0])
