"""Images from files, folders and tars, prepared as timm does for the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import DataError
from ..wrapping import GatedModel

__all__ = ["ImageSet", "image_set", "load_images", "transform_of"]


def transform_of(model: nn.Module, size: tuple[int, int] | None = None) -> Any:
    """timm's evaluation transform for a model: PIL image → (3, H, W).

    Args:
        model: Its timm configuration tells mean, deviation, crop and interpolation; ImageNet's, where it has none.
        size: (H, W) in pixels; default: what a gated model was wrapped for, else the configured one.
    """
    options: dict[str, Any] = {}
    if size is None and isinstance(model, GatedModel):
        shapes = [a.shape for a in model._gatedprune_inputs if isinstance(a, Tensor) and a.dim() == 4]
        size = (shapes[0][2], shapes[0][3]) if shapes else None
    if size is not None:
        options["input_size"] = (3, *size)
    return create_transform(**resolve_model_data_config(model, options), is_training=False)


def load_images(model: nn.Module, paths: Sequence[str | os.PathLike[str]],
                size: tuple[int, int] | None = None) -> tuple[Tensor, list[Any]]:  # fmt: skip
    """Image files as a batch (N, 3, H, W) for the model, and as PIL images.

    Args:
        model, size: See `transform_of`.
        paths: The files.

    Raises:
        DataError: A file cannot be read as an image.
    """
    from PIL import Image, UnidentifiedImageError

    pictures = []
    for path in paths:
        try:
            with Image.open(path) as file:
                pictures.append(file.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{os.fspath(path)} cannot be read as an image: {error}.") from error
    transform = transform_of(model, size)
    return torch.stack([transform(picture) for picture in pictures]), pictures


class ImageSet:
    """Batches of (images, labels) from a folder or a tar of images; of images alone where folders name no classes.

    Attributes:
        classes: Names of the classes, by label; None where all images lie in one folder.
    """

    def __init__(self, loader: DataLoader, classes: tuple[str, ...] | None) -> None:
        self.loader, self.classes = loader, classes

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for images, labels in self.loader:
            yield images if self.classes is None else (images, labels)


def image_set(model: nn.Module, root: str | os.PathLike[str], *, size: tuple[int, int] | None = None,
              batch_size: int = 32, limit: int | None = None, workers: int = 0) -> ImageSet:  # fmt: skip
    """The images of a folder or tar, read and prepared by timm; subfolders are classes.

    Args:
        model, size: See `transform_of`.
        root: A folder, searched to its bottom, or a .tar file.
        batch_size: Images in a batch.
        limit: At most so many images, evenly spread over all of them.
        workers: Processes that read.

    Raises:
        DataError: There is no such folder or tar, or no image in it.
    """
    where = Path(root)
    if not where.is_dir() and not (where.is_file() and where.suffix == ".tar"):
        raise DataError(f"{where} is neither a folder nor a .tar file of images.")
    try:
        images = create_dataset("", root=str(where), transform=transform_of(model, size))
    except (RuntimeError, AssertionError, OSError) as error:
        raise DataError(f"No image was found in {where}: {error}") from error
    total = len(images)
    if not total:
        raise DataError(f"No image was found in {where}.")
    found = getattr(images.reader, "class_to_idx", None) or getattr(images.reader, "class_name_to_idx", None) or {}
    names = tuple(sorted(found, key=found.__getitem__))
    chosen: Any = images
    if limit is not None and limit < total:
        chosen = torch.utils.data.Subset(images, [i * total // limit for i in range(limit)])
    loader = DataLoader(chosen, batch_size=batch_size, num_workers=workers)
    return ImageSet(loader, names if len(names) > 1 else None)
