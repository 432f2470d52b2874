"""The exercises of chapter 09: cases, right answers, plausible mistakes, hints."""

# B batch   T tokens   D hidden_size   H heads   C kv_lora_rank   R qk_rope_head_dim   N qk_nope_head_dim
# V v_head_dim   E routed experts   K experts per token   I moe_intermediate_size

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2 import accounting
from dsv2.accounting import Parameters
from dsv2.attention import plan_span
from dsv2.config import DSV2Config
from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.hf import checkpoint_layout
from dsv2.model import Block
from dsv2.moe import DeepSeekMoE
from dsv2.rope import RotaryEmbedding

BASE = DSV2Config(  # every dimension different, also H V and D, H N and C
    vocab_size=61,
    hidden_size=26,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=38,
    q_lora_rank=14,
    kv_lora_rank=18,
    qk_nope_head_dim=10,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=12,
    n_shared_experts=2,
    num_experts_per_tok=5,
    moe_intermediate_size=11,
    topk_method="group_limited_greedy",
    n_group=3,
    topk_group=2,
)
LITE = BASE.replace(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1)

# ------------------------------------------------------------ 09.1 a block


def block_case(seed: int, cfg: DSV2Config, layer: int, sizes: tuple[int, int], real: tuple[int, ...] = ()):
    """A block with random weights; in training where there is padding, as its budget then depends on that."""
    batch, tokens = sizes
    generator = torch.Generator().manual_seed(seed)
    block = Block(cfg, layer).train(bool(real))
    with torch.no_grad():
        for parameter in block.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.4 * noise if parameter.dim() == 1 else noise / parameter.shape[-1] ** 0.5)
    mask = torch.arange(tokens) < torch.tensor(real)[:, None] if real else None
    span = plan_span(batch, tokens, torch.device("cpu"), None, mask)
    span.cos, span.sin = RotaryEmbedding(cfg.qk_rope_head_dim, cfg.rope_theta, None)(span.positions)
    x = torch.randn(batch, tokens, cfg.hidden_size, generator=generator)
    return {"self": block, "x": x, "span": span, "attention_mask": mask}


