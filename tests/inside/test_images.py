"""Images from files, folders and tars are what timm's own transform makes of them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import gatedprune
from gatedprune.errors import DataError
from gatedprune.inside import image_set, load_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, of two images and of one."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (48, 40, 3), dtype=np.uint8)).save(root / name)
    return root


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return timm.create_model("test_resnet")


def test_files_become_what_timm_makes_of_them(folder: Path, model: torch.nn.Module) -> None:
    batch, pictures = load_images(model, [folder / "cat/0.png", folder / "dog/0.png"])
    expected = create_transform(**resolve_model_data_config(model), is_training=False)
    assert batch.shape == (2, 3, 160, 160) and torch.equal(batch[1], expected(pictures[1]))
    assert load_images(model, [folder / "cat/0.png"], size=(32, 64))[0].shape == (1, 3, 32, 64)


def test_a_gated_model_tells_its_size(folder: Path) -> None:
    gated = gatedprune.wrap(timm.create_model("test_resnet"), example_inputs=torch.zeros(1, 3, 64, 96))
    assert load_images(gated, [folder / "cat/0.png"])[0].shape == (1, 3, 64, 96)


def test_folder_and_tar_have_classes_where_folders_tell(folder: Path, model: torch.nn.Module, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(folder, arcname=".")
    for root in (folder, tmp_path / "all.tar"):
        found = image_set(model, root, size=(32, 32), batch_size=2)
        assert found.classes == ("cat", "dog") and len(found) == 2
        assert [y.tolist() for _, y in found] == [[0, 0], [1]]
        (x, _), *_ = found
        assert torch.equal(x[:1], load_images(model, [folder / "cat/0.png"], size=(32, 32))[0])
    flat = image_set(model, folder / "cat", size=(32, 32), limit=1)
    assert flat.classes is None and [x.shape for x in flat] == [(1, 3, 32, 32)]


def test_refusals(folder: Path, model: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not there: give a folder"):
        image_set(model, tmp_path / "nothing")
    with pytest.raises(DataError, match="holds no image that timm can read"):
        image_set(model, tmp_path)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"text.jpg cannot be read as an image"):
        load_images(model, [folder / "cat/0.png", tmp_path / "text.jpg"])
    with pytest.raises(DataError, match=r"missing.jpg cannot be read as an image"):
        load_images(model, [tmp_path / "missing.jpg"])
    with pytest.raises(DataError, match=r"text.jpg cannot be read .* Replace it, or take it out"):
        list(image_set(model, tmp_path))
