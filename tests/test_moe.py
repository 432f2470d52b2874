"""Routing, token dropping and the experts, against loops over single tokens."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2 import DSV2Config
from dsv2.moe import (
    DeepSeekMoE,
    RoutedExperts,
    Router,
    Routing,
    balance_loss,
    device_limited_top_k,
    drop_tokens,
    load_imbalance,
    top_k,
)
from dsv2.moe import layer as moe_layer
from dsv2.moe.experts import run_grouped, run_sorted
from dsv2.moe.routing import allowed_experts, expert_affinity

# Sizes differ: 2 sequences, 7 tokens, 10 hidden, 12 experts on 4 devices, 5 chosen on at most 3, width 6.
CFG = DSV2Config(
    vocab_size=31,
    hidden_size=10,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=14,
    n_routed_experts=12,
    n_shared_experts=3,
    num_experts_per_tok=5,
    moe_intermediate_size=6,
    topk_method="group_limited_greedy",
    n_group=4,
    topk_group=3,
    routed_scaling_factor=2.5,
)
BATCH, TOKENS = 2, 7
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums of some dozen products of order one


def draw_scores(seed: int = 0, shape=(BATCH, TOKENS, 12), spread: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator)).softmax(dim=-1)


def with_weights(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


# ------------------------------------------------------------------------------------------------ routing


def route_by_hand(scores: list[float], k: int, devices: int, reach: int) -> list[int]:
    """Section 2.2.2 for one token: the devices with the best experts, then the best experts on them."""
    size = len(scores) // devices
    homes = [list(range(d * size, (d + 1) * size)) for d in range(devices)]
    best = sorted(homes, key=lambda home: -max(scores[e] for e in home))[:reach]
    return sorted((e for home in best for e in home), key=lambda e: -scores[e])[:k]


def test_device_limited_routing_token_by_token():
    scores = draw_scores()
    routing = device_limited_top_k(scores, 5, 4, 3)
    for b in range(BATCH):
        for t in range(TOKENS):
            chosen = route_by_hand(scores[b, t].tolist(), 5, 4, 3)
            assert routing.expert_ids[b, t].tolist() == chosen
            assert routing.weights[b, t].tolist() == [scores[b, t, e].item() for e in chosen]
    assert routing.scores is scores and routing.kept is None and routing.n_experts == 12


def test_other_ways_to_rank_devices_choose_differently():
    """V3's sum of the two best and the mean are not what V2 does, and the comparison above would notice."""
    scores = draw_scores()
    by_device = scores.unflatten(-1, (4, 3))
    right = allowed_experts(scores, 4, 3)
    for wrong in (by_device.topk(2, dim=-1).values.sum(-1), by_device.mean(-1)):
        chosen = torch.zeros(BATCH, TOKENS, 4, dtype=torch.bool).scatter(-1, wrong.topk(3).indices, True)
        assert not torch.equal(chosen.repeat_interleave(3, dim=-1), right)


def test_plain_top_k_token_by_token():
    scores = draw_scores()
    routing = top_k(scores, 5)
    for b in range(BATCH):
        for t in range(TOKENS):
            best = sorted(range(12), key=lambda e: -scores[b, t, e])[:5]
            assert routing.expert_ids[b, t].tolist() == best
    assert not torch.equal(routing.expert_ids, device_limited_top_k(scores, 5, 4, 2).expert_ids)


@st.composite
def routings(draw):
    devices, size = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    reach = draw(st.integers(1, devices))
    k = draw(st.integers(1, reach * size))
    # A spread of 300 underflows most affinities to exactly 0, where a mask of 0 would go wrong.
    spread = draw(st.sampled_from([0.0, 1.0, 30.0, 300.0]))
    scores = draw_scores(draw(st.integers(0, 10**6)), (2, 3, devices * size), spread)
    return scores, k, devices, reach


