"""The figures of the decode kernel show hand-computed numbers, and their explorers answer the controls."""

from __future__ import annotations

import numpy as np
import pytest
from test_viz import outside, overlaps, texts_of

from dsv2.config import DSV2Config
from dsv2.course.folders import ROOT
from dsv2.kernels.schedule import Piece, pieces
from dsv2.viz import (
    describe,
    online_softmax_explorer,
    online_softmax_figure,
    schedule_explorer,
    schedule_figure,
    traffic_bars,
)
from dsv2.viz.decode import (
    COMBINE_COST,
    LENGTHS,
    PIECE_COST,
    SCORES,
    TOKENS,
    VALUES,
    batch_lengths,
    decode_traffic,
    measured_table,
    online_softmax,
    timeline,
    true_weights,
    whole_sequences,
)
from dsv2.viz.decode_results import share_of_limit_figure
from dsv2.viz.style import SMALL

FULL, LITE = DSV2Config.preset("full"), DSV2Config.preset("lite")
MIXED = SCORES["mixed"]


@pytest.fixture(scope="module")
def softmax():
    return online_softmax_explorer()


@pytest.fixture(scope="module")
def schedule():
    return schedule_explorer()


def figures() -> list:
    shown = [traffic_bars(FULL, 16, 8192), traffic_bars(FULL, 1, 8192), traffic_bars(LITE, 64, 4096)]
    for name, scores in SCORES.items():
        for tile, read in ((1, 12), (3, 0), (3, 2), (4, 3), (12, 1)):
            shown += [online_softmax_figure(scores, VALUES, tile, read, name != "mixed")]
    for lengths, parts, blocks, multiprocessors in (
        ([8192] * 4, 64, 2, 132),
        ([30, 0, 700], 3, 1, 8),
        ([0], 4, 1, 8),
        ([32768] * 128, 64, 2, 132),
    ):
        shown.append(schedule_figure(lengths, 64, parts, blocks, multiprocessors))
    return [*shown, share_of_limit_figure(ROOT / "data" / "benchmarks" / "decode_h100.json")]


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: describe(figure)[:50])
def test_texts_can_be_read(figure):
    texts = texts_of(figure)
    assert texts and min(text.get_fontsize() for text in texts) >= SMALL
    assert overlaps(figure, texts) == []
    assert outside(figure) == []
    assert len(describe(figure)) > 20


# ------------------------------------------------------------------------------------------- online softmax


@pytest.mark.parametrize("scores", SCORES.values(), ids=list(SCORES))
@pytest.mark.parametrize("tile", [1, 3, 5, 12])
def test_every_state_is_the_softmax_over_what_was_read(scores, tile):
    for count, state in enumerate(online_softmax(scores, VALUES, tile)):
        seen = min(count * tile, TOKENS)
        if not seen:
            assert (state.largest, state.total, state.mixture) == (-np.inf, 0, 0)
            continue
        exact = np.exp(np.array(scores[:seen]))
        assert state.largest == max(scores[:seen])
        assert state.total == pytest.approx(exact.sum() / np.exp(max(scores[:seen])))
        assert state.output == pytest.approx(exact @ np.array(VALUES[:seen]) / exact.sum())
        assert state.weights / state.total == pytest.approx(true_weights(scores, seen))
        assert state.mixture == pytest.approx(state.weights @ np.array(VALUES))


def test_without_the_rescale_early_tokens_count_too_much():
    """Two tokens of scores 0 and ln 3, one a tile: 1 + 1 in place of 1/3 + 1."""
    right, wrong = (
        online_softmax((0.0, np.log(3.0)), (4.0, 8.0), 1, rescale)[-1] for rescale in (True, False)
    )
    assert (right.total, right.output) == (pytest.approx(4 / 3), pytest.approx(7))
    assert (wrong.total, wrong.output) == (pytest.approx(2), pytest.approx(6))
    falling = SCORES["falling: the largest first"]  # nothing to shrink: the bug does not show
    assert online_softmax(falling, VALUES, 3, False)[-1].output == pytest.approx(
        online_softmax(falling, VALUES, 3)[-1].output
    )
    with pytest.raises(ValueError, match="tile=0"):
        online_softmax(MIXED, VALUES, 0)
    with pytest.raises(ValueError, match="read=5"):
        online_softmax_figure(MIXED, VALUES, 3, 5)


