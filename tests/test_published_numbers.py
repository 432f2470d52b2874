"""The published numbers: rows with sources, what can be recomputed, and alterations that show."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from dsv2 import DSV2Config, accounting, headlines, published
from dsv2.headlines import Headline, cache_savings, claim_values, headline_table, training_compute
from dsv2.published import DATA, VERDICTS, Published, published_models, published_numbers, read_rows

MODELS, NUMBERS = published_models(), published_numbers()
FILES = sorted(path.stem for path in (DATA / "published").glob("*.json"))
V2, LITE, DENSE, MIXTRAL = "DeepSeek-V2", "DeepSeek-V2-Lite", "DeepSeek 67B", "Mixtral 8x22B"
EIGHT = ["MMLU", "BBH", "C-Eval", "CMMLU", "HumanEval", "MBPP", "GSM8K", "MATH"]


def wrong(models=MODELS, numbers=NUMBERS) -> set[str]:
    """The figures that do not come out as published."""
    return {found.name for found in headlines.headlines(models, numbers) if not found.agrees}


# ------------------------------------------------------------------------------------------------ the rows


def test_every_file_is_read_and_described():
    assert FILES == sorted(field.name for field in dataclasses.fields(Published))
    readme = (DATA / "published" / "README.md").read_text("utf-8")
    assert all(f"`{stem}.json`" in readme for stem in FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_row_names_a_paper_or_a_card(name):
    for row in getattr(NUMBERS, name):
        assert re.search(r"arXiv \d{4}\.\d{5}|https://", row.source), row


def test_base_scores_as_the_paper_prints_them():
    """Table 2, benchmark by benchmark, typed a second time: 67B, Qwen1.5, Mixtral, LLaMA3, V2."""
    printed = {
        "MMLU": "71.3/77.2/77.6/78.9/78.5", "BBH": "68.7/59.9/78.9/81.0/78.9",
        "C-Eval": "66.1/83.7/59.6/67.5/81.7", "CMMLU": "70.8/84.3/60.0/69.3/84.0",
        "HumanEval": "45.1/43.9/53.1/48.2/48.8", "MBPP": "57.4/53.6/64.2/68.6/66.6",
        "GSM8K": "63.4/77.9/80.3/83.0/79.2", "MATH": "18.7/41.4/42.5/42.2/43.6",
    }  # fmt: skip
    five = [row for row in NUMBERS.base_scores if row.model != LITE]
    for name, scores in printed.items():
        assert "/".join(f"{row.scores_percent[name]:.1f}" for row in five) == scores
    assert [row.pile_bits_per_byte for row in five] == [0.642, 0.637, 0.623, 0.602, 0.606]
    (lite,) = [row for row in NUMBERS.base_scores if row.model == LITE]
    assert [*lite.scores_percent.values()] == [58.3, 44.1, 60.3, 64.3, 29.9, 43.2, 41.1, 17.1]
    assert all([*row.scores_percent] == EIGHT for row in NUMBERS.base_scores)


def test_ablations_as_the_paper_prints_them():
    """Table 8: MQA, GQA, MHA; table 9: small MHA and MLA, large MHA and MLA."""
    printed = {
        "table_8": {"BBH": "33.2/35.6/37.0", "MMLU": "37.9/41.2/45.2", "C-Eval": "30.0/37.7/42.9",
                    "CMMLU": "34.6/38.4/43.5"},
        "table_9": {"BBH": "37.9/39.0/46.6/50.7", "MMLU": "48.7/50.0/57.5/59.0",
                    "C-Eval": "51.6/50.9/57.9/59.2", "CMMLU": "52.3/53.4/60.7/62.5"},
    }  # fmt: skip
    for table, benchmarks in printed.items():
        for name, scores in benchmarks.items():
            rows = getattr(NUMBERS, table)
            assert "/".join(f"{row.scores_percent[name]:.1f}" for row in rows) == scores
    assert [row.attention for row in NUMBERS.table_8] == ["MQA", "GQA, 8 groups", "MHA"]
    assert [row.total_parameters_b for row in NUMBERS.table_8] == [7.1, 6.9, 6.9]
    sizes = [(row.activated_parameters_b, row.total_parameters_b) for row in NUMBERS.table_9]
    assert sizes == [(2.5, 15.8), (2.4, 15.7), (25.0, 250.8), (21.5, 247.4)]


def test_mla_loses_one_benchmark_at_small_scale_and_none_at_large():
    rows = {(row.scale, row.attention): row.scores_percent for row in NUMBERS.table_9}
    lost = {
        scale: [name for name, score in rows[scale, "MLA"].items() if score < rows[scale, "MHA"][name]]
        for scale in ("small", "large")
    }
    assert lost == {"small": ["C-Eval"], "large": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "high"}, "chat.json, row 2: score='high' is not of type float"),
        ({"score": True}, "score=True is not of type float"),
        ({"source": " "}, "row 2: source is empty"),
        ({"scor": 3}, "ChatScore has no field scor"),
        ({"unit": None}, "unit=None is not of type str"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    row = {"model": "a", "benchmark": "b", "score": 1, "unit": "%", "source": "arXiv 2405.04434"}
    (tmp_path / "chat.json").write_text(json.dumps({"rows": [row, {**row, **change}]}), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_rows(tmp_path / "chat.json", published.ChatScore)


def test_missing_fields_rows_and_runs_are_named(tmp_path):
    (tmp_path / "chat.json").write_text('{"rows": [{"model": "a", "source": "b"}]}', encoding="utf-8")
    with pytest.raises(ValueError, match="row 1: ChatScore needs benchmark, score, unit"):
        read_rows(tmp_path / "chat.json", published.ChatScore)
    (tmp_path / "chat.json").write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="expected a list of rows"):
        read_rows(tmp_path / "chat.json", published.ChatScore)
    with pytest.raises(
        ValueError, match="model='GPT-4', phase='pre-training' is not stored; there are: Deep"
    ):
        NUMBERS.run("GPT-4")


# ----------------------------------------------------------------------------------- figures, recomputed


@pytest.mark.parametrize("found", headlines.headlines(), ids=lambda found: found.name)
def test_a_published_figure_comes_out_to_its_digits(found):
    assert found.recomputed == found.published, found


def test_what_is_recomputed_by_hand():
    """The arithmetic once more, from the papers' numbers alone."""
    values = {found.name: found.value for found in headlines.headlines()}
    dense = 2 * 8 * 128 * 95 * 16 / 8
    expected = {
        "KV cache saved": 100 * (1 - (512 + 64) * 60 * 6 / 8 / dense),
        "GQA groups at MLA's cache": 576 / 256,
        "table 9, small MHA, cache": 2 * 16 * 128 * 27 / 1000,
        "table 9, small MLA, cache": 576 * 27 / 1000,
        "table 9, large MHA, cache": 860.16,
        "table 9, large MLA, cache": 34.56,
        "table 9, small: MLA's share": 100 * 15.6 / 110.6,
        "table 9, large: MLA's share": 100 * 34.6 / 860.2,
        "training cost saved": 42.51497,
        "DeepSeek-V2's pre-training": 1.39968,
        "least steps of pre-training": 8.1e12 / (9216 * 4096) / 1000,
        "tokens of the long-context stage": 1000 * 576 * 32768 / 1e9,
        "DeepSeek-V3's training": 5.576,
        "generation throughput": 55.4 / 9.61,
        "DeepSeek-V2, all parameters": 235.741434880,
        "DeepSeek-V2, activated": 20.803179520,
        "DeepSeek-V2-Lite, all parameters": 15.706484224,
        "DeepSeek-V2-Lite, activated": 2.448027136,
        "table 9, small MHA, all parameters": 15.788,
        "table 9, small MHA, activated": 2.529409,
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-4), name


