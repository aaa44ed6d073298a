"""Made-up pictures to classify, and a training loop: what the short examples share, as they run without data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gatedprune

__all__ = ["CLASSES", "make_images", "top1", "train"]

CLASSES = ("disc", "ring", "square", "frame", "cross", "diamond", "bars", "checks")


def make_images(count: int, size: int = 64, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy pictures of one figure each, of any colour, place and size.

    Returns:
        Images (count, 3, size, size), about zero, and their classes (count,), indices into `CLASSES`.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    labels = torch.randint(len(CLASSES), (count,), generator=random)
    line = torch.linspace(-1, 1, size)
    radius = uniform(0.5, 0.8, 1, 1)
    x = (line.view(1, 1, size) - uniform(-0.2, 0.2, 1, 1)) / radius
    y = (line.view(1, size, 1) - uniform(-0.2, 0.2, 1, 1)) / radius
    inside = _figures(x, y)[labels, torch.arange(count)]
    paper = uniform(-1, 1, 3, 1, 1)
    ink = paper - 2 * paper.sign() * uniform(0.3, 0.8, 3, 1, 1)  # never the colour of the paper
    clean = torch.where(inside[:, None], ink, paper)
    return clean + 0.1 * torch.randn(clean.shape, generator=random), labels


def _figures(x: Tensor, y: Tensor) -> Tensor:
    """Whether each pixel lies in each figure, (len(CLASSES), count, H, W)."""
    far, square, diamond = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs()), x.abs() + y.abs()
    wave = lambda t: torch.sin(2 * math.pi * t)  # noqa: E731
    return torch.stack([
        far < 1,
        (far < 1) & (far > 0.6),
        square < 0.85,
        (square < 0.85) & (square > 0.5),
        (torch.minimum(x.abs(), y.abs()) < 0.3) & (square < 1),
        diamond < 1.1,
        (square < 0.85) & (wave(y) + 0 * x > 0),
        (square < 0.85) & (wave(x) * wave(y) > 0),
    ])  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, *, steps: int, lr: float, batch: int = 32,
          seed: int = 0) -> None:  # fmt: skip
    """Train in place with AdamW and a falling learning rate; leaves the model in eval mode.

    Args:
        images: (N, 3, H, W). labels: (N,). steps: Batches of ``batch`` images. lr: The largest learning rate.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 1))
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=random)
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        if gatedprune.is_gated(model):
            gated: Any = model
            loss = loss + gated.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def top1(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 64) -> float:
    """Share of the images, (N, 3, H, W), whose class has the largest logit, in percent."""
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in images.split(batch)])
    return 100 * float((found == labels).double().mean())
