"""A whole model against transformers: the same weights, the same threads, one run, the median of pairs.

transformers caches the latents since 5.15, but recovers every key and value from them at each step; it has
no balance losses. Of its implementations of the experts, the fastest for each task is taken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dsv2.bench.measure import Pair, find_transformers, provenance, seconds, time_pairs, write_report
from dsv2.config import DSV2Config
from dsv2.hf import save_pretrained
from dsv2.model import DeepSeekV2

RESULTS = Path(__file__).resolve().parents[2] / "data" / "benchmarks" / "model_cpu.json"

# About 30M parameters, with the head and latent sizes of V2-Lite.
CONFIG = DSV2Config(
    vocab_size=2048,
    hidden_size=512,
    num_hidden_layers=5,
    num_attention_heads=8,
    intermediate_size=1536,
    max_position_embeddings=8192,
    initializer_range=0.05,  # logits of order 1, so that their comparison means something
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=16,
    n_shared_experts=2,
    num_experts_per_tok=4,
    moe_intermediate_size=128,
    topk_method="group_limited_greedy",
    n_group=4,
    topk_group=2,
)
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@dataclass
class Task:
    """One thing that both models do: `ours` and `peer` take no argument and process `tokens` tokens."""

    name: str
    tokens: int
    ours: Callable[[], object]
    peer: Callable[[], object]


def make_pair(cfg: DSV2Config, seed: int = 0):
    """Our model and transformers', with the same weights, carried over as a checkpoint."""
    from transformers import DeepseekV2ForCausalLM

    torch.manual_seed(seed)
    ours = DeepSeekV2(cfg)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, Path(folder) / "model")
        peer = DeepseekV2ForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    return ours, peer


def training_task(ours: DeepSeekV2, peer, batch: int, length: int) -> Task:
    """Forward, backward and an AdamW step; ours with its balance losses, as it trains."""
    tokens = torch.randint(ours.cfg.vocab_size, (batch, length + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    # A learning rate of 0 does all the work and leaves both models as they are.
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1) for model in (ours, peer)]

    def step_ours() -> None:
        ours.train()
        out = ours(inputs)
        (F.cross_entropy(out.logits.flatten(0, 1), targets) + out.balance_loss).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    def step_peer() -> None:
        peer.train()
        logits = peer(inputs, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), targets).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    return Task(f"training step, {batch} x {length}", batch * length, step_ours, step_peer)


def prefill_task(ours: DeepSeekV2, peer, length: int) -> Task:
    """A prompt of `length` tokens into a new cache, and the logits after its last token."""
    prompt = torch.randint(ours.cfg.vocab_size, (1, length))

    @torch.no_grad()
    def prefill_ours() -> None:
        ours.eval()
        ours(prompt, cache=ours.new_cache(1, length), last_only=True)

    @torch.no_grad()
    def prefill_peer() -> None:
        peer.eval()
        peer(prompt, use_cache=True, logits_to_keep=1)

    return Task(f"prefill, {length} tokens", length, prefill_ours, prefill_peer)


