"""Which models there are: timm's architectures, their families (modules) and their sizes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

__all__ = ["LARGEST_INPUT", "Entry", "Sized", "build", "catalogue", "sized", "smallest"]

LARGEST_INPUT = 256  # pixels: larger images show nothing else, and take long


@dataclass(frozen=True)
class Entry:
    """An architecture: its timm name, family (timm module) and number of parameters."""

    model: str
    family: str
    parameters: int


def build(name: str, device: str = "meta", **options: Any) -> nn.Module:
    """A timm model without pretrained weights, in eval mode."""
    with torch.device(device):
        return timm.create_model(name, pretrained=False, **options).eval()


def catalogue(cache: Path) -> list[Entry]:
    """Every architecture of the installed timm, smallest first.

    Args:
        cache: A JSON file with the parameter counts; made anew (4 minutes) where it is missing or of another timm.
    """
    known: dict[str, Any] = json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
    if known.get("timm") != timm.__version__:
        models = {
            name: [module, sum(p.numel() for p in build(name).parameters())]
            for module in timm.list_modules()
            for name in timm.list_models(module=module)
        }
        known = {"timm": timm.__version__, "models": models}
        scratch = cache.with_suffix(".part")
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(models.items()))
        scratch.write_text(f'{{"timm": "{timm.__version__}", "models": {{\n{lines}\n}}}}\n', encoding="utf-8")
        os.replace(scratch, cache)
    entries = [Entry(name, module, count) for name, (module, count) in known["models"].items()]
    return sorted(entries, key=lambda e: (e.parameters, e.model))


def smallest(entries: list[Entry]) -> list[Entry]:
    """The smallest model of each family, smallest first."""
    first: dict[str, Entry] = {}
    for entry in sorted(entries, key=lambda e: (e.parameters, e.model)):
        first.setdefault(entry.family, entry)
    return list(first.values())


@dataclass(frozen=True)
class Sized:
    """A model on the meta device, the ``options`` that it was built with and the image shape (C, H, W) for it."""

    model: nn.Module
    options: dict[str, Any]
    shape: tuple[int, int, int]


def sized(name: str, largest: int = LARGEST_INPUT) -> Sized:
    """A model for images of at most ``largest`` pixels where it can.

    Tried on the meta device: as it is, then with timm's ``img_size``; a model that takes neither keeps its size.
    """
    model = build(name)
    configured: tuple[int, int, int] = tuple(model.pretrained_cfg["input_size"])  # type: ignore[index]
    if max(configured[1:]) <= largest:
        return Sized(model, {}, configured)
    for size in [largest, *(largest // patch * patch for patch in (28, 48) if largest % patch)]:
        shape = (configured[0], size, size)
        for options in ({}, {"img_size": size}):
            try:
                found = Sized(build(name, "meta", **options) if options else model, options, shape)
                with torch.no_grad():
                    found.model(torch.zeros(2, *shape, device="meta"))
            except Exception:  # noqa: BLE001  whatever a model says of a size that it does not take
                continue
            return found
    return Sized(build(name), {}, configured)