@given(routings())
def test_a_token_reaches_at_most_m_devices(drawn):
    scores, k, devices, reach = drawn
    ids = device_limited_top_k(scores, k, devices, reach).expert_ids
    size = scores.shape[-1] // devices
    for token, affinity in zip(ids.flatten(0, 1).tolist(), scores.flatten(0, 1)):
        assert len(set(token)) == k, "all chosen experts differ"
        assert len({e // size for e in token}) <= reach
        assert affinity[token[0]] == affinity.max(), "the best expert is chosen, and stands first"
        chosen = affinity[token].tolist()
        assert chosen == sorted(chosen, reverse=True)


def test_underflowed_affinities_do_not_open_forbidden_devices():
    """Two experts on the best device, the second with affinity 0; experts elsewhere are 0 too."""
    scores = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]])
    ids = device_limited_top_k(scores, 2, 3, 1).expert_ids
    assert sorted(ids.flatten().tolist()) == [4, 5]
    filled_with_zero = scores * allowed_experts(scores, 3, 1)
    assert sorted(filled_with_zero.topk(2).indices.flatten().tolist()) != [4, 5], "what 0 would have done"


def test_all_devices_allowed_is_plain_top_k():
    scores = draw_scores()
    assert torch.equal(device_limited_top_k(scores, 5, 4, 4).expert_ids, top_k(scores, 5).expert_ids)


def test_affinity_is_a_softmax_in_float32():
    torch.manual_seed(0)
    x, centroids = torch.randn(BATCH, TOKENS, 10), torch.randn(12, 10)
    scores = expert_affinity(x, centroids)
    for i in range(12):
        logits = [(x[1, 3].double() @ centroids[e].double()).item() for e in range(12)]
        expected = math.exp(logits[i]) / sum(map(math.exp, logits))
        assert scores[1, 3, i].item() == pytest.approx(expected, rel=1e-5)
    half = expert_affinity(x.bfloat16(), centroids.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, expert_affinity(x.bfloat16().float(), centroids.bfloat16().float()))


@pytest.mark.parametrize(
    "changes, weight",
    [
        ({}, lambda s: 2.5 * s),
        ({"routed_scaling_factor": 1.0}, lambda s: s),
        ({"topk_method": "greedy"}, lambda s: 2.5 * s),
        ({"norm_topk_prob": True}, lambda s: s / s.sum(dim=-1, keepdim=True)),  # instead of scaling
    ],
)
def test_weights_are_scaled_or_normalised(changes, weight):
    router = with_weights(Router(CFG.replace(**changes)))
    routing = router(torch.randn(BATCH, TOKENS, 10))
    chosen = routing.scores.gather(-1, routing.expert_ids)
    torch.testing.assert_close(routing.weights, weight(chosen))


def test_routing_counts_and_detaches():
    router = with_weights(Router(CFG))
    routing = router(torch.randn(BATCH, TOKENS, 10))
    counts = [sum(e == i for e in routing.expert_ids.flatten().tolist()) for i in range(12)]
    assert routing.load().tolist() == counts and sum(counts) == BATCH * TOKENS * 5
    assert routing.weights.requires_grad
    kept = routing.detach()
    assert not kept.weights.requires_grad and not kept.scores.requires_grad
    assert torch.equal(kept.expert_ids, routing.expert_ids)


def test_imbalance():
    assert load_imbalance(torch.tensor([4, 4, 4])) == 1.0
    assert load_imbalance(torch.tensor([9, 0, 0])) == 3.0
    assert load_imbalance(torch.tensor([0, 0])) == 0.0


# ----------------------------------------------------------------------------------------------- experts


def experts_by_hand(experts: RoutedExperts, x, expert_ids, weights, kept=None) -> torch.Tensor:
    """The second sum of equation 20, one token and expert at a time."""
    width = experts.w_down.shape[-1]
    rows = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for slot, e in enumerate(expert_ids[t].tolist()):
            if kept is None or kept[t, slot]:
                gate, up = experts.w_gate_up[e][:width] @ x[t], experts.w_gate_up[e][width:] @ x[t]
                hidden = gate * torch.sigmoid(gate) * up
                total = total + weights[t, slot] * (experts.w_down[e] @ hidden)
        rows.append(total)
    return torch.stack(rows)


