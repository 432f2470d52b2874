"""Published models, devices and numbers: from `data/configs`, `data/devices.json`, `data/published`.

Each has its source beside it there.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from dsv2.config import DSV2Config

DATA = Path(__file__).resolve().parent.parent / "data"
MODELS = ("deepseek_67b", "llama3_70b", "mixtral_8x22b", "deepseek_v2_lite", "deepseek_v2")


@dataclass(frozen=True)
class Device:
    """What a device holds, reads and computes at most, by its maker's figures.

    memory: bytes. bandwidth: bytes per second. flops: per second, on dense matrix products of type `dtype`.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    dtype: str
    source: str

    @property
    def balance(self) -> float:
        """FLOPs per byte read at which computing takes as long as reading."""
        return self.flops / self.bandwidth


def published_models(folder: Path = DATA / "configs") -> dict[str, DSV2Config]:
    """The published models by name, such as "DeepSeek 67B": GQA ones as configs with `attention="gqa"`."""
    models = {}
    for stem in MODELS:
        record = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        models[record["name"]] = config_of(record["config"])
    return models


def config_of(fields: dict[str, Any]) -> DSV2Config:
    """The shape of a model from its published `config.json`: DeepSeek-V2's, Llama's or Mixtral's.

    Llama's and Mixtral's have the same blocks as `DSV2Config`'s with grouped-query attention, so that
    `dsv2.accounting` counts them. Raises ValueError for another `model_type`.
    """
    kind = fields.get("model_type")
    if kind == "deepseek_v2":
        return DSV2Config.from_hf(fields)
    if kind not in ("llama", "mixtral"):
        raise ValueError(f"model_type={kind!r} is not one of deepseek_v2, llama, mixtral")
    heads = fields["num_attention_heads"]
    mixture = kind == "mixtral"
    return DSV2Config(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        num_hidden_layers=fields["num_hidden_layers"],
        num_attention_heads=heads,
        intermediate_size=fields["intermediate_size"],
        max_position_embeddings=fields["max_position_embeddings"],
        rope_theta=fields["rope_theta"],
        tie_word_embeddings=fields["tie_word_embeddings"],
        attention="gqa",
        num_key_value_heads=fields["num_key_value_heads"],
        head_dim=fields["hidden_size"] // heads,
        n_routed_experts=fields["num_local_experts"] if mixture else 0,
        num_experts_per_tok=fields["num_experts_per_tok"] if mixture else 1,
        moe_intermediate_size=fields["intermediate_size"],
        n_shared_experts=0,
        first_k_dense_replace=0,
        norm_topk_prob=mixture,
    )


def published_devices(file: Path = DATA / "devices.json") -> dict[str, Device]:
    """The devices by name, such as "H100 80GB"."""
    devices = {}
    for entry in json.loads(file.read_text(encoding="utf-8"))["devices"]:
        devices[entry["name"]] = Device(
            name=entry["name"],
            memory=entry["memory_gb"] * 1e9,
            bandwidth=entry["bandwidth_gb_per_s"] * 1e9,
            flops=entry["tflops"] * 1e12,
            dtype=entry["type"],
            source=entry["source"],
        )
    return devices


def measured_devices(file: Path = DATA / "devices.json") -> dict[str, Device]:
    """The devices that were measured, with the rates that they reached, such as "H100 80GB, measured".

    bandwidth: of a copy, read and written bytes both counted. flops: of a large square product.
    """
    published, found = published_devices(file), {}
    for entry in json.loads(file.read_text(encoding="utf-8"))["devices"]:
        if "measured" in entry:
            base, measured = published[entry["name"]], entry["measured"]
            name = f"{base.name}, measured"
            found[name] = Device(
                name=name,
                memory=base.memory,
                bandwidth=measured["copy_gb_per_s"] * 1e9,
                flops=measured["matmul_tflops"] * 1e12,
                dtype=base.dtype,
                source=measured["how"],
            )
    return found


# ----------------------------------------------------------------------------------------- the papers' tables


@dataclass(frozen=True)
class CacheFormula:
    """A row of table 1. elements_per_token: a formula in n_h, n_g, d_h, d_c, d_r and l."""

    attention: str
    elements_per_token: str
    source: str


@dataclass(frozen=True)
class BaseScores:
    """A base model's benchmarks (table 2; V2-Lite: appendix B).

    Parameters in billions, as its makers state them; scores in percent; Pile: bits per byte, lower is better.
    """

    model: str
    total_parameters_b: float
    activated_parameters_b: float
    scores_percent: dict[str, float]
    pile_bits_per_byte: float | None
    source: str
    note: str = ""


@dataclass(frozen=True)
class AttentionAblation:
    """A row of table 8 (dense) or table 9 (mixtures of experts): one size with one attention.

    Parameters and tokens in billions, the cache in thousands of elements a token, scores in percent.
    """

    scale: str
    attention: str
    total_parameters_b: float
    activated_parameters_b: float
    tokens_b: float
    kv_elements_per_token_k: float | None
    scores_percent: dict[str, float]
    source: str


