"""Text for training: tokenizers, corpora with domain labels, packing into memory-mapped files, n-gram
baselines.

    corpus = find_corpus()                       # what this machine has, labelled by domain
    dataset = prepare(corpus, ByteTokenizer())   # tokens on disk, written once
    batch = dataset.batch(step, batch_size=16, seq_len=256)
    dataset.validation.validation_windows(seq_len=256, max_windows=64)

`python -m dsv2.data` prints what is there, samples of it, and how well n-grams predict it.
"""

from dsv2.data.arithmetic import Problem, arithmetic_documents, arithmetic_problems
from dsv2.data.corpus import find_corpus
from dsv2.data.documents import Corpus, Document
from dsv2.data.ngram import NGramModel, nats_per_byte, ngram_baselines
from dsv2.data.packing import Batch, PackedDataError, PackedDataset, cache_directory, prepare
from dsv2.data.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "Corpus",
    "Document",
    "HFTokenizer",
    "NGramModel",
    "PackedDataError",
    "PackedDataset",
    "Problem",
    "Tokenizer",
    "arithmetic_documents",
    "arithmetic_problems",
    "cache_directory",
    "find_corpus",
    "load_tokenizer",
    "nats_per_byte",
    "ngram_baselines",
    "prepare",
]
