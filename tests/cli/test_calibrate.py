"""`gatedprune calibrate`: gates fitted to a folder of images and saved, or nothing at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import Result
from PIL import Image
from safetensors.torch import save_file

import gatedprune
from gatedprune.data import read_images

Run = Callable[..., Result]
SMALL = ("--size", 32, "--limit", 9, "--batch", 4, "--rounds", 2)


@pytest.mark.parametrize("temper", [False, True])
def test_gates_are_fitted_and_saved(temper: bool, run: Run, images: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = timm.create_model("test_resnet", num_classes=4).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    command = ["test_resnet", "--num-classes", 4, "--weights", tmp_path / "weights.safetensors", "--data", images]
    result = run("calibrate", *command, "--ratio", 0.25, *SMALL, "--output", tmp_path / "m", "--json",
                 *["--no-temper"] * (not temper))  # fmt: skip
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["path"] == str(tmp_path / "m") and told["samples"] == 9
    assert len(told["losses"]) == 6 * temper
    found = gatedprune.load(tmp_path / "m")
    model = timm.create_model("test_resnet", num_classes=4)
    model.load_state_dict(state)
    wanted = gatedprune.wrap(model, 0.25, example_inputs=torch.zeros(2, 3, 32, 32)).eval()
    wanted.calibrate(read_images(images, model, size=(32, 32), limit=9, batch=4), rounds=2, temper=temper)
    assert set(found.gates) == set(wanted.gates) == set(told["sites"])
    for name, gate in wanted.gates.items():
        torch.testing.assert_close(found.gates[name].weight, gate.weight)
        torch.testing.assert_close(found.gates[name].bias, gate.bias)
        assert gate.weight.any() or told["sites"][name]["shrinkage"] is None


def test_a_saved_model_is_calibrated_again(run: Run, saved: Path, images: Path, tmp_path: Path) -> None:
    result = run("calibrate", saved, "--data", images, "--ratio", 0.5, *SMALL, "--output", tmp_path / "m")
    assert result.exit_code == 0, result.output
    assert "calibrated 10 gates on 9 samples" in result.stdout and f"saved in {tmp_path / 'm'}" in result.stdout
    assert {g.ratio for g in gatedprune.load(tmp_path / "m").gates.values()} == {0.5}


def test_random_weights_are_said(run: Run, images: Path, tmp_path: Path) -> None:
    result = run("calibrate", "test_resnet", "--data", images, *SMALL, "--output", tmp_path / "m")
    assert result.exit_code == 0 and "test_resnet has random weights" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["test_resnet", "--data", "{images}", "--weights", "{images}/a/0.png"], 1, "0.png is damaged"),
        (
            ["test_resnet", "--data", "{images}", "--weights", "x", "--pretrained"],
            2,
            "either --weights or --pretrained",
        ),
        (["test_resnet", "--data", "nowhere"], 1, "nowhere is not there"),
        (["test_resnet", "--data", "{images}", "--ratio", "1"], 1, "`ratio` of wrap() must be"),
        (["{saved}", "--data", "{images}", "--macs", "0.5"], 2, "--macs: for a model without gates"),
        (["{saved}", "--data", "{images}", "--num-classes", "3"], 2, "--num-classes: only for a name that timm knows"),
        (["{saved}", "--data", "{images}", "--weights", "x"], 2, "which has its weights"),
        (["test_resnet"], 2, "Missing option '--data'"),
    ],
)
def test_what_is_wrong_leaves_nothing(run: Run, saved: Path, images: Path, tmp_path: Path, arguments: list[str],
                                      code: int, why: str) -> None:  # fmt: skip
    filled = [a.format(images=images, saved=saved) for a in arguments]
    result = run("calibrate", *filled, *SMALL, "--output", tmp_path / "m")
    assert result.exit_code == code, result.output
    assert why in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_a_damaged_image_leaves_nothing(run: Run, images: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "b.png").write_bytes((tmp_path / "data" / "a.png").read_bytes()[:40])
    result = run("calibrate", "test_resnet", "--data", tmp_path / "data", "--size", 32, "--output", tmp_path / "m")
    assert result.exit_code == 1 and "b.png cannot be read" in result.output
    assert [f.name for f in tmp_path.iterdir()] == ["data"]
