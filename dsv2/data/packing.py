"""Tokens on disk, mapped into memory, and batches as a pure function of the step.

`prepare` writes one flat file of token ids per split: every document as `<bos> text <eos>`, one after the
other, with an index of where each starts and which domain it belongs to. `PackedDataset.batch(step, ...)`
depends on nothing but its arguments, so that a run resumes exactly by its step number, and any number of
ranks sees the same global batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from dsv2.data.documents import Corpus, Document
from dsv2.data.tokenizer import ByteTokenizer, Tokenizer

FORMAT = "dsv2-packed"
VERSION = 1
SPLITS = ("train", "validation")
STALE_SECONDS = 24 * 3600


class PackedDataError(ValueError):
    """A packed directory that is missing, incomplete, damaged or of another version."""


def cache_directory() -> Path:
    """Where prepared data lives: $DSV2_CACHE, else this user's cache; never inside the repository."""
    if os.environ.get("DSV2_CACHE"):
        return Path(os.environ["DSV2_CACHE"]).expanduser()
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "dsv2" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "dsv2"
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "dsv2"
    return Path.home() / ".cache" / "dsv2"


@dataclass(frozen=True)
class Batch:
    """`tokens` and `targets` (B, T) int64, where each target is the token after; `domains` (B, T) int8 of
    each token.
    """

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    domains: Int[Tensor, "B T"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.tokens[rows], self.targets[rows], self.domains[rows])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(self.tokens.to(device), self.targets.to(device), self.domains.to(device))


