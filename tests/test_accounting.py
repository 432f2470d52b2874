"""The arithmetic against the model itself: its parameters, its caches, and PyTorch's own FLOP counter.

PyTorch's counter sees matrix products. Three things keep it from agreeing by itself, each dealt with below:
the CPU's fused attention is not in its registry (attention is run as plain products instead), those products
cover the full rectangle of queries and keys (`causal=False` counts it), and on the CPU the package pads
values to the keys' width (the configs here have equal widths where that would show).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from dsv2 import PRESETS, DeepSeekV2, DSV2Config, accounting
from dsv2.accounting import Flops, Parameters

# Every width differs from every other, except v_head_dim = N + R where fused attention would pad.
BASE = DSV2Config(
    vocab_size=53,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=34,
    kv_lora_rank=11,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=16,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=7,
    aux_loss_alpha=0.0,
)
VARIANTS = {
    "base": {},
    "narrow values": {"v_head_dim": 5},
    "compressed queries": {"q_lora_rank": 13},
    "tied": {"tie_word_embeddings": True},
    "mha": {"attention": "mha"},
    "gqa": {"attention": "gqa", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4},
    "mqa": {"attention": "mqa", "head_dim": 8},
    "every second layer has experts": {"moe_layer_freq": 2, "num_hidden_layers": 5},
    "no dense layer": {"first_k_dense_replace": 0},
    "two dense layers": {"first_k_dense_replace": 2},
    "all dense": {"first_k_dense_replace": 3},
    "no experts at all": {"n_routed_experts": 0},
    "no shared experts": {"n_shared_experts": 0},
    "device-limited": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
}


def variant(name: str) -> DSV2Config:
    return BASE.replace(**VARIANTS[name])


def on_meta(cfg: DSV2Config) -> DeepSeekV2:
    with torch.device("meta"):
        return DeepSeekV2(cfg)


# -------------------------------------------------------------------------------------------- parameters


def counts_by_name(model: DeepSeekV2) -> Parameters:
    """The model's parameters sorted into the parts by their names."""
    counts = dict.fromkeys((f.name for f in dataclasses.fields(Parameters)), 0)
    for name, parameter in model.named_parameters(remove_duplicate=True):
        if name in ("embed.weight", "head.weight"):
            tied = model.cfg.tie_word_embeddings
            part = "head" if tied or name == "head.weight" else "embedding"
        elif ".attention." in name:
            part = "attention"
        elif "norm" in name:
            part = "norms"
        elif ".experts." in name:
            part = "routed_experts"
        elif ".shared." in name:
            part = "shared_experts"
        elif ".router." in name:
            part = "router"
        else:
            part = "dense_ffn"
        counts[part] += parameter.numel()
    return Parameters(**counts)


@pytest.mark.parametrize("name", [*VARIANTS, *PRESETS])
def test_parameters_equal_the_models_own(name):
    cfg = DSV2Config.preset(name) if name in PRESETS else variant(name)
    model = on_meta(cfg)
    assert accounting.parameters(cfg) == counts_by_name(model)
    assert accounting.parameters(cfg).total == model.num_parameters()
    assert accounting.parameters(cfg, activated=True).total == model.num_parameters(activated=True)


