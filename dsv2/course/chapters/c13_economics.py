"""The exercises of chapter 13: cases, right answers, plausible mistakes, hints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsv2 import accounting, economics
from dsv2.accounting import Flops, Parameters, attention_twin
from dsv2.config import DSV2Config
from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.economics import Deployment
from dsv2.published import Device, published_models

MODELS = published_models()
V2, LITE, DENSE, MIXTRAL = (
    MODELS[name] for name in ("DeepSeek-V2", "DeepSeek-V2-Lite", "DeepSeek 67B", "Mixtral 8x22B")
)
bits_of = economics.storage_bits

# ------------------------------------------------------------------------------------- 13.1 the cache saved


def saving_with(
    latent: Callable[[DSV2Config], float] = lambda c: c.kv_lora_rank + c.qk_rope_head_dim,
    heads: Callable[[DSV2Config], float] = lambda c: 2 * c.kv_heads * c.baseline_head_dim,
    layers: Callable[[DSV2Config], int] = lambda c: c.num_hidden_layers,
    bits: Callable[[float, float], tuple[float, float]] = lambda ours, theirs: (ours, theirs),
    join: Callable[[float, float], float] = lambda ours, theirs: 1 - ours / theirs,
) -> Callable[..., float]:
    """An answer to 13.1: a layer's width for MLA and for the others, then bits of a token, joined."""

    def answer(cfg: DSV2Config, other: DSV2Config, form: Any = "6 bits", other_form: Any = "bf16") -> float:
        widths = [
            layers(model) * (latent(model) if model.attention == "mla" else heads(model))
            for model in (cfg, other)
        ]
        ours, theirs = bits(bits_of(form), bits_of(other_form))
        return join(widths[0] * ours, widths[1] * theirs)

    return answer


def caches(cfg: DSV2Config, other: DSV2Config, form: Any, other_form: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"cfg": cfg, "other": other, "form": form, "other_form": other_form}


