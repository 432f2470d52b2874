"""The published figures of DeepSeek-V2 recomputed, each with the convention under which it comes out.

    python -m dsv2.headlines

What is recomputed follows from configs (`data/configs`), from the papers' other numbers (`data/published`)
and from the formulas of `dsv2.accounting`; nothing is measured here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsv2 import accounting
from dsv2.config import DSV2Config
from dsv2.economics import cache_saving
from dsv2.published import Claim, Published, published_models, published_numbers

COUNTED = "without embedding and router"  # the convention that fits every activated count (chapter 09)
QUOTED = ("Switch", "base scores", "AlignBench")  # claims whose numbers only another table can be asked about
LARGE_MHA_WIDTH = 7168  # 60 layers of it make table 9's 860.2K; the paper does not give the dimensions


@dataclass(frozen=True)
class Headline:
    """A figure as it is published, and what comes out here.

    published: the digits as printed, such as "15.7"; unit: what follows them; value: recomputed, in the same
    unit; how: the convention or the formula; source: where the figure is printed. derived: it is not printed
    there, but follows from what is.
    """

    name: str
    published: str
    unit: str
    value: float
    how: str
    source: str
    derived: bool = False

    @property
    def recomputed(self) -> str:
        """The value, rounded to the digits that were published."""
        decimals = len(self.published.partition(".")[2])
        return f"{self.value:.{decimals}f}"

    @property
    def agrees(self) -> bool:
        return self.recomputed == self.published


def headlines(
    models: Mapping[str, DSV2Config] | None = None, numbers: Published | None = None
) -> list[Headline]:
    """Every published figure that can be recomputed.

    models: by name, as `published_models()` has them (None: those); numbers: the papers' tables (None:
    `published_numbers()`). Change either to see which figures a change would break.
    """
    models = published_models() if models is None else models
    numbers = published_numbers() if numbers is None else numbers
    return [
        *_parameter_counts(models, numbers),
        *_caches(models, numbers),
        *_ablation(models, numbers),
        *_training(numbers),
        *_throughput(numbers),
    ]


def headline_table(found: list[Headline]) -> str:
    """Name, published, recomputed and convention as aligned text, a figure a line."""
    rows = [("figure", "published", "here", "how")]
    for h in found:
        rows.append((h.name, f"{h.published} {h.unit}{' (derived)' * h.derived}", f"{h.value:.6g}", h.how))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)


def claim_report(
    name: str, models: Mapping[str, DSV2Config] | None = None, numbers: Published | None = None
) -> str:
    """One of `Published.claims` as text: claim, verdict, and each number as stated and as found elsewhere.

    Raises ValueError for a name that is not stored.
    """
    numbers = published_numbers() if numbers is None else numbers
    if name not in {claim.name for claim in numbers.claims}:
        raise ValueError(f"name={name!r} is not among {', '.join(claim.name for claim in numbers.claims)}")
    claim, values = _claim(numbers, name), claim_values(models, numbers)[name]
    lines = [
        f"claim:   {claim.claim}",
        f"verdict: {claim.verdict}. {claim.found}",
        f"source:  {claim.source}",
    ]
    for key, stated in claim.numbers.items():
        where = "in its table" if name in QUOTED else "recomputed"
        found = f"{where}: {values[key]:.6g}" if key in values else "not recomputed"
        lines.append(f"  {key.replace('_', ' '):32} {stated:>8.6g}   {found}")
    return "\n".join(lines)


def _parameter_counts(models: Mapping[str, DSV2Config], numbers: Published) -> list[Headline]:
    """Total and activated billions of the models of table 2, and of V2-Lite, as their rows state them."""
    found = []
    for row in numbers.base_scores:
        if row.model not in models or row.model == "LLaMA3 70B":  # 70.55 is published as 70, rounded down
            continue
        cfg = models[row.model]
        every, active = accounting.parameters(cfg), accounting.parameters(cfg, activated=True)
        found.append(
            Headline(
                f"{row.model}, all parameters", _digits(row.total_parameters_b), "B", every.total / 1e9,
                "everything counted", row.source,
            )
        )  # fmt: skip
        if row.activated_parameters_b != row.total_parameters_b:
            found.append(
                Headline(
                    f"{row.model}, activated", _digits(row.activated_parameters_b), "B",
                    active.conventions()[COUNTED] / 1e9, COUNTED, row.source,
                )
            )  # fmt: skip
    return found


def _caches(models: Mapping[str, DSV2Config], numbers: Published) -> list[Headline]:
    """93.3 % and what other conventions give, and GQA's groups at MLA's cache."""
    dense, v2 = models["DeepSeek 67B"], models["DeepSeek-V2"]
    paper = next(bar for bar in numbers.figure_1 if bar.quantity == "KV cache")
    return [
        Headline(
            "KV cache saved", _digits(paper.stated), "%", 100 * cache_saving(v2, dense, 6, 16),
            "6 bits an element, against DeepSeek 67B's 16", paper.source,
        ),
        Headline(
            "GQA groups at MLA's cache", "2.25", "groups", accounting.equivalent_gqa_heads(v2),
            "(d_c + d_h^R) / (2 d_h)", "arXiv 2405.04434, table 1",
        ),
    ]  # fmt: skip


def cache_savings(models: Mapping[str, DSV2Config] | None = None) -> dict[str, float]:
    """Per cent of DeepSeek 67B's cache that DeepSeek-V2's saves, by convention; the paper's 93.3 is one."""
    models = published_models() if models is None else models
    dense, v2 = models["DeepSeek 67B"], models["DeepSeek-V2"]
    mha = accounting.attention_twin(v2, "mha")
    return {
        "6-bit against 16-bit": 100 * cache_saving(v2, dense, 6, 16),
        "8-bit against 16-bit": 100 * cache_saving(v2, dense, 8, 16),
        "elements alone": 100 * cache_saving(v2, dense, 16, 16),
        "elements, against V2 with MHA": 100 * cache_saving(v2, mha, 16, 16),
    }


