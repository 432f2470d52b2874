"""Chapter 07's figures: messages, reach and bytes are what an independent count says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.patches import FancyArrowPatch
from test_viz import outside, overlaps, texts_of

from dsv2.bench import device_limit
from dsv2.bench import parallel as parallel_bench
from dsv2.config import DSV2Config
from dsv2.moe.experts import RoutedExperts
from dsv2.moe.parallel import KINDS, ExpertParallel, FakeDevices, Placement
from dsv2.viz import devices as viz
from dsv2.viz.devices import EXPLORED_EXPERTS, EXPLORED_TOKENS, HIDDEN_BYTES, PLACEMENTS, explored_traffic
from dsv2.viz.style import SMALL, describe

DATA = Path(__file__).resolve().parents[1] / "data"
STORED = json.loads((DATA / "runs" / "device_limit.json").read_text(encoding="utf-8"))

# ------------------------------------------------------------------------------------------ the messages

SIZES = [2, 0, 3]
IDS = torch.tensor([[0, 1], [4, 2], [3, 0], [4, 3], [2, 1]])  # 5 tokens; experts 0, 1 | 2, 3 | 4


def inboxes():
    placement = Placement((0, 0, 1, 1, 2), 3)
    experts, devices = RoutedExperts(5, 4, 3), FakeDevices(3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.fill_(0.1)
        ExpertParallel(placement, devices)(experts, torch.ones(5, 4), IDS, torch.ones(5, 2), tokens=SIZES)
    return devices.inboxes, placement


def test_every_message_is_an_arrow_there_and_back():
    got, placement = inboxes()
    figure = viz.message_drawing(got, SIZES, placement, list("abcde"))
    (ax,) = figure.axes
    arrows = [p for p in ax.patches if type(p).__name__ == "FancyArrowPatch"]
    # token 0 stays on device 0; tokens 1 and 2 go to 1 and 2, and to 0 and 1; 3 stays on 2 and goes to 1; ...
    homes = [0, 0, 2, 2, 2]
    wanted = [
        (homes[t], device, t)
        for t, ids in enumerate(IDS.tolist())
        for device in sorted({placement.device_of[e] for e in ids})
    ]
    assert len(arrows) == 2 * len(wanted)
    stays = sum(source == device for source, device, _ in wanted)
    dotted = [a for a in arrows if a.get_linestyle() != "-"]
    assert len(dotted) == 2 * stays == 4
    assert f"{len(wanted) - stays} hidden states are sent to other devices" in describe(figure)
    said = [t.get_text() for t in ax.texts]
    for text in ("a: experts 0, 1", "b: expert 2", "b: expert 4", "c: expert 0", "c: expert 3"):
        assert said.count(text) == 1
    assert said.count("token d") == 2 and "device 1: experts 2, 3" in said
    assert not outside(figure)


PLACED = Placement((2, 0, 1, 0, 2, 1, 2), 4)  # 7 experts in no order, none on the last device
LOOSE_SIZES = [1, 3, 0, 2]  # tokens of each device
LOOSE_IDS = torch.tensor([[0, 4, 1], [1, 3, 0], [2, 5, 6], [3, 2, 4], [6, 4, 0], [1, 2, 3]])


def loose_inboxes():
    experts, devices = RoutedExperts(7, 5, 4), FakeDevices(4)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.fill_(0.1)
        moved = ExpertParallel(PLACED, devices)
        moved(experts, torch.ones(6, 5), LOOSE_IDS, torch.ones(6, 3), tokens=LOOSE_SIZES)
    return devices.inboxes


def expected_messages() -> set[tuple[str, int, int, frozenset[int]]]:
    """(token, its device, the experts' device, experts), from the choices alone."""
    homes = [device for device, size in enumerate(LOOSE_SIZES) for _ in range(size)]
    found = set()
    for t, chosen in enumerate(LOOSE_IDS.tolist()):
        for device in {PLACED.device_of[e] for e in chosen}:
            there = frozenset(e for e in chosen if PLACED.device_of[e] == device)
            found.add(("abcdef"[t], homes[t], device, there))
    return found


def drawn_messages(figure) -> list[tuple[str, str, frozenset[int]]]:
    """(token at the arrow's start, token at its end, experts it is for), from what stands on the figure."""
    (ax,) = figure.axes
    tokens = {(*t.get_position(),): t.get_text()[-1] for t in ax.texts if t.get_text().startswith("token ")}
    work = {(*t.get_position(),): t.get_text() for t in ax.texts if ": expert" in t.get_text()}
    work = {place: text for place, text in work.items() if not text.startswith("device")}

    def nearest(texts: dict, place) -> str:
        return min((abs(x - place[0]) + 9 * abs(y - place[1]), text) for (x, y), text in texts.items())[1]

    found = []
    for arrow in (patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)):
        start, end = arrow._posA_posB
        there = start[0] < 5
        asked = nearest(work, end if there else start)
        experts = frozenset(int(part.split()[-1]) for part in asked.split(": ")[1].split(","))
        found.append((nearest(tokens, start if there else end), asked[0], experts))
    return found


