"""Expert parallelism: fake devices against `RoutedExperts` and a loop over tokens, real ones against fake.

Run as a script under torchrun, this file is one of the real devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from dsv2.config import ROUTERS, DSV2Config  # noqa: E402
from dsv2.model import DeepSeekV2  # noqa: E402
from dsv2.moe import (  # noqa: E402
    ExpertParallel,
    FakeDevices,
    Placement,
    ProcessGroup,
    RoutedExperts,
    Traffic,
    device_limited_top_k,
    parallel,
)
from dsv2.moe.parallel import HIDDEN, KINDS, Inbox  # noqa: E402
from dsv2.moe.routing import ROUTES  # noqa: E402

# Against RoutedExperts sums are taken in another order: one rounding in a partial sum per device. Values and
# gradients are sums of up to some hundred products of order one.
NOISE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}
NAMES = ("out", "x", "weights", "w_gate_up", "w_down")

# A model for its routers: 7 experts by default, 2 of them a token.
ROUTED = DSV2Config(
    vocab_size=31, hidden_size=20, num_hidden_layers=3, num_attention_heads=2, intermediate_size=14,
    n_routed_experts=7, num_experts_per_tok=2, moe_intermediate_size=6, initializer_range=0.2,
)  # fmt: skip


@dataclass
class Case:
    """Tokens, their experts, and who holds what."""

    placement: Placement
    tokens: list[int]  # of each device
    expert_ids: torch.Tensor
    kept: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32
    hidden: int = 23
    width: int = 9
    seed: int = 0
    device: str = "cpu"
    learns: tuple[str, ...] = NAMES[1:]

    def inputs(self):
        """Experts, x, weights: the same on every process; router weights are float32, as the router's are."""
        drawn = torch.Generator().manual_seed(self.seed)
        n, k = self.expert_ids.shape
        experts = RoutedExperts(self.placement.n_experts, self.hidden, self.width).to(self.dtype)
        for parameter in experts.parameters():
            values = 0.4 * torch.randn(parameter.shape, generator=drawn, dtype=torch.float64)
            parameter.data = values.to(self.device, self.dtype)
        x = torch.randn(n, self.hidden, generator=drawn, dtype=torch.float64).to(self.device, self.dtype)
        weights = torch.rand(n, k, generator=drawn, dtype=torch.float64)
        exact = torch.float64 if self.dtype == torch.float64 else torch.float32
        for parameter in experts.parameters():
            parameter.requires_grad = "w_down" in self.learns
        weights = weights.to(self.device, exact).requires_grad_("weights" in self.learns)
        return experts, x.requires_grad_("x" in self.learns), weights

    def slope(self) -> torch.Tensor:
        """The gradient of the loss with respect to the output; no two tokens have the same."""
        n = len(self.expert_ids)
        slope = torch.linspace(-1, 1, n * self.hidden, dtype=torch.float64).view(n, self.hidden)
        return slope.to(self.device, self.dtype)


def outcome(case: Case, out, slope, x, weights, experts) -> dict[str, torch.Tensor]:
    """The result, and the gradients of everything that learns."""
    inputs = dict(zip(NAMES[1:], [x, weights, experts.w_gate_up, experts.w_down]))
    inputs = {name: inputs[name] for name in case.learns}
    grads = torch.autograd.grad((out * slope).sum(), inputs.values(), allow_unused=True)
    grads = [torch.zeros_like(i) if grad is None else grad for i, grad in zip(inputs.values(), grads)]
    return {"out": out.detach(), **dict(zip(inputs, grads))}


def run_plain(case: Case) -> dict[str, torch.Tensor]:
    experts, x, weights = case.inputs()
    out = experts(x, case.expert_ids, weights, case.kept)
    out = out + 0 * experts.w_down.sum()  # a gradient also where there is no token
    return outcome(case, out, case.slope(), x, weights, experts)


def run_fake(case: Case) -> tuple[dict[str, torch.Tensor], FakeDevices]:
    devices = FakeDevices(case.placement.devices)
    experts, x, weights = case.inputs()
    run = ExpertParallel(case.placement, devices)
    out = run(experts, x, case.expert_ids, weights, case.kept, tokens=case.tokens)
    return outcome(case, out, case.slope(), x, weights, experts), devices


