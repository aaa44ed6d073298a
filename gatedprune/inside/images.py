"""Images from files, folders and tars, prepared as timm does for the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Images, read_images, transform_of
from ..errors import DataError

__all__ = ["ImageSet", "image_set", "load_images"]


def load_images(model: nn.Module, paths: Sequence[str | os.PathLike[str]],
                size: tuple[int, int] | None = None) -> tuple[Tensor, list[Any]]:  # fmt: skip
    """Image files as a batch (N, 3, H, W) for the model, and as PIL images.

    Args:
        model, size: See `gatedprune.data.transform_of`.
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
    """Batches of (images, folders' numbers) from a folder or a tar; of images alone where there is but one folder.

    Attributes:
        classes: Names of the folders, by number; None where all images lie in one.
    """

    def __init__(self, images: Images) -> None:
        self.images, self.classes = images, images.folders

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Any]:
        if self.images.folder_of is None:
            yield from self.images
        else:
            yield from zip(self.images, self.images.folder_of.split(self.images.batch), strict=True)


def image_set(model: nn.Module, root: str | os.PathLike[str], *, size: tuple[int, int] | None = None,
              batch_size: int = 32, limit: int | None = None) -> ImageSet:  # fmt: skip
    """The images of a folder or tar (`gatedprune.data.read_images`), whose subfolders are classes.

    Args:
        model, size: See `gatedprune.data.transform_of`.
        root: A folder, searched to its bottom, or a .tar file.
        batch_size: Images in a batch.
        limit: At most so many images, evenly spread over all of them.

    Raises:
        DataError: There is no such folder or tar, no image in it, or one that cannot be read.
    """
    return ImageSet(read_images(root, model, size=size, limit=limit, batch=batch_size))
