"""The routers of other papers: against loops over single tokens, with planted bugs, and in the model."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2 import DeepSeekV2, DSV2Config
from dsv2.config import ROUTERS
from dsv2.moe import Router, Routing, balance_loss, routing
from dsv2.moe.routing import ROUTES, dense, expert_capacity, glam, gshard, mixtral, switch, within_capacity

# 3 sequences, 11 tokens, 5 experts.
B, T, E = 3, 11, 5
# One float32 softmax, a sum of two and a division against Python's doubles.
RELATIVE = 1e-6


def draw_logits(seed: int = 0) -> torch.Tensor:
    """Favourites among the experts, so that some overflow and others have room."""
    drawn = torch.randn(B, T, E, generator=torch.Generator().manual_seed(seed))
    return 1.5 * drawn + torch.linspace(1, 0, E)


def draw_scores(seed: int = 0) -> torch.Tensor:
    return draw_logits(seed).softmax(dim=-1)


def draw_mask(lengths: list[int], left: bool = False) -> torch.Tensor:
    columns, ends = torch.arange(T), torch.tensor(lengths)[:, None]
    return columns >= T - ends if left else columns < ends


def drawn_numbers(seed: int) -> torch.Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------- one token at a time


def weights_by_hand(router: str, affinity: list[float]) -> list[tuple[int, float]]:
    """A token's experts and their weights, best first."""
    order = sorted(range(len(affinity)), key=lambda e: -affinity[e])
    if router == "dense":
        return [(e, affinity[e]) for e in order]
    if router == "switch":
        return [(order[0], affinity[order[0]])]
    first, second = order[:2]
    total = affinity[first] + affinity[second]
    return [(first, affinity[first] / total), (second, affinity[second] / total)]


def route_by_hand(router: str, scores, factor=None, mask=None, chance=None):
    """(experts and weights of each token, which pairs are kept): a queue at every expert's door.

    chance: for every token a number in [0, 1), under which twice its second weight must not lie.
    """
    places = [(b, t) for b in range(B) for t in range(T) if mask is None or mask[b, t]]
    chosen = {(b, t): weights_by_hand(router, scores[b, t].tolist()) for b in range(B) for t in range(T)}
    k = len(chosen[0, 0])
    room = [math.inf] * E
    if factor is not None:
        room = [max(1, math.floor(round(factor * k * len(places) / E, 6)))] * E
    kept = torch.zeros(B, T, k, dtype=torch.bool)
    for slot in range(k):
        for place in places:
            expert, weight = chosen[place][slot]
            if slot == 1 and chance is not None and not chance[place] < min(1, 2 * weight):
                continue
            if room[expert] > 0:
                room[expert] -= 1
                kept[(*place, slot)] = True
    return chosen, kept


def check(router: str, found: Routing, scores, factor=None, mask=None, chance=None) -> None:
    """Raises AssertionError where a routing is not what the loop gives."""
    chosen, kept = route_by_hand(router, scores, factor, mask, chance)
    for (b, t), pairs in chosen.items():
        assert found.expert_ids[b, t].tolist() == [e for e, _ in pairs]
        assert found.weights[b, t].tolist() == pytest.approx([w for _, w in pairs], rel=RELATIVE)
    assert found.scores is scores
    if factor is None and chance is None:
        assert found.kept is None, "nothing is dropped, and nothing need be looked at"
    else:
        assert torch.equal(found.kept, kept)


factors = st.sampled_from([None, 0.05, 0.5, 1.0, 1.25, 2.0, 9.0])
masks = st.none() | st.tuples(st.lists(st.integers(0, T), min_size=B, max_size=B), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), factors, masks, st.none() | st.integers(0, 10**6))
def test_routers_token_by_token(seed, factor, padding, chance_seed):
    scores = draw_scores(seed)
    mask = None if padding is None else draw_mask(*padding)
    check("dense", dense(scores), scores)
    check("mixtral", mixtral(scores), scores)
    check("switch", switch(scores, factor, mask), scores, factor, mask)
    check("glam", glam(scores, factor, mask), scores, factor, mask)
    by_chance, generator, chance = False, None, None
    if chance_seed is not None:
        by_chance, generator = True, torch.Generator().manual_seed(chance_seed)
        chance = drawn_numbers(chance_seed)
    found = gshard(scores, factor, mask, by_chance, generator)
    check("gshard", found, scores, factor, mask, chance)