def test_which_conventions_fit_the_activated_counts():
    """21B fits three of the four, V2-Lite's 2.4B one alone."""
    fits = {}
    for model, stated in ((V2, "21"), (LITE, "2.4")):
        counts = accounting.parameters(MODELS[model], activated=True).conventions()
        decimals = len(stated.partition(".")[2])
        fits[model] = [name for name, count in counts.items() if f"{count / 1e9:.{decimals}f}" == stated]
    assert fits[V2] == ["everything", "without the embedding", "without embedding and router"]
    assert fits[LITE] == [headlines.COUNTED]


def test_cache_savings_by_convention():
    printed = {name: f"{value:.1f}" for name, value in cache_savings().items()}
    assert [*printed.values()] == ["93.3", "91.1", "82.2", "98.2"]
    assert printed["elements alone"] == "82.2" and printed["8-bit against 16-bit"] == "91.1"


def test_the_bars_of_figure_1_fit_the_ratios_and_the_caches():
    for pair in NUMBERS.figure_1:
        decimals = len(f"{pair.stated:g}".partition(".")[2])
        assert f"{pair.ratio:.{decimals}f}" == f"{pair.stated:g}", pair.quantity
    bars = next(pair for pair in NUMBERS.figure_1 if pair.quantity == "KV cache")
    assert bars.dense_67b == pytest.approx(accounting.kv_bytes_per_token(MODELS[DENSE]) / 1e3, rel=1e-3)
    assert bars.v2 == pytest.approx(accounting.kv_bytes_per_token(MODELS[V2], 6) / 1e3, rel=1e-3)
    assert bars.v2 != pytest.approx(accounting.kv_bytes_per_token(MODELS[V2], 8) / 1e3, rel=0.2)
    cost = next(pair for pair in NUMBERS.figure_1 if pair.quantity == "training cost")
    hours = [NUMBERS.run(model).h800_hours_k_per_t_tokens for model in (DENSE, V2)]
    assert [cost.dense_67b, cost.v2] == hours


