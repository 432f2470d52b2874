"""A run's folder: its settings, its measurements as JSON lines, its checkpoints, and a lock on all of it.

run.json         model, training settings, data, versions, commands
metrics.jsonl    one line a step
samples.jsonl    texts written on the way
checkpoints/     see `dsv2.train.checkpoint`
model/           the finished model as a Hugging Face directory
"""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

FORMAT, VERSION = "dsv2-run", 1


class RunDirectoryError(ValueError):
    """A folder that cannot be used for the run asked for."""


class RunDirectory:
    """The files of one run. The lock goes with the process, however that ends."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.model = self.path / "model"
        self._lock = None

    def create(self, settings: dict[str, Any]) -> None:
        """Begin a new run. Raises RunDirectoryError if the folder holds anything."""
        self.require_empty()
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self.write_settings(settings)

    def require_empty(self) -> None:
        """Raise RunDirectoryError if the folder holds anything but hidden files."""
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"--out {self.path} is a file; name a folder")
        if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise RunDirectoryError(
                f"--out {self.path} is not empty; go on with its run by --resume, or name a new folder"
            )

    def settings(self) -> dict[str, Any]:
        """What `create` was given. Raises RunDirectoryError if the folder is not a run's."""
        file = self.path / "run.json"
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunDirectoryError(
                f"{self.path} has no run.json, so there is no run to resume; start one without --resume"
            ) from None
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{file} cannot be read: {error}") from None
        if not isinstance(settings, dict) or settings.get("format") != FORMAT:
            raise RunDirectoryError(f"{file} does not describe a training run")
        if settings.get("version") != VERSION:
            raise RunDirectoryError(
                f"{file} has version {settings.get('version')!r}; this code reads {VERSION}"
            )
        return settings

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        content = json.dumps({"format": FORMAT, "version": VERSION, **settings}, indent=1) + "\n"
        replace_file(self.path / "run.json", content)

    def lock(self) -> None:
        """Keep other processes out of the folder. Raises RunDirectoryError if one is in it."""
        if self._lock is not None:
            return
        handle = open(self.path / ".lock", "a")
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network folders have no locks; going on is then better than never starting.
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                handle.close()
                raise RunDirectoryError(
                    f"another process is training in {self.path}; wait for it, or stop it first"
                ) from None
        self._lock = handle

    def release(self) -> None:
        """Let other processes in again."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Add one JSON object to a file of JSON lines, and hand it to the system at once."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(_finite(content), ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def cut_lines(path: Path, step: int) -> None:
    """Keep the lines up to and including a step, so that a resumed run has each step once."""
    if path.is_file():
        kept = [line for line in read_lines(path) if line["step"] <= step]
        replace_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def replace_file(path: Path, content: str) -> None:
    """Write a text file so that it is the old or the new one, never a part."""
    made = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(made, "w", encoding="utf-8", newline="\n") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
