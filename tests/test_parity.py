"""The model computes what transformers computes, on the same random weights.

transformers >= 5.15 is the reference: earlier versions leave out YaRN's temperature in the attention logits
(github.com/huggingface/transformers/pull/47435), and so differ from the released model.

Tolerance: 1e-4 absolute, for float32 logits with a standard deviation of 1 to 2. Both sides sum the same
products in another order: measured 7e-6 to 3e-5 over these configurations. Every planted bug below moves some
logit by more than ten times the tolerance (measured: 3 and more).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5.15", reason="parity needs transformers >= 5.15 (requirements-test.txt)"
)

from transformers.models.deepseek_v2 import modeling_deepseek_v2  # noqa: E402

from dsv2 import DeepSeekV2, DSV2Config  # noqa: E402
from dsv2.hf import checkpoint_layout, load_pretrained  # noqa: E402

TOLERANCE = 1e-4
ROUTING_MARGIN = 1e-5  # softmax affinities of the two sides differ by about 1e-7

LITE = {  # V2-Lite in small: no q_lora, greedy, one dense layer, YaRN as released
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "moe_intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "max_position_embeddings": 163840,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def yarn(mscale: float, mscale_all_dim: float, original: int = 16) -> dict:
    """YaRN with a trained context so short that the tests' positions lie beyond it."""
    changes = {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    return {**LITE["rope_parameters"], **changes, "original_max_position_embeddings": original}


FULL = {  # V2 in small: q_lora, device-limited routing, expert outputs times 16
    **LITE,
    "q_lora_rank": 24,
    "n_routed_experts": 12,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 16.0,
}
CONFIGS = {
    "lite": LITE,
    "full": FULL,
    "no_yarn": {**LITE, "rope_parameters": PLAIN_ROPE},
    "yarn_0707": {**FULL, "rope_parameters": yarn(0.707, 0.707)},
    "yarn_1": {**LITE, "rope_parameters": yarn(1.0, 1.0)},
    "yarn_unequal": {**LITE, "rope_parameters": yarn(0.707, 1.0)},
    "all_different": {
        **FULL,
        "vocab_size": 157,
        "hidden_size": 72,
        "intermediate_size": 94,
        "moe_intermediate_size": 26,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "q_lora_rank": 44,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 14,
        "qk_rope_head_dim": 10,
        "v_head_dim": 18,
        "n_routed_experts": 15,
        "n_shared_experts": 1,
        "num_experts_per_tok": 5,
        "n_group": 3,
        "topk_group": 2,
        "first_k_dense_replace": 2,
        "routed_scaling_factor": 2.5,
        "rope_parameters": yarn(0.707, 0.707, original=21),
    },
    "odd": {
        **LITE,
        "vocab_size": 101,
        "hidden_size": 35,
        "intermediate_size": 29,
        "moe_intermediate_size": 17,
        "num_attention_heads": 5,
        "q_lora_rank": 9,
        "kv_lora_rank": 13,
        "qk_nope_head_dim": 7,
        "qk_rope_head_dim": 6,
        "v_head_dim": 11,
        "n_routed_experts": 7,
        "n_shared_experts": 3,
        "rope_parameters": yarn(1.0, 1.0, original=13),
    },
    "square": {**FULL, "qk_nope_head_dim": 32, "v_head_dim": 32},  # N = V = C: a transposed W^UK fits
    "tied": {**LITE, "tie_word_embeddings": True, "first_k_dense_replace": 0},
}


@dataclass
class Pair:
    """transformers' model, the directory it wrote, tokens without near ties in their routing, its logits."""

    reference: torch.nn.Module
    directory: str
    tokens: torch.Tensor  # (2, 41), or as asked
    logits: torch.Tensor

    def load(self) -> DeepSeekV2:
        return load_pretrained(self.directory)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights at which every part matters; the default initialisation gives flat routers and tiny logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise if not model.config.tie_word_embeddings else noise / 6)
            else:
                gain = 2.0 if name.endswith("mlp.gate.weight") else 1.4
                parameter.copy_(noise * gain / math.sqrt(parameter.shape[-1]))


def routing_margin(model: DeepSeekV2, tokens: torch.Tensor) -> float:
    """The smallest gap between a chosen expert, or device, and the best one left out."""
    cfg, gaps = model.cfg, [1.0]
    for routing in model(tokens).routings:
        allowed = routing.scores
        if cfg.topk_method == "group_limited_greedy":
            devices = routing.scores.unflatten(-1, (cfg.n_group, -1)).amax(-1)
            best = devices.sort(descending=True).values
            gaps.append(float((best[..., cfg.topk_group - 1] - best[..., cfg.topk_group]).min()))
            on_best = devices >= best[..., cfg.topk_group - 1, None]
            allowed = allowed.masked_fill(~on_best.repeat_interleave(cfg.experts_per_device, -1), -1)
        k = cfg.num_experts_per_tok
        best = allowed.topk(k + 1).values
        gaps.append(float((best[..., k - 1] - best[..., k]).min()))
    return min(gaps)


