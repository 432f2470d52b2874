"""What lies in data/: the trained weights are what their notes say, and better than counting bytes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv2 import DSV2Config, generate, load_pretrained
from dsv2.data import ByteTokenizer, ngram_baselines, prepare
from dsv2.data.arithmetic import arithmetic_documents, arithmetic_problems
from dsv2.data.documents import Corpus

TINY = Path(__file__).resolve().parents[1] / "data" / "tiny"
MHA = TINY.with_name("mha")


@torch.no_grad()
def nats_per_token(model, windows) -> float:
    logits = model(windows.tokens).logits
    return F.cross_entropy(logits.flatten(0, 1), windows.targets.flatten().long()).item()


@pytest.fixture(scope="module")
def model():
    return load_pretrained(TINY, dtype=torch.float32)


@pytest.fixture(scope="module")
def notes():
    return json.loads((TINY / "training.json").read_text(encoding="utf-8"))


def test_the_weights_are_small_and_of_the_tiny_preset(model):
    assert (TINY / "model.safetensors").stat().st_size <= 8e6
    assert model.cfg == DSV2Config.preset("tiny")
    assert model.tokenizer.vocab_size == ByteTokenizer().vocab_size


def test_the_notes_agree_with_each_other(notes):
    training = notes["training"]
    assert notes["tokens"] == training["steps"] * training["batch_size"] * training["seq_len"]
    rows = [json.loads(line) for line in (TINY / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == training["steps"] and rows[-1]["tokens"] == notes["tokens"]
    assert rows[-1]["val_nats_per_byte"] == notes["validation"]["model"]
    assert rows[-1]["val_domains"] == notes["validation"]["model_by_domain"]
    trigram = next(row for row in notes["validation"]["ngrams"] if row["order"] == 3)
    assert notes["validation"]["model"] < trigram["nats_per_byte"]
    for flag in ("--preset tiny", f"--steps {training['steps']}", f"--lr {training['lr'] * 1e3:g}e-3"):
        assert flag in notes["command"]


def test_it_predicts_sums_it_has_never_seen_better_than_counting(model, tmp_path):
    """On every machine alike: the problems are generated, and those of validation never come in training."""
    corpus = Corpus(arithmetic_documents(400_000, seed=0, validation_fraction=0.1), {})
    dataset = prepare(corpus, ByteTokenizer(), tmp_path)
    trigram = ngram_baselines(dataset, (3,), 256, 16)[0]["nats_per_token"]
    windows = dataset.validation.validation_windows(256, 16)
    assert nats_per_token(model, windows) < 0.5 * trigram  # measured: 0.5 against 1.8
    shuffled = load_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        for layer in shuffled.layers:
            layer.attention.w_uk.copy_(layer.attention.w_uk.flip(0))  # heads in the wrong order
    assert nats_per_token(shuffled, windows) > 1.2 * nats_per_token(model, windows)


def test_it_adds(model):
    problems = arithmetic_problems(seed=11, split="validation", kinds=("addition",), level=1)
    exam = [next(problems) for _ in range(30)]
    answers = generate(model, [p.question for p in exam], 8, temperature=0, stop="\n")
    right = sum(answer.strip() == p.answer for answer, p in zip(answers, exam))
    # Guessing among the two-digit and three-digit sums would be right once in about a hundred.
    assert right / len(exam) > 0.5, right
    assert math.isfinite(right)


def test_the_model_with_mha_is_what_its_notes_say():
    assert (MHA / "model.safetensors").stat().st_size < 3e6
    model, notes = load_pretrained(MHA), json.loads((MHA / "training.json").read_text(encoding="utf-8"))
    cfg = model.cfg
    assert (cfg.attention, cfg.num_attention_heads, cfg.kv_heads, cfg.baseline_head_dim) == ("mha", 8, 8, 16)
    assert (cfg.hidden_size, cfg.num_hidden_layers, cfg.n_routed_experts) == (128, 4, 0)
    assert (
        model.layers[2].attention.w_k.weight.shape == model.layers[2].attention.w_v.weight.shape == (128, 128)
    )
    training, validation = notes["training"], notes["validation"]
    assert notes["tokens"] == training["steps"] * training["batch_size"] * training["seq_len"]
    settings = dict(re.findall(r"--set (\w+)=(\S+)", notes["command"]))
    assert {name: str(getattr(cfg, name)) for name in settings} == settings
    assert f"--steps {training['steps']}" in notes["command"] and "/" not in notes["command"]
    assert validation["model"] < validation["ngrams"][0]["nats_per_byte"]
