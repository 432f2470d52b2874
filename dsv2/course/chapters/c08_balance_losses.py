"""The exercises of chapter 08: cases, right answers, plausible mistakes, hints."""

# B batch   T tokens   E routed experts   K experts per token   G devices   M devices per token

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.moe import balance
from dsv2.moe.routing import Routing, device_limited_top_k


def routing(seed: int, batch: int, tokens: int, experts: int, k: int, devices: int, most: int) -> Routing:
    """Tokens with favourites among the experts, as a router that nobody has balanced has them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.2 * torch.randn(batch, tokens, experts, generator=generator)
    logits = logits + 1.2 * torch.randn(batch, 1, experts, generator=generator)
    return device_limited_top_k(logits.softmax(dim=-1), k, devices, most)


def lengths(tokens: int, *real: int) -> Tensor:
    """(B, T), True at the first so many tokens of each sequence: behind them is padding."""
    return torch.arange(tokens) < torch.tensor(real)[:, None]


def spread(per_device: Tensor, n_experts: int) -> Tensor:
    """(..., G) -> (..., E): each expert gets its device's number."""
    return per_device.repeat_interleave(n_experts // per_device.shape[-1], dim=-1)


def counted(expert_ids: Tensor, n_experts: int, mask: Tensor | None = None) -> Tensor:
    """(B, E): how often each expert was chosen at real tokens."""
    chosen = torch.nn.functional.one_hot(expert_ids, n_experts).sum(dim=2).float()
    return (chosen if mask is None else chosen * mask[..., None]).sum(dim=1)


def real_tokens(expert_ids: Tensor, mask: Tensor | None = None) -> Tensor | int:
    return expert_ids.shape[1] if mask is None else mask.sum(dim=1, keepdim=True)


def one_sequence(*tensors: Tensor | None) -> list[Tensor | None]:
    """The batch's sequences joined into one."""
    return [None if x is None else x.flatten(0, 1)[None] for x in tensors]


# ------------------------------------------------------------ 08.1 how often an expert is chosen


def frequency_case(seed: int, sizes: tuple[int, int, int, int], mask: Tensor | None = None) -> dict[str, Any]:
    batch, tokens, experts, k = sizes
    chosen = routing(seed, batch, tokens, experts, k, 1, 1)
    return {"expert_ids": chosen.expert_ids, "n_experts": experts, "mask": mask}


def frequencies(
    factor: Callable[[Tensor, int], float] = lambda ids, n: 1.0,
    *,
    count: Callable[..., Tensor] = counted,
    over: Callable[..., Tensor | int] = real_tokens,
) -> Callable[..., Tensor]:
    """An answer to 08.1: E / (K T) times the counts, times `factor`."""

    def answer(expert_ids: Tensor, n_experts: int, mask: Tensor | None = None) -> Tensor:
        fair = expert_ids.shape[-1] * over(expert_ids, mask) / n_experts
        return factor(expert_ids, n_experts) * count(expert_ids, n_experts, mask) / fair

    return answer


def of_the_batch(expert_ids: Tensor, n_experts: int, mask: Tensor | None = None) -> Tensor:
    """(1, E)."""
    ids, mask = one_sequence(expert_ids, mask)
    return balance.expert_frequencies(ids, n_experts, mask)


def in_whole_numbers(expert_ids: Tensor, n_experts: int, mask: Tensor | None = None) -> Tensor:
    fair = expert_ids.shape[-1] * real_tokens(expert_ids, mask)
    return (counted(expert_ids, n_experts, mask) * n_experts).long() // fair


EXPERT_FREQUENCIES = Exercise(
    number="08.1",
    name="expert_frequencies",
    title="how often an expert is chosen",
    difficulty=1,
    minutes=15,
    answer=balance.expert_frequencies,
    cases=(
        Case("2 sequences of 7 tokens, 10 experts, 3 a token", lambda: frequency_case(1, (2, 7, 10, 3))),
        Case(
            "3 sequences of 8 tokens, of which 8, 3 and 5 are real; 6 experts, 2 a token",
            lambda: frequency_case(2, (3, 8, 6, 2), lengths(8, 8, 3, 5)),
        ),
        Case("1 sequence of 9 tokens, 12 experts, 5 a token", lambda: frequency_case(3, (1, 9, 12, 5))),
    ),
    mistakes=(
        Mistake(
            "not measured against the fair share",
            "This is each expert's share of all choices: 1/E where all are equally busy. f_i is measured "
            "against that fair share, so that it is 1 there, whatever the number of experts.",
            frequencies(lambda ids, n: 1 / n),
        ),
        Mistake(
            "K and E changed places",
            "K and E have changed places. There are K T choices for E experts, so that the fair share is "
            "K T / E, and f_i is the count divided by it.",
            frequencies(lambda ids, n: (ids.shape[-1] / n) ** 2),
        ),
        Mistake(
            "K choices counted, one expected",
            "A token makes K choices, and this divides by the number of tokens alone. f_i is then K at "
            "perfect balance, and the loss depends on how many experts a token gets.",
            frequencies(lambda ids, n: ids.shape[-1]),
        ),
        Mistake(
            "counts as they are",
            "These are plain counts. They grow with the sequence; the equation's f_i does not.",
            frequencies(count=lambda ids, n, mask: counted(ids, n, mask), over=lambda ids, mask: 1),
        ),
        Mistake(
            "whole batch, for every sequence",
            "Each sequence got the same numbers, those of all sequences together. T is the length of one "
            "sequence: two sequences with opposite favourites would look balanced here.",
            lambda expert_ids, n_experts, mask=None: (
                of_the_batch(expert_ids, n_experts, mask).expand(len(expert_ids), -1).clone()
            ),
        ),
        Mistake(
            "whole batch, one row",
            "All sequences were counted together, and their axis is gone. T is the length of one sequence: "
            "two sequences with opposite favourites would look balanced here.",
            lambda expert_ids, n_experts, mask=None: of_the_batch(expert_ids, n_experts, mask)[0],
        ),
        Mistake(
            "first choice only",
            "Only each token's first choice was counted, as in Switch, where there is no other. The K - 1 "
            "others keep experts busy as well.",
            lambda expert_ids, n_experts, mask=None: balance.expert_frequencies(
                expert_ids[..., :1], n_experts, mask
            ),
        ),
        Mistake(
            "chosen or not",
            "An expert counts once here, however many tokens chose it. Writing a 1 to one place again and "
            "again leaves a 1 there; counts have to be added up.",
            frequencies(count=lambda ids, n, mask: (counted(ids, n, mask) > 0).float()),
        ),
        Mistake(
            "padding counted",
            "Padding was counted like tokens. Where `mask` is False there is no token: its choices mean "
            "nothing, and it must not lengthen T either.",
            lambda expert_ids, n_experts, mask=None: balance.expert_frequencies(expert_ids, n_experts),
        ),
        Mistake(
            "padding in T",
            "The choices of padding are left out, but it still lengthens T. The f_i of a sequence then "
            "average less than 1, the less the shorter it is.",
            frequencies(over=lambda ids, mask: ids.shape[1]),
        ),
        Mistake(
            "mean length",
            "The number of real tokens was taken for the batch as a whole. Every sequence has a T of its "
            "own.",
            frequencies(over=lambda ids, mask: ids.shape[1] if mask is None else mask.sum() / len(mask)),
        ),
        Mistake(
            "whole-number division",
            "These are the right numbers, rounded down: // divides in whole numbers, in which an expert "
            "chosen a little less than its fair share looks never chosen.",
            in_whole_numbers,
        ),
    ),
    hints=(
        "20 tokens choose 3 of 10 experts each. How many choices are there, how many would an expert get if "
        "all were equally busy, and what is f_i of one that got 9?",
        'The notebook\'s section "How often an expert is chosen" counts with loops. Without them: '
        "torch.nn.functional.one_hot(expert_ids, n_experts) has the shape (batch, tokens, k, experts), and "
        "sums over two of its axes are the counts. With a mask, padding's ones have to become zeros first.",
        "chosen[b, t, i] = 1 if expert i is among expert_ids[b, t], else 0        (one_hot, summed over k)\n"
        "if there is a mask: chosen = chosen * mask, and T[b] = number of True in mask[b]; else T = tokens\n"
        "f[b, i] = n_experts / (k * T[b]) * sum over t of chosen[b, t, i]",
    ),
    checked="each sequence by itself, all K choices, the fair share as the measure, and padding left out of "
    "both counts and T",
    axes=("sequence", "expert"),
    replaces=("dsv2.moe.balance.expert_frequencies",),
)


# ------------------------------------------------------------ the losses of 08.2, 08.3 and 08.5


def with_slope(answer: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The loss, and its gradient with respect to the affinities."""
    with torch.enable_grad():
        scores = arguments["scores"].clone().requires_grad_()
        loss = answer(**{**arguments, "scores": scores})
        slope = torch.zeros_like(scores)
        if not isinstance(loss, Tensor):
            return {"the loss": loss, "the gradient by the scores": slope}
        if loss.requires_grad:
            (found,) = torch.autograd.grad(loss.sum(), scores, allow_unused=True)
            slope = slope if found is None else found
    return {"the loss": loss.detach(), "the gradient by the scores": slope}


def loss_case(
    seed: int,
    batch: int,
    tokens: int,
    sizes: tuple[int, int, int, int],
    alpha: float,
    mask: Tensor | None = None,
    names: tuple[str, ...] = (),
) -> dict[str, Any]:
    """sizes: experts, k, devices, most devices. names: the arguments that say how experts are laid out."""
    experts, k, devices, most = sizes
    made = routing(seed, batch, tokens, experts, k, devices, most)
    layout = {"n_group": devices, "topk_group": most}
    return {
        "scores": made.scores,
        "expert_ids": made.expert_ids,
        "alpha": alpha,
        **{name: layout[name] for name in names},
        "mask": mask,
    }


def total(f: Tensor, p: Tensor, alpha: float) -> Tensor:
    return alpha * (f * p).sum(dim=-1).mean()


def by_expert(
    f: Callable[..., Tensor] = lambda scores, ids, mask: balance.expert_frequencies(
        ids, scores.shape[-1], mask
    ),
    p: Callable[..., Tensor] = lambda scores, ids, mask: balance.mean_affinities(scores, mask),
    join: Callable[[Tensor, Tensor, float], Tensor] = total,
) -> Callable[..., Tensor]:
    """An answer to 08.2: right but for what is given."""

    def answer(scores: Tensor, expert_ids: Tensor, alpha: float, mask: Tensor | None = None) -> Tensor:
        return join(f(scores, expert_ids, mask), p(scores, expert_ids, mask), alpha)

    return answer


def chosen_only(scores: Tensor, expert_ids: Tensor) -> Tensor:
    """The affinities of the chosen experts; 0 for the others."""
    return torch.zeros_like(scores).scatter(-1, expert_ids, scores.gather(-1, expert_ids))


def affinities_over_the_batch(scores: Tensor, mask: Tensor | None) -> Tensor:
    """P with the real tokens of all sequences for T."""
    real = torch.ones(scores.shape[:2]) if mask is None else mask.float()
    return (scores * real[..., None]).sum(dim=1) / real.sum()


def all_together(answer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The whole batch as one sequence."""

    def joined(scores: Tensor, expert_ids: Tensor, alpha: float, mask: Tensor | None = None, **more: int):
        scores, expert_ids, mask = one_sequence(scores, expert_ids, mask)
        return answer(scores, expert_ids, alpha, mask=mask, **more)

    return joined


EXPERT_BALANCE_LOSS = Exercise(
    number="08.2",
    name="expert_balance_loss",
    title="a price on popular experts",
    difficulty=2,
    minutes=20,
    answer=balance.expert_balance_loss,
    run=with_slope,
    cases=(
        Case(
            "2 sequences of 7 tokens, 10 experts, 3 a token, alpha 0.3",
            lambda: loss_case(4, 2, 7, (10, 3, 1, 1), 0.3),
        ),
        Case(
            "3 sequences of 8 tokens, of which 8, 3 and 5 are real; 6 experts, 2 a token, alpha 2",
            lambda: loss_case(5, 3, 8, (6, 2, 1, 1), 2.0, lengths(8, 8, 3, 5)),
        ),
        Case(
            "1 sequence of 9 tokens, 12 experts, 5 a token, alpha 0.7",
            lambda: loss_case(6, 1, 9, (12, 5, 1, 1), 0.7),
        ),
    ),
    mistakes=(
        Mistake(
            "P of the chosen only",
            "P_i was averaged over the affinities of chosen experts alone. It is a token's affinity to every "
            "expert, chosen or not; what is not chosen is then pushed up by the softmax.",
            by_expert(p=lambda scores, ids, mask: balance.mean_affinities(chosen_only(scores, ids), mask)),
        ),
        Mistake(
            "f from affinities",
            "f_i was made from affinities, so this is a sum of squares of P. f_i counts choices: what keeps "
            "an expert busy is being chosen, not being nearly chosen.",
            by_expert(f=lambda scores, ids, mask: balance.mean_affinities(scores, mask) * scores.shape[-1]),
        ),
        Mistake(
            "no gradient",
            "The loss is right, and no gradient comes out of it: nothing would ever change. f_i is a count "
            "and can have none; P_i has to keep its own.",
            by_expert(p=lambda scores, ids, mask: balance.mean_affinities(scores.detach(), mask)),
        ),
        Mistake(
            "alpha left out",
            "This is the sum without its factor alpha. Beside the cross entropy it would be a hundred times "
            "too loud.",
            by_expert(join=lambda f, p, alpha: total(f, p, 1.0)),
        ),
        Mistake(
            "mean over the experts",
            "This is the mean over the experts, not the sum. The P_i of all experts add up to 1, so that the "
            "sum is alpha at perfect balance, whatever their number.",
            by_expert(join=lambda f, p, alpha: alpha * (f * p).mean()),
        ),
        Mistake(
            "summed over the batch",
            "The sequences' losses were added up. A larger batch would then count the loss more beside the "
            "cross entropy, which is a mean.",
            by_expert(join=lambda f, p, alpha: alpha * (f * p).sum()),
        ),
        Mistake(
            "whole batch as one sequence",
            "f or P was taken over the whole batch. Two sequences with opposite favourites would then look "
            "balanced: the equations hold for each sequence, and the mean comes last.",
            all_together(balance.expert_balance_loss),
        ),
        Mistake(
            "sum times sum",
            "This multiplies the sum of f with the sum of P: always the number of experts, whatever the "
            "router does. Each f_i meets its own P_i.",
            by_expert(join=lambda f, p, alpha: alpha * (f.sum(-1) * p.sum(-1)).mean()),
        ),
        Mistake(
            "P summed over tokens",
            "P_i was added up over the tokens. It is a mean: the loss must not grow with the sequence.",
            by_expert(
                p=lambda scores, ids, mask: (scores if mask is None else scores * mask[..., None]).sum(dim=1)
            ),
        ),
        Mistake(
            "f squared",
            "This adds up f_i squared. It measures imbalance well and cannot be learned from: a count has "
            "no gradient.",
            by_expert(
                p=lambda scores, ids, mask: (
                    balance.expert_frequencies(ids, scores.shape[-1], mask) / scores.shape[-1]
                )
            ),
        ),
        Mistake(
            "K at perfect balance",
            "This is K times the loss: f_i was not divided by K. Some other implementations have it so; in "
            "DeepSeek-V2's equation 24 the loss is alpha at perfect balance.",
            by_expert(
                f=lambda scores, ids, mask: (
                    balance.expert_frequencies(ids, scores.shape[-1], mask) * ids.shape[-1]
                )
            ),
        ),
        Mistake(
            "softmax once more",
            "A softmax was applied to the scores. They are affinities already, each token's add up to 1; a "
            "second softmax makes them nearly equal.",
            by_expert(p=lambda scores, ids, mask: balance.mean_affinities(scores.softmax(dim=-1), mask)),
        ),
        Mistake(
            "padding counted",
            "Padding was counted like tokens. Where `mask` is False there is no token, neither for f nor for "
            "P.",
            lambda scores, expert_ids, alpha, mask=None: balance.expert_balance_loss(
                scores, expert_ids, alpha
            ),
        ),
        Mistake(
            "padding in P",
            "f leaves padding out and P does not. Both are over the T real tokens of a sequence.",
            by_expert(p=lambda scores, ids, mask: scores.mean(dim=1)),
        ),
        Mistake(
            "padding in the T of P",
            "The affinities of padding are left out of P, but it still lengthens T. P is the sum divided by "
            "the number of real tokens.",
            by_expert(
                p=lambda scores, ids, mask: (scores if mask is None else scores * mask[..., None]).mean(1)
            ),
        ),
        Mistake(
            "the batch's tokens in P",
            "P was divided by the number of tokens of the whole batch. T is the length of one sequence: of a "
            "mask, the sum over its last axis.",
            by_expert(p=lambda scores, ids, mask: affinities_over_the_batch(scores, mask)),
        ),
        Mistake(
            "one loss for each sequence",
            "These are the losses of the single sequences. Asked for is one number, their mean.",
            by_expert(join=lambda f, p, alpha: alpha * (f * p).sum(dim=-1)),
        ),
    ),
    hints=(
        "An expert has f = 3 and another f = 0.2. A router moves 0.01 of P from the first to the second. By "
        "how much does the sum of f_i P_i fall? Which of the two factors told it where to take it from?",
        'The notebook\'s section "The expert loss" computes f with 08.1 and P as a mean over the tokens. '
        "Multiply, sum over the experts, then take the mean over the sequences, and mind the mask in P as "
        "in f.",
        "f = expert_frequencies(expert_ids, experts, mask)                      (batch, experts)\n"
        "P = mean over the real tokens of scores                                (batch, experts)\n"
        "    without a mask: scores.mean over the tokens\n"
        "    with one: (scores * mask).sum over the tokens / number of real tokens of the sequence\n"
        "result = alpha * mean over the batch of (sum over the experts of f * P)",
    ),
    checked="the value, the gradient through P and only there, each sequence by itself, and padding left out",
    axes={"the loss": (), "the gradient by the scores": ("sequence", "token", "expert")},
    replaces=("dsv2.moe.balance.expert_balance_loss",),
)


# ------------------------------------------------------------ 08.3 the same for devices


def by_device(
    f: Callable[[Tensor], Tensor] = lambda f: f.mean(dim=-1),
    p: Callable[[Tensor], Tensor] = lambda p: p.sum(dim=-1),
    *,
    blocks: Callable[[Tensor, int], Tensor] = lambda x, devices: x.unflatten(-1, (devices, -1)),
    join: Callable[[Tensor, Tensor, float], Tensor] = total,
) -> Callable[..., Tensor]:
    """An answer to 08.3: f and p join a device's experts, the last axis; blocks lays them out."""

    def answer(
        scores: Tensor, expert_ids: Tensor, alpha: float, n_group: int, mask: Tensor | None = None
    ) -> Tensor:
        frequencies = balance.expert_frequencies(expert_ids, scores.shape[-1], mask)
        affinities = balance.mean_affinities(scores, mask)
        return join(f(blocks(frequencies, n_group)), p(blocks(affinities, n_group)), alpha)

    return answer


def tokens_on_devices(scores, expert_ids, alpha, n_group, mask=None):
    """f' counts tokens that reach a device, against the average."""
    reach = balance.device_reach(expert_ids, scores.shape[-1], n_group, 1, mask)
    reach = reach / reach.mean(dim=-1, keepdim=True)
    return total(reach, by_blocks(balance.mean_affinities(scores, mask), n_group).sum(dim=-1), alpha)


def by_blocks(x: Tensor, devices: int) -> Tensor:
    return x.unflatten(-1, (devices, -1))


DEVICE_BALANCE_LOSS = Exercise(
    number="08.3",
    name="device_balance_loss",
    title="a price on busy devices",
    difficulty=2,
    minutes=15,
    answer=balance.device_balance_loss,
    run=with_slope,
    cases=(
        Case(
            "2 sequences of 7 tokens, 12 experts on 3 devices, 4 a token, alpha 0.3",
            lambda: loss_case(7, 2, 7, (12, 4, 3, 2), 0.3, names=("n_group",)),
        ),
        Case(
            "3 sequences of 8 tokens, of which 8, 3 and 5 are real; 10 experts on 5 devices, 3 a token, "
            "alpha 2",
            lambda: loss_case(8, 3, 8, (10, 3, 5, 2), 2.0, lengths(8, 8, 3, 5), names=("n_group",)),
        ),
        Case(
            "1 sequence of 9 tokens, 9 experts on 3 devices, 2 a token, alpha 0.7: as many devices as "
            "experts on each",
            lambda: loss_case(9, 1, 9, (9, 2, 3, 2), 0.7, names=("n_group",)),
        ),
    ),
    mistakes=(
        Mistake(
            "f' summed",
            "f' was added up over a device's experts. It is their mean, which is 1 at perfect balance "
            "however many experts a device holds.",
            by_device(f=lambda f: f.sum(dim=-1)),
        ),
        Mistake(
            "P' averaged",
            "P' was averaged over a device's experts. It is their sum: the share of the affinity that the "
            "device gets, all devices' together 1.",
            by_device(p=lambda p: p.mean(dim=-1)),
        ),
        Mistake(
            "every n-th expert",
            "Experts were dealt out to the devices like cards. Device 0 holds the first E / G experts, "
            "device 1 the next: neighbours live together.",
            by_device(blocks=lambda x, devices: x.unflatten(-1, (-1, devices)).mT),
        ),
        Mistake(
            "experts for devices",
            "The experts were cut into blocks of G, not into G blocks. Both fit while there are as many "
            "devices as experts on each.",
            by_device(blocks=lambda x, devices: x.unflatten(-1, (-1, devices))),
        ),
        Mistake(
            "the expert loss",
            "This multiplies f and P before a device's experts are put together: it is the expert loss once "
            "more. A device does not mind which of its experts work, only how much there is to do.",
            lambda scores, expert_ids, alpha, n_group, mask=None: balance.expert_balance_loss(
                scores, expert_ids, alpha, mask
            ),
        ),
        Mistake(
            "tokens instead of choices",
            "f' counts the tokens that reach a device. A token that chose two experts there makes twice the "
            "work; how many tokens travel is the communication loss.",
            tokens_on_devices,
        ),
        Mistake(
            "mean over the devices",
            "This is the mean over the devices, not the sum. The P' of all devices add up to 1, so that the "
            "sum is alpha at perfect balance, whatever their number.",
            by_device(join=lambda f, p, alpha: alpha * (f * p).mean()),
        ),
        Mistake(
            "summed over the batch",
            "The sequences' losses were added up. A larger batch would then count the loss more beside the "
            "cross entropy, which is a mean.",
            by_device(join=lambda f, p, alpha: alpha * (f * p).sum()),
        ),
        Mistake(
            "one loss for each sequence",
            "These are the losses of the single sequences. Asked for is one number, their mean.",
            by_device(join=lambda f, p, alpha: alpha * (f * p).sum(dim=-1)),
        ),
        Mistake(
            "whole batch as one sequence",
            "f and P were taken over the whole batch. The equations hold for each sequence, and the mean "
            "comes last.",
            all_together(balance.device_balance_loss),
        ),
        Mistake(
            "no gradient",
            "The loss is right, and no gradient comes out of it: nothing would ever change. P' has to keep "
            "its own.",
            by_device(p=lambda p: p.sum(dim=-1).detach()),
        ),
        Mistake(
            "alpha left out",
            "This is the sum without its factor alpha.",
            by_device(join=lambda f, p, alpha: total(f, p, 1.0)),
        ),
        Mistake(
            "padding counted",
            "Padding was counted like tokens. Where `mask` is False there is no token.",
            lambda scores, expert_ids, alpha, n_group, mask=None: balance.device_balance_loss(
                scores, expert_ids, alpha, n_group
            ),
        ),
    ),
    hints=(
        "A device with 20 experts gets an eighth of all choices, and there are 8 devices. What are the mean "
        "and the sum of its experts' f_i? Which of the two is the same with 40 experts on each?",
        'The notebook\'s section "The device loss": the f and P of 08.2, joined device by device. '
        "x.unflatten(-1, (n_group, -1)) turns (batch, experts) into (batch, devices, experts on each).",
        "f, P as in 08.2                                          (batch, experts)\n"
        "f' = mean of f over each device's experts                (batch, devices)\n"
        "P' = sum of P over each device's experts                 (batch, devices)\n"
        "result = alpha * mean over the batch of (sum over the devices of f' * P')",
    ),
    checked="f' as a mean and P' as a sum over neighbouring experts, the gradient, several layouts, and "
    "padding left out",
    axes={"the loss": (), "the gradient by the scores": ("sequence", "token", "expert")},
    replaces=("dsv2.moe.balance.device_balance_loss",),
)


# ------------------------------------------------------------ 08.4 how many tokens a device receives


def reach_case(
    seed: int, batch: int, tokens: int, sizes: tuple[int, int, int, int], mask: Tensor | None = None
) -> dict[str, Any]:
    experts, k, devices, most = sizes
    made = routing(seed, batch, tokens, experts, k, devices, most)
    layout = {"n_experts": experts, "n_group": devices, "topk_group": most}
    return {"expert_ids": made.expert_ids, **layout, "mask": mask}


def reached(
    factor: Callable[..., float] = lambda ids, devices, most: devices / most,
    *,
    home: Callable[[Tensor, int, int], Tensor] = lambda ids, experts, devices: ids // (experts // devices),
    sent: Callable[[Tensor], Tensor] = lambda pairs: (pairs > 0).float(),
    over: Callable[..., Tensor | int] = real_tokens,
) -> Callable[..., Tensor]:
    """An answer to 08.4. pairs: (B, T, G), how many of a token's experts live on each device."""

    def answer(expert_ids, n_experts, n_group, topk_group, mask=None):
        homes = home(expert_ids, n_experts, n_group)
        pairs = torch.nn.functional.one_hot(homes, n_group).sum(dim=2).float()
        tokens = sent(pairs) if mask is None else sent(pairs) * mask[..., None]
        return factor(expert_ids, n_group, topk_group) * tokens.sum(dim=1) / over(expert_ids, mask)

    return answer


def against_the_average(expert_ids, n_experts, n_group, topk_group, mask=None):
    f = balance.device_reach(expert_ids, n_experts, n_group, topk_group, mask)
    return f / f.mean(dim=-1, keepdim=True)


def reach_of_the_batch(expert_ids, n_experts, n_group, topk_group, mask=None):
    ids, mask = one_sequence(expert_ids, mask)
    f = balance.device_reach(ids, n_experts, n_group, topk_group, mask)
    return f.expand(len(expert_ids), -1).clone()


DEVICE_REACH = Exercise(
    number="08.4",
    name="device_reach",
    title="how many tokens a device receives",
    difficulty=2,
    minutes=15,
    answer=balance.device_reach,
    cases=(
        Case(
            "2 sequences of 7 tokens, 15 experts on 5 devices, 4 a token on at most 2 devices",
            lambda: reach_case(10, 2, 7, (15, 4, 5, 2)),
        ),
        Case(
            "3 sequences of 8 tokens, of which 8, 3 and 5 are real; 8 experts on 4 devices, 5 a token on at "
            "most 3",
            lambda: reach_case(11, 3, 8, (8, 5, 4, 3), lengths(8, 8, 3, 5)),
        ),
        Case(
            "1 sequence of 9 tokens, 12 experts on 6 devices, 3 a token on at most 4",
            lambda: reach_case(12, 1, 9, (12, 3, 6, 4)),
        ),
    ),
    mistakes=(
        Mistake(
            "pairs instead of tokens",
            "A token was counted once for every expert it has on a device. Its hidden state is sent there "
            "once, and the experts on the device share it.",
            reached(sent=lambda pairs: pairs),
        ),
        Mistake(
            "pairs, divided by K",
            "These are the device's f' of the device loss: choices against their average. Here tokens are "
            "counted, and a token that chose several experts on one device is sent there once.",
            reached(lambda ids, devices, most: devices / ids.shape[-1], sent=lambda pairs: pairs),
        ),
        Mistake(
            "divided by K",
            "Tokens are counted rightly but divided by K T. A token is sent to M devices at most, however "
            "many experts it has there.",
            reached(lambda ids, devices, most: devices / ids.shape[-1]),
        ),
        Mistake(
            "M left out",
            "This is the share of tokens that reach a device, times the number of devices. With every token "
            "on exactly M devices it would be M at perfect balance, not 1.",
            reached(lambda ids, devices, most: devices),
        ),
        Mistake(
            "share of the tokens",
            "This is the plain share of tokens that reach a device. f'' is measured against M T / D, the "
            "device's share if every token went to M devices.",
            reached(lambda ids, devices, most: 1.0),
        ),
        Mistake(
            "number of devices left out",
            "This lacks the factor D: f'' is measured against M T / D, not against M T.",
            reached(lambda ids, devices, most: 1 / most),
        ),
        Mistake(
            "against the devices really used",
            "This is measured against the average over the devices. The equation has M in its place: when "
            "tokens stay on fewer devices than they may, f'' is below 1, and the loss below alpha.",
            against_the_average,
        ),
        Mistake(
            "every n-th expert",
            "Experts were dealt out to the devices like cards: expert i on device i mod D. Device 0 holds "
            "the first E / D experts, device 1 the next.",
            reached(home=lambda ids, experts, devices: ids % devices),
        ),
        Mistake(
            "blocks of D",
            "The experts were cut into blocks of D, not into D blocks. The device of expert i is i divided "
            "by the number of experts on each, E / D, rounded down.",
            reached(home=lambda ids, experts, devices: ids // devices),
        ),
        Mistake(
            "best device only",
            "Only the device of each token's first choice was counted. The other choices may live elsewhere, "
            "and the token is sent there as well.",
            reached(
                home=lambda ids, experts, devices: (ids // (experts // devices))[..., :1],
            ),
        ),
        Mistake(
            "whole batch",
            "Each sequence got the same numbers, those of all sequences together. T is the length of one "
            "sequence.",
            reach_of_the_batch,
        ),
        Mistake(
            "padding counted",
            "Padding was counted like tokens. Where `mask` is False there is no token to be sent.",
            lambda expert_ids, n_experts, n_group, topk_group, mask=None: balance.device_reach(
                expert_ids, n_experts, n_group, topk_group
            ),
        ),
        Mistake(
            "padding in T",
            "Padding is not sent, but it still lengthens T. Every sequence has as many tokens as are real.",
            reached(over=lambda ids, mask: ids.shape[1]),
        ),
    ),
    hints=(
        "A token chose the experts 0, 1 and 7 of 8; they live on 4 devices, two on each. To which devices is "
        "it sent, and how often to device 0?",
        'The notebook\'s section "The communication loss" does it with a set of devices for every token. '
        "With tensors: expert i lives on device i // (n_experts // n_group); write a 1 at each token's "
        "devices into zeros of the shape (batch, tokens, devices). Writing it twice leaves a 1.",
        "device_ids = expert_ids // (n_experts // n_group)                      (batch, tokens, k)\n"
        "sent = zeros (batch, tokens, devices), with 1 at device_ids          (scatter_, last axis)\n"
        "if there is a mask: sent = sent * mask, and T[b] = number of True in mask[b]; else T = tokens\n"
        "f''[b, i] = n_group / (topk_group * T[b]) * sum over t of sent[b, t, i]",
    ),
    checked="every token once for each device it is sent to, M T / D as the measure, neighbours on one "
    "device, each sequence by itself, and padding left out",
    axes=("sequence", "device"),
    replaces=("dsv2.moe.balance.device_reach",),
)


# ------------------------------------------------------------ 08.5 bug hunt: the communication loss


def communication(
    *,
    reach: Callable[..., Tensor] = balance.device_reach,
    p: Callable[[Tensor, Tensor], Tensor] = lambda scores, ids: scores,
    joined: Callable[[Tensor], Tensor] = lambda p: p.sum(dim=-1),
    join: Callable[[Tensor, Tensor, float], Tensor] = total,
) -> Callable[..., Tensor]:
    """An answer to 08.5: right but for what is given."""

    def answer(scores, expert_ids, alpha, n_group, topk_group, mask=None):
        f = reach(expert_ids, scores.shape[-1], n_group, topk_group, mask)
        affinities = balance.mean_affinities(p(scores, expert_ids), mask)
        return join(f, joined(by_blocks(affinities, n_group)), alpha)

    return answer


def shared_out(scores: Tensor, expert_ids: Tensor) -> Tensor:
    """The chosen experts' affinities, made to add up to 1."""
    chosen = chosen_only(scores, expert_ids)
    return chosen / chosen.sum(dim=-1, keepdim=True)


COMMUNICATION_BALANCE_LOSS = Exercise(
    number="08.5",
    name="communication_balance_loss",
    title="a price on crowded links",
    difficulty=2,
    minutes=15,
    answer=balance.communication_balance_loss,
    run=with_slope,
    cases=(
        Case(
            "2 sequences of 7 tokens, 15 experts on 5 devices, 4 a token on at most 2 devices, alpha 0.3",
            lambda: loss_case(16, 2, 7, (15, 4, 5, 2), 0.3, names=("n_group", "topk_group")),
        ),
        Case(
            "3 sequences of 8 tokens, of which 8, 3 and 5 are real; 8 experts on 4 devices, 5 a token on at "
            "most 3, alpha 2",
            lambda: loss_case(
                17, 3, 8, (8, 5, 4, 3), 2.0, lengths(8, 8, 3, 5), names=("n_group", "topk_group")
            ),
        ),
        Case(
            "1 sequence of 9 tokens, 12 experts on 6 devices, 3 a token on at most 4, alpha 0.7",
            lambda: loss_case(18, 1, 9, (12, 3, 6, 4), 0.7, names=("n_group", "topk_group")),
        ),
    ),
    mistakes=(
        Mistake(
            "every n-th expert",
            "Which device is crowded is counted as if experts were dealt out like cards, but P'' is that of "
            "blocks of neighbours. The price of one device's crowd is then put on another.",
            communication(reach=reached(home=lambda ids, experts, devices: ids % devices)),
        ),
        Mistake(
            "blocks of D",
            "Which device is crowded is now counted in blocks of D experts, but P'' is that of D blocks of "
            "E / D experts each.",
            communication(reach=reached(home=lambda ids, experts, devices: ids // devices)),
        ),
        Mistake(
            "pairs instead of tokens",
            "A token counts here once for every expert it has on a device. Its hidden state is sent there "
            "once; work is what the device loss is for.",
            communication(reach=reached(sent=lambda pairs: pairs)),
        ),
        Mistake(
            "the device loss",
            "f'' is measured in choices, as in the device loss. Here the tokens that are sent count, each "
            "once for a device.",
            communication(
                reach=reached(lambda ids, devices, most: devices / ids.shape[-1], sent=lambda pairs: pairs)
            ),
        ),
        Mistake(
            "divided by K",
            "Tokens were measured against K T / D. A token is sent to at most M devices, however many "
            "experts it has there.",
            communication(reach=reached(lambda ids, devices, most: devices / ids.shape[-1])),
        ),
        Mistake(
            "M left out",
            "f'' is not divided by M: with every token on M devices the loss would be M alpha at perfect "
            "balance.",
            communication(reach=reached(lambda ids, devices, most: devices)),
        ),
        Mistake(
            "P'' averaged",
            "P'' was averaged over a device's experts. It is their sum: all devices' together are 1.",
            communication(joined=lambda p: p.mean(dim=-1)),
        ),
        Mistake(
            "P'' of the chosen only",
            "P'' was taken over the affinities of the chosen experts alone. It is that of all experts of a "
            "device, chosen or not.",
            communication(p=chosen_only),
        ),
        Mistake(
            "P'' of the chosen, made to add up to 1",
            "P'' was taken over the affinities of the chosen experts, divided by their sum. It is that of "
            "all experts of a device, as they come from the softmax.",
            communication(p=shared_out),
        ),
        Mistake(
            "no gradient",
            "The loss is right, and no gradient comes out of it: P'' has to keep its own.",
            communication(p=lambda scores, ids: scores.detach()),
        ),
        Mistake(
            "mean over the devices",
            "This is the mean over the devices, not the sum.",
            communication(join=lambda f, p, alpha: alpha * (f * p).mean()),
        ),
        Mistake(
            "summed over the batch",
            "The sequences' losses were added up. Their mean is asked for.",
            communication(join=lambda f, p, alpha: alpha * (f * p).sum()),
        ),
        Mistake(
            "padding counted",
            "Padding was counted like tokens. Where `mask` is False there is no token.",
            lambda scores, expert_ids, alpha, n_group, topk_group, mask=None: (
                balance.communication_balance_loss(scores, expert_ids, alpha, n_group, topk_group)
            ),
        ),
    ),
    hints=(
        "Take 4 experts on 2 devices and a token that chose the experts 0 and 1. Follow the code by hand: on "
        "which devices does it say they live?",
        "Compare the two places where the code decides which expert lives on which device: the line of "
        "`device_ids`, and the line of `p`. Do they mean the same layout?",
        "unflatten(-1, (n_group, -1)) makes blocks of neighbours: experts 0 .. per_device - 1 on device 0\n"
        "so the device of expert i is i // per_device, with per_device = E / n_group\n"
        "mend the line of `device_ids`",
    ),
    checked="tokens counted once for each device, one layout for f'' and P'', the gradient through P'', and "
    "padding left out",
    axes={"the loss": (), "the gradient by the scores": ("sequence", "token", "expert")},
    replaces=("dsv2.moe.balance.communication_balance_loss",),
    given="every n-th expert",
)


# ------------------------------------------------------------ 08.6 dropping


def drop_case(
    seed: int,
    batch: int,
    tokens: int,
    sizes: tuple[int, int, int, int],
    capacity_factor: float = 1.0,
    exempt: tuple[bool, ...] | None = None,
    mask: Tensor | None = None,
) -> dict[str, Any]:
    experts, k, devices, most = sizes
    made = routing(seed, batch, tokens, experts, k, devices, most)
    made.weights = made.weights / made.weights.sum(dim=-1, keepdim=True)  # as with cfg.norm_topk_prob
    return {
        "routing": made,
        "n_group": devices,
        "capacity_factor": capacity_factor,
        "exempt": None if exempt is None else torch.tensor(exempt),
        "mask": mask,
    }


def drop(
    routing: Routing,
    n_group: int,
    capacity_factor: float = 1.0,
    exempt: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    affinity: Callable[[Tensor], Tensor] = lambda affinity: affinity,
    place: Callable[[Tensor, int, int], Tensor] = lambda ids, experts, devices: ids // (experts // devices),
    places: int | None = None,
    pairs: Callable[[Tensor], Tensor | float] = lambda real: real.sum(),
    rounded: Callable[[Tensor], Tensor] = torch.floor,
    exempt_outside: bool = False,
) -> Tensor:
    """Slow and plain: place by place, its pairs in order of affinity. places: None means n_group."""
    ids, places = routing.expert_ids, places or n_group
    real = torch.ones(ids.shape[:2], dtype=torch.bool) if mask is None else mask
    real = real[..., None].expand_as(ids)
    safe = torch.zeros_like(real) if exempt is None else exempt[:, None, None].expand_as(ids) & real
    budget = int(rounded(torch.as_tensor(capacity_factor * pairs(real) / places)))
    rank = affinity(routing.scores.gather(-1, ids))
    kept = safe.clone()
    for number in range(places):
        here = (place(ids, routing.n_experts, n_group) == number) & real
        taken = 0 if exempt_outside else int((here & safe).sum())
        candidates = torch.where(here & ~safe, rank, -torch.inf).flatten()
        room = max(0, min(budget - taken, int((here & ~safe).sum())))
        kept.view(-1)[candidates.topk(room).indices] = True
    return kept


def in_order_of_arrival(affinity: Tensor) -> Tensor:
    return -torch.arange(affinity.numel()).reshape(affinity.shape).float()


def whole_tokens(*a: Any, **b: Any) -> Tensor:
    kept = drop(*a, **b)
    return kept.all(dim=-1, keepdim=True).expand_as(kept).clone()


def sequence_by_sequence(routing, n_group, capacity_factor=1.0, exempt=None, mask=None):
    parts = []
    for b in range(len(routing.scores)):
        rows = slice(b, b + 1)
        one = Routing(routing.expert_ids[rows], routing.weights[rows], routing.scores[rows])
        of_one = [None if x is None else x[rows] for x in (exempt, mask)]
        parts.append(drop(one, n_group, capacity_factor, *of_one))
    return torch.cat(parts)


def padding_kept(routing, n_group, capacity_factor=1.0, exempt=None, mask=None):
    kept = drop(routing, n_group, capacity_factor, exempt, mask)
    return kept if mask is None else kept | ~mask[..., None]


DROP_TOKENS = Exercise(
    number="08.6",
    name="drop_tokens",
    title="dropping to a budget",
    difficulty=3,
    minutes=30,
    answer=balance.drop_tokens,
    cases=(
        Case(
            "2 sequences of 7 tokens, 12 experts on 3 devices, 4 a token, budget: the average",
            lambda: drop_case(18, 2, 7, (12, 4, 3, 2)),
        ),
        Case(
            "5 sequences of 6 tokens, of which the second is exempt; 10 experts on 5 devices, 3 a token, "
            "budget: 0.8 of the average",
            lambda: drop_case(14, 5, 6, (10, 3, 5, 2), 0.8, (False, True, False, False, False)),
        ),
        Case(
            "3 sequences of 8 tokens, of which 8, 3 and 5 are real and the last is exempt; 8 experts on 4 "
            "devices, 2 a token, budget: 1.1 of the average",
            lambda: drop_case(15, 3, 8, (8, 2, 4, 2), 1.1, (False, False, True), lengths(8, 8, 3, 5)),
        ),
    ),
    mistakes=(
        Mistake(
            "a budget for each expert",
            "Every expert got a budget of its own. The paper's is a device's: a busy expert may use what an "
            "idle neighbour on the same device leaves.",
            lambda routing, *a, **b: drop(
                routing, *a, **b, place=lambda ids, experts, devices: ids, places=routing.n_experts
            ),
        ),
        Mistake(
            "first come, first served",
            "Who came first was kept, whatever the affinity: the beginning of the batch crowds out its end. "
            "The pairs with the lowest affinity have to go.",
            lambda *a, **b: drop(*a, **b, affinity=in_order_of_arrival),
        ),
        Mistake(
            "the best dropped",
            "The pairs with the highest affinity were dropped. They matter most to their tokens, since an "
            "expert's output is weighted by the affinity.",
            lambda *a, **b: drop(*a, **b, affinity=torch.neg),
        ),
        Mistake(
            "one budget for all",
            "Affinities were ranked over all devices together. One device can then still be swamped, and "
            "the others wait for it.",
            lambda *a, **b: drop(*a, **b, place=lambda ids, experts, devices: 0 * ids, places=1),
        ),
        Mistake(
            "every n-th expert",
            "Experts were dealt out to the devices like cards: expert i on device i mod D. Device 0 holds "
            "the first E / D experts, device 1 the next.",
            lambda *a, **b: drop(*a, **b, place=lambda ids, experts, devices: ids % devices),
        ),
        Mistake(
            "sequence by sequence",
            "Each sequence got its own budget. A device computes the whole batch at once, and one sequence "
            "may take more where another takes less.",
            sequence_by_sequence,
        ),
        Mistake(
            "budget without K",
            "The budget counts tokens, one each. Each token brings K pairs, and with room for the tokens "
            "alone most of them would go.",
            lambda routing, *a, **b: drop(
                routing, *a, **b, pairs=lambda real: real.sum() / routing.expert_ids.shape[-1]
            ),
        ),
        Mistake(
            "budget of one sequence",
            "The budget is that of one sequence, for the whole batch. A device computes the pairs of all "
            "sequences.",
            lambda routing, *a, **b: drop(
                routing, *a, **b, pairs=lambda real: real.sum() / len(routing.expert_ids)
            ),
        ),
        Mistake(
            "whole tokens",
            "A token with one pair over the budget lost all its pairs. The others fit on their devices, and "
            "their experts would be idle.",
            whole_tokens,
        ),
        Mistake(
            "exempt sequences dropped",
            "The exempt sequences were treated like the others. They are kept whole, so that the model also "
            "learns from what it will see in evaluation, where nothing is dropped.",
            lambda routing, n_group, capacity_factor=1.0, exempt=None, mask=None: drop(
                routing, n_group, capacity_factor, None, mask
            ),
        ),
        Mistake(
            "only the exempt dropped",
            "The sequences that are exempt were dropped from, and the others kept whole.",
            lambda routing, n_group, capacity_factor=1.0, exempt=None, mask=None: drop(
                routing, n_group, capacity_factor, None if exempt is None else ~exempt, mask
            ),
        ),
        Mistake(
            "exempt sequences outside the budget",
            "The exempt sequences were kept on top of the budget. They are computed like the rest; what they "
            "take of it the others cannot have.",
            lambda *a, **b: drop(*a, **b, exempt_outside=True),
        ),
        Mistake(
            "weights for affinities",
            "The pairs were ranked by `routing.weights`. A router may have changed those (here they add up "
            "to 1 for each token); the affinities are in `routing.scores`.",
            lambda routing, *a, **b: drop(routing, *a, **b, affinity=lambda affinity: routing.weights),
        ),
        Mistake(
            "the plain budget alone",
            "This is right for a capacity factor of 1 with nothing exempt and no padding. `capacity_factor`, "
            "`exempt` and `mask` are not used yet; take them one at a time.",
            lambda routing, n_group, capacity_factor=1.0, exempt=None, mask=None: drop(routing, n_group),
        ),
        Mistake(
            "capacity factor not used",
            "The budget is the average itself; the capacity factor was not used.",
            lambda routing, n_group, capacity_factor=1.0, exempt=None, mask=None: drop(
                routing, n_group, 1.0, exempt, mask
            ),
        ),
        Mistake(
            "rounded up",
            "The budget was rounded up. A device computes at most its budget, so it is rounded down.",
            lambda *a, **b: drop(*a, **b, rounded=torch.ceil),
        ),
        Mistake(
            "padding in the average",
            "Padding was counted into the average, and the budget became larger than the real tokens need.",
            lambda *a, **b: drop(*a, **b, pairs=lambda real: float(real.numel())),
        ),
        Mistake(
            "padding kept",
            "Padding came out as kept. There is no token, and nothing of it is computed.",
            padding_kept,
        ),
        Mistake(
            "dropped, not kept",
            "This is True where a pair is dropped. Asked for is which pairs stay.",
            lambda *a, **b: ~drop(*a, **b),
        ),
    ),
    hints=(
        "Four devices, 40 pairs in the batch. How many pairs is each device's budget at a capacity factor of "
        "1.0? If one is asked for 14, how many go, and which? What happens to the spare room of another?",
        'The notebook\'s section "Token dropping" does it device by device. Real pairs of exempt sequences '
        "come first (give them an affinity of infinity), padding last (minus infinity). Within one device, "
        "sort by affinity and keep as many as the budget allows.",
        "affinity[b, t, j] = scores at expert_ids[b, t, j]                (gather along the last axis)\n"
        "budget = floor(capacity_factor * number of real pairs / n_group)\n"
        "exempt pairs: affinity = infinity; padding: -infinity\n"
        "for every device:\n"
        "    its pairs in the order of affinity, highest first; those from `budget` on are dropped,\n"
        "    but no exempt one\n"
        "kept = not dropped, and real",
    ),
    checked="a budget for each device over the whole batch, the lowest affinities dropped, exempt sequences "
    "kept within the budget, padding, and capacity factors other than 1",
    axes=("sequence", "token", "choice"),
    replaces=("dsv2.moe.balance.drop_tokens",),
)


EXERCISES: tuple[Exercise, ...] = (
    EXPERT_FREQUENCIES,
    EXPERT_BALANCE_LOSS,
    DEVICE_BALANCE_LOSS,
    DEVICE_REACH,
    COMMUNICATION_BALANCE_LOSS,
    DROP_TOKENS,
)
