"""Quick start: look, wrap, calibrate, compact, save and load, on any timm model; without data and without network.

`python -m gatedprune.examples.quick_start --help`; the page is docs/quick_start.md.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import timm
import torch
from torch import Tensor

import gatedprune

from .shapes import make_images

__all__ = ["main"]


def in_common(active: dict[str, Tensor], channels: dict[str, int]) -> tuple[float, float]:
    """Of the channels that one sample uses, the share that another one uses too, over all sites and pairs of samples;
    and the same share had the channels been drawn at random.

    Args:
        active: Site → active set, (B, k), B ≥ 2. channels: Site → C.
    """
    shared = drawn = used = 0.0
    for name, chosen in active.items():
        count, k = chosen.shape
        mask = torch.zeros(count, channels[name]).scatter_(1, chosen, 1.0)
        both = mask @ mask.T
        pairs = count * (count - 1)
        shared += float(both.sum() - both.diagonal().sum()) / pairs
        drawn += k * k / channels[name]
        used += k
    return shared / used, drawn / used


@click.command(context_settings={"show_default": True})
@click.option("--model", "name", default="resnet18", help="A name that timm knows.")
@click.option("--pretrained", is_flag=True, help="timm's weights, which are downloaded; else random ones.")
@click.option("--ratio", type=click.FloatRange(0, 1, max_open=True), default=0.5, help="Share of suppressed channels.")
@click.option("--size", type=click.IntRange(32), default=128, help="Height and width of the images, in pixels.")
@click.option("--samples", type=click.IntRange(8), default=16, help="Made-up images to calibrate on.")
@click.option("--save", "folder", type=click.Path(file_okay=False, path_type=Path), help="Keep the model in a folder.")
def main(name: str, pretrained: bool, ratio: float, size: int, samples: int, folder: Path | None) -> None:
    """Look, wrap, calibrate, compact, save and load: a timm model whose channels are chosen per image."""
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, pretrained=pretrained).eval()
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    images, _ = make_images(samples, size)

    try:
        report = gatedprune.find_sites(model, images[:2])
        print(f"look       {len(report)} sites; {report.macs_left(ratio) / report.macs:.0%} of "
              f"{report.macs / 1e6:,.0f} MMACs would be left")  # fmt: skip
        gated: Any = gatedprune.wrap(model, ratio, example_inputs=images[:2])
    except gatedprune.GatedPruneError as error:
        raise click.ClickException(str(error)) from error

    fitted = gated.calibrate(images.split(8))
    print(f"calibrate  {len(fitted.sites)} gates on {fitted.samples} images, no labels")

    fast = gatedprune.compact(gated, images[:1])
    with torch.no_grad():
        expected, got = gated(images), fast(images)
        shared, drawn = in_common(fast.last_active, {name: gate.channels for name, gate in gated.gates.items()})
        print(f"choose     two images have {shared:.0%} of their channels in common, by chance it would be {drawn:.0%}")
    off = float((got - expected).abs().max() / expected.abs().max())
    print(f"compact    computes the chosen channels only, off by {off:.0e} of the largest output")

    with TemporaryDirectory() as scratch:
        again = gatedprune.load(gatedprune.save(gated, folder or Path(scratch) / "model"))
    with torch.no_grad():
        torch.testing.assert_close(again(images[:2]), gated(images[:2]), rtol=0, atol=0)
    print(f"save       and load{f': {folder}' if folder else ''}; the same numbers, bit for bit")
    dense = gatedprune.unwrap(again)
    times = gatedprune.measure_latency({"dense": dense, "compact": fast}, images[:1], threads=1)
    print(f"time       dense {times['dense'].median_ms:.1f} ms, compact {times['compact'].median_ms:.1f} ms, one image")


if __name__ == "__main__":
    main()
