"""`usage`: counts that agree with the gates, numbers that agree with going through every pair, files and refusals."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.errors import ConfigError, DataError, ModelError
from gatedprune.functional import active_mask
from gatedprune.inside import SiteUsage, Usage, usage

CLASSES = ("cat", "dog", "ship")


def varied(count: int, size: int = 32) -> Tensor:
    """Images whose means differ, so that gates choose differently: (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(count, 3, size, size, generator=generator)
    return noise * (0.3 + torch.rand(count, 3, 1, 1, generator=generator)) + torch.randn(
        count, 3, 1, 1, generator=generator
    )


@pytest.fixture(scope="module")
def images() -> Tensor:
    return varied(12)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.arange(12) % 3


@pytest.fixture(scope="module")
def gated(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = gatedprune.wrap(timm.create_model("test_resnet"), ratio=0.5, example_inputs=images[:2])
    model.calibrate(images.split(6), rounds=1)
    return model.train()


@pytest.fixture(scope="module")
def found(gated: nn.Module, images: Tensor, labels: Tensor) -> Usage:
    batches = list(zip(images.split(5), labels.split(5), strict=True))
    return usage(gated, batches, classes=CLASSES)


def winners(gated: nn.Module, images: Tensor) -> dict[str, Tensor]:
    gated.eval()
    with torch.no_grad():
        gated(images)
    masks = {name: active_mask(gate.last_active, gate.channels) for name, gate in gated.gates.items()}
    gated.train()
    return masks


def test_counts_are_the_gates_choices(found: Usage, gated: nn.Module, images: Tensor, labels: Tensor) -> None:
    assert found.model == "ResNet" and found.samples == 12 and found.classes == CLASSES and not found.untouched
    masks = winners(gated, images)
    assert list(found.sites) == list(gated.gates)
    for name, mask in masks.items():
        site = found[name]
        assert site.counts.tolist() == mask.sum(0).tolist()
        for label in range(3):
            assert site.class_counts is not None
            assert site.class_counts[label].tolist() == mask[labels == label].sum(0).tolist()
        assert site.class_samples is not None and site.class_samples.tolist() == [4, 4, 4]
        assert site.active == gated.gates[name].active_count
    assert any(len(site.dead()) < site.channels - site.active for site in found.sites.values())


def test_common_winners_are_those_of_all_pairs(found: Usage, gated: nn.Module, images: Tensor, labels: Tensor) -> None:
    for name, mask in winners(gated, images).items():
        pairs = list(itertools.combinations(range(12), 2))
        alike = [int((mask[a] & mask[b]).sum()) for a, b in pairs]
        inside = [n for n, (a, b) in zip(alike, pairs, strict=True) if labels[a] == labels[b]]
        assert found[name].common == pytest.approx(np.mean(alike))
        assert found[name].common_in_class == pytest.approx(np.mean(inside))
        assert found[name].common_by_chance == pytest.approx(found[name].active ** 2 / found[name].channels)


def test_always_dead_and_entropy_by_hand() -> None:
    site = SiteUsage(np.array([4, 0, 2, 1, 4]), 4)
    assert site.always.tolist() == [0, 4] and site.dead().tolist() == [1] and site.dead(0.25).tolist() == [1, 3]
    assert site.entropy == pytest.approx((1 + 0.25 * 2 + 0.75 * np.log2(4 / 3)) / 5)
    assert SiteUsage(np.array([3, 0]), 3).entropy == 0
    assert SiteUsage(np.array([1, 0]), 1).common is None


def test_the_model_is_left_alone_and_a_compact_one_will_do(found: Usage, gated: nn.Module, images: Tensor) -> None:
    before = {name: value.clone() for name, value in gated.state_dict().items()}
    again = gated.usage(images.split(7))
    assert gated.training and all(torch.equal(v, before[n]) for n, v in gated.state_dict().items())
    compact = usage(gatedprune.compact(gated, images[:2], backend="torch"), images.split(7))
    assert again.classes is None and compact.model == "ResNet"
    for name in found.sites:
        assert again[name].counts.tolist() == found[name].counts.tolist() == compact[name].counts.tolist()


def test_a_label_that_comes_late_makes_room(gated: nn.Module, images: Tensor) -> None:
    found = usage(gated, [(images[:2], torch.tensor([0, 0])), (images[2:4], torch.tensor([4, 0]))])
    assert found.classes == ("0", "1", "2", "3", "4")
    for site in found.sites.values():
        assert site.class_counts is not None and site.class_samples is not None
        assert site.class_samples.tolist() == [3, 0, 0, 0, 1]
        assert site.class_counts.sum(0).tolist() == site.counts.tolist() and not site.class_counts[1:4].any()
        assert np.isnan(site.class_share[1]).all()


def test_untouched_gates_are_named(images: Tensor) -> None:
    gated = gatedprune.wrap(timm.create_model("test_resnet"), example_inputs=images[:2])
    found = usage(gated, [images])
    assert found.untouched and "The gates are untouched" in str(found)
    for site in found.sites.values():
        assert site.entropy == 0 and site.common == site.active == len(site.always)


def test_table_and_files(found: Usage, tmp_path: Path) -> None:
    lines = str(found).splitlines()
    assert lines[0] == "ResNet: 10 gates on 12 inputs of 3 classes"
    for line, (name, site) in zip(lines[2:], found.sites.items(), strict=False):
        cells = line.split()
        assert cells[:5] == [
            name, str(site.channels), f"{site.active:.1f}", str(len(site.always)), str(len(site.dead()))
        ]  # fmt: skip
        numbers = (site.common, site.common_by_chance, site.common_in_class)
        assert cells[5:] == [f"{site.entropy:.2f}", *(f"{value:.1f}" for value in numbers)]
    found.to_json(tmp_path / "u.json")
    written = json.loads((tmp_path / "u.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict())) and written["classes"] == list(CLASSES)
    found.to_csv(tmp_path / "u.csv")
    rows = list(csv.reader((tmp_path / "u.csv").open()))
    assert rows[0] == ["site", "channel", "wins", "share", *CLASSES]
    assert len(rows) == 1 + sum(site.channels for site in found.sites.values())
    assert all(sum(map(int, row[4:])) == int(row[2]) for row in rows[1:])
    found.to_npz(tmp_path / "u.npz")
    with np.load(tmp_path / "u.npz") as arrays:
        for name, site in found.sites.items():
            assert np.array_equal(arrays[name], site.counts)
            assert np.array_equal(arrays[f"{name}/classes"], site.class_counts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["u.csv", "u.json", "u.npz"]


def test_a_file_that_cannot_be_written_stays_as_it_was(
    found: Usage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "u.npz").write_text("before")
    monkeypatch.setattr(np, "savez_compressed", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        found.to_npz(tmp_path / "u.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["u.npz"] and (tmp_path / "u.npz").read_text() == "before"


def test_refusals(gated: nn.Module, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(ModelError, match=r"usage\(\) takes a model that wrap\(\) or compact\(\) returned"):
        usage(nn.Linear(2, 2), [images])
    with pytest.raises(ModelError, match=r"compact\(share='batch'\) chooses once for the batch"):
        usage(gatedprune.compact(gated, images[:2], backend="torch", share="batch"), [images])
    with pytest.raises(DataError, match="are empty"):
        usage(gated, [])
    with pytest.raises(DataError, match="say with `inputs=` how"):
        usage(gated, [{"image": images}])
    assert usage(gated, [{"image": images}], inputs=lambda batch: batch["image"]).samples == 12
    with pytest.raises(DataError, match="must not be negative"):
        usage(gated, [(images[:2], torch.tensor([0, -1]))])
    with pytest.raises(DataError, match="2 samples and 3 labels"):
        usage(gated, [(images[:2], labels[:3])])
    with pytest.raises(DataError, match="Some batches .* have labels"):
        usage(gated, [(images[:2], labels[:2]), images[2:4]])
    with pytest.raises(ConfigError, match="names 2 classes, but there are labels up to 2"):
        usage(gated, [(images, labels)], classes=("cat", "dog"))
    with pytest.raises(KeyError, match="No site 'nowhere'"):
        usage(gated, [images])["nowhere"]
    with pytest.raises(DataError, match="Wins by class need labels"):
        usage(gated, [images]).sites["layer1.0.conv1"].class_share  # noqa: B018
