"""What exercises of chapters 06 and 07 share: an answer that is a Routing, taken apart to be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv2.moe.routing import Routing


def with_slope(answer: Callable[..., Any], arguments: Mapping[str, Any], scores_too: bool = False) -> Any:
    """The routing's parts, and the gradient of a weighted sum of its weights by the affinities.

    scores_too: also whether the scores that came back carry a gradient.
    """
    with torch.enable_grad():
        scores = arguments["scores"].clone().requires_grad_()
        made = answer(**{**arguments, "scores": scores})
        if not isinstance(made, Routing):
            return made
        slope, weights = torch.zeros_like(scores), made.weights
        if isinstance(weights, Tensor) and weights.requires_grad:
            rising = torch.arange(1.0, 1 + weights.shape[-1])
            (found,) = torch.autograd.grad((weights * rising).sum(), scores, allow_unused=True)
            slope = slope if found is None else found
    parts = {
        "expert_ids": made.expert_ids,
        "weights": weights.detach(),
        "scores": made.scores.detach(),
        "the gradient of weights by scores": slope,
    }
    if scores_too:
        parts["whether scores carry a gradient"] = made.scores.requires_grad
    return parts
