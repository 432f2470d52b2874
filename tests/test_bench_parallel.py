"""The benchmark of several devices: what it computes from times and losses, and a run of two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv2.bench import parallel as bench
from dsv2.bench.__main__ import main
from dsv2.bench.traffic import Layer
from dsv2.moe.parallel import Traffic
from dsv2.train.distributed import World

ROOT = Path(__file__).resolve().parent.parent
distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no distributed package"
)

# ------------------------------------------------------------------------------------------- where time goes

intervals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 9)).map(lambda at: (at[0], at[0] + at[1])), max_size=6
)


@given(intervals, intervals)
def test_time_shares_equal_a_count_of_every_moment(computing, communicating):
    every = computing + communicating
    found = bench.time_shares(computing, communicating)
    if not every:
        assert found == {}
        return
    counts = {"computing": 0, "both": 0, "communicating": 0, "idle": 0}
    moments = range(min(start for start, _ in every), max(end for _, end in every))
    for moment in moments:
        one, other = (any(a <= moment < b for a, b in some) for some in (computing, communicating))
        counts[
            {(1, 0): "computing", (1, 1): "both", (0, 1): "communicating", (0, 0): "idle"}[one, other]
        ] += 1
    assert found == pytest.approx({name: count / len(moments) for name, count in counts.items()})


def test_intervals_that_touch_are_one():
    assert bench.covered([(5, 7), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 7)]


# ------------------------------------------------------------------------------------------- is it the same

LOSSES = [3.0, 2.0, 1.5, 1.25]


def named(parts: list[float], spread_out: list[float]) -> dict[str, list[float]]:
    return {"one device": LOSSES, "one device, batch in parts": parts, "experts on all devices": spread_out}


@pytest.mark.parametrize(
    ("parts", "spread_out", "same"),
    [
        (LOSSES, LOSSES, True),
        (LOSSES, [loss + 5e-6 for loss in LOSSES], True),  # rounding of a loss
        (LOSSES, [loss + 1e-3 for loss in LOSSES], False),
        ([loss + 1e-3 for loss in LOSSES], [loss - 1e-3 for loss in LOSSES], True),  # as far as rounding goes
        ([loss + 1e-3 for loss in LOSSES], [loss + 4e-3 for loss in LOSSES], False),
        (LOSSES, [3.0, 2.0, float("nan"), 1.25], False),
    ],
)
def test_losses_agree_where_they_are_no_further_than_rounding(parts, spread_out, same):
    assert bench.losses_agree(named(parts, spread_out)) is same


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "meeting"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield World(torch.device("cpu"))
    torch.distributed.destroy_process_group()


@distributed
def test_a_layer_that_differs_is_not_reported(alone, monkeypatch):
    layer, right = Layer(1, tokens=7, experts=5, hidden=12, width=6, k=3), bench.run_process
    report = bench.check_layer(layer, torch.float32, alone)
    assert max(report["differences"].values()) < 1e-6 and json.dumps(report)

    def wrong_gradient(*given):
        found, devices = right(*given)
        found["gradient of weights"] = found["gradient of weights"] * (1 + 1e-4)
        return found, devices

    monkeypatch.setattr(bench, "run_process", wrong_gradient)
    with pytest.raises(RuntimeError, match="other numbers than FakeDevices.1. gives.*tokens=7"):
        bench.check_layer(layer, torch.float32, alone)
    count = Traffic.count
    monkeypatch.setattr(bench, "run_process", right)

    def one_more(traffic, kind, source, tensor, rows):
        count(traffic, kind, source, tensor, [row + (traffic is not fake) for row in rows])

    fake = bench.run_fake(layer)[1].traffic
    monkeypatch.setattr(bench, "run_fake", lambda *given: ({}, type("Fake", (), {"traffic": fake})()))
    monkeypatch.setattr(Traffic, "count", one_more)
    monkeypatch.setattr(bench, "differences", lambda *given: {})
    with pytest.raises(RuntimeError, match="other bytes than FakeDevices.1. counts"):
        bench.check_layer(layer, torch.float32, alone)


# ------------------------------------------------------------------------------------------------- the runs


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("devices", range(2, 9))
def test_sizes_fit_any_number_of_devices(kind, devices):
    sizes = bench.make_sizes(devices, kind, quick=False)
    assert sizes.layer.experts % devices == 0 and sizes.layer.devices == devices
    assert {layer.devices for layer in sizes.checked} == {devices}
    assert sizes.model.n_routed_experts >= devices
    if kind == "cuda":
        assert (sizes.layer.hidden, sizes.layer.width, sizes.layer.k) == (5120, 1536, 6), "DeepSeek-V2's"


@distributed
@pytest.mark.slow
def test_two_processes_write_what_they_measure(tmp_path):
    out, tokens = tmp_path / "parallel.json", 256
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*command, "-m", "dsv2.bench", "parallel", "--steps", "3", "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    (run,) = report["runs"]
    assert list(run["commands"]) == list(bench.SECTIONS)
    for command in run["commands"].values():
        assert command.startswith("torchrun --nproc-per-node 2 -m dsv2.bench parallel --steps 3")
    assert run["devices"] == 2 and len(run["checked"]) == 2
    losses = run["training"]["losses"]
    assert [len(values) for values in losses.values()] == [3, 3, 3] and bench.losses_agree(losses)
    one, two = run["exchange"]["rows"]
    assert [one["limit"], two["limit"]] == [1, 2]
    for row in (one, two):  # at most M hidden states a token; there and back, and the gradients
        assert max(row["sent"]) <= row["limit"] * tokens * 160 * 4
        assert row["all_hidden"] == 4 * sum(row["sent"]) and row["dispatch_seconds"] > 0
    assert sum(one["sent"]) < sum(two["sent"])
    hows = [(row["how"], row["devices"]) for row in run["speed"]["rows"]]
    assert hows == [("one device", 1), ("weights spread", 2), ("experts spread", 2)]
    assert all(row["tokens_per_s"] > 0 for row in run["speed"]["rows"])
    assert "2 devices: bytes equal to FakeDevices'" in ran.stdout


def test_the_file_keeps_other_runs_and_other_sections(tmp_path):
    path = tmp_path / "a" / "parallel.json"
    report = {"device": "GPU", "versions": {"torch": "3"}, "text": "t"}
    for devices, section, value in ((4, "speed", 1), (2, "speed", 2), (4, "exchange", 3), (4, "speed", 4)):
        run = {"devices": devices, section: value, "commands": {section: f"run {value}"}}
        bench.add_run(path, report, run)
    two, four = json.loads(path.read_text())["runs"]
    assert two == {"devices": 2, "speed": 2, "commands": {"speed": "run 2"}}
    assert (four["speed"], four["exchange"]) == (4, 3)
    assert four["commands"] == {"speed": "run 4", "exchange": "run 3"}
    other = {"devices": 8, "commands": {}}
    for change in ({"device": "other GPU"}, {"versions": {"torch": "4"}}, {"text": "u"}):
        bench.add_run(path, report | change, other)
        assert json.loads(path.read_text())["runs"] == [other]
        bench.add_run(path, report, {"devices": 2, "commands": {}})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [([], "needs 2 processes or more, one a device: torchrun"), (["--steps", "0"], "at least 1; got 0")],
)
def test_wrong_starts_are_explained(arguments, error, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["parallel", *arguments])
    assert ended.value.code == 2 and error in capsys.readouterr().err
