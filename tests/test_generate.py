"""Sampling, the decode loop over prompts of different lengths, stop strings, loops, and the command line."""

from __future__ import annotations

import pytest
import torch

import dsv2
from dsv2.accounting import decode_bytes
from dsv2.data import ByteTokenizer
from dsv2.generate import Sampling, _Text, decode, is_looping, next_token_probabilities, prefill, stream
from dsv2.generate.__main__ import main
from dsv2.generate.measure import Decoding, measure_decoding, random_model


@pytest.fixture(scope="module")
def model():
    """Random weights large enough that the next token depends on the text before it."""
    torch.manual_seed(5)
    return dsv2.DeepSeekV2(dsv2.DSV2Config.preset("tiny", initializer_range=0.12)).eval()


def greedy_without_cache(model, ids, n):
    """The specification: run everything again for every token."""
    ids = list(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-n:]


PROMPTS = [[256, 9, 40, 77, 3], [256, 5], [256, 101, 7, 8, 9, 10, 11, 12, 13, 14, 200], [256, 31, 31]]


@pytest.mark.parametrize("attention", ["mla", "mha", "gqa", "mqa"])
def test_greedy_decoding_equals_running_everything_again(model, attention):
    if attention != "mla":
        torch.manual_seed(6)
        cfg = model.cfg.replace(attention=attention, num_key_value_heads=2 if attention == "gqa" else None)
        model = dsv2.DeepSeekV2(cfg).eval()
    steps = list(decode(model, PROMPTS, 7, Sampling(temperature=0)))
    made = torch.stack([step.tokens for step in steps], dim=1).tolist()
    assert made == [greedy_without_cache(model, prompt, 7) for prompt in PROMPTS]


def test_the_cache_is_as_large_as_asked(model):
    cache = list(decode(model, PROMPTS, 7, Sampling(temperature=0)))[-1].cache
    assert cache.max_tokens == 11 + 7 - 1
    assert cache.lengths.tolist() == [len(p) + 6 for p in PROMPTS]


def test_prefill_in_chunks_keeps_each_sequences_last_logits(model):
    longest = max(map(len, PROMPTS))
    whole, _ = prefill(model, PROMPTS, model.new_cache(4, longest), chunk=longest)
    for chunk in (1, 2, 3, 5):
        pieces, _ = prefill(model, PROMPTS, model.new_cache(4, longest), chunk=chunk)
        # float32 sums in another order, over 5 layers
        torch.testing.assert_close(pieces, whole, atol=2e-4, rtol=0)


def test_a_sequence_that_ended_takes_no_more_room(model):
    lengths = []
    for number, step in enumerate(decode(model, PROMPTS, 9, Sampling(temperature=0))):
        if number == 3:
            step.alive[1] = False
        lengths.append(step.cache.lengths.tolist())
    assert lengths[-1] == [5 + 8, 2 + 3, 11 + 8, 3 + 8]


def test_a_seed_fixes_the_text_whoever_stands_beside_it(model):
    options = dict(max_new_tokens=12, temperature=1.0, top_k=50, seed=11)
    alone = dsv2.generate(model, "ab", **options)
    assert alone == dsv2.generate(model, "ab", **options)
    assert dsv2.generate(model, ["ab", "something longer"], **options)[0] == alone
    assert dsv2.generate(model, "ab", **{**options, "seed": 12}) != alone


def test_streamed_pieces_make_the_same_text(model):
    options = dict(temperature=1.0, seed=3)
    steps = list(stream(model, "x = ", 20, **options))
    assert "".join(step.text for step in steps) == dsv2.generate(model, "x = ", 20, **options)
    assert [step.position for step in steps] == list(range(5, 25))
    assert steps[-1].finish == "length" and all(step.finish is None for step in steps[:-1])
    assert len(steps[0].routings) == len(model.cfg.moe_layers)


def test_generation_leaves_the_model_in_the_mode_it_found(model):
    model.train()
    dsv2.generate(model, "a", 2, seed=0)
    assert model.training
    model.eval()


# ---------------------------------------------------------------------------------------------- sampling


def slow_probabilities(logits, temperature, top_k, top_p):
    """One row, in float64, by repeated argmax."""
    weights = (logits.double() / temperature).exp()
    weights = (weights / weights.sum()).tolist()
    ranked = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or len(weights)]
    total, kept = sum(weights[i] for i in ranked), []
    for i in ranked:
        if top_p is not None and sum(weights[j] for j in kept) / total >= top_p:
            break
        kept.append(i)
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 4, 100])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.6, 1.0])
def test_probabilities_equal_a_slow_version(temperature, top_k, top_p):
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(1)) * 2
    fast = next_token_probabilities(logits, temperature, top_k, top_p)
    slow = torch.tensor([slow_probabilities(row, temperature, top_k, top_p) for row in logits])
    torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-5)  # float32 against float64


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    sampling = Sampling(temperature=0.7, top_k=3, seed=0)
    generators = sampling.generators(1, torch.device("cpu"))
    drawn = torch.cat([sampling.draw(logits, generators) for _ in range(4000)])
    seen = torch.bincount(drawn, minlength=4) / 4000
    # four standard deviations of a share near 1/2 over 4000 draws
    torch.testing.assert_close(seen, next_token_probabilities(logits, 0.7, 3)[0], atol=0.032, rtol=0)
    assert seen[3] == 0


