"""Router, experts for few tokens, and the passes between the products of many, against float64 formulas."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch

from dsv2 import DSV2Config, layers, rope
from dsv2.kernels import experts, prefill
from dsv2.kernels.backend import triton
from dsv2.kernels.experts import Choice
from dsv2.moe import DeepSeekMoE
from dsv2.moe import experts as moe_experts
from dsv2.moe import layer as moe_layer

pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative, of the whole result. float32: sums in another order. bf16 and fp16: the inner activations are
# rounded once, the weights and inputs are exact.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def relative(out, expected) -> float:
    return float(((out.double() - expected.double()).norm() / expected.double().norm()).nan_to_num(torch.inf))


def normal(seed: int, *shape: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=random) * scale).to(dtype).to(DEVICE)


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    monkeypatch.setattr(experts, "uses_kernels", lambda x: True)


# ------------------------------------------------------------------------------------------- experts

LAYERS = {  # batch, experts, chosen, hidden, width, shared
    "one token": (1, 10, 3, 70, 40, 2),
    "few pairs": (3, 30, 4, 130, 33, 1),
    "many pairs": (9, 6, 2, 96, 50, 0),
    "more tokens than a tile": (40, 4, 3, 64, 24, 2),
    "one expert for all": (20, 1, 1, 48, 90, 0),
    "whole blocks": (5, 8, 2, 128, 64, 1),
}


def layer(name: str, dtype: torch.dtype):
    batch, count, k, hidden, width, shared = LAYERS[name]
    random = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(count, generator=random)[:k] for _ in range(batch)]).to(DEVICE)
    weights = torch.rand(batch, k, generator=random).to(DEVICE)
    x = normal(2, batch, hidden, dtype=dtype)
    matrices = [
        normal(3, count, 2 * width, hidden, dtype=dtype, scale=hidden**-0.5),
        normal(4, count, hidden, width, dtype=dtype, scale=width**-0.5),
    ]
    if shared:
        matrices.append(normal(5, 2 * shared * width, hidden, dtype=dtype, scale=hidden**-0.5))
        matrices.append(normal(6, hidden, shared * width, dtype=dtype, scale=width**-0.5))
    return x, ids, weights, *matrices


def exact(x, ids, weights, w_gate_up, w_down, shared_gate_up=None, shared_down=None):
    """sum_k g_k FFN_k(x) + FFN_shared(x) in float64, token by token."""

    def network(row, gate_up, down):
        gate, up = (gate_up.double() @ row.double()).chunk(2)
        return down.double() @ (gate * torch.sigmoid(gate) * up)

    rows = []
    for row, chosen, scale in zip(x, ids.tolist(), weights.tolist()):
        total = sum(g * network(row, w_gate_up[e], w_down[e]) for e, g in zip(chosen, scale))
        if shared_down is not None:
            total = total + network(row, shared_gate_up, shared_down)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_experts_equal_float64(name, dtype):
    given = layer(name, dtype)
    out = experts.launch_experts(*given)
    assert relative(out.sum(dim=1), exact(*given)) < TOLERANCE[dtype]
    assert torch.equal(out, experts.launch_experts(*given))


@pytest.mark.parametrize("name", LAYERS)
def test_reference_of_the_experts_equals_float64(name):
    given = layer(name, torch.float32)
    assert relative(experts.experts_reference(*given).sum(dim=1), exact(*given)) < TOLERANCE[torch.float32]


TOKEN_LOOP = """    for first in range(0, count, TOKENS):
        token, summand, there = pairs_at(
            place, first, before, count, order, routed, TOKENS, BY_PAIR, PAIRS, K
        )
        x_at"""
WEIGHING = "        if place < routed:\n            total *="
WRONG = {  # what is changed in the text of the kernels: the old words, the new ones
    "gate and up are swapped": (
        "product = gate / (1.0 + tl.exp(-gate)) * up",
        "product = up / (1.0 + tl.exp(-up)) * gate",
    ),
    "weights are forgotten": (WEIGHING, WEIGHING.replace("place < routed", "place < 0")),
    "the shared expert is weighted": (WEIGHING, WEIGHING.replace("place < routed", "place >= 0")),
    "up's rows are the gate's": ("up_at = gate_at + width * w_row", "up_at = gate_at + 0 * width * w_row"),
    "only the first tile of tokens": (
        TOKEN_LOOP,
        TOKEN_LOOP.replace("(0, count,", "(0, tl.minimum(count, TOKENS),"),
    ),
    "the last block of inner channels is lost": (
        "for start in tl.range(0, width, COLUMNS, num_stages=STAGES):",
        "for start in tl.range(0, width - width % COLUMNS, COLUMNS, num_stages=STAGES):",
    ),
    "the last block of x is lost": (
        "for start in tl.range(0, hidden, COLUMNS, num_stages=STAGES):",
        "for start in tl.range(0, hidden - hidden % COLUMNS, COLUMNS, num_stages=STAGES):",
    ),
    "every pair does the work of its expert alone": (
        "count = tl.where(earlier > 0, 0, tl.sum(chose.to(tl.int32), 0))",
        "count = tl.where(earlier > 0, 0, 1)",
    ),
}


def wrong_module(tmp_path: Path, old: str, new: str):
    """The module of the kernels with one change in its text."""
    source = Path(experts.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {experts.__file__}"
    path = tmp_path / "wrong_experts.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("wrong_experts", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.uses_kernels = lambda x: True
    return module


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_experts_are_rejected(mistake, tmp_path):
    module = wrong_module(tmp_path, *WRONG[mistake])
    found = []
    for name in LAYERS:
        given = layer(name, torch.float32)
        found.append(relative(module.launch_experts(*given).sum(dim=1), exact(*given)))
    assert not max(found) < TOLERANCE[torch.float32]


# ------------------------------------------------------------------------------------------- routing

CHOICES = (Choice(3), Choice(4, 4, 2, None), Choice(2, 3, 1, 16.0), Choice(5, 12, 7, 2.0))
# As other papers' routers choose: one expert, the two best with weights of sum 1, all.
CHOICES += (Choice(1), Choice(2, scaling=None), Choice(12))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_router_equals_the_reference(choice, dtype):
    x, gain = normal(1, 5, 130, dtype=dtype), normal(2, 130, dtype=dtype)
    router = normal(3, 12, 130, dtype=dtype, scale=0.1)
    normed, ids, weights, scores = experts.norm_route(x, gain, 1e-6, router, choice)
    expected = experts.norm_route_reference(x, gain, 1e-6, router, choice)
    # The norm's last rounding may fall on either side; the scores start from its rounded result.
    assert relative(normed, expected[0]) < TOLERANCE[dtype]
    assert relative(scores, expected[3]) < max(TOLERANCE[dtype], 1e-5)
    assert torch.equal(ids, expected[1])
    assert relative(weights, expected[2]) < max(TOLERANCE[dtype], 1e-5)


def check_router(module, choice: Choice, batch: int = 5, width: int = 130) -> None:
    """Token by token: devices sorted by their best expert, then the experts on the first of them."""
    x, gain = normal(1, batch, width), normal(2, width)
    router, arrivals = normal(3, 12, width, scale=width**-0.5), torch.zeros(batch, dtype=torch.int32)
    normed, ids, weights, scores = module.norm_route(x, gain, 1e-6, router, choice, arrivals.to(DEVICE))
    for b, row in enumerate(x.double()):
        row = row / (row.square().mean() + 1e-6).sqrt() * gain.double()
        assert relative(normed[b], row) < TOLERANCE[torch.float32]
        powers = (router.double() @ row).exp()
        affinity = (powers / powers.sum()).tolist()
        # float32 over the products, and the exponential makes an absolute error of a logit a relative one
        assert relative(scores[b], torch.tensor(affinity, device=DEVICE)) < 1e-5
        each = 12 // (choice.n_group or 12)
        devices = sorted(range(12 // each), key=lambda g: -max(affinity[g * each : (g + 1) * each]))
        allowed = [e for e in range(12) if e // each in devices[: choice.topk_group or 12]]
        chosen = sorted(allowed, key=lambda e: -affinity[e])[: choice.k]
        total = sum(affinity[e] for e in chosen)
        factor = 1 / total if choice.scaling is None else choice.scaling
        assert ids[b].tolist() == chosen
        expected = torch.tensor([affinity[e] * factor for e in chosen], dtype=torch.float64, device=DEVICE)
        assert relative(weights[b], expected) < 1e-5


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_router_of_what_is_normalised_already(choice):
    x, router = normal(1, 5, 2 * 130)[:, :130], normal(3, 12, 130, scale=0.1)
    normed, ids, weights, scores = experts.norm_route(x, None, 0.0, router, choice)
    expected = experts.norm_route_reference(x, None, 0.0, router, choice)
    assert normed is x and torch.equal(ids, expected[1])
    for found, true in ((weights, expected[2]), (scores, expected[3])):
        assert relative(found, true) < 1e-5


# One program for a token's experts, several, and several that take some of them one after the other.
ROUTED = ((5, 130), (5, 2050), (64, 2050))


@pytest.mark.parametrize("batch, width", ROUTED)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_router_equals_float64(choice, batch, width):
    check_router(experts, choice, batch, width)


def test_experts_are_shared_out_over_programs():
    """The shapes of ROUTED are what they are meant to be."""
    found = []
    for batch, width in ROUTED:
        blocks = experts.choose_route_blocks(batch, 12, width)
        found.append((-(-12 // blocks["experts_each"]) > 1, blocks["experts_each"] > blocks["ROWS"]))
    assert found == [(False, False), (True, False), (True, True)]


def test_routers_that_follow_each_other_share_their_arrivals():
    arrivals = torch.zeros(9, dtype=torch.int32, device=DEVICE)
    x, gain, router = normal(1, 5, 2050), normal(2, 2050), normal(3, 12, 2050, scale=0.02)
    expected = experts.norm_route(x, gain, 1e-6, router, Choice(3))
    for _ in range(3):
        found = experts.norm_route(x, gain, 1e-6, router, Choice(3), arrivals)
        assert not arrivals.any()
        for part, other in zip(found, expected):
            assert torch.equal(part, other)


WRONG_ROUTERS = {
    "the first program to finish chooses": (
        "if arrived == tl.num_programs(1) - 1:",
        "if arrived == 0:",
    ),
    "a program's later experts are lost": (
        "for start in range(first, last, ROWS):",
        "for start in range(first, first + 1, ROWS):",
    ),
    "the next experts are read too late": ("following = start + ROWS", "following = start + 2 * ROWS"),
    "the worst are chosen": ("ahead = (other > value[None, :])", "ahead = (other < value[None, :])"),
    "devices are not limited": ("tl.where(place < topk_group, open_, tl.minimum(open_, -0.5))", "open_"),
    "weights are normalised over all experts": (
        "tl.sum(tl.where(chosen, score, 0.0), 0)",
        "tl.sum(score, 0)",
    ),
    "the scaling is forgotten": ("weight = score * scaling", "weight = score"),
    "a device is as good as its worst expert": (
        "best = tl.max(tl.where(mine[:, None] == group, open_[:, None], -1.0), 0)",
        "best = -tl.max(tl.where(mine[:, None] == group, -open_[:, None], -1.0), 0)",
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.skipif(DEVICE == "cuda", reason="what an unfinished router leaves there may be anything")
@pytest.mark.parametrize("mistake", WRONG_ROUTERS)
def test_wrong_routers_are_rejected(mistake, tmp_path):
    module = wrong_module(tmp_path, *WRONG_ROUTERS[mistake])
    with pytest.raises(AssertionError):
        for choice in CHOICES:
            for batch, width in ROUTED:
                check_router(module, choice, batch, width)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_token_of_nan_goes_to_experts_that_exist(choice):
    x, gain, router = normal(1, 3, 40), normal(2, 40), normal(3, 12, 40)
    clean = experts.norm_route(x, gain, 1e-6, router, choice)
    x[1, 7] = torch.nan
    found = experts.norm_route(x, gain, 1e-6, router, choice)
    assert 0 <= int(found[1].min()) and int(found[1].max()) < 12
    assert all(len(set(chosen)) == choice.k for chosen in found[1].tolist())
    assert found[2][1].isnan().all()
    for part, expected in zip(found, clean):  # the other tokens do not notice
        assert torch.equal(part[[0, 2]], expected[[0, 2]])


def test_ties_go_to_the_lower_expert():
    x = normal(1, 2, 16)
    router = normal(2, 1, 16).expand(6, 16).contiguous()
    ids = experts.norm_route(x, torch.ones(16, device=DEVICE), 1e-6, router, Choice(3))[1]
    assert ids.tolist() == [[0, 1, 2]] * 2


# ------------------------------------------------------------------------------- between the products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [41, 1030])
def test_swiglu_equals_the_layers(width, dtype):
    x = normal(1, 3, 7, 2 * width, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    assert relative(prefill.swiglu(x), gate * torch.sigmoid(gate) * up) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_equals_the_layers(dtype):
    x, gain = normal(1, 3, 5, 2 * 70, dtype=dtype)[..., :70], normal(2, 70, dtype=dtype)
    with torch.enable_grad():
        expected = layers.rms_norm(x, gain, 1e-5)
    assert relative(prefill.rms_norm(x, gain, 1e-5), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_equals_rope(dtype):
    x = normal(1, 2, 7, 3, 20, dtype=dtype)[..., 4:]
    angles = normal(2, 1, 7, 6, scale=100.0)
    x = x[..., :12]
    with torch.enable_grad():
        expected = rope.rotate_pairs(x, angles.cos(), angles.sin())
    assert relative(prefill.rotate_pairs(x, angles.cos(), angles.sin()), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dropped", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adding_up_equals_a_loop(dtype, dropped, weighted):
    tokens, k, width = 11, 3, 45
    order = torch.randperm(tokens * k, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    out, weights = normal(2, tokens * k, width, dtype=dtype), normal(3, tokens, k).abs()
    count = torch.tensor([tokens * k - dropped], dtype=torch.int32, device=DEVICE)
    expected = torch.zeros(tokens, width, dtype=torch.float64, device=DEVICE)
    for row, pair in enumerate(order.tolist()[: int(count)]):
        weight = weights.double()[pair // k, pair % k] if weighted else 1
        expected[pair // k] += weight * out[row].double()
    out[int(count) :] = torch.nan  # never written by the products before
    for rows in (None, int(count)):  # dropped pairs behind the others, or left out
        given = out[:rows], weights if weighted else None, order[:rows], count
        assert relative(prefill.add_up(*given, tokens, k), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_of_a_weighted_swiglu_equals_autograd(dtype):
    tokens, k, width, kept = 23, 3, 41, 61
    order = torch.randperm(tokens * k, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    gate_up, slope = (normal(s, tokens * k, w, dtype=dtype) for s, w in ((2, 2 * width), (3, width)))
    weights = normal(4, tokens, k).abs()
    exact = [x.double().requires_grad_() for x in (gate_up, weights)]
    gate, up = exact[0].chunk(2, dim=-1)
    result = exact[1].flatten()[order][:, None] * gate * torch.sigmoid(gate) * up
    (result * slope.double())[:kept].sum().backward()
    gate_up[kept:], slope[kept:] = torch.nan, torch.nan
    count = torch.tensor([kept], dtype=torch.int32, device=DEVICE)
    hidden, gate_up_slope, weights_slope = prefill.weighted_swiglu_backward(
        slope, gate_up, weights, order, count
    )
    assert relative(hidden[:kept], result.detach()[:kept]) < TOLERANCE[dtype]
    assert relative(gate_up_slope[:kept], exact[0].grad[:kept]) < TOLERANCE[dtype]
    assert relative(weights_slope, exact[1].grad) < TOLERANCE[dtype]
    assert (weights_slope.flatten()[order[kept:]] == 0).all()


def one_by_one(rows, weights, ends):
    """torch's grouped product where there is none: each group by itself. Rows outside of them are garbage."""
    starts = [0, *ends.tolist()]
    if weights.ndim == 2:  # both along the groups: one matrix for each
        return torch.stack([rows[:, a:b] @ weights[a:b] for a, b in zip(starts, starts[1:])])
    out = rows.new_full((len(rows), weights.shape[-1]), torch.nan)
    for group, (a, b) in enumerate(zip(starts, starts[1:])):
        out[a:b] = rows[a:b] @ weights[group]
    return out


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("drop", [False, True, "counted"])
def test_grouped_experts_equal_autograd(drop, frozen, compiled, monkeypatch):
    """With two experts that nobody chose, at both ends; dropped pairs, of one token all, and
    how many are left told or not; frozen experts."""
    tokens, k, count, hidden, width = 7, 3, 9, 24, 40
    if DEVICE == "cpu":
        monkeypatch.setattr(moe_experts, "_grouped_mm", one_by_one)
        monkeypatch.setattr(moe_experts, "grouped_mm_available", lambda x, width: True)
        monkeypatch.setattr(moe_experts, "kernel_problem", lambda device: None)
        monkeypatch.setattr(moe_experts.prefill, "fits", lambda x: True)
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    layer = moe_experts.RoutedExperts(count, hidden, width).to(DEVICE, dtype)
    random = torch.Generator().manual_seed(1)
    chosen = torch.stack([torch.randperm(count - 2, generator=random)[:k] + 1 for _ in range(tokens)])
    kept = torch.rand(tokens, k, generator=random).to(DEVICE) < 0.7 if drop else None
    if drop:
        kept[3] = False
    with torch.no_grad():
        layer.w_gate_up.copy_(normal(2, count, 2 * width, hidden, scale=hidden**-0.5))
        layer.w_down.copy_(normal(3, count, hidden, width, scale=width**-0.5))
    x, weights, slope = (
        normal(4, tokens, hidden, dtype=dtype),
        normal(5, tokens, k),
        normal(6, tokens, hidden),
    )
    exact = [t.detach().double().requires_grad_() for t in (x, weights, layer.w_gate_up, layer.w_down)]
    expected = torch.zeros(tokens, hidden, dtype=torch.float64, device=DEVICE)
    for t in range(tokens):
        for i, e in enumerate(chosen[t].tolist()):
            if kept is None or kept[t, i]:
                gate, up = (exact[2][e] @ exact[0][t]).chunk(2)
                add = exact[1][t, i] * (exact[3][e] @ (gate * torch.sigmoid(gate) * up))
                expected = expected.index_add(0, torch.tensor([t], device=DEVICE), add[None])
    (expected * slope.double()).sum().backward()
    layer.requires_grad_(not frozen)
    x.requires_grad_(), weights.requires_grad_()
    run = moe_experts.run_experts
    if compiled:
        torch.compiler.reset()
        run = torch.compile(inspect.unwrap(run), backend="aot_eager", fullgraph=True)  # without its checker
    told = int(kept.sum()) if drop == "counted" else None
    out = run(x, chosen.to(DEVICE), weights, layer.w_gate_up, layer.w_down, kept, told)
    assert ("GroupedExperts" in type(out.grad_fn).__name__) is not compiled
    (out * slope).sum().backward()
    # bf16: what is handed from product to product is rounded five times on the way to w_gate_up's gradient
    tolerance = 5e-6 if dtype == torch.float32 else 2e-2
    assert relative(out.detach(), expected.detach()) < tolerance
    for found, true in zip((x, weights, layer.w_gate_up, layer.w_down), exact):
        if frozen and found.ndim == 3:
            assert found.grad is None
        else:
            assert relative(found.grad, true.grad) < tolerance, found.shape


