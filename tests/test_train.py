"""The schedule, the optimiser step, exact resume, checkpoints that fail, and the command line."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from dsv2 import DeepSeekV2, DSV2Config
from dsv2.data import Corpus, Document, prepare
from dsv2.data.packing import Batch
from dsv2.hf import load_pretrained
from dsv2.train import (
    SCHEDULES,
    CheckpointError,
    NonFiniteError,
    RunDirectory,
    RunDirectoryError,
    Stopped,
    TrainConfig,
    Trainer,
    find_checkpoints,
    learning_rate,
    read_lines,
)
from dsv2.train.command import main
from dsv2.train.distributed import World
from dsv2.train.loop import run
from dsv2.train.optimizer import make_optimizer

CFG = DSV2Config(
    vocab_size=264,
    hidden_size=20,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=28,
    max_position_embeddings=128,
    bos_token_id=256,
    eos_token_id=257,
    kv_lora_rank=10,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=6,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=14,
    topk_method="group_limited_greedy",
    n_group=3,
    topk_group=2,
    aux_loss_alpha=0.003,
    device_loss_alpha=0.05,
    communication_loss_alpha=0.02,
)
QUICK = dict(steps=8, batch_size=4, seq_len=16, lr=1e-2, validate_every=0, sample_every=0)
CPU = World(torch.device("cpu"))


class MemoryData:
    """Two domains of made-up bytes; the batch is a function of the step, as in `PackedDataset`."""

    domain_names = ["code", "english"]

    def batch(self, step, batch_size, seq_len, *, rank=0, world_size=1, seed=0) -> Batch:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        domains = torch.randint(2, (batch_size, 1), generator=generator)
        tokens = torch.randint(97, 110, (batch_size, seq_len + 1), generator=generator) + 5 * domains
        rows = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        domains = domains.expand(-1, seq_len).to(torch.int8)
        return Batch(tokens[:, :-1], tokens[:, 1:], domains)[rows]


def new_trainer(out=None, resume=False, cfg=CFG, data=None, validation=None, **changes) -> Trainer:
    config = TrainConfig(**(QUICK | changes))
    data = data or MemoryData()
    return Trainer(cfg, config, data, out=out, resume=resume, world=CPU, validation=validation)


def closed(trainer: Trainer) -> Trainer:
    """The trainer, after letting go of its folder."""
    trainer.directory.release()
    return trainer


def numbers(lines) -> list[tuple]:
    """What must be equal bit for bit between runs."""
    return [tuple(line[k] for k in ("step", "loss", "balance_loss", "lr", "grad_norm")) for line in lines]


# ----------------------------------------------------------------------------------------------- schedule


def test_the_papers_schedule_by_share_of_tokens():
    rates = [learning_rate(s, 1000, peak=2.4e-4, warmup=20) for s in range(1000)]
    assert rates[:20] == pytest.approx([2.4e-4 * n / 20 for n in range(1, 21)])
    assert set(rates[20:600]) == {2.4e-4}
    assert set(rates[600:900]) == {2.4e-4 * 0.316}  # the step after 60 % of the tokens is the first lower one
    assert rates[900:] == pytest.approx([2.4e-4 * 0.1] * 100, rel=2e-3)  # 0.316 is sqrt(0.1) to three digits
    lite = [learning_rate(s, 50, peak=1.0, warmup=1, schedule="deepseek-v2-lite") for s in range(50)]
    assert lite == [1.0] * 40 + [0.316] * 5 + [0.316**2] * 5


@pytest.mark.parametrize("total", [10, 30, 50, 70, 90, 110, 1230])
def test_decay_points_fall_on_whole_steps(total):
    """0.6 x total is not exact in floating point; the decay must not slip by a step."""
    rates = [learning_rate(s, total, peak=1.0, warmup=1) for s in range(total)]
    assert rates.count(1.0) == total * 6 // 10
    assert rates.count(0.316) == total * 9 // 10 - total * 6 // 10


def test_other_schedules_keep_their_shape():
    of = {
        name: [learning_rate(s, 100, peak=1.0, warmup=5, schedule=name) for s in range(100)]
        for name in SCHEDULES
    }
    assert set(of["constant"][4:]) == {1.0}
    assert of["wsd"][80] == pytest.approx(1.0) and of["wsd"][90] == pytest.approx(0.5)
    assert 0 < of["wsd"][99] < 0.051
    assert of["cosine"][5] == 1.0 and of["cosine"][99] == pytest.approx(0.1, abs=1e-3)
    for name, rates in of.items():
        assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]), name
        assert all(a >= b for a, b in zip(rates[5:], rates[6:])), name


@pytest.mark.parametrize("step, schedule", [(-1, "wsd"), (10, "wsd"), (3, "linear")])
def test_learning_rate_refuses(step, schedule):
    with pytest.raises(ValueError, match="step=|schedule='linear'"):
        learning_rate(step, 10, peak=1.0, warmup=2, schedule=schedule)


def test_settings_are_refused_together_and_by_name():
    with pytest.raises(ValueError) as refusal:
        TrainConfig(steps=0, lr=-1.0, schedule="sgdr", batch_size=6, micro_batches=4, beta2=1.0)
    for name in ("steps=0", "lr=-1.0", "schedule='sgdr'", "micro_batches=4", "beta2=1.0"):
        assert name in str(refusal.value)
    with pytest.raises(ValueError, match="lr=nan must be a finite number"):
        TrainConfig(lr=math.nan)


def test_settings_that_depend_on_the_length_are_fixed_once():
    config = TrainConfig(steps=300)
    assert (config.warmup_steps, config.validate_every, config.save_every) == (6, 30, 30)
    assert config.replace(steps=3000).warmup_steps == 6
    assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config


# ---------------------------------------------------------------------------------------------- one step


def reference_step(
    model: DeepSeekV2, batch: Batch, config: TrainConfig, lr: float
) -> dict[str, torch.Tensor]:
    """Weights after one AdamW step with clipping, written out from the formulas, and the loss's parts."""
    output = model.train()(batch.tokens)
    chosen = output.logits.log_softmax(-1).gather(-1, batch.targets[..., None])
    loss = -chosen.mean()
    names, parameters = zip(*model.named_parameters())
    gradients = torch.autograd.grad(loss + output.balance_loss, parameters)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    shrink = min(1.0, config.clip / norm)
    after = {"loss": loss.detach(), "balance_loss": output.balance_loss.detach(), "grad_norm": norm}
    for name, weight, gradient in zip(names, parameters, gradients):
        gradient = gradient.double() * shrink
        # The first step: both means, corrected for their start at 0, are the gradient and its square.
        moved = lr * gradient / (gradient.square().sqrt() + config.eps)
        decay = 0.0 if name.endswith("norm.weight") else config.weight_decay
        after[name] = (weight.detach().double() * (1 - lr * decay) - moved).float()
    return after