class PackedDataset:
    """One split of a directory written by `prepare`, mapped into memory.

    Raises PackedDataError when the directory is missing, incomplete or does not match its manifest
    (`verify=False` skips the checksums, not the sizes).
    """

    def __init__(self, directory: str | Path, split: str = "train", *, verify: bool = True) -> None:
        self.directory = Path(directory)
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        self.split = split
        self.manifest = read_manifest(self.directory)
        entry = self.manifest["splits"][split]
        for kind in ("tokens", "documents"):
            _check_file(self.directory / entry[kind]["file"], entry[kind], verify)
        dtype = np.dtype(self.manifest["dtype"])
        path = self.directory / entry["tokens"]["file"]
        self.tokens = np.memmap(path, dtype=dtype, mode="r") if entry["count"] else np.zeros(0, dtype)
        index = np.load(self.directory / entry["documents"]["file"], allow_pickle=False)
        if (
            index.dtype != np.int64
            or index.ndim != 2
            or index.shape[1] != 2
            or index[-1, 0] != len(self.tokens)
        ):
            raise PackedDataError(
                f"{self.directory / entry['documents']['file']} is not the index of {path.name}; "
                "delete the directory and prepare it again"
            )
        self._starts = index[:, 0]
        self._domain_ids = index[:-1, 1].astype(np.int8)
        self._documents = np.arange(len(self._domain_ids))
        self.domain_names: list[str] = list(self.manifest["domains"])
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]

    def __repr__(self) -> str:
        return (
            f"PackedDataset({str(self.directory)!r}, {self.split!r}: {self.n_documents:,} documents, "
            f"{self.n_tokens:,} tokens of {', '.join(self.domain_names)})"
        )

    @property
    def n_documents(self) -> int:
        """Documents in this split, or of the one domain taken."""
        return len(self._documents)

    @property
    def n_tokens(self) -> int:
        """Tokens in this split, or of the one domain taken, with a <bos> and an <eos> per document."""
        return int((self._starts[self._documents + 1] - self._starts[self._documents]).sum())

    @property
    def n_text_bytes(self) -> int:
        """UTF-8 bytes of the text that the tokens stand for."""
        entry = self.manifest["splits"][self.split]["domains"]
        chosen = {self.domain_names[number] for number in np.unique(self._domain_ids[self._documents])}
        return sum(entry[name]["bytes"] for name in chosen)

    @property
    def train(self) -> PackedDataset:
        """The training split of the same directory."""
        return PackedDataset(self.directory, "train", verify=False)

    @property
    def validation(self) -> PackedDataset:
        """The validation split of the same directory."""
        return PackedDataset(self.directory, "validation", verify=False)

    def take_domain(self, name: str) -> PackedDataset:
        """The documents of one domain only, in this split; raises ValueError when there are none."""
        if name not in self.domain_names:
            raise ValueError(f"domain must be one of {', '.join(self.domain_names)}, got {name!r}")
        chosen = self._documents[self._domain_ids[self._documents] == self.domain_names.index(name)]
        if not len(chosen):
            raise ValueError(f"the {self.split} split has no document of domain {name!r}")
        view = object.__new__(PackedDataset)
        view.__dict__.update(self.__dict__)
        view._documents = chosen
        return view

    def windows_per_epoch(self, seq_len: int) -> int:
        """How many windows of `seq_len` targets one epoch has; raises ValueError when there is none."""
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {seq_len}")
        count = (self.n_tokens - 1) // seq_len
        if count < 1:
            raise ValueError(
                f"the {self.split} split has {self.n_tokens} tokens, too few for a window of "
                f"seq_len={seq_len} targets; use a smaller seq_len or more text"
            )
        return count

    def batch(
        self,
        step: int,
        batch_size: int,
        seq_len: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        first: int | None = None,
    ) -> Batch:
        """Rows rank*B/w .. (rank+1)*B/w of the global batch of `step`; a pure function of the arguments.

        Each epoch joins the documents in a new order and cuts windows of seq_len + 1 tokens, neighbours
        sharing one token, so that every token is a target once. Each window of an epoch is used once before
        the next epoch begins; the last tokens that fill no window are left out, others each epoch. For
        gradient accumulation over k micro-batches take `rank * k + micro` of `world_size * k`.

        first: how many windows earlier steps have used, where their batches had other sizes; None: as many as
        if all had been of this size.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size must be a positive multiple of world_size, got batch_size={batch_size}, "
                f"world_size={world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        count = self.windows_per_epoch(seq_len)
        rows = batch_size // world_size
        if first is not None and first < 0:
            raise ValueError(f"first must not be negative, got {first}")
        first = (step * batch_size if first is None else first) + rank * rows
        windows = []
        for number in range(first, first + rows):
            epoch, place = divmod(number, count)
            window = permute(place, count, _key(seed, epoch, 1))
            windows.append(self._window(self._epoch_order(seed, epoch), window * seq_len, seq_len + 1))
        return _stack(windows)

    def validation_windows(self, seq_len: int, max_windows: int | None = None) -> Batch:
        """A fixed set of windows, the same in every run, evenly spaced over the documents in file order.

        The file groups documents by domain, so that even spacing covers each domain in proportion to its
        size.
        """
        count = self.windows_per_epoch(seq_len)
        taken = count if max_windows is None else min(count, max_windows)
        if taken < 1:
            raise ValueError(f"max_windows must be at least 1, got {max_windows}")
        order = _joined(self._documents, self._starts)
        places = [(2 * number + 1) * count // (2 * taken) for number in range(taken)]
        return _stack([self._window(order, place * seq_len, seq_len + 1) for place in places])

    def document(self, number: int) -> np.ndarray:
        """The token ids of one document, with its <bos> and <eos>."""
        place = self._documents[number]
        return np.asarray(self.tokens[self._starts[place] : self._starts[place + 1]])

    def document_domain(self, number: int) -> str:
        """The domain of one document."""
        return self.domain_names[self._domain_ids[self._documents[number]]]

    def stream(self) -> np.ndarray:
        """All tokens in file order, a view of the file where no domain has been taken."""
        if len(self._documents) == len(self._domain_ids):
            return self.tokens
        return np.concatenate([self.document(number) for number in range(self.n_documents)])

    def _epoch_order(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        kept = self.__dict__.setdefault("_orders", {})
        name = (self._documents.tobytes() if self.n_documents != len(self._domain_ids) else b"", seed, epoch)
        if name not in kept:
            while len(kept) > 3:  # a batch needs two orders at most, where it crosses an epoch
                kept.pop(next(iter(kept)))
            marks = _mix(self._documents.astype(np.uint64) ^ np.uint64(_key(seed, epoch, 0)))
            kept[name] = _joined(self._documents[np.argsort(marks, kind="stable")], self._starts)
        return kept[name]

    def _window(
        self, order: tuple[np.ndarray, np.ndarray], start: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        documents, ends = order
        tokens = np.empty(length, np.int64)
        domains = np.empty(length, np.int8)
        place = int(np.searchsorted(ends, start, side="right"))
        filled = 0
        while filled < length:
            document = documents[place]
            size = int(self._starts[document + 1] - self._starts[document])
            offset = start + filled - (int(ends[place]) - size)
            taken = min(length - filled, size - offset)
            begin = int(self._starts[document]) + offset
            tokens[filled : filled + taken] = self.tokens[begin : begin + taken]
            domains[filled : filled + taken] = self._domain_ids[document]
            filled += taken
            place += 1
        return tokens, domains


def _joined(documents: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return documents, np.cumsum(starts[documents + 1] - starts[documents])


def _stack(windows: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Cut by NumPy: torch would wake all its threads for these small copies, 20 ms each on a large host."""
    tokens = np.stack([tokens for tokens, _ in windows])
    domains = np.stack([domains for _, domains in windows])
    parts = (tokens[:, :-1], tokens[:, 1:], domains[:, :-1])
    return Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in parts))


