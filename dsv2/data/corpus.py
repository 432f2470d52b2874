"""Finding a corpus on this machine: which domains, how much of each, and the cache of what was found."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from dsv2.data.arithmetic import arithmetic_documents
from dsv2.data.catalogues import babel_documents, catalogue_documents, catalogues, choose_language
from dsv2.data.code import code_documents, standard_library
from dsv2.data.documents import (
    DOMAINS,
    SECOND_LANGUAGES,
    Corpus,
    Document,
    cap,
    domain_order,
    drop_duplicates,
)
from dsv2.data.english import english_documents, required_distributions
from dsv2.data.packing import cache_directory

VERSION = 1
MAX_BYTES_PER_DOMAIN = 16_000_000
MAX_SHARE = 0.45
ARITHMETIC_BYTES = 4_000_000
_TEST_SHARE_OF_CODE = 0.2
_TEXT_DOCUMENT_BYTES = 8_000


def find_corpus(
    domains: Sequence[str] | None = None,
    text_files: Iterable[str | Path] = (),
    max_bytes_per_domain: int = MAX_BYTES_PER_DOMAIN,
    seed: int = 0,
    *,
    cache: bool = True,
    progress: bool = True,
) -> Corpus:
    """The corpus of this machine, labelled by domain; the same on every call as long as the installation is.

    `domains`: any of code, english, arithmetic, language (the second natural language, or its name, such as
    french) and text; all that can be found by default. `text_files` are the reader's own, domain "text". No
    domain keeps more than `max_bytes_per_domain` nor, where there are three or more, than 45 % of the whole.
    The first scan reads the installed packages (about a minute) and is remembered in the user's cache. Raises
    ValueError or FileNotFoundError for a domain or a file that cannot be had, naming it.
    """
    text_files = [Path(path) for path in text_files]
    wanted = _wanted(domains, bool(text_files))
    if max_bytes_per_domain < 1_000:
        raise ValueError(f"max_bytes_per_domain must be at least 1000, got {max_bytes_per_domain}")
    documents: list[Document] = []
    notes: dict[str, str] = {}
    scanned = [name for name in wanted if name != "text"]
    if scanned:
        path = cache_directory() / "corpus" / f"{_scan_key(scanned, max_bytes_per_domain, seed)}.jsonl"
        found = _load(path) if cache else None
        if found is None:
            found = _scan(scanned, max_bytes_per_domain, seed, progress)
            if cache:
                _save(found, path)
        documents, notes = found.documents, dict(found.notes)
    if text_files:
        own = cap(read_text_files(text_files), max_bytes_per_domain, seed)
        documents = _balance(drop_duplicates(documents + own), seed)
        notes["text"] = f"{len(text_files)} file{'s' * (len(text_files) > 1)} of yours"
    return Corpus(sorted(documents, key=lambda document: domain_order(document.domain)), notes)


def _wanted(domains: Sequence[str] | None, has_text: bool) -> list[str]:
    if isinstance(domains, str):
        raise ValueError(f"domains must be a list of names, got the text {domains!r}")
    if domains is None:
        return [name for name in DOMAINS if name != "text" or has_text]
    allowed = {*DOMAINS, *SECOND_LANGUAGES.values()}
    for name in domains:
        if name not in allowed:
            raise ValueError(f"domains must be among {', '.join(sorted(allowed))}, got {name!r}")
    if has_text != ("text" in domains):
        raise ValueError(
            "domain text needs text files, and text files need the domain text or no list of domains"
        )
    if not domains:
        raise ValueError("domains must name at least one domain")
    if len([name for name in domains if domain_order(name)[0] == DOMAINS.index("language")]) > 1:
        raise ValueError(f"domains must name at most one second language, got {', '.join(domains)}")
    return sorted(set(domains), key=domain_order)


def _scan(wanted: list[str], max_bytes: int, seed: int, progress: bool) -> Corpus:
    def bar(items: Iterable, label: str) -> Iterable:
        return tqdm(items, desc=label, leave=False, delay=1, mininterval=0.5, disable=not progress)

    documents: list[Document] = []
    notes: dict[str, str] = {}
    for name in wanted:
        if name == "code":
            modules, tests = code_documents()
            modules = cap(drop_duplicates(modules), max_bytes, seed)
            size = sum(document.size for document in modules)
            room = min(max_bytes - size, int(size * _TEST_SHARE_OF_CODE / (1 - _TEST_SHARE_OF_CODE)))
            found = modules + cap(drop_duplicates(tests), room, seed)
            notes[name] = f"source of Python {sys.version_info[0]}.{sys.version_info[1]}'s standard library"
            if not found:
                notes[name] = f"no source files under {standard_library()}"
        elif name == "english":
            found = cap(drop_duplicates(english_documents(progress=bar)), max_bytes, seed)
            notes[name] = "docstrings, comments, help topics, readmes and licences of Python and its packages"
        elif name == "arithmetic":
            found = arithmetic_documents(min(ARITHMETIC_BYTES, max_bytes), seed)
            notes[name] = "generated problems with answers"
        else:
            found, name, note = _second_language(name, bar)
            found = cap(drop_duplicates(found), max_bytes, seed)
            notes[name] = note
        documents += found
    return Corpus(_balance(drop_duplicates(documents), seed), notes)


def _second_language(name: str, bar) -> tuple[list[Document], str, str]:
    """The documents, the domain's name and its source, of the named or of the best supplied language."""
    codes = {language: code for code, language in SECOND_LANGUAGES.items()}
    available = catalogues()
    code = codes.get(name) or choose_language(available) or next(iter(SECOND_LANGUAGES))
    language = SECOND_LANGUAGES[code]
    paths = available.get(code, [])
    found = catalogue_documents(language, paths, bar)
    phrases = babel_documents(code, language)
    sources = [f"{len(paths)} message catalogues"] * bool(found) + ["names and dates of CLDR"] * bool(phrases)
    if found or phrases:
        return found + phrases, language, " and ".join(sources)
    missing = (
        "no message catalogue (.mo) and no package babel on this machine; pip install babel gives a little"
    )
    return [], name, missing


