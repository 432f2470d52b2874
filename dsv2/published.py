"""Published models and devices, from `data/configs` and `data/devices.json`, where each has its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