def test_arrows_lead_from_a_token_to_its_experts_and_back_to_it():
    expected = expected_messages()
    drawn = drawn_messages(viz.message_drawing(loose_inboxes(), LOOSE_SIZES, PLACED, list("abcdef")))
    assert len(drawn) == 2 * len(expected)
    assert set(drawn) == {(token, token, experts) for token, _, _, experts in expected}


def test_many_experts_on_one_device_stay_within_its_box():
    placement, devices = Placement.even(32, 2), FakeDevices(2)
    ids = torch.tensor([[25, 26, 27, 28, 29]])
    ExpertParallel(placement, devices)(RoutedExperts(32, 2, 1), torch.ones(1, 2), ids, torch.ones(1, 5))
    figure = viz.message_drawing(devices.inboxes, [1, 0], placement)
    (text,) = (t for t in texts_of(figure) if "experts 25, 26" in t.get_text())
    seen = text.get_window_extent(figure.canvas.get_renderer())
    boxes = [p.get_window_extent() for p in figure.axes[0].patches if not isinstance(p, FancyArrowPatch)]
    assert any(box.x0 < seen.x0 and seen.x1 < box.x1 and box.y0 < seen.y0 < box.y1 for box in boxes)


def test_a_message_that_is_missing_would_be_seen():
    some = loose_inboxes()
    some[0] = type(some[0])(*(part[:0] for part in vars(some[0]).values()))
    drawn = drawn_messages(viz.message_drawing(some, LOOSE_SIZES, PLACED, list("abcdef")))
    assert len(drawn) < 2 * len(expected_messages())


def test_a_drawing_needs_all_devices():
    got, placement = inboxes()
    with pytest.raises(ValueError, match="there are 3 devices, 2 inboxes and 3 sizes"):
        viz.message_drawing(got[:2], SIZES, placement)


def test_neighbours_are_named_by_their_ends():
    assert viz._numbers((12, 13, 14, 15)) == "12 to 15"
    assert (
        viz._numbers((1, 2)) == "1, 2" and viz._numbers((1, 3, 4)) == "1, 3, 4" and viz._numbers(()) == "none"
    )


# ----------------------------------------------------------------------------------- how many devices


