"""Documents with a domain, the corpus that holds them, and the split into training and validation."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

DOMAINS = ("code", "english", "arithmetic", "language", "text")
SECOND_LANGUAGES = {"fr": "french", "de": "german", "es": "spanish", "it": "italian", "pt": "portuguese"}
VALIDATION_FRACTION = 0.02
VALIDATION_MIN_BYTES = 16_384

LICENCE_NOTE = (
    "The texts are read where they are already installed on this machine and are not redistributed; each "
    "keeps the licence of the package that it came with."
)


@dataclass(frozen=True)
class Document:
    """One text of one domain.

    `split_key` decides between training and validation; documents that share it go to the same side. It
    defaults to the text itself. `split` fixes the side where the text was generated for it.
    """

    domain: str
    name: str
    text: str
    split_key: str = ""
    split: str = ""

    @property
    def size(self) -> int:
        """Bytes in UTF-8."""
        return len(self.text.encode("utf-8"))

    @property
    def content_hash(self) -> str:
        """Equal for texts that differ only in white space."""
        return _hash(re.sub(r"\s+", " ", self.text).strip())

    @property
    def split_position(self) -> float:
        """Its place in [0, 1) by hash; the lowest go to validation."""
        digest = _hash("split\n" + self.split_key) if self.split_key else self.content_hash
        return int(digest[:13], 16) / 16**13


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@dataclass
class Corpus:
    """Documents by domain, where they came from, and what was missing."""

    documents: list[Document]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def domain_names(self) -> list[str]:
        """The domains present, in the order in which the packed data numbers them."""
        present = {document.domain for document in self.documents}
        return sorted(present, key=domain_order)

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    def of(self, domain: str) -> list[Document]:
        """The documents of one domain."""
        if domain not in self.domain_names:
            raise ValueError(f"domain must be one of {', '.join(self.domain_names)}, got {domain!r}")
        return [document for document in self.documents if document.domain == domain]

    @property
    def fingerprint(self) -> str:
        """sha256 over every document, independent of how the corpus was found."""
        total = hashlib.sha256()
        for document in self.documents:
            for part in (document.domain, document.name, document.split_key, document.split, document.text):
                total.update(_hash(part).encode())
        return total.hexdigest()

    def split(self) -> tuple[list[Document], list[Document]]:
        """Training and validation documents: of each domain about 2 % of the bytes for validation, by hash.

        Documents with the same text (white space aside) or the same `split_key` are always on the same side.
        Within a domain those with the lowest hashes are kept out until there is enough: 2 %, at least 16 KiB,
        at most a tenth of the domain.
        """
        sides: dict[float, str] = {}
        for domain in self.domain_names:
            _choose_sides([document for document in self.documents if document.domain == domain], sides)
        train, validation = [], []
        for document in self.documents:
            side = document.split or sides[document.split_position]
            (validation if side == "validation" else train).append(document)
        return train, validation

    def table(self) -> list[dict]:
        """One row a domain: domain, documents, bytes, share, train_bytes, validation_bytes, source."""
        train, validation = self.split()
        sizes: dict[str, dict[str, int]] = {}
        for side, documents in (("train_bytes", train), ("validation_bytes", validation)):
            for document in documents:
                row = sizes.setdefault(
                    document.domain, {"documents": 0, "bytes": 0, "train_bytes": 0, "validation_bytes": 0}
                )
                row["documents"] += 1
                row["bytes"] += document.size
                row[side] += document.size
        total = sum(row["bytes"] for row in sizes.values()) or 1
        return [
            {
                "domain": domain,
                **sizes[domain],
                "share": round(sizes[domain]["bytes"] / total, 4),
                "source": self.notes.get(domain, ""),
            }
            for domain in self.domain_names
        ]

    def describe(self) -> str:
        """A table of the domains found, with what was not found and the note on licences."""
        lines = [
            f"{'domain':<12}{'documents':>10}{'bytes':>13}{'share':>8}{'train':>13}{'validation':>12}  source"
        ]
        for row in self.table():
            lines.append(
                f"{row['domain']:<12}{row['documents']:>10,}{row['bytes']:>13,}{row['share']:>8.1%}"
                f"{row['train_bytes']:>13,}{row['validation_bytes']:>12,}  {row['source']}"
            )
        total = sum(document.size for document in self.documents)
        lines.append(f"{'total':<12}{len(self.documents):>10,}{total:>13,}")
        for domain, note in self.notes.items():
            if domain not in self.domain_names:
                lines.append(f"{domain}: absent. {note}")
        lines.append(LICENCE_NOTE)
        return "\n".join(lines)


def domain_order(domain: str) -> tuple[int, str]:
    """Sort key of domains: code, english, arithmetic, the second language, text, then any others by name."""
    if domain in SECOND_LANGUAGES.values():
        return DOMAINS.index("language"), domain
    return (DOMAINS.index(domain) if domain in DOMAINS else len(DOMAINS)), domain


def _choose_sides(documents: list[Document], sides: dict[float, str]) -> None:
    """Add the side of each document of one domain to `sides`; what another domain decided stays."""
    groups: dict[float, int] = {}
    for document in documents:
        if not document.split:
            groups[document.split_position] = groups.get(document.split_position, 0) + document.size
    total = sum(groups.values())
    wanted = max(VALIDATION_FRACTION * total, min(VALIDATION_MIN_BYTES, total / 10))
    size = sum(groups[position] for position in groups if sides.get(position) == "validation")
    open_positions = sorted(position for position in groups if position not in sides)
    for place, position in enumerate(open_positions):
        # A document too long for the room is passed over; training keeps at least the last one.
        fits = size < wanted and size + groups[position] <= max(1.5 * wanted, size + VALIDATION_MIN_BYTES)
        is_last = place == len(open_positions) - 1 and size + groups[position] >= total
        sides[position] = "validation" if fits and not is_last else "train"
        size += groups[position] if sides[position] == "validation" else 0


def drop_duplicates(documents: Iterable[Document]) -> list[Document]:
    """The documents in order, without those whose text appeared before, white space aside."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        if document.content_hash not in seen:
            seen.add(document.content_hash)
            kept.append(document)
    return kept


def cap(documents: list[Document], max_bytes: int, seed: int = 0) -> list[Document]:
    """At most `max_bytes` of `documents`, chosen in an order given by their hash and `seed`, kept in their
    own order.
    """
    chosen: set[int] = set()
    size = 0
    ranked = sorted(
        range(len(documents)), key=lambda place: _hash(f"{seed}\n{documents[place].content_hash}")
    )
    for place in ranked:
        if size + documents[place].size <= max_bytes:
            chosen.add(place)
            size += documents[place].size
    return [document for place, document in enumerate(documents) if place in chosen]
