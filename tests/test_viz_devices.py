"""Chapter 07's figures: messages, reach, bytes and losses are those that went in, counted another way."""

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
from dsv2.config import DSV2Config
from dsv2.moe.experts import RoutedExperts
from dsv2.moe.parallel import HIDDEN, ExpertParallel, FakeDevices, Placement
from dsv2.viz import describe, limit_curves, limit_outcomes, message_drawing, reach_bars, same_bytes
from dsv2.viz import devices as viz
from dsv2.viz.devices import HIDDEN_BYTES, PLACEMENTS, explored_traffic, traffic_figure, traffic_text
from dsv2.viz.style import SMALL

STORED = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "runs" / "device_limit.json").read_text(encoding="utf-8")
)

# ------------------------------------------------------------------------------------------ the messages

PLACED = Placement((2, 0, 1, 0, 2, 1, 2), 4)  # 7 experts in no order, none on the last device
SIZES = [1, 3, 0, 2]  # tokens of each device
IDS = torch.tensor([[0, 4, 1], [1, 3, 0], [2, 5, 6], [3, 2, 4], [6, 4, 0], [1, 2, 3]])


def inboxes() -> list:
    random = torch.Generator().manual_seed(3)
    experts = RoutedExperts(7, 5, 4)
    for parameter in experts.parameters():
        parameter.data.normal_(generator=random)
    devices = FakeDevices(4)
    x, weights = torch.randn(6, 5, generator=random), torch.rand(6, 3, generator=random)
    ExpertParallel(PLACED, devices)(experts, x, IDS, weights, tokens=SIZES)
    return devices.inboxes


def expected_messages() -> set[tuple[str, int, int, frozenset[int]]]:
    """(token, its device, the experts' device, experts), from the choices alone."""
    homes = [device for device, size in enumerate(SIZES) for _ in range(size)]
    found = set()
    for t, chosen in enumerate(IDS.tolist()):
        for device in {PLACED.device_of[e] for e in chosen}:
            there = frozenset(e for e in chosen if PLACED.device_of[e] == device)
            found.add(("abcdef"[t], homes[t], device, there))
    return found


def drawn_messages(figure) -> list[tuple[str, str, frozenset[int]]]:
    """(token at the arrow's start, token at its end, experts it is for), from what stands on the figure."""
    (ax,) = figure.axes
    tokens = {(*t.get_position(),): t.get_text()[-1] for t in ax.texts if t.get_text().startswith("token ")}
    work = {(*t.get_position(),): t.get_text() for t in ax.texts if ": expert " in t.get_text()}
    work = {place: text for place, text in work.items() if not text.startswith("device")}

    def nearest(texts: dict, place) -> str:
        return min((abs(x - place[0]) + 9 * abs(y - place[1]), text) for (x, y), text in texts.items())[1]

    found = []
    for arrow in (patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)):
        start, end = arrow._posA_posB
        there = start[0] < 5
        asked = nearest(work, end if there else start)
        experts = frozenset(int(part.split()[-1]) for part in asked.split(": ")[1].split(", "))
        found.append((nearest(tokens, start if there else end), asked[0], experts))
    return found


def test_every_message_is_drawn_there_and_back():
    expected = expected_messages()
    figure = message_drawing(inboxes(), SIZES, PLACED, list("abcdef"))
    drawn = drawn_messages(figure)
    assert len(drawn) == 2 * len(expected)
    assert set(drawn) == {(token, token, experts) for token, _, _, experts in expected}
    sent = sum(home != device for _, home, device, _ in expected)
    assert f"{sent} hidden states are sent" in describe(figure)
    assert f"; {len(expected) - sent} stay" in describe(figure)
    (ax,) = figure.axes
    dotted = [p for p in ax.patches if isinstance(p, FancyArrowPatch) and p.get_linestyle() != "-"]
    assert len(dotted) == 2 * (len(expected) - sent)


def test_a_message_too_few_would_be_seen():
    some = inboxes()
    some[0] = type(some[0])(*(part[:0] for part in vars(some[0]).values()))
    assert len(drawn_messages(message_drawing(some, SIZES, PLACED, list("abcdef")))) < 2 * len(
        expected_messages()
    )