def test_the_cases_are_worth_testing():
    """Each rule takes something out: capacity of either choice, chance, padding."""
    scores, mask = draw_scores(), draw_mask([11, 4, 7])
    assert 0.5 < switch(scores, 1.0).kept.float().mean() < 1
    first, second = gshard(scores, 0.6).kept.unbind(-1)
    assert not first.all() and not second.all() and second.any()
    by_chance = gshard(scores, None, mask, True, torch.Generator().manual_seed(0)).kept
    assert torch.equal(by_chance[..., 0], mask), "chance is for the second expert alone"
    assert 0 < by_chance[..., 1].sum() < mask.sum()


def test_mixtral_is_a_softmax_over_the_two_best_logits():
    logits = draw_logits()
    found = mixtral(logits.softmax(dim=-1))
    best = logits.topk(2, dim=-1)
    assert torch.equal(found.expert_ids, best.indices)
    torch.testing.assert_close(found.weights, best.values.softmax(dim=-1), rtol=RELATIVE, atol=0)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(B, T), rtol=RELATIVE, atol=0)


def test_the_second_expert_comes_with_twice_its_weight_as_probability():
    shares = torch.tensor([0.02, 0.1, 0.3, 0.5])  # g_2 of four tokens, the third expert being far off
    tokens = torch.stack((1 - shares, shares, torch.zeros(4)), dim=-1)
    scores = tokens[:, None].expand(4, 2000, 3).contiguous()
    kept = gshard(scores, by_chance=True, generator=torch.Generator().manual_seed(0)).kept
    assert kept[..., 0].all()
    found = kept[..., 1].float().mean(dim=1)
    # 2000 draws each: the standard error is at most 0.011; at 0.5 all are kept, as 2 g_2 is 1.
    torch.testing.assert_close(found, 2 * shares, atol=0.04, rtol=0)
    assert found[-1] == 1


def test_chance_is_torchs_own_unless_a_generator_is_given():
    scores = draw_scores()
    torch.manual_seed(4)
    expected = torch.rand(B, T)
    torch.manual_seed(4)
    check("gshard", gshard(scores, by_chance=True), scores, chance=expected)
    state = torch.random.get_rng_state()
    gshard(scores, by_chance=True, generator=torch.Generator().manual_seed(1))
    gshard(scores, 1.0), switch(scores, 1.0)
    assert torch.equal(torch.random.get_rng_state(), state), "and nothing else is drawn"


@pytest.mark.parametrize(
    "tokens, k, experts, factor, capacity",
    [
        (100, 1, 8, 1.25, 15),  # 15.6
        (64, 1, 8, 1.0, 8),
        (64, 2, 8, 1.0, 16),
        (100, 1, 115, 1.15, 1),  # exactly 1, and 0.99... in floating point
        (10, 1, 7, 0.7, 1),
        (3, 1, 64, 1.0, 1),  # the average is below 1: at least one token is computed
        (0, 2, 5, 1.0, 1),
    ],
)
def test_capacity(tokens, k, experts, factor, capacity):
    assert expert_capacity(tokens, k, experts, factor) == capacity


