"""Images, depth PNGs and calibration files: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gatedprune.errors import DataError
from gatedprune.examples.kitti.calibration import object_projection, raw_projection
from gatedprune.examples.kitti.images import read_depth, read_image, write_depth, write_image
from gatedprune.examples.kitti.synthetic import DATE, SyntheticSample


@pytest.fixture
def png(tmp_path: Path) -> Path:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    write_image(tmp_path / "image.png", image)
    return tmp_path / "image.png"


def test_images_come_back_as_rgb(tmp_path: Path) -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    image[..., 0] = 200
    write_image(tmp_path / "red.png", image)
    np.testing.assert_array_equal(read_image(tmp_path / "red.png"), image)


def test_depth_pngs_hold_256ths_of_a_metre(tmp_path: Path) -> None:
    depth = np.array([[0.0, 1.0, 80.25], [3.999, 255.9, 300.0]], np.float32)
    write_depth(tmp_path / "depth.png", depth)
    expected = np.minimum(depth, 65535 / 256)
    np.testing.assert_allclose(read_depth(tmp_path / "depth.png"), expected, atol=1 / 512)


@pytest.mark.parametrize("keep", [0, 5, 40, 300, -1])
def test_truncated_pngs_are_refused(png: Path, keep: int) -> None:
    png.write_bytes(png.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"image\.png is a damaged PNG file: it (is truncated|does not start)"):
        read_image(png)


def test_a_png_with_a_wrong_byte_is_refused(png: Path) -> None:
    data = bytearray(png.read_bytes())
    data[len(data) // 2] ^= 0xFF
    png.write_bytes(data)
    with pytest.raises(DataError, match="checksum of its chunk"):
        read_image(png)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.jpg").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DataError, match="not an image that OpenCV can read"):
        read_image(tmp_path / "note.jpg")
    with pytest.raises(DataError, match="is empty"):
        read_image(tmp_path / "empty.jpg")
    with pytest.raises(DataError, match=r"missing\.png cannot be read"):
        read_image(tmp_path / "missing.png")


def test_an_ordinary_image_is_no_depth_map(png: Path) -> None:
    with pytest.raises(DataError, match=r"not a KITTI depth map.*uint8 of shape"):
        read_depth(png)


def test_calibration_of_the_raw_layout(sample: SyntheticSample) -> None:
    projection = raw_projection(sample.root / DATE)
    # A point 10 m ahead of the laser is near the image's centre, and 27 cm less far from the camera.
    u, v, depth = projection @ [10.0, 0, 0, 1]
    assert depth == pytest.approx(9.73, abs=0.05)
    assert (u / depth, v / depth) == pytest.approx((609, 172), abs=20)


def test_calibration_of_the_object_layout(tmp_path: Path) -> None:
    file = tmp_path / "000000.txt"
    file.write_text(
        "P2: 700 0 600 0 0 700 180 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\n"
        "Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 -0.3\n\n"
    )
    u, v, depth = object_projection(file) @ [10.3, 1.0, 0.5, 1]
    assert (u / depth, v / depth, depth) == pytest.approx((600 - 70, 180 - 35, 10.0))


def test_missing_or_damaged_calibration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"calib_cam_to_cam\.txt is missing or unreadable.*fetch the calibration"):
        raw_projection(tmp_path)
    (tmp_path / "calib_cam_to_cam.txt").write_text("P_rect_02: 1 2 3\n")
    with pytest.raises(DataError, match=r"no valid entry 'P_rect_02' of 3x4 numbers"):
        raw_projection(tmp_path)
    with pytest.raises(DataError, match=r"no valid entry 'P_rect_03'"):
        raw_projection(tmp_path, camera=3)