@pytest.mark.parametrize("clip", [1.5, 0.05])
def test_one_step_is_adamw_with_clipping_and_decay_on_matrices(clip):
    trainer = new_trainer(clip=clip, weight_decay=0.5, eps=1e-4, warmup_steps=3)
    batch = trainer.data.batch(0, 4, 16)
    expected = reference_step(trainer.model, batch, trainer.config, lr=1e-2 / 3)
    metrics = trainer.train_step()
    for name in ("loss", "balance_loss", "grad_norm"):  # float32 sums in another order
        assert metrics[name] == pytest.approx(float(expected[name]), rel=1e-5), name
    assert (metrics["grad_norm"] > clip) == (clip == 0.05)
    for name, parameter in trainer.model.named_parameters():
        # eps is well above float32 noise in the gradients, so that their signs do not decide a step.
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_norms_are_not_decayed_and_every_matrix_is():
    model = DeepSeekV2(CFG)
    decays = {
        id(p): g["weight_decay"]
        for g in make_optimizer(dict(model.named_parameters()), TrainConfig()).param_groups
        for p in g["params"]
    }
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name else 0.1), name


def test_imbalance_is_the_busiest_expert_over_the_average():
    trainer = new_trainer()
    output = trainer.model(trainer.data.batch(0, 4, 16).tokens)
    expected = []
    for routing in output.routings:
        counts = [int((routing.expert_ids == e).sum()) for e in range(6)]
        expected.append(max(counts) / (sum(counts) / 6))
    assert trainer.train_step()["imbalance"] == pytest.approx(sum(expected) / len(expected))


