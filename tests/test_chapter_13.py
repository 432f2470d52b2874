"""Chapter 13: its exercises against the package, what its page quotes, and its cell for a measured run."""

from __future__ import annotations

import math
from pathlib import Path

import nbformat
import pytest

import dsv2.economics
from dsv2 import accounting, headlines, viz
from dsv2.bench import economics as miniature
from dsv2.course import mine
from dsv2.course.chapters import c13_economics as chapter
from dsv2.course.judge import judge
from dsv2.economics import (
    Deployment,
    check_attention,
    check_decoding,
    decode_throughput,
    published_speeds,
    speedup,
    speedup_steps,
)
from dsv2.published import measured_devices, published_models, published_numbers
from dsv2.viz.economics import serving

ROOT = Path(__file__).resolve().parents[1]
PAGE = nbformat.read(ROOT / "notebooks" / "13_economics.ipynb", as_version=4)
PROSE = " ".join(" ".join(c.source for c in PAGE.cells if c.cell_type == "markdown").split())
MODELS = published_models()
GPU = "H100 80GB, measured"


# ------------------------------------------------------------------------------------------- the exercises


@pytest.mark.parametrize("case", chapter.STEP_SECONDS.cases, ids=lambda case: case.says)
def test_exercise_13_5_is_the_package_s_own_step(case):
    arguments = case.arguments()
    step = decode_throughput(
        arguments["cfg"], arguments["context"], arguments["deployment"], arguments["batch"]
    )
    assert chapter.STEP_SECONDS.answer(**arguments) == pytest.approx(step.seconds, rel=1e-12)


def summed_fits(cfg, published, activated=True):
    counts = accounting.parameters(cfg, activated).conventions()
    places = len(published.split(".")[1]) if "." in published else 0
    return [name for name in counts if round(counts[name] / 1e9, places) == float(published)]


def bill_by_halves(hours, flops, rate, trillions, price):
    (before, after), (their, our) = hours, flops
    return {
        "cost": price * trillions * after,
        "whole run": trillions * after,
        "share of the rate": our * 1e12 / after / 3600 / rate,
        "hours by FLOPs alone": our / (their / before),
        "hours saved": (before - after) / before,
    }


def counted_up(cfg, context, deployment):
    free = deployment.room - accounting.parameters(cfg).total * deployment.weight_bits / 8
    return max(
        0, math.floor(free * 8 / deployment.cache_bits / accounting.kv_elements_per_token(cfg) / context)
    )


