"""The training loop as an object that can be stepped through: `for metrics in trainer: ...`."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv2.config import DSV2Config
from dsv2.data.packing import Batch
from dsv2.data.tokenizer import ByteTokenizer, Tokenizer
from dsv2.model import DeepSeekV2
from dsv2.moe import load_imbalance
from dsv2.train.checkpoint import (
    CheckpointError,
    checkpoint_step,
    find_checkpoints,
    force_to_disk,
    read_state,
    read_tensors,
    remove_old,
    remove_unfinished,
    save_checkpoint,
)
from dsv2.train.distributed import (
    World,
    average_expert_gradients,
    clip_gradients,
    put,
    spread,
    start_world,
)
from dsv2.train.optimizer import MasterWeights, gather, initialize, make_optimizer, optimizer_tensors
from dsv2.train.run_directory import RunDirectory, append_line, cut_lines
from dsv2.train.schedule import TrainConfig

PROMPT_TOKENS = 32
SAMPLE_TOKENS = 96
BYTES = 256  # ids below this are bytes, for a ByteTokenizer


@runtime_checkable
class TrainingData(Protocol):
    """What the trainer needs of a data set; `dsv2.data.PackedDataset` is one.

    For a batch that grows, `batch` also takes `first`, the number of sequences that earlier steps have used.
    """

    domain_names: list[str]

    def batch(
        self, step: int, batch_size: int, seq_len: int, *, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> Batch: ...


class NonFiniteError(RuntimeError):
    """The loss or the gradient is no number any more; names the step and the last good checkpoint."""


class Trainer:
    """Trains a DeepSeek-V2, one step at a time.

        trainer = Trainer(DSV2Config.preset("tiny"), TrainConfig(steps=200), data)
        for metrics in trainer:
            print(metrics["step"], metrics["loss"])
        trainer.model        # the trained model

    data: gives the batch of a step as a function of the step alone. validation: windows on which the loss is
    taken; None: those of `data.validation` where it has one, else none. out: a folder for metrics, samples
    and checkpoints; None: nothing is written. With `resume`, the run goes on from the last good checkpoint in
    `out`, bit for bit as if it had never stopped (on the CPU with as many threads; on a GPU with
    `deterministic`). Nothing random outlives a step: what is drawn in step n comes from (seed, n, rank), so
    there is no random state to be saved, and training leaves the caller's random numbers alone.

    Raises ValueError for settings that do not fit each other.
    """

    def __init__(
        self,
        model_config: DSV2Config,
        config: TrainConfig,
        data: TrainingData,
        *,
        validation: Batch | None = None,
        out: str | Path | RunDirectory | None = None,
        resume: bool = False,
        tokenizer: Tokenizer | None = None,
        world: World | None = None,
    ):
        self.config, self.model_config, self.data = config, model_config, data
        self.world = world or start_world()
        self.tokenizer = tokenizer or ByteTokenizer()
        self.directory = out if isinstance(out, RunDirectory | None) else RunDirectory(out)
        self._check()
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it in this mode
            torch.use_deterministic_algorithms(True)
        self.validation = self._validation_windows() if validation is None else validation

        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.saved_step: int | None = None
        self.model = self._new_model()
        # Between some calls FSDP2 shows whole weights as the model's parameters; the optimiser has these.
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.parameters, config)
        self._masters = None
        if config.dtype != "float32" and self.world.size == 1:
            self._masters = MasterWeights(self.model, self.dtype)
        if config.compile:
            for block in self.computing_model.layers:
                block.compile()
        if self.directory is not None and self.world.is_main:
            self.directory.path.mkdir(parents=True, exist_ok=True)
            self.directory.lock()
        if resume:
            self._resume()

    @property
    def dtype(self) -> torch.dtype:
        """The type that the blocks are computed in; weights and the optimiser's state are float32."""
        return getattr(torch, self.config.dtype)

    @property
    def computing_model(self) -> DeepSeekV2:
        """The model that runs: `model` itself, or its bf16 copy."""
        return self.model if self._masters is None else self._masters.copy

    @property
    def done(self) -> bool:
        return self.step >= self.config.steps

    # ------------------------------------------------------------------------------------------ one step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while not self.done:
            yield self.advance()

    def advance(self) -> dict[str, Any]:
        """One step, then validation, samples and a checkpoint where they are due; returns the metrics.

        Raises NonFiniteError, with the weights as before the step, if the loss or the gradient is no number.
        """
        metrics = self.train_step()
        fault = self._fault(metrics)
        if fault is None and self._due(self.config.validate_every) and self.validation is not None:
            metrics |= self.validate()
        self._log(metrics)
        if fault is not None:
            raise NonFiniteError(fault)
        if self._due(self.config.sample_every):
            self._log_samples(self.samples())
        if self.directory is not None and self._due(self.config.save_every):
            self.save()
        return metrics

    def train_step(self) -> dict[str, Any]:
        """Forward, backward and update on the batch of this step; returns the metrics.

        loss: cross entropy in nats per token, without balance_loss. grad_norm: before clipping. imbalance:
        the busiest expert's load over the average, mean over the layers. A step whose loss or gradient is no
        number changes no weight.
        """
        config, world, start = self.config, self.world, time.perf_counter()
        lr = config.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        model = self.computing_model.train()
        totals, loads = torch.zeros(2, device=world.device), None
        with self._seeded():
            for micro in range(config.micro_batches):
                # Each process takes neighbouring micro-batches, so that its rows are one slice of the batch.
                place = world.rank * config.micro_batches + micro
                batch = self._batch(place)
                output = model(batch.tokens)
                loss = F.cross_entropy(output.logits.float().flatten(0, 1), batch.targets.flatten())
                ((loss + output.balance_loss) / config.micro_batches).backward()
                if self._masters is not None:
                    self._masters.add_gradients()
                totals += torch.stack((loss.detach(), output.balance_loss.detach().float()))
                load = torch.stack([routing.load() for routing in output.routings] or [totals.new_zeros(1)])
                loads = load if loads is None else loads + load
        average_expert_gradients(self.parameters.values(), world)
        norm = clip_gradients(self.parameters.values(), config.clip, world)
        totals = world.sum(totals) / (config.micro_batches * world.size)
        loss, balance_loss, grad_norm = (*totals.tolist(), float(norm))
        if math.isfinite(loss + balance_loss + grad_norm):
            self.optimizer.step()
            if self._masters is not None:
                self._masters.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        loads = world.sum(loads).cpu()

        seconds = time.perf_counter() - start
        tokens = config.batch_size_of(self.step) * config.seq_len
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": loss,
            "balance_loss": balance_loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "imbalance": sum(map(load_imbalance, loads)) / len(loads)
            if self.model_config.moe_layers
            else 1.0,
            "tokens_per_s": tokens / seconds,
            "seconds": self.seconds,
        }

    def _batch(self, place: int) -> Batch:
        config, parts = self.config, self.world.size * self.config.micro_batches
        # With batches of one size, the step says where its windows begin.
        begin = {} if config.batch_ramp_to is None else {"first": config.sequences_before(self.step)}
        batch = self.data.batch(
            self.step,
            config.batch_size_of(self.step),
            config.seq_len,
            rank=place,
            world_size=parts,
            seed=config.seed,
            **begin,
        )
        return batch.to(self.world.device)

    @contextlib.contextmanager
    def _seeded(self):
        """Random numbers that depend on the seed, the step and the process alone."""
        device = self.world.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            place = (self.config.seed * 2_000_003 + self.step) * 65_537 + self.world.rank
            torch.manual_seed(place % 2**63)
            yield

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.done)

    def _fault(self, metrics: dict[str, Any]) -> str | None:
        wrong = [name for name in ("loss", "balance_loss", "grad_norm") if not math.isfinite(metrics[name])]
        if not wrong:
            return None
        found = find_checkpoints(self.directory.checkpoints) if self.directory else []
        last = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        values = " and ".join(f"{name} is {metrics[name]}" for name in wrong)
        return (
            f"step {self.step}: {values}; {last}. The weights were not changed by this step. A lower --lr, a "
            "longer --warmup-steps or another --seed may help"
        )

    # ------------------------------------------------------------------------- validation and samples

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """The loss on the validation windows, all together and by domain.

        val_loss: nats per token. With a byte tokenizer also val_nats_per_byte and val_bits_per_byte: special
        tokens are paid for, bytes alone are counted. val_domains: nats per byte, or per token without bytes.
        """
        world, windows = self.world, self.validation
        rows = max(1, self.config.batch_size // (world.size * self.config.micro_batches))
        names, bytewise = self.data.domain_names, isinstance(self.tokenizer, ByteTokenizer)
        sums = torch.zeros(3, len(names), dtype=torch.float64)  # nats, tokens and bytes of each domain
        model = self.computing_model.eval()
        rounds = math.ceil(len(windows) / (rows * world.size))
        for number in range(rounds):
            first = (number * world.size + world.rank) * rows
            # Every process must go through the model equally often: one without rows left repeats the first.
            batch = windows[first : first + rows] if first < len(windows) else windows[:1]
            logits = model(batch.tokens.to(world.device)).logits
            targets = batch.targets.flatten()
            nats = F.cross_entropy(
                logits.float().flatten(0, 1), targets.to(world.device), reduction="none"
            ).cpu()
            if first < len(windows):
                ones = torch.ones_like(nats)
                for row, values in enumerate((nats, ones, targets < BYTES)):
                    domain = batch.domains.flatten().long()
                    sums[row] += torch.bincount(domain, values.double(), minlength=len(names))
        model.train()
        sums = world.sum(sums.to(world.device)).cpu()
        nats, tokens, counted = sums.tolist()
        unit = counted if bytewise else tokens
        metrics = {"val_loss": sum(nats) / sum(tokens)}
        if bytewise and sum(counted):
            metrics["val_nats_per_byte"] = sum(nats) / sum(counted)
            metrics["val_bits_per_byte"] = metrics["val_nats_per_byte"] / math.log(2)
        metrics["val_domains"] = {name: n / u for name, n, u in zip(names, nats, unit) if u}
        return metrics

    def samples(self, max_new_tokens: int = SAMPLE_TOKENS, temperature: float = 0.8) -> list[dict[str, Any]]:
        """Texts that the model writes after the beginning of a validation window of each domain.

        Each has step, domain, prompt, text. All processes must ask; the main one gets them.
        """
        from dsv2.generate import generate

        if self.validation is None:
            return []
        model = self.plain_model(self.dtype)
        written = []
        if model is not None:
            was_training = model.training
            model.eval()
            for number, (domain, prompt) in enumerate(self._prompts().items()):
                room = self.model_config.max_position_embeddings - len(prompt)
                # A seed of its own: the same random numbers lead different prompts into the same words.
                seed = self.config.seed + number
                # Decoding's shapes are not training's: compiled blocks would be compiled over and over.
                with torch.compiler.set_stance("force_eager"):
                    text = generate(
                        model, prompt, min(max_new_tokens, room), temperature=temperature, seed=seed
                    )
                shown = self.tokenizer.decode(prompt)
                written.append({"step": self.step, "domain": domain, "prompt": shown, "text": text})
            model.train(was_training)
        return written

    def _prompts(self) -> dict[str, list[int]]:
        """The first tokens of the first validation window that lies in one domain, for each domain."""
        prompts = {}
        length = min(PROMPT_TOKENS, self.validation.tokens.shape[1])
        for tokens, domains in zip(self.validation.tokens, self.validation.domains):
            if (domains == domains[0]).all():
                prompts.setdefault(self.data.domain_names[int(domains[0])], tokens[:length].tolist())
        return prompts

    # -------------------------------------------------------------------------- checkpoints and the result

    def save(self) -> Path | None:
        """Write a checkpoint of this step, and delete those no longer wanted; returns its folder."""
        if self.directory is None:
            raise ValueError("this trainer has no folder to save in; give it one with out=...")
        main = self.world.is_main
        model = gather(self.parameters, main)
        optimizer = gather(optimizer_tensors(self.parameters, self.optimizer), main)
        path = None
        if main:
            if self.directory.metrics.exists():
                force_to_disk(self.directory.metrics)
            state = {"tokens": self.tokens, "seconds": self.seconds, "torch": torch.__version__}
            path = save_checkpoint(self.directory.checkpoints, self.step, model, optimizer, state)
            remove_old(self.directory.checkpoints, self.config.keep, self.config.milestone_every)
        self.world.barrier()
        self.saved_step = self.step
        return path

    def _resume(self) -> None:
        if self.directory is None:
            raise ValueError("resume=True needs out=..., the folder of the run")
        chosen = None
        if self.world.is_main:
            remove_unfinished(self.directory.checkpoints)
            chosen = _newest_good(self.directory.checkpoints)
        chosen = self.world.broadcast(chosen)
        if chosen is not None:
            path, state = chosen
            self._read("model", path, self.parameters)
            self._read("optimizer", path, optimizer_tensors(self.parameters, self.optimizer))
            self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
            self.saved_step = self.step
            if self._masters is not None:
                self._masters.refresh()
        if self.world.is_main:
            cut_lines(self.directory.metrics, self.step)
            cut_lines(self.directory.samples, self.step)
        self.world.barrier()

    def _read(self, name: str, path: Path, targets: dict[str, Tensor]) -> None:
        shapes = {key: target.shape for key, target in targets.items()}
        for key, value in read_tensors(path, name, shapes):
            put(targets[key], value)

    def plain_model(self, dtype: torch.dtype = torch.float32) -> DeepSeekV2 | None:
        """The model in one piece in eval mode, in `dtype`; on other processes than the main one, None.

        With one process and the type that it trains in, this is the training model itself, not a copy.
        """
        if self.world.size == 1:
            if dtype == torch.float32:
                return self.model
            if self._masters is not None and dtype == self.dtype:
                return self.computing_model
            plain = copy.deepcopy(self.model)
        else:
            tensors = gather(self.parameters, self.world.is_main)
            if not self.world.is_main:
                return None
            plain = DeepSeekV2(self.model_config).to(self.world.device)
            for name, parameter in plain.named_parameters():
                put(parameter, tensors[name])
            plain.tokenizer = self.tokenizer
        return plain.to(dtype).eval()

    def export(self, directory: str | Path, dtype: str = "bfloat16") -> None:
        """Write the model as a Hugging Face DeepSeek-V2 directory; all processes must take part."""
        from dsv2.hf import save_pretrained

        tensors = gather(self.parameters, self.world.is_main)
        if self.world.is_main:
            tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
            with torch.device("meta"):
                described = DeepSeekV2(self.model_config)
            described.tokenizer = self.tokenizer
            save_pretrained(described, directory, state_dict=tensors)
        self.world.barrier()

    # ------------------------------------------------------------------------------------------- the rest

    def _new_model(self) -> DeepSeekV2:
        cfg, world = self.model_config, self.world
        # On meta no process ever holds a whole model; tied weights would come apart there.
        on_meta = world.size > 1 and not cfg.tie_word_embeddings
        with torch.random.fork_rng(devices=[]), torch.device("meta" if on_meta else "cpu"):
            model = DeepSeekV2(cfg)
        model.tokenizer = self.tokenizer
        model.checkpoint_blocks = self.config.checkpoint_blocks
        if not on_meta:
            model.to(world.device)
        spread(model, world, self.dtype)
        if on_meta:
            model.to_empty(device=world.device)
        initialize(model, cfg.initializer_range, self.config.seed)
        return model

    def _check(self) -> None:
        config, cfg, size = self.config, self.model_config, self.world.size
        parts = size * config.micro_batches
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size={config.batch_size} must be a multiple of {size} processes x "
                f"{config.micro_batches} micro-batches = {parts}"
            )
        if config.batch_ramp_to is not None and config.batch_ramp_multiple % parts:
            raise ValueError(
                f"batch_ramp_multiple={config.batch_ramp_multiple} must be a multiple of {size} processes x "
                f"{config.micro_batches} micro-batches = {parts}"
            )
        if config.seq_len > cfg.max_position_embeddings:
            raise ValueError(
                f"seq_len={config.seq_len} is longer than the model's "
                f"max_position_embeddings={cfg.max_position_embeddings}"
            )
        if self.tokenizer.vocab_size > cfg.vocab_size:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens and the model's "
                f"vocab_size={cfg.vocab_size} is smaller; set vocab_size to at least that"
            )

    def _validation_windows(self) -> Batch | None:
        held_out = getattr(self.data, "validation", None)
        if held_out is None or not self.config.validation_windows:
            return None
        return held_out.validation_windows(self.config.seq_len, self.config.validation_windows)

    def _log(self, metrics: dict[str, Any]) -> None:
        if self.directory is not None and self.world.is_main:
            append_line(self.directory.metrics, metrics)

    def _log_samples(self, samples: list[dict[str, Any]]) -> None:
        for sample in samples if self.directory is not None else ():
            append_line(self.directory.samples, sample)


def _newest_good(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose files fit their checksums, with its state; None if there never was one."""
    found = find_checkpoints(directory)
    for path in reversed(found):
        try:
            return path, read_state(path)
        except CheckpointError as problem:
            warnings.warn(f"{problem}; going back to an earlier checkpoint", stacklevel=4)
    if found:
        steps = ", ".join(str(checkpoint_step(path)) for path in found)
        raise CheckpointError(f"every checkpoint in {directory} is damaged (steps {steps}); start a new run")
    return None
