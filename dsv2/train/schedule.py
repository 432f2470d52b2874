"""How a run is set up: `TrainConfig`, learning rate and batch size as pure functions of the tokens seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

DECAY_POINTS = {"deepseek-v2": (0.6, 0.9), "deepseek-v2-lite": (0.8, 0.9)}
DECAY = 0.316  # sqrt(0.1): two decays make a tenth (section 3.1.2)
COSINE_FLOOR = 0.1
WSD_STABLE = 0.8
SCHEDULES = (*DECAY_POINTS, "wsd", "cosine", "constant")
DTYPES = ("float32", "bfloat16")
WARMUP_SHARE = 0.02
RAMP_SHARE = 225 / 8100  # the batch grows over the first 225B of 8.1T tokens (section 3.1.2)


def learning_rate_at(
    tokens: int,
    total_tokens: int,
    *,
    step: int,
    peak: float,
    warmup: int,
    points: tuple[float, ...] = (0.6, 0.9),
) -> float:
    """The paper's learning rate for a step before which `tokens` of `total_tokens` have been seen.

    Linear warm-up over the first `warmup` steps, counted from `step` 0, which has peak / warmup; then `peak`,
    times 0.316 for every one of `points`, shares of the tokens, that has been reached (section 3.1.2).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    # In whole numbers: 0.6 * 10 is 6.000000000000001 in some orders of evaluation.
    passed = sum(round(point * 1000) * total_tokens <= 1000 * tokens for point in points)
    return peak * DECAY**passed


