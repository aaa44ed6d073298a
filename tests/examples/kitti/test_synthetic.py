"""The synthetic streets: exact depth, KITTI's layout, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gatedprune.examples.kitti.images import read_image
from gatedprune.examples.kitti.layouts import read_split
from gatedprune.examples.kitti.raycast import Box, Cylinder, Ellipsoid, Ground, cast
from gatedprune.examples.kitti.streets import build_street
from gatedprune.examples.kitti.synthetic import DATE, SyntheticSample, write_sample
from gatedprune.examples.kitti.velodyne import read_scan

BLACK = (0.0, 0.0, 0.0)
SOLIDS = [
    (Ground("", BLACK, 0), [0, 1, 1], 1.65),
    (Box("", BLACK, 0, (-1, -1, 5), (1, 1, 7)), [0, 0, 1], 5.0),
    (Cylinder("", BLACK, 0, (0, 6), 0.5), [0, 0, 1], 5.5),
    (Ellipsoid("", BLACK, 0, (0, 0, 6), (1, 1, 2)), [0, 0, 1], 4.0),
]


@pytest.mark.parametrize(("solid", "ray", "distance"), SOLIDS, ids=[type(s[0]).__name__ for s in SOLIDS])
def test_distances_and_normals_by_hand(solid, ray: list[float], distance: float) -> None:
    rays = np.array([[ray, [0, -1, 0.01]]], np.float32)
    hits = cast([solid], np.zeros(3), rays)
    assert hits.distance[0, 0] == pytest.approx(distance, rel=1e-5)
    assert hits.distance[0, 1] == np.inf and hits.solid.tolist() == [[0, -1]]
    normal = solid.normal(rays[0, :1] * distance)[0]
    assert np.linalg.norm(normal) == pytest.approx(1, abs=1e-5)
    assert normal @ ray < 0  # outwards: against the ray


def test_the_nearest_solid_is_seen_and_the_window_hides_nothing() -> None:
    solids = build_street(np.random.default_rng(5))
    camera = np.array([[70, 0, 60], [0, 70, 20], [0, 0, 1]], float)
    rows, columns = np.mgrid[:40, :120]
    rays = (np.stack([columns, rows, np.ones_like(rows)], -1) @ np.linalg.inv(camera).T).astype(np.float32)
    windowed, plain = cast(solids, np.zeros(3), rays, camera=camera), cast(solids, np.zeros(3), rays)
    np.testing.assert_array_equal(windowed.distance, plain.distance)
    every = np.stack([solid.intersect(np.zeros(3, np.float32), rays) for solid in solids])
    np.testing.assert_array_equal(plain.distance, every.min(0))
    assert len(np.unique(plain.solid)) > 15


def test_the_sample_is_kittis_layout(sample: SyntheticSample) -> None:
    train, test = read_split(sample.train), read_split(sample.test)
    assert len(train) == 4 and len(test) == 2
    assert not {folder for folder, *_ in train} & {folder for folder, *_ in test}  # no street in both
    drive = sample.root / test[0][0]
    assert drive.parent.name == DATE
    image = read_image(drive / "image_02" / "data" / "0000000001.png")
    assert image.shape == (375, 1242, 3) and image.std() > 20
    points = read_scan(drive / "velodyne_points" / "data" / "0000000001.bin")
    assert 15_000 < len(points) < 40_000
    # 64 beams: as many distinct elevations, up to the noise of a hundredth of a degree.
    elevation = np.degrees(np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1])))
    assert 55 <= len(np.unique(np.round(elevation * 6))) <= 70
    assert elevation.min() > -24.5 and elevation.max() < 2.1
    # The road is 1.73 m under the laser.
    road = points[(np.abs(points[:, 1]) < 1.5) & (points[:, 0] < 9)]
    assert np.median(road[:, 2]) == pytest.approx(-1.73, abs=0.25)


def test_the_same_seed_gives_the_same_files(sample: SyntheticSample, tmp_path: Path) -> None:
    again = write_sample(tmp_path / "a", train_streets=1, test_streets=0, frames=1, progress=False)
    other = write_sample(tmp_path / "b", train_streets=1, test_streets=0, frames=1, seed=1, progress=False)
    name = f"{DATE}/{DATE}_drive_0001_sync/image_02/data/0000000000.png"
    assert (again.root / name).read_bytes() == (sample.root / name).read_bytes()
    assert (other.root / name).read_bytes() != (sample.root / name).read_bytes()
