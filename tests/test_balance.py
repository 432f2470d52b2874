"""Balance losses against loops written from the papers' equations, what carries their gradient, and loads."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2 import DSV2Config
from dsv2.moe import (
    Routing,
    balance,
    balance_loss,
    dead_experts,
    device_limited_top_k,
    dropped_share,
    load_variation,
)
from dsv2.moe.routing import ROUTES

# 3 sequences, 8 tokens, 12 experts on 4 devices, 5 experts a token on at most 2 of them.
B, T, E, K, D, M = 3, 8, 12, 5, 4, 2
ALPHAS = {"aux_loss_alpha": 0.3, "device_loss_alpha": 0.5, "communication_loss_alpha": 0.7}
CFG = DSV2Config(
    vocab_size=31,
    hidden_size=10,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=14,
    n_routed_experts=E,
    num_experts_per_tok=K,
    moe_intermediate_size=6,
    topk_method="group_limited_greedy",
    n_group=D,
    topk_group=M,
    **ALPHAS,
)


def draw(seed: int = 0, batch: int = B, tokens: int = T) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    scores = (2 * torch.randn(batch, tokens, E, generator=generator)).softmax(-1)
    return device_limited_top_k(scores, K, D, M)


def losses_of_a_sequence(scores: list[list[float]], ids: list[list[int]]) -> tuple[float, float, float]:
    """Equations 23-31 for one sequence, without the alphas; scores[t][i], ids[t] the experts of token t."""
    tokens, homes = len(scores), [range(d * E // D, (d + 1) * E // D) for d in range(D)]
    f = [E / (K * tokens) * sum(1 for t in range(tokens) if i in ids[t]) for i in range(E)]  # 24
    p = [sum(scores[t][i] for t in range(tokens)) / tokens for i in range(E)]  # 25
    expert = sum(f[i] * p[i] for i in range(E))  # 23
    device = communication = 0.0
    for home in homes:
        f_device = sum(f[j] for j in home) / len(home)  # 27
        p_device = sum(p[j] for j in home)  # 28
        device += f_device * p_device  # 26
        sent = sum(1 for t in range(tokens) if any(e in home for e in ids[t]))
        communication += D / (M * tokens) * sent * p_device  # 29-31
    return expert, device, communication


def losses_by_hand(routing: Routing, mask: torch.Tensor | None = None) -> list[float]:
    """Each of the three, averaged over the sequences; padding is cut off before anything is counted."""
    found = []
    for b in range(len(routing.scores)):
        real = [t for t in range(routing.scores.shape[1]) if mask is None or mask[b, t]]
        scores, ids = routing.scores[b].tolist(), routing.expert_ids[b].tolist()
        found.append(losses_of_a_sequence([scores[t] for t in real], [ids[t] for t in real]))
    return [sum(column) / len(found) for column in zip(*found)]


def three(routing: Routing, mask=None, alphas=(1.0, 1.0, 1.0)) -> list[torch.Tensor]:
    s, ids = routing.scores, routing.expert_ids
    return [
        balance.expert_balance_loss(s, ids, alphas[0], mask),
        balance.device_balance_loss(s, ids, alphas[1], D, mask),
        balance.communication_balance_loss(s, ids, alphas[2], D, M, mask),
    ]


# float32 means over a few dozen numbers, against Python's doubles.
RELATIVE = 1e-5


def test_the_three_losses_are_the_equations():
    routing = draw()
    expected = losses_by_hand(routing)
    assert [float(loss) for loss in three(routing)] == pytest.approx(expected, rel=RELATIVE)
    scaled = [a * e for a, e in zip((0.3, 0.5, 0.7), expected)]
    assert [float(x) for x in three(routing, alphas=(0.3, 0.5, 0.7))] == pytest.approx(scaled, rel=RELATIVE)
    assert len({round(e, 3) for e in expected}) == 3, "the three are told apart"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, T), min_size=B, max_size=B), st.booleans())
def test_padding_counts_for_nothing(seed, lengths, left):
    routing = draw(seed)
    columns, ends = torch.arange(T), torch.tensor(lengths)[:, None]
    mask = columns >= T - ends if left else columns < ends
    expected = losses_by_hand(routing, mask)
    assert [float(loss) for loss in three(routing, mask)] == pytest.approx(expected, rel=RELATIVE)


def test_a_sequence_of_padding_alone_adds_nothing():
    routing = draw()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1] = False
    others = Routing(routing.expert_ids[[0, 2]], routing.weights[[0, 2]], routing.scores[[0, 2]])
    expected = [2 / 3 * loss for loss in losses_by_hand(others)]
    assert [float(loss) for loss in three(routing, mask)] == pytest.approx(expected, rel=RELATIVE)


def per_batch(*args, right=balance.expert_frequencies, **kwargs):
    """f over the whole batch, as most implementations count."""
    f = right(*args, **kwargs)
    return f.mean(dim=0, keepdim=True).expand_as(f)


def without_k(*args, right=balance.expert_frequencies, **kwargs):
    return right(*args, **kwargs) * K


def every_pair_sent(expert_ids, n_experts, n_group, topk_group, mask=None):
    """Counting token-expert pairs instead of tokens on the way to a device."""
    f = balance.expert_frequencies(expert_ids, n_experts, mask)
    return f.unflatten(-1, (n_group, -1)).mean(-1) * K / topk_group


def experts_of_other_devices(expert_ids, *args, right=balance.device_reach, **kwargs):
    """Experts laid out round robin instead of in blocks."""
    return right((expert_ids % D) * (E // D), *args, **kwargs)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("expert_frequencies", per_batch),
        ("expert_frequencies", without_k),
        ("device_reach", every_pair_sent),
        ("device_reach", experts_of_other_devices),
    ],
)
def test_planted_bugs_are_caught(name, wrong, monkeypatch):
    routing = draw()
    expected = losses_by_hand(routing)
    monkeypatch.setattr(balance, name, wrong)
    found = [float(loss) for loss in three(routing)]
    assert found != pytest.approx(expected, rel=1e-3)


def test_each_loss_is_its_alpha_at_perfect_balance():
    """Uniform affinities; every expert chosen equally often, every token on exactly M devices."""
    tokens = []
    for d in range(D):  # K = 5 = 3 + 2 experts on devices d and d + 1, every pair of the second equally often
        second = (d + 1) % D
        for pair in itertools.combinations(range(3), 2):
            tokens.append([3 * d + i for i in range(3)] + [3 * second + i for i in pair])
    ids = torch.tensor([tokens])
    scores = torch.full((1, len(tokens), E), 1 / E)
    routing = Routing(ids, scores.gather(-1, ids), scores)
    assert routing.load().unique().numel() == 1
    for loss, alpha in zip(three(routing, alphas=(0.3, 0.5, 0.7)), (0.3, 0.5, 0.7)):
        assert loss.item() == pytest.approx(alpha, rel=1e-6)
    assert balance_loss(routing, CFG).item() == pytest.approx(0.3 + 0.5 + 0.7, rel=1e-6)


def test_collapse_costs_the_most():
    """All tokens to the same experts with all their affinity: E / K, and D / devices reached."""
    ids = torch.arange(K).expand(1, T, K)
    scores = torch.zeros(1, T, E)
    scores[..., :K] = 1 / K
    expert, device, communication = (
        loss.item() for loss in three(Routing(ids, scores.gather(-1, ids), scores))
    )
    assert expert == pytest.approx(E / K)
    f = [E / K, 2 / 3 * E / K, 0, 0]  # devices with 3 and 2 of their 3 experts in use
    assert device == pytest.approx(f[0] * 3 / 5 + f[1] * 2 / 5)
    assert communication == pytest.approx(D / M)


def test_the_gradient_comes_through_p_alone():
    """d loss / d s_{i,t} = alpha f_i / (T B): f itself is a count of choices."""
    routing = draw()
    scores = routing.scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(balance.expert_balance_loss(scores, routing.expert_ids, 0.3), scores)
    for b in range(B):
        counts = [sum(i in token for token in routing.expert_ids[b].tolist()) for i in range(E)]
        for t in range(T):
            expected = [0.3 * E / (K * T) * count / (T * B) for count in counts]
            assert gradient[b, t].tolist() == pytest.approx(expected, rel=1e-5)
    for name in ("expert_frequencies", "device_reach"):
        extra = (D, M) if name == "device_reach" else ()
        assert not getattr(balance, name)(routing.expert_ids, E, *extra).requires_grad


def test_gradient_of_the_device_losses():
    """Each expert's affinity carries its device's f' or f''."""
    routing = draw()
    scores = routing.scores.clone().requires_grad_()
    device, communication = three(Routing(routing.expert_ids, routing.weights, scores))[1:]
    f = balance.expert_frequencies(routing.expert_ids, E)
    f_device = torch.stack([f[:, 3 * d : 3 * d + 3].mean(1) for d in range(D)], dim=1)
    reach = balance.device_reach(routing.expert_ids, E, D, M)
    for loss, per_device in ((device, f_device), (communication, reach)):
        (gradient,) = torch.autograd.grad(loss, scores)
        expected = per_device.repeat_interleave(3, dim=1)[:, None].expand(B, T, E) / (T * B)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("left", [False, True])
