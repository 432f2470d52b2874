"""A second natural language, from what is installed: message catalogues, and Babel's names and dates.

Programs carry their translations as gettext catalogues (.mo). Of French, German, Spanish, Italian and
Portuguese the one with the most is taken, and of its messages those that are sentences.
"""

from __future__ import annotations

import datetime
import gettext
import os
import re
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from dsv2.data.documents import SECOND_LANGUAGES, Document

_DOCUMENT_BYTES = 3_000


def catalogue_roots() -> list[Path]:
    """Folders of the shape <root>/<language>/LC_MESSAGES/*.mo: the system's and the installed packages'."""
    roots = [Path(prefix) / "share" / "locale" for prefix in (sys.prefix, sys.base_prefix)]
    roots += [
        Path(folder)
        for folder in (
            "/usr/share/locale",
            "/usr/share/locale-langpack",
            "/usr/local/share/locale",
            "/opt/homebrew/share/locale",
            "/opt/local/share/locale",
        )
    ]
    for variable in ("ProgramFiles", "ProgramFiles(x86)"):
        if os.environ.get(variable):
            roots += sorted(Path(os.environ[variable]).glob("Git/*/share/locale"))
    roots += sorted(Path("/usr/share/vim").glob("vim*/lang"))
    for distribution in metadata.distributions():
        for entry in distribution.files or []:
            if entry.suffix == ".mo" and entry.parent.name == "LC_MESSAGES":
                roots.append(Path(entry.locate()).parent.parent.parent)
    unique = {str(root.resolve()): root.resolve() for root in roots if root.is_dir()}
    return [unique[name] for name in sorted(unique)]


def catalogues(roots: Iterable[Path] | None = None) -> dict[str, list[Path]]:
    """The catalogues of each language code; of regional forms (pt, pt_BR) the one with the most bytes."""
    found: dict[str, dict[str, list[Path]]] = {code: {} for code in SECOND_LANGUAGES}
    for root in catalogue_roots() if roots is None else roots:
        for folder in sorted(root.iterdir()):
            code = folder.name.split("_")[0]
            if code in found and re.fullmatch(r"[a-z]{2}(_[A-Z]{2})?", folder.name):
                found[code].setdefault(folder.name, []).extend(sorted((folder / "LC_MESSAGES").glob("*.mo")))
    return {
        code: max(forms.values(), key=_total_size)
        for code, forms in found.items()
        if forms and any(forms.values())
    }


def _total_size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def choose_language(found: dict[str, list[Path]]) -> str | None:
    """The code of the language with the most bytes of catalogues, None when there is none."""
    sizes = {code: _total_size(paths) for code, paths in found.items()}
    return max(sorted(sizes), key=lambda code: sizes[code]) if sizes else None


def read_catalogue(path: Path) -> list[str]:
    """The translated messages of one catalogue, in its order; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog
    except (OSError, ValueError, UnicodeError, LookupError, EOFError, IndexError, TypeError, SyntaxError):
        return []  # gettext has no error type of its own; a damaged catalogue raises any of these
    except Exception as problem:
        if type(problem).__name__ == "error":  # struct.error
            return []
        raise
    return [text for original, text in catalogue.items() if original and isinstance(text, str)]


_FORMAT = re.compile(r"%[-+ #0]*\d*(\.\d+)?[hlqjzt]*[a-zA-Z]|%\(\w+\)\w|%\d+\$|\{\w*\}|\$\{?\w+")


def clean_message(message: str) -> list[str]:
    """The paragraphs of a message that are sentences: no format strings, options, menus or single words."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", message.replace("\r", "")):
        if _FORMAT.search(paragraph):
            continue
        paragraph = re.sub(r"\(_\w\)|(?<!\w)[_&](?=[^\W_])", "", paragraph)  # keys of menus: "_Fichier"
        paragraph = re.sub(r"\s+", " ", re.sub(r"</?\w[^<>]*>", "", paragraph)).strip()
        letters = sum(character.isalpha() or character in " ,.'’()" for character in paragraph)
        words = [word for word in paragraph.split() if word.strip(".,;:!?()'\"«»").isalpha()]
        if len(words) < 4 or len(paragraph) < 25 or letters < 0.88 * len(paragraph):
            continue
        if paragraph[0] in "-<[{|#.*=" or re.search(r"\s--?\w|[A-Z_]{10,}|[_\\|=<>{}\[\]]", paragraph):
            continue
        paragraph = paragraph[0].upper() + paragraph[1:]
        kept.append(paragraph if paragraph[-1] in ".!?:…" else paragraph + ".")
    return kept


def catalogue_documents(
    domain: str,
    paths: Iterable[Path],
    progress: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> list[Document]:
    """The sentences of catalogues, a few kilobytes of one catalogue to a document, each sentence once."""
    seen: set[str] = set()
    documents = []
    for path in progress(list(paths), f"message catalogues ({domain})"):
        lines: list[str] = []
        parts: list[str] = []
        for message in read_catalogue(path):
            for sentence in clean_message(message):
                letters = re.sub(r"\W+", "", sentence.lower())
                if letters in seen:
                    continue
                seen.add(letters)
                lines.append(sentence)
                if sum(map(len, lines)) > _DOCUMENT_BYTES:
                    parts.append("\n".join(lines) + "\n")
                    lines = []
        if lines and (parts or sum(map(len, lines)) > 200):
            parts.append("\n".join(lines) + "\n")
        for number, text in enumerate(parts):
            documents.append(Document(domain, f"{path.stem} {number + 1}", text))
    return documents


def babel_documents(code: str, domain: str) -> list[Document]:
    """Names and written-out dates that the Unicode CLDR gives through the package Babel; none where it is
    absent.
    """
    try:
        from babel import Locale
        from babel.dates import format_date, format_timedelta
        from babel.units import format_unit
    except ImportError:
        return []
    locale = Locale(code)
    documents = []
    for name in ("languages", "territories", "currencies"):
        names = [str(text) for key, text in sorted(getattr(locale, name).items()) if len(str(text)) > 3]
        for number in range(0, len(names), 60):
            documents.append(
                Document(domain, f"{name} {number}", "\n".join(names[number : number + 60]) + "\n")
            )
    day = datetime.date(1990, 1, 1)
    for number in range(60):
        days = [day + datetime.timedelta(days=97 * (30 * number + place)) for place in range(30)]
        lines = [format_date(each, "full", locale=code) for each in days]
        documents.append(Document(domain, f"dates {number}", "\n".join(lines) + "\n"))
    lines = []
    for unit in ("duration-day", "duration-hour", "length-kilometer", "mass-kilogram", "volume-liter"):
        lines += [format_unit(count, unit, locale=code) for count in range(1, 40)]
    for hours in range(1, 2000, 37):
        span = datetime.timedelta(hours=hours)
        lines.append(format_timedelta(span, add_direction=True, locale=code))
        lines.append(format_timedelta(-span, add_direction=True, locale=code))
    for number in range(0, len(lines), 40):
        documents.append(
            Document(domain, f"quantities {number}", "\n".join(lines[number : number + 40]) + "\n")
        )
    return documents
