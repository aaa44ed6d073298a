"""A small sample of synthetic street scenes, written in the KITTI raw layout and read back by the same
loader.

The camera, the laser and their poses are KITTI's own (calibration of 2011-09-26), the scenes are made up.
Numbers measured on them say how the program behaves, and nothing about KITTI.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .calibration import camera_projection, velodyne_pose
from .images import write_depth, write_image
from .raycast import Solid, cast
from .streets import build_street, shade
from .velodyne import write_scan

__all__ = ["SyntheticSample", "write_sample"]

DATE = "2000_01_01"
"""No KITTI drive has this date: a synthetic frame cannot be mistaken for a real one."""
IMAGE_SIZE = (375, 1242)
FRAME_DISTANCE = 7.0
"""Metres driven from one frame to the next."""
BEAM_ELEVATIONS = np.radians(np.concatenate([2 - np.arange(32) / 3, -8.83 - np.arange(32) / 2]))
"""The HDL-64E's 64 beams: 32 a third of a degree apart from +2, then 32 half a degree apart."""
AZIMUTHS = np.radians(np.arange(-50, 50, 0.18))
"""The part of the turn that the camera can see, in the sensor's steps at 10 turns a second."""
LASER_RANGE = 120.0
LASER_NOISE = 0.015

CAM_TO_CAM = """\
calib_time: synthetic scenes with the constants of 2011-09-26
S_rect_02: 1.242000e+03 3.750000e+02
R_rect_00: 9.999239e-01 9.837760e-03 -7.445048e-03 -9.869795e-03 9.999421e-01 -4.278459e-03 \
7.402527e-03 4.351614e-03 9.999631e-01
P_rect_00: 7.215377e+02 0.000000e+00 6.095593e+02 0.000000e+00 0.000000e+00 7.215377e+02 1.728540e+02 \
0.000000e+00 0.000000e+00 0.000000e+00 1.000000e+00 0.000000e+00
P_rect_02: 7.215377e+02 0.000000e+00 6.095593e+02 4.485728e+01 0.000000e+00 7.215377e+02 1.728540e+02 \
2.163791e-01 0.000000e+00 0.000000e+00 1.000000e+00 2.745884e-03
"""
VELO_TO_CAM = """\
calib_time: synthetic scenes with the constants of 2011-09-26
R: 7.533745e-03 -9.999714e-01 -6.166020e-04 1.480249e-02 7.280733e-04 -9.998902e-01 9.998621e-01 \
7.523790e-03 1.480755e-02
T: -4.069766e-03 -7.631618e-02 -2.717806e-01
"""
README = """\
Synthetic street scenes in the KITTI raw layout, written by `python -m gatedprune.examples.kitti demo`.
They are not KITTI data: the images are computed, the depth is exact up to the laser's simulated noise.
train.txt and test.txt list the frames (folder, frame, side); no street is in both. exact/ holds the test
frames' dense depth as KITTI depth PNGs.
"""


@dataclass(frozen=True)
class SyntheticSample:
    """Where a sample was written: the root in raw layout, its two split files, and the exact depth maps."""

    root: Path
    train: Path
    test: Path
    exact: Path