@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.7, 1.0, 1.5]), masks)
def test_no_expert_takes_more_than_its_capacity(seed, factor, padding):
    mask = None if padding is None else draw_mask(*padding)
    real = B * T if mask is None else int(mask.sum())
    for k, found in (
        (1, switch(draw_scores(seed), factor, mask)),
        (2, glam(draw_scores(seed), factor, mask)),
    ):
        load = torch.bincount(found.expert_ids[found.kept], minlength=E)
        room = expert_capacity(real, k, E, factor)
        assert load.max() <= room
        if mask is not None:
            assert not found.kept[~mask].any()
            asked = torch.bincount(found.expert_ids[mask].flatten(), minlength=E)
        else:
            asked = found.load()
        assert torch.equal(load, asked.clamp(max=room)), "no room is left while someone asks"


def test_a_dropped_choice_changes_no_weight():
    scores = draw_scores()
    for found in (gshard(scores, 0.5), gshard(scores, 0.5, by_chance=True), glam(scores, 0.2)):
        assert not found.kept.all()
        assert torch.equal(found.weights, mixtral(scores).weights)


# ----------------------------------------------------------------------------------------------- planted bugs


def normalised_weight(scores, factor, mask, chance, monkeypatch):
    """Switch's weight divided by the sum of the chosen, which is itself."""
    found = switch(scores, factor, mask)
    found.weights = found.weights / found.weights.sum(-1, keepdim=True)
    return "switch", found


def unnormalised_weights(scores, factor, mask, chance, monkeypatch):
    monkeypatch.setattr(routing, "mixtral", lambda scores: routing.top_k(scores, 2))
    return "glam", glam(scores, factor, mask)


def renormalised_after_a_drop(scores, factor, mask, chance, monkeypatch):
    found = glam(scores, factor, mask)
    left = found.weights * found.kept
    total = left.sum(-1, keepdim=True)
    found.weights = torch.where(total > 0, left / total, found.weights)
    return "glam", found


def bug_in_the_queue(router: str, wrong):
    def run(scores, factor, mask, chance, monkeypatch):
        monkeypatch.setattr(routing, "within_capacity", lambda *args: wrong(scores, *args))
        return router, {"switch": switch, "glam": glam}[router](scores, factor, mask)

    return run


def by_affinity(scores, ids, experts, factor, asking):
    """The highest affinities stay, whoever came first (as DeepSeek-V2 drops)."""
    room = expert_capacity(int(asking[..., 0].sum()), ids.shape[-1], experts, factor)
    kept = torch.zeros_like(asking)
    for expert in range(experts):
        here = asking & (ids == expert)
        affinity = torch.where(here, scores.gather(-1, ids), -1.0)
        kept |= here & (affinity >= affinity.flatten().sort(descending=True).values[room - 1])
    return kept


def second_choices_first(scores, ids, experts, factor, asking):
    return within_capacity(ids.flip(-1), experts, factor, asking.flip(-1)).flip(-1)


def both_choices_of_a_token_together(scores, ids, experts, factor, asking):
    """Token after token, its second choice right after its first one."""
    line = torch.stack((ids.flatten(), torch.zeros_like(ids.flatten())), -1)[None]
    ask = torch.stack((asking.flatten(), torch.zeros_like(asking.flatten())), -1)[None]
    return within_capacity(line, experts, factor / 2, ask)[0, :, 0].view_as(asking)


def last_come_first_served(scores, ids, experts, factor, asking):
    return within_capacity(ids.flip(0, 1), experts, factor, asking.flip(0, 1)).flip(0, 1)


def tokens_before_sequences(scores, ids, experts, factor, asking):
    turned = within_capacity(ids.transpose(0, 1), experts, factor, asking.transpose(0, 1))
    return turned.transpose(0, 1)


def each_sequence_by_itself(scores, ids, experts, factor, asking):
    rows = [within_capacity(i[None], experts, factor, a[None]) for i, a in zip(ids, asking)]
    return torch.cat(rows)


def mask_ignored(scores, ids, experts, factor, asking):
    """Padding takes room, and counts in T."""
    return within_capacity(ids, experts, factor, torch.ones_like(asking)) & asking