@pytest.fixture(scope="session", autouse=True)
def odd_widths_in_transformers():
    """Its rotation views slices as complex numbers, which fails where an odd width stands before them."""
    rotate = modeling_deepseek_v2.apply_rotary_emb

    def rotate_copies(q, k, angles):
        return rotate(q.contiguous(), k.contiguous(), angles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_deepseek_v2, "apply_rotary_emb", rotate_copies)
        yield


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Make the `Pair` of a named configuration, once."""
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            directory = str(tmp_path_factory.mktemp(name))
            config = transformers.DeepseekV2Config(**CONFIGS[name])
            reference = transformers.DeepseekV2ForCausalLM(config).eval()
            reference.set_experts_implementation("eager")  # the grouped one refuses odd widths
            for seed in range(20):
                randomise(reference, seed)
                reference.save_pretrained(directory)
                tokens = torch.randint(
                    0, CONFIGS[name]["vocab_size"], (2, 41), generator=torch.Generator().manual_seed(seed)
                )
                with torch.no_grad():
                    if routing_margin(load_pretrained(directory), tokens) > ROUTING_MARGIN:
                        break
            else:
                pytest.fail(f"{name}: near ties in the routing with every seed")
            with torch.no_grad():
                logits = reference(tokens).logits
            made[name] = Pair(reference, directory, tokens, logits)
        return made[name]

    return make


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_equal_transformers(pairs, name):
    pair = pairs(name)
    assert 0.7 < pair.logits.std() < 3, "the tolerance is meant for logits of about this size"
    assert difference(pair.load()(pair.tokens).logits, pair.logits) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_both_forms_and_every_way_of_feeding_agree(pairs, name):
    """Full forward, prefill, chunks and single tokens, expanded and absorbed: the same logits."""
    pair = pairs(name)
    model, tokens = pair.load(), pair.tokens
    for form in ("auto", "expanded", "absorbed"):
        for layer in model.layers:
            layer.attention.form = form
        assert difference(model(tokens).logits, pair.logits) < TOLERANCE
        for chunks in ([41], [13, 17, 11], [23] + [1] * 18, [1] * 41):
            cache = model.new_cache(2, max_tokens=41)
            out = torch.cat([model(part, cache=cache).logits for part in tokens.split(chunks, dim=1)], dim=1)
            assert difference(out, pair.logits) < TOLERANCE, (form, chunks)
            assert cache.longest == 41


@pytest.mark.parametrize("name", ["full", "yarn_0707", "odd"])
@torch.no_grad()
def test_cached_decoding_equals_transformers_cached_decoding(pairs, name):
    pair = pairs(name)
    model, past = pair.load(), transformers.DynamicCache(config=pair.reference.config)
    cache = model.new_cache(2, max_tokens=41)
    for part in pair.tokens.split([19] + [1] * 22, dim=1):
        theirs = pair.reference(part, past_key_values=past, use_cache=True).logits
        assert difference(model(part, cache=cache).logits, theirs) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["lite", "yarn_0707", "odd"])
@torch.no_grad()
def test_padding_on_either_side(pairs, name, side):
    """At the real tokens, and there alone, the logits of a padded batch are transformers'."""
    pair = pairs(name)
    model, tokens = pair.load(), pair.tokens.clone()
    real = torch.ones_like(tokens, dtype=torch.bool)
    padding = slice(0, 14) if side == "left" else slice(27, 41)
    real[0, padding] = False
    tokens[0, padding] = 3
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    theirs = pair.reference(tokens, attention_mask=real.long(), position_ids=positions).logits

    for mask in (real, real.long()):
        assert difference(model(tokens, attention_mask=mask).logits[real], theirs[real]) < TOLERANCE
    cache = model.new_cache(2, max_tokens=41)
    assert difference(model(tokens, cache=cache, attention_mask=real).logits[real], theirs[real]) < TOLERANCE
    assert cache.lengths.tolist() == [27, 41]
    without_padding = model(tokens[:1, real[0]]).logits[0]
    assert difference(without_padding, theirs[0, real[0]]) < TOLERANCE
    last = model(tokens, attention_mask=real, last_only=True).logits[:, 0]
    assert difference(last, torch.stack([theirs[0, real[0]][-1], theirs[1, -1]])) < TOLERANCE