ALTERNATIVES = {
    "saving by bytes": (
        chapter.CACHE_SAVING,
        lambda cfg, other, form="6 bits", other_form="bf16": (
            1
            - accounting.kv_bytes_per_token(cfg, dsv2.economics.storage_bits(form))
            / accounting.kv_bytes_per_token(other, dsv2.economics.storage_bits(other_form))
        ),
    ),
    "rounded numbers": (chapter.CONVENTIONS_THAT_FIT, summed_fits),
    "bill in another order": (chapter.TRAINING_BILL, bill_by_halves),
    "batch by elements": (chapter.LARGEST_BATCH, counted_up),
    "batch as a float": (chapter.LARGEST_BATCH, lambda *args, **named: float(counted_up(*args, **named))),
    "the package's step": (
        chapter.STEP_SECONDS,
        lambda cfg, context, batch, deployment: decode_throughput(cfg, context, deployment, batch).seconds,
    ),
    "a list of candidates": (
        chapter.CHEAPEST_BATCH,
        lambda seconds, batches, least, price, devices: min(
            ((b, devices * price * seconds(b) / b * 1e6 / 3600) for b in batches if 1 / seconds(b) >= least),
            key=lambda pair: pair[1], default=None,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("exercise, answer", ALTERNATIVES.values(), ids=ALTERNATIVES)
def test_another_right_answer_passes(exercise, answer):
    assert judge(exercise, answer).status == "passed"


def test_both_limits_occur_in_the_cases_of_13_5():
    limits = set()
    for case in chapter.STEP_SECONDS.cases:
        a = case.arguments()
        step = decode_throughput(a["cfg"], a["context"], a["deployment"], a["batch"])
        limits |= {(phase.name, phase.limit) for phase in step.phases}
    assert len(limits) == 8, "each phase should wait for reading in one case and for products in another"


@pytest.mark.parametrize("case", chapter.CHEAPEST_BATCH.cases, ids=lambda case: case.says)
def test_the_cheapest_batch_is_found_another_way(case):
    a = case.arguments()
    table = {batch: a["seconds"](batch) for batch in a["batches"]}
    fast = [batch for batch, step in table.items() if 1 >= a["least"] * step]
    cost = {
        batch: a["devices"] * a["price"] * table[batch] * 1e6 / (3600 * batch) for batch in fast
    }  # fmt: skip
    found = chapter.CHEAPEST_BATCH.answer(**a)
    if not fast:
        assert found is None
    else:
        assert found[0] in fast and found[1] == pytest.approx(min(cost.values()))


def test_finished_exercises_take_the_package_s_place():
    calls = []

    def one_text(cfg, context, deployment):
        calls.append(context)
        return 1

    deployment = Deployment(measured_devices()[GPU], 8, "fp8", "6 bits")
    mine.swap({"dsv2.economics.largest_batch": one_text})
    try:
        assert decode_throughput(MODELS["DeepSeek-V2"], 4096, deployment).batch == 1
    finally:
        mine.restore()
    assert calls == [4096]
    assert dsv2.economics.largest_batch(MODELS["DeepSeek-V2"], 4096, deployment) == 3204
    replaced = [place for exercise in chapter.EXERCISES for place in exercise.replaces]
    assert replaced == ["dsv2.economics.cache_saving", "dsv2.economics.largest_batch"]


# ------------------------------------------------------------------------------------------------ the page


def quoted() -> dict[str, str]:
    """What the page says in prose beside its outputs, computed again: by topic."""
    served = {
        "DeepSeek 67B": Deployment(measured_devices()[GPU], 8),
        "DeepSeek-V2": Deployment(measured_devices()[GPU], 8, "fp8", "6 bits"),
    }
    flops = {name: accounting.training_flops_per_token(MODELS[name], 4096).total for name in served}
    fewer = flops["DeepSeek-V2"] / flops["DeepSeek 67B"]
    steps = speedup_steps(4096)
    batches = [step.throughput.batch for step in steps]
    longer = steps[1].throughput.seconds / steps[0].throughput.seconds
    room = [step.throughput.room - step.throughput.memory.weights for step in steps]
    assert room[3] > 3 * room[2], "the room that is left more than triples"

    def cost(model, **change):
        setting = dict(context=4096, batch=0, weights="fp8", cache="6 bits", device=GPU, gpus=8) | change
        return serving(model, **setting)

    four, sixteen = (cost("DeepSeek-V2", gpus=gpus) for gpus in (4, 16))
    dear = [cost(m, context=131072).cost_per_million(2) for m in ("DeepSeek-V2", *served, "LLaMA3 70B")]
    v2, dense, llama = dear[0], dear[1], dear[3]
    eight = cost("DeepSeek-V2")
    small = {name: cost(name, batch=64).tokens_per_second for name in served}
    third = {name: cost(name, batch=32).cost_per_million(2) for name in ("LLaMA3 70B", *served)}
    one = {name: cost(name, batch=1).tokens_per_second for name in served}
    checks = check_decoding()
    short = [check.share for check in check_attention() if check.measured > 1e-4]
    prompts = dsv2.economics.prefill_speed(MODELS["DeepSeek-V2"], 4096, served["DeepSeek-V2"])
    ratios = [speedup(speedup_steps(context)) for context in (512, 65536)]
    sparse = {row.model: row for row in published_numbers().sparse_models}
    work = headlines.training_compute()
    assert work["DeepSeek-V2"] / work["DeepSeek 67B"] == pytest.approx(1.5, abs=0.05)
    assert 5 < work["LLaMA3 70B"] / work["DeepSeek-V2"] < 6
    assert published_speeds()["DeepSeek-V2"] > eight.tokens_per_second, "above the limit"
    gqa = speedup_steps(4096, ("V2's layers and experts", "FP8 weights", "MLA", "6-bit cache"))
    first = speedup_steps(4096, ("FP8 weights", "MLA", "6-bit cache", "V2's layers and experts"))
    assert first[1].factor == pytest.approx(1), "FP8 brings DeepSeek 67B nothing"
    least, most = dsv2.economics.factor_ranges(4096)["MLA"]
    at_256 = [cost(name, batch=256).tokens_per_second for name in served]
    assert at_256[0] > at_256[1]
    assert accounting.expected_distinct_experts(MODELS["DeepSeek-V2"], 64) / 160 == pytest.approx(
        0.9, abs=0.02
    )
    alone = [check.share for check in check_attention() if "batch 1," in check.what]
    assert min(short) == pytest.approx(0.74, abs=0.005)
    return {
        "fewer FLOPs": f"{1 - fewer:.1%}".replace("%", " %"),
        "longer than forecast": f"{172.8 / (300.6 * fewer):.2f} times as long as that",
        "MLA": f"{steps[1].factor:.2f}: {batches[1]:,} texts fit instead of {batches[0]}",
        "a longer step": f"their step takes {longer:.1f} times as long",
        "experts": f"{steps[2].factor:.2f} times as many: "
        f"the weights fill the memory, and {batches[2]} texts fit instead of {batches[1]:,}",
        "ratio of the limits": f"The limits give {ratios[0]:.1f} to {ratios[1]:.1f}",
        "whole steps": f"{min(c.share for c in checks):.0%} to {max(c.share for c in checks):.0%}".replace(
            "%", ""
        ),
        "bf16 weights": f"from {eight.tokens_per_second:,.0f} to "
        f"{cost('DeepSeek-V2', weights='bf16').tokens_per_second:,.0f} tokens per second",
        "the dense model's stay": f"stays at {cost('DeepSeek 67B', weights='bf16').tokens_per_second:,.0f}: "
        f"its batch shrinks from {cost('DeepSeek 67B').batch} to "
        f"{cost('DeepSeek 67B', weights='bf16').batch}",
        "four": f"4 GPUs reach {four.tokens_per_second:,.0f}, "
        f"{four.tokens_per_second / eight.tokens_per_second:.0%}".replace("%", " %"),
        "sixteen": f"16 reach {sixteen.tokens_per_second:,.0f}, twice as many as 8",
        "128K": f"{v2:.2f} dollars for DeepSeek-V2, {dense:.2f} for DeepSeek 67B, {llama:.2f} for LLaMA3 70B",
        "32 texts": f"with {third['DeepSeek 67B']:.2f} dollars a million; "
        f"DeepSeek-V2 costs {third['DeepSeek-V2']:.2f}",
        "64 texts": f"{small['DeepSeek 67B']:,.0f} tokens per second and DeepSeek-V2's "
        f"{small['DeepSeek-V2']:,.0f}",
        "the dense model's lead": "with 256 the dense model is still ahead",
        "FP8 for GQA": f"makes DeepSeek-V2 with GQA {gqa[2].factor:.1f} times as fast",
        "MLA's share": f"in these limits {least:.1f} to {most:.1f} at this length",
        "nine tenths": "64 texts already read nine tenths of them",
        "one text": f"{one['DeepSeek-V2'] / one['DeepSeek 67B']:.1f} times as high",
        "fp8 cache": f"{cost('DeepSeek-V2', cache='fp8').batch:,} texts or {eight.batch:,}, and "
        f"{cost('DeepSeek-V2', cache='fp8').tokens_per_second:,.0f} tokens per second in both",
        "prompts": f"100K would be {100e3 / prompts:.0%}".replace("%", " %"),
        "attention of one text": " and ".join(f"{share:.0%}"[:-1] for share in alone)
        + " % where a single text",
        "GLaM": f"GLaM does ({sparse['GLaM'].least_activated_b / 12:.0f} %)",
    }


@pytest.mark.parametrize("topic, words", quoted().items(), ids=str)
def test_what_the_page_says_is_what_comes_out(topic, words):
    assert words in PROSE


def test_dense_models_cost_the_same_at_32_texts():
    setting = dict(context=4096, batch=32, weights="fp8", cache="6 bits", device=GPU, gpus=8)
    dense, llama = (serving(name, **setting).cost_per_million(2) for name in ("DeepSeek 67B", "LLaMA3 70B"))
    assert f"{dense:.2f}" == f"{llama:.2f}" == "0.50"


def test_the_readme_counts_the_figures_that_are_recomputed():
    printed = [found for found in headlines.headlines() if not found.derived]
    assert all(found.agrees for found in printed)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{len(printed)} published figures, recomputed" in readme
    (said,) = [
        o.text
        for c in PAGE.cells
        for o in c.get("outputs", ())
        if "digits that are printed" in o.get("text", "")
    ]
    assert said.startswith(f"{len(printed)} of {len(printed)} agree")


def test_every_claim_is_on_the_page_with_its_verdict():
    table = "".join(
        o.data["text/markdown"]
        for c in PAGE.cells
        for o in c.get("outputs", ())
        if "text/markdown" in o.get("data", {})
    )
    for claim in published_numbers().claims:
        assert f"| {claim.claim} | **{claim.verdict}** | {claim.found} | {claim.source} |" in table
    computed = headlines.claim_values()
    assert all(computed[claim.name] for claim in published_numbers().claims), "a claim that nothing checks"


def cell_with(text: str) -> str:
    (source,) = [c.source for c in PAGE.cells if c.cell_type == "code" and text in c.source]
    return source


def test_a_claim_that_does_not_fit_stops_the_page():
    names: dict = {}
    exec(PAGE.cells[2].source, names)
    computed = headlines.claim_values()
    computed["devices"]["devices"] = 4
    names.update(claim_values=lambda: computed, display=lambda shown: None)
    with pytest.raises(AssertionError, match="devices: 4, stored 8"):
        exec(cell_with("claim_values()"), names)


@pytest.mark.parametrize("there", [False, True])
def test_the_page_shows_a_measured_run_if_there_is_one(there, monkeypatch, capsys):
    report = {
        "command": "python -m dsv2.bench economics", "date": "2026-01-02", "versions": {"torch": "2.6.0"},
        "device": "a GPU", "dtype": "bfloat16", "context": 4096,
        "results": [
            {
                "model": name, "batch": batch, "cached": 4064, "ms": 10.0, "tokens_per_second": 100.0 * batch,
                "predicted": 150.0 * batch, "share": 2 / 3, "largest": True,
            }
            for name, batch in ((miniature.DENSE, 60), (miniature.SPARSE, 240))
        ],
        "ratio": {"measured": 4.0, "predicted": 4.1},
    }  # fmt: skip
    monkeypatch.setattr(miniature, "load", lambda: report if there else None)
    shown: list = []
    names = {"miniature": miniature, "viz": viz, "display": shown.append}
    exec(cell_with("miniature.load()"), names)
    assert ["x4.00 measured" in viz.describe(figure) for figure in shown] == [True] * there
    said = capsys.readouterr().out
    assert ("x4.00 measured" in said) == there and ("has not been measured" in said) != there
