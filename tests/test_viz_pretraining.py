"""The figures, widgets and stored runs of chapter 10: what they draw is what was computed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_viz import outside, overlaps, texts_of

from dsv2 import DSV2Config
from dsv2.bench import pretraining as bench
from dsv2.data import Corpus, Document, prepare
from dsv2.data.packing import Batch
from dsv2.evaluate import Specialisation, count_choices, mutual_information
from dsv2.train import TrainConfig, Trainer
from dsv2.viz import (
    describe,
    domain_browser,
    gradient_norms,
    information_dots,
    kind_curves,
    leanings,
    live_figure,
    live_training,
    marked_text,
    paper_training,
    preference_maps,
    schedule_curves,
    steps_for,
    training_schedule_explorer,
    training_schedule_figure,
)
from dsv2.viz.style import SMALL

STORED = json.loads(bench.OUT.read_text(encoding="utf-8"))
TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"
NAMES = ["code", "english", "arithmetic", "french"]


def table(seed: int, experts: int = 16) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).integers(20, 200, (4, experts)))


def layer(seed: int) -> Specialisation:
    counts = table(seed)
    chance = np.abs(np.random.default_rng(seed).normal(0.001, 0.0002, 40))
    return Specialisation(counts, mutual_information(counts), 1.386, chance)


def browser():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.rand(8, 12, 16, generator=generator).topk(4, dim=-1).indices for _ in range(2)]
    domains = torch.arange(4).repeat_interleave(2)[:, None].expand(-1, 12).to(torch.int8)
    tokens = torch.randint(97, 123, (8, 12), generator=generator)
    windows = Batch(tokens, tokens, domains)
    texts = [[chr(t) for t in row] for row in tokens.tolist()]
    texts[0][3], texts[0][4], texts[0][5] = "<", "\n", "\x00"
    return ids, windows, domain_browser(ids, windows, NAMES, texts, n_experts=16, layers=[1, 2], devices=4)


# --------------------------------------------------------------------------------------------- schedules


def test_the_papers_run_is_drawn_by_the_papers_numbers():
    config = paper_training()
    assert config.tokens_before(config.steps - 1) < 8100 * 10**9 <= config.tokens_before(config.steps)
    curves = schedule_curves(config)
    for tokens, lr, batch in zip(*(curves[name] for name in ("tokens", "lr", "batch"))):
        share = tokens / (config.tokens_before(config.steps) / 1e9)
        if tokens > 25:
            assert lr == pytest.approx(2.4e-4 * 0.316 ** (int(share >= 0.6) + int(share >= 0.9)))
        straight = 2304 + 6912 * min(1, tokens / 225)
        assert batch == pytest.approx(straight, abs=1.01)
    figure = training_schedule_figure(config)
    assert list(figure.panels[0].lines[0].get_ydata()) == list(curves["lr"])
    assert "219,636 steps for 8,100 billion tokens" in describe(figure)


def test_the_schedule_explorer_moves_its_artists():
    explorer = training_schedule_explorer()
    figure = explorer.figure
    for values in (
        {"schedule": "cosine"},
        {"peak": 1e-4},
        {"warmup": 40_000},
        {"start": 4608},
        {"ramp": 4000},
    ):
        before = bytes(explorer.image.value)
        assert explorer.set(**values) is figure
        assert bytes(explorer.image.value) != before, values
    explorer.reset()
    explorer.set(end=2304)
    assert "<b>858,307 steps</b>" in explorer.below.value
    explorer.set(start=9216)  # a last batch below the first: no ramp
    assert "from 9,216 to 9,216" in explorer.below.value


# -------------------------------------------------------------------------------------------------- live


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory):
    text = "".join(chr(97 + n % 26) for n in range(900))
    corpus = Corpus([Document("code", f"file {n}", text[n:] + str(n)) for n in range(9)], {})
    data = prepare(corpus, directory=tmp_path_factory.mktemp("data") / "packed")
    cfg = DSV2Config.preset("tiny").replace(hidden_size=16, num_hidden_layers=2, moe_intermediate_size=8)

    def make(**changes) -> Trainer:
        settings = dict(steps=5, batch_size=2, seq_len=16, validate_every=0, sample_every=0) | changes
        return Trainer(cfg, TrainConfig(**settings), data)

    return make


def test_a_live_run_is_the_trainers_own(trainer_of):
    rows, figure = live_training(trainer_of())
    assert [row["loss"] for row in rows] == [row["loss"] for row in trainer_of()]
    assert list(figure.axes[0].lines[0].get_ydata()) == [row["loss"] for row in rows]
    assert "Step 5 of 5" in describe(figure)
    cut, _ = live_training(trainer_of(steps=10_000), seconds=0.01, show=False)
    assert 1 <= len(cut) < 200
    assert steps_for(trainer_of(), 1e-9) == 10 and steps_for(trainer_of(), 3600) > 1000
    with pytest.raises(ValueError, match="rows is empty"):
        live_figure([], TrainConfig())


def test_gradient_norms_count_those_over_the_limit():
    rows = [{"step": n, "grad_norm": g} for n, g in ((1, 8.0), (2, 0.5), (3, 1.5), (4, 0.2))]
    figure = gradient_norms(rows, limit=1.0)
    assert list(figure.axes[0].lines[1].get_xdata()) == [1, 3]
    assert describe(figure).startswith("2 of 4 recorded steps")
    with pytest.raises(ValueError, match="grad_norm"):
        gradient_norms([{"step": 1, "loss": 2.0}])


# ------------------------------------------------------------------------------------------- preferences


def test_leanings_are_ratios_to_the_mean_domain():
    counts = torch.tensor([[8, 2, 0], [30, 60, 10 - 10], [5, 5, 0]])
    right = np.zeros((3, 3))
    shares = [[0.8, 0.2], [1 / 3, 2 / 3], [0.5, 0.5]]
    for d in range(3):
        for e in range(2):
            right[d, e] = shares[d][e] / np.mean([row[e] for row in shares])
    right[:, 2] = 1.0  # nobody chose it
    np.testing.assert_allclose(leanings(counts), right, rtol=1e-9)
    assert (leanings(torch.tensor([[1, 3], [10, 30]])) == 1).all()


def test_maps_show_the_leanings_and_a_transposed_one_would_be_seen():
    counts = table(1)
    figure = preference_maps({"one": counts, "two": table(2)}, NAMES, devices=4, expert=5)
    drawn = np.ma.asarray(figure.axes[0].collections[0].get_array()).reshape(4, -1)
    right = leanings(counts)
    np.testing.assert_allclose(drawn.compressed().reshape(4, 16), right)
    assert not np.allclose(right, leanings(counts.T.reshape(4, 16)))
    assert f"code: expert {right[0].argmax()}" in describe(figure)
    with pytest.raises(ValueError, match="1 to 3"):
        preference_maps({}, NAMES)
    with pytest.raises(ValueError, match="has 4 rows for 2 domains"):
        preference_maps({"one": counts}, NAMES[:2])


def test_dots_are_the_information():
    measured = {"a": [layer(1), layer(2)], "b": [layer(3), layer(4)]}
    figure = information_dots(measured, [1, 2])
    dots = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert dots["b"] == [layer(3).information, layer(4).information]
    with pytest.raises(ValueError, match="'a' has 2 layers, and layers has 3"):
        information_dots(measured, [1, 2, 3])


def test_the_browser_marks_the_tokens_of_an_expert():
    ids, windows, explorer = browser()
    for values in ({"layer": 1}, {"expert": 7}, {"shuffle": 3}, {"window": 5}):
        before = bytes(explorer.image.value)
        explorer.set(**values)
        assert bytes(explorer.image.value) != before, values
        layer, expert, window = (explorer.values[n] for n in ("layer", "expert", "window"))
        chosen = (ids[layer][window] == expert).any(dim=-1)
        assert explorer.below.value.count("<span") == int(chosen.sum())
        assert f"<b>{int(chosen.sum())} of 12</b>" in explorer.below.value
    drawn = np.ma.asarray(explorer.figure.axes[0].collections[0].get_array()).compressed()
    right = leanings(count_choices(ids[1], windows.domains, 4, 16))
    np.testing.assert_allclose(drawn.reshape(4, 16), right)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    shuffled = leanings(count_choices(ids[1], windows.domains[order], 4, 16))
    drawn = np.ma.asarray(explorer.figure.axes[1].collections[0].get_array()).compressed()
    np.testing.assert_allclose(drawn.reshape(4, 16), shuffled)
    with pytest.raises(ValueError, match="texts has 0 windows"):
        domain_browser(ids, windows, NAMES, [], n_experts=16, layers=[1, 2])
    with pytest.raises(ValueError, match="layers has 1 numbers for 2"):
        domain_browser(ids, windows, NAMES, [["a"] * 12] * 8, n_experts=16, layers=[1])


def test_marked_text_is_safe_html():
    shown = marked_text(["<b>", "\n", "\x00", "x"], [True, True, False, False])
    assert "&lt;b&gt;" in shown and "↵\n" in shown and "\x00" not in shown and shown.count("<span") == 2


# ---------------------------------------------------------------------------------------- the stored runs


def test_curves_are_means_of_the_stored_runs():
    group = [run for run in STORED["runs"] if run["name"] == "batch ramp"]
    for what in ("val_curve", "information"):
        figure = kind_curves(STORED, what, ["batch ramp", "constant"])
        line = figure.axes[0].lines[0]
        right = [np.mean([np.mean(run[what][n]) for run in group]) for n in range(len(group[0][what]))]
        np.testing.assert_allclose(line.get_ydata(), right)
    with pytest.raises(ValueError, match="what='loss' must be one of"):
        kind_curves(STORED, "loss")
    with pytest.raises(ValueError, match="no run is called warm"):
        kind_curves(STORED, names=["warm"])


def test_the_stored_runs_say_what_chapter_10_says():
    kinds, seeds = list(STORED["kinds"]), {run["seed"] for run in STORED["runs"]}
    assert kinds == list(bench.kinds()) and len(seeds) == 3 and len(STORED["runs"]) == 15
    for name, kind in bench.kinds().items():
        assert STORED["kinds"][name]["training"] == kind.training.to_dict()
        assert DSV2Config.from_dict(STORED["kinds"][name]["model"]) == kind.model
    ends = {(run["name"], run["seed"]): run["val_curve"][-1] for run in STORED["runs"]}
    told = {(run["name"], run["seed"]): np.mean(run["information"][-1]) for run in STORED["runs"]}
    for seed in seeds:
        assert ends["constant", seed] < ends["paper's steps", seed] < ends["cosine", seed]
        assert ends["paper's steps", seed] < ends["no balance losses", seed]
        ratio = told["no balance losses", seed] / told["paper's steps", seed]
        assert 3.2 < ratio < 4.4
    assert sum(ends["batch ramp", s] < ends["paper's steps", s] for s in seeds) == 2
    balanced = [value for (name, _), value in told.items() if name != "no balance losses"]
    assert 0.018 < min(balanced) and max(balanced) < 0.0315
    for run in STORED["runs"]:
        for row, information in zip(run["layers"], run["information"][-1]):
            counts = torch.tensor(row["counts"])
            assert mutual_information(counts) == pytest.approx(row["information"])
            assert row["information"] == pytest.approx(information, abs=1e-6) and row["p"] < 0.006
    for name in ("command", "date", "device", "versions", "corpus_fingerprint"):
        assert STORED[name]


def test_kinds_read_equally_many_tokens_and_differ_in_one_thing():
    kinds = bench.kinds()
    plain = kinds["paper's steps"]
    for name, kind in kinds.items():
        difference = kind.training.tokens_before(kind.training.steps) - 1_024_000
        assert 0 <= difference < 16 * 128, name
        a, b = plain.training.to_dict(), kind.training.to_dict()
        changed = {key for key in a if a[key] != b.get(key)}
        if name == "batch ramp":
            assert changed == {"steps", "batch_size"}
        else:
            assert changed == ({"schedule"} if name in ("constant", "cosine") else set())


def test_a_run_is_measured_and_repeatable(tmp_path):
    corpus = [
        Document(name, f"{name} {n}", f"{name} {n} " * 200, split=split)
        for name in ("code", "english")
        for n in range(6)
        for split in ("train", "validation")
    ]
    corpus = [Document(d.domain, d.name, d.split + d.text, split=d.split) for d in corpus]
    data = prepare(Corpus(corpus, {}), directory=tmp_path / "packed")
    cfg = bench.MODEL.replace(num_hidden_layers=2, hidden_size=32)
    training = bench.TRAINING.replace(steps=6, batch_size=2, seq_len=32)
    kind = bench.Kind(cfg, bench.with_ramp(training.replace(batch_size=16)).replace(steps=5))
    found = bench.measure(kind, data)
    assert found["looks"][0] == 0 and found["looks"][-1] == kind.training.tokens_before(5)
    assert np.shape(found["information"]) == (len(found["looks"]), 1)
    assert [row[0] for row in found["rows"]] == [kind.training.tokens_before(n) for n in range(1, 6)]
    again = bench.measure(kind, data)
    assert {**found, "seconds": 0} == {**again, "seconds": 0}


# ---------------------------------------------------------------------------------------------- readable


def figures() -> list:
    rows = [
        {"step": n, "loss": 5.5 / n + 2, "lr": 1e-3, "grad_norm": 9 / n, "tokens": 64 * n}
        for n in range(1, 40)
    ]
    several = {
        name: [layer(10 * n + k) for k in range(4)] for n, name in enumerate(("random weights", "trained"))
    }
    return [
        training_schedule_figure(paper_training()),
        live_figure(rows, TrainConfig(steps=60)),
        gradient_norms(TINY / "metrics.jsonl"),
        kind_curves(STORED),
        kind_curves(STORED, "information"),
        preference_maps({"layer 1": table(1), "shuffled": table(2)}, NAMES, devices=4, expert=0),
        preference_maps({"alone": table(3)}, NAMES),
        information_dots({**several, "live, 20 s": [layer(k) for k in range(4)]}, [1, 2, 3, 4]),
        browser()[2].figure,
    ]


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: describe(figure)[:40])
def test_texts_can_be_read(figure):
    texts = texts_of(figure)
    assert texts and min(text.get_fontsize() for text in texts) >= SMALL
    assert overlaps(figure, texts) == []
    assert outside(figure) == []
    assert len(describe(figure)) > 60