def read_text_files(paths: Iterable[Path]) -> list[Document]:
    """The reader's files as documents of some kilobytes, cut at blank lines (or line ends where there are
    none).
    """
    documents = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise FileNotFoundError(f"no text file at {path}") from None
        except IsADirectoryError:
            raise ValueError(
                f"text files must be files, but {path} is a directory; name the files in it"
            ) from None
        except UnicodeDecodeError as problem:
            raise ValueError(
                f"{path} is not UTF-8 text (byte {problem.start}); convert it first, for instance with iconv"
            ) from None
        except OSError as problem:
            raise ValueError(f"{path} cannot be read: {problem.strerror or problem}") from None
        if not text.strip():
            raise ValueError(f"{path} holds no text")
        for number, part in enumerate(split_text(text)):
            documents.append(Document("text", f"{path.name} {number + 1}", part))
    return documents


def split_text(text: str, size: int = _TEXT_DOCUMENT_BYTES) -> list[str]:
    """`text` in parts of about `size` characters that end at a blank line, else at a line's end; nothing is
    lost.
    """
    parts, part = [], ""
    for piece in re.split(r"(?<=\n)(?=[ \t\r]*\n)", text):
        pieces = [piece] if len(piece) <= 2 * size else _pieces(piece, size)
        for each in pieces:
            if part and len(part) + len(each) > size:
                parts.append(part)
                part = ""
            part += each
    return parts + [part] if part.strip() or not parts else [*parts[:-1], parts[-1] + part]


def _pieces(text: str, size: int) -> list[str]:
    """Lines, and lines beyond `size` cut."""
    return [
        line[start : start + size]
        for line in text.splitlines(keepends=True)
        for start in range(0, max(1, len(line)), size)
    ]


def _balance(documents: list[Document], seed: int) -> list[Document]:
    """Cut domains beyond MAX_SHARE of the whole, where three or more are there; the reader's own text is
    never cut.
    """
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.domain] = sizes.get(document.domain, 0) + document.size
    if len(sizes) < 3:
        return documents
    largest = max(sizes, key=lambda name: sizes[name])
    others = sum(sizes.values()) - sizes[largest]
    allowed = int(others * MAX_SHARE / (1 - MAX_SHARE))
    if largest == "text" or sizes[largest] <= allowed:
        return documents
    # At most two domains can exceed 45 % of a whole, and cutting the largest to it leaves the other below.
    kept = cap([document for document in documents if document.domain == largest], allowed, seed)
    return [document for document in documents if document.domain != largest] + kept


# The cache of scans -------------------------------------------------------------------------------


def _scan_key(wanted: list[str], max_bytes: int, seed: int) -> str:
    """Changes whenever the scan could find something else: Python, packages, catalogues, this code, the
    request.
    """
    here = Path(__file__).parent
    modules = ("arithmetic", "catalogues", "code", "corpus", "documents", "english")
    code = [hashlib.sha256((here / f"{name}.py").read_bytes()).hexdigest() for name in modules]
    parts: list = [VERSION, wanted, max_bytes, seed, sys.version, str(standard_library()), code]
    if "english" in wanted:
        parts.append([(each.metadata["Name"], each.version) for each in required_distributions()])
    if any(domain_order(name)[0] == DOMAINS.index("language") for name in wanted):
        for code_name, paths in catalogues().items():
            parts.append((code_name, [(str(path), path.stat().st_size) for path in paths]))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _save(corpus: Corpus, path: Path) -> None:
    lines = [json.dumps({"notes": corpus.notes}, ensure_ascii=False)]
    lines += [json.dumps(asdict(document), ensure_ascii=False) for document in corpus.documents]
    body = ("\n".join(lines) + "\n").encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load(path: Path) -> Corpus | None:
    """What `_save` wrote; None where there is nothing or it is damaged, so that the scan is made again."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return None
        first, *rest = body.decode("utf-8").split("\n")[:-1]
        return Corpus([Document(**json.loads(line)) for line in rest], json.loads(first)["notes"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
