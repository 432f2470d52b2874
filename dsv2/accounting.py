"""The arithmetic of a DeepSeek-V2: parameters, cache, memory, FLOPs, bytes read, from a config alone.

Every count is a `Breakdown`: named parts that add up. Matrix products alone are counted as work, two FLOPs a
multiply-add; norms, softmax, rotations and the embedding's look-up are left out.

    python -m dsv2.accounting full
    python -m dsv2.accounting path/to/config.json --context 32768 --batch 64

Source: DeepSeek-V2, arXiv 2405.04434, section 2 and table 1; the counts follow from the shapes.
"""

# T new tokens   S keys they look at   H heads   D hidden_size   C kv_lora_rank   R qk_rope_head_dim
# N qk_nope_head_dim   V v_head_dim   E routed experts   K experts per token   I moe_intermediate_size

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dsv2.config import PRESETS, DSV2Config

BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "int8": 8, "int4": 4}
FORMS = ("expanded", "cached", "absorbed")
TRAINING_PASSES = 3  # forward, then in the backward pass one product for the input and one for the weight

B = TypeVar("B", bound="Breakdown")


class Breakdown:
    """Named parts that add up: the base of `Parameters`, `Flops` and `Traffic`.

    Breakdowns of one kind add (`sum` works) and can be multiplied by a number; `parts` is ready for a bar
    chart, `str` gives a table.
    """

    def parts(self) -> dict[str, Any]:
        """Each part's name, in words, and its count."""
        return {f.name.replace("_", " "): getattr(self, f.name) for f in dataclasses.fields(self)}

    @property
    def total(self) -> Any:
        return sum(self.parts().values())

    def __add__(self: B, other: B) -> B:
        if type(other) is not type(self):
            return NotImplemented
        return type(self)(*(a + b for a, b in zip(self.parts().values(), other.parts().values())))

    def __radd__(self: B, start: int) -> B:
        return self if start == 0 else NotImplemented  # sum() starts from 0

    def __mul__(self: B, factor: float | int) -> B:
        return type(self)(*(a * factor for a in self.parts().values()))

    __rmul__ = __mul__

    def __str__(self) -> str:
        return format_table({type(self).__name__.lower(): self})


def format_table(columns: Mapping[str, Breakdown]) -> str:
    """Breakdowns of one kind side by side, one line a part and the total last."""
    rows = [["", *columns]]
    for name in [*next(iter(columns.values())).parts(), "total"]:
        counts = ({**c.parts(), "total": c.total}[name] for c in columns.values())
        rows.append([name, *(f"{count:,.0f}" for count in counts)])
    return _align(rows)


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    )


# -------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameters(Breakdown):
    """Parameters by part.

    `attention` includes the norms on the latents, `norms` are those of the residual stream. A tied embedding
    is counted once, as the head, which is the part that multiplies by it.
    """

    embedding: int = 0
    attention: int = 0
    dense_ffn: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    router: int = 0
    norms: int = 0
    head: int = 0

    def conventions(self) -> dict[str, int]:
        """The total under each of the conventions that published numbers follow.

        DeepSeek-V2's 236B and 15.7B count everything; its 2.4B activated (Lite) only fits without the
        embedding, which is looked up and not multiplied by, and without the router.
        """
        return {
            "everything": self.total,
            "without the embedding": self.total - self.embedding,
            "without embedding and router": self.total - self.embedding - self.router,
            "without embedding and head": self.total - self.embedding - self.head,
        }


def parameters(cfg: DSV2Config, activated: bool = False) -> Parameters:
    """All parameters of a model, or those that one token passes through (K of the E routed experts)."""
    vocabulary = cfg.vocab_size * cfg.hidden_size
    ends = Parameters(
        embedding=0 if cfg.tie_word_embeddings else vocabulary, norms=cfg.hidden_size, head=vocabulary
    )
    return ends + sum(layer_parameters(cfg, layer, activated) for layer in range(cfg.num_hidden_layers))


