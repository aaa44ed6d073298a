"""The command: measure, print the table, write JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.files import write_json
from gatedprune.measure import environment

from .baselines import RANKINGS, taylor_gradients
from .data import load_images, load_labels, load_model, load_views
from .measure import Views, measure, measure_allocated, top1

__all__ = ["main", "table"]

_FILE: Any = click.Path(exists=True, dir_okay=False, path_type=Path)


def table(dense: float, runs: list[dict[str, Any]]) -> str:
    """The result as Markdown: a row for each way to choose, a column for each ratio; then R² by site."""
    rows = [("", *(f"{run['ratio']:g}" for run in runs)), ("---",) * (len(runs) + 1)]
    rows += [(f"static, {name}", *(f"{run['static'][name]:.1f}" for run in runs)) for name in runs[0]["static"]]
    rows.append(("dynamic, calibrated", *(f"{run['dynamic']:.1f}" for run in runs)))
    rows.append(("… its share of the predictors", *(f"{run['share']:g}" for run in runs)))
    if "allocated" in runs[0]:
        for way in ("static", "dynamic"):
            rows.append((f"{way}, calibrated, allocated", *(f"{run['allocated'][way]:.1f}" for run in runs)))
    if "oracle" in runs[0]:
        rows.append(("dynamic, predictors whole", *(f"{run['whole']:.1f}" for run in runs)))
        rows.append(("dynamic, per-image oracle", *(f"{run['oracle']:.1f}" for run in runs)))
    rows.append(("MACs left, predictors included", *(f"{run['macs']:.2f}" for run in runs)))
    if "sites" in runs[0]:
        for key, title in (("r2_cross_validated", "R², cross-validated"), ("r2_held_out", "R², evaluation images")):
            rows += [(f"{title}: {site}", *(f"{run['sites'][site][key]:.2f}" for run in runs))
                     for site in runs[0]["sites"]]  # fmt: skip
    return "\n".join([f"top-1, from {dense:.1f} dense", "", *("| " + " | ".join(row) + " |" for row in rows)])


@click.command(context_settings={"show_default": True})
@click.option("--model", default="tf_efficientnet_lite0", help="A timm classifier of the 1,000 ImageNet classes.")
@click.option("--weights", type=_FILE, help="A state dict (.pth). Default: timm's own weights, downloaded.")
@click.option("--images", type=_FILE, help="A tar of images to evaluate on.")
@click.option("--labels", type=_FILE, help="CSV with the columns file and class_index.")
@click.option("--calibration", type=_FILE, required=True, help="A tar of other images to calibrate on.")
@click.option(
    "--ratio",
    "ratios",
    type=click.FloatRange(0, 1, max_open=True),
    multiple=True,
    default=(0.1, 0.2, 0.3, 0.5),
    help="Share of suppressed channels; may be given several times.",
)
@click.option("--include", multiple=True, help="Gate only sites that fit this pattern; may be given several times.")
@click.option("--exclude", multiple=True, help="Never gate sites that fit this pattern.")
@click.option("--signed/--absolute", default=True, help="What gates see: the mean, or the mean absolute value.")
@click.option("--rank", type=click.IntRange(1), help="Of predictors; default: whole matrices.", show_default=False)
@click.option(
    "--held-out",
    type=click.IntRange(2),
    help="In place of --images: leave every so many'th calibration image out, and measure on those how often the "
    "dense model's answer is kept. For choosing options without a look at the images to evaluate on.",
)
@click.option("--rounds", type=click.IntRange(1), default=4, help="Passes over the calibration images.")
@click.option("--views", type=click.IntRange(1), default=1, help="The images themselves, and random crops of them.")
@click.option("--allocate/--uniform", default=False, help="Also ratios by sensitivity, at the same MACs.")
@click.option(
    "--ranking",
    "rankings",
    type=click.Choice(RANKINGS),
    multiple=True,
    default=RANKINGS,
    help="Static rankings to measure; may be given several times.",
)
@click.option(
    "--yardsticks/--no-yardsticks",
    default=True,
    help="Also predictors that are not tempered, the per-image oracle, and R² of the former.",
)
@click.option("--mean", type=float, help="Of the normalisation; default: the model's.")
@click.option("--std", type=float, help="Of the normalisation; default: the model's.")
@click.option("--batch", type=click.IntRange(1), default=50, help="Images a forward pass.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers to this file.")
def main(model: str, weights: Path | None, images: Path | None, labels: Path | None, calibration: Path,
         ratios: tuple[float, ...], include: tuple[str, ...], exclude: tuple[str, ...], signed: bool,
         rank: int | None, held_out: int | None, rounds: int, views: int, allocate: bool,
         rankings: tuple[str, ...], yardsticks: bool, mean: float | None, std: float | None, batch: int,
         file: Path | None) -> None:  # fmt: skip
    """Top-1 of dense, static and dynamic pruning without training, at the same number of channels."""
    if held_out is None and (images is None or labels is None):
        raise click.UsageError("Give --images and --labels, or --held-out.")
    try:
        net = load_model(model, weights).to(memory_format=torch.channels_last)  # a quarter faster on CPUs
        other = load_views(calibration, net, mean, std, views)
        if images is None or labels is None or held_out is not None:
            pictures, truth, other = _leave_out(net, other, held_out or 2, batch)
        else:
            pictures, names = load_images(images, net, mean, std)
            truth = load_labels(labels, names)
        gated = gatedprune.wrap(net, ratio=0.0, example_inputs=pictures[:1], include=include, exclude=exclude,
                                signed=signed, rank=rank)  # fmt: skip
        if "taylor" in rankings:
            taylor_gradients(gated, other[0], batch)
        dense, data, runs = top1(gated, pictures, truth, batch), Views(other, batch), []
        options = {"model": model, "include": include, "exclude": exclude, "signed": signed, "rank": rank,
                   "held_out": held_out, "rounds": rounds, "views": views, "images": len(pictures),
                   "calibration": len(other[0])}  # fmt: skip
        for ratio in ratios:
            run = measure(gated, ratio, data, pictures, truth, batch=batch, rounds=rounds, rankings=rankings,
                          yardsticks=yardsticks)  # fmt: skip
            if allocate:
                run["allocated"] = measure_allocated(gated, run["macs"], data, pictures, truth, batch=batch,
                                                     rounds=rounds)  # fmt: skip
            runs.append({"ratio": ratio, **run})
            if file is not None:  # after each ratio: they take minutes
                result = {"options": options, "dense": dense, "runs": runs,
                          "environment": dataclasses.asdict(environment())}  # fmt: skip
                write_json(result, file)
    except gatedprune.GatedPruneError as error:
        raise click.ClickException(str(error)) from error
    print(table(dense, runs))


def _leave_out(net: nn.Module, views: list[Tensor], every: int, batch: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The images left out of calibration, the dense model's answers to them, and all views of the others."""
    left = torch.arange(len(views[0])) % every == 0
    pictures = views[0][left]
    with torch.no_grad():
        answers = torch.cat([net(x).argmax(1) for x in pictures.split(batch)])
    return pictures, answers, [view[~left] for view in views]
