"""The command runs, on a tiny model and made-up images, and its numbers are those of the models that it names."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

import gatedprune
from gatedprune.errors import CheckpointError, DataError
from gatedprune.examples.imagenet_calibration.baselines import choosing, compensating, reading_means
from gatedprune.examples.imagenet_calibration.cli import main
from gatedprune.examples.imagenet_calibration.data import load_images, load_labels, load_model, load_views
from gatedprune.examples.imagenet_calibration.measure import Views, measure

MODEL = "test_efficientnet.r160_in1k"


def archive(path: Path, count: int, seed: int) -> list[str]:
    rng, names = np.random.default_rng(seed), [f"{i:02}.png" for i in range(count)]
    with tarfile.open(path, "w") as tar:
        for name in reversed(names):
            colours = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            stream = io.BytesIO()
            Image.fromarray(colours).resize((170, 170), Image.Resampling.BILINEAR).save(stream, "PNG")
            entry = tarfile.TarInfo(f"folder/{name}")
            entry.size = stream.tell()
            stream.seek(0)
            tar.addfile(entry, stream)
    return names


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Weights under another port's keys, two tars, and the dense model's own predictions as labels."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval()
    torch.save({f"other.{i}": v for i, v in enumerate(model.state_dict().values())}, tmp_path / "w.pth")
    names = archive(tmp_path / "images.tar", 12, seed=0)
    archive(tmp_path / "calibration.tar", 16, seed=1)
    images, found = load_images(tmp_path / "images.tar", model, None, None)
    assert found == names
    with torch.no_grad():
        classes = model(images).argmax(1).tolist()
    rows = [f"{name},{c}" for name, c in zip(names, classes, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class_index", *rows]) + "\n")
    return tmp_path


def arguments(files: Path, *more: str) -> list[str]:
    return ["--model", MODEL, "--weights", str(files / "w.pth"), "--images", str(files / "images.tar"), "--labels",
            str(files / "labels.csv"), "--calibration", str(files / "calibration.tar"), *more]  # fmt: skip


def test_the_command_prints_a_table_and_writes_json(files: Path) -> None:
    out = files / "out.json"
    options = ["--ratio", "0", "--ratio", "0.25", "--ranking", "activation", "--ranking", "taylor", "--json", str(out),
               "--rounds", "2", "--views", "2", "--allocate", "--include", "blocks.*.conv_pw"]  # fmt: skip
    run = CliRunner().invoke(main, arguments(files, *options), catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert "top-1, from 100.0 dense" in run.output
    assert "dynamic, calibrated | 100.0 |" in run.output  # nothing is suppressed at ratio 0
    found = json.loads(out.read_text())
    assert found["dense"] == 100
    nothing = found["runs"][0]
    for row in (*nothing["static"].values(), nothing["oracle"], nothing["dynamic"], nothing["allocated"]["dynamic"]):
        assert row == 100
    quarter = found["runs"][1]
    assert quarter["macs"] < 1
    assert set(quarter["static"]) == {
        "activation", "activation, suppressed channels at their mean", "activation, norms matched", "taylor",
        "taylor, norms matched", "calibrated, constant term alone",
    }  # fmt: skip
    assert set(quarter["allocated"]["ratios"]) == {"static", "dynamic"}
    assert all({"r2_cross_validated", "r2_held_out"} <= set(site) for site in quarter["sites"].values())
    assert found["options"]["calibration"] == 16


def test_held_out_calibration_images_take_the_place_of_images(files: Path) -> None:
    out = files / "out.json"
    common = ["--model", MODEL, "--weights", str(files / "w.pth"), "--calibration", str(files / "calibration.tar")]
    options = ["--ratio", "0.25", "--ranking", "magnitude", "--rounds", "1", "--no-yardsticks", "--json", str(out)]
    run = CliRunner().invoke(main, [*common, "--held-out", "4", *options], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    found = json.loads(out.read_text())
    assert found["dense"] == 100  # the dense model's own answers
    assert (found["options"]["images"], found["options"]["calibration"]) == (4, 12)
    run = CliRunner().invoke(main, common)
    assert run.exit_code == 2
    assert "--images and --labels, or --held-out" in run.output


def test_static_is_what_torch_pruning_leaves(files: Path) -> None:
    """The masked model with a static choice has the top-1 of the pruned one; choices do not outlive their block."""
    model = load_model(MODEL, files / "w.pth")
    images, names = load_images(files / "images.tar", model, None, None)
    labels = load_labels(files / "labels.csv", names)
    gated: Any = gatedprune.wrap(model, 0.3, example_inputs=images[:1], signed=True)
    kept = gatedprune.prune_static(gated, example_inputs=images[:1])
    scores = {n: torch.zeros(gated.gates[n].channels).index_fill_(0, k, 1.0) for n, k in kept.kept.items()}
    before = {k: v.clone() for k, v in gated.state_dict().items()}
    with torch.no_grad(), choosing(gated, scores):
        torch.testing.assert_close(gated(images), kept.model(images), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in gated.state_dict().items())
    data = Views([images[:8]], 4)
    found = measure(gated, 0.3, data, images, labels, rankings=["magnitude"], rounds=2, yardsticks=False)
    assert 0 <= found["dynamic"] <= 100
    assert "oracle" not in found


def test_bias_compensation_puts_suppressed_channels_at_their_mean(files: Path) -> None:
    """In front of a 1×1 convolution that is a bias: the mean of what is lost."""
    model = load_model(MODEL, files / "w.pth")
    images, _ = load_images(files / "images.tar", model, None, None)
    gated: Any = gatedprune.wrap(model, 0.0, example_inputs=images[:1], include="blocks.1.0.conv_exp")
    means = reading_means(gated, images, 5)
    path = "blocks.1.0.conv_pwl"
    reader, seen = gated.get_submodule(path), []
    handle = reader.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad():
        gated(images)
        gated.set_ratio(0.5)
        gated(images)
        with compensating(gated, means):
            gated(images)
        handle.remove()
    dense, pruned, mended = (y.mean((0, 2, 3)) for y in seen)
    torch.testing.assert_close(mended, dense, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(pruned, dense, rtol=1e-2, atol=1e-3)


def test_views_are_the_images_and_always_the_same_crops(files: Path) -> None:
    model = load_model(MODEL, files / "w.pth")
    images, _ = load_images(files / "images.tar", model, None, None)
    plain, *crops = load_views(files / "images.tar", model, None, None, 3)
    assert torch.equal(plain, images)
    assert [c.shape for c in crops] == [images.shape] * 2
    assert not torch.equal(crops[0], crops[1])
    again = load_views(files / "images.tar", model, None, None, 3)[1]
    assert torch.equal(again, crops[0])
    assert [len(x) for x in Views([plain, *crops], 8)] == [8, 4] * 3


def test_errors_name_the_file(files: Path) -> None:
    torch.save({"a": torch.ones(3)}, files / "bad.pth")
    with pytest.raises(CheckpointError, match=r"bad\.pth does not fit"):
        load_model(MODEL, files / "bad.pth")
    with pytest.raises(DataError, match="no row for 1 images, 99"):
        load_labels(files / "labels.csv", ["99.png"])
    with tarfile.open(files / "empty.tar", "w"):
        pass
    run = CliRunner().invoke(main, arguments(files, "--calibration", str(files / "empty.tar")))
    assert run.exit_code == 1
    assert "holds no image" in run.output
