"""English prose that is installed with Python: language topics, docstrings, comments, readmes and licences.

Everything is read as text; no module is imported. A docstring is more than prose, so that each is taken apart
into paragraphs, and only those that read as sentences are kept, without their markup, each once.
"""

from __future__ import annotations

import ast
import email
import hashlib
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata, util
from pathlib import Path

from dsv2.data.code import library_files, read_source, source_key, standard_library
from dsv2.data.documents import Document

# What the course installs; what these require is followed from here.
ROOT_DISTRIBUTIONS = (
    "torch", "numpy", "matplotlib", "jupyterlab", "notebook", "ipywidgets", "ipykernel", "einops",
    "jaxtyping", "safetensors", "tqdm", "triton", "tokenizers", "transformers", "pytest",
    "hypothesis", "nbval",
)  # fmt: skip
_FUNCTION_WORDS = set(
    "the a an of to in and is are be or for that this it with as by if on from not when which can will at "
    "has have you your we was were its any all no but may must should than then there these those into only "
    "also".split()
)


# Paragraphs ---------------------------------------------------------------------------------------


def prose(text: str, keep: Callable[[str], bool] | None = None) -> list[str]:
    """The paragraphs of `text` that read as English sentences, without marks of reST or Markdown."""
    keep = keep or reads_as_prose
    paragraphs = []
    for block in _blocks(text):
        paragraph = _plain(" ".join(line.strip() for line in block))
        if keep(paragraph):
            paragraphs.append(paragraph)
    return paragraphs


