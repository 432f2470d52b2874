"""bench traffic: real processes send what is counted here by hand, and what cannot run says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsv2.bench import traffic as bench
from dsv2.bench.__main__ import main
from dsv2.moe.parallel import KINDS

SMALL = {"tokens": 10, "experts": 6, "hidden": 7, "width": 5, "k": 2, "seed": 3}
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)


def by_hand(layer: bench.Layer) -> torch.Tensor:
    """(G, G): hidden states to the experts, token by token."""
    *_, ids, _, _ = layer.make()
    counts = torch.zeros(layer.devices, layer.devices, dtype=torch.long)
    for token, chosen in enumerate(ids.tolist()):
        home = token // layer.tokens
        for device in {e // (layer.experts // layer.devices) for e in chosen} - {home}:
            counts[home, device] += 1
    return counts


@needs_gloo
@pytest.mark.parametrize(("processes", "limit"), [(1, None), (3, 2)])
def test_real_processes_send_what_is_counted_by_hand(processes, limit):
    report = bench.measure_traffic(processes, limit=limit, **SMALL)
    assert report["real"] == report["fake"] and set(report["real"]) == set(KINDS)
    sent = by_hand(bench.Layer(processes, limit=limit, **SMALL)) * 7 * 4
    for kind, expected in {
        "dispatch": sent,
        "combine": sent.mT,
        "dispatch gradient": sent.mT,
        "combine gradient": sent,
    }.items():
        assert report["real"][kind] == expected.tolist(), kind
    assert torch.equal(bench.hidden_bytes(report), sent + sent.mT)
    assert (int(sent.sum()) > 0) == (processes > 1)
    assert len(report["differences"]) == 4 and max(report["differences"].values()) < 1e-5


def test_the_limit_bounds_what_is_sent():
    layer = bench.Layer(3, limit=1, **SMALL)
    assert by_hand(layer).sum(dim=1).max() <= layer.tokens
    assert by_hand(layer).sum() < by_hand(bench.Layer(3, **SMALL)).sum()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"devices": 9}, "processes=9 must be 1 to 8"),
        ({"devices": 5, "experts": 24}, "experts=24 must be a multiple of processes=5"),
        ({"devices": 4, "limit": 5}, "limit=5 must be 1 to processes=4"),
        ({"devices": 4, "limit": 1, "k": 7}, "k=7: 1 devices hold 6 experts"),
        ({"devices": 2, "tokens": 0}, "tokens=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        bench.Layer(**sizes)


@needs_gloo
def test_processes_that_take_too_long_are_stopped():
    with pytest.raises(RuntimeError, match=r"2 processes did not end within timeout=0\.2 seconds"):
        bench.measure_traffic(2, timeout=0.2, **SMALL)


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
def test_what_a_stopped_process_has_started_ends_too(tmp_path):
    noted = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'])\n"
        f"pathlib.Path({str(noted)!r}).write_text(str(child.pid))\n"
        "time.sleep(120)"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        bench.run_to_its_end([sys.executable, "-c", code], 3.0, dict(os.environ))
    child = int(noted.read_text())
    for _ in range(50):
        if not alive(child):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} is still running")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # one that has ended may wait to be collected
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


@needs_gloo
@pytest.mark.parametrize(
    ("happens", "message"),
    [
        (OSError("not permitted"), "no process could be started here: not permitted"),
        (subprocess.CompletedProcess([], 1, "", "Traceback\nBoomError: planted"), "BoomError: planted"),
        (subprocess.CompletedProcess([], 0, "", "nothing written"), "nothing written"),
    ],
)
def test_what_goes_wrong_is_said(monkeypatch, happens, message):
    def run(command, timeout, environment):
        if isinstance(happens, Exception):
            raise happens
        return happens

    monkeypatch.setattr(bench, "run_to_its_end", run)
    with pytest.raises(RuntimeError, match=message):
        bench.measure_traffic(2, **SMALL)


def test_without_gloo_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    with pytest.raises(RuntimeError, match="no gloo"):
        bench.measure_traffic(2, **SMALL)


def made_up() -> dict:
    layer = bench.asdict(bench.Layer(2, **SMALL))
    counts = {kind: [[0, 1200], [34, 0]] for kind in KINDS}
    return {"layer": layer, "real": counts, "fake": json.loads(json.dumps(counts)), "differences": {"x": 0.0}}


def test_the_table_tells_equal_from_different():
    report = made_up()
    assert bench.table(report).count("equal for every pair") == len(KINDS)
    report["real"]["dispatch"] = [[0, 34], [1200, 0]]
    text = bench.table(report)
    assert text.count("DIFFERENT") == 1 and "1,234" in text


def test_the_command_prints_and_writes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "measure_traffic", lambda **options: made_up())
    out = tmp_path / "new" / "report.json"
    assert main(["traffic", "--processes", "2", "--out", str(out)]) == 0
    assert "2 processes with 10 tokens each" in capsys.readouterr().out
    assert json.loads(out.read_text())["real"] == made_up()["real"]

    def refuse(**options):
        raise RuntimeError("no process could be started here: planted")

    monkeypatch.setattr(bench, "measure_traffic", refuse)
    assert main(["traffic"]) == 1
    assert "planted" in capsys.readouterr().err
