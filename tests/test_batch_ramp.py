"""A batch that grows: its sizes, every sequence once, exact resume, and nothing new without it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_train import CFG, CPU, QUICK, MemoryData, closed, new_trainer, numbers

from dsv2.data import ByteTokenizer, Corpus, Document, prepare
from dsv2.data.packing import Batch
from dsv2.train import TrainConfig, Trainer, batch_size_at, command, learning_rate, learning_rate_at
from dsv2.train.command import main
from dsv2.train.distributed import World

RAMP = {"batch_size": 2, "batch_ramp_to": 8, "batch_ramp_tokens": 250}


def paper(steps: int = 215_000) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        batch_size=2304,
        batch_ramp_to=9216,
        batch_ramp_tokens=225 * 10**9,
        seq_len=4096,
        lr=2.4e-4,
    )


class StreamData(MemoryData):
    """Sequences 0, 1, 2, ... in order: a sequence is its number, written in bytes."""

    def batch(self, step, batch_size, seq_len, *, rank=0, world_size=1, seed=0, first=None) -> Batch:
        rows = batch_size // world_size
        begin = (step * batch_size if first is None else first) + rank * rows
        numbers = torch.arange(begin, begin + rows)[:, None] * 3 + torch.arange(seq_len + 1)
        tokens = 97 + numbers % 26
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(rows, seq_len, dtype=torch.int8))


def test_the_papers_ramp():
    sizes = {"start": 2304, "end": 9216, "ramp_tokens": 225 * 10**9}
    assert batch_size_at(0, **sizes) == 2304
    assert batch_size_at(75 * 10**9, **sizes) == 2304 + 6912 // 3
    assert batch_size_at(225 * 10**9 - 1, **sizes) == 9215
    assert batch_size_at(225 * 10**9, **sizes) == batch_size_at(8 * 10**12, **sizes) == 9216
    assert batch_size_at(75 * 10**9, **sizes, multiple=1000) == 4000
    assert batch_size_at(0, **sizes, multiple=1000) == 2304, "never below the start"


@pytest.mark.parametrize("multiple", [None, 1, 96])
def test_sizes_add_up_to_what_has_been_seen(multiple):
    """A step's size is the one that the tokens seen before it ask for, by walking through them one by one."""
    config = paper().replace(batch_ramp_multiple=multiple)
    tokens, unit = 0, multiple or math.gcd(2304, 9216)
    for step in range(15_000):
        size = batch_size_at(
            tokens, start=2304, end=9216, ramp_tokens=config.batch_ramp_tokens, multiple=unit
        )
        if step % 500 == 0 or step > 14_950:
            assert (config.tokens_before(step), config.batch_size_of(step)) == (tokens, size)
        tokens += size * 4096
    assert config.batch_size_of(0) == 2304 and config.batch_size_of(14_999) == config.largest_batch == 9216


def test_without_a_ramp_nothing_is_new():
    config = TrainConfig(steps=30, batch_size=6, seq_len=10)
    assert [config.tokens_before(n) for n in (0, 1, 30)] == [0, 60, 1800]
    assert config.batch_size_of(29) == config.largest_batch == 6
    assert not any("ramp" in name for name in config.to_dict())
    for schedule in ("deepseek-v2", "deepseek-v2-lite", "wsd", "cosine", "constant"):
        for total in (7, 30, 110):
            args = {"peak": 0.3, "warmup": 2, "schedule": schedule}
            by_step = [learning_rate(s, total, **args) for s in range(total)]
            by_token = [learning_rate(s, total, **args, tokens_before=lambda n: 60 * n) for s in range(total)]
            assert by_step == by_token, "to the last bit"


def test_the_rate_falls_by_tokens_and_not_by_steps():
    config = TrainConfig(**(QUICK | RAMP | {"steps": 100, "batch_ramp_tokens": 6000}))
    whole = config.tokens_before(100)
    for step in range(100):
        share, lr = config.tokens_before(step) / whole, config.learning_rate(step)
        if step >= config.warmup_steps:
            assert lr == pytest.approx(1e-2 * 0.316 ** ((share >= 0.6) + (share >= 0.9)))
    later = config.tokens_before(60) < 0.6 * whole
    assert later and config.learning_rate(60) == 1e-2, "step 60 of 100 has not seen 60 % of the tokens"
    assert learning_rate_at(6, 10, step=60, peak=1.0, warmup=1) == 0.316
    assert learning_rate_at(59, 100, step=60, peak=1.0, warmup=1) == 1.0
    assert learning_rate_at(0, 10, step=1, peak=1.0, warmup=4) == 0.5


