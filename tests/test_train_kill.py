"""A run that is killed again and again ends as the run that never was.

Run as a script, this file is the killer: it imports torch once, without ever using it, and forks a child for
each life of the run, as a Python that imports torch anew takes seconds to start. One thread, so that nothing
of a thread pool is lost in the fork. Children are killed with SIGKILL, which no process can answer: at random
moments, and as soon as the folder of a half-written checkpoint, or one of its files, is seen.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY = 90, 2
KILLS = 24
# Where the kills of one round fall: at any time, or when a file of a checkpoint being written is there.
ANY_TIME, STARTING = "any time", "starting"
MOMENTS = [ANY_TIME, "", ANY_TIME, "model.safetensors", "optimizer.safetensors"]
MOMENTS += [STARTING, "state.json", ANY_TIME, "manifest.json", ANY_TIME]


def trainer(out: Path):
    """The run, gone on with from whatever is in `out`; tokens are dropped, so that random numbers matter."""
    import torch
    from test_train import CFG, MemoryData

    from dsv2.train import TrainConfig, Trainer, World

    config = TrainConfig(
        steps=STEPS,
        batch_size=2,
        seq_len=12,
        lr=1e-2,
        validate_every=0,
        sample_every=0,
        save_every=SAVE_EVERY,
    )
    cfg = CFG.replace(capacity_factor=1.0, num_hidden_layers=2)
    return Trainer(cfg, config, MemoryData(), out=out, resume=True, world=World(torch.device("cpu")))


def live(out: Path) -> int:
    """Fork a child that trains to the end; returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for _ in trainer(out):
                pass
            status = 0
        finally:
            os._exit(status)
    return child


def reached(out: Path, step: int, file: str | None) -> bool:
    """Whether a checkpoint of `step` or later is complete (no file), or being written and has this file."""
    pattern = "step-*" if file is None else ".unfinished-step-*"
    found = [path for path in (out / "checkpoints").glob(pattern) if int(path.name.split("-")[-1]) >= step]
    return any(not file or (path / file).exists() for path in found)


def ended(child: int) -> bool:
    """Whether a child has come to its end; one that failed ends the killer too."""
    process, status = os.waitpid(child, os.WNOHANG)
    if process and status:
        raise SystemExit(f"a life of the run ended with wait status {status}, not by the killer")
    return bool(process)


def kill(child: int, out: Path, moment: str, step: int, seconds: float) -> dict | None:
    """Kill a child at its moment, not before `step`; returns what was there then, None if it ended first."""
    file = None if moment == ANY_TIME else moment
    while moment != STARTING and not reached(out, step, file):
        if ended(child):
            return None
    if moment in (ANY_TIME, STARTING):
        time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    written = [path.name for path in (out / "checkpoints").glob("step-*")]
    left = [path.name for path in (out / "checkpoints").glob(".unfinished-*")]
    return {"moment": moment, "checkpoints": sorted(written), "unfinished": left}


def drive(folder: Path, seed: int) -> None:
    """The run that never stops, then the one that is killed; writes what happened to kills.json."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    import dsv2.train  # noqa: F401 - before the forks, so that children need not

    torch.set_num_threads(1)
    rng = random.Random(seed)
    start = time.monotonic()
    whole = live(folder / "straight")
    while not ended(whole):
        time.sleep(0.01)
    a_step = (time.monotonic() - start) / STEPS
    kills, finished = [], False
    for number in range(KILLS):
        moment = MOMENTS[number % len(MOMENTS)]
        # Each life gets a few steps further than the last, so that kills fall all over the run.
        step = 1 + number * STEPS // KILLS
        happened = kill(live(folder / "killed"), folder / "killed", moment, step, rng.uniform(0, 3 * a_step))
        if happened is None:
            finished = True
            break
        kills.append(happened)
    last = None if finished else live(folder / "killed")
    while last and not ended(last):
        time.sleep(0.01)
    (folder / "kills.json").write_text(json.dumps(kills))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_killed_at_twenty_moments_and_resumed_exactly(tmp_path):
    from test_train import numbers

    from dsv2.train import find_checkpoints, read_lines

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(tmp_path), "7"], check=True, env=environment, timeout=400)
    kills = json.loads((tmp_path / "kills.json").read_text())
    assert len(kills) >= 20
    # Some kills did fall into the writing of a checkpoint, and left a half-written one behind.
    assert sum(bool(kill["unfinished"]) for kill in kills) >= 5
    # The kills fell all over the run: the newest checkpoint was another one at most of them.
    assert len({kill["checkpoints"][-1] for kill in kills if kill["checkpoints"]}) >= 10

    straight, killed = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("straight", "killed"))
    assert [line["step"] for line in straight] == list(range(1, STEPS + 1))
    assert numbers(killed) == numbers(straight)
    ends = [find_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("straight", "killed")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes(), file


if __name__ == "__main__":
    drive(Path(sys.argv[1]), int(sys.argv[2]))