def differences(found: dict, expected: dict, noise: float) -> set[str]:
    """The names of what differs by more than noise times its own size."""
    for name in expected:
        assert found[name].shape == expected[name].shape and found[name].dtype == expected[name].dtype
    scale = {
        name: max(1.0, value.abs().max().item()) if value.numel() else 1 for name, value in expected.items()
    }
    off = {name: (found[name] - expected[name]).abs().double() for name in expected}
    return {name for name in off if off[name].numel() and not off[name].max() <= noise * scale[name]}


# ------------------------------------------------------------------------- by hand, one token at a time


def letters_by_hand(case: Case) -> list[tuple[int, int, int, list[int]]]:
    """(source, destination, token's number at the source, its experts there): who must write to whom."""
    letters = []
    starts = [0, *accumulate(case.tokens)]
    for source, count in enumerate(case.tokens):
        for token in range(count):
            row = starts[source] + token
            wanted: dict[int, list[int]] = {}
            for slot, expert in enumerate(case.expert_ids[row].tolist()):
                if case.kept is None or case.kept[row, slot]:
                    wanted.setdefault(case.placement.device_of[expert], []).append(expert)
            letters += [(source, home, token, experts) for home, experts in wanted.items()]
    return letters


def traffic_by_hand(case: Case) -> dict[str, tuple[list, list]]:
    """Rows and bytes from device to device, own device included."""
    devices = case.placement.devices
    state = case.hidden * {torch.float32: 4, torch.float64: 8, torch.bfloat16: 2}[case.dtype]
    weight = 8 if case.dtype == torch.float64 else 4
    rows, sizes = [{kind: [[0] * devices for _ in range(devices)] for kind in KINDS} for _ in range(2)]

    def post(kind, a, b, count, size):
        rows[kind][a][b] += count
        sizes[kind][a][b] += count * size

    for a in range(devices):
        for b in range(devices):
            post("metadata", a, b, 1, 2 * 8)  # how many messages and pairs will come: two int64
    k = case.expert_ids.shape[1]
    for source, home, _, _ in letters_by_hand(case):
        post("dispatch", source, home, 1, state)
        post("combine", home, source, 1, state)
        post("metadata", source, home, 1, (1 + k) * 4)  # token, and K experts or -1: int32
        post("metadata", source, home, 1, k * weight)
        post("combine gradient", source, home, 1, state)
        if "x" in case.learns:
            post("dispatch gradient", home, source, 1, state)
        if "weights" in case.learns:
            post("metadata gradient", home, source, 1, k * weight)
    return {kind: (rows[kind], sizes[kind]) for kind in KINDS}


def inboxes_by_hand(case: Case) -> list[list[tuple]]:
    """For each device what arrives, by source and token."""
    inboxes = [[] for _ in range(case.placement.devices)]
    for source, home, token, experts in letters_by_hand(case):
        inboxes[home].append((source, token, experts))
    return [sorted(inbox) for inbox in inboxes]


def read(inbox: Inbox) -> list[tuple]:
    return [(source, token, experts) for source, token, experts, _ in inbox.messages()]


def problems(case: Case) -> set[str]:
    """What is wrong with the fake devices' run of a case."""
    found, devices = run_fake(case)
    wrong = differences(found, run_plain(case), NOISE[case.dtype])
    for kind, (rows, sizes) in traffic_by_hand(case).items():
        traffic = devices.traffic
        if (traffic.rows(kind, own=True).tolist(), traffic.bytes(kind, own=True).tolist()) != (rows, sizes):
            wrong.add("traffic")
    if [read(inbox) for inbox in devices.inboxes] != inboxes_by_hand(case):
        wrong.add("inboxes")
    return wrong


# ------------------------------------------------------------------------------------------------- cases


