"""What the benchmark of decoding hands its peers, checked with stand-ins that compute attention plainly."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch

from dsv2.bench import decode as bench
from dsv2.bench.__main__ import main
from dsv2.kernels import mla_decode_reference

ON_GPU = torch.cuda.is_available()
EQUAL = {"heads": 3, "lengths": [128, 128], "slots": 128}
RAGGED = {"heads": 3, "lengths": [128, 65, 1, 64], "slots": 192}
PROBLEMS = {"equal": EQUAL, "ragged": RAGGED, "paged": RAGGED | {"paged": True}}


def attend(q, keys, values, scale):
    """(H, D), (S, D), (S, C) -> (H, C), in float64."""
    weights = torch.softmax(q.double() @ keys.double().T * scale, dim=-1)
    return (weights @ values.double()).to(q.dtype)


def rows_of(pages, numbers, length):
    """The first `length` rows of the pages with these numbers, one after another."""
    return torch.cat([pages[number] for number in numbers.tolist()])[:length]


class FlashMLA:
    __version__ = "1.0"

    def get_mla_metadata(self, cache_seqlens, heads, kv_heads):
        assert kv_heads == 1
        return cache_seqlens.clone(), "splits"

    def flash_mla_with_kvcache(
        self, q, k_cache, block_table, cache_seqlens, head_dim_v, plan, splits, softmax_scale, causal
    ):
        assert k_cache.shape[1:] == (64, 1, 576) and head_dim_v == 512 and block_table.dtype == torch.int32
        assert splits == "splits" and plan.equal(cache_seqlens)
        out = q.new_empty(*q.shape[:3], 512)
        for b, length in enumerate(cache_seqlens.tolist()):
            rows = rows_of(k_cache[:, :, 0], block_table[b], length)
            out[b, 0] = attend(q[b, 0], rows, rows[:, :512], softmax_scale)
        return out, "lse"


class FlashInfer:
    class BatchMLAPagedAttentionWrapper:
        def __init__(self, float_workspace_buffer, backend):
            assert float_workspace_buffer.numel() >= 2**27 and backend in ("auto", "fa3")

        def plan(self, *, num_heads, head_dim_ckv, head_dim_kpe, causal, q_data_type, kv_data_type, **plan):
            assert (head_dim_ckv, head_dim_kpe) == (512, 64) and not causal
            assert all(plan[name].dtype == torch.int32 for name in plan if torch.is_tensor(plan[name]))
            starts = plan["qo_indptr"].tolist()
            assert starts == list(range(len(plan["kv_len_arr"]) + 1))
            self.made, self.heads, self.types = plan, num_heads, (q_data_type, kv_data_type)

        def run(self, *, q_nope, q_pe, ckv_cache, kpe_cache, out):
            plan = self.made
            assert q_nope.shape[1] == self.heads and (q_nope.dtype, ckv_cache.dtype) == self.types
            starts, size = plan["kv_indptr"].tolist(), plan["page_size"]
            for b, length in enumerate(plan["kv_len_arr"].tolist()):
                numbers = plan["kv_indices"][starts[b] : starts[b + 1]]
                assert 0 <= len(numbers) * size - length < size
                latent, k_rope = (rows_of(pages, numbers, length) for pages in (ckv_cache, kpe_cache))
                q, keys = torch.cat((q_pe[b], q_nope[b]), dim=-1), torch.cat((k_rope, latent), dim=-1)
                out[b] = attend(q, keys, latent, plan["sm_scale"])
            return out


def with_second_query(q, qv, k, v, lengths, table, scale):
    """FlashAttention's attention of one token: q (B, H, R) meets the keys, qv (B, H, C) the values."""
    out = torch.empty_like(qv)
    for b, length in enumerate(lengths.tolist()):
        keys, values = (x[b] if table is None else torch.cat(list(x[table[b].long()])) for x in (k, v))
        keys, values = keys[:length, 0], values[:length, 0]
        both = torch.cat((q[b], qv[b]), dim=-1)
        out[b] = attend(both, torch.cat((keys, values), dim=-1), values, scale)
    return out


class FlashAttention:
    def get_scheduler_metadata(self, **shape):
        assert (shape["headdim"], shape["headdim_v"], shape["num_heads_kv"]) == (64, 512, 1)
        assert shape["max_seqlen_q"] == 1 and len(shape["cache_seqlens"]) == shape["batch_size"]
        return shape

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, *, qv, cache_seqlens, page_table, softmax_scale, scheduler_metadata
    ):
        size = None if page_table is None else k_cache.shape[1]
        assert scheduler_metadata["page_size"] == size and scheduler_metadata["num_heads_q"] == q.shape[2]
        assert "cu_seqlens_q" not in scheduler_metadata
        out = with_second_query(q[:, 0], qv[:, 0], k_cache, v_cache, cache_seqlens, page_table, softmax_scale)
        return out[:, None]


