"""Damaged and hostile configurations and checkpoint directories: always a clear error, never code executed.

What may come out is a model, a ValueError or a FileNotFoundError with a message that names the file, the
tensor or the field. Anything else, a crash or an allocation of what a file merely promises, is a failure.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import pickle
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dsv2 import DeepSeekV2, DSV2Config, YarnScaling, hf
from dsv2.hf import INDEX, SINGLE, hf_tensor_names, load_pretrained, save_pretrained
from dsv2.hf.__main__ import main

CFG = DSV2Config(
    vocab_size=31,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=14,
    bos_token_id=1,
    eos_token_id=2,
    q_lora_rank=8,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    rope_scaling=YarnScaling(factor=40.0, original_max_position_embeddings=64),
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=7,
    topk_method="group_limited_greedy",
    n_group=2,
    topk_group=1,
)


def examples(count: int) -> settings:
    """The same `count` examples in every run: a failure found here is a failure found everywhere."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def written(cfg: DSV2Config, **options) -> dict[str, bytes]:
    """The files of a saved model."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(DeepSeekV2(cfg), folder, **options)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def single() -> dict[str, bytes]:
    return written(CFG)


@pytest.fixture(scope="module")
def sharded() -> dict[str, bytes]:
    return written(CFG, max_shard_bytes=6_000)


@pytest.fixture(scope="module")
def baseline() -> dict[str, bytes]:
    return written(CFG.replace(attention="gqa", num_key_value_heads=1))


@contextlib.contextmanager
def folder_of(files: dict[str, bytes], **changed: bytes | None):
    """A directory with these files; None takes one away. (Keys with dots go in through **{...}.)"""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {**files, **changed}.items():
            if content is not None:
                (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def refusal(directory: Path, *named: str, **options) -> str:
    """The message of the ValueError or FileNotFoundError that loading raises; it must name all of `named`."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_pretrained(directory, **options)
    message = str(caught.value)
    for name in (str(directory), *named):
        assert name in message, f"{name!r} is not named in: {message}"
    return message


def loads_or_refuses(directory: Path) -> bool:
    """Whether it loads; otherwise the refusal must be one of the two kinds, and name the directory."""
    try:
        model = load_pretrained(directory)
    except (ValueError, FileNotFoundError) as error:
        assert str(directory) in str(error), f"{type(error).__name__} does not say where: {error}"
        return False
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return True


def header_of(content: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


# ------------------------------------------------------------------------------------------ configurations

HF_FIELDS = CFG.to_hf()
OWN_FIELDS = CFG.to_dict()

numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 10**30, -(10**30), 10**400]),
    st.sampled_from([0.0, 0.5, -1.5, 5e-324, 1e308, math.nan, math.inf, -math.inf]),
)
leaves = st.one_of(
    st.none(), st.booleans(), numbers, st.text(max_size=6), st.sampled_from(["mla", "yarn", "3"])
)
garbage = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw, fields: dict) -> dict:
    """`fields` with one to four of them, also inside objects, replaced, removed or invented."""
    fields = copy.deepcopy(fields)
    for _ in range(draw(st.integers(1, 4))):
        place = fields
        inner = [name for name, value in fields.items() if isinstance(value, dict)]
        if inner and draw(st.integers(0, 3)) == 0:
            place = fields[draw(st.sampled_from(inner))]
        name = draw(st.sampled_from(sorted(place)) if place else st.text(max_size=4))
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "invent"]))
        if action == "remove":
            place.pop(name, None)
        else:
            place[draw(st.text(max_size=8)) if action == "invent" else name] = draw(garbage)
    return fields


def is_small(cfg: DSV2Config) -> bool:
    """Whether a model of this configuration can be built here, on the meta device, in no time."""
    if cfg.num_hidden_layers > 50 or cfg.n_routed_experts > 10_000:
        return False
    return sum(math.prod(shape) for shape in hf_tensor_names(cfg, fused_experts=True).values()) < 2**50


def builds_or_refuses(make, fields: dict) -> None:
    try:
        cfg = make(fields)
    except ValueError as error:
        assert str(error)
        return
    assert isinstance(cfg, DSV2Config) and DSV2Config.from_dict(cfg.to_dict()) == cfg
    json.dumps(cfg.to_dict(), allow_nan=False)
    if is_small(cfg):
        with torch.device("meta"):
            DeepSeekV2(cfg)