def choose(n: int, n_experts: int, k: int, seed: int = 0) -> torch.Tensor:
    """k different experts for each of n tokens: (n, k)."""
    scores = torch.rand(n, n_experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(k, dim=-1).indices


def scattered(n_experts: int, devices: int, seed: int = 0) -> Placement:
    """Experts anywhere."""
    drawn = torch.randint(devices, (n_experts,), generator=torch.Generator().manual_seed(seed))
    return Placement(drawn.tolist(), devices)


def ring(devices: int) -> Case:
    """Every device sends its 3 tokens to the next: it sends as much as it receives, but not to the same."""
    ids = torch.arange(devices).repeat_interleave(3)[:, None]
    return Case(Placement.even(devices, devices), [3] * devices, (ids + 1) % devices)


def named_cases(devices: int) -> dict[str, Case]:
    """What must work on any number of devices, one included."""
    e = 3 * devices + 1  # over one device's share
    drawn = torch.Generator().manual_seed(devices)
    tokens = [2 + (3 * device) % 5 for device in range(devices)]
    n = sum(tokens)
    uneven = Placement([0] * (devices + 2) + [i % devices for i in range(2 * devices - 1)], devices)
    scores = torch.randn(1, n, 4 * devices, generator=drawn).softmax(-1)
    limited = device_limited_top_k(scores, 3, devices, min(2, devices)).expert_ids[0]
    kept = torch.rand(n, 4, generator=drawn) < 0.6
    bare = Placement([i % max(devices - 1, 1) for i in range(e)], devices)  # the last one has none, if it can
    few = max(devices - 1, 0)
    cases = {
        "device-limited, even": Case(Placement.even(4 * devices, devices), tokens, limited),
        "uneven placement": Case(uneven, tokens, choose(n, e, 4)),
        "scattered, reversed tokens": Case(scattered(e, devices, 5), tokens[::-1], choose(n, e, 4)),
        "a device without experts": Case(bare, tokens, choose(n, e, 2)),
        "a process without tokens": Case(
            scattered(e, devices), [0, *tokens[1:]], choose(n - tokens[0], e, 3)
        ),
        "more processes than tokens": Case(
            scattered(e, devices), [0] * (devices - few) + [1] * few, choose(few, e, 2)
        ),
        "no tokens at all": Case(scattered(e, devices), [0] * devices, choose(0, e, 2)),
        "dropped pairs": Case(scattered(e, devices, 1), tokens, choose(n, e, 4), kept),
        "everything dropped": Case(scattered(e, devices), tokens, choose(n, e, 4), torch.zeros_like(kept)),
        "one expert a token": Case(scattered(e, devices, 2), tokens, choose(n, e, 1)),
        "every expert": Case(scattered(e, devices, 3), tokens, choose(n, e, e)),
        "float64": Case(scattered(e, devices, 4), tokens, choose(n, e, 3), dtype=torch.float64),
        "bfloat16": Case(uneven, tokens, choose(n, e, 3), dtype=torch.bfloat16, hidden=16, width=24),
        "ring": ring(devices),
        # With no expert or no token of its own a process has nothing that learns, and still must take part.
        "only the experts learn": Case(bare, [0, *tokens[1:]], choose(n - tokens[0], e, 2), learns=NAMES[3:]),
        "the experts are frozen": Case(bare, tokens, choose(n, e, 2), learns=NAMES[1:3]),
    }
    for router in ROUTERS:  # with capacity, so that some of them drop pairs
        cfg = ROUTED.with_router(router, n_routed_experts=e, capacity_factor=0.8)
        scores = torch.randn(1, n, e, generator=drawn).mul(2).softmax(-1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(devices)  # GShard's second expert is there by chance
            routing = ROUTES[router](scores, cfg, None, True)
        kept = None if routing.kept is None else routing.kept[0]
        cases[f"router {router}"] = Case(scattered(e, devices, 7), tokens, routing.expert_ids[0], kept)
    if devices > 1:
        # Expert 0 is nobody's choice, and device 0 holds no other.
        homes = [0] + [1 + i % (devices - 1) for i in range(e - 1)]
        cases["a device that receives nothing"] = Case(
            Placement(homes, devices), tokens, choose(n, e - 1, 2) + 1
        )
    return cases


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 7])
def test_named_cases_on_fake_devices(devices):
    for name, case in named_cases(devices).items():
        assert problems(case) == set(), name


