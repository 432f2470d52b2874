"""The exercises of chapter 07: cases, right answers, plausible mistakes, hints."""

# B batch   T tokens   E experts   K experts per token   G devices   M devices per token   D hidden

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv2.course.chapters.routings import with_slope
from dsv2.course.spec import Case, Exercise, Mistake
from dsv2.moe import routing
from dsv2.moe.routing import Routing


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choices(seed: int, tokens: int, experts: int, k: int) -> Tensor:
    """(T, K): experts with favourites."""
    return (normal(seed, tokens, experts) + normal(seed + 1, experts)).topk(k, dim=-1).indices


def dealt(seed: int, experts: int, devices: int) -> Tensor:
    """(E,): a device for each expert, in no order; unevenly, and none on the last device."""
    random = torch.Generator().manual_seed(seed)
    return torch.cat([torch.arange(devices - 1), torch.randint(devices - 1, (experts,), generator=random)])[
        torch.randperm(experts, generator=random)
    ]


def goes(expert_ids: Tensor, device_of: Tensor, devices: int) -> Tensor:
    """(T, G): how many of a token's experts are on each device."""
    return torch.nn.functional.one_hot(device_of[expert_ids], devices).sum(dim=1)


# ------------------------------------------------------------ 07.1 to how many devices a token goes


def reached(
    homes: Callable[[Tensor, Tensor, int], Tensor] = lambda ids, device_of, devices: device_of[ids],
    count: Callable[[Tensor], Tensor] = lambda pairs: (pairs > 0).sum(dim=1),
) -> Callable[..., Tensor]:
    """An answer to 07.1. pairs: (T, G), how many of a token's experts live on each device."""

    def answer(expert_ids: Tensor, device_of: Tensor, devices: int) -> Tensor:
        found = homes(expert_ids, device_of, devices)
        return count(torch.nn.functional.one_hot(found, devices).sum(dim=1))

    return answer


def reach_case(seed: int, tokens: int, experts: int, k: int, devices: int) -> dict[str, Any]:
    return {
        "expert_ids": choices(seed, tokens, experts, k),
        "device_of": dealt(seed + 2, experts, devices),
        "devices": devices,
    }


def in_a_row(expert_ids: Tensor, device_of: Tensor, devices: int) -> Tensor:
    """Counts a device again where another one came between."""
    homes = device_of[expert_ids]
    return 1 + (homes[:, 1:] != homes[:, :-1]).sum(dim=1)


