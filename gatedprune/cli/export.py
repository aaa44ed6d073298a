"""`gatedprune export`: the compact model as a file for another runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from ..config import GateConfig
from ..wrapping import is_gated, wrap
from .common import Build, Size, explained, image, model_argument

__all__ = ["command"]


@click.command("export")
@model_argument
@click.option("--format", "form", type=click.Choice(["onnx", "torch-export"]), default="onnx", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: model.onnx, model.pt2]")
@click.option("--ratio", type=float, help="Share of suppressed channels.  [default: 0.5, or as saved]")
@click.option("--macs", type=float, help="Instead: the share of the dense MACs that may be left.")
@click.option("--size", type=Size(), help="Image size in pixels; default: as saved, or the one timm configures.")
@click.option("--batch", type=click.IntRange(1), help="Images in each call; faster than the default, any number.")
@click.option("--check/--no-check", default=True, show_default=True, help="Run the file and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: Build, form: str, output: Path | None, ratio: float | None, macs: float | None,
           size: tuple[int, int] | None, batch: int | None, check: bool, as_json: bool) -> None:  # fmt: skip
    """The compact model as an ONNX file or a torch.export program, its choice of channels for each image included.

    \b
      gatedprune export my_model --output my_model.onnx
      gatedprune export my_model --format torch-export --size 192x640
      gatedprune export mypackage.models:build --ratio 0.3 --batch 1 --json

    my_model is a folder that gatedprune.save() wrote. Of a name that timm knows, weights are random. ONNX needs the
    extra `export` (onnx, onnxscript, onnxruntime).
    """
    from ..export import export as run

    def work() -> Any:
        torch.manual_seed(0)
        network = model("cpu", size)
        images = torch.zeros(2, *image(network, size)) if size is not None or not is_gated(network) else None
        if not is_gated(network):
            network = wrap(network, config=GateConfig(ratio=ratio, macs=macs), example_inputs=images).eval()
        elif macs is not None:
            raise click.UsageError("--macs is for a model without gates. Give --ratio: the trained gates stay.")
        elif ratio is not None:
            network.set_ratio(ratio)  # type: ignore[operator]
        path = output or Path("model.onnx" if form == "onnx" else "model.pt2")
        return run(network, path, form, example_inputs=images, batch=batch, check=check)

    result = explained(work)
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
