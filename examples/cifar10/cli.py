"""The command: train what is not trained yet, time it, print the table, draw the picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import torch

import gatedprune
from gatedprune.files import write_json
from gatedprune.finetune import CALIBRATIONS, PRECISIONS, Interrupted, Trials
from gatedprune.measure import environment

from . import network
from .report import COSTS, at_equal_accuracy, draw, measure_times, points, table

__all__ = ["main"]


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False), help="Folder with train/ and "
              "test/, a folder of images for each class in both.")  # fmt: skip
@click.option("--output", default="runs/cifar10", type=click.Path(file_okay=False, path_type=Path),
              help="Folder for all that is written.")  # fmt: skip
@click.option("--model", default="small", help="small (16 million MACs, for CPUs), mobile (1 million, inverted "
              "residuals), large (0.56 billion, for a GPU), or whatever `gatedprune finetune` takes.")  # fmt: skip
@click.option("--weights", type=click.Path(exists=True, dir_okay=False), help="Start dense from this file.")
@click.option("--pixels", type=click.IntRange(8), default=network.PIXELS, help="Height and width of the images.")
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, default=(0, 1, 2), help="May be given several "
              "times. Processes for one seed each may run side by side.")  # fmt: skip
@click.option("--macs", type=click.FloatRange(0, 1, min_open=True, max_open=True), multiple=True, default=(0.5, 0.25),
              help="Share of the dense MACs that is left; may be given several times.")  # fmt: skip
@click.option("--epochs", type=click.IntRange(1), default=60, help="Of the dense training.")
@click.option("--finetune-epochs", type=click.IntRange(1), default=30, help="Of each pruned one.")
@click.option("--lr", type=float, default=0.1, help="Of the dense training.")
@click.option("--finetune-lr", type=float, default=0.02, help="Of each pruned one.")
@click.option("--batch-size", type=click.IntRange(2), default=128)
@click.option("--distill", type=click.FloatRange(0, 1), default=0.5, help="Weight of the loss against the dense model.")
@click.option("--rise", type=click.FloatRange(0, 1), default=0.0, help="Share of the epochs over which the ratio of "
              "gates rises from 0.")  # fmt: skip
@click.option("--calibration-images", type=click.IntRange(0), default=500, help="Training images on which gates, and "
              "the static channels, are chosen first.")  # fmt: skip
@click.option("--calibration", type=click.Choice(CALIBRATIONS), default="static", help="How gates start, as in "
              "`gatedprune finetune`.")  # fmt: skip
@click.option("--gate-lr", type=click.FloatRange(0), default=1.0, help="Learning rate of gates' predictors, as in "
              "`gatedprune finetune`.")  # fmt: skip
@click.option("--include", multiple=True, metavar="PATTERN", help="Prune only these sites, such as "
              "'layer4*'; may be given several times.")  # fmt: skip
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Never prune these.")
@click.option("--signed", is_flag=True, help="Gates see means, not means of absolute values.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Mixed precision; default: as `accelerate launch` "
              "says.")  # fmt: skip
@click.option("--channels-last/--channels-first", default=torch.accelerator.is_available(), help="Memory layout; "
              "default: last on a GPU.")  # fmt: skip
@click.option("--workers", type=click.IntRange(0), default=0, help="Processes that load images.")
@click.option("--threads", type=click.IntRange(1), default=1, help="For training on a CPU, and for timing.")
@click.option("--repeats", type=click.IntRange(1), default=100, help="Timed rounds.")
@click.option("--train/--no-train", default=True, help="Only report on what is there already.")
@click.option("--time/--no-time", "timing", default=True, help="Also measure milliseconds.")
def main(data: str, output: Path, model: str, weights: str | None, pixels: int, seeds: tuple[int, ...],
         macs: tuple[float, ...], epochs: int, finetune_epochs: int, lr: float, finetune_lr: float, batch_size: int,
         distill: float, rise: float, calibration_images: int, calibration: str, gate_lr: float,
         include: tuple[str, ...], exclude: tuple[str, ...], signed: bool, precision: str | None,
         channels_last: bool, workers: int, threads: int, repeats: int, train: bool, timing: bool) -> None:  # fmt: skip
    """Train a network dense, then prune it statically and dynamically, all alike, and compare.

    Static and dynamic start from the same dense network, at the same share of its MACs, and are trained with the same
    images in the same order, the same teacher and the same options. What is trained already is not trained again, and
    what was interrupted goes on: give the same command.

    \b
    python -m gatedprune.examples.cifar10 --data cifar10                     on a GPU: --model large
    python -m gatedprune.examples.cifar10 --data cifar10 --no-train          the table again
    """
    torch.set_num_threads(threads)
    recipe = {"data": data, "val_split": "test", "size": (pixels, pixels), "batch_size": batch_size, "workers": workers,
              "precision": precision, "channels_last": channels_last, "min_crop": 0.5,
              "weight_decay": 5e-4}  # fmt: skip
    ours = model in network.__all__
    dense = {"model": f"{network.__name__}:{model}" if ours else model, "weights": weights, "epochs": epochs, "lr": lr}
    pruned = {"epochs": finetune_epochs, "lr": finetune_lr, "distill": distill, "rise": rise,
              "calibrate": calibration_images, "calibration": calibration, "gate_lr": gate_lr, "include": include,
              "exclude": exclude, "signed": signed}  # fmt: skip
    trials = Trials(output, recipe, dense, pruned, macs, seeds=seeds)
    try:
        if train:
            trials.train(click.echo)
        times = {}
        if timing:
            times = measure_times(trials, size=(pixels, pixels), threads=threads, repeats=repeats, say=click.echo)
    except Interrupted:
        raise click.ClickException("Stopped; the state is saved. The same command goes on.") from None
    except gatedprune.GatedPruneError as error:
        raise click.ClickException(str(error)) from error
    found = points(trials, times)
    click.echo("\n" + table(found))
    _write(output, trials, found)


def _write(output: Path, trials: Trials, found: list[Any]) -> None:
    result = {"points": [dataclasses.asdict(p) for p in found],
              "dynamic_at_equal_accuracy": {
                  name: {asked: ratio._asdict() for asked, ratio in at_equal_accuracy(found, cost).items()}
                  for name, cost in COSTS.items()
              },
              "trials": trials.to_dict(), "environment": dataclasses.asdict(environment())}  # fmt: skip
    write_json(result, output / "result.json")
    try:
        draw(found, output / "accuracy.png")
    except ImportError:
        click.echo("No picture: pip install 'gatedprune[bench]' draws accuracy.png.")
    click.echo(f"Written: {output / 'result.json'}")