@st.composite
def drawn_cases(draw):
    devices, n_experts = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    homes = draw(st.lists(st.integers(0, devices - 1), min_size=n_experts, max_size=n_experts))
    tokens = draw(st.lists(st.integers(0, 4), min_size=devices, max_size=devices))
    k, seed, n = draw(st.integers(1, n_experts)), draw(st.integers(0, 10**6)), sum(tokens)
    share = draw(st.sampled_from([None, 0.3, 0.8]))
    kept = None if share is None else torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < share
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return homes, devices, tokens, choose(n, n_experts, k, seed), kept, dtype, seed


@settings(max_examples=200)
@given(drawn_cases())
def test_fake_devices_compute_what_routed_experts_do(drawn):
    homes, devices, tokens, ids, kept, dtype, seed = drawn
    case = Case(Placement(homes, devices), tokens, ids, kept, dtype, seed=seed)
    assert problems(case) == set()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_model_on_fake_devices_is_the_model(router):
    """Logits and gradients with every layer's experts on three devices; and something was sent."""
    torch.manual_seed(0)
    model = DeepSeekV2(ROUTED.with_router(router)).eval()
    tokens = torch.randint(31, (2, 9))
    wanted = [model(tokens).logits]
    wanted += torch.autograd.grad(wanted[0].square().sum(), list(model.parameters()))
    devices = FakeDevices(3)
    for block in model.layers[1:]:
        block.ffn.parallel = ExpertParallel(Placement.even(7, 3), devices)
    found = [model(tokens).logits]
    found += torch.autograd.grad(found[0].square().sum(), list(model.parameters()))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)  # float32 sums in another order
    assert devices.traffic.sent().sum() > 0


