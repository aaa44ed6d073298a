"""`gatedprune calibrate`: gates that choose by the image, from unlabelled images and without training, saved."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from ..data import Images, read_images
from ..io import save
from ..training import calibrate
from ..training.calibration import count_passes
from .common import (
    Chosen,
    Gating,
    batch_option,
    data_option,
    explained,
    gate_options,
    image,
    limit_option,
    model_options,
    size_option,
)

__all__ = ["Counted", "command"]


class Counted:
    """Batches that move a progress bar."""

    def __init__(self, images: Images, bar: Any) -> None:
        self.images, self.bar = images, bar

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.images:
            yield batch
            self.bar.update(1)


@click.command("calibrate")
@model_options
@data_option("--data", help="A folder or a .tar of a few hundred images; labels are not used.", required=True)
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder to save it in."
)
@gate_options
@size_option
@limit_option
@batch_option
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True, help="Passes over the images.")
@click.option("--temper/--no-temper", default=True, show_default=True, help="Choose how far gates may go by the image, "
              "by the outputs for images left out; half of the time.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: Chosen, data: Path, output: Path, gated: Gating, size: tuple[int, int] | None, limit: int | None,
            batch: int, rounds: int, temper: bool, as_json: bool) -> None:  # fmt: skip
    """Gate MODEL, fit its gates to images, and save it: no labels, no training.

    \b
      gatedprune calibrate resnet50 --pretrained --data images/ --ratio 0.3 --output my_model
      gatedprune calibrate tf_efficientnet_lite0 --weights lite0.safetensors --data images.tar \\
          --ratio 0.25 --include 'blocks.*.conv_pw' --signed --output lite0_gated
      gatedprune calibrate my_model --data images/ --ratio 0.5 --output my_model_half

    MODEL is a name that timm knows, module:callable, or a folder that gatedprune.save() wrote. Afterwards:
    gatedprune compare my_model, gatedprune export my_model.
    """

    def work() -> tuple[Any, Path]:
        model.warn()
        network = model(size)
        network = gated(network, torch.zeros(2, *image(network, size)))
        images = read_images(data, network, size=size, limit=limit, batch=batch)
        steps = count_passes(rounds, temper=temper) * len(images)
        with click.progressbar(length=steps, label="calibrating", file=sys.stderr) as bar:
            found = calibrate(network, Counted(images, bar), rounds=rounds, temper=temper)
        return found, save(network, output)

    found, folder = explained(work)
    if as_json:
        click.echo(json.dumps({"path": str(folder), **found.to_dict()}, indent=2))
    else:
        click.echo(f"{found}\nsaved in {folder}")