@pytest.mark.parametrize(("experts", "devices", "k"), [(6, 3, 2), (8, 2, 5), (9, 3, 4), (5, 1, 3)])
def test_chance_reach_equals_going_through_all_sets(experts, devices, k):
    each = experts // devices
    reached = [len({e // each for e in chosen}) for chosen in itertools.combinations(range(experts), k)]
    assert viz.chance_reach(experts, devices, k) == pytest.approx(np.mean(reached))
    with_repetition = devices * (1 - (1 - 1 / devices) ** k)
    assert devices == 1 or abs(with_repetition - np.mean(reached)) > 0.01  # a planted bug would be seen


def test_chance_needs_experts_that_split_evenly():
    with pytest.raises(ValueError, match="n_experts=10 is not a multiple of devices=4"):
        viz.chance_reach(10, 4, 2)


def test_reach_bars_show_shares_and_how_many_are_within_the_limit():
    reach = torch.tensor([1, 2, 2, 3, 4])
    np.testing.assert_allclose(viz.reach_shares(reach, 4), [0.2, 0.4, 0.2, 0.2])
    figure = viz.reach_bars({"one": reach, "other": torch.tensor([4, 4])}, 4, 2)
    (ax,) = figure.axes
    assert [bar.get_height() for bar in ax.patches[:4]] == pytest.approx([20, 40, 20, 20])
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["one: 60 % within 2", "other: 0 % within 2"]
    assert "one: mean 2.40, 60.0 % within 2" in describe(figure)
    assert not overlaps(figure, texts_of(figure)) and not outside(figure)


def test_limit_curves_are_in_kb():
    figure = viz.limit_curves({"some": {1: 0.5, 2: 1.5, 4: 2.0}}, per_device=2000)
    (ax,) = figure.axes
    bound, curve = ax.lines
    assert list(curve.get_ydata()) == [1.0, 3.0, 4.0] and list(curve.get_xdata()) == [1, 2, 4]
    assert list(bound.get_ydata()) == [2.0, 8.0]
    assert not overlaps(figure, texts_of(figure)) and not outside(figure)
    for empty in (lambda: viz.limit_curves({}, 1), lambda: viz.reach_bars({}, 2, 1)):
        with pytest.raises(ValueError, match="is empty"):
            empty()


# ------------------------------------------------------------------------------------------- the bytes


def report(change: int = 0) -> dict:
    table = [[0, 10, 20], [30, 0, 40], [50, 60, 0]]
    fake = {kind: table if kind in ("dispatch", "combine") else [[7] * 3] * 3 for kind in KINDS}
    real = dict(fake, dispatch=[[0, 10 + change, 20], *table[1:]])
    return {"real": real, "fake": fake}


def test_same_bytes_shows_hidden_states_alone_and_says_if_they_differ():
    figure = viz.same_bytes(report())
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts == ["stays", "20", "40", "60", "stays", "80", "100", "120", "stays"]
    assert "420 on real processes, 420 on fake devices, equal for every pair" in describe(figure)
    assert "not equal for every pair" in describe(viz.same_bytes(report(change=1)))
    assert not overlaps(figure, texts_of(figure)) and not outside(figure)


# --------------------------------------------------------------------------------------- the stored runs


def test_the_stored_runs_are_the_command_s():
    study = device_limit.STUDY
    assert {name: DSV2Config.from_dict(cfg) for name, cfg in STORED["models"].items()} == study.models
    assert STORED["training"] == study.training.to_dict()
    assert {(run["name"], run["seed"]) for run in STORED["runs"]} == {
        (name, seed) for name in study.models for seed in range(3)
    }
    assert STORED["command"].startswith("python -m dsv2.bench device-limit")


def test_limit_outcomes_are_differences_within_a_seed():
    figure = viz.limit_outcomes(STORED)
    loss = {(run["name"], run["seed"]): run["val_nats_per_byte"] for run in STORED["runs"]}
    left, right = figure.axes
    for ax, minus in ((left, 0), (right, 1)):
        curves = [line.get_ydata() for line in ax.lines if line.get_marker() == "o"]
        wanted = [[loss[f"M = {m}", s] - minus * loss["M = 8", s] for m in (1, 2, 3, 4, 8)] for s in range(3)]
        np.testing.assert_allclose(curves, wanted)
    texts = texts_of(figure)
    assert not overlaps(figure, texts) and not outside(figure)
    assert min(t.get_fontsize() for t in texts) >= SMALL


def made_up() -> dict:
    base, more = {0: 2.0, 1: 2.5}, {1: (0.25, 0.5), 3: (-0.125, 0.0), 8: (0, 0)}
    return {
        "models": {f"M = {m}": {"topk_group": m} for m in more},
        "runs": [
            {"name": f"M = {m}", "seed": seed, "val_nats_per_byte": base[seed] + more[m][seed]}
            for seed in (1, 0)
            for m in more
        ],
    }


def test_a_run_that_is_missing_is_named():
    some = made_up()
    some["runs"] = some["runs"][1:]
    with pytest.raises(ValueError, match="M = 1 has no run of seed 1"):
        viz.limit_outcomes(some)


def test_what_the_chapter_says_of_the_stored_runs():
    loss = {(run["name"], run["seed"]): run["val_nats_per_byte"] for run in STORED["runs"]}
    cost = {m: [loss[f"M = {m}", s] - loss["M = 8", s] for s in range(3)] for m in (1, 2, 3, 4)}
    assert 0.0095 < min(cost[1]) and max(cost[1]) < 0.0285
    assert all(min(cost[m]) < 0 < max(cost[m]) for m in (2, 3))
    assert 0.0005 < min(cost[4]) and max(cost[4]) < 0.0175
    assert all(abs(np.mean(cost[m])) < 0.01 for m in (2, 3, 4))


# --------------------------------------------------------------------------------------------- the widget


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("devices", "k", "limit"), [(8, 6, 3), (4, 3, 4), (6, 8, 1), (2, 1, 8)])
def test_the_explorer_s_traffic_equals_a_count_with_sets(devices, k, limit, placement):
    rows = explored_traffic(devices, k, limit, placement)
    scores = viz.explored_scores(placement)[0]
    each, per_device = EXPLORED_EXPERTS // devices, EXPLORED_TOKENS / devices
    counts = np.zeros((devices, devices), dtype=int)
    for t, row in enumerate(scores.tolist()):
        best = sorted(range(devices), key=lambda d: -max(row[d * each : (d + 1) * each]))[
            : min(limit, devices)
        ]
        open_ = [e for e in range(EXPLORED_EXPERTS) if e // each in best]
        chosen = sorted(open_, key=lambda e: -row[e])[:k]
        for device in {e // each for e in chosen} - {int(t // per_device)}:
            counts[int(t // per_device), device] += 1
    assert rows.tolist() == counts.tolist()


@pytest.fixture(scope="module")
def gpus():
    stored = json.loads((DATA / "benchmarks" / "parallel_h100.json").read_text(encoding="utf-8"))
    return stored["runs"]


def test_the_stored_run_of_gpus_agrees_with_one_device(gpus):
    for run in gpus:
        for checked in run["checked"]:
            kind = getattr(torch, checked["dtype"])
            assert max(checked["differences"].values()) < parallel_bench.LARGEST_DIFFERENCE[kind]
        assert parallel_bench.losses_agree(run["training"]["losses"])
        assert [row["limit"] for row in run["exchange"]["rows"]] == sorted({1, 2, 3, run["devices"]})[
            : run["devices"]
        ]
        for row in [*run["exchange"]["rows"], *run["speed"]["rows"]]:
            assert sum(row["shares"].values()) == pytest.approx(1, abs=5e-4)


def test_losses_on_gpus_are_drawn_and_said(gpus):
    figure = viz.spread_losses(gpus[0])
    one, parts, spread_out = (np.array(v) for v in gpus[0]["training"]["losses"].values())
    left, right = figure.axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), one)
    np.testing.assert_array_equal(left.lines[1].get_ydata(), spread_out)
    for line, values in zip(right.lines, (parts, spread_out)):
        np.testing.assert_allclose(line.get_ydata(), np.maximum(abs(values - one), 1e-6))
    said = describe(figure)
    assert f"{abs(spread_out - one).mean():.4f} (experts on 2 GPUs)" in said and f"{len(one)} steps" in said
    assert not overlaps(figure, texts_of(figure)) and not outside(figure)


def test_the_bars_of_a_step_are_its_time(gpus):
    figure = viz.spread_times(gpus[0])
    (ax,), speed = figure.axes, gpus[0]["speed"]
    for place, row in enumerate(speed["rows"]):
        bars = [bar for bar in ax.patches if round(bar.get_y() + bar.get_height() / 2) == place]
        tokens = speed["batch_size_each"] * speed["seq_len"] * row["devices"]
        assert sum(b.get_width() for b in bars) == pytest.approx(
            1000 * tokens / row["tokens_per_s"], rel=1e-3
        )
        assert f"{row['tokens_per_s']:,} tokens/s" in describe(figure)
    assert not overlaps(figure, texts_of(figure)) and not outside(figure)


def test_popular_experts_together_crowd_one_device_and_a_limit_bounds_what_is_sent():
    apart, together = (explored_traffic(8, 6, 3, placement) for placement in PLACEMENTS)
    assert together.sum(dim=0).argmax() == 0
    assert together.sum(dim=0).max() > 1.8 * apart.sum(dim=0).max()
    for rows in (apart, together):
        assert rows.sum(dim=1).max() <= 3 * EXPLORED_TOKENS / 8


def test_the_widget_moves_and_says_what_it_shows():
    explorer = viz.traffic_explorer()
    assert explorer.error is None
    before = explorer.image.value
    for change in ({"devices": 4}, {"k": 7}, {"limit": 1}, {"placement": PLACEMENTS[1]}):
        explorer.set(**change)
        assert explorer.error is None and explorer.image.value != before, change
        before = explorer.image.value
    explorer.set(devices=8, k=6, limit=3)
    rows = explored_traffic(8, 6, 3, PLACEMENTS[1])
    said = describe(explorer.figure)
    assert (
        f"{int(rows.sum()):,} hidden states are sent" in said and "receives 31% of them (even: 12%)" in said
    )
    bars = [bar.get_width() for bar in explorer.figure.axes[1].patches]
    assert bars == pytest.approx((rows.sum(dim=0) * HIDDEN_BYTES / 1e6).tolist())
    assert max(bars) < explorer.figure.axes[1].get_xlim()[1]
    with pytest.raises(ValueError, match="placement='x'"):
        viz.traffic_explorer(placement="x")


def test_no_bar_leaves_the_widget_s_scale():
    most = max(
        explored_traffic(devices, 8, 8, placement).sum(dim=0).max()
        for devices in (2, 3, 4, 6, 8)
        for placement in PLACEMENTS
    )
    assert most * HIDDEN_BYTES / 1e6 < 43


def test_links_and_bars_are_the_traffic():
    rows = torch.tensor([[0, 30, 10], [5, 0, 0], [20, 40, 0]])
    figure = viz.traffic_figure(rows)
    ring, bars = figure.axes
    widths = [bar.get_width() for bar in bars.patches]
    np.testing.assert_allclose(widths, np.array([25, 70, 10]) * HIDDEN_BYTES / 1e6)
    links = {link.get_label(): link for link in ring.patches if isinstance(link, FancyArrowPatch)}
    assert set(links) == {f"{a} to {b}" for a, b in rows.nonzero().tolist()}
    thick = {name: link.get_arrowstyle().tail_width for name, link in links.items()}
    for name, width in thick.items():
        a, b = map(int, name.split(" to "))
        assert width / thick["2 to 1"] == pytest.approx(float(rows[a, b]) / 40)
    text = viz.traffic_text(rows)
    assert "105 hidden states are sent" in text and "busiest device, 1, receives 67% of them" in text


@pytest.mark.parametrize(("devices", "limit"), list(itertools.product((2, 4, 8), (1, 8))))
def test_the_widget_can_be_read(devices, limit):
    figure = viz.traffic_explorer(devices=devices, k=8, limit=limit).figure
    texts = texts_of(figure)
    assert not overlaps(figure, texts) and not outside(figure)
    assert min(t.get_fontsize() for t in texts) >= SMALL