@torch.no_grad()
def test_ragged_batch_decodes_as_its_sequences_would_alone(pairs):
    """Prompts of 5, 19 and 11 tokens, then 12 more each, in one cache; transformers takes them one by one."""
    pair = pairs("yarn_0707")
    model, prompts = pair.load(), (5, 19, 11)
    rows = torch.cat([pair.tokens, pair.tokens.flip(1)[:1]])
    assert routing_margin(model, rows) > ROUTING_MARGIN
    theirs = pair.reference(rows).logits
    for side in ("left", "right"):
        cache = model.new_cache(3, max_tokens=31)
        padded, real = torch.zeros(3, 19, dtype=torch.long), torch.zeros(3, 19, dtype=torch.bool)
        for i, length in enumerate(prompts):
            place = slice(19 - length, 19) if side == "left" else slice(0, length)
            padded[i, place], real[i, place] = rows[i, :length], True
        out = model(padded, cache=cache, attention_mask=real).logits
        for i, length in enumerate(prompts):
            assert difference(out[i, real[i]], theirs[i, :length]) < TOLERANCE
        for step in range(12):
            where = torch.tensor(prompts) + step
            out = model(rows.gather(1, where[:, None]), cache=cache).logits[:, 0]
            assert difference(out, theirs[torch.arange(3), where]) < TOLERANCE
        assert cache.lengths.tolist() == [17, 31, 23]


@torch.no_grad()
def test_eager_attention_and_bfloat16(pairs):
    """Against transformers' plain attention too; in bf16 as close as bf16 is to float32."""
    pair = pairs("full")
    pair.reference.set_attn_implementation("eager")
    try:
        eager = pair.reference(pair.tokens).logits
    finally:
        pair.reference.set_attn_implementation("sdpa")
    assert difference(pair.load()(pair.tokens).logits, eager) < TOLERANCE
    half = load_pretrained(pair.directory, dtype=torch.bfloat16)(pair.tokens).logits.float()
    # Some token changes an expert when rounded to three digits; the typical logit stays where it was.
    assert float((half - pair.logits).abs().median()) < 0.1


@pytest.mark.parametrize("name", ["all_different", "tied"])
def test_gradients_equal_transformers(pairs, name):
    """The loss's gradient for every tensor, found through the same table as the weights."""
    pair = pairs(name)
    model, reference, tokens = pair.load(), pair.reference, pair.tokens
    reference.zero_grad()
    losses = []
    for net in (model, reference):
        logits = net(tokens).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        losses[-1].backward()
    assert abs(losses[0].item() - losses[1].item()) < TOLERANCE
    theirs, ours = dict(reference.named_parameters()), dict(model.named_parameters())
    layout = checkpoint_layout(model.cfg, fused_experts=True)
    assert set(layout) >= set(theirs) - {"lm_head.weight"}
    for tensor_name, stored in layout.items():
        if tensor_name not in theirs:  # gate and up of the dense networks are apart on both sides
            raise AssertionError(tensor_name)
        expected = theirs[tensor_name].grad.view(stored.view or stored.shape)
        for part in stored.parts:
            piece = expected[part.rows]
            # float32 sums over 80 tokens: relative to the largest entry of the tensor.
            bound = 1e-4 * float(piece.abs().max()) + 1e-7
            assert difference(ours[part.parameter].grad[part.region], piece) < bound, tensor_name
    reference.zero_grad()


@torch.no_grad()
def test_the_weights_of_every_layer_reach_the_logits(pairs):
    """No tensor of the random models is idle: parity would not see a mistake in one that is."""
    pair = pairs("full")
    model = pair.load()
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.copy_(kept.flip(0))
        assert difference(model(pair.tokens).logits, pair.logits) > 10 * TOLERANCE, name
        parameter.copy_(kept)


# ------------------------------------------------------------------------------------------- planted bugs


