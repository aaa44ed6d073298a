"""The three layouts and the split files, on synthetic frames and on real ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from gatedprune.errors import ConfigError, DataError
from gatedprune.examples.kitti.images import write_depth, write_image
from gatedprune.examples.kitti.layouts import Frame, find_frames, ground_truth_source, load_frame, read_split
from gatedprune.examples.kitti.synthetic import DATE, SyntheticSample


def test_projected_scans_agree_with_the_exact_depth(sample: SyntheticSample) -> None:
    """From calibration file to pixel: the scan's depth is what the ray caster saw there."""
    scans = find_frames(sample.root, split=sample.test)
    exact = find_frames(sample.root, split=sample.test, annotated=sample.exact)
    assert len(scans) == len(exact) == 2
    assert (ground_truth_source(scans), ground_truth_source(exact)) == (
        "projected Velodyne points",
        "annotated depth maps",
    )
    for one, other in zip(scans, exact, strict=True):
        (image, depth), (same, truth) = load_frame(one), load_frame(other)
        np.testing.assert_array_equal(image, same)
        assert depth.shape == truth.shape == image.shape[:2] == (375, 1242)
        both = (depth > 0) & (truth > 0)
        error = np.abs(depth - truth)[both]
        assert both.sum() > 10_000
        # 1.5 cm of noise; more only where laser and camera see past an edge differently.
        assert np.median(error) < 0.03
        assert (error < 0.25).mean() > 0.9


def test_a_projection_that_is_off_by_a_pixel_would_be_noticed(sample: SyntheticSample) -> None:
    scan, exact = (find_frames(sample.root, split=sample.test, annotated=a)[0] for a in (None, sample.exact))
    depth, truth = load_frame(scan)[1], load_frame(exact)[1]

    for axis in (0, 1):
        # Where depth changes steadily along the axis (the road, the walls), a pixel more or less must show.
        slope = np.abs(np.roll(truth, 1, axis) - np.roll(truth, -1, axis)) / 2
        steady = (truth > 0) & (slope > 0.05) & (slope < 0.3)
        errors = []
        for step in (0, 1, -1):
            shifted = np.roll(depth, step, axis)
            both = steady & (shifted > 0)
            assert both.sum() > 500
            errors.append(float(np.median(np.abs(shifted - truth)[both])))
        assert errors[0] < 0.04 and min(errors[1:]) > 1.5 * errors[0], errors


def test_the_whole_raw_layout_without_a_split(sample: SyntheticSample) -> None:
    frames = find_frames(sample.root)
    assert len(frames) == 6
    assert frames == find_frames(sample.root, layout="raw")
    assert {frame.name for frame in frames} == {
        f"{folder}/{number} {side}" for s in (sample.train, sample.test) for folder, number, side in read_split(s)
    }


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    for number, depth in ((3, 5.0), (4, 6.0)):
        for folder in ("rgb", "depth"):
            (tmp_path / folder).mkdir(exist_ok=True)
        write_image(tmp_path / "rgb" / f"{number}.png", np.zeros((6, 8, 3), np.uint8))
        write_depth(tmp_path / "depth" / f"{number}.png", np.full((6, 8), depth))
    return tmp_path


def test_the_annotated_layout(annotated: Path, tmp_path: Path) -> None:
    frames = find_frames(annotated)
    assert [frame.name for frame in frames] == ["3", "4"]
    assert load_frame(frames[1])[1].max() == 6
    (tmp_path / "list.txt").write_text("4\n")
    assert [frame.name for frame in find_frames(annotated, split=tmp_path / "list.txt")] == ["4"]


def test_kittis_depth_selection_folders(annotated: Path) -> None:
    image, depth = annotated / "image", annotated / "groundtruth_depth"
    (annotated / "rgb").rename(image)
    (annotated / "depth").rename(depth)
    (image / "3.png").rename(image / "d_sync_image_0000000003_image_02.png")
    (depth / "3.png").rename(depth / "d_sync_groundtruth_depth_0000000003_image_02.png")
    assert sorted(load_frame(frame)[1].max() for frame in find_frames(annotated)) == [5, 6]


