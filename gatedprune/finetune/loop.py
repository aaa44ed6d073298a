"""The training loop: timm's optimiser, scheduler and average, on Accelerate's devices, resumable to the step."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, PartialState
from accelerate.utils import broadcast_object_list
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import ConfigError, GatedPruneError
from ..functional import active_mask
from ..gates import Gate
from ..inside import SiteUsage
from ..training import Distillation, Interrupted, RatioSchedule, parameter_groups
from ..wrapping import is_gated
from .chance import STEP, EpochSampler, SeededDataset, seed_everything
from .checkpoint import read_state, sweep, write_state
from .data import Splits
from .models import Start
from .options import FinetuneConfig

__all__ = ["DivergedError", "Trainer", "accelerator_for", "is_main_process", "saved_state"]

ONEDNN_BLOCK = 8  # channels in one AVX2 vector
CHECK_EVERY = 20  # steps between two looks at the loss: each waits for the device


class DivergedError(GatedPruneError, RuntimeError):
    """The loss is no longer a finite number."""


def accelerator_for(config: FinetuneConfig) -> Accelerator:
    """Accelerate, as the configuration and `accelerate launch` say.

    Raises:
        ConfigError: The batch cannot be split among the processes.
    """
    accelerator = Accelerator(
        cpu=_no_device(),
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        # A batch is that of all processes together: the same training on one or on many.
        dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=True),
        dynamo_backend="inductor" if config.compile else None,
        rng_types=[],  # chance is by position
        log_with="tensorboard" if importlib.util.find_spec("tensorboard") else None,
        project_dir=config.output,
    )
    if config.batch_size // config.accumulate % accelerator.num_processes:
        raise ConfigError(
            f"`batch_size` of finetune is that of a whole step: {config.batch_size} cannot be split among "
            f"{accelerator.num_processes} processes and {config.accumulate} parts."
        )
    return accelerator


def is_main_process() -> bool:
    """Whether this is the first of the processes, or the only one; before there is an `Accelerator` as well."""
    return bool(PartialState(cpu=_no_device()).is_main_process)


def _no_device() -> bool:
    # Without being told, Accelerate lets several processes on CPUs train apart, each as if it were alone.
    return not torch.accelerator.is_available()


class Trainer:
    """Trains one model, and can stop after any step and go on from there exactly.

    Order, augmentation, dropout and mixup follow from the position (see `chance`), learning rate and ratio too; so the
    state is the position with the weights, their average and the optimiser.

    Attributes:
        model: What is trained, as `Start` has it; the average, where there is one, is `average`.
        epoch, step: How much is done: whole epochs, and steps of the one begun.
        log: One dictionary for each finished epoch.
    """

    def __init__(self, config: FinetuneConfig, start: Start, splits: Splits, accelerator: Accelerator,
                 state_file: Path) -> None:  # fmt: skip
        self.config, self.start, self.splits, self.accelerator = config, start, splits, accelerator
        self.state_file = state_file
        self.epoch = self.step = 0
        self.loss = 0.0  # summed over the steps of the epoch begun
        self.log: list[dict[str, float]] = []
        device = accelerator.device
        if config.channels_last and device.type == "cpu":
            _check_channels_last(start.model)
        layout: Any = {"memory_format": torch.channels_last} if config.channels_last else {}
        self.model: Any = start.model.to(device, **layout)
        self.gated = self.model if is_gated(self.model) else None
        self.average = None if config.ema is None else ModelEmaV3(self.model, config.ema, use_warmup=True)
        self.distillation: Distillation | None = None
        if start.teacher is not None:
            self.distillation = Distillation(start.teacher.to(device, **layout), temperature=config.temperature)
        self.rates = broadcast_object_list([start.rates])[0]  # processes that differed in a bit would drift apart
        optimizer = _optimizer(self.model, config, self.rates)
        self.sampler = EpochSampler(len(splits.train), config.batch_size, config.seed)
        self.scheduler = _scheduler(optimizer, config, self.steps_per_epoch)
        self.schedule: RatioSchedule | None = None
        if self.gated is not None:
            levels = 5 if config.compile and config.levels is None else config.levels
            self.schedule = RatioSchedule(self.gated, config.rise * config.epochs, config.schedule, levels)
        self.mixup = self._mixup()
        train, val = self._loaders()
        self.runner, self.optimizer, self.train, self.val = accelerator.prepare(self.model, optimizer, train, val)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return len(self.splits.train) // self.config.batch_size

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.config.epochs

    @property
    def result(self) -> Any:
        """The trained model: the average where there is one."""
        return self.model if self.average is None else self.average.module

    def _mixup(self) -> Mixup | None:
        if not self.config.mixup:
            return None
        return Mixup(mixup_alpha=self.config.mixup, label_smoothing=self.config.smoothing,
                     num_classes=len(self.splits.classes))  # fmt: skip

    def _loaders(self) -> tuple[DataLoader, DataLoader]:
        config = self.config
        size = config.batch_size // config.accumulate
        common: dict[str, Any] = {"num_workers": config.workers, "persistent_workers": config.workers > 0,
                                  "pin_memory": self.accelerator.device.type == "cuda"}  # fmt: skip
        train = DataLoader(SeededDataset(self.splits.train, config.seed), size, sampler=self.sampler, **common)
        return train, DataLoader(self.splits.val, size, **common)

    def fit_epoch(self, stop: Callable[[], bool], *, progress: bool = True) -> None:
        """Train what is left of the epoch, validate, add a row to the log, and save the state.

        The state is also saved every few minutes.

        Args:
            stop: Asked after each step; where it says so in any process, the state is saved.

        Raises:
            Interrupted: `stop` said so.
            DivergedError: The loss is not finite; the state on the disk is the last good one.
        """
        began = time.monotonic()
        self._train_epoch(stop, progress)
        mean = self.loss / self.steps_per_epoch
        accuracy, val_loss, common = self.evaluate(progress=progress)
        row = {
            "epoch": self.epoch + 1, "ratio": self.set_ratio(), "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": mean, "val_loss": val_loss, "top1": accuracy, "seconds": time.monotonic() - began,
        }  # fmt: skip
        if common is not None:
            row["in_common"] = common
        self.log.append(row)
        self.accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=self.epoch + 1)
        self.epoch, self.step, self.loss = self.epoch + 1, 0, 0.0
        self.save()

    def set_ratio(self) -> float:
        """Give every gate its ratio at the place where training is, in the average too; returns their mean."""
        if self.schedule is None:
            return 0.0
        copies = () if self.average is None else (self.average.module,)
        return self.schedule.set(self.epoch + self.step / self.steps_per_epoch, *copies)

    def _train_epoch(self, stop: Callable[[], bool], progress: bool) -> None:
        config, accelerator = self.config, self.accelerator
        self.runner.train()
        self.sampler.at(self.epoch, self.step)
        saved = time.monotonic()
        # In double precision, so that a stop between does not round another way; Apple's GPUs have none.
        exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        summed = torch.zeros((), device=accelerator.device, dtype=exact)
        with tqdm(total=self.steps_per_epoch, initial=self.step, desc=f"epoch {self.epoch + 1}/{config.epochs}",
                  unit="step", leave=False, disable=not (progress and accelerator.is_main_process)) as bar:  # fmt: skip
            for part, (images, labels) in enumerate(self.train):
                if part % config.accumulate == 0:
                    self.set_ratio()
                    if self.scheduler is not None:
                        self.scheduler.step_update(self.epoch * self.steps_per_epoch + self.step)
                place = (self.step, part % config.accumulate, accelerator.process_index)
                seed_everything(config.seed, STEP, self.epoch, *place)
                summed += self._part(images, labels)
                if not accelerator.sync_gradients:
                    continue
                self.step += 1
                if self.average is not None:
                    self.average.update(self.model, step=self.epoch * self.steps_per_epoch + self.step)
                bar.update()
                if self.step == self.steps_per_epoch:
                    break
                stopping, late = self._agreed(stop(), time.monotonic() - saved > 60 * config.save_every)
                if stopping or late or self.step % CHECK_EVERY == 0:
                    self._collect(summed)
                    bar.set_postfix(loss=f"{self.loss / self.step:.3f}", ratio=f"{self.set_ratio():.2f}", refresh=False)
                if stopping or late:
                    self.save()
                    saved = time.monotonic()
                if stopping:
                    raise Interrupted
        self._collect(summed)

    def _part(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forwards, backwards, and at the end of a batch the step; returns the part's share of the step's loss."""
        config, accelerator = self.config, self.accelerator
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        with accelerator.accumulate(self.runner):
            with accelerator.autocast():
                loss = self._loss(images, labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients and config.clip_grad is not None:
                accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach().float() / config.accumulate

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        if self.distillation is None:
            output, distilled = self.runner(images), None
        else:
            output, distilled = self.distillation(self.runner, images)
        if self.mixup is not None:
            loss = SoftTargetCrossEntropy()(output.float(), labels)
        else:
            loss = F.cross_entropy(output.float(), labels, label_smoothing=config.smoothing)
        if distilled is not None:
            loss = (1 - config.distill) * loss + config.distill * distilled
        if self.gated is not None and config.penalty:
            loss = loss + self.gated.penalty(config.penalty)
        return loss

    def _agreed(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true where it is in any process."""
        if self.accelerator.num_processes == 1:
            return flags
        told = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
        return tuple(bool(f) for f in self.accelerator.reduce(told, "sum").tolist())

    def _collect(self, summed: Tensor) -> None:
        """Add the losses since the last time, averaged over the processes."""
        value = float(self.accelerator.reduce(summed, "mean"))
        summed.zero_()
        self._check(value)
        self.loss += value

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            kept = f" {self.state_file} has the state of the last save." if self.state_file.exists() else ""
            raise DivergedError(
                f"The loss became {loss} in epoch {self.epoch + 1}. Start again with a lower learning rate (now "
                f"{self.config.lr}), a warm-up, or --clip-grad 1.{kept}"
            )

    @torch.no_grad()
    def evaluate(self, *, progress: bool = True) -> tuple[float, float, float | None]:
        """Top-1 in percent and mean cross entropy of the result, at its present ratio, on the validation images; and
        the share of winners, in percent, that two of them have in common, mean over gates (None without gates): at 100
        the choice is static."""
        accelerator = self.accelerator
        self.set_ratio()
        model = self.result.eval()
        gates: Mapping[str, Gate] = model.gates if is_gated(model) else {}
        wins: dict[str, Any] = {}
        right = count = 0
        loss = 0.0
        for images, labels in tqdm(self.val, desc="validating", unit="batch", leave=False,
                                   disable=not (progress and accelerator.is_main_process)):  # fmt: skip
            if self.config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with accelerator.autocast():
                output = model(images).float()
            chosen = {
                name: active_mask(gate.last_active, gate.channels)
                for name, gate in gates.items()
                if gate.last_active is not None  # a way through the model that this image did not go
            }
            output, labels, chosen = accelerator.gather_for_metrics((output, labels, chosen))
            for name, mask in chosen.items():
                wins[name] = wins.get(name, 0) + mask.sum(0)
            right += int((output.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(output, labels, reduction="sum"))
            count += len(labels)
        self.runner.train()
        return 100 * right / count, loss / count, _in_common(wins, count)

    def save(self) -> None:
        """Write the state, from the first process; the others wait."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            write_state(self.state_file, {
                "config": self.config.to_dict(), "classes": list(self.splits.classes), "kept": self.start.kept,
                "rates": self.rates, "samples": [len(self.splits.train), len(self.splits.val)],
                "model": self.model.state_dict(),
                "ema": None if self.average is None else self.average.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
                "epoch": self.epoch, "step": self.step, "loss": self.loss, "log": self.log,
            })  # fmt: skip
        accelerator.wait_for_everyone()

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where a state was saved; it has been checked to be this training's."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.loss, self.log = state["epoch"], state["step"], state["loss"], state["log"]


