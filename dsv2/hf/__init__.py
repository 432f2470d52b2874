"""Checkpoints in Hugging Face's DeepSeek-V2 format: read, written, inspected. safetensors and JSON only.

What the tensors are called (`i` a layer, `e` an expert; the paper's symbols are in `dsv2.__init__`):

    on disk, model.layers.i.                here, layers.i.
    input_layernorm.weight                  attention_norm.weight
    self_attn.q_proj.weight                 attention.w_q.weight          (no q_lora_rank)
    self_attn.q_a_proj.weight               attention.w_dq.weight         (with q_lora_rank)
    self_attn.q_a_layernorm.weight          attention.q_norm.weight
    self_attn.q_b_proj.weight               attention.w_uq.weight
    self_attn.kv_a_proj_with_mqa.weight     attention.w_dkv.weight        rows: latent C, then rotary key R
    self_attn.kv_a_layernorm.weight         attention.kv_norm.weight
    self_attn.kv_b_proj.weight              attention.w_uk, attention.w_uv seen as (H, N + V, C): per head the
                                                                          N rows of W^UK, then the V of W^UV
    self_attn.o_proj.weight                 attention.w_o.weight
    post_attention_layernorm.weight         ffn_norm.weight
    mlp.gate_proj.weight, up_proj           ffn.w_gate_up.weight          gate's rows, then up's
    mlp.down_proj.weight                    ffn.w_down.weight
    mlp.gate.weight                         ffn.router.weight             row e: the centroid of expert e
    mlp.experts.e.gate_proj.weight, up_proj ffn.experts.w_gate_up[e]      gate's rows, then up's
    mlp.experts.e.down_proj.weight          ffn.experts.w_down[e]
    mlp.experts.gate_up_proj, down_proj     ffn.experts.w_gate_up, w_down (fused form of the three above)
    mlp.shared_experts.*                    ffn.shared.*                  as mlp.*

    model.embed_tokens.weight, model.norm.weight, lm_head.weight  ->  embed.weight, norm.weight, head.weight

The attention baselines (MHA, GQA, MQA) and the routers of other papers have no form there: the directories of
such models carry our own names.

Source: github.com/deepseek-ai/DeepSeek-V2 and the checkpoints that transformers 4 and 5 write.
"""

# D hidden_size   H heads   C kv_lora_rank   R qk_rope_head_dim   N qk_nope_head_dim   V v_head_dim
# E routed experts   I moe_intermediate_size

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dsv2.config import DSV2Config
from dsv2.model import DeepSeekV2

if TYPE_CHECKING:
    from dsv2.accounting import Memory

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OWN_MODEL_TYPE = "dsv2"  # of directories with our own tensor names

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # on command lines
_FLOAT_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS.values()}
_LARGEST_JSON = 64 * 2**20  # bytes; the index of the 236B model has about 3 MB
_LARGEST_HEADER = 100_000_000  # bytes, of a safetensors file
_REMAP_AFTER = 2**30  # bytes read from a mapped file before it is mapped anew, which frees its pages
_QUIET_BELOW = 10**9  # bytes that load without a progress bar


# ----------------------------------------------------------------------------------- names on disk and here


@dataclass(frozen=True)
class Part:
    """`rows` of a stored tensor are `region` of our `parameter`; () is all of it."""

    parameter: str
    region: tuple[int | slice, ...] = ()
    rows: tuple[int | slice, ...] = ()


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: its shape there, the shape to see it in (None: the same), and where it belongs."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    view: tuple[int, ...] | None = None


def checkpoint_layout(cfg: DSV2Config, fused_experts: bool = False) -> dict[str, Stored]:
    """Every tensor of a checkpoint of `cfg`, by its name on disk, in the order it is written.

    fused_experts: all experts of a layer in two tensors, as transformers 5 holds them in memory.
    """
    return dict(_layout(cfg, fused_experts))