CACHE_SAVING = Exercise(
    number="13.1",
    name="cache_saving",
    title="the cache that is saved",
    difficulty=1,
    minutes=8,
    answer=economics.cache_saving,
    cases=(
        Case("DeepSeek-V2 in 6 bits, DeepSeek 67B in bf16", caches(V2, DENSE, "6 bits", "bf16")),
        Case("V2-Lite in fp8, Mixtral 8x22B in 4.5 bits", caches(LITE, MIXTRAL, "fp8", 4.5)),
        Case(
            "DeepSeek-V2 in fp8, the same model with MHA in 6 bits",
            caches(V2, attention_twin(V2, "mha"), "fp8", "6 bits"),
        ),
        Case("DeepSeek 67B in fp8, DeepSeek-V2 in bf16", caches(DENSE, V2, "fp8", "bf16")),
        Case(
            "DeepSeek 67B in bf16, V2-Lite with MQA of 96 channels in 6 bits",
            caches(DENSE, attention_twin(LITE, "mqa", head_dim=96), "bf16", "6 bits"),
        ),
    ),
    mistakes=(
        Mistake(
            "what is left",
            "This is the share of the cache that is left. Asked for is the share that is saved.",
            saving_with(join=lambda ours, theirs: ours / theirs),
        ),
        Mistake(
            "in percent",
            "This is right in percent. Asked for is a share: 1 would be all of it.",
            saving_with(join=lambda ours, theirs: 100 * (1 - ours / theirs)),
        ),
        Mistake(
            "against its own cache",
            "The difference was divided by this model's own cache. The share is one of the other's cache.",
            saving_with(join=lambda ours, theirs: theirs / ours - 1),
        ),
        Mistake(
            "how many times",
            "This says how many times larger the other cache is. Asked for is the share that is saved.",
            saving_with(join=lambda ours, theirs: theirs / ours),
        ),
        Mistake(
            "bits saved",
            "This is a number of bits for each token. Asked for is a share of the other's.",
            saving_with(join=lambda ours, theirs: theirs - ours),
        ),
        Mistake(
            "elements alone",
            "Elements were compared, whatever their bits. Both models store theirs in a format of their own.",
            saving_with(bits=lambda ours, theirs: (1, 1)),
        ),
        Mistake(
            "formats exchanged",
            "Each model's elements were counted in the other's format.",
            saving_with(bits=lambda ours, theirs: (theirs, ours)),
        ),
        Mistake(
            "bits against bytes",
            "One side is in bytes and the other in bits.",
            saving_with(bits=lambda ours, theirs: (ours / 8, theirs)),
        ),
        Mistake(
            "rotary key forgotten",
            "MLA's cache holds the latent only. The shared rotary key lies beside it.",
            saving_with(latent=lambda c: c.kv_lora_rank),
        ),
        Mistake(
            "a rotary key for each head",
            "MLA's rotary key was counted for each head. All heads share one.",
            saving_with(latent=lambda c: c.kv_lora_rank + c.num_attention_heads * c.qk_rope_head_dim),
        ),
        Mistake(
            "keys and values of all heads",
            "For MLA, every head's keys and values were counted. It caches what they are made from.",
            saving_with(
                latent=lambda c: c.num_attention_heads * (c.qk_head_dim + c.v_head_dim),
            ),
        ),
        Mistake(
            "all heads",
            "For GQA and MQA, all heads were counted. Only kv_heads of them have keys and values.",
            saving_with(heads=lambda c: 2 * c.num_attention_heads * c.baseline_head_dim),
        ),
        Mistake(
            "a factor of two",
            "For GQA and the others keys or values were counted. They keep both; MLA's latent makes both.",
            saving_with(heads=lambda c: c.kv_heads * c.baseline_head_dim),
        ),
        Mistake(
            "width from the hidden size",
            "A head's width was taken to be the hidden size over the heads. It is a field of its own, and in "
            "DeepSeek-V2 another number.",
            saving_with(heads=lambda c: 2 * c.kv_heads * c.hidden_size / c.num_attention_heads),
        ),
        Mistake(
            "MLA on the left, GQA on the right",
            "The first model was taken to have MLA and the second not. Ask each of them: model.attention.",
            lambda cfg, other, form="6 bits", other_form="bf16": (
                1
                - (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
                * cfg.num_hidden_layers
                * bits_of(form)
                / (
                    2
                    * other.kv_heads
                    * other.baseline_head_dim
                    * other.num_hidden_layers
                    * bits_of(other_form)
                )
            ),
        ),
        Mistake(
            "one layer",
            "One layer was compared with one layer. The models have different numbers of them.",
            saving_with(layers=lambda c: 1),
        ),
    ),
    hints=(
        "Two models differ in three ways here: numbers a layer, layers, and bits a number. Which of them "
        "does the count of elements leave out?",
        'The cell under "93.3 %" in the notebook does it for DeepSeek-V2 and DeepSeek 67B, line by line.',
        "width = d_c + d_h^R if attention is mla, else 2 * kv_heads * baseline_head_dim\n"
        "bits of a token = width * layers * storage_bits(format)\n"
        "return 1 - ours / theirs",
    ),
    checked="MLA against GQA, MHA and MQA, GQA against MLA, four formats",
    tolerance=1e-9,
    replaces=("dsv2.economics.cache_saving",),
)

# ------------------------------------------------------------------------------ 13.2 which conventions fit


def fitting(
    rule: Callable[[float, str], bool] | None = None,
    *,
    of: Callable[[DSV2Config, bool], Parameters] = accounting.parameters,
    unit: float = 1e9,
    answer: Callable[[dict[str, float], list[str]], Any] = lambda counts, names: names,
) -> Callable[..., Any]:
    """An answer to 13.2. rule(count, published): whether a count in billions fits the printed digits."""
    rule = rule or same_digits

    def find(cfg: DSV2Config, published: str, activated: bool = True) -> Any:
        counts = {name: count / unit for name, count in of(cfg, activated).conventions().items()}
        return answer(counts, [name for name, count in counts.items() if rule(count, published)])

    return find


def decimals(published: str) -> int:
    return len(published.partition(".")[2])


def same_digits(count: float, published: str) -> bool:
    return f"{count:.{decimals(published)}f}" == published


def rounded_by(kind: Callable[[float], int]) -> Callable[[float, str], bool]:
    def rule(count: float, published: str) -> bool:
        scale = 10 ** decimals(published)
        return kind(count * scale) == round(float(published) * scale)

    return rule


def nearest(cfg: DSV2Config, published: str, activated: bool = True) -> list[str]:
    counts = accounting.parameters(cfg, activated).conventions()
    return [min(counts, key=lambda name: abs(counts[name] / 1e9 - float(published)))]


def printed(cfg: DSV2Config, published: str, activated: bool = True) -> Callable[[], dict[str, Any]]:
    return lambda: {"cfg": cfg, "published": published, "activated": activated}


CONVENTIONS_THAT_FIT = Exercise(
    number="13.2",
    name="conventions_that_fit",
    title="which conventions fit",
    difficulty=1,
    minutes=8,
    answer=fitting(),
    cases=(
        Case("DeepSeek-V2, 21 activated", printed(V2, "21")),
        Case("V2-Lite, 2.4 activated", printed(LITE, "2.4")),
        Case("V2-Lite, 2.45 activated", printed(LITE, "2.45")),
        Case("V2-Lite, 15.7 in all", printed(LITE, "15.7", False)),
        Case("DeepSeek-V2, 235 in all", printed(V2, "235", False)),
        Case("DeepSeek-V2, 20.9 activated", printed(V2, "20.9")),
        Case("Mixtral 8x22B, 40 activated", printed(MIXTRAL, "40")),
        Case("DeepSeek 67B, 67 activated", printed(DENSE, "67")),
        Case("DeepSeek-V2, 220 in all", printed(V2, "220", False)),
    ),
    mistakes=(
        Mistake(
            "cut off",
            "Counts were cut off after the printed digits. 20.9 rounds to 21.",
            fitting(rounded_by(math.floor)),
        ),
        Mistake(
            "always rounded up",
            "Counts were rounded up. What is less than half a digit above rounds down.",
            fitting(rounded_by(math.ceil)),
        ),
        Mistake(
            "whole billions",
            "Everything was compared in whole billions. Digits after the point that were printed count too.",
            fitting(lambda count, published: round(count) == round(float(published))),
        ),
        Mistake(
            "one decimal",
            "Counts were rounded to one decimal, however many were printed.",
            fitting(lambda count, published: round(count, 1) == float(published)),
        ),
        Mistake(
            "equal numbers",
            "Nothing fits anywhere. Are the counts divided by 1e9, and rounded before they are held against "
            "the printed digits?",
            fitting(lambda count, published: count == float(published)),
        ),
        Mistake(
            "21.0 is not 21",
            "Where no decimals were printed nothing fits: round(x, 0) is a float, and its text ends in .0. "
            'An f-string with ".0f" writes no point.',
            fitting(lambda count, published: str(round(count, decimals(published))) == published),
        ),
        Mistake(
            "within a whole digit",
            "Counts within a whole unit of the last digit were let through. Rounding moves by half of one at "
            "most.",
            fitting(lambda count, published: abs(count - float(published)) < 10 ** -decimals(published)),
        ),
        Mistake(
            "within 5 %",
            "Counts within 5 % were let through. What fits is said by the digits.",
            fitting(lambda count, published: abs(count / float(published) - 1) < 0.05),
        ),
        Mistake(
            "all parameters",
            "All parameters were counted also where those were asked for that a token passes through.",
            fitting(of=lambda cfg, activated: accounting.parameters(cfg)),
        ),
        Mistake(
            "activated always",
            "Activated parameters were counted also where all were asked for.",
            fitting(of=lambda cfg, activated: accounting.parameters(cfg, True)),
        ),
        Mistake(
            "all and activated exchanged",
            "Where activated parameters were asked for all were counted, and the other way round.",
            fitting(of=lambda cfg, activated: accounting.parameters(cfg, not activated)),
        ),
        Mistake(
            "binary billions",
            "A billion was taken to be 2^30. It is 10^9; the other is for memory, and not always there.",
            fitting(unit=2**30),
        ),
        Mistake(
            "those that do not fit",
            "These are the conventions that do not fit.",
            fitting(answer=lambda counts, names: [name for name in counts if name not in names]),
        ),
        Mistake(
            "the first only",
            "The search ended at the first convention that fits. There may be several.",
            fitting(answer=lambda counts, names: names[:1]),
        ),
        Mistake(
            "the nearest",
            "This is the convention that comes nearest. It need not fit, and it need not be the only one.",
            nearest,
        ),
        Mistake(
            "counts instead of names",
            "These are the counts that fit. Asked for are the names of their conventions.",
            fitting(answer=lambda counts, names: [counts[name] for name in names]),
        ),
        Mistake(
            "yes or no",
            "This says whether any convention fits. Asked for is which ones.",
            fitting(answer=lambda counts, names: bool(names)),
        ),
    ),
    hints=(
        'Which counts would be printed as "21"? Which as "21.0"? What in the printed text tells the two '
        "apart?",
        'published.partition(".")[2] is what stands after the point; an f-string rounds: f"{x:.2f}". The '
        'notebook counts under "236B and 21B".',
        "decimals = number of digits after the point\n"
        "for each name and count of parameters(cfg, activated).conventions():\n"
        "    keep the name if count / 1e9, written with so many decimals, is the printed text",
    ),
    checked="all and activated parameters of three models; no, one, several and all conventions fit",
)

# ------------------------------------------------------------------------------------- 13.3 a training's bill


def bill_with(**other: Callable[[tuple, tuple, float, float, float], float]) -> Callable[..., dict]:
    """An answer to 13.3: by entry, what is computed instead, from (hours, flops, rate, trillions, price)."""
    right: dict[str, Callable[[tuple, tuple, float, float, float], float]] = {
        "hours_saved": lambda h, f, rate, t, p: 1 - h[1] / h[0],
        "hours_by_FLOPs_alone": lambda h, f, rate, t, p: h[0] * f[1] / f[0],
        "share_of_the_rate": lambda h, f, rate, t, p: f[1] * 1e12 / (h[1] * 3600 * rate),
        "whole_run": lambda h, f, rate, t, p: h[1] * t,
        "cost": lambda h, f, rate, t, p: h[1] * t * p,
    }

    def answer(hours: tuple, flops: tuple, rate: float, trillions: float, price: float) -> dict:
        entries = {**right, **other}
        return {
            name.replace("_", " "): entry(hours, flops, rate, trillions, price)
            for name, entry in entries.items()
        }

    return answer


def runs_the_other_way(hours: tuple, flops: tuple, rate: float, trillions: float, price: float) -> dict:
    return bill_with()(hours[::-1], flops[::-1], rate, trillions, price)


TRAINING_BILL = Exercise(
    number="13.3",
    name="training_bill",
    title="the bill of a training run",
    difficulty=2,
    minutes=12,
    answer=bill_with(),
    cases=(
        Case(
            "DeepSeek 67B and DeepSeek-V2, 8.1T tokens, 2 an hour",
            lambda: {
                "hours": (300_600.0, 172_800.0),
                "flops": (418.6e9, 155.3e9),
                "rate": 989.4e12,
                "trillions": 8.1,
                "price": 2.0,
            },
        ),
        Case(
            "a model that takes more hours than the other, 0.3T tokens, 3.5 an hour",
            lambda: {
                "hours": (40_000.0, 70_000.0),
                "flops": (20e9, 31e9),
                "rate": 312e12,
                "trillions": 0.3,
                "price": 3.5,
            },
        ),
    ),
    mistakes=(
        Mistake(
            "models exchanged",
            "The two models changed places. The first of each pair is the other model, with which this one "
            "is compared.",
            runs_the_other_way,
        ),
        Mistake(
            "hours left",
            '"hours saved" is the share of the hours that is left. Asked for is the share that is saved.',
            bill_with(hours_saved=lambda h, f, rate, t, p: h[1] / h[0]),
        ),
        Mistake(
            "saved against its own hours",
            "\"hours saved\" was divided by this model's own hours. The share is one of the other's.",
            bill_with(hours_saved=lambda h, f, rate, t, p: h[0] / h[1] - 1),
        ),
        Mistake(
            "saved in percent",
            '"hours saved" is in percent. Asked for is a share.',
            bill_with(hours_saved=lambda h, f, rate, t, p: 100 * (1 - h[1] / h[0])),
        ),
        Mistake(
            "a number of hours",
            '"hours saved" is a number of hours. Asked for is a share of the other\'s.',
            bill_with(hours_saved=lambda h, f, rate, t, p: h[0] - h[1]),
        ),
        Mistake(
            "FLOPs saved",
            '"hours saved" was taken from the FLOPs. Hours were measured, and are what is asked for.',
            bill_with(hours_saved=lambda h, f, rate, t, p: 1 - f[1] / f[0]),
        ),
        Mistake(
            "FLOPs the wrong way round",
            "\"hours by FLOPs alone\" was scaled by the other's FLOPs over this model's: fewer FLOPs would "
            "then take longer.",
            bill_with(hours_by_FLOPs_alone=lambda h, f, rate, t, p: h[0] * f[0] / f[1]),
        ),
        Mistake(
            "from this model's hours",
            "\"hours by FLOPs alone\" starts from this model's hours. It is a forecast from the other's.",
            bill_with(hours_by_FLOPs_alone=lambda h, f, rate, t, p: h[1] * f[1] / f[0]),
        ),
        Mistake(
            "at the full rate",
            '"hours by FLOPs alone" was taken at the GPU\'s full rate. It is asked for at the rate that the '
            "other model's training reached.",
            bill_with(hours_by_FLOPs_alone=lambda h, f, rate, t, p: f[1] * 1e12 / rate / 3600),
        ),
        Mistake(
            "hours taken for seconds",
            '"share of the rate" counts an hour as one second. The rate is for a second.',
            bill_with(share_of_the_rate=lambda h, f, rate, t, p: f[1] * 1e12 / (h[1] * rate)),
        ),
        Mistake(
            "an hour of 60 seconds",
            '"share of the rate" counts 60 seconds an hour.',
            bill_with(share_of_the_rate=lambda h, f, rate, t, p: f[1] * 1e12 / (h[1] * 60 * rate)),
        ),
        Mistake(
            "one token's FLOPs",
            '"share of the rate" holds the FLOPs of one token against the hours of a trillion.',
            bill_with(share_of_the_rate=lambda h, f, rate, t, p: f[1] / (h[1] * 3600 * rate)),
        ),
        Mistake(
            "all tokens in a trillion's hours",
            '"share of the rate" takes the FLOPs of all tokens, and the hours of a trillion.',
            bill_with(share_of_the_rate=lambda h, f, rate, t, p: f[1] * t * 1e12 / (h[1] * 3600 * rate)),
        ),
        Mistake(
            "backward counted again",
            '"share of the rate" multiplies by three. The FLOPs given are those of forward and backward '
            "together.",
            bill_with(share_of_the_rate=lambda h, f, rate, t, p: 3 * f[1] * 1e12 / (h[1] * 3600 * rate)),
        ),
        Mistake(
            "the other's share",
            '"share of the rate" is the other model\'s.',
            bill_with(share_of_the_rate=lambda h, f, rate, t, p: f[0] * 1e12 / (h[0] * 3600 * rate)),
        ),
        Mistake(
            "divided by the trillions",
            '"whole run" and "cost" were divided by the trillions of tokens. The hours are for one of them.',
            bill_with(
                whole_run=lambda h, f, rate, t, p: h[1] / t, cost=lambda h, f, rate, t, p: h[1] / t * p
            ),
        ),
        Mistake(
            "price of a trillion tokens",
            '"cost" is the price of a trillion tokens. Asked for is that of the whole run.',
            bill_with(cost=lambda h, f, rate, t, p: h[1] * p),
        ),
        Mistake(
            "price of the hours saved",
            '"cost" is the price of the hours that were saved. Asked for is that of the hours used.',
            bill_with(cost=lambda h, f, rate, t, p: (h[0] - h[1]) * t * p),
        ),
    ),
    hints=(
        "Hours are for a trillion tokens, FLOPs for one, the rate for a second. Which of the five entries "
        "mix them?",
        'The cells under "42.5 %" in the notebook compute all five for DeepSeek-V2.',
        "hours saved: 1 - mine / other's\n"
        "hours by FLOPs alone: other's hours * my FLOPs / other's FLOPs\n"
        "share of the rate: my FLOPs * 1e12 / (my hours * 3600 * rate)\n"
        "whole run: my hours * trillions; cost: that * price",
    ),
    checked="the paper's hours, and a model that takes more hours than the other",
    tolerance=1e-9,
)

# ------------------------------------------------------------------------------------ 13.4 how many texts fit


def batch_with(
    parameters: Callable[[DSV2Config], float] = lambda c: accounting.parameters(c).total,
    elements: Callable[[DSV2Config], float] = accounting.kv_elements_per_token,
    room: Callable[[Deployment], float] = lambda d: d.devices * d.device.memory * (1 - d.reserve),
    bits: Callable[[Deployment], tuple[float, float]] = lambda d: (d.weight_bits, d.cache_bits),
    tokens: Callable[[int], int] = lambda context: context,
    weights: Callable[[float, Deployment], float] = lambda size, d: size,
    free: Callable[[float, float, Deployment], float] = lambda room, weights, d: room - weights,
    whole: Callable[[float], float] = math.floor,
    least: int | None = 0,
) -> Callable[..., float]:
    """An answer to 13.4."""

    def answer(cfg: DSV2Config, context: int, deployment: Deployment) -> float:
        for_weights, for_cache = bits(deployment)
        size = weights(parameters(cfg) * for_weights / 8, deployment)
        one = tokens(context) * elements(cfg) * for_cache / 8
        count = whole(free(room(deployment), size, deployment) / one)
        return count if least is None else max(count, least)

    return answer


def gpu(memory: float, bandwidth: float = 3e12, flops: float = 7e14) -> Device:
    return Device("GPU", memory=memory, bandwidth=bandwidth, flops=flops, dtype="bfloat16", source="")


def serving(cfg: DSV2Config, context: int, deployment: Deployment) -> Callable[[], dict[str, Any]]:
    return lambda: {"cfg": cfg, "context": context, "deployment": deployment}


LARGEST_BATCH = Exercise(
    number="13.4",
    name="largest_batch",
    title="the largest batch that fits",
    difficulty=1,
    minutes=8,
    answer=economics.largest_batch,
    cases=(
        Case(
            "DeepSeek-V2 in FP8, 6-bit cache, 4,096 tokens, 8 GPUs of 80 GB, a tenth free",
            serving(V2, 4096, Deployment(gpu(80e9), 8, "fp8", "6 bits", 0.1)),
        ),
        Case(
            "DeepSeek 67B in bf16, FP8 cache, 3,000 tokens, 3 GPUs of 141 GB, 15 % free",
            serving(DENSE, 3000, Deployment(gpu(141e9), 3, "bf16", "fp8", 0.15)),
        ),
        Case(
            "V2-Lite in bf16, cache too, 20,000 tokens, one GPU of 80 GB, all of it used",
            serving(LITE, 20_000, Deployment(gpu(80e9), 1, "bf16", "bf16", 0.0)),
        ),
        Case(
            "V2-Lite in FP8, 6-bit cache, 1,500 tokens, 2 GPUs of 80 GB, 40 % free",
            serving(LITE, 1500, Deployment(gpu(80e9), 2, "fp8", "6 bits", 0.4)),
        ),
        Case(
            "DeepSeek-V2 in bf16 on 2 GPUs of 80 GB: too large",
            serving(V2, 512, Deployment(gpu(80e9), 2, "bf16", "bf16", 0.1)),
        ),
    ),
    mistakes=(
        Mistake(
            "nothing kept free",
            "All of the memory was filled. The share `reserve` of it stays free.",
            batch_with(room=lambda d: d.devices * d.device.memory),
        ),
        Mistake(
            "only the reserve used",
            "Only the reserve was filled. It is what stays free.",
            batch_with(room=lambda d: d.devices * d.device.memory * d.reserve),
        ),
        Mistake(
            "reserve of what the weights leave",
            "The reserve was taken from what the weights leave. It is a share of all memory.",
            batch_with(
                room=lambda d: d.devices * d.device.memory,
                free=lambda room, size, d: (room - size) * (1 - d.reserve),
            ),
        ),
        Mistake(
            "one device",
            "The memory of one device was filled. All devices count together.",
            batch_with(room=lambda d: d.device.memory * (1 - d.reserve)),
        ),
        Mistake(
            "reserve of one device",
            "The reserve of one device only was kept free. It is a share of the memory of all of them.",
            batch_with(room=lambda d: (d.devices - d.reserve) * d.device.memory),
        ),
        Mistake(
            "weights on every device",
            "Each device got all the weights. They lie in the memory of all devices once.",
            batch_with(weights=lambda size, d: size * d.devices),
        ),
        Mistake(
            "activated parameters",
            "Only the parameters of one token were stored. The next token may choose any expert, so all are "
            "needed.",
            batch_with(parameters=lambda c: accounting.parameters(c, activated=True).total),
        ),
        Mistake(
            "no weights",
            "The cache got all the room. The weights lie there too.",
            batch_with(weights=lambda size, d: 0.0),
        ),
        Mistake(
            "weights in the cache's format",
            "The weights were counted in the cache's bits. They have their own.",
            batch_with(bits=lambda d: (d.cache_bits, d.cache_bits)),
        ),
        Mistake(
            "cache in the weights' format",
            "The cache was counted in the weights' bits. It has its own.",
            batch_with(bits=lambda d: (d.weight_bits, d.weight_bits)),
        ),
        Mistake(
            "formats exchanged",
            "Weights and cache were counted in each other's bits.",
            batch_with(bits=lambda d: (d.cache_bits, d.weight_bits)),
        ),
        Mistake(
            "bits taken for bytes",
            "Bits were counted as bytes. A byte has 8.",
            batch_with(bits=lambda d: (8 * d.weight_bits, 8 * d.cache_bits)),
        ),
        Mistake(
            "one token a text",
            "This many tokens fit. Every text has `context` of them.",
            batch_with(tokens=lambda context: 1),
        ),
        Mistake(
            "cache of one layer",
            "The cache of one layer was counted. Every layer has its own.",
            batch_with(elements=lambda c: accounting.kv_elements_per_token(c) / c.num_hidden_layers),
        ),
        Mistake(
            "cache of all heads' keys and values",
            "For MLA, the expanded keys and values were counted. It caches latents.",
            batch_with(elements=lambda c: accounting.kv_elements_per_token(c, expanded=True)),
        ),
        Mistake(
            "rounded up",
            "The number was rounded up. The last text then does not fit.",
            batch_with(whole=math.ceil),
        ),
        Mistake(
            "a part of a text",
            "A part of a text was counted. Texts fit whole or not at all.",
            batch_with(whole=float),
        ),
        Mistake(
            "fewer than none",
            "Where the weights are too large, the number is below 0. No text fits then: 0.",
            batch_with(least=None),
        ),
        Mistake(
            "fewer than none, cut off",
            "Where the weights are too large, a number below 0 comes out of int(). No text fits then: 0.",
            batch_with(whole=int, least=None),
        ),
        Mistake(
            "one text at least",
            "Where the weights are too large, one text is let in. None fits.",
            batch_with(least=1),
        ),
    ),
    hints=(
        "Two things share the memory. Which of them grows with the batch, and which does not care how many "
        "texts there are?",
        "Bytes: parameters times bits over 8, elements times tokens times bits over 8. The notebook prints "
        'both under "5.76 times".',
        "room = devices * memory * (1 - reserve)\n"
        "weights = parameters * weight_bits / 8\n"
        "one text = context * elements * cache_bits / 8\n"
        "return (room - weights) / one text, rounded down, at least 0",
    ),
    checked="MLA and GQA, one and several devices, with and without a reserve, weights that do not fit",
    replaces=("dsv2.economics.largest_batch",),
)

# -------------------------------------------------------------------------------------- 13.5 a decoding step

PHASES = ("attention", "cache", "networks", "head")


def step_with(
    chosen: Callable[[int, int, int], float] = lambda experts, k, batch: (
        experts * (1 - (1 - k / experts) ** batch)
    ),
    shared: Callable[[Parameters], float] = lambda parts: parts.shared_experts,
    norms: float = 1.0,
    router: float = 1.0,
    cached: Callable[[int, int, int], float] = lambda batch, context, elements: batch * context * elements,
    row: Callable[[int, DSV2Config, Parameters], float] = lambda batch, c, parts: batch * c.hidden_size,
    texts: Callable[[int], int] = lambda batch: batch,
    weights: Callable[[int], int] = lambda batch: 1,
    bits: Callable[[Deployment], tuple[float, float]] = lambda d: (d.weight_bits, d.cache_bits),
    unit: float = 8.0,
    rates: Callable[[Deployment], tuple[float, float]] = lambda d: (
        d.devices * d.device.bandwidth,
        d.devices * d.device.flops,
    ),
    join: Callable[[list[float], list[float]], float] = lambda read, done: sum(map(max, read, done)),
    result: Callable[[float, int], float] = lambda seconds, batch: seconds,
    expansion: float = 1.0,
    shared_work: float = 1.0,
) -> Callable[..., float]:
    """An answer to 13.5: join(seconds of reading, seconds of computing) over the four phases."""

    def answer(cfg: DSV2Config, context: int, batch: int, deployment: Deployment) -> float:
        parts, work = accounting.parameters(cfg), accounting.decode_flops(cfg, context)
        experts = 0.0
        if cfg.n_routed_experts:
            reached = chosen(cfg.n_routed_experts, cfg.num_experts_per_tok, batch)
            experts = parts.routed_experts * reached / cfg.n_routed_experts
        for_weights, for_cache = (size * weights(batch) for size in bits(deployment))
        for_cache /= weights(batch)
        elements = cached(batch, context, accounting.kv_elements_per_token(cfg))
        amounts = [
            (parts.attention + norms * parts.norms) * for_weights,
            elements * for_cache,
            (parts.dense_ffn + shared(parts) + router * parts.router + experts) * for_weights,
            (parts.head + row(batch, cfg, parts)) * for_weights,
        ]
        bandwidth, rate = rates(deployment)
        read = [amount / unit / bandwidth for amount in amounts]
        done = [texts(batch) * flops / rate for flops in work_of(work, expansion, shared_work)]
        return result(join(read, done), batch)

    return answer


def work_of(work: Flops, expansion: float = 1.0, shared: float = 1.0) -> tuple[float, float, float, float]:
    """The FLOPs of the four phases."""
    networks = work.dense_ffn + shared * work.shared_experts + work.router + work.routed_experts
    return (work.projections + expansion * work.expansion, work.scores_and_values, networks, work.head)


def decoding(
    cfg: DSV2Config, context: int, batch: int, deployment: Deployment
) -> Callable[[], dict[str, Any]]:
    return lambda: {"cfg": cfg, "context": context, "batch": batch, "deployment": deployment}


STEP_SECONDS = Exercise(
    number="13.5",
    name="step_seconds",
    title="the time of a decoding step",
    difficulty=3,
    minutes=20,
    answer=step_with(),
    cases=(
        Case(
            "V2-Lite, 1 text of 1,024 tokens, one GPU",
            decoding(LITE, 1024, 1, Deployment(gpu(80e9))),
        ),
        Case(
            "DeepSeek-V2 in FP8, 6-bit cache, 90 texts of 5,000 tokens, 8 GPUs",
            decoding(V2, 5000, 90, Deployment(gpu(80e9), 8, "fp8", "6 bits")),
        ),
        Case(
            "DeepSeek-V2 in FP8, cache in bf16, 3,000 texts of 700 tokens, 6 GPUs of another kind",
            decoding(V2, 700, 3000, Deployment(gpu(141e9, 4.8e12, 9e14), 6, "fp8", "bf16")),
        ),
        Case(
            "DeepSeek-V2 in FP8, 6-bit cache, 1 text of 120,000 tokens, 8 GPUs",
            decoding(V2, 120_000, 1, Deployment(gpu(80e9), 8, "fp8", "6 bits")),
        ),
        Case(
            "DeepSeek 67B in bf16, FP8 cache, 24 texts of 2,000 tokens, 4 GPUs",
            decoding(DENSE, 2000, 24, Deployment(gpu(80e9), 4, "bf16", "fp8")),
        ),
    ),
    mistakes=(
        Mistake(
            "all overlaps",
            "Reading and computing were added up over the whole step before the longer one was taken. One "
            "phase's reading cannot hide behind another's products: each waits for what the one before made.",
            step_with(join=lambda read, done: max(sum(read), sum(done))),
        ),
        Mistake(
            "nothing overlaps",
            "Reading and computing were added. Within a phase they overlap.",
            step_with(join=lambda read, done: sum(read) + sum(done)),
        ),
        Mistake(
            "the shorter one",
            "Of reading and computing the shorter one was taken. Both have to be done.",
            step_with(join=lambda read, done: sum(map(min, read, done))),
        ),
        Mistake(
            "reading alone",
            "The products are left out. With many texts a phase can wait for them.",
            step_with(join=lambda read, done: sum(read)),
        ),
        Mistake(
            "computing alone",
            "The reading is left out. With few texts it takes the time.",
            step_with(join=lambda read, done: sum(done)),
        ),
        Mistake(
            "the longest phase",
            "Only the longest phase counts here. They follow one another.",
            step_with(join=lambda read, done: max(map(max, read, done))),
        ),
        Mistake(
            "all experts read",
            "All routed experts were read. With few texts many are chosen by none.",
            step_with(chosen=lambda experts, k, batch: experts),
        ),
        Mistake(
            "one text's experts",
            "Only K experts were read. Other texts choose others.",
            step_with(chosen=lambda experts, k, batch: k),
        ),
        Mistake(
            "every text its own experts",
            "K experts were read for each text, as if no two texts chose the same one. That can be more than "
            "there are.",
            step_with(chosen=lambda experts, k, batch: k * batch),
        ),
        Mistake(
            "all experts after a few texts",
            "K experts were read for each text until all were, as if no two texts chose the same one before "
            "that.",
            step_with(chosen=lambda experts, k, batch: min(k * batch, experts)),
        ),
        Mistake(
            "K choices with repetition",
            "The K choices of a text were taken as independent, so that it may choose one expert twice. It "
            "chooses K different ones: 1 - K/E leaves an expert out.",
            step_with(chosen=lambda experts, k, batch: experts * (1 - (1 - 1 / experts) ** (k * batch))),
        ),
        Mistake(
            "experts that nobody chose",
            "The experts that no text chose were read, not the others.",
            step_with(chosen=lambda experts, k, batch: experts * (1 - k / experts) ** batch),
        ),
        Mistake(
            "shared experts forgotten",
            "The shared experts were not read. Every text passes through them.",
            step_with(shared=lambda parts: 0.0),
        ),
        Mistake(
            "shared experts' work forgotten",
            "The shared experts were read, but their products are left out of the third phase.",
            step_with(shared_work=0.0),
        ),
        Mistake(
            "norms forgotten",
            "The norms were not read. They are small, and they are in the table.",
            step_with(norms=0.0),
        ),
        Mistake(
            "router forgotten",
            "The router was not read. The third phase needs it to choose experts.",
            step_with(router=0.0),
        ),
        Mistake(
            "no row of the embedding",
            "No row of the embedding was read. Each text's newest token needs its own.",
            step_with(row=lambda batch, c, parts: 0.0),
        ),
        Mistake(
            "one row for all texts",
            "One row of the embedding was read for all texts. Each text needs its own.",
            step_with(row=lambda batch, c, parts: c.hidden_size),
        ),
        Mistake(
            "weights once for each text",
            "The weights were read for each text anew. A step reads them once for all.",
            step_with(weights=lambda batch: batch),
        ),
        Mistake(
            "work of one text",
            "The products of one text were counted. There are batch of them.",
            step_with(texts=lambda batch: 1),
        ),
        Mistake(
            "cache of one text",
            "One text's cache was read. Each text has its own.",
            step_with(cached=lambda batch, context, elements: context * elements),
        ),
        Mistake(
            "one cached token",
            "One token of each text's cache was read. All that came before are.",
            step_with(cached=lambda batch, context, elements: batch * elements),
        ),
        Mistake(
            "whole embedding read",
            "The whole embedding was read. Of it, a text needs one row.",
            step_with(row=lambda batch, c, parts: parts.embedding),
        ),
        Mistake(
            "one device",
            "One device did it all. They share bytes and FLOPs.",
            step_with(rates=lambda d: (d.device.bandwidth, d.device.flops)),
        ),
        Mistake(
            "cache in the weights' format",
            "The cache was read in the weights' bits. It has its own.",
            step_with(bits=lambda d: (d.weight_bits, d.weight_bits)),
        ),
        Mistake(
            "formats exchanged",
            "Weights and cache were read in each other's bits.",
            step_with(bits=lambda d: (d.cache_bits, d.weight_bits)),
        ),
        Mistake(
            "bits taken for bytes",
            "Bits were counted as bytes. A byte has 8.",
            step_with(unit=1.0),
        ),
        Mistake(
            "tokens a second",
            "These are tokens a second. Asked for are seconds of a step.",
            step_with(result=lambda seconds, batch: batch / seconds),
        ),
        Mistake(
            "seconds for each token",
            "The time was divided by the batch. Asked for is that of the whole step, in which every text "
            "gets its token.",
            step_with(result=lambda seconds, batch: seconds / batch),
        ),
        Mistake(
            "no expansion",
            "The expansion's products are left out of the first phase. In the absorbed form W^UK meets the "
            "query and W^UV the output.",
            step_with(expansion=0.0),
        ),
    ),
    hints=(
        "Which of the eight amounts in the table grow with the batch? Which grow with it until all experts "
        "are read?",
        'The cell under "A step in four phases" in the notebook prints bytes, FLOPs and times of each phase. '
        "Guard the experts with `if cfg.n_routed_experts`.",
        "read share of routed_experts: 1 - (1 - K/E)^batch\n"
        "for each phase: seconds reading = elements * bits / 8 / (devices * bandwidth)\n"
        "                seconds computing = batch * FLOPs / (devices * rate)\n"
        "return the sum of the larger one of both",
    ),
    checked="one text and thousands, MLA and GQA, formats, devices, phases that read or that compute",
    tolerance=1e-11,  # seconds: a row of the embedding takes about a nanosecond
)
# -------------------------------------------------------------------------------- 13.6 the cheapest batch


def priced(
    fast: Callable[[int, float, float], bool] = lambda batch, step, least: not 1 / step < least,
    speed: Callable[[int, float], float] = lambda batch, step: batch / step,
    hour: float = 3600.0,
    tokens: float = 1e6,
    paid: Callable[[float, int], float] = lambda price, devices: price * devices,
    better: Callable[[tuple, tuple], bool] = lambda new, old: new[1] < old[1],
    result: Callable[[tuple | None], Any] = lambda best: best,
    stop: bool = False,
) -> Callable[..., Any]:
    """An answer to 13.6."""

    def answer(
        seconds: Callable[[int], float], batches: Sequence[int], least: float, price: float, devices: int
    ) -> Any:
        best = None
        for batch in batches:
            step = seconds(batch)
            if fast(batch, step, least):
                new = (batch, tokens / speed(batch, step) / hour * paid(price, devices))
                if best is None or better(new, best):
                    best = new
            elif stop:
                break
        return result(best)

    return answer


def steps(table: Mapping[int, float]) -> Callable[[int], float]:
    return lambda batch: table[batch]


READERS = {1: 0.02, 8: 0.025, 32: 0.03125, 128: 0.0625, 160: 0.125, 512: 0.2}


def prices(
    batches: Sequence[int], least: float, price: float, devices: int, table: Mapping[int, float] = READERS
) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "seconds": steps(table),
        "batches": tuple(batches),
        "least": least,
        "price": price,
        "devices": devices,
    }