def layer_parameters(cfg: DSV2Config, layer: int, activated: bool = False) -> Parameters:
    """The parameters of one layer, or those that one token passes through."""
    common = Parameters(attention=attention_parameters(cfg), norms=2 * cfg.hidden_size)
    if not cfg.is_moe_layer(layer):
        return common + Parameters(dense_ffn=3 * cfg.hidden_size * cfg.intermediate_size)
    expert = expert_parameters(cfg)
    return common + Parameters(
        routed_experts=(cfg.num_experts_per_tok if activated else cfg.n_routed_experts) * expert,
        shared_experts=cfg.n_shared_experts * expert,
        router=cfg.n_routed_experts * cfg.hidden_size,
    )


def expert_parameters(cfg: DSV2Config) -> int:
    """One expert: gate, up and down, 3 D I."""
    return 3 * cfg.hidden_size * cfg.moe_intermediate_size


def attention_parameters(cfg: DSV2Config) -> int:
    """One layer's attention, the norms on its latents included."""
    if cfg.attention == "mla":
        return mla_parameters(cfg)
    return sum(rows * columns for rows, columns in _projections(cfg))


def mla_parameters(cfg: DSV2Config) -> int:
    """One layer's MLA: its matrices (equations 37 to 47), and the norms on c^KV and, if there is one, c^Q."""
    projections = sum(rows * columns for rows, columns in _projections(cfg))
    norms = cfg.kv_lora_rank + (cfg.q_lora_rank or 0)
    return projections + _expansion_width(cfg) * cfg.kv_lora_rank + norms


def _projections(cfg: DSV2Config) -> list[tuple[int, int]]:
    """(rows, columns) of the attention's matrices that meet every new token, W^UK and W^UV aside."""
    heads, hidden = cfg.num_attention_heads, cfg.hidden_size
    if cfg.attention != "mla":
        q, kv = heads * cfg.baseline_head_dim, cfg.kv_heads * cfg.baseline_head_dim
        return [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    q = heads * cfg.qk_head_dim
    query = [(q, hidden)]
    if cfg.q_lora_rank is not None:
        query = [(cfg.q_lora_rank, hidden), (q, cfg.q_lora_rank)]
    compress = (cfg.kv_lora_rank + cfg.qk_rope_head_dim, hidden)
    return [*query, compress, (hidden, heads * cfg.v_head_dim)]


def _expansion_width(cfg: DSV2Config) -> int:
    """H (N + V): the rows of W^UK and W^UV together."""
    return cfg.num_attention_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)


# -------------------------------------------------------------------------------------------- the cache


def attention_twin(
    cfg: DSV2Config, attention: str, kv_heads: int | None = None, head_dim: int | None = None
) -> DSV2Config:
    """The same model with another attention, to compare with: "mla", "mha", "gqa" or "mqa".

    `kv_heads` is needed for "gqa"; `head_dim` stays the config's (d_h for MLA) unless given.
    """
    return cfg.replace(
        attention=attention,
        num_key_value_heads=kv_heads if attention == "gqa" else None,
        head_dim=cfg.head_dim if head_dim is None else head_dim,
    )


def kv_elements_per_token(cfg: DSV2Config, expanded: bool = False) -> int:
    """Numbers that the cache holds for each token, all layers together (table 1).

    MLA: (d_c + d_h^R) l; MHA, GQA and MQA: 2 d_h l for every key/value head. `expanded`: MLA with every
    head's keys and values kept instead of the latents, (N + R + V) H l.
    """
    if cfg.attention != "mla":
        width = 2 * cfg.kv_heads * cfg.baseline_head_dim
    elif expanded:
        width = cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim)
    else:
        width = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return width * cfg.num_hidden_layers


def kv_bytes_per_token(cfg: DSV2Config, dtype: Any = "bfloat16", expanded: bool = False) -> float:
    """Bytes that the cache holds for each token. dtype: see `bits_per_element`; 6 means 6-bit elements."""
    return kv_elements_per_token(cfg, expanded) * bits_per_element(dtype) / 8


