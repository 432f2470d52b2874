"""Python source of the standard library, as documents of the domain "code"."""

from __future__ import annotations

import hashlib
import string
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dsv2.data.documents import Document

# Not code that a reader would call code: tables, data in the shape of source, copies of other projects.
_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings", "lib-dynload", "ensurepip",
    "lib2to3", "idle_test", "test_lib2to3", "cjkencodings", "data", "badsyntax", "crashers", "leakers",
}  # fmt: skip
_TEST_FOLDERS = {"test", "tests"}
_MAX_FILE_BYTES = 200_000


def standard_library() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def library_files(root: Path | None = None) -> list[Path]:
    """The source files of the standard library that are read, sorted."""
    root = root or standard_library()

    def walk(folder: Path) -> Iterator[Path]:
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            if path.is_dir():
                if path.name not in _SKIPPED_FOLDERS and not path.is_symlink():
                    yield from walk(path)
            elif path.suffix == ".py" and not path.name.startswith(("bad_", "badsyntax", "_sysconfigdata")):
                yield path

    return list(walk(root)) if root.is_dir() else []


def read_source(path: Path) -> str | None:
    """The text of a source file, None where it is not UTF-8, too long, or a table more than a text."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if not 100 <= len(raw) <= _MAX_FILE_BYTES or "\0" in text:
        return None
    lines = text.splitlines()
    letters = len(raw) - len(raw.translate(None, string.ascii_letters.encode()))
    if len(text) / max(1, len(lines)) > 100 or letters < 0.4 * len(text) or not text.strip():
        return None
    return text.replace("\r\n", "\n").expandtabs(8).rstrip() + "\n"


def source_key(text: str) -> str:
    """The split key of a source file; prose taken from the file carries it too, and so stays on the same
    side.
    """
    return "source " + hashlib.sha256(text.encode()).hexdigest()


def code_documents(root: Path | None = None) -> tuple[list[Document], list[Document]]:
    """The library's modules, and its tests, which repeat themselves and are therefore kept apart."""
    root = root or standard_library()
    modules, tests = [], []
    for path in library_files(root):
        text = read_source(path)
        if text is None:
            continue
        relative = path.relative_to(root)
        is_test = bool(_TEST_FOLDERS & set(relative.parts[:-1]))
        kept = tests if is_test else modules
        kept.append(Document("code", relative.as_posix(), text, split_key=source_key(text)))
    return modules, tests