_DOCTEST = re.compile(r"^\s*(>>>|\.\.\.( |$)|In \[\d*\]:|Out\[\d*\]:|\$ )")
_UNDERLINE = re.compile(r"^\s*([=\-~^\"'`#*+.:_])\1{2,}\s*$")
_DIRECTIVE = re.compile(r"^\s*\.\. ")
_PROSE_DIRECTIVE = re.compile(
    r"^\s*\.\. (note|warning|tip|seealso|versionadded|versionchanged|deprecated)::\s*"
)
_ITEM = re.compile(r"^\s*([-*+•]|\d{1,2}[.)]|\(\w\)) +")
# "name : type" of numpydoc, "name (type): ..." and "name: ..." of Google's style, ":param name:" of Sphinx.
_FIELD = re.compile(
    r"^\s*(:\w[^:]*:|[*`\w.,/ ]{1,50} ?: \S|[`*\w.]+ \(.*\) ?:|[`*\w.\[\]]+ ?: |[*\w]+(, \*?\w+)* :( |$))"
)
_SECTION = re.compile(
    r"^\s*(Args|Arguments|Parameters|Params|Returns?|Raises|Yields|Examples?|Notes?|Attributes|Inputs?"
    r"|Outputs?|Shapes?|Usage|Keyword arguments|References|See also|Warnings?|Variables|Todo) ?:{0,2}\s*$",
    re.IGNORECASE,
)
_REMARK = re.compile(r"^(FIXME|TODO|XXX|HACK|NB|noqa|type:|pylint)\b", re.IGNORECASE)
_SENTENCE_START = re.compile(r"^\s*[A-Z][a-z]* [a-z]+ [a-z]+ ")


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of lines that belong to one paragraph; doctests and literal blocks are left out."""
    block: list[str] = []
    block_indent = 0
    skipped_indent: int | None = None  # lines deeper than this belong to a literal block
    in_doctest = in_fence = False
    for line in textwrap.dedent(text.expandtabs(4)).splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if stripped.startswith(("```", "~~~")):
            in_fence = not in_fence
            yield block
            block = []
            continue
        if in_fence:
            continue
        if not stripped:
            in_doctest = False
            if block and block[-1].rstrip().endswith("::"):
                skipped_indent = block_indent
            yield block
            block = []
            continue
        if skipped_indent is not None:
            if indent > skipped_indent:
                continue
            skipped_indent = None
        if in_doctest:
            continue
        if _DOCTEST.match(line):
            in_doctest = True
            yield block
            block = []
            continue
        if _UNDERLINE.match(line):
            block = []  # a title is no sentence
            continue
        if _SECTION.match(line):
            yield block
            block = []
            continue
        if _PROSE_DIRECTIVE.match(line):
            yield block
            rest = _PROSE_DIRECTIVE.sub("", line)
            rest = re.sub(r"^\d[\w.]*$", "", rest)
            block, block_indent = ([rest] if rest else []), indent
            continue
        if _DIRECTIVE.match(line):
            yield block
            block, skipped_indent = [], indent
            continue
        starts_field = bool(_FIELD.match(line)) and not _SENTENCE_START.match(line)
        if block and (_ITEM.match(line) or starts_field or abs(indent - block_indent) > 3):
            yield block
            block = []
        if not block:
            block_indent = indent
        block.append(_ITEM.sub("", line))
    yield block


_MARKS: tuple[tuple[re.Pattern, str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<!--.*?-->|</?[a-zA-Z][^<>]{0,200}>", ""),  # HTML
        (r"!\[[^\]]*\]\([^)]*\)", ""),  # Markdown image
        (r"\[([^\]]+)\]\([^)\s]*\)", r"\1"),  # Markdown link
        (r":[\w:+.-]+:`[~!]?([^`<]*?)\s*<[^`>]*>`", r"\1"),  # :role:`text <target>`
        (r":[\w:+.-]+:`~([^`]*\.)?([^`.]+)`", r"\2"),  # :role:`~package.name`
        (r":[\w:+.-]+:`!?([^`]*)`", r"\1"),  # :role:`name`
        (r"`([^`<]+?)\s*<[^`>]+>`_{0,2}", r"\1"),  # `text <address>`_
        (r"\[`([^`\]]+)`\]", r"\1"),  # [`Name`]
        (r"``([^`]+)``", r"\1"),
        (r"`([^`]+)`_{0,2}", r"\1"),
        (r"\*\*([^*]+)\*\*", r"\1"),
        (r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])", r"\1"),
        (r"(?<!\w)_([^_\s][^_]*)_(?!\w)", r"\1"),
        (r"\s?\[[\w#]+\]_", ""),  # footnote
        (r"(?<![\w|])\|([\w ]+)\|_?(?![\w|])", r"\1"),
        (r",? ?\((by )?default(s to)?\b:? ?[^()]*\)", ""),
        (r"::$", ":"),
        (r"\\([*`_|\\ ])", r"\1"),
        (r"\s+", " "),
    )
)


def _plain(paragraph: str) -> str:
    for pattern, replacement in _MARKS:
        paragraph = pattern.sub(replacement, paragraph)
    paragraph = paragraph.strip()
    # What a colon announces (a list, an example) was left out, and so is its announcement.
    return re.sub(r"(^|(?<=[.!?]) )[^.!?]*:$", "", paragraph)


def reads_as_prose(paragraph: str) -> bool:
    """Whether a paragraph is English sentences: by its ends, its letters and its function words."""
    if not 40 <= len(paragraph) <= 4000:
        return False
    if not (paragraph[0].isupper() or paragraph[0] in "\"'(") or paragraph[-1] not in ".!?)\"'":
        return False
    words = paragraph.split()
    if _REMARK.match(paragraph):
        return False
    if len(words) < 7 or max(map(len, words)) > 50:
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    symbols = sum(character in "=[]{}<>_|\\/@#$%^&*~`+" for character in paragraph)
    if letters < 0.85 * len(paragraph) or symbols > 0.03 * len(paragraph):
        return False
    if not paragraph.isascii() and sum(not character.isascii() for character in paragraph) > 0.03 * len(
        paragraph
    ):
        return False
    common = sum(word.strip(".,:;()'\"").lower() in _FUNCTION_WORDS for word in words)
    return common >= 0.18 * len(words)


# Sources ------------------------------------------------------------------------------------------


def docstrings(source: str) -> list[str]:
    """The docstrings of a module and of everything defined in it, in order; none where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about escapes in other people's code
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found: list[str] = []
    _collect_docstrings(tree, found)
    return found


def _collect_docstrings(node: ast.AST, found: list[str]) -> None:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node, clean=True)
        if text:
            found.append(text)
    # Statements only: definitions hide in no expression, and ast.walk would take as long as parsing.
    for branch in ("body", "handlers", "orelse", "finalbody", "cases"):
        statements = getattr(node, branch, ())
        if isinstance(statements, list):
            for statement in statements:
                _collect_docstrings(statement, found)


def comment_paragraphs(source: str) -> list[str]:
    """Comments of three lines and more, where a reason is given at length; shorter ones are left out."""
    runs = _COMMENT_RUN.findall(
        source
    )  # by line, not by token: tokenize takes ten times as long as all the rest
    return [re.sub(r"(?m)^[ \t]*#+[:!]?", "", run) for run in runs]


_COMMENT_RUN = re.compile(r"^(?:[ \t]*#.*\n){3,}", re.MULTILINE)


