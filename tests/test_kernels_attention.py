"""The fused decode attention against float64, interpreted on a CPU, compiled on a GPU; wrong kernels fail."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from attention_cases import DEVICE, LAYOUTS, SELECTED, TOLERANCE, Case, error, exact, make_inputs, poisoned
from hypothesis import strategies as st

from dsv2.attention.mla import absorbed_attention
from dsv2.kernels import attention, mla_decode, mla_decode_reference
from dsv2.kernels.attention import TritonKernel, choose_blocks
from dsv2.kernels.backend import triton
from dsv2.kernels.schedule import choose_parts, pieces

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")
ON_GPU = DEVICE == "cuda"

# bfloat16 products are wrong in the interpreter, which adds them up in bfloat16.
DTYPES = list(TOLERANCE) if ON_GPU else [torch.float32, torch.float16]
SMALL = TritonKernel(heads=16, tile=16, warps=4, stages=2)  # many tiles, however short the sequence


def kernels_for(case: Case):
    """The kernels that can take a case: with small tiles, with a small GPU's blocks, as the device has it."""
    if (
        ON_GPU and case.seed % 3
    ):  # each kernel of a case is compiled: most cases take the device's choice alone
        yield None
        return
    itemsize = torch.empty((), dtype=case.dtype).element_size()
    if max(case.lengths) <= 300 and len(case.lengths) <= 10:
        yield SMALL
    yield choose_blocks(case.width, case.rope, itemsize, 99 * 1024, case.page or None)
    if ON_GPU:
        yield None


def check(case: Case, module=attention) -> None:
    """Every kernel on one case: the error, and the same result from run to run."""
    inputs = make_inputs(case)
    expected = exact(case, inputs)
    for kernel in kernels_for(case):
        runs = []
        for _ in range(2):
            out = poisoned(inputs)
            if kernel is None:
                arguments = list(vars(inputs).values())
                module.mla_decode(*arguments[:5], case.scale, block_table=inputs.block_table, out=out)
            else:
                run = module.TritonKernel(kernel.heads, kernel.tile, kernel.warps, kernel.stages)
                module.run_kernel(
                    run, *list(vars(inputs).values())[:5], case.scale, inputs.block_table, out, case.parts
                )
            runs.append(out)
        assert error(runs[0], expected) < case.tolerance, (case, kernel)
        assert torch.equal(*runs), (case, kernel)


def lengths_up_to(longest: int):
    return st.lists(st.one_of(st.just(0), st.integers(1, longest)), min_size=1, max_size=6).map(tuple)


SMALL_CASES = st.builds(
    Case,
    lengths=lengths_up_to(70),
    heads=st.integers(1, 35),
    width=st.integers(3, 80),
    rope=st.integers(2, 40),
    dtype=st.sampled_from(DTYPES),
    spare=st.integers(0, 20),
    page=st.sampled_from((0, 0, 16, 32)),
    layout=st.sampled_from(LAYOUTS),
    parts=st.one_of(st.none(), st.integers(1, 12)),
    sharpness=st.sampled_from((0.1, 1.0, 30.0)),
    seed=st.integers(0, 2**31),
)
LARGE_CASES = st.builds(  # few widths and numbers of parts: for each, kernels are compiled anew
    Case,
    lengths=st.one_of(
        lengths_up_to(3000), st.lists(st.integers(0, 500), min_size=1, max_size=256).map(tuple)
    ),
    heads=st.one_of(st.sampled_from((1, 8, 16, 17, 32, 64, 96, 128)), st.integers(1, 128)),
    width=st.sampled_from((200, 512, 512)),
    rope=st.sampled_from((40, 64, 64)),
    dtype=st.sampled_from(DTYPES),
    spare=st.integers(0, 100),
    page=st.sampled_from((0, 0, 64, 64, 16)),
    layout=st.sampled_from(LAYOUTS),
    parts=st.sampled_from((None, None, 1, 3, 40, 200)),
    sharpness=st.sampled_from((0.1, 1.0, 30.0)),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("case", SELECTED, ids=str)
def test_selected_cases_equal_float64(case):
    check(case)


@pytest.mark.skipif(ON_GPU, reason="a GPU would compile each of these shapes, and takes the large ones")
@hypothesis.settings(max_examples=60, derandomize=True)
@hypothesis.given(case=SMALL_CASES)
def test_any_small_case_equals_float64(case):
    check(case)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("part", range(20))  # parts, so that several processes can share the work
def test_any_large_case_equals_float64_on_a_gpu(part):
    @hypothesis.seed(part)
    @hypothesis.settings(max_examples=26, database=None)
    @hypothesis.given(case=LARGE_CASES)
    def run(case):
        check(case)

    run()


@pytest.mark.parametrize("batch, heads", [(3, 40), (130, 3), (40, 16)])
def test_shapes_of_the_course(batch, heads):
    """V2's widths, and batches that are no power of two, at lengths that the interpreter can do."""
    lengths = tuple(itertools.islice(itertools.cycle((33, 0, 5, 17, 1)), batch))
    check(Case(lengths=lengths, heads=heads, width=512, rope=64, dtype=torch.float16))


def test_reference_equals_the_models_attention():
    """The reference and `absorbed_attention`, which the model uses, are one formula."""
    case = Case(lengths=(9, 9), dtype=torch.float32, spare=0)
    inputs = make_inputs(case, "cpu")
    expected = absorbed_attention(
        inputs.q_latent[:, None], inputs.q_rope[:, None], inputs.latent, inputs.k_rope, case.scale
    )[:, 0]
    out = mla_decode(*list(vars(inputs).values())[:5], case.scale)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in SELECTED if c.dtype == torch.float32], ids=str)
