"""Text of one kind at a time: windows of it, what a model makes of them, and its loss by kind."""

# W windows   T tokens of each   K experts per token

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dsv2.data.packing import Batch, PackedDataset
from dsv2.data.tokenizer import ByteTokenizer
from dsv2.model import DeepSeekV2

BYTES = 256  # ids below this are bytes, for a ByteTokenizer


@dataclass(frozen=True)
class Reading:
    """What a model makes of windows: nats (W, T) of each target; expert_ids (W, T, K) of each layer."""

    nats: Float[Tensor, "W T"]
    expert_ids: tuple[Int[Tensor, "W T K"], ...]


def domain_windows(data: PackedDataset, seq_len: int, per_domain: int) -> Batch:
    """Windows that each lie in one domain, equally many of all domains, in the order of `domain_names`.

    data: a split, such as `dataset.validation`. As many windows of each domain as the smallest one has, and
    `per_domain` at most; evenly spaced over its documents. Raises ValueError where a domain has no text for
    one window.
    """
    if per_domain < 1:
        raise ValueError(f"per_domain={per_domain} must be at least 1")
    views = []
    for name in data.domain_names:
        try:
            view = data.take_domain(name)
            per_domain = min(per_domain, view.windows_per_epoch(seq_len))
        except ValueError as problem:
            raise ValueError(f"no window of domain {name!r}: {problem}") from None
        views.append(view)
    batches = [view.validation_windows(seq_len, per_domain) for view in views]
    return Batch(
        *(torch.cat([getattr(b, part) for b in batches]) for part in ("tokens", "targets", "domains"))
    )


@torch.no_grad()
def read(model: DeepSeekV2, windows: Batch, *, rows: int = 16, progress: bool = False) -> Reading:
    """The model's loss at every target, and which experts every token goes to, in evaluation; on the CPU.

    rows: how many windows at once.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, chosen = [], []
    try:
        for first in tqdm(range(0, len(windows), rows), desc="reading", leave=False, disable=not progress):
            part = windows[first : first + rows]
            out = model(part.tokens.to(device))
            targets = part.targets.to(device)
            loss = F.cross_entropy(out.logits.float().flatten(0, 1), targets.flatten(), reduction="none")
            nats.append(loss.view_as(targets).cpu())
            chosen.append([routing.expert_ids.cpu() for routing in out.routings])
    finally:
        model.train(was_training)
    return Reading(torch.cat(nats), tuple(torch.cat(layer) for layer in zip(*chosen)))


def nats_by_domain(
    nats: Float[Tensor, "W T"],
    targets: Int[Tensor, "W T"],
    domains: Int[Tensor, "W T"],
    names: list[str],
    *,
    bytewise: bool = True,
) -> dict[str, float]:
    """Nats per byte of each domain, in which special tokens are paid for and bytes alone are counted.

    domains: the number of each token's domain in `names`; those without text are left out. bytewise: the
    ids below 256 are bytes, as with a ByteTokenizer; else nats per token.
    """
    counted = targets < BYTES if bytewise else torch.ones_like(targets, dtype=torch.bool)
    found = {}
    for number, name in enumerate(names):
        here = domains == number
        unit = int((counted & here).sum())
        if unit:
            found[name] = float(nats[here].double().sum()) / unit
    return found


def is_bytewise(model: DeepSeekV2) -> bool:
    """Whether a model reads bytes, so that its loss is one per byte."""
    return isinstance(getattr(model, "tokenizer", None), ByteTokenizer)