def module_prose(source: str) -> list[str]:
    """The paragraphs of a module's docstrings and long comments."""
    if '"""' not in source and "'''" not in source and "# " not in source:
        return []
    paragraphs = [paragraph for text in docstrings(source) for paragraph in prose(text)]
    paragraphs += [paragraph for text in comment_paragraphs(source) for paragraph in prose(text)]
    return paragraphs


def required_distributions(roots: Iterable[str] = ROOT_DISTRIBUTIONS) -> list[metadata.Distribution]:
    """The installed distributions among `roots` and what they require, sorted by name."""
    waiting, found = list(roots), {}
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            distribution = metadata.distribution(name)
        except (metadata.PackageNotFoundError, ValueError):
            continue
        found[name] = distribution
        for requirement in distribution.requires or []:
            if "extra ==" not in requirement:
                waiting.append(re.match(r"[\w.-]+", requirement).group())
    return [found[name] for name in sorted(found)]


def distribution_files(distribution: metadata.Distribution) -> list[tuple[str, Path]]:
    """(name within the distribution, path) of the files to read, sorted, without tests and copies."""
    listed = distribution.files
    if listed is not None:
        entries = [(str(entry).replace("\\", "/"), entry) for entry in listed]
        files = [(name, Path(entry.locate())) for name, entry in entries]
    else:
        files = list(_importable_files(distribution))
    kept = []
    for name, path in sorted(files, key=lambda entry: entry[0]):
        parts = {part.lower() for part in Path(name).parts}
        if parts & {
            "test",
            "tests",
            "testing",
            "_vendor",
            "_vendored",
            "vendor",
            "thirdparty",
            "third_party",
            "node_modules",
            "__pycache__",
            "..",
        }:
            continue
        if path.suffix.lower() in (".py", ".rst", ".md", ".txt") or _is_licence(path):
            kept.append((name, path))
    return kept


def _importable_files(distribution: metadata.Distribution) -> Iterator[tuple[str, Path]]:
    """For a distribution without a list of files: what its top-level packages hold; none is imported."""
    tops = (distribution.read_text("top_level.txt") or distribution.metadata["Name"] or "").split()
    for top in tops:
        try:
            spec = util.find_spec(top.replace("-", "_"))
        except (ImportError, ValueError, AttributeError):
            continue
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).rglob("*")):
                yield path.relative_to(Path(folder).parent).as_posix(), path


def _is_licence(path: Path) -> bool:
    return path.stem.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE", "README"))


class _Once:
    """Lets every paragraph through once; letters alone decide, so that numbers and marks do not make a new
    one.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def new(self, paragraphs: Iterable[str]) -> list[str]:
        kept = []
        for paragraph in paragraphs:
            letters = re.sub(r"[^a-z]+", "", paragraph.lower())
            digest = hashlib.blake2b(letters.encode(), digest_size=12).digest()
            if digest not in self._seen:
                self._seen.add(digest)
                kept.append(paragraph)
        return kept


def english_documents(
    roots: Iterable[str] = ROOT_DISTRIBUTIONS,
    library: Path | None = None,
    progress: Callable[[Iterable, str], Iterable] = lambda items, label: items,
) -> list[Document]:
    """One document per help topic, module, readme and licence, of the paragraphs not met before."""
    once = _Once()
    documents: list[Document] = []

    def add(name: str, paragraphs: Iterable[str], key: str = "") -> None:
        kept = once.new(paragraphs)
        text = "\n\n".join(kept) + "\n"
        if len(text) >= 200:
            documents.append(Document("english", name, text, split_key=key))

    for name, text in _topics():
        add(f"topic {name}", prose(text))
    root = library or standard_library()
    for path in progress(library_files(root), "docstrings of the standard library"):
        source = read_source(path)
        if source is not None:
            # A module's prose goes where its code goes, or the one would be learnt from the other.
            add(path.relative_to(root).as_posix(), module_prose(source), source_key(source))
    distributions = required_distributions(roots)
    listed = [entry for distribution in distributions for entry in distribution_files(distribution)]
    for name, path in progress(listed, "docstrings and documents of packages"):
        if path.suffix == ".py":
            source = read_source(path)
            if source is not None:
                add(name, module_prose(source))
        elif (text := _read(path)) is not None:
            add(name, prose(text))
    for distribution in distributions:
        try:
            description = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
            body = email.message_from_string(description).get_payload()
        except (OSError, UnicodeDecodeError, ValueError):
            continue
        if isinstance(body, str):
            add(f"{distribution.metadata['Name']} readme", prose(body))
    return documents


def _topics() -> list[tuple[str, str]]:
    """Chapters of the language reference, as `help()` prints them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return sorted(topics.items())


def _read(path: Path) -> str | None:
    try:
        if path.stat().st_size > 500_000:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