LOADS = {
    "spread": lambda: top_k(draw_scores(), 5).expert_ids.flatten(0, 1),
    "one expert idle": lambda: torch.stack([torch.randperm(11)[:5] for _ in range(14)]),
    "everyone to the last": lambda: torch.full((14, 1), 11),
    "one token": lambda: torch.tensor([[7, 2]]),
}


def draw_work(name: str):
    torch.manual_seed(0)
    experts = with_weights(RoutedExperts(12, 10, 6))
    expert_ids = LOADS[name]()
    x = torch.randn(len(expert_ids), 10, requires_grad=True)
    weights = torch.rand(expert_ids.shape, requires_grad=True)
    return experts, x, expert_ids, weights


def outcome(run, experts, x, weights) -> list[torch.Tensor]:
    """The result and the gradients of everything that went in."""
    inputs = [x, weights, experts.w_gate_up, experts.w_down]
    out = run()
    slope = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * slope).sum(), inputs)]


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("name", LOADS)
def test_experts_token_by_token(name, dropping):
    experts, x, expert_ids, weights = draw_work(name)
    kept = torch.rand(expert_ids.shape) < 0.6 if dropping else None
    found = outcome(lambda: experts(x, expert_ids, weights, kept), experts, x, weights)
    expected = outcome(lambda: experts_by_hand(experts, x, expert_ids, weights, kept), experts, x, weights)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, **CLOSE)
    if dropping:
        assert found[2][~kept].eq(0).all(), "a dropped pair's weight gets no gradient"
    idle = sorted(set(range(12)) - set(expert_ids.flatten().tolist()))
    assert found[3][idle].eq(0).all() and found[4][idle].eq(0).all()


def test_planted_bugs_in_the_experts_are_caught():
    experts, x, expert_ids, weights = draw_work("spread")
    right = experts(x, expert_ids, weights)
    for wrong in (
        experts_by_hand(experts, x, (expert_ids + 1) % 12, weights),
        experts_by_hand(experts, x, expert_ids, weights.flip(1)),
        experts_by_hand(experts, x.flip(0), expert_ids, weights),
    ):
        assert (wrong - right).abs().max() > 0.1
    swapped = torch.cat(experts.w_gate_up.chunk(2, dim=1)[::-1], dim=1)
    experts.w_gate_up.data = swapped.detach()
    assert (experts_by_hand(experts, x, expert_ids, weights) - right).abs().max() > 0.1


def test_dropping_everything_leaves_zero():
    experts, x, expert_ids, weights = draw_work("spread")
    out = experts(x, expert_ids, weights, torch.zeros_like(expert_ids, dtype=torch.bool))
    assert out.eq(0).all() and out.shape == x.shape


def grouped_works_here() -> bool:
    weights = torch.zeros(2, 32, 16, dtype=torch.bfloat16)
    try:
        run_grouped(torch.zeros(3, 16, dtype=torch.bfloat16), weights, weights[:, :16], torch.tensor([1, 2]))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


@pytest.mark.skipif(not grouped_works_here(), reason="this build of torch has no grouped product on the CPU")
@pytest.mark.parametrize("load", [[3, 0, 5, 1], [0, 0, 9, 0], [9, 0, 0, 0], [1, 2, 3, 3]])
def test_grouped_and_sorted_products_agree(load):
    """bf16, whose three digits are the tolerance; the grouped product needs multiples of 8."""
    torch.manual_seed(0)
    load = torch.tensor(load)
    x = torch.randn(9, 16, dtype=torch.bfloat16, requires_grad=True)
    w_gate_up = (0.3 * torch.randn(4, 48, 16)).bfloat16().requires_grad_()
    w_down = (0.3 * torch.randn(4, 16, 24)).bfloat16().requires_grad_()
    results = []
    for run in (run_sorted, run_grouped):
        out = run(x, w_gate_up, w_down, load)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, w_gate_up, w_down])])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


