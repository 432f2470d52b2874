"""The configuration of a DeepSeek-V2: one frozen, validated dataclass with Hugging Face's field names."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ATTENTIONS = ("mla", "mha", "gqa", "mqa")
TOPK_METHODS = ("greedy", "group_limited_greedy")
ROUTERS = ("deepseek", "dense", "switch", "gshard", "glam", "mixtral")


@dataclass(frozen=True)
class YarnScaling:
    """How far, and how, YaRN stretches the rotary embedding (DeepSeek-V2, section 3.1.4; arXiv 2309.00071).

    `factor` is s, the ratio of the new context to the old; `beta_fast` and `beta_slow` bound, in turns made
    within the original context, the frequencies that are kept and those that are interpolated fully;
    `mscale_all_dim` sets the temperature of the attention logits and `mscale / mscale_all_dim` the length of
    the rotary vectors.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.707
    mscale_all_dim: float = 0.707


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor`, with no temperature (arXiv 2306.15595).

    DeepSeek-V2 does not use it; chapter 11 compares YaRN with it.
    """

    factor: float


@dataclass(frozen=True)
class DSV2Config:
    """Everything that fixes the shape and the behaviour of a model.

    Fields carry the names of Hugging Face's `config.json` wherever it has one; the table in `dsv2.__init__`
    gives the paper's symbols. Values that contradict each other are refused together, in one ValueError.

    Source: arXiv 2405.04434, sections 2 and 3.1.2.
    """

    # The trunk
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int  # width of a dense layer's FFN
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    # Attention
    attention: str = "mla"  # or "mha", "gqa", "mqa": the baselines MLA is compared with
    q_lora_rank: int | None = None  # d'_c; None: queries are not compressed (V2-Lite)
    kv_lora_rank: int = 512  # d_c
    qk_nope_head_dim: int = 128  # d_h
    qk_rope_head_dim: int = 64  # d_h^R
    v_head_dim: int = 128
    head_dim: int | None = None  # baselines only; None: qk_nope_head_dim
    num_key_value_heads: int | None = None  # "gqa" only
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | LinearScaling | None = None

    # Experts
    n_routed_experts: int = 64  # N_r
    n_shared_experts: int = 2  # N_s
    num_experts_per_tok: int = 6  # K_r
    moe_intermediate_size: int = 1408
    first_k_dense_replace: int = 1  # this many layers keep a dense FFN
    moe_layer_freq: int = 1
    router: str = "deepseek"  # or another of ROUTERS (dsv2.moe.routing), which DeepSeek's is compared with
    # n_group is where experts live; the other four of the next five concern the router "deepseek" alone.
    topk_method: str = "greedy"  # or "group_limited_greedy": device-limited routing
    n_group: int = 1  # D, the devices that the experts of a layer are spread over
    topk_group: int = 1  # M, the devices that a token may be sent to
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False  # normalise the K weights instead of scaling them

    # Training. Other routers than "deepseek" have one balance loss, over the whole batch, at aux_loss_alpha.
    aux_loss_alpha: float = 0.001  # alpha_1, expert-level balance
    device_loss_alpha: float = 0.0  # alpha_2, device-level balance
    communication_loss_alpha: float = 0.0  # alpha_3, communication balance
    seq_aux: bool = True  # balance within each sequence (the paper), or over the whole batch
    # How many times the average load is computed, in training; None: all of it. "deepseek": the budget of a
    # device; "switch", "gshard", "glam": the capacity of an expert; "dense" and "mixtral" drop nothing.
    capacity_factor: float | None = None

    # ------------------------------------------------------------------------------------------- derived

    @property
    def qk_head_dim(self) -> int:
        """d_h + d_h^R: what a query and a key hold per head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def baseline_head_dim(self) -> int:
        """Head width of the MHA, GQA and MQA baselines."""
        return self.qk_nope_head_dim if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the chosen baseline (every head has its own keys and values in MHA and MLA)."""
        if self.attention == "mqa":
            return 1
        if self.attention == "gqa":
            assert self.num_key_value_heads is not None  # validated
            return self.num_key_value_heads
        return self.num_attention_heads

    @property
    def experts_per_device(self) -> int:
        return self.n_routed_experts // self.n_group

    @property
    def limits_devices(self) -> bool:
        """Whether a token may be sent to some of the devices only."""
        limited = self.router == "deepseek" and self.topk_method == "group_limited_greedy"
        return limited and self.topk_group < self.n_group

    @property
    def has_hf_form(self) -> bool:
        """Whether Hugging Face's DeepSeek-V2 can hold this model: not with a baseline of another paper."""
        return self.attention == "mla" and self.router == "deepseek"

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) holds experts rather than one dense FFN."""
        return (
            self.n_routed_experts > 0
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe_layer(i))

    # ---------------------------------------------------------------------------------------- validation

    def __post_init__(self) -> None:
        problems = [*_type_problems(self)]
        if not problems:
            problems = [*_value_problems(self)]
        if problems:
            raise ValueError(
                "this configuration cannot be built:\n" + "\n".join(f"  - {p}" for p in problems)
            )

    # ------------------------------------------------------------------------------------ reading, writing

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DSV2Config:
        """A named configuration: `tiny`, `small`, `lite` (V2-Lite) or `full` (V2), with changes."""
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return PRESETS[name].replace(**changes)

    def replace(self, **changes: Any) -> DSV2Config:
        """A copy with some fields changed, validated again."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise ValueError(f"DSV2Config has no field named {', '.join(unknown)}{_closest(unknown[0])}")
        return dataclasses.replace(self, **changes)

    def with_router(self, router: str, **changes: Any) -> DSV2Config:
        """The same model with another router, and with as many experts a token as that router takes."""
        experts = _experts_of(router, changes.get("n_routed_experts", self.n_routed_experts))
        fixed = {} if experts is None else {"num_experts_per_tok": experts}
        return self.replace(router=router, **{**fixed, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DSV2Config:
        """A configuration from `to_dict`'s output. Unknown and missing fields are refused by name."""
        if not isinstance(fields, dict):
            raise ValueError(f"a configuration is a JSON object; got {type(fields).__name__}")
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(str(k) for k in set(fields) - set(known))
        if unknown:
            raise ValueError(f"DSV2Config has no field named {', '.join(unknown)}{_closest(unknown[0])}")
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
        if missing:
            raise ValueError(f"these fields have no default and are missing: {', '.join(missing)}")
        fields = dict(fields)
        if isinstance(fields.get("rope_scaling"), dict):
            linear = set(fields["rope_scaling"]) == {"factor"}
            try:
                fields["rope_scaling"] = (LinearScaling if linear else YarnScaling)(**fields["rope_scaling"])
            except TypeError as error:
                raise ValueError(
                    f"rope_scaling={fields['rope_scaling']!r} does not fit YarnScaling: {error}"
                ) from None
        return cls(**fields)

    @classmethod
    def from_hf(cls, source: str | Path | dict[str, Any]) -> DSV2Config:
        """Read a Hugging Face `config.json` (transformers 4 or 5 style): a path, a folder or a dict.

        Raises ValueError naming the fields for another architecture, a quantised checkpoint, or a feature
        that DeepSeek-V2 does not have (biases, sigmoid scores); FileNotFoundError if there is no such file.
        """
        raw = source if isinstance(source, dict) else _read_json(Path(source))
        return cls.from_dict(_from_hf_fields(raw))

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers (4 and 5) reads; dsv2's own fields go under "dsv2".

        Raises ValueError for the attention baselines and the routers that Hugging Face's DeepSeek-V2 does not
        have.
        """
        for name, exported in (("attention", "mla"), ("router", "deepseek")):
            value = getattr(self, name)
            if value != exported:
                raise ValueError(
                    f"{name}={value!r} has no Hugging Face form; only {exported!r} can be exported"
                )
        fields = self.to_dict()
        own = {name: fields.pop(name) for name in _DSV2_ONLY}
        if not self.n_routed_experts:  # there a model is dense when its dense layers are all there are
            own["first_k_dense_replace"] = self.first_k_dense_replace
            fields["first_k_dense_replace"] = self.num_hidden_layers
        scaling, kind = fields.pop("rope_scaling"), "yarn"
        if isinstance(self.rope_scaling, LinearScaling):
            kind = "linear"
        return {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            **fields,
            "num_key_value_heads": self.num_attention_heads,
            "rope_scaling": None if scaling is None else {"type": kind, **scaling},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "scoring_func": "softmax",
            "use_cache": True,
            "dsv2": own,
        }


# Fields without a counterpart in Hugging Face's config, or with another meaning there (transformers 5 writes
# head_dim = qk_rope_head_dim).
_DSV2_ONLY = (
    "attention",
    "head_dim",
    "num_key_value_heads",
    "router",
    "device_loss_alpha",
    "communication_loss_alpha",
    "capacity_factor",
)

_OPTIONAL = {
    "bos_token_id",
    "eos_token_id",
    "q_lora_rank",
    "head_dim",
    "num_key_value_heads",
    "capacity_factor",
}


def _type_problems(cfg: DSV2Config):
    """One sentence per field whose type is wrong; nothing else can be checked before this holds."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        kind = field.type.split(" |")[0]
        if value is None and (field.name in _OPTIONAL or field.name == "rope_scaling"):
            continue
        if kind == "int" and not (_is_number(value) and isinstance(value, int)):
            yield f"{field.name}={value!r} must be an integer below 2**63"
        elif kind == "float" and not _is_number(value):
            yield f"{field.name}={value!r} must be a finite number below 2**63"
        elif kind == "bool" and not isinstance(value, bool):
            yield f"{field.name}={value!r} must be true or false"
        elif kind == "str" and not isinstance(value, str):
            yield f"{field.name}={value!r} must be a string"
    scaling = cfg.rope_scaling
    if scaling is not None and not isinstance(scaling, (YarnScaling, LinearScaling)):
        yield f"rope_scaling={scaling!r} must be a YarnScaling, a LinearScaling or None"
    elif scaling is not None:
        for field in dataclasses.fields(scaling):
            value = getattr(scaling, field.name)
            if not _is_number(value):
                yield f"rope_scaling.{field.name}={value!r} must be a finite number below 2**63"


def _is_number(value: object) -> bool:
    """A finite number that torch can take: Python's own integers have no end, and float() of one can fail."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _value_problems(cfg: DSV2Config):
    """One sentence per inconsistency, naming the fields."""
    at_least_one = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    ]
    at_least_one += ["max_position_embeddings", "moe_layer_freq"]
    if cfg.attention == "mla":
        at_least_one += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    for name in at_least_one:
        if getattr(cfg, name) < 1:
            yield f"{name}={getattr(cfg, name)} must be at least 1"
    for name in ("rms_norm_eps", "initializer_range", "rope_theta", "routed_scaling_factor"):
        if getattr(cfg, name) <= 0:
            yield f"{name}={getattr(cfg, name)} must be above 0"
    for name in ("aux_loss_alpha", "device_loss_alpha", "communication_loss_alpha"):
        if getattr(cfg, name) < 0:
            yield f"{name}={getattr(cfg, name)} must not be negative"
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(cfg, name)
        if token is not None and not 0 <= token < cfg.vocab_size:
            yield f"{name}={token} is outside the vocabulary: vocab_size={cfg.vocab_size}"

    if cfg.attention not in ATTENTIONS:
        yield f"attention={cfg.attention!r} is unknown; choose one of {', '.join(ATTENTIONS)}"
    elif cfg.attention == "mla":
        if cfg.qk_rope_head_dim % 2:
            yield f"qk_rope_head_dim={cfg.qk_rope_head_dim} must be even: RoPE turns pairs"
        if cfg.q_lora_rank is not None and cfg.q_lora_rank < 1:
            yield f"q_lora_rank={cfg.q_lora_rank} must be at least 1, or None for uncompressed queries"
    else:
        if cfg.baseline_head_dim < 2 or cfg.baseline_head_dim % 2:
            yield f"head_dim={cfg.baseline_head_dim} must be even and at least 2: RoPE turns pairs"
        if cfg.attention == "gqa":
            groups = cfg.num_key_value_heads
            if groups is None or groups < 1 or cfg.num_attention_heads % groups:
                yield (
                    f"attention='gqa' needs num_key_value_heads that divides num_attention_heads="
                    f"{cfg.num_attention_heads}; got num_key_value_heads={groups}"
                )

    if cfg.rope_scaling is not None and cfg.rope_scaling.factor < 1:
        yield f"rope_scaling.factor={cfg.rope_scaling.factor} must be at least 1: it lengthens the context"
    yarn = cfg.rope_scaling
    if isinstance(yarn, YarnScaling):
        if yarn.original_max_position_embeddings < 1:
            yield (
                "rope_scaling.original_max_position_embeddings="
                f"{yarn.original_max_position_embeddings} must be at least 1"
            )
        if not yarn.beta_fast > yarn.beta_slow >= 1e-6:
            yield (
                f"rope_scaling needs beta_fast > beta_slow >= 1e-6; got beta_fast={yarn.beta_fast}, "
                f"beta_slow={yarn.beta_slow}"
            )
        if yarn.mscale < 0 or yarn.mscale_all_dim < 0:
            yield (
                f"rope_scaling.mscale={yarn.mscale} and mscale_all_dim={yarn.mscale_all_dim} "
                "must not be negative"
            )
        if cfg.rope_theta <= 1:
            yield f"rope_theta={cfg.rope_theta} must be above 1 with YaRN, which takes its logarithm"

    if cfg.first_k_dense_replace < 0:
        yield f"first_k_dense_replace={cfg.first_k_dense_replace} must not be negative"
    if cfg.n_routed_experts < 0 or cfg.n_shared_experts < 0:
        yield (
            f"n_routed_experts={cfg.n_routed_experts} and n_shared_experts={cfg.n_shared_experts} "
            "must not be negative"
        )
    elif cfg.n_routed_experts > 0:
        yield from _routing_problems(cfg)


def _routing_problems(cfg: DSV2Config):
    experts, chosen = cfg.n_routed_experts, cfg.num_experts_per_tok
    if cfg.moe_intermediate_size < 1:
        yield f"moe_intermediate_size={cfg.moe_intermediate_size} must be at least 1"
    if not 1 <= chosen <= experts:
        yield f"num_experts_per_tok={chosen} must lie in 1..n_routed_experts={experts}"
    if cfg.router not in ROUTERS:
        yield f"router={cfg.router!r} is unknown; choose one of {', '.join(ROUTERS)}"
    fixed = _experts_of(cfg.router, experts)
    if fixed not in (None, chosen):
        count = f"all n_routed_experts={fixed} experts" if cfg.router == "dense" else f"{fixed} expert(s)"
        yield (
            f"router={cfg.router!r} sends a token to {count}; num_experts_per_tok={chosen} must be {fixed} "
            "(cfg.with_router sets both)"
        )
    if cfg.capacity_factor is not None and cfg.capacity_factor <= 0:
        yield f"capacity_factor={cfg.capacity_factor} must be above 0, or None to drop no tokens"
    if cfg.n_group < 1 or experts % cfg.n_group:
        yield (
            f"experts must split evenly over devices: n_routed_experts={experts} is not a multiple of "
            f"n_group={cfg.n_group}"
        )
        return
    if cfg.router != "deepseek":
        return
    if cfg.topk_method not in TOPK_METHODS:
        yield f"topk_method={cfg.topk_method!r} is unknown; choose one of {', '.join(TOPK_METHODS)}"
    if not 1 <= cfg.topk_group <= cfg.n_group:
        yield f"topk_group={cfg.topk_group} must lie in 1..n_group={cfg.n_group}"
    elif cfg.topk_method == "group_limited_greedy" and chosen > cfg.topk_group * cfg.experts_per_device:
        yield (
            f"num_experts_per_tok={chosen} experts do not fit on topk_group={cfg.topk_group} devices "
            f"of {cfg.experts_per_device} experts each"
        )


def _experts_of(router: str, n_routed_experts: int) -> int | None:
    """How many experts a token goes to where the router fixes it; None: num_experts_per_tok says."""
    return {"dense": n_routed_experts, "switch": 1, "gshard": 2, "glam": 2, "mixtral": 2}.get(router)


def _closest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, [f.name for f in dataclasses.fields(DSV2Config)], n=1)
    return f"; did you mean {close[0]}?" if close else ""


# ------------------------------------------------------------------------------------------ Hugging Face


def _read_json(path: Path) -> dict[str, Any]:
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json at {path}; give a config.json or a folder that holds one")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a JSON {type(fields).__name__}, not an object")
    return fields


# What DeepSeek-V2 fixes: other values mean another model, which these equations would compute wrongly.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "scoring_func": "softmax",
}
_REQUIRED = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size kv_lora_rank "
    "qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok moe_intermediate_size "
    "first_k_dense_replace"
).split()


def _from_hf_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Our fields out of a `config.json`, whichever version of transformers wrote it."""
    problems = []
    if raw.get("model_type") not in ("deepseek_v2", "deepseek"):
        problems.append(f"model_type={raw.get('model_type')!r} is not 'deepseek_v2'")
    if raw.get("quantization_config"):
        problems.append(
            "quantization_config is set: quantised checkpoints are not supported, use the bf16 one"
        )
    for name, value in _FIXED.items():
        if raw.get(name, value) not in (value, None):
            problems.append(f"{name}={raw[name]!r} is not supported (DeepSeek-V2 has {value!r})")
    missing = [name for name in _REQUIRED if raw.get(name) is None]
    if missing:
        problems.append(f"these fields are missing: {', '.join(missing)}")
    if problems:
        raise ValueError(
            "this config.json does not describe a DeepSeek-V2:\n" + "\n".join(f"  - {p}" for p in problems)
        )

    own = raw.get("dsv2") or {}
    if not isinstance(own, dict):
        raise ValueError(f'config.json\'s "dsv2" must be an object; got {own!r}')
    names = (
        {f.name for f in dataclasses.fields(DSV2Config)} - set(_DSV2_ONLY) - {"rope_scaling", "rope_theta"}
    )
    fields = {name: raw[name] for name in names if raw.get(name) is not None}
    fields.update({name: own[name] for name in (*_DSV2_ONLY, "first_k_dense_replace") if name in own})
    fields["rope_theta"], fields["rope_scaling"] = _hf_rope(raw)
    if isinstance(
        fields.get("eos_token_id"), list
    ):  # newer generation configs list several; the first ends a text
        fields["eos_token_id"] = fields["eos_token_id"][0] if fields["eos_token_id"] else None
    return fields


def _hf_rope(raw: dict[str, Any]) -> tuple[float, YarnScaling | LinearScaling | None]:
    """(rope_theta, scaling) from transformers 5's `rope_parameters`, or 4's `rope_scaling` and theta"""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling={rope!r} must be an object or null")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("yarn", "linear"):
        raise ValueError(
            f"rope type {kind!r} is not supported; DeepSeek-V2 has 'yarn' or none; 'linear' is read too"
        )
    if rope.get("factor") is None:
        raise ValueError(f"rope_scaling of type {kind!r} needs a factor")
    if kind == "linear":
        return theta, LinearScaling(rope["factor"])
    known = {f.name: rope[f.name] for f in dataclasses.fields(YarnScaling) if rope.get(f.name) is not None}
    known.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings", 4096))
    # Absent in a config means 'no extra factor' there, whatever DeepSeek-V2's own value is.
    known.setdefault("mscale", 1.0)
    known.setdefault("mscale_all_dim", 0.0)
    return theta, YarnScaling(**known)


# ----------------------------------------------------------------------------------------------- presets

_YARN_V2 = YarnScaling(factor=40.0, original_max_position_embeddings=4096)

PRESETS: dict[str, DSV2Config] = {
    # About 3.5M parameters: every part of DeepSeek-V2 at a size that trains on a laptop, over bytes.
    "tiny": DSV2Config(
        vocab_size=264,
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=257,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        aux_loss_alpha=0.003,
        device_loss_alpha=0.05,
        communication_loss_alpha=0.02,
    ),
    # About 100M parameters, for one GPU.
    "small": DSV2Config(
        vocab_size=264,
        hidden_size=512,
        num_hidden_layers=10,
        num_attention_heads=8,
        intermediate_size=2048,
        max_position_embeddings=4096,
        bos_token_id=256,
        eos_token_id=257,
        q_lora_rank=384,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=32,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=192,
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        aux_loss_alpha=0.003,
        device_loss_alpha=0.05,
        communication_loss_alpha=0.02,
    ),
    # DeepSeek-V2-Lite, 15.7B (appendix B.1 and its released config.json).
    "lite": DSV2Config(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        intermediate_size=10944,
        max_position_embeddings=163840,
        initializer_range=0.006,
        bos_token_id=100000,
        eos_token_id=100001,
        rope_scaling=_YARN_V2,
        n_routed_experts=64,
        moe_intermediate_size=1408,
    ),
    # DeepSeek-V2, 236B (section 3.1.2 and its released config.json).
    "full": DSV2Config(
        vocab_size=102400,
        hidden_size=5120,
        num_hidden_layers=60,
        num_attention_heads=128,
        intermediate_size=12288,
        max_position_embeddings=163840,
        initializer_range=0.006,
        bos_token_id=100000,
        eos_token_id=100001,
        q_lora_rank=1536,
        rope_scaling=_YARN_V2,
        n_routed_experts=160,
        moe_intermediate_size=1536,
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        routed_scaling_factor=16.0,
        aux_loss_alpha=0.003,
        device_loss_alpha=0.05,
        communication_loss_alpha=0.02,
        capacity_factor=1.0,
    ),
}
