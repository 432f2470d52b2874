"""Traffic of real processes beside fake devices: they agree, a bug would be seen, and errors are readable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsv2.bench import traffic
from dsv2.bench.__main__ import main as bench
from dsv2.bench.traffic import Layer, hidden_bytes, measure_traffic, run_fake, table
from dsv2.moe.parallel import KINDS

distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed package"
)


def test_fake_bytes_equal_a_count_with_sets():
    layer = Layer(3, tokens=7, experts=12, hidden=10, width=4, k=3, limit=2)
    _, devices = run_fake(layer)
    _, _, ids, _, _ = layer.make()
    counts = [[0] * 3 for _ in range(3)]
    for t, chosen in enumerate(ids.tolist()):
        goes = {e // 4 for e in chosen}
        assert len(goes) <= 2
        for device in goes - {t // 7}:
            counts[t // 7][device] += 10 * 4
    assert devices.traffic.bytes("dispatch").tolist() == counts
    assert devices.traffic.bytes("combine").T.tolist() == counts
    report = {"fake": {kind: devices.traffic.bytes(kind).tolist() for kind in KINDS}}
    assert int(hidden_bytes(report, "fake").sum()) == 2 * sum(map(sum, counts))


@distributed
@pytest.mark.slow
def test_real_processes_send_the_same_bytes(tmp_path, capsys):
    out = tmp_path / "traffic.json"
    arguments = ["--processes", "3", "--experts", "15", "--tokens", "5", "--k", "4", "--limit", "2"]
    assert bench(["traffic", *arguments, "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["real"] == report["fake"]
    assert set(report["differences"]) == {"output", "gradient of x", "gradient of weights", *traffic.HELD}
    assert max(report["differences"].values()) < 1e-5  # float32 sums in another order
    assert int(hidden_bytes(report).sum()) > 0
    said = capsys.readouterr().out
    assert said.count("equal for every pair of devices") == len(KINDS) and "DIFFERENT" not in said


def test_every_number_is_compared():
    """The gradients by name are those of the weights, and one wrong number among them is seen."""
    layer = Layer(3, tokens=6, experts=9, hidden=10, width=4, k=3)
    found, _ = run_fake(layer)
    experts, x, ids, weights, slope = layer.make()
    out = experts(x, ids, weights)
    right = torch.autograd.grad(out, [experts.w_gate_up, experts.w_down], slope)
    for name, gradient in zip(traffic.HELD, right):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    whole = found["gradient of gate and up projections"]
    part = whole[[3, 4, 5]].clone()
    assert traffic.relative_difference(part, whole, [3, 4, 5]) == 0
    part[1, 2, 3] += 0.5 * whole.abs().max()
    assert float(traffic.relative_difference(part, whole, [3, 4, 5])) == pytest.approx(0.5)


def test_a_difference_is_said_and_is_an_error(monkeypatch, capsys):
    layer = Layer(2, tokens=3, experts=4, k=2)
    _, devices = run_fake(layer)
    fake = {kind: devices.traffic.bytes(kind).tolist() for kind in KINDS}
    real = json.loads(json.dumps(fake))
    real["combine"][1][0] += 4
    report = {"layer": vars(layer), "real": real, "fake": fake, "differences": {"output": 0.0}}
    assert table(report).count("DIFFERENT") == 1
    monkeypatch.setattr(traffic, "measure_traffic", lambda **_: report)
    assert bench(["traffic"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out
    for apart, code in ((1e-7, 0), (0.1, 1), (float("nan"), 1)):
        report |= {"real": fake, "differences": {"output": 0.0, "gradient of x": apart}}
        assert bench(["traffic"]) == code, apart


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"processes": 9}, "processes=9 must be 1 to 8"),
        ({"processes": 5, "experts": 24}, "experts=24 must be a multiple of processes=5"),
        ({"processes": 4, "limit": 5}, "limit=5 must be 1 to processes=4"),
        ({"processes": 4, "limit": 1, "k": 7}, "k=7: 1 devices hold 6 experts"),
        ({"processes": 2, "tokens": 0}, "tokens=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes, why):
    with pytest.raises(ValueError, match=why):
        measure_traffic(**sizes)


@distributed
def test_processes_that_fail_or_hang_are_told_in_words(monkeypatch, capsys):
    def ended(command, timeout, environment):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: no sockets here\n")

    def hangs(command, timeout, environment):
        raise subprocess.TimeoutExpired(command, timeout)

    def refused(command, timeout, environment):
        raise PermissionError("not allowed")

    for run, said in (
        (ended, "ended with an error:\nTraceback\nRuntimeError: no sockets here"),
        (hangs, "2 processes did not end within timeout=3 seconds"),
        (refused, "no process could be started here: not allowed"),
    ):
        monkeypatch.setattr(traffic, "run_to_its_end", run)
        with pytest.raises(RuntimeError, match=said.split("\n")[0]):
            measure_traffic(2, timeout=3)
        assert bench(["traffic", "--processes", "2", "--timeout", "3"]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench(["traffic", "--processes", "9"])
    assert "processes=9" in capsys.readouterr().err


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
        traffic.run_to_its_end([sys.executable, "-c", code], 3.0, dict(os.environ))
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


@distributed
@pytest.mark.slow
def test_one_process_that_fails_ends_the_others(monkeypatch, tmp_path):
    """The first device waits for the second, which never comes."""
    broken = f"import {traffic.__name__} as traffic\n" + (
        "from pathlib import Path\n"
        "def run(rank, layer, folder):\n"
        "    if rank == 1: raise ArithmeticError('device 1 is broken')\n"
        "    import time; time.sleep(120)\n"
        "traffic.run_real = run\n"
        f"if __name__ == '__main__': traffic.start_devices(traffic.Layer(2), Path({str(tmp_path)!r}))\n"
    )
    script = tmp_path / "broken.py"
    script.write_text(broken)
    environment = os.environ | {"PYTHONPATH": str(traffic.ROOT)}
    ran = traffic.run_to_its_end([sys.executable, str(script)], 60.0, environment)
    assert ran.returncode != 0 and "device 1 is broken" in ran.stderr


@distributed
def test_a_time_limit_is_kept():
    with pytest.raises(RuntimeError, match=r"2 processes did not end within timeout=0\.2 seconds"):
        measure_traffic(2, timeout=0.2)


def test_without_gloo_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False, raising=False)
    with pytest.raises(RuntimeError, match="no gloo"):
        measure_traffic(2)