ODD = DSV2Config.preset("tiny").replace(
    num_attention_heads=6, qk_nope_head_dim=20, kv_lora_rank=72, qk_rope_head_dim=14, num_hidden_layers=5
)
SYMBOLS = {"n_h": 6, "n_g": 3, "d_h": 20, "d_c": 72, "d_r": 14, "l": 5}


def table_1(rows) -> dict[str, float]:
    return {row.attention: eval(row.elements_per_token, {"__builtins__": {}}, SYMBOLS) for row in rows}


def test_table_1_is_what_the_accounting_counts():
    kinds = {kind: accounting.attention_twin(ODD, kind.lower(), kv_heads=3) for kind in ("MHA", "GQA", "MQA")}
    kinds["MLA"] = ODD
    counted = {kind: accounting.kv_elements_per_token(cfg) for kind, cfg in kinds.items()}
    assert table_1(NUMBERS.table_1) == counted == {"MHA": 1200, "GQA": 600, "MQA": 200, "MLA": 430}
    for n, row in enumerate(NUMBERS.table_1):  # a formula altered, one at a time
        for old, new in (("2 * n", "n"), (" * l", ""), ("+ d_r", ""), ("2 * d_h", "d_h")):
            if old in row.elements_per_token:
                rows = list(NUMBERS.table_1)
                rows[n] = dataclasses.replace(
                    row, elements_per_token=row.elements_per_token.replace(old, new)
                )
                assert table_1(rows) != counted
    full = MODELS[V2]
    assert (full.kv_lora_rank + full.qk_rope_head_dim) / full.qk_nope_head_dim == 9 / 2


def test_training_compute_is_near_six_times_parameters_times_tokens():
    """Attention's scores come on top of the rule of thumb: a few per cent, more for V2's 128 heads."""
    flops = training_compute()
    assert [*flops] == [LITE, DENSE, V2, "LLaMA3 70B"]
    thumb = {LITE: 6 * 2.4e9 * 5.7e12, DENSE: 6 * 67e9 * 2e12, V2: 6 * 21e9 * 8.1e12,
             "LLaMA3 70B": 6 * 70e9 * 15e12}  # fmt: skip
    for model, estimate in thumb.items():
        assert 1.0 < flops[model] / estimate < 1.25, model
    fewer = dataclasses.replace(NUMBERS.run(V2), tokens_b=4050)
    runs = tuple(fewer if run == NUMBERS.run(V2) else run for run in NUMBERS.training)
    halved = training_compute(numbers=dataclasses.replace(NUMBERS, training=runs))
    assert halved[V2] == pytest.approx(flops[V2] / 2)


