"""The studies of chapters 06 to 08: what their models have in common, and what one run writes down."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from dsv2 import DeepSeekV2
from dsv2.bench import balance, device_limit, routers, runs
from dsv2.bench.__main__ import main as bench
from dsv2.config import DSV2Config
from dsv2.data import find_corpus, prepare
from dsv2.train import TrainConfig

STUDIES = (balance.STUDY, device_limit.STUDY, routers.STUDY, routers.LARGE_STUDY)


def weights_of_experts(cfg: DSV2Config) -> tuple[int, int]:
    """All numbers in the experts of one layer, and those that a token is multiplied with."""
    one = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    return tuple(one * (n + cfg.n_shared_experts) for n in (cfg.n_routed_experts, cfg.num_experts_per_tok))


@pytest.mark.parametrize(("study", "unit"), [(routers.STUDY, 32), (routers.LARGE_STUDY, 192)])
def test_routers_are_compared_at_equal_parameters_and_products(study, unit):
    assert list(study.models)[0] == "one FFN" and len(study.models) == 9
    for name, cfg in study.models.items():
        width = 3 * cfg.hidden_size * unit
        if name == "one FFN":
            assert not cfg.moe_layers and 3 * cfg.hidden_size * cfg.intermediate_size == 4 * width
            continue
        total, active = weights_of_experts(cfg)
        assert total == 32 * width, name
        assert active == (32 if name == "all experts" else 4) * width, name
        held = DeepSeekV2(cfg.replace(num_hidden_layers=2)).layers[1].ffn
        counted = sum(p.numel() for p in held.parameters()) - held.router.weight.numel()
        assert counted == total, name
        if cfg.router == "deepseek":
            equal = cfg.routed_scaling_factor * cfg.num_experts_per_tok / cfg.n_routed_experts
            assert equal == pytest.approx(DSV2Config.preset("full").routed_scaling_factor * 6 / 160)


def test_studies_differ_in_one_thing():
    for study, differing in (
        (device_limit.STUDY, {"topk_group"}),
        (balance.STUDY, {"aux_loss_alpha", "device_loss_alpha", "communication_loss_alpha"}),
    ):
        fields = [cfg.to_dict() for cfg in study.models.values()]
        assert {key for key in fields[0] for other in fields if other[key] != fields[0][key]} == differing
    assert [cfg.topk_group for cfg in device_limit.STUDY.models.values()] == [1, 2, 3, 4, 8]
    assert not device_limit.STUDY.models["M = 8"].limits_devices
    assert len({study.out for study in STUDIES}) == len(STUDIES)


def test_a_run_of_a_router_that_drops_is_looked_at(tmp_path):
    corpus = find_corpus(["arithmetic"], max_bytes_per_domain=60_000, cache=False, progress=False)
    data = prepare(corpus, directory=tmp_path / "packed")
    cfg = routers.STUDY.models["Switch"].replace(num_hidden_layers=2, hidden_size=32)
    config = TrainConfig(steps=5, batch_size=2, seq_len=32, validate_every=0, sample_every=0)
    windows = data.validation.validation_windows(32, 3)
    found, trainer = runs.train_and_count(cfg, config, data, windows, every=2)
    assert found["steps"] == [0, 2, 4, 5] == [step for step, _ in found["val_curve"]]
    assert [len(layer) for layer in found["loads"][0]] == [8]
    assert all(sum(layers[0]) == windows.tokens.numel() for layers in found["loads"])
    # The last point is the trained model's own loss on the same windows, taken apart from the trainer.
    logits = trainer.model.eval()(windows.tokens).logits.detach().double()
    nats = -logits.log_softmax(-1).gather(-1, windows.targets[..., None]).sum()
    assert found["val_curve"][-1][1] == pytest.approx(float(nats / (windows.targets < 256).sum()), abs=1e-4)
    assert found["val_curve"][-1][1] < found["val_curve"][0][1]


def test_the_command_writes_one_file_with_everything(tmp_path, monkeypatch, capsys):
    class Inline:
        """A pool of processes in this one."""

        def __init__(self, processes):
            assert processes == 3

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        imap_unordered = staticmethod(map)

    trained = []

    def measured(cfg, config, directory):
        assert directory == tmp_path
        trained.append((cfg.topk_group, config.seed))
        if len(trained) == 3 and stops:
            raise KeyboardInterrupt
        return FOUND | {"val_nats_per_byte": cfg.topk_group}

    monkeypatch.setattr(runs.multiprocessing, "get_context", lambda method: type("", (), {"Pool": Inline}))
    monkeypatch.setattr(runs, "measure", measured)
    packed = SimpleNamespace(manifest={"fingerprint": "abc"}, directory=tmp_path)
    opened = runs.text.open_text
    monkeypatch.setattr(runs.text, "open_text", lambda given: opened(given) if given else packed)
    out = tmp_path / "new" / "runs.json"
    arguments = ["--seeds", "2", "--steps", "7", "--processes", "3", "--only", "M = 1", "M = 3"]
    stops = True
    with pytest.raises(KeyboardInterrupt):
        bench(["device-limit", *arguments, "--out", str(out)])
    stops = False
    assert bench(["device-limit", *arguments, "--out", str(out)]) == 0  # goes on where it was stopped
    assert trained == [(1, 0), (3, 0), (1, 1), (1, 1), (3, 1)]
    stored = json.loads(out.read_text(encoding="utf-8"))
    assert [(run["name"], run["seed"]) for run in stored["runs"]] == [
        (name, seed) for seed in (0, 1) for name in ("M = 1", "M = 3")
    ]
    assert [run["val_nats_per_byte"] for run in stored["runs"]] == [1, 3, 1, 3]
    assert stored["training"]["steps"] == 7 and stored["corpus_fingerprint"] == "abc"
    assert DSV2Config.from_dict(stored["models"]["M = 3"]) == device_limit.STUDY.models["M = 3"]
    assert "M = 1                seed 0: 1.0000 nats per byte,   1 of 4 experts" in capsys.readouterr().out
    for changed in (["--steps", "8"], ["--seeds", "3", "--steps", "8"]):  # other runs: none is taken over
        trained.clear()
        bench(["device-limit", *arguments, *changed, "--out", str(out)])
        assert len(trained) == {2: 4, 4: 2}[len(changed)]
    for wrong in (["--only", "M = 5"], ["--data", str(tmp_path / "nothing")]):
        with pytest.raises(SystemExit):
            bench(["device-limit", *wrong])
        assert wrong[1] in capsys.readouterr().err


FOUND = {"steps": [0, 7], "loads": [[[1, 1, 1, 1]], [[21, 0, 10, 9]]], "losses": [2.0], "seconds": 3.0}
