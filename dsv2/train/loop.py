"""Running a `Trainer` to its end: what the reader sees meanwhile, and how a run is stopped in order."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dsv2.config import DSV2Config
from dsv2.train.schedule import TrainConfig
from dsv2.train.trainer import Trainer, TrainingData

LINE_SECONDS = 10
DISPLAYS = ("auto", "bar", "lines", "none")


class Stopped(Exception):
    """A run that ended before its last step, after saving; `status` is the exit status that says why."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def train(
    model_config: DSV2Config,
    config: TrainConfig,
    data: TrainingData,
    *,
    display: str = "auto",
    **options: Any,
) -> Trainer:
    """Train to the last step, showing progress; returns the `Trainer`, whose `model` is the result.

    options: as for `Trainer` (validation, out, resume, tokenizer, world).
    """
    trainer = Trainer(model_config, config, data, **options)
    run(trainer, display=display)
    return trainer


def run(
    trainer: Trainer,
    *,
    display: str = "auto",
    minutes: float | None = None,
    handle_signals: bool = False,
) -> None:
    """Go through the remaining steps, then save.

    minutes: stop after so much time; the checkpoint is then there to go on from. handle_signals: on Ctrl-C or
    SIGTERM finish the step, save, and raise Stopped; a second one ends the process at once. Raises Stopped
    when the run did not come to its last step, NonFiniteError as `Trainer.advance` does.
    """
    main = trainer.world.is_main
    start = time.monotonic()
    with _signals(handle_signals) as received, _show(trainer, display if main else "none") as show:
        while not trainer.done:
            show(trainer.advance())
            over = minutes is not None and time.monotonic() - start >= minutes * 60
            stop = _agree(trainer, received[0] if received else -1 if over else 0)
            if stop and not trainer.done:
                _save(trainer)
                reason = "the time is over" if stop < 0 else f"stopped by {signal.Signals(stop).name}"
                raise Stopped(
                    f"{reason} after step {trainer.step} of {trainer.config.steps}{_saved(trainer)}",
                    0 if stop < 0 else 128 + stop,
                )
    _save(trainer)


def _agree(trainer: Trainer, stop: int) -> int:
    """Every process stops when one of them is told to: the main one's word, else any other's."""
    if trainer.world.size == 1:
        return stop
    import torch

    told = torch.zeros(trainer.world.size, device=trainer.world.device)
    told[trainer.world.rank] = stop
    values = [int(value) for value in trainer.world.sum(told).tolist()]
    return next((value for value in values if value), 0)


def _save(trainer: Trainer) -> None:
    if trainer.directory is not None and trainer.saved_step != trainer.step:
        trainer.save()


def _saved(trainer: Trainer) -> str:
    if trainer.directory is None:
        return ""
    return f"; saved in {trainer.directory.path}, --resume goes on from there"


@contextlib.contextmanager
def _signals(handle: bool) -> Iterator[list[int]]:
    """The list that a first SIGINT or SIGTERM is added to; the handlers are put back afterwards."""
    received: list[int] = []
    if not handle or threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _show(trainer: Trainer, display: str) -> Iterator[Any]:
    """A function that shows the metrics of a step: on a bar, or as a line now and then."""
    if display not in DISPLAYS:
        raise ValueError(f"display={display!r} is unknown; choose one of {', '.join(DISPLAYS)}")
    if display == "auto":
        display = "bar" if sys.stderr.isatty() or "ipykernel" in sys.modules else "lines"
    if display == "none":
        yield lambda metrics: None
        return
    if display == "lines":
        yield _Lines(trainer.config.steps)
        return
    with tqdm(total=trainer.config.steps, initial=trainer.step, unit="step", dynamic_ncols=True) as bar:
        smooth = _Smooth()

        def show(metrics: dict[str, Any]) -> None:
            bar.set_postfix_str(_short(smooth(metrics)), refresh=False)
            bar.update()
            if "val_loss" in metrics:
                bar.write(f"step {metrics['step']}: {describe_validation(metrics)}")

        yield show


class _Lines:
    """Prints a line every ten seconds, at validation, and at the first and the last step."""

    def __init__(self, steps: int):
        self.steps, self.smooth = steps, _Smooth()
        self.first: tuple[int, float] | None = None
        self.last = -LINE_SECONDS

    def __call__(self, metrics: dict[str, Any]) -> None:
        now, step = time.monotonic(), metrics["step"]
        self.first = self.first or (step, now)
        smooth = self.smooth(metrics)
        if now - self.last < LINE_SECONDS and step != self.steps and "val_loss" not in metrics:
            return
        self.last = now
        line = f"step {step:>{len(str(self.steps))}}/{self.steps}  {_short(smooth)}"
        if step > self.first[0]:
            line += f"  left {_clock((now - self.first[1]) / (step - self.first[0]) * (self.steps - step))}"
        if "val_loss" in metrics:
            line += f"\n{' ' * 8}{describe_validation(metrics)}"
        print(line, flush=True)


class _Smooth:
    """Running means over about twenty steps of what jumps from step to step."""

    def __init__(self):
        self.means: dict[str, float] = {}

    def __call__(self, metrics: dict[str, Any]) -> dict[str, Any]:
        for name in ("loss", "tokens_per_s", "imbalance"):
            self.means[name] = 0.95 * self.means.get(name, metrics[name]) + 0.05 * metrics[name]
        return metrics | self.means


def _short(metrics: dict[str, Any]) -> str:
    return (
        f"loss {metrics['loss']:.3f}  {metrics['tokens_per_s']:,.0f} tokens/s  "
        f"imbalance {metrics['imbalance']:.2f}  lr {metrics['lr']:.1e}"
    )


def describe_validation(metrics: dict[str, Any]) -> str:
    """One line on the validation loss, by domain too."""
    domains = ", ".join(f"{name} {value:.3f}" for name, value in metrics["val_domains"].items())
    if "val_nats_per_byte" in metrics:
        whole = f"{metrics['val_nats_per_byte']:.3f} nats per byte ({metrics['val_bits_per_byte']:.3f} bits)"
    else:
        whole = f"{metrics['val_loss']:.3f} nats per token"
    return f"validation {whole}: {domains}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def make_path(path: str | Path) -> Path:
    """An absolute path without `~`."""
    return Path(path).expanduser().resolve()
