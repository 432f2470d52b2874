"""MLA in both forms, the baselines, and their caches, against loops over the paper's equations in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2 import DeepSeekV2, DSV2Config, YarnScaling
from dsv2.attention import (
    GroupedQueryAttention,
    KVCache,
    LatentCache,
    MultiHeadLatentAttention,
    grouped_attention,
    mla,
    new_cache,
    plan_span,
)
from dsv2.attention.mla import absorbed_attention, absorbed_is_cheaper
from dsv2.rope import RotaryEmbedding, rotate_pairs

CPU = torch.device("cpu")
# Every width differs: hidden 14, heads 3, latent 9, plain 5, rotary 4, values 7, compressed query 11.
MLA = DSV2Config(
    vocab_size=29,
    hidden_size=14,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=22,
    kv_lora_rank=9,
    qk_nope_head_dim=5,
    qk_rope_head_dim=4,
    v_head_dim=7,
    n_routed_experts=0,
    initializer_range=0.4,
    rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=64, mscale=0.9, mscale_all_dim=0.5),
)
KINDS = {
    "mla": MLA,
    "mla, compressed queries": MLA.replace(q_lora_rank=11),
    "mha": MLA.replace(attention="mha", head_dim=6),
    "gqa": MLA.replace(attention="gqa", num_attention_heads=6, num_key_value_heads=2, head_dim=8),
    "mqa": MLA.replace(attention="mqa", head_dim=10),
}
# float32 sums of a few dozen products of order one, against float64.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


# ------------------------------------------------------------------------- the equations, written as loops


def frequencies_by_hand(dim: int, yarn: YarnScaling | None, theta: float = 10000.0) -> list[float]:
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if yarn is None:
        return plain

    def pair_turning(times):
        return (
            dim
            / 2
            * math.log(yarn.original_max_position_embeddings / (2 * math.pi * times))
            / math.log(theta)
        )

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), dim - 1)
    ramp = [min(max((i - low) / max(high - low, 0.001), 0.0), 1.0) for i in range(dim // 2)]
    return [f * (1 - r) + f / yarn.factor * r for f, r in zip(plain, ramp)]


def rope_by_hand(x: torch.Tensor, position: int, cfg: DSV2Config) -> torch.Tensor:
    """One vector turned pair by pair."""
    yarn, out = cfg.rope_scaling, x.clone()
    length = 1.0
    if yarn is not None:
        gain = 0.1 * math.log(yarn.factor)
        length = (gain * yarn.mscale + 1) / (gain * yarn.mscale_all_dim + 1)
    for i, frequency in enumerate(frequencies_by_hand(len(x), yarn)):
        c, s = length * math.cos(position * frequency), length * math.sin(position * frequency)
        out[2 * i] = c * x[2 * i] - s * x[2 * i + 1]
        out[2 * i + 1] = s * x[2 * i] + c * x[2 * i + 1]
    return out


def scale_by_hand(cfg: DSV2Config, width: int) -> float:
    yarn = cfg.rope_scaling
    root_t = 1.0 if yarn is None else 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1
    return root_t**2 / math.sqrt(width)


def rms(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / math.sqrt((x * x).mean().item() + 1e-6) * gain


def attend(query, keys, values, scale):
    """One query over a list of keys: softmax by its definition."""
    exponentials = [math.exp(scale * (query @ key).item()) for key in keys]
    return sum(e / sum(exponentials) * value for e, value in zip(exponentials, values))


def mla_by_equations(module: MultiHeadLatentAttention, x: torch.Tensor) -> torch.Tensor:
    """Equations 37-47 for every sequence, position and head; x: (batch, tokens, hidden)."""
    cfg, w = module.cfg, {name: p.detach().double() for name, p in module.named_parameters()}
    heads, plain, rotary = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    w_query = w["w_q.weight"] if cfg.q_lora_rank is None else w["w_uq.weight"]
    w_dkv, w_kr = w["w_dkv.weight"][: cfg.kv_lora_rank], w["w_dkv.weight"][cfg.kv_lora_rank :]
    out = []
    for sequence in x.double():
        keys, values, outputs = [[] for _ in range(heads)], [[] for _ in range(heads)], []
        for t, h in enumerate(sequence):
            c_q = h
            if cfg.q_lora_rank is not None:
                c_q = rms(w["w_dq.weight"] @ h, w["q_norm.weight"])  # 37
            c_kv = rms(w_dkv @ h, w["kv_norm.weight"])  # 41
            k_r = rope_by_hand(w_kr @ h, t, cfg)  # 43
            o = []
            for i in range(heads):
                rows = w_query[i * (plain + rotary) : (i + 1) * (plain + rotary)]
                q_c, q_r = rows[:plain] @ c_q, rope_by_hand(rows[plain:] @ c_q, t, cfg)  # 38, 39
                q = torch.cat((q_c, q_r))  # 40
                keys[i].append(torch.cat((w["w_uk"][i] @ c_kv, k_r)))  # 42, 44
                values[i].append(w["w_uv"][i] @ c_kv)  # 45
                o.append(attend(q, keys[i], values[i], scale_by_hand(cfg, plain + rotary)))  # 46
            outputs.append(w["w_o.weight"] @ torch.cat(o))  # 47
        out.append(torch.stack(outputs))
    return torch.stack(out)


def baseline_by_loop(module: GroupedQueryAttention, cfg: DSV2Config, x: torch.Tensor) -> torch.Tensor:
    """MHA, GQA and MQA, one query head and position at a time."""
    w = {name: p.detach().double() for name, p in module.named_parameters()}
    width, heads, sharing = cfg.baseline_head_dim, cfg.num_attention_heads, 0
    sharing = heads // (w["w_k.weight"].shape[0] // width)
    out = []
    for sequence in x.double():
        outputs = []
        for t, h in enumerate(sequence):
            o = []
            for i in range(heads):
                own, shared = (slice(n * width, (n + 1) * width) for n in (i, i // sharing))
                q = rope_by_hand(w["w_q.weight"][own] @ h, t, cfg)
                past = range(t + 1)
                keys = [rope_by_hand(w["w_k.weight"][shared] @ sequence[j], j, cfg) for j in past]
                values = [w["w_v.weight"][shared] @ sequence[j] for j in past]
                o.append(attend(q, keys, values, scale_by_hand(cfg, width)))
            outputs.append(w["w_o.weight"] @ torch.cat(o))
        out.append(torch.stack(outputs))
    return torch.stack(out)


def by_hand(module, cfg, x):
    return mla_by_equations(module, x) if cfg.attention == "mla" else baseline_by_loop(module, cfg, x)


def draw(cfg: DSV2Config, batch: int = 2, tokens: int = 6, form: str = "auto"):
    """An attention with random weights (the norms' gains too), its input, and the span of a whole prompt."""
    torch.manual_seed(0)
    kind = MultiHeadLatentAttention if cfg.attention == "mla" else GroupedQueryAttention
    module = kind(cfg, 1)
    for p in module.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.4)
    if cfg.attention == "mla":
        module.form = form
    x = torch.randn(batch, tokens, cfg.hidden_size)
    return module, x, whole(cfg, batch, tokens)


