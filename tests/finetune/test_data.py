"""Data for fine-tuning: folders, tars and named sets, and an early word on what is wrong with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import CIFAR10

from gatedprune.errors import DataError
from gatedprune.finetune import FinetuneConfig
from gatedprune.finetune.data import load_splits

from .conftest import COLOURS, write_images


def config(data: Path | str, **options: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "test_resnet", "data": str(data), "output": "", "batch_size": 4, **options})


TIMM = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic",
        "crop_pct": 1.0, "crop_mode": "center"}  # fmt: skip


def test_folders_and_tars_are_the_same_data(images: Path, tars: tuple[Path, Path]) -> None:
    folder, tar = config(images), config(tars[0], val_data=str(tars[1]))
    one, other = load_splits(folder), load_splits(tar)
    assert one.classes == other.classes == tuple(sorted(COLOURS))
    for splits, options in ((one, folder), (other, tar)):
        splits.transform(options, TIMM)
    for a, b in ((one.train, other.train), (one.val, other.val)):
        assert len(a) == len(b)
        assert [int(b[i][1]) for i in range(len(b))] == [a[i][1] for i in range(len(a))]
    assert torch.equal(one.val[5][0], other.val[5][0]) and one.val[5][0].shape == (3, 16, 16)
    assert not torch.equal(one.train[5][0], one.train[5][0]), "training images are augmented"


def test_splits_of_other_names(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "train", tmp_path / "first")
    shutil.copytree(images / "val", tmp_path / "second")
    splits = load_splits(config(tmp_path, train_split="first", val_split="second"))
    assert (len(splits.train), len(splits.val)) == (24, 9)
    splits = load_splits(config(images / "train", val_data=str(images / "val")))
    assert (len(splits.train), len(splits.val)) == (24, 9)


@pytest.mark.parametrize(
    ("train", "val", "options", "message"),
    [
        (["a", "b"], ["a"], {}, "Training has 2 classes and validation 1, and they differ: validation lacks b"),
        (["a", "b"], ["a", "b", "c"], {}, "validation has c, which training has not"),
        (["cat", "dog"], ["cats", "dogs"], {}, "validation lacks cat, dog; validation has cats, dogs"),
        (["a"], ["a"], {}, r"has one class only \(a\): images belong into a folder for each class"),
        (["a", "b"], ["a", "b"], {"num_classes": 5}, r"has 2 classes \(a, b\), but --num-classes says 5"),
        (["a", "b"], ["a", "b"], {"batch_size": 7}, "has 6 training images, fewer than one batch of 7"),
        ([], ["a"], {}, r"split 'train', holds no image that timm can read"),
        (["a", "b"], [], {}, r"split 'val', holds no image that timm can read"),
        (["a", "b"], None, {}, "would use the same images.*no folder for the split 'val'. Name it"),
    ],
)
def test_wrong_labels_and_empty_folders(
    tmp_path: Path, train: list[str], val: list[str] | None, options: dict[str, Any], message: str
) -> None:
    root = tmp_path if val is None else tmp_path / "train"
    root.mkdir(exist_ok=True)
    write_images(root, dict.fromkeys(train, 3), size=4)
    if val is not None:
        (tmp_path / "val").mkdir()
        write_images(tmp_path / "val", dict.fromkeys(val, 2), size=4)
    with pytest.raises(DataError, match=message):
        load_splits(config(tmp_path, **options))


def test_what_is_not_there_or_no_data(tmp_path: Path, images: Path) -> None:
    with pytest.raises(DataError, match="The data .*nowhere are not there: give a folder of class folders"):
        load_splits(config(tmp_path / "nowhere"))
    file = tmp_path / "images.zip"
    file.write_bytes(b"PK")
    with pytest.raises(DataError, match="images.zip is neither a folder nor a .tar"):
        load_splits(config(file))
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match="broken.tar is damaged, or no tar"):
        load_splits(config(broken, val_data=str(images / "val")))
    with pytest.raises(DataError, match="The data set torch/cifar10, split 'train', cannot be had.*--download"):
        load_splits(config("torch/cifar10", data_dir=str(tmp_path)))


def test_a_data_set_that_timm_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def small(self: Any, root: str, train: bool, **options: Any) -> None:
        assert root == str(tmp_path)
        self.class_to_idx = {"cat": 0, "dog": 1}
        self.data, self.targets = [None] * (8 if train else 4), [0, 1] * 4

    monkeypatch.setattr(CIFAR10, "__init__", small)
    splits = load_splits(config("torch/cifar10", data_dir=str(tmp_path), val_split="validation"))
    assert splits.classes == ("cat", "dog") and (len(splits.train), len(splits.val)) == (8, 4)
    monkeypatch.setattr(CIFAR10, "class_to_idx", None, raising=False)
    real = CIFAR10.__init__

    def nameless(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self.class_to_idx = {}

    monkeypatch.setattr(CIFAR10, "__init__", nameless)
    with pytest.raises(DataError, match="does not name its classes: say how many"):
        load_splits(config("torch/cifar10", data_dir=str(tmp_path)))
    assert load_splits(config("torch/cifar10", data_dir=str(tmp_path), num_classes=2)).classes == ("0", "1")