def write_sample(
    root: str | os.PathLike[str],
    *,
    train_streets: int = 16,
    test_streets: int = 4,
    frames: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> SyntheticSample:
    """Write `train_streets` + `test_streets` drives of `frames` frames each under `root`, in the KITTI raw
    layout.
    """
    sample = SyntheticSample(*(Path(root) / name for name in ("", "train.txt", "test.txt", "exact")))
    date = sample.root / DATE
    date.mkdir(parents=True, exist_ok=True)
    (sample.root / "README.txt").write_text(README)
    (date / "calib_cam_to_cam.txt").write_text(CAM_TO_CAM)
    (date / "calib_velo_to_cam.txt").write_text(VELO_TO_CAM)
    lines: dict[Path, list[str]] = {sample.train: [], sample.test: []}
    with tqdm(
        total=(train_streets + test_streets) * frames,
        desc="street scenes",
        unit="frame",
        disable=not progress,
    ) as bar:
        for street in range(train_streets + test_streets):
            drive = f"{DATE}/{DATE}_drive_{street + 1:04d}_sync"
            split = sample.train if street < train_streets else sample.test
            exact = sample.exact if split == sample.test else None
            for number in range(frames):
                _write_frame(sample.root / drive, number, np.random.default_rng((seed, street)), exact)
                lines[split].append(f"{drive} {number:010d} l\n")
                bar.update()
    for split, content in lines.items():
        split.write_text("".join(content))
    return sample


def _write_frame(drive: Path, number: int, random: np.random.Generator, exact: Path | None) -> None:
    solids = build_street(random)
    noise = np.random.default_rng((int(random.integers(1 << 31)), number))
    position = np.array([noise.uniform(-0.8, 0.8), 0.0, number * FRAME_DISTANCE])
    yaw = noise.uniform(-0.04, 0.04)
    image, depth = render(solids, position, yaw, noise, drive.parent)
    points = scan(solids, position, yaw, noise, drive.parent)
    places = {"image_02": f"{number:010d}.png", "velodyne_points": f"{number:010d}.bin"}
    files = {part: drive / part / "data" / name for part, name in places.items()}
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    write_image(files["image_02"], image)
    write_scan(files["velodyne_points"], points)
    if exact is not None:
        folder = exact / drive.name / "proj_depth" / "groundtruth" / "image_02"
        folder.mkdir(parents=True, exist_ok=True)
        write_depth(folder / f"{number:010d}.png", np.where(depth < LASER_RANGE, depth, 0))


def _world_rotation(yaw: float) -> np.ndarray:
    """Rotation (3, 3) from the rectified camera's axes to the street's."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def render(
    solids: list[Solid], position: np.ndarray, yaw: float, noise: np.random.Generator, calibration: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return what camera 2 sees: RGB uint8 (H, W, 3), and the depth along its axis in metres (H, W), inf in
    the sky.
    """
    camera, center = _camera(calibration)
    rows, columns = np.mgrid[: IMAGE_SIZE[0], : IMAGE_SIZE[1]]
    pixels = np.stack([columns, rows, np.ones_like(rows)], axis=-1)
    rotation = _world_rotation(yaw)
    # Each ray advances one metre along the camera's axis, so that the distance in ray lengths is the depth.
    rays = (pixels @ np.linalg.inv(camera).T @ rotation.T).astype(np.float32)
    origin = position + rotation @ center
    hits = cast(solids, origin, rays, camera=camera @ rotation.T)
    image = shade(solids, hits, origin, rays)
    grain = noise.normal(0, 0.012, IMAGE_SIZE).astype(np.float32)[..., None]
    exposure = np.float32(noise.uniform(0.8, 1.1))
    return (np.clip(image * exposure + grain, 0, 1) * 255 + 0.5).astype(np.uint8), hits.distance


def scan(
    solids: list[Solid], position: np.ndarray, yaw: float, noise: np.random.Generator, calibration: Path
) -> np.ndarray:
    """Return what the laser sees: points (N, 4) in its own axes, in metres, with a made-up reflectance."""
    elevation, azimuth = np.meshgrid(BEAM_ELEVATIONS, AZIMUTHS, indexing="ij")
    beams = np.stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], axis=-1
    )
    to_rectified, to_street = velodyne_pose(calibration), _world_rotation(yaw)
    rays = (beams @ to_rectified[:3, :3].T @ to_street.T).astype(np.float32)
    hits = cast(solids, position + to_street @ to_rectified[:3, 3], rays)
    distance = hits.distance + noise.normal(0, LASER_NOISE, hits.distance.shape)
    # The sensor loses some returns, and all of what is too far.
    returned = (hits.distance < LASER_RANGE) & (noise.random(distance.shape) > 0.05)
    points = beams[returned] * distance[returned, None]
    return np.concatenate([points, noise.random((len(points), 1))], axis=1).astype(np.float32)


def _camera(calibration: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return camera 2's matrix (3, 3) and its centre in the rectified axes (3,), in metres."""
    projection = camera_projection(calibration)
    camera = projection[:, :3]
    return camera, -np.linalg.solve(camera, projection[:, 3])
