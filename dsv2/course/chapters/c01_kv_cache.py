"""The exercises of chapter 01: cases, right answers, plausible mistakes, hints."""

# B batch   T tokens (queries)   S keys   H query heads   G key/value heads   D head dimension

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv2.attention.baselines import grouped_attention
from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.rope import rope_frequencies, rotate_pairs

NEVER = float("-inf")


def random(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers in each of the shapes, the same ones each time."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# ------------------------------------------------------------------------------------------ 01.1 the cache


class LayerCache:
    """Right. The mistakes below change one step of `append` each."""

    def __init__(self, batch: int, max_tokens: int, kv_heads: int, dim: int):
        self.keys = torch.zeros(batch, max_tokens, kv_heads, dim)
        self.values = torch.zeros(batch, max_tokens, kv_heads, dim)
        self.length = 0

    def require_room(self, end: int) -> None:
        if end > self.keys.shape[1]:
            raise ValueError(f"the cache holds {self.keys.shape[1]} tokens a text and {end} are needed")

    def store(self, keys: Tensor, values: Tensor, start: int) -> int:
        """Write and return the slot behind what was written."""
        end = start + keys.shape[1]
        self.keys[:, start:end], self.values[:, start:end] = keys, values
        return end

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.require_room(self.length + keys.shape[1])
        self.length = self.store(keys, values, self.length)
        return self.keys[:, : self.length], self.values[:, : self.length]


class NeverAdvances(LayerCache):
    def append(self, keys, values):
        self.require_room(self.length + keys.shape[1])
        end = self.store(keys, values, self.length)
        return self.keys[:, :end], self.values[:, :end]


class AdvancesByOne(LayerCache):
    def append(self, keys, values):
        self.require_room(self.length + keys.shape[1])
        end = self.store(keys, values, self.length)
        self.length += 1
        return self.keys[:, :end], self.values[:, :end]


class LengthOfTheCall(LayerCache):
    def append(self, keys, values):
        self.require_room(self.length + keys.shape[1])
        end = self.store(keys, values, self.length)
        self.length = keys.shape[1]
        return self.keys[:, :end], self.values[:, :end]


class NothingComesBack(LayerCache):
    def append(self, keys, values):
        self.require_room(self.length + keys.shape[1])
        self.store(keys, values, self.length)
        return self.keys[:, : self.length], self.values[:, : self.length]


class WritesAtTheStart(LayerCache):
    def append(self, keys, values):
        self.require_room(self.length + keys.shape[1])
        self.store(keys, values, 0)
        self.length += keys.shape[1]
        return self.keys[:, : self.length], self.values[:, : self.length]


class ReturnsEverySlot(LayerCache):
    def append(self, keys, values):
        super().append(keys, values)
        return self.keys, self.values


class ReturnsTheNewOnes(LayerCache):
    def append(self, keys, values):
        super().append(keys, values)
        return keys, values


class ReturnsTheOldOnes(LayerCache):
    def append(self, keys, values):
        before = self.length
        super().append(keys, values)
        return self.keys[:, :before], self.values[:, :before]


class KeysTwice(LayerCache):
    def append(self, keys, values):
        return super().append(keys, keys)


class LosesWhatDoesNotFit(LayerCache):
    def require_room(self, end):
        pass

    def append(self, keys, values):
        end = self.length + keys.shape[1]
        room = max(self.keys.shape[1] - self.length, 0)
        self.store(keys[:, :room], values[:, :room], min(self.length, self.keys.shape[1]))
        self.length = end
        return self.keys[:, :end], self.values[:, :end]


class BehindTheEmptySlots(LayerCache):
    def append(self, keys, values):
        self.keys, self.values = torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1)
        self.length += keys.shape[1]
        return self.keys, self.values


class Grows(LayerCache):
    def append(self, keys, values):
        self.require_room(self.length + keys.shape[1])
        self.keys = torch.cat(
            [self.keys[:, : self.length], keys, self.keys[:, self.length + keys.shape[1] :]], 1
        )
        self.values = torch.cat(
            [self.values[:, : self.length], values, self.values[:, self.length + keys.shape[1] :]], 1
        )
        self.length += keys.shape[1]
        return self.keys[:, : self.length], self.values[:, : self.length]


def cache_case(seed: int, batch: int, max_tokens: int, kv_heads: int, dim: int, calls: tuple[int, ...]):
    shape = (batch, sum(calls), kv_heads, dim)
    keys, values = random(seed, shape, shape)
    return {
        "room": {"batch": batch, "max_tokens": max_tokens, "kv_heads": kv_heads, "dim": dim},
        "calls": list(zip(keys.split(calls, dim=1), values.split(calls, dim=1))),
    }


def use_cache(make: Callable[..., Any], case: Mapping[str, Any]) -> dict[str, Any]:
    """Append call by call: what the last one returned, and whether the cache kept its memory and limit."""
    cache = make(**case["room"])
    memory = cache.keys.data_ptr(), cache.values.data_ptr()
    for keys, values in case["calls"]:
        returned = cache.append(keys.clone(), values.clone())
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            raise TypeError(f"append is to return two tensors, keys and values; it returned {type(returned)}")
    all_keys, all_values = returned
    result = {"keys": all_keys.clone(), "values": all_values.clone(), "length": cache.length}
    same = memory == (cache.keys.data_ptr(), cache.values.data_ptr())
    result["memory"] = "the memory it was made with" if same else "other memory than it was made with"
    too_many = torch.ones_like(keys[:, :1])
    try:
        for _ in range(case["room"]["max_tokens"] + 1):
            cache.append(too_many, too_many)
    except ValueError:
        result["one token more than fits"] = "ValueError"
    else:
        result["one token more than fits"] = "no error, and the token is lost"
    return result


