"""The figures, the simulator and the stored runs of chapter 08: what they draw is what was computed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_viz import outside, overlaps, texts_of

from dsv2 import DSV2Config
from dsv2.bench import balance as runs_of_balance
from dsv2.bench import runs
from dsv2.data import find_corpus, prepare
from dsv2.moe import balance, device_limited_top_k
from dsv2.train import TrainConfig
from dsv2.viz import balance_explorer, balance_outcomes, describe, load_bars, load_history, starved_curves
from dsv2.viz import balance_simulation as simulation
from dsv2.viz.balance import DEVICE_COLOURS, busiest_device, fair_shares, starved
from dsv2.viz.balance_simulation import CHOSEN, DEVICES, EXPERTS, MOST_DEVICES, TOKENS, simulate_balance
from dsv2.viz.style import SMALL

STORED = json.loads(runs_of_balance.STUDY.out.read_text(encoding="utf-8"))
RUNS = STORED["runs"]
ALPHAS = (0.3, 0.2, 0.1)


def random_scores(seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(TOKENS, EXPERTS))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------- the simulation


def test_the_simulation_routes_as_the_package_does():
    scores = random_scores(1)
    routing = device_limited_top_k(torch.tensor(scores)[None], CHOSEN, DEVICES, MOST_DEVICES)
    chosen = np.zeros((TOKENS, EXPERTS), dtype=bool)
    np.put_along_axis(chosen, routing.expert_ids[0].numpy(), True, axis=1)
    assert (simulation.choose(scores) == chosen).all()
    sent = simulation.sent(chosen)
    assert (sent.sum(axis=1) <= MOST_DEVICES).all() and sent.sum(axis=0).sum() == sent.sum()


def test_its_losses_and_their_slope_are_the_packages():
    scores = torch.tensor(random_scores(2))[None].requires_grad_()
    ids = device_limited_top_k(scores.detach(), CHOSEN, DEVICES, MOST_DEVICES).expert_ids
    chosen = simulation.choose(scores.detach()[0].numpy())
    parts = (
        balance.expert_balance_loss(scores, ids, 1.0),
        balance.device_balance_loss(scores, ids, 1.0, DEVICES),
        balance.communication_balance_loss(scores, ids, 1.0, DEVICES, MOST_DEVICES),
    )
    found = simulation.balance_losses(scores.detach()[0].numpy(), chosen)
    assert found == pytest.approx([part.item() for part in parts], rel=1e-5)
    total = sum(alpha * part for alpha, part in zip(ALPHAS, parts))
    (slope,) = torch.autograd.grad(total, scores)
    by_hand = np.broadcast_to(simulation.loss_slopes(chosen, ALPHAS) / TOKENS, (TOKENS, EXPERTS))
    np.testing.assert_allclose(slope[0].numpy(), by_hand, rtol=1e-5)


def test_one_step_is_gradient_descent():
    """Router and experts after one step, against autograd on the same loss: read off the second loads."""
    x, y = (torch.tensor(a) for a in simulation.make_tokens(3, 1.0))
    random = np.random.default_rng(1003)
    width = x.shape[1]
    router = torch.tensor(0.3 * random.normal(size=(width, EXPERTS)) / width**0.5, requires_grad=True)
    experts = torch.tensor(random.normal(size=(EXPERTS, width, width)) / width**0.5, requires_grad=True)
    errors = []
    for _ in range(9):
        scores = (x @ router).softmax(dim=-1)
        ids = device_limited_top_k(scores.detach()[None], CHOSEN, DEVICES, MOST_DEVICES).expert_ids
        gates = scores * torch.zeros_like(scores).scatter(1, ids[0], 1.0)
        outputs = torch.einsum("te,td,edf->tf", gates, x, experts)
        error = ((outputs - y) ** 2).sum() / (y * y).sum()
        errors.append(float(error.detach()))
        args = (scores[None], ids)
        total = error + balance.expert_balance_loss(*args, ALPHAS[0])
        total = total + balance.device_balance_loss(*args, ALPHAS[1], DEVICES)
        total = total + balance.communication_balance_loss(*args, ALPHAS[2], DEVICES, MOST_DEVICES)
        slopes = torch.autograd.grad(total, (router, experts))
        with torch.no_grad():
            router -= simulation.RATE_ROUTER * slopes[0]
            experts -= simulation.RATE * slopes[1]
    found = simulate_balance(*ALPHAS, seed=3, steps=8)
    assert found.steps.tolist() == [0, 4, 8]
    # float64, but f is a float32 count in the package
    assert found.errors == pytest.approx([errors[0], errors[4], errors[8]], rel=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_experts_starve_without_the_losses_and_not_with_them(seed):
    without, together = simulate_balance(seed=seed), simulate_balance(0.1, 0.1, 0.1, seed=seed)
    assert (without.loads.sum(axis=1) == TOKENS * CHOSEN).all()
    assert starved(without.loads)[-1] >= EXPERTS / 4 and starved(together.loads)[-1] <= 1
    assert without.errors[-1] < 0.5 * without.errors[0], "it learns all the same"
    devices = simulate_balance(device=0.3, seed=seed)
    assert devices.received[-1].max() < without.received[-1].max()
    again = simulate_balance(seed=seed)
    assert (again.loads == without.loads).all() and (again.errors == without.errors).all()


def test_each_loss_does_its_own_work_in_the_simulator():
    """What chapter 08 says under its sliders, with room for other rounding: over ten seeds."""
    ends = {}
    for name, alphas in {
        "none": {},
        "device": {"device": 0.3},
        "communication": {"communication": 0.3},
        "expert": {"expert": 0.1},
        "apart": {"shared": 0.0},
        "paper": {"expert": 0.003, "device": 0.05, "communication": 0.02},
    }.items():
        found = [simulate_balance(**alphas, seed=seed) for seed in range(10)]
        ends[name] = (
            np.array([starved(run.loads[-1]) for run in found]),
            np.array([run.received[-1] for run in found]),
        )
    assert ends["none"][0].min() >= 4 and ends["none"][0].max() <= 13
    idle = [(received < 20).any() for received in ends["none"][1]]
    assert np.mean(idle) >= 0.7, "a device that stands idle is the rule without losses"
    assert ends["device"][1].min() > 40 and ends["device"][0].min() >= 2
    assert np.ptp(ends["communication"][1]) < 80 and ends["communication"][0].min() >= 2
    assert ends["expert"][0].max() <= 1 and np.ptp(ends["expert"][1]) > np.ptp(ends["communication"][1])
    assert ends["apart"][0].mean() < 0.6 * ends["none"][0].mean()
    assert ends["paper"][0].mean() > 3 > ends["expert"][0].mean()


@pytest.mark.parametrize("alphas", [(0, 0, 0), (0.3, 0.3, 0.3), (0.3, 0, 0), (0, 0.3, 0), (0, 0, 0.3)])
def test_the_ends_of_the_sliders_are_stable(alphas):
    for shared in (0.0, 0.75, 1.25):
        for seed in range(10):
            assert simulate_balance(*alphas, shared=shared, seed=seed).errors[-1] < 0.6


# --------------------------------------------------------------------------------------------- the figures


def test_shares():
    assert fair_shares([[3, 1], [2, 2]]).tolist() == [[1.5, 0.5], [1, 1]]
    assert starved([[100, 1, 99], [1, 1, 1]]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="at least one choice"):
        fair_shares([0, 0])


def test_bars_are_the_loads():
    figure = load_bars({"a run": [6, 2, 0, 0], "another": [2, 2, 2, 2]}, devices=2)
    first, second = figure.axes
    assert [bar.get_height() for bar in first.patches] == [3, 1, 0, 0]
    assert [bar.get_height() for bar in second.patches] == [1, 1, 1, 1]
    assert first.get_title("left") == "a run: 2 of 4 experts starve, the busiest has 3.0x"
    gaps = np.diff([bar.get_x() for bar in first.patches])
    assert gaps[1] > gaps[0] == pytest.approx(gaps[2]), "a gap between the devices"
    with pytest.raises(ValueError, match="1 to 4"):
        load_bars({})


def test_history_is_in_the_order_of_the_end():
    loads = [[1, 1, 1, 1], [0, 3, 1, 0]]
    figure = load_history({"run": ([0, 10], loads)})
    drawn = np.asarray(figure.axes[0].collections[0].get_array()).reshape(4, 2)
    assert drawn.tolist() == [[1, 3], [1, 1], [1, 0], [1, 0]]
    assert "run: 0 at first, 2 at the end" in describe(figure)
    with pytest.raises(ValueError, match="1 to 3"):
        load_history({})


def test_curves_and_outcomes_of_the_stored_runs():
    figure = starved_curves(RUNS, ["none", "all three"])
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    group = [run for run in RUNS if run["name"] == "none"]
    ends = [100 * np.mean(fair_shares(run["loads"][-1]) < 0.1) for run in group]
    assert lines["none"].get_ydata()[-1] == pytest.approx(np.mean(ends))
    assert list(lines["none"].get_xdata()) == group[0]["steps"]
    with pytest.raises(ValueError, match="no run is called both"):
        starved_curves(RUNS, ["both"])
    panels = balance_outcomes(STORED).axes
    dots = [line.get_xdata() for line in panels[3].lines if line.get_marker() == "o"]
    assert [list(x) for x in dots][0] == [run["val_nats_per_byte"] for run in group]
    assert busiest_device(
        {"received": [[6, 2], [4, 4]], "loads": [[[8, 8], [8, 8]]]},
        {"num_experts_per_tok": 2, "topk_group": 1},
    ) == pytest.approx((6 / 4 + 4 / 4) / 2)


def figures() -> list:
    none = next(run for run in RUNS if run["name"] == "none")
    layer = [loads[0] for loads in none["loads"]]
    return [
        load_bars({"without": layer[-1], "at first": layer[0]}, 8),
        load_bars({"without": layer[-1]}),
        load_history({"no losses": (none["steps"], layer), "again": (none["steps"], layer)}),
        starved_curves(RUNS),
        balance_outcomes(STORED),
        balance_explorer().figure,
        balance_explorer(0.1, 0.1, 0.1, seed=4).figure,
    ]


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: describe(figure)[:40])
def test_texts_can_be_read(figure):
    texts = texts_of(figure)
    assert texts and min(text.get_fontsize() for text in texts) >= SMALL
    assert overlaps(figure, texts) == []
    assert outside(figure) == []
    assert len(describe(figure)) > 60


# ------------------------------------------------------------------------------------------------ explorer


def test_the_explorer_shows_the_simulation():
    explorer = balance_explorer()
    figure = explorer.figure
    for values in ({"expert": 0.1}, {"device": 0.3}, {"communication": 0.05}, {"shared": 0.5}, {"seed": 7}):
        before = bytes(explorer.image.value)
        assert explorer.set(**values) is figure, "artists are moved, not drawn anew"
        assert bytes(explorer.image.value) != before
    right = simulate_balance(0.1, 0.3, 0.05, shared=0.5, seed=7)
    loads, received, paths, losses = figure.axes
    assert [bar.get_height() for bar in loads.patches] == pytest.approx(list(right.loads[-1] / 36))
    assert [bar.get_height() for bar in received.patches] == list(right.received[-1])
    assert loads.patches[4].get_facecolor() != loads.patches[3].get_facecolor(), "a colour for each device"
    assert len(DEVICE_COLOURS) == DEVICES
    assert list(losses.lines[0].get_ydata()) == list(right.losses[:, 0])
    assert list(paths.lines[3].get_ydata()) == pytest.approx(list(right.loads[:, 3] / 36))
    assert f"<b>{starved(right.loads)[-1]} of 16</b>" in explorer.below.value
    with pytest.raises(ValueError, match=r"expert=0\.5 must be one of"):
        balance_explorer(expert=0.5)


# ---------------------------------------------------------------------------------------- the stored runs


def test_the_stored_runs_show_the_collapse_and_its_cure():
    """At least three seeds: a quarter of the experts starve without the losses, none with the paper's."""
    seeds = {run["seed"] for run in RUNS}
    assert len(seeds) >= 3 and STORED["alphas"]["all three"] == [0.003, 0.05, 0.02]
    by_name = {(run["name"], run["seed"]): run for run in RUNS}
    for seed in seeds:
        none, all_three = by_name["none", seed], by_name["all three", seed]
        for layer, healthy in zip(none["loads"][-1], all_three["loads"][-1]):
            assert starved(layer) >= len(layer) / 4 and starved(healthy) == 0
    for name in ("command", "date", "device", "versions", "corpus_fingerprint", "training"):
        assert STORED[name]
    assert DSV2Config.from_dict(STORED["model"]) == runs_of_balance.MODEL


