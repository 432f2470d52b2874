"""The command line of the evaluation: which parts, on what text, the table and the file."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dsv2
from dsv2.data import PackedDataset, find_corpus, prepare
from dsv2.evaluate.domains import domain_windows, is_bytewise, nats_by_domain, read
from dsv2.evaluate.preference import Specialisation, expected_information, specialisation
from dsv2.evaluate.sums import answer_sums, held_out_sums
from dsv2.hf import DTYPES, load_pretrained
from dsv2.model import DeepSeekV2

PARTS = ("domains", "specialisation", "sums", "needle")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m dsv2.evaluate",
        description="What a trained model can do: nats per byte by kind of text, sums kept out of training, "
        "how much its experts prefer kinds of text and, with --needle, finding a fact in a long text.",
        epilog="The text is the validation part of what this machine has, so that figures of two models "
        "compare on one machine only. Exit status: 0 done, 2 something does not fit.",
    )
    top.add_argument("model", type=Path, metavar="MODEL", help="a checkpoint folder, such as data/tiny")
    top.add_argument(
        "--only", nargs="+", choices=PARTS, help="these parts (default: domains specialisation sums)"
    )
    text = top.add_argument_group("the text")
    text.add_argument("--data", type=Path, metavar="DIR", help="packed text made by python -m dsv2.data")
    text.add_argument("--windows", type=int, default=64, metavar="N", help="of every domain (default: 64)")
    text.add_argument("--seq-len", type=int, default=256, metavar="T", help="of a window (default: 256)")
    more = top.add_argument_group("the measures")
    more.add_argument("--shuffles", type=int, default=200, metavar="N", help="of the labels (default: 200)")
    more.add_argument("--sums", type=int, default=100, metavar="N", help="to ask for (default: 100)")
    more.add_argument("--needle", action="store_true", help="also look for a needle in a haystack")
    more.add_argument(
        "--lengths", type=int, nargs="+", metavar="T", help="of haystacks, in tokens (default: by the model)"
    )
    more.add_argument("--samples", type=int, default=4, metavar="N", help="needles a cell (default: 4)")
    more.add_argument("--seed", type=int, default=0, help="of shuffles, sums and needles (default: 0)")
    machine = top.add_argument_group("the machine, and what is kept")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    machine.add_argument(
        "--dtype", choices=sorted(DTYPES), help="of the weights (default: the checkpoint's; fp32 on CPU)"
    )
    machine.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON, counts too")
    machine.add_argument("--quiet", action="store_true", help="no progress bars")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parser().parse_args(arguments)
    command = ["python", "-m", "dsv2.evaluate", *map(str, sys.argv[1:] if arguments is None else arguments)]
    try:
        report = evaluate(options)
        print(table(report))
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            report = {"command": " ".join(command), "dsv2": dsv2.__version__, **report}
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(options.out)
    except (ValueError, OSError, ImportError) as problem:
        print(f"dsv2.evaluate: {problem}", file=sys.stderr)
        return 2
    return 0


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """The parts that were asked for, by name, in plain JSON types."""
    parts = list(options.only or PARTS[:3]) + (["needle"] if options.needle else [])
    for name in ("windows", "seq_len", "sums", "samples"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    if options.shuffles < 2:
        raise ValueError(f"--shuffles {options.shuffles} must be at least 2, for a spread")
    needle_grid = _needle_grid() if "needle" in parts else None  # what is missing is said at once
    wanted = options.dtype or ("fp32" if options.device == "cpu" else None)
    model = load_pretrained(
        options.model, device=options.device, dtype=None if wanted is None else DTYPES[wanted]
    )
    if "specialisation" in parts and not model.cfg.moe_layers:
        raise ValueError(f"{options.model} has no layer of experts; leave specialisation out by --only")
    if {"domains", "specialisation"} & set(parts) and options.seq_len > model.cfg.max_position_embeddings:
        raise ValueError(
            f"--seq-len {options.seq_len} is longer than the {model.cfg.max_position_embeddings} positions "
            "of this model"
        )
    report: dict[str, Any] = {
        "model": str(options.model),
        "torch": torch.__version__,
        "device": str(options.device),
        "seed": options.seed,
    }
    if {"domains", "specialisation"} & set(parts):
        report |= _read_text(model, options, parts)
    if "sums" in parts:
        if not is_bytewise(model):
            raise ValueError("sums are asked for in bytes, and this model has another tokenizer; use --only")
        report["sums"] = answer_sums(model, held_out_sums(options.sums, options.seed)).to_dict()
    if needle_grid is not None:
        longest = model.cfg.max_position_embeddings
        parts_of = (longest // 8, longest // 4, longest // 2, longest)
        lengths = options.lengths or [length for length in parts_of if length >= 64]
        report["needle"] = needle_grid(
            model,
            lengths,
            list(SHARES),
            samples=options.samples,
            seed=options.seed,
            progress=not options.quiet,
        )
    return report


def _read_text(model: DeepSeekV2, options: argparse.Namespace, parts: list[str]) -> dict[str, Any]:
    data = PackedDataset(options.data) if options.data else prepare(find_corpus(progress=not options.quiet))
    if data.vocab_size > model.cfg.vocab_size:
        raise ValueError(
            f"the text has {data.vocab_size} kinds of token and the model knows {model.cfg.vocab_size}; give "
            "text packed with the model's tokenizer by --data"
        )
    windows = domain_windows(data.validation, options.seq_len, options.windows)
    names, bytewise = data.domain_names, is_bytewise(model)
    reading = read(model, windows, progress=not options.quiet)
    each = len(windows) // len(names)
    found: dict[str, Any] = {
        "text": {"domains": names, "windows_each": each, "seq_len": options.seq_len},
        "corpus_fingerprint": data.manifest["fingerprint"],
    }
    if "domains" in parts:
        args = (reading.nats, windows.targets, windows.domains, names)
        found["domains"] = {
            "unit": "nats per byte" if bytewise else "nats per token",
            **nats_by_domain(*args, bytewise=bytewise),
        }
    if "specialisation" in parts:
        layers = []
        for number, ids in zip(model.cfg.moe_layers, reading.expert_ids):
            layer: Specialisation = specialisation(
                ids,
                windows.domains,
                len(names),
                model.cfg.n_routed_experts,
                shuffles=options.shuffles,
                seed=options.seed,
            )
            layers.append(
                {"layer": number, **layer.to_dict(), "independent": expected_information(layer.counts)}
            )
        found["specialisation"] = layers
    return found


def _needle_grid() -> Any:
    try:
        from dsv2.evaluate.needle import needle_grid
    except ImportError as problem:
        if problem.name != "dsv2.evaluate.needle":
            raise
        raise ImportError(
            "the needle in a haystack is not in this version of dsv2: dsv2/evaluate/needle.py is missing; "
            "leave --needle out"
        ) from None
    return needle_grid


def table(report: dict[str, Any]) -> str:
    """The report as text, for a terminal."""
    lines = [f"{report['model']}, {report['device']}, torch {report['torch']}"]
    if "text" in report:
        text = report["text"]
        lines.append(
            f"{text['windows_each']} windows of {text['seq_len']} tokens of each of "
            f"{', '.join(text['domains'])}"
        )
    if "domains" in report:
        unit, *values = report["domains"].items()
        lines += ["", f"{unit[1]}"]
        lines += [f"  {name:12} {value:7.3f}   ({value / math.log(2):.3f} bits)" for name, value in values]
    if "specialisation" in report:
        lines += ["", "nats that an expert tells of the domain"]
        lines += ["  layer  measured  of at most  shuffled windows: mean ± std (largest)  independent"]
        for row in report["specialisation"]:
            lines.append(
                f"  {row['layer']:5}  {row['information']:8.5f}  {row['information'] / row['ceiling']:10.2%}"
                f"  {row['shuffled_mean']:22.5f} ± {row['shuffled_std']:.5f} ({row['shuffled_largest']:.5f})"
                f"  {row['independent']:11.5f}"
            )
        lines.append("  favourites, times the fair share")
        for row in report["specialisation"]:
            counts = torch.tensor(row["counts"], dtype=torch.float64)
            ratios = counts * counts.shape[1] / counts.sum(dim=1, keepdim=True)
            best = [
                f"{name}: {int(r.argmax())} ({float(r.max()):.1f}x)"
                for name, r in zip(report["text"]["domains"], ratios)
            ]
            lines.append(f"  {row['layer']:5}  {', '.join(best)}")
    if "sums" in report:
        right, asked = report["sums"]["right"], report["sums"]["asked"]
        lines += ["", f"sums kept out of training: {right} of {asked} right"]
        lines += [f"  {q} {a}   (right: {r})" for q, a, r in report["sums"]["wrong"][:3]]
    if "needle" in report:
        lines += ["", "needle in a haystack", json.dumps(report["needle"], indent=1)]
    return "\n".join(lines)
