"""KITTI's calibration files: the matrix that takes a Velodyne point to a pixel and its depth."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from gatedprune.errors import DataError

__all__ = ["camera_projection", "object_projection", "raw_projection", "velodyne_pose"]


def raw_projection(date_folder: str | os.PathLike[str], camera: int = 2) -> np.ndarray:
    """Return P_rect · R_rect_00 · (R | T) of the raw layout, (3, 4) float64.

    It takes a homogeneous Velodyne point (x, y, z, 1) in metres to (u·w, v·w, w), where (u, v) is the pixel
    in the rectified image and w is the depth in metres along the camera's axis.

    Args:
        date_folder: the folder with `calib_cam_to_cam.txt` and `calib_velo_to_cam.txt`.
        camera: 2 (left colour) or 3 (right colour); 0 and 1 are the grey ones.

    Raises:
        DataError: a file or an entry is missing or damaged.
    """
    return camera_projection(date_folder, camera) @ velodyne_pose(date_folder)


def camera_projection(date_folder: str | os.PathLike[str], camera: int = 2) -> np.ndarray:
    """Return P_rect of a camera, (3, 4): from the rectified axes of camera 0, in metres, to pixels."""
    file = Path(date_folder) / "calib_cam_to_cam.txt"
    return _matrix(_read_entries(file), f"P_rect_{camera:02d}", (3, 4), file)


def velodyne_pose(date_folder: str | os.PathLike[str]) -> np.ndarray:
    """Return R_rect_00 · (R | T), (4, 4): from the Velodyne's axes to the rectified axes of camera 0, in
    metres.
    """
    cameras, velodyne = (
        Path(date_folder) / "calib_cam_to_cam.txt",
        Path(date_folder) / "calib_velo_to_cam.txt",
    )
    rectify = _homogeneous(_matrix(_read_entries(cameras), "R_rect_00", (3, 3), cameras))
    entries = _read_entries(velodyne)
    rotation, translation = _matrix(entries, "R", (3, 3), velodyne), _matrix(entries, "T", (3, 1), velodyne)
    return rectify @ _homogeneous(np.hstack([rotation, translation]))


def object_projection(path: str | os.PathLike[str], camera: int = 2) -> np.ndarray:
    """Return P · R0_rect · Tr_velo_to_cam of the object layout, (3, 4) float64; see `raw_projection`."""
    file = Path(path)
    entries = _read_entries(file)
    projection = _matrix(entries, f"P{camera}", (3, 4), file)
    rectify = _homogeneous(_matrix(entries, "R0_rect", (3, 3), file))
    return projection @ rectify @ _homogeneous(_matrix(entries, "Tr_velo_to_cam", (3, 4), file))


def _read_entries(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The calibration file {path} is missing or unreadable. KITTI ships it with each date (raw) or "
            "frame "
            "(object): fetch the calibration files too, and keep them in KITTI's layout."
        ) from error
    return {key.strip(): value for key, colon, value in (line.partition(":") for line in lines) if colon}


def _matrix(entries: dict[str, str], key: str, shape: tuple[int, int], path: Path) -> np.ndarray:
    try:
        return np.array([float(word) for word in entries[key].split()]).reshape(shape)
    except (KeyError, ValueError) as error:
        raise DataError(
            f"The calibration file {path} has no valid entry {key!r} of {shape[0]}x{shape[1]} numbers. "
            "Fetch the file again."
        ) from error


def _homogeneous(matrix: np.ndarray) -> np.ndarray:
    """Extend a 3x3 or 3x4 matrix to 4x4."""
    full = np.eye(4)
    full[:3, : matrix.shape[1]] = matrix
    return full
