"""Checkpoints: safetensors for tensors, JSON for the rest, each complete or not there at all.

    checkpoints/step-00000200/model.safetensors       float32 weights by their names in the model
                              optimizer.safetensors   <name>.exp_avg, <name>.exp_avg_sq, <name>.step
                              state.json              step, tokens, ...
                              manifest.json           size and SHA-256 of the files above

A checkpoint is written into a hidden folder, forced to the disk, and renamed as its last act; one whose
manifest does not fit its files is not used. A tensor is stored whole however many processes trained it, so a
run can go on with another number of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT, VERSION = "dsv2-checkpoint", 1
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".unfinished-"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to another model."""


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint folder is named after."""
    return int(_NAME.fullmatch(path.name).group(1))


def find_checkpoints(directory: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest step first. Files must have the manifest's sizes."""
    directory = Path(directory)
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)] if directory.is_dir() else []
    return sorted((path for path in found if _manifest(path) is not None), key=checkpoint_step)


def save_checkpoint(
    directory: str | Path,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
) -> Path:
    """Write the checkpoint of a step, atomically; returns its folder. Tensors are on the CPU."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{step:08d}"
    made = directory / f"{_UNFINISHED}{final.name}"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    for name, tensors in (("model", model), ("optimizer", optimizer)):
        save_file({key: value.contiguous() for key, value in tensors.items()}, made / f"{name}.safetensors")
    _write_json(made / "state.json", {"step": step, **state})
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(made.iterdir())
    }
    _write_json(made / "manifest.json", {"format": FORMAT, "version": VERSION, "files": files})
    for path in (*made.iterdir(), made):
        force_to_disk(path)
    if final.exists():
        discard(final)
    os.rename(made, final)
    force_to_disk(directory)
    return final


def remove_old(directory: str | Path, keep: int, milestone_every: int = 0) -> None:
    """Delete all complete checkpoints but the last `keep` and those at multiples of `milestone_every`."""
    for path in find_checkpoints(directory)[:-keep]:
        if not milestone_every or checkpoint_step(path) % milestone_every:
            discard(path)


def remove_unfinished(directory: str | Path) -> None:
    """Delete what a killed process left of a checkpoint that it was writing or deleting."""
    for path in Path(directory).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Delete a folder so that it vanishes at once, even if this process is killed on the way."""
    aside = path.with_name(f"{_UNFINISHED}deleted-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint, after all its files were compared with their checksums.

    Raises CheckpointError for a file that is damaged.
    """
    manifest = _manifest(path)
    if manifest is None:
        raise CheckpointError(f"{path} is not a complete checkpoint of this version")
    for name, entry in manifest["files"].items():
        if _sha256(path / name) != entry["sha256"]:
            raise CheckpointError(f"{path / name} is damaged: its SHA-256 differs from the manifest's")
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def read_tensors(path: Path, name: str, expected: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `name`.safetensors, one at a time, on the CPU.

    Raises CheckpointError unless names and shapes are exactly those expected.
    """
    file = path / f"{name}.safetensors"
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}
            _require_same(file, shapes, {key: tuple(shape) for key, shape in expected.items()})
            for key in expected:
                yield key, stored.get_tensor(key)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def _require_same(file: Path, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    wrong = [name for name in sorted(found.keys() | expected) if found.get(name) != expected.get(name)]
    if wrong:
        lines = [
            f"  - {name}: {found.get(name, 'missing')} in the file, {expected.get(name, 'not')} in the model"
            for name in wrong[:8]
        ]
        more = [f"  - and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        raise CheckpointError("\n".join([f"{file} belongs to another model:", *lines, *more]))


def _manifest(path: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest if it is of this version and every file it names has its size."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and manifest["version"] == VERSION
        sizes = {name: (path / name).stat().st_size for name in manifest["files"]}
        needed = {"model.safetensors", "optimizer.safetensors", "state.json"} <= sizes.keys()
        fits = all(sizes[name] == entry["bytes"] for name, entry in manifest["files"].items())
        return manifest if known and needed and fits else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def force_to_disk(path: Path) -> None:
    """fsync of a file or, where the system has that, of a folder."""
    if path.is_dir() and os.name == "nt":
        return
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
