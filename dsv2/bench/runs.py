"""Small models alike but for one thing, trained from several seeds: the stored runs of chapters 06 to 08.

A `Study` says what differs; `main` trains every variant from every seed, several at a time, and writes one
JSON. Everything is seeded: on a CPU the same text, versions and number of threads give the same numbers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dsv2.bench import text
from dsv2.bench.measure import provenance, write_report
from dsv2.config import DSV2Config
from dsv2.data import PackedDataset
from dsv2.data.packing import Batch, PackedDataError
from dsv2.model import DeepSeekV2
from dsv2.moe import drop_tokens
from dsv2.moe.balance import device_reach
from dsv2.train import TrainConfig, Trainer

DATA = Path(__file__).resolve().parents[2] / "data" / "runs"
COUNTED_WINDOWS, VALIDATION_WINDOWS = 64, 256
POINTS = 20  # how often a run is looked at, besides its start


@dataclass(frozen=True)
class Study:
    """Models that are trained alike. name: of the command; about: what differs between them."""

    name: str
    about: str
    models: Mapping[str, DSV2Config]
    training: TrainConfig

    @property
    def out(self) -> Path:
        return DATA / f"{self.name.replace('-', '_')}.json"


# ------------------------------------------------------------------------------------------------- one run


def train_and_count(
    cfg: DSV2Config, config: TrainConfig, data: PackedDataset, windows: Batch, every: int
) -> tuple[dict[str, Any], Trainer]:
    """Train, and every so many steps look at what the model does with `windows`; also before the first.

    Returns steps; for each of them loads, by layer and expert, how many tokens chose it, and val_curve, step
    and nats per byte; losses: of the training batch, one a step; and the trainer, with the trained model.
    """
    trainer = Trainer(cfg, config, data, validation=windows)
    found: dict[str, Any] = {"steps": [], "loads": [], "val_curve": [], "losses": []}

    def look() -> None:
        found["steps"].append(trainer.step)
        found["loads"].append(count_choices(trainer.computing_model, windows))
        found["val_curve"].append([trainer.step, round(trainer.validate()["val_nats_per_byte"], 4)])

    look()
    for metrics in trainer:
        found["losses"].append(round(metrics["loss"], 4))
        if trainer.step % every == 0 or trainer.done:
            look()
    return found, trainer


@torch.no_grad()
def look_at_routing(model: DeepSeekV2, windows: Batch) -> list[Any]:
    """What each layer of experts chooses for the windows, in evaluation: a Routing a layer."""
    was_training = model.training
    device = next(model.parameters()).device
    routings = model.eval()(windows.tokens.to(device)).routings
    model.train(was_training)
    return routings


def count_choices(model: DeepSeekV2, windows: Batch) -> list[list[int]]:
    """By layer of experts and expert: how many of the windows' tokens chose it."""
    return [routing.load().tolist() for routing in look_at_routing(model, windows)]


def count_devices(model: DeepSeekV2, windows: Batch) -> dict[str, list[Any]]:
    """By layer: the tokens that each device receives, and the share of pairs dropped at a capacity of 1."""
    cfg, found = model.cfg, {"received": [], "dropped": []}
    for routing in look_at_routing(model, windows):
        ids = routing.expert_ids
        reach = device_reach(ids, cfg.n_routed_experts, cfg.n_group, cfg.topk_group)
        tokens = reach.mean(dim=0) * ids.shape[0] * ids.shape[1] * cfg.topk_group / cfg.n_group
        found["received"].append(tokens.round().int().tolist())
        found["dropped"].append(round(1 - float(drop_tokens(routing, cfg.n_group).float().mean()), 4))
    return found


