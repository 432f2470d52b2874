"""The command line of pretraining: settings, data, the run, and what comes of it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import sys
import traceback
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch

import dsv2
from dsv2.config import PRESETS, ROUTERS, DSV2Config
from dsv2.data import (
    ByteTokenizer,
    PackedDataError,
    PackedDataset,
    Tokenizer,
    find_corpus,
    load_tokenizer,
    ngram_baselines,
    prepare,
)
from dsv2.train.distributed import World, leave, lost_process, start_world
from dsv2.train.loop import DISPLAYS, Stopped, describe_validation, make_path, run
from dsv2.train.run_directory import RunDirectory, read_lines, replace_file
from dsv2.train.schedule import DTYPES, SCHEDULES, TrainConfig
from dsv2.train.trainer import NonFiniteError, Trainer

NON_FINITE = 3
TIMED_STEPS, UNTIMED_STEPS = 8, 3

# What suits a preset; everything can be set on the command line. tiny is done, samples and all, in less than
# ten minutes on two cores; its learning rate did best of six in runs of four and five minutes.
PRESET_DEFAULTS: dict[str, dict[str, Any]] = {
    "tiny": dict(batch_size=8, seq_len=256, lr=1.5e-3, schedule="deepseek-v2", minutes=9),
    "small": dict(batch_size=128, seq_len=1024, lr=1e-3, schedule="deepseek-v2", steps=10_000),
    "lite": dict(batch_size=4608, seq_len=4096, lr=4.2e-4, schedule="deepseek-v2-lite", steps=300_000),
    "full": dict(batch_size=9216, seq_len=4096, lr=2.4e-4, schedule="deepseek-v2", steps=215_000),
}

# Settings that do not change what a run computes, so that a resumed run may have others.
FREE_SETTINGS = {
    "compile",
    "validate_every",
    "sample_every",
    "save_every",
    "keep",
    "milestone_every",
}


def parser() -> argparse.ArgumentParser:
    """The options, grouped by topic. An option that is not given is absent from the result."""
    top = argparse.ArgumentParser(
        prog="python -m dsv2.train",
        description="Pretrain a DeepSeek-V2 on text that this machine has, or on your own.",
        epilog="Several processes: torchrun --nproc-per-node 2 -m dsv2.train ... (the batch is shared out; "
        "checkpoints do not depend on how many there are). Exit status: 0 done, 2 settings that do not work, "
        "3 the loss is no number, 130 or 143 stopped by a signal after saving.",
        argument_default=argparse.SUPPRESS,
    )

    model = top.add_argument_group("the model")
    model.add_argument("--preset", choices=PRESETS, help="a named configuration (default: tiny)")
    model.add_argument(
        "--router",
        choices=ROUTERS,
        help="how a token's experts are chosen, and as many as this router takes (default: deepseek); with "
        "--set capacity_factor=1.25, switch, gshard and glam leave out what an expert has no room for",
    )
    model.add_argument(
        "--set",
        action="append",
        metavar="FIELD=VALUE",
        help="change a field of the configuration, for example --set num_hidden_layers=8 or "
        "--set attention=mha; may be given several times",
    )

    length = top.add_argument_group("how long")
    length.add_argument("--steps", type=int, help="optimiser steps")
    length.add_argument(
        "--minutes",
        type=float,
        help="without --steps: time a few steps first and choose how many fit into so many minutes; the run "
        "then makes them all, as its schedule ends at the last. With --steps, or when resuming: stop and "
        "save after so many minutes",
    )

    data = top.add_argument_group("the text")
    data.add_argument("--text", nargs="+", metavar="FILE", help="your own text files, besides what is found")
    data.add_argument(
        "--domains", nargs="+", metavar="NAME", help="only these: code english arithmetic language text"
    )
    data.add_argument("--tokenizer", metavar="DIR", help="a folder with tokenizer.json (default: bytes)")
    data.add_argument("--data", metavar="DIR", help="packed data made by python -m dsv2.data --out DIR")
    data.add_argument("--batch-size", type=int, help="sequences in a step, over all processes")
    data.add_argument("--seq-len", type=int, help="tokens in a sequence")
    data.add_argument(
        "--batch-ramp-to",
        type=int,
        metavar="N",
        help="let the batch grow from --batch-size to so many sequences, in proportion to the tokens seen",
    )
    data.add_argument(
        "--batch-ramp-tokens",
        type=int,
        metavar="TOKENS",
        help="over so many tokens (default: 2.8 %% of --steps of the largest batch, as in the paper)",
    )
    data.add_argument(
        "--batch-ramp-multiple",
        type=int,
        metavar="N",
        help="in multiples of so many sequences (default: the largest number that divides both ends)",
    )
    data.add_argument(
        "--micro-batches", type=int, help="compute the batch in so many parts, to save memory (default: 1)"
    )

    optimiser = top.add_argument_group(
        "the optimiser: AdamW, and the paper's schedule by share of the tokens"
    )
    optimiser.add_argument("--lr", type=float, help="peak learning rate")
    optimiser.add_argument("--schedule", choices=SCHEDULES, help="deepseek-v2: x 0.316 at 60 %% and at 90 %%")
    optimiser.add_argument("--warmup-steps", type=int, help="linear warm-up (default: 2 %% of the steps)")
    optimiser.add_argument("--weight-decay", type=float, help="of matrices (default: 0.1)")
    optimiser.add_argument("--beta1", type=float, help="default: 0.9")
    optimiser.add_argument("--beta2", type=float, help="default: 0.95")
    optimiser.add_argument("--clip", type=float, help="largest gradient norm (default: 1)")
    optimiser.add_argument("--seed", type=int, help="of weights and order of the data (default: 0)")

    machine = top.add_argument_group("the machine")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    machine.add_argument(
        "--expert-parallel",
        type=int,
        metavar="P",
        help="share out the experts of a layer over P of torchrun's processes (default: 1)",
    )
    machine.add_argument(
        "--dtype", choices=DTYPES, help="default: bfloat16 on CUDA; weights are float32 in either"
    )
    machine.add_argument("--threads", type=int, help="of the CPU; exact resume needs the same number")
    switch = argparse.BooleanOptionalAction
    machine.add_argument("--compile", action=switch, help="compile the blocks by torch.compile")
    machine.add_argument(
        "--checkpoint-blocks", action=switch, help="recompute blocks in the backward pass: less memory"
    )
    machine.add_argument("--deterministic", action=switch, help="bitwise repeatable on a GPU too, and slower")

    kept = top.add_argument_group("what is kept and shown")
    kept.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/PRESET)")
    kept.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly")
    kept.add_argument(
        "--extend",
        action="store_true",
        help="with --resume and more --steps: allow it although the schedule, stretched over the new length, "
        "gives other learning rates than a run of that length would have had so far",
    )
    kept.add_argument("--validate-every", type=int, metavar="STEPS", help="0: never (default: ten times)")
    kept.add_argument("--validation-windows", type=int, metavar="N", help="how much text (default: 64)")
    kept.add_argument("--sample-every", type=int, metavar="STEPS", help="default: with each validation")
    kept.add_argument("--save-every", type=int, metavar="STEPS", help="checkpoints (default: ten times)")
    kept.add_argument("--keep", type=int, metavar="N", help="checkpoints to keep (default: 2)")
    kept.add_argument("--milestone-every", type=int, metavar="STEPS", help="checkpoints that always stay")
    kept.add_argument("--export-dtype", choices=DTYPES, help="of the finished model (default: bfloat16)")
    kept.add_argument(
        "--ngram-baseline",
        action=switch,
        help="compare with a 3-gram model of bytes (default: yes, with the byte tokenizer)",
    )
    kept.add_argument("--display", choices=DISPLAYS, help="default: a bar on a terminal, lines elsewhere")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = vars(parser().parse_args(arguments))
    command = ["python", "-m", "dsv2.train", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        return _run(options, command)
    except Stopped as stopped:
        return _end(str(stopped), stopped.status)
    except NonFiniteError as error:
        return _end(str(error), NON_FINITE)
    except (ValueError, OSError) as error:
        return _end(str(error), 2)
    except Exception as error:
        if lost := lost_process(error):
            return _end(f"another process of the run is gone ({lost}); {GO_ON}", 1)
        traceback.print_exc()
        return _end("stopped by the error above", 1)


GO_ON = "the same command with --resume goes on from the last checkpoint"


def _end(message: str, status: int) -> int:
    """Say how a run ended; with several processes leave at once, as the others may wait for this one."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size == 1:
        print(f"dsv2.train: {message}", file=sys.stderr, flush=True)
        return status
    if rank == 0 or status not in (0, NON_FINITE):
        print(f"dsv2.train: process {rank} of {size}: {message}", file=sys.stderr, flush=True)
    leave(status)
    return status


