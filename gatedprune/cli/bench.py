"""`gatedprune bench`: dense, static and dynamic timed over sizes, ratios, batches and threads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import click
import torch

from .common import (
    Build,
    Numbers,
    Size,
    dense,
    explained,
    image,
    json_option,
    model_argument,
    printed,
    rank_option,
    written,
)

__all__ = ["command"]


@click.command("bench")
@model_argument
@click.option("--size", "sizes", type=Size(), multiple=True, help="Image size in pixels; may be given several times.")
@click.option(
    "--ratio",
    "ratios",
    type=Numbers(float, 0, 0.99),
    default="0.5",
    show_default=True,
    help="Shares of each site's channels that are suppressed.",
)
@click.option("--batch", "batches", type=Numbers(int, 1, 4096), default="1", show_default=True, help="Images a call.")
@click.option("--threads", type=Numbers(int, 1, 1024), default="1", show_default=True, help="Threads for one operator.")
@click.option(
    "--against",
    "runtimes",
    multiple=True,
    type=click.Choice(["recorded", "compile", "onnxruntime", "openvino"]),
    help="Also time the static model in this runtime; may be given several times. recorded: without Python between its "
    "operators, as the engine runs the dynamic one.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "native", "torch"]),
    default="auto",
    show_default=True,
    help="What computes the dynamic model.",
)
@rank_option
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What the models and images are converted to.",
)
@click.option("--tune", is_flag=True, help="Choose each layer's backend by timing it.")
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Rounds that are timed.")
@json_option
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw ms over MACs to a .png, .svg or .pdf."
)
def command(model: Build, sizes: tuple[tuple[int, int], ...], ratios: list[float],
          batches: list[int], threads: list[int], runtimes: tuple[str, ...], backend: str,
          rank: int | None, dtype: str, tune: bool, repeats: int, file: Path | None,
          plot: Path | None) -> None:  # fmt: skip
    """How fast: dense, static and dynamic timed together, over sizes, ratios, batches and threads.

    \b
      gatedprune bench resnet50 --size 480x640 --size 224 --threads 1,2
      gatedprune bench resnet50 --ratio 0,0.1,0.3,0.5,0.7,0.9 --plot resnet50.svg --json resnet50.json
      gatedprune bench mobilenetv2_100 --batch 1,8 --against onnxruntime --against compile

    Equality of the dynamic model with the masked reference is checked first. "realised" is the share of the theoretical
    speed-up: time saved over MACs saved. Weights are random. Needs the extra `compare`, a plot the extra `bench`.
    """
    from ..compare.bench import bench as run  # torch-pruning is optional

    def work() -> Any:
        torch.manual_seed(0)
        size = sizes[0] if sizes else None
        network = dense(model("cpu", size))
        shapes = list(sizes) or [(image(network, None)[1], image(network, None)[2])]
        count = len(shapes) * len(ratios) * len(batches) * len(threads)
        with click.progressbar(length=count, label="timing", file=sys.stderr) as bar:
            return run(network, shapes, ratios=ratios, batches=batches, threads=threads, runtimes=runtimes,
                       backend=backend, tune=tune, rank=rank, dtype=getattr(torch, dtype), repeats=repeats,
                       on_cell=lambda _: bar.update(1))  # fmt: skip

    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--plot needs matplotlib: pip install 'gatedprune[bench]'.")
    result = explained(work)
    if plot is not None:
        written(result.plot, plot)
    printed(result, file)
