"""`python -m dsv2.bench NAME`: run one of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import sys

BENCHMARKS = {
    "balance": "small models trained with and without the balance losses: experts' loads and losses",
    "context": "needles in texts longer than the trained ones: RoPE, interpolation, YaRN",
    "decode": "attention over the latent cache: our kernels, their peers and the hardware's limit",
    "device-limit": "small models trained with tokens limited to 1 to 8 devices",
    "economics": "the largest batch of a dense and of a V2-Lite-shaped model, against the model's limits",
    "generate": "decoding and prefill of a V2-Lite-shaped model against transformers and the limit",
    "moe": "a layer of experts against transformers and the limit",
    "model": "training, prefill and decoding of a whole model against transformers",
    "pretraining": "small models trained with other schedules, a batch ramp, no balance losses",
    "parallel": "experts on several devices: equal to one, all-to-all, tokens a second (by torchrun)",
    "train": "pretraining: tokens a second beside transformers in a plain loop, and a run to the end",
    "traffic": "bytes between experts on real processes, beside those counted in one",
    "routers": "models trained with experts and routers of several papers",
}


def main(arguments: list[str] | None = None) -> int:
    width = max(len(name) for name in BENCHMARKS)
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure this package against its peers.",
        epilog="benchmarks:\n" + "\n".join(f"  {name:{width}}  {what}" for name, what in BENCHMARKS.items()),
    )
    parser.add_argument(
        "name", choices=BENCHMARKS, metavar="NAME", help="which benchmark; its own --help says more"
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments[:1] or ["--help"])
    return importlib.import_module(f"dsv2.bench.{options.name.replace('-', '_')}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