REACH = Exercise(
    number="07.1",
    name="reach",
    title="to how many devices a token goes",
    difficulty=1,
    minutes=10,
    answer=reached(),
    cases=(
        Case("9 tokens, 12 experts on 5 devices in no order, 4 a token", lambda: reach_case(1, 9, 12, 4, 5)),
        Case("7 tokens, 10 experts on 3 devices, 6 a token", lambda: reach_case(5, 7, 10, 6, 3)),
        Case("8 tokens, 15 experts on 6 devices, 2 a token", lambda: reach_case(9, 8, 15, 2, 6)),
    ),
    mistakes=(
        Mistake(
            "experts counted",
            "This is K for every token: experts were counted, and a device that holds two of them twice.",
            reached(count=lambda pairs: pairs.sum(dim=1)),
        ),
        Mistake(
            "the busiest device",
            "This is how many of a token's experts live together on one device, not on how many devices they "
            "are.",
            reached(count=lambda pairs: pairs.amax(dim=1)),
        ),
        Mistake(
            "blocks of neighbours",
            "The devices were computed from the experts' numbers, in equal blocks. device_of says where each "
            "one lives.",
            reached(lambda ids, device_of, devices: ids * devices // len(device_of)),
        ),
        Mistake(
            "every n-th expert",
            "Expert i was taken to live on device i mod devices. device_of says where each one lives.",
            reached(lambda ids, device_of, devices: ids % devices),
        ),
        Mistake(
            "first choice only",
            "Only the device of each token's first choice was counted.",
            reached(lambda ids, device_of, devices: device_of[ids[:, :1]]),
        ),
        Mistake(
            "all tokens together",
            "Every token got the same number: to how many devices all of them go together.",
            reached(count=lambda pairs: (pairs.sum(dim=0) > 0).sum().expand(len(pairs)).clone()),
        ),
        Mistake(
            "tokens of each device",
            "This counts how many tokens each device gets, not to how many devices each token goes.",
            reached(count=lambda pairs: (pairs > 0).sum(dim=0)),
        ),
        Mistake(
            "devices with one expert",
            "Devices that hold two or more of a token's experts were left out.",
            reached(count=lambda pairs: (pairs == 1).sum(dim=1)),
        ),
        Mistake(
            "one too few",
            "One device too few: the token's own device was taken out, or counting started from 0. All "
            "devices with one of its experts count.",
            reached(count=lambda pairs: (pairs > 0).sum(dim=1) - 1),
        ),
        Mistake(
            "changes in a row",
            "A device was counted anew whenever another one came between two of its experts. The order of "
            "the choices does not matter.",
            in_a_row,
        ),
        Mistake(
            "devices that are not reached",
            "This counts the devices that hold none of a token's experts.",
            reached(count=lambda pairs: (pairs == 0).sum(dim=1)),
        ),
    ),
    hints=(
        "A token has the experts 3, 8 and 9; device_of[3] is 1, device_of[8] is 0, device_of[9] is 1. Where "
        "does it go, and how often to device 1?",
        'The notebook\'s section "Who goes where" uses a set for every token. With tensors: device_of['
        "expert_ids] are the devices; write a 1 at them into zeros of the shape (tokens, devices).",
        "homes = device_of[expert_ids]                                        (tokens, k)\n"
        "goes = zeros (tokens, devices), with 1 at homes                      (scatter)\n"
        "result = goes summed over the devices",
    ),
    checked="every device once for a token, with experts on devices in any order",
    axes=("token",),
)


# ------------------------------------------------------------ 07.2 how many by chance


def missed(n_experts: int, devices: int, k: int) -> float:
    return math.comb(n_experts - n_experts // devices, k) / math.comb(n_experts, k)


EXPECTED_REACH = Exercise(
    number="07.2",
    name="expected_reach",
    title="how many devices by chance",
    difficulty=1,
    minutes=10,
    answer=lambda n_experts, devices, k: devices * (1 - missed(n_experts, devices, k)),
    cases=(
        Case("160 experts on 8 devices, 6 a token", lambda: {"n_experts": 160, "devices": 8, "k": 6}),
        Case("32 experts on 4 devices, 3 a token", lambda: {"n_experts": 32, "devices": 4, "k": 3}),
        Case("10 experts on 5 devices, 9 a token", lambda: {"n_experts": 10, "devices": 5, "k": 9}),
        Case("12 experts on one device, 7 a token", lambda: {"n_experts": 12, "devices": 1, "k": 7}),
    ),
    mistakes=(
        Mistake(
            "with repetition",
            "The k experts were drawn as if one could be chosen twice. They are k different ones, so that a "
            "device is missed a little less often.",
            lambda n_experts, devices, k: devices * (1 - (1 - 1 / devices) ** k),
        ),
        Mistake(
            "the probability of one device",
            "This is how likely one device is reached. There are `devices` of them to be added up.",
            lambda n_experts, devices, k: 1 - missed(n_experts, devices, k),
        ),
        Mistake(
            "devices that are missed",
            "This is how many devices are missed on average.",
            lambda n_experts, devices, k: devices * missed(n_experts, devices, k),
        ),
        Mistake(
            "the most possible",
            "This is the most there can be, the smaller of k and the number of devices.",
            lambda n_experts, devices, k: float(min(devices, k)),
        ),
        Mistake(
            "k times",
            "The probability was multiplied by k, not by the number of devices.",
            lambda n_experts, devices, k: k * (1 - missed(n_experts, devices, k)),
        ),
        Mistake(
            "all on one device",
            "This takes the sets that lie on one device entirely for those that miss it.",
            lambda n_experts, devices, k: (
                devices * (1 - math.comb(n_experts // devices, k) / math.comb(n_experts, k))
            ),
        ),
        Mistake(
            "one expert a device",
            "Only one expert was taken from the device in question; it holds n_experts / devices of them.",
            lambda n_experts, devices, k: (
                devices * (1 - math.comb(n_experts - 1, k) / math.comb(n_experts, k))
            ),
        ),
        Mistake(
            "rounded",
            "The expectation was rounded. It need not be a whole number.",
            lambda n_experts, devices, k: float(round(devices * (1 - missed(n_experts, devices, k)))),
        ),
    ),
    hints=(
        "10 experts on 2 devices, 3 are chosen. How many sets of 3 are there, and how many of them miss "
        "device 0, that is, are made from the other 5?",
        "math.comb(n, k) counts sets. The probability that a device is reached is 1 less the share of sets "
        "that miss it; each device is reached with the same probability, and expectations add up.",
        "others = n_experts - n_experts / devices          (a whole number)\n"
        "missed = comb(others, k) / comb(n_experts, k)\n"
        "result = devices * (1 - missed)",
    ),
    checked="sets of different experts, added up over the devices, also where a device cannot be missed",
    tolerance=1e-9,
)


# ------------------------------------------------------------ 07.3 which experts the limit leaves


def open_on(
    value: Callable[[Tensor], Tensor] = lambda blocks: blocks.amax(dim=-1),
    *,
    blocks: Callable[[Tensor, int], Tensor] = lambda scores, n: scores.unflatten(-1, (n, -1)),
    spread: Callable[[Tensor, int], Tensor] = lambda mask, each: mask.repeat_interleave(each, dim=-1),
    extra: int = 0,
    largest: bool = True,
) -> Callable[..., Tensor]:
    """An answer to 07.3: value makes a device's worth from its experts' affinities, the last axis."""

    def answer(scores: Tensor, n_group: int, topk_group: int) -> Tensor:
        worth = value(blocks(scores, n_group))
        most = min(topk_group + extra, n_group)
        chosen = worth.topk(most, dim=-1, largest=largest).indices
        mask = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, chosen, True)
        return spread(mask, scores.shape[-1] // n_group)

    return answer


def devices_of_best_experts(scores: Tensor, n_group: int, topk_group: int) -> Tensor:
    """The devices of the M best experts: fewer than M where two of them live together."""
    each = scores.shape[-1] // n_group
    homes = scores.topk(topk_group, dim=-1).indices // each
    mask = torch.zeros(*scores.shape[:-1], n_group, dtype=torch.bool).scatter(-1, homes, True)
    return mask.repeat_interleave(each, dim=-1)


def best_experts_only(scores: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Only the best expert of each of the M devices."""
    blocks = scores.unflatten(-1, (n_group, -1))
    right = routing.allowed_experts(scores, n_group, topk_group).unflatten(-1, (n_group, -1))
    return (right & (blocks == blocks.amax(dim=-1, keepdim=True))).flatten(-2)


def the_same_for_all(scores: Tensor, n_group: int, topk_group: int) -> Tensor:
    mean = scores.reshape(-1, scores.shape[-1]).mean(dim=0)
    return routing.allowed_experts(mean, n_group, topk_group).expand_as(scores).clone()


def first_devices(scores: Tensor, n_group: int, topk_group: int) -> Tensor:
    each = scores.shape[-1] // n_group
    return (torch.arange(scores.shape[-1]) < topk_group * each).expand_as(scores).clone()


def limit_case(
    seed: int, shape: tuple[int, ...], experts: int, n_group: int, topk_group: int
) -> dict[str, Any]:
    scores = normal(seed, *shape, experts, scale=1.5).softmax(dim=-1)
    return {"scores": scores, "n_group": n_group, "topk_group": topk_group}


ALLOWED_EXPERTS = Exercise(
    number="07.3",
    name="allowed_experts",
    title="which experts the limit leaves",
    difficulty=2,
    minutes=20,
    answer=routing.allowed_experts,
    cases=(
        Case(
            "2 sequences of 7 tokens, 15 experts on 5 devices, at most 2",
            lambda: limit_case(21, (2, 7), 15, 5, 2),
        ),
        Case(
            "3 sequences of 5 tokens, 8 experts on 4 devices, at most 3",
            lambda: limit_case(22, (3, 5), 8, 4, 3),
        ),
        Case("6 tokens, 12 experts on 3 devices, at most 1", lambda: limit_case(23, (6,), 12, 3, 1)),
        Case(
            "4 tokens, 9 experts on 3 devices, at most 2: as many devices as experts on each",
            lambda: limit_case(24, (4,), 9, 3, 2),
        ),
    ),
    mistakes=(
        Mistake(
            "sum of a device's affinities",
            "A device was judged by the sum of its experts' affinities. It is as good as its best expert: "
            "the token will not use the others.",
            open_on(lambda blocks: blocks.sum(dim=-1)),
        ),
        Mistake(
            "sum of the best two",
            "A device was judged by its two best experts. That is DeepSeek-V3's rule; V2 takes the best one.",
            open_on(lambda blocks: blocks.topk(min(2, blocks.shape[-1]), dim=-1).values.sum(dim=-1)),
        ),
        Mistake(
            "worst expert",
            "A device was judged by its worst expert.",
            open_on(lambda blocks: blocks.amin(dim=-1)),
        ),
        Mistake(
            "first expert of each device",
            "A device was judged by its first expert.",
            open_on(lambda blocks: blocks[..., 0]),
        ),
        Mistake(
            "devices of the M best experts",
            "These are the devices of the M best experts. Two of them may live together, and then the token "
            "has fewer devices than it may have.",
            devices_of_best_experts,
        ),
        Mistake(
            "best experts only",
            "Only the best expert of each chosen device is allowed. All experts there are.",
            best_experts_only,
        ),
        Mistake(
            "every n-th expert",
            "Experts were dealt out to the devices like cards. They lie in blocks of neighbours.",
            open_on(
                blocks=lambda scores, n: scores.unflatten(-1, (-1, n)).mT,
                spread=lambda mask, each: mask.repeat(*[1] * (mask.ndim - 1), each),
            ),
        ),
        Mistake(
            "spread out like cards",
            "The devices are right, but which experts they hold is not: the mask was repeated as a whole. A "
            "device's experts are neighbours.",
            open_on(spread=lambda mask, each: mask.repeat(*[1] * (mask.ndim - 1), each)),
        ),
        Mistake(
            "inverted",
            "True and False are swapped: True stands for what is allowed.",
            lambda scores, n_group, topk_group: ~routing.allowed_experts(scores, n_group, topk_group),
        ),
        Mistake(
            "one device too many",
            "One device more than M is allowed.",
            open_on(extra=1),
        ),
        Mistake(
            "the worst devices",
            "These are the M worst devices.",
            open_on(largest=False),
        ),
        Mistake(
            "the same devices for all",
            "All tokens got the devices that are best on average. Every token has its own.",
            the_same_for_all,
        ),
        Mistake(
            "the first M devices",
            "These are the devices 0 to M - 1, whatever the affinities.",
            first_devices,
        ),
    ),
    hints=(
        "4 devices hold 2 experts each; a token's affinities are 0.1 0.2 | 0.3 0.0 | 0.02 0.25 | 0.1 0.03. "
        "Which 2 devices may it go to, and how many of the 8 experts are then open to it?",
        'The notebook\'s section "At most M devices" does it for one token. unflatten(-1, (n_group, -1)) '
        "puts a "
        "device's experts on an axis of their own; repeat_interleave goes back from devices to experts.",
        "best = largest affinity on each device                    (..., devices)\n"
        "chosen = numbers of the topk_group largest of best\n"
        "may_go = False everywhere, True at chosen                 (..., devices)\n"
        "result = may_go, each entry repeated for the device's experts   (..., experts)",
    ),
    checked="devices by their best expert, blocks of neighbours, every token by itself",
    axes=(),
    replaces=("dsv2.moe.routing.allowed_experts",),
)


# ------------------------------------------------------------ 07.4 the choice among them


def limited(
    weigh: Callable[[Tensor], Tensor] = lambda weights: weights,
    *,
    fill: float = -torch.inf,
    allowed: Callable[..., Tensor] = routing.allowed_experts,
    keep: Callable[[Tensor, Tensor], Tensor] = lambda scores, allowed: scores,
    order: Callable[[Tensor, Tensor], Tensor] = lambda ids, scores: ids,
) -> Callable[..., Routing]:
    """An answer to 07.4."""

    def answer(scores: Tensor, k: int, n_group: int, topk_group: int) -> Routing:
        may = allowed(scores, n_group, topk_group)
        ids = order(scores.masked_fill(~may, fill).topk(k, dim=-1).indices, scores)
        return Routing(ids, weigh(scores.gather(-1, ids)), keep(scores, may))

    return answer


def equal_shares(scores: Tensor, k: int, n_group: int, topk_group: int) -> Routing:
    """k / M from each of the M best devices, as far as they go."""
    blocks = scores.unflatten(-1, (n_group, -1))
    rank = blocks.argsort(dim=-1, descending=True).argsort(dim=-1)
    first = (rank < -(-k // topk_group)).flatten(-2)
    may = routing.allowed_experts(scores, n_group, topk_group)
    # The best of each device first, then the others.
    ids = (scores + 1.0 * first).masked_fill(~may, -torch.inf).topk(k, dim=-1).indices
    return Routing(ids, scores.gather(-1, ids), scores)


def from_masked(scores: Tensor, k: int, n_group: int, topk_group: int) -> Routing:
    """Right ids, and weights after a new softmax over the allowed ones."""
    may = routing.allowed_experts(scores, n_group, topk_group)
    again = scores.masked_fill(~may, 0.0)
    again = again / again.sum(dim=-1, keepdim=True)
    made = routing.device_limited_top_k(scores, k, n_group, topk_group)
    return Routing(made.expert_ids, again.gather(-1, made.expert_ids), scores)


def choice_case(seed: int, batch: int, tokens: int, sizes: tuple[int, int, int, int]) -> dict[str, Any]:
    """sizes: experts, k, devices, most devices."""
    experts, k, n_group, topk_group = sizes
    scores = normal(seed, batch, tokens, experts, scale=1.5).softmax(dim=-1)
    return {"scores": scores, "k": k, "n_group": n_group, "topk_group": topk_group}


def underflow_case(seed: int, tokens: int) -> dict[str, Any]:
    """5 devices with 3 experts each, of which a token takes the 3 on its best device: one has affinity 0.

    No more than one, so that there is a single right answer: the order of equal affinities is anybody's.
    """
    random = torch.Generator().manual_seed(seed)
    scores = 0.1 + 0.1 * torch.rand(tokens, 5, 3, generator=random)
    token = torch.arange(tokens)
    best = 0.5 + torch.rand(tokens, 3, generator=random)
    best[token, token % 3] = 0.0
    scores[token, 2 * token % 5] = best
    scores = scores.flatten(1)[None]
    return {"scores": scores / scores.sum(dim=-1, keepdim=True), "k": 3, "n_group": 5, "topk_group": 1}


DEVICE_LIMITED_TOP_K = Exercise(
    number="07.4",
    name="device_limited_top_k",
    title="the choice on at most M devices",
    difficulty=2,
    minutes=15,
    answer=routing.device_limited_top_k,
    run=with_slope,
    cases=(
        Case(
            "2 sequences of 7 tokens, 15 experts on 5 devices, 4 a token on at most 2",
            lambda: choice_case(31, 2, 7, (15, 4, 5, 2)),
        ),
        Case(
            "3 sequences of 5 tokens, 8 experts on 4 devices, 5 a token on at most 3",
            lambda: choice_case(32, 3, 5, (8, 5, 4, 3)),
        ),
        Case(
            "1 sequence of 6 tokens, 15 experts on 5 devices, 3 a token on one, where one affinity is 0",
            lambda: underflow_case(33, 6),
        ),
    ),
    mistakes=(
        Mistake(
            "forbidden experts at 0",
            "Forbidden experts were given 0. Where an allowed affinity is 0 as well, one of them can be "
            "chosen, and the token goes to a device that it must not go to.",
            limited(fill=0.0),
        ),
        Mistake(
            "no limit",
            "These are the k best of all experts: the limit was not applied.",
            limited(allowed=lambda scores, n, m: torch.ones_like(scores, dtype=torch.bool)),
        ),
        Mistake(
            "weights of sum 1",
            "The weights were divided by their sum. They are affinities as they are.",
            limited(lambda weights: weights / weights.sum(dim=-1, keepdim=True)),
        ),
        Mistake(
            "weights among the allowed",
            "Affinities were divided by the sum over the allowed experts. The softmax is over all experts.",
            from_masked,
        ),
        Mistake(
            "softmax once more",
            "A softmax was taken over the chosen affinities. They are shares already.",
            limited(lambda weights: weights.softmax(dim=-1)),
        ),
        Mistake(
            "no gradient",
            "The weights carry no gradient, so that the router learns nothing.",
            limited(lambda weights: weights.detach()),
        ),
        Mistake(
            "scores of the allowed only",
            "scores came back with zeros at forbidden experts. The balance losses need all affinities as "
            "they were.",
            limited(keep=lambda scores, allowed: scores.masked_fill(~allowed, 0.0)),
        ),
        Mistake(
            "equal shares for the devices",
            "The choice takes its experts evenly from the M devices. Inside them the best are taken, "
            "wherever they live.",
            equal_shares,
        ),
        Mistake(
            "devices by their sum",
            "The devices were judged by the sum of their experts' affinities, not by the best.",
            limited(allowed=open_on(lambda blocks: blocks.sum(dim=-1))),
        ),
        Mistake(
            "devices of the M best experts",
            "The devices of the M best experts were allowed. Two of them may live together, and then there "
            "are fewer than M.",
            limited(allowed=devices_of_best_experts),
        ),
        Mistake(
            "ordered by number",
            "The right experts, ordered by their numbers. expert_ids is to be best first.",
            limited(order=lambda ids, scores: ids.sort(dim=-1).values),
        ),
        Mistake(
            "the worst first",
            "The right experts, the worst of them first.",
            limited(order=lambda ids, scores: ids.flip(-1)),
        ),
    ),
    hints=(
        "A token's allowed experts have the affinities 0.9 and 0.0, its forbidden ones 0.1 and 0.0. It "
        "takes 2. What must be put in the place of the forbidden affinities so that topk cannot take one?",
        "allowed_experts of 07.3 says what is open; masked_fill puts a number at what is not; topk gives the "
        "indices. The weights are then gathered from the affinities that came in.",
        "allowed = allowed_experts(scores, n_group, topk_group)\n"
        "expert_ids = numbers of the k largest of (scores, with -inf where not allowed)\n"
        "weights = scores at expert_ids                            (gather over the last axis)\n"
        "result = Routing(expert_ids, weights, scores)",
    ),
    checked="the limit, also where affinities are 0, the order, the affinities as weights, and their "
    "gradient",
    axes={
        "expert_ids": ("sequence", "token", "slot"),
        "weights": ("sequence", "token", "slot"),
        "scores": ("sequence", "token", "expert"),
        "the gradient of weights by scores": ("sequence", "token", "expert"),
    },
    replaces=("dsv2.moe.routing.device_limited_top_k",),
)


# ------------------------------------------------------------ 07.5 the messages


def counted(
    sent: Callable[[Tensor], Tensor] = lambda pairs: (pairs > 0).long(),
    *,
    homes: Callable[[Tensor, int], Tensor] = lambda home, devices: home,
    own: Callable[[Tensor], Tensor] = lambda counts: counts - counts.diag().diag(),
    device: Callable[[Tensor, int], Tensor] = lambda device_of, devices: device_of,
) -> Callable[..., Tensor]:
    """An answer to 07.5. pairs: (T, G), how many of a token's experts live on each device."""

    def answer(expert_ids: Tensor, home: Tensor, device_of: Tensor, devices: int) -> Tensor:
        pairs = goes(expert_ids, device(device_of, devices), devices)
        counts = torch.zeros(devices, devices, dtype=torch.long)
        return own(counts.index_add(0, homes(home, devices), sent(pairs)))

    return answer


def message_case(seed: int, tokens: int, experts: int, k: int, devices: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    return {
        "expert_ids": choices(seed, tokens, experts, k),
        "home": torch.randint(devices, (tokens,), generator=random),
        "device_of": dealt(seed + 2, experts, devices),
        "devices": devices,
    }


MESSAGE_COUNTS = Exercise(
    number="07.5",
    name="message_counts",
    title="what the devices send each other",
    difficulty=2,
    minutes=20,
    answer=counted(),
    cases=(
        Case(
            "14 tokens on 4 devices, 9 experts, 3 a token; one device holds no expert",
            lambda: message_case(41, 14, 9, 3, 4),
        ),
        Case("5 tokens on 6 devices, 16 experts, 7 a token", lambda: message_case(44, 5, 16, 7, 6)),
        Case("11 tokens on 3 devices, 8 experts, 2 a token", lambda: message_case(47, 11, 8, 2, 3)),
    ),
    mistakes=(
        Mistake(
            "a message for each expert",
            "A token was sent once for every expert it has on a device. One hidden state is enough for all "
            "of them.",
            counted(lambda pairs: pairs),
        ),
        Mistake(
            "from and to swapped",
            "Rows and columns are swapped: entry (a, b) is what a sends to b.",
            counted(own=lambda counts: (counts - counts.diag().diag()).mT),
        ),
        Mistake(
            "what stays at home counted",
            "The diagonal counts tokens that have an expert on their own device. Nothing is sent for them.",
            counted(own=lambda counts: counts),
        ),
        Mistake(
            "a message for each expert, home included",
            "Every pair of token and expert was counted, also those that stay on their device.",
            counted(lambda pairs: pairs, own=lambda counts: counts),
        ),
        Mistake(
            "tokens in equal blocks",
            "The tokens were taken to lie on the devices in equal blocks. home says where each one is.",
            counted(homes=lambda home, devices: torch.arange(len(home)) * devices // len(home)),
        ),
        Mistake(
            "tokens in turn",
            "The tokens were taken to lie on the devices in turn. home says where each one is.",
            counted(homes=lambda home, devices: torch.arange(len(home)) % devices),
        ),
        Mistake(
            "experts in equal blocks",
            "The experts were taken to lie on the devices in equal blocks. device_of says where each one is.",
            counted(
                device=lambda device_of, devices: torch.arange(len(device_of)) * devices // len(device_of)
            ),
        ),
        Mistake(
            "there and back",
            "The way back was added. Asked for is what is sent to the experts.",
            counted(own=lambda counts: (counts - counts.diag().diag()) + (counts - counts.diag().diag()).mT),
        ),
        Mistake(
            "whether, not how many",
            "This says whether one device sends anything to another, not how many hidden states.",
            counted(own=lambda counts: ((counts - counts.diag().diag()) > 0).long()),
        ),
        Mistake(
            "to every device",
            "Every token was sent to all devices.",
            counted(lambda pairs: torch.ones_like(pairs)),
        ),
        Mistake(
            "first choice only",
            "Only the first choice of each token was counted.",
            lambda expert_ids, home, device_of, devices: counted()(
                expert_ids[:, :1], home, device_of, devices
            ),
        ),
    ),
    hints=(
        "A token lies on device 2 and has experts on the devices 0, 0, 2 and 3. Which entries of the matrix "
        "does it raise, and by how much?",
        'The notebook\'s section "Every message" draws them. The (tokens, devices) table of 07.1 has a 1 '
        "where a token goes; index_add adds its rows up by the device that holds the token.",
        "goes = zeros (tokens, devices), with 1 at device_of[expert_ids]\n"
        "counts = zeros (devices, devices); row home[t] gets goes[t] added, for every token t\n"
        "the diagonal is set to 0",
    ),
    checked="one message for a token and device, from the token's own device, nothing for what stays",
    axes=("from device", "to device"),
)


# ------------------------------------------------------------ 07.6 a layer over several devices, with a bug


def on_devices(
    came: Callable[[Tensor], Tensor] = lambda here: here.any(dim=1).nonzero().squeeze(1),
    *,
    gates: Callable[[Tensor, Tensor], Tensor] = lambda weights, here: weights * here,
    send_back: Callable[[Tensor], Tensor] = lambda results: results.sum(dim=1),
    number: Callable[[Tensor], int] = len,
    overwrite: bool = False,
    to: Callable[[Tensor], Tensor] = lambda token: token,
) -> Callable[..., tuple[Tensor, list[int]]]:
    """An answer to 07.6. came: the tokens that a device gets, from its pairs (T, K)."""

    def answer(x, expert_ids, weights, w, device_of, devices):
        out, received = torch.zeros_like(x), []
        for device in range(devices):
            here = device_of[expert_ids] == device
            token = came(here)
            results = torch.einsum("th, tkhg -> tkg", x[token], w[expert_ids[token]])
            back = send_back(results * gates(weights, here)[token, :, None])
            out = out.index_copy(0, to(token), back) if overwrite else out.index_add(0, to(token), back)
            received.append(number(token))
        return out, received

    return answer


def layer_case(seed: int, tokens: int, hidden: int, experts: int, k: int, devices: int) -> dict[str, Any]:
    return {
        "x": normal(seed, tokens, hidden),
        "expert_ids": choices(seed + 1, tokens, experts, k),
        "weights": normal(seed + 3, tokens, k).sigmoid(),
        "w": normal(seed + 4, experts, hidden, hidden, scale=hidden**-0.5),
        "device_of": dealt(seed + 5, experts, devices),
        "devices": devices,
    }


RUN_ON_DEVICES = Exercise(
    number="07.6",
    name="run_on_devices",
    title="a layer on several devices, with a bug",
    difficulty=2,
    minutes=15,
    answer=on_devices(),
    given="a message for each pair",
    cases=(
        Case(
            "8 tokens, vectors of 5, 9 experts on 4 devices, 3 a token",
            lambda: layer_case(51, 8, 5, 9, 3, 4),
        ),
        Case(
            "6 tokens, vectors of 4, 10 experts on 3 devices, 5 a token",
            lambda: layer_case(57, 6, 4, 10, 5, 3),
        ),
        Case(
            "7 tokens, vectors of 3, 12 experts on 6 devices, 2 a token",
            lambda: layer_case(63, 7, 3, 12, 2, 6),
        ),
    ),
    mistakes=(
        Mistake(
            "a message for each pair",
            "A device gets a token once for each of its experts, and every time it runs all of them: where "
            "two of a token's experts live together, its result is counted twice.",
            on_devices(lambda here: here.nonzero()[:, 0]),
        ),
        Mistake(
            "every token to every device",
            "The sum is right, but every device got every token. Only those with an expert there are sent.",
            on_devices(lambda here: torch.arange(len(here))),
        ),
        Mistake(
            "experts of other devices run",
            "Each device ran all of a token's experts, not only its own: the result is counted once for "
            "every device the token goes to.",
            on_devices(gates=lambda weights, here: weights),
        ),
        Mistake(
            "weights left out",
            "What the experts give was added up without the weights.",
            on_devices(gates=lambda weights, here: here.float()),
        ),
        Mistake(
            "the last device stays",
            "What comes back from a device took the place of what was there. It is added to it.",
            on_devices(overwrite=True),
        ),
        Mistake(
            "mean of a device's experts",
            "A device sent back the mean over its slots, not the sum.",
            on_devices(send_back=lambda results: results.mean(dim=1)),
        ),
        Mistake(
            "the best of a device's experts",
            "A device sent back only what the first of a token's experts on it gave.",
            on_devices(
                gates=lambda weights, here: weights * (here & (here.cumsum(dim=1) == 1)),
            ),
        ),
        Mistake(
            "tokens by position",
            "What came back was added to the first tokens, in the order in which it came, not to those it "
            "belongs to.",
            on_devices(to=lambda token: torch.arange(len(token))),
        ),
        Mistake(
            "weights of sum 1 on each device",
            "Each device divided its weights by their sum: a token then gets a full share from every device.",
            on_devices(
                gates=lambda weights, here: (
                    weights * here / (weights * here).sum(dim=1, keepdim=True).clamp(min=1e-9)
                )
            ),
        ),
        Mistake(
            "one received too many",
            "The result is right; the number of hidden states each device got is one too high.",
            on_devices(number=lambda token: len(token) + 1),
        ),
    ),
    hints=(
        "A token has both its experts on device 2. How often does it stand in `token` there, and how often "
        "is the sum over its experts added to out?",
        "Print `token` for one device. Should a token be in it twice?",
        "token = the tokens for which any of the k pairs is here, each once\nthe rest as it stands",
    ),
    checked="the sum, each token once on a device, and the number of hidden states received",
    axes=(("token", "hidden"), ()),
)

EXERCISES = (
    REACH,
    EXPECTED_REACH,
    ALLOWED_EXPERTS,
    DEVICE_LIMITED_TOP_K,
    MESSAGE_COUNTS,
    RUN_ON_DEVICES,
)
