"""The figures of the KV cache show hand-computed numbers, and the calculator answers its controls."""

from __future__ import annotations

import pytest
from matplotlib.patches import Rectangle
from test_viz import outside, overlaps, texts_of

from dsv2.accounting import attention_twin
from dsv2.config import DSV2Config
from dsv2.published import published_devices, published_models
from dsv2.viz import (
    attention_intensity,
    cache_calculator,
    decode_roofline,
    decode_work,
    describe,
    head_sharing,
    memory_bars,
    published_cache,
    step_times,
    visible_keys,
)
from dsv2.viz.cache import plan, plan_figure, tokens_text
from dsv2.viz.style import SMALL, ink, png

MODELS, DEVICES = published_models(), published_devices()
H100 = DEVICES["H100 80GB"]


def line(axes, name):
    return next(line for line in axes.lines if line.get_label() == name)


def figures() -> list:
    times = {"without a cache": [3.0, 50.0, 131.0], "with a cache": [2.0, 3.0, 8.0]}
    return [
        decode_work(4, 8),
        visible_keys(4, 3),
        head_sharing(),
        published_cache(MODELS),
        memory_bars(MODELS, 131072, H100),
        step_times([16, 500, 1000], times),
        decode_roofline(H100, {"MHA": 1, "GQA": 8, "MQA": 64, "MLA": 242}),
        cache_calculator().figure,
    ]


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: describe(figure)[:24])
def test_texts_can_be_read(figure):
    texts = texts_of(figure)
    assert texts and min(text.get_fontsize() for text in texts) >= SMALL
    assert overlaps(figure, texts) == []
    assert outside(figure) == []
    assert len(describe(figure)) > 60


def test_decode_work_counts_every_token():
    """After 2 tokens, 3 more: steps read 2, 3, 4 tokens without a cache; 2, 1, 1 with one."""
    figure = decode_work(2, 3)
    without, with_cache = figure.axes
    cells = [patch for patch in without.patches if isinstance(patch, Rectangle)]
    assert len(cells) == 2 + 3 + 4 == len(with_cache.patches)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "without a cache: 9 tokens",
        "with a cache: 4 tokens",
    ]
    assert [(cell.get_x() + 0.46, cell.get_y() - 0.54) for cell in with_cache.patches[2:5]] == [
        (0, 1),
        (1, 1),
        (2, 1),
    ]  # the second step: positions 0 and 1 are in the cache, 2 is new
    colours = [tuple(patch.get_facecolor()) for patch in with_cache.patches]
    assert sorted(colours.count(colour) for colour in set(colours)) == [4, 5]  # 4 new, 2 + 3 in the cache
    with pytest.raises(ValueError, match="prompt=0"):
        decode_work(0, 3)


def test_visible_keys_is_the_mask():
    (axes,) = visible_keys(2, 3).axes
    seen = {tuple(map(int, p.get_gid().split()[1:4:2])) for p in axes.patches if p.get_gid().endswith("seen")}
    assert seen == {(t, s) for t in range(3) for s in range(5) if s <= t + 2}
    with pytest.raises(ValueError, match="tokens=0"):
        visible_keys(2, 0)