def test_defaults_are_the_papers_share_and_stay():
    config = TrainConfig(steps=1000, batch_size=8, seq_len=10, batch_ramp_to=12)
    assert config.batch_ramp_tokens == round(225 / 8100 * 1000 * 12 * 10) and config.batch_ramp_multiple == 4
    assert config.replace(steps=5000).batch_ramp_tokens == config.batch_ramp_tokens
    assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_ramp_to": 3}, "batch_ramp_to=3 must be at least batch_size=4"),
        ({"batch_ramp_tokens": 9}, "batch_ramp_tokens=9 needs batch_ramp_to"),
        ({"batch_ramp_to": 8, "batch_ramp_tokens": 0}, "batch_ramp_tokens=0 must be at least 1"),
        ({"batch_ramp_to": 8, "batch_ramp_multiple": 3}, "batch_ramp_multiple=3 must divide batch_size=4"),
        ({"batch_ramp_to": 8, "batch_ramp_multiple": 0}, "batch_ramp_multiple=0 must be at least 1"),
        ({"batch_ramp_to": 8, "micro_batches": 4, "batch_ramp_multiple": 2}, "multiple of micro_batches=4"),
    ],
)
def test_settings_that_do_not_work_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**{"batch_size": 4, **changes})
    with pytest.raises(ValueError, match="batch_ramp_multiple=1 must be a multiple of 2 processes"):
        config = TrainConfig(**(QUICK | {"batch_ramp_to": 8, "batch_ramp_multiple": 1}))
        Trainer(CFG, config, MemoryData(), world=World(torch.device("cpu"), size=2))


def test_every_window_of_an_epoch_comes_once(tmp_path):
    text = "".join(chr(97 + n % 26) for n in range(700))
    corpus = Corpus([Document("code", f"file {n}", text[n:] + str(n)) for n in range(9)], {})
    data = prepare(corpus, directory=tmp_path / "packed")
    config = TrainConfig(**(QUICK | RAMP | {"steps": 40}))
    count = data.windows_per_epoch(config.seq_len)
    whole = data.batch(0, count, config.seq_len).tokens
    read = []
    for step in range(40):
        size = config.batch_size_of(step)
        parts = [
            data.batch(step, size, 16, rank=r, world_size=2, first=config.sequences_before(step)).tokens
            for r in range(2)
        ]
        read.append(torch.cat(parts))
    assert len(read[0]) == 2 and len(read[-1]) == 8
    read = torch.cat(read)[:count]
    assert torch.equal(read, whole[: len(read)])
    with pytest.raises(ValueError, match="first must not be negative"):
        data.batch(0, 2, 16, first=-1)


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_ramped_run_goes_on_exactly(tmp_path, stop):
    settings = {**RAMP, "save_every": stop, "data": StreamData()}
    whole = new_trainer(**settings)
    lines = list(whole)
    tokens = [line["tokens"] for line in lines]
    assert tokens == [whole.config.tokens_before(n) for n in range(1, 9)] and tokens[-1] > 8 * 2 * 16
    first = new_trainer(tmp_path / "run", **settings)
    for _ in range(stop):
        first.advance()
    closed(first)
    again = new_trainer(tmp_path / "run", resume=True, **settings)
    assert numbers(again) == numbers(lines[stop:]) and again.tokens == whole.tokens
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, whole.parameters[name]), name
    closed(again)


def test_micro_batches_are_parts_of_the_same_batch():
    one = new_trainer(**RAMP, data=StreamData())
    two = new_trainer(**RAMP, micro_batches=2, data=StreamData())
    for a, b in zip(one, two):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_run_that_took_every_batch_for_the_first_would_be_seen():
    """The planted bug: where a step's data begins, taken from the step's number and its own size."""
    config = TrainConfig(**(QUICK | RAMP))
    wrong = [step * config.batch_size_of(step) for step in range(8)]
    right = [config.sequences_before(step) for step in range(8)]
    assert wrong != right
    data = StreamData()
    assert not torch.equal(data.batch(7, 8, 16).tokens, data.batch(7, 8, 16, first=right[7]).tokens)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DSV2_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 3000)
    small = ["--set", "hidden_size=16", "--set", "num_hidden_layers=2", "--seq-len", "16", "--lr", "1e-2"]
    small += [
        "--no-ngram-baseline",
        "--domains",
        "text",
        "--text",
        str(tmp_path / "my.txt"),
        "--threads",
        "1",
    ]
    ramp = ["--batch-size", "2", "--batch-ramp-to", "6", "--batch-ramp-tokens", "100", "--display", "none"]

    def run(*more) -> int:
        return main([*map(str, more), "--out", str(tmp_path / "run")])

    assert run(*small, *ramp, "--steps", 6) == 0
    assert "6 steps of 2 to 6 x 16" in capsys.readouterr().out
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["training"]
    assert [settings[n] for n in ("batch_ramp_to", "batch_ramp_tokens", "batch_ramp_multiple")] == [6, 100, 2]
    assert run("--resume", "--batch-ramp-to", 8) == 2
    assert "batch_ramp_to was 6 and is now 8" in capsys.readouterr().err


def test_minutes_buy_fewer_steps_with_a_ramp(monkeypatch, tmp_path):
    corpus = Corpus([Document("code", f"file {n}", "0123456789 " * 60 + str(n)) for n in range(9)], {})
    data = prepare(corpus, directory=tmp_path / "packed")
    monkeypatch.setattr(command, "median", lambda times: 0.1)
    fields = {"batch_size": 2, "seq_len": 16, "validate_every": 0}
    plain = command._fit_steps(fields, 1, CFG, data, ByteTokenizer(), CPU)
    ramped = command._fit_steps({**fields, "batch_ramp_to": 8}, 1, CFG, data, ByteTokenizer(), CPU)
    assert plain.steps == 540
    assert 2 * 540 - 8 <= ramped.sequences_before(ramped.steps) <= 2 * 540
