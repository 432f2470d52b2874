"""What really travels: one layer of experts on 1 to 8 processes of this machine, beside `FakeDevices`.

Tokens, experts and weights come from a seed, so that every process makes the same ones and keeps its share.
Each runs the layer forward and backward over all-to-all (gloo, float32) and compares its part of the output
and of the gradients with what devices in one process give; bytes are counted in both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import start_processes

from dsv2.bench.measure import write_report
from dsv2.moe import device_limited_top_k
from dsv2.moe.experts import RoutedExperts
from dsv2.moe.parallel import HIDDEN, KINDS, ExpertParallel, FakeDevices, Placement, ProcessGroup

ROOT = Path(__file__).resolve().parents[2]
REPORT = "report.json"
HELD = {"gradient of gate and up projections": "w_gate_up", "gradient of down projections": "w_down"}
LARGEST_DIFFERENCE = 1e-5  # as a share of the largest number: float32 sums in another order


@dataclass(frozen=True)
class Layer:
    """One layer's sizes. tokens: on each device; limit: devices a token may be sent to, None: all."""

    devices: int
    tokens: int = 64
    experts: int = 24
    hidden: int = 32
    width: int = 16
    k: int = 4
    limit: int | None = None
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.devices <= 8:
            raise ValueError(f"processes={self.devices} must be 1 to 8: each is a Python of its own")
        for name in ("tokens", "experts", "hidden", "width", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.experts % self.devices:
            raise ValueError(f"experts={self.experts} must be a multiple of processes={self.devices}")
        most = self.devices if self.limit is None else self.limit
        if not 1 <= most <= self.devices:
            raise ValueError(f"limit={self.limit} must be 1 to processes={self.devices}, or None")
        if self.k > most * self.experts // self.devices:
            raise ValueError(f"k={self.k}: {most} devices hold {most * self.experts // self.devices} experts")

    @property
    def placement(self) -> Placement:
        return Placement.even(self.experts, self.devices)

    def tokens_of(self, rank: int) -> slice:
        """A device's tokens among all."""
        return slice(rank * self.tokens, (rank + 1) * self.tokens)

    def make(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[RoutedExperts, Tensor, Tensor, Tensor, Tensor]:
        """Experts, hidden states, expert ids, weights, and the loss's slope, for all devices together.

        The same numbers everywhere, drawn on the CPU; weights are always float32, as the router's are.
        """
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random)

        experts = RoutedExperts(self.experts, self.hidden, self.width)
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.copy_(normal(*parameter.shape) * parameter.shape[-1] ** -0.5)
        n = self.devices * self.tokens
        scores = (1.5 * normal(1, n, self.experts)).softmax(dim=-1)
        made = device_limited_top_k(scores, self.k, self.devices, self.limit or self.devices)
        x, slope = (normal(n, self.hidden).to(device, dtype) for _ in range(2))
        ids, weights = made.expert_ids[0].to(device), made.weights[0].to(device)
        return experts.to(device, dtype), x, ids, weights, slope


def run_fake(
    layer: Layer, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], FakeDevices]:
    """The layer on devices in this process: output and gradients, and the devices, which counted."""
    experts, x, ids, weights, slope = layer.make(device, dtype)
    x.requires_grad_(), weights.requires_grad_()
    devices = FakeDevices(layer.devices)
    out = ExpertParallel(layer.placement, devices)(experts, x, ids, weights)
    out.backward(slope)
    return _outcome(out, x, weights, experts), devices


def run_process(
    layer: Layer, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], ProcessGroup]:
    """This process's share of the layer, with the others': its part of what `run_fake` gives."""
    devices = ProcessGroup()
    (rank,) = devices.here
    experts, x, ids, weights, slope = layer.make(device, dtype)
    local = layer.placement.local(experts, rank)
    mine = layer.tokens_of(rank)
    x, weights = x[mine].clone().requires_grad_(), weights[mine].clone().requires_grad_()
    out = ExpertParallel(layer.placement, devices)(local, x, ids[mine], weights)
    out.backward(slope[mine])
    return _outcome(out, x, weights, local), devices


def _outcome(out: Tensor, x: Tensor, weights: Tensor, experts: RoutedExperts) -> dict[str, Tensor]:
    found = {"output": out.detach(), "gradient of x": x.grad, "gradient of weights": weights.grad}
    return found | {name: getattr(experts, weight).grad for name, weight in HELD.items()}


def differences(
    layer: Layer, rank: int, found: dict[str, Tensor], expected: dict[str, Tensor]
) -> dict[str, float]:
    """How far any process's part is from those rows of the whole; all processes must ask."""
    mine, held = layer.tokens_of(rank), list(layer.placement.experts_on(rank))
    apart = torch.stack(
        [
            relative_difference(part, expected[name], held if name in HELD else mine)
            for name, part in found.items()
        ]
    )
    torch.distributed.all_reduce(apart, torch.distributed.ReduceOp.MAX)
    return dict(zip(found, apart.tolist()))