def batch_size_at(tokens: int, *, start: int, end: int, ramp_tokens: int, multiple: int = 1) -> int:
    """The sequences in a step before which `tokens` tokens have been seen.

    It grows in proportion to the tokens, from `start` at the first to `end` at `ramp_tokens`, rounded down to
    a multiple of `multiple`, and stays there (section 3.1.2: from 2,304 to 9,216 over the first 225B tokens,
    "gradually"; that this is a straight line is our reading).
    """
    if tokens >= ramp_tokens:
        return end
    size = start + (end - start) * tokens // ramp_tokens
    return max(start, size // multiple * multiple)


@lru_cache(maxsize=64)
def ramp_sequences(start: int, end: int, ramp_tokens: int, seq_len: int, multiple: int) -> tuple[int, ...]:
    """(steps of the ramp + 1,): the sequences before each of its steps, and before the first after it."""
    before = [0]
    while (tokens := before[-1] * seq_len) < ramp_tokens:
        size = batch_size_at(tokens, start=start, end=end, ramp_tokens=ramp_tokens, multiple=multiple)
        before.append(before[-1] + size)
    return tuple(before)


def learning_rate(
    step: int,
    total: int,
    *,
    peak: float,
    warmup: int,
    schedule: str = "deepseek-v2",
    tokens_before: Callable[[int], int] | None = None,
) -> float:
    """The learning rate of step `step` (from 0) out of `total`.

    tokens_before(n): the tokens of the first n steps; None: every step has equally many. Linear warm-up over
    `warmup` steps to `peak`, then by the share of the tokens seen so far:

    deepseek-v2         x 0.316 at 60 % and again at 90 % (section 3.1.2)
    deepseek-v2-lite    x 0.316 at 80 % and again at 90 % (appendix B.1)
    wsd                 constant up to 80 %, then linearly to nothing
    cosine              half a cosine down to a tenth
    constant            stays at the peak

    Raises ValueError for a step outside 0 .. total - 1 or an unknown schedule.
    """
    if not 0 <= step < total:
        raise ValueError(f"step={step} lies outside a run of {total} steps (0 to {total - 1})")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    seen, whole, warmed = (step, total, warmup)
    if tokens_before is not None:
        seen, whole, warmed = (tokens_before(n) for n in (step, total, min(warmup, total)))
    if step < warmup or schedule in DECAY_POINTS:
        points = DECAY_POINTS.get(schedule, ())
        return learning_rate_at(seen, whole, step=step, peak=peak, warmup=warmup, points=points)
    if schedule == "wsd":
        return peak * min(1.0, (1 - seen / whole) / (1 - WSD_STABLE))
    if schedule == "cosine":
        done = (seen - warmed) / max(1, whole - warmed)
        return peak * (COSINE_FLOOR + (1 - COSINE_FLOOR) * (1 + math.cos(math.pi * done)) / 2)
    return peak


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes, apart from the model and the data.

    Values that make no sense are refused together, in one ValueError. Fields left at None get a value that
    fits `steps` as soon as the object is made, so that a later copy with more steps keeps it.
    """

    # How long, and on how much at once
    steps: int = 1000
    batch_size: int = 16  # sequences in one optimiser step, over all processes; with a ramp: at its start
    seq_len: int = 256
    batch_ramp_to: int | None = None  # the batch grows to so many (section 3.1.2); None: it does not
    batch_ramp_tokens: int | None = None  # over so many tokens; None: the paper's share of the longest run
    batch_ramp_multiple: int | None = None  # in multiples of so many; None: what divides both ends
    micro_batches: int = 1  # the batch is computed in this many parts, to save memory

    # The optimiser: AdamW with the paper's values (section 3.1.2)
    lr: float = 1e-3
    schedule: str = "deepseek-v2"
    warmup_steps: int | None = None  # None: 2 % of the steps
    weight_decay: float = 0.1  # of matrices, not of norms
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # largest norm of the gradient

    # How it is computed
    seed: int = 0  # of the first weights, the order of the data, and token dropping
    dtype: str = "float32"  # "bfloat16": computed in bf16 from float32 master weights
    checkpoint_blocks: bool = False
    compile: bool = False
    deterministic: bool = False  # bitwise repeatable on a GPU too, where the fast kernels are not

    # What is looked at and kept; 0 means never
    validate_every: int | None = None  # None: ten times a run
    validation_windows: int = 64
    sample_every: int | None = None  # None: as often as validation
    save_every: int | None = None  # None: ten times a run
    keep: int = 2  # checkpoints
    milestone_every: int = 0  # checkpoints at multiples of this stay

    def __post_init__(self) -> None:
        problems = [*_type_problems(self)] or [*_value_problems(self)]
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise ValueError(f"these training settings do not work:\n{lines}")
        tenth = max(1, round(self.steps / 10))
        defaults = {
            "warmup_steps": max(1, round(WARMUP_SHARE * self.steps)),
            "validate_every": tenth,
            "save_every": tenth,
        }
        if self.batch_ramp_to is not None:
            most = self.steps * self.batch_ramp_to * self.seq_len
            defaults["batch_ramp_tokens"] = max(1, round(RAMP_SHARE * most))
            defaults["batch_ramp_multiple"] = math.gcd(self.batch_size, self.batch_ramp_to)
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.sample_every is None:
            object.__setattr__(self, "sample_every", self.validate_every)

    @property
    def largest_batch(self) -> int:
        """Sequences in the last step, which has as many as any."""
        return self.batch_size if self.batch_ramp_to is None else self.batch_size_of(self.steps - 1)

    def sequences_before(self, step: int) -> int:
        """Sequences in the first `step` steps: where in the data step `step` begins, whatever came before."""
        if self.batch_ramp_to is None:
            return step * self.batch_size
        before = self._ramp()
        last = min(step, len(before) - 1)
        return before[last] + (step - last) * self.batch_ramp_to

    def tokens_before(self, step: int) -> int:
        """Tokens in the first `step` steps."""
        return self.sequences_before(step) * self.seq_len

    def batch_size_of(self, step: int) -> int:
        """Sequences in step `step` (from 0), over all processes."""
        return self.sequences_before(step + 1) - self.sequences_before(step)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        return learning_rate(
            step,
            self.steps,
            peak=self.lr,
            warmup=self.warmup_steps,
            schedule=self.schedule,
            tokens_before=None if self.batch_ramp_to is None else self.tokens_before,
        )

    def _ramp(self) -> tuple[int, ...]:
        ends = (self.batch_size, self.batch_ramp_to, self.batch_ramp_tokens)
        return ramp_sequences(*ends, self.seq_len, self.batch_ramp_multiple)

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types; `TrainConfig(**fields)` reads them back. Those of a ramp only if
        there is one.
        """
        fields = dataclasses.asdict(self)
        if self.batch_ramp_to is None:
            fields = {name: value for name, value in fields.items() if not name.startswith("batch_ramp")}
        return fields


def _type_problems(config: TrainConfig):
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type.split(" |")[0]
        if value is None and "None" in field.type:
            continue
        if kind == "int" and (not isinstance(value, int) or isinstance(value, bool)):
            yield f"{field.name}={value!r} must be an integer"
        elif kind == "float" and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
        ):
            yield f"{field.name}={value!r} must be a finite number"
        elif kind == "bool" and not isinstance(value, bool):
            yield f"{field.name}={value!r} must be true or false"
        elif kind == "str" and not isinstance(value, str):
            yield f"{field.name}={value!r} must be a string"


