"""Depth maps of images of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from gatedprune.errors import DataError

from .checkpoint import ModelSpec
from .evaluate import predict_depth
from .images import read_image, write_depth, write_image
from .plots import color_depth

__all__ = ["find_images", "predict_images"]

SUFFIXES = (".png", ".jpg", ".jpeg")


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return the image files among `paths`, and those in the folders among them.

    Raises:
        DataError: there is none, or a path does not exist.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path} does not exist. Give images, or folders with images.")
    if not found:
        raise DataError(f"There is no image ({', '.join(SUFFIXES)}) in the folders given.")
    return found


def predict_images(
    model: nn.Module,
    spec: ModelSpec,
    images: Sequence[Path],
    out: Path,
    *,
    depth_png: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[Path]:
    """Write `NAME_depth_color.png` for each image: the image above its coloured depth; return what was
    written.

    Args:
        model, spec: from `load_model`.
        images: files; two of the same name would overwrite each other and are refused.
        out: folder, made where it is missing.
        device: where the model is.
        depth_png: also write `NAME_depth.png`, metres times 256 as uint16, KITTI's format.
    """
    stems = [image.stem for image in images]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise DataError(f"Several images are named {', '.join(twice[:3])}: predict them into different folders.")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for path in tqdm(images, desc="predicting", unit="image", disable=not progress):
        image = read_image(path)
        depth = predict_depth(model, image, spec.image_size, spec.input_size, device)
        written.append(out / f"{path.stem}_depth_color.png")
        write_image(written[-1], np.concatenate([image, color_depth(depth)]))
        if depth_png:
            written.append(out / f"{path.stem}_depth.png")
            write_depth(written[-1], depth)
    return written
