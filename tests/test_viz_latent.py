"""The figures and the explorer of chapter 02, read back from what they drew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_viz import outside, overlaps, texts_of

import dsv2
from dsv2.attention.mla import expand_keys_values
from dsv2.viz import describe, latent, latent_explorer, latent_sizes, loss_against_cache, rank_curves
from dsv2.viz.style import SMALL

ROOT = Path(__file__).resolve().parents[1]
TEXT = "def read(self, path):\n    return open(path).read()  # 12 + 30 = 42, 7 + 8 = 15\n" * 3


@pytest.fixture(scope="module")
def model():
    return dsv2.load_pretrained(ROOT / "data" / "tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def explorer(model):
    return latent_explorer(model, TEXT)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- figures


def test_sizes_of_deepseek_v2_to_scale():
    ax = latent_sizes(dsv2.DSV2Config.preset("full"), "DeepSeek-V2").axes[0]
    assert [patch.get_width() for patch in ax.patches] == [5120, 512, 64, 128 * 192, 128 * 128]
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["5,120", "512 + 64 = 576", "128 x (128 + 64) = 24,576", "128 x 128 = 16,384"]


def test_curves_are_what_was_given():
    curves = {"one": ([0, 2, 4], [1.0, 0.5, 0.0]), "other": ([0, 4], [1.0, 0.25])}
    figure = rank_curves(curves, full={"whole": 0.75}, limits=(0, 2))
    ax = figure.axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert list(drawn["one"]) == [1.0, 0.5, 0.0] and list(drawn["other"]) == [1.0, 0.25]
    assert set(drawn["whole"]) == {0.75} and ax.get_xlim() == (0, 4) and ax.get_ylim() == (0, 2)
    assert "one 0.50 at 2" in describe(figure) and "whole 0.75" in describe(figure)
    paired = rank_curves({name: ([0, 1], [1.0, 0.0]) for name in "abcd"}, pairs=True).axes[0].lines
    assert [line.get_linestyle() for line in paired] == ["-", "--", "-", "--"]
    assert paired[0].get_color() == paired[1].get_color() != paired[2].get_color() == paired[3].get_color()
    with pytest.raises(ValueError, match="curves is empty"):
        rank_curves({})


def test_losses_against_cache_of_the_stored_runs():
    runs = json.loads((ROOT / "data" / "runs" / "attention.json").read_text(encoding="utf-8"))["runs"]
    figure = loss_against_cache(runs)
    ax = figure.axes[0]
    drawn = {
        line.get_label(): [tuple(point) for point in line.get_xydata()]
        for line in ax.lines
        if line.get_marker() == "o"
    }
    # 4 layers, 8 heads of 32: 2 * 8 * 32 * 4 with MHA, a quarter with 2 groups; (d_c + 16) * 4 with MLA
    assert {name: points[0][0] for name, points in drawn.items()} == {
        "MHA": 2048,
        "GQA, 2 groups": 512,
        "MQA": 256,
        "MLA, rank 32": 192,
        "MLA, rank 64": 320,
        "MLA, rank 128": 576,
    }
    last = {(run["name"], run["seed"]): run["metrics"][-1]["val_nats_per_byte"] for run in runs}
    assert sorted(loss for _, loss in drawn["MHA"]) == sorted([last["mha", 0], last["mha", 1]])
    assert [loss for _, loss in drawn["MLA, rank 128"]] == [last["mla-128", 0]]


def figures() -> list:
    runs = json.loads((ROOT / "data" / "runs" / "attention.json").read_text(encoding="utf-8"))["runs"]
    curves = {"one for both": ([0, 2, 4], [1.0, 0.5, 0.0]), "two of half\nthe length": ([0, 4], [1.0, 0.25])}
    return [
        latent_sizes(dsv2.DSV2Config.preset("full"), "DeepSeek-V2"),
        latent_sizes(dsv2.DSV2Config.preset("tiny")),
        rank_curves(curves, title="Layer 2"),
        loss_against_cache(runs),
    ]


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: describe(figure)[:24])
def test_texts_can_be_read(figure):
    texts = texts_of(figure)
    assert texts and min(text.get_fontsize() for text in texts) >= SMALL
    assert overlaps(figure, texts) == []
    assert outside(figure) == []
    assert len(describe(figure)) > 40


def test_a_run_without_validation_is_named():
    cfg = dsv2.DSV2Config.preset("tiny").to_dict()
    with pytest.raises(ValueError, match="run 'short' has no val_nats_per_byte"):
        loss_against_cache([{"name": "short", "model": cfg, "metrics": [{"loss": 1.0}]}])


# --------------------------------------------------------------------------------------------- mathematics


def test_error_of_the_best_directions_is_that_of_the_best_rebuilding():
    c, w_uk, w_uv = normal(50, 7), normal(3, 4, 7, seed=1), normal(3, 5, 7, seed=2)
    best = latent.best_directions(c, w_uk, w_uv)
    stacked = torch.cat([torch.einsum("tc,hnc->thn", c, w).flatten(1) for w in (w_uk, w_uv)], dim=1)
    assert best.directions.shape == (7, 3 * (4 + 5))
    for rank in (0, 1, 4, 6):
        kept = best.directions[:rank]
        lost = (stacked - stacked @ kept.T @ kept).norm() / stacked.norm()
        # float32 directions and float64 singular values
        assert best.error(rank) == pytest.approx(lost.item(), abs=1e-5)
        # no other projection of that rank does better
        other = torch.linalg.qr(normal(27, max(rank, 1), seed=3))[0][:, :rank].T
        assert lost <= (stacked - stacked @ other.T @ other).norm() / stacked.norm() + 1e-6
    assert best.error(7) == pytest.approx(0, abs=1e-6)


def test_attention_at_full_rank_is_mlas_own():
    tokens, heads, c, r, n, v = 6, 3, 7, 2, 4, 5
    reading = latent.LayerReading(
        normal(tokens, c),
        normal(tokens, r, seed=1),
        normal(tokens, heads, n, seed=2),
        normal(tokens, heads, r, seed=3),
    )
    w_uk, w_uv = normal(heads, n, c, seed=4), normal(heads, v, c, seed=5)
    best = latent.best_directions(normal(40, c, seed=6), w_uk, w_uv)
    k, _ = expand_keys_values(reading.latent[None], reading.k_rope[None], w_uk, w_uv)
    q = torch.cat([reading.q_nope, reading.q_rope], dim=-1)
    for head in range(heads):
        scores = 0.3 * q[:, head] @ k[0, :, head].T
        right = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)
        drawn = latent.attention_from_rank(reading, w_uk, w_uv, best, c, head, 0.3)
        torch.testing.assert_close(drawn, right, atol=1e-5, rtol=1e-5)
        less = latent.attention_from_rank(reading, w_uk, w_uv, best, 1, head, 0.3)
        assert (less - right).abs().max() > 0.01, "rank 1 cannot be the same"


def test_what_is_read_is_what_the_layer_caches(model):
    tokens = torch.tensor([model.tokenizer.encode("12 + 30 = 42")])
    readings = latent.read_layers(model, tokens)
    cache = model.new_cache(1, tokens.shape[1])
    with torch.no_grad():
        model(tokens, cache=cache)
    assert len(readings) == 5
    assert readings[3].latent.shape == (12, 64) and readings[3].q_nope.shape == (12, 4, 32)
    torch.testing.assert_close(readings[3].latent, cache.latent[3][0, :12], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(readings[3].k_rope, cache.k_rope[3][0, :12], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ explorer


def test_the_rank_moves_picture_curve_and_bars(explorer):
    figure = explorer.set(rank=48, layer=2, head=1)
    whole, rebuilt, curve, bars = figure.axes
    before = rebuilt.images[0].get_array().copy()
    assert np.allclose(whole.images[0].get_array().sum(axis=1), 1, atol=1e-5)
    assert bars.patches[2].get_width() == 48 and bars.patches[3].get_x() == 48
    assert bars.texts[2].get_text() == "48 + 16 = 64, MHA / 4.0"  # 2 * 4 * 32 = 256
    figure = explorer.set(rank=4)
    assert figure.axes[1] is rebuilt, "artists are moved, not drawn anew"
    assert np.abs(rebuilt.images[0].get_array() - before).max() > 0.01
    assert curve.lines[1].get_xdata()[0] == 4
    assert bars.texts[2].get_text() == "4 + 16 = 20, MHA / 12.8"
    assert rebuilt.get_title("left") == "rebuilt from 4 numbers"
    assert whole.get_title("left") == "layer 2, head 1: as it is"
    assert "Layer 2, head 1, rank 4 of 64" in describe(figure)


def test_the_full_rank_changes_nothing(explorer):
    whole, rebuilt, curve, _ = explorer.set(rank=64, layer=4, head=3).axes
    assert np.allclose(whole.images[0].get_array(), rebuilt.images[0].get_array(), atol=1e-5)
    assert curve.lines[1].get_ydata()[0] == pytest.approx(0, abs=1e-4)
    assert "<b>0%</b>" in explorer.below.value
    assert min(text.get_fontsize() for text in texts_of(explorer.figure)) >= SMALL
    assert outside(explorer.figure) == []


def test_layers_and_heads_have_pictures_of_their_own(explorer):
    first = explorer.set(rank=64, layer=0, head=0).axes[0].images[0].get_array().copy()
    other_head = explorer.set(head=2).axes[0].images[0].get_array().copy()
    other_layer = explorer.set(head=0, layer=3).axes[0].images[0].get_array().copy()
    assert np.abs(first - other_head).max() > 0.01 and np.abs(first - other_layer).max() > 0.01


def test_errors_fall_with_the_rank(explorer):
    errors = explorer.set(layer=1).axes[2].lines[0].get_ydata()
    assert len(errors) == 65 and errors[0] == pytest.approx(1) and np.all(np.diff(errors) <= 1e-6)


def test_a_text_too_long_to_read_is_refused(model):
    with pytest.raises(ValueError, match="2 to 24 are legible"):
        latent_explorer(model, TEXT, shown=TEXT)
