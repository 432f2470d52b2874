"""The figures of chapter 09: areas are parameters, dots are counts, sliders move a config's fields."""

from __future__ import annotations

import pytest
import torch
from matplotlib.axes import Axes
from test_viz import outside, overlaps, texts_of

from dsv2 import DeepSeekV2, DSV2Config
from dsv2.accounting import attention_twin, layer_parameters, parameters
from dsv2.viz import budget, budget_explorer, budget_figure, convention_dots, describe, logit_differences
from dsv2.viz.budget import LEFT_OUT, MODELS, PART_COLOURS, SLIDERS, count_text, rounding_range
from dsv2.viz.style import SMALL

FULL, LITE, TINY = (DSV2Config.preset(name) for name in ("full", "lite", "tiny"))
TIED = TINY.replace(tie_word_embeddings=True, first_k_dense_replace=2, moe_layer_freq=2)
PUBLISHED = {
    "DeepSeek-V2": (FULL, "21B"),
    "V2-Lite": (LITE, "2.4B"),
    "V2-Lite with MHA": (attention_twin(LITE, "mha"), "2.5B"),
}


def areas(panel: Axes) -> dict[str, float]:
    """The area of every part that is drawn, by its label, by the shoelace formula."""
    found: dict[str, float] = {}
    for drawn in panel.collections:
        for path in drawn.get_paths():
            x, y = path.vertices.T
            area = abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2
            found[drawn.get_label()] = found.get(drawn.get_label(), 0.0) + area
    return found


# ----------------------------------------------------------------------------------------------- the budget


@pytest.mark.parametrize("cfg", [FULL, LITE, TINY, TIED], ids=["full", "lite", "tiny", "tied"])
@pytest.mark.parametrize("convention", LEFT_OUT)
def test_areas_are_parameters(cfg, convention):
    """Counted by the model's own tensors, not by the accounting that the figure draws from."""
    figure = budget_figure(cfg, convention)
    with torch.device("meta"):
        model = DeepSeekV2(cfg)
    for panel, activated in zip(figure.axes, (False, True)):
        found = areas(panel)
        assert sum(found.values()) == pytest.approx(model.num_parameters(activated), rel=1e-9)
        left = sum(area for name, area in found.items() if name.endswith("left out"))
        counted = parameters(cfg, activated).conventions()[convention]
        assert sum(found.values()) - left == pytest.approx(counted, rel=1e-9)
    attention = sum(p.numel() for block in model.layers for p in block.attention.parameters())
    assert areas(figure.axes[0])["attention"] == pytest.approx(attention)


def test_a_layer_drawn_as_another_would_be_noticed(monkeypatch):
    monkeypatch.setattr(budget, "layer_parameters", lambda cfg, layer, on: layer_parameters(cfg, 1, on))
    found = areas(budget_figure(TINY).axes[0])
    assert sum(found.values()) != pytest.approx(parameters(TINY).total)


def test_the_sums_are_written_beside_the_areas():
    figure = budget_figure(LITE, "without embedding and router")
    said = [text.get_text() for text in texts_of(figure)]
    assert "in total: 15.49B" in said and "a token passes through 2.448B" in said
    assert "(209.7M)" in said and "(3.408M)" in said, "what is left out, in brackets"
    assert set(PART_COLOURS) >= {part for parts in LEFT_OUT.values() for part in parts}
    assert list(LEFT_OUT) == list(parameters(LITE).conventions())
    text = describe(budget_figure(FULL))
    assert text.startswith("235.7B parameters in total (everything counted), of which a token passes through")
    assert "Routed experts are 94.5% of the total and 39.1%" in text and "attention 3.8% and 41.9%" in text
    with pytest.raises(ValueError, match="convention='half' is unknown; choose one of everything, "):
        budget_figure(TINY, "half")


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.000K"),
        (3_531_136, "3.531M"),
        (999_960, "1.000M"),
        (2.357e11, "235.7B"),
    ],
)
def test_counts_read_well(count, text):
    assert count_text(count) == text


def test_the_explorer_moves_the_fields():
    explorer = budget_explorer()
    assert explorer.error is None
    full = FULL.replace(topk_method="greedy", n_group=1, bos_token_id=None, eos_token_id=None, topk_group=1)
    for field, value in {
        "num_hidden_layers": 61,
        "hidden_size": 4096,
        "first_k_dense_replace": 3,
        "intermediate_size": 8192,
        "vocab_size": 32_000,
        "num_attention_heads": 64,
        "q_lora_rank": 768,
        "kv_lora_rank": 256,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
    }.items():
        before = bytes(explorer.image.value)
        explorer.reset()
        figure = explorer.set(**{field: value})
        cfg = full.replace(**{field: value})
        assert sum(areas(figure.axes[0]).values()) == pytest.approx(parameters(cfg).total)
        assert sum(areas(figure.axes[1]).values()) == pytest.approx(parameters(cfg, True).total)
        assert bytes(explorer.image.value) != before
    assert {*SLIDERS} == {*explorer.controls} - {"model", "convention"}
    none = explorer.set(q_lora_rank=0)
    assert "attention" in areas(none.axes[0])
    explorer.reset()
    figure = explorer.set(convention="without the embedding")
    assert "<b>20.85B</b>" in explorer.below.value and "<b>235.2B</b>" in explorer.below.value


