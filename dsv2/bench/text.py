"""The text that benchmarks train on: packed beforehand, or what this machine has."""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv2.data import PackedDataset, find_corpus, prepare


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--data DIR`, for `open_text`."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="packed text made by python -m dsv2.data --out DIR (default: the text of this machine)",
    )


def open_text(directory: Path | None) -> PackedDataset:
    """Packed text; raises PackedDataError where the directory holds none."""
    return PackedDataset(directory) if directory else prepare(find_corpus())