def _value_problems(config: TrainConfig):
    for name in ("steps", "batch_size", "seq_len", "micro_batches", "keep"):
        if getattr(config, name) < 1:
            yield f"{name}={getattr(config, name)} must be at least 1"
    at_least_zero = "warmup_steps weight_decay validate_every validation_windows sample_every save_every "
    for name in (at_least_zero + "milestone_every seed").split():
        if (getattr(config, name) or 0) < 0:
            yield f"{name}={getattr(config, name)} must not be negative"
    for name in ("lr", "eps", "clip"):
        if getattr(config, name) <= 0:
            yield f"{name}={getattr(config, name)} must be greater than 0"
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(config, name) < 1:
            yield f"{name}={getattr(config, name)} must lie in [0, 1)"
    if config.schedule not in SCHEDULES:
        yield f"schedule={config.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}"
    if config.dtype not in DTYPES:
        yield f"dtype={config.dtype!r} is unknown; choose one of {', '.join(DTYPES)}"
    if config.micro_batches >= 1 and config.batch_size % config.micro_batches:
        yield (
            f"batch_size={config.batch_size} must be a multiple of micro_batches={config.micro_batches}, "
            "as the micro-batches are equally large"
        )
    yield from _ramp_problems(config)


def _ramp_problems(config: TrainConfig):
    end, tokens, multiple = config.batch_ramp_to, config.batch_ramp_tokens, config.batch_ramp_multiple
    if end is None:
        for name in ("batch_ramp_tokens", "batch_ramp_multiple"):
            if getattr(config, name) is not None:
                yield f"{name}={getattr(config, name)} needs batch_ramp_to, the batch size that is ramped to"
        return
    if end < config.batch_size:
        yield f"batch_ramp_to={end} must be at least batch_size={config.batch_size}: the batch grows"
    if tokens is not None and tokens < 1:
        yield f"batch_ramp_tokens={tokens} must be at least 1"
    if multiple is not None and multiple < 1:
        yield f"batch_ramp_multiple={multiple} must be at least 1"
    elif config.micro_batches >= 1 and (multiple or math.gcd(config.batch_size, end)) % config.micro_batches:
        yield (
            f"batch_ramp_multiple={multiple or math.gcd(config.batch_size, end)} must be a multiple of "
            f"micro_batches={config.micro_batches}, as the micro-batches are equally large"
        )
    elif multiple is not None and (config.batch_size % multiple or end % multiple):
        yield (
            f"batch_ramp_multiple={multiple} must divide batch_size={config.batch_size} and "
            f"batch_ramp_to={end}"
        )
