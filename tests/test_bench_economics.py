"""The small 5.76x: both models are what they are said to be, and the benchmark runs on a CPU."""

from __future__ import annotations

import json

import pytest
import torch

from dsv2.accounting import kv_bytes_per_token, parameters
from dsv2.bench import economics as bench
from dsv2.bench.__main__ import main
from dsv2.economics import Deployment, decode_throughput
from dsv2.published import measured_devices, published_models

ON_GPU = torch.cuda.is_available()
H100 = measured_devices()["H100 80GB, measured"]


def test_the_dense_model_is_deepseek_67b_halved():
    small, large = bench.models(False)[bench.DENSE], published_models()["DeepSeek 67B"]
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        assert 2 * getattr(small, name) == getattr(large, name), name
    assert (small.num_hidden_layers, small.kv_heads, small.baseline_head_dim) == (48, 8, 128)
    assert (small.attention, small.n_routed_experts, small.vocab_size) == ("gqa", 0, large.vocab_size)


def test_the_two_stand_to_each_other_about_as_67b_stands_to_v2():
    """Activated parameters: 3.5 against 3.2 times; the cache: 6.3 against 5.6 times."""
    dense, sparse = bench.models(False).values()
    large, v2 = (published_models()[name] for name in ("DeepSeek 67B", "DeepSeek-V2"))

    def activated(one, other):
        return parameters(one).total / parameters(other, activated=True).total

    assert round(activated(dense, sparse), 1) == 3.5 and round(activated(large, v2), 1) == 3.2
    assert round(kv_bytes_per_token(dense) / kv_bytes_per_token(sparse), 1) == 6.3
    assert round(kv_bytes_per_token(large) / kv_bytes_per_token(v2), 1) == 5.6


def test_both_fit_one_h100():
    where = Deployment(H100)
    for cfg in bench.models(False).values():
        found = decode_throughput(cfg, bench.CONTEXT, where)
        assert found.fits and found.batch >= 64


@pytest.mark.skipif(ON_GPU, reason="what a CPU does")
def test_it_runs_small_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "economics.json"
    arguments = ["economics", "--quick", "--steps", "4", "--context", "16", "--batch", "3"]
    assert main([*arguments, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert [row["batch"] for row in report["results"]] == [1, 3, 1, 3]
    for row in report["results"]:
        assert row["cached"] == 12 and 0 < row["share"] <= 1.05, row
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms"], rel=0.01, abs=0.06)
        assert row["share"] == pytest.approx(row["tokens_per_second"] / row["predicted"], rel=0.1, abs=1e-4)
    for name in ("command", "date", "device", "versions", "dtype", "context", "reserve", "product_rate"):
        assert report[name], name
    best = {row["model"]: row["tokens_per_second"] for row in report["results"] if row["largest"]}
    expected = best[bench.SPARSE] / best[bench.DENSE]
    assert report["ratio"]["measured"] == pytest.approx(expected, abs=0.001)
    assert f"x{report['ratio']['measured']:.2f} measured" in said and "trying" not in said
    assert bench.load(out) == report and bench.load(tmp_path / "none.json") is None


def row(model: str, batch: int, largest: bool = False) -> dict:
    return {"model": model, "batch": batch, "tokens_per_second": 10.0 * batch, "predicted": 20.0 * batch,
            "largest": largest, "ms": 1.0, "share": 0.5}  # fmt: skip


@pytest.mark.skipif(ON_GPU, reason="what a CPU does")
def test_out_of_memory_is_met_with_a_smaller_batch(monkeypatch, capsys):
    asked = []

    def measure(model, batch, *_, **__):
        asked.append(batch)
        if batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return type(
            "Found", (), {"seconds": 1.0, "tokens_per_second": batch, "bytes": 1, "through_graphs": 0}
        )

    monkeypatch.setattr(bench, "measure_decoding", measure)
    report = bench.run(quick=True, most=6)
    assert asked == [1, 6, 5, 4, 1, 6, 5, 4]
    assert [found["batch"] for found in report["results"] if found["largest"]] == [4, 4]
    said = capsys.readouterr().out
    assert "batch 6: the GPU ran out of memory: CUDA out of memory." in said and "--reserve" in said


@pytest.mark.skipif(ON_GPU, reason="what a CPU does")
def test_a_model_that_does_not_fit_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(bench.QUICK, "memory", 16e6)  # 14.8 MB are left for 14.4 of weights, or 20.7
    report = bench.run(quick=True, steps=4, context=8, most=1)
    assert {found["model"] for found in report["results"]} == {bench.SPARSE} and report["ratio"] is None
    assert "dense, GQA: left out. Its weights take 0.0 GB" in capsys.readouterr().out


def test_the_ratio_is_of_the_largest_batches():
    rows = [row(bench.DENSE, 1), row(bench.DENSE, 4, True), row(bench.SPARSE, 1), row(bench.SPARSE, 9, True)]
    assert bench.ratio(rows) == {"measured": 2.25, "predicted": 2.25}
    assert bench.ratio(rows[:2]) is None


@pytest.mark.parametrize(
    "options, said",
    [
        (["--steps", "3"], "steps=3"),
        (["--context", "4", "--steps", "8"], "context=4 must be longer than steps=8"),
        (["--batch", "1000"], "batch=1000 must lie in 1..256"),
        (["--reserve", "2"], "reserve=2.0"),
    ],
)
def test_wrong_options_are_named(options, said, capsys):
    assert main(["economics", "--quick", *options]) == 2
    assert said in capsys.readouterr().err


def test_what_is_stored_passes_its_own_check():
    report = bench.load()
    if report is None:
        pytest.skip("the benchmark has not been run on an H100")
    assert "H100" in report["device"] and not report["small"] and report["ratio"]["measured"] > 1
    for found in report["results"]:
        assert found["cuda_graph"] and found["share"] <= 1.12, found
