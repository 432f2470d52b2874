"""The three balance losses against loops written from equations 23-31, and what carries their gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2 import DSV2Config
from dsv2.moe import Routing, balance, balance_loss, device_limited_top_k

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
