"""Writing text: a prompt in, text out, all at once or token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsv2.attention import Cache
from dsv2.data import ByteTokenizer
from dsv2.generate.loop import PREFILL_CHUNK, DecodeStep, decode, prefill
from dsv2.generate.sampling import Sampling, next_token_probabilities
from dsv2.model import DeepSeekV2
from dsv2.moe import Routing

__all__ = [
    "PREFILL_CHUNK",
    "DecodeStep",
    "Sampling",
    "Step",
    "decode",
    "generate",
    "is_looping",
    "next_token_probabilities",
    "prefill",
    "stream",
]


@dataclass
class Step:
    """What one decoding step adds to a text.

    token: the new id. text: what can be shown now; bytes of an unfinished character, and text that may be the
    beginning of a stop string, wait. position: of the new token in its sequence. routings: of the token that
    was just fed in, one per layer of experts. finish: None, or why the text ends: "eos", "stop", "loop",
    "length".
    """

    token: int
    text: str
    position: int
    routings: list[Routing]
    cache: Cache
    finish: str | None = None


class _Text:
    """One sequence's text as it grows: bytes become characters, stop strings and loops are found."""

    def __init__(self, tokenizer, stop: Sequence[str], loop_window: int | None):
        self.tokens: list[int] = []
        self.shown = ""
        self.finish: str | None = None
        self._decoder = tokenizer.decode_stream()
        self._pending = ""
        self._stop, self._loop_window = tuple(stop), loop_window
        self._eos = tokenizer.eos_id

    def add(self, token: int, last: bool) -> str:
        """The text that token `token` makes ready."""
        self.tokens.append(token)
        if token == self._eos:
            self.finish = "eos"
        else:
            self._pending += self._decoder.push(token)
            if self._loop_window and is_looping(self.tokens, self._loop_window):
                self.finish = "loop"
        if last and self.finish is None:
            self.finish = "length"
        if self.finish:
            self._pending += self._decoder.finish()
        cut = min((at for s in self._stop if (at := self._pending.find(s)) >= 0), default=None)
        if cut is not None:
            ready, self._pending, self.finish = self._pending[:cut], "", "stop"
        else:
            waiting = 0 if self.finish else max((_overlap(self._pending, s) for s in self._stop), default=0)
            ready = self._pending[: len(self._pending) - waiting]
            self._pending = self._pending[len(ready) :]
        self.shown += ready
        return ready


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def is_looping(tokens: Sequence[int], window: int, longest_cycle: int = 32) -> bool:
    """Whether the last `window` tokens are one cycle of at most `longest_cycle` tokens, over and over."""
    if len(tokens) < window:
        return False
    tail = list(tokens[-window:])
    return any(tail[cycle:] == tail[:-cycle] for cycle in range(1, min(longest_cycle, window // 3) + 1))


def stream(
    model: DeepSeekV2,
    prompt: str | Sequence[int],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    loop_window: int | None = 128,
    tokenizer=None,
) -> Iterator[Step]:
    """One `Step` per new token, as soon as it is there. Arguments as in `generate`."""
    tokenizer = _tokenizer(model, tokenizer)
    ids, stop = _encode(tokenizer, prompt), _stop_strings(stop)
    text = _Text(tokenizer, stop, loop_window)
    sampling = Sampling(temperature, top_k, top_p, seed)
    for made, step in enumerate(decode(model, [ids], max_new_tokens, sampling), start=1):
        token = int(step.tokens[0])
        ready = text.add(token, last=made == max_new_tokens)
        yield Step(token, ready, len(ids) + made - 1, step.routings, step.cache, text.finish)
        if text.finish:
            return


def generate(
    model: DeepSeekV2,
    prompt: str | Sequence[int] | Sequence[str],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    loop_window: int | None = 128,
    tokenizer=None,
) -> str | list[str]:
    """The text that follows a prompt, without the prompt; a list of prompts gives a list of texts.

    prompt: text, token ids, or a list of texts of any lengths, decoded together. temperature: 0 takes the
    likeliest token. top_k, top_p: draw only from the likeliest tokens. seed: the same text every time,
    whatever other prompts stand beside it. stop: text that ends a text, and is left out. loop_window: end a
    text whose last so many tokens repeat one short cycle; None: never. tokenizer: by default the model's, or
    bytes.
    """
    if not (isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], str)):
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        options |= dict(stop=stop, loop_window=loop_window, tokenizer=tokenizer)
        return "".join(step.text for step in stream(model, prompt, max_new_tokens, **options))
    tokenizer = _tokenizer(model, tokenizer)
    texts = [_Text(tokenizer, _stop_strings(stop), loop_window) for _ in prompt]
    sampling = Sampling(temperature, top_k, top_p, seed)
    prompts = [_encode(tokenizer, p) for p in prompt]
    for made, step in enumerate(decode(model, prompts, max_new_tokens, sampling), start=1):
        for row, (text, token) in enumerate(zip(texts, step.tokens.tolist())):
            if text.finish is None:
                text.add(token, last=made == max_new_tokens)
            step.alive[row] = text.finish is None
    return [text.shown for text in texts]


def _tokenizer(model: DeepSeekV2, tokenizer):
    tokenizer = tokenizer or model.tokenizer or ByteTokenizer()
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is "
            f"{model.cfg.vocab_size}; pass the tokenizer that belongs to these weights"
        )
    return tokenizer


def _encode(tokenizer, prompt: str | Sequence[int]) -> list[int]:
    return tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else [int(t) for t in prompt]


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not s for s in stop):
        raise ValueError("stop holds an empty string, which would end every text at once; leave it out")
    return stop
