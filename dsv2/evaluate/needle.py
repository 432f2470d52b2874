"""Needle in a haystack: how often a model finds one, by the length of the text and its depth there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dsv2.data.needle import TASK, NeedleTask, needle_prompts

TOKENS_AT_ONCE = 16_384  # of the prompts in one forward pass


@torch.no_grad()
def needle_grid(
    model: nn.Module,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    samples: int = 100,
    seed: int = 0,
    progress: bool = True,
    task: NeedleTask = TASK,
    distractors: int = 8,
) -> dict[str, Any]:
    """The share of needles found in each cell, by greedy answers: the most likely token must be the word.

    model: a DeepSeekV2, or what is called like one. lengths: tokens of a prompt; depths: from 0, the start,
    to 1, right before the question; samples: prompts in a cell, other ones in each, the same for every
    model. Returns lengths, depths, samples, found (prompts answered rightly) and accuracy (found / samples),
    the last two by [length][depth].
    """
    if samples < 1 or not lengths or not depths:
        raise ValueError(f"samples={samples} must be at least 1, with at least one length and one depth")
    if model.cfg.vocab_size < task.vocab_size:
        raise ValueError(
            f"the task has {task.vocab_size} tokens; the model's vocab_size is {model.cfg.vocab_size}"
        )
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    with tqdm(total=len(lengths) * len(depths), unit="cell", disable=None if progress else True) as bar:
        for length in lengths:
            found.append([])
            for depth in depths:
                prompts, answers = needle_prompts(
                    samples, length, depth, task=task, distractors=distractors, generator=generator
                )
                right = 0
                for part, wanted in zip(
                    prompts.split(max(1, TOKENS_AT_ONCE // length)),
                    answers.split(max(1, TOKENS_AT_ONCE // length)),
                ):
                    logits = model(part.to(device), last_only=True).logits[:, 0]
                    right += int((logits.argmax(dim=-1).cpu() == wanted).sum())
                found[-1].append(right)
                bar.update()
    model.train(was_training)
    return {
        "lengths": list(lengths),
        "depths": list(depths),
        "samples": samples,
        "found": found,
        "accuracy": [[count / samples for count in row] for row in found],
    }
