"""The figures of weight absorption show hand-computed numbers, and the explorer answers its controls."""

from __future__ import annotations

import re
import statistics

import pytest
from test_viz import outside, overlaps, texts_of

from dsv2.accounting import decode_bytes, decode_flops
from dsv2.attention.mla import absorbed_is_cheaper
from dsv2.config import DSV2Config
from dsv2.viz import describe, forms_crossing, forms_times, roofline_explorer, two_forms
from dsv2.viz.roofline import (
    ABSORBED,
    COLOURS,
    KEPT,
    KINDS,
    REBUILT,
    attention_step,
    forms_macs,
    number_width,
    roofline_devices,
    time_text,
)
from dsv2.viz.style import SMALL

FULL, LITE = DSV2Config.preset("full"), DSV2Config.preset("lite")
H100 = roofline_devices()["H100 80GB"]
TIMES = {"rebuilt": [12, 25, 50, 90, 200, 400], "absorbed": [0.7, 0.9, 1.2, 1.4, 2.2, 4.0], "kept": [1] * 6}
CACHED = [256, 512, 1024, 2048, 4096, 8192]


def line(axes, name):
    return next(line for line in axes.lines if line.get_label() == name)


@pytest.fixture(scope="module")
def explorer():
    return roofline_explorer()


def figures() -> list:
    shown = [two_forms(), two_forms(5), forms_crossing(FULL, 4096), forms_times(CACHED, TIMES)]
    for device in roofline_devices():
        for kind in (ABSORBED, REBUILT, "MHA"):
            shown.append(roofline_explorer(kind=kind, device=device).figure)
    return shown


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: describe(figure)[:40])
def test_texts_can_be_read(figure):
    texts = texts_of(figure)
    assert texts and min(text.get_fontsize() for text in texts) >= SMALL
    assert overlaps(figure, texts) == []
    assert outside(figure) == []
    assert len(describe(figure)) > 60


def test_two_forms_draws_every_product_with_a_matrix():
    expanded, absorbed = two_forms(7).axes
    count = [[patch.get_gid() for patch in axes.patches].count("matrix") for axes in (expanded, absorbed)]
    assert count == [14, 2]
    assert [axes.get_title(loc="left") for axes in (expanded, absorbed)] == [
        "expanded: 14 products with a matrix",
        "absorbed: 2 products with a matrix",
    ]
    with pytest.raises(ValueError, match="columns=0"):
        two_forms(0)


def test_multiply_adds_of_a_head():
    """V2, 1 query, 1 key: 256 x 512 + 320 and 256 x 512 + 1088."""
    assert forms_macs(FULL, 1, 1) == {"expanded": 131_392, "absorbed": 132_160}
    assert forms_macs(FULL, 3, 10) == {
        "expanded": 10 * 131_072 + 30 * 320,
        "absorbed": 3 * 131_072 + 30 * 1088,
    }


@pytest.mark.parametrize("keys", [1, 40, 512, 4096, 100_000])
def test_forms_cross_where_the_model_changes_its_form(keys):
    (axes,) = forms_crossing(FULL, keys, most=512).axes
    at = line(axes, "crossing").get_xdata()[0]
    for tokens in range(1, 400):
        # Not counted at the crossing itself, where both are the same number.
        if abs(tokens - at) > 1e-6:
            assert absorbed_is_cheaper(FULL, tokens, keys) == (tokens < at)
    expanded = line(axes, "expanded").get_xydata()
    assert expanded[1].tolist() == [512, pytest.approx((131_072 * keys + 512 * keys * 320) / 1e6)]


def test_forms_may_never_cross():
    narrow = FULL.replace(kv_lora_rank=100)  # 2 x 100 < 128 + 128
    figure = forms_crossing(narrow, 4096)
    assert "crossing" not in [line.get_label() for line in figure.axes[0].lines]
    assert "cheaper for all" in describe(figure)
    with pytest.raises(ValueError, match="keys=0"):
        forms_crossing(FULL, 0)


def test_forms_times_shows_the_ratios_of_the_first_two():
    (axes,) = forms_times(CACHED, TIMES).axes
    assert [text.get_text() for text in axes.texts[-6:]] == ["17x", "28x", "42x", "64x", "91x", "100x"]
    assert line(axes, "absorbed").get_ydata()[-1] == 4.0
    assert "8,192: 100.0" in describe(axes.figure)
    with pytest.raises(ValueError, match="2 times each"):
        forms_times([1, 2], {"a": [1.0, 2.0], "b": [1.0]})
    with pytest.raises(ValueError, match="above 0"):
        forms_times([1, 2], {"a": [1.0, 2.0], "b": [1.0, 0.0]})


# ----------------------------------------------------------------------------------------------- the roofline


def test_intensities_of_v2():
    """All heads read one latent: 2 x 128 x 1088 FLOPs for 576 numbers of 2 bytes."""
    intensity = {kind: attention_step(kind, FULL, 3, 1000).intensity for kind in KINDS}
    assert intensity == {
        ABSORBED: pytest.approx(2 * 128 * 1088 / 1152),
        REBUILT: pytest.approx(2 * 128 * (131_072 + 320) / (2 * (576 + 2 * 128 * 320))),
        KEPT: 1,
        "MHA": 1,
        "GQA, 8 groups": 16,
        "MQA": 128,
    }
    assert attention_step("GQA, 8 groups", FULL.replace(num_attention_heads=4), 1, 10).intensity == 1
    with pytest.raises(ValueError, match="kind='MLA' is unknown"):
        attention_step("MLA", FULL, 1, 1)


