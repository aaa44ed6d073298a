"""`gatedprune usage` and `gatedprune inspect --image`: the library's numbers, the files, the refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

import gatedprune
from gatedprune.inside import choices, image_set, load_images, usage

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(root / name)
    return root


def test_usage_prints_and_writes_the_counts(run: Run, saved: Path, photos: Path, tmp_path: Path) -> None:
    result = run("usage", saved, "--images", photos, "--json", tmp_path / "u.json", "--csv", tmp_path / "u.csv",
                 "--npz", tmp_path / "u.npz", "--batch", 2)  # fmt: skip
    assert result.exit_code == 0, result.output
    gated = gatedprune.load(saved)
    images = image_set(gated, photos)
    found = usage(gated, images, classes=images.classes)
    assert str(found) in result.output and "10 gates on 3 inputs of 2 classes" in result.output
    assert json.loads((tmp_path / "u.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["u.csv", "u.json", "u.npz"]


def test_usage_of_a_model_without_gates_and_of_some_images(run: Run, photos: Path) -> None:
    result = run("usage", "test_resnet", "--size", "32", "--images", photos / "cat", "--limit", 1, "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["samples"] == 1 and found["classes"] is None and found["untouched"]


def test_usage_draws(run: Run, saved: Path, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    result = run("usage", saved, "--images", photos, "--plot", tmp_path / "u.svg", "--plot-classes", tmp_path / "c.svg")
    assert result.exit_code == 0, result.output
    assert all("<svg" in (tmp_path / name).read_text() for name in ("u.svg", "c.svg"))


def test_usage_says_what_is_wrong(run: Run, saved: Path, photos: Path, tmp_path: Path) -> None:
    result = run("usage", saved, "--images", tmp_path / "nothing")
    assert result.exit_code == 1 and "is not there: give a folder with images" in result.output
    result = run("usage", saved, "--images", photos / "cat", "--plot-classes", tmp_path / "c.svg")
    assert result.exit_code == 2 and "--plot-classes needs classes" in result.output
    assert run("usage", saved).exit_code == 2


def test_inspect_lays_images_side_by_side(run: Run, saved: Path, photos: Path, tmp_path: Path) -> None:
    paths = [photos / "cat/a.png", photos / "dog/c.png", photos / "cat/b.png"]
    result = run("inspect", saved, "--image", *paths, "--json")
    assert result.exit_code == 0, result.output
    gated = gatedprune.load(saved)
    found = choices(gated, load_images(gated, paths)[0], ["a.png", "c.png", "b.png"])
    assert json.loads(result.output) == json.loads(json.dumps(found.to_dict()))
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    result = run("inspect", saved, "--image", *paths[:2], "--plot", tmp_path / "channels.svg")
    assert result.exit_code == 0 and result.output.startswith("a: a.png\nb: c.png\n"), result.output
    assert "<svg" in (tmp_path / "channels.svg").read_text()


def test_inspect_refuses_one_image_and_a_plot_of_none(run: Run, saved: Path, photos: Path, tmp_path: Path) -> None:
    result = run("inspect", saved, "--image", photos / "cat/a.png")
    assert result.exit_code == 2 and "--image takes two images or more" in result.output
    result = run("inspect", saved, "--plot", tmp_path / "x.png")
    assert result.exit_code == 2 and "--plot draws what the images of --image use" in result.output
    (tmp_path / "text.jpg").write_text("no image")
    result = run("inspect", saved, "--image", photos / "cat/a.png", tmp_path / "text.jpg")
    assert result.exit_code == 1 and "cannot be read as an image" in result.output
