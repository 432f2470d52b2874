"""Choosing the next token: probabilities, cut to the likely ones, and a draw for every sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def next_token_probabilities(
    logits: Float[Tensor, "batch vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "batch vocab"]:
    """softmax(logits / temperature), cut to the `top_k` likeliest, then to those that make up `top_p`.

    The token that crosses `top_p` stays in, so that at least one does (arXiv 1904.09751). temperature=0 gives
    all the probability to the likeliest token.
    """
    logits = logits.float()
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_k is None and top_p is None:
        return probabilities
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[..., top_k:] = 0
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    if top_p is not None:
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0)
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, tokens, ordered)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature=0 is greedy; the default draws from the model as it is."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None for the whole vocabulary")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1], or be None for the whole vocabulary")

    def generators(self, batch: int, device: torch.device) -> list[torch.Generator]:
        """One source of chance per sequence, so that what one says does not depend on its neighbours."""
        seed = torch.seed() if self.seed is None else self.seed
        return [torch.Generator(device).manual_seed((seed + row) % 2**63) for row in range(batch)]

    def draw(
        self, logits: Float[Tensor, "batch vocab"], generators: list[torch.Generator]
    ) -> Int[Tensor, " batch"]:
        """The next token of every sequence."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = next_token_probabilities(logits, self.temperature, self.top_k, self.top_p)
        # The first of exponential clocks that run at rates p rings with probability p: a draw without a sum.
        clocks = torch.empty_like(probabilities)
        for row, generator in zip(clocks, generators):
            row.exponential_(generator=generator)
        return (probabilities / clocks).argmax(dim=-1)