def whole(cfg, batch, tokens, cache=None, mask=None):
    span = plan_span(batch, tokens, CPU, cache, mask)
    rotated = cfg.qk_rope_head_dim if cfg.attention == "mla" else cfg.baseline_head_dim
    span.cos, span.sin = RotaryEmbedding(rotated, cfg.rope_theta, cfg.rope_scaling)(span.positions)
    return span


# ------------------------------------------------------------------------------------- one computation


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
@pytest.mark.parametrize("name", ["mla", "mla, compressed queries"])
def test_both_forms_compute_the_equations(name, form):
    cfg = KINDS[name]
    module, x, span = draw(cfg, form=form)
    torch.testing.assert_close(module(x, span), mla_by_equations(module, x).float(), **CLOSE)


def test_equations_without_yarn():
    cfg = MLA.replace(rope_scaling=None)
    for form in ("expanded", "absorbed"):
        module, x, span = draw(cfg, form=form)
        torch.testing.assert_close(module(x, span), mla_by_equations(module, x).float(), **CLOSE)


@pytest.mark.parametrize("name", ["mha", "gqa", "mqa"])
def test_baselines_compute_what_a_loop_does(name):
    module, x, span = draw(KINDS[name])
    torch.testing.assert_close(module(x, span), baseline_by_loop(module, KINDS[name], x).float(), **CLOSE)


def other_heads_up_projection(q_nope, w_uk, right=mla.absorb_query):
    return right(q_nope, w_uk.roll(1, dims=0))


