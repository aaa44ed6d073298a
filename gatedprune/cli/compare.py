"""`gatedprune compare`: dense, static and dynamic in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from ..config import GateConfig
from ..wrapping import is_gated
from .common import Build, dense, explained, image, json_option, model_argument, printed, size_option

__all__ = ["command"]


@click.command("compare")
@model_argument
@click.option("--ratio", type=float, help="Share of each site's channels that is suppressed.  [default: 0.5]")
@click.option("--macs", type=float, help="Instead: the share of the dense MACs that may be left.")
@size_option
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images in a batch.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads for one operator.")
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Rounds that are timed.")
@json_option
def command(model: Build, ratio: float | None, macs: float | None, size: tuple[int, int] | None,
            batch: int, threads: int, repeats: int, file: Path | None) -> None:  # fmt: skip
    """Dense, static and dynamic side by side: MACs, parameters, milliseconds.

    \b
      gatedprune compare resnet18
      gatedprune compare resnet50 --ratio 0.7 --size 192x640 --batch 4 --json result.json
      gatedprune compare resnet50 --macs 0.5

    Weights are random: this shows cost, not accuracy. Needs the extra `compare` (torch-pruning and thop).
    """
    from ..compare import compare as run  # torch-pruning is optional

    def work() -> Any:
        torch.manual_seed(0)
        network = model("cpu", size)
        images = torch.randn(batch, *image(network, size))
        if is_gated(network) and macs is None:
            if ratio is not None:
                network.set_ratio(ratio)  # type: ignore[operator]
            return run(network, images, threads=threads, repeats=repeats)
        network, config = dense(network), GateConfig(ratio=ratio, macs=macs)
        return run(network, images, config=config, threads=threads, repeats=repeats)

    printed(explained(work), file)