def hf_tensor_names(cfg: DSV2Config, fused_experts: bool = False) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of `cfg` has on disk (V2-Lite: 5,291; V2: 29,102)."""
    return {name: stored.shape for name, stored in _layout(cfg, fused_experts)}


def _layout(cfg: DSV2Config, fused_experts: bool) -> Iterator[tuple[str, Stored]]:
    own, d = not cfg.has_hf_form, cfg.hidden_size
    trunk = "" if own else "model."
    yield _whole(f"{trunk}{'embed' if own else 'embed_tokens'}.weight", "embed.weight", cfg.vocab_size, d)
    for i in range(cfg.num_hidden_layers):
        here, there = f"layers.{i}", f"{trunk}layers.{i}"
        if own:
            yield from _own_layer(cfg, i, here)
            continue
        yield _whole(f"{there}.input_layernorm.weight", f"{here}.attention_norm.weight", d)
        yield from _attention(cfg, f"{there}.self_attn", f"{here}.attention")
        yield _whole(f"{there}.post_attention_layernorm.weight", f"{here}.ffn_norm.weight", d)
        if cfg.is_moe_layer(i):
            yield from _experts(cfg, fused_experts, f"{there}.mlp", f"{here}.ffn")
        else:
            yield from _swiglu(f"{there}.mlp", f"{here}.ffn", d, cfg.intermediate_size)
    yield _whole(f"{trunk}norm.weight", "norm.weight", d)
    if not cfg.tie_word_embeddings:
        yield _whole("head.weight" if own else "lm_head.weight", "head.weight", cfg.vocab_size, d)


def _whole(name: str, parameter: str, *shape: int) -> tuple[str, Stored]:
    return name, Stored(shape, (Part(parameter),))


def _attention(cfg: DSV2Config, there: str, here: str) -> Iterator[tuple[str, Stored]]:
    d, heads, latent = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank
    nope, v = cfg.qk_nope_head_dim, cfg.v_head_dim
    if cfg.q_lora_rank is None:
        yield _whole(f"{there}.q_proj.weight", f"{here}.w_q.weight", heads * cfg.qk_head_dim, d)
    else:
        rank = cfg.q_lora_rank
        yield _whole(f"{there}.q_a_proj.weight", f"{here}.w_dq.weight", rank, d)
        yield _whole(f"{there}.q_a_layernorm.weight", f"{here}.q_norm.weight", rank)
        yield _whole(f"{there}.q_b_proj.weight", f"{here}.w_uq.weight", heads * cfg.qk_head_dim, rank)
    kv_rows = latent + cfg.qk_rope_head_dim
    yield _whole(f"{there}.kv_a_proj_with_mqa.weight", f"{here}.w_dkv.weight", kv_rows, d)
    yield _whole(f"{there}.kv_a_layernorm.weight", f"{here}.kv_norm.weight", latent)
    yield (
        f"{there}.kv_b_proj.weight",
        Stored(
            shape=(heads * (nope + v), latent),
            view=(heads, nope + v, latent),
            parts=(
                Part(f"{here}.w_uk", rows=(slice(None), slice(nope))),
                Part(f"{here}.w_uv", rows=(slice(None), slice(nope, None))),
            ),
        ),
    )
    yield _whole(f"{there}.o_proj.weight", f"{here}.w_o.weight", d, heads * v)


def _swiglu(there: str, here: str, d: int, width: int) -> Iterator[tuple[str, Stored]]:
    gate, up = slice(width), slice(width, None)
    yield f"{there}.gate_proj.weight", Stored((width, d), (Part(f"{here}.w_gate_up.weight", (gate,)),))
    yield f"{there}.up_proj.weight", Stored((width, d), (Part(f"{here}.w_gate_up.weight", (up,)),))
    yield _whole(f"{there}.down_proj.weight", f"{here}.w_down.weight", d, width)


def _experts(cfg: DSV2Config, fused: bool, there: str, here: str) -> Iterator[tuple[str, Stored]]:
    d, experts, width = cfg.hidden_size, cfg.n_routed_experts, cfg.moe_intermediate_size
    gate_up, down = f"{here}.experts.w_gate_up", f"{here}.experts.w_down"
    yield _whole(f"{there}.gate.weight", f"{here}.router.weight", experts, d)
    if fused:
        yield _whole(f"{there}.experts.gate_up_proj", gate_up, experts, 2 * width, d)
        yield _whole(f"{there}.experts.down_proj", down, experts, d, width)
    for e in range(0 if fused else experts):
        one = f"{there}.experts.{e}"
        yield f"{one}.gate_proj.weight", Stored((width, d), (Part(gate_up, (e, slice(width))),))
        yield f"{one}.up_proj.weight", Stored((width, d), (Part(gate_up, (e, slice(width, None))),))
        yield f"{one}.down_proj.weight", Stored((d, width), (Part(down, (e,)),))
    if cfg.n_shared_experts:
        yield from _swiglu(f"{there}.shared_experts", f"{here}.shared", d, cfg.n_shared_experts * width)


def _own_layer(cfg: DSV2Config, i: int, here: str) -> Iterator[tuple[str, Stored]]:
    """A layer of a model that has no Hugging Face form: our own names on disk too."""
    d = cfg.hidden_size
    attention = _own_mla(cfg) if cfg.attention == "mla" else _own_baseline(cfg)
    shapes = {
        "attention_norm.weight": (d,),
        **{f"attention.{name}": shape for name, shape in attention.items()},
        "ffn_norm.weight": (d,),
    }
    if not cfg.is_moe_layer(i):
        shapes["ffn.w_gate_up.weight"] = (2 * cfg.intermediate_size, d)
        shapes["ffn.w_down.weight"] = (d, cfg.intermediate_size)
    else:
        experts, width = cfg.n_routed_experts, cfg.moe_intermediate_size
        shapes["ffn.router.weight"] = (experts, d)
        shapes["ffn.experts.w_gate_up"] = (experts, 2 * width, d)
        shapes["ffn.experts.w_down"] = (experts, d, width)
        if cfg.n_shared_experts:
            shapes["ffn.shared.w_gate_up.weight"] = (2 * cfg.n_shared_experts * width, d)
            shapes["ffn.shared.w_down.weight"] = (d, cfg.n_shared_experts * width)
    for name, shape in shapes.items():
        yield _whole(f"{here}.{name}", f"{here}.{name}", *shape)


def _own_baseline(cfg: DSV2Config) -> dict[str, tuple[int, ...]]:
    d, head_dim = cfg.hidden_size, cfg.baseline_head_dim
    q_rows, kv_rows = cfg.num_attention_heads * head_dim, cfg.kv_heads * head_dim
    return {
        "w_q.weight": (q_rows, d),
        "w_k.weight": (kv_rows, d),
        "w_v.weight": (kv_rows, d),
        "w_o.weight": (d, q_rows),
    }


def _own_mla(cfg: DSV2Config) -> dict[str, tuple[int, ...]]:
    d, heads, latent, rank = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.q_lora_rank
    q_rows = heads * cfg.qk_head_dim
    if rank is None:
        query = {"w_q.weight": (q_rows, d)}
    else:
        query = {"w_dq.weight": (rank, d), "q_norm.weight": (rank,), "w_uq.weight": (q_rows, rank)}
    return {
        **query,
        "w_dkv.weight": (latent + cfg.qk_rope_head_dim, d),
        "kv_norm.weight": (latent,),
        "w_uk": (heads, cfg.qk_nope_head_dim, latent),
        "w_uv": (heads, cfg.v_head_dim, latent),
        "w_o.weight": (d, heads * cfg.v_head_dim),
    }


# ------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose headers fit its configuration; no weight has been read yet.

    files: the file of each tensor. dtypes: their types. dtype: what the checkpoint as a whole is held in.
    tokenizer: the kind that config.json notes, or None.
    """

    directory: Path
    cfg: DSV2Config
    layout: dict[str, Stored]
    files: dict[str, Path]
    dtypes: dict[str, torch.dtype]
    dtype: torch.dtype
    tokenizer: str | None

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(stored.shape) for stored in self.layout.values())

    def memory(self, dtype: torch.dtype | None = None, context: int = 0, batch: int = 1) -> Memory:
        """Bytes of the loaded model, and of its cache; without the one tensor that is on its way."""
        return _memory_needed(self.cfg, dtype or self.dtype, context, batch)

    @property
    def largest_tensor(self) -> int:
        """Bytes of the largest tensor on disk."""
        return max(math.prod(s.shape) * self.dtypes[name].itemsize for name, s in self.layout.items())


