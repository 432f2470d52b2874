"""dsv2: DeepSeek-V2, built to be understood.

The paper's symbols (arXiv 2405.04434) and the names in this package:

    paper       here                         what it is
    d, l        hidden_size, num_hidden_layers
    n_h         num_attention_heads
    d_h         qk_nope_head_dim, v_head_dim a head's width without the rotary part
    d_h^R       qk_rope_head_dim             the rotary part of queries and keys
    d_c         kv_lora_rank                 width of the latent
    d'_c        q_lora_rank                  width of the compressed query
    c^KV        latent                       what is cached, with k^R, instead of keys and values
    k^R         k_rope                       the rotary key that all heads share
    W^DKV, W^KR w_dkv                        one matrix, the latent's rows first
    W^UK, W^UV  w_uk, w_uv                   from the latent to every head's keys and values
    W^DQ        w_dq                         compresses the query
    W^UQ, W^QR  w_uq (w_q without q_lora)    per head the plain rows, then the rotary ones
    W^O         w_o
    u_t         x                            input of the feed-forward network, normalised
    e_i         router.weight[i]             centroid of expert i
    s_{i,t}     scores                       affinity of a token for an expert
    g_{i,t}     weights                      what an expert's output is multiplied by
    N_r, N_s    n_routed_experts, n_shared_experts
    K_r         num_experts_per_tok
    D, M        n_group, topk_group          devices, and how many of them a token may reach
    alpha_1,2,3 aux_loss_alpha, device_loss_alpha, communication_loss_alpha
"""

from __future__ import annotations

import importlib
import os

from dsv2.config import PRESETS, DSV2Config, LinearScaling, YarnScaling
from dsv2.generate import generate, stream
from dsv2.hf import load_pretrained, save_pretrained
from dsv2.model import DeepSeekV2, ModelOutput

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "DSV2Config",
    "DeepSeekV2",
    "LinearScaling",
    "ModelOutput",
    "YarnScaling",
    "__version__",
    "generate",
    "load_pretrained",
    "save_pretrained",
    "stream",
]

if "DSV2_IMPL" in os.environ:  # "mine": the learner's passed exercises in the place of the functions here
    importlib.import_module("dsv2.course.mine").use(os.environ["DSV2_IMPL"])