def _in_common(wins: Mapping[str, Tensor], count: int) -> float | None:
    """From how often each channel won, site by site. Sites where all of them win say nothing."""
    sites = [SiteUsage(w.cpu().numpy(), count) for w in wins.values()]
    shares = [100 * s.common / s.active for s in sites if s.common is not None and s.active < s.channels]
    return sum(shares) / len(shares) if shares else 100.0 if sites else None


def check_recipe(config: FinetuneConfig) -> None:
    """Raise `ConfigError` unless timm knows the optimiser and the learning rate schedule."""
    try:
        _scheduler(_optimizer([nn.Parameter(torch.zeros(1))], config), config, 1)
    except (ValueError, TypeError, AssertionError, AttributeError) as error:
        raise ConfigError(
            f"timm has no optimiser {config.opt!r} with the learning rate schedule {config.sched!r}: {error} "
            "Optimisers are those of `timm.optim.list_optimizers()`; schedules: cosine, tanh, step, multistep, poly, "
            "plateau, constant."
        ) from error


def _optimizer(of: Any, config: FinetuneConfig, rates: Mapping[str, float] | None = None) -> Any:
    """timm's; a gated model's predictors have their own learning rates."""
    own = partial(parameter_groups, rates=rates or {}, lr=config.lr, weight_decay=config.weight_decay)
    return create_optimizer_v2(of, config.opt, lr=config.lr, weight_decay=config.weight_decay,
                               momentum=config.momentum, param_group_fn=own if is_gated(of) else None)  # fmt: skip


