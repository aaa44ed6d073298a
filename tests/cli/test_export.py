"""`gatedprune export` writes a file that gives the model's numbers, or says in a line why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import gatedprune

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
    assert result.exit_code == 2 and "--macs is for a model without gates" in result.output
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "gatedprune.json").write_text("{")
    result = run("inspect", str(broken))
    assert result.exit_code == 1 and "is damaged" in result.output and "Traceback" not in result.output
