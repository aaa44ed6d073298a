"""`gatedprune export`: the compact model as a file for another runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from ..data import read_images
from ..wrapping import is_gated
from .common import (
    Chosen,
    Gating,
    Size,
    data_option,
    explained,
    gate_options,
    image,
    limit_option,
    model_options,
)

__all__ = ["command"]

_SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt"}


@click.command("export")
@model_options
@click.option(
    "--format",
    "form",
    type=click.Choice(list(_SUFFIXES)),
    default="onnx",
    show_default=True,
    help="What to write: for ONNX Runtime and others, for PyTorch, or for libtorch.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file.  [default: model.onnx, model.pt2 or model.pt]",
)
@gate_options
@click.option("--size", type=Size(), help="Image size in pixels; default: as saved, or the one timm configures.")
@click.option("--any-size", is_flag=True, help="Height and width may vary too; for convolutional models.")
@click.option("--batch", type=click.IntRange(1), help="Images in each call; faster than the default, any number.")
@data_option("--static-profile", help="Export a plain static model: the channels used most over these images.")
@limit_option
@click.option("--check/--no-check", default=True, show_default=True, help="Run the file and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: Chosen, form: str, output: Path | None, gated: Gating, size: tuple[int, int] | None, any_size: bool,
            batch: int | None, static_profile: Path | None, limit: int | None, check: bool,
            as_json: bool) -> None:  # fmt: skip
    """The compact model as an ONNX file, a torch.export program or TorchScript, its choice of channels included.

    \b
      gatedprune export my_model --output my_model.onnx
      gatedprune export my_model --format torch-export --size 192x640
      gatedprune export my_model --any-size --batch 1
      gatedprune export my_model --static-profile images/ --output static.onnx
      gatedprune export mypackage.models:build --ratio 0.3 --batch 1 --json

    my_model is a folder that gatedprune.save() wrote. Of a name that timm knows, weights are random unless --weights or
    --pretrained is given. ONNX needs the extra `export` (onnx, onnxscript, onnxruntime).
    """
    from ..engine import freeze
    from ..export import export as run
    from ..training import most_used

    def work() -> Any:
        network = model(size)
        images = torch.zeros(2, *image(network, size)) if size is not None or not is_gated(network) else None
        network = gated(network, images)
        source = network
        if static_profile is not None:
            used = read_images(static_profile, network, size=size, limit=limit)
            active, gains = most_used(network, used)
            source = freeze(network, active, (torch.zeros(2, *image(network, size)),), gains)
        path = output or Path("model" + _SUFFIXES[form])
        return run(source, path, form, example_inputs=images, batch=batch, any_size=any_size, check=check)

    result = explained(work)
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
