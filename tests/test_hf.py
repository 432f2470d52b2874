"""Checkpoints: the table of names, round trips with and without transformers, memory, atomic replacement."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv2 import DeepSeekV2, DSV2Config, YarnScaling, hf
from dsv2.hf import checkpoint_layout, hf_tensor_names, load_pretrained, save_pretrained
from dsv2.hf.__main__ import main

ROOT = Path(__file__).resolve().parent.parent

MLA = DSV2Config(  # every dimension different
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=38,
    max_position_embeddings=640,
    bos_token_id=1,
    eos_token_id=2,
    q_lora_rank=14,
    kv_lora_rank=18,
    qk_nope_head_dim=10,
    qk_rope_head_dim=4,
    v_head_dim=8,
    rope_scaling=YarnScaling(factor=40.0, original_max_position_embeddings=16),
    n_routed_experts=6,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=11,
    topk_method="group_limited_greedy",
    n_group=3,
    topk_group=2,
    routed_scaling_factor=16.0,
    device_loss_alpha=0.05,
    communication_loss_alpha=0.02,
    capacity_factor=1.25,
)
CONFIGS = {
    "mla": MLA,
    "lite": MLA.replace(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, rope_scaling=None),
    "tied": MLA.replace(tie_word_embeddings=True),
    "no_shared": MLA.replace(n_shared_experts=0),
    "dense": MLA.replace(first_k_dense_replace=3),
    "no_experts": MLA.replace(n_routed_experts=0, capacity_factor=None, device_loss_alpha=0.0),
    "every_other": MLA.replace(num_hidden_layers=5, moe_layer_freq=2),
    "mha": MLA.replace(attention="mha"),
    "gqa": MLA.replace(attention="gqa", num_attention_heads=6, num_key_value_heads=2, head_dim=16),
    "switch": MLA.with_router("switch", tie_word_embeddings=True),
    "glam": MLA.with_router("glam", q_lora_rank=None, n_shared_experts=0, first_k_dense_replace=0),
    "dense router, mha": MLA.with_router("dense", attention="mha"),
    "mqa": MLA.replace(attention="mqa", tie_word_embeddings=True, n_shared_experts=0),
}


def random_model(cfg: DSV2Config, seed: int = 0) -> DeepSeekV2:
    torch.manual_seed(seed)
    model = DeepSeekV2(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.3)
    return model


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def rewrite(directory: Path, change, file: str = "model.safetensors") -> None:
    """Read a file of tensors, let `change` alter the dict, write it back."""
    tensors = load_file(directory / file)
    save_file(change(tensors) or tensors, directory / file, metadata={"format": "pt"})


def edit_config(directory: Path, **changes) -> None:
    fields = json.loads((directory / "config.json").read_text())
    fields.update(changes)
    (directory / "config.json").write_text(json.dumps(fields))


# ---------------------------------------------------------------------------------------- the table of names


def test_counts_of_the_released_models_come_out_of_the_configuration():
    counts = {"lite": (5_291, 15_706_484_224), "full": (29_102, 235_741_434_880)}
    for preset, (tensors, parameters) in counts.items():
        cfg = DSV2Config.preset(preset)
        names = hf_tensor_names(cfg)
        assert len(names) == tensors
        assert sum(math.prod(shape) for shape in names.values()) == parameters
        fused = hf_tensor_names(cfg, fused_experts=True)
        assert sum(math.prod(shape) for shape in fused.values()) == parameters
    assert len(hf_tensor_names(DSV2Config.preset("lite"), fused_experts=True)) == 351


def test_names_and_shapes_of_the_released_models():
    full, lite = (hf_tensor_names(DSV2Config.preset(name)) for name in ("full", "lite"))
    layer = "model.layers.1."
    expected = {
        "self_attn.q_a_proj.weight": (1536, 5120),
        "self_attn.q_a_layernorm.weight": (1536,),
        "self_attn.q_b_proj.weight": (128 * 192, 1536),
        "self_attn.kv_a_proj_with_mqa.weight": (576, 5120),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_b_proj.weight": (128 * 256, 512),
        "self_attn.o_proj.weight": (5120, 128 * 128),
        "mlp.gate.weight": (160, 5120),
        "mlp.experts.159.up_proj.weight": (1536, 5120),
        "mlp.experts.159.down_proj.weight": (5120, 1536),
        "mlp.shared_experts.gate_proj.weight": (3072, 5120),
    }
    assert expected.items() <= {n.removeprefix(layer): shape for n, shape in full.items()}.items()
    assert full["model.layers.0.mlp.down_proj.weight"] == (5120, 12288)
    assert lite["model.layers.26.self_attn.q_proj.weight"] == (16 * 192, 2048)
    assert full["lm_head.weight"] == full["model.embed_tokens.weight"] == (102400, 5120)
    assert not [name for name in full if name.endswith("bias")]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_layout_fills_every_number_of_every_parameter_once(name, fused):
    cfg = CONFIGS[name]
    filled = {n: torch.zeros_like(p) for n, p in DeepSeekV2(cfg).named_parameters()}
    for stored in checkpoint_layout(cfg, fused).values():
        seen = torch.ones(stored.shape).view(stored.view or stored.shape)
        taken = torch.zeros_like(seen)
        for part in stored.parts:
            filled[part.parameter][part.region] += seen[part.rows]
            taken[part.rows] += 1
        assert bool((taken == 1).all())
    assert all(bool((count == 1).all()) for count in filled.values())


def test_kv_b_proj_is_split_per_head():
    """Row h (N + V) + n of the file is row n of W^UK of head h; W^UV follows within the same head."""
    heads, nope, v, latent = 3, 10, 8, 18
    stored = checkpoint_layout(MLA)["model.layers.2.self_attn.kv_b_proj.weight"]
    numbered = torch.arange(heads * (nope + v) * latent).view(stored.view)
    for part, first, rows in zip(stored.parts, (0, nope), (nope, v)):
        piece = numbered[part.rows]
        assert piece.shape == (heads, rows, latent)
        for h in range(heads):
            for n in range(rows):
                assert piece[h, n, 5] == (h * (nope + v) + first + n) * latent + 5


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("max_shard_bytes", [2**30, 6_000, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(tmp_path, name, max_shard_bytes):
    """One file, several shards, and one tensor a shard: the same configuration and the same bits."""
    model = random_model(CONFIGS[name])
    save_pretrained(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.cfg == model.cfg
    assert_same_weights(loaded, model)
    assert not loaded.training and all(p.device.type == "cpu" for p in loaded.parameters())
    assert (loaded.head.weight is loaded.embed.weight) == model.cfg.tie_word_embeddings
    tokens = torch.arange(7)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    files = sorted(f.name for f in (tmp_path / "model").glob("*.safetensors"))
    if max_shard_bytes == 2**30:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert index["metadata"]["total_size"] == 4 * model.num_parameters()
        if max_shard_bytes == 1:
            assert len(files) == len(hf_tensor_names(CONFIGS[name])) or not model.cfg.has_hf_form


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_type_is_kept_or_converted(tmp_path, dtype):
    model = random_model(MLA).to(dtype)
    save_pretrained(model, tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    assert_same_weights(load_pretrained(tmp_path / "model"), model)
    for other in (torch.float32, torch.bfloat16):
        loaded = load_pretrained(tmp_path / "model", dtype=other)
        assert_same_weights(loaded, random_model(MLA).to(dtype).to(other))
        assert loaded.rotary.frequencies.dtype == torch.float32
        assert torch.isfinite(loaded(torch.arange(9)[None]).logits).all()


def test_type_comes_from_the_configuration_or_else_from_the_tensors(tmp_path):
    save_pretrained(random_model(MLA).to(torch.bfloat16), tmp_path)
    assert load_pretrained(tmp_path).norm.weight.dtype == torch.bfloat16
    edit_config(tmp_path, torch_dtype=None)
    assert load_pretrained(tmp_path).norm.weight.dtype == torch.bfloat16
    rewrite(tmp_path, lambda t: {n: v.float() if n == "model.norm.weight" else v for n, v in t.items()})
    assert {p.dtype for p in load_pretrained(tmp_path).parameters()} == {torch.float32}
    edit_config(tmp_path, dtype="float16")  # as transformers 5 names it
    assert {p.dtype for p in load_pretrained(tmp_path).parameters()} == {torch.float16}


def test_own_settings_survive(tmp_path):
    cfg = MLA.replace(seq_aux=False, aux_loss_alpha=0.007, norm_topk_prob=True, initializer_range=0.006)
    save_pretrained(random_model(cfg), tmp_path)
    assert load_pretrained(tmp_path).cfg == cfg
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_tokenizer_is_found_again(tmp_path):
    data = pytest.importorskip("dsv2.data")
    model = random_model(MLA.replace(vocab_size=data.ByteTokenizer.vocab_size))
    model.tokenizer = data.ByteTokenizer()
    save_pretrained(model, tmp_path / "bytes")
    assert isinstance(load_pretrained(tmp_path / "bytes").tokenizer, data.ByteTokenizer)
    # A larger vocabulary is bytes only where the directory says so.
    padded = random_model(MLA.replace(vocab_size=301))
    save_pretrained(padded, tmp_path / "padded")
    assert load_pretrained(tmp_path / "padded").tokenizer is None
    padded.tokenizer = data.ByteTokenizer()
    save_pretrained(padded, tmp_path / "padded")
    assert isinstance(load_pretrained(tmp_path / "padded").tokenizer, data.ByteTokenizer)


def test_a_checkpoints_own_tokenizer_goes_with_it(tmp_path):
    pytest.importorskip("dsv2.data")
    tokenizers = pytest.importorskip("tokenizers")
    save_pretrained(random_model(MLA), tmp_path / "a")
    words = {w: i for i, w in enumerate(["<bos>", "<eos>", "<pad>", "expert", "latent"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    made.save(str(tmp_path / "a" / "tokenizer.json"))
    model = load_pretrained(tmp_path / "a")
    assert model.tokenizer.encode("latent") == [4]
    save_pretrained(model, tmp_path / "b")
    assert load_pretrained(tmp_path / "b").tokenizer.encode("expert") == [3]
    save_pretrained(model, tmp_path / "a")  # onto itself
    assert load_pretrained(tmp_path / "a").tokenizer.encode("expert") == [3]


def test_shared_and_strided_parameters_are_written_whole(tmp_path):
    model = random_model(MLA)
    with torch.no_grad():
        w_o = model.layers[1].attention.w_o
        w_o.weight = torch.nn.Parameter(w_o.weight.T.contiguous().T)
        assert not w_o.weight.is_contiguous()
        model.layers[2].attention.w_o.weight = w_o.weight
    save_pretrained(model, tmp_path)
    assert_same_weights(load_pretrained(tmp_path), model)


def test_state_dict_replaces_the_models_weights(tmp_path):
    averaged = random_model(MLA, seed=1).state_dict()
    save_pretrained(random_model(MLA), tmp_path / "a", state_dict=averaged)
    assert_same_weights(load_pretrained(tmp_path / "a"), random_model(MLA, seed=1))
    del averaged["layers.1.attention.w_uk"]
    with pytest.raises(ValueError, match=r"lacks 1 parameters: layers\.1\.attention\.w_uk"):
        save_pretrained(random_model(MLA), tmp_path / "b", state_dict=averaged)
    assert not (tmp_path / "b").exists()


def test_a_loaded_model_trains(tmp_path):
    save_pretrained(random_model(MLA), tmp_path)
    model = load_pretrained(tmp_path).train()
    out = model(torch.arange(12)[None])
    (out.logits.logsumexp(-1).mean() + out.balance_loss).backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------------------------------- with transformers


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", minversion="5.15", reason="needs transformers >= 5.15")


def reference(transformers, cfg: DSV2Config, seed: int = 3):
    """transformers' own model for `cfg`, with its default random weights made larger."""
    torch.manual_seed(seed)
    fields = cfg.to_hf()
    model = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**fields)).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.3)
    return model


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("original", [True, False], ids=["per_expert", "fused"])
@pytest.mark.parametrize("name", ["mla", "lite", "tied"])
def test_transformers_writes_and_we_read(tmp_path, transformers, name, original, shard):
    theirs = reference(transformers, CONFIGS[name])
    theirs.save_pretrained(tmp_path, save_original_format=original, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shard == "5GB"
    ours = load_pretrained(tmp_path)
    assert ours.cfg == CONFIGS[name]
    in_memory = dict(theirs.named_parameters())
    for name_there, stored in checkpoint_layout(ours.cfg, fused_experts=True).items():
        seen = in_memory[name_there].detach().view(stored.view or stored.shape)
        for part in stored.parts:
            assert torch.equal(dict(ours.named_parameters())[part.parameter][part.region], seen[part.rows])
    tokens = torch.arange(23).view(1, -1)
    with torch.no_grad():
        assert (ours(tokens).logits - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
@pytest.mark.parametrize("name", ["mla", "lite", "tied", "dense"])
def test_we_write_and_transformers_reads(tmp_path, transformers, name, max_shard_bytes):
    """No missing or unexpected keys, the same logits, and written anew the same tensors on disk."""
    ours = random_model(CONFIGS[name])
    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32 and theirs.generation_config.eos_token_id == 2
    tokens = torch.arange(23).view(1, -1)
    with torch.no_grad():
        assert (ours(tokens).logits - theirs.eval()(tokens).logits).abs().max() < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    on_disk = [
        {k: v for file in (tmp_path / which).glob("*.safetensors") for k, v in load_file(file).items()}
        for which in ("ours", "theirs")
    ]
    assert set(on_disk[0]) == set(on_disk[1]) == set(hf_tensor_names(ours.cfg))
    assert all(torch.equal(on_disk[0][key], on_disk[1][key]) for key in on_disk[0])
    assert load_pretrained(tmp_path / "theirs").cfg == ours.cfg  # our own settings travel through theirs


def test_transformers_keeps_bfloat16(tmp_path, transformers):
    save_pretrained(random_model(MLA).to(torch.bfloat16), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "again")
    assert load_pretrained(tmp_path / "again").embed.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------ directories made by others

V2_LITE_CONFIG = {  # fields of the released config.json, in transformers 4's spelling, integers included
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 38,
    "kv_lora_rank": 18,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 11,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 3,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
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
    "v_head_dim": 8,
    "vocab_size": 61,
}


@pytest.fixture
def released(tmp_path):
    """A directory laid out as the released V2-Lite: v4 config, four shards with six digits, bf16."""
    cfg = DSV2Config.from_hf(V2_LITE_CONFIG)
    model = random_model(cfg).to(torch.bfloat16)
    save_pretrained(model, tmp_path / "flat")
    tensors = list(load_file(tmp_path / "flat/model.safetensors").items())
    weight_map = {}
    for shard in range(4):
        file = f"model-{shard + 1:05d}-of-000004.safetensors"
        save_file(dict(tensors[shard::4]), tmp_path / file, metadata={"format": "pt"})
        weight_map.update({name: file for name, _ in tensors[shard::4]})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(V2_LITE_CONFIG))
    shutil.rmtree(tmp_path / "flat")
    return tmp_path, model


def test_the_released_layout(released):
    directory, model = released
    loaded = load_pretrained(directory)
    assert loaded.cfg.eos_token_id == 2 and loaded.cfg.rope_scaling.factor == 40
    assert_same_weights(loaded, model)


def test_hub_caches_link_their_files(released, tmp_path_factory):
    directory, model = released
    snapshot = tmp_path_factory.mktemp("snapshot")
    try:
        for file in directory.iterdir():
            (snapshot / file.name).symlink_to(file)
    except OSError:
        pytest.skip("links need a privilege here")
    assert_same_weights(load_pretrained(snapshot), model)


def test_rotary_tables_of_old_exports_are_ignored(released):
    directory, model = released
    file = "model-00001-of-000004.safetensors"
    rewrite(directory, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, file)
    assert_same_weights(load_pretrained(directory), model)


def test_a_stale_copy_in_another_shard_is_not_read(released):
    directory, model = released
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    other = next(file for file in sorted(set(weight_map.values())) if file != weight_map[name])
    rewrite(directory, lambda t: {**t, name: torch.zeros(24, dtype=torch.bfloat16)}, other)
    assert_same_weights(load_pretrained(directory), model)


def test_a_tied_head_may_be_stored_again_but_not_differ(tmp_path):
    model = random_model(CONFIGS["tied"])
    save_pretrained(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert_same_weights(load_pretrained(tmp_path), model)
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_pretrained(tmp_path)


def test_shared_experts_of_width_zero(tmp_path):
    """transformers stores networks without rows where n_shared_experts is 0."""
    model = random_model(CONFIGS["no_shared"])
    save_pretrained(model, tmp_path)
    rewrite(
        tmp_path, lambda t: {**t, "model.layers.1.mlp.shared_experts.gate_proj.weight": torch.empty(0, 24)}
    )
    assert_same_weights(load_pretrained(tmp_path), model)


# ----------------------------------------------------------------------------------------------------- memory


def test_one_tensor_is_on_its_way_at_a_time(tmp_path, monkeypatch):
    """Counted: of what was read from the files, never more than one tensor is alive."""
    save_pretrained(random_model(MLA), tmp_path, max_shard_bytes=9_000)
    alive: dict[int, int] = {}
    most = 0

    class Counting:
        def __init__(self, opened):
            self.opened = opened

        def __enter__(self):
            self.opened.__enter__()
            return self

        def __exit__(self, *error):
            return self.opened.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.opened, name)

        def get_tensor(self, name):
            nonlocal most
            tensor = self.opened.get_tensor(name)
            alive[id(tensor)] = tensor.nbytes
            weakref.finalize(tensor, alive.pop, id(tensor))
            most = max(most, len(alive))
            return tensor

    monkeypatch.setattr(hf, "safe_open", lambda *a, **k: Counting(safe_open(*a, **k)))
    for dtype in (None, torch.bfloat16):
        load_pretrained(tmp_path, dtype=dtype)
    assert most == 1 and not alive


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from /proc")
def test_peak_memory_is_the_model_and_a_little(tmp_path):
    """Resident memory, sampled every millisecond in a fresh process, stays under 1.35 models.

    The model has 120 MB in 8 shards. The bound is the model, the pages of one shard (0.125), and 28 MB for
    what else a process does meanwhile. Reading all shards before copying would take 2 models.
    """
    cfg = MLA.replace(vocab_size=2048, hidden_size=1024, moe_intermediate_size=512)
    save_pretrained(DeepSeekV2(cfg), tmp_path, max_shard_bytes=16_000_000)
    assert len(list(tmp_path.glob("*.safetensors"))) >= 8
    program = """
        import os, sys, threading, time
        import torch
        from dsv2 import hf

        def resident():
            with open("/proc/self/statm") as fields:
                return int(fields.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        def sample():
            while running:
                peak[0] = max(peak[0], resident())
                time.sleep(0.001)

        hf.save_pretrained(hf.DeepSeekV2(hf.DSV2Config.preset("tiny")), sys.argv[2])
        hf.load_pretrained(sys.argv[2])  # what is imported on first use is not counted
        before, peak, running = resident(), [0], True
        thread = threading.Thread(target=sample)
        thread.start()
        model = hf.load_pretrained(sys.argv[1])
        running = False
        thread.join()
        print(sum(p.nbytes for p in model.parameters()), max(peak[0], resident()) - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(tmp_path / "warm")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model, peak = map(int, done.stdout.split())
    assert model > 110e6
    assert peak < 1.35 * model, f"{peak / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB"


def test_a_model_that_does_not_fit_is_refused_before_anything_is_allocated(tmp_path, monkeypatch):
    save_pretrained(random_model(MLA), tmp_path)
    monkeypatch.setattr(hf, "available_memory", lambda: 50_000)
    monkeypatch.setattr(hf, "DeepSeekV2", lambda cfg: pytest.fail("the model was built"))
    needs = r"needs 111\.6 KB on cpu \(27,888 parameters in float32\) and 50\.0 KB are free; "
    with pytest.raises(ValueError, match=f"{needs}it takes a machine with .*in bfloat16: 55.8 KB"):
        load_pretrained(tmp_path)
    monkeypatch.setattr(hf, "available_memory", lambda: 60_000)
    with pytest.raises(ValueError, match=r"60\.0 KB are free; try dtype=torch.bfloat16 \(needs 55\.8 KB\)"):
        load_pretrained(tmp_path)
    monkeypatch.setattr(hf, "available_memory", lambda: 112_000)
    with pytest.raises(ValueError, match=r"of main memory while it is loaded, 11\.7 KB of it for the tensor"):
        load_pretrained(tmp_path)


def plant_gpus(monkeypatch, *free: int, held: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index or 0], 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held + 7_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7_000)


def test_too_little_memory_is_answered_with_what_would_help(monkeypatch):
    """V2-Lite: 62.8 GB in float32, 31.4 GB in bfloat16, 31,104 bytes of cache a token there."""
    lite, gb = DSV2Config.preset("lite"), 10**9
    plant_gpus(monkeypatch)

    def asked(free, *arguments, **options):
        monkeypatch.setattr(hf, "available_memory", lambda: free)
        return hf.require_memory(lite, *arguments, name="Lite", **options)

    said = asked(40 * gb, torch.bfloat16)
    assert said == "Lite needs 31.4 GB on cpu (15,706,484,224 parameters in bfloat16); 40.0 GB are free"
    assert asked(None, torch.float32).endswith("how much is free is unknown")
    assert "meta" in hf.require_memory(lite, torch.float32, "meta")
    with pytest.raises(ValueError, match=r"try dtype=torch\.bfloat16 \(needs 31\.4 GB\)$"):
        asked(40 * gb, torch.float32)
    with pytest.raises(ValueError, match=r"a machine with 31\.4 GB of free memory: nothing here has"):
        asked(30 * gb, torch.bfloat16)
    with pytest.raises(ValueError, match=r"32\.4 GB on .*1\.0 GB of it for the cache.* a shorter context"):
        asked(32 * gb, torch.bfloat16, context=32_768)
    assert asked(33 * gb, torch.bfloat16, context=32_768)
    with pytest.raises(ValueError, match="fewer texts at once"):
        asked(33 * gb, torch.bfloat16, context=32_768, batch=2)

    plant_gpus(monkeypatch, 20 * gb, 80 * gb)
    with pytest.raises(ValueError, match=r"; try device='cuda:1' \(80\.0 GB free\)$"):
        asked(30 * gb, torch.bfloat16)
    with pytest.raises(ValueError, match=r"device='cpu' with dtype=torch.bfloat16 \(40\.0 GB free\), or dev"):
        asked(40 * gb, torch.float32, "cuda:0")
    assert asked(0, torch.bfloat16, "cuda:1")
    plant_gpus(monkeypatch, 30 * gb, held=2 * gb)
    assert asked(0, torch.bfloat16, "cuda").endswith("; 32.0 GB are free"), "what PyTorch holds can be used"


def test_a_gpu_that_is_too_small_is_refused_before_anything_is_allocated(tmp_path, monkeypatch):
    save_pretrained(random_model(MLA), tmp_path)
    plant_gpus(monkeypatch, 50_000)
    monkeypatch.setattr(hf, "_usable_device", torch.device)
    monkeypatch.setattr(hf, "DeepSeekV2", lambda cfg: pytest.fail("the model was built"))
    with pytest.raises(ValueError, match=r"on cuda .* and 50\.0 KB are free; try device='cpu'"):
        load_pretrained(tmp_path, device="cuda")


def test_a_large_model_says_what_it_needs_before_it_is_loaded(tmp_path, monkeypatch, capsys):
    save_pretrained(random_model(MLA), tmp_path)
    load_pretrained(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(hf, "_QUIET_BELOW", 1000)
    load_pretrained(tmp_path, dtype=torch.bfloat16)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(f"{tmp_path} needs 55.8 KB on cpu (27,888 parameters in bfloat16); ")


def group(folder: Path, limit: object, used: int, files: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for name, value in zip(names, (f"{limit}\n", f"{used}\n")):
        (folder / name).write_text(value, encoding="ascii")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {files}\nfile 9\n", encoding="ascii")


def test_the_limit_of_a_container_counts(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/job/step\n", encoding="ascii")
    assert hf._free_in_groups(root, tmp_path / "missing") is None
    group(root / "job/step", "max", 100, 0)
    assert hf._free_in_groups(root, own) is None
    group(root / "job", 1000, 700, 250)
    assert hf._free_in_groups(root, own) == 550, "what files take is given back when it is needed"
    group(root / "job/step", 600, 300, 0)
    assert hf._free_in_groups(root, own) == 300, "the tightest limit counts"
    group(root, 200, 150, 0)
    assert hf._free_in_groups(root, tmp_path / "missing") == 50, "inside a container its limit is the root's"
    group(root, 200, 250, 0)
    assert hf._free_in_groups(root, own) == 0


def test_the_limit_of_a_container_of_version_1_counts(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("9:cpu:/docker/1\n4:memory:/docker/1\n0::/\n", encoding="ascii")
    group(root / "memory", 9223372036854771712, 4000, 0, version=1)
    assert hf._free_in_groups(root, own) > 2**62
    group(root / "memory/docker/1", 5000, 4500, 1000, version=1)
    assert hf._free_in_groups(root, own) == 1500


def test_available_memory_is_plausible():
    free = hf.available_memory()
    assert free is None or 2**20 < free < 2**50


def test_devices_and_types_that_cannot_be_used(tmp_path):
    save_pretrained(random_model(MLA), tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda' cannot be used here"):
            load_pretrained(tmp_path, device="cuda")
    with pytest.raises(ValueError, match="device='abacus' cannot be used here"):
        load_pretrained(tmp_path, device="abacus")
    with pytest.raises(ValueError, match=r"dtype=torch.int8 must be one of"):
        load_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save_pretrained(random_model(MLA), tmp_path, max_shard_bytes=0)


# -------------------------------------------------------------------------------------------------- replacing


def test_replacing_leaves_no_stale_shards_and_keeps_other_files(tmp_path):
    target = tmp_path / "model"
    save_pretrained(random_model(MLA), target, max_shard_bytes=3_000)
    (target / "notes.md").write_text("kept")
    (target / "runs").mkdir()
    (target / "runs" / "metrics.jsonl").write_text("{}")
    (target / "notes.md").chmod(0o444)
    save_pretrained(random_model(MLA, seed=1), target)
    names = sorted(p.name for p in target.iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "notes.md", "runs"]
    assert (target / "runs" / "metrics.jsonl").read_text() == "{}"
    assert_same_weights(load_pretrained(target), random_model(MLA, seed=1))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="neither empty nor a checkpoint"):
        save_pretrained(random_model(MLA), tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        save_pretrained(random_model(MLA), tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_saving_through_a_link_and_into_new_folders(tmp_path):
    save_pretrained(random_model(MLA), tmp_path / "a" / "b" / "c")
    try:
        (tmp_path / "latest").symlink_to(tmp_path / "a" / "b" / "c")
    except OSError:
        pytest.skip("links need a privilege here")
    save_pretrained(random_model(MLA, seed=1), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert_same_weights(load_pretrained(tmp_path / "a/b/c"), random_model(MLA, seed=1))


class Killed(BaseException):
    pass


def die_at(monkeypatch, call: int) -> list[str]:
    """Let the process die at the n-th step that touches the disk: from then on no step happens any more."""
    steps: list[str] = []
    places = [
        (os, "rename"),
        (os, "fsync"),
        (os, "link"),
        (shutil, "rmtree"),
        (shutil, "copy2"),
        (shutil, "copytree"),
        (hf, "save_file"),
        (hf, "_write_json"),
        (Path, "mkdir"),
    ]
    for where, name in places:
        original = getattr(where, name)

        def step(*args, original=original, name=name, **kwargs):
            steps.append(name)
            if len(steps) >= call:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, step)
    return steps


@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_any_step_there_is_a_whole_checkpoint(tmp_path, existing):
    """Before the swap the old model is there, after it the new one; and the next save works."""
    old, new = random_model(MLA), random_model(MLA, seed=1)
    outcomes, call, between_renames = [], 0, 0
    while True:
        call += 1
        target = tmp_path / f"{call}" / "model"
        target.parent.mkdir()
        if existing:
            save_pretrained(old, target, max_shard_bytes=9_000)
            (target / "notes.md").write_text("kept")
        with pytest.MonkeyPatch.context() as patch:
            steps = die_at(patch, call)
            try:
                save_pretrained(new, target, max_shard_bytes=9_000)
                finished = True
            except Killed:
                finished = False
        if existing or finished or target.exists():
            if not target.exists():
                between_renames += 1
                with pytest.warns(UserWarning, match="cut short"):
                    loaded = load_pretrained(target)
            else:
                loaded = load_pretrained(target)
            is_new = torch.equal(loaded.embed.weight, new.embed.weight)
            assert_same_weights(loaded, new if is_new else old)
            outcomes.append(is_new)
        else:
            with pytest.raises(FileNotFoundError, match="no folder"):
                load_pretrained(target)
            outcomes.append(False)
        save_pretrained(new, target)
        assert_same_weights(load_pretrained(target), new)
        if existing:
            assert (target / "notes.md").read_text() == "kept"
        assert [p.name for p in target.parent.iterdir()] == ["model"]
        if finished:
            break
    assert outcomes == sorted(outcomes) and outcomes[-1] and not outcomes[0], "old, old, ..., new, new"
    assert between_renames == existing
    assert len(outcomes) > 10 and {"rename", "save_file", "fsync"} <= set(steps)


def test_an_error_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    target = tmp_path / "model"
    save_pretrained(random_model(MLA), target)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_pretrained(random_model(MLA, seed=1), target)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert_same_weights(load_pretrained(target), random_model(MLA))


# ---------------------------------------------------------------------------------------------- command line


def test_help_states_what_the_released_models_need(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "31.4 GB (DeepSeek-V2-Lite) and 471.5 GB (DeepSeek-V2) of memory" in said


def test_command_line_describes_and_converts(tmp_path, capsys):
    model = random_model(MLA)
    save_pretrained(model, tmp_path / "a", max_shard_bytes=9_000)
    assert main([str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert f"{model.num_parameters():,}" in said and "float32 on disk" in said and "mla, 3 heads" in said
    assert main([str(tmp_path / "a"), "--convert", str(tmp_path / "b"), "--dtype", "bf16"]) == 0
    assert_same_weights(load_pretrained(tmp_path / "b"), model.to(torch.bfloat16))
    assert main([str(tmp_path / "missing")]) == 1
    assert "error: no folder" in capsys.readouterr().err


def test_large_files_show_their_progress(tmp_path, capsys, monkeypatch):
    save_pretrained(random_model(MLA), tmp_path)
    load_pretrained(tmp_path)
    assert "Loading" not in capsys.readouterr().err
    monkeypatch.setattr(hf, "_QUIET_BELOW", 1)
    load_pretrained(tmp_path)
    assert "Loading" in capsys.readouterr().err
