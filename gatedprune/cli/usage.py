"""`gatedprune usage`: which channels win over a folder of images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch

from ..inside import image_set, usage
from .common import Build, explained, json_option, model_argument, printed, size_option
from .images import gated_for_images

__all__ = ["command"]

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("usage")
@model_argument
@click.option("--images", "root", required=True, metavar="DIR|TAR", type=click.Path(path_type=Path),
              help="Images in a folder or a .tar; subfolders are classes.")  # fmt: skip
@size_option
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Images in a batch.")
@click.option("--limit", type=click.IntRange(1), help="At most so many images, evenly spread over all.")
@json_option
@click.option("--csv", type=_FILE, help="Write wins by site and channel.")
@click.option("--npz", type=_FILE, help="Write the counts for NumPy.")
@click.option("--plot", type=_FILE, help="Draw a histogram for each site to a .png, .svg or .pdf.")
@click.option("--plot-classes", type=_FILE, help="Draw classes by channels for each site.")
def command(model: Build, root: Path, size: tuple[int, int] | None, batch: int, limit: int | None, file: Path | None,
            csv: Path | None, npz: Path | None, plot: Path | None, plot_classes: Path | None) -> None:  # fmt: skip
    """Which channels of MODEL win, how often, for which classes: always, never, and how much two images share.

    \b
      gatedprune usage my_model --images photos
      gatedprune usage my_model --images imagenet/val --limit 1000 --json usage.json --csv usage.csv
      gatedprune usage my_model --images cifar10/test --plot usage.svg --plot-classes classes.png

    my_model is a folder that gatedprune.save() wrote. A model without gates is gated as wrap() would; its gates are
    untouched and choose alike for every image. Plots need the extra `bench`.
    """

    def work() -> Any:
        network = gated_for_images(model, size)
        images = image_set(network, root, size=size, batch_size=batch, limit=limit)
        if plot_classes is not None and images.classes is None:
            raise click.UsageError(f"--plot-classes needs classes: {root} has no subfolders that tell them.")
        with click.progressbar(images, length=len(images), label="images", file=sys.stderr) as batches:
            found = usage(network, batches, classes=images.classes)
        for target, write in ((csv, found.to_csv), (npz, found.to_npz), (plot, found.plot),
                              (plot_classes, found.plot_classes)):  # fmt: skip
            if target is not None:
                write(target)
        return found

    torch.manual_seed(0)
    printed(explained(work), file)