def _run(options: dict[str, Any], command: list[str]) -> int:
    if "threads" in options:
        torch.set_num_threads(options["threads"])
    directory = RunDirectory(make_path(options.get("out", f"runs/{options.get('preset', 'tiny')}")))
    world = start_world(options.get("device"), options.get("expert_parallel", 1))
    minutes = options.get("minutes")
    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes must be greater than 0; got {minutes:g}")
    with _releasing(directory):
        if options.get("resume"):
            settings = directory.settings()
            model, config = _resumed_settings(settings, options)
            data, tokenizer = _load_data(settings["data"], world)
            if world.is_main:
                directory.lock()
                changes = {"training": config.to_dict(), "commands": settings["commands"] + [command]}
                directory.write_settings(settings | changes)
                _warn_of_threads(settings)
        else:
            if world.is_main:
                directory.require_empty()  # before the minute that finding text may take, not after
            data, tokenizer, described = _find_data(options, world)
            model = _model_config(options, tokenizer)
            config, minutes = _train_config(options, model, data, tokenizer, world)
            if world.is_main:
                directory.create(_settings(options, model, config, described, world, command))
        trainer = Trainer(
            model,
            config,
            data,
            out=directory,
            resume=bool(options.get("resume")),
            tokenizer=tokenizer,
            world=world,
        )
        _announce(trainer, options)
        run(trainer, display=options.get("display", "auto"), minutes=minutes, handle_signals=True)
        trainer.export(directory.model, options.get("export_dtype", "bfloat16"))
        if world.is_main:
            _conclude(trainer, options)
    world.barrier()
    if world.size > 1:
        leave(0)
    return 0


