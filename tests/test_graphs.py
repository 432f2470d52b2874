"""Decoding through captured steps equals calling the model token by token: on a CPU without the capture."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dsv2.config import DSV2Config
from dsv2.generate import Sampling, decode, loop, stream
from dsv2.generate.graphs import GraphDecoder, StepModel, why_not
from dsv2.model import DeepSeekV2

GREEDY = Sampling(temperature=0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 8], [3, 3]]

# No two dimensions alike; sizes that fill no block.
SIZES = dict(
    vocab_size=269, hidden_size=40, num_hidden_layers=3, num_attention_heads=3, intermediate_size=56,
    max_position_embeddings=4096, initializer_range=0.3, kv_lora_rank=24, qk_nope_head_dim=12,
    qk_rope_head_dim=8, v_head_dim=14, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3,
    moe_intermediate_size=20, first_k_dense_replace=1,
)  # fmt: skip
CONFIGS = {
    "greedy": SIZES | dict(topk_method="greedy"),
    "devices": SIZES
    | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=2.5),
    "switch": SIZES | dict(router="switch", num_experts_per_tok=1, capacity_factor=0.5, norm_topk_prob=True),
    "gshard": SIZES | dict(router="gshard", num_experts_per_tok=2, capacity_factor=0.5),
    "glam": SIZES | dict(router="glam", num_experts_per_tok=2, n_shared_experts=0, routed_scaling_factor=4.0),
    "mixtral": SIZES | dict(router="mixtral", num_experts_per_tok=2),
    "dense": SIZES | dict(router="dense", num_experts_per_tok=8, norm_topk_prob=True),
    "mha": SIZES | dict(attention="mha", head_dim=10),
    "gqa": SIZES | dict(attention="gqa", num_attention_heads=6, num_key_value_heads=2, head_dim=10),
    "mqa, dense": SIZES | dict(attention="mqa", head_dim=14, n_routed_experts=0, n_shared_experts=0),
    "low rank": SIZES | dict(topk_method="greedy", q_lora_rank=18, norm_topk_prob=True, n_shared_experts=0),
}


def make_model(name: str = "greedy", dtype: torch.dtype = torch.float32) -> DeepSeekV2:
    torch.manual_seed(3)
    return DeepSeekV2(DSV2Config(**CONFIGS[name])).to(DEVICE, dtype).eval()


@pytest.fixture(autouse=True)
def graphs_everywhere(monkeypatch):
    """On a CPU the step runs uncaptured, on the references."""
    if DEVICE == "cpu":
        monkeypatch.setattr(loop, "why_not", lambda model, batch, cache=None: None)


def stored(cache) -> list[torch.Tensor]:
    """What a cache holds: (layers, batch, tokens, ...)."""
    return [cache.entries] if hasattr(cache, "entries") else [cache.keys, cache.values]


def tokens_of(loop_function, model, prompts=PROMPTS, count=12, sampling=GREEDY, eos=None, cache=None):
    steps = list(loop_function(model, prompts, count, sampling, eos, cache))
    return [step.tokens.tolist() for step in steps], [step.alive.tolist() for step in steps], steps


@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_equal_the_eager_loop(name):
    """fp32, greedy, ragged prompts: the same tokens, the same routing, the same cache."""
    model = make_model(name)
    expected, alive, slow = tokens_of(loop.decode_step_by_step, model)
    found, alive_found, fast = tokens_of(loop.decode_with_graphs, model)
    assert found == expected and alive_found == alive
    for a, b in zip(slow, fast):
        for left, right in zip(a.routings, b.routings):
            assert torch.equal(left.expert_ids[:, -1], right.expert_ids[:, -1])
            torch.testing.assert_close(left.scores[:, -1], right.scores[:, -1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(left.weights[:, -1], right.weights[:, -1], atol=1e-4, rtol=1e-4)
    assert slow[-1].cache.lengths.tolist() == fast[-1].cache.lengths.tolist()
    assert fast[-1].cache.longest == slow[-1].cache.longest
    for b, length in enumerate(slow[-1].cache.lengths.tolist()):
        for kept in zip(stored(slow[-1].cache), stored(fast[-1].cache)):
            torch.testing.assert_close(*(part[:, b, :length] for part in kept), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_equals_the_model(name):
    """The step's logits against the model's, for sequences of different lengths, one of them idle."""
    model = make_model(name)
    prompts = torch.tensor([[4, 8, 1, 7, 2], [9, 9, 3, 1, 5], [2, 6, 4, 4, 1]], device=DEVICE)
    cache, other = model.new_cache(3, 9), model.new_cache(3, 9)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], device=DEVICE)
    for each in (cache, other):
        model(prompts, cache=each, attention_mask=mask)
    active = torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE)
    new = torch.tensor([3, 1, 6], device=DEVICE)
    before = [part[:, 1].clone() for part in stored(cache)]
    logits, _ = StepModel(model)(new, active, cache)
    expected = model(new[:, None], cache=other, attention_mask=active[:, None]).logits[:, -1]
    going = active.bool()
    # Float32, and sums in another order; the logits are of order 1 to 10.
    torch.testing.assert_close(logits[going], expected[going], atol=2e-4, rtol=1e-4)
    assert cache.lengths.tolist() == other.lengths.tolist() == [6, 2, 4]
    assert all(torch.equal(part[:, 1], old) for part, old in zip(stored(cache), before))


def test_ends_of_text_growth_reset_and_other_batches():
    """One decoder through calls that end early, need more room, and change the batch up and down."""
    model = make_model()
    first = tokens_of(loop.decode_step_by_step, model)[0]
    eos = first[4][0]
    long = 1100 if DEVICE == "cuda" else 20  # more than the static cache first has room for
    calls = [
        (PROMPTS, 12),
        (PROMPTS[:1], 5),
        (PROMPTS[:3], 9),
        (PROMPTS * 2, 6),
        (PROMPTS, long),
        (PROMPTS[1:], 3),
    ]
    for prompts, count in calls:
        for end in (None, eos):
            expected = tokens_of(loop.decode_step_by_step, model, prompts, count, eos=end)
            found = tokens_of(loop.decode_with_graphs, model, prompts, count, eos=end)
            alive = expected[1]
            for step, (want, got) in enumerate(zip(expected[0], found[0])):
                living = alive[step]
                assert [t for t, on in zip(want, living) if on] == [t for t, on in zip(got, living) if on]
            assert expected[1] == found[1]
            assert expected[2][-1].cache.lengths.tolist() == found[2][-1].cache.lengths.tolist()


def test_what_the_caller_ends_is_taken_back():
    """A sequence ended from outside was already fed one token more; the cache must not keep it."""
    model = make_model()
    caches = []
    for each in (loop.decode_step_by_step, loop.decode_with_graphs):
        for made, step in enumerate(each(model, PROMPTS, 10, Sampling(0), None, None)):
            if made == 3:
                step.alive[1] = False
            if made == 5:
                step.alive[0] = False
        caches.append(step.cache)
    assert caches[0].lengths.tolist() == caches[1].lengths.tolist()
    assert caches[0].longest == caches[1].longest


def test_leaving_early_leaves_the_cache_right():
    model = make_model()
    cache = model.new_cache(len(PROMPTS), 40)
    steps = loop.decode_with_graphs(model, PROMPTS, 10, Sampling(0), None, cache)
    for _ in range(4):
        next(steps)
    steps.close()
    assert cache.lengths.tolist() == [len(p) + 3 for p in PROMPTS]
    # What follows sees a cache like any other.
    tokens = torch.tensor([[1], [2], [3], [4]], device=DEVICE)
    again = model.new_cache(len(PROMPTS), 40)
    slow = loop.decode_step_by_step(model, PROMPTS, 10, Sampling(0), None, again)
    for _ in range(4):
        next(slow)
    slow.close()
    torch.testing.assert_close(
        model(tokens, cache=cache).logits, model(tokens, cache=again).logits, atol=2e-4, rtol=1e-4
    )


def test_a_seed_gives_the_same_text_both_ways():
    model = make_model()
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.95, seed=11)
    expected = tokens_of(loop.decode_step_by_step, model, sampling=sampling)[0]
    assert tokens_of(loop.decode_with_graphs, model, sampling=sampling)[0] == expected


def test_changed_weights_are_noticed():
    model = make_model()
    tokens_of(decode, model)
    with torch.no_grad():
        model.layers[0].attention.w_dkv.weight.mul_(-1)
    expected = tokens_of(loop.decode_step_by_step, model)[0]
    assert tokens_of(decode, model)[0] == expected


def test_generate_and_stream_go_through_graphs():
    model = make_model()
    ids = [step.token for step in stream(model, PROMPTS[2], 8, temperature=0, loop_window=None)]
    expected = [row[0] for row in tokens_of(loop.decode_step_by_step, model.eval(), [PROMPTS[2]], 8)[0]]
    assert ids == expected


def test_texts_written_side_by_side_do_not_share_a_cache():
    model = make_model()
    expected = [tokens_of(loop.decode_step_by_step, model, [prompt], 6)[0] for prompt in PROMPTS[:2]]
    both = [loop.decode_with_graphs(model, [prompt], 6, GREEDY, None, None) for prompt in PROMPTS[:2]]
    found = [[], []]
    for steps in zip(*both):
        for tokens, step in zip(found, steps):
            tokens.append(step.tokens.tolist())
    assert found == expected
    assert tokens_of(loop.decode_with_graphs, model, PROMPTS[:1], 6)[0] == expected[0]


def test_the_decoder_goes_with_its_model():
    model = make_model()
    tokens_of(decode, model)
    assert model in GraphDecoder._known
    weight = weakref.ref(model.layers[0].attention.w_uk)
    del model
    gc.collect()
    assert weight() is None


def test_what_graphs_cannot_do_is_said():
    model = make_model()
    if DEVICE == "cpu":
        assert "cpu" in why_not(model, 1)
        return
    assert why_not(model, 1) is None
    assert "larger than 256" in why_not(model, 257)
    model.layers[0].attention.form = "expanded"
    assert "by hand" in why_not(model, 1)


@pytest.mark.parametrize("name", ["gqa", "mqa, dense"])
def test_a_larger_batch_than_a_dense_network_takes_at_once(name):
    """20 texts: of a model without experts, the networks are products as any other."""
    model = make_model(name)
    prompts = [[1 + n, 7, 2 * n + 3][: 1 + n % 3] for n in range(20)]
    expected = tokens_of(loop.decode_step_by_step, model, prompts, 4)[0]
    assert tokens_of(loop.decode_with_graphs, model, prompts, 4)[0] == expected


def test_heads_of_a_cache_read_like_sequences():
    """The kernel takes views: nothing is copied to put the groups in the place of sequences."""
    cache = make_model("gqa").new_cache(4, 9)
    for part in (cache, cache.first(3)):
        for x in (part.keys[1], part.values[1]):
            flat = x.transpose(1, 2).flatten(0, 1)
            assert flat.data_ptr() == x.data_ptr() and flat.shape == (2 * part.batch, 9, 10)