@settings(max_examples=30)
@given(
    devices=st.integers(1, 6),
    reach=st.integers(1, 6),
    k=st.integers(1, 6),
    n=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_no_device_sends_more_than_m_hidden_states_a_token(devices, reach, k, n, seed):
    reach = min(reach, devices)
    placement, tokens = Placement.even(6 * devices, devices), [n + device for device in range(devices)]
    scores = torch.rand(1, sum(tokens), 6 * devices, generator=torch.Generator().manual_seed(seed))
    ids = device_limited_top_k(scores, k, devices, reach).expert_ids[0]
    _, fake = run_fake(Case(placement, tokens, ids))
    sent = fake.traffic.rows("dispatch", own=True).sum(dim=1)
    assert (sent <= reach * torch.tensor(tokens)).all()
    assert sent.tolist() == [part.sum().item() for part in placement.reach(ids).split(tokens)]
    assert torch.equal(fake.traffic.rows("combine"), fake.traffic.rows("dispatch").T)


def test_the_same_run_twice_is_the_same_to_the_last_bit():
    case = named_cases(4)["uneven placement"]
    (first, _), (second, _) = run_fake(case), run_fake(case)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_tokens_are_shared_out_evenly_if_not_said_otherwise():
    case = Case(scattered(7, 4), [4, 4, 3, 3], choose(14, 7, 2))
    devices = FakeDevices(4)
    experts, x, weights = case.inputs()
    ExpertParallel(case.placement, devices)(experts, x, case.expert_ids, weights)
    assert [read(inbox) for inbox in devices.inboxes] == inboxes_by_hand(case)


def test_an_inbox_carries_the_weights_of_its_pairs():
    case = named_cases(3)["uneven placement"]
    _, devices = run_fake(case)
    _, _, weights = case.inputs()
    starts = [0, *accumulate(case.tokens)]
    for inbox in devices.inboxes:
        for source, token, experts, found in inbox.messages():
            row = starts[source] + token
            slots = [case.expert_ids[row].tolist().index(expert) for expert in experts]
            assert found == weights[row, slots].tolist()


# --------------------------------------------------------------------------------- placement and traffic


def test_even_placement_is_the_routers():
    for devices, size in [(1, 5), (2, 3), (4, 3), (8, 20)]:
        placement = Placement.even(devices * size, devices)
        assert [placement.experts_on(d) for d in range(devices)] == [
            tuple(range(d * size, (d + 1) * size)) for d in range(devices)
        ]
    assert Placement.even(160, 8).n_experts == 160, "DeepSeek-V2: 20 experts on each of 8 devices"
    assert Placement.even(3, 5).devices == 5
    sizes = [len(Placement.even(11, 4).experts_on(d)) for d in range(4)]
    assert sum(sizes) == 11 and max(sizes) - min(sizes) == 1


def test_reach_counts_devices_not_experts():
    placement = Placement([2, 0, 2, 1], 4)
    assert placement.reach(torch.tensor([[0, 2], [1, 3], [2, 1]])).tolist() == [1, 2, 2]
    assert hash(placement) == hash(Placement((2, 0, 2, 1), 4)), "a list is as good as a tuple"


def test_traffic_counts_only_what_leaves_a_device():
    traffic, tensor = Traffic(3), torch.zeros(9, 5, dtype=torch.bfloat16)
    assert traffic.largest_share() == 0
    traffic.count("dispatch", 0, tensor, [4, 2, 3])
    traffic.count("dispatch", 2, tensor, [6, 0, 3])
    traffic.count("combine", 1, tensor, [7, 1, 1])
    assert traffic.rows("dispatch").tolist() == [[0, 2, 3], [0, 0, 0], [6, 0, 0]]
    assert traffic.rows("dispatch", own=True).tolist() == [[4, 2, 3], [0, 0, 0], [6, 0, 3]]
    assert traffic.bytes().tolist() == [[0, 20, 30], [70, 0, 10], [60, 0, 0]], "no kind: hidden states"
    assert torch.equal(traffic.bytes(), traffic.bytes(*HIDDEN)) and traffic.bytes("metadata").sum() == 0
    assert traffic.sent("dispatch").tolist() == [50, 0, 60]
    assert traffic.received("dispatch").tolist() == [60, 20, 30]
    assert traffic.largest_share("dispatch") == pytest.approx(6 / 11)
    traffic.reset()
    assert traffic.bytes(*KINDS, own=True).sum() == 0
    with pytest.raises(ValueError, match="kind='hidden' of traffic is unknown; there are dispatch, combine"):
        traffic.rows("hidden")


def test_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="places expert 1 on device 3; devices=3 are numbered 0 to 2"):
        Placement([0, 3], 3)
    with pytest.raises(ValueError, match="expert 0 on device -1"):
        Placement([-1], 3)
    with pytest.raises(ValueError, match="at least one device, not devices=0"):
        Placement([0], 0)
    with pytest.raises(ValueError, match="device_of is empty"):
        Placement([], 2)
    with pytest.raises(ValueError, match="at least one device, not size=0"):
        FakeDevices(0)
    with pytest.raises(ValueError, match="the placement is for 3 devices; there are 2"):
        ExpertParallel(Placement([0, 1], 3), FakeDevices(2))
    case = named_cases(3)["uneven placement"]
    experts, x, weights = case.inputs()
    run = ExpertParallel(case.placement, FakeDevices(3))
    for tokens in ([1, 2], [len(x), 1, 0], [len(x) + 1, -1, 0]):
        with pytest.raises(ValueError, match=f"must share out {len(x)} tokens over 3 devices"):
            run(experts, x, case.expert_ids, weights, tokens=tokens)
    with pytest.raises(ValueError, match="the placement is for 10 experts; there are"):
        run(case.placement.local(experts, 0), x, case.expert_ids, weights)
    if torch.distributed.is_available():
        with pytest.raises(RuntimeError, match="not initialised: call init_process_group"):
            ProcessGroup()


# ------------------------------------------------------------------------------------------ planted bugs


def one_by_one(plan: parallel.Dispatch) -> parallel.Dispatch:
    """The plan with one message for every expert: a token is sent twice to a device with two of its."""
    message, slot = plan.asked.nonzero(as_tuple=True)
    asked = torch.nn.functional.one_hot(slot, plan.asked.shape[1]).bool()
    return parallel.Dispatch(plan.tokens[message], asked, plan.counts[:, 1:].expand(-1, 2))


