"""The figures of chapter 13's arithmetic draw what was computed; the calculator answers its controls."""

from __future__ import annotations

import pytest
from test_viz import outside, overlaps, texts_of

from dsv2.economics import (
    NEW,
    OLD,
    STEPS,
    Check,
    Deployment,
    check_attention,
    check_decoding,
    decode_throughput,
    largest_batch,
    speedup,
    speedup_steps,
)
from dsv2.published import measured_devices, published_devices, published_models
from dsv2.viz import (
    batch_curves,
    cost_calculator,
    cost_figure,
    describe,
    miniature_figure,
    predicted_measured,
    speedup_by_context,
    speedup_figure,
)
from dsv2.viz.economics import LARGEST, cost_caption
from dsv2.viz.style import SMALL

MODELS, DEVICES = published_models(), published_devices() | measured_devices()
SETTING = dict(
    model="DeepSeek-V2-Lite", context=8192, batch=LARGEST, weights="bf16", cache="fp8", device="A100 80GB",
    gpus=4, price=1.5,
)  # fmt: skip


def readable(figure) -> None:
    figure.canvas.draw()
    assert overlaps(figure, texts_of(figure)) == [] and outside(figure) == []
    assert min(text.get_fontsize() for text in texts_of(figure)) >= SMALL
    assert len(describe(figure)) > 40


def bars(axes) -> dict[str, float]:
    """By label, how long each horizontal bar is."""
    return {container.get_label(): container.patches[0].get_width() for container in axes.containers}


# ------------------------------------------------------------------------------------------------ the figures


@pytest.mark.parametrize("context", [1024, 4096, 65536])
@pytest.mark.parametrize("order", [STEPS, STEPS[::-1]])
def test_the_steps_are_the_speeds_that_were_computed(context, order):
    steps = speedup_steps(context, order)
    figure = speedup_figure(steps)
    readable(figure)
    found = bars(figure.axes[0])
    assert list(found) == [OLD, *order]
    for step in steps:
        assert found[step.name] == pytest.approx(step.throughput.tokens_per_second)
    (first, last) = [line.get_xdata()[0] for line in figure.axes[0].lines]
    assert (first, last) == (9_610, 55_400)
    written = " ".join(text.get_text() for text in texts_of(figure))
    for before, after in zip(steps, steps[1:]):
        ratio = after.throughput.tokens_per_second / before.throughput.tokens_per_second
        assert f"x{ratio:.2f};" in written
    assert f"together x{speedup(steps):.2f}" in describe(figure)


def test_published_speeds_can_be_left_out():
    assert len(speedup_figure(speedup_steps(), published={}).axes[0].lines) == 0
    with pytest.raises(ValueError, match="1 entries"):
        speedup_figure(speedup_steps()[:1])


def test_the_factors_by_context_are_drawn():
    factors = {1024: 3.5, 4096: 4.25, 32768: 6.125}
    figure = speedup_by_context(factors)
    readable(figure)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert dict(zip(*lines["the model"].get_data())) == factors
    assert set(lines["published"].get_ydata()) == {5.76}
    with pytest.raises(ValueError, match="1 contexts"):
        speedup_by_context({1024: 3.0})


SAME = Deployment(DEVICES["H100 80GB, measured"], 8, "fp8", "6 bits")


def runs_of(batches, context=4096) -> dict[str, list]:
    return {
        name: [decode_throughput(MODELS[name], context, SAME, batch) for batch in batches]
        for name in (OLD, NEW)
    }


@pytest.mark.parametrize("context, batches", [(4096, (1, 8, 64, 512, 3000)), (65536, (1, 7, 60))])
def test_speed_and_price_of_growing_batches_are_drawn(context, batches):
    runs = runs_of(batches, context)
    figure = batch_curves(runs, price=1.5)
    readable(figure)
    speeds, prices = figure.axes
    for name, found in runs.items():
        fitting = [run for run in found if run.memory.total <= SAME.room]
        (curve,) = [line for line in speeds.lines if line.get_label() == name]
        assert list(curve.get_xdata()) == [run.batch for run in fitting]
        assert list(curve.get_ydata()) == pytest.approx([run.batch / run.seconds for run in fitting])
        (curve,) = [line for line in prices.lines if line.get_label() == name]
        assert list(curve.get_xdata()) == pytest.approx([1 / run.seconds for run in fitting])
        dollars = [8 * 1.5 / 3600 * 1e6 * run.seconds / run.batch for run in fitting]
        assert list(curve.get_ydata()) == pytest.approx(dollars)
    assert "8 GPUs at 1.5 dollars" in describe(figure) and f"{context:,} cached" in describe(figure)


def test_a_batch_that_does_not_fit_is_not_drawn():
    figure = batch_curves(runs_of((512, 2048)), price=2.0)
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [1, 2]
    with pytest.raises(ValueError, match="no batch that fits"):
        batch_curves(runs_of((5000,)), price=2.0)


@pytest.mark.parametrize("number", [1, 4, 16])
def test_predicted_and_measured_times_stand_where_they_belong(number):
    checks = [*check_decoding(), *check_attention()][:number]
    figure = predicted_measured(checks)
    readable(figure)
    marks = figure.axes[0].lines
    found = {
        kind: [m.get_xdata()[0] for m in marks if m.get_marker() == kind][:number] for kind in ("|", "o")
    }
    assert found["|"] == pytest.approx([1e3 * check.predicted for check in checks])
    assert found["o"] == pytest.approx([1e3 * check.measured for check in checks])
    assert f"{min(c.share for c in checks):.0%}" in describe(figure)


def test_a_planted_share_is_written():
    figure = predicted_measured([Check("this", 0.003, 0.004), Check("that", 0.5, 1.0)])
    assert {"75%", "50%"} <= {text.get_text() for text in texts_of(figure)}
    with pytest.raises(ValueError, match="empty"):
        predicted_measured([])