def load_pretrained(
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    check_finite: bool = True,
) -> DeepSeekV2:
    """The model of a Hugging Face DeepSeek-V2 directory, or of one `save_pretrained` wrote, in eval mode.

    Reads one `model.safetensors` or the shards that `model.safetensors.index.json` names, with the experts
    one by one or fused, and a config.json of transformers 4 or 5. Memory: the model and one tensor; at most
    1 GiB of a file is mapped besides. dtype: of the weights; None: the checkpoint's. check_finite: refuse
    weights that are NaN or infinite. `model.tokenizer` is the directory's, or None.

    What is needed is known before anything is allocated: a large model says so on standard error, one that
    cannot fit is refused with what would help (`require_memory`).

    Raises FileNotFoundError for a missing file, ValueError for one that is broken, does not fit the
    configuration, is a pickle, or does not fit into memory.
    """
    checkpoint = open_checkpoint(directory)
    device, dtype = _usable_device(device), dtype or checkpoint.dtype
    if dtype not in _FLOATS.values():
        raise ValueError(f"dtype={dtype} must be one of {', '.join(map(str, _FLOATS.values()))}, or None")
    said = _require_memory(checkpoint, device, dtype)
    if checkpoint.memory(dtype).weights >= _QUIET_BELOW:
        print(said, file=sys.stderr)
    model = _without_memory(checkpoint).to(dtype).to_empty(device=device)
    if checkpoint.cfg.tie_word_embeddings:
        model.head.weight = model.embed.weight  # leaving meta gave each its own
    _read_weights(checkpoint, dict(model.named_parameters()), check_finite)
    model.tokenizer = _tokenizer(checkpoint)
    return model.eval()


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Read config.json and the headers, and check that they fit; raises as `load_pretrained` does."""
    directory = _existing(Path(directory))
    raw = _read_object(directory / "config.json")
    note = raw.get("dsv2")
    try:
        if raw.get("model_type") == OWN_MODEL_TYPE:
            around = ("model_type", "architectures", "torch_dtype", "dtype", "dsv2")
            cfg = DSV2Config.from_dict({name: value for name, value in raw.items() if name not in around})
        else:
            cfg = DSV2Config.from_hf(raw)
    except (ValueError, TypeError, ArithmeticError) as error:  # also of numbers that no float can hold
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    files = _tensor_files(directory)
    headers = _headers(files)
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in headers)
    _require_plausible(directory, cfg, fused, len(headers))
    layout = checkpoint_layout(cfg, fused)
    _require_fit(directory, cfg, layout, headers)
    dtypes = {name: _FLOATS[kind] for name, (_, kind) in headers.items() if kind in _FLOATS}
    return Checkpoint(
        directory=directory,
        cfg=cfg,
        layout=layout,
        files=files,
        dtypes=dtypes,
        dtype=_checkpoint_dtype(directory, raw, {dtypes[name] for name in layout}),
        tokenizer=note.get("tokenizer") if isinstance(note, dict) else None,
    )


def describe(checkpoint: Checkpoint) -> str:
    """What a checkpoint holds, in a few lines, from its headers alone."""
    cfg, stored = checkpoint.cfg, checkpoint.dtypes
    kinds = sorted({str(stored[name]).removeprefix("torch.") for name in checkpoint.layout})
    moe = (
        f"{len(cfg.moe_layers)} with {cfg.n_routed_experts} routed experts, {cfg.num_experts_per_tok} a token"
    )
    free, types = available_memory(), dict.fromkeys((checkpoint.dtype, torch.bfloat16))
    sizes = {str(dtype).removeprefix("torch."): _gigabytes(checkpoint.memory(dtype).total) for dtype in types}
    per_token = checkpoint.memory(context=1).cache
    lines = {
        "directory": checkpoint.directory,
        "layers": f"{cfg.num_hidden_layers}, {moe}, {cfg.n_shared_experts} shared",
        "attention": f"{cfg.attention}, {cfg.num_attention_heads} heads, hidden size {cfg.hidden_size}",
        "parameters": f"{checkpoint.num_parameters:,}",
        "tensors": f"{len(checkpoint.layout):,} in {len(set(checkpoint.files.values()))} file(s)",
        "type": f"{', '.join(kinds)} on disk, {checkpoint.dtype} when loaded",
        "memory": ", ".join(f"{size} needed in {kind}" for kind, size in sizes.items())
        + ("; free memory unknown" if free is None else f"; {_gigabytes(free)} free"),
        "cache": f"{per_token:,.0f} bytes a token, {_gigabytes(32_768 * per_token)} for 32,768",
    }
    return "\n".join(f"{name:<11} {text}" for name, text in lines.items())


def _without_memory(checkpoint: Checkpoint) -> DeepSeekV2:
    """The model on the meta device: shapes, no storage."""
    try:
        with torch.device("meta"):
            return DeepSeekV2(checkpoint.cfg)
    except (ValueError, ArithmeticError) as error:  # of YaRN's logarithms, for instance
        raise ValueError(
            f"{checkpoint.directory / 'config.json'}: no model can be built with these values: {error}"
        ) from error


def _read_weights(checkpoint: Checkpoint, parameters: dict[str, torch.nn.Parameter], check_finite: bool):
    by_file: dict[Path, list[str]] = {}
    for name in checkpoint.layout:
        by_file.setdefault(checkpoint.files[name], []).append(name)
    total = sum(
        math.prod(s.shape) * checkpoint.dtypes[name].itemsize for name, s in checkpoint.layout.items()
    )
    bar = tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc=f"Loading {checkpoint.num_parameters / 1e9:.1f}B parameters",
        disable=total < _QUIET_BELOW,
    )
    with bar, torch.no_grad():
        for file, names in by_file.items():
            for name, tensor in _tensors(file, names):
                stored = checkpoint.layout[name]
                size = tensor.nbytes
                target = parameters[stored.parts[0].parameter]
                tensor = tensor.to(target.dtype)  # before the check: a wide number may overflow a narrow type
                if check_finite:
                    _require_finite(file, name, tensor)
                tensor = tensor.view(stored.view or stored.shape)
                for part in stored.parts:
                    parameters[part.parameter][part.region].copy_(tensor[part.rows])
                bar.update(size)
                del tensor  # or it would live on while the next one is read
    _require_equal_head(checkpoint, parameters)


def _tensors(file: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of one file, one after another; every `_REMAP_AFTER` bytes its pages are freed."""
    waiting = list(reversed(list(names)))
    while waiting:
        read = 0
        with _opened(file) as opened:
            while waiting and read < _REMAP_AFTER:
                name = waiting.pop()
                tensor = opened.get_tensor(name)
                read += tensor.nbytes
                yield name, tensor
                del tensor