def test_padding_gets_no_gradient(left):
    """0 at padding; at a sequence's real tokens alpha f_i / (T B), with T as many as are real."""
    routing, lengths = draw(), torch.tensor([[8], [3], [5]])
    columns = torch.arange(T)
    mask = columns >= T - lengths if left else columns < lengths
    scores = routing.scores.clone().requires_grad_()
    of_experts = balance.expert_frequencies(routing.expert_ids, E, mask)
    reach = balance.device_reach(routing.expert_ids, E, D, M, mask)
    of_devices = of_experts.unflatten(1, (D, 3)).mean(dim=2)
    prices = of_experts, of_devices.repeat_interleave(3, 1), reach.repeat_interleave(3, 1)
    masked = three(Routing(routing.expert_ids, routing.weights, scores), mask)
    for loss, price in zip(masked, prices):
        (gradient,) = torch.autograd.grad(loss, scores)
        assert gradient[~mask].eq(0).all()
        expected = (price / (B * lengths))[:, None] * mask[..., None]
        torch.testing.assert_close(gradient, expected)


def test_descending_the_losses_evens_the_load():
    """Plain gradient descent on logits that start with favourites."""
    torch.manual_seed(0)
    logits = (0.5 * torch.randn(1, 64, E) + torch.linspace(0, 2, E)).requires_grad_()
    cfg = CFG.replace(aux_loss_alpha=1.0, device_loss_alpha=0.0, communication_loss_alpha=0.0)

    def route():
        return device_limited_top_k(logits.softmax(-1), K, D, M)

    before = route().load()
    for _ in range(300):
        (gradient,) = torch.autograd.grad(balance_loss(route(), cfg), logits)
        # One step for every token alike, as a router's weights would take.
        logits = (logits - 2 * gradient.sum(dim=1, keepdim=True)).detach().requires_grad_()
    after = route().load()
    assert after.max() < 0.8 * before.max() and after.min() > before.min()


