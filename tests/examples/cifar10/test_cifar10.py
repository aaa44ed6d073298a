"""The comparison on CIFAR-10: it trains what is asked for, once, and its report says what the points say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import gatedprune
from gatedprune.examples.cifar10 import network
from gatedprune.examples.cifar10.cli import main
from gatedprune.examples.cifar10.report import Point, at_equal_accuracy, table
from gatedprune.io import find_imported


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixteen images for training and eight for testing, of ten classes with a colour each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 10)):
        for i in range(count):
            folder = tmp_path / "data" / split / f"class{i % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (rng.integers(0, 100, (16, 16, 3)) + 15 * (i % 10)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path / "data"


def tiny() -> torch.nn.Module:
    return network._resnet(channels=4, blocks=1, stride=2)


def test_it_trains_once_and_reports(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    options = ["--data", str(images), "--output", str(output), "--model", f"{__name__}:tiny", "--seed", "0", "--seed",
               "3", "--macs", "0.6", "--epochs", "1", "--finetune-epochs", "1", "--batch-size", "10", "--repeats", "1",
               "--calibration-images", "10", "--pixels", "16"]  # fmt: skip
    done = CliRunner().invoke(main, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    names = {"dense-0", "static-0.6-0", "dynamic-0.6-0", "dense-3", "static-0.6-3", "dynamic-0.6-3"}
    assert {p.name for p in output.iterdir() if p.is_dir()} == names
    result = json.loads((output / "result.json").read_text())
    assert [(p["way"], len(p["top1"]), len(p["ms"])) for p in result["points"]] == [
        ("dense", 2, 2), ("static", 2, 2), ("dynamic", 2, 2)
    ]  # fmt: skip
    for p in result["points"]:
        assert p["macs"] == pytest.approx(p["asked"], abs=0.05)
        for seed, top1 in zip((0, 3), p["top1"], strict=True):
            name = f"dense-{seed}" if p["way"] == "dense" else f"{p['way']}-0.6-{seed}"
            assert json.loads((output / name / "result.json").read_text())["top1"] == top1
    kept = [json.loads((output / f"static-0.6-{s}" / "model" / "finetuned.json").read_text())["kept"] for s in (0, 3)]
    assert kept[0] != kept[1]  # another dense network
    gates = gatedprune.load(output / "dynamic-0.6-0" / "model", tiny()).gates
    assert {name: len(channels) for name, channels in kept[0].items()} == {n: g.active_count for n, g in gates.items()}

    before = {p: p.stat().st_mtime_ns for p in output.rglob("model.safetensors")}
    again = CliRunner().invoke(main, [*options, "--no-time"], catch_exceptions=False)
    assert again.exit_code == 0 and "| dynamic | 0.6 |" in again.output
    assert {p: p.stat().st_mtime_ns for p in output.rglob("model.safetensors")} == before


def test_time_at_equal_accuracy_is_interpolated_between_statics_points() -> None:
    found = [Point("dense", 1, 1.0, (90.0,), (10.0,)), Point("static", 0.5, 0.5, (80.0,), (6.0,)),
             Point("static", 0.25, 0.25, (70.0,), (4.0,)), Point("dynamic", 0.5, 0.5, (85.0,), (6.0,)),
             Point("dynamic", 0.25, 0.25, (75.0,), (4.0,)), Point("dynamic", 0.1, 0.1, (60.0,), (3.0,)),
             Point("dynamic", 0.9, 0.9, (91.0,), (9.0,))]  # fmt: skip
    ratios = at_equal_accuracy(found, lambda p: p.time)
    assert {asked: r.ratio for asked, r in ratios.items()} == pytest.approx({0.5: 6 / 8, 0.25: 4 / 5, 0.9: 0.9})
    assert {asked: (r.of, r.reached) for asked, r in ratios.items()} == {
        0.5: ("static", True), 0.25: ("static", True), 0.9: ("dense", False),  # 0.1 is worse than all static ones
    }  # fmt: skip
    lines = table(found)
    assert "\nAt the accuracy of dynamic at 0.25, dynamic needs 0.80 of static's time." in lines
    assert "dynamic at 0.9. Of the most accurate, dense, dynamic needs 0.90 of the time." in lines
    assert at_equal_accuracy(found[:1], lambda p: p.time) == {}
    text = table([Point("static", 0.5, 0.49, (80.0, 82.0)), Point("dense", 1, 1.0, (90.0,), (10.0, 12.0, 11.0))])
    assert "| static | 0.5 | 0.490 | 81.00 ± 1.41 | 80.00, 82.00 |  |" in text
    assert "| dense | 1 | 1.000 | 90.00 ± 0.00 | 90.00 | 11.000 |" in text


def test_a_dense_network_behind_static_makes_nothing_look_dearer() -> None:
    """Trained for less, it may be the least accurate point and the dearest."""
    found = [Point("dense", 1, 1.0, (70.0,)), Point("static", 0.5, 0.5, (80.0,)), Point("static", 0.25, 0.25, (60.0,)),
             Point("dynamic", 0.5, 0.5, (75.0,)), Point("dynamic", 0.25, 0.25, (81.0,))]  # fmt: skip
    ratios = at_equal_accuracy(found, lambda p: p.macs)
    assert ratios[0.5] == (pytest.approx(0.5 / (0.25 + 0.25 * 15 / 20)), "static", True)
    assert ratios[0.25] == (pytest.approx(0.25 / 0.5), "static at 0.5", False)
    assert at_equal_accuracy([*found[:2], found[3]], lambda p: p.macs)[0.5].ratio == 1  # static at 0.5 does it, too


@pytest.mark.parametrize(("make", "macs"), [(network.small, 15.9e6), (network.large, 555e6), (network.mobile, 1.05e6)])
def test_networks_are_as_large_as_the_help_says(make: object, macs: float) -> None:
    model = make().to("meta")  # type: ignore[operator]
    report = gatedprune.find_sites(model, torch.zeros(2, 3, 32, 32, device="meta"))
    assert report.macs == pytest.approx(macs, rel=0.01)
    assert report.macs_left(0.85) / report.macs < 0.25


@pytest.mark.parametrize("name", network.__all__)
def test_the_networks_here_go_by_their_short_names(name: str, images: Path, tmp_path: Path) -> None:
    options = ["--data", str(images), "--output", str(tmp_path), "--model", name, "--no-train", "--no-time"]
    CliRunner().invoke(main, options, catch_exceptions=False)
    dense = json.loads((tmp_path / "result.json").read_text())["trials"]["dense"]
    assert find_imported(dense["model"]) is getattr(network, name)