# In total; activated: everything, no embedding, no embedding and router, no embedding and head.
PUBLISHED = {
    "full": (235_741_434_880, 21_375_800_320, 20_851_512_320, 20_803_179_520, 20_327_224_320),
    "lite": (15_706_484_224, 2_661_150_208, 2_451_435_008, 2_448_027_136, 2_241_719_808),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    cfg = DSV2Config.preset(name)
    total, *activated = PUBLISHED[name]
    assert accounting.parameters(cfg).total == total
    assert [*accounting.parameters(cfg, activated=True).conventions().values()] == activated


def test_parts_of_deepseek_v2():
    cfg = DSV2Config.preset("full")
    assert accounting.attention_parameters(cfg) == 149_227_520
    assert accounting.expert_parameters(cfg) == 23_592_960
    assert accounting.layer_parameters(cfg, 0).dense_ffn == 188_743_680
    assert accounting.layer_parameters(cfg, 1).dense_ffn == 0
    assert accounting.parameters(cfg).embedding == accounting.parameters(cfg).head == 524_288_000


def test_lites_mha_twin_is_the_ablations_size():
    """Table 9: 15.8B in total and 2.5B activated for the small model with MHA."""
    twin = accounting.attention_twin(DSV2Config.preset("lite"), "mha")
    assert round(accounting.parameters(twin).total / 1e9, 3) == 15.788
    active = accounting.parameters(twin, activated=True).conventions()
    assert round(active["without embedding and router"] / 1e9, 3) == 2.529


def test_forgetting_the_latent_norms_would_be_noticed(monkeypatch):
    right = accounting.attention_parameters
    monkeypatch.setattr(accounting, "attention_parameters", lambda cfg: right(cfg) - cfg.kv_lora_rank)
    assert accounting.parameters(BASE) != counts_by_name(on_meta(BASE))


def test_a_breakdown_adds_multiplies_and_prints():
    one, other = Parameters(embedding=1, head=1_234_567), Parameters(embedding=10, norms=3)
    assert sum([one, other]) == Parameters(embedding=11, norms=3, head=1_234_567)
    assert (2 * one).head == (one * 2).head == 2_469_134
    assert one.total == sum(one.parts().values()) == 1_234_568
    assert list(one.parts())[:3] == ["embedding", "attention", "dense ffn"]
    lines = str(one).splitlines()
    assert lines[0].split() == ["parameters"] and lines[-1].split() == ["total", "1,234,568"]
    assert len({len(line) for line in lines}) == 1, "the columns line up"
    with pytest.raises(TypeError):
        one + Flops()
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.head = 0


# -------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", [*VARIANTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_the_model_and_its_cache_hold(name, dtype):
    model = on_meta(variant(name)).to(dtype)
    cache = model.new_cache(3, 17)
    held = [cache.entries] if model.cfg.attention == "mla" else [cache.keys, cache.values]
    needed = accounting.memory_needed(model.cfg, dtype, context=17, batch=3)
    assert needed.weights == sum(p.nbytes for p in model.parameters())
    assert needed.cache == sum(t.nbytes for t in held) == needed.total - needed.weights
    assert accounting.memory_needed(model.cfg, dtype) == accounting.Memory(needed.weights, 0)


def test_memory_of_the_released_models():
    lite, full = DSV2Config.preset("lite"), DSV2Config.preset("full")
    assert accounting.memory_needed(lite).weights == 2 * 15_706_484_224
    assert accounting.memory_needed(full, "float32").total == 4 * 235_741_434_880
    assert accounting.memory_needed(full, "float8", 1000, 2, cache_dtype=6).cache == 2 * 1000 * 25_920
    with pytest.raises(ValueError, match="context=-1 must be at least 0"):
        accounting.memory_needed(lite, context=-1)


# -------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("name", VARIANTS)
def test_cache_size_is_what_the_model_allocates(name):
    cfg = variant(name)
    cache = DeepSeekV2(cfg).new_cache(batch=2, max_tokens=5, dtype=torch.bfloat16)
    assert accounting.kv_elements_per_token(cfg) == cache.elements_per_token
    assert accounting.kv_bytes_per_token(cfg, torch.bfloat16) == cache.bytes_per_token
    stores = [cache.entries] if cfg.attention == "mla" else [cache.keys, cache.values]
    allocated = sum(store.numel() * store.itemsize for store in stores)
    assert accounting.kv_bytes_per_token(cfg) * 2 * 5 == allocated == cache.nbytes


def test_published_cache_sizes():
    full, lite = DSV2Config.preset("full"), DSV2Config.preset("lite")
    assert [accounting.kv_elements_per_token(c) for c in (full, lite)] == [34_560, 15_552]
    assert [accounting.kv_bytes_per_token(c) for c in (full, lite)] == [69_120, 31_104]
    assert [accounting.kv_bytes_per_token(c, 6) for c in (full, lite)] == [25_920, 11_664]
    assert [accounting.kv_elements_per_token(c, expanded=True) for c in (full, lite)] == [2_457_600, 138_240]
    assert accounting.equivalent_gqa_heads(full) == 2.25
    assert accounting.kv_elements_per_token(accounting.attention_twin(lite, "mha")) == 110_592


def test_the_savings_that_deepseek_v2_reports():
    """93.3 % against DeepSeek 67B (section 3.2.3) needs both conventions: 16 bits there, 6 bits here."""
    full = DSV2Config.preset("full")
    dense_67b = full.replace(
        attention="gqa",
        num_hidden_layers=95,
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    )
    assert accounting.kv_elements_per_token(dense_67b) == 194_560

    def saved(here, there):
        return round(100 * (1 - here / there), 2)

    theirs = accounting.kv_bytes_per_token(dense_67b)
    assert saved(accounting.kv_bytes_per_token(full, 6), theirs) == 93.34
    assert saved(accounting.kv_bytes_per_token(full, 8), theirs) == 91.12
    assert saved(accounting.kv_bytes_per_token(full), theirs) == 82.24
    mha = accounting.attention_twin(full, "mha")
    assert round(saved(accounting.kv_bytes_per_token(full), accounting.kv_bytes_per_token(mha)), 1) == 98.2


def test_twins_follow_table_1():
    full = DSV2Config.preset("full")
    layers, heads, width = 60, 128, 128
    for kind, kv_heads in (("mha", heads), ("gqa", 8), ("mqa", 1)):
        twin = accounting.attention_twin(full, kind, kv_heads=8)
        assert accounting.kv_elements_per_token(twin) == 2 * kv_heads * width * layers
    narrow = accounting.attention_twin(full, "mqa", head_dim=64)
    assert accounting.kv_elements_per_token(narrow) == 2 * 64 * layers
    assert accounting.attention_twin(accounting.attention_twin(full, "mqa"), "mla") == full
    with pytest.raises(ValueError, match="num_key_value_heads"):
        accounting.attention_twin(full, "gqa")


@pytest.mark.parametrize(
    "dtype, bits",
    [
        (torch.float32, 32),
        (torch.bfloat16, 16),
        (torch.float16, 16),
        (torch.float8_e4m3fn, 8),
        (torch.int8, 8),
        ("float8", 8),
        ("int4", 4),
        (6, 6),
        (4.5, 4.5),
    ],
)
def test_bits(dtype, bits):
    assert accounting.bits_per_element(dtype) == bits
    assert accounting.kv_bytes_per_token(BASE, dtype) == 3 * 17 * bits / 8


@pytest.mark.parametrize("dtype", ["bf16x", 0, -3, math.inf, math.nan, True, None])
def test_bits_refused(dtype):
    with pytest.raises(ValueError, match="dtype="):
        accounting.bits_per_element(dtype)


# ------------------------------------------------------------------------------------------------- work


def counted(run) -> int:
    """FLOPs that PyTorch counts while `run` runs, with attention as plain matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def model_and_tokens(cfg: DSV2Config, tokens: int) -> tuple[DeepSeekV2, torch.Tensor]:
    torch.manual_seed(0)
    return DeepSeekV2(cfg).eval(), torch.randint(cfg.vocab_size, (1, tokens))


FLOP_VARIANTS = [name for name in VARIANTS if name != "narrow values"]


@pytest.mark.parametrize("name", FLOP_VARIANTS)
def test_forward_flops_are_those_that_pytorch_counts(name):
    cfg = variant(name)
    model, tokens = model_and_tokens(cfg, 9)
    with torch.no_grad():
        assert counted(lambda: model(tokens)) == accounting.forward_flops(cfg, 9, causal=False).total
        last = accounting.forward_flops(cfg, 9, logits=1, causal=False).total
        assert counted(lambda: model(tokens, last_only=True)) == last
        prefill = accounting.prefill_flops_per_token(cfg, 9, causal=False)
        assert 9 * prefill.total == pytest.approx(last)


def test_padded_values_are_the_whole_difference_on_the_cpu():
    """With values narrower than keys, the CPU computes their padding too: H T S (N + R - V) multiply-adds."""
    cfg = variant("narrow values")
    model, tokens = model_and_tokens(cfg, 9)
    padding = 2 * cfg.num_hidden_layers * cfg.num_attention_heads * 9 * 9 * (16 - 5)
    with torch.no_grad():
        assert (
            counted(lambda: model(tokens)) - padding == accounting.forward_flops(cfg, 9, causal=False).total
        )


@pytest.mark.parametrize("name", FLOP_VARIANTS)
def test_training_flops_are_those_that_pytorch_counts(name):
    cfg = variant(name)
    model, tokens = model_and_tokens(cfg, 9)
    model.train()

    def step():
        model(tokens).logits.sum().backward()

    expected = accounting.training_flops_per_token(cfg, 9, causal=False).total
    assert counted(step) == pytest.approx(9 * expected)

    model.checkpoint_blocks = True
    expected = accounting.training_flops_per_token(cfg, 9, recompute=True, causal=False).total
    # By default PyTorch stops a recomputation at the last tensor that the backward pass needs, which spares
    # it each block's last product; without that, the layers run once more in full.
    with set_checkpoint_early_stop(False):
        assert counted(step) == pytest.approx(9 * expected)
    assert counted(step) < 9 * expected


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("queries", [None, 13])
def test_cached_flops_of_both_forms_are_those_that_pytorch_counts(form, queries, tokens):
    cfg = BASE.replace(q_lora_rank=queries)
    model, ids = model_and_tokens(cfg, 12 + tokens)
    for block in model.layers:
        block.attention.form = form
    cache = model.new_cache(1, 12 + tokens)
    with torch.no_grad():
        model(ids[:, :12], cache=cache)
        expected = accounting.forward_flops(cfg, tokens, 12, form, causal=False)
        assert counted(lambda: model(ids[:, 12:], cache=cache)) == expected.total
    if tokens == 1:
        assert accounting.decode_flops(cfg, 12, form) == expected


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa"])
def test_decoding_flops_of_the_baselines(name):
    cfg = variant(name)
    model, ids = model_and_tokens(cfg, 13)
    cache = model.new_cache(1, 13)
    with torch.no_grad():
        model(ids[:, :12], cache=cache)
        assert counted(lambda: model(ids[:, 12:], cache=cache)) == accounting.decode_flops(cfg, 12).total
    assert accounting.decode_flops(cfg, 12, "absorbed") == accounting.decode_flops(cfg, 12, "expanded")


def test_a_wrong_multiply_add_count_would_be_noticed(monkeypatch):
    model, tokens = model_and_tokens(BASE, 9)
    monkeypatch.setattr(accounting, "attention_macs", lambda cfg, form: cfg.qk_nope_head_dim + cfg.v_head_dim)
    with torch.no_grad():
        assert counted(lambda: model(tokens)) != accounting.forward_flops(BASE, 9, causal=False).total


def test_causal_pairs_are_counted_one_by_one():
    for tokens, cached in itertools.product((1, 2, 7), (0, 1, 5)):
        pairs = sum(1 for t in range(tokens) for key in range(cached + tokens) if key <= cached + t)
        flops = accounting.forward_flops(BASE, tokens, cached, "cached").scores_and_values
        assert flops == 2 * 3 * 3 * pairs * (10 + 6 + 16)


def test_multiply_adds_of_deepseek_v2():
    full = DSV2Config.preset("full")
    assert accounting.attention_macs(full, "expanded") == accounting.attention_macs(full, "cached") == 320
    assert accounting.attention_macs(full, "absorbed") == 1088
    assert accounting.attention_macs(accounting.attention_twin(full, "mha")) == 256


def test_decode_forms_of_deepseek_v2_at_4096_tokens():
    """Absorbed attention takes 3.4 times the work that cached keys and values would; recovering those in
    every step multiplies the work of the whole model's decoding step by more than 70."""
    full = DSV2Config.preset("full")
    work = {form: accounting.decode_flops(full, 4095, form) for form in accounting.FORMS}
    for form in ("cached", "absorbed"):  # two FLOPs for each activated parameter that is multiplied by
        weights = accounting.parameters(full, activated=True)
        latent_norms = 60 * (512 + 1536)
        multiplied = weights.total - weights.embedding - weights.norms - latent_norms
        assert work[form].total - work[form].scores_and_values == 2 * multiplied
    ratio = work["absorbed"].scores_and_values / work["cached"].scores_and_values
    assert ratio == 1088 / 320
    assert work["expanded"].expansion == 4096 * work["absorbed"].expansion
    assert 70 < work["expanded"].total / work["absorbed"].total < 80


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": 1, "cached": -1}, "cached=-1"),
        ({"tokens": 1, "logits": -1}, "logits=-1"),
        ({"tokens": 1, "form": "folded"}, "form='folded'.*expanded, cached, absorbed"),
    ],
)
def test_impossible_passes_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        accounting.forward_flops(BASE, **arguments)


