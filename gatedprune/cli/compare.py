"""`gatedprune compare`: dense, static and dynamic in one table."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from ..config import GateConfig
from ..data import Images, read_images, top1
from ..errors import DataError
from ..wrapping import is_gated
from .common import (
    NO_GATES,
    Chosen,
    Numbers,
    data_option,
    either_budget,
    explained,
    image,
    json_option,
    labels_option,
    limit_option,
    model_options,
    printed,
    rank_option,
    refuse,
    size_option,
    written,
)
from .training import trained, trials_of

__all__ = ["command"]

_STATIC = ("magnitude-l2", "magnitude-l1", "batch-norm", "random", "taylor", "activation")  # compare.RANKINGS, unloaded


class Accuracy:
    """Top-1 where there are labels, and the share of images on which a model says what the first one, dense, said."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.dense: Tensor | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        outputs = []
        with torch.no_grad():
            for batch in self.images:
                logits = model(batch)
                if not isinstance(logits, Tensor) or logits.dim() != 2:
                    raise DataError("--data measures classifiers: this model gives no logits, (B, classes).")
                outputs.append(logits)
        logits = torch.cat(outputs)
        found = {} if self.images.labels is None else {"top1 %": top1(logits, self.images.labels)}
        if self.dense is None:
            self.dense = logits.argmax(1)
        return {**found, "as dense %": top1(logits, self.dense)}


@click.command("compare")
@model_options
@click.option("--ratio", "ratios", type=Numbers(float, 0, 0.99), help="Shares of each site's channels that are "
              "suppressed, such as 0.3,0.5.  [default: 0.5, or as saved]")  # fmt: skip
@click.option("--macs", type=float, help="Instead: the share of the dense MACs that may be left.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Gate only sites that fit; several times.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Never gate sites that fit; several times.")
@click.option("--signed", is_flag=True, help="Gates look at means, not at means of absolute values.")
@rank_option
@data_option("--data", help="Images to measure the accuracy on.")
@labels_option
@data_option("--calibrate", help="Other images, to calibrate gates and rank channels on; labels are not used.")
@limit_option
@click.option("--static", "rankings", multiple=True, type=click.Choice(_STATIC), help="What ranks channels in a static "
              "row; several times.  [default: magnitude-l2; with --calibrate: all]")  # fmt: skip
@click.option("--combined/--no-combined", default=True, help="Also: half pruned statically, the rest gated.  [default: "
              "combined]")  # fmt: skip
@click.option("--finetune", "epochs", type=click.IntRange(1), metavar="N", help="Train for N epochs first: dense, then "
              "static and dynamic from it, all alike. Needs --train, --data and --output.")  # fmt: skip
@data_option("--train", help="Images to train on, in a folder for each class.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for what is trained; the same "
              "command goes on there.")  # fmt: skip
@click.option("--lr", type=float, default=0.01, show_default=True, help="Learning rate of the dense training; a "
              "third of it for the pruned ones.")  # fmt: skip
@click.option("--train-batch", type=click.IntRange(1), default=64, show_default=True, help="Images in a training step.")
@click.option("--distill", type=float, default=0.5, show_default=True, help="Weight, in [0, 1], of the loss "
              "against the dense model.")  # fmt: skip
@size_option
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images in a call that is timed.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads for one operator.")
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Rounds that are timed.")
@json_option
@click.option("--csv", "table", type=click.Path(dir_okay=False, path_type=Path), help="Write a line for each row.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the Pareto plot to a .png, .svg or "
              ".pdf: accuracy over MACs and over ms; without --data, ms over MACs.")  # fmt: skip
def command(model: Chosen, ratios: list[float] | None, data: Path | None, labels: Path | None, calibrate: Path | None,
            limit: int | None, rankings: tuple[str, ...], combined: bool, size: tuple[int, int] | None, batch: int,
            epochs: int | None, train: Path | None, output: Path | None, lr: float, train_batch: int, distill: float,
            threads: int, repeats: int, file: Path | None, table: Path | None, plot: Path | None,
            **gating: Any) -> None:  # fmt: skip
    """Dense, static, dynamic, and dynamic after static, at the same sites and with as many channels.

    \b
      gatedprune compare resnet18
      gatedprune compare resnet50 --ratio 0.3,0.5,0.7 --size 192x640 --plot resnet50.svg
      gatedprune compare resnet50 --macs 0.5 --batch 4 --json result.json --csv result.csv
      gatedprune compare resnet50 --pretrained --data val/ --calibrate train/ --limit 500 --ratio 0.1,0.2,0.3
      gatedprune compare resnet18 --pretrained --finetune 5 --train train/ --data val/ --macs 0.5 --output runs

    Accuracy needs --data: a folder or .tar with a folder for each class, or --labels; and weights. Without --calibrate
    the gates choose as magnitude does, the same for all images. Needs the extra `compare` (torch-pruning, thop), a plot
    the extra `bench`.
    """
    from ..compare import compare as run  # torch-pruning is optional

    def work() -> Any:
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise click.ClickException("--plot needs matplotlib: pip install 'gatedprune[bench]'.")
        if data is not None or calibrate is not None:
            model.warn()
        read: dict[str, Any] = {"size": size, "limit": limit}
        timed: dict[str, Any] = {
            "threads": threads, "repeats": repeats, "on_row": lambda name: click.echo(f"measuring: {name}", err=True),
        }  # fmt: skip
        if epochs is not None:
            refuse("not with --finetune", labels=labels, calibrate=calibrate, static=rankings)
            if train is None or data is None or output is None:
                raise click.UsageError("--finetune needs --train, --data and --output.")
            recipe = {"data": str(train), "val_data": str(data), "size": size, "batch_size": train_batch}
            trials = trials_of(model, output, recipe, ratios, gating, epochs=epochs, lr=lr, distill=distill)
            network = trained(trials)
            seen = read_images(data, network, **read)
            found = trials.compare(torch.randn(batch, *image(network, size)), evaluate=Accuracy(seen), **timed)
            show(found, seen, (f"all trained for {epochs} epochs; static and dynamic start from the dense model",))
            return
        refuse("for --finetune", train=train, output=output)
        network, options = _gating(model(size), ratios, gating)
        images = None if data is None else read_images(data, network, labels=labels, **read)
        batches = None if calibrate is None else read_images(calibrate, network, **read)
        chosen = rankings or (("magnitude-l2",) if batches is None else _STATIC)
        found = run(
            network, torch.randn(batch, *image(network, size)), **options,
            evaluate=None if images is None else Accuracy(images), rankings=chosen, calibrate=batches,
            combined=combined, **timed,
        )  # fmt: skip
        show(found, images)

    def show(found: Any, images: Images | None, notes: tuple[str, ...] = ()) -> None:
        notes = found.notes + notes
        if images is not None:
            notes += (f"accuracy on {len(images.names)} images of {data}",)
            if images.why:
                notes += (f"no top-1, since {images.why}: give --labels",)
        found = dataclasses.replace(found, notes=notes)
        for path, write in ((table, found.to_csv), (plot, found.plot)):
            if path is not None:
                written(write, path)
        printed(found, file)

    explained(work)


def _gating(network: nn.Module, ratios: list[float] | None, gating: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and the options of `gatedprune.compare` that say how it is gated."""
    if is_gated(network):
        refuse(NO_GATES, **gating)
        return network, {"ratio": ratios}
    either_budget(ratios, gating["macs"])
    first = None if gating["macs"] is not None else (ratios or [0.5])[0]
    config = GateConfig(**{**gating, "ratio": first})
    return network, {"config": config, "ratio": ratios if ratios and len(ratios) > 1 else None}