def equivalent_gqa_heads(cfg: DSV2Config) -> float:
    """How many key/value heads GQA could keep in as much cache as MLA: 2.25 for DeepSeek-V2."""
    return (cfg.kv_lora_rank + cfg.qk_rope_head_dim) / (2 * cfg.baseline_head_dim)


def bits_per_element(dtype: Any) -> float:
    """Bits of a type: a number of bits (fractions too: 4.5 with a scale every 32), a name, or a torch dtype.

    Raises ValueError for a name that is not known or a number that is not above 0.
    """
    if isinstance(dtype, (int, float)) and not isinstance(dtype, bool):
        if not 0 < dtype < float("inf"):
            raise ValueError(f"dtype={dtype!r} must be a number of bits above 0")
        return float(dtype)
    name = str(dtype).removeprefix("torch.")
    name = "float8" if name.startswith("float8_e") else name  # torch tells the kinds apart by their exponent
    if name not in BITS:
        raise ValueError(f"dtype={dtype!r} is unknown; give a number of bits or one of {', '.join(BITS)}")
    return float(BITS[name])


# ----------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory(Breakdown):
    """Bytes that a model takes where it runs; what a forward pass needs for a moment comes on top."""

    weights: float = 0
    cache: float = 0


def memory_needed(
    cfg: DSV2Config, dtype: Any = "bfloat16", context: int = 0, batch: int = 1, cache_dtype: Any = None
) -> Memory:
    """Bytes of all weights in `dtype`, and of the cache of `batch` texts of `context` tokens each.

    All experts count, chosen or not: the next token may choose any of them. dtype: see `bits_per_element`;
    cache_dtype: the cache's, None: the same. Raises ValueError for a negative context or a batch below 1.
    """
    if context < 0 or batch < 1:
        raise ValueError(f"context={context} must be at least 0 and batch={batch} at least 1")
    each = kv_bytes_per_token(cfg, dtype if cache_dtype is None else cache_dtype)
    return Memory(weights=parameters(cfg).total * bits_per_element(dtype) / 8, cache=batch * context * each)


# ------------------------------------------------------------------------------------------------- work


@dataclass(frozen=True)
class Flops(Breakdown):
    """FLOPs by part.

    `projections`: W^Q, W^DQ, W^UQ, W^DKV, W^KR, W^O. `expansion`: W^UK and W^UV, applied to latents or, in
    the absorbed form, to the query and the output. `scores_and_values`: what grows with the context.
    """

    projections: float = 0
    expansion: float = 0
    scores_and_values: float = 0
    dense_ffn: float = 0
    routed_experts: float = 0
    shared_experts: float = 0
    router: float = 0
    head: float = 0


def attention_macs(cfg: DSV2Config, form: str = "expanded") -> int:
    """Multiply-adds per head for one query and one key: its score, and its share of the output.

    Expanded: (N + R) + V, 320 for DeepSeek-V2. Absorbed: (C + R) + C, 1088. The baselines: 2 d_h.
    """
    _check_form(form)
    if cfg.attention != "mla":
        return 2 * cfg.baseline_head_dim
    if form == "absorbed":
        return 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return cfg.qk_head_dim + cfg.v_head_dim


