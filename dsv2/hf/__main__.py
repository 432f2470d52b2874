"""`python -m dsv2.hf`: describe a checkpoint, or write it in another type."""

from __future__ import annotations

import argparse
import sys

from dsv2.accounting import memory_needed
from dsv2.config import PRESETS
from dsv2.hf import DTYPES, describe, load_pretrained, open_checkpoint, save_pretrained


def sizes() -> str:
    """What the released models' weights take in bf16, in words."""
    names = {"lite": "DeepSeek-V2-Lite", "full": "DeepSeek-V2"}
    weights = {name: memory_needed(PRESETS[preset]).weights for preset, name in names.items()}
    return " and ".join(f"{size / 1e9:.1f} GB ({name})" for name, size in weights.items())


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 1 with a message on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.hf",
        description="Describe or convert a checkpoint. Only --convert loads the weights.",
        epilog=f"Weights in bf16 take {sizes()} of memory, in fp32 twice as much; the cache comes on top "
        "(python -m dsv2.accounting lite --context 32768).",
    )
    parser.add_argument("directory", help="a Hugging Face DeepSeek-V2 directory")
    parser.add_argument("--convert", metavar="OUT", help="write it to another directory")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="type of the written weights")
    options = parser.parse_args(arguments)
    if options.dtype and not options.convert:
        parser.error("--dtype is the type to --convert to")
    try:
        checkpoint = open_checkpoint(options.directory)
        print(describe(checkpoint))
        if options.convert:
            model = load_pretrained(options.directory, dtype=DTYPES.get(options.dtype))
            save_pretrained(model, options.convert)
            print(f"written to {options.convert} in {model.embed.weight.dtype}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
