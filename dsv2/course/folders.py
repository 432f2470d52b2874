"""Where a course's exercises stand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Folders:
    """home: holds solutions/ and exercises/. chapters: the modules that define the exercises."""

    home: Path = ROOT
    chapters: Path = ROOT / "dsv2" / "course" / "chapters"

    @property
    def progress(self) -> Path:
        return self.home / "exercises" / ".progress.json"

    @property
    def backup(self) -> Path:
        return self.home / "exercises" / "backup"

    def exercise(self, chapter: Path) -> Path:
        """The learner's file of a chapter's module: `exercises/ex01_kv_cache.py` of `c01_kv_cache.py`."""
        return self.home / "exercises" / f"ex{chapter.stem[1:]}.py"

    def solution(self, chapter: Path) -> Path:
        """The worked file of a chapter's module."""
        return self.home / "solutions" / f"ex{chapter.stem[1:]}.py"


HERE = Folders()