def test_the_gradient_by_hand_is_autograds():
    """In float64, against finite differences; experts without rows, with one, and with several."""
    torch.manual_seed(0)
    load = torch.tensor([2, 0, 1, 4])
    x, w_gate_up, w_down = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((7, 5), (4, 6, 5), (4, 5, 3))
    )
    assert torch.autograd.gradcheck(lambda *inputs: run_sorted(*inputs, load), (x, w_gate_up, w_down))


@pytest.mark.parametrize("grad", [False, True])
def test_experts_with_few_rows_and_large_weights(grad):
    """Products turned round (1 to 8 rows) and not (9 and more), gradients of 8 MB; against float64.

    A gradient here is a sum over 9 rows, of numbers up to 4, each times a sum of 300 rounded terms; among a
    million of them 2e-5 was the largest difference, on one processor of two. A wrong row is off by more than
    0.1.
    """
    torch.manual_seed(0)
    load = torch.tensor([1, 9, 0, 8, 2, 0])
    x = torch.randn(20, 300)
    w_gate_up, w_down = torch.randn(6, 1200, 300) / 300**0.5, torch.randn(6, 300, 600) / 600**0.5
    results = []
    for dtype in (torch.float32, torch.float64):
        inputs = [given.to(dtype).requires_grad_(grad) for given in (x, w_gate_up, w_down)]
        with torch.set_grad_enabled(grad):
            out = run_sorted(*inputs, load)
        results.append([out, *(torch.autograd.grad(out.sin().sum(), inputs) if grad else ())])
    assert w_gate_up.nbytes > 2**22 and w_gate_up[0].numel() > 2**16 and w_down[0].numel() > 2**16
    for single, double in zip(*results):
        torch.testing.assert_close(single, double.float(), atol=5e-5, rtol=1e-5)
    if grad:
        assert all(slope[[2, 5]].eq(0).all() for slope in results[0][2:]), "experts without rows"
        assert all(slope.is_contiguous() and slope.data_ptr() % 64 == 0 for slope in results[0])
    swapped = [*x[1:2], *x[:1], *x[2:]]  # a planted bug: expert 0 runs on expert 1's first row
    wrong = run_sorted(torch.stack(swapped), w_gate_up, w_down, load)
    assert (wrong - results[0][0]).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------- dropping


def draw_routing(seed: int = 0, batch: int = 4, tokens: int = 9) -> Routing:
    """Scores that favour the first device, so that there is something to drop."""
    scores = (torch.randn(batch, tokens, 12, generator=torch.Generator().manual_seed(seed)) * 1.5).add(
        torch.tensor([1.5] * 3 + [0.0] * 9)
    )
    return device_limited_top_k(scores.softmax(-1), 5, 4, 3)


def drop_by_hand(routing: Routing, devices: int, factor: float, exempt, mask) -> torch.Tensor:
    """Each device keeps its exempt pairs, then the best of the others while there is room."""
    ids, size = routing.expert_ids, routing.n_experts // devices
    pairs = [
        (b, t, slot)
        for b in range(ids.shape[0])
        for t in range(ids.shape[1])
        for slot in range(ids.shape[2])
        if mask is None or mask[b, t]
    ]
    budget = math.floor(len(pairs) * factor / devices)
    kept = torch.zeros_like(ids, dtype=torch.bool)
    for device in range(devices):
        here = [p for p in pairs if ids[p] // size == device]
        first = [p for p in here if exempt is not None and exempt[p[0]]]
        others = [p for p in here if p not in first]
        others.sort(key=lambda p: -routing.scores[p[0], p[1], ids[p]].item())
        for pair in first + others[: max(budget - len(first), 0)]:
            kept[pair] = True
    return kept


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.5, 9.0]),
    exempt=st.none() | st.lists(st.booleans(), min_size=4, max_size=4),
    padding=st.booleans(),
)
def test_dropping_pair_by_pair(seed, factor, exempt, padding):
    routing = draw_routing(seed)
    exempt = None if exempt is None else torch.tensor(exempt)
    mask = None
    if padding:
        mask = torch.arange(9) < torch.tensor([[9], [1], [4], [7]])
    kept = drop_tokens(routing, 4, factor, exempt, mask)
    assert torch.equal(kept, drop_by_hand(routing, 4, factor, exempt, mask))