def test_the_table_in_words():
    lines = headline_table(headlines.headlines()).splitlines()
    assert lines[0].split() == ["figure", "published", "here", "how"]
    assert any("93.3 %" in line and "93.3388" in line and "6 bits" in line for line in lines)
    assert any("1.40 M GPU hours (derived)" in line for line in lines)
    assert (
        not Headline("x", "2.4", "B", 2.46, "", "").agrees and Headline("x", "2.4", "B", 2.44, "", "").agrees
    )


# --------------------------------------------------------------------------------------- planted alterations


def config(model: str, **changes):
    return {**MODELS, model: MODELS[model].replace(**changes)}, NUMBERS


def row(table: str, which: int, **changes):
    rows = list(getattr(NUMBERS, table))
    rows[which] = dataclasses.replace(rows[which], **changes)
    return MODELS, dataclasses.replace(NUMBERS, **{table: tuple(rows)})


LARGE_CACHE, SMALL_CACHE = "table 9, large MLA, cache", "table 9, small MLA, cache"
GROUPS, HOURS, STEPS = (
    "GQA groups at MLA's cache",
    "DeepSeek-V2's pre-training",
    "least steps of pre-training",
)
ALTERED = {
    "a wider latent": (config(V2, kv_lora_rank=544), {GROUPS, LARGE_CACHE, "KV cache saved"}),
    "a wider rotary key": (config(V2, qk_rope_head_dim=96), {GROUPS, LARGE_CACHE}),
    "a layer more": (config(V2, num_hidden_layers=61), {"DeepSeek-V2, all parameters", LARGE_CACHE}),
    "eight more experts": (config(V2, n_routed_experts=168), {"DeepSeek-V2, all parameters"}),
    "seven experts a token": (config(V2, num_experts_per_tok=7), {"DeepSeek-V2, activated"}),
    "no shared expert": (config(V2, n_shared_experts=0), {"DeepSeek-V2, activated"}),
    "V2's experts narrower": (config(V2, moe_intermediate_size=1408), {"DeepSeek-V2, all parameters"}),
    "twice the groups of 67B": (
        config(DENSE, num_key_value_heads=16),
        {"KV cache saved", "DeepSeek 67B, all parameters"},
    ),
    "seven experts of Mixtral": (config(MIXTRAL, n_routed_experts=7), {"Mixtral 8x22B, all parameters"}),
    "Mixtral's top-1": (config(MIXTRAL, num_experts_per_tok=1), {"Mixtral 8x22B, activated"}),
    "Lite's latent": (config(LITE, kv_lora_rank=256), {SMALL_CACHE}),
    "Lite's layers": (config(LITE, num_hidden_layers=26), {SMALL_CACHE, "DeepSeek-V2-Lite, all parameters"}),
    "Lite's heads": (
        config(LITE, num_attention_heads=32),
        {"table 9, small MHA, cache", "table 9, small MHA, activated", "table 9, small MHA, all parameters"},
    ),
    "Lite's experts": (config(LITE, n_routed_experts=63), {"DeepSeek-V2-Lite, all parameters"}),
    "Lite's top-8": (config(LITE, num_experts_per_tok=8), {"table 9, small MLA, activated"}),
    "hours of V2": (
        row("training", 1, h800_hours_k_per_t_tokens=178.2),
        {"training cost saved", HOURS},
    ),
    "hours of 67B": (row("training", 0, h800_hours_k_per_t_tokens=306.0), {"training cost saved"}),
    "tokens": (row("training", 1, tokens_b=8000), {HOURS, STEPS}),
    "batch": (row("training", 1, batch_sequences=9000), {"least steps of pre-training"}),
    "sequence": (row("training", 2, sequence_tokens=32000), {"tokens of the long-context stage"}),
    "a bar of throughput": (row("figure_1", 2, dense_67b=9.16), {"generation throughput"}),
    "a stated ratio": (row("figure_1", 1, stated=93.4), {"KV cache saved"}),
    "a row of table 9": (
        row("table_9", 2, kv_elements_per_token_k=680.2),
        {"table 9, large MHA, cache", "table 9, large: MLA's share"},
    ),
    "another of table 9": (row("table_9", 0, kv_elements_per_token_k=101.6), {"table 9, small: MLA's share"}),
    "a published count": (row("base_scores", 4, total_parameters_b=263), {"DeepSeek-V2, all parameters"}),
    "the price an hour": (
        row("claims", 6, numbers={**NUMBERS.claims[6].numbers, "usd_per_hour": 2.5}),
        {"DeepSeek-V3's training"},
    ),
}  # fmt: skip