def test_reference_equals_float64(case):
    inputs = make_inputs(case)
    out = mla_decode_reference(*list(vars(inputs).values())[:5], case.scale, block_table=inputs.block_table)
    assert error(out, exact(case, inputs)) < TOLERANCE[case.dtype]


# ------------------------------------------------------------------------------------- wrong kernels

WRONG = {  # what is changed in the text of the kernels: the old words, the new ones
    "the accumulator is not rescaled": ("mixture * shrink[:, None], input", "mixture, input"),
    "the sum is not rescaled": (
        "total_weight * shrink + tl.sum(weights, 1)",
        "total_weight + tl.sum(weights, 1)",
    ),
    "the mask takes one token too many": ("filled = token < length", "filled = token <= length"),
    "the mask takes one token too few": ("filled = token < length", "filled = token < length - 1"),
    "the scores are not masked": ('tl.where(filled, scores, -float("inf"))', "scores"),
    "the remainder of the split is lost": (
        "per_part = tl.cdiv(total, tl.num_programs(1))",
        "per_part = tl.maximum(total // tl.num_programs(1), 1)",
    ),
    "the combination takes no maximum": (
        "base = tl.where(is_head, larger, 0.0)",
        "base = tl.where(is_head, 0.0, 0.0)",
    ),
    "the combination adds without weights": (
        "weights = tl.exp2(lse - base)",
        "weights = tl.where(there, 1.0, 0.0)",
    ),
    "the combination drops what came before": ("mixture * shrink[:, None] + tl.sum", "tl.sum"),
    "parts are written to each other's place": (
        "slot = (part + b).to(tl.int64) * heads + head\n            tl.store",
        "slot = (part + 0 * b).to(tl.int64) * heads + head\n            tl.store",
    ),
    "lengths of 0 are left unwritten": ("if parts_here != 1:", "if parts_here > 1:"),
    "offsets have 32 bits": ("slot = b.to(tl.int64), token.to(tl.int64)", "slot = b, token"),
    "the page is taken for the sequence": (
        "block = tl.load(block_table",
        "block = b.to(tl.int64) + 0 * tl.load(block_table",
    ),
    "the rotary part is forgotten": ('tl.dot(q_r, r.T, scores, input_precision="ieee")', "scores"),
    "exp2 is given natural logarithms": ("scale * LOG2_E", "scale"),
}