@pytest.mark.parametrize("kind, form", [(ABSORBED, "absorbed"), (KEPT, "cached")])
@pytest.mark.parametrize("cfg", [FULL, LITE], ids=["full", "lite"])
def test_steps_agree_with_the_accounting_of_the_whole_model(cfg, kind, form):
    step = attention_step(kind, cfg, 4, 1000)
    layers = cfg.num_hidden_layers
    assert layers * step.bytes == decode_bytes(cfg, 1000, 4, form).cache
    # The accounting's query sees itself too: 999 cached tokens and one new.
    assert layers * step.flops == 4 * decode_flops(cfg, 999, form).scores_and_values


def test_rebuilding_costs_what_the_expansion_costs():
    """Every latent of the cache through W^UK and W^UV, beside the attention on what comes out."""
    step, kept = (attention_step(kind, LITE, 1, 500) for kind in (REBUILT, KEPT))
    expansion = decode_flops(LITE, 499, "expanded").expansion / LITE.num_hidden_layers
    assert step.flops - kept.flops == expansion
    assert step.bytes - 2 * kept.bytes == 500 * 576 * 2  # written, read, and the latents


def test_reading_and_computing_on_an_h100():
    """16 texts of 8,192 tokens: 151 MB at 3.35 TB/s; 36.5 GFLOP at 989 TFLOP/s."""
    step = attention_step(ABSORBED, FULL, 16, 8192)
    assert step.reading(H100) == pytest.approx(45.07e-6, rel=1e-3)
    assert step.computing(H100) == pytest.approx(36.90e-6, rel=1e-3)
    assert (step.limit(H100), step.seconds(H100)) == ("reading", step.reading(H100))
    # The rates that a real one reached put the same step on the other side of the balance.
    assert step.limit(roofline_devices()["H100 80GB, measured"]) == "computing"
    assert number_width(H100) == 2 and number_width(roofline_devices()["laptop CPU"]) == 4


@pytest.mark.parametrize(
    "seconds, text",
    [(4.507e-5, "45.1 µs"), (0.00099999, "1 ms"), (0.0123, "12.3 ms"), (2.5, "2.5 s"), (1e-8, "0.01 µs")],
)
def test_time_text(seconds, text):
    assert time_text(seconds) == text


def test_explorer_puts_the_kind_on_the_roof(explorer):
    figure = explorer.set(kind=ABSORBED, device="H100 80GB", heads=128, batch=16, context=8192)
    left, right = figure.axes
    ((x, y),) = line(left, ABSORBED).get_xydata()
    assert (x, y) == (pytest.approx(241.78, abs=0.01), pytest.approx(241.78 * 3.35, rel=1e-4))
    assert line(left, "balance").get_xdata()[0] == pytest.approx(989.4 / 3.35)
    assert [patch.get_width() for patch in right.patches] == [1.0, pytest.approx(36.90 / 45.07, rel=1e-3)]
    assert "242 FLOPs a byte:\n82 % of the peak" in [text.get_text() for text in left.texts]
    explorer.reset()


def test_a_larger_batch_takes_longer_at_the_same_place(explorer):
    one, many = (describe(explorer.set(batch=batch)) for batch in (1, 128))
    assert one.split("Reading")[0] == many.split("Reading")[0]  # FLOPs a byte, and the balance
    assert "Reading takes 2.82 µs" in one and "Reading takes 361 µs" in many
    explorer.reset()


def test_few_heads_wait_for_memory(explorer):
    explorer.set(heads=16)
    assert "30.2 FLOPs a byte" in describe(explorer.figure) and "reading is the limit" in describe(
        explorer.figure
    )
    explorer.reset()


def test_the_caption_ranks_all_kinds(explorer):
    explorer.set(kind=REBUILT)
    rows = re.findall(r"<tr style.*?</tr>", explorer.below.value)
    assert len(rows) == len(KINDS)
    assert "font-weight:bold" in rows[-1] and REBUILT in rows[-1]
    assert next(i for i, row in enumerate(rows) if ABSORBED in row) < next(
        i for i, row in enumerate(rows) if KEPT in row
    )
    explorer.reset()


def test_every_control_changes_the_picture(explorer):
    before = explorer.image.value
    for change in (
        {"kind": REBUILT},
        {"device": "T4"},
        {"heads": 16},
        {"batch": 1},
        {"context": 256},
    ):
        explorer.set(**change)
        assert explorer.error is None and explorer.image.value != before, change
        explorer.reset()
        assert explorer.image.value == before


def test_explorer_of_another_model_and_unknown_names():
    explorer = roofline_explorer(LITE)
    assert explorer.values["heads"] == 16
    assert statistics.median(explorer.update_ms) > 0
    with pytest.raises(ValueError, match="device='abacus' must be one of"):
        roofline_explorer(device="abacus")
    assert set(COLOURS) <= set(KINDS)