def test_micro_batches_add_up_to_the_batch():
    whole, parts = new_trainer(), new_trainer(micro_batches=2)
    for _ in range(4):
        a, b = whole.train_step(), parts.train_step()
        # Means of means of equally many, summed in another order: float32 noise, grown over a few steps.
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["balance_loss"] == pytest.approx(b["balance_loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_training_learns_and_leaves_other_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer = new_trainer(steps=40, cfg=CFG.replace(capacity_factor=1.0))
    losses = [metrics["loss"] for metrics in trainer]
    assert torch.equal(torch.rand(3), expected)
    assert losses[0] == pytest.approx(math.log(264), abs=0.1)
    assert losses[-1] < 3.5  # the 18 bytes in use: ln 18 = 2.9


def test_bf16_moves_float32_weights():
    trainer = new_trainer(dtype="bfloat16", steps=40)
    losses = [metrics["loss"] for metrics in trainer]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {p.dtype for p in trainer.computing_model.parameters()} == {torch.bfloat16}
    for master, computed in zip(trainer.model.parameters(), trainer.computing_model.parameters()):
        assert torch.equal(master.bfloat16(), computed)
    assert losses[-1] < 3.5
    exact = [metrics["loss"] for metrics in new_trainer(steps=40)]
    assert losses == pytest.approx(exact, rel=0.03)  # bf16 keeps 8 bits; the two runs drift apart slowly


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(tmp_path, dtype):
    cfg = CFG.replace(capacity_factor=1.0)  # tokens are dropped: the step draws random numbers
    straight = closed(new_trainer(tmp_path / "straight", cfg=cfg, dtype=dtype))
    for _ in straight:
        pass
    stopped = new_trainer(tmp_path / "stopped", cfg=cfg, dtype=dtype, save_every=3)
    for _ in range(5):
        stopped.advance()
    closed(stopped)
    torch.manual_seed(12345)  # a new process would have other random numbers
    resumed = new_trainer(tmp_path / "stopped", resume=True, cfg=cfg, dtype=dtype, save_every=3)
    assert resumed.step == 3
    for _ in resumed:
        pass
    expected = numbers(read_lines(straight.directory.metrics))
    assert numbers(read_lines(resumed.directory.metrics)) == expected
    assert [line[0] for line in expected] == list(range(1, 9))
    for a, b in zip(straight.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "step"])
def test_a_resume_that_loses_a_part_of_the_optimiser_is_noticed(tmp_path, monkeypatch, lost):
    """The comparison above can fail: without any one part of the state the losses differ."""
    straight = [m["loss"] for m in closed(new_trainer(tmp_path, save_every=3))]
    shutil.rmtree(find_checkpoints(tmp_path / "checkpoints")[-1])
    read = Trainer._read

    def forgetful(self, name, path, targets):
        read(self, name, path, targets)
        for key, target in targets.items():
            if name == "optimizer" and key.endswith("." + lost):
                target.zero_() if lost != "step" else target.fill_(1)

    monkeypatch.setattr(Trainer, "_read", forgetful)
    resumed = new_trainer(tmp_path, resume=True, save_every=3)
    assert resumed.step == 6
    assert [m["loss"] for m in resumed][1:] != straight[7:]


def test_resume_cuts_what_lies_behind_the_checkpoint_and_half_a_line(tmp_path):
    trainer = closed(new_trainer(tmp_path, save_every=3))
    for _ in range(5):
        trainer.advance()
    with trainer.directory.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = closed(new_trainer(tmp_path, resume=True, save_every=3))
    assert [line["step"] for line in read_lines(resumed.directory.metrics)] == [1, 2, 3]
    assert resumed.directory.metrics.read_text().endswith("}\n")


def test_resume_before_the_first_checkpoint_starts_again(tmp_path):
    trainer = closed(new_trainer(tmp_path, save_every=5))
    first = trainer.advance()["loss"]
    resumed = closed(new_trainer(tmp_path, resume=True))
    assert resumed.step == 0 and read_lines(resumed.directory.metrics) == []
    assert resumed.advance()["loss"] == first


# ------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run of eight steps with checkpoints at 4, 6 and 8."""
    trainer = new_trainer(tmp_path, save_every=2, keep=3)
    for _ in trainer:
        pass
    closed(trainer)
    return tmp_path


def steps_of(directory: Path) -> list[int]:
    return [int(path.name[5:]) for path in find_checkpoints(directory / "checkpoints")]


def test_old_checkpoints_go_and_milestones_stay(tmp_path):
    trainer = new_trainer(tmp_path, save_every=1, keep=2, milestone_every=3)
    for _ in trainer:
        pass
    closed(trainer)
    assert steps_of(tmp_path) == [3, 6, 7, 8]
    assert all(path.name.startswith("step-") for path in (tmp_path / "checkpoints").iterdir())


def test_checkpoints_hold_no_pickle(saved):
    files = {path.name for path in find_checkpoints(saved / "checkpoints")[-1].iterdir()}
    assert files == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(saved, file):
    path = saved / "checkpoints" / "step-00000008" / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=f"step-00000008.{file} is damaged"):
        assert closed(new_trainer(saved, resume=True, save_every=2)).step == 6


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest gone", "manifest cut", "other version"])
def test_an_incomplete_checkpoint_is_none(saved, damage):
    path = saved / "checkpoints" / "step-00000008"
    manifest, model = path / "manifest.json", path / "model.safetensors"
    if damage == "cut":
        model.write_bytes(model.read_bytes()[:-10])
    elif damage == "gone":
        model.unlink()
    elif damage == "manifest gone":
        manifest.unlink()
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 99'))
    assert steps_of(saved) == [4, 6]
    assert closed(new_trainer(saved, resume=True, save_every=2)).step == 6


