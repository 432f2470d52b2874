"""`python -m dsv2.generate`: write text with the small model of the course, or with any checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dsv2.config import PRESETS, DSV2Config
from dsv2.generate import stream
from dsv2.generate.graphs import why_not
from dsv2.generate.measure import measure_decoding, random_model
from dsv2.hf import DTYPES, load_pretrained

SHIPPED_MODEL = Path(__file__).resolve().parents[2] / "data" / "tiny"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 with a message on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.generate",
        description="Write text with a DeepSeek-V2: the small one of the course, or any checkpoint.",
    )
    parser.add_argument(
        "prompt", nargs="?", help="text to continue; without one, prompts are read line by line"
    )
    parser.add_argument(
        "--model", type=Path, default=SHIPPED_MODEL, help="a checkpoint folder (default: the shipped one)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest token (default: 0.8)"
    )
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, help="the same text every time")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text (repeatable)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="of the weights (default: the checkpoint's; fp32 on a CPU, which is slow with fewer bits)",
    )
    bench = parser.add_argument_group("how fast it decodes")
    bench.add_argument(
        "--bench", action="store_true", help="print tokens/s and the share of the limit, instead of writing"
    )
    bench.add_argument(
        "--preset", choices=sorted(PRESETS), help="measure random weights of this shape, not --model"
    )
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    bench.add_argument("--cached", type=int, default=1024, metavar="N", help="tokens before (default: 1024)")
    bench.add_argument("--steps", type=int, default=32, metavar="N", help="to measure (default: 32)")
    options = parser.parse_args(arguments)
    if options.preset and not options.bench:
        parser.error("--preset has random weights, which write nothing; it goes with --bench")

    try:
        if options.bench:
            print(_measure(options))
            return 0
        dtype = options.dtype or ("fp32" if options.device == "cpu" else None)
        model = load_pretrained(options.model, device=options.device, dtype=DTYPES.get(dtype))
        for prompt in [options.prompt] if options.prompt is not None else _typed_prompts():
            steps = stream(
                model,
                prompt,
                options.max_new_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                seed=options.seed,
                stop=options.stop,
            )
            print(prompt, end="", flush=True)
            for step in steps:
                print(step.text, end="", flush=True)
            print()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"dsv2.generate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def _measure(options: argparse.Namespace) -> str:
    """What `--bench` prints. Raises ValueError for a batch or cache that the model has no room for."""
    if options.batch < 1 or options.cached < 1:
        raise ValueError(f"--batch={options.batch} and --cached={options.cached} must be at least 1")
    on_gpu = options.device != "cpu"
    if options.preset:
        dtype = DTYPES[options.dtype or ("bf16" if on_gpu else "fp32")]
        model = random_model(DSV2Config.preset(options.preset), options.device, dtype)
    else:
        dtype = DTYPES.get(options.dtype or (None if on_gpu else "fp32"))
        model = load_pretrained(options.model, device=options.device, dtype=dtype)
    limit = model.cfg.max_position_embeddings
    if options.cached + options.steps > limit:
        raise ValueError(
            f"--cached={options.cached} and --steps={options.steps} pass the model's "
            f"max_position_embeddings={limit}; shorten one of them"
        )
    found = measure_decoding(model.eval(), options.batch, options.cached, options.steps)
    way = "CUDA graphs" if found.through_graphs else f"step by step: {why_not(model, options.batch)}"
    return f"{found}\n{way}"


def _typed_prompts() -> Iterator[str]:
    """Lines typed by the reader, until the end of input."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


if __name__ == "__main__":
    sys.exit(main())
