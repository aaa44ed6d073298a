"""Labelled images for training and validation, by timm; what is wrong with them is said before training."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import create_dataset, create_transform
from torch import nn
from torch.utils.data import IterableDataset

from ..errors import DataError
from .options import FinetuneConfig

__all__ = ["Splits", "load_splits"]

_SHOWN = 5
_NAMED = ("torch", "hfds", "hfids", "tfds", "wds")  # prefixes of timm's named data sets


@dataclass
class Splits:
    """Training and validation images. Until `transform` is called they are images of PIL's.

    Attributes:
        train, val: Data sets of (image, class index).
        classes: Names of the classes, by index; numbers where the data set has no names.
    """

    train: Any
    val: Any
    classes: tuple[str, ...]

    def transform(self, config: FinetuneConfig, model_config: dict[str, Any]) -> None:
        """Give both splits timm's transforms: augmentation for training, resizing and cropping for validation.

        Args:
            model_config: What `timm.data.resolve_model_data_config` says of the model.
        """
        common = {k: model_config[k] for k in ("input_size", "mean", "std", "interpolation")}
        self.train.transform = create_transform(
            **common, is_training=True, scale=(config.min_crop, 1.0), hflip=config.hflip, color_jitter=None,
            auto_augment=config.auto_augment,
        )  # fmt: skip
        self.val.transform = create_transform(
            **common, crop_pct=model_config["crop_pct"], crop_mode=model_config["crop_mode"]
        )


def load_splits(config: FinetuneConfig) -> Splits:
    """The two splits that a configuration names.

    Raises:
        DataError: One is not there or holds no images, both are the same, their classes differ, or it cannot be told
            how many classes there are; or the data set is a stream, which no training can resume exactly.
    """
    train = _dataset(config, config.data, config.train_split)
    val = _dataset(config, config.val_data or config.data, config.val_split)
    places = [os.path.realpath(p) for p in (_root(train), _root(val)) if p]
    if len(places) == 2 and places[0] == places[1] and not _named(config.data):
        raise DataError(
            f"Training and validation would use the same images, those of {places[0]}: there is no folder for the "
            f"split {config.val_split!r}. Name it (--val-split), or say where the validation images are (--val-data)."
        )
    names, others = _classes(train), _classes(val)
    if names is not None and others is not None:
        _compare(names, others, config)
    if names is None:
        if config.num_classes is None:
            raise DataError(f"The data set {config.data} does not name its classes: say how many (--num-classes).")
        names = tuple(map(str, range(config.num_classes)))
    if config.num_classes not in (None, len(names)):
        raise DataError(
            f"{config.data} has {len(names)} classes ({_some(names)}), but --num-classes says {config.num_classes}."
        )
    if len(names) < 2:
        raise DataError(
            f"{config.data} has one class only ({_some(names)}): images belong into a folder for each class, as in "
            f"{config.train_split}/cat/1.jpg and {config.train_split}/dog/2.jpg."
        )
    if len(train) < config.batch_size:
        raise DataError(f"{config.data} has {len(train)} training images, fewer than one batch of {config.batch_size}.")
    return Splits(train, val, names)


def _named(data: str) -> bool:
    return not Path(data).exists() and data.partition("/")[0].lower() in _NAMED and "/" in data


def _dataset(config: FinetuneConfig, data: str, split: str) -> Any:
    if _named(data):
        return _from_library(config, data, split)
    path = Path(data)
    if not path.exists():
        raise DataError(
            f"The data {data} are not there: give a folder of class folders, a .tar of one, or a data set that timm "
            f"names, such as torch/cifar10 (prefixes: {', '.join(_NAMED)})."
        )
    if path.is_file() and path.suffix != ".tar":
        raise DataError(f"{data} is neither a folder nor a .tar (a compressed one must be unpacked first).")
    try:
        return create_dataset("", root=data, split=split)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{data} is damaged, or no tar ({error}). Copy it again.") from error
    except (RuntimeError, ValueError) as error:  # what timm raises where it finds nothing
        raise DataError(
            f"{data}, split {split!r}, holds no image that timm can read (.jpg, .jpeg, .png), in a folder for each "
            "class."
        ) from error


def _from_library(config: FinetuneConfig, data: str, split: str) -> Any:
    try:
        dataset = create_dataset(data, root=config.data_dir or "data", split=split, download=config.download)
    except Exception as error:
        raise DataError(
            f"The data set {data}, split {split!r}, cannot be had ({type(error).__name__}: {_line(error)}). Say where "
            "it lies (--data-dir), or have it fetched (--download)."
        ) from error
    if isinstance(dataset, IterableDataset):
        raise DataError(
            f"{data} is a stream of images, which cannot be shuffled and resumed exactly. Use a folder, a .tar, or a "
            "data set that can be indexed (torch/…, hfds/…)."
        )
    return dataset


def _root(dataset: Any) -> str | None:
    root = getattr(getattr(dataset, "reader", dataset), "root", None)
    return root if isinstance(root, (str, os.PathLike)) else None  # type: ignore[return-value]


def _classes(dataset: Any) -> tuple[str, ...] | None:
    """The names of a data set's classes in the order of their indices; None where it does not tell."""
    reader = getattr(dataset, "reader", dataset)
    for name in ("class_to_idx", "class_name_to_idx"):
        known = getattr(reader, name, None)
        if known:
            return tuple(str(k) for k, _ in sorted(known.items(), key=lambda item: item[1]))
    return None


def _compare(names: Sequence[str], others: Sequence[str], config: FinetuneConfig) -> None:
    if tuple(names) == tuple(others):
        return
    lost, foreign = [n for n in names if n not in others], [n for n in others if n not in names]
    parts = []
    if lost:
        parts.append(f"validation lacks {_some(lost)}")
    if foreign:
        parts.append(f"validation has {_some(foreign)}, which training has not")
    where = config.data + (f" and {config.val_data}" if config.val_data else "")
    raise DataError(
        f"Training has {len(names)} classes and validation {len(others)}, and they differ: "
        f"{'; '.join(parts) or 'in order'}. Class indices follow the folders' names, so both need the same folders "
        f"(splits {config.train_split!r} and {config.val_split!r} of {where})."
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(map(str, names[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no reason given"


def check_outputs(model: nn.Module, outputs: Any, classes: Sequence[str], what: str) -> None:
    """Raise `DataError` unless outputs are one logit for each class, (B, classes)."""
    shape = tuple(getattr(outputs, "shape", ()))
    if len(shape) != 2 or shape[1] != len(classes):
        raise DataError(
            f"{what} puts out {f'{shape[-1]} classes' if len(shape) == 2 else f'a shape of {shape}'}, and the data "
            f"have {len(classes)} classes ({_some(classes)}). Give a model for these classes, or data for the model's."
        )