def plant(monkeypatch, name: str) -> None:
    plan, run, add, homes = (
        getattr(parallel, part) for part in ("plan_dispatch", "run_inbox", "combine", "_homes")
    )

    def twice(inbox):
        return replace(inbox, weights=inbox.weights.square())

    def apart(inbox):
        return replace(inbox, weights=inbox.weights.detach())

    if name == "sent once for every expert":
        monkeypatch.setattr(parallel, "plan_dispatch", lambda *given: one_by_one(plan(*given)))
    elif name == "dropped pairs sent all the same":
        monkeypatch.setattr(parallel, "plan_dispatch", lambda i, p, kept: plan(i, p))
    elif name == "weights applied twice":
        monkeypatch.setattr(parallel, "run_inbox", lambda u, inbox, *w: run(u, twice(inbox), *w))
    elif name == "no gradient to the router":
        monkeypatch.setattr(parallel, "run_inbox", lambda u, inbox, *w: run(u, apart(inbox), *w))
    elif name == "experts of a device in another order":

        def mixed(placement, on):
            home, place = homes(placement, on)
            return home, torch.bincount(home)[home] - 1 - place

        monkeypatch.setattr(parallel, "_homes", mixed)
    elif name == "return trip in the wrong order":
        monkeypatch.setattr(parallel, "combine", lambda r, *back: add(r.flip(0), *back))
    elif name == "what comes back replaces what came before":

        def overwrite(results, plan, counts, n):
            return results.new_zeros(n, results.shape[1]).index_copy(0, plan.tokens, results)

        monkeypatch.setattr(parallel, "combine", overwrite)
    elif name == "exchange's gradient not reversed":

        def forwards(ctx, *grads):
            return (
                None,
                None,
                None,
                None,
                *ctx.devices.move(f"{ctx.kind} gradient", list(grads), ctx.send, ctx.receive),
            )

        monkeypatch.setattr(parallel._Exchange, "backward", staticmethod(forwards))
    elif name == "exchange's gradient stays where it is":
        stays = staticmethod(lambda ctx, *grads: (None, None, None, None, *grads))
        monkeypatch.setattr(parallel._Exchange, "backward", stays)
    else:
        raise KeyError(name)