class FlashAttentionOfVLLM:
    get_scheduler_metadata = FlashAttention.get_scheduler_metadata

    def flash_attn_varlen_func(
        self, q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, *, seqused_k, q_v, block_table,
        softmax_scale, scheduler_metadata, fa_version,
    ):  # fmt: skip
        assert fa_version == 3 and max_seqlen_q == 1 and max_seqlen_k >= max(seqused_k.tolist())
        assert cu_seqlens_q.tolist() == list(range(len(q) + 1))
        assert scheduler_metadata["cu_seqlens_q"].equal(cu_seqlens_q)
        return with_second_query(q, q_v, k, v, seqused_k, block_table, softmax_scale)


class SGLang:
    def decode_attention_fwd_grouped(
        self, q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits,
        max_kv_splits, sm_scale, v_scale,
    ):  # fmt: skip
        self.splits = max_kv_splits
        assert attn_logits.shape == (*o.shape[:2], max_kv_splits, 512) and v_scale == 1.0
        assert attn_lse.shape == attn_logits.shape[:3] and num_kv_splits.tolist() == [max_kv_splits] * len(q)
        for b in range(len(q)):
            places = kv_indices[kv_indptr[b] : kv_indptr[b + 1]]
            o[b] = attend(q[b], k_buffer[places, 0], v_buffer[places, 0], sm_scale)


class VLLM:
    def decode_attention_fwd(
        self, q, k_buffer, v_buffer, o, lse, req_to_token, b_seq_len, attn_logits, num_kv_splits, sm_scale,
        page_size=1, logit_cap=0.0, k_scale=None, v_scale=None, is_mla=False,
    ):  # fmt: skip
        self.splits = num_kv_splits
        assert is_mla and logit_cap == 0.0 and k_scale == 1 and v_scale == 1
        assert attn_logits.shape == (*o.shape[:2], num_kv_splits, 513) and lse.shape == o.shape[:2]
        assert k_buffer.shape[1] == page_size and req_to_token.dtype == torch.int64
        for b, length in enumerate(b_seq_len.tolist()):
            keys = rows_of(k_buffer[:, :, 0], req_to_token[b], length)
            o[b] = attend(q[b], keys, rows_of(v_buffer[:, :, 0], req_to_token[b], length), sm_scale)


STAND_INS = {  # the adapter, the module that it imports, what stands in for it
    "FlashMLA": ("flash_mla", FlashMLA),
    "FlashInfer": ("flashinfer.mla", FlashInfer),
    "FlashAttention 3": ("flash_attn_interface", FlashAttention),
    "FlashAttention 3, vLLM's": ("vllm.vllm_flash_attn", FlashAttentionOfVLLM),
    "SGLang, Triton": ("sglang.srt.layers.attention.triton_ops.decode_attention", SGLang),
    "vLLM, Triton": ("vllm.v1.attention.ops.triton_decode_attention", VLLM),
}


@pytest.fixture(params=STAND_INS)
def peer(request, monkeypatch):
    """One adapter, its peer replaced by its stand-in."""
    module, stand_in = STAND_INS[request.param]
    for absent in ("flash_attn_interface", "vllm.vllm_flash_attn"):
        monkeypatch.setitem(sys.modules, absent, None)
    made = stand_in()
    monkeypatch.setitem(sys.modules, module, made)
    monkeypatch.setattr(bench, "graph_seconds", lambda calls, repeats=15: 1.0)
    name = request.param.removesuffix(", vLLM's")
    return SimpleNamespace(name=name, module=made, calls=bench.CONTENDERS[name])


def make(kind):
    """A problem with two caches, and what its attention over each of them is."""
    problem = bench.Problem(**PROBLEMS[kind], device="cpu", dtype=torch.float32)
    problem.caches.append(torch.randn_like(problem.caches[0]))
    q, table = (problem.q_latent, problem.q_rope), problem.table
    exact = [
        mla_decode_reference(*q, *problem.parts(cache), problem.on_device, 192**-0.5, block_table=table)
        for cache in problem.caches
    ]
    return problem, exact


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_peer_gets_what_it_needs(peer, kind):
    problem, exact = make(kind)
    if peer.name == "SGLang, Triton" and kind != "equal":
        with pytest.raises(bench.Skip, match="only equal lengths"):
            peer.calls(problem)
        return
    calls = peer.calls(problem)
    assert len(calls) == 2
    for call, expected in zip(calls + calls, exact + exact):
        torch.testing.assert_close(call(), expected)