# ---------------------------------------------------------------------------------------------- traffic


def test_distinct_experts_by_enumeration():
    """All choices of 2 experts of 4 by 3 tokens, counted out."""
    cfg = BASE.replace(n_routed_experts=4, num_experts_per_tok=2)
    choices = list(itertools.combinations(range(4), 2))
    reached = [len(set().union(*picks)) for picks in itertools.product(choices, repeat=3)]
    assert accounting.expected_distinct_experts(cfg, 3) == pytest.approx(sum(reached) / len(reached))
    assert accounting.expected_distinct_experts(cfg, 1) == 2
    assert accounting.expected_distinct_experts(cfg, 10_000) == pytest.approx(4)
    assert accounting.expected_distinct_experts(BASE.replace(n_routed_experts=0), 5) == 0


def test_device_limit_leaves_the_expected_number_as_it_is():
    """160 experts on 8 devices, 6 from a random 3 of them, simulated; the mean of 400 is good to 0.5."""
    cfg, draw = DSV2Config.preset("full"), random.Random(0)

    def token() -> list[int]:
        allowed = [20 * d + i for d in draw.sample(range(8), 3) for i in range(20)]
        return draw.sample(allowed, 6)

    means = sum(len({e for _ in range(48) for e in token()}) for _ in range(400)) / 400
    assert accounting.expected_distinct_experts(cfg, 48) == pytest.approx(means, abs=1.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_bytes_of_one_sequence_are_activated_weights_and_cache(name):
    cfg = variant(name)
    read = accounting.decode_bytes(cfg, cached=11, weight_dtype="float32", cache_dtype=6)
    weights = accounting.parameters(cfg, activated=True)
    assert read.total - read.cache == 4 * (weights.total - weights.embedding + cfg.hidden_size)
    assert read.cache == 11 * accounting.kv_bytes_per_token(cfg, 6)


def test_bytes_of_a_batch():
    cfg = BASE
    one, many = (accounting.decode_bytes(cfg, cached=11, batch=b) for b in (1, 9))
    assert many.attention == one.attention and many.shared_experts == one.shared_experts
    assert many.cache == 9 * one.cache and many.embedding == 9 * one.embedding
    assert many.routed_experts / one.routed_experts == pytest.approx(8 * (1 - (5 / 8) ** 9) / 3)
    everything = accounting.decode_bytes(cfg, 0, batch=100_000).routed_experts
    assert everything == pytest.approx(2 * accounting.parameters(cfg).routed_experts)


def test_bytes_of_the_forms():
    cfg = DSV2Config.preset("full")
    cache = {form: accounting.decode_bytes(cfg, 1000, form=form).cache for form in accounting.FORMS}
    assert cache["absorbed"] == 1000 * 69_120
    assert cache["cached"] == 1000 * 2 * 2_457_600
    assert cache["expanded"] == cache["absorbed"] + cache["cached"]
    with pytest.raises(ValueError, match="form="):
        accounting.decode_bytes(cfg, 1000, form="other")
    with pytest.raises(ValueError, match="batch=0"):
        accounting.decode_bytes(cfg, 1000, batch=0)


# ----------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("name", PRESETS)
def test_command_prints_the_presets(name, capsys):
    assert accounting.main([name]) == 0
    text = capsys.readouterr().out
    assert f"{accounting.parameters(DSV2Config.preset(name)).total:,}" in text
    assert f"{accounting.kv_elements_per_token(DSV2Config.preset(name)):,}" in text


def test_command_reads_config_files(tmp_path, capsys):
    lite, mqa = DSV2Config.preset("lite"), variant("mqa")
    (tmp_path / "config.json").write_text(json.dumps(lite.to_hf()))
    assert accounting.main([str(tmp_path), "--context", "128", "--batch", "3"]) == 0
    assert "15,706,484,224" in capsys.readouterr().out
    (tmp_path / "own.json").write_text(json.dumps(mqa.to_dict()))
    assert accounting.main([str(tmp_path / "own.json")]) == 0
    assert f"{accounting.parameters(mqa).total:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "neither a preset"),
        (["lite", "--context", "0"], "--context=0"),
        (["lite", "--batch", "0"], "batch=0"),
    ],
)
def test_command_explains_what_is_wrong(arguments, words, capsys):
    assert accounting.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_command_refuses_broken_files(tmp_path, capsys):
    for text in ("{", "[1]", '{"model_type": "llama"}', '{"vocab_size": 3}'):
        (tmp_path / "config.json").write_text(text)
        assert accounting.main([str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("python -m dsv2.accounting: ")
