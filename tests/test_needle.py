"""Needles in haystacks: the texts are what they say, and the grid counts what a model really answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dsv2 import DeepSeekV2, DSV2Config, LinearScaling, YarnScaling
from dsv2.bench import context
from dsv2.data.needle import IGNORED, TASK, NeedleTask, needle_batch, needle_prompts, needle_slot, slots_of
from dsv2.evaluate.needle import needle_grid
from dsv2.model import ModelOutput
from dsv2.rope import RotaryEmbedding, interpolated_frequencies, rope_frequencies, softmax_scale


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ the texts


@pytest.mark.parametrize(
    "length, depth, distractors", [(24, 0.0, 3), (25, 1.0, 5), (64, 0.3, 8), (33, 0.77, 0)]
)
def test_a_prompt_has_one_needle_at_its_depth_and_ends_with_its_key(length, depth, distractors):
    prompts, answers = needle_prompts(7, length, depth, distractors=distractors, generator=seeded(1))
    assert prompts.shape == (7, length)
    start = (length - 1) % 2 + 2 * round(depth * ((length - 1) // 2 - 1))
    for text, answer in zip(prompts.tolist(), answers.tolist()):
        key = text[-1]
        assert key < TASK.n_keys <= answer < TASK.vocab_size
        assert [i for i, token in enumerate(text[:-1]) if token == key] == [start]
        assert text[start + 1] == answer
        others = [token for token in text[:-1] if token < TASK.n_keys and token != key]
        assert len(others) == len(set(others)) == distractors
    assert start <= 1 if depth == 0 else True
    assert start == length - 3 if depth == 1 else True


def test_every_text_has_a_needle_of_its_own_and_a_seed_gives_the_same():
    first, answers = needle_prompts(40, 48, 0.5, generator=seeded(3))
    again, _ = needle_prompts(40, 48, 0.5, generator=seeded(3))
    assert torch.equal(first, again)
    assert len(set(first[:, -1].tolist())) > 8 and len(set(answers.tolist())) > 15


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="depth=1.5"):
        needle_slot(64, 1.5)
    with pytest.raises(ValueError, match="distractors=4 must be from 0 to 3.*9 tokens"):
        needle_prompts(1, 9, 0.5, distractors=4)
    with pytest.raises(ValueError, match="16 keys"):
        needle_prompts(1, 200, 0.5, distractors=16)
    with pytest.raises(ValueError, match="length=7"):
        needle_batch(1, 7)
    assert slots_of(64) == 31


@pytest.mark.parametrize("length, questions", [(16, 2), (65, 8), (64, 4), (31, 1)])
def test_targets_are_what_a_reader_of_the_text_knows(length, questions):
    """Against a slow reader: a key that stood before had this word, and it always has the same."""
    tokens, targets = needle_batch(9, length, questions=questions, generator=seeded(length))
    assert tokens.shape == targets.shape == (9, length)
    for text, wanted in zip(tokens.tolist(), targets.tolist()):
        known: dict[int, int] = {}
        for here, token in enumerate(text):
            if token >= TASK.n_keys:
                assert wanted[here] == IGNORED
                continue
            assert wanted[here] == known.get(token, IGNORED)
            assert known.setdefault(token, text[here + 1]) == text[here + 1]
        asked = min(questions, length // 2 // 4)
        keys = [token for token in text if token < TASK.n_keys]
        assert len(set(keys[-asked:])) == asked
        assert all(keys.count(key) == 2 for key in keys[-asked:])


def test_questions_are_asked_about_every_depth():
    tokens, _ = needle_batch(400, 64, questions=2, generator=seeded(5))
    places = [text.index(text[-2]) for text in tokens.tolist()]
    assert min(places) == 0 and max(places) >= 54
    assert 22 < sum(places) / len(places) < 36


# ------------------------------------------------------------------------------------------------- the grid


class Finder(nn.Module):
    """Answers with the token after the last earlier copy of the last one, at most `reach` tokens back."""

    def __init__(self, reach: int, shift: int = 1):
        super().__init__()
        self.cfg = DSV2Config.preset("tiny")
        self.weight = nn.Parameter(torch.zeros(1))
        self.reach, self.shift = reach, shift

    def forward(self, tokens, last_only=False):
        assert last_only and not self.training and not torch.is_grad_enabled()
        logits = torch.zeros(len(tokens), 1, self.cfg.vocab_size)
        for row, text in enumerate(tokens.tolist()):
            for here in range(max(0, len(text) - 1 - self.reach), len(text) - 1):
                if text[here] == text[-1]:
                    logits[row, 0, text[here + self.shift]] = 1.0
        return ModelOutput(logits, torch.zeros(()))


def test_a_model_that_sees_so_far_back_finds_needles_so_far_back():
    lengths, depths = (32, 64, 96), (0.0, 0.25, 0.5, 0.75, 1.0)
    grid = needle_grid(Finder(reach=40), lengths, depths, samples=6, progress=False)
    for length, row, counts in zip(lengths, grid["accuracy"], grid["found"]):
        for depth, share, count in zip(depths, row, counts):
            start = (length - 1) % 2 + 2 * round(depth * ((length - 1) // 2 - 1))
            assert share == float(length - 1 - start <= 40) and count == 6 * share
    assert grid["lengths"] == list(lengths) and grid["samples"] == 6


def test_a_planted_bug_is_seen_in_the_grid():
    """One that looks at the token before the key, and one that is counted in training mode."""
    grid = needle_grid(Finder(reach=200, shift=0), (64,), (0.2, 0.8), samples=20, progress=False)
    assert grid["found"] == [[0, 0]]
    model = Finder(reach=5)
    assert model.training
    needle_grid(model, (24,), (0.5,), samples=1, progress=False)
    assert model.training, "left as it was"


def test_the_grid_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="samples=0"):
        needle_grid(Finder(5), (16,), (0.5,), samples=0)
    with pytest.raises(ValueError, match="500 tokens"):
        needle_grid(Finder(5), (16,), (0.5,), task=NeedleTask(100, 400))


# ------------------------------------------------------------------------------------ position interpolation


def test_interpolated_positions_have_the_angles_of_shorter_texts():
    plain, linear = RotaryEmbedding(12), RotaryEmbedding(12, scaling=LinearScaling(4.0))
    positions = torch.tensor([[0, 3, 17, 200]])
    for short, long in zip(plain(positions), linear(4 * positions)):
        torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(interpolated_frequencies(12, 1e4, 4.0) * 4, rope_frequencies(12))
    assert linear.to(torch.bfloat16).frequencies.dtype == torch.float32


def test_interpolation_has_no_temperature_and_survives_every_form():
    cfg = DSV2Config.preset("tiny", rope_scaling=LinearScaling(8.0))
    assert softmax_scale(cfg) == softmax_scale(DSV2Config.preset("tiny"))
    assert DSV2Config.from_dict(cfg.to_dict()) == cfg
    assert cfg.to_hf()["rope_scaling"] == {"type": "linear", "factor": 8.0}
    assert DSV2Config.from_hf(cfg.to_hf()).rope_scaling == LinearScaling(8.0)
    with pytest.raises(ValueError, match="rope_scaling.factor=0.5"):
        cfg.replace(rope_scaling=LinearScaling(0.5))
    with pytest.raises(ValueError, match="rope_scaling.factor='8'"):
        cfg.replace(rope_scaling=LinearScaling("8"))


# -------------------------------------------------------------------------------------------------- the runs


def small() -> context.Setting:
    training = context.Training(steps=3, batch=2, shortest=16, longest=20, lr=1e-3, questions=1)
    return context.Setting(
        context.SMALL.model, training, training, 4.0, (24, 40), (0.0, 0.5, 1.0), samples=3, looks=(0, 2, 3)
    )


def test_a_run_measures_three_ways_before_and_after(tmp_path):
    run = context.measure(small(), seed=1, save=tmp_path)
    again = context.measure(small(), seed=1)
    assert run["before"] == again["before"] and run["losses"] == again["losses"]
    assert set(run["before"]) == set(run["after"]) == {"RoPE", "interpolation", "YaRN"}
    for name in run["before"]:
        assert [len(row) for row in run["after"][name]] == [3, 3]
        assert [step for step, _ in run["tuning"][name]["found"]] == [0, 2, 3]
        assert len(run["tuning"][name]["losses"]) == 3
    assert (tmp_path / "model.safetensors").exists()


def test_extending_keeps_the_weights_and_changes_the_angles():
    model = DeepSeekV2(context.SMALL.model)
    longer = context.extended(model, YarnScaling(10.0, 64))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), longer.parameters()))
    assert all(a is not b for a, b in zip(model.parameters(), longer.parameters()))
    assert not torch.equal(model.rotary.frequencies, longer.rotary.frequencies)
    same = context.extended(model, None)
    tokens = torch.randint(0, 40, (2, 9), generator=seeded(0))
    assert torch.equal(model(tokens).logits, same(tokens).logits)


def test_the_settings_scale_the_papers_and_can_be_built():
    for setting in (context.SMALL, context.LARGE):
        assert max(setting.lengths) == 8 * setting.training.longest
        assert setting.training.longest < setting.tuning.longest < max(setting.lengths)
        assert set(setting.looks) <= set(range(setting.tuning.steps + 1))
        yarn = setting.scalings["YaRN"]
        assert (yarn.beta_fast, yarn.beta_slow, yarn.mscale_all_dim) == (32, 1, 0.707)
        assert yarn.original_max_position_embeddings == setting.training.longest
    with torch.device("meta"):
        assert DeepSeekV2(context.LARGE.model).cfg.moe_layers == (1, 2, 3)
