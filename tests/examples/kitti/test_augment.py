"""The paper's augmentation: geometry on both, colour on the image alone, zoom divides depth."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatedprune.examples.kitti.augment import AUGMENTATIONS, Augmentation, transform


def scene(height: int = 40, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red channel is a hundredth of its depth: they must stay together."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    depth = 20 + rows + columns / 2
    return np.repeat((depth / 100)[..., None], 3, axis=2), depth


def test_flip_mirrors_both() -> None:
    image, depth = scene()
    flipped, mirrored = transform(image, depth, flip=True, angle=0, scale=1)
    np.testing.assert_allclose(mirrored, depth[:, ::-1], rtol=1e-6)
    np.testing.assert_allclose(flipped, image[:, ::-1], atol=1e-5)


@settings(max_examples=30)
@given(st.booleans(), st.floats(-15, 15), st.floats(1, 2))
def test_image_and_depth_move_together(flip: bool, angle: float, scale: float) -> None:
    image, depth = scene()
    moved, moved_depth = transform(image, depth, flip=flip, angle=angle, scale=scale)
    valid = moved_depth > 0
    inner = np.zeros_like(valid)
    inner[12:-12, 12:-12] = True
    assert valid[inner].all()
    # The nearest pixel is at most 0.71 pixels away, and depth changes by 1.12 m a pixel along its gradient.
    np.testing.assert_allclose(moved_depth[inner] * scale, moved[..., 0][inner] * 100, atol=0.85)


def test_zoom_divides_depth_about_the_centre() -> None:
    image, depth = scene(41, 61)
    _, zoomed = transform(image, depth, flip=False, angle=0, scale=2)
    assert zoomed[20, 30] == pytest.approx(depth[20, 30] / 2)
    assert zoomed[30, 50] == pytest.approx(depth[25, 40] / 2)


def test_depth_takes_the_nearest_value_and_has_none_beyond_the_border() -> None:
    image, depth = scene()
    depth = np.where(np.indices(depth.shape).sum(0) % 7 == 0, depth, 0).astype(np.float32)
    _, turned = transform(image, depth, flip=False, angle=15, scale=1)
    assert set(np.unique(turned)) <= set(np.unique(depth))  # nothing in between
    full = transform(image, np.ones_like(depth), flip=False, angle=15, scale=1)[1]
    assert full[0, 0] == full[-1, -1] == 0 and full[20, 30] == 1


def test_rotation_turns_by_the_angle() -> None:
    depth = np.zeros((101, 101), np.float32)
    depth[50, 90] = 5.0
    depth = cv2.dilate(depth, np.ones((3, 3)))
    turned = transform(np.zeros((101, 101, 3), np.float32), depth, flip=False, angle=15, scale=1)[1]
    row, column = (index.mean() for index in np.nonzero(turned))
    assert np.degrees(np.arctan2(50 - row, column - 50)) == pytest.approx(15, abs=1)


def test_the_papers_ranges() -> None:
    paper = Augmentation()
    assert (paper.flip, paper.rotation, paper.scale, paper.jitter, paper.rgb) == (0.6, 15, (1, 2), 0.5, (0.7, 1.2))
    assert AUGMENTATIONS["paper"] == paper


def test_each_part_happens_as_often_and_as_far_as_it_should() -> None:
    image, depth = np.full((8, 16, 3), 0.4, np.float32), np.full((8, 16), 10.0, np.float32)
    depth[:, :3] = 40  # the left edge is far, so a flip can be seen
    augment = Augmentation(rotation=0, scale=(1, 1))
    pairs = [augment(image, depth, np.random.default_rng(seed)) for seed in range(400)]
    assert np.mean([d[0, -1] == 40 for _, d in pairs]) == pytest.approx(0.6, abs=0.08)
    channels = np.array([i.mean(axis=(0, 1)) for i, _ in pairs])
    assert channels.min() < 0.2 and channels.max() > 0.65
    assert channels.min() >= 0.4 * 0.5 * 0.7 and channels.max() <= 0.4 * 1.5 * 1.2 + 1e-6
    assert np.abs(channels[:, 0] - channels[:, 2]).max() > 0.1  # each channel has its own factor
    zooms = [40 / Augmentation(flip=0, rotation=0)(image, depth * 0 + 40, np.random.default_rng(s))[1][4, 8]
             for s in range(200)]  # fmt: skip
    assert 1 <= min(zooms) < 1.05 and 1.95 < max(zooms) <= 2


def test_colour_leaves_depth_alone_and_values_in_range() -> None:
    image, depth = scene()
    augment = Augmentation(flip=0, rotation=0, scale=(1, 1))
    colored, same = augment(image, depth, np.random.default_rng(3))
    np.testing.assert_array_equal(same, depth)
    assert np.abs(colored - image).max() > 0.05
    assert colored.min() >= 0 and colored.max() <= 1 and colored.dtype == np.float32


def test_the_generator_decides_everything() -> None:
    image, depth = scene()
    one, other = (Augmentation()(image, depth, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(one[0], other[0])
    assert np.abs(one[0] - Augmentation()(image, depth, np.random.default_rng(8))[0]).max() > 0.01
