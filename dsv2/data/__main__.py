"""`python -m dsv2.data`: what text this machine has, samples of it, and how well n-grams predict it."""

from __future__ import annotations

import argparse
import json
import sys

from dsv2.data.corpus import MAX_BYTES_PER_DOMAIN, find_corpus
from dsv2.data.documents import LICENCE_NOTE, Corpus
from dsv2.data.ngram import ngram_baselines
from dsv2.data.packing import PackedDataset, prepare
from dsv2.data.tokenizer import ByteTokenizer

SEQ_LEN = 256


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    options = argparse.ArgumentParser(
        prog="python -m dsv2.data",
        description="Find the training text of this machine, write it as tokens, and print what it holds: "
        "sizes by domain, a sample of each, and the loss of n-gram models as the measure for a trained "
        "model. Nothing is downloaded.",
    )
    options.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="your own UTF-8 text files, too"
    )
    options.add_argument(
        "--domains",
        nargs="+",
        metavar="NAME",
        help="only these of: code english arithmetic language text (language: the second natural "
        "language found, or name french german spanish italian portuguese); default: all",
    )
    options.add_argument("--out", metavar="DIR", help="folder for the tokens (default: your cache folder)")
    options.add_argument(
        "--max-mb",
        type=float,
        default=MAX_BYTES_PER_DOMAIN / 1e6,
        metavar="MB",
        help="megabytes kept of a domain at most (default: %(default)g)",
    )
    options.add_argument(
        "--seed", type=int, default=0, help="of the problems and of what is cut (default: 0)"
    )
    options.add_argument("--order", type=int, default=5, help="longest n-gram, 1 to 7 (default: %(default)s)")
    options.add_argument("--no-cache", action="store_true", help="scan again, and remember nothing of it")
    options.add_argument("--json", action="store_true", help="print one JSON object and no samples")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 with a message on standard error when the request cannot be met."""
    options = parser().parse_args(arguments)
    if not 1 <= options.order <= 7:
        parser().error(f"--order must lie in 1..7, got {options.order}")
    try:
        corpus = find_corpus(
            options.domains,
            options.text,
            max_bytes_per_domain=int(options.max_mb * 1e6),
            seed=options.seed,
            cache=not options.no_cache,
        )
        dataset = prepare(corpus, ByteTokenizer(), options.out)
        seq_len = min(SEQ_LEN, max(1, dataset.validation.n_tokens - 1))
        baselines = ngram_baselines(dataset, tuple(range(1, options.order + 1)), seq_len)
    except (ValueError, OSError) as problem:
        print(f"dsv2.data: {problem}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(_report(corpus, dataset, baselines), indent=1, ensure_ascii=False))
    else:
        _print(corpus, dataset, baselines)
    return 0


def _report(corpus: Corpus, dataset: PackedDataset, baselines: list[dict]) -> dict:
    return {
        "directory": str(dataset.directory),
        "fingerprint": dataset.manifest["fingerprint"],
        "domains": corpus.table(),
        "absent": {name: note for name, note in corpus.notes.items() if name not in corpus.domain_names},
        "train_tokens": dataset.n_tokens,
        "validation_tokens": dataset.validation.n_tokens,
        "ngrams": baselines,
        "licence": LICENCE_NOTE,
    }


def _print(corpus: Corpus, dataset: PackedDataset, baselines: list[dict]) -> None:
    print(corpus.describe())
    for name in corpus.domain_names:
        document = max(
            corpus.of(name)[:200], key=lambda document: document.content_hash
        )  # any, but always the same
        print(f"\n--- {name}: {document.name}\n{sample(document.text)}")
    print("\nLoss of n-gram models with back-off on the validation text, in nats per byte")
    print(f"{'order':<8}{'nats':>8}{'bits':>8}" + "".join(f"{name:>12}" for name in dataset.domain_names))
    for row in baselines:
        domains = "".join(f"{row['domains'].get(name, float('nan')):>12.3f}" for name in dataset.domain_names)
        print(f"{row['order']:<8}{row['nats_per_byte']:>8.3f}{row['bits_per_byte']:>8.3f}{domains}")
    counts = f"{dataset.n_tokens:,} training and {dataset.validation.n_tokens:,} validation tokens"
    print(f"\n{counts} in {dataset.directory}")


def sample(text: str, size: int = 400) -> str:
    """About `size` characters from the middle of a text, from the start of a line."""
    start = text.find("\n", max(0, len(text) // 2 - size)) + 1
    return text[start : start + size].rstrip()


if __name__ == "__main__":
    sys.exit(main())
