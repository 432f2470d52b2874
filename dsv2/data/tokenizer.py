"""Tokenizers: bytes by default, a checkpoint's own tokenizer.json where there is one.

Both kinds share one interface: `vocab_size`, `bos_id`, `eos_id`, `pad_id`, `special_tokens`, `encode`,
`decode`, `decode_stream` and `describe`. A byte tokenizer needs no training, no file and no network, knows
every language, and makes the loss per token a loss per byte.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import operator
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; special tokens follow; 264 ids in all, a multiple of 8.

    `<bos>` opens and `<eos>` closes a document; `<pad>` fills a batch; `<user>`, `<assistant>` and `<end>`
    mark the turns of a conversation. The two ids after them are unused and decode to nothing.
    """

    SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<user>", "<assistant>", "<end>")
    vocab_size = 264
    bos_id, eos_id, pad_id, user_id, assistant_id, end_id = range(256, 262)

    def __init__(self) -> None:
        self.special_tokens = {text: 256 + place for place, text in enumerate(self.SPECIAL_TOKENS)}
        self._special_names = {number: text for text, number in self.special_tokens.items()}
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, self.SPECIAL_TOKENS)) + ")")

    def __repr__(self) -> str:
        return f"ByteTokenizer(vocab_size={self.vocab_size})"

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, allow_special: bool = False
    ) -> list[int]:
        """The ids of `text`. A special token spelt out in it is ordinary text unless `allow_special`."""
        ids = [self.bos_id] if bos else []
        pieces = self._special_pattern.split(text) if allow_special else [text]
        for piece in pieces:
            if allow_special and piece in self.special_tokens:
                ids.append(self.special_tokens[piece])
            else:
                ids.extend(_utf8(piece))
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[SupportsIndex], errors: str = "replace", skip_special: bool = True) -> str:
        """The text of `ids`. Incomplete or invalid UTF-8 follows `errors`, as in `bytes.decode`."""
        stream = self.decode_stream(errors=errors, skip_special=skip_special)
        return "".join(map(stream.push, _integers(ids))) + stream.finish()

    def decode_stream(self, errors: str = "replace", skip_special: bool = True) -> ByteStream:
        """An incremental decoder: `push(id)` returns the text that id completes, `finish()` the rest."""
        return ByteStream(self, errors, skip_special)

    def describe(self) -> dict[str, Any]:
        """What a manifest records to recognise this tokenizer."""
        return {"kind": "bytes", "vocab_size": self.vocab_size, "special_tokens": self.special_tokens}