def test_a_run_is_counted_and_repeatable(tmp_path: Path):
    corpus = find_corpus(["arithmetic"], max_bytes_per_domain=60_000, cache=False, progress=False)
    data = prepare(corpus, directory=tmp_path / "packed")
    cfg = runs_of_balance.MODEL.replace(num_hidden_layers=2, hidden_size=32)
    config = TrainConfig(steps=3, batch_size=2, seq_len=32, validate_every=0, sample_every=0)
    windows = data.validation.validation_windows(32, 3)
    cfg = runs_of_balance.with_alphas(cfg, (0.003, 0.05, 0.02))
    assert (cfg.aux_loss_alpha, cfg.device_loss_alpha, cfg.communication_loss_alpha) == (0.003, 0.05, 0.02)
    found, trainer = runs.train_and_count(cfg, config, data, windows, every=2)
    assert found["steps"] == [0, 2, 3] and len(found["losses"]) == 3
    assert np.shape(found["loads"]) == (3, 1, 32)
    assert (np.sum(found["loads"], axis=-1) == windows.tokens.numel() * 4).all()
    assert runs.train_and_count(cfg, config, data, windows, every=2)[0] == found
    devices = runs.count_devices(trainer.model, windows)
    (routing,) = trainer.model.eval()(windows.tokens).routings
    for device, received in enumerate(devices["received"][0]):
        sent = [any(e // 4 == device for e in token) for row in routing.expert_ids.tolist() for token in row]
        assert received == sum(sent)
    assert 0 <= devices["dropped"][0] < 1
