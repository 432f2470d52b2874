"""The configuration: what it refuses, with which words, and what survives being written and read."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv2.config import PRESETS, ROUTERS, DSV2Config, YarnScaling

BASE = DSV2Config.preset("tiny")
YARN = YarnScaling(factor=8.0, original_max_position_embeddings=128)
GQA = {"attention": "gqa", "num_key_value_heads": 2}


# ----------------------------------------------------------------------------------------- what is refused

REFUSED = [
    ({"vocab_size": 0}, ["vocab_size=0", "at least 1"]),
    ({"hidden_size": -4}, ["hidden_size=-4"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers=0"]),
    ({"num_attention_heads": 0}, ["num_attention_heads=0"]),
    ({"intermediate_size": 0}, ["intermediate_size=0"]),
    ({"max_position_embeddings": 0}, ["max_position_embeddings=0"]),
    ({"moe_layer_freq": 0}, ["moe_layer_freq=0"]),
    ({"kv_lora_rank": 0}, ["kv_lora_rank=0"]),
    ({"qk_nope_head_dim": 0}, ["qk_nope_head_dim=0"]),
    ({"qk_rope_head_dim": 0}, ["qk_rope_head_dim=0"]),
    ({"v_head_dim": 0}, ["v_head_dim=0"]),
    ({"qk_rope_head_dim": 7}, ["qk_rope_head_dim=7", "even"]),
    ({"q_lora_rank": 0}, ["q_lora_rank=0", "None"]),
    ({"rms_norm_eps": 0.0}, ["rms_norm_eps=0.0", "above 0"]),
    ({"initializer_range": -0.1}, ["initializer_range=-0.1"]),
    ({"rope_theta": 0.0}, ["rope_theta=0.0"]),
    ({"routed_scaling_factor": 0.0}, ["routed_scaling_factor=0.0"]),
    ({"aux_loss_alpha": -1.0}, ["aux_loss_alpha=-1.0", "negative"]),
    ({"device_loss_alpha": -1.0}, ["device_loss_alpha"]),
    ({"communication_loss_alpha": -1.0}, ["communication_loss_alpha"]),
    ({"bos_token_id": 264}, ["bos_token_id=264", "vocab_size=264"]),
    ({"eos_token_id": -1}, ["eos_token_id=-1"]),
    ({"attention": "mlp"}, ["attention='mlp'", "mla, mha, gqa, mqa"]),
    ({"attention": "mha", "head_dim": 5}, ["head_dim=5", "even"]),
    ({"attention": "mqa", "head_dim": 0}, ["head_dim=0"]),
    ({"attention": "gqa"}, ["num_key_value_heads=None", "num_attention_heads=4"]),
    ({**GQA, "num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=4"]),
    ({**GQA, "num_key_value_heads": 0}, ["num_key_value_heads=0"]),
    ({"first_k_dense_replace": -1}, ["first_k_dense_replace=-1"]),
    ({"n_routed_experts": -1}, ["n_routed_experts=-1"]),
    ({"n_shared_experts": -1}, ["n_shared_experts=-1"]),
    ({"moe_intermediate_size": 0}, ["moe_intermediate_size=0"]),
    ({"num_experts_per_tok": 17}, ["num_experts_per_tok=17", "n_routed_experts=16"]),
    ({"num_experts_per_tok": 0}, ["num_experts_per_tok=0"]),
    ({"topk_method": "noaux_tc"}, ["topk_method='noaux_tc'", "group_limited_greedy"]),
    ({"capacity_factor": 0.0}, ["capacity_factor=0.0", "None"]),
    ({"router": "noisy"}, ["router='noisy'", "deepseek, dense, switch, gshard, glam, mixtral"]),
    ({"router": 2}, ["router=2", "string"]),
    ({"router": "switch"}, ["router='switch'", "to 1 expert(s)", "num_experts_per_tok=4 must be 1"]),
    ({"router": "gshard"}, ["router='gshard'", "num_experts_per_tok=4 must be 2", "with_router"]),
    ({"router": "glam", "num_experts_per_tok": 1}, ["num_experts_per_tok=1 must be 2"]),
    ({"router": "mixtral", "num_experts_per_tok": 3}, ["num_experts_per_tok=3 must be 2"]),
    ({"router": "dense"}, ["all n_routed_experts=16 experts", "num_experts_per_tok=4 must be 16"]),
    ({"router": "switch", "num_experts_per_tok": 1, "n_group": 3}, ["n_group=3"]),
    ({"n_group": 3, "topk_group": 3}, ["n_routed_experts=16", "n_group=3"]),
    ({"n_group": 0}, ["n_group=0"]),
    ({"topk_group": 5}, ["topk_group=5", "n_group=4"]),
    ({"topk_group": 0}, ["topk_group=0"]),
    ({"num_experts_per_tok": 9}, ["num_experts_per_tok=9", "topk_group=2", "4 experts each"]),
    ({"rope_scaling": dataclasses.replace(YARN, factor=0.5)}, ["rope_scaling.factor=0.5"]),
    (
        {"rope_scaling": dataclasses.replace(YARN, original_max_position_embeddings=0)},
        ["rope_scaling.original_max_position_embeddings=0"],
    ),
    ({"rope_scaling": dataclasses.replace(YARN, beta_slow=32.0)}, ["beta_fast=32.0", "beta_slow=32.0"]),
    ({"rope_scaling": dataclasses.replace(YARN, beta_slow=0.0)}, ["beta_slow=0.0"]),
    ({"rope_scaling": dataclasses.replace(YARN, mscale=-1.0)}, ["mscale=-1.0"]),
    ({"rope_scaling": dataclasses.replace(YARN, mscale_all_dim=-1.0)}, ["mscale_all_dim=-1.0"]),
    ({"rope_scaling": YARN, "rope_theta": 1.0}, ["rope_theta=1.0", "logarithm"]),
    # Types
    ({"hidden_size": 192.0}, ["hidden_size=192.0", "integer"]),
    ({"num_hidden_layers": True}, ["num_hidden_layers=True", "integer"]),
    ({"vocab_size": "264"}, ["vocab_size='264'"]),
    ({"vocab_size": None}, ["vocab_size=None"]),
    ({"rope_theta": "10000"}, ["rope_theta='10000'", "finite number"]),
    ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan"]),
    ({"routed_scaling_factor": float("inf")}, ["routed_scaling_factor=inf"]),
    ({"aux_loss_alpha": True}, ["aux_loss_alpha=True"]),
    ({"seq_aux": 1}, ["seq_aux=1", "true or false"]),
    ({"attention": 3}, ["attention=3", "string"]),
    ({"rope_scaling": {"factor": 2}}, ["rope_scaling=", "YarnScaling"]),
    ({"rope_scaling": dataclasses.replace(YARN, factor="8")}, ["rope_scaling.factor='8'"]),
    ({"rope_scaling": dataclasses.replace(YARN, mscale=float("nan"))}, ["rope_scaling.mscale=nan"]),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=lambda value: str(value)[:60])
def test_inconsistent_values_are_refused_by_name(changes, words):
    with pytest.raises(ValueError) as error:
        BASE.replace(**changes)
    for word in words:
        assert word in str(error.value)


def test_all_problems_are_reported_together():
    with pytest.raises(ValueError) as error:
        BASE.replace(hidden_size=0, qk_rope_head_dim=3, topk_group=9, bos_token_id=999)
    for word in ("hidden_size=0", "qk_rope_head_dim=3", "topk_group=9", "bos_token_id=999"):
        assert word in str(error.value)


def test_values_that_the_chosen_parts_do_not_use_are_not_judged():
    BASE.replace(attention="mha", kv_lora_rank=0, qk_rope_head_dim=7, v_head_dim=0)
    BASE.replace(n_routed_experts=0, num_experts_per_tok=99, n_group=7, topk_group=0)
    BASE.replace(topk_method="greedy", num_experts_per_tok=16)
    BASE.replace(router="switch", num_experts_per_tok=1, topk_method="none", topk_group=9)
    BASE.replace(router="switch", n_routed_experts=0)


def test_with_router_takes_as_many_experts_as_the_router_does():
    counts = {router: BASE.with_router(router).num_experts_per_tok for router in ROUTERS}
    assert counts == {"deepseek": 4, "dense": 16, "switch": 1, "gshard": 2, "glam": 2, "mixtral": 2}
    cfg = BASE.with_router("dense", n_routed_experts=8, aux_loss_alpha=0.5)
    assert (cfg.router, cfg.num_experts_per_tok, cfg.aux_loss_alpha) == ("dense", 8, 0.5)
    with pytest.raises(ValueError, match="num_experts_per_tok=3 must be 1"):
        BASE.with_router("switch", num_experts_per_tok=3)


def test_which_models_limit_the_devices_and_have_a_hugging_face_form():
    assert BASE.limits_devices and BASE.has_hf_form
    assert not BASE.replace(topk_method="greedy").limits_devices
    assert not BASE.replace(topk_group=4).limits_devices
    assert not BASE.with_router("switch").limits_devices
    assert not BASE.with_router("switch").has_hf_form and not BASE.replace(attention="mha").has_hf_form


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.hidden_size = 1
    assert hash(BASE) == hash(DSV2Config.preset("tiny"))


def test_misspelt_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="hiden_size; did you mean hidden_size"):
        BASE.replace(hiden_size=3)
    with pytest.raises(ValueError, match="hiden_size; did you mean hidden_size"):
        DSV2Config.from_dict({**BASE.to_dict(), "hiden_size": 3})
    with pytest.raises(ValueError, match="'gigantic' is unknown; choose one of tiny, small, lite, full"):
        DSV2Config.preset("gigantic")


def test_from_dict_names_what_is_missing():
    fields = BASE.to_dict()
    del fields["vocab_size"], fields["intermediate_size"]
    with pytest.raises(ValueError, match="vocab_size, intermediate_size"):
        DSV2Config.from_dict(fields)
    with pytest.raises(ValueError, match="rope_scaling.*speed"):
        DSV2Config.from_dict({**BASE.to_dict(), "rope_scaling": {"speed": 3}})


# ---------------------------------------------------------------------------------------------- derived


@pytest.mark.parametrize(
    "changes, layers",
    [
        ({}, (1, 2, 3, 4)),
        ({"first_k_dense_replace": 0}, (0, 1, 2, 3, 4)),
        ({"first_k_dense_replace": 3}, (3, 4)),
        ({"first_k_dense_replace": 9}, ()),
        ({"moe_layer_freq": 2}, (2, 4)),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 0}, (0, 2, 4)),
        ({"moe_layer_freq": 3}, (3,)),
        ({"n_routed_experts": 0}, ()),
    ],
)
def test_which_layers_have_experts(changes, layers):
    assert BASE.replace(**changes).moe_layers == layers


def test_derived_widths():
    assert BASE.qk_head_dim == 48 and BASE.experts_per_device == 4
    assert BASE.kv_heads == BASE.replace(attention="mha").kv_heads == 4
    assert BASE.replace(**GQA).kv_heads == 2 and BASE.replace(attention="mqa").kv_heads == 1
    assert BASE.baseline_head_dim == 32 and BASE.replace(head_dim=6).baseline_head_dim == 6


def test_presets_are_the_published_models():
    """Section 3.1.2 and appendix B.1."""
    full, lite = PRESETS["full"], PRESETS["lite"]
    assert (full.num_hidden_layers, full.hidden_size, full.num_attention_heads) == (60, 5120, 128)
    assert (full.kv_lora_rank, full.q_lora_rank, full.qk_rope_head_dim) == (512, 1536, 64)
    assert (full.n_shared_experts, full.n_routed_experts, full.num_experts_per_tok) == (2, 160, 6)
    assert (full.n_group, full.topk_group, full.routed_scaling_factor) == (8, 3, 16.0)
    alphas = (full.aux_loss_alpha, full.device_loss_alpha, full.communication_loss_alpha)
    assert alphas == (0.003, 0.05, 0.02)
    assert (lite.num_hidden_layers, lite.hidden_size, lite.num_attention_heads) == (27, 2048, 16)
    assert (lite.kv_lora_rank, lite.q_lora_rank, lite.n_routed_experts) == (512, None, 64)
    assert (lite.aux_loss_alpha, lite.device_loss_alpha, lite.topk_method) == (0.001, 0.0, "greedy")


# ------------------------------------------------------------------------------------------ round trips

optional = st.none() | st.integers(1, 50)


@st.composite
def configs(draw, attentions=("mla", "mha", "gqa", "mqa")) -> DSV2Config:
    devices, per_device = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    reach = draw(st.integers(1, devices))
    heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    vocab = draw(st.integers(2, 500))
    rate = st.floats(0, 1)
    yarn = st.builds(
        YarnScaling,
        factor=st.floats(1, 64),
        original_max_position_embeddings=st.integers(1, 9999),
        mscale=st.floats(0, 2),
        mscale_all_dim=st.floats(0, 2),
    )
    return DSV2Config(
        vocab_size=vocab,
        hidden_size=draw(st.integers(1, 99)),
        num_hidden_layers=draw(st.integers(1, 9)),
        num_attention_heads=heads * groups,
        intermediate_size=draw(st.integers(1, 99)),
        rms_norm_eps=draw(st.floats(1e-9, 1e-2)),
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=draw(st.none() | st.integers(0, vocab - 1)),
        eos_token_id=draw(st.none() | st.integers(0, vocab - 1)),
        attention=draw(st.sampled_from(attentions)),
        q_lora_rank=draw(optional),
        kv_lora_rank=draw(st.integers(1, 99)),
        qk_nope_head_dim=2 * draw(st.integers(1, 20)),
        qk_rope_head_dim=2 * draw(st.integers(1, 20)),
        v_head_dim=draw(st.integers(1, 20)),
        head_dim=draw(st.none() | st.integers(1, 20).map(lambda n: 2 * n)),
        num_key_value_heads=groups,
        rope_theta=draw(st.floats(1.5, 1e6)),
        rope_scaling=draw(st.none() | yarn),
        n_routed_experts=devices * per_device,
        n_shared_experts=draw(st.integers(0, 3)),
        num_experts_per_tok=draw(st.integers(1, reach * per_device)),
        first_k_dense_replace=draw(st.integers(0, 9)),
        moe_layer_freq=draw(st.integers(1, 3)),
        topk_method=draw(st.sampled_from(["greedy", "group_limited_greedy"])),
        n_group=devices,
        topk_group=reach,
        routed_scaling_factor=draw(st.floats(0.1, 20)),
        norm_topk_prob=draw(st.booleans()),
        aux_loss_alpha=draw(rate),
        device_loss_alpha=draw(rate),
        communication_loss_alpha=draw(rate),
        seq_aux=draw(st.booleans()),
        capacity_factor=draw(st.none() | st.floats(0.1, 4)),
    )


@given(configs())
def test_to_dict_survives_json(cfg):
    assert DSV2Config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@given(configs(attentions=("mla",)))
def test_to_hf_survives_json(cfg):
    assert DSV2Config.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_both(name):
    cfg = PRESETS[name]
    assert DSV2Config.from_dict(cfg.to_dict()) == DSV2Config.from_hf(cfg.to_hf()) == cfg


@pytest.mark.parametrize("attention", ["mha", "gqa", "mqa"])
def test_baselines_have_no_hugging_face_form(attention):
    with pytest.raises(ValueError, match=f"attention='{attention}'"):
        BASE.replace(attention=attention, num_key_value_heads=2).to_hf()


@pytest.mark.parametrize("router", ROUTERS[1:])
def test_routers_of_other_papers_have_no_hugging_face_form(router):
    with pytest.raises(ValueError, match=f"router='{router}' has no Hugging Face form"):
        BASE.with_router(router).to_hf()
    cfg = BASE.with_router(router, capacity_factor=1.25)
    assert DSV2Config.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    before = {name: value for name, value in BASE.to_dict().items() if name != "router"}
    assert DSV2Config.from_dict(before) == BASE, "what was written without the field is DeepSeek's"


# ----------------------------------------------------------------------------------------- Hugging Face

# V2-Lite's published config.json in transformers 4 style, fields that dsv2 does not use included.
V4 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
LITE = PRESETS["lite"].replace(initializer_range=0.02)


def v5(**changes) -> dict:
    """The same in transformers 5 style: rope_parameters, dtype, and a head_dim that means something else."""
    fields = {k: v for k, v in V4.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    yarn = {k: v for k, v in V4["rope_scaling"].items() if k != "type"}
    fields["rope_parameters"] = {**yarn, "rope_type": "yarn", "rope_theta": 10000.0}
    return {**fields, "head_dim": 64, "dtype": "bfloat16", "transformers_version": "5.0.0", **changes}


def test_both_styles_are_read():
    assert DSV2Config.from_hf(V4) == LITE
    assert DSV2Config.from_hf(v5()) == LITE
    assert DSV2Config.from_hf(v5()).head_dim is None


def test_plain_rope_in_both_styles():
    plain = LITE.replace(rope_scaling=None, rope_theta=5e5)
    assert DSV2Config.from_hf({**V4, "rope_scaling": None, "rope_theta": 5e5}) == plain
    assert DSV2Config.from_hf(v5(rope_parameters={"rope_type": "default", "rope_theta": 5e5})) == plain
    bare = {k: v for k, v in V4.items() if k not in ("rope_scaling", "rope_theta")}
    assert DSV2Config.from_hf(bare) == LITE.replace(rope_scaling=None)


def test_a_v5_theta_inside_the_parameters_wins():
    fields = v5(rope_theta=7.0)
    fields["rope_parameters"]["rope_theta"] = 123.0
    assert DSV2Config.from_hf(fields).rope_theta == 123.0


def test_yarn_without_mscale_has_no_extra_factor():
    scaling = {"type": "yarn", "factor": 40}
    yarn = DSV2Config.from_hf({**V4, "rope_scaling": scaling}).rope_scaling
    assert yarn == YarnScaling(40, 163840, mscale=1.0, mscale_all_dim=0.0)


def test_extras():
    assert DSV2Config.from_hf({**V4, "model_type": "deepseek"}) == LITE
    assert DSV2Config.from_hf({**V4, "eos_token_id": [100001, 3]}) == LITE
    assert DSV2Config.from_hf({**V4, "eos_token_id": []}).eos_token_id is None
    own = {"capacity_factor": 1.5, "device_loss_alpha": 0.25, "added_later": 3}
    assert DSV2Config.from_hf({**V4, "dsv2": own}) == LITE.replace(
        capacity_factor=1.5, device_loss_alpha=0.25
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "deepseek_v3"}, ["model_type='deepseek_v3'"]),
        ({"model_type": None}, ["model_type=None"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "bf16"]),
        ({"attention_bias": True}, ["attention_bias=True"]),
        ({"mlp_bias": True}, ["mlp_bias=True"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ({"scoring_func": "sigmoid"}, ["scoring_func='sigmoid'"]),
        ({"vocab_size": None, "kv_lora_rank": None}, ["missing", "vocab_size", "kv_lora_rank"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["'linear'", "factor"]),
        ({"rope_scaling": {"type": "yarn"}}, ["factor"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling='yarn'"]),
        ({"rope_theta": "large"}, ["rope_theta='large'"]),
        ({"dsv2": [1]}, ["dsv2"]),
        ({"hidden_size": "2048"}, ["hidden_size='2048'"]),
        ({"topk_method": "noaux_tc"}, ["topk_method='noaux_tc'"]),
    ],
)
def test_other_models_are_refused_by_field(changes, words):
    with pytest.raises(ValueError) as error:
        DSV2Config.from_hf({**V4, **changes})
    for word in words:
        assert word in str(error.value)


def test_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V4), encoding="utf-8")
    assert DSV2Config.from_hf(tmp_path) == DSV2Config.from_hf(str(tmp_path / "config.json")) == LITE
    with pytest.raises(FileNotFoundError, match="no config.json at"):
        DSV2Config.from_hf(tmp_path / "elsewhere")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[1, 2]", b"3", b"[" * 100_000])
def test_broken_files(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json"):
        DSV2Config.from_hf(tmp_path)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**12) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
hf_names = st.sampled_from([*V4, "rope_parameters", "dsv2", "quantization_config", "attention"])


@given(st.dictionaries(hf_names, anything, max_size=4))
def test_any_json_gives_a_config_or_a_value_error(changes):
    try:
        cfg = DSV2Config.from_hf({**V4, **changes})
    except ValueError:
        return
    assert isinstance(cfg, DSV2Config) and DSV2Config.from_dict(cfg.to_dict()) == cfg


@given(
    st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(DSV2Config)]), anything, max_size=4)
)
def test_any_fields_give_a_config_or_a_value_error(changes):
    try:
        DSV2Config.from_dict({**BASE.to_dict(), **changes})
    except ValueError:
        pass