LAYER_CACHE = Exercise(
    number="01.1",
    name="LayerCache",
    title="a cache for one layer",
    difficulty=1,
    minutes=10,
    answer=LayerCache,
    run=use_cache,
    cases=(
        Case(
            "2 texts, room for 9 tokens, 3 heads of 4; 3 tokens, then 1, then 2 are appended",
            lambda: cache_case(4, 2, 9, 3, 4, (3, 1, 2)),
        ),
        Case(
            "3 texts, room for 7 tokens, 1 head of 5; 4 tokens one by one",
            lambda: cache_case(5, 3, 7, 1, 5, (1, 1, 1, 1)),
        ),
        Case(
            "1 text, room for 5 tokens, 2 heads of 3; 2 tokens, then 3: full to the last slot",
            lambda: cache_case(6, 1, 5, 2, 3, (2, 3)),
        ),
    ),
    mistakes=(
        Mistake(
            "length not advanced",
            "The length stays where it was, so that every call writes over the tokens of the call before. "
            "The cache forgets all but the newest tokens.",
            NeverAdvances,
        ),
        Mistake(
            "advanced by one",
            "The length grows by one a call, however many tokens came. A prompt of several tokens is then "
            "written over by the tokens after it.",
            AdvancesByOne,
        ),
        Mistake(
            "length of the call",
            "The length is set to the number of new tokens. It counts all tokens stored so far, those of "
            "earlier calls too.",
            LengthOfTheCall,
        ),
        Mistake(
            "nothing comes back",
            "The length is still 0 after tokens were stored, and what is cut off by it is empty. Somewhere "
            "it has to be told of them.",
            NothingComesBack,
        ),
        Mistake(
            "writes at the start",
            "Every call writes into the first slots, over the tokens that are there. New tokens belong "
            "behind those already stored.",
            WritesAtTheStart,
        ),
        Mistake(
            "returns every slot",
            "All slots come back, the empty ones too. Their keys are zeros: a score of 0 is not a weight of "
            "0, so attention would count tokens that do not exist.",
            ReturnsEverySlot,
        ),
        Mistake(
            "returns the new tokens only",
            "Only what was just appended comes back. The new query has to meet the keys of the whole text, "
            "or the cache is of no use.",
            ReturnsTheNewOnes,
        ),
        Mistake(
            "returns what was there before",
            "What comes back lacks the tokens just appended. A token attends to itself too, so its own key "
            "and value belong to the result.",
            ReturnsTheOldOnes,
        ),
        Mistake(
            "keys stored as values",
            "The values that come back are the keys. The two are different things: keys decide how much a "
            "token counts, values are what is then added up.",
            KeysTwice,
        ),
        Mistake(
            "loses what does not fit",
            "When the cache is full, a further token disappears without an error. PyTorch cuts a slice off "
            "at the end of a tensor; nobody will notice but the readers of the text.",
            LosesWhatDoesNotFit,
        ),
        Mistake(
            "behind the empty slots",
            "The new tokens were joined on behind the slots that were empty, which still stand in between. "
            "Empty slots are there to be written into.",
            BehindTheEmptySlots,
        ),
        Mistake(
            "grows by copying",
            "The numbers are right, but the cache has moved to new memory. Joining tensors copies the whole "
            "past at every token; writing into the memory that is there copies only the new ones.",
            Grows,
        ),
    ),
    hints=(
        "The cache has 9 slots and 3 of them are filled. Now 2 tokens come: which slots do they go to, and "
        "which slots belong to what you return?",
        'The notebook does this by hand for one head under "The cache". Axis 1 counts slots; a slice on '
        "the left of = writes in place. What if the slice ends beyond the last slot?",
        "start = length; end = start + number of new tokens\n"
        "if end is more than max_tokens: raise ValueError\n"
        "write keys and values into slots start .. end - 1\n"
        "length = end\n"
        "return slots 0 .. end - 1 of both",
    ),
    checked="chunks of several sizes, keys and values apart, the same memory throughout, and an error when "
    "it is full",
    axes=("text", "token", "kv head", "dim"),
)


# ----------------------------------------------------------------------------------- 01.2 causal attention


def attention_case(seed: int, batch: int, tokens: int, keys: int, heads: int, dim: int) -> dict[str, Tensor]:
    q, k, v = random(seed, (batch, tokens, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, dim))
    return {"q": 1.5 * q, "k": k, "v": v}


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Right: the newest query sees every key."""
    tokens, keys = q.shape[1], k.shape[1]
    visible = torch.ones(1, tokens, keys, dtype=torch.bool).tril(keys - tokens)
    return grouped_attention(q, k, v, q.shape[-1] ** -0.5, mask=visible)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    diagonal: int | None = None,
    hidden: float = NEVER,
    over: int = -1,
) -> Tensor:
    """The mistakes' attention. diagonal: of the mask, from the first query's last key; None: no mask."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * torch.einsum("bthd,bshd->bhts", q, k)
    if diagonal is not None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(diagonal)
        scores = scores.masked_fill(~visible, hidden)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(dim=over), v)


def cached(q: Tensor, k: Tensor) -> int:
    return k.shape[1] - q.shape[1]


def heads_among_themselves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula for matrices on axes that are not (..., tokens, dim): runs by luck where tokens = keys."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, NEVER).softmax(dim=-1) @ v