def run_real(rank: int, layer: Layer, folder: Path) -> None:
    """One process: largest differences from `run_fake` and everyone's bytes, written by the first."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "meeting"), layer.devices)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=layer.devices)
    expected, _ = run_fake(layer)
    found, devices = run_process(layer)
    apart, traffic = differences(layer, rank, found, expected), devices.all_traffic()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if rank == 0:
        result = {"differences": apart, "bytes": {kind: traffic.bytes(kind).tolist() for kind in KINDS}}
        (folder / REPORT).write_text(json.dumps(result), encoding="utf-8")


def relative_difference(part: Tensor, whole: Tensor, rows: slice | list[int]) -> Tensor:
    """How far `part` is from those rows of `whole` at most, as a share of the largest number in `whole`."""
    return (part - whole[rows]).abs().max().float() / whole.abs().max()


def start_devices(layer: Layer, folder: Path) -> None:
    """A process for each device; the first that fails ends the others.

    On Linux they are forks of this one, so that torch is loaded once and not by each of them.
    """
    method = "fork" if sys.platform == "linux" else "spawn"
    start_processes(run_real, (layer, folder), nprocs=layer.devices, start_method=method)


def measure_traffic(processes: int = 4, timeout: float = 120.0, **sizes: Any) -> dict[str, Any]:
    """Run a `Layer` in real processes and in `FakeDevices`: who sent how many bytes, and do they agree.

    sizes: fields of `Layer`. Returns "layer"; "real" and "fake", by kind of traffic the bytes from each
    device, down, to each, across; "differences", the largest of the output and the gradients, as a share of
    the largest number there. Raises ValueError for sizes that do not fit, RuntimeError where processes cannot
    be started, fail, or take longer than `timeout` seconds.
    """
    layer = Layer(processes, **sizes)
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise RuntimeError("this PyTorch has no gloo: experts cannot be put on several processes here")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / REPORT
        # A new Python starts them, not this one: a notebook can call this as well as a script.
        command = [sys.executable, "-m", "dsv2.bench.traffic", json.dumps(asdict(layer)), folder]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "CUDA_VISIBLE_DEVICES": "",
        }
        try:
            ran = run_to_its_end(command, timeout, environment)
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"{processes} processes did not end within timeout={timeout:g} seconds; give them longer, or "
                "start fewer"
            ) from None
        except OSError as error:
            raise RuntimeError(f"no process could be started here: {error}") from error
        if ran.returncode or not report.exists():
            last = "\n".join(ran.stderr.strip().splitlines()[-15:])
            raise RuntimeError(f"the processes ended with an error:\n{last}")
        found = json.loads(report.read_text(encoding="utf-8"))
    _, devices = run_fake(layer)
    return {
        "layer": asdict(layer),
        "real": found["bytes"],
        "fake": {kind: devices.traffic.bytes(kind).tolist() for kind in KINDS},
        "differences": found["differences"],
    }


def run_to_its_end(
    command: Sequence[str], timeout: float, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` that, out of time, also ends what its process has started."""
    own_group = {"start_new_session": True} if os.name == "posix" else {}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes, **own_group) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:  # also a reader who interrupts the cell
            stop(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def stop(process: subprocess.Popen[str]) -> None:
    """End a process, and on POSIX its whole group at once."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing of it is left
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def table(report: dict[str, Any]) -> str:
    """Bytes by kind, and the differences, as text."""
    layer = report["layer"]
    most = layer["devices"] if layer["limit"] is None else layer["limit"]
    lines = [
        f"{layer['devices']} processes with {layer['tokens']} tokens each, {layer['experts']} experts, "
        f"{layer['k']} a token on at most {most} devices, hidden states of {4 * layer['hidden']} bytes",
        f"{'':20}{'real processes':>16}{'fake devices':>16}   bytes between devices",
    ]
    for kind in KINDS:
        real, fake = (torch.tensor(report[where][kind]) for where in ("real", "fake"))
        same = "equal for every pair of devices" if torch.equal(real, fake) else "DIFFERENT"
        lines.append(f"{kind:20}{int(real.sum()):16,}{int(fake.sum()):16,}   {same}")
    lines.append("largest difference, as a share of the largest number there")
    lines += [f"  {name:36}{value:.1e}" for name, value in report["differences"].items()]
    return "\n".join(lines)


def hidden_bytes(report: dict[str, Any], where: str = "real") -> Tensor:
    """(G, G): bytes of hidden states, to the experts and back, from each device to each other one."""
    return sum(torch.tensor(report[where][kind]) for kind in HIDDEN)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.bench traffic", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--processes", type=int, default=4, help="1 to 8 (default: 4)")
    parser.add_argument("--tokens", type=int, default=Layer.tokens, help="on each (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=Layer.experts, help="(default: %(default)s)")
    parser.add_argument("--k", type=int, default=Layer.k, help="experts a token (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="most devices a token is sent to (default: no limit)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON to write (default: none)")
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    try:
        report = measure_traffic(**options)
    except ValueError as error:
        parser.error(str(error))
    except RuntimeError as error:
        print(f"dsv2.bench: {error}", file=sys.stderr)
        return 1
    print(table(report))
    if out:
        write_report(out, report)
    return 0 if agree(report) else 1


def agree(report: dict[str, Any]) -> bool:
    """Whether real and fake devices sent the same bytes and found the same numbers, but for rounding."""
    apart = report["differences"].values()
    return report["real"] == report["fake"] and all(value < LARGEST_DIFFERENCE for value in apart)


if __name__ == "__main__":  # the new Python of `measure_traffic`
    start_devices(Layer(**json.loads(sys.argv[1])), Path(sys.argv[2]))