PLANTED = {
    "sent once for every expert": ("uneven placement", {"traffic", "inboxes"}),
    "dropped pairs sent all the same": ("dropped pairs", {"out", *NAMES, "traffic", "inboxes"}),
    "weights applied twice": ("uneven placement", set(NAMES)),
    "no gradient to the router": ("uneven placement", {"weights", "traffic"}),
    "experts of a device in another order": ("uneven placement", set(NAMES)),
    "return trip in the wrong order": ("uneven placement", set(NAMES)),
    "what comes back replaces what came before": ("uneven placement", {"out"}),
    "exchange's gradient not reversed": ("ring", {"x", "weights", "w_gate_up", "w_down", "traffic"}),
    "exchange's gradient stays where it is": ("ring", {"x", "weights", "w_gate_up", "w_down", "traffic"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_caught(name, monkeypatch):
    which, expected = PLANTED[name]
    case = named_cases(3)[which]
    assert problems(case) == set()
    plant(monkeypatch, name)
    assert problems(case) == expected


# ------------------------------------------------------------------------------------------ real devices


def run_real(case: Case, devices: ProcessGroup) -> dict[str, torch.Tensor]:
    """This process's part."""
    (rank,) = devices.here
    experts, x, weights = case.inputs()
    mine = case.placement.local(experts, rank).requires_grad_("w_down" in case.learns)
    x, weights, ids, slope = (
        part.detach().split(case.tokens)[rank] for part in (x, weights, case.expert_ids, case.slope())
    )
    x, weights = (
        part.clone().requires_grad_(name in case.learns) for name, part in (("x", x), ("weights", weights))
    )
    kept = None if case.kept is None else case.kept.split(case.tokens)[rank]
    out = ExpertParallel(case.placement, devices)(mine, x, ids, weights, kept)
    return outcome(case, out, slope, x, weights, mine)


def real_problems(case: Case, expected: dict[str, torch.Tensor], fake: FakeDevices) -> set[str]:
    """What differs, on any process, between the real devices' run of a case and the fake devices'.

    Both do the same operations on the same numbers in the same order. What may differ is the way that a
    matrix product takes when a tensor lies elsewhere in memory: a few roundings.
    """
    devices = ProcessGroup()
    (rank,) = devices.here
    found = run_real(case, devices)
    held = list(case.placement.experts_on(rank))
    mine = {
        name: whole[held] if name.startswith("w_") else whole.split(case.tokens)[rank]
        for name, whole in expected.items()
    }
    wrong = differences(found, mine, 8 * torch.finfo(case.dtype).eps)
    own = torch.zeros_like(fake.traffic.counts)
    own[:, :, rank] = fake.traffic.counts[:, :, rank]
    if not torch.equal(devices.traffic.counts, own):
        wrong.add("traffic")
    if not torch.equal(devices.all_traffic().counts, fake.traffic.counts):
        wrong.add("all traffic")
    if [read(inbox) for inbox in devices.inboxes] != [read(fake.inboxes[rank])]:
        wrong.add("inboxes")
    gathered = [None] * devices.size
    torch.distributed.all_gather_object(gathered, wrong)
    return set().union(*gathered)


def strided_problems(on: torch.device) -> set[str]:
    """Rows that do not lie one after another, and a gradient that is one number for all."""
    devices, results = ProcessGroup(), []
    send = [[(a + 2 * b) % 3 for b in range(devices.size)] for a in range(devices.size)]
    columns = [torch.arange(5.0 * sum(rows), device=on).view(5, -1) + 100 * a for a, rows in enumerate(send)]
    for these in (devices, FakeDevices(devices.size)):
        inputs = [columns[a].clone().requires_grad_() for a in these.here]
        receive = [[rows[a] for rows in send] for a in these.here]
        out = these.exchange("dispatch", [i.T for i in inputs], [send[a] for a in these.here], receive)
        grads = torch.autograd.grad(sum(o.sum() for o in out), inputs)
        results.append([dict(zip(these.here, values)) for values in (out, grads)])
    (rank,) = devices.here
    real, fake = results
    return {name for name, a, b in zip(("out", "x"), real, fake) if not torch.equal(a[rank], b[rank])}


def main(kind: str) -> int:
    """One device: every case, then what must go wrong."""
    from dsv2.train import start_world
    from dsv2.train.distributed import leave

    world = start_world(kind)
    if world.size == 1:
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    cases = named_cases(world.size)
    for case in cases.values():
        case.device = str(world.device)
        case.expert_ids = case.expert_ids.to(world.device)
        case.kept = None if case.kept is None else case.kept.to(world.device)
    report = {name: real_problems(case, *run_fake(case)) for name, case in cases.items()}
    report["strided"] = strided_problems(world.device)

    case = cases["ring"]
    run, (experts, x, weights) = ExpertParallel(case.placement, ProcessGroup()), case.inputs()
    with pytest.raises(ValueError, match="tokens is for FakeDevices"):
        run(experts, x, case.expert_ids, weights, tokens=case.tokens)
    if world.size > 1:
        with pytest.raises(ValueError, match=f"holds 1 of {world.size} experts by the placement, but the"):
            run(experts, x, case.expert_ids, weights)
    if world.size > 2:  # with fewer each sends to whom it receives from, and the exchange is its own reverse
        expected = run_fake(case)
        with pytest.MonkeyPatch.context() as patch:
            plant(patch, "exchange's gradient not reversed")
            noticed = real_problems(case, *expected)
        report["planted"] = noticed ^ {*case.learns, "traffic", "all traffic"}
    bad = {name: found for name, found in report.items() if found}
    if world.is_main:
        print(f"{len(report)} cases on {world.size} devices: {bad or 'all well'}")
    leave(1 if bad else 0)
    return 0


def check_real(devices: int, kind: str) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(devices),
    ]
    ran = subprocess.run(
        [*command, __file__, kind],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "all well" in ran.stdout


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_real_devices_do_what_fake_ones_do(devices):
    check_real(devices, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_gpus_do_what_fake_devices_do():
    check_real(2, "cuda")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