def without_rotary_part(problem, monkeypatch):
    problem.q_rope = torch.zeros_like(problem.q_rope)


def with_another_scale(problem, monkeypatch):
    monkeypatch.setattr(bench, "SCALE", (512 + 64) ** -0.5)


def with_latents_in_reverse(problem, monkeypatch):
    problem.q_latent = problem.q_latent.flip(-1)


def with_every_slot(problem, monkeypatch):
    problem.on_device = torch.full_like(problem.on_device, problem.slots)
    problem.lengths = [problem.slots] * len(problem.lengths)


def with_pages_in_order(problem, monkeypatch):
    problem.table = problem.table.flatten().sort().values.view_as(problem.table)


def with_one_cache(problem, monkeypatch):
    problem.caches = [problem.caches[0]] * 2


MISTAKES = {
    without_rotary_part: "equal", with_another_scale: "equal", with_latents_in_reverse: "equal",
    with_one_cache: "equal", with_every_slot: "ragged", with_pages_in_order: "paged",
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_what_a_peer_gets_is_seen(peer, mistake, monkeypatch):
    problem, exact = make(MISTAKES[mistake])
    if peer.name == "SGLang, Triton" and MISTAKES[mistake] != "equal":
        pytest.skip("it takes equal lengths only")
    changed = copy.copy(problem)
    mistake(changed, monkeypatch)
    results = [call().clone() for call in peer.calls(changed)]
    assert max(bench.relative_error(out, e) for out, e in zip(results, exact)) > bench.LARGEST_ERROR


@pytest.mark.parametrize("peer", ["SGLang, Triton", "vLLM, Triton"], indirect=True)
def test_of_several_splits_the_fastest_is_taken(peer, monkeypatch):
    def seconds_of(calls, repeats=15):
        calls[0]()
        return abs(peer.module.splits - 17.0)

    monkeypatch.setattr(bench, "graph_seconds", seconds_of)
    peer.calls(make("equal")[0])[0]()
    assert peer.module.splits == 16


@pytest.mark.parametrize("peer", ["FlashMLA", "FlashInfer", "vLLM, Triton"], indirect=True)
def test_a_cache_that_does_not_fill_its_pages_is_left_out(peer):
    with pytest.raises(bench.Skip, match="pages of 64 only"):
        peer.calls(bench.Problem(3, [60, 60], 60, "cpu", torch.float32))


def test_flash_attentions_own_package_comes_first_and_an_absence_names_both(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", theirs := SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn_interface", own := SimpleNamespace())
    names = ("flash_attn_interface", "vllm.vllm_flash_attn")
    assert bench.peer(*names) is own
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert bench.peer(*names) is theirs
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", None)
    with pytest.raises(bench.Skip, match="not importable: .*flash_attn_interface.*vllm_flash_attn"):
        bench.peer(*names)


def test_the_report_names_the_versions_of_the_peers_that_are_there(monkeypatch):
    for name in bench.PEERS:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "flash_mla", FlashMLA())
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace())
    assert bench.peer_versions() == {"flash_mla": "1.0", "flash_attn_interface": "unknown"}


def test_every_peer_is_measured_against_ours():
    assert set(bench.SWEPT) | set(bench.WITH_LENGTHS) <= set(bench.CONTENDERS)
    peers = {name.removesuffix(", vLLM's") for name in STAND_INS}
    assert peers <= set(bench.SWEPT)


@pytest.mark.skipif(ON_GPU, reason="what a CPU does")
def test_a_result_that_goes_wrong_while_it_is_timed_is_not_reported(monkeypatch, capsys):
    def right_at_first(problem):
        results = [bench.absorbed(problem)[0]()]
        return [lambda: results.pop() if results else torch.zeros_like(problem.q_latent)]

    monkeypatch.setitem(bench.CONTENDERS, "PyTorch, absorbed", right_at_first)
    assert main(["decode"]) == 1
    assert "PyTorch, absorbed is off by 1" in capsys.readouterr().err


@pytest.mark.skipif(ON_GPU, reason="what a CPU does")
def test_a_contender_that_cannot_be_timed_is_left_out_with_its_reason(monkeypatch, capsys):
    def fails(work):
        raise RuntimeError("this cannot be captured\nand more")

    monkeypatch.setattr(bench, "seconds", fails)
    rows = bench.measure("table", bench.Problem(2, [64], 64, "cpu", torch.float32), 0.0, 0.0)
    assert [row["skipped"] for row in rows] == ["this cannot be captured"] * 2
