"""Writing text: prefill, the decode loop, sampling, streaming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2.attention import Cache
from dsv2.data import ByteTokenizer
from dsv2.model import DeepSeekV2
from dsv2.moe import Routing

PREFILL_CHUNK = 1024  # tokens of a prompt that go through the model at once: bounds the memory of a long one


# ---------------------------------------------------------------------------------------------- sampling


def next_token_probabilities(
    logits: Float[Tensor, "batch vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "batch vocab"]:
    """softmax(logits / temperature), cut to the `top_k` likeliest, then to those that make up `top_p`.

    The token that crosses `top_p` stays in, so that at least one does (arXiv 1904.09751). temperature=0 gives
    all the probability to the likeliest token.
    """
    logits = logits.float()
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_k is None and top_p is None:
        return probabilities
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[..., top_k:] = 0
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    if top_p is not None:
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0)
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, tokens, ordered)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature=0 is greedy; the default draws from the model as it is."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None for the whole vocabulary")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1], or be None for the whole vocabulary")

    def generators(self, batch: int, device: torch.device) -> list[torch.Generator]:
        """One source of chance per sequence, so that what one says does not depend on its neighbours."""
        seed = torch.seed() if self.seed is None else self.seed
        return [torch.Generator(device).manual_seed((seed + row) % 2**63) for row in range(batch)]

    def draw(
        self, logits: Float[Tensor, "batch vocab"], generators: list[torch.Generator]
    ) -> Int[Tensor, " batch"]:
        """The next token of every sequence."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = next_token_probabilities(logits, self.temperature, self.top_k, self.top_p)
        rows = zip(probabilities, generators)
        return torch.cat([torch.multinomial(p, 1, generator=generator) for p, generator in rows])


# ------------------------------------------------------------------------------------------- decode loop


@dataclass
class DecodeStep:
    """One new token for every sequence.

    tokens: (batch,). alive: (batch,), False where the text had ended before.

    routings: of the tokens that were just fed in (the prompt's last piece at first), one per layer of
    experts.
    """

    tokens: Int[Tensor, " batch"]
    alive: Bool[Tensor, " batch"]
    routings: list[Routing]
    cache: Cache


def prefill(
    model: DeepSeekV2, prompts: Sequence[Sequence[int]], cache: Cache, chunk: int = PREFILL_CHUNK
) -> tuple[Float[Tensor, "batch vocab"], list[Routing]]:
    """Put prompts of different lengths into the cache; returns the logits after each one's last token."""
    device = model.embed.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = max(len(p) for p in prompts)
    tokens = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    real = torch.arange(longest, device=device) < lengths[:, None]
    logits = None
    for start in range(0, longest, chunk):
        piece = slice(start, start + chunk)
        mask = None if len({len(p) for p in prompts}) == 1 else real[:, piece]
        out = model(tokens[:, piece], cache=cache, attention_mask=mask, last_only=True)
        ends_here = (lengths > start) & (lengths <= start + chunk)
        last = out.logits[:, 0]
        logits = last if logits is None else torch.where(ends_here[:, None], last, logits)
    return logits, out.routings


def decode(
    model: DeepSeekV2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_id: int | None = None,
    cache: Cache | None = None,
) -> Iterator[DecodeStep]:
    """Prefill, then one `DecodeStep` per new token until every sequence has ended.

    The cache is exactly as large as the longest prompt and `max_new_tokens` need, unless one is given. A
    sequence ends with `eos_id`, or when the caller sets its place in `step.alive` to False.

    Raises ValueError for an empty prompt, or one that leaves no room in `max_position_embeddings`.
    """
    _check_prompts(model, prompts, max_new_tokens)
    device = model.embed.weight.device
    batch, longest = len(prompts), max(len(p) for p in prompts)
    if cache is None:  # the last token is never fed in again, so it needs no place
        cache = model.new_cache(batch, longest + max_new_tokens - 1)
    generators = sampling.generators(batch, device)
    alive = torch.ones(batch, dtype=torch.bool, device=device)
    was_training = model.training
    model.eval()
    try:
        logits, routings = prefill(model, prompts, cache)
        for made in range(1, max_new_tokens + 1):
            tokens = sampling.draw(logits, generators)
            step = DecodeStep(tokens, alive.clone(), routings, cache)
            yield step
            alive = alive & step.alive
            if eos_id is not None:
                alive = alive & (tokens != eos_id)
            if made == max_new_tokens or not alive.any():
                return
            mask = None if alive.all() else alive[:, None]
            out = model(tokens[:, None], cache=cache, attention_mask=mask)
            logits, routings = out.logits[:, -1], out.routings
    finally:
        model.train(was_training)


def _check_prompts(model: DeepSeekV2, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompts or any(len(p) == 0 for p in prompts):
        raise ValueError(
            "every prompt needs at least one token; start an empty text with the tokenizer's bos_id"
        )
    longest, limit = max(len(p) for p in prompts), model.cfg.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} pass the model's "
            f"max_position_embeddings={limit}; shorten one of them"
        )


# ---------------------------------------------------------------------------------------------- text


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
