"""Small models alike but for how they are trained: schedule, batch ramp, balance losses. Loss, and how much
experts prefer kinds of text, over the tokens seen. Chapter 10's stored runs, `data/runs/pretraining.json`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dsv2.bench import balance, runs, text
from dsv2.bench.measure import provenance, write_report
from dsv2.config import DSV2Config
from dsv2.data import PackedDataset
from dsv2.data.packing import PackedDataError
from dsv2.evaluate import domain_windows, nats_by_domain, read, specialisation
from dsv2.train import TrainConfig, Trainer

OUT = runs.DATA / "pretraining.json"
PER_DOMAIN, LOOKS, POINTS, SHUFFLES = 32, 12, 120, 200

# The model of chapter 08's runs with half its experts: 16 on 4 devices, 4 a token on at most 2.
MODEL = balance.with_alphas(
    balance.MODEL.replace(n_routed_experts=16, n_group=4, topk_group=2), balance.CONDITIONS["all three"]
)
TRAINING = TrainConfig(
    steps=500, batch_size=16, seq_len=128, lr=2e-3, validate_every=0, sample_every=0, save_every=0
)
RAMP = {"batch_size": 4, "batch_ramp_to": 16, "batch_ramp_tokens": 300_000}  # of 1,024,000 tokens


@dataclass(frozen=True)
class Kind:
    """What one kind of run changes in the model and in the training of the others."""

    model: DSV2Config
    training: TrainConfig


def with_ramp(training: TrainConfig) -> TrainConfig:
    """The same tokens, give or take a batch, with a batch that starts at a quarter and grows."""
    tokens = training.tokens_before(training.steps)
    ramp = dict(RAMP, batch_ramp_tokens=round(tokens * RAMP["batch_ramp_tokens"] / 1_024_000))
    longest = training.replace(steps=4 * training.steps, **ramp)
    steps = next(n for n in range(1, longest.steps) if longest.tokens_before(n) >= tokens)
    return training.replace(steps=steps, **ramp)


def kinds(training: TrainConfig = TRAINING) -> dict[str, Kind]:
    """The kinds of run by name; all read equally many tokens."""
    return {
        "paper's steps": Kind(MODEL, training),
        "constant": Kind(MODEL, training.replace(schedule="constant")),
        "cosine": Kind(MODEL, training.replace(schedule="cosine")),
        "batch ramp": Kind(MODEL, with_ramp(training)),
        "no balance losses": Kind(balance.with_alphas(MODEL, (0.0, 0.0, 0.0)), training),
    }


def measure(kind: Kind, data: PackedDataset) -> dict[str, Any]:
    """One run: rows of tokens, lr, loss and norm; validation loss and information at each of `looks`."""
    windows = domain_windows(data.validation, kind.training.seq_len, PER_DOMAIN)
    names, experts = data.domain_names, kind.model.n_routed_experts
    trainer = Trainer(kind.model, kind.training, data, validation=windows)
    began = time.perf_counter()
    found: dict[str, Any] = {"looks": [], "val_curve": [], "information": [], "rows": []}
    last: list[Any] = []

    def look() -> None:
        reading = read(trainer.computing_model, windows)
        last[:] = [
            specialisation(ids, windows.domains, len(names), experts, shuffles=SHUFFLES)
            for ids in reading.expert_ids
        ]
        found["looks"].append(trainer.tokens)
        found["val_curve"].append(round(float(reading.nats.mean()), 4))
        found["information"].append([round(layer.information, 6) for layer in last])
        found["domains"] = {
            name: round(nats, 4)
            for name, nats in nats_by_domain(reading.nats, windows.targets, windows.domains, names).items()
        }

    look()
    whole = kind.training.tokens_before(kind.training.steps)
    due = [whole * n // LOOKS for n in range(1, LOOKS)]
    every = max(1, kind.training.steps // POINTS)
    for metrics in trainer:
        if trainer.step % every == 0 or trainer.step == 1 or trainer.done:
            row = [metrics["tokens"], metrics["lr"], metrics["loss"], metrics["grad_norm"]]
            found["rows"].append([float(f"{value:.5g}") for value in row[1:]])
            found["rows"][-1].insert(0, row[0])
        if (due and trainer.tokens >= due[0]) or trainer.done:
            due = due[1:]
            look()
    found["layers"] = [layer.to_dict() for layer in last]
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def _measure(task: tuple[str, Kind, Path]) -> dict[str, Any]:
    name, kind, directory = task
    torch.set_num_threads(1)  # a run's numbers do not depend on how many run beside it
    return {"name": name, "seed": kind.training.seed, **measure(kind, PackedDataset(directory))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every kind from every seed and write one JSON."""
    parser = argparse.ArgumentParser(prog="python -m dsv2.bench pretraining", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--steps", type=int, default=TRAINING.steps, help=f"(default: {TRAINING.steps})")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--only", nargs="+", choices=list(kinds()), metavar="KIND")
    text.add_option(parser)
    parser.add_argument(
        "--out", type=Path, default=OUT, help=f"(default: {OUT.relative_to(runs.DATA.parents[1])})"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        data = text.open_text(options.data)
    except PackedDataError as error:
        parser.error(f"--data: {error}")
    chosen = {name: kind for name, kind in kinds(TRAINING.replace(steps=options.steps)).items()}
    chosen = {name: chosen[name] for name in options.only or chosen}
    stored = {
        "what": "Runs alike but for how they are trained. rows: tokens seen, learning rate, training loss in "
        "nats per token and the gradient's norm before clipping, of some steps. At each of looks, in tokens, "
        f"on {PER_DOMAIN} validation windows of every domain: val_curve, nats per token; information, nats "
        "between expert and domain, by layer. At the end: domains, nats per byte; layers, counts by domain "
        "and expert and what shuffled windows show.",
        **provenance(),
        "corpus_fingerprint": data.manifest["fingerprint"],
        "domains": data.domain_names,
        "kinds": {
            name: {"model": kind.model.to_dict(), "training": kind.training.to_dict()}
            for name, kind in chosen.items()
        },
    }
    tasks = [
        (name, Kind(kind.model, kind.training.replace(seed=seed)), data.directory)
        for seed in range(options.seeds)
        for name, kind in chosen.items()
    ]
    order = {(name, kind.training.seed): place for place, (name, kind, _) in enumerate(tasks)}
    done: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for run in tqdm(pool.imap_unordered(_measure, tasks), total=len(tasks), unit="run", disable=None):
            done.append(run)
            done.sort(key=lambda run: order[run["name"], run["seed"]])
            tqdm.write(
                f"{run['name']:18} seed {run['seed']}: {run['val_curve'][-1]:.4f} nats per token, "
                f"information {' '.join(f'{value:.4f}' for value in run['information'][-1])}; "
                f"{run['seconds']:.0f} s"
            )
            write_report(options.out, {**stored, "runs": done}, compact=True)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