def test_the_budget_binds_and_is_respected():
    routing = draw_routing()
    kept = drop_tokens(routing, 4)
    devices = routing.expert_ids // 3
    budget = 4 * 9 * 5 // 4
    loads = [int((devices == d).sum()) for d in range(4)]
    assert max(loads) > budget, "the case is worth testing"
    for device, load in enumerate(loads):
        here = devices == device
        assert int((kept & here).sum()) == min(load, budget)
        affinity = routing.scores.gather(-1, routing.expert_ids)
        if load > budget:
            assert affinity[here & kept].min() >= affinity[here & ~kept].max()
    assert drop_tokens(routing, 4, 4.0).all(), "a budget for everything drops nothing"
    exempt = torch.tensor([True, False, False, True])
    assert drop_tokens(routing, 4, 0.01, exempt)[exempt].all()


def training_layer(**changes) -> DeepSeekMoE:
    layer = with_weights(DeepSeekMoE(CFG.replace(capacity_factor=0.7, **changes)))
    # One device much preferred, so that its budget is exceeded.
    layer.router.weight.data[:3] *= 2
    return layer


def test_evaluation_never_drops_and_training_does(monkeypatch):
    layer, x = training_layer(), torch.randn(8, TOKENS, 10)
    monkeypatch.setattr(moe_layer, "EXEMPT_SHARE", 0.0)
    _, routing = layer.train()(x)
    assert routing.kept is not None and not routing.kept.all()
    out, routing = layer.eval()(x)
    assert routing.kept is None
    without = with_weights(DeepSeekMoE(CFG))
    without.load_state_dict(layer.state_dict())
    torch.testing.assert_close(out, without(x)[0])


def test_exempt_sequences_keep_all_their_tokens(monkeypatch):
    monkeypatch.setattr(moe_layer, "EXEMPT_SHARE", 1.1)
    _, routing = training_layer().train()(torch.randn(8, TOKENS, 10))
    assert routing.kept.all()


def test_about_a_tenth_of_the_sequences_is_exempt(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        moe_layer, "drop_tokens", lambda *a: drawn.append(a[3]) or torch.ones_like(a[0].expert_ids).bool()
    )
    torch.manual_seed(0)
    layer = training_layer().train()
    for _ in range(10):
        layer(torch.randn(200, 1, 10))
    assert 0.08 < torch.cat(drawn).float().mean() < 0.12  # 2000 draws: 0.1 +- 3 * 0.007


# --------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 0}, {"capacity_factor": 0.7}])
def test_the_layer_is_equation_20(changes, monkeypatch):
    monkeypatch.setattr(moe_layer, "EXEMPT_SHARE", 0.0)
    cfg = CFG.replace(**changes)
    layer, x = with_weights(DeepSeekMoE(cfg)), torch.randn(BATCH, TOKENS, 10)
    out, routing = layer(x)
    flat = {"expert_ids": routing.expert_ids, "weights": routing.weights, "kept": routing.kept}
    flat = {name: None if v is None else v.flatten(0, 1) for name, v in flat.items()}
    expected = experts_by_hand(layer.experts, x.flatten(0, 1), **flat).view_as(x)
    for i in range(cfg.n_shared_experts):  # each shared expert on its own: rows and columns of the wide one
        gate, up = layer.shared.w_gate_up.weight.chunk(2)
        mine = slice(6 * i, 6 * (i + 1))
        hidden = F.silu(x @ gate[mine].T) * (x @ up[mine].T)
        expected = expected + hidden @ layer.shared.w_down.weight[:, mine].T
    torch.testing.assert_close(out, expected, **CLOSE)


def test_the_router_learns_through_the_weights():
    layer, x = with_weights(DeepSeekMoE(CFG)), torch.randn(BATCH, TOKENS, 10)
    layer(x)[0].sum().backward()
    assert layer.router.weight.grad.abs().max() > 0


# ------------------------------------------------------------ what no loss may come from, or lead to


