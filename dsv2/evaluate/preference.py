"""Do experts prefer kinds of text? Information between a choice and its domain, against shuffled labels.

Counting alone always finds a preference: few choices never fall evenly. So the same is measured where there
is none, with the labels of whole windows dealt out anew. Neighbouring tokens are alike; a shuffle token by
token would treat them as independent and make chance look smaller than it is.
"""

# W windows   T tokens of each   K experts per token   E experts   D domains   S symbols (token ids)

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BY = ("windows", "tokens")


def count_choices(
    expert_ids: Int[Tensor, "W T K"], domains: Int[Tensor, "W T"], n_domains: int, n_experts: int
) -> Int[Tensor, "D E"]:
    """How often tokens of each domain chose each expert; all K choices of a token count."""
    pairs = domains.long()[..., None] * n_experts + expert_ids
    return torch.bincount(pairs.flatten(), minlength=n_domains * n_experts).view(n_domains, n_experts)


def mutual_information(counts: Int[Tensor, "D E"] | Float[Tensor, "D E"]) -> float:
    """I(D; E) in nats of a table of counts: how much knowing the expert tells of the domain, or the reverse.

        I = sum over d, e of p(d, e) ln(p(d, e) / (p(d) p(e)))

    0 where rows are proportional to each other; at most the smaller of the entropies of domain and expert.
    Cells without a count add nothing. Raises ValueError for a table without counts.
    """
    counts = counts.double()
    if counts.dim() != 2 or (counts < 0).any() or not counts.sum() > 0:
        raise ValueError("counts must be a table (domains, experts) of at least one count, none negative")
    joint = counts / counts.sum()
    apart = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    seen = joint > 0
    return max(0.0, float((joint[seen] * (joint[seen] / apart[seen]).log()).sum()))


def conditional_mutual_information(counts: Int[Tensor, "S D E"] | Float[Tensor, "S D E"]) -> float:
    """I(D; E | S) in nats: what an expert tells of the domain beyond what the symbol has told already.

    counts: by symbol, domain and expert. The mutual information within each symbol, weighted by how often
    the symbol occurs.
    """
    whole = float(counts.sum())
    if not whole > 0:
        raise ValueError("counts must hold at least one count")
    parts = [table for table in counts if table.sum() > 0]
    return sum(float(table.sum()) / whole * mutual_information(table) for table in parts)


def expected_information(counts: Int[Tensor, "D E"] | Float[Tensor, "D E"]) -> float:
    """What N independent choices without any preference show on average, in nats: (D - 1)(E - 1) / 2N.

    D and E count rows and columns that occur. The first term of the bias of a finite sample (Miller, 1955).
    Choices of real text are not independent, and show more.
    """
    rows, columns = (int((counts.sum(dim=dim) > 0).sum()) for dim in (1, 0))
    return (rows - 1) * (columns - 1) / (2 * float(counts.sum()))


def shuffled_information(
    expert_ids: Int[Tensor, "W T K"],
    domains: Int[Tensor, "W T"],
    n_domains: int,
    n_experts: int,
    *,
    shuffles: int = 100,
    seed: int = 0,
    by: str = "windows",
) -> Float[np.ndarray, " shuffles"]:
    """The mutual information with labels dealt out at random, so many times: what chance alone shows.

    by: "windows" gives every window the labels of another one, so that what belongs together stays together;
    "tokens" deals them out one by one.
    """
    if by not in BY:
        raise ValueError(f"by={by!r} must be one of {', '.join(BY)}")
    if shuffles < 2:
        raise ValueError(f"shuffles={shuffles} must be at least 2, for a spread")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(shuffles):
        if by == "windows":
            labels = domains[torch.randperm(len(domains), generator=generator)]
        else:
            labels = domains.flatten()[torch.randperm(domains.numel(), generator=generator)].view_as(domains)
        found.append(mutual_information(count_choices(expert_ids, labels, n_domains, n_experts)))
    return np.array(found)


@dataclass(frozen=True)
class Specialisation:
    """One layer's: information in nats, ceiling (the domains' entropy, the most there can be), and shuffled,
    what chance alone showed.

    counts: (domains, experts). deviations: how many standard deviations of the shuffles the information lies
    above their mean. p: the share of shuffles that reach it, this table counted among them.
    """

    counts: Int[Tensor, "D E"]
    information: float
    ceiling: float
    shuffled: Float[np.ndarray, " shuffles"]

    @property
    def deviations(self) -> float:
        spread = float(self.shuffled.std(ddof=1))
        return (self.information - float(self.shuffled.mean())) / spread if spread else np.inf

    @property
    def p(self) -> float:
        return (1 + int((self.shuffled >= self.information).sum())) / (1 + len(self.shuffled))

    def to_dict(self) -> dict:
        """Plain JSON types, with the shuffles' mean, standard deviation and largest."""
        return {
            "information": self.information,
            "ceiling": self.ceiling,
            "shuffled_mean": float(self.shuffled.mean()),
            "shuffled_std": float(self.shuffled.std(ddof=1)),
            "shuffled_largest": float(self.shuffled.max()),
            "shuffles": len(self.shuffled),
            "p": self.p,
            "counts": self.counts.tolist(),
        }


def specialisation(
    expert_ids: Int[Tensor, "W T K"],
    domains: Int[Tensor, "W T"],
    n_domains: int,
    n_experts: int,
    *,
    shuffles: int = 100,
    seed: int = 0,
) -> Specialisation:
    """How much the experts of one layer prefer domains, against windows whose labels have been shuffled."""
    counts = count_choices(expert_ids, domains, n_domains, n_experts)
    shares = counts.sum(dim=1).double() / counts.sum()
    ceiling = float(torch.special.entr(shares).sum())
    chance = shuffled_information(expert_ids, domains, n_domains, n_experts, shuffles=shuffles, seed=seed)
    return Specialisation(counts, mutual_information(counts), ceiling, chance)