def test_choosing_a_model_moves_all_sliders():
    explorer = budget_explorer("tiny")
    for name, preset in MODELS.items():
        explorer.controls["model"].value = name  # by hand
        cfg = DSV2Config.preset(preset)
        assert explorer.error is None
        assert {field: explorer.values[field] or None for field in SLIDERS} == {
            field: getattr(cfg, field) for field in SLIDERS
        }
        assert sum(areas(explorer.figure.axes[0]).values()) == pytest.approx(parameters(cfg).total)
    explorer.set(model="DeepSeek-V2-Lite", num_hidden_layers=3)
    assert explorer.values["hidden_size"] == 2048 and explorer.values["num_hidden_layers"] == 3
    explorer.set(n_routed_experts=2)  # fewer than a token chooses
    assert explorer.error is None
    with pytest.raises(ValueError, match="model='huge' is unknown; choose one of DeepSeek-V2, "):
        budget_explorer("huge")


@pytest.mark.parametrize(
    "fields, total, passed",
    [
        ({}, "235.7B", "21.38B"),
        ({"num_experts_per_tok": 12}, "235.7B", "29.73B"),
        ({"n_routed_experts": 320}, "458.5B", "21.42B"),
        (
            {"moe_intermediate_size": 768, "n_routed_experts": 320, "num_experts_per_tok": 12},
            "234.4B",
            "20.03B",
        ),
        ({"first_k_dense_replace": 12}, "195.8B", "21.37B"),
        ({"num_attention_heads": 16}, "228.5B", "14.11B"),
    ],
)
def test_what_chapter_09_says_under_its_sliders(fields, total, passed):
    figure = budget_explorer().set(**fields)
    assert f"in total: {total}" in texts_in(figure)
    assert f"a token passes through {passed}" in texts_in(figure)


def texts_in(figure) -> list[str]:
    return [text.get_text() for text in texts_of(figure)]


# ------------------------------------------------------------------------------------------ what counts count


def test_dots_are_filled_where_they_round_to_the_published_number():
    """One convention fits all three published numbers: without the embedding and the router."""
    figure = convention_dots(PUBLISHED)
    fits = []
    for panel, (cfg, _) in zip(figure.axes, PUBLISHED.values()):
        dots = [line for line in panel.lines if line.get_marker() == "o"]
        counts = [*parameters(cfg, activated=True).conventions().values()]
        assert [dot.get_xdata()[0] for dot in dots] == pytest.approx([count / 1e9 for count in counts])
        fits.append([dot.get_markerfacecolor() == dot.get_markeredgecolor() for dot in dots])
    assert fits == [[True, True, True, False], [False, False, True, False], [False, True, True, False]]
    assert [all(column) for column in zip(*fits)] == [False, False, True, False]
    with pytest.raises(ValueError, match="1 to 4"):
        convention_dots({})


def test_what_a_published_number_allows():
    assert rounding_range("21B") == (20.5, 21.5)
    assert rounding_range("2.4B") == pytest.approx((2.35, 2.45))
    with pytest.raises(ValueError, match="published='many'"):
        rounding_range("many")


def test_differences_are_drawn_where_they_are():
    figure = logit_differences({"same": 0.0, "close": 3e-6, "wrong": 2.5}, tolerance=1e-4)
    (panel,) = figure.axes
    dots = [line for line in panel.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == pytest.approx([1e-7, 3e-6, 2.5])
    assert dots[0].get_color() == dots[1].get_color() != dots[2].get_color()
    assert panel.get_xscale() == "log" and panel.get_xlim()[1] > 2.5
    assert {"0", "3e-6", "2.5"} <= {text.get_text() for text in texts_of(figure)}
    with pytest.raises(ValueError, match="at least 0, one at least"):
        logit_differences({}, 1e-4)
    with pytest.raises(ValueError, match="at least 0"):
        logit_differences({"a": -1.0}, 1e-4)


def figures() -> list:
    apart = {"read back": 0.0, "transformers": 1.3e-5, "attention's and FFN's norm exchanged": 19.0}
    made = [budget_figure(DSV2Config.preset(preset), c) for preset in MODELS.values() for c in LEFT_OUT]
    made += [budget_figure(TIED), budget_explorer().set(num_hidden_layers=1, hidden_size=8192)]
    made += [budget_figure(TINY.replace(num_hidden_layers=2, vocab_size=200_064))]
    return [*made, convention_dots(PUBLISHED), logit_differences(apart, 1e-4)]


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: describe(figure)[:50])
def test_texts_can_be_read(figure):
    texts = texts_of(figure)
    assert texts and min(text.get_fontsize() for text in texts) >= SMALL
    assert overlaps(figure, texts) == []
    assert outside(figure) == []
    assert len(describe(figure)) > 60
