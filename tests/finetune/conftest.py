"""A tiny image data set that can be learnt: each class has its own colour."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("accelerate", reason="needs the extra train")
pytest.importorskip("tqdm", reason="needs the extra train")

COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def write_images(folder: Path, counts: dict[str, int], *, size: int = 24, seed: int = 0) -> Path:
    """Class folders with that many images each."""
    draw = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.asarray(COLOURS.get(name, (128, 128, 128))) + draw.normal(0, 60, (size, size, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images for training, 9 for validation, three classes."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", dict.fromkeys(COLOURS, 8))
    write_images(folder / "val", dict.fromkeys(COLOURS, 3), seed=1)
    return folder


@pytest.fixture(scope="session")
def tars(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The two splits as .tar files."""
    folder = tmp_path_factory.mktemp("tars")
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            tar.add(images / split, arcname=".")
    return folder / "train.tar", folder / "val.tar"