def miniature() -> dict:
    """A report as the benchmark writes it, of numbers made up here."""
    speeds = {
        "dense, GQA": {1: (90, 140), 8: (650, 900), 71: (2100, 2900)},
        "V2-Lite's shape": {1: (380, 600), 8: (1100, 1400), 128: (6000, 8000), 256: (9000, 12100)},
    }
    rows = [
        {"model": name, "batch": batch, "tokens_per_second": measured, "predicted": predicted}
        for name, points in speeds.items()
        for batch, (measured, predicted) in points.items()
    ]
    return {
        "results": rows,
        "context": 4096,
        "device": "none",
        "ratio": {"measured": 4.29, "predicted": 4.17},
    }


def test_the_miniature_is_what_the_report_says():
    figure = miniature_figure(miniature())
    readable(figure)
    lines = {line.get_label(): dict(zip(*line.get_data())) for line in figure.axes[0].lines}
    assert lines["dense, GQA"] == {1: 90, 8: 650, 71: 2100}
    assert lines["limit, V2-Lite's shape"] == {1: 600, 8: 1400, 128: 8000, 256: 12100}
    assert "x4.29 measured" in describe(figure)
    with pytest.raises(ValueError, match="dsv2.bench economics"):
        miniature_figure({**miniature(), "results": []})


# --------------------------------------------------------------------------------------------- the calculator


def by_hand(name: str, price: float, context: int, batch: int, gpus: int) -> tuple[float, ...]:
    """GB of weights and cache, tokens a second, price of a million: for SETTING's formats."""
    cfg, device = MODELS[name], DEVICES["A100 80GB"]
    where = Deployment(device, gpus, "bf16", "fp8")
    batch = batch or largest_batch(cfg, context, where)
    found = decode_throughput(cfg, context, where, batch)
    speed = batch / sum(max(p.bytes / device.bandwidth, p.flops / device.flops) / gpus for p in found.phases)
    return found.memory.weights / 1e9, found.memory.cache / 1e9, speed, price * gpus * 1e6 / 3600 / speed


@pytest.mark.parametrize("batch", [LARGEST, 16])
def test_bars_are_memory_speed_and_price(batch):
    figure = cost_figure(**SETTING | {"batch": batch})
    readable(figure)
    memory, speed, cost = (bars(panel) for panel in figure.axes)
    assert list(speed) == list(cost) == ["DeepSeek-V2-Lite", "DeepSeek 67B", "LLaMA3 70B"]
    for name in speed:
        weights, cached, fast, price = by_hand(name, 1.5, 8192, batch, 4)
        assert memory[f"weights, {name}"] == pytest.approx(weights)
        assert memory[f"cache, {name}"] == pytest.approx(cached)
        assert speed[name] == pytest.approx(fast)
        assert cost[name] == pytest.approx(price)
    (room,) = {x for line in figure.axes[0].lines for x in line.get_xdata()}
    assert room == pytest.approx(4 * 80 * 0.9)


def test_what_does_not_fit_has_no_speed_and_no_price():
    tight = SETTING | {"model": NEW, "gpus": 2}
    figure = cost_figure(**tight)
    readable(figure)
    memory, speed, cost = (bars(panel) for panel in figure.axes)
    assert set(speed) == set(cost) == {OLD, "LLaMA3 70B"} - {NEW} - ({OLD, "LLaMA3 70B"} - set(speed))
    assert NEW not in speed and memory[f"weights, {NEW}"] == pytest.approx(471.48, abs=0.01)
    assert "does not fit" in {text.get_text() for text in texts_of(figure)}
    assert "Not even one text fits" in cost_caption(**tight)
    many = SETTING | {"batch": 4096}
    assert "would fit" in cost_caption(**many) and "do not fit" in describe(cost_figure(**many))


def test_a_model_is_not_compared_with_itself():
    assert list(bars(cost_figure(**SETTING | {"model": OLD}).axes[1])) == [OLD, "LLaMA3 70B"]


def test_every_control_moves_the_calculator_and_it_stays_readable():
    for name in cost_calculator().controls:
        explorer = cost_calculator()
        control, start = explorer.controls[name], explorer.controls[name].value
        image, text = bytes(explorer.image.value), explorer.below.value
        readable(explorer.figure)
        values = (
            [control.min, control.max]
            if hasattr(control, "max")
            else [option if isinstance(option, str) else option[1] for option in control.options]
        )
        for value in {values[0], values[len(values) // 2], values[-1]} - {start}:
            explorer.set(**{name: value})
            assert explorer.error is None
            readable(explorer.figure)
            assert bytes(explorer.image.value) != image and explorer.below.value != text, (name, value)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("device", ["T4", "H200 141GB", "laptop CPU"])
@pytest.mark.parametrize("context, batch, gpus", [(1024, 0, 1), (2**20, 4096, 32), (131072, 64, 8)])
def test_the_calculator_is_readable_everywhere(model, device, context, batch, gpus):
    setting = SETTING | dict(model=model, device=device, context=context, batch=batch, gpus=gpus)
    readable(cost_figure(**setting))


def test_the_calculator_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="model='GPT'"):
        cost_calculator("GPT")
    with pytest.raises(ValueError, match="context=1000 must be one of 1024"):
        cost_calculator(context=1000)


def test_the_caption_names_the_numbers_of_the_figure():
    said = cost_caption("DeepSeek-V2", 4096, 0, "fp8", "6 bits", "H100 80GB, measured", 8, 2.0)
    for number in ("3,204 texts at once", "64.8 ms a step", "49,451 tokens/s", "0.09 dollars"):
        assert number in said, number