def seeded(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The block's output; which sequences are exempt from dropping is drawn, always alike."""
    torch.manual_seed(0)
    with torch.no_grad():
        return answer(**arguments)


def ffn(block: Block, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
    return block.ffn(x, mask) if isinstance(block.ffn, DeepSeekMoE) else (block.ffn(x), None)


def block_with(
    attend: Callable[..., Tensor] = lambda b, x, span: x + b.attention(b.attention_norm(x), span),
    feed: Callable[..., tuple[Tensor, Any]] = lambda b, x, u, mask: add(u, ffn(b, b.ffn_norm(u), mask)),
) -> Callable[..., Any]:
    """An answer to 09.1: attend gives u, feed what is returned; x is the block's input."""

    def answer(self, x, span, attention_mask=None):
        return feed(self, x, attend(self, x, span), attention_mask)

    return answer


def add(x: Tensor, out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return x + out[0], out[1]


def feed_first(self, x, span, attention_mask=None):
    u, routing = add(x, ffn(self, self.ffn_norm(x), attention_mask))
    return u + self.attention(self.attention_norm(u), span), routing


def norm_added(b: Block, x: Tensor, span: Any) -> Tensor:
    h = b.attention_norm(x)
    return h + b.attention(h, span)


def ffn_norm_added(b: Block, x: Tensor, u: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
    h = b.ffn_norm(u)
    return add(h, ffn(b, h, mask))


def post_norm(self, x, span, attention_mask=None):
    u = self.attention_norm(x + self.attention(x, span))
    out, routing = add(u, ffn(self, u, attention_mask))
    return self.ffn_norm(out), routing


def norms_of_outputs(self, x, span, attention_mask=None):
    u = x + self.attention_norm(self.attention(x, span))
    out, routing = ffn(self, u, attention_mask)
    return u + self.ffn_norm(out), routing


BLOCK_FORWARD = Exercise(
    number="09.1",
    name="block_forward",
    title="a block",
    difficulty=1,
    minutes=15,
    answer=Block.forward,
    run=seeded,
    cases=(
        Case("2 sequences of 7 tokens, a dense layer", lambda: block_case(1, BASE, 0, (2, 7))),
        Case("3 sequences of 5 tokens, 5 of 12 experts", lambda: block_case(2, BASE, 1, (3, 5))),
        Case(
            "3 sequences of 8 tokens, of which 8, 3 and 5 are real; experts with a budget, in training",
            lambda: block_case(3, BASE.replace(capacity_factor=1.0), 2, (3, 8), (8, 3, 5)),
        ),
    ),
    mistakes=(
        Mistake(
            "attention not added",
            "The attention's output replaces the stream. It is added to it: what came in must come out as "
            "well, or a hundred layers deep nothing is left of the token.",
            block_with(lambda b, x, span: b.attention(b.attention_norm(x), span)),
        ),
        Mistake(
            "FFN not added",
            "The FFN's output replaces the stream. It is added to it, as the attention's is.",
            block_with(feed=lambda b, x, u, mask: ffn(b, b.ffn_norm(u), mask)),
        ),
        Mistake(
            "nothing added",
            "Neither output is added to the stream: each part only hands its result on. There are two "
            "residual connections in a block.",
            block_with(
                lambda b, x, span: b.attention(b.attention_norm(x), span),
                lambda b, x, u, mask: ffn(b, b.ffn_norm(u), mask),
            ),
        ),
        Mistake(
            "added to the normed input",
            "The attention's output was added to its normed input. The norm belongs to the branch alone: it "
            "is added to x as it came in.",
            block_with(norm_added),
        ),
        Mistake(
            "FFN added to its normed input",
            "The FFN's output was added to its normed input. In the paper's equation 20 it looks like that, "
            "since the norm is not written there; the stream itself is never normed.",
            block_with(feed=ffn_norm_added),
        ),
        Mistake(
            "both added to normed inputs",
            "Both outputs were added to the normed inputs. The norms belong to the branches; the stream "
            "itself is never normed.",
            block_with(norm_added, ffn_norm_added),
        ),
        Mistake(
            "attention's norm left out",
            "The attention got the stream as it is. It grows from layer to layer, and the norm in front is "
            "what keeps the attention's input at one size.",
            block_with(lambda b, x, span: x + b.attention(x, span)),
        ),
        Mistake(
            "FFN's norm left out",
            "The FFN got the stream as it is, without `ffn_norm` in front.",
            block_with(feed=lambda b, x, u, mask: add(u, ffn(b, u, mask))),
        ),
        Mistake(
            "no norms",
            "Neither norm was used. In front of the attention and of the FFN stands one each.",
            block_with(
                lambda b, x, span: x + b.attention(x, span), lambda b, x, u, mask: add(u, ffn(b, u, mask))
            ),
        ),
        Mistake(
            "norms changed places",
            "The two norms have changed places: each has gains of its own.",
            block_with(
                lambda b, x, span: x + b.attention(b.ffn_norm(x), span),
                lambda b, x, u, mask: add(u, ffn(b, b.attention_norm(u), mask)),
            ),
        ),
        Mistake(
            "one norm twice",
            "`attention_norm` was used in front of the FFN too. It has a norm of its own, `ffn_norm`.",
            block_with(feed=lambda b, x, u, mask: add(u, ffn(b, b.attention_norm(u), mask))),
        ),
        Mistake(
            "post-norm",
            "The norms stand behind the additions, as in the first Transformer. Here they stand in front of "
            "the attention and of the FFN: pre-norm.",
            post_norm,
        ),
        Mistake(
            "outputs normed",
            "The outputs of attention and FFN were normed instead of their inputs.",
            norms_of_outputs,
        ),
        Mistake(
            "side by side",
            "The FFN got the block's input, beside the attention. It comes after it, and sees what the "
            "attention has brought.",
            block_with(feed=lambda b, x, u, mask: add(u, ffn(b, b.ffn_norm(x), mask))),
        ),
        Mistake(
            "attention lost",
            "The FFN's output was added to the block's input: what the attention added is lost on the way. "
            "It is added to the stream behind the attention.",
            block_with(feed=lambda b, x, u, mask: add(x, ffn(b, b.ffn_norm(u), mask))),
        ),
        Mistake(
            "input added twice",
            "The block's input was added once more at the end. It is in the stream already, since the "
            "attention's output was added to it.",
            block_with(feed=lambda b, x, u, mask: add(x + u, ffn(b, b.ffn_norm(u), mask))),
        ),
        Mistake(
            "FFN first",
            "The FFN came before the attention. In every block the attention is first.",
            feed_first,
        ),
        Mistake(
            "mask not handed on",
            "The experts were not told which tokens are padding, which then takes up room in their budget. A "
            "`DeepSeekMoE` takes the mask as its second argument.",
            block_with(feed=lambda b, x, u, mask: add(u, ffn(b, b.ffn_norm(u), None))),
        ),
        Mistake(
            "routing thrown away",
            "The output is right, and the Routing is missing for a layer of experts. The balance losses are "
            "made from it.",
            block_with(feed=lambda b, x, u, mask: (u + ffn(b, b.ffn_norm(u), mask)[0], None)),
        ),
        Mistake(
            "output alone",
            "The output came back alone. Returned are two things: the output and the Routing, or None for a "
            "dense FFN.",
            block_with(feed=lambda b, x, u, mask: u + ffn(b, b.ffn_norm(u), mask)[0]),
        ),
    ),
    hints=(
        "There are two additions in a block, and two norms. What goes through a norm, and what goes past it?",
        'The notebook\'s section "A block" does it for a dense layer. For one with experts, '
        "isinstance(self.ffn, DeepSeekMoE), the FFN takes the mask as well and returns two things.",
        "u = x + attention(attention_norm(x), span)\n"
        "if the FFN is a DeepSeekMoE: out, routing = ffn(ffn_norm(u), attention_mask)\n"
        "else: out = ffn(ffn_norm(u)), and routing is None\n"
        "result = u + out, routing",
    ),
    checked="both additions, each norm in its place, layers with experts and without, and the mask handed on",
    axes=(("sequence", "token", "channel"), ()),
    replaces=("dsv2.model.Block.forward",),
)


# ------------------------------------------------------------ 09.2 the loss


def loss_case(
    seed: int, sizes: tuple[int, int, int], real: tuple[tuple[int, int], ...] = ()
) -> dict[str, Any]:
    """real: for each sequence its first real token and the first behind the last; padding is token 0."""
    batch, tokens, vocab = sizes
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(vocab, (batch, tokens), generator=generator)
    made[:, 2] = 0  # token 0 is a word like others, where it is not padding
    mask = None
    if real:
        place, ends = torch.arange(tokens), torch.tensor(real)
        mask = (place >= ends[:, :1]) & (place < ends[:, 1:])
        made = made * mask
    logits = 2 * torch.randn(batch, tokens, vocab, generator=generator)
    return {"logits": logits, "tokens": made, "mask": mask}


def with_slope(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The loss, and its gradient with respect to the logits."""
    with torch.enable_grad():
        logits = arguments["logits"].clone().requires_grad_()
        loss = answer(**{**arguments, "logits": logits})
        slope = torch.zeros_like(logits)
        if not isinstance(loss, Tensor):
            return {"the loss": loss, "the gradient by the logits": slope}
        if loss.requires_grad:
            (found,) = torch.autograd.grad(loss.sum(), logits, allow_unused=True)
            slope = slope if found is None else found
    return {"the loss": loss.detach(), "the gradient by the logits": slope}


def both_real(mask: Tensor, tokens: Tensor) -> Tensor:
    return mask[:, :-1] & mask[:, 1:]


def surprise(
    each: Callable[[Tensor, Tensor], Tensor] = lambda logits, targets: F.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none"
    ),
    counts: Callable[[Tensor, Tensor], Tensor] = both_real,
    join: Callable[[Tensor, Tensor], Tensor] = lambda losses, counts: losses[counts].mean(),
) -> Callable[..., Tensor]:
    """An answer to 09.2: each token's loss, which of them count, and how they are joined."""

    def answer(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        losses = each(logits[:, :-1], tokens[:, 1:])
        if mask is None:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        return join(losses, counts(mask, tokens))

    return answer


def at_places(predict: slice, follow: slice) -> Callable[..., Tensor]:
    """The loss of `tokens[follow]` at the logits of `predict`, where both are real."""

    def answer(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        losses = F.cross_entropy(logits[:, predict].transpose(1, 2), tokens[:, follow], reduction="none")
        return losses.mean() if mask is None else losses[mask[:, predict] & mask[:, follow]].mean()

    return answer


def in_a_circle(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    losses = F.cross_entropy(logits.transpose(1, 2), tokens.roll(-1, dims=1), reduction="none")
    return losses.mean() if mask is None else losses[mask & mask.roll(-1, dims=1)].mean()


def right_loss(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    return surprise()(logits, tokens, mask)


def by_sequence(losses: Tensor, counts: Tensor) -> Tensor:
    return (losses * counts).sum(dim=1) / counts.sum(dim=1)


def log_p(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1).gather(-1, targets[..., None]).squeeze(-1)


NEXT_TOKEN_LOSS = Exercise(
    number="09.2",
    name="next_token_loss",
    title="the loss of the next token",
    difficulty=2,
    minutes=15,
    answer=right_loss,
    run=with_slope,
    cases=(
        Case("2 sequences of 7 tokens, 11 words", lambda: loss_case(4, (2, 7, 11))),
        Case(
            "3 sequences of 8 tokens, of which the first 8, 3 and 5 are real; 6 words",
            lambda: loss_case(5, (3, 8, 6), ((0, 8), (0, 3), (0, 5))),
        ),
        Case(
            "3 sequences of 9 tokens, padded on the left, with 9, 4 and 7 real ones; 10 words",
            lambda: loss_case(6, (3, 9, 10), ((0, 9), (5, 9), (2, 9))),
        ),
    ),
    mistakes=(
        Mistake(
            "not shifted",
            "Each token's logits were held against that token itself, which the model has just read. They "
            "are a prediction of the one that follows.",
            at_places(slice(None), slice(None)),
        ),
        Mistake(
            "shifted the wrong way",
            "Logits were held against the token before. They are a prediction of the one that follows.",
            at_places(slice(1, None), slice(None, -1)),
        ),
        Mistake(
            "two ahead",
            "The shift was made twice: logits are held against the token after the next.",
            at_places(slice(None, -2), slice(2, None)),
        ),
        Mistake(
            "round in a circle",
            "The last token's logits were held against the first one: rolling brings it round. Nothing "
            "follows the last token, so its prediction cannot count.",
            in_a_circle,
        ),
        Mistake(
            "padding counted",
            "Padding was counted like tokens. Where `mask` is False there is no token, neither to predict "
            "from nor to predict.",
            surprise(counts=lambda mask, tokens: torch.ones_like(mask[:, 1:])),
        ),
        Mistake(
            "padding as a target",
            "The mask was laid over the tokens that predict, not over those that are predicted. The last "
            "real token then counts for predicting padding.",
            surprise(counts=lambda mask, tokens: mask[:, :-1]),
        ),
        Mistake(
            "predicted from padding",
            "Only the tokens that are predicted were looked at. With padding on the left, the first real "
            "one is then predicted from padding, of which the logits mean nothing.",
            surprise(counts=lambda mask, tokens: mask[:, 1:]),
        ),
        Mistake(
            "token 0 taken for padding",
            "Every token with the number 0 was left out. Padding is where the mask is False; 0 is a word "
            "like others.",
            surprise(counts=lambda mask, tokens: both_real(mask, tokens) & (tokens[:, 1:] != 0)),
        ),
        Mistake(
            "zeros in the mean",
            "What does not count was set to 0 and then averaged with the rest. The more padding, the smaller "
            "the loss would be.",
            surprise(join=lambda losses, counts: (losses * counts).mean()),
        ),
        Mistake(
            "divided by all real tokens",
            "The sum was divided by one too many for each sequence: of n real tokens, n - 1 have one that "
            "follows.",
            surprise(
                join=lambda losses, counts: (losses * counts).sum() / (counts.sum() + len(counts)),
            ),
        ),
        Mistake(
            "mean of means",
            "Each sequence was averaged by itself, then their means. Tokens of short sequences then count "
            "more; the mean is over all tokens of the batch.",
            surprise(join=lambda losses, counts: by_sequence(losses, counts).mean()),
        ),
        Mistake(
            "one loss for each sequence",
            "These are the losses of the single sequences. Asked for is one number.",
            surprise(join=by_sequence),
        ),
        Mistake(
            "one loss for each token",
            "These are the losses of the single tokens. Asked for is one number, their mean.",
            surprise(join=lambda losses, counts: losses[counts]),
        ),
        Mistake(
            "summed",
            "The losses were added up. A larger batch would then make larger gradients; their mean is asked "
            "for.",
            surprise(join=lambda losses, counts: losses[counts].sum()),
        ),
        Mistake(
            "softmax twice",
            "A softmax was taken before one that is built in: cross_entropy expects logits. The "
            "probabilities become nearly equal, and no certainty can bring the loss near 0.",
            surprise(
                lambda logits, targets: F.cross_entropy(
                    logits.softmax(-1).transpose(1, 2), targets, reduction="none"
                )
            ),
        ),
        Mistake(
            "no softmax",
            "These are the logits themselves, with a minus. A logit says nothing before it is held against "
            "all others: that is what the softmax is for.",
            surprise(lambda logits, targets: -logits.gather(-1, targets[..., None]).squeeze(-1)),
        ),
        Mistake(
            "no logarithm",
            "This is minus the mean probability. The loss is minus the mean of its logarithm: a word held "
            "for impossible must cost without bound.",
            surprise(lambda logits, targets: -log_p(logits, targets).exp()),
        ),
        Mistake(
            "sign",
            "The sign is missing: the logarithm of a probability is below 0, and training would make this as "
            "small as it can.",
            surprise(lambda logits, targets: log_p(logits, targets)),
        ),
        Mistake(
            "in bits",
            "This is the loss in bits, from a logarithm to the base 2. Asked for are nats.",
            surprise(lambda logits, targets: -log_p(logits, targets) / torch.tensor(2.0).log()),
        ),
        Mistake(
            "perplexity",
            "This is the perplexity, e to the power of the loss.",
            surprise(join=lambda losses, counts: losses[counts].mean().exp()),
        ),
        Mistake(
            "softmax over the tokens",
            "The softmax was taken over the tokens of the sequence. It runs over the words of the "
            "vocabulary, the last axis.",
            surprise(
                lambda logits, targets: -logits.log_softmax(dim=1).gather(-1, targets[..., None]).squeeze(-1)
            ),
        ),
        Mistake(
            "no gradient",
            "The loss is right, and no gradient comes out of it: nothing would be learned.",
            lambda logits, tokens, mask=None: right_loss(logits.detach(), tokens, mask),
        ),
    ),
    hints=(
        "The model has read A B C D. How many predictions can be held against something, which ones, and "
        "against what? And if D is padding?",
        'The notebook\'s section "The loss" does it with a loop. Without one: logits[:, :-1] and tokens[:, '
        "1:] stand beside each other, and the mask has to be cut both ways too.",
        "log_p = log_softmax of logits[:, :-1] over the vocabulary         (batch, tokens - 1, vocab)\n"
        "each = -log_p at tokens[:, 1:]                                    (gather, last axis)\n"
        "counts = mask[:, :-1] and mask[:, 1:]; everything if there is no mask\n"
        "result = mean of each where counts",
    ),
    checked="the shift, padding on either side, the mean over what counts, and the gradient",
    axes={"the loss": (), "the gradient by the logits": ("sequence", "token", "word")},
)


# ------------------------------------------------------------ 09.3 one attention


def mla(
    *,
    q_rows: Callable[[DSV2Config], int] = lambda c: c.num_attention_heads * c.qk_head_dim,
    query: Callable[[DSV2Config, int], int] | None = None,
    compress: Callable[[DSV2Config], int] = lambda c: (c.kv_lora_rank + c.qk_rope_head_dim) * c.hidden_size,
    expand: Callable[[DSV2Config], int] = lambda c: (
        c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
    ),
    output: Callable[[DSV2Config], int] = lambda c: c.hidden_size * c.num_attention_heads * c.v_head_dim,
    norms: Callable[[DSV2Config], int] = lambda c: c.kv_lora_rank + (c.q_lora_rank or 0),
) -> Callable[[DSV2Config], int]:
    """An answer to 09.3: right but for what is given."""

    def compressed(cfg: DSV2Config, rows: int) -> int:
        if cfg.q_lora_rank is None:
            return rows * cfg.hidden_size
        return cfg.q_lora_rank * (cfg.hidden_size + rows)

    def answer(cfg: DSV2Config) -> int:
        asked = (query or compressed)(cfg, q_rows(cfg))
        return asked + compress(cfg) + expand(cfg) + output(cfg) + norms(cfg)

    return answer


def biases(cfg: DSV2Config) -> int:
    rows = cfg.num_attention_heads * (cfg.qk_head_dim + cfg.qk_nope_head_dim + cfg.v_head_dim)
    rows += cfg.kv_lora_rank + cfg.qk_rope_head_dim + cfg.hidden_size + (cfg.q_lora_rank or 0)
    return rows


MLA_PARAMETERS = Exercise(
    number="09.3",
    name="mla_parameters",
    title="the parameters of an attention",
    difficulty=2,
    minutes=20,
    answer=accounting.mla_parameters,
    cases=(
        Case("hidden size 26, 3 heads, q_lora_rank 14, kv_lora_rank 18", lambda: {"cfg": BASE}),
        Case("the same without q_lora_rank", lambda: {"cfg": LITE}),
        Case(
            "hidden size 40, 5 heads of 6 + 2 and 12, ranks 9 and 7",
            lambda: {
                "cfg": BASE.replace(
                    hidden_size=40,
                    num_attention_heads=5,
                    q_lora_rank=9,
                    kv_lora_rank=7,
                    qk_nope_head_dim=6,
                    qk_rope_head_dim=2,
                    v_head_dim=12,
                )
            },
        ),
    ),
    mistakes=(
        Mistake(
            "norms forgotten",
            "The norms on the latents are missing: one on c^KV and, where the query is compressed, one on "
            "c^Q, with a gain for each number.",
            mla(norms=lambda c: 0),
        ),
        Mistake(
            "norm of the query forgotten",
            "The norm on c^Q is missing. Where the query is compressed, it has a norm too.",
            mla(norms=lambda c: c.kv_lora_rank),
        ),
        Mistake(
            "norm of the latent forgotten",
            "The norm on c^KV is missing.",
            mla(norms=lambda c: c.q_lora_rank or 0),
        ),
        Mistake(
            "rotary key normed",
            "The norm was counted over the latent and the rotary key. It is on c^KV alone; k^R is not "
            "normed.",
            mla(norms=lambda c: c.kv_lora_rank + c.qk_rope_head_dim + (c.q_lora_rank or 0)),
        ),
        Mistake(
            "norms of the stream included",
            "The two norms of the residual stream were counted too. They belong to the layer, not to its "
            "attention.",
            mla(norms=lambda c: c.kv_lora_rank + (c.q_lora_rank or 0) + 2 * c.hidden_size),
        ),
        Mistake(
            "rotary key forgotten",
            "W^KR is missing: beside the latent, a rotary key of d_h^R numbers is made from the hidden "
            "state.",
            mla(compress=lambda c: c.kv_lora_rank * c.hidden_size),
        ),
        Mistake(
            "a rotary key for each head",
            "W^KR was counted for each head. All heads share one rotary key: that is why it is cheap to "
            "cache.",
            mla(
                compress=lambda c: (
                    (c.kv_lora_rank + c.num_attention_heads * c.qk_rope_head_dim) * c.hidden_size
                )
            ),
        ),
        Mistake(
            "rotary key from the latent",
            "W^KR was counted as if it started from the latent. The rotary key is made from the hidden "
            "state.",
            mla(compress=lambda c: c.kv_lora_rank * c.hidden_size + c.qk_rope_head_dim * c.kv_lora_rank),
        ),
        Mistake(
            "query not compressed",
            "The query's matrix starts from the hidden size although there is a q_lora_rank: there are two "
            "matrices then, hidden size to rank and rank to heads.",
            mla(query=lambda c, rows: rows * c.hidden_size),
        ),
        Mistake(
            "compressed and from the hidden size",
            "W^DQ was counted, but W^UQ and W^QR still start from the hidden size. They start from the "
            "compressed query.",
            mla(query=lambda c, rows: (rows + (c.q_lora_rank or 0)) * c.hidden_size),
        ),
        Mistake(
            "W^DQ forgotten",
            "W^DQ is missing, which compresses the query.",
            mla(query=lambda c, rows: rows * (c.q_lora_rank or c.hidden_size)),
        ),
        Mistake(
            "query without its rotary part",
            "W^QR is missing: for each head, the query has d_h^R rotary numbers beside the d_h plain ones.",
            mla(q_rows=lambda c: c.num_attention_heads * c.qk_nope_head_dim),
        ),
        Mistake(
            "one rotary query for all heads",
            "W^QR was counted once. The rotary key is shared by all heads; the rotary queries are not.",
            mla(q_rows=lambda c: c.num_attention_heads * c.qk_nope_head_dim + c.qk_rope_head_dim),
        ),
        Mistake(
            "rotary rows in W^UK",
            "W^UK was counted with rotary rows. The rotary key does not come from the latent.",
            mla(
                expand=lambda c: c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * c.kv_lora_rank,
            ),
        ),
        Mistake(
            "values as wide as keys",
            "W^UV was counted with the keys' width. Values have v_head_dim numbers a head.",
            mla(expand=lambda c: c.num_attention_heads * 2 * c.qk_nope_head_dim * c.kv_lora_rank),
        ),
        Mistake(
            "no values",
            "W^UV is missing: the latent gives each head's values as well as its keys.",
            mla(expand=lambda c: c.num_attention_heads * c.qk_nope_head_dim * c.kv_lora_rank),
        ),
        Mistake(
            "nothing expanded",
            "W^UK and W^UV are missing. In decoding they are moved elsewhere, but the model has them.",
            mla(expand=lambda c: 0),
        ),
        Mistake(
            "W^O square",
            "W^O was counted as hidden size times hidden size. It starts from all heads' values, H times "
            "v_head_dim, which need not be the hidden size: in DeepSeek-V2 it is 16,384 beside 5,120.",
            mla(output=lambda c: c.hidden_size**2),
        ),
        Mistake(
            "W^O of queries",
            "W^O was counted with the width of queries. What is put together are values, v_head_dim a head.",
            mla(output=lambda c: c.hidden_size * c.num_attention_heads * c.qk_head_dim),
        ),
        Mistake(
            "W^O forgotten", "W^O is missing, from all heads back to the stream.", mla(output=lambda c: 0)
        ),
        Mistake(
            "biases",
            "Every matrix was counted with a bias. DeepSeek-V2 has none.",
            lambda cfg: mla()(cfg) + biases(cfg),
        ),
        Mistake(
            "multi-head attention",
            "Keys and values were counted as in multi-head attention, from the hidden size. In MLA they come "
            "from the latent.",
            mla(
                compress=lambda c: c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * c.hidden_size,
                expand=lambda c: 0,
                norms=lambda c: c.q_lora_rank or 0,
            ),
        ),
    ),
    hints=(
        "Follow one token: which numbers are made from its hidden state, which from the latent, which from "
        "the compressed query? Every arrow between two of them is a matrix, of rows times columns.",
        'The notebook\'s section "One attention" prints the shape of every tensor in a layer: your sum has '
        "one term for each line.",
        "query:   D * Q + Q + Q * H * (N + R)   with q_lora_rank Q; else D * H * (N + R)\n"
        "latent:  D * (C + R) + C\n"
        "expand:  C * H * (N + V)\n"
        "output:  H * V * D",
    ),
    checked="every matrix and norm, with the query compressed and not, in sizes that all differ",
    replaces=("dsv2.accounting.mla_parameters",),
)


# ------------------------------------------------------------ 09.4 one layer


def layered(
    *,
    moe: Callable[[DSV2Config, int], bool] = lambda c, layer: c.is_moe_layer(layer),
    routed: Callable[[DSV2Config, bool], int] = lambda c, on: (
        c.num_experts_per_tok if on else c.n_routed_experts
    ),
    expert: Callable[[DSV2Config], int] = accounting.expert_parameters,
    dense: Callable[[DSV2Config], int] = lambda c: 3 * c.hidden_size * c.intermediate_size,
    everywhere: Mapping[str, Callable[[DSV2Config], int]] = {},
    of_experts: Mapping[str, Callable[[DSV2Config, bool], int]] = {},
) -> Callable[..., Parameters]:
    """An answer to 09.4: right but for what is given; `everywhere` and `of_experts` replace parts by name."""

    def answer(cfg: DSV2Config, layer: int, activated: bool = False) -> Parameters:
        parts = Parameters(attention=accounting.mla_parameters(cfg), norms=2 * cfg.hidden_size)
        parts = replace(parts, **{name: count(cfg) for name, count in everywhere.items()})
        if not moe(cfg, layer):
            return replace(parts, dense_ffn=dense(cfg))
        one = expert(cfg)
        parts = replace(
            parts,
            routed_experts=routed(cfg, activated) * one,
            shared_experts=cfg.n_shared_experts * one,
            router=cfg.n_routed_experts * cfg.hidden_size,
        )
        return replace(parts, **{name: count(cfg, activated) for name, count in of_experts.items()})

    return answer


def layer_case(says: str, cfg: DSV2Config, layer: int, activated: bool = False) -> Case:
    return Case(says, lambda: {"cfg": cfg, "layer": layer, "activated": activated})


THIRD = BASE.replace(num_hidden_layers=9, first_k_dense_replace=2, moe_layer_freq=3, n_shared_experts=3)

LAYER_PARAMETERS = Exercise(
    number="09.4",
    name="layer_parameters",
    title="the parameters of a layer",
    difficulty=2,
    minutes=20,
    answer=accounting.layer_parameters,
    cases=(
        layer_case("layer 0, dense", BASE, 0),
        layer_case("layer 1, 12 experts", BASE, 1),
        layer_case("layer 1, what a token passes through", BASE, 1, True),
        layer_case("layer 4 of a model with experts in every third layer", THIRD, 4, True),
        layer_case("layer 3 of the same, 3 shared experts", THIRD, 3),
        layer_case("layer 2 without shared experts, activated", LITE.replace(n_shared_experts=0), 2, True),
    ),
    mistakes=(
        Mistake(
            "two matrices",
            "A feed-forward network was counted with two matrices. SwiGLU has three: gate, up and down.",
            layered(
                expert=lambda c: 2 * c.hidden_size * c.moe_intermediate_size,
                dense=lambda c: 2 * c.hidden_size * c.intermediate_size,
            ),
        ),
        Mistake(
            "experts in every layer",
            "A dense layer was counted with experts. The first layers have one wide network in their place; "
            "cfg.is_moe_layer says which.",
            layered(moe=lambda c, layer: True),
        ),
        Mistake(
            "moe_layer_freq ignored",
            "Every layer behind the first dense ones was counted with experts. With cfg.moe_layer_freq only "
            "every n-th has them; cfg.is_moe_layer knows.",
            layered(moe=lambda c, layer: layer >= c.first_k_dense_replace),
        ),
        Mistake(
            "one dense layer too many",
            "The first layer with experts was counted as dense. Layers are counted from 0, so that "
            "first_k_dense_replace is the number of the first one that is not.",
            layered(moe=lambda c, layer: layer > c.first_k_dense_replace and c.is_moe_layer(layer)),
        ),
        Mistake(
            "dense everywhere",
            "A layer of experts was counted as dense.",
            layered(moe=lambda c, layer: False),
        ),
        Mistake(
            "all experts activated",
            "Activated, all routed experts were counted. A token passes through num_experts_per_tok of them.",
            layered(routed=lambda c, on: c.n_routed_experts),
        ),
        Mistake(
            "always activated",
            "Only num_experts_per_tok experts were counted, also in total.",
            layered(routed=lambda c, on: c.num_experts_per_tok),
        ),
        Mistake(
            "shared experts among the K",
            "The shared experts were taken off num_experts_per_tok. A token passes through K routed experts "
            "and through the shared ones besides: 6 and 2 in DeepSeek-V2.",
            layered(
                routed=lambda c, on: c.num_experts_per_tok - c.n_shared_experts if on else c.n_routed_experts
            ),
        ),
        Mistake(
            "shared experts among the routed",
            "The shared experts were taken off n_routed_experts. They are extra: 160 and 2 in DeepSeek-V2.",
            layered(
                routed=lambda c, on: c.num_experts_per_tok if on else c.n_routed_experts - c.n_shared_experts
            ),
        ),
        Mistake(
            "the devices' experts",
            "Activated, the experts of all devices that a token may reach were counted. It passes through "
            "num_experts_per_tok of them.",
            layered(routed=lambda c, on: c.topk_group * c.experts_per_device if on else c.n_routed_experts),
        ),
        Mistake(
            "shared experts left out when activated",
            "Activated, the shared experts are missing. Every token passes through them.",
            layered(
                of_experts={
                    "shared_experts": lambda c, on: (
                        0 if on else c.n_shared_experts * accounting.expert_parameters(c)
                    )
                }
            ),
        ),
        Mistake(
            "one shared expert",
            "One shared expert was counted. There are n_shared_experts of them; they are stored as one "
            "network of their joint width.",
            layered(of_experts={"shared_experts": lambda c, on: accounting.expert_parameters(c)}),
        ),
        Mistake(
            "no shared experts",
            "The shared experts are missing.",
            layered(of_experts={"shared_experts": lambda c, on: 0}),
        ),
        Mistake(
            "shared experts as wide as the dense FFN",
            "The shared experts were counted with intermediate_size, the width of the dense layer.",
            layered(
                of_experts={
                    "shared_experts": lambda c, on: (
                        c.n_shared_experts * 3 * c.hidden_size * c.intermediate_size
                    )
                }
            ),
        ),
        Mistake(
            "experts as wide as the dense FFN",
            "Experts were counted with intermediate_size, the width of the dense layer. Theirs is "
            "moe_intermediate_size.",
            layered(expert=lambda c: 3 * c.hidden_size * c.intermediate_size),
        ),
        Mistake(
            "dense FFN as wide as an expert",
            "The dense network was counted with moe_intermediate_size, the width of an expert.",
            layered(dense=lambda c: 3 * c.hidden_size * c.moe_intermediate_size),
        ),
        Mistake("no router", "The router is missing.", layered(of_experts={"router": lambda c, on: 0})),
        Mistake(
            "router of the chosen",
            "Activated, the router was counted with K rows. To choose K experts, a token is compared with "
            "all.",
            layered(
                of_experts={
                    "router": lambda c, on: (
                        (c.num_experts_per_tok if on else c.n_routed_experts) * c.hidden_size
                    )
                }
            ),
        ),
        Mistake(
            "router with shared experts",
            "The router was counted with rows for the shared experts. Nobody chooses those.",
            layered(
                of_experts={"router": lambda c, on: (c.n_routed_experts + c.n_shared_experts) * c.hidden_size}
            ),
        ),
        Mistake(
            "norms left out",
            "The layer's norms are missing: one in front of the attention, one in front of the FFN.",
            layered(everywhere={"norms": lambda c: 0}),
        ),
        Mistake(
            "one norm",
            "One norm was counted. A layer has two, in front of the attention and of the FFN.",
            layered(everywhere={"norms": lambda c: c.hidden_size}),
        ),
        Mistake(
            "latents' norms once more",
            "The norms on the latents were counted here too. They are in the attention's number already.",
            layered(
                everywhere={"norms": lambda c: 2 * c.hidden_size + c.kv_lora_rank + (c.q_lora_rank or 0)}
            ),
        ),
        Mistake(
            "no attention",
            "The attention is missing.",
            layered(everywhere={"attention": lambda c: 0}),
        ),
    ),
    hints=(
        "A token arrives at layer 7 of DeepSeek-V2. Which matrices does it meet, whichever experts it "
        "chooses? Which others does the layer hold?",
        'The notebook\'s section "Layer by layer" prints both columns for two layers. Begin with what all '
        "layers have, then ask cfg.is_moe_layer(layer).",
        "attention = mla_parameters(cfg), norms = 2 D\n"
        "dense layer: dense_ffn = 3 D * intermediate_size\n"
        "layer of experts, with expert = 3 D * moe_intermediate_size:\n"
        "    routed_experts = (K if activated else E) * expert\n"
        "    shared_experts = n_shared_experts * expert\n"
        "    router = E * D",
    ),
    checked="dense layers and layers of experts, in total and activated, whatever the first dense layers "
    "and the distance between layers of experts",
    replaces=("dsv2.accounting.layer_parameters",),
)


# ------------------------------------------------------------ 09.5 the whole model

CONVENTIONS = (
    "everything",
    "without the embedding",
    "without embedding and router",
    "without embedding and head",
)


def whole(
    *,
    parts: Callable[[DSV2Config, bool], Parameters] = accounting.parameters,
    change: Callable[[DSV2Config, Parameters], Parameters] = lambda c, p: p,
    left: Callable[[DSV2Config, Parameters, int], int] | None = None,
    told: Callable[[str], str] = lambda convention: convention,
    written: Callable[[int], Any] = lambda count: count,
) -> Callable[..., Any]:
    """An answer to 09.5. left: what is left out, of the convention with that number."""

    def answer(cfg: DSV2Config, convention: str, activated: bool = False) -> Any:
        found = change(cfg, parts(cfg, activated))
        if left is None:
            return written(found.conventions()[told(convention)])
        return written(found.total - left(cfg, found, CONVENTIONS.index(told(convention))))

    return answer


def all_layers_alike(cfg: DSV2Config, activated: bool) -> Parameters:
    ends = Parameters(
        embedding=0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size,
        head=cfg.vocab_size * cfg.hidden_size,
        norms=cfg.hidden_size,
    )
    last = accounting.layer_parameters(cfg, cfg.num_hidden_layers - 1, activated)
    return ends + cfg.num_hidden_layers * last


def without_layer(which: Callable[[DSV2Config], int]) -> Callable[[DSV2Config, bool], Parameters]:
    def parts(cfg: DSV2Config, activated: bool) -> Parameters:
        gone = accounting.layer_parameters(cfg, which(cfg), activated)
        return accounting.parameters(cfg, activated) + -1 * gone

    return parts


def share_of_all(cfg: DSV2Config, activated: bool) -> Parameters:
    """Activated taken as K / E of every part."""
    every = accounting.parameters(cfg)
    if not activated:
        return every
    return Parameters(
        *(n * cfg.num_experts_per_tok // max(1, cfg.n_routed_experts) for n in every.parts().values())
    )


def model_case(says: str, cfg: DSV2Config, convention: int, activated: bool = False) -> Case:
    return Case(
        f"{says}, {'activated' if activated else 'in total'}, {CONVENTIONS[convention]}",
        lambda: {"cfg": cfg, "convention": CONVENTIONS[convention], "activated": activated},
    )


TIED = LITE.replace(tie_word_embeddings=True, num_hidden_layers=6, first_k_dense_replace=2, vocab_size=97)
FIVE = BASE.replace(num_hidden_layers=5)

COUNTED = Exercise(
    number="09.5",
    name="counted",
    title="the parameters of the whole model",
    difficulty=2,
    minutes=20,
    answer=whole(),
    cases=(
        model_case("5 layers", FIVE, 0),
        model_case("5 layers", FIVE, 0, True),
        model_case("5 layers", FIVE, 1, True),
        model_case("5 layers", FIVE, 2, True),
        model_case("5 layers", FIVE, 3, True),
        model_case("6 layers, 2 of them dense, a tied head", TIED, 0),
        model_case("6 layers, 2 of them dense, a tied head", TIED, 1, True),
        model_case("6 layers, 2 of them dense, a tied head", TIED, 3),
        model_case("9 layers, experts in every third", THIRD, 2),
    ),
    mistakes=(
        Mistake(
            "last norm forgotten",
            "The norm before the head is missing: the count is one hidden size short.",
            whole(change=lambda c, p: replace(p, norms=p.norms - c.hidden_size)),
        ),
        Mistake(
            "tied matrix twice",
            "Embedding and head were counted as two where they are one matrix. cfg.tie_word_embeddings says "
            "so.",
            whole(change=lambda c, p: replace(p, embedding=c.vocab_size * c.hidden_size)),
        ),
        Mistake(
            "tied matrix left out",
            "Without the embedding, the one matrix of a tied model was left out altogether. It still serves "
            "as the head, and counts as that.",
            whole(
                left=lambda c, p, n: (
                    (c.vocab_size * c.hidden_size if n else 0)
                    + (p.router if n == 2 else p.head if n == 3 and not c.tie_word_embeddings else 0)
                )
            ),
        ),
        Mistake(
            "embedding never counted",
            "The embedding is missing also where everything is to be counted.",
            whole(change=lambda c, p: replace(p, embedding=0)),
        ),
        Mistake(
            "head never counted",
            "The head is missing also where it is to be counted. It is a matrix of its own, as large as the "
            "embedding.",
            whole(change=lambda c, p: replace(p, head=0)),
        ),
        Mistake(
            "embedding and head never counted",
            "Embedding and head are missing under every convention.",
            whole(change=lambda c, p: replace(p, embedding=0, head=0)),
        ),
        Mistake(
            "one row of the embedding",
            "The embedding was counted as the one row that a token looks up. The conventions count it as a "
            "whole or not at all.",
            whole(
                change=lambda c, p: replace(p, embedding=0 if c.tie_word_embeddings else c.hidden_size),
                left=lambda c, p, n: (p.embedding if n else 0) + (0, 0, p.router, p.head)[n],
            ),
        ),
        Mistake(
            "router always counted",
            "The router was counted although the convention leaves it out.",
            whole(left=lambda c, p, n: (0, p.embedding, p.embedding, p.embedding + p.head)[n]),
        ),
        Mistake(
            "router never counted",
            "The router is missing under conventions that count it.",
            whole(change=lambda c, p: replace(p, router=0)),
        ),
        Mistake(
            "one layer's router",
            "Only one layer's router was left out. Every layer of experts has one.",
            whole(
                left=lambda c, p, n: (
                    0,
                    p.embedding,
                    p.embedding + c.n_routed_experts * c.hidden_size,
                    p.embedding + p.head,
                )[n]
            ),
        ),
        Mistake(
            "embedding kept without the router",
            "Under 'without embedding and router' only the router was left out.",
            whole(left=lambda c, p, n: (0, p.embedding, p.router, p.embedding + p.head)[n]),
        ),
        Mistake(
            "head left out with the embedding",
            "Without the embedding, the head was left out too. The model multiplies by it for every token, "
            "and most conventions count it.",
            whole(
                left=lambda c, p, n: (
                    0,
                    p.embedding + p.head,
                    p.embedding + p.head + p.router,
                    p.embedding + p.head,
                )[n]
            ),
        ),
        Mistake(
            "head kept",
            "Under 'without embedding and head' the head is still counted.",
            whole(left=lambda c, p, n: (0, p.embedding, p.embedding + p.router, p.embedding)[n]),
        ),
        Mistake(
            "convention ignored",
            "Everything was counted, whatever the convention.",
            whole(told=lambda convention: "everything"),
        ),
        Mistake(
            "activated ignored",
            "The total was counted where only what a token passes through is asked for.",
            whole(parts=lambda cfg, activated: accounting.parameters(cfg)),
        ),
        Mistake(
            "always activated",
            "Only what a token passes through was counted, also in total.",
            whole(parts=lambda cfg, activated: accounting.parameters(cfg, True)),
        ),
        Mistake(
            "K of E of everything",
            "Activated was taken as K / E of every part. Only routed experts are chosen among; a token "
            "passes through all the rest.",
            whole(parts=share_of_all),
        ),
        Mistake(
            "all layers like the last",
            "All layers were counted like the last one. Some have a dense network in the place of experts.",
            whole(parts=all_layers_alike),
        ),
        Mistake(
            "first layer left out",
            "A layer is missing, the first. They are numbered from 0.",
            whole(parts=without_layer(lambda c: 0)),
        ),
        Mistake(
            "last layer left out",
            "A layer is missing, the last.",
            whole(parts=without_layer(lambda c: c.num_hidden_layers - 1)),
        ),
        Mistake(
            "in billions",
            "This is the number in billions. Asked for is the count itself.",
            whole(written=lambda count: count / 1e9),
        ),
    ),
    hints=(
        "A model has 60 layers, of which 1 is dense. Which parts of it are in no layer? Which of those does "
        "a token multiply by?",
        'The notebook\'s section "The whole model" adds all this up: Parameters can be added, and .total is '
        "their sum. Of a tied model embedding is 0.",
        "parts = Parameters(embedding=V D or 0 if tied, head=V D, norms=D)\n"
        "for each layer: parts = parts + layer_parameters(cfg, layer, activated)\n"
        "result = parts.total, less the embedding, the router or the head as the convention says",
    ),
    checked="four conventions, in total and activated, with the head tied and not, and several ways to lay "
    "out layers",
)


# ------------------------------------------------------------ 09.6 bug hunt: a layer of a checkpoint


def stored_case(seed: int, cfg: DSV2Config, layer: int) -> dict[str, Any]:
    """Random tensors by their names on disk, in the order in which a file may list them."""
    generator = torch.Generator().manual_seed(seed)
    prefix = f"model.layers.{layer}."
    names = sorted(name for name in checkpoint_layout(cfg) if name.startswith(prefix))
    shapes = {name.removeprefix(prefix): checkpoint_layout(cfg)[name].shape for name in names}
    return {"tensors": {n: torch.randn(s, generator=generator) for n, s in shapes.items()}, "cfg": cfg}


def placed(tensors: Mapping[str, Tensor], cfg: DSV2Config) -> dict[str, Tensor]:
    """The right answer to 09.6, from the package's own table of names."""
    layer = cfg.moe_layers[0] if "mlp.gate.weight" in tensors else 0
    layout = checkpoint_layout(cfg)
    with torch.device("meta"):
        shapes = Block(cfg, layer).state_dict()
    ours = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    for name, tensor in tensors.items():
        stored = layout[f"model.layers.{layer}.{name}"]
        for part in stored.parts:
            place = ours[part.parameter.removeprefix(f"layers.{layer}.")]
            place[part.region] = tensor.view(stored.view or stored.shape)[part.rows]
    return ours


def misplaced(
    change: Callable[[dict[str, Tensor], Mapping[str, Tensor], DSV2Config], Mapping[str, Tensor]],
) -> Callable[..., dict[str, Tensor]]:
    """An answer to 09.6: the right tensors, with those that `change` gives in the place of some."""

    def answer(tensors: Mapping[str, Tensor], cfg: DSV2Config) -> dict[str, Tensor]:
        ours = placed(tensors, cfg)
        return {**ours, **change(ours, tensors, cfg)}

    return answer


def halves(ours: Mapping[str, Tensor], *names: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Gate and up of each of the named weights that are there."""
    return {name: ours[name].chunk(2, dim=-2) for name in names if name in ours}


GATED = ("ffn.w_gate_up.weight", "ffn.experts.w_gate_up", "ffn.shared.w_gate_up.weight")


def up_first(*names: str) -> Callable[..., dict[str, Tensor]]:
    return misplaced(
        lambda ours, *_: {
            name: torch.cat((up, gate), dim=-2) for name, (gate, up) in halves(ours, *names).items()
        }
    )


def in_turn(ours: Mapping[str, Tensor], *_: Any) -> dict[str, Tensor]:
    return {
        name: torch.stack((gate, up), dim=-2).flatten(-3, -2)
        for name, (gate, up) in halves(ours, *GATED).items()
    }


def kv_rows(
    keys: Callable[[Tensor, DSV2Config], tuple[Tensor, Tensor]],
) -> Callable[..., dict[str, Tensor]]:
    """W^UK and W^UV taken from kv_b_proj in another way."""

    def change(ours: Any, tensors: Mapping[str, Tensor], cfg: DSV2Config) -> dict[str, Tensor]:
        uk, uv = keys(tensors["self_attn.kv_b_proj.weight"], cfg)
        return {"attention.w_uk": uk, "attention.w_uv": uv}

    return misplaced(change)


def all_keys_first(rows: Tensor, cfg: DSV2Config) -> tuple[Tensor, Tensor]:
    heads = cfg.num_attention_heads
    uk, uv = rows.split([heads * cfg.qk_nope_head_dim, heads * cfg.v_head_dim])
    return uk.unflatten(0, (heads, -1)), uv.unflatten(0, (heads, -1))


def all_values_first(rows: Tensor, cfg: DSV2Config) -> tuple[Tensor, Tensor]:
    heads = cfg.num_attention_heads
    uv, uk = rows.split([heads * cfg.v_head_dim, heads * cfg.qk_nope_head_dim])
    return uk.unflatten(0, (heads, -1)), uv.unflatten(0, (heads, -1))


def values_first(rows: Tensor, cfg: DSV2Config) -> tuple[Tensor, Tensor]:
    rows = rows.unflatten(0, (cfg.num_attention_heads, -1))
    return rows[:, cfg.v_head_dim :], rows[:, : cfg.v_head_dim]


def each_head_halved(rows: Tensor, cfg: DSV2Config) -> tuple[Tensor, Tensor]:
    uk, uv = rows.unflatten(0, (cfg.num_attention_heads, -1)).chunk(2, dim=1)
    return uk, uv


def heads_last(rows: Tensor, cfg: DSV2Config) -> tuple[Tensor, Tensor]:
    rows = rows.unflatten(0, (-1, cfg.num_attention_heads)).transpose(0, 1)
    return rows[:, : cfg.qk_nope_head_dim], rows[:, cfg.qk_nope_head_dim :]


def transposed(rows: Tensor, cfg: DSV2Config) -> tuple[Tensor, Tensor]:
    rows = rows.unflatten(0, (cfg.num_attention_heads, -1)).mT
    return rows[..., : cfg.qk_nope_head_dim], rows[..., cfg.qk_nope_head_dim :]


def not_by_head(rows: Tensor, cfg: DSV2Config) -> tuple[Tensor, Tensor]:
    uk, uv = all_keys_first(rows, cfg)
    return uk.flatten(0, 1), uv.flatten(0, 1)


def sorted_as_text(ours: Mapping[str, Tensor], tensors: Any, cfg: DSV2Config) -> dict[str, Tensor]:
    order = sorted(range(cfg.n_routed_experts), key=str)
    names = ("ffn.experts.w_gate_up", "ffn.experts.w_down")
    return {name: ours[name][order] for name in names if name in ours}


def turned_pairs(width: int) -> list[int]:
    return [*range(0, width, 2), *range(1, width, 2)]


def de_interleaved(ours: Mapping[str, Tensor], tensors: Any, cfg: DSV2Config) -> dict[str, Tensor]:
    """The rotary rows in the order that rotating halves needs: even ones, then odd ones."""
    order = turned_pairs(cfg.qk_rope_head_dim)
    query = "attention.w_uq.weight" if "attention.w_uq.weight" in ours else "attention.w_q.weight"
    rows = ours[query].unflatten(0, (cfg.num_attention_heads, -1)).clone()
    rows[:, cfg.qk_nope_head_dim :] = rows[:, cfg.qk_nope_head_dim :][:, order]
    w_dkv = ours["attention.w_dkv.weight"].clone()
    w_dkv[cfg.kv_lora_rank :] = w_dkv[cfg.kv_lora_rank :][order]
    return {query: rows.flatten(0, 1), "attention.w_dkv.weight": w_dkv}


def rotary_first(ours: Mapping[str, Tensor], tensors: Any, cfg: DSV2Config) -> dict[str, Tensor]:
    return {"attention.w_dkv.weight": ours["attention.w_dkv.weight"].roll(cfg.qk_rope_head_dim, 0)}


def norms_exchanged(ours: Mapping[str, Tensor], *_: Any) -> dict[str, Tensor]:
    return {
        "attention_norm.weight": ours["ffn_norm.weight"],
        "ffn_norm.weight": ours["attention_norm.weight"],
    }


def first_expert_only(ours: Mapping[str, Tensor], *_: Any) -> dict[str, Tensor]:
    names = [name for name in ours if ".experts." in name]
    return {name: ours[name][:1].expand_as(ours[name]).clone() for name in names}


def laid_end_to_end(ours: Mapping[str, Tensor], *_: Any) -> dict[str, Tensor]:
    return {name: tensor.flatten(0, 1) for name, tensor in ours.items() if ".experts." in name}


def last_expert_lost(ours: Mapping[str, Tensor], *_: Any) -> dict[str, Tensor]:
    return {name: tensor[:-1] for name, tensor in ours.items() if ".experts." in name}


def shared_forgotten(tensors: Mapping[str, Tensor], cfg: DSV2Config) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in placed(tensors, cfg).items() if ".shared." not in name}


LAYER_FROM_HF = Exercise(
    number="09.6",
    name="layer_from_hf",
    title="a layer of a checkpoint",
    difficulty=3,
    minutes=25,
    answer=placed,
    cases=(
        Case("a layer of 12 experts, 3 heads, q_lora_rank 14", lambda: stored_case(7, BASE, 1)),
        Case("a dense layer of the same model", lambda: stored_case(8, BASE, 0)),
        Case(
            "a layer of 11 experts, 4 heads, no q_lora_rank",
            lambda: stored_case(
                9, LITE.replace(num_attention_heads=4, n_routed_experts=11, qk_rope_head_dim=6), 2
            ),
        ),
    ),
    mistakes=(
        Mistake(
            "all keys, then all values",
            "The rows of kv_b_proj were cut once, for all heads together. They are in the order of the "
            "heads: head 0's keys, head 0's values, head 1's keys. Both cuts give tensors of the same "
            "shapes.",
            kv_rows(all_keys_first),
        ),
        Mistake(
            "all values, then all keys",
            "The rows of kv_b_proj were cut once, for all heads together, and values taken first. They are "
            "in the order of the heads, and of each head the keys come first.",
            kv_rows(all_values_first),
        ),
        Mistake(
            "values first",
            "The rows go to the right heads, but of each head the values were taken first. The first N rows "
            "are W^UK's, the other V are W^UV's.",
            kv_rows(values_first),
        ),
        Mistake(
            "each head halved",
            "Each head's rows were cut in the middle. Its keys are N rows and its values V: as many in "
            "DeepSeek-V2, but not in every model.",
            kv_rows(each_head_halved),
        ),
        Mistake(
            "heads last",
            "The rows of kv_b_proj were dealt out to the heads like cards. A head's rows stand together.",
            kv_rows(heads_last),
        ),
        Mistake(
            "transposed",
            "W^UK and W^UV are transposed: a row of the checkpoint is a row of theirs, with C columns.",
            kv_rows(transposed),
        ),
        Mistake(
            "not by head",
            "W^UK and W^UV have no axis for the heads. They are (H, N, C) and (H, V, C).",
            kv_rows(not_by_head),
        ),
        Mistake(
            "up first",
            "Up's rows were put before gate's. SwiGLU takes the first half for the gate, which goes through "
            "the SiLU; the shapes fit either way.",
            up_first(*GATED),
        ),
        Mistake(
            "up first in the experts",
            "In the routed experts, up's rows were put before gate's.",
            up_first("ffn.experts.w_gate_up"),
        ),
        Mistake(
            "up first in the shared experts",
            "In the shared experts, up's rows were put before gate's.",
            up_first("ffn.shared.w_gate_up.weight"),
        ),
        Mistake(
            "gate and up in turn",
            "Gate's and up's rows were laid in turn. All of gate's come first, then all of up's.",
            misplaced(in_turn),
        ),
        Mistake(
            "experts in the order of their names",
            "The experts are in the order of their names as text, in which 10 comes before 2. The router's "
            "row number e is expert number e.",
            misplaced(sorted_as_text),
        ),
        Mistake(
            "one expert for all",
            "All experts have become expert 0.",
            misplaced(first_expert_only),
        ),
        Mistake(
            "an expert lost",
            "The last expert is missing.",
            misplaced(last_expert_lost),
        ),
        Mistake(
            "experts end to end",
            "The experts were laid end to end. They are stacked: the first axis is the expert's number.",
            misplaced(laid_end_to_end),
        ),
        Mistake(
            "shared experts forgotten",
            "The shared experts are missing.",
            shared_forgotten,
        ),
        Mistake(
            "norms changed places",
            "The two norms have changed places. `post_attention_layernorm` stands behind the attention: it "
            "is the one in front of the FFN.",
            misplaced(norms_exchanged),
        ),
        Mistake(
            "rotary key first",
            "The rotary key's rows were put before the latent's. In kv_a_proj_with_mqa, as here, the latent "
            "is first.",
            misplaced(rotary_first),
        ),
        Mistake(
            "rotary rows sorted for halves",
            "The rotary rows were put into the order that rotating halves needs. Here neighbours are pairs, "
            "as in the checkpoint: nothing is to be moved.",
            misplaced(de_interleaved),
        ),
    ),
    hints=(
        "Every tensor has the right shape, and no value is lost. What can be wrong then? Look at each line "
        "that does more than rename, and ask which row of the checkpoint ends up where.",
        "Take 2 heads, N = 2 and V = 1, so that kv_b_proj has six rows. Write down, with the docstring, what "
        "each of them is; then what the code makes of them.",
        "rows = kv_b_proj seen as (H, N + V, C): head by head\n"
        "w_uk = the first N rows of every head, w_uv = the other V\n"
        "mend the three lines that begin at `keys, values`",
    ),
    checked="every tensor, in dense layers and layers of experts, with more than ten experts and heads that "
    "differ",
    given="all keys, then all values",
)

EXERCISES = (BLOCK_FORWARD, NEXT_TOKEN_LOSS, MLA_PARAMETERS, LAYER_PARAMETERS, COUNTED, LAYER_FROM_HF)