def _ablation(models: Mapping[str, DSV2Config], numbers: Published) -> list[Headline]:
    """Table 9's caches and sizes: V2-Lite's dimensions for the small models, V2's for the large MLA."""
    lite, v2 = models["DeepSeek-V2-Lite"], models["DeepSeek-V2"]
    rows = {(row.scale, row.attention): row for row in numbers.table_9}
    elements = {
        ("small", "MHA"): accounting.kv_elements_per_token(accounting.attention_twin(lite, "mha")),
        ("small", "MLA"): accounting.kv_elements_per_token(lite),
        ("large", "MHA"): 2 * LARGE_MHA_WIDTH * v2.num_hidden_layers,
        ("large", "MLA"): accounting.kv_elements_per_token(v2),
    }
    how = {
        ("small", "MHA"): "2 d_h n_h l with V2-Lite's dimensions",
        ("small", "MLA"): "(d_c + d_h^R) l with V2-Lite's dimensions",
        ("large", "MHA"): "2 x 7168 x 60: a guess, the dimensions are unpublished",
        ("large", "MLA"): "(d_c + d_h^R) l with V2's dimensions",
    }
    found = [
        Headline(
            f"table 9, {scale} {attention}, cache", _digits(rows[scale, attention].kv_elements_per_token_k),
            "K elements", count / 1e3, how[scale, attention], rows[scale, attention].source,
        )
        for (scale, attention), count in elements.items()
    ]  # fmt: skip
    for scale, printed in (("small", "14"), ("large", "4")):
        mha, mla = (rows[scale, kind].kv_elements_per_token_k for kind in ("MHA", "MLA"))
        found.append(
            Headline(
                f"table 9, {scale}: MLA's share", printed, "%", 100 * mla / mha, "of the row with MHA's",
                rows[scale, "MLA"].source,
            )
        )  # fmt: skip
    for kind, cfg in (("MHA", accounting.attention_twin(lite, "mha")), ("MLA", lite)):
        row, active = rows["small", kind], accounting.parameters(cfg, activated=True)
        found += [
            Headline(
                f"table 9, small {kind}, all parameters", _digits(row.total_parameters_b), "B",
                accounting.parameters(cfg).total / 1e9, "V2-Lite's, everything counted", row.source,
            ),
            Headline(
                f"table 9, small {kind}, activated", _digits(row.activated_parameters_b), "B",
                active.conventions()[COUNTED] / 1e9, f"V2-Lite's, {COUNTED}", row.source,
            ),
        ]  # fmt: skip
    return found


def _training(numbers: Published) -> list[Headline]:
    """42.5 % and the hours behind it, the tokens of the long-context stage, DeepSeek-V3's price."""
    dense, v2 = numbers.run("DeepSeek 67B"), numbers.run("DeepSeek-V2")
    longer = numbers.run("DeepSeek-V2", "long context")
    paper = next(bar for bar in numbers.figure_1 if bar.quantity == "training cost")
    price = _claim(numbers, "price")
    ratio = v2.h800_hours_k_per_t_tokens / dense.h800_hours_k_per_t_tokens
    return [
        Headline(
            "training cost saved", _digits(paper.stated), "%", 100 * (1 - ratio),
            "172.8K against 300.6K GPU hours per trillion tokens", paper.source,
        ),
        Headline(
            "DeepSeek-V2's pre-training", f"{price.numbers['v2_h800_hours_m']:.2f}", "M GPU hours",
            v2.h800_hours_k_per_t_tokens * v2.tokens_b / 1e6, "hours per trillion tokens x 8.1 trillion",
            price.source, True,
        ),
        Headline(
            "least steps of pre-training", "214.6", "K steps",
            1e6 * v2.tokens_b / (v2.batch_sequences * v2.sequence_tokens), "all at the full batch",
            v2.source, True,
        ),
        Headline(
            "tokens of the long-context stage", "18.9", "B",
            longer.steps * longer.batch_sequences * longer.sequence_tokens / 1e9,
            "steps x sequences x tokens", longer.source, True,
        ),
        Headline(
            "DeepSeek-V3's training", _digits(price.numbers["v3_usd_m"]), "M dollars",
            price.numbers["v3_h800_hours_m"] * price.numbers["usd_per_hour"], "GPU hours x 2 dollars",
            price.source,
        ),
    ]  # fmt: skip


