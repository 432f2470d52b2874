"""Models alike but for their experts and router: which of them learns fastest.

Chapter 06's stored runs. All compute equally much for a token, but for "all experts", and all hold equally
many parameters, but for "one FFN" and the routers' own. Widths are in units of a fine-grained expert.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dsv2.bench import runs
from dsv2.bench.balance import MODEL, TRAINING
from dsv2.config import DSV2Config

ALPHA = 0.01  # of each router's own balance loss: Switch's value (arXiv 2101.03961, section 2.2)
# V2 multiplies its weights by 16 with 6 of 160 experts chosen: at equal affinities they then add up to 0.6.
WEIGHT_SUM = 16 * 6 / 160

# router, experts, units of width an expert, experts a token, shared experts, capacity factor in training
KINDS: dict[str, tuple[str, int, float, int, int, float | None]] = {
    "Switch": ("switch", 8, 4, 1, 0, 1.25),
    "GShard": ("gshard", 16, 2, 2, 0, 1.0),  # capacity 2 T / E (arXiv 2006.16668, algorithm 1)
    "GLaM": ("glam", 16, 2, 2, 0, 1.25),
    "Mixtral": ("mixtral", 16, 2, 2, 0, None),
    "top-4 of 32": ("deepseek", 32, 1, 4, 0, None),
    "3 of 31 + 1 shared": ("deepseek", 31, 1, 3, 1, None),
    "6 of 62 + 2 shared": ("deepseek", 62, 0.5, 6, 2, None),
    "all experts": ("dense", 8, 4, 8, 0, None),
}


def models(trunk: DSV2Config, unit: int) -> dict[str, DSV2Config]:
    """One model for each of KINDS, and "one FFN", which has no experts; `unit`: the width of one of 32."""
    trunk = trunk.replace(n_group=1, topk_group=1, topk_method="greedy", first_k_dense_replace=1)
    found = {
        "one FFN": trunk.replace(
            n_routed_experts=0, n_shared_experts=0, num_experts_per_tok=0, intermediate_size=4 * unit
        )
    }
    for name, (router, experts, units, chosen, shared, capacity) in KINDS.items():
        scaling = WEIGHT_SUM * experts / chosen if router == "deepseek" else 1.0
        found[name] = trunk.replace(
            router=router,
            intermediate_size=4 * unit,
            n_routed_experts=experts,
            n_shared_experts=shared,
            num_experts_per_tok=chosen,
            moe_intermediate_size=int(units * unit),
            routed_scaling_factor=scaling,
            capacity_factor=capacity,
            aux_loss_alpha=ALPHA,
            device_loss_alpha=0.0,
            communication_loss_alpha=0.0,
        )
    return found


LARGE = MODEL.replace(
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
)
STUDY = runs.Study("routers", "their experts and router", models(MODEL, 32), TRAINING)
LARGE_STUDY = runs.Study(
    "routers-large",
    STUDY.about,
    models(LARGE, 192),
    TRAINING.replace(steps=1000, batch_size=64, seq_len=256, lr=1e-3, dtype="bfloat16"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    return runs.main(STUDY, __doc__.split("\n\n")[0], arguments, large=LARGE_STUDY)


if __name__ == "__main__":
    sys.exit(main())
