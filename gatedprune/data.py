"""Images from a folder or a tar, as a model wants them: for calibrating and evaluating, in a fixed order."""

from __future__ import annotations

import csv
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.data.readers import create_reader
from torch import Tensor, nn

from .errors import ConfigError, DataError
from .sites import normalise_inputs
from .wrapping import GatedModel

__all__ = ["Images", "read_images", "top1", "transform_of"]


class Images:
    """Batches of images, in the order of their names; can be gone through any number of times.

    Made by `read_images`. Images are read and decoded anew in each pass, so that memory does not grow with the data.

    Attributes:
        names: Path of each image inside the folder or the tar.
        labels: (N,) int64, the class index of each image; None where there are none that fit.
        why: Why there are no labels; empty where there are.
        folders: Names of the folders that the images lie in, alphabetically; None where there is but one.
        folder_of: (N,) int64, the folder of each image, as an index into ``folders``; None where that is None.
    """

    def __init__(self, reader: Any, transform: Any, names: Sequence[str], labels: Tensor | None, why: str,
                 indices: Sequence[int], batch: int) -> None:  # fmt: skip
        self._reader, self._transform, self._indices, self.batch = reader, transform, tuple(indices), batch
        self.names, self.labels, self.why = tuple(names), labels, why
        self.folders, self.folder_of = _folders(reader, indices)

    def __len__(self) -> int:
        """How many batches."""
        return -(-len(self._indices) // self.batch)

    def __iter__(self) -> Iterator[Tensor]:
        """(B, C, H, W), the last one may be smaller."""
        for start in range(0, len(self._indices), self.batch):
            yield torch.stack([self._read(i) for i in range(start, min(start + self.batch, len(self._indices)))])

    def _read(self, i: int) -> Tensor:
        try:
            stream, _ = self._reader[self._indices[i]]
            with stream:
                image: Tensor = self._transform(Image.open(stream).convert("RGB"))
        # Pillow's decoders raise these; timm's own data set would take the next image in silence.
        except (OSError, ValueError, SyntaxError, EOFError, tarfile.TarError, Image.DecompressionBombError) as error:
            raise DataError(
                f"The image {self.names[i]} cannot be read ({type(error).__name__}: {error}). "
                "Replace it, or take it out."
            ) from error
        return image


def read_images(path: str | os.PathLike[str], model: nn.Module, *, size: tuple[int, int] | None = None,
                labels: str | os.PathLike[str] | None = None, limit: int | None = None,
                batch: int = 32) -> Images:  # fmt: skip
    """The images of a folder or a tar, read by timm, resized, cropped and normalised as timm does for the model.

    Labels are, in this order: those of the file ``labels``; the ImageNet indices of folders that are named by synset
    (n01440764); the alphabetical order of folders, where there are as many as the model has classes.

    Args:
        path: A folder with images, in a folder for each class or not; or a .tar of such a folder.
        model: Its timm configuration says size, crop, mean and standard deviation; without one, timm's defaults.
        size: (H, W) in pixels; default: what a gated model was wrapped for, else of the configuration.
        labels: A CSV with the columns ``file`` (name or path of the image) and ``class_index``.
        limit: Take this many, spread evenly over all of them; None: all.
        batch: Images in a batch.

    Raises:
        DataError: It is not there, is damaged, holds no image, or an image is missing from ``labels``.
        ConfigError: A number out of its domain.
    """
    for name, value in (("limit", limit), ("batch", batch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"`{name}` of read_images() must be an integer of at least 1. Got {value!r}.")
    reader = _reader(Path(path))
    names = list(reader.filenames())
    count = len(names) if limit is None else min(limit, len(names))
    indices = [i * len(names) // count for i in range(count)]  # class folders come one after the other
    chosen = [names[i] for i in indices]
    transform = transform_of(model, size)
    why = ""
    if labels is not None:
        found: Tensor | None = _from_table(Path(labels), chosen)
    else:
        found, why = _from_folders(reader, indices, getattr(model, "num_classes", None))
    return Images(reader, transform, chosen, found, why, indices, batch)


def transform_of(model: nn.Module, size: tuple[int, int] | None = None) -> Any:
    """timm's evaluation transform for a model: PIL image → (C, H, W).

    Args:
        model: Its timm configuration tells mean, deviation, crop and interpolation; timm's defaults, where it has none.
        size: (H, W) in pixels; default: what a gated model was wrapped for, else of the configuration.
    """
    shape = tuple(normalise_inputs(model, None)[0].shape[1:])
    if size is None and isinstance(model, GatedModel):
        shape = next((tuple(a.shape[1:]) for a in model._gatedprune_inputs if getattr(a, "ndim", 0) == 4), shape)
    config = resolve_model_data_config(model, {"input_size": (shape[0], *(size or shape[1:]))})
    return create_transform(**config, is_training=False)


def top1(outputs: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is that of the label, in percent. outputs: (N, classes). labels: (N,)."""
    return 100 * float((outputs.argmax(1) == labels).double().mean())


def _reader(path: Path) -> Any:
    if not path.exists():
        raise DataError(f"{path} is not there: give a folder with images, or a .tar of one.")
    if path.is_file() and path.suffix != ".tar":
        raise DataError(f"{path} is neither a folder nor a .tar (a compressed one must be unpacked first).")
    try:
        return create_reader("", root=str(path))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is damaged, or no tar ({error}). Copy it again.") from error
    except (RuntimeError, ValueError) as error:  # what timm raises where it finds nothing
        raise DataError(f"{path} holds no image that timm can read: .jpg, .jpeg, .png.") from error


def _from_table(table: Path, names: Sequence[str]) -> Tensor:
    try:
        with table.open(newline="", encoding="utf-8") as stream:
            rows = {row["file"]: int(row["class_index"]) for row in csv.DictReader(stream)}
    except OSError as error:
        raise DataError(f"{table} cannot be read ({error.strerror}).") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"{table} is no CSV with the columns file and class_index ({type(error).__name__}: {error})."
        ) from error
    found = [rows.get(name, rows.get(os.path.basename(name))) for name in names]
    missing = [name for name, label in zip(names, found, strict=True) if label is None]
    if missing:
        raise DataError(f"{table} has no row for {len(missing)} of the images, {missing[0]} among them.")
    return torch.tensor(found)


def _folders(reader: Any, indices: Sequence[int]) -> tuple[tuple[str, ...] | None, Tensor | None]:
    """The folders that a reader found, by number, and that of each image; None twice where there is but one."""
    known: Mapping[str, int] = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", {})
    if len(known) < 2:
        return None, None
    targets = getattr(reader, "targets", None)
    numbers = np.asarray([sample[1] for sample in reader.samples] if targets is None else targets)
    return tuple(sorted(known, key=known.__getitem__)), torch.tensor([int(numbers[i]) for i in indices])


def _from_folders(reader: Any, indices: Sequence[int], classes: int | None) -> tuple[Tensor | None, str]:
    """Labels by the names of folders, or None and why not."""
    names, numbers = _folders(reader, indices)
    if names is None or numbers is None:
        return None, "the images do not lie in a folder for each class"
    info = ImageNetInfo("imagenet-1k")
    synsets = {info.index_to_label_name(i): i for i in range(info.num_classes())}
    if classes == len(synsets) and set(names) <= set(synsets):
        return torch.tensor([synsets[name] for name in names])[numbers], ""
    if classes == len(names):
        return numbers, ""
    return None, f"there are {len(names)} folders, and the model has {classes} classes"