def _require_finite(file: Path, name: str, tensor: Tensor) -> None:
    # The extremes are NaN if anything is, and cost no copy of the tensor.
    if tensor.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{file}: {name} holds {bad} NaN or infinite values of {tensor.numel()} in {tensor.dtype}; "
            "the checkpoint is damaged, or its type too narrow for the weights. "
            "To look at it all the same: load_pretrained(..., check_finite=False)"
        )


def _require_equal_head(checkpoint: Checkpoint, parameters: dict[str, torch.nn.Parameter]) -> None:
    """A checkpoint with tied embeddings may store the head again, as long as it is the same matrix."""
    name = "lm_head.weight"
    if name in checkpoint.layout or name not in checkpoint.files:
        return
    embed = parameters["embed.weight"]
    for _, head in _tensors(checkpoint.files[name], [name]):
        if head.shape != embed.shape or not torch.equal(head.to(embed), embed.data):
            raise ValueError(
                f"{checkpoint.files[name]}: {name} differs from model.embed_tokens.weight, but config.json "
                "says tie_word_embeddings=true; set it to false if the head has weights of its own"
            )


def _existing(directory: Path) -> Path:
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ValueError(f"{directory} is a file; give the folder that holds config.json and the weights")
    previous = _sibling(directory, "old")
    if (previous / "config.json").is_file():
        warnings.warn(
            f"{directory} is missing: a save was cut short between two renames. Reading the checkpoint that "
            f"it was about to replace, {previous}",
            stacklevel=3,
        )
        return previous
    raise FileNotFoundError(f"no folder {directory}; give one that holds config.json and {SINGLE}")


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file for anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {_LARGEST_JSON} are read")
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a JSON {type(fields).__name__}, not an object")
    return fields