# Shuffling ----------------------------------------------------------------------------------------
# Written out here because the order must stay the same over versions of NumPy and PyTorch.

_MASK = (1 << 64) - 1


def _mix_integer(value: int) -> int:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014): 64 bits in, 64 well mixed bits out."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _key(*numbers: int) -> int:
    key = 0
    for number in numbers:
        key = _mix_integer(key ^ (number & _MASK))
    return key


def permute(place: int, count: int, key: int) -> int:
    """Where `place` goes in the permutation of range(count) that `key` names, in constant memory.

    A Feistel network of four rounds permutes the next even power of two; places outside the range are
    permuted again until they fall inside (cycle walking: Black and Rogaway, 2002).
    """
    if not 0 <= place < count:
        raise ValueError(f"place must lie in 0..{count - 1}, got {place}")
    half = max(1, math.ceil((count - 1).bit_length() / 2))
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            left, right = right, left ^ (_mix_integer(key ^ (turn << 56) ^ right) & mask)
        place = left << half | right
        if place < count:
            return place


# Files --------------------------------------------------------------------------------------------


def prepare(
    corpus: Corpus, tokenizer: Tokenizer | None = None, directory: str | Path | None = None
) -> PackedDataset:
    """The training split of `corpus` in tokens; `.validation` is the other. Written once, then reused.

    Without a `directory` the files go to the user's cache, named by their content. A given directory is
    reused when its manifest and checksums fit and made again when they do not; a directory with other files
    in it is refused. The files appear all at once by a rename, also when several processes prepare the same
    data.
    """
    tokenizer = tokenizer or ByteTokenizer()
    if not len(corpus):
        raise ValueError("the corpus has no document; choose other domains or give a text file")
    fingerprint = _fingerprint(corpus, tokenizer)
    directory = Path(directory) if directory else cache_directory() / "packed" / fingerprint[:20]
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "manifest.json").exists():
        raise ValueError(
            f"directory {directory} holds files that are not packed data; name an empty or a new directory"
        )
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory must not be a file, got {directory}")
    ready = _reusable(directory, fingerprint)
    if ready is not None:
        return ready
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(directory)
    made = Path(tempfile.mkdtemp(prefix=f".{directory.name}.tmp-", dir=directory.parent))
    try:
        _write(corpus, tokenizer, fingerprint, made)
        return _publish(made, directory, fingerprint)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a packed directory; raises PackedDataError when it is missing, damaged or of another
    version.
    """
    path = Path(directory) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PackedDataError(
            f"no packed data in {directory}: manifest.json is missing; make it with "
            f"python -m dsv2.data --out {directory}"
        ) from None
    except (ValueError, OSError) as problem:
        raise PackedDataError(
            f"{path} cannot be read ({problem}); delete {directory} and prepare it again"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PackedDataError(
            f"{path} is not a manifest of {FORMAT}; delete {directory} and prepare it again"
        )
    if manifest.get("version") != VERSION:
        raise PackedDataError(
            f"{path} has version {manifest.get('version')!r}, this code reads version {VERSION}; "
            f"delete {directory} and prepare it again"
        )
    try:
        if manifest["dtype"] not in ("<u2", "<u4"):
            raise KeyError("dtype")
        if not isinstance(manifest["tokenizer"]["vocab_size"], int) or not isinstance(
            manifest["domains"], list
        ):
            raise KeyError("tokenizer")
        for split in SPLITS:
            entry = manifest["splits"][split]
            for kind in ("tokens", "documents"):
                if Path(entry[kind]["file"]).name != entry[kind]["file"]:
                    raise KeyError(f"{kind}: file")  # a manifest must not reach outside its directory
                entry[kind]["bytes"], entry[kind]["sha256"]
            entry["count"], entry["domains"], manifest["fingerprint"]
    except (KeyError, TypeError, AttributeError) as problem:
        raise PackedDataError(
            f"{path} has no usable entry {problem}; delete {directory} and prepare it again"
        ) from None
    return manifest


def _fingerprint(corpus: Corpus, tokenizer: Tokenizer) -> str:
    parts = {"version": VERSION, "corpus": corpus.fingerprint, "tokenizer": tokenizer.describe()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _reusable(directory: Path, fingerprint: str) -> PackedDataset | None:
    """The dataset when `directory` holds exactly this data, None when there is nothing or it must be made
    again.
    """
    if not (directory / "manifest.json").exists():
        return None
    try:
        if read_manifest(directory)["fingerprint"] != fingerprint:
            return None
        PackedDataset(directory, "validation")
        return PackedDataset(directory, "train")
    except (PackedDataError, OSError) as problem:
        warnings.warn(f"preparing the data again, because {problem}", stacklevel=3)
        return None


def _publish(made: Path, directory: Path, fingerprint: str) -> PackedDataset:
    for attempt in range(5):
        aside = None
        try:
            if directory.exists():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # said once already, by prepare
                    ready = _reusable(directory, fingerprint)
                if ready is not None:
                    return ready  # another process was first
                aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.tmp-", dir=directory.parent))
                os.replace(directory, aside / "old")
            os.replace(made, directory)
            return PackedDataset(directory, "train")
        except OSError:  # another process renamed first, or (Windows) still has the old files open
            time.sleep(0.05 * (attempt + 1))
        finally:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)
    raise OSError(
        f"could not move the prepared data to {directory}; another process may have its files open: "
        "stop it, or name another directory"
    )


def _remove_stale(directory: Path) -> None:
    """Delete what interrupted runs left beside `directory` more than a day ago."""
    for path in directory.parent.glob(f".{directory.name}.tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # another process removed it


def _write(corpus: Corpus, tokenizer: Tokenizer, fingerprint: str, directory: Path) -> None:
    names = corpus.domain_names
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")
    splits = {}
    for split, documents in zip(SPLITS, corpus.split()):
        splits[split] = _write_split(split, documents, names, tokenizer, dtype, directory)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "tokenizer": {
            **tokenizer.describe(),
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        },
        "dtype": dtype.str,
        "domains": names,
        "sources": corpus.notes,
        "splits": splits,
    }
    (directory / "manifest.json").write_text(
        json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8"
    )


def _write_split(
    split: str,
    documents: list[Document],
    names: list[str],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    directory: Path,
) -> dict[str, Any]:
    documents = sorted(
        documents, key=lambda document: names.index(document.domain)
    )  # stable: keeps their order
    sizes = {name: {"documents": 0, "bytes": 0, "tokens": 0} for name in names}
    index = np.zeros((len(documents) + 1, 2), np.int64)
    total = 0
    path = directory / f"{split}.bin"
    with path.open("wb") as file:
        shown = tqdm(documents, desc=f"tokens of the {split} split", unit="doc", leave=False, delay=2)
        for place, document in enumerate(shown):
            ids = np.array(tokenizer.encode(document.text, bos=True, eos=True))
            file.write(ids.astype(dtype).tobytes())
            index[place] = total, names.index(document.domain)
            total += len(ids)
            size = sizes[document.domain]
            size["documents"] += 1
            size["bytes"] += document.size
            size["tokens"] += len(ids)
        file.flush()
        os.fsync(file.fileno())  # the rename must not become visible before the content
    index[-1] = total, -1
    index_path = directory / f"{split}_documents.npy"
    np.save(index_path, index, allow_pickle=False)
    return {
        "count": total,
        "tokens": _file_entry(path),
        "documents": _file_entry(index_path),
        "domains": sizes,
    }


def _file_entry(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


def _check_file(path: Path, entry: dict[str, Any], verify: bool) -> None:
    advice = f"delete {path.parent} and prepare it again"
    if not path.is_file():
        raise PackedDataError(f"{path} is missing; {advice}")
    if path.stat().st_size != entry["bytes"]:
        raise PackedDataError(
            f"{path} has {path.stat().st_size:,} bytes, its manifest says {entry['bytes']:,}; {advice}"
        )
    if verify and _sha256(path) != entry["sha256"]:
        raise PackedDataError(f"{path} is damaged: its sha256 differs from the manifest; {advice}")