CHEAPEST_BATCH = Exercise(
    number="13.6",
    name="cheapest_batch",
    title="the cheapest batch",
    difficulty=2,
    minutes=10,
    answer=priced(),
    cases=(
        Case("batches of 1 to 512, 0.1 tokens a second", prices(READERS, 0.1, 2.0, 8)),
        Case(
            "batches of 1 to 512, 16 tokens a second, which 128 texts just get", prices(READERS, 16.0, 2.5, 3)
        ),
        Case("batches of 1 to 512, 7 tokens a second", prices(READERS, 7.0, 2.5, 3)),
        Case("batches of 512 to 1, 30 tokens a second", prices(sorted(READERS, reverse=True), 30.0, 1.5, 5)),
        Case("batches of 1 to 512, 60 tokens a second, more than any gives", prices(READERS, 60.0, 2.0, 4)),
        Case("batches of 1 to 512, 5,000 tokens a second", prices(READERS, 5000.0, 2.0, 4)),
        Case(
            "two batches equally cheap, the larger one first",
            prices((40, 20, 10), 1.0, 3.0, 2, {40: 0.1, 20: 0.05, 10: 0.04}),
        ),
    ),
    mistakes=(
        Mistake(
            "speed of all readers together",
            "The tokens of all texts together were held against what one reader wants. With a large batch "
            "that is enough for any wish, and every reader waits.",
            priced(fast=lambda batch, step, least: not batch / step < least),
        ),
        Mistake(
            "any speed will do",
            "No batch was left out for being too slow.",
            priced(fast=lambda batch, step, least: True),
        ),
        Mistake(
            "share of a reader divided again",
            "What a reader gets was divided by the batch. A step gives one token to every text.",
            priced(fast=lambda batch, step, least: not 1 / (step * batch) < least),
        ),
        Mistake(
            "fast ones left out",
            "The batches that are fast enough were left out, and the others kept.",
            priced(fast=lambda batch, step, least: 1 / step < least),
        ),
        Mistake(
            "ended at the first slow batch",
            "The search ended at the first batch that is too slow. A later one may be fast enough.",
            priced(stop=True),
        ),
        Mistake(
            "nothing comes back",
            "None came back everywhere, also where a batch is fast enough. Is there a return at the end?",
            priced(result=lambda best: None),
        ),
        Mistake(
            "faster than wanted",
            "A batch that gives just what is wanted was left out.",
            priced(fast=lambda batch, step, least: 1 / step > least),
        ),
        Mistake(
            "seconds held against a speed",
            "The seconds of a step were held against tokens a second.",
            priced(fast=lambda batch, step, least: not step < least),
        ),
        Mistake(
            "price of one reader's tokens",
            "A million tokens of one text were paid for by that text alone. The others of the batch get "
            "their tokens in the same time.",
            priced(speed=lambda batch, step: 1 / step),
        ),
        Mistake(
            "one device paid",
            "One device's hours were paid. All of them work.",
            priced(paid=lambda price, devices: price),
        ),
        Mistake(
            "divided by the devices",
            "The price was divided by the devices. Each of them costs it.",
            priced(paid=lambda price, devices: price / devices),
        ),
        Mistake(
            "an hour of 60 seconds",
            "Hours were counted as 60 seconds.",
            priced(hour=60.0),
        ),
        Mistake(
            "price per second",
            "Seconds were paid as if they were hours.",
            priced(hour=1.0),
        ),
        Mistake(
            "a thousand tokens",
            "This is the price of a thousand tokens. Asked for is that of a million.",
            priced(tokens=1e3),
        ),
        Mistake(
            "the dearest",
            "This is the dearest batch.",
            priced(better=lambda new, old: new[1] > old[1]),
        ),
        Mistake(
            "the largest",
            "This is the largest batch that is fast enough. A larger one need not be cheaper.",
            priced(better=lambda new, old: new[0] > old[0]),
        ),
        Mistake(
            "the first",
            "This is the first batch that is fast enough. A later one may be cheaper.",
            priced(better=lambda new, old: False),
        ),
        Mistake(
            "the last of equals",
            "Of two equally cheap batches the last was taken. Asked for is the first.",
            priced(better=lambda new, old: new[1] <= old[1]),
        ),
        Mistake(
            "the price only",
            "The batch is missing beside the price.",
            priced(result=lambda best: best and best[1]),
        ),
        Mistake(
            "the batch only",
            "The price is missing beside the batch.",
            priced(result=lambda best: best and best[0]),
        ),
    ),
    hints=(
        "Try steps of 0.1 s for a batch of 100, and readers who want 20 tokens a second. What does each of "
        "them get? What does the code hold against their wish?",
        "Two speeds matter: that of one text, for the reader, and that of all texts, for the price. In one "
        "step every text gets one token.",
        "skip the batch if 1 / step < least\n"
        "cost = price * devices * hours for 1e6 tokens at batch / step a second\n"
        "keep the first cheapest",
    ),
    checked="patient and impatient readers, a wish met exactly, one that nobody meets, prices that are equal",
    tolerance=1e-9,
    given="speed of all readers together",
)


EXERCISES = (
    CACHE_SAVING,
    CONVENTIONS_THAT_FIT,
    TRAINING_BILL,
    LARGEST_BATCH,
    STEP_SECONDS,
    CHEAPEST_BATCH,
)