LAYER = DSV2Config.preset("tiny").replace(
    hidden_size=40, moe_intermediate_size=24, n_routed_experts=12, n_shared_experts=2, num_experts_per_tok=3
)
KINDS = {
    "greedy": LAYER.replace(topk_method="greedy", n_group=1, topk_group=1),
    "limited, scaled": LAYER.replace(
        topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=5.0
    ),
    "normalised, nothing shared": LAYER.replace(norm_topk_prob=True, n_shared_experts=0),
    **{router: LAYER.with_router(router) for router in ("dense", "switch", "gshard", "mixtral")},
}


@pytest.mark.parametrize("cfg", KINDS.values(), ids=list(KINDS))
def test_a_layer_takes_few_tokens_through_the_kernels(cfg, monkeypatch):
    monkeypatch.delenv("DSV2_IMPL", raising=False)
    monkeypatch.setattr(prefill, "fits", lambda x: DEVICE == "cuda" and not torch.is_grad_enabled())
    layer = DeepSeekMoE(cfg).to(DEVICE).eval()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(number, *parameter.shape, scale=parameter.shape[-1] ** -0.5))
    x = normal(20, 2, 5, 40)
    expected, routing = layer(x.requires_grad_()) if DEVICE == "cuda" else layer(x)
    x = x.detach()
    launched = []
    monkeypatch.setattr(moe_layer, "norm_route", lambda *a: launched.append(a) or experts.norm_route(*a))
    monkeypatch.setattr(prefill, "fits", lambda x: not torch.is_grad_enabled())
    with torch.no_grad():
        out, found = layer(x)
    assert len(launched) == 1
    assert relative(out, expected.detach()) < 5e-6 and out.shape == x.shape and out.dtype == x.dtype
    assert torch.equal(found.expert_ids, routing.expert_ids) and found.kept is None
    assert relative(found.weights, routing.weights.detach()) < 1e-5
    assert relative(found.scores, routing.scores.detach()) < 1e-5
    if DEVICE == "cpu":
        return  # the other paths would take kernels that are not there
    for why in ("gradients", "training", "many tokens", "the learner's functions"):
        with torch.no_grad(), monkeypatch.context() as patch:
            if why == "the learner's functions":
                patch.setenv("DSV2_IMPL", "mine")
            layer.train(why == "training")
            with torch.set_grad_enabled(why == "gradients"):
                layer(x.repeat(1, 7 if why == "many tokens" else 1, 1))
    assert len(launched) == 1


def test_gradients_keep_the_plain_path():
    x = normal(1, 2, 8).requires_grad_()
    assert not prefill.fits(x)
    layers.swiglu(x).sum().backward()
    assert x.grad is not None