def mask_turned_round(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(cached(q, k))
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(visible, NEVER).softmax(dim=-1), v)


def masked_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1).tril(cached(q, k)), v)


CAUSAL_ATTENTION = Exercise(
    number="01.2",
    name="causal_attention",
    title="attention over everything so far",
    difficulty=2,
    minutes=15,
    answer=causal_attention,
    cases=(
        Case(
            "2 texts of 5 tokens, nothing cached before them (tokens = keys), 3 heads of 4",
            lambda: attention_case(1, 2, 5, 5, 3, 4),
        ),
        Case(
            "2 texts, 3 new tokens after 4 cached ones (keys = 7), 5 heads of 6",
            lambda: attention_case(2, 2, 3, 7, 5, 6),
        ),
        Case(
            "3 texts, 1 new token after 7 cached ones (keys = 8), 2 heads of 5",
            lambda: attention_case(3, 3, 1, 8, 2, 5),
        ),
    ),
    mistakes=(
        Mistake(
            "mask from the first key",
            "This is what comes out when query t sees keys 0..t, as if nothing stood before the new tokens. "
            "With a cache, the first query of a call is not the first token of the text.",
            lambda q, k, v: attend(q, k, v, diagonal=0),
        ),
        Mistake(
            "cannot see itself",
            "This is what comes out when each query sees only the keys before its own position. A token "
            "attends to itself too; the very first one would otherwise see nothing at all.",
            lambda q, k, v: attend(q, k, v, diagonal=cached(q, k) - 1),
        ),
        Mistake(
            "sees one token ahead",
            "This is what comes out when each query also sees the key behind its own position. While "
            "writing, that token does not exist yet.",
            lambda q, k, v: attend(q, k, v, diagonal=cached(q, k) + 1),
        ),
        Mistake(
            "no mask",
            "This is what comes out when every query sees all keys. Only the newest token may: the ones "
            "before it would look into their own future.",
            lambda q, k, v: attend(q, k, v),
        ),
        Mistake(
            "mask turned round",
            "This is what comes out when the keys that a query may see are the hidden ones. The newest query "
            "may see all, so that nothing is left for it: its output is NaN.",
            mask_turned_round,
        ),
        Mistake(
            "mask of zeros",
            "This is what comes out when hidden scores are set to 0. The softmax gives a score of 0 the "
            "weight of exp(0), and hidden tokens still count.",
            lambda q, k, v: attend(q, k, v, diagonal=cached(q, k), hidden=0.0),
        ),
        Mistake(
            "masked after the softmax",
            "This is what comes out when hidden weights are set to 0 after the softmax. The weights that "
            "are left then add up to less than 1.",
            masked_after_softmax,
        ),
        Mistake(
            "heads attend to heads",
            "This is what comes out when @ is used on the tensors as they are: the last two axes are heads "
            "and dim, so each token's heads look at one another. Tokens are to look at tokens, head by head.",
            heads_among_themselves,
        ),
        Mistake(
            "no scale",
            "This is what comes out without the division by the square root of the head's width. The scores "
            "are then too large, and the softmax nearly picks a single key.",
            lambda q, k, v: attend(q, k, v, scale=1.0, diagonal=cached(q, k)),
        ),
        Mistake(
            "scaled by the width",
            "This is what comes out when scores are divided by the head's width, not by its square root. A "
            "sum of d products of unit size is only about sqrt(d) large.",
            lambda q, k, v: attend(q, k, v, scale=1 / q.shape[-1], diagonal=cached(q, k)),
        ),
        Mistake(
            "scaled by all heads",
            "This is what comes out when the scale is taken from the width of all heads together. Every "
            "score is a product of two vectors of one head.",
            lambda q, k, v: attend(q, k, v, scale=(q.shape[-1] * q.shape[-2]) ** -0.5, diagonal=cached(q, k)),
        ),
        Mistake(
            "softmax over the queries",
            "This is what comes out when the softmax runs over the queries. The weights of one query, over "
            "the keys it sees, have to add up to 1.",
            lambda q, k, v: attend(q, k, v, diagonal=cached(q, k), over=-2).nan_to_num(0.0),
        ),
    ),
    hints=(
        "A text has 4 cached tokens and you add 3. At which positions do the 3 queries stand, and how many "
        "keys may each of them see? Draw the 3 x 7 table first.",
        'The notebook\'s picture "which key each query sees" is that table. Scores have the shape (batch, '
        "heads, tokens, keys): compare the positions keys - tokens .. keys - 1 of the queries with 0 .. "
        "keys - 1 of the keys.",
        "scores = q . k / sqrt(dim), for every head: einsum bthd, bshd -> bhts\n"
        "visible[t, s] = s <= t + (keys - tokens)\n"
        "scores where not visible = -infinity\n"
        "weights = softmax of scores over the last axis\n"
        "output = sum over s of weights * v: einsum bhts, bshd -> bthd",
    ),
    checked="with and without a cache, one new token and several, the scale, and a mask that knows where the "
    "new tokens stand",
    axes=("text", "token", "head", "dim"),
)


# ----------------------------------------------------------------------------------- 01.3 grouped attention


def grouped_case(
    seed: int,
    batch: int,
    tokens: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
    **more: Any,
) -> dict[str, Any]:
    q, k, v = random(
        seed,
        (batch, tokens, heads, dims[0]),
        (batch, keys, kv_heads, dims[0]),
        (batch, keys, kv_heads, dims[1]),
    )
    return {"q": q, "k": 2 * k, "v": v, "scale": 0.3, **more}