def test_only_damaged_checkpoints_is_an_error_not_a_fresh_start(saved):
    for path in find_checkpoints(saved / "checkpoints"):
        (path / "state.json").write_text(
            (path / "state.json").read_text().replace("8", "9").replace("1", "2")
        )
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="every checkpoint .* is damaged"):
        new_trainer(saved, resume=True)


def test_a_checkpoint_of_another_model_is_refused_by_name(saved):
    with pytest.raises(CheckpointError) as refusal:
        new_trainer(saved, resume=True, cfg=CFG.replace(moe_intermediate_size=12))
    assert "layers.1.ffn.experts.w_down: (6, 20, 14) in the file, (6, 20, 12) in the model" in str(
        refusal.value
    )


def test_what_a_killed_process_left_is_removed(saved):
    left = saved / "checkpoints" / ".unfinished-step-00000009"
    shutil.copytree(saved / "checkpoints" / "step-00000008", left)
    assert steps_of(saved) == [4, 6, 8]
    closed(new_trainer(saved, resume=True))
    assert not left.exists()


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    first = new_trainer(tmp_path)
    with pytest.raises(RunDirectoryError, match="another process is training"):
        new_trainer(tmp_path)
    closed(first)
    closed(new_trainer(tmp_path))


# ------------------------------------------------------------------------ validation, samples, faults