def _tensor_files(directory: Path) -> dict[str, Path]:
    """The file of every tensor. One `model.safetensors` comes before an index, as in transformers."""
    if (directory / SINGLE).is_file():
        with _opened(directory / SINGLE) as opened:
            return dict.fromkeys(opened.keys(), directory / SINGLE)
    if (directory / INDEX).is_file():
        return _indexed_files(directory)
    pickles = sorted(
        p.name
        for p in directory.iterdir()
        if re.search(r"\.(bin|pt|pth|pkl|pickle|ckpt)(\.index\.json)?$", p.name)
    )
    if pickles:
        raise ValueError(f"{directory / pickles[0]} {_PICKLE}")
    raise FileNotFoundError(f"{directory} has neither {SINGLE} nor {INDEX}; the weights must be safetensors")


_PICKLE = (
    "is a pickle: opening one runs whatever code its author put in, so it was not opened; dsv2 reads "
    "safetensors only. If you trust where it comes from, convert it once with transformers: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
)


def _indexed_files(directory: Path) -> dict[str, Path]:
    index = directory / INDEX
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index} needs a "weight_map", an object from tensor names to file names')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise ValueError(
                f"{index}: {name} is said to be in {shard!r}; shards must be files of the same folder, named "
                "without a path"
            )
        if not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: {name} is said to be in {shard!r}, which {_PICKLE}")
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(shards)} shards and {len(missing)} are missing: {_some(missing)}"
        )
    files: dict[str, Path] = {}
    for shard in shards:
        with _opened(directory / shard) as opened:
            inside = set(opened.keys())
        absent = [name for name, where in weight_map.items() if where == shard and name not in inside]
        if absent:
            raise ValueError(
                f"{directory / shard} lacks {len(absent)} tensors that {INDEX} places there: {_some(absent)}"
            )
        # What no entry names is listed as extra later on; what another shard is named for is a stale copy.
        files.update(
            {name: directory / shard for name in sorted(inside) if weight_map.get(name, shard) == shard}
        )
    return files


def _is_plain_name(name: str) -> bool:
    """Whether `name` is a file name on every system, no path. (The file may be a link, as in hub caches.)"""
    plain = PurePosixPath(name).name == name and PureWindowsPath(name).name == name
    return plain and name not in ("", ".", "..") and "\0" not in name


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped; a ValueError that names it if it is damaged or no such file."""
    with open(file, "rb") as raw:
        start = raw.read(8)
    # safetensors files open with the length of their header; 0x80 and a version would be an absurd one.
    length = int.from_bytes(start, "little")
    is_pickle = start[:1] == b"\x80" and start[1:2] <= b"\x05" and length > _LARGEST_HEADER
    if is_pickle or start[:4] == b"PK\x03\x04":  # a bare pickle, or torch.save's archive of one
        raise ValueError(f"{file} {_PICKLE}")
    try:
        opened = safe_open(str(file), framework="pt", device="cpu")
    except Exception as error:
        size = _gigabytes(file.stat().st_size)
        raise ValueError(f"{file} ({size}) cannot be read as a safetensors file: {error}") from None
    with opened as tensors:
        yield tensors


def _headers(files: dict[str, Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every tensor."""
    headers = {}
    for file in dict.fromkeys(files.values()):
        with _opened(file) as opened:
            for name in (n for n, where in files.items() if where == file):
                piece = opened.get_slice(name)
                headers[name] = (tuple(piece.get_shape()), str(piece.get_dtype()))
    return headers


