"""Two processes under torchrun compute what one computes, and share its checkpoints.

Run as a script under torchrun, this file is one of those processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
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


def torchrun(*arguments: str, processes: int = 2, run=subprocess.run, **options):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        __file__,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = options or {"capture_output": True, "timeout": 200}
    return run([*command, *map(str, arguments)], env=environment, text=True, **options)


LIVES = 4  # processes of the run that is killed, each with a part of the experts
STEPS, SAVE_EVERY = 60, 4


def live(out: Path, resume: bool) -> int:
    """A process of a run by the command line, on made-up data; its number goes where the killer looks."""
    from test_train import CFG, MemoryData

    from dsv2.data import ByteTokenizer
    from dsv2.train import command

    tokenizer = ByteTokenizer()
    command._find_data = lambda options, world: (MemoryData(), tokenizer, {"asked": {}})
    command._load_data = lambda recorded, world: (MemoryData(), tokenizer)
    command._model_config = lambda options, tokenizer: CFG.replace(**CHANGES)
    (out.parent / f"process-{os.environ['RANK']}").write_text(str(os.getpid()))
    arguments = ["--out", str(out), "--device", "cpu", "--expert-parallel", str(LIVES), "--threads", "1"]
    if resume:
        return command.main([*arguments, "--resume"])
    arguments += ["--steps", str(STEPS), "--batch-size", "4", "--seq-len", "16", "--lr", "1e-2"]
    arguments += ["--save-every", str(SAVE_EVERY), "--validate-every", "0", "--sample-every", "0"]
    return command.main(arguments)


def main(task: str, out: Path, resume: bool = False) -> int:
    """One process. train: a run from the start, one from the middle, an export. fail: an error.

    experts: the same with experts shared out over two processes.
    """
    from dsv2.train import start_world
    from dsv2.train.distributed import leave

    if task == "live":
        return live(out, resume)
    world = start_world("cpu", expert_parallel=2 if task == "experts" else 1)
    if task == "fail":
        from dsv2.train import command

        def broken(*arguments):
            if world.rank == 1:
                raise OSError("the disk of process 1 is gone")
            world.barrier()

        command._find_data = broken
        return command.main(["--steps", "2", "--out", str(out), "--device", "cpu"])
    for name in ("two", "one_then_two"):
        micro = 2 if name == "two" and world.size == 2 else 1  # the batch has four rows
        trainer = new_trainer(out / name, resume=True, world=world, micro_batches=micro)
        for _ in trainer:
            pass
        if task == "experts":
            layer = trainer.model.layers[-1].ffn
            assert len(layer.experts.w_down.to_local()) == (5, 4)[world.rank % 2]
            assert layer.parallel.devices.traffic.sent().sum() > 0
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
@pytest.mark.parametrize("task, processes", [("train", 2), ("experts", 2), ("experts", 4)])
def test_processes_train_as_one_and_share_checkpoints(tmp_path, task, processes):
    from test_train import closed

    from dsv2.hf import load_pretrained

    one = closed(new_trainer(tmp_path / "one"))
    for _ in one:
        pass
    shutil.copytree(tmp_path / "one", tmp_path / "one_then_two")
    shutil.rmtree(tmp_path / "one_then_two" / "checkpoints" / "step-00000008")

    ran = torchrun(task, tmp_path, processes=processes)
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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_a_killed_process_ends_all_and_the_run_resumes_exactly(tmp_path):
    """Four processes with a part of the experts each; one is killed where it cannot answer."""
    from test_train import numbers

    from dsv2.train import read_lines

    (tmp_path / "a").mkdir()
    never = torchrun("live", tmp_path / "a" / "run", processes=LIVES)
    assert never.returncode == 0, never.stderr
    expected = numbers(read_lines(tmp_path / "a" / "run" / "metrics.jsonl"))
    assert len(expected) == STEPS

    (tmp_path / "b").mkdir()
    out = tmp_path / "b" / "run"
    running = torchrun(
        "live", out, processes=LIVES, run=subprocess.Popen, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 150
        while not list((out / "checkpoints").glob(f"step-{SAVE_EVERY * 2:08d}")):
            assert running.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.02)
        os.kill(int((tmp_path / "b" / "process-2").read_text()), signal.SIGKILL)
        _, said = running.communicate(timeout=60)  # a minute is what the course promises
    finally:
        running.kill()
    assert running.returncode != 0
    for rank in (0, 1, 3):
        assert f"dsv2.train: process {rank} of {LIVES}: another process of the run is gone" in said, said
    assert len(read_lines(out / "metrics.jsonl")) < STEPS

    resumed = torchrun("live", out, "resume", processes=LIVES)
    assert resumed.returncode == 0, resumed.stderr
    assert numbers(read_lines(out / "metrics.jsonl")) == expected


def test_processes_that_experts_cannot_be_shared_out_over_are_refused():
    from dsv2.train import start_world

    for processes in (2, 0):
        with pytest.raises(ValueError, match=f"expert_parallel={processes} must divide the number of"):
            start_world("cpu", expert_parallel=processes)


def test_only_what_a_lost_process_causes_is_called_that():
    from dsv2.train.distributed import lost_process

    gloo = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234\nmore"
    assert lost_process(RuntimeError(gloo)) == gloo.splitlines()[0]
    assert lost_process(RuntimeError("NCCL communicator was aborted")) != ""
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""
    assert lost_process(KeyError("gloo")) == ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), "resume" in sys.argv))