# ------------------------------------------------------------------------------------ switching them on


@pytest.mark.parametrize("on", list(itertools.product([False, True], repeat=3)))
def test_the_config_switches_each_loss(on):
    routing = draw()
    alphas = {name: alpha if wanted else 0.0 for (name, alpha), wanted in zip(ALPHAS.items(), on)}
    expected = sum(alpha * loss for alpha, loss in zip(alphas.values(), losses_by_hand(routing)) if alpha)
    assert balance_loss(routing, CFG.replace(**alphas)).item() == pytest.approx(expected, rel=RELATIVE)


def test_over_the_whole_batch():
    """seq_aux=False: the batch counts as one long sequence, padding still out of it."""
    routing = draw()
    joined = Routing(*(x.flatten(0, 1)[None] for x in (routing.expert_ids, routing.weights, routing.scores)))
    cfg = CFG.replace(seq_aux=False)
    for mask in (None, torch.arange(T) < torch.tensor([[8], [2], [5]])):
        expected = losses_by_hand(joined, None if mask is None else mask.flatten()[None])
        total = sum(a * e for a, e in zip(ALPHAS.values(), expected))
        assert balance_loss(routing, cfg, mask).item() == pytest.approx(total, rel=RELATIVE)
        assert balance_loss(routing, CFG, mask).item() != pytest.approx(total, rel=1e-3)


def test_dropped_pairs_still_count():
    """f is what was asked for; dropping must not make an overloaded device look balanced."""
    routing = draw()
    before = balance_loss(routing, CFG)
    routing.kept = torch.zeros_like(routing.expert_ids, dtype=torch.bool)
    assert torch.equal(balance_loss(routing, CFG), before)


# ------------------------------------------------------------------------------------------- other routers

OTHER = {"switch": 1, "gshard": 2, "glam": 2, "mixtral": 2}  # experts a token


def draw_for(router: str, seed: int = 0, batch: int = B, tokens: int = T) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    drawn = 2 * torch.randn(batch, tokens, E, generator=generator) + torch.linspace(1, 0, E)
    return ROUTES[router](drawn.softmax(-1), CFG.with_router(router), None, False)


