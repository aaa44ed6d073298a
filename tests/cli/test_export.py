"""`gatedprune export` writes a file that gives the model's numbers, or says in a line why not."""

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

import gatedprune
from gatedprune.data import read_images

Run = Callable[..., Result]


def test_export_takes_a_saved_folder(run: Run, saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.pt2"
    result = run("export", str(saved), "--format", "torch-export", "--output", str(target), "--batch", "1", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["path"] == str(target) and told["bytes"] == target.stat().st_size
    assert told["inputs"] == [[1, 3, 64, 64]] and told["difference"] < 1e-5
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.export.load(target).module()(x), gatedprune.load(saved)(x), rtol=1e-4, atol=1e-5
        )


def test_export_wraps_a_model_without_gates(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--format", "torch-export", "--ratio", "0.7", "--size", "32", "--batch", "2", "--no-check"]
    result = run("export", "test_resnet", *arguments)
    assert result.exit_code == 0, result.output
    assert "model.pt2: torch-export" in result.output and "takes 2x3x32x32; not checked" in result.output


def test_export_says_what_is_wrong(run: Run, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("export", str(saved), "--format", "torch-export", "--no-check", "--batch", "1",
                 "--output", str(tmp_path / "file" / "m.pt2"))  # fmt: skip
    assert result.exit_code == 1 and "m.pt2 cannot be written" in result.output
    result = run("export", str(saved), "--macs", "0.5")
    assert result.exit_code == 2 and "--macs: for a model without gates" in result.output
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "gatedprune.json").write_text("{")
    result = run("inspect", str(broken))
    assert result.exit_code == 1 and "is damaged" in result.output and "Traceback" not in result.output


def test_a_static_profile_of_one_image_is_the_model_on_that_image(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    gated = gatedprune.wrap(timm.create_model("test_resnet"), 0.5, example_inputs=torch.zeros(1, 3, 64, 64)).eval()
    with torch.no_grad():
        for gate in gated.gates.values():
            gate.weight.add_(torch.randn_like(gate.weight) * 0.1)
    gatedprune.save(gated, tmp_path / "m")
    (tmp_path / "data").mkdir()
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(tmp_path / "data" / "a.png")
    target = tmp_path / "s.pt"
    options = ["--size", 64, "--format", "torchscript", "--output", target, "--json"]
    result = run("export", tmp_path / "m", "--static-profile", tmp_path / "data", *options)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["format"] == "torchscript" and told["active_sets"] == 1 and told["difference"] < 1e-5
    static = torch.jit.load(target)
    (x,) = read_images(tmp_path / "data", gated, size=(64, 64))
    with torch.no_grad():
        torch.testing.assert_close(static(x), gated(x), rtol=1e-4, atol=1e-5)
        other = x.flip(3) * torch.tensor([2.0, 0.1, -1.0]).view(1, 3, 1, 1)
        assert not torch.allclose(static(other), gated(other), rtol=1e-3), "which differs on another image"