@contextlib.contextmanager
def _releasing(directory: RunDirectory) -> Iterator[None]:
    try:
        yield
    finally:
        directory.release()


# ----------------------------------------------------------------------------------------------- settings


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of `--set FIELD=VALUE`, with values read as JSON where they are, else as text."""
    changes = {}
    for entry in options.get("set", ()):
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {entry} must look like FIELD=VALUE, for example --set hidden_size=256")
        try:
            changes[name] = json.loads({"None": "null", "True": "true", "False": "false"}.get(value, value))
        except json.JSONDecodeError:
            changes[name] = value
    return changes


def _model_config(options: dict[str, Any], tokenizer: Tokenizer) -> DSV2Config:
    cfg = DSV2Config.preset(options.get("preset", "tiny"))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    size = {"vocab_size": max(cfg.vocab_size, tokenizer.vocab_size)}
    changes = ids | size | _changes(options)
    return cfg.with_router(options["router"], **changes) if "router" in options else cfg.replace(**changes)


def _train_fields(options: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return {name: value for name, value in options.items() if name in names}


def _train_config(
    options: dict[str, Any], model: DSV2Config, data: PackedDataset, tokenizer: Tokenizer, world: World
) -> tuple[TrainConfig, float | None]:
    """The settings of a new run, and after how many minutes it is to be stopped."""
    defaults = dict(PRESET_DEFAULTS[options.get("preset", "tiny")])
    preset_minutes = defaults.pop("minutes", None)
    given = _train_fields(options)
    fields = {"dtype": "bfloat16" if world.device.type == "cuda" else "float32", **defaults, **given}
    minutes = options.get("minutes")
    if "steps" in given:
        return TrainConfig(**fields), minutes
    if minutes is None and preset_minutes is None:
        return TrainConfig(**fields), None
    fields.pop("steps", None)
    return _fit_steps(fields, minutes or preset_minutes, model, data, tokenizer, world), None


def _fit_steps(
    fields: dict[str, Any],
    minutes: float,
    model: DSV2Config,
    data: PackedDataset,
    tokenizer: Tokenizer,
    world: World,
) -> TrainConfig:
    """The settings with as many steps as fit into `minutes`, from timing a few steps of a trial.

    A tenth is left for validation, samples, checkpoints and other work on the machine.
    """
    quiet = dict(validate_every=0, sample_every=0, save_every=0)
    config = TrainConfig(**(fields | quiet | {"steps": 10_000}))
    trial = Trainer(model, config, data, tokenizer=tokenizer, world=world)
    times = []
    for _ in range(UNTIMED_STEPS + TIMED_STEPS):
        before = trial.seconds
        trial.train_step()
        times.append(trial.seconds - before)
    seconds = world.broadcast(median(times[UNTIMED_STEPS:]))
    affordable = int(0.9 * minutes * 60 / seconds)
    if config.batch_ramp_to is not None:  # a sequence takes about as long in any batch

        def sequences(steps: int) -> int:
            return TrainConfig(**fields, steps=max(10, steps)).sequences_before(steps)

        affordable = bisect_right(range(affordable + 1), affordable * config.batch_size, key=sequences) - 1
    steps = max(10, affordable)
    if world.is_main:
        print(f"A step takes {seconds:.3g} s here: {steps:,} steps for {minutes:g} minutes.", flush=True)
    return TrainConfig(**fields, steps=steps)


def _settings(
    options: dict[str, Any],
    model: DSV2Config,
    config: TrainConfig,
    data: dict[str, Any],
    world: World,
    command: list[str],
) -> dict[str, Any]:
    return {
        "preset": options.get("preset", "tiny"),
        "model": model.to_dict(),
        "training": config.to_dict(),
        "data": data,
        "made_with": {
            "dsv2": dsv2.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": _device_name(world.device),
            "processes": world.size,
            "threads": torch.get_num_threads(),
        },
        "commands": [command],
    }


def _resumed_settings(settings: dict[str, Any], options: dict[str, Any]) -> tuple[DSV2Config, TrainConfig]:
    """A run's own settings with what was given now. Raises ValueError naming what would alter the run."""
    model, config = DSV2Config.from_dict(settings["model"]), TrainConfig(**settings["training"])
    given, refused = _train_fields(options), []
    if "preset" in options and options["preset"] != settings["preset"]:
        refused.append(("preset", settings["preset"], options["preset"]))
    if "router" in options and options["router"] != model.router:
        refused.append(("router", model.router, options["router"]))
    for name, value in _changes(options).items():
        if (
            name not in settings["model"]
            or getattr(model, name) != model.replace(**{name: value}).to_dict()[name]
        ):
            refused.append((name, settings["model"].get(name), value))
    for name in ("text", "domains", "tokenizer", "data"):
        if name in options and _data_option(name, options[name]) != settings["data"]["asked"].get(name):
            refused.append((name, settings["data"]["asked"].get(name), options[name]))
    for name, value in given.items():
        if value != getattr(config, name) and name not in FREE_SETTINGS | {"steps"}:
            refused.append((name, getattr(config, name), value))
    if refused:
        lines = [f"  - {name} was {before!r} and is now {now!r}" for name, before, now in refused]
        raise ValueError(
            "\n".join(
                ["these settings would alter the run that is being resumed:", *lines]
                + ["Leave them out to go on with it, or start a new run in another --out."]
            )
        )
    steps = given.get("steps", config.steps)
    if steps != config.steps and config.schedule != "constant" and not options.get("extend"):
        raise ValueError(
            f"--steps was {config.steps} and is now {steps}: the schedule {config.schedule!r} spans the "
            "whole run, so its learning rates would change; add --extend if that is what you want"
        )
    # Warm-up keeps its recorded length, so that the steps made so far are those of the longer run.
    return model, config.replace(**given)


