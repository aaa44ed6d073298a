"""Scans and their projection: the right pixel, the nearest point, nothing lost, nothing folded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatedprune.errors import DataError
from gatedprune.examples.kitti.velodyne import project_scan, read_scan, resize_sparse, write_scan

# A camera that looks along the laser's x axis: u = cu - f y / x, v = cv - f z / x, depth = x.
FOCAL, CENTER_U, CENTER_V = 100.0, 32.0, 16.0
PROJECTION = np.array([[CENTER_U, -FOCAL, 0, 0], [CENTER_V, 0, -FOCAL, 0], [1.0, 0, 0, 0]])
SIZE = (33, 65)


def point(u: float, v: float, depth: float) -> list[float]:
    return [depth, -(u - CENTER_U) / FOCAL * depth, -(v - CENTER_V) / FOCAL * depth, 0.5]


PIXELS = st.tuples(st.integers(0, SIZE[1] - 1), st.integers(0, SIZE[0] - 1), st.floats(1, 100))


@given(st.lists(PIXELS, max_size=40), st.floats(-0.45, 0.45), st.floats(-0.45, 0.45))
def test_each_point_lands_on_its_nearest_pixel_and_the_nearest_point_wins(
    pixels: list[tuple[int, int, float]], off_u: float, off_v: float
) -> None:
    expected = np.zeros(SIZE, np.float32)
    for u, v, depth in pixels:
        expected[v, u] = min(expected[v, u] or np.inf, depth)
    points = np.array([point(u + off_u, v + off_v, d) for u, v, d in pixels], np.float64).reshape(-1, 4)
    np.testing.assert_allclose(project_scan(points, PROJECTION, SIZE), expected, rtol=1e-5)


def test_neighbouring_rows_are_not_folded_into_one() -> None:
    """The port of KITTI's MATLAB kit takes row · (width - 1) + column for a pixel: these two collide there."""
    width = SIZE[1]
    depth = project_scan(np.array([point(0, 11, 5.0), point(width - 1, 10, 9.0)]), PROJECTION, SIZE)
    assert depth[11, 0] == pytest.approx(5) and depth[10, width - 1] == pytest.approx(9)
    assert np.count_nonzero(depth) == 2


def test_borders_are_half_a_pixel_beyond_the_outer_centres() -> None:
    height, width = SIZE
    inside = [point(-0.4, 5, 7.0), point(width - 0.6, 5, 7.0), point(5, -0.4, 7.0), point(5, height - 0.6, 7.0)]
    outside = [point(-0.6, 9, 7.0), point(width - 0.4, 9, 7.0), point(9, -0.6, 7.0), point(9, height - 0.4, 7.0)]
    assert np.count_nonzero(project_scan(np.array(inside), PROJECTION, SIZE)) == 4
    assert np.count_nonzero(project_scan(np.array(outside), PROJECTION, SIZE)) == 0


def test_points_behind_the_camera_do_not_appear() -> None:
    behind = np.array([[-10.0, 0, 0, 0.5], [0.0, 1, 1, 0.5]])
    assert not project_scan(behind, PROJECTION, SIZE).any()


def test_resizing_keeps_the_nearest_of_each_cell_and_invents_nothing() -> None:
    depth = np.zeros((4, 8), np.float32)
    depth[0, 0], depth[1, 1], depth[3, 7] = 9.0, 4.0, 30.0
    small = resize_sparse(depth, (2, 4))
    assert small[0, 0] == 4 and small[1, 3] == 30 and np.count_nonzero(small) == 2
    large = resize_sparse(depth, (8, 16))
    assert sorted(large[large > 0].tolist()) == [4, 9, 30]
    assert resize_sparse(depth, (4, 8)) is depth


def test_scans_are_read_as_they_were_written(tmp_path: Path) -> None:
    points = np.arange(20, dtype=np.float32).reshape(5, 4)
    write_scan(tmp_path / "scan.bin", points)
    assert (tmp_path / "scan.bin").stat().st_size == 80
    np.testing.assert_array_equal(read_scan(tmp_path / "scan.bin"), points)


def test_damaged_scans_are_refused(tmp_path: Path) -> None:
    scan = tmp_path / "scan.bin"
    with pytest.raises(DataError, match=r"scan\.bin cannot be read"):
        read_scan(scan)
    for content in (b"", bytes(33)):
        scan.write_bytes(content)
        with pytest.raises(DataError, match=r"scan\.bin is truncated or empty.*Fetch the file again"):
            read_scan(scan)
    write_scan(scan, np.full((2, 4), np.nan))
    with pytest.raises(DataError, match="not finite"):
        read_scan(scan)
