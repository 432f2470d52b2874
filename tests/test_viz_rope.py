"""Figures of rotary positions: hands and marks stand where they should, sliders move them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from dsv2 import viz
from dsv2.config import DSV2Config
from dsv2.rope import rope_frequencies, yarn_correction_range, yarn_frequencies
from dsv2.viz import describe
from dsv2.viz.rope import angle_text
from dsv2.viz.style import SMALL

FULL = DSV2Config.preset("full")


def angle(hand) -> float:
    """Degrees of a hand, from its two points."""
    (x0, x1), (y0, y1) = hand.get_xdata(), hand.get_ydata()
    return math.degrees(math.atan2(y1 - y0, x1 - x0)) % 360


def texts(figure) -> list[Text]:
    """What is written, ticks left out: matplotlib keeps labels of ticks that it does not draw."""
    figure.canvas.draw()
    ticks = {t for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for t in axis.get_ticklabels()}
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in ticks]


def readable(figure) -> None:
    """Nothing too small, beyond the edge, or over another text; and the figure is described."""
    shown = texts(figure)
    assert min(t.get_fontsize() for t in shown) >= SMALL
    renderer = figure.canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in shown]
    width, height = figure.canvas.get_width_height()
    for said, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, said
    for (said, box), (other, second) in itertools.combinations(boxes, 2):
        overlap = (
            min(box.x1, second.x1) - max(box.x0, second.x0) > 1
            and min(box.y1, second.y1) - max(box.y0, second.y0) > 1
        )
        assert not overlap, (said, other)
    assert len(describe(figure)) > 40


# ------------------------------------------------------------------------------------------------- clocks


def test_hands_point_at_position_times_frequency():
    figure = viz.rope_clocks(12, 9, dim=6, theta=1000.0)
    assert len(figure.clocks) == 3
    for clock, frequency in zip(figure.clocks, (1.0, 0.1, 0.01)):  # 1000^(-0/6), ^(-2/6), ^(-4/6)
        assert angle(clock["query"]) == pytest.approx(math.degrees(12 * frequency) % 360, abs=1e-3)
        assert angle(clock["key"]) == pytest.approx(math.degrees(9 * frequency) % 360, abs=1e-3)
        wedge = clock["wedge"]
        assert wedge.theta2 - wedge.theta1 == pytest.approx(math.degrees(3 * frequency), abs=1e-3)
        assert wedge.theta1 % 360 == pytest.approx(angle(clock["key"]), abs=1e-3)
    readable(figure)
    assert "pair 0 172°" in describe(figure) and "pair 1 17°" in describe(figure)


def test_a_key_ahead_of_the_query_is_a_negative_angle():
    figure = viz.rope_clocks(9, 12, dim=6, theta=1000.0)
    clock = figure.clocks[1]
    assert "-17°" in clock["apart"].get_text()
    # The wedge is drawn from the hand that is behind, here the query's.
    assert clock["wedge"].theta1 % 360 == pytest.approx(angle(clock["query"]), abs=1e-3)
    assert clock["wedge"].theta2 - clock["wedge"].theta1 == pytest.approx(math.degrees(0.3), abs=1e-3)


def test_moved_hands_are_those_of_a_new_figure():
    reused = viz.rope_clocks(3, 150, dim=8, theta=50.0)
    assert viz.rope_clocks(77, 5, dim=8, theta=700.0, figure=reused) is reused
    fresh = viz.rope_clocks(77, 5, dim=8, theta=700.0)
    assert viz.png(reused) == viz.png(fresh)
    assert describe(reused) == describe(fresh)
    other = viz.rope_clocks(77, 5, dim=10, theta=700.0, figure=reused)
    assert other is not reused and len(other.clocks) == 5, "another number of clocks is another figure"


def test_same_place_has_no_wedge():
    assert not any(clock["wedge"].get_visible() for clock in viz.rope_clocks(7, 7).clocks)


@pytest.mark.parametrize(
    ("radians", "text"),
    [
        (0, "0°"),
        (math.pi, "180°"),
        (-math.pi / 2, "-90°"),
        (0.1, "5.7°"),
        (2 * math.pi, "1.0 turns"),
        (-22, "-3.5 turns"),
    ],
)
def test_angles_in_words(radians, text):
    assert angle_text(radians) == text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((-1, 3), "query"), ((3, -1), "key"), ((1, 1, 7), "dim"), ((1, 1, 8, 1.0), "theta")],
)
def test_clocks_refuse_what_makes_no_sense(arguments, named):
    query, key, *rest = arguments
    options = dict(zip(("dim", "theta"), rest))
    with pytest.raises(ValueError, match=named):
        viz.rope_clocks(query, key, **options)


# --------------------------------------------------------------------------------------------- the sliders


def test_sliders_move_the_hands():
    explorer = viz.rotation_clocks(dim=8, last=50)
    assert set(explorer.controls) == {"query", "key", "both", "base"}
    before = [angle(clock["query"]) for clock in explorer.figure.clocks]
    picture = explorer.image.value
    explorer.set(query=30, key=10)
    after = [angle(clock["query"]) for clock in explorer.figure.clocks]
    assert all(abs(a - b) > 1e-3 for a, b in zip(before, after)) and explorer.image.value != picture
    assert angle(explorer.figure.clocks[1]["query"]) == pytest.approx(math.degrees(30 * 0.1) % 360, abs=1e-3)
    assert "20 apart" in describe_title(explorer.figure)
    readable(explorer.figure)


def describe_title(figure) -> str:
    return figure.axes[0].get_title(loc="left")


def test_moving_both_changes_hands_and_no_angle():
    explorer = viz.rotation_clocks()
    angles = [clock["apart"].get_text() for clock in explorer.figure.clocks]
    hand, below = angle(explorer.figure.clocks[0]["key"]), explorer.below.value
    explorer.set(both=1000)
    assert [clock["apart"].get_text() for clock in explorer.figure.clocks] == angles
    assert angle(explorer.figure.clocks[0]["key"]) == pytest.approx(math.degrees(1009.0) % 360, abs=0.05)
    assert abs(angle(explorer.figure.clocks[0]["key"]) - hand) > 1
    assert explorer.below.value == below, "the score depends on the distance alone"


def test_the_score_below_is_that_of_rotated_vectors():
    """An independent count: turn a vector of ones to both positions and compare."""
    explorer = viz.rotation_clocks(dim=6)
    explorer.set(query=7, key=3, base=2.0)
    angles = np.outer([7, 3], 100.0 ** -(np.arange(3) / 3))
    turned = np.exp(1j * angles)
    score = (turned[0] * turned[1].conj()).real.mean()
    assert f"{score:+.3f}" in explorer.below.value
    assert "Base 100:" in explorer.below.value


def test_every_corner_of_the_sliders_is_readable():
    explorer = viz.rotation_clocks()
    for base, query, key, both in ((1.0, 0, 200, 1000), (6.0, 200, 0, 1000), (6.0, 0, 0, 0)):
        explorer.set(base=base, query=query, key=key, both=both)
        readable(explorer.figure)


# ------------------------------------------------------------------------------------------ frequencies


def test_cosines_of_pairs():
    frequencies = rope_frequencies(64)
    figure = viz.pair_cosines(frequencies, pairs=(0, 12), distances=100)
    first, second = figure.axes
    for panel, pair in ((first, 0), (second, 12)):
        x, y = panel.lines[0].get_data()
        assert x[0] == 0 and x[-1] == 100
        assert np.allclose(y, np.cos(np.asarray(x) * 10000.0 ** (-2 * pair / 64)), atol=1e-4)
    readable(figure)
    with pytest.raises(ValueError, match="pairs"):
        viz.pair_cosines(frequencies, pairs=(0, 32))


def test_wavelengths_of_rope_and_yarn():
    yarn = FULL.rope_scaling
    plain, slowed = rope_frequencies(64), yarn_frequencies(64, 10000.0, yarn)
    ramp = yarn_correction_range(64, 10000.0, yarn)
    figure = viz.rope_wavelengths({"RoPE": plain, "YaRN": slowed}, {"4K tokens": 4096}, ramp)
    (axes,) = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert drawn["RoPE"][0] == pytest.approx(2 * math.pi)
    assert drawn["RoPE"][31] == pytest.approx(47_117, abs=1)
    assert drawn["YaRN"][10] == pytest.approx(drawn["RoPE"][10]), "before the ramp nothing changes"
    assert drawn["YaRN"][23] == pytest.approx(40 * drawn["RoPE"][23], rel=1e-5), "behind it all of the factor"
    assert axes.get_yscale() == "log" and axes.get_ylabel()
    assert any(np.allclose(line.get_ydata(), 4096) for line in axes.lines)
    assert "10 to 23" in describe(figure)
    readable(figure)


# ------------------------------------------------------------------------------------ errors and layouts


def test_errors_by_distance():
    distances = [0, 1, 4, 64]
    errors = {"broken": [0.0, 0.3, 1.0, 1.4], "mended": [2e-7, 3e-7, 2e-7, 1e-7]}
    figure = viz.absorption_errors(distances, errors)
    (axes,) = figure.axes
    broken, mended = axes.lines[:2]
    assert list(broken.get_xdata()) == distances
    assert list(broken.get_ydata()) == [1e-8, 0.3, 1.0, 1.4], "a zero lies at the lower edge of a log axis"
    assert list(mended.get_ydata()) == errors["mended"]
    readable(figure)
    with pytest.raises(ValueError, match="errors must hold 4 numbers"):
        viz.absorption_errors(distances, {"short": [1.0]})


def test_layouts_are_a_permutation_that_keeps_the_pairs():
    figure = viz.channel_layouts(6)
    (axes,) = figure.axes
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    numbers = [t.get_text() for t in axes.texts if t.get_text().isdigit()]
    assert numbers == ["0", "1", "2", "3", "4", "5", "0", "2", "4", "1", "3", "5"]
    colour = {number: box.get_facecolor() for number, box in zip(numbers[:6], boxes[:6])}
    for number, box in zip(numbers[6:], boxes[6:]):
        assert box.get_facecolor() == colour[number], "a channel keeps the colour of its pair"
    assert colour["0"] == colour["1"] != colour["2"]
    readable(figure)
    with pytest.raises(ValueError, match="dim=5"):
        viz.channel_layouts(5)


def test_losses_are_bars_in_their_order():
    figure = viz.position_losses({"as trained": 1.39, "moved": 1.391, "shuffled": 3.8})
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [1.39, 1.391, 3.8]
    same, moved, worse = (bar.get_facecolor() for bar in axes.patches)
    assert same == moved != worse
    assert axes.yaxis_inverted(), "the first stands on top"
    readable(figure)
