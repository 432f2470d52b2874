"""The exercises of chapter 10: cases, right answers, plausible mistakes, hints."""

# E routed experts   D domains   V classes   F features   S steps   R rows of a batch

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.data import ngram
from dsv2.evaluate import preference
from dsv2.train import schedule

DECAY = schedule.DECAY


# ------------------------------------------------------------ 10.1 the learning rate


def at_many_steps(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The rate at each of several moments of a run: pairs of step and tokens seen."""
    rest = {name: value for name, value in arguments.items() if name != "moments"}
    return {
        f"step {step}, {seen:,} of {rest['total_tokens']:,} tokens seen": answer(seen, step=step, **rest)
        for step, seen in arguments["moments"]
    }


def constant_batch(steps: int, of: int, warmup: int, **more: Any) -> dict[str, Any]:
    """`steps` steps of `of` tokens each, looked at around everything that may happen."""
    marks = {0, 1, warmup - 1, warmup, steps - 1}
    for point in more.get("points", (0.6, 0.9)):
        marks |= {math.ceil(point * steps) - 1, math.ceil(point * steps), math.ceil(point * steps) + 1}
    moments = [(step, step * of) for step in sorted(marks) if 0 <= step < steps]
    return {"moments": moments, "total_tokens": steps * of, "peak": 3.0, "warmup": warmup, **more}


def growing_batch() -> dict[str, Any]:
    """Few tokens a step at first: step 60 of 100 is far from 60 % of the tokens."""
    seen = [step * 40 if step < 50 else 2000 + (step - 50) * 160 for step in range(101)]
    moments = [(step, seen[step]) for step in (0, 3, 4, 49, 60, 75, 76, 77, 93, 94, 95, 99)]
    return {"moments": moments, "total_tokens": seen[100], "peak": 5.0, "warmup": 4}


def rates(
    *,
    warm: Callable[[int, int], float] = lambda step, warmup: (step + 1) / warmup,
    warming: Callable[[int, int], bool] = lambda step, warmup: step < warmup,
    reached: Callable[[int, float, int], bool] = lambda seen, point, total: (
        1000 * seen >= round(1000 * point) * total
    ),
    factor: Callable[[int], float] = lambda passed: DECAY**passed,
    both: bool = False,
) -> Callable[..., float]:
    """An answer to 10.1 from its parts."""

    def answer(tokens, total_tokens, *, step, peak, warmup, points=(0.6, 0.9)):
        lowered = factor(sum(reached(tokens, point, total_tokens) for point in points))
        if warming(step, warmup):
            return peak * warm(step, warmup) * (lowered if both else 1.0)
        return peak * lowered

    return answer


def by_steps(tokens, total_tokens, *, step, peak, warmup, points=(0.6, 0.9)):
    # The steps of the whole run, taken from how many tokens the steps so far had on average.
    each = tokens / step if step else total_tokens
    return rates()(step * max(each, 80), total_tokens, step=step, peak=peak, warmup=warmup, points=points)


def straight_down(tokens, total_tokens, *, step, peak, warmup, points=(0.6, 0.9)):
    if step < warmup:
        return peak * (step + 1) / warmup
    first, last = points[0], points[-1]
    done = min(1.0, max(0.0, (tokens / total_tokens - first) / max(last - first, 1e-9)))
    return peak * (1 - done * (1 - DECAY ** len(points)))


LEARNING_RATE_AT = Exercise(
    number="10.1",
    name="learning_rate_at",
    title="the learning rate, by tokens seen",
    difficulty=1,
    minutes=15,
    answer=schedule.learning_rate_at,
    run=at_many_steps,
    cases=(
        Case("40 steps of 50 tokens, 4 of them warm-up", lambda: constant_batch(40, 50, 4)),
        Case(
            "30 steps of 70 tokens, 5 of them warm-up, decays at 80 % and 90 % as V2-Lite has them",
            lambda: constant_batch(30, 70, 5, points=(0.8, 0.9)),
        ),
        Case("100 steps whose batch grows, 4 of them warm-up", growing_batch),
        Case(
            "25 steps of 4 tokens, 3 of them warm-up, decays at 20 %, 40 % and 72 %",
            lambda: constant_batch(25, 4, 3, points=(0.2, 0.4, 0.72)),
        ),
    ),
    mistakes=(
        Mistake(
            "first step stands still",
            "Warm-up gives step 0 a rate of 0: the first batch is computed and nothing moves. Steps count "
            "from 0, and step 0 has peak / warmup.",
            rates(warm=lambda step, warmup: step / warmup),
        ),
        Mistake(
            "no warm-up",
            "The first steps have the full rate. With weights and Adam's averages still raw, that is where a "
            "run goes wrong, so the rate climbs to its peak over `warmup` steps.",
            rates(warming=lambda step, warmup: False),
        ),
        Mistake(
            "warm-up one step too long",
            "Warm-up lasts a step too long: step warmup is no longer part of it, and step warmup - 1 has the "
            "peak.",
            rates(
                warming=lambda step, warmup: step <= warmup,
                warm=lambda step, warmup: (step + 1) / (warmup + 1),
            ),
        ),
        Mistake(
            "reached is not passed",
            "A point counts only once it has been passed. At exactly that share of the tokens it has been "
            "reached, and the next step already has the lower rate.",
            rates(reached=lambda seen, point, total: 1000 * seen > round(1000 * point) * total),
        ),
        Mistake(
            "one decay only",
            "The rate falls once and then stays. Every point that has been reached multiplies it again.",
            rates(factor=lambda passed: DECAY if passed else 1.0),
        ),
        Mistake(
            "a tenth at every point",
            "Each point makes a tenth of the rate. 0.316 is the square root of a tenth: it takes two of "
            "them.",
            rates(factor=lambda passed: 0.1**passed),
        ),
        Mistake(
            "a tenth after the first",
            "The whole fall to a tenth happens at the first point, and nothing at the others.",
            rates(factor=lambda passed: 0.1 if passed else 1.0),
        ),
        Mistake(
            "the root of a tenth",
            "The factor is the exact root of a tenth, 0.3162... The paper's is 0.316.",
            rates(factor=lambda passed: 0.1 ** (passed / 2)),
        ),
        Mistake(
            "a tenth after the second",
            "After two points the rate is an exact tenth of the peak. 0.316 applied twice is a little "
            "less: 0.099856.",
            rates(factor=lambda passed: (1.0, DECAY, 0.1, 0.1 * DECAY)[passed]),
        ),
        Mistake(
            "0.316 subtracted",
            "Every point takes 0.316 of the peak away. It is a factor: what is left after a point is 0.316 "
            "of what there was before.",
            rates(factor=lambda passed: 1 - DECAY * passed),
        ),
        Mistake(
            "0.316 taken off",
            "Every point takes 31.6 % off and leaves 68.4 %. What is left should be 31.6 %.",
            rates(factor=lambda passed: (1 - DECAY) ** passed),
        ),
        Mistake(
            "the paper's points always",
            "60 % and 90 % are written into the code. `points` may be others: V2-Lite has 80 % and 90 %.",
            lambda tokens, total_tokens, *, step, peak, warmup, points=(0.6, 0.9): rates()(
                tokens, total_tokens, step=step, peak=peak, warmup=warmup
            ),
        ),
        Mistake(
            "only two points",
            "Only the first two points are looked at. `points` may have any number.",
            lambda tokens, total_tokens, *, step, peak, warmup, points=(0.6, 0.9): rates()(
                tokens, total_tokens, step=step, peak=peak, warmup=warmup, points=points[:2]
            ),
        ),
        Mistake(
            "shares of steps",
            "The share is one of steps. While the batch grows, steps are not equally long: in the third case "
            "step 60 of 100 has seen far less than 60 % of the tokens.",
            by_steps,
        ),
        Mistake(
            "a straight line down",
            "Between the points the rate falls in a straight line. It falls at once at each point, and stays "
            "level between them.",
            straight_down,
        ),
        Mistake(
            "shares of what is left",
            "A point's share is taken of what is left to read. It is one of all tokens of the run.",
            rates(reached=lambda seen, point, total: seen >= point * (total - seen)),
        ),
    ),
    hints=(
        "A run of 100 tokens, 10 in each step, with a peak of 1 and 2 steps of warm-up. What is the rate of "
        "step 0, 1, 2, 5, 6 and 9?",
        'The notebook\'s section "The learning rate" has it for two points. Two cases: `step < warmup` '
        "goes by steps, all others by the share tokens / total_tokens. Count how many of `points` it has "
        "reached.",
        "if step < warmup: peak * (step + 1) / warmup\n"
        "else: peak * 0.316 ** (how many points have tokens >= point * total_tokens)\n"
        "(safe from rounding: 1000 * tokens >= round(1000 * point) * total_tokens)",
    ),
    checked="warm-up from the first step, decays at any points, reached exactly, by tokens where the batch "
    "grows",
    replaces=("dsv2.train.schedule.learning_rate_at",),
)


# ------------------------------------------------------------ 10.2 the batch ramp


def along_a_ramp(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The batch size at several numbers of tokens."""
    rest = {name: value for name, value in arguments.items() if name != "moments"}
    return {f"{seen:,} tokens seen": answer(seen, **rest) for seen in arguments["moments"]}


def ramp_case(start: int, end: int, ramp_tokens: int, *moments: int, **more: int) -> dict[str, Any]:
    around = (0, 1, ramp_tokens // 2, ramp_tokens - 1, ramp_tokens, ramp_tokens + 1, 3 * ramp_tokens)
    return {
        "moments": sorted({*around, *moments}),
        "start": start,
        "end": end,
        "ramp_tokens": ramp_tokens,
        **more,
    }


def sizes(
    *,
    grow: Callable[[int, int, int, int], float] = lambda tokens, start, end, ramp: (
        start + (end - start) * tokens / ramp
    ),
    whole: Callable[[float, int, int], int] = lambda size, multiple, start: max(
        start, int(size / multiple + 1e-9) * multiple
    ),
    over: Callable[[int, int], bool] = lambda tokens, ramp: tokens >= ramp,
) -> Callable[..., Any]:
    """An answer to 10.2 from its parts."""

    def answer(tokens, *, start, end, ramp_tokens, multiple=1):
        if over(tokens, ramp_tokens):
            return end
        return whole(grow(tokens, start, end, ramp_tokens), multiple, start)

    return answer


BATCH_SIZE_AT = Exercise(
    number="10.2",
    name="batch_size_at",
    title="a batch that grows",
    difficulty=1,
    minutes=15,
    answer=schedule.batch_size_at,
    run=along_a_ramp,
    cases=(
        Case("6 to 30 sequences over 1,000 tokens", lambda: ramp_case(6, 30, 1000, 40, 41, 42, 300, 777)),
        Case(
            "7 to 42 sequences over 900 tokens, in multiples of 4",
            lambda: ramp_case(7, 42, 900, 20, 30, 200, 333, 500, 700, multiple=4),
        ),
        Case(
            "2,304 to 9,216 sequences over 225 tokens (in billions), in multiples of 96",
            lambda: ramp_case(2304, 9216, 225, 3, 4, 75, 110, 200, multiple=96),
        ),
    ),
    mistakes=(
        Mistake(
            "rounded up",
            "Sizes are rounded up to the multiple. Down was asked for: a step then never has more sequences "
            "than the ramp allows.",
            sizes(
                whole=lambda size, multiple, start: max(start, math.ceil(size / multiple - 1e-9) * multiple)
            ),
        ),
        Mistake(
            "rounded to the nearest",
            "Sizes are rounded to the nearest multiple, some of them up. All are to be rounded down.",
            sizes(
                whole=lambda size, multiple, start: max(start, math.floor(size / multiple + 0.5) * multiple)
            ),
        ),
        Mistake(
            "not whole",
            "Some of these are no whole numbers. A batch has whole sequences.",
            sizes(
                whole=lambda size, multiple, start: (
                    size if multiple == 1 else max(start, int(size / multiple + 1e-9) * multiple)
                )
            ),
        ),
        Mistake(
            "multiple not used",
            "`multiple` is not used. Several devices and micro-batches share a batch out evenly, so that not "
            "every size will do.",
            sizes(whole=lambda size, multiple, start: int(size + 1e-9)),
        ),
        Mistake(
            "below the start",
            "Early sizes fall below `start`, where it is no multiple itself. A batch that begins smaller "
            "than its first size has shrunk.",
            sizes(whole=lambda size, multiple, start: int(size / multiple + 1e-9) * multiple),
        ),
        Mistake(
            "multiples from the start",
            "Multiples are counted from `start`: start, start + multiple, ... The size itself is to be a "
            "multiple.",
            sizes(
                whole=lambda size, multiple, start: start + int((size - start) / multiple + 1e-9) * multiple
            ),
        ),
        Mistake(
            "from nothing",
            "The batch grows from nothing to `end` and only shows `start` as its least. The line begins at "
            "`start`.",
            sizes(grow=lambda tokens, start, end, ramp: end * tokens / ramp),
        ),
        Mistake(
            "all of the end on top",
            "The line climbs by `end` instead of by what lies between the two sizes, and overshoots.",
            sizes(grow=lambda tokens, start, end, ramp: start + end * tokens / ramp),
        ),
        Mistake(
            "it never stops",
            "The batch goes on growing after the ramp. From `ramp_tokens` on it is `end`.",
            sizes(over=lambda tokens, ramp: False),
        ),
        Mistake(
            "the end rounded, too",
            "After the ramp the size is rounded to the multiple as well. From `ramp_tokens` on it is `end` "
            "itself.",
            lambda tokens, *, start, end, ramp_tokens, multiple=1: sizes(over=lambda tokens, ramp: False)(
                min(tokens, ramp_tokens), start=start, end=end, ramp_tokens=ramp_tokens, multiple=multiple
            ),
        ),
        Mistake(
            "a step, no ramp",
            "The batch stays at `start` until the ramp is over and then jumps.",
            sizes(grow=lambda tokens, start, end, ramp: start),
        ),
        Mistake(
            "by doubling",
            "The batch grows by a constant factor, slowly first and fast at the end. In proportion to the "
            "tokens it gains equally many sequences every time.",
            sizes(grow=lambda tokens, start, end, ramp: start * (end / start) ** (tokens / ramp)),
        ),
        Mistake(
            "downhill",
            "The batch begins at `end` and shrinks.",
            sizes(grow=lambda tokens, start, end, ramp: end - (end - start) * tokens / ramp),
        ),
    ),
    hints=(
        "10 sequences at first, 30 after 200 tokens. How many after 50, after 100, after 199, after 500? And "
        "in multiples of 4?",
        'The notebook\'s section "The batch" does it for the paper. First the line through (0, start) and '
        "(ramp_tokens, end), then the rounding, then the two bounds. // rounds whole numbers down.",
        "if tokens >= ramp_tokens: end\n"
        "size = start + (end - start) * tokens // ramp_tokens\n"
        "the larger of start and size // multiple * multiple",
    ),
    checked="the line from start to end, both ends, whole sequences, and multiples rounded down, not below "
    "the start",
    replaces=("dsv2.train.schedule.batch_size_at",),
)


# ------------------------------------------------------------ 10.3 nats per byte


def loss_case(seed: int, rows: int, tokens: int, special: int) -> dict[str, Any]:
    """Nats by target, `special` of which are special tokens; byte 0 and byte 255 are among the bytes."""
    generator = torch.Generator().manual_seed(seed)
    nats = 2.5 * torch.rand(rows, tokens, generator=generator, dtype=torch.float64) + 0.1
    targets = torch.randint(1, 255, (rows, tokens), generator=generator)
    flat = targets.view(-1)
    flat[:3] = torch.tensor([0, 0, 255])
    places = torch.randperm(len(flat) - 3, generator=generator)[:special] + 3
    # More of them in one row than in another, and <bos> as well as <eos>.
    flat[places] = 256 + torch.arange(special) % 2
    return {"nats": nats, "targets": targets}


def loss(
    unit: Callable[[Tensor], Tensor | int], paid: Callable[[Tensor], Tensor] | None = None
) -> Callable[..., float]:
    """An answer to 10.3: the nats where `paid`, over `unit` of the targets."""

    def answer(nats, targets):
        nats, targets = torch.as_tensor(nats), torch.as_tensor(targets)
        return float((nats if paid is None else nats[paid(targets)]).sum() / unit(targets))

    return answer


def is_byte(targets: Tensor) -> Tensor:
    return targets < 256


def mean_of_rows(nats, targets):
    return float((nats.sum(dim=1) / is_byte(targets).sum(dim=1)).mean())


NATS_PER_BYTE = Exercise(
    number="10.3",
    name="nats_per_byte",
    title="nats per byte",
    difficulty=1,
    minutes=10,
    answer=ngram.nats_per_byte,
    cases=(
        Case("2 windows of 9 targets, 4 of them special tokens", lambda: loss_case(1, 2, 9, 4)),
        Case("3 windows of 7 targets, 5 of them special tokens", lambda: loss_case(2, 3, 7, 5)),
        Case("1 window of 8 targets without special tokens", lambda: loss_case(3, 1, 8, 0)),
    ),
    mistakes=(
        Mistake(
            "nats per token",
            "This is the mean over all targets: nats per token. Special tokens count as bytes here, which "
            "they are not; the loss looks smaller than it is.",
            loss(lambda targets: targets.numel()),
        ),
        Mistake(
            "special tokens not paid",
            "Special tokens are left out of both sums. The model has to predict where a text ends as well; "
            "those nats are paid.",
            loss(lambda targets: is_byte(targets).sum(), is_byte),
        ),
        Mistake(
            "special tokens counted, not paid",
            "The nats of special tokens are left out, and they still count as bytes. It should be the other "
            "way round.",
            loss(lambda targets: targets.numel(), is_byte),
        ),
        Mistake(
            "nats in all",
            "This is the sum of all nats. It grows with the text; per byte it does not.",
            loss(lambda targets: 1),
        ),
        Mistake(
            "bits per byte",
            "These are bits: divided by ln 2. Nats were asked for.",
            lambda nats, targets: ngram.nats_per_byte(nats, targets) / math.log(2),
        ),
        Mistake(
            "from bits to nats",
            "This was multiplied by ln 2, as if the losses were bits. They are nats already.",
            lambda nats, targets: ngram.nats_per_byte(nats, targets) * math.log(2),
        ),
        Mistake(
            "mean of windows",
            "This is the mean of each window's nats per byte. A window with many special tokens has fewer "
            "bytes and weighs as much as the others; add up first, divide then.",
            mean_of_rows,
        ),
        Mistake(
            "<bos> a byte",
            "Id 256 is counted as a byte. There are 256 bytes, from 0 to 255; 256 is <bos>.",
            loss(lambda targets: (targets <= 256).sum()),
        ),
        Mistake(
            "255 no byte",
            "Id 255 is not counted as a byte. Bytes go from 0 to 255.",
            loss(lambda targets: (targets < 255).sum()),
        ),
        Mistake(
            "0 no byte",
            "Id 0 is not counted as a byte. It is one like the others, here no padding.",
            loss(lambda targets: (is_byte(targets) & (targets > 0)).sum()),
        ),
        Mistake(
            "perplexity",
            "This is e to the power of the loss, the perplexity of a byte. The loss itself was asked for.",
            lambda nats, targets: math.exp(ngram.nats_per_byte(nats, targets)),
        ),
        Mistake(
            "per special token",
            "This divides by the number of special tokens, not of bytes.",
            loss(lambda targets: (~is_byte(targets)).sum().clamp(min=1)),
        ),
    ),
    hints=(
        "A text of 10 bytes and its <eos> cost 22 nats in all. How many nats per token is that, how many per "
        "byte, and which of the two changes if another tokenizer makes 4 tokens of the text?",
        'The notebook\'s section "The loss" does both. All nats are added up; which targets count as bytes '
        "is "
        "targets < 256.",
        "sum of all nats / number of targets below 256",
    ),
    checked="all nats paid, bytes alone counted, 0 and 255 among them, over all windows together",
    replaces=("dsv2.data.ngram.nats_per_byte",),
)


# ------------------------------------------------------------ 10.4 clipping


def clip_case(seed: int, limit: float, *shapes: tuple[int, ...] | None, scale: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    made = [None if s is None else scale * torch.randn(s, generator=generator) for s in shapes]
    return {"gradients": made, "limit": limit}


def clipped(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Run on copies; a norm that is a plain number will do."""
    copies = [None if g is None else g.clone() for g in arguments["gradients"]]
    result = answer(copies, arguments["limit"])
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], (int, float)):
        result = (result[0], torch.tensor(float(result[1])))
    return result


def right_clip(gradients, limit):
    there = [g for g in gradients if g is not None]
    norm = torch.cat([g.flatten() for g in there]).norm()
    return scaled(gradients, min(1.0, limit / float(norm)) if norm > 0 else 1.0), norm


def scaled(gradients, factor):
    return [None if g is None else g * factor for g in gradients]


def with_norm(norm_of: Callable[[list[Tensor]], Tensor]) -> Callable[..., Any]:
    """An answer to 10.4 with another norm."""

    def answer(gradients, limit):
        norm = norm_of([g for g in gradients if g is not None])
        return scaled(gradients, (limit / norm).clamp(max=1.0)), norm

    return answer


def each_by_itself(gradients, limit):
    _, norm = right_clip(gradients, limit)
    return [None if g is None else g * (limit / g.norm()).clamp(max=1.0) for g in gradients], norm


def each_value(gradients, limit):
    _, norm = right_clip(gradients, limit)
    return [None if g is None else g.clamp(-limit, limit) for g in gradients], norm


def always_to_the_limit(gradients, limit):
    _, norm = right_clip(gradients, limit)
    return scaled(gradients, limit / norm), norm


def norm_after(gradients, limit):
    done, _ = right_clip(gradients, limit)
    return done, right_clip(done, limit)[1]


def none_to_zero(gradients, limit):
    done, norm = right_clip(gradients, limit)
    return [torch.zeros(1) if g is None else g for g in done], norm


CLIP_BY_GLOBAL_NORM = Exercise(
    number="10.4",
    name="clip_by_global_norm",
    title="clipping by the norm of all gradients",
    difficulty=2,
    minutes=20,
    answer=right_clip,
    run=clipped,
    cases=(
        Case(
            "gradients of 3 weights and one without, longer than the limit of 1",
            lambda: clip_case(1, 1.0, (3, 4), None, (5,), (2, 3, 2)),
        ),
        Case("2 gradients shorter than the limit of 50", lambda: clip_case(2, 50.0, (4, 3), (6,))),
        Case("3 long gradients, the limit 2.5", lambda: clip_case(3, 2.5, (7,), (2, 5), (3,), scale=4.0)),
        Case(
            "2 gradients that are all zero, the limit 1", lambda: clip_case(4, 1.0, (3,), (2, 2), scale=0.0)
        ),
    ),
    mistakes=(
        Mistake(
            "each tensor by itself",
            "Every tensor was clipped by its own norm. That changes the direction of the step: a weight with "
            "a large gradient loses more than its neighbours. One factor is for all.",
            each_by_itself,
        ),
        Mistake(
            "each value by itself",
            "Single numbers were cut off at the limit. That changes the direction of the step; the length of "
            "the whole gradient is what is limited.",
            each_value,
        ),
        Mistake(
            "always to the limit",
            "Gradients shorter than the limit were stretched to it (and zeros became NaN). Clipping only "
            "shortens.",
            always_to_the_limit,
        ),
        Mistake(
            "no root",
            "This norm is the sum of the squares, without the root.",
            with_norm(lambda there: torch.stack([(g**2).sum() for g in there]).sum()),
        ),
        Mistake(
            "norms added up",
            "The norms of the tensors were added up. Lengths add up only along one line: squares are what "
            "adds.",
            with_norm(lambda there: torch.stack([g.norm() for g in there]).sum()),
        ),
        Mistake(
            "sum of absolute values",
            "This norm is the sum of the absolute values. The Euclidean one is meant: the root of the sum of "
            "the squares.",
            with_norm(lambda there: torch.stack([g.abs().sum() for g in there]).sum()),
        ),
        Mistake(
            "largest value",
            "The largest absolute value was taken for the norm.",
            with_norm(lambda there: torch.stack([g.abs().max() for g in there]).max()),
        ),
        Mistake(
            "largest norm",
            "The norm of the longest tensor was taken for that of all.",
            with_norm(lambda there: torch.stack([g.norm() for g in there]).max()),
        ),
        Mistake(
            "mean of the squares",
            "The squares were averaged, not added up: a large model's norm then looks as small as a small "
            "one's.",
            with_norm(lambda there: torch.cat([g.flatten() for g in there]).square().mean().sqrt()),
        ),
        Mistake(
            "the norm afterwards",
            "The norm returned is that after clipping. Asked for is the one before, the one that tells of a "
            "bad batch.",
            norm_after,
        ),
        Mistake(
            "divided by the norm",
            "Long gradients were divided by the norm: they come out with the length 1, whatever the limit.",
            lambda gradients, limit: (
                scaled(gradients, 1 / right_clip(gradients, limit)[1].clamp(min=limit))
                if right_clip(gradients, limit)[1] > limit
                else gradients,
                right_clip(gradients, limit)[1],
            ),
        ),
        Mistake(
            "not clipped",
            "The norm is right, and the gradients come out as they went in.",
            lambda gradients, limit: (gradients, right_clip(gradients, limit)[1]),
        ),
        Mistake(
            "None became a number",
            "A weight without a gradient got one of zeros. It stays None: the optimiser then leaves that "
            "weight alone, moments and decay included.",
            none_to_zero,
        ),
        Mistake(
            "None left out",
            "The weight without a gradient is missing from the list, and all after it have moved up. It "
            "stays in its place, as None.",
            lambda gradients, limit: (
                [g for g in right_clip(gradients, limit)[0] if g is not None],
                right_clip(gradients, limit)[1],
            ),
        ),
    ),
    hints=(
        "Two weights have the gradients (3, 4) and (12). How long is the vector (3, 4, 12)? By what is each "
        "number multiplied so that it is half as long? And if the limit were 20?",
        'The notebook\'s section "Clipping" does it. Squares add up over tensors, lengths do not. One factor '
        "for "
        "all tensors, at most 1. Leave None where it is.",
        "norm = sqrt(sum over the tensors that are there of (gradient ** 2).sum())\n"
        "factor = (limit / norm).clamp(max=1.0)\n"
        "[None if it is None, else gradient * factor], norm",
    ),
    checked="one norm over all tensors, one factor, nothing stretched, zeros, and weights without a gradient",
)


# ------------------------------------------------------------ 10.5 a training step


def steps_case(seed: int, steps: int, rows: int, features: int, classes: int, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randn(classes, features, generator=generator)
    inputs = torch.randn(steps, rows, features, generator=generator)
    return {
        "weight": 0.3 * torch.randn(classes, features, generator=generator),
        "inputs": inputs,
        "classes": (inputs @ rule.T).argmax(dim=-1),
        **more,
    }


def slope(weight: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of x (R, F) and its gradient by the weight (V, F), without autograd."""
    p = (x @ weight.T).softmax(dim=-1)
    loss = -p.gather(1, y[:, None]).log().mean()
    return loss, (p - F.one_hot(y, p.shape[1])).T @ x / len(x)


def stepping(
    *,
    gather: Callable[[list[Tensor]], Tensor] = lambda parts: torch.stack(parts).mean(dim=0),
    clip_parts: bool = False,
    kept: bool = False,
    clip: Callable[[Tensor, float], Tensor] = lambda g, limit: g * (limit / g.norm()).clamp(max=1.0),
    tell: Callable[[list[Tensor]], Tensor] = lambda losses: torch.stack(losses).mean(),
    sign: float = -1.0,
    part_steps: bool = False,
    first_part_only: bool = False,
    tell_after: bool = False,
) -> Callable[..., Any]:
    """An answer to 10.5 with something else in one place."""

    def answer(weight, inputs, classes, *, micro_batches, lr, limit):
        told, left = [], torch.zeros_like(weight)
        for rows, labels in zip(inputs, classes):
            parts, losses = [], []
            chunks = list(zip(rows.chunk(micro_batches), labels.chunk(micro_batches)))
            if first_part_only:
                chunks = chunks[:1]
            for x, y in chunks:
                loss, gradient = slope(weight, x, y)
                losses.append(loss)
                parts.append(clip(gradient, limit) if clip_parts else gradient)
                if part_steps:
                    weight = weight - lr * clip(gradient / micro_batches, limit)
            if not part_steps:
                gradient = gather(parts) + left
                left = gradient if kept else left
                weight = weight + sign * lr * (gradient if clip_parts else clip(gradient, limit))
            told.append(slope(weight, rows, labels)[0] if tell_after else tell(losses))
        return weight, torch.stack(told)

    return answer


RIGHT_STEPS = stepping()


TRAIN_STEPS = Exercise(
    number="10.5",
    name="train_steps",
    title="a training step in parts",
    difficulty=2,
    minutes=20,
    answer=RIGHT_STEPS,
    cases=(
        Case(
            "3 steps of 8 rows in 4 parts, 5 features, 6 classes, a limit that is never reached",
            lambda: steps_case(1, 3, 8, 5, 6, micro_batches=4, lr=0.7, limit=100.0),
        ),
        Case(
            "4 steps of 6 rows in 2 parts, 7 features, 3 classes, clipped to 0.2",
            lambda: steps_case(2, 4, 6, 7, 3, micro_batches=2, lr=0.9, limit=0.2),
        ),
        Case(
            "2 steps of 9 rows in 3 parts, 4 features, 5 classes, clipped to 0.6",
            lambda: steps_case(3, 2, 9, 4, 5, micro_batches=3, lr=1.3, limit=0.6),
        ),
    ),
    mistakes=(
        Mistake(
            "only the last part",
            "Only the last part of every batch has an effect: the gradient is cleared before each part, and "
            "what the parts before it left is lost. The losses fall all the same, more slowly.",
            stepping(gather=lambda parts: parts[-1] / len(parts)),
        ),
        Mistake(
            "never cleared",
            "The gradient is never cleared: each step also moves along those of all steps before it.",
            stepping(kept=True),
        ),
        Mistake(
            "parts added up",
            "The parts' gradients are added up undivided, so that the step is as many times too long as "
            "there are parts. Each part's loss is a mean over its own rows; the batch's is the mean of "
            "those.",
            stepping(gather=lambda parts: torch.stack(parts).sum(dim=0)),
        ),
        Mistake(
            "nothing divided",
            "Gradients and losses of the parts are added up undivided. Each part's loss is a mean over its "
            "own rows; divided by `micro_batches`, they add up to the mean of the batch.",
            stepping(
                gather=lambda parts: torch.stack(parts).sum(dim=0),
                tell=lambda losses: torch.stack(losses).sum(),
            ),
        ),
        Mistake(
            "divided twice",
            "The gradient is divided by the number of parts twice.",
            stepping(gather=lambda parts: torch.stack(parts).mean(dim=0) / len(parts)),
        ),
        Mistake(
            "each part clipped",
            "Every part's gradient is clipped, then they are averaged. The result depends on how many parts "
            "there are; the sum is what has to be clipped, once.",
            stepping(clip_parts=True),
        ),
        Mistake(
            "not clipped",
            "The gradient is not clipped, or only after the weight has moved.",
            stepping(clip=lambda gradient, limit: gradient),
        ),
        Mistake(
            "always to the limit",
            "The gradient is stretched to the limit where it is shorter. Clipping only shortens.",
            stepping(clip=lambda gradient, limit: gradient * limit / gradient.norm()),
        ),
        Mistake(
            "each value clipped",
            "Single numbers of the gradient are cut off at the limit; its length is what is limited.",
            stepping(clip=lambda gradient, limit: gradient.clamp(-limit, limit)),
        ),
        Mistake(
            "a step for each part",
            "The weight moves after every part, so that later parts see another weight. A batch is one step, "
            "however many parts it is computed in.",
            stepping(part_steps=True),
        ),
        Mistake(
            "uphill",
            "The weight moves along the gradient, and the loss climbs. It falls against the gradient.",
            stepping(sign=1.0),
        ),
        Mistake(
            "loss of the last part",
            "The weights are right; the loss told is that of the last part alone, not of the batch.",
            stepping(tell=lambda losses: losses[-1]),
        ),
        Mistake(
            "losses added up",
            "The weights are right; the losses of the parts are added up, where their mean is the batch's.",
            stepping(tell=lambda losses: torch.stack(losses).sum()),
        ),
        Mistake(
            "loss after the step",
            "The weights are right; the loss told is the one after the step, on rows that have just been "
            "learned.",
            stepping(tell_after=True),
        ),
        Mistake(
            "first part only",
            "Only the first part of every batch is looked at, in weight and loss.",
            stepping(first_part_only=True),
        ),
    ),
    hints=(
        "Take a batch of two rows, in one part and in two. Which gradient is in weight.grad when the weight "
        "moves, in either case? Should they differ?",
        "backward() adds to weight.grad; it does not replace what is there. When has the gradient of a whole "
        "batch been gathered, and when may it be thrown away?",
        "for every batch: clear the gradient\n"
        "    for every part: loss of the part / micro_batches, backward (adds)\n"
        "    clip the sum once, move the weight",
    ),
    checked="the same step for any number of parts: gradients gathered over one batch, clipped once, "
    "and the batch's own loss",
    axes=(("class", "feature"), ("step",)),
    tolerance=1e-4,
    given="only the last part",
)


# ------------------------------------------------------------ 10.6 mutual information


def counts_case(seed: int, domains: int, experts: int, choices: int, empty: int = 0) -> dict[str, Any]:
    """Choices of experts that have favourites; the first `empty` cells of each row but one are 0."""
    generator = torch.Generator().manual_seed(seed)
    liking = torch.randn(domains, experts, generator=generator).exp()
    liking = liking * torch.tensor([1.0 + 2 * d for d in range(domains)])[:, None]  # unequal domains
    for row in range(1, domains):
        liking[row, (row * 2) % experts : (row * 2) % experts + empty] = 0.0
    drawn = torch.multinomial(liking.flatten(), choices, replacement=True, generator=generator)
    return {"counts": torch.bincount(drawn, minlength=domains * experts).view(domains, experts)}


def joint_of(counts: Tensor) -> Tensor:
    return counts.double() / counts.sum()


def entropy(p: Tensor) -> float:
    return float(torch.special.entr(p).sum())


def parts_of(counts: Tensor) -> tuple[float, float, float]:
    """Entropies of the domains, of the experts, and of both together."""
    joint = joint_of(counts)
    return entropy(joint.sum(dim=1)), entropy(joint.sum(dim=0)), entropy(joint)


def right_information(counts: Tensor) -> float:
    domains, experts, both = parts_of(counts)
    return domains + experts - both


def summed(term: Callable[[Tensor, Tensor], Tensor], seen_only: bool = True) -> Callable[..., float]:
    """An answer to 10.6: `term` of p(d, e) and p(d) p(e), summed over the cells."""

    def answer(counts):
        joint = joint_of(counts)
        apart = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
        if seen_only:
            joint, apart = joint[counts > 0], apart[counts > 0]
        return float(term(joint, apart).sum())

    return answer


def against_even(counts: Tensor) -> float:
    joint = joint_of(counts)
    return math.log(joint.numel()) - entropy(joint)


def even_experts(counts: Tensor) -> float:
    """As if all experts were equally busy over the text as a whole."""
    rows = counts.double() / counts.sum(dim=1, keepdim=True)
    share = joint_of(counts).sum(dim=1)
    return float(sum(s * (math.log(counts.shape[1]) - entropy(row)) for s, row in zip(share, rows)))


def even_domains(counts: Tensor) -> float:
    """As if all domains had equally many choices."""
    rows = counts.double() / counts.sum(dim=1, keepdim=True)
    return right_information(rows / len(rows))


MUTUAL_INFORMATION = Exercise(
    number="10.6",
    name="mutual_information",
    title="what an expert tells of the domain",
    difficulty=2,
    minutes=25,
    answer=preference.mutual_information,
    cases=(
        Case("400 choices, 4 domains of unequal size, 7 experts", lambda: counts_case(1, 4, 7, 400)),
        Case(
            "300 choices, 3 domains, 8 experts, some of which a domain never chose",
            lambda: counts_case(2, 3, 8, 300, empty=3),
        ),
        Case("150 choices, 5 domains, 2 experts", lambda: counts_case(3, 5, 2, 150)),
    ),
    mistakes=(
        Mistake(
            "NaN from empty cells",
            "Somewhere 0 was multiplied by ln 0, which is no number. A cell without a count adds nothing.",
            summed(lambda p, q: p * (p / q).log(), seen_only=False),
        ),
        Mistake(
            "bits",
            "These are bits: the logarithm to base 2. Nats were asked for.",
            lambda counts: right_information(counts) / math.log(2),
        ),
        Mistake(
            "counts for shares",
            "The shares in front of the logarithm are counts: this grows with the amount of text. Divide by "
            "all counts.",
            lambda counts: right_information(counts) * float(counts.sum()),
        ),
        Mistake(
            "no weights",
            "The logarithms were added up as they are. Each is weighted by how often its cell occurs, p(d, "
            "e).",
            summed(lambda p, q: (p / q).log()),
        ),
        Mistake(
            "weighted by the product",
            "The logarithms are weighted by p(d) p(e), what would be if there were no preference. The cells "
            "that occur are to be weighted by how often they do.",
            summed(lambda p, q: q * (p / q).log()),
        ),
        Mistake(
            "sign",
            "The ratio stands upside down: the result is negative. Information is never below 0.",
            summed(lambda p, q: p * (q / p).log()),
        ),
        Mistake(
            "absolute values",
            "The terms were added up as absolute values. Those of experts that a domain avoids are negative, "
            "and belong in the sum as they are.",
            summed(lambda p, q: (p * (p / q).log()).abs()),
        ),
        Mistake(
            "entropy of both together",
            "This is the joint entropy of domain and expert, how uncertain the pair is. It is large where "
            "there is no preference at all.",
            lambda counts: parts_of(counts)[2],
        ),
        Mistake(
            "what is left uncertain",
            "This is how uncertain the domain still is once the expert is known, H(D|E). The information is "
            "what has gone of its entropy.",
            lambda counts: parts_of(counts)[2] - parts_of(counts)[1],
        ),
        Mistake(
            "what is left uncertain of the expert",
            "This is how uncertain the expert still is once the domain is known, H(E|D).",
            lambda counts: parts_of(counts)[2] - parts_of(counts)[0],
        ),
        Mistake(
            "against an even table",
            "The table was compared with one in which all cells are equal. Then busy experts and large "
            "domains count as preference; compare with p(d) p(e).",
            against_even,
        ),
        Mistake(
            "against evenly busy experts",
            "Each domain's choices were compared with evenly busy experts. An expert that all domains like "
            "is busy, and tells nothing of the domain; compare with the experts' own shares p(e).",
            even_experts,
        ),
        Mistake(
            "domains made equal",
            "Every domain was given the same weight. The rows were divided by their own sums; p(d, e) is a "
            "share of all counts.",
            even_domains,
        ),
        Mistake(
            "share of the most possible",
            "This is divided by the entropy of the domains: a share between 0 and 1. Nats were asked for.",
            lambda counts: right_information(counts) / parts_of(counts)[0],
        ),
        Mistake(
            "one added to every cell",
            "Every cell got a count more, perhaps to keep zeros out. That changes the table; cells without a "
            "count are left out of the sum.",
            lambda counts: right_information(counts + 1),
        ),
        Mistake(
            "chance taken off",
            "What chance shows was subtracted. That is worth doing, and comes after: here it is the table's "
            "own.",
            lambda counts: right_information(counts) - preference.expected_information(counts),
        ),
    ),
    hints=(
        "Two domains, two experts. In which table of 20 choices does the expert say everything about the "
        "domain, in which nothing? Is an expert that everybody chooses a hint at any domain?",
        'The notebook\'s section "How much an expert tells" does it with loops. p = counts / counts.sum() '
        "first; "
        "row and column sums with keepdim=True multiply into a table of p(d) p(e). Only then take the cells "
        "with a count.",
        "p = counts / sum of all counts\n"
        "q[d, e] = (sum of row d of p) * (sum of column e of p)\n"
        "sum over the cells with p > 0 of p * ln(p / q)",
    ),
    checked="shares of all counts, unequal domains and experts, empty cells, and nats",
    replaces=("dsv2.evaluate.preference.mutual_information",),
)


EXERCISES: tuple[Exercise, ...] = (
    LEARNING_RATE_AT,
    BATCH_SIZE_AT,
    NATS_PER_BYTE,
    CLIP_BY_GLOBAL_NORM,
    TRAIN_STEPS,
    MUTUAL_INFORMATION,
)
