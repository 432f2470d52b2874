"""The benchmark of pretraining: both sides train one model, and the run's numbers are written."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from dsv2 import accounting
from dsv2.bench import train as bench
from dsv2.bench.__main__ import main
from dsv2.config import DSV2Config

pytest.importorskip("transformers", minversion="5.15")


def test_a_quick_run_writes_both_speeds_and_the_losses(tmp_path, capsys):
    out, weights = tmp_path / "a" / "train.json", tmp_path / "weights"
    arguments = [
        "--quick",
        "--threads",
        "1",
        "--minutes",
        "0.01",
        "--out",
        str(out),
        "--weights",
        str(weights),
    ]
    assert main(["train", *arguments]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    cfg = DSV2Config.preset("tiny")
    assert DSV2Config(**report["model"]) == cfg and report["parameters"] > report["activated_parameters"]
    row = report["compared"]
    low, high = row["ratio_range"]
    assert low <= row["ratio"] <= high and row["pairs"] == 2 and min(row["ours"], row["peer"]) > 0
    assert row["first_losses"][0] == pytest.approx(row["first_losses"][1], abs=1e-4)
    run = report["run"]
    assert run["tokens"] == run["training"]["steps"] * 2 * 64
    assert run["losses"][0][:2] == [1, pytest.approx(row["first_losses"][0], abs=1e-4)]
    assert run["validation"][-1]["step"] == run["training"]["steps"]
    assert (weights / "model.safetensors").exists()
    said = capsys.readouterr().out
    assert f"{run['validation'][-1]['val_nats_per_byte']:.4f} nats a byte" in said
    assert f"dsv2 {row['ours']:,} tokens/s, transformers {row['peer']:,}" in said


def test_the_stored_run_agrees_with_itself_and_with_the_preset():
    stored = Path(__file__).resolve().parents[1] / "data" / "benchmarks" / "train_h100.json"
    report = json.loads(stored.read_text(encoding="utf-8"))
    cfg, row, run = DSV2Config.preset("small"), report["compared"], report["run"]
    assert DSV2Config(**report["model"]) == cfg and report["parameters"] == accounting.parameters(cfg).total
    assert report["flops_per_token"] == accounting.training_flops_per_token(cfg, report["seq_len"]).total
    low, high = row["ratio_range"]
    assert low <= row["ratio"] <= high and row["ours"] / row["peer"] == pytest.approx(row["ratio"], rel=0.02)
    first = run["losses"][0][1]
    assert first == pytest.approx(math.log(264), abs=0.3) and first == pytest.approx(
        row["first_losses"][0], abs=0.02
    )
    assert run["tokens"] == run["training"]["steps"] * report["batch_size"] * report["seq_len"]
    rows = bench.metric_rows(run)
    assert [r["step"] for r in rows] == sorted({r["step"] for r in rows})
    assert (
        rows[0]["loss"] == first
        and rows[-1]["val_nats_per_byte"] == run["validation"][-1]["val_nats_per_byte"]
    )
    assert len([r for r in rows if "loss" in r]) == len(run["losses"])
    falls = [a["step"] / 1656 for a, b in pairwise(r for r in rows if "lr" in r) if b["lr"] < 0.5 * a["lr"]]
    assert run["training"]["steps"] == 1656 and falls == pytest.approx([0.6, 0.9], abs=0.006)


def test_another_model_is_not_compared(monkeypatch, capsys):
    right = bench.PlainLoop.step
    monkeypatch.setattr(bench.PlainLoop, "step", lambda loop, batch: right(loop, batch) * 1.001)
    assert main(["train", "--quick", "--threads", "1"]) == 1
    assert "the first losses differ: ours" in capsys.readouterr().err


def test_the_share_is_work_done_over_the_products_rate():
    report = {
        "parameters": 4e6, "activated_parameters": 2e6, "batch_size": 3, "seq_len": 7, "dtype": "bfloat16",
        "device": "GPU", "versions": {"torch": "2", "transformers": "5"}, "flops_per_token": 2e8,
        "product_rate": 8e14,
        "compared": {"ours": 1_000_000, "peer": 500_000, "ratio": 2.0, "ratio_range": [1.9, 2.1],
                     "peer_weights": "autocast", "peer_experts": "grouped_mm"},
    }  # fmt: skip
    assert "200 MFLOP a token: 200 of 800 TFLOP/s, 25%" in bench.table(report)


def test_no_way_to_train_the_peer_is_an_error():
    def make(kind: str, experts: str):
        raise RuntimeError(f"no {kind} with {experts}")

    with pytest.raises(RuntimeError, match="(?s)in any way.*autocast, eager: no autocast with eager"):
        bench.fastest_loop(make, None, ("autocast",))


def test_the_faster_way_is_taken(monkeypatch):
    class Loop:
        def __init__(self, kind, experts):
            self.cost = 2.0 if (kind, experts) == ("b", "grouped_mm") else 3.0

        def step(self, batch):
            return self.cost

    monkeypatch.setattr(bench, "seconds", lambda work: work())
    assert bench.fastest_loop(Loop, None, ("a", "b")) == ("b", "grouped_mm")
