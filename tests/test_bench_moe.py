"""The benchmark of a layer of experts: both layers are one function, the limit is right, and it runs."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from dsv2.bench import moe as bench
from dsv2.bench.__main__ import main

transformers = pytest.importorskip("transformers", minversion="5.15")

SMALL = bench.LITE.replace(
    hidden_size=48, moe_intermediate_size=20, n_routed_experts=12, num_experts_per_tok=5
)


@pytest.fixture(scope="module")
def pair():
    return bench.make_pair(SMALL, "cpu", torch.float32)


def test_the_two_layers_are_the_same_and_a_bug_would_be_seen(pair):
    ours, peer = pair
    assert bench.largest_difference(ours, peer) < bench.LARGEST_DIFFERENCE[torch.float32]
    with torch.no_grad():
        ours.experts.w_down[3].mul_(1.01)
    assert bench.largest_difference(ours, peer) > bench.LARGEST_DIFFERENCE[torch.float32]
    with torch.no_grad():
        ours.experts.w_down[3].div_(1.01)


def test_both_are_given_the_same_backward_pass(pair):
    """The gradients that the timed step makes, kept here."""
    ours, peer = pair
    task = bench.make_task(ours, peer, 9, backward=True)
    kept = {}
    for name, step, layer in (("ours", task.ours, ours), ("peer", task.peer, peer)):
        handles = [
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: kept.setdefault(name, []).append(p.grad.norm())
            )
            for parameter in layer.parameters()
        ]
        step(task.inputs[0])
        for handle in handles:
            handle.remove()
    # The shared experts' gate and up are one parameter here and two there.
    totals = [torch.stack(kept[name]).square().sum().sqrt() for name in ("ours", "peer")]
    torch.testing.assert_close(*totals, rtol=1e-4, atol=0)  # float32 sums in another order


def test_the_limit_is_reading_or_multiplying(pair):
    ours, peer = pair
    one = 3 * 48 * 20
    everything = 12 + SMALL.n_shared_experts
    few = bench.make_task(ours, peer, 400, backward=False)  # with so many tokens, every expert is hit
    assert bench.limit(ours, few, 1.0, 1e30) == everything * one * 4
    assert bench.limit(ours, few, 1e30, 1.0) == 2 * 400 * (5 + SMALL.n_shared_experts) * one
    # Backward: those that are hit twice, and a gradient for every one.
    single = bench.make_task(ours, peer, 1, backward=True)
    assert bench.limit(ours, single, 1.0, 1e30) == (2 * (5 + SMALL.n_shared_experts) + everything) * one * 4
    assert bench.limit(ours, single, 1e30, 1.0) == 3 * 2 * (5 + SMALL.n_shared_experts) * one


def test_calls_of_one_graph_take_different_tokens(pair, monkeypatch):
    ours, peer = pair
    task = bench.make_task(ours, peer, 3, backward=False)
    task.inputs = torch.randn(4, 1, 3, 48)
    seen = []
    run, graph = bench.all_calls(lambda x: seen.append(x), task.inputs)
    run()
    assert torch.equal(torch.stack(seen), task.inputs) and not graph
    row = bench.result(task, bench.Pair((0.8, 0.4, 0.4), (1.2, 1.2, 1.2)), "eager")
    assert (row["ours"], row["peer"], row["ratio"], row["calls"]) == (100, 300, 3, 4)


@pytest.mark.slow
def test_a_quick_run_writes_its_report(tmp_path):
    out = tmp_path / "moe.json"
    threads = torch.get_num_threads()
    try:
        assert main(["moe", "--quick", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out.read_text())
    assert report["largest_difference"] < 1e-2 and {"torch", "transformers"} <= set(report["versions"])
    assert len(report["results"]) == 4 and all(row["ours"] > 0 < row["peer"] for row in report["results"])


def test_layers_that_differ_are_not_reported(monkeypatch):
    monkeypatch.setattr(bench, "largest_difference", lambda ours, peer: 0.3)
    with pytest.raises(RuntimeError, match="differ by 0.3"):
        bench.run(quick=True, pairs=1)


def test_without_transformers_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench.main(["--quick"]) == 1
    assert "pip install" in capsys.readouterr().err
