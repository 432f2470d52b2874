"""Small models alike but for their balance losses: how experts are loaded over a run, and what it is worth.

Chapter 08's stored runs, `data/runs/balance.json`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dsv2.bench import runs
from dsv2.config import DSV2Config
from dsv2.train import TrainConfig

# alpha_1, alpha_2, alpha_3 of equations 23, 26 and 29; the paper's values are in its section 3.1.2.
CONDITIONS: dict[str, tuple[float, float, float]] = {
    "none": (0.0, 0.0, 0.0),
    "expert": (0.003, 0.0, 0.0),
    "device": (0.0, 0.05, 0.0),
    "communication": (0.0, 0.0, 0.02),
    "all three": (0.003, 0.05, 0.02),
}

# 32 experts on 8 devices of 4, of which a token gets 4 on at most 3 devices; the first layer is dense.
MODEL = DSV2Config.preset("tiny").replace(
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=32,
    n_shared_experts=1,
    num_experts_per_tok=4,
    moe_intermediate_size=32,
    n_group=8,
    topk_group=3,
)
TRAINING = TrainConfig(
    steps=500, batch_size=16, seq_len=128, lr=2e-3, validate_every=0, sample_every=0, save_every=0
)


def with_alphas(cfg: DSV2Config, alphas: Sequence[float]) -> DSV2Config:
    """`cfg` with the expert, device and communication loss at these alphas."""
    names = ("aux_loss_alpha", "device_loss_alpha", "communication_loss_alpha")
    return cfg.replace(**dict(zip(names, map(float, alphas), strict=True)))


STUDY = runs.Study(
    "balance",
    "the factors of the balance losses",
    {name: with_alphas(MODEL, alphas) for name, alphas in CONDITIONS.items()},
    TRAINING,
)


def main(arguments: Sequence[str] | None = None) -> int:
    return runs.main(STUDY, __doc__.split("\n\n")[0], arguments, alphas=CONDITIONS, model=MODEL.to_dict())


if __name__ == "__main__":
    sys.exit(main())