def _scheduler(optimizer: Any, config: FinetuneConfig, steps: int) -> Any:
    """None where the learning rate stays as it is."""
    scheduler, _ = create_scheduler_v2(
        optimizer, config.sched, num_epochs=config.epochs, warmup_epochs=config.warmup_epochs, warmup_lr=0.0,
        step_on_epochs=False, updates_per_epoch=steps,
    )  # fmt: skip
    if scheduler is None and config.sched not in ("none", "constant"):  # older timm says no more
        raise ValueError(f"Unknown scheduler {config.sched!r}.")
    return scheduler


def _check_channels_last(model: nn.Module) -> None:
    """oneDNN's backward pass (torch 2.6 to 2.15 at least) writes past its memory in strided 1×1 convolutions that read
    few channels in this layout: `malloc` aborts sooner or later, wherever the program is then.

    Raises:
        ConfigError: The model has such a convolution.
    """
    for name, layer in model.named_modules():
        if (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and max(layer.stride) > 1
                and layer.in_channels // layer.groups < ONEDNN_BLOCK):  # fmt: skip
            raise ConfigError(
                f"`channels_last` cannot be had on a CPU for this model: the strided 1×1 convolution {name} reads "
                f"{layer.in_channels // layer.groups} channels, and with fewer than {ONEDNN_BLOCK} oneDNN's backward "
                "pass damages memory in that layout. Train without it."
            )


def saved_state(path: Path, config: FinetuneConfig, resume: bool, main: bool) -> dict[str, Any] | None:
    """The state to go on from, or None where training starts.

    Raises:
        ConfigError: There is one and `resume` was not asked for, or it was begun with other options.
        CheckpointError: It is damaged.
    """
    if main and path.parent.is_dir():
        sweep(path)
    if not path.is_file():
        return None
    if not resume:
        raise ConfigError(
            f"{path.parent} holds a training already. Go on with it by --resume, or name another --output folder."
        )
    state = read_state(path)
    changed = FinetuneConfig.from_dict(state["config"]).differences(config)
    if changed:
        raise ConfigError(
            f"The training in {path.parent} was begun with other options ({'; '.join(changed)}). Give the same ones to "
            "resume it, or another --output folder to start anew."
        )
    return state
