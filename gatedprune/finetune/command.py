"""`finetune`: from options to a trained model with its table, in one output folder."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..files import atomic_write, write_json
from ..measure.environment import environment
from ..measure.macs import format_macs
from ..training import Interrupted, stop_on_signal
from .chance import seed_everything
from .data import Splits, load_splits
from .loop import Trainer, accelerator_for, check_recipe, saved_state
from .models import build, macs, save_finetuned
from .options import FinetuneConfig

__all__ = ["Finetuned", "finetune"]

STATE, LOG, RESULT, MODEL = "state.pt", "log.csv", "result.json", "model"
RATE_IMAGES = 128  # enough for a mean of squares


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` returns; prints as a table.

    Attributes:
        mode: "dynamic", "static" or "dense".
        top1: Accuracy on the validation images at the end, in percent.
        macs, dense_macs: MACs per image of the result, predictors included, and of the dense model.
        parameters: Of the result.
        epochs: Trained.
        log: A row for each epoch.
        folder: Where the model was saved.
    """

    mode: str
    top1: float
    macs: int
    dense_macs: int
    parameters: int
    epochs: int
    log: list[dict[str, float]]
    folder: str

    def __str__(self) -> str:
        head = ("mode", "top-1", "MACs", "of dense", "parameters", "epochs")
        row = (self.mode, f"{self.top1:.2f} %", format_macs(self.macs), f"{self.macs / self.dense_macs:.1%}",
               f"{self.parameters / 1e6:.2f} M", str(self.epochs))  # fmt: skip
        widths = [max(len(a), len(b)) for a, b in zip(head, row, strict=True)]
        lines = ["  ".join(t.rjust(w) for t, w in zip(cells, widths, strict=True)) for cells in (head, row)]
        return "\n".join([*lines, f"saved in {self.folder}"])


def finetune(config: FinetuneConfig, *, resume: bool = False, progress: bool = True,
             say: Callable[[str], None] = lambda text: None) -> Finetuned:  # fmt: skip
    """Train as a configuration says, and save the result.

    In the output folder: ``model`` (the result), ``result.json``, ``log.csv``, ``state.pt`` (what `resume` goes on
    from) and, with TensorBoard installed, ``tensorboard``.

    Args:
        config: What to do.
        resume: Go on where the output folder's state was saved, if there is one: the end is the same, to the bit on one
            kind of processor, as that of a training that was never stopped.
        progress: Show bars.
        say: Called with a line now and then, in the first process.

    Raises:
        ConfigError, DataError, CheckpointError, ModelError: Something is wrong with options, data, weights or model;
            all of it is looked at before training starts.
        DivergedError: The loss is no longer finite.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    check_recipe(config)
    output = Path(config.output)
    accelerator = accelerator_for(config)
    state = saved_state(output / STATE, config, resume, accelerator.is_main_process)
    splits = load_splits(config)

    def transform(model: nn.Module, example: Tensor) -> None:
        splits.transform(config, resolve_model_data_config(model, {"input_size": tuple(example.shape[1:])}))

    def images(model: nn.Module, example: Tensor) -> Sequence[Tensor]:
        if config.calibrate:
            say(f"calibrating on {config.calibrate} images")
        transform(model, example)
        return _first_images(config, splits)

    start = build(config, splits.classes, None if state is None else state["kept"],
                  images if state is None else None, accelerator.device)  # fmt: skip
    if state is not None:
        start.rates = state["rates"]
    _check_same(state, splits, output)
    transform(start.dense, start.example)
    if accelerator.is_main_process:
        _open(output, config)
    accelerator.init_trackers("tensorboard")
    trainer = Trainer(config, start, splits, accelerator, output / STATE)
    if state is not None:
        trainer.restore(state)
        say(f"resumed at epoch {trainer.epoch + 1}, step {trainer.step + 1}")
    if accelerator.num_processes > 1:
        say(f"{accelerator.num_processes} processes, {accelerator.device.type}")
    try:
        _fit(trainer, say, progress)
        return _finish(trainer, output)
    finally:
        accelerator.end_training()
        # Else a second training in this process could not have another precision.
        AcceleratorState._reset_state()


def _fit(trainer: Trainer, say: Callable[[str], None], progress: bool) -> None:
    with stop_on_signal() as stop:
        while not trainer.finished:
            trainer.fit_epoch(stop, progress=progress)
            if trainer.accelerator.is_main_process:
                _write_log(Path(trainer.config.output) / LOG, trainer.log)
                say(_epoch_line(trainer.log[-1], trainer.config.epochs))
            if stop() and not trainer.finished:
                raise Interrupted


def _check_same(state: dict[str, Any] | None, splits: Splits, output: Path) -> None:
    if state is None:
        return
    now = [len(splits.train), len(splits.val)]
    if state["classes"] != list(splits.classes) or state["samples"] != now:
        raise ConfigError(
            f"The training in {output} was begun on other data: {state['samples']} images for training and validation "
            f"in {len(state['classes'])} classes, now {now} in {len(splits.classes)}. Give the same data to resume it, "
            "or another --output folder to start anew."
        )


def _first_images(config: FinetuneConfig, splits: Splits) -> Sequence[Tensor]:
    """Batches of training images, spread over the classes, prepared as validation images are: to calibrate on, or just
    to see what the gates see."""
    count = min(config.calibrate or RATE_IMAGES, len(splits.train))
    augmented, splits.train.transform = splits.train.transform, splits.val.transform
    try:
        seed_everything(config.seed)
        chosen = [splits.train[i * len(splits.train) // count][0] for i in range(count)]
    finally:
        splits.train.transform = augmented
    return torch.stack(chosen).split(config.batch_size)


def _open(output: Path, config: FinetuneConfig) -> None:
    try:
        write_json(config.to_dict(), output / "options.json")
    except OSError as error:
        raise CheckpointError(f"The output folder {output} cannot be written ({error}). Name another one.") from error


def _write_log(path: Path, log: list[dict[str, float]]) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(log[0]))
            writer.writeheader()
            writer.writerows(log)

    atomic_write(path, write)


def _epoch_line(row: dict[str, float], epochs: int) -> str:
    common = f", winners in common {row['in_common']:.0f} %" if "in_common" in row else ""
    return (
        f"epoch {row['epoch']:.0f}/{epochs}: train loss {row['train_loss']:.4f}, validation loss "
        f"{row['val_loss']:.4f}, top-1 {row['top1']:.2f} %, ratio {row['ratio']:.2f}{common}, {row['seconds']:.0f} s"
    )


def _finish(trainer: Trainer, output: Path) -> Finetuned:
    """Save the model at its final ratio, and what became of it."""
    config, start, model = trainer.config, trainer.start, trainer.result
    trainer.set_ratio()
    start.example = start.example.to(trainer.accelerator.device)
    parameters = sum(p.numel() for p in model.parameters())
    result = Finetuned(config.mode, trainer.log[-1]["top1"], macs(model, start.example), start.dense_macs, parameters,
                       config.epochs, trainer.log, os.fspath(output / MODEL))  # fmt: skip
    if trainer.accelerator.is_main_process:
        save_finetuned(start, config, trainer.splits.classes, model, output / MODEL)
        written = {**asdict(result), "classes": list(trainer.splits.classes), "options": config.to_dict(),
                   "environment": asdict(environment())}  # fmt: skip
        write_json(written, output / RESULT)
    trainer.accelerator.wait_for_everyone()
    return result