def test_softmax_figure_draws_the_running_and_the_true_weights():
    _, right = online_softmax_figure(MIXED, VALUES, 3, 4, rescale=False).axes
    heights = [patch.get_height() for patch in right.patches]
    assert heights[TOKENS:] == pytest.approx(list(true_weights(MIXED, TOKENS)))
    assert max(abs(a - b) for a, b in zip(heights[:TOKENS], heights[TOKENS:])) > 0.1
    _, right = online_softmax_figure(MIXED, VALUES, 3, 4).axes
    heights = [patch.get_height() for patch in right.patches]
    assert heights[:TOKENS] == pytest.approx(heights[TOKENS:])


def test_softmax_explorer(softmax):
    assert "After 2 of 4 tiles" in describe(softmax.figure)
    softmax.set(tile=1)
    assert softmax.controls["read"].max == TOKENS
    softmax.set(read=12)
    assert softmax.below.value.count("<tr>") == 13
    softmax.set(tile=6)
    assert softmax.values["read"] == 2 and "After 2 of 2 tiles" in describe(softmax.figure)
    softmax.set(rescale=False)
    assert "left out" in softmax.below.value
    softmax.reset()
    assert softmax.values == {"read": 2, "tile": 3, "scores": "mixed", "rescale": True}


def test_every_control_of_the_softmax_changes_the_picture(softmax):
    softmax.reset()
    before = softmax.image.value
    for change in ({"read": 3}, {"tile": 2}, {"scores": "one far above the others"}, {"rescale": False}):
        softmax.set(**change)
        assert softmax.error is None and softmax.image.value != before, change
        softmax.reset()
        assert softmax.image.value == before


# ----------------------------------------------------------------------------------------------- the traffic


def test_traffic_of_v2_by_hand():
    """16 texts of 8,192: 131,072 rows of 576 numbers; 128 heads."""
    calls, few, half, all_ = decode_traffic(FULL, 16, 8192)
    assert calls.cache == 131_072 * (512 + 512 + 64) * 2
    assert calls.scores == 6 * 128 * 131_072 * 2
    assert [way.cache for way in (few, half, all_)] == [n * 131_072 * 576 * 2 for n in (8, 2, 1)]
    assert [way.scores for way in (few, half, all_)] == [0, 0, 0]
    # 2 blocks of 64 heads: 64 parts on 132 places, four to a text, each with 513 numbers a head.
    assert half.partial == 64 * 128 * 513 * 4 * 2
    assert few.partial == 0  # 132 / 8 blocks: a text for each part
    assert half.total == half.cache + half.partial


def test_few_heads_make_one_block():
    ways = decode_traffic(LITE, 64, 4096)
    assert [way.name for way in ways] == ["PyTorch, four calls", "fused, 16 heads a program"]
    (axes,) = traffic_bars(LITE, 64, 4096).axes
    assert [patch.get_width() for patch in axes.patches[:3]] == pytest.approx(
        [ways[0].cache / 1e6, ways[0].scores / 1e6, 0]
    )


def test_a_stored_measurement_in_words():
    shape = {"kind": "table", "heads": 2, "batch": 3, "slots": 1000, "cached": 3000}
    rows = [
        {"contender": "slow", **shape, "us": 40.0, "share": 0.25},
        {"contender": "the fast one", **shape, "us": 12.5, "share": 0.8},
        {"contender": "absent", **shape, "skipped": "not installed"},
        {"contender": "another batch", **shape | {"batch": 4}, "us": 1.0, "share": 0.5},
        {"contender": "paged", **shape | {"kind": "paged"}, "us": 1.0, "share": 0.5},
    ]
    assert measured_table({"results": rows}, 2, 3, 1000).splitlines() == [
        "2 heads, 3 texts of 1,000 cached tokens: the limit is 10.0 µs",
        "  the fast one      12.5 µs    80%",
        "  slow              40.0 µs    25%",
    ]
    assert measured_table({"results": rows}, 2, 5, 1000).endswith("not measured")


