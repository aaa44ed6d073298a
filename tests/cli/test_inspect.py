"""`gatedprune inspect` prints what `find_sites` finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from click.testing import Result
from torch import nn

import gatedprune

Run = Callable[..., Result]


def test_inspect_prints_sites_reasons_and_totals(run: Run) -> None:
    result = run("inspect", "test_resnet", "--size", "64")
    assert result.exit_code == 0, result.output
    report = gatedprune.find_sites(timm.create_model("test_resnet"), torch.zeros(2, 3, 64, 64))
    words = [line.split() for line in result.output.splitlines()]
    for site in report:
        assert [site.name, site.kind, str(site.channels), f"{site.share:.1%}"] in [w[:4] for w in words]
    for path, reason in report.skipped.items():
        assert path in [w[0] for w in words if w]
        assert f"  {reason}:" in result.output
    assert (
        f"left at ratio 0.5: {report.macs_left(0.5) / 1e6:.3g} MMACs ({report.macs_left() / report.macs:.1%})"
        in result.output
    )


def test_inspect_json_is_the_report(run: Run) -> None:
    result = run("inspect", "test_vit", "--size", "96x64", "--stream", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    model = timm.create_model("test_vit", img_size=(96, 64))
    report = gatedprune.find_sites(model, torch.zeros(2, 3, 96, 64), stream=True)
    assert found["macs"] == report.macs and found["macs_left"] == {"0.5": report.macs_left(0.5)}
    assert [(s["name"], s["kind"], s["channels"]) for s in found["sites"]] == [
        (s.name, s.kind, s.channels) for s in report
    ]
    assert {s["kind"] for s in found["sites"]} == {"inner", "stream"}
    assert found["not_gated"] == report.skipped
    (first, *_) = found["sites"]
    assert first["narrows"] and all(any(p == layer.path for layer in report.layers) for p in first["narrows"])


def test_a_model_of_ones_own(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text("import timm\ndef small():\n    return timm.create_model('test_resnet')\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = run("inspect", "own_models:small", "--size", "64", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.output)["sites"]) == 10


def test_a_model_without_sites_is_explained(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "OneLayer", lambda: nn.Conv2d(3, 8, 3), raising=False)
    result = run("inspect", "torch.nn:OneLayer", "--size", "16")
    assert result.exit_code == 0, result.output
    assert "its channels leave the model as an output" in result.output and "0 sites" in result.output