def test_head_sharing_draws_the_groups_of_grouped_attention():
    figure = head_sharing(6, (6, 3, 1))
    for axes, count in zip(figure.axes, (6, 3, 1)):
        ends = [line.get_xdata()[1] for line in axes.lines if len(line.get_xdata()) == 2]
        groups = [sorted(set(ends)).index(end) for end in ends]
        assert groups == [head * count // 6 for head in range(6)]
    with pytest.raises(ValueError, match=r"kv_heads=\(4,\)"):
        head_sharing(6, (4,))


def test_published_cache_bars():
    (axes,) = published_cache(MODELS).axes
    kilobytes = [patch.get_width() for patch in axes.patches]
    assert kilobytes == pytest.approx([389.12, 327.68, 229.376, 31.104, 69.12])
    assert "69.1 KB  MLA, 1/57 of MHA" in [text.get_text() for text in axes.texts]


def test_memory_bars_on_eight_gpus():
    """LLaMA3 70B: (640 - 141.1) GB / 42.95 GB = 11.6 texts of 128K tokens."""
    figure = memory_bars({"LLaMA3 70B": MODELS["LLaMA3 70B"]}, 131072, H100)
    weights, text = figure.axes[0].patches
    assert (weights.get_width(), text.get_width()) == pytest.approx((141.107, 42.950), abs=1e-3)
    assert text.get_x() == weights.get_width()
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts == ["1 x H100", "8 x H100", "weights", "one text", "fit on 8", "141 GB", "42.9 GB", "11"]


def test_step_times_draws_what_it_is_given():
    (axes,) = step_times([10, 20], {"slow": [3.0, 6.0], "fast": [1.0, 1.5]}).axes
    assert line(axes, "slow").get_xydata().tolist() == [[10, 3], [20, 6]]
    with pytest.raises(ValueError, match="2 times for each name"):
        step_times([10, 20], {"slow": [3.0]})


def test_intensity_is_the_number_of_queries_that_share_a_key():
    llama = MODELS["LLaMA3 70B"]  # 64 heads
    assert attention_intensity(llama) == 64 / 8
    assert attention_intensity(attention_twin(llama, "mha")) == 1
    assert attention_intensity(attention_twin(llama, "mqa")) == 64
    assert attention_intensity(llama, bits=8) == 16
    # 128 heads, 2 * (576 + 512) FLOPs each, for 576 * 2 bytes
    assert attention_intensity(MODELS["DeepSeek-V2"]) == pytest.approx(128 * 2 * 1088 / 1152)


def test_roofline_bends_at_the_balance():
    (axes,) = decode_roofline(H100, {"MHA": 1.0, "prefill": 2000.0}).axes
    x, y = line(axes, "roof").get_data()
    assert x[1] == pytest.approx(989.4e12 / 3.35e12)
    assert y == pytest.approx([0.5 * 3.35, 989.4, 989.4])
    assert line(axes, "MHA").get_ydata() == pytest.approx([3.35])
    assert line(axes, "prefill").get_ydata() == pytest.approx([989.4])
    with pytest.raises(ValueError, match="intensities"):
        decode_roofline(H100, {})


# ------------------------------------------------------------------------------------------ the calculator


def test_plan_of_a_published_model():
    numbers = plan("DeepSeek-V2", context=131072, batch=3, cache_bits=6, gpus=8)
    assert numbers.bytes_per_token == 34_560 * 6 / 8
    assert numbers.cache == 3 * 131072 * 25_920
    assert numbers.weights == 2 * 235_741_434_880
    assert numbers.memory == 640e9 and numbers.fits
    assert numbers.largest_batch() == int((640e9 - 2 * 235_741_434_880) // (131072 * 25_920)) == 49
    assert numbers.elements["MHA"] == 2 * 128 * 128 * 60


def test_plan_of_ones_own():
    """4 layers, 8 heads on 2, of 64: 2 * 2 * 64 * 4 = 1,024 numbers; a billion parameters at 4 bits."""
    numbers = plan("own", 1000, 10, 8, 4, "T4", 1, layers=4, heads=8, kv_heads=2, head_dim=64, billions=1.0)
    assert numbers.attention == "GQA" and numbers.elements == {"GQA": 1024, "MHA": 4096, "MQA": 512}
    assert numbers.weights == 0.5e9 and numbers.sequence == 1_024_000
    assert numbers.read == 0.5e9 + 10 * 1_024_000
    assert numbers.largest_batch() == int((16e9 - 0.5e9) // 1_024_000)
    assert plan("own", 1000, 1, heads=4, kv_heads=16).attention == "MHA"  # not more than the query heads


def test_a_model_too_large_fits_no_text():
    explorer = cache_calculator("LLaMA3 70B")
    figure = explorer.set(gpus=1)
    top, below = figure.axes
    assert "the weights alone do not fit" in [text.get_text() for text in below.texts]
    assert "2.3x\ntoo much" in [text.get_text() for text in top.texts]  # (141.1 + 42.9) / 80
    assert "Beside the weights fit <b>0</b>" in explorer.below.value


def test_the_calculator_follows_its_controls():
    explorer = cache_calculator("LLaMA3 70B")
    bars = {p.get_facecolor(): p.get_width() for p in explorer.figure.axes[0].patches}
    assert sorted(bars.values()) == pytest.approx([42.950, 141.107], abs=1e-3)
    assert line(explorer.figure.axes[1], "here").get_xydata().tolist() == [[131072, 11]]
    explorer.set(context=4096, batch=64)
    assert line(explorer.figure.axes[1], "here").get_xydata().tolist() == [[4096, 371]]  # 498.9 / 1.342 GB
    widths = [p.get_width() for p in explorer.figure.axes[0].patches]
    assert widths == pytest.approx([141.107, 64 * 1.342177], abs=1e-3)
    # 139.0 GB of weights (of the embedding, 2.1 GB, a few rows are read) and 85.9 GB of caches at 26.8 TB/s
    assert "7,630 tokens a second" in explorer.below.value
    explorer.reset()
    assert explorer.values["context"] == 131072 and explorer.error is None


def test_a_figure_drawn_over_is_like_a_new_one():
    explorer = cache_calculator("LLaMA3 70B")
    first = png(explorer.figure)
    for changes in ({"gpus": 1}, {"model": "DeepSeek-V2", "gpus": 16, "batch": 1024}, {"cache_bits": 4}):
        drawn_over = png(explorer.set(**changes))
        values = {name: control.value for name, control in explorer.controls.items()}
        count = "" if values["gpus"] == 1 else f"{values['gpus']} x "
        assert drawn_over == png(plan_figure(plan(**values), count + values["device"]))
    explorer.reset()
    assert png(explorer.figure) == first


def test_ones_own_model_begins_where_the_last_one_was():
    explorer = cache_calculator()
    sliders = [explorer.controls[name] for name in ("layers", "heads", "kv_heads", "head_dim", "billions")]
    others = [control for control in explorer.controls.values() if control not in sliders]
    assert all(control.layout.display is None for control in others)
    assert all(slider.layout.display == "none" for slider in sliders)
    explorer.set(model="Mixtral 8x22B")
    before = line(explorer.figure.axes[1], "here").get_ydata()[0]
    explorer.set(model="own")
    assert all(slider.layout.display is None for slider in sliders)
    assert [slider.value for slider in sliders[:4]] == [56, 48, 8, 128]
    assert before == line(explorer.figure.axes[1], "here").get_ydata()[0] == 11
    explorer.set(kv_heads=1)
    assert line(explorer.figure.axes[1], "MQA").get_color() in ("#CC79A7", ink("#CC79A7"))


@pytest.mark.parametrize("model", [*MODELS, "own"])
def test_no_overlaps_whatever_the_controls_say(model):
    explorer = cache_calculator()
    for context, batch, gpus in [(1024, 1, 16), (131072, 64, 8), (2**20, 1024, 1)]:
        figure = explorer.set(model=model, context=context, batch=batch, gpus=gpus)
        assert overlaps(figure, texts_of(figure)) == [], (context, batch, gpus)
        assert outside(figure) == [], (context, batch, gpus)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="model='GPT-2'"):
        cache_calculator("GPT-2")


def test_contexts_read_as_they_are_spoken():
    assert [tokens_text(n) for n in (1000, 4096, 131072, 2**20)] == ["1,000", "4K", "128K", "1M"]


def test_a_dense_config_has_no_hidden_part():
    """What the intensity divides by is the cache that is read, layer by layer: layers cancel."""
    cfg = DSV2Config.preset("tiny", attention="gqa", num_key_value_heads=2)
    assert attention_intensity(cfg) == attention_intensity(cfg.replace(num_hidden_layers=9)) == 2.0