def _warn_of_threads(settings: dict[str, Any]) -> None:
    before, now = settings["made_with"].get("threads"), torch.get_num_threads()
    if before != now:
        print(
            f"dsv2.train: the run began with {before} threads and now has {now}; sums are then rounded "
            f"differently on the CPU. --threads {before} makes the resumed run exact.",
            file=sys.stderr,
        )


# --------------------------------------------------------------------------------------------------- data


def _data_option(name: str, value: Any) -> Any:
    if name == "text":
        return [str(make_path(path)) for path in value]
    return str(make_path(value)) if name in ("tokenizer", "data") else list(value)


def _load_tokenizer(asked: dict[str, Any]) -> Tokenizer:
    return load_tokenizer(asked["tokenizer"]) if "tokenizer" in asked else ByteTokenizer()


def _prepared(asked: dict[str, Any], tokenizer: Tokenizer) -> PackedDataset:
    if "data" in asked:
        return PackedDataset(asked["data"])
    corpus = find_corpus(asked.get("domains"), asked.get("text", ()))
    return prepare(corpus, tokenizer)


def _find_data(options: dict[str, Any], world: World) -> tuple[PackedDataset, Tokenizer, dict[str, Any]]:
    """The data, its tokenizer, and what run.json says of them. The main process goes first and writes it."""
    asked = {
        name: _data_option(name, options[name])
        for name in ("text", "domains", "tokenizer", "data")
        if name in options
    }
    tokenizer = _load_tokenizer(asked)
    directory = str(_prepared(asked, tokenizer).directory.resolve()) if world.is_main else None
    data = PackedDataset(world.broadcast(directory))
    _require_tokenizer(data, tokenizer)
    described = {
        "asked": asked,
        "directory": str(data.directory),
        "fingerprint": data.manifest["fingerprint"],
        "domains": data.manifest["splits"]["train"]["domains"],
    }
    return data, tokenizer, described