# ---------------------------------------------------------------------------------------------- the schedule


def test_timeline_by_hand():
    """Tiles of 10: 4 and 2 of them on two multiprocessors, whole and in two equal parts."""
    whole = timeline(whole_sequences([40, 0, 15]), 10, 1, 2)
    assert [(run.multiprocessor, run.sequence, run.stop - run.start) for run in whole.runs] == [
        (0, 0, 4 + PIECE_COST),
        (1, 2, 2 + PIECE_COST),
    ]
    assert whole.end == whole.split_end == 4 + PIECE_COST
    assert whole.busy == pytest.approx((6 + 2 * PIECE_COST) / (2 * (4 + PIECE_COST)))
    split = timeline(pieces([40, 0, 15], 10, 2), 10, 1, 2)
    assert split.split_end == 3 + 2 * PIECE_COST  # a tile of the first text, and the other one
    assert split.end == split.split_end + COMBINE_COST


def test_timeline_never_uses_a_multiprocessor_twice_at_once():
    lengths = batch_lengths("ragged", 32, 5000)
    for work in (whole_sequences(lengths), pieces(lengths, 64, 16)):
        plan = timeline(work, 64, 8, 10)
        for number in range(10):
            runs = sorted((run.start, run.stop) for run in plan.runs if run.multiprocessor == number)
            assert all(a[1] <= b[0] for a, b in zip(runs, runs[1:]))
        tiles = sum(-(-length // 64) for length in lengths)
        reading = sum(run.stop - run.start - PIECE_COST for run in plan.runs)
        assert reading == 8 * tiles  # every tile once for each block of heads
    assert timeline([], 64, 2, 4).busy == 0
    assert timeline([Piece(0, 0, 0, 64)], 64, 3, 2).split_end == 2 * (1 + PIECE_COST)


@pytest.mark.parametrize("kind", LENGTHS)
def test_lengths_of_a_batch(kind):
    lengths = batch_lengths(kind, 16, 4096)
    assert len(lengths) == 16 and max(lengths) == lengths[0] == 4096 and min(lengths) >= 1
    assert (len(set(lengths)) == 1) == (kind == "equal")
    with pytest.raises(ValueError, match="kind='long' is unknown"):
        batch_lengths("long", 2, 8)


def test_schedule_figure_draws_every_run():
    lengths = [300, 20, 640]
    above, below = schedule_figure(lengths, 64, 4, 2, 8).axes
    for axes, work in ((above, whole_sequences(lengths)), (below, pieces(lengths, 64, 4))):
        drawn = {collection.get_gid(): collection for collection in axes.collections}
        assert len(drawn["runs"].get_paths()) == 2 * len(work)
        assert ("combine" in drawn) == (len(work) > 3)


def test_a_split_helps_where_texts_are_few(schedule):
    schedule.reset()
    said = describe(schedule.set(batch=1, lengths="equal", longest=8192))
    assert "not split: done after 129 tiles' time" in said
    assert "64 parts: done after 7 tiles' time" in said  # 2 tiles, a piece, merging
    said = describe(schedule.set(batch=128, longest=4096))
    assert said.count("done after 130 tiles' time") == 2  # two texts each, either way
    schedule.reset()


def test_every_control_of_the_schedule_changes_the_picture(schedule):
    schedule.reset()
    before = schedule.image.value
    for change in (
        {"batch": 8},
        {"lengths": "equal"},
        {"longest": 4096},
        {"heads": "16 heads"},
        {"gpu": "8, to look at"},
        {"parts": 4},
    ):
        schedule.set(**change)
        assert schedule.error is None and schedule.image.value != before, change
        schedule.reset()
        assert schedule.image.value == before
    assert "114 programs" in schedule.below.value
