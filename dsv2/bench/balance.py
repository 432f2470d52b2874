"""Small models alike but for their balance losses: how experts are loaded over a run, and what it is worth.

Chapter 08's stored runs, `data/runs/balance.json`. Everything is seeded, so that the same text, versions and
number of threads give the same numbers again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv2.bench.measure import provenance
from dsv2.config import DSV2Config
from dsv2.data import PackedDataset, find_corpus, prepare
from dsv2.data.packing import Batch
from dsv2.model import DeepSeekV2
from dsv2.moe import drop_tokens
from dsv2.moe.balance import device_reach
from dsv2.train import TrainConfig, Trainer

OUT = Path(__file__).resolve().parents[2] / "data" / "runs" / "balance.json"

# alpha_1, alpha_2, alpha_3 of equations 23, 26 and 29; the paper's values are in its section 3.1.2.
CONDITIONS: dict[str, tuple[float, float, float]] = {
    "none": (0.0, 0.0, 0.0),
    "expert": (0.003, 0.0, 0.0),
    "device": (0.0, 0.05, 0.0),
    "communication": (0.0, 0.0, 0.02),
    "all three": (0.003, 0.05, 0.02),
}

# 32 experts on 8 devices of 4, of which a token gets 4 on at most 3 devices; the first layer is dense.
MODEL = DSV2Config.preset("tiny").replace(
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=32,
    n_shared_experts=1,
    num_experts_per_tok=4,
    moe_intermediate_size=32,
    n_group=8,
    topk_group=3,
)
TRAINING = TrainConfig(
    steps=500, batch_size=16, seq_len=128, lr=2e-3, validate_every=0, sample_every=0, save_every=0
)
COUNTED_WINDOWS, VALIDATION_WINDOWS = 64, 256


def with_alphas(cfg: DSV2Config, alphas: Sequence[float]) -> DSV2Config:
    """`cfg` with the expert, device and communication loss at these alphas."""
    names = ("aux_loss_alpha", "device_loss_alpha", "communication_loss_alpha")
    return cfg.replace(**dict(zip(names, map(float, alphas), strict=True)))


def train_and_count(
    cfg: DSV2Config, config: TrainConfig, data: PackedDataset, windows: Batch, every: int
) -> tuple[dict[str, Any], Trainer]:
    """Train, and every so many steps count who is chosen for the tokens of `windows`; also before the first.

    Returns steps; loads: for each of them, by layer and expert, how many tokens chose it; losses: of the
    training batch, one a step; and the trainer, with the trained model.
    """
    trainer = Trainer(cfg, config, data, validation=windows)
    found: dict[str, Any] = {"steps": [0], "loads": [count_choices(trainer.model, windows)], "losses": []}
    for metrics in trainer:
        found["losses"].append(round(metrics["loss"], 4))
        if trainer.step % every == 0 or trainer.done:
            found["steps"].append(trainer.step)
            found["loads"].append(count_choices(trainer.model, windows))
    return found, trainer


@torch.no_grad()
def count_choices(model: DeepSeekV2, windows: Batch) -> list[list[int]]:
    """By layer of experts and expert: how many of the windows' tokens chose it."""
    was_training = model.training
    routings = model.eval()(windows.tokens).routings
    model.train(was_training)
    return [routing.load().tolist() for routing in routings]


@torch.no_grad()
def count_devices(model: DeepSeekV2, windows: Batch) -> dict[str, list[Any]]:
    """By layer: the tokens that each device receives, and the share of pairs dropped at a capacity of 1."""
    cfg, found = model.cfg, {"received": [], "dropped": []}
    for routing in model.eval()(windows.tokens).routings:
        ids = routing.expert_ids
        reach = device_reach(ids, cfg.n_routed_experts, cfg.n_group, cfg.topk_group)
        tokens = reach.mean(dim=0) * ids.shape[0] * ids.shape[1] * cfg.topk_group / cfg.n_group
        found["received"].append(tokens.round().int().tolist())
        found["dropped"].append(round(1 - float(drop_tokens(routing, cfg.n_group).float().mean()), 4))
    return found


def measure(name: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: under the losses called `name`, from a seed."""
    torch.set_num_threads(1)  # a run's numbers do not depend on how many run beside it
    data = prepare(find_corpus(progress=False))
    config = TRAINING.replace(steps=steps, seed=seed)
    windows = data.validation.validation_windows(config.seq_len, COUNTED_WINDOWS)
    began = time.perf_counter()
    found, trainer = train_and_count(
        with_alphas(MODEL, CONDITIONS[name]), config, data, windows, every=max(1, steps // 20)
    )
    seconds = time.perf_counter() - began
    trainer.validation = data.validation.validation_windows(config.seq_len, VALIDATION_WINDOWS)
    validation = {key: value for key, value in trainer.validate().items() if key.startswith("val_")}
    found["losses"] = found["losses"][:: max(1, steps // 100)]
    found |= count_devices(trainer.model, windows) | validation
    return {"name": name, "seed": seed, **found, "seconds": round(seconds, 1)}


def _measure(task: tuple[str, int, int]) -> dict[str, Any]:
    return measure(*task)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.bench balance", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--steps", type=int, default=TRAINING.steps, help=f"(default: {TRAINING.steps})")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--out", type=Path, default=OUT, help="(default: data/runs/balance.json)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = prepare(find_corpus())
    tasks = [(name, seed, options.steps) for seed in range(options.seeds) for name in CONDITIONS]
    runs = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for run in pool.imap(_measure, tasks):
            runs.append(run)
            print(summary(run), flush=True)
    stored = {
        "what": "Runs alike but for the factors of the balance losses. loads: by step, layer and expert, how "
        f"many of the {COUNTED_WINDOWS * TRAINING.seq_len:,} tokens of {COUNTED_WINDOWS} validation windows "
        "chose it; received: at the end, by layer and device, how many of them are sent there; dropped: the "
        "share of pairs over the budget at a capacity factor of 1, by layer; val_*: on "
        f"{VALIDATION_WINDOWS} windows at the end.",
        **provenance(),
        "corpus_fingerprint": data.manifest["fingerprint"],
        "alphas": CONDITIONS,
        "model": MODEL.to_dict(),
        "training": TRAINING.replace(steps=options.steps).to_dict(),
        "runs": runs,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(stored, separators=(",", ":")) + "\n", encoding="utf-8")
    print(options.out)
    return 0


def summary(run: dict[str, Any]) -> str:
    """A line on how a run ended."""
    share = torch.tensor(run["loads"][-1], dtype=torch.float32)
    share = share / share.mean(dim=1, keepdim=True)
    return (
        f"{run['name']:13} seed {run['seed']}: {run['val_nats_per_byte']:.4f} nats per byte, "
        f"{int((share < 0.1).sum()):2} of {share.numel()} experts below a tenth of the fair share, "
        f"least {share.min():.2f}, most {share.max():.1f}; {run['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
