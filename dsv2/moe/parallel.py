"""Expert parallelism: where the experts live, and how tokens get to them and back.

Every device holds some experts and some tokens. A token is sent once to each device that holds at least one
of its chosen experts, with the numbers and weights of those experts (dispatch); the device sends back one
hidden state, the weighted sum over them; the token's own device adds up what comes back (combine). With
device-limited routing a token goes to at most M devices, so a device with T tokens sends at most M T hidden
states.

What is sent is described once; two back ends carry it: `FakeDevices`, all devices in one process, and
`ProcessGroup`, one process a device and all-to-all between them.

Source: DeepSeek-V2, arXiv 2405.04434, sections 2.2.2 and 2.2.3.
"""

# n tokens of one device (T in the paper)   D hidden_size   E routed experts   K experts per token
# L experts on one device   G devices   I moe_intermediate_size
# R messages: (token, device) pairs, one hidden state each

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv2.moe.experts import RoutedExperts, run_experts

# ---------------------------------------------------------------------------------------- who holds what


@dataclass(frozen=True)
class Placement:
    """Which of `devices` devices holds each routed expert; any assignment, a device may hold none.

    Raises ValueError where an expert's device does not exist.
    """

    device_of: Sequence[int]
    devices: int

    def __post_init__(self):
        object.__setattr__(self, "device_of", tuple(self.device_of))
        if self.devices < 1:
            raise ValueError(f"there must be at least one device, not devices={self.devices}")
        if not self.device_of:
            raise ValueError("device_of is empty: it names the device of every routed expert")
        for expert, device in enumerate(self.device_of):
            if not 0 <= device < self.devices:
                raise ValueError(
                    f"device_of places expert {expert} on device {device}; "
                    f"devices={self.devices} are numbered 0 to {self.devices - 1}"
                )

    @classmethod
    def even(cls, n_experts: int, devices: int) -> Placement:
        """Expert i on device i G // E, as `routing.allowed_experts` has it."""
        return cls(tuple(i * devices // n_experts for i in range(n_experts)), devices)

    @property
    def n_experts(self) -> int:
        return len(self.device_of)

    def experts_on(self, device: int) -> tuple[int, ...]:
        """The experts that a device holds, in the order of its stacked weights."""
        return tuple(i for i, home in enumerate(self.device_of) if home == device)

    def reach(self, expert_ids: Int[Tensor, "*tokens K"]) -> Int[Tensor, "*tokens"]:
        """To how many devices each token goes, its own among them if it is one: at most M."""
        homes = _homes(self, expert_ids.device)[0][expert_ids]
        return F.one_hot(homes, self.devices).amax(dim=-2).sum(dim=-1)

    def local(self, experts: RoutedExperts, device: int) -> RoutedExperts:
        """A copy of the experts that one device holds, which is what its process trains."""
        mine = list(self.experts_on(device))
        width, hidden_size = experts.w_gate_up.shape[1] // 2, experts.w_gate_up.shape[2]
        local = RoutedExperts(len(mine), hidden_size, width).to(experts.w_down)
        with torch.no_grad():
            local.w_gate_up.copy_(experts.w_gate_up[mine])
            local.w_down.copy_(experts.w_down[mine])
        return local


@lru_cache(maxsize=64)
def _homes(placement: Placement, on: torch.device) -> tuple[Tensor, Tensor]:
    """(E,) twice: the device of every expert, and where it stands among the experts of that device."""
    homes = placement.device_of
    places = [homes[:i].count(home) for i, home in enumerate(homes)]
    return torch.tensor(homes, device=on), torch.tensor(places, device=on)


# ------------------------------------------------------------------------------------------ what is sent


@dataclass(frozen=True)
class Dispatch:
    """What one device sends: a message for each token and device. Ordered by device, then token.

    tokens: (R,), whose hidden state each message carries. asked: (R, K), which of the token's K experts it
    asks for. counts: (G, 2), how many messages, and how many experts asked for, go to each device.
    """

    tokens: Int[Tensor, " R"]
    asked: Bool[Tensor, "R K"]
    counts: Int[Tensor, "G 2"]

    def numbers(self, expert_ids: Int[Tensor, "n K"]) -> Int[Tensor, "R K_plus_1"]:
        """The token's number and those of its experts, as they are sent: int32; not asked for is -1."""
        ids = torch.where(self.asked, expert_ids.index_select(0, self.tokens), -1)
        return torch.cat([self.tokens[:, None], ids], dim=1).int()

    def gates(self, weights: Float[Tensor, "n K"]) -> Float[Tensor, "R K"]:
        """The weights of the experts asked for, as they are sent; 0 for the others."""
        return torch.where(self.asked, weights.index_select(0, self.tokens), 0)


def plan_dispatch(
    expert_ids: Int[Tensor, "n K"], placement: Placement, kept: Bool[Tensor, "n K"] | None = None
) -> Dispatch:
    """One message per token and device that holds one of its experts. Dropped pairs are not sent."""
    homes = _homes(placement, expert_ids.device)[0][expert_ids]
    if kept is not None:
        homes = torch.where(kept, homes, placement.devices)  # nowhere
    wanted = F.one_hot(homes, placement.devices + 1)[..., :-1].sum(dim=1)  # (n, G): experts of a token there
    device, tokens = wanted.T.nonzero(as_tuple=True)
    counts = torch.stack([wanted.count_nonzero(dim=0), wanted.sum(dim=0)], dim=1)
    return Dispatch(tokens, homes.index_select(0, tokens) == device[:, None], counts)


@dataclass(frozen=True)
class Inbox:
    """What one device has received. Messages are ordered by source, then token.

    counts: how many messages came from each device. tokens: (R,), the token's number there. expert_ids:
    (R, K), the experts a message asks for (numbered among all E), -1 where there is none. weights: (R, K),
    what to multiply their outputs by.
    """

    counts: Sequence[int]
    tokens: Int[Tensor, " R"]
    expert_ids: Int[Tensor, "R K"]
    weights: Float[Tensor, "R K"]

    @property
    def source(self) -> list[int]:
        """The device that each message comes from."""
        return [device for device, count in enumerate(self.counts) for _ in range(count)]

    def messages(self) -> Iterator[tuple[int, int, list[int], list[float]]]:
        """Message by message: source device, token, expert ids, weights."""
        parts = (part.tolist() for part in (self.tokens, self.expert_ids, self.weights))
        for source, token, ids, weights in zip(self.source, *parts):
            asked = [slot for slot, i in enumerate(ids) if i >= 0]
            yield source, token, [ids[slot] for slot in asked], [weights[slot] for slot in asked]


def run_inbox(
    states: Float[Tensor, "R D"],
    inbox: Inbox,
    pairs: int,
    placement: Placement,
    w_gate_up: Float[Tensor, "L twoI D"],
    w_down: Float[Tensor, "L D I"],
) -> Float[Tensor, "R D"]:
    """sum_i g_i FFN_i(u) over one device's experts i, for every message (a part of equation 20's sum).

    pairs: how many experts are asked for in all.
    """
    _, places = _homes(placement, states.device)
    asked = inbox.expert_ids >= 0
    local_ids = places[inbox.expert_ids.clamp(min=0)]
    stacks = w_gate_up.to(states.dtype), w_down.to(states.dtype)
    return run_experts(states, local_ids, inbox.weights, *stacks, kept=asked, count=pairs)


def combine(
    results: Float[Tensor, "R D"], plan: Dispatch, counts: Sequence[int], n: int
) -> Float[Tensor, "n D"]:
    """Add up what came back for each of the n tokens, in the order of the devices; counts: from each."""
    out = results.new_zeros(n, results.shape[1])
    for tokens, rows in zip(plan.tokens.split(counts), results.split(counts)):
        out.index_add_(0, tokens, rows)  # a token comes once from a device: nothing to race for
    return out


# --------------------------------------------------------------------------------------- what it amounts to

HIDDEN = ("dispatch", "combine")  # hidden states to the experts, and back
KINDS = (*HIDDEN, "metadata", *(f"{kind} gradient" for kind in (*HIDDEN, "metadata")))


class Traffic:
    """What went from device to device, added up since the last `reset`.

    Kinds: "dispatch" and "combine" are the hidden states to the experts and back; "metadata" are the counts,
    token and expert numbers, and weights; "dispatch gradient", "combine gradient" and "metadata gradient" go
    the reverse ways in the backward pass. What stays on its own device is not traffic, and left out unless
    `own` is true. Several kinds are added up; none named means both kinds of hidden states.
    """

    def __init__(self, devices: int):
        self.counts = torch.zeros(len(KINDS), 2, devices, devices, dtype=torch.int64)  # 2: rows, bytes

    def reset(self) -> None:
        self.counts.zero_()

    def count(self, kind: str, source: int, tensor: Tensor, rows: list[int]) -> None:
        """Note that `source` sends the tensor's first rows[0] rows to device 0, the next to device 1, ..."""
        row = torch.tensor(rows)
        width = tensor.shape[1:].numel() * tensor.element_size()
        self.counts[KINDS.index(kind), :, source] += torch.stack([row, row * width])

    def rows(self, *kinds: str, own: bool = False) -> Int[Tensor, "G G"]:
        """How many rows (of hidden kinds: hidden states) went from each device, down, to each, across."""
        return self._sum(0, kinds, own)

    def bytes(self, *kinds: str, own: bool = False) -> Int[Tensor, "G G"]:
        """How many bytes went from each device, down, to each, across."""
        return self._sum(1, kinds, own)

    def sent(self, *kinds: str) -> Int[Tensor, " G"]:
        """Bytes that left each device."""
        return self.bytes(*kinds).sum(dim=1)

    def received(self, *kinds: str) -> Int[Tensor, " G"]:
        """Bytes that reached each device from others."""
        return self.bytes(*kinds).sum(dim=0)

    def largest_share(self, *kinds: str) -> float:
        """The busiest device's part of all that was received: 1 / G at balance, 0 if there was nothing."""
        received = self.received(*kinds)
        return float(received.max() / received.sum().clamp(min=1))

    def _sum(self, unit: int, kinds: tuple[str, ...], own: bool) -> Tensor:
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"kind={kind!r} of traffic is unknown; there are {', '.join(KINDS)}")
        total = sum(self.counts[KINDS.index(kind), unit] for kind in kinds or HIDDEN)
        return total.clone() if own else total - total.diag().diag()


# --------------------------------------------------------------------------------------- who carries it


class Devices:
    """G devices, `here` the numbers of those in this process. Lists of tensors have one for each of `here`.

    traffic: what this process's devices have sent. inboxes: what they received in the last run.
    """

    def __init__(self, size: int, here: Sequence[int]):
        self.size, self.here = size, here
        self.traffic = Traffic(size)
        self.inboxes: list[Inbox] = []

    def exchange(
        self, kind: str, outgoing: list[Tensor], send: list[list[int]], receive: list[list[int]]
    ) -> list[Tensor]:
        """All-to-all with a gradient: the reverse exchange.

        send: of each device here, how many of its rows go to devices 0, 1, ...; receive: how many come from
        them. Rows keep their order; those that arrive are ordered by source.
        """
        return list(_Exchange.apply(self, kind, send, receive, *outgoing))

    def move(
        self, kind: str, outgoing: list[Tensor], send: list[list[int]], receive: list[list[int]]
    ) -> list[Tensor]:
        """`exchange` without a gradient."""
        for device, tensor, rows in zip(self.here, outgoing, send):
            self.traffic.count(kind, device, tensor, rows)
        return self._all_to_all(outgoing, send, receive)

    def all_traffic(self) -> Traffic:
        """What all devices have sent, not only those here."""
        return self.traffic

    def _all_to_all(self, outgoing, send, receive) -> list[Tensor]:
        raise NotImplementedError

    def share(
        self, n: int, tokens: Sequence[int] | None, experts: RoutedExperts, placement: Placement
    ) -> tuple[list[int], list[tuple[Tensor, ...]]]:
        """How many of this process's n tokens each device here holds; `w_gate_up` and `w_down` of each."""
        raise NotImplementedError


class _Exchange(torch.autograd.Function):
    # The backward passes of several exchanges must meet each other on all processes. They do: autograd takes
    # what was recorded last first, and every process records the same exchanges in the same order.
    @staticmethod
    def forward(ctx, devices, kind, send, receive, *outgoing):
        ctx.devices, ctx.kind, ctx.send, ctx.receive = devices, kind, send, receive
        return tuple(devices.move(kind, list(outgoing), send, receive))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        grads = ctx.devices.move(f"{ctx.kind} gradient", list(grads), ctx.receive, ctx.send)
        return None, None, None, None, *grads


class FakeDevices(Devices):
    """`size` devices inside this process, which holds all tokens and all experts."""

    def __init__(self, size: int):
        if size < 1:
            raise ValueError(f"there must be at least one device, not size={size}")
        super().__init__(size, range(size))

    def _all_to_all(self, outgoing, send, receive):
        parts = [tensor.split(rows) for tensor, rows in zip(outgoing, send)]
        return [torch.cat([part[device] for part in parts]) for device in self.here]

    def share(self, n, tokens, experts, placement):
        if tokens is None:
            tokens = [n // self.size + (device < n % self.size) for device in self.here]
        if len(tokens) != self.size or sum(tokens) != n or min(tokens) < 0:
            raise ValueError(f"tokens={list(tokens)} must share out {n} tokens over {self.size} devices")
        if len(experts.w_down) != placement.n_experts:
            raise ValueError(
                f"the placement is for {placement.n_experts} experts; there are {len(experts.w_down)}"
            )
        held = [placement.experts_on(device) for device in self.here]
        order = [i for mine in held for i in mine]
        stacks = [experts.w_gate_up, experts.w_down]
        if order != sorted(order):  # else no copy
            stacks = [w.index_select(0, torch.tensor(order, device=w.device)) for w in stacks]
        return list(tokens), list(zip(*[w.split([len(mine) for mine in held]) for w in stacks]))


class ProcessGroup(Devices):
    """One device a process: gloo on CPUs, NCCL on GPUs. Each holds its own tokens and its own experts only.

    group: a group of torch.distributed, for example `mesh.get_group("expert")`; None: all processes. Every
    process of the group must take part in every run, forward and backward, also without tokens or experts,
    and the same things must require gradients on all of them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed is not initialised: call init_process_group, see torchrun")
        super().__init__(dist.get_world_size(group), [dist.get_rank(group)])
        self.group = group

    def _all_to_all(self, outgoing, send, receive):
        (tensor,), (rows_out,), (rows_in,) = outgoing, send, receive
        arrived = tensor.new_empty(sum(rows_in), *tensor.shape[1:])
        dist.all_to_all_single(arrived, tensor.contiguous(), rows_in, rows_out, group=self.group)
        return [arrived]

    def all_traffic(self) -> Traffic:
        """What all devices have sent. All processes must ask for it."""
        on = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        total = Traffic(self.size)
        counts = self.traffic.counts.to(on, copy=True)
        dist.all_reduce(counts, group=self.group)
        total.counts = counts.cpu()
        return total

    def share(self, n, tokens, experts, placement):
        if tokens is not None:
            raise ValueError("tokens is for FakeDevices; a process passes its own tokens as x")
        mine = placement.experts_on(self.here[0])
        # Of a weight that is spread over processes (dsv2.train), the part that is here.
        stacks = [w.to_local() if hasattr(w, "to_local") else w for w in (experts.w_gate_up, experts.w_down)]
        if len(stacks[0]) != len(mine):
            raise ValueError(
                f"device {self.here[0]} holds {len(mine)} of {placement.n_experts} experts by the placement, "
                f"but the weights of {len(stacks[0])} were passed; Placement.local takes its own out"
            )
        return [n], [tuple(stacks)]


# ------------------------------------------------------------------------------------------- all together


class ExpertParallel:
    """What `RoutedExperts.forward` computes, by experts that live on several devices.

    Raises ValueError where the placement is for another number of devices.
    """

    def __init__(self, placement: Placement, devices: Devices):
        if placement.devices != devices.size:
            raise ValueError(f"the placement is for {placement.devices} devices; there are {devices.size}")
        self.placement, self.devices = placement, devices

    def __call__(
        self,
        experts: RoutedExperts,
        x: Float[Tensor, "n D"],
        expert_ids: Int[Tensor, "n K"],
        weights: Float[Tensor, "n K"],
        kept: Bool[Tensor, "n K"] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> Float[Tensor, "n D"]:
        """sum_i g_{i,t} FFN_i(u_t) for this process's tokens, differentiable in x, weights and experts.

        expert_ids: among all E, on every device. experts: with `FakeDevices` all of them, with `ProcessGroup`
        those of `placement.experts_on(rank)`. tokens: with `FakeDevices`, how many of the n tokens each
        device holds, in order; as evenly as possible if not given. Raises ValueError where these do not fit.
        """
        devices, placement = self.devices, self.placement
        sizes, local_weights = devices.share(len(x), tokens, experts, placement)
        x, weights, ids = x.split(sizes), weights.split(sizes), expert_ids.split(sizes)
        masks = [None] * len(sizes) if kept is None else kept.split(sizes)
        plans = [plan_dispatch(i, placement, mask) for i, mask in zip(ids, masks)]

        # First, how much will come: one row from everyone to everyone.
        once = [[1] * devices.size for _ in plans]
        counts = devices.move("metadata", [plan.counts for plan in plans], once, once)
        both = [torch.stack([plan.counts.T, came.T]).tolist() for plan, came in zip(plans, counts)]
        to, by = [sent[0] for sent, _ in both], [came[0] for _, came in both]
        asked = [sum(pairs) for _, (_, pairs) in both]

        states = [own.index_select(0, plan.tokens) for own, plan in zip(x, plans)]
        states = devices.exchange("dispatch", states, to, by)
        numbers = devices.move("metadata", [plan.numbers(i) for i, plan in zip(ids, plans)], to, by)
        gates = devices.exchange("metadata", [plan.gates(g) for g, plan in zip(weights, plans)], to, by)

        inboxes = [
            Inbox(count, number[:, 0], number[:, 1:], g) for count, number, g in zip(by, numbers, gates)
        ]
        results = [
            run_inbox(u, inbox, pairs, placement, *local)
            for u, inbox, pairs, local in zip(states, inboxes, asked, local_weights)
        ]
        devices.inboxes = [replace(inbox, weights=inbox.weights.detach()) for inbox in inboxes]
        results = devices.exchange("combine", results, by, to)
        return torch.cat([combine(*back) for back in zip(results, plans, to, sizes)])