def test_validation_by_domain_counts_bytes(tmp_path):
    validation = MemoryData().batch(77, 7, 16)  # 7 windows: not a multiple of the batch
    validation.targets[2, 5] = 257  # predicted and paid for, but no byte
    trainer = new_trainer(validation=validation)
    metrics = trainer.validate()
    assert trainer.model.training
    with torch.no_grad():
        nats = -trainer.model.eval()(validation.tokens).logits.double().log_softmax(-1)
    nats = nats.gather(-1, validation.targets[..., None])[..., 0]
    assert metrics["val_loss"] == pytest.approx(float(nats.mean()), rel=1e-6)
    assert metrics["val_nats_per_byte"] == pytest.approx(float(nats.sum()) / (7 * 16 - 1), rel=1e-6)
    assert metrics["val_bits_per_byte"] == pytest.approx(metrics["val_nats_per_byte"] / math.log(2))
    for number, name in enumerate(MemoryData.domain_names):
        inside = validation.domains == number
        expected = float(nats[inside].sum()) / int((validation.targets[inside] < 256).sum())
        assert metrics["val_domains"][name] == pytest.approx(expected, rel=1e-6)


def test_validation_does_not_disturb_training(tmp_path):
    validation = MemoryData().batch(77, 3, 16)
    cfg = CFG.replace(capacity_factor=1.0)
    watched = new_trainer(tmp_path, cfg=cfg, validation=validation, validate_every=1, sample_every=2)
    assert numbers(watched) == numbers(new_trainer(cfg=cfg))
    closed(watched)
    lines = read_lines(watched.directory.samples)
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert {line["domain"] for line in lines} == {"code", "english"}
    assert all(isinstance(line["text"], str) and line["prompt"] for line in lines)


def test_a_loss_that_is_no_number_stops_and_changes_nothing(tmp_path):
    trainer = new_trainer(tmp_path, save_every=2)
    for _ in range(3):
        trainer.advance()
    with torch.no_grad():
        trainer.model.layers[1].ffn_norm.weight[0] = math.nan
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(
        NonFiniteError, match="step 4: loss is nan.*the last good checkpoint is .*step-00000002"
    ):
        trainer.advance()
    closed(trainer)
    assert read_lines(trainer.directory.metrics)[-1]["loss"] == "nan"
    for old, new in zip(before, trainer.model.parameters()):
        torch.testing.assert_close(old, new.detach(), rtol=0, atol=0, equal_nan=True)
    assert closed(new_trainer(tmp_path, resume=True, save_every=2)).step == 2


class InterruptedData(MemoryData):
    """Sends this process a signal while the batch of step 3 is read."""

    def batch(self, step, *sizes, **place):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(step, *sizes, **place)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals that can be sent to oneself")
