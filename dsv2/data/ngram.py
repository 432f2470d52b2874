"""N-gram models with back-off: what a table of counts predicts, as the measure for a trained model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv2.data.packing import PackedDataset


class NGramModel:
    """Interpolated Witten-Bell: every order backs off to the shorter one by how often its context surprised.

        p_n(w | h) = (c(h w) + t(h) p_{n-1}(w | h')) / (c(h) + t(h))

    c counts in the training tokens, t(h) is how many different tokens followed h, h' is h without its oldest
    token, and p_0 is uniform over the vocabulary. A context never seen leaves p_{n-1}. (Witten and Bell,
    1991; the interpolated form of Chen and Goodman, 1998.) Special tokens are predicted like any other token.
    """

    def __init__(self, order: int = 3, vocab_size: int = 264) -> None:
        if vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
        self._bits = (vocab_size - 1).bit_length()
        if not 1 <= order <= 63 // self._bits:
            raise ValueError(
                f"order must lie in 1..{63 // self._bits} for vocab_size={vocab_size} "
                f"(an n-gram is packed in 63 bits), got {order}"
            )
        self.order = order
        self.vocab_size = vocab_size
        self._tables: list[_Table] = []

    def fit(self, tokens: Any) -> NGramModel:
        """Count the n-grams of a flat array of token ids, such as `dataset.stream()`; returns the model
        itself.
        """
        tokens = self._checked(tokens)
        if tokens.ndim != 1 or len(tokens) < self.order:
            raise ValueError(
                f"tokens must be a flat array of at least {self.order} ids, got shape {tokens.shape}"
            )
        self._tables = []
        keys = np.zeros(len(tokens) + 1, np.int64)
        for length in range(1, self.order + 1):
            keys = keys[:-1] << self._bits
            keys += tokens[length - 1 :]
            self._tables.append(_Table.of(keys, self._bits))
        return self

    def nats(self, tokens: Any, targets: Any, order: int | None = None) -> np.ndarray:
        """-ln p of each target, float64 of the shape of `targets`, with what its own row shows before it.

        `tokens` and `targets` are (rows, T) as in a Batch: target t follows tokens[:, :t + 1]. The model sees
        no token before its row's first, exactly as a neural model that is given the same batch.
        """
        tokens, targets = self._checked(tokens), self._checked(targets)
        if tokens.ndim != 2 or tokens.shape != targets.shape:
            raise ValueError(
                f"tokens and targets must have one shape (rows, T), got {tokens.shape} and {targets.shape}"
            )
        return -np.log(self._probabilities(tokens, targets, self._order(order)))

    def distribution(self, context: Any, order: int | None = None) -> np.ndarray:
        """The probability of every token of the vocabulary after `context` (any length); they sum to 1."""
        context = self._checked(context)[-max(1, self.order - 1) :]
        if context.ndim != 1:
            raise ValueError(f"context must be a flat sequence of ids, got shape {context.shape}")
        order = min(self._order(order), len(context) + 1)
        every = np.arange(self.vocab_size)
        probability = np.full(self.vocab_size, 1 / self.vocab_size)
        for length in range(1, order + 1):
            key = np.zeros(self.vocab_size, np.int64)
            for token in context[len(context) - length + 1 :]:
                key = key << self._bits | int(token)
            probability = self._tables[length - 1].interpolate(key, every, probability, self._bits)
        return probability

    def _probabilities(self, tokens: np.ndarray, targets: np.ndarray, order: int) -> np.ndarray:
        probability = np.full(targets.shape, 1 / self.vocab_size)
        keys = np.zeros(targets.shape, np.int64)
        for length in range(1, order + 1):
            seen = length - 1  # tokens of context; targets before column seen - 1 have fewer in their row
            first = max(0, seen - 1)
            if first >= targets.shape[1]:
                break
            if seen:
                columns = tokens[:, : targets.shape[1] - first]
                keys = keys[:, 1:] if seen > 1 else keys
                keys = keys + (columns << (self._bits * (seen - 1)))
            probability[:, first:] = self._tables[length - 1].interpolate(
                keys, targets[:, first:], probability[:, first:], self._bits
            )
        return probability

    def _order(self, order: int | None) -> int:
        if not self._tables:
            raise ValueError("the model has no counts yet; call fit(tokens) first")
        order = self.order if order is None else order
        if not 1 <= order <= self.order:
            raise ValueError(f"order must lie in 1..{self.order}, got {order}")
        return order

    def _checked(self, tokens: Any) -> np.ndarray:
        tokens = np.asarray(tokens).astype(np.int64)
        if tokens.size and not (0 <= tokens.min() and tokens.max() < self.vocab_size):
            raise ValueError(
                f"token ids must lie in 0..{self.vocab_size - 1}, got {tokens.min()}..{tokens.max()}"
            )
        return tokens


@dataclass(frozen=True)
class _Table:
    """Counts of the n-grams of one length, by sorted key: the oldest token in the highest bits."""

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    types: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, bits: int) -> _Table:
        grams, counts = np.unique(keys, return_counts=True)
        contexts, first = np.unique(grams >> bits, return_index=True)
        totals = np.add.reduceat(counts, first)
        return cls(grams, counts, contexts, totals, np.diff(first, append=len(grams)))

    def interpolate(
        self, contexts: np.ndarray, targets: np.ndarray, shorter: np.ndarray, bits: int
    ) -> np.ndarray:
        place, known = _find(self.contexts, contexts)
        total = np.where(known, self.totals[place], 0)
        types = np.where(known, self.types[place], 1)  # unseen: 0 + 1 * shorter over 0 + 1
        place, known = _find(self.grams, contexts << bits | targets)
        count = np.where(known, self.counts[place], 0)
        return (count + types * shorter) / (total + types)


def _find(ordered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return place, ordered[place] == values


def nats_per_byte(nats: Any, targets: Any) -> float:
    """The summed nats of all targets over how many of them are bytes, for token ids of ByteTokenizer.

    The special tokens are predicted and paid for, but they are no text: without them in the denominator the
    number compares with compressors and with models of other vocabularies. Use it for the neural model and
    the n-grams alike, on the same targets.
    """
    total = float(np.asarray(nats, dtype=np.float64).sum())
    count = int((np.asarray(targets) < 256).sum())
    if not count:
        raise ValueError("targets hold no byte (no id below 256)")
    return total / count


def ngram_baselines(
    dataset: PackedDataset,
    orders: tuple[int, ...] = (1, 2, 3, 4, 5),
    seq_len: int = 256,
    max_windows: int | None = None,
) -> list[dict[str, Any]]:
    """Nats and bits per byte of n-gram models, fitted on the training split and scored on the validation
    windows.

    `dataset` must be packed with ByteTokenizer. One row an order: order, nats_per_token, nats_per_byte,
    bits_per_byte, and domains {name: nats_per_byte}. The windows are those of
    `dataset.validation.validation_windows(seq_len, max_windows)`, so that a model scored on them had the same
    input.
    """
    if dataset.manifest["tokenizer"]["kind"] != "bytes":
        raise ValueError("n-gram baselines per byte need a dataset packed with ByteTokenizer")
    batch = dataset.validation.validation_windows(seq_len, max_windows)
    tokens, targets, domains = batch.tokens.numpy(), batch.targets.numpy(), batch.domains.numpy()
    model = NGramModel(max(orders), dataset.vocab_size).fit(dataset.train.stream())
    rows = []
    for order in orders:
        nats = model.nats(tokens, targets, order)
        by_domain = {}
        for number, name in enumerate(dataset.domain_names):
            chosen = domains == number
            if (targets[chosen] < 256).any():
                by_domain[name] = nats_per_byte(nats[chosen], targets[chosen])
        loss = nats_per_byte(nats, targets)
        rows.append(
            {
                "order": order,
                "nats_per_token": float(nats.mean()),
                "nats_per_byte": loss,
                "bits_per_byte": loss / math.log(2),
                "domains": by_domain,
            }
        )
    return rows