@examples(600)
@given(mutated(HF_FIELDS))
def test_any_hugging_face_config_builds_or_is_refused(fields):
    builds_or_refuses(DSV2Config.from_hf, fields)


@examples(300)
@given(mutated(OWN_FIELDS))
def test_any_own_config_builds_or_is_refused(fields):
    builds_or_refuses(DSV2Config.from_dict, fields)


HARD_NUMBERS = [  # of the field, or of the field of rope_scaling
    *[(name, 10**400) for name in ("rope_theta", "aux_loss_alpha", "hidden_size", "factor", "mscale")],
    *[(name, 5e-324) for name in ("rope_theta", "rms_norm_eps", "factor", "beta_slow", "mscale_all_dim")],
    *[(name, 1e308) for name in ("rope_theta", "factor", "beta_fast", "mscale", "mscale_all_dim")],
    ("rope_theta", 10**300),
    ("factor", None),
    ("original_max_position_embeddings", 10**400),
    ("original_max_position_embeddings", 1e308),
]


@pytest.mark.parametrize(("name", "value"), HARD_NUMBERS, ids=lambda value: str(value)[:40])
def test_hard_numbers_in_a_config(single, name, value):
    fields = copy.deepcopy(HF_FIELDS)
    (fields["rope_scaling"] if name in fields["rope_scaling"] else fields)[name] = value
    builds_or_refuses(DSV2Config.from_hf, fields)
    with folder_of(single) as folder:
        (folder / "config.json").write_text(json.dumps(fields))
        loads_or_refuses(folder)


