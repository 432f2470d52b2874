"""How a run is set up: `TrainConfig`, and the learning rate as a pure function of the step."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

DECAY_POINTS = {"deepseek-v2": (0.6, 0.9), "deepseek-v2-lite": (0.8, 0.9)}
DECAY = 0.316  # sqrt(0.1): two decays make a tenth (section 3.1.2)
COSINE_FLOOR = 0.1
WSD_STABLE = 0.8
SCHEDULES = (*DECAY_POINTS, "wsd", "cosine", "constant")
DTYPES = ("float32", "bfloat16")
WARMUP_SHARE = 0.02


def learning_rate(step: int, total: int, *, peak: float, warmup: int, schedule: str = "deepseek-v2") -> float:
    """The learning rate of step `step` (from 0) out of `total`.

    Linear warm-up over `warmup` steps to `peak`, then by the share of the tokens seen so far, which is
    step / total as every step has equally many:

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
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule in DECAY_POINTS:
        # In whole numbers: 0.6 * 10 is 6.000000000000001 in some orders of evaluation.
        passed = sum(round(point * 10) * total <= 10 * step for point in DECAY_POINTS[schedule])
        return peak * DECAY**passed
    if schedule == "wsd":
        return peak * min(1.0, (1 - step / total) / (1 - WSD_STABLE))
    if schedule == "cosine":
        done = (step - warmup) / max(1, total - warmup)
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
    batch_size: int = 16  # sequences in one optimiser step, over all processes
    seq_len: int = 256
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
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.sample_every is None:
            object.__setattr__(self, "sample_every", self.validate_every)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (from 0)."""
        return learning_rate(step, self.steps, peak=self.lr, warmup=self.warmup_steps, schedule=self.schedule)

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types; `TrainConfig(**fields)` reads them back."""
        return dataclasses.asdict(self)


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
