"""What a fine-tuning is asked to do: one frozen, validated configuration that travels with the results."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..config import GateConfig
from ..errors import ConfigError
from ..training.rates import REACH
from ..training.schedule import KINDS

__all__ = ["CALIBRATIONS", "MODES", "PRECISIONS", "FinetuneConfig"]

CALIBRATIONS = ("static", "dynamic")
MODES = ("dynamic", "static", "dense")
PRECISIONS = ("no", "bf16", "fp16")

# What may differ between a training and its resumption: nothing that its numbers depend on.
FREE = ("output", "workers", "save_every", "download")
# And these, where there are no gates.
OF_GATES = ("straight_through", "calibration", "gate_lr", "schedule", "rise", "levels", "penalty")
# What may be a file or a folder, of which each has many names.
PLACES = ("model", "data", "val_data", "data_dir", "weights", "teacher")


@dataclass(frozen=True)
class FinetuneConfig:
    """How `finetune` trains. Everything but the first three fields has a default.

    Args:
        model: A name that timm knows, a folder that `gatedprune.save` or `finetune` wrote, or ``module:callable``.
        data: A folder of class folders below ``train_split`` and ``val_split``, a .tar of one split, or a data set that
            timm names: ``torch/cifar10``, ``hfds/uoft-cs/cifar10``.
        output: The folder for everything that is written.
        val_data: A folder or .tar for validation, where ``data`` is not both.
        train_split, val_split: Names of the splits.
        data_dir: Where named data sets lie. download: fetch them there.
        num_classes: Where the data set does not tell.
        mode: "dynamic": gates. "static": the same sites pruned once, to the same numbers of channels.
            "dense": as it is.
        ratio, macs, include, exclude, signed, rank, straight_through: As in `gatedprune.wrap`; static uses them alike.
        pretrained: Start from timm's weights. weights: start from those of this file.
        size: (H, W) in pixels; default: as timm configures the model.
        calibrate: Fit the predictors on so many training images first (`gatedprune.calibrate`); static pruning keeps
            the channels that contribute most on them. 0: gates start as `wrap` makes them, and static pruning keeps the
            channels with the largest weights.
        calibration: How gates start where they are calibrated. "static": with the best static choice; training learns
            gains and the choice by image from there. "dynamic": they choose by image from the start, at gain 1: better
            before training, and where that is short.
        epochs, batch_size: Images of one optimiser step, over all processes and accumulated parts together.
        accumulate: Parts into which a batch is split, one after the other.
        gate_lr: Learning rate of predictors' weights, in units of ``lr`` over the mean square of what the gate sees
            (`gatedprune.training.predictor_rates`); 0: predictors stay as they start.
        lr, opt, momentum, weight_decay, clip_grad: Of timm's optimiser of that name.
        sched, warmup_epochs: Of timm's learning rate scheduler of that name.
        schedule, rise, levels: How the ratio rises (`RatioSchedule`), over this share of the epochs.
        penalty: λ of FBS's L1 term on saliencies.
        distill: Weight of the distillation loss, in [0, 1]; the labels' loss has the rest.
        teacher: A folder that `finetune` wrote; default: the dense model as it starts.
        temperature: Of the distillation.
        smoothing, mixup, min_crop, auto_augment, hflip: Label smoothing, mixup's α, smallest share of the image that a
            random crop takes, timm's policy, chance of a horizontal flip.
        ema: Decay of a moving average of the weights, which then is the result; None: no average.
        precision: Mixed precision, one of "no", "bf16", "fp16"; None: as `accelerate launch` says.
        channels_last, compile: Memory layout; `torch.compile`.
        seed: Every random draw follows from it and from epoch and place alone.
        workers: Processes that load images, for each training process.
        save_every: Minutes between two saves of the training's state, beside the end of each epoch.

    Raises:
        ConfigError: An option is out of its domain.
    """

    model: str
    data: str
    output: str
    val_data: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    data_dir: str | None = None
    download: bool = False
    num_classes: int | None = None
    mode: str = "dynamic"
    ratio: float | None = None
    macs: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    signed: bool = False
    rank: int | None = None
    straight_through: bool = False
    pretrained: bool = False
    weights: str | None = None
    size: tuple[int, int] | None = None
    calibrate: int = 0
    calibration: str = "static"
    epochs: int = 10
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 0.01
    gate_lr: float = REACH
    opt: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_grad: float | None = None
    sched: str = "cosine"
    warmup_epochs: int = 0
    schedule: str = "cosine"
    rise: float = 0.5
    levels: int | None = None
    penalty: float = 1e-8
    distill: float = 0.0
    teacher: str | None = None
    temperature: float = 2.0
    smoothing: float = 0.0
    mixup: float = 0.0
    min_crop: float = 0.35
    auto_augment: str | None = None
    hflip: float = 0.5
    ema: float | None = None
    precision: str | None = None
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    workers: int = 0
    save_every: float = 5.0

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "size"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else tuple(value))  # JSON has lists
        self._check_choices()
        for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("calibrate", 0), ("workers", 0),
                            ("warmup_epochs", 0), ("seed", 0)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"`{name}` of finetune must be an integer of at least {least}. Got {value!r}.")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is None and name in ("clip_grad", "ema"):
                continue
            if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
                raise ConfigError(f"`{name}` of finetune must be a number in [{low:g}, {high:g}]. Got {value!r}.")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"`batch_size` of finetune is that of a whole step: {self.batch_size} cannot be split into "
                f"{self.accumulate} equal parts (`accumulate`)."
            )
        if self.mixup and self.batch_size // self.accumulate % 2:
            raise ConfigError("`mixup` mixes pairs: the batch (its parts, with `accumulate`) must be even.")
        if self.mode != "dense":
            self.gates()  # raises where the gates' own options are out of their domain

    def _check_choices(self) -> None:
        for name, choices in (("mode", MODES), ("calibration", CALIBRATIONS), ("schedule", KINDS),
                              ("precision", (None, *PRECISIONS))):  # fmt: skip
            if getattr(self, name) not in choices:
                known = ", ".join(c for c in choices if c)
                raise ConfigError(f"`{name}` of finetune must be one of {known}. Got {getattr(self, name)!r}.")
        if self.pretrained and self.weights is not None:
            raise ConfigError("Give finetune either `pretrained` or `weights`, not both.")
        if self.teacher is not None and not self.distill:
            raise ConfigError("A `teacher` teaches only where `distill` gives its loss a weight: try distill=0.5.")

    def gates(self) -> GateConfig:
        """The gates' configuration."""
        return GateConfig(ratio=self.ratio, macs=self.macs, include=self.include, exclude=self.exclude,
                          signed=self.signed, rank=self.rank, straight_through=self.straight_through)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` takes it back."""
        found = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FinetuneConfig:
        """The configuration that `to_dict` described."""
        return cls(**data)

    def differences(self, other: FinetuneConfig) -> list[str]:
        """The options, in words, in which ``other`` would train differently."""
        mine, theirs = self.to_dict(), other.to_dict()
        free = FREE if "dynamic" in (self.mode, other.mode) else FREE + OF_GATES
        return [f"{n}: {mine[n]}, now {theirs[n]}" for n in mine if n not in free and not _same(n, mine[n], theirs[n])]


def _same(name: str, one: Any, other: Any) -> bool:
    """Whether two values of an option mean the same: "cifar10" may be "/data/cifar10", or a link to it."""
    if name in PLACES and one is not None and other is not None and os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return bool(one == other)


_RANGES = (
    ("lr", 1e-12, 1e6), ("gate_lr", 0.0, 1e6), ("momentum", 0.0, 1.0), ("weight_decay", 0.0, 1e6),
    ("clip_grad", 1e-12, 1e12), ("rise", 0.0, 1.0), ("penalty", 0.0, 1e6), ("distill", 0.0, 1.0),
    ("temperature", 1e-3, 1e3), ("smoothing", 0.0, 0.99), ("mixup", 0.0, 1e3), ("min_crop", 0.01, 1.0),
    ("hflip", 0.0, 1.0), ("ema", 0.0, 1.0), ("save_every", 0.0, math.inf),
)  # fmt: skip