def padding_counts_in_t(scores, ids, experts, factor, asking):
    share = float(asking[..., 0].float().mean())
    return within_capacity(ids, experts, factor / share, asking)


def k_left_out(scores, ids, experts, factor, asking):
    return within_capacity(ids, experts, factor / 2, asking)


def one_too_many(scores, ids, experts, factor, asking):
    real = int(asking[..., 0].sum())
    return within_capacity(ids, experts, factor + 1.01 * experts / (ids.shape[-1] * real), asking)


def chance_of_another(change):
    def run(scores, factor, mask, chance, monkeypatch):
        monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: change(chance, scores))
        return "gshard", gshard(scores, factor, mask, True)

    return run


def refused_takes_room(scores, factor, mask, chance, monkeypatch):
    found = glam(scores, factor, mask)
    found.kept = found.kept & torch.stack((torch.ones(B, T), chance < 2 * found.weights[..., 1]), -1).bool()
    return "gshard", found


def never_by_chance(scores, factor, mask, chance, monkeypatch):
    return "gshard", gshard(scores, factor, mask)


BUGS = {
    "switch's weight normalised": normalised_weight,
    "weights not normalised": unnormalised_weights,
    "weights normalised after a drop": renormalised_after_a_drop,
    "switch by affinity": bug_in_the_queue("switch", by_affinity),
    "glam by affinity": bug_in_the_queue("glam", by_affinity),
    "second choices before first": bug_in_the_queue("glam", second_choices_first),
    "token by token": bug_in_the_queue("glam", both_choices_of_a_token_together),
    "last come, first served": bug_in_the_queue("switch", last_come_first_served),
    "tokens before sequences": bug_in_the_queue("switch", tokens_before_sequences),
    "each sequence by itself": bug_in_the_queue("switch", each_sequence_by_itself),
    "switch ignores the mask": bug_in_the_queue("switch", mask_ignored),
    "glam ignores the mask": bug_in_the_queue("glam", mask_ignored),
    "padding counts in T": bug_in_the_queue("switch", padding_counts_in_t),
    "K left out of the capacity": bug_in_the_queue("glam", k_left_out),
    "one token too many": bug_in_the_queue("switch", one_too_many),
    "probability g_2": chance_of_another(lambda chance, scores: 2 * chance),
    "probability of the affinity": chance_of_another(
        lambda chance, scores: chance / scores.topk(2).values.sum(-1)
    ),
    "what chance refuses takes room": refused_takes_room,
    "never by chance": never_by_chance,
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug):
    """Over a few seeds, as `test_routers_token_by_token` draws many more."""
    caught = 0
    for seed in range(5):
        scores, mask, chance = draw_scores(seed), draw_mask([5, 11, 7]), drawn_numbers(seed)
        with pytest.MonkeyPatch.context() as patch:
            router, found = BUGS[bug](scores, 0.8, mask, chance, patch)
        try:
            check(router, found, scores, 0.8, mask, chance if router == "gshard" else None)
        except AssertionError:
            caught += 1
    assert caught >= 3


# ----------------------------------------------------------------------------------------------- in the model

CFG = DSV2Config(
    vocab_size=37,
    hidden_size=20,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=26,
    kv_lora_rank=11,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=9,
    n_routed_experts=5,
    n_shared_experts=1,
    num_experts_per_tok=3,
    moe_intermediate_size=7,
    initializer_range=0.2,
    aux_loss_alpha=0.01,
)
EXPECTED = {  # scores, factor in training, mask, chance
    "dense": lambda *_: (None, None),
    "switch": lambda factor, chance: (factor, None),
    "gshard": lambda factor, chance: (factor, chance),
    "glam": lambda factor, chance: (factor, None),
    "mixtral": lambda *_: (None, None),
}


def new_router(name: str, **changes) -> tuple[Router, torch.Tensor]:
    torch.manual_seed(0)
    router = Router(CFG.with_router(name, **changes))
    torch.nn.init.normal_(router.weight, std=0.5)
    return router, torch.randn(B, T, 20)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", EXPECTED)