def _throughput(numbers: Published) -> list[Headline]:
    paper = next(bar for bar in numbers.figure_1 if bar.quantity == "generation throughput")
    how = "figure 1's two bars, themselves measured by the authors"
    return [
        Headline(
            "generation throughput", _digits(paper.stated), "x", paper.v2 / paper.dense_67b, how, paper.source
        )
    ]


def claim_values(
    models: Mapping[str, DSV2Config] | None = None, numbers: Published | None = None
) -> dict[str, dict[str, float]]:
    """The numbers in `Published.claims` once more, from configs and from the other tables: by claim and name.

    What has no second place to come from (DeepSeek-V3's hours and their price) is left out.
    """
    models = published_models() if models is None else models
    numbers = published_numbers() if numbers is None else numbers
    v2, mixtral = models["DeepSeek-V2"], models["Mixtral 8x22B"]
    sparse = {row.model: row for row in numbers.sparse_models}
    align = {row.model: row.score for row in numbers.chat if row.benchmark == "AlignBench"}
    run, price = numbers.run("DeepSeek-V2"), _claim(numbers, "price").numbers
    return {
        "routed experts": {
            "routed_experts": v2.n_routed_experts,
            "experts_per_token": v2.num_experts_per_tok,
            "shared_experts": v2.n_shared_experts,
        },
        "latent width": {
            "hidden_size": v2.hidden_size,
            "latent": v2.kv_lora_rank,
            "rotary_key": v2.qk_rope_head_dim,
            "cached": accounting.kv_elements_per_token(v2) / v2.num_hidden_layers,
        },
        "devices": {
            "routed_experts": v2.n_routed_experts,
            "devices": v2.n_group,
            "experts_per_device": v2.experts_per_device,
            "devices_per_token": v2.topk_group,
            "experts_per_token": v2.num_experts_per_tok,
        },
        "on the fly": {
            "expanded_macs_per_head_and_key": accounting.attention_macs(v2, "expanded"),
            "absorbed_macs_per_head_and_key": accounting.attention_macs(v2, "absorbed"),
        },
        "Switch": {
            "xxl_experts": sparse["Switch-XXL"].experts,
            "xxl_parameters_b": sparse["Switch-XXL"].total_parameters_b,
            "c_experts": sparse["Switch-C"].experts,
            "c_parameters_b": sparse["Switch-C"].total_parameters_b,
        },
        "Mixtral": {
            "claimed_parameters_b": mixtral.n_routed_experts * 22,
            "total_parameters_b": accounting.parameters(mixtral).total / 1e9,
            "activated_parameters_b": accounting.parameters(mixtral, activated=True).total / 1e9,
        },
        "price": {
            "v3_usd_m": price["v3_h800_hours_m"] * price["usd_per_hour"],
            "v2_h800_hours_m": run.h800_hours_k_per_t_tokens * run.tokens_b / 1e6,
        },
        "base scores": _claimed_scores({row.model: row.scores_percent for row in numbers.base_scores}),
        "AlignBench": {
            "v2_rl": align["DeepSeek-V2 Chat (RL)"],
            "gpt_4_1106_preview": align["GPT-4-1106-Preview"],
            "gpt_4_0613": align["GPT-4-0613"],
        },
    }


def _claimed_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """DeepSeek-V2's eight scores under lower-case names, and the four of others that the claim mentions."""
    found = {name.lower().replace("-", "_"): score for name, score in scores["DeepSeek-V2"].items()}
    for short, model in (("llama3", "LLaMA3 70B"), ("mixtral", "Mixtral 8x22B")):
        found.update({f"{name.lower()}_{short}": scores[model][name] for name in ("MMLU", "HumanEval")})
    return found


def _claim(numbers: Published, name: str) -> Claim:
    return next(claim for claim in numbers.claims if claim.name == name)


def training_compute(
    models: Mapping[str, DSV2Config] | None = None, numbers: Published | None = None
) -> dict[str, float]:
    """FLOPs of pre-training by model, where a config and a number of tokens are stored; smallest first.

    Forward and backward over sequences of the training's length, times the tokens
    (`accounting.training_flops_per_token`). What was recomputed to save memory is not counted.
    """
    models = published_models() if models is None else models
    numbers = published_numbers() if numbers is None else numbers
    found = {}
    for run in numbers.training:
        if run.phase == "pre-training" and run.model in models and run.tokens_b is not None:
            each = accounting.training_flops_per_token(models[run.model], run.sequence_tokens).total
            found[run.model] = each * run.tokens_b * 1e9
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _digits(value: float | int | None) -> str:
    """A stored number as it is printed: 236, 15.7, 93.3."""
    return f"{value:.10g}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.headlines",
        description="The published figures of DeepSeek-V2 recomputed, each with its convention.",
    )
    parser.parse_args(arguments)
    print(headline_table(headlines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