@pytest.mark.parametrize(
    "wrong", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=0), dict(top_p=0)]
)
def test_wrong_sampling_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


# ---------------------------------------------------------------------------------------------- ending a text


def feed(text: str, stop=(), loop_window=None):
    growing, shown = _Text(ByteTokenizer(), stop, loop_window), []
    for byte in text.encode():
        shown.append(growing.add(byte, last=False))
        if growing.finish:
            break
    return growing, shown


def test_text_that_may_begin_a_stop_string_waits():
    growing, shown = feed("one END? two END. three", stop=["END."])
    assert growing.finish == "stop" and growing.shown == "one END? two "
    assert shown[4:8] == ["", "", "", "END?"]


def test_the_earliest_of_several_stop_strings_wins():
    assert feed("a;b\n\nc", stop=["\n\n", ";"])[0].shown == "a"


def test_characters_of_several_bytes_appear_whole():
    growing, shown = feed("é€")
    assert "".join(shown) == "é€" and shown == ["", "é", "", "", "€"]


def test_loops_are_seen_and_ordinary_text_is_not():
    assert is_looping([1, 2, 3] * 20, window=30)
    assert not is_looping([1, 2, 3] * 20 + [4], window=30)
    assert not is_looping(list(range(100)), window=30)
    assert not is_looping([7] * 29, window=30)
    assert feed("ab" * 40, loop_window=24)[0].finish == "loop"


def test_end_of_text_token_ends_it():
    growing = _Text(ByteTokenizer(), (), None)
    growing.add(65, last=False)
    assert growing.add(ByteTokenizer().eos_id, last=False) == "" and growing.finish == "eos"


# ---------------------------------------------------------------------------------------------- errors


def test_errors_say_what_to_do(model):
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        dsv2.generate(model, "a", 0)
    with pytest.raises(ValueError, match="at least one token"):
        list(decode(model, [[256], []], 3))
    with pytest.raises(ValueError, match="max_position_embeddings=1024"):
        dsv2.generate(model, "a" * 1000, 100)
    with pytest.raises(ValueError, match="empty string"):
        dsv2.generate(model, "a", 3, stop=["x", ""])
    small = dsv2.DeepSeekV2(model.cfg.replace(vocab_size=200, bos_token_id=None, eos_token_id=None))
    with pytest.raises(ValueError, match="vocab_size is 200"):
        dsv2.generate(small, "a", 3)


def test_command_line_writes_and_reports_errors(model, tmp_path, capsys):
    dsv2.save_pretrained(model, tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--max-new-tokens", "5", "--seed", "1"]
    assert main(["hello", *arguments]) == 0
    assert capsys.readouterr().out.startswith("hello")
    assert main(["hello", "--model", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_bench_prints_speed_and_share_and_names_bad_sizes(capsys):
    small = ["--bench", "--device", "cpu", "--cached", "60", "--steps", "8", "--batch", "2"]
    assert main(small) == 0
    said = capsys.readouterr().out
    assert "tokens/s" in said and "of the limit" in said and "step by step" in said
    assert main([*small[:3], "--cached", "100000"]) == 1
    assert "max_position_embeddings" in capsys.readouterr().err
    assert main([*small, "--batch", "0"]) == 1
    assert "--batch=0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--preset", "tiny"])


def test_the_limit_counts_what_a_step_reads():
    """Half the speed of the limit: twice the time that its bytes take."""
    found = Decoding(
        batch=4, cached=10, steps=3, seconds=2.0, bytes=30.0, bandwidth=30.0, through_graphs=False
    )
    assert found.tokens_per_second == 2.0
    assert found.limit == 4.0
    assert found.share == 0.5
    model = random_model(dsv2.DSV2Config.preset("tiny"), "cpu", torch.float32)
    measured = measure_decoding(model, 3, 50, steps=4, bandwidth=1e9)
    expected = decode_bytes(model.cfg, 50, 3, weight_dtype="float32", cache_dtype="float32").total
    assert 0.7 * expected < measured.bytes < 1.3 * expected  # the experts hit differ from those expected
    with pytest.raises(ValueError, match="steps=3"):
        measure_decoding(model, 1, 10, steps=3)
