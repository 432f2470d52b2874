"""The evaluation: information against slow formulas and chance, losses by domain, sums, the command."""

from __future__ import annotations

import json
import math
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dsv2 import DeepSeekV2, DSV2Config, save_pretrained
from dsv2.data import ByteTokenizer, Corpus, Document, arithmetic_problems, nats_per_byte, prepare
from dsv2.data.arithmetic import arithmetic_documents
from dsv2.evaluate import (
    SumsResult,
    answer_sums,
    conditional_mutual_information,
    count_choices,
    domain_windows,
    expected_information,
    held_out_sums,
    mutual_information,
    nats_by_domain,
    read,
    shuffled_information,
    specialisation,
)
from dsv2.evaluate.command import main

CFG = DSV2Config.preset("tiny").replace(
    hidden_size=24, num_hidden_layers=3, intermediate_size=32, num_attention_heads=2, moe_intermediate_size=12
)


def slow_information(pairs: list[tuple]) -> float:
    """H(D) + H(E) - H(D, E) of a list of pairs, by counting."""

    def entropy(items) -> float:
        counts = Counter(items)
        total = sum(counts.values())
        return -sum(n / total * math.log(n / total) for n in counts.values())

    return entropy(d for d, _ in pairs) + entropy(e for _, e in pairs) - entropy(pairs)