def _half_rotation(x, cos, sin):
    """RoPE as Llama pairs it, channel i with i + dim/2, on weights that pair neighbours."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _per_head_split_lost(model):
    """kv_b_proj read as all keys, then all values, instead of head by head."""
    for layer in model.layers:
        uk, uv = layer.attention.w_uk.data, layer.attention.w_uv.data
        rows = torch.cat((uk, uv), dim=1).flatten(0, 1)
        layer.attention.w_uk.data = rows[: uk.shape[0] * uk.shape[1]].view_as(uk)
        layer.attention.w_uv.data = rows[uk.shape[0] * uk.shape[1] :].view_as(uv)


def _for_each(change):
    def apply(model):
        for layer in model.layers:
            change(layer)

    return apply


def _transpose(layer):
    layer.attention.w_uk.data = layer.attention.w_uk.data.mT.contiguous()


def _swap_halves(layer):
    for name, parameter in layer.ffn.named_parameters():
        if "w_gate_up" in name:
            parameter.data = torch.cat(parameter.data.chunk(2, dim=-2)[::-1], dim=-2)


def _rope_first(layer):
    """Heads of q with the rotary rows before the plain ones."""
    cfg, w = layer.attention.cfg, layer.attention.w_uq.weight
    heads = w.data.unflatten(0, (cfg.num_attention_heads, -1))
    w.data = torch.cat(heads.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], dim=1)[::-1], 1).flatten(
        0, 1
    )


def _temperature_on_rotary_vectors(model):
    """mscale put on cos and sin, where it misses the part without positions."""
    temperature = 0.1 * 0.707 * math.log(40) + 1
    model.rotary.length *= temperature
    for layer in model.layers:
        layer.attention.scale /= temperature**2


def _set_scale(change):
    def apply(model):
        for layer in model.layers:
            layer.attention.scale *= change(model.cfg)

    return apply


def _replace_config(**changes):
    def apply(model):
        for layer in model.layers[model.cfg.first_k_dense_replace :]:
            layer.ffn.router.cfg = model.cfg.replace(**changes)

    return apply


def _skip_shared(layer):
    if hasattr(layer.ffn, "shared"):
        layer.ffn.shared = None


def _normalise_rotary_key(model):
    for layer in model.layers:
        compress = layer.attention.compress

        def normalised(x, span, compress=compress):
            latent, k_rope = compress(x, span)
            return latent, torch.nn.functional.rms_norm(k_rope, k_rope.shape[-1:])

        layer.attention.compress = normalised


def _without_yarn_frequencies(model):
    model.rotary.frequencies = 10000.0 ** -(torch.arange(0, 8, 2) / 8)


def _skip_latent_norm(layer):
    layer.attention.kv_norm = torch.nn.Identity()


def _cut_temperature(cfg):
    return (0.1 * cfg.rope_scaling.mscale_all_dim * math.log(cfg.rope_scaling.factor) + 1) ** -2


BUGS = {
    "mscale squared missing": _set_scale(_cut_temperature),
    "mscale not squared": _set_scale(lambda cfg: math.sqrt(_cut_temperature(cfg))),
    "scale without the rotary channels": _set_scale(lambda c: math.sqrt(c.qk_head_dim / c.qk_nope_head_dim)),
    "temperature on cos and sin": _temperature_on_rotary_vectors,
    "YaRN's frequencies missing": _without_yarn_frequencies,
    "rotary key normalised": _normalise_rotary_key,
    "latent not normalised": _for_each(_skip_latent_norm),
    "W^UK transposed": _for_each(_transpose),
    "kv_b_proj not split per head": _per_head_split_lost,
    "rotary rows first": _for_each(_rope_first),
    "gate and up swapped": _for_each(_swap_halves),
    "shared experts left out": _for_each(_skip_shared),
    "weights not scaled": _replace_config(routed_scaling_factor=1.0),
    "weights normalised": _replace_config(norm_topk_prob=True),
    "devices not limited": _replace_config(topk_method="greedy"),
    "one expert too few": _replace_config(num_experts_per_tok=2),
}


@pytest.mark.parametrize("bug", BUGS)
@torch.no_grad()
def test_parity_catches(pairs, bug):
    pair = pairs("square" if "transposed" in bug else "yarn_0707")
    model = pair.load()
    BUGS[bug](model)
    assert difference(model(pair.tokens).logits, pair.logits) > 10 * TOLERANCE


@torch.no_grad()
def test_parity_catches_half_rotation(pairs, monkeypatch):
    pair = pairs("yarn_0707")
    monkeypatch.setattr("dsv2.attention.mla.rotate_pairs", _half_rotation)
    assert difference(pair.load()(pair.tokens).logits, pair.logits) > 10 * TOLERANCE


@torch.no_grad()
def test_parity_catches_masking_with_zero(pairs, monkeypatch):
    """A score of 0 is an average score, not a forbidden one."""
    pair = pairs("yarn_0707")
    model = pair.load()
    monkeypatch.setattr("torch.inf", 0.0)
    for layer in model.layers:
        layer.attention.form = "absorbed"
    assert difference(model(pair.tokens).logits, pair.logits) > 10 * TOLERANCE


@torch.no_grad()
def test_forbidden_experts_stay_forbidden_where_affinities_underflow():
    """Here transformers is not followed: it masks with 0, and an allowed affinity can be 0 as well."""
    fields = {**FULL, "num_experts_per_tok": 6, "topk_method": "group_limited_greedy"}
    config = transformers.DeepseekV2Config(**fields)
    cfg = DSV2Config.from_hf(config.to_dict() | {"model_type": "deepseek_v2"})
    torch.manual_seed(0)
    model = DeepSeekV2(cfg).eval()
    for layer in model.layers[1:]:
        layer.ffn.router.weight.normal_(std=200.0)
    for routing in model(torch.arange(37)[None]).routings:
        assert float(routing.scores.min()) == 0.0
        devices = routing.expert_ids // cfg.experts_per_device
        assert max(len(set(token)) for token in devices.flatten(0, 1).tolist()) <= cfg.topk_group
