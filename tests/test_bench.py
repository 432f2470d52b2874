"""The benchmarks' own arithmetic, and that they run; never how fast."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from dsv2.bench import measure
from dsv2.bench import model as bench
from dsv2.bench.__main__ import main
from dsv2.viz import benchmark_bars, describe

transformers = pytest.importorskip("transformers", minversion="5.15")


def test_the_ratio_is_the_median_over_pairs():
    # Pair by pair 2, 9 and 1.
    pair = measure.Pair((2.0, 1.0, 4.0), (4.0, 9.0, 4.0))
    assert pair.ratio == 2.0
    assert pair.spread == (1.0, 9.0)


def test_pairs_alternate_and_their_order_swaps():
    calls = []
    pair = measure.time_pairs(lambda: calls.append("ours"), lambda: calls.append("peer"), 3)
    warm_up, pairs = calls[:2], [calls[i : i + 2] for i in range(2, len(calls), 2)]
    assert warm_up == ["ours", "peer"]
    assert pairs == [["ours", "peer"], ["peer", "ours"], ["ours", "peer"]]
    assert len(pair.ours) == len(pair.peer) == 3
    with pytest.raises(ValueError, match="repeats=0"):
        measure.time_pairs(list, list, 0)


def test_tokens_per_second():
    task = bench.Task("prefill, 10 tokens", 10, list, list)
    row = bench.result(task, measure.Pair((2.0, 2.0), (5.0, 5.0)), "eager")
    assert (row["ours"], row["peer"], row["ratio"]) == (5.0, 2.0, 2.5)


def test_the_two_models_are_the_same_and_a_bug_would_be_seen():
    cfg = bench.CONFIG.replace(vocab_size=61, hidden_size=48, num_hidden_layers=2, intermediate_size=40)
    ours, peer = bench.make_pair(cfg)
    assert bench.largest_difference(ours, peer, 33) < 1e-3  # float32 sums in another order
    with torch.no_grad():
        ours.layers[1].attention.w_uk.mul_(1.1)
    assert bench.largest_difference(ours, peer, 33) > 1e-3


@pytest.mark.slow
def test_a_quick_run_writes_what_the_chart_reads(tmp_path):
    out = tmp_path / "model.json"
    threads = torch.get_num_threads()
    try:
        assert main(["model", "--quick", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out.read_text())
    assert 25e6 < report["parameters"] < 35e6
    assert report["largest_logit_difference"] < 1e-3
    assert {"torch", "transformers", "python"} <= set(report["versions"]) and report["device"]
    names = [row["name"] for row in report["results"]]
    assert [name.split(",")[0] for name in names] == ["training step"] * 2 + ["prefill"] + ["decode"] * 2
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in report["results"])
    assert names[0] in describe(benchmark_bars(out))


def test_without_transformers_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench.main(["--quick"]) == 1
    assert "pip install" in capsys.readouterr().err