@torch.no_grad()
def decode_task(ours: DeepSeekV2, peer, cached: int, steps: int) -> Task:
    """`steps` greedy tokens, one after the other, behind `cached` tokens."""
    from transformers import DynamicCache

    ours.eval(), peer.eval()
    prompt = torch.randint(ours.cfg.vocab_size, (1, cached))
    cache, past = ours.new_cache(1, cached + steps), DynamicCache(config=peer.config)
    first = ours(prompt, cache=cache, last_only=True).logits[:, -1].argmax(-1, keepdim=True)
    peer(prompt, past_key_values=past, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def decode_ours() -> list[int]:
        cache.truncate(cached)
        token, made = first, []
        for _ in range(steps):
            token = ours(token, cache=cache).logits[:, -1].argmax(-1, keepdim=True)
            made.append(int(token))
        return made

    @torch.no_grad()
    def decode_peer() -> list[int]:
        if past.get_seq_length() > cached:
            past.crop(cached - past.get_seq_length())
        token, made = first, []
        for _ in range(steps):
            token = peer(token, past_key_values=past, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
            made.append(int(token))
        return made

    return Task(f"decode, {cached} cached tokens", steps, decode_ours, decode_peer)


def fastest_experts(task: Task, peer) -> str:
    """Set transformers' fastest implementation of the experts for a task; returns its name."""
    times, errors = {}, []
    for name in IMPLEMENTATIONS:
        if name == "batched_mm" and task.tokens > 256:
            continue  # it gathers a copy of the weights for every token: minutes, and tens of GB
        try:
            peer.set_experts_implementation(name)
            task.peer()
            times[name] = min(seconds(task.peer) for _ in range(2))
        except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
            errors.append(f"{name}: {error}")  # not in this version of transformers, or not on this device
    if not times:
        raise RuntimeError(
            "transformers ran with none of its implementations of the experts:\n" + "\n".join(errors)
        )
    best = min(times, key=times.get)
    peer.set_experts_implementation(best)
    return best


@torch.no_grad()
def largest_difference(ours: DeepSeekV2, peer, length: int) -> float:
    """The largest difference between any two logits: proof that both compute the same function."""
    tokens = torch.randint(ours.cfg.vocab_size, (2, length))
    ours.eval(), peer.eval()
    return float((ours(tokens).logits - peer(tokens).logits).abs().max())


def result(task: Task, pair: Pair, experts: str) -> dict[str, object]:
    """One row of the results, in tokens per second."""
    low, high = pair.spread
    return {
        "name": task.name,
        "unit": "tokens/s",
        "ours": round(task.tokens / statistics.median(pair.ours), 2),
        "peer": round(task.tokens / statistics.median(pair.peer), 2),
        "ratio": round(pair.ratio, 3),
        "ratio_range": [round(low, 3), round(high, 3)],
        "pairs": len(pair.ours),
        "peer_experts": experts,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dsv2.bench model",
        description=__doc__.split("\n\n")[0],
        epilog="Needs transformers >= 5.15, the first version that equals the released models.",
    )
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs per task (default: 7)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for both (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="short sequences, two pairs: does it run at all")
    parser.add_argument(
        "--out", type=Path, help=f"JSON to write (default: data/benchmarks/{RESULTS.name}; none if quick)"
    )
    options = parser.parse_args(arguments)
    if not find_transformers():
        return 1
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)

    ours, peer = make_pair(CONFIG)
    difference = largest_difference(ours, peer, 256)
    # Float32 sums in another order; a wrong formula differs in the first digits.
    if not difference < 1e-3:
        print(f"dsv2.bench: the two models differ by {difference:.2g} in their logits", file=sys.stderr)
        return 1
    length, contexts, steps, pairs = (
        (64, (32, 128), 4, 2) if options.quick else (2048, (512, 4096), 16, options.pairs)
    )
    tasks = [
        training_task(ours, peer, 1, length),
        training_task(ours, peer, 4, length // 4),
        prefill_task(ours, peer, length),
        *(decode_task(ours, peer, cached, steps) for cached in contexts),
    ]
    rows = []
    for task in tqdm(tasks, unit="task", disable=None):
        experts = fastest_experts(task, peer)
        rows.append(result(task, time_pairs(task.ours, task.peer, pairs), experts))
    report = {
        "benchmark": "model",
        "ours": "dsv2",
        "peer": "transformers",
        **provenance("transformers"),
        "parameters": ours.num_parameters(),
        "activated_parameters": ours.num_parameters(activated=True),
        "dtype": "float32",
        "largest_logit_difference": difference,
        "config": CONFIG.to_dict(),
        "results": rows,
    }
    print(table(report))
    out = options.out or (None if options.quick else RESULTS)
    if out:
        write_report(out, report)
        print(f"written to {out}")
    return 0


def table(report: dict) -> str:
    """The results as text."""
    versions = report["versions"]
    lines = [
        f"{report['parameters'] / 1e6:.1f}M parameters, float32, {report['device']}",
        f"torch {versions['torch']}, transformers {versions['transformers']}; "
        f"logits differ by at most {report['largest_logit_difference']:.1e}",
        f"{'':30} {'dsv2':>10} {'transformers':>13}   ratio (range)",
    ]
    for row in report["results"]:
        low, high = row["ratio_range"]
        lines.append(
            f"{row['name']:30} {row['ours']:>10,.1f} {row['peer']:>13,.1f}   "
            f"{row['ratio']:.2f}x ({low:.2f}-{high:.2f})   {row['unit']}, its experts: {row['peer_experts']}"
        )
    return "\n".join(lines)
