"""Training with BerHu: resumable to the exact step, gates' penalty included."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import gatedprune
from gatedprune.adapters.depth import berhu
from gatedprune.errors import ConfigError, DataError, GatedPruneError

from .checkpoint import ModelSpec, load_state, save_state
from .datasets import DepthDataset, EpochSampler

__all__ = ["TrainConfig", "Trainer", "TrainingDivergedError"]


class TrainingDivergedError(GatedPruneError, RuntimeError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's Table 1; momentum is not in it, 0.9 is the usual value.

    Args:
        epochs: passes over the data.
        batch_size: images a step; the last, smaller batch of an epoch is dropped when there is a whole one.
        lr: learning rate.
        optimizer: "sgd" or "adamw".
        momentum: of SGD.
        weight_decay: of either optimiser.
        schedule: "constant", or "cosine": falls to zero over the whole training after a twentieth of warm-up.
        penalty: weight of the gates' L1 penalty (FBS: 1e-8); of no effect on a dense model.
        seed: of the order of the samples and their augmentation.
        workers: processes that load samples; 0 loads in the main one.
        save_every: seconds between two saves of the state.
        max_steps: end after so many steps, if the epochs have more.
        max_seconds: end after about so many seconds, and let the schedule run out until then. How far
            training gets then depends on the machine: for demonstrations, where time matters more than
                repeating a number.
    """

    epochs: int = 30
    batch_size: int = 8
    lr: float = 1e-4
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    penalty: float = 1e-8
    seed: int = 0
    workers: int = 0
    save_every: float = 300.0
    max_steps: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", ("sgd", "adamw")), ("schedule", ("constant", "cosine"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"`{name}` must be one of {', '.join(choices)}. Got {getattr(self, name)!r}.")
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.lr < math.inf:
            raise ConfigError(
                f"Training needs at least one epoch, one image a batch and a positive learning rate. Got "
                f"epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr}."
            )