class ByteStream:
    """Decodes byte ids one by one and returns text only where a UTF-8 character is complete."""

    def __init__(self, tokenizer: ByteTokenizer, errors: str, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token: SupportsIndex) -> str:
        """The text that `token` completes, often empty inside a multi-byte character."""
        token = operator.index(token)
        if 0 <= token < 256:
            return self._decoder.decode(bytes((token,)))
        if not 0 <= token < self._tokenizer.vocab_size:
            raise ValueError(f"token id must lie in 0..{self._tokenizer.vocab_size - 1}, got {token}")
        # A special token ends the character before it: bytes on its two sides never join.
        text = self.finish()
        return text if self._skip_special else text + self._tokenizer._special_names.get(token, "")

    def finish(self) -> str:
        """What is left of an incomplete character, by the rule of `errors`; the stream can then be used
        again.
        """
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class HFTokenizer:
    """A Hugging Face `tokenizer.json` through the optional `tokenizers` package.

    The ids of bos, eos and pad are read from `tokenizer_config.json` beside the file, else from the usual
    names; a tokenizer without a pad token pads with eos.
    """

    _USUAL_NAMES = {
        "bos": ("<｜begin▁of▁sentence｜>", "<bos>", "<s>", "<|begin_of_text|>", "<|endoftext|>"),
        "eos": ("<｜end▁of▁sentence｜>", "<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
        "pad": ("<｜▁pad▁｜>", "<pad>", "[PAD]"),
    }

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no tokenizer file at {self.path}; expected a tokenizer.json")
        try:
            import tokenizers
        except ImportError:
            raise ImportError(
                f"{self.path} needs the optional package `tokenizers`: pip install tokenizers"
            ) from None
        source = self.path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(source.decode("utf-8"))
        except Exception as problem:  # the package raises bare Exception
            raise ValueError(f"{self.path} is not a readable tokenizer.json: {problem}") from None
        self._sha256 = hashlib.sha256(source).hexdigest()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: number for number, token in added.items() if token.special}
        configured = self._configured_tokens()
        self.bos_id = self._find("bos", configured)
        self.eos_id = self._find("eos", configured)
        pad = self._find("pad", configured, required=False)
        self.pad_id = self.eos_id if pad is None else pad

    def __repr__(self) -> str:
        return f"HFTokenizer({str(self.path)!r}, vocab_size={self.vocab_size})"

    def _configured_tokens(self) -> dict[str, str]:
        config = self.path.with_name("tokenizer_config.json")
        if not config.is_file():
            return {}
        try:
            entries = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as problem:
            raise ValueError(f"{config} is not valid JSON: {problem}") from None
        if not isinstance(entries, dict):
            raise ValueError(f"{config} must hold a JSON object, got {type(entries).__name__}")
        tokens = {}
        for role in ("bos", "eos", "pad"):
            entry = entries.get(f"{role}_token")
            if isinstance(entry, dict):  # newer files hold {"content": ..., "lstrip": ...}
                entry = entry.get("content")
            if isinstance(entry, str):
                tokens[role] = entry
        return tokens

    def _find(self, role: str, configured: dict[str, str], required: bool = True) -> int | None:
        names = (configured[role],) if role in configured else self._USUAL_NAMES[role]
        for name in names:
            number = self._tokenizer.token_to_id(name)
            if number is not None:
                return number
        if required:
            raise ValueError(
                f"{self.path} has no {role} token among {', '.join(names)}; name it as {role}_token in "
                "tokenizer_config.json beside it"
            )
        return None

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, allow_special: bool = False
    ) -> list[int]:
        """The ids of `text`. A special token spelt out in it is ordinary text unless `allow_special`."""
        self._tokenizer.encode_special_tokens = not allow_special
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Iterable[SupportsIndex], errors: str = "replace", skip_special: bool = True) -> str:
        """The text of `ids`; with errors="strict" a ValueError where the bytes are not whole characters."""
        numbers = _integers(ids)
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise ValueError(f"token id must lie in 0..{self.vocab_size - 1}, got {number}")
        text = self._tokenizer.decode(numbers, skip_special_tokens=skip_special)
        if "\ufffd" in text:
            if errors == "strict":
                raise ValueError("the ids do not decode to whole UTF-8 characters; use errors='replace'")
            if errors == "ignore":
                text = text.replace("\ufffd", "")
        return text

    def decode_stream(self, errors: str = "replace", skip_special: bool = True) -> HFStream:
        """An incremental decoder: `push(id)` returns the text that id completes, `finish()` the rest."""
        return HFStream(self, errors, skip_special)

    def describe(self) -> dict[str, Any]:
        """What a manifest records to recognise this tokenizer."""
        return {"kind": "tokenizer.json", "vocab_size": self.vocab_size, "sha256": self._sha256}


class HFStream:
    """Decodes ids one by one; text is held back while its last character is incomplete.

    A token's text can depend on the one before it (a leading space, for instance), so that the text of the
    last tokens is decoded with and without the new one and the difference is returned.
    """

    def __init__(self, tokenizer: HFTokenizer, errors: str, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._errors = errors
        self._skip_special = skip_special
        self._context: list[int] = []  # already returned, kept for how the next token joins
        self._waiting: list[int] = []

    def _text(self, ids: Sequence[int], errors: str) -> str:
        return self._tokenizer.decode(ids, errors, self._skip_special)

    def push(self, token: SupportsIndex) -> str:
        """The text that `token` completes, often empty inside a character of several tokens."""
        self._waiting.append(operator.index(token))
        before = self._text(self._context, "replace")
        after = self._text(self._context + self._waiting, "replace")
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._context, self._waiting = self._waiting, []
        return after[len(before) :]

    def finish(self) -> str:
        """What is left of an incomplete character, by the rule of `errors`; the stream can then be used
        again.
        """
        before = self._text(self._context, "replace")
        after = self._text(self._context + self._waiting, "replace")
        left = after[len(before) :]
        self._context, self._waiting = [], []
        if "\ufffd" in left and self._errors == "strict":
            raise ValueError("the stream ended inside a UTF-8 character")
        return left.replace("\ufffd", "") if self._errors == "ignore" else left


Tokenizer = ByteTokenizer | HFTokenizer


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint directory: its tokenizer.json if it has one, bytes otherwise."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"directory must exist, got {directory}")
    path = directory / "tokenizer.json"
    return HFTokenizer(path) if path.is_file() else ByteTokenizer()


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise ValueError(
            f"text must be valid Unicode, but character {problem.start} is half of a surrogate pair "
            f"({text[problem.start]!r}); read the text again with the right encoding"
        ) from None


def _integers(ids: Iterable[SupportsIndex]) -> list[int]:
    return ids.tolist() if hasattr(ids, "tolist") else [operator.index(number) for number in ids]