V5_FIELDS = {
    **{name: value for name, value in HF_FIELDS.items() if name not in ("rope_scaling", "rope_theta")},
    "rope_parameters": {**HF_FIELDS["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000.0},
    "dtype": "float32",
}


@examples(300)
@given(mutated(V5_FIELDS))
def test_any_config_of_transformers_5_builds_or_is_refused(fields):
    builds_or_refuses(DSV2Config.from_hf, fields)


@examples(150)
@given(fields=mutated(json.loads(json.dumps({**HF_FIELDS, "torch_dtype": "float32"}))))
def test_any_config_beside_good_weights_loads_or_is_refused(single, fields):
    with folder_of(single, **{"config.json": json.dumps(fields).encode()}) as folder:
        loads_or_refuses(folder)


@examples(150)
@given(data=st.data())
def test_any_own_config_beside_good_weights_loads_or_is_refused(baseline, data):
    fields = data.draw(mutated(json.loads(baseline["config.json"])))
    with folder_of(baseline, **{"config.json": json.dumps(fields).encode()}) as folder:
        loads_or_refuses(folder)


@examples(150)
@given(
    content=st.binary(max_size=40)
    | st.text(max_size=40).map(str.encode)
    | garbage.map(json.dumps).map(str.encode)
)
def test_any_bytes_as_config_are_refused(single, content):
    with folder_of(single, **{"config.json": content}) as folder:
        refusal(folder, "config.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe{}",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"vocab_size": ' + b"9" * 100_000 + b"}",
        b'{"vocab_size": 1e999}',
        b'{"model_type": "\\ud800"}',
        b"null",
        b'{"model_type": ["deepseek_v2"]}',
        b'{"model_type": "llama"}',
    ],
    ids=[
        "empty",
        "utf16",
        "deep list",
        "deep object",
        "long integer",
        "overflow",
        "surrogate",
        "null",
        "list",
        "llama",
    ],
)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_hard_json(sharded, file, content):
    with folder_of(sharded, **{file: content}) as folder:
        refusal(folder, file)


def test_endless_json_is_not_read(single):
    with folder_of(single) as folder:
        with open(folder / "config.json", "wb") as file:
            file.truncate(2**40)  # a hole, which takes no room on the disk
        refusal(folder, "config.json has 1099511627776 bytes")


HUGE = {
    "layers": {"num_hidden_layers": 10**12},
    "layers beyond machine integers": {"num_hidden_layers": 10**40},
    "experts": {"n_routed_experts": 2 * 10**12},
    "vocabulary": {"vocab_size": 2**62},
    "width": {"hidden_size": 10**30},
    "everything": {"hidden_size": 2**40, "vocab_size": 2**40, "intermediate_size": 2**40},
    "many experts in many layers": {"num_hidden_layers": 50_000, "n_routed_experts": 50_000},
}


@pytest.mark.parametrize("name", HUGE)
def test_a_promise_of_a_huge_model_is_refused_before_anything_is_built(single, monkeypatch, name):
    monkeypatch.setattr(hf, "DeepSeekV2", lambda cfg: pytest.fail("the model was built"))
    fields = {**json.loads(single["config.json"]), **HUGE[name]}
    with folder_of(single, **{"config.json": json.dumps(fields).encode()}) as folder:
        message = refusal(folder)
        assert len(message) < 10_000


@pytest.mark.parametrize("name", [n for n in HUGE if n != "experts"])
def test_a_promise_of_a_huge_baseline_is_refused_before_anything_is_built(baseline, monkeypatch, name):
    monkeypatch.setattr(hf, "DeepSeekV2", lambda cfg: pytest.fail("the model was built"))
    fields = {**json.loads(baseline["config.json"]), **HUGE[name]}
    with folder_of(baseline, **{"config.json": json.dumps(fields).encode()}) as folder:
        refusal(folder)


def test_an_honest_model_that_is_too_large_is_refused_before_anything_is_built(single, monkeypatch):
    """The file has the size that its header says, mostly as a hole; memory for it does not exist."""
    free = hf.available_memory()
    if free is None:
        pytest.skip("this system does not say how much memory is free")
    monkeypatch.setattr(hf, "DeepSeekV2", lambda cfg: pytest.fail("the model was built"))
    cfg = CFG.replace(vocab_size=2 * free // (4 * CFG.hidden_size))
    header, end = {}, 0
    for name, shape in hf_tensor_names(cfg).items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    start = with_header(header, b"")
    config = json.dumps(cfg.to_hf()).encode()
    with folder_of(single, **{SINGLE: start, "config.json": config}) as folder:
        try:
            os.truncate(folder / SINGLE, len(start) + end)
        except OSError:
            pytest.skip("the file system has no holes of this size")
        message = refusal(folder)
        assert " GB on cpu" in message or "allocate" in message  # some systems refuse to map it at all


# ------------------------------------------------------------------------------------------- tensor files


def test_truncated_at_every_kind_of_place(single):
    whole = single[SINGLE]
    (length,) = struct.unpack("<Q", whole[:8])
    places = {0, 1, 7, 8, 9, 8 + length // 2, 7 + length, 8 + length, 9 + length, len(whole) - 1}
    places |= set(range(0, len(whole), len(whole) // 60))
    for place in sorted(places):
        with folder_of(single, **{SINGLE: whole[:place]}) as folder:
            refusal(folder, SINGLE)


@pytest.mark.parametrize("extra", [b"\0", b"x" * 4096])
def test_longer_than_its_header_says(single, extra):
    with folder_of(single, **{SINGLE: single[SINGLE] + extra}) as folder:
        refusal(folder, SINGLE)


def test_a_truncated_shard_is_named(sharded):
    shards = sorted(name for name in sharded if name.endswith(".safetensors"))
    assert len(shards) > 3
    for shard in shards:
        with folder_of(sharded, **{shard: sharded[shard][:-3]}) as folder:
            refusal(folder, shard)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_flipped_bit_of_the_header_length(single):
    for bit in range(64):
        with folder_of(single, **{SINGLE: flipped(single[SINGLE], bit)}) as folder:
            refusal(folder, SINGLE)


@examples(400)
@given(data=st.data())
def test_flipped_bits_of_the_header(single, data):
    (length,) = struct.unpack("<Q", single[SINGLE][:8])
    content = single[SINGLE]
    for _ in range(data.draw(st.integers(1, 3))):
        content = flipped(content, data.draw(st.integers(64, 8 * (8 + length) - 1)))
    with folder_of(single, **{SINGLE: content}) as folder:
        loads_or_refuses(folder)


@examples(150)
@given(content=st.binary(max_size=64))
def test_any_bytes_as_tensor_file_are_refused(single, content):
    with folder_of(single, **{SINGLE: content}) as folder:
        refusal(folder, SINGLE)


@examples(150)
@given(data=st.data())
def test_any_json_as_header_loads_or_is_refused(single, data):
    header, body = header_of(single[SINGLE])
    content = with_header(data.draw(mutated(header)), body)
    with folder_of(single, **{SINGLE: content}) as folder:
        loads_or_refuses(folder)


def test_headers_that_lie(single):
    header, body = header_of(single[SINGLE])
    name = "model.norm.weight"
    begin, end = header[name]["data_offsets"]
    lies = {
        "huge shape": {"shape": [2**62]},
        "negative shape": {"shape": [-12]},
        "overflowing shape": {"shape": [2**33, 2**33, 2**33]},
        "offset beyond the file": {"data_offsets": [begin, end + 10**12]},
        "backwards": {"data_offsets": [end, begin]},
        "overlap": {"data_offsets": [0, 48]},
        "unknown type": {"dtype": "F33"},
    }
    for lie in lies.values():
        with folder_of(
            single, **{SINGLE: with_header({**header, name: {**header[name], **lie}}, body)}
        ) as folder:
            refusal(folder, SINGLE)


def changed_tensors(single: dict[str, bytes], change) -> dict[str, bytes]:
    with folder_of(single) as folder:
        tensors = load_file(folder / SINGLE)
        change(tensors)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        return {**single, SINGLE: (folder / SINGLE).read_bytes()}


UNSUITABLE = ["bool", "uint8", "int8", "int16", "int32", "int64", "float8_e4m3fn", "float8_e5m2", "complex64"]


@pytest.mark.parametrize("dtype", UNSUITABLE)
def test_types_that_are_no_weights(single, dtype):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"

    def change(tensors):
        tensors[name] = torch.ones(tensors[name].shape).to(getattr(torch, dtype))

    with folder_of(changed_tensors(single, change)) as folder:
        refusal(folder, name, "not one of F64, F32, F16, BF16")


@pytest.mark.parametrize(
    "said", ["int8", "float8_e4m3fn", "os.system", "", 3, ["float32"], {"": "float32"}, True]
)
def test_types_that_the_config_cannot_mean(single, said):
    fields = {**json.loads(single["config.json"]), "torch_dtype": said}
    with folder_of(single, **{"config.json": json.dumps(fields).encode()}) as folder:
        refusal(folder, "config.json", "dtype")


def test_missing_extra_and_misshapen_tensors_are_listed_together(single):
    def change(tensors):
        del tensors["model.layers.0.self_attn.kv_b_proj.weight"]
        del tensors["model.layers.1.mlp.experts.3.down_proj.weight"]
        tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].T.contiguous()
        tensors["model.layers.2.input_layernorm.weight"] = torch.ones(12)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    with folder_of(changed_tensors(single, change)) as folder:
        message = refusal(folder)
    assert (
        "2 missing: model.layers.0.self_attn.kv_b_proj.weight, model.layers.1.mlp.experts.3.down" in message
    )
    assert "1 extra: model.layers.2.input_layernorm.weight" in message
    assert "model.layers.1.mlp.gate.weight is (12, 4), expected (4, 12)" in message
    assert "lm_head.weight (I8)" in message


def test_long_lists_are_cut(single):
    def change(tensors):
        for name in [n for n in tensors if "experts." in n]:
            tensors[name + "_old"] = tensors.pop(name)

    with folder_of(changed_tensors(single, change)) as folder:
        message = refusal(folder, "15 missing", "15 extra")
    assert message.count("… and 5 more") == 2


def test_mixed_expert_forms_are_refused(single):
    def change(tensors):
        tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.ones(4, 14, 12)

    with folder_of(changed_tensors(single, change)) as folder:
        refusal(folder, "1 missing: model.layers.1.mlp.experts.down_proj", "12 extra")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.norm.weight",
    ],
)
def test_weights_that_are_not_finite(single, name, value):
    def change(tensors):
        tensors[name].view(-1)[-2:] = value

    with folder_of(changed_tensors(single, change)) as folder:
        refusal(folder, SINGLE, f"{name} holds 2 NaN or infinite values")
        load_pretrained(folder, check_finite=False)


def test_weights_that_overflow_in_the_type_asked_for(single):
    def change(tensors):
        tensors["lm_head.weight"][3, 5] = 1e6

    with folder_of(changed_tensors(single, change)) as folder:
        load_pretrained(folder, dtype=torch.bfloat16)
        refusal(folder, "lm_head.weight holds 1 NaN or infinite values", "float16", dtype=torch.float16)


# ------------------------------------------------------------------------------------------ directories


def test_missing_files_are_named(single, sharded):
    with folder_of(single, **{"config.json": None}) as folder:
        refusal(folder, "config.json")
    with folder_of(single, **{SINGLE: None}) as folder:
        refusal(folder, SINGLE, INDEX)
    with folder_of(single) as folder:
        refusal(folder / "nowhere")
        refusal(folder / "config.json", "is a file")
    shards = sorted(name for name in sharded if name.endswith(".safetensors"))
    with folder_of(sharded, **{shards[1]: None}) as folder:
        refusal(folder, f"1 are missing: {shards[1]}")
    with folder_of(sharded, **{INDEX: None}) as folder:
        refusal(folder, SINGLE, INDEX)


def test_things_that_are_not_files(single, sharded):
    for name in ("config.json", SINGLE):
        with folder_of(single, **{name: None}) as folder:
            (folder / name).mkdir()
            refusal(folder, name)
    shard = sorted(name for name in sharded if name.endswith(".safetensors"))[0]
    with folder_of(sharded, **{shard: None}) as folder:
        if hasattr(os, "mkfifo"):
            os.mkfifo(folder / shard)  # to open it would wait for ever
            refusal(folder, shard)


def index_with(sharded: dict[str, bytes], change) -> dict[str, bytes]:
    index = json.loads(sharded[INDEX])
    change(index["weight_map"])
    return {**sharded, INDEX: json.dumps(index).encode()}


OUTSIDE = [
    "../outside.safetensors",
    "/etc/passwd",
    "/outside.safetensors",
    "sub/../../outside.safetensors",
    "sub/inside.safetensors",
    "./model-00001-of-00002.safetensors",
    "..\\outside.safetensors",
    "C:\\outside.safetensors",
    "C:outside.safetensors",
    "\\\\server\\share\\outside.safetensors",
    "a\0b.safetensors",
    "",
    ".",
    "..",
    None,
    7,
    ["model.safetensors"],
    {},
]


@pytest.mark.parametrize("where", OUTSIDE, ids=repr)
def test_shards_outside_the_folder(sharded, where):
    files = index_with(sharded, lambda m: m.update({"model.norm.weight": where}))
    with folder_of(files) as folder:
        outside = folder.parent / "outside.safetensors"
        refusal(folder, INDEX, "model.norm.weight")
        assert not outside.exists()


def test_an_outside_shard_is_refused_though_it_would_fit(sharded):
    shards = sorted(name for name in sharded if name.endswith(".safetensors"))
    with tempfile.TemporaryDirectory() as parent:
        inside = Path(parent) / "model"
        inside.mkdir()
        for name, content in sharded.items():
            (inside / name).write_bytes(content)
        (inside / shards[0]).rename(Path(parent) / shards[0])
        index = json.loads(sharded[INDEX])
        index["weight_map"] = {n: f"../{f}" if f == shards[0] else f for n, f in index["weight_map"].items()}
        (inside / INDEX).write_text(json.dumps(index))
        refusal(inside, INDEX, "without a path")


def test_an_index_that_misplaces_tensors(sharded):
    shards = sorted(name for name in sharded if name.endswith(".safetensors"))
    name = "model.embed_tokens.weight"
    with folder_of(index_with(sharded, lambda m: m.update({name: shards[-1]}))) as folder:
        refusal(folder, shards[-1], name)
    with folder_of(index_with(sharded, lambda m: m.pop(name))) as folder:
        load_pretrained(folder)  # the shard has it, and no other claims to
    with folder_of(index_with(sharded, lambda m: m.update({"model.surprise": shards[0]}))) as folder:
        refusal(folder, "model.surprise")
    with folder_of(index_with(sharded, lambda m: m.clear())) as folder:
        refusal(folder, INDEX, "weight_map")


@examples(150)
@given(data=st.data())
def test_any_index_loads_or_is_refused(sharded, data):
    index = data.draw(mutated(json.loads(sharded[INDEX])) | garbage)
    with folder_of(sharded, **{INDEX: json.dumps(index).encode()}) as folder:
        loads_or_refuses(folder)


@examples(150)
@given(data=st.data())
def test_files_exchanged_for_each_other(sharded, data):
    """Every file holds what some file of the directory held."""
    names = sorted(sharded)
    contents = {name: sharded[data.draw(st.sampled_from(names))] for name in names}
    with folder_of(contents) as folder:
        loads_or_refuses(folder)


# ------------------------------------------------------------------------------------------- no code is run


class Attack:
    """Unpickled, it creates a file."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return open, (str(self.sentinel), "w")


@pytest.fixture
def attack(tmp_path):
    """The sentinel, and the attack as a bare pickle and in both formats of torch.save; each shown to work."""
    sentinel = tmp_path / "executed"
    torch.save({"model.norm.weight": Attack(sentinel)}, tmp_path / "zip")
    torch.save(Attack(sentinel), tmp_path / "legacy", _use_new_zipfile_serialization=False)
    forms = {"bare": pickle.dumps(Attack(sentinel)), "protocol 0": pickle.dumps(Attack(sentinel), protocol=0)}
    forms |= {name: (tmp_path / name).read_bytes() for name in ("zip", "legacy")}
    for name, content in forms.items():
        if name in ("zip", "legacy"):
            torch.load(tmp_path / name, weights_only=False)
        else:
            pickle.loads(content)
        assert sentinel.exists(), f"the {name} attack is harmless: the test would prove nothing"
        sentinel.unlink()
    return sentinel, forms


@pytest.mark.parametrize(
    "file", ["pytorch_model.bin", "model.pt", "weights.pth", "consolidated.ckpt", "model.pkl"]
)
def test_pickles_are_refused_unopened(single, attack, file):
    sentinel, forms = attack
    for content in forms.values():
        with folder_of(single, **{SINGLE: None, file: content}) as folder:
            refusal(folder, file, "is a pickle", "runs whatever code", "save_pretrained")
    assert not sentinel.exists()


def test_sharded_pickles_are_refused_unopened(single, attack):
    sentinel, forms = attack
    index = json.dumps({"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}).encode()
    shard = {"pytorch_model-00001-of-00001.bin": forms["zip"], SINGLE: None}
    for name in (INDEX, "pytorch_model.bin.index.json"):
        with folder_of(single, **shard, **{name: index}) as folder:
            refusal(folder, "is a pickle")
    assert not sentinel.exists()


def test_pickles_under_the_names_of_other_files(single, sharded, attack):
    sentinel, forms = attack
    shard = sorted(name for name in sharded if name.endswith(".safetensors"))[0]
    for name, content in forms.items():
        with folder_of(single, **{SINGLE: content}) as folder:
            message = refusal(folder, SINGLE)
            assert "is a pickle" in message or name == "protocol 0"
        with folder_of(sharded, **{shard: content}) as folder:
            refusal(folder, shard)
        for other in ("config.json", INDEX):
            with folder_of(sharded, **{other: content}) as folder:
                refusal(folder, other)
        with folder_of(single, **{"generation_config.json": content, "training_args.bin": content}) as folder:
            load_pretrained(folder)  # neither is read
    assert not sentinel.exists()


def test_a_damaged_tokenizer_is_refused(single, attack):
    sentinel, forms = attack
    pytest.importorskip("tokenizers")
    for content in (*forms.values(), b"", b"{}", b"[1, 2"):
        with folder_of(single, **{"tokenizer.json": content}) as folder:
            refusal(folder, "tokenizer.json")
    assert not sentinel.exists()


def test_code_beside_the_weights_is_not_imported(single, tmp_path):
    """Hub directories may carry modelling code, named by auto_map; nothing here looks at it."""
    sentinel = tmp_path / "executed"
    code = f"open({str(sentinel)!r}, 'w')".encode()
    auto_map = {"AutoConfig": "modeling_deepseek.Config", "AutoModelForCausalLM": "modeling_deepseek.Model"}
    fields = {**json.loads(single["config.json"]), "auto_map": auto_map, "trust_remote_code": True}
    scripts = dict.fromkeys(("modeling_deepseek.py", "setup.py", "sitecustomize.py", "conftest.py"), code)
    with folder_of(single, **{"config.json": json.dumps(fields).encode()}, **scripts) as folder:
        load_pretrained(folder)
        assert main([str(folder)]) == 0
    assert not sentinel.exists()


def test_the_package_never_unpickles(single, sharded, monkeypatch):
    """Loading and saving work with every way to unpickle taken away."""

    def forbidden(*args, **kwargs):
        pytest.fail("something was unpickled")

    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(pickle, "load", forbidden)
    monkeypatch.setattr(pickle, "loads", forbidden)
    monkeypatch.setattr(pickle, "Unpickler", forbidden)
    for files in (single, sharded):
        with folder_of(files) as folder:
            save_pretrained(load_pretrained(folder), folder)


def test_the_command_line_says_what_is_wrong(single, capsys):
    with folder_of(single, **{SINGLE: single[SINGLE][:99]}) as folder:
        assert main([str(folder)]) == 1
        assert SINGLE in capsys.readouterr().err
