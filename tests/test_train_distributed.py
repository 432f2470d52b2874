"""Two processes under torchrun compute what one computes, and share its checkpoints.

Run as a script under torchrun, this file is one of those processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Odd numbers of heads and experts: the parts of the two processes differ in size.
CHANGES = dict(num_attention_heads=5, n_routed_experts=9, n_group=3, capacity_factor=None)


def new_trainer(out, resume=False, world=None, **changes):
    from test_train import CFG, CPU, QUICK, MemoryData

    from dsv2.train import TrainConfig, Trainer

    config = TrainConfig(**(QUICK | dict(save_every=4, keep=9, validate_every=4) | changes))
    validation = MemoryData().batch(55, 7, 16)
    return Trainer(
        CFG.replace(**CHANGES),
        config,
        MemoryData(),
        out=out,
        resume=resume,
        world=world or CPU,
        validation=validation,
    )


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=200
    )


def main(task: str, out: Path) -> int:
    """One process of two. train: a run from the start, one from the middle, an export. fail: an error."""
    from dsv2.train import start_world
    from dsv2.train.distributed import leave

    world = start_world("cpu")
    if task == "fail":
        from dsv2.train import command

        def broken(*arguments):
            if world.rank == 1:
                raise OSError("the disk of process 1 is gone")
            world.barrier()

        command._find_data = broken
        return command.main(["--steps", "2", "--out", str(out), "--device", "cpu"])
    for name in ("two", "one_then_two"):
        trainer = new_trainer(out / name, resume=True, world=world, micro_batches=2 if name == "two" else 1)
        for _ in trainer:
            pass
        if name == "two":
            trainer.samples(max_new_tokens=3)
            trainer.export(out / "exported", "float32")
        if world.is_main:
            trainer.directory.release()
    world.barrier()
    leave(0)
    return 0


def columns(path: Path) -> dict[str, list[float]]:
    from dsv2.train import read_lines

    lines = read_lines(path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    table = {k: [line[k] for line in lines] for k in ("loss", "balance_loss", "grad_norm", "imbalance", "lr")}
    return table | {"val_loss": [line["val_loss"] for line in lines if "val_loss" in line]}


def assert_same_run(a: dict[str, list[float]], b: dict[str, list[float]]) -> None:
    for name in a:
        # The gradient is summed in another order, and AdamW divides it by its own size: float32 noise of
        # 1e-7 grows a little with every step. A tie in a router may then turn one choice in 500 around.
        assert a[name] == pytest.approx(b[name], rel=2e-3 if name == "imbalance" else 2e-5), name


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_train_as_one_and_share_checkpoints(tmp_path):
    from test_train import closed

    from dsv2.hf import load_pretrained

    one = closed(new_trainer(tmp_path / "one"))
    for _ in one:
        pass
    shutil.copytree(tmp_path / "one", tmp_path / "one_then_two")
    shutil.rmtree(tmp_path / "one_then_two" / "checkpoints" / "step-00000008")

    ran = torchrun("train", tmp_path)
    assert ran.returncode == 0, ran.stderr
    expected = columns(tmp_path / "one")
    assert_same_run(columns(tmp_path / "two"), expected)
    assert_same_run(columns(tmp_path / "one_then_two"), expected)

    shutil.copytree(tmp_path / "two", tmp_path / "two_then_one")
    shutil.rmtree(tmp_path / "two_then_one" / "checkpoints" / "step-00000008")
    resumed = closed(new_trainer(tmp_path / "two_then_one", resume=True))
    assert resumed.step == 4
    for _ in resumed:
        pass
    assert_same_run(columns(tmp_path / "two_then_one"), expected)

    exported = dict(load_pretrained(tmp_path / "exported").named_parameters())
    for name, parameter in one.model.named_parameters():
        # lr is 1e-2: what noise can move in eight steps is far below one of them.
        torch.testing.assert_close(exported[name], parameter, rtol=0, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_an_error_in_one_process_ends_all_and_says_which(tmp_path):
    ran = torchrun("fail", tmp_path)
    assert ran.returncode != 0
    assert "dsv2.train: process 1 of 2: the disk of process 1 is gone" in ran.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