def measure(cfg: DSV2Config, config: TrainConfig, directory: Path) -> dict[str, Any]:
    """One run on packed text: what `train_and_count` finds, and a longer look at the end."""
    torch.set_num_threads(1)  # a run's numbers do not depend on how many run beside it
    data = PackedDataset(directory)
    windows = data.validation.validation_windows(config.seq_len, COUNTED_WINDOWS)
    began = time.perf_counter()
    found, trainer = train_and_count(cfg, config, data, windows, every=max(1, config.steps // POINTS))
    seconds = time.perf_counter() - began
    found["losses"] = found["losses"][:: max(1, config.steps // 100)]
    if cfg.n_group > 1:
        found |= count_devices(trainer.computing_model, windows)
    trainer.validation = data.validation.validation_windows(config.seq_len, VALIDATION_WINDOWS)
    found |= {key: value for key, value in trainer.validate().items() if key.startswith("val_")}
    return {**found, "seconds": round(seconds, 1)}


def _measure(task: tuple[str, DSV2Config, TrainConfig, Path]) -> dict[str, Any]:
    name, cfg, config, directory = task
    return {"name": name, "seed": config.seed, **measure(cfg, config, directory)}


# ------------------------------------------------------------------------------------------------ all runs


def main(
    study: Study, description: str, arguments: Sequence[str] | None, large: Study | None = None, **more: Any
) -> int:
    """The command line of a study, and of the one that --large chooses; `more` is stored too."""
    if large is not None:
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--large", action="store_true")
        chosen, arguments = parser.parse_known_args(arguments)
        study = large if chosen.large else study
    parser = argparse.ArgumentParser(prog=f"python -m dsv2.bench {study.name}", description=description)
    parser.add_argument("--seeds", type=int, default=4, help="runs of each kind (default: 4)")
    parser.add_argument(
        "--steps", type=int, default=study.training.steps, help=f"(default: {study.training.steps})"
    )
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument(
        "--only", nargs="+", choices=study.models, metavar="KIND", help=f"of {', '.join(study.models)}"
    )
    if large is not None:  # taken above; here for --help
        parser.add_argument("--large", action="store_true", help="larger models and longer runs, for a GPU")
    text.add_option(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=study.out,
        help="runs of the same kind that it holds are not repeated "
        f"(default: {study.out.relative_to(DATA.parents[1])})",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        data = text.open_text(options.data)
    except PackedDataError as error:
        parser.error(f"--data: {error}")
    training = study.training.replace(steps=options.steps)
    kinds = options.only or list(study.models)
    stored = {
        "what": f"Runs alike but for {study.about}. At each of steps, on {COUNTED_WINDOWS} validation "
        f"windows of {training.seq_len} tokens: loads, by layer and expert, how many tokens chose it; "
        "val_curve, step and nats per byte. At the end: received, by layer and device, how many of these "
        "tokens are sent there; dropped, the share of pairs over the budget at a capacity factor of 1, by "
        f"layer; val_*, on {VALIDATION_WINDOWS} windows.",
        **provenance(),
        "corpus_fingerprint": data.manifest["fingerprint"],
        **more,
        "models": {name: study.models[name].to_dict() for name in kinds},
        "training": training.to_dict(),
    }
    wanted = [(name, seed) for seed in range(options.seeds) for name in kinds]
    done = {key: run for key, run in earlier_runs(options.out, stored).items() if key in wanted}
    if done:
        print(f"{len(done)} of {len(wanted)} runs are in {options.out} already")
    missing = [key for key in wanted if key not in done]
    tasks = [
        (name, study.models[name], training.replace(seed=seed), data.directory) for name, seed in missing
    ]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for run in tqdm(pool.imap_unordered(_measure, tasks), total=len(tasks), unit="run", disable=None):
            done[run["name"], run["seed"]] = run
            tqdm.write(summary(run))
            report = {**stored, "runs": [done[key] for key in wanted if key in done]}
            write_report(options.out, report, compact=True)
    print(options.out)
    return 0


def earlier_runs(path: Path, stored: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Runs, by name and seed, that a study which was stopped has left in `path`: of the same kind only."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if any(found[key] != stored[key] for key in ("device", "versions", "corpus_fingerprint", "training")):
            return {}
        models = stored["models"]
        return {
            (run["name"], run["seed"]): run
            for run in found["runs"]
            if run["name"] in models and found["models"][run["name"]] == models[run["name"]]
        }
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        return {}


def summary(run: dict[str, Any]) -> str:
    """A line on how a run ended."""
    line = f"{run['name']:20} seed {run['seed']}: {run['val_nats_per_byte']:.4f} nats per byte"
    if run["loads"][-1]:
        share = torch.tensor(run["loads"][-1], dtype=torch.float32)
        share = share / share.mean(dim=1, keepdim=True)
        line += (
            f", {int((share < 0.1).sum()):3} of {share.numel()} experts below a tenth of the fair share, "
            f"least {share.min():.2f}, most {share.max():.1f}"
        )
    return f"{line}; {run['seconds']:.0f} s"