@dataclass(frozen=True)
class BarPair:
    """Two bars of figure 1(b), in `unit`, and the ratio that the paper states for them, as `stated_as` says.

    reading: whether the text states the two numbers or they were measured from the bars.
    """

    quantity: str
    unit: str
    dense_67b: float
    v2: float
    stated: float
    stated_as: str
    reading: str
    source: str

    @property
    def ratio(self) -> float:
        """The ratio of the two bars in the terms of `stated`: per cent saved, or times as much."""
        return self.v2 / self.dense_67b if "times" in self.stated_as else 100 * (1 - self.v2 / self.dense_67b)


@dataclass(frozen=True)
class TrainingRun:
    """How a model was trained. tokens_b: billions; batches: sequences; hours: thousands a trillion tokens."""

    model: str
    phase: str
    tokens_b: float | None
    sequence_tokens: int
    first_batch_sequences: int | None
    batch_sequences: int | None
    ramp_tokens_b: float | None
    steps: int | None
    h800_hours_k_per_t_tokens: float | None
    source: str
    note: str = ""


@dataclass(frozen=True)
class ChatScore:
    """A chat model's result on one benchmark, in `unit`."""

    model: str
    benchmark: str
    score: float
    unit: str
    source: str


@dataclass(frozen=True)
class SparseModel:
    """A mixture of experts of an earlier paper: billions of parameters, None where none are published."""

    model: str
    total_parameters_b: float
    activated_parameters_b: float | None
    experts: int
    experts_per_token: int
    source: str

    @property
    def least_activated_b(self) -> float:
        """Billions that a token passes through, or, where unpublished, what they cannot be less than.

        All parameters in experts would make K/E of them; whatever lies outside is used by every token.
        """
        if self.activated_parameters_b is not None:
            return self.activated_parameters_b
        return self.total_parameters_b * self.experts_per_token / self.experts


@dataclass(frozen=True)
class Claim:
    """What is often said of DeepSeek-V2, and what was found: `verdict` is one of `VERDICTS`."""

    name: str
    claim: str
    verdict: str
    found: str
    numbers: dict[str, float]
    source: str


VERDICTS = ("right", "half right", "wrong", "toy numbers")
Row = TypeVar("Row")


@dataclass(frozen=True)
class Published:
    """All tables of `data/published`, as rows that name their source."""

    table_1: tuple[CacheFormula, ...]
    base_scores: tuple[BaseScores, ...]
    table_8: tuple[AttentionAblation, ...]
    table_9: tuple[AttentionAblation, ...]
    figure_1: tuple[BarPair, ...]
    training: tuple[TrainingRun, ...]
    chat: tuple[ChatScore, ...]
    sparse_models: tuple[SparseModel, ...]
    claims: tuple[Claim, ...]

    def run(self, model: str, phase: str = "pre-training") -> TrainingRun:
        """A model's training run. Raises ValueError, naming those there are, for one that is not stored."""
        runs = {(run.model, run.phase): run for run in self.training}
        if (model, phase) not in runs:
            stored = "; ".join(f"{name}, {what}" for name, what in runs)
            raise ValueError(f"model={model!r}, phase={phase!r} is not stored; there are: {stored}")
        return runs[model, phase]


def published_numbers(folder: Path = DATA / "published") -> Published:
    """What the papers print, table by table. Raises ValueError where a file or row is not as it should be."""
    tables = get_type_hints(Published)
    return Published(
        **{name: read_rows(folder / f"{name}.json", get_args(kind)[0]) for name, kind in tables.items()}
    )


def read_rows(file: Path, kind: type[Row]) -> tuple[Row, ...]:
    """The rows of a JSON file as dataclasses of `kind`.

    Raises ValueError, with the file's name, the row's number and the field, for a field that is missing,
    unknown or of another type, and for an empty source.
    """
    rows = json.loads(file.read_text(encoding="utf-8")).get("rows")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file.name}: expected a list of rows under 'rows', got {rows!r}")
    return tuple(_row(kind, row, f"{file.name}, row {number}") for number, row in enumerate(rows, 1))


def _row(kind: type[Row], row: dict[str, Any], where: str) -> Row:
    hints = get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    if unknown := sorted(set(row) - set(hints)):
        raise ValueError(f"{where}: {kind.__name__} has no field {', '.join(unknown)}")
    if missing := sorted(required - set(row)):
        raise ValueError(f"{where}: {kind.__name__} needs {', '.join(missing)}")
    for name, value in row.items():
        if not _fits(value, hints[name]):
            expected = getattr(hints[name], "__name__", str(hints[name]))
            raise ValueError(f"{where}: {name}={value!r} is not of type {expected}")
    if not row["source"].strip():
        raise ValueError(f"{where}: source is empty; every row says where it comes from")
    return kind(**row)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type: str, int, float, a dict of these, or one of several."""
    if get_origin(hint) is dict:
        of = get_args(hint)[1]
        return isinstance(value, dict) and all(_fits(each, of) for each in value.values())
    if options := get_args(hint):  # X | None
        return any(_fits(value, option) for option in options)
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)