def _load_data(recorded: dict[str, Any], world: World) -> tuple[PackedDataset, Tokenizer]:
    """The data of a run that is resumed: the same bytes, found again or made again."""
    tokenizer = _load_tokenizer(recorded["asked"])
    directory = None
    if world.is_main:
        try:
            data = PackedDataset(recorded["directory"])
        except PackedDataError:
            data = _prepared(recorded["asked"], tokenizer)
        if data.manifest["fingerprint"] != recorded["fingerprint"]:
            raise ValueError(
                f"the text of this run is no longer there: {recorded['directory']} is missing or different, "
                "and the text found now is not the same (were packages installed or files changed?). Bring "
                "that folder back, or start a new run"
            )
        directory = str(data.directory)
    return PackedDataset(world.broadcast(directory)), tokenizer


def _require_tokenizer(data: PackedDataset, tokenizer: Tokenizer) -> None:
    packed, given = data.manifest["tokenizer"]["kind"], tokenizer.describe()["kind"]
    if packed != given or data.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"{data.directory} was packed with the tokenizer {packed!r} ({data.vocab_size} tokens), and this "
            f"run has {given!r} ({tokenizer.vocab_size}); give the one it was packed with by --tokenizer"
        )


# -------------------------------------------------------------------------------------- before and after


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _announce(trainer: Trainer, options: dict[str, Any]) -> None:
    if not trainer.world.is_main:
        return
    with torch.device("meta"):
        described = type(trainer.model)(trainer.model_config)
    config, world = trainer.config, trainer.world
    where = _device_name(world.device)
    where += f", {world.size} processes" if world.size > 1 else f", {torch.get_num_threads()} threads"
    begin = f"Going on from step {trainer.step}" if trainer.step else "Training"
    print(
        f"{begin}: {described.num_parameters():,} parameters, {described.num_parameters(True):,} per token; "
        f"{config.steps:,} steps of {_sizes(config)} x {config.seq_len} = "
        f"{config.tokens_before(config.steps):,} tokens ({config.schedule}, lr {config.lr:g}, "
        f"{config.dtype}); {where}; {trainer.directory.path}",
        flush=True,
    )


def _sizes(config: TrainConfig) -> str:
    if config.batch_ramp_to is None:
        return str(config.batch_size)
    return f"{config.batch_size} to {config.largest_batch}"


def _conclude(trainer: Trainer, options: dict[str, Any]) -> None:
    """Print where the model is, its last validation loss beside the 3-gram's, and its last samples."""
    directory = trainer.directory
    for sample in trainer.samples() if trainer.world.size == 1 else ():
        print(f"[{sample['domain']}] {sample['prompt']!r} -> {sample['text']!r}")
    last = next((line for line in reversed(read_lines(directory.metrics)) if "val_loss" in line), None)
    if last is not None:
        print(f"step {last['step']}: {describe_validation(last)}")
        wanted = options.get("ngram_baseline", isinstance(trainer.tokenizer, ByteTokenizer))
        if wanted and isinstance(trainer.data, PackedDataset):
            baseline = _ngram_baseline(trainer)
            print(
                f"model {last['val_nats_per_byte']:.3f} nats per byte, "
                f"3-gram {baseline['nats_per_byte']:.3f}, on the same windows"
            )
    print(
        f"The model is in {directory.model}; python -m dsv2.generate --model {directory.model} lets it write."
    )


def _ngram_baseline(trainer: Trainer) -> dict[str, Any]:
    """A 3-gram model of the training text on the validation windows; kept in the run's folder."""
    file = trainer.directory.path / "ngram.json"
    config = trainer.config
    asked = {"seq_len": config.seq_len, "windows": config.validation_windows}
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept.get("asked") == asked:
            return kept
    rows = ngram_baselines(trainer.data, (3,), config.seq_len, config.validation_windows)
    replace_file(file, json.dumps({"asked": asked, **rows[0]}, indent=1) + "\n")
    return rows[0]