def gradients(loss: torch.Tensor, layer: DeepSeekMoE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """By name: what `loss` asks of the layer's input, its router and its routed experts."""
    named = {"x": x, "router": layer.router.weight, **dict(layer.experts.named_parameters())}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(v) if g is None else g for (name, v), g in zip(named.items(), found)}


@pytest.mark.parametrize("padding", [False, True])
def test_a_dropped_pair_brings_no_gradient(padding, monkeypatch):
    """Neither to its expert, nor to its affinity, nor to its token: as if the pair had not been chosen."""
    monkeypatch.setattr(moe_layer, "EXEMPT_SHARE", 0.0)
    layer, x = training_layer().train(), torch.randn(BATCH, TOKENS, 10, requires_grad=True)
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [4]]) if padding else None
    out, routing = layer(x, mask)
    assert not routing.kept.all() and routing.kept.any()
    slope = torch.linspace(-1, 1, out.numel()).view_as(out)
    found = gradients((out * slope).sum(), layer, x)
    scores = expert_affinity(x, layer.router.weight)
    weights = scores.gather(-1, routing.expert_ids) * CFG.routed_scaling_factor
    asked = [part.flatten(0, 1) for part in (x, routing.expert_ids, weights)]
    dropping = experts_by_hand(layer.experts, *asked, routing.kept.flatten(0, 1)).view_as(x)
    computing_all = experts_by_hand(layer.experts, *asked).view_as(x)
    expected = gradients(((dropping + layer.shared(x)) * slope).sum(), layer, x)
    wrong = gradients(((computing_all + layer.shared(x)) * slope).sum(), layer, x)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
        assert (wrong[name] - expected[name]).abs().max() > 1e-2, "a pair that is not dropped would show"


def test_with_all_pairs_dropped_only_the_balance_loss_moves_the_router(monkeypatch):
    """The model's own loss finds no way into router or experts; f still counts what was asked for."""
    monkeypatch.setattr(moe_layer, "EXEMPT_SHARE", 0.0)
    layer, x = training_layer().train(), torch.randn(BATCH, TOKENS, 10, requires_grad=True)
    layer.device_budget = 0.0
    out, routing = layer(x)
    assert not routing.kept.any()
    torch.testing.assert_close(out, layer.shared(x), **CLOSE)
    own = gradients(out.square().sum(), layer, x)
    assert own["router"].eq(0).all() and own["w_gate_up"].eq(0).all() and own["w_down"].eq(0).all()
    assert own["x"].abs().max() > 0, "the token itself goes on, through the shared experts"
    cfg = CFG.replace(aux_loss_alpha=0.3)
    balance = gradients(balance_loss(routing, cfg), layer, x)
    assert balance["router"].abs().max() > 0
    assert balance["w_gate_up"].eq(0).all() and balance["w_down"].eq(0).all()


def test_padding_is_never_kept_and_brings_nothing(monkeypatch):
    """Not to experts or router by a real token's loss, not through the balance losses, in training."""
    monkeypatch.setattr(moe_layer, "EXEMPT_SHARE", 0.0)
    layer, x = training_layer().train(), torch.randn(BATCH, TOKENS, 10, requires_grad=True)
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [3]])
    out, routing = layer(x, mask)
    assert not routing.kept[~mask].any()
    cfg = CFG.replace(aux_loss_alpha=0.3, device_loss_alpha=0.5, communication_loss_alpha=0.7)
    found = gradients(balance_loss(routing, cfg, mask), layer, x)["x"]
    assert found[~mask].eq(0).all() and found[mask].abs().amin(dim=-1).gt(0).all()
    # What stands at padding changes nothing for the others: neither their outputs nor the balance loss.
    other = torch.where(mask[..., None], x, 5 * torch.randn(BATCH, TOKENS, 10))
    out_other, routing_other = layer(other, mask)
    torch.testing.assert_close(out_other[mask], out[mask], **CLOSE)
    torch.testing.assert_close(balance_loss(routing_other, cfg, mask), balance_loss(routing, cfg, mask))