def test_nothing_is_wrong_before_anything_is_altered():
    assert wrong() == set()


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_config_or_row_shows(name):
    (models, numbers), expected = ALTERED[name]
    assert expected <= wrong(models, numbers)


def test_every_figure_is_broken_by_some_alteration():
    broken = set().union(*(wrong(*altered) for altered, _ in ALTERED.values()))
    assert broken == {found.name for found in headlines.headlines()}


COUNTLESS = {"model_type", "rope_theta", "rope_scaling", "max_position_embeddings", "topk_method",
             "n_group", "topk_group"}  # fmt: skip
FIELDS = [
    (stem, field)
    for stem in published.MODELS
    for field in json.loads((DATA / "configs" / f"{stem}.json").read_text("utf-8"))["config"]
    if field not in COUNTLESS
]


def sizes(fields: dict) -> tuple[int, int, int]:
    cfg = published.config_of(fields)
    active = accounting.parameters(cfg, activated=True).total
    return accounting.parameters(cfg).total, active, accounting.kv_elements_per_token(cfg)


@pytest.mark.parametrize(("stem", "field"), FIELDS, ids="-".join)
def test_no_field_of_a_config_can_change_unseen(stem, field):
    """Doubled, a field changes a count, whose exact value another test has; MLA has no groups of heads."""
    fields = json.loads((DATA / "configs" / f"{stem}.json").read_text("utf-8"))["config"]
    value = fields[field]
    other = not value if isinstance(value, bool) else 2 * value if value else 1
    if field == "q_lora_rank" and value is None:
        other = 1536
    changed = sizes({**fields, field: other}) != sizes(fields)
    assert changed == (not (fields["model_type"] == "deepseek_v2" and field == "num_key_value_heads"))


def _forget_the_rotary_key(monkeypatch):
    right = accounting.kv_elements_per_token

    def elements(cfg, expanded=False):
        width = cfg.qk_rope_head_dim * cfg.num_hidden_layers if cfg.attention == "mla" else 0
        return right(cfg, expanded) - width

    monkeypatch.setattr(accounting, "kv_elements_per_token", elements)
    return {"KV cache saved", LARGE_CACHE, SMALL_CACHE}


def _keys_without_values(monkeypatch):
    right = accounting.kv_elements_per_token
    halved = {"mha", "gqa"}
    monkeypatch.setattr(
        accounting,
        "kv_elements_per_token",
        lambda c, e=False: right(c, e) // (2 if c.attention in halved else 1),
    )
    return {"KV cache saved", "table 9, small MHA, cache"}


def _eight_bits_for_six(monkeypatch):
    monkeypatch.setattr(accounting, "bits_per_element", lambda dtype: 8.0 if dtype == 6 else 16.0)
    return {"KV cache saved"}


def _experts_of_two_matrices(monkeypatch):
    monkeypatch.setattr(
        accounting, "expert_parameters", lambda cfg: 2 * cfg.hidden_size * cfg.moe_intermediate_size
    )
    return {f"{name}, {what}" for name in (V2, LITE, MIXTRAL) for what in ("all parameters", "activated")}


def _no_low_rank_query(monkeypatch):
    right = accounting.mla_parameters
    monkeypatch.setattr(
        accounting, "mla_parameters", lambda cfg: right(dataclasses.replace(cfg, q_lora_rank=None))
    )
    return {"DeepSeek-V2, all parameters", "DeepSeek-V2, activated"}


