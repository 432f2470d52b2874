"""Chapter 09: the whole model: a block, the loss, where 236 and 21 billion come from, and a checkpoint.

Six exercises: a block's forward pass, the loss of the next token, the parameters of one attention, of one
layer and of the whole model under four conventions, and reading a layer of a checkpoint, which has a bug.

    python3 course.py check 09        all of this chapter
    python3 course.py check 09.1      one exercise
    python3 course.py hint 09.1       a hint; again, for a plainer one
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv2.accounting import Parameters
from dsv2.attention import Span
from dsv2.config import DSV2Config
from dsv2.moe import DeepSeekMoE, Routing


# exercise 09.1: a block (difficulty 1 of 3, about 15 minutes)
# check: python3 course.py check 09.1     in a notebook: check("09.1")
# hint:  python3 course.py hint 09.1      in a notebook: hint("09.1")
def block_forward(
    self,
    x: Float[Tensor, "batch tokens hidden"],
    span: Span,
    attention_mask: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "batch tokens hidden"], Routing | None]:
    """One block: attention, then the feed-forward network, each on normed input and added to the stream.

        u = x + attention(norm(x), span)        out = u + FFN(norm(u))       (DeepSeek-V2, section 2)

    This is the `forward` of `dsv2.model.Block`: `self` is the block, with the parts `self.attention_norm`,
    `self.attention` (of two arguments: the input, and `span`, which says who may see whom and holds RoPE's
    angles), `self.ffn_norm` and `self.ffn`. The FFN is a dense one, of one argument, or a `DeepSeekMoE`; that
    takes the input and attention_mask (True at real tokens) and returns its output and a `Routing`. Returned
    are the block's output and the Routing, or None for a dense FFN.

    A toy of numbers: with a norm that halves and an attention that multiplies by 10, x = 2 gives u = 2 + 10;
    with a norm that turns the sign and an FFN that adds 1, out = 12 + (-12 + 1) = 1.

    >>> from types import SimpleNamespace
    >>> toy = SimpleNamespace(attention_norm=lambda x: x / 2, attention=lambda x, span: 10 * x)
    >>> toy.ffn_norm, toy.ffn = lambda x: -x, lambda x: x + 1
    >>> block_forward(toy, torch.tensor(2.0), span=None)
    (tensor(1.), None)
    """
    raise NotImplementedError("exercise 09.1: write this, then run: python3 course.py check 09.1")


# exercise 09.2: the loss of the next token (difficulty 2 of 3, about 15 minutes)
# check: python3 course.py check 09.2     in a notebook: check("09.2")
# hint:  python3 course.py hint 09.2      in a notebook: hint("09.2")
def next_token_loss(
    logits: Float[Tensor, "batch tokens vocab"],
    tokens: Int[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """How surprised the model is by the tokens that follow, in nats a token: the loss it is trained on.

        L = mean of -ln p(token t + 1),      p = softmax(logits at token t)

    The last token of a sequence has none that follows. mask: True at real tokens; padding may stand on either
    side. A prediction counts if it was made at a real token, and of a real token. The mean is over all that
    count, in the batch as a whole.

    After token 0 the model gives token 1 a probability of 0.75, after the first 1 it gives the next 1 a
    probability of 0.5: (-ln 0.75 - ln 0.5) / 2 = 0.4904.

    >>> logits = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]]).log()
    >>> next_token_loss(logits, torch.tensor([[0, 1, 1]]))
    tensor(0.4904)

    If the last of the three is padding, only -ln 0.75 is left.

    >>> next_token_loss(logits, torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, False]]))
    tensor(0.2877)
    """
    raise NotImplementedError("exercise 09.2: write this, then run: python3 course.py check 09.2")


# exercise 09.3: the parameters of an attention (difficulty 2 of 3, about 20 minutes)
# check: python3 course.py check 09.3     in a notebook: check("09.3")
# hint:  python3 course.py hint 09.3      in a notebook: hint("09.3")
def mla_parameters(cfg: DSV2Config) -> int:
    """The parameters of one layer's attention.

        W^DKV, W^KR    d_c + d_h^R rows from the hidden size: the latent, and one rotary key for all heads
        W^UK, W^UV     for each head, d_h rows of keys and d_h of values, from the latent
        W^O            from all heads' values back to the hidden size
        W^DQ           d'_c rows from the hidden size, and from those
        W^UQ, W^QR     for each head, d_h plain rows and d_h^R rotary ones      (DeepSeek-V2, equations 37-47)

    Without q_lora_rank (V2-Lite) there is no W^DQ, and W^UQ and W^QR start from the hidden size. There are no
    biases. Besides, c^KV and (if there is one) c^Q have a norm, with a gain for each of their numbers.

    Fields of cfg: hidden_size, num_attention_heads, q_lora_rank (d'_c, or None), kv_lora_rank (d_c),
    qk_nope_head_dim (d_h of keys), qk_rope_head_dim (d_h^R), v_head_dim (d_h of values).

    >>> mla_parameters(DSV2Config.preset("full"))
    149227520
    >>> mla_parameters(DSV2Config.preset("lite"))
    13763072
    """
    raise NotImplementedError("exercise 09.3: write this, then run: python3 course.py check 09.3")


# exercise 09.4: the parameters of a layer (difficulty 2 of 3, about 20 minutes)
# check: python3 course.py check 09.4     in a notebook: check("09.4")
# hint:  python3 course.py hint 09.4      in a notebook: hint("09.4")
def layer_parameters(cfg: DSV2Config, layer: int, activated: bool = False) -> Parameters:
    """The parameters of one layer by part, or those that a token passes through.

    Every layer has an attention and two norms of the hidden size. A feed-forward network has three matrices,
    gate, up and down, between the hidden size and its width. In a dense layer that width is
    cfg.intermediate_size. In a layer of experts (`cfg.is_moe_layer(layer)`) it is cfg.moe_intermediate_size;
    there are n_routed_experts of them, of which a token passes through num_experts_per_tok, and
    n_shared_experts that every token passes through; the router has a row of the hidden size for each routed
    expert, and compares a token with all of them.

    Returned: Parameters(attention=..., norms=..., dense_ffn=..., routed_experts=..., shared_experts=...,
    router=...), where what is left out is 0. `mla_parameters` is exercise 09.3.

    DeepSeek-V2's first layer is dense, the others hold 160 experts of 23,592,960 parameters each.

    >>> full = DSV2Config.preset("full")
    >>> layer_parameters(full, 0).dense_ffn
    188743680
    >>> layer_parameters(full, 1).routed_experts
    3774873600
    >>> layer_parameters(full, 1, activated=True).total
    338800640
    """
    raise NotImplementedError("exercise 09.4: write this, then run: python3 course.py check 09.4")


# exercise 09.5: the parameters of the whole model (difficulty 2 of 3, about 20 minutes)
# check: python3 course.py check 09.5     in a notebook: check("09.5")
# hint:  python3 course.py hint 09.5      in a notebook: hint("09.5")
def counted(cfg: DSV2Config, convention: str, activated: bool = False) -> int:
    """The parameters of the whole model under one of four conventions, in total or activated.

    Besides its layers the model has an embedding and a head of vocab_size rows of the hidden size each, and
    one more norm before the head. Where cfg.tie_word_embeddings, both are one matrix: it counts once, as the
    head, which is where the model multiplies by it, and the embedding is 0.

    convention: "everything"; "without the embedding", of which a token looks up one row only; "without
    embedding and router"; "without embedding and head". `layer_parameters` is exercise 09.4.

    >>> counted(DSV2Config.preset("full"), "everything")
    235741434880
    >>> counted(DSV2Config.preset("full"), "without the embedding", activated=True)
    20851512320
    >>> counted(DSV2Config.preset("lite"), "without embedding and router", activated=True)
    2448027136
    """
    raise NotImplementedError("exercise 09.5: write this, then run: python3 course.py check 09.5")


# exercise 09.6: a layer of a checkpoint (a bug hunt, difficulty 3 of 3, about 25 minutes)
# check: python3 course.py check 09.6     in a notebook: check("09.6")
# hint:  python3 course.py hint 09.6      in a notebook: hint("09.6")
def layer_from_hf(tensors: dict[str, Tensor], cfg: DSV2Config) -> dict[str, Tensor]:
    """One layer of a Hugging Face checkpoint under our names, as `Block.load_state_dict` takes it.

    tensors: by their names on disk, without "model.layers.N."; the notebook's table says what each one is.
    Three things are not just another name. A network's gate and up become one matrix, gate's rows first. All
    experts become one tensor for gate and up, and one for down, in the order of their numbers. And the rows
    of `kv_b_proj` belong to heads: of each head first the N rows of W^UK, then the V rows of W^UV.

    Returned, for a layer of experts with q_lora_rank: attention_norm.weight, attention.w_dq.weight,
    attention.q_norm.weight, attention.w_uq.weight, attention.w_dkv.weight (C + R, D),
    attention.kv_norm.weight, attention.w_uk (H, N, C), attention.w_uv (H, V, C), attention.w_o.weight,
    ffn_norm.weight, ffn.router.weight, ffn.experts.w_gate_up (E, 2 I, D), ffn.experts.w_down (E, D, I),
    ffn.shared.w_gate_up.weight, ffn.shared.w_down.weight.

    This code runs, every tensor has the shape that it should have, and the model that gets them talks
    nonsense. One of its steps is wrong: find it.
    """
    heads, nope = cfg.num_attention_heads, cfg.qk_nope_head_dim

    def gate_up(place: str) -> Tensor:
        return torch.cat((tensors[f"{place}.gate_proj.weight"], tensors[f"{place}.up_proj.weight"]))

    renamed = {
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        "self_attn.q_proj.weight": "attention.w_q.weight",
        "self_attn.q_a_proj.weight": "attention.w_dq.weight",
        "self_attn.q_a_layernorm.weight": "attention.q_norm.weight",
        "self_attn.q_b_proj.weight": "attention.w_uq.weight",
        "self_attn.kv_a_proj_with_mqa.weight": "attention.w_dkv.weight",
        "self_attn.kv_a_layernorm.weight": "attention.kv_norm.weight",
        "self_attn.o_proj.weight": "attention.w_o.weight",
        "mlp.gate.weight": "ffn.router.weight",
        "mlp.down_proj.weight": "ffn.w_down.weight",
        "mlp.shared_experts.down_proj.weight": "ffn.shared.w_down.weight",
    }
    ours = {new: tensors[old] for old, new in renamed.items() if old in tensors}
    keys, values = tensors["self_attn.kv_b_proj.weight"].split([heads * nope, heads * cfg.v_head_dim])
    ours["attention.w_uk"] = keys.unflatten(0, (heads, -1))
    ours["attention.w_uv"] = values.unflatten(0, (heads, -1))
    if "mlp.gate.weight" not in tensors:
        ours["ffn.w_gate_up.weight"] = gate_up("mlp")
        return ours
    experts = [f"mlp.experts.{e}" for e in range(cfg.n_routed_experts)]
    ours["ffn.experts.w_gate_up"] = torch.stack([gate_up(expert) for expert in experts])
    ours["ffn.experts.w_down"] = torch.stack([tensors[f"{expert}.down_proj.weight"] for expert in experts])
    if cfg.n_shared_experts:
        ours["ffn.shared.w_gate_up.weight"] = gate_up("mlp.shared_experts")
    return ours

# stub a70647: file 5256a8, 09.1 5b99ac, 09.2 307722, 09.3 15b224, 09.4 55d8ae, 09.5 854af5, 09.6 0cd5d4
