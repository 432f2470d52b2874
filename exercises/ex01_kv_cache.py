"""Chapter 01: attention that remembers, and what remembering costs.

Six exercises: a cache for keys and values, attention of new tokens over everything in it, heads that share
them, the bytes a real model keeps of each token, how many texts a GPU can write at once, and a decoding loop
with a bug in it.

    python3 course.py check 01        all of this chapter
    python3 course.py check 01.1      one exercise
    python3 course.py hint 01.1       a hint; again, for a plainer one
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


# exercise 01.1: a cache for one layer (difficulty 1 of 3, about 10 minutes)
# check: python3 course.py check 01.1     in a notebook: check("01.1")
# hint:  python3 course.py hint 01.1      in a notebook: hint("01.1")
class LayerCache:
    """Keys and values of one layer, in memory that is allocated once.

    keys, values: (batch, max_tokens, kv_heads, dim), zeros at first; batch: how many texts there are.
    length: how many tokens of each text are stored.

    >>> cache = LayerCache(batch=1, max_tokens=4, kv_heads=1, dim=1)
    >>> first = cache.append(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 1, 1))
    >>> keys, values = cache.append(torch.full((1, 1, 1, 1), 7.0), torch.full((1, 1, 1, 1), 8.0))
    >>> keys.flatten().tolist(), values.flatten().tolist(), cache.length
    ([1.0, 1.0, 7.0], [1.0, 1.0, 8.0], 3)
    """

    def __init__(self, batch: int, max_tokens: int, kv_heads: int, dim: int):
        self.keys = torch.zeros(batch, max_tokens, kv_heads, dim)
        self.values = torch.zeros(batch, max_tokens, kv_heads, dim)
        self.length = 0

    def append(
        self,
        keys: Float[Tensor, "batch tokens kv_heads dim"],
        values: Float[Tensor, "batch tokens kv_heads dim"],
    ) -> tuple[Float[Tensor, "batch length kv_heads dim"], Float[Tensor, "batch length kv_heads dim"]]:
        """Store the keys and values of further tokens, one or many; returns those of all tokens so far.

        Writes into the memory that is there and leaves none of its empty slots in what it returns. Raises
        ValueError if the tokens do not fit.
        """
        raise NotImplementedError("exercise 01.1: write this, then run: python3 course.py check 01.1")


# exercise 01.2: attention over everything so far (difficulty 2 of 3, about 15 minutes)
# check: python3 course.py check 01.2     in a notebook: check("01.2")
# hint:  python3 course.py hint 01.2      in a notebook: hint("01.2")
def causal_attention(
    q: Float[Tensor, "batch tokens heads dim"],
    k: Float[Tensor, "batch keys heads dim"],
    v: Float[Tensor, "batch keys heads dim"],
) -> Float[Tensor, "batch tokens heads dim"]:
    """Attention of the newest tokens of a text over all of its tokens so far.

        o_t = sum over j <= t of  Softmax_j(q_t . k_j / sqrt(dim)) v_j        (DeepSeek-V2, equation 7)

    k and v belong to the whole text, positions 0 .. keys - 1; q to its last `tokens` tokens. So the last
    query stands at position keys - 1, and every query sees the keys up to its own position, itself included.
    Each head works for itself.

    Two new tokens at the end of a text of three. All scores are 0, so that an output is the mean of the
    values that its query sees: of 3 and 5, then of 3, 5 and 10.

    >>> values = torch.tensor([3.0, 5.0, 10.0]).reshape(1, 3, 1, 1)
    >>> causal_attention(torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 1, 1), values).flatten().round(decimals=3)
    tensor([4., 6.])
    """
    raise NotImplementedError("exercise 01.2: write this, then run: python3 course.py check 01.2")


# exercise 01.3: heads that share keys and values (difficulty 2 of 3, about 15 minutes)
# check: python3 course.py check 01.3     in a notebook: check("01.3")
# hint:  python3 course.py hint 01.3      in a notebook: hint("01.3")
def grouped_attention(
    q: Float[Tensor, "batch tokens heads qk_dim"],
    k: Float[Tensor, "batch keys kv_heads qk_dim"],
    v: Float[Tensor, "batch keys kv_heads v_dim"],
    scale: float,
    mask: Bool[Tensor, "_ tokens keys"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "batch tokens heads v_dim"]:
    """MHA, GQA and MQA in one: softmax(scale * q . k) v, with heads // kv_heads query heads on each key head.

    Query heads are grouped in order: of 6 query heads and 3 key/value heads, heads 0 and 1 read the first,
    2 and 3 the second, 4 and 5 the third. Values may be narrower than keys.

    mask: True where a query may look, the same for all heads; its first axis is 1, or has a mask for each
    text. causal: query t sees keys 0..t; it is asked for only when nothing is cached. The first lines, which
    are given, make `visible` of both.

    Four query heads share two value heads. There is one key, so that each output is the value itself.

    >>> values = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1)
    >>> grouped_attention(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 2, 3), values, scale=1.0).flatten()
    tensor([1., 1., 2., 2.])
    """
    tokens, keys = q.shape[1], k.shape[1]
    visible = torch.ones(1, tokens, keys, dtype=torch.bool, device=q.device)
    visible = visible.tril() if causal else visible
    visible = visible & mask if mask is not None else visible  # (1 or batch, tokens, keys), True: may look
    raise NotImplementedError("exercise 01.3: write this, then run: python3 course.py check 01.3")


# exercise 01.4: what a real model keeps of a token (difficulty 1 of 3, about 10 minutes)
# check: python3 course.py check 01.4     in a notebook: check("01.4")
# hint:  python3 course.py hint 01.4      in a notebook: hint("01.4")
def kv_bytes_per_token(config: dict[str, Any], bits: float = 16) -> float:
    """Bytes that a model with MHA, GQA or MQA caches for each token, all layers together, from its config.

        2 * kv_heads * head_dim * layers  numbers a token        (DeepSeek-V2, table 1)

    The config has `num_hidden_layers`, `num_attention_heads` and `hidden_size`. `num_key_value_heads` may be
    missing: every head then has keys and values of its own. So may `head_dim`: the heads then share
    `hidden_size` among them. bits: of one cached number; 6 is possible too.

    3 layers, 4 heads of 64 / 4 = 16: 2 * 4 * 16 * 3 = 384 numbers of 2 bytes.

    >>> kv_bytes_per_token({"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64})
    768.0
    """
    raise NotImplementedError("exercise 01.4: write this, then run: python3 course.py check 01.4")


# exercise 01.5: how many texts at once, and how fast (difficulty 2 of 3, about 15 minutes)
# check: python3 course.py check 01.5     in a notebook: check("01.5")
# hint:  python3 course.py hint 01.5      in a notebook: hint("01.5")
def decode_limits(memory: float, bandwidth: float, weights: float, one_text: float) -> tuple[int, float]:
    """The batch, how many whole texts fit beside the weights, and the tokens a second it gets at most.

    memory: bytes of the device; bandwidth: bytes it reads a second; weights: bytes of the model; one_text:
    bytes in the cache of one text. One step of decoding writes one token of every text. It reads all weights
    once, whatever the batch, and the cache of every text; the arithmetic hides behind that. If not even one
    text fits: (0, 0.0).

    60 bytes are left beside the weights: 3 texts. A step reads 40 + 3 * 20 = 100 bytes in 0.1 s.

    >>> decode_limits(memory=100, bandwidth=1000, weights=40, one_text=20)
    (3, 30.0)
    """
    raise NotImplementedError("exercise 01.5: write this, then run: python3 course.py check 01.5")


# exercise 01.6: a decoding loop that forgets where it is (a bug hunt, difficulty 2 of 3, about 10 minutes)
# check: python3 course.py check 01.6     in a notebook: check("01.6")
# hint:  python3 course.py hint 01.6      in a notebook: hint("01.6")
def decode(
    model: Callable[..., Float[Tensor, "batch tokens vocab"]], prompt: Int[Tensor, "batch prompt"], count: int
) -> tuple[Int[Tensor, "batch count"], Float[Tensor, "batch count vocab"]]:
    """Write `count` tokens after a prompt with a cache; returns the tokens and the logits each was chosen by.

    model(tokens, positions, cache) adds `tokens`, which stand at `positions` of their text, to the cache and
    returns the logits of what follows each of them. The first call reads the whole prompt, every later one
    the single token just written.

    The code below runs, its first two tokens are right, and one of its lines is wrong. Find it.

    A model that says where the next token stands. After a prompt of 3, at positions 0, 1, 2:

    >>> class Counting:
    ...     def new_cache(self, batch, max_tokens):
    ...         return None
    ...     def __call__(self, tokens, positions, cache):
    ...         return torch.nn.functional.one_hot(positions + 1, num_classes=9).float()[None]
    >>> decode(Counting(), torch.tensor([[7, 7, 7]]), count=4)[0]
    tensor([[3, 4, 5, 6]])
    """
    cache = model.new_cache(batch=prompt.shape[0], max_tokens=prompt.shape[1] + count)
    written, chosen_by = [], []
    tokens, position = prompt, 0
    for _ in range(count):
        positions = torch.arange(position, position + tokens.shape[1])
        logits = model(tokens, positions, cache)[:, -1]  # what follows the newest token
        position = tokens.shape[1]  # where the next token stands
        tokens = logits.argmax(dim=-1, keepdim=True)
        written.append(tokens)
        chosen_by.append(logits)
    return torch.cat(written, dim=1), torch.stack(chosen_by, dim=1)

# stub 3048d9: file 114bcf, 01.1 853e00, 01.2 d650df, 01.3 10d766, 01.4 87c7fe, 01.5 109051, 01.6 d4caf8