def grouped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    *,
    widen: Callable[[Tensor, int], Tensor] = lambda x, group: x.repeat_interleave(group, dim=2),
    widen_values: Callable[[Tensor, int], Tensor] | None = None,
    over: int = -1,
    hidden: Callable[[Tensor], Tensor] = lambda visible: ~visible[:, None],
) -> Tensor:
    """The mistakes' attention: `widen` gives keys (and values) as many heads as there are queries'."""
    group = q.shape[2] // k.shape[2]
    visible = torch.ones(1, q.shape[1], k.shape[1], dtype=torch.bool)
    visible = visible.tril() if causal else visible
    visible = visible if mask is None else visible & mask
    k, v = widen(k, group), (widen_values or widen)(v, group)
    scores = scale * torch.einsum("bthd,bshd->bhts", q, k)
    weights = scores.masked_fill(hidden(visible), NEVER).softmax(dim=over)
    weights = weights.nan_to_num(0.0) if over != -1 else weights  # a column may be all hidden
    return torch.einsum("bhts,bshd->bthd", weights, v)


def tiled(x: Tensor, group: int) -> Tensor:
    return x.repeat(1, 1, group, 1)


def first_only(x: Tensor, group: int) -> Tensor:
    return x[:, :, :1].expand(-1, -1, group * x.shape[2], -1)


def averaged(x: Tensor, group: int) -> Tensor:
    return x.mean(dim=2, keepdim=True).expand(-1, -1, group * x.shape[2], -1)