def test_image_and_depth_of_different_sizes_are_refused(annotated: Path) -> None:
    write_depth(annotated / "depth" / "3.png", np.ones((6, 9)))
    with pytest.raises(DataError, match="9x6 pixels, its image .* 8x6"):
        load_frame(find_frames(annotated)[0])


def test_a_split_that_names_missing_frames(sample: SyntheticSample, tmp_path: Path) -> None:
    split = tmp_path / "split.txt"
    present = f"{DATE}/{DATE}_drive_0001_sync 0 l"
    split.write_text("\n".join([present, *(f"{DATE}/{DATE}_drive_0009_sync {i} l" for i in range(7))]))
    with pytest.raises(
        DataError, match=r"names 8 frames, and 7 of them.*drive_0009_sync/0000000000 l.*--skip-missing"
    ) as error:
        find_frames(sample.root, split=split)
    assert str(error.value).count("drive_0009") == 6  # three frames listed, each with its name and its file
    frames = find_frames(sample.root, split=split, skip_missing=True)
    assert [frame.name for frame in frames] == [f"{DATE}/{DATE}_drive_0001_sync/0000000000 l"]


def test_a_split_without_any_frame_here(sample: SyntheticSample, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("2011_09_26/2011_09_26_drive_0002_sync 69 l\n")
    with pytest.raises(DataError, match="gives no frame whose files are all under"):
        find_frames(sample.root, split=tmp_path / "other.txt", skip_missing=True)


def test_the_right_camera(sample: SyntheticSample, tmp_path: Path) -> None:
    (tmp_path / "right.txt").write_text(f"{DATE}/{DATE}_drive_0001_sync 0 r\n")
    with pytest.raises(DataError, match="image_03"):
        find_frames(sample.root, split=tmp_path / "right.txt")


def test_a_missing_scan_and_a_missing_calibration(sample: SyntheticSample, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sample.root, copy)
    frames = find_frames(copy)
    (copy / DATE / "calib_velo_to_cam.txt").unlink()
    with pytest.raises(DataError, match=r"calib_velo_to_cam\.txt is missing"):
        load_frame(frames[0])
    frames[0].scan.unlink()
    with pytest.raises(DataError, match=r"1 of them are not under"):
        find_frames(copy)


def test_other_errors(sample: SyntheticSample, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_frames(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds none of KITTI's layouts"):
        find_frames(tmp_path)
    with pytest.raises(ConfigError, match="must be one of raw, object, annotated or auto"):
        find_frames(sample.root, layout="odometry")
    with pytest.raises(ConfigError, match="goes with the raw layout"):
        find_frames(sample.root, layout="object", annotated=tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_split(tmp_path / "missing.txt")
    for content, message in (("", "names no frames"), ("a 1 x", "Line 1 .* side l or r"), ("a 1", "Line 1")):
        (tmp_path / "split.txt").write_text(content)
        with pytest.raises(DataError, match=message):
            read_split(tmp_path / "split.txt")


@pytest.mark.parametrize(
    ("folder", "count", "source"),
    [
        ("raw", 30, "projected Velodyne points"),
        ("object", 12, "projected Velodyne points"),
        ("annotated", 3, "annotated depth maps"),
    ],
)
def test_real_frames(shared_data: Path, folder: str, count: int, source: str) -> None:
    root = shared_data / "kitti" / folder
    if not root.is_dir():
        pytest.skip(f"no KITTI frames: ../shared/data/kitti/{folder} is missing")
    frames = find_frames(root)
    assert len(frames) == count
    assert ground_truth_source(frames) == source
    image, depth = load_frame(frames[1])
    assert image.shape == (*depth.shape, 3)
    valid = depth[depth > 0]
    assert 0.03 < valid.size / depth.size < 0.4
    assert 2 < valid.min() < np.median(valid) < valid.max() < 130


def test_the_published_eigen_list_is_read(shared_data: Path) -> None:
    split = shared_data / "kitti" / "splits" / "eigen_test_files.txt"
    if not split.is_file():
        pytest.skip("no split: ../shared/data/kitti/splits is missing")
    assert len(read_split(split)) == 697
    frames = find_frames(shared_data / "kitti" / "raw", split=split, skip_missing=True)
    assert 20 < len(frames) <= 30 and all(isinstance(frame, Frame) for frame in frames)
