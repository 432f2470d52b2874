"""Pretraining: the paper's optimiser and schedule, exact resume, one process or many.

    data = prepare(find_corpus())
    trainer = train(DSV2Config.preset("tiny"), TrainConfig(steps=500), data, out="runs/first")

The same from a shell: `python -m dsv2.train --preset tiny --steps 500 --out runs/first`.
"""

from __future__ import annotations

from dsv2.train.checkpoint import CheckpointError, find_checkpoints
from dsv2.train.distributed import World, start_world
from dsv2.train.loop import Stopped, train
from dsv2.train.run_directory import RunDirectory, RunDirectoryError, read_lines
from dsv2.train.schedule import (
    DECAY,
    SCHEDULES,
    TrainConfig,
    batch_size_at,
    learning_rate,
    learning_rate_at,
)
from dsv2.train.trainer import NonFiniteError, Trainer, TrainingData

__all__ = [
    "DECAY",
    "SCHEDULES",
    "CheckpointError",
    "NonFiniteError",
    "RunDirectory",
    "RunDirectoryError",
    "Stopped",
    "TrainConfig",
    "Trainer",
    "TrainingData",
    "World",
    "batch_size_at",
    "find_checkpoints",
    "learning_rate",
    "learning_rate_at",
    "read_lines",
    "start_world",
    "train",
]
