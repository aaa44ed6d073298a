"""Your own model: a hand-written module, what of it can be gated, the contract's checks on it, save and load.

`python -m gatedprune.examples.own_model --help`; the page is docs/wrap.md.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.testing import check_model

from .shapes import CLASSES, make_images, top1, train

__all__ = ["FigureNet", "main"]


class Block(nn.Module):
    """An inverted residual: narrow to wide, depthwise, squeeze-and-excite, wide to narrow, added to its input."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.SiLU()
        )
        self.squeeze = nn.Sequential(nn.Conv2d(hidden, hidden // 4, 1), nn.SiLU(), nn.Conv2d(hidden // 4, hidden, 1))
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)"""
        h = self.depthwise(self.expand(x))
        h = h * torch.sigmoid(self.squeeze(h.mean((2, 3), keepdim=True)))
        return x + self.project(h)


class FigureNet(nn.Module):
    """A small classifier in plain PyTorch: nothing in it knows of gates, or of timm."""

    def __init__(self, classes: int = len(CLASSES), width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width)
        )
        self.blocks = nn.Sequential(*(Block(width, 4 * width) for _ in range(depth)))
        self.hidden = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, classes)"""
        x = self.blocks(self.stem(images)).mean((2, 3))
        return self.head(torch.nn.functional.gelu(self.hidden(x)))


@click.command(context_settings={"show_default": True})
@click.option("--ratio", type=click.FloatRange(0, 1, max_open=True), default=0.5, help="Share of suppressed channels.")
@click.option("--size", type=click.IntRange(32), default=32, help="Height and width of the images, in pixels.")
@click.option("--steps", type=click.IntRange(0), default=100, help="Batches of 32, dense, then as many gated.")
@click.option("--save", "folder", type=click.Path(file_okay=False, path_type=Path), help="Keep the model in a folder.")
def main(ratio: float, size: int, steps: int, folder: Path | None) -> None:
    """Gate a hand-written module: its sites, the contract's checks, training, save and load."""
    torch.manual_seed(0)
    data, test = make_images(2048, size, seed=1), make_images(256, size, seed=2)
    example = data[0][:2]

    print(gatedprune.find_sites(FigureNet(), example))

    # The promises of docs/concepts.md, on this model: each fails with the name of the site where it does not hold.
    notes = check_model(FigureNet, example, ratio=ratio, checks=["identity", "static", "compact_float32"])
    print(f"\ncontract: {', '.join(notes)} hold")

    model = FigureNet()
    train(model, *data, steps=steps, lr=1e-2)
    print(f"dense: top-1 {top1(model, *test):.1f} after {steps} steps")
    gated: Any = gatedprune.wrap(model, ratio, example_inputs=example)  # in place: `gated` is `model`
    gated.calibrate(data[0][:256].split(32))
    print(f"gated at ratio {ratio:g}, calibrated: top-1 {top1(gated, *test):.1f}")
    train(gated, *data, steps=steps, lr=3e-3)
    print(f"fine-tuned for {steps} steps: top-1 {top1(gated, *test):.1f}")

    with TemporaryDirectory() as scratch:
        saved = gatedprune.save(gated, folder or Path(scratch) / "figures")
        again = gatedprune.load(saved, model=FigureNet())  # timm does not build it, so you do
    fast = gatedprune.compact(again, example)
    print(f"saved, loaded and compacted: top-1 {top1(fast, *test):.1f}{f', in {folder}' if folder else ''}")


if __name__ == "__main__":
    main()