def heads_by_view(q, k, v, scale, mask=None, causal=False):
    """(batch, tokens, heads, dim) read as (batch, heads, tokens, dim) without moving anything."""

    def misread(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    out = grouped(misread(q), misread(k), misread(v), scale, mask, causal)
    return out.transpose(1, 2).reshape(out.shape)


def late_mask(batch: int, tokens: int, keys: int) -> Tensor:
    """(batch, tokens, keys): the texts have different lengths, as with padding."""
    lengths = keys - torch.arange(batch)
    position = lengths[:, None] - tokens + torch.arange(tokens)
    return torch.arange(keys) <= position[..., None]


GROUPED_ATTENTION = Exercise(
    number="01.3",
    name="grouped_attention",
    title="heads that share keys and values",
    difficulty=2,
    minutes=15,
    answer=grouped_attention,
    cases=(
        Case(
            "GQA: 2 texts of 5 tokens, causal; 6 query heads on 3 key/value heads, of 4",
            lambda: grouped_case(7, 2, 5, 5, 6, 3, (4, 4), causal=True),
        ),
        Case(
            "GQA with a cache: 3 texts of different lengths, 2 new tokens, 7 keys; 8 query heads on 2; keys "
            "of 5, values of 3",
            lambda: grouped_case(8, 3, 2, 7, 8, 2, (5, 3), mask=late_mask(3, 2, 7)),
        ),
        Case(
            "MQA: 2 texts, 1 new token, 6 keys; 4 query heads on 1, of 3",
            lambda: grouped_case(9, 2, 1, 6, 4, 1, (3, 3)),
        ),
        Case(
            "MHA: 2 texts of 4 tokens, causal; 3 query heads on 3, of 5",
            lambda: grouped_case(10, 2, 4, 4, 3, 3, (5, 5), causal=True),
        ),
    ),
    mistakes=(
        Mistake(
            "heads dealt in turn",
            "This is what comes out when query head h reads key/value head h modulo kv_heads, like cards "
            "dealt in turn. Groups are neighbours: the first query heads all share the first key head.",
            lambda *a, **b: grouped(*a, **b, widen=tiled),
        ),
        Mistake(
            "values dealt in turn",
            "This is what comes out when the keys are grouped by neighbours but the values are dealt in "
            "turn. Key and value of a head belong together.",
            lambda *a, **b: grouped(*a, **b, widen_values=tiled),
        ),
        Mistake(
            "first head for all",
            "This is what comes out when every query head reads the first key/value head. That is MQA; here "
            "there may be more heads of keys and values.",
            lambda *a, **b: grouped(*a, **b, widen=first_only),
        ),
        Mistake(
            "heads averaged",
            "This is what comes out when all query heads read the mean of the key/value heads. Each group "
            "has keys and values of its own.",
            lambda *a, **b: grouped(*a, **b, widen=averaged),
        ),
        Mistake(
            "scale made anew",
            "This is what comes out when the scores are divided by sqrt(qk_dim) and not multiplied by "
            "`scale`. The caller decides on the scale: DeepSeek-V2's is not 1 / sqrt(dim), because of its "
            "long context.",
            lambda q, k, v, scale, mask=None, causal=False: grouped(
                q, k, v, 1 / math.sqrt(q.shape[-1]), mask, causal
            ),
        ),
        Mistake(
            "scale forgotten",
            "This is what comes out when the scores are not multiplied by `scale`. They are then too large, "
            "and the softmax too sharp.",
            lambda q, k, v, scale, mask=None, causal=False: grouped(q, k, v, 1.0, mask, causal),
        ),
        Mistake(
            "divided by the scale",
            "This is what comes out when the scores are divided by `scale`. It is a factor already: for "
            "ordinary attention the caller passes 1 / sqrt(dim).",
            lambda q, k, v, scale, mask=None, causal=False: grouped(q, k, v, 1 / scale, mask, causal),
        ),
        Mistake(
            "mask turned round",
            "This is what comes out when the keys that a query may see are the hidden ones. A query that may "
            "see all has nothing left, and its output is NaN.",
            lambda *a, **b: grouped(*a, **b, hidden=lambda visible: visible[:, None]),
        ),
        Mistake(
            "mask not used",
            "This is right where no `mask` is given, and wrong where one is. `visible` holds what `mask` and "
            "`causal` say together.",
            lambda q, k, v, scale, mask=None, causal=False: grouped(q, k, v, scale, None, causal),
        ),
        Mistake(
            "mask without heads",
            "`visible` is (1 or batch, tokens, keys) and the scores are (batch, heads, tokens, keys), so its "
            "texts met the heads. With a single mask for all texts that happens to work.",
            lambda *a, **b: grouped(*a, **b, hidden=lambda visible: ~visible),
        ),
        Mistake(
            "visible not used",
            "This is what comes out when every query sees every key. The lines above your code have worked "
            "out which keys are visible.",
            lambda q, k, v, scale, mask=None, causal=False: grouped(q, k, v, scale),
        ),
        Mistake(
            "tokens and heads confused",
            "This is what comes out when the axes of tokens and heads are exchanged by reshaping. That "
            "gives the right shape and mixes tokens with heads; axes have to be transposed.",
            heads_by_view,
        ),
        Mistake(
            "softmax over the queries",
            "This is what comes out when the softmax runs over the queries. The weights of one query, over "
            "its keys, have to add up to 1.",
            lambda *a, **b: grouped(*a, **b, over=-2),
        ),
    ),
    hints=(
        "6 query heads, 3 key/value heads. Write down, for query heads 0 to 5, which key/value head each of "
        "them reads. How could you give the keys 6 heads, so that head h simply meets head h?",
        'The picture under "Heads that share" in the notebook has the lines drawn; the middle one is 8 query '
        "heads on 2. Head axes are axis 2 of q, k and v. Scores have the shape (batch, heads, tokens, keys), "
        "`visible` (1 or batch, tokens, keys).",
        "group = heads / kv_heads\n"
        "k, v: repeat every head `group` times, each beside its copies: 0 0 1 1 2 2\n"
        "scores = scale * q . k: einsum bthd, bshd -> bhts\n"
        "scores where not visible = -infinity (give `visible` an axis for the heads)\n"
        "weights = softmax over the keys\n"
        "output: einsum bhts, bshd -> bthd",
    ),
    checked="MHA, GQA and MQA, masks of several texts, a scale of its own, and values narrower than keys",
    axes=("text", "token", "head", "dim"),
    replaces=("dsv2.attention.baselines.grouped_attention",),
)


# ------------------------------------------------------------------------------------- 01.4 bytes per token


LLAMA3_70B = {
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_size": 8192,
}
WITHOUT_GROUPS = {"num_hidden_layers": 30, "num_attention_heads": 32, "hidden_size": 4096}
# As in Mistral's models of 2024: the heads together are narrower than the hidden state.
OWN_HEAD_DIM = {
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 5120,
    "head_dim": 128,
}


def kv_bytes_per_token(config: Mapping[str, Any], bits: float = 16) -> float:
    """Right."""
    return 2 * numbers(config) * bits / 8


def numbers(config: Mapping[str, Any], **changes: Any) -> int:
    """Keys of one token, all layers; changes: for the mistakes."""
    heads = config["num_attention_heads"]
    kv_heads = changes.get("kv_heads", config.get("num_key_value_heads", heads))
    head_dim = changes.get("head_dim", config.get("head_dim", config["hidden_size"] // heads))
    return kv_heads * head_dim * changes.get("layers", config["num_hidden_layers"])


KV_BYTES_PER_TOKEN = Exercise(
    number="01.4",
    name="kv_bytes_per_token",
    title="what a real model keeps of a token",
    difficulty=1,
    minutes=10,
    answer=kv_bytes_per_token,
    cases=(
        Case("LLaMA3 70B, 16 bits", lambda: {"config": dict(LLAMA3_70B)}),
        Case("LLaMA3 70B, 6 bits", lambda: {"config": dict(LLAMA3_70B), "bits": 6}),
        Case("30 layers, 32 heads, no word of key/value heads", lambda: {"config": dict(WITHOUT_GROUPS)}),
        Case("a model that gives its head_dim, 8 bits", lambda: {"config": dict(OWN_HEAD_DIM), "bits": 8}),
    ),
    mistakes=(
        Mistake(
            "keys only",
            "This is half of it: the keys, or the values, alone. Attention needs both of every past token.",
            lambda config, bits=16: numbers(config) * bits / 8,
        ),
        Mistake(
            "query heads counted",
            "This is what the model would cache if every query head had keys and values of its own. Queries "
            "are used once and not kept; only the heads of keys and values count.",
            lambda config, bits=16: 2 * numbers(config, kv_heads=config["num_attention_heads"]) * bits / 8,
        ),
        Mistake(
            "MQA where nothing is said",
            "This is right where the config names its key/value heads, and too little where it does not. A "
            "config without that field means MHA, not a single shared head.",
            lambda config, bits=16: (
                2 * numbers(config, kv_heads=config.get("num_key_value_heads", 1)) * bits / 8
            ),
        ),
        Mistake(
            "one layer",
            "This is the cache of a single layer. Every layer has keys and values of its own.",
            lambda config, bits=16: 2 * numbers(config, layers=1) * bits / 8,
        ),
        Mistake(
            "bits, not bytes",
            "This is eight times too much: it counts bits. A byte has eight of them.",
            lambda config, bits=16: 2.0 * numbers(config) * bits,
        ),
        Mistake(
            "whole bytes only",
            "This rounds the bytes of one number down, so that 6 bits become nothing. Caches of 6 bits a "
            "number are real: several numbers share their bytes.",
            lambda config, bits=16: float(2 * numbers(config) * (bits // 8)),
        ),
        Mistake(
            "two bytes always",
            "This counts two bytes a number whatever `bits` says. Caches are often kept in fewer bits than "
            "the weights.",
            lambda config, bits=16: 2.0 * numbers(config) * 2,
        ),
        Mistake(
            "head_dim not read",
            "This takes hidden_size / heads for the width of a head even where the config gives another "
            "one. The two are often equal, but not always.",
            lambda config, bits=16: (
                2
                * numbers(config, head_dim=config["hidden_size"] // config["num_attention_heads"])
                * bits
                / 8
            ),
        ),
        Mistake(
            "width shared by the key heads",
            "This divides hidden_size by the key/value heads, which makes them too wide. A key is as wide as "
            "the query it meets, and the queries' heads are those that share hidden_size.",
            lambda config, bits=16: (
                2
                * numbers(
                    config,
                    head_dim=config.get(
                        "head_dim",
                        config["hidden_size"]
                        // config.get("num_key_value_heads", config["num_attention_heads"]),
                    ),
                )
                * bits
                / 8
            ),
        ),
        Mistake(
            "hidden_size for the width",
            "This takes hidden_size for the width of a single head. All query heads share it.",
            lambda config, bits=16: (
                2 * numbers(config, head_dim=config.get("head_dim", config["hidden_size"])) * bits / 8
            ),
        ),
    ),
    hints=(
        "Which vectors of a past token does attention need in one layer, and how many numbers has each of "
        "them? Which of the config's heads are they counted by?",
        'Table 1 of the paper, or "Bytes per token" in the notebook. dict.get(name, otherwise) reads a '
        "field that may be missing. LLaMA3 70B at 16 bits: 327,680 bytes.",
        "kv_heads = num_key_value_heads if there, else num_attention_heads\n"
        "head_dim = head_dim if there, else hidden_size / num_attention_heads\n"
        "2 (key and value) * kv_heads * head_dim * num_hidden_layers * bits / 8",
    ),
    checked="a published GQA model, one without groups, one with a head_dim of its own, at 16, 8 and 6 bits",
)


# ----------------------------------------------------------------------------------- 01.5 what fits, how fast


def decode_limits(memory: float, bandwidth: float, weights: float, one_text: float) -> tuple[int, float]:
    """Right."""
    batch = max(math.floor((memory - weights) / one_text), 0)
    return (batch, batch * bandwidth / (weights + batch * one_text)) if batch else (0, 0.0)


def limits_with(
    fit: Callable[[float, float, float], int] = lambda m, w, s: max(math.floor((m - w) / s), 0),
    read: Callable[[int, float, float], float] = lambda n, w, s: w + n * s,
    each: Callable[[int], float] = float,
) -> Callable[..., tuple[int, float]]:
    """A mistake: fit(memory, weights, one_text), bytes read(batch, ...) in a step, tokens of one step."""

    def answer(memory: float, bandwidth: float, weights: float, one_text: float) -> tuple[int, float]:
        batch = fit(memory, weights, one_text)
        return (batch, each(batch) * bandwidth / read(batch, weights, one_text)) if batch else (0, 0.0)

    return answer


def upside_down(tokens: Callable[[int], float]) -> Callable[..., tuple[int, float]]:
    """A mistake: seconds for so many tokens instead of tokens a second."""

    def answer(memory: float, bandwidth: float, weights: float, one_text: float) -> tuple[int, float]:
        batch, _ = decode_limits(memory, bandwidth, weights, one_text)
        return (batch, (weights + batch * one_text) / bandwidth / tokens(batch)) if batch else (0, 0.0)

    return answer


DECODE_LIMITS = Exercise(
    number="01.5",
    name="decode_limits",
    title="how many texts at once, and how fast",
    difficulty=2,
    minutes=15,
    answer=decode_limits,
    cases=(
        Case(
            "DeepSeek-V2-Lite on one H100, texts of 128K tokens: 31.4 GB of weights, 4.1 GB a text",
            lambda: {"memory": 80e9, "bandwidth": 3.35e12, "weights": 31.4e9, "one_text": 4.1e9},
        ),
        Case(
            "LLaMA3 70B on eight H100s, texts of 8K tokens: 141 GB of weights, 2.7 GB a text",
            lambda: {"memory": 640e9, "bandwidth": 26.8e12, "weights": 141e9, "one_text": 2.7e9},
        ),
        Case(
            "LLaMA3 70B on one H100: the weights alone do not fit",
            lambda: {"memory": 80e9, "bandwidth": 3.35e12, "weights": 141e9, "one_text": 2.7e9},
        ),
    ),
    mistakes=(
        Mistake(
            "weights forgotten",
            "The batch is what would fit into an empty device. The weights are there too, before the first "
            "text is.",
            limits_with(fit=lambda m, w, s: max(math.floor(m / s), 0)),
        ),
        Mistake(
            "rounded up",
            "The last text of this batch fits only in part. Its next token would be the one that runs out "
            "of memory.",
            limits_with(fit=lambda m, w, s: max(math.ceil((m - w) / s), 0)),
        ),
        Mistake(
            "negative batch",
            "This is right while the weights fit. If they do not, there is less than nothing left for "
            "texts, and the answer should be none.",
            limits_with(fit=lambda m, w, s: math.floor((m - w) / s)),
        ),
        Mistake(
            "weights read for every text",
            "The batch is right; the speed is that of texts written one after the other. All texts of a "
            "batch go through the same weights in the same step, which reads them once.",
            limits_with(read=lambda n, w, s: n * (w + s)),
        ),
        Mistake(
            "cache read once",
            "The batch is right; the speed counts the cache of one text only. Weights are shared by the "
            "batch, caches are not: every text has its own past.",
            limits_with(read=lambda n, w, s: w + s),
        ),
        Mistake(
            "cache not read",
            "The batch is right; the speed counts the weights only. Each new token looks at everything its "
            "text has cached, so all of that is read too.",
            limits_with(read=lambda n, w, s: w),
        ),
        Mistake(
            "weights not read",
            "The batch is right; the speed counts the caches only. Every step goes through all layers, so "
            "it reads the weights too.",
            limits_with(read=lambda n, w, s: n * s),
        ),
        Mistake(
            "steps, not tokens",
            "This is the number of steps a second. Each step writes one token of every text of the batch.",
            limits_with(each=lambda n: 1.0),
        ),
        Mistake(
            "part of a text",
            "The batch is no whole number: part of a text cannot be written. What is left of the memory "
            "stays empty.",
            limits_with(fit=lambda m, w, s: max((m - w) / s, 0)),
        ),
        Mistake(
            "seconds of a step",
            "The batch is right; the second number is how many seconds a step takes. Asked for are the "
            "tokens that come out of one second.",
            upside_down(lambda batch: 1.0),
        ),
        Mistake(
            "seconds a token",
            "The batch is right; the second number is the seconds for each token. Tokens a second are one "
            "divided by it.",
            upside_down(float),
        ),
    ),
    hints=(
        "Ten texts are written at once. In one step, how often are the weights read from memory, and how "
        "often is the cache of one text? How many tokens come out of the step?",
        '"What 128K tokens cost" in the notebook works both out for one model. Bytes '
        "divided by bytes a second are seconds. Think of weights larger than the memory.",
        "batch = (memory - weights) / one_text, rounded down\n"
        "if batch is below 1: return 0, 0.0\n"
        "seconds of a step = (weights + batch * one_text) / bandwidth\n"
        "return batch, batch / seconds",
    ),
    checked="a batch that leaves no text half in memory, weights read once a step and caches once a text, "
    "and a model too large for its device",
    tolerance=1e-6,
)


# --------------------------------------------------------------------------------------- 01.6 the bug hunt


class SmallModel(nn.Module):
    """Two layers of attention with rotary positions and a cache, and nothing else: (B, T) -> (B, T, vocab).

    It takes its positions from the caller, as the models of inference libraries do.
    """

    def __init__(self, seed: int, vocab: int = 13, heads: int = 2, dim: int = 6, layers: int = 2):
        super().__init__()
        self.heads, self.dim, self.layers = heads, dim, layers
        width = heads * dim
        self.embedding, self.head = random(seed, (vocab, width), (width, vocab))
        self.w = random(seed + 1, *[(4, width, width)] * layers)
        self.frequencies = rope_frequencies(dim, theta=20.0)

    def new_cache(self, batch: int, max_tokens: int) -> list[LayerCache]:
        return [LayerCache(batch, max_tokens, self.heads, self.dim) for _ in range(self.layers)]

    @torch.no_grad()
    def forward(self, tokens: Tensor, positions: Tensor, cache: list[LayerCache]) -> Tensor:
        angles = positions.float()[:, None] * self.frequencies
        x = self.embedding[tokens]
        for w, layer in zip(self.w, cache):
            normed = F.rms_norm(x, x.shape[-1:])
            q, k, v = (
                (normed @ matrix / x.shape[-1] ** 0.5).unflatten(-1, (self.heads, self.dim))
                for matrix in w[:3]
            )
            q, k = (
                rotate_pairs(2 * q, angles.cos(), angles.sin()),
                rotate_pairs(k, angles.cos(), angles.sin()),
            )
            out = causal_attention(q, *layer.append(k, v))
            x = x + 2 * out.flatten(-2) @ w[3] / x.shape[-1] ** 0.5
        return F.rms_norm(x, x.shape[-1:]) @ self.head


def decode_loop(
    *,
    advance: Callable[[int, int], int] = lambda position, tokens: position + tokens,
    positions: Callable[[int, int], Tensor] = lambda position, tokens: torch.arange(
        position, position + tokens
    ),
    feed: Callable[[Tensor, Tensor], Tensor] = lambda earlier, new: new,
    newest: int = -1,
    fresh: bool = False,
    first: int = 0,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A loop with one part changed. advance(position, tokens read), positions(position, tokens to read),
    feed(tokens before, new one), newest: which token's logits are used, fresh: a new cache at every step,
    first: the prompt's position."""

    def answer(model: SmallModel, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
        def room():
            return model.new_cache(batch=prompt.shape[0], max_tokens=4 * (prompt.shape[1] + count) ** 2)

        cache, written, chosen_by = room(), [], []
        tokens, position = prompt, first
        for _ in range(count):
            cache = room() if fresh else cache
            logits = model(tokens, positions(position, tokens.shape[1]), cache)[:, newest]
            position = advance(position, tokens.shape[1])
            new = logits.argmax(dim=-1, keepdim=True)
            tokens = feed(tokens, new)
            written.append(new)
            chosen_by.append(logits)
        return torch.cat(written, dim=1), torch.stack(chosen_by, dim=1)

    return answer


def last_prompt_token_again(model: SmallModel, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Prefill, and then a loop that begins with the prompt's last token, which the cache already has."""
    cache = model.new_cache(batch=prompt.shape[0], max_tokens=prompt.shape[1] + count + 1)
    position = prompt.shape[1]
    model(prompt, torch.arange(position), cache)
    tokens, written, chosen_by = prompt[:, -1:], [], []
    for _ in range(count):
        logits = model(tokens, torch.tensor([position]), cache)[:, -1]
        position += 1
        tokens = logits.argmax(dim=-1, keepdim=True)
        written.append(tokens)
        chosen_by.append(logits)
    return torch.cat(written, dim=1), torch.stack(chosen_by, dim=1)


def decode_case(seed: int, batch: int, prompt: int, count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(13, (batch, prompt), generator=generator)
    return {"model": SmallModel(seed), "prompt": tokens, "count": count}


class Listening:
    """A model that notes which positions it is called with, in words: "0 1 2, 3, 4"."""

    def __init__(self, model: SmallModel):
        self.model, self.new_cache = model, model.new_cache
        self.calls: list[str] = []

    def __call__(self, tokens: Tensor, positions: Tensor, cache: list[LayerCache]) -> Tensor:
        self.calls.append(" ".join(str(position) for position in positions.flatten().tolist()))
        return self.model(tokens, positions, cache)


def run_decode(answer: Callable[..., Any], case: Mapping[str, Any]) -> Any:
    """What was written, and where: SmallModel sees distances only, and would not mind a wrong beginning."""
    model = Listening(case["model"])
    result = answer(model, case["prompt"], case["count"])
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise TypeError(f"decode is to return two tensors, tokens and logits; it returned {type(result)}")
    tokens, logits = result
    return {"the tokens": tokens, "the logits": logits, "the positions of each call": ", ".join(model.calls)}


DECODE = Exercise(
    number="01.6",
    name="decode",
    title="a decoding loop that forgets where it is",
    difficulty=2,
    minutes=10,
    answer=decode_loop(),
    run=run_decode,
    cases=(
        Case("2 prompts of 5 tokens, 6 to write", lambda: decode_case(29, 2, 5, 6)),
        Case("3 prompts of 4 tokens, 7 to write", lambda: decode_case(34, 3, 4, 7)),
    ),
    mistakes=(
        Mistake(
            "position set, not advanced",
            "After the prompt the position is right, and from the second step of the loop on it is 1 again. "
            "Where a token stands depends on everything read so far, not on the last call alone.",
            decode_loop(advance=lambda position, tokens: tokens),
        ),
        Mistake(
            "position stays behind the prompt",
            "Every written token is said to stand directly behind the prompt. The text grows, so each new "
            "token stands one further than the one before.",
            decode_loop(advance=lambda position, tokens: max(position, tokens)),
        ),
        Mistake(
            "positions begin at 0 in every call",
            "Every call counts its tokens from 0. Keys in the cache were turned by their position in the "
            "text, and the new query has to be turned by its own.",
            decode_loop(advance=lambda position, tokens: 0),
        ),
        Mistake(
            "one position is left out",
            "The first written token is said to stand one further than it does, and so are all after it. "
            "Positions count from 0, so the token after a prompt of 3 is number 3.",
            decode_loop(
                advance=lambda position, tokens: position + tokens + (position == 0),
            ),
        ),
        Mistake(
            "one further a call",
            "After the prompt the position is 1: it moved by one for all of the prompt's tokens. How many "
            "were read has to be counted before `tokens` is replaced by the new one.",
            decode_loop(advance=lambda position, tokens: position + 1),
        ),
        Mistake(
            "counted from 1",
            "The prompt is said to begin at position 1, and all that follows stands one too far. This model "
            "writes the same, since it looks at distances only; another would not.",
            decode_loop(first=1),
        ),
        Mistake(
            "prompt's last token twice",
            "The prompt's last token goes through the model a second time and stands in the cache twice. "
            "What the prompt's own pass has predicted is the first token already.",
            last_prompt_token_again,
        ),
        Mistake(
            "everything again",
            "Every step feeds the whole text again, behind what the cache already holds. With a cache, a "
            "step reads only the newest token.",
            decode_loop(feed=lambda earlier, new: torch.cat([earlier, new], dim=1)),
        ),
        Mistake(
            "logits of the first token",
            "The first token is chosen by what follows the beginning of the prompt, not its end. Of all "
            "tokens read in a call, the newest one's logits say what comes next.",
            decode_loop(newest=0),
        ),
        Mistake(
            "a new cache every step",
            "Every step begins with an empty cache, so that a new token sees nothing but itself. The past "
            "was thrown away that the cache is there to keep.",
            decode_loop(fresh=True),
        ),
    ),
    hints=(
        "The first two tokens are right and the third is not. What is different about the third call of the "
        "model?",
        "Run the example of the docstring and print `positions` in every step. They should be [0, 1, 2], "
        "then [3], then [4]. Which line decides about the next one?",
        "position is where the next token stands: how many tokens have been read so far, in all calls.\n"
        "before the loop: 0\n"
        "after every call: larger by the number of tokens in this call",
    ),
    checked="every token, every logit and every position along the way, for several prompts at once",
    axes={"the tokens": ("text", "step"), "the logits": ("text", "step", "vocab")},
    tolerance=1e-4,
    given="position set, not advanced",
)


EXERCISES: tuple[Exercise, ...] = (
    LAYER_CACHE,
    CAUSAL_ATTENTION,
    GROUPED_ATTENTION,
    KV_BYTES_PER_TOKEN,
    DECODE_LIMITS,
    DECODE,
)