def test_a_signal_ends_the_run_in_order(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = new_trainer(tmp_path, data=InterruptedData(), save_every=0)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 4 of 8; saved") as stop:
        run(trainer, display="none", handle_signals=True)
    assert stop.value.status == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert closed(trainer).saved_step == 4
    assert closed(new_trainer(tmp_path, resume=True)).step == 4


def test_the_batch_must_divide_and_the_context_must_fit():
    with pytest.raises(
        ValueError, match="batch_size=4 must be a multiple of 3 processes x 1 micro-batches = 3"
    ):
        Trainer(CFG, TrainConfig(**QUICK), MemoryData(), world=World(torch.device("cpu"), size=3))
    with pytest.raises(ValueError, match="seq_len=256 is longer than .*max_position_embeddings=128"):
        new_trainer(seq_len=256)
    with pytest.raises(ValueError, match="vocab_size=200 is smaller"):
        new_trainer(cfg=CFG.replace(vocab_size=200, bos_token_id=None, eos_token_id=None))


# ------------------------------------------------------------------------------------------ command line


SMALLER = [
    f"{name}={getattr(CFG, name)}"
    for name in "hidden_size num_hidden_layers num_attention_heads intermediate_size kv_lora_rank "
    "qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok moe_intermediate_size "
    "n_group topk_group".split()
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A small packed corpus of two domains."""
    documents = [
        Document("code", f"file {n}", f"def f{n}(x):\n    return x * {n} + {n * n}\n" * 9) for n in range(60)
    ] + [
        Document("english", f"page {n}", f"On day {n} there were {n} birds on the wall of the house.\n" * 9)
        for n in range(60)
    ]
    return prepare(Corpus(documents), None, tmp_path_factory.mktemp("data") / "packed").directory


@pytest.fixture
def command(packed, tmp_path):
    """Runs the command line on the small corpus in `tmp_path`/run."""

    def call(*arguments: str, changed: tuple[str, ...] = (), out: str = "run") -> int:
        model = [part for entry in (*SMALLER, *changed) for part in ("--set", entry)]
        basic = ["--data", str(packed), "--batch-size", "4", "--seq-len", "32", "--device", "cpu"]
        shown = ["--display", "none", "--sample-every", "0"]
        return main([*basic, *model, *shown, "--out", str(tmp_path / out), *map(str, arguments)])

    return call


def test_command_trains_validates_exports_and_compares(command, tmp_path, capsys):
    assert command("--steps", 6, "--export-dtype", "float32", "--save-every", 3) == 0
    said = capsys.readouterr().out
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert set(lines[-1]["val_domains"]) == {"code", "english"}
    gram = json.loads((tmp_path / "run" / "ngram.json").read_text())["nats_per_byte"]
    assert f"model {lines[-1]['val_nats_per_byte']:.3f} nats per byte, 3-gram {gram:.3f}" in said
    model = load_pretrained(tmp_path / "run" / "model")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert model.cfg == DSV2Config.from_dict(settings["model"]) and settings["training"]["steps"] == 6
    assert settings["commands"][0][:3] == ["python", "-m", "dsv2.train"]
    trainer = Trainer(
        model.cfg,
        TrainConfig(**settings["training"]),
        MemoryData(),
        out=tmp_path / "run",
        resume=True,
        world=CPU,
    )
    closed(trainer)
    tokens = torch.arange(60, 90).view(2, 15)
    with torch.no_grad():
        expected = trainer.model.eval()(tokens).logits
        torch.testing.assert_close(model.eval()(tokens).logits, expected, rtol=0, atol=1e-6)


def test_command_resumes_exactly_and_refuses_what_would_alter_the_run(command, tmp_path, capsys):
    arguments = ("--no-ngram-baseline", "--steps", 6, "--save-every", 2)
    assert command(*arguments, out="straight") == 0
    assert command(*arguments) == 0
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", ignore_errors=step == 4)
    shutil.copytree(
        tmp_path / "straight" / "checkpoints" / "step-00000004",
        tmp_path / "run" / "checkpoints" / "step-00000004",
    )
    assert command("--resume", "--no-ngram-baseline", "--save-every", 1) == 0
    straight, resumed = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("straight", "run"))
    assert numbers(resumed) == numbers(straight)
    assert "Going on from step 4" in capsys.readouterr().out

    assert command("--resume", "--lr", "0.5", "--seed", 3, changed=("hidden_size=24",)) == 2
    said = capsys.readouterr().err
    for part in (
        "lr was 0.0015 and is now 0.5",
        "seed was 0 and is now 3",
        "hidden_size was 20 and is now 24",
    ):
        assert part in said
    assert command("--resume", "--steps", 9) == 2
    assert "add --extend" in capsys.readouterr().err
    assert command("--resume", "--steps", 9, "--extend", "--no-ngram-baseline") == 0
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 9


def test_a_constant_schedule_can_be_extended_exactly(command, tmp_path):
    quiet = ("--no-ngram-baseline", "--schedule", "constant", "--validate-every", 0)
    assert command("--steps", 7, "--warmup-steps", 2, *quiet, out="long") == 0
    assert command("--steps", 4, "--warmup-steps", 2, *quiet) == 0
    assert command("--resume", "--steps", 7, "--no-ngram-baseline") == 0
    long, extended = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("long", "run"))
    assert numbers(long) == numbers(extended)


def test_command_refuses_with_a_sentence(command, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    cases = [
        (dict(out="full"), ("--steps", 2), "is not empty"),
        (dict(out="none"), ("--resume",), "no run.json"),
        (dict(changed=("hiden_size=8",)), ("--steps", 2), "hiden_size"),
        (dict(changed=("hidden_size",)), ("--steps", 2), "must look like FIELD=VALUE"),
        (dict(), ("--steps", 0), "steps=0 must be at least 1"),
        (dict(), ("--steps", 2, "--device", "cuda:99"), "device='cuda:99' cannot be used"),
        (dict(), ("--minutes", -1), "--minutes must be greater than 0"),
        (dict(), ("--steps", 2, "--data", tmp_path / "nowhere"), "manifest.json is missing"),
    ]
    for options, arguments, expected in cases:
        assert command(*arguments, **options) == 2, arguments
        assert expected in capsys.readouterr().err
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_command_ends_with_3_when_the_loss_is_no_number(command, tmp_path, capsys):
    assert command("--steps", 30, "--lr", "1e30", "--warmup-steps", 1, "--save-every", 1) == 3
    said = capsys.readouterr().err
    assert "is nan" in said or "is inf" in said
    last = find_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert f"the last good checkpoint is {last}" in said
    line = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert {"nan", "inf"} & {line["loss"], line["balance_loss"], line["grad_norm"]}


def test_minutes_choose_the_steps_and_record_them(command, tmp_path, capsys):
    assert command("--minutes", "0.002", "--no-ngram-baseline") == 0
    steps = json.loads((tmp_path / "run" / "run.json").read_text())["training"]["steps"]
    assert f"{steps:,} steps for 0.002 minutes" in capsys.readouterr().out
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == steps


def test_minutes_with_steps_stop_and_save(command, tmp_path, capsys):
    assert command("--minutes", "0.001", "--steps", 100_000) == 0
    assert "the time is over after step" in capsys.readouterr().err
    assert len(find_checkpoints(tmp_path / "run" / "checkpoints")) == 1


@pytest.mark.parametrize("changed", ["tie_word_embeddings=true", "attention=mha", "n_routed_experts=0"])
def test_other_models_train_resume_and_export(command, tmp_path, changed):
    extra = ("n_group=1", "topk_group=1", "topk_method=greedy", "num_experts_per_tok=0", "n_shared_experts=0")
    extra += ("aux_loss_alpha=0", "device_loss_alpha=0", "communication_loss_alpha=0")
    changes = (changed, *(extra if changed.startswith("n_routed") else ()))
    arguments = ("--steps", 4, "--save-every", 2, "--no-ngram-baseline")
    assert command(*arguments, changed=changes) == 0
    before = read_lines(tmp_path / "run" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert command("--resume", "--no-ngram-baseline", changed=changes) == 0
    assert numbers(read_lines(tmp_path / "run" / "metrics.jsonl")) == numbers(before)
    load_pretrained(tmp_path / "run" / "model")


def test_another_router_is_an_option(command, tmp_path, capsys):
    """It brings its number of experts along, is trained and exported, and cannot change on resuming."""
    arguments = ("--router", "switch", "--steps", 4, "--no-ngram-baseline")
    smaller = [entry for entry in SMALLER if not entry.startswith("num_experts_per_tok")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "SMALLER", smaller)
        assert command(*arguments, changed=("capacity_factor=1.0",)) == 0
    cfg = load_pretrained(tmp_path / "run" / "model").cfg
    assert (cfg.router, cfg.num_experts_per_tok, cfg.capacity_factor) == ("switch", 1, 1.0)
    assert command("--resume", "--router", "switch", changed=("num_experts_per_tok=1",)) == 0
    assert command("--resume", "--router", "glam", changed=("num_experts_per_tok=1",)) == 2
    assert "router was 'switch' and is now 'glam'" in capsys.readouterr().err
    assert command(*arguments, changed=("num_experts_per_tok=2",), out="other") == 2
    assert "num_experts_per_tok=2 must be 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("--router", "best")


def test_help_names_every_group(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for word in (
        "the model",
        "how long",
        "the text",
        "the optimiser",
        "the machine",
        "what is kept",
        "torchrun",
    ):
        assert word in said


def test_settings_of_a_run_are_whole_or_not_there(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.create({"model": {}})
    assert directory.settings()["model"] == {}
    with pytest.raises(RunDirectoryError, match="not empty"):
        RunDirectory(tmp_path / "run").create({})
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        directory.settings()
    directory.release()
