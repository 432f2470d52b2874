"""Chapter 06's figures: what they draw is what was routed, cut and measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from test_viz import outside, overlaps, texts_of

from dsv2.bench import routers
from dsv2.config import DSV2Config
from dsv2.hf import load_pretrained
from dsv2.moe.routing import Routing
from dsv2.viz import describe, expert_layouts, router_curves, router_outcomes, routers_side_by_side
from dsv2.viz import experts as viz
from dsv2.viz.experts import KIND_COLOURS, PLAYED, Layout, play, playground_figure, playground_text
from dsv2.viz.style import SMALL

RUNS = Path(__file__).resolve().parents[1] / "data" / "runs"
SMALL_RUNS, LARGE_RUNS = (
    json.loads((RUNS / f"{name}.json").read_text(encoding="utf-8")) for name in ("routers", "routers_h100")
)
TEXTS = list("def f(x): r")


def states(tokens: int = len(TEXTS), hidden: int = 7) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------ a playground


@pytest.mark.parametrize("router", PLAYED)
def test_play_chooses_by_the_affinities_of_random_centroids(router):
    made = play(states(), router, experts=5, k=3, temperature=0.7, capacity_factor=1.0, seed=4)
    random = torch.Generator().manual_seed(4)
    centroids = torch.randn(5, 7, generator=random).double()
    logits = states().double() @ centroids.T
    logits *= 1.5 / logits.std(dim=1).mean() / 0.7
    powers = logits.exp()
    affinities = powers / powers.sum(dim=1, keepdim=True)
    torch.testing.assert_close(made.scores[0].double(), affinities, rtol=1e-5, atol=1e-6)
    count = {"DeepSeek": 3, "Switch": 1, "all experts": 5}.get(router.split(":")[0], 2)
    for t, row in enumerate(affinities.tolist()):
        assert made.expert_ids[0, t].tolist() == sorted(range(5), key=lambda i: -row[i])[:count]
    with_capacity = router.split(":")[0] in ("Switch", "GShard", "GLaM")
    assert (made.kept is not None) == with_capacity
    if with_capacity:
        served = torch.bincount(made.expert_ids[made.kept], minlength=5)
        assert served.max() <= max(1, count * len(TEXTS) // 5)


def test_no_more_experts_are_chosen_than_there_are_and_unknown_routers_are_refused():
    assert play(states(), "DeepSeek: the K best", 4, 8, 1.0, 1.0).expert_ids.shape == (1, len(TEXTS), 4)
    with pytest.raises(ValueError, match="router='best'.*Mixtral"):
        play(states(), "best", 4, 2, 1.0, 1.0)


def dropping() -> Routing:
    """3 tokens, 4 experts, 2 a token; expert 1 is chosen three times and takes two."""
    ids = torch.tensor([[[1, 0], [1, 2], [1, 0]]])
    kept = torch.tensor([[[True, True], [True, False], [False, True]]])
    return Routing(ids, torch.tensor([[[0.5, 0.25]] * 3]), torch.full((1, 3, 4), 0.25), kept)


def test_the_playground_draws_who_works_and_who_is_dropped():
    figure = playground_figure(dropping(), ["a", "b", "c"], shared=2)
    heat, load = figure.axes
    (mesh,) = heat.collections
    grid = mesh.get_array().reshape(4, 3)  # experts down, tokens across
    assert (grid >= 0).tolist() == [
        [True, False, True],
        [True, True, True],
        [False, True, False],
        [False, False, False],
    ]
    assert grid[1].tolist() == [0.5] * 3 and grid[2, 1] == 0.25
    (crosses,) = [line for line in heat.lines if line.get_label() == "dropped"]
    assert sorted(zip(*crosses.get_data())) == [(1, 2), (2, 1)]
    bars = [(bar.get_y() + 0.4, bar.get_x(), bar.get_width()) for bar in load.patches if bar.get_width() < 9]
    served = [(0.0, 0, 2), (1.0, 0, 2), (2.0, 0, 0), (3.0, 0, 0)]
    dropped = [(0.0, 2, 0), (1.0, 2, 1), (2.0, 0, 1), (3.0, 0, 0)]
    assert bars == [pytest.approx(bar) for bar in served + dropped]
    assert len(heat.patches) == 2  # the shared experts
    (fair,) = load.lines
    assert fair.get_xdata()[0] == 6 / 4


def test_the_playground_s_words_are_counted():
    text = playground_text(dropping())
    assert "2 of 4 routed experts for each of 3 tokens" in text
    assert "1.5 times on average, the busiest 3 times" in text and "1 are never chosen" in text
    assert "33% of the pairs are dropped" in text
    # kept: 0.5 + 0.25, 0.5, 0.25
    assert "add up to 0.50 on average" in text


def test_the_playground_s_controls():
    explorer = viz.routing_playground(states(), TEXTS)
    assert explorer.error is None
    before = explorer.image.value
    for change in ({"experts": 32}, {"k": 7}, {"shared": 0}, {"temperature": 0.1}, {"seed": 3}):
        explorer.set(**change)
        assert explorer.image.value != before, change
        before = explorer.image.value
    for router in reversed(PLAYED):
        explorer.set(router=router, capacity_factor=0.5)
        assert explorer.error is None and explorer.image.value != before
        before = explorer.image.value
        # What does nothing cannot be moved.
        assert explorer.controls["k"].disabled == (router != "DeepSeek: the K best")
        assert explorer.controls["capacity_factor"].disabled == (
            router[:5] not in ("Switc", "GShar", "GLaM:")
        )
    with pytest.raises(ValueError, match=r"states \(11, 7\).*for 10 texts"):
        viz.routing_playground(states(), TEXTS[1:])


def test_what_the_chapter_says_under_the_playground():
    """With room for other rounding, on the hidden states that the notebook shows."""
    model = load_pretrained(RUNS.parent / "tiny", dtype=torch.float32)
    tokens = torch.tensor([model.tokenizer.encode("def area(r): return 3.14 * r ** 2")])
    seen = []
    model.layers[1].ffn.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    with torch.no_grad():
        model(tokens)
    best, switch, gshard, glam, _, everyone = PLAYED

    def made(router: str, experts: int = 16, k: int = 4, temperature: float = 1.0, capacity: float = 1.25):
        return play(seen[0], router, experts, k, temperature, capacity)

    cold, hot = made(best, temperature=0.1), made(best, temperature=4.0)
    assert (cold.expert_ids == hot.expert_ids).all()
    assert cold.weights[..., 0].mean() == pytest.approx(0.91, abs=0.02)
    assert hot.weights.sum(dim=-1).mean() == pytest.approx(0.38, abs=0.02)
    loads = [made(best, 32, k).load() for k in (1, 8)]
    assert abs(int((loads[0] == 0).sum()) - 13) <= 2 and loads[1].min() > 0
    assert loads[0].max() >= 3 and loads[1].max() / loads[1].float().mean() < 2
    tight, loose = (~made(switch, capacity=factor).kept[0, :, 0] for factor in (0.5, 4.0))
    assert abs(int(tight.sum()) - 18) <= 2 and int(loose.sum()) <= 2
    assert tight[16:].sum() > 1.5 * tight[:16].sum()
    assert (made(switch, capacity=1.0).kept == made(switch, capacity=1.25).kept).all()
    by_chance, certain = (made(router, capacity=4.0) for router in (gshard, glam))
    assert certain.kept.all() and by_chance.kept[..., 0].all()
    second, works = by_chance.weights[..., 1], by_chance.kept[..., 1]
    assert 8 <= int((~works).sum()) <= 18 and second[~works].mean() < second[works].mean() - 0.05
    lost = [1 - made(everyone, temperature=t).weights[..., :4].sum(dim=-1).mean() for t in (1.0, 0.1)]
    assert lost[0] == pytest.approx(0.25, abs=0.02) and lost[1] < 0.01


# ---------------------------------------------------------------------------------------- side by side


def test_routers_side_by_side_draw_each_its_own():
    names = {"one": dropping(), "two": play(states(3), "Mixtral: two, without capacity", 4, 2, 1.0, 1.0)}
    figure = routers_side_by_side(names, ["a", "b", "c"])
    panels = [ax for ax in figure.axes if ax.get_title("left")]
    assert [ax.get_title("left") for ax in panels] == ["one: 2 of 6 pairs dropped", "two: nothing is dropped"]
    for ax, made in zip(panels, names.values()):
        grid = ax.collections[0].get_array().reshape(4, 3)
        for t in range(3):
            assert np.flatnonzero(grid[:, t] >= 0).tolist() == sorted(made.expert_ids[0, t].tolist())
    assert "one: 2 experts a token" in describe(figure)
    with pytest.raises(ValueError, match="texts has 2 tokens, one is over 3"):
        routers_side_by_side(names, ["a", "b"])
    with pytest.raises(ValueError, match="empty"):
        routers_side_by_side({}, [])


# ------------------------------------------------------------------------------------------- the layouts


def test_layouts_are_drawn_to_scale():
    layouts = {"coarse": Layout(8, 4, 1), "fine": Layout(31, 1, 3, 1)}
    figure = expert_layouts(layouts)
    (ax,) = figure.axes
    for row, layout in enumerate(layouts.values()):
        blocks = [b for b in ax.patches if b.get_y() == pytest.approx(row - 0.36)]
        assert len(blocks) == layout.routed + layout.shared
        assert sum(b.get_width() for b in blocks) == layout.total == 32
        lit = [b for b in blocks if b.get_facecolor() != blocks[-1].get_facecolor()]
        assert sum(b.get_width() for b in lit) in (layout.active, 32 - layout.active)
        assert layout.active == 4
    with pytest.raises(ValueError, match="layouts is empty"):
        expert_layouts({})


def test_the_layouts_of_the_chapter_are_those_of_the_runs():
    for name, cfg in routers.STUDY.models.items():
        if cfg.moe_layers:
            unit = 32
            layout = Layout(
                cfg.n_routed_experts,
                cfg.moe_intermediate_size / unit,
                cfg.num_experts_per_tok,
                cfg.n_shared_experts,
            )
            assert layout.total == 32 and layout.active == (32 if name == "all experts" else 4), name


# ---------------------------------------------------------------------------------------- the stored runs


def made_up() -> dict:
    """Two kinds beside the plain network; what differs from it is known."""
    base = {0: 2.0, 1: 2.4}
    gains = {"one FFN": (0, 0), "Switch": (0.1, 0.3), "top-4 of 32": (-0.2, -0.1)}
    return {
        "runs": [
            {
                "name": name,
                "seed": seed,
                "val_curve": [[0, 5.5], [50, base[seed] + 1 + gain[seed]], [100, base[seed] + gain[seed]]],
                "val_nats_per_byte": base[seed] + gain[seed],
            }
            for seed in base
            for name, gain in gains.items()
        ]
    }


def test_curves_are_differences_within_a_seed():
    figure = router_curves(made_up())
    panels = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title("left") for ax in panels] == ["one of 8", "small experts"]
    means = {"Switch": 0.2, "top-4 of 32": -0.15}
    ranges = {"Switch": (0.1, 0.3), "top-4 of 32": (-0.2, -0.1)}
    for ax, name in zip(panels, means):
        (line,) = [line for line in ax.lines if line.get_label() == name]
        assert line.get_xdata().tolist() == [50, 100]
        np.testing.assert_allclose(line.get_ydata(), [means[name]] * 2)
        (band,) = ax.collections
        edges = band.get_paths()[0].vertices
        np.testing.assert_allclose((edges[:, 1].min(), edges[:, 1].max()), ranges[name])
        assert ax.get_ylim()[0] < -0.2 and ax.get_ylim()[1] > 0.3
    assert "Switch +0.200 (+0.100 to +0.300)" in describe(figure)
    assert "top-4 of 32 -0.150 (-0.200 to -0.100)" in describe(figure)


def test_seeds_that_are_mixed_up_would_be_seen():
    """A planted bug: seed 1 held against the plain network of seed 0 makes other curves."""
    stored = made_up()
    right = describe(router_curves(stored))
    for run in stored["runs"]:
        run["seed"] = 1 - run["seed"] if run["name"] == "one FFN" else run["seed"]
    wrong = describe(router_curves(stored))
    assert "Switch +0.200 (-0.300 to +0.700)" in wrong and wrong != right


def test_a_kind_of_no_family_has_a_panel_of_its_own():
    stored = made_up()
    for run in stored["runs"]:
        run["name"] = {"Switch": "a new one"}.get(run["name"], run["name"])
    titles = [ax.get_title("left") for ax in router_curves(stored).axes if ax.get_visible()]
    assert titles == ["small experts", "a new one"]


def test_outcomes_are_dots_within_a_seed():
    figure = router_outcomes({"made up": made_up()})
    (ax,) = figure.axes
    dots = [line.get_xdata() for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots, [[0.1, 0.3], [-0.2, -0.1]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["Switch", "top-4 of 32"]
    assert "made up, top-4 of 32: -0.150 (-0.200 to -0.100)" in describe(figure)
    without = {"runs": [run for run in made_up()["runs"] if run["name"] != "one FFN"]}
    with pytest.raises(ValueError, match="no run called 'one FFN'"):
        router_outcomes({"made up": without})


@pytest.mark.parametrize(
    "figure",
    [
        router_outcomes({"a": SMALL_RUNS, "b": LARGE_RUNS}),
        router_curves(LARGE_RUNS),
        router_curves(SMALL_RUNS),
    ],
)
def test_the_stored_runs_figures_can_be_read(figure):
    texts = texts_of(figure)
    assert not overlaps(figure, texts) and not outside(figure)
    assert min(t.get_fontsize() for t in texts) >= SMALL


@pytest.mark.parametrize(
    ("stored", "study", "seeds"), [(SMALL_RUNS, routers.STUDY, 3), (LARGE_RUNS, routers.LARGE_STUDY, 2)]
)
def test_the_stored_runs_are_the_command_s(stored, study, seeds):
    assert {name: DSV2Config.from_dict(cfg) for name, cfg in stored["models"].items()} == study.models
    assert stored["training"] == study.training.to_dict()
    assert {(run["name"], run["seed"]) for run in stored["runs"]} == {
        (name, seed) for name in study.models for seed in range(seeds)
    }
    assert stored["command"].startswith("python -m dsv2.bench routers")
    assert {"date", "device", "versions", "corpus_fingerprint"} <= set(stored)


def on_the_curve(run: dict) -> float:
    return run["val_curve"][-1][1]


def gains(stored: dict, name: str, loss=lambda run: run["val_nats_per_byte"]) -> list[float]:
    losses = {(run["name"], run["seed"]): loss(run) for run in stored["runs"]}
    return [losses[name, seed] - losses["one FFN", seed] for kind, seed in losses if kind == name]


def test_what_the_chapter_says_of_the_stored_runs():
    fine = [g for kind in ("top-4 of 32", "3 of 31 + 1 shared") for g in gains(SMALL_RUNS, kind)]
    assert -0.10 < min(fine) and max(fine) < -0.039
    fine = [g for kind in ("top-4 of 32", "3 of 31 + 1 shared") for g in gains(LARGE_RUNS, kind)]
    assert -0.0245 < min(fine) and max(fine) < -0.0065
    switch = gains(SMALL_RUNS, "Switch") + gains(LARGE_RUNS, "Switch")
    assert -0.0055 < min(switch) < 0 < max(switch) < 0.0255
    assert all(g < 0 for kind in ("GShard", "GLaM", "Mixtral") for g in gains(LARGE_RUNS, kind))
    finest = gains(LARGE_RUNS, "6 of 62 + 2 shared")
    assert all(
        a < b
        for kind in KIND_COLOURS
        if kind != "6 of 62 + 2 shared"
        for a, b in zip(finest, gains(LARGE_RUNS, kind))
    )
    assert max(gains(LARGE_RUNS, "6 of 62 + 2 shared", on_the_curve)) < -0.02
    smallest = gains(SMALL_RUNS, "6 of 62 + 2 shared")
    assert all(a > b for a, b in zip(smallest, gains(SMALL_RUNS, "top-4 of 32")))
    # Measured on the fewer windows of the curves, one of the four small leads is gone.
    few = [g for kind in ("top-4 of 32", "3 of 31 + 1 shared") for g in gains(LARGE_RUNS, kind, on_the_curve)]
    assert sum(g > 0 for g in few) == 1


def drawn() -> dict[str, Figure]:
    """The figures that are made from routings and layouts, at the ends of their ranges."""
    long = list("def area(r): return 3.14 * r ** 2")
    random = states(len(long), 24)
    many = {name.split(":")[0]: play(random, name, 16, 4, 1.0, 1.0) for name in PLAYED}
    return {
        "six routers": routers_side_by_side(many, long),
        "one router": routers_side_by_side({"Mixtral": many["Mixtral"]}, long),
        "three routers of 4 experts": routers_side_by_side(
            {name.split(":")[0]: play(random, name, 4, 2, 1.0, 0.5) for name in list(PLAYED)[:3]}, long
        ),
        "words": playground_figure(play(states(6), "GLaM: two", 8, 2, 1.0, 1.0), ["return"] * 6, 2),
        "least": playground_figure(play(random, "Switch: the best", 4, 1, 0.1, 0.5), long),
        "most": playground_figure(play(random, "all experts", 32, 8, 4.0, 1.0), long, 4),
        "layouts": expert_layouts({"one": Layout(1, 4, 1), "6 of 62 + 2 shared": Layout(62, 0.5, 6, 2)}),
    }


@pytest.mark.parametrize("name", drawn())
def test_figures_of_routings_can_be_read(name):
    figure = drawn()[name]
    texts = texts_of(figure)
    assert not overlaps(figure, texts) and not outside(figure)
    assert min(t.get_fontsize() for t in texts) >= SMALL and len(describe(figure)) > 60


def test_a_router_that_drops_the_wrong_pairs_would_be_seen():
    """A planted bug: with kept turned round, bars and crosses of the playground are others."""
    right = dropping()
    wrong = Routing(right.expert_ids, right.weights, right.scores, ~right.kept)
    figures = [playground_figure(made, ["a", "b", "c"]) for made in (right, wrong)]
    widths = [[bar.get_width() for bar in figure.axes[1].patches] for figure in figures]
    crosses = [sorted(zip(*figure.axes[0].lines[0].get_data())) for figure in figures]
    assert widths[0] != widths[1] and crosses[0] != crosses[1]
