"""What `gatedprune inspect MODEL --image a.jpg b.jpg` does: which channels a few images use."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from ..inside import choices, load_images
from ..wrapping import is_gated, wrap
from .common import Build, explained, image

__all__ = ["gated_for_images", "image_options", "show_choices"]


def image_options(command: Callable) -> Callable:
    """``--image A B …`` and ``--plot``: click's options take one value each, the others come as arguments."""
    found = click.Path(exists=True, dir_okay=False, path_type=Path)
    for add in (
        click.option("--plot", type=click.Path(dir_okay=False, path_type=Path),
                     help="With --image: draw it to a .png, .svg or .pdf (extra `bench`)."),
        click.argument("more", nargs=-1, type=found, metavar=""),
        click.option("--image", "paths", type=found, multiple=True, metavar="A B …",
                     help="Instead: which channels of each site these images use."),
    ):  # fmt: skip
        command = add(command)
    return command


def gated_for_images(model: Build, size: tuple[int, int] | None) -> nn.Module:
    """MODEL with gates: its own, or untouched ones."""
    network = model("cpu", size)
    if is_gated(network):
        return network
    gated: nn.Module = wrap(network, example_inputs=torch.zeros(2, *image(network, size))).eval()
    return gated


def show_choices(model: Build, size: tuple[int, int] | None, paths: Sequence[Path], plot: Path | None,
                 as_json: bool) -> None:  # fmt: skip
    """Print which channels of each site the images use, and draw it where asked for."""

    def work() -> Any:
        network = gated_for_images(model, size)
        images, pictures = load_images(network, paths, size)
        found = choices(network, images, [path.name for path in paths])
        if plot is not None:
            found.plot(plot, pictures)
        return found

    if len(paths) < 2:
        raise click.UsageError("--image takes two images or more: gatedprune inspect MODEL --image a.jpg b.jpg")
    torch.manual_seed(0)
    found = explained(work)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))