class Trainer:
    """Trains one model on one data set, and can stop after any step and go on from there, elsewhere, exactly.

    The order of the samples and their augmentation depend on seed and epoch alone, so the position (epoch,
    step) stands for them in the saved state, beside the model, the optimiser and PyTorch's random state.

    Args:
        model: the depth model, dense, gated or statically pruned. It is trained in place.
        dataset: the training samples.
        config: how to train.
        spec: of the model; written into the saved state.
        state_file: where the state is saved, None: nowhere. An existing file is *not* read: see `resume`.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: DepthDataset,
        config: TrainConfig,
        *,
        spec: ModelSpec,
        state_file: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(dataset) == 0:
            raise DataError("There are no frames to train on. Check the data folder and the split.")
        self.model, self.dataset, self.config, self.spec = model.to(device), dataset, config, spec
        self.state_file, self.device = state_file, torch.device(device)
        self.epoch, self.step_in_epoch = 0, 0
        self.optimizer = _optimizer(model, config)
        self.losses: list[float] = []
        """Mean loss of each finished epoch."""
        self._running: list[float] = []
        self._began = time.monotonic()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        return max(1, len(self.dataset) // self.config.batch_size)

    @property
    def steps_done(self) -> int:
        """Optimiser steps so far."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    @property
    def total_steps(self) -> int:
        """Optimiser steps in the whole training, unless its time runs out."""
        steps = self.steps_per_epoch * self.config.epochs
        return steps if self.config.max_steps is None else min(steps, self.config.max_steps)

    @property
    def progress(self) -> float:
        """Share of the training that is done; 1: finished."""
        limit = self.config.max_seconds
        elapsed = 0.0 if limit is None else (time.monotonic() - self._began) / limit
        return min(1.0, max(self.steps_done / self.total_steps, elapsed))

    @property
    def finished(self) -> bool:
        """Whether training is at its end."""
        return self.progress >= 1

    def resume(self) -> bool:
        """Continue from the state file where there is one; return whether there was.

        Raises:
            CheckpointError: the state is damaged, or of another model. ConfigError: of another configuration.
        """
        if self.state_file is None or not self.state_file.is_file():
            return False
        state = load_state(self.state_file, self.spec)
        fixed = ("batch_size", "seed", "optimizer", "lr", "schedule", "epochs", "max_steps")
        changed = [name for name in fixed if state["config"][name] != getattr(self.config, name)]
        if changed:
            listed = ", ".join(f"{n}: {state['config'][n]}, now {getattr(self.config, n)}" for n in changed)
            raise ConfigError(
                f"The training state {self.state_file} was started with other options ({listed}). Give the "
                "same "
                "ones to resume it, or another output folder to start anew."
            )
        if state["samples"] != len(self.dataset):
            raise ConfigError(
                f"The training state {self.state_file} was started on {state['samples']} frames, now there "
                "are "
                f"{len(self.dataset)}. Give the same data and split to resume it."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.losses, self._running = state["losses"], state["running"]
        torch.set_rng_state(state["rng"])
        return True

    def save(self) -> None:
        """Write the state file, if there is to be one."""
        if self.state_file is None:
            return
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "losses": self.losses,
            "running": self._running,
            "rng": torch.get_rng_state(),
            "config": asdict(self.config),
            "samples": len(self.dataset),
        }
        save_state(self.state_file, state, self.spec)

    def fit(self, *, label: str = "training", progress: bool = True, stop: Callable[[], bool] = bool) -> bool:
        """Train to the end, or until `stop` says so after a step; save then, and now and again between.

        Returns:
            Whether training is finished (False: it was stopped).

        Raises:
            TrainingDivergedError: the loss is not finite. The state on disk is the last good one.
        """
        self._began = last_save = time.monotonic()
        self.model.train()
        with tqdm(
            total=self.total_steps, initial=self.steps_done, desc=label, unit="step", disable=not progress
        ) as bar:
            while not self.finished:
                for image, depth in self._batches():
                    loss = self._step(image, depth)
                    bar.set_postfix(epoch=self.epoch + 1, loss=f"{loss:.3f}", refresh=False)
                    bar.update()
                    self._advance(loss)
                    if self.finished or self.step_in_epoch == 0 or stop():
                        break
                    if time.monotonic() - last_save > self.config.save_every:
                        self.save()
                        last_save = time.monotonic()
                if stop() and not self.finished:
                    self.save()
                    return False
        self.save()
        self.model.eval()
        return True

    def _advance(self, loss: float) -> None:
        self._running.append(loss)
        self.step_in_epoch += 1
        if self.step_in_epoch == self.steps_per_epoch:
            self.losses.append(sum(self._running) / len(self._running))
            self.epoch, self.step_in_epoch, self._running = self.epoch + 1, 0, []

    def _batches(self) -> DataLoader:
        self.dataset.epoch = self.epoch
        config = self.config
        start = self.step_in_epoch * config.batch_size
        sampler = EpochSampler(len(self.dataset), seed=config.seed, epoch=self.epoch, start=start)
        # The generator only seeds the workers, which draw nothing from it; without one, PyTorch's global
        # random state would move with each loader that is opened, and resuming would not be exact.
        seeding = torch.Generator().manual_seed(config.seed)
        return DataLoader(
            self.dataset, config.batch_size, sampler=sampler, num_workers=config.workers, generator=seeding
        )

    def _step(self, image: Tensor, depth: Tensor) -> float:
        self._set_learning_rate()
        image, depth = image.to(self.device), depth.to(self.device)
        valid = (depth > 0) & (depth <= self.spec.max_depth)
        loss = berhu(self.model(image), depth, valid)
        if gatedprune.is_gated(self.model) and self.config.penalty:
            gated: Any = self.model  # is_gated has checked the class
            loss = loss + gated.penalty(self.config.penalty)
        value = loss.item()
        if not math.isfinite(value):
            kept = f" The state of the last save is in {self.state_file}." if self.state_file else ""
            raise TrainingDivergedError(
                f"The loss became {value} in epoch {self.epoch + 1}, step {self.step_in_epoch + 1}. Lower "
                "the learning "
                f"rate (now {self.config.lr}) and start again.{kept}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return value

    def _set_learning_rate(self) -> None:
        if self.config.schedule == "constant":
            return
        at = max(self.progress, (self.steps_done + 1) / (self.total_steps + 1))
        warmup = 0.05
        factor = at / warmup if at < warmup else 0.5 * (1 + math.cos(math.pi * (at - warmup) / (1 - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