def next_heads_values(o_latent, w_uv, right=mla.expand_output):
    return right(o_latent, w_uv.roll(1, dims=0))


def keys_without_positions(latent, k_rope, w_uk, w_uv, right=mla.expand_keys_values):
    return right(latent, torch.zeros_like(k_rope), w_uk, w_uv)


def rotary_part_unscaled(q_latent, q_rope, latent, k_rope, scale, mask=None, right=mla.absorbed_attention):
    return right(q_latent, q_rope / scale, latent, k_rope, scale, mask)


def mask_forgotten(q_latent, q_rope, latent, k_rope, scale, mask=None, right=mla.absorbed_attention):
    return right(q_latent, q_rope, latent, k_rope, scale, None)


def turned_the_other_way(x, cos, sin):
    return rotate_pairs(x, cos, sin * torch.tensor([1.0, -1.0]))


PLANTED = [
    ("absorbed", "absorb_query", other_heads_up_projection),
    ("absorbed", "expand_output", next_heads_values),
    ("absorbed", "absorbed_attention", rotary_part_unscaled),
    ("absorbed", "absorbed_attention", mask_forgotten),
    ("expanded", "expand_keys_values", keys_without_positions),
    ("expanded", "rotate_pairs", turned_the_other_way),
    ("absorbed", "rotate_pairs", turned_the_other_way),
    ("expanded", "softmax_scale", lambda cfg: cfg.qk_nope_head_dim**-0.5),
    ("absorbed", "LATENT_NORM_EPS", 0.5),
]


@pytest.mark.parametrize("form, name, wrong", PLANTED, ids=lambda p: getattr(p, "__name__", str(p)))
def test_planted_bugs_are_caught(form, name, wrong, monkeypatch):
    monkeypatch.setattr(mla, name, wrong)
    module, x, span = draw(KINDS["mla, compressed queries"], form=form)
    assert (module(x, span) - mla_by_equations(module, x)).abs().max() > 1e-2


