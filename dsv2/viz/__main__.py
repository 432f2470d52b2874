"""`python -m dsv2.viz`: the figures of the README, made again from the package and its data."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dsv2.config import PRESETS, DSV2Config
from dsv2.viz import (
    benchmark_bars,
    cache_bytes_per_token,
    cache_growth,
    course_map,
    describe,
    model_diagram,
    save,
    training_curves,
)
from dsv2.viz.decode_results import (
    decode_results_figure,
    generate_results_figure,
    share_of_limit_figure,
)

RESULT_FIGURES = {
    "decode-results": (decode_results_figure, "attention: time against cached tokens"),
    "share-of-limit": (share_of_limit_figure, "attention: share of the limit by shape"),
    "generate-results": (generate_results_figure, "a V2-Lite-shaped model against transformers"),
}


def _baseline(text: str) -> tuple[str, float]:
    """NAME=NATS."""
    name, _, value = text.rpartition("=")
    try:
        return (name, float(value)) if name else _refuse(text)
    except ValueError:
        return _refuse(text)


def _refuse(text: str) -> tuple[str, float]:
    raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NATS, such as 3-gram=1.9")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dsv2.viz", description=__doc__.split(": ", 1)[1])
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="the .png or .svg to write")
    common.add_argument("--dpi", type=float, default=160, help="pixels per inch of a PNG (default: 160)")
    preset = argparse.ArgumentParser(add_help=False)
    preset.add_argument("--preset", choices=sorted(PRESETS), default="full", help="(default: full)")
    figures = parser.add_subparsers(dest="figure", required=True)

    figures.add_parser("model-diagram", parents=[common, preset], help="one block, with a config's numbers")
    growth = figures.add_parser("cache-growth", parents=[common, preset], help="bytes cached, MHA and MLA")
    growth.add_argument("--tokens", type=int, default=128 * 1024)
    figures.add_parser("course-map", parents=[common], help="the chapters; those in notebooks/ filled")
    training = figures.add_parser("training-curves", parents=[common], help="loss and imbalance of a run")
    training.add_argument("metrics", type=Path, help="metrics.jsonl of the run")
    training.add_argument("--baseline", type=_baseline, action="append", default=[], metavar="NAME=NATS")
    bars = figures.add_parser("benchmark-bars", parents=[common], help="a benchmark's results")
    bars.add_argument("results", type=Path, help="JSON written by python -m dsv2.bench")
    for name, what in RESULT_FIGURES.items():
        measured = figures.add_parser(name, parents=[common], help=what[1])
        measured.add_argument("results", type=Path, help="JSON written by python -m dsv2.bench on a GPU")
    return parser


def draw(options: argparse.Namespace) -> Figure:
    """The figure that the command line asks for."""
    if options.figure == "model-diagram":
        return model_diagram(DSV2Config.preset(options.preset))
    if options.figure == "cache-growth":
        return cache_growth(options.tokens, cache_bytes_per_token(DSV2Config.preset(options.preset)))
    if options.figure == "course-map":
        return course_map()
    if options.figure == "training-curves":
        return training_curves(options.metrics, dict(options.baseline))
    if options.figure in RESULT_FIGURES:
        return RESULT_FIGURES[options.figure][0](options.results)
    return benchmark_bars(options.results)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        figure = draw(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        path = save(figure, options.out, options.dpi)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        print(f"dsv2.viz: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {path.stat().st_size / 1000:.0f} KB. {describe(figure)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
