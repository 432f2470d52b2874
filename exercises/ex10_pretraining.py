"""Chapter 10: pretraining, from the schedules to what the experts have learned.

Six exercises: the learning rate as a function of the tokens seen, the batch ramp, nats per byte, clipping by
the norm of all gradients, a training step that has a bug, and how much experts tell of a text's domain.

    python3 course.py check 10        all of this chapter
    python3 course.py check 10.1      one exercise
    python3 course.py hint 10.1       a hint; again, for a plainer one
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


# exercise 10.1: the learning rate, by tokens seen (difficulty 1 of 3, about 15 minutes)
# check: python3 course.py check 10.1     in a notebook: check("10.1")
# hint:  python3 course.py hint 10.1      in a notebook: hint("10.1")
def learning_rate_at(
    tokens: int,
    total_tokens: int,
    *,
    step: int,
    peak: float,
    warmup: int,
    points: tuple[float, ...] = (0.6, 0.9),
) -> float:
    """The learning rate of a step before which `tokens` of the run's `total_tokens` have been seen.

    Linear warm-up over the first `warmup` steps: step 0 has peak / warmup, step warmup - 1 has peak. After
    it the rate is `peak`, times 0.316 for every one of `points`, shares of the tokens, that has been reached
    (DeepSeek-V2, section 3.1.2: at 60 % and at 90 %).

    The paper's peak is 2.4e-4. After 60 % of its tokens it is 2.4e-4 * 0.316 = 7.584e-05:

    >>> round(learning_rate_at(4_860, 8_100, step=100_000, peak=2.4e-4, warmup=2_000), 8)
    7.584e-05
    >>> learning_rate_at(1, 8_100, step=499, peak=2.4e-4, warmup=2_000)
    6e-05
    """
    raise NotImplementedError("exercise 10.1: write this, then run: python3 course.py check 10.1")


# exercise 10.2: a batch that grows (difficulty 1 of 3, about 15 minutes)
# check: python3 course.py check 10.2     in a notebook: check("10.2")
# hint:  python3 course.py hint 10.2      in a notebook: hint("10.2")
def batch_size_at(tokens: int, *, start: int, end: int, ramp_tokens: int, multiple: int = 1) -> int:
    """The sequences in a step before which `tokens` tokens have been seen.

    In proportion to the tokens from `start` (at 0) to `end` (at `ramp_tokens`), and `end` from there on. In
    between rounded down to a multiple of `multiple`, but never below `start` (section 3.1.2 has 2,304 to
    9,216 over 225B tokens).

    A third of the way, a third of the growth: 2304 + 6912 / 3.

    >>> batch_size_at(75, start=2304, end=9216, ramp_tokens=225)
    4608
    >>> batch_size_at(75, start=2304, end=9216, ramp_tokens=225, multiple=1000)
    4000
    """
    raise NotImplementedError("exercise 10.2: write this, then run: python3 course.py check 10.2")


# exercise 10.3: nats per byte (difficulty 1 of 3, about 10 minutes)
# check: python3 course.py check 10.3     in a notebook: check("10.3")
# hint:  python3 course.py hint 10.3      in a notebook: hint("10.3")
def nats_per_byte(nats: Any, targets: Any) -> float:
    """The loss per byte of text, from the loss at every target: array-likes of one shape.

    Ids below 256 are bytes; those from 256 on are special tokens (<bos>, <eos>, ...). The model has to
    predict them too, so their nats are paid; but they are no text, so they do not count as bytes. That makes
    the number one that compares with compressors, and with models of other vocabularies.

    Three targets cost 1, 2 and 3 nats, the last of them is <eos>: 6 nats for 2 bytes.

    >>> nats_per_byte([[1.0, 2.0, 3.0]], [[104, 105, 257]])
    3.0
    """
    raise NotImplementedError("exercise 10.3: write this, then run: python3 course.py check 10.3")


# exercise 10.4: clipping by the norm of all gradients (difficulty 2 of 3, about 20 minutes)
# check: python3 course.py check 10.4     in a notebook: check("10.4")
# hint:  python3 course.py hint 10.4      in a notebook: hint("10.4")
def clip_by_global_norm(
    gradients: list[Tensor | None], limit: float
) -> tuple[list[Tensor | None], Float[Tensor, ""]]:
    """Gradients scaled down so that all of them together are no longer than `limit`; and their norm before.

    The norm is that of one long vector with the numbers of all tensors in it. If it is at most `limit`,
    nothing changes; else every tensor is multiplied by limit / norm (section 3.1.2 clips at 1.0). None stands
    for a weight that got no gradient, such as those of an expert that no token chose; it stays None.

    Together (3, 4) and (12,) have the norm 13; clipped to 6.5, everything is halved.

    >>> clip_by_global_norm([torch.tensor([3.0, 4.0]), None, torch.tensor([12.0])], limit=6.5)
    ([tensor([1.5000, 2.0000]), None, tensor([6.])], tensor(13.))
    """
    raise NotImplementedError("exercise 10.4: write this, then run: python3 course.py check 10.4")


# exercise 10.5: a training step in parts (a bug hunt, difficulty 2 of 3, about 20 minutes)
# check: python3 course.py check 10.5     in a notebook: check("10.5")
# hint:  python3 course.py hint 10.5      in a notebook: hint("10.5")
def train_steps(
    weight: Float[Tensor, "classes features"],
    inputs: Float[Tensor, "steps rows features"],
    classes: Int[Tensor, "steps rows"],
    *,
    micro_batches: int,
    lr: float,
    limit: float,
) -> tuple[Float[Tensor, "classes features"], Float[Tensor, " steps"]]:
    """Train a linear classifier, one step for each batch; returns the weight and the loss of every step.

    A step's loss is the mean cross entropy of its rows. To save memory the rows go through in
    `micro_batches` equal parts, whose gradients add up to the gradient of the whole batch. That is clipped to
    the norm `limit` once, and the weight moves against it: weight - lr * gradient. In how many parts a
    batch is computed must not change what comes out.

    This code runs, and its losses fall. One of its lines stands in the wrong place: find it.
    """
    weight = weight.clone().requires_grad_()
    losses = []
    for rows, labels in zip(inputs, classes):
        loss = 0.0
        for x, y in zip(rows.chunk(micro_batches), labels.chunk(micro_batches)):
            weight.grad = None
            part = F.cross_entropy(x @ weight.T, y) / micro_batches
            part.backward()
            loss = loss + part.detach()
        norm = weight.grad.norm()
        with torch.no_grad():
            weight -= lr * weight.grad * (limit / norm).clamp(max=1.0)
        losses.append(loss)
    return weight.detach(), torch.stack(losses)


# exercise 10.6: what an expert tells of the domain (difficulty 2 of 3, about 25 minutes)
# check: python3 course.py check 10.6     in a notebook: check("10.6")
# hint:  python3 course.py hint 10.6      in a notebook: hint("10.6")
def mutual_information(counts: Int[Tensor, "domains experts"] | Float[Tensor, "domains experts"]) -> float:
    """How much knowing the expert tells of the domain, in nats: the mutual information of a table of counts.

        I = sum over d and e of p(d, e) ln(p(d, e) / (p(d) p(e)))

    p(d, e) is a cell's share of all counts, p(d) a row's, p(e) a column's. Cells without a count add nothing.
    If the rows are proportional to each other, I is 0; if every expert serves one domain alone, I is the
    entropy of the domains.

    >>> round(mutual_information(torch.tensor([[10, 0], [0, 10]])), 4)    # ln 2: the expert says it all
    0.6931
    >>> round(mutual_information(torch.tensor([[6, 2], [4, 4]])), 4)
    0.0338
    """
    raise NotImplementedError("exercise 10.6: write this, then run: python3 course.py check 10.6")

# stub 0d42a7: file 66d9af, 10.1 5e67d9, 10.2 560b84, 10.3 f993d8, 10.4 d72efd, 10.5 721215, 10.6 d31f3d