def test_a_wrong_sharing_of_heads_is_caught():
    """Query heads 0..2 share the first key/value head; interleaved sharing is the classic mistake."""
    module, x, span = draw(KINDS["gqa"])
    interleaved = module.w_q.weight.unflatten(0, (3, 2, -1)).transpose(0, 1).flatten(0, 2)
    module.w_q.weight.data = interleaved.contiguous()
    found = module(x, span)
    module.w_q.weight.data = interleaved.unflatten(0, (2, 3, -1)).transpose(0, 1).flatten(0, 2).contiguous()
    assert (found - baseline_by_loop(module, KINDS["gqa"], x)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mla", "mla, compressed queries"])
def test_gradients_of_both_forms_are_equal(name):
    gradients = {}
    for form in ("expanded", "absorbed"):
        module, x, span = draw(KINDS[name], form=form)
        x.requires_grad_()
        (module(x, span) * torch.linspace(-1, 1, 2 * 6 * 14).view(2, 6, 14)).sum().backward()
        gradients[form] = {"x": x.grad, **{n: p.grad for n, p in module.named_parameters()}}
    for key, gradient in gradients["expanded"].items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(gradients["absorbed"][key], gradient, **CLOSE, msg=lambda m, k=key: k + m)


def test_an_unknown_form_is_refused():
    module, x, span = draw(MLA, form="folded")
    with pytest.raises(ValueError, match="form='folded'.*auto, expanded, absorbed"):
        module(x, span)


def test_auto_expands_a_prompt_and_absorbs_a_step(monkeypatch):
    called = []
    monkeypatch.setattr(mla, "absorb_query", lambda *a, right=mla.absorb_query: called.append(1) or right(*a))
    model = DeepSeekV2(MLA).eval()
    tokens = torch.randint(29, (1, 12))
    model(tokens)
    cache = model.new_cache(1, 12)
    model(tokens[:, :11], cache=cache)
    assert not called
    model(tokens[:, 11:], cache=cache)
    assert len(called) == MLA.num_hidden_layers


# ------------------------------------------------------------------------------------------- the choice


def test_where_the_absorbed_form_starts_to_pay():
    """V2: 576 + 512 against 192 + 128 per head, query and key; recovery takes 512 * (128 + 128) per key."""
    full = DSV2Config.preset("full")

    def multiply_adds(tokens, keys):
        absorbed = sum(576 + 512 for _ in range(tokens)) * keys + tokens * (128 * 512 + 512 * 128)
        return absorbed, tokens * keys * (192 + 128) + keys * 512 * (128 + 128)

    for tokens in (1, 2, 16, 169, 170, 171, 172, 4096):
        for keys in (tokens, tokens + 1, tokens + 100, 10_000, 10_000_000):
            absorbed, expanded = multiply_adds(tokens, keys)
            assert absorbed_is_cheaper(full, tokens, keys) == (absorbed < expanded)
    assert absorbed_is_cheaper(full, 170, 10**6) and not absorbed_is_cheaper(full, 171, 10**9)
    assert absorbed_is_cheaper(full, 1, 2) and not absorbed_is_cheaper(full, 4096, 4096)


# ----------------------------------------------------------------------------------------------- caches


def new_model(cfg: DSV2Config) -> DeepSeekV2:
    torch.manual_seed(1)
    return DeepSeekV2(cfg).eval()


def ids(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(29, (batch, tokens), generator=torch.Generator().manual_seed(2))


def stores(cache) -> list[torch.Tensor]:
    return [cache.entries] if isinstance(cache, LatentCache) else [cache.keys, cache.values]


every_kind = pytest.mark.parametrize("cfg", KINDS.values(), ids=KINDS)


@every_kind
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(cfg, data):
    chunks = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    model, tokens = new_model(cfg), ids(2, sum(chunks))
    cache = model.new_cache(2, sum(chunks))
    parts = [model(part, cache=cache).logits for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits.detach(), **CLOSE)
    assert cache.longest == sum(chunks) and cache.lengths.tolist() == [sum(chunks)] * 2


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_both_forms_over_a_cache(form):
    model, tokens = new_model(MLA), ids(2, 9)
    expected = model(tokens).logits
    for block in model.layers:
        block.attention.form = form
    cache = model.new_cache(2, 9)
    parts = [model(part, cache=cache).logits for part in tokens.split([4, 3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected.detach(), **CLOSE)


def padded(prompts: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(p) for p in prompts)
    tokens = torch.full((len(prompts), width), 13)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        tokens[row, place], mask[row, place] = prompt, True
    return tokens, mask


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batches_equal_each_sequence_alone(cfg, side):
    """Prompts of 2, 7 and 4 tokens, then 3 more each one by one, then chunks of 1, 0 and 3."""
    model, texts = new_model(cfg), [ids(1, 20)[0], ids(2, 20)[1], ids(3, 20)[2]]
    lengths = [2, 7, 4]
    cache = model.new_cache(3, 14)

    def alone(row, end):
        return model(texts[row][None, :end]).logits[0].detach()

    tokens, mask = padded([t[:n] for t, n in zip(texts, lengths)], side)
    without = model(tokens, attention_mask=mask).logits.detach()
    within = model(tokens, attention_mask=mask, cache=cache).logits
    for row, n in enumerate(lengths):
        torch.testing.assert_close(within[row][mask[row]], alone(row, n), **CLOSE)
        torch.testing.assert_close(without[row][mask[row]], alone(row, n), **CLOSE)
    assert cache.lengths.tolist() == lengths and cache.longest == 7 and not cache.equal_lengths

    for _ in range(3):
        step = torch.stack([t[n : n + 1] for t, n in zip(texts, lengths)])
        logits = model(step, cache=cache).logits
        lengths = [n + 1 for n in lengths]
        for row, n in enumerate(lengths):
            torch.testing.assert_close(logits[row, 0], alone(row, n)[-1], **CLOSE)
    assert cache.lengths.tolist() == lengths

    more = [1, 0, 3]
    tokens, mask = padded([t[n : n + m] for t, n, m in zip(texts, lengths, more)], side)
    logits = model(tokens, attention_mask=mask.int(), cache=cache).logits
    assert logits.isfinite().all()
    for row, (n, m) in enumerate(zip(lengths, more)):
        if m:
            torch.testing.assert_close(logits[row][mask[row]], alone(row, n + m)[n:], **CLOSE)
    assert cache.lengths.tolist() == [6, 10, 10] and cache.longest == 10


@every_kind
def test_a_span_of_padding_alone_adds_nothing(cfg):
    model, tokens = new_model(cfg), ids(2, 4)
    cache = model.new_cache(2, 4)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert model(tokens[:, :3], cache=cache, attention_mask=nothing).logits.isfinite().all()
    assert cache.lengths.tolist() == [0, 0] and cache.longest == 0
    torch.testing.assert_close(model(tokens, cache=cache).logits, model(tokens).logits.detach(), **CLOSE)


@every_kind
def test_ragged_lengths_may_meet_again(cfg):
    model, tokens = new_model(cfg), ids(2, 6)
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    cache = model.new_cache(2, 6)
    model(tokens[:, :4], attention_mask=mask, cache=cache)
    mask = torch.tensor([[True, True], [False, True]])
    model(torch.stack((tokens[0, 3:5], tokens[1, 3:5])), attention_mask=mask, cache=cache)
    assert cache.equal_lengths and cache.lengths.tolist() == [5, 5]
    logits = model(tokens[:, 5:], cache=cache).logits[:, 0]
    torch.testing.assert_close(logits, model(tokens).logits[:, -1].detach(), **CLOSE)


@every_kind
def test_the_fast_path_equals_the_ragged_one(cfg):
    model, tokens = new_model(cfg), ids(2, 9)
    fast, ragged = model.new_cache(2, 9), model.new_cache(2, 9)
    for part in tokens.split([4, 1, 3, 1], dim=1):
        ragged.equal_lengths = False
        assert plan_span(2, part.shape[1], CPU, ragged).start is None
        assert plan_span(2, part.shape[1], CPU, fast).start is not None
        torch.testing.assert_close(
            model(part, cache=ragged).logits, model(part, cache=fast).logits, atol=1e-6, rtol=1e-5
        )
    for one, other in zip(stores(fast), stores(ragged)):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_cache_held_before_never_matters(cfg, side):
    """Large finite rubbish in every slot: what lies beyond a sequence's length has no weight at all."""
    model = new_model(cfg)
    cache, fresh = model.new_cache(2, 8), model.new_cache(2, 8)
    model(ids(2, 8), cache=cache, attention_mask=torch.arange(8) < torch.tensor([[8], [6]]))
    assert not cache.equal_lengths
    for store in stores(cache):
        store.fill_(1e6)
    cache.reset()
    assert cache.lengths.tolist() == [0, 0] and cache.longest == 0 and cache.equal_lengths
    tokens, mask = padded([ids(1, 3)[0], ids(1, 5)[0]], side)
    for inputs in ({"tokens": tokens, "attention_mask": mask}, {"tokens": ids(2, 1)}, {"tokens": ids(2, 2)}):
        step = {"attention_mask": None, **inputs}
        found, expected = (
            model(step["tokens"], attention_mask=step["attention_mask"], cache=c).logits
            for c in (cache, fresh)
        )
        real = step["attention_mask"] if step["attention_mask"] is not None else torch.ones(2, 1).bool()
        real = real.expand(found.shape[:2])
        assert torch.equal(found[real], expected[real])


@every_kind
def test_too_small_a_cache_says_so_and_stays_usable(cfg):
    model, tokens = new_model(cfg), ids(2, 6)
    cache = model.new_cache(2, 5)
    model(tokens[:, :4], cache=cache)
    with pytest.raises(ValueError, match=r"max_tokens=5 .* 6 are needed.*max_tokens=6"):
        model(tokens[:, 4:], cache=cache)
    with pytest.raises(ValueError, match="6 are needed"):
        model(tokens[:, 4:], cache=cache, attention_mask=torch.tensor([[True, False], [True, True]]))
    assert cache.lengths.tolist() == [4, 4] and cache.longest == 4
    logits = model(tokens[:, 4:5], cache=cache).logits
    torch.testing.assert_close(logits[:, 0], model(tokens[:, :5]).logits[:, -1].detach(), **CLOSE)


@every_kind
def test_a_cache_for_another_batch_or_attention_is_refused(cfg):
    model = new_model(cfg)
    with pytest.raises(ValueError, match="holds 3 sequences, but the cache was made for 2"):
        model(ids(3, 4), cache=model.new_cache(2, 5))
    other = KINDS["mha"] if cfg.attention == "mla" else MLA
    with pytest.raises(ValueError, match="needs a (LatentCache|KVCache); got a"):
        model(ids(2, 4), cache=new_cache(other, 2, 5))


@every_kind
def test_a_cache_is_as_large_as_asked_and_no_larger(cfg):
    cache = new_cache(cfg, batch=3, max_tokens=17, dtype=torch.float64)
    assert isinstance(cache, LatentCache if cfg.attention == "mla" else KVCache)
    per_token = 9 + 4 if cfg.attention == "mla" else 2 * cfg.kv_heads * cfg.baseline_head_dim
    assert cache.elements_per_token == 2 * per_token
    assert cache.bytes_per_token == 8 * 2 * per_token
    bases = {(s._base if s._base is not None else s).data_ptr(): s for s in stores(cache)}
    allocated = sum(s.untyped_storage().nbytes() for s in bases.values())
    assert cache.nbytes == 3 * 17 * cache.bytes_per_token == allocated
    assert "batch=3, tokens=0/17" in repr(cache)
    for batch, tokens, word in ((0, 4, "batch=0"), (3, 0, "max_tokens=0")):
        with pytest.raises(ValueError, match=word):
            new_cache(cfg, batch, tokens)


def test_latent_and_rotary_key_are_what_the_cache_holds():
    model, tokens = new_model(MLA), ids(2, 5)
    cache = model.new_cache(2, 6)
    model(tokens, cache=cache)
    span = whole(MLA, 2, 5)
    latent, k_rope = model.layers[0].attention.compress(
        model.layers[0].attention_norm(model.embed(tokens)), span
    )
    assert cache.latent.shape == (2, 2, 6, 9) and cache.k_rope.shape == (2, 2, 6, 4)
    torch.testing.assert_close(cache.latent[0, :, :5], latent.detach())
    torch.testing.assert_close(cache.k_rope[0, :, :5], k_rope.detach())
    assert cache.entries[:, :, 5:].eq(0).all()
    assert cache.latent.data_ptr() == cache.entries.data_ptr(), "views, not copies"


@every_kind
def test_truncating_forgets_the_end(cfg):
    model, tokens = new_model(cfg), ids(2, 9)
    cache = model.new_cache(2, 9)
    model(tokens, cache=cache)
    cache.truncate(4)
    assert cache.lengths.tolist() == [4, 4] and cache.longest == 4
    logits = model(tokens[:, 4:6], cache=cache).logits
    torch.testing.assert_close(logits, model(tokens[:, :6]).logits[:, 4:].detach(), **CLOSE)
    with pytest.raises(ValueError, match="tokens=-1"):
        cache.truncate(-1)


@every_kind
def test_a_cache_of_another_type_than_the_model(cfg):
    """Kept in bf16, computed in float32: bf16's three digits are the difference."""
    model, tokens = new_model(cfg), ids(2, 6)
    cache = model.new_cache(2, 6, dtype=torch.bfloat16)
    parts = [model(part, cache=cache).logits for part in tokens.split([4, 1, 1], dim=1)]
    expected = model(tokens).logits.detach()
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=0.1, rtol=0.05)
    mask = torch.tensor([[True, True], [False, True]])
    cache.reset()
    assert model(tokens[:, :2], cache=cache, attention_mask=mask).logits.isfinite().all()


# -------------------------------------------------------------------------------- functions on tensors


def test_values_narrower_and_wider_than_keys():
    """The CPU's padding of narrow values leaves no trace."""
    torch.manual_seed(0)
    for v_dim in (3, 8, 11):
        q, k, v = torch.randn(2, 5, 6, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, v_dim)
        mask = torch.rand(2, 5, 7) < 0.6
        mask[..., 0] = True
        found = grouped_attention(q, k, v, 0.3, mask)
        scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, dim=2)) * 0.3
        weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        expected = torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(2, dim=2))
        torch.testing.assert_close(found, expected, **CLOSE)


def test_absorbed_attention_weights_add_to_one():
    """Over equal latents the mixture is that latent, whatever the scores and the mask."""
    torch.manual_seed(0)
    q_latent, q_rope = torch.randn(2, 3, 5, 9), torch.randn(2, 3, 5, 4)
    latent, k_rope = torch.randn(2, 1, 9).expand(2, 7, 9), torch.randn(2, 7, 4)
    mask = torch.rand(1, 3, 7) < 0.5
    mask[..., 0] = True
    out = absorbed_attention(q_latent, q_rope, latent, k_rope, 0.3, mask)
    torch.testing.assert_close(out, latent[:, :1, None].expand(2, 3, 5, 9), **CLOSE)
