"""Velodyne scans: reading them, and projecting them to a sparse depth map."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from gatedprune.errors import DataError

__all__ = ["project_scan", "read_scan", "resize_sparse", "write_scan"]

POINT_BYTES = 16


def read_scan(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a KITTI scan: float32 (N, 4), each row x (forward), y (left), z (up) in metres and the
    reflectance.

    Raises:
        DataError: the file is missing, empty, truncated (not a multiple of 16 bytes), or holds no finite
            points.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"The Velodyne scan {path} cannot be read ({error.strerror}). Check the path.") from error
    if not data or len(data) % POINT_BYTES:
        raise DataError(
            f"The Velodyne scan {path} is truncated or empty: its {len(data)} bytes are no multiple of "
            f"{POINT_BYTES} "
            "(four float32 a point). Fetch the file again."
        )
    points = np.frombuffer(data, "<f4").reshape(-1, 4)
    if not np.isfinite(points).all():
        raise DataError(f"The Velodyne scan {path} holds values that are not finite. Fetch the file again.")
    return points


def write_scan(path: str | os.PathLike[str], points: np.ndarray) -> None:
    """Write points (N, 4) as a KITTI scan."""
    Path(path).write_bytes(np.ascontiguousarray(points, "<f4").tobytes())


def project_scan(points: np.ndarray, projection: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Project a scan to a sparse depth map, float32 (H, W), in metres along the camera's axis; 0 means no
    point.

    A point belongs to the pixel whose centre is nearest; pixel centres are at whole coordinates, counted from
    0, as KITTI's calibration has them. Where several points fall on a pixel, the nearest wins. (The port of
    KITTI's MATLAB development kit that many depth projects share subtracts one from the rounded coordinates,
    which shifts the map by a pixel, and folds pixels of neighbouring rows into one when it looks for
    duplicates.)

    Args:
        points: (N, 3) or (N, 4); only x, y, z are used.
        projection: (3, 4), from `calibration`.
        size: height and width of the image.
    """
    projected = points[:, :3].astype(np.float64) @ projection[:, :3].T + projection[:, 3]
    projected = projected[projected[:, 2] > 0]  # in front of the camera
    depth = projected[:, 2]
    return _scatter_nearest(projected[:, 0] / depth, projected[:, 1] / depth, depth, size)


def resize_sparse(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Move the values of a sparse depth map (H, W) to a map of another size; the nearest wins where several
    meet.

    Interpolation would mix values with gaps, and sampling would drop most points of a map that shrinks.
    """
    if depth.shape == tuple(size):
        return depth
    v, u = np.nonzero(depth)
    scale_v, scale_u = size[0] / depth.shape[0], size[1] / depth.shape[1]
    # Pixel centres are at +0.5 of the pixel grid, as in cv2.resize.
    return _scatter_nearest((u + 0.5) * scale_u - 0.5, (v + 0.5) * scale_v - 0.5, depth[v, u], size)


def _scatter_nearest(u: np.ndarray, v: np.ndarray, depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    column, row = np.floor(u + 0.5), np.floor(v + 0.5)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    target = np.full(height * width, np.inf, np.float32)
    index = row[inside].astype(np.int64) * width + column[inside].astype(np.int64)
    np.minimum.at(target, index, depth[inside].astype(np.float32))
    target[np.isinf(target)] = 0
    return target.reshape(height, width)