def _require_plausible(directory: Path, cfg: DSV2Config, fused: bool, found: int) -> None:
    """Stop before listing what a config.json promises when that is far from what the files hold."""
    limit = 20_000 + 20 * found
    promised = cfg.num_hidden_layers
    if promised <= limit and cfg.has_hf_form and not fused:
        promised += 3 * cfg.n_routed_experts * len(cfg.moe_layers)
    if promised > limit:
        raise ValueError(
            f"{directory / 'config.json'} promises more than {promised} tensors (num_hidden_layers="
            f"{cfg.num_hidden_layers}, n_routed_experts={cfg.n_routed_experts}); the files hold {found}"
        )


def _require_fit(
    directory: Path,
    cfg: DSV2Config,
    layout: Mapping[str, Stored],
    headers: Mapping[str, tuple[tuple[int, ...], str]],
) -> None:
    """One ValueError with everything that the configuration and the files disagree about."""
    missing = [name for name in layout if name not in headers]
    extra = [name for name in headers if name not in layout and not _is_harmless(name, cfg)]
    both = [name for name in layout if name in headers]
    misshapen = [
        f"{name} is {headers[name][0]}, expected {layout[name].shape}"
        for name in both
        if headers[name][0] != layout[name].shape
    ]
    untyped = [f"{name} ({headers[name][1]})" for name in both if headers[name][1] not in _FLOATS]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("extra", extra),
            ("of another shape", misshapen),
            (f"of a type that is not one of {', '.join(_FLOATS)}", untyped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the tensors in {directory} do not fit its config.json ({len(layout)} expected, {len(headers)} "
            "found):\n" + "\n".join(f"  - {problem}" for problem in problems)
        )


def _is_harmless(name: str, cfg: DSV2Config) -> bool:
    """Tensors that old exports carry and no model needs."""
    if re.fullmatch(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", name):
        return True  # computed from the configuration
    if name == "lm_head.weight" and cfg.tie_word_embeddings:
        return cfg.has_hf_form  # compared with the embedding after loading
    return (
        not cfg.n_shared_experts and ".mlp.shared_experts." in name
    )  # transformers stores them with no rows


def _some(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f", … and {len(names) - most} more" if len(names) > most else "")


def _checkpoint_dtype(directory: Path, raw: dict[str, Any], found: set[torch.dtype]) -> torch.dtype:
    """What config.json says (`dtype`, in transformers 4 `torch_dtype`), else the widest of the tensors'."""
    said = raw.get("dtype") or raw.get("torch_dtype")
    if said is None or said == "auto":
        widest = found.pop()
        for dtype in found:
            widest = torch.promote_types(widest, dtype)
        return widest
    if not isinstance(said, str) or said.removeprefix("torch.") not in _FLOAT_NAMES:
        raise ValueError(
            f"{directory / 'config.json'}: dtype={said!r} is not one of {', '.join(_FLOAT_NAMES)}"
        )
    return _FLOAT_NAMES[said.removeprefix("torch.")]


def _tokenizer(checkpoint: Checkpoint) -> Any:
    try:
        from dsv2.data import load_tokenizer

        tokenizer = load_tokenizer(checkpoint.directory)
    except ImportError as error:
        warnings.warn(f"the model has no tokenizer: {error}", stacklevel=3)
        return None
    if (checkpoint.directory / "tokenizer.json").is_file():
        return tokenizer
    is_ours = checkpoint.tokenizer == "bytes" or checkpoint.cfg.vocab_size == tokenizer.vocab_size
    return tokenizer if is_ours else None  # another vocabulary's ids would be read as bytes


# -------------------------------------------------------------------------------------------------- memory


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here: {error}") from None
    return device


def require_memory(
    cfg: DSV2Config,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    context: int = 0,
    batch: int = 1,
    name: str = "the model",
) -> str:
    """What a model needs and what is free, in a sentence; ValueError, with what would help, if it cannot fit.

    Counted are the weights in `dtype` and the cache of `batch` texts of `context` tokens, not what a forward
    pass needs for a moment. Where the system does not tell what is free, nothing is refused.
    """
    device = torch.device(device)
    needed = _memory_needed(cfg, dtype, context, batch)
    free = free_memory(device)
    count = sum(math.prod(shape) for shape in hf_tensor_names(cfg, fused_experts=True).values())
    held = f"{count:,} parameters in {str(dtype).removeprefix('torch.')}"
    held += f", {_gigabytes(needed.cache)} of it for the cache" if needed.cache else ""
    what = f"{name} needs {_gigabytes(needed.total)} on {device} ({held})"
    if free is None:
        return f"{what}; how much is free is unknown"
    if needed.total <= free:
        return f"{what}; {_gigabytes(free)} are free"
    way_out = _what_would_help(cfg, dtype, device, free, context, batch)
    raise ValueError(f"{what} and {_gigabytes(free)} are free; {way_out}")


def _memory_needed(cfg: DSV2Config, dtype: torch.dtype, context: int = 0, batch: int = 1) -> Memory:
    from dsv2.accounting import memory_needed  # here, as `python -m dsv2.accounting` is to load it afresh

    return memory_needed(cfg, dtype, context, batch)


def _what_would_help(
    cfg: DSV2Config, dtype: torch.dtype, device: torch.device, free: int, context: int, batch: int
) -> str:
    """Which of a smaller type, another device and another machine would do, with numbers."""
    needed = _memory_needed(cfg, dtype, context, batch).total
    narrow = _memory_needed(cfg, torch.bfloat16, context, batch).total
    ways = []
    if narrow < needed and narrow <= free:
        ways.append(f"dtype=torch.bfloat16 (needs {_gigabytes(narrow)})")
    least = min(needed, narrow)
    if context and _memory_needed(cfg, dtype).total <= free:
        ways.append("a shorter context or fewer texts at once (the weights alone would fit)")
    for other in _other_devices(device):
        there = free_memory(other)
        if there is not None and there >= least:
            type_there = "" if there >= needed else " with dtype=torch.bfloat16"
            ways.append(f"device='{other}'{type_there} ({_gigabytes(there)} free)")
    if ways:
        return "try " + ", or ".join(ways)
    also = f" (in bfloat16: {_gigabytes(narrow)})" if narrow < needed else ""
    return f"it takes a machine with {_gigabytes(needed)} of free memory{also}: nothing here has as much"


def _other_devices(device: torch.device) -> list[torch.device]:
    """Where else on this machine a model could go: main memory, the GPUs."""
    found = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    here = torch.device("cuda", device.index or 0) if device.type == "cuda" else device
    return [other for other in found if other != here]


def _require_memory(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> str:
    """`require_memory`, and room in main memory for one tensor as it is stored and as it is converted."""
    said = require_memory(checkpoint.cfg, dtype, device, name=str(checkpoint.directory))
    free, passing = available_memory(), 2 * checkpoint.largest_tensor
    needed = passing if device.type == "cuda" else passing + int(checkpoint.memory(dtype).total)
    if free is not None and needed > free:
        raise ValueError(
            f"{checkpoint.directory} needs {_gigabytes(needed)} of main memory while it is loaded, "
            f"{_gigabytes(passing)} of it for the tensor that is read, and {_gigabytes(free)} are free; it "
            "takes a machine with more memory"
        )
    return said


def free_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that can still be taken on a device; None where that is not known.

    A GPU's free memory, and what PyTorch holds of it without using it; else `available_memory`.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None if device.type == "meta" else available_memory()
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def available_memory() -> int | None:
    """Bytes of main memory that can still be taken: the system's, or this container's limit if lower.

    None where the system does not say.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/meminfo", encoding="ascii") as lines:
            found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    found += [] if (limited := _free_in_groups()) is None else [limited]
    if not found and sys.platform == "win32":
        found.append(_windows_free_memory())
    if not found:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # macOS knows the total only
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else None


def _free_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the tightest limit on this process's control group, or one above it, leaves; None: no limit.

    Containers and batch systems set such limits. What a group has used includes the files that it has read
    and that the system would forget at once if room were needed (`inactive_file`); these count as free.
    """
    groups = []
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text(encoding="ascii").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                groups.append((root / controllers, path.strip("/")))
    found = []
    for top, path in [*groups, (root, ""), (root / "memory", "")]:  # in a container the path is the host's
        names = _GROUP_FILES[top.name == "memory"]
        folder = top / path
        while folder == top or top in folder.parents:
            with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                found.append(max(0, limit - used + _statistic(folder / "memory.stat", names[2])))
            folder = folder.parent
    return min(found) if found else None


# Of control groups in version 2 and 1: the limit, what is used, and memory.stat's name for files.
_GROUP_FILES = {
    False: ("memory.max", "memory.current", "inactive_file"),
    True: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _statistic(path: Path, name: str) -> int:
    """A number of a file with lines "name number"; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def _windows_free_memory() -> int:
    import ctypes

    class MemoryStatus(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in (
                "total",
                "free",
                "total_page",
                "free_page",
                "total_virtual",
                "free_virtual",
                "extended",
            )
        ]

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.free


def _gigabytes(size: float) -> str:
    if size < 1e6:
        return f"{size / 1e3:.1f} KB"
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------------------- writing


def save_pretrained(
    model: DeepSeekV2,
    directory: str | os.PathLike[str],
    *,
    max_shard_bytes: int = 5 * 2**30,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `model` as a Hugging Face DeepSeek-V2 directory, which transformers loads, in the model's type.

    The directory is complete or not there: everything is written beside it first, then put in its place. Of
    a checkpoint that it replaces, other files (tokenizer, notes) are carried over. Models with an attention
    baseline or the router of another paper are written under our own names, for `load_pretrained` alone.
    transformers ignores `norm_topk_prob` and `moe_layer_freq`, and wants a hidden_size that is a multiple of
    the heads.
    state_dict: write these tensors instead of the model's, for instance those gathered from several
    processes.

    Raises ValueError if the directory holds something else than a checkpoint.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    target = Path(directory).resolve()
    new, old = _sibling(target, "new"), _sibling(target, "old")
    if not target.exists() and old.exists():
        os.rename(old, target)  # a save was cut short between the two renames below
    _require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)

    new.mkdir()
    try:
        tensors = dict(model.state_dict() if state_dict is None else state_dict)
        _write_weights(model.cfg, tensors, new, max_shard_bytes)
        _write_configs(model, new, tensors["embed.weight"].dtype)
        for weights in new.glob("*.safetensors"):
            shutil.copymode(new / "config.json", weights)  # safetensors lets nobody else read
        _carry_over(target, new, model.tokenizer)
        for path in (*new.rglob("*"), new):
            _fsync(path)
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if not target.exists() and old.exists():
            os.rename(old, target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sibling(directory: Path, kind: str) -> Path:
    directory = Path(os.path.abspath(directory))
    return directory.with_name(f".{directory.name}.{kind}")


_OURS = re.compile(
    r"(model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json)"
)


def _require_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; a checkpoint is a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ValueError(
            f"{target} is neither empty nor a checkpoint (it has no config.json), and would be replaced as a "
            "whole; choose a folder of its own"
        )


def _write_weights(cfg: DSV2Config, tensors: Mapping[str, Tensor], new: Path, max_shard_bytes: int) -> None:
    layout = checkpoint_layout(cfg)
    absent = sorted({p.parameter for s in layout.values() for p in s.parts} - set(tensors))
    if absent:
        raise ValueError(f"state_dict lacks {len(absent)} parameters: {_some(absent)}")
    sizes = {
        name: math.prod(stored.shape) * tensors[stored.parts[0].parameter].element_size()
        for name, stored in layout.items()
    }
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        content = {name: _stored_tensor(layout[name], tensors) for name in names}
        save_file(content, new / file, metadata={"format": "pt"})  # transformers asks for the format
    if len(shards) > 1:
        parameters = sum(math.prod(stored.shape) for stored in layout.values())
        metadata = {"total_parameters": parameters, "total_size": sum(sizes.values())}
        _write_json(new / INDEX, {"metadata": metadata, "weight_map": weight_map})


@torch.no_grad()
def _stored_tensor(stored: Stored, tensors: Mapping[str, Tensor]) -> Tensor:
    """One tensor as it stands on disk: a copy of its own, whatever memory the parameters share."""
    out = torch.empty(stored.view or stored.shape, dtype=tensors[stored.parts[0].parameter].dtype)
    for part in stored.parts:
        out[part.rows].copy_(tensors[part.parameter][part.region])
    return out.view(stored.shape)


def _write_configs(model: DeepSeekV2, new: Path, dtype: torch.dtype) -> None:
    cfg = model.cfg
    if cfg.has_hf_form:
        fields = cfg.to_hf()
    else:
        fields = {"model_type": OWN_MODEL_TYPE, **cfg.to_dict(), "dsv2": {}}
    fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    if model.tokenizer is not None:
        fields["dsv2"] = {**fields["dsv2"], "tokenizer": model.tokenizer.describe()["kind"]}
    _write_json(new / "config.json", fields)
    ids = {name: getattr(cfg, name) for name in ("bos_token_id", "eos_token_id")}
    ids = {name: value for name, value in ids.items() if value is not None}
    if ids:
        _write_json(new / "generation_config.json", {"_from_model_config": True, **ids})


def _carry_over(target: Path, new: Path, tokenizer: Any) -> None:
    """Bring along what is not the checkpoint itself, and the tokenizer's files."""
    tokenizer_files = ("tokenizer.json", "tokenizer_config.json")
    source = getattr(tokenizer, "path", None)  # of a tokenizer.json; bytes have none
    for entry in target.iterdir() if target.is_dir() else ():
        replaced = _OURS.fullmatch(entry.name) or (tokenizer is not None and entry.name in tokenizer_files)
        if not replaced and entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
        elif not replaced:
            _link_or_copy(entry, new / entry.name)
    for name in tokenizer_files if source is not None else ():
        if Path(source).with_name(name).is_file():
            shutil.copyfile(Path(source).with_name(name), new / name)


def _link_or_copy(source: str | Path, destination: str | Path) -> None:
    """The same file under a second name: no copy of large files, and a log that is still open goes on."""
    if not os.path.islink(source):
        with contextlib.suppress(OSError):  # not every file system has hard links
            os.link(source, destination)
            return
    shutil.copy2(source, destination, follow_symlinks=False)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _fsync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk. (Windows does it for files only.)"""
    if path.is_symlink() or (path.is_dir() and os.name == "nt"):
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