def loss_by_hand(router: str, routing: Routing, alpha: float, mask: torch.Tensor | None = None) -> float:
    """As each paper writes it, over the real tokens of the whole batch."""
    scores, ids = routing.scores.flatten(0, 1).tolist(), routing.expert_ids.flatten(0, 1).tolist()
    real = [t for t in range(len(ids)) if mask is None or mask.flatten()[t]]
    m = [sum(scores[t][e] for t in real) / len(real) for e in range(E)]  # mean gate of each expert
    if router == "switch":  # equations 4-6: f by the largest probability
        f = [sum(max(range(E), key=lambda i: scores[t][i]) == e for t in real) / len(real) for e in range(E)]
        return alpha * E * sum(f[e] * m[e] for e in range(E))
    if router in ("gshard", "glam"):  # algorithm 1, times N^2: c by the first of the two experts
        c = [sum(ids[t][0] == e for t in real) for e in range(E)]
        return alpha * E**2 * (1 / E * sum(c[e] / len(real) * m[e] for e in range(E)))
    f = [sum(e in ids[t] for t in real) / len(real) for e in range(E)]
    return alpha * E * sum(f[e] * m[e] for e in range(E))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(list(OTHER)),
    st.integers(0, 10**6),
    st.none() | st.lists(st.integers(0, T), min_size=B, max_size=B).filter(any),
)
def test_each_router_has_its_papers_loss(router, seed, lengths):
    routing = draw_for(router, seed)
    mask = None if lengths is None else torch.arange(T) < torch.tensor(lengths)[:, None]
    cfg = CFG.with_router(router)
    found = balance_loss(routing, cfg, mask)
    assert found.item() == pytest.approx(loss_by_hand(router, routing, 0.3, mask), rel=RELATIVE)
    # Nothing else is added for devices, nor taken by the sequence, whatever the other fields say.
    plain = cfg.replace(device_loss_alpha=0.0, communication_loss_alpha=0.0, seq_aux=False)
    assert torch.equal(found, balance_loss(routing, plain, mask))


def test_mixtrals_loss_is_that_of_transformers():
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = 2 * torch.randn(B, T, E, generator=torch.Generator().manual_seed(1))
    routing = ROUTES["mixtral"](logits.softmax(-1), CFG.with_router("mixtral"), None, False)
    for mask in (None, torch.arange(T) < torch.tensor([[8], [2], [5]])):
        expected = modeling.load_balancing_loss_func((logits.flatten(0, 1),), E, 2, mask)
        found = balance.mixtral_balance_loss(routing.scores, routing.expert_ids, 1.0, mask)
        torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=0)


def of_padding_alone(router: str) -> torch.Tensor:
    return balance_loss(draw_for(router), CFG.with_router(router), torch.zeros(B, T, dtype=torch.bool))


@pytest.mark.parametrize("router", ["dense", *OTHER])
def test_padding_alone_and_no_alpha_cost_nothing(router):
    assert of_padding_alone(router) == 0
    cfg = CFG.with_router(router, aux_loss_alpha=0.0)
    assert balance_loss(draw_for(router), cfg) == 0
    assert (balance_loss(draw_for(router), CFG.with_router(router)) == 0) == (router == "dense")


def by_sequence(router, scores, ids, alpha, mask):
    right = balance.expert_balance_loss(scores, ids[..., :1] if router != "mixtral" else ids, alpha, mask)
    return right * (2 if router == "mixtral" else 1)


def both_choices(router, scores, ids, alpha, mask):
    """f over both experts, where GShard counts the first."""
    return balance.mixtral_balance_loss(scores, ids, alpha, mask) / ids.shape[-1]


def k_divided_out(router, scores, ids, alpha, mask):
    return balance.mixtral_balance_loss(scores, ids, alpha, mask) / 2


def n_left_out(router, scores, ids, alpha, mask):
    """GShard's formula as its paper prints it."""
    return balance.switch_balance_loss(scores, ids, alpha, mask) / E**2


def mask_forgotten(router, scores, ids, alpha, mask):
    loss = balance.mixtral_balance_loss if router == "mixtral" else balance.switch_balance_loss
    return loss(scores, ids, alpha)


@pytest.mark.parametrize(
    "router, wrong",
    [
        *[(router, by_sequence) for router in OTHER],
        *[(router, mask_forgotten) for router in OTHER],
        ("gshard", both_choices),
        ("glam", n_left_out),
        ("mixtral", k_divided_out),
    ],
)
def test_planted_bugs_in_other_losses_are_caught(router, wrong):
    routing, mask = draw_for(router), torch.arange(T) < torch.tensor([[8], [3], [5]])
    found = float(wrong(router, routing.scores, routing.expert_ids, 0.3, mask))
    assert found != pytest.approx(loss_by_hand(router, routing, 0.3, mask), rel=1e-3)