def forward_flops(
    cfg: DSV2Config,
    tokens: int,
    cached: int = 0,
    form: str = "expanded",
    logits: int | None = None,
    causal: bool = True,
) -> Flops:
    """One forward pass over `tokens` tokens of one sequence that follow `cached` others.

    form, for MLA: "expanded" recovers the keys and values of all cached + new tokens from their latents;
    "cached" recovers the new ones only and keeps them expanded; "absorbed" recovers none. Without a cache the
    first two are the same. logits: how many tokens pass the head (None: all). causal: count the keys that a
    query may see; False: all of them, as products over full rectangles compute and as PyTorch's counter has
    it.
    """
    _check_form(form)
    for name, value, least in (("tokens", tokens, 1), ("cached", cached, 0), ("logits", logits, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    keys = cached + tokens
    pairs = tokens * cached + tokens * (tokens + 1) // 2 if causal else tokens * keys
    expanded = keys if form == "expanded" else tokens
    layers, moe_layers = cfg.num_hidden_layers, len(cfg.moe_layers)
    expert = expert_parameters(cfg)
    macs = Flops(
        projections=layers * tokens * sum(rows * columns for rows, columns in _projections(cfg)),
        expansion=layers * expanded * _expansion_width(cfg) * cfg.kv_lora_rank
        if cfg.attention == "mla"
        else 0,
        scores_and_values=layers * pairs * cfg.num_attention_heads * attention_macs(cfg, form),
        dense_ffn=(layers - moe_layers) * tokens * 3 * cfg.hidden_size * cfg.intermediate_size,
        routed_experts=moe_layers * tokens * cfg.num_experts_per_tok * expert,
        shared_experts=moe_layers * tokens * cfg.n_shared_experts * expert,
        router=moe_layers * tokens * cfg.n_routed_experts * cfg.hidden_size,
        head=(tokens if logits is None else logits) * cfg.vocab_size * cfg.hidden_size,
    )
    return 2 * macs


def training_flops_per_token(
    cfg: DSV2Config, context: int, recompute: bool = False, causal: bool = True
) -> Flops:
    """Forward and backward over sequences of `context` tokens, per token: three times the forward pass.

    recompute: the layers run forward once more in the backward pass (`model.checkpoint_blocks`).
    """
    forward = forward_flops(cfg, context, causal=causal) * (1 / context)
    again = dataclasses.replace(forward, head=0.0) if recompute else Flops()
    return TRAINING_PASSES * forward + again


def prefill_flops_per_token(cfg: DSV2Config, context: int, causal: bool = True) -> Flops:
    """Reading a prompt of `context` tokens, per token; only the last one passes the head."""
    return forward_flops(cfg, context, logits=1, causal=causal) * (1 / context)


def decode_flops(cfg: DSV2Config, cached: int, form: str = "absorbed") -> Flops:
    """Generating one token after `cached` others. form: see `forward_flops`."""
    return forward_flops(cfg, 1, cached, form)


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; choose one of {', '.join(FORMS)}")


# ---------------------------------------------------------------------------------------------- traffic


@dataclass(frozen=True)
class Traffic(Breakdown):
    """Bytes read from memory by part; `cache` is what attention reads of the past."""

    embedding: float = 0
    attention: float = 0
    dense_ffn: float = 0
    routed_experts: float = 0
    shared_experts: float = 0
    router: float = 0
    norms: float = 0
    head: float = 0
    cache: float = 0


def expected_distinct_experts(cfg: DSV2Config, batch: int) -> float:
    """How many of a layer's experts a batch of tokens reaches when all are chosen equally often.

    A token leaves an expert out with probability 1 - K/E, so E (1 - (1 - K/E)^batch): K for one token. The
    device limit changes which experts go together, not how often one is chosen, so it changes nothing here.
    """
    experts = cfg.n_routed_experts
    if experts == 0:
        return 0.0
    if batch == 1:
        return float(cfg.num_experts_per_tok)
    return experts * (1 - (1 - cfg.num_experts_per_tok / experts) ** batch)


def decode_bytes(
    cfg: DSV2Config,
    cached: int,
    batch: int = 1,
    form: str = "absorbed",
    weight_dtype: Any = "bfloat16",
    cache_dtype: Any = "bfloat16",
) -> Traffic:
    """Bytes read in one decoding step of `batch` sequences with `cached` tokens each.

    Every weight that is touched counts once, however many sequences share it; of the experts, the expected
    number of distinct ones. form, for MLA: "absorbed" reads the latents, "cached" every head's keys and
    values, "expanded" the latents and then the keys and values made from them. What is written is left out.
    """
    _check_form(form)
    if batch < 1 or cached < 0:
        raise ValueError(f"batch={batch} must be at least 1 and cached={cached} at least 0")
    every = parameters(cfg)
    experts = expected_distinct_experts(cfg, batch) * expert_parameters(cfg) * len(cfg.moe_layers)
    touched = Traffic(**{f.name: getattr(every, f.name) for f in dataclasses.fields(every)})
    touched = dataclasses.replace(touched, embedding=batch * cfg.hidden_size, routed_experts=experts)
    elements = kv_elements_per_token(cfg, expanded=form == "cached")
    if cfg.attention == "mla" and form == "expanded":
        elements += kv_elements_per_token(cfg, expanded=True)
    cache = Traffic(cache=batch * cached * elements)
    return touched * (bits_per_element(weight_dtype) / 8) + cache * (bits_per_element(cache_dtype) / 8)


# ------------------------------------------------------------------------------------------- the report


def report(cfg: DSV2Config, context: int = 4096, batch: int = 1) -> str:
    """Everything above for one config, as text."""
    every, active = parameters(cfg), parameters(cfg, activated=True)
    sections = [("Parameters", format_table({"total": every, "activated": active}))]
    both = zip(every.conventions().items(), active.conventions().values())
    sections.append(
        ("The totals by convention", _align([(name, f"{a:,}", f"{b:,}") for (name, a), b in both]))
    )
    twins = {cfg.attention: cfg, "mha": attention_twin(cfg, "mha"), "mqa": attention_twin(cfg, "mqa")}
    rows = [("", "elements", "bytes at 16 bits", "at 6 bits", f"{context:,} tokens, 16 bits")]
    for name, twin in twins.items():
        size = kv_bytes_per_token(twin)
        rows.append(
            (
                name,
                f"{kv_elements_per_token(twin):,}",
                f"{size:,.0f}",
                f"{kv_bytes_per_token(twin, 6):,.0f}",
                f"{size * context / 2**20:,.1f} MiB",
            )
        )
    sections.append(("Cache per token", _align(rows)))
    rows = [("", "weights", f"cache, batch {batch}", "together")]
    for dtype in ("float32", "bfloat16", "float8"):
        size = memory_needed(cfg, dtype, context, batch)
        rows.append((dtype, *(f"{part / 1e9:,.2f} GB" for part in (size.weights, size.cache, size.total))))
    sections.append((f"Memory, context {context:,}", _align(rows)))
    training = {"training": training_flops_per_token(cfg, context)}
    training["prefill"] = prefill_flops_per_token(cfg, context)
    forms = FORMS if cfg.attention == "mla" else ("cached",)
    decoding = {f"decode, {form}": decode_flops(cfg, context, form) for form in forms}
    sections.append((f"FLOPs per token, context {context:,}", format_table({**training, **decoding})))
    reads = {form: decode_bytes(cfg, context, batch, form) for form in forms}
    sections.append(
        (
            f"Bytes read per decoding step, {context:,} cached tokens, batch {batch}, 16 bits",
            format_table(reads),
        )
    )
    return "\n\n".join(f"{title}\n{text}" for title, text in sections)


def _read_config(name: str) -> DSV2Config:
    """A preset's name, or a config.json: Hugging Face's, or one written from `DSV2Config.to_dict`."""
    if name in PRESETS:
        return DSV2Config.preset(name)
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a file")
    path = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a JSON {type(fields).__name__}, not an object")
    return DSV2Config.from_hf(fields) if "model_type" in fields else DSV2Config.from_dict(fields)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.accounting",
        description="Parameters, cache, memory, FLOPs and bytes of a DeepSeek-V2, from its config alone.",
    )
    parser.add_argument("config", help=f"a preset ({', '.join(PRESETS)}) or a config.json")
    parser.add_argument("--context", type=int, default=4096, help="tokens of context (default: 4096)")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together (default: 1)")
    options = parser.parse_args(arguments)
    try:
        if options.context < 1:
            raise ValueError(f"--context={options.context} must be at least 1")
        print(report(_read_config(options.config), options.context, options.batch))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