def _embedding_counted(monkeypatch):
    monkeypatch.setattr(headlines, "COUNTED", "everything")
    return {"DeepSeek-V2-Lite, activated", "table 9, small MLA, activated"}


@pytest.mark.parametrize(
    "plant",
    [
        _forget_the_rotary_key,
        _keys_without_values,
        _eight_bits_for_six,
        _experts_of_two_matrices,
        _no_low_rank_query,
        _embedding_counted,
    ],
)
def test_an_altered_formula_shows(plant, monkeypatch):
    assert plant(monkeypatch) <= wrong()


# ------------------------------------------------------------------------------------------------ the claims


def test_claims_are_judged_and_their_numbers_come_out():
    assert {claim.verdict for claim in NUMBERS.claims} <= set(VERDICTS)
    again = claim_values()
    inputs = {"v3_h800_hours_m", "usd_per_hour"}  # DeepSeek-V3's own, stored nowhere else
    for claim in NUMBERS.claims:
        assert set(claim.numbers) - inputs == set(again[claim.name]), claim.name
        for name, value in again[claim.name].items():
            stated = claim.numbers[name]
            decimals = len(f"{stated:.10g}".partition(".")[2])
            assert float(f"{value:.{decimals}f}") == stated, (claim.name, name)


@pytest.mark.parametrize("claim", NUMBERS.claims, ids=lambda claim: claim.name)
def test_a_claims_words_say_its_numbers(claim):
    """Whatever number the verdict's words state is among the claim's numbers, or in its stored check."""
    said = claim.claim + " " + claim.found
    for name, value in claim.numbers.items():
        plain = f"{value:.10g}"
        shown = {plain, f"{value:.1f}", f"{value:.2f}"} | (
            {"shared ones"} if name == "shared_experts" else set()
        )
        assert any(form in said for form in shown), (name, plain)


def test_a_claims_report_has_both_numbers_side_by_side():
    lines = headlines.claim_report("Mixtral").splitlines()
    assert lines[0].endswith("176B parameters.") and lines[1].startswith("verdict: wrong. 141B")
    assert [line.split()[-3:] for line in lines[3:]] == [
        ["176", "recomputed:", "176"], ["141", "recomputed:", "140.621"], ["39", "recomputed:", "39.152"],
    ]  # fmt: skip
    assert "8.01   in its table: 8.01" in headlines.claim_report("AlignBench")
    assert "not recomputed" in headlines.claim_report("price")
    with pytest.raises(ValueError, match="name='weather' is not among routed experts"):
        headlines.claim_report("weather")


def test_who_leads_which_benchmark():
    leaders = {
        name: max(NUMBERS.base_scores, key=lambda row: row.scores_percent[name]).model for name in EIGHT
    }
    assert leaders == {
        "MMLU": "LLaMA3 70B", "BBH": "LLaMA3 70B", "MBPP": "LLaMA3 70B", "GSM8K": "LLaMA3 70B",
        "C-Eval": "Qwen1.5 72B", "CMMLU": "Qwen1.5 72B", "HumanEval": MIXTRAL, "MATH": V2,
    }  # fmt: skip


def test_least_activated_parameters():
    sparse = {row.model: row for row in NUMBERS.sparse_models}
    assert sparse["GLaM"].least_activated_b == 96.6
    assert sparse["Switch-C"].least_activated_b == pytest.approx(1571 / 2048)
    assert sparse["Switch-XXL"].least_activated_b == pytest.approx(395 / 64)
    # The bound holds where the activated count is known: Mixtral 2 of 8, GLaM 2 of 64, V2 6 of 160.
    for total, experts, chosen, activated in ((141, 8, 2, 39), (1200, 64, 2, 96.6), (236, 160, 6, 21)):
        bound = dataclasses.replace(
            sparse["GLaM"], total_parameters_b=total, activated_parameters_b=None, experts=experts,
            experts_per_token=chosen,
        )  # fmt: skip
        assert bound.least_activated_b < activated
