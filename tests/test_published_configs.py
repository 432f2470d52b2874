"""The published configs give the parameter counts and caches that their makers report."""

from __future__ import annotations

import json

import pytest

from dsv2.accounting import kv_bytes_per_token, kv_elements_per_token, parameters
from dsv2.config import DSV2Config
from dsv2.published import DATA, MODELS, config_of, published_devices, published_models

RECORDS = {stem: json.loads((DATA / "configs" / f"{stem}.json").read_text("utf-8")) for stem in MODELS}


def test_every_file_is_read_and_listed():
    stems = {path.stem for path in (DATA / "configs").glob("*.json")}
    assert stems == set(MODELS)
    assert list(published_models()) == [record["name"] for record in RECORDS.values()]
    readme = (DATA / "configs" / "README.md").read_text("utf-8")
    for stem, record in RECORDS.items():
        assert f"`{stem}.json`" in readme and record["source"] in readme


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_reported_parameters_come_out(record):
    """Makers round to a billion, or to a tenth; "70B" and "21B" are rounded down (70.55, 21.38)."""
    cfg = config_of(record["config"])
    assert parameters(cfg).total == pytest.approx(record["reported"]["total"], rel=0.01)
    if "activated" in record["reported"]:
        counted = parameters(cfg, activated=True).conventions().values()
        assert min(abs(c / record["reported"]["activated"] - 1) for c in counted) < 0.025


@pytest.mark.parametrize(
    ("name", "total", "elements"),
    [  # by hand: 2 x 8 heads x 128 x layers, or (512 + 64) x layers
        ("DeepSeek 67B", 67_425_001_472, 2 * 8 * 128 * 95),
        ("LLaMA3 70B", 70_553_706_496, 2 * 8 * 128 * 80),
        ("Mixtral 8x22B", 140_620_634_112, 2 * 8 * 128 * 56),
        ("DeepSeek-V2-Lite", 15_706_484_224, 576 * 27),
        ("DeepSeek-V2", 235_741_434_880, 576 * 60),
    ],
)
def test_totals_and_caches(name, total, elements):
    cfg = published_models()[name]
    assert parameters(cfg).total == total
    assert kv_elements_per_token(cfg) == elements
    assert kv_bytes_per_token(cfg) == 2 * elements


def test_the_papers_93_percent_needs_six_bits():
    """Figure 1(b): DeepSeek 67B at 16 bits against DeepSeek-V2 at 6 (section 3.2.3)."""
    models = published_models()
    ratio = kv_bytes_per_token(models["DeepSeek-V2"], 6) / kv_bytes_per_token(models["DeepSeek 67B"], 16)
    assert 1 - ratio == pytest.approx(0.933, abs=5e-4)


@pytest.mark.parametrize(("name", "preset"), [("DeepSeek-V2", "full"), ("DeepSeek-V2-Lite", "lite")])
def test_presets_have_the_published_shapes(name, preset):
    published, ours = published_models()[name], DSV2Config.preset(preset)
    record = next(record for record in RECORDS.values() if record["name"] == name)
    compared = set(record["config"]) - {"model_type", "num_key_value_heads"}
    assert len(compared) > 15
    for field in compared:
        assert getattr(published, field) == getattr(ours, field), field


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        config_of({"model_type": "gpt2"})


def test_devices():
    devices = published_devices()
    h100 = devices["H100 80GB"]
    assert (h100.memory, h100.bandwidth, h100.flops) == (80e9, 3.35e12, 989.4e12)
    assert h100.balance == pytest.approx(295.3, abs=0.1)  # FLOPs per byte
    for device in devices.values():
        assert device.source and device.memory > 1e9 and device.bandwidth > 1e10 and device.flops > 1e11
    # A unit mistaken by a factor of 1,000 would fall out of this range.
    assert all(5 < device.balance < 500 for device in devices.values())