def wrong_kernel(tmp_path: Path, old: str, new: str):
    """The module of the kernels with one change in its text."""
    source = Path(attention.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {attention.__file__}"
    path = tmp_path / "wrong_attention.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("wrong_attention", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy: overflow, invalid value
@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_kernels_are_rejected(mistake, tmp_path):
    module = wrong_kernel(tmp_path, *WRONG[mistake])
    with pytest.raises(AssertionError):
        for case in SELECTED:
            check(case, module)


# --------------------------------------------------------------------------- what surrounds the kernels


@hypothesis.settings(max_examples=200, derandomize=True)
@hypothesis.given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    tile=st.sampled_from((1, 7, 16, 64)),
    parts=st.integers(1, 40),
)
def test_pieces_cover_every_token_once_and_evenly(lengths, tile, parts):
    found = pieces(lengths, tile, parts)
    seen = {(piece.sequence, token) for piece in found for token in range(piece.start, piece.stop)}
    assert seen == {(b, token) for b, length in enumerate(lengths) for token in range(length)}
    assert sum(piece.stop - piece.start for piece in found) == len(seen)
    tiles = [0] * parts
    for piece in found:
        tiles[piece.program] += -(-(piece.stop - piece.start) // tile)
    assert max(tiles) <= -(-sum(tiles) // parts)
    slots = [piece.program + piece.sequence for piece in found]
    assert len(set(slots)) == len(slots)  # no two partial results share a place


def test_pieces_name_a_bad_argument():
    with pytest.raises(ValueError, match="tile=0"):
        pieces([3], 0, 1)
    with pytest.raises(ValueError, match="-1"):
        pieces([-1], 1, 1)


@pytest.mark.parametrize("batch", (1, 2, 3, 16, 67, 128, 200, 256))
@pytest.mark.parametrize("head_blocks", (1, 2, 8))
def test_all_programs_run_at_once_and_keep_most_of_the_gpu_busy(batch, head_blocks):
    parts = choose_parts(batch, 32768 // 128, head_blocks, 132)
    assert parts * head_blocks <= 132
    share = [0] * parts
    for piece in pieces([32768] * batch, 64, parts):
        share[piece.program] += piece.stop - piece.start
    assert sum(share) / (max(share) * (132 // head_blocks)) > 0.85


def test_a_short_cache_is_not_cut_into_dust():
    assert choose_parts(1, 0, 1, 132) == 1
    assert choose_parts(3, 8, 1, 132) == 24


def arguments(**changes) -> dict:
    inputs = vars(make_inputs(Case(lengths=(4, 9)), "cpu"))
    return {**inputs, "scale": 1.0, **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q_latent": torch.zeros(2, 5, 24, dtype=torch.float64)}, "q_latent must be float32"),
        ({"q_rope": torch.zeros(2, 4, 10)}, r"q_rope must be \(batch, heads, rope\) = \(2, 5, 10\)"),
        ({"latent": torch.zeros(2, 12, 23)}, "latent must be"),
        (
            {"k_rope": torch.zeros(2, 12, 10, dtype=torch.float16)},
            "k_rope .*float32; got torch.float16",
        ),
        ({"latent": torch.zeros(2, 24, 12).mT}, "latent's last dimension must be contiguous"),
        ({"lengths": torch.tensor([4, 9])}, "lengths must be int32"),
        ({"lengths": torch.tensor([4], dtype=torch.int32)}, "first of size batch=2"),
        ({"out": torch.zeros(2, 5, 23)}, "out must be"),
        (
            {
                "block_table": torch.zeros(2, 1, dtype=torch.int32),
                "latent": torch.zeros(4, 12, 24),
                "k_rope": torch.zeros(4, 12, 10),
            },
            "page size must be a multiple of 16 tokens; latent has pages of 12",
        ),
        (
            {
                "block_table": torch.zeros(2, 1),
                "latent": torch.zeros(4, 16, 24),
                "k_rope": torch.zeros(4, 16, 10),
            },
            "block_table must be int32",
        ),
        ({"lengths": torch.tensor([4, 9], dtype=torch.int32, device="meta")}, "lengths is on meta"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    given = arguments(**changes)
    with pytest.raises(ValueError, match=message):
        mla_decode(**given)


def test_without_a_fitting_gpu_the_reference_runs_and_says_so_once(monkeypatch):
    """As on Turing: PyTorch's products in float16, one warning however many calls."""
    seen = []

    def reference(*tensors, **_):
        seen.append(tensors[0].dtype)
        return tensors[0]

    monkeypatch.setattr(attention, "mla_decode_reference", reference)
    monkeypatch.setattr(attention, "kernel_problem", lambda device: "Old GPU has compute capability 7.5")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    inputs = arguments()
    tensors = ("q_latent", "q_rope", "latent", "k_rope")
    bf16 = {name: x.bfloat16() if name in tensors else x for name, x in inputs.items()}
    attention._say_once.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch, in float16: Old GPU") as warned:
        for _ in range(3):
            assert mla_decode(**bf16).dtype == torch.bfloat16
    assert len(warned) == 1 and set(seen) == {torch.float16}


@pytest.mark.skipif(ON_GPU, reason="kernels are compiled here")
def test_when_triton_came_first_it_is_said():
    """Interpreting is decided at Triton's first import; later, kernels would fail and not say why."""
    program = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import triton, dsv2.kernels as k\n"
        "assert 'import dsv2 first' in k.how_kernels_run(), k.how_kernels_run()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(attention.__file__).parents[2])


def test_importing_needs_no_triton():
    """The package, the references and the schedule work where Triton has no wheels."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dsv2.kernels as k\n"
        "x = torch.ones(1, 2, 3); n = torch.ones(1, dtype=torch.int32)\n"
        "assert k.mla_decode(x, x, x, x, n, 1.0).equal(x)\n"
        "assert 'not installed' in k.how_kernels_run()\n"
    )
    root = Path(attention.__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_attention_is_a_case_of_it(dtype):
    """Values as latents, keys as rotary keys, queries zero on the latents: that is GQA."""
    batch, groups, each, slots, width = 3, 2, 5, 70, 24
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    q, keys, values = (
        normal(batch, groups * each, width),
        *(normal(batch, groups, slots, width) for _ in "kv"),
    )
    lengths = torch.tensor([70, 1, 33], dtype=torch.int32, device=DEVICE)
    flat = [part.flatten(0, 1) for part in (values, keys)]
    q_groups = q.reshape(-1, each, width)
    arguments = (torch.zeros_like(q_groups), q_groups, *flat, lengths.repeat_interleave(groups), width**-0.5)
    runs = [mla_decode(*arguments)]
    for kernel in (SMALL, choose_blocks(width, width, keys.element_size(), 99 * 1024)):
        runs.append(attention.run_kernel(kernel, *arguments))
    for b, length in enumerate(lengths.tolist()):
        k, v = (part[b, :, :length].double().repeat_interleave(each, 0) for part in (keys, values))
        scores = torch.einsum("hd,hsd->hs", q[b].double(), k) * width**-0.5
        expected = torch.einsum("hs,hsd->hd", scores.softmax(-1), v)
        for out in runs:
            found = out.view(batch, groups * each, width)[b].double()
            assert (found - expected).abs().max() < 10 * TOLERANCE[dtype], (b, out.shape)
