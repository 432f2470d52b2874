"""The benchmarks of decoding: they run small on a CPU, refuse a wrong result, and their figures draw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text

from dsv2.bench import decode as bench
from dsv2.bench import generate as whole
from dsv2.bench.__main__ import main
from dsv2.viz import describe
from dsv2.viz.__main__ import main as draw
from dsv2.viz.decode_results import (
    COLOURS,
    MARKERS,
    apart,
    decode_results_figure,
    generate_results_figure,
    share_of_limit_figure,
)

BENCHMARKS = Path(__file__).resolve().parent.parent / "data" / "benchmarks"
ON_GPU = torch.cuda.is_available()


@pytest.mark.skipif(ON_GPU, reason="what a CPU does")
def test_on_a_cpu_the_two_forms_are_compared(tmp_path):
    out = tmp_path / "decode.json"
    assert main(["decode", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert {row["contender"] for row in report["results"]} == set(bench.ON_CPU)
    assert all(row["us"] > 0 for row in report["results"])
    for name in ("command", "date", "device", "versions", "dtype"):
        assert report[name]


@pytest.mark.skipif(ON_GPU, reason="what a CPU does")
def test_a_wrong_result_is_not_reported(monkeypatch, capsys):
    def off_by_one(problem):
        return [lambda: torch.zeros_like(problem.q_latent)]

    monkeypatch.setitem(bench.CONTENDERS, "PyTorch, absorbed", off_by_one)
    assert main(["decode"]) == 1
    assert "PyTorch, absorbed is off by 1" in capsys.readouterr().err


def test_what_counts_as_a_peers_absence_and_what_does_not(monkeypatch):
    problem = bench.Problem(2, [64, 64], 64, "cpu", torch.float32)
    for name in ("flash_mla", "flashinfer", "flash_attn_interface", "sglang", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("FlashMLA", "FlashInfer", "FlashAttention 3", "SGLang, Triton", "vLLM, Triton"):
        with pytest.raises(bench.Skip, match="not importable"):
            bench.CONTENDERS[name](problem)
    assert bench.relative_error(torch.full((2, 2, 512), torch.nan), problem.exact()) == float("inf")


def test_the_limit_is_the_longer_of_two_times():
    problem = bench.Problem(3, [10, 20], 32, "cpu", torch.float32)
    reading = 30 * 576 * 4  # bytes
    computing = 2 * 30 * 3 * (2 * 512 + 64)
    assert problem.limit(bandwidth=reading, rate=1e18) == pytest.approx(1.0)
    assert problem.limit(bandwidth=1e18, rate=computing) == pytest.approx(1.0)


def test_ragged_lengths_fill_half_of_the_slots():
    lengths = bench.ragged_lengths(64, 4096)
    assert 0.45 < sum(lengths) / (64 * 4096) < 0.55
    assert max(lengths) <= 4096 and min(lengths) >= 1 and len(set(lengths)) > 30


def test_a_paged_problem_is_the_same_problem():
    """The same cache through a table in any order: the reference gives what it gives without one."""
    paged = bench.Problem(2, [128, 100], 128, "cpu", torch.float32, paged=True)
    whole_cache = paged.caches[0].view(-1, bench.PAGE, 576)[paged.table.long()].flatten(1, 2)
    from dsv2.kernels import mla_decode_reference

    expected = mla_decode_reference(
        paged.q_latent,
        paged.q_rope,
        whole_cache[..., :512],
        whole_cache[..., 512:],
        paged.on_device,
        bench.SCALE,
    )
    torch.testing.assert_close(paged.exact(), expected)


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="what a CPU does")
def test_generation_is_measured_small_on_a_cpu(tmp_path):
    pytest.importorskip("transformers", minversion="5.15")
    out = tmp_path / "generate.json"
    assert main(["generate", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert {row["contender"] for row in report["results"]} == {"dsv2", "transformers"}
    assert {row["kind"] for row in report["results"]} == {"decode", "prefill"}
    ours = [row for row in report["results"] if row["contender"] == "dsv2" and row["kind"] == "decode"]
    for row in ours:
        assert row["share"] == pytest.approx(row["tokens_per_second"] / row["limit"], rel=1e-2)


def test_stored_measurements_name_their_source_and_pass_their_own_check():
    for name in ("decode", "generate"):
        report = json.loads((BENCHMARKS / f"{name}_h100.json").read_text())
        assert (
            "H100" in report["device"] and report["command"].endswith(name) and report["versions"]["triton"]
        )
    decode = json.loads((BENCHMARKS / "decode_h100.json").read_text())
    for row in decode["results"]:
        if row["contender"].startswith("dsv2") and "us" in row:
            assert row["error"] < bench.LARGEST_ERROR


@pytest.mark.parametrize(
    "name, report",
    [("decode-results", "decode"), ("share-of-limit", "decode"), ("generate-results", "generate")],
)
def test_figures_come_from_the_json_alone(name, report, tmp_path):
    path = BENCHMARKS / f"{report}_h100.json"
    assert draw([name, str(path), "--out", str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_figures_say_what_they_show_and_what_is_missing():
    report = json.loads((BENCHMARKS / "decode_h100.json").read_text())
    one = next(
        r for r in report["results"] if r["kind"] == "sweep" and r["slots"] == 32768 and r["heads"] == 128
    )
    one["us"] = 4321.0
    assert "dsv2 4,321" in describe(decode_results_figure(report))
    assert "128 heads" in describe(share_of_limit_figure(report))
    for figure in (decode_results_figure, share_of_limit_figure):
        with pytest.raises(ValueError, match="dsv2.bench decode"):
            figure({**report, "results": []})
    speeds = json.loads((BENCHMARKS / "generate_h100.json").read_text())
    assert "prefill" in describe(generate_results_figure(speeds))


def test_every_contender_has_a_colour_and_a_marker_of_its_own():
    drawn = set(bench.CONTENDERS) - {"PyTorch SDPA, expanded"}
    assert set(COLOURS) == set(MARKERS) == drawn
    assert len(set(COLOURS.values())) == len(set(MARKERS.values())) == len(drawn)


def test_names_that_would_touch_move_apart_as_little_as_possible():
    assert apart([10, 20, 40], 5, 0, 100) == [10, 20, 40]
    assert apart([10, 10, 10], 4, 0, 100) == [6, 10, 14]
    assert apart([10, 10, 10], 4, 0, 12) == [4, 8, 12]
    assert apart([1, 2, 30], 4, 0, 100) == [0, 4, 30]
    assert apart([30, 31, 35, 90], 4, 0, 100) == [28, 32, 36, 90]


def test_many_contenders_lines_all_have_a_name_inside_the_figure():
    report = json.loads((BENCHMARKS / "decode_h100.json").read_text())
    like = [row for row in report["results"] if row["kind"] == "sweep" and row["contender"] == "dsv2"]
    more = [{**row, "contender": name, "us": 1.01 * row["us"]} for name in COLOURS for row in like]
    figure = decode_results_figure({**report, "results": more})
    figure.draw_without_rendering()
    for panel in figure.axes:
        boxes = [Text.get_window_extent(name) for name in panel.texts]  # without the line to the end
        boxes.sort(key=lambda box: box.y0)
        assert len(boxes) == len(COLOURS) + 1
        assert all(low.y1 <= high.y0 + 2 for low, high in zip(boxes, boxes[1:]))
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
        assert boxes[0].y0 >= 0 and boxes[-1].y1 <= figure.bbox.y1


def test_default_files_carry_the_devices_name():
    assert bench.default_file("decode", {"device": "NVIDIA H100 80GB HBM3"}).name == "decode_h100.json"
    assert bench.default_file("generate", {"device": "Tesla T4"}).name == "generate_t4.json"
    cpu = "AMD EPYC (AVX512), 2 threads"
    assert bench.default_file("moe", {"device": cpu}).name == "moe_cpu.json"
    assert whole.decoding_row("dsv2", 4, 100, 2.0)["tokens_per_second"] == 2000.0
