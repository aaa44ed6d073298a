"""Images from folders and tars: order, labels, transform, and one clear line for what is damaged."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from gatedprune.data import read_images, top1
from gatedprune.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 2, 3 and 1 images of different sizes."""
    random = np.random.default_rng(0)
    for name, count in (("bird", 2), ("cat", 3), ("dog", 1)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 255, (40 + 9 * i, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def packed(folder: Path) -> Path:
    target = folder.parent / "images.tar"
    with tarfile.open(target, "w") as tar:
        tar.add(folder, arcname=".")
    return target


def test_a_folder_as_timm_would_show_it_to_the_model(folder: Path, model: nn.Module) -> None:
    found = read_images(folder, model, batch=4)
    assert found.names == ("bird/0.png", "bird/1.png", "cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png")
    assert found.labels is not None and found.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert len(found) == 2 and [len(x) for x in found] == [4, 2]
    transform = create_transform(**resolve_model_data_config(model))
    wanted = torch.stack([transform(Image.open(folder / n).convert("RGB")) for n in found.names])
    assert torch.equal(torch.cat(list(found)), wanted)
    assert torch.equal(torch.cat(list(found)), wanted), "a second pass is the same"


def test_a_tar_is_the_folder(folder: Path, model: nn.Module) -> None:
    wanted, found = read_images(folder, model, size=(32, 48)), read_images(packed(folder), model, size=(32, 48))
    (one,), (other,) = wanted, found
    assert one.shape == (6, 3, 32, 48) and torch.equal(one, other)
    assert found.labels is not None and wanted.labels is not None and torch.equal(found.labels, wanted.labels)


def test_a_limit_takes_of_every_class(folder: Path, model: nn.Module) -> None:
    found = read_images(folder, model, limit=3)
    assert found.names == ("bird/0.png", "cat/0.png", "cat/2.png") and sum(map(len, found)) == 3
    assert found.labels is not None and found.labels.tolist() == [0, 1, 1]


def test_labels_of_a_table_and_of_synsets(folder: Path, model: nn.Module) -> None:
    table = folder.parent / "labels.csv"
    names = read_images(folder, model).names
    table.write_text("file,class_index\n" + "".join(f"{n},{7 + i}\n" for i, n in enumerate(names)))
    found = read_images(folder, model, labels=table)
    assert found.labels is not None and found.labels.tolist() == [7, 8, 9, 10, 11, 12]
    for name, synset in (("bird", "n01484850"), ("cat", "n01440764"), ("dog", "n01496331")):
        (folder / name).rename(folder / synset)
    thousand = timm.create_model("test_resnet", num_classes=1000)
    found = read_images(folder, thousand)
    assert found.labels is not None and found.labels.tolist() == [0, 0, 0, 2, 2, 5]


def test_folders_that_do_not_fit_the_model_give_no_labels(folder: Path, model: nn.Module) -> None:
    found = read_images(folder, timm.create_model("test_resnet", num_classes=10))
    assert found.labels is None and found.why == "there are 3 folders, and the model has 10 classes"
    found = read_images(folder / "cat", model)
    assert found.labels is None and "do not lie in a folder for each class" in found.why


def test_top1() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0], [0.0, 3.0]])
    assert top1(logits, torch.tensor([1, 0, 0, 1])) == 75.0


def _all(path: Path, model: nn.Module) -> list[Tensor]:
    return list(read_images(path, model))


def test_what_is_damaged_is_named(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not there"):
        _all(tmp_path / "nowhere", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image"):
        _all(tmp_path / "empty", model)
    whole = packed(folder)
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(DataError, match="neither a folder nor a .tar"):
        _all(tmp_path / "notes.txt", model)
    (tmp_path / "foreign.tar").write_text("no tar at all")
    with pytest.raises(DataError, match="foreign.tar is damaged, or no tar"):
        _all(tmp_path / "foreign.tar", model)
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"cut.tar is damaged|cannot be read"):
        _all(tmp_path / "cut.tar", model)
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        tar.add(tmp_path / "notes.txt", arcname="notes.txt")
    with pytest.raises(DataError, match="none.tar holds no image"):
        _all(tmp_path / "none.tar", model)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"GIF89a no image", lambda b: b""])
def test_a_damaged_image_is_named_and_not_skipped(folder: Path, model: nn.Module, spoil: object) -> None:
    file = folder / "cat" / "1.png"
    file.write_bytes(spoil(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"The image cat/1.png cannot be read"):
        _all(folder, model)


def test_damaged_tables(folder: Path, model: nn.Module) -> None:
    table = folder.parent / "labels.csv"
    with pytest.raises(DataError, match="labels.csv cannot be read"):
        read_images(folder, model, labels=table)
    for text in ("name,label\na,1\n", "file,class_index\nbird/0.png,robin\n", "file,class_index\nbird/0.png\n"):
        table.write_text(text)
        with pytest.raises(DataError, match="no CSV with the columns file and class_index"):
            read_images(folder, model, labels=table)
    table.write_text("file,class_index\nbird/0.png,1\n")
    with pytest.raises(DataError, match="no row for 5 of the images, bird/1.png among them"):
        read_images(folder, model, labels=table)


def test_numbers_are_checked(folder: Path, model: nn.Module) -> None:
    for option in ("limit", "batch"):
        with pytest.raises(ConfigError, match=f"`{option}` of read_images"):
            read_images(folder, model, **{option: 0})  # type: ignore[arg-type]