def test_the_module_picks_by_name_and_drops_in_training_alone(name, padded):
    # Fields of DeepSeek's router change nothing here.
    router, x = new_router(name, capacity_factor=0.8, norm_topk_prob=True, routed_scaling_factor=3.0)
    mask = draw_mask([11, 6, 3]) if padded else None
    torch.manual_seed(5)
    chance = torch.rand(B, T)
    torch.manual_seed(5)
    found = router.train()(x, mask)
    factor, drawn = EXPECTED[name](0.8, chance)
    check(name, found, found.scores, factor, mask, drawn)
    found = router.eval()(x, mask)
    check(name, found, found.scores)


def test_all_routers_are_named():
    assert tuple(ROUTES) == ROUTERS and set(EXPECTED) == set(ROUTERS) - {"deepseek"}


@pytest.mark.parametrize("name", ROUTERS)
def test_in_evaluation_a_token_does_not_depend_on_its_batch(name):
    router, x = new_router(name, capacity_factor=0.5)
    whole = router.eval()(x)
    for b in range(B):
        for t in range(T):
            alone = router(x[b : b + 1, t : t + 1])
            assert torch.equal(alone.expert_ids[0, 0], whole.expert_ids[b, t])
            torch.testing.assert_close(alone.weights[0, 0], whole.weights[b, t])


def test_an_overflowing_token_gets_the_residual_alone():
    torch.manual_seed(1)
    cfg = CFG.with_router("switch", capacity_factor=0.5, n_shared_experts=0, num_hidden_layers=2)
    model, inner = DeepSeekV2(cfg).train(), []
    model.layers[1].ffn.register_forward_hook(lambda module, inputs, outputs: inner.append(outputs))
    model(torch.arange(30).view(2, 15))
    out, found = inner[0]
    assert not found.kept.all() and found.kept.any()
    lost = ~found.kept[..., 0]
    assert out[lost].eq(0).all() and out[~lost].ne(0).any(dim=-1).all()


def test_the_switch_router_learns_through_its_weight():
    """Normalised, a single weight is always 1, and only the balance loss would move the router."""
    router, x = new_router("switch")
    router(x).weights.sum().backward()
    assert router.weight.grad.abs().max() > 0.01
    router, x = new_router("switch")
    weights = router(x).weights
    (weights / weights.sum(-1, keepdim=True)).sum().backward()
    assert router.weight.grad.abs().max() < 1e-6


@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_trains(name, factor):
    torch.manual_seed(0)
    model = DeepSeekV2(CFG.with_router(name, capacity_factor=factor)).train()
    tokens = torch.randint(37, (4, 13))
    mask = torch.arange(13) < torch.tensor([[13], [9], [11], [4]])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(12):
        out = model(tokens, attention_mask=mask)
        ahead, there = out.logits[:, :-1][mask[:, 1:]], tokens[:, 1:][mask[:, 1:]]
        loss = F.cross_entropy(ahead, there)
        optimizer.zero_grad()
        (loss + out.balance_loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.layers[1].ffn.router.weight.grad.abs().max() > 0
    torch.testing.assert_close(
        out.balance_loss, sum(balance_loss(found, model.cfg, mask) for found in out.routings)
    )
    assert (out.balance_loss > 0) == (name != "dense")


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_every_router_decodes(name):
    """Token by token with a cache equals one pass; capacity, which training has, plays no part."""
    torch.manual_seed(0)
    model = DeepSeekV2(CFG.with_router(name, capacity_factor=0.5)).eval()
    tokens = torch.randint(37, (2, 9))
    expected, cache = model(tokens).logits, model.new_cache(2, 9)
    parts = [model(tokens[:, t : t + 1], cache=cache).logits for t in range(9)]
    # float32, sums in another order; logits of order one
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-5, rtol=2e-5)
