"""`python -m dsv2.generate`: write text with the small model of the course, or with any checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dsv2.generate import stream
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
    options = parser.parse_args(arguments)

    try:
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
    except (ValueError, OSError) as error:
        print(f"dsv2.generate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def _typed_prompts() -> Iterator[str]:
    """Lines typed by the reader, until the end of input."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


if __name__ == "__main__":
    sys.exit(main())
