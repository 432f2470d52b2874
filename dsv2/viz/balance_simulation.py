"""A router and its experts learning on made-up tokens, small enough to run again at every move of a slider.

The tokens lie in clusters, each with a rule of its own that turns a token into its target. Every expert is a
matrix; a token's output is the sum of its chosen experts' outputs, weighted by their affinities, as in
equation 20 of DeepSeek-V2 (arXiv 2405.04434). Router and experts follow the gradient of the squared error and
of the three balance losses (equations 23-31), written out by hand. Only chosen experts learn: nothing else
makes some of them popular.
"""

# T tokens (one sequence)   D width   E routed experts   K experts per token   G devices   M devices per token

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOKENS, WIDTH, CLUSTERS = 192, 8, 12
EXPERTS, DEVICES, CHOSEN, MOST_DEVICES = 16, 4, 3, 2
STEPS, EVERY = 120, 4
RATE, RATE_ROUTER, NOISE = 6.0, 1.5, 0.35  # of the experts, of the router; of the tokens in a cluster


LONGEST = 0.1  # of the experts' gradient


@dataclass(frozen=True)
class BalanceSimulation:
    """What `simulate_balance` found, at each of the `steps` looked at; the last is the end.

    steps: (n,). loads: (n, E), how many tokens chose each expert. received: (n, G), how many tokens are sent
    to each device. errors: (n,), the squared error over the targets' size. losses: (n, 3), the expert,
    device and communication loss at alpha 1, which is what perfect balance costs.
    """

    steps: np.ndarray
    loads: np.ndarray
    received: np.ndarray
    errors: np.ndarray
    losses: np.ndarray

    @property
    def fair_load(self) -> float:
        """Choices of an expert, if all are equally busy."""
        return TOKENS * CHOSEN / EXPERTS

    @property
    def aim(self) -> float:
        """Tokens that a device receives if all are equally busy and every token goes to M: M T / D."""
        return TOKENS * MOST_DEVICES / DEVICES


def make_tokens(seed: int, shared: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (T, D) and their targets (T, D). shared: how large the part is that all tokens share."""
    random = np.random.default_rng(seed)
    size = 1 / np.arange(1, CLUSTERS + 1) ** 0.5  # some kinds of token are frequent, others rare
    cluster = random.choice(CLUSTERS, TOKENS, p=size / size.sum())
    centres = random.normal(size=(CLUSTERS, WIDTH))
    rules = random.normal(size=(CLUSTERS, WIDTH, WIDTH)) / WIDTH**0.5
    x = centres[cluster] + shared * random.normal(size=WIDTH) + NOISE * random.normal(size=(TOKENS, WIDTH))
    x /= np.linalg.norm(x, axis=1, keepdims=True) / WIDTH**0.5
    return x, np.einsum("td,tde->te", x, rules[cluster])


def choose(scores: np.ndarray) -> np.ndarray:
    """(T, E) bool: the K best experts on the M devices that hold the best ones (section 2.2.2)."""
    per_device = scores.reshape(-1, DEVICES, EXPERTS // DEVICES).max(axis=2)
    worst_device = np.sort(per_device, axis=1)[:, -MOST_DEVICES, None]
    allowed = np.repeat(per_device >= worst_device, EXPERTS // DEVICES, axis=1)
    open_to = np.where(allowed, scores, -1.0)
    return open_to >= np.sort(open_to, axis=1)[:, -CHOSEN, None]


def loss_slopes(chosen: np.ndarray, alphas: tuple[float, float, float]) -> np.ndarray:
    """(E,): T times the balance losses' gradient by a token's affinities: f, f' and f'' times alphas."""
    frequencies = chosen.mean(axis=0) * EXPERTS / CHOSEN
    f_device = frequencies.reshape(DEVICES, -1).mean(axis=1)
    reach = sent(chosen).mean(axis=0) * DEVICES / MOST_DEVICES
    slope = alphas[0] * frequencies
    return slope + np.repeat(alphas[1] * f_device + alphas[2] * reach, EXPERTS // DEVICES)


def sent(chosen: np.ndarray) -> np.ndarray:
    """(T, G) bool: to which devices each token goes."""
    return chosen.reshape(len(chosen), DEVICES, -1).any(axis=2)


def balance_losses(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The expert, device and communication loss at alpha 1."""
    p = scores.mean(axis=0)
    return np.array([p @ loss_slopes(chosen, alphas) for alphas in ((1, 0, 0), (0, 1, 0), (0, 0, 1))])


def simulate_balance(
    expert: float = 0.0,
    device: float = 0.0,
    communication: float = 0.0,
    *,
    shared: float = 1.0,
    seed: int = 0,
    steps: int = STEPS,
) -> BalanceSimulation:
    """Gradient descent on router and experts under the three alphas; equal arguments, equal numbers."""
    x, y = make_tokens(seed, shared)
    random = np.random.default_rng(seed + 1000)
    router = 0.3 * random.normal(size=(WIDTH, EXPERTS)) / WIDTH**0.5
    experts = random.normal(size=(EXPERTS, WIDTH, WIDTH)) / WIDTH**0.5
    size = (y * y).sum()
    alphas = (expert, device, communication)
    found: list[tuple] = []
    for step in range(steps + 1):
        logits = x @ router
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        chosen = choose(scores)
        gates = np.where(chosen, scores, 0.0)
        outputs = x @ experts  # (E, T, D)
        error = np.einsum("te,etd->td", gates, outputs, optimize=True) - y
        if step % EVERY == 0 or step == steps:
            squared = (error * error).sum() / size
            found.append((step, chosen.sum(0), sent(chosen).sum(0), squared, balance_losses(scores, chosen)))
        slope = 2 * error / size
        by_score = np.where(chosen, np.einsum("td,etd->te", slope, outputs, optimize=True), 0.0)
        by_score += loss_slopes(chosen, alphas) / TOKENS
        by_logit = scores * (by_score - (scores * by_score).sum(axis=1, keepdims=True))
        by_expert = (gates.T[:, :, None] * x).transpose(0, 2, 1) @ slope
        router -= RATE_ROUTER * (x.T @ by_logit)
        # Clipped, as in training: one expert that suddenly has all tokens would take too long a step.
        experts -= RATE * by_expert * min(1.0, LONGEST / np.linalg.norm(by_expert))
    return BalanceSimulation(*(np.array(column) for column in zip(*found)))