def random_choices(seed: int, windows=12, tokens=9, k=3, experts=7, domains=4, taste=0.0):
    """expert_ids (W, T, K) and domains (W, T); with taste, a domain prefers its own experts."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(windows) % domains)[:, None].expand(-1, tokens).to(torch.int8)
    liking = torch.randn(domains, experts, generator=generator)
    noise = torch.rand(windows, tokens, experts, generator=generator).clamp(min=1e-9)
    logits = taste * liking[labels.long()] - (-noise.log()).log()
    return logits.topk(k, dim=-1).indices, labels


# ------------------------------------------------------------------------------------------ information


@pytest.mark.parametrize("seed", range(5))
def test_counts_and_information_against_slow_ones(seed):
    ids, labels = random_choices(seed, taste=1.0)
    counts = count_choices(ids, labels, 4, 7)
    pairs = [(int(labels[w, t]), int(e)) for w in range(12) for t in range(9) for e in ids[w, t]]
    assert counts.shape == (4, 7) and counts.sum() == 12 * 9 * 3
    assert all(counts[d, e] == n for (d, e), n in Counter(pairs).items())
    assert mutual_information(counts) == pytest.approx(slow_information(pairs), rel=1e-9)
    assert mutual_information(counts.T) == pytest.approx(slow_information(pairs), rel=1e-9), "symmetric"


def test_information_at_its_ends():
    assert mutual_information(torch.tensor([[2, 4, 6], [1, 2, 3]])) == pytest.approx(0, abs=1e-12)
    assert mutual_information(torch.tensor([[5, 0], [0, 5]])) == pytest.approx(math.log(2))
    assert mutual_information(torch.tensor([[5, 0, 0], [0, 3, 2]])) == pytest.approx(math.log(2))
    for wrong in (torch.zeros(2, 3), torch.tensor([[1, -1], [1, 1]])):
        with pytest.raises(ValueError, match="counts must be a table"):
            mutual_information(wrong)


def test_conditional_information_is_the_weighted_mean():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 6, (5, 3, 4), generator=generator)
    counts[2] = 0
    shares = counts.sum(dim=(1, 2)) / counts.sum()
    right = sum(float(s) * mutual_information(t) for s, t in zip(shares, counts) if t.sum())
    assert conditional_mutual_information(counts) == pytest.approx(right, rel=1e-6)
    # The letter says it all: within each letter there is nothing left to tell.
    letters = torch.tensor([[[4, 0], [0, 0]], [[0, 0], [0, 7]]])
    assert mutual_information(letters.sum(dim=0)) > 0.6
    assert conditional_mutual_information(letters) == 0
    with pytest.raises(ValueError, match="at least one count"):
        conditional_mutual_information(torch.zeros(2, 2, 2))


def test_the_bias_of_a_finite_sample_is_as_expected():
    """Many tables of independent choices: their mean information is near (D - 1)(E - 1) / 2N."""
    random = np.random.default_rng(0)
    tables = [torch.tensor(random.multinomial(800, np.full(28, 1 / 28)).reshape(4, 7)) for _ in range(400)]
    mean = np.mean([mutual_information(table) for table in tables])
    assert mean == pytest.approx(expected_information(tables[0]), rel=0.06)
    assert expected_information(tables[0]) == 3 * 6 / (2 * 800)
    assert expected_information(torch.tensor([[3, 0, 1], [2, 0, 4]])) == 1 / 20, "an empty column is none"


def test_shuffled_windows_keep_what_belongs_together():
    """Windows with a taste of their own and none of the domain: tokens make chance look too small."""
    generator = torch.Generator().manual_seed(0)
    own = 2.0 * torch.randn(40, 1, 8, generator=generator)
    noise = torch.rand(40, 30, 8, generator=generator).clamp(min=1e-9)
    ids = (own - (-noise.log()).log()).topk(2, dim=-1).indices
    labels = (torch.arange(40) % 4)[:, None].expand(-1, 30)
    args = (ids, labels, 4, 8)
    by_token = shuffled_information(*args, by="tokens", shuffles=60)
    by_window = shuffled_information(*args, by="windows", shuffles=60)
    measured = mutual_information(count_choices(*args))
    assert by_token.max() < measured, "which would look like a preference"
    assert by_window.min() < measured < by_window.max(), "and is none"
    assert (shuffled_information(*args, shuffles=5) == shuffled_information(*args, shuffles=5)).all()
    with pytest.raises(ValueError, match="by='letters' must be one of windows, tokens"):
        shuffled_information(*args, by="letters")
    with pytest.raises(ValueError, match="shuffles=1 must be at least 2"):
        shuffled_information(*args, shuffles=1)


def test_a_real_preference_is_found_and_none_is_not():
    none = specialisation(*random_choices(1, windows=48), 4, 7, shuffles=99)
    real = specialisation(*random_choices(1, windows=48, taste=0.5), 4, 7, shuffles=99)
    assert none.p > 0.05 and abs(none.deviations) < 3
    assert real.p == 0.01 and real.deviations > 5
    assert real.ceiling == pytest.approx(math.log(4))
    row = json.loads(json.dumps(real.to_dict()))
    assert row["shuffled_mean"] == pytest.approx(real.shuffled.mean()) and row["shuffles"] == 99


# -------------------------------------------------------------------------------------- losses and sums


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    documents = arithmetic_documents(60_000, seed=0, validation_fraction=0.2)
    documents += [
        Document("code", f"file {n}", f"def f{n}(x):\n    return x + {n}\n" * 20, split="validation")
        for n in range(8)
    ]
    documents += [Document("code", f"more {n}", f"class C{n}: pass\n" * 20, split="train") for n in range(8)]
    return prepare(Corpus(documents, {}), directory=tmp_path_factory.mktemp("data") / "packed")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DeepSeekV2(CFG).eval()
    model.tokenizer = ByteTokenizer()
    return model


def test_windows_lie_in_one_domain_equally_many_of_each(data):
    windows = domain_windows(data.validation, 32, 6)
    assert windows.tokens.shape == (12, 32)
    assert data.domain_names == ["code", "arithmetic"]
    assert windows.domains.tolist() == [[0] * 32] * 6 + [[1] * 32] * 6
    fewest = min(data.validation.take_domain(n).windows_per_epoch(32) for n in data.domain_names)
    assert len(domain_windows(data.validation, 32, 10_000)) == 2 * fewest
    with pytest.raises(ValueError, match="per_domain=0"):
        domain_windows(data.validation, 32, 0)
    with pytest.raises(ValueError, match="no window of domain 'code'"):
        domain_windows(data.validation, 10**7, 2)


def test_reading_is_the_whole_forward_pass(data, model):
    windows = domain_windows(data.validation, 32, 3)
    reading = read(model, windows, rows=4)
    with torch.no_grad():
        out = model(windows.tokens)
    nats = F.cross_entropy(out.logits.mT, windows.targets, reduction="none")
    assert torch.allclose(reading.nats, nats, atol=1e-5)
    assert [ids.tolist() for ids in reading.expert_ids] == [r.expert_ids.tolist() for r in out.routings]
    model.train()
    read(model, windows)
    assert model.training
    model.eval()


def test_nats_by_domain_pay_special_tokens_and_count_bytes(data, model):
    windows = domain_windows(data.validation, 64, 4)
    nats = read(model, windows).nats
    assert (windows.targets >= 256).any()
    args = (nats, windows.targets, windows.domains, data.domain_names)
    for number, (name, value) in enumerate(nats_by_domain(*args).items()):
        here = windows.domains == number
        assert name == data.domain_names[number]
        assert value == pytest.approx(nats_per_byte(nats[here], windows.targets[here]), rel=1e-6)
        assert nats_by_domain(*args, bytewise=False)[name] == pytest.approx(
            float(nats[here].mean()), rel=1e-5
        )
    assert list(nats_by_domain(*args[:3], ["code", "arithmetic", "french"])) == ["code", "arithmetic"]


def test_the_sums_are_kept_out_of_training():
    problems = held_out_sums(60, seed=3)
    assert len({p.key for p in problems}) == 60
    assert held_out_sums(60, seed=3) == problems != held_out_sums(60, seed=4)
    trained_on = {p.key for _, p in zip(range(20_000), arithmetic_problems(seed=0, kinds=("addition",)))}
    for problem in problems:
        a, b = (int(n) for n in problem.question.removesuffix(" =").split(" + "))
        assert problem.split == "validation" and problem.key not in trained_on
        assert max(a, b) in range(10, 100) and int(problem.answer) == a + b
    with pytest.raises(ValueError, match="count=5000 is more than the 233 sums"):
        held_out_sums(5000)
    with pytest.raises(ValueError, match="count=0"):
        held_out_sums(0)


def test_answers_are_counted(model):
    problems = held_out_sums(3)
    result = SumsResult(tuple(problems), (problems[0].answer, "x", problems[2].answer))
    assert (result.right, result.asked) == (2, 3)
    assert result.to_dict()["wrong"] == [[problems[1].question, "x", problems[1].answer]]
    assert len(answer_sums(model, problems).answers) == 3


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    save_pretrained(model, path)
    return path


def test_the_command_prints_and_writes_what_the_functions_say(folder, data, model, tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    options = ["--windows", "3", "--seq-len", "32", "--sums", "2", "--shuffles", "20", "--quiet"]
    assert (
        main([str(folder), "--data", str(data.directory), *options, "--device", "cpu", "--out", str(out)])
        == 0
    )
    said = capsys.readouterr().out
    report = json.loads(out.read_text())
    windows = domain_windows(data.validation, 32, 3)
    reading = read(model, windows)
    right = nats_by_domain(reading.nats, windows.targets, windows.domains, data.domain_names)
    assert {name: report["domains"][name] for name in right} == pytest.approx(right, rel=1e-4)
    for row, ids, number in zip(report["specialisation"], reading.expert_ids, CFG.moe_layers):
        layer = specialisation(ids, windows.domains, 2, CFG.n_routed_experts, shuffles=20)
        assert row["layer"] == number and row["counts"] == layer.counts.tolist()
        assert row["information"] == pytest.approx(layer.information)
        assert f"{layer.information:.5f}" in said
    assert report["sums"]["asked"] == 2 and "of 2 right" in said and "nats per byte" in said
    assert report["command"].startswith("python -m dsv2.evaluate")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--windows", "0"], "--windows 0 must be at least 1"),
        (["--shuffles", "1"], "--shuffles 1 must be at least 2"),
        (["--seq-len", "4096"], "longer than the 1024 positions"),
        (["--data", "nowhere"], "no packed data in nowhere"),
        (["--sums", "9999", "--only", "sums"], "more than the 233 sums"),
    ],
)
def test_the_command_says_what_does_not_fit(folder, options, said, capsys):
    assert main([str(folder), "--device", "cpu", "--quiet", *options]) == 2
    assert said in capsys.readouterr().err
    assert main(["no/such/folder"]) == 2


def test_the_needle_is_another_modules_and_may_be_missing(folder, monkeypatch, tmp_path, capsys):
    command = [str(folder), "--device", "cpu", "--only", "needle", "--lengths", "64", "128", "--samples", "2"]
    monkeypatch.setitem(sys.modules, "dsv2.evaluate.needle", None)
    assert main(command) == 2
    made = types.ModuleType("dsv2.evaluate.needle")
    asked = {}

    def needle_grid(model, lengths, depths, *, samples, seed, progress):
        asked.update(lengths=lengths, depths=depths, samples=samples, seed=seed, progress=progress)
        return {"found": [[1.0] * len(depths) for _ in lengths]}

    made.needle_grid = needle_grid
    monkeypatch.setitem(sys.modules, "dsv2.evaluate.needle", made)
    capsys.readouterr()
    assert main([*command, "--quiet", "--out", str(tmp_path / "r.json")]) == 0
    assert asked == {"lengths": [64, 128], "depths": [0.0, 0.25, 0.5, 0.75, 1.0], "samples": 2, "seed": 0} | {
        "progress": False
    }
    assert "found" in json.loads((tmp_path / "r.json").read_text())["needle"]
    assert "needle in a haystack" in capsys.readouterr().out
