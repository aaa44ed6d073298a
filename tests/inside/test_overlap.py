"""`choices`: what single images share, by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import gatedprune
from gatedprune.errors import ConfigError, ModelError
from gatedprune.inside import Choices, SiteChoices, choices

TWO = SiteChoices(np.array([[1, 1, 0, 0, 1], [1, 0, 1, 0, 0]], dtype=bool))
THREE = SiteChoices(np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1]], dtype=bool))


def test_numbers_by_hand() -> None:
    assert TWO.active == (3, 2) and TWO.shared == 1 and TWO.unused == 1
    assert (TWO.only(0), TWO.only(1)) == (2, 1) and TWO.overlap == pytest.approx(1 / 4)
    assert THREE.shared == 1 and THREE.unused == 0 and [THREE.only(i) for i in range(3)] == [0, 0, 0]
    assert THREE.overlap == pytest.approx((1 / 3 + 2 / 3 + 2 / 3) / 3)


def test_table_and_file(tmp_path: Path) -> None:
    found = Choices(("one.jpg", "two.jpg"), {"layer": TWO}, untouched=True)
    lines = str(found).splitlines()
    assert lines[:2] == ["a: one.jpg", "b: two.jpg"] and "untouched" in lines[-1]
    assert lines[3].split() == ["layer", "5", "3/2", "1", "2", "1", "1", "0.25"]
    found.to_json(tmp_path / "c.json")
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["inputs"] == ["one.jpg", "two.jpg"]
    assert written["sites"]["layer"]["active"] == [[0, 1, 4], [0, 2]]


def test_choices_are_the_gates() -> None:
    images = torch.randn(2, 3, 32, 32) * torch.tensor([0.2, 2.0]).view(2, 1, 1, 1)
    gated = gatedprune.wrap(timm.create_model("test_resnet"), ratio=0.5, example_inputs=images)
    assert choices(gated, images).untouched
    gated.calibrate([images], rounds=1, folds=2)
    for gate in gated.gates.values():
        torch.nn.init.normal_(gate.weight)
    found, same = choices(gated, images, ["a", "b"]), choices(gated, images[:1].repeat(2, 1, 1, 1))
    assert found.names == ("a", "b") and not found.untouched
    with torch.no_grad():
        gated.eval()(images)
    for name, gate in gated.gates.items():
        mask = torch.zeros(2, gate.channels, dtype=torch.bool).scatter(1, gate.last_active, True)
        assert np.array_equal(found[name].mask, mask.numpy()) and same[name].overlap == 1
    assert any(site.overlap < 1 for site in found.sites.values())


def test_refusals() -> None:
    images = torch.randn(2, 3, 32, 32)
    gated = gatedprune.wrap(timm.create_model("test_resnet"), example_inputs=images)
    with pytest.raises(ConfigError, match=r"at least two. Got 1"):
        choices(gated, images[:1])
    with pytest.raises(ConfigError, match=r"must name 2 inputs. Got 1"):
        choices(gated, images, ["a"])
    with pytest.raises(ModelError, match="is not gated"):
        choices(torch.nn.Identity(), images)
    with pytest.raises(KeyError, match="No site"):
        choices(gated, images)["nowhere"]