def test_messages_of_other_devices_are_refused():
    with pytest.raises(ValueError, match="4 devices, 3 inboxes and 4 sizes"):
        message_drawing(inboxes()[1:], SIZES, PLACED)


# ----------------------------------------------------------------------------------- how many devices


@pytest.mark.parametrize(("experts", "devices", "k"), [(6, 3, 2), (8, 2, 5), (9, 3, 4), (10, 5, 1)])
def test_chance_is_the_mean_over_all_sets(experts, devices, k):
    each = [len({e * devices // experts for e in some}) for some in itertools.combinations(range(experts), k)]
    assert viz.chance_reach(experts, devices, k) == pytest.approx(sum(each) / len(each))


def test_chance_needs_experts_that_split_evenly():
    with pytest.raises(ValueError, match="n_experts=10 is not a multiple of devices=4"):
        viz.chance_reach(10, 4, 2)


def test_reach_bars_are_shares_of_the_tokens():
    reaches = {"one": torch.tensor([1, 3, 3, 2]), "two": torch.tensor([2, 2, 2, 2, 4])}
    figure = reach_bars(reaches, devices=4, limit=2)
    (ax,) = figure.axes
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    np.testing.assert_allclose(heights, [[25, 25, 50, 0], [0, 80, 0, 20]], rtol=1e-6)
    assert "one: mean 2.25, 50.0 % within 2; two: mean 2.40, 80.0 % within 2" in describe(figure)
    with pytest.raises(ValueError, match="empty"):
        reach_bars({}, 4, 2)


def test_limit_curves_are_kib():
    figure = limit_curves({"a": {1: 0.5, 2: 1.25, 4: 1.5}}, per_device=2048)
    (ax,) = figure.axes
    bound, curve = ax.lines
    assert list(bound.get_ydata()) == [2, 8]
    assert list(curve.get_xdata()) == [1, 2, 4] and list(curve.get_ydata()) == [1.0, 2.5, 3.0]
    with pytest.raises(ValueError, match="empty"):
        limit_curves({}, 2048)


# ------------------------------------------------------------------------------------------- the bytes


def report() -> dict:
    counts = torch.arange(9).view(3, 3).fill_diagonal_(0)
    made = {kind: (counts * (1000 + place)).tolist() for place, kind in enumerate(HIDDEN)}
    return {"real": made, "fake": json.loads(json.dumps(made))}


def test_same_bytes_are_written_pair_by_pair():
    figure = same_bytes(report())
    for ax in figure.axes:
        cells = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in ax.texts}
        for a, b in itertools.product(range(3), repeat=2):
            assert cells[a, b] == ("stays" if a == b else f"{(3 * a + b) * 2001:,}")
    assert ", equal for every pair" in describe(figure)


def test_different_bytes_are_said_to_be():
    changed = report()
    changed["real"][HIDDEN[0]][0][1] += 1
    changed["real"][HIDDEN[0]][1][0] -= 1  # the sum is the same
    assert "not equal for every pair" in describe(same_bytes(changed))


# ----------------------------------------------------------------------------------------- what M costs


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


def test_losses_are_compared_within_a_seed():
    figure = limit_outcomes(made_up())
    left, right = ([line for line in ax.lines if line.get_marker() == "o"] for ax in figure.axes)
    assert [list(line.get_ydata()) for line in left] == [[2.25, 1.875, 2.0], [3.0, 2.5, 2.5]]
    assert [list(line.get_ydata()) for line in right] == [[0.25, -0.125, 0], [0.5, 0, 0]]
    assert "M = 1 +0.3750, M = 3 -0.0625, M = 8 +0.0000" in describe(figure)


def test_a_run_that_is_missing_is_named():
    some = made_up()
    some["runs"] = some["runs"][1:]
    with pytest.raises(ValueError, match="M = 1 has no run of seed 1"):
        limit_outcomes(some)


def test_the_stored_runs_are_the_command_s():
    study = device_limit.STUDY
    assert {name: DSV2Config.from_dict(cfg) for name, cfg in STORED["models"].items()} == study.models
    assert STORED["training"] == study.training.to_dict()
    runs = {(run["name"], run["seed"]) for run in STORED["runs"]}
    assert runs == {(name, seed) for name in study.models for seed in range(3)}


def test_what_the_stored_runs_say():
    """M = 1 is worse for every seed; from 2 on, differences are smaller than those between seeds."""
    loss = {(run["name"], run["seed"]): run["val_nats_per_byte"] for run in STORED["runs"]}
    more = {m: [loss[f"M = {m}", s] - loss["M = 8", s] for s in range(3)] for m in (1, 2, 3, 4)}
    assert 0.0095 < min(more[1]) and max(more[1]) < 0.0285
    assert -0.0135 < min(more[2]) < 0 < max(more[2]) < 0.0135
    assert -0.0035 < min(more[3]) < 0 < max(more[3]) < 0.0065
    assert 0.001 < min(more[4]) and max(more[4]) < 0.0175
    assert np.mean(more[3]) < 0.002 < np.mean(more[2]) < np.mean(more[4]) < 0.01 < 0.02 < np.mean(more[1])
    free = [loss["M = 8", s] for s in range(3)]
    assert max(free) - min(free) > 0.1


# --------------------------------------------------------------------------------------------- the widget


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("devices", "k", "limit"), [(3, 4, 2), (8, 6, 3), (2, 1, 8)])
def test_explored_traffic_is_counted_token_by_token(devices, k, limit, placement):
    scores = viz.explored_scores(placement)[0].tolist()
    expected = [[0] * devices for _ in range(devices)]
    per = len(scores[0]) // devices
    for t, row in enumerate(scores):
        blocks = sorted(range(devices), key=lambda d: -max(row[d * per : (d + 1) * per]))[:limit]
        open_to = sorted((e for d in blocks for e in range(d * per, (d + 1) * per)), key=lambda e: -row[e])
        home = t * devices // len(scores)
        for device in {e // per for e in open_to[:k]} - {home}:
            expected[home][device] += 1
    assert explored_traffic(devices, k, limit, placement).tolist() == expected


def test_links_and_bars_are_the_traffic():
    rows = torch.tensor([[0, 30, 10], [5, 0, 0], [20, 40, 0]])
    figure = traffic_figure(rows)
    ring, bars = figure.axes
    widths = [bar.get_width() for bar in bars.patches]
    np.testing.assert_allclose(widths, np.array([25, 70, 10]) * HIDDEN_BYTES / 2**20)
    links = {link.get_label(): link for link in ring.patches if isinstance(link, FancyArrowPatch)}
    assert set(links) == {f"{a} to {b}" for a, b in rows.nonzero().tolist()}
    thick = {name: link.get_arrowstyle().tail_width for name, link in links.items()}
    for name, width in thick.items():
        a, b = map(int, name.split(" to "))
        assert width / thick["2 to 1"] == pytest.approx(float(rows[a, b]) / 40)
    text = traffic_text(rows)
    assert "105 hidden states are sent" in text and "busiest device, 1, receives 67% of them" in text


def test_the_widget_s_controls():
    explorer = viz.traffic_explorer()
    assert explorer.error is None
    for change in ({"limit": 8}, {"k": 2}, {"devices": 3}, {"placement": PLACEMENTS[1]}):
        before = explorer.image.value
        explorer.set(**change)
        assert explorer.image.value != before, change
    for devices, limit in itertools.product((2, 4, 8), (1, 8)):
        explorer.set(devices=devices, limit=limit, k=8)
        assert not outside(explorer.figure) and not overlaps(explorer.figure, texts_of(explorer.figure))
        widest = max(bar.get_width() for bar in explorer.figure.axes[1].patches)
        assert widest <= explorer.figure.axes[1].get_xlim()[1], (devices, limit)
    with pytest.raises(ValueError, match="placement='elsewhere' must be one of"):
        viz.traffic_explorer(placement="elsewhere")


@pytest.mark.parametrize(
    "figure",
    [
        message_drawing(inboxes(), SIZES, PLACED),
        reach_bars({"a trained router": torch.tensor([1, 2]), "by chance": torch.tensor([2, 2])}, 4, 2),
        limit_curves({"6 of 160 experts": {1: 0.9, 2: 1.7, 3: 2.5, 8: 3.8}}, HIDDEN_BYTES),
        same_bytes(report()),
        limit_outcomes(STORED),
    ],
)
def test_figures_can_be_read(figure):
    texts = texts_of(figure)
    assert not overlaps(figure, texts) and not outside(figure)
    assert min(t.get_fontsize() for t in texts) >= SMALL
