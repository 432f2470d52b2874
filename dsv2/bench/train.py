"""Pretraining on this machine: tokens a second beside transformers in a plain loop, and a run to the end.

Both train the same model from the same weights on the same batches, one after the other in short turns. The
plain loop is given the faster of float32 weights under autocast and bf16 weights, with transformers' fastest
implementation of the experts. Then the model is trained for some minutes, and its losses kept.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dsv2.accounting import training_flops_per_token
from dsv2.bench import text
from dsv2.bench.decode import default_file
from dsv2.bench.measure import (
    find_transformers,
    free_memory,
    product_rate,
    provenance,
    seconds,
    time_pairs,
    write_report,
)
from dsv2.bench.model import IMPLEMENTATIONS
from dsv2.config import PRESETS, DSV2Config
from dsv2.data import PackedDataError, PackedDataset
from dsv2.hf import save_pretrained
from dsv2.model import DeepSeekV2
from dsv2.train import TrainConfig, Trainer, start_world

# Of the losses of the first step, in nats: bf16 rounds every product to three digits, float32 to seven.
LARGEST_DIFFERENCE = {"bfloat16": 2e-2, "float32": 1e-4}
VALIDATIONS, POINTS = 10, 200


@dataclass(frozen=True)
class Sizes:
    """steps: in one turn of a pair."""

    model: DSV2Config
    batch_size: int
    seq_len: int
    steps: int
    pairs: int


# ------------------------------------------------------------------------------------------- the plain loop


class PlainLoop:
    """transformers' DeepSeek-V2 trained as its users would: forward, backward, clip, AdamW."""

    def __init__(self, folder: Path, device: torch.device, weights: str, experts: str, config: TrainConfig):
        from transformers import DeepseekV2ForCausalLM

        self.device, self.clip = device, config.clip
        self.autocast = contextlib.nullcontext()
        if weights == "autocast":
            self.autocast = torch.autocast(device.type, torch.bfloat16)
        dtype = torch.bfloat16 if weights == "bf16 weights" else torch.float32
        self.model = DeepseekV2ForCausalLM.from_pretrained(folder, dtype=dtype).to(device).train()
        self.model.set_experts_implementation(experts)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip

    def step(self, batch) -> torch.Tensor:
        with self.autocast:
            logits = self.model(batch.tokens.to(self.device), use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.to(self.device).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def fastest_loop(make: Callable[[str, str], PlainLoop], batch, kinds: tuple[str, ...]) -> tuple[str, str]:
    """Kind of weights and implementation of the experts whose step takes the least time."""
    times, errors = {}, []
    for kind, experts in itertools.product(kinds, IMPLEMENTATIONS):
        if experts == "batched_mm":
            continue  # a copy of the weights for every token
        try:
            loop = make(kind, experts)
            loop.step(batch)
            times[kind, experts] = min(seconds(lambda loop=loop: loop.step(batch)) for _ in range(2))
        except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            errors.append(f"{kind}, {experts}: {error}")  # not on this device, not in this version, no memory
        loop = None
        free_memory()
    if not times:
        raise RuntimeError("transformers could not be trained in any way:\n" + "\n".join(errors))
    return min(times, key=times.get)


# ------------------------------------------------------------------------------------------------- the runs


def new_trainer(sizes: Sizes, data: PackedDataset, device: str, steps: int, **settings: Any) -> Trainer:
    config = TrainConfig(
        batch_size=sizes.batch_size, seq_len=sizes.seq_len, steps=steps, sample_every=0, save_every=0,
        dtype="bfloat16" if device == "cuda" else "float32", **settings,
    )  # fmt: skip
    return Trainer(sizes.model, config, data, world=start_world(device))


def compare(sizes: Sizes, data: PackedDataset, device: str, compiled: bool) -> dict[str, Any]:
    """Tokens a second of both, in turns; raises RuntimeError if their first losses differ."""
    ours = new_trainer(sizes, data, device, 10_000, validate_every=0, compile=compiled)
    dtype = ours.config.dtype
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        plain = DeepSeekV2(sizes.model)
        plain.load_state_dict({name: tensor.cpu() for name, tensor in ours.model.state_dict().items()})
        save_pretrained(plain, folder)

        def batch(step: int):
            return data.batch(step, sizes.batch_size, sizes.seq_len, seed=ours.config.seed)

        def make(kind: str, experts: str) -> PlainLoop:
            return PlainLoop(folder, torch.device(device), kind, experts, ours.config)

        kinds = ("autocast", "bf16 weights") if device == "cuda" else ("float32",)
        chosen = fastest_loop(make, batch(0), kinds)
        peer = make(*chosen)
    first = ours.train_step()["loss"], float(peer.step(batch(0)))
    if not abs(first[0] - first[1]) < LARGEST_DIFFERENCE[dtype]:
        raise RuntimeError(f"the first losses differ: ours {first[0]:.5f}, transformers {first[1]:.5f}")
    ours.train_step()  # compiled for what changes from step to step
    step = itertools.count(1)

    def several(one: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(sizes.steps):
                one()

        return run

    pair = time_pairs(
        several(ours.train_step), several(lambda: peer.step(batch(next(step)))), repeats=sizes.pairs
    )
    tokens = sizes.steps * sizes.batch_size * sizes.seq_len
    return {
        "first_losses": [round(loss, 5) for loss in first],
        "ours": round(tokens / statistics.median(pair.ours)),
        "peer": round(tokens / statistics.median(pair.peer)),
        "ratio": round(pair.ratio, 3),
        "ratio_range": [round(value, 3) for value in pair.spread],
        "pairs": len(pair.ours),
        "peer_weights": chosen[0],
        "peer_experts": chosen[1],
        "ours_compiled": compiled,
    }


def train(
    sizes: Sizes, data: PackedDataset, device: str, steps: int, lr: float, compiled: bool
) -> tuple[dict[str, Any], Trainer]:
    """A run of so many steps: losses, what validation says, and the median of its tokens a second."""
    trainer = new_trainer(
        sizes, data, device, steps, lr=lr, compile=compiled, validate_every=max(1, steps // VALIDATIONS)
    )
    rows = list(tqdm(trainer, total=steps, unit="step", disable=None))
    validations = [{"step": row["step"]} | {k: row[k] for k in row if k.startswith("val_")} for row in rows]
    return {
        "training": trainer.config.to_dict(),
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 1),
        "tokens_per_s": round(statistics.median(row["tokens_per_s"] for row in rows)),
        "losses": [
            [row["step"], round(row["loss"], 4), round(row["grad_norm"], 4), round(row["imbalance"], 3)]
            for row in rows[:: max(1, steps // POINTS)]
        ],
        "validation": [row for row in validations if len(row) > 1],
    }, trainer


def metric_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The stored run as rows of metrics by step, as the trainer writes them and `viz` draws them."""
    names, config = ("step", "loss", "grad_norm", "imbalance"), TrainConfig(**run["training"])
    rows = {
        values[0]: dict(zip(names, values)) | {"lr": config.learning_rate(values[0] - 1)}
        for values in run["losses"]
    }
    for row in run["validation"]:
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


# ------------------------------------------------------------------------------------------ all together


def table(report: dict[str, Any]) -> str:
    """The results as text."""
    versions, flops = report["versions"], report["flops_per_token"]
    lines = [
        f"{report['parameters'] / 1e6:.1f}M parameters, {report['activated_parameters'] / 1e6:.1f}M active; "
        f"{report['batch_size']} x {report['seq_len']:,} tokens a step, {report['dtype']}",
        f"{report['device']}, torch {versions['torch']}, transformers {versions['transformers']}",
    ]
    if row := report.get("compared"):
        low, high = row["ratio_range"]
        lines += [
            f"dsv2 {row['ours']:,} tokens/s, transformers {row['peer']:,} ({row['peer_weights']}, "
            f"{row['peer_experts']}): {row['ratio']:.2f}x ({low:.2f}-{high:.2f})",
        ]
        if rate := report.get("product_rate"):
            lines.append(
                f"{flops / 1e6:.0f} MFLOP a token: {flops * row['ours'] / 1e12:.0f} of "
                f"{rate / 1e12:.0f} TFLOP/s, {flops * row['ours'] / rate:.0%}"
            )
    if run := report.get("run"):
        last = run["validation"][-1]
        loss = f"{last['val_loss']:.4f} nats a token"
        if "val_nats_per_byte" in last:
            loss = f"{last['val_nats_per_byte']:.4f} nats a byte"
        lines.append(
            f"trained on {run['tokens'] / 1e6:,.1f}M tokens in {run['seconds'] / 60:.1f} minutes: {loss}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.bench train",
        description=__doc__.split("\n\n")[0],
        epilog="Needs transformers >= 5.15.",
    )
    parser.add_argument("--preset", choices=PRESETS, help="(default: small on a GPU, tiny on a CPU)")
    parser.add_argument("--batch-size", type=int, help="sequences a step (default: 128; on a CPU 8)")
    parser.add_argument("--seq-len", type=int, help="tokens in a sequence (default: 1024; on a CPU 256)")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=0,
        help="of training afterwards, at the speed just measured (default: 0)",
    )
    parser.add_argument(
        "--lr", type=float, default=1e-3, help="peak learning rate of that run (default: 1e-3)"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="ours by torch.compile (default: on a GPU)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on a CPU (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="small sizes, two turns: does it run at all")
    text.add_option(parser)
    parser.add_argument("--weights", type=Path, metavar="DIR", help="where to write the trained model")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON to write (default: data/benchmarks/train_DEVICE.json, none if quick)",
    )
    options = parser.parse_args(arguments)
    if not find_transformers():
        return 1
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    usual = ("tiny", 2, 64) if options.quick else ("small", 128, 1024) if on_gpu else ("tiny", 8, 256)
    sizes = Sizes(
        DSV2Config.preset(options.preset or usual[0]),
        options.batch_size or usual[1],
        options.seq_len or usual[2],
        steps=1 if options.quick else 5,
        pairs=2 if options.quick else options.pairs,
    )
    compiled = on_gpu if options.compile is None else options.compile
    try:
        data = text.open_text(options.data)
    except PackedDataError as error:
        parser.error(f"--data: {error}")
    with torch.device("meta"):
        model = DeepSeekV2(sizes.model)
    report: dict[str, Any] = {
        "benchmark": "train",
        "ours": "dsv2",
        "peer": "transformers",
        **provenance("transformers"),
        "dtype": "bfloat16" if on_gpu else "float32",
        "parameters": model.num_parameters(),
        "activated_parameters": model.num_parameters(activated=True),
        "model": sizes.model.to_dict(),
        "batch_size": sizes.batch_size,
        "seq_len": sizes.seq_len,
        "flops_per_token": training_flops_per_token(sizes.model, sizes.seq_len).total,
        "text": data.manifest["fingerprint"],
        "text_tokens": data.n_tokens,
    }
    out = options.out or (None if options.quick else default_file("train", report))
    try:
        report["compared"] = compare(sizes, data, device, compiled)
    except RuntimeError as error:
        print(f"dsv2.bench: {error}", file=sys.stderr)
        return 1
    if on_gpu:
        report["product_rate"] = product_rate()
    if out:
        write_report(out, report)
    free_memory()
    if options.minutes:
        rate = report["compared"]["ours"]
        steps = max(1, round(options.minutes * 60 * rate / (sizes.batch_size * sizes.seq_len)))
        report["run"], trainer = train(sizes, data, device, steps, options.lr, compiled)
        if out:
            write_report(out, report)
        if options.weights:
            trainer.export(options.weights)
    print(table(report))
    if out:
        print(f"written to {out}")
    return 0
