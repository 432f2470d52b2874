"""Chapter 13: what DeepSeek-V2 costs, and which of its published numbers come out under which convention.

Six exercises: the cache that is saved, the conventions that fit a printed number, the bill of a training run,
the largest batch that fits, the time of a decoding step, and a price with a bug in it.

    python3 course.py check 13        all of this chapter
    python3 course.py check 13.1      one exercise
    python3 course.py hint 13.1       a hint; again, for a plainer one

`accounting` and `economics` below are the package's own modules: an exercise may call what its text names, so
that no exercise waits for another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dsv2 import accounting, economics
from dsv2.config import DSV2Config
from dsv2.economics import Deployment


# exercise 13.1
def cache_saving(cfg: DSV2Config, other: DSV2Config, form: Any = "6 bits", other_form: Any = "bf16") -> float:
    """By which share the cache of a token of `cfg` is smaller than that of `other`: 0.9 is a tenth left.

    Elements for each token (DeepSeek-V2, table 1):

        MLA              (d_c + d_h^R) l
        MHA, GQA, MQA    2 n d_h l,    n heads with keys and values

    An element takes economics.storage_bits(form) bits in `cfg`'s cache and economics.storage_bits(other_form)
    in the other's. Where cfg's cache is the larger one, the share is below 0.

    Fields of a config: attention ("mla" or another), kv_lora_rank (d_c), qk_rope_head_dim (d_h^R), kv_heads
    (n), baseline_head_dim (d_h of MHA, GQA, MQA), num_hidden_layers (l).

    DeepSeek-V2 keeps 34,560 elements of 6 bits, DeepSeek 67B 194,560 of 16:

    >>> from dsv2.published import published_models
    >>> models = published_models()
    >>> round(cache_saving(models["DeepSeek-V2"], models["DeepSeek 67B"]), 4)
    0.9334
    >>> round(cache_saving(models["DeepSeek-V2"], models["DeepSeek 67B"], "bf16", "bf16"), 4)
    0.8224
    """

    # <solution>
    def bits_per_token(model: DSV2Config, bits: float) -> float:
        if model.attention == "mla":
            width = model.kv_lora_rank + model.qk_rope_head_dim  # one of each for all heads
        else:
            width = 2 * model.kv_heads * model.baseline_head_dim
        return width * model.num_hidden_layers * bits

    ours = bits_per_token(cfg, economics.storage_bits(form))
    theirs = bits_per_token(other, economics.storage_bits(other_form))
    return 1 - ours / theirs
    # </solution>


# exercise 13.2
def conventions_that_fit(cfg: DSV2Config, published: str, activated: bool = True) -> list[str]:
    """The conventions under which a model has as many parameters as somebody printed.

    published: billions, in the digits that were printed, such as "2.4". A count fits if it gives these very
    digits when it is rounded to as many decimals.

    accounting.parameters(cfg, activated).conventions() is a dict of four counts by the name of the convention
    (chapter 09); activated: of the parameters that a token passes through, or else of all. Returned are the
    names that fit, in the order of that dict, none if none does.

    DeepSeek-V2's 21B activated parameters fit three of four, V2-Lite's 2.4B one:

    >>> conventions_that_fit(DSV2Config.preset("full"), "21")
    ['everything', 'without the embedding', 'without embedding and router']
    >>> conventions_that_fit(DSV2Config.preset("lite"), "2.4")
    ['without embedding and router']
    """
    # <solution>
    decimals = len(published.partition(".")[2])
    counts = accounting.parameters(cfg, activated).conventions()
    return [name for name, count in counts.items() if f"{count / 1e9:.{decimals}f}" == published]
    # </solution>


# exercise 13.3
def training_bill(
    hours: tuple[float, float], flops: tuple[float, float], rate: float, trillions: float, price: float
) -> dict[str, float]:
    """What a model's training took, beside another's. Pairs are (the other model, this model).

    hours: GPU hours for a trillion tokens. flops: FLOPs for one token, forward and backward. rate: FLOPs a
    second that a GPU does at most. trillions: this model's training tokens, in trillions. price: of a GPU
    hour. Returned are

        "hours saved"            the share of the other's hours that this model does without
        "hours by FLOPs alone"   this model's hours for a trillion tokens, had each hour done as many FLOPs as
                                 the other's hours did
        "share of the rate"      FLOPs that this model's hours did, of those they could have done at `rate`
        "whole run"              this model's hours for all its tokens
        "cost"                   the price of those

    DeepSeek 67B and DeepSeek-V2, on a GPU of 989.4 TFLOPs a second, at 2 (dollars, say) an hour:

    >>> bill = training_bill((300_600, 172_800), (418.6e9, 155.3e9), 989.4e12, trillions=8.1, price=2.0)
    >>> {name: round(value, 3) for name, value in bill.items() if value < 1}
    {'hours saved': 0.425, 'share of the rate': 0.252}
    >>> round(bill["hours by FLOPs alone"]), round(bill["whole run"]), round(bill["cost"])
    (111522, 1399680, 2799360)
    """
    # <solution>
    whole = hours[1] * trillions
    return {
        "hours saved": 1 - hours[1] / hours[0],
        "hours by FLOPs alone": hours[0] * flops[1] / flops[0],
        "share of the rate": flops[1] * 1e12 / (hours[1] * 3600 * rate),
        "whole run": whole,
        "cost": whole * price,
    }
    # </solution>


# exercise 13.4
def largest_batch(cfg: DSV2Config, context: int, deployment: Deployment) -> int:
    """How many texts of `context` tokens can be decoded at once: as many as fit beside the weights.

    The memory of deployment.devices devices of deployment.device.memory bytes each counts as one, and the
    share deployment.reserve of all of it stays free. In the rest lie the weights once, all of them, with
    deployment.weight_bits bits a parameter, and the texts' caches, with deployment.cache_bits bits an
    element. A text fits whole or not at all; where the weights alone are too large, no text fits: 0.

    accounting.parameters(cfg).total counts the parameters, accounting.kv_elements_per_token(cfg) the
    elements of the cache for each token, all layers together.

    DeepSeek-V2 in FP8 with a 6-bit cache on eight GPUs of 80 GB, of which a tenth stays free: 235.7 of 576 GB
    are weights, and a text of 4,096 tokens takes 0.106 GB.

    >>> from dsv2.published import Device
    >>> gpu = Device("GPU", memory=80e9, bandwidth=3e12, flops=7e14, dtype="bfloat16", source="")
    >>> largest_batch(DSV2Config.preset("full"), 4096, Deployment(gpu, 8, "fp8", "6 bits", reserve=0.1))
    3204
    """
    # <solution>
    room = deployment.devices * deployment.device.memory * (1 - deployment.reserve)
    weights = accounting.parameters(cfg).total * deployment.weight_bits / 8  # every expert may be chosen
    one_text = context * accounting.kv_elements_per_token(cfg) * deployment.cache_bits / 8
    return max(int((room - weights) // one_text), 0)
    # </solution>


# exercise 13.5
def step_seconds(cfg: DSV2Config, context: int, batch: int, deployment: Deployment) -> float:
    """The least time of a decoding step: one new token for each of `batch` texts of `context` cached tokens.

    Four phases follow one another. In each, reading and computing overlap: the longer one counts.

        phase                    reads, once a step            computes, for each text
        attention's matrices     attention, norms              projections, and expansion: MLA's
                                                               W^UK on queries, W^UV on outputs
        attention over cache     the texts' caches             scores_and_values
        networks and experts     dense_ffn, shared_experts,    dense_ffn, shared_experts,
                                 router, and the experts that  router, routed_experts
                                 were chosen
        head                     head, and for each text one   head
                                 row of the embedding

    parts = accounting.parameters(cfg) has the parameters by these names (parts.attention, ...), of the routed
    experts all; work = accounting.decode_flops(cfg, context) the FLOPs of one text. A row of the embedding
    has cfg.hidden_size numbers, a cached token accounting.kv_elements_per_token(cfg) elements. Parameters are
    read with deployment.weight_bits bits each, elements of the cache with deployment.cache_bits.

    Of E routed experts (cfg.n_routed_experts; 0 in a dense model), K (cfg.num_experts_per_tok) are chosen for
    each text, all equally often. An expert is chosen by none of the texts with probability (1 - K/E)^batch;
    the others are read.

    All deployment.devices devices together read devices * deployment.device.bandwidth bytes and compute
    devices * deployment.device.flops FLOPs a second.

    A batch of 1 on one GPU only waits for its reading; with 512 texts, some phases wait for the products.

    >>> from dsv2.published import Device
    >>> gpu = Device("GPU", memory=80e9, bandwidth=3e12, flops=7e14, dtype="bfloat16", source="")
    >>> lite = DSV2Config.preset("lite")
    >>> round(1e3 * step_seconds(lite, 1024, 1, Deployment(gpu)), 3)
    1.645
    >>> round(1e3 * step_seconds(lite, 1024, 512, Deployment(gpu)), 2)
    16.23
    """
    # <solution>
    parts, work = accounting.parameters(cfg), accounting.decode_flops(cfg, context)
    experts = 0.0
    if cfg.n_routed_experts:
        left_out = (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** batch
        experts = parts.routed_experts * (1 - left_out)
    networks = parts.dense_ffn + parts.shared_experts + parts.router + experts
    cache = batch * context * accounting.kv_elements_per_token(cfg)
    phases = (
        ((parts.attention + parts.norms) * deployment.weight_bits, work.projections + work.expansion),
        (cache * deployment.cache_bits, work.scores_and_values),
        (
            networks * deployment.weight_bits,
            work.dense_ffn + work.shared_experts + work.router + work.routed_experts,
        ),
        ((parts.head + batch * cfg.hidden_size) * deployment.weight_bits, work.head),
    )
    bandwidth = deployment.devices * deployment.device.bandwidth
    rate = deployment.devices * deployment.device.flops
    return sum(max(bits / 8 / bandwidth, batch * flops / rate) for bits, flops in phases)
    # </solution>


# exercise 13.6
def cheapest_batch(
    seconds: Callable[[int], float], batches: Sequence[int], least: float, price: float, devices: int
) -> tuple[int, float] | None:
    """The batch with the cheapest tokens among those fast enough for whoever reads along, and their price.

    seconds(batch): of a decoding step, in which each of the batch's texts gets one token. least: tokens a
    second that every single reader must get at least. price: of an hour of one device; all `devices` are
    paid for. Returned are the batch and the price of a million tokens, the first batch where two are equally
    cheap, or None if no batch is fast enough.

    This code runs, and where readers are patient it is right. One of its lines is wrong: find it.
    """
    # <solution>
    best = None
    for batch in batches:
        step = seconds(batch)
        if 1 / step < least:  # a reader gets one token a step, however many texts share it
            continue
        hours = 1e6 / (batch / step) / 3600
        cost = hours * price * devices
        if best is None or cost < best[1]:
            best = (batch, cost)
    return best
    # <given>
    #| best = None
    #| for batch in batches:
    #|     step = seconds(batch)
    #|     if batch / step < least:
    #|         continue
    #|     hours = 1e6 / (batch / step) / 3600
    #|     cost = hours * price * devices
    #|     if best is None or cost < best[1]:
    #|         best = (batch, cost)
    #| return best
    # </given>
    # </solution>