@pytest.mark.parametrize("router", OTHER)
def test_other_losses_at_perfect_balance_and_at_collapse(router):
    """alpha, for Mixtral K alpha; if one expert (or K) takes everything, N alpha, for Mixtral too."""
    k = OTHER[router]
    ids = torch.stack([(torch.arange(2 * E) + i) % E for i in range(k)], -1).view(2, E, k)
    scores = torch.full((2, E, E), 1 / E)
    cfg = CFG.with_router(router)
    even = balance_loss(Routing(ids, scores.gather(-1, ids), scores), cfg).item()
    assert even == pytest.approx(0.3 * (2 if router == "mixtral" else 1), rel=RELATIVE)
    ids = torch.arange(k).expand(2, E, k)
    scores = torch.zeros(2, E, E)
    scores[..., : k if router == "mixtral" else 1] = 1 / (k if router == "mixtral" else 1)
    collapsed = balance_loss(Routing(ids, scores.gather(-1, ids), scores), cfg).item()
    assert collapsed == pytest.approx(0.3 * E, rel=RELATIVE)


@pytest.mark.parametrize("router", OTHER)
def test_gradients_of_other_losses_come_through_p_alone(router):
    """d loss / d p_{i,t} = alpha N f_i / (real tokens), and 0 at padding."""
    routing, mask = draw_for(router), torch.arange(T) < torch.tensor([[8], [3], [5]])
    scores = routing.scores.clone().requires_grad_()
    cfg = CFG.with_router(router)
    loss = balance_loss(Routing(routing.expert_ids, routing.weights, scores), cfg, mask)
    (gradient,) = torch.autograd.grad(loss, scores)
    ids = routing.expert_ids[mask] if router == "mixtral" else routing.expert_ids[mask][:, :1]
    f = torch.stack([(ids == e).any(-1).float().mean() for e in range(E)])
    expected = torch.where(mask[..., None], 0.3 * E * f / mask.sum(), 0.0)
    torch.testing.assert_close(gradient, expected)
    weights = routing.weights.clone().requires_grad_()
    loss = balance_loss(Routing(routing.expert_ids, weights, scores), cfg)
    assert torch.autograd.grad(loss, weights, allow_unused=True)[0] is None


@pytest.mark.parametrize("router", OTHER)
def test_other_losses_count_what_is_dropped(router):
    """A full expert must not look balanced because it turns tokens away."""
    routing = draw_for(router)
    before = balance_loss(routing, CFG.with_router(router))
    routing.kept = torch.zeros_like(routing.expert_ids, dtype=torch.bool)
    assert torch.equal(balance_loss(routing, CFG.with_router(router)), before)


# ------------------------------------------------------------------------------------- how uneven a load is


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9).filter(any))
def test_variation_and_dead_experts(load):
    mean = sum(load) / len(load)
    deviation = math.sqrt(sum((n - mean) ** 2 for n in load) / len(load))
    # float32; the deviation of nearly equal numbers loses digits
    assert load_variation(torch.tensor(load)) == pytest.approx(deviation / mean, rel=1e-5, abs=1e-6)
    for share in (0.1, 0.5):
        dead = dead_experts(torch.tensor(load), share).tolist()
        assert dead == [n < torch.tensor(share * mean, dtype=torch.float32) for n in load]


def test_load_statistics_at_their_ends():
    assert load_variation(torch.tensor([4, 4, 4])) == 0.0
    assert load_variation(torch.tensor([9, 0, 0])) == pytest.approx(math.sqrt(2))
    assert load_variation(torch.tensor([0, 0])) == 0.0
    # A fair load of 100: 9 is under a tenth of it, 10 is not.
    load = torch.tensor([291, 9, 10, 90])
    assert dead_experts(load).tolist() == [False, True, False, False]
    assert dead_experts(load, 0.95).tolist() == [False, True, True, True]
    assert not dead_experts(torch.tensor([0, 0])).any(), "nobody is dead where nobody has work"


def test_share_of_dropped_pairs():
    routing = draw_for("gshard")
    assert dropped_share(routing) == 0.0
    routing.kept = torch.ones(B, T, 2, dtype=torch.bool)
    routing.kept[0, :5, 1] = False
    assert dropped_share(routing) == pytest.approx(5 / (B * T * 2))
    mask = torch.arange(T) < torch.tensor([[4], [8], [5]])  # of the five dropped, four are real tokens'
    routing.kept &= mask[..., None]
    assert dropped_share(routing, mask) == pytest.approx(4 / (17 * 2))
    assert dropped_share(routing, torch.zeros_like(mask)) == 0.0
