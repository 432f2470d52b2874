"""Small models that learn to find needles in short texts, and are then extended to texts eight times as long.

Chapter 11's stored runs, `data/runs/context.json`. Each model is trained once, at one length. Its rotary
embedding is then left as it is, interpolated, or stretched by YaRN as in DeepSeek-V2's section 3.1.4; needles
are looked for at every depth of texts up to eight times the trained length, at once and after a short
fine-tuning. Fine-tuning is the same for all three.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dsv2.bench.measure import provenance, write_report
from dsv2.bench.runs import DATA
from dsv2.config import DSV2Config, LinearScaling, YarnScaling
from dsv2.data.needle import IGNORED, TASK, needle_batch
from dsv2.evaluate.needle import needle_grid
from dsv2.hf import save_pretrained
from dsv2.model import DeepSeekV2


@dataclass(frozen=True)
class Training:
    """AdamW on `needle_batch`: texts of shortest to longest tokens, `questions` at the end of each."""

    steps: int
    batch: int
    shortest: int
    longest: int
    lr: float
    questions: int


@dataclass(frozen=True)
class Setting:
    """A model, how it is trained and tuned, how far it is stretched, and where needles are looked for.

    looks: steps of the tuning at which needles are looked for in the longest texts, at all depths.
    """

    model: DSV2Config
    training: Training
    tuning: Training
    factor: float
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    looks: tuple[int, ...]

    @property
    def scalings(self) -> dict[str, LinearScaling | YarnScaling | None]:
        """The three ways to go on: alpha, beta and the temperature's constant are DeepSeek-V2's."""
        return {
            "RoPE": None,
            "interpolation": LinearScaling(self.factor),
            "YaRN": YarnScaling(self.factor, self.training.longest),
        }


# 64 tokens, s = 10, tuned at 4 times 64, tested to 8 times. DeepSeek-V2: 4K, s = 40, 8 times, 32 times.
SMALL = Setting(
    model=DSV2Config(
        vocab_size=TASK.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.06,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=0,
    ),
    training=Training(steps=1600, batch=64, shortest=16, longest=64, lr=2e-3, questions=2),
    tuning=Training(steps=150, batch=16, shortest=256, longest=256, lr=1e-3, questions=8),
    factor=10.0,
    lengths=(32, 64, 128, 256, 512),
    depths=tuple((2 * tenth + 1) / 20 for tenth in range(10)),
    samples=50,
    looks=(0, 10, 20, 40, 80, 150),
)
# For a GPU: more layers, of which all but the first hold experts; trained at 256, tested to 2,048.
LARGE = Setting(
    model=SMALL.model.replace(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=512,
        max_position_embeddings=256,
        initializer_range=0.03,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        aux_loss_alpha=0.003,
    ),
    training=Training(steps=2500, batch=128, shortest=16, longest=256, lr=1e-3, questions=2),
    tuning=Training(steps=200, batch=32, shortest=1024, longest=1024, lr=5e-4, questions=8),
    factor=10.0,
    lengths=(128, 256, 512, 1024, 2048),
    depths=SMALL.depths,
    samples=100,
    looks=(0, 10, 20, 50, 100, 200),
)


def train_on_needles(
    model: DeepSeekV2,
    training: Training,
    *,
    seed: int = 0,
    look: Callable[[int], None] | None = None,
    progress: bool = False,
) -> list[float]:
    """Train the model in place; returns the losses in nats per answer. look(step) is called before each step.

    The loss is on answers alone, and the rate rises over the first steps and falls to 0 at the end. The texts
    of a step depend on the seed only, so models that are tuned with one seed read the same.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, min(50, training.steps // 10))
    losses: list[float] = []
    model.train()
    for step in tqdm(range(training.steps), unit="step", disable=None if progress else True):
        if look is not None:
            look(step)
        rate = training.lr * min(1.0, (step + 1) / warm) * (1 - step / training.steps) ** 0.5
        for group in optimizer.param_groups:
            group["lr"] = rate
        spread = training.longest - training.shortest + 1
        length = training.shortest + int(torch.rand((), generator=generator) * spread)
        tokens, targets = needle_batch(
            training.batch, length, questions=training.questions, generator=generator
        )
        out = model(tokens.to(device))
        loss = torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        (loss + out.balance_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    if look is not None:
        look(training.steps)
    return losses


def extended(model: DeepSeekV2, scaling: LinearScaling | YarnScaling | None) -> DeepSeekV2:
    """The same weights with another scaling of the rotary embedding: nothing is learned by it."""
    device = next(model.parameters()).device
    longer = DeepSeekV2(model.cfg.replace(rope_scaling=scaling)).to(device)
    longer.load_state_dict(model.state_dict())
    return longer


def measure(setting: Setting, seed: int, save: Path | None = None) -> dict[str, Any]:
    """One seed: train, extend in three ways, look for needles, tune, look again. save: a folder for it."""
    torch.set_num_threads(1)  # a run's numbers do not depend on how many run beside it
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # products in TF32
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = DeepSeekV2(setting.model).to(device)
    losses = train_on_needles(model, setting.training, seed=seed)
    if save is not None:
        save_pretrained(model, save)
    where = {"samples": setting.samples, "seed": 1000 + seed, "progress": False}
    run: dict[str, Any] = {"seed": seed, "losses": _thin(losses), "before": {}, "after": {}, "tuning": {}}
    for name, scaling in setting.scalings.items():
        longer = extended(model, scaling)
        curve: list[list[float]] = []
        run["before"][name] = needle_grid(longer, setting.lengths, setting.depths, **where)["found"]
        losses = train_on_needles(
            longer, setting.tuning, seed=5000 + seed, look=partial(_look, longer, setting, seed, curve)
        )
        run["after"][name] = needle_grid(longer, setting.lengths, setting.depths, **where)["found"]
        run["tuning"][name] = {"found": curve, "losses": [round(loss, 4) for loss in losses]}
    return {**run, "seconds": round(time.perf_counter() - began, 1)}


def _look(model: DeepSeekV2, setting: Setting, seed: int, curve: list[list[float]], step: int) -> None:
    """Add [step, share found in the longest texts over all depths] to `curve`, at the setting's looks."""
    if step in setting.looks:
        samples = max(1, setting.samples // 2)
        found = needle_grid(
            model, setting.lengths[-1:], setting.depths, samples=samples, seed=2000 + seed, progress=False
        )["found"][0]
        curve.append([step, round(sum(found) / (len(found) * samples), 4)])


def _thin(losses: Sequence[float], points: int = 100) -> list[list[float]]:
    """[step, loss] at about `points` steps, the mean of those since the one before."""
    every = max(1, len(losses) // points)
    return [
        [end, round(sum(losses[end - every : end]) / every, 4)]
        for end in range(every, len(losses) + 1, every)
    ]


def summary(run: dict[str, Any], setting: Setting) -> str:
    """A line on what a run found in the longest texts, over all depths."""
    cells = len(setting.depths) * setting.samples
    said = [
        f"{name} {sum(run['before'][name][-1]) / cells:.1%}, tuned {sum(run['after'][name][-1]) / cells:.1%}"
        for name in setting.scalings
    ]
    return f"seed {run['seed']}: {'; '.join(said)}; {run['seconds']:.0f} s"


def _measure(task: tuple[Setting, int, Path | None]) -> dict[str, Any]:
    return measure(*task)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.bench context", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=4, help="models that are trained (default: 4)")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--steps", type=int, help="of the training (default: the setting's)")
    parser.add_argument("--large", action="store_true", help="a larger model and longer texts, for a GPU")
    parser.add_argument(
        "--out",
        type=Path,
        help="seeds that it holds are not repeated (default: data/runs/context.json, or context_large.json)",
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="DIR",
        help="where the trained model of seed 0 is stored (default: nowhere)",
    )
    options = parser.parse_args(arguments)
    setting = LARGE if options.large else SMALL
    if options.steps is not None:
        training = dataclasses.replace(setting.training, steps=options.steps)
        setting = dataclasses.replace(setting, training=training)
    out = options.out or DATA / ("context_large.json" if options.large else "context.json")
    stored = {
        "what": "Models trained on needle_batch at one length, then extended. before, after: needles found "
        "by [length][depth], of `samples` prompts a cell, at once and after tuning; tuning: found "
        f"at {setting.lengths[-1]} tokens over all depths by step, from half as many other prompts, and "
        "losses; losses: of the training.",
        **provenance(),
        "setting": {**dataclasses.asdict(setting), "model": setting.model.to_dict()},
    }
    done = earlier_runs(out, stored, options.seeds)
    missing = [seed for seed in range(options.seeds) if seed not in done]
    tasks = [(setting, seed, options.save if seed == 0 else None) for seed in missing]
    torch.set_num_threads(1)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for run in tqdm(pool.imap_unordered(_measure, tasks), total=len(tasks), unit="run", disable=None):
            done[run["seed"]] = run
            tqdm.write(summary(run, setting))
            report = {**stored, "runs": [done[seed] for seed in sorted(done)]}
            write_report(out, report, compact=True)
    print(out)
    return 0


def earlier_runs(path: Path, stored: dict[str, Any], seeds: int) -> dict[int, dict[str, Any]]:
    """Runs, by seed, that `path` holds already: of the same setting, device and versions only."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        here = json.loads(json.dumps(stored))  # tuples become lists
        if any(found[key] != here[key] for key in ("device", "versions", "setting")):
            return {}
        return {run["seed"]: run for run in found["runs"] if run["seed"] < seeds}
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        return {}


def load(path: Path = DATA / "context.json") -> dict[str, Any]:
    """The stored runs."""
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
